//! What the test binaries share: databases of both engines and builders of events.
#![allow(dead_code, reason = "each test binary uses its own part of it")]
#![allow(
    unreachable_pub,
    reason = "a module of a test binary has no other readers than the binary"
)]

pub mod builders;
pub mod daemon;
pub mod database;
pub mod smtp;
pub mod socket;
