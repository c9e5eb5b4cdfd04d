//! Three daemons on one PostgreSQL, with clocks that differ, killed and frozen while they work: each
//! scheduled time runs once, or has a reason.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::Row as _;
use sqlx::postgres::PgPool;

use crate::support::daemon::{Settings, TestDaemon, eventually};
use crate::support::database::{Database, Engine, run};

const PATIENCE: Duration = Duration::from_mins(1);
/// What a contact's export takes: a job's 50 ms, and one that takes longer than its interval.
const SHORT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";
const LONG: &str = "0190b5f0-7c1e-7d3a-8f00-000000000002";

/// Debian's libfaketime.
fn faketime() -> String {
    let arch = std::env::consts::ARCH;
    format!("/usr/lib/{arch}-linux-gnu/faketime/libfaketime.so.1")
}

/// Kills and freezes, in the short or the long form.
fn blows() -> (usize, usize) {
    if std::env::var_os("SOAK").is_some() {
        (100, 20)
    } else {
        (6, 1)
    }
}

fn job(name: &str, contact: &str) -> String {
    format!(
        "[[jobs]]\nname = \"{name}\"\nkind = \"timeline_export\"\nevery = \"1s\"\ntenant = \"acme\"\ncontacts = [\"{contact}\"]\naudience = \"agent\"\nto = [\"ops@example.com\"]\nwhen_empty = \"note\"\n\n"
    )
}

async fn daemon(db: &Database, skew: &str) -> TestDaemon {
    let settings = Settings::new()
        .config(&format!("{}{}", job("short", SHORT), job("long", LONG)))
        .env("TIMELINED__DATABASE__URL", &db.url().await);
    let settings = if skew == "0" {
        settings
    } else {
        settings
            .env("LD_PRELOAD", &faketime())
            .env("FAKETIME", skew)
            // Wall clocks differ; time passes alike everywhere.
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
    };
    settings.start()
}

/// Watches that no run stays with a daemon for a second after its lease.
async fn watch(pool: PgPool, until: tokio_util::sync::CancellationToken) -> TimeDelta {
    let mut longest = TimeDelta::zero();
    while !until.is_cancelled() {
        let row = sqlx::query(
            "select coalesce(extract(epoch from max(clock_timestamp() - leased_until)), 0)::float8 as late
             from job_runs where state = 'running'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        let late = TimeDelta::microseconds((row.get::<f64, _>("late") * 1e6) as i64);
        longest = longest.max(late);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    longest
}

struct Time {
    at: DateTime<Utc>,
    run: String,
    state: String,
    error: Option<String>,
}

/// The scheduled times of a job that are older than a few seconds, oldest first.
async fn times(pool: &PgPool, job: &str, until: DateTime<Utc>) -> Vec<Time> {
    let rows = sqlx::query(
        "select scheduled_at, id::text as id, state, error from job_runs
         where job = $1 and trigger <> 'manual' and not is_per_daemon and scheduled_at <= $2
         order by scheduled_at",
    )
    .bind(job)
    .bind(until)
    .fetch_all(pool)
    .await
    .unwrap();
    rows.iter()
        .map(|row| Time {
            at: row.get("scheduled_at"),
            run: row.get("id"),
            state: row.get("state"),
            error: row.get("error"),
        })
        .collect()
}

/// How many exports each run has made.
async fn effects(pool: &PgPool, contact: &str) -> BTreeMap<String, i64> {
    let rows = sqlx::query(
        "select split_part(request_key, '/', 1) as run, count(*) as made from exports
         where contact_id = $1::text::uuid group by 1",
    )
    .bind(contact)
    .fetch_all(pool)
    .await
    .unwrap();
    rows.iter()
        .map(|row| (row.get("run"), row.get("made")))
        .collect()
}

/// No time is missing, none ran twice, and what is in the database is what succeeded.
async fn each_ran_once_or_says_why(pool: &PgPool, name: &str, contact: &str, last: DateTime<Utc>) {
    let times = times(pool, name, last).await;
    for pair in times.windows(2) {
        let step = pair[1].at - pair[0].at;
        assert_eq!(step, TimeDelta::seconds(1), "{name} after {}", pair[0].at);
    }
    let effects = effects(pool, contact).await;
    let mut successes = 0;
    for time in &times {
        let made = effects.get(&time.run).copied().unwrap_or(0);
        if time.state == "succeeded" {
            successes += 1;
            assert_eq!(made, 1, "{name} at {}", time.at);
        } else {
            let what = format!("{name} at {}: {:?}", time.at, time.error);
            assert_eq!((time.state.as_str(), made), ("skipped", 0), "{what}");
            assert!(time.error.is_some(), "{what}");
        }
    }
    let count = times.len();
    eprintln!("{name}: {successes} of {count} times ran, the others say why they did not");
    assert!(successes * 8 >= count, "{name}: {successes} of {count}");
}

#[test]
fn each_time_runs_once_or_has_a_reason_whatever_dies() {
    run(Engine::Postgres, async |db: &Database| {
        let mut daemons = vec![daemon(db, "0").await];
        // The work of a run takes its time within the transaction that its fence guards.
        for sql in [
            format!(
                "create function take_time() returns trigger language plpgsql as $$
                 begin
                     perform pg_sleep(case new.contact_id when '{LONG}' then 1.5 else 0.05 end);
                     return new;
                 end $$"
            ),
            "create trigger take_time before insert on exports for each row execute function take_time()".to_owned(),
        ] {
            db.execute(&sql).await.unwrap();
        }
        for skew in ["+10s", "-10s"] {
            daemons.push(daemon(db, skew).await);
        }
        let pool = PgPool::connect(&db.url().await).await.unwrap();
        let done = tokio_util::sync::CancellationToken::new();
        let watching = tokio::spawn(watch(pool.clone(), done.clone()));

        let (kills, freezes) = blows();
        for blow in 0..kills {
            let began = Instant::now();
            let victim = blow % 3;
            if blow < freezes {
                // The lease ends, another takes over, and the frozen one wakes up late.
                daemons[victim].signal("STOP");
                tokio::time::sleep(Duration::from_millis(6500)).await;
                daemons[victim].signal("CONT");
            }
            let wait = Duration::from_millis(1200 + 137 * (blow as u64 % 7));
            tokio::time::sleep(wait.saturating_sub(began.elapsed())).await;
            daemons[victim].kill();
            daemons[victim].again();
        }

        // From here on all is calm.
        let last = sqlx::query("select clock_timestamp() as now")
            .fetch_one(&pool)
            .await
            .unwrap();
        let last: DateTime<Utc> = last.get("now");
        eventually("what is left is taken over, and nothing is stuck", PATIENCE, async || {
            let open = sqlx::query("select count(*) as open from job_runs where state in ('queued', 'running') and scheduled_at <= $1")
                .bind(last)
                .fetch_one(&pool)
                .await
                .unwrap();
            let settled = sqlx::query("select count(distinct job) as settled from job_runs where trigger <> 'manual' and not is_per_daemon and scheduled_at > $1")
                .bind(last)
                .fetch_one(&pool)
                .await
                .unwrap();
            open.get::<i64, _>("open") == 0 && settled.get::<i64, _>("settled") == 2
        })
        .await;
        done.cancel();
        let late = watching.await.unwrap();
        assert!(
            late < TimeDelta::seconds(1),
            "taken over {late} after its lease"
        );

        for (name, contact) in [("short", SHORT), ("long", LONG)] {
            each_ran_once_or_says_why(&pool, name, contact, last).await;
        }
        eprintln!(
            "the longest take-over began {} ms after its lease",
            late.num_milliseconds()
        );
        pool.close().await;
        for daemon in &mut daemons {
            assert_eq!(daemon.stop().code(), Some(0), "{}", daemon.log());
        }
    });
}
