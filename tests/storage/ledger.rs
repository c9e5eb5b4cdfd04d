//! The ledger of runs: a time is claimed once, a run ends once.

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use timelined::domain::RunId;
use timelined::storage::{Claim, Counts, Fence, Finish, LEASE, Run, RunState, SKIPPED, Trigger};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::builders::*;
use crate::support::database::{Database, Engine};

const JOB: &str = "purge-expired";

fn jobs(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn counts(deleted: u64) -> Counts {
    Counts::from([("deleted".to_owned(), deleted)])
}

fn finish(state: RunState, error: Option<&str>) -> Finish {
    Finish {
        state,
        attempt: 2,
        counts: counts(3),
        error: error.map(str::to_owned),
        at: t0() + hours(1),
    }
}

/// What the claimer of a scheduled time holds.
fn first(run: RunId) -> Fence {
    Fence { run, number: 1 }
}

/// An instant of the database's clock.
async fn now(db: &Database) -> DateTime<Utc> {
    db.ledger.now().await.unwrap()
}

async fn claim(
    db: &Database,
    job: &str,
    scheduled_at: DateTime<Utc>,
    trigger: Trigger,
) -> (RunId, Claim) {
    let now = now(db).await;
    let run = RunId::generate(now);
    (
        run,
        db.ledger
            .claim(run, job, scheduled_at, trigger, worker(1), now)
            .await
            .unwrap(),
    )
}

async fn run(db: &Database, job: &str, id: RunId) -> Run {
    let runs = db.ledger.runs(job, None, 1000).await.unwrap();
    runs.into_iter()
        .find(|run| run.id == id)
        .expect("the run is in the ledger")
}

fn skipped(id: RunId, scheduled_at: DateTime<Utc>) -> Run {
    Run {
        id,
        job: JOB.to_owned(),
        scheduled_at,
        started_at: None,
        finished_at: Some(t0() + hours(2)),
        trigger: Trigger::Schedule,
        attempt: 0,
        daemon: None,
        fence: 0,
        state: RunState::Skipped,
        counts: Counts::new(),
        error: Some("the previous run had not ended".to_owned()),
    }
}

on_both_engines! {
    async fn a_time_that_is_due_is_claimed_once(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, claimed) = claim(db, JOB, due, Trigger::Schedule).await;
        assert_eq!(claimed, Claim::Claimed);
        assert_eq!(claim(db, JOB, due, Trigger::Schedule).await.1, Claim::Taken);
        assert_eq!(claim(db, JOB, due, Trigger::CatchUp).await.1, Claim::Taken);
        assert_eq!(claim(db, "another", due, Trigger::Schedule).await.1, Claim::Claimed);
        let claimed = run(db, JOB, id).await;
        assert_eq!((claimed.scheduled_at, claimed.trigger, claimed.state), (due, Trigger::Schedule, RunState::Running));
        assert_eq!((claimed.attempt, claimed.daemon, claimed.finished_at), (1, Some(worker(1)), None));
        assert!(claimed.started_at.unwrap() >= due);
        assert_eq!((claimed.counts, claimed.error), (Counts::new(), None));
    }

    async fn a_claim_whose_answer_was_lost_is_still_the_claimers(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        let again = async || {
            let now = now(db).await;
            db.ledger.claim(id, JOB, due, Trigger::Schedule, worker(1), now).await.unwrap()
        };
        assert_eq!(again().await, Claim::Claimed);
        assert_eq!(claim(db, JOB, due, Trigger::Schedule).await.1, Claim::Taken);
        assert_eq!(db.count("job_runs").await, 1);
        db.ledger.finish(first(id), &finish(RunState::Succeeded, None)).await.unwrap();
        assert_eq!(again().await, Claim::Taken);
    }

    async fn a_job_has_one_run_at_work_in_the_whole_installation(db) {
        let due = now(db).await - TimeDelta::seconds(9);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        assert_eq!(claim(db, JOB, due + MICRO, Trigger::Schedule).await.1, Claim::Busy);
        db.ledger.enqueue(RunId::generate(t0()), JOB, &subject("ops"), t0()).await.unwrap();
        assert_eq!(db.ledger.claim_queued(&jobs(&[JOB]), worker(2), t0()).await.unwrap(), None);
        assert!(db.ledger.finish(first(id), &finish(RunState::Succeeded, None)).await.unwrap());
        assert_eq!(claim(db, JOB, due + MICRO, Trigger::Schedule).await.1, Claim::Claimed);
    }

    async fn what_a_daemon_is_at_work_on_is_told(db) {
        let due = now(db).await - TimeDelta::seconds(9);
        let (ended, _) = claim(db, JOB, due + MICRO, Trigger::Schedule).await;
        assert!(db.ledger.finish(first(ended), &finish(RunState::Succeeded, None)).await.unwrap());
        let (at_work, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.enqueue(RunId::generate(t0()), JOB, &subject("ops"), t0()).await.unwrap();
        let running = db.ledger.running(worker(1)).await.unwrap();
        assert_eq!(running, [run(db, JOB, at_work).await]);
        assert_eq!(db.ledger.running(worker(2)).await.unwrap(), []);
    }

    async fn a_time_is_not_skipped_before_it_is_due(db) {
        if db.engine == Engine::Sqlite {
            return; // The daemon's own clock judges.
        }
        let ahead = now(db).await + TimeDelta::seconds(60);
        db.ledger.record(&skipped(RunId::generate(t0()), ahead)).await.unwrap();
        assert_eq!(db.count("job_runs").await, 0);
    }

    async fn a_time_that_lies_ahead_is_not_due(db) {
        let ahead = now(db).await + TimeDelta::seconds(60);
        assert_eq!(claim(db, JOB, ahead, Trigger::Schedule).await.1, Claim::NotDue);
        assert_eq!(db.count("job_runs").await, 0);
    }

    async fn of_sixteen_concurrent_claims_one_gets_the_time(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let (ledger, barrier) = (db.ledger.clone(), barrier.clone());
            tasks.spawn(async move {
                let now = due + TimeDelta::seconds(1);
                barrier.wait().await;
                ledger.claim(RunId::generate(now), JOB, due, Trigger::Schedule, worker(n), now).await.unwrap()
            });
        }
        let claims = tasks.join_all().await;
        assert_eq!(claims.iter().filter(|claim| **claim == Claim::Claimed).count(), 1, "{claims:?}");
        assert_eq!(claims.iter().filter(|claim| **claim == Claim::Taken).count(), 15, "{claims:?}");
        assert_eq!(db.count("job_runs").await, 1);
    }

    async fn a_run_that_somebody_asked_for_is_taken_from_the_queue(db) {
        let id = RunId::generate(t0());
        db.ledger.enqueue(id, JOB, &subject("ops"), t0()).await.unwrap();
        let queued = run(db, JOB, id).await;
        assert_eq!((queued.state, queued.trigger, queued.attempt), (RunState::Queued, Trigger::Manual, 0));
        assert_eq!((queued.scheduled_at, queued.started_at, queued.daemon), (t0(), None, None));
        assert_eq!(db.texts("select requested_by from job_runs").await, [Some("ops".to_owned())]);

        assert_eq!(db.ledger.claim_queued(&jobs(&["another"]), worker(1), t0()).await.unwrap(), None);
        assert_eq!(db.ledger.claim_queued(&[], worker(1), t0()).await.unwrap(), None);
        let taken = db.ledger.claim_queued(&jobs(&["another", JOB]), worker(7), t0() + MICRO).await.unwrap().unwrap();
        assert_eq!((taken.id, taken.state, taken.attempt, taken.daemon), (id, RunState::Running, 1, Some(worker(7))));
        assert!(taken.started_at.is_some());
        assert_eq!(run(db, JOB, id).await, taken);
        assert_eq!(db.ledger.claim_queued(&jobs(&[JOB]), worker(1), t0()).await.unwrap(), None);
    }

    async fn the_oldest_queued_run_goes_first_and_two_of_one_instant_are_two(db) {
        let ids: Vec<RunId> = (0..4).map(|_| RunId::generate(t0())).collect();
        for id in [ids[2], ids[0], ids[3], ids[1]] {
            db.ledger.enqueue(id, JOB, &subject("ops"), t0()).await.unwrap();
        }
        for id in ids {
            let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(1), t0()).await.unwrap().unwrap();
            assert_eq!(taken.id, id);
            assert!(db.ledger.finish(taken.fence(), &finish(RunState::Succeeded, None)).await.unwrap());
        }
    }

    async fn of_sixteen_concurrent_takers_each_queued_run_goes_to_one(db) {
        let names = jobs(&["a", "b", "c", "d", "e"]);
        for job in &names {
            for _ in 0..2 {
                db.ledger.enqueue(RunId::generate(t0()), job, &subject("ops"), t0()).await.unwrap();
            }
        }
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let (ledger, barrier, names) = (db.ledger.clone(), barrier.clone(), names.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                ledger.claim_queued(&names, worker(n), t0()).await.unwrap().map(|run| run.job)
            });
        }
        let mut taken: Vec<String> = tasks.join_all().await.into_iter().flatten().collect();
        // A taker may find the one that it looked at gone and come back with nothing.
        while let Some(run) = db.ledger.claim_queued(&names, worker(1), t0()).await.unwrap() {
            taken.push(run.job);
        }
        taken.sort();
        assert_eq!(taken, names, "one of each job");
        assert_eq!(db.count("job_runs where state = 'running' and attempt = 1 and fence = 1").await, 5);
    }

    async fn a_run_ends_once(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.finish(first(id), &finish(RunState::Succeeded, None)).await.unwrap();
        let ended = run(db, JOB, id).await;
        assert_eq!((ended.state, &ended.counts, ended.finished_at), (RunState::Succeeded, &counts(3), Some(t0() + hours(1))));
        assert_eq!(ended.attempt, 2);
        assert!(!db.ledger.finish(first(id), &finish(RunState::Failed, Some("too late"))).await.unwrap());
        assert!(!db.ledger.begin_attempt(first(id), 9).await.unwrap());
        assert!(!db.ledger.give_back(first(id), &counts(9), 0).await.unwrap());
        assert_eq!(run(db, JOB, id).await, ended);
    }

    async fn every_way_to_end_is_kept_with_its_reason(db) {
        let due = now(db).await - TimeDelta::seconds(60);
        for (n, state) in (0..).zip([RunState::Failed, RunState::TimedOut, RunState::Cancelled]) {
            let (id, _) = claim(db, JOB, due + TimeDelta::seconds(n), Trigger::CatchUp).await;
            db.ledger.finish(first(id), &finish(state, Some("550 no such «user»"))).await.unwrap();
            let ended = run(db, JOB, id).await;
            assert_eq!((ended.state, ended.error.as_deref()), (state, Some("550 no such «user»")));
        }
    }

    async fn a_queued_run_is_not_finished(db) {
        let id = RunId::generate(t0());
        db.ledger.enqueue(id, JOB, &subject("ops"), t0()).await.unwrap();
        db.ledger.finish(first(id), &finish(RunState::Succeeded, None)).await.unwrap();
        assert_eq!(run(db, JOB, id).await.state, RunState::Queued);
    }

    async fn attempts_are_counted_while_a_run_runs(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.begin_attempt(first(id), 2).await.unwrap();
        assert_eq!(run(db, JOB, id).await.attempt, 2);
    }

    async fn a_run_that_is_given_back_spends_no_attempt_and_goes_on_elsewhere(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.begin_attempt(first(id), 3).await.unwrap();
        db.ledger.give_back(first(id), &counts(5), 2).await.unwrap();
        let given_back = run(db, JOB, id).await;
        assert_eq!((given_back.state, given_back.attempt, given_back.daemon), (RunState::Queued, 2, None));
        assert_eq!(given_back.counts, counts(5));
        // Its time stays claimed.
        assert_eq!(claim(db, JOB, due, Trigger::Schedule).await.1, Claim::Taken);
        let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(2), t0()).await.unwrap().unwrap();
        assert_eq!((taken.id, taken.attempt, taken.daemon), (id, 3, Some(worker(2))));
        assert_eq!((taken.started_at, taken.trigger), (given_back.started_at, Trigger::Schedule));
    }

    async fn a_run_is_recorded_whole_and_not_where_its_time_is_taken(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        let before = run(db, JOB, id).await;
        db.ledger.record(&skipped(RunId::generate(t0()), due)).await.unwrap();
        assert_eq!(db.ledger.runs(JOB, None, 10).await.unwrap(), [before]);

        let recorded = skipped(RunId::generate(t0()), t0());
        db.ledger.record(&recorded).await.unwrap();
        assert_eq!(run(db, JOB, recorded.id).await, recorded);
        assert_eq!(claim(db, JOB, t0(), Trigger::CatchUp).await.1, Claim::Taken);

        let full = Run {
            id: RunId::generate(t0()), job: "realtime-delivery".to_owned(), started_at: Some(t0() + MICRO),
            daemon: Some(worker(3)), state: RunState::Succeeded, counts: Counts::from([("sent".to_owned(), u64::MAX), ("a b".to_owned(), 0)]),
            error: None, attempt: 1, trigger: Trigger::CatchUp, ..skipped(RunId::generate(t0()), t0())
        };
        db.ledger.record(&full).await.unwrap();
        assert_eq!(run(db, "realtime-delivery", full.id).await, full);
    }

    async fn runs_are_listed_from_new_to_old_in_pages(db) {
        let mut ids = Vec::new();
        for n in 0..7 {
            let id = RunId::generate(t0() + minutes(n));
            db.ledger.record(&skipped(id, t0() - minutes(n))).await.unwrap();
            ids.push(id);
        }
        let another = Run { job: "another".to_owned(), ..skipped(RunId::generate(t0()), t0()) };
        db.ledger.record(&another).await.unwrap();
        ids.reverse();
        let (mut found, mut before) = (Vec::new(), None);
        loop {
            let page = db.ledger.runs(JOB, before, 3).await.unwrap();
            assert!(page.len() <= 3);
            let Some(last) = page.last() else { break };
            before = Some(last.id);
            found.extend(page.iter().map(|run| run.id));
        }
        assert_eq!(found, ids);
        assert_eq!(db.ledger.runs("unknown", None, 3).await.unwrap(), []);
    }

    async fn the_newest_run_of_each_job_is_found(db) {
        for (job, minute) in [("a", 1), ("b", 9), ("a", 2), ("c", 4), ("a", 3)] {
            let id = RunId::generate(t0() + minutes(minute));
            let run = Run { job: job.to_owned(), ..skipped(id, t0() + minutes(minute)) };
            db.ledger.record(&run).await.unwrap();
        }
        let mut last = db.ledger.last_runs(&jobs(&["a", "b", "unknown"])).await.unwrap();
        last.sort_by(|one, other| one.job.cmp(&other.job));
        let last: Vec<_> = last.iter().map(|run| (run.job.as_str(), run.scheduled_at)).collect();
        assert_eq!(last, [("a", t0() + minutes(3)), ("b", t0() + minutes(9))]);
        assert_eq!(db.ledger.last_runs(&[]).await.unwrap(), []);
    }

    async fn runs_that_ended_before_an_instant_are_deleted_oldest_first_and_the_newest_of_a_job_stays(db) {
        let mut ids = Vec::new();
        for n in 0..5 {
            let id = RunId::generate(t0() + minutes(n));
            let run = Run { finished_at: Some(t0() + minutes(n)), ..skipped(id, t0() + minutes(n)) };
            db.ledger.record(&run).await.unwrap();
            ids.push(id);
        }
        let left = async || {
            let runs = db.ledger.runs(JOB, None, 9).await.unwrap();
            runs.iter().rev().map(|run| run.id).collect::<Vec<_>>()
        };
        assert_eq!(db.ledger.prune(t0() + minutes(3), 2).await.unwrap(), 2);
        assert_eq!(left().await, ids[2..]);
        assert_eq!(db.ledger.prune(t0() + minutes(3), 9).await.unwrap(), 1, "strictly before");
        assert_eq!(left().await, ids[3..]);
        assert_eq!(db.ledger.prune(t0() + hours(9), 9).await.unwrap(), 1);
        assert_eq!(left().await, ids[4..]);
    }

    async fn what_a_daemon_left_running_is_recovered_into_the_queue(db) {
        let due = now(db).await - TimeDelta::seconds(9);
        let (ended, _) = claim(db, JOB, due + TimeDelta::seconds(1), Trigger::Schedule).await;
        assert!(db.ledger.finish(first(ended), &finish(RunState::Succeeded, None)).await.unwrap());
        let (left, _) = claim(db, JOB, due, Trigger::Schedule).await;
        if db.engine == Engine::Postgres {
            // Other daemons may be at work on it.
            assert_eq!(db.ledger.recover(t0()).await.unwrap(), 0);
            return;
        }
        assert_eq!(db.ledger.recover(t0()).await.unwrap(), 1);
        assert_eq!(db.ledger.recover(t0()).await.unwrap(), 0);
        let run = run(db, JOB, left).await;
        assert_eq!((run.state, run.daemon), (RunState::Queued, None));
        let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(2), t0()).await.unwrap().unwrap();
        assert_eq!(taken.id, left);
    }

    async fn whoever_lost_a_run_writes_nothing_for_it(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        assert!(db.ledger.give_back(first(id), &counts(1), 0).await.unwrap());
        let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(2), t0()).await.unwrap().unwrap();
        assert_eq!(taken.fence(), Fence { run: id, number: 2 });
        assert!(!db.ledger.begin_attempt(first(id), 9).await.unwrap());
        assert!(!db.ledger.give_back(first(id), &counts(9), 0).await.unwrap());
        assert!(!db.ledger.finish(first(id), &finish(RunState::Failed, None)).await.unwrap());
        assert_eq!(run(db, JOB, id).await, taken);
        assert!(db.ledger.begin_attempt(taken.fence(), 2).await.unwrap());
        assert!(db.ledger.finish(taken.fence(), &finish(RunState::Succeeded, None)).await.unwrap());
    }

    async fn a_renewal_answers_what_a_daemon_holds_and_who_wants_its_end(db) {
        let at = now(db).await;
        let due = at - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        let (other, _) = claim(db, "another", due, Trigger::Schedule).await;
        assert!(db.ledger.finish(first(other), &finish(RunState::Succeeded, None)).await.unwrap());
        let renewed = db.ledger.renew(worker(1), at).await.unwrap();
        assert_eq!(renewed.len(), 1);
        assert_eq!((renewed[0].fence, renewed[0].cancel_requested_by.as_deref()), (first(id), None));
        assert_eq!(db.ledger.renew(worker(2), at).await.unwrap(), []);
        assert_eq!(db.ledger.cancel(id, &subject("ana"), at).await.unwrap(), Some(RunState::Running));
        let renewed = db.ledger.renew(worker(1), at).await.unwrap();
        assert_eq!(renewed[0].cancel_requested_by.as_deref(), Some("ana"));
        assert_eq!(run(db, JOB, id).await.state, RunState::Running);
    }

    async fn a_run_whose_lease_is_over_is_taken_over_by_another_daemon_alone(db) {
        if db.engine == Engine::Sqlite {
            return; // One daemon holds the file.
        }
        let at = now(db).await;
        let names = jobs(&[JOB]);
        let (id, _) = claim(db, JOB, at - TimeDelta::seconds(1), Trigger::Schedule).await;
        assert_eq!(db.ledger.take_over(worker(2), at).await.unwrap(), []);
        let seen = db.ledger.glance(&names, worker(2), at).await.unwrap();
        let lease = seen.lapses_at.unwrap() - seen.now;
        assert!(lease > TimeDelta::zero() && lease <= TimeDelta::from_std(LEASE).unwrap(), "{lease}");
        assert!(!seen.is_queued);
        assert_eq!(db.ledger.glance(&names, worker(1), at).await.unwrap().lapses_at, None);

        db.execute("update job_runs set leased_until = clock_timestamp() - interval '1 millisecond'").await.unwrap();
        let seen = db.ledger.glance(&names, worker(2), at).await.unwrap();
        assert!(seen.lapses_at.unwrap() < seen.now);
        assert_eq!(db.ledger.take_over(worker(1), at).await.unwrap(), [], "its own");
        let taken = db.ledger.take_over(worker(2), at).await.unwrap();
        assert_eq!(taken.iter().map(|run| (run.id, run.state)).collect::<Vec<_>>(), [(id, RunState::Queued)]);
        let seen = db.ledger.glance(&names, worker(2), at).await.unwrap();
        assert_eq!((seen.is_queued, seen.lapses_at), (true, None));
        // The first wakes up before the second has begun.
        assert_eq!(db.ledger.renew(worker(1), at).await.unwrap(), []);
        assert!(!db.ledger.finish(first(id), &finish(RunState::Succeeded, None)).await.unwrap());
        let again = db.ledger.claim_queued(&names, worker(2), at).await.unwrap().unwrap();
        assert_eq!((again.id, again.fence, again.attempt), (id, 2, 2));
    }

    async fn a_run_that_was_to_be_cancelled_when_its_daemon_died_is_cancelled(db) {
        let at = now(db).await;
        let (id, _) = claim(db, JOB, at - TimeDelta::seconds(1), Trigger::Schedule).await;
        db.ledger.cancel(id, &subject("ana"), at).await.unwrap();
        match db.engine {
            Engine::Sqlite => assert_eq!(db.ledger.recover(at).await.unwrap(), 1),
            Engine::Postgres => {
                db.execute("update job_runs set leased_until = clock_timestamp() - interval '1 millisecond'").await.unwrap();
                assert_eq!(db.ledger.take_over(worker(2), at).await.unwrap().len(), 1);
            }
        }
        let ended = run(db, JOB, id).await;
        assert_eq!((ended.state, ended.error.as_deref()), (RunState::Cancelled, Some("cancelled by ana")));
        assert!(ended.finished_at.is_some());
    }

    async fn of_the_times_that_queue_the_newest_waits_and_the_others_are_skipped(db) {
        let at = now(db).await;
        let times: Vec<_> = (1..=4).rev().map(|n| at - TimeDelta::seconds(n)).collect();
        let (id, _) = claim(db, JOB, times[0], Trigger::Schedule).await;
        let queue = async |time: DateTime<Utc>| {
            let id = RunId::generate(at);
            (id, db.ledger.queue(id, JOB, time, at).await.unwrap())
        };
        assert_eq!(queue(times[0]).await.1, Claim::Taken);
        let (second, queued) = queue(times[1]).await;
        assert_eq!(queued, Claim::Claimed);
        assert_eq!(db.ledger.queue(second, JOB, times[1], at).await.unwrap(), Claim::Claimed, "again");
        let (fourth, queued) = queue(times[3]).await;
        assert_eq!(queued, Claim::Claimed);
        assert_eq!(queue(times[2]).await.1, Claim::Taken, "older than the one that waits");
        assert_eq!(queue(at + TimeDelta::seconds(60)).await.1, Claim::NotDue);
        let skipped = run(db, JOB, second).await;
        assert_eq!((skipped.state, skipped.error.as_deref()), (RunState::Skipped, Some("a later time took its place in the queue")));
        assert!(db.ledger.finish(first(id), &finish(RunState::Succeeded, None)).await.unwrap());
        let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(1), at).await.unwrap().unwrap();
        assert_eq!((taken.id, taken.trigger), (fourth, Trigger::Schedule));
    }

    async fn a_paused_job_runs_only_what_somebody_asks_for(db) {
        let at = now(db).await;
        let due = at - TimeDelta::seconds(1);
        assert!(db.ledger.pause(JOB, &subject("ana"), at).await.unwrap());
        assert!(!db.ledger.pause(JOB, &subject("bob"), at).await.unwrap(), "it is paused");
        let pauses = db.ledger.pauses().await.unwrap();
        assert_eq!(pauses.iter().map(|pause| (pause.job.as_str(), pause.by.as_str())).collect::<Vec<_>>(), [(JOB, "ana")]);
        assert_eq!(db.ledger.glance(&jobs(&[JOB]), worker(1), at).await.unwrap().paused, [JOB]);
        assert_eq!(claim(db, JOB, due, Trigger::Schedule).await.1, Claim::Paused);
        assert_eq!(claim(db, "another", due, Trigger::Schedule).await.1, Claim::Claimed);
        assert_eq!(db.ledger.queue(RunId::generate(at), JOB, due, at).await.unwrap(), Claim::Claimed);
        assert_eq!(db.ledger.claim_queued(&jobs(&[JOB]), worker(1), at).await.unwrap(), None);
        let asked = RunId::generate(at);
        db.ledger.enqueue(asked, JOB, &subject("ana"), at).await.unwrap();
        let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(1), at).await.unwrap().unwrap();
        assert_eq!(taken.id, asked);
        assert!(db.ledger.finish(taken.fence(), &finish(RunState::Succeeded, None)).await.unwrap());
        let pause = db.ledger.resume(JOB, &subject("bob"), at).await.unwrap().unwrap();
        assert_eq!(pause.by, "ana");
        assert_eq!(db.ledger.resume(JOB, &subject("bob"), at).await.unwrap(), None);
        assert!(db.ledger.claim_queued(&jobs(&[JOB]), worker(1), at).await.unwrap().is_some());
        let actions = db.ledger.actions(JOB, 10).await.unwrap();
        let actions: Vec<_> = actions.iter().map(|did| (did.actor.as_str(), did.action.as_str(), did.run_id)).collect();
        assert_eq!(actions, [("bob", "resume", None), ("ana", "run", Some(asked)), ("ana", "pause", None)]);
        assert_eq!(db.ledger.actions("another", 10).await.unwrap(), []);
    }

    async fn a_queued_run_is_cancelled_at_once_and_a_failed_one_is_tried_again_on_its_row(db) {
        let at = now(db).await;
        let ana = subject("ana");
        assert_eq!(db.ledger.cancel(RunId::generate(at), &ana, at).await.unwrap(), None);
        assert_eq!(db.ledger.retry(RunId::generate(at), &ana, at).await.unwrap(), None);
        let id = RunId::generate(at);
        db.ledger.enqueue(id, JOB, &ana, at).await.unwrap();
        assert_eq!(db.ledger.retry(id, &ana, at).await.unwrap(), Some(RunState::Queued), "nothing to do");
        assert_eq!(db.ledger.cancel(id, &ana, at).await.unwrap(), Some(RunState::Queued));
        let ended = db.ledger.find_run(id).await.unwrap().unwrap();
        assert_eq!((ended.state, ended.error.as_deref()), (RunState::Cancelled, Some("cancelled by ana")));
        assert_eq!(db.ledger.cancel(id, &ana, at).await.unwrap(), Some(RunState::Cancelled));
        assert_eq!(db.ledger.claim_queued(&jobs(&[JOB]), worker(1), at).await.unwrap(), None);
        for (state, number) in [(RunState::Cancelled, 1), (RunState::Failed, 2), (RunState::TimedOut, 3)] {
            assert_eq!(db.ledger.retry(id, &ana, at).await.unwrap(), Some(state));
            let again = db.ledger.claim_queued(&jobs(&[JOB]), worker(1), at).await.unwrap().unwrap();
            assert_eq!((again.id, again.fence, again.attempt, again.error.as_deref()), (id, number, 1, None));
            let next = if number == 1 { RunState::Failed } else { RunState::TimedOut };
            let next = if number == 3 { RunState::Succeeded } else { next };
            assert!(db.ledger.finish(again.fence(), &finish(next, Some("551"))).await.unwrap());
        }
        assert_eq!(db.ledger.retry(id, &ana, at).await.unwrap(), Some(RunState::Succeeded), "nothing to do");
        let actions = db.ledger.actions(JOB, 10).await.unwrap();
        let actions: Vec<_> = actions.iter().map(|did| (did.action.as_str(), did.run_id)).collect();
        let retry = ("retry", Some(id));
        assert_eq!(actions, [retry, retry, retry, ("cancel", Some(id)), ("run", Some(id))]);
    }

    async fn missed_times_are_added_where_they_are_not_settled_and_found_again(db) {
        let at = now(db).await;
        let times: Vec<_> = (0..4).map(|n| at - TimeDelta::seconds(40 - n)).collect();
        let (id, _) = claim(db, JOB, times[1], Trigger::Schedule).await;
        let row = |time, state| Run {
            finished_at: (state == RunState::Skipped).then_some(at),
            trigger: if state == RunState::Queued { Trigger::CatchUp } else { Trigger::Schedule },
            error: (state == RunState::Skipped).then(|| "it passed".to_owned()),
            state,
            ..skipped(RunId::generate(at), time)
        };
        let many = Run { counts: Counts::from([(SKIPPED.to_owned(), 300)]), ..row(times[2], RunState::Skipped) };
        let rows = [row(times[0], RunState::Skipped), row(times[1], RunState::Queued), many, row(times[3], RunState::Queued)];
        assert_eq!(db.ledger.add_missed(&rows).await.unwrap(), 3);
        assert_eq!(db.ledger.add_missed(&rows).await.unwrap(), 0);
        assert_eq!(db.ledger.add_missed(&[]).await.unwrap(), 0);
        for row in [&rows[0], &rows[2], &rows[3]] {
            assert_eq!(run(db, JOB, row.id).await, *row);
        }
        assert_eq!(run(db, JOB, id).await.state, RunState::Running);
        let found = async |from: usize, until: usize, limit| {
            let found = db.ledger.settled(JOB, times[from], times[until], limit).await.unwrap();
            found.iter().map(|time| (time.at, time.skipped)).collect::<Vec<_>>()
        };
        assert_eq!(found(0, 3, 9).await, [(times[3], None), (times[2], Some(300)), (times[1], None), (times[0], None)]);
        assert_eq!(found(1, 2, 1).await, [(times[2], Some(300))]);
        let last = db.ledger.last_times(&jobs(&[JOB, "another"])).await.unwrap();
        assert_eq!(last, [(JOB.to_owned(), times[3])]);
    }

    async fn each_daemon_has_its_own_row_for_a_poll_of_one_second(db) {
        let poll = |daemon| Run {
            job: "realtime-delivery".to_owned(), daemon: Some(worker(daemon)), started_at: Some(t0()),
            state: RunState::Succeeded, counts: counts(1), error: None, attempt: 1,
            ..skipped(RunId::generate(t0()), t0())
        };
        assert!(db.ledger.record(&poll(1)).await.unwrap());
        assert!(db.ledger.record(&poll(2)).await.unwrap());
        assert_eq!(db.ledger.last_times(&jobs(&["realtime-delivery"])).await.unwrap(), []);
    }

    async fn the_databases_clock_is_the_machines_here(db) {
        use timelined::domain::{Clock, SystemClock};
        let before = SystemClock.now();
        let now = now(db).await;
        let after = SystemClock.now();
        let slack = TimeDelta::milliseconds(5);
        assert!(before - slack <= now && now <= after + slack, "{before} {now} {after}");
    }
}
