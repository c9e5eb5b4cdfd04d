//! An event that is not recorded so far: the builder for code, the parser for JSON, and
//! [`NewContactEvent::record`], the one door through which an event comes into being.

mod portable;

use std::fmt;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Map, Value, json};

use super::{
    AgentId, Category, ContactEvent, ContactId, Delivery, EventId, EventType, JsonObject, Priority,
    SessionId, Source, TenantId, Visibility, event_types, micros, parse_time,
};
pub use portable::read_portable;

/// How far ahead of the daemon's clock an event may claim to have happened: clocks differ.
pub const MAX_FUTURE: TimeDelta = TimeDelta::minutes(5);

const MAX_TITLE: usize = 500;
const MAX_DESCRIPTION: usize = 20_000;
const MAX_INTEGRATION_SOURCE: usize = 255;
const MAX_PAYLOAD: usize = 64 * 1024;
const MAX_METADATA: usize = 16 * 1024;

/// The fields that may be empty.
const MAY_BE_NULL: [&str; 6] = [
    "session_id",
    "title",
    "description",
    "triggered_by",
    "integration_source",
    "expires_at",
];

/// One broken rule: where, as a JSON pointer (RFC 6901), and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Fault {
    /// The pointer of the wrong field, such as `/title`.
    pub pointer: String,
    /// What is wrong and what is allowed.
    pub detail: String,
}

impl Fault {
    fn new(field: &str, detail: impl fmt::Display) -> Self {
        // RFC 6901, 3: `~` and `/` are escaped within a token.
        let token = field.replace('~', "~0").replace('/', "~1");
        Self {
            pointer: format!("/{token}"),
            detail: detail.to_string(),
        }
    }
}

/// Every rule that a new event breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(|f| format!("{}: {}", f.pointer, f.detail)).collect::<Vec<_>>().join("; "))]
pub struct Invalid(pub Vec<Fault>);

/// What an event's payload or metadata is made from.
#[derive(Debug, Clone)]
enum Object {
    Value(Value),
    /// JSON that is kept as it was written.
    Text(String),
}

/// An event about to be recorded. Defaults: priority normal, visible to agents only, happening
/// now, not realtime, never expiring.
#[derive(Debug, Clone)]
pub struct NewContactEvent {
    id: Option<EventId>,
    contact_id: ContactId,
    session_id: Option<SessionId>,
    event_type: EventType,
    category: Category,
    priority: Priority,
    source: Source,
    title: Option<String>,
    description: Option<String>,
    payload: Object,
    metadata: Object,
    triggered_by: Option<AgentId>,
    integration_source: Option<String>,
    is_realtime: bool,
    visibility: Visibility,
    expires_at: Option<DateTime<Utc>>,
    occurred_at: Option<DateTime<Utc>>,
}

impl NewContactEvent {
    /// The least an event needs.
    #[must_use]
    pub fn new(
        contact_id: ContactId,
        event_type: EventType,
        category: Category,
        source: Source,
    ) -> Self {
        Self {
            id: None,
            contact_id,
            session_id: None,
            event_type,
            category,
            priority: Priority::Normal,
            source,
            title: None,
            description: None,
            payload: Object::Value(json!({})),
            metadata: Object::Value(json!({})),
            triggered_by: None,
            integration_source: None,
            is_realtime: false,
            visibility: Visibility::default(),
            expires_at: None,
            occurred_at: None,
        }
    }

    /// A contact moved from one stage of a pipeline to another; pushed to whoever is watching.
    #[must_use]
    pub fn pipeline_stage_changed(
        contact_id: ContactId,
        pipeline: &str,
        from: &str,
        to: &str,
    ) -> Self {
        Self::new(
            contact_id,
            event_types::PIPELINE_STAGE_CHANGED,
            Category::Pipeline,
            Source::System,
        )
        .title(format!("{pipeline}: {from} → {to}"))
        .payload(json!({ "pipeline": pipeline, "from": from, "to": to }))
        .realtime()
    }

    /// An agent was put in charge of the contact.
    #[must_use]
    pub fn agent_assigned(contact_id: ContactId, agent: AgentId, by: Option<AgentId>) -> Self {
        let event = Self::new(
            contact_id,
            event_types::AGENT_ASSIGNED,
            Category::Assignment,
            Source::Agent,
        )
        .title("Agent assigned")
        .payload(json!({ "agent_id": agent }))
        .realtime();
        match by {
            Some(by) => event.triggered_by(by),
            None => event,
        }
    }

    /// A notification that the contact itself should see at once, until `expires_at`.
    #[must_use]
    pub fn urgent_notification(
        contact_id: ContactId,
        title: &str,
        expires_at: DateTime<Utc>,
    ) -> Self {
        Self::new(
            contact_id,
            event_types::NOTIFICATION_SENT,
            Category::Notification,
            Source::System,
        )
        .priority(Priority::Urgent)
        .title(title)
        .visible_to_client(true)
        .expires_at(expires_at)
        .realtime()
    }

    /// The first event of a session's timeline.
    #[must_use]
    pub fn session_started(contact_id: ContactId, session: SessionId, channel: &str) -> Self {
        Self::new(
            contact_id,
            event_types::SESSION_STARTED,
            Category::Session,
            Source::System,
        )
        .session(session)
        .title(format!("Session started by {channel}"))
        .payload(json!({ "channel": channel }))
    }

    /// The last event of a session's timeline.
    #[must_use]
    pub fn session_ended(contact_id: ContactId, session: SessionId) -> Self {
        Self::new(
            contact_id,
            event_types::SESSION_ENDED,
            Category::Session,
            Source::System,
        )
        .session(session)
        .title("Session ended")
    }

    /// Another product added what it knows of the contact.
    #[must_use]
    pub fn enriched(contact_id: ContactId, integration: &str, fields: Value) -> Self {
        Self::new(
            contact_id,
            event_types::CONTACT_ENRICHED,
            Category::System,
            Source::Integration,
        )
        .integration_source(integration)
        .title(format!("Enriched by {integration}"))
        .payload(fields)
    }

    /// Gives the event the caller's own id, which makes a repeat harmless.
    #[must_use]
    pub fn id(mut self, id: EventId) -> Self {
        self.id = Some(id);
        self
    }

    /// The session it happened in.
    #[must_use]
    pub fn session(mut self, session: SessionId) -> Self {
        self.session_id = Some(session);
        self
    }

    /// How soon it should be seen.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// A line for people.
    #[must_use]
    pub fn title(mut self, title: impl Into<String>) -> Self {
        self.title = Some(title.into());
        self
    }

    /// A text for people.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = Some(description.into());
        self
    }

    /// Facts for programs: a JSON object.
    #[must_use]
    pub fn payload(mut self, payload: Value) -> Self {
        self.payload = Object::Value(payload);
        self
    }

    /// Facts about the event itself: a JSON object.
    #[must_use]
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = Object::Value(metadata);
        self
    }

    /// The agent who caused it.
    #[must_use]
    pub fn triggered_by(mut self, agent: AgentId) -> Self {
        self.triggered_by = Some(agent);
        self
    }

    /// The product it came from.
    #[must_use]
    pub fn integration_source(mut self, name: impl Into<String>) -> Self {
        self.integration_source = Some(name.into());
        self
    }

    /// Pushes it to whoever is watching.
    #[must_use]
    pub fn realtime(mut self) -> Self {
        self.is_realtime = true;
        self
    }

    /// Whether the contact itself may see it.
    #[must_use]
    pub fn visible_to_client(mut self, visible: bool) -> Self {
        self.visibility.client = visible;
        self
    }

    /// Whether agents may see it.
    #[must_use]
    pub fn visible_to_agent(mut self, visible: bool) -> Self {
        self.visibility.agent = visible;
        self
    }

    /// From when on it is expired.
    #[must_use]
    pub fn expires_at(mut self, at: DateTime<Utc>) -> Self {
        self.expires_at = Some(at);
        self
    }

    /// When it happened; may be long ago.
    #[must_use]
    pub fn occurred_at(mut self, at: DateTime<Utc>) -> Self {
        self.occurred_at = Some(at);
        self
    }

    /// The caller's own id, where one was given.
    #[must_use]
    pub fn given_id(&self) -> Option<EventId> {
        self.id
    }

    /// Reads the body of a create. `contact` is the contact that the address names; without it the
    /// body must name one in `contact_id`.
    ///
    /// # Errors
    /// Every fault at once: wrong types, unknown fields, missing fields.
    pub fn from_json(body: &Value, contact: Option<ContactId>) -> Result<Self, Invalid> {
        let Value::Object(body) = body else {
            return Err(Invalid(vec![Fault {
                pointer: String::new(),
                detail: "must be a JSON object with the fields of an event".to_owned(),
            }]));
        };
        let mut fields = Fields {
            body,
            known: Vec::new(),
            faults: Vec::new(),
        };
        let contact_id = match contact {
            Some(contact) => {
                let given = fields.parsed::<ContactId>("contact_id");
                if given.is_some_and(|given| given != contact) {
                    fields.fault(
                        "contact_id",
                        format!("differs from the contact of the address, {contact}"),
                    );
                }
                Some(contact)
            }
            None => fields.required("contact_id"),
        };
        let id = fields.parsed("id");
        let session_id = fields.parsed("session_id");
        let event_type = fields.required("event_type");
        let category = fields.required("category");
        let source = fields.required("source");
        let priority = fields.parsed("priority").unwrap_or(Priority::Normal);
        let title = fields.text("title");
        let description = fields.text("description");
        let payload = Object::Value(fields.object("payload"));
        let metadata = Object::Value(fields.object("metadata"));
        let triggered_by = fields.parsed("triggered_by");
        let integration_source = fields.text("integration_source");
        let is_realtime = fields.flag("is_realtime").unwrap_or(false);
        let default = Visibility::default();
        let visibility = Visibility {
            client: fields.flag("visible_to_client").unwrap_or(default.client),
            agent: fields.flag("visible_to_agent").unwrap_or(default.agent),
        };
        let expires_at = fields.time("expires_at");
        let occurred_at = fields.time("occurred_at");
        fields.refuse_unknown();

        match (contact_id, event_type, category, source) {
            (Some(contact_id), Some(event_type), Some(category), Some(source))
                if fields.faults.is_empty() =>
            {
                Ok(Self {
                    id,
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
                })
            }
            _ => Err(Invalid(fields.faults)),
        }
    }

    /// Makes it an event of `tenant`, recorded at `now`.
    ///
    /// # Errors
    /// Every rule that it breaks, at once.
    pub fn record(self, tenant: &TenantId, now: DateTime<Utc>) -> Result<ContactEvent, Invalid> {
        let now = micros(now);
        let mut faults = Vec::new();
        check_text(&mut faults, "title", self.title.as_deref(), MAX_TITLE);
        check_text(
            &mut faults,
            "description",
            self.description.as_deref(),
            MAX_DESCRIPTION,
        );
        check_text(
            &mut faults,
            "integration_source",
            self.integration_source.as_deref(),
            MAX_INTEGRATION_SOURCE,
        );
        if self.source == Source::Integration
            && self.integration_source.as_deref().unwrap_or("").is_empty()
        {
            faults.push(Fault::new(
                "integration_source",
                "is required where source is integration",
            ));
        }
        let payload = check_object(&mut faults, "payload", self.payload, MAX_PAYLOAD);
        let metadata = check_object(&mut faults, "metadata", self.metadata, MAX_METADATA);
        let expires_at = self.expires_at.map(micros);
        if expires_at.is_some_and(|at| at <= now) {
            faults.push(Fault::new(
                "expires_at",
                "is in the past; an event cannot be born expired",
            ));
        }
        let occurred_at = micros(self.occurred_at.unwrap_or(now));
        if occurred_at > now + MAX_FUTURE {
            faults.push(Fault::new(
                "occurred_at",
                "is more than 5 minutes ahead of the daemon's clock",
            ));
        }
        if !faults.is_empty() {
            return Err(Invalid(faults));
        }
        Ok(ContactEvent {
            id: self.id.unwrap_or_else(|| EventId::generate(now)),
            tenant_id: tenant.clone(),
            contact_id: self.contact_id,
            session_id: self.session_id,
            event_type: self.event_type,
            category: self.category,
            priority: self.priority,
            source: self.source,
            title: self.title,
            description: self.description,
            payload,
            metadata,
            triggered_by: self.triggered_by,
            integration_source: self.integration_source,
            is_realtime: self.is_realtime,
            delivery: if self.is_realtime {
                Delivery::Pending
            } else {
                Delivery::NotRealtime
            },
            read_at: None,
            visibility: self.visibility,
            expires_at,
            occurred_at,
            created_at: now,
        })
    }
}

fn check_text(faults: &mut Vec<Fault>, field: &str, text: Option<&str>, limit: usize) {
    let Some(text) = text else { return };
    let length = text.chars().count();
    if length > limit {
        faults.push(Fault::new(
            field,
            format_args!("must be at most {limit} characters, is {length}"),
        ));
    }
    if text.contains('\0') {
        faults.push(Fault::new(
            field,
            "must not contain the NUL character (\\u0000)",
        ));
    }
}

fn check_object(faults: &mut Vec<Fault>, field: &str, object: Object, limit: usize) -> JsonObject {
    let object = match object {
        Object::Value(value) => JsonObject::new(&value, limit),
        Object::Text(text) => JsonObject::from_text(text, limit),
    };
    object.unwrap_or_else(|error| {
        faults.push(Fault::new(field, error));
        JsonObject::default()
    })
}

/// Takes fields out of a body one by one and gathers what is wrong with them.
struct Fields<'a> {
    body: &'a Map<String, Value>,
    known: Vec<&'static str>,
    faults: Vec<Fault>,
}

impl Fields<'_> {
    fn fault(&mut self, field: &str, detail: impl fmt::Display) {
        self.faults.push(Fault::new(field, detail));
    }

    /// The value, where there is one that is not null.
    fn value(&mut self, field: &'static str) -> Option<Value> {
        self.known.push(field);
        match self.body.get(field)? {
            // Taken for the default, a null from a caller's own gap would show an event to agents.
            Value::Null if !MAY_BE_NULL.contains(&field) => {
                self.fault(field, "must not be null; what is left out has its default");
                None
            }
            Value::Null => None,
            value => Some(value.clone()),
        }
    }

    fn text(&mut self, field: &'static str) -> Option<String> {
        match self.value(field)? {
            Value::String(text) => Some(text),
            other => {
                self.fault(
                    field,
                    format_args!("must be a text, is {}", type_name(&other)),
                );
                None
            }
        }
    }

    fn parsed<T: std::str::FromStr<Err: fmt::Display>>(
        &mut self,
        field: &'static str,
    ) -> Option<T> {
        match self.text(field)?.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.fault(field, error);
                None
            }
        }
    }

    fn required<T: std::str::FromStr<Err: fmt::Display>>(
        &mut self,
        field: &'static str,
    ) -> Option<T> {
        let before = self.faults.len();
        let value = self.parsed(field);
        if value.is_none() && self.faults.len() == before {
            self.fault(field, "is required");
        }
        value
    }

    fn flag(&mut self, field: &'static str) -> Option<bool> {
        match self.value(field)? {
            Value::Bool(flag) => Some(flag),
            other => {
                self.fault(
                    field,
                    format_args!("must be true or false, is {}", type_name(&other)),
                );
                None
            }
        }
    }

    fn object(&mut self, field: &'static str) -> Value {
        self.value(field).unwrap_or_else(|| json!({}))
    }

    fn time(&mut self, field: &'static str) -> Option<DateTime<Utc>> {
        let text = self.text(field)?;
        let time = parse_time(&text);
        if time.is_none() {
            let detail = "must be a time of RFC 3339 such as 2026-01-31T12:00:00Z";
            self.fault(field, detail);
        }
        time
    }

    fn refuse_unknown(&mut self) {
        for field in self
            .body
            .keys()
            .filter(|field| !self.known.contains(&field.as_str()))
        {
            let detail = match field.as_str() {
                "tenant_id" => "is not taken from a body; it comes from the credential",
                "delivered" | "delivered_at" | "read" | "read_at" => {
                    "is derived from receipts and cannot be set"
                }
                "created_at" => "is set by the daemon",
                _ => "is not a field of an event",
            };
            self.faults.push(Fault::new(field, detail));
        }
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Audience;

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(1_750_000_000_123_456).unwrap()
    }

    fn tenant() -> TenantId {
        TenantId::new("acme").unwrap()
    }

    fn contact() -> ContactId {
        "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap()
    }

    fn event() -> NewContactEvent {
        NewContactEvent::new(
            contact(),
            event_types::NOTE_ADDED,
            Category::Note,
            Source::Agent,
        )
    }

    fn pointers(result: Result<ContactEvent, Invalid>) -> Vec<String> {
        result
            .unwrap_err()
            .0
            .into_iter()
            .map(|fault| fault.pointer)
            .collect()
    }

    const MICRO: TimeDelta = TimeDelta::microseconds(1);

    #[test]
    fn a_null_is_taken_only_where_a_field_may_be_empty() {
        let mut body = json!({ "event_type": "x", "category": "note", "source": "agent" });
        for field in MAY_BE_NULL {
            body[field] = Value::Null;
        }
        assert!(NewContactEvent::from_json(&body, Some(contact())).is_ok());
        body["visible_to_agent"] = Value::Null;
        let faults = NewContactEvent::from_json(&body, Some(contact()))
            .unwrap_err()
            .0;
        assert_eq!(faults.len(), 1);
        assert_eq!(faults[0].pointer, "/visible_to_agent");
    }

    #[test]
    fn an_event_is_expired_from_the_microsecond_of_its_expiry() {
        let event = event()
            .expires_at(now() + MICRO)
            .record(&tenant(), now())
            .unwrap();
        assert!(!event.is_expired(now()));
        assert!(event.is_expired(now() + MICRO));
        assert!(event.is_visible_to(Audience::Agent, now()));
        assert!(!event.is_visible_to(Audience::Agent, now() + MICRO));
        assert!(event.is_visible_to(Audience::Audit, now() + MICRO));
    }

    #[test]
    fn an_expiry_at_or_before_now_is_refused() {
        assert_eq!(
            pointers(event().expires_at(now()).record(&tenant(), now())),
            ["/expires_at"]
        );
    }

    #[test]
    fn an_event_may_be_five_minutes_ahead_and_not_a_microsecond_more() {
        assert!(
            event()
                .occurred_at(now() + MAX_FUTURE)
                .record(&tenant(), now())
                .is_ok()
        );
        let late = event().occurred_at(now() + MAX_FUTURE + MICRO);
        assert_eq!(pointers(late.record(&tenant(), now())), ["/occurred_at"]);
    }

    #[test]
    fn an_event_may_be_a_century_old() {
        let old = event()
            .occurred_at(now() - TimeDelta::days(36_525))
            .record(&tenant(), now());
        assert_eq!(old.unwrap().created_at, now());
    }

    #[test]
    fn texts_are_counted_in_characters_at_their_limits() {
        let long = |title: usize, description: usize| {
            event()
                .title("é".repeat(title))
                .description("é".repeat(description))
                .record(&tenant(), now())
        };
        assert!(long(500, 20_000).is_ok());
        assert_eq!(pointers(long(501, 20_001)), ["/title", "/description"]);
    }

    #[test]
    fn an_integration_must_say_which() {
        let unnamed = NewContactEvent::new(
            contact(),
            event_types::CONTACT_ENRICHED,
            Category::System,
            Source::Integration,
        );
        assert_eq!(
            pointers(unnamed.clone().record(&tenant(), now())),
            ["/integration_source"]
        );
        assert_eq!(
            pointers(
                unnamed
                    .clone()
                    .integration_source("")
                    .record(&tenant(), now())
            ),
            ["/integration_source"]
        );
        assert!(
            unnamed
                .clone()
                .integration_source("x".repeat(255))
                .record(&tenant(), now())
                .is_ok()
        );
        assert!(
            unnamed
                .integration_source("x".repeat(256))
                .record(&tenant(), now())
                .is_err()
        );
    }

    #[test]
    fn nul_is_refused_in_every_text() {
        let result = event()
            .title("a\0")
            .description("\0")
            .payload(json!({"a": "\0"}))
            .record(&tenant(), now());
        assert_eq!(pointers(result), ["/title", "/description", "/payload"]);
    }

    #[test]
    fn payload_and_metadata_have_their_own_limits() {
        let object = |bytes: usize| json!({ "k": "x".repeat(bytes - 8) });
        let sized = |payload, metadata| {
            event()
                .payload(object(payload))
                .metadata(object(metadata))
                .record(&tenant(), now())
        };
        assert!(sized(64 * 1024, 16 * 1024).is_ok());
        assert_eq!(
            pointers(sized(64 * 1024 + 1, 16 * 1024 + 1)),
            ["/payload", "/metadata"]
        );
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let body = json!({"event_type": "note_added", "category": "note", "source": "agent"});
        let event = NewContactEvent::from_json(&body, Some(contact()))
            .unwrap()
            .record(&tenant(), now())
            .unwrap();
        let json = serde_json::to_value(&event).unwrap();
        assert_eq!(json["priority"], "normal");
        assert_eq!(json["visible_to_client"], false);
        assert_eq!(json["visible_to_agent"], true);
        assert_eq!(json["is_realtime"], false);
        assert_eq!(json["occurred_at"], "2025-06-15T15:06:40.123456Z");
        assert_eq!(json["payload"], json!({}));
        assert_eq!(json["title"], Value::Null);
        assert_eq!(json.as_object().unwrap().len(), 24);
    }

    #[test]
    fn every_fault_of_a_body_is_told_at_once_with_its_pointer() {
        let body = json!({
            "event_type": "Note", "category": "notes", "priority": 3, "title": [], "is_realtime": "yes",
            "occurred_at": "yesterday", "tenant_id": "x", "a/b~c": 1, "session_id": "1"
        });
        let faults = NewContactEvent::from_json(&body, Some(contact()))
            .unwrap_err()
            .0;
        let pointers: Vec<_> = faults.iter().map(|fault| fault.pointer.as_str()).collect();
        assert_eq!(
            pointers,
            [
                "/session_id",
                "/event_type",
                "/category",
                "/source",
                "/priority",
                "/title",
                "/is_realtime",
                "/occurred_at",
                "/a~1b~0c",
                "/tenant_id"
            ]
        );
    }

    #[test]
    fn a_body_may_repeat_the_contact_of_the_address_but_not_another() {
        let body = |id: &str| json!({"event_type": "a", "category": "note", "source": "agent", "contact_id": id});
        assert!(NewContactEvent::from_json(&body(&contact().to_string()), Some(contact())).is_ok());
        let other = "0190b5f0-7c1e-7d3a-8f00-000000000002";
        assert!(NewContactEvent::from_json(&body(other), Some(contact())).is_err());
        assert!(NewContactEvent::from_json(&body(other), None).is_ok());
    }

    #[test]
    fn the_scenarios_of_the_product_are_valid_events() {
        let agent: AgentId = "0190b5f0-7c1e-7d3a-8f00-00000000000a".parse().unwrap();
        let session: SessionId = "0190b5f0-7c1e-7d3a-8f00-00000000000b".parse().unwrap();
        let record = |event: NewContactEvent| event.record(&tenant(), now()).unwrap();

        let moved = record(NewContactEvent::pipeline_stage_changed(
            contact(),
            "Sales",
            "Lead",
            "Won",
        ));
        assert_eq!(
            moved.payload.as_str(),
            r#"{"from":"Lead","pipeline":"Sales","to":"Won"}"#
        );
        assert_eq!(moved.delivery, Delivery::Pending);

        let assigned = record(NewContactEvent::agent_assigned(
            contact(),
            agent,
            Some(agent),
        ));
        assert_eq!(assigned.triggered_by, Some(agent));

        let urgent = record(NewContactEvent::urgent_notification(
            contact(),
            "Call now",
            now() + MICRO,
        ));
        assert_eq!(
            (urgent.priority, urgent.visibility.client),
            (Priority::Urgent, true)
        );

        let started = record(NewContactEvent::session_started(contact(), session, "web"));
        let ended = record(NewContactEvent::session_ended(contact(), session));
        assert_eq!(
            (started.session_id, ended.session_id),
            (Some(session), Some(session))
        );

        let enriched = record(NewContactEvent::enriched(
            contact(),
            "clearbit",
            json!({"size": 50}),
        ));
        assert_eq!(enriched.integration_source.as_deref(), Some("clearbit"));
    }
}
