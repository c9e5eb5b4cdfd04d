//! The composition: configuration → storage → hub → jobs → API. Nothing else knows everything.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use base64::Engine as _;
use chrono::TimeDelta;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio_cron_scheduler::JobScheduler;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::access::Access;
use crate::api::{self, ExportsApi, Health, JobsApi, LiveApi, OpsApi, Parts, RetentionApi};
use crate::config::{Config, DatabaseUrl, JobDefinition, JobKind, Synchronous, Transport};
use crate::domain::{Clock, Retention, RetentionRule, RunId};
use crate::erasure::{Book, Eraser, EraserParts};
use crate::export::{self, Exporter};
use crate::jobs::{
    AlertSettings, Alerts, BatchTime, Deliver, Job, Pulse, Purge, Runner, RunnerHandle,
    RunnerSettings, ScheduleExports,
};
use crate::live::{Acknowledger, Hub, LiveCounts, Pump, SessionSettings};
use crate::mail::Mailer;
use crate::storage::Storage;
use crate::storage::postgres::PgStorage;
use crate::storage::sqlite::SqliteStorage;
use crate::telemetry::Metrics;
use crate::timeline::Timeline;

/// How long what was aborted gets to end.
const ABORT_GRACE: Duration = Duration::from_secs(2);
/// Events of a look of the pump where no delivery job says otherwise.
const DEFAULT_BATCH: u32 = 100;
/// How long a transaction of the purge should take: SQLite has one writer, and inserts wait for it, and
/// then for the disk, which takes about as long again.
const SQLITE_BATCH_TIME: BatchTime = BatchTime {
    alone: Duration::from_millis(10),
    beside_others: Duration::from_millis(3),
};
const POSTGRES_BATCH_TIME: BatchTime = BatchTime {
    alone: Duration::from_millis(50),
    beside_others: Duration::from_millis(50),
};

/// A running daemon.
pub struct Daemon {
    address: SocketAddr,
    ops_address: Option<SocketAddr>,
    storage: Storage,
    /// The use cases, for programs that run a daemon within themselves, such as the demo.
    pub timeline: Timeline,
    health: Arc<Health>,
    scheduler: JobScheduler,
    tracker: TaskTracker,
    writers: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
    config: Config,
    job_parts: JobParts,
    runner: RunnerHandle,
    definitions: watch::Sender<Arc<[JobDefinition]>>,
    alert_parts: AlertSettings,
    alerts: watch::Sender<Arc<Alerts>>,
    /// Held as long as the daemon runs; the system lets go of it when the process ends.
    _lock: Option<File>,
}

impl Daemon {
    /// Starts everything; when this returns, the daemon serves.
    ///
    /// # Errors
    /// Where the state directory, the database, the key or an address cannot be had; the message
    /// names it and the way out.
    #[expect(
        clippy::too_many_lines,
        reason = "the composition, read from top to bottom"
    )]
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<Self> {
        make_private_directory(&config.state_directory)?;
        let lock = match &config.database.url {
            DatabaseUrl::Sqlite(path) => Some(lock_database(path)?),
            DatabaseUrl::Postgres(_) => None,
        };
        let storage = open_storage(&config).await?;
        if config.database.migrate {
            storage
                .migrate()
                .await
                .context("cannot migrate the database")?;
        } else {
            storage
                .check_schema()
                .await
                .context("cannot use the database")?;
        }
        let access = Arc::new(access(&config)?);
        let mailer = Mailer::new(&config.mail).context("cannot set up mail")?;
        if storage.is_exclusive() {
            // Nobody else holds this file: what runs was left by a daemon that is gone.
            let runs = storage
                .ledger
                .recover(clock.now())
                .await
                .context("cannot take over what was left")?;
            if runs > 0 {
                tracing::warn!(runs, "took over runs that a daemon before this one left");
            }
        }
        let daemon = RunId::generate(clock.now()).uuid();
        if let Some(lock) = &lock {
            // Only its own claims: a command may be at work beside, and its mails would go out twice.
            if let Some(before) = holder(lock).context("cannot read who held the database")? {
                let release = storage.exports.release(before);
                release.await.context("cannot take over what was left")?;
            }
            sign(lock, daemon).context("cannot write who holds the database")?;
        }
        let listener = listen(config.http.listen, "http.listen", "TIMELINED__HTTP__LISTEN").await?;
        let address = listener
            .local_addr()
            .context("the listening socket has no address")?;
        let ops_listener = match config.http.ops_listen {
            Some(at) => Some(listen(at, "http.ops_listen", "TIMELINED__HTTP__OPS_LISTEN").await?),
            None => None,
        };
        let ops_address = ops_listener
            .as_ref()
            .and_then(|listener| listener.local_addr().ok());

        let tracker = TaskTracker::new();
        let writers = TaskTracker::new();
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let hub = Arc::new(Hub::default());
        let (pump_wake, export_wake) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let pulse = Pulse::default();
        let metrics = Arc::new(Metrics::default());

        let counts = Arc::new(LiveCounts::default());
        let pump = Pump::new(
            storage.events.clone(),
            hub.clone(),
            clock.clone(),
            delivery_batch(&config.jobs).unwrap_or(DEFAULT_BATCH),
            pump_wake.clone(),
            counts.clone(),
        );
        let pump = Arc::new(pump.await.context("cannot read the outbox")?);
        let pauses = storage.ledger.pauses().await;
        let pauses = pauses.context("cannot read which jobs are paused")?;
        pump.set_paused(pauses.iter().any(|pause| {
            let mut jobs = config.jobs.iter();
            jobs.any(|job| job.enabled && job.kind.is_delivery() && job.name == pause.job)
        }));
        if delivery_batch(&config.jobs).is_some() {
            let (pump, stop) = (pump.clone(), stop.clone());
            tracker.spawn(async move { pump.run(stop).await });
        }
        let (acknowledger, acks, queue) = Acknowledger::new(
            storage.events.clone(),
            hub.clone(),
            clock.clone(),
            counts.clone(),
        );
        writers.spawn(acknowledger.run(queue, abort.clone()));

        let mailer = Arc::new(mailer);
        let exporter = Exporter::new(
            storage.exports.clone(),
            mailer.clone(),
            clock.clone(),
            export_settings(&config, address, daemon)?,
            export_wake.clone(),
        );
        tracker.spawn(exporter.run(stop.clone(), abort.clone()));

        let job_parts = JobParts {
            storage: storage.clone(),
            clock: clock.clone(),
            pump: pump.clone(),
            counts: counts.clone(),
            export_wake: export_wake.clone(),
        };
        let (definitions, definitions_seen) = watch::channel(Arc::from(config.jobs.as_slice()));
        let jobs = job_parts.jobs(&config);
        let alert_parts = AlertSettings {
            store: storage.alerts.clone(),
            is_alone: storage.is_exclusive(),
            mailer,
            from: config.mail.from.clone(),
            uncertain: config.mail.uncertain,
            config: config.alerts.clone(),
            clock: clock.clone(),
            daemon,
            tracker: tracker.clone(),
            stop: stop.child_token(),
            abort: abort.clone(),
            metrics: metrics.clone(),
        };
        let (alerts, alerts_seen) = watch::channel(watch_jobs(&alert_parts, &config.jobs));
        let runner = Runner::new(
            RunnerSettings {
                ledger: storage.ledger.clone(),
                is_shared: !storage.is_exclusive(),
                clock: clock.clone(),
                daemon,
                tracker: tracker.clone(),
                stop: stop.clone(),
                abort: abort.clone(),
                pulse: pulse.clone(),
                metrics: metrics.clone(),
                alerts: Some(alerts_seen),
                keep_history: config.history.keep,
            },
            jobs,
        );
        let runner_handle = runner.handle();
        tracker.spawn(runner.run());
        let scheduler = pulse.start().await.context("cannot start the pulse")?;

        let timeline = Timeline {
            events: storage.events.clone(),
            hub: hub.clone(),
            clock: clock.clone(),
            wake: pump_wake,
        };
        let eraser = eraser_parts(
            &config,
            &storage,
            hub.clone(),
            clock.clone(),
            tracker.clone(),
            stop.clone(),
        );
        let eraser = Arc::new(Eraser::new(eraser, open_book(&config)?));
        warn_of_missing_erasures(&eraser).await?;
        tracker.spawn(eraser.clone().run());
        let session = SessionSettings {
            access: access.clone(),
            events: storage.events.clone(),
            hub: hub.clone(),
            acks,
            clock: clock.clone(),
            window: usize::from(config.realtime.window),
            ack_timeout: config.realtime.ack_timeout,
            stop: stop.clone(),
        };
        let health = Arc::new(Health {
            storage: storage.clone(),
            pulse: pulse.clone(),
            stop: stop.clone(),
        });
        let router = api::router(Parts {
            access,
            timeline: timeline.clone(),
            exports: ExportsApi {
                exports: storage.exports.clone(),
                directory: config.export.directory.clone(),
                allowed_domains: Arc::new(config.mail.allowed_domains.clone()),
                clock: clock.clone(),
                wake: export_wake,
            },
            jobs: JobsApi {
                jobs: definitions_seen,
                ledger: storage.ledger.clone(),
                clock: clock.clone(),
                pulse,
            },
            retention: RetentionApi {
                store: storage.retention.clone(),
                eraser,
                clock,
            },
            live: LiveApi {
                session: Arc::new(session),
                tracker: tracker.clone(),
                allowed_origins: config.http.allowed_origins.clone().into(),
            },
            ops: OpsApi {
                health: health.clone(),
            },
        });
        tracker.spawn(api::serve(listener, router, tracker.clone(), stop.clone()));
        if let Some(listener) = ops_listener {
            let router = api::metrics(metrics, hub);
            tracker.spawn(api::serve(listener, router, tracker.clone(), stop.clone()));
        }
        tracing::info!(
            http.listen = %address,
            http.ops_listen = ops_address.map(tracing::field::display),
            node.id = %daemon,
            database = storage.engine(),
            version = env!("CARGO_PKG_VERSION"),
            "serving on http://{address}"
        );
        Ok(Self {
            address,
            ops_address,
            storage,
            timeline,
            health,
            scheduler,
            tracker,
            writers,
            stop,
            abort,
            config,
            job_parts,
            runner: runner_handle,
            definitions,
            alert_parts,
            alerts,
            _lock: lock,
        })
    }

    /// The API's address, with the port that was bound.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of `/metrics`.
    #[must_use]
    pub fn ops_address(&self) -> Option<SocketAddr> {
        self.ops_address
    }

    /// The state of the parts.
    #[must_use]
    pub fn health(&self) -> Arc<Health> {
        self.health.clone()
    }

    /// Cancelled when the daemon must end, because an acknowledged write can no longer be promised.
    #[must_use]
    pub fn failed(&self) -> CancellationToken {
        self.storage.failed.clone()
    }

    /// Cancelling it cuts the drain of [`Daemon::stop`] short.
    #[must_use]
    pub fn abort(&self) -> CancellationToken {
        self.abort.clone()
    }

    /// Applies what another configuration says of jobs, alerts and retention, or nothing. Answers what
    /// was changed.
    ///
    /// # Errors
    /// The sections that differ and take effect at a start alone.
    pub fn reload(&mut self, config: Config) -> Result<Changes, String> {
        let fixed = fixed_sections(&self.config, &config);
        if !fixed.is_empty() {
            return Err(format!(
                "a restart is needed to change {}",
                fixed.join(", ")
            ));
        }
        let changes = Changes::between(&self.config, &config);
        self.runner.replace(self.job_parts.jobs(&config));
        self.definitions
            .send_replace(Arc::from(config.jobs.as_slice()));
        self.alert_parts.stop.cancel();
        self.alert_parts.stop = self.stop.child_token();
        self.alert_parts.config = config.alerts.clone();
        let before = self
            .alerts
            .send_replace(watch_jobs(&self.alert_parts, &config.jobs));
        self.tracker.spawn(async move { before.flush().await });
        self.config = config;
        Ok(changes)
    }

    /// Stops: nothing new begins, what runs reaches a safe point or is given back, sockets are told.
    pub async fn stop(mut self) {
        tracing::info!(
            running = self.tracker.len(),
            timeout_s = self.config.http.shutdown_timeout.as_secs(),
            "stopping"
        );
        self.stop.cancel();
        if let Err(error) = self.scheduler.shutdown().await {
            tracing::warn!(%error, "could not stop the pulse");
        }
        self.tracker.close();
        self.writers.close();
        // The router, and the senders of acknowledgements with it, end with the last connection.
        let drained = tokio::select! {
            () = self.tracker.wait() => true,
            () = tokio::time::sleep(self.config.http.shutdown_timeout) => false,
            () = self.abort.cancelled() => false,
        };
        if !drained {
            tracing::warn!(running = self.tracker.len(), "ending what is still running");
            self.abort.cancel();
            drop(tokio::time::timeout(ABORT_GRACE, self.tracker.wait()).await);
        }
        if tokio::time::timeout(ABORT_GRACE, self.writers.wait())
            .await
            .is_err()
        {
            self.abort.cancel();
        }
        let alerts = self.alerts.borrow().clone();
        drop(tokio::time::timeout(ABORT_GRACE, alerts.flush()).await);
        // Bounded too: a pool waits for every connection that a hanging statement holds.
        if tokio::time::timeout(ABORT_GRACE, self.storage.close())
            .await
            .is_err()
        {
            tracing::warn!("could not close the database in time");
        }
        tracing::info!("stopped");
    }
}

/// What a reload changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The jobs that were added, changed or removed.
    pub jobs: Vec<String>,
    /// The sections beside them.
    pub sections: Vec<&'static str>,
}

impl Changes {
    fn between(old: &Config, new: &Config) -> Self {
        let is_the_same = |name: &str| {
            let find = |jobs: &[JobDefinition]| jobs.iter().find(|job| job.name == name).cloned();
            let expect = |config: &Config| config.alerts.expect_within.get(name).copied();
            find(&old.jobs) == find(&new.jobs) && expect(old) == expect(new)
        };
        let names: BTreeSet<&String> = (old.jobs.iter().chain(&new.jobs))
            .map(|job| &job.name)
            .collect();
        let tells = |config: &Config| (config.alerts.to.clone(), config.alerts.after);
        let sections = [
            ("[alerts]", tells(old) != tells(new)),
            ("[[retention]]", old.retention != new.retention),
        ];
        Self {
            jobs: names
                .into_iter()
                .filter(|name| !is_the_same(name))
                .cloned()
                .collect(),
            sections: sections
                .into_iter()
                .filter_map(|(section, differs)| differs.then_some(section))
                .collect(),
        }
    }

    /// Whether nothing was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.sections.is_empty()
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let jobs = (!self.jobs.is_empty()).then(|| format!("jobs: {}", self.jobs.join(", ")));
        let sections = self.sections.iter().map(|section| (*section).to_owned());
        let parts: Vec<String> = jobs.into_iter().chain(sections).collect();
        f.write_str(&parts.join("; "))
    }
}

/// The sections of a configuration that differ from those of the start, and take effect there alone.
fn fixed_sections(old: &Config, new: &Config) -> Vec<&'static str> {
    [
        (
            "state_directory",
            old.state_directory != new.state_directory,
        ),
        ("[database]", old.database != new.database),
        ("[http]", old.http != new.http),
        ("[auth]", old.auth != new.auth),
        ("[mail]", old.mail != new.mail),
        ("[realtime]", old.realtime != new.realtime),
        ("[export]", old.export != new.export),
        ("[history]", old.history != new.history),
        ("[log]", old.log != new.log),
        (
            "whether realtime_delivery runs, and its batch",
            delivery_batch(&old.jobs) != delivery_batch(&new.jobs),
        ),
    ]
    .into_iter()
    .filter_map(|(section, differs)| differs.then_some(section))
    .collect()
}

/// Begins to watch the jobs for what somebody should see to.
fn watch_jobs(settings: &AlertSettings, jobs: &[JobDefinition]) -> Arc<Alerts> {
    let alerts = Arc::new(Alerts::new(settings.clone(), jobs));
    settings.tracker.spawn(alerts.clone().run());
    alerts
}

/// What jobs are made of.
struct JobParts {
    storage: Storage,
    clock: Arc<dyn Clock>,
    pump: Arc<Pump>,
    counts: Arc<LiveCounts>,
    export_wake: Arc<Notify>,
}

impl JobParts {
    fn jobs(&self, config: &Config) -> Vec<(JobDefinition, Arc<dyn Job>)> {
        let jobs = config.jobs.iter();
        jobs.map(|job| (job.clone(), self.job(job, &config.retention)))
            .collect()
    }

    fn job(&self, definition: &JobDefinition, rules: &[RetentionRule]) -> Arc<dyn Job> {
        match &definition.kind {
            JobKind::RealtimeDelivery { .. } => {
                Arc::new(Deliver::new(self.pump.clone(), self.counts.clone()))
            }
            JobKind::PurgeExpired {
                older_than,
                max_rate,
                dry_run,
            } => {
                let retention = retention(*older_than, rules);
                let name = &definition.name;
                let purge = purge(&self.storage, &self.clock, name, retention, *dry_run);
                Arc::new(Purge {
                    max_rate: *max_rate,
                    ..purge
                })
            }
            JobKind::TimelineExport(settings) => Arc::new(ScheduleExports {
                name: definition.name.clone(),
                settings: settings.as_ref().clone(),
                exports: self.storage.exports.clone(),
                clock: self.clock.clone(),
                wake: self.export_wake.clone(),
            }),
        }
    }
}

/// The rules of a purge that keeps expired events for `older_than` where none says otherwise.
#[must_use]
pub fn retention(older_than: Duration, rules: &[RetentionRule]) -> Retention {
    let older_than = TimeDelta::from_std(older_than).unwrap_or(TimeDelta::MAX);
    Retention::new(older_than).with_rules(rules.to_vec())
}

/// The purge on this storage.
#[must_use]
pub fn purge(
    storage: &Storage,
    clock: &Arc<dyn Clock>,
    job: &str,
    retention: Retention,
    dry_run: bool,
) -> Purge {
    Purge {
        events: storage.events.clone(),
        store: storage.retention.clone(),
        ledger: storage.ledger.clone(),
        clock: clock.clone(),
        retention,
        job: job.to_owned(),
        dry_run,
        max_rate: 0,
        confirmed_by: None,
        batch_time: batch_time(storage),
    }
}

/// The erasures that were carried out, as this machine knows them.
fn open_book(config: &Config) -> anyhow::Result<Book> {
    let (book, bad) = Book::open(&config.state_directory).with_context(|| {
        let path = config.state_directory.display();
        format!("cannot read the ledger of erasures in {path}")
    })?;
    for line in bad {
        let path = book.path().display().to_string();
        tracing::error!(path, %line, "the ledger of erasures is damaged; see: timelined doctor");
    }
    Ok(book)
}

async fn warn_of_missing_erasures(eraser: &Eraser) -> anyhow::Result<()> {
    let missing = eraser.missing().await.context("cannot read the erasures")?;
    if !missing.is_empty() {
        tracing::error!(
            count = missing.len(),
            "the database was restored from a backup that knows nothing of {} erasures: run `timelined doctor --replay-erasures`",
            missing.len()
        );
    }
    Ok(())
}

/// What an eraser needs of the configuration.
#[must_use]
pub fn eraser_parts(
    config: &Config,
    storage: &Storage,
    hub: Arc<Hub>,
    clock: Arc<dyn Clock>,
    tracker: TaskTracker,
    stop: CancellationToken,
) -> EraserParts {
    EraserParts {
        store: storage.erasures.clone(),
        ledger: storage.ledger.clone(),
        hub,
        clock,
        exports: config.export.directory.clone(),
        outbox: match &config.mail.transport {
            Transport::Directory(directory) => Some(directory.clone()),
            Transport::Smtp(_) => None,
        },
        batch_time: batch_time(storage).beside_others,
        is_alone: storage.is_exclusive(),
        tracker,
        stop,
    }
}

/// How long a transaction that deletes should take.
fn batch_time(storage: &Storage) -> BatchTime {
    if storage.is_exclusive() {
        SQLITE_BATCH_TIME
    } else {
        POSTGRES_BATCH_TIME
    }
}

/// What the export worker needs of the configuration, with the key that links are derived from.
///
/// # Errors
/// Where the key cannot be made or read.
pub fn export_settings(
    config: &Config,
    bound: SocketAddr,
    worker: Uuid,
) -> anyhow::Result<export::Settings> {
    // A command on PostgreSQL may be the first to write there.
    make_private_directory(&config.state_directory)?;
    let key = own_key(&config.state_directory, &LINK_KEY)?;
    let key = <[u8; 32]>::try_from(key.as_slice()).with_context(|| {
        format!(
            "{} is damaged; remove it, and a new one is made",
            LINK_KEY.file
        )
    })?;
    Ok(export::Settings {
        directory: config.export.directory.clone(),
        keep: config.export.keep,
        paper: export::Paper {
            fonts: config.export.fonts.clone(),
            locale: config.export.locale,
            max_events: config.export.pdf_max_events,
            colour: config.export.branding.colour,
            footer: config.export.branding.footer.clone(),
        },
        public_url: config.http.link_base(bound),
        link_key: export::LinkKey::new(key),
        worker,
        from: config.mail.from.clone(),
        max_attachment: config.mail.max_attachment,
        uncertain: config.mail.uncertain,
    })
}

fn delivery_batch(jobs: &[JobDefinition]) -> Option<u32> {
    jobs.iter()
        .filter(|job| job.enabled)
        .find_map(|job| match job.kind {
            JobKind::RealtimeDelivery { batch } => Some(batch),
            _ => None,
        })
}

/// Opens the database of the configuration, without looking at its schema.
///
/// # Errors
/// Where it cannot be opened or reached; the message names it without its password.
pub async fn open_storage(config: &Config) -> anyhow::Result<Storage> {
    match &config.database.url {
        DatabaseUrl::Sqlite(path) => {
            touch(path)?;
            let durable = config.database.synchronous == Synchronous::Full;
            let storage = SqliteStorage::open(path, durable).await.with_context(|| {
                format!("cannot open the database {} (database.url)", path.display())
            })?;
            Ok(Storage::sqlite(storage))
        }
        DatabaseUrl::Postgres(url) => {
            let storage = PgStorage::open(url.expose_secret())
                .await
                .with_context(|| format!("cannot use {} (database.url)", config.database.url))?;
            Ok(Storage::postgres(storage))
        }
    }
}

/// Makes a SQLite file, readable by its user alone, and finds out what the system has against it:
/// `SQLite` would only say that it is unable to open it. Before any connection, since closing a file
/// lets go of all locks that this process holds on it.
fn touch(path: &Path) -> anyhow::Result<()> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map(drop)
        .with_context(|| format!("cannot open the database {} (database.url)", path.display()))
}

/// Access by the configuration, with the key of the state directory where none is configured.
///
/// # Errors
/// Where the key cannot be made or read.
pub fn access(config: &Config) -> anyhow::Result<Access> {
    let own_key = match &config.auth.verifier {
        crate::config::Verifier::Hs256(None) => own_key(&config.state_directory, &TOKEN_KEY)?,
        _ => Vec::new(),
    };
    Ok(Access::new(&config.auth, &own_key)?)
}

/// A key of the state directory.
struct OwnKey {
    file: &'static str,
    /// What it is for.
    purpose: &'static str,
    /// What becomes of things without it.
    loss: &'static str,
}

const TOKEN_KEY: OwnKey = OwnKey {
    file: "hs256.key",
    purpose: "tokens",
    loss: "tokens made with the old one end",
};
const LINK_KEY: OwnKey = OwnKey {
    file: "link.key",
    purpose: "links",
    loss: "links that were mailed stay good",
};

/// A key that is made when it is first needed: 32 random bytes, readable by the daemon's user alone.
fn own_key(directory: &Path, key: &OwnKey) -> anyhow::Result<Vec<u8>> {
    let path = directory.join(key.file);
    let purpose = key.purpose;
    let cannot = |what: &str| format!("cannot {what} the key for {purpose}, {}", path.display());
    match OpenOptions::new().read(true).open(&path) {
        Ok(mut file) => {
            let mut text = String::new();
            file.read_to_string(&mut text)
                .with_context(|| cannot("read"))?;
            let decoded = base64::engine::general_purpose::STANDARD.decode(text.trim());
            match decoded {
                Ok(bytes) if bytes.len() >= 32 => Ok(bytes),
                _ => bail!(
                    "{} is damaged; remove it, and a new one is made ({})",
                    path.display(),
                    key.loss
                ),
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let bytes: [u8; 32] = rand::random();
            let text = base64::engine::general_purpose::STANDARD.encode(bytes);
            // Written beside and linked into place, so that a reader never sees half of it, and of
            // two processes that make one the first wins.
            let part = directory.join(format!("{}.{}", key.file, Uuid::from_bytes(rand::random())));
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&part)
                .with_context(|| cannot("make"))?;
            writeln!(file, "{text}")
                .and_then(|()| file.sync_all())
                .with_context(|| cannot("write"))?;
            let linked = std::fs::hard_link(&part, &path);
            std::fs::remove_file(&part).with_context(|| cannot("make"))?;
            match linked {
                Ok(()) => Ok(bytes.to_vec()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => own_key(directory, key),
                Err(error) => Err(error).with_context(|| cannot("make")),
            }
        }
        Err(error) => Err(error).with_context(|| cannot("read")),
    }
}

/// Makes a directory for the daemon's user alone.
///
/// # Errors
/// Where it cannot be made; the message names the key of the configuration.
pub fn make_private_directory(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| {
            format!(
                "cannot make the state directory {} (state_directory, or $STATE_DIRECTORY)",
                path.display()
            )
        })
}

/// One daemon holds a SQLite file: a second one would deliver and run jobs besides the first.
fn lock_database(path: &Path) -> anyhow::Result<File> {
    let lock = PathBuf::from(format!("{}.lock", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock)
        .with_context(|| format!("cannot open {} (database.url)", lock.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(anyhow!(
            "another timelined holds the database {}; one daemon serves a SQLite file, several need PostgreSQL",
            path.display()
        )),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", lock.display()))
        }
    }
}

/// The daemon that held the database last, by what it wrote into the lock.
fn holder(mut lock: &File) -> io::Result<Option<Uuid>> {
    let mut text = String::new();
    lock.read_to_string(&mut text)?;
    // Empty before the first daemon, or half written at a loss of power: its claims lapse.
    Ok(text.trim().parse().ok())
}

/// Writes who holds the database.
fn sign(mut lock: &File, daemon: Uuid) -> io::Result<()> {
    lock.rewind()?;
    lock.set_len(0)?;
    writeln!(lock, "{daemon}")
}

async fn listen(at: SocketAddr, key: &str, variable: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(at).await.map_err(|error| {
        let why = match error.kind() {
            ErrorKind::AddrInUse => "another program has it".to_owned(),
            ErrorKind::PermissionDenied => "the system does not permit it".to_owned(),
            ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
            _ => io::Error::to_string(&error),
        };
        anyhow!("cannot listen on {at}: {why}; set {key} or {variable} to another address")
    })
}
