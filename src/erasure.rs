//! Erasure: everything of a contact goes for good, and a ledger says who asked, when and how much.
//!
//! The ledger stands in the database and, since a backup that is restored knows nothing of what was
//! erased after it, beside the database too: each daemon keeps a [`Book`] in its state directory, into
//! which it copies what any daemon erased. [`Eraser::replay`] does again what a book has.

mod book;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use book::Book;

use crate::domain::{Clock, ContactId, ErasureId, ExportId, Subject, TenantId};
use crate::jobs::{FIRST_BATCH, next_batch};
use crate::live::Hub;
use crate::storage::{
    Erasure, ErasureState, ErasureStore, JobLedger, StorageError, StorageResult, Survey,
};
use crate::telemetry::chain;
use crate::timeline::Refusal;

/// How often a daemon looks for what others erased, and for what a daemon that died left.
const LOOK_EVERY: Duration = Duration::from_mins(1);
/// An erasure that began so long ago and did not end was left by a daemon that died. Two that work on
/// the same do no harm.
const ABANDONED: TimeDelta = TimeDelta::minutes(10);
/// How far clocks of daemons, and the ends of their transactions, may lie apart.
const OVERLAP: TimeDelta = TimeDelta::hours(1);

/// What an [`Eraser`] is made of.
#[derive(Clone)]
pub struct EraserParts {
    /// What is erased, and the ledger.
    pub store: Arc<dyn ErasureStore>,
    /// Whose clock says when.
    pub ledger: Arc<dyn JobLedger>,
    /// Who watches here.
    pub hub: Arc<Hub>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// Where files of exports lie.
    pub exports: PathBuf,
    /// Where mails lie, if they go into a directory.
    pub outbox: Option<PathBuf>,
    /// How long a transaction should take: batches grow and shrink towards it.
    pub batch_time: Duration,
    /// Whether no other daemon works on this database: then what is unfinished at the start was left.
    pub is_alone: bool,
    /// Erasures go on in it when whoever asked goes away.
    pub tracker: TaskTracker,
    /// Ends them between two batches; what is left goes on at the next start.
    pub stop: CancellationToken,
}

/// Erases contacts.
pub struct Eraser {
    parts: EraserParts,
    book: Book,
}

/// An erasure that a replay did again, or not.
pub struct Replayed {
    /// As the book has it.
    pub erasure: Erasure,
    /// How many events went this time.
    pub done: StorageResult<u64>,
}

impl Eraser {
    /// An eraser that writes into `book`.
    #[must_use]
    pub fn new(parts: EraserParts, book: Book) -> Self {
        Self { parts, book }
    }

    /// Erases a contact. When this returns, nothing of it is left in the database and on this
    /// machine; other daemons delete their files within two minutes. It goes on when the caller does
    /// not wait for it.
    ///
    /// # Errors
    /// [`Refusal::Held`] where a hold keeps anything of the contact, and then nothing is erased; or,
    /// where the hold came meanwhile, what was not erased until then stays.
    pub async fn erase(
        self: &Arc<Self>,
        tenant: &TenantId,
        contact: ContactId,
        by: &Subject,
    ) -> Result<Erasure, Refusal> {
        let Survey { is_held, newest } = self.parts.store.survey(tenant, contact).await?;
        if is_held {
            return Err(Refusal::Held);
        }
        let now = self.parts.ledger.now().await?;
        let erasure = Erasure {
            id: ErasureId::generate(now),
            tenant_id: tenant.clone(),
            contact_id: contact,
            requested_by: by.clone(),
            requested_at: now,
            // Another daemon's clock may have been ahead.
            up_to: newest.map_or(now, |newest| newest.max(now)),
            state: ErasureState::Running,
            events: 0,
            exports: Vec::new(),
            finished_at: None,
        };
        let (eraser, by) = (self.clone(), by.clone());
        let work = self.parts.tracker.spawn(async move {
            let begun = eraser
                .parts
                .store
                .begin_erasure(&erasure, "contact_erased", &by, now)
                .await?;
            Ok(eraser.carry_out(begun).await?.0)
        });
        // It panicked, and the hook has said so: what is left goes on later.
        let done = work.await.unwrap_or(Err(StorageError::Closed));
        Ok(done?)
    }

    /// Does what is left of an erasure that was written down. Answers how many events went, too.
    async fn carry_out(&self, begun: Erasure) -> StorageResult<(Erasure, u64)> {
        let parts = &self.parts;
        self.delete_files(&begun).await;
        let (mut limit, mut events) = (FIRST_BATCH, 0);
        let state = loop {
            if parts.stop.is_cancelled() {
                return Err(StorageError::Closed);
            }
            let began = Instant::now();
            let erased = match parts.store.erase_some(&begun, limit).await {
                Err(StorageError::Held) => break ErasureState::Held,
                erased => erased?,
            };
            if erased.is_empty() {
                break ErasureState::Done;
            }
            events += erased.len() as u64;
            let (tenant, contact) = (&begun.tenant_id, begun.contact_id);
            parts
                .hub
                .tell_erased(tenant, contact, &erased, parts.clock.now());
            let took = began.elapsed();
            limit = next_batch(limit, took, parts.batch_time);
            // Others get the database for as long.
            sleep(took.min(parts.batch_time)).await;
        };
        let now = parts.ledger.now().await?;
        let ended = parts.store.finish_erasure(&begun, state, now).await?;
        self.delete_files(&ended).await;
        tracing::info!(
            erasure.id = %ended.id, tenant.id = %ended.tenant_id, events,
            exports = ended.exports.len(), state = %ended.state, "erased a contact"
        );
        if state == ErasureState::Held {
            return Err(StorageError::Held);
        }
        self.note(vec![ended.clone()]).await;
        Ok((ended, events))
    }

    /// Deletes the files and mails of the exports that went. What cannot be deleted is told, and tried
    /// again at the next start.
    async fn delete_files(&self, erasure: &Erasure) -> bool {
        if erasure.exports.is_empty() {
            return true;
        }
        let mut directories = vec![self.parts.exports.clone()];
        directories.extend(self.parts.outbox.clone());
        let exports = erasure.exports.clone();
        let deleted = spawn_blocking(move || {
            (directories.iter()).try_for_each(|directory| delete_files(directory, &exports))
        });
        match deleted.await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::error!(%error, erasure.id = %erasure.id, "files of an erased contact could not be deleted");
                false
            }
            Err(error) => {
                tracing::error!(%error, erasure.id = %erasure.id, "deleting files of an erased contact ended early");
                false
            }
        }
    }

    /// Writes erasures into the book, unless it has them.
    async fn note(&self, erasures: Vec<Erasure>) {
        let book = self.book.clone();
        match spawn_blocking(move || book.append(&erasures)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let path = self.book.path().display().to_string();
                tracing::error!(%error, path, "the ledger of erasures could not be written; it will be tried again");
            }
            Err(error) => tracing::error!(%error, "writing the ledger of erasures ended early"),
        }
    }

    /// Looks each minute, until the end.
    pub async fn run(self: Arc<Self>) {
        let stop = self.parts.stop.clone();
        let mut seen = DateTime::UNIX_EPOCH;
        let mut abandoned = if self.parts.is_alone {
            TimeDelta::zero()
        } else {
            ABANDONED
        };
        while !stop.is_cancelled() {
            let looked = self.catch_up(seen, abandoned).await;
            abandoned = ABANDONED;
            match looked {
                Ok(newest) => seen = newest,
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "cannot look for erasures; again in a minute"
                    );
                }
            }
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// Goes on with what began so long ago and was left, and copies into the book what ended since `seen`, after the
    /// files of it that lie here are deleted. Answers until when it has seen.
    async fn catch_up(
        &self,
        seen: DateTime<Utc>,
        abandoned: TimeDelta,
    ) -> StorageResult<DateTime<Utc>> {
        let now = self.parts.ledger.now().await?;
        let left = self.parts.store.unfinished_erasures(now - abandoned);
        for erasure in left.await? {
            tracing::info!(erasure.id = %erasure.id, "goes on with an erasure that was left");
            match self.carry_out(erasure).await {
                Ok(_) | Err(StorageError::Held) => {}
                Err(error) => return Err(error),
            }
        }
        let since = seen.checked_sub_signed(OVERLAP).unwrap_or(seen);
        let ended = self.parts.store.erasures(since).await?;
        let mut fresh = Vec::new();
        for erasure in ended {
            let is_new = erasure.state == ErasureState::Done && !self.book.has(erasure.id);
            if is_new && self.delete_files(&erasure).await {
                fresh.push(erasure);
            }
        }
        if !fresh.is_empty() {
            self.note(fresh).await;
        }
        Ok(now)
    }

    /// The erasures of the book that the database does not have, as after a restore.
    ///
    /// # Errors
    /// Those of storage.
    pub async fn missing(&self) -> StorageResult<Vec<Erasure>> {
        let known = self.parts.store.erasures(DateTime::UNIX_EPOCH).await?;
        let known: std::collections::HashSet<ErasureId> =
            known.into_iter().map(|erasure| erasure.id).collect();
        let mut noted = self.book.erasures();
        noted.retain(|erasure| !known.contains(&erasure.id));
        Ok(noted)
    }

    /// Erases again what the book says was erased, of what was recorded until then; and ends what was
    /// left. Harmless where it was done.
    ///
    /// # Errors
    /// Those of storage; that a hold keeps one of them is told with it, and the others go on.
    pub async fn replay(&self, by: &Subject) -> StorageResult<Vec<Replayed>> {
        let now = self.parts.ledger.now().await?;
        let mut again = self.book.erasures();
        again.extend(self.parts.store.unfinished_erasures(now).await?);
        let mut replayed = Vec::with_capacity(again.len());
        for erasure in again {
            let done = match self.replay_one(&erasure, by, now).await {
                Err(error) if !matches!(error, StorageError::Held) => return Err(error),
                done => done,
            };
            replayed.push(Replayed { erasure, done });
        }
        Ok(replayed)
    }

    async fn replay_one(
        &self,
        erasure: &Erasure,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<u64> {
        let store = &self.parts.store;
        let survey = store.survey(&erasure.tenant_id, erasure.contact_id);
        if survey.await?.is_held {
            return Err(StorageError::Held);
        }
        let again = Erasure {
            events: 0,
            ..erasure.clone()
        };
        let begun = store.begin_erasure(&again, "erasure_replayed", by, now);
        Ok(self.carry_out(begun.await?).await?.1)
    }
}

/// Deletes what belongs to exports: `<export>.…`, or hidden while it is written.
fn delete_files(directory: &Path, exports: &[ExportId]) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let owner = name.trim_start_matches('.').split('.').next();
        let belongs = owner
            .and_then(|owner| owner.parse::<ExportId>().ok())
            .is_some_and(|owner| exports.contains(&owner));
        if belongs {
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_files_of_the_exports_go() {
        let home = tempfile::tempdir().unwrap();
        let [mine, other] = [
            "0190b5f0-7c1e-7d3a-8f00-00000000000a",
            "0190b5f0-7c1e-7d3a-8f00-00000000000b",
        ];
        let names = |id| {
            [
                format!("{id}.csv"),
                format!("{id}.w.part"),
                format!("{id}.1.eml"),
                format!(".{id}.2.eml.part"),
            ]
        };
        for name in names(mine)
            .into_iter()
            .chain(names(other))
            .chain(["alert.eml".to_owned()])
        {
            fs::write(home.path().join(name), "").unwrap();
        }
        delete_files(home.path(), &[mine.parse().unwrap()]).unwrap();
        let mut left: Vec<_> = fs::read_dir(home.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let mut expected = Vec::from(names(other));
        expected.push("alert.eml".to_owned());
        expected.sort();
        assert_eq!(left, expected);
        delete_files(&home.path().join("none"), &[mine.parse().unwrap()]).unwrap();
    }
}
