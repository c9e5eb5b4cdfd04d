//! The realtime delivery poll: one look at the outbox's tail, and at what expired waiting in it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;

use super::{Ending, Job, JobError, RunContext};
use crate::live::{LiveCounts, Pump};

/// Looks each second, so that what other programs inserted is pushed too. Commits of this daemon
/// make the pump look at once; what those looks did is counted in the next run. A pause stops those
/// looks too, and all that connections are sent.
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
    async fn run(&self, context: &RunContext) -> Result<Ending, JobError> {
        let looked = self.pump.look(&context.stop).await;
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
            context.report.add(name, count.swap(0, Ordering::Relaxed));
        }
        looked?;
        // Also where it was to stop: what is left is no part of this run, the next look finds it.
        Ok(Ending::Finished)
    }

    fn set_paused(&self, is_paused: bool) {
        self.pump.set_paused(is_paused);
    }
}
