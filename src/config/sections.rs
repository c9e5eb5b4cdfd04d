//! The sections of a few keys: `[realtime]`, `[export]`, `[history]` and `[log]`.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::error::{Problem, nearest};
use super::reader::Section;
use super::rules::{Rule, choice, duration, list, named, number, text, words};
use crate::domain::Locale;

const DAY: Duration = Duration::from_hours(24);

/// `[realtime]`: what a connection may have open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realtime {
    /// How many events may be unacknowledged on one connection.
    pub window: u16,
    /// After how long an unacknowledged event comes again.
    pub ack_timeout: Duration,
}

/// `[export]`: the files of exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// Where they lie.
    pub directory: PathBuf,
    /// How long they and the links to them last.
    pub keep: Duration,
    /// Where documents look for fonts before the system's places.
    pub fonts: Vec<PathBuf>,
    /// The language of documents.
    pub locale: Locale,
    /// How many events a PDF holds, in all its volumes.
    pub pdf_max_events: u64,
    /// `[export.branding]`.
    pub branding: Branding,
}

/// `[export.branding]`: what makes documents those of a company.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branding {
    /// Of headings: red, green, blue.
    pub colour: [u8; 3],
    /// What stands at the foot of each page.
    pub footer: String,
}

/// `[history]`: the runs of the jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// How long they are kept after their end.
    pub keep: Duration,
}

/// `[log]`: what is logged and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// How a line is written.
    pub format: LogFormat,
    /// Directives of an `EnvFilter`, checked to parse.
    pub level: String,
}

/// How a log line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    Auto,
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Realtime {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        Self {
            window: section.take("window", 256, &number(1..=10_000)),
            ack_timeout: section.take(
                "ack_timeout",
                "30s",
                &duration(Duration::from_secs(1)..=Duration::from_mins(10)),
            ),
        }
    }
}

impl Export {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        Self {
            directory: section.path("directory", "exports"),
            keep: section.take(
                "keep",
                "7d",
                &duration(Duration::from_secs(1)..=DAY * 3_650),
            ),
            fonts: section
                .take("fonts", [], &list(words("a directory")))
                .iter()
                .map(|path| section.resolve(path))
                .collect(),
            locale: section.take("locale", "en", &named(&["en", "pt"])),
            pdf_max_events: section.take("pdf_max_events", 25_000, &number(1..=1_000_000)),
            branding: section.section("branding", Branding::read),
        }
    }
}

impl Branding {
    fn read(section: &mut Section<'_>) -> Self {
        Self {
            colour: section.take("colour", "#1f4e79", &colour()),
            footer: section.take("footer", "", &footer()),
        }
    }
}

fn colour() -> Rule<[u8; 3]> {
    text("a colour such as \"#1f4e79\"", |text| {
        let digits = text.strip_prefix('#').filter(|digits| digits.len() == 6);
        digits
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u32::from_str_radix(digits, 16).ok())
            .map(|number| {
                let [_, red, green, blue] = number.to_be_bytes();
                [red, green, blue]
            })
            .ok_or_else(|| Problem::new(format!("{text:?} is not a colour")))
    })
}

fn footer() -> Rule<String> {
    text("a line of at most 120 characters", |text| {
        let length = text.chars().count();
        if length > 120 || text.chars().any(char::is_control) {
            return Err(Problem::new("does not fit on a line"));
        }
        Ok(text.to_owned())
    })
}

impl History {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let allowed = duration(Duration::from_hours(1)..=DAY * 3_650);
        Self {
            keep: section.take("keep", "30d", &allowed),
        }
    }
}

impl Log {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        Self {
            format: section.take(
                "format",
                "auto",
                &choice(&[
                    ("auto", LogFormat::Auto),
                    ("text", LogFormat::Text),
                    ("json", LogFormat::Json),
                ]),
            ),
            level: section.take("level", "info", &log_level()),
        }
    }
}

fn log_level() -> Rule<String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    text(
        "off, error, warn, info, debug, trace, or directives such as \"info,sqlx=warn\"",
        |text| {
            for directive in text.split(',').map(str::trim) {
                let is_level = LEVELS.contains(&directive.to_ascii_lowercase().as_str());
                // The filter takes `inof` for the name of a module, and logs nothing.
                if let Some(level) = nearest(directive, LEVELS).filter(|_| !is_level) {
                    return Err(
                        Problem::new(format!("{directive:?} is not a level")).suggest(Some(level))
                    );
                }
            }
            if text.trim().is_empty() {
                return Err(Problem::new("is empty"));
            }
            EnvFilter::builder()
                .parse(text)
                .map(|_filter| text.to_owned())
                .map_err(|error| Problem::new(format!("{text:?} is not valid ({error})")))
        },
    )
}
