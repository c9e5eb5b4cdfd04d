//! The one mapping from rows to values, for both engines.
//!
//! Other programs insert events too. A row that still cannot be read is passed over, counted and
//! logged once, so that it stops nothing.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::alerts::{AlertMail, JobAlert};
use super::erasure::{ErasedEvent, Erasure};
use super::events::{Key, KnownKey, Receipt, Slice, Undelivered};
use super::exports::{Export, ExportAction, ExportDelivery, ExportLink, ExportRequest, OldFile};
use super::ledger::{Counts, Fence, JobAction, Pause, Renewed, Run, RunState, SKIPPED, Settled};
use super::retention::{DeletionEntry, Hold};
use super::{StorageError, StorageResult};
use crate::domain::{
    ContactEvent, ContactId, Delivery, ErasureId, EventId, ExportId, HoldId, IdError, JsonObject,
    RunId, TenantId, Visibility,
};

type Read<T> = Result<T, sqlx::Error>;

/// How an engine's row gives a column.
pub(super) trait Columns {
    fn text(&self, column: &'static str) -> Read<Option<String>>;
    fn uuid(&self, column: &'static str) -> Read<Option<Uuid>>;
    fn time(&self, column: &'static str) -> Read<Option<DateTime<Utc>>>;
    fn flag(&self, column: &'static str) -> Read<bool>;
    fn int(&self, column: &'static str) -> Read<Option<i64>>;
    fn texts(&self, column: &'static str) -> Read<Vec<String>>;
}

/// Reads columns of one table and names the column in its errors.
struct Reader<'r, R> {
    row: &'r R,
    table: &'static str,
}

impl<R: Columns> Reader<'_, R> {
    fn corrupt(&self, column: &'static str, reason: impl fmt::Display) -> StorageError {
        StorageError::Corrupt {
            table: self.table,
            column,
            reason: reason.to_string(),
        }
    }

    fn read<T>(&self, column: &'static str, value: Read<T>) -> StorageResult<T> {
        value.map_err(|error| self.corrupt(column, error))
    }

    fn some<T>(&self, column: &'static str, value: Read<Option<T>>) -> StorageResult<T> {
        self.read(column, value)?
            .ok_or_else(|| self.corrupt(column, "is null"))
    }

    fn text(&self, column: &'static str) -> StorageResult<String> {
        self.some(column, self.row.text(column))
    }

    fn maybe_text(&self, column: &'static str) -> StorageResult<Option<String>> {
        self.read(column, self.row.text(column))
    }

    fn parsed<T: FromStr<Err: fmt::Display>>(&self, column: &'static str) -> StorageResult<T> {
        self.text(column)?
            .parse()
            .map_err(|error: T::Err| self.corrupt(column, error))
    }

    fn maybe_parsed<T: FromStr<Err: fmt::Display>>(
        &self,
        column: &'static str,
    ) -> StorageResult<Option<T>> {
        self.maybe_text(column)?
            .map(|text| text.parse())
            .transpose()
            .map_err(|error: T::Err| self.corrupt(column, error))
    }

    fn all_parsed<T: FromStr<Err: fmt::Display>>(
        &self,
        column: &'static str,
    ) -> StorageResult<Vec<T>> {
        self.read(column, self.row.texts(column))?
            .iter()
            .map(|text| {
                text.parse()
                    .map_err(|error: T::Err| self.corrupt(column, error))
            })
            .collect()
    }

    fn id<T>(
        &self,
        column: &'static str,
        wrap: fn(Uuid) -> Result<T, IdError>,
    ) -> StorageResult<T> {
        wrap(self.some(column, self.row.uuid(column))?).map_err(|error| self.corrupt(column, error))
    }

    fn maybe_id<T>(
        &self,
        column: &'static str,
        wrap: fn(Uuid) -> Result<T, IdError>,
    ) -> StorageResult<Option<T>> {
        self.read(column, self.row.uuid(column))?
            .map(|uuid| wrap(uuid).map_err(|error| self.corrupt(column, error)))
            .transpose()
    }

    fn time(&self, column: &'static str) -> StorageResult<DateTime<Utc>> {
        self.some(column, self.row.time(column))
    }

    fn maybe_time(&self, column: &'static str) -> StorageResult<Option<DateTime<Utc>>> {
        self.read(column, self.row.time(column))
    }

    fn flag(&self, column: &'static str) -> StorageResult<bool> {
        self.read(column, self.row.flag(column))
    }

    fn count(&self, column: &'static str) -> StorageResult<u64> {
        Ok(self.maybe_count(column)?.unwrap_or(0))
    }

    fn maybe_count(&self, column: &'static str) -> StorageResult<Option<u64>> {
        self.read(column, self.row.int(column))?
            .map(|count| u64::try_from(count).map_err(|error| self.corrupt(column, error)))
            .transpose()
    }

    fn object(&self, column: &'static str) -> StorageResult<JsonObject> {
        JsonObject::from_stored(self.text(column)?).map_err(|error| self.corrupt(column, error))
    }
}

/// Reads an event of the view `timeline_events`.
pub(super) fn event<R: Columns>(row: &R) -> StorageResult<ContactEvent> {
    let row = Reader {
        row,
        table: "contact_events",
    };
    let is_realtime = row.flag("is_realtime")?;
    let delivery = match (
        row.maybe_time("delivered_at")?,
        row.maybe_time("delivery_expired_at")?,
    ) {
        (Some(at), _) => Delivery::Delivered { at },
        (None, Some(at)) => Delivery::Expired { at },
        (None, None) if is_realtime => Delivery::Pending,
        (None, None) => Delivery::NotRealtime,
    };
    Ok(ContactEvent {
        id: row.id("id", EventId::new)?,
        tenant_id: row.parsed("tenant_id")?,
        contact_id: row.id("contact_id", ContactId::new)?,
        session_id: row.maybe_id("session_id", crate::domain::SessionId::new)?,
        event_type: row.parsed("event_type")?,
        category: row.parsed("category")?,
        priority: row.parsed("priority")?,
        source: row.parsed("source")?,
        title: row.maybe_text("title")?,
        description: row.maybe_text("description")?,
        payload: row.object("payload")?,
        metadata: row.object("metadata")?,
        triggered_by: row.maybe_id("triggered_by", crate::domain::AgentId::new)?,
        integration_source: row.maybe_text("integration_source")?,
        is_realtime,
        delivery,
        read_at: row.maybe_time("read_at")?,
        visibility: Visibility {
            client: row.flag("visible_to_client")?,
            agent: row.flag("visible_to_agent")?,
        },
        expires_at: row.maybe_time("expires_at")?,
        occurred_at: row.time("occurred_at")?,
        created_at: row.time("created_at")?,
    })
}

/// Reads what can be read; a page that was asked for with one row too many says where to go on.
pub(super) fn slice<R: Columns>(rows: &[R], limit: u32) -> Slice {
    let limit = limit as usize;
    let page = &rows[..rows.len().min(limit)];
    // The key of the last row that has one; a row without is passed over again by the next page.
    let next = (rows.len() > limit)
        .then(|| page.iter().rev().find_map(|row| key(row).ok()))
        .flatten();
    Slice {
        events: events(page),
        next,
    }
}

/// A page that is read row by row, so that the database goes on meanwhile; like [`slice`].
pub(super) struct Slicing {
    limit: usize,
    rows: usize,
    events: Vec<ContactEvent>,
    last: Option<Key>,
}

impl Slicing {
    pub(super) fn new(limit: u32) -> Self {
        let limit = limit as usize;
        Self {
            limit,
            rows: 0,
            events: Vec::with_capacity(limit),
            last: None,
        }
    }

    pub(super) fn push<R: Columns>(&mut self, row: &R) {
        self.rows += 1;
        if self.rows > self.limit {
            return;
        }
        if let Some(event) = readable(row, event(row)) {
            self.last = Some(Key::from(&event));
            self.events.push(event);
        } else {
            self.last = key(row).ok().or(self.last);
        }
    }

    pub(super) fn end(self) -> Slice {
        Slice {
            next: self.last.filter(|_| self.rows > self.limit),
            events: self.events,
        }
    }
}

fn key<R: Columns>(row: &R) -> StorageResult<Key> {
    let row = Reader {
        row,
        table: "contact_events",
    };
    Ok(Key {
        occurred_at: row.time("occurred_at")?,
        id: row.id("id", EventId::new)?,
    })
}

/// Reads the events that can be read.
pub(super) fn events<R: Columns>(rows: &[R]) -> Vec<ContactEvent> {
    rows.iter()
        .filter_map(|row| readable(row, event(row)))
        .collect()
}

/// Reads undelivered events; `seq` and `rank` stand beside the event's columns.
pub(super) fn undelivered<R: Columns>(rows: &[R]) -> Vec<Undelivered> {
    rows.iter()
        .filter_map(|row| {
            let place = Reader {
                row,
                table: "event_outbox",
            };
            let read = || {
                Ok(Undelivered {
                    seq: place.some("seq", row.int("seq"))?,
                    rank: i16::try_from(place.count("rank")?).unwrap_or(3),
                    event: event(row)?,
                })
            };
            readable(row, read())
        })
        .collect()
}

/// How many rows were passed over since the start, each counted once.
#[must_use]
pub fn unreadable_rows() -> u64 {
    UNREADABLE.load(Ordering::Relaxed)
}

static UNREADABLE: AtomicU64 = AtomicU64::new(0);

/// Passes over what cannot be read, and says so once a row.
fn readable<R: Columns, T>(row: &R, value: StorageResult<T>) -> Option<T> {
    // A bound on what is remembered; beyond it rows are neither counted nor logged again.
    const REMEMBERED: usize = 10_000;
    static SEEN: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
    match value {
        Ok(value) => Some(value),
        Err(error) => {
            let id = match row.uuid("id") {
                Ok(Some(id)) => id.to_string(),
                _ => format!("seq {:?}", row.int("seq").unwrap_or(None)),
            };
            let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.len() < REMEMBERED && seen.insert(id.clone()) {
                UNREADABLE.fetch_add(1, Ordering::Relaxed);
                tracing::error!(event.id = id, %error, "a stored event cannot be read and is passed over");
            }
            None
        }
    }
}

/// Reads a run.
pub(super) fn run<R: Columns>(row: &R) -> StorageResult<Run> {
    let row = Reader {
        row,
        table: "job_runs",
    };
    let counts = row.text("counts")?;
    Ok(Run {
        id: row.id("id", RunId::new)?,
        job: row.text("job")?,
        scheduled_at: row.time("scheduled_at")?,
        started_at: row.maybe_time("started_at")?,
        finished_at: row.maybe_time("finished_at")?,
        trigger: row.parsed("trigger")?,
        attempt: u32::try_from(row.count("attempt")?).unwrap_or(u32::MAX),
        daemon: row.read("daemon", row.row.uuid("daemon"))?,
        fence: u32::try_from(row.count("fence")?).unwrap_or(u32::MAX),
        state: row.parsed("state")?,
        counts: serde_json::from_str(&counts).map_err(|error| row.corrupt("counts", error))?,
        error: row.maybe_text("error")?,
    })
}

/// Reads a run whose lease was renewed.
pub(super) fn renewed<R: Columns>(row: &R) -> StorageResult<Renewed> {
    let row = Reader {
        row,
        table: "job_runs",
    };
    Ok(Renewed {
        fence: Fence {
            run: row.id("id", RunId::new)?,
            number: u32::try_from(row.count("fence")?).unwrap_or(u32::MAX),
        },
        cancel_requested_by: row.maybe_text("cancel_requested_by")?,
    })
}

/// Reads a job and the last of its times that is settled.
pub(super) fn last_time<R: Columns>(row: &R) -> StorageResult<(String, DateTime<Utc>)> {
    let row = Reader {
        row,
        table: "job_runs",
    };
    Ok((row.text("job")?, row.time("at")?))
}

/// Reads a scheduled time that has a row.
pub(super) fn settled<R: Columns>(row: &R) -> StorageResult<Settled> {
    let row = Reader {
        row,
        table: "job_runs",
    };
    let counts: Counts =
        serde_json::from_str(&row.text("counts")?).map_err(|error| row.corrupt("counts", error))?;
    Ok(Settled {
        at: row.time("scheduled_at")?,
        skipped: counts.get(SKIPPED).copied(),
    })
}

/// Reads the state of a run.
pub(super) fn run_state<R: Columns>(row: &R) -> StorageResult<RunState> {
    let row = Reader {
        row,
        table: "job_runs",
    };
    row.parsed("state")
}

/// Reads a pause.
pub(super) fn pause<R: Columns>(row: &R) -> StorageResult<Pause> {
    let row = Reader {
        row,
        table: "job_controls",
    };
    Ok(Pause {
        job: row.text("job")?,
        at: row.time("paused_at")?,
        by: row.text("paused_by")?,
    })
}

/// Reads what an operator did.
pub(super) fn action<R: Columns>(row: &R) -> StorageResult<JobAction> {
    let row = Reader {
        row,
        table: "job_actions",
    };
    let run = row.read("run_id", row.row.uuid("run_id"))?;
    Ok(JobAction {
        at: row.time("at")?,
        actor: row.text("actor")?,
        action: row.text("action")?,
        run_id: run.and_then(|id| RunId::new(id).ok()),
    })
}

/// Reads a hold.
pub(super) fn hold<R: Columns>(row: &R) -> StorageResult<Hold> {
    let row = Reader {
        row,
        table: "holds",
    };
    Ok(Hold {
        id: row.id("id", HoldId::new)?,
        tenant_id: row.parsed("tenant_id")?,
        contact_id: row.maybe_id("contact_id", ContactId::new)?,
        category: row.maybe_parsed("category")?,
        reason: row.text("reason")?,
        placed_by: row.text("placed_by")?,
        placed_at: row.time("placed_at")?,
    })
}

pub(super) fn erasure<R: Columns>(row: &R) -> StorageResult<Erasure> {
    let row = Reader {
        row,
        table: "erasures",
    };
    Ok(Erasure {
        id: row.id("id", ErasureId::new)?,
        tenant_id: row.parsed("tenant_id")?,
        contact_id: row.id("contact_id", ContactId::new)?,
        requested_by: row.parsed("requested_by")?,
        requested_at: row.time("requested_at")?,
        up_to: row.time("up_to")?,
        state: row.parsed("state")?,
        events: row.count("events")?,
        exports: row.all_parsed("exports")?,
        finished_at: row.maybe_time("finished_at")?,
    })
}

/// An event that an erasure takes.
pub(super) fn erased_event<R: Columns>(row: &R) -> StorageResult<ErasedEvent> {
    let row = Reader {
        row,
        table: "contact_events",
    };
    Ok(ErasedEvent {
        id: row.id("id", EventId::new)?,
        visibility: Visibility {
            client: row.flag("visible_to_client")?,
            agent: row.flag("visible_to_agent")?,
        },
        expires_at: row.maybe_time("expires_at")?,
    })
}

/// How many events a run deleted, by its counts.
pub(super) fn deleted<R: Columns>(row: &R) -> StorageResult<u64> {
    let row = Reader {
        row,
        table: "job_runs",
    };
    let counts: Counts =
        serde_json::from_str(&row.text("counts")?).map_err(|error| row.corrupt("counts", error))?;
    Ok(counts.get("deleted").copied().unwrap_or(0))
}

/// Reads an entry of the ledger of deletions.
pub(super) fn deletion<R: Columns>(row: &R) -> StorageResult<DeletionEntry> {
    let row = Reader {
        row,
        table: "deletion_ledger",
    };
    Ok(DeletionEntry {
        tenant_id: row.parsed("tenant_id")?,
        rule: row.text("rule")?,
        cause: row.parsed("cause")?,
        deleted: row.count("deleted")?,
    })
}

/// Reads what is known of a trouble of a job.
pub(super) fn job_alert<R: Columns>(row: &R) -> StorageResult<JobAlert> {
    let row = Reader {
        row,
        table: "job_alerts",
    };
    let mailing: Option<Result<AlertMail, _>> = row.maybe_text("mailing")?.map(|text| text.parse());
    Ok(JobAlert {
        job: row.text("job")?,
        kind: row.parsed("kind")?,
        since: row.time("since")?,
        count: row.count("count")?,
        error: row.maybe_text("error")?,
        last_success: row.maybe_time("last_success")?,
        mails: row.count("mails")?,
        mailed_at: row.maybe_time("mailed_at")?,
        mailing: mailing
            .transpose()
            .map_err(|error| row.corrupt("mailing", error))?,
        attempts: row.count("attempts")?,
        reached: row.read("reached", row.row.texts("reached"))?,
        claimed_until: row.maybe_time("claimed_until")?,
        waits_for_operator: row.flag("waits_for_operator")?,
    })
}

/// Reads an export, without its deliveries.
pub(super) fn export<R: Columns>(row: &R) -> StorageResult<Export> {
    let row = Reader {
        row,
        table: "exports",
    };
    Ok(Export {
        id: row.id("id", ExportId::new)?,
        tenant_id: row.parsed("tenant_id")?,
        request: ExportRequest {
            contact_id: row.id("contact_id", ContactId::new)?,
            format: row.text("format")?,
            audience: row.parsed("audience")?,
            since: row.maybe_time("since")?,
            until: row.maybe_time("until")?,
            categories: row.all_parsed("categories")?,
            timezone: row.parsed("timezone")?,
            redact: row.read("redact", row.row.texts("redact"))?,
            to: Vec::new(),
            attach: row.flag("attach")?,
        },
        requested_by: row.parsed("requested_by")?,
        created_at: row.time("created_at")?,
        through_seq: row.some("through_seq", row.row.int("through_seq"))?,
        state: row.parsed("state")?,
        attempt: u32::try_from(row.count("attempt")?).unwrap_or(u32::MAX),
        started_at: row.maybe_time("started_at")?,
        rendered_at: row.maybe_time("rendered_at")?,
        finished_at: row.maybe_time("finished_at")?,
        expires_at: row.maybe_time("expires_at")?,
        total_rows: row.maybe_count("total_rows")?,
        rows: row.count("rows")?,
        bytes: row.maybe_count("bytes")?,
        sha256: row.maybe_text("sha256")?,
        file_name: row.maybe_text("file_name")?,
        error: row.maybe_text("error")?,
        downloads: row.count("downloads")?,
        last_download_at: row.maybe_time("last_download_at")?,
        deliveries: Vec::new(),
        links: Vec::new(),
        actions: Vec::new(),
    })
}

/// Reads what is to be known of a file to delete it.
pub(super) fn old_file<R: Columns>(row: &R) -> StorageResult<OldFile> {
    let row = Reader {
        row,
        table: "exports",
    };
    Ok(OldFile {
        tenant: row.text("tenant_id")?,
        export: row.some("id", row.row.uuid("id"))?,
        name: row.text("file_name")?,
    })
}

/// Reads a delivery, with the export that it belongs to.
pub(super) fn delivery<R: Columns>(row: &R) -> StorageResult<(ExportId, ExportDelivery)> {
    let row = Reader {
        row,
        table: "export_deliveries",
    };
    let delivery = ExportDelivery {
        to: row.text("recipient")?,
        message_id: row.text("message_id")?,
        state: row.parsed("state")?,
        attempt: u32::try_from(row.count("attempt")?).unwrap_or(u32::MAX),
        next_attempt_at: row.maybe_time("next_attempt_at")?,
        sent_at: row.maybe_time("sent_at")?,
        error: row.maybe_text("error")?,
    };
    Ok((row.id("export_id", ExportId::new)?, delivery))
}

/// Puts deliveries to their exports.
pub(super) fn attach(exports: &mut [Export], deliveries: Vec<(ExportId, ExportDelivery)>) {
    for (id, delivery) in deliveries {
        if let Some(export) = exports.iter_mut().find(|export| export.id == id) {
            // One who got it again is named once.
            if !export.request.to.contains(&delivery.to) {
                export.request.to.push(delivery.to.clone());
            }
            export.deliveries.push(delivery);
        }
    }
}

/// Reads a link, with the export that it leads to.
pub(super) fn export_link<R: Columns>(row: &R) -> StorageResult<(ExportId, ExportLink)> {
    let row = Reader {
        row,
        table: "export_links",
    };
    let link = ExportLink {
        message_id: row.text("message_id")?,
        created_at: row.time("created_at")?,
        expires_at: row.time("expires_at")?,
        revoked_at: row.maybe_time("revoked_at")?,
        downloads: row.count("downloads")?,
        last_download_at: row.maybe_time("last_download_at")?,
    };
    Ok((row.id("export_id", ExportId::new)?, link))
}

/// Puts links to their exports.
pub(super) fn attach_links(exports: &mut [Export], links: Vec<(ExportId, ExportLink)>) {
    for (id, link) in links {
        if let Some(export) = exports.iter_mut().find(|export| export.id == id) {
            export.links.push(link);
        }
    }
}

/// Reads what was done to an export, with the export.
pub(super) fn export_action<R: Columns>(row: &R) -> StorageResult<(ExportId, ExportAction)> {
    let row = Reader {
        row,
        table: "export_actions",
    };
    let action = ExportAction {
        at: row.time("at")?,
        action: row.parsed("action")?,
        by: row.parsed("actor")?,
    };
    Ok((row.id("export_id", ExportId::new)?, action))
}

/// Puts what was done to exports to them.
pub(super) fn attach_actions(exports: &mut [Export], actions: Vec<(ExportId, ExportAction)>) {
    for (id, action) in actions {
        if let Some(export) = exports.iter_mut().find(|export| export.id == id) {
            export.actions.push(action);
        }
    }
}

/// A new receipt of the event and contact that `row` names, at `at`.
pub(super) fn receipt<R: Columns>(row: &R, at: DateTime<Utc>) -> StorageResult<Receipt> {
    let row = Reader {
        row,
        table: "event_outbox",
    };
    let (event_id, contact_id) = (
        row.id("event_id", EventId::new)?,
        row.id("contact_id", ContactId::new)?,
    );
    Ok(Receipt {
        event_id,
        contact_id,
        at,
        is_new: true,
    })
}

/// Reads what is known of an idempotency key.
pub(super) fn idempotency<R: Columns>(
    row: &R,
    body_hash: Vec<u8>,
) -> StorageResult<(KnownKey, (Vec<u8>, EventId))> {
    let row = Reader {
        row,
        table: "idempotency_keys",
    };
    Ok((
        (row.text("tenant_id")?, row.text("key")?),
        (body_hash, row.id("event_id", EventId::new)?),
    ))
}

/// Reads a contact out of the column `contact_id`.
pub(super) fn contact<R: Columns>(row: &R) -> StorageResult<ContactId> {
    Reader {
        row,
        table: "contact_events",
    }
    .id("contact_id", ContactId::new)
}

/// Reads until when exports of contacts reach, by contact.
pub(super) fn ends_by_contact<R: Columns>(
    rows: &[R],
) -> StorageResult<HashMap<ContactId, DateTime<Utc>>> {
    let read = |row| {
        let row = Reader {
            row,
            table: "exports",
        };
        Ok((row.id("contact_id", ContactId::new)?, row.time("until")?))
    };
    rows.iter().map(read).collect()
}

/// Reads exports' ids by their tenant and request key.
pub(super) fn exports_by_key<R: Columns>(
    rows: &[R],
) -> StorageResult<HashMap<(String, String), ExportId>> {
    let read = |row| {
        let row = Reader {
            row,
            table: "exports",
        };
        let place = (row.text("tenant_id")?, row.text("request_key")?);
        Ok((place, row.id("id", ExportId::new)?))
    };
    rows.iter().map(read).collect()
}

/// Reads tenants out of the column `tenant_id`; passes over what is none, such as ill-formed UTF-8,
/// which SQLite takes.
pub(super) fn tenants<R: Columns>(rows: &[R]) -> Vec<TenantId> {
    let tenant = |row| {
        let reader = Reader {
            row,
            table: "contact_events",
        };
        readable(row, reader.parsed("tenant_id"))
    };
    rows.iter().filter_map(tenant).collect()
}
