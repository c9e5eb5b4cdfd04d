//! The runner: keeps time, claims what is due, and runs it to its end.
//!
//! The planner sleeps to the next due instant in short slices, so that a step of the clock or a
//! suspended machine is noticed, and never waits for a run: each run is a task of its own. A
//! scheduled time is claimed by a unique row, judged by the database's clock, and a planner whose
//! own clock is ahead of that one plans by it. The delivery poll is
//! the exception: it runs once on each daemon, and a poll that found nothing leaves no row.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;
use uuid::Uuid;

use super::{Ending, Job, JobError, Pulse, Report, RunContext};
use crate::config::{JobDefinition, JobKind, Overlap};
use crate::domain::{Clock, RunId, format_time};
use crate::storage::{Claim, Counts, Finish, JobLedger, Run, RunState, StorageResult, Trigger};
use crate::telemetry::{Metrics, chain};

/// The planner sleeps no longer than this at a time: a step of the clock shows within it.
const SLICE: Duration = Duration::from_millis(250);
/// How long a run that timed out gets to reach a safe point before it is dropped.
const TIMEOUT_GRACE: Duration = Duration::from_secs(5);
/// Between two tries to reach a database that is away.
const STORAGE_RETRY: Duration = Duration::from_secs(1);
/// How often a skipped time is tried to be written. Not for ever, as the end of a run is: while the
/// database is away there may be one each second.
const SKIP_TRIES: u32 = 10;
/// How often runs that are past their time are deleted. A delivery poll that pushed something is a
/// row: some thousands an hour.
const PRUNE_EVERY: Duration = Duration::from_hours(1);
/// Runs that are deleted in one transaction: a few milliseconds, since inserts wait for it on SQLite.
const PRUNE_BATCH: u32 = 500;
/// Between two such transactions.
const PRUNE_PAUSE: Duration = Duration::from_millis(50);

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
    /// How long runs are kept after their end.
    pub keep_history: Duration,
}

/// The jobs of this daemon.
pub struct Runner {
    shared: Arc<Shared>,
}

/// What the planner and the runs share.
struct Shared {
    settings: RunnerSettings,
    jobs: Vec<Arc<Slot>>,
    /// How far this machine's clock is ahead of the one that judges due times, in microseconds. A
    /// planner that did not heed it would pass over times that are not due so far.
    ahead: AtomicI64,
    /// Held by the look at the queue: two at once would take two runs of one job.
    looking: Arc<tokio::sync::Mutex<()>>,
    /// An answer of the ledger was lost: a run may be this daemon's without its knowing.
    in_doubt: AtomicBool,
}

/// A job with its place: at most one run at a time.
struct Slot {
    definition: JobDefinition,
    job: Arc<dyn Job>,
    busy: Mutex<Busy>,
}

#[derive(Default)]
struct Busy {
    /// Who has the place, and for which time; known here before it is claimed in the ledger.
    run: Option<(RunId, DateTime<Utc>)>,
    /// The time that waits, for `overlap = "queue"`.
    queued: Option<DateTime<Utc>>,
    /// A time that was not due by the database's clock: to be planned again.
    early: Option<DateTime<Utc>>,
}

/// How an attempt ended.
enum Attempt {
    Succeeded,
    /// Stopped at a safe point because the daemon is stopping.
    GivenBack,
    Failed {
        state: RunState,
        error: String,
        may_retry: bool,
    },
}

/// What became of a time that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The place was free; it is the run's now.
    Taken,
    /// It is served already: the clock stepped back meanwhile.
    Served,
    /// It waits for the run before it; `instead_of` waited so far.
    Queued { instead_of: Option<DateTime<Utc>> },
    /// The run before is still at work, and times do not queue.
    Busy,
}

/// What came of a claim.
#[derive(PartialEq, Eq)]
enum Claimed {
    Yes,
    /// Somebody else has it, or the daemon stops.
    No,
    /// The planner is to come again with it.
    Early,
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
        Self {
            shared: Arc::new(Shared {
                settings,
                jobs,
                ahead: AtomicI64::new(0),
                looking: Arc::default(),
                in_doubt: AtomicBool::new(false),
            }),
        }
    }

    /// Keeps time until the daemon stops.
    pub async fn run(self) {
        let Shared { settings, jobs, .. } = &*self.shared;
        let mut last_look = self.shared.now();
        let mut due: Vec<Option<DateTime<Utc>>> =
            jobs.iter().map(|slot| slot.next_after(last_look)).collect();
        let mut queue_look = Instant::now();
        let mut prune_at = Instant::now();
        loop {
            let now = self.shared.now();
            settings.pulse.seen();
            if now < last_look {
                // What lies ahead is planned anew. Times that ran already are taken, so none runs
                // twice.
                let back = last_look - now;
                if back >= TimeDelta::seconds(1) {
                    tracing::warn!(back_ms = back.num_milliseconds(), "the clock stepped back");
                }
                due = jobs.iter().map(|slot| slot.next_after(now)).collect();
            }
            last_look = now;
            for (slot, due) in jobs.iter().zip(&mut due) {
                if let Some(early) = slot.lock().early.take() {
                    *due = slot.next_after(now.min(early - TimeDelta::microseconds(1)));
                }
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
            if prune_at <= Instant::now() {
                prune_at = Instant::now() + PRUNE_EVERY;
                let runner = self.shared.clone();
                settings.tracker.spawn(async move { prune(&runner).await });
            }
            let next = due.iter().flatten().min().copied();
            let until = next.map_or(SLICE, |at| {
                (at - self.shared.now())
                    .to_std()
                    .unwrap_or_default()
                    .min(SLICE)
            });
            tokio::select! {
                () = tokio::time::sleep(until) => {}
                // A pulse, or a run that somebody asked for.
                () = settings.pulse.woken() => queue_look = Instant::now(),
                () = settings.stop.cancelled() => return,
            }
        }
    }

    /// A scheduled time has come.
    fn fire(&self, slot: &Arc<Slot>, at: DateTime<Utc>) {
        let tracker = &self.shared.settings.tracker;
        let (runner, slot) = (self.shared.clone(), slot.clone());
        let run = new_run(&runner, &slot, at);
        match slot.place(&run) {
            Place::Taken => {
                tracker.spawn(async move { serve(&runner, &slot, run).await });
            }
            Place::Served | Place::Queued { instead_of: None } => {}
            Place::Queued {
                instead_of: Some(waited),
            } => {
                let reason = "a later time took its place in the queue";
                tracker.spawn(async move { skip(&runner, &slot, waited, reason).await });
            }
            Place::Busy if slot.is_poll() => {
                tracing::debug!(
                    job.name = slot.definition.name,
                    "the poll before is still at work"
                );
            }
            Place::Busy => {
                let reason = "the run before was still at work";
                tracker.spawn(async move { skip(&runner, &slot, at, reason).await });
            }
        }
    }

    /// Takes runs out of the queue: those that somebody asked for, and those that were given back.
    fn spawn_queue_look(&self) {
        let runner = self.shared.clone();
        let Ok(looking) = runner.looking.clone().try_lock_owned() else {
            return;
        };
        self.shared.settings.tracker.spawn(async move {
            let _looking = looking;
            if let Err(error) = look(&runner).await {
                // The answer may have been lost, and not the request.
                runner.in_doubt.store(true, Ordering::Relaxed);
                tracing::debug!(error = %chain(&error), "could not look at the queue of runs");
            }
        });
    }
}

impl Shared {
    /// The present instant, as far as this daemon knows what the judge of due times thinks.
    fn now(&self) -> DateTime<Utc> {
        let ahead = TimeDelta::microseconds(self.ahead.load(Ordering::Relaxed));
        self.settings.clock.now() - ahead
    }

    /// Asks how far this machine's clock is ahead. One that is behind does no harm: it runs late.
    async fn compare_clocks(&self) -> StorageResult<()> {
        let ahead = self
            .settings
            .ledger
            .ahead(self.settings.clock.now())
            .await?;
        let micros = ahead.num_microseconds().unwrap_or(i64::MAX).max(0);
        let before = self.ahead.swap(micros, Ordering::Relaxed);
        if micros.abs_diff(before) >= 1_000_000 {
            tracing::warn!(
                ahead_ms = micros / 1000,
                "this machine's clock is {} ms ahead of the database's, which counts",
                micros / 1000
            );
        }
        Ok(())
    }

    fn is_stopping(&self) -> bool {
        self.settings.stop.is_cancelled()
    }
}

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a place for a time that has come, in one step: were it two, the place might be freed
    /// between them, and the time would wait for nobody.
    fn place(&self, run: &Run) -> Place {
        let at = run.scheduled_at;
        let mut busy = self.lock();
        match busy.run {
            None => {
                busy.run = Some((run.id, at));
                Place::Taken
            }
            Some((_, served)) if served == at => Place::Served,
            Some(_) if self.definition.overlap == Overlap::Queue => Place::Queued {
                instead_of: busy.queued.replace(at).filter(|waited| *waited != at),
            },
            Some(_) => Place::Busy,
        }
    }

    /// Frees the place, or gives it to the time that waits, which `next` makes a run. `early` is to
    /// be planned again; told in one step with the place, or the planner might come again with it
    /// and find the place taken.
    fn leave(
        &self,
        early: Option<DateTime<Utc>>,
        next: impl FnOnce(DateTime<Utc>) -> Run,
    ) -> Option<Run> {
        let mut busy = self.lock();
        busy.early = [busy.early, early].into_iter().flatten().min();
        let next = busy.queued.take().map(next);
        busy.run = next.as_ref().map(|run| (run.id, run.scheduled_at));
        next
    }

    /// Takes the place, if it is free.
    fn occupy(&self, run: &Run) -> bool {
        let mut busy = self.lock();
        let is_free = busy.run.is_none();
        if is_free {
            busy.run = Some((run.id, run.scheduled_at));
        }
        is_free
    }

    fn is_at_work_on(&self, run: RunId) -> bool {
        self.lock().run.is_some_and(|(id, _)| id == run)
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
    /// machine was suspended or the clock stepped forward, are skipped: by halves, since a week of
    /// seconds is not to be walked through one by one.
    fn latest_due(
        &self,
        first: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> (DateTime<Utc>, Option<DateTime<Utc>>) {
        // The latest is `at`, or lies behind it and not beyond `end`.
        let (mut at, mut end) = (first, now);
        loop {
            let next = match self.next_after(at) {
                Some(next) if next <= now => next,
                next => return (at, next),
            };
            let middle = at + (end - at) / 2;
            if let Some(later) = self.next_after(middle).filter(|later| *later <= now) {
                at = later;
            } else {
                end = middle;
                at = next;
            }
        }
    }
}

/// Deletes the runs that are past their time.
async fn prune(runner: &Shared) {
    match prune_in_batches(runner).await {
        Ok(0) => tracing::debug!("no run is past its time"),
        Ok(pruned) => tracing::info!(pruned, "deleted {pruned} runs that were past history.keep"),
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "could not delete the runs that are past history.keep"
            );
        }
    }
}

async fn prune_in_batches(runner: &Shared) -> StorageResult<u64> {
    let RunnerSettings {
        ledger,
        clock,
        stop,
        keep_history,
        ..
    } = &runner.settings;
    // The earlier of both clocks: one that runs ahead must not delete what is not due.
    let now = ledger.now().await?.min(clock.now());
    let keep = TimeDelta::from_std(*keep_history).unwrap_or(TimeDelta::MAX);
    let Some(before) = now.checked_sub_signed(keep) else {
        return Ok(0);
    };
    let mut pruned = 0;
    while !runner.is_stopping() {
        let deleted = ledger.prune(before, PRUNE_BATCH).await?;
        pruned += deleted;
        if deleted < u64::from(PRUNE_BATCH) {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(PRUNE_PAUSE) => {}
            () = stop.cancelled() => {}
        }
    }
    Ok(pruned)
}

/// One look at the queue.
async fn look(runner: &Arc<Shared>) -> StorageResult<()> {
    if runner.ahead.load(Ordering::Relaxed) > 0 {
        // It may have been set right.
        runner.compare_clocks().await?;
    }
    if runner.in_doubt.load(Ordering::Relaxed) {
        give_back_what_nobody_holds(runner).await?;
        runner.in_doubt.store(false, Ordering::Relaxed);
    }
    let RunnerSettings {
        ledger,
        daemon,
        clock,
        ..
    } = &runner.settings;
    while !runner.is_stopping() {
        let free: Vec<String> = runner
            .jobs
            .iter()
            .filter(|slot| slot.lock().run.is_none())
            .map(|slot| slot.definition.name.clone())
            .collect();
        if free.is_empty() {
            return Ok(());
        }
        let Some(run) = ledger.claim_queued(&free, *daemon, clock.now()).await? else {
            return Ok(());
        };
        let slot = runner
            .jobs
            .iter()
            .find(|slot| slot.definition.name == run.job && slot.occupy(&run));
        let Some(slot) = slot.cloned() else {
            // A scheduled time came first.
            return ledger
                .give_back(run.id, &run.counts, run.attempt.saturating_sub(1))
                .await;
        };
        let next = runner.clone();
        runner.settings.tracker.spawn(async move {
            execute(&next, &slot, run, true).await;
            if let Some(run) = release(&next, &slot, None) {
                serve(&next, &slot, run).await;
            }
            // There may be more in the queue.
            next.settings.pulse.wake();
        });
    }
    Ok(())
}

/// Finds what the ledger says is this daemon's, while no job here is at work on it: the answer to
/// its claim was lost. Only the look takes runs from the queue and it does so one after another,
/// and a scheduled run has its place before its row, so none is mistaken for lost.
async fn give_back_what_nobody_holds(runner: &Shared) -> StorageResult<()> {
    let RunnerSettings { ledger, daemon, .. } = &runner.settings;
    for run in ledger.running(*daemon).await? {
        let is_held = runner.jobs.iter().any(|slot| slot.is_at_work_on(run.id));
        if !is_held {
            tracing::warn!(job.name = run.job, run.id = %run.id, "the answer to a claim was lost; the run goes back into the queue");
            ledger
                .give_back(run.id, &run.counts, run.attempt.saturating_sub(1))
                .await?;
        }
    }
    Ok(())
}

/// Runs a scheduled time, and those that queue meanwhile, one after another: a job whose runs take
/// longer than its interval is here for ever.
async fn serve(runner: &Shared, slot: &Slot, run: Run) {
    let mut next = Some(run);
    while let Some(run) = next {
        let mut early = None;
        if slot.is_poll() {
            execute(runner, slot, run, false).await;
        } else {
            match claim(runner, slot, &run).await {
                Claimed::Yes => execute(runner, slot, run, true).await,
                Claimed::No => {}
                Claimed::Early => early = Some(run.scheduled_at),
            }
        }
        next = release(runner, slot, early);
    }
}

/// Ends the run's time in its place. Answers the run that has it now.
fn release(runner: &Shared, slot: &Slot, early: Option<DateTime<Utc>>) -> Option<Run> {
    let next = slot.leave(early, |at| new_run(runner, slot, at));
    if early.is_some() {
        runner.settings.pulse.wake();
    }
    next
}

fn new_run(runner: &Shared, slot: &Slot, at: DateTime<Utc>) -> Run {
    let now = runner.settings.clock.now();
    Run {
        id: RunId::generate(now),
        job: slot.definition.name.clone(),
        scheduled_at: at,
        started_at: Some(now),
        finished_at: None,
        trigger: Trigger::Schedule,
        attempt: 1,
        daemon: Some(runner.settings.daemon),
        state: RunState::Running,
        counts: Counts::new(),
        error: None,
    }
}

/// Claims a scheduled time, waiting for a database that is away.
async fn claim(runner: &Shared, slot: &Slot, run: &Run) -> Claimed {
    let RunnerSettings {
        ledger,
        clock,
        daemon,
        stop,
        ..
    } = &runner.settings;
    let mut has_failed = false;
    while !runner.is_stopping() {
        let claim = ledger
            .claim(
                run.id,
                &run.job,
                run.scheduled_at,
                run.trigger,
                *daemon,
                clock.now(),
            )
            .await;
        let compared = match claim {
            Ok(Claim::Claimed) => return Claimed::Yes,
            Ok(Claim::Taken) => {
                tracing::debug!(job.name = run.job, run.scheduled_at = %format_time(run.scheduled_at), "the time is taken");
                return Claimed::No;
            }
            Ok(Claim::NotDue) => runner.compare_clocks().await,
            Err(error) => Err(error),
        };
        let Err(error) = compared else {
            if runner.now() < run.scheduled_at {
                return Claimed::Early;
            }
            // It has become due meanwhile.
            continue;
        };
        if !has_failed {
            tracing::warn!(job.name = slot.definition.name, error = %chain(&error), "cannot claim a run; trying again");
        }
        has_failed = true;
        tokio::select! {
            () = tokio::time::sleep(STORAGE_RETRY) => {}
            () = stop.cancelled() => {}
        }
    }
    if has_failed {
        // The answer may have been lost, and not the request. Not waited for: the database is away.
        if let Err(error) = ledger.give_back(run.id, &run.counts, 0).await {
            tracing::debug!(run.id = %run.id, error = %chain(&error), "could not give a run back");
        }
    }
    Claimed::No
}

/// Leaves a row for a time that does not run.
async fn skip(runner: &Shared, slot: &Slot, at: DateTime<Utc>, reason: &str) {
    let mut run = new_run(runner, slot, at);
    run.started_at = None;
    run.finished_at = Some(runner.settings.clock.now());
    run.attempt = 0;
    run.state = RunState::Skipped;
    run.error = Some(reason.to_owned());
    let lag = runner.now() - at;
    tell(runner, slot, &run, lag.num_milliseconds(), Duration::ZERO);
    let ledger = &runner.settings.ledger;
    for tries_left in (0..SKIP_TRIES).rev() {
        let Err(error) = ledger.record(&run).await else {
            return;
        };
        if tries_left == 0 || !error.is_transient() || runner.is_stopping() {
            tracing::warn!(job.name = run.job, error = %chain(&error), "could not record a skipped time");
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(STORAGE_RETRY) => {}
            // Once more, and not again.
            () = runner.settings.stop.cancelled() => {}
        }
    }
}

/// Runs until it succeeds, may not be tried again, or the daemon stops. `has_row`: the run was
/// claimed, so that its row is to be finished; otherwise a row is written where there is something
/// to say.
async fn execute(runner: &Shared, slot: &Slot, mut run: Run, has_row: bool) {
    let began = Instant::now();
    let lag = runner.now() - run.scheduled_at;
    let report = Report::default();
    let (state, error) = loop {
        if runner.is_stopping() {
            // Claimed while the daemon began to stop.
            return give_back(runner, &run, has_row).await;
        }
        let span = tracing::info_span!(
            "run", job.name = %run.job, run.id = %run.id, run.attempt = run.attempt
        );
        let ended = attempt(runner, slot, &run, &report).instrument(span).await;
        add(&mut run.counts, report.take());
        match ended {
            Attempt::Succeeded => break (RunState::Succeeded, None),
            Attempt::GivenBack => return give_back(runner, &run, has_row).await,
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
                    () = runner.settings.stop.cancelled() => return give_back(runner, &run, has_row).await,
                }
                run.attempt += 1;
                if has_row
                    && let Err(error) = runner
                        .settings
                        .ledger
                        .begin_attempt(run.id, run.attempt)
                        .await
                {
                    tracing::debug!(run.id = %run.id, error = %chain(&error), "could not count the attempt");
                }
            }
        }
    };
    run.state = state;
    // A NUL, such as in the message of a panic, is refused by PostgreSQL, and the run would stay
    // `running` for ever.
    run.error = error.map(|error| error.replace('\0', "\u{fffd}"));
    run.finished_at = Some(runner.settings.clock.now());
    tell(runner, slot, &run, lag.num_milliseconds(), began.elapsed());
    let is_worth_a_row = !run.counts.is_empty() || run.state != RunState::Succeeded;
    if has_row {
        finish(runner, &run).await;
    } else if is_worth_a_row {
        insist(runner, &run, || runner.settings.ledger.record(&run)).await;
    }
}

/// One attempt, in a task of its own, so that a panic ends only the attempt.
async fn attempt(runner: &Shared, slot: &Slot, run: &Run, report: &Report) -> Attempt {
    let stop = runner.settings.stop.child_token();
    let context = RunContext {
        run: run.id,
        scheduled_at: run.scheduled_at,
        stop: stop.clone(),
        report: report.clone(),
    };
    let job = slot.job.clone();
    let mut task = runner
        .settings
        .tracker
        .spawn(async move { job.run(&context).await }.instrument(tracing::Span::current()));
    let timeout = slot.definition.timeout;
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = runner.settings.abort.cancelled() => {
            task.abort();
            return Attempt::GivenBack;
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
        Ok(Ok(Ending::Finished)) => Attempt::Succeeded,
        Ok(Ok(Ending::Unfinished)) => Attempt::GivenBack,
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
async fn give_back(runner: &Shared, run: &Run, has_row: bool) {
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
    let ledger = &runner.settings.ledger;
    insist(runner, run, || {
        ledger.give_back(run.id, &run.counts, attempts_spent)
    })
    .await;
}

/// Writes the run's end.
async fn finish(runner: &Shared, run: &Run) {
    let finish = Finish {
        state: run.state,
        attempt: run.attempt,
        counts: run.counts.clone(),
        error: run.error.clone(),
        at: run
            .finished_at
            .unwrap_or_else(|| runner.settings.clock.now()),
    };
    let ledger = &runner.settings.ledger;
    if insist(runner, run, || ledger.finish(run.id, &finish)).await {
        return;
    }
    // Refused for what it says, perhaps. The state alone, or the run would look to be at work for ever.
    let error = "how it ended could not be written; see the log".to_owned();
    let bare = Finish {
        counts: Counts::new(),
        error: Some(error),
        ..finish
    };
    insist(runner, run, || ledger.finish(run.id, &bare)).await;
}

/// Writes what became of a run, waiting for a database that is away as long as the daemon may: also
/// while it drains, since a run that stays `running` without a daemon is a riddle. Answers whether
/// it is written.
async fn insist<F>(runner: &Shared, run: &Run, mut write: impl FnMut() -> F) -> bool
where
    F: Future<Output = StorageResult<()>>,
{
    let mut has_failed = false;
    loop {
        let Err(error) = write().await else {
            return true;
        };
        if !error.is_transient() || runner.settings.abort.is_cancelled() {
            tracing::error!(run.id = %run.id, error = %chain(&error), "could not record what became of a run");
            return false;
        }
        if !has_failed {
            tracing::warn!(run.id = %run.id, error = %chain(&error), "could not record what became of a run; trying again");
        }
        has_failed = true;
        tokio::select! {
            () = tokio::time::sleep(STORAGE_RETRY) => {}
            // Once more, and not again.
            () = runner.settings.abort.cancelled() => {}
        }
    }
}

fn add(counts: &mut Counts, more: Counts) {
    for (name, count) in more {
        *counts.entry(name).or_default() += count;
    }
}

/// The one line that each run ends in.
fn tell(runner: &Shared, slot: &Slot, run: &Run, lag_ms: i64, took: Duration) {
    runner.settings.metrics.run_ended(run, lag_ms, took);
    let counts = serde_json::to_string(&run.counts).unwrap_or_default();
    let next_at = slot
        .next_after(runner.settings.clock.now())
        .map(format_time);
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
                node.id = %runner.settings.daemon,
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
        (state, _) => line!(error, "{name} {state}"),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use async_trait::async_trait;

    use super::*;
    use crate::jobs::retry::RetryPolicy;
    use crate::jobs::schedule::Schedule;

    struct Nothing;

    #[async_trait]
    impl Job for Nothing {
        async fn run(&self, _context: &RunContext) -> Result<Ending, JobError> {
            Ok(Ending::Finished)
        }
    }

    fn queueing() -> Slot {
        Slot {
            definition: JobDefinition {
                name: "job".to_owned(),
                schedule: Schedule::every(Duration::from_secs(1)).unwrap(),
                enabled: true,
                timeout: Duration::from_secs(1),
                overlap: Overlap::Queue,
                retry: RetryPolicy {
                    attempts: NonZeroU32::MIN,
                    ..RetryPolicy::default()
                },
                kind: JobKind::RealtimeDelivery { batch: 1 },
            },
            job: Arc::new(Nothing),
            busy: Mutex::default(),
        }
    }

    fn at(second: i64) -> Run {
        let scheduled_at = DateTime::from_timestamp(second, 0).unwrap();
        Run {
            id: RunId::generate(scheduled_at),
            job: "job".to_owned(),
            scheduled_at,
            started_at: None,
            finished_at: None,
            trigger: Trigger::Schedule,
            attempt: 1,
            daemon: None,
            state: RunState::Running,
            counts: Counts::new(),
            error: None,
        }
    }

    #[test]
    fn of_the_times_that_come_during_a_run_the_last_waits() {
        let slot = queueing();
        assert_eq!(slot.place(&at(1)), Place::Taken);
        assert_eq!(slot.place(&at(1)), Place::Served);
        assert_eq!(slot.place(&at(2)), Place::Queued { instead_of: None });
        let instead_of = Some(at(2).scheduled_at);
        assert_eq!(slot.place(&at(3)), Place::Queued { instead_of });
        let next = slot.leave(None, |_| at(3)).unwrap();
        assert_eq!(slot.place(&next), Place::Served);
        assert_eq!(slot.leave(None, |_| at(4)), None);
        assert_eq!(slot.place(&at(4)), Place::Taken);
    }

    #[test]
    fn a_time_that_comes_while_a_run_ends_never_waits_for_nobody() {
        let slot = queueing();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for second in 0..20_000 {
                    slot.place(&at(second));
                }
            });
            scope.spawn(|| {
                for _ in 0..20_000 {
                    slot.leave(None, |at| Run {
                        scheduled_at: at,
                        ..self::at(0)
                    });
                    let busy = slot.lock();
                    assert!(busy.run.is_some() || busy.queued.is_none());
                }
            });
        });
    }
}
