//! Exports as an operator meets them: real files, real SQLite, and a real SMTP server that fails
//! where a test says so (`tests/support/smtp.py`).

#![allow(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::items_after_statements,
    clippy::unnecessary_debug_formatting,
    reason = "a test that panics fails, and its numbers are small"
)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::json;
use timelined::config::{self, Config, ExportFormat, ExportJob, Selection, WhenEmpty};
use timelined::domain::{
    Audience, Category, ContactEvent, ContactId, ExportId, ManualClock, NewContactEvent, RunId,
    Source, Subject, TenantId, event_types,
};
use timelined::export::{Exporter, LinkKey, Settings, link_hash};
use timelined::jobs::{Job as _, Report, RunContext, ScheduleExports};
use timelined::mail::{Mailer, MailerError};
use timelined::storage::sqlite::SqliteStorage;
use timelined::storage::{
    ClaimedDelivery, Counts, DeliveryOutcome, DeliveryState, Export, ExportRequest, ExportState,
    ExportStore, Fence, Key, NewExport, NewMail, OldFile, Recording, Rendered, Slice, Storage,
    StorageError, StorageResult,
};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

#[path = "support/smtp.rs"]
mod smtp;
use smtp::{Server, attachment};

/// Longer than any of these waits takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

// ---- files ----

#[tokio::test]
async fn a_csv_parses_back_to_the_events_and_is_mailed_into_the_outbox_by_default() {
    let home = Home::new("").await;
    let awkward = [
        ("=HYPERLINK(\"http://x\")", "quoted \"text\", with a comma"),
        ("Olá, 世界", "two\r\nlines"),
        ("-1", ""),
        ("plain", "@sum"),
    ];
    let mut events = Vec::new();
    for (i, (title, description)) in awkward.into_iter().enumerate() {
        let minutes = TimeDelta::minutes(i64::try_from(i).unwrap());
        let event = note()
            .title(title)
            .description(description)
            .payload(json!({ "title": title }))
            .occurred_at(start() - TimeDelta::hours(1) + minutes);
        events.push(event);
    }
    let events = home.record(events).await;
    let id = home.order(&["ana@example.com"]).await;
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;

    let bytes = std::fs::read(home.file(&export)).unwrap();
    assert!(
        bytes.starts_with(b"\xef\xbb\xbfid,occurred_at,"),
        "BOM and header"
    );
    assert!(bytes.ends_with(b"\r\n"));
    assert_eq!(export.bytes, Some(bytes.len() as u64));
    assert_eq!(export.sha256.as_deref(), Some(&*sha256(&bytes)));
    let rows = parse(&bytes);
    assert_eq!(rows.len(), events.len());
    assert_eq!(export.rows, 4);
    for (row, event) in rows.iter().zip(&events) {
        let text = |name: &str| row[name].trim_start_matches('\'').to_owned();
        assert_eq!(row["id"], event.id.to_string());
        assert_eq!(Some(text("title")), event.title);
        assert_eq!(Some(text("description")), event.description);
        assert_eq!(row["payload"], event.payload.as_str());
        let at: DateTime<Utc> = row["occurred_at"].parse().unwrap();
        assert_eq!(at, event.occurred_at);
        assert!(
            row["occurred_at"].ends_with(".000000+01:00"),
            "{}",
            row["occurred_at"]
        );
    }
    assert_eq!(rows[0]["title"], "'=HYPERLINK(\"http://x\")");
    assert_eq!(rows[2]["title"], "'-1");
    assert_eq!(rows[3]["description"], "'@sum");

    let [delivery] = &export.deliveries[..] else {
        panic!("one recipient, one mail");
    };
    let (local, _) = delivery.message_id.split_once('@').unwrap();
    let mail = home.path().join("outbox").join(format!("{local}.eml"));
    let mail = std::fs::read_to_string(mail).unwrap();
    assert!(
        mail.contains(&format!("Message-ID: <{}>", delivery.message_id)),
        "{mail}"
    );
    assert!(mail.contains("To: ana@example.com"));
    assert!(mail.contains(&sha256(&bytes)), "{mail}");
    assert_eq!(attachment(&mail).unwrap(), bytes);
    worker.end().await;
}

#[tokio::test]
async fn a_client_sees_its_own_events_and_none_of_the_inner_columns() {
    let home = Home::new("").await;
    home.record(vec![
        note().title("inner"),
        note().title("shown").visible_to_client(true),
    ])
    .await;
    let id = home
        .order_with(|request| {
            request.audience = Audience::Client;
            request.redact = vec!["description".to_owned()];
        })
        .await;
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    let rows = parse(&std::fs::read(home.file(&export)).unwrap());
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["title"], "shown");
    assert_eq!(rows[0]["description"], "[redacted]");
    for inner in [
        "metadata",
        "triggered_by",
        "visible_to_client",
        "visible_to_agent",
    ] {
        assert!(!rows[0].contains_key(inner), "{inner}");
    }
    worker.end().await;
}

#[tokio::test]
async fn what_is_recorded_after_the_order_is_not_part_of_it() {
    let home = Home::new("").await;
    home.record(vec![note().title("before")]).await;
    let id = home.order(&[]).await;
    home.record(vec![note().title("after")]).await;
    let worker = home.start();
    assert_eq!(
        home.until(id, |e| e.state == ExportState::Done).await.rows,
        1
    );
    worker.end().await;
}

#[tokio::test]
async fn fifty_thousand_events_are_written_each_once() {
    let home = Home::new("").await;
    for page in 0..50 {
        let events = (0..1000).map(|i| {
            let ago = TimeDelta::seconds(page * 1000 + i);
            note()
                .title(format!("{page}.{i}"))
                .occurred_at(start() - ago)
        });
        home.record(events.collect()).await;
    }
    let id = home.order(&[]).await;
    let began = Instant::now();
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    eprintln!("50,000 rows in {:?}", began.elapsed());
    let rows = parse(&std::fs::read(home.file(&export)).unwrap());
    assert_eq!((export.rows, rows.len()), (50_000, 50_000));
    assert!(rows.is_sorted_by(|a, b| a["occurred_at"] < b["occurred_at"]));
    assert_eq!(export.total_rows, Some(50_000));
    worker.end().await;
}

#[tokio::test]
async fn an_expired_export_loses_its_file_and_an_unfinished_one_goes_at_the_start() {
    let home = Home::new("").await;
    let directory = home.path().join("exports");
    std::fs::create_dir(&directory).unwrap();
    let left = std::fs::File::create(directory.join("left.csv.part")).unwrap();
    let created = left.metadata().unwrap().modified().unwrap();
    left.set_modified(created - Duration::from_mins(2)).unwrap();
    // Another process is at work on this one.
    std::fs::write(directory.join("written.csv.part"), "half").unwrap();
    home.record(vec![note()]).await;
    let id = home.order(&[]).await;
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    eventually(|| !directory.join("left.csv.part").exists()).await;
    assert!(directory.join("written.csv.part").exists());
    let file = home.file(&export);
    assert!(file.exists());
    home.advance(TimeDelta::days(7));
    let export = home.until(id, |e| e.state == ExportState::Expired).await;
    assert_eq!(export.file_name, None);
    eventually(|| !file.exists()).await;
    worker.end().await;
}

#[tokio::test]
async fn a_crash_between_a_files_end_and_its_row_forgets_no_file() {
    let home = Home::new("").await;
    home.record(vec![note()]).await;
    let id = home.order(&[]).await;
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    worker.end().await;
    home.advance(TimeDelta::days(7));
    let crashing = home.start_on(Arc::new(Hooked {
        inner: home.storage.exports.clone(),
        calls: AtomicU32::new(0),
        before: Box::new(|_| async { Ok(()) }.boxed()),
        dies_before_expire: true,
    }));
    let died = tokio::time::timeout(PATIENCE, crashing.task).await;
    assert!(died.unwrap().unwrap_err().is_panic());
    let file = home.file(&export);
    let left = home.export(id).await;
    assert!(!file.exists());
    assert_eq!(
        left.file_name, export.file_name,
        "the next start looks again"
    );
    let worker = home.start();
    let expired = home.until(id, |e| e.state == ExportState::Expired).await;
    assert_eq!(expired.file_name, None);
    worker.end().await;
}

#[tokio::test]
async fn a_pdf_is_tagged_shows_ink_and_goes_by_mail() {
    let home = Home::new("").await;
    let old = "1926-03-02T09:00:00Z".parse().unwrap();
    home.record(vec![
        note().title("a century ago").occurred_at(old),
        note().title("<b>Звонок</b>"),
    ])
    .await;
    let id = home
        .order_with(|request| {
            request.format = "pdf".to_owned();
            request.audience = Audience::Agent;
            request.to = vec!["ana@example.com".to_owned()];
        })
        .await;
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    assert_eq!(export.rows, 2);
    let file = home.file(&export);
    assert!(file.extension().is_some_and(|end| end == "pdf"));
    let text = output_of("pdftotext", &["-layout"], &file, &["-"]);
    let text = String::from_utf8(text).unwrap();
    let first = text.find("Tuesday, 2 March 1926").unwrap();
    let second = text.find("<b>Звонок</b>").unwrap();
    assert!(first < second, "{text}");
    let tags = output_of("pdfinfo", &["-struct"], &file, &[]);
    let tags = String::from_utf8(tags).unwrap();
    for tag in ["H1", "H2", "Figure", "Table", "TH", "LBody"] {
        assert!(tags.contains(tag), "{tag} is missing in {tags}");
    }
    for page in ["1", "2"] {
        let options = ["-r", "30", "-gray", "-f", page, "-l", page];
        let picture = output_of("pdftoppm", &options, &file, &[]);
        let dark = picture.iter().filter(|pixel| **pixel < 128).count();
        assert!(dark > 100, "page {page} has {dark} dark pixels");
    }
    worker.end().await;
}

fn output_of(program: &str, options: &[&str], file: &Path, rest: &[&str]) -> Vec<u8> {
    let mut command = std::process::Command::new(program);
    let output = command.args(options).arg(file).args(rest).output();
    let output = output.expect("tests/support/install.sh installs poppler-utils");
    assert!(output.status.success(), "{program}: {output:?}");
    output.stdout
}

#[tokio::test]
async fn an_unknown_format_or_field_fails_at_once() {
    let home = Home::new("").await;
    let format = home
        .order_with(|request| request.format = "doc".to_owned())
        .await;
    let field = home
        .order_with(|request| request.redact = vec!["titel".to_owned()])
        .await;
    let worker = home.start();
    for (id, name) in [(format, "doc"), (field, "titel")] {
        let export = home.until(id, |e| e.state == ExportState::Failed).await;
        assert_eq!(export.attempt, 1);
        assert!(export.error.unwrap().contains(name));
    }
    worker.end().await;
}

// ---- the worker's life ----

#[tokio::test]
async fn a_worker_killed_midway_loses_nothing_once_its_claims_are_released() {
    let home = Home::new("").await;
    home.record((0..2500).map(|_| note()).collect()).await;
    let id = home.order(&[]).await;
    let (gate, store) = home.gated();
    let killed = home.start_on(store);
    gate.reached(2).await;
    let dead = killed.id;
    killed.kill().await;
    assert_eq!(home.export(id).await.state, ExportState::Running);

    home.storage.exports.release(dead).await.unwrap();
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    assert_eq!((export.rows, export.attempt), (2500, 1));
    worker.end().await;
}

#[tokio::test]
async fn a_stop_ends_at_the_next_page_and_spends_no_attempt() {
    let home = Home::new("").await;
    home.record((0..2500).map(|_| note()).collect()).await;
    let id = home.order(&[]).await;
    let (gate, store) = home.gated();
    let worker = home.start_on(store);
    gate.reached(2).await;
    worker.stop.cancel();
    gate.open();
    worker.ended().await;
    let export = home.export(id).await;
    assert_eq!((export.state, export.attempt), (ExportState::Queued, 0));
    let left = std::fs::read_dir(home.path().join("exports")).unwrap();
    assert_eq!(left.count(), 0, "the unfinished file is gone");
}

#[tokio::test]
async fn an_abort_ends_at_once_and_gives_the_claims_back() {
    let home = Home::new("").await;
    home.record((0..1500).map(|_| note()).collect()).await;
    let id = home.order(&[]).await;
    let (gate, store) = home.gated();
    let worker = home.start_on(store);
    gate.reached(2).await;
    worker.abort.cancel();
    // the gate stays shut: nothing was waited for
    worker.ended().await;
    assert_eq!(home.export(id).await.state, ExportState::Queued);
}

#[tokio::test]
async fn a_lost_claim_ends_rendering_and_removes_the_unfinished_file() {
    let home = Home::new("").await;
    home.record((0..2500).map(|_| note()).collect()).await;
    home.order(&[]).await;
    let (gate, store) = home.gated();
    let worker = home.start_on(store);
    gate.reached(2).await;
    let other = Uuid::from_u128(2);
    home.storage.exports.release(worker.id).await.unwrap();
    let taken = home
        .storage
        .exports
        .claim_render(other, start(), start() + TimeDelta::hours(1));
    assert!(taken.await.unwrap().is_some());
    // The claim is looked at four times a second.
    home.advance(TimeDelta::milliseconds(250));
    gate.open();
    let directory = home.path().join("exports");
    eventually(|| std::fs::read_dir(&directory).unwrap().count() == 0).await;
    assert_eq!(
        gate.calls.load(Ordering::SeqCst),
        2,
        "no third page was read"
    );
    worker.end().await;
}

#[tokio::test]
async fn a_panic_in_rendering_is_a_failed_attempt_and_the_worker_lives_on() {
    let home = Home::new("").await;
    home.record(vec![note()]).await;
    let id = home.order(&[]).await;
    let store = home.hooked(|call| {
        assert!(call > 1, "the first page panics");
        async { Ok(()) }.boxed()
    });
    let worker = home.start_on(store);
    let export = home.until(id, |e| e.error.is_some()).await;
    assert_eq!(export.state, ExportState::Queued);
    assert_eq!(export.error.as_deref(), Some("rendering panicked"));
    home.advance(TimeDelta::minutes(1));
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    assert_eq!((export.attempt, export.error), (2, None));
    worker.end().await;
}

#[tokio::test]
async fn five_failed_attempts_are_the_end() {
    let home = Home::new("").await;
    home.record(vec![note()]).await;
    // A file in the directory's place: no attempt can write there.
    std::fs::write(home.path().join("exports"), "in the way").unwrap();
    let id = home.order(&[]).await;
    let worker = home.start();
    for attempt in 1..5 {
        home.until(id, |e| {
            e.attempt == attempt && e.state == ExportState::Queued
        })
        .await;
        home.advance(TimeDelta::minutes(5));
    }
    let export = home.until(id, |e| e.state == ExportState::Failed).await;
    assert_eq!(export.attempt, 5);
    let error = export.error.unwrap();
    assert!(error.starts_with("the file cannot be written: "), "{error}");
    worker.end().await;
}

#[tokio::test]
async fn a_database_that_is_away_is_waited_for_without_spending_an_attempt() {
    let home = Home::new("").await;
    home.record((0..1500).map(|_| note()).collect()).await;
    let id = home.order(&[]).await;
    let store = home.hooked(|call| {
        let answer = if (2..=3).contains(&call) {
            Err(StorageError::from(sqlx::Error::PoolTimedOut))
        } else {
            Ok(())
        };
        async { answer }.boxed()
    });
    let worker = home.start_on(store);
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    assert_eq!((export.rows, export.attempt), (1500, 1));
    worker.end().await;
}

// ---- on schedule ----

#[tokio::test]
async fn a_scheduled_export_follows_the_last_that_arrived_and_is_silent_where_nothing_happened() {
    let home = Home::new("").await;
    let quiet: ContactId = "0190b5f0-7c1e-7d3a-8f00-000000000002".parse().unwrap();
    let hour = TimeDelta::hours(1);
    let job = |when_empty| ScheduleExports {
        name: "hourly".to_owned(),
        settings: ExportJob {
            tenant: tenant(),
            selection: Selection::Contacts(vec![contact(), quiet]),
            audience: Audience::Agent,
            format: ExportFormat::Csv,
            to: vec!["ana@example.com".parse().unwrap()],
            period: Duration::from_hours(3),
            when_empty,
            attach: true,
        },
        exports: home.storage.exports.clone(),
        clock: Arc::new(home.clock.clone()),
        wake: home.wake.clone(),
    };
    let run = async |job: ScheduleExports| {
        let context = RunContext {
            run: RunId::generate(home.now()),
            fence: None,
            scheduled_at: home.now(),
            stop: CancellationToken::new(),
            report: Report::default(),
        };
        job.run(&context).await.unwrap();
        context.report.take()
    };
    let newest = async || {
        let seen = &[Audience::Agent];
        let listed = home.storage.exports.list(&tenant(), seen, None, 1).await;
        listed.unwrap().remove(0)
    };
    let counted = |counts: &Counts, name: &str| counts.get(name).copied().unwrap_or(0);

    home.record(vec![note().occurred_at(home.now() - hour)])
        .await;
    let worker = home.start();
    let counts = run(job(WhenEmpty::Skip)).await;
    assert_eq!(
        (counted(&counts, "exports"), counted(&counts, "empty")),
        (1, 1)
    );
    let first = newest().await;
    assert_eq!(first.request.since, Some(home.now() - hour * 3));
    home.until(first.id, |e| e.state == ExportState::Done).await;
    let counts = run(job(WhenEmpty::Skip)).await;
    assert_eq!(
        (counted(&counts, "exports"), counted(&counts, "repeated")),
        (0, 1)
    );

    home.advance(hour * 5);
    assert_eq!(counted(&run(job(WhenEmpty::Skip)).await, "empty"), 2);
    assert_eq!(newest().await.id, first.id, "nothing new, nothing sent");
    home.record(vec![note().occurred_at(home.now() - hour * 4)])
        .await;
    let counts = run(job(WhenEmpty::Note)).await;
    assert_eq!(
        (counted(&counts, "exports"), counted(&counts, "empty")),
        (2, 0)
    );
    let listed = home
        .storage
        .exports
        .list(&tenant(), &[Audience::Agent], None, 2)
        .await;
    for export in listed.unwrap() {
        let (since, rows) = if export.request.contact_id == quiet {
            (home.now() - hour * 3, 0)
        } else {
            // Farther back than the period, since none has arrived in between.
            (first.request.until.unwrap(), 1)
        };
        assert_eq!(export.request.since, Some(since));
        let done = home
            .until(export.id, |e| e.state == ExportState::Done)
            .await;
        assert_eq!(done.rows, rows);
    }
    worker.end().await;
}

// ---- mail ----

#[tokio::test]
async fn a_mail_goes_over_starttls_with_a_login() {
    let server = Server::start(&["--starttls", "--user", "crm", "--password", "hunter2"]);
    let home = Home::new(&server.config("starttls", true)).await;
    let export = home.send_one().await;
    let [mail] = &server.mails()[..] else {
        panic!("one mail");
    };
    assert_eq!(mail.envelope["tls"], true);
    assert_eq!(mail.envelope["user"], "crm");
    assert_eq!(mail.envelope["rcpt_tos"], json!(["ana@example.com"]));
    assert_eq!(mail.message_id(), export.deliveries[0].message_id);
    assert_eq!(
        attachment(&mail.content).unwrap(),
        std::fs::read(home.file(&export)).unwrap()
    );
}

#[tokio::test]
async fn a_mail_goes_over_tls_and_over_a_plain_line() {
    for (arguments, tls) in [(&["--tls"][..], "tls"), (&[], "none")] {
        let server = Server::start(arguments);
        let home = Home::new(&server.config(tls, false)).await;
        home.send_one().await;
        assert_eq!(server.mails()[0].envelope["tls"], tls == "tls");
    }
}

#[tokio::test]
async fn each_recipient_has_a_mail_of_its_own() {
    let server = Server::start(&[]);
    let home = Home::new(&server.config("none", false)).await;
    let id = home.order(&["ana@example.com", "rui@example.com"]).await;
    let worker = home.start();
    let all_sent = |e: &Export| e.deliveries.iter().all(|d| d.state == DeliveryState::Sent);
    home.until(id, all_sent).await;
    let mails = server.mails();
    assert_eq!(mails.len(), 2);
    assert_ne!(mails[0].message_id(), mails[1].message_id());
    for mail in mails {
        assert_eq!(mail.envelope["rcpt_tos"].as_array().unwrap().len(), 1);
    }
    worker.end().await;
}

#[tokio::test]
async fn a_451_is_tried_again_with_the_same_message_id() {
    for script in [
        "451",
        "greet:421",
        "ehlo:421",
        "mail:450",
        "rcpt:452",
        "data:451",
    ] {
        let server = Server::start(&["--script", script]);
        let home = Home::new(&server.config("none", false)).await;
        let id = home.order(&["ana@example.com"]).await;
        let worker = home.start();
        let first = home.until_state(id, DeliveryState::Deferred).await;
        let error = first.deliveries[0].error.clone().unwrap();
        assert!(!error.contains("ana@"), "{error}");
        assert_eq!(first.state, ExportState::Running);
        home.advance(TimeDelta::minutes(1));
        let then = home.until_state(id, DeliveryState::Sent).await;
        assert_eq!(then.state, ExportState::Done, "{script}");
        assert_eq!(then.deliveries[0].attempt, 2);
        assert_eq!(
            server.mails()[0].message_id(),
            first.deliveries[0].message_id
        );
        worker.end().await;
    }
}

#[tokio::test]
async fn a_server_that_never_greets_costs_its_timeout_and_no_more() {
    let server = Server::start(&["--script", "never-greet"]);
    let home = Home::new(&server.config("none", false)).await;
    let id = home.order(&["ana@example.com"]).await;
    let began = Instant::now();
    let worker = home.start();
    let export = home.until_state(id, DeliveryState::Deferred).await;
    assert_eq!(
        export.deliveries[0].error.as_deref(),
        Some("EHLO: no answer within 2 s")
    );
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    home.advance(TimeDelta::minutes(1));
    home.until_state(id, DeliveryState::Sent).await;
    worker.end().await;
}

#[tokio::test]
async fn a_line_cut_before_data_is_deferred() {
    let server = Server::start(&["--script", "drop-before-data"]);
    let home = Home::new(&server.config("none", false)).await;
    let id = home.order(&["ana@example.com"]).await;
    let worker = home.start();
    home.until_state(id, DeliveryState::Deferred).await;
    assert_eq!(server.mails().len(), 0);
    worker.end().await;
}

#[tokio::test]
async fn a_line_cut_after_data_is_uncertain_and_the_mail_goes_again_under_its_id() {
    for script in ["drop-in-data", "drop-after-data", "hang-after-data"] {
        let server = Server::start(&["--script", script]);
        let home = Home::new(&server.config("none", false)).await;
        let id = home.order(&["ana@example.com"]).await;
        let worker = home.start();
        let export = home.until_state(id, DeliveryState::Uncertain).await;
        assert_eq!(export.state, ExportState::Running, "{script}");
        home.advance(TimeDelta::minutes(1));
        home.until_state(id, DeliveryState::Sent).await;
        let mails = server.mails();
        assert_eq!(mails.len(), if script == "drop-in-data" { 1 } else { 2 });
        for mail in mails {
            assert_eq!(mail.message_id(), export.deliveries[0].message_id);
        }
        worker.end().await;
    }
}

#[tokio::test]
async fn an_uncertain_mail_is_given_up_where_the_configuration_says_so() {
    let server = Server::start(&["--script", "drop-after-data"]);
    let config = format!("{}\nuncertain = \"give_up\"", server.config("none", false));
    let home = Home::new(&config).await;
    let id = home.order(&["ana@example.com"]).await;
    let worker = home.start();
    let export = home.until_state(id, DeliveryState::Dead).await;
    assert_eq!(export.state, ExportState::Failed);
    assert_eq!(server.mails().len(), 1);
    worker.end().await;
}

#[tokio::test]
async fn an_interrupted_mail_is_given_up_where_the_configuration_says_so() {
    let server = Server::start(&[]);
    let config = format!("{}\nuncertain = \"give_up\"", server.config("none", false));
    let home = Home::new(&config).await;
    let id = home.order(&[]).await;
    let worker = home.start();
    home.until(id, |e| e.state == ExportState::Done).await;
    worker.end().await;
    let id = home.render_without_mailing(&["ana@example.com"]).await;
    let exports = &home.storage.exports;
    let dying = Uuid::from_u128(9);
    let until = home.now() + TimeDelta::minutes(1);
    let claimed = exports
        .claim_delivery(dying, home.now(), until)
        .await
        .unwrap();
    assert_eq!(claimed.unwrap().delivery.state, DeliveryState::Pending);
    exports.release(dying).await.unwrap();
    let worker = home.start();
    home.until_state(id, DeliveryState::Dead).await;
    assert_eq!(server.mails().len(), 0);
    worker.end().await;
}

#[tokio::test]
async fn a_550_is_the_end_of_its_mail_but_not_of_the_others() {
    let server = Server::start(&["--script", "rcpt:550"]);
    let home = Home::new(&server.config("none", false)).await;
    let id = home.order(&["nobody@example.com", "ana@example.com"]).await;
    let worker = home.start();
    let ended = |e: &Export| {
        let ends = [DeliveryState::Sent, DeliveryState::Dead];
        e.deliveries.iter().all(|d| ends.contains(&d.state))
    };
    let export = home.until(id, ended).await;
    assert_eq!(export.state, ExportState::Done);
    let dead: Vec<_> = export
        .deliveries
        .iter()
        .filter(|d| d.state == DeliveryState::Dead)
        .collect();
    assert_eq!(dead.len(), 1);
    assert!(dead[0].error.as_ref().unwrap().contains("550"));
    home.advance(TimeDelta::days(1));

    server.script("550");
    let id = home.order(&["ana@example.com"]).await;
    let export = home.until_state(id, DeliveryState::Dead).await;
    assert_eq!(export.state, ExportState::Failed);
    assert_eq!(server.mails().len(), 1);
    worker.end().await;
}

#[tokio::test]
async fn a_552_sends_the_mail_without_the_file() {
    for script in ["552", "mail:552"] {
        let server = Server::start(&["--script", script]);
        let home = Home::new(&server.config("none", false)).await;
        let export = home.send_one().await;
        assert_eq!(export.deliveries[0].attempt, 1, "{script}");
        let mail = &server.mails()[0];
        assert_eq!(attachment(&mail.content), None);
        let text = mail.words();
        assert!(text.contains("the mail server does not take its"), "{text}");
        assert_eq!(home.behind(&link_in(&text)).await, Some(export.id));
    }
}

#[tokio::test]
async fn a_file_over_the_limit_of_the_configuration_or_the_server_is_linked() {
    for (arguments, further, reason) in [
        (
            &[][..],
            "\nmax_attachment = \"100B\"",
            "a mail may carry 100 bytes",
        ),
        (&["--size", "6000"], "", "the mail server does not take its"),
    ] {
        let server = Server::start(arguments);
        let home = Home::new(&format!("{}{further}", server.config("none", false))).await;
        home.record((0..20).map(|_| note().title("x".repeat(400))).collect())
            .await;
        home.send_one().await;
        let mail = &server.mails()[0];
        assert_eq!(attachment(&mail.content), None);
        assert!(mail.words().contains(reason), "{}", mail.words());
    }
}

#[tokio::test]
async fn whoever_wants_a_link_gets_one() {
    let home = Home::new("").await;
    let id = home
        .order_with(|request| {
            request.to = vec!["ana@example.com".to_owned()];
            request.attach = false;
        })
        .await;
    let worker = home.start();
    let export = home.until(id, |e| e.state == ExportState::Done).await;
    let (local, _) = export.deliveries[0].message_id.split_once('@').unwrap();
    let path = home.path().join("outbox").join(format!("{local}.eml"));
    let mail = std::fs::read_to_string(path).unwrap();
    assert_eq!(attachment(&mail), None);
    assert_eq!(home.behind(&link_in(&mail)).await, Some(id));
    let [link] = &home.export(id).await.links[..] else {
        panic!("one mail, one link");
    };
    assert_eq!(link.message_id, export.deliveries[0].message_id);
    assert_eq!(Some(link.expires_at), export.expires_at);
    worker.end().await;
}

#[tokio::test]
async fn a_mail_that_is_tried_again_carries_the_same_link_and_each_recipient_has_another() {
    let server = Server::start(&["--script", "drop-after-data"]);
    let home = Home::new(&server.config("none", false)).await;
    let id = home
        .order_with(|request| {
            request.to = vec!["ana@example.com".to_owned(), "rui@example.com".to_owned()];
            request.attach = false;
        })
        .await;
    let worker = home.start();
    home.until_state(id, DeliveryState::Uncertain).await;
    home.advance(TimeDelta::minutes(1));
    let all_sent = |e: &Export| e.deliveries.iter().all(|d| d.state == DeliveryState::Sent);
    home.until(id, all_sent).await;
    let mails = server.mails();
    assert_eq!(mails.len(), 3);
    let mut links: Vec<_> = mails
        .iter()
        .map(|mail| (mail.message_id(), link_in(&mail.words())))
        .collect();
    links.sort();
    links.dedup();
    assert_eq!(links.len(), 2, "{links:?}");
    assert_eq!(home.export(id).await.links.len(), 2);
    for (_, link) in links {
        assert_eq!(home.behind(&link).await, Some(id));
    }
    home.advance(TimeDelta::days(7));
    for mail in mails {
        assert_eq!(home.behind(&link_in(&mail.words())).await, None, "expired");
    }
    worker.end().await;
}

#[tokio::test]
async fn refused_credentials_hold_all_mail_and_cost_none_of_it() {
    for (phase, code) in [("auth", 535), ("mail", 530)] {
        let script = format!("{phase}:{code}");
        let user = ["--starttls", "--user", "crm", "--password", "hunter2"];
        let server = Server::start(&[&user[..], &["--script", &script]].concat());
        let home = Home::new(&server.config("starttls", true)).await;
        let id = home.order(&["ana@example.com", "rui@example.com"]).await;
        let worker = home.start();
        let export = home.until_state(id, DeliveryState::Deferred).await;
        // While the clock stands still nothing more is tried: the other export is rendered after
        // the refusal, and the worker goes on for more than a look at the queue.
        let later = home.order(&["eva@example.com"]).await;
        home.until(later, |e| e.rendered_at.is_some()).await;
        home.looked_twice().await;
        let tried: u32 = home
            .export(id)
            .await
            .deliveries
            .iter()
            .map(|d| d.attempt)
            .sum();
        assert_eq!(tried, 1, "{script}");
        assert_eq!(home.export(later).await.deliveries[0].attempt, 0);
        let deferred = export.deliveries.iter().find(|d| d.attempt == 1).unwrap();
        let error = deferred.error.as_deref().unwrap();
        assert_eq!(
            error,
            format!("the server refused our credentials ({code})")
        );
        home.advance(TimeDelta::minutes(1));
        for id in [id, later] {
            let all_sent = |e: &Export| e.deliveries.iter().all(|d| d.state == DeliveryState::Sent);
            home.until(id, all_sent).await;
        }
        worker.end().await;
    }
}

#[tokio::test]
async fn a_server_without_starttls_gets_nothing_in_clear() {
    let server = Server::start(&[]);
    let home = Home::new(&server.config("starttls", false)).await;
    let id = home.order(&["ana@example.com"]).await;
    let worker = home.start();
    let export = home.until_state(id, DeliveryState::Deferred).await;
    let error = export.deliveries[0].error.clone().unwrap();
    assert!(error.contains("does not offer STARTTLS"), "{error}");
    assert_eq!(server.mails().len(), 0);
    worker.end().await;
}

#[tokio::test]
async fn a_certificate_that_nobody_vouches_for_is_not_trusted() {
    for (argument, tls) in [("--starttls", "starttls"), ("--tls", "tls")] {
        let server = Server::start(&[argument]);
        let config = server.config(tls, false);
        let without_ca: String =
            config.split(", ca = ").next().unwrap().to_owned() + ", timeout = \"2s\" }";
        let home = Home::new(&without_ca).await;
        let id = home.order(&["ana@example.com"]).await;
        let worker = home.start();
        home.until_state(id, DeliveryState::Deferred).await;
        assert_eq!(server.mails().len(), 0);
        worker.end().await;
    }
}

#[tokio::test]
async fn a_password_travels_in_clear_only_within_the_machine() {
    let server = Server::start(&["--user", "crm", "--password", "hunter2"]);
    let home = Home::new(&server.config("none", true)).await;
    home.send_one().await;
    assert_eq!(server.mails()[0].envelope["user"], "crm");

    let config = server
        .config("none", true)
        .replace("localhost", "mail.example.com");
    let error = Mailer::new(&load(home.path(), &config).mail).unwrap_err();
    assert!(
        matches!(error, MailerError::ClearPassword { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_mail_is_given_up_after_48_hours_of_trying() {
    let server = Server::start(&["--script", "451*100"]);
    let home = Home::new(&server.config("none", false)).await;
    let id = home.order(&["ana@example.com"]).await;
    let worker = home.start();
    for attempt in 1..=11 {
        let export = home
            .until(id, |e| {
                e.deliveries[0].attempt == attempt
                    && e.deliveries[0].state == DeliveryState::Deferred
            })
            .await;
        let next = export.deliveries[0].next_attempt_at.unwrap();
        let wait = next - home.now();
        assert!(
            wait >= TimeDelta::seconds(30) && wait <= TimeDelta::hours(4),
            "{wait}"
        );
        home.advance(wait);
    }
    home.advance(TimeDelta::hours(48));
    let export = home.until_state(id, DeliveryState::Dead).await;
    assert!(
        export.deliveries[0]
            .error
            .as_ref()
            .unwrap()
            .starts_with("given up after 48 hours")
    );
    assert_eq!(export.state, ExportState::Failed);
    worker.end().await;
}

// ---- what the tests stand on ----

fn start() -> DateTime<Utc> {
    // in summer, so that Lisbon is not UTC
    "2026-06-01T10:00:00Z".parse().unwrap()
}

fn tenant() -> TenantId {
    TenantId::new("acme").unwrap()
}

fn contact() -> ContactId {
    "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap()
}

fn note() -> NewContactEvent {
    NewContactEvent::new(
        contact(),
        event_types::NOTE_ADDED,
        Category::Note,
        Source::Agent,
    )
}

/// An installation: its directory, database and configuration.
struct Home {
    directory: tempfile::TempDir,
    storage: Storage,
    clock: ManualClock,
    wake: Arc<Notify>,
    config: Config,
}

fn load(home: &Path, mail: &str) -> Config {
    let file = home.join("timelined.toml");
    let text =
        format!("state_directory = {home:?}\n[mail]\nfrom = \"CRM <crm@example.com>\"\n{mail}\n");
    std::fs::write(&file, text).unwrap();
    std::fs::write(home.join("password"), "hunter2").unwrap();
    let request = config::Request {
        explicit_file: Some(file),
        environment: Vec::new(),
        working_directory: home.to_owned(),
    };
    config::load(&request)
        .unwrap_or_else(|errors| panic!("{errors}"))
        .config
}

impl Home {
    /// `mail` is what `[mail]` says beside `from`.
    async fn new(mail: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = load(directory.path(), mail);
        let file = directory.path().join("timelined.db");
        let storage = Storage::sqlite(SqliteStorage::open(&file, false).await.unwrap());
        storage.migrate().await.unwrap();
        Self {
            directory,
            storage,
            clock: ManualClock::at(start()),
            wake: Arc::new(Notify::new()),
            config,
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn now(&self) -> DateTime<Utc> {
        use timelined::domain::Clock;
        self.clock.now()
    }

    fn file(&self, export: &Export) -> PathBuf {
        self.path()
            .join("exports")
            .join(export.file_name.as_ref().unwrap())
    }

    async fn record(&self, events: Vec<NewContactEvent>) -> Vec<ContactEvent> {
        let recorded: Vec<_> = events
            .into_iter()
            .map(|event| event.record(&tenant(), self.now()).unwrap())
            .collect();
        let batch = recorded
            .iter()
            .map(|event| Recording {
                event: event.clone(),
                idempotency: None,
            })
            .collect();
        self.storage.events.save(&tenant(), batch).await.unwrap();
        recorded
    }

    async fn order(&self, to: &[&str]) -> ExportId {
        self.order_with(|request| request.to = to.iter().map(ToString::to_string).collect())
            .await
    }

    async fn order_with(&self, change: impl FnOnce(&mut ExportRequest)) -> ExportId {
        let mut request = ExportRequest {
            contact_id: contact(),
            format: "csv".to_owned(),
            audience: Audience::Agent,
            since: None,
            until: None,
            categories: Vec::new(),
            timezone: chrono_tz::Europe::Lisbon,
            redact: Vec::new(),
            to: Vec::new(),
            attach: true,
        };
        change(&mut request);
        let id = ExportId::generate(self.now());
        let message_ids = (0..request.to.len())
            .map(|i| format!("{id}.{i}@crm.example.com"))
            .collect();
        let export = NewExport {
            id,
            tenant_id: tenant(),
            request,
            requested_by: Subject::new("test").unwrap(),
            request_key: None,
            message_ids,
            created_at: self.now(),
        };
        assert_eq!(self.storage.exports.create_one(&export).await.unwrap(), id);
        self.wake.notify_one();
        id
    }

    /// As a worker that died between the file and the mails leaves it.
    async fn render_without_mailing(&self, to: &[&str]) -> ExportId {
        let id = self.order(to).await;
        let (exports, worker) = (&self.storage.exports, Uuid::from_u128(8));
        let until = self.now() + TimeDelta::minutes(1);
        let export = exports
            .claim_render(worker, self.now(), until)
            .await
            .unwrap()
            .unwrap();
        std::fs::write(self.path().join("exports/made.csv"), "id\r\n").unwrap();
        let file = Rendered {
            rows: 0,
            bytes: 4,
            sha256: sha256(b"id\r\n"),
            file_name: "made.csv".to_owned(),
            at: self.now(),
            expires_at: self.now() + TimeDelta::days(7),
        };
        assert!(exports.rendered(&export, worker, &file).await.unwrap());
        id
    }

    async fn export(&self, id: ExportId) -> Export {
        self.storage
            .exports
            .find(&tenant(), id)
            .await
            .unwrap()
            .unwrap()
    }

    /// Waits until the export is as `is` says.
    async fn until(&self, id: ExportId, is: impl Fn(&Export) -> bool) -> Export {
        let began = Instant::now();
        loop {
            let export = self.export(id).await;
            if is(&export) {
                return export;
            }
            assert!(began.elapsed() < PATIENCE, "still so: {export:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until some mail of the export is in `state`.
    async fn until_state(&self, id: ExportId, state: DeliveryState) -> Export {
        self.until(id, |e| e.deliveries.iter().any(|d| d.state == state))
            .await
    }

    /// The export that a link leads to now.
    async fn behind(&self, link: &str) -> Option<ExportId> {
        let hash = link_hash(link).expect("it is a link");
        let found = self.storage.exports.linked(&hash, self.now()).await;
        found.unwrap().map(|export| export.id)
    }

    fn advance(&self, by: TimeDelta) {
        self.clock.advance(by);
        self.wake.notify_one();
    }

    /// Waits until the worker has rendered two more exports: each wakes the mails too.
    async fn looked_twice(&self) {
        for _ in 0..2 {
            let id = self.order(&[]).await;
            self.until(id, |e| e.state == ExportState::Done).await;
        }
    }

    /// Orders an export to Ana and waits until it is sent.
    async fn send_one(&self) -> Export {
        let id = self.order(&["ana@example.com"]).await;
        let worker = self.start();
        let export = self.until_state(id, DeliveryState::Sent).await;
        worker.end().await;
        export
    }

    fn start(&self) -> Worker {
        self.start_on(self.storage.exports.clone())
    }

    fn start_on(&self, store: Arc<dyn ExportStore>) -> Worker {
        static WORKERS: AtomicU32 = AtomicU32::new(100);
        let id = Uuid::from_u128(WORKERS.fetch_add(1, Ordering::SeqCst).into());
        let settings = Settings {
            directory: self.config.export.directory.clone(),
            keep: self.config.export.keep,
            paper: timelined::export::Paper::default(),
            public_url: "https://crm.example.com".to_owned(),
            link_key: LinkKey::new([7; 32]),
            worker: id,
            from: self.config.mail.from.clone(),
            max_attachment: self.config.mail.max_attachment,
            uncertain: self.config.mail.uncertain,
        };
        let mailer = Mailer::new(&self.config.mail).unwrap();
        let clock = Arc::new(self.clock.clone());
        let exporter = Exporter::new(store, Arc::new(mailer), clock, settings, self.wake.clone());
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let task = TaskTracker::new().spawn(exporter.run(stop.clone(), abort.clone()));
        Worker {
            id,
            task,
            stop,
            abort,
        }
    }

    /// A store that runs `before` ahead of each page, which it tells the number of.
    fn hooked(
        &self,
        before: impl Fn(u32) -> BoxFuture<'static, StorageResult<()>> + Send + Sync + 'static,
    ) -> Arc<dyn ExportStore> {
        Arc::new(Hooked {
            inner: self.storage.exports.clone(),
            calls: AtomicU32::new(0),
            before: Box::new(before),
            dies_before_expire: false,
        })
    }

    /// A store that stops before the second page until the gate is opened.
    fn gated(&self) -> (Arc<Gate>, Arc<dyn ExportStore>) {
        let gate = Arc::new(Gate {
            calls: AtomicU32::new(0),
            reached: Notify::new(),
            open: Semaphore::new(0),
        });
        let at_gate = gate.clone();
        let store = self.hooked(move |call| {
            let gate = at_gate.clone();
            async move {
                gate.calls.store(call, Ordering::SeqCst);
                gate.reached.notify_one();
                if call > 1 {
                    drop(
                        gate.open
                            .acquire()
                            .await
                            .expect("the gate is never closed for good"),
                    );
                }
                Ok(())
            }
            .boxed()
        });
        (gate, store)
    }
}

struct Gate {
    calls: AtomicU32,
    reached: Notify,
    open: Semaphore,
}

impl Gate {
    async fn reached(&self, call: u32) {
        let wait = async {
            while self.calls.load(Ordering::SeqCst) < call {
                self.reached.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .expect("the page is asked for");
    }

    fn open(&self) {
        self.open.add_permits(1000);
    }
}

/// An exporter at work.
struct Worker {
    id: Uuid,
    task: JoinHandle<()>,
    stop: CancellationToken,
    abort: CancellationToken,
}

impl Worker {
    async fn end(self) {
        self.stop.cancel();
        self.ended().await;
    }

    async fn ended(self) {
        let ended = tokio::time::timeout(PATIENCE, self.task).await;
        ended.expect("it ends").expect("it does not panic");
    }

    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

struct Hooked {
    inner: Arc<dyn ExportStore>,
    calls: AtomicU32,
    before: Box<dyn Fn(u32) -> BoxFuture<'static, StorageResult<()>> + Send + Sync>,
    dies_before_expire: bool,
}

#[async_trait]
impl ExportStore for Hooked {
    async fn create(
        &self,
        exports: &[NewExport],
        fence: Option<Fence>,
    ) -> StorageResult<Vec<ExportId>> {
        self.inner.create(exports, fence).await
    }

    async fn find(&self, tenant: &TenantId, id: ExportId) -> StorageResult<Option<Export>> {
        self.inner.find(tenant, id).await
    }

    async fn list(
        &self,
        tenant: &TenantId,
        audiences: &[Audience],
        before: Option<ExportId>,
        limit: u32,
    ) -> StorageResult<Vec<Export>> {
        self.inner.list(tenant, audiences, before, limit).await
    }

    async fn claim_render(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<Export>> {
        self.inner.claim_render(worker, now, until).await
    }

    async fn progress(
        &self,
        export: &Export,
        worker: Uuid,
        rows: u64,
        total: u64,
        until: DateTime<Utc>,
    ) -> StorageResult<bool> {
        self.inner
            .progress(export, worker, rows, total, until)
            .await
    }

    async fn rendered(
        &self,
        export: &Export,
        worker: Uuid,
        file: &Rendered,
    ) -> StorageResult<bool> {
        self.inner.rendered(export, worker, file).await
    }

    async fn render_failed(
        &self,
        export: &Export,
        worker: Uuid,
        error: &str,
        next_attempt_at: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        self.inner
            .render_failed(export, worker, error, next_attempt_at, now)
            .await
    }

    async fn claim_delivery(
        &self,
        worker: Uuid,
        now: DateTime<Utc>,
        until: DateTime<Utc>,
    ) -> StorageResult<Option<ClaimedDelivery>> {
        self.inner.claim_delivery(worker, now, until).await
    }

    async fn delivery_ended(
        &self,
        claimed: &ClaimedDelivery,
        worker: Uuid,
        outcome: &DeliveryOutcome,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        self.inner
            .delivery_ended(claimed, worker, outcome, now)
            .await
    }

    async fn add_link(
        &self,
        claimed: &ClaimedDelivery,
        hash: &str,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        self.inner.add_link(claimed, hash, now).await
    }

    async fn linked(&self, hash: &str, now: DateTime<Utc>) -> StorageResult<Option<Export>> {
        self.inner.linked(hash, now).await
    }

    async fn downloaded(
        &self,
        tenant: &TenantId,
        id: ExportId,
        link: Option<&str>,
        now: DateTime<Utc>,
    ) -> StorageResult<()> {
        self.inner.downloaded(tenant, id, link, now).await
    }

    async fn cancel(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        self.inner.cancel(tenant, id, by, now).await
    }

    async fn resend(
        &self,
        tenant: &TenantId,
        id: ExportId,
        mails: &[NewMail],
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        self.inner.resend(tenant, id, mails, by, now).await
    }

    async fn discard(
        &self,
        tenant: &TenantId,
        id: ExportId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<bool> {
        self.inner.discard(tenant, id, by, now).await
    }

    async fn release(&self, worker: Uuid) -> StorageResult<()> {
        self.inner.release(worker).await
    }

    async fn old_files(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<Vec<OldFile>> {
        self.inner.old_files(now, limit).await
    }

    async fn expire(&self, files: &[OldFile]) -> StorageResult<()> {
        assert!(!self.dies_before_expire, "killed");
        self.inner.expire(files).await
    }

    async fn rows(
        &self,
        export: &Export,
        after: Option<Key>,
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Slice> {
        (self.before)(self.calls.fetch_add(1, Ordering::SeqCst) + 1).await?;
        self.inner.rows(export, after, now, limit).await
    }

    async fn count_rows(&self, export: &Export, now: DateTime<Utc>) -> StorageResult<u64> {
        self.inner.count_rows(export, now).await
    }

    async fn last_ends(
        &self,
        tenant: &TenantId,
        by: &Subject,
        contacts: &[ContactId],
    ) -> StorageResult<HashMap<ContactId, DateTime<Utc>>> {
        self.inner.last_ends(tenant, by, contacts).await
    }

    async fn with_news(
        &self,
        tenant: &TenantId,
        audience: Audience,
        contacts: &[(ContactId, DateTime<Utc>)],
        until: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> StorageResult<Vec<ContactId>> {
        self.inner
            .with_news(tenant, audience, contacts, until, now)
            .await
    }

    async fn active_contacts(
        &self,
        tenant: &TenantId,
        since: DateTime<Utc>,
        category: Option<Category>,
        after: Option<ContactId>,
        limit: u32,
    ) -> StorageResult<Vec<ContactId>> {
        self.inner
            .active_contacts(tenant, since, category, after, limit)
            .await
    }
}

/// The link that a mail carries.
fn link_in(mail: &str) -> String {
    let (_, rest) = mail.split_once("https://crm.example.com/d/").unwrap();
    rest.chars().take(22).collect()
}

fn parse(bytes: &[u8]) -> Vec<HashMap<String, String>> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap();
    csv::Reader::from_reader(text)
        .deserialize()
        .map(Result::unwrap)
        .collect()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

async fn eventually(is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < PATIENCE, "it does not come true");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
