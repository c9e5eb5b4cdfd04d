//! What was acknowledged stays, whatever happens to the process or the disk.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test that panics fails, and its tasks end with its runtime"
)]

mod support;

use std::collections::{HashMap, HashSet};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use support::daemon::{Settings, TestDaemon, agent, answer, eventually, service};
use support::socket::Socket;

const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";
const WRITERS: usize = 8;

/// Five rounds, or fifty in the long form. Not named TIMELINED_…, which the daemon would refuse as an
/// unknown variable.
fn rounds() -> u32 {
    if std::env::var_os("SOAK").is_some() {
        50
    } else {
        5
    }
}

fn event(title: &str) -> Value {
    json!({
        "event_type": "note_added", "category": "note", "source": "agent",
        "title": title, "is_realtime": true,
    })
}

/// Posts an event; its id, where it was answered.
async fn record(http: &reqwest::Client, url: &str, token: &str, title: &str) -> Option<String> {
    let request = http
        .post(url)
        .bearer_auth(token)
        .header("idempotency-key", title)
        .json(&event(title));
    let response = request.send().await.ok()?;
    if !response.status().is_success() {
        return None;
    }
    let body: Value = response.json().await.ok()?;
    Some(body["id"].as_str()?.to_owned())
}

/// Every title of the contact's timeline.
async fn titles(daemon: &TestDaemon, token: &str) -> Vec<String> {
    let (mut titles, mut cursor) = (Vec::new(), None);
    loop {
        let after = cursor
            .map(|cursor: String| format!("&cursor={cursor}"))
            .unwrap_or_default();
        let path = format!("/api/v1/contacts/{CONTACT}/events?limit=200{after}");
        let (status, page) = daemon.get(&path, token).await;
        assert_eq!(status, 200, "{page}");
        let events = page["events"].as_array().unwrap();
        titles.extend(
            events
                .iter()
                .map(|event| event["title"].as_str().unwrap().to_owned()),
        );
        match page["next_cursor"].as_str() {
            Some(next) => cursor = Some(next.to_owned()),
            None => return titles,
        }
    }
}

/// A socket that watches the contact, and what waited for it.
async fn watch(daemon: &TestDaemon) -> (Socket, Vec<Value>) {
    Socket::watching(&daemon.address, &agent("acme"), &[CONTACT.to_owned()]).await
}

/// Takes and acknowledges whatever comes, until the socket ends.
async fn receive(
    (mut socket, mut frames): (Socket, Vec<Value>),
    received: Arc<Mutex<HashSet<String>>>,
) {
    loop {
        for frame in frames.drain(..).filter(|frame| frame["type"] == "event") {
            let id = frame["event"]["id"].as_str().unwrap().to_owned();
            if socket.try_ack(&id).await.is_err() {
                return;
            }
            received.lock().unwrap().insert(id);
        }
        match socket.try_next().await {
            Ok(frame) => frames.push(frame),
            Err(_closed) => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_survives_kills_under_load_and_reaches_a_receiver() {
    let mut daemon = TestDaemon::start();
    let token = service("acme");
    let answered: Arc<Mutex<HashMap<String, String>>> = Arc::default();
    let received: Arc<Mutex<HashSet<String>>> = Arc::default();
    let mut unanswered: Vec<String> = Vec::new();
    for round in 0..rounds() {
        let url = daemon.url(&format!("/api/v1/contacts/{CONTACT}/events"));
        // A client that got no answer asks again: the key makes that harmless.
        for title in unanswered.drain(..) {
            let id = record(&daemon.http, &url, &token, &title).await.unwrap();
            answered.lock().unwrap().insert(title, id);
        }
        let receiver = tokio::spawn(receive(watch(&daemon).await, received.clone()));
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (url, token, answered) = (url.clone(), token.clone(), answered.clone());
                let http = reqwest::Client::new();
                tokio::spawn(async move {
                    for number in 0.. {
                        let title = format!("{round}-{writer}-{number}");
                        match record(&http, &url, &token, &title).await {
                            Some(id) => {
                                answered.lock().unwrap().insert(title, id);
                            }
                            None => return title,
                        }
                    }
                    unreachable!("the daemon is killed")
                })
            })
            .collect();
        // At some moment under load: the load itself is the clock.
        let goal = answered.lock().unwrap().len() + 100 + rand::random_range(0..600);
        eventually("the writers get on", Duration::from_secs(30), async || {
            answered.lock().unwrap().len() >= goal
        })
        .await;
        daemon.kill();
        for writer in writers {
            unanswered.push(writer.await.unwrap());
        }
        receiver.await.unwrap();
        daemon.again();
    }

    let found = titles(&daemon, &token).await;
    let distinct: HashSet<&String> = found.iter().collect();
    assert_eq!(distinct.len(), found.len(), "an event is there twice");
    let answered = answered.lock().unwrap().clone();
    for title in answered.keys() {
        assert!(distinct.contains(title), "{title} was answered and is gone");
    }
    let receiver = tokio::spawn(receive(watch(&daemon).await, received.clone()));
    eventually(
        "every event reaches a receiver",
        Duration::from_secs(30),
        async || {
            let received = received.lock().unwrap();
            answered.values().all(|id| received.contains(id))
        },
    )
    .await;
    assert!(daemon.stop().success());
    receiver.await.unwrap();
}

#[tokio::test]
async fn a_failed_fsync_stops_the_daemon_and_loses_nothing_that_was_answered() {
    let plain = Settings::new();
    let strace = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=fsync,fdatasync",
        "-e",
        "inject=fsync,fdatasync:error=EIO:when=40+",
    ];
    let mut daemon = plain.clone().wrapped_in(&strace).start();
    let token = service("acme");
    let url = daemon.url(&format!("/api/v1/contacts/{CONTACT}/events"));
    let mut answered = Vec::new();
    for number in 0..200 {
        let title = number.to_string();
        match record(&daemon.http, &url, &token, &title).await {
            Some(_) => answered.push(title),
            None => break,
        }
    }
    assert!(
        (1..200).contains(&answered.len()),
        "{} were answered",
        answered.len()
    );
    let status = daemon.wait(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1));
    assert!(daemon.log().contains("an fsync failed"), "{}", daemon.log());

    let daemon = plain.start();
    let found = titles(&daemon, &token).await;
    for title in &answered {
        assert!(found.contains(title), "{title} was answered and is gone");
    }
}

#[tokio::test]
async fn a_failed_fsync_of_a_checkpoint_stops_the_daemon_and_loses_nothing_that_was_answered() {
    let plain = Settings::new();
    let mut daemon = plain.clone().start();
    assert!(daemon.stop().success());
    // The file itself, not its log: it is written and synced by checkpoints alone.
    let file = plain.state().join("timelined.db");
    let strace = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-P",
        file.to_str().unwrap(),
        "-e",
        "trace=fsync,fdatasync",
        "-e",
        "inject=fsync,fdatasync:error=EIO",
    ];
    let mut daemon = plain.clone().wrapped_in(&strace).start();
    let token = service("acme");
    let path = format!("/api/v1/contacts/{CONTACT}/events");
    let mut answered = Vec::new();
    for number in 0..400 {
        let mut body = event(&number.to_string());
        body["payload"] = json!({ "fat": "x".repeat(40_000) });
        let request = daemon.request(Method::POST, &path, &token).json(&body);
        match request.send().await {
            Ok(response) if response.status() == 201 => answered.push(number.to_string()),
            _ => break,
        }
    }
    // The log is checkpointed when it holds 4 MiB.
    assert!(
        (20..400).contains(&answered.len()),
        "{} were answered",
        answered.len()
    );
    let status = daemon.wait(Duration::from_secs(20));
    assert_eq!(status.code(), Some(1));
    assert!(daemon.log().contains("an fsync failed"), "{}", daemon.log());

    let daemon = plain.start();
    let found = titles(&daemon, &token).await;
    for title in &answered {
        assert!(found.contains(title), "{title} was answered and is gone");
    }
}

/// A small file system that ends with the value.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let disk = Self(at);
        disk.resize("size=2m", "tmpfs");
        disk
    }

    fn resize(&self, options: &str, kind: &str) {
        let mut command = Command::new("mount");
        command
            .args(["-t", "tmpfs", "-o", options, kind])
            .arg(&self.0);
        let done = command.status().unwrap();
        assert!(done.success(), "this test mounts a tmpfs, hence needs root");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).status());
    }
}

#[tokio::test]
async fn a_full_disk_answers_503_and_heals() {
    let settings = Settings::new();
    let disk = SmallDisk::mount(settings.state());
    let daemon = settings.start();
    let token = service("acme");
    let path = format!("/api/v1/contacts/{CONTACT}/events");
    let post = async |title: &str| {
        let mut body = event(title);
        body["payload"] = json!({ "fat": "x".repeat(40_000) });
        answer(daemon.request(Method::POST, &path, &token).json(&body)).await
    };
    let mut answered = Vec::new();
    let problem = loop {
        let title = answered.len().to_string();
        let (status, body) = post(&title).await;
        if status != 201 {
            assert_eq!(status, 503, "{body}");
            break body;
        }
        answered.push(title);
        assert!(answered.len() < 1000, "the disk does not fill");
    };
    assert_eq!(problem["type"], "urn:timelined:problem:storage-full");
    assert_eq!(
        titles(&daemon, &token).await.len(),
        answered.len(),
        "reads go on"
    );

    disk.resize("remount,size=64m", "tmpfs");
    eventually("it heals", Duration::from_secs(10), async || {
        post("healed").await.0 == 201
    })
    .await;
    let found = titles(&daemon, &token).await;
    for title in &answered {
        assert!(found.contains(title), "{title} was answered and is gone");
    }
}
