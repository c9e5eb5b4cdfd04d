//! Erasure: what goes, what stays, what the ledger keeps.

use timelined::domain::{Audience, Category, ContactId, ErasureId, ExportId};
use timelined::storage::{
    Erasure, ErasureState, ExportRequest, HoldScope, NewExport, StorageError, Survey, View,
};

use crate::support::builders::*;
use crate::support::database::{Database, Engine};

fn erasure_of(contact: ContactId) -> Erasure {
    Erasure {
        id: ErasureId::generate(t0()),
        tenant_id: acme(),
        contact_id: contact,
        requested_by: subject("dpo"),
        requested_at: t0() + hours(1),
        up_to: t0() + hours(1),
        state: ErasureState::Running,
        events: 0,
        exports: Vec::new(),
        finished_at: None,
    }
}

async fn ask_for_export(db: &Database, contact: ContactId) -> ExportId {
    let id = ExportId::generate(t0());
    let export = NewExport {
        id,
        tenant_id: acme(),
        request: ExportRequest {
            contact_id: contact,
            format: "csv".to_owned(),
            audience: Audience::Client,
            since: None,
            until: None,
            categories: Vec::new(),
            timezone: chrono_tz::UTC,
            redact: Vec::new(),
            to: vec!["ann@example.com".to_owned()],
            attach: true,
        },
        requested_by: subject("svc"),
        request_key: None,
        message_ids: vec![format!("{id}.1@timelined")],
        created_at: t0(),
    };
    db.exports.create_one(&export).await.unwrap()
}

/// Carries it out, in batches of `limit`; answers how many events went.
async fn carry_out(db: &Database, erasure: &Erasure, limit: u32) -> usize {
    let store = &db.erasures;
    let begun = store
        .begin_erasure(erasure, "contact_erased", &subject("dpo"), t0() + hours(1))
        .await
        .unwrap();
    let mut events = 0;
    loop {
        let erased = store.erase_some(&begun, limit).await.unwrap().len();
        assert!(erased <= limit as usize);
        if erased == 0 {
            break;
        }
        events += erased;
    }
    store
        .finish_erasure(&begun, ErasureState::Done, t0() + hours(2))
        .await
        .unwrap();
    events
}

/// Rows of the whole database that name contact 1 or one of its events 1 to 7.
async fn traces(db: &Database) -> i64 {
    let ids = (1..=7)
        .map(|n| format!("'{}'", id(n)))
        .collect::<Vec<_>>()
        .join(", ");
    let mut count = db
        .count(&format!(
            "contact_events where tenant_id = 'acme' and contact_id = '{}'",
            contact(1)
        ))
        .await;
    count += db
        .count(&format!("exports where contact_id = '{}'", contact(1)))
        .await;
    for table in [
        "event_outbox",
        "event_deliveries",
        "event_reads",
        "idempotency_keys",
    ] {
        count += db
            .count(&format!(
                "{table} where tenant_id = 'acme' and event_id in ({ids})"
            ))
            .await;
    }
    count
}

on_both_engines! {
    async fn everything_of_a_contact_goes_and_nothing_of_another(db) {
        let mine = |n| event().id(id(n)).realtime().recorded();
        let keyed_events: Vec<_> = (1..=7).map(|n| keyed(mine(n), &format!("key:{n}"), 1)).collect();
        db.events.save(&acme(), keyed_events).await.unwrap();
        let others = (11..=13).map(|n| keyed(event_of(contact(2)).id(id(n)).realtime().recorded(), &format!("key:{n}"), 1));
        db.events.save(&acme(), others.collect()).await.unwrap();
        let foreign = event().id(id(1)).realtime().record(&globex(), t0()).unwrap();
        db.given(&globex(), [foreign]).await;
        for n in [1, 2, 11] {
            db.events.record_delivered(&acme(), id(n), Audience::Agent, &subject("a"), t0()).await.unwrap();
            db.events.mark_read(&acme(), &[id(n)], None, &subject("a"), View::of(Audience::Agent, t0())).await.unwrap();
        }
        let export = ask_for_export(db, contact(1)).await;
        let other_export = ask_for_export(db, contact(2)).await;
        assert!(traces(db).await > 20);

        let survey = db.erasures.survey(&acme(), contact(1)).await.unwrap();
        assert_eq!(survey, Survey { is_held: false, newest: Some(t0()) });
        let erasure = erasure_of(contact(1));
        assert_eq!(carry_out(db, &erasure, 3).await, 7);
        assert_eq!(traces(db).await, 0);
        let counts = [("contact_events", 4), ("event_outbox", 3), ("event_deliveries", 1), ("event_reads", 1), ("idempotency_keys", 3), ("exports", 1), ("export_deliveries", 1)];
        for (table, count) in counts {
            assert_eq!(db.count(table).await, count, "{table}");
        }
        assert!(db.exports.find(&acme(), other_export).await.unwrap().is_some());

        let [kept] = db.erasures.erasures(t0()).await.unwrap().try_into().unwrap();
        let expected = Erasure { state: ErasureState::Done, events: 7, exports: vec![export], finished_at: Some(t0() + hours(2)), ..erasure };
        assert_eq!(kept, expected);
        assert_eq!(db.erasures.erasures(t0() + hours(3)).await.unwrap(), []);
        let audited = db.texts("select actor from audit_log where action = 'contact_erased'").await;
        assert_eq!(audited, [Some("dpo".to_owned())]);
    }

    async fn what_was_recorded_later_stays_also_on_a_replay(db) {
        db.given(&acme(), [event().id(id(1)).recorded(), event().id(id(2)).recorded_at(t0() + hours(1))]).await;
        db.given(&acme(), [event().id(id(3)).recorded_at(t0() + hours(1) + minutes(1))]).await;
        let erasure = erasure_of(contact(1));
        assert_eq!(carry_out(db, &erasure, 100).await, 2);
        assert_eq!(db.int("select count(*) from contact_events").await, 1);
        // The database comes back from a backup: the same again.
        db.given(&acme(), [event().id(id(1)).recorded()]).await;
        let late = ask_for_export(db, contact(1)).await;
        assert_eq!(carry_out(db, &erasure, 100).await, 1);
        let [kept] = db.erasures.erasures(t0()).await.unwrap().try_into().unwrap();
        assert_eq!((kept.events, kept.exports), (3, vec![late]));
        assert_eq!(carry_out(db, &erasure, 100).await, 0);
        assert!(db.events.find_by_id(&acme(), id(3)).await.unwrap().is_some());
    }

    async fn a_hold_on_any_part_of_it_refuses(db) {
        db.given(&acme(), [event().id(id(1)).recorded(), event_about("tag_added", Category::Tag).id(id(2)).recorded()]).await;
        db.given(&acme(), [event_of(contact(2)).id(id(3)).recorded()]).await;
        let by = subject("lawyer");
        let scopes = [HoldScope::Tenant, HoldScope::Contact(contact(1)), HoldScope::Category(Category::Tag)];
        for scope in scopes {
            let hold = db.retention.place_hold(&acme(), scope, "", &by, t0()).await.unwrap();
            let survey = async |contact| db.erasures.survey(&acme(), contact).await.unwrap().is_held;
            assert!(survey(contact(1)).await, "{scope:?}");
            assert_eq!(survey(contact(2)).await, scope == HoldScope::Tenant, "{scope:?}");
            assert!(!db.erasures.survey(&globex(), contact(1)).await.unwrap().is_held);
            // As when it was placed after the survey.
            let erasure = erasure_of(contact(1));
            let begun = db.erasures.begin_erasure(&erasure, "contact_erased", &by, t0()).await.unwrap();
            let refused = db.erasures.erase_some(&begun, 100).await;
            assert!(matches!(refused, Err(StorageError::Held)), "{scope:?}: {refused:?}");
            assert_eq!(db.count("contact_events").await, 3);
            db.erasures.finish_erasure(&begun, ErasureState::Held, t0()).await.unwrap();
            db.retention.release_hold(&acme(), hold.id, &by, t0()).await.unwrap();
        }
        // A hold without events keeps itself alone.
        db.retention.place_hold(&acme(), HoldScope::Contact(contact(9)), "", &by, t0()).await.unwrap();
        let survey = db.erasures.survey(&acme(), contact(9)).await.unwrap();
        assert_eq!(survey, Survey { is_held: true, newest: None });
        assert_eq!(carry_out(db, &erasure_of(contact(1)), 1).await, 2);
    }

    async fn what_was_left_is_found_until_it_ends(db) {
        let erasure = erasure_of(contact(1));
        let begun = db.erasures.begin_erasure(&erasure, "contact_erased", &subject("dpo"), t0()).await.unwrap();
        assert_eq!(begun, erasure);
        assert_eq!(db.erasures.unfinished_erasures(t0() + hours(1)).await.unwrap(), []);
        assert_eq!(db.erasures.unfinished_erasures(t0() + hours(2)).await.unwrap(), std::slice::from_ref(&begun));
        assert_eq!(db.erasures.erasures(t0()).await.unwrap(), []);
        db.erasures.finish_erasure(&begun, ErasureState::Done, t0() + hours(2)).await.unwrap();
        assert_eq!(db.erasures.unfinished_erasures(t0() + hours(2)).await.unwrap(), []);
    }

    async fn no_byte_of_it_is_left_in_the_file_of_sqlite(db) {
        if db.engine == Engine::Postgres {
            return;
        }
        // Long enough for overflow pages, too.
        let secret = |n: u64| format!("{}Zanzibar-{n}", "x".repeat(if n.is_multiple_of(3) { 9000 } else { 20 }));
        db.given(&acme(), (1..=200).map(|n| event().id(id(n)).description(secret(n)).recorded())).await;
        db.given(&acme(), [event_of(contact(2)).id(id(900)).description("Timbuktu".to_owned()).recorded()]).await;
        assert_eq!(carry_out(db, &erasure_of(contact(1)), 7).await, 200);
        db.storage.close().await;
        let path = db.texts("select file from pragma_database_list where name = 'main'").await;
        let file = std::fs::read(path[0].as_ref().unwrap()).unwrap();
        let has = |text: &[u8]| file.windows(text.len()).any(|window| window == text);
        assert!(has(b"Timbuktu"));
        assert!(!has(b"Zanzibar"));
    }
}
