//! The routes of jobs, for operators.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json as JsonBody, Router};
use serde_json::{Value, json};

use super::extract::{Id, Params, operator};
use super::problem::Problem;
use crate::access::Identity;
use crate::config::JobDefinition;
use crate::domain::{Clock, RunId, format_time};
use crate::jobs::Pulse;
use crate::storage::{JobLedger, Run};

/// What the routes need.
#[derive(Clone)]
pub struct JobsApi {
    /// The jobs of the configuration.
    pub jobs: Arc<[JobDefinition]>,
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
        .route("/jobs/{name}/run", post(run))
        .with_state(api)
}

/// A job as operators see it.
#[must_use]
pub fn show(job: &JobDefinition, last_run: Option<&Run>, clock: &dyn Clock) -> Value {
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
        "paused": false,
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
    let names: Vec<String> = api.jobs.iter().map(|job| job.name.clone()).collect();
    let last = api.ledger.last_runs(&names).await?;
    let jobs: Vec<Value> = api
        .jobs
        .iter()
        .map(|job| {
            show(
                job,
                last.iter().find(|run| run.job == job.name),
                &*api.clock,
            )
        })
        .collect();
    Ok(JsonBody(json!({ "jobs": jobs })).into_response())
}

fn find<'a>(api: &'a JobsApi, name: &str) -> Result<&'a JobDefinition, Problem> {
    let job = api.jobs.iter().find(|job| job.name == name);
    job.ok_or_else(|| Problem::not_found("there is no such job"))
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
    let last = api
        .ledger
        .last_runs(std::slice::from_ref(&job.name))
        .await?;
    Ok(JsonBody(show(job, last.first(), &*api.clock)).into_response())
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
