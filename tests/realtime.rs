//! Realtime delivery over real sockets, on both engines.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics fails, which is what is wanted"
)]

#[macro_use]
mod support;

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use support::daemon::{
    Settings, TestDaemon, agent, answer, client, eventually, operator, service, token_until,
};
use support::database::{Database, Engine};
use support::socket::Socket;
use tokio_tungstenite::tungstenite::Message;

const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";
const OTHER: &str = "0190b5f0-7c1e-7d3a-8f00-000000000002";

async fn daemon(db: &Database) -> TestDaemon {
    Settings::new()
        .env("TIMELINED__DATABASE__URL", &db.url().await)
        .start()
}

fn event(title: &str) -> Value {
    json!({
        "event_type": "note_added", "category": "note", "source": "agent",
        "title": title, "is_realtime": true,
    })
}

async fn record(daemon: &TestDaemon, contact: &str, body: &Value) -> Value {
    let path = format!("/api/v1/contacts/{contact}/events");
    let (status, event) = daemon.post(&path, &service("acme"), body).await;
    assert_eq!(status, 201, "{event}");
    event
}

async fn undelivered(daemon: &TestDaemon) -> Vec<Value> {
    let path = format!("/api/v1/contact-events/undelivered?contact_id={CONTACT}");
    let (status, page) = daemon.get(&path, &service("acme")).await;
    assert_eq!(status, 200, "{page}");
    page["events"].as_array().unwrap().clone()
}

async fn watch(daemon: &TestDaemon) -> Socket {
    let (socket, backlog) =
        Socket::watching(&daemon.address, &agent("acme"), &[CONTACT.to_owned()]).await;
    assert_eq!(backlog, Vec::<Value>::new());
    socket
}

/// Waiting events of contacts that nobody watches.
async fn absent(db: &Database, events: u32) {
    let insert = "insert into contact_events (tenant_id, contact_id, event_type, category, source, is_realtime)";
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {events})
             {insert} select 'acme', printf('0190b5f0-0000-7000-8000-%012x', i % 1000 + 1), 'note_added', 'note', 'system', 1 from n"
        ),
        Engine::Postgres => format!(
            "{insert} select 'acme', ('0190b5f0-0000-7000-8000-' || lpad(to_hex(i % 1000 + 1), 12, '0'))::uuid,
                    'note_added', 'note', 'system', true from generate_series(1, {events}) i"
        ),
    };
    db.execute(&sql).await.unwrap();
    assert_eq!(db.count("event_outbox").await, i64::from(events));
}

async fn insert_by_sql(db: &Database) {
    let flag = db.flag(true);
    let sql = format!(
        "insert into contact_events (tenant_id, contact_id, event_type, category, source, title, is_realtime)
         values ('acme', '{CONTACT}', 'note_added', 'note', 'system', 'by SQL', {flag})"
    );
    db.execute(&sql).await.unwrap();
}

async fn impatient(db: &Database) -> TestDaemon {
    Settings::new()
        .env("TIMELINED__DATABASE__URL", &db.url().await)
        .env("TIMELINED__REALTIME__ACK_TIMEOUT", "1s")
        .start()
}

fn id(event: &Value) -> &str {
    event["id"].as_str().unwrap()
}

async fn delete(daemon: &TestDaemon, event: &Value) {
    let path = format!("/api/v1/contact-events/{}", id(event));
    let (status, _) = answer(daemon.request(Method::DELETE, &path, &service("acme"))).await;
    assert_eq!(status, 204);
}

/// Until the later event comes again, nothing may be heard of the earlier one, which is as due.
async fn only_the_later_comes_again(socket: &mut Socket, later: &Value) {
    assert_eq!(socket.next().await["event"]["id"], later["id"]);
    let again = socket.next().await;
    assert_eq!(
        (&again["event"]["id"], &again["redelivery"]),
        (&later["id"], &json!(true))
    );
}

/// Pauses delivery, or ends the pause, and waits until the daemon has heard of it `times` times.
async fn control_delivery(daemon: &TestDaemon, action: &str, says: &str, times: usize) {
    let path = format!("/api/v1/jobs/realtime-delivery/{action}");
    let (status, body) = daemon.post(&path, &operator(), &json!({})).await;
    assert_eq!(status, 200, "{body}");
    let is_said = async || daemon.log().matches(says).count() == times;
    eventually(says, Duration::from_secs(10), is_said).await;
}

on_both_engines! {
    async fn a_pause_holds_everything_back_and_its_end_brings_what_waited(db) {
        let mut daemon = impatient(db).await;
        let mut socket = watch(&daemon).await;
        let before = record(&daemon, CONTACT, &event("before")).await;
        assert_eq!(socket.next().await["event"]["id"], before["id"]);
        control_delivery(&daemon, "pause", "delivery is paused", 1).await;
        let pushed = record(&daemon, CONTACT, &event("within")).await;
        insert_by_sql(db).await;
        // Neither what is new, nor what is due again after a second, nor the backlog of a newcomer; and
        // nobody is late with an acknowledgement.
        let (mut newcomer, backlog) =
            Socket::watching(&daemon.address, &agent("acme"), &[CONTACT.to_owned()]).await;
        assert_eq!(backlog, Vec::<Value>::new());
        assert!(socket.is_silent_for(Duration::from_secs(3)).await);
        newcomer.ping().await;
        // What was sent before is acknowledged still.
        socket.ack(&[id(&before)]).await;
        let is_delivered = async || undelivered(&daemon).await.len() == 2;
        eventually("it is delivered", Duration::from_secs(10), is_delivered).await;

        assert_eq!(daemon.stop().code(), Some(0));
        daemon.again();
        let mut socket = watch(&daemon).await;
        socket.ping().await;
        control_delivery(&daemon, "resume", "delivery goes on", 1).await;
        let first = socket.next().await["event"].clone();
        assert_eq!(first["id"], pushed["id"]);
        assert_eq!(socket.next().await["event"]["title"], "by SQL");
        let after = record(&daemon, CONTACT, &event("after")).await;
        assert_eq!(socket.next().await["event"]["id"], after["id"]);
    }

    async fn an_event_is_pushed_at_once_and_delivered_only_by_the_ack(db) {
        let daemon = daemon(db).await;
        let mut socket = watch(&daemon).await;
        let mut waits = Vec::new();
        for number in 0..20 {
            let event = record(&daemon, CONTACT, &event(&number.to_string())).await;
            let answered = Instant::now();
            let frame = socket.next_of("event").await;
            waits.push(answered.elapsed());
            assert_eq!(frame["event"]["id"], event["id"]);
            assert_eq!(frame["redelivery"], false);
        }
        waits.sort();
        assert!(waits[10] < Duration::from_millis(50), "{waits:?}");
        let waiting = undelivered(&daemon).await;
        assert_eq!(waiting.len(), 20);
        let ids: Vec<&str> = waiting.iter().map(|event| event["id"].as_str().unwrap()).collect();
        socket.ack(&ids).await;
        let patience = Duration::from_secs(5);
        eventually("the events are delivered", patience, async || undelivered(&daemon).await.is_empty()).await;
        let (_, event) = daemon.get(&format!("/api/v1/contact-events/{}", ids[0]), &service("acme")).await;
        assert_eq!(event["delivered"], true);
    }

    async fn an_event_of_another_program_comes_within_a_second_and_a_half_whatever_else_waits(db) {
        absent(db, 100_000).await;
        let daemon = daemon(db).await;
        let mut socket = watch(&daemon).await;
        let began = Instant::now();
        insert_by_sql(db).await;
        let frame = socket.next_of("event").await;
        assert_eq!(frame["event"]["title"], "by SQL");
        assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
        let event = record(&daemon, CONTACT, &event("by HTTP")).await;
        let began = Instant::now();
        assert_eq!(socket.next_of("event").await["event"]["id"], event["id"]);
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    }

    async fn the_backlog_comes_by_priority_then_age_before_subscribed(db) {
        let daemon = daemon(db).await;
        for (title, priority) in [("1", "normal"), ("2", "low"), ("3", "urgent"), ("4", "normal")] {
            let mut body = event(title);
            body["priority"] = json!(priority);
            record(&daemon, CONTACT, &body).await;
        }
        let (_socket, backlog) =
            Socket::watching(&daemon.address, &agent("acme"), &[CONTACT.to_owned()]).await;
        let titles: Vec<&str> = backlog.iter().map(|frame| frame["event"]["title"].as_str().unwrap()).collect();
        assert_eq!(titles, ["3", "1", "4", "2"]);
        assert!(backlog.iter().all(|frame| frame["redelivery"] == true));
    }

    async fn a_client_sees_its_own_and_only_its_ack_delivers_what_is_for_it(db) {
        let daemon = daemon(db).await;
        let token = client("acme", &[CONTACT.parse().unwrap()]);
        let mut client = Socket::authenticated(&daemon.address, &token).await;
        client.send(&json!({ "type": "subscribe", "contacts": [CONTACT, OTHER] })).await;
        let subscribed = client.next().await;
        assert_eq!((&subscribed["contacts"], &subscribed["denied"]), (&json!([CONTACT]), &json!([OTHER])));
        let mut agent = watch(&daemon).await;

        record(&daemon, CONTACT, &event("internal")).await;
        let mut body = event("for the client");
        body["visible_to_client"] = json!(true);
        let event = record(&daemon, CONTACT, &body).await;
        let id = event["id"].as_str().unwrap();
        assert_eq!(client.next().await["event"]["title"], "for the client");
        assert_eq!(agent.next_of("event").await["event"]["title"], "internal");
        assert_eq!(agent.next_of("event").await["event"]["id"], event["id"]);
        agent.ack(&[id]).await;
        client.ack(&[id]).await;
        let receipt = agent.next_of("receipt").await;
        assert_eq!(receipt["event_id"], event["id"]);
        assert!(receipt["delivered_at"].is_string());
        client.send(&json!({ "type": "read", "ids": [id] })).await;
        assert!(agent.next_of("receipt").await["read_at"].is_string());
    }

    async fn what_cannot_be_read_holds_up_nothing_that_waits_behind_it(db) {
        let daemon = Settings::new()
            .env("TIMELINED__DATABASE__URL", &db.url().await)
            .env("TIMELINED__REALTIME__WINDOW", "4")
            .start();
        insert_unreadable(db).await;
        for number in 0..6 {
            record(&daemon, CONTACT, &event(&number.to_string())).await;
        }
        let mut socket = Socket::authenticated(&daemon.address, &agent("acme")).await;
        socket.send(&json!({ "type": "subscribe", "contacts": [CONTACT] })).await;
        for number in 0..6 {
            let frame = socket.next_of("event").await;
            assert_eq!(frame["event"]["title"], number.to_string());
            socket.ack(&[frame["event"]["id"].as_str().unwrap()]).await;
        }
    }

    async fn what_expires_waiting_is_recorded_as_expired_and_never_as_delivered(db) {
        let daemon = daemon(db).await;
        let mut body = event("soon over");
        let soon = timelined::domain::Clock::now(&timelined::domain::SystemClock) + chrono::TimeDelta::milliseconds(300);
        body["expires_at"] = json!(timelined::domain::format_time(soon));
        record(&daemon, CONTACT, &body).await;
        let patience = Duration::from_secs(10);
        eventually("it is recorded", patience, async || {
            db.count("event_deliveries where outcome = 'expired'").await == 1
        })
        .await;
        assert_eq!(db.count("event_outbox").await, 0);
        assert_eq!(db.count("event_deliveries where outcome = 'delivered'").await, 0);
    }

    async fn what_is_deleted_while_watched_is_told_and_does_not_come_again(db) {
        let daemon = impatient(db).await;
        let mut socket = watch(&daemon).await;
        let event_1 = record(&daemon, CONTACT, &event("1")).await;
        assert_eq!(socket.next_of("event").await["event"]["id"], event_1["id"]);
        delete(&daemon, &event_1).await;
        let removed = json!({ "type": "removed", "event_id": event_1["id"], "contact_id": CONTACT });
        assert_eq!(socket.next().await, removed);
        let event_2 = record(&daemon, CONTACT, &event("2")).await;
        only_the_later_comes_again(&mut socket, &event_2).await;
    }

    async fn what_another_program_deleted_is_told_instead_of_coming_again(db) {
        let daemon = impatient(db).await;
        let mut socket = watch(&daemon).await;
        let event_1 = record(&daemon, CONTACT, &event("1")).await;
        assert_eq!(socket.next_of("event").await["event"]["id"], event_1["id"]);
        db.execute(&format!("delete from contact_events where id = '{}'", id(&event_1))).await.unwrap();
        let removed = json!({ "type": "removed", "event_id": event_1["id"], "contact_id": CONTACT });
        assert_eq!(socket.next().await, removed);
        let event_2 = record(&daemon, CONTACT, &event("2")).await;
        only_the_later_comes_again(&mut socket, &event_2).await;
    }

    async fn each_contact_counts_as_delivered_as_its_subscription_said(db) {
        let daemon = daemon(db).await;
        let mut socket = Socket::authenticated(&daemon.address, &agent("acme")).await;
        socket.subscribe(&[CONTACT], "client").await;
        socket.subscribe(&[OTHER], "auto").await;
        let by_ack = record(&daemon, CONTACT, &event("by ack")).await;
        assert_eq!(socket.next().await["event"]["id"], by_ack["id"]);
        let by_itself = record(&daemon, OTHER, &event("by itself")).await;
        assert_eq!(socket.next().await["event"]["id"], by_itself["id"]);
        let patience = Duration::from_secs(5);
        let one_waits = async || db.count("event_outbox").await == 1;
        eventually("the one is delivered by itself", patience, one_waits).await;
        assert_eq!(undelivered(&daemon).await.len(), 1);
        socket.ack(&[id(&by_ack)]).await;
        eventually("the other by the ack", patience, async || db.count("event_outbox").await == 0).await;
    }

    async fn receipts_over_http_reach_those_who_watch(db) {
        let daemon = daemon(db).await;
        let mut socket = watch(&daemon).await;
        let event = record(&daemon, CONTACT, &event("seen elsewhere")).await;
        assert_eq!(socket.next().await["event"]["id"], event["id"]);
        for (action, told, other) in [
            ("mark-read", "read_at", "delivered_at"),
            ("mark-delivered", "delivered_at", "read_at"),
        ] {
            let path = format!("/api/v1/contact-events/{}/{action}", id(&event));
            let (status, answer) = daemon.post(&path, &agent("acme"), &json!({})).await;
            assert_eq!(status, 200, "{answer}");
            let receipt = socket.next().await;
            assert_eq!(receipt["type"], "receipt");
            assert_eq!((&receipt["event_id"], &receipt["contact_id"]), (&event["id"], &json!(CONTACT)));
            assert_eq!((&receipt[told], &receipt[other]), (&answer[told], &Value::Null));
        }
    }

    async fn what_nobody_may_see_waits_for_nobody(db) {
        let daemon = daemon(db).await;
        let mut socket = watch(&daemon).await;
        let mut body = event("for nobody");
        body["visible_to_agent"] = json!(false);
        record(&daemon, CONTACT, &body).await;
        assert_eq!(db.count("event_outbox").await, 0);
        assert_eq!(undelivered(&daemon).await, Vec::<Value>::new());
        let event = record(&daemon, CONTACT, &event("for agents")).await;
        assert_eq!(socket.next().await["event"]["id"], event["id"]);
    }
}

#[tokio::test]
async fn bad_frames_end_the_connection_with_the_written_code() {
    let daemon = TestDaemon::start();
    let many: Vec<String> = (1..=1001)
        .map(|n| format!("0190b5f0-0000-7000-8000-{n:012x}"))
        .collect();
    let cases = [
        (Message::text("no json"), 4400),
        (Message::text(r#"{"type":"dance"}"#), 4400),
        (Message::text(r#"{"type":"ack","ids":["x"]}"#), 4400),
        (Message::binary(vec![1, 2, 3]), 4400),
        (
            Message::text(json!({ "type": "subscribe", "contacts": many }).to_string()),
            4429,
        ),
        (Message::text(r#"{"type":"auth","token":"x"}"#), 4401),
    ];
    for (message, code) in cases {
        let mut socket = Socket::authenticated(&daemon.address, &agent("acme")).await;
        socket.send_raw(message.clone()).await;
        assert_eq!(socket.closed().await, Some(code), "{message:?}");
    }
    let mut socket = Socket::open(&daemon.address).await;
    socket.send(&json!({ "type": "ping" })).await;
    assert_eq!(socket.next().await["code"], 4401);
}

#[tokio::test]
async fn what_is_not_acknowledged_comes_again_and_then_the_connection_ends() {
    let daemon = Settings::new()
        .env("TIMELINED__REALTIME__ACK_TIMEOUT", "1s")
        .start();
    let mut socket = watch(&daemon).await;
    record(&daemon, CONTACT, &event("again")).await;
    assert_eq!(socket.next_of("event").await["redelivery"], false);
    assert_eq!(socket.next_of("event").await["redelivery"], true);
    assert_eq!(socket.next_of("bye").await["code"], 4408);
}

/// A row that the database's checks let through and that is passed over (`docs/sql.md`).
async fn insert_unreadable(db: &Database) {
    let flag = db.flag(true);
    let sql = format!(
        r#"insert into contact_events (tenant_id, contact_id, event_type, category, source, payload, is_realtime)
           values ('acme', '{CONTACT}', 'note_added', 'note', 'system', '{{"a":"\ud800"}}', {flag})"#
    );
    db.execute(&sql).await.unwrap();
}

#[tokio::test]
async fn more_events_than_the_window_all_arrive_in_order() {
    let daemon = Settings::new()
        .env("TIMELINED__REALTIME__WINDOW", "16")
        .start();
    let mut socket = watch(&daemon).await;
    for number in 0..200 {
        record(&daemon, CONTACT, &event(&number.to_string())).await;
    }
    for number in 0..200 {
        let frame = socket.next_of("event").await;
        assert_eq!(frame["event"]["title"], number.to_string());
        socket.ack(&[frame["event"]["id"].as_str().unwrap()]).await;
    }
}

async fn titles(socket: &mut Socket, number: usize) -> Vec<String> {
    let mut titles = Vec::new();
    for _ in 0..number {
        let frame = socket.next_of("event").await;
        titles.push(frame["event"]["title"].as_str().unwrap().to_owned());
        socket.ack(&[frame["event"]["id"].as_str().unwrap()]).await;
    }
    titles
}

#[tokio::test]
async fn what_comes_live_while_another_contacts_backlog_waits_is_not_lost() {
    let daemon = Settings::new()
        .env("TIMELINED__REALTIME__WINDOW", "8")
        .start();
    for number in 0..12 {
        record(&daemon, OTHER, &event(&number.to_string())).await;
    }
    let mut socket = watch(&daemon).await;
    socket
        .send(&json!({ "type": "subscribe", "contacts": [OTHER] }))
        .await;
    // The first window is sent, nothing of it acknowledged: the rest of the backlog waits.
    let mut first = Vec::new();
    for _ in 0..8 {
        first.push(socket.next_of("event").await["event"]["id"].clone());
    }
    assert_eq!(socket.next().await["type"], "subscribed");
    let mut witness = watch(&daemon).await;
    record(&daemon, CONTACT, &event("live")).await;
    // Handed over after the other's: by now that one was missed.
    witness.next_of("event").await;
    socket.send(&json!({ "type": "ping" })).await;
    assert_eq!(socket.next().await["type"], "pong");
    let first: Vec<&str> = first.iter().map(|id| id.as_str().unwrap()).collect();
    socket.ack(&first).await;
    assert_eq!(titles(&mut socket, 5).await, ["8", "9", "10", "11", "live"]);
}

#[tokio::test]
async fn a_subscription_is_confirmed_although_the_window_is_full() {
    let daemon = Settings::new()
        .env("TIMELINED__REALTIME__WINDOW", "4")
        .start();
    let mut socket = watch(&daemon).await;
    for number in 0..4 {
        record(&daemon, CONTACT, &event(&number.to_string())).await;
        socket.next_of("event").await;
    }
    record(&daemon, OTHER, &event("waiting")).await;
    // More often than subscriptions may wait.
    for _ in 0..40 {
        socket
            .send(&json!({ "type": "subscribe", "contacts": [OTHER] }))
            .await;
        let subscribed = socket.next().await;
        assert_eq!(subscribed["type"], "subscribed");
        assert_eq!(subscribed["contacts"], json!([OTHER]));
        socket
            .send(&json!({ "type": "unsubscribe", "contacts": [OTHER] }))
            .await;
    }
    socket
        .send(&json!({ "type": "subscribe", "contacts": [OTHER] }))
        .await;
    assert_eq!(socket.next().await["type"], "subscribed");
    // The client was sent four and may acknowledge as few as it likes.
    socket
        .send(&json!({ "type": "unsubscribe", "contacts": [CONTACT] }))
        .await;
    assert_eq!(titles(&mut socket, 1).await, ["waiting"]);
}

#[tokio::test]
async fn a_client_that_acknowledges_only_when_its_window_is_full_is_sent_on() {
    let daemon = Settings::new()
        .env("TIMELINED__REALTIME__WINDOW", "16")
        .start();
    for number in 0..40 {
        record(&daemon, CONTACT, &event(&number.to_string())).await;
    }
    let mut socket = Socket::authenticated(&daemon.address, &agent("acme")).await;
    socket
        .send(&json!({ "type": "subscribe", "contacts": [CONTACT] }))
        .await;
    let mut open = std::collections::VecDeque::new();
    for number in 0..40 {
        let frame = socket.next_of("event").await;
        assert_eq!(frame["event"]["title"], number.to_string());
        open.push_back(frame["event"]["id"].as_str().unwrap().to_owned());
        if open.len() == 16 {
            // One at a time, the rest stays open.
            socket.ack(&[&open.pop_front().unwrap()]).await;
        }
    }
}

#[tokio::test]
async fn sockets_are_told_when_the_daemon_stops() {
    let mut daemon = TestDaemon::start();
    let mut socket = watch(&daemon).await;
    daemon.signal("TERM");
    let bye = socket.next_of("bye").await;
    assert_eq!(bye["code"], 4503);
    assert!(bye["retry_ms"].as_u64().unwrap() >= 500);
    assert!(daemon.wait(Duration::from_secs(20)).success());
}

#[tokio::test]
async fn a_client_that_does_not_read_does_not_hold_up_the_stop() {
    let mut daemon = TestDaemon::start();
    // Opened first, so that it is handed each event before the other.
    let _stalled = watch(&daemon).await;
    let mut reader = watch(&daemon).await;
    let mut body = event("large");
    body["payload"] = json!({ "text": "x".repeat(60_000) });
    // More than the buffers of both ends of the stalled one take.
    for _ in 0..200 {
        record(&daemon, CONTACT, &body).await;
        let id = reader.next_of("event").await["event"]["id"].clone();
        reader.ack(&[id.as_str().unwrap()]).await;
    }
    daemon.signal("TERM");
    assert!(daemon.wait(Duration::from_secs(6)).success());
}

#[tokio::test]
async fn what_is_not_watched_any_more_is_not_sent() {
    let daemon = TestDaemon::start();
    let mut socket = Socket::authenticated(&daemon.address, &agent("acme")).await;
    socket.subscribe(&[CONTACT, OTHER], "client").await;
    socket
        .send(&json!({ "type": "unsubscribe", "contacts": [CONTACT] }))
        .await;
    socket.ping().await;
    record(&daemon, CONTACT, &event("not watched")).await;
    let watched = record(&daemon, OTHER, &event("watched")).await;
    assert_eq!(socket.next().await["event"]["id"], watched["id"]);
    // It waits for the next subscription.
    socket
        .send(&json!({ "type": "subscribe", "contacts": [CONTACT] }))
        .await;
    assert_eq!(socket.next().await["event"]["title"], "not watched");
    assert_eq!(socket.next().await["type"], "subscribed");
}

#[tokio::test]
async fn what_was_sent_and_not_acknowledged_comes_again_with_the_next_subscription() {
    let daemon = TestDaemon::start();
    let mut socket = watch(&daemon).await;
    let event = record(&daemon, CONTACT, &event("again")).await;
    assert_eq!(socket.next().await["redelivery"], false);
    for _ in 0..2 {
        for frame in ["unsubscribe", "subscribe"] {
            socket
                .send(&json!({ "type": frame, "contacts": [CONTACT] }))
                .await;
        }
        let again = socket.next().await;
        assert_eq!(
            (&again["event"]["id"], &again["redelivery"]),
            (&event["id"], &json!(true))
        );
        assert_eq!(socket.next().await["type"], "subscribed");
    }
}

/// Nothing is confirmed while the database is away; what waits for it has a bound.
#[tokio::test]
async fn more_subscriptions_than_may_wait_end_the_connection() {
    let mut cluster = support::database::Cluster::launch();
    let daemon = Settings::new()
        .env("TIMELINED__DATABASE__URL", cluster.url())
        .start();
    let mut few = Socket::authenticated(&daemon.address, &agent("acme")).await;
    let mut many = Socket::authenticated(&daemon.address, &agent("acme")).await;
    cluster.stop();
    for (socket, number) in [(&mut few, 16), (&mut many, 17)] {
        for _ in 0..number {
            socket
                .send(&json!({ "type": "subscribe", "contacts": [CONTACT, "nobody"] }))
                .await;
        }
    }
    let refused = many.next().await;
    assert_eq!(
        (&refused["type"], &refused["status"]),
        (&json!("error"), &json!(429))
    );
    assert_eq!(many.closed().await, Some(4429));
    cluster.start();
    for _ in 0..16 {
        let subscribed = few.next().await;
        assert_eq!(subscribed["type"], "subscribed");
        assert_eq!(subscribed["denied"], json!(["nobody"]));
    }
}

#[tokio::test]
async fn a_newer_token_of_the_same_reader_prolongs_the_connection_and_another_ends_it() {
    let daemon = TestDaemon::start();
    let (contact, other) = (CONTACT.parse().unwrap(), OTHER.parse().unwrap());
    let both = client("acme", &[contact, other]);
    let mut socket = Socket::authenticated(&daemon.address, &both).await;
    socket.subscribe(&[CONTACT, OTHER], "client").await;
    let only_other = client("acme", &[other]);
    socket
        .send(&json!({ "type": "auth", "token": only_other }))
        .await;
    assert_eq!(socket.next().await["type"], "welcome");
    let mut body = event("for the client");
    body["visible_to_client"] = json!(true);
    record(&daemon, CONTACT, &body).await;
    let seen = record(&daemon, OTHER, &body).await;
    assert_eq!(socket.next().await["event"]["id"], seen["id"]);
    socket
        .send(&json!({ "type": "subscribe", "contacts": [CONTACT] }))
        .await;
    assert_eq!(socket.next().await["denied"], json!([CONTACT]));
    for token in [agent("acme"), client("globex", &[other])] {
        let mut socket = Socket::authenticated(&daemon.address, &only_other).await;
        socket
            .send(&json!({ "type": "auth", "token": token }))
            .await;
        assert_eq!(socket.closed().await, Some(4401));
    }
}

#[tokio::test]
async fn a_connection_ends_with_its_token_unless_a_newer_one_comes() {
    let daemon = TestDaemon::start();
    let now = timelined::domain::Clock::now(&timelined::domain::SystemClock);
    // The leeway of 30 s is nearly over.
    let nearly_over = token_until(now - chrono::TimeDelta::seconds(26));
    let mut prolonged = Socket::authenticated(&daemon.address, &nearly_over).await;
    prolonged
        .send(&json!({ "type": "auth", "token": agent("acme") }))
        .await;
    assert_eq!(prolonged.next().await["type"], "welcome");
    let mut socket = Socket::authenticated(&daemon.address, &nearly_over).await;
    assert_eq!(socket.next().await["code"], 4401);
    assert_eq!(socket.closed().await, Some(4401));
    prolonged.ping().await;
}

#[tokio::test]
async fn a_token_may_be_valid_to_the_end_of_time() {
    let daemon = Settings::new()
        .env("TIMELINED__REALTIME__ACK_TIMEOUT", "1s")
        .start();
    let end = token_until(chrono::DateTime::<chrono::Utc>::MAX_UTC);
    let mut socket = Socket::authenticated(&daemon.address, &end).await;
    socket.subscribe(&[CONTACT], "client").await;
    record(&daemon, CONTACT, &event("again")).await;
    // What comes again shows that the connection has looked at its token and lives on.
    assert_eq!(socket.next().await["redelivery"], false);
    assert_eq!(socket.next().await["redelivery"], true);
    socket.ping().await;
}

#[tokio::test]
async fn pages_of_other_sites_open_no_sockets_unless_they_are_allowed() {
    let daemon = Settings::new()
        .config("[http]\nallowed_origins = [\"https://crm.example.com\"]\n")
        .start();
    let own = format!("http://{}", daemon.address);
    let cases = [
        (own.as_str(), None),
        ("https://crm.example.com", None),
        ("https://crm.example.com.evil.example", Some(403)),
        ("https://evil.example", Some(403)),
        ("null", Some(403)),
    ];
    for (origin, refused) in cases {
        let headers = [
            ("origin", origin),
            ("sec-websocket-protocol", "timelined.v1"),
        ];
        let opened = Socket::try_open(&daemon.address, &headers).await;
        assert_eq!(opened.err(), refused, "{origin}");
    }
}

#[tokio::test]
async fn the_subprotocol_is_chosen_among_those_that_the_client_names() {
    let daemon = TestDaemon::start();
    for named in ["timelined.v1", "timelined.v2, timelined.v1"] {
        let headers = [("sec-websocket-protocol", named)];
        let opened = Socket::try_open(&daemon.address, &headers).await;
        let protocol = opened.map(|(_, protocol)| protocol);
        assert_eq!(
            protocol.unwrap().as_deref(),
            Some("timelined.v1"),
            "{named}"
        );
    }
    let opened = Socket::try_open(&daemon.address, &[]).await;
    assert_eq!(opened.map(|(_, protocol)| protocol).unwrap(), None);
}

#[tokio::test]
async fn the_handshakes_token_spares_the_first_frame() {
    let daemon = TestDaemon::start();
    let bearer = format!("Bearer {}", agent("acme"));
    let opened = Socket::try_open(&daemon.address, &[("authorization", &bearer)]).await;
    let mut socket = opened.unwrap().0;
    assert_eq!(socket.next().await["type"], "welcome");
    let opened = Socket::try_open(&daemon.address, &[("authorization", "Bearer x")]).await;
    assert_eq!(opened.err(), Some(401));
}
