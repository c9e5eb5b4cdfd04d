//! `timelined doctor`: looks for what usually goes wrong, and says how to mend it.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use chrono::TimeDelta;
use clap::Args;
use serde::Serialize;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Done, Failure, Global, clock, load, open, print};
use crate::config::Config;
use crate::daemon::eraser_parts;
use crate::domain::Subject;
use crate::erasure::{Book, Eraser, Replayed};
use crate::live::Hub;
use crate::storage::Storage;
use crate::telemetry::chain;

/// Jobs run where the database's clock says so; a machine further off confuses its logs.
const CLOCKS_APART: TimeDelta = TimeDelta::seconds(5);

#[derive(Debug, Args)]
pub(super) struct Options {
    /// Erase again what was erased before the database was restored from a backup: all that
    /// erasures.jsonl in the state directory names, of what was recorded until then.
    #[arg(long)]
    replay_erasures: bool,
}

/// What was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
    /// What to do, where it is not well.
    fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: String) -> Self {
        Self {
            name,
            ok: true,
            detail,
            fix: None,
        }
    }

    fn bad(name: &'static str, detail: String, fix: String) -> Self {
        Self {
            name,
            ok: false,
            detail,
            fix: Some(fix),
        }
    }
}

pub(super) async fn run(global: &Global, options: &Options) -> Done {
    let config = load(global)?.config;
    let storage = open(&config).await?;
    let done = if options.replay_erasures {
        replay(global, &config, &storage).await
    } else {
        look(global, &config, &storage).await
    };
    storage.close().await;
    done
}

async fn look(global: &Global, config: &Config, storage: &Storage) -> Done {
    let checks = [
        state_directory(config),
        database(storage).await,
        clocks(storage).await?,
        erasures(config, storage).await?,
    ];
    print(global, &json!({ "checks": checks }), || {
        let lines = checks.iter().map(|check| {
            let mark = if check.ok { "ok " } else { "BAD" };
            let fix = check.fix.as_ref().map(|fix| format!("\n     {fix}"));
            format!(
                "{mark}  {}: {}{}",
                check.name,
                check.detail,
                fix.unwrap_or_default()
            )
        });
        lines.collect::<Vec<_>>().join("\n")
    })?;
    match checks.iter().filter(|check| !check.ok).count() {
        0 => Ok(()),
        1 => Err(anyhow::anyhow!("one thing is not well").into()),
        count => Err(anyhow::anyhow!("{count} things are not well").into()),
    }
}

fn state_directory(config: &Config) -> Check {
    let (name, path) = ("state directory", config.state_directory.as_path());
    let shown = path.display().to_string();
    match std::fs::metadata(path) {
        Err(error) => Check::bad(
            name,
            format!("{shown}: {error}"),
            "start the daemon once, or make it for the daemon's user".to_owned(),
        ),
        Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => Check::bad(
            name,
            format!("{shown} can be read by other users"),
            format!("chmod 700 {shown}"),
        ),
        Ok(_) => Check::ok(name, shown),
    }
}

async fn database(storage: &Storage) -> Check {
    let engine = storage.engine();
    match storage.check_schema().await {
        Ok(()) => Check::ok("database", format!("{engine}, with this version's schema")),
        Err(error) => Check::bad(
            "database",
            chain(&error),
            "run: timelined migrate".to_owned(),
        ),
    }
}

async fn clocks(storage: &Storage) -> Result<Check, Failure> {
    let apart = storage.ledger.now().await? - clock().now();
    let detail = format!(
        "this machine's and the database's are {} ms apart",
        apart.num_milliseconds().abs()
    );
    Ok(if apart.abs() < CLOCKS_APART {
        Check::ok("clock", detail)
    } else {
        let fix = "set both by NTP, such as: timedatectl set-ntp true".to_owned();
        Check::bad("clock", detail, fix)
    })
}

async fn erasures(config: &Config, storage: &Storage) -> Result<Check, Failure> {
    let name = "erasures";
    let (book, bad_lines) = Book::open(&config.state_directory)?;
    let path = book.path().display().to_string();
    if let Some(bad) = bad_lines.first() {
        let detail = format!("{path}, {bad}");
        let fix = "mend the line, or bring the file back from a backup of its own".to_owned();
        return Ok(Check::bad(name, detail, fix));
    }
    let count = book.erasures().len();
    let missing = eraser(config, storage, book).missing().await?.len();
    Ok(if missing == 0 {
        Check::ok(name, format!("{path} has {count}, and so has the database"))
    } else {
        Check::bad(
            name,
            format!(
                "the database lacks {missing} of the {count} that {path} has: it was restored from an older backup"
            ),
            "run: timelined doctor --replay-erasures".to_owned(),
        )
    })
}

fn eraser(config: &Config, storage: &Storage, book: Book) -> Eraser {
    let parts = eraser_parts(
        config,
        storage,
        Arc::new(Hub::default()),
        clock(),
        TaskTracker::new(),
        CancellationToken::new(),
    );
    Eraser::new(parts, book)
}

async fn replay(global: &Global, config: &Config, storage: &Storage) -> Done {
    let (book, bad_lines) = Book::open(&config.state_directory)?;
    let path = book.path().display().to_string();
    let by = Subject::new("command line").expect("a short text");
    let replayed = eraser(config, storage, book).replay(&by).await?;
    let shown: Vec<_> = replayed
        .iter()
        .map(|Replayed { erasure, done }| {
            json!({
                "erasure_id": erasure.id,
                "tenant_id": erasure.tenant_id,
                "contact_id": erasure.contact_id,
                "events": done.as_ref().ok(),
                "error": done.as_ref().err().map(ToString::to_string),
            })
        })
        .collect();
    print(global, &json!({ "replayed": shown }), || {
        let lines = replayed.iter().map(|Replayed { erasure, done }| {
            let ended = match done {
                Ok(events) => format!("{events} events erased"),
                Err(error) => format!("NOT erased: {error}"),
            };
            format!("{}  {}  {ended}", erasure.tenant_id, erasure.contact_id)
        });
        lines.collect::<Vec<_>>().join("\n")
    })?;
    if let Some(bad) = bad_lines.first() {
        let error = anyhow::anyhow!("{path}, {bad}: what it names was not erased");
        return Err(error.into());
    }
    match replayed.iter().filter(|one| one.done.is_err()).count() {
        0 => {
            super::say(&format!("replayed the {} erasures of {path}", replayed.len()));
            Ok(())
        }
        held => Err(anyhow::anyhow!(
            "{held} of {} were not erased; release the holds and run it again: timelined holds list",
            replayed.len()
        )
        .into()),
    }
}
