//! SQLite: one writer that shares its fsyncs among all who wait, and several readers.
//!
//! A UUID is stored as text, a time as microseconds since 1970, a set of ids travels as a JSON
//! array. The engine's own rules are in `migrations/sqlite`.

mod alerts;
mod erasure;
mod events;
mod exports;
mod ledger;
mod packed;
mod retention;
mod writer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool,
    SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Row};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::rows::Columns;
use super::{StorageError, StorageResult, migrations};
use writer::Writer;

/// How long a statement waits for another process that is writing, such as a command.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// A transaction that takes longer hangs on a dying disk: one that waits for another process has given
/// up long before.
const STUCK_AFTER: Duration = Duration::from_secs(15);
/// Readers see a snapshot each and do not wait for the writer; more would only cost memory.
const READERS: u32 = 4;

/// An open SQLite file.
#[derive(Clone, Debug)]
pub struct SqliteStorage {
    path: PathBuf,
    options: SqliteConnectOptions,
    writer: Writer,
    readers: SqlitePool,
}

impl SqliteStorage {
    /// Opens or creates the file. `durable` waits for the disk before a write is acknowledged
    /// (`synchronous = full`); without it, a power cut loses the last writes.
    ///
    /// # Errors
    /// Where the file cannot be opened, is no database, or its directory cannot be written.
    pub async fn open(path: &Path, durable: bool) -> StorageResult<Self> {
        let synchronous = if durable {
            SqliteSynchronous::Full
        } else {
            SqliteSynchronous::Normal
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            // Set before the journal mode: afterwards it would need a VACUUM.
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT)
            // A statement that takes longer than a second is worth a line.
            .log_statements(tracing::log::LevelFilter::Trace)
            .log_slow_statements(tracing::log::LevelFilter::Warn, Duration::from_secs(1));
        let writer = Writer::open(path, &options, durable).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .min_connections(0)
            .idle_timeout(Duration::from_mins(1))
            .acquire_timeout(Duration::from_secs(10))
            .connect_lazy_with(options.clone().pragma("query_only", "on"));
        Ok(Self {
            path: path.to_owned(),
            options,
            writer,
            readers,
        })
    }

    /// Cancelled after a failed fsync, or where the writer is lost.
    #[must_use]
    pub fn failed(&self) -> CancellationToken {
        self.writer.failed()
    }

    pub(super) async fn migrate(&self) -> StorageResult<()> {
        let mut connection = self.options.connect().await?;
        migrations::migrator(migrations::SQLITE)
            .run_direct(None, &mut connection, false)
            .await?;
        Ok(())
    }

    pub(super) async fn check_schema(&self) -> StorageResult<()> {
        let mut connection = self.readers.acquire().await?;
        migrations::check(&mut *connection, migrations::SQLITE).await
    }

    pub(super) async fn check_writer(&self) -> StorageResult<()> {
        self.writer.ping().await
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.writer.busy_for() > STUCK_AFTER
    }

    pub(super) async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
        tracing::debug!(path = %self.path.display(), "closed the database");
    }
}

impl Columns for SqliteRow {
    fn text(&self, column: &'static str) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }

    fn uuid(&self, column: &'static str) -> Result<Option<Uuid>, sqlx::Error> {
        Ok(self
            .try_get::<Option<Hyphenated>, _>(column)?
            .map(Hyphenated::into_uuid))
    }

    fn time(&self, column: &'static str) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
        let Some(micros) = self.try_get::<Option<i64>, _>(column)? else {
            return Ok(None);
        };
        let time = DateTime::from_timestamp_micros(micros);
        time.map(Some)
            .ok_or_else(|| sqlx::Error::Decode(format!("{micros} is no time").into()))
    }

    fn flag(&self, column: &'static str) -> Result<bool, sqlx::Error> {
        Ok(self.try_get::<i64, _>(column)? != 0)
    }

    fn int(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }

    fn texts(&self, column: &'static str) -> Result<Vec<String>, sqlx::Error> {
        serde_json::from_str(self.try_get(column)?)
            .map_err(|error| sqlx::Error::Decode(error.into()))
    }
}

/// A UUID as the text that SQLite keeps.
fn text(id: Uuid) -> Hyphenated {
    id.hyphenated()
}

/// A time as the microseconds that SQLite keeps.
fn at(time: DateTime<Utc>) -> i64 {
    time.timestamp_micros()
}

/// A set of ids as the JSON array that `json_each` takes apart.
fn set<T: serde::Serialize>(ids: &[T]) -> String {
    serde_json::to_string(ids).expect("ids serialise")
}

/// How many rows a statement changed.
async fn changed(
    db: &mut SqliteConnection,
    query: sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>,
) -> Result<u64, StorageError> {
    Ok(query.execute(db).await?.rows_affected())
}
