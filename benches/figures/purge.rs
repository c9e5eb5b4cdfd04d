//! The purge of a quarter of a large table: rows per second, its slowest transaction, and what
//! writers and readers notice of it; and what holds cost.
//!
//! The reference is one statement that deletes the same rows and what stands beside them, in one
//! transaction: the least work, and the longest lock.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use timelined::domain::{Clock as _, Subject, Sweep, SystemClock, TenantId};
use timelined::storage::{Deletion, HoldScope};
use tokio_util::sync::CancellationToken;

use crate::load::{Answers, Traffic};
use crate::support::daemon::{TestDaemon, answer, operator, service};
use crate::support::database::{Database, Engine};
use crate::{ENGINES, Row, daemon, median, quantile, quick_or};

/// Rows of the table, and those of them that have expired.
const ROWS: u32 = 2_000_000;
const ROWS_QUICKLY: u32 = 100_000;
const EXPIRED_SHARE: u32 = 4;
const WRITERS: usize = 16;
const READERS: usize = 16;
/// The load is watched for so long before the purge, and after it.
const QUIET: Duration = Duration::from_secs(20);
const QUIET_QUICKLY: Duration = Duration::from_secs(3);
const HELD_TENANTS: u32 = 49;
/// Rows of a batch where batches are compared.
const HELD_BATCH: u32 = 200;

pub(crate) async fn run() {
    for (engine, name) in ENGINES {
        beside_work(engine, name).await;
        holds(engine, name).await;
    }
}

async fn beside_work(engine: Engine, name: &str) {
    let rows = quick_or(ROWS_QUICKLY, ROWS);
    let expired = rows / EXPIRED_SHARE;
    let db = Database::fresh(engine).await;
    fill(&db, rows - expired, Kind::Lasting).await;
    fill(&db, expired, Kind::Expired).await;
    let reference = one_statement(&db, expired).await;

    fill(&db, expired, Kind::Expired).await;
    let debug = "info,timelined::jobs::purge=debug";
    let daemon = daemon(&db, &[("TIMELINED__LOG__LEVEL", debug)]).await;
    purge(&daemon, expired).await;
    let quiet = Batches::of(&daemon, 0);
    Row::new(
        format!("{name}: purged rows/s, nothing else at work"),
        format!("{:.0}", quiet.per_second()),
    )
    .beside(format!("one statement: {reference:.0}"))
    .at_least(quiet.per_second() / reference, db.either(0.5, 0.9))
    .print();

    fill(&db, expired, Kind::Expired).await;
    let work = || Traffic::start(&daemon.address, &service("acme"), WRITERS, READERS);
    let watched = quick_or(QUIET_QUICKLY, QUIET);
    let mut without = quiet_time(work(), watched).await;
    let wal = watch_wal(&db).await;
    let during = work();
    purge(&daemon, expired).await;
    let during = during.end().await;
    let wal = wal.end().await;
    without.add(quiet_time(work(), watched).await);
    let busy = Batches::of(&daemon, quiet.times.len());
    Row::new(
        format!("{name}: purged rows/s beside {WRITERS} + {READERS} clients"),
        format!("{:.0}", busy.per_second()),
    )
    .print();
    let most = db.either(2.0, 1.2);
    let pairs = [
        ("create", without.writes, during.writes.clone()),
        ("page", without.reads, during.reads),
    ];
    for (what, mut without, mut during) in pairs {
        let (without, during) = (quantile(&mut without, 0.99), quantile(&mut during, 0.99));
        Row::new(
            format!("{name}: {what} p99 while it purges"),
            format!("{during:.1} ms"),
        )
        .beside(format!("while it does not: {without:.1} ms"))
        .at_most(during / without, most)
        .print();
    }
    let slowest = during.writes.into_iter().fold(0.0, f64::max);
    let row = Row::new(
        format!("{name}: slowest create while it purges"),
        format!("{slowest:.0} ms"),
    );
    if engine == Engine::Sqlite {
        row.at_most(slowest, 50.0).print();
    } else {
        row.print();
    }
    let slowest = [quiet, busy]
        .iter()
        .map(Batches::slowest_ms)
        .fold(0.0, f64::max);
    Row::new(
        format!("{name}: slowest batch, with what it waited for"),
        format!("{slowest:.0} ms"),
    )
    .at_most(slowest, 100.0)
    .print();
    if engine == Engine::Sqlite {
        Row::new(format!("{name}: largest WAL"), format!("{wal:.0} MiB"))
            .at_most(wal, 64.0)
            .print();
    }
    drop(daemon);
    db.drop().await;
}

/// What of the table a fill adds.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Expired a month ago, a quarter of them delivered and read.
    Expired,
    /// Without an expiry.
    Lasting,
}

/// Events of `acme`.
async fn fill(db: &Database, rows: u32, kind: Kind) {
    fill_for(db, "'acme'", rows, kind).await;
    db.execute(db.either(
        "pragma wal_checkpoint(truncate)",
        "vacuum analyze contact_events",
    ))
    .await
    .unwrap();
}

/// Events of a tenant, an expression of the row's number `i`.
async fn fill_for(db: &Database, tenant: &str, rows: u32, kind: Kind) {
    let columns = "insert into contact_events (tenant_id, id, contact_id, event_type, category, source, title, payload, is_realtime, created_at, occurred_at, expires_at)";
    let group = match kind {
        Kind::Expired => "0001",
        Kind::Lasting => "0002",
    };
    let expiry = match kind {
        Kind::Expired => db.either(
            "now - 30 * 86400000000 + i",
            "now() - interval '30 days' + i * interval '1 microsecond'",
        ),
        Kind::Lasting => "null",
    };
    let beside = "insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)
            select tenant_id, id, 'agent', 'delivered', created_at from contact_events where expires_at is not null and seq % 4 = 0 on conflict do nothing;
         insert into event_reads (tenant_id, event_id, reader, read_at)
            select tenant_id, id, 'agent', created_at from contact_events where expires_at is not null and seq % 4 = 0 on conflict do nothing";
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {rows}),
                  t (now) as (select cast(strftime('%s', 'now') as integer) * 1000000)
             {columns} select {tenant}, printf('0190b5f0-{group}-7000-8000-%012x', i), printf('0190b5f0-0000-7000-8000-%012x', i % 1000 + 1),
                'note_added', 'note', 'system', 'Asked for a quote', '{{\"seats\":25}}', 0,
                now - 60 * 86400000000, now - 60 * 86400000000, {expiry} from n, t;
             {beside}"
        ),
        Engine::Postgres => format!(
            "{columns} select {tenant}, ('0190b5f0-{group}-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid,
                ('0190b5f0-0000-7000-8000-' || lpad(to_hex(i % 1000 + 1), 12, '0'))::uuid,
                'note_added', 'note', 'system', 'Asked for a quote', '{{\"seats\":25}}', false,
                now() - interval '60 days', now() - interval '60 days', {expiry}
                from generate_series(1, {rows}) i;
             {beside};
             analyze"
        ),
    };
    db.execute(&sql).await.unwrap();
}

async fn one_statement(db: &Database, expired: u32) -> f64 {
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
    f64::from(expired) / began.elapsed().as_secs_f64()
}

/// Asks for a purge and waits for its end.
async fn purge(daemon: &TestDaemon, expired: u32) {
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
            assert_eq!(run["counts"]["deleted"], expired, "{run}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The batches of a purge, from the log: each leaves a line.
struct Batches {
    deleted: f64,
    /// From the begin of the first to the end of the last. What follows, giving space back, is no
    /// part of it, nor of the reference.
    seconds: f64,
    times: Vec<f64>,
}

impl Batches {
    /// Those behind the first `skipped`.
    fn of(daemon: &TestDaemon, skipped: usize) -> Self {
        let log = daemon.log();
        let lines: Vec<Value> = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|line: &Value| line["message"] == "purged a batch")
            .skip(skipped)
            .collect();
        let took = |line: &Value| line["elapsed_us"].as_f64().unwrap() / 1000.0;
        let at = |line: &Value| {
            let at = line["timestamp"].as_str().unwrap();
            at.parse::<chrono::DateTime<chrono::Utc>>().unwrap()
        };
        let (first, last) = (lines.first().unwrap(), lines.last().unwrap());
        Self {
            deleted: lines
                .iter()
                .map(|line| line["deleted"].as_f64().unwrap())
                .sum(),
            seconds: (at(last) - at(first)).as_seconds_f64() + took(first) / 1000.0,
            times: lines.iter().map(took).collect(),
        }
    }

    fn per_second(&self) -> f64 {
        self.deleted / self.seconds
    }

    fn slowest_ms(&self) -> f64 {
        self.times.iter().copied().fold(0.0, f64::max)
    }
}

async fn quiet_time(work: Traffic, watched: Duration) -> Answers {
    tokio::time::sleep(watched).await;
    work.end().await
}

/// Follows the size of SQLite's WAL.
struct WatchedWal {
    task: tokio::task::JoinHandle<u64>,
    stop: CancellationToken,
}

async fn watch_wal(db: &Database) -> WatchedWal {
    let url = db.url().await;
    let path = PathBuf::from(format!("{}-wal", url.trim_start_matches("sqlite://")));
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let task = tokio::spawn(async move {
        let mut largest = 0;
        while !stopped.is_cancelled() {
            largest = largest.max(std::fs::metadata(&path).map_or(0, |wal| wal.len()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        largest
    });
    WatchedWal { task, stop }
}

impl WatchedWal {
    /// The largest size, in MiB.
    async fn end(self) -> f64 {
        self.stop.cancel();
        self.task.await.unwrap() as f64 / 1024.0 / 1024.0
    }
}

/// A batch of the one tenant that is free, before and after the others are put under hold.
async fn holds(engine: Engine, name: &str) {
    let rows = quick_or(ROWS_QUICKLY, ROWS / EXPIRED_SHARE);
    let db = Database::fresh(engine).await;
    let tenants = HELD_TENANTS + 1;
    let any = format!("'tenant-' || (i % {tenants})");
    fill_for(&db, &any, rows, Kind::Expired).await;
    let tenant = |number: u32| TenantId::new(&format!("tenant-{number}")).unwrap();
    let sweep = Sweep::expired_before(&tenant(0), SystemClock.now());
    let batches = rows / tenants / HELD_BATCH / 2;
    let mut medians = Vec::new();
    for is_held in [false, true] {
        if is_held {
            for number in 1..tenants {
                let tenant = tenant(number);
                let by = Subject::new("service").unwrap();
                let now = SystemClock.now();
                let scope = HoldScope::Tenant;
                let held = db.retention.place_hold(&tenant, scope, "a claim", &by, now);
                held.await.unwrap();
            }
        }
        let mut times = Vec::new();
        for _ in 0..batches {
            let deletion = Deletion {
                run: None,
                fence: None,
                now: SystemClock.now(),
            };
            let began = Instant::now();
            let batch = db
                .retention
                .sweep(&sweep, None, HELD_BATCH, deletion)
                .await
                .unwrap();
            times.push(began.elapsed().as_secs_f64() * 1000.0);
            assert_eq!(batch.deleted, u64::from(HELD_BATCH));
        }
        medians.push(median(times));
    }
    let (free, held) = (medians[0], medians[1]);
    Row::new(
        format!("{name}: a batch, {HELD_TENANTS} of {tenants} tenants held"),
        format!("{held:.2} ms"),
    )
    .beside(format!("none held: {free:.2} ms"))
    .at_most(held / free, 1.5)
    .print();
    db.drop().await;
}
