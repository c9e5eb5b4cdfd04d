//! `timelined purge`: what the purge job deletes, now; or with `--dry-run` what it would.

use std::time::Duration;

use chrono::TimeDelta;
use clap::Args;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{Done, Failure, Global, clock, load, open, print};
use crate::config::{Config, JobKind};
use crate::daemon;
use crate::domain::{Retention, RunId, format_time};
use crate::jobs::{Job as _, RunContext, due};
use crate::storage::{Run, RunState, Trigger};

/// The period where the configuration has no purge.
const DEFAULT_PERIOD: Duration = Duration::from_hours(7 * 24);

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Say what would go, and delete nothing.
    #[arg(long)]
    dry_run: bool,
}

/// The name and the period of the configured purge.
fn configured(config: &Config) -> (String, Duration) {
    config
        .jobs
        .iter()
        .find_map(|job| match job.kind {
            JobKind::PurgeExpired { older_than, .. } => Some((job.name.clone(), older_than)),
            _ => None,
        })
        .unwrap_or_else(|| ("purge-expired".to_owned(), DEFAULT_PERIOD))
}

pub(super) async fn run(global: &Global, options: &Options) -> Done {
    let config = load(global)?.config;
    let (job, older_than) = configured(&config);
    let storage = open(&config).await?;
    let clock = clock();
    let now = clock.now();
    let done = if options.dry_run {
        let period = TimeDelta::from_std(older_than).unwrap_or(TimeDelta::MAX);
        let cutoff = Retention::new(period).cutoff(now);
        let due = due(&*storage.events, cutoff).await?;
        let total: u64 = due.iter().map(|(_, count)| count).sum();
        let tenants: Vec<_> = due
            .iter()
            .map(|(tenant, count)| json!({ "tenant": tenant, "events": count }))
            .collect();
        let body =
            json!({ "would_delete": total, "cutoff": format_time(cutoff), "tenants": tenants });
        print(global, &body, || {
            let mut lines: Vec<String> = due
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(|(tenant, count)| format!("{tenant}: {count} events"))
                .collect();
            let cutoff = format_time(cutoff);
            lines.push(format!(
                "would delete {total} events that expired before {cutoff}"
            ));
            lines.join("\n")
        })
    } else {
        let id = RunId::generate(now);
        let stop = CancellationToken::new();
        let context = RunContext {
            run: id,
            scheduled_at: now,
            stop,
        };
        let purge = daemon::purge(&storage, &clock, older_than, false);
        let report = purge.run(&context).await;
        let (state, error) = match &report {
            Ok(_) => (RunState::Succeeded, None),
            Err(error) => (RunState::Failed, Some(error.to_string())),
        };
        let counts = report
            .as_ref()
            .map(|report| report.counts.clone())
            .unwrap_or_default();
        let run = Run {
            id,
            job,
            scheduled_at: now,
            started_at: Some(now),
            finished_at: Some(clock.now()),
            trigger: Trigger::Manual,
            attempt: 1,
            daemon: None,
            state,
            counts: counts.clone(),
            error,
        };
        storage.ledger.record(&run).await?;
        report.map_err(|error| Failure::Other(anyhow::anyhow!("the purge failed: {error}")))?;
        let deleted = counts.get("deleted").copied().unwrap_or(0);
        print(global, &json!({ "deleted": deleted, "run_id": id }), || {
            format!("deleted {deleted} events")
        })
    };
    storage.close().await;
    done
}
