//! An absent database: waited for with a growing pause, and told once, not once a second.

use std::sync::Mutex;
use std::time::Duration;

use super::{Duty, locked};
use crate::storage::StorageError;
use crate::telemetry::chain;

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Which duties wait for the database. It is away from the first that fails until none does.
#[derive(Debug, Default)]
pub(super) struct Outage {
    failures: Mutex<Vec<(Duty, u32)>>,
}

impl Outage {
    /// Notes a failure. Answers how long to wait.
    pub(super) fn note(&self, duty: Duty, error: &StorageError) -> Duration {
        let mut failures = locked(&self.failures);
        let is_first = failures.is_empty();
        if !failures.iter().any(|(failing, _)| *failing == duty) {
            failures.push((duty, 0));
        }
        let count = failures
            .iter_mut()
            .find_map(|(failing, count)| (*failing == duty).then_some(count))
            .expect("it was added above");
        let wait = FIRST_WAIT.saturating_mul(2_u32.saturating_pow(*count));
        *count = count.saturating_add(1);
        drop(failures);
        let error_text = chain(error);
        if !is_first {
            tracing::debug!(error = error_text, "the export queue is still waiting");
        } else if error.is_transient() {
            tracing::warn!(
                error = error_text,
                "the export queue waits for the database"
            );
        } else {
            tracing::error!(
                error = error_text,
                "the export queue cannot use the database"
            );
        }
        wait.min(LONGEST_WAIT)
    }

    /// The database answered.
    pub(super) fn over(&self, duty: Duty) {
        let mut failures = locked(&self.failures);
        let was_failing = !failures.is_empty();
        failures.retain(|(failing, _)| *failing != duty);
        if was_failing && failures.is_empty() {
            tracing::info!("the export queue has its database again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_grows_to_half_a_minute_and_begins_anew() {
        let outage = Outage::default();
        let waits: Vec<_> = (0..9)
            .map(|_| outage.note(Duty::Mail, &StorageError::Closed).as_millis())
            .collect();
        assert_eq!(
            waits,
            [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000]
        );
        outage.over(Duty::Mail);
        assert_eq!(outage.note(Duty::Mail, &StorageError::Closed), FIRST_WAIT);
    }
}
