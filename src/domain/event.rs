//! The contact event: a fact. Once recorded, only its visibility and expiry may change.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::{
    AgentId, Audience, Category, ContactId, EventId, EventType, JsonObject, Priority, SessionId,
    Source, TenantId, Visibility,
};

/// How far a realtime event has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Not meant to be pushed.
    NotRealtime,
    /// Realtime and not acknowledged so far.
    Pending,
    /// A reader of its audience acknowledged it, recorded at `at`.
    Delivered {
        /// When the daemon recorded the acknowledgement.
        at: DateTime<Utc>,
    },
    /// Nobody had acknowledged it when it expired.
    Expired {
        /// When the daemon recorded that.
        at: DateTime<Utc>,
    },
}

impl Delivery {
    /// When it was delivered, if it was.
    #[must_use]
    pub fn delivered_at(self) -> Option<DateTime<Utc>> {
        match self {
            Self::Delivered { at } => Some(at),
            _ => None,
        }
    }
}

/// An event in the timeline of a contact. One that exists is valid: it is made by
/// [`NewContactEvent::record`](super::NewContactEvent::record) or read from a database whose
/// constraints hold the same rules.
#[derive(Debug, Clone, PartialEq)]
pub struct ContactEvent {
    /// Its identity within the tenant.
    pub id: EventId,
    /// Whose it is.
    pub tenant_id: TenantId,
    /// Whose timeline it belongs to.
    pub contact_id: ContactId,
    /// The session it happened in.
    pub session_id: Option<SessionId>,
    /// What happened.
    pub event_type: EventType,
    /// What it speaks of.
    pub category: Category,
    /// How soon it should be seen.
    pub priority: Priority,
    /// Where it comes from.
    pub source: Source,
    /// At most 500 characters.
    pub title: Option<String>,
    /// At most 20,000 characters.
    pub description: Option<String>,
    /// At most 64 KiB.
    pub payload: JsonObject,
    /// At most 16 KiB.
    pub metadata: JsonObject,
    /// The agent who caused it.
    pub triggered_by: Option<AgentId>,
    /// The product it came from; present where `source` is `integration`.
    pub integration_source: Option<String>,
    /// Whether it is pushed to whoever is watching.
    pub is_realtime: bool,
    /// How far the push has come.
    pub delivery: Delivery,
    /// When the first of all readers read it.
    pub read_at: Option<DateTime<Utc>>,
    /// Who may see it.
    pub visibility: Visibility,
    /// It is expired from this instant on.
    pub expires_at: Option<DateTime<Utc>>,
    /// When it happened.
    pub occurred_at: DateTime<Utc>,
    /// When it was recorded.
    pub created_at: DateTime<Utc>,
}

impl ContactEvent {
    /// Expired from the instant `now >= expires_at`.
    #[must_use]
    pub fn is_expired(&self, now: DateTime<Utc>) -> bool {
        self.expires_at.is_some_and(|expires_at| now >= expires_at)
    }

    /// Whether `audience` may see it at `now`. Audit sees expired events too.
    #[must_use]
    pub fn is_visible_to(&self, audience: Audience, now: DateTime<Utc>) -> bool {
        self.visibility.includes(audience) && (audience == Audience::Audit || !self.is_expired(now))
    }
}

/// RFC 3339 in UTC with microseconds, as every time is written in JSON.
#[must_use]
pub fn format_time(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Micros, true)
}

impl Serialize for ContactEvent {
    /// The flat object of the contract: every key is present, `null` where empty.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let time = |at: Option<DateTime<Utc>>| at.map(format_time);
        let delivered_at = self.delivery.delivered_at();
        let mut event = serializer.serialize_struct("ContactEvent", 24)?;
        event.serialize_field("id", &self.id)?;
        event.serialize_field("tenant_id", &self.tenant_id)?;
        event.serialize_field("contact_id", &self.contact_id)?;
        event.serialize_field("session_id", &self.session_id)?;
        event.serialize_field("event_type", &self.event_type)?;
        event.serialize_field("category", &self.category)?;
        event.serialize_field("priority", &self.priority)?;
        event.serialize_field("source", &self.source)?;
        event.serialize_field("title", &self.title)?;
        event.serialize_field("description", &self.description)?;
        event.serialize_field("payload", &self.payload)?;
        event.serialize_field("metadata", &self.metadata)?;
        event.serialize_field("triggered_by", &self.triggered_by)?;
        event.serialize_field("integration_source", &self.integration_source)?;
        event.serialize_field("is_realtime", &self.is_realtime)?;
        event.serialize_field("delivered", &delivered_at.is_some())?;
        event.serialize_field("delivered_at", &time(delivered_at))?;
        event.serialize_field("read", &self.read_at.is_some())?;
        event.serialize_field("read_at", &time(self.read_at))?;
        event.serialize_field("visible_to_client", &self.visibility.client)?;
        event.serialize_field("visible_to_agent", &self.visibility.agent)?;
        event.serialize_field("expires_at", &time(self.expires_at))?;
        event.serialize_field("occurred_at", &format_time(self.occurred_at))?;
        event.serialize_field("created_at", &format_time(self.created_at))?;
        event.end()
    }
}
