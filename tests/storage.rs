//! The conformance suite of storage: every case is written once and runs on both engines, as
//! `…::sqlite::a_case` and `…::postgres::a_case`.

#![allow(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::items_after_statements,
    clippy::unnecessary_debug_formatting,
    reason = "a test that panics fails, and its numbers are small"
)]

#[macro_use]
mod support;

#[path = "storage/alerts.rs"]
mod alerts;
#[path = "storage/changing.rs"]
mod changing;
#[path = "storage/erasing.rs"]
mod erasing;
#[path = "storage/exporting.rs"]
mod exporting;
#[path = "storage/ledger.rs"]
mod ledger;
#[path = "storage/outbox.rs"]
mod outbox;
#[path = "storage/plans.rs"]
mod plans;
#[path = "storage/purging.rs"]
mod purging;
#[path = "storage/receipts.rs"]
mod receipts;
#[path = "storage/retention.rs"]
mod retention;
#[path = "storage/rules.rs"]
mod rules;
#[path = "storage/saving.rs"]
mod saving;
#[path = "storage/statements.rs"]
mod statements;
#[path = "storage/timelines.rs"]
mod timelines;
