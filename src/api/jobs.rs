//! The routes of jobs, for operators.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json as JsonBody, Router};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::extract::{Id, Ids, Params, operator};
use super::problem::Problem;
use crate::access::Identity;
use crate::config::JobDefinition;
use crate::domain::{Clock, RunId, format_time};
use crate::jobs::{self, Pulse};
use crate::storage::{JobLedger, Run, RunState, StorageResult};

/// What the routes need.
#[derive(Clone)]
pub struct JobsApi {
    /// The jobs of the configuration, which a reload replaces.
    pub jobs: watch::Receiver<Arc<[JobDefinition]>>,
    /// The ledger of runs.
    pub ledger: Arc<dyn JobLedger>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// Wakes the planner.
    pub pulse: Pulse,
}

pub(super) fn routes(api: JobsApi) -> Router {
    Router::new()
        .route("/jobs", get(list))
        .route("/jobs/{name}", get(one))
        .route("/jobs/{name}/runs", get(runs))
        .route("/jobs/{name}/actions", get(actions))
        .route("/jobs/{name}/run", post(run))
        .route("/jobs/{name}/pause", post(pause))
        .route("/jobs/{name}/resume", post(resume))
        .route("/jobs/{name}/runs/{id}/cancel", post(cancel))
        .route("/jobs/{name}/runs/{id}/retry", post(retry))
        .with_state(api)
}

/// A job as operators see it.
#[must_use]
pub(super) fn show(
    job: &JobDefinition,
    last_run: Option<&Run>,
    is_paused: bool,
    clock: &dyn Clock,
) -> Value {
    let next_at = job
        .enabled
        .then(|| job.schedule.next_after(clock.now()))
        .flatten();
    json!({
        "name": job.name,
        "kind": job.kind.name(),
        "schedule": job.schedule.to_string(),
        "timezone": job.schedule.timezone().name(),
        "enabled": job.enabled,
        "paused": is_paused,
        "next_at": next_at.map(format_time),
        "last_run": last_run,
    })
}

async fn list(
    State(api): State<JobsApi>,
    identity: Identity,
    params: Params,
) -> Result<Response, Problem> {
    operator(identity)?;
    params.finish()?;
    let jobs = api.jobs.borrow().clone();
    let shown = show_all(&jobs, &*api.ledger, &*api.clock).await?;
    Ok(JsonBody(json!({ "jobs": shown })).into_response())
}

/// Jobs as operators see them, with what the ledger knows.
///
/// # Errors
/// Those of storage.
pub async fn show_all(
    jobs: &[JobDefinition],
    ledger: &dyn JobLedger,
    clock: &dyn Clock,
) -> StorageResult<Vec<Value>> {
    let names: Vec<String> = jobs.iter().map(|job| job.name.clone()).collect();
    let last = ledger.last_runs(&names).await?;
    let pauses = ledger.pauses().await?;
    let shown = jobs.iter().map(|job| {
        let last = last.iter().find(|run| run.job == job.name);
        let is_paused = pauses.iter().any(|pause| pause.job == job.name);
        show(job, last, is_paused, clock)
    });
    Ok(shown.collect())
}

fn find(api: &JobsApi, name: &str) -> Result<JobDefinition, Problem> {
    let jobs = api.jobs.borrow();
    let job = jobs.iter().find(|job| job.name == name);
    job.cloned()
        .ok_or_else(|| Problem::not_found("there is no such job"))
}

async fn show_one(api: &JobsApi, job: JobDefinition) -> Result<Response, Problem> {
    let mut shown = show_all(&[job], &*api.ledger, &*api.clock).await?;
    Ok(JsonBody(shown.remove(0)).into_response())
}

async fn one(
    State(api): State<JobsApi>,
    identity: Identity,
    Id(name): Id<String>,
    params: Params,
) -> Result<Response, Problem> {
    operator(identity)?;
    params.finish()?;
    let job = find(&api, &name)?;
    show_one(&api, job).await
}

/// What operators did to the job, newest first.
async fn actions(
    State(api): State<JobsApi>,
    identity: Identity,
    Id(name): Id<String>,
    mut params: Params,
) -> Result<Response, Problem> {
    operator(identity)?;
    let limit = params.number("limit", 1..=200)?.unwrap_or(50);
    params.finish()?;
    find(&api, &name)?;
    let actions = api.ledger.actions(&name, limit).await?;
    Ok(JsonBody(json!({ "actions": actions })).into_response())
}

async fn runs(
    State(api): State<JobsApi>,
    identity: Identity,
    Id(name): Id<String>,
    mut params: Params,
) -> Result<Response, Problem> {
    operator(identity)?;
    let limit = params.number("limit", 1..=200)?.unwrap_or(50);
    let before: Option<RunId> = params.get("cursor")?;
    params.finish()?;
    find(&api, &name)?;
    let mut runs = api.ledger.runs(&name, before, limit + 1).await?;
    let has_more = runs.len() > limit as usize;
    runs.truncate(limit as usize);
    let next_cursor = runs.last().filter(|_| has_more).map(|run| run.id);
    Ok(JsonBody(json!({ "runs": runs, "next_cursor": next_cursor })).into_response())
}

async fn run(
    State(api): State<JobsApi>,
    identity: Identity,
    Id(name): Id<String>,
    params: Params,
) -> Result<Response, Problem> {
    let operator = operator(identity)?;
    params.finish()?;
    let job = find(&api, &name)?;
    let now = api.clock.now();
    let id = RunId::generate(now);
    api.ledger
        .enqueue(id, &job.name, &operator.subject, now)
        .await?;
    api.pulse.wake();
    tracing::info!(job.name = name, run.id = %id, by = operator.subject.as_str(), "a run was asked for");
    Ok((StatusCode::ACCEPTED, JsonBody(json!({ "run_id": id }))).into_response())
}

async fn pause(
    State(api): State<JobsApi>,
    identity: Identity,
    Id(name): Id<String>,
    params: Params,
) -> Result<Response, Problem> {
    let operator = operator(identity)?;
    params.finish()?;
    let job = find(&api, &name)?;
    let now = api.ledger.now().await?;
    if api.ledger.pause(&name, &operator.subject, now).await? {
        tracing::info!(
            job.name = name,
            by = operator.subject.as_str(),
            "{name} was paused"
        );
    }
    api.pulse.wake();
    show_one(&api, job).await
}

async fn resume(
    State(api): State<JobsApi>,
    identity: Identity,
    Id(name): Id<String>,
    params: Params,
) -> Result<Response, Problem> {
    let operator = operator(identity)?;
    params.finish()?;
    let job = find(&api, &name)?;
    let now = api.ledger.now().await?;
    if jobs::resume(&*api.ledger, &job, &operator.subject, now).await? {
        tracing::info!(
            job.name = name,
            by = operator.subject.as_str(),
            "{name} was resumed"
        );
    }
    api.pulse.wake();
    show_one(&api, job).await
}

/// The run of an address, if it is one of the job's.
async fn find_run(api: &JobsApi, job: &str, run: &str) -> Result<RunId, Problem> {
    let id: RunId = run
        .parse()
        .map_err(|error| Problem::bad_request(format!("the id of the address: {error}")))?;
    let run = api.ledger.find_run(id).await?;
    run.filter(|run| run.job == job)
        .map(|run| run.id)
        .ok_or_else(|| Problem::not_found("there is no such run of this job"))
}

async fn cancel(
    State(api): State<JobsApi>,
    identity: Identity,
    Ids(name, run): Ids,
    params: Params,
) -> Result<Response, Problem> {
    let operator = operator(identity)?;
    params.finish()?;
    find(&api, &name)?;
    let id = find_run(&api, &name, &run).await?;
    let now = api.ledger.now().await?;
    match api.ledger.cancel(id, &operator.subject, now).await? {
        Some(RunState::Queued | RunState::Running) => {
            tracing::info!(job.name = name, run.id = %id, by = operator.subject.as_str(), "the end of a run was asked for");
            Ok((StatusCode::ACCEPTED, JsonBody(json!({ "run_id": id }))).into_response())
        }
        Some(state) => Err(Problem::conflict(
            "run-ended",
            "The run has ended",
            format!("there is nothing to cancel: the run is {state}"),
        )),
        None => Err(Problem::not_found("there is no such run of this job")),
    }
}

async fn retry(
    State(api): State<JobsApi>,
    identity: Identity,
    Ids(name, run): Ids,
    params: Params,
) -> Result<Response, Problem> {
    let operator = operator(identity)?;
    params.finish()?;
    find(&api, &name)?;
    let id = find_run(&api, &name, &run).await?;
    let now = api.ledger.now().await?;
    match api.ledger.retry(id, &operator.subject, now).await? {
        Some(RunState::Failed | RunState::TimedOut | RunState::Cancelled) => {
            api.pulse.wake();
            tracing::info!(job.name = name, run.id = %id, by = operator.subject.as_str(), "a run is to be tried again");
            Ok((StatusCode::ACCEPTED, JsonBody(json!({ "run_id": id }))).into_response())
        }
        Some(state) => Err(Problem::conflict(
            "run-not-failed",
            "The run has not failed",
            format!(
                "only a run that failed, timed out or was cancelled is tried again: this one is {state}"
            ),
        )),
        None => Err(Problem::not_found("there is no such run of this job")),
    }
}
