//! The export queue: claims that end, mails that are tried again, and the rows of an export.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use timelined::domain::{Audience, Category, ContactId, EventId, ExportId};
use timelined::storage::{
    ClaimedDelivery, DeliveryOutcome, DeliveryState, Export, ExportRequest, ExportState, NewExport,
    Rendered,
};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::builders::*;
use crate::support::database::Database;

const A: &str = "ann@example.com";
const B: &str = "bob@example.org";

fn request(to: &[&str]) -> ExportRequest {
    ExportRequest {
        contact_id: contact(1),
        format: "csv".to_owned(),
        audience: Audience::Client,
        since: None,
        until: None,
        categories: Vec::new(),
        timezone: chrono_tz::UTC,
        redact: Vec::new(),
        to: to.iter().map(|address| (*address).to_owned()).collect(),
        attach: true,
    }
}

fn asked(request: ExportRequest, at: DateTime<Utc>) -> NewExport {
    let id = ExportId::generate(at);
    NewExport {
        id,
        tenant_id: acme(),
        message_ids: request.to.iter().map(|to| format!("{id}.{to}")).collect(),
        request,
        requested_by: subject("svc"),
        request_key: None,
        created_at: at,
    }
}

async fn create(db: &Database, request: ExportRequest) -> Export {
    let new = asked(request, t0());
    assert_eq!(db.exports.create_one(&new).await.unwrap(), new.id);
    find(db, new.id).await
}

async fn find(db: &Database, id: ExportId) -> Export {
    db.exports.find(&acme(), id).await.unwrap().unwrap()
}

fn file(at: DateTime<Utc>) -> Rendered {
    Rendered {
        rows: 3,
        bytes: u64::from(u32::MAX) + 1,
        sha256: "ab".repeat(32),
        file_name: "timeline ü.csv".to_owned(),
        at,
        expires_at: at + days(7),
    }
}

/// An export that is rendered at `t0`, whose mails wait.
async fn rendered(db: &Database, to: &[&str]) -> Export {
    let export = create(db, request(to)).await;
    let claimed = db
        .exports
        .claim_render(worker(1), t0(), t0() + minutes(1))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(claimed.id, export.id);
    assert!(
        db.exports
            .rendered(&claimed, worker(1), &file(t0()))
            .await
            .unwrap()
    );
    find(db, export.id).await
}

async fn claim_mail(db: &Database, now: DateTime<Utc>) -> Option<ClaimedDelivery> {
    db.exports
        .claim_delivery(worker(1), now, now + minutes(1))
        .await
        .unwrap()
}

async fn end(
    db: &Database,
    claimed: &ClaimedDelivery,
    outcome: DeliveryOutcome,
    now: DateTime<Utc>,
) {
    db.exports
        .delivery_ended(claimed, worker(1), &outcome, now)
        .await
        .unwrap();
}

fn dead() -> DeliveryOutcome {
    DeliveryOutcome::Dead {
        error: "550 no such user".to_owned(),
    }
}

fn again(state: DeliveryState, next_attempt_at: DateTime<Utc>) -> DeliveryOutcome {
    DeliveryOutcome::Again {
        state,
        next_attempt_at,
        error: "451 busy".to_owned(),
    }
}

async fn row_ids(db: &Database, export: &Export, now: DateTime<Utc>) -> Vec<EventId> {
    let slice = db.exports.rows(export, None, now, 200).await.unwrap();
    assert_eq!(slice.next, None);
    assert_eq!(
        db.exports.count_rows(export, now).await.unwrap(),
        slice.events.len() as u64
    );
    slice.events.iter().map(|event| event.id).collect()
}

on_both_engines! {
    async fn an_export_comes_back_as_it_was_asked_for(db) {
        let request = ExportRequest {
            since: Some(t0() - days(7)),
            until: Some(t0() + MICRO),
            categories: vec![Category::Note, Category::CustomField],
            timezone: chrono_tz::America::Argentina::Buenos_Aires,
            redact: vec!["payload".to_owned(), "a \"quoted\", {field}".to_owned()],
            attach: false,
            audience: Audience::Audit,
            ..request(&[B, A])
        };
        let new = NewExport { request_key: Some("run 1".to_owned()), ..asked(request.clone(), t0()) };
        assert_eq!(db.exports.create_one(&new).await.unwrap(), new.id);
        let export = find(db, new.id).await;
        assert_eq!(export.request, request);
        assert_eq!((export.id, &export.tenant_id, &export.requested_by), (new.id, &acme(), &subject("svc")));
        assert_eq!((export.created_at, export.state, export.attempt), (t0(), ExportState::Queued, 0));
        assert_eq!((export.started_at, export.rendered_at, export.finished_at, export.expires_at), (None, None, None, None));
        assert_eq!((export.total_rows, export.rows, export.bytes), (None, 0, None));
        assert_eq!((export.sha256, export.file_name, export.error), (None, None, None));
        let deliveries: Vec<_> = export.deliveries.iter().map(|mail| (mail.to.as_str(), mail.message_id.clone())).collect();
        assert_eq!(deliveries, [(B, new.message_ids[0].clone()), (A, new.message_ids[1].clone())]);
        for mail in export.deliveries {
            assert_eq!((mail.state, mail.attempt, mail.next_attempt_at, mail.sent_at, mail.error), (DeliveryState::Pending, 0, None, None, None));
        }
    }

    async fn a_repeat_of_a_request_is_the_export_there_is(db) {
        let keyed = |key: &str| NewExport { request_key: Some(key.to_owned()), ..asked(request(&[A]), t0()) };
        let first = keyed("k");
        assert_eq!(db.exports.create_one(&first).await.unwrap(), first.id);
        assert_eq!(db.exports.create_one(&keyed("k")).await.unwrap(), first.id);
        let other = keyed("another");
        assert_eq!(db.exports.create_one(&other).await.unwrap(), other.id);
        let elsewhere = NewExport { tenant_id: globex(), ..keyed("k") };
        assert_eq!(db.exports.create_one(&elsewhere).await.unwrap(), elsewhere.id);
        for _ in 0..2 {
            let new = asked(request(&[]), t0());
            assert_eq!(db.exports.create_one(&new).await.unwrap(), new.id);
        }
        assert_eq!(db.count("exports").await, 5);
        assert_eq!(db.count("export_deliveries").await, 3);
    }

    async fn exports_are_added_many_at_a_time_each_with_its_mails(db) {
        let keyed = |n: u64, to: &[&str]| NewExport {
            request_key: Some(format!("run/{n}")),
            ..asked(ExportRequest { contact_id: contact(n), categories: vec![Category::Note; usize::from(n == 3)], ..request(to) }, t0())
        };
        let first = keyed(2, &[A]);
        db.exports.create_one(&first).await.unwrap();
        let elsewhere = NewExport { tenant_id: globex(), ..keyed(2, &[B]) };
        let without_key = asked(request(&[]), t0());
        // A repeat of the first one stands among them, and one key twice.
        let twice = keyed(4, &[B]);
        let batch = [keyed(1, &[A, B]), keyed(2, &[B]), keyed(3, &[B, A]), elsewhere, without_key, twice, keyed(4, &[A])];
        let there_are = db.exports.create(&batch, None).await.unwrap();
        let mut expected: Vec<_> = batch.iter().map(|export| export.id).collect();
        (expected[1], expected[6]) = (first.id, batch[5].id);
        assert_eq!(there_are, expected);
        assert_eq!(db.count("exports").await, 6);
        assert_eq!(db.count("export_deliveries").await, 1 + 2 + 2 + 1 + 1);
        for export in [&batch[0], &batch[2], &batch[4], &batch[5]] {
            let found = find(db, export.id).await;
            assert_eq!(found.request, export.request);
            let ids: Vec<_> = found.deliveries.into_iter().map(|mail| mail.message_id).collect();
            assert_eq!(ids, export.message_ids);
        }
        assert_eq!(db.exports.create(&batch[..4], None).await.unwrap(), expected[..4], "a repeat adds none");
        assert_eq!(db.exports.create(&[], None).await.unwrap(), []);
        assert_eq!(db.count("exports where request_key is not null").await, 5);
    }

    async fn of_sixteen_concurrent_requests_with_one_key_one_export_comes(db) {
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for _ in 0..16 {
            let (exports, barrier) = (db.exports.clone(), barrier.clone());
            tasks.spawn(async move {
                let new = NewExport { request_key: Some("k".to_owned()), ..asked(request(&[A]), t0()) };
                barrier.wait().await;
                exports.create_one(&new).await.unwrap()
            });
        }
        let ids = tasks.join_all().await;
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_eq!(db.count("exports").await, 1);
        assert_eq!(db.count("export_deliveries").await, 1);
    }

    async fn exports_are_listed_from_new_to_old_in_pages_of_one_tenant(db) {
        let mut ids = Vec::new();
        for n in 0..7 {
            let new = asked(request(if n % 2 == 0 { &[A, B] } else { &[] }), t0() + minutes(n));
            ids.push(db.exports.create_one(&new).await.unwrap());
        }
        let elsewhere = NewExport { tenant_id: globex(), ..asked(request(&[A]), t0()) };
        db.exports.create_one(&elsewhere).await.unwrap();
        assert_eq!(db.exports.find(&acme(), elsewhere.id).await.unwrap(), None);
        ids.reverse();
        let (mut found, mut before) = (Vec::new(), None);
        loop {
            let page = db.exports.list(&acme(), Audience::ALL, before, 3).await.unwrap();
            assert!(page.len() <= 3);
            let Some(last) = page.last() else { break };
            before = Some(last.id);
            for export in &page {
                assert_eq!(export, &find(db, export.id).await);
            }
            found.extend(page.iter().map(|export| export.id));
        }
        assert_eq!(found, ids);
        assert_eq!(db.exports.list(&globex(), Audience::ALL, None, 9).await.unwrap().len(), 1);
    }

    async fn the_export_that_waited_longest_is_rendered_first(db) {
        let mut ids = Vec::new();
        for minute in [3, 1, 2] {
            ids.push(db.exports.create_one(&asked(request(&[]), t0() + minutes(minute))).await.unwrap());
        }
        let claim = async || db.exports.claim_render(worker(1), t0() + hours(1), t0() + hours(2)).await.unwrap();
        let order: Vec<ExportId> = [claim().await, claim().await, claim().await].into_iter().flatten().map(|export| export.id).collect();
        assert_eq!(order, [ids[1], ids[2], ids[0]]);
        assert_eq!(claim().await, None);
    }

    async fn a_claimed_export_counts_its_attempt_and_is_nobody_elses(db) {
        let export = create(db, request(&[A])).await;
        let claimed = db.exports.claim_render(worker(1), t0() + MICRO, t0() + minutes(1)).await.unwrap().unwrap();
        assert_eq!((claimed.id, claimed.state, claimed.attempt), (export.id, ExportState::Running, 1));
        assert_eq!((claimed.started_at, claimed.deliveries.len()), (Some(t0() + MICRO), 1));
        let other = db.exports.claim_render(worker(2), t0() + minutes(1) - MICRO, t0() + hours(1)).await.unwrap();
        assert_eq!(other, None);
    }

    async fn of_sixteen_concurrent_workers_each_export_goes_to_one(db) {
        for _ in 0..5 {
            create(db, request(&[])).await;
        }
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let (exports, barrier) = (db.exports.clone(), barrier.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                exports.claim_render(worker(n), t0(), t0() + minutes(1)).await.unwrap().map(|export| export.id)
            });
        }
        let mut claimed: Vec<ExportId> = tasks.join_all().await.into_iter().flatten().collect();
        while let Some(export) = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap() {
            claimed.push(export.id);
        }
        claimed.sort();
        claimed.dedup();
        assert_eq!(claimed.len(), 5);
        assert_eq!(db.count("exports where attempt = 1").await, 5);
    }

    async fn a_claim_that_was_not_kept_is_lost_and_another_worker_takes_over(db) {
        create(db, request(&[A])).await;
        let first = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
        assert!(db.exports.progress(&first, worker(1), 10, 100, t0() + minutes(2)).await.unwrap());
        let noted = find(db, first.id).await;
        assert_eq!((noted.rows, noted.total_rows), (10, Some(100)));
        // It was kept until minute 2.
        assert_eq!(db.exports.claim_render(worker(2), t0() + minutes(1), t0() + hours(1)).await.unwrap(), None);
        let second = db.exports.claim_render(worker(2), t0() + minutes(2), t0() + hours(1)).await.unwrap().unwrap();
        assert_eq!((second.id, second.attempt, second.started_at, second.rows), (first.id, 2, Some(t0()), 0));

        assert!(!db.exports.progress(&first, worker(1), 20, 100, t0() + hours(2)).await.unwrap());
        assert!(!db.exports.rendered(&first, worker(1), &file(t0())).await.unwrap());
        db.exports.render_failed(&first, worker(1), "late", None, t0()).await.unwrap();
        assert!(db.exports.progress(&second, worker(2), 5, 100, t0() + hours(1)).await.unwrap());
        let now = find(db, first.id).await;
        assert_eq!((now.state, now.rows, now.file_name, now.error), (ExportState::Running, 5, None, None));
    }

    async fn a_cancelled_export_stops_its_worker(db) {
        create(db, request(&[A])).await;
        let claimed = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
        db.execute("update exports set state = 'cancelled'").await.unwrap();
        assert!(!db.exports.progress(&claimed, worker(1), 1, 1, t0() + hours(1)).await.unwrap());
        assert!(!db.exports.rendered(&claimed, worker(1), &file(t0())).await.unwrap());
        assert_eq!(db.exports.claim_render(worker(1), t0() + days(1), t0() + days(2)).await.unwrap(), None);
        assert_eq!(find(db, claimed.id).await.state, ExportState::Cancelled);
    }

    async fn a_rendered_export_without_recipients_is_done(db) {
        let export = rendered(db, &[]).await;
        assert_eq!((export.state, export.finished_at, export.rendered_at), (ExportState::Done, Some(t0()), Some(t0())));
        let file = file(t0());
        assert_eq!((export.rows, export.total_rows, export.bytes), (3, Some(3), Some(file.bytes)));
        assert_eq!((export.sha256, export.file_name), (Some(file.sha256), Some(file.file_name)));
        assert_eq!(export.expires_at, Some(t0() + days(7)));
        assert_eq!(claim_mail(db, t0() + days(1)).await, None);
        assert_eq!(db.exports.claim_render(worker(1), t0() + days(1), t0() + days(2)).await.unwrap(), None);
    }

    async fn mails_are_due_from_the_instant_the_file_is_there(db) {
        create(db, request(&[A])).await;
        assert_eq!(claim_mail(db, t0() + days(1)).await, None);
        let claimed = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
        assert!(db.exports.rendered(&claimed, worker(1), &file(t0() + minutes(1))).await.unwrap());
        assert_eq!(find(db, claimed.id).await.state, ExportState::Running);
        assert_eq!(claim_mail(db, t0() + minutes(1) - MICRO).await, None);
        let mail = claim_mail(db, t0() + minutes(1)).await.unwrap();
        assert_eq!((mail.delivery.to.as_str(), mail.delivery.attempt), (A, 1));
        assert_eq!(mail.delivery.state, DeliveryState::Pending);
        assert_eq!(mail.delivery.message_id, claimed.deliveries[0].message_id);
        assert_eq!(mail.export.file_name.as_deref(), Some("timeline ü.csv"));
        // A mail that waits is no export that waits.
        assert_eq!(db.exports.claim_render(worker(1), t0() + days(1), t0() + days(2)).await.unwrap(), None);
    }

    async fn a_failed_rendering_is_tried_again_later_or_never(db) {
        let export = create(db, request(&[A])).await;
        let claim = async |now| db.exports.claim_render(worker(1), now, now + minutes(1)).await.unwrap();
        let first = claim(t0()).await.unwrap();
        db.exports.render_failed(&first, worker(1), "disk full", Some(t0() + minutes(5)), t0()).await.unwrap();
        let waiting = find(db, export.id).await;
        assert_eq!((waiting.state, waiting.error.as_deref(), waiting.finished_at), (ExportState::Queued, Some("disk full"), None));
        assert_eq!(claim(t0() + minutes(5) - MICRO).await, None);
        let second = claim(t0() + minutes(5)).await.unwrap();
        assert_eq!(second.attempt, 2);
        db.exports.render_failed(&second, worker(1), "no such font", None, t0() + minutes(6)).await.unwrap();
        let failed = find(db, export.id).await;
        assert_eq!((failed.state, failed.error.as_deref()), (ExportState::Failed, Some("no such font")));
        assert_eq!(failed.finished_at, Some(t0() + minutes(6)));
        assert_eq!(claim(t0() + days(1)).await, None);
        assert_eq!(claim_mail(db, t0() + days(1)).await, None);
    }

    async fn a_success_forgets_the_error_of_an_earlier_attempt(db) {
        create(db, request(&[])).await;
        let first = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
        db.exports.render_failed(&first, worker(1), "disk full", Some(t0()), t0()).await.unwrap();
        let second = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
        assert!(db.exports.rendered(&second, worker(1), &file(t0())).await.unwrap());
        assert_eq!(find(db, first.id).await.error, None);
    }

    async fn an_export_is_done_with_its_first_mail_that_went_out(db) {
        let export = rendered(db, &[A, B]).await;
        let first = claim_mail(db, t0()).await.unwrap();
        let second = claim_mail(db, t0()).await.unwrap();
        assert_ne!(first.delivery.to, second.delivery.to);
        assert_eq!(claim_mail(db, t0()).await, None);
        end(db, &first, DeliveryOutcome::Sent { at: t0() + MICRO }, t0() + MICRO).await;
        let done = find(db, export.id).await;
        assert_eq!((done.state, done.finished_at), (ExportState::Done, Some(t0() + MICRO)));
        let sent = done.deliveries.iter().find(|mail| mail.to == first.delivery.to).unwrap();
        assert_eq!((sent.state, sent.sent_at, sent.next_attempt_at), (DeliveryState::Sent, Some(t0() + MICRO), None));
        end(db, &second, dead(), t0() + hours(1)).await;
        let done = find(db, export.id).await;
        assert_eq!((done.state, done.finished_at, done.error), (ExportState::Done, Some(t0() + MICRO), None));
        let refused = done.deliveries.iter().find(|mail| mail.to == second.delivery.to).unwrap();
        assert_eq!((refused.state, refused.error.as_deref()), (DeliveryState::Dead, Some("550 no such user")));
    }

    async fn one_refused_and_one_sent_is_done_in_this_order_too(db) {
        let export = rendered(db, &[A, B]).await;
        let (first, second) = (claim_mail(db, t0()).await.unwrap(), claim_mail(db, t0()).await.unwrap());
        end(db, &first, dead(), t0()).await;
        assert_eq!(find(db, export.id).await.state, ExportState::Running);
        end(db, &second, DeliveryOutcome::Sent { at: t0() }, t0()).await;
        let done = find(db, export.id).await;
        assert_eq!((done.state, done.error), (ExportState::Done, None));
    }

    async fn an_export_whose_every_mail_is_refused_has_failed(db) {
        let export = rendered(db, &[A, B]).await;
        let (first, second) = (claim_mail(db, t0()).await.unwrap(), claim_mail(db, t0()).await.unwrap());
        end(db, &first, dead(), t0()).await;
        end(db, &second, dead(), t0() + minutes(1)).await;
        let failed = find(db, export.id).await;
        assert_eq!((failed.state, failed.finished_at), (ExportState::Failed, Some(t0() + minutes(1))));
        assert!(failed.error.is_some());
        assert_eq!(claim_mail(db, t0() + days(1)).await, None);
    }

    async fn a_deferred_or_uncertain_mail_is_tried_again_at_its_time_with_its_own_id(db) {
        let export = rendered(db, &[A]).await;
        let mut now = t0();
        for (attempt, state) in (1..).zip([DeliveryState::Deferred, DeliveryState::Uncertain, DeliveryState::Deferred]) {
            let mail = claim_mail(db, now).await.unwrap();
            assert_eq!(mail.delivery.attempt, attempt);
            assert_eq!(mail.delivery.message_id, export.deliveries[0].message_id);
            end(db, &mail, again(state, now + minutes(5)), now).await;
            let waiting = find(db, export.id).await;
            assert_eq!((waiting.state, waiting.deliveries[0].state), (ExportState::Running, state));
            assert_eq!(waiting.deliveries[0].next_attempt_at, Some(now + minutes(5)));
            assert_eq!(waiting.deliveries[0].error.as_deref(), Some("451 busy"));
            assert_eq!(claim_mail(db, now + minutes(5) - MICRO).await, None);
            now += minutes(5);
        }
        let mail = claim_mail(db, now).await.unwrap();
        end(db, &mail, DeliveryOutcome::Sent { at: now }, now).await;
        let done = find(db, export.id).await;
        assert_eq!((done.state, done.deliveries[0].attempt, done.deliveries[0].error.clone()), (ExportState::Done, 4, None));
    }

    async fn the_mail_that_has_been_due_longest_goes_first(db) {
        rendered(db, &[A, B]).await;
        let (first, second) = (claim_mail(db, t0()).await.unwrap(), claim_mail(db, t0()).await.unwrap());
        end(db, &first, again(DeliveryState::Deferred, t0() + minutes(9)), t0()).await;
        end(db, &second, again(DeliveryState::Deferred, t0() + minutes(8)), t0()).await;
        assert_eq!(claim_mail(db, t0() + hours(1)).await.unwrap().delivery.to, second.delivery.to);
        assert_eq!(claim_mail(db, t0() + hours(1)).await.unwrap().delivery.to, first.delivery.to);
    }

    async fn of_sixteen_concurrent_senders_each_mail_goes_to_one(db) {
        let addresses: Vec<String> = (0..5).map(|n| format!("{n}@example.com")).collect();
        rendered(db, &addresses.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let (exports, barrier) = (db.exports.clone(), barrier.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                exports.claim_delivery(worker(n), t0(), t0() + minutes(1)).await.unwrap().map(|mail| mail.delivery.to)
            });
        }
        let mut claimed: Vec<String> = tasks.join_all().await.into_iter().flatten().collect();
        while let Some(mail) = claim_mail(db, t0()).await {
            claimed.push(mail.delivery.to);
        }
        claimed.sort();
        assert_eq!(claimed, addresses);
        assert_eq!(db.count("export_deliveries where attempt = 1 and state = 'sending'").await, 5);
    }

    async fn a_sender_that_died_loses_its_mail_and_its_late_answer_counts_for_nothing(db) {
        let export = rendered(db, &[A]).await;
        let first = claim_mail(db, t0()).await.unwrap();
        assert_eq!(db.exports.claim_delivery(worker(2), t0() + minutes(1) - MICRO, t0() + hours(1)).await.unwrap(), None);
        let second = db.exports.claim_delivery(worker(2), t0() + minutes(1), t0() + hours(1)).await.unwrap().unwrap();
        assert_eq!((second.delivery.to.as_str(), second.delivery.attempt), (A, 2));
        end(db, &first, dead(), t0() + minutes(2)).await;
        let now = find(db, export.id).await;
        assert_eq!((now.state, now.deliveries[0].state), (ExportState::Running, DeliveryState::Sending));
        db.exports.delivery_ended(&second, worker(2), &DeliveryOutcome::Sent { at: t0() }, t0()).await.unwrap();
        assert_eq!(find(db, export.id).await.state, ExportState::Done);
    }

    async fn a_worker_that_stops_gives_back_what_it_holds_at_once(db) {
        let render = create(db, request(&[])).await;
        let claimed = db.exports.claim_render(worker(1), t0(), t0() + hours(1)).await.unwrap().unwrap();
        db.exports.release(worker(2)).await.unwrap();
        assert_eq!(db.exports.claim_render(worker(2), t0(), t0() + hours(1)).await.unwrap(), None);
        db.exports.release(worker(1)).await.unwrap();
        let released = find(db, render.id).await;
        assert_eq!((released.state, released.attempt), (ExportState::Queued, 0));
        assert!(!db.exports.progress(&claimed, worker(1), 1, 1, t0() + hours(1)).await.unwrap());
        let again = db.exports.claim_render(worker(2), t0(), t0() + hours(1)).await.unwrap().unwrap();
        assert_eq!((again.id, again.attempt), (render.id, 1));
    }

    async fn a_mail_that_was_being_sent_is_uncertain_when_it_is_given_back(db) {
        let export = rendered(db, &[A]).await;
        claim_mail(db, t0()).await.unwrap();
        db.exports.release(worker(2)).await.unwrap();
        assert_eq!(claim_mail(db, t0()).await, None);
        db.exports.release(worker(1)).await.unwrap();
        assert_eq!(find(db, export.id).await.deliveries[0].state, DeliveryState::Uncertain);
        let mail = claim_mail(db, t0()).await.unwrap();
        assert_eq!(mail.delivery.message_id, export.deliveries[0].message_id);
    }

    async fn what_a_command_holds_stays_its_own_when_a_daemons_claims_are_given_back(db) {
        rendered(db, &[A]).await;
        claim_mail(db, t0()).await.unwrap();
        create(db, request(&[])).await;
        db.exports.claim_render(worker(9), t0(), t0() + hours(1)).await.unwrap().unwrap();
        db.exports.release(worker(1)).await.unwrap();
        assert!(claim_mail(db, t0()).await.is_some());
        assert!(db.exports.claim_render(worker(1), t0(), t0() + hours(1)).await.unwrap().is_none());
    }

    async fn an_export_that_cannot_be_read_fails_and_the_next_is_rendered(db) {
        let (broken, whole) = (create(db, request(&[])).await, create(db, request(&[])).await);
        db.execute(&format!("update exports set timezone = 'Mars/Olympus' where id = '{}'", broken.id)).await.unwrap();
        let taken = db.exports.claim_render(worker(1), t0(), t0() + hours(1)).await.unwrap().unwrap();
        assert_eq!(taken.id, whole.id);
        let failed = format!("exports where id = '{}' and state = 'failed' and error like '%timezone%' and claimed_by is null", broken.id);
        assert_eq!(db.count(&failed).await, 1);
    }

    async fn a_mail_whose_export_cannot_be_read_is_dead_and_the_next_goes_out(db) {
        let broken = rendered(db, &[A, B]).await;
        let whole = rendered(db, &[A]).await;
        db.execute(&format!("update exports set timezone = 'Mars/Olympus' where id = '{}'", broken.id)).await.unwrap();
        let mail = claim_mail(db, t0() + hours(1)).await.unwrap();
        assert_eq!((mail.export.id, mail.delivery.state), (whole.id, DeliveryState::Pending));
        let dead = format!("export_deliveries where export_id = '{}' and state = 'dead' and error like '%timezone%'", broken.id);
        assert_eq!(db.count(&dead).await, 2);
        assert_eq!(db.count(&format!("exports where id = '{}' and state = 'failed'", broken.id)).await, 1);
    }

    async fn a_mail_that_cannot_be_read_with_its_export_is_not_claimed(db) {
        rendered(db, &[A]).await;
        db.execute("alter table exports rename column sha256 to moved").await.unwrap();
        assert!(db.exports.claim_delivery(worker(1), t0(), t0() + hours(1)).await.is_err());
        db.execute("alter table exports rename column moved to sha256").await.unwrap();
        assert_eq!(db.count("export_deliveries where state = 'pending' and claimed_by is null").await, 1);
    }

    async fn a_page_of_exports_is_full_although_some_are_hidden_from_the_reader(db) {
        let mut shown = Vec::new();
        for n in 0..6 {
            let mut request = request(&[]);
            let is_hidden = n % 2 == 1;
            request.audience = if is_hidden { Audience::Audit } else { Audience::Agent };
            let id = db.exports.create_one(&asked(request, t0() + minutes(n))).await.unwrap();
            if !is_hidden {
                shown.insert(0, id);
            }
        }
        let page = db.exports.list(&acme(), &[Audience::Client, Audience::Agent], None, 3).await.unwrap();
        assert_eq!(page.iter().map(|export| export.id).collect::<Vec<_>>(), shown);
    }

    async fn a_file_expires_at_its_time_and_its_waiting_mails_die(db) {
        let export = rendered(db, &[A, B]).await;
        let first = claim_mail(db, t0()).await.unwrap();
        end(db, &first, DeliveryOutcome::Sent { at: t0() }, t0()).await;
        assert_eq!(db.exports.old_files(t0() + days(7) - MICRO, 10).await.unwrap(), []);
        let old = db.exports.old_files(t0() + days(7), 10).await.unwrap();
        assert_eq!((old.len(), old[0].name.as_str()), (1, "timeline ü.csv"));
        assert_eq!(find(db, export.id).await.file_name.as_deref(), Some("timeline ü.csv"), "until it is gone");
        db.exports.expire(&old).await.unwrap();
        assert_eq!(db.exports.old_files(t0() + days(8), 10).await.unwrap(), []);
        let expired = find(db, export.id).await;
        assert_eq!((expired.state, expired.file_name), (ExportState::Expired, None));
        let mut states: Vec<DeliveryState> = expired.deliveries.iter().map(|mail| mail.state).collect();
        states.sort();
        assert_eq!(states, [DeliveryState::Sent, DeliveryState::Dead]);
        assert_eq!(claim_mail(db, t0() + days(8)).await, None);
    }

    async fn files_expire_in_limited_steps(db) {
        for _ in 0..5 {
            rendered(db, &[]).await;
        }
        let later = t0() + days(8);
        for expected in [3, 2] {
            let old = db.exports.old_files(later, 3).await.unwrap();
            assert_eq!(old.len(), expected);
            db.exports.expire(&old).await.unwrap();
        }
        assert_eq!(db.count("exports where state = 'expired'").await, 5);
    }

    async fn an_export_holds_what_its_audience_sees_and_has_not_expired(db) {
        db.given(&acme(), [
            event().id(id(1)).recorded(),
            event().id(id(2)).visible_to_client(true).recorded(),
            event().id(id(3)).visible_to_client(true).visible_to_agent(false).recorded(),
            event().id(id(4)).visible_to_client(true).expires_at(t0() + hours(1)).recorded(),
            event_of(contact(2)).id(id(5)).visible_to_client(true).recorded(),
        ]).await;
        db.given(&globex(), [event().id(id(2)).visible_to_client(true).record(&globex(), t0()).unwrap()]).await;
        let of = async |audience| create(db, ExportRequest { audience, ..request(&[]) }).await;
        let (client, agent, audit) = (of(Audience::Client).await, of(Audience::Agent).await, of(Audience::Audit).await);
        let edge = t0() + hours(1);
        assert_eq!(row_ids(db, &client, edge - MICRO).await, [2, 3, 4].map(id));
        assert_eq!(row_ids(db, &client, edge).await, [2, 3].map(id));
        assert_eq!(row_ids(db, &agent, edge).await, [1, 2].map(id));
        assert_eq!(row_ids(db, &audit, edge).await, [1, 2, 3].map(id));
    }

    async fn an_export_holds_its_period_and_its_categories(db) {
        let (from, to) = (t0() - hours(2), t0() - hours(1));
        let at = |number, category, time| event_about("a", category).id(id(number)).visible_to_client(true).occurred_at(time).recorded();
        db.given(&acme(), [
            at(1, Category::Note, from - MICRO), at(2, Category::Note, from), at(3, Category::Tag, from + MICRO),
            at(4, Category::Session, to - MICRO), at(5, Category::Note, to),
        ]).await;
        let of = async |since, until, categories| create(db, ExportRequest { since, until, categories, ..request(&[]) }).await;
        let all = of(None, None, vec![]).await;
        assert_eq!(row_ids(db, &all, t0()).await, [1, 2, 3, 4, 5].map(id));
        let period = of(Some(from), Some(to), vec![]).await;
        assert_eq!(row_ids(db, &period, t0()).await, [2, 3, 4].map(id));
        let some = of(Some(from), None, vec![Category::Session, Category::Note]).await;
        assert_eq!(row_ids(db, &some, t0()).await, [2, 4, 5].map(id));
        let none = of(Some(to), Some(from), vec![]).await;
        assert_eq!(row_ids(db, &none, t0()).await, []);
    }

    async fn an_export_holds_nothing_that_was_recorded_after_it_was_asked_for(db) {
        let visible = |number| event().id(id(number)).visible_to_client(true).recorded();
        let before = create(db, request(&[])).await;
        db.given(&acme(), (1..=3).map(visible)).await;
        let export = create(db, request(&[])).await;
        db.given(&acme(), (4..=6).map(visible)).await;
        assert_eq!(row_ids(db, &before, t0()).await, []);
        assert_eq!(row_ids(db, &export, t0()).await, [1, 2, 3].map(id));
        db.events.delete(&acme(), id(2), &subject("s"), t0()).await.unwrap();
        assert_eq!(row_ids(db, &export, t0()).await, [1, 3].map(id));
    }

    async fn an_export_asked_for_when_the_newest_event_is_gone_holds_nothing_later(db) {
        let visible = |number| event().id(id(number)).visible_to_client(true).recorded();
        db.given(&acme(), [visible(1), visible(2)]).await;
        db.events.delete(&acme(), id(2), &subject("s"), t0()).await.unwrap();
        let export = create(db, request(&[])).await;
        db.given(&acme(), [visible(3)]).await;
        assert_eq!(row_ids(db, &export, t0()).await, [id(1)]);
    }

    async fn the_rows_of_an_export_are_read_in_pages_through_ties(db) {
        let given = (1..=40_u64).map(|n| {
            event().id(id((n * 7) % 41)).visible_to_client(true).occurred_at(t0() - minutes(i64::try_from(n % 5).unwrap())).recorded()
        });
        db.given(&acme(), given).await;
        let since = Some(t0() - minutes(3));
        let export = create(db, ExportRequest { since, ..request(&[]) }).await;
        let expected = row_ids(db, &export, t0()).await;
        assert_eq!(expected.len(), 32);
        for limit in [1, 6, 32] {
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let slice = db.exports.rows(&export, after, t0(), limit).await.unwrap();
                assert!(slice.events.is_sorted_by_key(|event| (event.occurred_at, event.id)));
                found.extend(slice.events.iter().map(|event| event.id));
                after = slice.next;
                if after.is_none() {
                    break;
                }
            }
            assert_eq!(found, expected, "limit {limit}");
        }
    }

    async fn the_active_contacts_of_a_tenant_are_named_in_order_in_pages(db) {
        let since = t0() - hours(1);
        let at = |number, category, time| {
            timelined::domain::NewContactEvent::new(contact(number), "a".parse().unwrap(), category, timelined::domain::Source::System)
                .occurred_at(time).recorded()
        };
        let mut given: Vec<_> = (1..=9).map(|n| at(n, Category::Note, since)).collect();
        given.extend((1..=9).map(|n| at(n, Category::Note, t0())));
        given.extend([at(10, Category::Note, since - MICRO), at(11, Category::Tag, since), at(11, Category::Note, since - MICRO)]);
        db.given(&acme(), given).await;
        db.given(&globex(), [event_of(contact(12)).record(&globex(), t0()).unwrap()]).await;
        let active = async |category, after, limit| {
            db.exports.active_contacts(&acme(), since, category, after, limit).await.unwrap()
        };
        let everyone: Vec<ContactId> = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11].map(contact).to_vec();
        assert_eq!(active(None, None, 100).await, everyone);
        assert_eq!(active(Some(Category::Tag), None, 100).await, [contact(11)]);
        assert_eq!(active(Some(Category::Note), None, 100).await, everyone[..9]);
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = active(None, after, 3).await;
            let Some(last) = page.last() else { break };
            after = Some(*last);
            found.extend(page);
        }
        assert_eq!(found, everyone);
    }

    async fn a_cancelled_export_ends_with_its_mails_file_and_links_and_says_who_did_it(db) {
        let export = rendered(db, &[A, B]).await;
        let first = claim_mail(db, t0()).await.unwrap();
        db.exports.add_link(&first, "aa", t0()).await.unwrap();
        db.exports.add_link(&first, "aa", t0() + minutes(1)).await.unwrap();
        assert_eq!(db.exports.linked("aa", t0()).await.unwrap().unwrap().id, export.id);
        let cancel = async || db.exports.cancel(&acme(), export.id, &subject("ana"), t0()).await.unwrap();
        assert!(cancel().await);
        assert!(!cancel().await, "it has ended");
        let now = find(db, export.id).await;
        assert_eq!((now.state, now.finished_at), (ExportState::Cancelled, Some(t0())));
        let states: Vec<_> = now.deliveries.iter().map(|mail| mail.state).collect();
        assert_eq!(states, [DeliveryState::Sending, DeliveryState::Dead]);
        assert_eq!(now.links.len(), 1);
        assert_eq!((now.links[0].created_at, now.links[0].revoked_at), (t0(), Some(t0())));
        assert!(db.exports.linked("aa", t0()).await.unwrap().is_none());
        let by: Vec<_> = now.actions.iter().map(|done| (done.action, done.by.as_str(), done.at)).collect();
        assert_eq!(by, [(timelined::storage::ExportDeed::Cancelled, "ana", t0())]);
        // What was under way when it was cancelled ends as it does, and changes nothing.
        end(db, &first, DeliveryOutcome::Sent { at: t0() }, t0()).await;
        assert_eq!(find(db, export.id).await.state, ExportState::Cancelled);
        let old = db.exports.old_files(t0(), 10).await.unwrap();
        assert_eq!(old.len(), 1, "the file is to go now");
        db.exports.expire(&old).await.unwrap();
        let now = find(db, export.id).await;
        assert_eq!((now.state, now.file_name), (ExportState::Cancelled, None));
        assert!(!db.exports.discard(&globex(), export.id, &subject("ana"), t0()).await.unwrap());
    }

    async fn a_cancelled_export_is_not_rendered_and_its_worker_loses_it(db) {
        let waiting = create(db, request(&[A])).await;
        assert!(db.exports.cancel(&acme(), waiting.id, &subject("ana"), t0()).await.unwrap());
        let running = create(db, request(&[])).await;
        let claimed = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
        assert_eq!(claimed.id, running.id, "the cancelled one is passed over");
        assert!(!db.exports.discard(&acme(), running.id, &subject("ana"), t0()).await.unwrap());
        assert!(db.exports.cancel(&acme(), running.id, &subject("ana"), t0()).await.unwrap());
        assert!(!db.exports.progress(&claimed, worker(1), 1, 2, t0() + minutes(2)).await.unwrap());
        assert!(!db.exports.rendered(&claimed, worker(1), &file(t0())).await.unwrap());
    }

    async fn a_link_ends_with_its_file_is_counted_and_goes_with_the_export(db) {
        let export = rendered(db, &[A]).await;
        let mail = claim_mail(db, t0()).await.unwrap();
        db.exports.add_link(&mail, "aa", t0()).await.unwrap();
        let leads = async |now| db.exports.linked("aa", now).await.unwrap().is_some();
        assert!(leads(t0() + days(7) - MICRO).await);
        assert!(!leads(t0() + days(7)).await);
        assert!(db.exports.linked("ab", t0()).await.unwrap().is_none());
        db.exports.downloaded(&acme(), export.id, Some("aa"), t0()).await.unwrap();
        db.exports.downloaded(&acme(), export.id, None, t0() + minutes(1)).await.unwrap();
        let now = find(db, export.id).await;
        assert_eq!((now.downloads, now.last_download_at), (2, Some(t0() + minutes(1))));
        assert_eq!((now.links[0].downloads, now.links[0].last_download_at), (1, Some(t0())));
        end(db, &mail, DeliveryOutcome::Sent { at: t0() }, t0()).await;
        assert!(db.exports.discard(&acme(), export.id, &subject("ana"), t0() + minutes(2)).await.unwrap());
        assert!(!leads(t0()).await, "revoked");
        // A mail that was still under way when the file was taken away gets none.
        db.exports.add_link(&mail, "ab", t0() + minutes(2)).await.unwrap();
        assert!(db.exports.linked("ab", t0()).await.unwrap().is_none());
    }

    async fn mails_that_go_anew_stand_behind_the_others_and_bring_a_failed_export_back(db) {
        let export = rendered(db, &[A]).await;
        let mail = |to: &str, id: &str| timelined::storage::NewMail { to: to.to_owned(), message_id: id.to_owned() };
        let again = [mail(A, "again.1"), mail(B, "again.2")];
        let resend = async |now| db.exports.resend(&acme(), export.id, &again, &subject("ana"), now).await.unwrap();
        assert!(!resend(t0()).await, "its first mail is still to go");
        let first = claim_mail(db, t0()).await.unwrap();
        end(db, &first, dead(), t0()).await;
        assert_eq!(find(db, export.id).await.state, ExportState::Failed);
        assert!(!resend(t0() + days(7)).await, "the file has expired");
        assert!(resend(t0()).await);
        let now = find(db, export.id).await;
        assert_eq!((now.state, now.finished_at, now.error), (ExportState::Running, None, None));
        assert_eq!(now.request.to, [A, B]);
        let ids: Vec<_> = now.deliveries.iter().map(|mail| mail.message_id.clone()).collect();
        assert_eq!(ids, [first.delivery.message_id.as_str(), "again.1", "again.2"]);
        for _ in 0..2 {
            let claimed = claim_mail(db, t0()).await.unwrap();
            end(db, &claimed, DeliveryOutcome::Sent { at: t0() }, t0()).await;
        }
        let now = find(db, export.id).await;
        assert_eq!(now.state, ExportState::Done);
        let states: Vec<_> = now.deliveries.iter().map(|mail| mail.state).collect();
        assert_eq!(states, [DeliveryState::Dead, DeliveryState::Sent, DeliveryState::Sent]);
    }

    async fn the_next_export_begins_where_the_last_one_that_arrived_has_ended(db) {
        let ordered = async |number, until, by: &str| {
            let mut new = asked(ExportRequest { contact_id: contact(number), until: Some(until), ..request(&[A]) }, t0());
            new.requested_by = subject(by);
            db.exports.create_one(&new).await.unwrap();
            let claimed = db.exports.claim_render(worker(1), t0(), t0() + minutes(1)).await.unwrap().unwrap();
            assert!(db.exports.rendered(&claimed, worker(1), &file(t0())).await.unwrap());
            claim_mail(db, t0()).await.unwrap()
        };
        let sent = || DeliveryOutcome::Sent { at: t0() };
        for (number, until, by, outcome) in [
            (1, t0() - days(2), "job weekly", sent()),
            (1, t0() - days(1), "job weekly", sent()),
            (1, t0(), "job daily", sent()),
            (2, t0(), "job weekly", dead()),
            (3, t0(), "job weekly", again(DeliveryState::Deferred, t0() + hours(1))),
        ] {
            let claimed = ordered(number, until, by).await;
            end(db, &claimed, outcome, t0()).await;
        }
        let contacts = [1, 2, 3, 4].map(contact);
        let ends = async || db.exports.last_ends(&acme(), &subject("job weekly"), &contacts).await.unwrap();
        assert_eq!(ends().await, std::collections::HashMap::from([(contact(1), t0() - days(1))]));
        let old = db.exports.old_files(t0() + days(7), 10).await.unwrap();
        assert_eq!(old.len(), 5);
        db.exports.expire(&old).await.unwrap();
        assert_eq!(ends().await, std::collections::HashMap::from([(contact(1), t0() - days(1))]), "expired is not failed");
        let foreign = db.exports.last_ends(&globex(), &subject("job weekly"), &contacts).await.unwrap();
        assert_eq!(foreign, std::collections::HashMap::new());
    }

    async fn news_are_what_the_audience_sees_within_the_contacts_own_period(db) {
        let event = |number, at| event_of(contact(number)).occurred_at(at);
        let (since, until) = (t0() - hours(2), t0() - hours(1));
        db.given(&acme(), [
            event(1, since).visible_to_client(true).recorded(),
            event(2, until).visible_to_client(true).recorded(),
            event(2, since - MICRO).visible_to_client(true).recorded(),
            event(3, since).recorded(),
            event(4, since).visible_to_client(true).expires_at(t0() + minutes(1)).recorded(),
            event(5, since).visible_to_client(true).recorded(),
        ]).await;
        let mut contacts: Vec<_> = [5, 4, 3, 2, 1, 6].map(|number| (contact(number), since)).to_vec();
        contacts[0].1 = since + MICRO;
        let news = async |audience, now| {
            db.exports.with_news(&acme(), audience, &contacts, until, now).await.unwrap()
        };
        assert_eq!(news(Audience::Client, t0()).await, [contact(4), contact(1)]);
        assert_eq!(news(Audience::Client, t0() + minutes(1)).await, [contact(1)]);
        assert_eq!(news(Audience::Agent, t0()).await, [contact(4), contact(3), contact(1)]);
        let foreign = db.exports.with_news(&globex(), Audience::Agent, &contacts, until, t0()).await.unwrap();
        assert_eq!(foreign, []);
    }
}
