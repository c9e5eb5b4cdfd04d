//! Jobs: when they run, how they end, and what is left when the daemon stops.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    reason = "a test that panics fails, and its tasks end with its runtime"
)]

#[macro_use]
mod support;

#[path = "jobs/alerts.rs"]
mod alerts;
#[path = "jobs/daemon.rs"]
mod daemon;
#[path = "jobs/installation.rs"]
mod installation;
#[path = "jobs/runner.rs"]
mod runner;
