//! How long events stay: the purge's own period and the rules that set another one.
//!
//! Each event follows one rule, the most specific of those that match it: first one that names its
//! tenant, among those one that names its type, then one that names its category. Where none
//! matches, the purge's own period holds. [`Retention::sweeps`] turns the rules round into what the
//! purge reads, tenant by tenant; the dry run and the real run read the same.

use std::cmp::Reverse;
use std::fmt;

use chrono::{DateTime, TimeDelta, Utc};

use super::{Category, ContactEvent, EventType, TenantId, format_time};

/// A `[[retention]]` rule. What it does not name matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RetentionRule {
    /// Only events of this tenant.
    pub tenant: Option<TenantId>,
    /// Only events of this category and type.
    pub scope: Scope,
    /// How long an event stays after its expiry; `None` leaves it to the purge's own period.
    pub older_than: Option<TimeDelta>,
    /// How long an event without an expiry stays after it was recorded; `None` is for ever.
    pub max_age: Option<TimeDelta>,
}

impl RetentionRule {
    fn applies_to(&self, tenant: &TenantId) -> bool {
        self.tenant.as_ref().is_none_or(|own| own == tenant)
    }

    /// Sorts rules by what they name; no two that match the same event are equal in it, unless they
    /// name the same.
    fn rank(&self) -> (bool, bool, bool) {
        (
            self.tenant.is_some(),
            self.scope.event_type.is_some(),
            self.scope.category.is_some(),
        )
    }

    /// Whether both match the same events.
    #[must_use]
    pub fn selects_like(&self, other: &Self) -> bool {
        self.tenant == other.tenant && self.scope == other.scope
    }
}

impl fmt::Display for RetentionRule {
    /// What it names, as the ledger and the dry run call it: `tenant=acme category=note`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenant = self
            .tenant
            .as_ref()
            .map(|tenant| format!("tenant={tenant}"));
        let category = self.scope.category.map(|it| format!("category={it}"));
        let event_type = (self.scope.event_type.as_ref()).map(|it| format!("event_type={it}"));
        let named: Vec<String> = [tenant, category, event_type]
            .into_iter()
            .flatten()
            .collect();
        if named.is_empty() {
            f.write_str("everything")
        } else {
            f.write_str(&named.join(" "))
        }
    }
}

/// Events of a category, of a type, or of both; of all, where neither is named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only of this category.
    pub category: Option<Category>,
    /// Only of this type.
    pub event_type: Option<EventType>,
}

impl Scope {
    /// Whether an event of this category and type is among them.
    #[must_use]
    pub fn holds(&self, category: Category, event_type: &EventType) -> bool {
        self.category.is_none_or(|own| own == category)
            && self.event_type.as_ref().is_none_or(|own| own == event_type)
    }

    /// Whether an event may be in both.
    fn meets(&self, other: &Self) -> bool {
        fn agree<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> bool {
            one.is_none() || other.is_none() || one == other
        }
        agree(self.category.as_ref(), other.category.as_ref())
            && agree(self.event_type.as_ref(), other.event_type.as_ref())
    }

    /// Whether every event of `other` is one of these.
    fn covers(&self, other: &Self) -> bool {
        (self.category.is_none() || self.category == other.category)
            && (self.event_type.is_none() || self.event_type == other.event_type)
    }
}

super::closed_set!(
    /// Why an event goes.
    Cause, "cause", {
        /// It expired long enough ago.
        Expired = "expired",
        /// It has no expiry, and was recorded long enough ago.
        Aged = "aged",
    }
);

/// What the purge takes of one tenant by one rule for one cause: a range of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sweep {
    /// Whose events.
    pub tenant: TenantId,
    /// The rule, as the ledger calls it.
    pub rule: String,
    /// Why they go.
    pub cause: Cause,
    /// What expired, or was recorded, strictly before this.
    pub before: DateTime<Utc>,
    /// Of these events …
    pub scope: Scope,
    /// … without those that follow a more specific rule.
    pub except: Vec<Scope>,
}

impl Sweep {
    /// Everything of a tenant that expired strictly before `cutoff`.
    #[must_use]
    pub fn expired_before(tenant: &TenantId, cutoff: DateTime<Utc>) -> Self {
        Self {
            tenant: tenant.clone(),
            rule: Retention::OWN.to_owned(),
            cause: Cause::Expired,
            before: cutoff,
            scope: Scope::default(),
            except: Vec::new(),
        }
    }

    /// Why these events go, in words.
    #[must_use]
    pub fn reason(&self) -> String {
        let before = format_time(self.before);
        match self.cause {
            Cause::Expired => format!("expired before {before}"),
            Cause::Aged => format!("without an expiry, recorded before {before}"),
        }
    }
}

/// The rules of the purge. Without any: what expired strictly before `now - older_than` goes,
/// nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    older_than: TimeDelta,
    /// The most specific first.
    rules: Vec<RetentionRule>,
}

impl Default for Retention {
    fn default() -> Self {
        Self::new(TimeDelta::days(7))
    }
}

impl Retention {
    /// What the ledger calls the purge's own period.
    pub const OWN: &str = "default";

    /// Keeps expired events for `older_than` more.
    #[must_use]
    pub fn new(older_than: TimeDelta) -> Self {
        Self {
            older_than,
            rules: Vec::new(),
        }
    }

    /// With rules, of which no two name the same.
    #[must_use]
    pub fn with_rules(self, mut rules: Vec<RetentionRule>) -> Self {
        rules.sort_by_key(|rule| Reverse(rule.rank()));
        Self { rules, ..self }
    }

    /// The instant before which an expiry is due for the purge, where no rule says otherwise.
    #[must_use]
    pub fn cutoff(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        before(now, self.older_than)
    }

    /// Whether an event is due at `now`, and why.
    #[must_use]
    pub fn takes(&self, event: &ContactEvent, now: DateTime<Utc>) -> Option<Cause> {
        let rule = self.rules.iter().find(|rule| {
            rule.applies_to(&event.tenant_id) && rule.scope.holds(event.category, &event.event_type)
        });
        if let Some(expires_at) = event.expires_at {
            let period = rule.and_then(|rule| rule.older_than);
            let cutoff = before(now, period.unwrap_or(self.older_than));
            (expires_at < cutoff).then_some(Cause::Expired)
        } else {
            let max_age = rule?.max_age?;
            (event.created_at < before(now, max_age)).then_some(Cause::Aged)
        }
    }

    /// Whether events of any tenant may go that have no expiry.
    #[must_use]
    pub fn takes_aged_of_any_tenant(&self) -> bool {
        (self.rules.iter()).any(|rule| rule.tenant.is_none() && rule.max_age.is_some())
    }

    /// The tenants of which events may go that have no expiry, as far as rules name them.
    pub fn tenants_with_max_age(&self) -> impl Iterator<Item = &TenantId> {
        (self.rules.iter())
            .filter(|rule| rule.max_age.is_some())
            .filter_map(|rule| rule.tenant.as_ref())
    }

    /// What is due of a tenant at `now`: each of its events that is due is in one of these.
    #[must_use]
    pub fn sweeps(&self, tenant: &TenantId, now: DateTime<Utc>) -> Vec<Sweep> {
        let own = RetentionRule::default();
        let matching: Vec<(&RetentionRule, String)> = (self.rules.iter())
            .filter(|rule| rule.applies_to(tenant))
            .map(|rule| (rule, rule.to_string()))
            .chain(std::iter::once((&own, Self::OWN.to_owned())))
            .collect();
        let mut sweeps = Vec::new();
        for (index, (rule, name)) in matching.iter().enumerate() {
            let stronger = matching[..index].iter().map(|(rule, _)| &rule.scope);
            if stronger.clone().any(|scope| scope.covers(&rule.scope)) {
                continue;
            }
            let except: Vec<Scope> = stronger
                .filter(|scope| scope.meets(&rule.scope))
                .cloned()
                .collect();
            let expired = rule.older_than.unwrap_or(self.older_than);
            let periods = [(Cause::Expired, Some(expired)), (Cause::Aged, rule.max_age)];
            for (cause, period) in periods {
                let Some(period) = period else { continue };
                sweeps.push(Sweep {
                    tenant: tenant.clone(),
                    rule: name.clone(),
                    cause,
                    before: before(now, period),
                    scope: rule.scope.clone(),
                    except: except.clone(),
                });
            }
        }
        sweeps
    }
}

fn before(now: DateTime<Utc>, period: TimeDelta) -> DateTime<Utc> {
    now.checked_sub_signed(period)
        .unwrap_or(DateTime::<Utc>::MIN_UTC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{ContactId, NewContactEvent, Source, event_types};

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp_micros(1_750_000_000_123_456).unwrap()
    }

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).unwrap()
    }

    fn rule(named: (&str, &str, &str), days: (i64, i64)) -> RetentionRule {
        let (tenant, category, event_type) = named;
        let some = |days: i64| (days > 0).then(|| TimeDelta::days(days));
        RetentionRule {
            tenant: TenantId::new(tenant).ok(),
            scope: Scope {
                category: category.parse().ok(),
                event_type: event_type.parse().ok(),
            },
            older_than: some(days.0),
            max_age: some(days.1),
        }
    }

    /// A note of acme that was added so many days ago, and expires at `expires_at`.
    fn note(age: i64, expires_at: Option<DateTime<Utc>>) -> ContactEvent {
        let mut event = NewContactEvent::new(
            ContactId::generate(now()),
            event_types::NOTE_ADDED,
            Category::Note,
            Source::Agent,
        )
        .record(&tenant("acme"), now() - TimeDelta::days(age))
        .unwrap();
        event.expires_at = expires_at;
        event
    }

    #[test]
    fn the_cutoff_is_strict_to_the_microsecond() {
        let cutoff = now() - TimeDelta::days(7);
        let takes = |at| Retention::default().takes(&note(30, Some(at)), now());
        assert_eq!(
            takes(cutoff - TimeDelta::microseconds(1)),
            Some(Cause::Expired)
        );
        assert_eq!(takes(cutoff), None);
        assert_eq!(takes(cutoff + TimeDelta::microseconds(1)), None);
    }

    #[test]
    fn what_never_expires_is_never_taken_without_a_rule() {
        let retention = Retention::new(TimeDelta::zero());
        assert_eq!(retention.takes(&note(3_000, None), now()), None);
    }

    #[test]
    fn a_retention_longer_than_time_itself_takes_nothing() {
        let retention = Retention::new(TimeDelta::MAX);
        assert_eq!(retention.takes(&note(3, Some(now())), now()), None);
    }

    #[test]
    fn the_tenant_outweighs_the_type_and_the_type_the_category() {
        let rules = [
            rule(("", "", ""), (1, 0)),
            rule(("", "note", ""), (2, 0)),
            rule(("", "", "note_added"), (3, 0)),
            rule(("", "note", "note_added"), (4, 0)),
            rule(("acme", "", ""), (5, 0)),
            rule(("acme", "note", ""), (6, 0)),
            rule(("acme", "", "note_added"), (7, 0)),
            rule(("acme", "note", "note_added"), (8, 0)),
        ];
        for count in 1..=rules.len() {
            let mut given = rules[..count].to_vec();
            given.rotate_left(count / 2);
            let retention = Retention::new(TimeDelta::days(100)).with_rules(given);
            let days = TimeDelta::days(i64::try_from(count).unwrap());
            let micro = TimeDelta::microseconds(1);
            let takes = |at| retention.takes(&note(99, Some(at)), now()).is_some();
            assert!(takes(now() - days - micro), "{count}");
            assert!(!takes(now() - days), "{count}");
        }
    }

    #[test]
    fn the_rule_that_wins_wins_whole() {
        // The one of the tenant says nothing of a largest age, so there is none.
        let rules = vec![
            rule(("", "note", ""), (0, 10)),
            rule(("acme", "", ""), (30, 0)),
        ];
        let retention = Retention::default().with_rules(rules);
        assert_eq!(retention.takes(&note(3_000, None), now()), None);
        let rules = vec![rule(("", "note", ""), (0, 10))];
        let retention = Retention::default().with_rules(rules);
        assert_eq!(retention.takes(&note(11, None), now()), Some(Cause::Aged));
        assert_eq!(retention.takes(&note(10, None), now()), None);
        // An expiry that it says nothing of follows the purge's own period.
        let expired = note(99, Some(now() - TimeDelta::days(8)));
        assert_eq!(retention.takes(&expired, now()), Some(Cause::Expired));
    }

    #[test]
    fn without_rules_a_tenant_is_one_sweep() {
        let cutoff = Retention::default().cutoff(now());
        let sweeps = Retention::default().sweeps(&tenant("acme"), now());
        assert_eq!(sweeps, [Sweep::expired_before(&tenant("acme"), cutoff)]);
    }

    #[test]
    fn a_sweep_leaves_out_what_follows_a_stronger_rule_and_what_is_covered_is_none() {
        let retention = Retention::default().with_rules(vec![
            rule(("acme", "note", ""), (30, 90)),
            rule(("", "tag", ""), (1, 0)),
            rule(("", "note", "note_added"), (2, 0)),
            rule(("globex", "", ""), (3, 0)),
        ]);
        let shown = |name: &str| -> Vec<(String, Cause, usize)> {
            (retention.sweeps(&tenant(name), now()).into_iter())
                .map(|sweep| (sweep.rule, sweep.cause, sweep.except.len()))
                .collect()
        };
        let expired = |rule: &str, except| (rule.to_owned(), Cause::Expired, except);
        assert_eq!(
            shown("acme"),
            [
                expired("tenant=acme category=note", 0),
                ("tenant=acme category=note".to_owned(), Cause::Aged, 0),
                // The other rule of notes is covered.
                expired("category=tag", 0),
                expired("default", 3),
            ]
        );
        assert_eq!(shown("globex"), [expired("tenant=globex", 0)]);
        assert_eq!(
            shown("other"),
            [
                expired("category=note event_type=note_added", 0),
                expired("category=tag", 0),
                expired("default", 2),
            ]
        );
    }
}
