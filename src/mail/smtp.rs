//! Mail to an SMTP server: one connection a letter, driven phase by phase.
//!
//! `lettre`'s transport would do it in one call, and its error would not tell whether the content
//! had begun to go out. That is the whole difference between "try again freely" and "perhaps twice",
//! so the commands are sent one by one here, each with its own timeout.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use lettre::address::Envelope;
use lettre::message::Mailbox;
use lettre::transport::smtp::Error;
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{
    AsyncSmtpConnection, Certificate, CertificateStore, TlsParameters,
};
use lettre::transport::smtp::commands::{Data, Ehlo, Mail, Rcpt};
use lettre::transport::smtp::extension::{ClientId, Extension, MailBodyParameter, MailParameter};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{MailerError, Outcome, SealedLetter};
use crate::config::{Smtp, SmtpTls};

/// Content goes out in pieces of so many bytes, so that no other task waits long for its encoding.
const PIECE: usize = 64 * 1024;
/// The slowest line that content is given time for, in bytes a second.
const SLOWEST: u64 = 100 * 1024;
/// Connecting, EHLO, TLS, EHLO again, AUTH, MAIL, RCPT, DATA, content: each may take its timeout.
const PHASES: u32 = 9;
/// A good-bye is a courtesy: the letter has been taken.
const QUIT: Duration = Duration::from_secs(2);
/// Where systems keep the authorities that they trust; the list of `openssl-probe`, shortened.
const SYSTEM_STORES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A server that takes our letters.
pub struct SmtpMailer {
    host: String,
    port: u16,
    encryption: Encryption,
    credentials: Option<Credentials>,
    hello: ClientId,
    timeout: Duration,
}

/// How the line is encrypted.
enum Encryption {
    /// Begun in the clear, then encrypted or given up.
    StartTls(TlsParameters),
    /// From the first byte.
    Tls(TlsParameters),
    /// Not at all.
    None,
}

/// A step of the conversation, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connect,
    Hello,
    StartTls,
    Auth,
    Mail,
    Rcpt,
    Data,
    /// From here on a lost line leaves it open whether the letter was taken.
    Content,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Connect => "connecting",
            Self::Hello => "EHLO",
            Self::StartTls => "STARTTLS",
            Self::Auth => "AUTH",
            Self::Mail => "MAIL",
            Self::Rcpt => "RCPT",
            Self::Data => "DATA",
            Self::Content => "the message",
        }
    }
}

impl std::fmt::Debug for SmtpMailer {
    /// Without the credentials.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SmtpMailer")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl SmtpMailer {
    pub(super) fn new(config: &Smtp, from: &Mailbox) -> Result<Self, MailerError> {
        let encryption = match config.tls {
            SmtpTls::StartTls => Encryption::StartTls(trust(config)?),
            SmtpTls::Tls => Encryption::Tls(trust(config)?),
            SmtpTls::None if config.login.is_some() && !is_loopback(&config.host) => {
                let host = config.host.clone();
                return Err(MailerError::ClearPassword { host });
            }
            SmtpTls::None => Encryption::None,
        };
        let credentials = config.login.as_ref().map(|login| {
            let password = login.password.expose_secret().to_owned();
            Credentials::new(login.user.clone(), password)
        });
        // The sender's domain names the installation better than a container's host name would.
        let domain = from.email.domain();
        let hello = if domain.is_ascii() {
            ClientId::Domain(domain.to_owned())
        } else {
            ClientId::default()
        };
        Ok(Self {
            host: config.host.clone(),
            port: config.port,
            encryption,
            credentials,
            hello,
            timeout: config.timeout,
        })
    }

    pub(super) fn longest(&self, bytes: u64) -> Duration {
        self.timeout * (PHASES - 1) + self.content_timeout(bytes) + QUIT
    }

    fn content_timeout(&self, bytes: u64) -> Duration {
        self.timeout + Duration::from_secs(bytes / SLOWEST)
    }

    pub(super) async fn send(&self, letter: &SealedLetter) -> Outcome {
        match self.converse(&letter.envelope, &letter.content).await {
            Ok(()) => Outcome::Sent,
            Err(outcome) => discreet(outcome),
        }
    }

    async fn converse(&self, envelope: &Envelope, content: &[u8]) -> Result<(), Outcome> {
        let mut line = self.connect().await?;
        if let Encryption::StartTls(tls) = &self.encryption {
            if !line.can_starttls() {
                let text = "the server does not offer STARTTLS, and nothing is sent without";
                return Err(Outcome::Deferred(text.to_owned()));
            }
            let upgrade = line.starttls(tls.clone(), &self.hello);
            self.step(Phase::StartTls, upgrade).await?;
        }
        // `lettre` does not keep the SIZE that the server announced, hence once more.
        let ehlo = Ehlo::new(self.hello.clone());
        let offer = self.step(Phase::Hello, line.command(ehlo)).await?;
        let size = announced_size(offer.message());
        if matches!(size, Some(limit) if limit > 0 && content.len() as u64 > limit) {
            self.quit(&mut line).await;
            return Err(Outcome::TooLarge);
        }
        if let Some(credentials) = &self.credentials {
            let mechanisms = [Mechanism::Plain, Mechanism::Login];
            let login = line.auth(&mechanisms, credentials);
            self.step(Phase::Auth, login).await?;
        }
        let parameters = mail_parameters(&line, envelope, content, size.is_some())?;
        let mail = Mail::new(envelope.from().cloned(), parameters);
        self.step(Phase::Mail, line.command(mail)).await?;
        for address in envelope.to() {
            let rcpt = Rcpt::new(address.clone(), Vec::new());
            self.step(Phase::Rcpt, line.command(rcpt)).await?;
        }
        let go = self.step(Phase::Data, line.command(Data)).await?;
        if !go.has_code(354) {
            let text = format!("DATA: the server answered {} in place of 354", go.code());
            return Err(Outcome::Deferred(text));
        }
        let limit = self.content_timeout(content.len() as u64);
        let message = line.message_iter(content.chunks(PIECE));
        within(limit, Phase::Content, message).await?;
        self.quit(&mut line).await;
        Ok(())
    }

    async fn connect(&self) -> Result<AsyncSmtpConnection, Outcome> {
        let address = (self.host.as_str(), self.port);
        if let Encryption::Tls(tls) = &self.encryption {
            let tls = Some(tls.clone());
            let open = AsyncSmtpConnection::connect_tokio1(address, None, &self.hello, tls, None);
            return self.step(Phase::Connect, open).await;
        }
        let stream = match timeout(self.timeout, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(Outcome::Deferred(format!("connecting: {error}"))),
            Err(_elapsed) => return Err(late(Phase::Connect, self.timeout)),
        };
        // The last line of the content is a small write behind a large one: with Nagle's algorithm
        // it waits for the server's delayed acknowledgement, 40 ms a letter.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "the mail server's socket keeps Nagle's algorithm");
        }
        // "localhost" is a name too, and somebody may have given it to another machine.
        let is_near = stream
            .peer_addr()
            .is_ok_and(|peer| peer.ip().to_canonical().is_loopback());
        if matches!(self.encryption, Encryption::None) && self.credentials.is_some() && !is_near {
            let text = "a password is not sent in clear to another machine";
            return Err(Outcome::Credentials(text.to_owned()));
        }
        let open = AsyncSmtpConnection::connect_with_transport(Box::new(stream), &self.hello);
        self.step(Phase::Hello, open).await
    }

    async fn step<T>(
        &self,
        phase: Phase,
        step: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Outcome> {
        within(self.timeout, phase, step).await
    }

    async fn quit(&self, line: &mut AsyncSmtpConnection) {
        match timeout(QUIT, line.quit()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the mail server hung up first"),
            Err(_elapsed) => tracing::debug!("the mail server did not answer QUIT"),
        }
    }
}

/// The system's authorities, else Mozilla's, which are compiled in; and `mail.smtp.ca`.
fn trust(config: &Smtp) -> Result<TlsParameters, MailerError> {
    let has_system_store = std::env::var_os("SSL_CERT_FILE").is_some()
        || std::env::var_os("SSL_CERT_DIR").is_some()
        || SYSTEM_STORES.iter().any(|path| Path::new(path).exists());
    let store = if has_system_store {
        CertificateStore::Default
    } else {
        CertificateStore::WebpkiRoots
    };
    let mut tls = TlsParameters::builder(config.host.clone()).certificate_store(store);
    if let Some(path) = &config.ca {
        let pem = fs::read(path).map_err(|source| MailerError::ReadAuthority {
            path: path.clone(),
            source,
        })?;
        tls = tls.add_root_certificate(Certificate::from_pem(&pem).map_err(MailerError::Tls)?);
    }
    tls.build().map_err(MailerError::Tls)
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || address
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// RFC 1870: `SIZE 10240000`; without a number, or with 0, it sets no limit.
fn announced_size<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<u64> {
    lines.find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let is_size = words.next()?.eq_ignore_ascii_case("SIZE");
        is_size.then(|| {
            words
                .next()
                .and_then(|limit| limit.parse().ok())
                .unwrap_or(0)
        })
    })
}

fn mail_parameters(
    line: &AsyncSmtpConnection,
    envelope: &Envelope,
    content: &[u8],
    takes_size: bool,
) -> Result<Vec<MailParameter>, Outcome> {
    let offers = |extension| line.server_info().supports_feature(extension);
    let mut parameters = Vec::new();
    let mut addresses = envelope.to().iter().chain(envelope.from());
    if addresses.any(|address| !AsRef::<str>::as_ref(address).is_ascii()) {
        if !offers(Extension::SmtpUtfEight) {
            let text = "the server does not take addresses beyond ASCII (SMTPUTF8)";
            return Err(Outcome::Dead(text.to_owned()));
        }
        parameters.push(MailParameter::SmtpUtfEight);
    }
    if !content.is_ascii() {
        if !offers(Extension::EightBitMime) {
            let text = "the server does not take headers beyond ASCII (8BITMIME)";
            return Err(Outcome::Dead(text.to_owned()));
        }
        parameters.push(MailParameter::Body(MailBodyParameter::EightBitMime));
    }
    if takes_size {
        parameters.push(MailParameter::Size(content.len()));
    }
    Ok(parameters)
}

async fn within<T>(
    limit: Duration,
    phase: Phase,
    step: impl Future<Output = Result<T, Error>>,
) -> Result<T, Outcome> {
    match timeout(limit, step).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(judge(phase, &error)),
        Err(_elapsed) => Err(late(phase, limit)),
    }
}

fn late(phase: Phase, limit: Duration) -> Outcome {
    let text = format!("{}: no answer within {} s", phase.name(), limit.as_secs());
    lost(phase, text)
}

fn lost(phase: Phase, text: String) -> Outcome {
    if phase == Phase::Content {
        Outcome::Uncertain(text)
    } else {
        Outcome::Deferred(text)
    }
}

/// What a negative reply or a broken line means.
fn judge(phase: Phase, error: &Error) -> Outcome {
    let text = format!("{}: {error}", phase.name());
    let code = error.status().map(u16::from);
    match (phase, code) {
        // Whatever the server says of our credentials may quote them.
        (_, Some(code @ (530 | 535))) | (Phase::Auth, Some(code @ 500..)) => {
            Outcome::Credentials(format!("the server refused our credentials ({code})"))
        }
        (Phase::Auth, Some(code)) => Outcome::Deferred(format!("AUTH: answered {code}")),
        (Phase::Auth, None) if error.is_client() => {
            Outcome::Credentials("the server offers neither AUTH PLAIN nor AUTH LOGIN".to_owned())
        }
        (_, Some(552)) => Outcome::TooLarge,
        (_, Some(500..)) => Outcome::Dead(text),
        (_, Some(_)) => Outcome::Deferred(text),
        (_, None) => lost(phase, text),
    }
}

/// Takes out what servers like to quote: addresses. And keeps the text short enough for a column.
fn discreet(outcome: Outcome) -> Outcome {
    let clean = |text: String| {
        let words: Vec<&str> = text
            .split(|c: char| c.is_whitespace() || c.is_control())
            .filter(|word| !word.is_empty())
            .map(|word| {
                if word.contains('@') {
                    "<address>"
                } else {
                    word
                }
            })
            .collect();
        words.join(" ").chars().take(300).collect()
    };
    match outcome {
        Outcome::Deferred(text) => Outcome::Deferred(clean(text)),
        Outcome::Credentials(text) => Outcome::Credentials(clean(text)),
        Outcome::Dead(text) => Outcome::Dead(clean(text)),
        Outcome::Uncertain(text) => Outcome::Uncertain(clean(text)),
        other @ (Outcome::Sent | Outcome::TooLarge) => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announced_size_is_read_in_any_case() {
        let size = |lines: &[&str]| announced_size(lines.iter().copied());
        assert_eq!(size(&["mail.example.com", "size 1000"]), Some(1000));
        assert_eq!(size(&["mail.example.com", "SIZE"]), Some(0));
        assert_eq!(size(&["mail.example.com", "SIZEABLE 5"]), None);
    }

    #[test]
    fn no_text_names_the_recipient() {
        let said = "RCPT: permanent error (550): <ana@example.com>: no\r\nsuch user";
        let Outcome::Dead(text) = discreet(Outcome::Dead(said.to_owned())) else {
            panic!("it stays dead");
        };
        assert_eq!(text, "RCPT: permanent error (550): <address> no such user");
    }

    #[test]
    fn only_loopback_is_near() {
        for near in [
            "localhost",
            "LOCALHOST",
            "127.0.0.1",
            "::1",
            "[::1]",
            "127.9.9.9",
        ] {
            assert!(is_loopback(near), "{near}");
        }
        for far in ["mail.example.com", "10.0.0.1", "localhost.example.com", ""] {
            assert!(!is_loopback(far), "{far}");
        }
    }
}
