//! `timelined export`: to a file, to a pipe, and by mail through a server that fails at first.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use chrono::TimeDelta;
use timelined::domain::ContactEvent;

use crate::support::builders::{Record as _, acme, event_of, minutes, t0};
use crate::support::daemon::Settings;
use crate::support::database::Database;
use crate::support::smtp::{Server, attachment};
use crate::{CONTACT, bounded, on, run};

/// Three events of the contact, the last one for the client too.
async fn given_a_timeline(db: &Database) -> Vec<ContactEvent> {
    let contact = CONTACT.parse().unwrap();
    let events: Vec<_> = ["=1+1", "two", "three"]
        .iter()
        .enumerate()
        .map(|(at, title)| {
            event_of(contact)
                .title(*title)
                .visible_to_client(at == 2)
                .occurred_at(t0() - minutes(10 - i64::try_from(at).unwrap()))
                .recorded()
        })
        .collect();
    db.given(&acme(), events.clone()).await;
    events
}

/// The ids and titles of a CSV, in its order.
fn rows(csv: &[u8]) -> Vec<(String, String)> {
    let text = csv
        .strip_prefix(b"\xef\xbb\xbf")
        .expect("it begins with a BOM");
    let mut reader = csv::Reader::from_reader(text);
    let columns = reader.headers().unwrap().clone();
    let of = |name: &str| columns.iter().position(|column| column == name).unwrap();
    let (id, title) = (of("id"), of("title"));
    reader
        .records()
        .map(|row| {
            row.map(|row| (row[id].to_owned(), row[title].to_owned()))
                .unwrap()
        })
        .collect()
}

/// What the CSV of an agent must have, oldest or newest first.
fn expected(events: &[ContactEvent]) -> Vec<(String, String)> {
    let guarded = |title: &str| {
        title
            .strip_prefix('=')
            .map_or(title.to_owned(), |rest| format!("'={rest}"))
    };
    let mut rows: Vec<_> = events
        .iter()
        .map(|event| {
            (
                event.id.to_string(),
                guarded(event.title.as_deref().unwrap()),
            )
        })
        .collect();
    rows.sort();
    rows
}

fn sorted(mut rows: Vec<(String, String)>) -> Vec<(String, String)> {
    rows.sort();
    rows
}

on_both_engines! {
    async fn a_timeline_is_exported_to_a_file_and_to_a_pipe(db) {
        let events = given_a_timeline(db).await;
        let settings = on(db).await;
        let export = |more: &[&str]| run(&settings, &[&["export", CONTACT, "--tenant", "acme", "--format", "csv"], more].concat());
        let said = export(&["--audience", "agent", "--output", "timeline.csv"]);
        assert_eq!((said.err.as_str(), said.out.as_str()), ("", "3 events in timeline.csv\n"));
        let file = settings.state().with_file_name("timeline.csv");
        let content = fs::read(&file).unwrap();
        assert_eq!(sorted(rows(&content)), expected(&events));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

        let piped = export(&["--audience", "agent", "--output", "-"]);
        assert_eq!(piped.err, "3 events\n");
        assert_eq!(piped.done().as_bytes(), content);

        let clients = export(&["--output", "-"]);
        assert_eq!(rows(clients.done().as_bytes()), [(events[2].id.to_string(), "three".to_owned())]);
        let shown = export(&["--audience", "agent", "--output", "again.csv", "--json"]).json();
        assert_eq!((&shown["rows"], &shown["state"]), (&3.into(), &"done".into()));
        assert_eq!(shown["bytes"], content.len());
        let foreign = run(&settings, &["export", CONTACT, "--tenant", "globex", "--output", "-"]);
        assert_eq!(rows(foreign.done().as_bytes()), []);
        export(&["--output", "none/such.csv"]).failed_saying(1, "timelined: cannot write none/such.csv: No such file");
    }

    async fn a_timeline_is_mailed_although_the_server_refuses_the_first_try(db) {
        let events = given_a_timeline(db).await;
        let server = Server::start(&["--script", "451"]);
        let settings = on(db).await.config(&format!("[mail]\n{}\n", server.config("none", false)));
        let arguments = ["export", CONTACT, "--tenant", "acme", "--format", "csv", "--audience", "agent", "--to", "ana@example.com"];
        let mut command = bounded(&settings.command(&arguments));
        let mut export = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It looks now and then: what changed before it looked again would not be told.
        let mut talk = BufReader::new(export.stderr.take().unwrap());
        let mut said = String::new();
        talk.read_line(&mut said).unwrap();
        assert!(said.starts_with("the mail will be tried again: ") && said.contains("451"), "{said}");
        assert_eq!(db.count("export_deliveries where state = 'deferred'").await, 1);
        assert_eq!(server.mails().len(), 0);
        // Instead of the minute that it waits.
        let due = db.at(t0() - TimeDelta::days(1));
        db.execute(&format!("update export_deliveries set next_attempt_at = {due}")).await.unwrap();
        let output = tokio::task::spawn_blocking(|| export.wait_with_output().unwrap()).await.unwrap();
        talk.read_to_string(&mut said).unwrap();
        assert_eq!(output.status.code(), Some(0), "{said}");
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "sent 3 events to 1 recipients\n");

        let mails = server.mails();
        assert_eq!(mails.len(), 1);
        assert_eq!(mails[0].envelope["rcpt_tos"], serde_json::json!(["ana@example.com"]));
        assert_eq!(sorted(rows(&attachment(&mails[0].content).unwrap())), expected(&events));
    }
}

#[test]
fn a_mail_that_no_server_will_take_is_a_failure() {
    let server = Server::start(&["--script", "rcpt:550"]);
    let settings = Settings::new().config(&format!("[mail]\n{}\n", server.config("none", false)));
    run(
        &settings,
        &[
            "export",
            CONTACT,
            "--tenant",
            "acme",
            "--to",
            "nobody@example.com",
        ],
    )
    .failed_saying(1, "550");
}

#[test]
fn an_export_to_another_domain_than_the_configured_ones_is_a_wrong_use() {
    let settings = Settings::new().env("TIMELINED__MAIL__ALLOWED_DOMAINS", "globex:example.com");
    let to = [
        "export",
        CONTACT,
        "--tenant",
        "acme",
        "--to",
        "ana@example.com",
    ];
    run(&settings, &to).failed_saying(2, "mail.allowed_domains");
}
