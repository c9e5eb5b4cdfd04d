//! CSV rows per second. The reference is `COPY … TO STDOUT CSV` by psql, which neither formats times
//! for a zone nor guards a spreadsheet.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::daemon::{TestDaemon, service};
use crate::support::database::{Database, Engine};
use crate::{ENGINES, Row, daemon, median};

const CONTACT: &str = "0190b5f0-0000-7000-8000-000000000001";
const EVENTS: u32 = 200_000;
const ROUNDS: usize = 3;

pub(crate) async fn run() {
    let mut reference = None;
    // PostgreSQL first, since its reference serves both.
    for (engine, name) in ENGINES.into_iter().rev() {
        let db = Database::fresh(engine).await;
        super::pages::fill(&db, EVENTS).await;
        let daemon = daemon(&db, &[]).await;
        let (mut ours, mut copies) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(export(&daemon).await);
            if engine == Engine::Postgres {
                copies.push(copy(&db.url().await));
            }
        }
        let ours = median(ours);
        if engine == Engine::Postgres {
            reference = Some(median(copies));
        }
        let reference = reference.expect("PostgreSQL came first");
        Row::new(format!("{name}: CSV rows/s"), format!("{ours:.0}"))
            .beside(format!("psql's COPY to CSV: {reference:.0}"))
            .is(format!("{:.2}", ours / reference))
            .print();
        drop(daemon);
        db.drop().await;
    }
}

async fn export(daemon: &TestDaemon) -> f64 {
    let token = service("acme");
    let body = json!({ "format": "csv", "audience": "audit" });
    let began = Instant::now();
    let path = format!("/api/v1/contacts/{CONTACT}/exports");
    let (status, export) = daemon.post(&path, &token, &body).await;
    assert_eq!(status, 202, "{export}");
    let path = format!("/api/v1/exports/{}", export["id"].as_str().unwrap());
    loop {
        let (_, export) = daemon.get(&path, &token).await;
        match export["state"].as_str() {
            Some("done") => {
                assert_eq!(export["rows"], EVENTS);
                return f64::from(EVENTS) / began.elapsed().as_secs_f64();
            }
            Some("queued" | "running") => tokio::time::sleep(Duration::from_millis(5)).await,
            _ => panic!("{export}"),
        }
    }
}

fn copy(url: &str) -> f64 {
    let sql = format!(
        "copy (select * from timeline_events where tenant_id = 'acme' and contact_id = '{CONTACT}' order by occurred_at, id) to stdout csv"
    );
    let began = Instant::now();
    let status = Command::new("psql")
        .args(["-X", "-q", "-c", &sql, url])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    f64::from(EVENTS) / began.elapsed().as_secs_f64()
}
