//! The runner: keeps time, claims what is due, and runs it to its end.
//!
//! The planner sleeps to the next due instant in short slices, so that a step of the clock or a
//! suspended machine is noticed, and never waits for a run: each run is a task of its own. A
//! scheduled time is claimed by a unique row, judged by the database's clock, and the planner keeps
//! to that clock. The delivery poll is the exception: it runs once on each daemon, and a minute of
//! polls that found nothing is one row.
//!
//! - [`lease`] keeps what is claimed, and takes over what other daemons left;
//! - [`missed`] gives a reason to each time that passed without a run, or makes up for it;
//! - [`work`] runs a claimed time to its end;
//! - [`history`] deletes runs that are past their time.

mod history;
mod lease;
mod missed;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use self::lease::Held;
pub(super) use self::missed::while_paused;
use super::{Alerts, Job, Pulse};
use crate::config::{JobDefinition, JobKind, Overlap};
use crate::domain::{Clock, RunId, format_time};
use crate::storage::{Claim, Counts, JobLedger, Run, RunState, StorageError, Trigger};
use crate::telemetry::{Metrics, chain};

/// The planner sleeps no longer than this at a time: a step of the clock shows within it.
const SLICE: Duration = Duration::from_millis(250);
/// Between two tries to reach a database that is away.
const STORAGE_RETRY: Duration = Duration::from_secs(1);
/// Clocks that differ by less agree.
const TOLERANCE: TimeDelta = TimeDelta::milliseconds(5);
/// How often a skipped time is tried to be written. Not for ever, as the end of a run is: while the
/// database is away there may be one each second.
const SKIP_TRIES: u32 = 10;
/// Where thousands of jobs are due in one second, so many of them are claimed and at work at once. More
/// would only wait for the database, and everybody else behind them.
const PLACES: usize = 64;
/// A run has its place for so long at most: those that take their time must not keep others from
/// beginning.
const PLACE_LASTS: Duration = Duration::from_millis(250);
/// A job whose times lie no further apart waits for no place: it would be late for each of them.
const FREQUENT: TimeDelta = TimeDelta::minutes(1);
/// How often runs that are past their time are deleted. A delivery poll that pushed something is a
/// row: some thousands an hour.
const PRUNE_EVERY: Duration = Duration::from_hours(1);

/// What a runner shares with the rest of the daemon.
#[derive(Clone)]
pub struct RunnerSettings {
    /// The ledger of runs.
    pub ledger: Arc<dyn JobLedger>,
    /// Whether other daemons may work on the same database, and take over what this one holds.
    pub is_shared: bool,
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
    /// Hear how runs ended; a reload puts others in their place.
    pub alerts: Option<watch::Receiver<Arc<Alerts>>>,
    /// How long runs are kept after their end.
    pub keep_history: Duration,
}

/// The jobs of this daemon.
pub struct Runner {
    shared: Arc<Shared>,
}

/// Changes the jobs of a runner that is at work.
#[derive(Clone)]
pub struct RunnerHandle {
    shared: Weak<Shared>,
}

/// What the planner and the runs share.
struct Shared {
    settings: RunnerSettings,
    jobs: RwLock<Arc<[Arc<Slot>]>>,
    /// Told when the jobs were replaced.
    replaced: Notify,
    /// What the clock that judges due times said last, and when. The planner keeps to that one, which
    /// goes on by the monotonic clock between two answers: steps of this machine's do not matter.
    judge: Mutex<Option<(Instant, DateTime<Utc>)>>,
    /// How far this machine's clock is ahead of the judge's, as was said last.
    said_ahead: Mutex<TimeDelta>,
    /// Held by the look at the queue: two at once would take two runs of one job.
    looking: Arc<tokio::sync::Mutex<()>>,
    /// An answer of the ledger was lost: a run may be this daemon's without its knowing.
    in_doubt: AtomicBool,
    /// When another daemon's lease will be over, if none renews it.
    lapse: Mutex<Option<DateTime<Utc>>>,
    /// The runs whose leases this daemon keeps.
    held: Mutex<BTreeMap<RunId, Held>>,
    /// The jobs that are paused, as of the last look.
    paused: Mutex<BTreeSet<String>>,
    /// Places for the times of jobs that are not frequent.
    places: Arc<Semaphore>,
    gone: Gone,
}

/// Tells when the planner and the last run are gone.
#[derive(Default)]
struct Gone {
    token: CancellationToken,
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

/// A job with its place: at most one run at a time.
struct Slot {
    definition: JobDefinition,
    job: Arc<dyn Job>,
    /// Kept when the definition is replaced while a run is at work.
    busy: Arc<Mutex<Busy>>,
}

#[derive(Default)]
struct Busy {
    /// Who has the place, and for which time; known here before it is claimed in the ledger.
    run: Option<(RunId, DateTime<Utc>)>,
    /// A time that was not due by the database's clock: to be planned again.
    early: Option<DateTime<Utc>>,
    /// Polls of this minute that found nothing, and the minute.
    empty: Option<(DateTime<Utc>, u64)>,
}

/// What became of a time that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The place was free; it is the run's now.
    Taken,
    /// It is served already: the clock stepped back meanwhile.
    Served,
    /// The run before is still at work.
    Busy,
}

/// What came of a claim.
#[derive(Debug, PartialEq, Eq)]
enum Claimed {
    Yes,
    /// Somebody else has it, the job is paused, or the daemon stops.
    No,
    /// Another run of the job is at work on another daemon.
    Busy,
    /// The planner is to come again with it.
    Early,
}

/// A job's place in the plan.
struct Planned {
    slot: Arc<Slot>,
    due: Option<DateTime<Utc>>,
    /// Between the next two times.
    gap: TimeDelta,
}

impl RunnerHandle {
    /// Replaces the jobs. What runs goes on as it began; a job whose name stays keeps its place.
    pub fn replace(&self, jobs: Vec<(JobDefinition, Arc<dyn Job>)>) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let before = shared.jobs();
        let jobs = jobs.into_iter().map(|(definition, job)| {
            let same = before
                .iter()
                .find(|slot| slot.definition.name == definition.name);
            Arc::new(Slot {
                busy: same.map_or_else(Arc::default, |slot| slot.busy.clone()),
                definition,
                job,
            })
        });
        let jobs: Arc<[Arc<Slot>]> = jobs.collect();
        *shared.jobs.write().unwrap_or_else(PoisonError::into_inner) = jobs;
        shared.replaced.notify_one();
    }
}

impl Runner {
    /// A runner of `jobs`.
    #[must_use]
    pub fn new(settings: RunnerSettings, jobs: Vec<(JobDefinition, Arc<dyn Job>)>) -> Self {
        let jobs = jobs.into_iter().map(|(definition, job)| {
            Arc::new(Slot {
                definition,
                job,
                busy: Arc::default(),
            })
        });
        Self {
            shared: Arc::new(Shared {
                settings,
                jobs: RwLock::new(jobs.collect()),
                replaced: Notify::new(),
                judge: Mutex::default(),
                said_ahead: Mutex::default(),
                looking: Arc::default(),
                in_doubt: AtomicBool::new(false),
                lapse: Mutex::default(),
                held: Mutex::default(),
                paused: Mutex::default(),
                places: Arc::new(Semaphore::new(PLACES)),
                gone: Gone::default(),
            }),
        }
    }

    /// Changes its jobs while it runs.
    #[must_use]
    pub fn handle(&self) -> RunnerHandle {
        RunnerHandle {
            shared: Arc::downgrade(&self.shared),
        }
    }

    /// Keeps time until the daemon stops.
    pub async fn run(self) {
        let shared = self.shared;
        let settings = &shared.settings;
        let keep = lease::keep(Arc::downgrade(&shared), shared.gone.token.clone());
        settings.tracker.spawn(keep);
        let mut last_look = shared.now();
        let mut plan: Vec<Planned> = Vec::new();
        replan(&mut plan, &shared.jobs(), last_look);
        spawn_start(&shared, last_look);
        let mut queue_look = Instant::now();
        let mut prune_at = Instant::now();
        loop {
            let now = shared.now();
            settings.pulse.seen();
            if now < last_look {
                // What lies ahead is planned anew. Times that ran already are taken, so none runs
                // twice.
                let back = last_look - now;
                if back >= TimeDelta::seconds(1) {
                    tracing::warn!(back_ms = back.num_milliseconds(), "the clock stepped back");
                }
                for planned in &mut plan {
                    planned.due = planned.slot.next_after(now);
                }
            }
            last_look = now;
            for planned in &mut plan {
                fire_what_is_due(&shared, planned, now);
            }
            if queue_look <= Instant::now() {
                queue_look = Instant::now() + Duration::from_secs(1);
                lease::spawn_look(&shared);
            }
            if prune_at <= Instant::now() {
                prune_at = Instant::now() + PRUNE_EVERY;
                let shared = shared.clone();
                settings
                    .tracker
                    .spawn(async move { history::prune(&shared).await });
            }
            let now = shared.now();
            let next = plan.iter().filter_map(|planned| planned.due).min();
            let lapse = *shared.lapse.lock().unwrap_or_else(PoisonError::into_inner);
            let until = [next, lapse]
                .into_iter()
                .flatten()
                .map(|at| (at - now).to_std().unwrap_or_default())
                .fold(SLICE, Duration::min);
            tokio::select! {
                () = tokio::time::sleep(until) => {
                    if lapse.is_some_and(|at| at <= shared.now()) {
                        *shared.lapse.lock().unwrap_or_else(PoisonError::into_inner) = None;
                        queue_look = Instant::now();
                    }
                }
                () = settings.pulse.woken() => {
                    if settings.pulse.was_asked() {
                        queue_look = Instant::now();
                    }
                }
                () = shared.replaced.notified() => replan(&mut plan, &shared.jobs(), shared.now()),
                () = settings.stop.cancelled() => break,
            }
        }
        work::record_last_minutes(&shared).await;
    }
}

/// Plans the jobs as they are now. What is planned already stays, so that a time that comes while the
/// jobs are replaced is not passed over.
fn replan(plan: &mut Vec<Planned>, jobs: &[Arc<Slot>], now: DateTime<Utc>) {
    let before = std::mem::take(plan);
    plan.extend(jobs.iter().map(|slot| {
        let due = before
            .iter()
            .find(|old| {
                let (old, new) = (&old.slot.definition, &slot.definition);
                old.name == new.name && old.schedule == new.schedule && old.enabled == new.enabled
            })
            .map_or_else(|| slot.next_after(now), |old| old.due);
        let after = due.and_then(|due| slot.next_after(due));
        let gap = due.zip(after).map(|(due, after)| after - due);
        Planned {
            slot: slot.clone(),
            due,
            gap: gap.unwrap_or(TimeDelta::MAX),
        }
    }));
    // What comes often first: for it a moment is much.
    plan.sort_by_key(|planned| planned.gap);
}

/// Fires the newest time of a job that is due. Those before it, which passed while the daemon was
/// stopped or the clock stepped forward, are looked into beside.
fn fire_what_is_due(shared: &Arc<Shared>, planned: &mut Planned, now: DateTime<Utc>) {
    let slot = &planned.slot;
    if let Some(early) = slot.lock().early.take() {
        planned.due = slot.next_after(now.min(early - TimeDelta::microseconds(1)));
    }
    let Some(first) = planned.due.filter(|at| *at <= now) else {
        return;
    };
    let (latest, next) = slot.latest_due(first, now);
    planned.due = next;
    if slot.is_poll() {
        // Each poll finds what the ones before it would have found.
        fire(shared, slot, latest, true);
        return;
    }
    let is_late = now - latest > missed::GRACE;
    if !is_late {
        fire(shared, slot, latest, planned.gap <= FREQUENT);
    }
    if is_late || latest > first {
        let until = if is_late {
            latest
        } else {
            latest - TimeDelta::microseconds(1)
        };
        missed::spawn(shared, slot, first, until);
    }
}

/// Finds where the installation stands: how wrong this machine's clock is, and which times passed
/// while nothing ran.
fn spawn_start(shared: &Arc<Shared>, start: DateTime<Utc>) {
    let shared = shared.clone();
    let tracker = shared.settings.tracker.clone();
    tracker.spawn(async move { missed::since_the_last_times(&shared, start).await });
}

/// A scheduled time has come.
fn fire(shared: &Arc<Shared>, slot: &Arc<Slot>, at: DateTime<Utc>, is_frequent: bool) {
    if slot.is_poll() && shared.is_paused(&slot.definition.name) {
        return;
    }
    let tracker = &shared.settings.tracker;
    let (shared, slot) = (shared.clone(), slot.clone());
    let run = new_run(&shared, &slot, at);
    match slot.place(&run) {
        Place::Taken => {
            tracker.spawn(async move {
                if is_frequent {
                    serve(&shared, &slot, run).await;
                } else {
                    serve_in_turn(&shared, &slot, run).await;
                }
            });
        }
        Place::Served => {}
        Place::Busy if slot.is_poll() => {
            tracing::debug!(
                job.name = slot.definition.name,
                "the poll before is still at work"
            );
        }
        Place::Busy => {
            tracker.spawn(async move { pass_over(&shared, &slot, run).await });
        }
    }
}

impl Shared {
    fn jobs(&self) -> Arc<[Arc<Slot>]> {
        self.jobs
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The present instant by the clock that judges due times, as far as this daemon knows it.
    fn now(&self) -> DateTime<Utc> {
        let judge = *self.judge.lock().unwrap_or_else(PoisonError::into_inner);
        match judge {
            Some((asked, said)) => said + asked.elapsed(),
            None => self.settings.clock.now(),
        }
    }

    /// Learns what the judge of due times said in answer to a question that was sent at `asked`.
    fn compare_clocks(&self, asked: Instant, judge: DateTime<Utc>) {
        let answered = Instant::now();
        let took = TimeDelta::from_std(answered - asked).unwrap_or(TimeDelta::MAX);
        let now = judge + took / 2;
        // What the question took says nothing about the clocks.
        let tolerance = took.max(TOLERANCE);
        let known = self.now();
        let is_known = (known - now).abs() <= tolerance;
        {
            let mut judge = self.judge.lock().unwrap_or_else(PoisonError::into_inner);
            if judge.is_none() || !is_known {
                *judge = Some((answered, if is_known { known } else { now }));
            }
        }
        let ahead = self.settings.clock.now() - now;
        let mut said = self
            .said_ahead
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if (ahead - *said).abs() >= TimeDelta::seconds(1) + took {
            let side = if ahead < TimeDelta::zero() {
                "behind"
            } else {
                "ahead of"
            };
            tracing::warn!(
                ahead_ms = ahead.num_milliseconds(),
                "this machine's clock is {} ms {side} the database's, which counts",
                ahead.num_milliseconds().abs()
            );
            *said = ahead;
        }
    }

    /// Asks the judge of due times for its clock.
    async fn ask_the_clock(&self) -> Result<(), StorageError> {
        if self.settings.is_shared {
            let asked = Instant::now();
            let judge = self.settings.ledger.now().await?;
            self.compare_clocks(asked, judge);
        }
        Ok(())
    }

    fn is_stopping(&self) -> bool {
        self.settings.stop.is_cancelled()
    }

    fn is_paused(&self, job: &str) -> bool {
        let paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        paused.contains(job)
    }

    fn slot(&self, job: &str) -> Option<Arc<Slot>> {
        let jobs = self.jobs();
        jobs.iter()
            .find(|slot| slot.definition.name == job)
            .cloned()
    }

    /// Waits a moment before a database that is away is asked again.
    async fn wait_for_storage(&self) {
        tokio::select! {
            () = tokio::time::sleep(STORAGE_RETRY) => {}
            () = self.settings.stop.cancelled() => {}
        }
    }
}

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a place for a time that has come, in one step: were it two, the place might be freed
    /// between them.
    fn place(&self, run: &Run) -> Place {
        let at = run.scheduled_at;
        let mut busy = self.lock();
        match busy.run {
            None => {
                busy.run = Some((run.id, at));
                Place::Taken
            }
            Some((_, served)) if served == at => Place::Served,
            Some(_) => Place::Busy,
        }
    }

    /// Frees the place. `early` is to be planned again; told in one step with the place, or the
    /// planner might come again with it and find the place taken.
    fn leave(&self, early: Option<DateTime<Utc>>) {
        let mut busy = self.lock();
        busy.early = [busy.early, early].into_iter().flatten().min();
        busy.run = None;
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

    /// The newest time that is due, and the one after it. By halves, since a week of seconds is not
    /// to be walked through one by one.
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

/// Runs a scheduled time when its turn has come.
async fn serve_in_turn(shared: &Shared, slot: &Slot, run: Run) {
    let place = tokio::select! {
        biased;
        place = shared.places.clone().acquire_owned() => place,
        () = shared.settings.stop.cancelled() => {
            // Nothing is claimed: another daemon may have the time, or the next looks into it.
            return slot.leave(None);
        }
    };
    let mut serving = std::pin::pin!(serve(shared, slot, run));
    tokio::select! {
        () = &mut serving => return,
        () = tokio::time::sleep(PLACE_LASTS) => drop(place),
    }
    serving.await;
}

/// Runs a scheduled time.
async fn serve(shared: &Shared, slot: &Slot, run: Run) {
    if slot.is_poll() {
        work::execute(shared, slot, run, false).await;
        slot.leave(None);
        return;
    }
    let early = match claim(shared, slot, &run).await {
        Claimed::Yes => {
            work::execute(shared, slot, run, true).await;
            None
        }
        Claimed::No => None,
        Claimed::Busy => {
            pass_over(shared, slot, run).await;
            None
        }
        Claimed::Early => Some(run.scheduled_at),
    };
    slot.leave(early);
    // There may be something in the queue.
    shared.settings.pulse.wake();
}

fn new_run(shared: &Shared, slot: &Slot, at: DateTime<Utc>) -> Run {
    let now = shared.now();
    Run {
        id: RunId::generate(now),
        job: slot.definition.name.clone(),
        scheduled_at: at,
        started_at: Some(now),
        finished_at: None,
        trigger: Trigger::Schedule,
        attempt: 1,
        daemon: Some(shared.settings.daemon),
        fence: 1,
        state: RunState::Running,
        counts: Counts::new(),
        error: None,
    }
}

/// Asks the ledger about a time, waiting for a database that is away. Answers with the instant of the
/// question; `None`: the daemon stops.
async fn ask<F>(
    shared: &Shared,
    run: &Run,
    mut question: impl FnMut() -> F,
) -> Option<(Claim, Instant)>
where
    F: Future<Output = Result<Claim, StorageError>>,
{
    let mut has_failed = false;
    while !shared.is_stopping() {
        let asked = Instant::now();
        match question().await {
            Ok(claim) => return Some((claim, asked)),
            Err(error) => {
                // The answer may have been lost, and not the request.
                shared.in_doubt.store(true, Ordering::Relaxed);
                if !has_failed {
                    tracing::warn!(job.name = run.job, error = %chain(&error), "cannot claim a run; trying again");
                }
                has_failed = true;
            }
        }
        shared.wait_for_storage().await;
    }
    None
}

/// Claims a scheduled time.
async fn claim(shared: &Shared, slot: &Slot, run: &Run) -> Claimed {
    let RunnerSettings { ledger, daemon, .. } = &shared.settings;
    loop {
        let claim = ask(shared, run, || {
            ledger.claim(
                run.id,
                &run.job,
                run.scheduled_at,
                run.trigger,
                *daemon,
                shared.now(),
            )
        });
        match claim.await {
            Some((Claim::Claimed, asked)) => {
                shared.hold(run.fence(), asked);
                return Claimed::Yes;
            }
            Some((Claim::Taken, _)) => {
                tracing::debug!(job.name = run.job, run.scheduled_at = %format_time(run.scheduled_at), "the time is taken");
                return Claimed::No;
            }
            Some((Claim::Paused, _)) => {
                tracing::debug!(job.name = run.job, "the job is paused");
                return Claimed::No;
            }
            Some((Claim::Busy, _)) => return Claimed::Busy,
            Some((Claim::NotDue, _)) => {
                if let Err(error) = shared.ask_the_clock().await {
                    tracing::debug!(error = %chain(&error), "could not ask for the database's clock");
                    shared.wait_for_storage().await;
                }
                if shared.now() < run.scheduled_at {
                    return Claimed::Early;
                }
                // It has become due meanwhile, or will in a moment.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            None => {
                // It may have been claimed. Not waited for: the database is away.
                let given_back = ledger.give_back(run.fence(), &run.counts, 0).await;
                if let Err(error) = given_back {
                    tracing::debug!(run.id = %run.id, error = %chain(&error), "could not give a run back");
                }
                tracing::debug!(job.name = slot.definition.name, "stopping before the claim");
                return Claimed::No;
            }
        }
    }
}

/// A time that came during a run waits for its end, or is skipped.
async fn pass_over(shared: &Shared, slot: &Slot, run: Run) {
    if slot.definition.overlap == Overlap::Skip {
        return skip(shared, slot, run, "the run before was still at work").await;
    }
    let ledger = &shared.settings.ledger;
    let queued = ask(shared, &run, || {
        ledger.queue(run.id, &run.job, run.scheduled_at, shared.now())
    });
    match queued.await {
        Some((Claim::NotDue, _)) => {
            if let Err(error) = shared.ask_the_clock().await {
                tracing::debug!(error = %chain(&error), "could not ask for the database's clock");
            }
            slot.lock().early = Some(run.scheduled_at);
        }
        // The run before it may have ended meanwhile.
        Some(_) => shared.settings.pulse.wake(),
        None => {}
    }
}

/// Leaves a row for a time that does not run.
async fn skip(shared: &Shared, slot: &Slot, mut run: Run, reason: &str) {
    run.started_at = None;
    run.finished_at = Some(shared.now().max(run.scheduled_at));
    run.attempt = 0;
    run.daemon = None;
    run.state = RunState::Skipped;
    run.error = Some(reason.to_owned());
    let lag = shared.now() - run.scheduled_at;
    let ledger = &shared.settings.ledger;
    for tries_left in (0..SKIP_TRIES).rev() {
        match ledger.record(&run).await {
            Ok(true) => {
                work::tell(shared, slot, &run, lag.num_milliseconds(), Duration::ZERO);
                return;
            }
            // Another daemon runs it.
            Ok(false) => return,
            Err(error) if tries_left == 0 || !error.is_transient() || shared.is_stopping() => {
                tracing::warn!(job.name = run.job, error = %chain(&error), "could not record a skipped time");
                return;
            }
            Err(_) => shared.wait_for_storage().await,
        }
    }
}
