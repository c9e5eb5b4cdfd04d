//! Changes of visibility and expiry, single deletes, and the audit rows that they leave.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use timelined::domain::{Audience, Category, ContactEvent, Delivery, EventId, Visibility};
use timelined::storage::{Change, Saved, View};

use crate::support::builders::*;
use crate::support::database::Database;

const BOTH: Visibility = Visibility {
    client: true,
    agent: true,
};
const CLIENT: Visibility = Visibility {
    client: true,
    agent: false,
};
const AGENT: Visibility = Visibility {
    client: false,
    agent: true,
};
const NOBODY: Visibility = Visibility {
    client: false,
    agent: false,
};

fn shown_to(visibility: Visibility) -> Change {
    Change {
        visibility: Some(visibility),
        expires_at: None,
    }
}

fn expiring(expires_at: Option<DateTime<Utc>>) -> Change {
    Change {
        visibility: None,
        expires_at: Some(expires_at),
    }
}

/// Saves event 1, realtime and visible so.
async fn given(db: &Database, visibility: Visibility) {
    let event = event()
        .id(id(1))
        .realtime()
        .visible_to_client(visibility.client)
        .visible_to_agent(visibility.agent);
    db.given(&acme(), [event.expires_at(t0() + hours(10)).recorded()])
        .await;
}

async fn change(db: &Database, change: Change, now: DateTime<Utc>) -> ContactEvent {
    let changed = db
        .events
        .update(&acme(), id(1), change, &subject("svc"), now)
        .await
        .unwrap()
        .unwrap();
    let found = db.events.find_by_id(&acme(), id(1)).await.unwrap();
    assert_eq!(found.as_ref(), Some(&changed));
    changed
}

/// Whom event 1 waits for.
async fn waits_for(db: &Database) -> Option<Audience> {
    let found = db
        .texts("select audience from event_outbox where tenant_id = 'acme'")
        .await;
    assert!(found.len() <= 1);
    found
        .into_iter()
        .flatten()
        .next()
        .map(|audience| audience.parse().unwrap())
}

async fn deliver(db: &Database, now: DateTime<Utc>) {
    let ended = db
        .events
        .mark_delivered(&acme(), None, &[id(1)], None, &subject("s"), now)
        .await
        .unwrap();
    assert_eq!(ended.len(), 1);
}

/// The audit rows: actor, action, subject, before and after.
async fn audit(db: &Database) -> Vec<(String, String, String, Value, Value)> {
    let column = async |expression: &str| {
        let sql = format!(
            "select coalesce({expression}, 'null') from audit_log where tenant_id = 'acme' order by seq"
        );
        db.texts(&sql)
            .await
            .into_iter()
            .flatten()
            .collect::<Vec<String>>()
    };
    let json = |text: &String| serde_json::from_str(text).unwrap();
    let (actors, actions) = (column("actor").await, column("action").await);
    let (subjects, befores) = (
        column("cast(subject_id as text)").await,
        column("cast(before as text)").await,
    );
    let afters = column("cast(after as text)").await;
    (0..actors.len())
        .map(|row| {
            (
                actors[row].clone(),
                actions[row].clone(),
                subjects[row].clone(),
                json(&befores[row]),
                json(&afters[row]),
            )
        })
        .collect()
}

on_both_engines! {
    async fn only_visibility_and_expiry_change(db) {
        let before = event_about("tag_added", Category::Tag).id(id(1)).title("t").payload(json!({"a": 1}))
            .expires_at(t0() + hours(10)).recorded();
        db.given(&acme(), [before.clone()]).await;
        let after = change(db, Change {
            visibility: Some(CLIENT),
            expires_at: Some(Some(t0() + days(1) + MICRO)),
        }, t0() + hours(1)).await;
        let expected = ContactEvent { visibility: CLIENT, expires_at: Some(t0() + days(1) + MICRO), ..before };
        assert_eq!(after, expected);
    }

    async fn an_empty_change_changes_nothing(db) {
        given(db, BOTH).await;
        let before = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(change(db, Change::default(), t0()).await, before);
        assert_eq!(waits_for(db).await, Some(Audience::Client));
        assert_eq!(db.count("event_outbox").await, 1);
    }

    async fn an_expiry_is_moved_and_removed(db) {
        given(db, AGENT).await;
        assert_eq!(change(db, expiring(Some(t0() + hours(2))), t0()).await.expires_at, Some(t0() + hours(2)));
        let waits_until = db.ints(&format!("select {} from event_outbox", db.micros("expires_at"))).await;
        assert_eq!(waits_until, [(t0() + hours(2)).timestamp_micros()]);
        assert_eq!(change(db, expiring(None), t0()).await.expires_at, None);
        assert_eq!(db.count("event_outbox where expires_at is null").await, 1);
        assert_eq!(db.events.expire_undelivered(t0() + days(1000), 10).await.unwrap(), 0);
    }

    async fn an_unknown_event_is_not_changed_and_leaves_no_audit_row(db) {
        given(db, AGENT).await;
        let by = subject("svc");
        assert_eq!(db.events.update(&acme(), id(2), shown_to(BOTH), &by, t0()).await.unwrap(), None);
        assert_eq!(db.events.update(&globex(), id(1), shown_to(BOTH), &by, t0()).await.unwrap(), None);
        assert_eq!(db.events.delete(&acme(), id(2), &by, t0()).await.unwrap(), None);
        assert_eq!(db.events.delete(&globex(), id(1), &by, t0()).await.unwrap(), None);
        assert_eq!(db.count("audit_log").await, 0);
        assert_eq!(db.count("contact_events").await, 1);
    }

    async fn widened_to_the_client_while_it_waits_for_agents_it_waits_for_the_client(db) {
        given(db, AGENT).await;
        change(db, shown_to(BOTH), t0()).await;
        assert_eq!(waits_for(db).await, Some(Audience::Client));
    }

    async fn widened_to_the_client_after_the_agent_had_it_it_waits_again_and_keeps_delivered_at(db) {
        given(db, AGENT).await;
        deliver(db, t0() + minutes(1)).await;
        let changed = change(db, shown_to(BOTH), t0() + minutes(2)).await;
        assert_eq!(waits_for(db).await, Some(Audience::Client));
        assert_eq!(changed.delivery, Delivery::Delivered { at: t0() + minutes(1) });
        deliver(db, t0() + minutes(3)).await;
        let found = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(found.delivery, Delivery::Delivered { at: t0() + minutes(1) });
        assert_eq!(db.count("event_deliveries").await, 2);
    }

    async fn widened_to_agents_after_the_client_had_it_it_waits_for_an_agent(db) {
        given(db, CLIENT).await;
        deliver(db, t0() + minutes(1)).await;
        change(db, shown_to(BOTH), t0() + minutes(2)).await;
        assert_eq!(waits_for(db).await, Some(Audience::Agent));
    }

    async fn widened_from_nobody_it_waits_for_the_first_time(db) {
        given(db, NOBODY).await;
        assert_eq!(waits_for(db).await, None);
        change(db, shown_to(AGENT), t0()).await;
        assert_eq!(waits_for(db).await, Some(Audience::Agent));
        let in_order = db.count("event_outbox o join contact_events e on e.id = o.event_id and e.seq = o.seq").await;
        assert_eq!(in_order, 1);
    }

    async fn widened_to_an_audience_that_had_it_it_waits_for_nobody(db) {
        given(db, BOTH).await;
        deliver(db, t0()).await;
        change(db, shown_to(AGENT), t0()).await;
        db.execute("delete from event_outbox").await.unwrap();
        change(db, shown_to(BOTH), t0()).await;
        assert_ne!(waits_for(db).await, Some(Audience::Client));
    }

    async fn an_event_that_is_not_realtime_never_waits(db) {
        db.given(&acme(), [event().id(id(1)).visible_to_agent(false).recorded()]).await;
        assert_eq!(change(db, shown_to(BOTH), t0()).await.delivery, Delivery::NotRealtime);
        assert_eq!(waits_for(db).await, None);
    }

    async fn narrowed_to_nobody_it_waits_no_more(db) {
        given(db, BOTH).await;
        change(db, shown_to(NOBODY), t0()).await;
        assert_eq!(waits_for(db).await, None);
        let seen = db.events.find_undelivered_realtime(&acme(), &[contact(1)], [0; 4], t0(), 10).await.unwrap().events;
        assert_eq!(seen, []);
    }

    async fn narrowed_to_agents_while_it_waits_for_the_client_it_waits_for_agents(db) {
        given(db, BOTH).await;
        change(db, shown_to(AGENT), t0()).await;
        assert_eq!(waits_for(db).await, Some(Audience::Agent));
    }

    async fn narrowed_from_agents_it_still_waits_for_the_client(db) {
        given(db, BOTH).await;
        change(db, shown_to(CLIENT), t0()).await;
        assert_eq!(waits_for(db).await, Some(Audience::Client));
    }

    async fn narrowed_after_its_delivery_it_keeps_delivered_at_and_is_hidden(db) {
        given(db, BOTH).await;
        deliver(db, t0() + minutes(1)).await;
        let changed = change(db, shown_to(NOBODY), t0() + minutes(2)).await;
        assert_eq!(changed.delivery, Delivery::Delivered { at: t0() + minutes(1) });
        assert!(!changed.is_visible_to(Audience::Client, t0()));
        assert_eq!(waits_for(db).await, None);
    }

    async fn a_moved_expiry_of_a_delivered_event_delivers_nothing_anew(db) {
        given(db, BOTH).await;
        deliver(db, t0()).await;
        change(db, expiring(Some(t0() + days(2))), t0() + days(1)).await;
        assert_eq!(waits_for(db).await, None);
    }

    async fn an_expiry_that_is_moved_on_revives_an_expired_delivery(db) {
        for expires_at in [Some(t0() + days(2)), None] {
            db.execute("delete from contact_events; delete from event_outbox; delete from event_deliveries").await.unwrap();
            given(db, BOTH).await;
            let expired = t0() + hours(10);
            assert_eq!(db.events.expire_undelivered(expired, 10).await.unwrap(), 1);
            let changed = change(db, expiring(expires_at), expired + minutes(1)).await;
            assert_eq!(changed.delivery, Delivery::Pending);
            assert_eq!(waits_for(db).await, Some(Audience::Client));
            deliver(db, expired + minutes(2)).await;
        }
    }

    async fn an_expiry_that_stays_behind_now_revives_nothing(db) {
        given(db, BOTH).await;
        let now = t0() + days(1);
        assert_eq!(db.events.expire_undelivered(now, 10).await.unwrap(), 1);
        for expires_at in [now, now - MICRO] {
            let changed = change(db, expiring(Some(expires_at)), now).await;
            assert_eq!(changed.delivery, Delivery::Expired { at: now });
            assert_eq!(waits_for(db).await, None);
        }
        assert_eq!(change(db, expiring(Some(now + MICRO)), now).await.delivery, Delivery::Pending);
    }

    async fn an_expiry_that_is_moved_into_the_past_ends_the_wait_as_expired(db) {
        given(db, BOTH).await;
        let now = t0() + hours(1);
        change(db, expiring(Some(now)), now).await;
        let mark = db.events.mark_delivered(&acme(), None, &[id(1)], None, &subject("s"), now).await;
        assert_eq!(mark.unwrap(), []);
        db.events.expire_undelivered(now, 10).await.unwrap();
        let found = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(found.delivery, Delivery::Expired { at: now });
    }

    async fn a_widening_shows_in_the_backlog_and_in_the_lists_at_once(db) {
        given(db, AGENT).await;
        deliver(db, t0()).await;
        change(db, shown_to(BOTH), t0()).await;
        let seen = db.events.find_undelivered_realtime(&acme(), &[contact(1)], [0; 4], t0(), 10).await.unwrap().events;
        assert_eq!(seen.iter().map(|undelivered| undelivered.event.id).collect::<Vec<_>>(), [id(1)]);
    }

    async fn a_widening_shows_in_the_tail(db) {
        given(db, AGENT).await;
        deliver(db, t0()).await;
        // Something newer, so that a tail by the order of recording alone would be past it.
        db.given(&acme(), [event().id(id(2)).realtime().recorded()]).await;
        let mark = db.events.tail_end().await.unwrap();
        change(db, shown_to(BOTH), t0()).await;
        let tail = db.events.tail(&mark, &|_, _| true).await.unwrap();
        assert_eq!(tail.entries.iter().map(|entry| entry.event_id).collect::<Vec<_>>(), [id(1)]);
        assert_eq!(db.events.tail(&tail.mark, &|_, _| true).await.unwrap().entries, []);
        let found = db.events.find_entries(&tail.entries).await.unwrap();
        assert_eq!(found.len(), 1);
    }

    async fn every_change_leaves_who_what_when_from_and_to(db) {
        given(db, AGENT).await;
        let now = t0() + minutes(1);
        let change = Change { visibility: Some(BOTH), expires_at: Some(None) };
        db.events.update(&acme(), id(1), change, &subject("ann"), now).await.unwrap();
        db.events.delete(&acme(), id(1), &subject("bob"), now + MICRO).await.unwrap();
        let state = |client, expires_at: Option<&str>| {
            json!({"visible_to_client": client, "visible_to_agent": true, "expires_at": expires_at})
        };
        let row = |actor: &str, action: &str, from, to| {
            (actor.to_owned(), action.to_owned(), id(1).to_string(), from, to)
        };
        assert_eq!(audit(db).await, [
            row("ann", "event_updated", state(false, Some("2026-02-03T14:05:06.789012Z")), state(true, None)),
            row("bob", "event_deleted", Value::Null, Value::Null),
        ]);
        let times = db.ints(&format!("select {} from audit_log order by seq", db.micros("at"))).await;
        assert_eq!(times, [now, now + MICRO].map(|time| time.timestamp_micros()));
    }

    async fn a_change_that_breaks_a_rule_changes_nothing(db) {
        given(db, AGENT).await;
        let change = Change { visibility: Some(BOTH), expires_at: Some(Some(t0())) };
        assert!(db.events.update(&acme(), id(1), change, &subject("s"), t0()).await.is_err());
        let found = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!((found.visibility, waits_for(db).await), (AGENT, Some(Audience::Agent)));
        assert_eq!(db.count("audit_log").await, 0);
    }

    async fn a_change_is_of_one_tenant(db) {
        for tenant in [acme(), globex()] {
            db.given(&tenant, [event().id(id(1)).realtime().record(&tenant, t0()).unwrap()]).await;
        }
        db.events.update(&globex(), id(1), shown_to(BOTH), &subject("s"), t0()).await.unwrap().unwrap();
        let own = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!((own.visibility, waits_for(db).await), (AGENT, Some(Audience::Agent)));
        assert_eq!(audit(db).await, []);
    }

    async fn a_deleted_event_is_gone_with_all_that_stood_beside_it(db) {
        for tenant in [acme(), globex()] {
            db.given(&tenant, (1..=2).map(|n| {
                event().id(id(n)).realtime().visible_to_client(true).record(&tenant, t0()).unwrap()
            })).await;
            for n in 1..=2 {
                let ids = [id(n)];
                db.events.record_delivered(&tenant, id(n), Audience::Agent, &subject("s"), t0()).await.unwrap();
                db.events.mark_read(&tenant, &ids, None, &subject("s"), View::everything(t0())).await.unwrap();
            }
        }
        let deleted = db.events.delete(&acme(), id(1), &subject("s"), t0()).await.unwrap();
        assert_eq!(deleted, Some(contact(1)));
        assert_eq!(db.events.find_by_id(&acme(), id(1)).await.unwrap(), None);
        for table in ["event_outbox", "event_deliveries", "event_reads"] {
            assert_eq!(db.count(&format!("{table} where tenant_id = 'acme'")).await, 1, "{table}");
            assert_eq!(db.count(&format!("{table} where tenant_id = 'globex'")).await, 2, "{table}");
        }
        assert_eq!(db.events.delete(&acme(), id(1), &subject("s"), t0()).await.unwrap(), None);
        let again = db.events.save(&acme(), vec![plain(event().id(id(1)).recorded())]).await.unwrap();
        assert_eq!(again, [Saved::Created]);
        let found: Option<EventId> = db.events.find_by_id(&acme(), id(1)).await.unwrap().map(|event| event.id);
        assert_eq!(found, Some(id(1)));
    }
}
