//! The runs on SQLite. The database's clock is the machine's: the daemon passes it in as `now`.

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::Row;
use uuid::Uuid;

use super::{SqliteStorage, at, changed, set, text};
use crate::domain::{RunId, Subject};
use crate::storage::ledger::{Claim, Counts, Finish, JobLedger, Run, Trigger};
use crate::storage::{StorageResult, rows};

macro_rules! run_columns {
    () => {
        "id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, state, counts, error"
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
                        "insert into job_runs (id, job, scheduled_at, started_at, trigger, attempt, daemon, state)
                         values ($1, $2, $3, $4, $5, 1, $6, 'running')
                         on conflict do nothing",
                    )
                    .bind(text(run.uuid()))
                    .bind(job)
                    .bind(at(scheduled_at))
                    .bind(at(now))
                    .bind(trigger.as_str())
                    .bind(text(daemon));
                    if changed(&mut *db, claim).await? == 1 {
                        return Ok(Claim::Claimed);
                    }
                    // A claim before this one may have been committed while its answer was lost.
                    let own = sqlx::query("select id from job_runs where id = $1 and state = 'running'")
                        .bind(text(run.uuid()))
                        .fetch_optional(db)
                        .await?;
                    Ok(if own.is_some() { Claim::Claimed } else { Claim::Taken })
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
                    .bind(job)
                    .bind(at(now))
                    .bind(by.as_str())
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn claim_queued(
        &self,
        jobs: &[String],
        daemon: Uuid,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<Run>> {
        // Asked of a reader first: the queue is empty most of the time, and a write costs an fsync.
        let waiting: Option<i64> = sqlx::query_scalar(
            "select 1 from job_runs
             -- the plus: by the queue's index, where job's would read the whole history
             where state = 'queued' and +job in (select value from json_each($1)) limit 1",
        )
        .bind(set(jobs))
        .fetch_optional(&self.readers)
        .await?;
        if waiting.is_none() {
            return Ok(None);
        }
        let jobs = set(jobs);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let row = sqlx::query(concat!(
                        "update job_runs
                         set state = 'running', daemon = $2, started_at = coalesce(started_at, max(scheduled_at, $3)), attempt = attempt + 1
                         where id = (select id from job_runs
                                     where state = 'queued' and +job in (select value from json_each($1))
                                     order by id limit 1)
                         returning ", run_columns!()
                    ))
                    .bind(jobs)
                    .bind(text(daemon))
                    .bind(at(now))
                    .fetch_optional(db)
                    .await?;
                    row.as_ref().map(rows::run).transpose()
                })
            })
            .await
    }

    async fn begin_attempt(&self, run: RunId, attempt: u32) -> StorageResult<()> {
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update job_runs set attempt = $2 where id = $1 and state = 'running'",
                    )
                    .bind(text(run.uuid()))
                    .bind(attempt)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn finish(&self, run: RunId, finish: &Finish) -> StorageResult<()> {
        let finish = finish.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update job_runs set state = $2, counts = $3, error = $4, finished_at = $5, attempt = $6
                         where id = $1 and state = 'running'",
                    )
                    .bind(text(run.uuid()))
                    .bind(finish.state.as_str())
                    .bind(json(&finish.counts))
                    .bind(finish.error)
                    .bind(at(finish.at))
                    .bind(finish.attempt)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn give_back(&self, run: RunId, counts: &Counts, attempt: u32) -> StorageResult<()> {
        let counts = json(counts);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update job_runs set state = 'queued', counts = $2, attempt = $3, daemon = null
                         where id = $1 and state = 'running'",
                    )
                    .bind(text(run.uuid()))
                    .bind(counts)
                    .bind(attempt)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn record(&self, run: &Run) -> StorageResult<()> {
        let run = run.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into job_runs (id, job, scheduled_at, started_at, finished_at, trigger, attempt, daemon, state, counts, error)
                         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
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
                    .bind(run.error)
                    .execute(db)
                    .await?;
                    Ok(())
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

    async fn recover(&self) -> StorageResult<u64> {
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let left = sqlx::query(
                        "update job_runs set state = 'queued', daemon = null where state = 'running'",
                    );
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

    async fn ahead(&self, _now: DateTime<Utc>) -> StorageResult<TimeDelta> {
        // The daemon's own clock is the judge here.
        Ok(TimeDelta::zero())
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
