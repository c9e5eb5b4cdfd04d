//! A JSON object with a bounded size, kept as its compact text.
//!
//! Payloads are stored, served and exported far more often than looked into, so the text is
//! validated once and passed through; nothing re-serialises it on the way.

use std::borrow::Cow;

use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

/// Why a value is not accepted as an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonObjectError {
    /// It is some other JSON value.
    #[error("must be a JSON object")]
    NotObject,
    /// The compact text is too long.
    #[error("must be at most {limit} bytes as compact JSON, is {size}")]
    TooLarge {
        /// The limit, in bytes.
        limit: usize,
        /// The size, in bytes.
        size: usize,
    },
    /// It is nested too deep for the parsers of those who will read it.
    #[error("must not be nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// A key or a text holds NUL, which PostgreSQL cannot store.
    #[error("must not contain the NUL character (\\u0000)")]
    Nul,
}

/// How deep an object may be nested. Parsers stop at 128 levels and more, and an event stands some
/// levels deep in a page or a frame.
const MAX_DEPTH: usize = 100;

/// A JSON object as compact text.
#[derive(Debug, Clone)]
pub struct JsonObject(Box<RawValue>);

impl JsonObject {
    /// Takes `value` when it is an object of at most `limit` bytes without NUL.
    ///
    /// # Errors
    /// [`JsonObjectError`] says which rule it breaks.
    pub fn new(value: &Value, limit: usize) -> Result<Self, JsonObjectError> {
        let Value::Object(object) = value else {
            return Err(JsonObjectError::NotObject);
        };
        if !fits(value, MAX_DEPTH) {
            return Err(JsonObjectError::TooDeep);
        }
        if object_has_nul(object) {
            return Err(JsonObjectError::Nul);
        }
        let text = to_raw_value(object).expect("a JSON value serialises");
        if text.get().len() > limit {
            return Err(JsonObjectError::TooLarge {
                limit,
                size: text.get().len(),
            });
        }
        Ok(Self(text))
    }

    /// Wraps text that a database returned.
    ///
    /// # Errors
    /// [`JsonObjectError`] where it is not the text of an object, or one that readers stumble over.
    pub fn from_stored(text: String) -> Result<Self, JsonObjectError> {
        match RawValue::from_string(text) {
            // A raw value is not looked into: a lone surrogate, which the databases let through, would
            // make the whole page that it stands in unreadable. Few texts have any surrogate at all.
            Ok(raw)
                if has_surrogate(raw.get())
                    && serde_json::from_str::<Value>(raw.get()).is_err() =>
            {
                Err(JsonObjectError::NotObject)
            }
            Ok(raw) if depth(raw.get()) > MAX_DEPTH => Err(JsonObjectError::TooDeep),
            Ok(raw) if raw.get().starts_with('{') => Ok(Self(raw)),
            _ => Err(JsonObjectError::NotObject),
        }
    }

    /// Takes text that somebody sent, as it is, by the rules of [`Self::new`].
    ///
    /// # Errors
    /// [`JsonObjectError`] says which rule it breaks.
    pub fn from_text(text: String, limit: usize) -> Result<Self, JsonObjectError> {
        let size = text.len();
        if size > limit {
            return Err(JsonObjectError::TooLarge { limit, size });
        }
        if has_escaped_nul(&text) {
            return Err(JsonObjectError::Nul);
        }
        Self::from_stored(text)
    }

    /// The compact text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    /// The text without line breaks, which other programs may have put between its values; within a
    /// text JSON has none.
    #[must_use]
    pub fn in_one_line(&self) -> Cow<'_, str> {
        let text = self.as_str();
        if text.contains(['\n', '\r']) {
            Cow::Owned(text.replace(['\n', '\r'], " "))
        } else {
            Cow::Borrowed(text)
        }
    }
}

impl Default for JsonObject {
    fn default() -> Self {
        Self(RawValue::from_string("{}".to_owned()).expect("{} is JSON"))
    }
}

impl PartialEq for JsonObject {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Serialize for JsonObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

/// Whether a JSON text holds an escaped NUL; an escaped backslash before the rest of one is none.
fn has_escaped_nul(text: &str) -> bool {
    text.match_indices("\\u0000").any(|(at, _)| {
        let before = text[..at].bytes().rev();
        before.take_while(|byte| *byte == b'\\').count() % 2 == 0
    })
}

fn has_surrogate(text: &str) -> bool {
    text.contains("\\ud") || text.contains("\\uD")
}

/// Whether a value is nested at most `levels` deep.
fn fits(value: &Value, levels: usize) -> bool {
    match value {
        Value::Array(items) => levels > 0 && items.iter().all(|item| fits(item, levels - 1)),
        Value::Object(object) => levels > 0 && object.values().all(|value| fits(value, levels - 1)),
        _ => true,
    }
}

/// How deep a JSON text is nested.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_text, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' | b'[' if !in_text => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn object_has_nul(object: &Map<String, Value>) -> bool {
    object
        .iter()
        .any(|(key, value)| key.contains('\0') || has_nul(value))
}

fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(object) => object_has_nul(object),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_limit_counts_the_compact_bytes() {
        let value = json!({ "k": "é".repeat(4) });
        let size = r#"{"k":"éééé"}"#.len();
        assert!(JsonObject::new(&value, size).is_ok());
        assert_eq!(
            JsonObject::new(&value, size - 1),
            Err(JsonObjectError::TooLarge {
                limit: size - 1,
                size
            })
        );
    }

    #[test]
    fn what_is_nested_too_deep_for_readers_is_refused() {
        let nested = |levels: usize| {
            let inner = levels - 1;
            format!("{{\"[\\\"{{\":{}{}}}", "[".repeat(inner), "]".repeat(inner))
        };
        let new = |levels| JsonObject::new(&serde_json::from_str(&nested(levels)).unwrap(), 1000);
        assert!(new(MAX_DEPTH).is_ok());
        assert_eq!(new(MAX_DEPTH + 1), Err(JsonObjectError::TooDeep));
        assert!(JsonObject::from_stored(nested(MAX_DEPTH)).is_ok());
        let deeper = JsonObject::from_stored(nested(MAX_DEPTH + 1));
        assert_eq!(deeper, Err(JsonObjectError::TooDeep));
    }

    #[test]
    fn nul_is_refused_at_any_depth_and_in_keys() {
        for value in [json!({"a": [{"b": "x\0"}]}), json!({"a\0": 1})] {
            assert_eq!(JsonObject::new(&value, 100), Err(JsonObjectError::Nul));
        }
    }

    #[test]
    fn a_text_is_taken_as_it_is_by_the_same_rules() {
        let text = r#"{ "a": 1.50, "a": 18446744073709551616, "b": "\\u0000" }"#;
        let object = JsonObject::from_text(text.to_owned(), 100).unwrap();
        assert_eq!(object.as_str(), text);
        for (text, error) in [
            (r#"{"a":"\u0000"}"#, JsonObjectError::Nul),
            (r#"{"a":"\\\u0000"}"#, JsonObjectError::Nul),
            ("[]", JsonObjectError::NotObject),
            (r#"{"a":"\ud800"}"#, JsonObjectError::NotObject),
            ("{} ", JsonObjectError::TooLarge { limit: 2, size: 3 }),
        ] {
            let limit = if text == "{} " { 2 } else { 100 };
            assert_eq!(
                JsonObject::from_text(text.to_owned(), limit),
                Err(error),
                "{text}"
            );
        }
    }

    #[test]
    fn line_breaks_between_values_become_blanks() {
        let object = JsonObject::from_stored("{\r\n\"a\":\n\"\\n\"}".to_owned()).unwrap();
        assert_eq!(object.in_one_line(), "{  \"a\": \"\\n\"}");
    }

    #[test]
    fn only_objects_are_taken() {
        for value in [json!(null), json!([]), json!("{}"), json!(1)] {
            assert_eq!(
                JsonObject::new(&value, 100),
                Err(JsonObjectError::NotObject)
            );
        }
        assert!(JsonObject::from_stored("[]".to_owned()).is_err());
        assert!(JsonObject::from_stored("{".to_owned()).is_err());
    }
}
