//! What can go wrong in storage, sorted by what the caller can do about it.

use std::sync::Arc;

/// The result of a storage operation.
pub type StorageResult<T> = Result<T, StorageError>;

/// A storage failure. Cloneable, since one failed commit fails every write that shared it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    /// The disk is full; heals when there is space again. Nothing was written.
    #[error("the database has no space left")]
    Full(#[source] Arc<sqlx::Error>),
    /// The database is away, busy or shutting down; the same call may succeed later.
    #[error("the database is not available")]
    Unavailable(#[source] Arc<sqlx::Error>),
    /// An fsync failed: what was written since the last good one may be lost, and a second fsync
    /// would claim otherwise (<https://lwn.net/Articles/752063/>). The daemon must stop.
    #[error("the database could not be made durable")]
    Durability(#[source] Arc<sqlx::Error>),
    /// The writer has stopped, because the daemon is ending or durability was lost.
    #[error("the database is closed")]
    Closed,
    /// The run for which this was to be written is no longer the caller's.
    #[error("the run was taken over or ended from outside")]
    Fenced,
    /// A legal hold keeps what was to be deleted.
    #[error("a legal hold keeps it")]
    Held,
    /// The schema is not this binary's.
    #[error("the schema is not ready: {0}")]
    Migration(String),
    /// A row that breaks the rules of the table, hence a fault in this program or in another one
    /// that writes to it.
    #[error("table {table}, column {column}: {reason}")]
    Corrupt {
        /// The table.
        table: &'static str,
        /// The column.
        column: &'static str,
        /// What is wrong with its value; never the value itself.
        reason: String,
    },
    /// Anything else the database said.
    #[error("the database refused a statement")]
    Database(#[source] Arc<sqlx::Error>),
}

impl StorageError {
    /// Whether the same call may succeed later without anybody changing it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Full(_) | Self::Unavailable(_))
    }

    /// Whether others were in the way: a lock or the statement took longer than its timeout. The
    /// database is there, and asking for less may do.
    #[must_use]
    pub fn is_contended(&self) -> bool {
        let Self::Unavailable(error) = self else {
            return false;
        };
        let error = error.as_database_error();
        let code = error.and_then(sqlx::error::DatabaseError::code);
        // lock_not_available, query_canceled, deadlock_detected, serialization_failure
        matches!(code.as_deref(), Some("55P03" | "57014" | "40P01" | "40001"))
    }
}

// SQLite's result codes: https://www.sqlite.org/rescode.html
const SQLITE_BUSY: i32 = 5;
const SQLITE_LOCKED: i32 = 6;
const SQLITE_IOERR: i32 = 10;
const SQLITE_FULL: i32 = 13;
const SQLITE_CANTOPEN: i32 = 14;
const SQLITE_IOERR_FSYNC: i32 = 1034;
const SQLITE_IOERR_DIR_FSYNC: i32 = 1290;
const SQLITE_IOERR_SHMSIZE: i32 = 4874;

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        let code = error
            .as_database_error()
            .and_then(|e| e.code().map(std::borrow::Cow::into_owned));
        let is_postgres = error.as_database_error().is_some_and(|e| {
            e.try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
                .is_some()
        });
        let error = Arc::new(error);
        match (&*error, code) {
            (sqlx::Error::Database(_), Some(code)) if is_postgres => match code.as_str() {
                // 53100 disk_full
                "53100" => Self::Full(error),
                // 08 connection, 53 resources, 57 operator intervention, 40 rollback,
                // 55P03 lock_not_available, 58030 io_error, 25006 read_only (a fail-over)
                c if c.starts_with("08")
                    || c.starts_with("53")
                    || c.starts_with("57")
                    || c.starts_with("40")
                    || matches!(c, "55P03" | "58030" | "25006") =>
                {
                    Self::Unavailable(error)
                }
                _ => Self::Database(error),
            },
            (sqlx::Error::Database(_), Some(code)) => {
                let code: i32 = code.parse().unwrap_or(0);
                match (code, code & 0xff) {
                    (SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC, _) => Self::Durability(error),
                    (_, SQLITE_FULL) | (SQLITE_IOERR_SHMSIZE, _) => Self::Full(error),
                    (_, SQLITE_BUSY | SQLITE_LOCKED | SQLITE_IOERR | SQLITE_CANTOPEN) => {
                        Self::Unavailable(error)
                    }
                    _ => Self::Database(error),
                }
            }
            (
                sqlx::Error::Io(_)
                | sqlx::Error::Tls(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::WorkerCrashed
                | sqlx::Error::Protocol(_),
                _,
            ) => Self::Unavailable(error),
            (sqlx::Error::PoolClosed, _) => Self::Closed,
            _ => Self::Database(error),
        }
    }
}
