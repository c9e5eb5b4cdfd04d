//! The pulse: one job of `tokio-cron-scheduler` each second, whose body only wakes the planner.
//!
//! Jobs themselves are not left to that crate: it starts each tick as a task of its own, which
//! overlaps a slow run and outlives a shutdown, and fires up to half a second late. The planner
//! sleeps to the due instant; the pulse proves that it still does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};

/// A planner that has missed so many pulses hangs.
const MISSED_AT_MOST: u32 = 3;

/// Counts pulses until the planner has seen them.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    unseen: Arc<AtomicU32>,
    asked: Arc<AtomicBool>,
    wake: Arc<Notify>,
}

impl Pulse {
    /// Starts the pulse.
    ///
    /// # Errors
    /// Where the scheduler does not start.
    pub async fn start(&self) -> Result<JobScheduler, JobSchedulerError> {
        let scheduler = JobScheduler::new().await?;
        let pulse = self.clone();
        let every_second = Job::new_async("* * * * * *", move |_id, _scheduler| {
            let pulse = pulse.clone();
            Box::pin(async move { pulse.beat() })
        })?;
        scheduler.add(every_second).await?;
        scheduler.start().await?;
        Ok(scheduler)
    }

    fn beat(&self) {
        let unseen = self.unseen.fetch_add(1, Ordering::Relaxed) + 1;
        if unseen == MISSED_AT_MOST {
            tracing::error!(unseen, "the planner has missed {unseen} pulses");
        }
        self.wake.notify_one();
    }

    /// The planner is alive.
    pub(super) fn seen(&self) {
        self.unseen.store(0, Ordering::Relaxed);
    }

    /// Ends with the next beat, or with [`Pulse::wake`].
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Wakes the planner at once, such as for a run that somebody asked for.
    pub fn wake(&self) {
        self.asked.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Whether it was woken by [`Pulse::wake`] since this was asked last.
    pub(super) fn was_asked(&self) -> bool {
        self.asked.swap(false, Ordering::Relaxed)
    }

    /// Whether the planner has seen its last pulses.
    #[must_use]
    pub fn is_steady(&self) -> bool {
        self.unseen.load(Ordering::Relaxed) < MISSED_AT_MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planner_that_misses_three_pulses_is_not_steady_until_it_sees_them() {
        let pulse = Pulse::default();
        pulse.beat();
        pulse.beat();
        assert!(pulse.is_steady());
        pulse.beat();
        assert!(!pulse.is_steady());
        pulse.seen();
        assert!(pulse.is_steady());
    }
}
