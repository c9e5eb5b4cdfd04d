//! The frames of `timelined.v1`: JSON text, each an object with `type`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::domain::{ContactId, EventId};

/// The WebSocket subprotocol.
pub const SUBPROTOCOL: &str = "timelined.v1";

/// What a client sends.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum ClientFrame {
    /// Proves who it is; first, unless the handshake did.
    Auth {
        /// The token.
        token: String,
    },
    /// Watches contacts.
    Subscribe {
        /// At most 1,000.
        contacts: Vec<String>,
        /// How events count as delivered on this connection.
        #[serde(default)]
        ack: AckMode,
    },
    /// Watches them no more.
    Unsubscribe {
        /// The contacts.
        contacts: Vec<String>,
    },
    /// Has taken events.
    Ack {
        /// The events.
        ids: Vec<String>,
    },
    /// Has shown events to its reader.
    Read {
        /// The events.
        ids: Vec<String>,
    },
    /// Is there somebody?
    Ping,
}

/// When an event counts as delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AckMode {
    /// When the client acknowledged it.
    #[default]
    Client,
    /// When the socket took it.
    Auto,
}

/// What the daemon sends.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum DaemonFrame<'a> {
    /// The connection is authenticated.
    Welcome {
        /// The connection's id, as logs name it.
        connection: String,
        /// When the token ends.
        expires_at: String,
        /// How many events may be unacknowledged.
        window: usize,
    },
    /// Nothing of these contacts can be missed any more.
    Subscribed {
        /// Those that are watched.
        contacts: &'a [ContactId],
        /// Those that may not be.
        denied: &'a [String],
    },
    /// An event.
    Event {
        /// The event as in HTTP.
        event: &'a RawValue,
        /// Its place in the order of recording.
        cursor: String,
        /// Whether it may have been sent before.
        redelivery: bool,
    },
    /// Somebody else acknowledged or read an event.
    Receipt {
        /// The event.
        event_id: EventId,
        /// Whose timeline it is in.
        contact_id: ContactId,
        /// When it was delivered, if that is what is told.
        delivered_at: Option<String>,
        /// When it was read, if that is what is told.
        read_at: Option<String>,
    },
    /// An event was deleted while watched.
    Removed {
        /// The event.
        event_id: EventId,
        /// Whose timeline it was in.
        contact_id: ContactId,
    },
    /// A frame could not be obeyed.
    Error {
        /// The problem's type; `type` itself names the frame.
        problem: &'a str,
        /// Its title.
        title: &'a str,
        /// Its status.
        status: u16,
        /// What is wrong and what is allowed.
        detail: String,
    },
    /// The answer to a ping.
    Pong,
    /// The daemon closes the connection.
    Bye {
        /// The close code.
        code: u16,
        /// When to come back.
        retry_ms: u64,
    },
}

/// Why a connection is closed: the WebSocket close codes of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// 4400: a frame that is not of the protocol.
    BadFrame,
    /// 4401: not authenticated, or the token is over.
    NotAuthenticated,
    /// 4408: did not acknowledge.
    NotAcknowledging,
    /// 4429: too much of something.
    TooMuch,
    /// 4503: the daemon is stopping.
    ShuttingDown,
}

impl Close {
    /// The close code.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::BadFrame => 4400,
            Self::NotAuthenticated => 4401,
            Self::NotAcknowledging => 4408,
            Self::TooMuch => 4429,
            Self::ShuttingDown => 4503,
        }
    }

    /// The close reason, for people who look at the wire.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::BadFrame => "bad frame",
            Self::NotAuthenticated => "not authenticated or token over",
            Self::NotAcknowledging => "did not acknowledge",
            Self::TooMuch => "too much",
            Self::ShuttingDown => "shutting down",
        }
    }
}
