//! The export queue on SQLite.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt as _;
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use uuid::Uuid;

use super::events::check_fence;
use super::packed;
use super::{SqliteStorage, at, changed, set, text};
use crate::domain::{Audience, Category, ContactId, ExportId, Subject, TenantId};
use crate::storage::events::{Filter, Key, Slice, View, bounds};
use crate::storage::exports::{
    ClaimedDelivery, DeliveryOutcome, Export, ExportDeed, ExportDelivery, ExportRequest,
    ExportStore, NewExport, NewMail, OldFile, Rendered, ids_there_are, unreadable,
};
use crate::storage::rows::{self, Columns};
use crate::storage::{Fence, StorageResult};

macro_rules! export_columns {
    () => {
        "id, tenant_id, contact_id, format, audience, since, until, categories, timezone, redact, attach, \
         requested_by, created_at, through_seq, state, attempt, started_at, rendered_at, finished_at, \
         expires_at, total_rows, rows, bytes, sha256, file_name, error, \
         downloads, last_download_at"
    };
}

/// Those of an event, but for when its delivery expired: that of an event which has not expired has not,
/// and to look for it would cost as much as to look for the delivery.
macro_rules! row_columns {
    () => {
        "e.id, e.tenant_id, e.contact_id, e.session_id, e.event_type, e.category, e.priority, e.source, \
         e.title, e.description, e.payload, e.metadata, e.triggered_by, \
         e.integration_source, e.is_realtime, e.delivered_at, null as delivery_expired_at, e.read_at, \
         e.visible_to_client, e.visible_to_agent, e.expires_at, e.occurred_at, e.created_at"
    };
}

macro_rules! delivery_columns {
    () => {
        "export_id, recipient, message_id, state, attempt, next_attempt_at, sent_at, error"
    };
}

type Deliveries = Vec<(ExportId, ExportDelivery)>;

fn deliveries(rows: &[SqliteRow]) -> StorageResult<Deliveries> {
    rows.iter().map(rows::delivery).collect()
}

/// Behind which key a page begins, and before which time it ends.
fn span(request: &ExportRequest, after: Option<Key>) -> ((DateTime<Utc>, Uuid), DateTime<Utc>) {
    let filter = Filter {
        since: request.since,
        until: request.until,
        ..Filter::default()
    };
    let (since, until) = bounds(&filter);
    // One lower bound for the index: `since` counts until the first key is beyond it.
    let since = (since, Uuid::nil());
    let key = after.map_or(since, |key| since.max((key.occurred_at, key.id.uuid())));
    (key, until)
}

impl SqliteStorage {
    /// A page, row by row.
    async fn plain_rows(
        &self,
        export: &Export,
        after: Option<Key>,
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Slice> {
        let request = &export.request;
        let view = View::of(request.audience, now);
        let (key, until) = span(request, after);
        let mut found = sqlx::query(concat!(
            "select ", row_columns!(), "
             from timeline_events e
             where e.tenant_id = $1 and e.contact_id = $2
               and (e.occurred_at, e.id) > ($3, $4)
               and e.occurred_at < $5
               and ($6 = '[]' or e.category in (select value from json_each($6)))
               and case $7 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
               and (e.expires_at is null or e.expires_at > $8)
               and e.seq <= $9
             order by e.occurred_at, e.id
             limit $10"
        ))
        .bind(export.tenant_id.as_str())
        .bind(text(request.contact_id.uuid()))
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(at(until))
        .bind(set(&request.categories))
        .bind(view.audience.as_str())
        .bind(at(now))
        .bind(export.through_seq)
        .bind(i64::from(limit) + 1)
        .fetch(&self.readers);
        let mut slicing = rows::Slicing::new(limit);
        while let Some(row) = found.try_next().await? {
            slicing.push(&row);
        }
        Ok(slicing.end())
    }

    /// The deliveries of exports, read in the same snapshot as the exports themselves.
    async fn with_deliveries(
        db: &mut SqliteConnection,
        tenant: &str,
        rows: &[SqliteRow],
    ) -> StorageResult<Vec<Export>> {
        let mut exports: Vec<Export> = rows
            .iter()
            .map(rows::export)
            .collect::<StorageResult<_>>()?;
        let ids: Vec<ExportId> = exports.iter().map(|export| export.id).collect();
        let found = sqlx::query(concat!(
            "select ",
            delivery_columns!(),
            " from export_deliveries
             where tenant_id = $1 and export_id in (select value from json_each($2))
             order by position"
        ))
        .bind(tenant)
        .bind(set(&ids))
        .fetch_all(db)
        .await?;
        rows::attach(&mut exports, deliveries(&found)?);
        Ok(exports)
    }

    /// The whole record of exports: their deliveries, links, and what was done to them.
    async fn with_record(
        db: &mut SqliteConnection,
        tenant: &str,
        rows: &[SqliteRow],
    ) -> StorageResult<Vec<Export>> {
        let mut exports = Self::with_deliveries(&mut *db, tenant, rows).await?;
        let ids: Vec<ExportId> = exports.iter().map(|export| export.id).collect();
        let links = sqlx::query(
            "select export_id, message_id, created_at, expires_at, revoked_at, downloads, last_download_at
             from export_links
             where tenant_id = $1 and export_id in (select value from json_each($2))
             order by created_at, message_id",
        )
        .bind(tenant)
        .bind(set(&ids))
        .fetch_all(&mut *db)
        .await?;
        let links: StorageResult<_> = links.iter().map(rows::export_link).collect();
        rows::attach_links(&mut exports, links?);
        let actions = sqlx::query(
            "select export_id, at, action, actor
             from export_actions
             where tenant_id = $1 and export_id in (select value from json_each($2))
             order by seq",
        )
        .bind(tenant)
        .bind(set(&ids))
        .fetch_all(&mut *db)
        .await?;
        let actions: StorageResult<_> = actions.iter().map(rows::export_action).collect();
        rows::attach_actions(&mut exports, actions?);
        Ok(exports)
    }

    /// Whether anything is due: asked of a reader, so that an idle queue costs no write.
    async fn is_due(&self, question: &'static str, now: DateTime<Utc>) -> StorageResult<bool> {
        let due: Option<i64> = sqlx::query_scalar(question)
            .bind(at(now))
            .fetch_optional(&self.readers)
            .await?;
        Ok(due.is_some())
    }
}

#[async_trait]
impl ExportStore for SqliteStorage {
    async fn create(
        &self,
        exports: &[NewExport],
        fence: Option<Fence>,
    ) -> StorageResult<Vec<ExportId>> {
        let exports = exports.to_vec();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    check_fence(db, fence).await?;
                    create(db, &exports).await
                })
            })
            .await
    }

    async fn find(&self, tenant: &TenantId, id: ExportId) -> StorageResult<Option<Export>> {
        let mut snapshot = self.readers.begin().await?;
        let found = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports where tenant_id = $1 and id = $2"
        ))
        .bind(tenant.as_str())
        .bind(text(id.uuid()))
        .fetch_all(&mut *snapshot)
        .await?;
        Ok(Self::with_record(&mut snapshot, tenant.as_str(), &found)
            .await?
            .pop())
    }

    async fn list(
        &self,
        tenant: &TenantId,
        audiences: &[Audience],
        before: Option<ExportId>,
        limit: u32,
    ) -> StorageResult<Vec<Export>> {
        let mut snapshot = self.readers.begin().await?;
        let found = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports
             where tenant_id = $1 and id < $2
               and audience in (select value from json_each($4))
             order by id desc limit $3"
        ))
        .bind(tenant.as_str())
        // The largest UUID, not "none": so that the index finds the place.
        .bind(text(before.map_or(Uuid::max(), ExportId::uuid)))
        .bind(limit)
        .bind(set(audiences))
        .fetch_all(&mut *snapshot)
        .await?;
        Self::with_record(&mut snapshot, tenant.as_str(), &found).await
    }

    async fn claim_render(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<Export>> {
        let question = "select 1 from exports
             where state in ('queued', 'running') and rendered_at is null and next_attempt_at <= $1
               and (claimed_until is null or claimed_until <= $1)
             limit 1";
        if !self.is_due(question, now).await? {
            return Ok(None);
        }
        self.writer
            .write(move |db| Box::pin(async move { claim_render(db, worker, now, until).await }))
            .await
    }

    async fn progress(
        &self,
        export: &Export,
        worker: Uuid,
        rows: u64,
        total: u64,
        until: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let (tenant, id) = (export.tenant_id.clone(), export.id);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let kept = sqlx::query(
                        "update exports set rows = $4, total_rows = $5, claimed_until = $6
                         where tenant_id = $1 and id = $2 and claimed_by = $3 and state = 'running'",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(text(worker))
                    .bind(rows.cast_signed())
                    .bind(total.cast_signed())
                    .bind(at(until));
                    Ok(changed(db, kept).await? == 1)
                })
            })
            .await
    }

    async fn rendered(
        &self,
        export: &Export,
        worker: Uuid,
        file: &Rendered,
    ) -> StorageResult<bool> {
        let (tenant, id, file) = (export.tenant_id.clone(), export.id, file.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let kept = sqlx::query(
                        "update exports
                         set rows = $4, total_rows = $4, bytes = $5, sha256 = $6, file_name = $7, rendered_at = $8,
                             expires_at = $9, claimed_by = null, claimed_until = null, error = null,
                             state = case when exists (select 1 from export_deliveries d
                                                       where d.tenant_id = $1 and d.export_id = $2)
                                          then 'running' else 'done' end,
                             finished_at = case when exists (select 1 from export_deliveries d
                                                             where d.tenant_id = $1 and d.export_id = $2)
                                                then null else $8 end
                         where tenant_id = $1 and id = $2 and claimed_by = $3 and state = 'running'",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(text(worker))
                    .bind(file.rows.cast_signed())
                    .bind(file.bytes.cast_signed())
                    .bind(file.sha256)
                    .bind(file.file_name)
                    .bind(at(file.at))
                    .bind(at(file.expires_at));
                    if changed(&mut *db, kept).await? == 0 {
                        return Ok(false);
                    }
                    sqlx::query(
                        "update export_deliveries set next_attempt_at = $3
                         where tenant_id = $1 and export_id = $2 and state = 'pending'",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(at(file.at))
                    .execute(db)
                    .await?;
                    Ok(true)
                })
            })
            .await
    }

    async fn render_failed(
        &self,
        export: &Export,
        worker: Uuid,
        error: &str,
        next_attempt_at: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let (tenant, id, error) = (export.tenant_id.clone(), export.id, error.to_owned());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update exports
                         set state = case when $5 is null then 'failed' else 'queued' end,
                             finished_at = case when $5 is null then $6 end,
                             next_attempt_at = coalesce($5, next_attempt_at),
                             error = $4, claimed_by = null, claimed_until = null
                         where tenant_id = $1 and id = $2 and claimed_by = $3 and state = 'running'",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(text(worker))
                    .bind(error)
                    .bind(next_attempt_at.map(at))
                    .bind(at(now))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn claim_delivery(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<ClaimedDelivery>> {
        let question = "select 1 from export_deliveries
             where state in ('pending', 'sending', 'deferred', 'uncertain') and next_attempt_at <= $1
               and (claimed_until is null or claimed_until <= $1)
             limit 1";
        if !self.is_due(question, now).await? {
            return Ok(None);
        }
        self.writer
            .write(move |db| Box::pin(async move { claim_delivery(db, worker, now, until).await }))
            .await
    }

    async fn delivery_ended(
        &self,
        claimed: &ClaimedDelivery,
        worker: Uuid,
        outcome: &DeliveryOutcome,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let (tenant, id) = (claimed.export.tenant_id.clone(), claimed.export.id);
        let (message_id, outcome) = (claimed.delivery.message_id.clone(), outcome.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let (state, next, sent_at, error) = outcome.columns();
                    sqlx::query(
                        "update export_deliveries
                         set state = $5, next_attempt_at = $6, sent_at = $7, error = $8,
                             claimed_by = null, claimed_until = null
                         where tenant_id = $1 and export_id = $2 and message_id = $3 and claimed_by = $4",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(message_id)
                    .bind(text(worker))
                    .bind(state.as_str())
                    .bind(next.map(at))
                    .bind(sent_at.map(at))
                    .bind(error)
                    .execute(&mut *db)
                    .await?;
                    conclude(db, tenant.as_str(), id.uuid(), now).await
                })
            })
            .await
    }

    async fn add_link(
        &self,
        claimed: &ClaimedDelivery,
        hash: &str,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let (tenant, id) = (claimed.export.tenant_id.clone(), claimed.export.id);
        let (message_id, hash) = (claimed.delivery.message_id.clone(), hash.to_owned());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into export_links (hash, tenant_id, export_id, message_id, created_at, expires_at)
                         select $1, tenant_id, id, $4, $5, expires_at
                         from exports
                         where tenant_id = $2 and id = $3 and file_name is not null and expires_at > $5
                         on conflict (hash) do nothing",
                    )
                    .bind(hash)
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(message_id)
                    .bind(at(now))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn linked(&self, hash: &str, now: DateTime<Utc>) -> StorageResult<Option<Export>> {
        let mut snapshot = self.readers.begin().await?;
        let found = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports
             where (tenant_id, id) = (select l.tenant_id, l.export_id from export_links l
                                      where l.hash = $1 and l.revoked_at is null and l.expires_at > $2)
               and file_name is not null and expires_at > $2"
        ))
        .bind(hash)
        .bind(at(now))
        .fetch_all(&mut *snapshot)
        .await?;
        let Some(row) = found.first() else {
            return Ok(None);
        };
        let tenant: String = row.try_get("tenant_id")?;
        Ok(Self::with_deliveries(&mut snapshot, &tenant, &found)
            .await?
            .pop())
    }

    async fn downloaded(
        &self,
        tenant: &TenantId,
        id: ExportId,
        link: Option<&str>,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let (tenant, link) = (tenant.clone(), link.map(str::to_owned));
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update exports set downloads = downloads + 1, last_download_at = $3
                         where tenant_id = $1 and id = $2",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(at(now))
                    .execute(&mut *db)
                    .await?;
                    sqlx::query(
                        "update export_links set downloads = downloads + 1, last_download_at = $2
                         where hash = $1",
                    )
                    .bind(link)
                    .bind(at(now))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn cancel(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let cancelled = sqlx::query(
                        "update exports
                         set state = 'cancelled', finished_at = $3, error = null, claimed_by = null,
                             claimed_until = null, expires_at = case when file_name is not null then $3 end
                         where tenant_id = $1 and id = $2 and state in ('queued', 'running')",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(at(now));
                    if changed(&mut *db, cancelled).await? == 0 {
                        return Ok(false);
                    }
                    let error = "the export was cancelled";
                    end_mails(&mut *db, &tenant, id, error, now).await?;
                    note(db, &tenant, id, ExportDeed::Cancelled, &by, now).await?;
                    Ok(true)
                })
            })
            .await
    }

    async fn resend(
        &self,
        tenant: &TenantId,
        id: ExportId,
        mails: &[NewMail],
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let (tenant, by) = (tenant.clone(), by.clone());
        let mails: Vec<_> = mails
            .iter()
            .map(|mail| serde_json::json!([mail.to, mail.message_id]))
            .collect();
        let mails = set(&mails);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let taken = sqlx::query(
                        "update exports
                         set state = case when state = 'failed' then 'running' else state end,
                             finished_at = case when state = 'failed' then null else finished_at end,
                             error = null
                         where tenant_id = $1 and id = $2 and state in ('done', 'failed')
                           and file_name is not null and expires_at > $3",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(at(now));
                    if changed(&mut *db, taken).await? == 0 {
                        return Ok(false);
                    }
                    sqlx::query(
                        "insert into export_deliveries (tenant_id, export_id, recipient, position, message_id,
                                                        state, next_attempt_at)
                         select $1, $2, value ->> 0,
                                key + (select coalesce(max(d.position) + 1, 0) from export_deliveries d
                                       where d.tenant_id = $1 and d.export_id = $2),
                                value ->> 1, 'pending', $4
                         from json_each($3)",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(mails)
                    .bind(at(now))
                    .execute(&mut *db)
                    .await?;
                    note(db, &tenant, id, ExportDeed::Resent, &by, now).await?;
                    Ok(true)
                })
            })
            .await
    }

    async fn discard(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    // A cancelled one stays so; of one without a file nothing is left to expire.
                    let discarded = sqlx::query(
                        "update exports
                         set state = case when file_name is null or state = 'cancelled' then state else 'expired' end,
                             expires_at = min(expires_at, $3)
                         where tenant_id = $1 and id = $2 and state not in ('queued', 'running')",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(at(now));
                    if changed(&mut *db, discarded).await? == 0 {
                        return Ok(false);
                    }
                    end_mails(&mut *db, &tenant, id, "the export was deleted", now).await?;
                    note(db, &tenant, id, ExportDeed::Deleted, &by, now).await?;
                    Ok(true)
                })
            })
            .await
    }

    async fn release(&self, worker: Uuid) -> StorageResult<()> {
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update exports
                         set claimed_by = null, claimed_until = null, state = 'queued', attempt = max(attempt - 1, 0)
                         where state = 'running' and rendered_at is null and claimed_by = $1",
                    )
                    .bind(text(worker))
                    .execute(&mut *db)
                    .await?;
                    // Whether the server had taken it is not known: it goes out again with its id.
                    sqlx::query(
                        "update export_deliveries
                         set claimed_by = null, claimed_until = null, state = 'uncertain'
                         where state = 'sending' and claimed_by = $1",
                    )
                    .bind(text(worker))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn old_files(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<Vec<OldFile>> {
        let found = sqlx::query(
            "select tenant_id, id, file_name from exports
             where file_name is not null and expires_at <= $1 order by expires_at limit $2",
        )
        .bind(at(now))
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        let files = found.iter().map(rows::old_file);
        Ok(files.collect::<StorageResult<Vec<_>>>()?)
    }

    async fn expire(&self, files: &[OldFile]) -> StorageResult<()> {
        let gone: Vec<_> = files
            .iter()
            .map(|file| serde_json::json!([file.tenant, text(file.export).to_string()]))
            .collect();
        let gone = set(&gone);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update exports
                         set state = case when state = 'cancelled' then state else 'expired' end, file_name = null
                         where (tenant_id, id) in (select value ->> 0, value ->> 1 from json_each($1))",
                    )
                    .bind(&gone)
                    .execute(&mut *db)
                    .await?;
                    sqlx::query(
                        "update export_deliveries set state = 'dead', error = 'the file had expired'
                         where (tenant_id, export_id) in (select value ->> 0, value ->> 1 from json_each($1))
                           and state in ('pending', 'deferred', 'uncertain')",
                    )
                    .bind(&gone)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn rows(
        &self,
        export: &Export,
        after: Option<Key>,
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Slice> {
        // One text a page: sqlx copies each value of a row on its own, and hands each row from thread to
        // thread, which takes longer than to find it.
        let request = &export.request;
        let view = View::of(request.audience, now);
        let (key, until) = span(request, after);
        let page = sqlx::query(
            "select count(*) as rows, string_agg(packed, char(0)) as page
             from (
                 select concat_ws(char(0), e.id, e.contact_id, coalesce(e.session_id, ''), e.event_type, e.category,
                                  e.priority, e.source, coalesce('=' || e.title, ''),
                                  coalesce('=' || e.description, ''), e.payload, e.metadata,
                                  coalesce(e.triggered_by, ''), coalesce('=' || e.integration_source, ''),
                                  e.is_realtime, coalesce(e.delivered_at, ''), coalesce(e.read_at, ''),
                                  e.visible_to_client, e.visible_to_agent, coalesce(e.expires_at, ''),
                                  e.occurred_at, e.created_at) as packed
                 from timeline_events e
                 where e.tenant_id = $1 and e.contact_id = $2
                   and (e.occurred_at, e.id) > ($3, $4)
                   and e.occurred_at < $5
                   and ($6 = '[]' or e.category in (select value from json_each($6)))
                   and case $7 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
                   and (e.expires_at is null or e.expires_at > $8)
                   and e.seq <= $9
                 order by e.occurred_at, e.id
                 limit $10)",
        )
        .bind(export.tenant_id.as_str())
        .bind(text(request.contact_id.uuid()))
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(at(until))
        .bind(set(&request.categories))
        .bind(view.audience.as_str())
        .bind(at(now))
        .bind(export.through_seq)
        .bind(i64::from(limit) + 1)
        .fetch_one(&self.readers)
        .await?;
        let count: i64 = page.try_get("rows")?;
        // No text where there are no rows, and none that is UTF-8 where another program wrote others.
        let text = page.try_get("page").unwrap_or_default();
        match packed::page(export.tenant_id.as_str(), text, count, limit) {
            Some(page) => Ok(page),
            // It does not come apart, such as for a NUL in a text.
            None => self.plain_rows(export, after, now, limit).await,
        }
    }

    async fn count_rows(&self, export: &Export, now: DateTime<Utc>) -> StorageResult<u64> {
        let request = &export.request;
        let filter = Filter {
            since: request.since,
            until: request.until,
            ..Filter::default()
        };
        let (since, until) = bounds(&filter);
        let count: i64 = sqlx::query_scalar(
            "select count(*) from contact_events e
             where e.tenant_id = $1 and e.contact_id = $2 and e.occurred_at >= $3 and e.occurred_at < $4
               and ($5 = '[]' or e.category in (select value from json_each($5)))
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
               and (e.expires_at is null or e.expires_at > $7)
               and e.seq <= $8",
        )
        .bind(export.tenant_id.as_str())
        .bind(text(request.contact_id.uuid()))
        .bind(at(since))
        .bind(at(until))
        .bind(set(&request.categories))
        .bind(request.audience.as_str())
        .bind(at(now))
        .bind(export.through_seq)
        .fetch_one(&self.readers)
        .await?;
        Ok(count.unsigned_abs())
    }

    async fn last_ends(
        &self,
        tenant: &TenantId,
        by: &Subject,
        contacts: &[ContactId],
    ) -> StorageResult<HashMap<ContactId, DateTime<Utc>>> {
        // One that expired with its mails undone has no end, one whose mails were all refused an error.
        let found = sqlx::query(
            "select e.contact_id, max(e.until) as until
             from exports e
             where e.tenant_id = $1 and e.requested_by = $2
               and e.contact_id in (select value from json_each($3))
               and e.state in ('done', 'expired') and e.finished_at is not null and e.error is null
               and e.until is not null
             group by e.contact_id",
        )
        .bind(tenant.as_str())
        .bind(by.as_str())
        .bind(set(contacts))
        .fetch_all(&self.readers)
        .await?;
        rows::ends_by_contact(&found)
    }

    async fn with_news(
        &self,
        tenant: &TenantId,
        audience: Audience,
        contacts: &[(ContactId, DateTime<Utc>)],
        until: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Vec<ContactId>> {
        let asked: Vec<_> = contacts
            .iter()
            .map(|(contact, since)| serde_json::json!([contact, at(*since)]))
            .collect();
        let found = sqlx::query(
            "select asked.value ->> 0 as contact_id
             from json_each($2) asked
             where exists (
                 select 1 from contact_events e
                 where e.tenant_id = $1 and e.contact_id = asked.value ->> 0
                   and e.occurred_at >= asked.value ->> 1 and e.occurred_at < $3
                   and case $4 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
                   and (e.expires_at is null or e.expires_at > $5))
             order by asked.key",
        )
        .bind(tenant.as_str())
        .bind(set(&asked))
        .bind(at(until))
        .bind(audience.as_str())
        .bind(at(now))
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::contact).collect()
    }

    async fn active_contacts(
        &self,
        tenant: &TenantId,
        since: DateTime<Utc>,
        category: Option<Category>,
        after: Option<ContactId>,
        limit: u32,
    ) -> StorageResult<Vec<ContactId>> {
        // A step per contact through the timeline's index.
        let found = sqlx::query(
            "with recursive contacts (contact_id) as (
                 select min(contact_id) from contact_events where tenant_id = $1 and contact_id > $4
                 union all
                 select (select min(e.contact_id) from contact_events e
                         where e.tenant_id = $1 and e.contact_id > c.contact_id)
                 from contacts c where c.contact_id is not null)
             select contact_id from contacts c
             where contact_id is not null and exists (
                 select 1 from contact_events e
                 where e.tenant_id = $1 and e.contact_id = c.contact_id and e.occurred_at >= $2
                   and ($3 is null or e.category = $3))
             limit $5",
        )
        .bind(tenant.as_str())
        .bind(at(since))
        .bind(category.map(Category::as_str))
        // No contact is nil.
        .bind(text(after.map_or(Uuid::nil(), ContactId::uuid)))
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::contact).collect()
    }
}

/// Takes an export and reads it in one transaction: an error between the two would lose the claim.
async fn claim_render(
    db: &mut SqliteConnection,
    worker: Uuid,
    now: DateTime<Utc>,
    until: DateTime<Utc>,
) -> StorageResult<Option<Export>> {
    loop {
        let row = sqlx::query(concat!(
            "update exports
             set state = 'running', claimed_by = $1, claimed_until = $3, attempt = attempt + 1,
                 started_at = coalesce(started_at, $2), rows = 0
             where rowid = (select rowid from exports
                            where state in ('queued', 'running') and rendered_at is null
                              and next_attempt_at <= $2
                              and (claimed_until is null or claimed_until <= $2)
                            order by next_attempt_at limit 1)
             returning rowid, ",
            export_columns!()
        ))
        .bind(text(worker))
        .bind(at(now))
        .bind(at(until))
        .fetch_optional(&mut *db)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let tenant: String = row.try_get("tenant_id")?;
        let rowid: i64 = row.try_get("rowid")?;
        match SqliteStorage::with_deliveries(&mut *db, &tenant, &[row]).await {
            Ok(mut exports) => return Ok(exports.pop()),
            Err(error) => {
                sqlx::query(
                    "update exports
                     set state = 'failed', finished_at = $2, error = $3, claimed_by = null, claimed_until = null
                     where rowid = $1",
                )
                .bind(rowid)
                .bind(at(now))
                .bind(unreadable(error)?)
                .execute(&mut *db)
                .await?;
            }
        }
    }
}

/// Takes a mail and reads its export in one transaction: an error between the two would lose the claim.
async fn claim_delivery(
    db: &mut SqliteConnection,
    worker: Uuid,
    now: DateTime<Utc>,
    until: DateTime<Utc>,
) -> StorageResult<Option<ClaimedDelivery>> {
    loop {
        // returning gives the values after the change, hence the state beforehand
        let due = sqlx::query(concat!(
            "select rowid, tenant_id, ",
            delivery_columns!(),
            " from export_deliveries
             where state in ('pending', 'sending', 'deferred', 'uncertain')
               and next_attempt_at <= $1
               and (claimed_until is null or claimed_until <= $1)
             order by next_attempt_at limit 1"
        ))
        .bind(at(now))
        .fetch_optional(&mut *db)
        .await?;
        let Some(due) = due else { return Ok(None) };
        let tenant: String = due.try_get("tenant_id")?;
        let rowid: i64 = due.try_get("rowid")?;
        sqlx::query(
            "update export_deliveries
             set state = 'sending', claimed_by = $1, claimed_until = $2, attempt = attempt + 1
             where rowid = $3",
        )
        .bind(text(worker))
        .bind(at(until))
        .bind(rowid)
        .execute(&mut *db)
        .await?;
        let export = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports where tenant_id = $1 and id = $2"
        ))
        .bind(&tenant)
        .bind(due.try_get::<String, _>("export_id")?)
        .fetch_all(&mut *db)
        .await?;
        let export = SqliteStorage::with_deliveries(&mut *db, &tenant, &export).await;
        let error = match (export, rows::delivery(&due)) {
            (Ok(mut exports), Ok((_, mut delivery))) => {
                delivery.attempt = delivery.attempt.saturating_add(1);
                let export = exports.pop();
                return Ok(export.map(|export| ClaimedDelivery { export, delivery }));
            }
            (Err(error), _) | (_, Err(error)) => error,
        };
        sqlx::query(
            "update export_deliveries
             set state = 'dead', error = $2, claimed_by = null, claimed_until = null where rowid = $1",
        )
        .bind(rowid)
        .bind(unreadable(error)?)
        .execute(&mut *db)
        .await?;
        if let Some(export) = due.uuid("export_id")? {
            conclude(&mut *db, &tenant, export, now).await?;
        }
    }
}

/// Ends what is still to be sent of an export, and the links that were.
async fn end_mails(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    export: ExportId,
    error: &'static str,
    now: DateTime<Utc>,
) -> StorageResult<()> {
    sqlx::query(
        "update export_deliveries set state = 'dead', error = $3
         where tenant_id = $1 and export_id = $2 and state in ('pending', 'deferred', 'uncertain')",
    )
    .bind(tenant.as_str())
    .bind(text(export.uuid()))
    .bind(error)
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "update export_links set revoked_at = $3
         where tenant_id = $1 and export_id = $2 and revoked_at is null",
    )
    .bind(tenant.as_str())
    .bind(text(export.uuid()))
    .bind(at(now))
    .execute(db)
    .await?;
    Ok(())
}

/// Writes down who did what to an export.
async fn note(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    export: ExportId,
    deed: ExportDeed,
    by: &Subject,
    now: DateTime<Utc>,
) -> StorageResult<()> {
    sqlx::query(
        "insert into export_actions (tenant_id, export_id, at, action, actor) values ($1, $2, $3, $4, $5)",
    )
    .bind(tenant.as_str())
    .bind(text(export.uuid()))
    .bind(at(now))
    .bind(deed.as_str())
    .bind(by.as_str())
    .execute(db)
    .await?;
    Ok(())
}

/// What the ends of its mails make of an export: done with the first that went out, failed when all
/// are dead.
async fn conclude(
    db: &mut SqliteConnection,
    tenant: &str,
    export: Uuid,
    now: DateTime<Utc>,
) -> StorageResult<()> {
    sqlx::query(
        "update exports
         set state = case when exists (select 1 from export_deliveries d
                                       where d.tenant_id = $1 and d.export_id = $2 and d.state = 'sent')
                          then 'done' else 'failed' end,
             finished_at = coalesce(finished_at, $3),
             error = case when exists (select 1 from export_deliveries d
                                       where d.tenant_id = $1 and d.export_id = $2 and d.state = 'sent')
                          then null else 'every mail was refused' end
         where tenant_id = $1 and id = $2 and state in ('running', 'failed')
           and (exists (select 1 from export_deliveries d
                        where d.tenant_id = $1 and d.export_id = $2 and d.state = 'sent')
                or not exists (select 1 from export_deliveries d
                               where d.tenant_id = $1 and d.export_id = $2 and d.state <> 'dead'))",
    )
    .bind(tenant)
    .bind(text(export))
    .bind(at(now))
    .execute(db)
    .await?;
    Ok(())
}

/// Many rows as one parameter: an array of arrays.
async fn create(db: &mut SqliteConnection, exports: &[NewExport]) -> StorageResult<Vec<ExportId>> {
    let asked: Vec<_> = exports
        .iter()
        .map(|export| {
            let request = &export.request;
            serde_json::json!([
                export.tenant_id.as_str(),
                text(export.id.uuid()).to_string(),
                text(request.contact_id.uuid()).to_string(),
                request.format,
                request.audience.as_str(),
                request.since.map(at),
                request.until.map(at),
                set(&request.categories),
                request.timezone.name(),
                set(&request.redact),
                request.attach,
                export.requested_by.as_str(),
                export.request_key,
                at(export.created_at),
            ])
        })
        .collect();
    let found = sqlx::query(
        "insert into exports (tenant_id, id, contact_id, format, audience, since, until, categories, timezone,
                              redact, attach, requested_by, request_key, created_at, through_seq, state, next_attempt_at)
         select value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6,
                value ->> 7, value ->> 8, value ->> 9, value ->> 10, value ->> 11, value ->> 12, value ->> 13,
                coalesce((select seq from sqlite_sequence where name = 'contact_events'), 0), 'queued', value ->> 13
         from json_each($1)
         -- without a where, SQLite would read the conflict as the condition of a join
         where true
         on conflict (tenant_id, request_key) do nothing
         returning id",
    )
    .bind(set(&asked))
    .fetch_all(&mut *db)
    .await?;
    let mut added = HashSet::new();
    for row in &found {
        added.extend(row.uuid("id")?.and_then(|id| ExportId::new(id).ok()));
    }
    let there = if added.len() == exports.len() {
        HashMap::new()
    } else {
        let found = sqlx::query(
            "select e.tenant_id, e.request_key, e.id
             from json_each($1) asked
             join exports e on e.tenant_id = asked.value ->> 0 and e.request_key = asked.value ->> 12",
        )
        .bind(set(&asked))
        .fetch_all(&mut *db)
        .await?;
        rows::exports_by_key(&found)?
    };
    let mut mails = Vec::new();
    for export in exports.iter().filter(|export| added.contains(&export.id)) {
        let (tenant, id) = (
            export.tenant_id.as_str(),
            text(export.id.uuid()).to_string(),
        );
        let addressed = export.request.to.iter().zip(&export.message_ids);
        mails.extend(addressed.enumerate().map(|(position, (to, message_id))| {
            serde_json::json!([tenant, id, to, position, message_id])
        }));
    }
    sqlx::query(
        "insert into export_deliveries (tenant_id, export_id, recipient, position, message_id, state)
         select value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, 'pending' from json_each($1)",
    )
    .bind(set(&mails))
    .execute(db)
    .await?;
    Ok(ids_there_are(exports, &added, &there))
}
