//! A timeline as CSV: RFC 4180, in UTF-8 with a byte order mark, without which Excel reads ANSI.
//!
//! Pure: events in, bytes out. A cell that a spreadsheet would run as a formula gets an apostrophe in
//! front, as OWASP advises (<https://owasp.org/www-community/attacks/CSV_Injection>); so does an
//! honest "- item". Whoever reads the file back by program takes off one apostrophe before such a
//! cell.

use std::borrow::Cow;

use chrono::{DateTime, SecondsFormat, Utc};
use chrono_tz::Tz;

use crate::domain::{Audience, ContactEvent, UnknownKind, closed_set};
use crate::storage::ExportRequest;

/// Excel takes a file for UTF-8 only when it begins so.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// Stands in place of what was asked to be left out.
const REDACTED: &str = "[redacted]";

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

/// How one export is written.
#[derive(Debug, Clone)]
pub(super) struct Sheet {
    /// Each with whether its content is left out.
    columns: Vec<(Column, bool)>,
    zone: Tz,
}

impl Sheet {
    /// # Errors
    /// A field to be redacted that there is not: leaving it in would be the worse answer.
    pub(super) fn of(request: &ExportRequest) -> Result<Self, UnknownKind> {
        let redacted: Vec<Column> = request
            .redact
            .iter()
            .map(|field| field.parse())
            .collect::<Result<_, _>>()?;
        let columns = Column::ALL
            .iter()
            .filter(|column| column.is_for(request.audience))
            .map(|column| (*column, redacted.contains(column)))
            .collect();
        Ok(Self {
            columns,
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

    /// A row for each event, and how many cells got an apostrophe.
    pub(super) fn rows(&self, events: &[ContactEvent]) -> (Vec<u8>, u64) {
        let mut csv = writer(Vec::new());
        let mut guarded = 0;
        for event in events {
            for (column, is_redacted) in &self.columns {
                let cell = if *is_redacted {
                    Cow::Borrowed(REDACTED)
                } else {
                    self.cell(*column, event)
                };
                let cell = if is_formula(&cell) {
                    guarded += 1;
                    Cow::Owned(format!("'{cell}"))
                } else {
                    cell
                };
                csv.write_field(cell.as_bytes())
                    .expect("memory takes every write");
            }
            csv.write_record(None::<&[u8]>)
                .expect("memory takes every write");
        }
        (csv.into_inner().expect("memory takes every write"), guarded)
    }

    fn cell<'e>(&self, column: Column, event: &'e ContactEvent) -> Cow<'e, str> {
        let text = |text: &'e Option<String>| Cow::Borrowed(text.as_deref().unwrap_or_default());
        let time = |at: DateTime<Utc>| {
            let local = at.with_timezone(&self.zone);
            Cow::Owned(local.to_rfc3339_opts(SecondsFormat::Micros, false))
        };
        let maybe_time = |at: Option<DateTime<Utc>>| at.map_or(Cow::Borrowed(""), time);
        let flag = |flag: bool| Cow::Borrowed(if flag { "true" } else { "false" });
        match column {
            Column::Id => Cow::Owned(event.id.to_string()),
            Column::OccurredAt => time(event.occurred_at),
            Column::EventType => Cow::Borrowed(event.event_type.as_str()),
            Column::Category => Cow::Borrowed(event.category.as_str()),
            Column::Priority => Cow::Borrowed(event.priority.as_str()),
            Column::Source => Cow::Borrowed(event.source.as_str()),
            Column::Title => text(&event.title),
            Column::Description => text(&event.description),
            Column::Payload => Cow::Borrowed(event.payload.as_str()),
            Column::Metadata => Cow::Borrowed(event.metadata.as_str()),
            Column::SessionId => event.session_id.map_or(Cow::Borrowed(""), own),
            Column::TriggeredBy => event.triggered_by.map_or(Cow::Borrowed(""), own),
            Column::IntegrationSource => text(&event.integration_source),
            Column::IsRealtime => flag(event.is_realtime),
            Column::DeliveredAt => maybe_time(event.delivery.delivered_at()),
            Column::ReadAt => maybe_time(event.read_at),
            Column::VisibleToClient => flag(event.visibility.client),
            Column::VisibleToAgent => flag(event.visibility.agent),
            Column::ExpiresAt => maybe_time(event.expires_at),
            Column::CreatedAt => time(event.created_at),
        }
    }
}

fn own<'e>(id: impl std::fmt::Display) -> Cow<'e, str> {
    Cow::Owned(id.to_string())
}

fn writer(buffer: Vec<u8>) -> csv::Writer<Vec<u8>> {
    csv::WriterBuilder::new()
        .terminator(csv::Terminator::CRLF)
        .from_writer(buffer)
}

/// Whether a spreadsheet may take the cell for a formula. Blanks and quotes before it are no help:
/// some programs drop them on import. The wide signs are those of East Asian input.
fn is_formula(cell: &str) -> bool {
    const BLANKS: [char; 6] = [' ', '\u{a0}', '\u{feff}', '"', '\'', '`'];
    const SIGNS: [char; 11] = [
        '=', '+', '-', '@', '\t', '\r', '\n', '\u{ff1d}', '\u{ff0b}', '\u{ff0d}', '\u{ff20}',
    ];
    cell.trim_start_matches(BLANKS).starts_with(SIGNS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{
        AgentId, Category, ContactId, EventId, NewContactEvent, Source, TenantId, event_types,
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
            let (rows, guarded) = sheet.rows(&[note(title)]);
            let mut csv = csv::ReaderBuilder::new()
                .has_headers(false)
                .from_reader(&rows[..]);
            let row = csv.records().next().unwrap().unwrap();
            assert_eq!(
                (&row[6], guarded),
                (format!("'{title}").as_str(), 1),
                "{title:?}"
            );
        }
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        let sheet = Sheet::of(&request(Audience::Agent, &[])).unwrap();
        for title in ["", "a=1", "1-2", "'quoted'", "e-mail", "(-1)"] {
            assert_eq!(sheet.rows(&[note(title)]).1, 0, "{title:?}");
        }
    }

    #[test]
    fn a_field_that_there_is_not_cannot_be_redacted() {
        let error = Sheet::of(&request(Audience::Agent, &["titel"])).unwrap_err();
        assert!(error.to_string().contains("\"titel\""), "{error}");
    }
}
