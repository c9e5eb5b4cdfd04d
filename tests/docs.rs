//! What the documents say is true: their commands and statements run.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics fails, which is what is wanted"
)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use support::daemon::{Settings, agent, eventually};
use support::database::{Database, Engine, run};

const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";

fn document(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name))
        .expect("the document is there")
}

/// The fenced blocks of a language below a heading, up to the next one of its level.
fn blocks(document: &str, heading: &str, language: &str) -> Vec<String> {
    let below = document.split_once(&format!("\n## {heading}\n"));
    let (_, section) = below.unwrap_or_else(|| panic!("there is no heading {heading}"));
    let section = section.split("\n## ").next().unwrap_or(section);
    section
        .split(&format!("\n```{language}\n"))
        .skip(1)
        .map(|block| block.split("\n```").next().unwrap_or(block).to_owned())
        .collect()
}

/// Runs shell commands to their end, which must come; what they print.
fn shell(script: &str, settings: &Settings) -> String {
    let mut bounded = Command::new("timeout");
    bounded.args([
        "--kill-after=5",
        "60",
        "bash",
        "-euo",
        "pipefail",
        "-c",
        script,
    ]);
    let command = settings.command(&[]);
    bounded.current_dir(command.get_current_dir().unwrap());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    let output = bounded.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}\n{script}");
    String::from_utf8(output.stdout).unwrap()
}

// ---- README.md ----

#[test]
fn the_minute_of_the_readme_records_shows_and_watches_an_event() {
    let readme = document("README.md");
    let found = blocks(&readme, "Run it in a minute", "sh");
    let [start, script] = &found[..] else {
        panic!("one block starts it, one uses it: {found:?}");
    };
    assert_eq!(start, "cargo run --release");
    // As a newcomer has it: without a key.
    let settings = Settings::new().without("TIMELINED__AUTH__HS256_KEY");
    let daemon = settings.start();
    let settings = settings.env("TIMELINED__HTTP__LISTEN", &daemon.address);
    let script = script
        .replace("target/release/timelined", env!("CARGO_BIN_EXE_timelined"))
        .replace("127.0.0.1:8080", &daemon.address)
        // It would watch for ever.
        .replace("events watch", "events watch --count 1");
    let printed = shell(&script, &settings);
    let mut documents = serde_json::Deserializer::from_str(&printed).into_iter::<Value>();
    let event = documents.next().unwrap().unwrap();
    let page = documents.next().unwrap().unwrap();
    assert_eq!(event["title"], "Hello");
    assert_eq!(page["events"][0]["id"], event["id"]);
    assert!(
        printed.trim_end().ends_with("Hello"),
        "it is watched: {printed}"
    );
}

#[test]
fn the_installation_of_the_readme_puts_the_binary_and_the_unit_where_systemd_finds_them() {
    let readme = document("README.md");
    let script = blocks(&readme, "Install it with systemd", "sh").remove(0);
    let root = tempfile::tempdir().unwrap();
    for directory in ["usr/bin", "etc/systemd/system"] {
        fs::create_dir_all(root.path().join(directory)).unwrap();
    }
    let at = root.path().display();
    let source = env!("CARGO_MANIFEST_DIR");
    let live = "systemctl daemon-reload && systemctl enable --now timelined";
    assert!(script.contains(live), "{script}");
    let script = script
        .replace("target/release/timelined", env!("CARGO_BIN_EXE_timelined"))
        .replace(" systemd/", &format!(" {source}/systemd/"))
        .replace(" /usr/", &format!(" {at}/usr/"))
        .replace(" /etc/", &format!(" {at}/etc/"))
        // No test starts a service of its machine.
        .replace(live, &format!("systemctl --root={at} enable timelined"));
    shell(&script, &Settings::new());
    assert!(
        root.path()
            .join("etc/systemd/system/multi-user.target.wants/timelined.service")
            .is_symlink()
    );
    let version = Command::new(root.path().join("usr/bin/timelined"))
        .arg("--version")
        .output()
        .unwrap();
    assert!(version.status.success());
}

#[test]
fn the_commands_of_the_installed_service_run_as_its_user() {
    let readme = document("README.md");
    let script = blocks(&readme, "Install it with systemd", "sh").remove(1);
    let command = script.replace("\\\n", " ");
    let (run, timelined) = command.split_once(" /usr/bin/timelined ").unwrap();
    // No test starts a unit of its machine: its options and properties are looked up instead.
    let help = Command::new("systemd-run").arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let unit = document("systemd/timelined.service");
    for word in run.split_whitespace().skip(1) {
        match word.split_once('=') {
            Some(("User", user)) => assert_eq!(user, "timelined", "the unit's name is the user's"),
            Some(_) => assert!(
                unit.contains(&format!("\n{word}\n")),
                "{word} is not the unit's"
            ),
            None => assert!(help.contains(word), "{word}"),
        }
    }
    shell(
        &format!("{} {timelined}", env!("CARGO_BIN_EXE_timelined")),
        &Settings::new(),
    );
}

#[test]
fn the_files_and_targets_that_the_readme_names_are_there() {
    let readme = document("README.md");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for link in readme
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
    {
        if !link.contains("://") {
            assert!(root.join(link).exists(), "{link}");
        }
    }
    let makefile = document("Makefile");
    for target in readme
        .split("`make ")
        .skip(1)
        .filter_map(|rest| rest.split('`').next())
    {
        assert!(makefile.contains(&format!("\n{target}:")), "make {target}");
    }
    for line in blocks(&readme, "Test it", "sh") {
        assert_eq!(line, "make test");
    }
}

#[test]
fn the_soak_runs_every_test_that_has_a_long_form() {
    let makefile = document("Makefile");
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut seen = 0;
    // `tests/NAME.rs` and the modules `tests/NAME/*.rs`.
    for directory in fs::read_dir(&tests).unwrap().flatten() {
        let path = directory.path();
        let inner = fs::read_dir(&path).into_iter().flatten().flatten();
        for file in inner.map(|file| file.path()).chain([path.clone()]) {
            let text = fs::read_to_string(&file).unwrap_or_default();
            if text.contains("var_os(\"SOAK\")") && !file.ends_with("docs.rs") {
                let name = path.file_stem().unwrap().to_str().unwrap();
                let line = format!("\tSOAK=1 $(CARGO) test --locked --test {name}");
                assert!(makefile.contains(&line), "make soak leaves {name} out");
                seen += 1;
            }
        }
    }
    assert!(seen >= 2, "{seen} tests");
}

#[test]
fn the_commands_of_the_readme_are_commands() {
    let readme = document("README.md");
    let settings = Settings::new();
    let mut seen = 0;
    for command in readme
        .split('`')
        .filter_map(|code| code.strip_prefix("timelined "))
    {
        let words: Vec<&str> = command
            .split_whitespace()
            .filter(|word| !word.contains(char::is_uppercase))
            .collect();
        let output = settings
            .command(&[&words[..], &["--help"]].concat())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "timelined {command}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        seen += 1;
    }
    assert!(seen >= 5, "{seen} commands");
}

// ---- docs/sql.md ----

async fn the_statements_of_the_document_run(db: &Database) {
    let heading = db.either("On SQLite", "On PostgreSQL");
    let found = blocks(&document("docs/sql.md"), heading, "sql");
    let [insert, read] = &found[..] else {
        panic!("one statement inserts, one reads: {found:?}");
    };
    let daemon = Settings::new()
        .env("TIMELINED__DATABASE__URL", &db.url().await)
        .start();
    let (mut socket, _) =
        support::socket::Socket::watching(&daemon.address, &agent("acme"), &[CONTACT.to_owned()])
            .await;
    db.execute(insert).await.unwrap();
    let pushed = socket.next_of("event").await;
    assert_eq!(pushed["event"]["title"], "Payment received");
    assert_eq!(pushed["event"]["payload"]["amount"], 25);
    assert!(pushed["event"]["expires_at"].is_string());
    let id = pushed["event"]["id"].as_str().unwrap();
    socket.ack(&[id]).await;
    let read = read.trim_end().trim_end_matches(';');
    let read =
        format!("select cast(id as text) from ({read}) as page where delivered_at is not null");
    eventually(
        "the view says delivered",
        Duration::from_secs(10),
        async || db.texts(&read).await == [Some(id.to_owned())],
    )
    .await;
}

async fn the_document_has_every_column_and_default(db: &Database) {
    let document = document("docs/sql.md");
    let columns = match db.engine {
        Engine::Sqlite => "select name from pragma_table_info('timeline_events')",
        Engine::Postgres => {
            "select column_name::text from information_schema.columns where table_name = 'timeline_events'"
        }
    };
    let columns = db.texts(columns).await;
    assert_eq!(columns.len(), 26, "{columns:?}");
    for column in columns.into_iter().flatten() {
        assert!(
            document.contains(&format!("`{column}`")),
            "{column} is not told"
        );
    }
}

/// A row that the checks let through, and that the document says is passed over.
async fn a_row_that_cannot_be_read_is_passed_over_and_counted(db: &Database) {
    let settings = Settings::new()
        .env("TIMELINED__DATABASE__URL", &db.url().await)
        .env("TIMELINED__HTTP__OPS_LISTEN", "");
    let daemon = settings.start();
    let insert = |payload: &str| {
        format!(
            "insert into contact_events (tenant_id, contact_id, event_type, category, source, payload) \
             values ('acme', '{CONTACT}', 'note_added', 'note', 'agent', '{payload}')"
        )
    };
    db.execute(&insert(r#"{"a":"\ud800"}"#)).await.unwrap();
    db.execute(&insert("{}")).await.unwrap();
    for _ in 0..2 {
        let (status, page) = daemon
            .get(
                &format!("/api/v1/contacts/{CONTACT}/events"),
                &agent("acme"),
            )
            .await;
        assert_eq!(status, 200, "{page}");
        assert_eq!(page["events"].as_array().map(Vec::len), Some(1), "{page}");
    }
    let log = daemon.log();
    let told: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("payload"))
        .collect();
    assert_eq!(told.len(), 1, "logged once: {log}");
    assert!(!told[0].contains("ud800"), "never the value: {}", told[0]);
}

macro_rules! on_both_engines {
    ($($name:ident)+) => {
        mod sqlite {
            $(#[test]
            fn $name() {
                super::run(super::Engine::Sqlite, super::$name);
            })+
        }

        mod postgres {
            $(#[test]
            fn $name() {
                super::run(super::Engine::Postgres, super::$name);
            })+
        }
    };
}

on_both_engines! {
    the_statements_of_the_document_run
    the_document_has_every_column_and_default
    a_row_that_cannot_be_read_is_passed_over_and_counted
}
