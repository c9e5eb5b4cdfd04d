//! The ledger of runs: a time is claimed once, a run ends once.

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use timelined::domain::RunId;
use timelined::storage::{Claim, Counts, Finish, Run, RunState, Trigger};
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
        state: RunState::Skipped,
        counts: Counts::new(),
        error: Some("the previous run had not ended".to_owned()),
    }
}

on_both_engines! {
    async fn a_time_that_is_due_is_claimed_once(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (first, claimed) = claim(db, JOB, due, Trigger::Schedule).await;
        assert_eq!(claimed, Claim::Claimed);
        assert_eq!(claim(db, JOB, due, Trigger::Schedule).await.1, Claim::Taken);
        assert_eq!(claim(db, JOB, due, Trigger::CatchUp).await.1, Claim::Taken);
        assert_eq!(claim(db, JOB, due - MICRO, Trigger::CatchUp).await.1, Claim::Claimed);
        assert_eq!(claim(db, "another", due, Trigger::Schedule).await.1, Claim::Claimed);
        let claimed = run(db, JOB, first).await;
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
        db.ledger.finish(id, &finish(RunState::Succeeded, None)).await.unwrap();
        assert_eq!(again().await, Claim::Taken);
    }

    async fn what_a_daemon_is_at_work_on_is_told(db) {
        let due = now(db).await - TimeDelta::seconds(9);
        let (first, _) = claim(db, JOB, due, Trigger::Schedule).await;
        let (ended, _) = claim(db, JOB, due + MICRO, Trigger::Schedule).await;
        db.ledger.finish(ended, &finish(RunState::Succeeded, None)).await.unwrap();
        db.ledger.enqueue(RunId::generate(t0()), JOB, &subject("ops"), t0()).await.unwrap();
        let running = db.ledger.running(worker(1)).await.unwrap();
        assert_eq!(running, [run(db, JOB, first).await]);
        assert_eq!(db.ledger.running(worker(2)).await.unwrap(), []);
    }

    async fn a_clock_is_compared_with_the_one_that_judges(db) {
        let shift = TimeDelta::seconds(3);
        let ahead = db.ledger.ahead(now(db).await + shift).await.unwrap();
        match db.engine {
            // The daemon's own clock judges.
            Engine::Sqlite => assert_eq!(ahead, TimeDelta::zero()),
            Engine::Postgres => assert!(ahead <= shift && ahead > shift - TimeDelta::seconds(2), "{ahead}"),
        }
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
        }
    }

    async fn of_sixteen_concurrent_takers_each_queued_run_goes_to_one(db) {
        for _ in 0..5 {
            db.ledger.enqueue(RunId::generate(t0()), JOB, &subject("ops"), t0()).await.unwrap();
        }
        let barrier = Arc::new(Barrier::new(16));
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let (ledger, barrier) = (db.ledger.clone(), barrier.clone());
            tasks.spawn(async move {
                barrier.wait().await;
                ledger.claim_queued(&jobs(&[JOB]), worker(n), t0()).await.unwrap().map(|run| run.id)
            });
        }
        let mut taken: Vec<RunId> = tasks.join_all().await.into_iter().flatten().collect();
        // A taker may find the one that it looked at gone and come back with nothing.
        while let Some(run) = db.ledger.claim_queued(&jobs(&[JOB]), worker(1), t0()).await.unwrap() {
            taken.push(run.id);
        }
        taken.sort();
        taken.dedup();
        assert_eq!(taken.len(), 5);
        assert_eq!(db.count("job_runs where state = 'running' and attempt = 1").await, 5);
    }

    async fn a_run_ends_once(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.finish(id, &finish(RunState::Succeeded, None)).await.unwrap();
        let ended = run(db, JOB, id).await;
        assert_eq!((ended.state, &ended.counts, ended.finished_at), (RunState::Succeeded, &counts(3), Some(t0() + hours(1))));
        assert_eq!(ended.attempt, 2);
        db.ledger.finish(id, &finish(RunState::Failed, Some("too late"))).await.unwrap();
        db.ledger.begin_attempt(id, 9).await.unwrap();
        db.ledger.give_back(id, &counts(9), 0).await.unwrap();
        assert_eq!(run(db, JOB, id).await, ended);
    }

    async fn every_way_to_end_is_kept_with_its_reason(db) {
        let due = now(db).await - TimeDelta::seconds(60);
        for (n, state) in (0..).zip([RunState::Failed, RunState::TimedOut, RunState::Cancelled]) {
            let (id, _) = claim(db, JOB, due + TimeDelta::seconds(n), Trigger::CatchUp).await;
            db.ledger.finish(id, &finish(state, Some("550 no such «user»"))).await.unwrap();
            let ended = run(db, JOB, id).await;
            assert_eq!((ended.state, ended.error.as_deref()), (state, Some("550 no such «user»")));
        }
    }

    async fn a_queued_run_is_not_finished(db) {
        let id = RunId::generate(t0());
        db.ledger.enqueue(id, JOB, &subject("ops"), t0()).await.unwrap();
        db.ledger.finish(id, &finish(RunState::Succeeded, None)).await.unwrap();
        assert_eq!(run(db, JOB, id).await.state, RunState::Queued);
    }

    async fn attempts_are_counted_while_a_run_runs(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.begin_attempt(id, 2).await.unwrap();
        assert_eq!(run(db, JOB, id).await.attempt, 2);
    }

    async fn a_run_that_is_given_back_spends_no_attempt_and_goes_on_elsewhere(db) {
        let due = now(db).await - TimeDelta::seconds(1);
        let (id, _) = claim(db, JOB, due, Trigger::Schedule).await;
        db.ledger.begin_attempt(id, 3).await.unwrap();
        db.ledger.give_back(id, &counts(5), 2).await.unwrap();
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
        let (left, _) = claim(db, JOB, due, Trigger::Schedule).await;
        let (ended, _) = claim(db, JOB, due + TimeDelta::seconds(1), Trigger::Schedule).await;
        db.ledger.finish(ended, &finish(RunState::Succeeded, None)).await.unwrap();
        if db.engine == Engine::Postgres {
            // Other daemons may be at work on it.
            assert_eq!(db.ledger.recover().await.unwrap(), 0);
            return;
        }
        assert_eq!(db.ledger.recover().await.unwrap(), 1);
        assert_eq!(db.ledger.recover().await.unwrap(), 0);
        let run = run(db, JOB, left).await;
        assert_eq!((run.state, run.daemon), (RunState::Queued, None));
        let taken = db.ledger.claim_queued(&jobs(&[JOB]), worker(2), t0()).await.unwrap().unwrap();
        assert_eq!(taken.id, left);
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
