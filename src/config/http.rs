//! `[http]`: where the daemon listens, and under which name people reach it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::http::Uri;

use super::error::Problem;
use super::reader::Section;
use super::rules::{Raw, Rule, duration, list, text};

/// `[http]`: where the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// The API's address; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The address of `/metrics`; `None` when it is turned off.
    pub ops_listen: Option<SocketAddr>,
    /// What links begin with, without a slash at its end; see [`Http::link_base`].
    pub public_url: Option<String>,
    /// Origins of other sites whose pages may open sockets.
    pub allowed_origins: Vec<String>,
    /// How long running work may take to reach a safe point when the daemon stops.
    pub shutdown_timeout: Duration,
}

impl Http {
    /// What links begin with: the public URL, else the address that was bound, which differs from the configured one
    /// when that has port 0.
    #[must_use]
    pub fn link_base(&self, bound: SocketAddr) -> String {
        self.public_url
            .clone()
            .unwrap_or_else(|| format!("http://{bound}"))
    }
}

impl Http {
    pub(super) fn read(section: &mut Section<'_>) -> Self {
        let listen = section.take("listen", "127.0.0.1:8080", &address(""));
        let ops_listen = section.take("ops_listen", "127.0.0.1:8081", &address_or_off());
        if ops_listen == Some(listen) && listen.port() != 0 {
            section.fail(
                "ops_listen",
                Problem::new(format!("{listen} is that of http.listen too")),
            );
        }
        Self {
            listen,
            ops_listen,
            public_url: section.take("public_url", "", &public_url()),
            allowed_origins: section.take("allowed_origins", [], &list(origin())),
            shutdown_timeout: section.take(
                "shutdown_timeout",
                "20s",
                &duration(Duration::ZERO..=Duration::from_mins(10)),
            ),
        }
    }
}

fn address(further: &str) -> Rule<SocketAddr> {
    text(
        format!("an IP address and a port, such as \"127.0.0.1:8080\" or \"[::1]:8080\"{further}"),
        |text| {
            // Only a guess for the message: what does not parse is none.
            let meant = match text
                .strip_prefix("localhost:")
                .or_else(|| text.strip_prefix(':'))
            {
                Some(port) => port
                    .parse()
                    .ok()
                    .map(|port: u16| (Ipv4Addr::LOCALHOST, port).into()),
                None => text
                    .parse()
                    .ok()
                    .map(|ip: IpAddr| SocketAddr::new(ip, 8080)),
            };
            text.parse()
                .map_err(|_says_no_more: std::net::AddrParseError| {
                    Problem::new(format!("{text:?} is not an address"))
                        .suggest(meant.map(|address: SocketAddr| address.to_string()))
                })
        },
    )
}

fn address_or_off() -> Rule<Option<SocketAddr>> {
    let further = ", or \"\" for none";
    let rule = address(further);
    text(
        format!("an IP address and a port, such as \"127.0.0.1:8081\" or \"[::1]:8081\"{further}"),
        move |text| match text {
            "" => Ok(None),
            _ => rule.read(&Raw::from(text)).map(Some),
        },
    )
}

fn public_url() -> Rule<Option<String>> {
    text(
        "an http or https URL without a slash at its end, such as \"https://crm.example.com\"",
        |text| {
            if text.is_empty() {
                return Ok(None);
            }
            if text.contains('@') {
                // Not shown: it may hold a password.
                return Err(Problem::new("has a user or a password in it"));
            }
            let trimmed = text.trim_end_matches('/');
            if !is_web_url(trimmed) {
                return Err(Problem::new(format!("{text:?} is not such a URL")));
            }
            if trimmed != text {
                let problem = Problem::new(format!("{text:?} ends with a slash"));
                return Err(problem.suggest(Some(trimmed.to_owned())));
            }
            Ok(Some(text.to_owned()))
        },
    )
}

fn origin() -> Rule<String> {
    text(
        "a site such as \"https://crm.example.com\", without a path",
        |text| {
            let site: String = text.split('/').take(3).collect::<Vec<_>>().join("/");
            if !is_web_url(&site) {
                Err(Problem::new(format!("{text:?} is not a site")))
            } else if site == text {
                Ok(text.to_owned())
            } else {
                Err(Problem::new(format!("{text:?} has a path")).suggest(Some(site)))
            }
        },
    )
}

/// Whether `text` is an absolute http or https URL without a query.
fn is_web_url(text: &str) -> bool {
    // `Uri` drops what follows `#` without a word.
    let Some(uri) = text.parse::<Uri>().ok().filter(|_| !text.contains('#')) else {
        return false;
    };
    let is_web = matches!(uri.scheme_str(), Some("http" | "https"));
    let host = uri.host().unwrap_or_default();
    is_web && !host.is_empty() && uri.query().is_none()
}
