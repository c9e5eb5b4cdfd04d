//! Rendering: the timeline in keyset pages, each a short read of its own, into a file.
//!
//! What was recorded after the export was asked for is not part of it, so the pages agree with each
//! other without a snapshot held open for minutes; memory holds two pages.

use std::ops::RangeInclusive;
use std::panic::AssertUnwindSafe;

use chrono::TimeDelta;
use futures_util::FutureExt;
use tokio::task::{JoinError, spawn_blocking};
use tokio_util::sync::CancellationToken;

use super::file::{PartFile, Written};
use super::writer::{self, Finished, Notes, WriteError, Writer};
use super::{Duty, Exporter};
use crate::domain::ContactEvent;
use crate::storage::{Export, Rendered, StorageError, StorageResult};
use crate::telemetry::chain;

/// Events in the first page, when nothing is known of their size.
const FIRST_PAGE: u32 = 200;
/// And in those behind, by the size of the one before. As a rule the most: a query's fixed costs hardly
/// show any more. Where each event is as large as it may be, a page is 8 MB.
const PAGES: RangeInclusive<usize> = 100..=1000;
/// The text that a page should hold.
const PAGE_BYTES: usize = 1024 * 1024;
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

#[derive(Debug, thiserror::Error)]
enum RenderError {
    /// Passes by itself or stops everything: the export waits, and no attempt is spent.
    #[error(transparent)]
    Away(StorageError),
    #[error("the export cannot be read from the database")]
    Storage(#[source] StorageError),
    #[error(transparent)]
    Write(#[from] WriteError),
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
            Ok(Ending::Finished(Rendered { rows, bytes, .. }, notes)) => {
                let Notes {
                    guarded_cells,
                    redacted_cells,
                    cut_texts,
                    missing_glyphs,
                    left_out,
                } = notes;
                tracing::info!(
                    export.id = %export.id, tenant.id = %export.tenant_id, export.attempt = export.attempt,
                    rows, bytes, guarded_cells, redacted_cells, cut_texts, missing_glyphs, left_out, elapsed_ms,
                    "exported {rows} events"
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
            RenderError::Write(WriteError::Unknown(_)) => None,
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
        // One instant for all pages, so that what expires meanwhile is in all or in none.
        let now = self.clock.now();
        let total = self.store.count_rows(export, now).await?;
        if !self.keep_claim(export, 0, total).await? {
            return Ok(Ending::Lost);
        }
        let mut writer = self.begin(export, total).await?;
        let (mut rows, mut renewed_at) = (0, now);
        let mut page = self.store.rows(export, None, now, FIRST_PAGE).await?;
        loop {
            if stop.is_cancelled() {
                return Ok(Ending::Stopped);
            }
            let (count, next) = (page.events.len() as u64, page.next);
            let limit = limit_after(&page.events);
            // While one page is written, the database is at work on the next.
            let reading = async {
                let Some(after) = next else { return Ok(None) };
                let page = self.store.rows(export, Some(after), now, limit).await?;
                Ok::<_, StorageError>(Some(page))
            };
            let (written, read) = tokio::join!(append(writer, page.events), reading);
            let taken;
            (writer, taken) = written?;
            rows += taken;
            if taken < count {
                break;
            }
            let Some(following) = read? else { break };
            page = following;
            let at = self.clock.now();
            // Also where the clock stepped back.
            if (at - renewed_at).abs() >= RENEWAL {
                if !self.keep_claim(export, rows, total.max(rows)).await? {
                    return Ok(Ending::Lost);
                }
                renewed_at = at;
            }
        }
        let Finished { written, notes } = spawn_blocking(move || writer.finish()).await??;
        let Written {
            name,
            bytes,
            sha256,
        } = written;
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
            return Ok(Ending::Finished(rendered, notes));
        }
        // Whoever took the claim over writes, or has written, the same name: only a file that
        // nobody will come for is removed.
        let found = self.store.find(&export.tenant_id, export.id).await?;
        if found.is_none_or(|found| found.state == crate::storage::ExportState::Cancelled) {
            let path = self.settings.directory.join(&rendered.file_name);
            let removed = spawn_blocking(move || super::file::remove(&path)).await?;
            removed.map_err(WriteError::from)?;
        }
        Ok(Ending::Lost)
    }

    async fn keep_claim(&self, export: &Export, rows: u64, total: u64) -> StorageResult<bool> {
        let until = self.clock.now() + CLAIM;
        self.store
            .progress(export, self.settings.worker, rows, total, until)
            .await
    }

    async fn begin(&self, export: &Export, total: u64) -> Result<Box<dyn Writer>, RenderError> {
        let (directory, export) = (self.settings.directory.clone(), export.clone());
        let (worker, paper) = (self.settings.worker, self.settings.paper.clone());
        let begun = spawn_blocking(move || {
            let file = PartFile::create(&directory, &export.id.to_string(), worker)?;
            writer::begin(&export, total, &paper, file)
        });
        Ok(begun.await??)
    }
}

/// How many events the page behind these may have.
fn limit_after(events: &[ContactEvent]) -> u32 {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let sizes = events.iter().map(|event| {
        text(&event.title)
            + text(&event.description)
            + event.payload.as_str().len()
            + event.metadata.as_str().len()
    });
    let mean = sizes.sum::<usize>() / events.len().max(1);
    let limit = (PAGE_BYTES / mean.max(1)).clamp(*PAGES.start(), *PAGES.end());
    u32::try_from(limit).unwrap_or(FIRST_PAGE)
}

/// Encodes a page and writes it, off the async threads. Answers how many events were taken.
async fn append(
    mut writer: Box<dyn Writer>,
    events: Vec<ContactEvent>,
) -> Result<(Box<dyn Writer>, u64), RenderError> {
    let appended = spawn_blocking(move || {
        let taken = writer.page(&events)?;
        Ok::<_, WriteError>((writer, taken))
    });
    Ok(appended.await??)
}
