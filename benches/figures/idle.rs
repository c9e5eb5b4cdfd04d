//! The idle daemon: memory and processor time with its polls on, and how soon it serves.

use std::time::{Duration, Instant};

use crate::support::database::Database;
use crate::{ENGINES, Row, daemon};

const EVENTS: u32 = 200_000;
const SETTLE: Duration = Duration::from_secs(5);
const WATCHED: Duration = Duration::from_secs(20);

pub(crate) async fn run() {
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        super::pages::fill(&db, EVENTS).await;
        let began = Instant::now();
        let daemon = daemon(&db, &[]).await;
        let started = began.elapsed().as_secs_f64() * 1000.0;
        tokio::time::sleep(SETTLE).await;
        let (ticks, began) = (processor_ticks(daemon.pid()), Instant::now());
        tokio::time::sleep(WATCHED).await;
        // 100 ticks a second, on every Linux that Debian builds.
        let share = (processor_ticks(daemon.pid()) - ticks) as f64 / began.elapsed().as_secs_f64();
        let memory = resident_mib(daemon.pid());
        Row::new(format!("{name}: memory, idle"), format!("{memory:.1} MiB"))
            .at_most(memory, 40.0)
            .print();
        Row::new(format!("{name}: processor, idle"), format!("{share:.2} %"))
            .beside("of one core, two jobs and the polls on")
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
}

/// User and system time of a process; fields 14 and 15 of proc(5)'s stat, counted behind the name.
fn processor_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
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
