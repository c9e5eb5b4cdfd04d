//! `[[retention]]`: how long events of a tenant, a category or a type stay.

use std::time::Duration;

use chrono::TimeDelta;

use super::error::Problem;
use super::jobs::{CATEGORIES, LONGEST_PERIOD};
use super::reader::Section;
use super::rules::{Rule, duration, named, parsed, text};
use crate::domain::{EventType, RetentionRule, Scope, UnknownKind};

/// Reads all rules; those with errors, which have been noted, are left out.
pub(super) fn read(root: &mut Section<'_>) -> Vec<RetentionRule> {
    let mut rules: Vec<RetentionRule> = Vec::new();
    root.each("retention", |section| {
        let Some(rule) = read_rule(section) else {
            return;
        };
        if let Some(first) = rules.iter().position(|other| other.selects_like(&rule)) {
            let problem = Problem::new(format!("selects what retention[{first}] selects"));
            section.fail_whole(
                problem.allowed("one rule for each tenant, category and event_type: join the two"),
            );
        }
        rules.push(rule);
    });
    rules
}

fn read_rule(section: &mut Section<'_>) -> Option<RetentionRule> {
    let tenant =
        section.take_optional("tenant", &parsed("the id of a tenant, 1 to 255 characters"));
    let category = section.take_optional("category", &named(CATEGORIES));
    let event_type = section.take_optional("event_type", &event_type());
    let older_than =
        section.take_optional("older_than", &duration(Duration::ZERO..=LONGEST_PERIOD));
    let max_age = section.take_optional(
        "max_age",
        // Nothing is kept for no time at all by mistake.
        &duration(Duration::from_secs(1)..=LONGEST_PERIOD),
    );
    let is_selector_wrong = [
        ("tenant", tenant.is_none()),
        ("category", category.is_none()),
        ("event_type", event_type.is_none()),
    ]
    .into_iter()
    .any(|(key, is_none)| is_none && section.is_given(key));
    if !section.is_given("older_than") && !section.is_given("max_age") {
        section.fail_whole(Problem::new("says no period").allowed(
            "older_than for events with an expiry, max_age for those without one, or both",
        ));
        return None;
    }
    // Without a part of its selectors it would match more than it is meant to.
    (!is_selector_wrong).then(|| RetentionRule {
        tenant,
        scope: Scope {
            category,
            event_type,
        },
        older_than: older_than.map(period),
        max_age: max_age.map(period),
    })
}

fn event_type() -> Rule<EventType> {
    text(
        "1 to 64 of a-z, 0-9, _ and ., beginning with a letter",
        |text| {
            text.parse().map_err(|_says_the_same: UnknownKind| {
                let fits =
                    |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.".contains(c);
                let meant: String = (text.trim().to_lowercase().chars())
                    .map(|c| if fits(c) { c } else { '_' })
                    .collect();
                let meant = Some(meant).filter(|meant| meant.parse::<EventType>().is_ok());
                Problem::new(format!("{text:?} is not a type of an event")).suggest(meant)
            })
        },
    )
}

fn period(duration: Duration) -> TimeDelta {
    TimeDelta::from_std(duration).expect("a hundred years fit")
}
