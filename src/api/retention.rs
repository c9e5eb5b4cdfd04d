//! The routes of legal holds and of erasure.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, post};
use axum::{Json as JsonBody, Router};
use serde_json::{Map, Value, json};

use super::extract::{Id, Json, Params, reader};
use super::problem::Problem;
use crate::access::{Identity, Role};
use crate::domain::{Category, Clock, ContactId, Fault, HoldId, format_time};
use crate::erasure::Eraser;
use crate::storage::{HoldScope, RetentionStore};

/// The longest reason, in characters.
pub const MAX_REASON: usize = 1_000;

/// What the routes need.
#[derive(Clone)]
pub struct RetentionApi {
    /// The holds.
    pub store: Arc<dyn RetentionStore>,
    /// Erasure.
    pub eraser: Arc<Eraser>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
}

pub(super) fn routes(api: RetentionApi) -> Router {
    Router::new()
        .route("/holds", post(place).get(list))
        .route("/holds/{id}", delete(release))
        .route("/contacts/{contact_id}/events", delete(erase))
        .with_state(api)
}

async fn place(
    State(api): State<RetentionApi>,
    identity: Identity,
    params: Params,
    Json(body): Json,
) -> Result<Response, Problem> {
    let reader = reader(identity, &[Role::Service])?;
    params.finish()?;
    let (scope, reason) = parse(&body).map_err(Problem::invalid)?;
    let now = api.clock.now();
    let placed = api
        .store
        .place_hold(&reader.tenant, scope, &reason, &reader.subject, now);
    let hold = placed.await?;
    tracing::info!(hold.id = %hold.id, tenant.id = %hold.tenant_id, "a legal hold was placed");
    Ok((StatusCode::CREATED, JsonBody(hold)).into_response())
}

async fn list(
    State(api): State<RetentionApi>,
    identity: Identity,
    params: Params,
) -> Result<Response, Problem> {
    let reader = reader(identity, &[Role::Service])?;
    params.finish()?;
    let holds = api.store.holds(Some(&reader.tenant)).await?;
    Ok(JsonBody(json!({ "holds": holds })).into_response())
}

/// Everything of the contact goes: 200 says what it was, when it is gone.
async fn erase(
    State(api): State<RetentionApi>,
    identity: Identity,
    Id(contact): Id<ContactId>,
    params: Params,
) -> Result<Response, Problem> {
    let reader = reader(identity, &[Role::Service])?;
    params.finish()?;
    let erased = api
        .eraser
        .erase(&reader.tenant, contact, &reader.subject)
        .await?;
    let body = json!({
        "erasure_id": erased.id,
        "contact_id": erased.contact_id,
        "events": erased.events,
        "exports": erased.exports.len(),
        "requested_by": erased.requested_by,
        "requested_at": format_time(erased.requested_at),
        "finished_at": erased.finished_at.map(format_time),
    });
    Ok(JsonBody(body).into_response())
}

async fn release(
    State(api): State<RetentionApi>,
    identity: Identity,
    Id(id): Id<HoldId>,
    params: Params,
) -> Result<Response, Problem> {
    let reader = reader(identity, &[Role::Service])?;
    params.finish()?;
    let now = api.clock.now();
    let released = api
        .store
        .release_hold(&reader.tenant, id, &reader.subject, now);
    if !released.await? {
        return Err(Problem::not_found("there is no such hold"));
    }
    tracing::info!(hold.id = %id, tenant.id = %reader.tenant, "a legal hold was released");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Reads the body of a hold; every fault at once.
fn parse(body: &Value) -> Result<(HoldScope, String), Vec<Fault>> {
    let fault = |pointer: &str, detail: String| Fault {
        pointer: pointer.to_owned(),
        detail,
    };
    let Value::Object(body) = body else {
        return Err(vec![fault("", "must be a JSON object".to_owned())]);
    };
    let mut faults = Vec::new();
    let contact: Option<ContactId> = parsed(body, "contact_id", &mut faults);
    let category: Option<Category> = parsed(body, "category", &mut faults);
    let reason: String = parsed(body, "reason", &mut faults).unwrap_or_default();
    if reason.chars().count() > MAX_REASON || reason.contains('\0') {
        let allowed = format!("must be at most {MAX_REASON} characters without NUL");
        faults.push(fault("/reason", allowed));
    }
    if contact.is_some() && category.is_some() {
        let detail = "excludes contact_id; place two holds to keep both".to_owned();
        faults.push(fault("/category", detail));
    }
    for field in body.keys() {
        if !["contact_id", "category", "reason"].contains(&field.as_str()) {
            let token = field.replace('~', "~0").replace('/', "~1");
            let detail = "is not a field of a hold; allowed: contact_id category reason";
            faults.push(fault(&format!("/{token}"), detail.to_owned()));
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let scope = match (contact, category) {
        (Some(contact), _) => HoldScope::Contact(contact),
        (None, Some(category)) => HoldScope::Category(category),
        (None, None) => HoldScope::Tenant,
    };
    Ok((scope, reason))
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    body: &Map<String, Value>,
    field: &str,
    faults: &mut Vec<Fault>,
) -> Option<T> {
    let parsed = match body.get(field)? {
        Value::Null => return None,
        Value::String(text) => text.parse().map_err(|error: T::Err| error.to_string()),
        _ => Err("must be a text".to_owned()),
    };
    parsed
        .map_err(|detail| {
            faults.push(Fault {
                pointer: format!("/{field}"),
                detail,
            });
        })
        .ok()
}
