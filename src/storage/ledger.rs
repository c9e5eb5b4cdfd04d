//! The ledger of runs: who claimed a scheduled time, and how it ended.

use std::collections::BTreeMap;

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::StorageResult;
use crate::domain::{RunId, Subject};

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

/// The answer to a claim of a scheduled time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It is the caller's to run.
    Claimed,
    /// It was claimed before.
    Taken,
    /// The database's clock says that it is not due.
    NotDue,
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

/// The runs of the jobs. Due times are judged by the database's clock, so that a daemon whose own
/// clock is wrong neither runs early nor twice.
#[async_trait]
pub trait JobLedger: Send + Sync + 'static {
    /// Claims a scheduled time of a job for `daemon`: the row that it inserts is unique. A claim
    /// whose answer was lost may be repeated with the same `run`: it is still the caller's.
    async fn claim(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        trigger: Trigger,
        daemon: Uuid,
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

    /// Takes the oldest queued run of one of `jobs`.
    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>>;

    /// Counts one more attempt of a running run.
    async fn begin_attempt(&self, run: RunId, attempt: u32) -> StorageResult<()>;

    /// Writes how a run ended, unless it had ended before.
    async fn finish(&self, run: RunId, finish: &Finish) -> StorageResult<()>;

    /// Gives a run back to the queue without its attempt, because the daemon is stopping.
    async fn give_back(&self, run: RunId, counts: &Counts, attempt: u32) -> StorageResult<()>;

    /// Writes a run that began and ended without a claim: a delivery poll that found something, or
    /// a time that was skipped. Nothing happens where the time is taken, or where a skipped one is
    /// not due: another daemon may run it yet.
    async fn record(&self, run: &Run) -> StorageResult<()>;

    /// A job's runs, newest first, behind `before`.
    async fn runs(&self, job: &str, before: Option<RunId>, limit: u32) -> StorageResult<Vec<Run>>;

    /// The newest run of each of `jobs` that has one.
    async fn last_runs(&self, jobs: &[String]) -> StorageResult<Vec<Run>>;

    /// Deletes at most `limit` runs that ended before `before`, the oldest first; the newest run of
    /// each job stays. Answers how many.
    async fn prune(&self, before: DateTime<Utc>, limit: u32) -> StorageResult<u64>;

    /// Puts every running run back into the queue. Only for a database that one daemon alone holds:
    /// whatever runs there at its start was left by one that is gone.
    async fn recover(&self) -> StorageResult<u64>;

    /// The runs that `daemon` has claimed and not ended.
    async fn running(&self, daemon: Uuid) -> StorageResult<Vec<Run>>;

    /// How far `now`, a daemon's clock, is ahead of the clock that judges due times.
    async fn ahead(&self, now: DateTime<Utc>) -> StorageResult<TimeDelta>;

    /// The database's clock; also the cheapest proof that it answers.
    async fn now(&self) -> StorageResult<DateTime<Utc>>;
}
