//! Rules, holds and the ledger: what a sweep takes, and what it leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use timelined::domain::{
    Category, Cause, ContactEvent, EventId, HoldId, NewContactEvent, Retention, RetentionRule,
    RunId, Scope, Source, Sweep, TenantId,
};
use timelined::storage::{
    Batch, Deletion, DueCount, HoldScope, RetentionStore, StorageError, SweepKey,
};

use crate::support::builders::*;
use crate::support::database::{Database, Engine};

const RUN: fn() -> RunId = || "0190b5f0-7c1e-7d3a-8f00-00000000000a".parse().unwrap();

fn by_run() -> Deletion {
    Deletion {
        run: Some(RUN()),
        fence: None,
        now: t0() + hours(2),
    }
}

fn scope(category: Option<Category>, event_type: Option<&str>) -> Scope {
    Scope {
        category,
        event_type: event_type.map(|it| it.parse().unwrap()),
    }
}

/// Goes through a sweep in batches of `limit`; answers what they did in all, and how many there were.
async fn through(store: &dyn RetentionStore, sweep: &Sweep, limit: u32) -> (Batch, usize) {
    let mut all = Batch {
        seen: 0,
        deleted: 0,
        held: 0,
        last: None,
        took: Duration::ZERO,
        was_alone: true,
    };
    for batches in 1.. {
        let batch = store.sweep(sweep, all.last, limit, by_run()).await.unwrap();
        all.seen += batch.seen;
        all.deleted += batch.deleted;
        all.held += batch.held;
        if batch.seen < u64::from(limit) {
            return (all, batches);
        }
        assert!(
            batch.last.is_none() || batch.last > all.last,
            "a sweep goes forward"
        );
        all.last = batch.last;
    }
    unreachable!()
}

async fn left(db: &Database) -> BTreeSet<EventId> {
    let ids = db
        .texts("select cast(id as text) from contact_events")
        .await;
    ids.into_iter()
        .map(|id| id.unwrap().parse().unwrap())
        .collect()
}

on_both_engines! {
    async fn a_sweep_takes_its_rule_alone_and_passes_over_the_rest(db) {
        let expires = t0() + minutes(1);
        let about = |n, event_type, category| event_about(event_type, category).id(id(n)).expires_at(expires).recorded();
        // All in the same microsecond.
        db.given(&acme(), [
            about(1, "note_added", Category::Note),
            about(2, "note_updated", Category::Note),
            about(3, "tag_added", Category::Tag),
            about(4, "note_added", Category::Tag),
            about(5, "note_added", Category::Note),
        ]).await;
        let mut sweep = Sweep::expired_before(&acme(), t0() + hours(1));
        "category=note".clone_into(&mut sweep.rule);
        sweep.scope = scope(Some(Category::Note), None);
        sweep.except = vec![scope(None, Some("note_updated"))];
        assert_eq!(db.retention.count_due(&sweep, 100).await.unwrap(), DueCount { due: 2, held: 0 });
        assert_eq!(db.retention.count_due(&sweep, 1).await.unwrap().due, 1);
        let (all, batches) = through(&*db.retention, &sweep, 2).await;
        assert_eq!((all.seen, all.deleted, batches), (5, 2, 3));
        assert_eq!(left(db).await, [2, 3, 4].map(id).into());
        let entries = db.retention.deletions(RUN()).await.unwrap();
        let [entry] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!((entry.rule.as_str(), entry.cause, entry.deleted), ("category=note", Cause::Expired, 2));
    }

    async fn what_stands_beside_goes_with_its_event_alone(db) {
        // Among the ids of the first two stand many of others, among those of the last two none.
        let expired = [1, 30, 40, 41];
        db.given(&acme(), (1..=41).map(|n| {
            let event = event().id(id(n));
            if expired.contains(&n) { event.expires_at(t0() + minutes(1)).recorded() } else { event.recorded() }
        })).await;
        db.execute(
            "insert into event_reads (tenant_id, event_id, reader, read_at)
             select tenant_id, id, 'agent', created_at from contact_events;
             insert into event_deliveries (tenant_id, event_id, audience, outcome, recorded_at)
             select tenant_id, id, 'agent', 'delivered', created_at from contact_events",
        ).await.unwrap();
        let sweep = Sweep::expired_before(&acme(), t0() + hours(1));
        assert_eq!(through(&*db.retention, &sweep, 2).await.0.deleted, 4);
        for table in ["event_reads", "event_deliveries"] {
            let orphans = format!("{table} r where not exists (select 1 from contact_events e where e.id = r.event_id)");
            assert_eq!((db.count(table).await, db.count(&orphans).await), (37, 0), "{table}");
        }
    }

    async fn what_has_no_expiry_goes_by_its_age_to_the_microsecond(db) {
        let recorded = |n, at| event().id(id(n)).recorded_at(at);
        let cutoff = t0() - days(30);
        db.given(&acme(), [
            recorded(1, cutoff - MICRO),
            recorded(2, cutoff),
            event().id(id(3)).expires_at(t0()).recorded_at(cutoff - hours(1)),
        ]).await;
        let sweep = Sweep { cause: Cause::Aged, ..Sweep::expired_before(&acme(), cutoff) };
        assert_eq!(db.retention.count_due(&sweep, 100).await.unwrap().due, 1);
        assert_eq!(through(&*db.retention, &sweep, 10).await.0.deleted, 1);
        assert_eq!(left(db).await, [2, 3].map(id).into());
        assert_eq!(db.retention.ageing_tenants().await.unwrap(), [acme()]);
    }

    async fn a_hold_defers_and_its_release_lets_go_on(db) {
        let given = |n, contact_number| event_of(contact(contact_number)).id(id(n)).expires_at(t0() + minutes(1)).recorded();
        db.given(&acme(), (1..=9).map(|n| given(n, n % 3))).await;
        let by = subject("lawyer");
        let hold = db.retention.place_hold(&acme(), HoldScope::Contact(contact(1)), "a case", &by, t0()).await.unwrap();
        assert_eq!((hold.contact_id, hold.category, hold.reason.as_str()), (Some(contact(1)), None, "a case"));
        let sweep = Sweep::expired_before(&acme(), t0() + hours(1));
        assert_eq!(db.retention.count_due(&sweep, 100).await.unwrap(), DueCount { due: 6, held: 3 });
        let (all, _) = through(&*db.retention, &sweep, 2).await;
        assert_eq!((all.deleted, all.held), (6, 3));
        assert_eq!(left(db).await, [1, 4, 7].map(id).into());
        // The plain operation passes over them, too, however small its batch.
        assert_eq!(db.events.delete_expired_before(&acme(), t0() + hours(1), 1, None).await.unwrap(), 0);
        // And a deletion by hand.
        let refused = db.events.delete(&acme(), id(1), &by, t0()).await;
        assert!(matches!(refused, Err(StorageError::Held)), "{refused:?}");
        assert_eq!(db.count("audit_log where action = 'event_deleted'").await, 0);

        assert_eq!(db.retention.holds(Some(&acme())).await.unwrap(), std::slice::from_ref(&hold));
        assert_eq!(db.retention.holds(Some(&globex())).await.unwrap(), []);
        assert!(!db.retention.release_hold(&globex(), hold.id, &by, t0()).await.unwrap());
        assert!(db.retention.release_hold(&acme(), hold.id, &by, t0()).await.unwrap());
        assert!(!db.retention.release_hold(&acme(), hold.id, &by, t0()).await.unwrap());
        assert_eq!(db.retention.holds(None).await.unwrap(), []);
        assert!(db.events.delete(&acme(), id(1), &by, t0()).await.unwrap().is_some());
        assert_eq!(through(&*db.retention, &sweep, 100).await.0.deleted, 2);
        let audited = "select action from audit_log where action like 'hold%' order by seq";
        assert_eq!(db.texts(audited).await, ["hold_placed", "hold_released"].map(|it| Some(it.to_owned())));
    }

    async fn holds_keep_a_category_or_a_whole_tenant(db) {
        let expires = t0() + minutes(1);
        for tenant in [acme(), globex()] {
            let given = [
                event_about("note_added", Category::Note).id(id(1)).expires_at(expires),
                event_about("tag_added", Category::Tag).id(id(2)).expires_at(expires),
            ];
            db.given(&tenant, given.map(|event| event.record(&tenant, t0()).unwrap())).await;
        }
        let by = subject("lawyer");
        db.retention.place_hold(&acme(), HoldScope::Category(Category::Note), "a", &by, t0()).await.unwrap();
        db.retention.place_hold(&globex(), HoldScope::Tenant, "b", &by, t0()).await.unwrap();
        assert_eq!(db.retention.held_tenants().await.unwrap(), [globex()]);
        let sweep = |tenant: &TenantId| Sweep::expired_before(tenant, t0() + hours(1));
        let count = async |tenant: TenantId| db.retention.count_due(&sweep(&tenant), 100).await.unwrap();
        assert_eq!(count(acme()).await, DueCount { due: 1, held: 1 });
        assert_eq!(count(globex()).await, DueCount { due: 0, held: 2 });
        let (all, _) = through(&*db.retention, &sweep(&acme()), 10).await;
        assert_eq!((all.deleted, all.held), (1, 1));
        let (all, _) = through(&*db.retention, &sweep(&globex()), 10).await;
        assert_eq!((all.seen, all.deleted), (0, 0));
        assert_eq!(db.count("contact_events").await, 3);
        for (tenant, kept) in [(acme(), 1), (globex(), 2)] {
            assert!(matches!(db.events.delete(&tenant, id(kept), &by, t0()).await, Err(StorageError::Held)));
        }
    }

    async fn a_hold_that_was_answered_keeps_what_is_left_from_a_purge_at_work(db) {
        db.given(&acme(), (1..=3000).map(|n| event().id(id(n)).expires_at(t0() + minutes(1)).recorded())).await;
        let sweep = Sweep::expired_before(&acme(), t0() + hours(1));
        let (goes, mut is_at_work) = tokio::sync::watch::channel(0);
        let purge = async {
            let mut after = None;
            loop {
                let batch = db.retention.sweep(&sweep, after, 5, by_run()).await.unwrap();
                goes.send_modify(|deleted| *deleted += batch.deleted);
                if batch.seen < 5 {
                    return;
                }
                after = batch.last;
            }
        };
        let hold = async {
            is_at_work.wait_for(|deleted| *deleted >= 50).await.unwrap();
            db.retention.place_hold(&acme(), HoldScope::Tenant, "", &subject("s"), t0()).await.unwrap();
            db.count("contact_events").await
        };
        let ((), left) = tokio::join!(purge, hold);
        assert!(left > 0, "the purge was over before the hold");
        assert_eq!(db.count("contact_events").await, left);
    }

    async fn the_ledger_adds_up_what_the_batches_of_a_run_deleted(db) {
        db.given(&acme(), (1..=10).map(|n| event().id(id(n)).expires_at(t0() + minutes(1)).recorded())).await;
        let sweep = Sweep::expired_before(&acme(), t0() + hours(1));
        through(&*db.retention, &sweep, 3).await;
        let entries = db.retention.deletions(RUN()).await.unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].tenant_id.clone(), entries[0].rule.as_str(), entries[0].deleted), (acme(), "default", 10));
        // Nothing was deleted, so there is nothing to say.
        through(&*db.retention, &Sweep::expired_before(&globex(), t0() + hours(1)), 3).await;
        assert_eq!(db.count("deletion_ledger").await, 1);
    }

    async fn the_file_shrinks_when_its_events_are_gone(db) {
        let text = "x".repeat(10_000);
        for hundred in 0..10 {
            let given = (1..=100).map(|n| {
                event().id(id(hundred * 100 + n)).description(&text).expires_at(t0() + minutes(1)).recorded()
            });
            db.given(&acme(), given).await;
        }
        through(&*db.retention, &Sweep::expired_before(&acme(), t0() + hours(1)), 500).await;
        if db.engine == Engine::Postgres {
            assert!(!db.retention.give_back_space().await.unwrap());
            return;
        }
        let (pages, free) = (db.int("pragma page_count").await, db.int("pragma freelist_count").await);
        assert!(free > 2_000, "{free} of {pages} pages are free");
        let mut steps = 0;
        while db.retention.give_back_space().await.unwrap() {
            steps += 1;
        }
        assert!(steps > 20, "in small steps, not in {steps}");
        let left = db.int("pragma freelist_count").await;
        assert!((190..=256).contains(&left), "{left} pages are spare");
        // Pages that only mapped others go with them.
        let all = db.int("pragma page_count").await;
        assert!(all <= pages - free + left && all > left, "{all} of {pages} pages");
    }

    async fn the_purge_deletes_exactly_what_the_rules_say_at_every_batch_size(db) {
        for seed in 1..=12 {
            Trial::new(seed).run(db).await;
        }
    }
}

/// A small generator (splitmix64), so that a failure can be repeated by its seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }

    fn maybe<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (self.below(2) == 0).then(|| self.pick(from))
    }
}

const CATEGORIES: [Category; 3] = [Category::Note, Category::Tag, Category::Tracking];
const TYPES: [&str; 3] = ["note_added", "tag_added", "page.viewed"];

/// Random events, rules, holds and an instant.
struct Trial {
    seed: u64,
    chance: Chance,
    tenants: Vec<TenantId>,
    rules: Vec<RetentionRule>,
    own: TimeDelta,
}

impl Trial {
    fn new(seed: u64) -> Self {
        let mut chance = Chance(seed);
        let tenants = ["a", "b", "c"].map(|name| TenantId::new(&format!("{name}{seed}")).unwrap());
        let mut rules: Vec<RetentionRule> = Vec::new();
        for _ in 0..chance.below(7) {
            let rule = RetentionRule {
                tenant: chance.maybe(&tenants),
                scope: scope(chance.maybe(&CATEGORIES), chance.maybe(&TYPES)),
                older_than: chance.maybe(&[0, 1, 5, 30]).map(days),
                max_age: chance.maybe(&[1, 5, 30]).map(days),
            };
            if !rules.iter().any(|other| other.selects_like(&rule)) {
                rules.push(rule);
            }
        }
        let own = days(chance.pick(&[0, 3, 7]));
        Self {
            seed,
            chance,
            tenants: tenants.into(),
            rules,
            own,
        }
    }

    fn events(&mut self, now: DateTime<Utc>) -> Vec<ContactEvent> {
        // Around the borders of the periods, to the microsecond, and a few equal ones.
        let instants: Vec<DateTime<Utc>> = [0, 1, 3, 5, 7, 30]
            .into_iter()
            .flat_map(|period| [-1, 0, 1].map(|micros| now - days(period) + MICRO * micros))
            .collect();
        (1..=120)
            .map(|number| {
                let at = self.chance.pick(&instants);
                let tenant = self.chance.pick(&self.tenants);
                let contact = contact(self.chance.below(4));
                let category = self.chance.pick(&CATEGORIES);
                let event_type = self.chance.pick(&TYPES).parse().unwrap();
                let event = NewContactEvent::new(contact, event_type, category, Source::System)
                    .id(id(self.seed * 1000 + number));
                if self.chance.below(2) == 0 {
                    event
                        .expires_at(at)
                        .realtime()
                        .record(&tenant, now - days(100))
                        .unwrap()
                } else {
                    event.record(&tenant, at).unwrap()
                }
            })
            .collect()
    }

    /// What the specification says, event by event, without any of the code that it judges: the rule
    /// of the largest weight.
    fn is_due(&self, event: &ContactEvent, now: DateTime<Utc>) -> bool {
        let weight = |rule: &&RetentionRule| {
            let own = |is_named, weight| if is_named { weight } else { 0 };
            own(rule.tenant.is_some(), 4)
                + own(rule.scope.event_type.is_some(), 2)
                + own(rule.scope.category.is_some(), 1)
        };
        let matches = |rule: &&RetentionRule| {
            (rule.tenant.is_none() || rule.tenant.as_ref() == Some(&event.tenant_id))
                && (rule.scope.category.is_none() || rule.scope.category == Some(event.category))
                && (rule.scope.event_type.is_none()
                    || rule.scope.event_type.as_ref() == Some(&event.event_type))
        };
        let rule = self.rules.iter().filter(matches).max_by_key(weight);
        match event.expires_at {
            Some(at) => at + rule.and_then(|rule| rule.older_than).unwrap_or(self.own) < now,
            None => rule
                .and_then(|rule| rule.max_age)
                .is_some_and(|age| event.created_at + age < now),
        }
    }

    async fn run(mut self, db: &Database) {
        let now = t0() + MICRO * (self.chance.below(1_000_000_000) as i32);
        let events = self.events(now);
        let mut by_tenant: BTreeMap<TenantId, Vec<ContactEvent>> = BTreeMap::new();
        for event in &events {
            by_tenant
                .entry(event.tenant_id.clone())
                .or_default()
                .push(event.clone());
        }
        for (tenant, events) in by_tenant {
            db.given(&tenant, events).await;
        }
        let mut holds: Vec<(TenantId, HoldScope, HoldId)> = Vec::new();
        for _ in 0..self.chance.below(4) {
            let kept = match self.chance.below(3) {
                0 => HoldScope::Tenant,
                1 => HoldScope::Contact(contact(self.chance.below(4))),
                _ => HoldScope::Category(self.chance.pick(&CATEGORIES)),
            };
            let tenant = self.chance.pick(&self.tenants);
            let hold = db
                .retention
                .place_hold(&tenant, kept, "a case", &subject("s"), t0())
                .await
                .unwrap();
            holds.push((tenant, kept, hold.id));
        }
        let is_held = |event: &ContactEvent, holds: &[(TenantId, HoldScope, HoldId)]| {
            holds.iter().any(|(tenant, kept, _)| {
                *tenant == event.tenant_id
                    && match kept {
                        HoldScope::Tenant => true,
                        HoldScope::Contact(contact) => *contact == event.contact_id,
                        HoldScope::Category(category) => *category == event.category,
                    }
            })
        };
        let retention = Retention::new(self.own).with_rules(self.rules.clone());
        for event in &events {
            assert_eq!(
                retention.takes(event, now).is_some(),
                self.is_due(event, now),
                "seed {}: {event:?}",
                self.seed
            );
        }

        let limit = self.chance.pick(&[1, 2, 7, 1000]);
        let budget = self.chance.below(40);
        // A run that is stopped somewhere, and another one that goes to its end; then the holds end.
        let expected = |holds: &[(TenantId, HoldScope, HoldId)]| -> BTreeSet<EventId> {
            (events.iter())
                .filter(|event| !self.is_due(event, now) || is_held(event, holds))
                .map(|event| event.id)
                .collect()
        };
        let kept = expected(&holds);
        let own = |left: BTreeSet<EventId>| -> BTreeSet<EventId> {
            left.into_iter()
                .filter(|left| events.iter().any(|event| event.id == *left))
                .collect()
        };
        let foreseen = Self::count(db, &retention, &self.tenants, now).await;
        Self::purge(db, &retention, &self.tenants, now, limit, Some(budget)).await;
        let stopped = own(left(db).await);
        assert!(stopped.is_superset(&kept), "seed {}", self.seed);
        Self::purge(db, &retention, &self.tenants, now, limit, None).await;
        assert_eq!(
            own(left(db).await),
            kept,
            "seed {}, batches of {limit}",
            self.seed
        );
        assert_eq!(
            foreseen,
            (events.len() - kept.len()) as u64,
            "seed {}",
            self.seed
        );

        for (tenant, _, id) in &holds {
            assert!(
                db.retention
                    .release_hold(tenant, *id, &subject("s"), now)
                    .await
                    .unwrap()
            );
        }
        Self::purge(db, &retention, &self.tenants, now, limit, None).await;
        let kept = expected(&[]);
        assert_eq!(own(left(db).await), kept, "seed {}, released", self.seed);
        // What hangs on an event went with it.
        let waiting = db
            .texts("select cast(event_id as text) from event_outbox")
            .await;
        let waiting: BTreeSet<EventId> = waiting
            .into_iter()
            .map(|id| id.unwrap().parse().unwrap())
            .collect();
        assert!(own(waiting).is_subset(&kept), "seed {}", self.seed);
    }

    async fn count(
        db: &Database,
        retention: &Retention,
        tenants: &[TenantId],
        now: DateTime<Utc>,
    ) -> u64 {
        let mut due = 0;
        for sweep in tenants
            .iter()
            .flat_map(|tenant| retention.sweeps(tenant, now))
        {
            due += db.retention.count_due(&sweep, u64::MAX).await.unwrap().due;
        }
        due
    }

    /// In batches of `limit`, of which at most `budget`.
    async fn purge(
        db: &Database,
        retention: &Retention,
        tenants: &[TenantId],
        now: DateTime<Utc>,
        limit: u32,
        mut budget: Option<u64>,
    ) {
        for sweep in tenants
            .iter()
            .flat_map(|tenant| retention.sweeps(tenant, now))
        {
            let mut after: Option<SweepKey> = None;
            loop {
                if budget == Some(0) {
                    return;
                }
                budget = budget.map(|left| left - 1);
                let batch = db
                    .retention
                    .sweep(&sweep, after, limit, by_run())
                    .await
                    .unwrap();
                if batch.seen < u64::from(limit) {
                    break;
                }
                after = batch.last;
            }
        }
    }
}
