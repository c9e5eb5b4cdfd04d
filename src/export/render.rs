//! Rendering: the timeline in keyset pages, each a short read of its own, into a file.
//!
//! What was recorded after the export was asked for is not part of it, so the pages agree with each
//! other without a snapshot held open for minutes; memory holds one page.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use chrono::TimeDelta;
use futures_util::FutureExt;
use tokio::task::{JoinError, spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::csv::Sheet;
use super::file::{PartFile, Written};
use super::{Duty, Exporter, Format};
use crate::domain::UnknownKind;
use crate::storage::{Export, Rendered, StorageError, StorageResult};
use crate::telemetry::chain;

/// Events in a page: some 200 KB as a rule, and 32 MB where each is as large as it may be.
const PAGE: u32 = 200;
/// How long a claim lasts unless it is renewed; a page takes seconds at the very worst.
pub(super) const CLAIM: TimeDelta = TimeDelta::seconds(60);
/// Between two renewals, which tell the progress too: an fsync at each page would cost half the speed.
const RENEWAL: TimeDelta = TimeDelta::milliseconds(250);

/// How rendering ended, errors aside.
enum Ending {
    /// The file is there and the queue knows it.
    Finished(Rendered, Notes),
    /// Somebody ended the export, or another worker has taken it.
    Lost,
    /// The daemon is stopping.
    Stopped,
}

/// What is told of a file beside the row.
struct Notes {
    guarded_cells: u64,
}

#[derive(Debug, thiserror::Error)]
enum RenderError {
    /// Passes by itself or stops everything: the export waits, and no attempt is spent.
    #[error(transparent)]
    Away(StorageError),
    /// Another attempt would end the same way.
    #[error(transparent)]
    Unknown(#[from] UnknownKind),
    #[error("the export cannot be read from the database")]
    Storage(#[source] StorageError),
    #[error("the file cannot be written")]
    File(#[from] std::io::Error),
    #[error("rendering panicked")]
    Panicked,
}

impl From<StorageError> for RenderError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Corrupt { .. } | StorageError::Database(_) => Self::Storage(error),
            away => Self::Away(away),
        }
    }
}

impl From<JoinError> for RenderError {
    fn from(_panicked: JoinError) -> Self {
        // The panic's message may hold content; the hook has written where it happened.
        Self::Panicked
    }
}

impl Exporter {
    /// Renders one claimed export and writes down how that ended.
    ///
    /// # Errors
    /// The database is away: the same call again, when it is back.
    pub(super) async fn render(
        &self,
        export: &Export,
        stop: &CancellationToken,
    ) -> StorageResult<()> {
        let began = self.clock.now();
        let rendering = AssertUnwindSafe(self.try_render(export, stop)).catch_unwind();
        let ended = rendering.await.unwrap_or(Err(RenderError::Panicked));
        let elapsed_ms = (self.clock.now() - began).num_milliseconds();
        let error = match ended {
            Ok(Ending::Finished(Rendered { rows, bytes, .. }, Notes { guarded_cells })) => {
                tracing::info!(
                    export.id = %export.id, tenant.id = %export.tenant_id, export.attempt = export.attempt,
                    rows, bytes, guarded_cells, elapsed_ms, "exported {rows} events"
                );
                return Ok(());
            }
            Ok(Ending::Lost) => {
                tracing::info!(
                    export.id = %export.id, tenant.id = %export.tenant_id, elapsed_ms,
                    "an export was cancelled or taken by another worker"
                );
                return Ok(());
            }
            Ok(Ending::Stopped) => return Ok(()),
            Err(RenderError::Away(error)) => return Err(error),
            Err(error) => error,
        };
        let now = self.clock.now();
        let wait = match &error {
            RenderError::Unknown(_) => None,
            _ => super::RENDER_RETRY.delay(export.attempt, rand::random()),
        };
        let next_attempt_at = wait.map(|wait| super::after(now, wait));
        let error = chain(&error);
        if next_attempt_at.is_some() {
            tracing::warn!(
                export.id = %export.id, tenant.id = %export.tenant_id, export.attempt = export.attempt,
                elapsed_ms, error, "an export could not be rendered and will be tried again"
            );
        } else {
            tracing::error!(
                export.id = %export.id, tenant.id = %export.tenant_id, export.attempt = export.attempt,
                elapsed_ms, error, "an export failed"
            );
        }
        let worker = self.settings.worker;
        let note = || {
            self.store
                .render_failed(export, worker, &error, next_attempt_at, now)
        };
        self.insist(Duty::Render, stop, note).await;
        Ok(())
    }

    async fn try_render(
        &self,
        export: &Export,
        stop: &CancellationToken,
    ) -> Result<Ending, RenderError> {
        let Format::Csv = export.request.format.parse()?;
        let sheet = Arc::new(Sheet::of(&export.request)?);
        // One instant for all pages, so that what expires meanwhile is in all or in none.
        let now = self.clock.now();
        let total = self.store.count_rows(export, now).await?;
        if !self.keep_claim(export, 0, total).await? {
            return Ok(Ending::Lost);
        }
        let name = format!("{}.{}", export.id, Format::Csv.extension());
        let mut file = self.begin(&name, sheet.clone()).await?;
        let (mut rows, mut guarded_cells, mut after) = (0, 0, None);
        let mut renewed_at = now;
        loop {
            if stop.is_cancelled() {
                return Ok(Ending::Stopped);
            }
            let page = self.store.rows(export, after, now, PAGE).await?;
            let (count, next) = (page.events.len() as u64, page.next);
            let guarded;
            (file, guarded) = append(file, sheet.clone(), page.events).await?;
            rows += count;
            guarded_cells += guarded;
            after = next;
            if after.is_none() {
                break;
            }
            let at = self.clock.now();
            // Also where the clock stepped back.
            if (at - renewed_at).abs() >= RENEWAL {
                if !self.keep_claim(export, rows, total.max(rows)).await? {
                    return Ok(Ending::Lost);
                }
                renewed_at = at;
            }
        }
        let Written { bytes, sha256 } = spawn_blocking(move || file.finish()).await??;
        let at = self.clock.now();
        let rendered = Rendered {
            rows,
            bytes,
            sha256,
            file_name: name,
            at,
            expires_at: super::after(at, self.settings.keep),
        };
        if self
            .store
            .rendered(export, self.settings.worker, &rendered)
            .await?
        {
            self.mail_due.notify_one();
            return Ok(Ending::Finished(rendered, Notes { guarded_cells }));
        }
        // Whoever took the claim over writes, or has written, the same name: only a file that
        // nobody will come for is removed.
        let found = self.store.find(&export.tenant_id, export.id).await?;
        if found.is_none_or(|found| found.state == crate::storage::ExportState::Cancelled) {
            let path = self.settings.directory.join(&rendered.file_name);
            spawn_blocking(move || super::file::remove(&path)).await??;
        }
        Ok(Ending::Lost)
    }

    async fn keep_claim(&self, export: &Export, rows: u64, total: u64) -> StorageResult<bool> {
        let until = self.clock.now() + CLAIM;
        self.store
            .progress(export, self.settings.worker, rows, total, until)
            .await
    }

    async fn begin(&self, name: &str, sheet: Arc<Sheet>) -> Result<PartFile, RenderError> {
        let (directory, name) = (self.settings.directory.clone(), name.to_owned());
        let worker = self.settings.worker;
        let begun = spawn_blocking(move || {
            let mut file = PartFile::create(&directory, &name, worker)?;
            file.append(&sheet.header())?;
            Ok::<_, std::io::Error>(file)
        });
        Ok(begun.await??)
    }
}

/// Encodes a page and writes it, off the async threads. Answers how many cells were guarded.
async fn append(
    mut file: PartFile,
    sheet: Arc<Sheet>,
    events: Vec<crate::domain::ContactEvent>,
) -> Result<(PartFile, u64), RenderError> {
    let appended = spawn_blocking(move || {
        let (bytes, guarded) = sheet.rows(&events);
        file.append(&bytes)?;
        Ok::<_, std::io::Error>((file, guarded))
    });
    Ok(appended.await??)
}
