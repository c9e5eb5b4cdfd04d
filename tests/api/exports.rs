//! Exports over HTTP.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::ask::{
    PATIENCE, assert_calm, daemon, delete, get, id_of, post, post_json, record, send,
};
use crate::support::builders::{contact, id};
use crate::support::daemon::{Settings, TestDaemon, agent, client, eventually, service};

fn path() -> String {
    format!("/api/v1/contacts/{}/exports", contact(1))
}

/// Asks for an export and waits until it is done.
async fn export(daemon: &TestDaemon, token: &str, body: &Value) -> Value {
    let answer = post_json(daemon, &path(), token, body).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    let asked = answer.json();
    let href = format!("/api/v1/exports/{}", id_of(&asked));
    assert_eq!(
        asked,
        json!({ "id": asked["id"], "state": "queued", "href": href })
    );
    let one = async || get(daemon, &href, token).await.json();
    eventually("the export ends", PATIENCE, async || {
        !["queued", "running"].contains(&one().await["state"].as_str().unwrap())
    })
    .await;
    one().await
}

/// Its file, as text.
async fn file(daemon: &TestDaemon, token: &str, export: &Value) -> String {
    let answer = get(daemon, export["file"].as_str().unwrap(), token).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.text
}

/// What every answer to a link bears.
const HEADERS: [(&str, &str); 4] = [
    ("cache-control", "private, no-store"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
    ("x-robots-tag", "noindex, nofollow"),
];

/// The link in the only mail of an export.
fn link_of(daemon: &TestDaemon, export: &Value) -> String {
    let message_id = export["deliveries"][0]["message_id"].as_str().unwrap();
    let (local, _) = message_id.split_once('@').unwrap();
    let outbox = daemon.settings().state().join("outbox");
    let mail = std::fs::read_to_string(outbox.join(format!("{local}.eml"))).unwrap();
    let (_, rest) = mail.split_once("/d/").unwrap();
    rest.chars().take(22).collect()
}

fn hash(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

on_both_engines! {
    async fn an_export_is_asked_for_looked_at_and_taken(db) {
        let daemon = daemon(db).await;
        let token = agent("acme");
        record(&daemon, contact(1), json!({ "title": "for the client", "visible_to_client": true })).await;
        record(&daemon, contact(1), json!({ "title": "for agents" })).await;
        record(&daemon, contact(2), json!({ "title": "of another", "visible_to_client": true })).await;
        let done = export(&daemon, &token, &json!({ "format": "csv" })).await;
        assert_eq!(done["state"], "done", "{done}");
        assert_eq!(done["contact_id"], json!(contact(1)));
        let defaults = [
            ("audience", json!("client")), ("timezone", json!("UTC")), ("since", Value::Null), ("until", Value::Null),
            ("categories", json!([])), ("redact", json!([])), ("attach", json!(true)), ("deliveries", json!([])),
            ("requested_by", json!("agent")), ("attempts", json!(1)), ("error", Value::Null), ("rows", json!(1)),
            ("progress", json!({ "rows": 1, "total": 1 })), ("format", json!("csv")),
            ("downloads", json!(0)), ("last_download_at", Value::Null), ("links", json!([])), ("actions", json!([])),
        ];
        for (key, value) in defaults {
            assert_eq!(done[key], value, "{key}: {done}");
        }
        for key in ["created_at", "started_at", "rendered_at", "finished_at", "expires_at"] {
            assert!(done[key].as_str().unwrap().ends_with('Z'), "{key}: {done}");
        }
        let answer = get(&daemon, done["file"].as_str().unwrap(), &token).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), "text/csv; charset=utf-8; header=present");
        let name = format!("attachment; filename=\"timeline-{}.csv\"", id_of(&done));
        assert_eq!(answer.header("content-disposition"), name);
        assert_eq!(answer.header("content-length"), done["bytes"].to_string());
        assert_eq!(answer.header("cache-control"), "private, no-store");
        assert_eq!(answer.text.len().to_string(), done["bytes"].to_string());
        let hash: String = Sha256::digest(&answer.text).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(done["sha256"], hash);
        assert!(answer.text.starts_with('\u{feff}'));
        assert!(answer.text.contains("for the client"));
        assert!(!answer.text.contains("for agents") && !answer.text.contains("of another"), "{}", answer.text);
        assert_calm(&daemon);
    }

    async fn a_file_of_any_format_is_taken_under_its_own_name_and_type(db) {
        let daemon = daemon(db).await;
        let token = agent("acme");
        record(&daemon, contact(1), json!({ "title": "shown", "visible_to_client": true })).await;
        for (format, media_type) in [
            ("csv.gz", "application/gzip"),
            ("csv.zst", "application/zstd"),
            ("jsonl", "application/x-ndjson"),
            ("jsonl.gz", "application/gzip"),
            ("jsonl.zst", "application/zstd"),
            ("xlsx", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
        ] {
            let done = export(&daemon, &token, &json!({ "format": format })).await;
            assert_eq!((&done["state"], &done["format"]), (&json!("done"), &json!(format)));
            let answer = get(&daemon, done["file"].as_str().unwrap(), &token).await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.header("content-type"), media_type);
            let name = format!("attachment; filename=\"timeline-{}.{format}\"", id_of(&done));
            assert_eq!(answer.header("content-disposition"), name);
            assert_eq!(answer.header("content-length"), done["bytes"].to_string());
        }
        assert_calm(&daemon);
    }

    async fn an_export_keeps_to_its_audience_categories_period_and_redaction(db) {
        let daemon = daemon(db).await;
        let titled = |title: &str, category: &str, at: &str, client: bool, agent: bool| json!({
            "title": title, "description": "a secret word", "category": category, "occurred_at": at,
            "visible_to_client": client, "visible_to_agent": agent,
        });
        for more in [
            titled("first", "note", "2026-01-01T00:00:00Z", true, true),
            titled("second", "tag", "2026-01-02T00:00:00Z", false, true),
            titled("third", "note", "2026-01-03T00:00:00Z", false, false),
        ] {
            record(&daemon, contact(1), more).await;
        }
        let titles = ["first", "second", "third"];
        for (request, expected) in [
            (json!({ "audience": "client" }), vec!["first"]),
            (json!({ "audience": "agent" }), vec!["first", "second"]),
            (json!({ "audience": "audit" }), vec!["first", "second", "third"]),
            (json!({ "audience": "audit", "categories": ["note"] }), vec!["first", "third"]),
            (json!({ "audience": "audit", "since": "2026-01-02T00:00:00Z" }), vec!["second", "third"]),
            (json!({ "audience": "audit", "until": "2026-01-02T00:00:00Z" }), vec!["first"]),
        ] {
            let mut request = request;
            request["format"] = json!("csv");
            let done = export(&daemon, &service("acme"), &request).await;
            let text = file(&daemon, &service("acme"), &done).await;
            let found: Vec<&str> = titles.into_iter().filter(|title| text.contains(title)).collect();
            assert_eq!(found, expected, "{request}: {text}");
            assert_eq!(done["rows"], expected.len(), "{request}");
            assert!(text.contains("a secret word"), "{text}");
        }
        let request = json!({
            "format": "csv", "audience": "agent", "redact": ["description"], "timezone": "Asia/Tokyo",
        });
        let done = export(&daemon, &agent("acme"), &request).await;
        assert_eq!((&done["timezone"], &done["redact"]), (&json!("Asia/Tokyo"), &json!(["description"])));
        let text = file(&daemon, &agent("acme"), &done).await;
        assert!(text.contains("first") && !text.contains("a secret word"), "{text}");
        assert!(text.contains("2026-01-01T09:00:00"), "in the zone that was asked for: {text}");
    }

    async fn exports_are_listed_newest_first_by_cursor(db) {
        let daemon = daemon(db).await;
        let mut made = Vec::new();
        for _ in 0..3 {
            let export = export(&daemon, &agent("acme"), &json!({ "format": "csv" })).await;
            made.insert(0, export);
        }
        let list = get(&daemon, "/api/v1/exports", &agent("acme")).await.json();
        assert_eq!(list, json!({ "exports": made, "next_cursor": null }));
        let mut seen = Vec::new();
        let mut path = "/api/v1/exports?limit=1".to_owned();
        loop {
            let page = get(&daemon, &path, &agent("acme")).await.json();
            seen.extend(page["exports"].as_array().unwrap().clone());
            let Some(cursor) = page["next_cursor"].as_str() else { break };
            assert!(seen.len() <= made.len());
            path = format!("/api/v1/exports?limit=1&cursor={cursor}");
        }
        assert_eq!(seen, made);
    }

    async fn a_request_that_makes_no_sense_names_the_field_and_queues_nothing(db) {
        let daemon = daemon(db).await;
        let many: Vec<String> = (0..51).map(|number| format!("a{number}@example.com")).collect();
        for (field, value, pointer) in [
            ("format", Value::Null, "/format"),
            ("format", json!("doc"), "/format"),
            ("format", json!(1), "/format"),
            ("audience", json!("everybody"), "/audience"),
            ("audience", json!(["client"]), "/audience"),
            // An agent's token asks.
            ("audience", json!("audit"), "/audience"),
            ("since", json!("yesterday"), "/since"),
            ("until", json!("2026-01-01"), "/until"),
            ("until", json!("2020-01-01T00:00:00Z"), "/until"),
            ("categories", json!("note"), "/categories"),
            ("categories", json!(["note", "notes"]), "/categories/1"),
            ("categories", json!([null]), "/categories/0"),
            ("timezone", json!("Mars/Olympus"), "/timezone"),
            ("timezone", json!("+02:00"), "/timezone"),
            ("locale", json!("xx"), "/locale"),
            ("redact", json!(["title", "id"]), "/redact/1"),
            ("redact", json!({}), "/redact"),
            ("to", json!("ana@example.com"), "/to"),
            ("to", json!(["ana@example.com", "ana"]), "/to/1"),
            ("to", json!(["ana@example.com\r\nBcc: eve@example.com"]), "/to/0"),
            ("to", json!(many), "/to"),
            ("attach", json!("yes"), "/attach"),
            ("tenant_id", json!("globex"), "/tenant_id"),
            ("a/b~c", json!(1), "/a~1b~0c"),
        ] {
            let mut body = json!({ "format": "csv", "since": "2025-01-01T00:00:00Z" });
            body[field] = value;
            let what = body.to_string().chars().take(200).collect::<String>();
            let problem = post_json(&daemon, &path(), &agent("acme"), &body).await.problem(422, &what);
            let pointers: Vec<&Value> =
                problem["errors"].as_array().unwrap().iter().map(|error| &error["pointer"]).collect();
            assert_eq!(pointers, [pointer], "{what}: {problem}");
        }
        for body in [json!([]), json!("csv"), json!(null)] {
            post_json(&daemon, &path(), &agent("acme"), &body).await.problem(422, "no object");
        }
        let list = get(&daemon, "/api/v1/exports", &service("acme")).await.json();
        assert_eq!(list, json!({ "exports": [], "next_cursor": null }));
        assert_calm(&daemon);
    }

    async fn a_link_is_all_that_its_recipient_needs_and_is_counted_and_revoked(db) {
        let daemon = daemon(db).await;
        let token = agent("acme");
        record(&daemon, contact(1), json!({ "title": "for the client", "visible_to_client": true })).await;
        let asked = json!({ "format": "csv", "to": ["ana@example.com"], "attach": false });
        let done = export(&daemon, &token, &asked).await;
        let link = link_of(&daemon, &done);
        let path = format!("/d/{link}");
        assert!(!done.to_string().contains(&link), "only the recipient knows it");

        let head = send(daemon.http.head(daemon.url(&path))).await;
        assert_eq!((head.status, head.header("content-length")), (200, done["bytes"].to_string().as_str()));
        let answer = send(daemon.http.get(daemon.url(&path))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(hash(&answer.text), done["sha256"]);
        for (name, value) in HEADERS {
            assert_eq!(answer.header(name), value, "{name}");
        }
        let name = format!("attachment; filename=\"timeline-{}.csv\"", id_of(&done));
        assert_eq!(answer.header("content-disposition"), name);
        file(&daemon, &token, &done).await;
        let href = done["href"].as_str().unwrap();
        let now = get(&daemon, href, &token).await.json();
        assert_eq!(now["downloads"], 2, "a head is no download: {now}");
        assert_eq!(now["links"][0]["downloads"], 1, "{now}");
        assert_eq!(now["links"][0]["message_id"], now["deliveries"][0]["message_id"]);
        assert_eq!(now["links"][0]["expires_at"], now["expires_at"]);
        assert!(now["last_download_at"].is_string() && now["links"][0]["last_download_at"].is_string());

        assert_eq!(delete(&daemon, href, &token).await.status, 204);
        let mut last = link.clone();
        let other = if last.pop() == Some('A') { 'Q' } else { 'A' };
        last.push(other);
        let mut told = Vec::new();
        for link in [&*link, &last, "AAAAAAAAAAAAAAAAAAAAAA", "x", "..%2F..%2Fetc", &"A".repeat(5000)] {
            let answer = send(daemon.http.get(daemon.url(&format!("/d/{link}")))).await;
            answer.problem(404, link);
            for (name, value) in HEADERS {
                assert_eq!(answer.header(name), value, "{name}");
            }
            told.push(answer.text);
        }
        told.dedup();
        assert_eq!(told.len(), 1, "revoked, unknown and malformed are not told apart");
        let now = get(&daemon, href, &token).await.json();
        assert!(now["links"][0]["revoked_at"].is_string(), "{now}");
        assert!(!daemon.log().contains(&link), "no link in a log");
        assert_calm(&daemon);
    }

    async fn an_export_that_is_taken_away_loses_its_file_and_keeps_its_record(db) {
        let daemon = daemon(db).await;
        let done = export(&daemon, &agent("acme"), &json!({ "format": "csv", "to": ["ana@example.com"] })).await;
        let href = done["href"].as_str().unwrap();
        let files = || std::fs::read_dir(daemon.settings().state().join("exports")).unwrap().count();
        assert_eq!(files(), 1);
        for _ in 0..2 {
            assert_eq!(delete(&daemon, href, &service("acme")).await.status, 204);
            assert_eq!(files(), 0);
        }
        let now = get(&daemon, href, &agent("acme")).await.json();
        assert_eq!((&now["state"], &now["file"], &now["sha256"]), (&json!("expired"), &Value::Null, &done["sha256"]));
        let [action] = &now["actions"].as_array().unwrap()[..] else { panic!("one action: {now}") };
        assert_eq!((&action["action"], &action["by"]), (&json!("deleted"), &json!("service")));
        get(&daemon, &format!("{href}/file"), &agent("acme")).await.problem(410, "taken away");
        post(&daemon, &format!("{href}/resend"), &agent("acme")).await.problem(409, "no file");
        post(&daemon, &format!("{href}/cancel"), &agent("acme")).await.problem(409, "it was done");
        assert_calm(&daemon);
    }

    async fn an_export_is_mailed_anew_under_other_message_ids(db) {
        let daemon = daemon(db).await;
        let token = agent("acme");
        let done = export(&daemon, &token, &json!({ "format": "csv", "to": ["ana@example.com"] })).await;
        let href = done["href"].as_str().unwrap();
        let resend = format!("{href}/resend");
        assert_eq!(post(&daemon, &resend, &token).await.status, 202);
        let answer = post_json(&daemon, &resend, &service("acme"), &json!({ "to": ["rui@example.com"] })).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        let one = async || get(&daemon, href, &token).await.json();
        eventually("the mails are sent", PATIENCE, async || {
            let now = one().await;
            let mails = now["deliveries"].as_array().unwrap().clone();
            mails.len() == 3 && mails.iter().all(|mail| mail["state"] == "sent")
        })
        .await;
        let now = one().await;
        let column = |name: &str| -> Vec<&str> {
            now["deliveries"].as_array().unwrap().iter().map(|mail| mail[name].as_str().unwrap()).collect()
        };
        assert_eq!(column("to"), ["ana@example.com", "ana@example.com", "rui@example.com"]);
        let mut ids = column("message_id");
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 3);
        let mails = std::fs::read_dir(daemon.settings().state().join("outbox")).unwrap().count();
        assert_eq!((mails, &now["state"]), (3, &json!("done")));
        let by: Vec<_> = now["actions"].as_array().unwrap().iter()
            .map(|action| (action["action"].as_str().unwrap(), action["by"].as_str().unwrap())).collect();
        assert_eq!(by, [("resent", "agent"), ("resent", "service")]);
        for (body, pointer) in [
            (json!({ "to": ["ana"] }), "/to/0"),
            (json!({ "to": ["ana@example.com\r\nBcc: eve@example.com"] }), "/to/0"),
            (json!({ "from": "ana@example.com" }), "/from"),
            (json!([]), ""),
        ] {
            let problem = post_json(&daemon, &resend, &token, &body).await.problem(422, &body.to_string());
            assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
        }
        let nobody = export(&daemon, &token, &json!({ "format": "csv" })).await;
        let resend = format!("{}/resend", nobody["href"].as_str().unwrap());
        let problem = post(&daemon, &resend, &token).await.problem(422, "to nobody");
        assert_eq!(problem["errors"][0]["pointer"], "/to");
        assert_calm(&daemon);
    }

    async fn an_export_is_mailed_only_to_the_domains_of_its_tenant(db) {
        let allowed = "example.com,acme:acme.example";
        let daemon = Settings::new()
            .env("TIMELINED__DATABASE__URL", &db.url().await)
            .env("TIMELINED__MAIL__ALLOWED_DOMAINS", allowed)
            .start();
        let asked = |to: &[&str]| json!({ "format": "csv", "to": to });
        for (tenant, to, pointer) in [
            ("acme", vec!["ana@example.com", "eve@evil.example"], Some("/to/1")),
            ("globex", vec!["ana@acme.example"], Some("/to/0")),
            ("globex", vec!["ana@EXAMPLE.com"], None),
            ("acme", vec!["ana@acme.example"], None),
        ] {
            let answer = post_json(&daemon, &path(), &agent(tenant), &asked(&to)).await;
            let Some(pointer) = pointer else {
                assert_eq!(answer.status, 202, "{tenant} {to:?}: {}", answer.text);
                continue;
            };
            let problem = answer.problem(422, tenant);
            assert_eq!(problem["errors"][0]["pointer"], pointer, "{problem}");
        }
        let done = export(&daemon, &agent("acme"), &asked(&[])).await;
        let resend = format!("{}/resend", done["href"].as_str().unwrap());
        let to = json!({ "to": ["eve@evil.example"] });
        let problem = post_json(&daemon, &resend, &agent("acme"), &to).await.problem(422, "resend");
        assert_eq!(problem["errors"][0]["pointer"], "/to/0", "{problem}");
        assert_calm(&daemon);
    }

    async fn an_export_of_nobody_is_404(db) {
        let daemon = daemon(db).await;
        for path in ["cancel", "resend"].map(|what| format!("/api/v1/exports/{}/{what}", id(1))) {
            post(&daemon, &path, &service("acme")).await.problem(404, &path);
        }
        delete(&daemon, &format!("/api/v1/exports/{}", id(1)), &service("acme")).await.problem(404, "delete");
        for path in [format!("/api/v1/exports/{}", id(1)), format!("/api/v1/exports/{}/file", id(1))] {
            get(&daemon, &path, &service("acme")).await.problem(404, &path);
            get(&daemon, &path, &client("acme", &[contact(1)])).await.problem(403, &path);
        }
    }
}
