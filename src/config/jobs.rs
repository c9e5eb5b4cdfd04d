//! `[[jobs]]`: what runs when, and what each kind of job wants to know.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use lettre::Address;

use super::error::{Problem, nearest};
use super::mail::AllowedDomains;
use super::reader::Section;
use super::rules::{Rule, choice, duration, flag, list, named, number, parsed, short, text};
use crate::domain::{Audience, Category, ContactId, TenantId};
use crate::jobs::retry::RetryPolicy;
use crate::jobs::schedule::{LONGEST_INTERVAL, SHORTEST_INTERVAL, Schedule};

/// The jobs of an installation whose file defines none.
pub(super) const BUILT_IN: &str = r#"
[[jobs]]
name = "realtime-delivery"
kind = "realtime_delivery"
every = "1s"

[[jobs]]
name = "purge-expired"
kind = "purge_expired"
cron = "0 30 3 * * *"
"#;

const KINDS: [(&str, Kind); 3] = [
    ("realtime_delivery", Kind::RealtimeDelivery),
    ("purge_expired", Kind::PurgeExpired),
    ("timeline_export", Kind::TimelineExport),
];

const CATCH_UPS: [(&str, CatchUp); 3] = [
    ("once", CatchUp::Once),
    ("skip", CatchUp::Skip),
    ("all", CatchUp::All),
];

pub(super) const CATEGORIES: &[&str] = &[
    "general",
    "status",
    "pipeline",
    "assignment",
    "tag",
    "note",
    "session",
    "custom_field",
    "system",
    "notification",
    "tracking",
];

const DAY: Duration = Duration::from_hours(24);

/// A hundred years: more than any retention law asks for, and far from what overflows a date.
pub(super) const LONGEST_PERIOD: Duration = Duration::from_hours(24 * 36_500);

/// One job as an operator defined it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDefinition {
    /// Its identity for ever: runs and pauses are kept under it.
    pub name: String,
    /// When it is due.
    pub schedule: Schedule,
    /// Whether its schedule is followed; a disabled job can still be run by hand.
    pub enabled: bool,
    /// After how long a run is stopped.
    pub timeout: Duration,
    /// What becomes of a time that comes while a run is still going.
    pub overlap: Overlap,
    /// What becomes of times that passed while nothing ran.
    pub catch_up: CatchUp,
    /// How long ago such a time may be.
    pub catch_up_within: Duration,
    /// How a run that failed is tried again.
    pub retry: RetryPolicy,
    /// What it does.
    pub kind: JobKind,
}

/// What becomes of a time that comes while a run is still going.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// It is skipped, with a row that says so.
    Skip,
    /// It runs afterwards; at most one waits.
    Queue,
}

/// What becomes of times that passed while nothing ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatchUp {
    /// One run makes up for all.
    Once,
    /// They are skipped, with a row that says so.
    Skip,
    /// Each runs, one after another.
    All,
}

/// What a job does, with the keys of its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobKind {
    /// Sends realtime events to whoever watches.
    RealtimeDelivery {
        /// How many events one statement handles.
        batch: u32,
    },
    /// Deletes what expired long enough ago.
    PurgeExpired {
        /// How long ago.
        older_than: Duration,
        /// How many rows a second it deletes at most; 0 is as many as it can.
        max_rate: u32,
        /// Count only, delete nothing.
        dry_run: bool,
    },
    /// Mails timelines. Boxed: the others are a twentieth of its size.
    TimelineExport(Box<ExportJob>),
}

/// What a scheduled export sends to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportJob {
    /// Whose timelines.
    pub tenant: TenantId,
    /// Which of its contacts.
    pub selection: Selection,
    /// Whose eyes the timeline is for.
    pub audience: Audience,
    /// The kind of file.
    pub format: ExportFormat,
    /// Who gets it; never empty.
    pub to: Vec<Address>,
    /// How far back it reaches from the scheduled time, where none before it has arrived; else it
    /// begins where the last one ended.
    pub period: Duration,
    /// What becomes of a contact to whom nothing happened.
    pub when_empty: WhenEmpty,
    /// Whether the file is attached; else a link is sent.
    pub attach: bool,
}

/// What a scheduled export does about a contact to whom nothing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenEmpty {
    /// Nothing is sent.
    Skip,
    /// A mail says that there were no events.
    Note,
}

/// Which contacts a scheduled export takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    /// These; never empty.
    Contacts(Vec<ContactId>),
    /// Those with an event within this time before the run.
    Active {
        /// How long ago an event may be.
        since: Duration,
        /// Counts only events of this category.
        category: Option<Category>,
    },
}

/// The kind of file that an export makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// RFC 4180.
    Csv,
    /// The same, packed by gzip.
    CsvGz,
    /// The same, packed by Zstandard.
    CsvZst,
    /// An event a line.
    Jsonl,
    /// The same, packed by gzip.
    JsonlGz,
    /// The same, packed by Zstandard.
    JsonlZst,
    /// A workbook.
    Xlsx,
    /// A document.
    Pdf,
}

impl ExportFormat {
    const NAMES: [(&str, Self); 8] = [
        ("csv", Self::Csv),
        ("csv.gz", Self::CsvGz),
        ("csv.zst", Self::CsvZst),
        ("pdf", Self::Pdf),
        ("jsonl", Self::Jsonl),
        ("jsonl.gz", Self::JsonlGz),
        ("jsonl.zst", Self::JsonlZst),
        ("xlsx", Self::Xlsx),
    ];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    RealtimeDelivery,
    PurgeExpired,
    TimelineExport,
}

impl JobKind {
    /// The kind as the configuration, the API and the logs call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::RealtimeDelivery { .. } => "realtime_delivery",
            Self::PurgeExpired { .. } => "purge_expired",
            Self::TimelineExport(_) => "timeline_export",
        }
    }
}

/// What stands under `[[jobs]]`.
pub(super) struct Jobs {
    pub(super) definitions: Vec<JobDefinition>,
    /// By the name of a job, how old its last success may become.
    pub(super) expect_within: BTreeMap<String, Duration>,
}

/// Reads all jobs; those with errors, which have been noted, are left out.
pub(super) fn read(root: &mut Section<'_>, domains: &AllowedDomains) -> Jobs {
    let mut names: Vec<String> = Vec::new();
    let mut delivery: Option<String> = None;
    let mut expect_within = BTreeMap::new();
    let jobs = root.each("jobs", |section| {
        let name = section.take_required("name", &job_name());
        if let Some(name) = &name {
            if names.contains(name) {
                section.fail(
                    "name",
                    Problem::new(format!("{name:?} is the name of another job")),
                );
            }
            names.push(name.clone());
        }
        let expected = ExpectWithin::read(section);
        let job = JobDefinition::read(section, name, domains);
        if let (Some(job), Some(expected)) = (&job, expected) {
            expected.check(section, &job.schedule);
            expect_within.insert(job.name.clone(), expected.0);
        }
        if let Some(job) = job
            .as_ref()
            .filter(|job| job.enabled && job.kind.is_delivery())
        {
            if let Some(first) = &delivery {
                let problem = Problem::new(format!(
                    "{first:?} is an enabled realtime_delivery job already"
                ));
                section.fail(
                    "kind",
                    problem.allowed("at most one is; a second would deliver nothing more"),
                );
            } else {
                delivery = Some(job.name.clone());
            }
        }
        job
    });
    Jobs {
        definitions: jobs.into_iter().flatten().collect(),
        expect_within,
    }
}

fn job_name() -> Rule<String> {
    text("1 to 64 of a-z, 0-9 and -", |name| {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if (1..=64).contains(&name.len()) && name.chars().all(fits) {
            return Ok(name.to_owned());
        }
        let meant: String = name
            .to_lowercase()
            .chars()
            .map(|c| if fits(c) { c } else { '-' })
            .collect();
        let meant = Some(meant).filter(|meant| (1..=64).contains(&meant.len()));
        Err(Problem::new(format!("{name:?} is not a name of a job")).suggest(meant))
    })
}

impl JobDefinition {
    fn read(
        section: &mut Section<'_>,
        name: Option<String>,
        domains: &AllowedDomains,
    ) -> Option<Self> {
        let kind = section.take_required("kind", &choice(&KINDS));
        let schedule = read_schedule(section);
        let enabled = section.take("enabled", true, &flag());
        let default_timeout = match kind {
            Some(Kind::RealtimeDelivery) | None => "30s",
            Some(Kind::PurgeExpired | Kind::TimelineExport) => "1h",
        };
        let timeout = section.take(
            "timeout",
            default_timeout,
            &duration(SHORTEST_INTERVAL..=DAY * 7),
        );
        let overlap = section.take(
            "overlap",
            "skip",
            &choice(&[("skip", Overlap::Skip), ("queue", Overlap::Queue)]),
        );
        let catch_up = read_catch_up(section, kind);
        let catch_up_within = section.take(
            "catch_up_within",
            "12h",
            &duration(Duration::from_secs(1)..=DAY * 31),
        );
        let retry = section.section("retry", read_retry);
        let Some(kind) = kind else {
            // Which further keys there are depends on it.
            section.skip_rest();
            return None;
        };
        let kind = match kind {
            Kind::RealtimeDelivery => Some(JobKind::RealtimeDelivery {
                batch: section.take("batch", 100, &number(1..=10_000)),
            }),
            Kind::PurgeExpired => Some(JobKind::PurgeExpired {
                older_than: section.take(
                    "older_than",
                    "7d",
                    &duration(Duration::ZERO..=LONGEST_PERIOD),
                ),
                max_rate: section.take("max_rate", 0, &number(0..=1_000_000)),
                dry_run: section.take("dry_run", false, &flag()),
            }),
            Kind::TimelineExport => {
                ExportJob::read(section, domains).map(|job| JobKind::TimelineExport(Box::new(job)))
            }
        };
        Some(Self {
            name: name?,
            schedule: schedule?,
            enabled,
            timeout,
            overlap,
            catch_up,
            catch_up_within,
            retry,
            kind: kind?,
        })
    }
}

/// How old the last success of a job may become.
#[derive(Debug, Clone, Copy)]
struct ExpectWithin(Duration);

impl ExpectWithin {
    const KEY: &'static str = "expect_within";
    const LONGEST: Duration = Duration::from_hours(2 * 366 * 24);

    fn read(section: &mut Section<'_>) -> Option<Self> {
        let bounds = Duration::from_secs(1)..=Self::LONGEST;
        section
            .take_optional(Self::KEY, &duration(bounds))
            .map(Self)
    }

    /// What is not longer than the time between two runs would tell of silence before each of them.
    fn check(self, section: &mut Section<'_>, schedule: &Schedule) {
        let longest = longest_wait(schedule);
        if self.0 > longest {
            return;
        }
        let problem = Problem::new(format!(
            "{} is not longer than {}, which can pass between two of its times",
            short(self.0),
            short(longest)
        ));
        // Twice as long lets one time fail.
        let enough = longest.saturating_mul(2).min(Self::LONGEST);
        let enough = Some(enough).filter(|enough| *enough > longest);
        let problem = problem.allowed("a duration that is longer");
        section.fail(Self::KEY, problem.suggest(enough.map(short)));
    }
}

/// The longest time between two runs, as far as some hundred of them tell. From a fixed instant, since a configuration
/// must not be right today and wrong tomorrow.
fn longest_wait(schedule: &Schedule) -> Duration {
    const LOOKED_AT: usize = 500;
    if let Schedule::Every(interval) = schedule {
        return *interval;
    }
    let next = |after| schedule.next_after(after);
    let start = DateTime::<Utc>::from_timestamp_secs(1_767_225_600).unwrap_or_default(); // 2026-01-01
    let mut longest = Duration::ZERO;
    let mut before = next(start);
    for _ in 0..LOOKED_AT {
        let Some(at) = before else { break };
        before = next(at);
        let wait = before.map_or(Duration::ZERO, |next| {
            (next - at).to_std().unwrap_or_default()
        });
        longest = longest.max(wait);
    }
    longest
}

impl JobKind {
    /// Whether it runs on each daemon, for its own connections.
    #[must_use]
    pub fn is_delivery(&self) -> bool {
        matches!(self, Self::RealtimeDelivery { .. })
    }
}

fn read_catch_up(section: &mut Section<'_>, kind: Option<Kind>) -> CatchUp {
    let default = match kind {
        Some(Kind::RealtimeDelivery) => "skip",
        Some(Kind::PurgeExpired | Kind::TimelineExport) | None => "once",
    };
    let catch_up = section.take("catch_up", default, &choice(&CATCH_UPS));
    if kind == Some(Kind::RealtimeDelivery) && catch_up != CatchUp::Skip {
        let problem = Problem::new("is not skip");
        section.fail(
            "catch_up",
            problem.allowed(
                "\"skip\" for realtime_delivery: each poll finds what the ones before it missed",
            ),
        );
    }
    catch_up
}

fn read_schedule(section: &mut Section<'_>) -> Option<Schedule> {
    let every = section.take_given("every", &interval());
    let timezone = if section.is_given("cron") {
        section.take("timezone", "UTC", &timezone())
    } else {
        section.learn("timezone");
        if section.is_given("timezone") {
            section.take_given("timezone", &timezone());
            let problem = Problem::new("belongs to cron")
                .allowed("leave it out: every is the same in all zones");
            section.fail("timezone", problem);
        }
        Tz::UTC
    };
    let cron = section.take_given("cron", &cron(timezone));
    match (section.is_given("every"), section.is_given("cron")) {
        (true, true) => {
            section.fail(
                "cron",
                Problem::new("is set beside every").allowed("set one of the two"),
            );
        }
        (false, false) => section.fail(
            "every",
            Problem::new("is missing, and cron too")
                .allowed("every = \"1s\" or cron = \"0 30 3 * * *\""),
        ),
        _ => {}
    }
    every.or(cron)
}

fn interval() -> Rule<Schedule> {
    duration(SHORTEST_INTERVAL..=LONGEST_INTERVAL).then(|interval| {
        Schedule::every(interval).map_err(|_only_fractions_of_a_millisecond_are_left| {
            Problem::new(format!(
                "{} is not in whole milliseconds",
                humantime::format_duration(interval)
            ))
        })
    })
}

/// Its errors say what is allowed themselves, field by field.
fn cron(timezone: Tz) -> Rule<Schedule> {
    text("", move |text| {
        Schedule::cron(text, timezone).map_err(|error| Problem::new(error.to_string()))
    })
}

fn timezone() -> Rule<Tz> {
    text(
        "a zone of the IANA database, such as \"Europe/Lisbon\"",
        |text| {
            text.parse()
                .map_err(|_says_no_more: chrono_tz::ParseError| {
                    let meant =
                        nearest(text, chrono_tz::TZ_VARIANTS.iter().map(|zone| zone.name()));
                    Problem::new(format!("{text:?} is unknown")).suggest(meant)
                })
        },
    )
}

fn read_retry(section: &mut Section<'_>) -> RetryPolicy {
    let attempts = section.take("attempts", 5, &number(1..=100));
    let first = section.take("first", "1s", &duration(Duration::from_millis(1)..=DAY));
    let max = section.take("max", "5m", &duration(Duration::from_millis(1)..=DAY));
    if first > max {
        let problem = Problem::new(format!(
            "{} is less than first, {}",
            short(max),
            short(first)
        ));
        section.fail("max", problem.allowed("at least as long as first"));
    }
    RetryPolicy {
        attempts: NonZeroU32::new(attempts).unwrap_or(NonZeroU32::MIN),
        first,
        max,
    }
}

impl ExportJob {
    /// `None` is an error that has been noted.
    fn read(section: &mut Section<'_>, domains: &AllowedDomains) -> Option<Self> {
        let tenant =
            section.take_required("tenant", &parsed("the id of a tenant, 1 to 255 characters"));
        let selection = Selection::read(section);
        let audience = section.take("audience", "client", &named(&["client", "agent", "audit"]));
        let format = section.take("format", "csv", &choice(&ExportFormat::NAMES));
        let to = section.take_required(
            "to",
            &some(list(parsed("an address such as \"ops@example.com\""))),
        );
        if let (Some(tenant), Some(to)) = (&tenant, &to) {
            for address in to.iter().filter(|to| !domains.allow(tenant, to)) {
                let problem = Problem::new(format!(
                    "{:?} is not at a domain that {tenant} may have mail sent to",
                    address.to_string()
                ));
                section.fail("to", problem.allowed("those of mail.allowed_domains"));
            }
        }
        let period = section.take(
            "period",
            "7d",
            &duration(Duration::from_secs(1)..=LONGEST_PERIOD),
        );
        let when_empty = section.take(
            "when_empty",
            "skip",
            &choice(&[("skip", WhenEmpty::Skip), ("note", WhenEmpty::Note)]),
        );
        let attach = section.take("attach", true, &flag());
        Some(Self {
            tenant: tenant?,
            selection: selection?,
            audience,
            format,
            to: to?,
            period,
            when_empty,
            attach,
        })
    }
}

impl Selection {
    fn read(section: &mut Section<'_>) -> Option<Self> {
        let contacts = section.take_given("contacts", &some(list(parsed("the UUID of a contact"))));
        let active = section.optional_section("select", |section| {
            let since = section.take_required(
                "active_since",
                &duration(Duration::from_secs(1)..=LONGEST_PERIOD),
            );
            let category = section.take_optional("category", &named(CATEGORIES));
            since.map(|since| Self::Active { since, category })
        });
        match (section.is_given("contacts"), section.is_given("select")) {
            (true, true) => {
                section.fail(
                    "select",
                    Problem::new("is set beside contacts").allowed("set one of the two"),
                );
            }
            (false, false) => section.fail(
                "contacts",
                Problem::new("is missing, and select too")
                    .allowed("contacts = [\"…\"] or select = { active_since = \"7d\" }"),
            ),
            _ => {}
        }
        contacts.map(Self::Contacts).or(active.flatten())
    }
}

/// A list that is not empty.
fn some<T: 'static>(rule: Rule<Vec<T>>) -> Rule<Vec<T>> {
    rule.then(|items| {
        if items.is_empty() {
            Err(Problem::new("is empty"))
        } else {
            Ok(items)
        }
    })
}
