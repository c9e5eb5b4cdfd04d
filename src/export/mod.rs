//! Exports: whatever asks for one only adds a row to the queue; the [`Exporter`] serves it.
//!
//! Two things go on side by side, since a slow mail server must not hold up rendering: a timeline
//! becomes a file, and a file becomes mails. Both claim their work in the database for a while and
//! renew the claim as they go, so a worker that dies loses nothing, and one that stops gives back
//! what it holds without an attempt being spent.

mod csv;
mod deliver;
mod file;
mod jsonl;
mod letter;
mod link;
mod outage;
mod packed;
mod pdf;
mod render;
mod time;
mod words;
mod writer;
mod xlsx;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use lettre::message::Mailbox;
use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::{ExportFormat, Uncertain};
use crate::domain::{Clock, ExportId, closed_set};
use crate::jobs::retry::RetryPolicy;
use crate::mail::Mailer;
use crate::storage::{Export, ExportStore, StorageResult};
use crate::telemetry::chain;
pub use csv::Column;
use deliver::Hold;
pub use link::{LinkKey, link_hash};
use outage::Outage;
pub use pdf::Paper;

/// Other processes add rows too, and cannot wake this one. Not each second: two such looks would be half
/// of what an idle daemon asks of a server.
const LOOK_AGAIN: Duration = Duration::from_secs(3);
/// How often files that are past their time are looked for.
const EXPIRY_EVERY: TimeDelta = TimeDelta::minutes(1);
/// Files that are expired in one go.
const EXPIRY_BATCH: u32 = 100;
/// Giving back claims must not hold up the end of the daemon: they lapse by themselves.
const RELEASE: Duration = Duration::from_secs(5);
/// A full disk is seldom freed within seconds, hence a longer first wait than a job's.
const RENDER_RETRY: RetryPolicy = RetryPolicy {
    attempts: NonZeroU32::new(5).expect("five is not zero"),
    first: Duration::from_secs(30),
    max: Duration::from_mins(5),
};

closed_set!(
    /// What an export is written as.
    Format, "format of an export", {
        /// RFC 4180.
        Csv = "csv",
        /// A document for people; several in a ZIP, where the timeline is long.
        Pdf = "pdf",
        /// The same, packed by gzip.
        CsvGz = "csv.gz",
        /// The same, packed by Zstandard.
        CsvZst = "csv.zst",
        /// An event a line, complete: what `timelined events import` reads.
        Jsonl = "jsonl",
        /// The same, packed by gzip.
        JsonlGz = "jsonl.gz",
        /// The same, packed by Zstandard.
        JsonlZst = "jsonl.zst",
        /// A workbook.
        Xlsx = "xlsx",
    }
);

/// How the text of a file is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    None,
    Gzip,
    Zstd,
}

/// The fields whose content an export can leave out.
pub const REDACTABLE: [&str; 7] = [
    "title",
    "description",
    "payload",
    "metadata",
    "session_id",
    "triggered_by",
    "integration_source",
];

/// The `Message-ID`s of an export's mails, without angle brackets: fixed before the first try, so
/// that a repeat is seen as one.
#[must_use]
pub fn message_ids(export: ExportId, recipients: usize) -> Vec<String> {
    (1..=recipients)
        .map(|number| format!("{export}.{number}@timelined"))
        .collect()
}

impl From<ExportFormat> for Format {
    fn from(format: ExportFormat) -> Self {
        match format {
            ExportFormat::Csv => Self::Csv,
            ExportFormat::Pdf => Self::Pdf,
            ExportFormat::CsvGz => Self::CsvGz,
            ExportFormat::CsvZst => Self::CsvZst,
            ExportFormat::Jsonl => Self::Jsonl,
            ExportFormat::JsonlGz => Self::JsonlGz,
            ExportFormat::JsonlZst => Self::JsonlZst,
            ExportFormat::Xlsx => Self::Xlsx,
        }
    }
}

/// What lies in an export's file, which its name tells: a format may end in more than one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// RFC 4180.
    Csv,
    /// A document.
    Pdf,
    /// Documents with a manifest.
    Zip,
    /// The same, packed by gzip.
    CsvGz,
    /// The same, packed by Zstandard.
    CsvZst,
    /// An event a line.
    Jsonl,
    /// The same, packed by gzip.
    JsonlGz,
    /// The same, packed by Zstandard.
    JsonlZst,
    /// A workbook.
    Xlsx,
    /// A row from elsewhere names something else.
    Other,
}

impl FileKind {
    /// By what follows the first dot.
    #[must_use]
    pub fn of(file_name: &str) -> Self {
        match file_name.split_once('.') {
            Some((_, "csv")) => Self::Csv,
            Some((_, "pdf")) => Self::Pdf,
            Some((_, "zip")) => Self::Zip,
            Some((_, "csv.gz")) => Self::CsvGz,
            Some((_, "csv.zst")) => Self::CsvZst,
            Some((_, "jsonl")) => Self::Jsonl,
            Some((_, "jsonl.gz")) => Self::JsonlGz,
            Some((_, "jsonl.zst")) => Self::JsonlZst,
            Some((_, "xlsx")) => Self::Xlsx,
            _ => Self::Other,
        }
    }

    /// The media type, RFC 7111 for CSV.
    /// The media type: RFC 7111 for CSV, 6713 for gzip, 8878 for Zstandard.
    #[must_use]
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv; charset=utf-8; header=present",
            Self::Pdf => "application/pdf",
            Self::Zip => "application/zip",
            // Not a content encoding: whoever asked for a packed file keeps a packed file.
            Self::CsvGz | Self::JsonlGz => "application/gzip",
            Self::CsvZst | Self::JsonlZst => "application/zstd",
            // There is no registered one so far.
            Self::Jsonl => "application/x-ndjson",
            Self::Xlsx => "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
            Self::Other => "application/octet-stream",
        }
    }

    /// The end of the file's name, without the dot.
    #[must_use]
    pub fn extension(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::Pdf => "pdf",
            Self::Zip => "zip",
            Self::CsvGz => "csv.gz",
            Self::CsvZst => "csv.zst",
            Self::Jsonl => "jsonl",
            Self::JsonlGz => "jsonl.gz",
            Self::JsonlZst => "jsonl.zst",
            Self::Xlsx => "xlsx",
            Self::Other => "bin",
        }
    }
}

/// Where the file of that name lies. Rows may come from elsewhere, and a name must not lead out of
/// the directory: `None` where it names no file.
#[must_use]
pub fn file_path(directory: &Path, name: &str) -> Option<PathBuf> {
    Some(directory.join(Path::new(name).file_name()?))
}

/// What an [`Exporter`] is told by the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where files lie; made 0700 if need be, and this daemon's own.
    pub directory: PathBuf,
    /// How long files are kept.
    pub keep: Duration,
    /// What links begin with, without a slash at the end.
    pub public_url: String,
    /// What links are derived from.
    pub link_key: LinkKey,
    /// Who claims: an id made at the daemon's start.
    pub worker: Uuid,
    /// The sender of every mail.
    pub from: Mailbox,
    /// The largest file that a mail carries, in bytes.
    pub max_attachment: u64,
    /// How documents are made.
    pub paper: Paper,
    /// What becomes of a mail that may or may not have been taken.
    pub uncertain: Uncertain,
}

/// Serves the export queue.
pub struct Exporter {
    store: Arc<dyn ExportStore>,
    mailer: Arc<Mailer>,
    clock: Arc<dyn Clock>,
    settings: Settings,
    wake: Arc<Notify>,
    /// Notified when a file is there.
    mail_due: Notify,
    /// An export that is claimed and waits for the database to come back.
    waiting: Mutex<Option<Export>>,
    hold: Mutex<Hold>,
    outage: Outage,
    /// When files were last expired.
    expired_at: Mutex<Option<DateTime<Utc>>>,
}

/// What the worker does side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duty {
    Render,
    Mail,
    Expire,
}

/// What one look at the queue came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There may be more.
    Worked,
    /// Nothing is due.
    Idle,
}

impl Exporter {
    /// A worker on `store`. Whoever adds an export calls `wake.notify_one()`.
    #[must_use]
    pub fn new(
        store: Arc<dyn ExportStore>,
        mailer: Arc<Mailer>,
        clock: Arc<dyn Clock>,
        settings: Settings,
        wake: Arc<Notify>,
    ) -> Self {
        Self {
            store,
            mailer,
            clock,
            settings,
            wake,
            mail_due: Notify::new(),
            waiting: Mutex::default(),
            hold: Mutex::default(),
            outage: Outage::default(),
            expired_at: Mutex::default(),
        }
    }

    /// Serves until `stop`; then rendering ends at the next page and a mail in flight within its
    /// timeouts. `abort` ends at once. Either way what is claimed is given back.
    pub async fn run(self, stop: CancellationToken, abort: CancellationToken) {
        let serve = async {
            tokio::join!(
                self.serve(Duty::Render, &stop),
                self.serve(Duty::Mail, &stop),
                self.serve(Duty::Expire, &stop),
            );
        };
        tokio::select! {
            biased;
            () = abort.cancelled() => {}
            () = serve => {}
        }
        self.release().await;
    }

    async fn serve(&self, duty: Duty, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            let wait = match self.look(duty, stop).await {
                Ok(step) => {
                    self.outage.over(duty);
                    if step == Step::Worked {
                        continue;
                    }
                    LOOK_AGAIN
                }
                Err(error) => {
                    // A wake-up does not bring the database back.
                    let wait = self.outage.note(duty, &error);
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = sleep(wait) => continue,
                    }
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.woken(duty) => {}
                () = sleep(wait) => {}
            }
        }
    }

    async fn woken(&self, duty: Duty) {
        match duty {
            Duty::Render => {
                self.wake.notified().await;
                // What was added may as well be a mail to be sent again.
                self.mail_due.notify_one();
            }
            Duty::Mail => self.mail_due.notified().await,
            Duty::Expire => std::future::pending().await,
        }
    }

    async fn look(&self, duty: Duty, stop: &CancellationToken) -> StorageResult<Step> {
        match duty {
            Duty::Render => self.render_next(stop).await,
            Duty::Mail => self.mail_next(stop).await,
            Duty::Expire => self.expire().await,
        }
    }

    async fn render_next(&self, stop: &CancellationToken) -> StorageResult<Step> {
        let waiting = locked(&self.waiting).take();
        let now = self.clock.now();
        let export = if let Some(export) = waiting {
            Some(export)
        } else {
            let until = now + render::CLAIM;
            self.store
                .claim_render(self.settings.worker, now, until)
                .await?
        };
        let Some(export) = export else {
            return Ok(Step::Idle);
        };
        if let Err(error) = self.render(&export, stop).await {
            *locked(&self.waiting) = Some(export);
            return Err(error);
        }
        Ok(Step::Worked)
    }

    /// Deletes the files that are past their time, and what crashes left unfinished.
    async fn expire(&self) -> StorageResult<Step> {
        let now = self.clock.now();
        let is_early = locked(&self.expired_at)
            // A clock that was set back must not stop the expiry.
            .is_some_and(|last| now >= last && now < last + EXPIRY_EVERY);
        if is_early {
            return Ok(Step::Idle);
        }
        self.sweep().await;
        let old = self.store.old_files(now, EXPIRY_BATCH).await?;
        let mut gone = Vec::with_capacity(old.len());
        for file in old {
            let Some(path) = file_path(&self.settings.directory, &file.name) else {
                // It names no file, hence nothing is left of it.
                gone.push(file);
                continue;
            };
            match spawn_blocking(move || file::remove(&path)).await {
                Ok(Ok(())) => gone.push(file),
                // Its name stays in the queue, and it is tried again.
                Ok(Err(error)) => {
                    tracing::warn!(%error, "an expired export's file could not be deleted");
                }
                Err(error) => {
                    tracing::warn!(%error, "deleting an expired export's file ended early");
                }
            }
        }
        let count = gone.len();
        if count > 0 {
            self.store.expire(&gone).await?;
            tracing::info!(count, "deleted the files of {count} expired exports");
        }
        // Where a file withstands, the next round comes in a minute.
        if count == EXPIRY_BATCH as usize {
            return Ok(Step::Worked);
        }
        *locked(&self.expired_at) = Some(now);
        Ok(Step::Idle)
    }

    /// Removes what crashes left unfinished. Another worker may be at work in the directory, such as
    /// `timelined export` beside a daemon: what it writes changes while its claim lasts.
    async fn sweep(&self) {
        let directory = self.settings.directory.clone();
        let abandoned = render::CLAIM.to_std().unwrap_or_default();
        match spawn_blocking(move || file::sweep(&directory, abandoned)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => tracing::info!(removed, "removed unfinished exports"),
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot remove unfinished exports from export.directory");
            }
            Err(error) => tracing::warn!(%error, "removing unfinished exports ended early"),
        }
    }

    async fn release(&self) {
        let release = self.store.release(self.settings.worker);
        match timeout(RELEASE, release).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                let error = chain(&error);
                tracing::warn!(
                    error,
                    "claims of exports could not be given back; they lapse"
                );
            }
            Err(_elapsed) => {
                tracing::warn!("claims of exports were not given back in time; they lapse");
            }
        }
    }

    /// Writes down an end that would otherwise be forgotten, such as that a mail is sent: tries until
    /// the database answers. During a stop once more, and not again.
    async fn insist<F>(&self, duty: Duty, stop: &CancellationToken, mut write: impl FnMut() -> F)
    where
        F: Future<Output = StorageResult<()>>,
    {
        loop {
            let error = match write().await {
                Ok(()) => return,
                Err(error) => error,
            };
            if stop.is_cancelled() {
                let error = chain(&error);
                tracing::error!(
                    error,
                    "how an export or its mail ended could not be noted; it may come again"
                );
                return;
            }
            let wait = self.outage.note(duty, &error);
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(wait) => {}
            }
        }
    }
}

/// `wait` after `now`; far in the future where that cannot be represented.
fn after(now: DateTime<Utc>, wait: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(wait)
        .ok()
        .and_then(|wait| now.checked_add_signed(wait))
        .map_or(DateTime::<Utc>::MAX_UTC, crate::domain::micros)
}

/// What a panicked task left behind is whole: each change is a single assignment.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let path = |name| file_path(Path::new("/exports"), name);
        let inside = Some(PathBuf::from("/exports/a.csv"));
        for name in ["a.csv", "../a.csv", "/etc/a.csv", "x/../a.csv"] {
            assert_eq!(path(name), inside, "{name}");
        }
        for name in ["", "..", "/", "a/.."] {
            assert_eq!(path(name), None, "{name}");
        }
    }

    #[test]
    fn an_unknown_format_is_told_the_known_ones() {
        assert_eq!("csv".parse(), Ok(Format::Csv));
        assert_eq!(
            "doc".parse::<Format>().unwrap_err().to_string(),
            "\"doc\" is not a format of an export; allowed: csv pdf csv.gz csv.zst jsonl jsonl.gz jsonl.zst xlsx"
        );
    }

    #[test]
    fn the_name_of_a_file_tells_what_lies_in_it() {
        for format in Format::ALL {
            let kind = FileKind::of(&format!("0190b5f0-7c1e-7d3a-8f00-000000000001.{format}"));
            assert_eq!(kind.extension(), format.as_str());
        }
        assert_eq!(FileKind::of("a.csv.exe"), FileKind::Other);
    }
}
