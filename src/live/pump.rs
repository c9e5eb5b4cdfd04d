//! The pump: looks at the outbox's tail and hands what is watched here to the hub.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chrono::{DateTime, Utc};
use tokio::sync::{Mutex, Notify};
use tokio_util::sync::CancellationToken;

use super::Hub;
use crate::domain::Clock;
use crate::storage::{EventRepository, StorageResult, TailMark};
use crate::telemetry::chain;

/// Waiting deliveries that are recorded as expired in one transaction.
const EXPIRE_BATCH: u32 = 1000;

/// What was done since it was last taken; the delivery job's next run tells it.
#[derive(Debug, Default)]
pub struct LiveCounts {
    /// Events handed to at least one connection.
    pub pushed: AtomicU64,
    /// Deliveries that were acknowledged.
    pub delivered: AtomicU64,
    /// Deliveries recorded as expired.
    pub expired: AtomicU64,
}

/// Looks at the tail of the outbox when told to.
pub struct Pump {
    events: Arc<dyn EventRepository>,
    hub: Arc<Hub>,
    clock: Arc<dyn Clock>,
    /// How many events are read at a time.
    batch: usize,
    /// Where the next look begins. Locked for a whole look, so that looks do not overlap.
    mark: Mutex<TailMark>,
    /// A commit of this daemon, which makes the next look come at once.
    wake: Arc<Notify>,
    counts: Arc<LiveCounts>,
}

impl Pump {
    /// A pump that begins at the end of the outbox: what waits there already is the backlog, which
    /// each subscription reads.
    ///
    /// # Errors
    /// Where the outbox cannot be read.
    pub async fn new(
        events: Arc<dyn EventRepository>,
        hub: Arc<Hub>,
        clock: Arc<dyn Clock>,
        batch: u32,
        wake: Arc<Notify>,
        counts: Arc<LiveCounts>,
    ) -> StorageResult<Self> {
        let mark = Mutex::new(events.tail_end().await?);
        let batch = batch as usize;
        Ok(Self {
            events,
            hub,
            clock,
            batch,
            mark,
            wake,
            counts,
        })
    }

    /// While delivery is paused, nothing is handed to connections; they keep quiet themselves too. What
    /// waited goes on at once when the pause ends.
    pub fn set_paused(&self, is_paused: bool) {
        if self.hub.set_paused(is_paused) {
            let what = if is_paused { "is paused" } else { "goes on" };
            tracing::info!("delivery {what}");
            self.wake.notify_one();
        }
    }

    /// Looks whenever a commit of this daemon says so. The poll each second looks besides.
    pub async fn run(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = self.wake.notified() => {}
                () = stop.cancelled() => return,
            }
            if let Err(error) = self.push_new(&stop).await {
                // The poll reports outages as failed runs; here it is only a hint that failed.
                tracing::debug!(error = %chain(&error), "could not look at the outbox");
            }
        }
    }

    /// One look: pushes what is new, and records what expired waiting. It ends before the next batch
    /// when `stop` is cancelled.
    ///
    /// # Errors
    /// Those of storage; the next look begins where this one did.
    pub async fn look(&self, stop: &CancellationToken) -> StorageResult<()> {
        let first_expiry = self.push_new(stop).await?;
        let now = self.clock.now();
        if first_expiry.is_none_or(|at| at > now) {
            return Ok(());
        }
        while !stop.is_cancelled() {
            let expired = self
                .events
                .expire_undelivered(self.clock.now(), EXPIRE_BATCH)
                .await?;
            self.counts.expired.fetch_add(expired, Ordering::Relaxed);
            if expired < u64::from(EXPIRE_BATCH) {
                break;
            }
        }
        Ok(())
    }

    /// Pushes what is new; answers when the first of all that waits expires.
    async fn push_new(&self, stop: &CancellationToken) -> StorageResult<Option<DateTime<Utc>>> {
        let mut mark = self.mark.lock().await;
        if self.hub.is_paused() {
            return Ok(None);
        }
        let tail = self
            .events
            .tail(&mark, &|tenant, contact| {
                self.hub.is_watched(tenant, contact)
            })
            .await?;
        for entries in tail.entries.chunks(self.batch) {
            if stop.is_cancelled() || self.hub.is_paused() {
                // The mark stays: the next look, if there is one, begins where this one did.
                return Ok(None);
            }
            let found = self.events.find_entries(entries).await?;
            let now = self.clock.now();
            let pushed = found
                .iter()
                .filter(|undelivered| self.hub.publish(undelivered, now))
                .count();
            self.counts
                .pushed
                .fetch_add(pushed as u64, Ordering::Relaxed);
        }
        *mark = tail.mark;
        Ok(tail.first_expiry)
    }
}
