//! Which mail is due. Pure: rows and instants in, a decision out.

use chrono::{DateTime, TimeDelta, Utc};

use crate::storage::{AlertMail, JobAlert};

/// A trouble that lasts is told again after this time.
const REPEAT: TimeDelta = TimeDelta::hours(24);

/// What is to be done about a trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Rest,
    /// Somebody is to send this mail.
    Mail(AlertMail),
    /// What is left of it is to be forgotten without a mail.
    Forget,
}

/// A decision, and whether something is wrong at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) is_active: bool,
    pub(super) step: Step,
}

/// What is expected of a job's successes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expectation {
    /// How old the last may become.
    pub(super) within: TimeDelta,
    /// How much younger it may be than its row says.
    pub(super) slack: TimeDelta,
    /// The last sign of life that this daemon saw itself.
    pub(super) seen: Option<DateTime<Utc>>,
    /// Until when nothing is expected: a daemon that has just begun has not seen anything.
    pub(super) grace_until: DateTime<Utc>,
    /// Nothing is expected: the job is paused or disabled.
    pub(super) is_excused: bool,
}

/// What becomes of failures in a row, of which `after` are too many; one, where only an operator can
/// end them.
pub(super) fn of_failures(
    alert: &JobAlert,
    after: u32,
    is_excused: bool,
    now: DateTime<Utc>,
) -> Verdict {
    let failures = alert.failures();
    let after = if alert.waits_for_operator { 1 } else { after };
    // Somebody was told when fewer were too many.
    let is_active = failures >= u64::from(after) || (failures > 0 && alert.is_told());
    let step = if is_half_told(alert, AlertMail::Recovery) {
        // Some have read that it is right again; the rest must too, before a new alert makes sense.
        Step::Mail(AlertMail::Recovery)
    } else if failures == 0 {
        ended(alert)
    } else if is_active && !is_excused {
        lasting(alert, now)
    } else {
        Step::Rest
    };
    Verdict { is_active, step }
}

/// What becomes of a silence; without an expectation there is none.
pub(super) fn of_silence(
    alert: &JobAlert,
    expectation: Option<Expectation>,
    now: DateTime<Utc>,
) -> Verdict {
    let Some(expected) = expectation else {
        let step = if alert.is_told() || alert.attempts > 0 {
            Step::Forget
        } else {
            Step::Rest
        };
        return Verdict {
            is_active: false,
            step,
        };
    };
    let is_recent = |at: DateTime<Utc>| now.signed_duration_since(at) <= expected.within;
    let latest = (alert.since + expected.slack).max(expected.seen.unwrap_or(alert.since));
    let is_active = !expected.is_excused && now > expected.grace_until && !is_recent(latest);
    let step = if is_recent(alert.since) || is_half_told(alert, AlertMail::Recovery) {
        ended(alert)
    } else if is_active {
        lasting(alert, now)
    } else {
        Step::Rest
    };
    Verdict { is_active, step }
}

/// A job that fails and is silent recovers from both at once, which one mail tells: that of the failures.
pub(super) fn merge(silence: &mut Verdict, failure: Verdict) {
    let recovery = Step::Mail(AlertMail::Recovery);
    if silence.step == recovery && failure.step == recovery {
        silence.step = Step::Forget;
    }
}

fn ended(alert: &JobAlert) -> Step {
    if alert.is_told() || is_half_told(alert, AlertMail::Recovery) {
        Step::Mail(AlertMail::Recovery)
    } else if alert.attempts > 0 {
        // The alert reached nobody, and has become untrue.
        Step::Forget
    } else {
        Step::Rest
    }
}

fn lasting(alert: &JobAlert, now: DateTime<Utc>) -> Step {
    match alert.mailed_at {
        Some(at) if now.signed_duration_since(at) < REPEAT => Step::Rest,
        _ => Step::Mail(AlertMail::Alert),
    }
}

fn is_half_told(alert: &JobAlert, mail: AlertMail) -> bool {
    alert.mailing == Some(mail) && !alert.reached.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::AlertKind;

    const AFTER: u32 = 3;
    const ALERT: Step = Step::Mail(AlertMail::Alert);
    const RECOVERY: Step = Step::Mail(AlertMail::Recovery);

    fn at(minutes: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_780_000_000 + 60 * minutes, 0).unwrap()
    }

    fn alert(kind: AlertKind) -> JobAlert {
        JobAlert {
            job: "j".to_owned(),
            kind,
            since: at(0),
            count: 0,
            error: None,
            last_success: None,
            mails: 0,
            mailed_at: None,
            mailing: None,
            attempts: 0,
            reached: Vec::new(),
            claimed_until: None,
            waits_for_operator: false,
        }
    }

    fn failing(count: u64) -> JobAlert {
        JobAlert {
            count,
            ..alert(AlertKind::Failure)
        }
    }

    /// Of which one mail went out at minute 10.
    fn told(alert: JobAlert) -> JobAlert {
        JobAlert {
            mails: 1,
            mailed_at: Some(at(10)),
            ..alert
        }
    }

    /// Of which a mail has reached one, and not everybody.
    fn half_told(mail: AlertMail, alert: JobAlert) -> JobAlert {
        JobAlert {
            mailing: Some(mail),
            attempts: 1,
            reached: vec!["a@example.com".to_owned()],
            ..alert
        }
    }

    fn failures(alert: &JobAlert, now: DateTime<Utc>) -> (bool, Step) {
        let Verdict { is_active, step } = of_failures(alert, AFTER, false, now);
        (is_active, step)
    }

    /// With an hour expected, since minute 0.
    fn expectation() -> Expectation {
        Expectation {
            within: TimeDelta::hours(1),
            slack: TimeDelta::zero(),
            seen: None,
            grace_until: at(0),
            is_excused: false,
        }
    }

    fn silence(alert: &JobAlert, expected: Expectation, now: DateTime<Utc>) -> (bool, Step) {
        let Verdict { is_active, step } = of_silence(alert, Some(expected), now);
        (is_active, step)
    }

    #[test]
    fn failures_are_told_once_there_are_too_many() {
        assert_eq!(failures(&failing(0), at(1)), (false, Step::Rest));
        assert_eq!(failures(&failing(2), at(1)), (false, Step::Rest));
        assert_eq!(failures(&failing(3), at(1)), (true, ALERT));
        assert_eq!(failures(&failing(9), at(1)), (true, ALERT));
    }

    #[test]
    fn what_only_an_operator_can_end_is_told_at_once() {
        let waiting = |count| JobAlert {
            waits_for_operator: true,
            ..failing(count)
        };
        assert_eq!(failures(&waiting(0), at(1)), (false, Step::Rest));
        assert_eq!(failures(&waiting(1), at(1)), (true, ALERT));
        assert_eq!(failures(&told(waiting(2)), at(11)), (true, Step::Rest));
        // It is confirmed, and at work.
        assert_eq!(failures(&told(failing(1)), at(11)), (true, Step::Rest));
    }

    #[test]
    fn what_lasts_is_told_again_after_a_day() {
        let alert = told(failing(9));
        let day = 24 * 60;
        assert_eq!(failures(&alert, at(11)), (true, Step::Rest));
        assert_eq!(failures(&alert, at(9 + day)), (true, Step::Rest));
        assert_eq!(failures(&alert, at(10 + day)), (true, ALERT));
        // Not for a clock that is behind.
        assert_eq!(failures(&alert, at(-1)), (true, Step::Rest));
    }

    #[test]
    fn a_success_is_told_to_those_who_were_told_of_failures() {
        let over = |alert: JobAlert| JobAlert {
            last_success: Some(at(20)),
            ..alert
        };
        assert_eq!(failures(&over(told(failing(3))), at(21)), (false, RECOVERY));
        assert_eq!(failures(&over(failing(2)), at(21)), (false, Step::Rest));
        let half = half_told(AlertMail::Alert, failing(3));
        assert_eq!(failures(&over(half), at(21)), (false, RECOVERY));
        // An alert that reached nobody needs no recovery.
        let unsent = JobAlert {
            mailing: Some(AlertMail::Alert),
            attempts: 4,
            ..failing(3)
        };
        assert_eq!(failures(&unsent, at(21)), (true, ALERT));
        assert_eq!(failures(&over(unsent), at(21)), (false, Step::Forget));
    }

    #[test]
    fn a_failure_right_after_a_success_that_nobody_was_told_of_goes_on() {
        assert_eq!(failures(&told(failing(1)), at(11)), (true, Step::Rest));
    }

    #[test]
    fn a_recovery_that_reached_some_reaches_all_before_the_next_alert() {
        let anew = half_told(AlertMail::Recovery, told(failing(5)));
        assert_eq!(failures(&anew, at(11)), (true, RECOVERY));
    }

    #[test]
    fn failures_of_a_paused_job_are_not_mailed() {
        let verdict = of_failures(&failing(3), AFTER, true, at(1));
        assert_eq!((verdict.is_active, verdict.step), (true, Step::Rest));
    }

    #[test]
    fn silence_begins_when_the_last_success_is_older_than_expected() {
        let alert = alert(AlertKind::Silence);
        assert_eq!(silence(&alert, expectation(), at(60)), (false, Step::Rest));
        let just_after = at(60) + TimeDelta::microseconds(1);
        assert_eq!(silence(&alert, expectation(), just_after), (true, ALERT));
        assert_eq!(
            silence(&told(alert), expectation(), at(61)),
            (true, Step::Rest)
        );
    }

    #[test]
    fn what_the_row_cannot_know_yet_puts_silence_off() {
        let alert = alert(AlertKind::Silence);
        let expected = expectation();
        for put_off in [
            Expectation {
                slack: TimeDelta::minutes(5),
                ..expected
            },
            Expectation {
                seen: Some(at(5)),
                ..expected
            },
            Expectation {
                grace_until: at(65),
                ..expected
            },
        ] {
            assert_eq!(silence(&alert, put_off, at(65)), (false, Step::Rest));
            assert_eq!(silence(&alert, put_off, at(66)), (true, ALERT));
        }
        let paused = Expectation {
            is_excused: true,
            ..expected
        };
        assert_eq!(silence(&alert, paused, at(600)), (false, Step::Rest));
    }

    #[test]
    fn silence_ends_with_a_success_and_not_with_a_restart() {
        let alert = told(alert(AlertKind::Silence));
        let restarted = Expectation {
            grace_until: at(91),
            ..expectation()
        };
        assert_eq!(silence(&alert, restarted, at(90)), (false, Step::Rest));
        let ended = JobAlert {
            since: at(89),
            ..alert.clone()
        };
        assert_eq!(silence(&ended, restarted, at(90)), (false, RECOVERY));
        // Nobody expects anything any more.
        assert_eq!(of_silence(&alert, None, at(90)).step, Step::Forget);
    }

    #[test]
    fn a_job_that_failed_and_was_silent_recovers_in_one_mail() {
        let verdict = |step| Verdict {
            is_active: false,
            step,
        };
        for (of_failure, expected) in [(RECOVERY, Step::Forget), (Step::Rest, RECOVERY)] {
            let mut silence = verdict(RECOVERY);
            merge(&mut silence, verdict(of_failure));
            assert_eq!(silence.step, expected);
        }
    }
}
