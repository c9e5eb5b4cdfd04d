//! How long an expired event stays before the purge takes it.

use chrono::{DateTime, TimeDelta, Utc};

/// The rule of the purge: what expired strictly before `now - older_than` goes, nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    older_than: TimeDelta,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            older_than: TimeDelta::days(7),
        }
    }
}

impl Retention {
    /// Keeps expired events for `older_than` more.
    #[must_use]
    pub fn new(older_than: TimeDelta) -> Self {
        Self { older_than }
    }

    /// The instant before which an expiry is due for the purge.
    #[must_use]
    pub fn cutoff(self, now: DateTime<Utc>) -> DateTime<Utc> {
        now.checked_sub_signed(self.older_than)
            .unwrap_or(DateTime::<Utc>::MIN_UTC)
    }

    /// Whether an event that expires at `expires_at` is due.
    #[must_use]
    pub fn takes(self, expires_at: Option<DateTime<Utc>>, now: DateTime<Utc>) -> bool {
        expires_at.is_some_and(|expires_at| expires_at < self.cutoff(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cutoff_is_strict_to_the_microsecond() {
        let now = DateTime::from_timestamp_micros(1_750_000_000_123_456).unwrap();
        let cutoff = now - TimeDelta::days(7);
        let takes = |at| Retention::default().takes(Some(at), now);
        assert!(takes(cutoff - TimeDelta::microseconds(1)));
        assert!(!takes(cutoff));
        assert!(!takes(cutoff + TimeDelta::microseconds(1)));
    }

    #[test]
    fn what_never_expires_is_never_taken() {
        assert!(!Retention::new(TimeDelta::zero()).takes(None, DateTime::<Utc>::MAX_UTC));
    }

    #[test]
    fn a_retention_longer_than_time_itself_takes_nothing() {
        let now = DateTime::from_timestamp_micros(0).unwrap();
        assert!(!Retention::new(TimeDelta::MAX).takes(Some(now), now));
    }
}
