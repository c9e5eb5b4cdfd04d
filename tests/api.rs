//! The HTTP API of the real daemon over real sockets: who may do what, what is taken and what is
//! refused, and what the answers hold. What depends on data runs on both engines.

#![allow(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::items_after_statements,
    clippy::unnecessary_debug_formatting,
    clippy::too_many_lines,
    reason = "a test that panics fails, its numbers are small, and a table is read as a whole"
)]

#[macro_use]
mod support;

#[path = "api/access.rs"]
mod access;
#[path = "api/ask.rs"]
mod ask;
#[path = "api/erasure.rs"]
mod erasure;
#[path = "api/exports.rs"]
mod exports;
#[path = "api/health.rs"]
mod health;
#[path = "api/holds.rs"]
mod holds;
#[path = "api/input.rs"]
mod input;
#[path = "api/isolation.rs"]
mod isolation;
#[path = "api/jobs.rs"]
mod jobs;
#[path = "api/paging.rs"]
mod paging;
#[path = "api/values.rs"]
mod values;
