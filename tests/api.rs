//! The HTTP API over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::items_after_statements,
    clippy::unnecessary_debug_formatting,
    reason = "a test that panics fails, and its numbers are small"
)]

mod support;

use serde_json::json;
use support::daemon::{TestDaemon, service};

const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";

#[tokio::test]
async fn an_event_that_was_recorded_is_in_the_timeline() {
    let daemon = TestDaemon::start();
    let token = service("acme");
    let path = format!("/api/v1/contacts/{CONTACT}/events");
    let body = json!({ "event_type": "note_added", "category": "note", "source": "agent" });
    let (status, event) = daemon.post(&path, &token, &body).await;
    assert_eq!(status, 201, "{event}");
    let (status, page) = daemon.get(&path, &token).await;
    assert_eq!((status, &page["events"][0]), (200, &event));
}
