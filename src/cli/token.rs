//! `timelined token`: makes a token with the daemon's own key.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::TimeDelta;
use clap::Args;
use serde_json::json;

use super::{Done, Failure, Global, access, clock, load, print};
use crate::access::{Role, Scope};
use crate::domain::{ContactId, Subject, TenantId, format_time};

#[derive(Debug, Args)]
pub(super) struct Options {
    /// The tenant; every role but operator needs one.
    #[arg(long)]
    tenant: Option<TenantId>,
    /// What the bearer is: client, agent, service or operator.
    #[arg(long)]
    role: Role,
    /// Who the bearer is [default: the role].
    #[arg(long, alias = "sub")]
    subject: Option<Subject>,
    /// A contact that a client is; may be repeated.
    #[arg(
        long = "contact",
        alias = "contacts",
        value_name = "CONTACT",
        value_delimiter = ','
    )]
    contacts: Vec<ContactId>,
    /// How long it is valid, such as 15m, 12h or 30d.
    #[arg(long, alias = "expires-in", default_value = "1h", value_parser = lifetime)]
    ttl: Duration,
}

/// From a second to ten years: a token that nobody can take back should not outlive its installation.
fn lifetime(text: &str) -> Result<Duration, String> {
    let most = Duration::from_hours(3650 * 24);
    match humantime::parse_duration(text) {
        Ok(ttl) if (Duration::from_secs(1)..=most).contains(&ttl) => Ok(ttl),
        Ok(_) => Err("must be between 1s and 3650d".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn run(global: &Global, options: &Options) -> Done {
    let config = load(global)?.config;
    let scope = scope(options)?;
    let access = access(&config)?;
    let default = || Subject::new(options.role.as_str()).expect("a role is a short text");
    let subject = options.subject.clone().unwrap_or_else(default);
    let now = clock().now();
    let token = access
        .issue(&subject, &scope, options.ttl, now)
        .map_err(anyhow::Error::from)?;
    let lifetime = TimeDelta::from_std(options.ttl).unwrap_or(TimeDelta::MAX);
    let expires_at = now.checked_add_signed(lifetime).map(format_time);
    print(
        global,
        &json!({ "token": token, "expires_at": expires_at }),
        || token.clone(),
    )
}

fn scope(options: &Options) -> Result<Scope, Failure> {
    let usage = |text: &str| Failure::Usage(text.to_owned());
    let tenant = || {
        options
            .tenant
            .clone()
            .ok_or_else(|| usage("--tenant is required for this role"))
    };
    if options.role != Role::Client && !options.contacts.is_empty() {
        return Err(usage("--contact is for --role client"));
    }
    match options.role {
        Role::Client if options.contacts.is_empty() => Err(usage(
            "--role client needs --contact: the contacts that the client is",
        )),
        Role::Client => {
            let contacts: HashSet<ContactId> = options.contacts.iter().copied().collect();
            Ok(Scope::Client {
                tenant: tenant()?,
                contacts: Arc::new(contacts),
            })
        }
        Role::Agent => Ok(Scope::Agent { tenant: tenant()? }),
        Role::Service => Ok(Scope::Service { tenant: tenant()? }),
        Role::Operator if options.tenant.is_some() => Err(usage(
            "an operator belongs to no tenant; leave --tenant out",
        )),
        Role::Operator => Ok(Scope::Operator),
    }
}
