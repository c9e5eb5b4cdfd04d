//! `timelined config`: check and show.

use chrono::{DateTime, Offset as _, SecondsFormat, Utc};
use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::{Done, Global, clock, load, print, say};
use crate::config::JobDefinition;
use crate::mail::Mailer;

/// As many as show whether a schedule is what was meant.
const TIMES_SHOWN: usize = 5;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check the configuration; every error at once, and exit code 78. Tells each job's next times.
    Check,
    /// Show every key with its value and where it comes from; secrets as ***.
    Show,
}

pub(super) fn run(global: &Global, command: &Command) -> Done {
    let loaded = load(global)?;
    if matches!(command, Command::Check) {
        // The files that it names can be read, too.
        Mailer::new(&loaded.config.mail)?;
    }
    match command {
        Command::Check => {
            let now = clock().now();
            let jobs = &loaded.config.jobs;
            let shown: Vec<Value> = jobs.iter().map(|job| as_json(job, now)).collect();
            print(
                global,
                &json!({ "valid": true, "file": loaded.file.to_string(), "jobs": shown }),
                || {
                    let mut text = format!("{}: no errors", loaded.file);
                    for job in jobs {
                        text.push_str(&as_text(job, now));
                    }
                    text
                },
            )
        }
        Command::Show => {
            if !global.json {
                say(&format!("# {}", loaded.file));
            }
            let keys: Map<String, Value> = loaded
                .entries
                .iter()
                .map(|entry| {
                    let shown = json!({ "value": entry.value, "origin": entry.origin.to_string() });
                    (entry.key.clone(), shown)
                })
                .collect();
            print(global, &Value::Object(keys), || {
                let width = loaded
                    .entries
                    .iter()
                    .map(|e| e.key.len() + e.value.len() + 3)
                    .max();
                let width = width.unwrap_or(0).min(60);
                loaded
                    .entries
                    .iter()
                    .map(|entry| {
                        let line = format!("{} = {}", entry.key, entry.value);
                        format!("{line:width$}  # {}", entry.origin)
                    })
                    .collect::<Vec<_>>()
                    .join("\n")
            })
        }
    }
}

/// The job's next times: in its zone with the offset, and in UTC. None when its schedule is not followed.
fn next_times(job: &JobDefinition, now: DateTime<Utc>) -> Vec<Time> {
    let zone = job.schedule.timezone();
    let next = |after| job.schedule.next_after(after).filter(|_| job.enabled);
    std::iter::successors(next(now), |at| next(*at))
        .take(TIMES_SHOWN)
        .map(|at| {
            let local = at.with_timezone(&zone);
            Time {
                local: local.to_rfc3339_opts(SecondsFormat::AutoSi, true),
                utc: at.to_rfc3339_opts(SecondsFormat::AutoSi, true),
                is_utc: local.offset().fix().local_minus_utc() == 0,
            }
        })
        .collect()
}

/// An instant as a job's zone writes it, and as UTC.
struct Time {
    local: String,
    utc: String,
    is_utc: bool,
}

fn as_json(job: &JobDefinition, now: DateTime<Utc>) -> Value {
    let times = next_times(job, now).into_iter();
    let next: Vec<Value> = times
        .map(|time| json!({ "local": time.local, "utc": time.utc }))
        .collect();
    json!({
        "name": job.name,
        "kind": job.kind.name(),
        "enabled": job.enabled,
        "schedule": job.schedule.to_string(),
        "words": job.schedule.words(),
        "timezone": job.schedule.timezone().name(),
        "next": next,
    })
}

fn as_text(job: &JobDefinition, now: DateTime<Utc>) -> String {
    let (schedule, words) = (job.schedule.to_string(), job.schedule.words());
    let mut text = format!("\n\n{}: {words}", job.name);
    if schedule != words {
        // An interval has no zone and is its own words.
        let zone = job.schedule.timezone();
        text.push_str(&format!(", in {zone} ({schedule})"));
    }
    if !job.enabled {
        text.push_str("\n  disabled: it runs only when asked to");
    }
    for Time { local, utc, is_utc } in next_times(job, now) {
        let line = if is_utc {
            format!("\n  {local}")
        } else {
            format!("\n  {local}  {utc}")
        };
        text.push_str(&line);
    }
    text
}
