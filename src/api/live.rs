//! The WebSocket's handshake.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio_util::task::TaskTracker;

use super::extract::{READERS, bearer, reader};
use super::problem::Problem;
use crate::live::frames::SUBPROTOCOL;
use crate::live::{Session, SessionSettings};

/// The largest frame of a client: 1,000 ids fit.
const MAX_FRAME: usize = 64 * 1024;
/// What a socket reads at a time. The library's default of 128 KiB would be held by each idle
/// connection; frames of clients are small.
const READ_BUFFER: usize = 1024;

/// What the route needs.
#[derive(Clone)]
pub struct LiveApi {
    /// What sessions share.
    pub session: Arc<SessionSettings>,
    /// Holds every session.
    pub tracker: TaskTracker,
    /// Origins of other sites whose pages may open sockets.
    pub allowed_origins: Arc<[String]>,
}

pub(super) fn routes(api: LiveApi) -> Router {
    Router::new()
        .route("/realtime", get(connect))
        .with_state(api)
}

async fn connect(
    State(api): State<LiveApi>,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    check_origin(&api, &headers)?;
    let identity = match bearer(&headers)? {
        Some(token) => {
            let identity = api
                .session
                .access
                .verify(token)
                .map_err(|error| Problem::unauthorized(error.to_string()))?;
            reader(identity.clone(), READERS)?;
            Some(identity)
        }
        None => None,
    };
    let upgrade = upgrade.map_err(|rejection| Problem::bad_request(rejection.to_string()))?;
    let (shared, tracker) = (api.session, api.tracker);
    Ok(upgrade
        .protocols([SUBPROTOCOL])
        .read_buffer_size(READ_BUFFER)
        .max_message_size(MAX_FRAME)
        .max_frame_size(MAX_FRAME)
        .on_upgrade(move |socket| tracker.track_future(Session::serve(shared, socket, identity)))
        .into_response())
}

/// A browser says whose page opens a socket; only the daemon's own and allowed ones may, since a
/// browser would lend a foreign page its reader's cookies and network. Programs send no `Origin`.
fn check_origin(api: &LiveApi, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Ok(());
    };
    let origin = origin.to_str().unwrap_or("");
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or("");
    let is_own = ["http://", "https://"].iter().any(|scheme| {
        origin
            .strip_prefix(scheme)
            .is_some_and(|rest| !host.is_empty() && rest == host)
    });
    if is_own || api.allowed_origins.iter().any(|allowed| allowed == origin) {
        return Ok(());
    }
    Err(Problem::forbidden(
        "this Origin may not open sockets; http.allowed_origins names those that may",
    ))
}
