//! `timelined run`: the daemon.

use super::{Done, Failure, Global, check_owner, clock, load, out};
use crate::config::DatabaseUrl;
use crate::daemon::Daemon;
use crate::lifecycle::{Ended, Signals, serve};
use crate::mail::Mailer;
use crate::telemetry::start_logs;

pub(super) async fn run(global: &Global) -> Done {
    let loaded = load(global)?;
    if matches!(loaded.config.database.url, DatabaseUrl::Sqlite(_)) {
        check_owner(&loaded.config)?;
    }
    // Before anything is opened: what the configuration gets wrong ends with 78.
    Mailer::new(&loaded.config.mail)?;
    let signals = Signals::new()?;
    start_logs(&loaded.config.log);
    tracing::info!(config = %loaded.file, "timelined {}", env!("CARGO_PKG_VERSION"));
    let state = loaded.config.state_directory.clone();
    let daemon = Daemon::start(loaded.config, clock()).await?;
    // Three lines for whoever types `cargo run`; a service's journal shows them too.
    out(&format!("listening on  http://{}", daemon.address()))?;
    out(&format!("state is in   {}", state.display()))?;
    out(&format!(
        "get a token   {} token --tenant acme --role service",
        program(global)
    ))?;
    let read = || match load(global) {
        Ok(loaded) => Ok(loaded.config),
        Err(failure) => Err(failure.to_string()),
    };
    match serve(daemon, signals, read).await {
        Ended::Stopped => Ok(()),
        Ended::Failed => Err(Failure::Other(anyhow::anyhow!(
            "stopped because the database could not be made durable; see the log"
        ))),
    }
}

/// How this program was called, so that the command can be pasted.
fn program(global: &Global) -> String {
    let name = std::env::args()
        .next()
        .unwrap_or_else(|| "timelined".to_owned());
    match &global.config {
        Some(file) => format!("{name} --config {}", file.display()),
        None => name,
    }
}
