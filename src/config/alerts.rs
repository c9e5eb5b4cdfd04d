//! `[alerts]`: who is told when a job does not do what it should, and what is expected of which job.

use std::collections::BTreeMap;
use std::time::Duration;

use lettre::Address;

use super::error::Problem;
use super::reader::Section;
use super::rules::{Rule, list, number, text};

/// `[alerts]`, and `expect_within` of each job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alerts {
    /// Who gets the mails; nobody when empty.
    pub to: Vec<Address>,
    /// After how many failures in a row; at least 1.
    pub after: u32,
    /// By the name of a job, how old its last success may become.
    pub expect_within: BTreeMap<String, Duration>,
}

impl Alerts {
    /// `expect_within` comes from the jobs.
    pub(super) fn read(
        section: &mut Section<'_>,
        expect_within: BTreeMap<String, Duration>,
    ) -> Self {
        Self {
            to: section.take("to", [], &list(address())),
            after: section.take("after", 3, &number(1..=1_000)),
            expect_within,
        }
    }
}

/// An address alone: a mail that a machine sends to a machine's keeper needs no name.
fn address() -> Rule<Address> {
    text("an address such as \"ops@example.com\"", |text| {
        text.parse()
            .map_err(|error: lettre::address::AddressError| {
                Problem::new(format!("{text:?} is not valid ({error})")).suggest(meant(text))
            })
    })
}

/// The address within `Name <address>`, or within blanks.
fn meant(text: &str) -> Option<String> {
    let inner = text
        .split_once('<')
        .and_then(|(_, rest)| rest.split_once('>'))
        .map_or(text, |(address, _)| address)
        .trim();
    inner
        .parse::<Address>()
        .ok()
        .map(|address| address.to_string())
}
