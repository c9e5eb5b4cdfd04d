//! A timeline as a document one would hand to a customer: PDF, tagged, in any script.
//!
//! [`timeline`] says what is in it, [`text`] sets it with the [`fonts`], [`flow`] lays it on pages, and
//! [`draw`] makes a PDF of them, which [`pack`] makes small. Beyond [`VOLUME`] events it comes in numbered
//! volumes in a ZIP, so that memory holds one volume at a time.

mod chart;
mod draw;
mod flow;
mod fonts;
mod pack;
mod text;
mod timeline;

use std::io::Write as _;
use std::path::PathBuf;

use chrono::{Datelike, Timelike};
use krilla::metadata::DateTime as PdfTime;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, StreamWriter, ZipWriter};

use super::csv::Column;
use super::file::PartFile;
use super::words::Words;
use super::writer::{Finished, Notes, WriteError, Writer};
use crate::domain::{ContactEvent, Locale, UnknownKind, format_time};
use crate::storage::Export;
use draw::About;
use fonts::Fonts;
use text::{Colour, Setter};
use timeline::{Manner, Timeline, Volume};

/// Events in a volume.
const VOLUME: u64 = 5_000;
/// Large events fill pages too: a volume ends here at the latest.
const MOST_PAGES: usize = 1_500;

/// How documents are made, from the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paper {
    /// Where fonts are looked for before Debian's places.
    pub fonts: Vec<PathBuf>,
    /// The language.
    pub locale: Locale,
    /// How many events all volumes together hold.
    pub max_events: u64,
    /// The colour of headings: red, green, blue.
    pub colour: [u8; 3],
    /// What stands at the foot of each page beside the contact.
    pub footer: String,
}

impl Default for Paper {
    fn default() -> Self {
        Self {
            fonts: Vec::new(),
            locale: Locale::English,
            max_events: 25_000,
            colour: [0x1f, 0x4e, 0x79],
            footer: String::new(),
        }
    }
}

/// Where the documents go: one straight into the file, more into a ZIP.
enum Shelf {
    Empty(PartFile),
    /// The first is kept until it is clear whether there is another.
    One(PartFile, Vec<u8>, Value),
    More(Box<ZipWriter<StreamWriter<PartFile>>>),
    /// A write failed.
    Broken,
}

/// Writes the documents of one export.
pub(super) struct PdfFile {
    export: Export,
    paper: Paper,
    words: Words,
    redacted: Vec<Column>,
    setter: Setter,
    shelf: Shelf,
    /// How many volumes are closed.
    volumes: u64,
    manifest: Vec<Value>,
    open: Timeline,
    taken: u64,
    total: u64,
    missing: u64,
}

impl PdfFile {
    pub(super) fn begin(
        export: &Export,
        total: u64,
        paper: &Paper,
        file: PartFile,
    ) -> Result<Self, WriteError> {
        let redacted: Vec<Column> = export
            .request
            .redact
            .iter()
            .map(|field| field.parse())
            .collect::<Result<_, UnknownKind>>()?;
        Ok(Self {
            export: export.clone(),
            paper: paper.clone(),
            words: Words::of(paper.locale),
            redacted,
            setter: Setter::new(Fonts::new(&paper.fonts)),
            shelf: Shelf::Empty(file),
            volumes: 0,
            manifest: Vec::new(),
            open: Timeline::new(),
            taken: 0,
            total,
            missing: 0,
        })
    }

    fn left_out(&self) -> Option<(u64, u64)> {
        let held = self.paper.max_events;
        (self.total > held).then_some((held, self.total))
    }

    /// Closes the open volume. `is_last` says that no other follows.
    fn close(&mut self, is_last: bool) -> Result<(), WriteError> {
        let open = std::mem::replace(&mut self.open, Timeline::new());
        let events = open.events;
        self.volumes += 1;
        let is_only = self.volumes == 1 && is_last;
        let volume = Volume {
            number: (!is_only).then_some(self.volumes),
            before: self.taken - events,
            left_out: self.left_out(),
        };
        let Colours { accent } = Colours::of(&self.paper);
        let manner = Manner {
            export: &self.export,
            words: &self.words,
            accent,
            footer: &self.paper.footer,
            redacted: &self.redacted,
        };
        let flow = open.close(&mut self.setter, &manner, &volume);
        let missing: u64 = self.setter.fonts.missing.values().sum();
        self.missing += missing;
        self.setter.fonts.missing.clear();
        let about = About {
            title: format!("{} {}", self.words.title, self.export.request.contact_id),
            language: self.words.language.clone(),
            id: format!("{}/{}", self.export.id, self.volumes),
            created: created(&self.export),
        };
        let pages = flow.pages.len();
        let pdf = draw::draw(&flow, &self.setter.fonts, &about).map_err(WriteError::Document)?;
        drop(flow);
        let pdf = pack::pack(&pdf).unwrap_or(pdf);
        let hash = Sha256::digest(&pdf);
        let entry = json!({
            "file": self.name(self.volumes),
            "events": events,
            "pages": pages,
            "bytes": pdf.len(),
            "sha256": hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            "characters_not_shown": missing,
        });
        self.shelve(pdf, entry)
    }

    fn name(&self, number: u64) -> String {
        format!(
            "timeline-{}-{number:03}.pdf",
            self.export.request.contact_id
        )
    }

    fn shelve(&mut self, pdf: Vec<u8>, entry: Value) -> Result<(), WriteError> {
        self.shelf = match std::mem::replace(&mut self.shelf, Shelf::Broken) {
            Shelf::Empty(file) => Shelf::One(file, pdf, entry),
            Shelf::One(file, first, first_entry) => {
                let mut zip = Box::new(ZipWriter::new_stream(file));
                for (number, (pdf, entry)) in
                    [(first, first_entry), (pdf, entry)].into_iter().enumerate()
                {
                    let name = self.name(number as u64 + 1);
                    store(&mut zip, &name, &pdf)?;
                    self.manifest.push(entry);
                }
                Shelf::More(zip)
            }
            Shelf::More(mut zip) => {
                store(&mut zip, &self.name(self.volumes), &pdf)?;
                self.manifest.push(entry);
                Shelf::More(zip)
            }
            Shelf::Broken => return Err(WriteError::Document("the file is lost".to_owned())),
        };
        Ok(())
    }

    fn manifest(&self) -> Value {
        let request = &self.export.request;
        json!({
            "export": self.export.id,
            "contact_id": request.contact_id,
            "requested_by": self.export.requested_by,
            "created_at": format_time(self.export.created_at),
            "audience": request.audience,
            "since": request.since.map(format_time),
            "until": request.until.map(format_time),
            "categories": request.categories,
            "timezone": request.timezone.name(),
            "redacted": request.redact,
            "events": self.taken,
            "left_out": self.total.saturating_sub(self.taken),
            "volumes": self.manifest,
        })
    }
}

impl Writer for PdfFile {
    fn page(&mut self, events: &[ContactEvent]) -> Result<u64, WriteError> {
        let mut taken = 0;
        for event in events {
            if self.taken >= self.paper.max_events {
                break;
            }
            if self.open.events >= VOLUME || self.open.flow.pages.len() >= MOST_PAGES {
                self.close(false)?;
            }
            let Colours { accent } = Colours::of(&self.paper);
            let manner = Manner {
                export: &self.export,
                words: &self.words,
                accent,
                footer: &self.paper.footer,
                redacted: &self.redacted,
            };
            self.open.add(&mut self.setter, &manner, event);
            self.taken += 1;
            taken += 1;
        }
        Ok(taken)
    }

    fn finish(mut self: Box<Self>) -> Result<Finished, WriteError> {
        self.close(true)?;
        let written = match std::mem::replace(&mut self.shelf, Shelf::Broken) {
            Shelf::One(mut file, pdf, _entry) => {
                file.append(&pdf)?;
                file.finish("pdf")?
            }
            Shelf::More(mut zip) => {
                let manifest =
                    serde_json::to_vec_pretty(&self.manifest()).map_err(std::io::Error::from)?;
                store(&mut zip, "manifest.json", &manifest)?;
                zip.finish()
                    .map_err(std::io::Error::from)?
                    .into_inner()
                    .finish("zip")?
            }
            Shelf::Empty(_) | Shelf::Broken => {
                return Err(WriteError::Document("the file is lost".to_owned()));
            }
        };
        Ok(Finished {
            written,
            notes: Notes {
                missing_glyphs: self.missing,
                left_out: self.total.saturating_sub(self.taken),
                ..Notes::default()
            },
        })
    }
}

struct Colours {
    accent: Colour,
}

impl Colours {
    fn of(paper: &Paper) -> Self {
        Self {
            accent: paper.colour,
        }
    }
}

fn store(
    zip: &mut ZipWriter<StreamWriter<PartFile>>,
    name: &str,
    content: &[u8],
) -> Result<(), WriteError> {
    // Documents are compressed within.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file(name, options)
        .map_err(std::io::Error::from)?;
    zip.write_all(content)?;
    Ok(())
}

fn created(export: &Export) -> PdfTime {
    let at = export.created_at;
    let small = |number: u32| u8::try_from(number).unwrap_or(1);
    PdfTime::new(u16::try_from(at.year()).unwrap_or(0))
        .month(small(at.month()))
        .day(small(at.day()))
        .hour(small(at.hour()))
        .minute(small(at.minute()))
        .second(small(at.second()))
        .utc_offset_hour(0)
        .utc_offset_minute(0)
}

#[cfg(test)]
mod tests;
