//! The events on SQLite.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteExecutor, SqliteRow};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::retention::{is_held, is_tenant_held};
use super::{SqliteStorage, at, changed, set, text};
use crate::domain::{
    Audience, Category, ContactEvent, ContactId, EventId, EventType, SessionId, Subject, Sweep,
    TenantId,
};
use crate::storage::events::{
    Backlog, Change, EventRepository, Filter, IDEMPOTENCY_WINDOW, Idempotency, Imported, KnownKey,
    MAX_EXACT_TOTAL, Page, Receipt, Receipts, Recording, Saved, Slice, Tail, TailEntry, TailMark,
    Undelivered, View, audit_change, bounds, claims, first_key, imported, judge, last_key,
    pending_after, taken_ids, unused_keys,
};
use crate::storage::retention::{RetentionStore as _, delete_some};
use crate::storage::rows::{self, Columns};
use crate::storage::{Fence, StorageError, StorageResult};

macro_rules! event_columns {
    () => {
        "e.id, e.tenant_id, e.contact_id, e.session_id, e.event_type, e.category, e.priority, e.source, \
         e.title, e.description, e.payload, e.metadata, e.triggered_by, e.integration_source, e.is_realtime, \
         e.delivered_at, e.delivery_expired_at, e.read_at, e.visible_to_client, e.visible_to_agent, \
         e.expires_at, e.occurred_at, e.created_at"
    };
}

/// Columns of an insert.
const INSERT_COLUMNS: usize = 20;
/// Rows of one insert at most, a power of two: well under SQLite's 32,766 parameters.
const INSERT_ROWS: usize = 256;

impl SqliteStorage {
    /// Reads one page, one row more than asked for.
    async fn page(
        &self,
        query: sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
        page: Page,
    ) -> StorageResult<Slice> {
        let rows: Vec<SqliteRow> = query.fetch_all(&self.readers).await?;
        Ok(rows::slice(&rows, page.limit))
    }
}

#[async_trait]
impl EventRepository for SqliteStorage {
    async fn save(&self, tenant: &TenantId, batch: Vec<Recording>) -> StorageResult<Vec<Saved>> {
        debug_assert!(
            batch
                .iter()
                .all(|recording| recording.event.tenant_id == *tenant),
            "an event is saved for its own tenant"
        );
        self.writer.save(batch).await
    }

    async fn import(
        &self,
        tenant: &TenantId,
        events: Vec<ContactEvent>,
        by: &Subject,
    ) -> StorageResult<Vec<Imported>> {
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| Box::pin(async move { import(db, &tenant, events, &by).await }))
            .await
    }

    async fn update(
        &self,
        tenant: &TenantId,
        id: EventId,
        change: Change,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<ContactEvent>> {
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move { update(db, &tenant, id, change, &by, now).await })
            })
            .await
    }

    async fn find_by_id(
        &self,
        tenant: &TenantId,
        id: EventId,
    ) -> StorageResult<Option<ContactEvent>> {
        let row = sqlx::query(concat!(
            "select ",
            event_columns!(),
            " from timeline_events e where e.tenant_id = $1 and e.id = $2"
        ))
        .bind(tenant.as_str())
        .bind(text(id.uuid()))
        .fetch_optional(&self.readers)
        .await?;
        Ok(row.and_then(|row| rows::events(&[row]).pop()))
    }

    async fn find_by_ids(
        &self,
        tenant: &TenantId,
        ids: &[EventId],
    ) -> StorageResult<Vec<ContactEvent>> {
        find_by_ids(&self.readers, tenant, ids).await
    }

    async fn find_by_contact_visible_to(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        filter: &Filter,
        view: View,
        page: Page,
    ) -> StorageResult<Slice> {
        let (key, offset) = first_key(page, filter.until);
        let query = sqlx::query(concat!(
            "select ", event_columns!(), "
             from timeline_events e
             where e.tenant_id = $1 and e.contact_id = $2
               and (e.occurred_at, e.id) < ($3, $4)
               and e.occurred_at >= $5
               and ($6 is null or e.category = $6)
               and ($7 is null or e.event_type = $7)
               and case $8 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
               and ($9 is null or e.expires_at is null or e.expires_at > $9)
             order by e.occurred_at desc, e.id desc
             limit $10 offset $11"
        ))
        .bind(tenant.as_str())
        .bind(text(contact.uuid()))
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(at(bounds(filter).0))
        .bind(filter.category.map(Category::as_str))
        .bind(filter.event_type.as_ref().map(EventType::as_str))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at().map(at))
        .bind(i64::from(page.limit) + 1)
        .bind(offset);
        self.page(query, page).await
    }

    async fn count_by_contact(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        filter: &Filter,
        view: View,
    ) -> StorageResult<u32> {
        let (since, until) = bounds(filter);
        let count: i64 = sqlx::query_scalar(
            "select count(*) from (
                 select 1 from contact_events e
                 where e.tenant_id = $1 and e.contact_id = $2
                   and e.occurred_at >= $3 and e.occurred_at < $4
                   and ($5 is null or e.category = $5)
                   and ($6 is null or e.event_type = $6)
                   and case $7 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
                   and ($8 is null or e.expires_at is null or e.expires_at > $8)
                 limit $9)",
        )
        .bind(tenant.as_str())
        .bind(text(contact.uuid()))
        .bind(at(since))
        .bind(at(until))
        .bind(filter.category.map(Category::as_str))
        .bind(filter.event_type.as_ref().map(EventType::as_str))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at().map(at))
        .bind(i64::from(MAX_EXACT_TOTAL) + 1)
        .fetch_one(&self.readers)
        .await?;
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    async fn find_by_session(
        &self,
        tenant: &TenantId,
        session: SessionId,
        contacts: Option<&[ContactId]>,
        view: View,
        page: Page,
    ) -> StorageResult<Slice> {
        let (key, offset) = last_key(page);
        let query = sqlx::query(concat!(
            "select ", event_columns!(), "
             from timeline_events e
             where e.tenant_id = $1 and e.session_id = $2
               and (e.occurred_at, e.id) > ($3, $4)
               and ($5 is null or e.contact_id in (select value from json_each($5)))
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
               and ($7 is null or e.expires_at is null or e.expires_at > $7)
             order by e.occurred_at, e.id
             limit $8 offset $9"
        ))
        .bind(tenant.as_str())
        .bind(text(session.uuid()))
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(contacts.map(set))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at().map(at))
        .bind(i64::from(page.limit) + 1)
        .bind(offset);
        self.page(query, page).await
    }

    async fn find_by_type_since(
        &self,
        tenant: &TenantId,
        event_type: &EventType,
        since: DateTime<Utc>,
        view: View,
        page: Page,
    ) -> StorageResult<Slice> {
        let (key, offset) = first_key(page, None);
        let query = sqlx::query(concat!(
            "select ", event_columns!(), "
             from timeline_events e
             where e.tenant_id = $1 and e.event_type = $2
               and (e.occurred_at, e.id) < ($3, $4)
               and e.occurred_at >= $5
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
               and ($7 is null or e.expires_at is null or e.expires_at > $7)
             order by e.occurred_at desc, e.id desc
             limit $8 offset $9"
        ))
        .bind(tenant.as_str())
        .bind(event_type.as_str())
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(at(since))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at().map(at))
        .bind(i64::from(page.limit) + 1)
        .bind(offset);
        self.page(query, page).await
    }

    async fn find_by_category_since(
        &self,
        tenant: &TenantId,
        category: Category,
        since: DateTime<Utc>,
        view: View,
        page: Page,
    ) -> StorageResult<Slice> {
        let (key, offset) = first_key(page, None);
        let query = sqlx::query(concat!(
            "select ", event_columns!(), "
             from timeline_events e
             where e.tenant_id = $1 and e.category = $2
               and (e.occurred_at, e.id) < ($3, $4)
               and e.occurred_at >= $5
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
               and ($7 is null or e.expires_at is null or e.expires_at > $7)
             order by e.occurred_at desc, e.id desc
             limit $8 offset $9"
        ))
        .bind(tenant.as_str())
        .bind(category.as_str())
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(at(since))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at().map(at))
        .bind(i64::from(page.limit) + 1)
        .bind(offset);
        self.page(query, page).await
    }

    async fn find_undelivered_for_contact(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        view: View,
        page: Page,
    ) -> StorageResult<Slice> {
        let (key, offset) = last_key(page);
        let query = sqlx::query(concat!(
            "select ", event_columns!(), "
             from event_outbox o
             join timeline_events e on e.tenant_id = o.tenant_id and e.id = o.event_id
             where o.tenant_id = $1 and o.contact_id = $2
               and (o.occurred_at, o.event_id) > ($3, $4)
               and (o.expires_at is null or o.expires_at > $5)
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
             order by o.occurred_at, o.event_id
             limit $7 offset $8"
        ))
        .bind(tenant.as_str())
        .bind(text(contact.uuid()))
        .bind(at(key.0))
        .bind(text(key.1))
        .bind(at(view.now))
        .bind(view.audience.as_str())
        .bind(i64::from(page.limit) + 1)
        .bind(offset);
        self.page(query, page).await
    }

    async fn find_undelivered_realtime(
        &self,
        tenant: &TenantId,
        contacts: &[ContactId],
        after: [i64; 4],
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Backlog> {
        let contacts = set(contacts);
        let (mut waiting, mut reached) = (Vec::<String>::new(), after);
        // Rank by rank: one query ordered across ranks would sort every waiting row.
        for (rank, after) in after.into_iter().enumerate() {
            let wanted = i64::from(limit) - i64::try_from(waiting.len()).unwrap_or(i64::MAX);
            if wanted <= 0 {
                break;
            }
            // SQLite has no lateral join: the inner query gives each contact's first rows by index.
            let rows: Vec<(i64, String)> = sqlx::query_as(
                "select o.seq, o.event_id
                 from (select distinct value from json_each($2)) c
                 join event_outbox o on o.added in (
                     select i.added from event_outbox i
                     where i.tenant_id = $1 and i.contact_id = c.value and i.rank = $3 and i.seq > $4
                       and (i.expires_at is null or i.expires_at > $5)
                     order by i.seq
                     limit $6)
                 order by o.seq
                 limit $6",
            )
            .bind(tenant.as_str())
            .bind(&contacts)
            .bind(i64::try_from(rank).unwrap_or(3))
            .bind(after)
            .bind(at(now))
            .bind(wanted)
            .fetch_all(&self.readers)
            .await?;
            if let Some((last, _)) = rows.last() {
                reached[rank] = *last;
            }
            waiting.extend(rows.into_iter().map(|(_, id)| id));
        }
        let is_end = waiting.len() < limit as usize;
        let events = if waiting.is_empty() {
            Vec::new()
        } else {
            let rows = sqlx::query(concat!(
                "select o.seq, o.rank, ",
                event_columns!(),
                "
                 from event_outbox o
                 join timeline_events e on e.tenant_id = o.tenant_id and e.id = o.event_id
                 where o.tenant_id = $1 and o.event_id in (select value from json_each($2))
                 order by o.rank, o.seq"
            ))
            .bind(tenant.as_str())
            .bind(set(&waiting))
            .fetch_all(&self.readers)
            .await?;
            rows::undelivered(&rows)
        };
        Ok(Backlog {
            events,
            reached,
            is_end,
        })
    }

    async fn tail_end(&self) -> StorageResult<TailMark> {
        // From the sequence, since the newest outbox rows may be gone already.
        let seq: Option<i64> =
            sqlx::query_scalar("select seq from sqlite_sequence where name = 'event_outbox'")
                .fetch_optional(&self.readers)
                .await?;
        Ok(TailMark::Seq(seq.unwrap_or(0)))
    }

    async fn tail(
        &self,
        mark: &TailMark,
        keep: &(dyn for<'a> Fn(&'a str, ContactId) -> bool + Send + Sync),
    ) -> StorageResult<Tail> {
        let TailMark::Seq(mut last) = *mark else {
            return Err(StorageError::Migration(
                "a mark of another engine".to_owned(),
            ));
        };
        // Joined to one row, so that what expires first comes also where nothing is new.
        let mut rows = sqlx::query(
            "select o.added, o.seq, o.rank, o.tenant_id, o.contact_id, o.event_id,
                    (select min(expires_at) from event_outbox where expires_at is not null) as first_expiry
             from (select 1) left join event_outbox o on o.added > $1",
        )
        .bind(last)
        .fetch(&self.readers);
        let (mut entries, mut first_expiry) = (Vec::new(), None);
        while let Some(row) = rows.try_next().await? {
            first_expiry = row.time("first_expiry")?;
            let Some(added) = row.try_get("added")? else {
                break;
            };
            last = last.max(added);
            let contact: Hyphenated = row.try_get("contact_id")?;
            let Ok(contact_id) = ContactId::new(contact.into_uuid()) else {
                continue;
            };
            // What is no text is nobody's; the event is counted where it is read.
            let Ok(tenant) = row.try_get("tenant_id") else {
                continue;
            };
            if keep(tenant, contact_id) {
                entries.extend(tail_entry(&row, contact_id)?);
            }
        }
        entries.sort_by_key(|entry: &TailEntry| (entry.rank, entry.seq));
        Ok(Tail {
            entries,
            mark: TailMark::Seq(last),
            first_expiry,
        })
    }

    async fn find_entries(&self, entries: &[TailEntry]) -> StorageResult<Vec<Undelivered>> {
        let seqs: Vec<i64> = entries.iter().map(|entry| entry.seq).collect();
        let rows = sqlx::query(concat!(
            "select o.seq, o.rank, ",
            event_columns!(),
            "
             from contact_events s
             join event_outbox o on o.tenant_id = s.tenant_id and o.event_id = s.id
             join timeline_events e on e.tenant_id = o.tenant_id and e.id = o.event_id
             where s.seq in (select value from json_each($1))
             order by o.rank, o.seq"
        ))
        .bind(set(&seqs))
        .fetch_all(&self.readers)
        .await?;
        Ok(rows::undelivered(&rows))
    }

    async fn mark_delivered(
        &self,
        tenant: &TenantId,
        audience: Option<Audience>,
        ids: &[EventId],
        contacts: Option<&[ContactId]>,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Vec<Receipt>> {
        let (tenant, by) = (tenant.clone(), by.clone());
        let (ids, contacts) = (set(ids), contacts.map(set));
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let rows = sqlx::query(
                        "delete from event_outbox
                         where tenant_id = $1 and event_id in (select value from json_each($2))
                           and ($3 is null or audience = $3)
                           and ($4 is null or contact_id in (select value from json_each($4)))
                           and (expires_at is null or expires_at > $5)
                         returning event_id, contact_id, audience",
                    )
                    .bind(tenant.as_str())
                    .bind(ids)
                    .bind(audience.map(Audience::as_str))
                    .bind(contacts)
                    .bind(at(now))
                    .fetch_all(&mut *db)
                    .await?;
                    let ended: Vec<[String; 2]> = rows
                        .iter()
                        .map(|row| Ok([row.try_get("event_id")?, row.try_get("audience")?]))
                        .collect::<Result<_, sqlx::Error>>()?;
                    deliver(db, &tenant, &set(&ended), &by, now).await?;
                    receipts(&rows, now)
                })
            })
            .await
    }

    async fn record_delivered(
        &self,
        tenant: &TenantId,
        id: EventId,
        audience: Audience,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<DateTime<Utc>>> {
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "delete from event_outbox where tenant_id = $1 and event_id = $2 and audience = $3",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(audience.as_str())
                    .execute(&mut *db)
                    .await?;
                    let ended = set(&[[id.to_string(), audience.to_string()]]);
                    deliver(db, &tenant, &ended, &by, now).await?;
                    let first: Option<i64> = sqlx::query_scalar(
                        "select min(recorded_at) from event_deliveries
                         where tenant_id = $1 and event_id = $2 and outcome = 'delivered'",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .fetch_one(&mut *db)
                    .await?;
                    Ok(first.map(|first| DateTime::from_timestamp_micros(first).unwrap_or(now)))
                })
            })
            .await
    }

    async fn mark_read(
        &self,
        tenant: &TenantId,
        ids: &[EventId],
        contacts: Option<&[ContactId]>,
        reader: &Subject,
        view: View,
    ) -> StorageResult<Vec<Receipt>> {
        let (tenant, reader) = (tenant.clone(), reader.clone());
        let (ids, contacts) = (set(ids), contacts.map(set));
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let new = sqlx::query(
                        "insert into event_reads (tenant_id, event_id, reader, read_at)
                         select e.tenant_id, e.id, $4, $7
                         -- a cross join keeps this order: event by event, not through the tenant's all
                         from (select distinct value from json_each($2)) j
                         cross join contact_events e
                         where e.tenant_id = $1 and e.id = j.value
                           and ($3 is null or e.contact_id in (select value from json_each($3)))
                           and case $5 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
                           and ($6 is null or e.expires_at is null or e.expires_at > $6)
                         on conflict do nothing
                         returning event_id",
                    )
                    .bind(tenant.as_str())
                    .bind(&ids)
                    .bind(&contacts)
                    .bind(reader.as_str())
                    .bind(view.audience.as_str())
                    .bind(view.unexpired_at().map(at))
                    .bind(at(view.now))
                    .fetch_all(&mut *db)
                    .await?;
                    let new: HashSet<Uuid> = new.iter().filter_map(|row| row.uuid("event_id").ok()?).collect();
                    let rows = sqlx::query(
                        "select r.event_id, e.contact_id, r.read_at
                         from (select distinct value from json_each($2)) j
                         cross join contact_events e
                         join event_reads r on r.tenant_id = e.tenant_id and r.event_id = e.id and r.reader = $4
                         where e.tenant_id = $1 and e.id = j.value
                           and ($3 is null or e.contact_id in (select value from json_each($3)))
                           and case $5 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else 1 end
                           and ($6 is null or e.expires_at is null or e.expires_at > $6)",
                    )
                    .bind(tenant.as_str())
                    .bind(&ids)
                    .bind(&contacts)
                    .bind(reader.as_str())
                    .bind(view.audience.as_str())
                    .bind(view.unexpired_at().map(at))
                    .fetch_all(&mut *db)
                    .await?;
                    let mut receipts = Vec::with_capacity(rows.len());
                    for row in &rows {
                        let read_at = row.time("read_at")?.unwrap_or(view.now);
                        let receipt = rows::receipt(row, read_at)?;
                        let is_new = new.contains(&receipt.event_id.uuid());
                        receipts.push(Receipt { is_new, ..receipt });
                    }
                    Ok(receipts)
                })
            })
            .await
    }

    async fn expire_undelivered(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<u64> {
        // Asked of a reader first: most looks find nothing, and a write would cost an fsync.
        let due: Option<i64> =
            sqlx::query_scalar("select 1 from event_outbox where expires_at <= $1 limit 1")
                .bind(at(now))
                .fetch_optional(&self.readers)
                .await?;
        if due.is_none() {
            return Ok(0);
        }
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)
                         select tenant_id, event_id, audience, 'expired', $1 from event_outbox
                         where expires_at <= $1 order by expires_at, added limit $2
                         on conflict do nothing",
                    )
                    .bind(at(now))
                    .bind(limit)
                    .execute(&mut *db)
                    .await?;
                    let expired = sqlx::query(
                        "delete from event_outbox where added in (
                             select added from event_outbox where expires_at <= $1 order by expires_at, added limit $2)",
                    )
                    .bind(at(now))
                    .bind(limit);
                    changed(db, expired).await
                })
            })
            .await
    }

    async fn expiring_tenants(&self) -> StorageResult<Vec<TenantId>> {
        // A step per tenant through the index, not a scan of it.
        let rows = sqlx::query(
            "with recursive tenants (tenant_id) as (
                 select min(tenant_id) from contact_events where expires_at is not null
                 union all
                 select (select min(e.tenant_id) from contact_events e
                         where e.expires_at is not null and e.tenant_id > t.tenant_id)
                 from tenants t where t.tenant_id is not null)
             select tenant_id from tenants where tenant_id is not null",
        )
        .fetch_all(&self.readers)
        .await?;
        Ok(rows::tenants(&rows))
    }

    async fn find_expired_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Vec<ContactEvent>> {
        let rows = sqlx::query(concat!(
            "select ",
            event_columns!(),
            "
             from timeline_events e
             where e.tenant_id = $1 and e.expires_at < $2
             order by e.expires_at
             limit $3"
        ))
        .bind(tenant.as_str())
        .bind(at(cutoff))
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        Ok(rows::events(&rows))
    }

    async fn count_expired_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
    ) -> StorageResult<u64> {
        let sweep = Sweep::expired_before(tenant, cutoff);
        Ok(self.count_due(&sweep, u64::MAX).await?.due)
    }

    async fn delete(
        &self,
        tenant: &TenantId,
        id: EventId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<ContactId>> {
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let row = sqlx::query(concat!(
                        "select w.contact_id, (",
                        is_tenant_held!(),
                        " or ",
                        is_held!(),
                        ") as held
                         from contact_events w where w.tenant_id = $1 and w.id = $2"
                    ))
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .fetch_optional(&mut *db)
                    .await?;
                    let Some(row) = row else { return Ok(None) };
                    if row.flag("held")? {
                        return Err(StorageError::Held);
                    }
                    sqlx::query("delete from contact_events where tenant_id = $1 and id = $2")
                        .bind(tenant.as_str())
                        .bind(text(id.uuid()))
                        .execute(&mut *db)
                        .await?;
                    forget(db, &tenant, &set(&[id])).await?;
                    audit(
                        db,
                        &tenant,
                        now,
                        &by,
                        "event_deleted",
                        id.uuid(),
                        (None, None),
                    )
                    .await?;
                    Ok(row
                        .uuid("contact_id")?
                        .and_then(|contact| ContactId::new(contact).ok()))
                })
            })
            .await
    }

    async fn delete_expired_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
        limit: u32,
        fence: Option<Fence>,
    ) -> StorageResult<u64> {
        let sweep = Sweep::expired_before(tenant, cutoff);
        delete_some(self, &sweep, limit, fence).await
    }

    async fn find_repeat(
        &self,
        tenant: &TenantId,
        request: &Idempotency,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<EventId>> {
        let row = sqlx::query(
            "select tenant_id, key, body_hash, event_id from idempotency_keys
             where tenant_id = $1 and key = $2 and created_at > $3",
        )
        .bind(tenant.as_str())
        .bind(&request.key)
        .bind(at(now - IDEMPOTENCY_WINDOW))
        .fetch_optional(&self.readers)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let (_, (body_hash, event)) = rows::idempotency(&row, row.try_get("body_hash")?)?;
        Ok((body_hash == request.body_hash).then_some(event))
    }

    async fn delete_idempotency_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
        limit: u32,
        fence: Option<Fence>,
    ) -> StorageResult<u64> {
        let tenant = tenant.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    check_fence(db, fence).await?;
                    let old = sqlx::query(
                        "delete from idempotency_keys where tenant_id = $1 and key in (
                             select key from idempotency_keys
                             where tenant_id = $1 and created_at < $2 order by created_at limit $3)",
                    )
                    .bind(tenant.as_str())
                    .bind(at(cutoff))
                    .bind(limit);
                    changed(db, old).await
                })
            })
            .await
    }

    async fn idempotent_tenants(&self) -> StorageResult<Vec<TenantId>> {
        let rows = sqlx::query(
            "with recursive tenants (tenant_id) as (
                 select min(tenant_id) from idempotency_keys
                 union all
                 select (select min(k.tenant_id) from idempotency_keys k where k.tenant_id > t.tenant_id)
                 from tenants t where t.tenant_id is not null)
             select tenant_id from tenants where tenant_id is not null",
        )
        .fetch_all(&self.readers)
        .await?;
        Ok(rows::tenants(&rows))
    }
}

/// Refuses to write for a run that is no longer the caller's. What follows in the transaction is safe:
/// nobody else writes before its end.
pub(super) async fn check_fence(
    db: &mut SqliteConnection,
    fence: Option<Fence>,
) -> StorageResult<()> {
    let Some(fence) = fence else { return Ok(()) };
    let is_ours: bool = sqlx::query_scalar(
        "select exists (select 1 from job_runs where id = $1 and fence = $2 and state = 'running')",
    )
    .bind(text(fence.run.uuid()))
    .bind(fence.number)
    .fetch_one(db)
    .await?;
    if is_ours {
        Ok(())
    } else {
        Err(StorageError::Fenced)
    }
}

fn tail_entry(row: &SqliteRow, contact_id: ContactId) -> StorageResult<Option<TailEntry>> {
    let event: Hyphenated = row.try_get("event_id")?;
    let tenant_id = TenantId::new(row.try_get("tenant_id")?).ok();
    let event_id = EventId::new(event.into_uuid()).ok();
    let (seq, rank) = (row.try_get("seq")?, row.try_get::<i16, _>("rank")?);
    Ok(tenant_id
        .zip(event_id)
        .map(|(tenant_id, event_id)| TailEntry {
            seq,
            rank,
            tenant_id,
            contact_id,
            event_id,
        }))
}

fn receipts(rows: &[SqliteRow], now: DateTime<Utc>) -> StorageResult<Vec<Receipt>> {
    rows.iter().map(|row| rows::receipt(row, now)).collect()
}

/// Saves a batch, which may be of several requests and tenants: two statements, however many.
pub(super) async fn save(
    db: &mut SqliteConnection,
    batch: &[Recording],
) -> StorageResult<Vec<Saved>> {
    let (fresh, known) = claim_keys(db, batch).await?;
    let mut saved = judge(batch, &fresh, &known);
    let wanted: Vec<usize> = (0..batch.len())
        .filter(|&index| saved[index] == Saved::Created)
        .collect();
    for chunk in wanted.chunks(INSERT_ROWS) {
        let events: Vec<&ContactEvent> = chunk.iter().map(|&index| &batch[index].event).collect();
        let mut inserted: HashSet<(&str, Uuid)> = HashSet::new();
        let answer;
        match insert_new(db, &events).await {
            Ok(()) => continue,
            Err(error) if is_conflict(&error) => {
                answer = insert(db, &events).await?;
                inserted.extend(answer.iter().map(|(tenant, id)| (tenant.as_str(), *id)));
            }
            Err(error) => return Err(error.into()),
        }
        for &index in chunk {
            let event = &batch[index].event;
            if !inserted.remove(&(event.tenant_id.as_str(), event.id.uuid())) {
                saved[index] = Saved::IdTaken;
            }
        }
    }
    let unused = unused_keys(batch, &mut saved);
    if !unused.is_empty() {
        sqlx::query(
            "delete from idempotency_keys
             where (tenant_id, key) in (select value ->> 0, value ->> 1 from json_each($1))",
        )
        .bind(set(&unused))
        .execute(db)
        .await?;
    }
    Ok(saved)
}

async fn find_by_ids(
    db: impl SqliteExecutor<'_>,
    tenant: &TenantId,
    ids: &[EventId],
) -> StorageResult<Vec<ContactEvent>> {
    let rows = sqlx::query(concat!(
        "select ",
        event_columns!(),
        " from timeline_events e
         where e.tenant_id = $1 and e.id in (select value from json_each($2))"
    ))
    .bind(tenant.as_str())
    .bind(set(ids))
    .fetch_all(db)
    .await?;
    Ok(rows::events(&rows))
}

/// Saves events that were recorded elsewhere, with their receipts.
async fn import(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    events: Vec<ContactEvent>,
    by: &Subject,
) -> StorageResult<Vec<Imported>> {
    let batch: Vec<Recording> = events
        .into_iter()
        .map(|event| Recording {
            event,
            idempotency: None,
        })
        .collect();
    let saved = save(db, &batch).await?;
    let Receipts { delivered, read } = Receipts::of(&batch, &saved);
    if !delivered.is_empty() {
        let delivered: Vec<(EventId, &str, i64)> = delivered
            .into_iter()
            .map(|(id, audience, time)| (id, audience.as_str(), at(time)))
            .collect();
        let delivered = set(&delivered);
        sqlx::query(
            "insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at, recorded_by)
             select $1, value ->> 0, value ->> 1, 'delivered', value ->> 2, $3 from json_each($2)
             -- without a condition, \"on\" would begin a join
             where true
             on conflict do nothing",
        )
        .bind(tenant.as_str())
        .bind(&delivered)
        .bind(by.as_str())
        .execute(&mut *db)
        .await?;
        sqlx::query(
            "delete from event_outbox
             where tenant_id = $1 and event_id in (select value ->> 0 from json_each($2))",
        )
        .bind(tenant.as_str())
        .bind(&delivered)
        .execute(&mut *db)
        .await?;
    }
    if !read.is_empty() {
        let read: Vec<(EventId, i64)> = read.into_iter().map(|(id, time)| (id, at(time))).collect();
        sqlx::query(
            "insert into event_reads (tenant_id, event_id, reader, read_at)
             select $1, value ->> 0, $3, value ->> 1 from json_each($2)
             where true
             on conflict do nothing",
        )
        .bind(tenant.as_str())
        .bind(set(&read))
        .bind(by.as_str())
        .execute(&mut *db)
        .await?;
    }
    let taken = taken_ids(&batch, &saved);
    let found = if taken.is_empty() {
        Vec::new()
    } else {
        find_by_ids(db, tenant, &taken).await?
    };
    Ok(imported(&batch, &saved, found))
}

/// Whether saving `batch` is one statement, which leaves nothing behind where it fails.
pub(super) fn is_one_statement(batch: &[Recording]) -> bool {
    batch.len() <= INSERT_ROWS && claims(batch).is_empty()
}

type Known = HashMap<KnownKey, (Vec<u8>, EventId)>;

/// Claims the batch's keys; answers those that are fresh, and what is known of the others.
async fn claim_keys(
    db: &mut SqliteConnection,
    batch: &[Recording],
) -> StorageResult<(HashSet<KnownKey>, Known)> {
    let claims = claims(batch);
    if claims.is_empty() {
        return Ok((HashSet::new(), Known::new()));
    }
    let mut query = sqlx::QueryBuilder::<sqlx::Sqlite>::new(
        "insert into idempotency_keys (tenant_id, key, body_hash, event_id, created_at) ",
    );
    query.push_values(
        &claims,
        |mut row, ((tenant, key), (hash, id, created_at))| {
            row.push_bind(*tenant)
                .push_bind(*key)
                .push_bind(*hash)
                .push_bind(text(id.uuid()))
                .push_bind(at(*created_at));
        },
    );
    // A key older than the window is as good as new.
    query.push(
        " on conflict (tenant_id, key) do update \
          set body_hash = excluded.body_hash, event_id = excluded.event_id, created_at = excluded.created_at \
          where idempotency_keys.created_at <= excluded.created_at - ",
    );
    query
        .push_bind(IDEMPOTENCY_WINDOW.num_microseconds())
        .push(" returning tenant_id, key");
    let fresh: HashSet<KnownKey> = query
        .build_query_as()
        .persistent(claims.len() == 1)
        .fetch_all(&mut *db)
        .await?
        .into_iter()
        .collect();
    let others: Vec<(&str, &str)> = claims
        .keys()
        .copied()
        .filter(|(tenant, key)| !fresh.contains(&((*tenant).to_owned(), (*key).to_owned())))
        .collect();
    if others.is_empty() {
        return Ok((fresh, Known::new()));
    }
    let rows = sqlx::query(
        "select tenant_id, key, body_hash, event_id from idempotency_keys
         where (tenant_id, key) in (select value ->> 0, value ->> 1 from json_each($1))",
    )
    .bind(set(&others))
    .fetch_all(db)
    .await?;
    let known = rows
        .iter()
        .map(|row| rows::idempotency(row, row.try_get("body_hash")?));
    Ok((fresh, known.collect::<StorageResult<_>>()?))
}

/// The events as rows of a statement that inserts them. So many rows of nothing follow that their
/// number is a power of two: so few different statements stay prepared.
fn insertion(events: &[&ContactEvent]) -> sqlx::QueryBuilder<sqlx::Sqlite> {
    let mut query = sqlx::QueryBuilder::new(
        "insert into contact_events (tenant_id, id, contact_id, session_id, event_type, category, priority, \
         source, title, description, payload, metadata, triggered_by, integration_source, is_realtime, \
         visible_to_client, visible_to_agent, expires_at, occurred_at, created_at) select * from ( ",
    );
    let padded = events.len().next_power_of_two();
    let rows = (events.iter().copied().map(Some)).chain(std::iter::repeat(None));
    query.push_values(rows.take(padded), |mut row, event| {
        let Some(event) = event else {
            for _ in 0..INSERT_COLUMNS {
                row.push_bind(None::<i64>);
            }
            return;
        };
        row.push_bind(event.tenant_id.as_str())
            .push_bind(text(event.id.uuid()))
            .push_bind(text(event.contact_id.uuid()))
            .push_bind(event.session_id.map(|id| text(id.uuid())))
            .push_bind(event.event_type.as_str())
            .push_bind(event.category.as_str())
            .push_bind(event.priority.as_str())
            .push_bind(event.source.as_str())
            .push_bind(event.title.as_deref())
            .push_bind(event.description.as_deref())
            .push_bind(event.payload.as_str())
            .push_bind(event.metadata.as_str())
            .push_bind(event.triggered_by.map(|id| text(id.uuid())))
            .push_bind(event.integration_source.as_deref())
            .push_bind(event.is_realtime)
            .push_bind(event.visibility.client)
            .push_bind(event.visibility.agent)
            .push_bind(event.expires_at.map(at))
            .push_bind(at(event.occurred_at))
            .push_bind(at(event.created_at));
    });
    query.push(") where column2 is not null");
    query
}

/// Inserts events whose ids are new: what almost all are. Otherwise it fails, and inserts nothing.
async fn insert_new(
    db: &mut SqliteConnection,
    events: &[&ContactEvent],
) -> Result<(), sqlx::Error> {
    insertion(events).build().execute(db).await?;
    Ok(())
}

fn is_conflict(error: &sqlx::Error) -> bool {
    (error.as_database_error()).is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}

/// Inserts those events whose ids are new; answers their tenants and ids.
async fn insert(
    db: &mut SqliteConnection,
    events: &[&ContactEvent],
) -> StorageResult<Vec<(String, Uuid)>> {
    let mut query = insertion(events);
    query.push(" on conflict (tenant_id, id) do nothing returning tenant_id, id");
    let rows: Vec<(String, Hyphenated)> = query.build_query_as().fetch_all(db).await?;
    Ok(rows
        .into_iter()
        .map(|(tenant, id)| (tenant, id.into_uuid()))
        .collect())
}

async fn update(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    id: EventId,
    change: Change,
    by: &Subject,
    now: DateTime<Utc>,
) -> StorageResult<Option<ContactEvent>> {
    const FIND: &str = concat!(
        "select e.seq, ",
        event_columns!(),
        " from timeline_events e where e.tenant_id = $1 and e.id = $2"
    );
    let found = sqlx::query(FIND)
        .bind(tenant.as_str())
        .bind(text(id.uuid()))
        .fetch_optional(&mut *db)
        .await?;
    let Some(row) = found else { return Ok(None) };
    let before = rows::event(&row)?;
    let visibility = change.visibility.unwrap_or(before.visibility);
    let expires_at = change.expires_at.unwrap_or(before.expires_at);
    sqlx::query(
        "update contact_events set visible_to_client = $3, visible_to_agent = $4, expires_at = $5
         where tenant_id = $1 and id = $2",
    )
    .bind(tenant.as_str())
    .bind(text(id.uuid()))
    .bind(visibility.client)
    .bind(visibility.agent)
    .bind(expires_at.map(at))
    .execute(&mut *db)
    .await?;
    if before.is_realtime {
        let was_pending: Option<String> = sqlx::query_scalar(
            "delete from event_outbox where tenant_id = $1 and event_id = $2 returning audience",
        )
        .bind(tenant.as_str())
        .bind(text(id.uuid()))
        .fetch_optional(&mut *db)
        .await?;
        // An expiry that lies ahead revives a delivery that had expired.
        let revives = expires_at.is_none_or(|at| at > now);
        if revives {
            sqlx::query(
                "delete from event_deliveries where tenant_id = $1 and event_id = $2 and outcome = 'expired'",
            )
            .bind(tenant.as_str())
            .bind(text(id.uuid()))
            .execute(&mut *db)
            .await?;
        }
        let had: Vec<String> = sqlx::query_scalar(
            "select audience from event_deliveries where tenant_id = $1 and event_id = $2",
        )
        .bind(tenant.as_str())
        .bind(text(id.uuid()))
        .fetch_all(&mut *db)
        .await?;
        let had: Vec<Audience> = had
            .iter()
            .filter_map(|audience| audience.parse().ok())
            .collect();
        let was_pending = was_pending.and_then(|audience| audience.parse().ok());
        if let Some(audience) = pending_after(before.visibility, visibility, was_pending, &had) {
            sqlx::query(
                "insert into event_outbox (seq, tenant_id, event_id, contact_id, audience, rank, occurred_at, expires_at)
                 select seq, tenant_id, id, contact_id, $3, $4, occurred_at, expires_at
                 from contact_events where tenant_id = $1 and id = $2",
            )
            .bind(tenant.as_str())
            .bind(text(id.uuid()))
            .bind(audience.as_str())
            .bind(before.priority.rank())
            .execute(&mut *db)
            .await?;
        }
    }
    audit(
        db,
        tenant,
        now,
        by,
        "event_updated",
        id.uuid(),
        audit_change(&before, visibility, expires_at),
    )
    .await?;
    let row = sqlx::query(FIND)
        .bind(tenant.as_str())
        .bind(text(id.uuid()))
        .fetch_one(&mut *db)
        .await?;
    rows::event(&row).map(Some)
}

/// Writes deliveries: `ended` is a JSON array of pairs of event and audience.
async fn deliver(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    ended: &str,
    by: &Subject,
    now: DateTime<Utc>,
) -> StorageResult<()> {
    sqlx::query(
        "insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at, recorded_by)
         select $1, value ->> 0, value ->> 1, 'delivered', $3, $4 from json_each($2)
         -- nothing would ever delete the delivery of an event that is gone
         where exists (select 1 from contact_events e where e.tenant_id = $1 and e.id = value ->> 0)
         on conflict (tenant_id, event_id, audience) do update
         set outcome = 'delivered', recorded_at = excluded.recorded_at, recorded_by = excluded.recorded_by
         where outcome = 'expired'",
    )
    .bind(tenant.as_str())
    .bind(ended)
    .bind(at(now))
    .bind(by.as_str())
    .execute(db)
    .await?;
    Ok(())
}

/// Deletes what stands beside events: `ids` is a JSON array.
pub(super) async fn forget(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    ids: &str,
) -> StorageResult<()> {
    for statement in [
        "delete from event_outbox where tenant_id = $1 and event_id in (select value from json_each($2))",
        "delete from event_deliveries where tenant_id = $1 and event_id in (select value from json_each($2))",
        "delete from event_reads where tenant_id = $1 and event_id in (select value from json_each($2))",
    ] {
        sqlx::query(statement)
            .bind(tenant.as_str())
            .bind(ids)
            .execute(&mut *db)
            .await?;
    }
    Ok(())
}

pub(super) async fn audit(
    db: &mut SqliteConnection,
    tenant: &TenantId,
    now: DateTime<Utc>,
    by: &Subject,
    action: &'static str,
    id: Uuid,
    (before, after): (Option<String>, Option<String>),
) -> StorageResult<()> {
    sqlx::query(
        "insert into audit_log (tenant_id, at, actor, action, subject_id, before, after)
         values ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(tenant.as_str())
    .bind(at(now))
    .bind(by.as_str())
    .bind(action)
    .bind(text(id))
    .bind(before)
    .bind(after)
    .execute(db)
    .await?;
    Ok(())
}
