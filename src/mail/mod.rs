//! Mail: a letter goes to an SMTP server, or as a file into a directory (the default).
//!
//! One attempt is made and its [`Outcome`] told; whoever asked decides when to try again. Letters
//! are built by `lettre`, whose types keep a line break from becoming a header.

mod directory;
mod smtp;

use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use lettre::Message;
use lettre::address::Envelope;
use lettre::message::header::ContentType;
use lettre::message::{Attachment, Mailbox, MultiPart, SinglePart};
use sha2::{Digest, Sha256};

use crate::config;
pub use directory::Outbox;
pub use smtp::SmtpMailer;

/// How letters leave.
#[derive(Debug)]
pub enum Mailer {
    /// To a server.
    Smtp(Box<SmtpMailer>),
    /// Each as a file `*.eml`.
    Directory(Outbox),
}

/// How one attempt ended. No text names the recipient or holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The letter was taken.
    Sent,
    /// Not taken, for a reason that may pass.
    Deferred(String),
    /// Too large for the server; without its attachment it may do.
    TooLarge,
    /// The server does not take *us*: no letter will do better until somebody sees to it.
    Credentials(String),
    /// Refused for good.
    Dead(String),
    /// The line was lost after the letter had begun to go out: it may have been taken.
    Uncertain(String),
}

/// Why mail cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MailerError {
    /// A password would travel in clear over a network.
    #[error(
        "mail.smtp: a password is not sent to {host:?} in clear; set tls = \"starttls\" or \"tls\", or use a relay on this host"
    )]
    ClearPassword {
        /// The server.
        host: String,
    },
    /// The file of `mail.smtp.ca` cannot be read.
    #[error("mail.smtp.ca: cannot read {}", path.display())]
    ReadAuthority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// TLS cannot be set up, for instance because `mail.smtp.ca` holds no PEM certificate.
    #[error("mail.smtp: TLS cannot be set up")]
    Tls(#[source] lettre::transport::smtp::Error),
}

impl Mailer {
    /// Reads the files that `config` names; connects to nothing.
    ///
    /// # Errors
    /// [`MailerError`] names the key and the fix.
    pub fn new(config: &config::Mail) -> Result<Self, MailerError> {
        Ok(match &config.transport {
            config::Transport::Directory(path) => Self::Directory(Outbox::new(path.clone())),
            config::Transport::Smtp(smtp) => {
                Self::Smtp(Box::new(SmtpMailer::new(smtp, &config.from)?))
            }
        })
    }

    /// Makes one attempt; ends within [`Self::longest`].
    pub async fn send(&self, letter: &SealedLetter) -> Outcome {
        match self {
            Self::Smtp(smtp) => smtp.send(letter).await,
            Self::Directory(outbox) => outbox.put(letter).await,
        }
    }

    /// How long an attempt with `bytes` of content may take at most.
    #[must_use]
    pub fn longest(&self, bytes: u64) -> Duration {
        match self {
            Self::Smtp(smtp) => smtp.longest(bytes),
            // The local disk has no timeout; a minute is far beyond what it takes.
            Self::Directory(_) => Duration::from_mins(1),
        }
    }
}

/// A letter to one recipient.
#[derive(Debug, Clone)]
pub struct Letter {
    /// The `Message-ID` without angle brackets, the same at each attempt.
    pub message_id: String,
    /// The sender.
    pub from: Mailbox,
    /// The recipient's address.
    pub to: String,
    /// The date that it bears.
    pub date: DateTime<Utc>,
    /// The subject.
    pub subject: String,
    /// What it says, as text.
    pub text: String,
    /// What it says, as HTML.
    pub html: String,
    /// The attached file.
    pub attachment: Option<AttachedFile>,
}

/// A file within a letter.
#[derive(Debug, Clone)]
pub struct AttachedFile {
    /// Its name.
    pub name: String,
    /// Its media type, such as `text/csv; charset=utf-8`.
    pub media_type: &'static str,
    /// Its content.
    pub content: Vec<u8>,
}

/// Why a letter cannot be built; another attempt would not help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LetterError {
    /// The recipient's address is none.
    #[error("the recipient's address is not valid")]
    Recipient,
    /// The `Message-ID` is none.
    #[error("the Message-ID is not of the form local@domain in ASCII")]
    MessageId,
    /// The headers do not make a message.
    #[error("the message cannot be built")]
    Headers,
}

/// A letter as it goes over the line.
#[derive(Debug, Clone)]
pub struct SealedLetter {
    message_id: String,
    envelope: Envelope,
    content: Vec<u8>,
}

impl SealedLetter {
    /// The `Message-ID` without angle brackets.
    #[must_use]
    pub fn message_id(&self) -> &str {
        &self.message_id
    }

    /// Headers, parts and attachment, encoded.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.content
    }
}

impl Letter {
    /// Encodes it. Takes time with the attachment: not for an async thread.
    ///
    /// # Errors
    /// [`LetterError`] where an address or the `Message-ID` is not one.
    pub fn seal(self) -> Result<SealedLetter, LetterError> {
        if !is_message_id(&self.message_id) {
            return Err(LetterError::MessageId);
        }
        let to: Mailbox = self
            .to
            .parse()
            .map_err(|_hides_the_address| LetterError::Recipient)?;
        let words = MultiPart::alternative()
            .boundary(boundary(&self.message_id, "words"))
            .singlepart(SinglePart::plain(self.text))
            .singlepart(SinglePart::html(self.html));
        let body = match self.attachment {
            None => words,
            Some(file) => {
                let media_type = ContentType::parse(file.media_type)
                    .map_err(|_not_a_media_type| LetterError::Headers)?;
                MultiPart::mixed()
                    .boundary(boundary(&self.message_id, "parts"))
                    .multipart(words)
                    .singlepart(Attachment::new(file.name).body(file.content, media_type))
            }
        };
        let message = Message::builder()
            .message_id(Some(format!("<{}>", self.message_id)))
            .date(self.date.into())
            .from(self.from)
            .to(to)
            .subject(self.subject)
            // RFC 3834: no out-of-office reply is wanted.
            .header(AutoSubmitted)
            .multipart(body)
            .map_err(|_incomplete| LetterError::Headers)?;
        Ok(SealedLetter {
            envelope: message.envelope().clone(),
            content: message.formatted(),
            message_id: self.message_id,
        })
    }
}

/// Text as HTML shows it.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Whether `text` can stand between angle brackets and, its first half, as a file's name.
fn is_message_id(text: &str) -> bool {
    let is_atom = |part: &str| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-+=".contains(&b);
        !part.is_empty() && !part.starts_with('.') && part.bytes().all(allowed)
    };
    text.len() <= 200
        && text
            .split_once('@')
            .is_some_and(|(local, domain)| is_atom(local) && is_atom(domain))
}

/// The same at each attempt, so that a repeat is the same message byte for byte. `=_` occurs in no
/// encoded body (RFC 2045, 6.7), hence no boundary does.
fn boundary(message_id: &str, part: &str) -> String {
    let hash = Sha256::digest(format!("{part} {message_id}"));
    let digits: String = hash[..12]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("=_{digits}")
}

/// `Auto-Submitted: auto-generated`.
#[derive(Clone)]
struct AutoSubmitted;

impl lettre::message::header::Header for AutoSubmitted {
    fn name() -> lettre::message::header::HeaderName {
        lettre::message::header::HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_text: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> lettre::message::header::HeaderValue {
        lettre::message::header::HeaderValue::new(Self::name(), "auto-generated".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letter() -> Letter {
        Letter {
            message_id: "0190b5f0.1@crm.example.com".to_owned(),
            from: "CRM <crm@example.com>".parse().unwrap(),
            to: "ana@example.com".to_owned(),
            date: DateTime::from_timestamp(1_780_000_000, 0).unwrap(),
            subject: "Timeline".to_owned(),
            text: "It is attached.".to_owned(),
            html: "<p>It is attached.</p>".to_owned(),
            attachment: Some(AttachedFile {
                name: "timeline.csv".to_owned(),
                media_type: "text/csv; charset=utf-8",
                content: b"\xef\xbb\xbfid\r\n".to_vec(),
            }),
        }
    }

    #[test]
    fn the_same_letter_is_the_same_message_byte_for_byte() {
        let once = letter().seal().unwrap();
        assert_eq!(once.content(), letter().seal().unwrap().content());
        insta::assert_snapshot!(String::from_utf8(once.content).unwrap());
    }

    #[test]
    fn a_line_break_does_not_become_a_header() {
        let mut letter = letter();
        letter.subject = "Timeline\r\nBcc: eve@example.com\r\n\r\nbody".to_owned();
        letter.attachment.as_mut().unwrap().name = "a\"\r\nBcc: eve@example.com".to_owned();
        let content = String::from_utf8(letter.seal().unwrap().content).unwrap();
        assert!(
            !content.lines().any(|line| line.starts_with("Bcc:")),
            "{content}"
        );
    }

    #[test]
    fn an_address_or_an_id_that_is_none_is_refused() {
        for to in [
            "",
            "ana",
            "ana@example.com\r\nRCPT TO:<eve@example.com>",
            "a@b, c@d",
        ] {
            let refused = Letter {
                to: to.to_owned(),
                ..letter()
            };
            assert_eq!(
                refused.seal().unwrap_err(),
                LetterError::Recipient,
                "{to:?}"
            );
        }
        for id in [
            "",
            "a",
            "a@",
            "../a@b",
            ".a@b",
            "a/b@c",
            "a@b>\r\nX: y",
            "a@b@c",
        ] {
            let refused = Letter {
                message_id: id.to_owned(),
                ..letter()
            };
            assert_eq!(
                refused.seal().unwrap_err(),
                LetterError::MessageId,
                "{id:?}"
            );
        }
    }
}
