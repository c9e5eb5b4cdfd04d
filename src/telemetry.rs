//! Logs and metrics: the subscriber, how an error is written, what `/metrics` counts.

use std::io::IsTerminal as _;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use chrono::{DateTime, Utc};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::{Log, LogFormat};
use crate::storage::{Run, RunState};

/// Starts logging to standard error: text on a terminal, JSON with one event a line elsewhere.
pub fn start_logs(log: &Log) {
    // The scheduler tells at its start what only its authors want to know; what is said in the
    // configuration counts more, since later directives win.
    // At trace the WebSocket's library writes frames as they are: tokens, titles, payloads.
    let directives = format!("tokio_cron_scheduler=warn,tungstenite=info,{}", log.level);
    let filter = EnvFilter::builder().parse_lossy(directives);
    let is_text = match log.format {
        LogFormat::Text => true,
        LogFormat::Json => false,
        LogFormat::Auto => std::io::stderr().is_terminal(),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::NONE)
        // It would say on standard error that a line could not be written there, and panic when that
        // fails, too: a lost log must not end what it tells of.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    let started = if is_text {
        let is_terminal = std::io::stderr().is_terminal();
        let has_colour =
            is_terminal && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
        builder.with_ansi(has_colour).with_target(false).try_init()
    } else {
        builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .try_init()
    };
    // A second start in one process, as in tests, keeps the first.
    drop(started);
}

/// An error with its causes, as one line: `a: b: c`.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their cause in their own text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobOutcome {
    job: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobTrouble {
    job: String,
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobName {
    job: String,
}

/// Buckets from a delivery poll to an export.
fn run_seconds() -> Histogram {
    Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0, 3600.0])
}

/// What `/metrics` shows. Never a tenant or a contact as a label.
pub struct Metrics {
    registry: Registry,
    runs: Family<JobOutcome, Counter>,
    durations: Family<JobName, Histogram>,
    last_success: Family<JobName, Gauge<f64, AtomicU64>>,
    lag: Family<JobName, Gauge<f64, AtomicU64>>,
    failures: Family<JobName, Gauge>,
    troubles: Family<JobTrouble, Gauge>,
    purged: Counter,
    expired: Counter,
    sockets: Gauge,
    unreadable: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("timelined");
        let runs = Family::default();
        registry.register("job_runs", "Runs of jobs that ended", runs.clone());
        let durations = Family::new_with_constructor(run_seconds as fn() -> Histogram);
        registry.register(
            "job_run_duration_seconds",
            "How long runs took",
            durations.clone(),
        );
        let last_success = Family::default();
        registry.register(
            "job_last_success_timestamp_seconds",
            "When a job last succeeded",
            last_success.clone(),
        );
        let lag = Family::default();
        registry.register(
            "job_schedule_lag_seconds",
            "How late the last run of a job began",
            lag.clone(),
        );
        let failures = Family::default();
        registry.register(
            "job_failures_in_a_row",
            "Failures of a job since it last succeeded",
            failures.clone(),
        );
        let troubles = Family::default();
        registry.register(
            "job_alert_active",
            "1 while a job fails too often (failure) or has not succeeded for too long (silence)",
            troubles.clone(),
        );
        let purged = Counter::default();
        registry.register(
            "purge_deleted_events",
            "Events that the purge deleted",
            purged.clone(),
        );
        let expired = Counter::default();
        registry.register(
            "delivery_expired_events",
            "Events that expired before anybody acknowledged them",
            expired.clone(),
        );
        let sockets = Gauge::default();
        registry.register(
            "ws_connections",
            "Open WebSocket connections",
            sockets.clone(),
        );
        let unreadable = Gauge::default();
        registry.register(
            "unreadable_events",
            "Stored events that cannot be read",
            unreadable.clone(),
        );
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The running binary", build);
        Self {
            registry,
            runs,
            durations,
            last_success,
            lag,
            failures,
            troubles,
            purged,
            expired,
            sockets,
            unreadable,
        }
    }
}

impl Metrics {
    /// Counts a run that ended.
    pub fn run_ended(&self, run: &Run, lag_ms: i64, took: Duration) {
        let job = JobName {
            job: run.job.clone(),
        };
        let outcome = JobOutcome {
            job: run.job.clone(),
            outcome: run.state.as_str(),
        };
        self.runs.get_or_create(&outcome).inc();
        self.durations
            .get_or_create(&job)
            .observe(took.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a gauge of milliseconds")]
        self.lag.get_or_create(&job).set(lag_ms as f64 / 1000.0);
        if run.state == RunState::Succeeded
            && let Some(at) = run.finished_at
        {
            self.job_succeeded(&job.job, at);
        }
        self.purged
            .inc_by(run.counts.get("deleted").copied().unwrap_or(0));
        self.expired
            .inc_by(run.counts.get("expired").copied().unwrap_or(0));
    }

    /// Notes when a job succeeded, on this daemon or on another; what is older than the last is no news.
    pub fn job_succeeded(&self, job: &str, at: DateTime<Utc>) {
        #[expect(clippy::cast_precision_loss, reason = "a gauge of milliseconds")]
        let seconds = at.timestamp_millis() as f64 / 1000.0;
        let job = JobName {
            job: job.to_owned(),
        };
        let gauge = self.last_success.get_or_create(&job);
        if seconds > gauge.get() {
            gauge.set(seconds);
        }
    }

    /// Notes how often a job has failed in a row.
    pub fn job_failures(&self, job: &str, in_a_row: u64) {
        let job = JobName {
            job: job.to_owned(),
        };
        let count = i64::try_from(in_a_row).unwrap_or(i64::MAX);
        self.failures.get_or_create(&job).set(count);
    }

    /// Notes whether something of this kind is wrong with a job.
    pub fn job_alert(&self, job: &str, kind: &'static str, is_active: bool) {
        let trouble = JobTrouble {
            job: job.to_owned(),
            kind,
        };
        let value = i64::from(is_active);
        self.troubles.get_or_create(&trouble).set(value);
    }

    /// The metrics as Prometheus text; `sockets` are the connections that are open now,
    /// `unreadable` the stored events that could not be read.
    #[must_use]
    pub fn encode(&self, sockets: u64, unreadable: u64) -> String {
        self.sockets.set(i64::try_from(sockets).unwrap_or(i64::MAX));
        self.unreadable
            .set(i64::try_from(unreadable).unwrap_or(i64::MAX));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing to a text does not fail");
        text
    }
}
