//! The life of the process: signals, and what systemd is told.

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::api::Health;
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

    /// Waits for one that ends the daemon.
    async fn next(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                // TODO: reload the configuration. Meanwhile a SIGHUP must not end the daemon, as it
                // does by default: whoever sends one wants it to run on.
                _ = self.hangup.recv() => tracing::warn!(
                    "SIGHUP: there is no reload yet; the configuration of the start runs on, and a restart applies another"
                ),
            }
        }
    }
}

/// Serves until a signal or a failure. A second signal cuts the drain short.
pub async fn serve(daemon: Daemon, mut signals: Signals) -> Ended {
    notify(&[NotifyState::Ready, NotifyState::Status("serving")]);
    let (failed, health) = (daemon.failed(), daemon.health());
    tokio::select! {
        () = signals.next() => {}
        () = failed.cancelled() => return Ended::Failed,
        () = feed_watchdog(&health) => {}
    }
    notify(&[
        NotifyState::Stopping,
        NotifyState::Status("stopping: draining what runs"),
    ]);
    let abort = daemon.abort();
    let stopping = daemon.stop();
    tokio::pin!(stopping);
    tokio::select! {
        () = &mut stopping => return ended(&failed),
        () = signals.next() => abort.cancel(),
    }
    stopping.await;
    ended(&failed)
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
