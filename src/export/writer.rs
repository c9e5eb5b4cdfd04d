//! The seam between rendering and the formats: pages of events go in, one file comes out.
//!
//! A format is a [`Writer`], which [`begin`] picks. It owns the file that it writes, so that it may
//! hold back what it needs to, such as a document until its last page is known. Everything here blocks
//! or computes: for `spawn_blocking`.

use std::ops::AddAssign;

use super::csv::Sheet;
use super::file::{PartFile, Written};
use super::jsonl::Lines;
use super::packed::Packed;
use super::pdf::{Paper, PdfFile};
use super::xlsx::XlsxFile;
use super::{FileKind, Format, Packing};
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
    /// Cells whose content was to be left out.
    pub(super) redacted_cells: u64,
    /// Cells that are longer than the format takes, and say so.
    pub(super) cut_texts: u64,
    /// Characters that no font has.
    pub(super) missing_glyphs: u64,
    /// Events that the format has no room for; the file says so.
    pub(super) left_out: u64,
}

impl AddAssign for Notes {
    fn add_assign(&mut self, more: Self) {
        self.guarded_cells += more.guarded_cells;
        self.redacted_cells += more.redacted_cells;
        self.cut_texts += more.cut_texts;
        self.missing_glyphs += more.missing_glyphs;
        self.left_out += more.left_out;
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// Another attempt would end the same way.
    #[error(transparent)]
    Unknown(#[from] UnknownKind),
    #[error("the file cannot be written")]
    File(#[from] std::io::Error),
    #[error("the workbook cannot be written")]
    Workbook(#[from] rust_xlsxwriter::XlsxError),
    #[error("the document cannot be made: {0}")]
    Document(String),
}

/// Begins `file` in the format that `export` asks for. It will have some `total` rows.
pub(super) fn begin(
    export: &Export,
    total: u64,
    paper: &Paper,
    file: PartFile,
) -> Result<Box<dyn Writer>, WriteError> {
    let (csv, jsonl) = (
        || Sheet::of(&export.request).map(Text::Csv),
        || Lines::of(&export.request).map(Text::Jsonl),
    );
    let (text, kind, packing) = match export.request.format.parse()? {
        Format::Csv => (csv()?, FileKind::Csv, Packing::None),
        Format::CsvGz => (csv()?, FileKind::CsvGz, Packing::Gzip),
        Format::CsvZst => (csv()?, FileKind::CsvZst, Packing::Zstd),
        Format::Jsonl => (jsonl()?, FileKind::Jsonl, Packing::None),
        Format::JsonlGz => (jsonl()?, FileKind::JsonlGz, Packing::Gzip),
        Format::JsonlZst => (jsonl()?, FileKind::JsonlZst, Packing::Zstd),
        Format::Pdf => {
            return Ok(Box::new(PdfFile::begin(export, total, paper, file)?));
        }
        Format::Xlsx => {
            let book = XlsxFile::begin(&export.request, export.created_at, file)?;
            return Ok(Box::new(book));
        }
    };
    Ok(Box::new(TextFile::begin(text, kind, packing, file)?))
}

/// A format that needs no holding back.
enum Text {
    Csv(Sheet),
    Jsonl(Lines),
}

/// Each page is written as it comes.
struct TextFile {
    file: Packed,
    text: Text,
    kind: FileKind,
    notes: Notes,
}

impl TextFile {
    fn begin(
        text: Text,
        kind: FileKind,
        packing: Packing,
        file: PartFile,
    ) -> Result<Self, WriteError> {
        let mut file = Packed::begin(file, packing)?;
        if let Text::Csv(sheet) = &text {
            file.append(&sheet.header())?;
        }
        Ok(Self {
            file,
            text,
            kind,
            notes: Notes::default(),
        })
    }
}

impl Writer for TextFile {
    fn page(&mut self, events: &[ContactEvent]) -> Result<u64, WriteError> {
        let (bytes, notes) = match &self.text {
            Text::Csv(sheet) => sheet.rows(events),
            Text::Jsonl(lines) => lines.lines(events),
        };
        self.file.append(&bytes)?;
        self.notes += notes;
        Ok(events.len() as u64)
    }

    fn finish(self: Box<Self>) -> Result<Finished, WriteError> {
        Ok(Finished {
            written: self.file.finish(self.kind)?,
            notes: self.notes,
        })
    }
}
