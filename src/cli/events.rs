//! `timelined events`: add, import, list, watch.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use futures_util::{SinkExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Message, http::HeaderValue};

use super::{Done, Failure, Global, access, clock, import, load, open, out, print};
use crate::access::Scope;
use crate::config::Config;
use crate::domain::{
    Audience, Category, ContactEvent, ContactId, EventType, NewContactEvent, Subject, TenantId,
    format_time,
};
use crate::live::Hub;
use crate::live::frames::SUBPROTOCOL;
use crate::storage::{Filter, Page, Storage, View};
use crate::timeline::{Created, Refusal, Repeatable, Timeline};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Record an event.
    Add(Box<Add>),
    /// Record events that were exported as JSON lines; a repeat is harmless.
    Import(import::Options),
    /// A contact's timeline, newest first.
    List(List),
    /// Follow contacts: print each event as it comes, and acknowledge it.
    Watch(Watch),
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// The contact.
    contact: ContactId,
    /// The contact's tenant.
    #[arg(long)]
    tenant: TenantId,
    /// The event as JSON, with the fields of the API; - reads standard input. The options override it.
    #[arg(long, value_name = "JSON")]
    body: Option<String>,
    /// The event's type, such as `note_added`.
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<String>,
    /// The category.
    #[arg(long)]
    category: Option<String>,
    /// The source [default: system].
    #[arg(long)]
    source: Option<String>,
    /// The title.
    #[arg(long)]
    title: Option<String>,
    /// The priority.
    #[arg(long)]
    priority: Option<String>,
    /// The payload, a JSON object.
    #[arg(long, value_name = "JSON")]
    payload: Option<String>,
    /// When it expires (RFC 3339).
    #[arg(long, value_name = "TIME")]
    expires_at: Option<String>,
    /// Push it to whoever is watching.
    #[arg(long)]
    realtime: bool,
    /// Let the contact itself see it.
    #[arg(long)]
    visible_to_client: bool,
    /// Makes a repeat harmless for 24 hours.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// The contact.
    contact: ContactId,
    /// The contact's tenant.
    #[arg(long)]
    tenant: TenantId,
    /// Through whose eyes: client, agent or audit.
    #[arg(long, default_value = "audit")]
    audience: Audience,
    /// Only this category.
    #[arg(long)]
    category: Option<Category>,
    /// Only this type.
    #[arg(long = "type", value_name = "TYPE")]
    event_type: Option<EventType>,
    /// Only what happened at or after this time (RFC 3339).
    #[arg(long)]
    since: Option<DateTime<Utc>>,
    /// Only what happened before this time (RFC 3339).
    #[arg(long)]
    until: Option<DateTime<Utc>>,
    /// Expired events too, for audit.
    #[arg(long)]
    include_expired: bool,
    /// How many.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

#[derive(Debug, Args)]
pub(super) struct Watch {
    /// The contacts.
    #[arg(required = true)]
    contacts: Vec<ContactId>,
    /// The tenant, for a token of the daemon's own key (role agent).
    #[arg(long, required_unless_present = "token")]
    tenant: Option<TenantId>,
    /// A token; without it one is made with the key of the configuration.
    #[arg(long)]
    token: Option<String>,
    /// The daemon's address.
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    /// End after so many events.
    #[arg(long)]
    count: Option<usize>,
}

pub(super) async fn run(global: &Global, command: &Command) -> Done {
    let config = load(global)?.config;
    if let Command::Watch(options) = command {
        return watch(global, options, &config).await;
    }
    let storage = open(&config).await?;
    let done = match command {
        Command::Add(options) => add(global, options, &storage).await,
        Command::Import(options) => import::run(global, options, &storage).await,
        Command::List(options) => list(global, options, &storage).await,
        Command::Watch(_) => Ok(()),
    };
    storage.close().await;
    done
}

async fn add(global: &Global, options: &Add, storage: &Storage) -> Done {
    let body = body(options)?;
    let invalid =
        |error: &dyn std::fmt::Display| Failure::Usage(format!("the event is not valid: {error}"));
    let event =
        NewContactEvent::from_json(&body, Some(options.contact)).map_err(|e| invalid(&e))?;
    let timeline = Timeline {
        events: storage.events.clone(),
        hub: Arc::new(Hub::default()),
        clock: clock(),
        // A daemon sees the event at its next look, within a second.
        wake: Arc::new(Notify::new()),
    };
    let repeatable = Repeatable::new(options.idempotency_key.clone(), options.contact, &body);
    let created = timeline
        .create(&options.tenant, event, Some(repeatable))
        .await;
    let event = match created {
        Ok(Created::New(event) | Created::Repeat(event)) => event,
        Err(Refusal::Invalid(error)) => return Err(invalid(&error)),
        Err(Refusal::NotFound) => return Err(Failure::NotFound("the event is gone".to_owned())),
        Err(refusal) => return Err(Failure::Other(refusal.into())),
    };
    print(global, &event, || event.id.to_string())
}

/// The event's JSON: the body, overridden by the options.
fn body(options: &Add) -> Result<Value, Failure> {
    let parse = |what: &str, text: &str| {
        serde_json::from_str::<Value>(text)
            .map_err(|error| Failure::Usage(format!("{what} is not JSON: {error}")))
    };
    let mut body = match options.body.as_deref() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            parse("standard input", &text)?
        }
        Some(text) => parse("--body", text)?,
        None => json!({}),
    };
    let Some(fields) = body.as_object_mut() else {
        return Err(Failure::Usage("--body must be a JSON object".to_owned()));
    };
    let texts = [
        ("event_type", &options.event_type),
        ("category", &options.category),
        ("source", &options.source),
        ("title", &options.title),
        ("priority", &options.priority),
        ("expires_at", &options.expires_at),
    ];
    for (name, value) in texts {
        if let Some(value) = value {
            fields.insert(name.to_owned(), json!(value));
        }
    }
    if let Some(payload) = &options.payload {
        fields.insert("payload".to_owned(), parse("--payload", payload)?);
    }
    for (name, is_set) in [
        ("is_realtime", options.realtime),
        ("visible_to_client", options.visible_to_client),
    ] {
        if is_set {
            fields.insert(name.to_owned(), json!(true));
        }
    }
    fields.entry("source").or_insert_with(|| json!("system"));
    Ok(body)
}

async fn list(global: &Global, options: &List, storage: &Storage) -> Done {
    let filter = Filter {
        category: options.category,
        event_type: options.event_type.clone(),
        since: options.since,
        until: options.until,
    };
    let view = View {
        audience: options.audience,
        now: clock().now(),
        include_expired: options.include_expired,
    };
    let page = Page::first(options.limit);
    let slice = storage
        .events
        .find_by_contact_visible_to(&options.tenant, options.contact, &filter, view, page)
        .await?;
    let events = &slice.events;
    print(global, &Listed { events }, || {
        slice.events.iter().map(line).collect::<Vec<_>>().join("\n")
    })
}

/// The answer of `events list --json`.
#[derive(Serialize)]
struct Listed<'e> {
    events: &'e [ContactEvent],
}

fn line(event: &ContactEvent) -> String {
    let title = event.title.as_deref().unwrap_or("");
    format!(
        "{}  {:<24} {:<12} {:<7} {}",
        format_time(event.occurred_at),
        event.event_type,
        event.category,
        event.priority,
        // A title is shown literally: it must not steer the terminal.
        title
            .chars()
            .filter(|c| !c.is_control())
            .collect::<String>(),
    )
}

async fn watch(global: &Global, options: &Watch, config: &Config) -> Done {
    let address = options
        .address
        .clone()
        .unwrap_or_else(|| config.http.listen.to_string());
    let token = match (&options.token, &options.tenant) {
        (Some(token), _) => token.clone(),
        (None, Some(tenant)) => own_token(config, tenant)?,
        (None, None) => return Err(Failure::Usage("--tenant or --token is required".to_owned())),
    };
    let unreachable = |error: &dyn std::fmt::Display| {
        Failure::Unreachable(format!(
            "the daemon at {address} cannot be reached: {error}"
        ))
    };
    let stream = TcpStream::connect(&address)
        .await
        .map_err(|error| unreachable(&error))?;
    let mut request = format!("ws://{address}/api/v1/realtime")
        .into_client_request()
        .map_err(|error| Failure::Usage(format!("--address: {error}")))?;
    let headers = request.headers_mut();
    headers.insert(
        "sec-websocket-protocol",
        HeaderValue::from_static(SUBPROTOCOL),
    );
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream)
        .await
        .map_err(|error| unreachable(&error))?;
    for frame in [
        json!({ "type": "auth", "token": token }),
        json!({ "type": "subscribe", "contacts": options.contacts }),
    ] {
        socket
            .send(Message::text(frame.to_string()))
            .await
            .context("the connection broke")?;
    }
    let mut seen = 0;
    while options.count.is_none_or(|count| seen < count) {
        let message = match socket.next().await {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(_))) | None => {
                return Err(unreachable(&"it closed the connection"));
            }
            Some(Ok(_)) => continue,
            Some(Err(error)) => return Err(unreachable(&error)),
        };
        let frame: Frame<'_> = serde_json::from_str(&message).context("the daemon sent no JSON")?;
        match (frame.kind, frame.event) {
            ("event", Some(event)) => {
                seen += 1;
                let id = show(global, event)?;
                let ack = json!({ "type": "ack", "ids": [id] });
                socket
                    .send(Message::text(ack.to_string()))
                    .await
                    .context("the connection broke")?;
            }
            ("bye", _) if frame.code == Some(4401) => {
                return Err(Failure::Denied(
                    "the daemon does not accept the token, or it has run out".to_owned(),
                ));
            }
            ("bye", _) => {
                let code = frame.code.unwrap_or_default();
                return Err(Failure::Unreachable(format!(
                    "the daemon closed the connection ({code})"
                )));
            }
            ("subscribed", _) if !frame.denied.is_empty() => {
                return Err(Failure::Denied(
                    "a contact may not be watched with this token".to_owned(),
                ));
            }
            _ => {}
        }
    }
    // The acknowledgement is on its way; the closing handshake waits for the daemon to take it.
    socket.close(None).await.context("the connection broke")?;
    while let Some(Ok(_)) = socket.next().await {}
    Ok(())
}

/// What a watcher looks at in a frame; the rest of it, such as a payload, is passed on unread.
#[derive(Deserialize)]
struct Frame<'f> {
    #[serde(rename = "type")]
    kind: &'f str,
    #[serde(borrow)]
    event: Option<&'f RawValue>,
    code: Option<u16>,
    #[serde(default)]
    denied: Vec<String>,
}

/// What a watcher shows of an event.
#[derive(Deserialize)]
struct Watched {
    id: String,
    occurred_at: String,
    event_type: String,
    category: String,
    priority: String,
    title: Option<String>,
}

/// Shows an event; answers its id.
fn show(global: &Global, event: &RawValue) -> Result<String, Failure> {
    let watched: Watched = serde_json::from_str(event.get()).context("the daemon sent no event")?;
    if global.json {
        out(event.get())?;
    } else {
        let title = watched.title.unwrap_or_default();
        out(&format!(
            "{}  {:<24} {:<12} {:<7} {}",
            watched.occurred_at,
            watched.event_type,
            watched.category,
            watched.priority,
            // A title is shown literally: it must not steer the terminal.
            title.replace(char::is_control, ""),
        ))?;
    }
    Ok(watched.id)
}

fn own_token(config: &Config, tenant: &TenantId) -> Result<String, Failure> {
    let access = access(config)?;
    let subject = Subject::new("command line").expect("a short text");
    let scope = Scope::Agent {
        tenant: tenant.clone(),
    };
    let hour = Duration::from_hours(1);
    Ok(access
        .issue(&subject, &scope, hour, clock().now())
        .map_err(anyhow::Error::from)?)
}
