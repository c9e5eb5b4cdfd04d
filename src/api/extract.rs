//! What routes take from a request: who asks, ids of the address, query parameters, bodies.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, RawQuery, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use chrono::{DateTime, Utc};
use serde_json::Value;

use super::Problem;
use crate::access::{Access, Identity, Reader, Role};
use crate::domain::parse_time;

/// The largest offset; deeper pages go by cursor.
pub(super) const MAX_OFFSET: u32 = 10_000;

impl<S: Send + Sync> FromRequestParts<S> for Identity {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Extension(access) = Extension::<Arc<Access>>::from_request_parts(parts, state)
            .await
            .map_err(|_missing_layer| Problem::internal())?;
        let token = bearer(&parts.headers)?.ok_or_else(|| {
            Problem::unauthorized("a token is required: Authorization: Bearer <JWT>")
        })?;
        access
            .verify(token)
            .map_err(|error| Problem::unauthorized(error.to_string()))
    }
}

/// The bearer token of a request, if it has one.
pub(super) fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Ok(None);
    };
    let token = value.to_str().ok().and_then(|value| {
        // The scheme's case does not matter, RFC 9110 section 11.1.
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    token
        .map(Some)
        .ok_or_else(|| Problem::unauthorized("Authorization must be: Bearer <JWT>"))
}

/// A reader with one of `roles`.
pub(super) fn reader(identity: Identity, roles: &[Role]) -> Result<Reader, Problem> {
    if !roles.contains(&identity.role()) {
        return Err(wrong_role(&identity, roles));
    }
    let role = identity.role();
    Reader::try_from(identity)
        .map_err(|_operator| Problem::forbidden(format!("the role {role} reads no timelines")))
}

/// An operator.
pub(super) fn operator(identity: Identity) -> Result<Identity, Problem> {
    if identity.role() == Role::Operator {
        Ok(identity)
    } else {
        Err(wrong_role(&identity, &[Role::Operator]))
    }
}

fn wrong_role(identity: &Identity, roles: &[Role]) -> Problem {
    let roles: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
    let role = identity.role();
    Problem::forbidden(format!(
        "this needs the role {}; the token has {role}",
        roles.join(" or ")
    ))
}

/// Roles that read timelines.
pub(super) const READERS: &[Role] = &[Role::Client, Role::Agent, Role::Service];
/// Roles of the CRM itself.
pub(super) const STAFF: &[Role] = &[Role::Agent, Role::Service];

/// An id of the address, or a name.
pub(super) struct Id<T>(pub(super) T);

impl<S, T> FromRequestParts<S> for Id<T>
where
    S: Send + Sync,
    T: FromStr<Err: Display> + Send,
{
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::bad_request(error.to_string()))?;
        text.parse().map(Self).map_err(|error: T::Err| {
            Problem::bad_request(format!("the id of the address: {error}"))
        })
    }
}

/// Two segments of the address, as they are.
pub(super) struct Ids(pub(super) String, pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Ids {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path((first, second)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|error| Problem::bad_request(error.to_string()))?;
        Ok(Self(first, second))
    }
}

/// A JSON body.
pub(super) struct Json(pub(super) Value);

impl<S: Send + Sync> FromRequest<S> for Json {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let is_json = request
            .headers()
            .get(header::CONTENT_TYPE)
            .is_none_or(|value| {
                let essence = value
                    .to_str()
                    .unwrap_or("")
                    .split(';')
                    .next()
                    .unwrap_or("")
                    .trim();
                essence.eq_ignore_ascii_case("application/json") || essence.ends_with("+json")
            });
        if !is_json {
            return Err(Problem::unsupported_media_type());
        }
        let body = whole_body(request, state).await?;
        // serde_json refuses more than 128 levels, lone surrogates and numbers beyond f64.
        serde_json::from_slice(&body)
            .map(Self)
            .map_err(|error| Problem::bad_json(error.to_string()))
    }
}

/// A JSON body, or none.
pub(super) struct OptionalJson(pub(super) Option<Value>);

impl<S: Send + Sync> FromRequest<S> for OptionalJson {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let (head, body) = request.into_parts();
        let (mut given, rest) = (Request::new(body), Request::from_parts(head, Body::empty()));
        // The limit on bodies stands among the extensions.
        *given.extensions_mut() = rest.extensions().clone();
        let body = whole_body(given, state).await?;
        if body.is_empty() {
            return Ok(Self(None));
        }
        let request = rest.map(|_empty| Body::from(body));
        let Json(body) = Json::from_request(request, state).await?;
        Ok(Self(Some(body)))
    }
}

async fn whole_body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, Problem> {
    Bytes::from_request(request, state)
        .await
        .map_err(|rejection| {
            use axum::response::IntoResponse as _;
            let text = rejection.body_text();
            if rejection.into_response().status() == StatusCode::PAYLOAD_TOO_LARGE {
                Problem::too_large(format!("a body is at most {} bytes", super::MAX_BODY))
            } else {
                Problem::bad_request(text)
            }
        })
}

/// The query parameters, taken one by one; what nobody took is refused with the right name.
pub(super) struct Params {
    given: BTreeMap<String, String>,
    known: Vec<&'static str>,
}

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let RawQuery(query) = RawQuery::from_request_parts(parts, state)
            .await
            .unwrap_or_else(|never| match never {});
        let mut given = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            if given.insert(name.to_string(), value.into_owned()).is_some() {
                return Err(Problem::bad_request(format!("{name} is given twice")));
            }
        }
        Ok(Self {
            given,
            known: Vec::new(),
        })
    }
}

impl Params {
    /// A parameter as text.
    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        self.given.remove(name)
    }

    /// A parsed parameter.
    pub(super) fn get<T: FromStr<Err: Display>>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, Problem> {
        let parsed = self.text(name).map(|text| text.parse::<T>());
        parsed
            .transpose()
            .map_err(|error| Problem::bad_request(format!("{name}: {error}")))
    }

    /// A whole number within bounds.
    pub(super) fn number(
        &mut self,
        name: &'static str,
        bounds: std::ops::RangeInclusive<u32>,
    ) -> Result<Option<u32>, Problem> {
        let Some(text) = self.text(name) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(number) if bounds.contains(&number) => Ok(Some(number)),
            _ => Err(Problem::bad_request(format!(
                "{name} must be a whole number from {} to {}",
                bounds.start(),
                bounds.end()
            ))),
        }
    }

    /// A time.
    pub(super) fn time(&mut self, name: &'static str) -> Result<Option<DateTime<Utc>>, Problem> {
        let Some(text) = self.text(name) else {
            return Ok(None);
        };
        match parse_time(&text) {
            Some(time) => Ok(Some(time)),
            None => Err(Problem::bad_request(format!(
                "{name} must be a time of RFC 3339 such as 2026-01-31T12:00:00Z (a + must be written %2B)"
            ))),
        }
    }

    /// The offset, which cannot be deep.
    pub(super) fn offset(&mut self) -> Result<Option<u32>, Problem> {
        let Some(text) = self.text("offset") else {
            return Ok(None);
        };
        match text.parse::<u64>() {
            Ok(offset) if offset <= u64::from(MAX_OFFSET) => Ok(u32::try_from(offset).ok()),
            Ok(_) => Err(Problem::bad_request(format!(
                "offset is at most {MAX_OFFSET}; go deeper by cursor, with the next_cursor of the page before"
            ))),
            Err(_not_a_number) => Err(Problem::bad_request(format!(
                "offset must be a whole number from 0 to {MAX_OFFSET}"
            ))),
        }
    }

    /// A flag.
    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, Problem> {
        match self.text(name).as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Problem::bad_request(format!(
                "{name} must be true or false"
            ))),
        }
    }

    /// Refuses what nobody took.
    pub(super) fn finish(self) -> Result<(), Problem> {
        let Some(unknown) = self.given.keys().next() else {
            return Ok(());
        };
        let unknown: String = unknown.chars().take(64).collect();
        let nearest = self
            .known
            .iter()
            .max_by(|a, b| {
                strsim::jaro_winkler(a, &unknown).total_cmp(&strsim::jaro_winkler(b, &unknown))
            })
            .filter(|name| strsim::jaro_winkler(name, &unknown) > 0.75);
        let hint = match nearest {
            Some(name) => format!("did you mean {name}?"),
            None if self.known.is_empty() => "none is known here".to_owned(),
            None => format!("known: {}", self.known.join(", ")),
        };
        Err(Problem::bad_request(format!(
            "unknown query parameter {unknown}; {hint}"
        )))
    }
}
