//! Exports: rows per second of each format, what they cost in memory, and how fast they come back.
//!
//! The reference is `COPY … TO STDOUT CSV` by psql, which neither formats times for a zone nor guards
//! a spreadsheet; for SQLite also its own shell's CSV of the same rows. An import stands beside the
//! engine's own `insert … select`. `BENCH_EVENTS=20000` makes a short run.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::idle::resident_mib;
use crate::support::daemon::{Settings, TestDaemon, service};
use crate::support::database::{Database, Engine};
use crate::{ENGINES, Row, daemon, median};

const CONTACT: &str = "0190b5f0-0000-7000-8000-000000000001";
const ROUNDS: usize = 3;
/// How much more memory a daemon may take while it exports.
const MEMORY_MIB: f64 = 32.0;

pub(crate) async fn run() {
    let events =
        std::env::var("BENCH_EVENTS").map_or(1_000_000, |events| events.parse().expect("a number"));
    let (mut copied, mut on_postgres) = (0.0, 0.0);
    // PostgreSQL first, since its figures serve both.
    for (engine, name) in ENGINES.into_iter().rev() {
        let db = Database::fresh(engine).await;
        let began = Instant::now();
        super::pages::fill(&db, events).await;
        let own_load = f64::from(events) / began.elapsed().as_secs_f64();
        let daemon = daemon(&db, &[]).await;
        let idle = resident_mib(daemon.pid());
        let url = db.url().await;
        let (mut csv, mut zst, mut jsonl, mut reference, mut packed) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut peak = idle;
        for _ in 0..ROUNDS {
            // In turns, since machines are noisy.
            for (format, rates) in [
                ("csv", &mut csv),
                ("csv.zst", &mut zst),
                ("jsonl", &mut jsonl),
            ] {
                let (rate, memory) = export(&daemon, format, events).await;
                rates.push(rate);
                peak = peak.max(memory);
            }
            reference.push(rate_of(own_csv(engine, &url, ""), events));
            packed.push(rate_of(own_csv(engine, &url, "zstd -q -c"), events));
        }
        let [csv, zst, jsonl, reference, packed] = [csv, zst, jsonl, reference, packed].map(median);
        if engine == Engine::Postgres {
            (copied, on_postgres) = (reference, csv);
        }
        let row = |what: &str, rate: f64| Row::new(format!("{name}: {what}"), format!("{rate:.0}"));
        let beside = match engine {
            Engine::Postgres => format!("psql's COPY to CSV: {reference:.0}"),
            Engine::Sqlite => format!("its shell: {reference:.0}; psql's COPY: {copied:.0}"),
        };
        let of_csv = row("CSV rows/s", csv).beside(beside);
        match engine {
            Engine::Postgres => of_csv.at_least(csv / copied, 0.95).print(),
            Engine::Sqlite if csv >= 350_000.0 => of_csv.is("at least 350,000: ok").print(),
            // of what we make of PostgreSQL
            Engine::Sqlite => of_csv.at_least(csv / on_postgres, 0.8).print(),
        }
        row("CSV rows/s, by zstd", zst)
            .beside(format!("the same through zstd: {packed:.0}"))
            .at_least(zst / copied, 0.7)
            .print();
        row("JSONL rows/s", jsonl)
            .is(format!("{:.2}", jsonl / reference))
            .print();
        Row::new(
            format!("{name}: memory over idle, {events} events"),
            format!("{:.1} MiB", peak - idle),
        )
        .at_most(peak - idle, MEMORY_MIB)
        .print();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("timeline.jsonl");
        write(&daemon, &file).await;
        drop(daemon);
        db.drop().await;
        let imported = import(engine, &file, events).await;
        row("JSONL rows/s, imported", imported)
            .beside(format!("insert … select, one transaction: {own_load:.0}"))
            .at_least(imported / own_load, 0.5)
            .print();
    }
}

/// Rows per second from the request to the file, and the most memory that was seen meanwhile.
async fn export(daemon: &TestDaemon, format: &str, events: u32) -> (f64, f64) {
    let began = Instant::now();
    let path = order(daemon, format).await;
    let token = service("acme");
    let mut peak: f64 = 0.0;
    loop {
        let (_, export) = daemon.get(&path, &token).await;
        peak = peak.max(resident_mib(daemon.pid()));
        match export["state"].as_str() {
            Some("done") => {
                assert_eq!(export["rows"], events);
                return (f64::from(events) / began.elapsed().as_secs_f64(), peak);
            }
            Some("queued" | "running") => tokio::time::sleep(Duration::from_millis(20)).await,
            _ => panic!("{export}"),
        }
    }
}

async fn order(daemon: &TestDaemon, format: &str) -> String {
    let body = json!({ "format": format, "audience": "audit" });
    let path = format!("/api/v1/contacts/{CONTACT}/exports");
    let (status, export) = daemon.post(&path, &service("acme"), &body).await;
    assert_eq!(status, 202, "{export}");
    format!("/api/v1/exports/{}", export["id"].as_str().unwrap())
}

fn rate_of(took: Duration, events: u32) -> f64 {
    f64::from(events) / took.as_secs_f64()
}

/// How long the engine's own client takes to write the same rows as CSV, `through` another program
/// where one is named.
fn own_csv(engine: Engine, url: &str, through: &str) -> Duration {
    let select = format!(
        "select * from timeline_events where tenant_id = 'acme' and contact_id = '{CONTACT}' order by occurred_at, id"
    );
    let (client, arguments) = match engine {
        Engine::Postgres => {
            let copy = format!("copy ({select}) to stdout csv");
            (
                "psql",
                ["-X", "-q", "-c"]
                    .map(str::to_owned)
                    .into_iter()
                    .chain([copy, url.to_owned()])
                    .collect::<Vec<_>>(),
            )
        }
        Engine::Sqlite => {
            let file = url.strip_prefix("sqlite://").unwrap().to_owned();
            (
                "sqlite3",
                vec!["-readonly".to_owned(), "-csv".to_owned(), file, select],
            )
        }
    };
    let began = Instant::now();
    let script = if through.is_empty() {
        "\"$@\" > /dev/null".to_owned()
    } else {
        format!("\"$@\" | {through} > /dev/null")
    };
    let status = Command::new("bash")
        .args(["-euo", "pipefail", "-c", &script, "-", client])
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    began.elapsed()
}

/// Exports to a file that outlives the daemon's own.
async fn write(daemon: &TestDaemon, file: &Path) {
    let path = order(daemon, "jsonl").await;
    let token = service("acme");
    while daemon.get(&path, &token).await.1["state"] != "done" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let written = std::fs::read_dir(daemon.settings().state().join("exports"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "jsonl")
        })
        .max_by_key(|path| path.metadata().unwrap().modified().unwrap());
    std::fs::copy(written.unwrap(), file).unwrap();
}

/// Rows per second of `timelined events import` into an empty database.
async fn import(engine: Engine, file: &Path, events: u32) -> f64 {
    let db = Database::fresh(engine).await;
    let settings = Settings::new().env("TIMELINED__DATABASE__URL", &db.url().await);
    let arguments = [
        "events",
        "import",
        file.to_str().unwrap(),
        "--tenant",
        "acme",
    ];
    let began = Instant::now();
    let output = settings.command(&arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let rate = rate_of(began.elapsed(), events);
    db.drop().await;
    rate
}
