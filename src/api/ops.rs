//! Health: `/healthz` says that the process makes progress, `/readyz` that it can serve.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json as JsonBody, Router};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::jobs::Pulse;
use crate::live::Hub;
use crate::storage::{Storage, StorageResult, unreadable_rows};
use crate::telemetry::{Metrics, chain};

/// A database that takes longer than this to answer is not ready.
const DATABASE_TIME: Duration = Duration::from_secs(2);

/// The state of the daemon's parts.
#[derive(Clone)]
pub struct Health {
    /// The database.
    pub storage: Storage,
    /// The planner's pulse.
    pub pulse: Pulse,
    /// Cancelled when the daemon is stopping.
    pub stop: CancellationToken,
}

/// A named check: ready, or why not.
type Check = (&'static str, Result<(), String>);

impl Health {
    /// Whether the planner works, the database answers in time and writes do not hang. An error in
    /// time is an answer.
    pub async fn makes_progress(&self) -> bool {
        let answered = tokio::time::timeout(DATABASE_TIME, self.storage.ledger.now()).await;
        self.pulse.is_steady() && answered.is_ok() && !self.storage.is_stuck()
    }

    /// Every check.
    async fn checks(&self) -> Vec<Check> {
        let database = in_time(async {
            self.storage.ledger.now().await?;
            self.storage.check_writer().await
        })
        .await;
        let migrations = match &database {
            Ok(()) => in_time(self.storage.check_schema()).await,
            Err(_) => Err("the database does not answer".to_owned()),
        };
        let planner = if self.pulse.is_steady() {
            Ok(())
        } else {
            Err("the planner has missed its last pulses".to_owned())
        };
        let running = if self.stop.is_cancelled() {
            Err("stopping".to_owned())
        } else {
            Ok(())
        };
        vec![
            ("database", database),
            ("migrations", migrations),
            ("planner", planner),
            ("running", running),
        ]
    }
}

/// What the database answers within its time.
async fn in_time(answer: impl Future<Output = StorageResult<()>>) -> Result<(), String> {
    match tokio::time::timeout(DATABASE_TIME, answer).await {
        Ok(answer) => answer.map_err(|error| chain(&error)),
        Err(_slow) => Err(format!(
            "did not answer within {} s",
            DATABASE_TIME.as_secs()
        )),
    }
}

/// What the routes need.
#[derive(Clone)]
pub struct OpsApi {
    /// The state of the parts.
    pub health: Arc<Health>,
}

pub(super) fn routes(api: OpsApi) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(api)
}

/// `/metrics`, for the address of operators alone.
pub fn metrics(metrics: Arc<Metrics>, hub: Arc<Hub>) -> Router {
    Router::new().route(
        "/metrics",
        get(move || async move {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (
                [(header::CONTENT_TYPE, content_type)],
                metrics.encode(hub.open_connections(), unreadable_rows()),
            )
        }),
    )
}

async fn healthz(State(api): State<OpsApi>) -> Response {
    if api.health.pulse.is_steady() {
        JsonBody(json!({ "status": "ok" })).into_response()
    } else {
        let body = json!({ "status": "stuck", "planner": "has missed its last pulses" });
        (StatusCode::SERVICE_UNAVAILABLE, JsonBody(body)).into_response()
    }
}

async fn readyz(State(api): State<OpsApi>) -> Response {
    let checks = api.health.checks().await;
    let is_ready = checks.iter().all(|(_, check)| check.is_ok());
    let named: serde_json::Map<String, serde_json::Value> = checks
        .into_iter()
        .map(|(name, check)| {
            (
                name.to_owned(),
                json!(check.err().unwrap_or("ok".to_owned())),
            )
        })
        .collect();
    let status = if is_ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let word = if is_ready { "ready" } else { "not ready" };
    (status, JsonBody(json!({ "status": word, "checks": named }))).into_response()
}
