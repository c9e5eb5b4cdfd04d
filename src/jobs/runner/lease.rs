//! Leases: what this daemon holds stays its own while it lives, and what another one left is taken
//! over when its lease ends.
//!
//! A lease lasts [`LEASE`] by the database's clock. One statement a second renews all that a daemon
//! holds; what its answer lacks was taken over. A daemon that could not renew ends its own runs
//! before anybody else may begin them, and whatever it writes late is refused by the fence.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use tokio_util::sync::CancellationToken;

use super::{RunnerSettings, Shared, work};
use crate::domain::RunId;
use crate::storage::{Fence, Finish, LEASE, Renewed, Run, RunState, StorageResult};
use crate::telemetry::chain;

/// How often leases are renewed.
const RENEW_EVERY: Duration = Duration::from_secs(1);
/// A run whose lease was not renewed for so long is ended: a second before another daemon may begin it.
const GOOD_FOR: Duration = LEASE.saturating_sub(Duration::from_secs(1));
/// A run that was claimed so many times more often than it may be tried has killed its daemons.
const DEATHS_AT_MOST: u32 = 5;

/// A run whose lease this daemon keeps.
pub(super) struct Held {
    fence: Fence,
    since: Instant,
    /// Until then nobody else begins it.
    good_until: Instant,
    grip: Grip,
    cancelled_by: Option<String>,
}

/// What ends a run from outside.
#[derive(Clone, Default)]
pub(super) struct Grip {
    /// It is another daemon's now, or may be in a moment.
    pub(super) lost: CancellationToken,
    /// Somebody asked for its end.
    pub(super) cancel: CancellationToken,
}

impl Shared {
    fn held(&self) -> std::sync::MutexGuard<'_, BTreeMap<RunId, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the lease of a run that was claimed by a statement sent at `asked`.
    pub(super) fn hold(&self, fence: Fence, asked: Instant) {
        let held = Held {
            fence,
            since: Instant::now(),
            good_until: asked + GOOD_FOR,
            grip: Grip::default(),
            cancelled_by: None,
        };
        self.held().insert(fence.run, held);
    }

    /// What ends a run that is held.
    pub(super) fn grip(&self, run: RunId) -> Grip {
        let held = self.held();
        held.get(&run)
            .map(|held| held.grip.clone())
            .unwrap_or_default()
    }

    /// Who asked for a run's end.
    pub(super) fn cancelled_by(&self, run: RunId) -> Option<String> {
        let held = self.held();
        held.get(&run).and_then(|held| held.cancelled_by.clone())
    }

    /// Ends the keeping.
    pub(super) fn let_go(&self, run: RunId) {
        self.held().remove(&run);
    }

    async fn renew_leases(&self) {
        let Some(deadline) = self.held().values().map(|held| held.good_until).min() else {
            return;
        };
        let RunnerSettings {
            ledger,
            daemon,
            is_shared,
            ..
        } = &self.settings;
        let asked = Instant::now();
        let renewal = ledger.renew(*daemon, self.now());
        let renewed = if *is_shared {
            tokio::time::timeout_at(deadline.into(), renewal).await
        } else {
            Ok(renewal.await)
        };
        match renewed {
            Ok(Ok(renewed)) => self.settle(&renewed, asked),
            Ok(Err(error)) => {
                tracing::warn!(error = %chain(&error), "could not renew the leases of what runs");
            }
            Err(_elapsed) => tracing::warn!("could not renew the leases of what runs in time"),
        }
        if *is_shared {
            let now = Instant::now();
            for held in self.held().values() {
                if held.good_until <= now && !held.grip.lost.is_cancelled() {
                    tracing::error!(run.id = %held.fence.run, "ending a run: its lease could not be renewed, and another daemon may take it over");
                    held.grip.lost.cancel();
                }
            }
        }
    }

    /// Compares what is held with what was renewed.
    fn settle(&self, renewed: &[Renewed], asked: Instant) {
        let mut held = self.held();
        for held in held.values_mut().filter(|held| held.since < asked) {
            let Some(row) = renewed.iter().find(|row| row.fence == held.fence) else {
                if !held.grip.lost.is_cancelled() {
                    tracing::warn!(run.id = %held.fence.run, "another daemon has taken over a run");
                    held.grip.lost.cancel();
                }
                continue;
            };
            held.good_until = asked + GOOD_FOR;
            if row.cancel_requested_by.is_some() {
                held.cancelled_by.clone_from(&row.cancel_requested_by);
                held.grip.cancel.cancel();
            }
        }
        if renewed.iter().any(|row| !held.contains_key(&row.fence.run)) {
            // Perhaps one whose claim is being answered; the look finds out.
            self.in_doubt.store(true, Ordering::Relaxed);
        }
    }
}

/// Renews the leases until the runner and its last run are gone.
pub(super) async fn keep(runner: Weak<Shared>, gone: CancellationToken) {
    loop {
        let began = Instant::now();
        let Some(shared) = runner.upgrade() else {
            return;
        };
        shared.renew_leases().await;
        let first_end = shared
            .held()
            .values()
            .filter(|held| !held.grip.lost.is_cancelled())
            .map(|held| held.good_until)
            .min();
        drop(shared);
        let next = began + RENEW_EVERY;
        let next = first_end.map_or(next, |end| next.min(end));
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {}
            () = gone.cancelled() => return,
        }
    }
}

/// Looks what there is to do besides the schedule: runs that somebody asked for, that were given
/// back, or that a dead daemon left.
pub(super) fn spawn_look(shared: &Arc<Shared>) {
    let shared = shared.clone();
    let Ok(looking) = shared.looking.clone().try_lock_owned() else {
        return;
    };
    let tracker = shared.settings.tracker.clone();
    tracker.spawn(async move {
        let _looking = looking;
        if let Err(error) = look(&shared).await {
            // The answer may have been lost, and not the request.
            shared.in_doubt.store(true, Ordering::Relaxed);
            tracing::debug!(error = %chain(&error), "could not look at the queue of runs");
        }
    });
}

fn free_jobs(shared: &Shared) -> Vec<String> {
    shared
        .jobs()
        .iter()
        .filter(|slot| slot.lock().run.is_none())
        .map(|slot| slot.definition.name.clone())
        .collect()
}

/// One look.
async fn look(shared: &Arc<Shared>) -> StorageResult<()> {
    let RunnerSettings {
        ledger,
        daemon,
        is_shared,
        ..
    } = &shared.settings;
    if shared.in_doubt.swap(false, Ordering::Relaxed)
        && let Err(error) = give_back_what_nobody_holds(shared).await
    {
        shared.in_doubt.store(true, Ordering::Relaxed);
        return Err(error);
    }
    let asked = Instant::now();
    let mut seen = ledger
        .glance(&free_jobs(shared), *daemon, shared.now())
        .await?;
    if *is_shared {
        shared.compare_clocks(asked, seen.now);
    }
    let paused: BTreeSet<String> = seen.paused.iter().cloned().collect();
    if let Some(alerts) = &shared.settings.alerts {
        alerts.borrow().set_paused(paused.clone());
    }
    for slot in &*shared.jobs() {
        // Only one delivery job is enabled, and a second one must not speak for it.
        if slot.definition.enabled {
            slot.job.set_paused(paused.contains(&slot.definition.name));
        }
    }
    *shared.paused.lock().unwrap_or_else(PoisonError::into_inner) = paused;
    if seen.lapses_at.is_some_and(|at| at < seen.now) {
        for run in ledger.take_over(*daemon, shared.now()).await? {
            tracing::warn!(
                job.name = run.job,
                run.id = %run.id,
                run.outcome = %run.state,
                "took over a run that another daemon left"
            );
            seen.is_queued = true;
        }
    } else {
        // A millisecond later it is over also where the clocks were compared a little wrong.
        let at = seen.lapses_at.map(|at| at + TimeDelta::milliseconds(2));
        *shared.lapse.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }
    while seen.is_queued && !shared.is_stopping() {
        let free = free_jobs(shared);
        if free.is_empty() {
            return Ok(());
        }
        let asked = Instant::now();
        let Some(run) = ledger.claim_queued(&free, *daemon, shared.now()).await? else {
            return Ok(());
        };
        begin(shared, run, asked).await?;
    }
    Ok(())
}

/// Begins a run that was taken from the queue.
async fn begin(shared: &Arc<Shared>, run: Run, asked: Instant) -> StorageResult<()> {
    let ledger = &shared.settings.ledger;
    let slot = shared.slot(&run.job).filter(|slot| slot.occupy(&run));
    let Some(slot) = slot else {
        // A scheduled time came first.
        ledger
            .give_back(run.fence(), &run.counts, run.attempt.saturating_sub(1))
            .await?;
        return Ok(());
    };
    let may_try = slot.definition.retry.attempts.get() + DEATHS_AT_MOST;
    if run.attempt > may_try {
        let finish = Finish {
            state: RunState::Failed,
            attempt: run.attempt,
            counts: run.counts.clone(),
            error: Some(format!(
                "given up: {} daemons died or were cut off while they ran it",
                run.attempt - 1
            )),
            at: shared.now(),
        };
        let ended = ledger.finish(run.fence(), &finish).await;
        slot.leave(None);
        if ended? {
            let run = Run {
                state: finish.state,
                finished_at: Some(finish.at),
                error: finish.error,
                ..run
            };
            work::tell(shared, &slot, &run, 0, Duration::ZERO);
        }
        return Ok(());
    }
    shared.hold(run.fence(), asked);
    let runner = shared.clone();
    shared.settings.tracker.spawn(async move {
        work::execute(&runner, &slot, run, true).await;
        slot.leave(None);
        // There may be more in the queue.
        runner.settings.pulse.wake();
    });
    Ok(())
}

/// Finds what the ledger says is this daemon's, while no job here is at work on it: the answer to
/// its claim was lost. Only the look takes runs from the queue and it does so one after another,
/// and a scheduled run has its place before its row, so none is mistaken for lost.
async fn give_back_what_nobody_holds(shared: &Shared) -> StorageResult<()> {
    let RunnerSettings { ledger, daemon, .. } = &shared.settings;
    for run in ledger.running(*daemon).await? {
        let is_held = shared.held().contains_key(&run.id)
            || shared.jobs().iter().any(|slot| slot.is_at_work_on(run.id));
        if !is_held {
            tracing::warn!(job.name = run.job, run.id = %run.id, "the answer to a claim was lost; the run goes back into the queue");
            ledger
                .give_back(run.fence(), &run.counts, run.attempt.saturating_sub(1))
                .await?;
        }
    }
    Ok(())
}
