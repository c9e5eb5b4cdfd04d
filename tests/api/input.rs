//! Bad input: each kind gets its status and names what is wrong; nothing changes, nothing breaks.

use chrono::TimeDelta;
use reqwest::Method;
use serde_json::{Value, json};

use super::ask::{
    assert_calm, body, from_now, get, id_of, post, post_json, record, send, timeline,
};
use crate::support::builders::{contact, session};
use crate::support::daemon::{TestDaemon, agent, operator, service};

/// A field, a value that it must not have, and the pointer of what is named.
fn bad_fields() -> Vec<(&'static str, Value, &'static str)> {
    let nil = json!("00000000-0000-0000-0000-000000000000");
    let object_of = |bytes: usize| json!({ "k": "x".repeat(bytes - r#"{"k":""}"#.len()) });
    let mut rows = vec![
        ("id", json!(7), "/id"),
        ("id", json!("seven"), "/id"),
        ("id", nil.clone(), "/id"),
        ("id", json!("0190b5f07c1e7d3a8f00000000000001"), "/id"),
        ("contact_id", json!(contact(2)), "/contact_id"),
        ("contact_id", nil.clone(), "/contact_id"),
        ("contact_id", json!(1), "/contact_id"),
        ("session_id", nil.clone(), "/session_id"),
        ("session_id", json!("x"), "/session_id"),
        ("session_id", json!({}), "/session_id"),
        ("triggered_by", nil, "/triggered_by"),
        ("triggered_by", json!("ana"), "/triggered_by"),
        ("event_type", json!(""), "/event_type"),
        ("event_type", json!("Note"), "/event_type"),
        ("event_type", json!("1note"), "/event_type"),
        ("event_type", json!("_note"), "/event_type"),
        ("event_type", json!("note-added"), "/event_type"),
        ("event_type", json!("note added"), "/event_type"),
        ("event_type", json!("note\n"), "/event_type"),
        ("event_type", json!("é"), "/event_type"),
        ("event_type", json!("a\0"), "/event_type"),
        ("event_type", json!("a".repeat(65)), "/event_type"),
        ("event_type", json!(["note_added"]), "/event_type"),
        ("category", json!("notes"), "/category"),
        ("category", json!("Note"), "/category"),
        ("category", json!(""), "/category"),
        ("category", json!(0), "/category"),
        ("priority", json!("higher"), "/priority"),
        ("priority", json!(1), "/priority"),
        ("source", json!("nobody"), "/source"),
        ("source", json!(true), "/source"),
        ("source", json!("integration"), "/integration_source"),
        ("title", json!("x".repeat(501)), "/title"),
        ("title", json!("é".repeat(501)), "/title"),
        ("title", json!("a\0b"), "/title"),
        ("title", json!(5), "/title"),
        ("title", json!(["x"]), "/title"),
        ("description", json!("x".repeat(20_001)), "/description"),
        ("description", json!("\0"), "/description"),
        ("description", json!(false), "/description"),
        (
            "integration_source",
            json!("x".repeat(256)),
            "/integration_source",
        ),
        ("integration_source", json!("\0"), "/integration_source"),
        ("integration_source", json!({}), "/integration_source"),
        ("payload", object_of(65_537), "/payload"),
        ("payload", json!({ "deep": [{ "er": "\0" }] }), "/payload"),
        ("payload", json!({ "key\0": 1 }), "/payload"),
        ("metadata", object_of(16_385), "/metadata"),
        ("metadata", json!({ "k": "\0" }), "/metadata"),
        (
            "expires_at",
            json!(from_now(TimeDelta::seconds(-1))),
            "/expires_at",
        ),
        ("expires_at", json!("1970-01-01T00:00:00Z"), "/expires_at"),
        ("expires_at", json!("tomorrow"), "/expires_at"),
        ("expires_at", json!("2030-01-01"), "/expires_at"),
        ("expires_at", json!("2030-01-01T00:00:00"), "/expires_at"),
        ("expires_at", json!("2030-02-30T00:00:00Z"), "/expires_at"),
        // Its year in UTC is 10000, which RFC 3339 cannot write.
        (
            "expires_at",
            json!("9999-12-31T23:59:59-01:00"),
            "/expires_at",
        ),
        ("expires_at", json!(1_900_000_000), "/expires_at"),
        (
            "occurred_at",
            json!(from_now(TimeDelta::seconds(330))),
            "/occurred_at",
        ),
        ("occurred_at", json!("9999-12-31T23:59:59Z"), "/occurred_at"),
        (
            "occurred_at",
            json!("0000-01-01T00:00:00+01:00"),
            "/occurred_at",
        ),
        ("occurred_at", json!("just now"), "/occurred_at"),
        ("occurred_at", json!(0), "/occurred_at"),
        ("tenant_id", json!("globex"), "/tenant_id"),
        ("tenant_id", json!("acme"), "/tenant_id"),
        ("delivered", json!(true), "/delivered"),
        (
            "delivered_at",
            json!("2026-01-01T00:00:00Z"),
            "/delivered_at",
        ),
        ("read", json!(false), "/read"),
        ("read_at", Value::Null, "/read_at"),
        ("created_at", json!("2026-01-01T00:00:00Z"), "/created_at"),
        ("seq", json!(1), "/seq"),
        ("Title", json!("x"), "/Title"),
        ("", json!("x"), "/"),
        ("a/b~c", json!(1), "/a~1b~0c"),
    ];
    for (field, pointer) in [("payload", "/payload"), ("metadata", "/metadata")] {
        for value in [json!([]), json!("{}"), json!(1), json!(true)] {
            rows.push((field, value, pointer));
        }
    }
    for (field, pointer) in [
        ("is_realtime", "/is_realtime"),
        ("visible_to_client", "/visible_to_client"),
        ("visible_to_agent", "/visible_to_agent"),
    ] {
        for value in [json!("true"), json!(1), json!({})] {
            rows.push((field, value, pointer));
        }
    }
    // Null stands for nothing, and these always are something.
    for (field, pointer) in [
        ("id", "/id"),
        ("contact_id", "/contact_id"),
        ("event_type", "/event_type"),
        ("category", "/category"),
        ("priority", "/priority"),
        ("source", "/source"),
        ("payload", "/payload"),
        ("metadata", "/metadata"),
        ("is_realtime", "/is_realtime"),
        ("visible_to_client", "/visible_to_client"),
        ("visible_to_agent", "/visible_to_agent"),
        ("occurred_at", "/occurred_at"),
    ] {
        rows.push((field, Value::Null, pointer));
    }
    rows
}

/// A daemon with one event, and the timeline that must not change.
async fn populated() -> (TestDaemon, Value) {
    let daemon = TestDaemon::start();
    record(
        &daemon,
        contact(1),
        json!({ "title": "before", "session_id": session(1) }),
    )
    .await;
    let page = get(&daemon, &timeline(contact(1)), &service("acme"))
        .await
        .json();
    (daemon, page)
}

async fn assert_unchanged(daemon: &TestDaemon, page: &Value) {
    let now = get(daemon, &timeline(contact(1)), &service("acme")).await;
    assert_eq!(&now.json(), page);
    assert_calm(daemon);
}

fn pointers(problem: &Value) -> Vec<&str> {
    let errors = problem["errors"].as_array().expect("the wrong fields");
    errors
        .iter()
        .map(|error| error["pointer"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn each_broken_rule_of_an_event_is_422_and_names_its_field() {
    let (daemon, page) = populated().await;
    for (field, value, pointer) in bad_fields() {
        let bad = body(json!({ field: value }));
        let what: String = json!({ field: value })
            .to_string()
            .chars()
            .take(120)
            .collect();
        let answer = post_json(&daemon, &timeline(contact(1)), &service("acme"), &bad).await;
        let problem = answer.problem(422, &what);
        assert_eq!(problem["type"], "urn:timelined:problem:invalid");
        assert_eq!(pointers(&problem), [pointer], "{what}: {problem}");
        assert_eq!(problem["pointer"], pointer);
    }
    for field in ["event_type", "category", "source"] {
        let mut bad = body(json!({}));
        bad.as_object_mut().unwrap().remove(field);
        let answer = post_json(&daemon, &timeline(contact(1)), &service("acme"), &bad).await;
        let problem = answer.problem(422, field);
        assert_eq!(pointers(&problem), [format!("/{field}")]);
        assert!(
            problem["detail"].as_str().unwrap().contains("required"),
            "{problem}"
        );
    }
    // All at once.
    let bad = json!({ "category": "x", "priority": 1, "source": "agent", "more": 1 });
    let answer = post_json(&daemon, &timeline(contact(1)), &service("acme"), &bad).await;
    let problem = answer.problem(422, "several");
    assert_eq!(
        pointers(&problem),
        ["/event_type", "/category", "/priority", "/more"]
    );
    assert_unchanged(&daemon, &page).await;
}

#[tokio::test]
async fn null_is_taken_where_a_field_may_be_empty() {
    let daemon = TestDaemon::start();
    let nulls = json!({
        "session_id": null, "title": null, "description": null, "triggered_by": null,
        "integration_source": null, "expires_at": null,
    });
    record(&daemon, contact(1), nulls).await;
}

#[tokio::test]
async fn a_body_that_is_no_json_object_is_refused() {
    let (daemon, page) = populated().await;
    let good = body(json!({})).to_string();
    let twice = |text: &str| good.replacen('{', &format!("{{{text},"), 1);
    let nested = |levels: usize| {
        let (open, close) = ("[".repeat(levels), "]".repeat(levels));
        twice(&format!(r#""payload":{{"k":{open}{close}}}"#))
    };
    let bodies: Vec<(&str, Vec<u8>, u16)> = vec![
        ("empty", Vec::new(), 400),
        ("white space", b"  \n".to_vec(), 400),
        ("cut off", good.as_bytes()[..good.len() - 1].to_vec(), 400),
        ("two of them", format!("{good}{good}").into_bytes(), 400),
        ("no JSON", b"event_type=note_added".to_vec(), 400),
        (
            "a comma too many",
            good.replace('}', ",}").into_bytes(),
            400,
        ),
        (
            "not UTF-8",
            twice("\"title\":\"\u{1}\"")
                .replace('\u{1}', "x")
                .into_bytes()
                .into_iter()
                .map(|b| if b == b'x' { 0xff } else { b })
                .collect(),
            400,
        ),
        (
            "a raw control character",
            twice("\"title\":\"\u{1}\"").into_bytes(),
            400,
        ),
        (
            "a lone surrogate",
            twice(r#""title":"\ud800""#).into_bytes(),
            400,
        ),
        (
            "a lone surrogate in a payload",
            twice(r#""payload":{"k":"\udc00\ud800"}"#).into_bytes(),
            400,
        ),
        ("NaN", twice(r#""payload":{"k":NaN}"#).into_bytes(), 400),
        (
            "a number beyond all",
            twice(r#""payload":{"k":1e999}"#).into_bytes(),
            400,
        ),
        (
            "a byte order mark",
            format!("\u{feff}{good}").into_bytes(),
            400,
        ),
        ("nested 200 deep", nested(200).into_bytes(), 400),
        ("nested 100,000 deep", nested(100_000).into_bytes(), 400),
        ("only brackets", "[".repeat(500_000).into_bytes(), 400),
        ("an array", format!("[{good}]").into_bytes(), 422),
        ("null", b"null".to_vec(), 422),
        ("a text", b"\"note\"".to_vec(), 422),
        ("a number", b"1".to_vec(), 422),
        ("an empty object", b"{}".to_vec(), 422),
        (
            "more than 1 MiB",
            twice(&format!(r#""title":"{}""#, "x".repeat(1024 * 1024))).into_bytes(),
            413,
        ),
    ];
    for path in [
        timeline(contact(1)),
        format!("/api/v1/contacts/{}/exports", contact(1)),
    ] {
        for (what, bytes, status) in &bodies {
            let request = daemon.request(Method::POST, &path, &service("acme"));
            let request = request.header("content-type", "application/json");
            let answer = send(request.body(bytes.clone())).await;
            answer.problem(*status, &format!("{path}: {what}"));
        }
        for content_type in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "",
            "json",
        ] {
            let request = daemon.request(Method::POST, &path, &service("acme"));
            let answer = send(
                request
                    .header("content-type", content_type)
                    .body(good.clone()),
            )
            .await;
            answer.problem(415, &format!("{path}: {content_type}"));
        }
    }
    assert_unchanged(&daemon, &page).await;
}

#[tokio::test]
async fn a_body_counts_as_json_whatever_its_parameters_and_the_last_of_two_keys_counts() {
    let daemon = TestDaemon::start();
    for content_type in [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/vnd.crm+json",
    ] {
        let request = daemon.request(Method::POST, &timeline(contact(1)), &service("acme"));
        let text =
            r#"{"title":"a","event_type":"x","category":"note","source":"agent","title":"b"}"#;
        let answer = send(request.header("content-type", content_type).body(text)).await;
        assert_eq!(
            (answer.status, &answer.json()["title"]),
            (201, &json!("b")),
            "{}",
            answer.text
        );
    }
}

#[tokio::test]
async fn a_bad_id_in_the_address_is_400() {
    let (daemon, page) = populated().await;
    let bad = [
        "1",
        "x",
        "00000000-0000-0000-0000-000000000000",
        "0190b5f07c1e7d3a8f00000000000001",
        "%7B0190b5f0-7c1e-7d3a-8f00-000000000001%7D",
        "0190b5f0-7c1e-7d3a-8f00-00000000000g",
        "%00",
        "%FF",
        "%F0%9F%98%80",
        "..%2F..%2Fetc%2Fpasswd",
        "'%20or%201=1--",
    ];
    for id in bad {
        for path in [
            format!("/api/v1/contacts/{id}/events"),
            format!("/api/v1/sessions/{id}/events"),
            format!("/api/v1/contact-events/{id}"),
            format!("/api/v1/exports/{id}"),
            format!("/api/v1/exports/{id}/file"),
            format!("/api/v1/contact-events/undelivered?contact_id={id}"),
        ] {
            get(&daemon, &path, &service("acme"))
                .await
                .problem(400, &path);
        }
        for path in [
            format!("/api/v1/contact-events/{id}/mark-read"),
            format!("/api/v1/contact-events/{id}/mark-delivered"),
        ] {
            post(&daemon, &path, &service("acme"))
                .await
                .problem(400, &path);
        }
        for path in [
            format!("/api/v1/contacts/{id}/events"),
            format!("/api/v1/contacts/{id}/exports"),
        ] {
            let answer = post_json(&daemon, &path, &service("acme"), &body(json!({}))).await;
            answer.problem(400, &path);
        }
    }
    for path in ["/api/v1/jobs/%FF", "/api/v1/jobs/%FF/runs"] {
        get(&daemon, path, &operator()).await.problem(400, path);
    }
    post(&daemon, "/api/v1/jobs/%FF/run", &operator())
        .await
        .problem(400, "a job");
    assert_unchanged(&daemon, &page).await;
}

#[tokio::test]
async fn a_query_parameter_that_is_unknown_is_400_with_the_right_name() {
    let (daemon, page) = populated().await;
    let event = id_of(&page["events"][0]).to_owned();
    let here = timeline(contact(1));
    for (path, hint) in [
        (format!("{here}?limt=5"), "did you mean limit?"),
        (format!("{here}?catgory=note"), "did you mean category?"),
        (format!("{here}?eventType=x"), "did you mean event_type?"),
        (
            format!("{here}?includeExpired=true"),
            "did you mean include_expired?",
        ),
        (format!("{here}?Cursor=x"), "did you mean cursor?"),
        (
            format!("{here}?qqq=1"),
            "known: category, event_type, since, until",
        ),
        (format!("{here}?=1"), "known: "),
        (format!("{here}?%FF=1"), "known: "),
        (
            format!("/api/v1/sessions/{}/events?ofset=1", session(1)),
            "did you mean offset?",
        ),
        (
            format!(
                "/api/v1/contact-events/undelivered?contact_id={}&limits=1",
                contact(1)
            ),
            "did you mean limit?",
        ),
        (
            "/api/v1/contact-events?category=note&sinse=x".to_owned(),
            "did you mean since?",
        ),
        (
            format!("/api/v1/contact-events/{event}?x=1"),
            "known: include_expired",
        ),
        ("/api/v1/exports?limmit=1".to_owned(), "did you mean limit?"),
    ] {
        let problem = get(&daemon, &path, &service("acme"))
            .await
            .problem(400, &path);
        let detail = problem["detail"].as_str().unwrap();
        assert!(
            detail.contains("unknown query parameter"),
            "{path}: {detail}"
        );
        assert!(detail.contains(hint), "{path}: {detail}");
    }
    for path in [
        format!("/api/v1/contact-events/{event}/mark-read?x=1"),
        format!("/api/v1/contact-events/{event}/mark-delivered?x=1"),
    ] {
        post(&daemon, &path, &service("acme"))
            .await
            .problem(400, &path);
    }
    let delete = format!("/api/v1/contact-events/{event}?dry_run=true");
    super::ask::delete(&daemon, &delete, &service("acme"))
        .await
        .problem(400, "delete");
    for path in [
        format!("{here}?x=1"),
        format!("/api/v1/contacts/{}/exports?x=1", contact(1)),
    ] {
        post_json(&daemon, &path, &service("acme"), &body(json!({})))
            .await
            .problem(400, &path);
    }
    for path in [
        "/api/v1/jobs?x=1",
        "/api/v1/jobs/purge-expired?x=1",
        "/api/v1/jobs/purge-expired/runs?limi=1",
    ] {
        get(&daemon, path, &operator()).await.problem(400, path);
    }
    post(&daemon, "/api/v1/jobs/purge-expired/run?x=1", &operator())
        .await
        .problem(400, "run");
    let runs = get(&daemon, "/api/v1/jobs/purge-expired/runs", &operator())
        .await
        .json();
    assert_eq!(runs["runs"], json!([]));
    assert_unchanged(&daemon, &page).await;
}

#[tokio::test]
async fn a_query_parameter_that_makes_no_sense_is_400_and_named() {
    let (daemon, page) = populated().await;
    record(&daemon, contact(2), json!({})).await;
    record(&daemon, contact(2), json!({})).await;
    let cursor_of = async |path: String, token: String| {
        let page = get(&daemon, &path, &token).await.json();
        page["next_cursor"]
            .as_str()
            .expect("there is more")
            .to_owned()
    };
    let other = cursor_of(format!("{}?limit=1", timeline(contact(2))), service("acme")).await;
    let agents = cursor_of(format!("{}?limit=1", timeline(contact(2))), agent("acme")).await;
    let cut = &other[..other.len() - 2];
    for (query, names) in [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("limit=1.5", "limit"),
        ("limit=99999999999999999999", "limit"),
        ("limit=1&limit=2", "limit"),
        ("offset=-1", "offset"),
        ("offset=10001", "offset"),
        ("offset=x", "offset"),
        ("offset=99999999999999999999", "offset"),
        ("cursor=", "cursor"),
        ("cursor=x", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=AAAA", "cursor"),
        (&format!("cursor={}", "A".repeat(5000)), "cursor"),
        (&format!("cursor={cut}"), "cursor"),
        (&format!("cursor={other}"), "another query"),
        (&format!("offset=1&cursor={other}"), "exclude"),
        ("since=yesterday", "since"),
        ("since=", "since"),
        ("since=2026-01-31", "since"),
        ("since=2026-01-31T12:00:00+01:00", "%2B"),
        ("until=1700000000", "until"),
        ("category=notes", "category"),
        ("category=", "category"),
        ("category=%00", "category"),
        ("event_type=Note", "event_type"),
        ("event_type=", "event_type"),
        ("event_type=%00", "event_type"),
        ("include_expired=1", "include_expired"),
        ("include_expired=", "include_expired"),
    ] {
        let path = format!("{}?{query}", timeline(contact(1)));
        let problem = get(&daemon, &path, &service("acme"))
            .await
            .problem(400, query);
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(names), "{query}: {detail}");
    }
    // The same contact, but other filters, another reader, another list.
    let there = timeline(contact(2));
    for (path, cursor) in [
        (format!("{there}?category=note"), &other),
        (format!("{there}?since=2026-01-01T00:00:00Z"), &other),
        (format!("{there}?limit=1"), &agents),
        (
            format!("/api/v1/sessions/{}/events?limit=1", contact(2)),
            &other,
        ),
        (
            format!(
                "/api/v1/contact-events/undelivered?contact_id={}",
                contact(2)
            ),
            &other,
        ),
        ("/api/v1/contact-events?category=note".to_owned(), &other),
    ] {
        let path = format!("{path}&cursor={cursor}");
        let problem = get(&daemon, &path, &service("acme"))
            .await
            .problem(400, &path);
        assert!(
            problem["detail"]
                .as_str()
                .unwrap()
                .contains("another query"),
            "{problem}"
        );
    }
    for path in [
        "/api/v1/contact-events",
        "/api/v1/contact-events?since=2026-01-01T00:00:00Z",
        "/api/v1/contact-events?category=note&event_type=note_added",
        "/api/v1/contact-events/undelivered",
        "/api/v1/contact-events/undelivered?contact_id=",
        "/api/v1/exports?cursor=x",
        "/api/v1/exports?limit=0",
        "/api/v1/exports?limit=201",
    ] {
        get(&daemon, path, &service("acme"))
            .await
            .problem(400, path);
    }
    for query in [
        "limit=0",
        "limit=201",
        "cursor=x",
        "cursor=00000000-0000-0000-0000-000000000000",
    ] {
        let path = format!("/api/v1/jobs/purge-expired/runs?{query}");
        get(&daemon, &path, &operator()).await.problem(400, &path);
    }
    assert_unchanged(&daemon, &page).await;
}

#[tokio::test]
async fn a_bad_idempotency_key_is_400() {
    let (daemon, page) = populated().await;
    for key in [
        Vec::new(),
        vec![b'k'; 256],
        "é".as_bytes().to_vec(),
        vec![0xff],
    ] {
        let request = daemon.request(Method::POST, &timeline(contact(1)), &service("acme"));
        let request = request
            .json(&body(json!({})))
            .header("idempotency-key", &key[..]);
        send(request).await.problem(400, &format!("{key:?}"));
    }
    assert_unchanged(&daemon, &page).await;
}
