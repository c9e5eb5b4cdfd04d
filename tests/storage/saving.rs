//! Saving: what goes in comes out, and a repeat is harmless.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use timelined::domain::{
    AgentId, Category, Delivery, EventId, NewContactEvent, Priority, SessionId, Source, Visibility,
    event_types,
};
use timelined::storage::{Recording, Saved};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::builders::*;

/// A text in many scripts, with what JSON and SQL must not stumble over.
const UNICODE: &str =
    "Łódź ★ 東京 مرحبا e\u{301} 👩‍👩‍👧 \u{10ffff} '\"\\ ; -- $1 %s \t\r\n\u{1}\u{7f}\u{feff}\u{2028}";

on_both_engines! {
    async fn every_field_comes_back_as_it_was_saved(db) {
        let payload = json!({
            "z": 1, "a": [null, true, {"deep": [[]]}], "number": 0.1, "huge": 1e300,
            "beyond_2_53": 9_007_199_254_740_993_u64, "max": u64::MAX, "min": i64::MIN, "text": UNICODE, "": "empty key"
        });
        let saved = NewContactEvent::new(
            contact(7), "a.type_of.64_characters".parse().unwrap(), Category::CustomField, Source::Integration,
        )
            .id(id(42))
            .session(session(3))
            .priority(Priority::High)
            .title(UNICODE)
            .description(UNICODE.repeat(20))
            .payload(payload)
            .metadata(json!({"trace": "00-4bf9", "n": -0.5}))
            .triggered_by(agent(9))
            .integration_source("HubSpot ñ")
            .realtime()
            .visible_to_client(true)
            .visible_to_agent(false)
            .expires_at(t0() + days(400) + MICRO)
            .occurred_at(t0() - hours(1) - MICRO)
            .recorded();
        db.given(&acme(), [saved.clone()]).await;
        let found = db.events.find_by_id(&acme(), id(42)).await.unwrap().unwrap();
        assert_eq!(found, saved);
        assert_eq!(serde_json::to_string(&found).unwrap(), serde_json::to_string(&saved).unwrap());
    }

    async fn every_default_comes_back(db) {
        let saved = event().recorded();
        db.given(&acme(), [saved.clone()]).await;
        let found = db.events.find_by_id(&acme(), saved.id).await.unwrap().unwrap();
        assert_eq!(found, saved);
        assert_eq!(found.priority, Priority::Normal);
        assert_eq!(found.visibility, Visibility { client: false, agent: true });
        assert_eq!((found.delivery, found.read_at, found.expires_at), (Delivery::NotRealtime, None, None));
        assert_eq!((found.session_id, found.triggered_by), (None::<SessionId>, None::<AgentId>));
        assert_eq!((found.title, found.description, found.integration_source), (None, None, None));
        assert_eq!((found.payload.as_str(), found.metadata.as_str()), ("{}", "{}"));
    }

    async fn every_member_of_every_set_is_stored(db) {
        let mut events = Vec::new();
        for category in Category::ALL {
            for source in Source::ALL {
                let kind = event_types::ALL[events.len() % event_types::ALL.len()].clone();
                events.push(
                    NewContactEvent::new(contact(1), kind, *category, *source)
                        .integration_source("x")
                        .priority(Priority::ALL[events.len() % 4])
                        .id(id(events.len() as u64 + 1))
                        .recorded(),
                );
            }
        }
        db.given(&acme(), events.clone()).await;
        for event in events {
            let found = db.events.find_by_id(&acme(), event.id).await.unwrap();
            assert_eq!(found, Some(event));
        }
    }

    async fn times_come_back_to_the_microsecond_even_a_century_old_ones(db) {
        let first_instant: DateTime<Utc> = "0001-01-01T00:00:00Z".parse().unwrap();
        let last_instant: DateTime<Utc> = "9999-12-31T23:59:59.999999Z".parse().unwrap();
        let times = [
            t0(),
            t0() - days(36_525) + MICRO,
            DateTime::from_timestamp_micros(-1).unwrap(),
            DateTime::from_timestamp_micros(0).unwrap(),
            "1582-10-10T12:34:56.000001Z".parse().unwrap(),
            first_instant,
            t0() + minutes(5),
        ];
        for (number, occurred_at) in (1..).zip(times) {
            let saved = event().id(id(number)).occurred_at(occurred_at).expires_at(last_instant).recorded();
            db.given(&acme(), [saved.clone()]).await;
            assert_eq!(db.events.find_by_id(&acme(), id(number)).await.unwrap(), Some(saved), "{occurred_at}");
        }
    }

    async fn texts_and_objects_are_stored_at_their_limits(db) {
        let object = |bytes: usize| json!({ "k": "x".repeat(bytes - 8) });
        let saved = event()
            .title("é".repeat(500))
            .description("😀".repeat(20_000))
            .integration_source("é".repeat(255))
            .payload(object(64 * 1024))
            .metadata(object(16 * 1024))
            .recorded();
        assert_eq!((saved.payload.as_str().len(), saved.metadata.as_str().len()), (65_536, 16_384));
        db.given(&acme(), [saved.clone()]).await;
        assert_eq!(db.events.find_by_id(&acme(), saved.id).await.unwrap(), Some(saved));
    }

    async fn a_large_payload_of_odd_numbers_is_kept_digit_by_digit(db) {
        let numbers: Vec<Value> = (0..2_800_u64)
            .map(|n| match n % 4 {
                0 => json!(1e300),
                1 => json!(0.1),
                2 => json!(9_007_199_254_740_993_u64),
                _ => json!(-1.5e-300 * n as f64),
            })
            .collect();
        let saved = event().payload(json!({ "numbers": numbers })).recorded();
        assert!(saved.payload.as_str().len() > 20_000);
        db.given(&acme(), [saved.clone()]).await;
        let found = db.events.find_by_id(&acme(), saved.id).await.unwrap().unwrap();
        assert_eq!(found.payload.as_str(), saved.payload.as_str());
    }

    async fn an_object_that_another_program_stored_keeps_its_order_its_repeats_and_its_spelling(db) {
        let text = r#"{"z":1.0,"a":1E+2,"z":"\u00e9","m":{"b":0,"a":-0}}"#;
        db.execute(&format!(
            "insert into contact_events (tenant_id, id, contact_id, event_type, category, source, payload)
             values ('acme', '{}', '{}', 'note_added', 'note', 'agent', '{text}')",
            id(1), contact(1)
        )).await.unwrap();
        let found = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(found.payload.as_str(), text);
    }

    async fn the_view_has_the_names_of_the_contract(db) {
        db.given(&acme(), [event().recorded()]).await;
        let found = db.count(
            "(select seq, id, tenant_id, contact_id, session_id, event_type, category, priority, source, title,
                     description, payload, metadata, triggered_by, integration_source, is_realtime, delivered,
                     delivered_at, read, read_at, visible_to_client, visible_to_agent, expires_at, occurred_at,
                     created_at
              from timeline_events) e",
        ).await;
        assert_eq!(found, 1);
    }

    async fn an_empty_batch_saves_nothing(db) {
        assert_eq!(db.events.save(&acme(), Vec::new()).await.unwrap(), []);
    }

    async fn a_thousand_events_are_saved_in_one_batch_beside_those_that_exist(db) {
        let existing = (1..=1000).step_by(10).map(id);
        db.given(&acme(), existing.map(|id| event().id(id).title("first").recorded())).await;
        let batch: Vec<_> = (1..=1000).map(|n| plain(event().id(id(n)).title("second").recorded())).collect();
        let saved = db.events.save(&acme(), batch).await.unwrap();
        for (index, saved) in saved.iter().enumerate() {
            let expected = if index % 10 == 0 { Saved::IdTaken } else { Saved::Created };
            assert_eq!(*saved, expected, "{index}");
        }
        assert_eq!(saved.len(), 1000);
        assert_eq!(db.count("contact_events").await, 1000);
        assert_eq!(db.count("contact_events where title = 'first'").await, 100);
    }

    async fn a_thousand_keyed_events_are_answered_in_the_order_given(db) {
        let batch = |body: fn(u64) -> u8| -> Vec<Recording> {
            (1..=1000).rev().map(|n| keyed(event().recorded(), &format!("key {n}"), body(n))).collect()
        };
        let first = batch(|_| 1);
        let ids: Vec<EventId> = first.iter().map(|recording| recording.event.id).collect();
        let saved = db.events.save(&acme(), first).await.unwrap();
        assert_eq!(saved, vec![Saved::Created; 1000]);
        let again = db.events.save(&acme(), batch(|n| if n % 2 == 0 { 1 } else { 2 })).await.unwrap();
        for ((n, saved), id) in (1..=1000).rev().zip(&again).zip(ids) {
            let expected = if n % 2 == 0 { Saved::Repeat(id) } else { Saved::Mismatch };
            assert_eq!(*saved, expected, "{n}");
        }
        assert_eq!(db.count("contact_events").await, 1000);
    }

    async fn the_same_id_twice_in_one_batch_is_saved_once(db) {
        let batch = vec![
            plain(event().id(id(1)).title("first").recorded()),
            plain(event().id(id(1)).title("second").recorded()),
        ];
        assert_eq!(db.events.save(&acme(), batch).await.unwrap(), [Saved::Created, Saved::IdTaken]);
        assert_eq!(db.count("contact_events where title = 'first'").await, 1);
    }

    async fn a_repeat_is_answered_with_the_first_event(db) {
        let (first, second) = (event().recorded(), event().recorded_at(t0() + hours(1)));
        let save = async |event, body| db.events.save(&acme(), vec![keyed(event, "k", body)]).await.unwrap();
        assert_eq!(save(first.clone(), 1).await, [Saved::Created]);
        assert_eq!(save(second, 1).await, [Saved::Repeat(first.id)]);
        assert_eq!(db.count("contact_events").await, 1);
    }

    async fn the_same_key_with_another_body_is_a_mismatch_and_saves_nothing(db) {
        let save = async |body| db.events.save(&acme(), vec![keyed(event().recorded(), "k", body)]).await.unwrap();
        assert_eq!(save(1).await, [Saved::Created]);
        assert_eq!(save(2).await, [Saved::Mismatch]);
        assert_eq!(db.count("contact_events").await, 1);
    }

    async fn a_repeat_is_known_even_when_the_event_is_gone(db) {
        let first = event().recorded();
        db.events.save(&acme(), vec![keyed(first.clone(), "k", 1)]).await.unwrap();
        db.events.delete(&acme(), first.id, &subject("s"), t0()).await.unwrap();
        let again = db.events.save(&acme(), vec![keyed(event().recorded(), "k", 1)]).await.unwrap();
        assert_eq!(again, [Saved::Repeat(first.id)]);
        assert_eq!(db.count("contact_events").await, 0);
    }

    async fn a_key_is_as_good_as_new_after_24_hours(db) {
        let save = async |now, body| {
            let event = event().recorded_at(now);
            (event.id, db.events.save(&acme(), vec![keyed(event, "k", body)]).await.unwrap())
        };
        let (first, _) = save(t0(), 1).await;
        assert_eq!(save(t0() + hours(24) - MICRO, 1).await.1, [Saved::Repeat(first)]);
        let (second, saved) = save(t0() + hours(24), 2).await;
        assert_eq!(saved, [Saved::Created]);
        assert_eq!(save(t0() + hours(25), 2).await.1, [Saved::Repeat(second)]);
        assert_eq!(save(t0() + hours(25), 1).await.1, [Saved::Mismatch]);
        // The window began anew with the second event.
        assert_eq!(save(t0() + hours(48) - MICRO, 2).await.1, [Saved::Repeat(second)]);
    }

    async fn within_one_batch_the_first_use_of_a_key_counts(db) {
        let first = event().recorded();
        let batch = vec![
            keyed(first.clone(), "k", 1),
            keyed(event().recorded(), "k", 1),
            keyed(event().recorded(), "k", 2),
            keyed(event().recorded(), "other", 2),
            plain(event().recorded()),
        ];
        let saved = db.events.save(&acme(), batch).await.unwrap();
        assert_eq!(
            saved,
            [Saved::Created, Saved::Repeat(first.id), Saved::Mismatch, Saved::Created, Saved::Created]
        );
        assert_eq!(db.count("contact_events").await, 3);
    }

    async fn keys_belong_to_their_tenant(db) {
        for tenant in [acme(), globex()] {
            let event = event().record(&tenant, t0()).unwrap();
            let saved = db.events.save(&tenant, vec![keyed(event, "k", 1)]).await.unwrap();
            assert_eq!(saved, [Saved::Created], "{tenant}");
        }
    }

    async fn odd_keys_are_keys(db) {
        let keys = ["", "'; drop table contact_events; --", UNICODE, &"k".repeat(255), "K", "k", "k "];
        let batch: Vec<_> = keys.iter().map(|key| keyed(event().recorded(), key, 1)).collect();
        let saved = db.events.save(&acme(), batch).await.unwrap();
        assert_eq!(saved, vec![Saved::Created; keys.len()]);
    }

    async fn a_taken_id_saves_nothing_and_leaves_the_key_free(db) {
        db.given(&acme(), [event().id(id(1)).title("first").recorded()]).await;
        let taken = keyed(event().id(id(1)).title("second").recorded(), "k", 1);
        assert_eq!(db.events.save(&acme(), vec![taken]).await.unwrap(), [Saved::IdTaken]);
        assert_eq!(db.count("contact_events where title = 'first'").await, 1);
        assert_eq!(db.count("idempotency_keys").await, 0);
        let free = keyed(event().id(id(2)).recorded(), "k", 2);
        assert_eq!(db.events.save(&acme(), vec![free]).await.unwrap(), [Saved::Created]);
    }

    async fn two_tenants_may_use_the_same_ids(db) {
        for tenant in [acme(), globex()] {
            let event = event().id(id(1)).title(tenant.as_str()).record(&tenant, t0()).unwrap();
            db.given(&tenant, [event.clone()]).await;
            assert_eq!(db.events.find_by_id(&tenant, id(1)).await.unwrap(), Some(event));
        }
        let nobody = timelined::domain::TenantId::new("initech").unwrap();
        assert_eq!(db.events.find_by_id(&nobody, id(1)).await.unwrap(), None);
    }

    async fn of_sixteen_concurrent_saves_with_one_key_one_creates(db) {
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for _ in 0..16 {
            let (events, barrier) = (db.events.clone(), barrier.clone());
            tasks.spawn(async move {
                let event = event().recorded();
                barrier.wait().await;
                (event.id, events.save(&acme(), vec![keyed(event, "k", 1)]).await.unwrap()[0])
            });
        }
        let results = tasks.join_all().await;
        let created: Vec<EventId> =
            results.iter().filter(|(_, saved)| *saved == Saved::Created).map(|(id, _)| *id).collect();
        assert_eq!(created.len(), 1, "{results:?}");
        for (id, saved) in results {
            assert!(id == created[0] || saved == Saved::Repeat(created[0]), "{saved:?}");
        }
        assert_eq!(db.count("contact_events").await, 1);
    }

    async fn of_sixteen_concurrent_saves_with_one_id_one_creates(db) {
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for _ in 0..16 {
            let (events, barrier) = (db.events.clone(), barrier.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                events.save(&acme(), vec![plain(event().id(id(1)).recorded())]).await.unwrap()[0]
            });
        }
        let results = tasks.join_all().await;
        assert_eq!(results.iter().filter(|saved| **saved == Saved::Created).count(), 1, "{results:?}");
        assert_eq!(results.iter().filter(|saved| **saved == Saved::IdTaken).count(), 15, "{results:?}");
    }

    async fn concurrent_batches_with_the_same_keys_in_opposite_order_do_not_wait_for_each_other(db) {
        let mut tasks = JoinSet::new();
        for task in 0..8 {
            let events = db.events.clone();
            tasks.spawn(async move {
                let mut batch: Vec<_> = (0..50)
                    .map(|n| keyed(event_of(contact(n + 1)).id(id(n + 1)).recorded(), &format!("k{n}"), 1))
                    .collect();
                if task % 2 == 0 {
                    batch.reverse();
                }
                events.save(&acme(), batch).await.unwrap()
            });
        }
        let results = tasks.join_all().await;
        let created = results.iter().flatten().filter(|saved| **saved == Saved::Created).count();
        assert_eq!(created, 50);
        assert!(results.iter().flatten().all(|saved| matches!(saved, Saved::Created | Saved::Repeat(_))));
    }

    async fn concurrent_saves_are_all_kept(db) {
        let mut tasks = JoinSet::new();
        for task in 0..64 {
            let events = db.events.clone();
            tasks.spawn(async move {
                let batch = (0..5).map(|n| plain(event().id(id(task * 5 + n + 1)).recorded())).collect();
                events.save(&acme(), batch).await.unwrap()
            });
        }
        assert!(tasks.join_all().await.iter().flatten().all(|saved| *saved == Saved::Created));
        assert_eq!(db.count("contact_events").await, 320);
    }

    async fn a_batch_that_the_database_refuses_saves_nothing_and_hurts_no_other(db) {
        let mut bad = event().id(id(2)).recorded();
        bad.expires_at = Some(bad.created_at);
        let batch = vec![keyed(event().id(id(1)).recorded(), "k", 1), plain(bad)];
        let mut tasks = JoinSet::new();
        for n in 0..8 {
            let events = db.events.clone();
            tasks.spawn(async move {
                events.save(&acme(), vec![plain(event().id(id(100 + n)).recorded())]).await
            });
        }
        assert!(db.events.save(&acme(), batch).await.is_err());
        assert!(tasks.join_all().await.iter().all(Result::is_ok));
        assert_eq!(db.count("contact_events").await, 8);
        assert_eq!(db.count("idempotency_keys").await, 0);
    }

    async fn of_requests_that_are_saved_together_only_the_refused_fail(db) {
        for round in 0..5 {
            let barrier = Arc::new(Barrier::new(32));
            let mut tasks = JoinSet::new();
            for n in 0..32 {
                let (events, barrier) = (db.events.clone(), barrier.clone());
                tasks.spawn(async move {
                    let number = round * 32 + n + 1;
                    let tenant = if n % 2 == 0 { acme() } else { globex() };
                    let mut event = event().id(id(number)).record(&tenant, t0()).unwrap();
                    let is_refused = n % 8 == 5;
                    if is_refused {
                        event.expires_at = Some(event.created_at);
                    }
                    barrier.wait().await;
                    let saved = events.save(&tenant, vec![keyed(event, &format!("k{number}"), 1)]).await;
                    (is_refused, saved)
                });
            }
            for (is_refused, saved) in tasks.join_all().await {
                assert_eq!(saved.is_err(), is_refused, "{saved:?}");
                assert!(is_refused || saved.unwrap() == [Saved::Created]);
            }
        }
        assert_eq!(db.count("contact_events").await, 5 * 28);
        assert_eq!(db.count("idempotency_keys").await, 5 * 28);
    }

    async fn a_repeat_in_the_same_batch_of_what_was_refused_is_refused_too(db) {
        db.given(&acme(), [event().id(id(1)).recorded()]).await;
        let again = || keyed(event().id(id(1)).recorded(), "k", 1);
        let saved = db.events.save(&acme(), vec![again(), again()]).await.unwrap();
        assert_eq!(saved, [Saved::IdTaken, Saved::IdTaken]);
        assert_eq!(db.count("idempotency_keys").await, 0);
    }

    async fn old_idempotency_keys_are_forgotten_and_young_ones_kept(db) {
        for (tenant, key, age) in [
            (acme(), "older", hours(25)), (acme(), "old", hours(24) + MICRO), (acme(), "edge", hours(24)),
            (acme(), "young", hours(1)), (globex(), "older", hours(25)),
        ] {
            let event = event().record(&tenant, t0() - age).unwrap();
            db.events.save(&tenant, vec![keyed(event, key, 1)]).await.unwrap();
        }
        assert_eq!(db.events.idempotent_tenants().await.unwrap(), [acme(), globex()]);
        let forget = async |tenant, limit| {
            db.events.delete_idempotency_before(&tenant, t0() - hours(24), limit, None).await.unwrap()
        };
        assert_eq!(forget(acme(), 1).await, 1);
        assert_eq!(db.count("idempotency_keys where key = 'older' and tenant_id = 'acme'").await, 0);
        assert_eq!(forget(acme(), 10).await, 1);
        assert_eq!(forget(acme(), 10).await, 0);
        let left = db.texts("select key from idempotency_keys where tenant_id = 'acme' order by key").await;
        assert_eq!(left, [Some("edge".to_owned()), Some("young".to_owned())]);
        assert_eq!(forget(globex(), 10).await, 1);
        assert_eq!(db.events.idempotent_tenants().await.unwrap(), [acme()]);
    }

    async fn an_empty_database_has_no_tenants(db) {
        assert_eq!(db.events.idempotent_tenants().await.unwrap(), []);
        assert_eq!(db.events.expiring_tenants().await.unwrap(), []);
    }

    async fn the_schema_is_this_binarys_and_migrating_again_changes_nothing(db) {
        db.given(&acme(), [event_of(contact(1)).recorded()]).await;
        db.check_schema().await.unwrap();
        db.migrate().await.unwrap();
        db.check_schema().await.unwrap();
        assert_eq!(db.count("contact_events").await, 1);
    }
}
