//! Jobs: what runs on schedule, who keeps time, and what becomes of a run.
//!
//! A [`Job`] takes no input: its work is in the database, it is safe to run twice, works in batches
//! and looks between them whether it is to stop. The [`Runner`] owns everything else: due times,
//! claims, overlap, timeouts, retries, the run's row and its log line.

mod deliver;
mod export;
mod pulse;
mod purge;
pub mod retry;
mod runner;
pub mod schedule;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

pub use deliver::Deliver;
pub use export::ScheduleExports;
pub use pulse::Pulse;
pub use purge::{Purge, due};
pub use runner::{Runner, RunnerSettings};

use crate::domain::RunId;
use crate::storage::{Counts, StorageError};
use crate::telemetry::chain;

/// What a run of a job gets.
#[derive(Debug, Clone)]
pub struct RunContext {
    /// The run.
    pub run: RunId,
    /// The time for which it runs.
    pub scheduled_at: DateTime<Utc>,
    /// Cancelled when the run is to reach a safe point and return what it has.
    pub stop: CancellationToken,
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// In numbers, by name.
    pub counts: Counts,
    /// Set where it stopped before its end because it was asked to.
    pub is_unfinished: bool,
}

impl Report {
    /// Adds to a number; what is zero is left out of the row.
    pub fn add(&mut self, name: &str, count: u64) {
        if count > 0 {
            *self.counts.entry(name.to_owned()).or_default() += count;
        }
    }
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
}

impl From<StorageError> for JobError {
    fn from(error: StorageError) -> Self {
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
    /// Does what there is to do.
    async fn run(&self, context: &RunContext) -> Result<Report, JobError>;
}
