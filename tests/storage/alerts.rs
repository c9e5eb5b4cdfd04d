//! The troubles of the jobs: every daemon adds to them, and one tells of each.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use timelined::storage::{AlertKind, AlertMail, Failures, JobAlert, MailEnd, Success};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::builders::*;
use crate::support::database::Database;

const JOB: &str = "purge-expired";

fn jobs() -> Vec<String> {
    vec![JOB.to_owned()]
}

async fn watched(db: &Database) {
    db.alerts.watch(&jobs(), t0()).await.unwrap();
}

async fn alert(db: &Database, kind: AlertKind) -> JobAlert {
    let found = db.alerts.alerts(&jobs()).await.unwrap();
    assert_eq!(found.len(), 2);
    found.into_iter().find(|alert| alert.kind == kind).unwrap()
}

async fn fail(db: &Database, count: u64, first_at: DateTime<Utc>) -> JobAlert {
    let failures = Failures {
        job: JOB.to_owned(),
        count,
        first_at,
        error: format!("{count} more"),
    };
    db.alerts.note_failures(&[failures]).await.unwrap();
    alert(db, AlertKind::Failure).await
}

async fn succeed(db: &Database, at: DateTime<Utc>) {
    db.alerts
        .note_successes(&[success(JOB, at, true)])
        .await
        .unwrap();
}

fn success(job: &str, at: DateTime<Utc>, ends_failures: bool) -> Success {
    Success {
        job: job.to_owned(),
        at,
        ends_failures,
    }
}

/// Claims as worker 1 for five minutes.
async fn claim(
    db: &Database,
    seen: &JobAlert,
    mail: AlertMail,
    now: DateTime<Utc>,
) -> Option<JobAlert> {
    let until = now + minutes(5);
    let claimed = db.alerts.claim_mail(seen, mail, worker(1), now, until);
    claimed.await.unwrap()
}

async fn end(db: &Database, kind: AlertKind, daemon: u64, end: MailEnd) -> bool {
    let ended = db.alerts.mail_ended(JOB, kind, worker(daemon), &end);
    ended.await.unwrap()
}

on_both_engines! {
    async fn a_job_is_watched_from_the_first_time_on_and_in_both_ways(db) {
        watched(db).await;
        db.alerts.watch(&jobs(), t0() + hours(1)).await.unwrap();
        db.alerts.watch(&[], t0()).await.unwrap();
        for kind in [AlertKind::Failure, AlertKind::Silence] {
            let alert = alert(db, kind).await;
            assert_eq!(alert, JobAlert {
                job: JOB.to_owned(),
                kind,
                since: t0(),
                count: 0,
                error: None,
                last_success: None,
                mails: 0,
                mailed_at: None,
                mailing: None,
                attempts: 0,
                reached: Vec::new(),
                claimed_until: None,
                waits_for_operator: false,
            });
        }
        assert_eq!(db.alerts.alerts(&["other".to_owned()]).await.unwrap(), []);
    }

    async fn a_purge_that_is_held_back_waits_for_an_operator_until_it_is_confirmed(db) {
        watched(db).await;
        let waits = async || {
            let found = db.alerts.alerts(&jobs()).await.unwrap();
            found.iter().map(|alert| (alert.kind, alert.waits_for_operator)).collect::<Vec<_>>()
        };
        let nobody = [(AlertKind::Failure, false), (AlertKind::Silence, false)];
        db.retention.hold_back("another", 20_000, 9, t0()).await.unwrap();
        assert_eq!(waits().await, nobody);
        db.retention.hold_back(JOB, 20_000, 9, t0()).await.unwrap();
        assert_eq!(waits().await, [(AlertKind::Failure, true), (AlertKind::Silence, false)]);
        // Also in what a claim answers.
        let failing = fail(db, 1, t0()).await;
        let claimed = claim(db, &failing, AlertMail::Alert, t0()).await;
        assert!(claimed.unwrap().waits_for_operator);
        db.retention.confirm(JOB, &subject("ana"), t0()).await.unwrap();
        assert_eq!(waits().await, nobody);
    }

    async fn failures_add_up_until_a_success_and_then_begin_anew(db) {
        watched(db).await;
        let first = fail(db, 1, t0() + minutes(1)).await;
        assert_eq!((first.failures(), first.since), (1, t0() + minutes(1)));
        let third = fail(db, 2, t0() + minutes(2)).await;
        assert_eq!((third.failures(), third.since), (3, t0() + minutes(1)));
        assert_eq!(third.error.as_deref(), Some("2 more"));

        succeed(db, t0() + minutes(3)).await;
        let over = alert(db, AlertKind::Failure).await;
        // How many there were stays known, for the mail that says that they are over.
        assert_eq!((over.failures(), over.count), (0, 3));
        assert_eq!(over.last_success, Some(t0() + minutes(3)));

        let anew = fail(db, 1, t0() + minutes(4)).await;
        assert_eq!((anew.failures(), anew.since), (1, t0() + minutes(4)));
    }

    async fn what_several_jobs_did_is_noted_at_once_and_each_gets_its_own(db) {
        let jobs: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
        db.alerts.watch(&jobs, t0()).await.unwrap();
        let failures = |job: &str, count| Failures {
            job: job.to_owned(),
            count,
            first_at: t0() + minutes(1),
            error: format!("\"{job}\" failed"),
        };
        // One that is not watched does no harm.
        let failed = [failures("a", 1), failures("b", 2), failures("x", 9)];
        db.alerts.note_failures(&failed).await.unwrap();
        let succeeded = [
            success("a", t0() + minutes(2), true),
            success("b", t0() + minutes(2), false),
            success("c", t0() + minutes(3), true),
        ];
        db.alerts.note_successes(&succeeded).await.unwrap();
        let found = db.alerts.alerts(&jobs).await.unwrap();
        let failing: Vec<_> = found
            .iter()
            .filter(|alert| alert.kind == AlertKind::Failure)
            .map(|alert| (alert.job.as_str(), alert.failures(), alert.error.as_deref()))
            .collect();
        assert_eq!(failing, [("a", 0, Some("\"a\" failed")), ("b", 2, Some("\"b\" failed")), ("c", 0, None)]);
        let silent: Vec<_> = found
            .iter()
            .filter(|alert| alert.kind == AlertKind::Silence)
            .map(|alert| alert.since - t0())
            .collect();
        assert_eq!(silent, [minutes(2), minutes(2), minutes(3)]);
        db.alerts.note_successes(&[]).await.unwrap();
        db.alerts.note_failures(&[]).await.unwrap();
    }

    async fn daemons_that_note_the_same_jobs_at_once_lose_nothing(db) {
        let jobs: Vec<String> = (0..50).map(|number| format!("job-{number}")).collect();
        db.alerts.watch(&jobs, t0()).await.unwrap();
        let (barrier, mut daemons) = (Arc::new(Barrier::new(8)), JoinSet::new());
        for number in 0..8 {
            let (alerts, barrier, mut jobs) = (db.alerts.clone(), barrier.clone(), jobs.clone());
            if number % 2 == 0 {
                jobs.reverse();
            }
            daemons.spawn(async move {
                barrier.wait().await;
                for minute in 1..=5 {
                    let at = t0() + minutes(minute);
                    let failed = |job: &String| Failures { job: job.clone(), count: 1, first_at: at, error: String::new() };
                    let failed: Vec<_> = jobs.iter().map(failed).collect();
                    alerts.note_failures(&failed).await.unwrap();
                    let succeeded: Vec<_> = jobs.iter().map(|job| success(job, at, false)).collect();
                    alerts.note_successes(&succeeded).await.unwrap();
                }
            });
        }
        daemons.join_all().await;
        for alert in db.alerts.alerts(&jobs).await.unwrap() {
            match alert.kind {
                AlertKind::Failure => assert_eq!(alert.failures(), 40, "{alert:?}"),
                AlertKind::Silence => assert_eq!(alert.since, t0() + minutes(5), "{alert:?}"),
            }
        }
    }

    async fn a_success_that_is_told_late_undoes_nothing(db) {
        watched(db).await;
        succeed(db, t0() + minutes(5)).await;
        fail(db, 2, t0() + minutes(6)).await;
        succeed(db, t0() + minutes(4)).await;
        let failing = alert(db, AlertKind::Failure).await;
        assert_eq!((failing.failures(), failing.last_success), (2, Some(t0() + minutes(5))));
        let silent = alert(db, AlertKind::Silence).await;
        assert_eq!(silent.since, t0() + minutes(5));
    }

    async fn a_success_of_one_daemon_alone_is_a_sign_of_life_and_ends_no_failures(db) {
        watched(db).await;
        fail(db, 3, t0() + minutes(1)).await;
        db.alerts.note_successes(&[success(JOB, t0() + minutes(2), false)]).await.unwrap();
        assert_eq!(alert(db, AlertKind::Failure).await.failures(), 3);
        let silent = alert(db, AlertKind::Silence).await;
        assert_eq!((silent.since, silent.last_success), (t0() + minutes(2), Some(t0() + minutes(2))));
    }

    async fn a_paused_job_is_excused_unless_its_silence_was_mailed(db) {
        watched(db).await;
        db.alerts.excuse(&jobs(), t0() + hours(1)).await.unwrap();
        let excused = alert(db, AlertKind::Silence).await;
        assert_eq!((excused.since, excused.last_success), (t0() + hours(1), None));
        assert_eq!(alert(db, AlertKind::Failure).await.since, t0());
        // A clock that is behind takes nothing back.
        db.alerts.excuse(&jobs(), t0()).await.unwrap();
        succeed(db, t0() + minutes(30)).await;
        let excused = alert(db, AlertKind::Silence).await;
        assert_eq!((excused.since, excused.last_success), (t0() + hours(1), Some(t0() + minutes(30))));

        claim(db, &excused, AlertMail::Alert, t0() + hours(2)).await.unwrap();
        assert!(end(db, AlertKind::Silence, 1, MailEnd::Told { at: t0() + hours(2) }).await);
        db.alerts.excuse(&jobs(), t0() + hours(3)).await.unwrap();
        assert_eq!(alert(db, AlertKind::Silence).await.since, t0() + hours(1));
    }

    async fn of_many_who_claim_one_mail_one_gets_it(db) {
        watched(db).await;
        let seen = fail(db, 3, t0()).await;
        let (barrier, mut claims) = (Arc::new(Barrier::new(8)), JoinSet::new());
        for number in 1..=8 {
            let (alerts, barrier, seen) = (db.alerts.clone(), barrier.clone(), seen.clone());
            claims.spawn(async move {
                barrier.wait().await;
                let claimed = alerts.claim_mail(&seen, AlertMail::Alert, worker(number), t0(), t0() + minutes(5));
                claimed.await.unwrap().map(|_claimed| number)
            });
        }
        let won: Vec<u64> = claims.join_all().await.into_iter().flatten().collect();
        let [winner] = won[..] else { panic!("{won:?}") };

        // What the others believe to have counts for nothing.
        let told = MailEnd::Told { at: t0() + minutes(1) };
        assert!(!end(db, AlertKind::Failure, winner % 8 + 1, told.clone()).await);
        assert!(end(db, AlertKind::Failure, winner, told.clone()).await);
        assert!(!end(db, AlertKind::Failure, winner, told).await);
        let alert = alert(db, AlertKind::Failure).await;
        assert_eq!((alert.mails, alert.mailed_at, alert.attempts), (1, Some(t0() + minutes(1)), 0));
        // Who saw it before that has not seen that it is done.
        assert_eq!(claim(db, &seen, AlertMail::Alert, t0() + hours(1)).await, None);
        assert!(claim(db, &alert, AlertMail::Alert, t0() + hours(1)).await.is_some());
    }

    async fn the_claim_of_a_dead_daemon_lapses(db) {
        watched(db).await;
        let seen = fail(db, 3, t0()).await;
        claim(db, &seen, AlertMail::Alert, t0()).await.unwrap();
        assert_eq!(claim(db, &seen, AlertMail::Alert, t0() + minutes(5) - MICRO).await, None);
        let claimed = db.alerts
            .claim_mail(&seen, AlertMail::Alert, worker(2), t0() + minutes(5), t0() + minutes(10))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(claimed.attempts, 2);
        assert!(!end(db, AlertKind::Failure, 1, MailEnd::Forgotten).await);
        assert!(end(db, AlertKind::Failure, 2, MailEnd::Forgotten).await);
    }

    async fn a_mail_that_did_not_reach_all_waits_and_remembers_whom_it_reached(db) {
        watched(db).await;
        let seen = fail(db, 3, t0()).await;
        claim(db, &seen, AlertMail::Alert, t0()).await.unwrap();
        let reached = vec!["ops@example.com".to_owned()];
        let again = MailEnd::Again { at: t0() + minutes(1), reached: reached.clone() };
        assert!(end(db, AlertKind::Failure, 1, again).await);
        let waiting = alert(db, AlertKind::Failure).await;
        assert!(waiting.is_told());
        assert_eq!(waiting.claimed_until, Some(t0() + minutes(1)));
        assert_eq!((waiting.mails, waiting.mailing), (0, Some(AlertMail::Alert)));

        assert_eq!(claim(db, &waiting, AlertMail::Alert, t0() + minutes(1) - MICRO).await, None);
        let claimed = claim(db, &waiting, AlertMail::Alert, t0() + minutes(1)).await.unwrap();
        assert_eq!((claimed.attempts, claimed.reached), (2, reached.clone()));
        let again = MailEnd::Again { at: t0() + hours(1), reached };
        assert!(end(db, AlertKind::Failure, 1, again).await);

        // Another mail does not wait for it, and reaches everybody anew.
        succeed(db, t0() + minutes(2)).await;
        let over = alert(db, AlertKind::Failure).await;
        let recovery = claim(db, &over, AlertMail::Recovery, t0() + minutes(2)).await.unwrap();
        assert_eq!((recovery.attempts, recovery.reached), (1, Vec::new()));
        assert!(end(db, AlertKind::Failure, 1, MailEnd::Forgotten).await);
        let forgotten = alert(db, AlertKind::Failure).await;
        assert!(!forgotten.is_told());
        assert_eq!((forgotten.mails, forgotten.mailed_at, forgotten.mailing), (0, None, None));
    }

    async fn what_changed_since_it_was_seen_is_not_claimed(db) {
        watched(db).await;
        let failing = fail(db, 3, t0()).await;
        let silent = alert(db, AlertKind::Silence).await;
        succeed(db, t0() + minutes(1)).await;
        for seen in [&failing, &silent] {
            assert_eq!(claim(db, seen, AlertMail::Alert, t0() + minutes(1)).await, None);
            assert!(!db.alerts.forget(seen, t0() + minutes(1)).await.unwrap());
        }
        // More of the same is no change.
        let failing = fail(db, 3, t0() + minutes(2)).await;
        fail(db, 1, t0() + minutes(3)).await;
        let claimed = claim(db, &failing, AlertMail::Alert, t0() + minutes(3)).await.unwrap();
        assert_eq!(claimed.failures(), 4);
    }

    async fn a_trouble_is_forgotten_unless_somebody_is_mailing_it(db) {
        watched(db).await;
        let seen = fail(db, 3, t0()).await;
        claim(db, &seen, AlertMail::Alert, t0()).await.unwrap();
        assert!(!db.alerts.forget(&seen, t0() + minutes(1)).await.unwrap());
        assert!(db.alerts.forget(&seen, t0() + minutes(5)).await.unwrap());
        assert!(!end(db, AlertKind::Failure, 1, MailEnd::Told { at: t0() }).await);
        let forgotten = alert(db, AlertKind::Failure).await;
        assert_eq!((forgotten.mails, forgotten.mailing, forgotten.attempts), (0, None, 0));
        assert_eq!(forgotten.failures(), 3);
    }
}
