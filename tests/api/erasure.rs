//! Erasure over HTTP, with the files and the sockets; and its replay on a restored database.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use super::ask::{Answer, PATIENCE, daemon, get, id_of, post_json, record, send};
use timelined::domain::{Clock as _, ErasureId, SystemClock};
use timelined::storage::{Erasure, ErasureState};

use crate::support::builders::{Record as _, acme, contact, event_of, minutes, subject};
use crate::support::daemon::{Settings, TestDaemon, agent, eventually, service};
use crate::support::database::Engine;
use crate::support::socket::Socket;

async fn erase(daemon: &TestDaemon, number: u64, tenant: &str) -> Answer {
    let path = format!("/api/v1/contacts/{}/events", contact(number));
    send(daemon.request(Method::DELETE, &path, &service(tenant))).await
}

/// Exports a timeline by mail; answers the export's id when the mail is out.
async fn export(daemon: &TestDaemon, number: u64) -> String {
    let path = format!("/api/v1/contacts/{}/exports", contact(number));
    let given = json!({ "format": "csv", "audience": "agent", "to": ["ann@example.com"] });
    let asked = post_json(daemon, &path, &service("acme"), &given)
        .await
        .json();
    let id = id_of(&asked).to_owned();
    let href = format!("/api/v1/exports/{id}");
    eventually("the mail is out", PATIENCE, async || {
        get(daemon, &href, &service("acme")).await.json()["deliveries"][0]["state"] == "sent"
    })
    .await;
    id
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The lines of the ledger beside the database.
fn book(state: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(state.join("erasures.jsonl")).unwrap_or_default();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

on_both_engines! {
    async fn an_erased_contact_leaves_nothing_but_a_line_in_the_ledger(db) {
        let daemon = daemon(db).await;
        let mut events = Vec::new();
        for n in 0..5 {
            events.push(record(&daemon, contact(1), json!({ "is_realtime": n == 0 })).await);
        }
        let other = record(&daemon, contact(2), json!({})).await;
        let hidden = record(&daemon, contact(1), json!({ "visible_to_agent": false })).await;
        let (mine, others) = (export(&daemon, 1).await, export(&daemon, 2).await);
        let contacts = [contact(1).to_string()];
        let (mut socket, _) = Socket::watching(&daemon.address, &agent("acme"), &contacts).await;

        let answer = erase(&daemon, 1, "acme").await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let erased = answer.json();
        assert_eq!((&erased["events"], &erased["exports"]), (&json!(6), &json!(1)));
        assert_eq!((&erased["requested_by"], &erased["contact_id"]), (&json!("service"), &json!(contact(1))));
        let mut removed = Vec::new();
        while removed.len() < events.len() {
            let frame = socket.next().await;
            if frame["type"] == "removed" {
                removed.push(frame["event_id"].clone());
            }
        }
        assert!(events.iter().all(|event| removed.contains(&event["id"])), "{removed:?}");
        assert!(!removed.contains(&hidden["id"]));

        for event in events.iter().chain([&hidden]) {
            let path = format!("/api/v1/contact-events/{}", id_of(event));
            get(&daemon, &path, &service("acme")).await.problem(404, "erased");
        }
        let path = format!("/api/v1/contact-events/{}", id_of(&other));
        assert_eq!(get(&daemon, &path, &service("acme")).await.status, 200);
        get(&daemon, &format!("/api/v1/exports/{mine}"), &service("acme")).await.problem(404, "its export");
        assert_eq!(names(&daemon.state.join("exports")), [format!("{others}.csv")]);
        assert_eq!(names(&daemon.state.join("outbox")), [format!("{others}.1.eml")]);
        let [line] = book(&daemon.state).try_into().unwrap();
        assert_eq!((&line["id"], &line["contact_id"], &line["requested_by"]), (&erased["erasure_id"], &json!(contact(1)), &json!("service")));
        assert_eq!((&line["events"], &line["exports"]), (&json!(6), &json!([mine])));

        // Again it finds nothing; of another tenant it takes nothing.
        assert_eq!(erase(&daemon, 1, "acme").await.json()["events"], 0);
        assert_eq!(erase(&daemon, 2, "globex").await.json()["events"], 0);
        assert_eq!(db.count("contact_events").await, 1);
    }

    async fn a_hold_refuses_an_erasure_whole(db) {
        let daemon = daemon(db).await;
        record(&daemon, contact(1), json!({})).await;
        record(&daemon, contact(1), json!({ "event_type": "tag_added", "category": "tag" })).await;
        let held = json!({ "category": "tag", "reason": "a case" });
        let hold = post_json(&daemon, "/api/v1/holds", &service("acme"), &held).await.json();
        erase(&daemon, 1, "acme").await.problem(409, "held");
        assert_eq!(db.count("contact_events").await, 2);
        assert_eq!((db.count("erasures").await, book(&daemon.state).len()), (0, 0));
        let release = format!("/api/v1/holds/{}", id_of(&hold));
        send(daemon.request(Method::DELETE, &release, &service("acme"))).await;
        assert_eq!(erase(&daemon, 1, "acme").await.json()["events"], 2);
    }

    async fn a_restored_database_is_told_of_and_the_erasures_are_replayed(db) {
        let mut daemon = daemon(db).await;
        let doctor = |more: &[&str]| {
            let arguments = [&["doctor", "--json"], more].concat();
            let output = daemon.settings().command(&arguments).output().unwrap();
            let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
            (output.status.code().unwrap(), shown)
        };
        let before = (1..=3).map(|_| event_of(contact(1)).recorded()).collect::<Vec<_>>();
        db.given(&acme(), before.clone()).await;
        assert_eq!(erase(&daemon, 1, "acme").await.json()["events"], 3);
        record(&daemon, contact(1), json!({ "title": "later" })).await;
        assert_eq!(doctor(&[]).0, 0);

        // What a restore of an older backup does.
        db.execute("delete from erasures").await.unwrap();
        db.given(&acme(), before).await;
        let (code, shown) = doctor(&[]);
        let check = shown["checks"].as_array().unwrap().iter().find(|check| check["name"] == "erasures").unwrap();
        assert_eq!((code, &check["ok"]), (1, &json!(false)));
        assert_eq!(check["fix"], "run: timelined doctor --replay-erasures");
        daemon.stop();
        daemon.again();
        assert!(daemon.log().contains("timelined doctor --replay-erasures"), "{}", daemon.log());

        let given = json!({ "contact_id": contact(1) });
        let hold = post_json(&daemon, "/api/v1/holds", &service("acme"), &given).await.json();
        let doctor = |more: &[&str]| {
            let arguments = [&["doctor", "--json"], more].concat();
            let output = daemon.settings().command(&arguments).output().unwrap();
            let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
            (output.status.code().unwrap(), shown)
        };
        let (code, shown) = doctor(&["--replay-erasures"]);
        assert_eq!((code, shown["replayed"][0]["error"].as_str()), (1, Some("a legal hold keeps it")));
        assert_eq!(db.count("contact_events").await, 4);
        let release = format!("/api/v1/holds/{}", id_of(&hold));
        send(daemon.request(Method::DELETE, &release, &service("acme"))).await;
        let (code, shown) = doctor(&["--replay-erasures"]);
        assert_eq!((code, &shown["replayed"][0]["events"]), (0, &json!(3)), "{shown}");
        assert_eq!(db.texts("select title from contact_events").await, [Some("later".to_owned())]);
        assert_eq!(doctor(&[]).0, 0);
        let (code, shown) = doctor(&["--replay-erasures"]);
        assert_eq!((code, &shown["replayed"][0]["events"]), (0, &json!(0)), "{shown}");
    }

    async fn each_daemon_deletes_the_files_that_lie_with_it(db) {
        if db.engine == Engine::Sqlite {
            return;
        }
        let start = async || Settings::new().env("TIMELINED__DATABASE__URL", &db.url().await).start();
        let mut other = start().await;
        record(&other, contact(1), json!({})).await;
        export(&other, 1).await;
        assert_eq!(names(&other.state.join("exports")).len(), 1);
        let daemon = start().await;
        erase(&daemon, 1, "acme").await;
        assert_eq!(book(&daemon.state).len(), 1);
        // It looks each minute, and at its start.
        other.stop();
        other.again();
        eventually("the other has heard of it", PATIENCE, async || book(&other.state).len() == 1).await;
        assert_eq!(names(&other.state.join("exports")), [""; 0]);
        assert_eq!(names(&other.state.join("outbox")), [""; 0]);
    }

    async fn an_erasure_that_a_daemon_left_goes_on(db) {
        let requested_at = SystemClock.now() - minutes(11);
        let before = (0..300).map(|_| event_of(contact(1)).recorded()).collect::<Vec<_>>();
        db.given(&acme(), before).await;
        let erasure = Erasure {
            id: ErasureId::generate(requested_at),
            tenant_id: acme(),
            contact_id: contact(1),
            requested_by: subject("dpo"),
            requested_at,
            up_to: requested_at,
            state: ErasureState::Running,
            events: 0,
            exports: Vec::new(),
            finished_at: None,
        };
        let begun = db.erasures.begin_erasure(&erasure, "contact_erased", &subject("dpo"), requested_at).await.unwrap();
        assert_eq!(db.erasures.erase_some(&begun, 100).await.unwrap().len(), 100);

        let daemon = daemon(db).await;
        eventually("it went on", PATIENCE, async || book(&daemon.state).len() == 1).await;
        assert_eq!(db.count("contact_events").await, 0);
        assert_eq!(book(&daemon.state)[0]["events"], 300);
    }
}
