//! `timelined demo`: what it prints works, and it leaves nothing behind.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::ran;
use crate::support::daemon::Settings;

const PATIENCE: Duration = Duration::from_secs(30);

/// A process that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The lines that a process prints, as they come.
fn lines(child: &mut Child) -> mpsc::Receiver<String> {
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

fn interrupt(child: &Child) {
    let done = Command::new("kill")
        .arg("-INT")
        .arg(child.id().to_string())
        .status();
    assert!(done.unwrap().success());
}

fn shell(line: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", line]);
    shell
}

#[test]
fn what_the_demo_prints_works_and_its_directory_goes_with_it() {
    let settings = Settings::new();
    let temporary = settings.state();
    fs::create_dir(&temporary).unwrap();
    let mut demo = settings.command(&["demo"]);
    demo.env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut demo = Running(demo.spawn().unwrap());
    let printed = lines(&mut demo.0);
    let mut commands: Vec<(String, String)> = Vec::new();
    let mut title = None;
    while commands.len() < 5 {
        let line = printed
            .recv_timeout(PATIENCE)
            .expect("the demo introduces itself");
        match (line.strip_prefix("# "), title.take()) {
            (Some(next), _) => title = Some(next.to_owned()),
            (None, Some(title)) => commands.push((title, line)),
            (None, None) => {}
        }
    }
    let command = |title: &str| {
        let found = commands.iter().find(|(told, _)| told.contains(title));
        &found
            .unwrap_or_else(|| panic!("no command {title}: {commands:?}"))
            .1
    };

    let json = |title: &str| ran(&shell(command(title))).json();
    let page = json("timeline");
    assert_eq!(page["events"].as_array().unwrap().len(), 5);
    assert!(page["total"].as_u64().unwrap() > 300, "{page}");
    let watcher = shell(&format!("exec {}", command("WebSocket")))
        .stdout(Stdio::piped())
        .spawn();
    let mut watcher = Running(watcher.unwrap());
    let watched = lines(&mut watcher.0);
    assert_eq!(json("record an event")["title"], "Hello");
    loop {
        let line = watched
            .recv_timeout(PATIENCE)
            .expect("the watcher prints the event");
        if line.ends_with("Hello") {
            break;
        }
    }
    let jobs = json("jobs");
    assert_eq!(jobs["jobs"][0]["name"], "realtime-delivery");
    let token = ran(&shell(command("token"))).done();
    let (_, bearer) = command("timeline").split_once("Bearer ").unwrap();
    let (bearer, _) = bearer.split_once('\'').unwrap();
    let own = command("timeline").replace(bearer, token.trim_end());
    let page: Value = ran(&shell(&own)).json();
    assert!(page["events"].is_array(), "{page}");
    // Timelines move by themselves: a line of each event.
    let moved = printed.recv_timeout(PATIENCE).expect("an event happens");
    assert!(moved.is_empty() || moved.contains("  "), "{moved}");

    interrupt(&watcher.0);
    assert!(!watcher.0.wait().unwrap().success());
    interrupt(&demo.0);
    let mut said = String::new();
    demo.0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    let status = demo.0.wait().unwrap();
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
}
