//! The HTTP API: routes, extractors and answers. It parses, asks one use case, and answers; errors
//! are `application/problem+json` (RFC 9457).

mod cursor;
mod events;
mod exports;
mod extract;
mod jobs;
mod links;
mod live;
mod ops;
mod problem;
mod retention;
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::Instrument as _;

pub use exports::ExportsApi;
pub use jobs::{JobsApi, show_all as show_jobs};
pub use live::LiveApi;
pub use ops::{Health, OpsApi, metrics};
pub use problem::Problem;
pub use retention::{MAX_REASON, RetentionApi};
pub use server::serve;

use crate::access::Access;
use crate::timeline::Timeline;

/// The largest body of a request.
const MAX_BODY: usize = 1024 * 1024;
/// A body of which nothing comes for so long is given up; it would hold a stop up, too.
const BODY_TIME: Duration = Duration::from_secs(10);

/// What the routes are made of; each takes only its own part.
pub struct Parts {
    /// Who may do what.
    pub access: Arc<Access>,
    /// The use cases.
    pub timeline: Timeline,
    /// Exports.
    pub exports: ExportsApi,
    /// Jobs.
    pub jobs: JobsApi,
    /// Holds.
    pub retention: RetentionApi,
    /// Sockets.
    pub live: LiveApi,
    /// Health.
    pub ops: OpsApi,
}

/// The whole API.
pub fn router(parts: Parts) -> Router {
    let api = Router::new()
        .merge(events::routes(parts.timeline))
        .merge(exports::routes(parts.exports.clone()))
        .merge(jobs::routes(parts.jobs))
        .merge(retention::routes(parts.retention))
        .merge(live::routes(parts.live));
    Router::new()
        .nest("/api/v1", api)
        .merge(links::routes(parts.exports))
        .merge(ops::routes(parts.ops))
        .fallback(|| async { Problem::no_route() })
        .method_not_allowed_fallback(|| async { Problem::method_not_allowed() })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(RequestBodyTimeoutLayer::new(BODY_TIME))
        .layer(Extension(parts.access))
        .layer(CatchPanicLayer::custom(|_panic| {
            Problem::internal().into_response()
        }))
        .layer(middleware::from_fn(trace))
}

/// Puts each request into a span and tells how it ended.
async fn trace(request: Request, next: Next) -> Response {
    // The route's pattern, not the path: ids of tenants' contacts stay out of the logs.
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let span = tracing::info_span!(
        "request",
        http.method = %request.method(),
        http.route = route.as_deref().unwrap_or("none")
    );
    let began = Instant::now();
    async move {
        let response = next.run(request).await;
        tracing::debug!(
            http.status = response.status().as_u16(),
            elapsed_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
            "answered"
        );
        response
    }
    .instrument(span)
    .await
}
