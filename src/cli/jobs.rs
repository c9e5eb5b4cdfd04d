//! `timelined jobs`: list, show, run, pause, resume, runs, cancel, retry.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Done, Failure, Global, clock, load, open, print, say};
use crate::api::show_jobs;
use crate::config::{Config, JobDefinition};
use crate::domain::{RunId, Subject, format_time};
use crate::jobs;
use crate::storage::{JobAction, Run, RunState, Storage};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// The jobs of the configuration, with their next time and last run.
    List,
    /// One job: its schedule, its last runs, and what operators did to it.
    Show {
        /// The job.
        name: String,
    },
    /// Ask for a run now; the daemon takes it within a second.
    Run {
        /// The job.
        name: String,
    },
    /// Stop a job's schedule; it lasts over restarts, until the job is resumed.
    Pause {
        /// The job.
        name: String,
    },
    /// Follow a job's schedule again.
    Resume {
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
    /// End a run: one that waits at once, one at work at its next safe point.
    Cancel {
        /// The run.
        run: RunId,
    },
    /// Try a run again that failed, timed out or was cancelled.
    Retry {
        /// The run.
        run: RunId,
    },
}

/// How many runs and actions are shown with a job.
const SHOWN: u32 = 5;

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
    if let Command::Run { name }
    | Command::Runs { name, .. }
    | Command::Show { name }
    | Command::Pause { name }
    | Command::Resume { name } = command
    {
        find(&config, name)?;
    }
    let storage = open(&config).await?;
    let done = answer(global, command, &config, &storage).await;
    storage.close().await;
    done
}

async fn answer(global: &Global, command: &Command, config: &Config, storage: &Storage) -> Done {
    let clock = clock();
    let ledger = &*storage.ledger;
    let by = Subject::new("command line").expect("a short text");
    match command {
        Command::List => {
            let jobs = show_jobs(&config.jobs, ledger, &*clock).await?;
            print(global, &json!({ "jobs": jobs }), || table(&jobs))
        }
        Command::Show { name } => {
            let job = find(config, name)?;
            let shown = show_jobs(std::slice::from_ref(job), ledger, &*clock).await?;
            let runs = ledger.runs(name, None, SHOWN).await?;
            let actions = ledger.actions(name, SHOWN).await?;
            let alerts = storage.alerts.alerts(std::slice::from_ref(name)).await?;
            let waits = alerts.iter().any(|alert| alert.waits_for_operator);
            let all = json!({
                "job": shown[0], "runs": runs, "actions": actions, "waits_for_operator": waits,
            });
            print(global, &all, || {
                let mut text = table(&shown);
                if waits {
                    text.push_str(&format!(
                        "\n\nwaits for an operator, since it would delete far more than usual: {}",
                        jobs::what_to_do(name)
                    ));
                }
                text.push_str(&format!("\n\n{}", history(&runs)));
                if !actions.is_empty() {
                    text.push_str("\n\n");
                    text.push_str(&deeds(&actions));
                }
                text
            })
        }
        Command::Run { name } => {
            let now = clock.now();
            let id = RunId::generate(now);
            ledger.enqueue(id, name, &by, now).await?;
            if !global.json {
                say("queued; a running daemon takes it within a second (see: timelined jobs runs)");
            }
            print(global, &json!({ "run_id": id }), || id.to_string())
        }
        Command::Pause { name } => {
            let is_new = ledger.pause(name, &by, ledger.now().await?).await?;
            print(global, &json!({ "paused": true }), || {
                let what = if is_new {
                    "is paused"
                } else {
                    "was paused before"
                };
                format!("{name} {what}")
            })
        }
        Command::Resume { name } => {
            let job = find(config, name)?;
            let was_paused = jobs::resume(ledger, job, &by, ledger.now().await?).await?;
            print(global, &json!({ "paused": false }), || {
                let what = if was_paused {
                    "is resumed"
                } else {
                    "was not paused"
                };
                format!("{name} {what}")
            })
        }
        Command::Runs { name, limit } => {
            let runs = ledger.runs(name, None, *limit).await?;
            print(global, &json!({ "runs": runs }), || history(&runs))
        }
        Command::Cancel { run } => {
            match ledger.cancel(*run, &by, ledger.now().await?).await? {
                Some(RunState::Queued | RunState::Running) => {}
                Some(state) => return ended(*run, "nothing to cancel", state),
                None => return Err(no_run(*run)),
            }
            print(global, &json!({ "run_id": run }), || run.to_string())
        }
        Command::Retry { run } => {
            match ledger.retry(*run, &by, ledger.now().await?).await? {
                Some(RunState::Failed | RunState::TimedOut | RunState::Cancelled) => {}
                Some(state) => return ended(*run, "nothing to try again", state),
                None => return Err(no_run(*run)),
            }
            print(global, &json!({ "run_id": run }), || run.to_string())
        }
    }
}

fn ended(run: RunId, what: &str, state: RunState) -> Done {
    Err(Failure::Other(anyhow::anyhow!(
        "{what}: run {run} is {state}"
    )))
}

fn no_run(run: RunId) -> Failure {
    Failure::NotFound(format!(
        "there is no run {run}; see: timelined jobs runs NAME"
    ))
}

fn deeds(actions: &[JobAction]) -> String {
    let mut lines = vec![format!(
        "{:<28} {:<16} {:<37} {}",
        "DONE AT", "ACTION", "RUN", "BY"
    )];
    lines.extend(actions.iter().map(|did| {
        let run = did.run_id.map(|run| run.to_string()).unwrap_or_default();
        format!(
            "{:<28} {:<16} {run:<37} {}",
            format_time(did.at),
            did.action,
            did.actor
        )
    }));
    lines.join("\n")
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
        let next = match (&job["enabled"], &job["paused"]) {
            (Value::Bool(false), _) => "disabled".to_owned(),
            (_, Value::Bool(true)) => "paused".to_owned(),
            _ => text(&job["next_at"]),
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
