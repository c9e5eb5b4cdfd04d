//! Erasure on PostgreSQL.
//!
//! As with the purge a batch is one statement, behind the gate of the holds. What is deleted stays on
//! the disk until a vacuum; autovacuum comes by itself.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use super::retention::{is_held, is_tenant_held};
use super::{PgStorage, events};
use crate::domain::{ContactId, Subject, TenantId};
use crate::storage::erasure::{ErasedEvent, Erasure, ErasureState, ErasureStore, Survey};
use crate::storage::rows::{self, Columns};
use crate::storage::{StorageError, StorageResult};

#[async_trait]
impl ErasureStore for PgStorage {
    async fn survey(&self, tenant: &TenantId, contact: ContactId) -> StorageResult<Survey> {
        let row = sqlx::query(concat!(
            "select max(w.created_at) as newest,
                    (coalesce(bool_or(",
            is_held!(),
            "), false) or ",
            is_tenant_held!(),
            " or exists (select from holds h
                         where h.tenant_id = $1 and h.released_at is null and h.contact_id = $2)) as held
             from contact_events w
             where w.tenant_id = $1 and w.contact_id = $2"
        ))
        .bind(tenant.as_str())
        .bind(contact.uuid())
        .fetch_one(&self.worker)
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
        let mut transaction = self.worker.begin().await?;
        let exports: Vec<Uuid> = erasure.exports.iter().map(|id| id.uuid()).collect();
        sqlx::query(
            "insert into erasures (tenant_id, id, contact_id, requested_by, requested_at, up_to, state,
                                   events, exports)
             values ($1, $2, $3, $4, $5, $6, 'running', $7, $8)
             on conflict (tenant_id, id) do update set state = 'running', finished_at = null",
        )
        .bind(erasure.tenant_id.as_str())
        .bind(erasure.id.uuid())
        .bind(erasure.contact_id.uuid())
        .bind(erasure.requested_by.as_str())
        .bind(erasure.requested_at)
        .bind(erasure.up_to)
        .bind(i64::try_from(erasure.events).unwrap_or(i64::MAX))
        .bind(exports)
        .execute(&mut *transaction)
        .await?;
        events::audit(
            &mut transaction,
            &erasure.tenant_id,
            now,
            by,
            action,
            erasure.contact_id.uuid(),
            (None, None),
        )
        .await?;
        let begun = delete_exports(&mut transaction, erasure).await?;
        transaction.commit().await?;
        Ok(begun)
    }

    async fn erase_some(&self, erasure: &Erasure, limit: u32) -> StorageResult<Vec<ErasedEvent>> {
        loop {
            // Before the batch, as with the purge.
            let version: i64 = sqlx::query_scalar("select version from retention_gate")
                .fetch_one(&self.worker)
                .await?;
            let found = sqlx::query(concat!(
                "with gate as (
                     select version from retention_gate
                     where version = $6
                     for share),
                 seen as materialized (
                     select w.ctid as place, (",
                is_held!(),
                " or ",
                is_tenant_held!(),
                ") as held
                     from contact_events w
                     where exists (select from gate)
                       and w.tenant_id = $1 and w.contact_id = $2 and w.created_at <= $3
                     limit $4),
                 gone as (
                     delete from contact_events
                     where tenant_id = $1 and contact_id = $2
                       and ctid = any(array(select place from seen))
                       and not exists (select from seen where held)
                     returning id, visible_to_client, visible_to_agent, expires_at),
                 outbox as (
                     delete from event_outbox
                     where tenant_id = $1 and event_id = any(array(select id from gone))),
                 deliveries as (
                     delete from event_deliveries
                     where tenant_id = $1 and event_id = any(array(select id from gone))),
                 reads as (
                     delete from event_reads
                     where tenant_id = $1 and event_id = any(array(select id from gone))),
                 keys as (
                     delete from idempotency_keys
                     where tenant_id = $1 and event_id = any(array(select id from gone))),
                 counted as (
                     update erasures set events = events + (select count(*) from gone)
                     where tenant_id = $1 and id = $5 and exists (select from gone))
                 select s.is_current, s.is_held, s.seen, g.id, g.visible_to_client, g.visible_to_agent, g.expires_at
                 from (select exists (select from gate) as is_current,
                              exists (select from seen where held) as is_held,
                              (select count(*) from seen) as seen) s
                 left join gone g on true"
            ))
            .bind(erasure.tenant_id.as_str())
            .bind(erasure.contact_id.uuid())
            .bind(erasure.up_to)
            .bind(i64::from(limit))
            .bind(erasure.id.uuid())
            .bind(version)
            .fetch_all(&self.worker)
            .await?;
            let Some(first) = found.first() else { continue };
            if !first.flag("is_current")? {
                continue;
            }
            if first.flag("is_held")? {
                return Err(StorageError::Held);
            }
            if first.uuid("id")?.is_none() {
                if first.int("seen")? == Some(0) {
                    return Ok(Vec::new());
                }
                // Another deletion was quicker: what it left comes next.
                continue;
            }
            let ids: Vec<Uuid> = found
                .iter()
                .map(|row| row.try_get("id"))
                .collect::<Result<_, _>>()?;
            self.forget_late(&erasure.tenant_id, &ids).await?;
            return found.iter().map(rows::erased_event).collect();
        }
    }

    async fn finish_erasure(
        &self,
        erasure: &Erasure,
        state: ErasureState,
        now: DateTime<Utc>,
    ) -> StorageResult<Erasure> {
        let mut transaction = self.worker.begin().await?;
        sqlx::query(
            "update erasures set state = $3, finished_at = $4 where tenant_id = $1 and id = $2",
        )
        .bind(erasure.tenant_id.as_str())
        .bind(erasure.id.uuid())
        .bind(state.as_str())
        .bind(now)
        .execute(&mut *transaction)
        .await?;
        let finished = delete_exports(&mut transaction, erasure).await?;
        transaction.commit().await?;
        Ok(finished)
    }

    async fn erasures(&self, since: DateTime<Utc>) -> StorageResult<Vec<Erasure>> {
        let rows = sqlx::query(
            "select tenant_id, id, contact_id, requested_by, requested_at, up_to, state, events,
                    exports::text[] as exports, finished_at
             from erasures where finished_at >= $1
             order by finished_at, id",
        )
        .bind(since)
        .fetch_all(&self.worker)
        .await?;
        rows.iter().map(rows::erasure).collect()
    }

    async fn unfinished_erasures(&self, before: DateTime<Utc>) -> StorageResult<Vec<Erasure>> {
        let rows = sqlx::query(
            "select tenant_id, id, contact_id, requested_by, requested_at, up_to, state, events,
                    exports::text[] as exports, finished_at
             from erasures where state = 'running' and requested_at < $1
             order by requested_at, id",
        )
        .bind(before)
        .fetch_all(&self.worker)
        .await?;
        rows.iter().map(rows::erasure).collect()
    }
}

/// Deletes the contact's exports and notes them. Answers the erasure as it is now.
async fn delete_exports(db: &mut PgConnection, erasure: &Erasure) -> StorageResult<Erasure> {
    let row = sqlx::query(
        "with gone as (
             delete from exports where tenant_id = $1 and contact_id = $2
             returning id)
         update erasures
         set exports = array(select unnest(exports) union select id from gone)
         where tenant_id = $1 and id = $3
         returning tenant_id, id, contact_id, requested_by, requested_at, up_to, state, events,
                   exports::text[] as exports, finished_at",
    )
    .bind(erasure.tenant_id.as_str())
    .bind(erasure.contact_id.uuid())
    .bind(erasure.id.uuid())
    .fetch_one(db)
    .await?;
    rows::erasure(&row)
}
