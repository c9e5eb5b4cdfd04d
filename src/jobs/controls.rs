//! What operators do to jobs, besides what is one statement of the ledger.

use chrono::{DateTime, Utc};

use super::runner::while_paused;
use crate::config::JobDefinition;
use crate::domain::Subject;
use crate::storage::{JobLedger, StorageResult};

/// Rows of one transaction.
const BATCH: usize = 200;

/// Ends the pause of a job, and gives a reason to each time that passed in it. Answers whether it was
/// paused.
///
/// # Errors
/// Those of storage.
pub async fn resume(
    ledger: &dyn JobLedger,
    job: &JobDefinition,
    by: &Subject,
    now: DateTime<Utc>,
) -> StorageResult<bool> {
    let Some(pause) = ledger.resume(&job.name, by, now).await? else {
        return Ok(false);
    };
    if job.enabled && !job.kind.is_delivery() {
        // Claimed by the database's clock before the pause, and refused by it within.
        let until = ledger.now().await?;
        for rows in while_paused(job, &pause.by, pause.at, until).chunks(BATCH) {
            ledger.add_missed(rows).await?;
        }
    }
    Ok(true)
}
