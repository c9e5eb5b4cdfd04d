//! PostgreSQL 15 and newer: shared by any number of daemons.
//!
//! Pools by role, so that a long purge never stands in front of a request. Daemons share work by
//! `for update skip locked`: what another one holds is being done. The schema's own rules are in
//! `migrations/postgres`.

mod alerts;
mod erasure;
mod events;
mod exports;
mod ledger;
mod retention;

use std::cell::Cell;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::BoxFuture;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions, PgRow, PgSslMode};
use sqlx::{Column, ColumnIndex, ConnectOptions, Connection, Row, TypeInfo};
use uuid::Uuid;

use super::rows::Columns;
use super::{StorageError, StorageResult, migrations};

/// The oldest version whose SQL this is, as `server_version_num` says it.
const OLDEST_SERVER: u32 = 150_000;
/// How long a caller waits for a connection, and a new connection for the server.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that lay still for longer is asked whether it lives before it is used. Less would
/// add a round trip to the poll of each second.
const UNPROVEN_AFTER: Duration = Duration::from_secs(5);

/// What a connection may take its time for.
#[derive(Debug, Clone, Copy)]
struct Limits {
    statement: &'static str,
    lock: &'static str,
    /// Whether rows may be read out of their order, and sorted: "on" or "off".
    sort: &'static str,
    /// Whether a commit waits for the disk; `None` leaves it to the server.
    synchronous_commit: Option<&'static str>,
}

/// Somebody waits for the answer.
const FOREGROUND: Limits = Limits {
    statement: "10s",
    lock: "5s",
    sort: "on",
    synchronous_commit: None,
};
/// Batches of maintenance.
const WORKER: Limits = Limits {
    statement: "60s",
    lock: "5s",
    sort: "on",
    synchronous_commit: None,
};
/// Batches of the purge, which should take 50 ms. While one waits for a lock, others wait for those
/// that it has: it gives up before they notice, and comes again with less. On a table that nobody has
/// analyzed, such as a restored one, the planner takes what is due for a few rows, and would read and
/// sort all of it for each batch; in the index they are in order. Nobody was promised what it does: it
/// is on the disk before the run's end is, and what a crash takes back is done again.
const PURGE: Limits = Limits {
    statement: "5s",
    lock: "100ms",
    sort: "off",
    synchronous_commit: Some("off"),
};
/// An index over a large table takes its time; a second daemon waits until the first has migrated.
const MIGRATION: Limits = Limits {
    statement: "0",
    lock: "60s",
    sort: "on",
    synchronous_commit: None,
};

/// An open PostgreSQL database.
// Not `Debug`: the options hold the password.
#[derive(Clone)]
pub struct PgStorage {
    options: PgConnectOptions,
    /// HTTP and realtime.
    foreground: PgPool,
    /// Ledger, exports, and what the purge reads.
    worker: PgPool,
    /// What the purge deletes.
    purge: PgPool,
    /// How often a connection was taken from the foreground's.
    asked: Arc<AtomicU64>,
}

impl PgStorage {
    /// Opens the database that `url` names and proves that it answers. Off loopback the server must
    /// show a certificate for its name (`sslmode=verify-full`), unless the URL says otherwise.
    ///
    /// # Errors
    /// Where the URL cannot be read, the server is away or refuses, or is older than 15.
    pub async fn open(url: &str) -> StorageResult<Self> {
        let mut options = PgConnectOptions::from_str(url)?
            // A statement that takes longer than a second is worth a line.
            .log_statements(tracing::log::LevelFilter::Trace)
            .log_slow_statements(tracing::log::LevelFilter::Warn, Duration::from_secs(1));
        if !names_sslmode(url) && !is_local(&options) {
            options = options.ssl_mode(PgSslMode::VerifyFull);
        }
        let asked = Arc::<AtomicU64>::default();
        let foreground = pool(&options, FOREGROUND, (10, 1), &asked);
        let worker = pool(&options, WORKER, (4, 0), &Arc::default());
        let purge = pool(&options, PURGE, (2, 0), &Arc::default());
        let storage = Self {
            options,
            foreground,
            worker,
            purge,
            asked,
        };
        // Not by a pool, which would try a refused connection again until its timeout, and then
        // say only that it took too long.
        let connection = storage.connect(FOREGROUND).await?;
        let version = connection.server_version_num();
        connection.close().await?;
        match version {
            Some(version) if version < OLDEST_SERVER => Err(StorageError::Migration(format!(
                "the server is PostgreSQL {}; 15 or newer is needed",
                version / 10_000
            ))),
            _ => Ok(storage),
        }
    }

    pub(super) async fn migrate(&self) -> StorageResult<()> {
        let mut connection = self.connect(MIGRATION).await?;
        migrations::migrator(migrations::POSTGRES)
            .run_direct(None, &mut connection, false)
            .await?;
        // Rows that were restored from another cluster's dump carry that cluster's transaction ids.
        // Those ahead of this one's would be new at every look, until it has counted so far.
        sqlx::query("update event_outbox set xid = default where xid > pg_current_xact_id()")
            .execute(&mut connection)
            .await?;
        connection.close().await?;
        Ok(())
    }

    pub(super) async fn check_schema(&self) -> StorageResult<()> {
        let mut connection = self.foreground.acquire().await?;
        migrations::check(&mut *connection, migrations::POSTGRES).await
    }

    pub(super) async fn close(&self) {
        self.foreground.close().await;
        self.worker.close().await;
        self.purge.close().await;
        tracing::debug!("closed the database's connections");
    }

    /// A connection of its own, outside the pools.
    async fn connect(&self, limits: Limits) -> StorageResult<PgConnection> {
        let connecting = async {
            let mut connection = self.options.connect().await?;
            settle(&mut connection, limits).await?;
            Ok(connection)
        };
        match tokio::time::timeout(ACQUIRE_TIMEOUT, connecting).await {
            Ok(connected) => connected,
            Err(_elapsed) => {
                let silent = format!("no answer within {} s", ACQUIRE_TIMEOUT.as_secs());
                let error = io::Error::new(io::ErrorKind::TimedOut, silent);
                Err(StorageError::Unavailable(Arc::new(error.into())))
            }
        }
    }
}

/// A pool of at most and at least so many connections, which counts how often one is taken.
fn pool(
    options: &PgConnectOptions,
    limits: Limits,
    (max, min): (u32, u32),
    asked: &Arc<AtomicU64>,
) -> PgPool {
    let asked = asked.clone();
    PgPoolOptions::new()
        .max_connections(max)
        .min_connections(min)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_connect(move |connection, _| Box::pin(settle(connection, limits)))
        .test_before_acquire(false)
        .before_acquire(move |connection, meta| -> BoxFuture<'_, _> {
            asked.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                if meta.idle_for > UNPROVEN_AFTER {
                    connection.ping().await?;
                }
                Ok(true)
            })
        })
        .connect_lazy_with(options.clone())
}

/// Sets a session up by a statement, since poolers refuse startup options.
async fn settle(connection: &mut PgConnection, limits: Limits) -> Result<(), sqlx::Error> {
    sqlx::query(
        "select set_config('application_name', 'timelined', false),
                set_config('timezone', 'UTC', false),
                set_config('statement_timeout', $1, false),
                set_config('lock_timeout', $2, false),
                set_config('enable_sort', $3, false),
                set_config('enable_bitmapscan', $3, false),
                set_config('synchronous_commit', coalesce($4, current_setting('synchronous_commit')), false),
                -- a daemon that hangs or is cut off must not keep its locks
                set_config('idle_in_transaction_session_timeout', '60s', false),
                -- what a statement waited for is what its next one must see
                set_config('default_transaction_isolation', 'read committed', false),
                -- compiling takes longer than any statement here
                set_config('jit', 'off', false),
                -- a plan made without the parameters keeps the filters that are not set, and reads
                -- the rows where the index would do
                set_config('plan_cache_mode', 'force_custom_plan', false)",
    )
    .bind(limits.statement)
    .bind(limits.lock)
    .bind(limits.sort)
    .bind(limits.synchronous_commit)
    .execute(connection)
    .await?;
    Ok(())
}

/// Whether the URL itself says how to use TLS.
fn names_sslmode(url: &str) -> bool {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    query.split('&').any(|pair| {
        let key = pair.split_once('=').map_or(pair, |(key, _)| key);
        matches!(key, "sslmode" | "ssl-mode")
    })
}

/// Whether what is sent stays on this machine.
fn is_local(options: &PgConnectOptions) -> bool {
    let host = options.get_host();
    // An IPv6 address stands in brackets in a URL.
    let address = host.trim_start_matches('[').trim_end_matches(']');
    options.get_socket().is_some()
        || host.starts_with('/')
        || host == "localhost"
        || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

impl Columns for PgRow {
    fn text(&self, column: &'static str) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }

    fn uuid(&self, column: &'static str) -> Result<Option<Uuid>, sqlx::Error> {
        self.try_get(column)
    }

    fn time(&self, column: &'static str) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
        time(self, column)
    }

    fn flag(&self, column: &'static str) -> Result<bool, sqlx::Error> {
        self.try_get(column)
    }

    fn int(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error> {
        match self.try_column(column)?.type_info().name() {
            "INT2" => Ok(self.try_get::<Option<i16>, _>(column)?.map(i64::from)),
            "INT4" => Ok(self.try_get::<Option<i32>, _>(column)?.map(i64::from)),
            _ => self.try_get(column),
        }
    }

    fn texts(&self, column: &'static str) -> Result<Vec<String>, sqlx::Error> {
        self.try_get(column)
    }
}

/// A time as PostgreSQL counts it.
fn time(
    row: &PgRow,
    column: impl ColumnIndex<PgRow>,
) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    /// 2000-01-01, from which PostgreSQL counts, in microseconds since 1970.
    const EPOCH: i64 = 946_684_800_000_000;
    // As a number: sqlx adds it to a date, and panics where PostgreSQL's range (the year
    // 294276, infinity) is beyond chrono's.
    let Some(micros) = row.try_get_unchecked::<Option<i64>, _>(column)? else {
        return Ok(None);
    };
    let time = micros
        .checked_add(EPOCH)
        .and_then(DateTime::from_timestamp_micros);
    time.map(Some)
        .ok_or_else(|| sqlx::Error::Decode(format!("{micros} is no time").into()))
}

/// A row whose columns are read in about their order. To look each one up by its name takes as long as
/// to read it, which shows where rows come by the hundred thousand.
struct Placed<'r> {
    row: &'r PgRow,
    /// The column that is probably read next.
    next: Cell<usize>,
}

impl<'r> Placed<'r> {
    fn new(row: &'r PgRow) -> Self {
        Self {
            row,
            next: Cell::new(0),
        }
    }

    fn place(&self, column: &'static str) -> Result<usize, sqlx::Error> {
        let next = self.next.get();
        let is_next = (self.row.columns().get(next)).is_some_and(|there| there.name() == column);
        let place = if is_next {
            next
        } else {
            self.row.try_column(column)?.ordinal()
        };
        self.next.set(place + 1);
        Ok(place)
    }
}

impl Columns for Placed<'_> {
    fn text(&self, column: &'static str) -> Result<Option<String>, sqlx::Error> {
        self.row.try_get(self.place(column)?)
    }

    fn uuid(&self, column: &'static str) -> Result<Option<Uuid>, sqlx::Error> {
        self.row.try_get(self.place(column)?)
    }

    fn time(&self, column: &'static str) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
        time(self.row, self.place(column)?)
    }

    fn flag(&self, column: &'static str) -> Result<bool, sqlx::Error> {
        self.row.try_get(self.place(column)?)
    }

    fn int(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error> {
        self.row.int(column)
    }

    fn texts(&self, column: &'static str) -> Result<Vec<String>, sqlx::Error> {
        self.row.texts(column)
    }
}

/// Ids as the array that `= any($n)` takes.
fn set<T: Copy>(ids: &[T], uuid: fn(T) -> Uuid) -> Vec<Uuid> {
    ids.iter().copied().map(uuid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_on_this_machine_is_local() {
        for (url, local) in [
            ("postgres://u@localhost/db", true),
            ("postgres://u@127.3.2.1:5433/db", true),
            ("postgres://u@[::1]/db", true),
            ("postgres://u@%2Fvar%2Frun%2Fpostgresql/db", true),
            ("postgres:///db?host=/run/postgresql", true),
            ("postgres://u@localhost.example.com/db", false),
            ("postgres://u@10.0.0.1/db", false),
            ("postgres://u@[fd00::1]/db", false),
            ("postgres://u@db.example.com/db?hostaddr=10.0.0.1", false),
        ] {
            let options = PgConnectOptions::from_str(url).unwrap();
            assert_eq!(is_local(&options), local, "{url}");
        }
    }

    #[test]
    fn only_the_url_itself_lowers_the_demand_for_tls() {
        assert!(names_sslmode("postgres://u@h/db?sslmode=require"));
        assert!(names_sslmode("postgres://u@h/db?dbname=x&ssl-mode=disable"));
        assert!(!names_sslmode("postgres://u@h/sslmode=require"));
        assert!(!names_sslmode("postgres://u@h/db?sslrootcert=/etc/sslmode"));
    }
}
