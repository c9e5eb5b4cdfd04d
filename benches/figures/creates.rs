//! Acknowledged creates per second over HTTP, each durable when it is answered.
//!
//! SQLite's reference is the same load with `synchronous = normal`, which does not wait for the
//! disk; PostgreSQL's is pgbench, which inserts the same row from as many sessions, without HTTP,
//! JSON and the rules of an event.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::load::create;
use crate::support::daemon::{TestDaemon, service};
use crate::support::database::{Database, Engine};
use crate::{Row, daemon, median};

const ROUNDS: usize = 3;
const TIME: Duration = Duration::from_secs(3);
const MANY: usize = 64;

async fn rate(daemon: &TestDaemon, clients: usize) -> f64 {
    create(&daemon.address, &service("acme"), clients, TIME).await
}

pub(crate) async fn run() {
    sqlite().await;
    postgres().await;
}

async fn sqlite() {
    let full_db = Database::fresh(Engine::Sqlite).await;
    let normal_db = Database::fresh(Engine::Sqlite).await;
    let full = daemon(&full_db, &[]).await;
    let normal = daemon(
        &normal_db,
        &[("TIMELINED__DATABASE__SYNCHRONOUS", "normal")],
    )
    .await;
    let (mut one, mut many, mut unsafe_many) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        one.push(rate(&full, 1).await);
        many.push(rate(&full, MANY).await);
        unsafe_many.push(rate(&normal, MANY).await);
    }
    let (one, many, unsafe_many) = (median(one), median(many), median(unsafe_many));
    Row::new("SQLite: creates/s, 1 client", format!("{one:.0}")).print();
    Row::new("SQLite: creates/s, 64 clients", format!("{many:.0}"))
        .beside(format!("1 client: {one:.0}"))
        .at_least(many / one, 8.0)
        .print();
    Row::new("", "")
        .beside(format!("synchronous = normal: {unsafe_many:.0}"))
        .at_least(many / unsafe_many, 0.6)
        .print();
    drop((full, normal));
    full_db.drop().await;
    normal_db.drop().await;
}

async fn postgres() {
    let db = Database::fresh(Engine::Postgres).await;
    let url = db.url().await;
    let daemon = daemon(&db, &[]).await;
    for clients in [1, MANY] {
        let (mut ours, mut reference) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(rate(&daemon, clients).await);
            reference.push(pgbench(&url, clients));
        }
        let (ours, reference) = (median(ours), median(reference));
        Row::new(
            format!("PostgreSQL: creates/s, {clients} client(s)"),
            format!("{ours:.0}"),
        )
        .beside(format!("pgbench, the same row: {reference:.0}"))
        .is(format!("{:.2}", ours / reference))
        .print();
    }
    drop(daemon);
    db.drop().await;
}

/// Transactions per second of the same insert by pgbench.
fn pgbench(url: &str, clients: usize) -> f64 {
    let script = tempfile::NamedTempFile::new().unwrap();
    let sql = r#"\set contact random(1, 1000)
insert into contact_events (tenant_id, contact_id, event_type, category, source, title, description, payload)
values ('acme', ('0190b5f0-0000-7000-8000-' || lpad(:contact::text, 12, '0'))::uuid, 'note_added', 'note', 'agent',
        'Asked for a quote for 25 seats',
        'Prefers to be called in the morning; the legal department has the draft.',
        '{"seats": 25, "plan": "business", "currency": "EUR", "stage": "proposal"}');
"#;
    std::fs::write(script.path(), sql).unwrap();
    let output = Command::new(newest("pgbench"))
        .args(["-n", "-M", "prepared", "-j", "2"])
        .args(["-T", &TIME.as_secs().to_string()])
        .args(["-c", &clients.to_string()])
        .arg("-f")
        .arg(script.path())
        .arg(url)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let tps = text
        .lines()
        .find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    tps.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// A program of the newest PostgreSQL on this machine.
pub(crate) fn newest(program: &str) -> std::path::PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let newest = versions
        .filter_map(|entry| {
            entry
                .ok()?
                .file_name()
                .into_string()
                .ok()?
                .parse::<u32>()
                .ok()
        })
        .max();
    Path::new("/usr/lib/postgresql")
        .join(newest.expect("PostgreSQL is installed").to_string())
        .join("bin")
        .join(program)
}
