//! The ledger of runs: who claimed a scheduled time, and how it ended.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::StorageResult;
use crate::domain::{RunId, Subject};

/// How long a run belongs to its daemon without a renewal, by the clock that judges due times.
pub const LEASE: Duration = Duration::from_secs(5);

/// Numbers that a run leaves behind, such as `deleted`.
pub type Counts = BTreeMap<String, u64>;

crate::domain::closed_set!(
    /// What made a run start.
    Trigger, "trigger", {
        /// Its time had come.
        Schedule = "schedule",
        /// Its time had passed while nothing ran.
        CatchUp = "catch_up",
        /// Somebody asked for it.
        Manual = "manual",
    }
);

crate::domain::closed_set!(
    /// Where a run stands.
    RunState, "run state", {
        /// Waits for a daemon.
        Queued = "queued",
        /// A daemon works on it, or waits before its next attempt.
        Running = "running",
        /// Did what it was to do.
        Succeeded = "succeeded",
        /// Could not.
        Failed = "failed",
        /// Its last attempt took longer than the job's timeout.
        TimedOut = "timed_out",
        /// Was ended from outside.
        Cancelled = "cancelled",
        /// Its time passed without a run; `error` says why.
        Skipped = "skipped",
    }
);

/// One run of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Its identity; later runs sort later.
    pub id: RunId,
    /// The job's name.
    pub job: String,
    /// The time that it was due.
    #[serde(serialize_with = "crate::storage::ledger::time")]
    pub scheduled_at: DateTime<Utc>,
    /// When the first attempt began.
    #[serde(serialize_with = "crate::storage::ledger::optional_time")]
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    #[serde(serialize_with = "crate::storage::ledger::optional_time")]
    pub finished_at: Option<DateTime<Utc>>,
    /// What made it start.
    pub trigger: Trigger,
    /// How many attempts were made.
    pub attempt: u32,
    /// The daemon that ran it.
    pub daemon: Option<Uuid>,
    /// How often it has been claimed.
    #[serde(skip)]
    pub fence: u32,
    /// Where it stands.
    pub state: RunState,
    /// What it did, in numbers.
    pub counts: Counts,
    /// Why it failed or was skipped.
    pub error: Option<String>,
}

pub(crate) fn time<S: serde::Serializer>(
    at: &DateTime<Utc>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&crate::domain::format_time(*at))
}

#[expect(
    clippy::ref_option,
    reason = "the signature that serde's serialize_with asks for"
)]
pub(crate) fn optional_time<S: serde::Serializer>(
    at: &Option<DateTime<Utc>>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    at.map(crate::domain::format_time).serialize(serializer)
}

impl Run {
    /// What proves that it is still the caller's.
    #[must_use]
    pub fn fence(&self) -> Fence {
        Fence {
            run: self.id,
            number: self.fence,
        }
    }
}

/// The answer to a claim of a scheduled time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It is the caller's to run.
    Claimed,
    /// It was claimed before, or is settled otherwise.
    Taken,
    /// The database's clock says that it is not due.
    NotDue,
    /// Another run of the job is at work, perhaps on another daemon.
    Busy,
    /// The job is paused.
    Paused,
}

/// A run whose lease was renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewed {
    /// What the caller holds.
    pub fence: Fence,
    /// Who asked for its end, if somebody did.
    pub cancel_requested_by: Option<String>,
}

/// What a daemon looks at each second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glance {
    /// The clock that judges due times and leases.
    pub now: DateTime<Utc>,
    /// A run of one of the jobs waits in the queue.
    pub is_queued: bool,
    /// When the first lease of another daemon's run is over, unless that daemon renews it.
    pub lapses_at: Option<DateTime<Utc>>,
    /// The jobs that are paused.
    pub paused: Vec<String>,
}

/// A scheduled time that has a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    /// The time.
    pub at: DateTime<Utc>,
    /// How many times the row stands for, itself the last of them, where it is more than one.
    pub skipped: Option<u64>,
}

/// The number in [`Run::counts`] of the times that a row stands for: times that passed in such numbers
/// that they share one.
pub const SKIPPED: &str = "skipped";

/// A pause of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// The job.
    pub job: String,
    /// Since when.
    pub at: DateTime<Utc>,
    /// Who paused it.
    pub by: String,
}

/// What an operator did to a job or one of its runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobAction {
    /// When.
    #[serde(serialize_with = "crate::storage::ledger::time")]
    pub at: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// What: `run`, `pause`, `resume`, `cancel`, `retry`.
    pub action: String,
    /// The run, where it was about one.
    pub run_id: Option<RunId>,
}

/// What proves that a run is still its daemon's: rises with each claim, so that a daemon that was
/// frozen or cut off, and whose run another one took over, cannot write for it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// The run.
    pub run: RunId,
    /// How often it has been claimed.
    pub number: u32,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finish {
    /// The final state.
    pub state: RunState,
    /// How many attempts were made; counted here too, since [`JobLedger::begin_attempt`] may have
    /// found the database away.
    pub attempt: u32,
    /// What it did, in numbers.
    pub counts: Counts,
    /// Why it failed.
    pub error: Option<String>,
    /// When.
    pub at: DateTime<Utc>,
}

/// The runs of the jobs. Due times and leases are judged by the database's clock, so that a daemon
/// whose own clock is wrong neither runs early nor twice. A job has at most one run at work in the
/// whole installation; whatever ends or changes a run says the fence that it holds.
#[async_trait]
pub trait JobLedger: Send + Sync + 'static {
    /// Claims a scheduled time of a job for `daemon`: the row that it inserts is unique, and its lease
    /// lasts for [`LEASE`]. A claim whose answer was lost may be repeated with the same `run`: it is
    /// still the caller's.
    async fn claim(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        trigger: Trigger,
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim>;

    /// Puts a scheduled time into the queue, behind the run at work. At most one time of a job waits:
    /// an older one is skipped for it. `Claimed` is one that waits now; `Taken` is settled already, or
    /// older than one that waits.
    async fn queue(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim>;

    /// Adds a run that somebody asked for; a daemon takes it within a second.
    async fn enqueue(
        &self,
        run: RunId,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<()>;

    /// Adds times that passed without a run: those that are to be made up for go into the queue, the
    /// others are skipped. Times that are settled already are left alone. Answers how many were added.
    async fn add_missed(&self, runs: &[Run]) -> StorageResult<u64>;

    /// The scheduled times of a job that have a row, newest first.
    async fn settled(
        &self,
        job: &str,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Vec<Settled>>;

    /// Takes the oldest queued run of one of `jobs`, unless another run of the job is at work, or the
    /// job is paused and nobody asked for the run.
    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>>;

    /// Renews the leases of all runs of `daemon`, and answers them: what is missing is lost.
    async fn renew(&self, daemon: Uuid, now: DateTime<Utc>) -> StorageResult<Vec<Renewed>>;

    /// What there is to do for one of `jobs`, and what is paused. One cheap read.
    async fn glance(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Glance>;

    /// Puts the runs of other daemons whose leases are over back into the queue. Answers them.
    async fn take_over(&self, daemon: Uuid, now: DateTime<Utc>) -> StorageResult<Vec<Run>>;

    /// Counts one more attempt of a running run. Answers whether it is still the caller's, as do the
    /// next two.
    async fn begin_attempt(&self, fence: Fence, attempt: u32) -> StorageResult<bool>;

    /// Writes how a run ended.
    async fn finish(&self, fence: Fence, finish: &Finish) -> StorageResult<bool>;

    /// Gives a run back to the queue without its attempt, because the daemon is stopping.
    async fn give_back(&self, fence: Fence, counts: &Counts, attempt: u32) -> StorageResult<bool>;

    /// Writes a run that began and ended without a claim: a delivery poll that found something, or
    /// a time that was skipped. Nothing happens where the time is taken, or where a skipped one is
    /// not due: another daemon may run it yet. Answers whether it was written.
    async fn record(&self, run: &Run) -> StorageResult<bool>;

    /// A job's runs, newest first, behind `before`.
    async fn runs(&self, job: &str, before: Option<RunId>, limit: u32) -> StorageResult<Vec<Run>>;

    /// One run.
    async fn find_run(&self, run: RunId) -> StorageResult<Option<Run>>;

    /// The newest run of each of `jobs` that has one.
    async fn last_runs(&self, jobs: &[String]) -> StorageResult<Vec<Run>>;

    /// The last scheduled time of each of `jobs` that is settled: run, skipped, or waiting.
    async fn last_times(&self, jobs: &[String]) -> StorageResult<Vec<(String, DateTime<Utc>)>>;

    /// Pauses a job: its times are no longer claimed. Answers whether it was not paused before.
    async fn pause(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<bool>;

    /// Ends a pause, and answers it.
    async fn resume(
        &self,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Pause>>;

    /// The pauses there are.
    async fn pauses(&self) -> StorageResult<Vec<Pause>>;

    /// Ends a run: a queued one at once, a running one at its next safe point. Answers the state that
    /// it had, `None` where there is no such run; a run that has ended is left as it is.
    async fn cancel(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>>;

    /// Puts a run that failed, timed out or was cancelled back into the queue: the same row, so that
    /// what it did before is not done twice. Answers the state that it had, as [`JobLedger::cancel`].
    async fn retry(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>>;

    /// What operators did to a job, newest first.
    async fn actions(&self, job: &str, limit: u32) -> StorageResult<Vec<JobAction>>;

    /// Deletes at most `limit` runs that ended before `before`, the oldest first; the newest run of
    /// each job stays. Answers how many.
    async fn prune(&self, before: DateTime<Utc>, limit: u32) -> StorageResult<u64>;

    /// Puts every running run back into the queue. Only for a database that one daemon alone holds:
    /// whatever runs there at its start was left by one that is gone.
    async fn recover(&self, now: DateTime<Utc>) -> StorageResult<u64>;

    /// The runs that `daemon` has claimed and not ended.
    async fn running(&self, daemon: Uuid) -> StorageResult<Vec<Run>>;

    /// The database's clock; also the cheapest proof that it answers.
    async fn now(&self) -> StorageResult<DateTime<Utc>>;
}
