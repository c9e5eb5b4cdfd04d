//! Pages of which SQLite made one text: fields divided by NUL, which no text of an event holds.
//!
//! What may be null is empty, or begins with `=`, where an empty text is something else.

use std::cell::Cell;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::storage::events::{Key, Slice};
use crate::storage::rows::{Columns, Slicing};

type Read<T> = Result<T, sqlx::Error>;

/// The fields of a row, in the order of the statement.
const FIELDS: [&str; 21] = [
    "id",
    "contact_id",
    "session_id",
    "event_type",
    "category",
    "priority",
    "source",
    "title",
    "description",
    "payload",
    "metadata",
    "triggered_by",
    "integration_source",
    "is_realtime",
    "delivered_at",
    "read_at",
    "visible_to_client",
    "visible_to_agent",
    "expires_at",
    "occurred_at",
    "created_at",
];
/// Those texts that may be null.
const MAYBE_TEXTS: [&str; 3] = ["title", "description", "integration_source"];

/// The page of a text with so many rows; `None` where it has not their fields, or not in their order.
pub(super) fn page(tenant: &str, text: &str, rows: i64, limit: u32) -> Option<Slice> {
    let mut slicing = Slicing::new(limit);
    let mut fields = text.split('\0');
    for _ in 0..rows {
        let mut row = [""; FIELDS.len()];
        for field in &mut row {
            *field = fields.next()?;
        }
        slicing.push(&Packed {
            tenant,
            row,
            next: Cell::new(0),
        });
    }
    // Of nothing, one empty part is left.
    let left = fields.next();
    let is_whole = if rows == 0 {
        left == Some("")
    } else {
        left.is_none()
    };
    let page = slicing.end();
    // An aggregate sees the rows of its subquery in their order; so far, and nobody promises it.
    let is_ordered = page.events.is_sorted_by_key(Key::from);
    (is_whole && is_ordered).then_some(page)
}

/// A row of a page.
struct Packed<'p> {
    tenant: &'p str,
    row: [&'p str; FIELDS.len()],
    /// Where the next field is looked for: they are read in about their order.
    next: Cell<usize>,
}

impl<'p> Packed<'p> {
    /// A field; `None` where it is null.
    fn field(&self, column: &'static str) -> Read<Option<&'p str>> {
        match column {
            "tenant_id" => return Ok(Some(self.tenant)),
            // That of an event which has not expired has not, see `row_columns`.
            "delivery_expired_at" => return Ok(None),
            _ => {}
        }
        let places = (self.next.get()..FIELDS.len()).chain(0..self.next.get());
        let place = places.into_iter().find(|place| FIELDS[*place] == column);
        let place = place.ok_or_else(|| sqlx::Error::ColumnNotFound(column.to_owned()))?;
        self.next.set((place + 1) % FIELDS.len());
        let field = self.row[place];
        Ok((!field.is_empty()).then_some(field))
    }

    fn decoded<T>(
        &self,
        column: &'static str,
        decode: impl FnOnce(&str) -> Option<T>,
    ) -> Read<Option<T>> {
        let Some(field) = self.field(column)? else {
            return Ok(None);
        };
        let value = decode(field).ok_or_else(|| {
            sqlx::Error::Decode(format!("{column} is not of its column's type").into())
        })?;
        Ok(Some(value))
    }
}

impl Columns for Packed<'_> {
    fn text(&self, column: &'static str) -> Read<Option<String>> {
        if MAYBE_TEXTS.contains(&column) {
            return self.decoded(column, |field| field.strip_prefix('=').map(str::to_owned));
        }
        // Others are not null, and an empty one is none that its reader takes.
        Ok(Some(self.field(column)?.unwrap_or_default().to_owned()))
    }

    fn uuid(&self, column: &'static str) -> Read<Option<Uuid>> {
        self.decoded(column, |field| Uuid::try_parse(field).ok())
    }

    fn time(&self, column: &'static str) -> Read<Option<DateTime<Utc>>> {
        self.decoded(column, |field| {
            DateTime::from_timestamp_micros(field.parse().ok()?)
        })
    }

    fn flag(&self, column: &'static str) -> Read<bool> {
        Ok(self.field(column)? != Some("0"))
    }

    fn int(&self, column: &'static str) -> Read<Option<i64>> {
        self.decoded(column, |field| field.parse().ok())
    }

    fn texts(&self, column: &'static str) -> Read<Vec<String>> {
        Err(sqlx::Error::ColumnNotFound(column.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";

    /// A row as the statement writes it, `at` so many microseconds after 1970.
    fn row(title: &str, at: u32) -> String {
        let at = at.to_string();
        let fields = [
            ID,
            ID,
            "",
            "note_added",
            "note",
            "normal",
            "agent",
            title,
            "=",
            "{}",
            "{}",
            "",
            "",
            "0",
            "",
            "",
            "0",
            "1",
            "",
            &at,
            &at,
        ];
        fields.join("\0")
    }

    fn read(rows: &[String], limit: u32) -> Option<Slice> {
        page(
            "acme",
            &rows.join("\0"),
            i64::try_from(rows.len()).unwrap(),
            limit,
        )
    }

    #[test]
    fn null_is_not_an_empty_text() {
        let page = read(&[row("", 1), row("=", 2), row("==", 3)], 9).unwrap();
        let titles: Vec<_> = page
            .events
            .iter()
            .map(|event| event.title.as_deref())
            .collect();
        assert_eq!(titles, [None, Some(""), Some("=")]);
        assert_eq!(page.events[0].description.as_deref(), Some(""));
        assert_eq!((page.events[0].read_at, page.next), (None, None));
        assert!(page.events[0].visibility.agent && !page.events[0].visibility.client);
    }

    #[test]
    fn a_row_more_than_asked_for_says_where_to_go_on() {
        let page = read(&[row("", 1), row("", 2)], 1).unwrap();
        assert_eq!(page.events.len(), 1);
        assert_eq!(page.next, Some(Key::from(&page.events[0])));
    }

    #[test]
    fn a_text_that_does_not_come_apart_is_no_page() {
        assert_eq!(read(&[], 9).unwrap().events, []);
        assert!(read(&[row("=a\0b", 1)], 9).is_none());
        assert!(page("acme", "", 1, 9).is_none());
        assert!(page("acme", "x", 0, 9).is_none());
        assert!(read(&[row("", 2), row("", 1)], 9).is_none(), "out of order");
    }
}
