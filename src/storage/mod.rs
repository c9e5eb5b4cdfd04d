//! Storage: two engines behind six traits, chosen by the database's URL.
//!
//! [`EventRepository`] keeps the events and what changes beside them, [`JobLedger`] the runs of the
//! jobs, [`ExportStore`] the export queue, [`RetentionStore`] holds and what was deleted,
//! [`ErasureStore`] erases contacts, [`AlertStore`] keeps what is wrong with which job. Each engine
//! has its SQL in its own files, written the same wherever it can be; one conformance suite
//! (`tests/storage.rs`) runs every case on both.

mod alerts;
mod erasure;
mod error;
mod events;
mod exports;
mod ledger;
mod migrations;
pub mod postgres;
mod retention;
mod rows;
pub mod sqlite;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub use alerts::{AlertKind, AlertMail, AlertStore, Failures, JobAlert, MailEnd, Success};
pub use erasure::{ErasedEvent, Erasure, ErasureState, ErasureStore, Survey};
pub use error::{StorageError, StorageResult};
pub use events::{
    Backlog, Change, EventRepository, Filter, Idempotency, Imported, Key, MAX_EXACT_TOTAL, Page,
    Position, Receipt, Recording, Saved, Slice, Tail, TailEntry, TailMark, Undelivered, View,
};
pub use exports::{
    ClaimedDelivery, DeliveryOutcome, DeliveryState, Export, ExportAction, ExportDeed,
    ExportDelivery, ExportLink, ExportRequest, ExportState, ExportStore, NewExport, NewMail,
    OldFile, Rendered,
};
pub use ledger::{
    Claim, Counts, Fence, Finish, Glance, JobAction, JobLedger, LEASE, Pause, Renewed, Run,
    RunState, SKIPPED, Settled, Trigger,
};
pub use retention::{
    Batch, Deletion, DeletionEntry, DueCount, Hold, HoldScope, RetentionStore, SweepKey,
};
pub use rows::unreadable_rows;

/// The open database, seen through its traits.
#[derive(Clone)]
pub struct Storage {
    /// The events.
    pub events: Arc<dyn EventRepository>,
    /// The runs of the jobs.
    pub ledger: Arc<dyn JobLedger>,
    /// The export queue.
    pub exports: Arc<dyn ExportStore>,
    /// What is deleted, and what is held.
    pub retention: Arc<dyn RetentionStore>,
    /// The erasure of contacts.
    pub erasures: Arc<dyn ErasureStore>,
    /// The troubles of the jobs.
    pub alerts: Arc<dyn AlertStore>,
    /// Cancelled when an acknowledged write can no longer be promised (a failed fsync, a lost
    /// writer): the daemon must stop, and must not try the fsync again.
    pub failed: CancellationToken,
    closer: Closer,
}

#[derive(Clone)]
enum Closer {
    Sqlite(sqlite::SqliteStorage),
    Postgres(postgres::PgStorage),
}

impl Storage {
    /// The storage on an open SQLite file.
    #[must_use]
    pub fn sqlite(storage: sqlite::SqliteStorage) -> Self {
        let shared = Arc::new(storage.clone());
        Self {
            events: shared.clone(),
            ledger: shared.clone(),
            exports: shared.clone(),
            retention: shared.clone(),
            erasures: shared.clone(),
            alerts: shared,
            failed: storage.failed(),
            closer: Closer::Sqlite(storage),
        }
    }

    /// The storage on a PostgreSQL database.
    #[must_use]
    pub fn postgres(storage: postgres::PgStorage) -> Self {
        let shared = Arc::new(storage.clone());
        Self {
            events: shared.clone(),
            ledger: shared.clone(),
            exports: shared.clone(),
            retention: shared.clone(),
            erasures: shared.clone(),
            alerts: shared,
            failed: CancellationToken::new(),
            closer: Closer::Postgres(storage),
        }
    }

    /// The engine's name, as logs and `/readyz` say it.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        match &self.closer {
            Closer::Sqlite(_) => "sqlite",
            Closer::Postgres(_) => "postgres",
        }
    }

    /// Whether one daemon alone holds the database, so that whatever a former one left is its own.
    #[must_use]
    pub fn is_exclusive(&self) -> bool {
        matches!(self.closer, Closer::Sqlite(_))
    }

    /// Brings the schema up to this binary's version; forward only.
    ///
    /// # Errors
    /// [`StorageError::Migration`] where the database is newer than the binary or was altered.
    pub async fn migrate(&self) -> StorageResult<()> {
        match &self.closer {
            Closer::Sqlite(storage) => storage.migrate().await,
            Closer::Postgres(storage) => storage.migrate().await,
        }
    }

    /// Checks that the schema is this binary's, without changing it.
    ///
    /// # Errors
    /// [`StorageError::Migration`] says what is missing and which command brings it.
    pub async fn check_schema(&self) -> StorageResult<()> {
        match &self.closer {
            Closer::Sqlite(storage) => storage.check_schema().await,
            Closer::Postgres(storage) => storage.check_schema().await,
        }
    }

    /// Waits until a write would be served; it writes nothing.
    ///
    /// # Errors
    /// What a write would answer now.
    pub async fn check_writer(&self) -> StorageResult<()> {
        match &self.closer {
            Closer::Sqlite(storage) => storage.check_writer().await,
            // Every connection writes: an answer to anything is as good.
            Closer::Postgres(_) => self.ledger.now().await.map(drop),
        }
    }

    /// Whether writes hang, such as on a disk that does not answer. Waiting for another process, or
    /// for a server, is none: that ends in time, with an error.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        match &self.closer {
            Closer::Sqlite(storage) => storage.is_stuck(),
            Closer::Postgres(_) => false,
        }
    }

    /// Lets waiting writes finish and closes the connections.
    pub async fn close(&self) {
        match &self.closer {
            Closer::Sqlite(storage) => storage.close().await,
            Closer::Postgres(storage) => storage.close().await,
        }
    }
}
