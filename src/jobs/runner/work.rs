//! A run from its claim to its end: attempts, retries, timeout, and the row and line that it leaves.

use std::time::{Duration, Instant};

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};
use tracing::Instrument as _;

use super::lease::Grip;
use super::{STORAGE_RETRY, Shared, Slot};
use crate::domain::{RunId, format_time};
use crate::jobs::{Ending, JobError, Report, RunContext};
use crate::storage::{Counts, Finish, Run, RunState, StorageResult, Trigger};
use crate::telemetry::chain;

/// How long a run that timed out or was cancelled gets to reach a safe point before it is dropped.
const GRACE: Duration = Duration::from_secs(5);

/// How an attempt ended.
enum Attempt {
    Succeeded,
    /// Stopped at a safe point because the daemon is stopping.
    GivenBack,
    /// It is another daemon's, or may be in a moment.
    Lost,
    /// Stopped because somebody asked for it.
    Cancelled,
    Failed {
        state: RunState,
        error: String,
        may_retry: bool,
    },
}

/// Runs until it succeeds, may not be tried again, or is ended from outside. `has_row`: the run was
/// claimed, so that its row is to be finished; otherwise a row is written where there is something
/// to say.
pub(super) async fn execute(shared: &Shared, slot: &Slot, mut run: Run, has_row: bool) {
    let began = Instant::now();
    let lag = shared.now() - run.scheduled_at;
    let grip = if has_row {
        shared.grip(run.id)
    } else {
        Grip::default()
    };
    let report = Report::default();
    let ended = loop {
        if shared.is_stopping() {
            // Claimed while the daemon began to stop.
            break Attempt::GivenBack;
        }
        let span = tracing::info_span!(
            "run", job.name = %run.job, run.id = %run.id, run.attempt = run.attempt
        );
        let ended = attempt(shared, slot, &run, has_row, &grip, &report)
            .instrument(span)
            .await;
        add(&mut run.counts, report.take());
        let Attempt::Failed {
            error,
            may_retry: true,
            ..
        } = &ended
        else {
            break ended;
        };
        let Some(delay) = slot.definition.retry.delay(run.attempt, rand::random()) else {
            break ended;
        };
        tracing::warn!(
            job.name = run.job,
            run.id = %run.id,
            run.attempt,
            error,
            retry_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
            "attempt {} of {} failed; trying again", run.attempt, run.job
        );
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = shared.settings.stop.cancelled() => break Attempt::GivenBack,
            () = grip.lost.cancelled() => break Attempt::Lost,
            () = grip.cancel.cancelled() => break Attempt::Cancelled,
        }
        run.attempt += 1;
        if has_row {
            match shared
                .settings
                .ledger
                .begin_attempt(run.fence(), run.attempt)
                .await
            {
                Ok(true) => {}
                Ok(false) => break Attempt::Lost,
                Err(error) => {
                    tracing::debug!(run.id = %run.id, error = %chain(&error), "could not count the attempt");
                }
            }
        }
    };
    // The lease is kept until the end is written.
    end(shared, slot, &mut run, ended, has_row, (lag, began)).await;
    shared.let_go(run.id);
}

/// Writes how a run ended, and says it.
async fn end(
    shared: &Shared,
    slot: &Slot,
    run: &mut Run,
    ended: Attempt,
    has_row: bool,
    (lag, began): (TimeDelta, Instant),
) {
    let (state, error) = match ended {
        Attempt::GivenBack | Attempt::Lost => {
            let is_lost = matches!(ended, Attempt::Lost);
            return give_back(shared, run, has_row, is_lost).await;
        }
        Attempt::Succeeded => (RunState::Succeeded, None),
        Attempt::Cancelled => {
            let by = shared.cancelled_by(run.id);
            let by = by.as_deref().unwrap_or("an operator");
            (RunState::Cancelled, Some(format!("cancelled by {by}")))
        }
        Attempt::Failed { state, error, .. } => (state, Some(error)),
    };
    run.state = state;
    // A NUL, such as in the message of a panic, is refused by PostgreSQL, and the run would stay
    // `running` for ever.
    run.error = error.map(|error| error.replace('\0', "\u{fffd}"));
    run.finished_at = Some(shared.now().max(run.scheduled_at));
    let is_empty_poll = !has_row && run.counts.is_empty() && run.state == RunState::Succeeded;
    let is_written = if has_row {
        finish(shared, run).await
    } else if is_empty_poll {
        count_empty_poll(shared, slot, run).await;
        true
    } else {
        insist(shared, run, || shared.settings.ledger.record(run)).await;
        true
    };
    if is_written {
        tell(shared, slot, run, lag.num_milliseconds(), began.elapsed());
    } else {
        tell_lost(run);
    }
}

/// Adds a poll that found nothing to the sum of its minute, and writes the minute before it.
async fn count_empty_poll(shared: &Shared, slot: &Slot, poll: &Run) {
    let minute = minute(poll.scheduled_at);
    let full = {
        let mut busy = slot.lock();
        match &mut busy.empty {
            Some((at, polls)) if *at == minute => {
                *polls += 1;
                None
            }
            empty => empty.replace((minute, 1)),
        }
    };
    if let Some((at, polls)) = full {
        record_minute(shared, slot, at, polls).await;
    }
}

/// Writes the sum of the minute that is not over, since the daemon stops.
pub(super) async fn record_last_minutes(shared: &Shared) {
    for slot in &*shared.jobs() {
        let empty = slot.lock().empty.take();
        if let Some((at, polls)) = empty {
            record_minute(shared, slot, at, polls).await;
        }
    }
}

async fn record_minute(shared: &Shared, slot: &Slot, at: DateTime<Utc>, polls: u64) {
    let now = shared.now();
    let sum = Run {
        id: RunId::generate(now),
        job: slot.definition.name.clone(),
        scheduled_at: at,
        started_at: Some(at),
        finished_at: Some(now.max(at)),
        trigger: Trigger::Schedule,
        attempt: 1,
        daemon: Some(shared.settings.daemon),
        fence: 0,
        state: RunState::Succeeded,
        counts: Counts::from([("polls".to_owned(), polls)]),
        error: None,
    };
    // Not insisted on: it tells only that nothing happened.
    if let Err(error) = shared.settings.ledger.record(&sum).await {
        tracing::debug!(job.name = sum.job, error = %chain(&error), "could not record a minute of polls");
    }
}

fn minute(at: DateTime<Utc>) -> DateTime<Utc> {
    let seconds = at.timestamp().rem_euclid(60);
    (at - TimeDelta::seconds(seconds)).trunc_subsecs(0)
}

/// One attempt, in a task of its own, so that a panic ends only the attempt.
async fn attempt(
    shared: &Shared,
    slot: &Slot,
    run: &Run,
    has_row: bool,
    grip: &Grip,
    report: &Report,
) -> Attempt {
    let stop = shared.settings.stop.child_token();
    let context = RunContext {
        run: run.id,
        fence: has_row.then(|| run.fence()),
        scheduled_at: run.scheduled_at,
        stop: stop.clone(),
        report: report.clone(),
    };
    let job = slot.job.clone();
    let mut task = shared
        .settings
        .tracker
        .spawn(async move { job.run(&context).await }.instrument(tracing::Span::current()));
    let timeout = slot.definition.timeout;
    let mut is_cancelled = false;
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = shared.settings.abort.cancelled() => {
            task.abort();
            return Attempt::GivenBack;
        }
        () = grip.lost.cancelled() => {
            stop.cancel();
            task.abort();
            return Attempt::Lost;
        }
        () = grip.cancel.cancelled() => {
            is_cancelled = true;
            stop.cancel();
            match tokio::time::timeout(GRACE, &mut task).await {
                Ok(ended) => ended,
                Err(_elapsed) => {
                    task.abort();
                    return Attempt::Cancelled;
                }
            }
        }
        () = tokio::time::sleep(timeout) => {
            stop.cancel();
            if tokio::time::timeout(GRACE, &mut task).await.is_err() {
                task.abort();
            }
            return Attempt::Failed {
                state: RunState::TimedOut,
                error: format!("took longer than its timeout of {}", humantime::format_duration(timeout)),
                may_retry: true,
            };
        }
    };
    let failed = |error, may_retry| Attempt::Failed {
        state: RunState::Failed,
        error,
        may_retry,
    };
    match ended {
        Ok(Ok(Ending::Finished)) => Attempt::Succeeded,
        Ok(Err(JobError::Lost)) => Attempt::Lost,
        Ok(_) if is_cancelled => Attempt::Cancelled,
        Ok(Ok(Ending::Unfinished)) => Attempt::GivenBack,
        Ok(Err(JobError::Transient(error))) => failed(error, true),
        Ok(Err(JobError::Permanent(error))) => failed(error, false),
        Err(panic) => failed(format!("panicked: {}", panic_message(panic)), false),
    }
}

fn panic_message(error: tokio::task::JoinError) -> String {
    let Ok(panic) = error.try_into_panic() else {
        return "was cancelled".to_owned();
    };
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "no message".to_owned(),
    }
}

/// Puts the run back into the queue without spending the attempt: the next daemon goes on with it.
/// Where it is lost, it may be another's already, which the fence finds out.
async fn give_back(shared: &Shared, run: &Run, has_row: bool, is_lost: bool) {
    if !has_row {
        return;
    }
    let attempts_spent = run.attempt.saturating_sub(1);
    let ledger = &shared.settings.ledger;
    let given_back = insist(shared, run, || {
        ledger.give_back(run.fence(), &run.counts, attempts_spent)
    })
    .await;
    match given_back {
        Some(true) => {
            let why = if is_lost {
                "its lease was not renewed"
            } else {
                "the daemon is stopping"
            };
            tracing::info!(
                job.name = run.job,
                run.id = %run.id,
                counts = ?run.counts,
                run.outcome = "given back",
                "gave {} back: {why}", run.job
            );
        }
        Some(false) => tell_lost(run),
        // Said already.
        None => {}
    }
}

fn tell_lost(run: &Run) {
    tracing::warn!(
        job.name = run.job,
        run.id = %run.id,
        counts = ?run.counts,
        run.outcome = "lost",
        "another daemon took {} over: what this one did last for it counts for nothing", run.job
    );
}

/// Writes the run's end. Answers whether the run was still this daemon's, as far as that is known.
async fn finish(shared: &Shared, run: &Run) -> bool {
    let finish = Finish {
        state: run.state,
        attempt: run.attempt,
        counts: run.counts.clone(),
        error: run.error.clone(),
        at: run.finished_at.unwrap_or_else(|| shared.now()),
    };
    let ledger = &shared.settings.ledger;
    if let Some(is_own) = insist(shared, run, || ledger.finish(run.fence(), &finish)).await {
        return is_own;
    }
    // Refused for what it says, perhaps. The state alone, or the run would look to be at work for ever.
    let error = "how it ended could not be written; see the log".to_owned();
    let bare = Finish {
        counts: Counts::new(),
        error: Some(error),
        ..finish
    };
    insist(shared, run, || ledger.finish(run.fence(), &bare))
        .await
        .unwrap_or(true)
}

/// Writes what became of a run, waiting for a database that is away as long as the daemon may: also
/// while it drains, since a run that stays `running` without a daemon is a riddle. Answers what the
/// ledger answers; `None` where it could not be written, which is in the log then.
async fn insist<F>(shared: &Shared, run: &Run, mut write: impl FnMut() -> F) -> Option<bool>
where
    F: Future<Output = StorageResult<bool>>,
{
    let mut has_failed = false;
    loop {
        let error = match write().await {
            // An answer that was lost before may have been that of the same write.
            Ok(is_written) => return Some(is_written || has_failed),
            Err(error) => error,
        };
        if !error.is_transient() || shared.settings.abort.is_cancelled() {
            tracing::error!(run.id = %run.id, error = %chain(&error), "could not record what became of a run");
            return None;
        }
        if !has_failed {
            tracing::warn!(run.id = %run.id, error = %chain(&error), "could not record what became of a run; trying again");
        }
        has_failed = true;
        tokio::select! {
            () = tokio::time::sleep(STORAGE_RETRY) => {}
            // Once more, and not again.
            () = shared.settings.abort.cancelled() => {}
        }
    }
}

fn add(counts: &mut Counts, more: Counts) {
    for (name, count) in more {
        *counts.entry(name).or_default() += count;
    }
}

/// The one line that each run ends in.
pub(super) fn tell(shared: &Shared, slot: &Slot, run: &Run, lag_ms: i64, took: Duration) {
    shared.settings.metrics.run_ended(run, lag_ms, took);
    if let Some(alerts) = &shared.settings.alerts {
        alerts.borrow().run_ended(run);
    }
    let counts = serde_json::to_string(&run.counts).unwrap_or_default();
    let next_at = slot.next_after(shared.now()).map(format_time);
    macro_rules! line {
        ($level:ident, $($message:tt)+) => {
            tracing::$level!(
                job.name = run.job,
                run.id = %run.id,
                run.attempt,
                run.trigger = %run.trigger,
                run.scheduled_at = format_time(run.scheduled_at),
                run.lag_ms = lag_ms,
                run.duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                run.outcome = %run.state,
                run.next_at = next_at,
                node.id = %shared.settings.daemon,
                counts,
                error = run.error,
                $($message)+
            )
        };
    }
    let name = &run.job;
    match (run.state, run.counts.is_empty()) {
        (RunState::Succeeded, true) if slot.is_poll() => line!(debug, "{name} found nothing"),
        (RunState::Succeeded, _) => line!(info, "{name} succeeded"),
        (RunState::Skipped, _) => line!(warn, "skipped a time of {name}"),
        (RunState::Cancelled, _) => line!(warn, "{name} was cancelled"),
        (state, _) => line!(error, "{name} {state}"),
    }
}
