//! The troubles of the jobs on SQLite. An update that finds nothing to change costs no fsync.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{SqliteStorage, at, changed, set, text};
use crate::storage::alerts::{
    AlertKind, AlertMail, AlertStore, Failures, JobAlert, MailEnd, Success,
};
use crate::storage::{StorageResult, rows};

macro_rules! alert_columns {
    () => {
        "job, kind, since, count, error, last_success, mails, mailed_at, mailing, attempts, reached, claimed_until,
         kind = 'failure' and exists (
             select 1 from purge_guard g
             where g.job = job_alerts.job and g.confirmed_at is null) as waits_for_operator"
    };
}

/// A number as the column keeps it.
fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[async_trait]
impl AlertStore for SqliteStorage {
    async fn watch(&self, jobs: &[String], now: DateTime<Utc>) -> StorageResult<()> {
        let jobs = set(jobs);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "insert into job_alerts (job, kind, since)
                         select j.value, k.column1, $2
                         from json_each($1) j cross join (values ('failure'), ('silence')) k
                         -- without it, the parser takes the conflict for a condition of the join
                         where true
                         on conflict do nothing",
                    )
                    .bind(jobs)
                    .bind(at(now))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn alerts(&self, jobs: &[String]) -> StorageResult<Vec<JobAlert>> {
        let found = sqlx::query(concat!(
            "select ",
            alert_columns!(),
            " from job_alerts where job in (select value from json_each($1)) order by job, kind"
        ))
        .bind(set(jobs))
        .fetch_all(&self.readers)
        .await?;
        found.iter().map(rows::job_alert).collect()
    }

    async fn note_successes(&self, successes: &[Success]) -> StorageResult<()> {
        let news: Vec<_> = successes
            .iter()
            .map(|success| (&success.job, at(success.at), success.ends_failures))
            .collect();
        let news = set(&news);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "with news as materialized (
                             select value ->> 0 as job, value ->> 1 as at, value ->> 2 as ends from json_each($1))
                         update job_alerts as a
                         set last_success = n.at,
                             since = case when a.kind = 'silence' then max(a.since, n.at) else a.since end
                         from news n
                         where a.job = n.job
                           and (a.last_success is null or a.last_success < n.at)
                           and (n.ends or a.kind = 'silence')",
                    )
                    .bind(news)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn note_failures(&self, failures: &[Failures]) -> StorageResult<()> {
        let news: Vec<_> = failures
            .iter()
            .map(|f| (&f.job, number(f.count), at(f.first_at), &f.error))
            .collect();
        let news = set(&news);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "with news as materialized (
                             select value ->> 0 as job, value ->> 1 as count, value ->> 2 as at, value ->> 3 as error
                             from json_each($1))
                         update job_alerts as a
                         set count = case when a.count = 0 or a.last_success >= a.since then 0 else a.count end + n.count,
                             since = case when a.count = 0 or a.last_success >= a.since then n.at else a.since end,
                             error = n.error
                         from news n
                         where a.job = n.job and a.kind = 'failure'",
                    )
                    .bind(news)
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn excuse(&self, jobs: &[String], now: DateTime<Utc>) -> StorageResult<()> {
        let jobs = set(jobs);
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    sqlx::query(
                        "update job_alerts set since = $2
                         where job in (select value from json_each($1)) and kind = 'silence' and since < $2 and mails = 0 and mailing is null",
                    )
                    .bind(jobs)
                    .bind(at(now))
                    .execute(db)
                    .await?;
                    Ok(())
                })
            })
            .await
    }

    async fn claim_mail(
        &self,
        seen: &JobAlert,
        mail: AlertMail,
        daemon: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<JobAlert>> {
        let seen = seen.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
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
                    .bind(seen.job)
                    .bind(seen.kind.as_str())
                    .bind(at(seen.since))
                    .bind(seen.last_success.map(at))
                    .bind(number(seen.mails))
                    .bind(text(daemon))
                    .bind(mail.as_str())
                    .bind(at(until))
                    .bind(set::<String>(&[]))
                    .bind(at(now))
                    .fetch_optional(db)
                    .await?;
                    row.as_ref().map(rows::job_alert).transpose()
                })
            })
            .await
    }

    async fn mail_ended(
        &self,
        job: &str,
        kind: AlertKind,
        daemon: Uuid,
        end: &MailEnd,
    ) -> StorageResult<bool> {
        let (job, end) = (job.to_owned(), end.clone());
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let ended = match end {
                        MailEnd::Told { at: told } => sqlx::query(
                            "update job_alerts
                             set mails = mails + 1, mailed_at = $5, mailing = null, attempts = 0, reached = $4,
                                 claimed_by = null, claimed_until = null
                             where job = $1 and kind = $2 and claimed_by = $3",
                        )
                        .bind(job)
                        .bind(kind.as_str())
                        .bind(text(daemon))
                        .bind(set::<String>(&[]))
                        .bind(at(told)),
                        MailEnd::Forgotten => sqlx::query(
                            "update job_alerts
                             set mails = 0, mailed_at = null, mailing = null, attempts = 0, reached = $4,
                                 claimed_by = null, claimed_until = null
                             where job = $1 and kind = $2 and claimed_by = $3",
                        )
                        .bind(job)
                        .bind(kind.as_str())
                        .bind(text(daemon))
                        .bind(set::<String>(&[])),
                        MailEnd::Again { at: next, reached } => sqlx::query(
                            "update job_alerts
                             set reached = $4, claimed_by = null, claimed_until = $5
                             where job = $1 and kind = $2 and claimed_by = $3",
                        )
                        .bind(job)
                        .bind(kind.as_str())
                        .bind(text(daemon))
                        .bind(set(&reached))
                        .bind(at(next)),
                    };
                    Ok(changed(db, ended).await? == 1)
                })
            })
            .await
    }

    async fn forget(&self, seen: &JobAlert, now: DateTime<Utc>) -> StorageResult<bool> {
        let seen = seen.clone();
        self.writer
            .write(move |db| {
                Box::pin(async move {
                    let forgotten = sqlx::query(
                        "update job_alerts
                         set mails = 0, mailed_at = null, mailing = null, attempts = 0, reached = $6,
                             claimed_by = null, claimed_until = null
                         where job = $1 and kind = $2
                           and since = $3 and last_success is not distinct from $4 and mails = $5
                           and (claimed_by is null or claimed_until <= $7)",
                    )
                    .bind(seen.job)
                    .bind(seen.kind.as_str())
                    .bind(at(seen.since))
                    .bind(seen.last_success.map(at))
                    .bind(number(seen.mails))
                    .bind(set::<String>(&[]))
                    .bind(at(now));
                    Ok(changed(db, forgotten).await? == 1)
                })
            })
            .await
    }
}
