//! Retention on SQLite.
//!
//! A batch reads a window of the index and only then drops what a hold or another rule keeps, so
//! that it costs the same however much that is. One writer sees every hold that was answered.

use std::time::Instant;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::sqlite::{SqliteArguments, SqliteConnection, SqliteRow};

use super::{SqliteStorage, at, events, set, text};
use crate::domain::{
    Category, Cause, ContactId, EventType, HoldId, RunId, Subject, Sweep, TenantId,
};
use crate::storage::StorageResult;
use crate::storage::retention::{
    Batch, Deletion, DeletionEntry, DueCount, Hold, HoldScope, RetentionStore, SweepKey, audit_hold,
};
use crate::storage::rows::{self, Columns};

/// Free pages that stay in the file: what is written next takes them without making it grow.
const SPARE_PAGES: i64 = 256;

type SqliteQuery<'q> = sqlx::query::Query<'q, sqlx::Sqlite, SqliteArguments>;

/// An event `w` follows the sweep's rule: $3 category, $4 type, $5 those of stronger rules, a JSON
/// array of pairs.
macro_rules! follows_the_rule {
    () => {
        "($3 is null or w.category = $3)
         and ($4 is null or w.event_type = $4)
         and not exists (
             select 1 from json_each($5) j
             where (j.value ->> 0 is null or j.value ->> 0 = w.category)
               and (j.value ->> 1 is null or j.value ->> 1 = w.event_type))"
    };
}

/// A hold keeps an event `w` of the tenant $1.
macro_rules! is_held {
    () => {
        "(w.category in (
              select h.category from holds h
              where h.tenant_id = $1 and h.released_at is null and h.category is not null)
          or exists (select 1 from holds h
                     where h.tenant_id = $1 and h.released_at is null and h.contact_id = w.contact_id))"
    };
}
pub(super) use is_held;

/// A hold keeps the whole tenant $1.
macro_rules! is_tenant_held {
    () => {
        "exists (select 1 from holds h
                 where h.tenant_id = $1 and h.released_at is null
                   and h.contact_id is null and h.category is null)"
    };
}
pub(super) use is_tenant_held;

// The lower bound is no row value, as on PostgreSQL: SQLite would use it for the index and not the
// upper one, and read on to the tenant's end.
const WINDOW_EXPIRED: &str = concat!(
    "select w.seq, w.id, w.expires_at as at, ",
    follows_the_rule!(),
    " as follows, ",
    is_held!(),
    " as held
     from contact_events w
     where w.tenant_id = $1 and w.expires_at < $2 and w.expires_at >= $6 and (w.expires_at > $6 or w.seq > $7)
       and not ",
    is_tenant_held!(),
    "
     order by w.expires_at, w.seq
     limit $8"
);

const WINDOW_AGED: &str = concat!(
    "select w.seq, w.id, w.created_at as at, ",
    follows_the_rule!(),
    " as follows, ",
    is_held!(),
    " as held
     from contact_events w
     where w.tenant_id = $1 and w.expires_at is null
       and w.created_at < $2 and w.created_at >= $6 and (w.created_at > $6 or w.seq > $7)
       and not ",
    is_tenant_held!(),
    "
     order by w.created_at, w.seq
     limit $8"
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
    " limit $6) s"
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
    " limit $6) s"
);

/// The first five parameters: what a sweep selects.
fn select<'q>(statement: &'static str, sweep: &'q Sweep) -> SqliteQuery<'q> {
    let except: Vec<(Option<&str>, Option<&str>)> = (sweep.except.iter())
        .map(|scope| {
            let event_type = scope.event_type.as_ref().map(EventType::as_str);
            (scope.category.map(Category::as_str), event_type)
        })
        .collect();
    sqlx::query(statement)
        .bind(sweep.tenant.as_str())
        .bind(at(sweep.before))
        .bind(sweep.scope.category.map(Category::as_str))
        .bind(sweep.scope.event_type.as_ref().map(EventType::as_str))
        .bind(set(&except))
}

#[async_trait]
impl RetentionStore for SqliteStorage {
    async fn sweep(
        &self,
        sweep: &Sweep,
        after: Option<SweepKey>,
        limit: u32,
        deletion: Deletion,
    ) -> StorageResult<Batch> {
        let (sweep, asked) = (sweep.clone(), self.writer.asked());
        let batch = self
            .writer
            .write_behind(move |db| {
                Box::pin(async move { delete_batch(db, &sweep, after, limit, deletion).await })
            })
            .await?;
        Ok(Batch {
            was_alone: self.writer.asked() == asked,
            ..batch
        })
    }

    async fn count_due(&self, sweep: &Sweep, limit: u64) -> StorageResult<DueCount> {
        let statement = match sweep.cause {
            Cause::Expired => COUNT_EXPIRED,
            Cause::Aged => COUNT_AGED,
        };
        let row = select(statement, sweep)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_one(&self.readers)
            .await?;
        Ok(DueCount {
            due: row.int("due")?.unwrap_or_default().unsigned_abs(),
            held: row.int("held")?.unwrap_or_default().unsigned_abs(),
        })
    }

    async fn ageing_tenants(&self) -> StorageResult<Vec<TenantId>> {
        // A step per tenant through the index, not a scan of it. Named, since SQLite would step through
        // that of the timelines, which has expiries too.
        let rows = sqlx::query(
            "with recursive tenants (tenant_id) as (
                 select min(tenant_id) from contact_events indexed by contact_events_age where expires_at is null
                 union all
                 select (select min(e.tenant_id) from contact_events e indexed by contact_events_age
                         where e.expires_at is null and e.tenant_id > t.tenant_id)
                 from tenants t where t.tenant_id is not null)
             select tenant_id from tenants where tenant_id is not null",
        )
        .fetch_all(&self.readers)
        .await?;
        Ok(rows::tenants(&rows))
    }

    async fn held_tenants(&self) -> StorageResult<Vec<TenantId>> {
        let rows = sqlx::query(
            "select distinct tenant_id from holds
             where released_at is null and contact_id is null and category is null",
        )
        .fetch_all(&self.readers)
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
        let (tenant, by, reason) = (tenant.clone(), by.clone(), reason.to_owned());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let id = HoldId::generate(now);
                    let row = sqlx::query(
                        "insert into holds (tenant_id, id, contact_id, category, reason, placed_by, placed_at)
                         values ($1, $2, $3, $4, $5, $6, $7)
                         returning tenant_id, id, contact_id, category, reason, placed_by, placed_at",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(scope.contact().map(ContactId::uuid).map(text))
                    .bind(scope.category().map(Category::as_str))
                    .bind(reason)
                    .bind(by.as_str())
                    .bind(at(now))
                    .fetch_one(&mut *db)
                    .await?;
                    let hold = rows::hold(&row)?;
                    let change = (None, Some(audit_hold(&hold)));
                    events::audit(db, &tenant, now, &by, "hold_placed", id.uuid(), change).await?;
                    Ok(hold)
                })
            })
            .await
    }

    async fn holds(&self, tenant: Option<&TenantId>) -> StorageResult<Vec<Hold>> {
        let rows = sqlx::query(
            "select tenant_id, id, contact_id, category, reason, placed_by, placed_at from holds
             where ($1 is null or tenant_id = $1) and released_at is null
             order by placed_at, id",
        )
        .bind(tenant.map(TenantId::as_str))
        .fetch_all(&self.readers)
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
        let (tenant, by) = (tenant.clone(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let released = sqlx::query(
                        "update holds set released_at = $3, released_by = $4
                         where tenant_id = $1 and id = $2 and released_at is null
                         returning tenant_id, id, contact_id, category, reason, placed_by, placed_at",
                    )
                    .bind(tenant.as_str())
                    .bind(text(id.uuid()))
                    .bind(at(now))
                    .bind(by.as_str())
                    .fetch_optional(&mut *db)
                    .await?;
                    let Some(row) = released else { return Ok(false) };
                    let change = (Some(audit_hold(&rows::hold(&row)?)), None);
                    events::audit(db, &tenant, now, &by, "hold_released", id.uuid(), change).await?;
                    Ok(true)
                })
            })
            .await
    }

    async fn deletions(&self, run: RunId) -> StorageResult<Vec<DeletionEntry>> {
        let rows = sqlx::query(
            "select tenant_id, rule, cause, deleted from deletion_ledger
             where run_id = $1 order by tenant_id, rule, cause",
        )
        .bind(text(run.uuid()))
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(rows::deletion).collect()
    }

    async fn usual_deletions(&self, job: &str, limit: u32) -> StorageResult<Vec<u64>> {
        let rows = sqlx::query(
            "select counts from job_runs
             where job = $1 and state = 'succeeded' and (counts ->> 'would_delete') is null
             order by id desc
             limit $2",
        )
        .bind(job)
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(rows::deleted).collect()
    }

    async fn is_confirmed(&self, job: &str) -> StorageResult<bool> {
        let confirmed: Option<bool> =
            sqlx::query_scalar("select confirmed_at is not null from purge_guard where job = $1")
                .bind(job)
                .fetch_optional(&self.readers)
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
        let job = job.to_owned();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into purge_guard (job, found_at, would_delete, usual) values ($1, $2, $3, $4)
             on conflict (job) do update
             set would_delete = excluded.would_delete, usual = excluded.usual",
                    )
                    .bind(job)
                    .bind(at(now))
                    .bind(i64::try_from(would_delete).unwrap_or(i64::MAX))
                    .bind(i64::try_from(usual).unwrap_or(i64::MAX))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn confirm(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<()> {
        let (job, by) = (job.to_owned(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into purge_guard (job, found_at, would_delete, usual, confirmed_at, confirmed_by)
             values ($1, $2, 0, 0, $2, $3)
             on conflict (job) do update
             set confirmed_at = excluded.confirmed_at, confirmed_by = excluded.confirmed_by",
                    )
                    .bind(&job)
                    .bind(at(now))
                    .bind(by.as_str())
                    .execute(&mut *db)
                    .await?;
                    sqlx::query(
                        "insert into job_actions (at, actor, action, job) values ($1, $2, 'purge_confirmed', $3)",
                    )
                    .bind(at(now))
                    .bind(by.as_str())
                    .bind(&job)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn give_back_space(&self) -> StorageResult<bool> {
        // Asked of a reader first: most looks find little, and a write would cost an fsync.
        let free: i64 = sqlx::query_scalar("pragma freelist_count")
            .fetch_one(&self.readers)
            .await?;
        if free <= SPARE_PAGES {
            return Ok(false);
        }
        self.writer
            .write_behind(move |db| {
                Box::pin(async move {
                    // 64 pages are moved from the file's end within a millisecond or two.
                    sqlx::query("pragma incremental_vacuum(64)")
                        .execute(&mut *db)
                        .await?;
                    let left: i64 = sqlx::query_scalar("pragma freelist_count")
                        .fetch_one(db)
                        .await?;
                    Ok(left < free && left > SPARE_PAGES)
                })
            })
            .await
    }

    async fn end_guard(&self, job: &str) -> StorageResult<()> {
        let job = job.to_owned();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query("delete from purge_guard where job = $1")
                        .bind(job)
                        .execute(db)
                        .await?;
                    Ok(())
                })
            })
            .await
    }
}

async fn delete_batch(
    db: &mut SqliteConnection,
    sweep: &Sweep,
    after: Option<SweepKey>,
    limit: u32,
    deletion: Deletion,
) -> StorageResult<Batch> {
    let began = Instant::now();
    events::check_fence(db, deletion.fence).await?;
    let statement = match sweep.cause {
        Cause::Expired => WINDOW_EXPIRED,
        Cause::Aged => WINDOW_AGED,
    };
    let seen: Vec<SqliteRow> = select(statement, sweep)
        .bind(after.map_or(i64::MIN, |after| at(after.at)))
        .bind(after.map_or(0, |after| after.seq))
        .bind(limit)
        .fetch_all(&mut *db)
        .await?;
    let (mut seqs, mut ids, mut held) = (Vec::<i64>::new(), Vec::<String>::new(), 0);
    for row in &seen {
        if !row.flag("follows")? {
            continue;
        }
        if row.flag("held")? {
            held += 1;
            continue;
        }
        seqs.push(row.try_get("seq")?);
        ids.push(row.try_get("id")?);
    }
    if !seqs.is_empty() {
        sqlx::query("delete from contact_events where seq in (select value from json_each($1))")
            .bind(set(&seqs))
            .execute(&mut *db)
            .await?;
        events::forget(db, &sweep.tenant, &set(&ids)).await?;
        if let Some(run) = deletion.run {
            sqlx::query(
                "insert into deletion_ledger (tenant_id, run_id, rule, cause, deleted, first_at, last_at)
                 values ($1, $2, $3, $4, $5, $6, $6)
                 on conflict (tenant_id, run_id, rule, cause) do update
                 set deleted = deletion_ledger.deleted + excluded.deleted, last_at = excluded.last_at",
            )
            .bind(sweep.tenant.as_str())
            .bind(text(run.uuid()))
            .bind(&sweep.rule)
            .bind(sweep.cause.as_str())
            .bind(i64::try_from(seqs.len()).unwrap_or(i64::MAX))
            .bind(at(deletion.now))
            .execute(&mut *db)
            .await?;
        }
    }
    let last = seen.last().map(|row| -> StorageResult<SweepKey> {
        let at = row.time("at")?.unwrap_or_default();
        let seq = row.try_get("seq")?;
        Ok(SweepKey { at, seq })
    });
    Ok(Batch {
        seen: seen.len() as u64,
        deleted: seqs.len() as u64,
        held,
        last: last.transpose()?,
        took: began.elapsed(),
        was_alone: false,
    })
}
