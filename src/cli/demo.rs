//! `timelined demo`: a daemon of its own in a temporary directory, with contacts whose timelines
//! move. Nothing of it touches a real state directory.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;

use super::{Done, Failure, Global, clock, out};
use crate::access::Scope;
use crate::config::Request;
use crate::daemon::{Daemon, access};
use crate::domain::{
    AgentId, Category, ContactId, NewContactEvent, Priority, SessionId, Source, Subject, TenantId,
    event_types,
};
use crate::lifecycle::{Ended, Signals, serve};
use crate::storage::Recording;
use crate::telemetry::start_logs;
use crate::timeline::Timeline;

/// The demo's contacts: name, and how lively.
const CONTACTS: &[(&str, &str, u32)] = &[
    ("0190b5f0-0001-7000-8000-000000000001", "Ana Sousa", 400),
    (
        "0190b5f0-0002-7000-8000-000000000002",
        "Björn Lindqvist",
        150,
    ),
    ("0190b5f0-0003-7000-8000-000000000003", "Chidi Okafor", 90),
    (
        "0190b5f0-0004-7000-8000-000000000004",
        "Daniela Petrova",
        60,
    ),
    ("0190b5f0-0005-7000-8000-000000000005", "Eiko Tanaka", 25),
];
const AGENT: &str = "0190b5f0-00a0-7000-8000-00000000000a";
const STAGES: &[&str] = &["New lead", "Qualified", "Demo given", "Proposal", "Won"];
const TAGS: &[&str] = &["vip", "newsletter", "trial", "invoice-late", "lisbon"];
const NOTES: &[&str] = &[
    "Prefers to be called in the morning",
    "Asked for a quote for 25 seats",
    "Waiting for the legal department",
    "Very happy with the last delivery",
];

/// A new event in the demo about so often.
const PACE: Duration = Duration::from_millis(1500);

pub(super) async fn run(global: &Global) -> Done {
    if global.config.is_some() {
        return Err(Failure::Usage(
            "demo has a configuration of its own; leave --config out".to_owned(),
        ));
    }
    let signals = Signals::new()?;
    // Private, by a name that nobody can foresee, and removed when the demo ends.
    let directory = tempfile::Builder::new()
        .prefix("timelined-demo-")
        .tempdir()
        .context("cannot make a directory for the demo")?;
    let file = directory.path().join("timelined.toml");
    let address = free_address();
    let text = format!(
        "state_directory = \"{}\"\n[http]\nlisten = \"{address}\"\nops_listen = \"\"\n[log]\nlevel = \"warn\"\n",
        directory.path().display()
    );
    std::fs::write(&file, text)?;
    let loaded = crate::config::load(&Request {
        explicit_file: Some(file.clone()),
        // Addresses and logs may be set; where the state is, is the demo's own affair.
        environment: super::environment()
            .into_iter()
            .filter(|(name, _)| {
                ["TIMELINED__HTTP__", "TIMELINED__LOG__"]
                    .iter()
                    .any(|prefix| name.starts_with(prefix))
            })
            .collect(),
        working_directory: directory.path().to_owned(),
    })?;
    start_logs(&loaded.config.log);
    let tenant = TenantId::new("demo").expect("a short text");
    let access = access(&loaded.config)?;
    let daemon = Daemon::start(loaded.config, clock()).await?;
    let history = seed(&daemon.timeline, &tenant).await?;

    let token = |scope: &Scope| {
        let subject = Subject::new("demo").expect("a short text");
        let day = Duration::from_hours(24);
        access
            .issue(&subject, scope, day, clock().now())
            .map_err(anyhow::Error::from)
    };
    let service = token(&Scope::Service {
        tenant: tenant.clone(),
    })?;
    let operator = token(&Scope::Operator)?;
    let program = std::env::current_exe().context("the program has no path")?;
    introduce(&Introduction {
        address: daemon.address(),
        directory: directory.path(),
        program: &program,
        file: &file,
        service: &service,
        operator: &operator,
        history,
    })?;

    let moving = move_on(daemon.timeline.clone(), tenant);
    tokio::select! {
        ended = serve(daemon, signals, || Err("a demo has no configuration of its own".to_owned())) => match ended {
            Ended::Stopped => Ok(()),
            Ended::Failed => Err(Failure::Other(anyhow::anyhow!("the database failed; see the log"))),
        },
        failed = moving => failed,
    }
}

/// The usual address, or a free port where that is taken.
fn free_address() -> SocketAddr {
    let usual = SocketAddr::from(([127, 0, 0, 1], 8080));
    match std::net::TcpListener::bind(usual) {
        Ok(_free) => usual,
        Err(_taken) => std::net::TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| listener.local_addr())
            .unwrap_or(usual),
    }
}

struct Introduction<'a> {
    address: SocketAddr,
    directory: &'a std::path::Path,
    program: &'a std::path::Path,
    file: &'a std::path::Path,
    service: &'a str,
    operator: &'a str,
    history: usize,
}

fn introduce(to: &Introduction<'_>) -> Done {
    let (contact, name, _) = CONTACTS[0];
    let (address, program, file) = (to.address, to.program.display(), to.file.display());
    out(&format!(
        "timelined demo: {} contacts with {} events of the last year, serving on http://{address}\n\
         state: {} (removed when the demo ends; end it with Ctrl-C)\n\n\
         # {name}'s timeline\n\
         curl -s -H 'Authorization: Bearer {service}' 'http://{address}/api/v1/contacts/{contact}/events?limit=5'\n\n\
         # record an event\n\
         curl -s -X POST -H 'Authorization: Bearer {service}' -H 'Content-Type: application/json' \
         -d '{{\"event_type\":\"note_added\",\"category\":\"note\",\"source\":\"agent\",\"title\":\"Hello\",\"is_realtime\":true}}' \
         'http://{address}/api/v1/contacts/{contact}/events'\n\n\
         # watch it over a WebSocket\n\
         {program} --config {file} events watch --tenant demo --address {address} {contact}\n\n\
         # the jobs\n\
         curl -s -H 'Authorization: Bearer {operator}' 'http://{address}/api/v1/jobs'\n\n\
         # a token of your own\n\
         {program} --config {file} token --tenant demo --role agent\n",
        CONTACTS.len(),
        to.history,
        to.directory.display(),
        service = to.service,
        operator = to.operator,
    ))
}

fn contact(index: usize) -> ContactId {
    CONTACTS[index]
        .0
        .parse()
        .expect("the demo's contacts have valid ids")
}

fn agent() -> AgentId {
    AGENT.parse().expect("the demo's agent has a valid id")
}

/// Records a year of history. The same each time, so that what one sees can be told to others.
async fn seed(timeline: &Timeline, tenant: &TenantId) -> Result<usize, Failure> {
    let mut random = StdRng::seed_from_u64(1);
    let now = timeline.clock.now();
    let mut batch = Vec::new();
    for (index, (_, _, events)) in CONTACTS.iter().enumerate() {
        let contact = contact(index);
        let mut ages: Vec<i64> = (0..*events)
            .map(|_| random.random_range(60..365 * 86_400))
            .collect();
        ages.sort_unstable_by(|a, b| b.cmp(a));
        for age in ages {
            let at = now - TimeDelta::seconds(age);
            batch.push(plausible(&mut random, contact, at));
        }
    }
    let recordings: Result<Vec<Recording>, _> = batch
        .into_iter()
        .map(|(event, at)| {
            let event = event.record(tenant, at)?;
            Ok::<_, crate::domain::Invalid>(Recording {
                event,
                idempotency: None,
            })
        })
        .collect();
    let recordings = recordings.context("the demo's events are not valid")?;
    let count = recordings.len();
    timeline.events.save(tenant, recordings).await?;
    Ok(count)
}

/// Something that happens to contacts of a CRM.
fn plausible(
    random: &mut StdRng,
    contact: ContactId,
    at: DateTime<Utc>,
) -> (NewContactEvent, DateTime<Utc>) {
    let event = match random.random_range(0..9) {
        0 => {
            let step = random.random_range(0..STAGES.len() - 1);
            // History is not pushed any more.
            let (from, to) = (STAGES[step], STAGES[step + 1]);
            NewContactEvent::new(
                contact,
                event_types::PIPELINE_STAGE_CHANGED,
                Category::Pipeline,
                Source::System,
            )
            .title(format!("Sales: {from} → {to}"))
            .payload(json!({ "pipeline": "Sales", "from": from, "to": to }))
        }
        1 => {
            let tag = pick(random, TAGS);
            NewContactEvent::new(
                contact,
                event_types::TAG_ADDED,
                Category::Tag,
                Source::Agent,
            )
            .title(format!("Tag {tag} added"))
            .payload(json!({ "tag": tag }))
            .triggered_by(agent())
        }
        2 | 3 => NewContactEvent::new(
            contact,
            event_types::NOTE_ADDED,
            Category::Note,
            Source::Agent,
        )
        .title("Note")
        .description(pick(random, NOTES))
        .triggered_by(agent()),
        4 => NewContactEvent::session_started(
            contact,
            SessionId::generate(at),
            pick(random, &["web", "phone", "chat"]),
        ),
        5 => NewContactEvent::new(
            contact,
            event_types::CUSTOM_FIELD_SET,
            Category::CustomField,
            Source::Agent,
        )
        .title("Custom field: seats")
        .payload(json!({ "field": "seats", "value": random.random_range(1..200) })),
        6 => NewContactEvent::enriched(
            contact,
            "company-data",
            json!({ "employees": random.random_range(1..5000) }),
        ),
        7 => NewContactEvent::new(
            contact,
            event_types::NOTIFICATION_SENT,
            Category::Notification,
            Source::Workflow,
        )
        .title("Your invoice is ready")
        .visible_to_client(true),
        _ => NewContactEvent::new(
            contact,
            event_types::STATUS_CHANGED,
            Category::Status,
            Source::System,
        )
        .title("Status: active")
        .payload(json!({ "to": "active" }))
        .visible_to_client(true),
    };
    (event, at)
}

fn pick<'a>(random: &mut StdRng, from: &[&'a str]) -> &'a str {
    from.choose(random).copied().unwrap_or_default()
}

/// Lets events happen, until the daemon cannot record them any more.
async fn move_on(timeline: Timeline, tenant: TenantId) -> Done {
    let mut random = StdRng::seed_from_u64(2);
    let mut tick = tokio::time::interval(PACE);
    loop {
        tick.tick().await;
        let index = random.random_range(0..CONTACTS.len());
        let now = timeline.clock.now();
        let event = match random.random_range(0..5) {
            0 => {
                let until = now + TimeDelta::hours(1);
                NewContactEvent::urgent_notification(contact(index), "Please call back", until)
            }
            1 => NewContactEvent::agent_assigned(contact(index), agent(), None),
            _ => {
                let (event, _) = plausible(&mut random, contact(index), now);
                let priority = *[Priority::Normal, Priority::High]
                    .choose(&mut random)
                    .unwrap_or(&Priority::Normal);
                event.priority(priority).realtime()
            }
        };
        let created = timeline.create(&tenant, event, None).await;
        let created = created.context("could not record an event")?;
        let crate::timeline::Created::New(event) = created else {
            continue;
        };
        let title = event.title.unwrap_or_default();
        out(&format!(
            "{}  {:<16} {:<22} {title}",
            now.format("%H:%M:%S"),
            CONTACTS[index].1,
            event.event_type
        ))?;
    }
}
