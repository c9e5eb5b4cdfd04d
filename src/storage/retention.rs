//! Retention: the batches of the purge, legal holds, and the ledger of what was deleted.

use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Serialize;

use super::{Fence, StorageResult};
use crate::domain::{Category, Cause, ContactId, HoldId, RunId, Subject, Sweep, TenantId};

/// Up to where a sweep has come: the time by which it goes, and the event's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SweepKey {
    /// The expiry, or the time of recording.
    pub at: DateTime<Utc>,
    /// The order of recording, among equal times.
    pub seq: i64,
}

/// For whom a batch is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deletion {
    /// The run under which the ledger has it; without one there is no entry.
    pub run: Option<RunId>,
    /// Checked in the batch's own transaction.
    pub fence: Option<Fence>,
    /// When; for the ledger.
    pub now: DateTime<Utc>,
}

/// One step of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// How many events it looked at; fewer than asked for say that the sweep is at its end.
    pub seen: u64,
    /// How many it deleted.
    pub deleted: u64,
    /// How many a hold kept. Those of a tenant that is held as a whole are not looked at.
    pub held: u64,
    /// Behind which the next step begins; `None` where that is at the beginning again.
    pub last: Option<SweepKey>,
    /// How long others had to wait for it at most. Not its own waiting for them, nor, on SQLite, for the
    /// disk, which smaller steps would not make faster.
    pub took: Duration,
    /// Whether nobody else asked for anything since the step before.
    pub was_alone: bool,
}

/// How much a sweep would take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DueCount {
    /// Events that would go.
    pub due: u64,
    /// Events that would go, did a hold not keep them.
    pub held: u64,
}

/// What a hold keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HoldScope {
    /// Everything of the tenant.
    Tenant,
    /// Everything of a contact.
    Contact(ContactId),
    /// Everything of a category.
    Category(Category),
}

impl HoldScope {
    pub(super) fn contact(self) -> Option<ContactId> {
        match self {
            Self::Contact(contact) => Some(contact),
            _ => None,
        }
    }

    pub(super) fn category(self) -> Option<Category> {
        match self {
            Self::Category(category) => Some(category),
            _ => None,
        }
    }
}

/// A legal hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hold {
    /// Its identity.
    pub id: HoldId,
    /// Whose events.
    pub tenant_id: TenantId,
    /// Only those of this contact.
    pub contact_id: Option<ContactId>,
    /// Only those of this category.
    pub category: Option<Category>,
    /// Why.
    pub reason: String,
    /// Who placed it.
    pub placed_by: String,
    /// When.
    #[serde(serialize_with = "crate::storage::ledger::time")]
    pub placed_at: DateTime<Utc>,
}

/// What a run deleted of a tenant by one rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeletionEntry {
    /// Whose events.
    pub tenant_id: TenantId,
    /// What the rule names.
    pub rule: String,
    /// Why they went.
    pub cause: Cause,
    /// How many.
    pub deleted: u64,
}

/// What defers deletions, what deletes, and what is left of it.
#[async_trait]
pub trait RetentionStore: Send + Sync + 'static {
    /// Deletes what is due among the next `limit` events of a sweep behind `after`, with receipts
    /// and pending deliveries, and adds to the ledger. What a hold keeps stays.
    /// [`super::StorageError::Fenced`] where the run is no longer the caller's, and then nothing is
    /// deleted.
    async fn sweep(
        &self,
        sweep: &Sweep,
        after: Option<SweepKey>,
        limit: u32,
        deletion: Deletion,
    ) -> StorageResult<Batch>;

    /// How much a sweep would take, counted up to `limit` events.
    async fn count_due(&self, sweep: &Sweep, limit: u64) -> StorageResult<DueCount>;

    /// The tenants that have events without an expiry, in order.
    async fn ageing_tenants(&self) -> StorageResult<Vec<TenantId>>;

    /// The tenants that are held as a whole.
    async fn held_tenants(&self) -> StorageResult<Vec<TenantId>>;

    /// Places a hold, with an audit row. Deletions that begin after it returned respect it.
    async fn place_hold(
        &self,
        tenant: &TenantId,
        scope: HoldScope,
        reason: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Hold>;

    /// The holds of a tenant, or of all, that are not released, oldest first.
    async fn holds(&self, tenant: Option<&TenantId>) -> StorageResult<Vec<Hold>>;

    /// Releases a hold, with an audit row. Answers whether there was one.
    async fn release_hold(
        &self,
        tenant: &TenantId,
        id: HoldId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool>;

    /// What a run deleted, by tenant, rule and cause.
    async fn deletions(&self, run: RunId) -> StorageResult<Vec<DeletionEntry>>;

    /// How many events the last `limit` runs of a purge that went to their end deleted.
    async fn usual_deletions(&self, job: &str, limit: u32) -> StorageResult<Vec<u64>>;

    /// Whether an operator confirmed that a purge may delete more than usual; until it is at its end.
    async fn is_confirmed(&self, job: &str) -> StorageResult<bool>;

    /// Notes that a purge waits for an operator.
    async fn hold_back(
        &self,
        job: &str,
        would_delete: u64,
        usual: u64,
        now: DateTime<Utc>,
    ) -> StorageResult<()>;

    /// Lets a purge delete more than usual; who said so is kept.
    async fn confirm(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<()>;

    /// Gives a few pages that deletions left back to the file system. Answers whether there are more;
    /// never, where the engine sees to that itself.
    async fn give_back_space(&self) -> StorageResult<bool>;

    /// Ends the waiting of a purge, and its confirmation.
    async fn end_guard(&self, job: &str) -> StorageResult<()>;
}

/// What a hold keeps, for the audit row.
pub(super) fn audit_hold(hold: &Hold) -> String {
    let kept = serde_json::json!({
        "contact_id": hold.contact_id,
        "category": hold.category,
        "reason": hold.reason,
    });
    kept.to_string()
}

/// Deletes up to `limit` events of a sweep from its beginning, whatever holds keep before them.
pub(super) async fn delete_some(
    store: &impl RetentionStore,
    sweep: &Sweep,
    limit: u32,
    fence: Option<Fence>,
) -> StorageResult<u64> {
    let (mut after, mut left) = (None, limit);
    // Of the ledger there is none, hence no time for it.
    let deletion = Deletion {
        run: None,
        fence,
        now: DateTime::UNIX_EPOCH,
    };
    loop {
        let batch = store.sweep(sweep, after, left, deletion).await?;
        left = left.saturating_sub(u32::try_from(batch.deleted).unwrap_or(u32::MAX));
        if left == 0 || batch.seen == 0 {
            return Ok(u64::from(limit - left));
        }
        after = batch.last;
    }
}
