//! The figures of the README: each beside its reference, measured in the same run, since machines
//! differ and are noisy. `make bench` runs all, `make bench ONLY=purge` one section; with `QUICK=1` on
//! small tables and for a short time, to see that it works.
//!
//! The daemon is the release binary on real databases that wait for the disk; the load comes from
//! this process, which shares the machine with it.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    reason = "a bench that panics has failed; it prints, its tasks end with it, its numbers are small"
)]

#[path = "../../tests/support/mod.rs"]
mod support;

mod creates;
mod delivery;
mod export;
mod idle;
mod lateness;
mod load;
mod many;
mod pages;
mod purge;

use support::daemon::{Settings, TestDaemon};
use support::database::{Database, Engine};

/// Both engines, with the names that rows bear.
const ENGINES: [(Engine, &str); 2] = [(Engine::Sqlite, "SQLite"), (Engine::Postgres, "PostgreSQL")];

/// A line of the table: a figure, what it is compared with, and what is demanded.
struct Row {
    what: String,
    ours: String,
    reference: String,
    /// What the ratio means, and whether it is good enough.
    verdict: String,
}

impl Row {
    fn new(what: impl Into<String>, ours: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            ours: ours.into(),
            reference: String::new(),
            verdict: String::new(),
        }
    }

    fn beside(mut self, reference: impl Into<String>) -> Self {
        self.reference = reference.into();
        self
    }

    fn is(mut self, verdict: impl Into<String>) -> Self {
        self.verdict = verdict.into();
        self
    }

    /// `value` must be at least `least`.
    fn at_least(self, value: f64, least: f64) -> Self {
        let word = if value >= least { "ok" } else { "MISSED" };
        self.is(format!("{value:.2} (at least {least}: {word})"))
    }

    /// `value` must be at most `most`.
    fn at_most(self, value: f64, most: f64) -> Self {
        let word = if value <= most { "ok" } else { "MISSED" };
        self.is(format!("{value:.2} (at most {most}: {word})"))
    }

    fn print(&self) {
        println!(
            "{:<46} {:>16}  {:<44} {}",
            self.what, self.ours, self.reference, self.verdict
        );
    }
}

/// The middle of some measurements.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value below which `share` of the measurements lie.
fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of the slice"
    )]
    let index = ((values.len() - 1) as f64 * share) as usize;
    values[index]
}

/// A daemon on `db` with further settings.
async fn daemon(db: &Database, settings: &[(&str, &str)]) -> TestDaemon {
    let mut daemon = Settings::new().env("TIMELINED__DATABASE__URL", &db.url().await);
    for (name, value) in settings {
        daemon = daemon.env(name, value);
    }
    daemon.start()
}

/// The daemon with a configuration file on `db`.
async fn configured(db: &Database, config: &str) -> TestDaemon {
    Settings::new()
        .config(config)
        .env("TIMELINED__DATABASE__URL", &db.url().await)
        .start()
}

/// `quick` for a try (`QUICK=1`), else what the figure is defined with.
fn quick_or<T>(quick: T, whole: T) -> T {
    if std::env::var_os("QUICK").is_some_and(|value| value == "1") {
        quick
    } else {
        whole
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|word| word == name);
    let probe = Database::fresh(Engine::Postgres).await;
    let fsync = probe.texts("select current_setting('fsync')").await;
    assert_eq!(
        fsync[0].as_deref(),
        Some("on"),
        "PostgreSQL must wait for the disk here: set PG_FSYNC=on, as `make bench` does"
    );
    probe.drop().await;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("{cores} cores; load and daemon share them\n");
    Row {
        what: "figure".into(),
        ours: "timelined".into(),
        reference: "reference".into(),
        verdict: "ratio or limit".into(),
    }
    .print();
    if is_wanted("creates") {
        creates::run().await;
    }
    if is_wanted("delivery") {
        delivery::run().await;
    }
    if is_wanted("pages") {
        pages::run().await;
    }
    if is_wanted("purge") {
        purge::run().await;
    }
    if is_wanted("export") {
        export::run().await;
    }
    if is_wanted("lateness") {
        lateness::run().await;
    }
    if is_wanted("many") {
        many::run().await;
    }
    if is_wanted("idle") {
        idle::run().await;
    }
}
