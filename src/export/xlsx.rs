//! A timeline as a workbook of Office Open XML: for whoever sorts and filters it in a spreadsheet.
//!
//! Rows go to a temporary file as they come and into the archive at the end, so memory does not grow.
//! A text is a text here, whatever it begins with: it needs no apostrophe. Times are the spreadsheet's
//! own, in the requested zone, which the header names; those before 1900, which it cannot count, are
//! text. What is longer than a cell may be is cut, and the cell says so.

use std::borrow::Cow;

use chrono::{DateTime, Datelike as _, NaiveDate, NaiveDateTime, Utc};
use chrono_tz::Tz;
use rust_xlsxwriter::{
    DocProperties, ExcelDateTime, Format, FormatAlign, Workbook, Worksheet, XlsxError,
};

use super::csv::{Column, REDACTED, columns};
use super::file::PartFile;
use super::writer::{Finished, Notes, WriteError, Writer};
use super::{FileKind, time};
use crate::domain::ContactEvent;
use crate::storage::ExportRequest;

/// Rows of a sheet, the header among them.
const SHEET_ROWS: u32 = 1_048_576;
/// Characters of a cell, as UTF-16 counts them.
const CELL: usize = 32_767;
/// Bytes of cells in a sheet from which on its part of the archive may be too large for plain ZIP.
const LARGE: u64 = 1 << 30;
/// ISO 8601, to the millisecond: more a spreadsheet does not show.
const TIME_FORMAT: &str = "yyyy\\-mm\\-dd hh:mm:ss.000";

pub(super) struct XlsxFile {
    file: PartFile,
    book: Workbook,
    columns: Vec<(Column, bool)>,
    zone: Tz,
    time: Format,
    header: Format,
    /// Rows of each sheet; only a test has others.
    sheet_rows: u32,
    /// The sheets before the last.
    full_sheets: usize,
    /// The next row of the last sheet.
    row: u32,
    /// What its texts come to.
    bytes: u64,
    is_large: bool,
    notes: Notes,
}

impl XlsxFile {
    pub(super) fn begin(
        request: &ExportRequest,
        created_at: DateTime<Utc>,
        file: PartFile,
    ) -> Result<Self, WriteError> {
        let mut book = Workbook::new();
        book.set_tempdir(file.directory())?;
        // Not the time of this attempt: another one writes the same bytes.
        let properties = DocProperties::new()
            .set_title("Timeline")
            .set_creation_datetime(&ExcelDateTime::from_timestamp(created_at.timestamp())?);
        book.set_properties(&properties);
        let mut begun = Self {
            file,
            book,
            columns: columns(request)?,
            zone: request.timezone,
            time: Format::new().set_num_format(TIME_FORMAT),
            header: Format::new().set_bold().set_align(FormatAlign::Top),
            sheet_rows: SHEET_ROWS,
            full_sheets: 0,
            row: 0,
            bytes: 0,
            is_large: false,
            notes: Notes::default(),
        };
        begun.begin_sheet()?;
        Ok(begun)
    }

    /// A sheet with its header; the rows of the one before are complete.
    fn begin_sheet(&mut self) -> Result<(), WriteError> {
        let number = self.full_sheets + 1;
        let sheet = self.book.add_worksheet_with_constant_memory();
        sheet.set_name(if number == 1 {
            "Timeline".to_owned()
        } else {
            format!("Timeline {number}")
        })?;
        sheet.set_freeze_panes(1, 0)?;
        for (column, (field, _)) in (0_u16..).zip(&self.columns) {
            sheet.set_column_width(column, width(*field))?;
            let name = if is_time(*field) {
                Cow::Owned(format!("{field} ({})", self.zone))
            } else {
                Cow::Borrowed(field.as_str())
            };
            sheet.write_string_with_format(0, column, name, &self.header)?;
        }
        (self.row, self.bytes) = (1, 0);
        Ok(())
    }

    /// The rows are known, and so is what the filter spans.
    fn end_sheet(&mut self) -> Result<(), WriteError> {
        let last_column = u16::try_from(self.columns.len().saturating_sub(1)).unwrap_or(0);
        let last_row = self.row - 1;
        self.is_large |= self.bytes > LARGE;
        let sheet = self.book.worksheet_from_index(self.full_sheets)?;
        sheet.autofilter(0, 0, last_row, last_column)?;
        self.full_sheets += 1;
        Ok(())
    }
}

impl Writer for XlsxFile {
    fn page(&mut self, events: &[ContactEvent]) -> Result<u64, WriteError> {
        for event in events {
            if self.row == self.sheet_rows {
                self.end_sheet()?;
                self.begin_sheet()?;
            }
            let sheet = self.book.worksheet_from_index(self.full_sheets)?;
            let mut cells = Cells {
                sheet,
                row: self.row,
                zone: self.zone,
                time: &self.time,
                cut: 0,
                bytes: 0,
            };
            for (index, (column, is_redacted)) in (0_u16..).zip(&self.columns) {
                if *is_redacted {
                    self.notes.redacted_cells += 1;
                    cells.text(index, REDACTED)?;
                } else {
                    cells.field(index, *column, event)?;
                }
            }
            self.notes.cut_texts += cells.cut;
            self.bytes += cells.bytes;
            self.row += 1;
        }
        Ok(events.len() as u64)
    }

    fn finish(mut self: Box<Self>) -> Result<Finished, WriteError> {
        self.end_sheet()?;
        if self.is_large {
            self.book.use_zip_large_file(true);
        }
        self.book.save_to_writer(&mut self.file)?;
        Ok(Finished {
            written: self.file.finish(FileKind::Xlsx.extension())?,
            notes: self.notes,
        })
    }
}

/// One row while it is written.
struct Cells<'s> {
    sheet: &'s mut Worksheet,
    row: u32,
    zone: Tz,
    time: &'s Format,
    /// Cells that were cut.
    cut: u64,
    bytes: u64,
}

impl Cells<'_> {
    fn field(&mut self, at: u16, column: Column, event: &ContactEvent) -> Result<(), XlsxError> {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        match column {
            Column::Id => self.text(at, &event.id.to_string()),
            Column::OccurredAt => self.time(at, Some(event.occurred_at)),
            Column::EventType => self.text(at, event.event_type.as_str()),
            Column::Category => self.text(at, event.category.as_str()),
            Column::Priority => self.text(at, event.priority.as_str()),
            Column::Source => self.text(at, event.source.as_str()),
            Column::Title => self.text(at, &text(&event.title)),
            Column::Description => self.text(at, &text(&event.description)),
            Column::Payload => self.text(at, event.payload.as_str()),
            Column::Metadata => self.text(at, event.metadata.as_str()),
            Column::SessionId => self.maybe(at, event.session_id),
            Column::TriggeredBy => self.maybe(at, event.triggered_by),
            Column::IntegrationSource => self.text(at, &text(&event.integration_source)),
            Column::IsRealtime => self.flag(at, event.is_realtime),
            Column::DeliveredAt => self.time(at, event.delivery.delivered_at()),
            Column::ReadAt => self.time(at, event.read_at),
            Column::VisibleToClient => self.flag(at, event.visibility.client),
            Column::VisibleToAgent => self.flag(at, event.visibility.agent),
            Column::ExpiresAt => self.time(at, event.expires_at),
            Column::CreatedAt => self.time(at, Some(event.created_at)),
        }
    }

    fn text(&mut self, at: u16, text: &str) -> Result<(), XlsxError> {
        if text.is_empty() {
            return Ok(());
        }
        let text = fitting(text);
        self.cut += u64::from(matches!(text, Cow::Owned(_)));
        self.bytes += text.len() as u64;
        self.sheet.write_string(self.row, at, text)?;
        Ok(())
    }

    fn maybe(&mut self, at: u16, id: Option<impl std::fmt::Display>) -> Result<(), XlsxError> {
        id.map_or(Ok(()), |id| self.text(at, &id.to_string()))
    }

    fn flag(&mut self, at: u16, flag: bool) -> Result<(), XlsxError> {
        self.sheet.write_boolean(self.row, at, flag)?;
        Ok(())
    }

    fn time(&mut self, at: u16, instant: Option<DateTime<Utc>>) -> Result<(), XlsxError> {
        let Some(instant) = instant else {
            return Ok(());
        };
        let (local, _) = time::local(instant, self.zone);
        if let Ok(time) = excel_time(local) {
            let format = self.time;
            self.sheet
                .write_datetime_with_format(self.row, at, &time, format)?;
            return Ok(());
        }
        let mut text = Vec::new();
        time::push_local(&mut text, instant, self.zone);
        self.text(at, &String::from_utf8_lossy(&text))
    }
}

/// A time as a spreadsheet counts it: days since the end of 1899, the second of which it believes to
/// be a leap year's.
fn excel_time(local: NaiveDateTime) -> Result<ExcelDateTime, XlsxError> {
    /// The first day that all spreadsheets count the same: 1900-02-29 never was.
    const FIRST: NaiveDate = NaiveDate::from_ymd_opt(1900, 3, 1).expect("a day of the calendar");
    /// Its number.
    const NUMBER: f64 = 61.0;
    const DAY: f64 = 86_400_000_000.0;
    if local.date() < FIRST || local.year() > 9999 {
        return Err(XlsxError::DateTimeRangeError(local.to_string()));
    }
    let since = local - FIRST.and_time(chrono::NaiveTime::MIN);
    // Exact beyond the year 2180: there are fewer microseconds than a float has whole numbers.
    #[expect(clippy::cast_precision_loss, reason = "see above")]
    let micros = since.num_microseconds().unwrap_or(0) as f64;
    ExcelDateTime::from_serial_datetime(NUMBER + micros / DAY)
}

/// The text as far as a cell takes it; what is cut is said at its end.
fn fitting(text: &str) -> Cow<'_, str> {
    // So many bytes hold no more characters.
    if text.len() <= CELL {
        return Cow::Borrowed(text);
    }
    let size = text.encode_utf16().count();
    if size <= CELL {
        return Cow::Borrowed(text);
    }
    let note =
        format!(" [cut here: {size} characters, a cell takes {CELL}; CSV and JSONL have all]");
    let mut left = CELL - note.len();
    let kept = text.char_indices().find(|(_, c)| {
        let fits = c.len_utf16() <= left;
        left = left.saturating_sub(c.len_utf16());
        !fits
    });
    let end = kept.map_or(text.len(), |(at, _)| at);
    Cow::Owned(format!("{}{note}", &text[..end]))
}

fn is_time(column: Column) -> bool {
    matches!(
        column,
        Column::OccurredAt
            | Column::DeliveredAt
            | Column::ReadAt
            | Column::ExpiresAt
            | Column::CreatedAt
    )
}

/// In characters: what a time or the usual text needs.
fn width(column: Column) -> f64 {
    match column {
        Column::Title | Column::Payload => 40.0,
        Column::Description => 60.0,
        Column::Id | Column::SessionId | Column::TriggeredBy => 38.0,
        column if is_time(column) => 26.0,
        _ => 18.0,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use uuid::Uuid;

    use super::*;
    use crate::domain::{
        Audience, Category, ContactId, NewContactEvent, Source, TenantId, event_types,
    };

    #[test]
    fn what_does_not_fit_a_sheet_goes_to_the_next() {
        let contact: ContactId = "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap();
        let request = ExportRequest {
            contact_id: contact,
            format: "xlsx".to_owned(),
            audience: Audience::Audit,
            since: None,
            until: None,
            categories: Vec::new(),
            timezone: chrono_tz::UTC,
            redact: Vec::new(),
            to: Vec::new(),
            attach: true,
        };
        let at = DateTime::from_timestamp_micros(1_774_747_800_000_001).unwrap();
        let events: Vec<_> = (0..5)
            .map(|_| {
                let note = event_types::NOTE_ADDED;
                NewContactEvent::new(contact, note, Category::Note, Source::Agent)
                    .record(&TenantId::new("acme").unwrap(), at)
                    .unwrap()
            })
            .collect();
        let home = tempfile::tempdir().unwrap();
        let file = PartFile::create(home.path(), "a", Uuid::nil()).unwrap();
        let mut book = Box::new(XlsxFile::begin(&request, at, file).unwrap());
        // The header and two more.
        book.sheet_rows = 3;
        book.page(&events[..3]).unwrap();
        book.page(&events[3..]).unwrap();
        let written = book.finish().unwrap().written;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/formats.py");
        let read = Command::new("python3")
            .arg(script)
            .arg("xlsx")
            .arg(home.path().join(written.name))
            .output()
            .unwrap();
        let read: serde_json::Value = serde_json::from_slice(&read.stdout).unwrap();
        let sheets: Vec<_> = (read.as_array().unwrap().iter())
            .map(|sheet| {
                let rows = sheet["rows"].as_array().unwrap().len();
                (
                    sheet["name"].as_str().unwrap(),
                    sheet["filter"].as_str().unwrap(),
                    rows,
                )
            })
            .collect();
        assert_eq!(
            sheets,
            [
                ("Timeline", "A1:T3", 3),
                ("Timeline 2", "A1:T3", 3),
                ("Timeline 3", "A1:T2", 2)
            ]
        );
    }

    #[test]
    fn a_text_is_cut_between_characters_and_says_so() {
        let fits = "🙂".repeat(CELL / 2);
        assert!(matches!(fitting(&fits), Cow::Borrowed(_)));
        for text in [
            "x".repeat(CELL + 1),
            "🙂".repeat(CELL / 2 + 1),
            format!("x{fits}x"),
        ] {
            let cut = fitting(&text);
            let size = text.encode_utf16().count();
            assert!(
                cut.contains(&format!(" [cut here: {size} characters")),
                "{size}"
            );
            assert!((CELL - 1..=CELL).contains(&cut.encode_utf16().count()));
        }
    }

    #[test]
    fn days_are_counted_from_the_first_of_march_1900() {
        let serial = |text: &str| excel_time(text.parse().unwrap()).map(|time| time.to_excel());
        for (text, number) in [
            ("1900-03-01T00:00:00", 61.0),
            ("2026-02-03T12:00:00", 46056.5),
            ("9999-12-31T00:00:00", 2_958_465.0),
        ] {
            assert!((serial(text).unwrap() - number).abs() < 1e-9, "{text}");
        }
        assert!(serial("1900-02-28T23:59:59").is_err());
    }
}
