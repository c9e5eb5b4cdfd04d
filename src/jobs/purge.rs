//! The purge: deletes what expired strictly before `now - older_than`, and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};

use super::{Ending, Job, JobError, RunContext};
use crate::domain::{Clock, Retention, TenantId};
use crate::storage::{EventRepository, JobLedger, StorageResult};

/// Idempotency keys count for 24 hours.
const IDEMPOTENCY_KEPT: TimeDelta = TimeDelta::hours(24);
const FIRST_BATCH: u32 = 100;
const LARGEST_BATCH: u32 = 10_000;

/// The purge of expired events.
pub struct Purge {
    /// The events.
    pub events: Arc<dyn EventRepository>,
    /// Whose clock has a say in what is due.
    pub ledger: Arc<dyn JobLedger>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// The rule.
    pub retention: Retention,
    /// Count only.
    pub dry_run: bool,
    /// How long a transaction should take: batches grow and shrink towards it.
    pub batch_time: Duration,
}

#[async_trait]
impl Job for Purge {
    async fn run(&self, context: &RunContext) -> Result<Ending, JobError> {
        if self.dry_run {
            for (_, count) in self.due().await?.tenants {
                context.report.add("would_delete", count);
            }
            return Ok(Ending::Finished);
        }
        let cutoff = self.cutoff().await?;
        for tenant in self.events.expiring_tenants().await? {
            let purged = self.in_batches(context, "deleted", |limit| {
                self.events
                    .delete_expired_before(&tenant, cutoff, limit, context.fence)
            });
            if purged.await? == Ending::Unfinished {
                return Ok(Ending::Unfinished);
            }
        }
        Ok(self.forget_idempotency_keys(context).await?)
    }
}

/// What a purge would delete now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// What expired strictly before this.
    pub cutoff: DateTime<Utc>,
    /// How much of it each tenant has.
    pub tenants: Vec<(TenantId, u64)>,
}

impl Purge {
    /// The earlier of both clocks: one that runs ahead must not delete what is not due.
    async fn now(&self) -> StorageResult<DateTime<Utc>> {
        Ok(self.ledger.now().await?.min(self.clock.now()))
    }

    async fn cutoff(&self) -> StorageResult<DateTime<Utc>> {
        Ok(self.retention.cutoff(self.now().await?))
    }

    /// What a run would delete: the same selection, by the same clocks.
    ///
    /// # Errors
    /// Those of storage.
    pub async fn due(&self) -> StorageResult<Due> {
        let cutoff = self.cutoff().await?;
        let mut tenants = Vec::new();
        for tenant in self.events.expiring_tenants().await? {
            let count = self.events.count_expired_before(&tenant, cutoff).await?;
            tenants.push((tenant, count));
        }
        Ok(Due { cutoff, tenants })
    }

    async fn forget_idempotency_keys(&self, context: &RunContext) -> StorageResult<Ending> {
        let cutoff = self.now().await? - IDEMPOTENCY_KEPT;
        for tenant in self.events.idempotent_tenants().await? {
            let forgotten = self.in_batches(context, "idempotency_keys", |limit| {
                self.events
                    .delete_idempotency_before(&tenant, cutoff, limit, context.fence)
            });
            if forgotten.await? == Ending::Unfinished {
                return Ok(Ending::Unfinished);
            }
        }
        Ok(Ending::Finished)
    }

    /// Deletes in batches until a short one, or until the run is to stop.
    async fn in_batches<F>(
        &self,
        context: &RunContext,
        name: &str,
        delete: impl Fn(u32) -> F,
    ) -> StorageResult<Ending>
    where
        F: Future<Output = StorageResult<u64>>,
    {
        let mut limit = FIRST_BATCH;
        loop {
            if context.stop.is_cancelled() {
                return Ok(Ending::Unfinished);
            }
            let began = Instant::now();
            let deleted = delete(limit).await?;
            let took = began.elapsed();
            tracing::debug!(
                what = name,
                rows = deleted,
                elapsed_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
                "purged a batch"
            );
            context.report.add(name, deleted);
            if deleted < u64::from(limit) {
                return Ok(Ending::Finished);
            }
            limit = next_batch(limit, took, self.batch_time);
            // As long a pause as the work: others get the database half of the time.
            tokio::select! {
                () = tokio::time::sleep(took.min(self.batch_time)) => {}
                () = context.stop.cancelled() => {}
            }
        }
    }
}

/// The size of the next batch: towards `target`, at most half as large again or halved at a time.
fn next_batch(limit: u32, took: Duration, target: Duration) -> u32 {
    let factor = (target.as_secs_f64() / took.as_secs_f64().max(1e-6)).clamp(0.5, 1.5);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of at most twice the largest batch"
    )]
    let next = (f64::from(limit) * factor) as u32;
    next.clamp(10, LARGEST_BATCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_follow_their_time() {
        let target = Duration::from_millis(10);
        assert_eq!(next_batch(100, Duration::from_millis(1), target), 150);
        assert_eq!(next_batch(100, Duration::from_millis(10), target), 100);
        assert_eq!(next_batch(100, Duration::from_millis(100), target), 50);
        assert_eq!(next_batch(10, Duration::from_secs(1), target), 10);
        assert_eq!(
            next_batch(LARGEST_BATCH, Duration::ZERO, target),
            LARGEST_BATCH
        );
    }
}
