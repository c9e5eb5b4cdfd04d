//! Asking the daemon, and judging what it answers.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use timelined::domain::{Clock as _, ContactId, SystemClock, format_time};

use crate::support::daemon::{Settings, TestDaemon, service};
use crate::support::database::Database;

/// How long what happens beside a request may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    /// The JSON body; null where there is none.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or(Value::Null)
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name).map(|value| value.to_str().unwrap());
        value.unwrap_or("")
    }

    /// The whole problem document, which must have this status.
    pub(crate) fn problem(&self, status: u16, what: &str) -> Value {
        assert_eq!(self.status, status, "{what}: {}", self.text);
        assert_eq!(
            self.header(CONTENT_TYPE.as_str()),
            "application/problem+json",
            "{what}: {}",
            self.text
        );
        let problem = self.json();
        assert_eq!(problem["status"], status, "{what}");
        for field in ["type", "title", "detail"] {
            let text = problem[field].as_str().unwrap_or("");
            assert!(!text.is_empty(), "{what}: no {field}: {problem}");
        }
        let kind = problem["type"].as_str().unwrap();
        assert!(kind.starts_with("urn:timelined:problem:"), "{kind}");
        problem
    }
}

pub(crate) async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.expect("the daemon answers");
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    // After an upgrade there is no body that would end.
    let text = if status == 101 {
        String::new()
    } else {
        response.text().await.expect("the answer has a body")
    };
    Answer {
        status,
        headers,
        text,
    }
}

pub(crate) async fn get(daemon: &TestDaemon, path: &str, token: &str) -> Answer {
    send(daemon.request(Method::GET, path, token)).await
}

pub(crate) async fn post(daemon: &TestDaemon, path: &str, token: &str) -> Answer {
    send(daemon.request(Method::POST, path, token)).await
}

pub(crate) async fn post_json(
    daemon: &TestDaemon,
    path: &str,
    token: &str,
    body: &Value,
) -> Answer {
    send(daemon.request(Method::POST, path, token).json(body)).await
}

pub(crate) async fn delete(daemon: &TestDaemon, path: &str, token: &str) -> Answer {
    send(daemon.request(Method::DELETE, path, token)).await
}

/// A daemon on the case's database.
pub(crate) async fn daemon(db: &Database) -> TestDaemon {
    Settings::new()
        .env("TIMELINED__DATABASE__URL", &db.url().await)
        .start()
}

/// Whatever it was asked, it met no fault of its own.
pub(crate) fn assert_calm(daemon: &TestDaemon) {
    let log = daemon.log();
    for sign in ["panicked", r#""level":"ERROR""#] {
        assert!(!log.contains(sign), "{log}");
    }
}

pub(crate) fn timeline(contact: ContactId) -> String {
    format!("/api/v1/contacts/{contact}/events")
}

/// The least body, with `more` on top.
pub(crate) fn body(more: Value) -> Value {
    let mut body = json!({ "event_type": "note_added", "category": "note", "source": "agent" });
    let Value::Object(more) = more else {
        panic!("fields are an object")
    };
    body.as_object_mut().unwrap().extend(more);
    body
}

/// Records an event of acme.
pub(crate) async fn record(daemon: &TestDaemon, contact: ContactId, more: Value) -> Value {
    let (status, event) = daemon
        .post(&timeline(contact), &service("acme"), &body(more))
        .await;
    assert_eq!(status, 201, "{event}");
    event
}

pub(crate) fn id_of(event: &Value) -> &str {
    event["id"].as_str().expect("an event has an id")
}

/// The ids of a list of events, in its order.
pub(crate) fn ids(page: &Value) -> Vec<String> {
    let events = page["events"].as_array().expect("a list of events");
    events.iter().map(|event| id_of(event).to_owned()).collect()
}

pub(crate) fn now() -> DateTime<Utc> {
    SystemClock.now()
}

/// The time so long from now, as it stands in JSON.
pub(crate) fn from_now(delta: TimeDelta) -> String {
    format_time(now() + delta)
}
