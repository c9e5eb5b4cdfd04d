//! The runs on PostgreSQL. Due times are judged by the database's clock, the same for all daemons.

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::PgStorage;
use crate::domain::{RunId, Subject};
use crate::storage::ledger::{Claim, Counts, Finish, JobLedger, Run, Trigger};
use crate::storage::rows::{self, Columns};
use crate::storage::{StorageError, StorageResult};

macro_rules! run_columns {
    () => {
        "id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, state, counts::text as counts, error"
    };
}

fn json(counts: &Counts) -> String {
    serde_json::to_string(counts).expect("counts serialise")
}

#[async_trait]
impl JobLedger for PgStorage {
    async fn claim(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        trigger: Trigger,
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim> {
        let row = sqlx::query(
            // Judged here and not by the caller: clocks of several daemons differ.
            "with judged as (
                 select $3 <= clock_timestamp() as is_due),
             claimed as (
                 insert into job_runs (id, job, scheduled_at, started_at, trigger, attempt, daemon, state)
                 select $1, $2, $3, $4, $5, 1, $6, 'running' from judged where is_due
                 on conflict do nothing
                 returning id)
             select is_due, exists (select 1 from claimed) as is_claimed from judged",
        )
        .bind(run.uuid())
        .bind(job)
        .bind(scheduled_at)
        .bind(now)
        .bind(trigger.as_str())
        .bind(daemon)
        .fetch_one(&self.worker)
        .await?;
        match (row.flag("is_due")?, row.flag("is_claimed")?) {
            (false, _) => return Ok(Claim::NotDue),
            (true, true) => return Ok(Claim::Claimed),
            (true, false) => {}
        }
        // A claim before this one may have been committed while its answer was lost. Asked in a
        // statement of its own: the one above does not see a row that it waited for.
        let own = sqlx::query("select id from job_runs where id = $1 and state = 'running'")
            .bind(run.uuid())
            .fetch_optional(&self.worker)
            .await?;
        Ok(if own.is_some() {
            Claim::Claimed
        } else {
            Claim::Taken
        })
    }

    async fn enqueue(
        &self,
        run: RunId,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        sqlx::query(
            "insert into job_runs (id, job, scheduled_at, trigger, requested_by, state)
             values ($1, $2, $3, 'manual', $4, 'queued')",
        )
        .bind(run.uuid())
        .bind(job)
        .bind(now)
        .bind(by.as_str())
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>> {
        let row = sqlx::query(concat!(
            "update job_runs
             set state = 'running', daemon = $2, started_at = coalesce(started_at, greatest(scheduled_at, $3)), attempt = attempt + 1
             where id = (select id from job_runs
                         where state = 'queued' and job = any($1)
                         order by id limit 1
                         for update skip locked)
             returning ",
            run_columns!()
        ))
        .bind(jobs)
        .bind(daemon)
        .bind(now)
        .fetch_optional(&self.worker)
        .await?;
        row.as_ref().map(rows::run).transpose()
    }

    async fn begin_attempt(&self, run: RunId, attempt: u32) -> StorageResult<()> {
        sqlx::query("update job_runs set attempt = $2 where id = $1 and state = 'running'")
            .bind(run.uuid())
            .bind(i64::from(attempt))
            .execute(&self.worker)
            .await?;
        Ok(())
    }

    async fn finish(&self, run: RunId, finish: &Finish) -> StorageResult<()> {
        sqlx::query(
            "update job_runs set state = $2, counts = $3::text::json, error = $4, finished_at = $5, attempt = $6
             where id = $1 and state = 'running'",
        )
        .bind(run.uuid())
        .bind(finish.state.as_str())
        .bind(json(&finish.counts))
        .bind(finish.error.as_deref())
        .bind(finish.at)
        .bind(i64::from(finish.attempt))
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn give_back(&self, run: RunId, counts: &Counts, attempt: u32) -> StorageResult<()> {
        sqlx::query(
            "update job_runs set state = 'queued', counts = $2::text::json, attempt = $3, daemon = null
             where id = $1 and state = 'running'",
        )
        .bind(run.uuid())
        .bind(json(counts))
        .bind(i64::from(attempt))
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn record(&self, run: &Run) -> StorageResult<()> {
        sqlx::query(
            "insert into job_runs (id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, state, counts, error)
             select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::json, $11
             -- a daemon whose clock is ahead must not take a time from the others
             where $9 <> 'skipped' or $3 <= clock_timestamp()
             on conflict do nothing",
        )
        .bind(run.id.uuid())
        .bind(&run.job)
        .bind(run.scheduled_at)
        .bind(run.started_at)
        .bind(run.finished_at)
        .bind(run.trigger.as_str())
        .bind(i64::from(run.attempt))
        .bind(run.daemon)
        .bind(run.state.as_str())
        .bind(json(&run.counts))
        .bind(run.error.as_deref())
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn runs(&self, job: &str, before: Option<RunId>, limit: u32) -> StorageResult<Vec<Run>> {
        let found = sqlx::query(concat!(
            "select ",
            run_columns!(),
            " from job_runs
             where job = $1 and id < $2
             order by id desc nulls last limit $3"
        ))
        .bind(job)
        // The largest UUID, not "none": so that the index finds the place.
        .bind(before.map_or(Uuid::max(), RunId::uuid))
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::run).collect()
    }

    async fn last_runs(&self, jobs: &[String]) -> StorageResult<Vec<Run>> {
        // PostgreSQL has no max(uuid) before 18.
        let found = sqlx::query(concat!(
            "select r.* from unnest($1::text[]) j (name)
             cross join lateral (
                 select ",
            run_columns!(),
            " from job_runs
                 where job = j.name
                 order by id desc nulls last limit 1) r"
        ))
        .bind(jobs)
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::run).collect()
    }

    async fn prune(&self, before: DateTime<Utc>, limit: u32) -> StorageResult<u64> {
        let old = sqlx::query(
            "delete from job_runs
             where id in (select r.id from job_runs r
                          where r.finished_at < $1
                            and exists (select 1 from job_runs n where n.job = r.job and n.id > r.id)
                          order by r.finished_at limit $2
                          -- several daemons prune at once
                          for update skip locked)",
        )
        .bind(before)
        .bind(i64::from(limit))
        .execute(&self.worker)
        .await?;
        Ok(old.rows_affected())
    }

    async fn recover(&self) -> StorageResult<u64> {
        // The database is shared: what runs may be another daemon's.
        Ok(0)
    }

    async fn running(&self, daemon: Uuid) -> StorageResult<Vec<Run>> {
        let found = sqlx::query(concat!(
            "select ",
            run_columns!(),
            " from job_runs where daemon = $1 and state = 'running' order by id"
        ))
        .bind(daemon)
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::run).collect()
    }

    async fn ahead(&self, now: DateTime<Utc>) -> StorageResult<TimeDelta> {
        Ok(now - self.now().await?)
    }

    async fn now(&self) -> StorageResult<DateTime<Utc>> {
        let row = sqlx::query("select clock_timestamp() as now")
            .fetch_one(&self.worker)
            .await?;
        row.time("now")?
            .ok_or_else(|| StorageError::from(sqlx::Error::RowNotFound))
    }
}
