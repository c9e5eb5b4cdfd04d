//! Thousands of jobs that are due in one second: each runs once, and a job of each second goes on.

use std::time::{Duration, Instant};

use chrono::{TimeDelta, Timelike as _};
use timelined::domain::{Clock as _, SystemClock};

use crate::lateness::{TICK, began_ms, claimed_ms};
use crate::support::database::Database;
use crate::{ENGINES, Row, configured, quick_or};

const JOBS: u32 = 3000;
const JOBS_QUICKLY: u32 = 300;
/// Until the daemon has started and come to rest.
const LEAD: TimeDelta = TimeDelta::seconds(15);
const PATIENCE: Duration = Duration::from_mins(3);

pub(crate) async fn run() {
    let jobs = quick_or(JOBS_QUICKLY, JOBS);
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        let due = SystemClock.now().with_nanosecond(0).unwrap() + LEAD;
        let cron = due.format("%-S %-M %-H * * *");
        let mut config = String::new();
        for number in 0..jobs {
            config.push_str(&format!(
                "[[jobs]]\nname = \"many-{number}\"\nkind = \"purge_expired\"\ncron = \"{cron}\"\ndry_run = true\n"
            ));
        }
        // Last in the plan, where it has all the others before it.
        config.push_str(TICK);
        let daemon = configured(&db, &config).await;
        assert!(SystemClock.now() < due, "the daemon took too long to start");
        let done = format!(
            "job_runs where job like 'many-%' and state = 'succeeded' and scheduled_at = {}",
            db.at(due)
        );
        let began = Instant::now();
        while db.count(&done).await < i64::from(jobs) {
            assert!(
                began.elapsed() < PATIENCE,
                "{} of {jobs} are done",
                db.count(&done).await
            );
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        // The tick that came last ends, too.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let rows = db.count("job_runs where job like 'many-%'").await;
        Row::new(
            format!("{name}: {jobs} jobs due in one second"),
            format!("{rows} runs"),
        )
        .is(if rows == i64::from(jobs) {
            "ok"
        } else {
            "MISSED"
        })
        .print();
        let at = due.timestamp_micros();
        let micros = |column| db.micros(column);
        let last = |column| {
            format!(
                "select max({}) - {at} from job_runs where job like 'many-%'",
                micros(column)
            )
        };
        let begun = db.int(&last("started_at")).await as f64 / 1e6;
        let ended = db.int(&last("finished_at")).await;
        Row::new(
            format!("{name}: until the last is done"),
            format!("{:.2} s", ended as f64 / 1e6),
        )
        .beside(format!("the last is claimed after {begun:.2} s"))
        .print();
        let until = at + ended + 1_000_000;
        let from = at - 2_000_000;
        let claimed = claimed_ms(&db, "tick", from, until).await;
        let began = began_ms(&daemon, "tick", from, until);
        let worst = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
        let times = (until - from) / 1_000_000;
        Row::new(
            format!("{name}: the 1 s job meanwhile, latest"),
            format!("{:.0} ms", worst(&began)),
        )
        .beside(format!(
            "claimed {:.0} ms; {} of {times} times",
            worst(&claimed),
            began.len()
        ))
        .at_most(worst(&claimed).max(worst(&began)), 100.0)
        .print();
        drop(daemon);
        db.drop().await;
    }
}
