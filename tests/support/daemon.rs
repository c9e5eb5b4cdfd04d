//! A real daemon: the binary, on free ports, in a state directory of its own.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use reqwest::{Method, RequestBuilder};
use serde_json::Value;
use tempfile::TempDir;
use timelined::access::{Access, Scope};
use timelined::config::{Auth, Secret, Verifier};
use timelined::domain::{Clock as _, ContactId, Subject, SystemClock, TenantId};

/// The key of every test's tokens.
pub const KEY: &str = "a key of the tests, 32 bytes long";

/// A daemon that ends, at the latest, with the value.
pub struct TestDaemon {
    child: Child,
    /// `127.0.0.1:port`.
    pub address: String,
    pub state: PathBuf,
    settings: Settings,
    pub http: reqwest::Client,
    _directory: Option<Arc<TempDir>>,
}

/// How a daemon is started; the same again after a kill.
#[derive(Clone)]
pub struct Settings {
    directory: Arc<TempDir>,
    environment: Vec<(String, String)>,
    removed: Vec<String>,
    config: Option<PathBuf>,
    /// Put before the binary, such as `strace -f …`.
    wrapper: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self::new()
    }
}

impl Settings {
    /// SQLite in a directory of its own.
    pub fn new() -> Self {
        Self {
            directory: Arc::new(tempfile::tempdir().expect("a temporary directory")),
            environment: Vec::new(),
            removed: Vec::new(),
            config: None,
            wrapper: Vec::new(),
        }
    }

    /// A variable, such as `TIMELINED__DATABASE__URL`.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Without a variable that is set for every test.
    pub fn without(mut self, name: &str) -> Self {
        self.removed.push(name.to_owned());
        self
    }

    /// A configuration file with this text.
    pub fn config(mut self, text: &str) -> Self {
        let path = self.directory.path().join("timelined.toml");
        std::fs::write(&path, text).expect("the configuration is written");
        self.config = Some(path);
        self
    }

    /// Puts a program before the binary.
    pub fn wrapped_in(mut self, program: &[&str]) -> Self {
        self.wrapper = program.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Where the state is.
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// A command of the binary in this configuration.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let binary = env!("CARGO_BIN_EXE_timelined");
        let mut command = match self.wrapper.split_first() {
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(binary);
                command
            }
            None => Command::new(binary),
        };
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        command
            .args(arguments)
            .current_dir(self.directory.path())
            .env("TIMELINED__STATE_DIRECTORY", self.state())
            .env("TIMELINED__HTTP__LISTEN", "127.0.0.1:0")
            .env("TIMELINED__HTTP__OPS_LISTEN", "")
            .env("TIMELINED__AUTH__HS256_KEY", KEY)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        for name in &self.removed {
            command.env_remove(name);
        }
        command
    }

    /// Starts the daemon and waits until it serves.
    pub fn start(&self) -> TestDaemon {
        self.try_start()
            .unwrap_or_else(|log| panic!("the daemon did not start:\n{log}"))
    }

    /// Starts the daemon; answers its log where it ended instead of serving.
    pub fn try_start(&self) -> Result<TestDaemon, String> {
        let log = self.directory.path().join("log");
        let mut child = self
            .command(&["run"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(
                File::options()
                    .create(true)
                    .append(true)
                    .open(&log)
                    .expect("the log opens"),
            )
            .spawn()
            .expect("the daemon starts");
        let stdout = child.stdout.take().expect("standard output is piped");
        let mut address = None;
        for line in BufReader::new(stdout).lines() {
            let line = line.expect("standard output is text");
            if let Some(at) = line.strip_prefix("listening on  http://") {
                address = Some(at.to_owned());
            }
            if line.starts_with("get a token") {
                break;
            }
        }
        let Some(address) = address else {
            child.wait().expect("the daemon can be waited for");
            return Err(std::fs::read_to_string(log).unwrap_or_default());
        };
        Ok(TestDaemon {
            child,
            address,
            state: self.state(),
            settings: self.clone(),
            http: reqwest::Client::new(),
            _directory: Some(self.directory.clone()),
        })
    }
}

impl TestDaemon {
    /// A daemon on SQLite with the built-in configuration.
    pub fn start() -> Self {
        Settings::new().start()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.settings.directory.path().join("log")).unwrap_or_default()
    }

    /// The directory that holds state, configuration and log.
    pub fn directory(&self) -> &Path {
        self.settings.directory.path()
    }

    /// How it was started.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Ends it with `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("the daemon can be killed");
        self.child.wait().expect("the daemon can be waited for");
    }

    /// Sends it a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.pid().to_string())
            .status();
        assert!(done.expect("kill runs").success());
    }

    /// Waits for its end.
    pub fn wait(&mut self, at_most: Duration) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("the daemon can be waited for") {
                return status;
            }
            assert!(
                began.elapsed() < at_most,
                "the daemon did not end:\n{}",
                self.log()
            );
            #[expect(
                clippy::disallowed_methods,
                reason = "a process cannot be waited for with a bound"
            )]
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM, and the status of its end.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait(Duration::from_secs(30))
    }

    /// Starts it again on the same state.
    pub fn again(&mut self) {
        *self = self.settings.clone().start();
    }

    /// An address of the API.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request with a token.
    pub fn request(&self, method: Method, path: &str, token: &str) -> RequestBuilder {
        self.http.request(method, self.url(path)).bearer_auth(token)
    }

    /// GET; the status and the JSON body.
    pub async fn get(&self, path: &str, token: &str) -> (u16, Value) {
        answer(self.request(Method::GET, path, token)).await
    }

    /// POST of JSON; the status and the JSON body.
    pub async fn post(&self, path: &str, token: &str, body: &Value) -> (u16, Value) {
        answer(self.request(Method::POST, path, token).json(body)).await
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sends a request; the status and the JSON body, null where there is none.
pub async fn answer(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.expect("the daemon answers");
    let status = response.status().as_u16();
    let body = response.bytes().await.expect("the answer has a body");
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// Waits until `is_so`, asking every few milliseconds.
pub async fn eventually<F: Future<Output = bool>>(
    what: &str,
    at_most: Duration,
    mut is_so: impl FnMut() -> F,
) {
    let began = Instant::now();
    while !is_so().await {
        assert!(
            began.elapsed() < at_most,
            "did not happen within {at_most:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn access() -> Access {
    let key = Secret::new(KEY);
    let auth = Auth {
        verifier: Verifier::Hs256(Some(key)),
        issuer: None,
    };
    Access::new(&auth, &[]).expect("the key is long enough")
}

/// A token of the tests' key, valid for an hour.
pub fn token(scope: &Scope, subject: &str) -> String {
    let subject = Subject::new(subject).expect("a valid subject");
    let hour = Duration::from_hours(1);
    access()
        .issue(&subject, scope, hour, SystemClock.now())
        .expect("the key signs")
}

/// An agent's token that is void from `expires_at` on.
pub fn token_until(expires_at: DateTime<Utc>) -> String {
    let subject = Subject::new("agent").expect("a valid subject");
    let scope = Scope::Agent {
        tenant: tenant("acme"),
    };
    access()
        .issue(&subject, &scope, Duration::ZERO, expires_at)
        .expect("the key signs")
}

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).expect("a valid tenant")
}

/// A service's token.
pub fn service(of: &str) -> String {
    token(&Scope::Service { tenant: tenant(of) }, "service")
}

/// An agent's token.
pub fn agent(of: &str) -> String {
    token(&Scope::Agent { tenant: tenant(of) }, "agent")
}

/// A client's token.
pub fn client(of: &str, contacts: &[ContactId]) -> String {
    let contacts = Arc::new(contacts.iter().copied().collect());
    token(
        &Scope::Client {
            tenant: tenant(of),
            contacts,
        },
        "client",
    )
}

/// An operator's token.
pub fn operator() -> String {
    token(&Scope::Operator, "operator")
}
