//! The routes of events: record, read, acknowledge, delete.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json as JsonBody, Router};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;

use super::cursor::Query;
use super::extract::{Id, Json, Params, READERS, STAFF, reader};
use super::problem::Problem;
use crate::access::{Identity, Reader, Role};
use crate::domain::{
    Audience, Category, ContactEvent, ContactId, EventId, EventType, NewContactEvent, SessionId,
    format_time,
};
use crate::storage::{Filter, MAX_EXACT_TOTAL, Page, Position, Slice, View};
use crate::timeline::{Created, MAX_IDEMPOTENCY_KEY, Repeatable, Timeline};

type Answer = Result<Response, Problem>;

const MAX_LIMIT: u32 = 200;

pub(super) fn routes(timeline: Timeline) -> Router {
    Router::new()
        .route(
            "/contacts/{contact_id}/events",
            post(create).get(of_contact),
        )
        .route("/sessions/{session_id}/events", get(of_session))
        .route("/contact-events", get(of_tenant))
        .route("/contact-events/undelivered", get(undelivered))
        .route("/contact-events/{id}", get(one).delete(delete))
        .route("/contact-events/{id}/mark-read", post(mark_read))
        .route("/contact-events/{id}/mark-delivered", post(mark_delivered))
        .with_state(timeline)
}

async fn create(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(contact): Id<ContactId>,
    params: Params,
    headers: HeaderMap,
    Json(body): Json,
) -> Answer {
    let reader = reader(identity, STAFF)?;
    params.finish()?;
    let key = idempotency_key(&headers)?;
    let event = NewContactEvent::from_json(&body, Some(contact))
        .map_err(|invalid| Problem::invalid(invalid.0))?;
    let repeatable = Repeatable::new(key, contact, &body);
    Ok(
        match timeline
            .create(&reader.tenant, event, Some(repeatable))
            .await?
        {
            Created::New(event) => (StatusCode::CREATED, JsonBody(event)).into_response(),
            Created::Repeat(event) => JsonBody(event).into_response(),
        },
    )
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=MAX_IDEMPOTENCY_KEY).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(Problem::bad_request(format!(
            "Idempotency-Key must be 1 to {MAX_IDEMPOTENCY_KEY} visible ASCII characters"
        ))),
    }
}

/// The view of a reader; services may ask for expired events too.
fn view(timeline: &Timeline, reader: &Reader, params: &mut Params) -> Result<View, Problem> {
    let include_expired = params.flag("include_expired")?;
    if include_expired && reader.audience != Audience::Audit {
        return Err(Problem::bad_request(
            "include_expired is for the role service",
        ));
    }
    Ok(View {
        audience: reader.audience,
        now: timeline.clock.now(),
        include_expired,
    })
}

/// Where a page begins: by offset or by cursor, not by both.
fn page(params: &mut Params, query: &Query, default_limit: u32) -> Result<Page, Problem> {
    let limit = params
        .number("limit", 1..=MAX_LIMIT)?
        .unwrap_or(default_limit);
    let (offset, cursor) = (params.offset()?, params.text("cursor"));
    let position = match (offset, cursor) {
        (Some(_), Some(_)) => {
            return Err(Problem::bad_request("offset and cursor exclude each other"));
        }
        (_, Some(cursor)) => Position::After(query.decode(&cursor)?),
        (offset, None) => Position::Offset(offset.unwrap_or(0)),
    };
    Ok(Page { limit, position })
}

fn text(time: Option<DateTime<Utc>>) -> String {
    time.map(format_time).unwrap_or_default()
}

fn no_contact() -> Problem {
    Problem::not_found("there is no such contact")
}

async fn of_contact(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(contact): Id<ContactId>,
    mut params: Params,
) -> Answer {
    let reader = reader(identity, READERS)?;
    let filter = Filter {
        category: params.get("category")?,
        event_type: params.get("event_type")?,
        since: params.time("since")?,
        until: params.time("until")?,
    };
    let view = view(&timeline, &reader, &mut params)?;
    let query = Query::new(&[
        "contact",
        reader.tenant.as_str(),
        reader.audience.as_str(),
        &contact.to_string(),
        filter.category.map_or("", Category::as_str),
        filter.event_type.as_ref().map_or("", EventType::as_str),
        &text(filter.since),
        &text(filter.until),
    ]);
    let page = page(&mut params, &query, 50)?;
    params.finish()?;
    if !reader.may_see(contact) {
        return Err(no_contact());
    }
    let events = &timeline.events;
    let (slice, total) = tokio::try_join!(
        events.find_by_contact_visible_to(&reader.tenant, contact, &filter, view, page),
        events.count_by_contact(&reader.tenant, contact, &filter, view),
    )?;
    let number = match page.position {
        Position::Offset(offset) => Some(offset / page.limit + 1),
        Position::After(_) => None,
    };
    Ok(JsonBody(TimelinePage {
        total: total.min(MAX_EXACT_TOTAL),
        total_is_capped: total > MAX_EXACT_TOTAL,
        page: number,
        limit: page.limit,
        next_cursor: slice.next.map(|key| query.encode(key)),
        events: slice.events,
    })
    .into_response())
}

/// A page of a contact's timeline.
#[derive(Serialize)]
struct TimelinePage {
    events: Vec<ContactEvent>,
    /// What this reader sees in all, exact to 10,000.
    total: u32,
    total_is_capped: bool,
    /// Null with a cursor.
    page: Option<u32>,
    limit: u32,
    next_cursor: Option<String>,
}

/// A page of any other list of events.
#[derive(Serialize)]
struct EventPage {
    events: Vec<ContactEvent>,
    next_cursor: Option<String>,
}

fn list(slice: Slice, query: &Query) -> Response {
    let next_cursor = slice.next.map(|key| query.encode(key));
    JsonBody(EventPage {
        events: slice.events,
        next_cursor,
    })
    .into_response()
}

async fn of_session(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(session): Id<SessionId>,
    mut params: Params,
) -> Answer {
    let reader = reader(identity, READERS)?;
    let view = view(&timeline, &reader, &mut params)?;
    let tenant = &reader.tenant;
    let audience = reader.audience.as_str();
    let query = Query::new(&["session", tenant.as_str(), audience, &session.to_string()]);
    let page = page(&mut params, &query, MAX_LIMIT)?;
    params.finish()?;
    let contacts = reader.contact_list();
    let slice = timeline
        .events
        .find_by_session(tenant, session, contacts.as_deref(), view, page)
        .await?;
    Ok(list(slice, &query))
}

async fn of_tenant(
    State(timeline): State<Timeline>,
    identity: Identity,
    mut params: Params,
) -> Answer {
    let reader = reader(identity, STAFF)?;
    let event_type: Option<EventType> = params.get("event_type")?;
    let category: Option<Category> = params.get("category")?;
    let since = params.time("since")?;
    let view = view(&timeline, &reader, &mut params)?;
    let tenant = &reader.tenant;
    let query = Query::new(&[
        "tenant",
        tenant.as_str(),
        reader.audience.as_str(),
        event_type.as_ref().map_or("", EventType::as_str),
        category.map_or("", Category::as_str),
        &text(since),
    ]);
    let page = page(&mut params, &query, 50)?;
    params.finish()?;
    let since = since.unwrap_or(DateTime::UNIX_EPOCH - chrono::TimeDelta::days(719_162));
    let events = &timeline.events;
    let slice = match (event_type, category) {
        (Some(event_type), None) => {
            events
                .find_by_type_since(tenant, &event_type, since, view, page)
                .await?
        }
        (None, Some(category)) => {
            events
                .find_by_category_since(tenant, category, since, view, page)
                .await?
        }
        _ => {
            return Err(Problem::bad_request(
                "either event_type or category is required",
            ));
        }
    };
    Ok(list(slice, &query))
}

async fn undelivered(
    State(timeline): State<Timeline>,
    identity: Identity,
    mut params: Params,
) -> Answer {
    let reader = reader(identity, READERS)?;
    let contact: Option<ContactId> = params.get("contact_id")?;
    let Some(contact) = contact else {
        return Err(Problem::bad_request("contact_id is required"));
    };
    let tenant = &reader.tenant;
    let audience = reader.audience.as_str();
    let query = Query::new(&[
        "undelivered",
        tenant.as_str(),
        audience,
        &contact.to_string(),
    ]);
    let page = page(&mut params, &query, 50)?;
    params.finish()?;
    if !reader.may_see(contact) {
        return Err(no_contact());
    }
    let view = View::of(reader.audience, timeline.clock.now());
    let slice = timeline
        .events
        .find_undelivered_for_contact(tenant, contact, view, page)
        .await?;
    Ok(list(slice, &query))
}

async fn one(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(id): Id<EventId>,
    mut params: Params,
) -> Answer {
    let reader = reader(identity, READERS)?;
    // Taken for symmetry with the lists: a service sees an expired event either way.
    view(&timeline, &reader, &mut params)?;
    params.finish()?;
    Ok(JsonBody(timeline.find(&reader, id).await?).into_response())
}

async fn delete(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(id): Id<EventId>,
    params: Params,
) -> Answer {
    let reader = reader(identity, &[Role::Service])?;
    params.finish()?;
    timeline.delete(&reader, id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn mark_read(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(id): Id<EventId>,
    params: Params,
) -> Answer {
    let reader = reader(identity, READERS)?;
    params.finish()?;
    let read_at = format_time(timeline.mark_read(&reader, id).await?);
    Ok(JsonBody(json!({ "success": true, "event_id": id, "read_at": read_at })).into_response())
}

async fn mark_delivered(
    State(timeline): State<Timeline>,
    identity: Identity,
    Id(id): Id<EventId>,
    params: Params,
) -> Answer {
    let reader = reader(identity, READERS)?;
    params.finish()?;
    let delivered_at = format_time(timeline.mark_delivered(&reader, id).await?);
    let body = json!({ "success": true, "event_id": id, "delivered_at": delivered_at });
    Ok(JsonBody(body).into_response())
}
