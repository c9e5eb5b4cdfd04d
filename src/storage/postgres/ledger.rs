//! The runs on PostgreSQL. Due times are judged by the database's clock, the same for all daemons.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::PgStorage;
use crate::domain::{RunId, Subject};
use crate::storage::ledger::{
    Claim, Counts, Fence, Finish, Glance, JobAction, JobLedger, LEASE, Pause, Renewed, Run,
    RunState, Settled, Trigger,
};
use crate::storage::rows::{self, Columns};
use crate::storage::{StorageError, StorageResult};

macro_rules! run_columns {
    () => {
        "id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, fence, state, counts::text as counts, error"
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
                 select $3 <= clock_timestamp() as is_due,
                        exists (select 1 from job_controls where job = $2) as is_paused),
             claimed as (
                 insert into job_runs (id, job, scheduled_at, started_at, trigger, attempt, daemon, state, fence, leased_until)
                 select $1, $2, $3, $4, $5, 1, $6, 'running', 1, clock_timestamp() + $7 * interval '1 second'
                 from judged where is_due and not is_paused
                 on conflict do nothing
                 returning id)
             select is_due, is_paused, exists (select 1 from claimed) as is_claimed from judged",
        )
        .bind(run.uuid())
        .bind(job)
        .bind(scheduled_at)
        .bind(now)
        .bind(trigger.as_str())
        .bind(daemon)
        .bind(LEASE.as_secs_f64())
        .fetch_one(&self.worker)
        .await?;
        if !row.flag("is_due")? {
            return Ok(Claim::NotDue);
        }
        if row.flag("is_claimed")? {
            return Ok(Claim::Claimed);
        }
        // A claim before this one may have been committed while its answer was lost. Asked in a
        // statement of its own: the one above does not see a row that it waited for.
        let there = sqlx::query(
            "select exists (select 1 from job_runs where id = $1 and state = 'running') as is_own,
                    exists (select 1 from job_runs
                            where job = $2 and scheduled_at = $3 and trigger <> 'manual' and not is_per_daemon) as is_taken",
        )
        .bind(run.uuid())
        .bind(job)
        .bind(scheduled_at)
        .fetch_one(&self.worker)
        .await?;
        Ok(match (there.flag("is_own")?, there.flag("is_taken")?) {
            (true, _) => Claim::Claimed,
            (_, true) => Claim::Taken,
            _ if row.flag("is_paused")? => Claim::Paused,
            _ => Claim::Busy,
        })
    }

    async fn queue(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim> {
        let row = sqlx::query(
            "with judged as (select $3 <= clock_timestamp() as is_due),
             added as (
                 insert into job_runs (id, job, scheduled_at, trigger, state)
                 select $1, $2, $3, 'schedule', 'queued'
                 from judged
                 where is_due
                   and not exists (select 1 from job_runs
                                   where job = $2 and state = 'queued' and trigger = 'schedule'
                                     and started_at is null and scheduled_at >= $3)
                 on conflict do nothing
                 returning id),
             replaced as (
                 update job_runs
                 set state = 'skipped', finished_at = greatest(scheduled_at, $4),
                     error = 'a later time took its place in the queue'
                 where job = $2 and state = 'queued' and trigger = 'schedule' and started_at is null
                   and scheduled_at < $3 and exists (select 1 from added))
             select is_due, exists (select 1 from added) as is_added,
                    exists (select 1 from job_runs where id = $1 and state = 'queued') as is_own
             from judged",
        )
        .bind(run.uuid())
        .bind(job)
        .bind(scheduled_at)
        .bind(now)
        .fetch_one(&self.worker)
        .await?;
        Ok(if row.flag("is_added")? || row.flag("is_own")? {
            Claim::Claimed
        } else if row.flag("is_due")? {
            Claim::Taken
        } else {
            Claim::NotDue
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
            "with added as (
                 insert into job_runs (id, job, scheduled_at, trigger, requested_by, state)
                 values ($1, $2, $3, 'manual', $4, 'queued'))
             insert into job_actions (at, actor, action, job, run_id) values ($3, $4, 'run', $2, $1)",
        )
        .bind(run.uuid())
        .bind(job)
        .bind(now)
        .bind(by.as_str())
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn add_missed(&self, runs: &[Run]) -> StorageResult<u64> {
        let ids: Vec<Uuid> = runs.iter().map(|run| run.id.uuid()).collect();
        let jobs: Vec<&str> = runs.iter().map(|run| run.job.as_str()).collect();
        let times: Vec<DateTime<Utc>> = runs.iter().map(|run| run.scheduled_at).collect();
        let ends: Vec<Option<DateTime<Utc>>> = runs.iter().map(|run| run.finished_at).collect();
        let triggers: Vec<&str> = runs.iter().map(|run| run.trigger.as_str()).collect();
        let states: Vec<&str> = runs.iter().map(|run| run.state.as_str()).collect();
        let counts: Vec<String> = runs.iter().map(|run| json(&run.counts)).collect();
        let errors: Vec<Option<&str>> = runs.iter().map(|run| run.error.as_deref()).collect();
        let added = sqlx::query(
            "insert into job_runs (id, job, scheduled_at, finished_at, trigger, state, counts, error)
             select m.id, m.job, m.scheduled_at, m.finished_at, m.trigger, m.state, m.counts::json, m.error
             from unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::timestamptz[], $5::text[], $6::text[], $7::text[], $8::text[])
                 as m (id, job, scheduled_at, finished_at, trigger, state, counts, error)
             where m.scheduled_at <= clock_timestamp()
             on conflict do nothing",
        )
        .bind(ids)
        .bind(jobs)
        .bind(times)
        .bind(ends)
        .bind(triggers)
        .bind(states)
        .bind(counts)
        .bind(errors)
        .execute(&self.worker)
        .await?;
        Ok(added.rows_affected())
    }

    async fn settled(
        &self,
        job: &str,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Vec<Settled>> {
        let found = sqlx::query(
            "select scheduled_at, counts::text as counts from job_runs
             where job = $1 and scheduled_at between $2 and $3 and trigger <> 'manual' and not is_per_daemon
             order by scheduled_at desc limit $4",
        )
        .bind(job)
        .bind(from)
        .bind(until)
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::settled).collect()
    }

    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>> {
        let claimed = sqlx::query(concat!(
            "update job_runs
             set state = 'running', daemon = $2, fence = fence + 1, attempt = attempt + 1,
                 leased_until = clock_timestamp() + $4 * interval '1 second',
                 started_at = coalesce(started_at, greatest(scheduled_at, $3))
             where id = (select q.id from job_runs q
                         where q.state = 'queued' and q.job = any($1)
                           and not exists (select 1 from job_runs r where r.job = q.job and r.state = 'running')
                           and (q.requested_by is not null
                                or not exists (select 1 from job_controls c where c.job = q.job))
                         order by q.id limit 1
                         for update skip locked)
             returning ",
            run_columns!()
        ))
        .bind(jobs)
        .bind(daemon)
        .bind(now)
        .bind(LEASE.as_secs_f64())
        .fetch_optional(&self.worker)
        .await;
        match claimed {
            Ok(row) => row.as_ref().map(rows::run).transpose(),
            // Another run of the job came first.
            Err(error)
                if error
                    .as_database_error()
                    .is_some_and(sqlx::error::DatabaseError::is_unique_violation) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn renew(&self, daemon: Uuid, _now: DateTime<Utc>) -> StorageResult<Vec<Renewed>> {
        let renewed = sqlx::query(
            "update job_runs set leased_until = clock_timestamp() + $2 * interval '1 second'
             where daemon = $1 and state = 'running'
             returning id, fence, cancel_requested_by",
        )
        .bind(daemon)
        .bind(LEASE.as_secs_f64())
        .fetch_all(&self.worker)
        .await?;
        renewed.iter().map(rows::renewed).collect()
    }

    async fn glance(
        &self,
        jobs: &[String],
        daemon: Uuid,
        _now: DateTime<Utc>,
    ) -> StorageResult<Glance> {
        let row = sqlx::query(
            "select clock_timestamp() as now,
                    exists (select 1 from job_runs where state = 'queued' and job = any($1)) as is_queued,
                    (select min(leased_until) from job_runs where state = 'running' and daemon <> $2) as lapses_at,
                    array(select job from job_controls) as paused",
        )
        .bind(jobs)
        .bind(daemon)
        .fetch_one(&self.worker)
        .await?;
        Ok(Glance {
            now: clock(&row)?,
            is_queued: row.flag("is_queued")?,
            lapses_at: row.time("lapses_at")?,
            paused: row.texts("paused")?,
        })
    }

    async fn take_over(&self, daemon: Uuid, now: DateTime<Utc>) -> StorageResult<Vec<Run>> {
        let taken = sqlx::query(concat!(
            "update job_runs
             set state = case when cancel_requested_by is null then 'queued' else 'cancelled' end,
                 finished_at = case when cancel_requested_by is not null then greatest(scheduled_at, $2) end,
                 error = 'cancelled by ' || cancel_requested_by,
                 daemon = null, leased_until = null
             where id in (select id from job_runs
                          where state = 'running' and daemon <> $1 and leased_until < clock_timestamp()
                          for update skip locked)
             returning ",
            run_columns!()
        ))
        .bind(daemon)
        .bind(now)
        .fetch_all(&self.worker)
        .await?;
        taken.iter().map(rows::run).collect()
    }

    async fn begin_attempt(&self, fence: Fence, attempt: u32) -> StorageResult<bool> {
        let counted = sqlx::query(
            "update job_runs set attempt = $3 where id = $1 and fence = $2 and state = 'running'",
        )
        .bind(fence.run.uuid())
        .bind(i64::from(fence.number))
        .bind(i64::from(attempt))
        .execute(&self.worker)
        .await?;
        Ok(counted.rows_affected() == 1)
    }

    async fn finish(&self, fence: Fence, finish: &Finish) -> StorageResult<bool> {
        let finished = sqlx::query(
            "update job_runs
             set state = $3, counts = $4::text::json, error = $5, finished_at = $6, attempt = $7, leased_until = null
             where id = $1 and fence = $2 and state = 'running'",
        )
        .bind(fence.run.uuid())
        .bind(i64::from(fence.number))
        .bind(finish.state.as_str())
        .bind(json(&finish.counts))
        .bind(finish.error.as_deref())
        .bind(finish.at)
        .bind(i64::from(finish.attempt))
        .execute(&self.worker)
        .await?;
        Ok(finished.rows_affected() == 1)
    }

    async fn give_back(&self, fence: Fence, counts: &Counts, attempt: u32) -> StorageResult<bool> {
        let given_back = sqlx::query(
            "update job_runs
             set state = 'queued', counts = $3::text::json, attempt = $4, daemon = null, leased_until = null
             where id = $1 and fence = $2 and state = 'running'",
        )
        .bind(fence.run.uuid())
        .bind(i64::from(fence.number))
        .bind(json(counts))
        .bind(i64::from(attempt))
        .execute(&self.worker)
        .await?;
        Ok(given_back.rows_affected() == 1)
    }

    async fn record(&self, run: &Run) -> StorageResult<bool> {
        let recorded = sqlx::query(
            "insert into job_runs (id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, state, counts, error, is_per_daemon)
             -- a poll alone is recorded when it has succeeded or failed: each daemon has its own
             select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::json, $11, $9 <> 'skipped'
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
        Ok(recorded.rows_affected() == 1)
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

    async fn find_run(&self, run: RunId) -> StorageResult<Option<Run>> {
        let found = sqlx::query(concat!(
            "select ",
            run_columns!(),
            " from job_runs where id = $1"
        ))
        .bind(run.uuid())
        .fetch_optional(&self.worker)
        .await?;
        found.as_ref().map(rows::run).transpose()
    }

    async fn last_times(&self, jobs: &[String]) -> StorageResult<Vec<(String, DateTime<Utc>)>> {
        let found = sqlx::query(
            "select j.name as job, r.at from unnest($1::text[]) j (name)
             cross join lateral (
                 select max(scheduled_at) as at from job_runs
                 where job = j.name and trigger <> 'manual' and not is_per_daemon) r
             where r.at is not null",
        )
        .bind(jobs)
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::last_time).collect()
    }

    async fn pause(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<bool> {
        let paused = sqlx::query(
            "with added as (
                 insert into job_controls (job, paused_at, paused_by) values ($1, $2, $3)
                 on conflict do nothing
                 returning job)
             insert into job_actions (at, actor, action, job) select $2, $3, 'pause', job from added",
        )
        .bind(job)
        .bind(now)
        .bind(by.as_str())
        .execute(&self.worker)
        .await?;
        Ok(paused.rows_affected() == 1)
    }

    async fn resume(
        &self,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Pause>> {
        let ended = sqlx::query(
            "with ended as (
                 delete from job_controls where job = $1
                 returning job, paused_at, paused_by),
             noted as (
                 insert into job_actions (at, actor, action, job) select $2, $3, 'resume', job from ended)
             select job, paused_at, paused_by from ended",
        )
        .bind(job)
        .bind(now)
        .bind(by.as_str())
        .fetch_optional(&self.worker)
        .await?;
        ended.as_ref().map(rows::pause).transpose()
    }

    async fn pauses(&self) -> StorageResult<Vec<Pause>> {
        let found = sqlx::query("select job, paused_at, paused_by from job_controls order by job")
            .fetch_all(&self.worker)
            .await?;
        found.iter().map(rows::pause).collect()
    }

    async fn cancel(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>> {
        let found = sqlx::query(
            "with found as (
                 select id, job, state from job_runs where id = $1 for update),
             ended as (
                 update job_runs r
                 set state = case f.state when 'queued' then 'cancelled' else f.state end,
                     finished_at = case f.state when 'queued' then greatest(r.scheduled_at, $3) end,
                     error = case f.state when 'queued' then 'cancelled by ' || $2 end,
                     cancel_requested_by = $2
                 from found f
                 where r.id = f.id and f.state in ('queued', 'running')),
             noted as (
                 insert into job_actions (at, actor, action, job, run_id)
                 select $3, $2, 'cancel', job, id from found where state in ('queued', 'running'))
             select state from found",
        )
        .bind(run.uuid())
        .bind(by.as_str())
        .bind(now)
        .fetch_optional(&self.worker)
        .await?;
        found.as_ref().map(rows::run_state).transpose()
    }

    async fn retry(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>> {
        let found = sqlx::query(
            "with found as (
                 select id, job, state from job_runs where id = $1 for update),
             queued as (
                 update job_runs r
                 set state = 'queued', requested_by = $2, attempt = 0, daemon = null, finished_at = null,
                     error = null, cancel_requested_by = null
                 from found f
                 where r.id = f.id and f.state in ('failed', 'timed_out', 'cancelled')),
             noted as (
                 insert into job_actions (at, actor, action, job, run_id)
                 select $3, $2, 'retry', job, id from found where state in ('failed', 'timed_out', 'cancelled'))
             select state from found",
        )
        .bind(run.uuid())
        .bind(by.as_str())
        .bind(now)
        .fetch_optional(&self.worker)
        .await?;
        found.as_ref().map(rows::run_state).transpose()
    }

    async fn actions(&self, job: &str, limit: u32) -> StorageResult<Vec<JobAction>> {
        let found = sqlx::query(
            "select at, actor, action, run_id from job_actions where job = $1 order by seq desc limit $2",
        )
        .bind(job)
        .bind(i64::from(limit))
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::action).collect()
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

    async fn recover(&self, _now: DateTime<Utc>) -> StorageResult<u64> {
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

    async fn now(&self) -> StorageResult<DateTime<Utc>> {
        let row = sqlx::query("select clock_timestamp() as now")
            .fetch_one(&self.worker)
            .await?;
        clock(&row)
    }
}

/// What the database's clock says.
fn clock(row: &PgRow) -> StorageResult<DateTime<Utc>> {
    row.time("now")?
        .ok_or_else(|| StorageError::from(sqlx::Error::RowNotFound))
}
