//! `[mail]`: how mail leaves: into a directory *or* to a server, never both.

use std::path::PathBuf;
use std::time::Duration;

use lettre::Address;
use lettre::message::Mailbox;

use super::error::Problem;
use super::reader::Section;
use super::rules::{Rule, choice, duration, list, number, parsed, size, text, words};
use super::secret::Secret;
use crate::domain::TenantId;

/// `[mail]`: how mail leaves.
#[derive(Debug, Clone, PartialEq)]
pub struct Mail {
    /// Into a directory, or to a server.
    pub transport: Transport,
    /// The sender of every mail.
    pub from: Mailbox,
    /// The largest attachment in bytes; above it, a mail carries a link.
    pub max_attachment: u64,
    /// What to do when the line was cut after DATA.
    pub uncertain: Uncertain,
    /// To whom exports may be mailed.
    pub allowed_domains: AllowedDomains,
}

/// `mail.allowed_domains`: the domains of recipients; any, where none is named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedDomains(Vec<AllowedDomain>);

/// A domain to which one tenant, or each, may have exports mailed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct AllowedDomain {
    tenant: Option<TenantId>,
    /// In lower case.
    domain: String,
    /// Whether the names below it are meant, and not itself.
    below: bool,
}

impl AllowedDomains {
    /// Whether the tenant may have exports mailed to that address.
    #[must_use]
    pub fn allow(&self, tenant: &TenantId, address: &Address) -> bool {
        let domain = address.domain().to_lowercase();
        let matches = |allowed: &AllowedDomain| {
            let is_for_tenant = allowed.tenant.as_ref().is_none_or(|of| of == tenant);
            let is_domain = if allowed.below {
                domain
                    .strip_suffix(&allowed.domain)
                    .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            } else {
                domain == allowed.domain
            };
            is_for_tenant && is_domain
        };
        self.0.is_empty() || self.0.iter().any(matches)
    }
}

/// `example.com`, `*.example.com`, or one of them for a tenant alone, `acme:example.com`.
fn allowed_domain() -> Rule<AllowedDomain> {
    let words = "a domain such as \"example.com\" or \"*.example.com\", for one tenant \"acme:example.com\"";
    text(words, |text| {
        let no_domain = || Problem::new(format!("{text:?} is not a domain"));
        // A tenant's name may hold a colon, a domain cannot.
        let (tenant, domain) = match text.rsplit_once(':') {
            Some((tenant, domain)) => {
                let tenant = TenantId::new(tenant.trim())
                    .map_err(|error| Problem::new(format!("{text:?} names no tenant ({error})")))?;
                (Some(tenant), domain.trim())
            }
            None => (None, text.trim()),
        };
        let (domain, below) = match domain.strip_prefix("*.") {
            Some(domain) => (domain, true),
            None => (domain, false),
        };
        // The domain of an address is what lettre takes for one.
        let address = Address::new("a", domain).map_err(|_no_address| no_domain())?;
        Ok(AllowedDomain {
            tenant,
            domain: address.domain().to_lowercase(),
            below,
        })
    })
}

/// Where mails go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// Each as a file `*.eml` in this directory.
    Directory(PathBuf),
    /// To a server.
    Smtp(Smtp),
}

/// `mail.smtp`: the server that takes our mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smtp {
    /// Its name, which its certificate must bear.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// How the line is encrypted.
    pub tls: SmtpTls,
    /// Who we are, when it wants to know.
    pub login: Option<SmtpLogin>,
    /// A PEM file with an authority that is trusted beside the system's.
    pub ca: Option<PathBuf>,
    /// How long each phase of a delivery may take: connecting, a command, the message.
    pub timeout: Duration,
}

/// A user and a password; neither is of use alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmtpLogin {
    /// The user.
    pub user: String,
    /// The password.
    pub password: Secret,
}

/// How a line to an SMTP server is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmtpTls {
    /// Begun in the clear, then encrypted or given up; port 587.
    StartTls,
    /// From the first byte; port 465.
    Tls,
    /// Not at all; port 25.
    None,
}

/// What becomes of a mail that may or may not have been taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uncertain {
    /// Sent again with the same `Message-ID`: perhaps twice.
    Retry,
    /// Not sent again: perhaps never.
    GiveUp,
}

impl Mail {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let smtp = section.optional_section("smtp", Smtp::read);
        let transport = match smtp {
            // An incomplete server has been reported.
            Some(smtp) => {
                if section.is_given("directory") {
                    let problem = Problem::new("is set beside mail.smtp");
                    section.fail("directory", problem.allowed("set one of the two"));
                }
                section.take_given("directory", &words("a path"));
                smtp.map_or_else(|| Transport::Directory(PathBuf::new()), Transport::Smtp)
            }
            None => Transport::Directory(section.path("directory", "outbox")),
        };
        Self {
            transport,
            from: section.take(
                "from",
                "timelined <timelined@localhost>",
                &parsed("an address such as \"CRM <crm@example.com>\""),
            ),
            max_attachment: section.take("max_attachment", "7MiB", &size(1 << 30)),
            uncertain: section.take(
                "uncertain",
                "retry",
                &choice(&[("retry", Uncertain::Retry), ("give_up", Uncertain::GiveUp)]),
            ),
            allowed_domains: AllowedDomains(section.take(
                "allowed_domains",
                [],
                &list(allowed_domain()),
            )),
        }
    }
}

impl Smtp {
    /// `None` is an error that has been noted.
    fn read(section: &mut Section<'_>) -> Option<Self> {
        let host = section.take_required("host", &host());
        let tls = section.take(
            "tls",
            "starttls",
            &choice(&[
                ("starttls", SmtpTls::StartTls),
                ("tls", SmtpTls::Tls),
                ("none", SmtpTls::None),
            ]),
        );
        let port = section.take("port", tls.port(), &number(1..=u16::MAX));
        let user = section.take_optional("user", &words("a name"));
        let password = section.secret("password");
        match (section.is_given("user"), section.is_given("password")) {
            (true, false) => section.fail(
                "user",
                Problem::new("is set without a password").allowed("set both, or none"),
            ),
            (false, true) => section.fail(
                "password",
                Problem::new("is set without a user").allowed("set both, or none"),
            ),
            _ => {}
        }
        Some(Self {
            host: host?,
            port,
            tls,
            login: user
                .zip(password)
                .map(|(user, password)| SmtpLogin { user, password }),
            ca: section.optional_path("ca"),
            timeout: section.take(
                "timeout",
                "60s",
                &duration(Duration::from_secs(1)..=Duration::from_mins(10)),
            ),
        })
    }
}

fn host() -> Rule<String> {
    text("the name of the server", |text| {
        if text.is_empty() {
            return Err(Problem::new("is empty"));
        }
        if text.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
            return Err(Problem::new(format!("{text:?} is not a host name")));
        }
        Ok(text.to_owned())
    })
}

impl SmtpTls {
    fn port(self) -> u16 {
        match self {
            Self::StartTls => 587,
            Self::Tls => 465,
            Self::None => 25,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::rules::Raw;

    fn allowed(items: &[&str]) -> AllowedDomains {
        let read = |item: &&str| allowed_domain().read(&Raw::Text((*item).to_owned()));
        let items: Result<Vec<_>, _> = items.iter().map(read).collect();
        AllowedDomains(items.unwrap_or_else(|problem| panic!("{problem}")))
    }

    #[test]
    fn a_domain_is_allowed_for_all_or_for_its_tenant() {
        let domains = allowed(&["Example.com", "acme:*.acme.com", "a:b:b.example"]);
        for (tenant, address, is_allowed) in [
            ("acme", "ana@example.com", true),
            ("globex", "ana@EXAMPLE.COM", true),
            ("acme", "ana@mail.example.com", false),
            ("acme", "ana@eu.acme.com", true),
            ("acme", "ana@acme.com", false),
            ("acme", "ana@evilacme.com", false),
            ("globex", "ana@eu.acme.com", false),
            ("a:b", "ana@b.example", true),
            ("acme", "ana@b.example", false),
            ("acme", "ana@example.com.evil.example", false),
        ] {
            let tenant = TenantId::new(tenant).unwrap();
            let allows = domains.allow(&tenant, &address.parse().unwrap());
            assert_eq!(allows, is_allowed, "{tenant} {address}");
        }
        let tenant = TenantId::new("acme").unwrap();
        assert!(AllowedDomains::default().allow(&tenant, &"a@b.example".parse().unwrap()));
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        for text in [
            "",
            "*",
            "*.",
            "ana@example.com",
            "a b.com",
            ":example.com",
            "acme:",
        ] {
            let refused = allowed_domain().read(&Raw::Text(text.to_owned()));
            assert!(refused.is_err(), "{text:?}");
        }
    }
}
