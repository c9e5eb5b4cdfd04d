//! The configuration: built-in defaults under a TOML file under the environment.
//!
//! [`load`] reads it, checks it and tells everything that is wrong in one go. What it returns is complete and valid:
//! paths are absolute, secrets are read, schedules are parsed. It asks neither the real environment nor the clock:
//! both come with the [`Request`], so that a test, a reload and `config check` see exactly what they mean to see.

mod alerts;
mod auth;
mod database;
mod error;
mod http;
mod jobs;
mod layers;
mod mail;
mod notes;
mod reader;
mod retention;
mod rules;
mod secret;
mod sections;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use notes::{LISTS, Reading};
use reader::{Section, read_root};

use crate::domain::RetentionRule;

pub use alerts::Alerts;
pub use auth::{Auth, PublicKeyAlgorithm, Verifier};
pub use database::{Database, DatabaseUrl, Synchronous};
pub use error::{ConfigError, ConfigErrors};
pub use http::Http;
pub use jobs::{
    CatchUp, ExportFormat, ExportJob, JobDefinition, JobKind, Overlap, Selection, WhenEmpty,
};
pub use layers::Source;
pub use mail::{AllowedDomains, Mail, Smtp, SmtpLogin, SmtpTls, Transport, Uncertain};
pub use notes::{Entry, Origin};
pub use secret::Secret;
pub use sections::{Branding, Export, History, Log, LogFormat, Realtime};

/// Everything that an operator decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where the daemon keeps what is its own; absolute, as all paths here.
    pub state_directory: PathBuf,
    /// `[database]`.
    pub database: Database,
    /// `[http]`.
    pub http: Http,
    /// `[auth]`.
    pub auth: Auth,
    /// `[mail]`.
    pub mail: Mail,
    /// `[realtime]`.
    pub realtime: Realtime,
    /// `[export]`.
    pub export: Export,
    /// `[history]`.
    pub history: History,
    /// `[alerts]`, and what is expected of which job.
    pub alerts: Alerts,
    /// `[log]`.
    pub log: Log,
    /// `[[jobs]]`, in the order of the file.
    pub jobs: Vec<JobDefinition>,
    /// `[[retention]]`: no two select the same.
    pub retention: Vec<RetentionRule>,
}

/// What a configuration is to be read from.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The file of `--config`, which must then be there.
    pub explicit_file: Option<PathBuf>,
    /// The process's environment, name and value.
    pub environment: Vec<(String, String)>,
    /// Where relative files and a relative state directory begin; absolute.
    pub working_directory: PathBuf,
}

/// A configuration and where it came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// The file it was read from.
    pub file: Source,
    /// Every key with its value and origin, for `config show`.
    pub entries: Vec<Entry>,
}

/// Reads and checks a configuration.
///
/// # Errors
/// All that is wrong with it, or the file that cannot be read.
pub fn load(request: &Request) -> Result<Loaded, ConfigErrors> {
    load_with(request, Path::new(layers::SYSTEM_FILE))
}

/// [`load`] with another place for the system's file, which tests cannot write.
fn load_with(request: &Request, system_file: &Path) -> Result<Loaded, ConfigErrors> {
    let environment: BTreeMap<String, String> = request.environment.iter().cloned().collect();
    let (file, text) = layers::choose(request, system_file)?;
    let shown = file.path().map(|path| path.display().to_string());
    let shown = shown.unwrap_or_default();

    let (built_in, _none) = layers::FileLayer::parse("", jobs::BUILT_IN);
    let built_in = built_in.expect("the built-in jobs are TOML");
    let (layer, mut errors) = layers::FileLayer::parse(&shown, text.as_deref().unwrap_or_default());
    let Some(mut layer) = layer else {
        // What the parser made of broken TOML would only bring errors that are none.
        return Err(ConfigErrors::new(errors).expect("without a layer there are errors"));
    };

    let spots = std::mem::take(&mut layer.spots);
    let quoted = std::mem::take(&mut layer.quoted);
    let (ours, strays) = layers::sort_variables(&environment);
    let names: Vec<String> = ours.keys().cloned().collect();
    // A list of tables cannot be set by variables, and `config` would put a table in its place.
    let mergeable = ours
        .into_iter()
        .filter(|(name, _)| !LISTS.iter().any(|(prefix, _)| name.starts_with(prefix)));
    let values = layers::merge(built_in, layer, mergeable.collect())?;

    let mut reading = Reading::new(shown, spots, environment, &request.working_directory);
    let config = read_root(values, &mut reading, Config::read);
    reading.refuse_quoted(quoted);
    let (entries, found) = reading.finish(names.iter().map(String::as_str), &strays);
    errors.extend(found);
    match ConfigErrors::new(errors) {
        None => Ok(Loaded {
            config,
            file,
            entries,
        }),
        Some(errors) => Err(errors),
    }
}

impl Config {
    fn read(root: &mut Section<'_>) -> Self {
        let state_directory = Self::read_state_directory(root);
        root.set_base(state_directory.clone());
        let database = root.section("database", Database::read);
        let http = root.section("http", Http::read);
        let surroundings = auth::Surroundings {
            on_postgres: database.url.is_postgres(),
            listen: http.listen,
        };
        let mail = root.section("mail", Mail::read);
        let jobs = jobs::read(root, &mail.allowed_domains);
        Self {
            state_directory,
            auth: root.section("auth", |section| Auth::read(section, &surroundings)),
            mail,
            realtime: root.section("realtime", Realtime::read),
            export: root.section("export", Export::read),
            history: root.section("history", History::read),
            log: root.section("log", Log::read),
            alerts: root.section("alerts", |section| {
                Alerts::read(section, jobs.expect_within)
            }),
            jobs: jobs.definitions,
            retention: retention::read(root),
            database,
            http,
        }
    }

    fn read_state_directory(root: &mut Section<'_>) -> PathBuf {
        const KEY: &str = "state_directory";
        const VARIABLE: &str = "STATE_DIRECTORY";
        // systemd joins several directories by colons; the first is the unit's own.
        let by_systemd = root
            .foreign_variable(VARIABLE)
            .and_then(|list| list.split(':').next())
            .map(str::to_owned);
        match by_systemd {
            Some(directory) if !root.is_given(KEY) => {
                root.note_foreign(KEY, &directory, VARIABLE);
                root.resolve(&directory)
            }
            _ => root.path(KEY, "data"),
        }
    }
}
