//! When a job is due: a fixed interval, or a cron expression in a time zone.
//!
//! Pure: no clock is read here, the planner passes the instant after which it wants the next time. `croner` says which
//! *local* times an expression names; which instants those are when a zone shifts its clocks is decided here, since
//! croner (4.0.3) skips lists and ranges that fall into a gap, drops a fixed time whose gap ends on another day
//! (`America/Nuuk`, 23:00 to midnight) and gives up on gaps of more than two hours (`Pacific/Apia` skipped a whole day).

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Datelike, LocalResult, NaiveDate, NaiveDateTime, TimeDelta, TimeZone, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use thiserror::Error;

/// The shortest interval that [`Schedule::every`] takes.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(100);

/// The longest interval that [`Schedule::every`] takes: whatever is rarer than once a year is a cron expression.
pub const LONGEST_INTERVAL: Duration = Duration::from_hours(366 * 24);

/// The names of the six fields, in their order, for messages.
const FIELDS: [&str; 6] = [
    "second",
    "minute",
    "hour",
    "day of month",
    "month",
    "day of week",
];

/// What each of the six fields allows, for messages.
const ALLOWED: [&str; 6] = [
    "0-59 with * , - /",
    "0-59 with * , - /",
    "0-23 with * , - /",
    "1-31 with * , - / ? L W",
    "1-12 or JAN-DEC with * , - /",
    "0-7 or SUN-SAT with * , - / ? # L",
];

/// The times at which a job is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Schedule {
    /// Every so often, aligned to the Unix epoch, so that all daemons name the same instants without talking.
    Every(Duration),
    /// At the local times that a cron expression names.
    Cron {
        /// Boxed: croner's bit fields are some 400 bytes, an interval is 16.
        expression: Box<Expression>,
        /// The zone whose local times the expression names.
        timezone: Tz,
    },
}

/// A cron expression that parses and fires at least once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expression {
    cron: Cron,
    /// As the operator wrote it; croner keeps only its upper-case form with names turned into numbers.
    text: String,
    repeats: Repeats,
}

/// What a shift of the clocks means for an expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeats {
    /// Only plain numbers in second, minute and hour: each names one moment of the day.
    AtFixedTimes,
    /// Wildcards, steps or ranges within some of the hours.
    WithinHours,
    /// All 24 hours: its rhythm goes on over any shift, so a gap takes nothing from it.
    EveryHour,
}

/// Why a schedule was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// The interval is out of bounds, or no whole number of milliseconds.
    #[error("{} is no interval; 100ms to 366days in whole milliseconds", humantime::format_duration(*.0))]
    Interval(Duration),
    /// Five fields: the Unix form, which has no seconds.
    #[error(
        "{text:?} has five fields; six are needed, seconds first; did you mean {suggestion:?}?"
    )]
    WithoutSeconds {
        /// What was given.
        text: String,
        /// The same with seconds.
        suggestion: String,
    },
    /// A nickname such as `@daily`.
    #[error(
        "{text:?} is a nickname; six fields are needed, seconds first; did you mean {suggestion:?}?"
    )]
    Nickname {
        /// What was given.
        text: String,
        /// The same in six fields.
        suggestion: &'static str,
    },
    /// Neither five nor six fields.
    #[error(
        "{text:?} has {count} fields; six are needed: second, minute, hour, day of month, month, day of week"
    )]
    FieldCount {
        /// What was given.
        text: String,
        /// How many fields that has.
        count: usize,
    },
    /// One field does not parse.
    #[error("{text:?} is not a cron expression ({field} {value:?}); {field} takes {allowed}")]
    Field {
        /// What was given.
        text: String,
        /// The name of the field.
        field: &'static str,
        /// The text of the field.
        value: String,
        /// What the field takes.
        allowed: &'static str,
    },
    /// No instant matches, such as 30 February.
    #[error("{0:?} never fires; name a date that exists")]
    NeverFires(String),
}

impl Schedule {
    /// A schedule that is due each `interval`, counted from the Unix epoch.
    ///
    /// # Errors
    /// When the interval is out of bounds or not in whole milliseconds: times are kept with microseconds, and an
    /// interval that does not divide evenly into them would drift.
    pub fn every(interval: Duration) -> Result<Self, ScheduleError> {
        let whole = interval.subsec_nanos().is_multiple_of(1_000_000);
        if whole && (SHORTEST_INTERVAL..=LONGEST_INTERVAL).contains(&interval) {
            Ok(Self::Every(interval))
        } else {
            Err(ScheduleError::Interval(interval))
        }
    }

    /// A schedule that is due when the local time in `timezone` matches the six fields of `text`, seconds first.
    ///
    /// # Errors
    /// When `text` is not such an expression, or never matches.
    pub fn cron(text: &str, timezone: Tz) -> Result<Self, ScheduleError> {
        Ok(Self::Cron {
            expression: Box::new(Expression::parse(text)?),
            timezone,
        })
    }

    /// The first due time strictly after `after`; `None` when the calendar ends before there is one.
    #[must_use]
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Every(interval) => next_multiple(*interval, after),
            Self::Cron {
                expression,
                timezone,
            } => expression.next_after(after, *timezone),
        }
    }

    /// What it means, in words, such as `At 03:30`.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Every(_) => self.to_string(),
            Self::Cron { expression, .. } => {
                let words = expression.cron.describe();
                words.trim_end_matches('.').to_owned()
            }
        }
    }

    /// The zone in which the schedule thinks; intervals are the same in every zone and say UTC.
    #[must_use]
    pub fn timezone(&self) -> Tz {
        match self {
            Self::Every(_) => Tz::UTC,
            Self::Cron { timezone, .. } => *timezone,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Every(interval) => write!(f, "every {}", humantime::format_duration(*interval)),
            Self::Cron { expression, .. } => f.write_str(&expression.text),
        }
    }
}

/// The first multiple of `interval` since the epoch that lies after `after`.
fn next_multiple(interval: Duration, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
    // It fits by far: `Schedule::every` stops at a year.
    let interval = i64::try_from(interval.as_micros()).ok()?;
    // `timestamp_micros` rounds down, before the epoch too, so a fraction of a microsecond cannot repeat a time.
    let elapsed = after.timestamp_micros().div_euclid(interval);
    let next = elapsed.checked_add(1)?.checked_mul(interval)?;
    DateTime::from_timestamp_micros(next)
}

impl Expression {
    fn parse(text: &str) -> Result<Self, ScheduleError> {
        let fields: Vec<&str> = text.split_whitespace().collect();
        if let [one] = fields[..]
            && let Some(suggestion) = six_fields_of_nickname(one)
        {
            return Err(ScheduleError::Nickname {
                text: text.to_owned(),
                suggestion,
            });
        }
        if fields.len() == 5 {
            return Err(ScheduleError::WithoutSeconds {
                text: text.to_owned(),
                suggestion: format!("0 {}", fields.join(" ")),
            });
        }
        if fields.len() != FIELDS.len() {
            return Err(ScheduleError::FieldCount {
                text: text.to_owned(),
                count: fields.len(),
            });
        }

        // Croner names neither the field nor the value that it refuses, so each is tried alone.
        for (index, field) in fields.iter().enumerate() {
            if !is_field(index, field) {
                return Err(ScheduleError::Field {
                    text: text.to_owned(),
                    field: FIELDS[index],
                    value: (*field).to_owned(),
                    allowed: ALLOWED[index],
                });
            }
        }
        let never_fires = || ScheduleError::NeverFires(text.to_owned());
        let cron = parser()
            .parse(&fields.join(" "))
            .map_err(|_refused_only_as_a_whole| never_fires())?;
        let expression = Self {
            repeats: Repeats::of(&cron, &fields),
            cron,
            text: text.trim().to_owned(),
        };
        // The calendar repeats itself every 400 years, so where the search begins makes no difference.
        match expression.next_local(
            NaiveDate::from_ymd_opt(2000, 1, 1).and_then(|d| d.and_hms_opt(0, 0, 0)),
            true,
        ) {
            Some(_) => Ok(expression),
            None => Err(never_fires()),
        }
    }

    /// The next local time that the fields name, as if no clock were ever shifted.
    fn next_local(&self, from: Option<NaiveDateTime>, inclusive: bool) -> Option<NaiveDateTime> {
        // The one error left for a parsed expression is the end of croner's search, in the year 5000.
        self.cron.find_next_occurrence(&from?, inclusive).ok()
    }

    fn next_after(&self, after: DateTime<Utc>, zone: Tz) -> Option<DateTime<Utc>> {
        // Outside of what croner searches; chrono panics on local times at the ends of its own calendar.
        if !(croner::YEAR_LOWER_LIMIT..croner::YEAR_UPPER_LIMIT).contains(&after.year()) {
            return None;
        }
        let next = self.walk(after.with_timezone(&zone).naive_local(), false, after, zone);

        // A walk along the wall clock never steps back. In the first half of a repeated hour the second half is still
        // to come, with local times that the walk has already passed.
        let Some(again) = start_of_second_half(after, zone) else {
            return next;
        };
        if self.repeats == Repeats::AtFixedTimes {
            return next;
        }
        let before = again.checked_sub_signed(TimeDelta::microseconds(1))?;
        let repeated = self.walk(again.with_timezone(&zone).naive_local(), true, before, zone);
        match (next, repeated) {
            (Some(next), Some(repeated)) => Some(next.min(repeated)),
            (next, repeated) => next.or(repeated),
        }
    }

    /// The first instant after `after` whose local time matches, walking the wall clock from `local`.
    fn walk(
        &self,
        mut local: NaiveDateTime,
        mut inclusive: bool,
        after: DateTime<Utc>,
        zone: Tz,
    ) -> Option<DateTime<Utc>> {
        loop {
            local = self.next_local(Some(local), inclusive)?;
            inclusive = false;
            match zone.from_local_datetime(&local) {
                LocalResult::Single(instant) => {
                    let instant = instant.with_timezone(&Utc);
                    if instant > after {
                        return Some(instant);
                    }
                }
                LocalResult::Ambiguous(first, second) => {
                    let first = first.with_timezone(&Utc);
                    if first > after {
                        return Some(first);
                    }
                    let second = second.with_timezone(&Utc);
                    if second > after && self.repeats != Repeats::AtFixedTimes {
                        return Some(second);
                    }
                }
                LocalResult::None => {
                    let end = end_of_gap(local, zone)?;
                    if self.repeats != Repeats::EveryHour && end > after {
                        return Some(end);
                    }
                    // Straight to the end, not through 3,600 seconds that do not exist.
                    local = end.with_timezone(&zone).naive_local();
                    inclusive = true;
                }
            }
        }
    }
}

impl Repeats {
    fn of(cron: &Cron, fields: &[&str]) -> Self {
        let plain = |field: &&str| field.chars().all(|c| c.is_ascii_digit() || c == ',');
        if fields[..3].iter().all(plain) {
            Self::AtFixedTimes
        } else if cron.pattern.hours.values().len() == 24 {
            Self::EveryHour
        } else {
            Self::WithinHours
        }
    }
}

fn parser() -> CronParser {
    CronParser::builder()
        .seconds(Seconds::Required)
        .year(Year::Disallowed)
        .build()
}

/// Whether `field` is one that croner takes in place `index`.
fn is_field(index: usize, field: &str) -> bool {
    // Croner replaces names of days and months in every field, and passes over empty items of a list: `MON 0 3 * * *`
    // would run at second 1.
    let named = index >= 4 && field.chars().any(|c| c.is_ascii_alphabetic());
    let letters_fit = named
        || field.chars().all(|c| {
            !c.is_ascii_alphabetic() || (index == 3 && matches!(c, 'L' | 'l' | 'W' | 'w'))
        });
    let without_holes = field.split(',').all(|item| !item.is_empty());
    let mut fields = ["*"; 6];
    fields[index] = field;
    letters_fit && without_holes && parser().parse(&fields.join(" ")).is_ok()
}

fn six_fields_of_nickname(text: &str) -> Option<&'static str> {
    Some(match text.to_ascii_lowercase().as_str() {
        "@yearly" | "@annually" => "0 0 0 1 1 *",
        "@monthly" => "0 0 0 1 * *",
        "@weekly" => "0 0 0 * * 0",
        "@daily" | "@midnight" => "0 0 0 * * *",
        "@hourly" => "0 0 * * * *",
        _ => return None,
    })
}

/// The first instant whose local time lies past `skipped`, a local time that does not exist in `zone`.
fn end_of_gap(skipped: NaiveDateTime, zone: Tz) -> Option<DateTime<Utc>> {
    // No zone is more than 15 hours off UTC and no gap is longer than a day, so the end lies in this window, in which
    // "is past `skipped`" turns true once. `chrono-tz` does not tell its transitions, so they are found by halving.
    let around = skipped.and_utc().timestamp();
    let is_past = |at: i64| {
        DateTime::from_timestamp(at, 0)
            .is_some_and(|at| at.with_timezone(&zone).naive_local() > skipped)
    };
    let end = first_true(around - 15 * 3_600, around + 40 * 3_600, is_past);
    DateTime::from_timestamp(end, 0)
}

/// Where the repetition begins, when `after` lies in the first half of a local time that is shown twice.
fn start_of_second_half(after: DateTime<Utc>, zone: Tz) -> Option<DateTime<Utc>> {
    let local = after.with_timezone(&zone).naive_local();
    let LocalResult::Ambiguous(first, second) = zone.from_local_datetime(&local) else {
        return None;
    };
    if after >= second {
        return None;
    }
    let offset = first.naive_local() - first.naive_utc();
    let is_shifted = |at: i64| {
        DateTime::from_timestamp(at, 0)
            .is_some_and(|at| at.with_timezone(&zone).naive_local() - at.naive_utc() != offset)
    };
    // Rounded up to a second that is surely past the shift.
    let start = first_true(first.timestamp(), second.timestamp() + 1, is_shifted);
    DateTime::from_timestamp(start, 0)
}

/// The first number after `before` and up to `until` for which `holds` is true; it must be true for `until` and, once
/// true, stay so.
fn first_true(mut before: i64, mut until: i64, holds: impl Fn(i64) -> bool) -> i64 {
    while before + 1 < until {
        let middle = before.midpoint(until);
        if holds(middle) {
            until = middle;
        } else {
            before = middle;
        }
    }
    until
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn cron(text: &str, zone: &str) -> Schedule {
        Schedule::cron(text, zone.parse().unwrap()).unwrap()
    }

    /// The due times after `after` until `until`, as text.
    fn due(schedule: &Schedule, after: &str, until: &str) -> Vec<String> {
        let until = at(until);
        std::iter::successors(schedule.next_after(at(after)), |at| {
            schedule.next_after(*at)
        })
        .take_while(|at| *at <= until)
        .map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
        .collect()
    }

    #[test]
    fn a_schedule_is_told_in_words() {
        for (text, words) in [
            ("0 30 3 * * *", "At 03:30"),
            (
                "0 */15 9-17 * * MON-FRI",
                "At every 15 minutes, of hour 9-17, on Monday, Tuesday, Wednesday, Thursday, and Friday",
            ),
            ("0 0 6 L * *", "At 06:00, on the last day of the month"),
        ] {
            assert_eq!(cron(text, "Europe/Lisbon").words(), words);
        }
        let every = Schedule::every(Duration::from_secs(90)).unwrap();
        assert_eq!(every.words(), "every 1m 30s");
    }

    #[test]
    fn an_interval_is_aligned_to_the_epoch_and_strictly_after() {
        let schedule = Schedule::every(Duration::from_secs(7)).unwrap();
        assert_eq!(
            schedule.next_after(at("1970-01-01T00:00:00Z")),
            Some(at("1970-01-01T00:00:07Z"))
        );
        assert_eq!(
            schedule.next_after(at("1970-01-01T00:00:06.999999999Z")),
            Some(at("1970-01-01T00:00:07Z"))
        );
        assert_eq!(
            schedule.next_after(at("1970-01-01T00:00:07Z")),
            Some(at("1970-01-01T00:00:14Z"))
        );
        assert_eq!(
            schedule.next_after(at("1970-01-01T00:00:07.000000001Z")),
            Some(at("1970-01-01T00:00:14Z"))
        );
        assert_eq!(
            schedule.next_after(at("1969-12-31T23:59:59Z")),
            Some(at("1970-01-01T00:00:00Z"))
        );
    }

    #[test]
    fn an_interval_below_a_second_is_kept_to_the_millisecond() {
        let schedule = Schedule::every(Duration::from_millis(250)).unwrap();
        assert_eq!(
            schedule.next_after(at("2026-01-01T00:00:00.250Z")),
            Some(at("2026-01-01T00:00:00.500Z"))
        );
    }

    #[test]
    fn intervals_out_of_bounds_are_refused() {
        for refused in [
            Duration::ZERO,
            Duration::from_millis(99),
            Duration::from_micros(100_500),
            Duration::from_hours(366 * 24) + Duration::from_millis(1),
        ] {
            assert_eq!(
                Schedule::every(refused),
                Err(ScheduleError::Interval(refused))
            );
        }
        for taken in [SHORTEST_INTERVAL, LONGEST_INTERVAL] {
            assert!(Schedule::every(taken).is_ok());
        }
    }

    #[test]
    fn the_end_of_the_calendar_is_none() {
        assert_eq!(
            Schedule::every(Duration::from_secs(1))
                .unwrap()
                .next_after(DateTime::<Utc>::MAX_UTC),
            None
        );
        for end in [DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC] {
            assert_eq!(cron("0 0 0 1 1 *", "Asia/Tokyo").next_after(end), None);
        }
    }

    #[test]
    fn a_schedule_is_shown_as_it_was_written() {
        assert_eq!(
            Schedule::every(Duration::from_secs(1)).unwrap().to_string(),
            "every 1s"
        );
        assert_eq!(
            cron("0 30 3 * * mon", "Europe/Lisbon").to_string(),
            "0 30 3 * * mon"
        );
        assert_eq!(
            cron("0 30 3 * * mon", "Europe/Lisbon").timezone(),
            Tz::Europe__Lisbon
        );
    }

    #[test]
    fn a_cron_time_is_strictly_after() {
        let daily = cron("0 30 3 * * *", "UTC");
        assert_eq!(
            daily.next_after(at("2026-07-01T03:29:59.999999Z")),
            Some(at("2026-07-01T03:30:00Z"))
        );
        assert_eq!(
            daily.next_after(at("2026-07-01T03:30:00Z")),
            Some(at("2026-07-02T03:30:00Z"))
        );
        assert_eq!(
            daily.next_after(at("2026-07-01T03:30:00.000001Z")),
            Some(at("2026-07-02T03:30:00Z"))
        );
    }

    #[test]
    fn last_days_nearest_weekdays_and_nth_weekdays_are_understood() {
        let from = at("2026-02-01T00:00:00Z");
        for (text, expected) in [
            ("0 0 0 L * *", "2026-02-28T00:00:00Z"),
            ("0 0 0 15W * *", "2026-02-16T00:00:00Z"),
            ("0 0 0 * * FRI#2", "2026-02-13T00:00:00Z"),
            ("0 0 0 * * 5L", "2026-02-27T00:00:00Z"),
            ("0 0 0 29 2 *", "2028-02-29T00:00:00Z"),
            ("0 0 0 ? FEB-APR 7", "2026-02-08T00:00:00Z"),
        ] {
            assert_eq!(
                cron(text, "UTC").next_after(from),
                Some(at(expected)),
                "{text}"
            );
        }
    }

    #[test]
    fn a_refused_expression_says_what_to_write() {
        for (text, expected) in [
            (
                "30 3 * * *",
                r#""30 3 * * *" has five fields; six are needed, seconds first; did you mean "0 30 3 * * *"?"#,
            ),
            (
                "@daily",
                r#""@daily" is a nickname; six fields are needed, seconds first; did you mean "0 0 0 * * *"?"#,
            ),
            (
                "* *",
                r#""* *" has 2 fields; six are needed: second, minute, hour, day of month, month, day of week"#,
            ),
            (
                "",
                r#""" has 0 fields; six are needed: second, minute, hour, day of month, month, day of week"#,
            ),
            (
                "0 0 0 1 1 * 2026",
                r#""0 0 0 1 1 * 2026" has 7 fields; six are needed: second, minute, hour, day of month, month, day of week"#,
            ),
            (
                "0 99 * * * *",
                r#""0 99 * * * *" is not a cron expression (minute "99"); minute takes 0-59 with * , - /"#,
            ),
            (
                "MON 0 3 * * *",
                r#""MON 0 3 * * *" is not a cron expression (second "MON"); second takes 0-59 with * , - /"#,
            ),
            (
                "0 0 3, * * *",
                r#""0 0 3, * * *" is not a cron expression (hour "3,"); hour takes 0-23 with * , - /"#,
            ),
            (
                "0 0 0 30 2 *",
                r#""0 0 0 30 2 *" never fires; name a date that exists"#,
            ),
            (
                "0 0 0 31 4,6,9,11 *",
                r#""0 0 0 31 4,6,9,11 *" never fires; name a date that exists"#,
            ),
        ] {
            assert_eq!(
                Schedule::cron(text, Tz::UTC).unwrap_err().to_string(),
                expected
            );
        }
    }

    #[test]
    fn a_fixed_time_in_the_gap_runs_at_the_first_instant_after_it() {
        for (text, zone, after, expected) in [
            // 01:00 becomes 02:00
            (
                "0 30 1 * * *",
                "Europe/Lisbon",
                "2026-03-28T12:00:00Z",
                "2026-03-29T01:00:00Z",
            ),
            // 02:00 becomes 03:00
            (
                "0 30 2 * * *",
                "America/New_York",
                "2026-03-07T12:00:00Z",
                "2026-03-08T07:00:00Z",
            ),
            (
                "0 0 2 * * *",
                "America/New_York",
                "2026-03-07T12:00:00Z",
                "2026-03-08T07:00:00Z",
            ),
            // 02:00 becomes 02:30
            (
                "0 15 2 * * *",
                "Australia/Lord_Howe",
                "2026-10-03T00:00:00Z",
                "2026-10-03T15:30:00Z",
            ),
            // midnight becomes 01:00
            (
                "0 0 0 * * *",
                "Asia/Beirut",
                "2026-03-28T12:00:00Z",
                "2026-03-28T22:00:00Z",
            ),
            // 01:00 becomes 03:00
            (
                "0 0 1 * * *",
                "Antarctica/Troll",
                "2026-03-28T12:00:00Z",
                "2026-03-29T01:00:00Z",
            ),
            // 23:00 on Saturday becomes 00:00 on Sunday
            (
                "0 30 23 * * SAT",
                "America/Nuuk",
                "2026-03-28T12:00:00Z",
                "2026-03-29T01:00:00Z",
            ),
            // the whole of 30 December 2011 was skipped
            (
                "0 0 12 30 12 *",
                "Pacific/Apia",
                "2011-12-29T12:00:00Z",
                "2011-12-30T10:00:00Z",
            ),
        ] {
            assert_eq!(
                cron(text, zone).next_after(at(after)),
                Some(at(expected)),
                "{text} {zone}"
            );
        }
    }

    #[test]
    fn a_time_after_the_gap_is_not_moved() {
        let daily = cron("0 30 3 * * *", "America/New_York");
        assert_eq!(
            due(&daily, "2026-03-07T00:00:00Z", "2026-03-10T00:00:00Z"),
            [
                "2026-03-07T08:30:00Z",
                "2026-03-08T07:30:00Z",
                "2026-03-09T07:30:00Z"
            ]
        );
    }

    #[test]
    fn several_times_in_one_gap_run_once() {
        let listed = cron("0 0,20,40 2 * * *", "America/New_York");
        assert_eq!(
            due(&listed, "2026-03-08T05:00:00Z", "2026-03-09T06:10:00Z"),
            ["2026-03-08T07:00:00Z", "2026-03-09T06:00:00Z"]
        );
        let stepped = cron("0 */15 2 * * *", "America/New_York");
        assert_eq!(
            due(&stepped, "2026-03-08T05:00:00Z", "2026-03-09T06:10:00Z"),
            ["2026-03-08T07:00:00Z", "2026-03-09T06:00:00Z"]
        );
        // 02:30 moves to where 03:00 is due anyway
        let both = cron("0 0,30 2,3 * * *", "America/New_York");
        assert_eq!(
            due(&both, "2026-03-08T05:00:00Z", "2026-03-08T12:00:00Z"),
            ["2026-03-08T07:00:00Z", "2026-03-08T07:30:00Z"]
        );
    }

    #[test]
    fn an_hourly_rhythm_goes_on_over_the_gap() {
        let hourly = cron("0 30 * * * *", "America/New_York");
        assert_eq!(
            due(&hourly, "2026-03-08T06:00:00Z", "2026-03-08T09:00:00Z"),
            [
                "2026-03-08T06:30:00Z",
                "2026-03-08T07:30:00Z",
                "2026-03-08T08:30:00Z"
            ]
        );
    }

    #[test]
    fn a_fixed_time_that_is_repeated_runs_once_at_its_first() {
        for (text, zone, after, until, expected) in [
            (
                "0 30 1 * * *",
                "Europe/Lisbon",
                "2026-10-24T12:00:00Z",
                "2026-10-26T00:00:00Z",
                "2026-10-25T00:30:00Z",
            ),
            (
                "0 30 1 * * *",
                "America/New_York",
                "2026-10-31T12:00:00Z",
                "2026-11-02T00:00:00Z",
                "2026-11-01T05:30:00Z",
            ),
            (
                "0 45 1 * * *",
                "Australia/Lord_Howe",
                "2026-04-04T00:00:00Z",
                "2026-04-05T00:00:00Z",
                "2026-04-04T14:45:00Z",
            ),
            (
                "0 30 23 * * *",
                "Asia/Beirut",
                "2026-10-24T00:00:00Z",
                "2026-10-25T00:00:00Z",
                "2026-10-24T20:30:00Z",
            ),
        ] {
            assert_eq!(
                due(&cron(text, zone), after, until),
                [expected],
                "{text} {zone}"
            );
        }
    }

    #[test]
    fn a_list_of_fixed_times_runs_once_each_in_the_repeated_hour() {
        let listed = cron("0 0,30 1 * * *", "America/New_York");
        assert_eq!(
            due(&listed, "2026-11-01T00:00:00Z", "2026-11-01T12:00:00Z"),
            ["2026-11-01T05:00:00Z", "2026-11-01T05:30:00Z"]
        );
        // asked from between the two, and from within the second half
        assert_eq!(
            listed.next_after(at("2026-11-01T05:45:00Z")),
            Some(at("2026-11-02T06:00:00Z"))
        );
        assert_eq!(
            listed.next_after(at("2026-11-01T06:10:00Z")),
            Some(at("2026-11-02T06:00:00Z"))
        );
    }

    #[test]
    fn intervals_and_wildcards_run_in_both_halves() {
        let stepped = cron("0 */30 * * * *", "America/New_York");
        assert_eq!(
            due(&stepped, "2026-11-01T04:30:00Z", "2026-11-01T07:30:00Z"),
            [
                "2026-11-01T05:00:00Z",
                "2026-11-01T05:30:00Z",
                "2026-11-01T06:00:00Z",
                "2026-11-01T06:30:00Z",
                "2026-11-01T07:00:00Z",
                "2026-11-01T07:30:00Z",
            ]
        );
        let within = cron("0 */30 1 * * *", "Europe/Lisbon");
        assert_eq!(
            due(&within, "2026-10-25T00:00:00Z", "2026-10-25T03:00:00Z"),
            [
                "2026-10-25T00:30:00Z",
                "2026-10-25T01:00:00Z",
                "2026-10-25T01:30:00Z"
            ]
        );
        let half_an_hour = cron("0 */15 * * * *", "Australia/Lord_Howe");
        assert_eq!(
            due(
                &half_an_hour,
                "2026-04-04T14:00:00Z",
                "2026-04-04T16:00:00Z"
            )
            .len(),
            8
        );
        let each_second = cron("* * * * * *", "Asia/Beirut");
        assert_eq!(
            due(&each_second, "2026-10-24T20:59:58Z", "2026-10-24T21:00:01Z").len(),
            3
        );
    }

    #[test]
    fn in_utc_every_time_is_what_it_says() {
        let hourly = cron("0 0 */6 * * *", "UTC");
        assert_eq!(
            due(&hourly, "2026-03-29T00:00:00Z", "2026-03-29T23:59:59Z"),
            [
                "2026-03-29T06:00:00Z",
                "2026-03-29T12:00:00Z",
                "2026-03-29T18:00:00Z"
            ]
        );
    }
}
