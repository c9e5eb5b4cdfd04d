//! What is kept of runs, and for how long.

use std::time::Duration;

use chrono::TimeDelta;

use super::{RunnerSettings, Shared};
use crate::storage::StorageResult;
use crate::telemetry::chain;

/// Runs that are deleted in one transaction: a few milliseconds, since inserts wait for it on SQLite.
const BATCH: u32 = 500;
/// Between two such transactions.
const PAUSE: Duration = Duration::from_millis(50);

/// Deletes the runs that are past their time.
pub(super) async fn prune(shared: &Shared) {
    match prune_in_batches(shared).await {
        Ok(0) => tracing::debug!("no run is past its time"),
        Ok(pruned) => tracing::info!(pruned, "deleted {pruned} runs that were past history.keep"),
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(
                error,
                "could not delete the runs that are past history.keep"
            );
        }
    }
}

async fn prune_in_batches(shared: &Shared) -> StorageResult<u64> {
    let RunnerSettings {
        ledger,
        clock,
        stop,
        keep_history,
        ..
    } = &shared.settings;
    // The earlier of both clocks: one that runs ahead must not delete what is not due.
    let now = ledger.now().await?.min(clock.now());
    let keep = TimeDelta::from_std(*keep_history).unwrap_or(TimeDelta::MAX);
    let Some(before) = now.checked_sub_signed(keep) else {
        return Ok(0);
    };
    let mut pruned = 0;
    while !shared.is_stopping() {
        let deleted = ledger.prune(before, BATCH).await?;
        pruned += deleted;
        if deleted < u64::from(BATCH) {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = stop.cancelled() => {}
        }
    }
    Ok(pruned)
}
