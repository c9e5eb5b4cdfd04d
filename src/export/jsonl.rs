//! A timeline as JSON lines: one event a line, complete, in full precision.
//!
//! Pure: events in, bytes out. A line is the event as the API answers it, so that
//! `timelined events import` makes the same event of it; the text of payload and metadata is passed on
//! as it is. What a client's file leaves out (see [`Column::is_for`]) is missing from its lines too.

use chrono::{DateTime, Utc};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::csv::{Column, REDACTED, columns};
use super::time;
use super::writer::Notes;
use crate::domain::{AgentId, ContactEvent, JsonObject, SessionId, UnknownKind};
use crate::storage::ExportRequest;

/// Stands in place of an object that was asked to be left out.
const REDACTED_OBJECT: &str = r#"{"redacted":true}"#;

/// The columns in the order of the API's object. Before some of them stand keys that are no columns.
const ORDER: [Column; 20] = [
    Column::Id,
    Column::SessionId,
    Column::EventType,
    Column::Category,
    Column::Priority,
    Column::Source,
    Column::Title,
    Column::Description,
    Column::Payload,
    Column::Metadata,
    Column::TriggeredBy,
    Column::IntegrationSource,
    Column::IsRealtime,
    Column::DeliveredAt,
    Column::ReadAt,
    Column::VisibleToClient,
    Column::VisibleToAgent,
    Column::ExpiresAt,
    Column::OccurredAt,
    Column::CreatedAt,
];

/// How one export is written.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    columns: Vec<(Column, bool)>,
}

impl Lines {
    /// # Errors
    /// Where a field is to be redacted that there is not.
    pub(super) fn of(request: &ExportRequest) -> Result<Self, UnknownKind> {
        let wanted = columns(request)?;
        let columns = ORDER.iter().filter_map(|column| {
            let (_, is_redacted) = wanted.iter().find(|(wanted, _)| wanted == column)?;
            Some((*column, *is_redacted))
        });
        Ok(Self {
            columns: columns.collect(),
        })
    }

    /// A line for each event, and what is to be told of them.
    pub(super) fn lines(&self, events: &[ContactEvent]) -> (Vec<u8>, Notes) {
        let mut lines = Vec::new();
        let mut notes = Notes::default();
        for event in events {
            lines.push(b'{');
            for (index, (column, is_redacted)) in self.columns.iter().enumerate() {
                if index > 0 {
                    lines.push(b',');
                }
                if *is_redacted {
                    notes.redacted_cells += 1;
                    push_redacted(&mut lines, *column);
                } else {
                    push_value(&mut lines, *column, event);
                }
                if *column == Column::Id {
                    push_key(&mut lines, ",\"tenant_id\":");
                    push_text(&mut lines, event.tenant_id.as_str());
                    push_key(&mut lines, ",\"contact_id\":");
                    push_id(&mut lines, Some(event.contact_id.uuid()));
                }
            }
            lines.extend_from_slice(b"}\n");
        }
        (lines, notes)
    }
}

fn push_value(line: &mut Vec<u8>, column: Column, event: &ContactEvent) {
    match column {
        Column::DeliveredAt => {
            push_key(line, "\"delivered\":");
            push_flag(line, event.delivery.delivered_at().is_some());
            line.push(b',');
        }
        Column::ReadAt => {
            push_key(line, "\"read\":");
            push_flag(line, event.read_at.is_some());
            line.push(b',');
        }
        _ => {}
    }
    push_name(line, column);
    match column {
        Column::Id => push_id(line, Some(event.id.uuid())),
        Column::SessionId => push_id(line, event.session_id.map(SessionId::uuid)),
        Column::TriggeredBy => push_id(line, event.triggered_by.map(AgentId::uuid)),
        Column::EventType => push_text(line, event.event_type.as_str()),
        Column::Category => push_text(line, event.category.as_str()),
        Column::Priority => push_text(line, event.priority.as_str()),
        Column::Source => push_text(line, event.source.as_str()),
        Column::Title => push_maybe_text(line, event.title.as_deref()),
        Column::Description => push_maybe_text(line, event.description.as_deref()),
        Column::IntegrationSource => push_maybe_text(line, event.integration_source.as_deref()),
        Column::Payload => push_object(line, &event.payload),
        Column::Metadata => push_object(line, &event.metadata),
        Column::IsRealtime => push_flag(line, event.is_realtime),
        Column::VisibleToClient => push_flag(line, event.visibility.client),
        Column::VisibleToAgent => push_flag(line, event.visibility.agent),
        Column::OccurredAt => push_time(line, Some(event.occurred_at)),
        Column::DeliveredAt => push_time(line, event.delivery.delivered_at()),
        Column::ReadAt => push_time(line, event.read_at),
        Column::ExpiresAt => push_time(line, event.expires_at),
        Column::CreatedAt => push_time(line, Some(event.created_at)),
    }
}

/// What stands in place of a field's content: of its type, so that the line can still be read.
fn push_redacted(line: &mut Vec<u8>, column: Column) {
    push_name(line, column);
    match column {
        Column::Title | Column::Description | Column::IntegrationSource => {
            push_text(line, REDACTED);
        }
        Column::Payload | Column::Metadata => push_key(line, REDACTED_OBJECT),
        _ => push_key(line, "null"),
    }
}

fn push_name(line: &mut Vec<u8>, column: Column) {
    line.push(b'"');
    line.extend_from_slice(column.as_str().as_bytes());
    line.extend_from_slice(b"\":");
}

fn push_key(line: &mut Vec<u8>, key: &str) {
    line.extend_from_slice(key.as_bytes());
}

fn push_text(line: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(line, text).expect("memory takes every write");
}

fn push_maybe_text(line: &mut Vec<u8>, text: Option<&str>) {
    match text {
        Some(text) => push_text(line, text),
        None => push_key(line, "null"),
    }
}

/// The object's own text. Other programs may have written it over several lines.
fn push_object(line: &mut Vec<u8>, object: &JsonObject) {
    line.extend_from_slice(object.in_one_line().as_bytes());
}

fn push_flag(line: &mut Vec<u8>, flag: bool) {
    push_key(line, if flag { "true" } else { "false" });
}

fn push_id(line: &mut Vec<u8>, id: Option<Uuid>) {
    let Some(id) = id else {
        return push_key(line, "null");
    };
    let mut buffer = [0; Hyphenated::LENGTH];
    line.push(b'"');
    line.extend_from_slice(id.hyphenated().encode_lower(&mut buffer).as_bytes());
    line.push(b'"');
}

fn push_time(line: &mut Vec<u8>, at: Option<DateTime<Utc>>) {
    let Some(at) = at else {
        return push_key(line, "null");
    };
    line.push(b'"');
    time::push_utc(line, at);
    line.push(b'"');
}
