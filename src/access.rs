//! Who may do what: tokens and the identities that they prove.
//!
//! The algorithm comes from the configuration, never from the token's header, so that neither an
//! unsigned token nor one signed with a public key as secret is taken.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use crate::config::{Auth, PublicKeyAlgorithm, Verifier};
use crate::domain::{Audience, ContactId, Subject, TenantId, closed_set};

/// The audience (`aud`) that every token must name.
pub const TOKEN_AUDIENCE: &str = "timelined";
/// How far the clocks of issuer and daemon may differ, in seconds.
const LEEWAY_SECONDS: u64 = 30;

closed_set!(
    /// What a token's bearer is.
    Role, "role", {
        /// A contact, or somebody acting for several.
        Client = "client",
        /// A person of the CRM.
        Agent = "agent",
        /// A program of the CRM.
        Service = "service",
        /// Who runs the daemon; sees jobs, not timelines, and belongs to no tenant.
        Operator = "operator",
    }
);

/// What a token proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who it is.
    pub subject: Subject,
    /// What it is allowed, and to see what.
    pub scope: Scope,
    /// From when on the token is void.
    pub expires_at: DateTime<Utc>,
}

/// A role with what it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Sees its own contacts' events that are visible to clients.
    Client {
        /// Its tenant.
        tenant: TenantId,
        /// The contacts that it is.
        contacts: Arc<HashSet<ContactId>>,
    },
    /// Sees what is visible to agents.
    Agent {
        /// Its tenant.
        tenant: TenantId,
    },
    /// Sees everything of its tenant.
    Service {
        /// Its tenant.
        tenant: TenantId,
    },
    /// Sees jobs.
    Operator,
}

impl Identity {
    /// The role.
    #[must_use]
    pub fn role(&self) -> Role {
        match self.scope {
            Scope::Client { .. } => Role::Client,
            Scope::Agent { .. } => Role::Agent,
            Scope::Service { .. } => Role::Service,
            Scope::Operator => Role::Operator,
        }
    }
}

/// A reader of timelines: an identity that has a tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reader {
    /// Who reads.
    pub subject: Subject,
    /// Whose events.
    pub tenant: TenantId,
    /// Through whose eyes.
    pub audience: Audience,
    /// The contacts that it is bound to; `None`: all of the tenant.
    pub contacts: Option<Arc<HashSet<ContactId>>>,
}

impl Reader {
    /// Whether it may see the timeline of `contact` at all.
    #[must_use]
    pub fn may_see(&self, contact: ContactId) -> bool {
        self.contacts
            .as_ref()
            .is_none_or(|contacts| contacts.contains(&contact))
    }

    /// The contacts that it is bound to, as a list for the database.
    #[must_use]
    pub fn contact_list(&self) -> Option<Vec<ContactId>> {
        self.contacts
            .as_ref()
            .map(|contacts| contacts.iter().copied().collect())
    }
}

impl TryFrom<Identity> for Reader {
    type Error = Identity;

    /// Operators are bound to no tenant and read no timelines.
    fn try_from(identity: Identity) -> Result<Self, Identity> {
        let subject = identity.subject.clone();
        match identity.scope {
            Scope::Client { tenant, contacts } => Ok(Self {
                subject,
                tenant,
                audience: Audience::Client,
                contacts: Some(contacts),
            }),
            Scope::Agent { tenant } => Ok(Self {
                subject,
                tenant,
                audience: Audience::Agent,
                contacts: None,
            }),
            Scope::Service { tenant } => Ok(Self {
                subject,
                tenant,
                audience: Audience::Audit,
                contacts: None,
            }),
            Scope::Operator => Err(identity),
        }
    }
}

/// The claims of a token (RFC 7519).
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Claims {
    sub: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tid: Option<String>,
    role: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    contacts: Vec<String>,
    aud: serde_json::Value,
    exp: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iat: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iss: Option<String>,
}

/// Why a token is not taken; says nothing of its content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// Signature, algorithm, audience or issuer are not those of the configuration.
    #[error("the token is not valid: {0}")]
    Invalid(&'static str),
    /// A claim is missing or wrong.
    #[error("the token's claim {claim} {reason}")]
    Claim {
        /// The claim.
        claim: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why access cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// The configured key is not one for the algorithm.
    #[error("auth.public_key: is not a key for {algorithm}: {reason}")]
    Key {
        /// The algorithm.
        algorithm: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Tokens are made elsewhere.
    #[error(
        "auth.algorithm: timelined token needs HS256; with a public key, tokens come from whoever holds the private one"
    )]
    CannotSign,
}

/// Verifies tokens, and makes them where the key allows it.
pub struct Access {
    decoding: DecodingKey,
    validation: Validation,
    encoding: Option<EncodingKey>,
    issuer: Option<String>,
}

impl Access {
    /// Access by the configuration. `own_key` is the key made at the first start, used where none
    /// is configured.
    ///
    /// # Errors
    /// Where the public key does not parse.
    pub fn new(auth: &Auth, own_key: &[u8]) -> Result<Self, AccessError> {
        let (algorithm, decoding, encoding) = match &auth.verifier {
            Verifier::Hs256(key) => {
                let key = key
                    .as_ref()
                    .map_or(own_key, |key| key.expose_secret().as_bytes());
                (
                    Algorithm::HS256,
                    DecodingKey::from_secret(key),
                    Some(EncodingKey::from_secret(key)),
                )
            }
            Verifier::PublicKey { algorithm, pem } => {
                let pem = pem.as_bytes();
                let (name, decoding) = match algorithm {
                    PublicKeyAlgorithm::EdDsa => (Algorithm::EdDSA, DecodingKey::from_ed_pem(pem)),
                    PublicKeyAlgorithm::Rs256 => (Algorithm::RS256, DecodingKey::from_rsa_pem(pem)),
                    PublicKeyAlgorithm::Es256 => (Algorithm::ES256, DecodingKey::from_ec_pem(pem)),
                };
                let decoding = decoding.map_err(|error| AccessError::Key {
                    algorithm: algorithm.name(),
                    reason: error.to_string(),
                })?;
                (name, decoding, None)
            }
        };
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY_SECONDS;
        validation.validate_nbf = true;
        validation.set_audience(&[TOKEN_AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        if let Some(issuer) = &auth.issuer {
            validation.set_issuer(&[issuer]);
            validation.set_required_spec_claims(&["exp", "aud", "sub", "iss"]);
        }
        Ok(Self {
            decoding,
            validation,
            encoding,
            issuer: auth.issuer.clone(),
        })
    }

    /// What `token` proves.
    ///
    /// # Errors
    /// Why it is not taken.
    pub fn verify(&self, token: &str) -> Result<Identity, TokenError> {
        use jsonwebtoken::errors::ErrorKind;
        let data = jsonwebtoken::decode::<Claims>(token, &self.decoding, &self.validation);
        let claims = data
            .map_err(|error| match error.kind() {
                ErrorKind::ExpiredSignature => TokenError::Expired,
                ErrorKind::InvalidSignature => TokenError::Invalid("the signature does not match"),
                ErrorKind::InvalidAudience => TokenError::Invalid("aud must be timelined"),
                ErrorKind::InvalidIssuer => TokenError::Invalid("iss is not the configured issuer"),
                ErrorKind::ImmatureSignature => TokenError::Invalid("nbf lies ahead"),
                ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
                    TokenError::Invalid("the algorithm is not the configured one")
                }
                ErrorKind::MissingRequiredClaim(_) => {
                    TokenError::Invalid("exp, aud and sub are required (and iss, where configured)")
                }
                _ => TokenError::Invalid("it does not parse"),
            })?
            .claims;
        identity(&claims)
    }

    /// Makes a token for `identity`, valid for `lifetime` from `now`.
    ///
    /// # Errors
    /// [`AccessError::CannotSign`] where tokens are verified by a public key.
    pub fn issue(
        &self,
        subject: &Subject,
        scope: &Scope,
        lifetime: Duration,
        now: DateTime<Utc>,
    ) -> Result<String, AccessError> {
        let encoding = self.encoding.as_ref().ok_or(AccessError::CannotSign)?;
        let (role, tenant, contacts) = match scope {
            Scope::Client { tenant, contacts } => {
                let mut contacts: Vec<String> = contacts.iter().map(ToString::to_string).collect();
                contacts.sort();
                (Role::Client, Some(tenant), contacts)
            }
            Scope::Agent { tenant } => (Role::Agent, Some(tenant), Vec::new()),
            Scope::Service { tenant } => (Role::Service, Some(tenant), Vec::new()),
            Scope::Operator => (Role::Operator, None, Vec::new()),
        };
        let lifetime = i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX);
        let claims = Claims {
            sub: subject.to_string(),
            tid: tenant.map(ToString::to_string),
            role: role.to_string(),
            contacts,
            aud: TOKEN_AUDIENCE.into(),
            exp: now.timestamp().saturating_add(lifetime),
            iat: Some(now.timestamp()),
            iss: self.issuer.clone(),
        };
        Ok(
            jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, encoding)
                .expect("claims of texts and numbers are signed with a secret of any length"),
        )
    }
}

fn identity(claims: &Claims) -> Result<Identity, TokenError> {
    let wrong = |claim, reason: String| TokenError::Claim { claim, reason };
    let subject = Subject::new(&claims.sub).map_err(|error| wrong("sub", error.to_string()))?;
    let role: Role = claims
        .role
        .parse()
        .map_err(|error: crate::domain::UnknownKind| {
            wrong("role", format!("must be one of {}", error.allowed))
        })?;
    let tenant = || {
        let tenant = claims
            .tid
            .as_deref()
            .ok_or_else(|| wrong("tid", "is required".to_owned()))?;
        TenantId::new(tenant).map_err(|error| wrong("tid", error.to_string()))
    };
    let scope = match role {
        Role::Client => {
            let contacts: Result<HashSet<ContactId>, _> = claims
                .contacts
                .iter()
                .map(|contact| {
                    contact.parse().map_err(|error: crate::domain::IdError| {
                        wrong("contacts", error.to_string())
                    })
                })
                .collect();
            let contacts = contacts?;
            if contacts.is_empty() {
                return Err(wrong(
                    "contacts",
                    "must name the contacts that a client is".to_owned(),
                ));
            }
            Scope::Client {
                tenant: tenant()?,
                contacts: Arc::new(contacts),
            }
        }
        Role::Agent => Scope::Agent { tenant: tenant()? },
        Role::Service => Scope::Service { tenant: tenant()? },
        Role::Operator => Scope::Operator,
    };
    let expires_at = DateTime::from_timestamp(claims.exp, 0)
        .ok_or_else(|| wrong("exp", "is not a time".to_owned()))?;
    Ok(Identity {
        subject,
        scope,
        expires_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Clock, SystemClock};

    fn access(issuer: Option<&str>) -> Access {
        let auth = Auth {
            verifier: Verifier::Hs256(None),
            issuer: issuer.map(str::to_owned),
        };
        Access::new(&auth, &[7; 32]).unwrap()
    }

    fn subject() -> Subject {
        Subject::new("ana").unwrap()
    }

    fn agent() -> Scope {
        Scope::Agent {
            tenant: TenantId::new("acme").unwrap(),
        }
    }

    #[test]
    fn a_token_that_was_issued_proves_what_it_was_issued_for() {
        let access = access(None);
        let contact: ContactId = "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap();
        let client = Scope::Client {
            tenant: TenantId::new("acme").unwrap(),
            contacts: Arc::new(HashSet::from([contact])),
        };
        for scope in [client, agent(), Scope::Operator] {
            let now = SystemClock.now();
            let token = access
                .issue(&subject(), &scope, Duration::from_mins(1), now)
                .unwrap();
            let identity = access.verify(&token).unwrap();
            assert_eq!((identity.subject, identity.scope), (subject(), scope));
        }
    }

    #[test]
    fn an_expired_token_is_refused_beyond_the_leeway() {
        let access = access(None);
        let lifetime = Duration::from_mins(1);
        let issued = |ago: i64| {
            let at = SystemClock.now() - chrono::TimeDelta::seconds(60 + ago);
            access.issue(&subject(), &agent(), lifetime, at).unwrap()
        };
        assert!(access.verify(&issued(20)).is_ok());
        assert_eq!(access.verify(&issued(40)), Err(TokenError::Expired));
    }

    #[test]
    fn other_keys_other_algorithms_and_unsigned_tokens_are_refused() {
        use base64::Engine as _;
        let mine = access(None);
        let now = SystemClock.now();
        let auth = Auth {
            verifier: Verifier::Hs256(None),
            issuer: None,
        };
        let other = Access::new(&auth, &[8; 32]).unwrap();
        let foreign = other
            .issue(&subject(), &agent(), Duration::from_mins(1), now)
            .unwrap();
        assert!(matches!(mine.verify(&foreign), Err(TokenError::Invalid(_))));

        let token = mine
            .issue(&subject(), &agent(), Duration::from_mins(1), now)
            .unwrap();
        let claims = token.split('.').nth(1).unwrap();
        let header = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        for alg in ["none", "HS384", "RS256"] {
            let unsigned = format!(
                "{}.{claims}.",
                header(&format!(r#"{{"alg":"{alg}","typ":"JWT"}}"#))
            );
            assert!(mine.verify(&unsigned).is_err(), "{alg}");
        }
    }

    #[test]
    fn the_issuer_is_checked_when_it_is_set() {
        let now = SystemClock.now();
        let token = access(None)
            .issue(&subject(), &agent(), Duration::from_mins(1), now)
            .unwrap();
        assert!(access(Some("crm")).verify(&token).is_err());
        let token = access(Some("crm"))
            .issue(&subject(), &agent(), Duration::from_mins(1), now)
            .unwrap();
        assert!(access(Some("crm")).verify(&token).is_ok());
    }
}
