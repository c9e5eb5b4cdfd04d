//! Group commit: whoever waits to write shares one transaction and hence one fsync.
//!
//! A single task owns the writing connection. It takes what has gathered, runs each request in a
//! savepoint of its own, commits once, and only then answers. With one client every request pays an
//! fsync; with 64, 64 of them share it. It has a thread of its own: among the daemon's tasks it would
//! wait, at each statement's end, behind all the requests that are being read and answered.
//!
//! Each statement costs two switches to the thread that sqlx runs SQLite on, which is more than most
//! statements cost themselves. So what is asked for most, saving an event, is merged further: all
//! events that wait become rows of one statement. Where that is refused, each request is tried alone,
//! so that nobody suffers for another's fault.
//!
//! Checkpoints are made here, not by SQLite itself, which ignores the result of its automatic ones:
//! a checkpoint whose fsync failed must stop the daemon like a commit's. A second connection makes
//! them beside the writer, so that nobody waits for one. What is committed meanwhile keeps the WAL from
//! beginning anew; when it has grown nonetheless, the writer makes a last one itself, of the little
//! that is left.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::storage::{Recording, Saved, StorageError, StorageResult};

/// Requests that share a transaction at most: bounds the time that the first one waits.
const BATCH: usize = 256;
/// And at least, where so many wait.
const SMALLEST_BATCH: usize = 16;
/// A batch is large enough when its commit takes a fifth of its time. More would hardly save anything,
/// and all clients would wait for one transaction while nobody reads and answers requests.
const RUN_TO_COMMIT: f64 = 4.0;
/// Requests that may wait; more wait for a place.
const QUEUE: usize = 1024;
/// Transactions of others for which one of maintenance waits at most.
const PASSED_AT_MOST: u32 = 4;
/// The WAL is checkpointed beside the writer each time that it has grown by so many bytes. Half of it
/// would write the pages that a purge touches again and again twice as often.
const CHECKPOINT_BYTES: u64 = 8 * 1024 * 1024;
/// From this size on the writer makes a last one itself behind one that was made beside it: of the
/// little that is left, and then the WAL begins anew.
const LARGE_WAL: u64 = 2 * CHECKPOINT_BYTES;
/// And one of whatever there is when it has grown by so many.
const LARGEST_WAL: u64 = 4 * CHECKPOINT_BYTES;

/// A request that waits for its transaction.
trait Request: Send {
    /// Runs it within the transaction.
    fn run(self: Box<Self>, connection: &mut SqliteConnection) -> BoxFuture<'_, Done>;
    /// Answers without having run.
    fn fail(self: Box<Self>, error: StorageError);
}

struct Pending<T, F> {
    request: F,
    answer: oneshot::Sender<StorageResult<T>>,
}

impl<T, F> Request for Pending<T, F>
where
    T: Send + 'static,
    F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, StorageResult<T>> + Send + 'static,
{
    fn run(self: Box<Self>, connection: &mut SqliteConnection) -> BoxFuture<'_, Done> {
        Box::pin(async move {
            let result = (self.request)(connection).await;
            let error = result.as_ref().err().cloned();
            let answer = self.answer;
            let tell = move |failure: Option<StorageError>| {
                // A caller that went away does not need the answer.
                drop(answer.send(failure.map_or(result, Err)));
            };
            Done {
                error,
                answer: Box::new(tell),
            }
        })
    }

    fn fail(self: Box<Self>, error: StorageError) {
        drop(self.answer.send(Err(error)));
    }
}

/// A request that ran in its savepoint and waits for the commit.
struct Done {
    /// Why it is to be rolled back.
    error: Option<StorageError>,
    /// Tells the caller; `Some` says that the whole transaction failed.
    answer: Box<dyn FnOnce(Option<StorageError>) + Send>,
}

/// Events of one request that wait to be saved.
struct Saving {
    batch: Vec<Recording>,
    answer: oneshot::Sender<StorageResult<Vec<Saved>>>,
}

/// What waits in the queue.
enum Waiting {
    Save(Saving),
    Other(Box<dyn Request>),
}

/// Events of several requests, saved in one statement.
struct Merged(Vec<Saving>);

impl Request for Merged {
    fn run(self: Box<Self>, connection: &mut SqliteConnection) -> BoxFuture<'_, Done> {
        Box::pin(async move {
            let (batches, answers): (Vec<_>, Vec<_>) = (self.0.into_iter())
                .map(|saving| (saving.batch, saving.answer))
                .unzip();
            let (results, error) = match save_each(connection, batches).await {
                Ok(results) => (results, None),
                Err(error) => (Vec::new(), Some(error)),
            };
            let fault = error.clone();
            let tell = move |failure: Option<StorageError>| {
                let failure = failure.or(fault);
                let mut results = results.into_iter();
                for answer in answers {
                    let result = match &failure {
                        Some(failure) => Err(failure.clone()),
                        None => results.next().unwrap_or(Err(StorageError::Closed)),
                    };
                    // A caller that went away does not need the answer.
                    drop(answer.send(result));
                }
            };
            Done {
                error,
                answer: Box::new(tell),
            }
        })
    }

    fn fail(self: Box<Self>, error: StorageError) {
        for saving in self.0 {
            drop(saving.answer.send(Err(error.clone())));
        }
    }
}

/// Saves batches in one statement, or, where it is refused, each in a savepoint of its own. The outer
/// error means that nothing of it is saved.
async fn save_each(
    connection: &mut SqliteConnection,
    batches: Vec<Vec<Recording>>,
) -> StorageResult<Vec<StorageResult<Vec<Saved>>>> {
    if let [alone] = batches.as_slice() {
        // It has the savepoint of its step.
        return Ok(vec![Ok(super::events::save(connection, alone).await?)]);
    }
    let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
    let all: Vec<Recording> = batches.into_iter().flatten().collect();
    let saved = if super::events::is_one_statement(&all) {
        match super::events::save(connection, &all).await {
            Err(error) if ends_transaction(&error) => return Err(error),
            saved => saved,
        }
    } else {
        in_savepoint(connection, &all).await?
    };
    if let Ok(saved) = saved {
        let mut saved = saved.into_iter();
        let results = sizes
            .iter()
            .map(|size| Ok(saved.by_ref().take(*size).collect()));
        return Ok(results.collect());
    }
    let mut rest = all.as_slice();
    let mut results = Vec::with_capacity(sizes.len());
    for size in sizes {
        let (batch, others) = rest.split_at(size);
        rest = others;
        results.push(in_savepoint(connection, batch).await?);
    }
    Ok(results)
}

/// Saves a batch in a savepoint. The outer error means that the transaction is lost.
async fn in_savepoint(
    connection: &mut SqliteConnection,
    batch: &[Recording],
) -> StorageResult<StorageResult<Vec<Saved>>> {
    sqlx::query("savepoint saving")
        .execute(&mut *connection)
        .await?;
    let saved = super::events::save(connection, batch).await;
    if let Err(error) = &saved {
        if ends_transaction(error) {
            return Err(error.clone());
        }
        sqlx::query("rollback to saving")
            .execute(&mut *connection)
            .await?;
    }
    sqlx::query("release saving").execute(connection).await?;
    Ok(saved)
}

/// The disk or the file failed: SQLite may have ended the transaction by itself, and the requests
/// behind would run outside of one.
fn ends_transaction(error: &StorageError) -> bool {
    matches!(
        error,
        StorageError::Full(_) | StorageError::Unavailable(_) | StorageError::Durability(_)
    )
}

/// Nothing can be written any more: an fsync failed, or the thread that runs SQLite died.
fn is_the_end(error: &StorageError) -> bool {
    match error {
        StorageError::Durability(_) => true,
        StorageError::Unavailable(source) => matches!(**source, sqlx::Error::WorkerCrashed),
        _ => false,
    }
}

/// The steps of a transaction: all savings as one, then the others.
fn steps(batch: &mut Vec<Waiting>) -> Vec<Box<dyn Request>> {
    let (mut savings, mut others) = (Vec::new(), Vec::new());
    for waiting in batch.drain(..) {
        match waiting {
            Waiting::Save(saving) => savings.push(saving),
            Waiting::Other(request) => others.push(request),
        }
    }
    if savings.is_empty() {
        return others;
    }
    let mut steps: Vec<Box<dyn Request>> = vec![Box::new(Merged(savings))];
    steps.append(&mut others);
    steps
}

#[derive(Clone, Debug)]
pub(super) struct Writer {
    requests: mpsc::Sender<Waiting>,
    /// Those of maintenance, for which nobody waits.
    behind: mpsc::Sender<Waiting>,
    /// How many of the others there were.
    asked: Arc<AtomicU64>,
    failed: CancellationToken,
    /// Answers when the thread has ended.
    ended: Arc<Mutex<Option<oneshot::Receiver<()>>>>,
    closing: CancellationToken,
    /// When the transaction in hand began.
    began: watch::Receiver<Option<Instant>>,
}

impl Writer {
    /// Begins to write the file at `path`. `is_durable`: `options` ask for `synchronous = full`.
    pub(super) async fn open(
        path: &Path,
        options: &SqliteConnectOptions,
        is_durable: bool,
    ) -> StorageResult<Self> {
        let options = options.clone().pragma("wal_autocheckpoint", "0");
        let checkpointer = options.connect().await?;
        let connection = options
            // The WAL shrinks to what it holds when it begins anew, so that its size says how much
            // there is to checkpoint.
            .pragma("journal_size_limit", "0")
            // What a savepoint would take back is small; in a file it costs a fifth of a save.
            .pragma("temp_store", "memory")
            // KiB: the inner pages of some million rows' indexes.
            .pragma("cache_size", "-8192")
            // What a batch of the purge reads, at once: each time that it is full costs two switches.
            .row_buffer_size(1024)
            .connect()
            .await?;
        let mut wal = path.as_os_str().to_owned();
        wal.push("-wal");
        let (requests, queue) = mpsc::channel(QUEUE);
        let (behind, maintenance) = mpsc::channel(1);
        let failed = CancellationToken::new();
        let closing = CancellationToken::new();
        let (in_hand, began) = watch::channel(None);
        let mut worker = Worker {
            connection,
            is_durable,
            checkpoints: Checkpoints {
                wal: PathBuf::from(wal),
                at: CHECKPOINT_BYTES,
                finish_at: LARGEST_WAL,
                state: Checkpointer::Idle(checkpointer),
            },
            batch: BATCH,
            passed: 0,
            failed: failed.clone(),
            in_hand,
        };
        let stop = closing.clone();
        // A task that ends in a panic takes no more requests: that must not pass for a quiet day.
        let lost = failed.clone().drop_guard();
        let (ending, ended) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(sqlx::Error::Io)?;
        std::thread::Builder::new()
            .name("sqlite-writer".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    worker.serve(queue, maintenance, stop).await;
                    worker.end().await;
                });
                lost.disarm();
                ending
                    .send(())
                    .unwrap_or_else(|()| tracing::debug!("the writer was dropped, not closed"));
            })
            .map_err(sqlx::Error::Io)?;
        Ok(Self {
            requests,
            behind,
            asked: Arc::default(),
            failed,
            ended: Arc::new(Mutex::new(Some(ended))),
            closing,
            began,
        })
    }

    pub(super) fn failed(&self) -> CancellationToken {
        self.failed.clone()
    }

    /// Waits for a transaction that writes nothing, and so costs no fsync: proves that the next one
    /// would be served.
    pub(super) async fn ping(&self) -> StorageResult<()> {
        self.write(|_connection| Box::pin(async { Ok(()) })).await
    }

    /// How long the transaction in hand has taken.
    pub(super) fn busy_for(&self) -> Duration {
        self.began
            .borrow()
            .map_or(Duration::ZERO, |began| began.elapsed())
    }

    /// Runs `request` in the next shared transaction; its result is durable when this returns.
    pub(super) async fn write<T, F>(&self, request: F) -> StorageResult<T>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, StorageResult<T>>
            + Send
            + 'static,
    {
        let (answer, receiver) = oneshot::channel();
        let waiting = Waiting::Other(Box::new(Pending { request, answer }));
        self.ask(&self.requests, waiting, receiver).await
    }

    /// Runs `request` in a transaction of its own when nobody else waits, or has waited for long: what
    /// maintenance does keeps others waiting for one such transaction at most. It is committed when this
    /// returns, and durable with the next [`Self::write`]: a power cut before takes it back, and it is
    /// done again.
    pub(super) async fn write_behind<T, F>(&self, request: F) -> StorageResult<T>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, StorageResult<T>>
            + Send
            + 'static,
    {
        let (answer, receiver) = oneshot::channel();
        let waiting = Waiting::Other(Box::new(Pending { request, answer }));
        self.ask(&self.behind, waiting, receiver).await
    }

    /// How many requests there were, without those of maintenance.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Saves events together with those of others that wait; durable when this returns.
    pub(super) async fn save(&self, batch: Vec<Recording>) -> StorageResult<Vec<Saved>> {
        let (answer, receiver) = oneshot::channel();
        let waiting = Waiting::Save(Saving { batch, answer });
        self.ask(&self.requests, waiting, receiver).await
    }

    async fn ask<T>(
        &self,
        queue: &mpsc::Sender<Waiting>,
        waiting: Waiting,
        answer: oneshot::Receiver<StorageResult<T>>,
    ) -> StorageResult<T> {
        if self.failed.is_cancelled() {
            return Err(StorageError::Closed);
        }
        if queue.same_channel(&self.requests) {
            self.asked.fetch_add(1, Ordering::Relaxed);
        }
        let queued = queue.send(waiting).await;
        queued.map_err(|_closed| StorageError::Closed)?;
        answer.await.map_err(|_dropped| StorageError::Closed)?
    }

    /// Ends after what has been asked for is committed.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        if let Some(ended) = self.ended.lock().await.take()
            && ended.await.is_err()
        {
            tracing::error!("the database writer ended abnormally");
        }
    }
}

struct Worker {
    connection: SqliteConnection,
    /// Whether a commit waits for the disk.
    is_durable: bool,
    checkpoints: Checkpoints,
    /// How many requests the next transaction takes, from the times of those before.
    batch: usize,
    /// Transactions since the last one of maintenance.
    passed: u32,
    failed: CancellationToken,
    /// When the transaction in hand began.
    in_hand: watch::Sender<Option<Instant>>,
}

/// Moves what is committed from the WAL to the database.
struct Checkpoints {
    wal: PathBuf,
    /// The size of the WAL at which the next one begins, beside the writer.
    at: u64,
    /// And at which the writer makes one itself.
    finish_at: u64,
    state: Checkpointer,
}

/// The connection that checkpoints beside the writer.
enum Checkpointer {
    Idle(SqliteConnection),
    Busy(JoinHandle<(SqliteConnection, StorageResult<()>)>),
    /// A task of its died.
    Lost,
}

impl Checkpoints {
    /// Ends with the checkpoint in hand; never, where there is none.
    async fn ended(&mut self) -> StorageResult<()> {
        let Checkpointer::Busy(task) = &mut self.state else {
            return std::future::pending().await;
        };
        let Ok((connection, result)) = task.await else {
            self.state = Checkpointer::Lost;
            return Err(StorageError::from(sqlx::Error::WorkerCrashed));
        };
        self.state = Checkpointer::Idle(connection);
        result
    }

    fn size(&self) -> u64 {
        std::fs::metadata(&self.wal).map_or(0, |wal| wal.len())
    }

    /// Looks at the size of the WAL after a commit.
    async fn look(&mut self, writer: &mut SqliteConnection) -> StorageResult<()> {
        let size = self.size();
        if size < CHECKPOINT_BYTES {
            (self.at, self.finish_at) = (CHECKPOINT_BYTES, LARGEST_WAL);
        } else if size >= self.finish_at {
            // A reader may keep the WAL from beginning anew: then the next try comes when it has
            // grown by as much again, not at every commit.
            (self.at, self.finish_at) = (size + CHECKPOINT_BYTES, size + LARGEST_WAL);
            if matches!(self.state, Checkpointer::Busy(_)) {
                self.ended().await?;
            }
            checkpoint(writer, size).await?;
        } else if size >= self.at {
            self.at = size + CHECKPOINT_BYTES;
            self.begin(size);
        }
        Ok(())
    }

    /// Makes a last one behind one that has ended.
    async fn finish(&mut self, writer: &mut SqliteConnection) -> StorageResult<()> {
        let size = self.size();
        if size >= LARGE_WAL {
            checkpoint(writer, size).await?;
        }
        Ok(())
    }

    /// Begins one, unless one is at work.
    fn begin(&mut self, size: u64) {
        match std::mem::replace(&mut self.state, Checkpointer::Lost) {
            Checkpointer::Idle(mut connection) => {
                #[expect(
                    clippy::disallowed_methods,
                    reason = "a task of the writer's own thread, which waits for it at its end"
                )]
                let task = tokio::spawn(async move {
                    let result = checkpoint(&mut connection, size).await;
                    (connection, result)
                });
                self.state = Checkpointer::Busy(task);
            }
            other => self.state = other,
        }
    }
}

/// Checkpoints as far as no reader is in the way.
async fn checkpoint(connection: &mut SqliteConnection, size: u64) -> StorageResult<()> {
    let began = Instant::now();
    sqlx::query("pragma wal_checkpoint(passive)")
        .execute(connection)
        .await?;
    tracing::trace!(
        wal_bytes = size,
        elapsed_us = micros(began.elapsed()),
        "checkpointed"
    );
    Ok(())
}

impl Worker {
    async fn serve(
        &mut self,
        mut queue: mpsc::Receiver<Waiting>,
        mut maintenance: mpsc::Receiver<Waiting>,
        closing: CancellationToken,
    ) {
        if let Err(error) = self.begin_anew().await
            && self.is_over(&error)
        {
            return;
        }
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            // During a checkpoint it waits: what it writes meanwhile would keep the WAL from beginning
            // anew, until the writer has to see to that itself.
            let may_maintain = !matches!(self.checkpoints.state, Checkpointer::Busy(_));
            let has_waited = may_maintain && self.passed >= PASSED_AT_MOST;
            let waiting = has_waited.then(|| maintenance.try_recv().ok()).flatten();
            let mut is_maintenance = waiting.is_some();
            if let Some(request) = waiting {
                batch.push(request);
            } else {
                tokio::select! {
                    biased;
                    received = queue.recv_many(&mut batch, self.batch) => {
                        if received == 0 {
                            return;
                        }
                        self.passed = self.passed.saturating_add(1);
                    }
                    // Biased: what was queued before the close is served first.
                    () = closing.cancelled() => return,
                    Some(request) = maintenance.recv(), if may_maintain => {
                        is_maintenance = true;
                        batch.push(request);
                    }
                    ended = self.checkpoints.ended() => {
                        let ended = match ended {
                            Ok(()) => self.checkpoints.finish(&mut self.connection).await,
                            failed => failed,
                        };
                        if let Err(error) = ended && self.is_over(&error) {
                            return;
                        }
                        continue;
                    }
                }
            }
            self.in_hand.send_replace(Some(Instant::now()));
            let requests = batch.len();
            let steps = steps(&mut batch);
            let (done, result) = if is_maintenance {
                self.maintain(steps).await
            } else {
                self.transact(steps, requests).await
            };
            let failure = result.err();
            for done in done {
                (done.answer)(failure.clone());
            }
            if let Some(error) = failure.as_ref().filter(|error| is_the_end(error)) {
                return self.fail(error);
            }
            if let Err(error) = self.checkpoints.look(&mut self.connection).await
                && self.is_over(&error)
            {
                return;
            }
            self.in_hand.send_replace(None);
        }
    }

    /// A WAL that another program left large would be cut by the first commit, which would take long.
    async fn begin_anew(&mut self) -> StorageResult<()> {
        if self.checkpoints.size() < CHECKPOINT_BYTES {
            return Ok(());
        }
        sqlx::query("pragma wal_checkpoint(truncate)")
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }

    /// Whether a checkpoint failed so that nothing can be written any more.
    fn is_over(&self, error: &StorageError) -> bool {
        let is_the_end = is_the_end(error);
        if is_the_end {
            self.fail(error);
        } else {
            tracing::warn!(error = %chain(error), "could not checkpoint the database");
        }
        is_the_end
    }

    /// Runs the steps of maintenance in one transaction, whose commit does not wait for the disk: nobody
    /// was promised anything, and an fsync of all the pages that it wrote would keep others waiting for
    /// as long as the rest of it. It is on the disk with the next commit of theirs, or a checkpoint.
    async fn maintain(&mut self, steps: Vec<Box<dyn Request>>) -> (Vec<Done>, StorageResult<()>) {
        self.passed = 0;
        if !self.is_durable {
            return self.transact(steps, 1).await;
        }
        // Where it fails, the commit waits.
        if let Err(error) = self.set_synchronous("pragma synchronous = normal").await {
            tracing::debug!(error = %chain(&error), "maintenance waits for the disk");
        }
        let (done, result) = self.transact(steps, 1).await;
        let restored = self.set_synchronous("pragma synchronous = full").await;
        // Nothing more may be acknowledged that a power cut would take back.
        let restored = restored.map_err(|error| StorageError::Durability(Arc::new(error)));
        (done, result.and(restored))
    }

    /// Not kept as a prepared statement: SQLite obeys this one while it prepares it.
    async fn set_synchronous(&mut self, pragma: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(pragma)
            .persistent(false)
            .execute(&mut self.connection)
            .await?;
        Ok(())
    }

    /// Runs steps, which hold so many requests, in one transaction. On an error everything in it is
    /// rolled back.
    async fn transact(
        &mut self,
        mut steps: Vec<Box<dyn Request>>,
        requests: usize,
    ) -> (Vec<Done>, StorageResult<()>) {
        let mut done = Vec::with_capacity(steps.len());
        let result = self.try_transact(&mut steps, requests, &mut done).await;
        if let Err(error) = &result {
            // Fails where SQLite has rolled back by itself, as it does when the disk is full.
            if let Err(rollback) = sqlx::query("rollback").execute(&mut self.connection).await {
                tracing::debug!(error = %rollback, "nothing was left to roll back");
            }
            for step in steps {
                step.fail(error.clone());
            }
        }
        (done, result)
    }

    async fn try_transact(
        &mut self,
        steps: &mut Vec<Box<dyn Request>>,
        requests: usize,
        done: &mut Vec<Done>,
    ) -> StorageResult<()> {
        sqlx::query("begin immediate")
            .execute(&mut self.connection)
            .await?;
        // Not before: it may have waited for another process.
        let began = Instant::now();
        let alone = steps.len() == 1;
        steps.reverse();
        while let Some(request) = steps.pop() {
            if !alone {
                sqlx::query("savepoint request")
                    .execute(&mut self.connection)
                    .await?;
            }
            let step = request.run(&mut self.connection).await;
            let error = step.error.clone();
            done.push(step);
            match error {
                None if alone => {}
                None => {
                    sqlx::query("release request")
                        .execute(&mut self.connection)
                        .await?;
                }
                Some(error) if alone || ends_transaction(&error) => return Err(error),
                Some(_) => {
                    sqlx::query("rollback to request")
                        .execute(&mut self.connection)
                        .await?;
                    sqlx::query("release request")
                        .execute(&mut self.connection)
                        .await?;
                }
            }
        }
        let ran = began.elapsed();
        sqlx::query("commit").execute(&mut self.connection).await?;
        let committed = began.elapsed().saturating_sub(ran);
        tracing::trace!(
            requests,
            ran_us = micros(ran),
            committed_us = micros(committed),
            "committed"
        );
        self.batch = next_batch(self.batch, requests, ran, committed);
        Ok(())
    }

    fn fail(&self, error: &StorageError) {
        tracing::error!(
            error = %chain(error),
            "{}: what was acknowledged before is safe, nothing more can be; stopping",
            match error {
                StorageError::Durability(_) => "an fsync failed",
                _ => "the thread that writes the database is gone",
            }
        );
        self.failed.cancel();
    }

    async fn end(mut self) {
        if self.failed.is_cancelled() {
            // No further fsync: closing would checkpoint.
            std::mem::forget((self.connection, self.checkpoints));
            return;
        }
        if matches!(self.checkpoints.state, Checkpointer::Busy(_))
            && let Err(error) = self.checkpoints.ended().await
            && self.is_over(&error)
        {
            std::mem::forget((self.connection, self.checkpoints));
            return;
        }
        if let Checkpointer::Idle(connection) = self.checkpoints.state
            && let Err(error) = connection.close().await
        {
            tracing::warn!(%error, "could not close the database");
        }
        if let Err(error) = sqlx::query("pragma wal_checkpoint(passive)")
            .execute(&mut self.connection)
            .await
        {
            tracing::warn!(%error, "could not checkpoint the database at its close");
        }
        if let Err(error) = self.connection.close().await {
            tracing::warn!(%error, "could not close the database");
        }
    }
}

/// The size of the next batch, after `requests` ran and were committed in these times.
fn next_batch(batch: usize, requests: usize, ran: Duration, committed: Duration) -> usize {
    if requests < SMALLEST_BATCH {
        // Says nothing of a full one.
        return batch;
    }
    let each = ran.as_secs_f64() / f64::from(u32::try_from(requests).unwrap_or(u32::MAX));
    let wanted = RUN_TO_COMMIT * committed.as_secs_f64() / each.max(1e-9);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number, cut to the largest batch"
    )]
    let wanted = wanted.min(f64::from(u16::MAX)) as usize;
    // A step at a time, since one slow commit is no measure.
    wanted
        .clamp(batch / 2, batch * 2)
        .clamp(SMALLEST_BATCH, BATCH)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn chain(error: &dyn std::error::Error) -> String {
    crate::telemetry::chain(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_batch_grows_until_its_commit_takes_a_fifth_of_its_time() {
        // 64 requests in 6.4 ms: 0.1 ms each.
        let (ran, requests) = (MS * 64 / 10, 64);
        assert_eq!(next_batch(64, requests, ran, MS), 40);
        assert_eq!(next_batch(64, requests, ran, MS * 2), 80);
        assert_eq!(next_batch(64, requests, ran, MS * 50), 128);
        assert_eq!(next_batch(200, requests, ran, MS * 50), BATCH);
        assert_eq!(
            next_batch(20, requests, ran, Duration::ZERO),
            SMALLEST_BATCH
        );
    }

    async fn writer(directory: &Path) -> Writer {
        let path = directory.join("test.db");
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
            .synchronous(sqlx::sqlite::SqliteSynchronous::Full);
        Writer::open(&path, &options, true).await.unwrap()
    }

    #[tokio::test]
    async fn a_writer_that_panicked_has_failed_and_one_that_was_closed_has_not() {
        let directory = tempfile::tempdir().unwrap();
        let lost = writer(directory.path()).await;
        let answer = lost
            .write::<(), _>(|_| Box::pin(async { panic!("in a request") }))
            .await;
        assert!(matches!(answer, Err(StorageError::Closed)), "{answer:?}");
        lost.failed().cancelled().await;
        assert!(matches!(lost.ping().await, Err(StorageError::Closed)));

        let closed = writer(directory.path()).await;
        closed.ping().await.unwrap();
        closed.close().await;
        assert!(!closed.failed().is_cancelled());
    }

    #[tokio::test]
    async fn a_transaction_in_hand_is_seen_and_an_empty_one_writes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let writer = writer(directory.path()).await;
        let (begun, release) = (
            Arc::new(tokio::sync::Notify::new()),
            Arc::new(tokio::sync::Notify::new()),
        );
        let (tell, wait) = (begun.clone(), release.clone());
        let hanging = writer.write(move |_| {
            Box::pin(async move {
                tell.notify_one();
                wait.notified().await;
                Ok(())
            })
        });
        let look = async {
            begun.notified().await;
            let busy = writer.busy_for() > Duration::ZERO;
            release.notify_one();
            busy
        };
        let (answer, was_busy) = tokio::join!(hanging, look);
        answer.unwrap();
        assert!(was_busy);
        writer
            .began
            .clone()
            .wait_for(Option::is_none)
            .await
            .unwrap();
        let wal = std::fs::metadata(directory.path().join("test.db-wal"));
        assert_eq!(
            wal.map_or(0, |wal| wal.len()),
            0,
            "an empty transaction wrote"
        );
        writer.close().await;
    }

    /// The order in which two requests run that wait while a transaction is in hand, the first of them
    /// one of maintenance.
    async fn order_behind_one_in_hand(writer: &Writer) -> Vec<&'static str> {
        let (begun, release) = (
            Arc::new(tokio::sync::Notify::new()),
            Arc::new(tokio::sync::Notify::new()),
        );
        let (tell, wait) = (begun.clone(), release.clone());
        let in_hand = writer.write(move |_| {
            Box::pin(async move {
                tell.notify_one();
                wait.notified().await;
                Ok(())
            })
        });
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let note = |name| {
            let order = order.clone();
            move || order.lock().unwrap().push(name)
        };
        let (maintenance, request) = (note("maintenance"), note("request"));
        let others = async {
            begun.notified().await;
            let maintained = writer.write_behind(move |_| {
                maintenance();
                Box::pin(async { Ok(()) })
            });
            let asked = writer.write(move |_| {
                request();
                Box::pin(async { Ok(()) })
            });
            let queued = async {
                while writer.requests.capacity() == QUEUE || writer.behind.capacity() > 0 {
                    tokio::task::yield_now().await;
                }
                release.notify_one();
            };
            tokio::join!(maintained, asked, queued)
        };
        let (in_hand, (maintained, asked, ())) = tokio::join!(in_hand, others);
        in_hand.and(maintained).and(asked).unwrap();
        let order = order.lock().unwrap();
        order.clone()
    }

    fn synchronous(connection: &mut SqliteConnection) -> BoxFuture<'_, StorageResult<i64>> {
        Box::pin(async move {
            let level = sqlx::query_scalar("pragma synchronous").fetch_one(connection);
            Ok(level.await?)
        })
    }

    #[tokio::test]
    async fn only_maintenance_does_not_wait_for_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let writer = writer(directory.path()).await;
        for _ in 0..3 {
            assert_eq!(writer.write(synchronous).await.unwrap(), 2);
            assert_eq!(writer.write_behind(synchronous).await.unwrap(), 1);
        }
        let failed =
            writer.write_behind::<(), _>(|_| Box::pin(async { Err(StorageError::Fenced) }));
        assert!(matches!(failed.await, Err(StorageError::Fenced)));
        assert_eq!(writer.write(synchronous).await.unwrap(), 2);
        writer.close().await;
    }

    #[tokio::test]
    async fn maintenance_lets_others_go_first_but_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let writer = writer(directory.path()).await;
        assert_eq!(
            order_behind_one_in_hand(&writer).await,
            ["request", "maintenance"]
        );
        for _ in 0..PASSED_AT_MOST {
            writer.ping().await.unwrap();
        }
        assert_eq!(
            order_behind_one_in_hand(&writer).await,
            ["maintenance", "request"]
        );
        writer.close().await;
    }

    #[test]
    fn a_few_requests_are_no_measure() {
        assert_eq!(next_batch(64, 3, MS, MS), 64);
    }
}
