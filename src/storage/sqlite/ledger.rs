//! The runs on SQLite. The database's clock is the machine's: the daemon passes it in as `now`.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::{SqliteStorage, at, changed, set, text};
use crate::domain::{RunId, Subject};
use crate::storage::StorageResult;
use crate::storage::ledger::{
    Claim, Counts, Fence, Finish, Glance, JobAction, JobLedger, LEASE, Pause, Renewed, Run,
    RunState, Settled, Trigger,
};
use crate::storage::rows::{self, Columns as _};

macro_rules! run_columns {
    () => {
        "id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, fence, state, counts, error"
    };
}

fn json(counts: &Counts) -> String {
    serde_json::to_string(counts).expect("counts serialise")
}

#[async_trait]
impl JobLedger for SqliteStorage {
    async fn claim(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        trigger: Trigger,
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim> {
        if scheduled_at > now {
            return Ok(Claim::NotDue);
        }
        let job = job.to_owned();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let claim = sqlx::query(
                        "insert into job_runs (id, job, scheduled_at, started_at, trigger, attempt, daemon, state, fence, leased_until)
                         select $1, $2, $3, $4, $5, 1, $6, 'running', 1, $7
                         where not exists (select 1 from job_controls where job = $2)
                         on conflict do nothing",
                    )
                    .bind(text(run.uuid()))
                    .bind(&job)
                    .bind(at(scheduled_at))
                    .bind(at(now))
                    .bind(trigger.as_str())
                    .bind(text(daemon))
                    .bind(at(now + LEASE));
                    if changed(&mut *db, claim).await? == 1 {
                        return Ok(Claim::Claimed);
                    }
                    // A claim before this one may have been committed while its answer was lost.
                    let there = sqlx::query(
                        "select exists (select 1 from job_runs where id = $1 and state = 'running') as is_own,
                                exists (select 1 from job_runs
                                        where job = $2 and scheduled_at = $3 and trigger <> 'manual' and not is_per_daemon) as is_taken,
                                exists (select 1 from job_controls where job = $2) as is_paused",
                    )
                    .bind(text(run.uuid()))
                    .bind(&job)
                    .bind(at(scheduled_at))
                    .fetch_one(db)
                    .await?;
                    Ok(match (there.flag("is_own")?, there.flag("is_taken")?) {
                        (true, _) => Claim::Claimed,
                        (_, true) => Claim::Taken,
                        _ if there.flag("is_paused")? => Claim::Paused,
                        _ => Claim::Busy,
                    })
                })
            })
            .await
    }

    async fn queue(
        &self,
        run: RunId,
        job: &str,
        scheduled_at: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Claim> {
        if scheduled_at > now {
            return Ok(Claim::NotDue);
        }
        let job = job.to_owned();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let queue = sqlx::query(
                        "insert into job_runs (id, job, scheduled_at, trigger, state)
                         select $1, $2, $3, 'schedule', 'queued'
                         where not exists (select 1 from job_runs
                                           where +job = $2 and state = 'queued' and trigger = 'schedule'
                                             and started_at is null and scheduled_at >= $3)
                         on conflict do nothing",
                    )
                    .bind(text(run.uuid()))
                    .bind(&job)
                    .bind(at(scheduled_at));
                    if changed(&mut *db, queue).await? == 0 {
                        let own = sqlx::query(
                            "select id from job_runs where id = $1 and state = 'queued'",
                        )
                        .bind(text(run.uuid()))
                        .fetch_optional(db)
                        .await?;
                        return Ok(if own.is_some() { Claim::Claimed } else { Claim::Taken });
                    }
                    sqlx::query(
                        "update job_runs
                         set state = 'skipped', finished_at = max(scheduled_at, $3),
                             error = 'a later time took its place in the queue'
                         where +job = $1 and state = 'queued' and trigger = 'schedule' and started_at is null
                           and scheduled_at < $2",
                    )
                    .bind(&job)
                    .bind(at(scheduled_at))
                    .bind(at(now))
                    .execute(db)
                    .await?;
                    Ok(Claim::Claimed)
                })
            })
            .await
    }

    async fn enqueue(
        &self,
        run: RunId,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let (job, by) = (job.to_owned(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into job_runs (id, job, scheduled_at, trigger, requested_by, state)
                         values ($1, $2, $3, 'manual', $4, 'queued')",
                    )
                    .bind(text(run.uuid()))
                    .bind(&job)
                    .bind(at(now))
                    .bind(by.as_str())
                    .execute(&mut *db)
                    .await?;
                    note(db, "run", &job, Some(run), &by, now).await
                })
            })
            .await
    }

    async fn add_missed(&self, runs: &[Run]) -> StorageResult<u64> {
        let runs = runs.to_vec();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let mut added = 0;
                    for run in runs {
                        let add = sqlx::query(
                            "insert into job_runs (id, job, scheduled_at, finished_at, trigger, state, counts, error)
                             values ($1, $2, $3, $4, $5, $6, $7, $8)
                             on conflict do nothing",
                        )
                        .bind(text(run.id.uuid()))
                        .bind(run.job)
                        .bind(at(run.scheduled_at))
                        .bind(run.finished_at.map(at))
                        .bind(run.trigger.as_str())
                        .bind(run.state.as_str())
                        .bind(json(&run.counts))
                        .bind(run.error);
                        added += changed(&mut *db, add).await?;
                    }
                    Ok(added)
                })
            })
            .await
    }

    async fn settled(
        &self,
        job: &str,
        from: DateTime<Utc>,
        until: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Vec<Settled>> {
        let found = sqlx::query(
            "select scheduled_at, counts from job_runs
             where job = $1 and scheduled_at between $2 and $3 and trigger <> 'manual' and not is_per_daemon
             order by scheduled_at desc limit $4",
        )
        .bind(job)
        .bind(at(from))
        .bind(at(until))
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::settled).collect()
    }

    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>> {
        let jobs = set(jobs);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let row = sqlx::query(concat!(
                        "update job_runs
                         set state = 'running', daemon = $2, fence = fence + 1, attempt = attempt + 1,
                             leased_until = $4, started_at = coalesce(started_at, max(scheduled_at, $3))
                         where id = (select q.id from job_runs q
                                     -- the plus: by the queue's index, where job's would read the whole history
                                     where q.state = 'queued' and +q.job in (select value from json_each($1))
                                       and not exists (select 1 from job_runs r where r.job = q.job and r.state = 'running')
                                       and (q.requested_by is not null
                                            or not exists (select 1 from job_controls c where c.job = q.job))
                                     order by q.id limit 1)
                         returning ", run_columns!()
                    ))
                    .bind(jobs)
                    .bind(text(daemon))
                    .bind(at(now))
                    .bind(at(now + LEASE))
                    .fetch_optional(db)
                    .await?;
                    row.as_ref().map(rows::run).transpose()
                })
            })
            .await
    }

    /// Only read: the file is this daemon's alone, so that nobody waits for its leases to end.
    async fn renew(&self, daemon: Uuid, _now: DateTime<Utc>) -> StorageResult<Vec<Renewed>> {
        let held = sqlx::query(
            "select id, fence, cancel_requested_by from job_runs where daemon = $1 and state = 'running'",
        )
        .bind(text(daemon))
        .fetch_all(&self.readers)
        .await?;
        held.iter().map(rows::renewed).collect()
    }

    async fn glance(
        &self,
        jobs: &[String],
        _daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Glance> {
        let row = sqlx::query(
            "select exists (select 1 from job_runs
                            where state = 'queued' and +job in (select value from json_each($1))) as is_queued,
                    (select json_group_array(job) from job_controls) as paused",
        )
        .bind(set(jobs))
        .fetch_one(&self.readers)
        .await?;
        Ok(Glance {
            now,
            is_queued: row.flag("is_queued")?,
            // What another process left was taken over at the start.
            lapses_at: None,
            paused: row.texts("paused")?,
        })
    }

    async fn take_over(&self, _daemon: Uuid, _now: DateTime<Utc>) -> StorageResult<Vec<Run>> {
        // Done at the start, by recover.
        Ok(Vec::new())
    }

    async fn begin_attempt(&self, fence: Fence, attempt: u32) -> StorageResult<bool> {
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let begin = sqlx::query(
                        "update job_runs set attempt = $3 where id = $1 and fence = $2 and state = 'running'",
                    )
                    .bind(text(fence.run.uuid()))
                    .bind(fence.number)
                    .bind(attempt);
                    Ok(changed(db, begin).await? == 1)
                })
            })
            .await
    }

    async fn finish(&self, fence: Fence, finish: &Finish) -> StorageResult<bool> {
        let finish = finish.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let end = sqlx::query(
                        "update job_runs
                         set state = $3, counts = $4, error = $5, finished_at = $6, attempt = $7, leased_until = null
                         where id = $1 and fence = $2 and state = 'running'",
                    )
                    .bind(text(fence.run.uuid()))
                    .bind(fence.number)
                    .bind(finish.state.as_str())
                    .bind(json(&finish.counts))
                    .bind(finish.error)
                    .bind(at(finish.at))
                    .bind(finish.attempt);
                    Ok(changed(db, end).await? == 1)
                })
            })
            .await
    }

    async fn give_back(&self, fence: Fence, counts: &Counts, attempt: u32) -> StorageResult<bool> {
        let counts = json(counts);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let give_back = sqlx::query(
                        "update job_runs
                         set state = 'queued', counts = $3, attempt = $4, daemon = null, leased_until = null
                         where id = $1 and fence = $2 and state = 'running'",
                    )
                    .bind(text(fence.run.uuid()))
                    .bind(fence.number)
                    .bind(counts)
                    .bind(attempt);
                    Ok(changed(db, give_back).await? == 1)
                })
            })
            .await
    }

    async fn record(&self, run: &Run) -> StorageResult<bool> {
        let run = run.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let record = sqlx::query(
                        "insert into job_runs (id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, state, counts, error, is_per_daemon)
                         -- a poll alone is recorded when it has succeeded or failed: each daemon has its own
                         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $9 <> 'skipped')
                         on conflict do nothing",
                    )
                    .bind(text(run.id.uuid()))
                    .bind(run.job)
                    .bind(at(run.scheduled_at))
                    .bind(run.started_at.map(at))
                    .bind(run.finished_at.map(at))
                    .bind(run.trigger.as_str())
                    .bind(run.attempt)
                    .bind(run.daemon.map(text))
                    .bind(run.state.as_str())
                    .bind(json(&run.counts))
                    .bind(run.error);
                    Ok(changed(db, record).await? == 1)
                })
            })
            .await
    }

    async fn runs(&self, job: &str, before: Option<RunId>, limit: u32) -> StorageResult<Vec<Run>> {
        let found = sqlx::query(concat!(
            "select ",
            run_columns!(),
            " from job_runs
             where job = $1 and id < $2
             order by id desc limit $3"
        ))
        .bind(job)
        // The largest UUID, not "none": so that the index finds the place.
        .bind(text(before.map_or(Uuid::max(), RunId::uuid)))
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::run).collect()
    }

    async fn last_runs(&self, jobs: &[String]) -> StorageResult<Vec<Run>> {
        let found = sqlx::query(concat!(
            "select ", run_columns!(), " from job_runs
             where id in (select (select max(r.id) from job_runs r where r.job = j.value) from json_each($1) j)"
        ))
        .bind(set(jobs))
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::run).collect()
    }

    async fn find_run(&self, run: RunId) -> StorageResult<Option<Run>> {
        let found = sqlx::query(concat!(
            "select ",
            run_columns!(),
            " from job_runs where id = $1"
        ))
        .bind(text(run.uuid()))
        .fetch_optional(&self.readers)
        .await?;
        found.as_ref().map(rows::run).transpose()
    }

    async fn last_times(&self, jobs: &[String]) -> StorageResult<Vec<(String, DateTime<Utc>)>> {
        let found = sqlx::query(
            "select job, at from (
                 select j.value as job,
                        (select max(r.scheduled_at) from job_runs r
                         where r.job = j.value and r.trigger <> 'manual' and not r.is_per_daemon) as at
                 from json_each($1) j)
             where at is not null",
        )
        .bind(set(jobs))
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::last_time).collect()
    }

    async fn pause(&self, job: &str, by: &Subject, now: DateTime<Utc>) -> StorageResult<bool> {
        let (job, by) = (job.to_owned(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let pause = sqlx::query(
                        "insert into job_controls (job, paused_at, paused_by) values ($1, $2, $3)
                         on conflict do nothing",
                    )
                    .bind(&job)
                    .bind(at(now))
                    .bind(by.as_str());
                    let is_new = changed(&mut *db, pause).await? == 1;
                    if is_new {
                        note(db, "pause", &job, None, &by, now).await?;
                    }
                    Ok(is_new)
                })
            })
            .await
    }

    async fn resume(
        &self,
        job: &str,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Pause>> {
        let (job, by) = (job.to_owned(), by.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let ended = sqlx::query(
                        "delete from job_controls where job = $1 returning job, paused_at, paused_by",
                    )
                    .bind(&job)
                    .fetch_optional(&mut *db)
                    .await?;
                    if ended.is_some() {
                        note(db, "resume", &job, None, &by, now).await?;
                    }
                    ended.as_ref().map(rows::pause).transpose()
                })
            })
            .await
    }

    async fn pauses(&self) -> StorageResult<Vec<Pause>> {
        let found = sqlx::query("select job, paused_at, paused_by from job_controls order by job")
            .fetch_all(&self.readers)
            .await?;
        found.iter().map(rows::pause).collect()
    }

    async fn cancel(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>> {
        let by = by.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let Some((job, state)) = job_and_state(&mut *db, run).await? else {
                        return Ok(None);
                    };
                    if matches!(state, RunState::Queued | RunState::Running) {
                        sqlx::query(
                            "update job_runs
                             set state = case state when 'queued' then 'cancelled' else state end,
                                 finished_at = case state when 'queued' then max(scheduled_at, $3) end,
                                 error = case state when 'queued' then 'cancelled by ' || $2 end,
                                 cancel_requested_by = $2
                             where id = $1",
                        )
                        .bind(text(run.uuid()))
                        .bind(by.as_str())
                        .bind(at(now))
                        .execute(&mut *db)
                        .await?;
                        note(db, "cancel", &job, Some(run), &by, now).await?;
                    }
                    Ok(Some(state))
                })
            })
            .await
    }

    async fn retry(
        &self,
        run: RunId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<RunState>> {
        let by = by.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let Some((job, state)) = job_and_state(&mut *db, run).await? else {
                        return Ok(None);
                    };
                    if matches!(state, RunState::Failed | RunState::TimedOut | RunState::Cancelled) {
                        sqlx::query(
                            "update job_runs
                             set state = 'queued', requested_by = $2, attempt = 0, daemon = null, finished_at = null,
                                 error = null, cancel_requested_by = null
                             where id = $1",
                        )
                        .bind(text(run.uuid()))
                        .bind(by.as_str())
                        .execute(&mut *db)
                        .await?;
                        note(db, "retry", &job, Some(run), &by, now).await?;
                    }
                    Ok(Some(state))
                })
            })
            .await
    }

    async fn actions(&self, job: &str, limit: u32) -> StorageResult<Vec<JobAction>> {
        let found = sqlx::query(
            "select at, actor, action, run_id from job_actions where job = $1 order by seq desc limit $2",
        )
        .bind(job)
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::action).collect()
    }

    async fn prune(&self, before: DateTime<Utc>, limit: u32) -> StorageResult<u64> {
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let old = sqlx::query(
                        "delete from job_runs
                         where id in (select r.id from job_runs r
                                      where r.finished_at < $1
                                        and exists (select 1 from job_runs n where n.job = r.job and n.id > r.id)
                                      order by r.finished_at limit $2)",
                    )
                    .bind(at(before))
                    .bind(limit);
                    changed(db, old).await
                })
            })
            .await
    }

    async fn recover(&self, now: DateTime<Utc>) -> StorageResult<u64> {
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let left = sqlx::query(
                        "update job_runs
                         set state = case when cancel_requested_by is null then 'queued' else 'cancelled' end,
                             finished_at = case when cancel_requested_by is not null then max(scheduled_at, $1) end,
                             error = 'cancelled by ' || cancel_requested_by,
                             daemon = null, leased_until = null
                         where state = 'running'",
                    )
                    .bind(at(now));
                    changed(db, left).await
                })
            })
            .await
    }

    async fn running(&self, daemon: Uuid) -> StorageResult<Vec<Run>> {
        let found = sqlx::query(concat!(
            "select ",
            run_columns!(),
            " from job_runs where daemon = $1 and state = 'running' order by id"
        ))
        .bind(text(daemon))
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::run).collect()
    }

    async fn now(&self) -> StorageResult<DateTime<Utc>> {
        let row = sqlx::query(
            "select cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer)",
        )
        .fetch_one(&self.readers)
        .await?;
        Ok(DateTime::from_timestamp_millis(row.try_get(0)?).unwrap_or_default())
    }
}

/// Writes down what an operator did, in the transaction that does it.
async fn note(
    db: &mut SqliteConnection,
    action: &'static str,
    job: &str,
    run: Option<RunId>,
    by: &Subject,
    now: DateTime<Utc>,
) -> StorageResult<()> {
    sqlx::query(
        "insert into job_actions (at, actor, action, job, run_id) values ($1, $2, $3, $4, $5)",
    )
    .bind(at(now))
    .bind(by.as_str())
    .bind(action)
    .bind(job)
    .bind(run.map(|run| text(run.uuid())))
    .execute(db)
    .await?;
    Ok(())
}

/// The job of a run, and where the run stands.
async fn job_and_state(
    db: &mut SqliteConnection,
    run: RunId,
) -> StorageResult<Option<(String, RunState)>> {
    let found = sqlx::query("select job, state from job_runs where id = $1")
        .bind(text(run.uuid()))
        .fetch_optional(db)
        .await?;
    let Some(row) = found else {
        return Ok(None);
    };
    Ok(Some((row.try_get("job")?, rows::run_state(&row)?)))
}
