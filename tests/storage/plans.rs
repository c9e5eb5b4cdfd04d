//! Every statement is prepared, and planned on populated tables: a plan that looks right on empty
//! tables may fail on full ones.
//!
//! The statements are read from the source of the engines ([`statements`]), so none escapes.

use chrono::{DateTime, TimeZone, Utc};

use super::statements::{self, Statement};
use crate::support::database::{Database, Engine};

const EVENTS: i64 = 50_000;
const RUNS: i64 = 20_000;
const EXPORTS: i64 = 20_000;
const HOLDS: i64 = 10_000;
/// The seconds of 2025-01-01; row `i` of each table is `i` seconds younger.
const BEGIN: i64 = 1_735_689_600;

on_both_engines! {
    async fn every_statement_prepares(db) {
        let statements = statements::of(db.engine);
        assert!(statements.len() > 60, "only {} statements were found", statements.len());
        assert!(db.prepare("select nothing from nowhere").await.is_err());
        for Statement { name, sql } in statements {
            if let Err(error) = db.prepare(&sql).await {
                panic!("{name}: {error}\n{sql}");
            }
        }
    }

    async fn every_query_that_matters_uses_its_index_on_full_tables(db) {
        populate(db).await;
        if db.engine == Engine::Sqlite {
            // SQLite has no statistics unless somebody asks for them.
            check_plans(db).await;
        }
        db.execute("analyze").await.unwrap();
        check_plans(db).await;
    }
}

/// A number's UUID, as SQL.
fn uuid(db: &Database, head: &str, number: &str) -> String {
    db.either(
        format!("printf('{head}-0000-7000-8000-%012x', {number})"),
        format!("('{head}-0000-7000-8000-' || lpad(to_hex({number}), 12, '0'))::uuid"),
    )
}

/// So many seconds after the beginning, as SQL.
fn time(db: &Database, seconds: &str) -> String {
    db.either(
        format!("({BEGIN} + ({seconds})) * 1000000"),
        format!("to_timestamp({BEGIN} + ({seconds}))"),
    )
}

/// One row for each number `i`, as SQL.
fn numbers(db: &Database, count: i64) -> String {
    db.either(
        format!("(with recursive n (i) as (select 1 union all select i + 1 from n where i < {count}) select i from n) n"),
        format!("generate_series(1, {count}) n (i)"),
    )
}

/// Events of a few tenants, a fifth of them of one busy contact and half of the others waiting for
/// contacts that are away; and a long history of everything else.
async fn populate(db: &Database) {
    let (event, contact) = (
        uuid(db, "e0000000", "i"),
        uuid(db, "c0000000", "case i % 5 when 0 then 0 else i % 400 end"),
    );
    let session = uuid(db, "50000000", "i % 50");
    let (at, later) = (time(db, "i"), time(db, "i + 3600"));
    let (no, yes) = (db.flag(false), db.flag(true));
    let blob = db.either("x'00'", "'\\x00'::bytea");
    let tenant = "case when i % 10 < 8 then 'acme' else 'tenant' || (i % 3) end";
    for (into, values, count) in [
        (
            "contact_events (tenant_id, id, contact_id, session_id, event_type, category, priority, source,
                             title, is_realtime, visible_to_client, expires_at, occurred_at, created_at)",
            format!(
                "{tenant}, {event}, {contact}, case when i % 3 = 0 then {session} end,
                 case i % 4 when 0 then 'note_added' when 1 then 'tag_added' when 2 then 'tag_removed' else 'status_changed' end,
                 case i % 4 when 0 then 'note' when 1 then 'tag' when 2 then 'pipeline' else 'status' end,
                 case (i / 2) % 4 when 0 then 'low' when 1 then 'high' when 2 then 'urgent' else 'normal' end,
                 'system', 'a title', case when i % 5 > 0 and i % 2 = 1 then {yes} else {no} end,
                 case i % 7 when 0 then {yes} else {no} end,
                 case when i % 3 = 0 then {later} end, {at}, {at}"
            ),
            EVENTS,
        ),
        (
            "event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)",
            format!("'acme', {event}, 'agent', 'delivered', {at}"),
            EVENTS,
        ),
        (
            "event_reads (tenant_id, event_id, reader, read_at)",
            format!("'acme', {event}, 'somebody', {at}"),
            EVENTS,
        ),
        (
            "idempotency_keys (tenant_id, key, body_hash, event_id, created_at)",
            format!("{tenant}, 'key' || i, {blob}, {event}, {at}"),
            EVENTS,
        ),
        (
            "job_runs (id, job, scheduled_at, trigger, attempt, daemon, state)",
            format!(
                "{event}, 'job' || (i % 5), {at}, 'schedule', 1, {},
                 case {RUNS} - i when 0 then 'running' when 1 then 'queued' else 'succeeded' end",
                uuid(db, "d0000000", "1")
            ),
            RUNS,
        ),
        (
            "holds (tenant_id, id, contact_id, category, reason, placed_by, placed_at)",
            format!(
                "{tenant}, {event}, case when i % 1000 > 0 then {} end,
                 case i % 1000 when 0 then 'pipeline' end, 'a reason', 'somebody', {at}",
                uuid(db, "c0000000", "i % 4000")
            ),
            HOLDS,
        ),
        (
            "erasures (tenant_id, id, contact_id, requested_by, requested_at, up_to, state, finished_at)",
            format!(
                "'acme', {event}, {contact}, 'dpo', {at}, {at}, case {HOLDS} - i when 0 then 'running' else 'done' end,
                 case when {HOLDS} - i > 0 then {at} end"
            ),
            HOLDS,
        ),
        (
            "holds (tenant_id, id, reason, placed_by, placed_at)",
            format!("'held' || i, {event}, 'a reason', 'somebody', {at}"),
            49,
        ),
        (
            "deletion_ledger (tenant_id, run_id, rule, cause, deleted, first_at, last_at)",
            format!("{tenant}, {event}, 'default', 'expired', 1, {at}, {at}"),
            RUNS,
        ),
        (
            "exports (tenant_id, id, contact_id, format, audience, timezone, attach, requested_by, request_key,
                      created_at, through_seq, state, next_attempt_at, rendered_at, expires_at, file_name)",
            format!(
                "{tenant}, {event}, {contact}, 'csv', 'client', 'UTC', {yes}, 'somebody', 'run' || i, {at}, i,
                 case {EXPORTS} - i when 0 then 'running' when 1 then 'queued' else 'done' end, {at},
                 case when {EXPORTS} - i > 1 then {at} end, {later},
                 case when {EXPORTS} - i between 2 and 500 then 'a file' end"
            ),
            EXPORTS,
        ),
        (
            "export_deliveries (tenant_id, export_id, recipient, position, message_id, state, next_attempt_at)",
            format!(
                "{tenant}, {event}, 'a@example.com', 0, 'id' || i,
                 case {EXPORTS} - i when 0 then 'pending' when 1 then 'deferred' else 'sent' end, {at}"
            ),
            EXPORTS,
        ),
    ] {
        let from = numbers(db, count);
        db.execute(&format!("insert into {into} select {values} from {from}")).await.unwrap();
    }
}

/// What sorts the first rows of each contact together, a page of each.
const MERGES: [&str; 1] = ["events::find_undelivered_realtime"];

/// The plans of an engine's statements.
struct Plans<'a> {
    db: &'a Database,
    statements: Vec<Statement>,
    faults: Vec<String>,
}

impl Plans<'_> {
    /// Notes a fault where a function's statement, of which it has one or several, is not answered
    /// by `index` alone.
    async fn check(&mut self, function: &str, number: usize, parameters: &[String], index: &str) {
        let mut own = self
            .statements
            .iter()
            .filter(|statement| statement.name == function);
        let statement = own
            .nth(number)
            .unwrap_or_else(|| panic!("{function} has no statement {number}"));
        // A statement may need fewer than the others of its function.
        let needed = (1..=parameters.len())
            .rev()
            .find(|n| statement.sql.contains(&format!("${n}")));
        let parameters = &parameters[..needed.unwrap_or(0)];
        let plan = self.db.plan(&statement.sql, parameters).await;
        let fault = if plan.contains(index) {
            waste(self.db.engine, &plan, index, MERGES.contains(&function))
        } else {
            Some(format!("does not use {index}"))
        };
        self.faults
            .extend(fault.map(|fault| format!("{function}, statement {number}: {fault}\n{plan}")));
    }
}

/// Whether a plan reads a table or all rows of a tenant from end to end, or sorts more than a page.
fn waste(engine: Engine, plan: &str, index: &str, merges: bool) -> Option<String> {
    // Nobody has more than a few holds of a whole tenant or of categories, or pauses; the gate is one row.
    let is_small = |line: &str| {
        [
            "holds_tenant",
            "holds_category",
            "retention_gate",
            "job_controls",
        ]
        .iter()
        .any(|name| line.contains(name))
    };
    let is_wasteful = |line: &&&str| match engine {
        Engine::Sqlite => {
            // What is not a table: a set that was passed in, a step of a recursion, a subquery.
            let harmless = [
                "json_each",
                "c",
                "j",
                "t",
                "o",
                "s",
                "asked",
                "tenants",
                "contacts",
                "(subquery",
                "CONSTANT",
                // A row for each job that is paused.
                "job_controls",
            ];
            let scanned = line
                .strip_prefix("SCAN ")
                .and_then(|rest| rest.split([' ', '-']).next());
            // An index that holds only what is asked for may be read whole.
            scanned.is_some_and(|table| !harmless.contains(&table) && !line.ends_with(index))
                || (line.ends_with("(tenant_id=?)") && !is_small(line))
                || (line.starts_with("USE TEMP B-TREE") && line.ends_with("ORDER BY") && !merges)
        }
        Engine::Postgres => {
            let rows = line
                .split_once("rows=")
                .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
            let sorts = line.starts_with("Sort  (") || line.starts_with("->  Sort  (");
            let is_whole_tenant =
                line.starts_with("Index Cond: (tenant_id =") && !line.contains(" AND ");
            (line.contains("Seq Scan on") && !is_small(line))
                || is_whole_tenant
                || (sorts && rows.is_none_or(|rows: u64| rows > 1001))
        }
    };
    let lines: Vec<&str> = plan.lines().map(str::trim).collect();
    // A condition stands below the line that names its index.
    (lines.iter().enumerate())
        .filter(|(index, line)| {
            let above = index.checked_sub(1).map_or("", |above| lines[above]);
            !(line.starts_with("Index Cond") && is_small(above))
        })
        .map(|(_, line)| line)
        .find(is_wasteful)
        .map(|line| format!("wastes time by {line}"))
}

#[expect(
    clippy::too_many_lines,
    reason = "a list of queries, each with what it is asked and the index that answers"
)]
async fn check_plans(db: &Database) {
    let mut plans = Plans {
        db,
        statements: statements::of(db.engine),
        faults: Vec::new(),
    };
    let at = |seconds: i64| db.at(instant(seconds));
    let text = |text: &str| format!("'{text}'");
    let set = |list: &[&str]| {
        let json = serde_json::to_string(list).unwrap();
        db.either(format!("'{json}'"), format!("'{{{}}}'", list.join(",")))
    };
    let number = |number: i64| number.to_string();
    let null = || "null".to_owned();
    let id = |head: &str, number: i64| format!("{head}-0000-7000-8000-{number:012x}");
    let (busy, absent, other) = (id("c0000000", 0), id("c0000000", 3), id("c0000000", 5));
    let (first, last) = (id("00000000", 0), id("ffffffff", 0));
    let acme = || text("acme");
    let (end, deep) = (EVENTS + 10, 600);

    // The first page, and one deep down: by key, never by counting.
    for from in [end, deep] {
        let page = [
            acme(),
            text(&busy),
            at(from),
            text(&last),
            at(0),
            null(),
            null(),
            text("agent"),
            at(end),
            number(51),
            number(0),
        ];
        plans
            .check(
                "events::find_by_contact_visible_to",
                0,
                &page,
                "contact_events_timeline",
            )
            .await;
        let mut filtered = page;
        filtered[5] = text("note");
        filtered[6] = text("note_added");
        plans
            .check(
                "events::find_by_contact_visible_to",
                0,
                &filtered,
                "contact_events_timeline",
            )
            .await;
    }
    let count = [
        acme(),
        text(&busy),
        at(0),
        at(end),
        null(),
        null(),
        text("agent"),
        at(end),
        number(10_001),
    ];
    plans
        .check(
            "events::count_by_contact",
            0,
            &count,
            "contact_events_timeline",
        )
        .await;
    for from in [0, deep] {
        let page = [
            acme(),
            text(&id("50000000", 7)),
            at(from),
            text(&first),
            null(),
            text("agent"),
            at(end),
            number(201),
            number(0),
        ];
        plans
            .check(
                "events::find_by_session",
                0,
                &page,
                "contact_events_session",
            )
            .await;
        let mut page = page;
        page[4] = set(&[&busy, &absent]);
        plans
            .check(
                "events::find_by_session",
                0,
                &page,
                "contact_events_session",
            )
            .await;
    }
    for (function, value, index) in [
        (
            "events::find_by_type_since",
            "note_added",
            "contact_events_type",
        ),
        (
            "events::find_by_category_since",
            "note",
            "contact_events_category",
        ),
    ] {
        for from in [end, deep] {
            let page = [
                acme(),
                text(value),
                at(from),
                text(&last),
                at(100),
                text("agent"),
                at(end),
                number(51),
                number(0),
            ];
            plans.check(function, 0, &page, index).await;
        }
    }
    let of_contact = [
        acme(),
        text(&absent),
        at(0),
        text(&first),
        at(100),
        text("agent"),
        number(51),
        number(0),
    ];
    plans
        .check(
            "events::find_undelivered_for_contact",
            0,
            &of_contact,
            "event_outbox_oldest",
        )
        .await;
    for rank in 0..4 {
        let backlog = [
            acme(),
            set(&[&absent, &other]),
            number(rank),
            number(100),
            at(100),
            number(256),
        ];
        plans
            .check(
                "events::find_undelivered_realtime",
                0,
                &backlog,
                "event_outbox_backlog",
            )
            .await;
    }
    // The tail, of which only the end is new.
    match db.engine {
        Engine::Sqlite => {
            let mark = db.int("select max(added) from event_outbox").await;
            plans
                .check(
                    "events::tail",
                    0,
                    &[number(mark - 10)],
                    "INTEGER PRIMARY KEY (rowid>?)",
                )
                .await;
        }
        Engine::Postgres => {
            let mark = db
                .texts("select pg_current_snapshot()::text")
                .await
                .pop()
                .flatten()
                .unwrap();
            let xid = mark.split(':').next().unwrap().to_owned();
            plans
                .check("events::tail", 0, &[text(&mark)], "event_outbox_tail")
                .await;
            plans
                .check(
                    "events::tail",
                    1,
                    &[text(&mark), text(&xid), number(5)],
                    "event_outbox_tail",
                )
                .await;
        }
    }
    let events: Vec<String> = (1..=100).map(|n| id("e0000000", n * 2 + 1)).collect();
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    let marked = [
        acme(),
        set(&events),
        text("agent"),
        null(),
        at(100),
        text("somebody"),
    ];
    plans
        .check(
            "events::mark_delivered",
            0,
            &marked,
            db.either("event_outbox_event", "event_outbox_pkey"),
        )
        .await;
    let read = [
        acme(),
        set(&events),
        null(),
        text("somebody"),
        text("agent"),
        at(end),
        at(end),
    ];
    let by_id = db.either("sqlite_autoindex_contact_events_1", "contact_events_pkey");
    plans.check("events::mark_read", 0, &read, by_id).await;
    if db.engine == Engine::Sqlite {
        plans.check("events::mark_read", 1, &read, by_id).await;
    }
    plans
        .check("events::find_by_ids", 0, &[acme(), set(&events)], by_id)
        .await;
    if db.engine == Engine::Postgres {
        let entries = [set(&vec!["acme"; events.len()]), set(&events)];
        plans
            .check("events::find_entries", 0, &entries, "event_outbox_pkey")
            .await;
    }

    for (statement, table) in ["event_outbox", "event_deliveries", "event_reads"]
        .into_iter()
        .enumerate()
    {
        let index = match (db.engine, table) {
            (Engine::Postgres, table) => format!("{table}_pkey"),
            (Engine::Sqlite, "event_outbox") => "event_outbox_event".to_owned(),
            (Engine::Sqlite, _) => "PRIMARY KEY".to_owned(),
        };
        plans
            .check("events::forget", statement, &[acme(), set(&events)], &index)
            .await;
    }

    let erase = [
        acme(),
        text(&other),
        at(40_000),
        number(100),
        text(&id("e0000000", 1)),
        number(1),
    ];
    let (function, begin) = db.either(("erasure::delete_events", 0), ("erasure::erase_some", 1));
    let timeline = "contact_events_timeline";
    plans.check(function, begin, &erase, timeline).await;
    if db.engine == Engine::Sqlite {
        let keys = [acme(), set(&events)];
        plans
            .check(function, 2, &keys, "idempotency_keys_event")
            .await;
    }
    plans
        .check(
            "erasure::erasures",
            0,
            &[at(HOLDS - 5)],
            "erasures_finished",
        )
        .await;
    let left = [at(HOLDS)];
    plans
        .check("erasure::unfinished_erasures", 0, &left, "erasures_running")
        .await;
    let survey = [acme(), text(&other)];
    plans.check("erasure::survey", 0, &survey, timeline).await;

    // The worker's looks, all of them across tenants or a tenant's whole history.
    let statements = db.either(3, 1);
    for statement in 0..statements {
        plans
            .check(
                "events::expire_undelivered",
                statement,
                &[at(4000), number(500)],
                "event_outbox_expiry",
            )
            .await;
    }
    plans
        .check("events::expiring_tenants", 0, &[], "contact_events_expiry")
        .await;
    let purge = [acme(), at(40_000), number(100), null(), null()];
    plans
        .check(
            "events::find_expired_before",
            0,
            &purge,
            "contact_events_expiry",
        )
        .await;
    plans
        .check("retention::ageing_tenants", 0, &[], "contact_events_age")
        .await;
    check_sweeps(&mut plans).await;
    plans
        .check(
            "retention::usual_deletions",
            0,
            &[text("job1"), number(10)],
            "job_runs_history",
        )
        .await;
    plans
        .check(
            "retention::deletions",
            0,
            &[text(&first)],
            "deletion_ledger_run",
        )
        .await;
    plans
        .check(
            "events::delete_idempotency_before",
            0,
            &purge,
            "idempotency_keys_age",
        )
        .await;
    plans
        .check(
            "events::idempotent_tenants",
            0,
            &[],
            db.either("idempotency_keys_age", "idempotency_keys_"),
        )
        .await;

    let claim = [text(&first), at(end), at(end + 60)];
    let when = [at(end), number(100)];
    match db.engine {
        Engine::Sqlite => {
            plans
                .check("exports::claim_render", 0, &when, "exports_queue")
                .await;
            plans
                .check("exports::claim_render", 1, &claim, "exports_queue")
                .await;
            plans
                .check(
                    "exports::claim_delivery",
                    0,
                    &when,
                    "export_deliveries_queue",
                )
                .await;
            plans
                .check(
                    "exports::claim_delivery",
                    1,
                    &when,
                    "export_deliveries_queue",
                )
                .await;
        }
        Engine::Postgres => {
            plans
                .check("exports::claim_render", 0, &when[..1], "exports_queue")
                .await;
            plans
                .check("exports::claim_render", 1, &claim, "exports_queue")
                .await;
            plans
                .check(
                    "exports::claim_delivery",
                    0,
                    &when[..1],
                    "export_deliveries_queue",
                )
                .await;
            plans
                .check(
                    "exports::claim_delivery",
                    1,
                    &claim,
                    "export_deliveries_queue",
                )
                .await;
        }
    }
    let due = [at(end), number(100)];
    plans
        .check("exports::old_files", 0, &due, "exports_expiry")
        .await;
    plans.check("ledger::prune", 0, &due, "job_runs_age").await;
    let exported = [
        acme(),
        text(&busy),
        at(deep),
        text(&first),
        at(end),
        set(&[]),
        text("client"),
        at(end),
        number(EVENTS),
        number(1001),
    ];
    plans
        .check("exports::rows", 0, &exported, "contact_events_timeline")
        .await;
    let counted = [
        acme(),
        text(&busy),
        at(deep),
        at(end),
        set(&[]),
        text("client"),
        at(end),
        number(EVENTS),
    ];
    plans
        .check(
            "exports::count_rows",
            0,
            &counted,
            "contact_events_timeline",
        )
        .await;
    let active = [acme(), at(EVENTS - 100), null(), text(&absent), number(100)];
    plans
        .check(
            "exports::active_contacts",
            0,
            &active,
            "contact_events_timeline",
        )
        .await;
    let listed = [
        acme(),
        text(&id("e0000000", 9000)),
        number(51),
        set(&["client", "agent", "audit"]),
    ];
    // Behind the `begin` of its snapshot, where that is written out.
    plans
        .check(
            "exports::list",
            db.either(0, 1),
            &listed,
            db.either("sqlite_autoindex_exports_1", "exports_pkey"),
        )
        .await;

    let history = [text("job1"), text(&id("e0000000", 9000)), number(51)];
    plans
        .check("ledger::runs", 0, &history, "job_runs_history")
        .await;
    plans
        .check(
            "ledger::last_runs",
            0,
            &[set(&["job1", "job2"])],
            "job_runs_history",
        )
        .await;
    let daemon = text(&id("d0000000", 1));
    let names = set(&["job1", "job2"]);
    let lease = db.either(at(end), number(5));
    let queued = [names.clone(), daemon.clone(), at(end), lease.clone()];
    plans
        .check("ledger::claim_queued", 0, &queued, "job_runs_queue")
        .await;
    // A job has at most one run at work: the index of those is as short as the list of jobs.
    let working = db.either("job_runs_running", "job_runs_place");
    let held = [daemon.clone(), lease];
    let held = db.either(&held[..1], &held[..]);
    plans.check("ledger::renew", 0, held, working).await;
    plans
        .check("ledger::running", 0, std::slice::from_ref(&daemon), working)
        .await;
    let glance = [names.clone(), daemon.clone()];
    let glance = db.either(&glance[..1], &glance[..]);
    plans
        .check("ledger::glance", 0, glance, "job_runs_queue")
        .await;
    if db.engine == Engine::Postgres {
        plans
            .check("ledger::take_over", 0, &[daemon, at(end)], "job_runs_place")
            .await;
    }
    plans
        .check("ledger::last_times", 0, &[names], "job_runs_claim")
        .await;
    let span = [text("job1"), at(deep), at(end), number(1000)];
    plans
        .check("ledger::settled", 0, &span, "job_runs_claim")
        .await;

    if db.engine == Engine::Sqlite {
        // Its plans hardly depend on the parameters, so that every statement can be judged.
        for Statement { name, sql } in &plans.statements {
            let plan = db.plan(sql, &[]).await;
            if let Some(fault) = waste(db.engine, &plan, "", true) {
                plans.faults.push(format!("{name}: {fault}\n{plan}"));
            }
        }
    }
    assert!(plans.faults.is_empty(), "{}", plans.faults.join("\n\n"));
}

/// A batch is a range of its index whatever the rule, at the beginning of a sweep and behind half of
/// it, with many holds.
async fn check_sweeps(plans: &mut Plans<'_>) {
    let db = plans.db;
    let at = |seconds: i64| db.at(instant(seconds));
    let (note, null) = ("'note'".to_owned(), "null".to_owned());
    let stronger = |pairs: &str, categories: &str, types: &str| match db.engine {
        Engine::Sqlite => vec![pairs.to_owned()],
        Engine::Postgres => vec![categories.to_owned(), types.to_owned()],
    };
    let none = stronger("'[]'", "'{}'::text[]", "'{}'::text[]");
    let some = stronger(
        r#"'[[null, "tag_added"], ["status", null]]'"#,
        "'{null,status}'::text[]",
        "'{tag_added,null}'::text[]",
    );
    let statements: Vec<usize> = (plans.statements.iter().enumerate())
        .filter(|(_, statement)| {
            statement.sql.contains("expires_at < $2") || statement.sql.contains("w.created_at < $2")
        })
        .filter(|(_, statement)| statement.name.starts_with("retention::"))
        .map(|(index, _)| index)
        .collect();
    assert_eq!(statements.len(), db.either(4, 5));
    for index in statements {
        let sql = plans.statements[index].sql.clone();
        let by_age = sql.contains("w.created_at < $2");
        let name = if by_age {
            "contact_events_age"
        } else {
            "contact_events_expiry"
        };
        // The shorter one is for what has neither rules nor holds.
        let is_plain = !sql.contains("contact_events w");
        for (category, except) in [(&null, &none), (&note, &some)] {
            if is_plain && category == &note {
                continue;
            }
            for from in [0, 20_000] {
                // Of a count of many, a look at all rows would be the better plan.
                let is_count = sql.contains(" as due");
                let before = at(match (is_count, by_age) {
                    (false, _) => 40_000,
                    (true, false) => 4_000,
                    (true, true) => 400,
                });
                let mut parameters =
                    vec!["'acme'".to_owned(), before, category.clone(), null.clone()];
                parameters.extend(except.iter().cloned());
                if is_count {
                    parameters.push("100".to_owned());
                } else {
                    parameters.extend([at(from), "7".to_owned()]);
                    if db.engine == Engine::Postgres {
                        parameters.extend([null.clone(), null.clone(), "1".to_owned()]);
                    }
                    parameters.push("100".to_owned());
                    if db.engine == Engine::Postgres {
                        let run = "'e0000000-0000-7000-8000-000000000001'".to_owned();
                        let (rule, cause) = ("'default'".to_owned(), "'expired'".to_owned());
                        parameters.extend([run, rule, cause, at(0)]);
                    }
                }
                let plan = db.plan(&sql, &parameters).await;
                let fault = if plan.contains(name) {
                    waste(db.engine, &plan, name, false)
                } else {
                    Some(format!("does not use {name}"))
                };
                let sweep = format!("a sweep behind {from}");
                plans
                    .faults
                    .extend(fault.map(|fault| format!("{sweep}: {fault}\n{sql}\n{plan}")));
            }
        }
    }
}

fn instant(seconds: i64) -> DateTime<Utc> {
    Utc.timestamp_opt(BEGIN + seconds, 0).unwrap()
}
