//! `token`, `jobs`, `events`, `purge`, `migrate`; options, streams and closed pipes.

use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use chrono::TimeDelta;
use serde_json::{Value, json};
use timelined::domain::{Clock as _, SystemClock};

use crate::support::builders::{Record as _, acme, contact, event, event_of, globex, plain};
use crate::support::daemon::{Settings, TestDaemon, agent, client, eventually, service};
use crate::{CONTACT, bounded, on, run};

// ---- usage ----

#[test]
fn the_help_says_what_there_is() {
    let help = run(&Settings::new(), &["--help"]).done();
    insta::assert_snapshot!(help);
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table, one case after the other")]
fn wrong_arguments_end_with_2_and_say_what_is_right() {
    let settings = Settings::new();
    let add =
        |more: &[&'static str]| [&["events", "add", CONTACT, "--tenant", "acme"], more].concat();
    let export = |more: &[&'static str]| [&["export", CONTACT, "--tenant", "acme"], more].concat();
    let cases: &[(Vec<&str>, &str)] = &[
        (vec!["--bogus"], "unexpected argument '--bogus'"),
        (vec!["serve"], "unrecognized subcommand 'serve'"),
        (vec!["jobs"], "Usage: timelined jobs"),
        (
            vec!["jobs", "runs", "purge-expired", "--limit", "0"],
            "0 is not in 1..=200",
        ),
        (vec!["token", "--tenant", "acme"], "--role <ROLE>"),
        (
            vec!["token", "--role", "king", "--tenant", "acme"],
            "\"king\" is not a role; allowed: client agent service operator",
        ),
        (
            vec!["token", "--role", "service"],
            "timelined: --tenant is required for this role",
        ),
        (
            vec!["token", "--role", "agent"],
            "timelined: --tenant is required for this role",
        ),
        (
            vec!["token", "--role", "client", "--tenant", "acme"],
            "timelined: --role client needs --contact",
        ),
        (
            vec!["token", "--role", "client", "--contact", CONTACT],
            "timelined: --tenant is required for this role",
        ),
        (
            vec![
                "token",
                "--role",
                "agent",
                "--tenant",
                "acme",
                "--contact",
                CONTACT,
            ],
            "timelined: --contact is for --role client",
        ),
        (
            vec!["token", "--role", "operator", "--tenant", "acme"],
            "timelined: an operator belongs to no tenant; leave --tenant out",
        ),
        (vec!["token", "--role", "operator", "--ttl", "5"], "--ttl"),
        (
            vec!["token", "--role", "operator", "--ttl", "0s"],
            "must be between 1s and 3650d",
        ),
        (vec!["token", "--role", "agent", "--tenant", ""], "--tenant"),
        (
            vec!["events", "add", "7", "--tenant", "acme"],
            "\"7\" is not a UUID such as",
        ),
        (add(&[]), "timelined: the event is not valid: /event_type"),
        (
            add(&["--type", "Note", "--category", "note"]),
            "/event_type: \"Note\" is not a type of an event; allowed:",
        ),
        (
            add(&["--type", "n", "--category", "nte"]),
            "/category: \"nte\" is not a category; allowed: general",
        ),
        (
            add(&["--type", "n", "--category", "note", "--payload", "{"]),
            "timelined: --payload is not JSON",
        ),
        (
            add(&["--body", "[]"]),
            "timelined: --body must be a JSON object",
        ),
        (
            add(&[
                "--type",
                "n",
                "--category",
                "note",
                "--expires-at",
                "2020-01-01T00:00:00Z",
            ]),
            "/expires_at",
        ),
        (vec!["events", "list", CONTACT], "--tenant <TENANT>"),
        (vec!["events", "watch", CONTACT], "--tenant <TENANT>"),
        (export(&[]), "<--output <FILE>|--to <ADDRESS>>"),
        (
            export(&["--output", "f", "--to", "a@example.com"]),
            "cannot be used with",
        ),
        (
            export(&["--output", "f", "--format", "doc"]),
            "\"doc\" is not a format of an export; allowed: csv pdf",
        ),
        (export(&["--to", "nobody"]), "--to <ADDRESS>"),
        (
            export(&["--output", "f", "--timezone", "Mars"]),
            "--timezone",
        ),
        (export(&["--output", "f", "--no-attach"]), "--to"),
        (
            vec!["demo", "--config", "timelined.toml"],
            "timelined: demo has a configuration of its own; leave --config out",
        ),
    ];
    for (arguments, said) in cases {
        run(&settings, arguments).failed_saying(2, said);
    }
}

#[test]
fn what_is_not_there_ends_with_3() {
    let settings = Settings::new();
    for command in ["run", "runs"] {
        run(&settings, &["jobs", command, "prge-expired"]).failed(
            3,
            "timelined: there is no job \"prge-expired\"; there are: realtime-delivery, purge-expired",
        );
    }
}

#[test]
fn global_options_stand_before_and_after_the_command() {
    let settings = Settings::new().config("[log]\nlevel = \"debug\"\n");
    let file = settings.state().with_file_name("other.toml");
    std::fs::write(&file, "jobs = []\n").unwrap();
    let file = file.to_str().unwrap();
    let plain = Settings::new();
    for arguments in [
        ["--config", file, "--json", "jobs", "list"],
        ["jobs", "--json", "--config", file, "list"],
        ["jobs", "list", "--config", file, "--json"],
    ] {
        assert_eq!(run(&plain, &arguments).json(), json!({ "jobs": [] }));
    }
}

// ---- streams ----

#[test]
fn data_goes_to_standard_output_and_talk_to_standard_error() {
    let settings = Settings::new();
    let queued = run(&settings, &["jobs", "run", "purge-expired"]);
    assert_eq!(
        queued.err,
        "queued; a running daemon takes it within a second (see: timelined jobs runs)\n"
    );
    assert!(uuid::Uuid::parse_str(queued.done().trim_end()).is_ok());

    let queued = run(&settings, &["jobs", "run", "purge-expired", "--json"]);
    assert_eq!(queued.err, "");
    assert!(queued.json()["run_id"].is_string());

    let nothing = run(&settings, &["events", "list", CONTACT, "--tenant", "acme"]);
    assert_eq!((nothing.err.as_str(), nothing.out.as_str()), ("", ""));
}

#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let settings = Settings::new();
    let payload = json!({ "fat": "x".repeat(60_000) }).to_string();
    for _ in 0..3 {
        let add = [
            "events",
            "add",
            CONTACT,
            "--tenant",
            "acme",
            "--type",
            "note_added",
            "--category",
            "note",
            "--payload",
            &payload,
        ];
        run(&settings, &add).done();
    }
    for arguments in [
        &["--help"][..],
        &["config", "show"],
        &["token", "--role", "operator"],
        &["jobs", "list"],
        &["events", "list", CONTACT, "--tenant", "acme", "--json"],
        &[
            "export",
            CONTACT,
            "--tenant",
            "acme",
            "--audience",
            "agent",
            "--output",
            "-",
        ],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        // Gone before the first byte, as `head` is after its lines.
        drop(reader);
        let mut command = bounded(&settings.command(arguments));
        let output = command
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
            .wait_with_output()
            .unwrap();
        drop(command);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}");
        assert!(
            !said.contains("ipe") && !said.contains("panicked"),
            "{arguments:?}: {said}"
        );
    }
}

#[test]
fn a_standard_output_that_is_full_is_a_failure() {
    let settings = Settings::new();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = settings.command(&["config", "show"]);
    let output = command.stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("timelined: No space left on device")
    );
}

// ---- token ----

fn claims(token: &str) -> Value {
    let part = token.trim_end().split('.').nth(1).unwrap();
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(part)
        .unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test]
async fn a_token_of_each_role_is_one_that_the_daemon_takes() {
    let daemon = TestDaemon::start();
    let token = |arguments: &[&str]| {
        run(daemon.settings(), &[&["token"], arguments].concat())
            .done()
            .trim_end()
            .to_owned()
    };
    let events = format!("/api/v1/contacts/{CONTACT}/events");
    for (arguments, may_read, may_see_jobs) in [
        (&["--role", "service", "--tenant", "acme"][..], 200, 403),
        (&["--role", "agent", "--tenant", "acme"], 200, 403),
        (
            &["--role", "client", "--tenant", "acme", "--contact", CONTACT],
            200,
            403,
        ),
        (&["--role", "operator"], 403, 200),
    ] {
        let token = token(arguments);
        let (status, _) = daemon.get(&events, &token).await;
        assert_eq!(status, may_read, "{arguments:?}");
        let (status, _) = daemon.get("/api/v1/jobs", &token).await;
        assert_eq!(status, may_see_jobs, "{arguments:?}");
    }
    let two = token(&[
        "--role",
        "client",
        "--tenant",
        "acme",
        "--sub",
        "ana",
        "--ttl",
        "2d",
        "--contact",
        CONTACT,
        "--contact",
        "0190b5f0-7c1e-7d3a-8f00-000000000002",
    ]);
    let claims = claims(&two);
    assert_eq!(
        (&claims["sub"], &claims["tid"], &claims["role"]),
        (&json!("ana"), &json!("acme"), &json!("client"))
    );
    assert_eq!(claims["contacts"].as_array().unwrap().len(), 2);
    assert_eq!(
        claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(),
        2 * 86_400
    );
    let shown = run(
        daemon.settings(),
        &["token", "--role", "operator", "--json"],
    )
    .json();
    assert!(
        shown["token"].is_string() && shown["expires_at"].is_string(),
        "{shown}"
    );
}

#[tokio::test]
async fn without_a_configured_key_the_first_command_makes_one_that_the_daemon_shares() {
    let settings = Settings::new().without("TIMELINED__AUTH__HS256_KEY");
    let token = run(&settings, &["token", "--role", "operator"]).done();
    let daemon = settings.start();
    let (status, _) = daemon.get("/api/v1/jobs", token.trim_end()).await;
    assert_eq!(status, 200);
}

#[test]
fn where_tokens_are_only_checked_none_can_be_made() {
    let settings = Settings::new()
        .without("TIMELINED__AUTH__HS256_KEY")
        .env("TIMELINED__AUTH__ALGORITHM", "EdDSA")
        .env("TIMELINED__AUTH__PUBLIC_KEY", "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n");
    let ran = run(&settings, &["token", "--role", "operator"]);
    ran.failed_saying(1, "HS256");
}

// ---- events ----

on_both_engines! {
    async fn what_parsers_stumble_over_is_passed_on_or_passed_over(db) {
        let settings = on(db).await;
        let deep = format!("{{\"deep\":{}{}}}", "[".repeat(200), "]".repeat(200));
        for (title, payload) in [("number", r#"{"a":1e999}"#), ("deep", &deep)] {
            let flag = db.flag(true);
            db.execute(&format!(
                "insert into contact_events (tenant_id, contact_id, event_type, category, source, title, payload, is_realtime)
                 values ('acme', '{CONTACT}', 'note_added', 'note', 'agent', '{title}', '{payload}', {flag})"
            ))
            .await
            .unwrap();
        }
        let listed = run(&settings, &["events", "list", CONTACT, "--tenant", "acme", "--json"]).done();
        assert!(listed.contains(r#""payload":{"a":1e999}"#), "{listed}");
        assert!(!listed.contains("deep"), "{listed}");

        let daemon = settings.start();
        let watched = run(
            &settings,
            &["events", "watch", CONTACT, "--tenant", "acme", "--address", &daemon.address, "--count", "1", "--json"],
        )
        .done();
        assert!(watched.contains(r#""payload":{"a":1e999}"#), "{watched}");
    }

    async fn an_event_that_is_added_is_listed(db) {
        let settings = on(db).await;
        let add = |more: &[&str]| run(&settings, &[&["events", "add", CONTACT, "--tenant", "acme"], more].concat());
        let id = add(&["--type", "note_added", "--category", "note", "--title", "\u{1b}[31mRed", "--idempotency-key", "k"]).done();
        let again = add(&["--type", "note_added", "--category", "note", "--title", "\u{1b}[31mRed", "--idempotency-key", "k"]);
        assert_eq!(again.done(), id, "a repeat records nothing");
        let conflict = add(&["--type", "note_added", "--category", "note", "--title", "Other", "--idempotency-key", "k"]);
        assert_eq!(conflict.code, 1, "{conflict:?}");
        let body = json!({ "event_type": "tag_added", "category": "tag", "source": "agent", "payload": { "tag": "vip" } });
        let shown = add(&["--body", &body.to_string(), "--priority", "high", "--visible-to-client", "--json"]).json();
        assert_eq!((&shown["priority"], &shown["source"], &shown["visible_to_client"]), (&json!("high"), &json!("agent"), &json!(true)));
        assert_eq!(shown["tenant_id"], "acme");

        let list = |more: &[&str]| run(&settings, &[&["events", "list", CONTACT], more].concat()).done();
        let all = list(&["--tenant", "acme"]);
        assert_eq!(all.lines().count(), 2, "{all}");
        assert!(all.lines().nth(1).unwrap().ends_with("[31mRed") && !all.contains('\u{1b}'), "it must not steer the terminal: {all}");
        let clients: Value = serde_json::from_str(&list(&["--tenant", "acme", "--audience", "client", "--json"])).unwrap();
        assert_eq!(clients["events"], json!([shown]));
        assert_eq!(list(&["--tenant", "acme", "--category", "note"]).lines().count(), 1);
        assert_eq!(list(&["--tenant", "acme", "--limit", "1"]).lines().count(), 1);
        assert_eq!(list(&["--tenant", "globex"]), "");
    }

    async fn the_purge_deletes_exactly_what_its_dry_run_names(db) {
        let settings = on(db).await;
        let now = SystemClock.now();
        let recorded = now - TimeDelta::days(30);
        let expiring = |number, ago: TimeDelta| event_of(contact(number)).expires_at(now - ago).recorded_at(recorded);
        let minute = TimeDelta::minutes(1);
        let week = TimeDelta::days(7);
        let stay = [
            expiring(1, week - minute),
            expiring(1, TimeDelta::zero()),
            event().expires_at(now + week).recorded_at(recorded),
            event().recorded_at(recorded),
        ];
        let go = [expiring(1, week + minute), expiring(2, TimeDelta::days(20)), expiring(3, week + week)];
        let ids = |events: &[timelined::domain::ContactEvent]| events.iter().map(|event| event.id.to_string()).collect::<Vec<_>>();
        let mut left = ids(&stay);
        left.sort();
        db.given(&acme(), stay.into_iter().chain(go)).await;
        let foreign = event().expires_at(now - TimeDelta::days(8)).record(&globex(), recorded).unwrap();
        db.events.save(&globex(), vec![plain(foreign)]).await.unwrap();

        let dry = run(&settings, &["purge", "--dry-run"]).done();
        assert!(dry.starts_with("acme: 3 events\nglobex: 1 events\nwould delete 4 events that expired before "), "{dry}");
        let json = run(&settings, &["purge", "--dry-run", "--json"]).json();
        assert_eq!(json["would_delete"], 4);
        assert_eq!(json["tenants"], json!([{ "tenant": "acme", "events": 3 }, { "tenant": "globex", "events": 1 }]));
        assert_eq!(db.count("contact_events").await, 8, "a dry run deletes nothing");

        assert_eq!(run(&settings, &["purge"]).done(), "deleted 4 events\n");
        let mut found: Vec<String> = db.texts("select cast(id as text) from contact_events").await.into_iter().flatten().collect();
        found.sort();
        assert_eq!(found, left);
        let again = run(&settings, &["purge", "--json"]).json();
        assert_eq!(again["deleted"], 0);

        let runs = run(&settings, &["jobs", "runs", "purge-expired", "--json"]).json();
        let runs = runs["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0]["id"], again["run_id"], "newest first");
        assert_eq!((&runs[1]["state"], &runs[1]["trigger"], &runs[1]["counts"]["deleted"]), (&json!("succeeded"), &json!("manual"), &json!(4)));
        let shown = run(&settings, &["jobs", "runs", "purge-expired", "--limit", "1"]).done();
        assert_eq!(shown.lines().count(), 2, "a head and a run: {shown}");
    }

    async fn a_dry_run_says_per_tenant_and_rule_what_goes_and_why(db) {
        let settings = on(db).await.config(
            "[[retention]]\ncategory = \"note\"\nolder_than = \"1d\"\nmax_age = \"20d\"\n",
        );
        let now = SystemClock.now();
        let recorded = now - TimeDelta::days(30);
        let expiring = |number| event_of(contact(number)).expires_at(now - TimeDelta::days(2)).recorded_at(recorded);
        db.given(&acme(), [expiring(1), expiring(2), event_of(contact(1)).recorded_at(recorded)]).await;
        let hold = run(&settings, &["holds", "add", "--tenant", "acme", "--contact", &contact(2).to_string(), "--reason", "a case"]).done();
        let hold = hold.trim_end();

        let dry = run(&settings, &["purge", "--dry-run"]).done();
        let lines: Vec<&str> = dry.lines().collect();
        assert!(lines[0].starts_with("acme: 1 events by category=note: expired before "), "{dry}");
        assert!(lines[0].ends_with("; holds keep 1 more"), "{dry}");
        assert!(lines[1].starts_with("acme: 1 events by category=note: without an expiry, recorded before "), "{dry}");
        assert_eq!(lines[2..], ["would delete 2 events; holds keep 1"], "{dry}");
        let json = run(&settings, &["purge", "--dry-run", "--json"]).json();
        assert_eq!((&json["would_delete"], &json["held"]), (&json!(2), &json!(1)));
        assert_eq!(json["tenants"], json!([{ "tenant": "acme", "events": 2 }]));
        assert_eq!((&json["rules"][1]["cause"], &json["rules"][1]["events"]), (&json!("aged"), &json!(1)));

        let listed = run(&settings, &["holds", "list"]).done();
        assert!(listed.starts_with(hold) && listed.ends_with("  a case\n"), "{listed}");
        assert_eq!(run(&settings, &["purge"]).done(), "deleted 2 events\n");
        run(&settings, &["holds", "release", hold, "--tenant", "globex"]).failed(3, &format!("timelined: the tenant globex has no hold {hold}; see: timelined holds list"));
        assert_eq!(run(&settings, &["holds", "release", hold, "--tenant", "acme"]).done(), "");
        assert_eq!(run(&settings, &["holds", "list", "--tenant", "acme"]).done(), "");
        assert_eq!(run(&settings, &["purge"]).done(), "deleted 1 events\n");
        let rules = db.texts("select rule from deletion_ledger order by cause, deleted").await;
        assert_eq!(rules.len(), 3, "two causes by one run, and one by the next");
    }

    async fn a_purge_of_far_more_than_usual_waits_until_it_is_confirmed(db) {
        let settings = on(db).await;
        let (now, long_ago) = (SystemClock.now(), SystemClock.now() - TimeDelta::days(30));
        let due = |count: u64| {
            let expired = move |_| event().expires_at(now - TimeDelta::days(20)).recorded_at(long_ago);
            (0..count).map(expired)
        };
        // Nothing to compare with.
        db.given(&acme(), due(1_001)).await;
        assert_eq!(run(&settings, &["purge"]).done(), "deleted 1001 events\n");
        // Much, but not ten times as much.
        db.given(&acme(), due(10_010)).await;
        assert_eq!(run(&settings, &["purge"]).done(), "deleted 10010 events\n");
        // What is usual is the lesser of the two.
        db.given(&acme(), due(10_011)).await;
        let said = "would delete more than 10010 events, while 1001 are usual, so it deleted nothing: \
                    look with `timelined purge --dry-run --job purge-expired`, and let it go on with \
                    `timelined purge --confirm --job purge-expired`";
        for _ in 0..2 {
            run(&settings, &["purge"]).failed_saying(1, said);
        }
        assert_eq!(db.count("contact_events").await, 10_011);
        let runs = run(&settings, &["jobs", "runs", "purge-expired", "--json"]).json();
        assert_eq!((&runs["runs"][0]["state"], &runs["runs"][0]["error"]), (&json!("failed"), &json!(said)));
        assert_eq!(db.count("purge_guard where confirmed_at is null").await, 1);
        run(&settings, &["purge", "--confirm", "--dry-run"]).failed_saying(2, "cannot be used with");
        // Of several purges the one that waits is confirmed, not the first.
        let first = "[[jobs]]\nname = \"first\"\nkind = \"purge_expired\"\nevery = \"1d\"\nolder_than = \"90d\"\n";
        let second = first.replace("first", "purge-expired").replace("90d", "7d");
        let settings = settings.config(&format!("{first}{second}"));
        assert_eq!(run(&settings, &["purge", "--confirm"]).done(), "deleted 0 events\n");
        run(&settings, &["purge", "--job", "purge"]).failed(3, "timelined: there is no purge \"purge\"; there are: first, purge-expired");
        let confirm = ["purge", "--confirm", "--job", "purge-expired"];
        assert_eq!(run(&settings, &confirm).done(), "deleted 10011 events\n");
        assert_eq!(db.count("purge_guard").await, 0, "the next one is asked for again");
        assert_eq!(db.count("job_actions where action = 'purge_confirmed'").await, 2);
    }

    async fn a_purge_goes_no_faster_than_its_rate(db) {
        let settings = on(db).await.config(
            "[[jobs]]\nname = \"p\"\nkind = \"purge_expired\"\nevery = \"1d\"\nmax_rate = 50\n",
        );
        let (now, long_ago) = (SystemClock.now(), SystemClock.now() - TimeDelta::days(30));
        let expired = |_| event().expires_at(now - TimeDelta::days(20)).recorded_at(long_ago);
        db.given(&acme(), (0..60).map(expired)).await;
        let began = std::time::Instant::now();
        assert_eq!(run(&settings, &["purge"]).done(), "deleted 60 events\n");
        assert!(began.elapsed() >= Duration::from_millis(1_200), "{:?}", began.elapsed());
    }

    async fn a_run_that_is_asked_for_is_taken_by_the_daemon(db) {
        let settings = on(db).await;
        let queued = run(&settings, &["jobs", "run", "purge-expired"]).done();
        let state = || {
            let runs = run(&settings, &["jobs", "runs", "purge-expired", "--json"]).json();
            assert_eq!(runs["runs"][0]["id"], queued.trim_end());
            runs["runs"][0]["state"].clone()
        };
        assert_eq!(state(), "queued");
        let _daemon = settings.start();
        eventually("the run succeeds", Duration::from_secs(30), async || state() == "succeeded").await;
        let jobs = run(&settings, &["jobs", "list", "--json"]).json();
        assert_eq!(jobs["jobs"][1]["last_run"]["state"], "succeeded");
        let table = run(&settings, &["jobs", "list"]).done();
        assert!(table.starts_with("NAME ") && table.lines().nth(2).unwrap().ends_with(" succeeded"), "{table}");
    }

    async fn an_old_schema_is_refused_where_the_daemon_may_not_migrate_and_migrate_brings_it_up(db) {
        let settings = on(db).await.env("TIMELINED__DATABASE__MIGRATE", "false");
        run(&settings, &["jobs", "list"]).done();
        db.execute("drop table export_actions; drop table export_links; drop table export_deliveries; drop table exports; delete from _sqlx_migrations where version in (3, 8)").await.unwrap();
        run(&settings, &["run"]).failed_saying(
            1,
            "timelined: cannot use the database: the schema is not ready: migration 3 (exports) is missing; run `timelined migrate`",
        );
        run(&settings, &["jobs", "list"]).failed(
            1,
            "timelined: the schema is not ready: migration 3 (exports) is missing; run `timelined migrate`",
        );
        let engine = db.either("sqlite", "postgres");
        let said = run(&settings, &["migrate"]).done();
        assert_eq!(said, format!("the {engine} database has the schema of this version\n"));
        run(&settings, &["migrate"]).done();
        assert!(settings.start().stop().success());

        db.execute("update _sqlx_migrations set version = 99 where version = 3").await.unwrap();
        run(&settings, &["jobs", "list"]).failed_saying(1, "run `timelined migrate`");
        db.execute("update _sqlx_migrations set version = 3 where version = 99").await.unwrap();
        db.execute(&format!(
            "insert into _sqlx_migrations (version, description, success, checksum, execution_time) values (99, 'later', {}, {}, 0)",
            db.flag(true), db.either("x'00'", "'\\x00'"),
        )).await.unwrap();
        for command in [&["run"][..], &["migrate"], &["purge"]] {
            run(&settings, command).failed_saying(1, "migration 99 is newer than this binary; install the newer one");
        }
    }
}

#[test]
fn an_empty_database_is_refused_where_the_daemon_may_not_migrate() {
    let settings = Settings::new().env("TIMELINED__DATABASE__MIGRATE", "false");
    run(&settings, &["jobs", "list"]).failed(
        1,
        "timelined: the schema is not ready: it is empty; run `timelined migrate`",
    );
    run(&settings, &["migrate"]).done();
    run(&settings, &["jobs", "list"]).done();
}

#[test]
fn an_event_may_come_on_standard_input() {
    let settings = Settings::new();
    let body = settings.state().with_file_name("event.json");
    std::fs::write(
        &body,
        r#"{"event_type":"note_added","category":"note","title":"From a pipe"}"#,
    )
    .unwrap();
    let mut command =
        settings.command(&["events", "add", CONTACT, "--tenant", "acme", "--body", "-"]);
    let output = command
        .stdin(std::fs::File::open(body).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        run(&settings, &["events", "list", CONTACT, "--tenant", "acme"])
            .done()
            .contains("From a pipe")
    );
}

// ---- watch ----

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_prints_each_event_and_acknowledges_it() {
    let mut daemon = TestDaemon::start();
    let mut ids = Vec::new();
    let body = |title: &str| json!({ "event_type": "note_added", "category": "note", "source": "agent", "title": title, "is_realtime": true });
    let path = format!("/api/v1/contacts/{CONTACT}/events");
    let (_, first) = daemon.post(&path, &service("acme"), &body("Before")).await;
    ids.push(first["id"].as_str().unwrap().to_owned());

    let mut command = bounded(&daemon.settings().command(&[
        "events",
        "watch",
        "--tenant",
        "acme",
        "--address",
        &daemon.address,
        "--count",
        "2",
        CONTACT,
        "--json",
    ]));
    let watcher = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (_, second) = daemon.post(&path, &service("acme"), &body("After")).await;
    ids.push(second["id"].as_str().unwrap().to_owned());
    let output = tokio::task::spawn_blocking(|| watcher.wait_with_output().unwrap())
        .await
        .unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.len()),
        (Some(0), 0),
        "{output:?}"
    );
    let mut seen: Vec<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["id"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    seen.sort();
    assert_eq!(seen, ids);
    eventually("they are delivered", Duration::from_secs(10), async || {
        let (_, page) = daemon.get(&path, &agent("acme")).await;
        page["events"]
            .as_array()
            .unwrap()
            .iter()
            .all(|event| event["delivered"] == true)
    })
    .await;
    assert!(daemon.stop().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_whose_token_is_not_taken_is_denied() {
    let daemon = TestDaemon::start();
    let watch = |token: &str, contact: &str| {
        run(
            daemon.settings(),
            &[
                "events",
                "watch",
                "--address",
                &daemon.address,
                "--token",
                token,
                contact,
            ],
        )
    };
    for token in ["nonsense", &crate::support::daemon::operator()] {
        watch(token, CONTACT).failed(
            77,
            "timelined: the daemon does not accept the token, or it has run out",
        );
    }
    let own = CONTACT.parse().unwrap();
    watch(
        &client("acme", &[own]),
        "0190b5f0-7c1e-7d3a-8f00-000000000002",
    )
    .failed(
        77,
        "timelined: a contact may not be watched with this token",
    );
}

#[test]
fn a_daemon_that_is_not_there_ends_with_69() {
    let settings = Settings::new().env("TIMELINED__HTTP__LISTEN", "127.0.0.1:1");
    run(&settings, &["events", "watch", CONTACT, "--tenant", "acme"]).failed(
        69,
        "timelined: the daemon at 127.0.0.1:1 cannot be reached: Connection refused (os error 111)",
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_goes_away_ends_its_watchers_with_69() {
    for signal in ["TERM", "KILL"] {
        let mut daemon = TestDaemon::start();
        let path = format!("/api/v1/contacts/{CONTACT}/events");
        let body = json!({ "event_type": "note_added", "category": "note", "source": "agent", "is_realtime": true });
        daemon.post(&path, &service("acme"), &body).await;
        let mut command = bounded(&daemon.settings().command(&[
            "events",
            "watch",
            "--tenant",
            "acme",
            "--address",
            &daemon.address,
            CONTACT,
        ]));
        let watcher = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It is connected when it has acknowledged.
        eventually(
            "the event is delivered",
            Duration::from_secs(10),
            async || daemon.get(&path, &agent("acme")).await.1["events"][0]["delivered"] == true,
        )
        .await;
        daemon.signal(signal);
        daemon.wait(Duration::from_secs(30));
        let output = tokio::task::spawn_blocking(|| watcher.wait_with_output().unwrap())
            .await
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(69), "{signal}: {said}");
        assert!(said.starts_with("timelined: the daemon "), "{said}");
    }
}
