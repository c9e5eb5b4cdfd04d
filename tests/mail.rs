//! Exports through a mail server that fails in a fifth of the cases, by a daemon that is killed again
//! and again: each arrives, and none twice without a reason.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that panics fails, and its tasks end with its runtime"
)]

mod support;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use support::builders::contact;
use support::daemon::{Settings, TestDaemon, service};
use support::smtp::{Server, attachment};

/// What goes wrong, each once in 35 mails, between four that go well.
const FAULTS: [&str; 7] = [
    "greet:421",
    "451",
    "552",
    "never-greet",
    "drop-before-data",
    "drop-in-data",
    AFTER_DATA,
];
/// The only fault after which a mail may come twice.
const AFTER_DATA: &str = "drop-after-data";

/// Exports and kills: 40 and 2, or 500 and 10 in the long form.
fn size() -> (u32, u32) {
    if std::env::var_os("SOAK").is_some() {
        (500, 10)
    } else {
        (40, 2)
    }
}

/// The database of the daemon, read and written beside it.
struct Queue(SqliteConnection);

impl Queue {
    async fn open(settings: &Settings) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(settings.state().join("timelined.db"))
            .busy_timeout(Duration::from_secs(10));
        Self(SqliteConnection::connect_with(&options).await.unwrap())
    }

    async fn sent(&mut self) -> u32 {
        let sent = "select count(*) from export_deliveries where state = 'sent'";
        sqlx::query_scalar(sent)
            .fetch_one(&mut self.0)
            .await
            .unwrap()
    }

    /// Lets the minutes pass that mails wait for: what is to be tried again is tried now.
    async fn hasten(&mut self) {
        let hasten = "update export_deliveries set next_attempt_at = 0
                      where state in ('deferred', 'uncertain') and next_attempt_at > 0";
        sqlx::query(hasten).execute(&mut self.0).await.unwrap();
    }
}

async fn created(daemon: &TestDaemon, path: &str, body: &Value) -> Value {
    let (status, answer) = daemon.post(path, &service("acme"), body).await;
    assert!([201, 202].contains(&status), "{status} {answer}");
    answer
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[tokio::test]
async fn every_export_arrives_through_faults_and_kills_and_twice_only_where_that_cannot_be_known() {
    let (exports, kills) = size();
    let script: Vec<String> = (0..exports.div_ceil(5) as usize)
        .map(|n| format!("{},ok*4", FAULTS[n % FAULTS.len()]))
        .collect();
    let cut_after = script.iter().filter(|part| part.starts_with(AFTER_DATA));
    let cut_after = u32::try_from(cut_after.count()).unwrap();
    let login = ["--starttls", "--user", "crm", "--password", "hunter2"];
    let server = Server::start(&[&login[..], &["--script", &script.join(",")]].concat());
    let settings = Settings::new().config(&format!(
        "[mail]\nfrom = \"CRM <crm@example.com>\"\n{}\n",
        server.config("starttls", true)
    ));
    std::fs::create_dir(settings.state()).unwrap();
    std::fs::write(settings.state().join("password"), "hunter2").unwrap();
    let mut daemon = settings.start();
    let mut asked = Vec::new();
    for number in 0..exports {
        let contact = contact(1000 + u64::from(number));
        let event = json!({
            "event_type": "note_added", "category": "note", "source": "agent",
            "title": format!("note {number}"), "visible_to_client": true,
        });
        created(
            &daemon,
            &format!("/api/v1/contacts/{contact}/events"),
            &event,
        )
        .await;
        let export = json!({ "format": "csv", "to": ["ana@example.com"] });
        let path = format!("/api/v1/contacts/{contact}/exports");
        asked.push(
            created(&daemon, &path, &export).await["href"]
                .as_str()
                .unwrap()
                .to_owned(),
        );
    }

    let mut queue = Queue::open(&settings).await;
    let began = Instant::now();
    let (mut killed, mut sent) = (0, 0);
    while sent < exports {
        assert!(
            began.elapsed() < Duration::from_secs(60 + u64::from(exports)),
            "{sent} of {exports} are sent, {killed} kills:\n{}",
            daemon.log()
        );
        if killed < kills && sent >= exports * (killed + 1) / (kills + 1) {
            daemon.kill();
            killed += 1;
            daemon.again();
        }
        queue.hasten().await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        sent = queue.sent().await;
    }
    assert_eq!(killed, kills);

    let mut arrived: HashMap<String, Vec<_>> = HashMap::new();
    let mails = server.mails();
    let copies = u32::try_from(mails.len()).unwrap();
    for mail in mails {
        assert_eq!(
            (&mail.envelope["tls"], &mail.envelope["user"]),
            (&json!(true), &json!("crm"))
        );
        arrived.entry(mail.message_id()).or_default().push(mail);
    }
    assert_eq!(arrived.len(), exports as usize, "each has one Message-ID");
    let mut linked = 0;
    for href in asked {
        let (_, export) = daemon.get(&href, &service("acme")).await;
        assert_eq!(export["state"], "done", "{export}");
        for mail in &arrived[export["deliveries"][0]["message_id"].as_str().unwrap()] {
            let file = if let Some(file) = attachment(&mail.content) {
                file
            } else {
                linked += 1;
                let words = mail.words();
                let (_, link) = words.split_once("/d/").unwrap();
                let request = daemon.http.get(daemon.url(&format!("/d/{}", &link[..22])));
                let file = request.send().await.unwrap();
                assert_eq!(file.status(), 200);
                file.bytes().await.unwrap().to_vec()
            };
            assert_eq!(sha256(&file), export["sha256"].as_str().unwrap());
        }
    }
    assert!(linked > 0, "a 552 was answered with a link");
    let repeats = copies - exports;
    assert!(
        repeats <= cut_after + kills,
        "{repeats} mails came again, after {cut_after} lines cut after DATA and {kills} kills"
    );
    eprintln!(
        "{exports} exports, {killed} kills, {repeats} repeats, {linked} links in {:?}",
        began.elapsed()
    );
}
