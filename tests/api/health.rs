//! `/healthz` and `/readyz`.

use super::ask::{Answer, PATIENCE, body, get, post_json, send, timeline};
use crate::support::builders::contact;
use crate::support::daemon::{Settings, TestDaemon, eventually, service};
use crate::support::database::Cluster;
use serde_json::json;
use sqlx::Connection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

async fn health(daemon: &TestDaemon, path: &str) -> Answer {
    send(daemon.http.get(daemon.url(path))).await
}

#[tokio::test]
async fn a_daemon_that_serves_is_alive_and_ready_by_name() {
    let daemon = TestDaemon::start();
    let answer = health(&daemon, "/healthz").await;
    assert_eq!(
        (answer.status, answer.json()),
        (200, json!({ "status": "ok" }))
    );
    let answer = health(&daemon, "/readyz").await;
    let checks = json!({ "database": "ok", "migrations": "ok", "planner": "ok", "running": "ok" });
    let ready = json!({ "status": "ready", "checks": checks });
    assert_eq!((answer.status, answer.json()), (200, ready));
}

#[tokio::test]
async fn a_stopped_postgres_makes_it_unready_not_dead_and_it_heals_with_the_database() {
    let mut cluster = Cluster::launch();
    let daemon = Settings::new()
        .env("TIMELINED__DATABASE__URL", cluster.url())
        .start();
    let path = timeline(contact(1));
    let create = async || post_json(&daemon, &path, &service("acme"), &body(json!({}))).await;
    assert_eq!(health(&daemon, "/readyz").await.status, 200);
    assert_eq!(create().await.status, 201);

    cluster.stop();
    let answer = health(&daemon, "/readyz").await;
    assert_eq!(answer.status, 503, "{}", answer.text);
    let body = answer.json();
    assert_eq!(body["status"], "not ready");
    assert_ne!(body["checks"]["database"], "ok", "{body}");
    assert_eq!(body["checks"]["running"], "ok", "{body}");
    assert_eq!(health(&daemon, "/healthz").await.status, 200);
    // Nothing that was not written is acknowledged, and the caller is told to come again.
    let answer = create().await;
    let problem = answer.problem(503, "a create without a database");
    assert_eq!(problem["type"], "urn:timelined:problem:storage-unavailable");
    assert_eq!(answer.header("retry-after"), "1");
    let read = get(&daemon, &path, &service("acme")).await;
    read.problem(503, "a read without a database");

    cluster.start();
    eventually("it is ready again", PATIENCE, async || {
        health(&daemon, "/readyz").await.status == 200
    })
    .await;
    assert_eq!(create().await.status, 201);
    let page = get(&daemon, &path, &service("acme")).await.json();
    assert_eq!(page["total"], 2, "{page}");
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[tokio::test]
async fn a_sqlite_that_takes_no_writes_is_unready_while_it_is_read_and_heals() {
    let settings = Settings::new();
    let daemon = settings.clone().start();
    let path = timeline(contact(1));
    let file = SqliteConnectOptions::new().filename(settings.state().join("timelined.db"));
    let mut other = SqliteConnection::connect_with(&file).await.unwrap();
    let lock = sqlx::raw_sql("begin immediate").execute(&mut other).await;
    lock.unwrap();
    let answer = health(&daemon, "/readyz").await;
    assert_eq!(answer.status, 503, "{}", answer.text);
    let checks = &answer.json()["checks"];
    assert_eq!(checks["database"], "did not answer within 2 s", "{checks}");
    assert_eq!(get(&daemon, &path, &service("acme")).await.status, 200);
    // Another program's lock is no reason to be killed.
    assert_eq!(health(&daemon, "/healthz").await.status, 200);

    other.close().await.unwrap();
    eventually("it is ready again", PATIENCE, async || {
        health(&daemon, "/readyz").await.status == 200
    })
    .await;
}
