//! Values for tests: short names, so that a case shows only what matters to it.

use chrono::{DateTime, TimeDelta, Utc};
use timelined::domain::{
    AgentId, Category, ContactEvent, ContactId, EventId, NewContactEvent, SessionId, Source,
    Subject, TenantId, event_types,
};
use timelined::storage::{Idempotency, Recording};
use uuid::Uuid;

/// The least step of time.
pub const MICRO: TimeDelta = TimeDelta::microseconds(1);

/// The instant around which the cases play: 2026-02-03T04:05:06.789012Z.
pub fn t0() -> DateTime<Utc> {
    DateTime::from_timestamp_micros(1_770_091_506_789_012).unwrap()
}

pub fn minutes(count: i64) -> TimeDelta {
    TimeDelta::minutes(count)
}

pub fn hours(count: i64) -> TimeDelta {
    TimeDelta::hours(count)
}

pub fn days(count: i64) -> TimeDelta {
    TimeDelta::days(count)
}

pub fn acme() -> TenantId {
    TenantId::new("acme").unwrap()
}

/// Another tenant, which must never see what is acme's.
pub fn globex() -> TenantId {
    TenantId::new("globex").unwrap()
}

pub fn subject(name: &str) -> Subject {
    Subject::new(name).unwrap()
}

fn uuid(kind: u16, number: u64) -> Uuid {
    Uuid::from_u128(
        0x0190_0000_0000_7000_8000_0000_0000_0000 | u128::from(kind) << 80 | u128::from(number),
    )
}

/// The event with this number; higher numbers sort later.
pub fn id(number: u64) -> EventId {
    EventId::new(uuid(0xe, number)).unwrap()
}

/// The contact with this number; higher numbers sort later.
pub fn contact(number: u64) -> ContactId {
    ContactId::new(uuid(0xc, number)).unwrap()
}

pub fn session(number: u64) -> SessionId {
    SessionId::new(uuid(0x5, number)).unwrap()
}

pub fn agent(number: u64) -> AgentId {
    AgentId::new(uuid(0xa, number)).unwrap()
}

/// A daemon or worker.
pub fn worker(number: u64) -> Uuid {
    uuid(0xd, number)
}

/// A note in the timeline of contact 1, seen by agents only.
pub fn event() -> NewContactEvent {
    event_of(contact(1))
}

/// The same for another contact.
pub fn event_of(contact: ContactId) -> NewContactEvent {
    NewContactEvent::new(
        contact,
        event_types::NOTE_ADDED,
        Category::Note,
        Source::Agent,
    )
}

/// An event of contact 1 with this type and category.
pub fn event_about(event_type: &str, category: Category) -> NewContactEvent {
    NewContactEvent::new(
        contact(1),
        event_type.parse().unwrap(),
        category,
        Source::System,
    )
}

/// Ends a builder.
pub trait Record {
    /// Recorded for acme at `t0`.
    fn recorded(self) -> ContactEvent;
    /// Recorded for acme at `now`.
    fn recorded_at(self, now: DateTime<Utc>) -> ContactEvent;
}

impl Record for NewContactEvent {
    fn recorded(self) -> ContactEvent {
        self.recorded_at(t0())
    }

    fn recorded_at(self, now: DateTime<Utc>) -> ContactEvent {
        self.record(&acme(), now).unwrap()
    }
}

/// An event that is saved without an idempotency key.
pub fn plain(event: ContactEvent) -> Recording {
    Recording {
        event,
        idempotency: None,
    }
}

/// An event that is saved under `key`; `body` stands for the body's hash.
pub fn keyed(event: ContactEvent, key: &str, body: u8) -> Recording {
    Recording {
        event,
        idempotency: Some(Idempotency {
            key: key.to_owned(),
            body_hash: [body; 32],
        }),
    }
}
