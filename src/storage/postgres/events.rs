//! The events on PostgreSQL.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::{PgExecutor, Postgres, Row};
use uuid::Uuid;

use super::retention::{is_held, is_tenant_held};
use super::{PgStorage, set};
use crate::domain::{
    AgentId, Audience, Category, ContactEvent, ContactId, EventId, EventType, SessionId, Subject,
    Sweep, TenantId,
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
         e.title, e.description, e.payload::text as payload, e.metadata::text as metadata, e.triggered_by, \
         e.integration_source, e.is_realtime, e.delivered_at, e.delivery_expired_at, e.read_at, \
         e.visible_to_client, e.visible_to_agent, e.expires_at, e.occurred_at, e.created_at"
    };
}

/// Rows that one look at the tail reads at once; both of its statements say it.
const TAIL_PAGE: usize = 10_000;

type PgQuery<'q> = sqlx::query::Query<'q, Postgres, PgArguments>;

impl PgStorage {
    /// Reads one page, one row more than asked for.
    async fn page(&self, query: PgQuery<'_>, page: Page) -> StorageResult<Slice> {
        let rows: Vec<PgRow> = query.fetch_all(&self.foreground).await?;
        Ok(rows::slice(&rows, page.limit))
    }
}

#[async_trait]
impl EventRepository for PgStorage {
    async fn save(&self, tenant: &TenantId, batch: Vec<Recording>) -> StorageResult<Vec<Saved>> {
        if batch
            .iter()
            .all(|recording| recording.idempotency.is_none())
        {
            // One statement is a transaction by itself, and one round trip.
            let mut saved = vec![Saved::Created; batch.len()];
            insert(&self.foreground, tenant, &batch, &mut saved).await?;
            return Ok(saved);
        }
        let mut transaction = self.foreground.begin().await?;
        let saved = save(&mut transaction, tenant, &batch).await?;
        transaction.commit().await?;
        Ok(saved)
    }

    async fn import(
        &self,
        tenant: &TenantId,
        events: Vec<ContactEvent>,
        by: &Subject,
    ) -> StorageResult<Vec<Imported>> {
        let mut transaction = self.worker.begin().await?;
        let imported = import(&mut transaction, tenant, events, by).await?;
        transaction.commit().await?;
        Ok(imported)
    }

    async fn update(
        &self,
        tenant: &TenantId,
        id: EventId,
        change: Change,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<ContactEvent>> {
        let mut transaction = self.foreground.begin().await?;
        let event = update(&mut transaction, tenant, id, change, by, now).await?;
        transaction.commit().await?;
        Ok(event)
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
        .bind(id.uuid())
        .fetch_optional(&self.foreground)
        .await?;
        Ok(row.and_then(|row| rows::events(&[row]).pop()))
    }

    async fn find_by_ids(
        &self,
        tenant: &TenantId,
        ids: &[EventId],
    ) -> StorageResult<Vec<ContactEvent>> {
        find_by_ids(&self.foreground, tenant, ids).await
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
               and ($6::text is null or e.category = $6)
               and ($7::text is null or e.event_type = $7)
               and case $8 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
               and ($9::timestamptz is null or e.expires_at is null or e.expires_at > $9)
             order by e.occurred_at desc, e.id desc
             limit $10 offset $11"
        ))
        .bind(tenant.as_str())
        .bind(contact.uuid())
        .bind(key.0)
        .bind(key.1)
        .bind(bounds(filter).0)
        .bind(filter.category.map(Category::as_str))
        .bind(filter.event_type.as_ref().map(EventType::as_str))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at())
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
                   and ($5::text is null or e.category = $5)
                   and ($6::text is null or e.event_type = $6)
                   and case $7 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
                   and ($8::timestamptz is null or e.expires_at is null or e.expires_at > $8)
                 limit $9) counted",
        )
        .bind(tenant.as_str())
        .bind(contact.uuid())
        .bind(since)
        .bind(until)
        .bind(filter.category.map(Category::as_str))
        .bind(filter.event_type.as_ref().map(EventType::as_str))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at())
        .bind(i64::from(MAX_EXACT_TOTAL) + 1)
        .fetch_one(&self.foreground)
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
               and ($5::uuid[] is null or e.contact_id = any($5))
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
               and ($7::timestamptz is null or e.expires_at is null or e.expires_at > $7)
             order by e.occurred_at, e.id
             limit $8 offset $9"
        ))
        .bind(tenant.as_str())
        .bind(session.uuid())
        .bind(key.0)
        .bind(key.1)
        .bind(contacts.map(|contacts| set(contacts, ContactId::uuid)))
        .bind(view.audience.as_str())
        .bind(view.unexpired_at())
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
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
               and ($7::timestamptz is null or e.expires_at is null or e.expires_at > $7)
             order by e.occurred_at desc, e.id desc
             limit $8 offset $9"
        ))
        .bind(tenant.as_str())
        .bind(event_type.as_str())
        .bind(key.0)
        .bind(key.1)
        .bind(since)
        .bind(view.audience.as_str())
        .bind(view.unexpired_at())
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
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
               and ($7::timestamptz is null or e.expires_at is null or e.expires_at > $7)
             order by e.occurred_at desc, e.id desc
             limit $8 offset $9"
        ))
        .bind(tenant.as_str())
        .bind(category.as_str())
        .bind(key.0)
        .bind(key.1)
        .bind(since)
        .bind(view.audience.as_str())
        .bind(view.unexpired_at())
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
               and case $6 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
             order by o.occurred_at, o.event_id
             limit $7 offset $8"
        ))
        .bind(tenant.as_str())
        .bind(contact.uuid())
        .bind(key.0)
        .bind(key.1)
        .bind(view.now)
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
        let contacts = set(contacts, ContactId::uuid);
        let (mut waiting, mut reached) = (Vec::<Uuid>::new(), after);
        // Rank by rank: one query ordered across ranks would sort every waiting row.
        for (rank, after) in after.into_iter().enumerate() {
            let wanted = i64::from(limit) - i64::try_from(waiting.len()).unwrap_or(i64::MAX);
            if wanted <= 0 {
                break;
            }
            // The lateral join gives each contact's first rows by index.
            let rows: Vec<(i64, Uuid)> = sqlx::query_as(
                "select o.seq, o.event_id
                 from (select distinct unnest($2::uuid[])) c (contact_id)
                 cross join lateral (
                     select i.seq, i.event_id from event_outbox i
                     where i.tenant_id = $1 and i.contact_id = c.contact_id and i.rank = $3 and i.seq > $4
                       and (i.expires_at is null or i.expires_at > $5)
                     order by i.seq
                     limit $6) o
                 order by o.seq
                 limit $6",
            )
            .bind(tenant.as_str())
            .bind(&contacts)
            .bind(i16::try_from(rank).unwrap_or(3))
            .bind(after)
            .bind(now)
            .bind(wanted)
            .fetch_all(&self.foreground)
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
                 where o.tenant_id = $1 and o.event_id = any($2)
                 order by o.rank, o.seq"
            ))
            .bind(tenant.as_str())
            .bind(waiting)
            .fetch_all(&self.foreground)
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
        let snapshot = sqlx::query_scalar("select pg_current_snapshot()::text")
            .fetch_one(&self.foreground)
            .await?;
        Ok(TailMark::Snapshot(snapshot))
    }

    async fn tail(
        &self,
        mark: &TailMark,
        keep: &(dyn for<'a> Fn(&'a str, ContactId) -> bool + Send + Sync),
    ) -> StorageResult<Tail> {
        let TailMark::Snapshot(mark) = mark else {
            return Err(StorageError::Migration(
                "a mark of another engine".to_owned(),
            ));
        };
        // Writers commit in another order than they number, so a seq is no mark. What the marked
        // snapshot does not show is new: later transactions, and those that were open then, none
        // of them older than its xmin. Its own snapshot comes with the rows, or without any.
        let mut rows = sqlx::query(
            "select s.snapshot, s.first_expiry, o.xid::text as xid, o.seq, o.rank, o.tenant_id, o.contact_id, o.event_id
             from (select pg_current_snapshot()::text as snapshot,
                          (select min(expires_at) from event_outbox) as first_expiry) s
             left join lateral (
                 select n.xid, n.seq, n.rank, n.tenant_id, n.contact_id, n.event_id
                 from event_outbox n
                 where n.xid >= pg_snapshot_xmin($1::pg_snapshot)
                   and not pg_visible_in_snapshot(n.xid, $1::pg_snapshot)
                 order by n.xid, n.seq
                 limit 10000) o on true
             order by o.xid, o.seq",
        )
        .bind(mark)
        .fetch_all(&self.foreground)
        .await?;
        let (snapshot, first_expiry) = match rows.first() {
            Some(row) => (row.try_get("snapshot")?, row.time("first_expiry")?),
            None => return Err(sqlx::Error::RowNotFound.into()),
        };
        if rows.first().is_some_and(is_only_the_snapshot) {
            rows.clear();
        }
        let mut entries = Vec::new();
        loop {
            for row in &rows {
                entries.extend(tail_entry(row, keep)?);
            }
            let Some(last) = rows.last().filter(|_| rows.len() == TAIL_PAGE) else {
                break;
            };
            // Behind the last one, still by the old mark. What commits meanwhile is read now and
            // again by the next look, which is harmless.
            rows = sqlx::query(
                "select n.xid::text as xid, n.seq, n.rank, n.tenant_id, n.contact_id, n.event_id
                 from event_outbox n
                 where (n.xid, n.seq) > ($2::text::xid8, $3)
                   and not pg_visible_in_snapshot(n.xid, $1::pg_snapshot)
                 order by n.xid, n.seq
                 limit 10000",
            )
            .bind(mark)
            .bind(last.try_get::<String, _>("xid")?)
            .bind(last.try_get::<i64, _>("seq")?)
            .fetch_all(&self.foreground)
            .await?;
        }
        entries.sort_by_key(|entry: &TailEntry| (entry.rank, entry.seq));
        Ok(Tail {
            entries,
            mark: TailMark::Snapshot(snapshot),
            first_expiry,
        })
    }

    async fn find_entries(&self, entries: &[TailEntry]) -> StorageResult<Vec<Undelivered>> {
        // By the primary key: here seq has no index of its own.
        let tenants: Vec<&str> = entries
            .iter()
            .map(|entry| entry.tenant_id.as_str())
            .collect();
        let ids: Vec<Uuid> = entries.iter().map(|entry| entry.event_id.uuid()).collect();
        let rows = sqlx::query(concat!(
            "select o.seq, o.rank, ",
            event_columns!(),
            "
             from unnest($1::text[], $2::uuid[]) t (tenant_id, event_id)
             -- the limit keeps it a look for each: a plain join may read the whole backlog
             cross join lateral (
                 select w.seq, w.rank, w.tenant_id, w.event_id from event_outbox w
                 where w.tenant_id = t.tenant_id and w.event_id = t.event_id
                 limit 1) o
             join timeline_events e on e.tenant_id = o.tenant_id and e.id = o.event_id
             order by o.rank, o.seq"
        ))
        .bind(tenants)
        .bind(ids)
        .fetch_all(&self.foreground)
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
        // Skips what another acknowledgement is ending: two that wait for each other's rows would
        // otherwise end in a deadlock.
        let rows = sqlx::query(
            "with ended as (
                 delete from event_outbox
                 where tenant_id = $1 and ctid = any(array(
                     select ctid from event_outbox
                     where tenant_id = $1 and event_id = any($2)
                       and ($3::text is null or audience = $3)
                       and ($4::uuid[] is null or contact_id = any($4))
                       and (expires_at is null or expires_at > $5)
                     for update skip locked))
                 returning event_id, contact_id, audience),
             recorded as (
                 insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at, recorded_by)
                 select $1, event_id, audience, 'delivered', $5, $6 from ended
                 on conflict (tenant_id, event_id, audience) do update
                 set outcome = 'delivered', recorded_at = excluded.recorded_at, recorded_by = excluded.recorded_by
                 where event_deliveries.outcome = 'expired')
             select event_id, contact_id from ended",
        )
        .bind(tenant.as_str())
        .bind(set(ids, EventId::uuid))
        .bind(audience.map(Audience::as_str))
        .bind(contacts.map(|contacts| set(contacts, ContactId::uuid)))
        .bind(now)
        .bind(by.as_str())
        .fetch_all(&self.foreground)
        .await?;
        rows.iter().map(|row| rows::receipt(row, now)).collect()
    }

    async fn record_delivered(
        &self,
        tenant: &TenantId,
        id: EventId,
        audience: Audience,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<DateTime<Utc>>> {
        // The event is locked, since nothing would ever delete the delivery of one that goes meanwhile.
        // A delivery that stands is written again as it is, so that it is answered even where it
        // was recorded after this statement began.
        let row = sqlx::query(
            "with event as (
                 select tenant_id, id from contact_events where tenant_id = $1 and id = $2
                 for key share),
             ended as (
                 delete from event_outbox where tenant_id = $1 and event_id = $2 and audience = $3
                   -- the event first, as a purge does: else the two could wait for each other
                   and exists (select 1 from event)
                 returning 1),
             recorded as (
                 insert into event_deliveries as d (tenant_id, event_id, audience, outcome, recorded_at, recorded_by)
                 select tenant_id, id, $3, 'delivered', $4, $5 from event
                 -- the outbox first, as everybody does
                 where (select count(*) from ended) >= 0
                 on conflict (tenant_id, event_id, audience) do update
                 set outcome = 'delivered',
                     recorded_at = case d.outcome when 'expired' then excluded.recorded_at else d.recorded_at end,
                     recorded_by = case d.outcome when 'expired' then excluded.recorded_by else d.recorded_by end
                 returning recorded_at)
             select (select recorded_at from recorded) as now_at, min(recorded_at) as before_at
             from event_deliveries
             where tenant_id = $1 and event_id = $2 and outcome = 'delivered'",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(audience.as_str())
        .bind(now)
        .bind(by.as_str())
        .fetch_one(&self.foreground)
        .await?;
        let (now_at, before_at) = (row.time("now_at")?, row.time("before_at")?);
        Ok(now_at.map(|at| before_at.map_or(at, |before| before.min(at))))
    }

    async fn mark_read(
        &self,
        tenant: &TenantId,
        ids: &[EventId],
        contacts: Option<&[ContactId]>,
        reader: &Subject,
        view: View,
    ) -> StorageResult<Vec<Receipt>> {
        // Sorted, so that two requests of one reader do not wait for each other. A receipt that was
        // added after this statement began is written again as it is, and so is answered.
        let rows = sqlx::query(
            "with shown as (
                 select e.id, e.contact_id, r.read_at
                 from contact_events e
                 left join event_reads r on r.tenant_id = e.tenant_id and r.event_id = e.id and r.reader = $4
                 where e.tenant_id = $1 and e.id = any($2)
                   and ($3::uuid[] is null or e.contact_id = any($3))
                   and case $5 when 'client' then e.visible_to_client when 'agent' then e.visible_to_agent else true end
                   and ($6::timestamptz is null or e.expires_at is null or e.expires_at > $6)
                 -- nothing would ever delete the receipt of an event that goes meanwhile
                 order by e.id
                 for key share of e),
             new as (
                 insert into event_reads (tenant_id, event_id, reader, read_at)
                 select $1, id, $4, $7 from shown where read_at is null order by id
                 on conflict (tenant_id, event_id, reader) do update set read_at = event_reads.read_at
                 -- a row that was there already was locked, which leaves its mark
                 returning event_id, read_at, xmax = 0 as is_new)
             select s.id as event_id, s.contact_id, coalesce(s.read_at, n.read_at) as read_at,
                    coalesce(n.is_new, false) as is_new
             from shown s
             left join new n on n.event_id = s.id",
        )
        .bind(tenant.as_str())
        .bind(set(ids, EventId::uuid))
        .bind(contacts.map(|contacts| set(contacts, ContactId::uuid)))
        .bind(reader.as_str())
        .bind(view.audience.as_str())
        .bind(view.unexpired_at())
        .bind(view.now)
        .fetch_all(&self.foreground)
        .await?;
        let mut receipts = Vec::with_capacity(rows.len());
        for row in &rows {
            let read_at = row.time("read_at")?.unwrap_or(view.now);
            let receipt = rows::receipt(row, read_at)?;
            let is_new = row.flag("is_new")?;
            receipts.push(Receipt { is_new, ..receipt });
        }
        Ok(receipts)
    }

    async fn expire_undelivered(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<u64> {
        // Skips what another daemon is expiring, or a connection acknowledging.
        let count: i64 = sqlx::query_scalar(
            "with ended as (
                 delete from event_outbox
                 where ctid = any(array(
                     select ctid from event_outbox
                     where expires_at <= $1 order by expires_at limit $2
                     for update skip locked))
                 returning tenant_id, event_id, audience),
             recorded as (
                 insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)
                 select tenant_id, event_id, audience, 'expired', $1 from ended
                 on conflict do nothing)
             select count(*) from ended",
        )
        .bind(now)
        .bind(i64::from(limit))
        .fetch_one(&self.worker)
        .await?;
        Ok(count.unsigned_abs())
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
        .fetch_all(&self.worker)
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
        .bind(cutoff)
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
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
        let mut transaction = self.foreground.begin().await?;
        // Holds that are being placed come first: the next statement sees them.
        sqlx::query("select version from retention_gate for share")
            .execute(&mut *transaction)
            .await?;
        let row = sqlx::query(concat!(
            "select w.contact_id, (",
            is_tenant_held!(),
            " or ",
            is_held!(),
            ") as held
             from contact_events w where w.tenant_id = $1 and w.id = $2
             for update of w"
        ))
        .bind(tenant.as_str())
        .bind(id.uuid())
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(row) = row else { return Ok(None) };
        if row.flag("held")? {
            return Err(StorageError::Held);
        }
        sqlx::query("delete from contact_events where tenant_id = $1 and id = $2")
            .bind(tenant.as_str())
            .bind(id.uuid())
            .execute(&mut *transaction)
            .await?;
        forget(&mut transaction, tenant, &[id.uuid()]).await?;
        audit(
            &mut transaction,
            tenant,
            now,
            by,
            "event_deleted",
            id.uuid(),
            (None, None),
        )
        .await?;
        transaction.commit().await?;
        Ok(row
            .uuid("contact_id")?
            .and_then(|contact| ContactId::new(contact).ok()))
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
        .bind(now - IDEMPOTENCY_WINDOW)
        .fetch_optional(&self.foreground)
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
        let row = sqlx::query(
            "with run as (
                 select id from job_runs
                 where id = $4 and fence = $5 and state = 'running'
                 for share),
             gone as (
                 delete from idempotency_keys
                 where tenant_id = $1 and ctid = any(array(
                     select ctid from idempotency_keys
                     where tenant_id = $1 and created_at < $2 and ($4::uuid is null or exists (select from run))
                     order by created_at
                     limit $3
                     for update skip locked))
                 returning 1)
             select (select count(*) from gone) as gone, ($4::uuid is null or exists (select from run)) as is_ours",
        )
        .bind(tenant.as_str())
        .bind(cutoff)
        .bind(i64::from(limit))
        .bind(fence.map(|fence| fence.run.uuid()))
        .bind(fence.map(|fence| i64::from(fence.number)))
        .fetch_one(&self.worker)
        .await?;
        if !row.flag("is_ours")? {
            return Err(StorageError::Fenced);
        }
        Ok(row.int("gone")?.unwrap_or_default().unsigned_abs())
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
        .fetch_all(&self.worker)
        .await?;
        Ok(rows::tenants(&rows))
    }
}

impl PgStorage {
    /// Deletes receipts that were added while the statement that deleted their events waited for
    /// locks, so that it did not see them. An event may have been recorded anew since: then what
    /// stands beside it is its own.
    pub(super) async fn forget_late(&self, tenant: &TenantId, gone: &[Uuid]) -> StorageResult<()> {
        if gone.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "with outbox as (
                 delete from event_outbox o
                 where tenant_id = $1 and event_id = any($2) and not exists (
                     select from contact_events e where e.tenant_id = $1 and e.id = o.event_id)),
             deliveries as (
                 delete from event_deliveries d
                 where tenant_id = $1 and event_id = any($2) and not exists (
                     select from contact_events e where e.tenant_id = $1 and e.id = d.event_id))
             delete from event_reads r
             where tenant_id = $1 and event_id = any($2) and not exists (
                 select from contact_events e where e.tenant_id = $1 and e.id = r.event_id)",
        )
        .bind(tenant.as_str())
        .bind(gone)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    /// The same where the range of their ids holds few rows of others: it is read, in place of a look
    /// for each of them, which would take as long again as their deletion.
    pub(super) async fn forget_late_in_range(
        &self,
        tenant: &TenantId,
        gone: &[Uuid],
    ) -> StorageResult<()> {
        let (Some(first), Some(last)) = (gone.iter().min(), gone.iter().max()) else {
            return Ok(());
        };
        sqlx::query(
            "with gone as materialized (select unnest($2::uuid[]) as id),
             outbox as (
                 delete from event_outbox o
                 where tenant_id = $1 and event_id between $3 and $4
                   and (event_id in (select id from gone)) is true and not exists (
                     select from contact_events e where e.tenant_id = $1 and e.id = o.event_id)),
             deliveries as (
                 delete from event_deliveries d
                 where tenant_id = $1 and event_id between $3 and $4
                   and (event_id in (select id from gone)) is true and not exists (
                     select from contact_events e where e.tenant_id = $1 and e.id = d.event_id))
             delete from event_reads r
             where tenant_id = $1 and event_id between $3 and $4
               and (event_id in (select id from gone)) is true and not exists (
                 select from contact_events e where e.tenant_id = $1 and e.id = r.event_id)",
        )
        .bind(tenant.as_str())
        .bind(gone)
        .bind(first)
        .bind(last)
        .execute(&self.worker)
        .await?;
        Ok(())
    }
}

/// The left join's one row where nothing is new.
fn is_only_the_snapshot(row: &PgRow) -> bool {
    matches!(row.try_get::<Option<i64>, _>("seq"), Ok(None))
}

fn tail_entry(
    row: &PgRow,
    keep: &(dyn for<'a> Fn(&'a str, ContactId) -> bool + Send + Sync),
) -> StorageResult<Option<TailEntry>> {
    let tenant: &str = row.try_get("tenant_id")?;
    let (Ok(contact_id), Ok(event_id)) = (
        ContactId::new(row.try_get("contact_id")?),
        EventId::new(row.try_get("event_id")?),
    ) else {
        return Ok(None);
    };
    if !keep(tenant, contact_id) {
        return Ok(None);
    }
    let (seq, rank) = (row.try_get("seq")?, row.try_get("rank")?);
    Ok(TenantId::new(tenant).ok().map(|tenant_id| TailEntry {
        seq,
        rank,
        tenant_id,
        contact_id,
        event_id,
    }))
}

async fn save(
    db: &mut PgConnection,
    tenant: &TenantId,
    batch: &[Recording],
) -> StorageResult<Vec<Saved>> {
    let (fresh, known) = claim_keys(db, tenant, batch).await?;
    let mut saved = judge(batch, &fresh, &known);
    insert(&mut *db, tenant, batch, &mut saved).await?;
    let unused: Vec<&str> = unused_keys(batch, &mut saved)
        .into_iter()
        .map(|(_, key)| key)
        .collect();
    if !unused.is_empty() {
        sqlx::query("delete from idempotency_keys where tenant_id = $1 and key = any($2)")
            .bind(tenant.as_str())
            .bind(unused)
            .execute(db)
            .await?;
    }
    Ok(saved)
}

async fn find_by_ids(
    db: impl PgExecutor<'_>,
    tenant: &TenantId,
    ids: &[EventId],
) -> StorageResult<Vec<ContactEvent>> {
    let rows = sqlx::query(concat!(
        "select ",
        event_columns!(),
        " from timeline_events e
         where e.tenant_id = $1 and e.id = any($2)"
    ))
    .bind(tenant.as_str())
    .bind(set(ids, EventId::uuid))
    .fetch_all(db)
    .await?;
    Ok(rows::events(&rows))
}

/// Saves events that were recorded elsewhere, with their receipts.
async fn import(
    db: &mut PgConnection,
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
    let mut saved = vec![Saved::Created; batch.len()];
    insert(&mut *db, tenant, &batch, &mut saved).await?;
    let Receipts { delivered, read } = Receipts::of(&batch, &saved);
    if !delivered.is_empty() {
        let ids: Vec<Uuid> = delivered.iter().map(|(id, ..)| id.uuid()).collect();
        let audiences: Vec<&str> = (delivered.iter())
            .map(|(_, audience, _)| audience.as_str())
            .collect();
        let times: Vec<DateTime<Utc>> = delivered.iter().map(|(.., at)| *at).collect();
        sqlx::query(
            "insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at, recorded_by)
             select $1, event_id, audience, 'delivered', recorded_at, $5
             from unnest($2::uuid[], $3::text[], $4::timestamptz[]) as d (event_id, audience, recorded_at)
             on conflict do nothing",
        )
        .bind(tenant.as_str())
        .bind(&ids)
        .bind(audiences)
        .bind(times)
        .bind(by.as_str())
        .execute(&mut *db)
        .await?;
        sqlx::query("delete from event_outbox where tenant_id = $1 and event_id = any($2)")
            .bind(tenant.as_str())
            .bind(&ids)
            .execute(&mut *db)
            .await?;
    }
    if !read.is_empty() {
        let ids: Vec<Uuid> = read.iter().map(|(id, _)| id.uuid()).collect();
        let times: Vec<DateTime<Utc>> = read.iter().map(|(_, at)| *at).collect();
        sqlx::query(
            "insert into event_reads (tenant_id, event_id, reader, read_at)
             select $1, event_id, $4, read_at
             from unnest($2::uuid[], $3::timestamptz[]) as r (event_id, read_at)
             on conflict do nothing",
        )
        .bind(tenant.as_str())
        .bind(ids)
        .bind(times)
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

type Known = HashMap<KnownKey, (Vec<u8>, EventId)>;

/// Claims the batch's keys; answers those that are fresh, and what is known of the others.
async fn claim_keys(
    db: &mut PgConnection,
    tenant: &TenantId,
    batch: &[Recording],
) -> StorageResult<(HashSet<KnownKey>, Known)> {
    let claims = claims(batch);
    let keys: Vec<&str> = claims.keys().map(|(_, key)| *key).collect();
    let hashes: Vec<&[u8]> = claims.values().map(|(hash, ..)| *hash).collect();
    let ids: Vec<Uuid> = claims.values().map(|(_, id, _)| id.uuid()).collect();
    let times: Vec<DateTime<Utc>> = claims.values().map(|(.., at)| *at).collect();
    // A key older than the window is as good as new. A younger one is locked all the same, so it is
    // still there when it is read below; one that another transaction claims is waited for.
    let fresh: Vec<String> = sqlx::query_scalar(
        "insert into idempotency_keys (tenant_id, key, body_hash, event_id, created_at)
         select $1, key, body_hash, event_id, created_at
         from unnest($2::text[], $3::bytea[], $4::uuid[], $5::timestamptz[])
              as claim (key, body_hash, event_id, created_at)
         on conflict (tenant_id, key) do update
         set body_hash = excluded.body_hash, event_id = excluded.event_id, created_at = excluded.created_at
         where idempotency_keys.created_at <= excluded.created_at - $6::interval
         returning key",
    )
    .bind(tenant.as_str())
    .bind(keys)
    .bind(hashes)
    .bind(ids)
    .bind(times)
    .bind(IDEMPOTENCY_WINDOW)
    .fetch_all(&mut *db)
    .await?;
    let fresh: HashSet<KnownKey> = fresh
        .into_iter()
        .map(|key| (tenant.to_string(), key))
        .collect();
    let others: Vec<&str> = claims
        .keys()
        .map(|(_, key)| *key)
        .filter(|key| !fresh.contains(&(tenant.to_string(), (*key).to_owned())))
        .collect();
    if others.is_empty() {
        return Ok((fresh, Known::new()));
    }
    let rows = sqlx::query(
        "select tenant_id, key, body_hash, event_id from idempotency_keys
         where tenant_id = $1 and key = any($2)",
    )
    .bind(tenant.as_str())
    .bind(others)
    .fetch_all(db)
    .await?;
    let known = rows
        .iter()
        .map(|row| rows::idempotency(row, row.try_get("body_hash")?));
    Ok((fresh, known.collect::<StorageResult<_>>()?))
}

/// Inserts the events of a batch that are to be created, and marks those whose id was taken.
async fn insert(
    db: impl PgExecutor<'_>,
    tenant: &TenantId,
    batch: &[Recording],
    saved: &mut [Saved],
) -> StorageResult<()> {
    let wanted: Vec<usize> = (0..batch.len())
        .filter(|&index| saved[index] == Saved::Created)
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let events: Vec<&ContactEvent> = wanted.iter().map(|&index| &batch[index].event).collect();
    let inserted: Vec<Uuid> = insert_events(tenant, &events).fetch_all(db).await?;
    let mut inserted: HashSet<Uuid> = inserted.into_iter().collect();
    for index in wanted {
        if !inserted.remove(&batch[index].event.id.uuid()) {
            saved[index] = Saved::IdTaken;
        }
    }
    Ok(())
}

/// One array a column; answers the ids of those that were new.
fn insert_events<'q>(
    tenant: &'q TenantId,
    events: &[&'q ContactEvent],
) -> sqlx::query::QueryScalar<'q, Postgres, Uuid, PgArguments> {
    fn column<'q, T>(events: &[&'q ContactEvent], of: impl Fn(&'q ContactEvent) -> T) -> Vec<T> {
        events.iter().copied().map(of).collect()
    }
    sqlx::query_scalar(
        "insert into contact_events (tenant_id, id, contact_id, session_id, event_type, category, priority,
                                     source, title, description, payload, metadata, triggered_by,
                                     integration_source, is_realtime, visible_to_client, visible_to_agent,
                                     expires_at, occurred_at, created_at)
         select $1, id, contact_id, session_id, event_type, category, priority,
                source, title, description, payload::json, metadata::json, triggered_by,
                integration_source, is_realtime, visible_to_client, visible_to_agent,
                expires_at, occurred_at, created_at
         from unnest($2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[],
                     $8::text[], $9::text[], $10::text[], $11::text[], $12::text[], $13::uuid[],
                     $14::text[], $15::boolean[], $16::boolean[], $17::boolean[],
                     $18::timestamptz[], $19::timestamptz[], $20::timestamptz[])
              as e (id, contact_id, session_id, event_type, category, priority,
                    source, title, description, payload, metadata, triggered_by,
                    integration_source, is_realtime, visible_to_client, visible_to_agent,
                    expires_at, occurred_at, created_at)
         on conflict (tenant_id, id) do nothing
         returning id",
    )
    .bind(tenant.as_str())
    .bind(column(events, |e| e.id.uuid()))
    .bind(column(events, |e| e.contact_id.uuid()))
    .bind(column(events, |e| e.session_id.map(SessionId::uuid)))
    .bind(column(events, |e| e.event_type.as_str()))
    .bind(column(events, |e| e.category.as_str()))
    .bind(column(events, |e| e.priority.as_str()))
    .bind(column(events, |e| e.source.as_str()))
    .bind(column(events, |e| e.title.as_deref()))
    .bind(column(events, |e| e.description.as_deref()))
    .bind(column(events, |e| e.payload.as_str()))
    .bind(column(events, |e| e.metadata.as_str()))
    .bind(column(events, |e| e.triggered_by.map(AgentId::uuid)))
    .bind(column(events, |e| e.integration_source.as_deref()))
    .bind(column(events, |e| e.is_realtime))
    .bind(column(events, |e| e.visibility.client))
    .bind(column(events, |e| e.visibility.agent))
    .bind(column(events, |e| e.expires_at))
    .bind(column(events, |e| e.occurred_at))
    .bind(column(events, |e| e.created_at))
}

async fn update(
    db: &mut PgConnection,
    tenant: &TenantId,
    id: EventId,
    change: Change,
    by: &Subject,
    now: DateTime<Utc>,
) -> StorageResult<Option<ContactEvent>> {
    const FIND: &str = concat!(
        "select ",
        event_columns!(),
        " from timeline_events e where e.tenant_id = $1 and e.id = $2"
    );
    // Two changes of one event take turns. The lock is a statement of its own, so that the next one
    // sees what was waited for.
    sqlx::query("select 1 from contact_events where tenant_id = $1 and id = $2 for update")
        .bind(tenant.as_str())
        .bind(id.uuid())
        .execute(&mut *db)
        .await?;
    let found = sqlx::query(FIND)
        .bind(tenant.as_str())
        .bind(id.uuid())
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
    .bind(id.uuid())
    .bind(visibility.client)
    .bind(visibility.agent)
    .bind(expires_at)
    .execute(&mut *db)
    .await?;
    if before.is_realtime {
        let was_pending: Option<String> = sqlx::query_scalar(
            "delete from event_outbox where tenant_id = $1 and event_id = $2 returning audience",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .fetch_optional(&mut *db)
        .await?;
        // An expiry that lies ahead revives a delivery that had expired.
        let revives = expires_at.is_none_or(|at| at > now);
        if revives {
            sqlx::query(
                "delete from event_deliveries where tenant_id = $1 and event_id = $2 and outcome = 'expired'",
            )
            .bind(tenant.as_str())
            .bind(id.uuid())
            .execute(&mut *db)
            .await?;
        }
        let had: Vec<String> = sqlx::query_scalar(
            "select audience from event_deliveries where tenant_id = $1 and event_id = $2",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
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
            .bind(id.uuid())
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
        .bind(id.uuid())
        .fetch_one(&mut *db)
        .await?;
    rows::event(&row).map(Some)
}

/// Deletes what stands beside events. One statement after the other: each sees the receipts that
/// the one before had to wait for.
pub(super) async fn forget(
    db: &mut PgConnection,
    tenant: &TenantId,
    ids: &[Uuid],
) -> StorageResult<()> {
    for statement in [
        "delete from event_outbox where tenant_id = $1 and event_id = any($2)",
        "delete from event_deliveries where tenant_id = $1 and event_id = any($2)",
        "delete from event_reads where tenant_id = $1 and event_id = any($2)",
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
    db: &mut PgConnection,
    tenant: &TenantId,
    now: DateTime<Utc>,
    by: &Subject,
    action: &'static str,
    id: Uuid,
    (before, after): (Option<String>, Option<String>),
) -> StorageResult<()> {
    sqlx::query(
        "insert into audit_log (tenant_id, at, actor, action, subject_id, before, after)
         values ($1, $2, $3, $4, $5, $6::text::json, $7::text::json)",
    )
    .bind(tenant.as_str())
    .bind(now)
    .bind(by.as_str())
    .bind(action)
    .bind(id)
    .bind(before)
    .bind(after)
    .execute(db)
    .await?;
    Ok(())
}
