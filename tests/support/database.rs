//! A fresh, migrated database per test, on either engine.
//!
//! SQLite: a copy of one migrated file in a directory of its own. PostgreSQL: a copy of one migrated
//! database in a private cluster, which the first test that needs one starts and which ends with
//! this process (`postgres.sh` follows its standard input).

use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use chrono::{DateTime, Utc};
use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Connection};
use tempfile::TempDir;
use timelined::domain::{ContactEvent, TenantId};
use timelined::storage::postgres::PgStorage;
use timelined::storage::sqlite::SqliteStorage;
use timelined::storage::{Saved, Storage};
use tokio::sync::OnceCell;

use super::builders::plain;

/// The two engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Sqlite,
    Postgres,
}

/// An open database and a second way into it, by plain SQL, as other programs have.
pub struct Database {
    pub storage: Storage,
    pub engine: Engine,
    sql: Sql,
    _directory: Option<TempDir>,
}

enum Sql {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl std::ops::Deref for Database {
    type Target = Storage;

    fn deref(&self) -> &Storage {
        &self.storage
    }
}

/// Runs `case` on a fresh database of `engine`.
pub fn run(engine: Engine, case: impl AsyncFnOnce(&Database)) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let db = Database::fresh(engine).await;
        case(&db).await;
        db.drop().await;
    });
}

impl Database {
    /// A migrated, empty database.
    pub async fn fresh(engine: Engine) -> Self {
        match engine {
            Engine::Sqlite => Self::sqlite().await,
            Engine::Postgres => Self::postgres().await,
        }
    }

    async fn sqlite() -> Self {
        static MIGRATED: OnceCell<Vec<u8>> = OnceCell::const_new();
        let migrated = MIGRATED
            .get_or_init(async || {
                let directory = tempfile::tempdir().unwrap();
                let path = directory.path().join("timelined.db");
                let storage = Storage::sqlite(SqliteStorage::open(&path, false).await.unwrap());
                storage.migrate().await.unwrap();
                storage.close().await;
                std::fs::read(path).unwrap()
            })
            .await;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("timelined.db");
        std::fs::write(&path, migrated).unwrap();
        let sql = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_lazy_with(SqliteConnectOptions::new().filename(&path));
        Self {
            storage: Storage::sqlite(SqliteStorage::open(&path, false).await.unwrap()),
            engine: Engine::Sqlite,
            sql: Sql::Sqlite(sql),
            _directory: Some(directory),
        }
    }

    async fn postgres() -> Self {
        static MIGRATED: OnceCell<()> = OnceCell::const_new();
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let migrate = async || {
            in_cluster("create database migrated").await;
            let url = database_url("migrated").await;
            let storage = open(&url).await;
            storage.migrate().await.unwrap();
            storage.close().await;
        };
        MIGRATED.get_or_init(migrate).await;
        let name = format!("case_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        in_cluster(&format!("create database {name} template migrated")).await;
        let url = database_url(&name).await;
        let sql = PgPoolOptions::new()
            .max_connections(1)
            .connect_lazy(&url)
            .unwrap();
        Self {
            storage: open(&url).await,
            engine: Engine::Postgres,
            sql: Sql::Postgres(sql),
            _directory: None,
        }
    }

    /// Closes it and gives its space back.
    pub async fn drop(self) {
        self.storage.close().await;
        match self.sql {
            Sql::Sqlite(pool) => pool.close().await,
            Sql::Postgres(pool) => {
                let options = pool.connect_options();
                let name = options.get_database().unwrap().to_owned();
                pool.close().await;
                // A hundred of them would fill the disk.
                in_cluster(&format!("drop database {name} with (force)")).await;
            }
        }
    }

    /// Its address, for a daemon.
    pub async fn url(&self) -> String {
        match &self.sql {
            Sql::Sqlite(pool) => {
                format!(
                    "sqlite://{}",
                    pool.connect_options().get_filename().display()
                )
            }
            Sql::Postgres(pool) => {
                let options = pool.connect_options();
                database_url(
                    options
                        .get_database()
                        .expect("a test's database has a name"),
                )
                .await
            }
        }
    }

    /// Saves events for `tenant`, all of which must be new.
    pub async fn given(&self, tenant: &TenantId, events: impl IntoIterator<Item = ContactEvent>) {
        let batch: Vec<_> = events.into_iter().map(plain).collect();
        let saved = self.events.save(tenant, batch).await.unwrap();
        assert!(
            saved.iter().all(|saved| *saved == Saved::Created),
            "{saved:?}"
        );
    }

    /// Runs plain SQL, one statement or several.
    pub async fn execute(&self, sql: &str) -> Result<u64, sqlx::Error> {
        let sql = AssertSqlSafe(sql.to_owned());
        match &self.sql {
            Sql::Sqlite(pool) => Ok(sqlx::raw_sql(sql).execute(pool).await?.rows_affected()),
            Sql::Postgres(pool) => Ok(sqlx::raw_sql(sql).execute(pool).await?.rows_affected()),
        }
    }

    /// The first column of each row, a whole number.
    pub async fn ints(&self, sql: &str) -> Vec<i64> {
        let sql = AssertSqlSafe(sql.to_owned());
        match &self.sql {
            Sql::Sqlite(pool) => sqlx::query_scalar(sql).fetch_all(pool).await.unwrap(),
            Sql::Postgres(pool) => sqlx::query_scalar(sql).fetch_all(pool).await.unwrap(),
        }
    }

    /// The only column of the only row, a whole number.
    pub async fn int(&self, sql: &str) -> i64 {
        let found = self.ints(sql).await;
        assert_eq!(found.len(), 1, "{sql}");
        found[0]
    }

    /// How many rows `from` has, such as `event_outbox where rank = 0`.
    pub async fn count(&self, from: &str) -> i64 {
        self.int(&format!("select count(*) from {from}")).await
    }

    /// The first column of each row, a text.
    pub async fn texts(&self, sql: &str) -> Vec<Option<String>> {
        let sql = AssertSqlSafe(sql.to_owned());
        match &self.sql {
            Sql::Sqlite(pool) => sqlx::query_scalar(sql).fetch_all(pool).await.unwrap(),
            Sql::Postgres(pool) => sqlx::query_scalar(sql).fetch_all(pool).await.unwrap(),
        }
    }

    /// Asks the engine to prepare `sql`.
    pub async fn prepare(&self, sql: &str) -> Result<(), sqlx::Error> {
        use sqlx::{Executor, SqlSafeStr};
        let sql = AssertSqlSafe(sql.to_owned()).into_sql_str();
        match &self.sql {
            Sql::Sqlite(pool) => pool.prepare(sql).await.map(drop),
            Sql::Postgres(pool) => pool.prepare(sql).await.map(drop),
        }
    }

    /// How the engine would run `sql` with `parameters`, which are SQL literals, line by line.
    pub async fn plan(&self, sql: &str, parameters: &[String]) -> String {
        let lines = match &self.sql {
            Sql::Sqlite(pool) => {
                // Bound, not written into it: to a literal the planner would fold what it cannot
                // fold for the daemon.
                let explain = AssertSqlSafe(format!("explain query plan {sql}"));
                let mut query = sqlx::query(explain);
                for literal in parameters {
                    query = match literal.strip_prefix('\'') {
                        Some(text) => query.bind(text.trim_end_matches('\'').to_owned()),
                        None if literal == "null" => query.bind(None::<i64>),
                        None => query.bind(literal.parse::<i64>().unwrap()),
                    };
                }
                let rows = query.fetch_all(pool).await.unwrap();
                let detail = |row| sqlx::Row::get::<String, _>(row, "detail");
                rows.iter().map(detail).collect::<Vec<_>>()
            }
            Sql::Postgres(pool) => {
                let mut connection = pool.acquire().await.unwrap();
                let prepare =
                    format!("set plan_cache_mode = force_custom_plan; prepare q as {sql}");
                sqlx::raw_sql(AssertSqlSafe(prepare))
                    .execute(&mut *connection)
                    .await
                    .unwrap();
                let execute = match parameters {
                    [] => "explain execute q".to_owned(),
                    some => format!("explain execute q({})", some.join(", ")),
                };
                let rows = sqlx::raw_sql(AssertSqlSafe(execute))
                    .fetch_all(&mut *connection)
                    .await
                    .unwrap();
                sqlx::raw_sql("deallocate q")
                    .execute(&mut *connection)
                    .await
                    .unwrap();
                rows.iter().map(|row| sqlx::Row::get(row, 0)).collect()
            }
        };
        lines.join("\n")
    }

    /// `time` as a literal of this engine's SQL.
    pub fn at(&self, time: DateTime<Utc>) -> String {
        match self.engine {
            Engine::Sqlite => time.timestamp_micros().to_string(),
            Engine::Postgres => format!("'{}'::timestamptz", timelined::domain::format_time(time)),
        }
    }

    /// `flag` as a literal of this engine's SQL.
    pub fn flag(&self, flag: bool) -> &'static str {
        match (self.engine, flag) {
            (Engine::Sqlite, false) => "0",
            (Engine::Sqlite, true) => "1",
            (Engine::Postgres, false) => "false",
            (Engine::Postgres, true) => "true",
        }
    }

    /// An expression that gives the time in `column` as microseconds since 1970.
    pub fn micros(&self, column: &str) -> String {
        match self.engine {
            Engine::Sqlite => column.to_owned(),
            Engine::Postgres => format!("(extract(epoch from {column}) * 1000000)::bigint"),
        }
    }

    /// One of two texts, by the engine.
    pub fn either<T>(&self, sqlite: T, postgres: T) -> T {
        match self.engine {
            Engine::Sqlite => sqlite,
            Engine::Postgres => postgres,
        }
    }
}

/// A private PostgreSQL (`postgres.sh`); ends with the value.
pub struct Cluster {
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    url: String,
}

impl Cluster {
    /// Starts one.
    pub fn launch() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/postgres.sh");
        let mut child = Command::new(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tests/support/postgres.sh starts");
        let commands = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let url = line(&mut answers);
        assert!(
            url.starts_with("postgres://"),
            "no PostgreSQL for the tests; see tests/support/postgres.sh"
        );
        Self {
            child,
            commands,
            answers,
            url,
        }
    }

    /// The address of its first database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Stops the server; its data and its port stay.
    pub fn stop(&mut self) {
        self.command("stop", "stopped");
    }

    /// Starts the server again.
    pub fn start(&mut self) {
        self.command("start", "started");
    }

    fn command(&mut self, command: &str, answer: &str) {
        let commands = self.commands.as_mut().expect("open until the end");
        writeln!(commands, "{command}").unwrap();
        assert_eq!(line(&mut self.answers), answer);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The script ends with its input, and removes the directory before it does.
        drop(self.commands.take());
        drop(self.child.wait());
    }
}

fn line(answers: &mut impl BufRead) -> String {
    let mut line = String::new();
    answers.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

/// The address of this process's cluster.
async fn cluster() -> &'static str {
    // Never dropped: the kernel closes its standard input when this process ends.
    static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();
    CLUSTER.get_or_init(async || Cluster::launch()).await.url()
}

/// Runs a statement that belongs to no database.
async fn in_cluster(sql: &str) {
    let mut connection = PgConnection::connect(cluster().await).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
}

/// The address of `name` in this process's cluster.
async fn database_url(name: &str) -> String {
    let url = cluster().await;
    format!("{}/{name}", url.rsplit_once('/').unwrap().0)
}

/// The storage on a database of the cluster.
async fn open(url: &str) -> Storage {
    Storage::postgres(PgStorage::open(url).await.expect("the cluster answers"))
}
