//! `/d/…`: the file of an export for whoever has the link, which is all the credential there is. Hence
//! every link that leads nowhere is answered alike, and nothing of a link is logged or kept by others.

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::exports::{ExportsApi, send_file};
use super::problem::Problem;
use crate::export::link_hash;

pub(super) fn routes(api: ExportsApi) -> Router {
    Router::new()
        .route("/d/{link}", get(download))
        .with_state(api)
}

async fn download(
    State(api): State<ExportsApi>,
    method: Method,
    Path(link): Path<String>,
) -> Response {
    let found = find(&api, &method, &link).await;
    let mut response = found.unwrap_or_else(IntoResponse::into_response);
    for (name, value) in [
        (header::CACHE_CONTROL, "private, no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (HeaderName::from_static("x-robots-tag"), "noindex, nofollow"),
    ] {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

async fn find(api: &ExportsApi, method: &Method, link: &str) -> Result<Response, Problem> {
    let nowhere = || Problem::not_found("this link leads nowhere, or no longer");
    let hash = link_hash(link).ok_or_else(nowhere)?;
    let export = api.exports.linked(&hash, api.clock.now()).await?;
    let export = export.ok_or_else(nowhere)?;
    send_file(api, &export, Some(&hash), method).await
}
