//! Identifiers as types, so that two of them cannot be swapped by accident.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::{ContextV7, Timestamp, Uuid};

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is not a UUID.
    #[error("\"{0}\" is not a UUID such as 0190b5f0-7c1e-7d3a-8f00-000000000001")]
    NotUuid(String),
    /// The nil UUID stands for nobody.
    #[error("must not be the nil UUID")]
    Nil,
    /// A name is empty or too long.
    #[error("must be 1 to 255 characters, is {0}")]
    Length(usize),
    /// A name holds a NUL character, which PostgreSQL cannot store.
    #[error("must not contain the NUL character")]
    Nul,
}

/// Makes a `UUIDv7` (RFC 9562) for `now`; within one process later calls sort later.
fn uuid_v7(now: DateTime<Utc>) -> Uuid {
    static CONTEXT: LazyLock<Mutex<ContextV7>> = LazyLock::new(|| Mutex::new(ContextV7::new()));
    let context = CONTEXT.lock().unwrap_or_else(PoisonError::into_inner);
    let seconds = u64::try_from(now.timestamp()).unwrap_or(0);
    Uuid::new_v7(Timestamp::from_unix(
        &*context,
        seconds,
        now.timestamp_subsec_nanos(),
    ))
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Wraps a UUID.
            ///
            /// # Errors
            /// [`IdError::Nil`] for the nil UUID.
            pub fn new(uuid: Uuid) -> Result<Self, IdError> {
                if uuid.is_nil() { Err(IdError::Nil) } else { Ok(Self(uuid)) }
            }

            /// A new time-ordered identifier (`UUIDv7`) made at `now`.
            #[must_use]
            pub fn generate(now: DateTime<Utc>) -> Self {
                Self(uuid_v7(now))
            }

            /// The UUID itself.
            #[must_use]
            pub fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                // Only the hyphenated form: it is the one that clients print and compare.
                match Uuid::try_parse(text) {
                    Ok(uuid) if text.len() == 36 => Self::new(uuid),
                    _ => Err(IdError::NotUuid(text.chars().take(64).collect())),
                }
            }
        }
    };
}

uuid_id!(
    /// A contact event.
    EventId
);
uuid_id!(
    /// A contact of the CRM, whose timeline is kept.
    ContactId
);
uuid_id!(
    /// A conversation or visit that groups events.
    SessionId
);
uuid_id!(
    /// The agent who caused an event.
    AgentId
);
uuid_id!(
    /// One run of a job.
    RunId
);
uuid_id!(
    /// An export of a timeline.
    ExportId
);
uuid_id!(
    /// A legal hold.
    HoldId
);
uuid_id!(
    /// The erasure of a contact.
    ErasureId
);

fn name(text: &str) -> Result<Arc<str>, IdError> {
    let length = text.chars().count();
    if length == 0 || length > 255 {
        return Err(IdError::Length(length));
    }
    if text.contains('\0') {
        return Err(IdError::Nul);
    }
    Ok(Arc::from(text))
}

macro_rules! name_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Takes 1 to 255 characters without NUL.
            ///
            /// # Errors
            /// [`IdError`] says which rule the text breaks.
            pub fn new(text: &str) -> Result<Self, IdError> {
                name(text).map(Self)
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
    };
}

name_id!(
    /// A tenant: always from the credential, never from a body.
    TenantId
);
name_id!(
    /// Who acts or reads: the `sub` of a token, or the command line's user.
    Subject
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_made_in_the_same_microsecond_sort_in_the_order_they_were_made() {
        let now = DateTime::from_timestamp_micros(1_750_000_000_000_000).unwrap();
        let ids: Vec<_> = (0..1000).map(|_| EventId::generate(now)).collect();
        assert!(ids.is_sorted());
        assert_eq!(ids[0].uuid().get_version_num(), 7);
    }

    #[test]
    fn the_nil_uuid_and_other_spellings_are_refused() {
        assert_eq!(
            "00000000-0000-0000-0000-000000000000".parse::<ContactId>(),
            Err(IdError::Nil)
        );
        assert!(
            "0190b5f07c1e7d3a8f00000000000001"
                .parse::<ContactId>()
                .is_err()
        );
        assert!(
            "{0190b5f0-7c1e-7d3a-8f00-000000000001}"
                .parse::<ContactId>()
                .is_err()
        );
        assert!(
            "0190b5f0-7c1e-7d3a-8f00-000000000001"
                .parse::<ContactId>()
                .is_ok()
        );
    }

    #[test]
    fn a_tenant_has_1_to_255_characters_and_no_nul() {
        assert_eq!(TenantId::new(""), Err(IdError::Length(0)));
        assert!(TenantId::new(&"é".repeat(255)).is_ok());
        assert_eq!(TenantId::new(&"é".repeat(256)), Err(IdError::Length(256)));
        assert_eq!(TenantId::new("a\0b"), Err(IdError::Nul));
    }
}
