//! Jobs: what runs on schedule, who keeps time, and what becomes of a run.
//!
//! A [`Job`] takes no input: its work is in the database, it is safe to run twice, works in batches
//! and looks between them whether it is to stop. The [`Runner`] owns everything else: due times,
//! claims, overlap, timeouts, retries, the run's row and its log line. [`Alerts`] hear how runs
//! ended, and mail what somebody should see to.

mod alerts;
mod controls;
mod deliver;
mod export;
mod pulse;
mod purge;
pub mod retry;
mod runner;
pub mod schedule;

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

pub use alerts::{AlertSettings, Alerts, DueMail};
pub use controls::resume;
pub use deliver::Deliver;
pub use export::ScheduleExports;
pub use pulse::Pulse;
pub use purge::{BatchTime, Due, DuePart, Purge, what_to_do};
pub(crate) use purge::{FIRST_BATCH, next_batch};
pub use runner::{Runner, RunnerHandle, RunnerSettings};

use crate::domain::RunId;
use crate::storage::{Counts, Fence, StorageError};
use crate::telemetry::chain;

/// What a run of a job gets.
#[derive(Debug, Clone)]
pub struct RunContext {
    /// The run.
    pub run: RunId,
    /// Every transaction of the run checks it; `None` where the run is no row, such as a command's.
    pub fence: Option<Fence>,
    /// The time for which it runs.
    pub scheduled_at: DateTime<Utc>,
    /// Cancelled when the run is to reach a safe point and return what it has.
    pub stop: CancellationToken,
    /// What it has done so far: filled as it goes, so that an error, a panic or a timeout tells it too.
    pub report: Report,
}

/// What a run has done, in numbers by name. The runner and the job hold the same one.
#[derive(Debug, Clone, Default)]
pub struct Report(Arc<Mutex<Counts>>);

impl Report {
    /// Adds to a number; what is zero is left out of the row.
    pub fn add(&self, name: &str, count: u64) {
        if count > 0 {
            *self.lock().entry(name.to_owned()).or_default() += count;
        }
    }

    /// Takes the numbers out.
    #[must_use]
    pub fn take(&self) -> Counts {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far a run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// To its end.
    Finished,
    /// It stopped before, because it was asked to.
    Unfinished,
}

/// Why an attempt failed; decides whether it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The same attempt may succeed later.
    #[error("{0}")]
    Transient(String),
    /// It will not succeed until somebody changes something.
    #[error("{0}")]
    Permanent(String),
    /// The run is another daemon's now: nothing that this one does for it counts any more.
    #[error("the run was taken over by another daemon")]
    Lost,
}

impl From<StorageError> for JobError {
    fn from(error: StorageError) -> Self {
        if matches!(error, StorageError::Fenced) {
            return Self::Lost;
        }
        let text = chain(&error);
        if error.is_transient() {
            Self::Transient(text)
        } else {
            Self::Permanent(text)
        }
    }
}

/// The work of a job.
#[async_trait]
pub trait Job: Send + Sync + 'static {
    /// Does what there is to do, and adds to the context's report what it did.
    async fn run(&self, context: &RunContext) -> Result<Ending, JobError>;

    /// Hears each second whether the job is paused: what it does besides its runs rests meanwhile.
    fn set_paused(&self, _is_paused: bool) {}
}
