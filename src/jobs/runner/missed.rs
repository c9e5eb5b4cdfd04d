//! Times that passed without a run: while no daemon ran, while this one was suspended, or across a
//! step of the clock. Each is made up for or gets a row with the reason, as the job's `catch_up`
//! says; where they are many they share a row.

use std::collections::BTreeSet;
use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};

use super::{Shared, Slot};
use crate::config::{CatchUp, JobDefinition};
use crate::domain::{RunId, format_time};
use crate::storage::{Counts, Run, RunState, SKIPPED, StorageResult, Trigger};
use crate::telemetry::chain;

/// A time that is not older than this is run as if nothing had been: its daemon died, perhaps, and
/// this one stands in for it.
pub(super) const GRACE: TimeDelta = TimeDelta::seconds(6);
/// How far before the last time that is settled others may have been passed over, since daemons
/// claim beside each other.
const LOOK_BACK: TimeDelta = TimeDelta::seconds(15);
/// Younger times are left to the daemons that may be claiming them now.
const CLAIMED_WITHIN: TimeDelta = TimeDelta::seconds(1);
/// Times that are looked at one by one.
const WALKED_AT_MOST: u32 = 10_000;
/// Times that get a row each.
const ROWS_AT_MOST: usize = 100;
/// Times that are made up for.
const MADE_UP_AT_MOST: usize = 1_000;
/// Rows of one transaction.
const BATCH: usize = 200;

/// Looks into the times of a job from `first` to `until`, in a task of its own.
pub(super) fn spawn(
    shared: &Arc<Shared>,
    slot: &Arc<Slot>,
    first: DateTime<Utc>,
    until: DateTime<Utc>,
) {
    let (shared, slot) = (shared.clone(), slot.clone());
    let tracker = shared.settings.tracker.clone();
    tracker.spawn(async move { insist(&shared, &slot, first, until).await });
}

/// Looks into what passed between the last times that are settled and the start of this daemon.
pub(super) async fn since_the_last_times(shared: &Arc<Shared>, start: DateTime<Utc>) {
    let jobs = shared.jobs();
    let planned: Vec<String> = jobs
        .iter()
        .filter(|slot| slot.definition.enabled && !slot.is_poll())
        .map(|slot| slot.definition.name.clone())
        .collect();
    let last = loop {
        match last_settled(shared, &planned).await {
            Ok(last) => break last,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "could not look for missed times");
            }
        }
        if shared.is_stopping() {
            return;
        }
        shared.wait_for_storage().await;
    };
    let until = start.min(shared.now());
    for (job, last) in last {
        let Some(slot) = shared.slot(&job) else {
            continue;
        };
        let Some(first) = slot.next_after(last).filter(|at| *at <= until) else {
            continue;
        };
        let (latest, _) = slot.latest_due(first, until);
        if until - latest > GRACE {
            insist(shared, &slot, first, latest).await;
        } else {
            // The planner runs it, unless somebody has.
            slot.lock().early = Some(latest);
            shared.settings.pulse.wake();
            if first < latest {
                insist(shared, &slot, first, latest - TimeDelta::microseconds(1)).await;
            }
        }
    }
}

/// For each job the time from which on there may be times without a row: a little before the last
/// that has one, though not before the first.
async fn last_settled(
    shared: &Shared,
    jobs: &[String],
) -> StorageResult<Vec<(String, DateTime<Utc>)>> {
    shared.ask_the_clock().await?;
    let ledger = &shared.settings.ledger;
    let mut last = ledger.last_times(jobs).await?;
    for (job, at) in &mut last {
        let near = ledger
            .settled(job, *at - LOOK_BACK, *at, WALKED_AT_MOST)
            .await?;
        *at = near.last().map_or(*at, |oldest| oldest.at);
    }
    Ok(last)
}

/// Settles the times, waiting for a database that is away.
async fn insist(shared: &Shared, slot: &Slot, first: DateTime<Utc>, until: DateTime<Utc>) {
    while let Err(error) = settle(shared, slot, first, until).await {
        if !error.is_transient() || shared.is_stopping() {
            let error = chain(&error);
            tracing::warn!(
                job.name = slot.definition.name,
                error,
                "could not record the times that passed"
            );
            return;
        }
        shared.wait_for_storage().await;
    }
}

async fn settle(
    shared: &Shared,
    slot: &Slot,
    first: DateTime<Utc>,
    until: DateTime<Utc>,
) -> StorageResult<()> {
    let ledger = &shared.settings.ledger;
    let job = &slot.definition;
    shared.ask_the_clock().await?;
    if shared.now() < until {
        // It was this machine's clock that was wrong.
        let mut busy = slot.lock();
        busy.early = Some(busy.early.map_or(first, |early| early.min(first)));
        return Ok(());
    }
    let pauses = ledger.pauses().await?;
    if pauses.iter().any(|pause| pause.job == job.name) {
        // Whoever resumes it tells what passed.
        return Ok(());
    }
    if shared.settings.is_shared {
        let age = shared.now() - until;
        let wait = (CLAIMED_WITHIN - age).to_std().unwrap_or_default();
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.settings.stop.cancelled() => {}
        }
    }
    let settled = ledger
        .settled(&job.name, first, until, WALKED_AT_MOST)
        .await?;
    let before = settled
        .iter()
        .filter(|time| time.skipped.is_some())
        .map(|time| time.at)
        .max();
    let settled: BTreeSet<DateTime<Utc>> = settled.iter().map(|time| time.at).collect();
    let passed = walk(job, first, until);
    let open = passed
        .times
        .into_iter()
        .filter(|at| !settled.contains(at) && before.is_none_or(|before| *at > before));
    let open = Open {
        times: open.collect(),
        is_more: passed.is_more,
    };
    if open.times.is_empty() {
        return Ok(());
    }
    let rows = open.rows(job, until, shared.now());
    let mut added = 0;
    for rows in rows.chunks(BATCH) {
        added += ledger.add_missed(rows).await?;
    }
    if added > 0 {
        let is_made_up = rows.iter().any(|run| run.state == RunState::Queued);
        tracing::warn!(
            job.name = job.name,
            times = open.times.len(),
            from = format_time(open.times[0]),
            to = format_time(open.times[open.times.len() - 1]),
            is_made_up,
            "times of {} passed without a run",
            job.name
        );
        if is_made_up {
            shared.settings.pulse.wake();
        }
    }
    Ok(())
}

/// Times that passed, oldest first.
#[derive(Debug)]
struct Open {
    times: Vec<DateTime<Utc>>,
    /// There are more than were walked; the last is among them.
    is_more: bool,
}

fn walk(job: &JobDefinition, first: DateTime<Utc>, until: DateTime<Utc>) -> Open {
    let mut times = Vec::new();
    let mut next = Some(first);
    while let Some(at) = next.filter(|at| *at <= until) {
        if times.len() == WALKED_AT_MOST as usize {
            // The newest, which may be made up for.
            let nearly = until - TimeDelta::days(1);
            let mut at = job.schedule.next_after(nearly.max(at));
            let mut last = None;
            for _ in 0..WALKED_AT_MOST * 10 {
                let Some(found) = at.filter(|at| *at <= until) else {
                    break;
                };
                last = Some(found);
                at = job.schedule.next_after(found);
            }
            times.extend(last);
            return Open {
                times,
                is_more: true,
            };
        }
        times.push(at);
        next = job.schedule.next_after(at);
    }
    Open {
        times,
        is_more: false,
    }
}

impl Open {
    /// The rows for times of which the newest is `until`, unless a newer one runs as planned.
    fn rows(&self, job: &JobDefinition, until: DateTime<Utc>, now: DateTime<Utc>) -> Vec<Run> {
        let within = TimeDelta::from_std(job.catch_up_within).unwrap_or(TimeDelta::MAX);
        let young = self
            .times
            .partition_point(|at| now.signed_duration_since(*at) > within);
        let is_last = self.times.last() == Some(&until) && now - until > GRACE;
        let wanted = match job.catch_up {
            CatchUp::Skip => 0,
            // Otherwise the time that comes after these makes up for them.
            CatchUp::Once => usize::from(is_last),
            CatchUp::All => MADE_UP_AT_MOST,
        };
        let made_up_from = young.max(self.times.len().saturating_sub(wanted));
        let (skipped, made_up) = self.times.split_at(made_up_from);
        let why = match job.catch_up {
            CatchUp::Skip => "and catch_up is skip",
            _ if made_up.is_empty() && is_last => "longer ago than catch_up_within",
            CatchUp::Once => "and a later time makes up for it",
            CatchUp::All => "and catch_up has its bounds",
        };
        let mut rows = Vec::new();
        if skipped.len() > ROWS_AT_MOST {
            let (first, last) = (skipped[0], skipped[skipped.len() - 1]);
            let more = if self.is_more { "more than " } else { "" };
            let mut row = missed(job, last, RunState::Skipped, now);
            row.error = Some(format!(
                "{more}{} times from {} to {} passed while no daemon ran them, {why}",
                skipped.len(),
                format_time(first),
                format_time(last),
            ));
            row.counts = Counts::from([(SKIPPED.to_owned(), skipped.len() as u64)]);
            rows.push(row);
        } else {
            rows.extend(skipped.iter().map(|at| {
                let mut row = missed(job, *at, RunState::Skipped, now);
                row.error = Some(format!("its time passed while no daemon ran it, {why}"));
                row
            }));
        }
        rows.extend(
            made_up
                .iter()
                .map(|at| missed(job, *at, RunState::Queued, now)),
        );
        rows
    }
}

fn missed(job: &JobDefinition, at: DateTime<Utc>, state: RunState, now: DateTime<Utc>) -> Run {
    let is_skipped = state == RunState::Skipped;
    Run {
        id: RunId::generate(now),
        job: job.name.clone(),
        scheduled_at: at,
        started_at: None,
        finished_at: is_skipped.then(|| now.max(at)),
        trigger: if is_skipped {
            Trigger::Schedule
        } else {
            Trigger::CatchUp
        },
        attempt: 0,
        daemon: None,
        fence: 0,
        state,
        counts: Counts::new(),
        error: None,
    }
}

/// Rows for the times that pass while a job is paused, from `from` to `until`.
pub(in crate::jobs) fn while_paused(
    job: &JobDefinition,
    by: &str,
    from: DateTime<Utc>,
    until: DateTime<Utc>,
) -> Vec<Run> {
    let Some(first) = job.schedule.next_after(from).filter(|at| *at <= until) else {
        return Vec::new();
    };
    let open = walk(job, first, until);
    let mut rows = Open {
        times: open.times,
        is_more: open.is_more,
    }
    .rows(
        &JobDefinition {
            catch_up: CatchUp::Skip,
            ..job.clone()
        },
        until,
        until,
    );
    for row in &mut rows {
        row.error = Some(match row.counts.get(SKIPPED) {
            Some(times) => format!("{times} times passed while {by} had paused the job"),
            None => format!("{by} had paused the job"),
        });
    }
    rows
}
