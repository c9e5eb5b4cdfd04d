//! The life of the process: signals, and what systemd is told.

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::api::Health;
use crate::config::Config;
use crate::daemon::Daemon;

/// How the daemon's life ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By a signal, drained.
    Stopped,
    /// By a failure after which nothing may be written any more.
    Failed,
}

/// The signals that the daemon takes; made before anything starts, so that none is missed.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Begins to listen for them.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
            _ = self.hangup.recv() => Told::Reload,
        }
    }
}

/// What a signal asks for.
enum Told {
    Stop,
    Reload,
}

/// Serves until a signal or a failure. SIGHUP reads the configuration again by `read`; a second
/// signal that ends the daemon cuts the drain short.
pub async fn serve(
    mut daemon: Daemon,
    mut signals: Signals,
    read: impl Fn() -> Result<Config, String>,
) -> Ended {
    notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
    let (failed, health) = (daemon.failed(), daemon.health());
    let watchdog = feed_watchdog(&health);
    tokio::pin!(watchdog);
    loop {
        tokio::select! {
            told = signals.next() => match told {
                Told::Stop => break,
                Told::Reload => reload(&mut daemon, &read),
            },
            () = failed.cancelled() => return Ended::Failed,
            () = &mut watchdog => break,
        }
    }
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("stopping: draining what runs"),
    ]);
    let abort = daemon.abort();
    let stopping = daemon.stop();
    tokio::pin!(stopping);
    loop {
        tokio::select! {
            () = &mut stopping => return ended(&failed),
            told = signals.next() => match told {
                Told::Stop => break abort.cancel(),
                Told::Reload => tracing::warn!("SIGHUP: the daemon is stopping"),
            },
        }
    }
    stopping.await;
    ended(&failed)
}

/// Applies the configuration as it is now, or keeps the one that runs and says why.
fn reload(daemon: &mut Daemon, read: impl Fn() -> Result<Config, String>) {
    match read().and_then(|config| daemon.reload(config)) {
        Ok(changed) if changed.is_empty() => {
            tracing::info!("SIGHUP: the configuration is as it was");
        }
        Ok(changed) => {
            let jobs = changed.jobs.join(", ");
            let sections = changed.sections.join(", ");
            tracing::info!(
                jobs,
                sections,
                "SIGHUP: the configuration was applied; {changed}"
            );
        }
        Err(error) => {
            tracing::error!(error, "SIGHUP: nothing was changed: {error}");
        }
    }
}

/// An fsync may fail during the drain, too.
fn ended(failed: &CancellationToken) -> Ended {
    if failed.is_cancelled() {
        Ended::Failed
    } else {
        Ended::Stopped
    }
}

/// Feeds systemd's watchdog while the planner keeps its pulse and the database answers in time; an
/// error in time is an answer, since an absent database is no reason to be killed.
async fn feed_watchdog(health: &Health) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    let mut tick = tokio::time::interval(limit / 3);
    loop {
        tick.tick().await;
        if health.makes_progress().await {
            notify(&[NotifyState::Watchdog]);
        } else {
            tracing::error!(
                watchdog_s = limit.as_secs_f64(),
                "no progress: the watchdog is not fed"
            );
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // Without a service manager there is no socket, and this does nothing.
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "could not tell the service manager");
    }
}
