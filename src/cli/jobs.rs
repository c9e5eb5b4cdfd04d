//! `timelined jobs`: list, run, runs.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Done, Failure, Global, clock, load, open, print, say};
use crate::api::show_job;
use crate::config::{Config, JobDefinition};
use crate::domain::{RunId, Subject, format_time};
use crate::storage::Run;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// The jobs of the configuration, with their next time and last run.
    List,
    /// Ask for a run now; the daemon takes it within a second.
    Run {
        /// The job.
        name: String,
    },
    /// The runs of a job, newest first.
    Runs {
        /// The job.
        name: String,
        /// How many.
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=200))]
        limit: u32,
    },
}

fn find<'a>(config: &'a Config, name: &str) -> Result<&'a JobDefinition, Failure> {
    let job = config.jobs.iter().find(|job| job.name == name);
    job.ok_or_else(|| {
        let names: Vec<&str> = config.jobs.iter().map(|job| job.name.as_str()).collect();
        Failure::NotFound(format!(
            "there is no job \"{name}\"; there are: {}",
            names.join(", ")
        ))
    })
}

pub(super) async fn run(global: &Global, command: &Command) -> Done {
    let config = load(global)?.config;
    if let Command::Run { name } | Command::Runs { name, .. } = command {
        find(&config, name)?;
    }
    let storage = open(&config).await?;
    let clock = clock();
    let done = match command {
        Command::List => {
            let names: Vec<String> = config.jobs.iter().map(|job| job.name.clone()).collect();
            let last = storage.ledger.last_runs(&names).await?;
            let jobs: Vec<Value> = config
                .jobs
                .iter()
                .map(|job| show_job(job, last.iter().find(|run| run.job == job.name), &*clock))
                .collect();
            print(global, &json!({ "jobs": jobs }), || table(&jobs))
        }
        Command::Run { name } => {
            let now = clock.now();
            let id = RunId::generate(now);
            let by = Subject::new("command line").expect("a short text");
            storage.ledger.enqueue(id, name, &by, now).await?;
            if !global.json {
                say("queued; a running daemon takes it within a second (see: timelined jobs runs)");
            }
            print(global, &json!({ "run_id": id }), || id.to_string())
        }
        Command::Runs { name, limit } => {
            let runs = storage.ledger.runs(name, None, *limit).await?;
            print(global, &json!({ "runs": runs }), || history(&runs))
        }
    };
    storage.close().await;
    done
}

fn table(jobs: &[Value]) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        _ => "-".to_owned(),
    };
    let mut lines = vec![format!(
        "{:<24} {:<18} {:<22} {:<28} {}",
        "NAME", "KIND", "SCHEDULE", "NEXT", "LAST RUN"
    )];
    lines.extend(jobs.iter().map(|job| {
        let next = if job["enabled"] == true {
            text(&job["next_at"])
        } else {
            "disabled".to_owned()
        };
        format!(
            "{:<24} {:<18} {:<22} {:<28} {}",
            text(&job["name"]),
            text(&job["kind"]),
            text(&job["schedule"]),
            next,
            text(&job["last_run"]["state"]),
        )
    }));
    lines.join("\n")
}

fn history(runs: &[Run]) -> String {
    let mut lines = vec![format!(
        "{:<37} {:<28} {:<10} {:<10} {}",
        "RUN", "SCHEDULED", "TRIGGER", "STATE", "COUNTS"
    )];
    lines.extend(runs.iter().map(|run| {
        let counts: Vec<String> = run
            .counts
            .iter()
            .map(|(name, count)| format!("{name}={count}"))
            .collect();
        let note = run
            .error
            .as_ref()
            .map(|error| format!("  {error}"))
            .unwrap_or_default();
        format!(
            "{:<37} {:<28} {:<10} {:<10} {}{note}",
            run.id.to_string(),
            format_time(run.scheduled_at),
            run.trigger,
            run.state,
            counts.join(" "),
        )
    }));
    lines.join("\n")
}
