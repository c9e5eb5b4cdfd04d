//! Mailing: one mail at a time, and what its outcome means for the next attempt.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::FutureExt;
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::letter::{Placement, Reason, Stationery, compose};
use super::{Duty, Exporter, Step, after, file_path, link_hash, locked};
use crate::config::Uncertain;
use crate::mail::Outcome;
use crate::storage::{
    ClaimedDelivery, DeliveryOutcome, DeliveryState, Export, ExportState, StorageResult,
};
use crate::telemetry::chain;

const FIRST_WAIT: Duration = Duration::from_mins(1);
const LONGEST_WAIT: Duration = Duration::from_hours(4);
/// How long a mail is tried for.
const GIVE_UP: TimeDelta = TimeDelta::hours(48);
/// … but not before so many attempts: a daemon that was off for two days has not tried for two days.
/// With the waits above, 48 hours take more than these.
const LEAST_ATTEMPTS: u32 = 10;
/// Headers, words and boundaries around an attachment, generously.
const WRAPPING: u64 = 64 * 1024;

/// The queue while the server does not take our credentials.
#[derive(Debug, Default)]
pub(super) struct Hold {
    /// How many attempts in a row it refused them.
    refusals: u32,
    until: Option<DateTime<Utc>>,
}

impl Exporter {
    /// Sends the mail that has been due longest.
    pub(super) async fn mail_next(&self, stop: &CancellationToken) -> StorageResult<Step> {
        let now = self.clock.now();
        if locked(&self.hold).until.is_some_and(|until| now < until) {
            return Ok(Step::Idle);
        }
        // Perhaps twice: with the attachment and, when the server does not take it, without.
        let longest = self.mailer.longest(self.largest_mail()) * 2;
        let until = after(now, longest + Duration::from_mins(1));
        let claimed = self
            .store
            .claim_delivery(self.settings.worker, now, until)
            .await?;
        let Some(claimed) = claimed else {
            return Ok(Step::Idle);
        };
        self.deliver(&claimed, stop).await;
        Ok(Step::Worked)
    }

    /// Base64 makes four bytes of three, and a line break of every 76.
    fn largest_mail(&self) -> u64 {
        self.settings.max_attachment.saturating_mul(7) / 5 + WRAPPING
    }

    async fn deliver(&self, claimed: &ClaimedDelivery, stop: &CancellationToken) {
        let began = self.clock.now();
        let attempt = AssertUnwindSafe(self.attempt(claimed)).catch_unwind();
        let outcome = attempt
            .await
            .unwrap_or_else(|_panic| Outcome::Deferred("sending panicked".to_owned()));
        let now = self.clock.now();
        let elapsed_ms = (now - began).num_milliseconds();
        let held_until = self.hold_or_go_on(&outcome, now);
        let ended = self.ended(claimed, outcome, held_until, now);
        log(claimed, &ended, elapsed_ms, held_until.is_some());
        let worker = self.settings.worker;
        let note = || self.store.delivery_ended(claimed, worker, &ended, now);
        self.insist(Duty::Mail, stop, note).await;
    }

    async fn attempt(&self, claimed: &ClaimedDelivery) -> Outcome {
        let (export, delivery) = (&claimed.export, &claimed.delivery);
        match export.state {
            ExportState::Cancelled => return Outcome::Dead("the export was cancelled".to_owned()),
            ExportState::Expired => return Outcome::Dead("the file had expired".to_owned()),
            _ => {}
        }
        let Some(file_name) = &export.file_name else {
            return Outcome::Dead("the file had expired".to_owned());
        };
        // An attempt before this one was interrupted or lost its line: it may have gone out.
        let may_be_out = matches!(
            delivery.state,
            DeliveryState::Sending | DeliveryState::Uncertain
        );
        if may_be_out && self.settings.uncertain == Uncertain::GiveUp {
            return Outcome::Dead("may have been taken, and mail.uncertain is give_up".to_owned());
        }
        let placement = match self.place(export, file_name).await {
            Ok(placement) => placement,
            // Another daemon may have it, or an operator bring it back.
            Err(error) => return Outcome::Deferred(format!("cannot read the file: {error}")),
        };
        let was_attached = matches!(placement, Placement::Attached(_));
        match self.post(claimed, placement).await {
            Outcome::TooLarge if was_attached => {
                let linked = Placement::Linked(Reason::Refused);
                match self.post(claimed, linked).await {
                    Outcome::TooLarge => too_large(),
                    outcome => outcome,
                }
            }
            Outcome::TooLarge => too_large(),
            outcome => outcome,
        }
    }

    async fn place(&self, export: &Export, file_name: &str) -> std::io::Result<Placement> {
        if !export.request.attach {
            return Ok(Placement::Linked(Reason::Asked));
        }
        let limit = self.settings.max_attachment;
        if export.bytes.is_some_and(|bytes| bytes > limit) {
            return Ok(Placement::Linked(Reason::Larger(limit)));
        }
        let path = file_path(&self.settings.directory, file_name)
            .ok_or_else(|| std::io::Error::other("its row names no file"))?;
        let content = tokio::fs::read(path).await?;
        Ok(Placement::Attached(content))
    }

    async fn post(&self, claimed: &ClaimedDelivery, placement: Placement) -> Outcome {
        let (export, delivery) = (&claimed.export, &claimed.delivery);
        let link = match &placement {
            Placement::Attached(_) => String::new(),
            Placement::Linked(_) => match self.link(claimed).await {
                Ok(link) => link,
                Err(error) => {
                    let error = chain(&error);
                    return Outcome::Deferred(format!("the link cannot be kept: {error}"));
                }
            },
        };
        let paper = Stationery {
            from: &self.settings.from,
            link: &link,
            // Not the attempt's: the same message each time.
            date: export.rendered_at.unwrap_or(export.created_at),
        };
        let letter = compose(
            export,
            &delivery.to,
            &delivery.message_id,
            placement,
            &paper,
        );
        match spawn_blocking(move || letter.seal()).await {
            Ok(Ok(sealed)) => self.mailer.send(&sealed).await,
            Ok(Err(error)) => Outcome::Dead(error.to_string()),
            Err(_panicked) => Outcome::Deferred("writing the letter panicked".to_owned()),
        }
    }

    /// The link that the mail carries, which leads to the file before the mail leaves.
    async fn link(&self, claimed: &ClaimedDelivery) -> StorageResult<String> {
        let link = self.settings.link_key.link(&claimed.delivery.message_id);
        if let Some(hash) = link_hash(&link) {
            let now = self.clock.now();
            self.store.add_link(claimed, &hash, now).await?;
        }
        Ok(format!("{}/d/{link}", self.settings.public_url))
    }

    /// Until when no mail is tried, if this outcome says so.
    fn hold_or_go_on(&self, outcome: &Outcome, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut hold = locked(&self.hold);
        match outcome {
            Outcome::Credentials(text) => {
                hold.refusals = hold.refusals.saturating_add(1);
                hold.until = Some(after(now, backoff(hold.refusals, rand::random())));
                if hold.refusals == 1 {
                    tracing::error!(
                        error = text,
                        "all mail is held until the server takes mail.smtp.user and mail.smtp.password"
                    );
                }
                hold.until
            }
            // Says nothing of the credentials: the server may not even have been reached.
            Outcome::Deferred(_) => None,
            Outcome::Sent | Outcome::TooLarge | Outcome::Dead(_) | Outcome::Uncertain(_) => {
                if hold.refusals > 0 {
                    tracing::info!("mail is no longer held");
                }
                *hold = Hold::default();
                None
            }
        }
    }

    fn ended(
        &self,
        claimed: &ClaimedDelivery,
        outcome: Outcome,
        held_until: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> DeliveryOutcome {
        let attempt = claimed.delivery.attempt;
        let first_due = claimed.export.rendered_at.unwrap_or(now);
        let gives_up = attempt >= LEAST_ATTEMPTS && now >= first_due + GIVE_UP;
        let again = |state, random, error: String| {
            if gives_up {
                let error = format!("given up after 48 hours: {error}");
                return DeliveryOutcome::Dead { error };
            }
            DeliveryOutcome::Again {
                state,
                next_attempt_at: after(now, backoff(attempt, random)),
                error,
            }
        };
        match outcome {
            Outcome::Sent => DeliveryOutcome::Sent { at: now },
            Outcome::Deferred(error) => again(DeliveryState::Deferred, rand::random(), error),
            // Not the mail's fault, hence never given up: only the file's expiry ends it.
            Outcome::Credentials(error) => DeliveryOutcome::Again {
                state: DeliveryState::Deferred,
                next_attempt_at: held_until.unwrap_or(now),
                error,
            },
            Outcome::Dead(error) => DeliveryOutcome::Dead { error },
            Outcome::TooLarge => DeliveryOutcome::Dead {
                error: "too large for the server".to_owned(),
            },
            Outcome::Uncertain(error) if self.settings.uncertain == Uncertain::GiveUp => {
                DeliveryOutcome::Dead {
                    error: format!(
                        "{error}; it may have been taken, and mail.uncertain is give_up"
                    ),
                }
            }
            Outcome::Uncertain(error) => again(DeliveryState::Uncertain, 1.0, error),
        }
    }
}

fn too_large() -> Outcome {
    Outcome::Dead("too large for the server even without the file".to_owned())
}

/// One minute, doubled with each attempt up to four hours, less up to half of it by chance: `random`
/// is from 0 to 1. Full jitter might try again at once, which is what greylisting servers punish.
fn backoff(attempt: u32, random: f64) -> Duration {
    let doublings = attempt.saturating_sub(1);
    let full = FIRST_WAIT
        .saturating_mul(2_u32.saturating_pow(doublings))
        .min(LONGEST_WAIT);
    full.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

/// One line an attempt, without address and content.
fn log(claimed: &ClaimedDelivery, ended: &DeliveryOutcome, elapsed_ms: i64, is_held: bool) {
    let (export, attempt) = (&claimed.export, claimed.delivery.attempt);
    let (id, tenant) = (&export.id, &export.tenant_id);
    let (rows, bytes) = (export.rows, export.bytes.unwrap_or(0));
    match ended {
        DeliveryOutcome::Sent { .. } => tracing::info!(
            export.id = %id, tenant.id = %tenant, delivery.attempt = attempt, rows, bytes, elapsed_ms,
            "sent an export"
        ),
        // Told once, as an error, when the hold began.
        DeliveryOutcome::Again { error, .. } if is_held => tracing::debug!(
            export.id = %id, tenant.id = %tenant, delivery.attempt = attempt, rows, bytes, elapsed_ms,
            error, "a mail waits with all others"
        ),
        DeliveryOutcome::Again {
            state,
            next_attempt_at,
            error,
        } => tracing::warn!(
            export.id = %id, tenant.id = %tenant, delivery.attempt = attempt, rows, bytes, elapsed_ms,
            error, %next_attempt_at, "a mail is {state} and will be tried again"
        ),
        DeliveryOutcome::Dead { error } => tracing::error!(
            export.id = %id, tenant.id = %tenant, delivery.attempt = attempt, rows, bytes, elapsed_ms,
            error, "a mail was given up"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_doubles_from_a_minute_to_four_hours() {
        let minutes: Vec<_> = (1..=10).map(|n| backoff(n, 1.0).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 16, 32, 64, 128, 240, 240]);
        assert_eq!(backoff(1, 0.0), Duration::from_secs(30));
        assert_eq!(backoff(u32::MAX, 1.0), LONGEST_WAIT);
    }

    #[test]
    fn forty_eight_hours_take_more_than_the_least_attempts() {
        let waits = (1..LEAST_ATTEMPTS).map(|attempt| backoff(attempt, 1.0));
        assert!(waits.sum::<Duration>() < GIVE_UP.to_std().unwrap());
    }
}
