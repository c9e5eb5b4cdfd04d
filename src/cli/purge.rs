//! `timelined purge`: what the purge job deletes, now; or with `--dry-run` what it would.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Done, Failure, Global, clock, load, open, print, say};
use crate::config::{Config, JobKind};
use crate::daemon;
use crate::domain::{Cause, Retention, RunId, Subject, format_time};
use crate::jobs::{Due, DuePart, Ending, Job as _, Report, RunContext};
use crate::storage::{Run, RunState, Success, Trigger};
use crate::telemetry::chain;

/// The period where the configuration has no purge.
const DEFAULT_PERIOD: Duration = Duration::from_hours(7 * 24);

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Say what would go, and delete nothing.
    #[arg(long)]
    dry_run: bool,
    /// Delete it even if it is far more than usual.
    #[arg(long, conflicts_with = "dry_run")]
    confirm: bool,
    /// The purge, where the configuration has several; without it, the first.
    #[arg(long, value_name = "NAME")]
    job: Option<String>,
}

/// The name, the period and the rate of the configured purge.
fn configured(config: &Config, name: Option<&str>) -> Result<(String, Duration, u32), Failure> {
    let purges: Vec<(&str, Duration, u32)> = (config.jobs.iter())
        .filter_map(|job| match job.kind {
            JobKind::PurgeExpired {
                older_than,
                max_rate,
                ..
            } => Some((&*job.name, older_than, max_rate)),
            _ => None,
        })
        .collect();
    let found = match name {
        Some(name) => purges.iter().find(|(job, ..)| *job == name),
        None => purges.first(),
    };
    match (found, name) {
        (Some((job, older_than, max_rate)), _) => Ok(((*job).to_owned(), *older_than, *max_rate)),
        (None, None) => Ok(("purge-expired".to_owned(), DEFAULT_PERIOD, 0)),
        (None, Some(name)) => {
            let names: Vec<&str> = purges.iter().map(|(job, ..)| *job).collect();
            Err(Failure::NotFound(format!(
                "there is no purge \"{name}\"; there are: {}",
                names.join(", ")
            )))
        }
    }
}

pub(super) async fn run(global: &Global, options: &Options) -> Done {
    let config = load(global)?.config;
    let (job, older_than, max_rate) = configured(&config, options.job.as_deref())?;
    let retention = daemon::retention(older_than, &config.retention);
    let storage = open(&config).await?;
    let clock = clock();
    let now = clock.now();
    let mut purge = daemon::purge(&storage, &clock, &job, retention, options.dry_run);
    purge.max_rate = max_rate;
    if options.confirm {
        purge.confirmed_by = Some(Subject::new("command line").expect("a short text"));
    }
    let done = if options.dry_run {
        let due = purge.due().await?;
        print(global, &as_json(&due), || as_text(&due))
    } else {
        let id = RunId::generate(now);
        let context = RunContext {
            run: id,
            fence: None,
            scheduled_at: now,
            stop: stop_by_signal()?,
            report: Report::default(),
        };
        let ended = purge.run(&context).await;
        let counts = context.report.take();
        let deleted = counts.get("deleted").copied().unwrap_or(0);
        let (state, error) = match &ended {
            Ok(Ending::Finished) => (RunState::Succeeded, None),
            Ok(Ending::Unfinished) => {
                let error = "stopped by a signal before its end".to_owned();
                (RunState::Cancelled, Some(error))
            }
            Err(error) => (RunState::Failed, Some(error.to_string())),
        };
        let run = Run {
            id,
            job,
            scheduled_at: now,
            started_at: Some(now),
            finished_at: Some(clock.now()),
            trigger: Trigger::Manual,
            attempt: 1,
            daemon: None,
            fence: 0,
            state,
            counts,
            error,
        };
        let recorded = storage.ledger.record(&run).await;
        match run.error {
            None => {
                recorded?;
                // Who was told that it waits is to hear that it waits no more.
                let success = Success {
                    job: run.job,
                    at: clock.now(),
                    ends_failures: true,
                };
                storage.alerts.note_successes(&[success]).await?;
                print(global, &json!({ "deleted": deleted, "run_id": id }), || {
                    format!("deleted {deleted} events")
                })
            }
            Some(error) => {
                // The purge's own error matters more.
                if let Err(error) = recorded {
                    say(&format!("the run could not be recorded: {}", chain(&error)));
                }
                Err(Failure::Other(anyhow::anyhow!(
                    "the purge {}: {error} (deleted {deleted} events)",
                    run.state
                )))
            }
        }
    };
    storage.close().await;
    done
}

/// Cancelled by the first signal that asks to end: the purge stops between two batches. A second one
/// ends the program at once, as it does without this.
fn stop_by_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot take signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot take signals")?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    TaskTracker::new().spawn(async move {
        for is_first in [true, false] {
            let code = tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
            };
            if !is_first {
                std::process::exit(code);
            }
            say("stopping after this batch");
            stopping.cancel();
        }
    });
    Ok(stop)
}

fn as_json(due: &Due) -> Value {
    let total: u64 = due.parts.iter().map(|part| part.count.due).sum();
    let held: u64 = due.parts.iter().map(|part| part.count.held).sum();
    let by_tenant = due.parts.chunk_by(|a, b| a.sweep.tenant == b.sweep.tenant);
    let tenants: Vec<Value> = by_tenant
        .map(|parts| {
            let events: u64 = parts.iter().map(|part| part.count.due).sum();
            json!({ "tenant": parts[0].sweep.tenant, "events": events })
        })
        .collect();
    let rules: Vec<Value> = (due.parts.iter())
        .map(|DuePart { sweep, count }| {
            json!({
                "tenant": sweep.tenant,
                "rule": sweep.rule,
                "cause": sweep.cause,
                "before": format_time(sweep.before),
                "reason": sweep.reason(),
                "events": count.due,
                "held": count.held,
            })
        })
        .collect();
    json!({
        "would_delete": total,
        "held": held,
        "cutoff": format_time(due.cutoff),
        "tenants": tenants,
        "rules": rules,
    })
}

fn as_text(due: &Due) -> String {
    let total: u64 = due.parts.iter().map(|part| part.count.due).sum();
    let held: u64 = due.parts.iter().map(|part| part.count.held).sum();
    let is_plain = held == 0
        && (due.parts.iter())
            .all(|part| part.sweep.rule == Retention::OWN && part.sweep.cause == Cause::Expired);
    let mut lines: Vec<String> = (due.parts.iter())
        .map(|DuePart { sweep, count }| {
            let (tenant, events) = (&sweep.tenant, count.due);
            if is_plain {
                return format!("{tenant}: {events} events");
            }
            let kept = match count.held {
                0 => String::new(),
                held => format!("; holds keep {held} more"),
            };
            let (rule, reason) = (&sweep.rule, sweep.reason());
            format!("{tenant}: {events} events by {rule}: {reason}{kept}")
        })
        .collect();
    lines.push(if is_plain {
        let cutoff = format_time(due.cutoff);
        format!("would delete {total} events that expired before {cutoff}")
    } else {
        format!("would delete {total} events; holds keep {held}")
    });
    lines.join("\n")
}
