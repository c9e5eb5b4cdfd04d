//! Erasure: everything of a contact goes for good, and a ledger says so.

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::StorageResult;
use crate::domain::{
    Audience, ContactId, ErasureId, EventId, ExportId, Subject, TenantId, Visibility,
};

crate::domain::closed_set!(
    /// Where an erasure stands.
    ErasureState, "erasure state", {
        /// A daemon is at work on it, or was.
        Running = "running",
        /// Nothing is left.
        Done = "done",
        /// A hold was placed while it was at work: what it had not erased by then stays.
        Held = "held",
    }
);

/// The erasure of a contact, as the ledger has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Erasure {
    /// Its identity, the same on a replay.
    pub id: ErasureId,
    /// Whose contact.
    pub tenant_id: TenantId,
    /// Who is forgotten.
    pub contact_id: ContactId,
    /// Who asked.
    pub requested_by: Subject,
    /// When.
    pub requested_at: DateTime<Utc>,
    /// What was recorded until then goes, and what came later stays; also on a replay.
    pub up_to: DateTime<Utc>,
    /// Where it stands.
    pub state: ErasureState,
    /// How many events went, with receipts, pending deliveries and idempotency keys.
    pub events: u64,
    /// The exports that went. Their files and mails lie with the daemon that made them.
    pub exports: Vec<ExportId>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
}

/// An event that is no more: what its watchers are told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErasedEvent {
    /// Its identity.
    pub id: EventId,
    /// Who could see it.
    pub visibility: Visibility,
    /// Until when.
    pub expires_at: Option<DateTime<Utc>>,
}

impl ErasedEvent {
    /// Whether a reader of this audience saw it.
    #[must_use]
    pub fn was_visible_to(&self, audience: Audience, now: DateTime<Utc>) -> bool {
        self.visibility.includes(audience)
            && (audience == Audience::Audit || self.expires_at.is_none_or(|at| now < at))
    }
}

/// What there is to be known before a contact is erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Survey {
    /// Whether a hold keeps the tenant, the contact or one of its events.
    pub is_held: bool,
    /// When the newest of its events was recorded.
    pub newest: Option<DateTime<Utc>>,
}

/// Erases contacts, in steps that each leave the ledger right.
#[async_trait]
pub trait ErasureStore: Send + Sync + 'static {
    /// Looks before anything is erased. Reads all of the contact's events.
    async fn survey(&self, tenant: &TenantId, contact: ContactId) -> StorageResult<Survey>;

    /// Writes an erasure down, or takes up again one of this id, with an audit row that has `action`;
    /// and deletes the contact's exports with their deliveries, whenever they were asked for: they
    /// may hold what is to go. Answers it with these exports added.
    async fn begin_erasure(
        &self,
        erasure: &Erasure,
        action: &'static str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Erasure>;

    /// Deletes up to `limit` of its events with all that stands beside them, and counts them in the
    /// ledger. Answers them; none, when there is nothing left.
    /// [`super::StorageError::Held`] where a hold keeps one of them, and then nothing is deleted.
    async fn erase_some(&self, erasure: &Erasure, limit: u32) -> StorageResult<Vec<ErasedEvent>>;

    /// Ends it, and deletes what exports were asked for meanwhile. Answers it as it is now.
    async fn finish_erasure(
        &self,
        erasure: &Erasure,
        state: ErasureState,
        now: DateTime<Utc>,
    ) -> StorageResult<Erasure>;

    /// The erasures that ended at or after `since`, in that order.
    async fn erasures(&self, since: DateTime<Utc>) -> StorageResult<Vec<Erasure>>;

    /// The erasures that began before `before` and did not end, oldest first.
    async fn unfinished_erasures(&self, before: DateTime<Utc>) -> StorageResult<Vec<Erasure>>;
}
