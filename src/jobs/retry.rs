//! How long a failed run waits before it is tried again.
//!
//! Exponential backoff with *full* jitter: the wait is drawn evenly from zero to the backoff. Drawing from the whole
//! range spreads daemons that failed together best, for the least work and nearly the shortest time; measured in
//! "Exponential Backoff And Jitter", AWS Architecture Blog,
//! <https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>.
//! Pure: chance is passed in. *Whether* an error may be retried is decided where errors become `JobError`.

use std::num::NonZeroU32;
use std::time::Duration;

/// How often and how fast a failed run is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// All attempts, the first one among them: 1 means that nothing is retried.
    pub attempts: NonZeroU32,
    /// The backoff after the first attempt; it doubles with each further one.
    pub first: Duration,
    /// What the backoff does not grow beyond.
    pub max: Duration,
}

impl RetryPolicy {
    /// How long to wait after the `attempt`th attempt (from 1) has failed; `None` when that was the last.
    ///
    /// `random` is a number from 0 up to, not including, 1. Anything else is brought into that range, so that a bad
    /// source of chance makes the wait short or long, never a panic.
    #[must_use]
    pub fn delay(&self, attempt: u32, random: f64) -> Option<Duration> {
        if attempt >= self.attempts.get() {
            return None;
        }
        let doublings = attempt.saturating_sub(1);
        let backoff = self
            .first
            .saturating_mul(2_u32.saturating_pow(doublings))
            .min(self.max);
        let random = if random.is_nan() {
            0.0
        } else {
            random.clamp(0.0, 1.0)
        };
        // `mul_f64` panics only past `Duration::MAX`, and rounding up may not pass the policy's own ceiling.
        Some(if random < 1.0 {
            Duration::try_from_secs_f64(backoff.as_secs_f64() * random)
                .map_or(backoff, |wait| wait.min(backoff))
        } else {
            backoff
        })
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: NonZeroU32::new(5).expect("five is not zero"),
            first: Duration::from_secs(1),
            max: Duration::from_mins(5),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALMOST_ONE: f64 = 1.0 - f64::EPSILON;

    fn policy(attempts: u32, first: Duration, max: Duration) -> RetryPolicy {
        RetryPolicy {
            attempts: NonZeroU32::new(attempts).unwrap(),
            first,
            max,
        }
    }

    #[test]
    fn the_backoff_doubles_up_to_its_ceiling() {
        let policy = policy(20, Duration::from_secs(1), Duration::from_secs(10));
        let halves: Vec<_> = (1..=6).map(|attempt| policy.delay(attempt, 0.5)).collect();
        let seconds = [0.5, 1.0, 2.0, 4.0, 5.0, 5.0];
        assert_eq!(halves, seconds.map(|s| Some(Duration::from_secs_f64(s))));
    }

    #[test]
    fn the_last_attempt_is_not_followed_by_another() {
        let policy = RetryPolicy::default();
        assert!(policy.delay(4, 0.0).is_some());
        assert_eq!(policy.delay(5, 0.0), None);
        assert_eq!(policy.delay(u32::MAX, 0.0), None);
    }

    #[test]
    fn a_single_attempt_is_never_retried() {
        let policy = policy(1, Duration::from_secs(1), Duration::from_secs(1));
        assert_eq!(policy.delay(1, 0.5), None);
    }

    #[test]
    fn the_jitter_covers_the_whole_range() {
        let policy = RetryPolicy::default();
        assert_eq!(policy.delay(1, 0.0), Some(Duration::ZERO));
        let longest = policy.delay(1, ALMOST_ONE).unwrap();
        assert!(longest > Duration::from_millis(999) && longest <= Duration::from_secs(1));
    }

    #[test]
    fn nothing_overflows() {
        let policy = policy(u32::MAX, Duration::MAX, Duration::MAX);
        for attempt in [0, 1, 2, 31, 32, 33, u32::MAX - 1] {
            for random in [
                0.0,
                0.5,
                ALMOST_ONE,
                1.0,
                2.0,
                -1.0,
                f64::NAN,
                f64::INFINITY,
            ] {
                assert!(policy.delay(attempt, random).unwrap() <= Duration::MAX);
            }
        }
    }

    #[test]
    fn many_attempts_stay_at_the_ceiling() {
        let policy = policy(u32::MAX, Duration::from_millis(1), Duration::from_mins(5));
        assert_eq!(policy.delay(1_000_000, 0.5), Some(Duration::from_secs(150)));
    }
}
