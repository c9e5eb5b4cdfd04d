//! Realtime delivery over real sockets.

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
use support::daemon::{TestDaemon, agent, service};
use support::socket::Socket;

const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";

#[tokio::test]
async fn a_realtime_event_reaches_whoever_watches_and_is_delivered_only_after_the_ack() {
    let daemon = TestDaemon::start();
    let token = service("acme");
    let (mut socket, backlog) =
        Socket::watching(&daemon.address, &agent("acme"), &[CONTACT.to_owned()]).await;
    assert_eq!(backlog, Vec::<serde_json::Value>::new());
    let path = format!("/api/v1/contacts/{CONTACT}/events");
    let body = json!({ "event_type": "note_added", "category": "note", "source": "agent", "is_realtime": true });
    let (_, event) = daemon.post(&path, &token, &body).await;
    let frame = socket.next().await;
    assert_eq!(frame["event"]["id"], event["id"]);
    assert_eq!(frame["redelivery"], false);
    let undelivered = format!("/api/v1/contact-events/undelivered?contact_id={CONTACT}");
    let (_, list) = daemon.get(&undelivered, &token).await;
    assert_eq!(list["events"][0]["id"], event["id"]);
    socket.ack(&[event["id"].as_str().unwrap()]).await;
    support::daemon::eventually(
        "the event is delivered",
        std::time::Duration::from_secs(5),
        async || daemon.get(&undelivered, &token).await.1["events"] == json!([]),
    )
    .await;
}
