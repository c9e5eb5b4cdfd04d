//! `[database]`: which engine keeps the events, and where.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;

use super::error::{Problem, nearest};
use super::reader::Section;
use super::rules::{Raw, Rule, choice, flag, text};
use super::secret::{Secret, masked_url};

/// `[database]`: where events are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// Which engine, and where.
    pub url: DatabaseUrl,
    /// Whether the daemon migrates at its start.
    pub migrate: bool,
    /// What an acknowledged write survives; `SQLite` only.
    pub synchronous: Synchronous,
}

/// The two engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// A file, by its absolute path.
    Sqlite(PathBuf),
    /// The whole URL, a secret since a password may stand in it.
    Postgres(Secret),
}

/// When `SQLite` waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synchronous {
    /// At each commit: what was acknowledged survives a loss of power.
    Full,
    /// At checkpoints: faster, and the last commits may be lost with the power.
    Normal,
}

impl Database {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        Self {
            url: DatabaseUrl::read(section),
            migrate: section.take("migrate", true, &flag()),
            synchronous: section.take(
                "synchronous",
                "full",
                &choice(&[("full", Synchronous::Full), ("normal", Synchronous::Normal)]),
            ),
        }
    }
}

/// Without the password, if there is one.
impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => path.display().fmt(f),
            Self::Postgres(url) => f.write_str(&masked_url(url.expose_secret())),
        }
    }
}

impl DatabaseUrl {
    /// Whether several daemons may share it.
    #[must_use]
    pub fn is_postgres(&self) -> bool {
        matches!(self, Self::Postgres(_))
    }

    fn read(section: &mut Section<'_>) -> Self {
        const KEY: &str = "url";
        const DEFAULT: &str = "sqlite://timelined.db";
        let rule = database_url();
        let written = if section.is_table(KEY) {
            let secret = section.secret(KEY);
            // An unreadable secret has been reported; what stands in for it is never used.
            let url = secret.as_ref().map_or(DEFAULT, Secret::expose_secret);
            rule.read(&Raw::from(url)).unwrap_or_else(|problem| {
                section.fail(KEY, problem);
                WrittenUrl::Sqlite(DEFAULT.to_owned())
            })
        } else {
            section.learn_secret(KEY);
            section.take_shown(KEY, DEFAULT, &rule, |raw| match raw {
                Raw::Text(url) => Raw::from(masked_url(url).as_str()).to_string(),
                other => other.kind().to_owned(),
            })
        };
        match written {
            WrittenUrl::Sqlite(path) => Self::Sqlite(section.resolve(&path)),
            WrittenUrl::Postgres(url) => Self::Postgres(Secret::new(url)),
        }
    }
}

/// A database URL whose path, if it is a file's, is as it was written.
enum WrittenUrl {
    Sqlite(String),
    Postgres(String),
}

/// Never repeats the URL: a password may stand in it.
fn database_url() -> Rule<WrittenUrl> {
    text(
        "\"sqlite://FILE\" or \"postgres://USER:PASSWORD@HOST/DATABASE\"",
        |url| {
            let Some((scheme, rest)) = url.split_once("://") else {
                return Err(Problem::new("is not a URL"));
            };
            match scheme {
                "sqlite" if rest.is_empty() => Err(Problem::new("names no file")),
                "sqlite" if rest.contains(":memory:") => Err(Problem::new(
                    "names no file; what is kept in memory is lost at each restart",
                )),
                "sqlite" if rest.contains('?') => Err(Problem::new(
                    "has options after a question mark; they are keys of [database] here",
                )),
                "sqlite" => Ok(WrittenUrl::Sqlite(rest.to_owned())),
                "postgres" | "postgresql" => match PgConnectOptions::from_str(url) {
                    Ok(_) => Ok(WrittenUrl::Postgres(url.to_owned())),
                    // Its source says which part is wrong, but quotes it, and a part may be the password.
                    Err(_) => Err(Problem::new(
                        "is not a PostgreSQL URL; write @ / : and ? within a password as %40 %2F %3A %3F",
                    )),
                },
                other => {
                    let known = ["sqlite", "postgres", "postgresql"];
                    let meant = nearest(other, known).map(|scheme| format!("{scheme}://…"));
                    Err(Problem::new("is of another engine").suggest(meant))
                }
            }
        },
    )
}
