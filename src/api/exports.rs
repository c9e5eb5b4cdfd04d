//! The routes of exports: ask for one, see how it is, take the file, end it, mail it anew, take its
//! file away. They only change rows and wake the worker.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use axum::Json as JsonBody;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use super::extract::{Id, Json, OptionalJson, Params, STAFF, reader};
use super::problem::Problem;
use crate::access::{Identity, Reader, Role};
use crate::config::AllowedDomains;
use crate::domain::{
    Audience, Category, Clock, ContactId, ExportId, Fault, TenantId, format_time, parse_time,
};
use crate::export::{FileKind, Format, REDACTABLE, file_path, message_ids};
use crate::storage::{
    Export, ExportRequest, ExportState, ExportStore, NewExport, NewMail, OldFile,
};

/// Recipients of one export.
const MAX_RECIPIENTS: usize = 50;
/// Mails of one export, with those that were sent anew.
const MAX_MAILS: usize = 1000;

/// What the routes need.
#[derive(Clone)]
pub struct ExportsApi {
    /// The queue.
    pub exports: Arc<dyn ExportStore>,
    /// Where the files lie.
    pub directory: PathBuf,
    /// To whom they may be mailed.
    pub allowed_domains: Arc<AllowedDomains>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// Wakes the worker.
    pub wake: Arc<Notify>,
}

pub(super) fn routes(api: ExportsApi) -> Router {
    Router::new()
        .route("/contacts/{contact_id}/exports", post(create))
        .route("/exports", get(list))
        .route("/exports/{id}", get(one).delete(discard))
        .route("/exports/{id}/file", get(file))
        .route("/exports/{id}/cancel", post(cancel))
        .route("/exports/{id}/resend", post(resend))
        .with_state(api)
}

async fn create(
    State(api): State<ExportsApi>,
    identity: Identity,
    Id(contact_id): Id<ContactId>,
    params: Params,
    Json(body): Json,
) -> Result<Response, Problem> {
    let role = identity.role();
    let reader = reader(identity, STAFF)?;
    params.finish()?;
    let request = parse(&api, &body, contact_id, role, &reader.tenant).map_err(Problem::invalid)?;
    let now = api.clock.now();
    let id = ExportId::generate(now);
    let export = NewExport {
        id,
        tenant_id: reader.tenant,
        message_ids: message_ids(id, request.to.len()),
        request,
        requested_by: reader.subject,
        request_key: None,
        created_at: now,
    };
    let id = api.exports.create_one(&export).await?;
    api.wake.notify_one();
    let body = json!({ "id": id, "state": ExportState::Queued, "href": href(id) });
    Ok((StatusCode::ACCEPTED, JsonBody(body)).into_response())
}

fn href(id: ExportId) -> String {
    format!("/api/v1/exports/{id}")
}

/// Reads the body of an export; every fault at once.
fn parse(
    api: &ExportsApi,
    body: &Value,
    contact_id: ContactId,
    role: Role,
    tenant: &TenantId,
) -> Result<ExportRequest, Vec<Fault>> {
    let Value::Object(body) = body else {
        return Err(vec![fault("", "must be a JSON object")]);
    };
    let mut fields = Fields {
        body,
        known: Vec::new(),
        faults: Vec::new(),
    };
    let format: Option<Format> = fields.parsed("format");
    if body.get("format").is_none_or(Value::is_null) {
        fields.faults.push(fault("/format", "is required"));
    }
    let audience = fields.parsed("audience").unwrap_or(Audience::Client);
    if audience == Audience::Audit && role != Role::Service {
        fields
            .faults
            .push(fault("/audience", "audit is for the role service"));
    }
    let (since, until) = (fields.time("since"), fields.time("until"));
    if since
        .zip(until)
        .is_some_and(|(since, until)| since >= until)
    {
        fields
            .faults
            .push(fault("/until", "must be later than since"));
    }
    let categories: Vec<Category> = fields.all_parsed("categories");
    let timezone = fields.parsed("timezone").unwrap_or(chrono_tz::UTC);
    fields.locale();
    let redact: Vec<String> = fields.all_parsed("redact");
    for (index, field) in redact.iter().enumerate() {
        if !REDACTABLE.contains(&field.as_str()) {
            let detail = format!("cannot be redacted; allowed: {}", REDACTABLE.join(" "));
            fields
                .faults
                .push(fault(&format!("/redact/{index}"), &detail));
        }
    }
    let to = fields.recipients(&api.allowed_domains, tenant);
    let attach = fields.flag("attach").unwrap_or(true);
    fields.refuse_unknown();
    match format {
        Some(format) if fields.faults.is_empty() => Ok(ExportRequest {
            contact_id,
            format: format.to_string(),
            audience,
            since,
            until,
            categories,
            timezone,
            redact,
            to,
            attach,
        }),
        _ => Err(fields.faults),
    }
}

fn fault(pointer: &str, detail: &str) -> Fault {
    Fault {
        pointer: pointer.to_owned(),
        detail: detail.to_owned(),
    }
}

struct Fields<'a> {
    body: &'a Map<String, Value>,
    known: Vec<&'static str>,
    faults: Vec<Fault>,
}

impl Fields<'_> {
    fn value(&mut self, field: &'static str) -> Option<&Value> {
        self.known.push(field);
        self.body.get(field).filter(|value| !value.is_null())
    }

    fn wrong(&mut self, field: &str, detail: &str) {
        self.faults.push(fault(&format!("/{field}"), detail));
    }

    fn parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, field: &'static str) -> Option<T> {
        let parsed = match self.value(field)? {
            Value::String(text) => text.parse::<T>().map_err(|error| error.to_string()),
            _ => Err("must be a text".to_owned()),
        };
        parsed.map_err(|detail| self.wrong(field, &detail)).ok()
    }

    fn all_parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, field: &'static str) -> Vec<T> {
        let items = match self.value(field) {
            None => return Vec::new(),
            Some(Value::Array(items)) => items.clone(),
            Some(_) => {
                self.wrong(field, "must be an array of texts");
                return Vec::new();
            }
        };
        let mut parsed = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match item.as_str().map(str::parse::<T>) {
                Some(Ok(value)) => parsed.push(value),
                Some(Err(error)) => self.wrong(&format!("{field}/{index}"), &error.to_string()),
                None => self.wrong(&format!("{field}/{index}"), "must be a text"),
            }
        }
        parsed
    }

    fn recipients(&mut self, domains: &AllowedDomains, tenant: &TenantId) -> Vec<String> {
        let mut to: Vec<String> = Vec::new();
        for (index, address) in self.all_parsed::<lettre::Address>("to").iter().enumerate() {
            if !domains.allow(tenant, address) {
                let detail = "is at a domain that mail may not be sent to (mail.allowed_domains)";
                self.wrong(&format!("to/{index}"), detail);
            }
            let address = address.to_string();
            // One message per recipient, however often it is named.
            if !to.iter().any(|known| known.eq_ignore_ascii_case(&address)) {
                to.push(address);
            }
        }
        if to.len() > MAX_RECIPIENTS {
            self.wrong(
                "to",
                &format!("names more than {MAX_RECIPIENTS} recipients"),
            );
        }
        to
    }

    fn time(&mut self, field: &'static str) -> Option<DateTime<Utc>> {
        let text: String = self.parsed(field)?;
        let time = parse_time(&text);
        if time.is_none() {
            let detail = "must be a time of RFC 3339 such as 2026-01-31T12:00:00Z";
            self.wrong(field, detail);
        }
        time
    }

    fn flag(&mut self, field: &'static str) -> Option<bool> {
        let flag = self.value(field)?.as_bool();
        if flag.is_none() {
            self.wrong(field, "must be true or false");
        }
        flag
    }

    /// The language of the mail: English is the only one so far.
    fn locale(&mut self) {
        let locale: Option<String> = self.parsed("locale");
        if locale.is_some_and(|locale| locale != "en") {
            self.wrong("locale", "is not known; allowed: en");
        }
    }

    fn refuse_unknown(&mut self) {
        let unknown: Vec<&String> = self
            .body
            .keys()
            .filter(|field| !self.known.contains(&field.as_str()))
            .collect();
        for field in unknown {
            let token = field.replace('~', "~0").replace('/', "~1");
            self.faults
                .push(fault(&format!("/{token}"), "is not a field of an export"));
        }
    }
}

async fn list(
    State(api): State<ExportsApi>,
    identity: Identity,
    mut params: Params,
) -> Result<Response, Problem> {
    let role = identity.role();
    let reader = reader(identity, STAFF)?;
    let limit = params.number("limit", 1..=200)?.unwrap_or(50);
    let before: Option<ExportId> = params.get("cursor")?;
    params.finish()?;
    let listed = api
        .exports
        .list(&reader.tenant, audiences(role), before, limit + 1);
    let mut exports = listed.await?;
    let has_more = exports.len() > limit as usize;
    exports.truncate(limit as usize);
    let next_cursor = exports.last().filter(|_| has_more).map(|export| export.id);
    let exports: Vec<Value> = exports.iter().map(show).collect();
    Ok(JsonBody(json!({ "exports": exports, "next_cursor": next_cursor })).into_response())
}

/// Whose exports a role may see: one for audit shows what agents may not see.
fn audiences(role: Role) -> &'static [Audience] {
    if role == Role::Service {
        &[Audience::Client, Audience::Agent, Audience::Audit]
    } else {
        &[Audience::Client, Audience::Agent]
    }
}

async fn find(api: &ExportsApi, identity: Identity, id: ExportId) -> Result<Export, Problem> {
    let role = identity.role();
    let reader = reader(identity, STAFF)?;
    let export = api.exports.find(&reader.tenant, id).await?;
    export
        .filter(|export| audiences(role).contains(&export.request.audience))
        .ok_or_else(|| Problem::not_found("there is no such export"))
}

async fn one(
    State(api): State<ExportsApi>,
    identity: Identity,
    Id(id): Id<ExportId>,
    params: Params,
) -> Result<Response, Problem> {
    params.finish()?;
    Ok(JsonBody(show(&find(&api, identity, id).await?)).into_response())
}

/// A file that was taken away lies there until the worker comes by.
fn has_file(export: &Export) -> bool {
    export.file_name.is_some() && export.state != ExportState::Expired
}

/// An export as clients see it.
fn show(export: &Export) -> Value {
    let time = |at: Option<DateTime<Utc>>| at.map(format_time);
    let request = &export.request;
    json!({
        "id": export.id,
        "state": export.state,
        "href": href(export.id),
        "contact_id": request.contact_id,
        "format": request.format,
        "audience": request.audience,
        "since": time(request.since),
        "until": time(request.until),
        "categories": request.categories,
        "timezone": request.timezone.name(),
        "redact": request.redact,
        "attach": request.attach,
        "requested_by": export.requested_by,
        "created_at": format_time(export.created_at),
        "started_at": time(export.started_at),
        "rendered_at": time(export.rendered_at),
        "finished_at": time(export.finished_at),
        "expires_at": time(export.expires_at),
        "attempts": export.attempt,
        "progress": { "rows": export.rows, "total": export.total_rows },
        "rows": export.rendered_at.map(|_| export.rows),
        "bytes": export.bytes,
        "sha256": export.sha256,
        "file": has_file(export).then(|| format!("{}/file", href(export.id))),
        "error": export.error,
        "downloads": export.downloads,
        "last_download_at": time(export.last_download_at),
        "deliveries": export.deliveries,
        "links": export.links,
        "actions": export.actions,
    })
}

async fn file(
    State(api): State<ExportsApi>,
    method: Method,
    identity: Identity,
    Id(id): Id<ExportId>,
    params: Params,
) -> Result<Response, Problem> {
    params.finish()?;
    let export = find(&api, identity, id).await?;
    send_file(&api, &export, None, &method).await
}

/// The file of an export, for whoever may have it. Fetching it is counted, by the link with that hash
/// if by one; asking for the head only is not.
pub(super) async fn send_file(
    api: &ExportsApi,
    export: &Export,
    link: Option<&str>,
    method: &Method,
) -> Result<Response, Problem> {
    let id = export.id;
    let Some(name) = &export.file_name else {
        return Err(match export.state {
            ExportState::Expired => Problem::gone("the file has expired and was deleted"),
            ExportState::Cancelled => Problem::gone("the export was cancelled"),
            state => Problem::conflict(
                "not-rendered",
                "Not rendered",
                format!("there is no file so far: the export is {state}"),
            ),
        });
    };
    if export.expires_at.is_some_and(|at| at <= api.clock.now()) {
        // The file may be gone already, while the row does not say so yet.
        return Err(Problem::gone("the file has expired"));
    }
    let path = file_path(&api.directory, name).ok_or_else(|| {
        tracing::error!(export.id = %id, "the row of an export names no file");
        Problem::internal()
    })?;
    let file = tokio::fs::File::open(&path).await.map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            tracing::warn!(export.id = %id, "the file of an export is not here");
            return Problem::not_found(
                "the file is not on this daemon: another one rendered it, or it was removed by hand",
            );
        }
        tracing::error!(export.id = %id, %error, "the file of an export cannot be opened");
        Problem::internal()
    })?;
    if method != Method::HEAD {
        let now = api.clock.now();
        api.exports
            .downloaded(&export.tenant_id, id, link, now)
            .await?;
    }
    let kind = FileKind::of(name);
    let headers = [
        (header::CONTENT_TYPE, kind.media_type().to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!(
                "attachment; filename=\"timeline-{id}.{}\"",
                kind.extension()
            ),
        ),
        (
            header::CONTENT_LENGTH,
            export.bytes.unwrap_or(0).to_string(),
        ),
        (header::CACHE_CONTROL, "private, no-store".to_owned()),
    ];
    Ok((
        headers,
        Body::from_stream(tokio_util::io::ReaderStream::new(file)),
    )
        .into_response())
}

/// An export that somebody wants to change, and who that is.
async fn of_reader(
    api: &ExportsApi,
    identity: Identity,
    id: ExportId,
) -> Result<(Export, Reader), Problem> {
    let by = reader(identity.clone(), STAFF)?;
    Ok((find(api, identity, id).await?, by))
}

/// Ends an export of which nothing has been sent; a repeat changes nothing.
async fn cancel(
    State(api): State<ExportsApi>,
    identity: Identity,
    Id(id): Id<ExportId>,
    params: Params,
) -> Result<Response, Problem> {
    let (export, by) = of_reader(&api, identity.clone(), id).await?;
    params.finish()?;
    if export.state != ExportState::Cancelled {
        let cancelled = api
            .exports
            .cancel(&by.tenant, id, &by.subject, api.clock.now());
        if !cancelled.await? {
            let state = find(&api, identity, id).await?.state;
            return Err(Problem::conflict(
                "not-cancellable",
                "Cannot be cancelled",
                format!(
                    "the export is {state}; one that is queued or running can be cancelled, and \
                     DELETE takes away file, links and mails that wait"
                ),
            ));
        }
        tracing::info!(export.id = %id, tenant.id = %by.tenant, "an export was cancelled");
        remove_file(&api, &export).await?;
        api.wake.notify_one();
    }
    Ok(JsonBody(show(&find(&api, identity, id).await?)).into_response())
}

/// Mails a file that is there anew: to those who had it, or to those in the body.
async fn resend(
    State(api): State<ExportsApi>,
    identity: Identity,
    Id(id): Id<ExportId>,
    params: Params,
    OptionalJson(body): OptionalJson,
) -> Result<Response, Problem> {
    let (export, by) = of_reader(&api, identity.clone(), id).await?;
    params.finish()?;
    let to = match body {
        None => Vec::new(),
        Some(body) => parse_recipients(&api, &body, &by.tenant).map_err(Problem::invalid)?,
    };
    let to = if to.is_empty() { export.request.to } else { to };
    if to.is_empty() {
        let detail = "is required, since the export was mailed to nobody";
        return Err(Problem::invalid(vec![fault("/to", detail)]));
    }
    let conflict =
        |detail: String| Problem::conflict("not-resendable", "Cannot be mailed anew", detail);
    if export.deliveries.len() + to.len() > MAX_MAILS {
        let detail = format!("an export has at most {MAX_MAILS} mails");
        return Err(conflict(detail));
    }
    let now = api.clock.now();
    let ids = message_ids(ExportId::generate(now), to.len());
    let mails: Vec<NewMail> = to
        .into_iter()
        .zip(ids)
        .map(|(to, message_id)| NewMail { to, message_id })
        .collect();
    let resent = api.exports.resend(&by.tenant, id, &mails, &by.subject, now);
    if !resent.await? {
        let export = find(&api, identity, id).await?;
        return Err(conflict(match export.state {
            ExportState::Queued | ExportState::Running => {
                format!(
                    "the export is {}, and its mails are still to go out",
                    export.state
                )
            }
            state => format!("the export is {state}, and there is no file to send"),
        }));
    }
    tracing::info!(
        export.id = %id, tenant.id = %by.tenant, mails = mails.len(), "an export is mailed anew"
    );
    api.wake.notify_one();
    let export = find(&api, identity, id).await?;
    Ok((StatusCode::ACCEPTED, JsonBody(show(&export))).into_response())
}

/// Takes away the file, the links to it and what is still to be mailed of it; a repeat changes nothing.
async fn discard(
    State(api): State<ExportsApi>,
    identity: Identity,
    Id(id): Id<ExportId>,
    params: Params,
) -> Result<Response, Problem> {
    let (export, by) = of_reader(&api, identity.clone(), id).await?;
    params.finish()?;
    // Of one without a file nothing is left to be taken away, but mails that wait for it to come back.
    if has_file(&export) || export.state != ExportState::Expired {
        let discarded = api
            .exports
            .discard(&by.tenant, id, &by.subject, api.clock.now());
        if !discarded.await? {
            let state = find(&api, identity, id).await?.state;
            return Err(Problem::conflict(
                "not-ended",
                "Not ended",
                format!("the export is {state}; cancel it first"),
            ));
        }
        tracing::info!(export.id = %id, tenant.id = %by.tenant, "the file of an export was taken away");
        remove_file(&api, &export).await?;
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Removes the file of an export that is over, if it lies here. Otherwise, and where that fails, the
/// worker that looks after expired files sees to it.
async fn remove_file(api: &ExportsApi, export: &Export) -> Result<(), Problem> {
    let Some(name) = &export.file_name else {
        return Ok(());
    };
    let Some(path) = file_path(&api.directory, name) else {
        return Ok(());
    };
    match tokio::fs::remove_file(path).await {
        Ok(()) => {
            let file = OldFile {
                tenant: export.tenant_id.as_str().to_owned(),
                export: export.id.uuid(),
                name: name.clone(),
            };
            api.exports.expire(&[file]).await?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(export.id = %export.id, %error, "the file of an export could not be deleted so far");
        }
    }
    Ok(())
}

/// Reads the body of a resend: `{"to":[…]}`.
fn parse_recipients(
    api: &ExportsApi,
    body: &Value,
    tenant: &TenantId,
) -> Result<Vec<String>, Vec<Fault>> {
    let Value::Object(body) = body else {
        return Err(vec![fault("", "must be a JSON object")]);
    };
    let mut fields = Fields {
        body,
        known: Vec::new(),
        faults: Vec::new(),
    };
    let to = fields.recipients(&api.allowed_domains, tenant);
    fields.refuse_unknown();
    if fields.faults.is_empty() {
        Ok(to)
    } else {
        Err(fields.faults)
    }
}
