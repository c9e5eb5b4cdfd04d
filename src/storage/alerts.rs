//! What is wrong with which job, kept so that it is told once in the whole installation.
//!
//! Two rows a job, one of each [`AlertKind`]. Every daemon adds what it sees and reads what all have
//! seen; what is to be mailed is decided above this, and whoever claims a mail sends it.

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::StorageResult;

crate::domain::closed_set!(
    /// What is wrong with a job.
    AlertKind, "alert kind", {
        /// It fails, several times in a row.
        Failure = "failure",
        /// Its last success is older than it may be.
        Silence = "silence",
    }
);

crate::domain::closed_set!(
    /// What a mail tells.
    AlertMail, "alert mail", {
        /// Something is wrong, or still is.
        Alert = "alert",
        /// It is right again.
        Recovery = "recovery",
    }
);

/// What is known of one kind of trouble of one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobAlert {
    /// The job's name.
    pub job: String,
    /// The kind of trouble.
    pub kind: AlertKind,
    /// Of failures, when the first in the row ended; of silence, the last success, or since when one
    /// is awaited.
    pub since: DateTime<Utc>,
    /// How many failures in a row, also when they are over; see [`JobAlert::failures`].
    pub count: u64,
    /// Why the last of them failed.
    pub error: Option<String>,
    /// When the job last succeeded.
    pub last_success: Option<DateTime<Utc>>,
    /// How many alerts were mailed since the trouble began.
    pub mails: u64,
    /// When the last of them was.
    pub mailed_at: Option<DateTime<Utc>>,
    /// The mail that was begun and has not reached everybody.
    pub mailing: Option<AlertMail>,
    /// How often that was tried.
    pub attempts: u64,
    /// Whom it has reached, or cannot reach: it is not sent there again.
    pub reached: Vec<String>,
    /// Until when it is somebody's, or waits for its next attempt.
    pub claimed_until: Option<DateTime<Utc>>,
    /// Of failures: it is a purge that its guard holds back until an operator confirms it.
    pub waits_for_operator: bool,
}

impl JobAlert {
    /// How many failures in a row there are now.
    #[must_use]
    pub fn failures(&self) -> u64 {
        let is_over = self.last_success.is_some_and(|at| at >= self.since);
        if is_over { 0 } else { self.count }
    }

    /// Whether somebody has been told of the trouble.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.mails > 0 || (self.mailing == Some(AlertMail::Alert) && !self.reached.is_empty())
    }
}

/// A job succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Success {
    /// The job's name.
    pub job: String,
    /// When.
    pub at: DateTime<Utc>,
    /// Whether this speaks for the whole installation, and not only for the daemon that ran it.
    pub ends_failures: bool,
}

/// Failures of a job with no success between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failures {
    /// The job's name.
    pub job: String,
    /// How many.
    pub count: u64,
    /// When the first of them ended.
    pub first_at: DateTime<Utc>,
    /// Why the last of them failed.
    pub error: String,
}

/// How an attempt to mail ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MailEnd {
    /// The alert is with everybody.
    Told {
        /// When.
        at: DateTime<Utc>,
    },
    /// The recovery is with everybody: the trouble is forgotten.
    Forgotten,
    /// Somebody is still to be reached.
    Again {
        /// Not before.
        at: DateTime<Utc>,
        /// Who is not.
        reached: Vec<String>,
    },
}

/// The troubles of the jobs.
#[async_trait]
pub trait AlertStore: Send + Sync + 'static {
    /// Begins to watch those of `jobs` that are not watched so far.
    async fn watch(&self, jobs: &[String], now: DateTime<Utc>) -> StorageResult<()>;

    /// What is known of `jobs`.
    async fn alerts(&self, jobs: &[String]) -> StorageResult<Vec<JobAlert>>;

    /// Jobs succeeded, each at most once in the list; what is older than a known success is no news.
    async fn note_successes(&self, successes: &[Success]) -> StorageResult<()>;

    /// Jobs failed, each at most once in the list; they count anew where a job succeeded since its
    /// failures before.
    async fn note_failures(&self, failures: &[Failures]) -> StorageResult<()>;

    /// Nothing is expected of `jobs` before `now`, since they are paused; what has been mailed of
    /// their silence stays open until they succeed.
    async fn excuse(&self, jobs: &[String], now: DateTime<Utc>) -> StorageResult<()>;

    /// Claims a mail for `daemon` until then, if the trouble stands as it was `seen` and nobody else
    /// is at it. A mail of another sort than the one that was begun reaches everybody anew.
    async fn claim_mail(
        &self,
        seen: &JobAlert,
        mail: AlertMail,
        daemon: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<JobAlert>>;

    /// Writes how the mail ended that `daemon` has claimed. `false`: it was no longer its.
    async fn mail_ended(
        &self,
        job: &str,
        kind: AlertKind,
        daemon: Uuid,
        end: &MailEnd,
    ) -> StorageResult<bool>;

    /// Forgets a trouble without a mail, if it stands as it was `seen` and nobody is at it.
    async fn forget(&self, seen: &JobAlert, now: DateTime<Utc>) -> StorageResult<bool>;
}
