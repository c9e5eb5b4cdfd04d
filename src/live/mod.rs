//! Realtime delivery: who watches here, what they are sent, and what they acknowledge.
//!
//! The outbox in the database is the truth. The [`Pump`] looks at its tail and hands what is watched
//! to the [`Hub`]; a [`Session`] serves one connection, reads the backlog of what it subscribes to,
//! and passes acknowledgements to the [`Acknowledger`], which writes them in sets. Nobody waits for
//! a socket but its own session.

mod acks;
pub mod frames;
mod hub;
mod pump;
mod session;

pub use acks::{AckKind, Acknowledgement, Acknowledger};
pub use hub::{Hub, Push};
pub use pump::{LiveCounts, Pump};
pub use session::{Session, SessionSettings};
