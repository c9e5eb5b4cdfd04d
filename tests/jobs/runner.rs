//! The runner on real ledgers, with a clock that the test moves.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::BoxFuture;
use timelined::config::{CatchUp, JobDefinition, JobKind, Overlap};
use timelined::domain::{Clock, RunId, Subject, SystemClock};
use timelined::jobs::retry::RetryPolicy;
use timelined::jobs::schedule::Schedule;
use timelined::jobs::{Ending, Job, JobError, Pulse, RunContext, Runner, RunnerSettings};
use timelined::storage::{
    Claim, Counts, Fence, Finish, Glance, JobAction, JobLedger, Pause, Renewed, Run, RunState,
    SKIPPED, Settled, StorageError, StorageResult, Trigger,
};
use timelined::telemetry::Metrics;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::support::builders::{subject, worker};
use crate::support::daemon::eventually;
use crate::support::database::{Database, Engine, run};

const PATIENCE: Duration = Duration::from_secs(20);
const SECOND: TimeDelta = TimeDelta::seconds(1);

/// The machine's clock, set wrong.
#[derive(Clone, Default)]
struct Wrong(Arc<Mutex<TimeDelta>>);

impl Wrong {
    fn by(by: TimeDelta) -> Self {
        Self(Arc::new(Mutex::new(by)))
    }

    fn step(&self, by: TimeDelta) {
        *self.0.lock().unwrap() += by;
    }
}

impl Clock for Wrong {
    fn now(&self) -> DateTime<Utc> {
        SystemClock.now() + *self.0.lock().unwrap()
    }
}

type Work = dyn Fn(RunContext) -> BoxFuture<'static, Result<Report, JobError>> + Send + Sync;

/// A job that does what a test says, and notes for which times it did.
struct Scripted {
    work: Box<Work>,
    times: Arc<Mutex<Vec<DateTime<Utc>>>>,
}

#[async_trait]
impl Job for Scripted {
    async fn run(&self, context: &RunContext) -> Result<Ending, JobError> {
        self.times.lock().unwrap().push(context.scheduled_at);
        let report = (self.work)(context.clone()).await?;
        context.report.add("deleted", report.deleted);
        Ok(if report.is_unfinished {
            Ending::Unfinished
        } else {
            Ending::Finished
        })
    }
}

/// What the work of a test answers.
#[derive(Default)]
struct Report {
    deleted: u64,
    is_unfinished: bool,
}

/// What a job of the tests does.
fn work<F>(
    work: impl Fn(RunContext) -> F + Send + Sync + 'static,
) -> impl Fn(RunContext) -> BoxFuture<'static, Result<Report, JobError>>
where
    F: Future<Output = Result<Report, JobError>> + Send + 'static,
{
    move |context| Box::pin(work(context))
}

fn report(deleted: u64) -> Report {
    Report {
        deleted,
        is_unfinished: false,
    }
}

/// Due each ten seconds, which a moving clock reaches only when a test lets it.
fn definition(name: &str) -> JobDefinition {
    JobDefinition {
        name: name.to_owned(),
        schedule: Schedule::every(Duration::from_secs(10)).unwrap(),
        enabled: true,
        timeout: Duration::from_secs(30),
        overlap: Overlap::Skip,
        catch_up: CatchUp::Once,
        catch_up_within: Duration::from_hours(12),
        retry: RetryPolicy {
            attempts: NonZeroU32::new(3).unwrap(),
            first: Duration::from_millis(40),
            max: Duration::from_millis(60),
        },
        kind: JobKind::PurgeExpired {
            older_than: Duration::from_secs(1),
            max_rate: 0,
            dry_run: false,
        },
    }
}

fn every(millis: u64, name: &str) -> JobDefinition {
    let schedule = Schedule::every(Duration::from_millis(millis)).unwrap();
    JobDefinition {
        schedule,
        ..definition(name)
    }
}

/// A daemon, as far as jobs go.
struct Daemon {
    clock: Wrong,
    ledger: Arc<dyn JobLedger>,
    pulse: Pulse,
    tracker: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
    jobs: Vec<(JobDefinition, Arc<dyn Job>)>,
    id: Uuid,
    is_shared: bool,
}

impl Daemon {
    fn new(db: &Database, number: u64) -> Self {
        Self::with(&db.ledger, db, number)
    }

    /// One whose ledger is not the database's own.
    fn with(ledger: &Arc<dyn JobLedger>, db: &Database, number: u64) -> Self {
        Self {
            clock: Wrong::default(),
            ledger: ledger.clone(),
            pulse: Pulse::default(),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            abort: CancellationToken::new(),
            jobs: Vec::new(),
            id: worker(number),
            is_shared: db.engine == Engine::Postgres,
        }
    }

    /// Adds a job; answers the times for which it ran.
    fn job(
        &mut self,
        definition: JobDefinition,
        work: impl Fn(RunContext) -> BoxFuture<'static, Result<Report, JobError>>
        + Send
        + Sync
        + 'static,
    ) -> Arc<Mutex<Vec<DateTime<Utc>>>> {
        let times = Arc::default();
        let job = Scripted {
            work: Box::new(work),
            times: Arc::clone(&times),
        };
        self.jobs.push((definition, Arc::new(job)));
        times
    }

    fn start(&mut self) {
        let settings = RunnerSettings {
            ledger: self.ledger.clone(),
            is_shared: self.is_shared,
            clock: Arc::new(self.clock.clone()),
            daemon: self.id,
            tracker: self.tracker.clone(),
            stop: self.stop.clone(),
            abort: self.abort.clone(),
            pulse: self.pulse.clone(),
            metrics: Arc::new(Metrics::default()),
            alerts: None,
            keep_history: Duration::from_hours(24),
        };
        let runner = Runner::new(settings, std::mem::take(&mut self.jobs));
        self.tracker.spawn(runner.run());
    }

    /// Steps the clock, and lets the planner see it.
    fn step(&self, by: TimeDelta) {
        self.clock.step(by);
        self.pulse.wake();
    }

    async fn ask_for(&self, job: &str) -> RunId {
        let now = self.clock.now();
        let id = RunId::generate(now);
        let by: Subject = subject("ops");
        self.ledger.enqueue(id, job, &by, now).await.unwrap();
        self.pulse.wake();
        id
    }

    async fn runs(&self, job: &str) -> Vec<Run> {
        let mut runs = self.ledger.runs(job, None, 10_000).await.unwrap();
        runs.reverse();
        runs
    }

    /// The runs of a job, once `enough` of them have ended in `state`.
    async fn until(&self, job: &str, state: RunState, enough: usize) -> Vec<Run> {
        let what = format!("{enough} runs of {job} are {state}");
        eventually(&what, PATIENCE, async || {
            let runs = self.runs(job).await;
            runs.iter().filter(|run| run.state == state).count() >= enough
        })
        .await;
        self.runs(job).await
    }

    async fn drain(&self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(PATIENCE, self.tracker.wait())
            .await
            .expect("what runs comes to an end");
    }
}

/// Where the stack ends. A function of its own: a local of a future would lie in the future.
#[inline(never)]
fn depth() -> usize {
    let here = 0_u8;
    std::hint::black_box(&raw const here).addr()
}

/// A ledger that fails where a test says: before the database is asked, or when the answer is lost.
struct Faulty {
    inner: Arc<dyn JobLedger>,
    before: Mutex<BTreeMap<&'static str, u32>>,
    after: Mutex<BTreeMap<&'static str, u32>>,
    calls: AtomicU32,
    /// How often the database refuses to write an end, for what it says.
    refusals: AtomicU32,
    /// How deep in whose stack claims were made.
    depths: Mutex<Vec<(ThreadId, usize)>>,
}

impl Faulty {
    fn new(
        inner: &Arc<dyn JobLedger>,
        before: &[(&'static str, u32)],
        after: &[(&'static str, u32)],
    ) -> Arc<Self> {
        Arc::new(Self {
            inner: inner.clone(),
            before: Mutex::new(before.iter().copied().collect()),
            after: Mutex::new(after.iter().copied().collect()),
            calls: AtomicU32::new(0),
            refusals: AtomicU32::new(0),
            depths: Mutex::default(),
        })
    }

    fn fail(
        &self,
        faults: &Mutex<BTreeMap<&'static str, u32>>,
        name: &'static str,
    ) -> StorageResult<()> {
        match faults.lock().unwrap().get_mut(name) {
            Some(left) if *left > 0 => {
                *left -= 1;
                self.calls.fetch_add(1, Ordering::Relaxed);
                Err(StorageError::Unavailable(Arc::new(
                    sqlx::Error::PoolTimedOut,
                )))
            }
            _ => Ok(()),
        }
    }

    async fn through<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = StorageResult<T>>,
    ) -> StorageResult<T> {
        self.fail(&self.before, name)?;
        let answer = call.await?;
        self.fail(&self.after, name)?;
        Ok(answer)
    }

    fn faults_left(&self) -> u32 {
        let left = |faults: &Mutex<BTreeMap<_, u32>>| faults.lock().unwrap().values().sum::<u32>();
        left(&self.before) + left(&self.after)
    }
}

#[async_trait]
impl JobLedger for Faulty {
    async fn claim(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        trigger: Trigger,
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim> {
        let depth = (std::thread::current().id(), depth());
        self.depths.lock().unwrap().push(depth);
        let claim = self
            .inner
            .claim(run, job, scheduled_at, trigger, daemon, now);
        self.through("claim", claim).await
    }

    async fn enqueue(
        &self,
        run: RunId,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        self.inner.enqueue(run, job, by, now).await
    }

    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>> {
        self.fail(&self.before, "claim_queued")?;
        let run = self.inner.claim_queued(jobs, daemon, now).await?;
        if run.is_some() {
            self.fail(&self.after, "claim_queued")?;
        }
        Ok(run)
    }

    async fn queue(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim> {
        let queue = self.inner.queue(run, job, scheduled_at, now);
        self.through("queue", queue).await
    }

    async fn add_missed(&self, runs: &[Run]) -> StorageResult<u64> {
        self.through("add_missed", self.inner.add_missed(runs))
            .await
    }

    async fn settled(
        &self,
        job: &str,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Vec<Settled>> {
        self.inner.settled(job, from, until, limit).await
    }

    async fn renew(&self, daemon: Uuid, now: DateTime<Utc>) -> StorageResult<Vec<Renewed>> {
        self.through("renew", self.inner.renew(daemon, now)).await
    }

    async fn glance(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Glance> {
        self.inner.glance(jobs, daemon, now).await
    }

    async fn take_over(&self, daemon: Uuid, now: DateTime<Utc>) -> StorageResult<Vec<Run>> {
        self.inner.take_over(daemon, now).await
    }

    async fn begin_attempt(&self, fence: Fence, attempt: u32) -> StorageResult<bool> {
        let begin = self.inner.begin_attempt(fence, attempt);
        self.through("begin_attempt", begin).await
    }

    async fn finish(&self, fence: Fence, finish: &Finish) -> StorageResult<bool> {
        if self.refusals.load(Ordering::Relaxed) > 0 {
            self.refusals.fetch_sub(1, Ordering::Relaxed);
            return Err(StorageError::Database(Arc::new(sqlx::Error::WorkerCrashed)));
        }
        self.through("finish", self.inner.finish(fence, finish))
            .await
    }

    async fn give_back(&self, fence: Fence, counts: &Counts, attempt: u32) -> StorageResult<bool> {
        let give_back = self.inner.give_back(fence, counts, attempt);
        self.through("give_back", give_back).await
    }

    async fn record(&self, run: &Run) -> StorageResult<bool> {
        self.through("record", self.inner.record(run)).await
    }

    async fn runs(&self, job: &str, before: Option<RunId>, limit: u32) -> StorageResult<Vec<Run>> {
        self.inner.runs(job, before, limit).await
    }

    async fn last_runs(&self, jobs: &[String]) -> StorageResult<Vec<Run>> {
        self.inner.last_runs(jobs).await
    }

    async fn find_run(&self, run: RunId) -> StorageResult<Option<Run>> {
        self.inner.find_run(run).await
    }

    async fn last_times(&self, jobs: &[String]) -> StorageResult<Vec<(String, DateTime<Utc>)>> {
        self.inner.last_times(jobs).await
    }

    async fn pause(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<bool> {
        self.inner.pause(job, by, now).await
    }

    async fn resume(
        &self,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Pause>> {
        self.inner.resume(job, by, now).await
    }

    async fn pauses(&self) -> StorageResult<Vec<Pause>> {
        self.inner.pauses().await
    }

    async fn cancel(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>> {
        self.inner.cancel(run, by, now).await
    }

    async fn retry(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>> {
        self.inner.retry(run, by, now).await
    }

    async fn actions(&self, job: &str, limit: u32) -> StorageResult<Vec<JobAction>> {
        self.inner.actions(job, limit).await
    }

    async fn prune(&self, before: DateTime<Utc>, limit: u32) -> StorageResult<u64> {
        self.inner.prune(before, limit).await
    }

    async fn recover(&self, now: DateTime<Utc>) -> StorageResult<u64> {
        self.inner.recover(now).await
    }

    async fn running(&self, daemon: Uuid) -> StorageResult<Vec<Run>> {
        self.inner.running(daemon).await
    }

    async fn now(&self) -> StorageResult<DateTime<Utc>> {
        self.inner.now().await
    }
}

on_both_engines! {
    async fn a_panic_is_a_failed_run_with_its_message_and_the_job_lives_on(db) {
        let mut daemon = Daemon::new(db, 1);
        let times = daemon.job(every(200, "shaky"), {
            let count = AtomicU32::new(0);
            work(move |_| {
                let number = count.fetch_add(1, Ordering::Relaxed);
                async move {
                    // With a NUL, which PostgreSQL takes in no text.
                    assert!(number > 0, "no \0 luck");
                    Ok(report(1))
                }
            })
        });
        daemon.start();
        let runs = daemon.until("shaky", RunState::Succeeded, 2).await;
        daemon.drain().await;
        assert_eq!((runs[0].state, runs[0].attempt), (RunState::Failed, 1));
        assert_eq!(runs[0].error.as_deref(), Some("panicked: no \u{fffd} luck"));
        assert_eq!(times.lock().unwrap()[0], runs[0].scheduled_at);
        assert!(runs[0].finished_at.is_some());
    }

    async fn a_run_over_its_timeout_is_stopped_and_tried_again_and_keeps_its_counts(db) {
        let mut daemon = Daemon::new(db, 1);
        let mut slow = definition("slow");
        slow.timeout = Duration::from_millis(50);
        let times = daemon.job(slow, work(|context: RunContext| async move {
            context.stop.cancelled().await;
            Ok(Report { is_unfinished: true, ..report(2) })
        }));
        daemon.start();
        let id = daemon.ask_for("slow").await;
        let runs = daemon.until("slow", RunState::TimedOut, 1).await;
        daemon.drain().await;
        let run = runs.iter().find(|run| run.id == id).unwrap();
        assert_eq!(run.attempt, 3, "as often as the policy says");
        assert_eq!(run.counts["deleted"], 6);
        assert_eq!(run.error.as_deref(), Some("took longer than its timeout of 50ms"));
        assert_eq!(times.lock().unwrap().iter().filter(|at| **at == run.scheduled_at).count(), 3);
    }

    async fn what_was_done_before_an_error_a_panic_or_an_abort_is_counted(db) {
        let mut daemon = Daemon::new(db, 1);
        daemon.job(definition("failing"), work(|context: RunContext| async move {
            context.report.add("deleted", 5);
            Err(JobError::Permanent("lost".to_owned()))
        }));
        daemon.job(definition("retrying"), work(|context: RunContext| async move {
            context.report.add("deleted", 2);
            Err(JobError::Transient("away".to_owned()))
        }));
        daemon.job(definition("panicking"), work(|context: RunContext| async move {
            context.report.add("deleted", 7);
            panic!("no luck")
        }));
        let began = Arc::new(Semaphore::new(0));
        let told = began.clone();
        daemon.job(definition("deaf"), work(move |context: RunContext| {
            context.report.add("deleted", 11);
            told.add_permits(1);
            std::future::pending()
        }));
        daemon.start();
        for (job, deleted) in [("failing", 5), ("retrying", 6), ("panicking", 7)] {
            daemon.ask_for(job).await;
            let runs = daemon.until(job, RunState::Failed, 1).await;
            assert_eq!(runs[0].counts.get("deleted"), Some(&deleted), "{job}");
        }
        daemon.ask_for("deaf").await;
        began.acquire().await.unwrap().forget();
        daemon.abort.cancel();
        daemon.drain().await;
        let runs = daemon.runs("deaf").await;
        assert_eq!((runs[0].state, runs[0].counts.get("deleted")), (RunState::Queued, Some(&11)));
    }

    async fn runs_that_are_past_their_time_are_deleted(db) {
        let mut daemon = Daemon::new(db, 1);
        let now = daemon.clock.now();
        let ended = |ago: TimeDelta| Run {
            id: RunId::generate(now - ago),
            job: "poll".to_owned(),
            scheduled_at: now - ago,
            started_at: Some(now - ago),
            finished_at: Some(now - ago),
            trigger: Trigger::Schedule,
            attempt: 1,
            daemon: Some(daemon.id),
            fence: 0,
            state: RunState::Succeeded,
            counts: Counts::new(),
            error: None,
        };
        // More than one batch of them.
        for second in 0..600 {
            db.ledger.record(&ended(TimeDelta::hours(25) + TimeDelta::seconds(second))).await.unwrap();
        }
        let young = ended(TimeDelta::hours(23));
        db.ledger.record(&young).await.unwrap();
        daemon.start();
        eventually("the old ones are gone", PATIENCE, async || daemon.runs("poll").await.len() == 1).await;
        daemon.drain().await;
        assert_eq!(daemon.runs("poll").await, [young]);
    }

    async fn a_run_whose_end_is_refused_does_not_stay_at_work(db) {
        let ledger = Faulty::new(&db.ledger, &[], &[]);
        ledger.refusals.store(1, Ordering::Relaxed);
        let faulty: Arc<dyn JobLedger> = ledger.clone();
        let mut daemon = Daemon::with(&faulty, db, 1);
        daemon.job(definition("job"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        daemon.ask_for("job").await;
        let runs = daemon.until("job", RunState::Succeeded, 1).await;
        daemon.drain().await;
        assert_eq!(runs[0].error.as_deref(), Some("how it ended could not be written; see the log"));
    }

    async fn a_run_never_begins_before_it_was_asked_for(db) {
        let mut daemon = Daemon::new(db, 1);
        daemon.job(definition("job"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        // Asked for by a daemon whose clock is ahead.
        let asked = daemon.clock.now() + TimeDelta::minutes(1);
        daemon.ledger.enqueue(RunId::generate(asked), "job", &subject("ops"), asked).await.unwrap();
        daemon.pulse.wake();
        let runs = daemon.until("job", RunState::Succeeded, 1).await;
        daemon.drain().await;
        assert!(runs[0].started_at.unwrap() >= runs[0].scheduled_at, "{runs:?}");
    }

    async fn a_transient_error_is_tried_again_on_the_same_row_within_the_backoff(db) {
        let mut daemon = Daemon::new(db, 1);
        let starts: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let seen = starts.clone();
        daemon.job(definition("mending"), work(move |_| {
            seen.lock().unwrap().push(Instant::now());
            let number = seen.lock().unwrap().len();
            async move {
                if number < 3 { Err(JobError::Transient("the server is away".to_owned())) } else { Ok(report(1)) }
            }
        }));
        daemon.start();
        let id = daemon.ask_for("mending").await;
        let runs = daemon.until("mending", RunState::Succeeded, 1).await;
        daemon.drain().await;
        let run = runs.iter().find(|run| run.id == id).unwrap();
        assert_eq!((run.state, run.attempt, run.error.as_deref()), (RunState::Succeeded, 3, None));
        // Full jitter has no least wait; the most is the policy's, and what a busy machine adds.
        let starts = starts.lock().unwrap();
        for (wait, most) in starts.windows(2).zip([40, 60]) {
            assert!(wait[1] - wait[0] < Duration::from_millis(most + 1000));
        }
    }

    async fn a_transient_error_that_stays_fails_with_the_last_attempt_and_a_permanent_one_at_once(db) {
        let mut daemon = Daemon::new(db, 1);
        daemon.job(definition("away"), work(|_| async { Err(JobError::Transient("451".to_owned())) }));
        daemon.job(definition("refused"), work(|_| async { Err(JobError::Permanent("550".to_owned())) }));
        daemon.start();
        for (job, attempts, error) in [("away", 3, "451"), ("refused", 1, "550")] {
            let id = daemon.ask_for(job).await;
            let runs = daemon.until(job, RunState::Failed, 1).await;
            let run = runs.iter().find(|run| run.id == id).unwrap();
            assert_eq!((run.attempt, run.error.as_deref()), (attempts, Some(error)));
        }
        daemon.drain().await;
    }

    async fn what_was_given_back_at_the_drain_goes_on_at_the_next_start_with_its_attempt_unspent(db) {
        let mut first = Daemon::new(db, 1);
        let began = Arc::new(Semaphore::new(0));
        let told = began.clone();
        first.job(every(200, "long"), work(move |context: RunContext| {
            told.add_permits(1);
            async move {
                context.stop.cancelled().await;
                Ok(Report { is_unfinished: true, ..report(3) })
            }
        }));
        first.start();
        began.acquire().await.unwrap().forget();
        first.drain().await;
        let runs = first.runs("long").await;
        let given_back = runs.iter().find(|run| run.state == RunState::Queued).unwrap();
        assert_eq!((given_back.attempt, given_back.daemon), (0, None));
        assert_eq!(given_back.counts["deleted"], 3);

        let mut second = Daemon::new(db, 2);
        let mut long = definition("long");
        long.enabled = false;
        let times = second.job(long, work(|_| async { Ok(report(4)) }));
        second.start();
        let runs = second.until("long", RunState::Succeeded, 1).await;
        second.drain().await;
        let run = runs.iter().find(|run| run.id == given_back.id).unwrap();
        assert_eq!((run.state, run.attempt, run.daemon), (RunState::Succeeded, 1, Some(second.id)));
        assert_eq!((run.counts["deleted"], run.started_at), (7, given_back.started_at));
        assert_eq!(*times.lock().unwrap(), [given_back.scheduled_at]);
    }

    async fn what_was_asked_for_runs_once_one_after_another_and_moves_no_schedule(db) {
        let mut daemon = Daemon::new(db, 1);
        let (at_once, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let (entered, top) = (at_once.clone(), most.clone());
        let times = daemon.job(every(500, "job"), work(move |_| {
            let (entered, top) = (entered.clone(), top.clone());
            async move {
                top.fetch_max(entered.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(5)).await;
                entered.fetch_sub(1, Ordering::SeqCst);
                Ok(report(1))
            }
        }));
        daemon.start();
        let mut asked = Vec::new();
        for _ in 0..10 {
            asked.push(daemon.ask_for("job").await);
        }
        eventually("all ran", PATIENCE, async || {
            let runs = daemon.runs("job").await;
            asked.iter().all(|id| runs.iter().any(|run| run.id == *id && run.state == RunState::Succeeded))
        })
        .await;
        daemon.drain().await;
        let runs = daemon.runs("job").await;
        for id in &asked {
            let run = runs.iter().find(|run| run.id == *id).unwrap();
            assert_eq!((run.trigger, run.attempt), (Trigger::Manual, 1));
            assert_eq!(times.lock().unwrap().iter().filter(|at| **at == run.scheduled_at).count(), 1);
        }
        assert_eq!(most.load(Ordering::SeqCst), 1, "a job overlaps itself");
        for run in runs.iter().filter(|run| run.trigger == Trigger::Schedule) {
            assert_eq!(run.scheduled_at.timestamp_micros() % 500_000, 0, "{run:?}");
        }
    }

    async fn a_run_whose_claim_was_answered_to_nobody_runs_once(db) {
        let ledger = Faulty::new(&db.ledger, &[("claim", 1)], &[("claim", 1), ("claim_queued", 2)]);
        let faulty: Arc<dyn JobLedger> = ledger.clone();
        let mut daemon = Daemon::with(&faulty, db, 1);
        let times = daemon.job(every(1000, "job"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        let id = daemon.ask_for("job").await;
        daemon.until("job", RunState::Succeeded, 3).await;
        eventually("all faults happened, and nothing is left", PATIENCE, async || {
            let runs = daemon.runs("job").await;
            ledger.faults_left() == 0 && runs.iter().any(|run| run.id == id && run.state == RunState::Succeeded)
        })
        .await;
        daemon.drain().await;
        let runs = daemon.runs("job").await;
        assert!(runs.iter().all(|run| run.state != RunState::Running), "{runs:?}");
        let manual = runs.iter().find(|run| run.id == id).unwrap();
        assert_eq!(manual.attempt, 1, "a lost answer spends no attempt");
        let times = times.lock().unwrap();
        for run in runs.iter().filter(|run| run.state == RunState::Succeeded) {
            assert_eq!(times.iter().filter(|at| **at == run.scheduled_at).count(), 1, "{run:?}");
        }
    }

    async fn how_a_run_ended_is_written_although_the_database_is_away_at_the_drain(db) {
        let ledger = Faulty::new(&db.ledger, &[("finish", 2), ("begin_attempt", 9)], &[]);
        let faulty: Arc<dyn JobLedger> = ledger.clone();
        let mut daemon = Daemon::with(&faulty, db, 1);
        let count = AtomicU32::new(0);
        daemon.job(definition("job"), work(move |_| {
            let number = count.fetch_add(1, Ordering::Relaxed);
            async move {
                if number == 0 { Err(JobError::Transient("once".to_owned())) } else { Ok(report(1)) }
            }
        }));
        daemon.start();
        let id = daemon.ask_for("job").await;
        eventually("the database is away", PATIENCE, async || ledger.calls.load(Ordering::Relaxed) >= 2).await;
        daemon.drain().await;
        let runs = daemon.runs("job").await;
        let run = runs.iter().find(|run| run.id == id).unwrap();
        assert_eq!((run.state, run.attempt), (RunState::Succeeded, 2));
    }

    async fn what_passed_while_nothing_ran_is_made_up_for_or_has_a_reason(db) {
        let now = db.ledger.now().await.unwrap();
        let hour = |hours: i64| DateTime::from_timestamp((now.timestamp() / 3600 - hours) * 3600, 0).unwrap();
        if now - hour(0) < SECOND * 8 {
            // The newest time is not missed yet, but due.
            tokio::time::sleep(Duration::from_secs(8)).await;
        }
        let mut daemon = Daemon::new(db, 1);
        for (name, catch_up) in [("once", CatchUp::Once), ("skip", CatchUp::Skip), ("all", CatchUp::All), ("new", CatchUp::All)] {
            let mut hourly = every(3_600_000, name);
            hourly.catch_up = catch_up;
            hourly.catch_up_within = Duration::from_mins(150);
            daemon.job(hourly, work(|_| async { Ok(report(1)) }));
            if name == "new" {
                continue;
            }
            // The last that ran, four hours ago.
            let (id, at) = (RunId::generate(hour(4)), hour(4));
            let claim = db.ledger.claim(id, name, at, Trigger::Schedule, worker(9), now);
            assert_eq!(claim.await.unwrap(), Claim::Claimed);
            let end = Finish { state: RunState::Succeeded, attempt: 1, counts: Counts::new(), error: None, at };
            assert!(db.ledger.finish(Fence { run: id, number: 1 }, &end).await.unwrap());
        }
        daemon.start();
        let newest = i64::from(now - hour(0) <= TimeDelta::minutes(30));
        for (name, made_up) in [("once", 1), ("all", 2 + usize::try_from(newest).unwrap()), ("skip", 0)] {
            eventually("all four are settled", PATIENCE, async || {
                let runs = daemon.runs(name).await;
                runs.iter().filter(|run| !matches!(run.state, RunState::Queued | RunState::Running)).count() >= 5
            })
            .await;
            let runs = daemon.runs(name).await;
            assert_eq!(runs.len(), 5, "{runs:?}");
            let caught_up: Vec<_> = runs.iter().filter(|run| run.trigger == Trigger::CatchUp).collect();
            assert_eq!(caught_up.len(), made_up, "{runs:?}");
            assert!(caught_up.iter().all(|run| run.state == RunState::Succeeded));
            if let Some(last) = caught_up.last() {
                assert_eq!(last.scheduled_at, hour(0));
            }
            let skipped = runs.iter().filter(|run| run.state == RunState::Skipped);
            for run in skipped {
                let why = run.error.as_deref().unwrap();
                assert!(why.starts_with("its time passed while no daemon ran it, "), "{why}");
            }
        }
        daemon.drain().await;
        assert_eq!(daemon.runs("new").await, [], "a job that never ran has missed nothing");
    }

    async fn many_times_that_passed_share_a_row(db) {
        let now = db.ledger.now().await.unwrap();
        let at = DateTime::from_timestamp(now.timestamp() - 1000, 0).unwrap();
        let id = RunId::generate(at);
        let claim = db.ledger.claim(id, "job", at, Trigger::Schedule, worker(9), now);
        assert_eq!(claim.await.unwrap(), Claim::Claimed);
        let end = Finish { state: RunState::Succeeded, attempt: 1, counts: Counts::new(), error: None, at };
        assert!(db.ledger.finish(Fence { run: id, number: 1 }, &end).await.unwrap());
        let mut daemon = Daemon::new(db, 1);
        let mut job = every(1000, "job");
        job.catch_up = CatchUp::Skip;
        daemon.job(job, work(|_| async { Ok(report(1)) }));
        daemon.start();
        let runs = daemon.until("job", RunState::Skipped, 1).await;
        daemon.drain().await;
        let skipped: Vec<_> = runs.iter().filter(|run| run.counts.contains_key(SKIPPED)).collect();
        assert_eq!(skipped.len(), 1, "{skipped:?}");
        // Those before the last one, whose rows may have been pruned, are among them.
        assert!(skipped[0].counts[SKIPPED] >= 990, "{skipped:?}");
        let why = skipped[0].error.as_deref().unwrap();
        assert!(why.contains(" passed while no daemon ran them, and catch_up is skip"), "{why}");
        // The next start finds nothing more.
        let mut again = Daemon::new(db, 2);
        let mut job = every(1000, "job");
        job.catch_up = CatchUp::Skip;
        again.job(job, work(|_| async { Ok(report(1)) }));
        again.start();
        again.until("job", RunState::Succeeded, 4).await;
        again.drain().await;
        let mut rows: Vec<_> = again.runs("job").await;
        rows.retain(|run| run.scheduled_at >= skipped[0].scheduled_at);
        rows.sort_by_key(|run| run.scheduled_at);
        for pair in rows.windows(2) {
            assert_eq!(pair[1].scheduled_at - pair[0].scheduled_at, SECOND, "{rows:?}");
        }
    }

    async fn a_run_is_cancelled_at_its_next_safe_point_and_tried_again_on_its_row(db) {
        let mut daemon = Daemon::new(db, 1);
        let tries = Arc::new(AtomicU32::new(0));
        let tried = tries.clone();
        daemon.job(definition("job"), work(move |context: RunContext| {
            let is_first = tried.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if is_first {
                    context.stop.cancelled().await;
                    return Ok(Report { is_unfinished: true, ..report(2) });
                }
                Ok(report(3))
            }
        }));
        daemon.start();
        let id = daemon.ask_for("job").await;
        daemon.until("job", RunState::Running, 1).await;
        let now = daemon.clock.now();
        assert_eq!(db.ledger.cancel(id, &subject("ana"), now).await.unwrap(), Some(RunState::Running));
        let runs = daemon.until("job", RunState::Cancelled, 1).await;
        assert_eq!((runs[0].error.as_deref(), runs[0].counts["deleted"]), (Some("cancelled by ana"), 2));
        assert_eq!(db.ledger.retry(id, &subject("ana"), now).await.unwrap(), Some(RunState::Cancelled));
        daemon.pulse.wake();
        let runs = daemon.until("job", RunState::Succeeded, 1).await;
        daemon.drain().await;
        assert_eq!((runs[0].id, runs[0].attempt, runs[0].counts["deleted"]), (id, 1, 5));
        assert_eq!(tries.load(Ordering::Relaxed), 2);
    }

    async fn a_paused_job_stands_still_until_it_is_resumed_and_says_what_passed(db) {
        let mut daemon = Daemon::new(db, 1);
        let job = every(500, "job");
        let times = daemon.job(job.clone(), work(|_| async { Ok(report(1)) }));
        daemon.start();
        daemon.until("job", RunState::Succeeded, 2).await;
        let ana = subject("ana");
        let now = db.ledger.now().await.unwrap();
        assert!(db.ledger.pause("job", &ana, now).await.unwrap());
        let ran = times.lock().unwrap().len();
        let asked = daemon.ask_for("job").await;
        eventually("what was asked for ran, and two times passed", PATIENCE, async || {
            let run = db.ledger.find_run(asked).await.unwrap().unwrap();
            run.state == RunState::Succeeded && db.ledger.now().await.unwrap() - now > SECOND * 2
        })
        .await;
        // One may have been claimed before the pause.
        assert!(times.lock().unwrap().len() <= ran + 2);
        let bob = subject("bob");
        let resumed = timelined::jobs::resume(&*db.ledger, &job, &bob, daemon.clock.now()).await.unwrap();
        assert!(resumed);
        let more = times.lock().unwrap().len() + 2;
        daemon.until("job", RunState::Succeeded, more).await;
        daemon.drain().await;
        let mut rows: Vec<_> = daemon.runs("job").await;
        rows.retain(|run| run.trigger == Trigger::Schedule);
        rows.sort_by_key(|run| run.scheduled_at);
        for pair in rows.windows(2) {
            assert_eq!(pair[1].scheduled_at - pair[0].scheduled_at, TimeDelta::milliseconds(500), "{rows:?}");
        }
        let paused: Vec<_> = rows.iter().filter(|run| run.state == RunState::Skipped).collect();
        assert!(paused.len() >= 3);
        assert!(paused.iter().all(|run| run.error.as_deref() == Some("ana had paused the job")), "{paused:?}");
    }
}

/// Two daemons plan, each time one of them runs it.
#[test]
fn two_daemons_run_each_of_a_hundred_times_once_whatever_their_clocks_say() {
    run(Engine::Postgres, async |db: &Database| {
        let mut daemons = [Daemon::new(db, 1), Daemon::new(db, 2)];
        daemons[1].clock = Wrong::by(SECOND * 3);
        let mut times = Vec::new();
        for daemon in &mut daemons {
            times.push(daemon.job(every(100, "job"), work(|_| async { Ok(report(1)) })));
            daemon.start();
        }
        daemons[0].until("job", RunState::Succeeded, 40).await;
        daemons[1].step(SECOND * -5);
        daemons[0].until("job", RunState::Succeeded, 70).await;
        daemons[1].step(SECOND * 7);
        daemons[0].until("job", RunState::Succeeded, 110).await;
        for daemon in &daemons {
            daemon.drain().await;
        }
        each_time_ran_once(&daemons[0], &times, 100).await;
    });
}

#[test]
fn a_daemon_alone_whose_clock_steps_ahead_of_the_database_passes_over_no_time() {
    run(Engine::Postgres, async |db: &Database| {
        let mut daemon = Daemon::new(db, 1);
        let times = daemon.job(every(500, "job"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        daemon.until("job", RunState::Succeeded, 2).await;
        daemon.step(SECOND * 3);
        daemon.until("job", RunState::Succeeded, 8).await;
        daemon.drain().await;
        each_time_ran_once(&daemon, &[times], 500).await;
    });
}

/// Every time between the first and the last has one row, and was run by one daemon.
async fn each_time_ran_once(
    daemon: &Daemon,
    times: &[Arc<Mutex<Vec<DateTime<Utc>>>>],
    interval_ms: i64,
) {
    let runs = daemon.runs("job").await;
    let mut rows: Vec<_> = runs.iter().map(|run| run.scheduled_at).collect();
    rows.sort();
    for pair in rows.windows(2) {
        let step = (pair[1] - pair[0]).num_milliseconds();
        assert_eq!(step, interval_ms, "between {} and {}", pair[0], pair[1]);
    }
    // On a busy machine a run may take longer than the interval; its daemon says so.
    let late = "the run before was still at work";
    let passed_over =
        |run: &&Run| run.state != RunState::Succeeded && run.error.as_deref() != Some(late);
    assert_eq!(runs.iter().find(passed_over), None);
    rows.retain(|at| {
        let mut runs = runs.iter();
        runs.any(|run| run.scheduled_at == *at && run.state == RunState::Succeeded)
    });
    let mut executed: Vec<_> = times
        .iter()
        .flat_map(|times| times.lock().unwrap().clone())
        .collect();
    executed.sort();
    assert_eq!(executed, rows);
}

/// A clock of SQLite's daemon is its own judge.
fn alone(case: impl AsyncFnOnce(&Database)) {
    run(Engine::Sqlite, case);
}

#[test]
fn a_time_that_comes_during_a_run_is_skipped_with_a_row_that_says_so() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        let gate = Arc::new(Semaphore::new(0));
        let entry = gate.clone();
        let times = daemon.job(
            every(200, "job"),
            work(move |_| {
                let entry = entry.clone();
                async move {
                    entry.acquire().await.unwrap().forget();
                    Ok(report(1))
                }
            }),
        );
        daemon.start();
        let runs = daemon.until("job", RunState::Skipped, 2).await;
        gate.add_permits(1000);
        daemon.until("job", RunState::Succeeded, 2).await;
        daemon.drain().await;
        let first = runs
            .iter()
            .find(|run| run.state == RunState::Running)
            .unwrap();
        let later =
            |run: &&Run| run.state == RunState::Skipped && run.scheduled_at > first.scheduled_at;
        for run in runs.iter().filter(later) {
            assert_eq!(
                run.error.as_deref(),
                Some("the run before was still at work")
            );
            assert_eq!((run.attempt, run.started_at), (0, None));
            assert!(!times.lock().unwrap().contains(&run.scheduled_at));
        }
    });
}

#[test]
fn of_the_times_that_come_during_a_run_one_runs_afterwards_where_they_queue() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        let gate = Arc::new(Semaphore::new(0));
        let entry = gate.clone();
        let mut queueing = every(200, "job");
        queueing.overlap = Overlap::Queue;
        let times = daemon.job(
            queueing,
            work(move |_| {
                let entry = entry.clone();
                async move {
                    entry.acquire().await.unwrap().forget();
                    Ok(report(1))
                }
            }),
        );
        daemon.start();
        // Of four times the first runs, the last waits, and those between are passed over.
        daemon.until("job", RunState::Skipped, 2).await;
        assert_eq!(times.lock().unwrap().len(), 1);
        gate.add_permits(1);
        daemon.until("job", RunState::Succeeded, 1).await;
        eventually("the one that waits runs", PATIENCE, async || {
            times.lock().unwrap().len() == 2
        })
        .await;
        let runs = daemon.runs("job").await;
        gate.add_permits(1000);
        daemon.drain().await;
        let times = times.lock().unwrap();
        for run in &runs {
            let has_run = times.contains(&run.scheduled_at);
            assert_eq!(has_run, run.state != RunState::Skipped, "{run:?}");
        }
        let mut rows: Vec<_> = runs.iter().map(|run| run.scheduled_at).collect();
        rows.sort();
        for pair in rows.windows(2) {
            assert_eq!(pair[1] - pair[0], TimeDelta::milliseconds(200), "no row");
        }
    });
}

/// Each run takes longer than the interval, so that a time always waits.
#[test]
fn the_thirtieth_time_that_queued_stands_no_deeper_in_the_stack_than_the_second() {
    alone(async |db| {
        let ledger = Faulty::new(&db.ledger, &[], &[]);
        let faulty: Arc<dyn JobLedger> = ledger.clone();
        let mut daemon = Daemon::with(&faulty, db, 1);
        let mut queueing = every(100, "job");
        queueing.overlap = Overlap::Queue;
        daemon.job(
            queueing,
            work(|_| async {
                tokio::time::sleep(Duration::from_millis(130)).await;
                Ok(report(1))
            }),
        );
        daemon.start();
        daemon.until("job", RunState::Succeeded, 30).await;
        daemon.drain().await;
        let depths = ledger.depths.lock().unwrap();
        let spread = depths
            .iter()
            .flat_map(|(thread, depth)| {
                let same = depths.iter().filter(move |(other, _)| other == thread);
                same.map(|(_, other)| depth.abs_diff(*other))
            })
            .max()
            .unwrap();
        assert!(spread < 4096, "{spread} bytes apart");
    });
}

#[test]
fn a_skipped_time_is_recorded_although_the_database_was_away() {
    alone(async |db| {
        let faulty: Arc<dyn JobLedger> = Faulty::new(&db.ledger, &[("record", 1)], &[]);
        let mut daemon = Daemon::with(&faulty, db, 1);
        daemon.job(
            every(200, "job"),
            work(|context: RunContext| async move {
                context.stop.cancelled().await;
                Ok(report(1))
            }),
        );
        daemon.start();
        let runs = daemon.until("job", RunState::Skipped, 7).await;
        daemon.drain().await;
        let mut rows: Vec<_> = runs.iter().map(|run| run.scheduled_at).collect();
        rows.sort();
        for pair in rows.windows(2) {
            assert_eq!(pair[1] - pair[0], TimeDelta::milliseconds(200), "no row");
        }
    });
}

#[test]
fn a_slow_job_delays_no_other() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        daemon.job(
            every(100, "slow"),
            work(|context: RunContext| async move {
                context.stop.cancelled().await;
                Ok(report(1))
            }),
        );
        daemon.job(every(100, "quick"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        let runs = daemon.until("quick", RunState::Succeeded, 10).await;
        daemon.drain().await;
        // On a busy machine the planner itself may be late, and passes over a time.
        let lags = runs
            .iter()
            .filter_map(|run| Some(run.started_at? - run.scheduled_at));
        let mut lags: Vec<_> = lags.collect();
        lags.sort();
        assert!(
            lags[lags.len() / 2] < TimeDelta::milliseconds(100),
            "{lags:?}"
        );
    });
}

#[test]
fn after_a_step_forward_the_latest_missed_time_runs_once() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        let times = daemon.job(every(1000, "job"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        daemon.until("job", RunState::Succeeded, 1).await;
        // More seconds than one would walk through one by one.
        let asleep = daemon.clock.now();
        daemon.step(TimeDelta::hours(12));
        daemon.until("job", RunState::Succeeded, 3).await;
        daemon.drain().await;
        let times = times.lock().unwrap();
        let woke = asleep + TimeDelta::hours(12);
        let missed = times
            .iter()
            .filter(|at| **at > asleep + SECOND && **at < woke - SECOND);
        assert_eq!(missed.count(), 0, "{times:?}");
        let latest = times.iter().find(|at| **at > asleep + SECOND).unwrap();
        assert!((woke - *latest).abs() <= SECOND, "{times:?}");
        let mut distinct = times.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), times.len(), "{times:?}");
    });
}

#[test]
fn a_step_back_repeats_no_time_and_silences_nothing() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        let times = daemon.job(every(200, "job"), work(|_| async { Ok(report(1)) }));
        let mut poll = every(200, "poll");
        poll.kind = JobKind::RealtimeDelivery { batch: 1 };
        let polls = daemon.job(poll, work(|_| async { Ok(Report::default()) }));
        daemon.start();
        daemon.until("job", RunState::Succeeded, 4).await;
        let before = times.lock().unwrap().len();
        daemon.step(SECOND * -2);
        let polled = polls.lock().unwrap().len();
        // The times that were there before this daemon began run now; those that ran do not.
        daemon.until("job", RunState::Succeeded, before + 12).await;
        daemon.drain().await;
        let mut distinct = times.lock().unwrap().clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), times.lock().unwrap().len());
        assert!(polls.lock().unwrap().len() >= polled + 10);
        // Polls that found nothing leave a row a minute.
        let minutes = daemon.runs("poll").await;
        assert!(minutes.len() <= 3, "{minutes:?}");
        let polled: u64 = minutes.iter().map(|run| run.counts["polls"]).sum();
        assert_eq!(
            usize::try_from(polled).unwrap(),
            polls.lock().unwrap().len()
        );
    });
}

#[test]
fn a_poll_that_found_something_leaves_a_row() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        let mut poll = every(200, "poll");
        poll.kind = JobKind::RealtimeDelivery { batch: 1 };
        let count = AtomicU32::new(0);
        let polls = daemon.job(
            poll,
            work(move |_| {
                let is_second = count.fetch_add(1, Ordering::Relaxed) == 1;
                async move { Ok(report(u64::from(is_second))) }
            }),
        );
        daemon.start();
        eventually("four polls", PATIENCE, async || {
            polls.lock().unwrap().len() >= 4
        })
        .await;
        daemon.drain().await;
        let mut runs = daemon.runs("poll").await;
        runs.retain(|run| !run.counts.contains_key("polls"));
        assert_eq!(runs.len(), 1, "{runs:?}");
        assert_eq!(runs[0].scheduled_at, polls.lock().unwrap()[1]);
    });
}

#[test]
fn a_second_signal_ends_what_does_not_stop_and_the_run_is_given_back() {
    alone(async |db| {
        let mut daemon = Daemon::new(db, 1);
        let began = Arc::new(Semaphore::new(0));
        let told = began.clone();
        daemon.job(
            definition("deaf"),
            work(move |_| {
                told.add_permits(1);
                std::future::pending()
            }),
        );
        daemon.start();
        let id = daemon.ask_for("deaf").await;
        began.acquire().await.unwrap().forget();
        daemon.stop.cancel();
        daemon.tracker.close();
        let drained = tokio::time::timeout(Duration::from_millis(300), daemon.tracker.wait()).await;
        assert!(drained.is_err(), "a run is given its time");
        daemon.abort.cancel();
        tokio::time::timeout(Duration::from_secs(2), daemon.tracker.wait())
            .await
            .expect("it ends at once");
        let runs = daemon.runs("deaf").await;
        let run = runs.iter().find(|run| run.id == id).unwrap();
        assert_eq!((run.state, run.attempt), (RunState::Queued, 0));
    });
}

#[test]
fn a_claim_waits_for_a_database_that_is_away_and_then_runs() {
    alone(async |db| {
        let faulty: Arc<dyn JobLedger> = Faulty::new(&db.ledger, &[("claim", 2)], &[]);
        let mut daemon = Daemon::with(&faulty, db, 1);
        let times = daemon.job(definition("job"), work(|_| async { Ok(report(1)) }));
        daemon.start();
        let due = daemon.clock.now();
        daemon.step(TimeDelta::seconds(10));
        let runs = daemon.until("job", RunState::Succeeded, 1).await;
        daemon.drain().await;
        assert_eq!(times.lock().unwrap()[0], runs[0].scheduled_at);
        assert!(runs[0].scheduled_at > due);
    });
}

#[test]
fn a_run_whose_daemon_is_gone_is_taken_over_within_six_seconds() {
    run(Engine::Postgres, async |db: &Database| {
        let id = {
            // Claimed by a daemon that died at once.
            let now = db.ledger.now().await.unwrap();
            let id = RunId::generate(now);
            let claim = db
                .ledger
                .claim(id, "job", now, Trigger::Schedule, worker(9), now);
            assert_eq!(claim.await.unwrap(), Claim::Claimed);
            id
        };
        let died = Instant::now();
        let mut daemon = Daemon::new(db, 1);
        let mut job = definition("job");
        job.enabled = false;
        let times = daemon.job(job, work(|_| async { Ok(report(1)) }));
        daemon.start();
        let runs = daemon.until("job", RunState::Succeeded, 1).await;
        assert!(
            died.elapsed() < Duration::from_secs(6),
            "{:?}",
            died.elapsed()
        );
        daemon.drain().await;
        assert_eq!((runs[0].id, runs[0].fence, runs[0].attempt), (id, 2, 2));
        assert_eq!(times.lock().unwrap().len(), 1);
    });
}

#[test]
fn a_run_that_kills_each_daemon_is_given_up() {
    run(Engine::Postgres, async |db: &Database| {
        let now = db.ledger.now().await.unwrap();
        let id = RunId::generate(now);
        let claim = db
            .ledger
            .claim(id, "job", now, Trigger::Schedule, worker(9), now);
        assert_eq!(claim.await.unwrap(), Claim::Claimed);
        db.execute("update job_runs set attempt = 8, leased_until = clock_timestamp()")
            .await
            .unwrap();
        let mut daemon = Daemon::new(db, 1);
        let mut job = definition("job");
        job.enabled = false;
        let times = daemon.job(job, work(|_| async { Ok(report(1)) }));
        daemon.start();
        let runs = daemon.until("job", RunState::Failed, 1).await;
        daemon.drain().await;
        let error = "given up: 8 daemons died or were cut off while they ran it";
        assert_eq!(runs[0].error.as_deref(), Some(error));
        assert_eq!(times.lock().unwrap().len(), 0);
    });
}

#[test]
fn a_daemon_that_cannot_renew_ends_its_runs_before_another_begins_them() {
    run(Engine::Postgres, async |db: &Database| {
        let faulty: Arc<dyn JobLedger> = Faulty::new(&db.ledger, &[("renew", 1000)], &[]);
        let mut cut_off = Daemon::with(&faulty, db, 1);
        let ended: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let began = Arc::new(Semaphore::new(0));
        let (told, end) = (began.clone(), ended.clone());
        cut_off.job(
            definition("job"),
            work(move |_| {
                struct Guard(Arc<Mutex<Vec<Instant>>>);
                impl Drop for Guard {
                    fn drop(&mut self) {
                        self.0.lock().unwrap().push(Instant::now());
                    }
                }
                told.add_permits(1);
                let guard = Guard(end.clone());
                async move {
                    // Hears nothing.
                    std::future::pending::<()>().await;
                    drop(guard);
                    Ok(report(1))
                }
            }),
        );
        cut_off.start();
        let id = cut_off.ask_for("job").await;
        began.acquire().await.unwrap().forget();
        let claimed = Instant::now();
        let mut other = Daemon::new(db, 2);
        let mut job = definition("job");
        job.enabled = false;
        let begun: Arc<Mutex<Vec<Instant>>> = Arc::default();
        let note = begun.clone();
        other.job(
            job,
            work(move |_| {
                note.lock().unwrap().push(Instant::now());
                async { Ok(report(2)) }
            }),
        );
        other.start();
        // The first claims it again now and then, since it gives back what it lost.
        cut_off.stop.cancel();
        let runs = other.until("job", RunState::Succeeded, 1).await;
        assert_eq!(runs[0].id, id);
        let (ended, begun) = (ended.lock().unwrap()[0], begun.lock().unwrap()[0]);
        assert!(ended < begun, "both were at work");
        assert!(ended.duration_since(claimed) < Duration::from_secs(5));
        cut_off.drain().await;
        other.drain().await;
        let run = db.ledger.find_run(id).await.unwrap().unwrap();
        assert_eq!((run.state, run.counts["deleted"]), (RunState::Succeeded, 2));
    });
}
