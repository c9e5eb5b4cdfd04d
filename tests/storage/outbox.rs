//! The outbox: what waits for its audience, in which order it is read, and how the wait ends.

use chrono::{DateTime, Utc};
use timelined::domain::{Audience, ContactId, Delivery, EventId, Priority, TenantId};
use timelined::storage::{Key, Page, Tail, TailMark, Undelivered, View};

use crate::support::builders::*;
use crate::support::database::{Database, Engine};

fn everyone(_: &str, _: ContactId) -> bool {
    true
}

fn ids(found: &[Undelivered]) -> Vec<EventId> {
    found
        .iter()
        .map(|undelivered| undelivered.event.id)
        .collect()
}

fn tail_ids(tail: &Tail) -> Vec<EventId> {
    tail.entries.iter().map(|entry| entry.event_id).collect()
}

async fn undelivered(db: &Database, view: View) -> Vec<EventId> {
    let found = db
        .events
        .find_undelivered_for_contact(&acme(), contact(1), view, Page::first(200))
        .await;
    found.unwrap().events.iter().map(|event| event.id).collect()
}

async fn backlog(
    db: &Database,
    contacts: &[ContactId],
    after: [i64; 4],
    limit: u32,
) -> Vec<Undelivered> {
    db.events
        .find_undelivered_realtime(&acme(), contacts, after, t0(), limit)
        .await
        .unwrap()
        .events
}

/// Eight events of contact 1 whose priorities repeat low, normal, high, urgent, one save each.
async fn given_priorities(db: &Database) {
    for number in 1..=8_u64 {
        let priority = Priority::ALL[(number as usize - 1) % 4];
        db.given(
            &acme(),
            [event()
                .id(id(number))
                .priority(priority)
                .realtime()
                .recorded()],
        )
        .await;
    }
}

async fn waiting(db: &Database) -> Vec<String> {
    let texts = db
        .texts("select cast(event_id as text) from event_outbox order by event_id")
        .await;
    texts.into_iter().flatten().collect()
}

async fn outcome(db: &Database, tenant: &TenantId, event: EventId) -> Delivery {
    db.events
        .find_by_id(tenant, event)
        .await
        .unwrap()
        .unwrap()
        .delivery
}

on_both_engines! {
    async fn a_tenant_that_is_no_text_stops_neither_delivery_nor_purge(db) {
        // PostgreSQL takes no such row.
        if db.engine == Engine::Postgres {
            return;
        }
        let mark = db.events.tail_end().await.unwrap();
        let insert = "insert into contact_events (tenant_id, contact_id, event_type, category, source, is_realtime, created_at, occurred_at, expires_at)
                      values (cast(x'ff' as text), '0190b5f0-7c1e-7d3a-8f00-0000000000cf', 'x', 'note', 'agent', 1, 1000000, 1000000, 2000000)";
        db.execute(insert).await.unwrap();
        let expired = event().realtime().expires_at(t0() + hours(1)).recorded();
        db.given(&acme(), [expired.clone()]).await;
        let tail = db.events.tail(&mark, &|_, _| true).await.unwrap();
        assert_eq!(tail.entries.iter().map(|entry| entry.event_id).collect::<Vec<_>>(), [expired.id]);
        assert_eq!(db.events.expiring_tenants().await.unwrap(), [acme()]);
        assert_eq!(db.events.delete_expired_before(&acme(), t0() + days(1), 10, None).await.unwrap(), 1);
    }

    async fn only_realtime_events_that_somebody_may_see_wait(db) {
        db.given(&acme(), [
            event().id(id(1)).recorded(),
            event().id(id(2)).realtime().recorded(),
            event().id(id(3)).realtime().visible_to_agent(false).recorded(),
            event().id(id(4)).realtime().visible_to_agent(false).visible_to_client(true).recorded(),
        ]).await;
        assert_eq!(waiting(db).await, [id(2).to_string(), id(4).to_string()]);
        assert_eq!(outcome(db, &acme(), id(1)).await, Delivery::NotRealtime);
        assert_eq!(outcome(db, &acme(), id(2)).await, Delivery::Pending);
        let audiences = db.texts("select audience from event_outbox order by event_id").await;
        assert_eq!(audiences, [Some("agent".to_owned()), Some("client".to_owned())]);
    }

    async fn a_thousand_realtime_events_of_one_batch_all_wait(db) {
        db.given(&acme(), (1..=1000).map(|n| event().id(id(n)).realtime().recorded())).await;
        assert_eq!(db.count("event_outbox").await, 1000);
        assert_eq!(db.count(
            "event_outbox o join contact_events e on e.tenant_id = o.tenant_id and e.id = o.event_id and e.seq = o.seq"
        ).await, 1000);
    }

    async fn a_contacts_undelivered_events_run_from_old_to_new(db) {
        let at = |number, time| event().id(id(number)).realtime().occurred_at(time).recorded();
        db.given(&acme(), [
            at(1, t0()), at(3, t0() - MICRO), at(2, t0() - MICRO), at(4, t0() - days(1)),
            event_of(contact(2)).id(id(5)).realtime().recorded(),
            event().id(id(6)).priority(Priority::Urgent).realtime().recorded(),
        ]).await;
        assert_eq!(undelivered(db, View::of(Audience::Agent, t0())).await, [4, 2, 3, 1, 6].map(id));
    }

    async fn undelivered_events_are_those_that_the_reader_may_see(db) {
        db.given(&acme(), [
            event().id(id(1)).realtime().recorded(),
            event().id(id(2)).realtime().visible_to_client(true).visible_to_agent(false).recorded(),
            event().id(id(3)).realtime().visible_to_client(true).recorded(),
        ]).await;
        let seen = async |audience| undelivered(db, View::of(audience, t0())).await;
        assert_eq!(seen(Audience::Client).await, [2, 3].map(id));
        assert_eq!(seen(Audience::Agent).await, [1, 3].map(id));
        assert_eq!(seen(Audience::Audit).await, [1, 2, 3].map(id));
    }

    async fn an_event_waits_until_the_microsecond_of_its_expiry(db) {
        db.given(&acme(), [event().id(id(1)).realtime().expires_at(t0() + MICRO).recorded()]).await;
        let seen = async |now| undelivered(db, View::of(Audience::Agent, now)).await.len();
        assert_eq!(seen(t0()).await, 1);
        assert_eq!(seen(t0() + MICRO).await, 0);
        let in_backlog = async |now| {
            db.events.find_undelivered_realtime(&acme(), &[contact(1)], [0; 4], now, 10).await.unwrap().events.len()
        };
        assert_eq!(in_backlog(t0()).await, 1);
        assert_eq!(in_backlog(t0() + MICRO).await, 0);
        // Audit sees expired events, but nothing expired is undelivered.
        assert_eq!(undelivered(db, View::everything(t0() + MICRO)).await, []);
    }

    async fn undelivered_events_are_paged_by_key_through_ties(db) {
        let given = (1..=30).map(|n| {
            event().id(id(n)).realtime().visible_to_client(n % 3 != 0)
                .occurred_at(t0() - minutes(i64::try_from(n % 4).unwrap())).recorded()
        });
        db.given(&acme(), given).await;
        let view = View::of(Audience::Client, t0());
        let expected = undelivered(db, view).await;
        assert_eq!(expected.len(), 20);
        for limit in [1, 3, 20] {
            let (mut found, mut page) = (Vec::new(), Page::first(limit));
            loop {
                let slice = db.events.find_undelivered_for_contact(&acme(), contact(1), view, page).await.unwrap();
                found.extend(slice.events.iter().map(|event| event.id));
                let Some(key) = slice.next else { break };
                page = Page::after(limit, key);
            }
            assert_eq!(found, expected, "limit {limit}");
        }
        let behind = Key { occurred_at: t0(), id: id(u64::from(u32::MAX)) };
        let slice = db.events.find_undelivered_for_contact(&acme(), contact(1), view, Page::after(5, behind)).await;
        assert_eq!(slice.unwrap().events, []);
    }

    async fn the_backlog_runs_by_priority_then_by_the_order_of_recording(db) {
        given_priorities(db).await;
        let found = backlog(db, &[contact(1)], [0; 4], 100).await;
        assert_eq!(ids(&found), [4, 8, 3, 7, 2, 6, 1, 5].map(id));
        assert_eq!(found.iter().map(|undelivered| undelivered.rank).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3, 3]);
        let numbers = db.ints("select seq from event_outbox order by rank, seq").await;
        assert_eq!(found.iter().map(|undelivered| undelivered.seq).collect::<Vec<_>>(), numbers);
    }

    async fn an_older_time_of_occurrence_does_not_overtake_in_the_backlog(db) {
        for (number, age) in [(1, 0), (2, 100), (3, 50)] {
            db.given(&acme(), [event().id(id(number)).realtime().occurred_at(t0() - minutes(age)).recorded()]).await;
        }
        assert_eq!(ids(&backlog(db, &[contact(1)], [0; 4], 10).await), [1, 2, 3].map(id));
    }

    async fn the_backlog_goes_on_behind_a_position_in_each_rank(db) {
        given_priorities(db).await;
        let (mut found, mut after) = (Vec::new(), [0; 4]);
        loop {
            let part = backlog(db, &[contact(1)], after, 3).await;
            if part.is_empty() {
                break;
            }
            assert!(part.len() <= 3);
            for undelivered in &part {
                after[undelivered.rank as usize] = undelivered.seq;
            }
            found.extend(ids(&part));
        }
        assert_eq!(found, [4, 8, 3, 7, 2, 6, 1, 5].map(id));
    }

    async fn what_cannot_be_read_or_is_gone_does_not_end_the_backlog(db) {
        db.given(&acme(), (1..=6).map(|n| event().id(id(n)).realtime().recorded())).await;
        let seqs = db.ints("select seq from event_outbox order by seq").await;
        // A payload that the checks let through, and an outbox row whose event is gone.
        let lone = r#"{"a":"\ud800"}"#;
        db.execute(&format!("update contact_events set payload = '{lone}' where id = '{}'", id(1))).await.unwrap();
        db.execute(&format!("update event_outbox set event_id = '{}' where event_id = '{}'", id(99), id(2))).await.unwrap();
        let read = async |after, limit| {
            db.events.find_undelivered_realtime(&acme(), &[contact(1)], [0, 0, after, 0], t0(), limit).await.unwrap()
        };
        let first = read(0, 2).await;
        assert_eq!((&first.events, first.reached, first.is_end), (&vec![], [0, 0, seqs[1], 0], false));
        let second = read(seqs[1], 3).await;
        assert_eq!((ids(&second.events), second.reached[2], second.is_end), ([3, 4, 5].map(id).to_vec(), seqs[4], false));
        let third = read(seqs[4], 3).await;
        assert_eq!((ids(&third.events), third.reached[2], third.is_end), (vec![id(6)], seqs[5], true));
    }

    async fn an_urgent_event_that_comes_later_is_read_although_the_lower_ranks_are_far(db) {
        given_priorities(db).await;
        let mut after = [0; 4];
        for undelivered in backlog(db, &[contact(1)], after, 100).await {
            after[undelivered.rank as usize] = undelivered.seq;
        }
        db.given(&acme(), [event().id(id(9)).priority(Priority::Urgent).realtime().recorded()]).await;
        assert_eq!(ids(&backlog(db, &[contact(1)], after, 100).await), [id(9)]);
    }

    async fn the_backlog_of_several_contacts_is_one_order_and_no_other_contacts(db) {
        for number in 1..=12_u64 {
            let event = event_of(contact(number % 4 + 1)).id(id(number)).realtime().recorded();
            db.given(&acme(), [event]).await;
        }
        let watched = [contact(4), contact(2), contact(99)];
        assert_eq!(ids(&backlog(db, &watched, [0; 4], 100).await), [1, 3, 5, 7, 9, 11].map(id));
        assert_eq!(ids(&backlog(db, &watched, [0; 4], 4).await), [1, 3, 5, 7].map(id));
        assert_eq!(backlog(db, &[], [0; 4], 100).await, []);
        assert_eq!(backlog(db, &watched, [0; 4], 0).await, []);
    }

    async fn the_backlog_of_a_thousand_contacts_is_read_at_once(db) {
        let given = (1..=1000).map(|n| event_of(contact(n)).id(id(n)).realtime().recorded());
        db.given(&acme(), given).await;
        let watched: Vec<ContactId> = (1..=1000).map(contact).collect();
        assert_eq!(backlog(db, &watched, [0; 4], 256).await.len(), 256);
        assert_eq!(backlog(db, &watched, [0; 4], 2000).await.len(), 1000);
    }

    async fn a_contact_that_is_named_twice_is_read_once(db) {
        db.given(&acme(), [event().id(id(1)).realtime().recorded()]).await;
        assert_eq!(ids(&backlog(db, &[contact(1), contact(1)], [0; 4], 10).await), [id(1)]);
    }

    async fn an_empty_tail_stays_where_it_is(db) {
        let end = db.events.tail_end().await.unwrap();
        let tail = db.events.tail(&end, &everyone).await.unwrap();
        assert_eq!(tail_ids(&tail), []);
        let tail = db.events.tail(&tail.mark, &everyone).await.unwrap();
        assert_eq!(tail_ids(&tail), []);
    }

    async fn the_tail_gives_what_is_new_once_and_in_order(db) {
        db.given(&acme(), [event().id(id(1)).realtime().recorded()]).await;
        let mark = db.events.tail_end().await.unwrap();
        assert_eq!(tail_ids(&db.events.tail(&mark, &everyone).await.unwrap()), []);

        for (number, priority) in [(2, Priority::Low), (3, Priority::Urgent), (4, Priority::Normal), (5, Priority::Urgent)] {
            db.given(&acme(), [event().id(id(number)).priority(priority).realtime().recorded()]).await;
        }
        db.given(&acme(), [event().id(id(6)).recorded()]).await;
        let tail = db.events.tail(&mark, &everyone).await.unwrap();
        assert_eq!(tail_ids(&tail), [3, 5, 4, 2].map(id));
        let first = &tail.entries[0];
        assert_eq!((first.rank, &first.tenant_id, first.contact_id), (0, &acme(), contact(1)));
        assert_eq!(tail_ids(&db.events.tail(&tail.mark, &everyone).await.unwrap()), []);

        db.given(&acme(), [event().id(id(7)).realtime().recorded()]).await;
        let next = db.events.tail(&tail.mark, &everyone).await.unwrap();
        assert_eq!(tail_ids(&next), [id(7)]);
    }

    async fn the_tail_runs_across_tenants_and_keeps_only_what_is_watched(db) {
        let mark = db.events.tail_end().await.unwrap();
        for tenant in [acme(), globex()] {
            for number in 1..=3 {
                let event = event_of(contact(number)).id(id(number)).realtime().record(&tenant, t0()).unwrap();
                db.given(&tenant, [event]).await;
            }
        }
        assert_eq!(db.events.tail(&mark, &everyone).await.unwrap().entries.len(), 6);
        let keep = |tenant: &str, of: ContactId| tenant == "globex" && of != contact(2);
        let tail = db.events.tail(&mark, &keep).await.unwrap();
        assert_eq!(tail_ids(&tail), [1, 3].map(id));
        assert!(tail.entries.iter().all(|entry| entry.tenant_id == globex()));
        // What was not kept is behind the mark all the same.
        assert_eq!(tail_ids(&db.events.tail(&tail.mark, &everyone).await.unwrap()), []);
    }

    async fn the_tail_does_not_give_what_was_delivered_meanwhile(db) {
        let mark = db.events.tail_end().await.unwrap();
        db.given(&acme(), (1..=2).map(|n| event().id(id(n)).realtime().recorded())).await;
        db.events.mark_delivered(&acme(), None, &[id(2)], None, &subject("s"), t0()).await.unwrap();
        let tail = db.events.tail(&mark, &everyone).await.unwrap();
        assert_eq!(tail_ids(&tail), [id(1)]);
        db.given(&acme(), [event().id(id(3)).realtime().recorded()]).await;
        assert_eq!(tail_ids(&db.events.tail(&tail.mark, &everyone).await.unwrap()), [id(3)]);
    }

    async fn the_tail_gives_what_another_program_inserted(db) {
        let mark = db.events.tail_end().await.unwrap();
        db.execute(&format!(
            "insert into contact_events (tenant_id, contact_id, event_type, category, source, is_realtime)
             values ('acme', '{}', 'note_added', 'note', 'agent', {})",
            contact(5), db.flag(true)
        )).await.unwrap();
        let tail = db.events.tail(&mark, &everyone).await.unwrap();
        assert_eq!(tail.entries.len(), 1);
        assert_eq!((tail.entries[0].contact_id, tail.entries[0].rank), (contact(5), 2));
    }

    async fn a_mark_of_the_other_engine_is_refused(db) {
        let foreign = db.either(TailMark::Snapshot("1:1:".to_owned()), TailMark::Seq(1));
        assert!(db.events.tail(&foreign, &everyone).await.is_err());
    }

    async fn the_events_of_tail_entries_are_found_and_what_is_gone_is_left_out(db) {
        let mark = db.events.tail_end().await.unwrap();
        for (number, priority) in [(1, Priority::Low), (2, Priority::High), (3, Priority::High), (4, Priority::Urgent)] {
            db.given(&acme(), [event().id(id(number)).priority(priority).realtime().recorded()]).await;
        }
        db.given(&globex(), [event().id(id(1)).realtime().record(&globex(), t0()).unwrap()]).await;
        let entries = db.events.tail(&mark, &everyone).await.unwrap().entries;
        db.events.delete(&acme(), id(3), &subject("s"), t0()).await.unwrap();
        let found = db.events.find_entries(&entries).await.unwrap();
        assert_eq!(ids(&found), [4, 2, 1, 1].map(id));
        assert_eq!(found[0].rank, 0);
        assert_eq!(found[0].seq, entries[0].seq);
        assert!(found.iter().any(|undelivered| undelivered.event.tenant_id == globex()));
        assert_eq!(db.events.find_entries(&[]).await.unwrap(), []);
    }

    async fn what_expired_unseen_is_recorded_as_expired_and_never_as_delivered(db) {
        let at = |number, expires_at: DateTime<Utc>| event().id(id(number)).realtime().expires_at(expires_at).recorded();
        db.given(&acme(), [at(1, t0() + hours(1)), at(2, t0() + hours(1) + MICRO), event().id(id(3)).realtime().recorded()]).await;
        let now = t0() + hours(1);
        assert_eq!(db.events.expire_undelivered(now - MICRO, 100).await.unwrap(), 0);
        assert_eq!(db.events.expire_undelivered(now, 100).await.unwrap(), 1);
        assert_eq!(db.events.expire_undelivered(now, 100).await.unwrap(), 0);
        assert_eq!(outcome(db, &acme(), id(1)).await, Delivery::Expired { at: now });
        assert_eq!(outcome(db, &acme(), id(2)).await, Delivery::Pending);
        assert_eq!(waiting(db).await, [id(2).to_string(), id(3).to_string()]);
        let ended = db.events.mark_delivered(&acme(), None, &[id(1)], None, &subject("s"), now).await.unwrap();
        assert_eq!(ended, []);
        assert_eq!(outcome(db, &acme(), id(1)).await.delivered_at(), None);
        assert_eq!(db.count("timeline_events where delivered_at is not null").await, 0);
    }

    async fn expiry_of_the_undelivered_goes_across_tenants_in_limited_steps_first_expired_first(db) {
        for (tenant, first) in [(acme(), 1), (globex(), 1)] {
            let given = (first..first + 5).map(|n| {
                event().id(id(n)).realtime().expires_at(t0() + minutes(i64::try_from(n).unwrap())).record(&tenant, t0()).unwrap()
            });
            db.given(&tenant, given).await;
        }
        let now = t0() + hours(1);
        assert_eq!(db.events.expire_undelivered(now, 4).await.unwrap(), 4);
        for tenant in [acme(), globex()] {
            for (number, expected) in [(1, Delivery::Expired { at: now }), (2, Delivery::Expired { at: now }), (3, Delivery::Pending)] {
                assert_eq!(outcome(db, &tenant, id(number)).await, expected, "{tenant} {number}");
            }
        }
        assert_eq!(db.events.expire_undelivered(now, 4).await.unwrap(), 4);
        assert_eq!(db.events.expire_undelivered(now, 4).await.unwrap(), 2);
        assert_eq!(db.count("event_outbox").await, 0);
        assert_eq!(db.count("event_deliveries where outcome = 'expired' and recorded_by is null").await, 10);
    }
}
