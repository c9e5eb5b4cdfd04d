//! Alerts: who is told when a job fails several times in a row, or has not succeeded for too long.
//!
//! Whoever runs jobs says how each run ended ([`Alerts::run_ended`]), which only notes it: a job waits
//! neither for the database nor for a mail. Once a second [`Alerts::tick`] adds the notes to what all
//! daemons have seen, decides ([`rules`]) and claims the mails that are due, so that of several
//! daemons one sends each. What is known of a job is in the database and survives a restart.

mod letter;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use lettre::message::Mailbox;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::config::{self, JobDefinition, JobKind, Uncertain};
use crate::domain::Clock;
use crate::mail::{Mailer, Outcome};
use crate::storage::{
    AlertKind, AlertMail, AlertStore, Failures, JobAlert, MailEnd, Run, RunState, StorageError,
    StorageResult, Success,
};
use crate::telemetry::{Metrics, chain};
use letter::Stationery;
use rules::{Expectation, Step, Verdict};

/// How often troubles are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How old a daemon's knowledge of what others saw may be: a look each second would be one of the few
/// statements of an idle daemon.
const VIEW_LASTS: TimeDelta = TimeDelta::seconds(10);
/// Mails that are under way at once: a database that was away may have failed a hundred jobs.
const MAILS_AT_ONCE: usize = 4;
/// Clocks of an installation may differ by so much, and a tick is a second.
const SKEW: TimeDelta = TimeDelta::seconds(15);
/// Successes that change nothing are saved so rarely, at most …
const RAREST_SAVE: TimeDelta = TimeDelta::hours(1);
/// … and where nothing says how often they are expected.
const PLAIN_SAVE: TimeDelta = TimeDelta::minutes(1);
/// How long a daemon that has just begun lets jobs succeed before it calls them silent; one that
/// begins again and again must still say so.
const LONGEST_GRACE: TimeDelta = TimeDelta::minutes(1);
/// A mail is tried again after this time, doubled with each attempt up to …
const FIRST_WAIT: Duration = Duration::from_mins(1);
/// … this one.
const LONGEST_WAIT: Duration = Duration::from_hours(1);
/// The words of a letter, generously.
const LETTER_BYTES: u64 = 64 * 1024;
/// How often the end of a mail is written before its claim is left to lapse.
const END_TRIES: u32 = 3;

/// What alerts share with the rest of the daemon.
#[derive(Clone)]
pub struct AlertSettings {
    /// What all daemons have seen.
    pub store: Arc<dyn AlertStore>,
    /// Whether this daemon alone holds the database, so that nobody else sees anything.
    pub is_alone: bool,
    /// How mails leave.
    pub mailer: Arc<Mailer>,
    /// Their sender.
    pub from: Mailbox,
    /// What becomes of a mail that may or may not have been taken.
    pub uncertain: Uncertain,
    /// Who is told, after how many failures, and what is expected of which job.
    pub config: config::Alerts,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// This daemon, by an id made at its start.
    pub daemon: Uuid,
    /// Holds every mail that is under way.
    pub tracker: TaskTracker,
    /// Cancelled when no further mail is to begin.
    pub stop: CancellationToken,
    /// Cancelled when mails under way are to end at once.
    pub abort: CancellationToken,
    /// Shows what is wrong.
    pub metrics: Arc<Metrics>,
}

/// The alerts of a daemon.
pub struct Alerts {
    settings: AlertSettings,
    jobs: BTreeMap<String, Watched>,
    /// When this daemon began.
    began: DateTime<Utc>,
    news: Mutex<BTreeMap<String, News>>,
    paused: Mutex<BTreeSet<String>>,
    /// Held through a tick: two at once would save out of order.
    view: tokio::sync::Mutex<View>,
    under_way: Arc<Semaphore>,
    /// Whether the database was away at the last tick.
    is_out: AtomicBool,
}

/// A job, as far as alerts are concerned.
struct Watched {
    is_enabled: bool,
    /// Each daemon runs it for itself, so that a success on one says nothing of another.
    is_per_daemon: bool,
    /// How old its last success may become.
    within: Option<TimeDelta>,
    /// How old the success in the database may become before a younger one is saved.
    save_after: TimeDelta,
}

/// What this daemon saw of a job since it last saved it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct News {
    /// The last success.
    success: Option<DateTime<Utc>>,
    /// The failures after it.
    failures: Option<Failures>,
    /// Whether it failed here at all since a success was saved.
    has_failed: bool,
    /// The last sign of life, saved or not.
    seen: Option<DateTime<Utc>>,
    /// The last success that was saved.
    saved: Option<DateTime<Utc>>,
}

/// What the database said of all jobs, by their names.
#[derive(Default)]
struct View {
    troubles: BTreeMap<String, Troubles>,
    /// `None`: something has changed since.
    read_at: Option<DateTime<Utc>>,
    excused_at: Option<DateTime<Utc>>,
}

/// What it said of one.
struct Troubles {
    failure: JobAlert,
    silence: JobAlert,
}

/// A mail that is this daemon's to send.
pub struct DueMail {
    alert: JobAlert,
    mail: AlertMail,
    _under_way: OwnedSemaphorePermit,
}

impl Alerts {
    /// Watches `jobs`.
    #[must_use]
    pub fn new(settings: AlertSettings, jobs: &[JobDefinition]) -> Self {
        let watched = |job: &JobDefinition| {
            let within = settings.config.expect_within.get(&job.name);
            let within =
                within.map(|within| TimeDelta::from_std(*within).unwrap_or(TimeDelta::MAX));
            Watched {
                is_enabled: job.enabled,
                is_per_daemon: matches!(job.kind, JobKind::RealtimeDelivery { .. }),
                within,
                save_after: within
                    .map_or(PLAIN_SAVE, |within| (within / 4).clamp(SKEW, RAREST_SAVE)),
            }
        };
        Self {
            jobs: jobs
                .iter()
                .map(|job| (job.name.clone(), watched(job)))
                .collect(),
            began: settings.clock.now(),
            settings,
            news: Mutex::default(),
            paused: Mutex::default(),
            view: tokio::sync::Mutex::default(),
            under_way: Arc::new(Semaphore::new(MAILS_AT_ONCE)),
            is_out: AtomicBool::new(false),
        }
    }

    /// A run has ended; notes it and returns at once. Runs that were skipped, cancelled or given back
    /// say nothing of the job.
    pub fn run_ended(&self, run: &Run) {
        let at = run.finished_at.unwrap_or_else(|| self.settings.clock.now());
        let mut news = locked(&self.news);
        match run.state {
            RunState::Succeeded => {
                let news = news.entry(run.job.clone()).or_default();
                news.success = Some(at);
                news.failures = None;
                news.seen = news.seen.max(Some(at));
            }
            RunState::Failed | RunState::TimedOut => {
                let news = news.entry(run.job.clone()).or_default();
                let failure = Failures {
                    job: run.job.clone(),
                    count: 1,
                    first_at: at,
                    // PostgreSQL refuses a NUL, and would for ever.
                    error: run
                        .error
                        .as_deref()
                        .unwrap_or_default()
                        .replace('\0', "\u{fffd}"),
                };
                news.failures = Some(added(news.failures.take(), failure));
                news.has_failed = true;
            }
            RunState::Queued | RunState::Running | RunState::Cancelled | RunState::Skipped => {}
        }
    }

    /// These jobs are paused: nothing is expected of them, and none of their troubles is mailed.
    pub fn set_paused(&self, jobs: BTreeSet<String>) {
        *locked(&self.paused) = jobs;
    }

    /// Ticks until the daemon stops. Runs may end after that: see [`Alerts::flush`].
    pub async fn run(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.settings.stop.cancelled() => return,
            }
            for due in self.tick().await {
                let alerts = self.clone();
                let sent = async move { alerts.send(due).await };
                self.settings.tracker.spawn(sent);
            }
        }
    }

    /// Saves what was noted, for a daemon whose last run has ended.
    pub async fn flush(&self) {
        let view = self.view.lock().await;
        let saved = self.save(&view.troubles).await;
        self.note_outage(saved.map(drop));
    }

    /// Saves what was noted, decides what is wrong, and claims the mails that are due: they are the
    /// caller's to [`Alerts::send`]. An absent database is told once; what was noted is kept.
    pub async fn tick(&self) -> Vec<DueMail> {
        let mut due = Vec::new();
        let ticked = self.try_tick(&mut due).await;
        self.note_outage(ticked);
        due
    }

    async fn try_tick(&self, due: &mut Vec<DueMail>) -> StorageResult<()> {
        let mut view = self.view.lock().await;
        let now = self.settings.clock.now();
        if view.troubles.len() < self.jobs.len() {
            // What is noted of a job that has no row is lost.
            self.read(&mut view, now).await?;
        }
        let excused = self.excused();
        self.excuse(&excused, &mut view, now).await?;
        let has_saved = self.save(&view.troubles).await?;
        let is_fresh = |at: DateTime<Utc>| at <= now && now < at + VIEW_LASTS;
        let mut is_new = false;
        if has_saved || !view.read_at.is_some_and(is_fresh) {
            self.read(&mut view, now).await?;
            is_new = true;
        }
        let mut steps = self.decide(&view.troubles, &excused, now);
        if !is_new && !steps.is_empty() {
            // Another daemon may know better.
            self.read(&mut view, now).await?;
            steps = self.decide(&view.troubles, &excused, now);
        }
        for (alert, step) in steps {
            // What it leads to is read at the next tick.
            view.read_at = None;
            match step {
                Step::Rest => {}
                Step::Forget => {
                    self.settings.store.forget(&alert, now).await?;
                }
                Step::Mail(mail) => {
                    let Ok(permit) = self.under_way.clone().try_acquire_owned() else {
                        continue;
                    };
                    if let Some(alert) = self.claim(&alert, mail, now).await? {
                        due.push(DueMail {
                            alert,
                            mail,
                            _under_way: permit,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// The jobs of which nothing is expected now.
    fn excused(&self) -> BTreeSet<String> {
        let paused = locked(&self.paused);
        let is_excused = |name: &String, job: &Watched| !job.is_enabled || paused.contains(name);
        let excused = self.jobs.iter().filter(|(name, job)| is_excused(name, job));
        excused.map(|(name, _)| name.clone()).collect()
    }

    /// Moves what is expected of excused jobs on, so that their resumption is no silence.
    async fn excuse(
        &self,
        excused: &BTreeSet<String>,
        view: &mut View,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        let expected: Vec<String> = excused
            .iter()
            .filter(|name| self.jobs[*name].within.is_some())
            .cloned()
            .collect();
        for name in &expected {
            let mut news = locked(&self.news);
            let news = news.entry(name.clone()).or_default();
            news.seen = news.seen.max(Some(now));
        }
        let is_recent = |at: DateTime<Utc>| at <= now && now < at + PLAIN_SAVE;
        if expected.is_empty() || view.excused_at.is_some_and(is_recent) {
            return Ok(());
        }
        self.settings.store.excuse(&expected, now).await?;
        view.excused_at = Some(now);
        Ok(())
    }

    /// Saves what is worth it; answers whether anything was.
    async fn save(&self, known: &BTreeMap<String, Troubles>) -> StorageResult<bool> {
        let taken: BTreeMap<String, News> = self
            .jobs
            .iter()
            .filter_map(|(name, job)| {
                let news = self.take_news(name, job, known.get(name))?;
                Some((name.clone(), news))
            })
            .collect();
        if taken.is_empty() {
            return Ok(false);
        }
        let saved = self.save_news(&taken).await;
        if saved.is_err() {
            let mut all = locked(&self.news);
            for (name, news) in taken {
                let newer = all.remove(&name).unwrap_or_default();
                all.insert(name, news.then(newer));
            }
        }
        saved.map(|()| true)
    }

    /// Takes the news of a job out, if they are to be saved; they count as saved then.
    fn take_news(&self, name: &str, job: &Watched, known: Option<&Troubles>) -> Option<News> {
        let mut all = locked(&self.news);
        let news = all.get_mut(name)?;
        let is_worth_it = match (news.success, &news.failures) {
            (_, Some(_)) => true,
            (Some(at), None) => {
                let is_old = news.saved.is_none_or(|saved| at - saved >= job.save_after);
                let ends_failures = known.is_some_and(|Troubles { failure, .. }| {
                    !job.is_per_daemon && (failure.failures() > 0 || failure.is_told())
                });
                let ends_silence = known.is_some_and(|known| known.silence.is_told());
                // Others may have seen it fail a moment ago.
                let is_shared = !self.settings.is_alone && !job.is_per_daemon;
                is_old || news.has_failed || ends_failures || ends_silence || is_shared
            }
            (None, None) => false,
        };
        is_worth_it.then(|| news.take())
    }

    async fn save_news(&self, news: &BTreeMap<String, News>) -> StorageResult<()> {
        let successes: Vec<Success> = news
            .iter()
            .filter_map(|(name, news)| {
                let is_per_daemon = self.jobs[name].is_per_daemon;
                Some(Success {
                    job: name.clone(),
                    at: news.success?,
                    // The first speaks for a daemon of which this one took the place.
                    ends_failures: !is_per_daemon || news.has_failed || news.saved.is_none(),
                })
            })
            .collect();
        let failures: Vec<Failures> = news
            .values()
            .filter_map(|news| news.failures.clone())
            .collect();
        let store = &self.settings.store;
        if !successes.is_empty() {
            store.note_successes(&successes).await?;
        }
        if !failures.is_empty() {
            store.note_failures(&failures).await?;
        }
        Ok(())
    }

    /// Reads what all daemons have seen; jobs that are new are watched from now on.
    async fn read(&self, view: &mut View, now: DateTime<Utc>) -> StorageResult<()> {
        let store = &self.settings.store;
        let names: Vec<String> = self.jobs.keys().cloned().collect();
        let mut alerts = store.alerts(&names).await?;
        if alerts.len() < 2 * names.len() {
            store.watch(&names, now).await?;
            alerts = store.alerts(&names).await?;
        }
        let is_failure = |alert: &JobAlert| alert.kind == AlertKind::Failure;
        let (failures, silences): (Vec<_>, Vec<_>) = alerts.into_iter().partition(is_failure);
        let mut silences: BTreeMap<String, JobAlert> = silences
            .into_iter()
            .map(|alert| (alert.job.clone(), alert))
            .collect();
        view.troubles = failures
            .into_iter()
            .filter_map(|failure| {
                let silence = silences.remove(&failure.job)?;
                Some((failure.job.clone(), Troubles { failure, silence }))
            })
            .collect();
        view.read_at = Some(now);
        Ok(())
    }

    /// What is to be done, and shows what is wrong.
    fn decide(
        &self,
        troubles: &BTreeMap<String, Troubles>,
        excused: &BTreeSet<String>,
        now: DateTime<Utc>,
    ) -> Vec<(JobAlert, Step)> {
        let mut steps = Vec::new();
        for (name, Troubles { failure, silence }) in troubles {
            let Some(job) = self.jobs.get(name) else {
                continue;
            };
            let is_excused = excused.contains(name);
            let after = self.settings.config.after;
            let of_failures = rules::of_failures(failure, after, is_excused, now);
            let expectation = self.expectation(name, job, is_excused);
            let mut of_silence = rules::of_silence(silence, expectation, now);
            rules::merge(&mut of_silence, of_failures);
            self.show(failure, of_failures);
            self.show(silence, of_silence);
            // Silence first: its recovery must not be told after that of the failures.
            for (alert, verdict) in [(silence, of_silence), (failure, of_failures)] {
                let is_claimed = alert.claimed_until.is_some_and(|until| now < until);
                let is_begun = alert.mailing.map(Step::Mail) == Some(verdict.step);
                if verdict.step != Step::Rest && !(is_claimed && is_begun) {
                    steps.push((alert.clone(), verdict.step));
                }
            }
        }
        steps
    }

    fn expectation(&self, name: &str, job: &Watched, is_excused: bool) -> Option<Expectation> {
        let within = job.within?;
        let seen = locked(&self.news).get(name).and_then(|news| news.seen);
        let slack = match seen {
            Some(_) if self.settings.is_alone => TimeDelta::zero(),
            // Each success is saved.
            _ if !self.settings.is_alone && !job.is_per_daemon => SKEW,
            _ => job.save_after,
        };
        Some(Expectation {
            within,
            slack,
            seen,
            grace_until: self.began + within.min(LONGEST_GRACE),
            is_excused,
        })
    }

    fn show(&self, alert: &JobAlert, verdict: Verdict) {
        let metrics = &self.settings.metrics;
        metrics.job_alert(&alert.job, alert.kind.as_str(), verdict.is_active);
        if alert.kind == AlertKind::Failure {
            metrics.job_failures(&alert.job, alert.failures());
        }
        if let Some(at) = alert.last_success {
            metrics.job_succeeded(&alert.job, at);
        }
    }

    async fn claim(
        &self,
        alert: &JobAlert,
        mail: AlertMail,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<JobAlert>> {
        let Self { settings, .. } = self;
        let letters = u32::try_from(settings.config.to.len()).unwrap_or(u32::MAX);
        let longest = settings.mailer.longest(LETTER_BYTES);
        let longest = longest.saturating_mul(letters) + Duration::from_mins(1);
        let until = later(now, longest);
        let claimed = settings
            .store
            .claim_mail(alert, mail, settings.daemon, now, until)
            .await?;
        if let Some(alert) = claimed.as_ref().filter(|alert| alert.attempts == 1) {
            // Once in the installation, as the mail.
            tell(alert, mail);
        }
        Ok(claimed)
    }

    /// Sends a mail to everybody whom it has not reached, and writes how that ended.
    pub async fn send(&self, due: DueMail) {
        let DueMail { alert, mail, .. } = &due;
        let Some(end) = self.post(alert, *mail).await else {
            // Ended at once: the claim lapses, and another daemon, or the next, sends it.
            return;
        };
        let Self { settings, .. } = self;
        for tries_left in (0..END_TRIES).rev() {
            let ended = settings
                .store
                .mail_ended(&alert.job, alert.kind, settings.daemon, &end);
            let Err(error) = ended.await else { return };
            if tries_left == 0 {
                tracing::warn!(
                    job.name = alert.job, error = %chain(&error),
                    "could not note that an alert was sent; it will be sent again"
                );
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = settings.abort.cancelled() => return,
            }
        }
    }

    /// `None`: the daemon ends at once.
    async fn post(&self, alert: &JobAlert, mail: AlertMail) -> Option<MailEnd> {
        let Self { settings, .. } = self;
        let mut reached = alert.reached.clone();
        let mut is_complete = true;
        for to in &settings.config.to {
            let to = to.to_string();
            if reached.contains(&to) {
                continue;
            }
            if settings.stop.is_cancelled() {
                is_complete = false;
                break;
            }
            let outcome = tokio::select! {
                outcome = self.post_to(alert, mail, &to) => outcome,
                () = settings.abort.cancelled() => return None,
            };
            if self.is_settled(alert, &outcome) {
                reached.push(to);
            } else {
                is_complete = false;
            }
        }
        let now = settings.clock.now();
        Some(match mail {
            AlertMail::Alert if is_complete => MailEnd::Told { at: now },
            AlertMail::Recovery if is_complete => MailEnd::Forgotten,
            _ if settings.stop.is_cancelled() => MailEnd::Again { at: now, reached },
            _ => MailEnd::Again {
                at: later(now, backoff(alert.attempts)),
                reached,
            },
        })
    }

    async fn post_to(&self, alert: &JobAlert, mail: AlertMail, to: &str) -> Outcome {
        let Self { settings, .. } = self;
        let within = settings.config.expect_within.get(&alert.job);
        let within = within.map(|within| humantime::format_duration(*within).to_string());
        let paper = Stationery {
            from: &settings.from,
            date: settings.clock.now(),
            within: within.as_deref(),
        };
        match letter::compose(alert, mail, to, &paper).seal() {
            Ok(sealed) => settings.mailer.send(&sealed).await,
            Err(error) => Outcome::Dead(error.to_string()),
        }
    }

    /// Whether nothing more is to be done for one recipient.
    fn is_settled(&self, alert: &JobAlert, outcome: &Outcome) -> bool {
        let gives_up = self.settings.uncertain == Uncertain::GiveUp;
        let (error, is_final) = match outcome {
            Outcome::Sent => return true,
            Outcome::Deferred(error) | Outcome::Credentials(error) => (error.as_str(), false),
            Outcome::Uncertain(error) => (error.as_str(), gives_up),
            Outcome::Dead(error) => (error.as_str(), true),
            Outcome::TooLarge => ("too large for the server", true),
        };
        let (job, kind, attempt) = (&alert.job, alert.kind, alert.attempts);
        if is_final {
            tracing::error!(
                job.name = job, alert.kind = %kind, alert.attempt = attempt, error,
                "an alert was given up for one recipient"
            );
        } else {
            tracing::warn!(
                job.name = job, alert.kind = %kind, alert.attempt = attempt, error,
                "an alert was not sent and will be tried again"
            );
        }
        is_final
    }

    fn note_outage(&self, result: StorageResult<()>) {
        let was_out = self.is_out.swap(result.is_err(), Ordering::Relaxed);
        match result {
            Ok(()) if was_out => tracing::info!("alerts have their database again"),
            Ok(()) => {}
            Err(error) if was_out => {
                tracing::debug!(error = %chain(&error), "alerts are still waiting");
            }
            Err(error) => note_first(&error),
        }
    }
}

fn note_first(error: &StorageError) {
    let text = chain(error);
    if error.is_transient() {
        tracing::warn!(error = text, "alerts wait for the database");
    } else {
        tracing::error!(error = text, "alerts cannot use the database");
    }
}

impl News {
    /// Takes out what is to be saved, which counts as saved.
    fn take(&mut self) -> Self {
        let taken = self.clone();
        self.saved = self.success.take().or(self.saved);
        // Failures after the success wait for the next one.
        self.has_failed = taken.failures.is_some() || (taken.has_failed && taken.success.is_none());
        self.failures = None;
        taken
    }

    /// These news, and then `newer` ones.
    fn then(self, newer: Self) -> Self {
        let failures = match (newer.success, self.failures, newer.failures) {
            (None, Some(before), Some(after)) => Some(added(Some(before), after)),
            (None, before, after) => before.or(after),
            (Some(_), _, after) => after,
        };
        Self {
            success: newer.success.or(self.success),
            failures,
            has_failed: self.has_failed || newer.has_failed,
            seen: self.seen.max(newer.seen),
            saved: self.saved,
        }
    }
}

/// Failures after failures.
fn added(before: Option<Failures>, after: Failures) -> Failures {
    match before {
        None => after,
        Some(before) => Failures {
            count: before.count.saturating_add(after.count),
            first_at: before.first_at,
            ..after
        },
    }
}

/// The line beside the mail; the error is in the line of the run.
fn tell(alert: &JobAlert, mail: AlertMail) {
    let JobAlert { job, kind, .. } = alert;
    match (mail, kind) {
        (AlertMail::Alert, AlertKind::Failure) if alert.waits_for_operator => {
            tracing::error!(job.name = job, alert.kind = %kind, "{job} waits for an operator");
        }
        (AlertMail::Alert, AlertKind::Failure) => {
            let failures = alert.failures();
            tracing::error!(job.name = job, alert.kind = %kind, failures, "{job} failed {failures} times in a row");
        }
        (AlertMail::Alert, AlertKind::Silence) => {
            let since = alert.since;
            tracing::error!(job.name = job, alert.kind = %kind, %since, "{job} has not succeeded for longer than expected");
        }
        (AlertMail::Recovery, _) => {
            tracing::info!(job.name = job, alert.kind = %kind, "{job} succeeded again");
        }
    }
}

fn backoff(attempts: u64) -> Duration {
    let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
    FIRST_WAIT
        .saturating_mul(2_u32.saturating_pow(doublings))
        .min(LONGEST_WAIT)
}

fn later(at: DateTime<Utc>, by: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(by)
        .ok()
        .and_then(|by| at.checked_add_signed(by))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
