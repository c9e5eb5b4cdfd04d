//! The closed sets (category, priority, source) and the open one (event type).

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// A text that is not in a closed set, with what is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{given}\" is not a {set}; allowed: {allowed}")]
pub struct UnknownKind {
    /// The name of the set, such as `category`.
    pub set: &'static str,
    /// What was given, at most 64 characters of it.
    pub given: String,
    /// All members, separated by spaces.
    pub allowed: String,
}

macro_rules! closed_set {
    ($(#[$doc:meta])* $name:ident, $label:literal, { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// Every member, in the order of the specification.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name used in JSON, SQL and configuration.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl ::std::str::FromStr for $name {
            type Err = $crate::domain::UnknownKind;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::ALL.iter().copied().find(|member| member.as_str() == text).ok_or_else(|| {
                    $crate::domain::UnknownKind {
                        set: $label,
                        given: text.chars().take(64).collect(),
                        allowed: Self::ALL.iter().map(|m| m.as_str()).collect::<Vec<_>>().join(" "),
                    }
                })
            }
        }

        impl ::serde::Serialize for $name {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}
pub(crate) use closed_set;

closed_set!(
    /// What part of the CRM an event speaks of.
    Category, "category", {
        /// Anything that fits nowhere else.
        General = "general",
        /// The contact's status.
        Status = "status",
        /// Pipelines and their stages.
        Pipeline = "pipeline",
        /// Who looks after the contact.
        Assignment = "assignment",
        /// Tags.
        Tag = "tag",
        /// Notes.
        Note = "note",
        /// Conversations and visits.
        Session = "session",
        /// Custom fields.
        CustomField = "custom_field",
        /// The CRM itself.
        System = "system",
        /// Messages to the contact or the agent.
        Notification = "notification",
        /// What the contact did elsewhere.
        Tracking = "tracking",
    }
);

closed_set!(
    /// How soon a realtime event should be seen. Urgent overtakes.
    Priority, "priority", {
        /// Can wait.
        Low = "low",
        /// The default.
        Normal = "normal",
        /// Soon.
        High = "high",
        /// Before all others.
        Urgent = "urgent",
    }
);

impl Priority {
    /// The rank of delivery: 0 goes first.
    #[must_use]
    pub fn rank(self) -> i16 {
        match self {
            Self::Urgent => 0,
            Self::High => 1,
            Self::Normal => 2,
            Self::Low => 3,
        }
    }
}

closed_set!(
    /// Where an event comes from.
    Source, "source", {
        /// The CRM itself.
        System = "system",
        /// A person.
        Agent = "agent",
        /// A webhook.
        Webhook = "webhook",
        /// A workflow.
        Workflow = "workflow",
        /// An automation.
        Automation = "automation",
        /// Another product; needs `integration_source`.
        Integration = "integration",
    }
);

/// The type of an event: an open set of names `[a-z][a-z0-9_.]{0,63}`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventType(std::borrow::Cow<'static, str>);

impl EventType {
    const fn predefined(name: &'static str) -> Self {
        Self(std::borrow::Cow::Borrowed(name))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for EventType {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let mut bytes = text.bytes();
        let valid = text.len() <= 64
            && bytes.next().is_some_and(|b| b.is_ascii_lowercase())
            && bytes
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'.');
        if valid {
            Ok(Self(std::borrow::Cow::Owned(text.to_owned())))
        } else {
            Err(UnknownKind {
                set: "type of an event",
                given: text.chars().take(64).collect(),
                allowed: "1 to 64 of a-z 0-9 _ . beginning with a letter".to_owned(),
            })
        }
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for EventType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// The predefined event types.
pub mod event_types {
    use super::EventType;

    macro_rules! predefined {
        ($($constant:ident = $name:literal),+ $(,)?) => {
            $(
                #[doc = concat!("`", $name, "`")]
                pub const $constant: EventType = EventType::predefined($name);
            )+
            /// All of them, in the order of the specification.
            pub const ALL: &[EventType] = &[$($constant),+];
        };
    }

    predefined! {
        STATUS_CHANGED = "status_changed",
        ENTERED_PIPELINE = "entered_pipeline",
        EXITED_PIPELINE = "exited_pipeline",
        PIPELINE_STAGE_CHANGED = "pipeline_stage_changed",
        AGENT_ASSIGNED = "agent_assigned",
        AGENT_TRANSFERRED = "agent_transferred",
        AGENT_UNASSIGNED = "agent_unassigned",
        TAG_ADDED = "tag_added",
        TAG_REMOVED = "tag_removed",
        NOTE_ADDED = "note_added",
        NOTE_UPDATED = "note_updated",
        NOTE_DELETED = "note_deleted",
        SESSION_STARTED = "session_started",
        SESSION_ENDED = "session_ended",
        CUSTOM_FIELD_SET = "custom_field_set",
        CUSTOM_FIELD_CLEARED = "custom_field_cleared",
        WEBHOOK_RECEIVED = "webhook_received",
        NOTIFICATION_SENT = "notification_sent",
        CONTACT_CREATED = "contact_created",
        CONTACT_UPDATED = "contact_updated",
        CONTACT_MERGED = "contact_merged",
        CONTACT_ENRICHED = "contact_enriched",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sets_have_the_sizes_of_the_contract() {
        assert_eq!(
            (
                Category::ALL.len(),
                Priority::ALL.len(),
                Source::ALL.len(),
                event_types::ALL.len()
            ),
            (11, 4, 6, 22)
        );
    }

    #[test]
    fn every_name_parses_back() {
        for category in Category::ALL {
            assert_eq!(category.as_str().parse(), Ok(*category));
        }
        for predefined in event_types::ALL {
            assert_eq!(predefined.as_str().parse().as_ref(), Ok(predefined));
        }
    }

    #[test]
    fn an_unknown_name_is_told_what_is_allowed() {
        let error = "hihg".parse::<Priority>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"hihg\" is not a priority; allowed: low normal high urgent"
        );
    }

    #[test]
    fn event_types_are_checked_at_the_edges() {
        for good in ["a", "z9_.", &format!("a{}", "b".repeat(63))] {
            assert!(good.parse::<EventType>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "9a",
            "_a",
            "A",
            "a-b",
            "á",
            "a b",
            &format!("a{}", "b".repeat(64)),
        ] {
            assert!(bad.parse::<EventType>().is_err(), "{bad}");
        }
    }

    #[test]
    fn urgent_ranks_first() {
        let mut all = Priority::ALL.to_vec();
        all.sort_by_key(|p| p.rank());
        assert_eq!(
            all,
            [
                Priority::Urgent,
                Priority::High,
                Priority::Normal,
                Priority::Low
            ]
        );
    }
}
