//! The jobs of a real daemon: what the purge takes, what a stop or a kill leaves, what is logged.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};
use timelined::domain::{Clock as _, SystemClock};
use timelined::storage::RunState;

use crate::alerts::subjects;
use crate::support::builders::MICRO;
use crate::support::daemon::{Settings, TestDaemon, agent, answer, eventually, operator, service};
use crate::support::database::{Database, Engine, run};
use crate::support::socket::Socket;

const PATIENCE: Duration = Duration::from_mins(1);
const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";
/// An hour that no test waits for.
const NEVER: &str = "cron = \"0 0 0 29 2 *\"";

fn purging(when: &str) -> String {
    format!(
        "[[jobs]]\nname = \"purge-expired\"\nkind = \"purge_expired\"\n{when}\ntimeout = \"10m\"\nolder_than = \"7d\"\n"
    )
}

async fn settings(db: &Database, jobs: &str) -> Settings {
    Settings::new()
        .config(jobs)
        .env("TIMELINED__DATABASE__URL", &db.url().await)
}

async fn ask_for(daemon: &TestDaemon, job: &str) -> String {
    let path = format!("/api/v1/jobs/{job}/run");
    let (status, body) = daemon.post(&path, &operator(), &json!({})).await;
    assert_eq!(status, 202, "{body}");
    body["run_id"].as_str().unwrap().to_owned()
}

async fn runs(daemon: &TestDaemon, job: &str) -> Vec<Value> {
    let path = format!("/api/v1/jobs/{job}/runs?limit=200");
    let (status, body) = daemon.get(&path, &operator()).await;
    assert_eq!(status, 200, "{body}");
    body["runs"].as_array().unwrap().clone()
}

/// The run, once it has ended.
async fn ended(daemon: &TestDaemon, job: &str, id: &str) -> Value {
    let found = async || {
        let runs = runs(daemon, job).await;
        let run = runs.into_iter().find(|run| run["id"] == id);
        run.filter(|run| !run["finished_at"].is_null())
    };
    eventually("the run ends", PATIENCE, async || found().await.is_some()).await;
    found().await.unwrap()
}

/// The lines in which runs of `job` ended.
fn last_lines(daemon: &TestDaemon, job: &str) -> Vec<Value> {
    let log = daemon.log();
    log.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .filter(|line: &Value| line["job.name"] == job && line["run.duration_ms"].is_u64())
        .collect()
}

/// Inserts `events` rows that expired at `expires_at`, by plain SQL.
async fn expired(db: &Database, tenant: &str, events: u32, expires_at: DateTime<Utc>) {
    let (created, expires) = (db.at(expires_at - TimeDelta::days(1)), db.at(expires_at));
    let columns = "(tenant_id, contact_id, event_type, category, source, created_at, occurred_at, expires_at)";
    let row = format!(
        "'{tenant}', '{CONTACT}', 'note_added', 'note', 'system', {created}, {created}, {expires}"
    );
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {events})
             insert into contact_events {columns} select {row} from n"
        ),
        Engine::Postgres => format!(
            "insert into contact_events {columns} select {} from generate_series(1, {events})",
            row.replace(&format!("'{CONTACT}'"), &format!("'{CONTACT}'::uuid"))
        ),
    };
    db.execute(&sql).await.unwrap();
}

/// How fast a run deleted, for whoever looks for a stall.
fn rate(db: &Database, run: &Value, deleted: i64) {
    let at = |name: &str| -> DateTime<Utc> { run[name].as_str().unwrap().parse().unwrap() };
    let ms = (at("finished_at") - at("started_at"))
        .num_milliseconds()
        .max(1);
    eprintln!(
        "{:?}: {deleted} rows in {ms} ms, {} rows/s",
        db.engine,
        deleted * 1000 / ms
    );
}

on_both_engines! {
    async fn the_purge_takes_exactly_what_expired_before_its_cutoff_and_all_that_hangs_on_it(db) {
        let now = SystemClock.now();
        let week = TimeDelta::days(7);
        for tenant in ["acme", "globex", "zeta"] {
            expired(db, tenant, 150, now - week - MICRO).await;
            expired(db, tenant, 3, now - TimeDelta::days(30)).await;
            // What will have been expired for a week a minute from now, and what has just expired.
            expired(db, tenant, 2, now - week + TimeDelta::minutes(1)).await;
            expired(db, tenant, 4, now - MICRO).await;
            let old = db.at(now - TimeDelta::hours(25));
            let young = db.at(now - TimeDelta::hours(23));
            let some_id = db.either("id", "id::text");
            let hash = db.either("x'00'", "'\\x00'::bytea");
            for (table, columns, values) in [
                ("event_reads", "event_id, reader, read_at", "id, 'ann', created_at"),
                ("event_deliveries", "event_id, audience, outcome, recorded_at", "id, 'agent', 'delivered', created_at"),
                ("event_outbox", "seq, event_id, contact_id, audience, rank, occurred_at, expires_at",
                 "seq, id, contact_id, 'client', 2, occurred_at, expires_at"),
            ] {
                let sql = format!("insert into {table} (tenant_id, {columns}) select tenant_id, {values} from contact_events where tenant_id = '{tenant}'");
                db.execute(&sql).await.unwrap();
            }
            for (name, at) in [("old", &old), ("young", &young)] {
                let sql = format!(
                    "insert into idempotency_keys (tenant_id, key, body_hash, event_id, created_at)
                     select tenant_id, '{name}' || {some_id}, {hash}, id, {at} from contact_events where tenant_id = '{tenant}'"
                );
                db.execute(&sql).await.unwrap();
            }
        }
        let daemon = settings(db, &purging(NEVER)).await.start();
        let id = ask_for(&daemon, "purge-expired").await;
        let run = ended(&daemon, "purge-expired", &id).await;
        assert_eq!((&run["state"], &run["trigger"], &run["attempt"]), (&json!("succeeded"), &json!("manual"), &json!(1)));
        assert_eq!(run["counts"], json!({ "deleted": 3 * 153, "idempotency_keys": 3 * 159 }));
        let cutoff = db.at(now - week);
        assert_eq!(db.count(&format!("contact_events where expires_at < {cutoff}")).await, 0);
        assert_eq!(db.count("contact_events").await, 3 * 6);
        for table in ["event_reads", "event_deliveries", "event_outbox"] {
            assert_eq!(db.count(table).await, 3 * 6, "{table}");
            let orphans = format!("{table} t where not exists (select 1 from contact_events e where e.tenant_id = t.tenant_id and e.id = t.event_id)");
            assert_eq!(db.count(&orphans).await, 0, "{table}");
        }
        assert_eq!(db.count("idempotency_keys where key like 'old%'").await, 0);
        assert_eq!(db.count("idempotency_keys where key like 'young%'").await, 3 * 159);
        the_run_ended_in_one_line(&daemon, &run);
    }

    async fn the_scheduled_purge_takes_each_event_with_its_microsecond(db) {
        let daemon = settings(db, &purging("every = \"1s\"").replace("7d", "1s")).await.start();
        let begin = SystemClock.now();
        // One each 10 ms: the purge's cutoff lies somewhere between two of them, again and again.
        let mut all = Vec::new();
        for step in 0..400 {
            let at = begin - TimeDelta::seconds(1) + TimeDelta::milliseconds(10 * step) + MICRO * i32::try_from(step).unwrap();
            all.push(at.timestamp_micros());
            expired(db, "acme", 1, at).await;
        }
        let left = format!("select {} from contact_events order by 1", db.micros("expires_at"));
        eventually("all are gone", PATIENCE, async || {
            let before = SystemClock.now() - TimeDelta::seconds(1);
            let found = db.ints(&left).await;
            // The youngest ones are all there: nothing goes before its second is over.
            let after = SystemClock.now() - TimeDelta::seconds(1);
            let due = all.iter().filter(|at| **at >= after.timestamp_micros()).copied();
            let found: BTreeSet<_> = found.into_iter().collect();
            assert!(due.clone().all(|at| found.contains(&at)), "gone before its time, at {before}");
            // What is gone is a beginning of the row, never a hole.
            let gone = all.len() - found.len();
            assert_eq!(found, all[gone..].iter().copied().collect::<BTreeSet<_>>(), "a hole");
            found.is_empty()
        })
        .await;
        let deleted = async || {
            let runs = runs(&daemon, "purge-expired").await;
            runs.iter().map(|run| run["counts"]["deleted"].as_i64().unwrap_or(0)).sum::<i64>()
        };
        eventually("the rows of the runs tell all", PATIENCE, async || deleted().await == 400).await;
    }

    async fn a_purge_that_is_stopped_goes_on_at_the_next_start(db) {
        let now = SystemClock.now();
        expired(db, "acme", 2_000, now - TimeDelta::days(8)).await;
        expired(db, "acme", 10, now - TimeDelta::days(6)).await;
        // Slow enough to be caught at work with few rows, however slow the machine is.
        let slow = settings(db, &format!("{}max_rate = 100\n", purging(NEVER))).await;
        let mut daemon = slow.start();
        let id = ask_for(&daemon, "purge-expired").await;
        eventually("the purge is at work", PATIENCE, async || db.count("contact_events").await < 2_000).await;
        let began = Instant::now();
        let status = daemon.stop();
        assert_eq!(status.code(), Some(0), "{}", daemon.log());
        assert!(began.elapsed() < Duration::from_secs(10), "between two batches: {:?}", began.elapsed());
        let left = db.count("contact_events").await;
        assert!(left > 10, "the purge was over before the stop");
        let queued = format!("job_runs where id = '{id}' and state = 'queued' and attempt = 0 and daemon is null");
        assert_eq!(db.count(&queued).await, 1);

        let daemon = slow.config(&purging(NEVER)).start();
        let run = ended(&daemon, "purge-expired", &id).await;
        assert_eq!((&run["state"], &run["attempt"]), (&json!("succeeded"), &json!(1)));
        assert_eq!(run["counts"], json!({ "deleted": 2_000 }), "of both parts");
        assert_eq!(db.count("contact_events").await, 10);
    }

    async fn a_job_that_fails_is_mailed_once_and_so_is_its_recovery(db) {
        let purge = purging("every = \"1s\"").replace("timeout", "retry = { attempts = 1 }\ntimeout");
        let daemon = settings(db, &format!("[alerts]\nto = [\"ops@example.com\"]\nafter = 3\n{purge}"))
            .await
            .env("TIMELINED__HTTP__OPS_LISTEN", "127.0.0.1:0")
            .start();
        let has_ended = async |state: &str, times: i64| {
            db.count(&format!("job_runs where state = '{state}'")).await >= times
        };
        let outbox = daemon.state.join("outbox");
        eventually("it succeeds", PATIENCE, async || has_ended("succeeded", 1).await).await;

        db.execute("alter table idempotency_keys rename to gone").await.unwrap();
        eventually("it fails again and again", PATIENCE, async || has_ended("failed", 6).await).await;
        let told = "purge-expired failed 3 times in a row";
        eventually("a mail", PATIENCE, async || subjects(&outbox) == [told]).await;
        let failing = "timelined_job_alert_active{job=\"purge-expired\",kind=\"failure\"} ";
        assert_eq!(metric(&daemon, failing).await.as_deref(), Some("1"));
        let in_a_row = metric(&daemon, "timelined_job_failures_in_a_row{job=\"purge-expired\"} ").await;
        assert!(in_a_row.unwrap().parse::<u64>().unwrap() >= 3);

        db.execute("alter table gone rename to idempotency_keys").await.unwrap();
        let both = [told, "purge-expired succeeded again"];
        eventually("it has recovered", PATIENCE, async || subjects(&outbox).len() > 1).await;
        let before = db.count("job_runs where state = 'succeeded'").await;
        eventually("it goes on", PATIENCE, async || has_ended("succeeded", before + 2).await).await;
        assert_eq!(subjects(&outbox), both);
        assert_eq!(mails(&daemon), 2);
        assert_eq!(metric(&daemon, failing).await.as_deref(), Some("0"));
    }

    async fn a_purge_that_waits_for_an_operator_says_so_at_once_and_what_to_do(db) {
        let alerts = "[alerts]\nto = [\"ops@example.com\"]\n";
        let daemon = settings(db, &format!("{alerts}{}", purging(NEVER))).await.start();
        let long_ago = SystemClock.now() - TimeDelta::days(20);
        expired(db, "acme", 1, long_ago).await;
        let id = ask_for(&daemon, "purge-expired").await;
        assert_eq!(ended(&daemon, "purge-expired", &id).await["counts"], json!({ "deleted": 1 }));
        expired(db, "acme", 10_001, long_ago).await;
        let id = ask_for(&daemon, "purge-expired").await;
        let run = ended(&daemon, "purge-expired", &id).await;
        let what_to_do = "`timelined purge --confirm --job purge-expired`";
        assert_eq!((&run["state"], &run["attempt"]), (&json!("failed"), &json!(1)));
        assert!(run["error"].as_str().unwrap().ends_with(what_to_do), "{run}");
        let outbox = daemon.state.join("outbox");
        let told = "purge-expired waits for an operator";
        eventually("a mail after one failure", PATIENCE, async || subjects(&outbox) == [told]).await;
        let mail = std::fs::read_dir(&outbox).unwrap().find_map(|file| {
            let path = file.unwrap().path();
            path.extension().is_some_and(|end| end == "eml").then(|| std::fs::read_to_string(path).unwrap())
        });
        assert!(mail.unwrap().replace("=\r\n", "").contains(what_to_do));
        let output = |arguments: &[&str]| {
            let output = daemon.settings().command(arguments).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let shown = output(&["jobs", "show", "purge-expired"]);
        assert!(shown.contains("waits for an operator") && shown.contains(what_to_do), "{shown}");
        let shown: Value = serde_json::from_str(&output(&["jobs", "show", "purge-expired", "--json"])).unwrap();
        assert_eq!(shown["waits_for_operator"], true);

        assert_eq!(output(&["purge", "--confirm", "--job", "purge-expired"]), "deleted 10001 events\n");
        assert!(!output(&["jobs", "show", "purge-expired"]).contains("waits for an operator"));
        let both = ["purge-expired succeeded again", told];
        eventually("the recovery is told", PATIENCE, async || subjects(&outbox) == both).await;
    }

    async fn a_purge_by_command_that_is_interrupted_stops_between_batches_and_leaves_a_run(db) {
        expired(db, "acme", 20_000, SystemClock.now() - TimeDelta::days(8)).await;
        let settings = settings(db, &purging(NEVER)).await;
        let mut purge = settings.command(&["purge"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        eventually("the purge is at work", PATIENCE, async || db.count("contact_events").await < 20_000).await;
        let signalled = Command::new("kill").args(["-INT", &purge.id().to_string()]).status().unwrap();
        assert!(signalled.success());
        let mut said = String::new();
        purge.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(purge.wait().unwrap().code(), Some(1), "{said}");
        let left = db.count("contact_events").await;
        assert!(left > 0, "the purge was over before the signal");
        assert!(said.contains(&format!("deleted {} events", 20_000 - left)), "{said}");
        let runs = db.ledger.runs("purge-expired", None, 9).await.unwrap();
        assert_eq!((runs.len(), runs[0].state), (1, RunState::Cancelled));
        assert_eq!(i64::try_from(runs[0].counts["deleted"]).unwrap(), 20_000 - left);
    }

    async fn a_large_purge_does_not_stall(db) {
        expired(db, "acme", 20_000, SystemClock.now() - TimeDelta::days(8)).await;
        let daemon = settings(db, &purging(NEVER)).await.start();
        let id = ask_for(&daemon, "purge-expired").await;
        let run = ended(&daemon, "purge-expired", &id).await;
        rate(db, &run, 20_000);
        assert_eq!(run["counts"], json!({ "deleted": 20_000 }));
        assert_eq!(db.count("contact_events").await, 0);
    }

    async fn creates_go_on_while_a_large_purge_runs(db) {
        expired(db, "acme", 60_000, SystemClock.now() - TimeDelta::days(8)).await;
        let daemon = settings(db, &purging(NEVER)).await.start();
        let id = ask_for(&daemon, "purge-expired").await;
        eventually("the purge is at work", PATIENCE, async || db.count("contact_events").await < 59_900).await;
        let (path, token) = (format!("/api/v1/contacts/{CONTACT}/events"), service("acme"));
        let body = json!({ "event_type": "note_added", "category": "note", "source": "agent" });
        let mut waits = Vec::new();
        let is_going = format!("job_runs where id = '{id}' and state = 'running'");
        while db.count(&is_going).await == 1 {
            let began = Instant::now();
            let (status, _) = daemon.post(&path, &token, &body).await;
            assert_eq!(status, 201);
            waits.push(began.elapsed());
            let (status, _) = daemon.get(&format!("{path}?limit=10"), &token).await;
            assert_eq!(status, 200);
        }
        let run = ended(&daemon, "purge-expired", &id).await;
        rate(db, &run, 60_000);
        assert_eq!(run["counts"]["deleted"], 60_000);
        assert!(waits.len() >= 10, "the purge was over too soon to tell: {}", waits.len());
        waits.sort();
        let p95 = waits[waits.len() * 95 / 100];
        assert!(p95 < Duration::from_millis(150), "p95 of {}: {p95:?}", waits.len());
        assert_eq!(db.count("contact_events").await, i64::try_from(waits.len()).unwrap());
    }
}

/// What `/metrics` says behind these words.
async fn metric(daemon: &TestDaemon, words: &str) -> Option<String> {
    let log = daemon.log();
    let (_, rest) = log.split_once("\"http.ops_listen\":\"").unwrap();
    let address = rest.split('"').next().unwrap();
    let answer = daemon.http.get(format!("http://{address}/metrics"));
    let text = answer.send().await.unwrap().text().await.unwrap();
    let mut lines = text.lines();
    lines.find_map(|line| Some(line.strip_prefix(words)?.to_owned()))
}

/// Exactly one line, with every field that an operator looks for.
fn the_run_ended_in_one_line(daemon: &TestDaemon, run: &Value) {
    let lines = last_lines(daemon, run["job"].as_str().unwrap());
    let lines: Vec<_> = lines
        .iter()
        .filter(|line| line["run.id"] == run["id"])
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = lines[0];
    assert_eq!(line["run.attempt"], run["attempt"]);
    assert_eq!(line["run.trigger"], run["trigger"]);
    assert_eq!(line["run.scheduled_at"], run["scheduled_at"]);
    assert_eq!(line["run.outcome"], run["state"]);
    assert_eq!(line["node.id"], run["daemon"]);
    assert!(line["run.lag_ms"].is_i64() || line["run.lag_ms"].is_u64());
    assert!(line["run.next_at"].is_string());
    let counts: Value = serde_json::from_str(line["counts"].as_str().unwrap()).unwrap();
    assert_eq!(counts, run["counts"]);
    assert_eq!(line["error"], run["error"]);
}

#[test]
fn a_purge_of_a_table_that_nobody_has_analyzed_reads_each_row_once() {
    run(Engine::Postgres, async |db: &Database| {
        let never = "alter table contact_events set (autovacuum_enabled = false)";
        db.execute(never).await.unwrap();
        let rows = 20_000;
        expired(db, "acme", rows, SystemClock.now() - TimeDelta::days(8)).await;
        let daemon = settings(db, &purging(NEVER)).await.start();
        let id = ask_for(&daemon, "purge-expired").await;
        let run = ended(&daemon, "purge-expired", &id).await;
        assert_eq!(run["counts"], json!({ "deleted": rows }));
        let counted =
            format!("pg_stat_user_tables where relname = 'contact_events' and n_tup_del = {rows}");
        eventually("the server has counted", PATIENCE, async || {
            db.count(&counted).await == 1
        })
        .await;
        let read = "select (idx_tup_fetch + seq_tup_read)::bigint from pg_stat_user_tables where relname = 'contact_events'";
        let read = db.int(read).await;
        assert!(read < 5 * i64::from(rows), "{read} rows were read");
    });
}

/// A transaction of another program, which keeps what it has locked.
async fn locking(db: &Database, what: &str) -> PgConnection {
    let mut other = PgConnection::connect(&db.url().await).await.unwrap();
    let sql = format!("begin; select 1 from {what} for update");
    let locked = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut other).await;
    assert!(locked.unwrap().rows_affected() >= 1);
    other
}

#[test]
fn a_purge_goes_around_what_others_have_locked_and_takes_it_later() {
    run(Engine::Postgres, async |db: &Database| {
        let long_ago = SystemClock.now() - TimeDelta::days(8);
        for tenant in ["acme", "globex"] {
            expired(db, tenant, 300, long_ago).await;
        }
        let read = "insert into event_reads (tenant_id, event_id, reader, read_at)
                    select tenant_id, id, 'ann', created_at from contact_events";
        db.execute(read).await.unwrap();
        let last = |tenant: &str| {
            format!(
                "(select id from contact_events where tenant_id = '{tenant}' order by seq desc limit 1)"
            )
        };
        // What hangs on an event is waited for, with all that its batch has locked; an event is not.
        let receipt = format!("event_reads where event_id = {}", last("acme"));
        let mut receipt = locking(db, &receipt).await;
        let event = format!("contact_events where id = {}", last("globex"));
        let event = locking(db, &event).await;
        let daemon = settings(db, &purging(NEVER)).await.start();
        let id = ask_for(&daemon, "purge-expired").await;
        eventually("all but the locked ones are gone", PATIENCE, async || {
            let left = db
                .ints("select count(*) from contact_events group by tenant_id")
                .await;
            left == [1, 1]
        })
        .await;
        let waiting = "pg_stat_activity where wait_event_type = 'Lock' and now() - query_start > interval '1 s'";
        assert_eq!(db.count(waiting).await, 0, "nobody waits for long");
        sqlx::raw_sql("rollback")
            .execute(&mut receipt)
            .await
            .unwrap();
        let run = ended(&daemon, "purge-expired", &id).await;
        assert_eq!(
            (&run["state"], &run["attempt"]),
            (&json!("succeeded"), &json!(1))
        );
        assert_eq!(run["counts"], json!({ "deleted": 599 }));
        event.close().await.unwrap();
        let id = ask_for(&daemon, "purge-expired").await;
        let run = ended(&daemon, "purge-expired", &id).await;
        assert_eq!(run["counts"], json!({ "deleted": 1 }));
        assert_eq!(db.count("event_reads").await, 0);
    });
}

#[test]
fn a_purge_that_was_killed_is_taken_over_at_the_next_start() {
    run(Engine::Sqlite, async |db: &Database| {
        let now = SystemClock.now();
        expired(db, "acme", 20_000, now - TimeDelta::days(8)).await;
        expired(db, "globex", 10, now - TimeDelta::days(6)).await;
        let mut daemon = settings(db, &purging(NEVER)).await.start();
        let id = ask_for(&daemon, "purge-expired").await;
        eventually("the purge is at work", PATIENCE, async || {
            db.count("contact_events").await < 20_000
        })
        .await;
        daemon.kill();
        let left = db.count("contact_events").await;
        assert!(left > 10, "the purge was over before the kill");
        let kept = db.count("contact_events where tenant_id = 'globex'").await;
        assert_eq!(kept, 10, "what should stay is there");
        daemon.again();
        let run = ended(&daemon, "purge-expired", &id).await;
        assert_eq!(run["state"], "succeeded");
        // What the killed one had deleted is in no row.
        assert_eq!(run["counts"], json!({ "deleted": left - 10 }));
        assert_eq!(db.count("contact_events").await, 10);
        assert!(daemon.log().contains("took over runs"), "{}", daemon.log());
    });
}

#[tokio::test]
async fn a_stop_during_delivery_ends_in_time_and_what_was_not_acknowledged_comes_again() {
    let mut daemon = TestDaemon::start();
    let watched = [CONTACT.to_owned()];
    let (mut socket, _) = Socket::watching(&daemon.address, &agent("acme"), &watched).await;
    let path = format!("/api/v1/contacts/{CONTACT}/events");
    let body = json!({ "event_type": "note_added", "category": "note", "source": "agent", "is_realtime": true });
    let (status, event) = daemon.post(&path, &service("acme"), &body).await;
    assert_eq!(status, 201);
    assert_eq!(socket.next_of("event").await["event"]["id"], event["id"]);
    let began = Instant::now();
    assert_eq!(daemon.stop().code(), Some(0));
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    daemon.again();
    let (_, backlog) = Socket::watching(&daemon.address, &agent("acme"), &watched).await;
    assert_eq!(backlog[0]["event"]["id"], event["id"]);
    assert_eq!(backlog.len(), 1);
}

#[tokio::test]
async fn a_stop_while_the_mail_server_stalls_ends_in_time_and_the_mail_goes_out_later() {
    // Takes the line, and says nothing ever.
    let stalling = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = stalling.local_addr().unwrap().port();
    let config = |mail: &str| format!("[http]\nshutdown_timeout = \"2s\"\n[mail]\n{mail}\n");
    let smtp = format!(
        "smtp = {{ host = \"127.0.0.1\", port = {port}, tls = \"none\", timeout = \"1m\" }}"
    );
    let settings = Settings::new().config(&config(&smtp));
    let mut daemon = settings.start();
    let path = format!("/api/v1/contacts/{CONTACT}/exports");
    let order = json!({ "format": "csv", "audience": "agent", "to": ["ana@example.com"] });
    let (status, export) = daemon.post(&path, &service("acme"), &order).await;
    assert_eq!(status, 202, "{export}");
    let (_line, _) = tokio::time::timeout(PATIENCE, stalling.accept())
        .await
        .unwrap()
        .unwrap();
    let began = Instant::now();
    assert_eq!(daemon.stop().code(), Some(0), "{}", daemon.log());
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );

    let daemon = settings.config(&config("directory = \"outbox\"")).start();
    let href = export["href"].as_str().unwrap();
    eventually("the mail goes out", PATIENCE, async || {
        daemon.get(href, &service("acme")).await.1["state"] == "done"
    })
    .await;
    assert_eq!(mails(&daemon), 1);
}

#[tokio::test]
async fn a_killed_daemons_mail_goes_out_at_the_next_start_and_a_commands_stays_its_own() {
    let stalling = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = stalling.local_addr().unwrap().port();
    let smtp = format!(
        "[mail]\nsmtp = {{ host = \"127.0.0.1\", port = {port}, tls = \"none\", timeout = \"1m\" }}\n"
    );
    let settings = Settings::new().config(&smtp);
    let mut daemon = settings.start();
    let path = format!("/api/v1/contacts/{CONTACT}/exports");
    let to = ["ana@example.com", "bob@example.com"];
    let order = json!({ "format": "csv", "audience": "agent", "to": to });
    let (status, export) = daemon.post(&path, &service("acme"), &order).await;
    assert_eq!(status, 202, "{export}");
    let (_line, _) = tokio::time::timeout(PATIENCE, stalling.accept())
        .await
        .unwrap()
        .unwrap();
    daemon.kill();
    let file =
        sqlx::sqlite::SqliteConnectOptions::new().filename(daemon.state.join("timelined.db"));
    let pool = sqlx::sqlite::SqlitePool::connect_with(file).await.unwrap();
    let until = (SystemClock.now() + TimeDelta::hours(1)).timestamp_micros();
    // The mail that waits is taken by `timelined export`.
    sqlx::query(
        "update export_deliveries set state = 'sending', claimed_by = $1, claimed_until = $2
         where state = 'pending'",
    )
    .bind(uuid::Uuid::from_u128(9).to_string())
    .bind(until)
    .execute(&pool)
    .await
    .unwrap();
    pool.close().await;
    let daemon = settings.config("[mail]\ndirectory = \"outbox\"\n").start();
    let href = export["href"].as_str().unwrap();
    eventually("one mail goes out", PATIENCE, async || {
        daemon.get(href, &service("acme")).await.1["state"] == "done"
    })
    .await;
    let export = daemon.get(href, &service("acme")).await.1;
    let mut states: Vec<_> = export["deliveries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mail| mail["state"].as_str().unwrap())
        .collect();
    states.sort_unstable();
    assert_eq!(states, ["sending", "sent"]);
    assert_eq!(mails(&daemon), 1);
}

fn mails(daemon: &TestDaemon) -> usize {
    let Ok(directory) = std::fs::read_dir(daemon.state.join("outbox")) else {
        return 0;
    };
    let names = directory.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().ends_with(".eml"))
        .count()
}

#[tokio::test]
async fn a_second_signal_ends_the_drain_at_once() {
    let stalling = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = stalling.local_addr().unwrap().port();
    let settings = Settings::new().config(&format!(
        "[http]\nshutdown_timeout = \"1m\"\n[mail]\nsmtp = {{ host = \"127.0.0.1\", port = {port}, tls = \"none\", timeout = \"5m\" }}\n"
    ));
    let mut daemon = settings.start();
    let path = format!("/api/v1/contacts/{CONTACT}/exports");
    let order = json!({ "format": "csv", "audience": "agent", "to": ["ana@example.com"] });
    assert_eq!(daemon.post(&path, &service("acme"), &order).await.0, 202);
    let (_line, _) = tokio::time::timeout(PATIENCE, stalling.accept())
        .await
        .unwrap()
        .unwrap();
    daemon.signal("TERM");
    eventually("it drains", PATIENCE, async || {
        daemon.log().contains("\"stopping\"")
    })
    .await;
    let began = Instant::now();
    daemon.signal("TERM");
    assert_eq!(daemon.wait(PATIENCE).code(), Some(0));
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_scheduled_export_mails_each_contact_once_a_run() {
    let contacts: Vec<String> = (1..=3)
        .map(|n| format!("0190b5f0-7c1e-7d3a-8f00-00000000000{n}"))
        .collect();
    let job = |name: &str, which: &str| {
        format!(
            "[[jobs]]\nname = \"{name}\"\nkind = \"timeline_export\"\n{NEVER}\ntenant = \"acme\"\naudience = \"agent\"\n{which}\nto = [\"ops@example.com\"]\n"
        )
    };
    // One of the three has no events, and its mail says so.
    let by_name = job(
        "weekly",
        &format!("contacts = {contacts:?}\nwhen_empty = \"note\""),
    );
    let active = job("active", "select = { active_since = \"1h\" }");
    let mut daemon = Settings::new()
        .config(&format!("{by_name}{active}"))
        .start();
    for contact in &contacts[..2] {
        let path = format!("/api/v1/contacts/{contact}/events");
        let body = json!({ "event_type": "note_added", "category": "note", "source": "agent" });
        assert_eq!(daemon.post(&path, &service("acme"), &body).await.0, 201);
    }
    let id = ask_for(&daemon, "weekly").await;
    let run = ended(&daemon, "weekly", &id).await;
    assert_eq!(
        (&run["state"], &run["counts"]),
        (&json!("succeeded"), &json!({ "exports": 3 }))
    );
    eventually("three mails", PATIENCE, async || mails(&daemon) == 3).await;
    let id_of_active = ask_for(&daemon, "active").await;
    let run = ended(&daemon, "active", &id_of_active).await;
    assert_eq!(run["counts"], json!({ "exports": 2 }));
    eventually("two more", PATIENCE, async || mails(&daemon) == 5).await;
    the_run_ended_in_one_line(&daemon, &run);

    // The same run once more, as after a crash between its work and its end.
    assert_eq!(daemon.stop().code(), Some(0));
    let file =
        sqlx::sqlite::SqliteConnectOptions::new().filename(daemon.state.join("timelined.db"));
    let pool = sqlx::sqlite::SqlitePool::connect_with(file).await.unwrap();
    sqlx::query(
        "update job_runs set state = 'running', finished_at = null, counts = '{}' where id = $1",
    )
    .bind(&id)
    .execute(&pool)
    .await
    .unwrap();
    pool.close().await;
    daemon.again();
    let run = ended(&daemon, "weekly", &id).await;
    assert_eq!(
        (&run["state"], &run["counts"]),
        (&json!("succeeded"), &json!({ "repeated": 3 }))
    );
    let list = answer(daemon.request(Method::GET, "/api/v1/exports", &service("acme")))
        .await
        .1;
    assert_eq!(list["exports"].as_array().unwrap().len(), 5);
    eventually("all are done", PATIENCE, async || {
        let list = daemon.get("/api/v1/exports", &service("acme")).await.1;
        list["exports"]
            .as_array()
            .unwrap()
            .iter()
            .all(|export| export["state"] == "done")
    })
    .await;
    assert_eq!(mails(&daemon), 5);
}
