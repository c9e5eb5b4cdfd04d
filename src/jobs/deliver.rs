//! The realtime delivery poll: one look at the outbox's tail, and at what expired waiting in it.

use std::sync::Arc;

use async_trait::async_trait;

use super::{Job, JobError, Report, RunContext};
use crate::live::Pump;

/// Looks each second, so that what other programs inserted is pushed too. Commits of this daemon
/// make the pump look at once; what those looks did is counted in the next run.
pub struct Deliver {
    pump: Arc<Pump>,
}

impl Deliver {
    /// The job of `pump`.
    #[must_use]
    pub fn new(pump: Arc<Pump>) -> Self {
        Self { pump }
    }
}

#[async_trait]
impl Job for Deliver {
    async fn run(&self, _context: &RunContext) -> Result<Report, JobError> {
        self.pump.look().await?;
        let mut report = Report::default();
        let done = self.pump.take_counts();
        report.add("pushed", done.pushed);
        report.add("expired", done.expired);
        Ok(report)
    }
}
