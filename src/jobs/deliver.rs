//! The realtime delivery poll: one look at the outbox's tail, and at what expired waiting in it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;

use super::{Job, JobError, Report, RunContext};
use crate::live::{LiveCounts, Pump};

/// Looks each second, so that what other programs inserted is pushed too. Commits of this daemon
/// make the pump look at once; what those looks did is counted in the next run.
pub struct Deliver {
    pump: Arc<Pump>,
    counts: Arc<LiveCounts>,
}

impl Deliver {
    /// The job of `pump`; `counts` gather what its looks did.
    #[must_use]
    pub fn new(pump: Arc<Pump>, counts: Arc<LiveCounts>) -> Self {
        Self { pump, counts }
    }
}

#[async_trait]
impl Job for Deliver {
    async fn run(&self, _context: &RunContext) -> Result<Report, JobError> {
        self.pump.look().await?;
        let mut report = Report::default();
        let LiveCounts {
            pushed,
            delivered,
            expired,
        } = &*self.counts;
        for (name, count) in [
            ("pushed", pushed),
            ("delivered", delivered),
            ("expired", expired),
        ] {
            report.add(name, count.swap(0, Ordering::Relaxed));
        }
        Ok(report)
    }
}
