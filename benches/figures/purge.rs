//! The purge: rows per second, its slowest transaction, and what writers notice of it.
//!
//! The reference is one statement that deletes the same rows and what stands beside them, in one
//! transaction: the least work, and the longest lock.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;

use crate::load::create;
use crate::support::daemon::{TestDaemon, answer, operator, service};
use crate::support::database::{Database, Engine};
use crate::{ENGINES, Row, daemon};

const ROWS: u32 = 200_000;
const WRITERS: usize = 4;

pub(crate) async fn run() {
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        expired(&db).await;
        let reference = one_statement(&db).await;
        expired(&db).await;
        let debug = "info,timelined::jobs::purge=debug";
        let daemon = daemon(&db, &[("TIMELINED__LOG__LEVEL", debug)]).await;
        let ours = purge(&daemon).await;
        let slowest = slowest_batch_ms(&daemon);
        assert_eq!(db.count("contact_events").await, 0);

        let (writer, quiet) = (service("acme"), Duration::from_secs(2));
        let mut before = create(&daemon.address, &writer, WRITERS, quiet).await;
        expired(&db).await;
        let purging = purge(&daemon);
        let writing = create(&daemon.address, &writer, WRITERS, quiet);
        let (_, mut during) = tokio::join!(purging, writing);
        Row::new(format!("{name}: purged rows/s"), format!("{ours:.0}"))
            .beside(format!("one statement: {reference:.0}"))
            .is(format!("{:.2}", ours / reference))
            .print();
        Row::new(format!("{name}: slowest batch"), format!("{slowest:.0} ms"))
            .at_most(slowest, 100.0)
            .print();
        Row::new(
            format!("{name}: create p99 while it purges"),
            format!("{:.1} ms", during.latency_ms(0.99)),
        )
        .beside(format!(
            "while it does not: {:.1} ms",
            before.latency_ms(0.99)
        ))
        .print();
        drop(daemon);
        db.drop().await;
    }
}

/// Events that expired a month ago, a quarter of them delivered and read.
async fn expired(db: &Database) {
    let columns = "insert into contact_events (tenant_id, id, contact_id, event_type, category, source, title, payload, is_realtime, created_at, occurred_at, expires_at)";
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {ROWS}),
                  t (now) as (select cast(strftime('%s', 'now') as integer) * 1000000)
             {columns} select 'acme', printf('0190b5f0-0001-7000-8000-%012x', i), printf('0190b5f0-0000-7000-8000-%012x', i % 1000 + 1),
                'note_added', 'note', 'system', 'Asked for a quote', '{{\"seats\":25}}', 0,
                now - 60 * 86400000000, now - 60 * 86400000000, now - 30 * 86400000000 + i from n, t;
             insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)
                select tenant_id, id, 'agent', 'delivered', created_at from contact_events where seq % 4 = 0 on conflict do nothing;
             insert into event_reads (tenant_id, event_id, reader, read_at)
                select tenant_id, id, 'agent', created_at from contact_events where seq % 4 = 0 on conflict do nothing"
        ),
        Engine::Postgres => format!(
            "{columns} select 'acme', ('0190b5f0-0001-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid,
                ('0190b5f0-0000-7000-8000-' || lpad(to_hex(i % 1000 + 1), 12, '0'))::uuid,
                'note_added', 'note', 'system', 'Asked for a quote', '{{\"seats\":25}}', false,
                now() - interval '60 days', now() - interval '60 days', now() - interval '30 days' + i * interval '1 microsecond'
                from generate_series(1, {ROWS}) i;
             insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)
                select tenant_id, id, 'agent', 'delivered', created_at from contact_events where seq % 4 = 0 on conflict do nothing;
             insert into event_reads (tenant_id, event_id, reader, read_at)
                select tenant_id, id, 'agent', created_at from contact_events where seq % 4 = 0 on conflict do nothing;
             analyze"
        ),
    };
    db.execute(&sql).await.unwrap();
}

async fn one_statement(db: &Database) -> f64 {
    let began = Instant::now();
    let beside = "delete from event_deliveries where not exists (
             select 1 from contact_events e where e.tenant_id = event_deliveries.tenant_id and e.id = event_id);
         delete from event_reads where not exists (
             select 1 from contact_events e where e.tenant_id = event_reads.tenant_id and e.id = event_id);
         commit";
    let begin = db.either("pragma synchronous = full; begin immediate", "begin");
    let cutoff = db.either(
        "(cast(strftime('%s', 'now') as integer) - 7 * 86400) * 1000000",
        "now() - interval '7 days'",
    );
    let sql = format!("{begin}; delete from contact_events where expires_at < {cutoff}; {beside}");
    db.execute(&sql).await.unwrap();
    f64::from(ROWS) / began.elapsed().as_secs_f64()
}

/// Asks for a purge and waits for its end; rows per second.
async fn purge(daemon: &TestDaemon) -> f64 {
    let path = "/api/v1/jobs/purge-expired";
    let asked = daemon.request(Method::POST, &format!("{path}/run"), &operator());
    let (status, body) = answer(asked).await;
    assert_eq!(status, 202, "{body}");
    loop {
        let (_, page) = daemon
            .get(&format!("{path}/runs?limit=1"), &operator())
            .await;
        let run = &page["runs"][0];
        if run["id"] == body["run_id"] && run["finished_at"].is_string() {
            assert_eq!(run["counts"]["deleted"], ROWS, "{run}");
            let at = |name: &str| {
                run[name]
                    .as_str()
                    .unwrap()
                    .parse::<chrono::DateTime<chrono::Utc>>()
                    .unwrap()
            };
            let took = at("finished_at") - at("started_at");
            return f64::from(ROWS) / took.as_seconds_f64();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// From the log: each batch leaves a line.
fn slowest_batch_ms(daemon: &TestDaemon) -> f64 {
    let log = daemon.log();
    let times: Vec<f64> = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["message"] == "purged a batch")
        .filter_map(|line| line["elapsed_us"].as_f64())
        .collect();
    assert!(!times.is_empty(), "{log}");
    times.into_iter().fold(0.0, f64::max) / 1000.0
}
