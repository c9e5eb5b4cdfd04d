//! Errors as `application/problem+json` (RFC 9457). `type` names the fault; for a body, `errors`
//! holds the JSON pointers of the wrong fields.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::domain::Fault;
use crate::storage::StorageError;
use crate::telemetry::chain;
use crate::timeline::Refusal;

/// Seconds after which a client should try again when the store is away.
const RETRY_AFTER: &str = "1";

/// A fault, as a client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    status: StatusCode,
    kind: &'static str,
    title: &'static str,
    detail: String,
    errors: Vec<Fault>,
}

impl Problem {
    fn new(
        status: StatusCode,
        kind: &'static str,
        title: &'static str,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            title,
            detail: detail.into(),
            errors: Vec::new(),
        }
    }

    /// 400: an address, a header or a query parameter is wrong.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "bad-request",
            "Bad request",
            detail,
        )
    }

    /// 400: the body is not JSON.
    pub fn bad_json(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "bad-json",
            "The body is not JSON",
            detail,
        )
    }

    /// 422: the body breaks rules.
    #[must_use]
    pub fn invalid(errors: Vec<Fault>) -> Self {
        let detail = match errors.as_slice() {
            [one] => format!("{}: {}", one.pointer, one.detail),
            many => format!("{} fields are wrong", many.len()),
        };
        let mut problem = Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid",
            "The body is not valid",
            detail,
        );
        problem.errors = errors;
        problem
    }

    /// 413: the body is too large.
    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too-large",
            "The body is too large",
            detail,
        )
    }

    /// 415: the body is of another type.
    #[must_use]
    pub fn unsupported_media_type() -> Self {
        let detail = "the body must be JSON, with the header Content-Type: application/json";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported-media-type",
            "Not JSON",
            detail,
        )
    }

    /// 401: there is no token, or it is not taken.
    pub fn unauthorized(detail: impl Into<String>) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "Not authenticated",
            detail,
        )
    }

    /// 403: the role is not among those of the route.
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", "Not allowed", detail)
    }

    /// 404: there is none, or it does not exist for this reader.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "Not found", detail)
    }

    /// 404: no such address.
    #[must_use]
    pub fn no_route() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "no-route",
            "Not found",
            "there is no such address",
        )
    }

    /// 405.
    #[must_use]
    pub fn method_not_allowed() -> Self {
        let detail = "the address does not answer to this method; Allow says to which";
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method-not-allowed",
            "Method not allowed",
            detail,
        )
    }

    /// 409.
    pub fn conflict(kind: &'static str, title: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, kind, title, detail)
    }

    /// 409: a legal hold keeps what was to be deleted.
    pub fn held(detail: impl Into<String>) -> Self {
        Self::conflict("held", "Under a legal hold", detail)
    }

    /// 410: it was there.
    pub fn gone(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "gone", "Gone", detail)
    }

    /// 500: a fault of this program; what it was stands in the log only.
    #[must_use]
    pub fn internal() -> Self {
        let detail = "the daemon met a fault of its own; its log says more";
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "Internal error",
            detail,
        )
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let mut body = json!({
            "type": format!("urn:timelined:problem:{}", self.kind),
            "title": self.title,
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if let Some(first) = self.errors.first() {
            body["pointer"] = json!(first.pointer);
            body["errors"] = json!(self.errors);
        }
        body
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.json().to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
            }
            _ => {}
        }
        response
    }
}

impl From<StorageError> for Problem {
    /// The one place where a failed request of the store is logged.
    fn from(error: StorageError) -> Self {
        let text = chain(&error);
        match error {
            StorageError::Full(_) => {
                tracing::error!(error = text, "a request failed: no space left");
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "storage-full",
                    "No space left",
                    "the database has no space left; nothing was written, try again later",
                )
            }
            StorageError::Unavailable(_) | StorageError::Durability(_) | StorageError::Closed => {
                tracing::warn!(
                    error = text,
                    "a request failed: the database is not available"
                );
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "storage-unavailable",
                    "Not available",
                    "the database is not available; nothing was acknowledged, try again later",
                )
            }
            StorageError::Held => Self::held(text),
            StorageError::Migration(_)
            | StorageError::Fenced
            | StorageError::Corrupt { .. }
            | StorageError::Database(_) => {
                tracing::error!(error = text, "a request failed");
                Self::internal()
            }
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let detail = refusal.to_string();
        match refusal {
            Refusal::Invalid(invalid) => Self::invalid(invalid.0),
            Refusal::KeyReused => Self::conflict("key-reused", "Key used before", detail),
            Refusal::IdTaken => Self::conflict("id-taken", "Id taken", detail),
            Refusal::NotFound => Self::not_found(detail),
            Refusal::NotTheAudience => Self::forbidden(detail),
            Refusal::Held => Self::held(detail),
            Refusal::Expired => Self::conflict("expired", "Expired", detail),
            Refusal::VisibleToNobody => {
                Self::conflict("visible-to-nobody", "Visible to nobody", detail)
            }
            Refusal::Storage(error) => error.into(),
        }
    }
}
