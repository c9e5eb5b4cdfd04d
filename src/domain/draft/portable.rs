//! An event as it leaves one installation and comes to another: the object of the contract with all
//! its fields, one a line.
//!
//! It was recorded once, so the rules are those of that moment: its expiry may have passed since. What
//! became of it, delivery and reading, comes with it. Payload and metadata are kept as they are written,
//! since another spelling of a number would be another event.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Fault, Invalid, MAX_FUTURE, MAY_BE_NULL, NewContactEvent, Object};
use crate::domain::{ContactEvent, Delivery, Priority, TenantId, Visibility, parse_time};

/// Reads an event that `tenant` has or had elsewhere. What only [`ContactEvent`]'s JSON has may be
/// left out, but for the `id`: without it a repeat would make another event.
///
/// # Errors
/// Every fault at once.
pub fn read_portable(
    line: &str,
    tenant: &TenantId,
    now: DateTime<Utc>,
) -> Result<ContactEvent, Invalid> {
    let members: Members<'_> = serde_json::from_str(line).map_err(|error| {
        Invalid(vec![Fault {
            pointer: String::new(),
            detail: format!("is no event: {}", without_line(&error)),
        }])
    })?;
    let mut fields = Fields {
        members: members.0,
        faults: Vec::new(),
    };
    if let Some(given) = fields.text("tenant_id")
        && given != tenant.as_str()
    {
        let detail = format!("is another tenant's; the import is for {tenant}");
        fields.fault("tenant_id", detail);
    }
    let id = fields.required("id");
    let contact_id = fields.required("contact_id");
    let event_type = fields.required("event_type");
    let category = fields.required("category");
    let source = fields.required("source");
    let default = Visibility::default();
    let created_at = fields.past("created_at", now).unwrap_or(now);
    if created_at < DateTime::UNIX_EPOCH {
        fields.fault("created_at", "is before 1970");
    }
    let session_id = fields.parsed("session_id");
    let priority = fields.parsed("priority").unwrap_or(Priority::Normal);
    let title = fields.text("title").map(Cow::into_owned);
    let description = fields.text("description").map(Cow::into_owned);
    let payload = fields.object("payload");
    let metadata = fields.object("metadata");
    let triggered_by = fields.parsed("triggered_by");
    let integration_source = fields.text("integration_source").map(Cow::into_owned);
    let is_realtime = fields.flag("is_realtime").unwrap_or(false);
    let delivered_at = fields.receipt("delivered", "delivered_at", now);
    let read_at = fields.receipt("read", "read_at", now);
    let visibility = Visibility {
        client: fields.flag("visible_to_client").unwrap_or(default.client),
        agent: fields.flag("visible_to_agent").unwrap_or(default.agent),
    };
    let expires_at = fields.time("expires_at");
    let occurred_at = fields.time("occurred_at");
    fields.refuse_others();
    match (id, contact_id, event_type, category, source) {
        (Some(id), Some(contact_id), Some(event_type), Some(category), Some(source))
            if fields.faults.is_empty() =>
        {
            let draft = NewContactEvent {
                id: Some(id),
                contact_id,
                session_id,
                event_type,
                category,
                priority,
                source,
                title,
                description,
                payload,
                metadata,
                triggered_by,
                integration_source,
                is_realtime,
                visibility,
                expires_at,
                occurred_at,
            };
            let mut event = draft.record(tenant, created_at)?;
            if let Some(at) = delivered_at {
                event.delivery = Delivery::Delivered { at };
            }
            event.read_at = read_at;
            Ok(event)
        }
        _ => Err(Invalid(fields.faults)),
    }
}

/// An error of a line says where in it, and not that this is line 1.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line 1 column ") {
        Some((what, column)) => format!("{what} (column {column})"),
        None => text,
    }
}

/// The members of an object in their order, their values as they are written.
struct Members<'l>(Vec<(Cow<'l, str>, &'l str)>);

impl<'de: 'l, 'l> Deserialize<'de> for Members<'l> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object with the fields of an event")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                // As many as an event has.
                let mut members = Vec::with_capacity(24);
                while let Some((Text(name), value)) = map.next_entry::<Text<'de>, &RawValue>()? {
                    members.push((name, value.get()));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// A text that is borrowed where nothing in it is escaped.
#[derive(Deserialize)]
struct Text<'l>(#[serde(borrow)] Cow<'l, str>);

/// Takes members out of a line one by one and gathers what is wrong with them.
struct Fields<'l> {
    members: Vec<(Cow<'l, str>, &'l str)>,
    faults: Vec<Fault>,
}

impl<'l> Fields<'l> {
    fn fault(&mut self, field: &str, detail: impl fmt::Display) {
        self.faults.push(Fault::new(field, detail));
    }

    /// The value as it is written, where there is one that is not null.
    fn value(&mut self, field: &str) -> Option<&'l str> {
        let at = self.members.iter().position(|(name, _)| name == field)?;
        let (_, value) = self.members.swap_remove(at);
        if value != "null" {
            return Some(value);
        }
        if !MAY_BE_NULL.contains(&field) && !matches!(field, "delivered_at" | "read_at") {
            self.fault(field, "must not be null; what is left out has its default");
        }
        None
    }

    fn text(&mut self, field: &str) -> Option<Cow<'l, str>> {
        let value = self.value(field)?;
        match serde_json::from_str(value) {
            Ok(Text(text)) => Some(text),
            Err(_no_text) => {
                self.fault(field, "must be a text");
                None
            }
        }
    }

    fn parsed<T: FromStr<Err: fmt::Display>>(&mut self, field: &str) -> Option<T> {
        match self.text(field)?.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(field, error);
                None
            }
        }
    }

    fn required<T: FromStr<Err: fmt::Display>>(&mut self, field: &str) -> Option<T> {
        let before = self.faults.len();
        let value = self.parsed(field);
        if value.is_none() && self.faults.len() == before {
            self.fault(field, "is required");
        }
        value
    }

    fn flag(&mut self, field: &str) -> Option<bool> {
        let flag = self.value(field)?.parse();
        if flag.is_err() {
            self.fault(field, "must be true or false");
        }
        flag.ok()
    }

    fn object(&mut self, field: &str) -> Object {
        Object::Text(self.value(field).unwrap_or("{}").to_owned())
    }

    fn time(&mut self, field: &str) -> Option<DateTime<Utc>> {
        let text = self.text(field)?;
        let time = parse_time(&text);
        if time.is_none() {
            let detail = "must be a time of RFC 3339 such as 2026-01-31T12:00:00Z";
            self.fault(field, detail);
        }
        time
    }

    /// A time that was set by a daemon's clock.
    fn past(&mut self, field: &str, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let time = self.time(field)?;
        if time > now + MAX_FUTURE {
            self.fault(
                field,
                "is more than 5 minutes ahead of this machine's clock",
            );
        }
        Some(time)
    }

    /// When something was done; the flag beside it must say the same.
    fn receipt(&mut self, flag: &str, at: &str, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let is_done = self.flag(flag);
        let time = self.past(at, now);
        if is_done.is_some_and(|is_done| is_done != time.is_some()) {
            self.fault(flag, format_args!("does not agree with {at}"));
        }
        time
    }

    fn refuse_others(&mut self) {
        for (name, _) in std::mem::take(&mut self.members) {
            self.fault(&name, "is not a field of an event, or is there twice");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Category, Source, event_types};

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(1_750_000_000_123_456).unwrap()
    }

    fn acme() -> TenantId {
        TenantId::new("acme").unwrap()
    }

    fn event() -> NewContactEvent {
        let contact = "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap();
        let (category, source) = (Category::Note, Source::Agent);
        NewContactEvent::new(contact, event_types::NOTE_ADDED, category, source)
    }

    fn faults(line: &str) -> Vec<String> {
        let Invalid(faults) = read_portable(line, &acme(), now()).unwrap_err();
        faults
            .into_iter()
            .map(|fault| format!("{}: {}", fault.pointer, fault.detail))
            .collect()
    }

    #[test]
    fn an_event_comes_back_as_it_went_even_when_it_has_expired_since() {
        let minute = chrono::TimeDelta::minutes(1);
        let mut event = event()
            .title("Olá \"世界\"\n🙂\u{1}")
            .realtime()
            .expires_at(now() - minute)
            .record(&acme(), now() - minute * 2)
            .unwrap();
        event.delivery = Delivery::Delivered { at: now() };
        event.read_at = Some(now());
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(read_portable(&line, &acme(), now()), Ok(event));
    }

    #[test]
    fn numbers_and_the_order_of_keys_stay_as_they_are_written() {
        let payload = r#"{"b": 1.50, "a": 12345678901234567890123, "c": 1e400}"#;
        let event = event().record(&acme(), now()).unwrap();
        let line = serde_json::to_string(&event).unwrap();
        let line = line.replace("\"payload\":{}", &format!("\"payload\":{payload}"));
        let read = read_portable(&line, &acme(), now()).unwrap();
        assert_eq!(read.payload.as_str(), payload);
    }

    #[test]
    fn every_fault_of_a_line_is_told_at_once() {
        assert_eq!(
            faults(
                r#"{"tenant_id":"globex","event_type":"X","category":"note","source":"agent","read":true,
                    "visible_to_agent":null,"created_at":"2999-01-01T00:00:00Z","title":5,"color":"red"}"#
            ),
            [
                "/tenant_id: is another tenant's; the import is for acme",
                "/id: is required",
                "/contact_id: is required",
                "/event_type: \"X\" is not a type of an event; allowed: 1 to 64 of a-z 0-9 _ . beginning with a letter",
                "/created_at: is more than 5 minutes ahead of this machine's clock",
                "/title: must be a text",
                "/read: does not agree with read_at",
                "/visible_to_agent: must not be null; what is left out has its default",
                "/color: is not a field of an event, or is there twice",
            ]
        );
    }

    #[test]
    fn the_rules_of_an_event_hold_for_a_line() {
        let event = event().record(&acme(), now()).unwrap();
        let line = serde_json::to_string(&event).unwrap();
        let with = |from: &str, to: &str| faults(&line.replace(from, to));
        assert_eq!(
            with(
                "\"title\":null",
                &format!("\"title\":\"{}\"", "é".repeat(501))
            ),
            ["/title: must be at most 500 characters, is 501"]
        );
        assert_eq!(
            with("\"payload\":{}", r#""payload":{"a":"\u0000"}"#),
            ["/payload: must not contain the NUL character (\\u0000)"]
        );
        assert_eq!(
            with("\"payload\":{}", "\"payload\":[]"),
            ["/payload: must be a JSON object"]
        );
    }

    #[test]
    fn what_is_no_object_is_told_with_its_column() {
        assert_eq!(
            faults("{\"id\":"),
            [": is no event: EOF while parsing a value (column 6)"]
        );
        assert!(faults("[]")[0].contains("expected a JSON object with the fields of an event"));
    }
}
