//! Retention on PostgreSQL.
//!
//! A batch is one statement: a daemon that is frozen between the statements of a transaction would
//! keep its locks. It has timeouts of its own, and whoever asked for it asks for less when it runs into
//! one. It reads a window of the index and only then drops what a hold or another rule
//! keeps, so that it costs the same however much that is.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::postgres::{PgArguments, PgRow};
use uuid::Uuid;

use super::{PgStorage, events};
use crate::domain::{
    Category, Cause, ContactId, EventType, HoldId, RunId, Scope, Subject, Sweep, TenantId,
};
use crate::storage::retention::{
    Batch, Deletion, DeletionEntry, DueCount, Hold, HoldScope, RetentionStore, SweepKey,
};
use crate::storage::rows::{self, Columns};
use crate::storage::{StorageError, StorageResult};

type PgQuery<'q> = sqlx::query::Query<'q, sqlx::Postgres, PgArguments>;

/// An event `w` follows the sweep's rule: $3 category, $4 type, $5 and $6 those of stronger rules.
macro_rules! follows_the_rule {
    () => {
        "($3::text is null or w.category = $3)
         and ($4::text is null or w.event_type = $4)
         and not exists (
             select from unnest($5::text[], $6::text[]) x (category, event_type)
             where (x.category is null or x.category = w.category)
               and (x.event_type is null or x.event_type = w.event_type))"
    };
}

/// A hold keeps an event `w` of the tenant $1. The categories are read once; a contact is looked up,
/// and not by `exists`, for which the planner would hash the holds of all.
macro_rules! is_held {
    () => {
        "(w.category = any(array(
              select h.category from holds h
              where h.tenant_id = $1 and h.released_at is null and h.category is not null))
          or (select true from holds h
              where h.tenant_id = $1 and h.released_at is null and h.contact_id = w.contact_id
              limit 1) is true)"
    };
}
pub(super) use is_held;

/// A hold keeps the whole tenant $1. Counted, since for the first one alone the planner would read
/// the holds from end to end: it takes a tenant with many holds for one that has this.
macro_rules! is_tenant_held {
    () => {
        "(select count(*) > 0 from holds h
          where h.tenant_id = $1 and h.released_at is null
            and h.contact_id is null and h.category is null)"
    };
}
pub(super) use is_tenant_held;

macro_rules! begin_sweep {
    () => {
        "with run as (
             select id from job_runs
             where id = $9 and fence = $10 and state = 'running'
             for share),
         gate as (
             select version from retention_gate
             where version = $11
             for share),
         "
    };
}

macro_rules! window {
    () => {
        "seen as materialized (
             select w.ctid as place, w.expires_at, w.created_at, w.seq, w.contact_id, w.category, w.event_type
             from contact_events w
             where ($9::uuid is null or exists (select from run)) and exists (select from gate)
               and not "
    };
}

macro_rules! mark {
    () => {
        " limit $12),
         marked as materialized (select w.place, "
    };
}

/// Skips what another daemon is deleting, or a request changing: a row whose expiry is being moved
/// must not be deleted by the one that it had.
macro_rules! lock {
    () => {
        "),
         gone as (
             delete from contact_events
             where tenant_id = $1 and ctid = any(array(
                 select e.ctid from contact_events e
                 where e.ctid = any(array(select place from marked where not held)) and e.tenant_id = $1 and "
    };
}

macro_rules! end_lock {
    () => {
        "
                 for update skip locked))
             returning id),
         "
    };
}

/// What stands beside the events goes with them. Looked up for each of them it would take three times
/// as long as the events themselves, most of which have nothing there. So where the range of their ids
/// holds few rows of others, as it does for events that were recorded one after the other, the range is
/// read.
macro_rules! end_sweep {
    () => {
        "bounds as materialized (
             select (select id from gone order by id limit 1) as first,
                    (select id from gone order by id desc limit 1) as last,
                    4 * (select count(*) from gone) as most),
         dense as materialized (
             select (select count(*) from (
                        select from event_outbox d
                        where d.tenant_id = $1 and d.event_id between b.first and b.last
                        limit b.most) n) < b.most as outbox,
                    (select count(*) from (
                        select from event_deliveries d
                        where d.tenant_id = $1 and d.event_id between b.first and b.last
                        limit b.most) n) < b.most as deliveries,
                    (select count(*) from (
                        select from event_reads d
                        where d.tenant_id = $1 and d.event_id between b.first and b.last
                        limit b.most) n) < b.most as reads
             from bounds b),
         outbox as (
             delete from event_outbox
             where tenant_id = $1
               and event_id = any(array(select id from gone where not (select outbox from dense)))),
         dense_outbox as (
             delete from event_outbox
             where tenant_id = $1 and (select outbox from dense)
               and event_id between (select first from bounds) and (select last from bounds)
               -- hashed, where a plain one would be a look for each
               and (event_id in (select id from gone)) is true),
         deliveries as (
             delete from event_deliveries
             where tenant_id = $1
               and event_id = any(array(select id from gone where not (select deliveries from dense)))),
         dense_deliveries as (
             delete from event_deliveries
             where tenant_id = $1 and (select deliveries from dense)
               and event_id between (select first from bounds) and (select last from bounds)
               and (event_id in (select id from gone)) is true),
         reads as (
             delete from event_reads
             where tenant_id = $1
               and event_id = any(array(select id from gone where not (select reads from dense)))),
         dense_reads as (
             delete from event_reads
             where tenant_id = $1 and (select reads from dense)
               and event_id between (select first from bounds) and (select last from bounds)
               and (event_id in (select id from gone)) is true),
         ledger as (
             insert into deletion_ledger (tenant_id, run_id, rule, cause, deleted, first_at, last_at)
             select $1, $13, $14, $15, n.gone, $16, $16 from (select count(*) as gone from gone) n
             where n.gone > 0 and $13::uuid is not null
             on conflict (tenant_id, run_id, rule, cause) do update
             set deleted = deletion_ledger.deleted + excluded.deleted, last_at = excluded.last_at)
         select array(select id from gone) as gone,
                (select outbox and deliveries and reads from dense) as is_dense,
                ($9::uuid is null or exists (select from run)) as is_ours,
                exists (select from gate) as is_current"
    };
}

/// What most batches are: of a tenant without rules and holds. Half as long as the others take, since
/// nothing is passed over; so it needs no place behind which to go on. It takes the parameters of the
/// others.
const SWEEP_PLAIN: &str = concat!(
    begin_sweep!(),
    "gone as (
             delete from contact_events
             where tenant_id = $1 and ctid = any(array(
                 select ctid from contact_events
                 where tenant_id = $1 and expires_at < $2
                   and ($9::uuid is null or exists (select from run)) and exists (select from gate)
                   and $3::text is null and $4::text is null and $5::text[] = '{}' and $6::text[] = '{}'
                   and $7::timestamptz is not null and $8::bigint is not null
                 order by expires_at
                 limit $12",
    end_lock!(),
    end_sweep!()
);

const SWEEP_EXPIRED: &str = concat!(
    begin_sweep!(),
    window!(),
    is_tenant_held!(),
    " and w.tenant_id = $1 and w.expires_at < $2 and (w.expires_at, w.seq) > ($7, $8)
             order by w.expires_at, w.seq",
    mark!(),
    is_held!(),
    " as held from seen w where ",
    follows_the_rule!(),
    lock!(),
    "e.expires_at < $2",
    end_lock!(),
    end_sweep!(),
    ", (select count(*) from seen) as seen, (select count(*) from marked where held) as held,
                l.expires_at as last_at, l.seq as last_seq
         from (select 1) one
         left join (select expires_at, seq from seen order by expires_at desc, seq desc limit 1) l on true"
);

const SWEEP_AGED: &str = concat!(
    begin_sweep!(),
    window!(),
    is_tenant_held!(),
    " and w.tenant_id = $1 and w.expires_at is null and w.created_at < $2
               and (w.created_at, w.seq) > ($7, $8)
             order by w.created_at, w.seq",
    mark!(),
    is_held!(),
    " as held from seen w where ",
    follows_the_rule!(),
    lock!(),
    "e.expires_at is null and e.created_at < $2",
    end_lock!(),
    end_sweep!(),
    ", (select count(*) from seen) as seen, (select count(*) from marked where held) as held,
                l.created_at as last_at, l.seq as last_seq
         from (select 1) one
         left join (select created_at, seq from seen order by created_at desc, seq desc limit 1) l on true"
);

const COUNT_EXPIRED: &str = concat!(
    "select count(*) filter (where not s.held) as due, count(*) filter (where s.held) as held
     from (select (",
    is_tenant_held!(),
    " or ",
    is_held!(),
    ") as held
           from contact_events w
           where w.tenant_id = $1 and w.expires_at < $2 and ",
    follows_the_rule!(),
    " limit $7) s"
);

const COUNT_AGED: &str = concat!(
    "select count(*) filter (where not s.held) as due, count(*) filter (where s.held) as held
     from (select (",
    is_tenant_held!(),
    " or ",
    is_held!(),
    ") as held
           from contact_events w
           where w.tenant_id = $1 and w.expires_at is null and w.created_at < $2 and ",
    follows_the_rule!(),
    " limit $7) s"
);

/// The first six parameters: what a sweep selects.
fn select<'q>(statement: &'static str, sweep: &'q Sweep) -> PgQuery<'q> {
    let categories: Vec<Option<&str>> = (sweep.except.iter())
        .map(|scope| scope.category.map(Category::as_str))
        .collect();
    let types: Vec<Option<&str>> = (sweep.except.iter())
        .map(|scope| scope.event_type.as_ref().map(EventType::as_str))
        .collect();
    sqlx::query(statement)
        .bind(sweep.tenant.as_str())
        .bind(sweep.before)
        .bind(sweep.scope.category.map(Category::as_str))
        .bind(sweep.scope.event_type.as_ref().map(EventType::as_str))
        .bind(categories)
        .bind(types)
}

#[async_trait]
impl RetentionStore for PgStorage {
    async fn sweep(
        &self,
        sweep: &Sweep,
        after: Option<SweepKey>,
        limit: u32,
        deletion: Deletion,
    ) -> StorageResult<Batch> {
        let is_plain = sweep.cause == Cause::Expired
            && sweep.scope == Scope::default()
            && sweep.except.is_empty()
            && after.is_none();
        let after = after.unwrap_or(SweepKey {
            at: DateTime::UNIX_EPOCH - chrono::TimeDelta::days(719_528),
            seq: 0,
        });
        let asked = self.asked.load(Ordering::Relaxed);
        let was_alone = |store: &Self| store.asked.load(Ordering::Relaxed) == asked;
        loop {
            // Before the batch, and not by it: its own snapshot may be older than a hold for which its
            // lock of the gate waits.
            let (version, has_holds): (i64, bool) = sqlx::query_as(
                "select version, exists (select from holds where tenant_id = $1 and released_at is null)
                 from retention_gate",
            )
            .bind(sweep.tenant.as_str())
            .fetch_one(&self.worker)
            .await?;
            let statement = match sweep.cause {
                Cause::Expired if is_plain && !has_holds => SWEEP_PLAIN,
                Cause::Expired => SWEEP_EXPIRED,
                Cause::Aged => SWEEP_AGED,
            };
            let began = Instant::now();
            let row = select(statement, sweep)
                .bind(after.at)
                .bind(after.seq)
                .bind(deletion.fence.map(|fence| fence.run.uuid()))
                .bind(deletion.fence.map(|fence| i64::from(fence.number)))
                .bind(version)
                .bind(i64::from(limit))
                .bind(deletion.run.map(RunId::uuid))
                .bind(&sweep.rule)
                .bind(sweep.cause.as_str())
                .bind(deletion.now)
                .fetch_one(&self.purge)
                .await?;
            if !row.flag("is_ours")? {
                return Err(StorageError::Fenced);
            }
            if !row.flag("is_current")? {
                continue;
            }
            let gone: Vec<Uuid> = row.try_get("gone")?;
            if row.flag("is_dense")? {
                self.forget_late_in_range(&sweep.tenant, &gone).await?;
            } else {
                self.forget_late(&sweep.tenant, &gone).await?;
            }
            let deleted = gone.len() as u64;
            if statement == SWEEP_PLAIN {
                return Ok(Batch {
                    seen: deleted,
                    deleted,
                    held: 0,
                    last: None,
                    took: began.elapsed(),
                    was_alone: was_alone(self),
                });
            }
            return Ok(Batch {
                took: began.elapsed(),
                was_alone: was_alone(self),
                ..batch(&row, deleted)?
            });
        }
    }

    async fn count_due(&self, sweep: &Sweep, limit: u64) -> StorageResult<DueCount> {
        let statement = match sweep.cause {
            Cause::Expired => COUNT_EXPIRED,
            Cause::Aged => COUNT_AGED,
        };
        let row = select(statement, sweep)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_one(&self.worker)
            .await?;
        due_count(&row)
    }

    async fn ageing_tenants(&self) -> StorageResult<Vec<TenantId>> {
        // A step per tenant through the index, not a scan of it.
        let rows = sqlx::query(
            "with recursive tenants (tenant_id) as (
                 select min(tenant_id) from contact_events where expires_at is null
                 union all
                 select (select min(e.tenant_id) from contact_events e
                         where e.expires_at is null and e.tenant_id > t.tenant_id)
                 from tenants t where t.tenant_id is not null)
             select tenant_id from tenants where tenant_id is not null",
        )
        .fetch_all(&self.worker)
        .await?;
        Ok(rows::tenants(&rows))
    }

    async fn held_tenants(&self) -> StorageResult<Vec<TenantId>> {
        let rows = sqlx::query(
            "select distinct tenant_id from holds
             where released_at is null and contact_id is null and category is null",
        )
        .fetch_all(&self.worker)
        .await?;
        Ok(rows::tenants(&rows))
    }

    async fn place_hold(
        &self,
        tenant: &TenantId,
        scope: HoldScope,
        reason: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Hold> {
        let id = HoldId::generate(now);
        let mut transaction = self.foreground.begin().await?;
        // Waits for deletions in hand; those that come after it see the hold.
        sqlx::query("update retention_gate set version = version + 1")
            .execute(&mut *transaction)
            .await?;
        let row = sqlx::query(
            "insert into holds (tenant_id, id, contact_id, category, reason, placed_by, placed_at)
             values ($1, $2, $3, $4, $5, $6, $7)
             returning tenant_id, id, contact_id, category, reason, placed_by, placed_at",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(scope.contact().map(ContactId::uuid))
        .bind(scope.category().map(Category::as_str))
        .bind(reason)
        .bind(by.as_str())
        .bind(now)
        .fetch_one(&mut *transaction)
        .await?;
        let hold = rows::hold(&row)?;
        events::audit(
            &mut transaction,
            tenant,
            now,
            by,
            "hold_placed",
            id.uuid(),
            (None, Some(crate::storage::retention::audit_hold(&hold))),
        )
        .await?;
        transaction.commit().await?;
        Ok(hold)
    }

    async fn holds(&self, tenant: Option<&TenantId>) -> StorageResult<Vec<Hold>> {
        let rows = sqlx::query(
            "select tenant_id, id, contact_id, category, reason, placed_by, placed_at from holds
             where ($1::text is null or tenant_id = $1) and released_at is null
             order by placed_at, id",
        )
        .bind(tenant.map(TenantId::as_str))
        .fetch_all(&self.foreground)
        .await?;
        rows.iter().map(rows::hold).collect()
    }

    async fn release_hold(
        &self,
        tenant: &TenantId,
        id: HoldId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        let mut transaction = self.foreground.begin().await?;
        let released = sqlx::query(
            "update holds set released_at = $3, released_by = $4
             where tenant_id = $1 and id = $2 and released_at is null
             returning tenant_id, id, contact_id, category, reason, placed_by, placed_at",
        )
        .bind(tenant.as_str())
        .bind(id.uuid())
        .bind(now)
        .bind(by.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(row) = released else {
            return Ok(false);
        };
        let before = crate::storage::retention::audit_hold(&rows::hold(&row)?);
        events::audit(
            &mut transaction,
            tenant,
            now,
            by,
            "hold_released",
            id.uuid(),
            (Some(before), None),
        )
        .await?;
        transaction.commit().await?;
        Ok(true)
    }

    async fn deletions(&self, run: RunId) -> StorageResult<Vec<DeletionEntry>> {
        let rows = sqlx::query(
            "select tenant_id, rule, cause, deleted from deletion_ledger
             where run_id = $1 order by tenant_id, rule, cause",
        )
        .bind(run.uuid())
        .fetch_all(&self.worker)
        .await?;
        rows.iter().map(rows::deletion).collect()
    }

    async fn usual_deletions(&self, job: &str, limit: u32) -> StorageResult<Vec<u64>> {
        let rows = sqlx::query(
            "select counts::text as counts from job_runs
             where job = $1 and state = 'succeeded' and (counts ->> 'would_delete') is null
             order by id desc nulls last
             limit $2",
        )
        .bind(job)
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
        .await?;
        rows.iter().map(rows::deleted).collect()
    }

    async fn is_confirmed(&self, job: &str) -> StorageResult<bool> {
        let confirmed: Option<bool> =
            sqlx::query_scalar("select confirmed_at is not null from purge_guard where job = $1")
                .bind(job)
                .fetch_optional(&self.worker)
                .await?;
        Ok(confirmed == Some(true))
    }

    async fn hold_back(
        &self,
        job: &str,
        would_delete: u64,
        usual: u64,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        sqlx::query(
            "insert into purge_guard (job, found_at, would_delete, usual) values ($1, $2, $3, $4)
             on conflict (job) do update
             set would_delete = excluded.would_delete, usual = excluded.usual",
        )
        .bind(job)
        .bind(now)
        .bind(i64::try_from(would_delete).unwrap_or(i64::MAX))
        .bind(i64::try_from(usual).unwrap_or(i64::MAX))
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn confirm(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<()> {
        let mut transaction = self.worker.begin().await?;
        sqlx::query(
            "insert into purge_guard (job, found_at, would_delete, usual, confirmed_at, confirmed_by)
             values ($1, $2, 0, 0, $2, $3)
             on conflict (job) do update
             set confirmed_at = excluded.confirmed_at, confirmed_by = excluded.confirmed_by",
        )
        .bind(job)
        .bind(now)
        .bind(by.as_str())
        .execute(&mut *transaction)
        .await?;
        sqlx::query(
            "insert into job_actions (at, actor, action, job) values ($1, $2, 'purge_confirmed', $3)",
        )
        .bind(now)
        .bind(by.as_str())
        .bind(job)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn give_back_space(&self) -> StorageResult<bool> {
        // Autovacuum makes it free for what comes next.
        Ok(false)
    }

    async fn end_guard(&self, job: &str) -> StorageResult<()> {
        sqlx::query("delete from purge_guard where job = $1")
            .bind(job)
            .execute(&self.worker)
            .await?;
        Ok(())
    }
}

fn batch(row: &PgRow, deleted: u64) -> StorageResult<Batch> {
    let at = row.time("last_at")?;
    let seq = row.int("last_seq")?;
    Ok(Batch {
        seen: row.int("seen")?.unwrap_or_default().unsigned_abs(),
        deleted,
        held: row.int("held")?.unwrap_or_default().unsigned_abs(),
        last: at.zip(seq).map(|(at, seq)| SweepKey { at, seq }),
        took: Duration::ZERO,
        was_alone: false,
    })
}

fn due_count(row: &PgRow) -> StorageResult<DueCount> {
    Ok(DueCount {
        due: row.int("due")?.unwrap_or_default().unsigned_abs(),
        held: row.int("held")?.unwrap_or_default().unsigned_abs(),
    })
}
