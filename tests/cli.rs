//! The command line as an operator meets it: the real binary, its exit codes, what it says on which
//! stream.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics fails, which is what is wanted"
)]

#[macro_use]
mod support;

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use support::daemon::Settings;
use support::database::Database;

#[path = "cli/commands.rs"]
mod commands;
#[path = "cli/configuration.rs"]
mod configuration;
#[path = "cli/demo.rs"]
mod demo;
#[path = "cli/exporting.rs"]
mod exporting;
#[path = "cli/importing.rs"]
mod importing;
#[path = "cli/starting.rs"]
mod starting;

const CONTACT: &str = "0190b5f0-7c1e-7d3a-8f00-000000000001";

/// How a command ended.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    /// It was done: exit code 0. Its data.
    #[track_caller]
    fn done(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// It failed with this code, said exactly this, and printed no data.
    #[track_caller]
    fn failed(&self, code: i32, said: &str) {
        // The daemon's log is JSON where standard error is no terminal.
        let talk = self.err.lines().filter(|line| !line.starts_with('{'));
        let talk = talk.collect::<Vec<_>>().join("\n");
        assert_eq!((self.code, &*talk), (code, said), "{self:?}");
        assert_eq!(self.out, "");
    }

    /// It failed with this code, said this among other things, and printed no data.
    #[track_caller]
    fn failed_saying(&self, code: i32, said: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(said), "{self:?}");
        assert_eq!(self.out, "");
    }

    /// Its data as JSON.
    #[track_caller]
    fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.done()).expect("--json prints JSON")
    }
}

/// Runs a command to its end, which must come.
#[track_caller]
fn ran(command: &Command) -> Ran {
    let output = bounded(command)
        .stdin(Stdio::null())
        .output()
        .expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the streams are text");
    let ran = Ran {
        code: output.status.code().expect("it ends by itself"),
        out: text(output.stdout),
        err: text(output.stderr),
    };
    assert_ne!(ran.code, 124, "it does not end: {ran:?}");
    for trace in ["panicked", "RUST_BACKTRACE", "src/"] {
        assert!(!ran.err.contains(trace), "{ran:?}");
    }
    ran
}

/// The same command, ended after a minute.
fn bounded(command: &Command) -> Command {
    let mut bounded = Command::new("timeout");
    bounded.args(["--kill-after=5", "60"]);
    copy(command, command.get_program(), bounded)
}

/// `onto`, which runs `program` with the arguments, the variables and the directory of `command`.
fn copy(command: &Command, program: &OsStr, mut onto: Command) -> Command {
    onto.arg(program).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => onto.env(name, value),
            None => onto.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        onto.current_dir(directory);
    }
    onto
}

/// Runs the binary with these settings.
#[track_caller]
fn run(settings: &Settings, arguments: &[&str]) -> Ran {
    ran(&settings.command(arguments))
}

/// The settings of a command on this database.
async fn on(db: &Database) -> Settings {
    Settings::new().env("TIMELINED__DATABASE__URL", &db.url().await)
}
