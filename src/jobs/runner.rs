//! The runner: keeps time, claims what is due, and runs it to its end.
//!
//! The planner sleeps to the next due instant in short slices, so that a step of the clock or a
//! suspended machine is noticed, and never waits for a run: each run is a task of its own. A
//! scheduled time is claimed by a unique row, judged by the database's clock. The delivery poll is
//! the exception: it runs once on each daemon, and a poll that found nothing leaves no row.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;
use uuid::Uuid;

use super::{Job, JobError, Pulse, Report, RunContext};
use crate::config::{JobDefinition, JobKind, Overlap};
use crate::domain::{Clock, RunId, format_time};
use crate::storage::{Claim, Counts, Finish, JobLedger, Run, RunState, StorageError, Trigger};
use crate::telemetry::{Metrics, chain};

/// The planner sleeps no longer than this at a time: a step of the clock shows within it.
const SLICE: Duration = Duration::from_millis(250);
/// How long a run that timed out gets to reach a safe point before it is dropped.
const TIMEOUT_GRACE: Duration = Duration::from_secs(5);
/// Between two tries to reach a database that is away.
const STORAGE_RETRY: Duration = Duration::from_secs(1);
/// Between two tries to claim a time that the database's clock has not reached.
const NOT_DUE_RETRY: Duration = Duration::from_millis(20);

/// What a runner shares with the rest of the daemon.
#[derive(Clone)]
pub struct RunnerSettings {
    /// The ledger of runs.
    pub ledger: Arc<dyn JobLedger>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// This daemon, by an id made at its start.
    pub daemon: Uuid,
    /// Holds every run.
    pub tracker: TaskTracker,
    /// Cancelled when runs are to reach a safe point.
    pub stop: CancellationToken,
    /// Cancelled when runs are to end at once.
    pub abort: CancellationToken,
    /// Wakes the planner.
    pub pulse: Pulse,
    /// Counts runs.
    pub metrics: Arc<Metrics>,
}

/// The jobs of this daemon.
pub struct Runner {
    settings: RunnerSettings,
    jobs: Vec<Arc<Slot>>,
}

/// A job with its place: at most one run at a time.
struct Slot {
    definition: JobDefinition,
    job: Arc<dyn Job>,
    busy: Mutex<Busy>,
}

#[derive(Default)]
struct Busy {
    running: bool,
    /// The time that waits, for `overlap = "queue"`.
    queued: Option<DateTime<Utc>>,
}

/// How an attempt ended.
enum Attempt {
    Succeeded(Counts),
    /// Stopped at a safe point because the daemon is stopping.
    GivenBack(Counts),
    Failed {
        state: RunState,
        error: String,
        may_retry: bool,
    },
}

impl Runner {
    /// A runner of `jobs`.
    #[must_use]
    pub fn new(settings: RunnerSettings, jobs: Vec<(JobDefinition, Arc<dyn Job>)>) -> Self {
        let jobs = jobs
            .into_iter()
            .map(|(definition, job)| {
                Arc::new(Slot {
                    definition,
                    job,
                    busy: Mutex::default(),
                })
            })
            .collect();
        Self { settings, jobs }
    }

    /// Keeps time until the daemon stops.
    pub async fn run(self) {
        let clock = self.settings.clock.clone();
        let mut last_look = clock.now();
        let mut due: Vec<Option<DateTime<Utc>>> = self
            .jobs
            .iter()
            .map(|slot| slot.next_after(last_look))
            .collect();
        let mut queue_look = Instant::now();
        loop {
            let now = clock.now();
            self.settings.pulse.seen();
            if now < last_look {
                // The clock stepped back: what lies ahead is planned anew. Times that ran already
                // are taken, so none runs twice.
                tracing::warn!(
                    back_ms = (last_look - now).num_milliseconds(),
                    "the clock stepped back"
                );
                due = self.jobs.iter().map(|slot| slot.next_after(now)).collect();
            }
            last_look = now;
            for (slot, due) in self.jobs.iter().zip(&mut due) {
                if due.is_some_and(|at| at <= now) {
                    let (at, next) = slot.latest_due(due.take().unwrap_or(now), now);
                    *due = next;
                    self.fire(slot, at);
                }
            }
            if queue_look <= Instant::now() {
                queue_look = Instant::now() + Duration::from_secs(1);
                self.spawn_queue_look();
            }
            let next = due.iter().flatten().min().copied();
            let until = next.map_or(SLICE, |at| {
                (at - clock.now()).to_std().unwrap_or_default().min(SLICE)
            });
            tokio::select! {
                () = tokio::time::sleep(until) => {}
                // A pulse, or a run that somebody asked for.
                () = self.settings.pulse.woken() => queue_look = Instant::now(),
                () = self.settings.stop.cancelled() => return,
            }
        }
    }

    /// A scheduled time has come.
    fn fire(&self, slot: &Arc<Slot>, at: DateTime<Utc>) {
        if slot.occupy() {
            let (runner, slot) = (self.settings.clone(), slot.clone());
            self.settings
                .tracker
                .spawn(async move { serve(&runner, &slot, at).await });
            return;
        }
        match slot.definition.overlap {
            Overlap::Queue => slot.lock().queued = Some(at),
            Overlap::Skip if slot.is_poll() => {
                tracing::debug!(
                    job.name = slot.definition.name,
                    "the poll before is still at work"
                );
            }
            Overlap::Skip => {
                let (runner, slot) = (self.settings.clone(), slot.clone());
                self.settings
                    .tracker
                    .spawn(async move { skip(&runner, &slot, at).await });
            }
        }
    }

    /// Takes runs out of the queue: those that somebody asked for, and those that were given back.
    fn spawn_queue_look(&self) {
        let (runner, jobs) = (self.settings.clone(), self.jobs.clone());
        self.settings.tracker.spawn(async move {
            let free: Vec<String> = jobs
                .iter()
                .filter(|slot| !slot.lock().running)
                .map(|slot| slot.definition.name.clone())
                .collect();
            if free.is_empty() {
                return;
            }
            match runner.ledger.claim_queued(&free, runner.daemon, runner.clock.now()).await {
                Ok(Some(run)) => {
                    let slot = jobs.iter().find(|slot| slot.definition.name == run.job);
                    if let Some(slot) = slot.cloned() {
                        if slot.occupy() {
                            let next = runner.clone();
                            runner.tracker.spawn(async move {
                                execute(&next, &slot, run, true).await;
                                release(&next, &slot).await;
                                // There may be more in the queue.
                                next.pulse.wake();
                            });
                        } else if let Err(error) = runner
                            .ledger
                            .give_back(run.id, &run.counts, run.attempt.saturating_sub(1))
                            .await
                        {
                            tracing::warn!(run.id = %run.id, error = %chain(&error), "could not give a run back");
                        }
                    }
                }
                Ok(None) => {}
                Err(error) => tracing::debug!(error = %chain(&error), "could not look at the queue of runs"),
            }
        });
    }
}

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place, if it is free.
    fn occupy(&self) -> bool {
        !std::mem::replace(&mut self.lock().running, true)
    }

    fn is_poll(&self) -> bool {
        matches!(self.definition.kind, JobKind::RealtimeDelivery { .. })
    }

    fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.definition
            .enabled
            .then(|| self.definition.schedule.next_after(after))
            .flatten()
    }

    /// The newest time that is due, and the one after it. Times between, which passed while the
    /// machine was suspended or the clock stepped forward, are skipped.
    fn latest_due(
        &self,
        first: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> (DateTime<Utc>, Option<DateTime<Utc>>) {
        let mut at = first;
        // More than so many are stepped over at once, rather than one by one.
        for _ in 0..1000 {
            match self.next_after(at) {
                Some(next) if next <= now => at = next,
                next => return (at, next),
            }
        }
        (at, self.next_after(now))
    }
}

/// Runs a scheduled time, and the one that queued meanwhile.
async fn serve(runner: &RunnerSettings, slot: &Arc<Slot>, at: DateTime<Utc>) {
    let run = new_run(runner, slot, at);
    if slot.is_poll() {
        execute(runner, slot, run, false).await;
    } else if claim(runner, slot, &run).await {
        execute(runner, slot, run, true).await;
    }
    release(runner, slot).await;
}

/// Frees the place, or goes on with the time that waits.
async fn release(runner: &RunnerSettings, slot: &Arc<Slot>) {
    let queued = {
        let mut busy = slot.lock();
        let queued = busy.queued.take();
        busy.running = queued.is_some();
        queued
    };
    if let Some(at) = queued {
        Box::pin(serve(runner, slot, at)).await;
    }
}

fn new_run(runner: &RunnerSettings, slot: &Slot, at: DateTime<Utc>) -> Run {
    let now = runner.clock.now();
    Run {
        id: RunId::generate(now),
        job: slot.definition.name.clone(),
        scheduled_at: at,
        started_at: Some(now),
        finished_at: None,
        trigger: Trigger::Schedule,
        attempt: 1,
        daemon: Some(runner.daemon),
        state: RunState::Running,
        counts: Counts::new(),
        error: None,
    }
}

/// Claims a scheduled time, waiting for a database that is away. False where somebody else has it.
async fn claim(runner: &RunnerSettings, slot: &Slot, run: &Run) -> bool {
    let mut told = false;
    loop {
        let now = runner.clock.now();
        let claim = runner
            .ledger
            .claim(
                run.id,
                &run.job,
                run.scheduled_at,
                run.trigger,
                runner.daemon,
                now,
            )
            .await;
        let wait = match claim {
            Ok(Claim::Claimed) => return true,
            Ok(Claim::Taken) => {
                tracing::debug!(job.name = run.job, run.scheduled_at = %format_time(run.scheduled_at), "the time is taken");
                return false;
            }
            Ok(Claim::NotDue) => NOT_DUE_RETRY,
            Err(error) => {
                if !told {
                    tracing::warn!(job.name = slot.definition.name, error = %chain(&error), "cannot claim a run; trying again");
                }
                told = true;
                STORAGE_RETRY
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = runner.stop.cancelled() => return false,
        }
    }
}

/// Leaves a row for a time that came while the run before was still at work.
async fn skip(runner: &RunnerSettings, slot: &Slot, at: DateTime<Utc>) {
    let mut run = new_run(runner, slot, at);
    run.started_at = None;
    run.finished_at = Some(runner.clock.now());
    run.attempt = 0;
    run.state = RunState::Skipped;
    run.error = Some("the run before was still at work".to_owned());
    tracing::warn!(
        job.name = run.job,
        run.id = %run.id,
        run.scheduled_at = %format_time(at),
        run.outcome = "skipped",
        "skipped {}: the run before is still at work", run.job
    );
    if let Err(error) = runner.ledger.record(&run).await {
        tracing::warn!(job.name = run.job, error = %chain(&error), "could not record a skipped time");
    }
}

/// Runs until it succeeds, may not be tried again, or the daemon stops. `has_row`: the run was
/// claimed, so that its row is to be finished; otherwise a row is written where there is something
/// to say.
async fn execute(runner: &RunnerSettings, slot: &Slot, mut run: Run, has_row: bool) {
    let began = Instant::now();
    let lag = runner.clock.now() - run.scheduled_at;
    let (state, error) = loop {
        let span = tracing::info_span!(
            "run", job.name = %run.job, run.id = %run.id, run.attempt = run.attempt
        );
        match attempt(runner, slot, &run).instrument(span).await {
            Attempt::Succeeded(counts) => {
                add(&mut run.counts, counts);
                break (RunState::Succeeded, None);
            }
            Attempt::GivenBack(counts) => {
                add(&mut run.counts, counts);
                return give_back(runner, &run, has_row).await;
            }
            Attempt::Failed {
                state,
                error,
                may_retry,
            } => {
                let delay = may_retry
                    .then(|| slot.definition.retry.delay(run.attempt, rand::random()))
                    .flatten();
                let Some(delay) = delay else {
                    break (state, Some(error));
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
                    () = runner.stop.cancelled() => return give_back(runner, &run, has_row).await,
                }
                run.attempt += 1;
                if has_row
                    && let Err(error) = runner.ledger.begin_attempt(run.id, run.attempt).await
                {
                    tracing::debug!(run.id = %run.id, error = %chain(&error), "could not count the attempt");
                }
            }
        }
    };
    run.state = state;
    run.error = error;
    run.finished_at = Some(runner.clock.now());
    tell(runner, slot, &run, lag.num_milliseconds(), began.elapsed());
    let is_worth_a_row = !run.counts.is_empty() || run.state != RunState::Succeeded;
    if has_row {
        finish(runner, &run).await;
    } else if is_worth_a_row && let Err(error) = runner.ledger.record(&run).await {
        tracing::warn!(job.name = run.job, run.id = %run.id, error = %chain(&error), "could not record a run");
    }
}

/// One attempt, in a task of its own, so that a panic ends only the attempt.
async fn attempt(runner: &RunnerSettings, slot: &Slot, run: &Run) -> Attempt {
    let stop = runner.stop.child_token();
    let context = RunContext {
        run: run.id,
        scheduled_at: run.scheduled_at,
        stop: stop.clone(),
    };
    let job = slot.job.clone();
    let mut task = runner
        .tracker
        .spawn(async move { job.run(&context).await }.instrument(tracing::Span::current()));
    let timeout = slot.definition.timeout;
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = runner.abort.cancelled() => {
            task.abort();
            return Attempt::GivenBack(Counts::new());
        }
        () = tokio::time::sleep(timeout) => {
            stop.cancel();
            if tokio::time::timeout(TIMEOUT_GRACE, &mut task).await.is_err() {
                task.abort();
            }
            return Attempt::Failed {
                state: RunState::TimedOut,
                error: format!("took longer than its timeout of {}", humantime::format_duration(timeout)),
                may_retry: true,
            };
        }
    };
    match ended {
        Ok(Ok(Report {
            counts,
            is_unfinished: false,
        })) => Attempt::Succeeded(counts),
        Ok(Ok(Report {
            counts,
            is_unfinished: true,
        })) => Attempt::GivenBack(counts),
        Ok(Err(JobError::Transient(error))) => Attempt::Failed {
            state: RunState::Failed,
            error,
            may_retry: true,
        },
        Ok(Err(JobError::Permanent(error))) => Attempt::Failed {
            state: RunState::Failed,
            error,
            may_retry: false,
        },
        Err(panic) => Attempt::Failed {
            state: RunState::Failed,
            error: format!("panicked: {}", panic_message(panic)),
            may_retry: false,
        },
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
async fn give_back(runner: &RunnerSettings, run: &Run, has_row: bool) {
    tracing::info!(
        job.name = run.job,
        run.id = %run.id,
        counts = ?run.counts,
        run.outcome = "given back",
        "gave {} back: the daemon is stopping", run.job
    );
    if !has_row {
        return;
    }
    let attempts_spent = run.attempt.saturating_sub(1);
    if let Err(error) = runner
        .ledger
        .give_back(run.id, &run.counts, attempts_spent)
        .await
    {
        tracing::error!(run.id = %run.id, error = %chain(&error), "could not give a run back");
    }
}

/// Writes the run's end, waiting for a database that is away as long as the daemon may.
async fn finish(runner: &RunnerSettings, run: &Run) {
    let finish = Finish {
        state: run.state,
        counts: run.counts.clone(),
        error: run.error.clone(),
        at: run.finished_at.unwrap_or_else(|| runner.clock.now()),
    };
    loop {
        match runner.ledger.finish(run.id, &finish).await {
            Ok(()) => return,
            Err(error) if is_final(&error) || runner.stop.is_cancelled() => {
                tracing::error!(run.id = %run.id, error = %chain(&error), "could not record how a run ended");
                return;
            }
            Err(error) => {
                tracing::warn!(run.id = %run.id, error = %chain(&error), "could not record how a run ended; trying again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(STORAGE_RETRY) => {}
            () = runner.abort.cancelled() => return,
        }
    }
}

fn is_final(error: &StorageError) -> bool {
    !error.is_transient()
}

fn add(counts: &mut Counts, more: Counts) {
    for (name, count) in more {
        *counts.entry(name).or_default() += count;
    }
}

/// The one line that each run ends in.
fn tell(runner: &RunnerSettings, slot: &Slot, run: &Run, lag_ms: i64, took: Duration) {
    runner.metrics.run_ended(run, lag_ms, took);
    let counts = serde_json::to_string(&run.counts).unwrap_or_default();
    let next_at = slot.next_after(runner.clock.now()).map(format_time);
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
                node.id = %runner.daemon,
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
        (state, _) => line!(error, "{name} {state}"),
    }
}
