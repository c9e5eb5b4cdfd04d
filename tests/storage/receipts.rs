//! Receipts: who had an event, and who read it.

use std::sync::Arc;

use timelined::domain::{Audience, ContactId, Delivery, EventId};
use timelined::storage::{Receipt, View};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::builders::*;
use crate::support::database::Database;

fn sorted(mut receipts: Vec<Receipt>) -> Vec<(EventId, ContactId, bool)> {
    receipts.sort_by_key(|receipt| receipt.event_id);
    receipts
        .iter()
        .map(|receipt| (receipt.event_id, receipt.contact_id, receipt.is_new))
        .collect()
}

/// 1 waits for agents, 2 for the client, 3 for the client although agents see it; 4 is of contact 2
/// and waits for agents; 5 is not realtime.
async fn given_waiting(db: &Database) {
    db.given(
        &acme(),
        [
            event().id(id(1)).realtime().recorded(),
            event()
                .id(id(2))
                .realtime()
                .visible_to_client(true)
                .visible_to_agent(false)
                .recorded(),
            event()
                .id(id(3))
                .realtime()
                .visible_to_client(true)
                .recorded(),
            event_of(contact(2)).id(id(4)).realtime().recorded(),
            event().id(id(5)).recorded(),
        ],
    )
    .await;
}

fn five() -> Vec<EventId> {
    (1..=5).map(id).collect()
}

on_both_engines! {
    async fn an_audience_ends_only_the_waits_that_are_its_own(db) {
        given_waiting(db).await;
        let mark = async |audience| {
            sorted(db.events.mark_delivered(&acme(), Some(audience), &five(), None, &subject("ann"), t0()).await.unwrap())
        };
        assert_eq!(mark(Audience::Audit).await, []);
        assert_eq!(mark(Audience::Agent).await, [(id(1), contact(1), true), (id(4), contact(2), true)]);
        assert_eq!(mark(Audience::Client).await, [(id(2), contact(1), true), (id(3), contact(1), true)]);
        assert_eq!(db.count("event_outbox").await, 0);
        assert_eq!(db.count("event_deliveries where outcome = 'delivered' and recorded_by = 'ann'").await, 4);
    }

    async fn without_an_audience_every_wait_is_ended(db) {
        given_waiting(db).await;
        let ended = db.events.mark_delivered(&acme(), None, &five(), None, &subject("svc"), t0()).await.unwrap();
        assert!(ended.iter().all(|receipt| receipt.at == t0()));
        let ended = sorted(ended);
        assert_eq!(ended.iter().map(|(event, ..)| *event).collect::<Vec<_>>(), [1, 2, 3, 4].map(id));
        let audiences = db.texts("select audience from event_deliveries order by event_id").await;
        assert_eq!(audiences.into_iter().flatten().collect::<Vec<_>>(), ["agent", "client", "client", "agent"]);
    }

    async fn a_client_ends_waits_of_its_own_contacts_only(db) {
        given_waiting(db).await;
        let mark = async |contacts: &[ContactId]| {
            sorted(db.events.mark_delivered(&acme(), None, &five(), Some(contacts), &subject("c"), t0()).await.unwrap())
        };
        assert_eq!(mark(&[]).await, []);
        assert_eq!(mark(&[contact(3)]).await, []);
        assert_eq!(mark(&[contact(2), contact(3)]).await, [(id(4), contact(2), true)]);
        assert_eq!(db.count("event_outbox").await, 3);
    }

    async fn an_event_is_delivered_once(db) {
        given_waiting(db).await;
        let mark = async |now| {
            db.events.mark_delivered(&acme(), None, &[id(1), id(1)], None, &subject("s"), now).await.unwrap()
        };
        assert_eq!(mark(t0() + MICRO).await.len(), 1);
        assert_eq!(mark(t0() + hours(1)).await, []);
        let found = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(found.delivery, Delivery::Delivered { at: t0() + MICRO });
    }

    async fn an_event_cannot_be_delivered_from_the_instant_of_its_expiry(db) {
        db.given(&acme(), (1..=2).map(|n| event().id(id(n)).realtime().expires_at(t0() + hours(1)).recorded())).await;
        let mark = async |number, now| {
            db.events.mark_delivered(&acme(), None, &[id(number)], None, &subject("s"), now).await.unwrap().len()
        };
        assert_eq!(mark(1, t0() + hours(1) - MICRO).await, 1);
        assert_eq!(mark(2, t0() + hours(1)).await, 0);
    }

    async fn unknown_ids_deliver_and_read_nothing(db) {
        given_waiting(db).await;
        let delivered = db.events.mark_delivered(&acme(), None, &[id(99)], None, &subject("s"), t0()).await;
        assert_eq!(delivered.unwrap(), []);
        assert_eq!(db.events.mark_delivered(&acme(), None, &[], None, &subject("s"), t0()).await.unwrap(), []);
        let read = db.events.mark_read(&acme(), &[id(99)], None, &subject("s"), View::everything(t0())).await;
        assert_eq!(read.unwrap(), []);
    }

    async fn a_thousand_events_are_delivered_at_once(db) {
        db.given(&acme(), (1..=1000).map(|n| event_of(contact(n)).id(id(n)).realtime().recorded())).await;
        let all: Vec<EventId> = (1..=1000).map(id).collect();
        let ended = db.events.mark_delivered(&acme(), None, &all, None, &subject("s"), t0()).await.unwrap();
        assert_eq!(ended.len(), 1000);
        assert_eq!(db.count("timeline_events where delivered_at is not null").await, 1000);
    }

    async fn of_sixteen_concurrent_acknowledgements_one_delivers(db) {
        given_waiting(db).await;
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for _ in 0..16 {
            let (events, barrier) = (db.events.clone(), barrier.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                events.mark_delivered(&acme(), None, &five(), None, &subject("s"), t0()).await.unwrap().len()
            });
        }
        assert_eq!(tasks.join_all().await.iter().sum::<usize>(), 4);
    }

    async fn delivered_at_is_the_first_of_its_audiences(db) {
        given_waiting(db).await;
        let record = async |audience, now| {
            db.events.record_delivered(&acme(), id(3), audience, &subject("s"), now).await.unwrap().unwrap()
        };
        let (early, late) = (t0() + minutes(1), t0() + minutes(2));
        assert_eq!(record(Audience::Agent, early).await, early);
        // The client still waits: the agent had it, not the contact.
        assert_eq!(db.count("event_outbox where audience = 'client'").await, 2);
        assert_eq!(record(Audience::Agent, late).await, early);
        assert_eq!(record(Audience::Client, late).await, early);
        assert_eq!(db.count("event_outbox where audience = 'client'").await, 1);
        let found = db.events.find_by_id(&acme(), id(3)).await.unwrap().unwrap();
        assert_eq!(found.delivery, Delivery::Delivered { at: early });
        let recorded = db.ints(&format!(
            "select {} from event_deliveries order by audience", db.micros("recorded_at")
        )).await;
        assert_eq!(recorded, [early.timestamp_micros(), late.timestamp_micros()]);
    }

    async fn an_event_that_is_not_realtime_can_be_recorded_as_delivered(db) {
        given_waiting(db).await;
        let at = db.events.record_delivered(&acme(), id(5), Audience::Agent, &subject("s"), t0()).await.unwrap().unwrap();
        assert_eq!(at, t0());
        let found = db.events.find_by_id(&acme(), id(5)).await.unwrap().unwrap();
        assert_eq!(found.delivery, Delivery::Delivered { at: t0() });
    }

    async fn an_expired_wait_that_is_delivered_after_all_counts_as_delivered(db) {
        db.given(&acme(), [event().id(id(1)).realtime().expires_at(t0() + hours(1)).recorded()]).await;
        let (expired, later) = (t0() + hours(1), t0() + hours(2));
        db.events.expire_undelivered(expired, 10).await.unwrap();
        let at = db.events.record_delivered(&acme(), id(1), Audience::Agent, &subject("s"), later).await.unwrap().unwrap();
        assert_eq!(at, later);
        let found = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(found.delivery, Delivery::Delivered { at: later });
    }

    async fn an_event_that_is_gone_is_delivered_and_read_by_nobody(db) {
        given_waiting(db).await;
        db.events.delete(&acme(), id(1), &subject("s"), t0()).await.unwrap();
        let at = db.events.record_delivered(&acme(), id(1), Audience::Agent, &subject("s"), t0()).await.unwrap();
        assert_eq!(at, None);
        let read = db.events.mark_read(&acme(), &[id(1)], None, &subject("s"), View::everything(t0())).await.unwrap();
        assert_eq!(read, []);
        for table in ["event_deliveries", "event_reads"] {
            assert_eq!(db.count(&format!("{table} where event_id = '{}'", id(1))).await, 0, "{table}");
        }
    }

    async fn receipts_written_while_their_events_are_deleted_leave_no_orphan(db) {
        let ids: Vec<_> = (1..=200).map(id).collect();
        db.given(&acme(), ids.iter().map(|id| {
            event().id(*id).realtime().expires_at(t0() + hours(1)).recorded()
        })).await;
        let (barrier, mut tasks) = (Arc::new(Barrier::new(4)), JoinSet::new());
        for kind in 0..3 {
            let (events, barrier, ids) = (db.events.clone(), barrier.clone(), ids.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                for some in ids.chunks(5) {
                    let by = subject("s");
                    match kind {
                        0 => drop(events.record_delivered(&acme(), some[0], Audience::Agent, &by, t0()).await.unwrap()),
                        1 => drop(events.mark_read(&acme(), some, None, &by, View::everything(t0())).await.unwrap()),
                        _ => drop(events.mark_delivered(&acme(), None, some, None, &by, t0()).await.unwrap()),
                    }
                }
            });
        }
        barrier.wait().await;
        while db.events.delete_expired_before(&acme(), t0() + hours(2), 7, None).await.unwrap() > 0 {}
        tasks.join_all().await;
        // What was skipped, since somebody held it, is next.
        while db.events.delete_expired_before(&acme(), t0() + hours(2), 7, None).await.unwrap() > 0 {}
        for table in ["contact_events", "event_outbox", "event_deliveries", "event_reads"] {
            assert_eq!(db.count(table).await, 0, "{table}");
        }
    }

    async fn deliveries_of_another_tenant_are_untouched(db) {
        for tenant in [acme(), globex()] {
            db.given(&tenant, [event().id(id(1)).realtime().record(&tenant, t0()).unwrap()]).await;
        }
        let ended = db.events.mark_delivered(&acme(), None, &[id(1)], None, &subject("s"), t0()).await.unwrap();
        assert_eq!(ended.len(), 1);
        let other = db.events.find_by_id(&globex(), id(1)).await.unwrap().unwrap();
        assert_eq!(other.delivery, Delivery::Pending);
        assert_eq!(db.count("event_outbox where tenant_id = 'globex'").await, 1);
        db.events.record_delivered(&globex(), id(1), Audience::Agent, &subject("s"), t0() + hours(1)).await.unwrap();
        let own = db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap();
        assert_eq!(own.delivery, Delivery::Delivered { at: t0() });
    }

    async fn a_reader_keeps_its_first_time_of_reading(db) {
        given_waiting(db).await;
        let read = async |now| {
            let view = View::of(Audience::Agent, now);
            db.events.mark_read(&acme(), &[id(1), id(4)], None, &subject("ann"), view).await.unwrap()
        };
        let first = read(t0() + MICRO).await;
        assert_eq!(sorted(first.clone()), [(id(1), contact(1), true), (id(4), contact(2), true)]);
        assert!(first.iter().all(|receipt| receipt.at == t0() + MICRO));
        let again = read(t0() + hours(1)).await;
        assert_eq!(sorted(again.clone()), [(id(1), contact(1), false), (id(4), contact(2), false)]);
        assert!(again.iter().all(|receipt| receipt.at == t0() + MICRO));
    }

    async fn an_event_was_read_when_the_first_of_its_readers_read_it(db) {
        given_waiting(db).await;
        let read_at = async || db.events.find_by_id(&acme(), id(1)).await.unwrap().unwrap().read_at;
        let read = async |reader, now| {
            let view = View::of(Audience::Agent, now);
            db.events.mark_read(&acme(), &[id(1)], None, &subject(reader), view).await.unwrap()
        };
        assert_eq!(read_at().await, None);
        assert!(read("ann", t0() + minutes(2)).await[0].is_new);
        assert_eq!(read_at().await, Some(t0() + minutes(2)));
        let bob = read("bob", t0() + minutes(3)).await;
        assert_eq!((bob[0].is_new, bob[0].at), (true, t0() + minutes(3)));
        assert_eq!(read_at().await, Some(t0() + minutes(2)));
        // A clock that runs behind: the earliest counts.
        read("eve", t0() + minutes(1)).await;
        assert_eq!(read_at().await, Some(t0() + minutes(1)));
        assert_eq!(db.count("event_reads").await, 3);
        // Reading delivers nothing.
        assert_eq!(db.count("event_outbox").await, 4);
    }

    async fn what_a_reader_may_not_see_it_does_not_read(db) {
        given_waiting(db).await;
        db.given(&acme(), [
            event().id(id(6)).expires_at(t0() + hours(1)).recorded(),
            event().id(id(7)).visible_to_agent(false).recorded(),
        ]).await;
        let all: Vec<EventId> = (1..=7).map(id).collect();
        let read = async |reader, contacts: Option<&[ContactId]>, view| {
            let receipts = db.events.mark_read(&acme(), &all, contacts, &subject(reader), view).await.unwrap();
            sorted(receipts).into_iter().map(|(event, ..)| event).collect::<Vec<_>>()
        };
        let late = t0() + hours(1);
        assert_eq!(read("c", Some(&[contact(1)]), View::of(Audience::Client, late)).await, [2, 3].map(id));
        assert_eq!(read("x", Some(&[contact(2)]), View::of(Audience::Client, late)).await, []);
        assert_eq!(read("x", Some(&[]), View::of(Audience::Agent, late)).await, []);
        assert_eq!(read("a", None, View::of(Audience::Agent, late)).await, [1, 3, 4, 5].map(id));
        assert_eq!(read("b", None, View::of(Audience::Agent, late - MICRO)).await, [1, 3, 4, 5, 6].map(id));
        assert_eq!(read("s", None, View::of(Audience::Audit, late)).await, [1, 2, 3, 4, 5, 7].map(id));
        assert_eq!(read("s", None, View::everything(late)).await.len(), 7);
        assert_eq!(db.count("event_reads where reader = 'x'").await, 0);
    }

    async fn what_was_read_and_is_hidden_now_is_not_answered(db) {
        db.given(&acme(), [event().id(id(1)).expires_at(t0() + hours(1)).recorded()]).await;
        let read = async |now| {
            let view = View::of(Audience::Agent, now);
            db.events.mark_read(&acme(), &[id(1)], None, &subject("ann"), view).await.unwrap().len()
        };
        assert_eq!(read(t0()).await, 1);
        assert_eq!(read(t0() + hours(1)).await, 0);
    }

    async fn reads_of_another_tenant_are_untouched(db) {
        for tenant in [acme(), globex()] {
            db.given(&tenant, [event().id(id(1)).record(&tenant, t0()).unwrap()]).await;
        }
        db.events.mark_read(&acme(), &[id(1)], None, &subject("ann"), View::everything(t0())).await.unwrap();
        let other = db.events.find_by_id(&globex(), id(1)).await.unwrap().unwrap();
        assert_eq!(other.read_at, None);
        let receipts = db.events.mark_read(&globex(), &[id(1)], None, &subject("ann"), View::everything(t0() + MICRO)).await;
        assert!(receipts.unwrap()[0].is_new);
    }

    async fn of_sixteen_concurrent_reads_one_is_the_first_and_all_answer_its_time(db) {
        given_waiting(db).await;
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let (events, barrier) = (db.events.clone(), barrier.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                let view = View::of(Audience::Agent, t0() + MICRO * n);
                events.mark_read(&acme(), &[id(1)], None, &subject("ann"), view).await.unwrap()
            });
        }
        let receipts: Vec<Receipt> = tasks.join_all().await.into_iter().flatten().collect();
        assert_eq!(receipts.len(), 16);
        assert_eq!(receipts.iter().filter(|receipt| receipt.is_new).count(), 1);
        assert!(receipts.iter().all(|receipt| receipt.at == receipts[0].at));
    }
}
