//! The formats of an export: what lies in the files, read by others than who wrote them.

#![allow(
    clippy::unwrap_used,
    clippy::items_after_statements,
    reason = "a test that panics fails, which is what is wanted"
)]

#[macro_use]
mod support;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use timelined::config::{self, Config};
use timelined::daemon::export_settings;
use timelined::domain::{Audience, ContactEvent, ExportId, ManualClock, Priority, Source};
use timelined::export::Exporter;
use timelined::mail::Mailer;
use timelined::storage::{Export, ExportRequest, ExportState, NewExport, View};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use support::builders::{
    Record as _, acme, agent, contact, event, id, minutes, session, subject, t0,
};
use support::daemon::{Settings, eventually};
use support::database::{Database, Engine};

/// Where files go.
struct Home {
    directory: tempfile::TempDir,
    config: Config,
}

impl Home {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("timelined.toml");
        let text = format!("state_directory = \"{}\"\n", directory.path().display());
        std::fs::write(&file, text).unwrap();
        let request = config::Request {
            explicit_file: Some(file),
            environment: Vec::new(),
            working_directory: directory.path().to_owned(),
        };
        let config = config::load(&request).unwrap().config;
        Self { directory, config }
    }

    /// Exports the timeline of contact 1 at `now`; the file and its row.
    async fn export(
        &self,
        db: &Database,
        now: DateTime<Utc>,
        format: &str,
        change: impl FnOnce(&mut ExportRequest),
    ) -> (PathBuf, Export) {
        let mut request = ExportRequest {
            contact_id: contact(1),
            format: format.to_owned(),
            audience: Audience::Audit,
            since: None,
            until: None,
            categories: Vec::new(),
            timezone: chrono_tz::Europe::Lisbon,
            redact: Vec::new(),
            to: Vec::new(),
            attach: true,
        };
        change(&mut request);
        let clock = ManualClock::at(now);
        let export = NewExport {
            id: ExportId::generate(now),
            tenant_id: acme(),
            request,
            requested_by: subject("test"),
            request_key: None,
            message_ids: Vec::new(),
            created_at: now,
        };
        let id = db.exports.create_one(&export).await.unwrap();
        let listen = self.config.http.listen;
        let exporter = Exporter::new(
            db.exports.clone(),
            Arc::new(Mailer::new(&self.config.mail).unwrap()),
            Arc::new(clock),
            export_settings(&self.config, listen, id.uuid()).unwrap(),
            Arc::new(Notify::new()),
        );
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let work = TaskTracker::new().spawn(exporter.run(stop.clone(), abort));
        let find = async || db.exports.find(&acme(), id).await.unwrap().unwrap();
        eventually("the export ends", Duration::from_mins(1), async || {
            !matches!(
                find().await.state,
                ExportState::Queued | ExportState::Running
            )
        })
        .await;
        stop.cancel();
        work.await.unwrap();
        let export = find().await;
        assert_eq!(export.state, ExportState::Done, "{:?}", export.error);
        let name = export.file_name.as_ref().unwrap();
        assert!(name.ends_with(&format!(".{format}")), "{name}");
        let path = self.directory.path().join("exports").join(name);
        assert_eq!(
            std::fs::metadata(&path).unwrap().len(),
            export.bytes.unwrap()
        );
        (path, export)
    }

    /// What the file holds.
    async fn text(&self, db: &Database, now: DateTime<Utc>, format: &str) -> String {
        let (path, _) = self.export(db, now, format, |_| ()).await;
        std::fs::read_to_string(path).unwrap()
    }
}

/// The file as Python reads it.
fn in_python(kind: &str, file: &Path) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/formats.py");
    let output = Command::new("python3")
        .arg(script)
        .arg(kind)
        .arg(file)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Events as awkward as the contract lets them be, oldest first.
fn awkward() -> Vec<ContactEvent> {
    let mut made = Vec::new();
    let mut add = |event: ContactEvent| made.push(event);
    let at = |number: i64| t0() - minutes(60 - number);
    add(event()
        .id(id(1))
        .title("a century ago")
        .occurred_at(t0() - TimeDelta::days(36_525))
        .recorded());
    add(event()
        .id(id(2))
        .title("before spreadsheets count")
        .occurred_at("0001-01-01T00:00:00.000001Z".parse().unwrap())
        .recorded());
    for (number, title) in [
        "=HYPERLINK(\"http://x\")",
        "+1",
        "-1",
        "@sum",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        "\"=1\"",
        "'=1",
        "＝1",
        "Olá, 世界 🙂 שלום",
        "two\r\nlines, \"quoted\"; and\u{2028}more",
        "_x0041_ and \u{1}\u{7f}\u{fffe}",
        "",
        "  blanks  ",
    ]
    .into_iter()
    .enumerate()
    {
        let number = u64::try_from(number).unwrap() + 10;
        add(event()
            .id(id(number))
            .title(title)
            .description(title.repeat(2))
            .payload(json!({ "=cmd": title, "largest": u64::MAX, "least": i64::MIN, "half": 0.5 }))
            .metadata(json!({ "nested": [[{}], null, true, "\\u0000"] }))
            .occurred_at(at(i64::try_from(number).unwrap()))
            .recorded());
    }
    let mut integration = event()
        .id(id(90))
        .session(session(1))
        .triggered_by(agent(1))
        .priority(Priority::Urgent)
        .integration_source("-clearbit")
        .visible_to_client(true)
        .visible_to_agent(false)
        .expires_at(t0() + minutes(5))
        .realtime()
        .occurred_at(at(50))
        .recorded();
    integration.source = Source::Integration;
    add(integration);
    made.sort_by_key(|event| (event.occurred_at, event.id));
    made
}

on_both_engines! {
    async fn a_csv_reads_back_to_the_same_values_in_two_languages(db) {
        let events = awkward();
        db.given(&acme(), events.clone()).await;
        let home = Home::new();
        let (file, export) = home.export(db, t0(), "csv", |_| ()).await;
        assert_eq!(export.rows, events.len() as u64);
        let text = std::fs::read(&file).unwrap();
        let in_rust: Vec<std::collections::BTreeMap<String, String>> =
            csv::Reader::from_reader(text.strip_prefix(b"\xef\xbb\xbf").unwrap())
                .deserialize()
                .map(Result::unwrap)
                .collect();
        assert_eq!(json!(in_rust), in_python("csv", &file));
        assert_eq!(in_rust.len(), events.len());
        // What a spreadsheet would run has one apostrophe more, and nothing else has.
        let is_run = |text: &str| {
            text.trim_start_matches([' ', '"', '\'']).starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '＝'])
        };
        let unguarded = |cell: &String| match cell.strip_prefix('\'') {
            Some(rest) if is_run(rest) => rest.to_owned(),
            _ => { assert!(!is_run(cell), "{cell:?}"); cell.clone() }
        };
        let time = |at: Option<DateTime<Utc>>| at.map(|at| at.to_rfc3339());
        let read = |cell: &String| (!cell.is_empty()).then(|| {
            DateTime::parse_from_rfc3339(cell).unwrap().to_utc().to_rfc3339()
        });
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let id = |id: Option<String>| id.unwrap_or_default();
        for (row, event) in in_rust.iter().zip(&events) {
            assert_eq!(row["id"], event.id.to_string());
            assert_eq!(unguarded(&row["title"]), text(&event.title));
            assert_eq!(unguarded(&row["description"]), text(&event.description));
            assert_eq!(unguarded(&row["integration_source"]), text(&event.integration_source));
            assert_eq!(row["payload"], event.payload.as_str());
            assert_eq!(row["metadata"], event.metadata.as_str());
            assert_eq!(row["session_id"], id(event.session_id.map(|id| id.to_string())));
            assert_eq!(row["triggered_by"], id(event.triggered_by.map(|id| id.to_string())));
            // Year 1 began in Lisbon's year 0.
            if event.id != support::builders::id(2) {
                assert_eq!(read(&row["occurred_at"]), time(Some(event.occurred_at)));
            }
            assert_eq!(read(&row["expires_at"]), time(event.expires_at));
            assert_eq!(row["visible_to_agent"], event.visibility.agent.to_string());
        }
    }

    async fn packed_files_hold_what_plain_ones_do(db) {
        db.given(&acme(), awkward()).await;
        let home = Home::new();
        for format in ["csv", "jsonl"] {
            let plain = home.text(db, t0(), format).await;
            let (file, _) = home.export(db, t0(), &format!("{format}.gz"), |_| ()).await;
            let mut unpacked = String::new();
            let file = std::fs::File::open(file).unwrap();
            flate2::read::GzDecoder::new(file).read_to_string(&mut unpacked).unwrap();
            assert_eq!(unpacked, plain);
            let (file, _) = home.export(db, t0(), &format!("{format}.zst"), |_| ()).await;
            let file = std::fs::File::open(file).unwrap();
            assert_eq!(zstd::decode_all(file).unwrap(), plain.as_bytes());
        }
    }

    async fn a_line_of_jsonl_is_the_event_as_the_api_answers_it(db) {
        let events = awkward();
        db.given(&acme(), events.clone()).await;
        let by = subject("ana");
        db.events.mark_delivered(&acme(), None, &[id(90)], None, &by, t0() + minutes(1)).await.unwrap();
        let ids: Vec<_> = events.iter().map(|event| event.id).collect();
        let mut stored = db.events.find_by_ids(&acme(), &ids).await.unwrap();
        stored.sort_by_key(|event| (event.occurred_at, event.id));
        let lines: Vec<_> = stored.iter().map(|event| serde_json::to_string(event).unwrap() + "\n").collect();
        assert_eq!(Home::new().text(db, t0(), "jsonl").await, lines.concat());
        assert!(lines.concat().contains("\"delivered\":true"));
    }

    async fn a_timeline_moves_to_either_engine_and_back_without_a_byte_changed(db) {
        let home = Home::new();
        let mut events = awkward();
        events.push(event().id(id(97)).title("read").occurred_at(t0() + minutes(1)).recorded());
        events.push(event().id(id(98)).realtime().occurred_at(t0() + minutes(2)).recorded());
        let largest = json!({ "text": "\u{1}".repeat(10_000) });
        events.push(event().id(id(99)).payload(largest).description("\u{1f}".repeat(20_000)).occurred_at(t0() + minutes(3)).recorded());
        db.given(&acme(), events.clone()).await;
        // As no program of ours would write it.
        db.execute(&format!(
            "insert into contact_events (tenant_id, contact_id, event_type, category, source, payload)
             values ('acme', '{}', 'note_added', 'note', 'agent', '{{ \"b\": 1.50, \"a\": 12345678901234567890123, \"a\": 1e400 }}')",
            contact(1)
        )).await.unwrap();
        let by = subject("ana");
        db.events.mark_delivered(&acme(), None, &[id(90)], None, &by, t0() + minutes(1)).await.unwrap();
        let everything = View::everything(t0() + minutes(1));
        db.events.mark_read(&acme(), &[id(97), id(90)], None, &by, everything).await.unwrap();
        let (file, export) = home.export(db, t0(), "jsonl", |_| ()).await;
        assert_eq!(export.rows, events.len() as u64 + 1);
        let first = std::fs::read_to_string(&file).unwrap();
        // One of them has expired by the time of the import.
        for engine in [Engine::Sqlite, Engine::Postgres] {
            let other = Database::fresh(engine).await;
            let settings = Settings::new().env("TIMELINED__DATABASE__URL", &other.url().await);
            let output = settings
                .command(&["events", "import", file.to_str().unwrap(), "--tenant", "acme"])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let second = home.text(&other, t0(), "jsonl").await;
            for (first, second) in first.lines().zip(second.lines()) {
                assert_eq!(first, second);
            }
            assert_eq!(first.len(), second.len());
            let waiting = other.texts("select cast(event_id as text) from event_outbox").await;
            assert_eq!(waiting, [Some(id(98).to_string())]);
            other.drop().await;
        }
    }

    async fn a_row_that_cannot_be_read_is_passed_over_and_the_others_are_not(db) {
        let insert = |title: &str, payload: &str| format!(
            "insert into contact_events (tenant_id, contact_id, event_type, category, source, title, payload)
             values ('acme', '{}', 'note_added', 'note', 'agent', {title}, '{payload}')",
            contact(1)
        );
        // SQLite takes for text what is not UTF-8; both take half a character in JSON.
        let title = db.either("cast(x'ff' as text)", "'text'");
        for (title, payload) in [("'first'", "{}"), (title, "{}"), ("'half'", "{\"a\":\"\\ud800\"}"), ("'last'", "{}")] {
            db.execute(&insert(title, payload)).await.unwrap();
        }
        let text = Home::new().text(db, t0(), "csv").await;
        assert!(text.contains("first") && text.contains("last") && !text.contains("half"), "{text}");
        assert_eq!(text.lines().count(), db.either(3, 4));
    }

    async fn a_payload_that_another_program_wrote_over_two_lines_is_one_line(db) {
        db.execute(&format!(
            "insert into contact_events (tenant_id, contact_id, event_type, category, source, payload)
             values ('acme', '{}', 'note_added', 'note', 'agent', '{{\n\"a\": 1.50,\r\n\"a\": \"\\n\"}}')",
            contact(1)
        )).await.unwrap();
        let text = Home::new().text(db, t0(), "jsonl").await;
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains(r#""payload":{ "a": 1.50,  "a": "\n"},"#), "{text}");
    }

    async fn a_workbook_has_texts_flags_and_real_times(db) {
        let mut events = awkward();
        let long = "🙂".repeat(20_000);
        events.push(event().id(id(95)).title("long").description(&long).payload(json!({ "k": "x".repeat(40_000) }))
            .occurred_at(t0()).recorded());
        let most = "é".repeat(16_000);
        events.push(event().id(id(96)).title("fits").description(&most).occurred_at(t0()).recorded());
        db.given(&acme(), events.clone()).await;
        let home = Home::new();
        let (file, _) = home.export(db, t0(), "xlsx", |_| ()).await;
        let book = in_python("xlsx", &file);
        let [sheet] = &book.as_array().unwrap()[..] else { panic!("one sheet") };
        assert_eq!((&sheet["name"], &sheet["frozen"]), (&json!("Timeline"), &json!(1)));
        assert_eq!(sheet["filter"], format!("A1:T{}", events.len() + 1));
        let rows = sheet["rows"].as_array().unwrap();
        assert_eq!(rows.len(), events.len() + 1);
        assert!(rows[0].as_array().unwrap().iter().all(|cell| cell[2] == "bold"), "{}", rows[0]);
        assert_eq!(rows[0][1][1], "occurred_at (Europe/Lisbon)");
        for (row, event) in rows[1..].iter().zip(&events) {
            assert_eq!(row[0], json!(["text", event.id.to_string(), null]));
            let text = |cell: &Value, text: &str| if text.is_empty() {
                assert!(cell.is_null());
            } else {
                assert_eq!(*cell, json!(["text", text, null]));
            };
            text(&row[6], event.title.as_deref().unwrap_or(""));
            if event.id != id(95) {
                text(&row[7], event.description.as_deref().unwrap_or(""));
                text(&row[8], event.payload.as_str());
            }
            assert_eq!(row[13], json!(["flag", event.is_realtime, null]));
        }
        let serial = |at: DateTime<Utc>| {
            let local = at.with_timezone(&chrono_tz::Europe::Lisbon).naive_local();
            let since = local - chrono::NaiveDate::from_ymd_opt(1899, 12, 30).unwrap().and_time(chrono::NaiveTime::MIN);
            since.num_microseconds().unwrap()
        };
        let row = |title: &str| rows.iter().find(|row| row[6][1] == title).unwrap();
        let micros = |cell: &Value| {
            assert_eq!((&cell[0], &cell[2]), (&json!("number"), &json!("yyyy\\-mm\\-dd hh:mm:ss.000")));
            cell[1].as_f64().unwrap() * 86_400_000_000.0
        };
        for (title, at) in [("+1", events[3].occurred_at), ("a century ago", events[1].occurred_at)] {
            #[expect(clippy::cast_precision_loss, reason = "fewer than 2^53")]
            let expected = serial(at) as f64;
            assert!((micros(&row(title)[1]) - expected).abs() < 10.0, "{title}");
        }
        let before = &row("before spreadsheets count")[1];
        assert_eq!(before[0], "text");
        let cut = row("long");
        for (cell, text) in [(&cut[7], long.as_str()), (&cut[8], events[events.len() - 2].payload.as_str())] {
            let cell = cell[1].as_str().unwrap();
            let size = text.encode_utf16().count();
            let note = format!(" [cut here: {size} characters, a cell takes 32767; CSV and JSONL have all]");
            let kept = cell.strip_suffix(&note).expect("the cell says that it was cut");
            assert!(text.starts_with(kept));
            assert!((32_765..=32_767).contains(&cell.encode_utf16().count()));
        }
    }

    async fn what_is_redacted_is_in_no_format(db) {
        const SECRET: &str = "hush";
        let session = session(7);
        let hidden = event().title(SECRET).description(SECRET).payload(json!({ "k": SECRET }))
            .metadata(json!({ "k": SECRET })).integration_source(SECRET).session(session)
            .triggered_by(agent(7)).visible_to_client(true).recorded();
        db.given(&acme(), [hidden]).await;
        let home = Home::new();
        let all = ["title", "description", "payload", "metadata", "session_id", "triggered_by", "integration_source"];
        for audience in [Audience::Audit, Audience::Client] {
            for format in ["csv", "jsonl", "xlsx"] {
                let (file, _) = home.export(db, t0(), format, |request| {
                    request.audience = audience;
                    request.redact = all.map(ToOwned::to_owned).to_vec();
                }).await;
                let read = match format {
                    "csv" | "xlsx" => in_python(format, &file).to_string(),
                    _ => std::fs::read_to_string(&file).unwrap(),
                };
                for secret in [SECRET, &session.to_string(), &agent(7).to_string()] {
                    assert!(!read.contains(secret), "{format}: {read}");
                }
                let marks = if audience == Audience::Client { 5 } else { 7 };
                if format != "jsonl" {
                    assert_eq!(read.matches("[redacted]").count(), marks, "{format}: {read}");
                    continue;
                }
                let line: Value = serde_json::from_str(&read).unwrap();
                assert_eq!((&line["title"], &line["session_id"]), (&json!("[redacted]"), &Value::Null));
                assert_eq!(line["payload"], json!({ "redacted": true }));
                assert_eq!(line.get("metadata").is_some(), audience == Audience::Audit);
            }
        }
    }

    async fn a_timeline_without_events_is_a_file_in_every_format(db) {
        let home = Home::new();
        assert_eq!(home.text(db, t0(), "jsonl").await, "");
        assert!(home.text(db, t0(), "csv").await.starts_with("\u{feff}id,occurred_at,"));
        let (file, _) = home.export(db, t0(), "xlsx", |_| ()).await;
        let book = in_python("xlsx", &file);
        assert_eq!(book[0]["rows"].as_array().unwrap().len(), 1);
        assert_eq!(book[0]["filter"], "A1:T1");
    }
}
