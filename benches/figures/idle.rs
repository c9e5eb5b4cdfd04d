//! The idle daemon: memory and processor time with its polls on and a hundred jobs planned, the
//! statements that a server sees of it, and how soon it serves.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::support::daemon::{Settings, TestDaemon};
use crate::support::database::{Cluster, Database};
use crate::{ENGINES, Row, configured, quick_or};

const EVENTS: u32 = 200_000;
const SETTLE: Duration = Duration::from_secs(5);
const WATCHED: Duration = Duration::from_mins(1);
const WATCHED_QUICKLY: Duration = Duration::from_secs(10);
/// Beside the delivery poll, which makes them a hundred.
const DAILY_JOBS: u32 = 99;

pub(crate) async fn run() {
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        super::pages::fill(&db, EVENTS).await;
        let began = Instant::now();
        let daemon = configured(&db, &hundred_jobs()).await;
        let started = began.elapsed().as_secs_f64() * 1000.0;
        let share = idle_share(&daemon).await;
        let memory = resident_mib(daemon.pid());
        Row::new(
            format!("{name}: memory, idle, 100 jobs"),
            format!("{memory:.1} MiB"),
        )
        .at_most(memory, 40.0)
        .print();
        Row::new(
            format!("{name}: processor, idle, 100 jobs"),
            format!("{share:.2} %"),
        )
        .beside("of one core, the polls on")
        .at_most(share, 0.2)
        .print();
        Row::new(
            format!("{name}: from exec to serving"),
            format!("{started:.0} ms"),
        )
        .beside(format!("with {EVENTS} events"))
        .print();
        drop(daemon);
        db.drop().await;
    }
    statements().await;
}

/// The delivery poll, and jobs whose times are at night.
fn hundred_jobs() -> String {
    let mut config =
        "[[jobs]]\nname = \"realtime-delivery\"\nkind = \"realtime_delivery\"\nevery = \"1s\"\n"
            .to_owned();
    for number in 0..DAILY_JOBS {
        let (hour, minute) = (number % 24, number % 60);
        config.push_str(&format!(
            "[[jobs]]\nname = \"daily-{number}\"\nkind = \"purge_expired\"\ncron = \"30 {minute} {hour} * * *\"\n\
             timezone = \"Europe/Lisbon\"\ndry_run = true\nexpect_within = \"26h\"\n"
        ));
    }
    config
}

/// How much of a core a daemon takes that has nothing to do, in percent.
async fn idle_share(daemon: &TestDaemon) -> f64 {
    tokio::time::sleep(SETTLE).await;
    let (before, began) = (processor_seconds(daemon.pid()), Instant::now());
    tokio::time::sleep(quick_or(WATCHED_QUICKLY, WATCHED)).await;
    let took = processor_seconds(daemon.pid()) - before;
    took / began.elapsed().as_secs_f64() * 100.0
}

/// The statements of an idle daemon, counted by a server of its own.
async fn statements() {
    let mut cluster = Cluster::launch();
    query(
        &cluster,
        "alter system set shared_preload_libraries = 'pg_stat_statements'",
    )
    .await;
    cluster.stop();
    cluster.start();
    query(&cluster, "create extension pg_stat_statements").await;
    let daemon = Settings::new()
        .config(&hundred_jobs())
        .env("TIMELINED__DATABASE__URL", cluster.url())
        .start();
    tokio::time::sleep(SETTLE).await;
    query(&cluster, "select pg_stat_statements_reset()").await;
    let began = Instant::now();
    tokio::time::sleep(quick_or(WATCHED_QUICKLY, WATCHED)).await;
    let seen = query(
        &cluster,
        "select calls || ' × ' || regexp_replace(left(query, 20), '\\s+', ' ', 'g') from pg_stat_statements
         where query not like '%pg_stat_statements%' order by calls desc",
    )
    .await;
    let calls = seen.iter().map(|line| {
        let (calls, _) = line.split_once(' ').unwrap();
        calls.parse::<f64>().unwrap()
    });
    let rate = calls.sum::<f64>() / began.elapsed().as_secs_f64();
    Row::new(
        "PostgreSQL: statements/s, idle, 100 jobs",
        format!("{rate:.2}"),
    )
    .beside(format!("the most frequent {}", seen[0]))
    .at_most(rate, 3.0)
    .print();
    drop(daemon);
}

/// The first column of what a statement answers.
async fn query(cluster: &Cluster, sql: &str) -> Vec<String> {
    let mut connection = PgConnection::connect(cluster.url()).await.unwrap();
    let sql = AssertSqlSafe(sql.to_owned());
    let rows = sqlx::raw_sql(sql).fetch_all(&mut connection).await;
    connection.close().await.unwrap();
    let text = |row: &sqlx::postgres::PgRow| sqlx::Row::try_get(row, 0).unwrap_or_default();
    rows.unwrap().iter().map(text).collect()
}

/// User and system time of a process and of its threads that have ended; fields 14 and 15 of
/// proc(5)'s stat, counted behind the name, in hundredths of a second on every Linux that Debian builds.
fn processor_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks = |field: usize| fields[field].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

pub(crate) fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: f64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib / 1024.0
}
