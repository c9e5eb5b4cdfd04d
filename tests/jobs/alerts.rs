//! Alerts: one mail when something is wrong with a job, and one when it is right again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tempfile::TempDir;
use timelined::config::{self, CatchUp, JobDefinition, JobKind, Overlap, Transport, Uncertain};
use timelined::domain::{Clock, ManualClock, RunId, SystemClock};
use timelined::jobs::retry::RetryPolicy;
use timelined::jobs::schedule::Schedule;
use timelined::jobs::{AlertSettings, Alerts, DueMail};
use timelined::mail::Mailer;
use timelined::storage::{Counts, Run, RunState, Trigger};
use timelined::telemetry::Metrics;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::support::builders::*;
use crate::support::database::{Database, Engine};
use crate::support::smtp::Server;

const PURGE: &str = "purge-expired";
const DELIVERY: &str = "realtime-delivery";
const OFF: &str = "off";
const DAY: TimeDelta = TimeDelta::hours(24);

fn seconds(count: i64) -> TimeDelta {
    TimeDelta::seconds(count)
}

/// An hourly purge, a delivery each second, and a job that is disabled.
fn jobs() -> Vec<JobDefinition> {
    let purge = JobDefinition {
        name: PURGE.to_owned(),
        schedule: Schedule::every(Duration::from_hours(1)).unwrap(),
        enabled: true,
        timeout: Duration::from_secs(30),
        overlap: Overlap::Skip,
        catch_up: CatchUp::Once,
        catch_up_within: Duration::from_hours(12),
        retry: RetryPolicy::default(),
        kind: JobKind::PurgeExpired {
            older_than: Duration::ZERO,
            max_rate: 0,
            dry_run: false,
        },
    };
    let delivery = JobDefinition {
        name: DELIVERY.to_owned(),
        schedule: Schedule::every(Duration::from_secs(1)).unwrap(),
        kind: JobKind::RealtimeDelivery { batch: 100 },
        ..purge.clone()
    };
    let off = JobDefinition {
        name: OFF.to_owned(),
        enabled: false,
        ..purge.clone()
    };
    vec![purge, delivery, off]
}

/// Daemons on one database, as far as alerts go, whose clock moves when a test lets it.
struct Installation<'a> {
    db: &'a Database,
    clock: ManualClock,
    outbox: TempDir,
    config: config::Alerts,
    /// Where mails go, if not into the outbox.
    transport: Option<Transport>,
    metrics: Arc<Metrics>,
}

impl<'a> Installation<'a> {
    fn new(db: &'a Database) -> Self {
        let hours = Duration::from_hours;
        Self {
            db,
            clock: ManualClock::at(t0()),
            outbox: tempfile::tempdir().unwrap(),
            config: config::Alerts {
                to: vec!["ops@example.com".parse().unwrap()],
                after: 3,
                expect_within: BTreeMap::from([
                    (PURGE.to_owned(), hours(26)),
                    (OFF.to_owned(), hours(2)),
                ]),
            },
            transport: None,
            metrics: Arc::default(),
        }
    }

    fn settings(&self, number: u64) -> AlertSettings {
        let from = "timelined <timelined@localhost>".parse().unwrap();
        let directory = Transport::Directory(self.outbox.path().join("mails"));
        let mail = config::Mail {
            transport: self.transport.clone().unwrap_or(directory),
            from,
            max_attachment: 0,
            uncertain: Uncertain::Retry,
            allowed_domains: config::AllowedDomains::default(),
        };
        AlertSettings {
            store: self.db.alerts.clone(),
            is_alone: self.db.is_exclusive(),
            mailer: Arc::new(Mailer::new(&mail).unwrap()),
            from: mail.from,
            uncertain: mail.uncertain,
            config: self.config.clone(),
            clock: Arc::new(self.clock.clone()),
            daemon: worker(number),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            abort: CancellationToken::new(),
            metrics: self.metrics.clone(),
        }
    }

    /// A daemon that has just begun.
    fn daemon(&self, number: u64) -> Alerts {
        Alerts::new(self.settings(number), &jobs())
    }

    /// Time passes.
    fn pass(&self, time: TimeDelta) {
        self.clock.advance(time);
    }

    /// The subjects of the mails so far, sorted.
    fn subjects(&self) -> Vec<String> {
        subjects(&self.outbox.path().join("mails"))
    }

    fn ended(&self, alerts: &Alerts, job: &str, state: RunState) {
        alerts.run_ended(&run(job, state, self.clock.now()));
    }

    fn fail(&self, alerts: &Alerts, job: &str) {
        self.ended(alerts, job, RunState::Failed);
    }

    fn succeed(&self, alerts: &Alerts, job: &str) {
        self.ended(alerts, job, RunState::Succeeded);
    }

    fn metric(&self, line: &str) -> Option<String> {
        let text = self.metrics.encode(0, 0);
        let mut lines = text.lines();
        lines.find_map(|found| Some(found.strip_prefix(line)?.trim().to_owned()))
    }
}

/// The subjects of the alerts in a directory of mails, sorted.
pub(crate) fn subjects(mails: &Path) -> Vec<String> {
    let Ok(files) = std::fs::read_dir(mails) else {
        return Vec::new();
    };
    let mut subjects: Vec<String> = files
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "eml"))
        .filter_map(|path| {
            let mail = std::fs::read_to_string(path).unwrap();
            // A long header is folded.
            let mail = mail.replace("\r\n ", " ");
            let subject = mail
                .lines()
                .find_map(|line| line.strip_prefix("Subject: timelined: job "));
            subject.map(str::to_owned)
        })
        .collect();
    subjects.sort();
    subjects
}

fn run(job: &str, state: RunState, at: DateTime<Utc>) -> Run {
    Run {
        id: RunId::generate(at),
        job: job.to_owned(),
        scheduled_at: at,
        started_at: Some(at),
        finished_at: Some(at),
        trigger: Trigger::Schedule,
        attempt: 1,
        daemon: Some(worker(1)),
        fence: 1,
        state,
        counts: Counts::new(),
        error: (state != RunState::Succeeded).then(|| "panicked: a \0 in a text".to_owned()),
    }
}

/// A tick, and the mails that it makes due.
async fn tick(alerts: &Alerts) {
    for due in alerts.tick().await {
        alerts.send(due).await;
    }
}

on_both_engines! {
    async fn three_failures_in_a_row_are_mailed_once_and_so_is_the_success_after_them(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        for expected in [0, 0, 1, 1, 1] {
            there.fail(&daemon, PURGE);
            tick(&daemon).await;
            assert_eq!(there.subjects().len(), expected);
            tick(&daemon).await;
            there.pass(minutes(1));
        }
        assert_eq!(there.subjects(), ["purge-expired failed 3 times in a row"]);
        there.succeed(&daemon, PURGE);
        tick(&daemon).await;
        tick(&daemon).await;
        let mails = ["purge-expired failed 3 times in a row", "purge-expired succeeded again"];
        assert_eq!(there.subjects(), mails);

        // Two, and then one: not in a row.
        for fails in [true, true, false, true] {
            there.pass(minutes(1));
            let state = if fails { RunState::TimedOut } else { RunState::Succeeded };
            there.ended(&daemon, PURGE, state);
            tick(&daemon).await;
        }
        // These say nothing.
        for state in [RunState::Skipped, RunState::Cancelled] {
            there.pass(minutes(1));
            there.ended(&daemon, PURGE, state);
            tick(&daemon).await;
        }
        assert_eq!(there.subjects().len(), 2);
    }

    async fn failures_and_the_mail_survive_a_restart(db) {
        let there = Installation::new(db);
        for expected in [0, 0, 1] {
            let daemon = there.daemon(1);
            there.pass(minutes(1));
            there.fail(&daemon, PURGE);
            tick(&daemon).await;
            assert_eq!(there.subjects().len(), expected);
        }
        tick(&there.daemon(2)).await;
        assert_eq!(there.subjects().len(), 1);
        let daemon = there.daemon(3);
        there.pass(minutes(1));
        there.succeed(&daemon, PURGE);
        tick(&daemon).await;
        assert_eq!(there.subjects().len(), 2);
    }

    async fn what_is_noted_while_the_daemon_stops_is_known_to_the_next(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        for _ in 0..3 {
            there.fail(&daemon, PURGE);
        }
        tick(&daemon).await;
        there.pass(minutes(1));
        there.succeed(&daemon, PURGE);
        daemon.flush().await;
        there.pass(minutes(1));
        tick(&there.daemon(2)).await;
        assert_eq!(there.subjects().len(), 2);
    }

    async fn what_lasts_is_mailed_again_each_day_with_its_count(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        for _ in 0..49 {
            there.fail(&daemon, PURGE);
            tick(&daemon).await;
            there.pass(hours(1));
        }
        assert_eq!(
            there.subjects(),
            [
                "purge-expired failed 3 times in a row",
                // It is silent, too.
                "purge-expired has not succeeded for more than 1day 2h",
                "purge-expired still fails, 27 times in a row",
            ]
        );
    }

    async fn of_two_daemons_on_one_database_one_mails(db) {
        let there = Installation::new(db);
        let daemons = [there.daemon(1), there.daemon(2)];
        for daemon in &daemons {
            tick(daemon).await;
        }
        there.fail(&daemons[0], PURGE);
        tick(&daemons[0]).await;
        there.pass(seconds(1));
        // Each saw less than three.
        there.fail(&daemons[1], PURGE);
        there.fail(&daemons[1], PURGE);
        let [first, second] = &daemons;
        let (one, two) = tokio::join!(first.tick(), second.tick());
        let later = tokio::join!(first.tick(), second.tick());
        let due: Vec<(&Alerts, DueMail)> = one.into_iter().chain(later.0).map(|due| (first, due))
            .chain(two.into_iter().chain(later.1).map(|due| (second, due)))
            .collect();
        assert_eq!(due.len(), 1);
        for (daemon, due) in due {
            daemon.send(due).await;
        }
        for _ in 0..3 {
            there.pass(seconds(11));
            tokio::join!(tick(first), tick(second));
        }
        assert_eq!(there.subjects(), ["purge-expired failed 3 times in a row"]);

        // The success may come from the one that mailed nothing.
        there.succeed(first, PURGE);
        tokio::join!(tick(first), tick(second));
        for _ in 0..3 {
            there.pass(seconds(11));
            tokio::join!(tick(first), tick(second));
        }
        assert_eq!(there.subjects().len(), 2);
    }

    async fn a_job_that_falls_silent_is_mailed_and_so_is_its_next_success(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        there.succeed(&daemon, PURGE);
        tick(&daemon).await;
        there.pass(hours(26));
        tick(&daemon).await;
        assert_eq!(there.subjects(), Vec::<String>::new());
        assert_eq!(there.metric("timelined_job_alert_active{job=\"purge-expired\",kind=\"silence\"}").unwrap(), "0");
        there.pass(minutes(1));
        tick(&daemon).await;
        tick(&daemon).await;
        assert_eq!(there.subjects(), ["purge-expired has not succeeded for more than 1day 2h"]);
        assert_eq!(there.metric("timelined_job_alert_active{job=\"purge-expired\",kind=\"silence\"}").unwrap(), "1");

        there.succeed(&daemon, PURGE);
        tick(&daemon).await;
        tick(&daemon).await;
        let mails = ["purge-expired has not succeeded for more than 1day 2h", "purge-expired succeeded again"];
        assert_eq!(there.subjects(), mails);
    }

    async fn a_job_that_failed_and_fell_silent_recovers_in_one_mail(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        tick(&daemon).await;
        there.pass(hours(28));
        for _ in 0..3 {
            there.fail(&daemon, PURGE);
        }
        tick(&daemon).await;
        assert_eq!(there.subjects().len(), 2);
        there.pass(minutes(1));
        there.succeed(&daemon, PURGE);
        for _ in 0..3 {
            tick(&daemon).await;
        }
        assert_eq!(there.subjects().len(), 3);
    }

    async fn a_daemon_that_begins_gives_jobs_a_minute_and_then_knows_of_the_silence(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        there.succeed(&daemon, PURGE);
        tick(&daemon).await;
        // It was off for three days.
        there.pass(DAY * 3);
        let daemon = there.daemon(2);
        tick(&daemon).await;
        there.pass(minutes(1));
        tick(&daemon).await;
        assert_eq!(there.subjects(), Vec::<String>::new());
        there.pass(seconds(1));
        tick(&daemon).await;
        assert_eq!(there.subjects(), ["purge-expired has not succeeded for more than 1day 2h"]);
    }

    async fn nothing_is_expected_of_a_job_that_is_paused_or_disabled(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        daemon.set_paused(BTreeSet::from([PURGE.to_owned()]));
        tick(&daemon).await;
        for _ in 0..3 {
            there.fail(&daemon, PURGE);
        }
        for _ in 0..4 {
            there.pass(DAY);
            tick(&daemon).await;
        }
        assert_eq!(there.subjects(), Vec::<String>::new());
        // Resumed, also by a restart, it has all the time that it had at first; its failures stand.
        let daemon = there.daemon(2);
        for _ in 0..13 {
            there.pass(hours(2));
            tick(&daemon).await;
        }
        let of_failures = ["purge-expired failed 3 times in a row", "purge-expired still fails, 3 times in a row"];
        assert_eq!(there.subjects(), of_failures);
        there.pass(hours(2));
        tick(&daemon).await;
        assert_eq!(there.subjects().len(), 3);
    }

    async fn a_delivery_that_fails_on_one_daemon_is_not_excused_by_another(db) {
        if db.engine == Engine::Sqlite {
            // One daemon alone.
            return;
        }
        let there = Installation::new(db);
        let (broken, healthy) = (there.daemon(1), there.daemon(2));
        tick(&broken).await;
        for _ in 0..90 {
            there.fail(&broken, DELIVERY);
            there.succeed(&healthy, DELIVERY);
            tokio::join!(tick(&broken), tick(&healthy));
            there.pass(seconds(1));
        }
        assert_eq!(there.subjects(), ["realtime-delivery failed 3 times in a row"]);
        there.succeed(&broken, DELIVERY);
        tick(&broken).await;
        assert_eq!(there.subjects().len(), 2);
    }

    async fn a_mail_that_cannot_be_sent_is_tried_again_and_holds_nothing_up(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        let mails = there.outbox.path().join("mails");
        std::fs::write(&mails, "no directory").unwrap();
        for _ in 0..3 {
            there.fail(&daemon, PURGE);
        }
        tick(&daemon).await;
        there.pass(seconds(59));
        assert!(daemon.tick().await.is_empty());
        std::fs::remove_file(&mails).unwrap();
        there.pass(seconds(1));
        tick(&daemon).await;
        tick(&daemon).await;
        assert_eq!(there.subjects(), ["purge-expired failed 3 times in a row"]);
    }

    async fn what_became_right_before_anybody_was_told_is_not_mailed(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        let mails = there.outbox.path().join("mails");
        std::fs::write(&mails, "no directory").unwrap();
        for _ in 0..3 {
            there.fail(&daemon, PURGE);
        }
        tick(&daemon).await;
        there.pass(seconds(1));
        there.succeed(&daemon, PURGE);
        std::fs::remove_file(&mails).unwrap();
        for _ in 0..3 {
            tick(&daemon).await;
            there.pass(minutes(1));
        }
        assert_eq!(there.subjects(), Vec::<String>::new());
    }

    async fn what_was_noted_while_the_database_was_away_is_not_lost(db) {
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        tick(&daemon).await;
        there.fail(&daemon, PURGE);
        tick(&daemon).await;
        db.execute("alter table job_alerts rename to elsewhere").await.unwrap();
        for _ in 0..2 {
            there.pass(seconds(1));
            there.fail(&daemon, PURGE);
            assert!(daemon.tick().await.is_empty());
        }
        db.execute("alter table elsewhere rename to job_alerts").await.unwrap();
        tick(&daemon).await;
        assert_eq!(there.subjects(), ["purge-expired failed 3 times in a row"]);
    }

    async fn without_addresses_nothing_is_mailed_and_the_metrics_tell(db) {
        let mut there = Installation::new(db);
        there.config.to.clear();
        let daemon = there.daemon(1);
        for _ in 0..4 {
            there.fail(&daemon, PURGE);
        }
        tick(&daemon).await;
        tick(&daemon).await;
        let active = "timelined_job_alert_active{job=\"purge-expired\",kind=\"failure\"}";
        let failures = "timelined_job_failures_in_a_row{job=\"purge-expired\"}";
        let success = "timelined_job_last_success_timestamp_seconds{job=\"purge-expired\"}";
        assert_eq!(there.metric(active).unwrap(), "1");
        assert_eq!(there.metric(failures).unwrap(), "4");
        assert_eq!(there.metric(success), None);
        there.pass(seconds(1));
        there.succeed(&daemon, PURGE);
        tick(&daemon).await;
        assert_eq!(there.metric(active).unwrap(), "0");
        assert_eq!(there.metric(failures).unwrap(), "0");
        let at: f64 = there.metric(success).unwrap().parse().unwrap();
        assert!((at - 1_770_091_507.789).abs() < 0.001, "{at}");
        assert_eq!(there.subjects(), Vec::<String>::new());
    }

    async fn successes_that_change_nothing_are_seldom_written(db) {
        if db.engine == Engine::Postgres {
            // Other daemons must know.
            return;
        }
        let there = Installation::new(db);
        let daemon = there.daemon(1);
        let mut written = BTreeSet::new();
        for _ in 0..180 {
            there.succeed(&daemon, DELIVERY);
            tick(&daemon).await;
            there.pass(seconds(1));
            written.insert(db.int("select since from job_alerts where job = 'realtime-delivery' and kind = 'silence'").await);
        }
        assert_eq!(written.len(), 3);
    }
}

#[test]
fn one_of_two_addresses_that_is_refused_is_tried_again_alone() {
    use crate::support::database::run;
    run(Engine::Sqlite, async |db: &Database| {
        let server = Server::start(&["--script", "ok,451,ok"]);
        let mut there = Installation::new(db);
        there.config.to.push("second@example.com".parse().unwrap());
        there.transport = Some(Transport::Smtp(config::Smtp {
            host: "localhost".to_owned(),
            port: u16::try_from(server.port).unwrap(),
            tls: config::SmtpTls::None,
            login: None,
            ca: None,
            timeout: Duration::from_secs(5),
        }));
        let daemon = there.daemon(1);
        for _ in 0..3 {
            there.fail(&daemon, PURGE);
        }
        tick(&daemon).await;
        assert_eq!(server.mails().len(), 1);
        // Also by another daemon.
        there.pass(minutes(1));
        tick(&there.daemon(2)).await;
        let mails = server.mails();
        let to: Vec<_> = mails
            .iter()
            .map(|mail| mail.envelope["rcpt_tos"].to_string())
            .collect();
        assert_eq!(mails.len(), 2, "{to:?}");
        assert!(to[0].contains("ops@example.com"), "{to:?}");
        assert!(to[1].contains("second@example.com"), "{to:?}");
        assert_ne!(mails[0].message_id(), mails[1].message_id());
    });
}

#[test]
fn the_task_ticks_by_itself_and_ends_with_the_daemon() {
    use crate::support::database::run;
    run(Engine::Sqlite, async |db: &Database| {
        let there = Installation::new(db);
        let settings = AlertSettings {
            clock: Arc::new(SystemClock),
            ..there.settings(1)
        };
        let (tracker, stop) = (settings.tracker.clone(), settings.stop.clone());
        let alerts = Arc::new(Alerts::new(settings, &jobs()));
        tracker.spawn(alerts.clone().run());
        let fail = || alerts.run_ended(&run_now(PURGE, RunState::Failed));
        (0..3).for_each(|_| fail());
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while there.subjects().is_empty() {
            assert!(std::time::Instant::now() < deadline, "no mail in time");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        stop.cancel();
        tracker.close();
        tokio::time::timeout(Duration::from_secs(10), tracker.wait())
            .await
            .unwrap();
        assert_eq!(there.subjects().len(), 1);
    });
}

fn run_now(job: &str, state: RunState) -> Run {
    run(job, state, SystemClock.now())
}
