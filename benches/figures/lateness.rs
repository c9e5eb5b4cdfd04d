//! How late a job of each second begins, beside `tokio-cron-scheduler` firing alone in the same seconds.
//!
//! What counts is the instant at which the time was claimed, as its row says it, and the instant at
//! which its work began behind the claim, as its line in the log says it, in whole milliseconds.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use timelined::domain::{Clock as _, SystemClock};
use tokio_cron_scheduler::{Job, JobScheduler};

use crate::support::daemon::TestDaemon;
use crate::support::database::Database;
use crate::{ENGINES, Row, configured, quantile, quick_or};

const WATCHED_S: u64 = 120;
const WATCHED_QUICKLY_S: u64 = 12;
/// The first and the last so many seconds are compared.
const EDGE: usize = 20;
const SETTLE: Duration = Duration::from_secs(2);

/// A job of each second that looks at an empty table.
pub(crate) const TICK: &str = r#"
[[jobs]]
name = "tick"
kind = "purge_expired"
every = "1s"
dry_run = true
"#;

pub(crate) async fn run() {
    let watched = Duration::from_secs(quick_or(WATCHED_QUICKLY_S, WATCHED_S));
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        let daemon = configured(&db, TICK).await;
        tokio::time::sleep(SETTLE).await;
        let from = SystemClock.now().timestamp_micros();
        let alone = scheduler_alone(watched).await;
        let until = SystemClock.now().timestamp_micros();
        let claimed = claimed_ms(&db, "tick", from, until).await;
        let began = began_ms(&daemon, "tick", from, until);
        print(&format!("{name}: a 1 s job, claimed"), &claimed, true);
        print(&format!("{name}: a 1 s job, at work"), &began, true);
        print(
            "tokio-cron-scheduler alone, the same seconds",
            &alone,
            false,
        );
        let earliest = claimed.iter().copied().fold(f64::INFINITY, f64::min);
        Row::new(
            format!("{name}: earliest of {} claims", claimed.len()),
            format!("{earliest:.2} ms"),
        )
        .at_least(earliest, 0.0)
        .print();
        let seconds = (until - from) / 1_000_000;
        Row::new(
            format!("{name}: times without a run"),
            (seconds - i64::try_from(claimed.len()).unwrap())
                .max(0)
                .to_string(),
        )
        .at_most(seconds as f64 - claimed.len() as f64, 0.0)
        .print();
        let edge = EDGE.min(claimed.len() / 2);
        let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
        let drift = mean(&claimed[claimed.len() - edge..]) - mean(&claimed[..edge]);
        Row::new(
            format!("{name}: the last {edge} s later than the first"),
            format!("{drift:.2} ms"),
        )
        .at_most(drift.abs(), 2.0)
        .print();
        drop(daemon);
        db.drop().await;
    }
}

fn print(what: &str, times: &[f64], has_goal: bool) {
    let mut times = times.to_vec();
    let (middle, high, most) = (
        quantile(&mut times, 0.5),
        quantile(&mut times, 0.99),
        quantile(&mut times, 1.0),
    );
    let row = Row::new(what, format!("{high:.1} ms p99"))
        .beside(format!("p50 {middle:.1} ms, max {most:.1} ms"));
    let row = if has_goal {
        row.at_most(high, 10.0)
    } else {
        row
    };
    row.print();
}

/// How late each time of `job` in these microseconds was claimed, in the order of the times.
pub(crate) async fn claimed_ms(db: &Database, job: &str, from: i64, until: i64) -> Vec<f64> {
    let (scheduled, started) = (db.micros("scheduled_at"), db.micros("started_at"));
    let late = db
        .ints(&format!(
            "select {started} - {scheduled} from job_runs
             where job = '{job}' and state = 'succeeded' and {scheduled} between {from} and {until}
             order by scheduled_at"
        ))
        .await;
    late.into_iter().map(|us| us as f64 / 1000.0).collect()
}

/// How late the work for each of these times began: behind its claim, which waits for the disk.
pub(crate) fn began_ms(daemon: &TestDaemon, job: &str, from: i64, until: i64) -> Vec<f64> {
    let log = daemon.log();
    let runs = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["job.name"] == job && line["run.outcome"] == "succeeded")
        .filter(|line| {
            let at = line["run.scheduled_at"].as_str().unwrap();
            let at: chrono::DateTime<chrono::Utc> = at.parse().unwrap();
            (from..=until).contains(&at.timestamp_micros())
        });
    runs.map(|line| line["run.lag_ms"].as_f64().unwrap())
        .collect()
}

/// The same schedule in this process, and nothing else in it: how late each firing was.
async fn scheduler_alone(watched: Duration) -> Vec<f64> {
    let fired = Arc::new(Mutex::new(Vec::new()));
    let mut scheduler = JobScheduler::new().await.unwrap();
    let seen = fired.clone();
    let job = Job::new_async("* * * * * *", move |_, _| {
        let seen = seen.clone();
        Box::pin(async move {
            let into_second = SystemClock.now().timestamp_subsec_micros();
            seen.lock().unwrap().push(f64::from(into_second) / 1000.0);
        })
    });
    scheduler.add(job.unwrap()).await.unwrap();
    scheduler.start().await.unwrap();
    tokio::time::sleep(watched).await;
    scheduler.shutdown().await.unwrap();
    let fired = fired.lock().unwrap();
    fired.clone()
}
