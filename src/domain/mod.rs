//! The domain: plain values and rules, free of runtime, database and network.
//!
//! What enters is parsed here once ([`NewContactEvent`]); what exists is valid. Everything that
//! depends on time takes `now` as an argument, so that each rule can be tested at any instant.

mod audience;
mod clock;
mod draft;
mod event;
mod ids;
mod json;
mod kinds;
mod locale;
mod retention;

pub use audience::{Audience, Visibility};
pub use clock::{Clock, ManualClock, SystemClock, micros, parse_time};
pub use draft::{Fault, Invalid, MAX_FUTURE, NewContactEvent, read_portable};
pub use event::{ContactEvent, Delivery, format_time};
pub use ids::{
    AgentId, ContactId, ErasureId, EventId, ExportId, HoldId, IdError, RunId, SessionId, Subject,
    TenantId,
};
pub use json::{JsonObject, JsonObjectError};
pub(crate) use kinds::closed_set;
pub use kinds::{Category, EventType, Priority, Source, UnknownKind, event_types};
pub use locale::Locale;
pub use retention::{Cause, Retention, RetentionRule, Scope, Sweep};
