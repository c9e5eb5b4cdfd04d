//! The purge: deletes what policy says is due, and nothing else.
//!
//! Tenant by tenant and rule by rule it goes through a range of an index ([`Sweep`]), in batches that
//! follow their time. What a hold keeps is passed over.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};

use super::{Ending, Job, JobError, RunContext};
use crate::domain::{Clock, Retention, Subject, Sweep, TenantId};
use crate::storage::{
    Deletion, DueCount, EventRepository, JobLedger, RetentionStore, StorageResult, SweepKey,
};

/// Idempotency keys count for 24 hours.
const IDEMPOTENCY_KEPT: TimeDelta = TimeDelta::hours(24);
/// A run that would delete more than so many times the median of this many runs before, and more than
/// so many rows, waits for an operator.
const EXCESS_FACTOR: u64 = 10;
const EXCESS_ROWS: u64 = 10_000;
const COMPARED_RUNS: u32 = 10;
/// How long a batch waits before it is tried again where others were in its way, doubled each time up
/// to the longest, and how long in all before the run is left to its next attempt.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(30);
/// How many rows a batch has before it is known how long one takes.
pub(crate) const FIRST_BATCH: u32 = 100;
const LARGEST_BATCH: u32 = 10_000;

/// The purge of expired events.
pub struct Purge {
    /// The events.
    pub events: Arc<dyn EventRepository>,
    /// What is deleted, and what is held.
    pub store: Arc<dyn RetentionStore>,
    /// Whose clock has a say in what is due.
    pub ledger: Arc<dyn JobLedger>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// The rules.
    pub retention: Retention,
    /// The job's name, under which its former runs are found.
    pub job: String,
    /// Count only.
    pub dry_run: bool,
    /// Who said that it may delete more than usual.
    pub confirmed_by: Option<Subject>,
    /// How many rows a second it deletes at most; 0 is as many as it can.
    pub max_rate: u32,
    /// How long a transaction should take: batches grow and shrink towards it.
    pub batch_time: BatchTime,
}

/// How long transactions that delete should take.
#[derive(Debug, Clone, Copy)]
pub struct BatchTime {
    /// While nobody else wants the database.
    pub alone: Duration,
    /// While others do, and may wait for it.
    pub beside_others: Duration,
}

#[async_trait]
impl Job for Purge {
    async fn run(&self, context: &RunContext) -> Result<Ending, JobError> {
        if self.dry_run {
            for part in self.due().await?.parts {
                context.report.add("would_delete", part.count.due);
                context.report.add("held", part.count.held);
            }
            return Ok(Ending::Finished);
        }
        let sweeps = self.sweeps(context).await?;
        let Some(excess) = self.find_excess(&sweeps).await? else {
            if self.sweep_all(context, &sweeps).await? == Ending::Unfinished {
                return Ok(Ending::Unfinished);
            }
            self.store.end_guard(&self.job).await?;
            if self.forget_idempotency_keys(context).await? == Ending::Unfinished {
                return Ok(Ending::Unfinished);
            }
            return Ok(self.give_back_space(context).await?);
        };
        // The guard holds the events back, nothing else.
        if self.forget_idempotency_keys(context).await? == Ending::Unfinished {
            return Ok(Ending::Unfinished);
        }
        Err(JobError::Permanent(excess.to_string()))
    }
}

/// What a purge would delete now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// Where no rule says otherwise, what expired strictly before this.
    pub cutoff: DateTime<Utc>,
    /// Tenant by tenant and rule by rule; parts of nothing are left out.
    pub parts: Vec<DuePart>,
}

/// What a purge would delete of a tenant by one rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuePart {
    /// What it reads.
    pub sweep: Sweep,
    /// How much of it goes, and how much a hold keeps.
    pub count: DueCount,
}

impl Purge {
    /// The earlier of both clocks: one that runs ahead must not delete what is not due.
    async fn now(&self) -> StorageResult<DateTime<Utc>> {
        Ok(self.ledger.now().await?.min(self.clock.now()))
    }

    /// The tenants of which anything can be due, in order.
    async fn tenants(&self) -> StorageResult<BTreeSet<TenantId>> {
        let mut tenants: BTreeSet<TenantId> =
            self.events.expiring_tenants().await?.into_iter().collect();
        if self.retention.takes_aged_of_any_tenant() {
            tenants.extend(self.store.ageing_tenants().await?);
        } else {
            tenants.extend(self.retention.tenants_with_max_age().cloned());
        }
        Ok(tenants)
    }

    /// What a run would delete: the same selection, by the same clocks.
    ///
    /// # Errors
    /// Those of storage.
    pub async fn due(&self) -> StorageResult<Due> {
        let now = self.now().await?;
        let mut parts = Vec::new();
        for tenant in self.tenants().await? {
            for sweep in self.retention.sweeps(&tenant, now) {
                let count = self.store.count_due(&sweep, u64::MAX).await?;
                if count != DueCount::default() {
                    parts.push(DuePart { sweep, count });
                }
            }
        }
        let cutoff = self.retention.cutoff(now);
        Ok(Due { cutoff, parts })
    }

    /// What this run goes through.
    async fn sweeps(&self, context: &RunContext) -> StorageResult<Vec<Sweep>> {
        let now = self.now().await?;
        let held: HashSet<TenantId> = self.store.held_tenants().await?.into_iter().collect();
        let mut sweeps = Vec::new();
        for tenant in self.tenants().await? {
            // Not even counted, so that holds cost nothing.
            if held.contains(&tenant) {
                context.report.add("held_tenants", 1);
            } else {
                sweeps.extend(self.retention.sweeps(&tenant, now));
            }
        }
        Ok(sweeps)
    }

    /// Whether the run would delete far more than usual, and nobody confirmed that it may. A purge
    /// without former runs has nothing to be compared with.
    async fn find_excess(&self, sweeps: &[Sweep]) -> StorageResult<Option<Excess>> {
        if let Some(by) = &self.confirmed_by {
            let now = self.clock.now();
            self.store.confirm(&self.job, by, now).await?;
            return Ok(None);
        }
        let former = self.store.usual_deletions(&self.job, COMPARED_RUNS).await?;
        let Some(usual) = median(former) else {
            return Ok(None);
        };
        let most = usual.saturating_mul(EXCESS_FACTOR).max(EXCESS_ROWS);
        let mut found = 0;
        for sweep in sweeps {
            found += self.count_beyond(sweep, most - found).await?;
            if found > most {
                if self.store.is_confirmed(&self.job).await? {
                    return Ok(None);
                }
                let now = self.clock.now();
                self.store.hold_back(&self.job, found, usual, now).await?;
                let job = self.job.clone();
                return Ok(Some(Excess { job, most, usual }));
            }
        }
        Ok(None)
    }

    /// How much a sweep would take; where that is more than `most`, at least one more.
    async fn count_beyond(&self, sweep: &Sweep, most: u64) -> StorageResult<u64> {
        let mut limit = most.saturating_add(1);
        loop {
            let DueCount { due, held } = self.store.count_due(sweep, limit).await?;
            // Held ones may have used the limit up.
            if due > most || due + held < limit {
                return Ok(due);
            }
            limit = limit.saturating_mul(2);
        }
    }

    /// Deletes what the sweeps select. One that others are in the way of goes on behind the rest, so
    /// that a lock which somebody keeps in one tenant holds up no other.
    async fn sweep_all(&self, context: &RunContext, sweeps: &[Sweep]) -> StorageResult<Ending> {
        let mut left: VecDeque<Course> = (sweeps.iter())
            .map(|sweep| Course {
                sweep,
                after: None,
                pace: Pace::new(self.batch_time, self.max_rate),
            })
            .collect();
        while let Some(mut course) = left.pop_front() {
            match self.sweep(context, &mut course).await {
                Ok(Ending::Finished) => {}
                Ok(Ending::Unfinished) => return Ok(Ending::Unfinished),
                Err(error) if error.is_contended() => {
                    let Some(wait) = course.pace.give_way() else {
                        return Err(error);
                    };
                    left.push_back(course);
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = context.stop.cancelled() => {}
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Ending::Finished)
    }

    /// Deletes what a sweep selects, from where it has come.
    async fn sweep(&self, context: &RunContext, course: &mut Course<'_>) -> StorageResult<Ending> {
        let Course { sweep, after, pace } = course;
        while let Some(limit) = pace.begin(context) {
            let deletion = Deletion {
                run: Some(context.run),
                fence: context.fence,
                now: self.clock.now(),
            };
            let batch = self.store.sweep(sweep, *after, limit, deletion).await?;
            *after = batch.last;
            context.report.add("deleted", batch.deleted);
            context.report.add("held", batch.held);
            pace.is_alone = batch.was_alone;
            let is_end = pace.is_end(batch.seen, batch.deleted, batch.took);
            pace.pause(context, is_end).await;
            if is_end {
                return Ok(Ending::Finished);
            }
        }
        Ok(Ending::Unfinished)
    }

    /// Lets the file of the database shrink, in small steps.
    async fn give_back_space(&self, context: &RunContext) -> StorageResult<Ending> {
        loop {
            let began = Instant::now();
            if context.stop.is_cancelled() {
                // What was to be deleted is; the next run goes on with the file.
                return Ok(Ending::Finished);
            }
            if !self.store.give_back_space().await? {
                return Ok(Ending::Finished);
            }
            tokio::select! {
                () = tokio::time::sleep(began.elapsed().min(self.batch_time.alone)) => {}
                () = context.stop.cancelled() => {}
            }
        }
    }

    async fn forget_idempotency_keys(&self, context: &RunContext) -> StorageResult<Ending> {
        let cutoff = self.now().await? - IDEMPOTENCY_KEPT;
        for tenant in self.events.idempotent_tenants().await? {
            let mut pace = Pace::new(self.batch_time, self.max_rate);
            loop {
                let Some(limit) = pace.begin(context) else {
                    return Ok(Ending::Unfinished);
                };
                let forgotten = self
                    .events
                    .delete_idempotency_before(&tenant, cutoff, limit, context.fence)
                    .await?;
                context.report.add("idempotency_keys", forgotten);
                let is_end = pace.is_end(forgotten, forgotten, pace.began.elapsed());
                pace.pause(context, is_end).await;
                if is_end {
                    break;
                }
            }
        }
        Ok(Ending::Finished)
    }
}

/// What an operator is to do about a purge that waits.
#[must_use]
pub fn what_to_do(job: &str) -> String {
    format!(
        "look with `timelined purge --dry-run --job {job}`, and let it go on with \
         `timelined purge --confirm --job {job}`"
    )
}

/// Why a run waits for an operator.
struct Excess {
    job: String,
    most: u64,
    usual: u64,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { job, most, usual } = self;
        write!(
            f,
            "would delete more than {most} events, while {usual} are usual, so it deleted nothing: {}",
            what_to_do(job)
        )
    }
}

/// The middle of some numbers, the lesser of two; `None` of none.
fn median(mut numbers: Vec<u64>) -> Option<u64> {
    numbers.sort_unstable();
    numbers.get(numbers.len().checked_sub(1)? / 2).copied()
}

/// A sweep, and how far it has come.
struct Course<'a> {
    sweep: &'a Sweep,
    after: Option<SweepKey>,
    pace: Pace,
}

/// How large batches are, and how long the pauses between them.
struct Pace {
    batch_time: BatchTime,
    max_rate: u32,
    limit: u32,
    began: Instant,
    took: Duration,
    deleted: u64,
    /// How long it waited for others since its last batch.
    waited: Duration,
    /// Whether nobody else wanted the database during the last batch.
    is_alone: bool,
}

impl Pace {
    fn new(batch_time: BatchTime, max_rate: u32) -> Self {
        Self {
            batch_time,
            max_rate,
            limit: FIRST_BATCH,
            began: Instant::now(),
            took: Duration::ZERO,
            deleted: 0,
            waited: Duration::ZERO,
            is_alone: false,
        }
    }

    /// The size of the next batch; `None` where the run is to stop.
    fn begin(&mut self, context: &RunContext) -> Option<u32> {
        self.began = Instant::now();
        if self.max_rate > 0 {
            // No second takes more than its rows.
            self.limit = self.limit.min(self.max_rate);
        }
        (!context.stop.is_cancelled()).then_some(self.limit)
    }

    /// Whether a batch that looked at so many rows was the last one.
    fn is_end(&mut self, seen: u64, deleted: u64, took: Duration) -> bool {
        self.took = self.began.elapsed();
        self.deleted = deleted;
        self.waited = Duration::ZERO;
        tracing::debug!(
            seen,
            deleted,
            elapsed_us = u64::try_from(self.took.as_micros()).unwrap_or(u64::MAX),
            "purged a batch"
        );
        let is_end = seen < u64::from(self.limit);
        self.limit = next_batch(self.limit, took, self.target());
        is_end
    }

    fn target(&self) -> Duration {
        if self.is_alone {
            self.batch_time.alone
        } else {
            self.batch_time.beside_others
        }
    }

    /// How long others get the database after a batch: as long as it took, where there are any, and as
    /// the rate asks for.
    /// What follows the last batch of a sweep is another one, or nothing.
    fn break_after(&self, is_end: bool) -> Duration {
        let fair = if is_end || self.is_alone {
            Duration::ZERO
        } else {
            self.took.min(self.batch_time.beside_others)
        };
        if self.max_rate == 0 {
            return fair;
        }
        #[expect(clippy::cast_precision_loss, reason = "a batch has few rows")]
        let slow = Duration::from_secs_f64(self.deleted as f64 / f64::from(self.max_rate));
        fair.max(slow.saturating_sub(self.took))
    }

    /// Others were in the way of a batch: it comes again half as large, after the answer; `None` where
    /// they have been for too long.
    fn give_way(&mut self) -> Option<Duration> {
        let wait = self.waited.clamp(FIRST_WAIT, LONGEST_WAIT);
        tracing::debug!(limit = self.limit, "others were in the way of a batch");
        self.waited += wait;
        self.limit = (self.limit / 2).max(1);
        (self.waited <= PATIENCE).then_some(wait)
    }

    async fn pause(&self, context: &RunContext, is_end: bool) {
        let pause = self.break_after(is_end);
        if pause.is_zero() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = context.stop.cancelled() => {}
        }
    }
}

/// The size of the next batch: towards `target`, at most half as large again or halved at a time.
pub(crate) fn next_batch(limit: u32, took: Duration, target: Duration) -> u32 {
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

    const TIME: BatchTime = BatchTime {
        alone: Duration::from_millis(50),
        beside_others: Duration::from_millis(20),
    };

    #[test]
    fn a_batch_is_shorter_while_others_want_the_database() {
        let mut pace = Pace::new(TIME, 0);
        let took = Duration::from_millis(40);
        pace.is_end(1, 1, took);
        assert_eq!(pace.limit, FIRST_BATCH / 2);
        pace.is_alone = true;
        pace.is_end(1, 1, took);
        assert_eq!(pace.limit, FIRST_BATCH / 2 * 5 / 4);
    }

    #[test]
    fn a_rate_makes_pauses_longer_never_shorter() {
        let pace = |max_rate, deleted| Pace {
            took: Duration::from_millis(10),
            deleted,
            ..Pace::new(TIME, max_rate)
        };
        let millis = Duration::from_millis;
        assert_eq!(pace(0, 1_000).break_after(false), millis(10));
        assert_eq!(pace(0, 1_000).break_after(true), Duration::ZERO);
        assert_eq!(pace(1_000, 100).break_after(false), millis(90));
        assert_eq!(pace(1_000, 100).break_after(true), millis(90));
        assert_eq!(pace(1_000, 1).break_after(false), millis(10));
        assert_eq!(pace(1_000, 0).break_after(true), Duration::ZERO);
    }

    #[test]
    fn a_batch_gives_way_for_half_a_minute_and_is_smaller_each_time() {
        let mut pace = Pace::new(TIME, 0);
        let mut waits = Vec::new();
        while let Some(wait) = pace.give_way() {
            waits.push((pace.limit, wait.as_millis()));
        }
        let first = [(50, 100), (25, 100), (12, 200), (6, 400), (3, 800)];
        assert_eq!(waits[..5], first);
        assert_eq!(waits.last(), Some(&(1, LONGEST_WAIT.as_millis())));
        let total: u128 = waits.iter().map(|(_, wait)| wait).sum();
        assert!((20_000..=30_000).contains(&total), "{total} ms");
        // Whatever it deletes shows that nobody stands in the way of all.
        pace.is_end(1, 1, Duration::ZERO);
        assert_eq!(pace.give_way(), Some(FIRST_WAIT));
    }

    #[test]
    fn the_median_of_two_is_the_lesser() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![7]), Some(7));
        assert_eq!(median(vec![9, 2]), Some(2));
        assert_eq!(median(vec![9, 0, 100]), Some(9));
    }

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
