//! The export queue on PostgreSQL, shared by any number of daemons.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt as _;
use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};
use uuid::Uuid;

use super::{PgStorage, Placed, set};
use crate::domain::{Audience, Category, ContactId, ExportId, Subject, TenantId};
use crate::storage::events::{Filter, Key, Slice, View, bounds, last_key};
use crate::storage::exports::{
    ClaimedDelivery, DeliveryOutcome, Export, ExportDeed, ExportDelivery, ExportStore, NewExport,
    NewMail, OldFile, Rendered, ids_there_are, unreadable,
};
use crate::storage::rows::{self, Columns};
use crate::storage::{Fence, Page, StorageError, StorageResult};

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
         e.title, e.description, e.payload::text as payload, e.metadata::text as metadata, e.triggered_by, \
         e.integration_source, e.is_realtime, e.delivered_at, null::timestamptz as delivery_expired_at, e.read_at, \
         e.visible_to_client, e.visible_to_agent, e.expires_at, e.occurred_at, e.created_at"
    };
}

macro_rules! delivery_columns {
    () => {
        "export_id, recipient, message_id, state, attempt, next_attempt_at, sent_at, error"
    };
}

type Deliveries = Vec<(ExportId, ExportDelivery)>;

fn deliveries(rows: &[PgRow]) -> StorageResult<Deliveries> {
    rows.iter().map(rows::delivery).collect()
}

fn names(categories: &[Category]) -> Vec<&'static str> {
    categories
        .iter()
        .map(|category| category.as_str())
        .collect()
}

impl PgStorage {
    /// The deliveries of exports, read in the same snapshot as the exports themselves.
    async fn with_deliveries(
        db: &mut PgConnection,
        tenant: &str,
        rows: &[PgRow],
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
             where tenant_id = $1 and export_id = any($2)
             order by position"
        ))
        .bind(tenant)
        .bind(set(&ids, ExportId::uuid))
        .fetch_all(db)
        .await?;
        rows::attach(&mut exports, deliveries(&found)?);
        Ok(exports)
    }

    /// Whether anything is due: asked outside of a transaction, so that an idle queue costs one
    /// statement and not three.
    async fn is_due(&self, question: &'static str, now: DateTime<Utc>) -> StorageResult<bool> {
        let due: bool = sqlx::query_scalar(question)
            .bind(now)
            .fetch_one(&self.worker)
            .await?;
        Ok(due)
    }

    /// The whole record of exports: their deliveries, links, and what was done to them.
    async fn with_record(
        db: &mut PgConnection,
        tenant: &str,
        rows: &[PgRow],
    ) -> StorageResult<Vec<Export>> {
        let mut exports = Self::with_deliveries(&mut *db, tenant, rows).await?;
        let ids: Vec<ExportId> = exports.iter().map(|export| export.id).collect();
        let links = sqlx::query(
            "select export_id, message_id, created_at, expires_at, revoked_at, downloads, last_download_at
             from export_links
             where tenant_id = $1 and export_id = any($2)
             order by created_at, message_id",
        )
        .bind(tenant)
        .bind(set(&ids, ExportId::uuid))
        .fetch_all(&mut *db)
        .await?;
        let links: StorageResult<_> = links.iter().map(rows::export_link).collect();
        rows::attach_links(&mut exports, links?);
        let actions = sqlx::query(
            "select export_id, at, action, actor
             from export_actions
             where tenant_id = $1 and export_id = any($2)
             order by seq",
        )
        .bind(tenant)
        .bind(set(&ids, ExportId::uuid))
        .fetch_all(&mut *db)
        .await?;
        let actions: StorageResult<_> = actions.iter().map(rows::export_action).collect();
        rows::attach_actions(&mut exports, actions?);
        Ok(exports)
    }
}

#[async_trait]
impl ExportStore for PgStorage {
    async fn create(
        &self,
        exports: &[NewExport],
        fence: Option<Fence>,
    ) -> StorageResult<Vec<ExportId>> {
        let mut transaction = self.worker.begin().await?;
        if let Some(fence) = fence {
            // The run stays this daemon's until the end of the transaction; of one that is frozen
            // within it not for longer than a lease.
            let own = sqlx::query(
                "select set_config('idle_in_transaction_session_timeout', '4s', true)
                 from job_runs where id = $1 and fence = $2 and state = 'running' for share",
            )
            .bind(fence.run.uuid())
            .bind(i64::from(fence.number))
            .fetch_optional(&mut *transaction)
            .await?;
            if own.is_none() {
                return Err(StorageError::Fenced);
            }
        }
        let added = insert(&mut transaction, exports).await?;
        let there = if added.len() == exports.len() {
            HashMap::new()
        } else {
            // In a statement of its own, which sees what another transaction has added meanwhile.
            with_keys(&mut transaction, exports).await?
        };
        insert_deliveries(&mut transaction, exports, &added).await?;
        transaction.commit().await?;
        Ok(ids_there_are(exports, &added, &there))
    }

    async fn find(&self, tenant: &TenantId, id: ExportId) -> StorageResult<Option<Export>> {
        let mut snapshot = self
            .worker
            .begin_with("begin isolation level repeatable read read only")
            .await?;
        let found = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports where tenant_id = $1 and id = $2"
        ))
        .bind(tenant.as_str())
        .bind(id.uuid())
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
        let audience_names: Vec<_> = audiences.iter().map(|of| of.as_str()).collect();
        let mut snapshot = self
            .worker
            .begin_with("begin isolation level repeatable read read only")
            .await?;
        let found = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports
             where tenant_id = $1 and id < $2
               and audience = any($4)
             order by id desc limit $3"
        ))
        .bind(tenant.as_str())
        // The largest UUID, not "none": so that the index finds the place.
        .bind(before.map_or(Uuid::max(), ExportId::uuid))
        .bind(i64::from(limit))
        .bind(audience_names)
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
        let question = "select exists (
             select from exports
             where state in ('queued', 'running') and rendered_at is null and next_attempt_at <= $1
               and (claimed_until is null or claimed_until <= $1))";
        if !self.is_due(question, now).await? {
            return Ok(None);
        }
        // One transaction: an error between taking and reading it would lose the claim.
        let mut transaction = self.worker.begin().await?;
        let claimed = loop {
            let row = sqlx::query(concat!(
                "update exports
                 set state = 'running', claimed_by = $1, claimed_until = $3, attempt = attempt + 1,
                     started_at = coalesce(started_at, $2), rows = 0
                 where (tenant_id, id) = (select tenant_id, id from exports
                                          where state in ('queued', 'running') and rendered_at is null
                                            and next_attempt_at <= $2
                                            and (claimed_until is null or claimed_until <= $2)
                                          order by next_attempt_at limit 1
                                          for update skip locked)
                 returning ",
                export_columns!()
            ))
            .bind(worker)
            .bind(now)
            .bind(until)
            .fetch_optional(&mut *transaction)
            .await?;
            let Some(row) = row else { break None };
            let (tenant, id): (String, Uuid) = (row.try_get("tenant_id")?, row.try_get("id")?);
            match Self::with_deliveries(&mut transaction, &tenant, &[row]).await {
                Ok(mut exports) => break exports.pop(),
                Err(error) => {
                    sqlx::query(
                        "update exports
                         set state = 'failed', finished_at = $3, error = $4, claimed_by = null, claimed_until = null
                         where tenant_id = $1 and id = $2",
                    )
                    .bind(tenant)
                    .bind(id)
                    .bind(now)
                    .bind(unreadable(error)?)
                    .execute(&mut *transaction)
                    .await?;
                }
            }
        };
        transaction.commit().await?;
        Ok(claimed)
    }

    async fn progress(
        &self,
        export: &Export,
        worker: Uuid,
        rows: u64,
        total: u64,
        until: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let kept = sqlx::query(
            "update exports set rows = $4, total_rows = $5, claimed_until = $6
             where tenant_id = $1 and id = $2 and claimed_by = $3 and state = 'running'",
        )
        .bind(export.tenant_id.as_str())
        .bind(export.id.uuid())
        .bind(worker)
        .bind(rows.cast_signed())
        .bind(total.cast_signed())
        .bind(until)
        .execute(&self.worker)
        .await?;
        Ok(kept.rows_affected() == 1)
    }

    async fn rendered(
        &self,
        export: &Export,
        worker: Uuid,
        file: &Rendered,
    ) -> StorageResult<bool> {
        let mut transaction = self.worker.begin().await?;
        let kept = sqlx::query(
            "update exports
             set rows = $4, total_rows = $4, bytes = $5, sha256 = $6, file_name = $7, rendered_at = $8,
                 expires_at = $9, claimed_by = null, claimed_until = null, error = null,
                 state = case when exists (select 1 from export_deliveries d
                                           where d.tenant_id = $1 and d.export_id = $2)
                              then 'running' else 'done' end,
                 finished_at = case when exists (select 1 from export_deliveries d
                                                 where d.tenant_id = $1 and d.export_id = $2)
                                    then null else $8::timestamptz end
             where tenant_id = $1 and id = $2 and claimed_by = $3 and state = 'running'",
        )
        .bind(export.tenant_id.as_str())
        .bind(export.id.uuid())
        .bind(worker)
        .bind(file.rows.cast_signed())
        .bind(file.bytes.cast_signed())
        .bind(&file.sha256)
        .bind(&file.file_name)
        .bind(file.at)
        .bind(file.expires_at)
        .execute(&mut *transaction)
        .await?;
        if kept.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query(
            "update export_deliveries set next_attempt_at = $3
             where tenant_id = $1 and export_id = $2 and state = 'pending'",
        )
        .bind(export.tenant_id.as_str())
        .bind(export.id.uuid())
        .bind(file.at)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(true)
    }

    async fn render_failed(
        &self,
        export: &Export,
        worker: Uuid,
        error: &str,
        next_attempt_at: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        sqlx::query(
            "update exports
             set state = case when $5::timestamptz is null then 'failed' else 'queued' end,
                 finished_at = case when $5 is null then $6::timestamptz end,
                 next_attempt_at = coalesce($5, next_attempt_at),
                 error = $4, claimed_by = null, claimed_until = null
             where tenant_id = $1 and id = $2 and claimed_by = $3 and state = 'running'",
        )
        .bind(export.tenant_id.as_str())
        .bind(export.id.uuid())
        .bind(worker)
        .bind(error)
        .bind(next_attempt_at)
        .bind(now)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn claim_delivery(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<ClaimedDelivery>> {
        let question = "select exists (
             select from export_deliveries
             where state in ('pending', 'sending', 'deferred', 'uncertain') and next_attempt_at <= $1
               and (claimed_until is null or claimed_until <= $1))";
        if !self.is_due(question, now).await? {
            return Ok(None);
        }
        // One transaction: an error between taking and reading it would lose the claim.
        let mut transaction = self.worker.begin().await?;
        let claimed = loop {
            let row = sqlx::query(
                // returning gives the values after the change, hence the state beforehand
                "with due as (
                     select tenant_id, export_id, message_id, state from export_deliveries
                     where state in ('pending', 'sending', 'deferred', 'uncertain') and next_attempt_at <= $2
                       and (claimed_until is null or claimed_until <= $2)
                     order by next_attempt_at limit 1
                     for update skip locked)
                 update export_deliveries d
                 set state = 'sending', claimed_by = $1, claimed_until = $3, attempt = d.attempt + 1
                 from due
                 where d.tenant_id = due.tenant_id and d.export_id = due.export_id and d.message_id = due.message_id
                 returning d.tenant_id, d.export_id, d.recipient, d.message_id, due.state, d.attempt,
                           d.next_attempt_at, d.sent_at, d.error",
            )
            .bind(worker)
            .bind(now)
            .bind(until)
            .fetch_optional(&mut *transaction)
            .await?;
            let Some(row) = row else { break None };
            let (tenant, id): (String, Uuid) =
                (row.try_get("tenant_id")?, row.try_get("export_id")?);
            let export = sqlx::query(concat!(
                "select ",
                export_columns!(),
                " from exports where tenant_id = $1 and id = $2"
            ))
            .bind(&tenant)
            .bind(id)
            .fetch_all(&mut *transaction)
            .await?;
            let export = Self::with_deliveries(&mut transaction, &tenant, &export).await;
            let error = match (export, rows::delivery(&row)) {
                (Ok(mut exports), Ok((_, delivery))) => {
                    let export = exports.pop();
                    break export.map(|export| ClaimedDelivery { export, delivery });
                }
                (Err(error), _) | (_, Err(error)) => error,
            };
            sqlx::query(
                "update export_deliveries
                 set state = 'dead', error = $4, claimed_by = null, claimed_until = null
                 where tenant_id = $1 and export_id = $2 and message_id = $3",
            )
            .bind(&tenant)
            .bind(id)
            .bind(row.try_get::<String, _>("message_id")?)
            .bind(unreadable(error)?)
            .execute(&mut *transaction)
            .await?;
            conclude(&mut transaction, &tenant, id, now).await?;
        };
        transaction.commit().await?;
        Ok(claimed)
    }

    async fn delivery_ended(
        &self,
        claimed: &ClaimedDelivery,
        worker: Uuid,
        outcome: &DeliveryOutcome,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let (tenant, id) = (&claimed.export.tenant_id, claimed.export.id);
        let (state, next, sent_at, error) = outcome.clone().columns();
        let mut transaction = self.worker.begin().await?;
        // Two workers may end two mails of one export at once: the second waits here, so that the
        // last one sees that all are over.
        sqlx::query("select 1 from exports where tenant_id = $1 and id = $2 for update")
            .bind(tenant.as_str())
            .bind(id.uuid())
            .execute(&mut *transaction)
            .await?;
        sqlx::query(
            "update export_deliveries
             set state = $5, next_attempt_at = $6, sent_at = $7, error = $8,
                 claimed_by = null, claimed_until = null
             where tenant_id = $1 and export_id = $2 and message_id = $3 and claimed_by = $4",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(&claimed.delivery.message_id)
        .bind(worker)
        .bind(state.as_str())
        .bind(next)
        .bind(sent_at)
        .bind(error)
        .execute(&mut *transaction)
        .await?;
        conclude(&mut transaction, tenant.as_str(), id.uuid(), now).await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn add_link(
        &self,
        claimed: &ClaimedDelivery,
        hash: &str,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        sqlx::query(
            "insert into export_links (hash, tenant_id, export_id, message_id, created_at, expires_at)
             select $1, tenant_id, id, $4, $5, expires_at
             from exports
             where tenant_id = $2 and id = $3 and file_name is not null and expires_at > $5
             on conflict (hash) do nothing",
        )
        .bind(hash)
        .bind(claimed.export.tenant_id.as_str())
        .bind(claimed.export.id.uuid())
        .bind(&claimed.delivery.message_id)
        .bind(now)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn linked(&self, hash: &str, now: DateTime<Utc>) -> StorageResult<Option<Export>> {
        let mut snapshot = self
            .worker
            .begin_with("begin isolation level repeatable read read only")
            .await?;
        let found = sqlx::query(concat!(
            "select ",
            export_columns!(),
            " from exports
             where (tenant_id, id) = (select l.tenant_id, l.export_id from export_links l
                                      where l.hash = $1 and l.revoked_at is null and l.expires_at > $2)
               and file_name is not null and expires_at > $2"
        ))
        .bind(hash)
        .bind(now)
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
        let mut transaction = self.worker.begin().await?;
        sqlx::query(
            "update exports set downloads = downloads + 1, last_download_at = $3
             where tenant_id = $1 and id = $2",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        sqlx::query(
            "update export_links set downloads = downloads + 1, last_download_at = $2
             where hash = $1",
        )
        .bind(link)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn cancel(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let mut transaction = self.worker.begin().await?;
        let cancelled = sqlx::query(
            "update exports
             set state = 'cancelled', finished_at = $3, error = null, claimed_by = null,
                 claimed_until = null, expires_at = case when file_name is not null then $3::timestamptz end
             where tenant_id = $1 and id = $2 and state in ('queued', 'running')",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        if cancelled.rows_affected() == 0 {
            return Ok(false);
        }
        let error = "the export was cancelled";
        end_mails(&mut transaction, tenant, id, error, now).await?;
        note(&mut transaction, tenant, id, ExportDeed::Cancelled, by, now).await?;
        transaction.commit().await?;
        Ok(true)
    }

    async fn resend(
        &self,
        tenant: &TenantId,
        id: ExportId,
        mails: &[NewMail],
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let to: Vec<&str> = mails.iter().map(|mail| mail.to.as_str()).collect();
        let message_ids: Vec<&str> = mails.iter().map(|mail| mail.message_id.as_str()).collect();
        let mut transaction = self.worker.begin().await?;
        let taken = sqlx::query(
            "update exports
             set state = case when state = 'failed' then 'running' else state end,
                 finished_at = case when state = 'failed' then null else finished_at end,
                 error = null
             where tenant_id = $1 and id = $2 and state in ('done', 'failed')
               and file_name is not null and expires_at > $3",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        if taken.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query(
            "insert into export_deliveries (tenant_id, export_id, recipient, position, message_id,
                                            state, next_attempt_at)
             select $1, $2, mails.recipient,
                    mails.number + (select coalesce(max(d.position), -1) from export_deliveries d
                                    where d.tenant_id = $1 and d.export_id = $2),
                    mails.message_id, 'pending', $5
             from unnest($3::text[], $4::text[]) with ordinality as mails (recipient, message_id, number)",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(to)
        .bind(message_ids)
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        note(&mut transaction, tenant, id, ExportDeed::Resent, by, now).await?;
        transaction.commit().await?;
        Ok(true)
    }

    async fn discard(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let mut transaction = self.worker.begin().await?;
        // A cancelled one stays so; of one without a file nothing is left to expire.
        let discarded = sqlx::query(
            "update exports
             set state = case when file_name is null or state = 'cancelled' then state else 'expired' end,
                 expires_at = case when expires_at is not null then least(expires_at, $3) end
             where tenant_id = $1 and id = $2 and state not in ('queued', 'running')",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        if discarded.rows_affected() == 0 {
            return Ok(false);
        }
        let error = "the export was deleted";
        end_mails(&mut transaction, tenant, id, error, now).await?;
        note(&mut transaction, tenant, id, ExportDeed::Deleted, by, now).await?;
        transaction.commit().await?;
        Ok(true)
    }

    async fn release(&self, worker: Uuid) -> StorageResult<()> {
        let mut transaction = self.worker.begin().await?;
        sqlx::query(
            "update exports
             set claimed_by = null, claimed_until = null, state = 'queued', attempt = greatest(attempt - 1, 0)
             where state = 'running' and rendered_at is null and claimed_by = $1",
        )
        .bind(worker)
        .execute(&mut *transaction)
        .await?;
        // Whether the server had taken it is not known: it goes out again with its id.
        sqlx::query(
            "update export_deliveries
             set claimed_by = null, claimed_until = null, state = 'uncertain'
             where state = 'sending' and claimed_by = $1",
        )
        .bind(worker)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn old_files(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<Vec<OldFile>> {
        let found = sqlx::query(
            "select tenant_id, id, file_name from exports
             where file_name is not null and expires_at <= $1 order by expires_at limit $2",
        )
        .bind(now)
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
        .await?;
        let files = found.iter().map(rows::old_file);
        Ok(files.collect::<StorageResult<Vec<_>>>()?)
    }

    async fn expire(&self, files: &[OldFile]) -> StorageResult<()> {
        let tenants: Vec<&str> = files.iter().map(|file| file.tenant.as_str()).collect();
        let ids: Vec<Uuid> = files.iter().map(|file| file.export).collect();
        sqlx::query(
            "with old as (
                 select * from unnest($1::text[], $2::uuid[]) as old (tenant_id, id)),
             gone as (
                 update exports e
                 set state = case when e.state = 'cancelled' then e.state else 'expired' end, file_name = null
                 from old where e.tenant_id = old.tenant_id and e.id = old.id)
             update export_deliveries d set state = 'dead', error = 'the file had expired'
             from old
             where d.tenant_id = old.tenant_id and d.export_id = old.id
               and d.state in ('pending', 'deferred', 'uncertain')",
        )
        .bind(tenants)
        .bind(ids)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn rows(
        &self,
        export: &Export,
        after: Option<Key>,
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Slice> {
        let request = &export.request;
        let view = View::of(request.audience, now);
        let filter = Filter {
            since: request.since,
            until: request.until,
            ..Filter::default()
        };
        let (since, until) = bounds(&filter);
        let page = after.map_or(Page::first(limit), |key| Page::after(limit, key));
        let (key, _) = last_key(page);
        // One lower bound for the index: `since` counts until the first key is beyond it.
        let key = key.max((since, Uuid::nil()));
        let mut found = sqlx::query(concat!(
            "select ",
            row_columns!(),
            " from timeline_events e
             where e.tenant_id = $1 and e.contact_id = $2
               and (e.occurred_at, e.id) > ($3, $4)
               and e.occurred_at < $5
               and (cardinality($6::text[]) = 0 or e.category = any($6))
               and case $7::text when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
               and (e.expires_at is null or e.expires_at > $8)
               and e.seq <= $9
             order by e.occurred_at, e.id
             limit $10"
        ))
        .bind(export.tenant_id.as_str())
        .bind(request.contact_id.uuid())
        .bind(key.0)
        .bind(key.1)
        .bind(until)
        .bind(names(&request.categories))
        .bind(view.audience.as_str())
        .bind(now)
        .bind(export.through_seq)
        .bind(i64::from(limit) + 1)
        .fetch(&self.worker);
        let mut slicing = rows::Slicing::new(limit);
        while let Some(row) = found.try_next().await? {
            slicing.push(&Placed::new(&row));
        }
        Ok(slicing.end())
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
               and (cardinality($5::text[]) = 0 or e.category = any($5))
               and case $6::text when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
               and (e.expires_at is null or e.expires_at > $7)
               and e.seq <= $8",
        )
        .bind(export.tenant_id.as_str())
        .bind(request.contact_id.uuid())
        .bind(since)
        .bind(until)
        .bind(names(&request.categories))
        .bind(request.audience.as_str())
        .bind(now)
        .bind(export.through_seq)
        .fetch_one(&self.worker)
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
               and e.contact_id = any($3)
               and e.state in ('done', 'expired') and e.finished_at is not null and e.error is null
               and e.until is not null
             group by e.contact_id",
        )
        .bind(tenant.as_str())
        .bind(by.as_str())
        .bind(set(contacts, ContactId::uuid))
        .fetch_all(&self.worker)
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
        let ids: Vec<Uuid> = contacts.iter().map(|(contact, _)| contact.uuid()).collect();
        let since: Vec<DateTime<Utc>> = contacts.iter().map(|(_, since)| *since).collect();
        let found = sqlx::query(
            "select asked.contact_id
             from unnest($2::uuid[], $3::timestamptz[]) with ordinality as asked (contact_id, since, number)
             where exists (
                 select 1 from contact_events e
                 where e.tenant_id = $1 and e.contact_id = asked.contact_id
                   and e.occurred_at >= asked.since and e.occurred_at < $4
                   and case $5::text when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
                   and (e.expires_at is null or e.expires_at > $6))
             order by asked.number",
        )
        .bind(tenant.as_str())
        .bind(ids)
        .bind(since)
        .bind(until)
        .bind(audience.as_str())
        .bind(now)
        .fetch_all(&self.worker)
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
        // A step per contact through the timeline's index. uuid has no min(), hence the order.
        let found = sqlx::query(
            "with recursive contacts (contact_id) as (
                 (select contact_id from contact_events
                  where tenant_id = $1 and contact_id > $4
                  order by contact_id limit 1)
                 union all
                 select (select e.contact_id from contact_events e
                         where e.tenant_id = $1 and e.contact_id > c.contact_id
                         order by e.contact_id limit 1)
                 from contacts c where c.contact_id is not null)
             select contact_id from contacts c
             where contact_id is not null and exists (
                 select 1 from contact_events e
                 where e.tenant_id = $1 and e.contact_id = c.contact_id and e.occurred_at >= $2
                   and ($3::text is null or e.category = $3))
             limit $5",
        )
        .bind(tenant.as_str())
        .bind(since)
        .bind(category.map(Category::as_str))
        // No contact is nil.
        .bind(after.map_or(Uuid::nil(), ContactId::uuid))
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::contact).collect()
    }
}

/// Ends what is still to be sent of an export, and the links that were.
async fn end_mails(
    db: &mut PgConnection,
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
    .bind(export.uuid())
    .bind(error)
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "update export_links set revoked_at = $3
         where tenant_id = $1 and export_id = $2 and revoked_at is null",
    )
    .bind(tenant.as_str())
    .bind(export.uuid())
    .bind(now)
    .execute(db)
    .await?;
    Ok(())
}

/// Writes down who did what to an export.
async fn note(
    db: &mut PgConnection,
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
    .bind(export.uuid())
    .bind(now)
    .bind(deed.as_str())
    .bind(by.as_str())
    .execute(db)
    .await?;
    Ok(())
}

/// What the ends of its mails make of an export: done with the first that went out, failed when all
/// are dead.
async fn conclude(
    db: &mut PgConnection,
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
    .bind(export)
    .bind(now)
    .execute(db)
    .await?;
    Ok(())
}

/// One value of each export, as the array that `unnest` takes.
fn each<'a, T>(exports: &'a [NewExport], value: impl Fn(&'a NewExport) -> T) -> Vec<T> {
    exports.iter().map(value).collect()
}

fn json<T: serde::Serialize>(list: &[T]) -> String {
    serde_json::to_string(list).expect("texts serialise")
}

/// Adds the exports whose key was not used before; answers which.
async fn insert(db: &mut PgConnection, exports: &[NewExport]) -> StorageResult<HashSet<ExportId>> {
    let found = sqlx::query(
        "insert into exports (tenant_id, id, contact_id, format, audience, since, until, categories, timezone,
                              redact, attach, requested_by, request_key, created_at, through_seq, state, next_attempt_at)
         select tenant_id, id, contact_id, format, audience, since, until,
                -- lists as JSON: unnest would take an array of arrays apart
                array(select json_array_elements_text(categories::json)), timezone,
                array(select json_array_elements_text(redact::json)), attach, requested_by, request_key, created_at,
                -- the sequence's own row: one read, where max(seq) would need an index
                coalesce((select s.last_value from pg_sequences s
                          where format('%I.%I', s.schemaname, s.sequencename)
                                = pg_get_serial_sequence('contact_events', 'seq')), 0),
                'queued', created_at
         from unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[],
                     $8::text[], $9::text[], $10::text[], $11::boolean[], $12::text[], $13::text[], $14::timestamptz[])
              as asked (tenant_id, id, contact_id, format, audience, since, until,
                        categories, timezone, redact, attach, requested_by, request_key, created_at)
         on conflict (tenant_id, request_key) do nothing
         returning id",
    )
    .bind(each(exports, |export| export.tenant_id.as_str()))
    .bind(each(exports, |export| export.id.uuid()))
    .bind(each(exports, |export| export.request.contact_id.uuid()))
    .bind(each(exports, |export| export.request.format.as_str()))
    .bind(each(exports, |export| export.request.audience.as_str()))
    .bind(each(exports, |export| export.request.since))
    .bind(each(exports, |export| export.request.until))
    .bind(each(exports, |export| json(&names(&export.request.categories))))
    .bind(each(exports, |export| export.request.timezone.name()))
    .bind(each(exports, |export| json(&export.request.redact)))
    .bind(each(exports, |export| export.request.attach))
    .bind(each(exports, |export| export.requested_by.as_str()))
    .bind(each(exports, |export| export.request_key.as_deref()))
    .bind(each(exports, |export| export.created_at))
    .fetch_all(db)
    .await?;
    let mut added = HashSet::new();
    for row in &found {
        added.extend(row.uuid("id")?.and_then(|id| ExportId::new(id).ok()));
    }
    Ok(added)
}

/// The exports that have the keys of these, by tenant and key.
async fn with_keys(
    db: &mut PgConnection,
    exports: &[NewExport],
) -> StorageResult<HashMap<(String, String), ExportId>> {
    let found = sqlx::query(
        "select e.tenant_id, e.request_key, e.id
         from unnest($1::text[], $2::text[]) as asked (tenant_id, request_key)
         join exports e on e.tenant_id = asked.tenant_id and e.request_key = asked.request_key",
    )
    .bind(each(exports, |export| export.tenant_id.as_str()))
    .bind(each(exports, |export| export.request_key.as_deref()))
    .fetch_all(db)
    .await?;
    rows::exports_by_key(&found)
}

async fn insert_deliveries(
    db: &mut PgConnection,
    exports: &[NewExport],
    added: &HashSet<ExportId>,
) -> StorageResult<()> {
    let (mut tenants, mut ids, mut recipients, mut positions, mut message_ids) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for export in exports.iter().filter(|export| added.contains(&export.id)) {
        let mails = export.request.to.iter().zip(&export.message_ids);
        for (position, (to, message_id)) in (0_i32..).zip(mails) {
            tenants.push(export.tenant_id.as_str());
            ids.push(export.id.uuid());
            recipients.push(to.as_str());
            positions.push(position);
            message_ids.push(message_id.as_str());
        }
    }
    sqlx::query(
        "insert into export_deliveries (tenant_id, export_id, recipient, position, message_id, state)
         select tenant_id, export_id, recipient, position, message_id, 'pending'
         from unnest($1::text[], $2::uuid[], $3::text[], $4::integer[], $5::text[])
              as mails (tenant_id, export_id, recipient, position, message_id)",
    )
    .bind(tenants)
    .bind(ids)
    .bind(recipients)
    .bind(positions)
    .bind(message_ids)
    .execute(db)
    .await?;
    Ok(())
}
