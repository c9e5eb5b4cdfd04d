//! A timeline as CSV: RFC 4180, in UTF-8 with a byte order mark, without which Excel reads ANSI.
//!
//! Pure: events in, bytes out. A cell that a spreadsheet would run as a formula gets an apostrophe in
//! front, as OWASP advises (<https://owasp.org/www-community/attacks/CSV_Injection>); so does an
//! honest "- item". Whoever reads the file back by program takes off one apostrophe before such a
//! cell.

use chrono_tz::Tz;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::time;
use super::writer::Notes;
use crate::domain::{AgentId, Audience, ContactEvent, SessionId, UnknownKind, closed_set};
use crate::storage::ExportRequest;

/// Excel takes a file for UTF-8 only when it begins so.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Stands in place of what was asked to be left out.
pub(super) const REDACTED: &str = "[redacted]";

closed_set!(
    /// A column of an exported timeline: what `redact` may name, in the order of the file.
    Column, "field of an export", {
        /// The event's id.
        Id = "id",
        /// When it happened, in the requested zone.
        OccurredAt = "occurred_at",
        /// What happened.
        EventType = "event_type",
        /// What it speaks of.
        Category = "category",
        /// How soon it should have been seen.
        Priority = "priority",
        /// Where it comes from.
        Source = "source",
        /// Its title.
        Title = "title",
        /// Its description.
        Description = "description",
        /// Its payload, as JSON.
        Payload = "payload",
        /// Its metadata, as JSON.
        Metadata = "metadata",
        /// The session it happened in.
        SessionId = "session_id",
        /// The agent who caused it.
        TriggeredBy = "triggered_by",
        /// The product it came from.
        IntegrationSource = "integration_source",
        /// Whether it was pushed.
        IsRealtime = "is_realtime",
        /// When it was delivered, in the requested zone.
        DeliveredAt = "delivered_at",
        /// When it was first read, in the requested zone.
        ReadAt = "read_at",
        /// Whether the contact may see it.
        VisibleToClient = "visible_to_client",
        /// Whether agents may see it.
        VisibleToAgent = "visible_to_agent",
        /// When it expires, in the requested zone.
        ExpiresAt = "expires_at",
        /// When it was recorded, in the requested zone.
        CreatedAt = "created_at",
    }
);

impl Column {
    /// Whether `audience` has this column. What is the CRM's own business is none of the contact's:
    /// who caused an event, what machines noted beside it, and who else may see it.
    #[must_use]
    pub fn is_for(self, audience: Audience) -> bool {
        audience != Audience::Client
            || !matches!(
                self,
                Self::Metadata | Self::TriggeredBy | Self::VisibleToClient | Self::VisibleToAgent
            )
    }
}

/// The columns that a request has, each with whether its content is left out.
///
/// # Errors
/// A field to be redacted that there is not: leaving it in would be the worse answer.
pub(super) fn columns(request: &ExportRequest) -> Result<Vec<(Column, bool)>, UnknownKind> {
    let redacted: Vec<Column> = request
        .redact
        .iter()
        .map(|field| field.parse())
        .collect::<Result<_, _>>()?;
    let columns = Column::ALL
        .iter()
        .filter(|column| column.is_for(request.audience))
        .map(|column| (*column, redacted.contains(column)));
    Ok(columns.collect())
}

/// How one export is written.
#[derive(Debug, Clone)]
pub(super) struct Sheet {
    columns: Vec<(Column, bool)>,
    zone: Tz,
}

impl Sheet {
    /// # Errors
    /// Where a field is to be redacted that there is not.
    pub(super) fn of(request: &ExportRequest) -> Result<Self, UnknownKind> {
        Ok(Self {
            columns: columns(request)?,
            zone: request.timezone,
        })
    }

    /// The byte order mark and the header row.
    pub(super) fn header(&self) -> Vec<u8> {
        let mut csv = writer(BYTE_ORDER_MARK.to_vec());
        let names = self.columns.iter().map(|(column, _)| column.as_str());
        csv.write_record(names).expect("memory takes every write");
        csv.into_inner().expect("memory takes every write")
    }

    /// A row for each event, and what is to be told of them.
    pub(super) fn rows(&self, events: &[ContactEvent]) -> (Vec<u8>, Notes) {
        let mut csv = writer(Vec::new());
        let mut notes = Notes::default();
        // One buffer for whatever is written anew: a row has two dozen cells.
        let mut made = Vec::with_capacity(64);
        for event in events {
            for (column, is_redacted) in &self.columns {
                let cell = if *is_redacted {
                    notes.redacted_cells += 1;
                    REDACTED.as_bytes()
                } else {
                    self.cell(*column, event, &mut made)
                };
                let written = if is_formula(cell) {
                    notes.guarded_cells += 1;
                    csv.write_field([b"'", cell].concat())
                } else {
                    csv.write_field(cell)
                };
                written.expect("memory takes every write");
            }
            csv.write_record(None::<&[u8]>)
                .expect("memory takes every write");
        }
        (csv.into_inner().expect("memory takes every write"), notes)
    }

    fn cell<'c>(&self, column: Column, event: &'c ContactEvent, made: &'c mut Vec<u8>) -> &'c [u8] {
        made.clear();
        let text = |text: &'c Option<String>| text.as_deref().unwrap_or_default().as_bytes();
        let flag = |flag: bool| if flag { &b"true"[..] } else { b"false" };
        let at = match column {
            Column::EventType => return event.event_type.as_str().as_bytes(),
            Column::Category => return event.category.as_str().as_bytes(),
            Column::Priority => return event.priority.as_str().as_bytes(),
            Column::Source => return event.source.as_str().as_bytes(),
            Column::Title => return text(&event.title),
            Column::Description => return text(&event.description),
            Column::Payload => return event.payload.as_str().as_bytes(),
            Column::Metadata => return event.metadata.as_str().as_bytes(),
            Column::IntegrationSource => return text(&event.integration_source),
            Column::IsRealtime => return flag(event.is_realtime),
            Column::VisibleToClient => return flag(event.visibility.client),
            Column::VisibleToAgent => return flag(event.visibility.agent),
            Column::Id => return push_id(made, Some(event.id.uuid())),
            Column::SessionId => return push_id(made, event.session_id.map(SessionId::uuid)),
            Column::TriggeredBy => return push_id(made, event.triggered_by.map(AgentId::uuid)),
            Column::OccurredAt => Some(event.occurred_at),
            Column::DeliveredAt => event.delivery.delivered_at(),
            Column::ReadAt => event.read_at,
            Column::ExpiresAt => event.expires_at,
            Column::CreatedAt => Some(event.created_at),
        };
        if let Some(at) = at {
            time::push_local(made, at, self.zone);
        }
        made
    }
}

fn push_id(made: &mut Vec<u8>, id: Option<Uuid>) -> &[u8] {
    if let Some(id) = id {
        let mut buffer = [0; Hyphenated::LENGTH];
        made.extend_from_slice(id.hyphenated().encode_lower(&mut buffer).as_bytes());
    }
    made
}

fn writer(buffer: Vec<u8>) -> csv::Writer<Vec<u8>> {
    csv::WriterBuilder::new()
        .terminator(csv::Terminator::CRLF)
        .from_writer(buffer)
}

/// Whether a spreadsheet may take the cell for a formula. Blanks and quotes before it are no help:
/// some programs drop them on import. The wide signs are those of East Asian input.
fn is_formula(cell: &[u8]) -> bool {
    const BLANKS: [char; 6] = [' ', '\u{a0}', '\u{feff}', '"', '\'', '`'];
    const SIGNS: [char; 11] = [
        '=', '+', '-', '@', '\t', '\r', '\n', '\u{ff1d}', '\u{ff0b}', '\u{ff0d}', '\u{ff20}',
    ];
    // What most cells begin with; and every cell was a text.
    if cell
        .first()
        .is_none_or(|first| first.is_ascii_alphanumeric() || *first == b'{')
    {
        return false;
    }
    let Ok(cell) = std::str::from_utf8(cell) else {
        return false;
    };
    cell.trim_start_matches(BLANKS).starts_with(SIGNS)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use serde_json::json;

    use super::*;
    use crate::domain::{
        Category, ContactId, EventId, NewContactEvent, Source, TenantId, event_types,
    };

    fn request(audience: Audience, redact: &[&str]) -> ExportRequest {
        ExportRequest {
            contact_id: contact(),
            format: "csv".to_owned(),
            audience,
            since: None,
            until: None,
            categories: Vec::new(),
            timezone: chrono_tz::Europe::Lisbon,
            redact: redact.iter().map(ToString::to_string).collect(),
            to: Vec::new(),
            attach: true,
        }
    }

    fn contact() -> ContactId {
        "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap()
    }

    fn note(title: &str) -> ContactEvent {
        // 30 minutes after Lisbon has put its clocks forward
        let at = DateTime::from_timestamp_micros(1_774_747_800_000_001).unwrap();
        let agent: AgentId = "0190b5f0-7c1e-7d3a-8f00-0000000000a9".parse().unwrap();
        let id: EventId = "0190b5f0-7c1e-7d3a-8f00-0000000000e1".parse().unwrap();
        NewContactEvent::new(
            contact(),
            event_types::NOTE_ADDED,
            Category::Note,
            Source::Agent,
        )
        .id(id)
        .title(title)
        .description("two\r\nlines, with \"quotes\"")
        .payload(json!({ "amount": "1,5" }))
        .triggered_by(agent)
        .occurred_at(at)
        .record(&TenantId::new("acme").unwrap(), at)
        .unwrap()
    }

    fn written(request: &ExportRequest, events: &[ContactEvent]) -> String {
        let sheet = Sheet::of(request).unwrap();
        let mut bytes = sheet.header();
        bytes.extend(sheet.rows(events).0);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_agents_file_has_all_columns() {
        insta::assert_snapshot!(written(&request(Audience::Agent, &[]), &[note("Olá")]));
    }

    #[test]
    fn a_clients_file_says_nothing_of_the_inner_life_of_the_crm() {
        insta::assert_snapshot!(written(
            &request(Audience::Client, &["title"]),
            &[note("Olá")]
        ));
    }

    #[test]
    fn formulas_get_an_apostrophe_and_are_counted() {
        let sheet = Sheet::of(&request(Audience::Agent, &[])).unwrap();
        for title in [
            "=1+1", "+1", "-1", "@A1", "\t=1", "\r=1", " =1", "\"=1", "'=1", "\u{a0}=1", "＝1",
        ] {
            let (rows, notes) = sheet.rows(&[note(title)]);
            let mut csv = csv::ReaderBuilder::new()
                .has_headers(false)
                .from_reader(&rows[..]);
            let row = csv.records().next().unwrap().unwrap();
            assert_eq!(
                (&row[6], notes.guarded_cells),
                (format!("'{title}").as_str(), 1),
                "{title:?}"
            );
        }
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        let sheet = Sheet::of(&request(Audience::Agent, &[])).unwrap();
        for title in ["", "a=1", "1-2", "'quoted'", "e-mail", "(-1)"] {
            assert_eq!(sheet.rows(&[note(title)]).1.guarded_cells, 0, "{title:?}");
        }
    }

    #[test]
    fn a_field_that_there_is_not_cannot_be_redacted() {
        let error = Sheet::of(&request(Audience::Agent, &["titel"])).unwrap_err();
        assert!(error.to_string().contains("\"titel\""), "{error}");
    }
}
