//! A real SMTP server, which fails where a test says so: `smtp.py`.

#![allow(
    clippy::unwrap_used,
    clippy::items_after_statements,
    dead_code,
    unreachable_pub,
    reason = "a test that panics fails; each test binary uses its own part of it"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// `tests/support/smtp.py`; it ends with its standard input, hence with this.
pub struct Server {
    process: Child,
    pub port: u64,
    pub ca: Option<String>,
    maildir: PathBuf,
}

pub struct Mail {
    pub envelope: Value,
    pub content: String,
}

impl Server {
    pub fn start(arguments: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let venv = std::env::var_os("TIMELINED_TEST_VENV")
            .map_or_else(|| root.join("target/test-venv"), PathBuf::from);
        let mut process = Command::new(venv.join("bin/python"))
            .arg(root.join("tests/support/smtp.py"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tests/support/install.sh has made the environment");
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let hello: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        // Whoever does not read blocks the writer.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            process,
            port: hello["port"].as_u64().unwrap(),
            ca: hello["ca"].as_str().map(str::to_owned),
            maildir: hello["maildir"].as_str().unwrap().into(),
        }
    }

    /// The line of `[mail]` that leads here.
    pub fn config(&self, tls: &str, with_login: bool) -> String {
        let login = if with_login {
            "user = \"crm\", password = { file = \"password\" }, "
        } else {
            ""
        };
        let ca = self
            .ca
            .as_ref()
            .map(|ca| format!(", ca = {ca:?}"))
            .unwrap_or_default();
        format!(
            "smtp = {{ host = \"localhost\", port = {}, {login}tls = \"{tls}\"{ca}, timeout = \"2s\" }}",
            self.port
        )
    }

    pub fn script(&self, script: &str) {
        writeln!(self.process.stdin.as_ref().unwrap(), "{script}").unwrap();
    }

    /// What it stored, oldest first.
    pub fn mails(&self) -> Vec<Mail> {
        let mut files: Vec<_> = std::fs::read_dir(&self.maildir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "json"))
            .filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.'))
            .collect();
        files.sort();
        let read = |path: &PathBuf| Mail {
            envelope: serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap(),
            content: std::fs::read_to_string(path.with_extension("eml")).unwrap(),
        };
        files.iter().map(read).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().expect("it ends with its input");
    }
}

impl Mail {
    pub fn message_id(&self) -> String {
        let line = self
            .content
            .lines()
            .find(|line| line.starts_with("Message-ID: "));
        line.unwrap()
            .trim_start_matches("Message-ID: <")
            .trim_end_matches('>')
            .to_owned()
    }

    /// The text, unfolded as far as quoted-printable folds it.
    pub fn words(&self) -> String {
        self.content.replace("=\r\n", "").replace("=3D", "=")
    }
}

/// The attached file of a mail; `lettre` writes it as base64 or as it is.
pub fn attachment(mail: &str) -> Option<Vec<u8>> {
    let (_, part) = mail.split_once("Content-Disposition: attachment")?;
    let (head, body) = part.split_once("\r\n\r\n").unwrap();
    let (body, _) = body.split_once("\r\n--=_").unwrap();
    assert!(head.contains("Content-Transfer-Encoding: base64"), "{head}");
    use base64::Engine;
    let engine = base64::engine::general_purpose::STANDARD;
    Some(engine.decode(body.replace("\r\n", "")).unwrap())
}
