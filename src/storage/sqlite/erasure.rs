//! Erasure on SQLite.
//!
//! What is deleted stays in free pages of the file until they are used again; so these deletions
//! overwrite it (<https://www.sqlite.org/pragma.html#pragma_secure_delete>). The WAL keeps older pages
//! until the next checkpoints have passed over them.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::retention::{is_held, is_tenant_held};
use super::{SqliteStorage, at, events, set, text};
use crate::domain::{ContactId, ExportId, Subject, TenantId};
use crate::storage::erasure::{ErasedEvent, Erasure, ErasureState, ErasureStore, Survey};
use crate::storage::rows::{self, Columns};
use crate::storage::{StorageError, StorageResult};

#[async_trait]
impl ErasureStore for SqliteStorage {
    async fn survey(&self, tenant: &TenantId, contact: ContactId) -> StorageResult<Survey> {
        let row = sqlx::query(concat!(
            "select max(w.created_at) as newest,
                    (coalesce(max(",
            is_held!(),
            "), 0) or ",
            is_tenant_held!(),
            " or exists (select 1 from holds h
                         where h.tenant_id = $1 and h.released_at is null and h.contact_id = $2)) as held
             from contact_events w
             where w.tenant_id = $1 and w.contact_id = $2"
        ))
        .bind(tenant.as_str())
        .bind(text(contact.uuid()))
        .fetch_one(&self.readers)
        .await?;
        Ok(Survey {
            is_held: row.flag("held")?,
            newest: row.time("newest")?,
        })
    }

    async fn begin_erasure(
        &self,
        erasure: &Erasure,
        action: &'static str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Erasure> {
        let (erasure, by) = (erasure.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into erasures (tenant_id, id, contact_id, requested_by, requested_at, up_to, state,
                                               events, exports)
                         values ($1, $2, $3, $4, $5, $6, 'running', $7, $8)
                         on conflict (tenant_id, id) do update set state = 'running', finished_at = null",
                    )
                    .bind(erasure.tenant_id.as_str())
                    .bind(text(erasure.id.uuid()))
                    .bind(text(erasure.contact_id.uuid()))
                    .bind(erasure.requested_by.as_str())
                    .bind(at(erasure.requested_at))
                    .bind(at(erasure.up_to))
                    .bind(i64::try_from(erasure.events).unwrap_or(i64::MAX))
                    .bind(set(&erasure.exports))
                    .execute(&mut *db)
                    .await?;
                    let subject = erasure.contact_id.uuid();
                    events::audit(db, &erasure.tenant_id, now, &by, action, subject, (None, None)).await?;
                    delete_exports(db, &erasure).await
                })
            })
            .await
    }

    async fn erase_some(&self, erasure: &Erasure, limit: u32) -> StorageResult<Vec<ErasedEvent>> {
        let erasure = erasure.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query("pragma secure_delete = on")
                        .execute(&mut *db)
                        .await?;
                    let erased = delete_events(db, &erasure, limit).await;
                    sqlx::query("pragma secure_delete = off")
                        .execute(&mut *db)
                        .await?;
                    erased
                })
            })
            .await
    }

    async fn finish_erasure(
        &self,
        erasure: &Erasure,
        state: ErasureState,
        now: DateTime<Utc>,
    ) -> StorageResult<Erasure> {
        let erasure = erasure.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update erasures set state = $3, finished_at = $4 where tenant_id = $1 and id = $2",
                    )
                    .bind(erasure.tenant_id.as_str())
                    .bind(text(erasure.id.uuid()))
                    .bind(state.as_str())
                    .bind(at(now))
                    .execute(&mut *db)
                    .await?;
                    delete_exports(db, &erasure).await
                })
            })
            .await
    }

    async fn erasures(&self, since: DateTime<Utc>) -> StorageResult<Vec<Erasure>> {
        let rows = sqlx::query(
            "select tenant_id, id, contact_id, requested_by, requested_at, up_to, state, events, exports,
                    finished_at
             from erasures where finished_at >= $1
             order by finished_at, id",
        )
        .bind(at(since))
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(rows::erasure).collect()
    }

    async fn unfinished_erasures(&self, before: DateTime<Utc>) -> StorageResult<Vec<Erasure>> {
        let rows = sqlx::query(
            "select tenant_id, id, contact_id, requested_by, requested_at, up_to, state, events, exports,
                    finished_at
             from erasures where state = 'running' and requested_at < $1
             order by requested_at, id",
        )
        .bind(at(before))
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(rows::erasure).collect()
    }
}

/// Deletes the contact's exports and notes them. Answers the erasure as it is now.
async fn delete_exports(db: &mut SqliteConnection, erasure: &Erasure) -> StorageResult<Erasure> {
    let contact = text(erasure.contact_id.uuid());
    sqlx::query("pragma secure_delete = on")
        .execute(&mut *db)
        .await?;
    let gone =
        sqlx::query("delete from exports where tenant_id = $1 and contact_id = $2 returning id")
            .bind(erasure.tenant_id.as_str())
            .bind(contact)
            .fetch_all(&mut *db)
            .await;
    sqlx::query("pragma secure_delete = off")
        .execute(&mut *db)
        .await?;
    let mut exports: Vec<ExportId> = erasure.exports.clone();
    for row in gone? {
        let id = row.uuid("id")?.and_then(|id| ExportId::new(id).ok());
        exports.extend(id);
    }
    let row = sqlx::query(
        "update erasures
         set exports = (select json_group_array(id)
                        from (select value as id from json_each(erasures.exports)
                              union select value from json_each($3)))
         where tenant_id = $1 and id = $2
         returning tenant_id, id, contact_id, requested_by, requested_at, up_to, state, events, exports,
                   finished_at",
    )
    .bind(erasure.tenant_id.as_str())
    .bind(text(erasure.id.uuid()))
    .bind(set(&exports))
    .fetch_one(db)
    .await?;
    rows::erasure(&row)
}

async fn delete_events(
    db: &mut SqliteConnection,
    erasure: &Erasure,
    limit: u32,
) -> StorageResult<Vec<ErasedEvent>> {
    let tenant = erasure.tenant_id.as_str();
    let seen: Vec<SqliteRow> = sqlx::query(concat!(
        "select w.seq, w.id, w.visible_to_client, w.visible_to_agent, w.expires_at, (",
        is_held!(),
        " or ",
        is_tenant_held!(),
        ") as held
         from contact_events w
         where w.tenant_id = $1 and w.contact_id = $2 and w.created_at <= $3
         limit $4"
    ))
    .bind(tenant)
    .bind(text(erasure.contact_id.uuid()))
    .bind(at(erasure.up_to))
    .bind(limit)
    .fetch_all(&mut *db)
    .await?;
    let mut erased = Vec::with_capacity(seen.len());
    let mut seqs = Vec::<i64>::with_capacity(seen.len());
    for row in &seen {
        if row.flag("held")? {
            return Err(StorageError::Held);
        }
        seqs.push(row.try_get("seq")?);
        erased.push(rows::erased_event(row)?);
    }
    if seqs.is_empty() {
        return Ok(erased);
    }
    sqlx::query("delete from contact_events where seq in (select value from json_each($1))")
        .bind(set(&seqs))
        .execute(&mut *db)
        .await?;
    let ids: Vec<_> = erased.iter().map(|event| event.id).collect();
    let ids = set(&ids);
    events::forget(db, &erasure.tenant_id, &ids).await?;
    // Named, since without statistics SQLite would go through all keys of the tenant.
    sqlx::query(
        "delete from idempotency_keys indexed by idempotency_keys_event
         where tenant_id = $1 and event_id in (select value from json_each($2))",
    )
    .bind(tenant)
    .bind(ids)
    .execute(&mut *db)
    .await?;
    sqlx::query("update erasures set events = events + $3 where tenant_id = $1 and id = $2")
        .bind(tenant)
        .bind(text(erasure.id.uuid()))
        .bind(i64::try_from(seqs.len()).unwrap_or(i64::MAX))
        .execute(db)
        .await?;
    Ok(erased)
}
