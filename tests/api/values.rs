//! What an event looks like, what is accepted to the last character, and repeats.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta};
use reqwest::Method;
use serde_json::{Value, json};

use super::ask::{
    Answer, assert_calm, body, daemon, delete, from_now, get, id_of, ids, now, post, post_json,
    record, send, timeline,
};
use crate::support::builders::{contact, id, session};
use crate::support::daemon::{TestDaemon, agent, eventually, service};

const KEYS: [&str; 24] = [
    "id",
    "tenant_id",
    "contact_id",
    "session_id",
    "event_type",
    "category",
    "priority",
    "source",
    "title",
    "description",
    "payload",
    "metadata",
    "triggered_by",
    "integration_source",
    "is_realtime",
    "delivered",
    "delivered_at",
    "read",
    "read_at",
    "visible_to_client",
    "visible_to_agent",
    "expires_at",
    "occurred_at",
    "created_at",
];

fn assert_shape(event: &Value) {
    let keys: BTreeSet<&str> = event
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(keys, BTreeSet::from(KEYS));
    for (key, value) in event.as_object().unwrap() {
        if key.ends_with("_at") && !value.is_null() {
            let text = value.as_str().unwrap();
            assert_eq!(
                text.len(),
                "2026-01-31T12:00:00.000000Z".len(),
                "{key}: {text}"
            );
            assert!(text.ends_with('Z'), "{key}: {text}");
            DateTime::parse_from_rfc3339(text).unwrap();
        }
    }
}

/// A create under an `Idempotency-Key`.
async fn keyed(daemon: &TestDaemon, of: &str, contact: u64, key: &str, body: &Value) -> Answer {
    let path = timeline(crate::support::builders::contact(contact));
    let request = daemon.request(Method::POST, &path, &service(of));
    send(request.header("idempotency-key", key).json(body)).await
}

/// An object whose compact text has exactly so many bytes.
fn object_of(bytes: usize) -> Value {
    let object = json!({ "k": "é".repeat((bytes - 8) / 2) });
    let rest = bytes - object.to_string().len();
    let object = json!({ "k": format!("{}{}", "é".repeat((bytes - 8) / 2), "x".repeat(rest)) });
    assert_eq!(object.to_string().len(), bytes);
    object
}

on_both_engines! {
    async fn the_least_event_has_every_key_and_the_defaults(db) {
        let daemon = daemon(db).await;
        let before = now();
        let event = record(&daemon, contact(1), json!({})).await;
        assert_shape(&event);
        let expected = json!({
            "id": event["id"], "tenant_id": "acme", "contact_id": contact(1), "session_id": null,
            "event_type": "note_added", "category": "note", "priority": "normal", "source": "agent",
            "title": null, "description": null, "payload": {}, "metadata": {}, "triggered_by": null,
            "integration_source": null, "is_realtime": false, "delivered": false, "delivered_at": null,
            "read": false, "read_at": null, "visible_to_client": false, "visible_to_agent": true,
            "expires_at": null, "occurred_at": event["created_at"], "created_at": event["created_at"],
        });
        assert_eq!(event, expected);
        let created: DateTime<chrono::Utc> = event["created_at"].as_str().unwrap().parse().unwrap();
        assert!(before - TimeDelta::milliseconds(1) <= created && created <= now(), "{created}");
        // `UUIDv7`.
        assert_eq!(&id_of(&event)[14..15], "7");
        for path in [format!("/api/v1/contact-events/{}", id_of(&event)), timeline(contact(1))] {
            let answer = get(&daemon, &path, &service("acme")).await;
            assert_eq!(answer.header("content-type"), "application/json");
            let found = answer.json();
            let found = if found["events"].is_array() { found["events"][0].clone() } else { found };
            assert_eq!(found, event, "as it was answered");
        }
    }

    async fn every_field_comes_back_as_it_was_given(db) {
        let daemon = daemon(db).await;
        let given = json!({
            "id": id(7), "contact_id": contact(1), "session_id": session(1), "event_type": "a.b_c9",
            "category": "custom_field", "priority": "urgent", "source": "integration",
            "title": "Olá, \u{1F600} \"世界\" \\ \u{1}\u{7f}\u{202e}\r\n\t", "description": "",
            "payload": {
                "z": 1, "a": [true, null, -0.5, 1e-7, u64::MAX, i64::MIN, "\u{10FFFF}", {"": {"/~": []}}],
                "nul-like": "\\u0000", "t": "2026-01-31T12:00:00Z",
            },
            "metadata": { "ip": "::1" }, "triggered_by": id(9), "integration_source": "é",
            "is_realtime": true, "visible_to_client": true, "visible_to_agent": false,
            "expires_at": from_now(TimeDelta::days(36_500)), "occurred_at": "1969-12-31T23:59:59.999999Z",
        });
        let event = post_json(&daemon, &timeline(contact(1)), &service("acme"), &given).await;
        assert_eq!(event.status, 201, "{}", event.text);
        let event = event.json();
        assert_shape(&event);
        for (key, value) in given.as_object().unwrap() {
            assert_eq!(&event[key], value, "{key}");
        }
        let found = get(&daemon, &format!("/api/v1/contact-events/{}", id(7)), &service("acme")).await;
        assert_eq!(found.json(), event);
        // Other zones and finer times become UTC and microseconds.
        let zoned = json!({ "occurred_at": "2026-01-31T14:00:00.123456789+02:00" });
        let event = record(&daemon, contact(2), zoned).await;
        assert_eq!(event["occurred_at"], "2026-01-31T12:00:00.123456Z");
        assert_calm(&daemon);
    }

    async fn each_limit_is_accepted_to_the_last_character(db) {
        let daemon = daemon(db).await;
        let tenant = "é".repeat(255);
        let wide = |count: usize| format!("{}{}", "é".repeat(count - 1), '\u{1F600}');
        for more in [
            json!({ "title": wide(500) }),
            json!({ "title": "" }),
            json!({ "description": wide(20_000) }),
            json!({ "source": "integration", "integration_source": wide(255) }),
            json!({ "event_type": format!("a{}", "9".repeat(63)) }),
            json!({ "event_type": "x" }),
            json!({ "payload": object_of(65_536) }),
            json!({ "metadata": object_of(16_384) }),
            json!({ "occurred_at": from_now(TimeDelta::seconds(299)) }),
            json!({ "occurred_at": "0001-01-01T00:00:00Z" }),
            json!({ "expires_at": from_now(TimeDelta::seconds(60)) }),
            json!({ "expires_at": "9999-12-31T23:59:59.999999Z" }),
            json!({ "id": "ffffffff-ffff-ffff-ffff-ffffffffffff" }),
        ] {
            let answer = post_json(&daemon, &timeline(contact(1)), &service(&tenant), &body(more.clone())).await;
            let given: String = more.to_string().chars().take(100).collect();
            assert_eq!(answer.status, 201, "{given}: {}", answer.text);
            let event = answer.json();
            for (key, value) in more.as_object().unwrap() {
                let same = match value.as_str().map(DateTime::parse_from_rfc3339) {
                    Some(Ok(time)) => event[key].as_str().unwrap().parse::<DateTime<chrono::Utc>>().unwrap() == time,
                    _ => &event[key] == value,
                };
                assert!(same, "{given}");
            }
            let path = format!("/api/v1/contact-events/{}", id_of(&event));
            assert_eq!(get(&daemon, &path, &service(&tenant)).await.json(), event, "{given}");
        }
        let answer = keyed(&daemon, "acme", 1, &"k".repeat(255), &body(json!({}))).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        assert_calm(&daemon);
    }

    async fn reading_is_recorded_per_reader_and_shows_the_first(db) {
        let daemon = daemon(db).await;
        let event = record(&daemon, contact(1), json!({})).await;
        let path = format!("/api/v1/contact-events/{}", id_of(&event));
        let read = async |token: String| {
            let answer = post(&daemon, &format!("{path}/mark-read"), &token).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
            answer.json()
        };
        let first = read(agent("acme")).await;
        assert_eq!(first, json!({ "success": true, "event_id": event["id"], "read_at": first["read_at"] }));
        let by_service = read(service("acme")).await;
        assert!(by_service["read_at"].as_str() > first["read_at"].as_str());
        assert_eq!(read(agent("acme")).await, first);
        assert_eq!(read(service("acme")).await, by_service);
        let now = get(&daemon, &path, &service("acme")).await.json();
        assert_shape(&now);
        assert_eq!((&now["read"], &now["read_at"]), (&json!(true), &first["read_at"]));
    }

    async fn a_repeat_under_its_key_answers_the_event_as_it_is_now(db) {
        let daemon = daemon(db).await;
        let one = body(json!({ "title": "one", "payload": { "a": 1, "b": 2 } }));
        let first = keyed(&daemon, "acme", 1, "k", &one).await;
        assert_eq!(first.status, 201, "{}", first.text);
        let event = first.json();
        let path = format!("/api/v1/contact-events/{}", id_of(&event));
        post(&daemon, &format!("{path}/mark-read"), &agent("acme")).await;
        let repeat = keyed(&daemon, "acme", 1, "k", &one).await;
        assert_eq!(repeat.status, 200, "{}", repeat.text);
        assert_eq!(repeat.json()["read"], true);
        assert_eq!(repeat.json(), get(&daemon, &path, &service("acme")).await.json());
        // White space and the order of keys are no other body.
        let text = r#" { "payload" : {"b":2, "a":1}, "title":"one","source":"agent","category":"note","event_type":"note_added"}"#;
        let request = daemon.request(Method::POST, &timeline(contact(1)), &service("acme"));
        let request = request.header("idempotency-key", "k").header("content-type", "application/json");
        let answer = send(request.body(text)).await;
        assert_eq!((answer.status, &answer.json()["id"]), (200, &event["id"]));

        let other = body(json!({ "title": "two" }));
        let conflict = keyed(&daemon, "acme", 1, "k", &other).await.problem(409, "another body");
        assert_eq!(conflict["type"], "urn:timelined:problem:key-reused");
        keyed(&daemon, "acme", 2, "k", &one).await.problem(409, "another contact");
        // Another tenant's key is another key.
        assert_eq!(keyed(&daemon, "globex", 1, "k", &other).await.status, 201);
        let page = get(&daemon, &timeline(contact(1)), &service("acme")).await.json();
        assert_eq!(ids(&page), [id_of(&event)]);

        assert_eq!(delete(&daemon, &path, &service("acme")).await.status, 204);
        keyed(&daemon, "acme", 1, "k", &one).await.problem(404, "the event is gone");
        get(&daemon, &path, &service("acme")).await.problem(404, "gone");
        delete(&daemon, &path, &service("acme")).await.problem(404, "gone twice");
        assert_calm(&daemon);
    }

    async fn a_repeat_with_its_own_id_answers_the_event_as_it_is_now(db) {
        let daemon = daemon(db).await;
        let create = async |body: Value| post_json(&daemon, &timeline(contact(1)), &service("acme"), &body).await;
        let one = body(json!({ "id": id(1), "title": "one" }));
        let first = create(one.clone()).await;
        assert_eq!((first.status, &first.json()["id"]), (201, &json!(id(1))));
        let repeat = create(one.clone()).await;
        assert_eq!((repeat.status, repeat.json()), (200, first.json()));
        create(body(json!({ "id": id(1), "title": "two" }))).await.problem(409, "another body");
        let elsewhere = post_json(&daemon, &timeline(contact(2)), &service("acme"), &one).await;
        elsewhere.problem(409, "another contact");
        let by_key = keyed(&daemon, "acme", 1, "k", &one).await.problem(409, "an id that is taken");
        assert_eq!(by_key["type"], "urn:timelined:problem:id-taken");
        let path = format!("/api/v1/contact-events/{}", id(1));
        assert_eq!(delete(&daemon, &path, &service("acme")).await.status, 204);
        create(one).await.problem(404, "the event is gone");
    }

    async fn a_repeat_after_the_expiry_is_no_new_event_that_was_born_expired(db) {
        let daemon = daemon(db).await;
        let expires_at = from_now(TimeDelta::seconds(1));
        let keyed_body = body(json!({ "expires_at": expires_at }));
        let with_id = body(json!({ "id": id(1), "expires_at": expires_at }));
        let with_key = async |key: &str| keyed(&daemon, "acme", 1, key, &keyed_body).await;
        let by_id = async || post_json(&daemon, &timeline(contact(1)), &service("acme"), &with_id).await;
        let first = with_key("k").await;
        assert_eq!((first.status, by_id().await.status), (201, 201));
        eventually("it expires", super::ask::PATIENCE, async || from_now(TimeDelta::zero()) > expires_at).await;
        let repeat = with_key("k").await;
        assert_eq!((repeat.status, repeat.json()), (200, first.json()));
        assert_eq!(by_id().await.status, 200);
        with_key("another").await.problem(422, "a new one");
    }

    async fn sixteen_repeats_at_once_create_one(db) {
        let daemon = daemon(db).await;
        let one = body(json!({ "title": "one" }));
        let with_id = body(json!({ "id": id(5), "title": "one" }));
        let at_once = async |contact: u64, key: Option<&str>, body: &Value| {
            let creates = (0..16).map(|_| {
                let path = timeline(crate::support::builders::contact(contact));
                let request = daemon.request(Method::POST, &path, &service("acme")).json(body);
                send(match key {
                    Some(key) => request.header("idempotency-key", key),
                    None => request,
                })
            });
            let answers = futures_util::future::join_all(creates).await;
            let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
            statuses.sort_unstable();
            assert_eq!(statuses[..15], [200; 15]);
            assert_eq!(statuses[15], 201);
            let ids: BTreeSet<String> = answers.iter().map(|answer| id_of(&answer.json()).to_owned()).collect();
            assert_eq!(ids.len(), 1);
            let page = get(&daemon, &timeline(crate::support::builders::contact(contact)), &service("acme")).await.json();
            assert_eq!(page["total"], 1, "{page}");
        };
        at_once(1, Some("k"), &one).await;
        at_once(2, None, &with_id).await;
    }
}
