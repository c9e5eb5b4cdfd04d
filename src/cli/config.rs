//! `timelined config`: check and show.

use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::{Done, Global, load, print, say};
use crate::mail::Mailer;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Check the configuration; every error at once, and exit code 78.
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
        Command::Check => print(
            global,
            &json!({ "valid": true, "file": loaded.file.to_string() }),
            || format!("{}: no errors", loaded.file),
        ),
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
