//! The troubles of the jobs on PostgreSQL.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::PgStorage;
use crate::storage::alerts::{
    AlertKind, AlertMail, AlertStore, Failures, JobAlert, MailEnd, Success,
};
use crate::storage::{StorageResult, rows};

macro_rules! alert_columns {
    () => {
        "job, kind, since, count, error, last_success, mails, mailed_at, mailing, attempts, reached, claimed_until,
         kind = 'failure' and exists (
             select from purge_guard g
             where g.job = job_alerts.job and g.confirmed_at is null) as waits_for_operator"
    };
}

/// A number as the column keeps it.
fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[async_trait]
impl AlertStore for PgStorage {
    async fn watch(&self, jobs: &[String], now: DateTime<Utc>) -> StorageResult<()> {
        sqlx::query(
            "insert into job_alerts (job, kind, since)
             select j.name, k.name, $2
             from unnest($1::text[]) j (name) cross join (values ('failure'), ('silence')) k (name)
             -- in one order, since all daemons of an installation may start at once
             order by j.name, k.name
             on conflict do nothing",
        )
        .bind(jobs)
        .bind(now)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn alerts(&self, jobs: &[String]) -> StorageResult<Vec<JobAlert>> {
        let found = sqlx::query(concat!(
            "select ",
            alert_columns!(),
            " from job_alerts where job = any($1) order by job, kind"
        ))
        .bind(jobs)
        .fetch_all(&self.worker)
        .await?;
        found.iter().map(rows::job_alert).collect()
    }

    async fn note_successes(&self, successes: &[Success]) -> StorageResult<()> {
        let jobs: Vec<&str> = successes.iter().map(|success| &*success.job).collect();
        let times: Vec<_> = successes.iter().map(|success| success.at).collect();
        let ends: Vec<_> = successes.iter().map(|s| s.ends_failures).collect();
        sqlx::query(
            "with news as materialized (
                 select a.job, a.kind, n.at
                 from unnest($1::text[], $2::timestamptz[], $3::boolean[]) n (job, at, ends)
                 join job_alerts a on a.job = n.job
                 where (a.last_success is null or a.last_success < n.at)
                   and (n.ends or a.kind = 'silence')
                 -- in one order: other daemons note the same jobs
                 order by a.job, a.kind
                 for update of a)
             update job_alerts a
             set last_success = n.at,
                 since = case when a.kind = 'silence' then greatest(a.since, n.at) else a.since end
             from news n
             where a.job = n.job and a.kind = n.kind",
        )
        .bind(jobs)
        .bind(times)
        .bind(ends)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn note_failures(&self, failures: &[Failures]) -> StorageResult<()> {
        let jobs: Vec<&str> = failures.iter().map(|failed| &*failed.job).collect();
        let counts: Vec<_> = failures.iter().map(|failed| number(failed.count)).collect();
        let times: Vec<_> = failures.iter().map(|failed| failed.first_at).collect();
        let errors: Vec<&str> = failures.iter().map(|failed| &*failed.error).collect();
        sqlx::query(
            "with news as materialized (
                 select a.job, n.count, n.at, n.error
                 from unnest($1::text[], $2::bigint[], $3::timestamptz[], $4::text[]) n (job, count, at, error)
                 join job_alerts a on a.job = n.job
                 where a.kind = 'failure'
                 -- in one order: other daemons note the same jobs
                 order by a.job
                 for update of a)
             update job_alerts a
             set count = case when a.count = 0 or a.last_success >= a.since then 0 else a.count end + n.count,
                 since = case when a.count = 0 or a.last_success >= a.since then n.at else a.since end,
                 error = n.error
             from news n
             where a.job = n.job and a.kind = 'failure'",
        )
        .bind(jobs)
        .bind(counts)
        .bind(times)
        .bind(errors)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn excuse(&self, jobs: &[String], now: DateTime<Utc>) -> StorageResult<()> {
        sqlx::query(
            "update job_alerts set since = $2
             where job = any($1) and kind = 'silence' and since < $2 and mails = 0 and mailing is null",
        )
        .bind(jobs)
        .bind(now)
        .execute(&self.worker)
        .await?;
        Ok(())
    }

    async fn claim_mail(
        &self,
        seen: &JobAlert,
        mail: AlertMail,
        daemon: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<JobAlert>> {
        let row = sqlx::query(concat!(
            "update job_alerts
             set claimed_by = $6, claimed_until = $8, mailing = $7,
                 attempts = case when mailing = $7 then attempts else 0 end + 1,
                 reached = case when mailing = $7 then reached else $9 end
             where job = $1 and kind = $2
               and since = $3 and last_success is not distinct from $4 and mails = $5
               and (claimed_until is null or claimed_until <= $10
                    -- what waited to be told has become untrue, and does not hold this up
                    or (claimed_by is null and mailing <> $7))
             returning ",
            alert_columns!()
        ))
        .bind(&seen.job)
        .bind(seen.kind.as_str())
        .bind(seen.since)
        .bind(seen.last_success)
        .bind(number(seen.mails))
        .bind(daemon)
        .bind(mail.as_str())
        .bind(until)
        .bind(Vec::<String>::new())
        .bind(now)
        .fetch_optional(&self.worker)
        .await?;
        row.as_ref().map(rows::job_alert).transpose()
    }

    async fn mail_ended(
        &self,
        job: &str,
        kind: AlertKind,
        daemon: Uuid,
        end: &MailEnd,
    ) -> StorageResult<bool> {
        let ended = match end {
            MailEnd::Told { at } => sqlx::query(
                "update job_alerts
                 set mails = mails + 1, mailed_at = $5, mailing = null, attempts = 0, reached = $4,
                     claimed_by = null, claimed_until = null
                 where job = $1 and kind = $2 and claimed_by = $3",
            )
            .bind(job)
            .bind(kind.as_str())
            .bind(daemon)
            .bind(Vec::<String>::new())
            .bind(*at),
            MailEnd::Forgotten => sqlx::query(
                "update job_alerts
                 set mails = 0, mailed_at = null, mailing = null, attempts = 0, reached = $4,
                     claimed_by = null, claimed_until = null
                 where job = $1 and kind = $2 and claimed_by = $3",
            )
            .bind(job)
            .bind(kind.as_str())
            .bind(daemon)
            .bind(Vec::<String>::new()),
            MailEnd::Again { at, reached } => sqlx::query(
                "update job_alerts
                 set reached = $4, claimed_by = null, claimed_until = $5
                 where job = $1 and kind = $2 and claimed_by = $3",
            )
            .bind(job)
            .bind(kind.as_str())
            .bind(daemon)
            .bind(reached)
            .bind(*at),
        };
        Ok(ended.execute(&self.worker).await?.rows_affected() == 1)
    }

    async fn forget(&self, seen: &JobAlert, now: DateTime<Utc>) -> StorageResult<bool> {
        let forgotten = sqlx::query(
            "update job_alerts
             set mails = 0, mailed_at = null, mailing = null, attempts = 0, reached = $6,
                 claimed_by = null, claimed_until = null
             where job = $1 and kind = $2
               and since = $3 and last_success is not distinct from $4 and mails = $5
               and (claimed_by is null or claimed_until <= $7)",
        )
        .bind(&seen.job)
        .bind(seen.kind.as_str())
        .bind(seen.since)
        .bind(seen.last_success)
        .bind(number(seen.mails))
        .bind(Vec::<String>::new())
        .bind(now)
        .execute(&self.worker)
        .await?;
        Ok(forgotten.rows_affected() == 1)
    }
}
