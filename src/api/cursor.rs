//! Cursors: the place of the last event of a page, bound to the query that it came from.
//!
//! URL-safe text. The fingerprint of the query keeps a cursor of one list, tenant or filter from
//! being used with another; it is no secret and needs none, since a cursor grants nothing.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::DateTime;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::Problem;
use crate::domain::EventId;
use crate::storage::Key;

const VERSION: u8 = 1;
const FINGERPRINT: usize = 6;
const LENGTH: usize = 1 + FINGERPRINT + 8 + 16;

/// What a query is known by: everything that decides which events its list holds.
pub(super) struct Query([u8; FINGERPRINT]);

impl Query {
    /// The query of these parts; each is told apart from its neighbours.
    pub(super) fn new(parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        let hash: [u8; 32] = hash.finalize().into();
        let mut fingerprint = [0; FINGERPRINT];
        fingerprint.copy_from_slice(&hash[..FINGERPRINT]);
        Self(fingerprint)
    }

    /// The cursor behind `key`.
    pub(super) fn encode(&self, key: Key) -> String {
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.push(VERSION);
        bytes.extend(self.0);
        bytes.extend(key.occurred_at.timestamp_micros().to_be_bytes());
        bytes.extend(key.id.uuid().as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The key that a cursor of this query names.
    pub(super) fn decode(&self, cursor: &str) -> Result<Key, Problem> {
        let wrong = || Problem::bad_request("cursor is not one that this daemon gave");
        let bytes = URL_SAFE_NO_PAD
            .decode(cursor)
            .ok()
            .filter(|bytes| bytes.len() == LENGTH);
        let bytes = bytes.ok_or_else(wrong)?;
        let (head, key) = bytes.split_at(1 + FINGERPRINT);
        if head[0] != VERSION {
            return Err(wrong());
        }
        if head[1..] != self.0 {
            return Err(Problem::bad_request(
                "cursor is of another query: its contact, filters and reader must be the same",
            ));
        }
        let (micros, id) = key.split_at(8);
        let micros = i64::from_be_bytes(micros.try_into().expect("8 bytes were split off"));
        let occurred_at = DateTime::from_timestamp_micros(micros).ok_or_else(wrong)?;
        let id = Uuid::from_slice(id)
            .ok()
            .and_then(|id| EventId::new(id).ok());
        Ok(Key {
            occurred_at,
            id: id.ok_or_else(wrong)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_the_key_it_was_made_of_and_only_for_its_query() {
        let query = Query::new(&["timeline", "acme"]);
        let key = Key {
            occurred_at: DateTime::from_timestamp_micros(-1).unwrap(),
            id: "0190b5f0-7c1e-7d3a-8f00-000000000001".parse().unwrap(),
        };
        let cursor = query.encode(key);
        assert!(
            cursor
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        );
        assert_eq!(query.decode(&cursor).unwrap(), key);
        assert!(Query::new(&["timelineacme", ""]).decode(&cursor).is_err());
        assert!(query.decode("nonsense").is_err());
        assert!(query.decode(&cursor[1..]).is_err());
    }
}
