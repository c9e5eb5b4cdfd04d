//! The seam between rendering and the formats: pages of events go in, one file comes out.
//!
//! A format is a [`Writer`], which [`begin`] picks. It owns the file that it writes, so that it may
//! hold back what it needs to, such as a document until its last page is known. Everything here blocks
//! or computes: for `spawn_blocking`.

use super::Format;
use super::csv::Sheet;
use super::file::{PartFile, Written};
use crate::domain::{ContactEvent, UnknownKind};
use crate::storage::Export;

/// What writes one export.
pub(super) trait Writer: Send {
    /// Takes a page of events, oldest first. Answers how many of them: fewer than there are, where it
    /// takes no more.
    fn page(&mut self, events: &[ContactEvent]) -> Result<u64, WriteError>;

    /// There are no more: the file gets its name.
    fn finish(self: Box<Self>) -> Result<Finished, WriteError>;
}

/// A file that is there.
pub(super) struct Finished {
    pub(super) written: Written,
    pub(super) notes: Notes,
}

/// What is told of a file beside its size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Notes {
    /// Cells that a spreadsheet would have run.
    pub(super) guarded_cells: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// Another attempt would end the same way.
    #[error(transparent)]
    Unknown(#[from] UnknownKind),
    #[error("the file cannot be written")]
    File(#[from] std::io::Error),
}

/// Begins `file` in the format that `export` asks for.
pub(super) fn begin(export: &Export, file: PartFile) -> Result<Box<dyn Writer>, WriteError> {
    Ok(match export.request.format.parse()? {
        Format::Csv => Box::new(CsvFile::begin(export, file)?),
    })
}

/// CSV needs no holding back: each page is written as it comes.
struct CsvFile {
    file: PartFile,
    sheet: Sheet,
    notes: Notes,
}

impl CsvFile {
    fn begin(export: &Export, mut file: PartFile) -> Result<Self, WriteError> {
        let sheet = Sheet::of(&export.request)?;
        file.append(&sheet.header())?;
        Ok(Self {
            file,
            sheet,
            notes: Notes::default(),
        })
    }
}

impl Writer for CsvFile {
    fn page(&mut self, events: &[ContactEvent]) -> Result<u64, WriteError> {
        let (bytes, guarded) = self.sheet.rows(events);
        self.file.append(&bytes)?;
        self.notes.guarded_cells += guarded;
        Ok(events.len() as u64)
    }

    fn finish(self: Box<Self>) -> Result<Finished, WriteError> {
        Ok(Finished {
            written: self.file.finish("csv")?,
            notes: self.notes,
        })
    }
}
