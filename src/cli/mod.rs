//! The command line: one file a group of commands. Data goes to standard output, talk to standard
//! error; the exit code says what kind of failure it was.

mod config;
mod demo;
mod doctor;
mod events;
mod export;
mod holds;
mod import;
mod jobs;
mod purge;
mod run;
mod token;

use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::access::Access;
use crate::config::{Config, ConfigErrors, DatabaseUrl, Loaded, Request, Verifier};
use crate::daemon::{make_private_directory, open_storage};
use crate::domain::{Clock, SystemClock};
use crate::mail::MailerError;
use crate::storage::{Storage, StorageError};
use crate::telemetry::chain;

/// Keeps the activity timeline of every contact of a CRM.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    subcommand_required = false,
    args_conflicts_with_subcommands = false
)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Options that stand before or after any command.
#[derive(Debug, Clone, Args)]
struct Global {
    /// The configuration [default: config/timelined.toml, else /etc/timelined/timelined.toml, else the built-in one].
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon (the default).
    Run,
    /// Run with sample contacts whose timelines move, in a directory of its own.
    Demo,
    /// Bring the database's schema up to this version.
    Migrate,
    /// Make a token.
    Token(token::Options),
    /// Look at the configuration.
    #[command(subcommand)]
    Config(config::Command),
    /// Look at jobs and run them.
    #[command(subcommand)]
    Jobs(jobs::Command),
    /// Record, import, list and watch events.
    #[command(subcommand)]
    Events(events::Command),
    /// Delete now what the purge job would delete.
    Purge(purge::Options),
    /// Keep events from being deleted, such as for a lawsuit.
    #[command(subcommand)]
    Holds(holds::Command),
    /// Look for what usually goes wrong, and say how to mend it.
    Doctor(doctor::Options),
    /// Export a contact's timeline, to a file or by mail.
    Export(export::Options),
}

/// Runs a command and answers its exit code.
pub async fn execute(cli: Cli) -> ExitCode {
    let Cli { global, command } = cli;
    let done = match command.unwrap_or(Command::Run) {
        Command::Run => run::run(&global).await,
        Command::Demo => demo::run(&global).await,
        Command::Migrate => migrate(&global).await,
        Command::Token(options) => token::run(&global, &options),
        Command::Config(command) => config::run(&global, &command),
        Command::Jobs(command) => jobs::run(&global, &command).await,
        Command::Events(command) => events::run(&global, &command).await,
        Command::Purge(options) => purge::run(&global, &options).await,
        Command::Holds(command) => holds::run(&global, &command).await,
        Command::Doctor(options) => doctor::run(&global, &options).await,
        Command::Export(options) => Box::pin(export::run(&global, &options)).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let text = failure.to_string();
            // Nothing is left to do where standard error is closed.
            drop(writeln!(io::stderr(), "{}", text.trim_end()));
            ExitCode::from(failure.code())
        }
    }
}

/// Why a command failed; decides the exit code.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// 78: the configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigErrors),
    /// 77: the system, or the rules of this program, do not permit it.
    #[error("timelined: {0}")]
    Denied(String),
    /// 3: what was named is not there.
    #[error("timelined: {0}")]
    NotFound(String),
    /// 2: the arguments do not fit.
    #[error("timelined: {0}")]
    Usage(String),
    /// 69: a daemon cannot be reached.
    #[error("timelined: {0}")]
    Unreachable(String),
    /// 78: the configuration names what cannot be used.
    #[error("timelined: {}", crate::telemetry::chain(.0))]
    Mail(#[from] MailerError),
    /// 1: anything else.
    #[error("timelined: {}", chain(&**.0))]
    Other(anyhow::Error),
}

impl Failure {
    /// The exit code, after sysexits.h where it has one.
    fn code(&self) -> u8 {
        match self {
            Self::Other(_) => 1,
            Self::Usage(_) => 2,
            Self::NotFound(_) => 3,
            Self::Unreachable(_) => 69,
            Self::Denied(_) => 77,
            Self::Config(_) | Self::Mail(_) => 78,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let is_denied = error
            .chain()
            .filter_map(|cause| cause.downcast_ref::<io::Error>())
            .any(|cause| cause.kind() == io::ErrorKind::PermissionDenied);
        if is_denied {
            Self::Denied(chain(&*error))
        } else {
            Self::Other(error)
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        anyhow::Error::from(error).into()
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        anyhow::Error::from(error).into()
    }
}

type Done = Result<(), Failure>;

fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock)
}

/// Loads the configuration that the options and the environment name.
fn load(global: &Global) -> Result<Loaded, Failure> {
    let request = Request {
        explicit_file: global.config.clone(),
        environment: environment(),
        working_directory: std::env::current_dir()?,
    };
    Ok(crate::config::load(&request)?)
}

/// The variables that are text; none of ours is anything else.
fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// Opens the database for a command, beside a daemon or without one.
async fn open(config: &Config) -> Result<Storage, Failure> {
    if matches!(config.database.url, DatabaseUrl::Sqlite(_)) {
        check_owner(config)?;
        make_private_directory(&config.state_directory)?;
    }
    let storage = open_storage(config).await?;
    if config.database.migrate {
        storage.migrate().await?;
    } else {
        storage.check_schema().await?;
    }
    Ok(storage)
}

/// A command of another user would leave files, in the state directory and beside a SQLite
/// database, that the daemon cannot write.
fn check_owner(config: &Config) -> Result<(), Failure> {
    let me = std::fs::metadata("/proc/self")?.uid();
    let mut paths = vec![config.state_directory.as_path()];
    if let DatabaseUrl::Sqlite(file) = &config.database.url {
        paths.extend(file.parent());
        paths.push(file);
    }
    for path in paths {
        // What is not there yet will belong to whoever makes it.
        let Ok(metadata) = std::fs::metadata(path) else {
            continue;
        };
        let owner = metadata.uid();
        if owner != me {
            return Err(Failure::Denied(format!(
                "{} belongs to the user with id {owner}, not to you ({me}): run the command as that user",
                path.display()
            )));
        }
    }
    Ok(())
}

/// Access by the configuration; makes the daemon's own key where that is what it takes.
fn access(config: &Config) -> Result<Access, Failure> {
    if matches!(config.auth.verifier, Verifier::Hs256(None)) {
        check_owner(config)?;
        make_private_directory(&config.state_directory)?;
    }
    Ok(crate::daemon::access(config)?)
}

async fn migrate(global: &Global) -> Done {
    let loaded = load(global)?;
    if matches!(loaded.config.database.url, DatabaseUrl::Sqlite(_)) {
        check_owner(&loaded.config)?;
        make_private_directory(&loaded.config.state_directory)?;
    }
    let storage = open_storage(&loaded.config).await?;
    storage.migrate().await?;
    storage.close().await;
    print(global, &serde_json::json!({ "migrated": true }), || {
        format!(
            "the {} database has the schema of this version",
            storage.engine()
        )
    })
}

/// Prints data: as JSON, or as text for people.
fn print(global: &Global, json: &impl Serialize, text: impl FnOnce() -> String) -> Done {
    let text = if global.json {
        // Not by way of a `Value`, which refuses what other programs may write: 1e999, or 200 levels.
        serde_json::to_string(json).context("the answer is not JSON")?
    } else {
        text()
    };
    // A list of nothing is no line at all.
    if text.is_empty() { Ok(()) } else { out(&text) }
}

fn out(text: &str) -> Done {
    match writeln!(io::stdout().lock(), "{text}") {
        // Whoever read has had enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

/// Says something to a person, on standard error.
fn say(text: &str) {
    drop(writeln!(io::stderr(), "{text}"));
}
