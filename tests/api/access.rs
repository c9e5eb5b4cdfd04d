//! Every route, asked by everybody.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::TimeDelta;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use timelined::domain::{Audience, ExportId, RunId};
use timelined::storage::sqlite::SqliteStorage;
use timelined::storage::{Counts, ExportRequest, NewExport, Run, RunState, Storage, Trigger};

use super::ask::{PATIENCE, assert_calm, body, get, id_of, now, post_json, record, send};
use crate::support::builders::{acme, contact, session, subject};
use crate::support::daemon::{KEY, TestDaemon, agent, eventually, service};

/// A route and what it answers.
struct Route {
    method: Method,
    /// As the router has it.
    pattern: &'static str,
    path: String,
    body: Option<Value>,
    /// To nobody, and to a bearer of a token that is not taken.
    strangers: [u16; 2],
    /// To a client, an agent, a service and an operator.
    roles: [u16; 4],
}

const ROLES: [&str; 4] = ["client", "agent", "service", "operator"];
/// Stands for an event that is made for the one request.
const FRESH: &str = "FRESH";
/// Stands for a hold that is placed for the one request.
const NEW_HOLD: &str = "NEW_HOLD";

impl Route {
    fn new(method: Method, pattern: &'static str, ids: &[&str], roles: [u16; 4]) -> Self {
        let mut path = pattern.to_owned();
        for id in ids {
            let (open, close) = (path.find('{').unwrap(), path.find('}').unwrap());
            path.replace_range(open..=close, id);
        }
        Self {
            method,
            pattern,
            path,
            body: None,
            strangers: [401, 401],
            roles,
        }
    }

    fn query(mut self, query: &str) -> Self {
        self.path.push_str(query);
        self
    }

    fn body(mut self, body: Value) -> Self {
        self.body = Some(body);
        self
    }

    fn strangers(mut self, nobody: u16, refused: u16) -> Self {
        self.strangers = [nobody, refused];
        self
    }

    async fn request(&self, daemon: &TestDaemon) -> RequestBuilder {
        let mut path = self.path.clone();
        if path.contains(FRESH) {
            let fresh = record(daemon, contact(1), json!({})).await;
            path = path.replace(FRESH, id_of(&fresh));
        }
        if path.contains(NEW_HOLD) {
            let given = json!({ "contact_id": contact(99) });
            let placed = post_json(daemon, "/api/v1/holds", &service("acme"), &given).await;
            path = path.replace(NEW_HOLD, placed.json()["id"].as_str().unwrap());
        }
        let request = daemon.http.request(self.method.clone(), daemon.url(&path));
        match &self.body {
            Some(body) => request.json(body),
            None if self.pattern == "/api/v1/realtime" => request
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-version", "13")
                .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
                .header("sec-websocket-protocol", "timelined.v1"),
            None => request,
        }
    }
}

/// Every route. `event` is a realtime one that the client may see, `export` one that is done, to which
/// `link` leads, and no worker takes the `unserved` one; of the runs one is `waiting`, the other has
/// `failed`.
fn routes(
    event: &str,
    export: &str,
    [unserved, link]: [&str; 2],
    [waiting, failed]: [&str; 2],
) -> Vec<Route> {
    let (get, post) = (Method::GET, Method::POST);
    let contact_of_no_other_route = contact(99);
    let contact = contact(1).to_string();
    let session = session(1).to_string();
    let route = Route::new;
    vec![
        route(
            post.clone(),
            "/api/v1/contacts/{contact_id}/events",
            &[&contact],
            [403, 201, 201, 403],
        )
        .body(body(json!({}))),
        route(
            get.clone(),
            "/api/v1/contacts/{contact_id}/events",
            &[&contact],
            [200, 200, 200, 403],
        ),
        route(
            get.clone(),
            "/api/v1/sessions/{session_id}/events",
            &[&session],
            [200, 200, 200, 403],
        ),
        route(
            get.clone(),
            "/api/v1/contact-events",
            &[],
            [403, 200, 200, 403],
        )
        .query("?event_type=note_added"),
        route(
            get.clone(),
            "/api/v1/contact-events/undelivered",
            &[],
            [200, 200, 200, 403],
        )
        .query(&format!("?contact_id={contact}")),
        route(
            get.clone(),
            "/api/v1/contact-events/{id}",
            &[event],
            [200, 200, 200, 403],
        ),
        route(
            Method::DELETE,
            "/api/v1/contact-events/{id}",
            &[FRESH],
            [403, 403, 204, 403],
        ),
        route(
            post.clone(),
            "/api/v1/contact-events/{id}/mark-read",
            &[event],
            [200, 200, 200, 403],
        ),
        // It waits for the client, so an agent is none of those who may say that it arrived.
        route(
            post.clone(),
            "/api/v1/contact-events/{id}/mark-delivered",
            &[event],
            [200, 403, 200, 403],
        ),
        route(
            post.clone(),
            "/api/v1/contacts/{contact_id}/exports",
            &[&contact],
            [403, 202, 202, 403],
        )
        .body(json!({ "format": "csv" })),
        route(get.clone(), "/api/v1/exports", &[], [403, 200, 200, 403]),
        route(
            get.clone(),
            "/api/v1/exports/{id}",
            &[export],
            [403, 200, 200, 403],
        ),
        route(
            get.clone(),
            "/api/v1/exports/{id}/file",
            &[export],
            [403, 200, 200, 403],
        ),
        route(
            Method::DELETE,
            "/api/v1/contacts/{contact_id}/events",
            &[&contact_of_no_other_route.to_string()],
            [403, 403, 200, 403],
        ),
        route(
            post.clone(),
            "/api/v1/exports/{id}/resend",
            &[export],
            [403, 202, 202, 403],
        )
        .body(json!({ "to": ["rui@example.com"] })),
        route(
            post.clone(),
            "/api/v1/exports/{id}/cancel",
            &[unserved],
            [403, 200, 200, 403],
        ),
        route(
            Method::DELETE,
            "/api/v1/exports/{id}",
            &[unserved],
            [403, 204, 204, 403],
        ),
        // Whoever has the link: nothing else is asked for.
        route(get.clone(), "/d/{link}", &[link], [200; 4]).strangers(200, 200),
        route(post.clone(), "/api/v1/holds", &[], [403, 403, 201, 403])
            .body(json!({ "contact_id": contact_of_no_other_route })),
        route(get.clone(), "/api/v1/holds", &[], [403, 403, 200, 403]),
        route(
            Method::DELETE,
            "/api/v1/holds/{id}",
            &[NEW_HOLD],
            [403, 403, 204, 403],
        ),
        route(get.clone(), "/api/v1/jobs", &[], [403, 403, 403, 200]),
        route(
            get.clone(),
            "/api/v1/jobs/{name}",
            &["purge-expired"],
            [403, 403, 403, 200],
        ),
        route(
            get.clone(),
            "/api/v1/jobs/{name}/runs",
            &["purge-expired"],
            [403, 403, 403, 200],
        ),
        route(
            get.clone(),
            "/api/v1/jobs/{name}/actions",
            &["purge-expired"],
            [403, 403, 403, 200],
        ),
        route(
            post.clone(),
            "/api/v1/jobs/{name}/run",
            &["purge-expired"],
            [403, 403, 403, 202],
        ),
        route(
            post.clone(),
            "/api/v1/jobs/{name}/runs/{id}/cancel",
            &["purge-expired", waiting],
            [403, 403, 403, 202],
        ),
        route(
            post.clone(),
            "/api/v1/jobs/{name}/runs/{id}/retry",
            &["purge-expired", failed],
            [403, 403, 403, 202],
        ),
        route(
            post.clone(),
            "/api/v1/jobs/{name}/pause",
            &["purge-expired"],
            [403, 403, 403, 200],
        ),
        route(
            post,
            "/api/v1/jobs/{name}/resume",
            &["purge-expired"],
            [403, 403, 403, 200],
        ),
        route(get.clone(), "/healthz", &[], [200; 4]).strangers(200, 200),
        route(get.clone(), "/readyz", &[], [200; 4]).strangers(200, 200),
        // Without a header the token comes in the first frame.
        route(get, "/api/v1/realtime", &[], [101, 101, 101, 403]).strangers(101, 401),
    ]
}

fn claims(role: &str) -> Value {
    let mut claims = json!({
        "sub": "somebody", "role": role, "aud": "timelined", "exp": now().timestamp() + 3600,
    });
    if role != "operator" {
        claims["tid"] = json!("acme");
    }
    if role == "client" {
        claims["contacts"] = json!([contact(1)]);
    }
    claims
}

fn signed(algorithm: Algorithm, key: &str, claims: &Value) -> String {
    let key = EncodingKey::from_secret(key.as_bytes());
    jsonwebtoken::encode(&Header::new(algorithm), claims, &key).unwrap()
}

fn token(claims: &Value) -> String {
    signed(Algorithm::HS256, KEY, claims)
}

fn with(claim: &str, value: Value) -> String {
    let mut claims = claims("service");
    claims[claim] = value;
    token(&claims)
}

fn without(claim: &str) -> String {
    let mut claims = claims("service");
    claims.as_object_mut().unwrap().remove(claim);
    token(&claims)
}

/// A token with this header that bears no signature but `signature`.
fn unsigned(header: &Value, signature: &str) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{signature}", part(header), part(&claims("service")))
}

/// What no route takes, each with the whole header.
fn refused() -> Vec<(&'static str, String)> {
    let now = now().timestamp();
    let service = claims("service");
    let good = token(&service);
    let signature = good.rsplit('.').next().unwrap();
    let none = json!({ "alg": "none", "typ": "JWT" });
    let bearer = |token: String| format!("Bearer {token}");
    vec![
        (
            "expired beyond the leeway",
            bearer(with("exp", json!(now - 31))),
        ),
        ("expired long ago", bearer(with("exp", json!(0)))),
        ("not valid so far", bearer(with("nbf", json!(now + 60)))),
        ("without exp", bearer(without("exp"))),
        ("exp as a text", bearer(with("exp", json!("tomorrow")))),
        ("unsigned", bearer(unsigned(&none, ""))),
        (
            "unsigned, with a signature",
            bearer(unsigned(&none, signature)),
        ),
        (
            "unsigned in other letters",
            bearer(unsigned(&json!({ "alg": "NoNe" }), "")),
        ),
        (
            "without its signature",
            bearer(unsigned(&json!({ "alg": "HS256" }), "")),
        ),
        ("HS384", bearer(signed(Algorithm::HS384, KEY, &service))),
        ("HS512", bearer(signed(Algorithm::HS512, KEY, &service))),
        (
            "of another key",
            bearer(signed(Algorithm::HS256, &KEY.replace('a', "b"), &service)),
        ),
        ("for somebody else", bearer(with("aud", json!("other")))),
        ("for nobody", bearer(without("aud"))),
        ("of nobody", bearer(without("sub"))),
        ("without a role", bearer(without("role"))),
        ("of an unknown role", bearer(with("role", json!("root")))),
        ("without a tenant", bearer(without("tid"))),
        ("of an empty tenant", bearer(with("tid", json!("")))),
        (
            "of a tenant too long",
            bearer(with("tid", json!("é".repeat(256)))),
        ),
        ("of a tenant with NUL", bearer(with("tid", json!("ac\0me")))),
        ("no JWT", bearer("nonsense".to_owned())),
        ("empty", "Bearer ".to_owned()),
        ("by another scheme", format!("Basic {good}")),
        ("without a scheme", good),
    ]
}

/// A daemon with a realtime event that the client may see, and an export that is done.
async fn populated() -> (TestDaemon, Vec<Route>) {
    let daemon = TestDaemon::start();
    let more = json!({ "visible_to_client": true, "is_realtime": true, "session_id": session(1) });
    let event = record(&daemon, contact(1), more).await;
    let path = format!("/api/v1/contacts/{}/exports", contact(1));
    let asked = json!({ "format": "csv", "to": ["ana@example.com"], "attach": false });
    let export = post_json(&daemon, &path, &agent("acme"), &asked).await;
    let href = export.json()["href"].as_str().unwrap().to_owned();
    eventually("the export is done", PATIENCE, async || {
        get(&daemon, &href, &agent("acme")).await.json()["state"] == "done"
    })
    .await;
    let export = export.json();
    let [waiting, failed] = runs(&daemon).await;
    let routes = routes(
        id_of(&event),
        id_of(&export),
        [&unserved(&daemon).await, &link(&daemon)],
        [&waiting, &failed],
    );
    (daemon, routes)
}

/// An export that no worker takes, since it is asked for tomorrow.
async fn unserved(daemon: &TestDaemon) -> String {
    let file = daemon.settings().state().join("timelined.db");
    let storage = Storage::sqlite(SqliteStorage::open(&file, true).await.unwrap());
    let id = ExportId::generate(now());
    let export = NewExport {
        id,
        tenant_id: acme(),
        request: ExportRequest {
            contact_id: contact(1),
            format: "csv".to_owned(),
            audience: Audience::Client,
            since: None,
            until: None,
            categories: Vec::new(),
            timezone: chrono_tz::UTC,
            redact: Vec::new(),
            to: Vec::new(),
            attach: true,
        },
        requested_by: subject("crm"),
        request_key: None,
        message_ids: Vec::new(),
        created_at: now() + TimeDelta::days(1),
    };
    storage.exports.create_one(&export).await.unwrap();
    storage.close().await;
    id.to_string()
}

/// The link in the only mail so far.
fn link(daemon: &TestDaemon) -> String {
    let outbox = daemon.settings().state().join("outbox");
    let mut mails = std::fs::read_dir(outbox).unwrap();
    let mail = std::fs::read_to_string(mails.next().unwrap().unwrap().path()).unwrap();
    let (_, rest) = mail.split_once("/d/").unwrap();
    rest.chars().take(22).collect()
}

/// Two runs of the purge: one that waits, since the purge is paused, and one that has failed.
async fn runs(daemon: &TestDaemon) -> [String; 2] {
    let file = daemon.settings().state().join("timelined.db");
    let storage = Storage::sqlite(SqliteStorage::open(&file, true).await.unwrap());
    let by = subject("operator");
    let paused = storage.ledger.pause("purge-expired", &by, now()).await;
    assert!(paused.unwrap());
    let mut ids = Vec::new();
    for state in [RunState::Queued, RunState::Failed] {
        let run = Run {
            id: RunId::generate(now()),
            job: "purge-expired".to_owned(),
            scheduled_at: now(),
            started_at: None,
            finished_at: (state == RunState::Failed).then(now),
            trigger: Trigger::Schedule,
            attempt: 0,
            daemon: None,
            fence: 0,
            state,
            counts: Counts::new(),
            error: None,
        };
        assert!(storage.ledger.record(&run).await.unwrap());
        ids.push(run.id.to_string());
    }
    storage.close().await;
    ids.try_into().unwrap()
}

#[tokio::test]
async fn each_route_answers_its_roles_and_tells_others_that_theirs_is_not_among_them() {
    let (daemon, routes) = populated().await;
    for route in &routes {
        for (role, status) in ROLES.into_iter().zip(route.roles) {
            let request = route
                .request(&daemon)
                .await
                .bearer_auth(token(&claims(role)));
            let answer = send(request).await;
            let what = format!("{} {} by {role}", route.method, route.pattern);
            if status >= 400 {
                let problem = answer.problem(status, &what);
                assert_eq!(problem["type"], "urn:timelined:problem:forbidden", "{what}");
            }
            assert_eq!(answer.status, status, "{what}: {}", answer.text);
        }
    }
    assert_calm(&daemon);
}

#[tokio::test]
async fn no_route_takes_a_token_that_is_missing_or_proves_nothing() {
    let (daemon, routes) = populated().await;
    let refused = refused();
    for route in &routes {
        let [nobody, by_token] = route.strangers;
        let headers = refused
            .iter()
            .map(|(why, header)| (*why, Some(header), by_token));
        for (why, header, status) in std::iter::once(("no token", None, nobody)).chain(headers) {
            // A fault in the body or the address does not come before the token.
            let request = route.request(&daemon).await;
            let request = match header {
                Some(header) => request.header("authorization", header),
                None => request,
            };
            let answer = send(request).await;
            let what = format!("{} {}, token: {why}", route.method, route.pattern);
            assert_eq!(answer.status, status, "{what}: {}", answer.text);
            if status == 401 {
                let problem = answer.problem(401, &what);
                assert_eq!(problem["type"], "urn:timelined:problem:unauthorized");
                assert_eq!(answer.header("www-authenticate"), "Bearer", "{what}");
            }
        }
    }
    // A stranger learns nothing about addresses either.
    for path in [
        "/api/v1/contacts/x/events",
        "/api/v1/jobs/nothing",
        "/api/v1/exports?x=1",
    ] {
        send(daemon.http.get(daemon.url(path)))
            .await
            .problem(401, path);
    }
    assert_calm(&daemon);
}

#[tokio::test]
async fn a_token_is_taken_within_the_leeway_of_30_seconds_and_whatever_the_case_of_its_scheme() {
    let daemon = TestDaemon::start();
    let path = format!("/api/v1/contacts/{}/events", contact(1));
    let (seconds, list) = (now().timestamp(), json!(["other", "timelined"]));
    for token in [
        with("exp", json!(seconds - 15)),
        with("nbf", json!(seconds + 15)),
        with("aud", list),
        with("tid", json!("é".repeat(255))),
    ] {
        for scheme in ["Bearer", "bearer", "BEARER"] {
            let header = format!("{scheme} {token}");
            let request = daemon
                .http
                .get(daemon.url(&path))
                .header("authorization", header);
            let answer = send(request).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
        }
    }
}

#[test]
fn the_table_has_every_route_of_the_router() {
    let mut in_code = BTreeSet::new();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/api");
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let code = std::fs::read_to_string(&path).unwrap();
        for rest in code.split(".route(").skip(1) {
            let pattern = rest.split('"').nth(1).unwrap();
            let prefix = if path.ends_with("ops.rs") || path.ends_with("links.rs") {
                ""
            } else {
                "/api/v1"
            };
            in_code.insert(format!("{prefix}{pattern}"));
        }
    }
    // It has a listener of its own.
    assert!(in_code.remove("/metrics"));
    let in_table: BTreeSet<String> = routes("id", "id", ["id"; 2], ["id"; 2])
        .iter()
        .map(|route| route.pattern.to_owned())
        .collect();
    assert_eq!(in_code, in_table);
}

#[tokio::test]
async fn what_is_no_route_is_404_and_another_method_405() {
    let daemon = TestDaemon::start();
    for path in [
        "/",
        "/api",
        "/api/v1",
        "/api/v1/nothing",
        "/metrics",
        "/api/v1/jobs/a/b/c",
    ] {
        send(daemon.http.get(daemon.url(path)))
            .await
            .problem(404, path);
    }
    let id = contact(1).to_string();
    for route in routes(&id, &id, [&id; 2], [&id; 2]) {
        let request = daemon.http.put(daemon.url(&route.path));
        let answer = send(request.bearer_auth(token(&claims("service")))).await;
        answer.problem(405, route.pattern);
        let allow = answer.header("allow");
        assert!(
            allow.contains(route.method.as_str()),
            "{}: {allow}",
            route.pattern
        );
    }
}

#[tokio::test]
async fn a_foreign_page_opens_no_socket() {
    let daemon = TestDaemon::start();
    let routes = routes("id", "id", ["id"; 2], ["id"; 2]);
    let route = routes
        .iter()
        .find(|route| route.pattern.ends_with("realtime"))
        .unwrap();
    let own = format!("http://{}", daemon.address);
    for (origin, status) in [(&*own, 101), ("https://evil.example", 403), ("null", 403)] {
        let answer = send(route.request(&daemon).await.header("origin", origin)).await;
        assert_eq!(answer.status, status, "{origin}: {}", answer.text);
    }
}
