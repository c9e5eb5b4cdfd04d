//! What the mails say.

use chrono::{DateTime, SecondsFormat, Utc};
use lettre::message::Mailbox;
use sha2::{Digest, Sha256};

use crate::jobs::what_to_do;
use crate::mail::{Letter, escaped};
use crate::storage::{AlertKind, AlertMail, JobAlert};

/// As much of an error as a mail carries, in characters.
const LONGEST_ERROR: usize = 2_000;

/// What a letter needs beside the trouble.
pub(super) struct Stationery<'a> {
    pub(super) from: &'a Mailbox,
    pub(super) date: DateTime<Utc>,
    /// How old a success of this job may become, as text.
    pub(super) within: Option<&'a str>,
}

/// The letter to `to`.
pub(super) fn compose(
    alert: &JobAlert,
    mail: AlertMail,
    to: &str,
    paper: &Stationery<'_>,
) -> Letter {
    let (subject, opening) = words(alert, mail, paper);
    let facts = facts(alert, mail, paper);
    let hint = format!("Its history: timelined jobs runs {}", alert.job);
    let mut text = format!("{opening}\n\n");
    let mut html = format!(
        "<!doctype html>\n<html><body>\n<p>{}</p>\n<table>\n",
        escaped(&opening)
    );
    for (label, value) in facts {
        text.push_str(&format!("{label}: {value}\n"));
        html.push_str(&format!(
            "<tr><th align=\"left\">{label}</th><td>{}</td></tr>\n",
            escaped(&value)
        ));
    }
    text.push_str(&format!("\n{hint}\n"));
    html.push_str(&format!(
        "</table>\n<p>{}</p>\n</body></html>\n",
        escaped(&hint)
    ));
    Letter {
        message_id: message_id(alert, mail, to),
        from: paper.from.clone(),
        to: to.to_owned(),
        date: paper.date,
        subject: format!("timelined: {subject}"),
        text,
        html,
        attachment: None,
    }
}

/// Subject and first sentence.
fn words(alert: &JobAlert, mail: AlertMail, paper: &Stationery<'_>) -> (String, String) {
    let job = &alert.job;
    let longer = paper.within.map_or_else(
        || "for too long".to_owned(),
        |within| format!("for more than {within}"),
    );
    match (mail, alert.kind) {
        (AlertMail::Alert, AlertKind::Failure) if alert.waits_for_operator => {
            let still = if alert.mails == 0 { "" } else { "still " };
            (
                format!("job {job} {still}waits for an operator"),
                format!(
                    "The job {job} {still}would delete far more than usual, and deletes nothing \
                     until an operator lets it: {}.",
                    what_to_do(job)
                ),
            )
        }
        (AlertMail::Alert, AlertKind::Failure) => {
            let times = times(alert.failures());
            if alert.mails == 0 {
                (
                    format!("job {job} failed {times}"),
                    format!("The job {job} failed {times}."),
                )
            } else {
                (
                    format!("job {job} still fails, {times}"),
                    format!("The job {job} still fails, now {times}."),
                )
            }
        }
        (AlertMail::Alert, AlertKind::Silence) => {
            let still = if alert.mails == 0 { "" } else { "still " };
            (
                format!("job {job} {still}has not succeeded {longer}"),
                format!("The job {job} {still}has not succeeded for longer than expected."),
            )
        }
        (AlertMail::Recovery, AlertKind::Failure) => (
            format!("job {job} succeeded again"),
            format!(
                "The job {job} succeeded again. It had failed {}.",
                times(alert.count)
            ),
        ),
        (AlertMail::Recovery, AlertKind::Silence) => (
            format!("job {job} succeeded again"),
            format!(
                "The job {job} succeeded again, after a silence that was longer than expected."
            ),
        ),
    }
}

fn facts(alert: &JobAlert, mail: AlertMail, paper: &Stationery<'_>) -> Vec<(&'static str, String)> {
    let mut facts = vec![("Job", alert.job.clone())];
    let mut add = |label, value: Option<String>| facts.extend(value.map(|value| (label, value)));
    let is_alert = mail == AlertMail::Alert;
    match alert.kind {
        AlertKind::Failure => {
            add("First failure", Some(time(alert.since)));
            let error = alert.error.as_deref().map(shortened);
            add("Last error", error.filter(|_| is_alert));
        }
        AlertKind::Silence => {
            let is_waiting = alert.last_success.is_none();
            add("Awaited since", is_waiting.then(|| time(alert.since)));
            add("Expected within", paper.within.map(str::to_owned));
        }
    }
    let success = alert
        .last_success
        .map_or_else(|| "none known".to_owned(), time);
    add("Last success", Some(success));
    let more = "in a day, if it lasts; and when the job succeeds again".to_owned();
    add("Next mail", is_alert.then_some(more));
    facts
}

fn times(count: u64) -> String {
    match count {
        1 => "once".to_owned(),
        _ => format!("{count} times in a row"),
    }
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// A control character, such as a line break, would make one fact look like two.
fn shortened(error: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut text: String = error.chars().take(LONGEST_ERROR).map(clean).collect();
    if error.chars().nth(LONGEST_ERROR).is_some() {
        text.push('…');
    }
    text
}

/// The same at each attempt, on whichever daemon, so that a repeat is known as one.
fn message_id(alert: &JobAlert, mail: AlertMail, to: &str) -> String {
    // `since` of a silence moves on with each success, also while its end is being mailed.
    let when = match mail {
        AlertMail::Alert => alert.since,
        AlertMail::Recovery => alert.mailed_at.unwrap_or(alert.since),
    };
    let mut hash = Sha256::new();
    for part in [
        &alert.job,
        alert.kind.as_str(),
        mail.as_str(),
        &when.timestamp_micros().to_string(),
        &alert.mails.to_string(),
        to,
    ] {
        hash.update(part);
        hash.update([0]);
    }
    let digits: String = hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("alert-{digits}@timelined")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hours: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_780_000_000 + 3_600 * hours, 0).unwrap()
    }

    fn alert(kind: AlertKind) -> JobAlert {
        JobAlert {
            job: "purge-expired".to_owned(),
            kind,
            since: at(0),
            count: 3,
            error: Some("disk <full>\nBcc: eve".to_owned()),
            last_success: None,
            mails: 0,
            mailed_at: None,
            mailing: None,
            attempts: 1,
            reached: Vec::new(),
            claimed_until: None,
            waits_for_operator: false,
        }
    }

    fn letter(alert: &JobAlert, mail: AlertMail) -> Letter {
        let paper = Stationery {
            from: &"timelined <timelined@localhost>".parse().unwrap(),
            date: at(1),
            within: Some("1day 2h"),
        };
        compose(alert, mail, "ops@example.com", &paper)
    }

    #[test]
    fn each_letter_says_what_happened() {
        let failing = alert(AlertKind::Failure);
        let still = JobAlert {
            count: 90,
            mails: 1,
            mailed_at: Some(at(1)),
            ..failing.clone()
        };
        let over = JobAlert {
            last_success: Some(at(30)),
            ..still.clone()
        };
        let waiting = JobAlert {
            count: 1,
            error: Some("would delete more than 10000 events".to_owned()),
            waits_for_operator: true,
            ..failing.clone()
        };
        let silent = alert(AlertKind::Silence);
        let alive = JobAlert {
            since: at(30),
            last_success: Some(at(30)),
            ..silent.clone()
        };
        let said: Vec<String> = [
            letter(&failing, AlertMail::Alert),
            letter(&still, AlertMail::Alert),
            letter(&over, AlertMail::Recovery),
            letter(&waiting, AlertMail::Alert),
            letter(&silent, AlertMail::Alert),
            letter(&alive, AlertMail::Recovery),
        ]
        .into_iter()
        .map(|letter| format!("Subject: {}\n\n{}", letter.subject, letter.text))
        .collect();
        insta::assert_snapshot!(said.join("\n----\n"));
        insta::assert_snapshot!(letter(&failing, AlertMail::Alert).html);
    }

    #[test]
    fn a_mail_keeps_its_id_over_attempts_and_shares_it_with_no_other() {
        let first = alert(AlertKind::Failure);
        let id = |alert: &JobAlert, mail| letter(alert, mail).message_id;
        let again = JobAlert {
            count: 7,
            attempts: 2,
            ..first.clone()
        };
        let one = id(&first, AlertMail::Alert);
        assert_eq!(one, id(&again, AlertMail::Alert));
        let next = JobAlert {
            mails: 1,
            ..first.clone()
        };
        let mut ids = vec![
            one,
            id(&next, AlertMail::Alert),
            id(&first, AlertMail::Recovery),
            id(&alert(AlertKind::Silence), AlertMail::Alert),
        ];
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 4);
        assert!(letter(&first, AlertMail::Alert).seal().is_ok());
    }

    #[test]
    fn an_endless_error_is_cut() {
        let mut endless = alert(AlertKind::Failure);
        endless.error = Some("ä".repeat(100_000));
        let text = letter(&endless, AlertMail::Alert).text;
        assert!(text.contains('…') && text.len() < 5_000);
    }
}
