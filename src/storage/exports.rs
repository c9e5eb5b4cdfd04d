//! The export queue: whatever asks for an export only adds a row; a worker serves it.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::ledger::{Fence, optional_time, time};
use super::{StorageError, StorageResult};
use crate::domain::{Audience, Category, ContactId, ExportId, Subject, TenantId};

crate::domain::closed_set!(
    /// Where an export stands.
    ExportState, "export state", {
        /// Waits for a worker.
        Queued = "queued",
        /// Is being rendered, or none of its mails has gone out so far.
        Running = "running",
        /// Rendered, and sent to at least one of its recipients.
        Done = "done",
        /// Not rendered, or every mail was refused.
        Failed = "failed",
        /// Ended by somebody.
        Cancelled = "cancelled",
        /// Its file was deleted.
        Expired = "expired",
    }
);

crate::domain::closed_set!(
    /// Where one recipient's mail stands.
    DeliveryState, "delivery state", {
        /// Not tried so far.
        Pending = "pending",
        /// A worker is sending it.
        Sending = "sending",
        /// The server took it.
        Sent = "sent",
        /// Could not be sent; will be tried again.
        Deferred = "deferred",
        /// The line was cut after the message: the server may have taken it.
        Uncertain = "uncertain",
        /// Refused for good.
        Dead = "dead",
    }
);

crate::domain::closed_set!(
    /// What somebody did to an export after asking for it.
    ExportDeed, "action on an export", {
        /// It was ended.
        Cancelled = "cancelled",
        /// It was mailed anew.
        Resent = "resent",
        /// Its file and links were taken away.
        Deleted = "deleted",
    }
);

/// What is to be exported.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportRequest {
    /// Whose timeline.
    pub contact_id: ContactId,
    /// The format's name.
    pub format: String,
    /// Through whose eyes.
    pub audience: Audience,
    /// Only what happened at or after this.
    pub since: Option<DateTime<Utc>>,
    /// Only what happened before this.
    pub until: Option<DateTime<Utc>>,
    /// Only these categories; all, where empty.
    pub categories: Vec<Category>,
    /// The IANA zone in which times are written.
    pub timezone: chrono_tz::Tz,
    /// Fields whose content is left out.
    pub redact: Vec<String>,
    /// To whom it is mailed.
    pub to: Vec<String>,
    /// Whether the mail carries the file or says where it is.
    pub attach: bool,
}

/// An export to be added.
#[derive(Debug, Clone, PartialEq)]
pub struct NewExport {
    /// Its identity.
    pub id: ExportId,
    /// Whose it is.
    pub tenant_id: TenantId,
    /// What is to be exported.
    pub request: ExportRequest,
    /// Who asked.
    pub requested_by: Subject,
    /// Makes a repeat of the same request harmless.
    pub request_key: Option<String>,
    /// One per recipient, in the order of `request.to`; fixed before the first try.
    pub message_ids: Vec<String>,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
}

/// An export.
#[derive(Debug, Clone, PartialEq)]
pub struct Export {
    /// Its identity.
    pub id: ExportId,
    /// Whose it is.
    pub tenant_id: TenantId,
    /// What is to be exported.
    pub request: ExportRequest,
    /// Who asked.
    pub requested_by: Subject,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// What was recorded after this is not part of it.
    pub through_seq: i64,
    /// Where it stands.
    pub state: ExportState,
    /// How many times rendering was tried.
    pub attempt: u32,
    /// When it was first worked on.
    pub started_at: Option<DateTime<Utc>>,
    /// When its file was there.
    pub rendered_at: Option<DateTime<Utc>>,
    /// When it was done or failed.
    pub finished_at: Option<DateTime<Utc>>,
    /// When the file is deleted.
    pub expires_at: Option<DateTime<Utc>>,
    /// How many rows there will be, where that is known.
    pub total_rows: Option<u64>,
    /// How many rows are written.
    pub rows: u64,
    /// The size of the file.
    pub bytes: Option<u64>,
    /// The SHA-256 of the file, in hexadecimal.
    pub sha256: Option<String>,
    /// The file's name in the export directory.
    pub file_name: Option<String>,
    /// Why it failed, or why the last attempt did.
    pub error: Option<String>,
    /// How often the file was fetched, with a token or by a link.
    pub downloads: u64,
    /// When it was fetched last.
    pub last_download_at: Option<DateTime<Utc>>,
    /// The mails.
    pub deliveries: Vec<ExportDelivery>,
    /// The links that mails carry.
    pub links: Vec<ExportLink>,
    /// What was done to it, and by whom, in that order.
    pub actions: Vec<ExportAction>,
}

/// A link to the file; the link itself is known only to its recipient.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportLink {
    /// The mail that carries it.
    pub message_id: String,
    /// When it was made.
    #[serde(serialize_with = "time")]
    pub created_at: DateTime<Utc>,
    /// From when on it leads nowhere.
    #[serde(serialize_with = "time")]
    pub expires_at: DateTime<Utc>,
    /// Since when it leads nowhere, because somebody said so.
    #[serde(serialize_with = "optional_time")]
    pub revoked_at: Option<DateTime<Utc>>,
    /// How often it was followed.
    pub downloads: u64,
    /// When it was followed last.
    #[serde(serialize_with = "optional_time")]
    pub last_download_at: Option<DateTime<Utc>>,
}

/// What somebody did to an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportAction {
    /// When.
    #[serde(serialize_with = "time")]
    pub at: DateTime<Utc>,
    /// What.
    pub action: ExportDeed,
    /// Who.
    pub by: Subject,
}

/// A mail that is to be sent anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMail {
    /// The address.
    pub to: String,
    /// Its `Message-ID`, which no mail has had.
    pub message_id: String,
}

/// One recipient's mail.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportDelivery {
    /// The address.
    pub to: String,
    /// The `Message-ID`, without angle brackets.
    pub message_id: String,
    /// Where it stands.
    pub state: DeliveryState,
    /// How many times it was tried.
    pub attempt: u32,
    /// When it will be tried again.
    #[serde(serialize_with = "optional_time")]
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// When the server took it.
    #[serde(serialize_with = "optional_time")]
    pub sent_at: Option<DateTime<Utc>>,
    /// What went wrong last.
    pub error: Option<String>,
}

/// A finished file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// How many rows it holds.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
    /// Its name in the export directory.
    pub file_name: String,
    /// When it was finished.
    pub at: DateTime<Utc>,
    /// When it is to be deleted.
    pub expires_at: DateTime<Utc>,
}

/// A file that is past its time. Its export need not be readable, hence plain values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OldFile {
    /// The tenant.
    pub tenant: String,
    /// The export.
    pub export: Uuid,
    /// The file's name in the export directory.
    pub name: String,
}

/// A mail that the caller is to send.
#[derive(Debug, Clone, PartialEq)]
pub struct ClaimedDelivery {
    /// The export, rendered.
    pub export: Export,
    /// The mail; its `attempt` counts this one, its `state` is the one before: `Sending`, where an
    /// attempt was cut short, and `Uncertain` say that it may have gone out already.
    pub delivery: ExportDelivery,
}

/// How an attempt to send a mail ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeliveryOutcome {
    /// The server took it.
    Sent {
        /// When.
        at: DateTime<Utc>,
    },
    /// Try again.
    Again {
        /// `Deferred` or `Uncertain`.
        state: DeliveryState,
        /// When.
        next_attempt_at: DateTime<Utc>,
        /// What went wrong.
        error: String,
    },
    /// Never again.
    Dead {
        /// What went wrong.
        error: String,
    },
}

/// What is written to a row of the queue that cannot be read; any other error is the caller's.
pub(super) fn unreadable(error: StorageError) -> StorageResult<String> {
    match error {
        StorageError::Corrupt { .. } => {
            tracing::error!(%error, "an export cannot be read and fails; the queue goes on");
            Ok(error.to_string())
        }
        other => Err(other),
    }
}

/// The ids that answer [`ExportStore::create`]: of those that were `added`, and of those that were
/// `there` under their tenant and key.
pub(super) fn ids_there_are(
    exports: &[NewExport],
    added: &HashSet<ExportId>,
    there: &HashMap<(String, String), ExportId>,
) -> Vec<ExportId> {
    exports
        .iter()
        .map(|export| {
            if added.contains(&export.id) {
                return export.id;
            }
            let key = export.request_key.clone().unwrap_or_default();
            let place = (export.tenant_id.as_str().to_owned(), key);
            there.get(&place).copied().unwrap_or(export.id)
        })
        .collect()
}

/// State, next attempt, sent at, error.
pub(super) type OutcomeColumns = (
    DeliveryState,
    Option<DateTime<Utc>>,
    Option<DateTime<Utc>>,
    Option<String>,
);

impl DeliveryOutcome {
    /// The columns it sets: state, next attempt, sent at, error.
    pub(super) fn columns(self) -> OutcomeColumns {
        match self {
            Self::Sent { at } => (DeliveryState::Sent, None, Some(at), None),
            Self::Again {
                state,
                next_attempt_at,
                error,
            } => (state, Some(next_attempt_at), None, Some(error)),
            Self::Dead { error } => (DeliveryState::Dead, None, None, Some(error)),
        }
    }
}

/// The export queue. A claim lasts until an instant: a worker that dies loses its claims by then.
#[async_trait]
pub trait ExportStore: Send + Sync + 'static {
    /// Adds exports, all or none. Answers the ids of the exports there are, in the same order:
    /// another's, where a `request_key` was used before. With a `fence` only while the run is the
    /// caller's.
    async fn create(
        &self,
        exports: &[NewExport],
        fence: Option<Fence>,
    ) -> StorageResult<Vec<ExportId>>;

    /// Adds one export, as [`ExportStore::create`] does.
    async fn create_one(&self, export: &NewExport) -> StorageResult<ExportId> {
        let ids = self.create(std::slice::from_ref(export), None).await?;
        Ok(ids.first().copied().unwrap_or(export.id))
    }

    /// One export with its deliveries.
    async fn find(&self, tenant: &TenantId, id: ExportId) -> StorageResult<Option<Export>>;

    /// A tenant's exports for one of `audiences`, newest first, behind `before`.
    async fn list(
        &self,
        tenant: &TenantId,
        audiences: &[Audience],
        before: Option<ExportId>,
        limit: u32,
    ) -> StorageResult<Vec<Export>>;

    /// Takes the export that has waited longest for rendering, and counts an attempt. One that
    /// cannot be read fails, and the next is taken.
    async fn claim_render(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<Export>>;

    /// Notes how far rendering is and keeps the claim. False where the claim was lost or the export
    /// was cancelled: stop.
    async fn progress(
        &self,
        export: &Export,
        worker: Uuid,
        rows: u64,
        total: u64,
        until: DateTime<Utc>,
    ) -> StorageResult<bool>;

    /// The file is there: its mails may go out; without any, the export is done. False where the
    /// claim was lost.
    async fn rendered(&self, export: &Export, worker: Uuid, file: &Rendered)
    -> StorageResult<bool>;

    /// Rendering failed: again at `next_attempt_at`, or never.
    async fn render_failed(
        &self,
        export: &Export,
        worker: Uuid,
        error: &str,
        next_attempt_at: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> StorageResult<()>;

    /// Takes the mail that has been due longest, and counts an attempt. One that cannot be read is
    /// dead, and the next is taken.
    async fn claim_delivery(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<ClaimedDelivery>>;

    /// Writes how an attempt ended, and what that makes of the export.
    async fn delivery_ended(
        &self,
        claimed: &ClaimedDelivery,
        worker: Uuid,
        outcome: &DeliveryOutcome,
        now: DateTime<Utc>,
    ) -> StorageResult<()>;

    /// Remembers that the claimed mail carries a link with this hash. Harmless to repeat; nothing
    /// where the file has gone meanwhile.
    async fn add_link(
        &self,
        claimed: &ClaimedDelivery,
        hash: &str,
        now: DateTime<Utc>,
    ) -> StorageResult<()>;

    /// The export that the link with this hash leads to: if it is not revoked, and neither it nor
    /// the file has expired.
    async fn linked(&self, hash: &str, now: DateTime<Utc>) -> StorageResult<Option<Export>>;

    /// Counts a download of the file, by the link with that hash if by one.
    async fn downloaded(
        &self,
        tenant: &TenantId,
        id: ExportId,
        link: Option<&str>,
        now: DateTime<Utc>,
    ) -> StorageResult<()>;

    /// Ends an export of which nothing has been sent: its mails, file and links too. False where it
    /// is neither queued nor running.
    async fn cancel(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool>;

    /// Adds mails of a file that is there. False where it is not, or is still being sent.
    async fn resend(
        &self,
        tenant: &TenantId,
        id: ExportId,
        mails: &[NewMail],
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool>;

    /// Lets the file and the links of an ended export expire now, and its mails end. The row stays.
    /// False where it is queued or running.
    async fn discard(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool>;

    /// Gives back at once what `worker` holds, without counting the attempt.
    async fn release(&self, worker: Uuid) -> StorageResult<()>;

    /// The files that are past their time. Whoever asks deletes them and then says so to
    /// [`ExportStore::expire`]: in this order, since a file whose name is forgotten stays for ever.
    async fn old_files(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<Vec<OldFile>>;

    /// Marks exports as expired, whose files are gone.
    async fn expire(&self, files: &[OldFile]) -> StorageResult<()>;

    /// One page of what an export holds, oldest first, behind `after`: a short read of its own.
    async fn rows(
        &self,
        export: &Export,
        after: Option<super::Key>,
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<super::Slice>;

    /// How many rows an export will have.
    async fn count_rows(&self, export: &Export, now: DateTime<Utc>) -> StorageResult<u64>;

    /// Where the exports that `by` asked for ended, for each of `contacts` of whom one has arrived:
    /// rendered, and mailed to at least one.
    async fn last_ends(
        &self,
        tenant: &TenantId,
        by: &Subject,
        contacts: &[ContactId],
    ) -> StorageResult<HashMap<ContactId, DateTime<Utc>>>;

    /// Those contacts, each with an instant of its own, to whom something happened since and before
    /// `until` that the audience sees.
    async fn with_news(
        &self,
        tenant: &TenantId,
        audience: Audience,
        contacts: &[(ContactId, DateTime<Utc>)],
        until: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Vec<ContactId>>;

    /// The contacts of a tenant with an event since, optionally of one category, in order; behind
    /// `after`.
    async fn active_contacts(
        &self,
        tenant: &TenantId,
        since: DateTime<Utc>,
        category: Option<Category>,
        after: Option<ContactId>,
        limit: u32,
    ) -> StorageResult<Vec<ContactId>>;
}
