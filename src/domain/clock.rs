//! Where time comes from. Rules take `now`; whoever needs "now" holds a [`Clock`].

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, Datelike as _, TimeDelta, Utc};

/// Tells the time, in UTC with microseconds.
pub trait Clock: Send + Sync + 'static {
    /// The present instant, cut to the microsecond: the precision of both databases.
    fn now(&self) -> DateTime<Utc>;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the machine's clock"
    )]
    fn now(&self) -> DateTime<Utc> {
        micros(Utc::now())
    }
}

/// A clock that moves only when told to, for tests of rules that depend on time.
#[derive(Debug, Clone)]
pub struct ManualClock(Arc<AtomicI64>);

impl ManualClock {
    /// A clock that stands at `now`.
    #[must_use]
    pub fn at(now: DateTime<Utc>) -> Self {
        Self(Arc::new(AtomicI64::new(now.timestamp_micros())))
    }

    /// Moves the clock, forward or back.
    pub fn advance(&self, by: TimeDelta) {
        let by = by
            .num_microseconds()
            .expect("a test moves the clock by less than 292,000 years");
        self.0.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(self.0.load(Ordering::SeqCst))
            .expect("a manual clock stands at a representable instant")
    }
}

/// Reads a time of RFC 3339. In UTC its year must have four digits and not be 0: RFC 3339 writes no
/// others, and both engines refuse them.
#[must_use]
pub fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    let time = micros(DateTime::parse_from_rfc3339(text).ok()?.to_utc());
    (1..=9999).contains(&time.year()).then_some(time)
}

/// Cuts `time` to whole microseconds, which both engines store exactly.
#[must_use]
pub fn micros(time: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_year_from_1_to_9999_in_utc() {
        for text in [
            "0001-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999Z",
            "9999-12-31T23:59:59+01:00",
        ] {
            assert!(parse_time(text).is_some(), "{text}");
        }
        for text in [
            "0000-12-31T23:59:59Z",
            "0001-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59-00:01",
            "2026-01-31",
        ] {
            assert!(parse_time(text).is_none(), "{text}");
        }
    }
}
