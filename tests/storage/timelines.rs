//! Timelines, sessions and lists: order, filters, audiences and pages.

use std::collections::BTreeSet;

use timelined::domain::{
    Audience, Category, ContactEvent, EventId, NewContactEvent, Source, event_types,
};
use timelined::storage::{Filter, Key, Page, Position, Slice, View};

use crate::support::builders::*;
use crate::support::database::Database;

const ALL: Page = Page {
    limit: 200,
    position: Position::Offset(0),
};

fn ids(events: &[ContactEvent]) -> Vec<EventId> {
    events.iter().map(|event| event.id).collect()
}

fn agents() -> View {
    View::of(Audience::Agent, t0())
}

fn everything() -> View {
    View::everything(t0())
}

async fn timeline(db: &Database, filter: &Filter, view: View, page: Page) -> Slice {
    db.events
        .find_by_contact_visible_to(&acme(), contact(1), filter, view, page)
        .await
        .unwrap()
}

/// The numbers of the events that a view of contact 1's timeline lists, and asserts that as many
/// are counted.
async fn listed(db: &Database, filter: &Filter, view: View) -> Vec<EventId> {
    let slice = timeline(db, filter, view, ALL).await;
    assert_eq!(slice.next, None);
    let count = db
        .events
        .count_by_contact(&acme(), contact(1), filter, view)
        .await
        .unwrap();
    assert_eq!(count as usize, slice.events.len());
    ids(&slice.events)
}

/// One event per visibility and expiry: 1 nobody, 2 agent, 3 client, 4 both; 5 to 8 the same, of
/// which 5 and 6 expire at `t0`, 7 a microsecond before and 8 a microsecond after.
async fn given_every_visibility(db: &Database) {
    let expiries = [
        None,
        None,
        None,
        None,
        Some(t0()),
        Some(t0()),
        Some(t0() - MICRO),
        Some(t0() + MICRO),
    ];
    let events = (1..).zip(expiries).map(|(number, expires_at)| {
        let mut event = event()
            .id(id(number))
            .session(session(1))
            .realtime()
            .visible_to_client((number - 1) & 2 != 0)
            .visible_to_agent((number - 1) & 1 != 0)
            .occurred_at(t0() - minutes(10));
        if let Some(at) = expires_at {
            event = event.expires_at(at);
        }
        event.recorded_at(t0() - minutes(10))
    });
    db.given(&acme(), events).await;
}

/// Reads all pages by keyset, `limit` at a time.
async fn all_pages(limit: u32, page_at: impl AsyncFn(Page) -> Slice) -> Vec<ContactEvent> {
    let mut all = Vec::new();
    let mut page = Page::first(limit);
    loop {
        let slice = page_at(page).await;
        assert!(slice.events.len() <= limit as usize);
        all.extend(slice.events);
        match slice.next {
            Some(key) => page = Page::after(limit, key),
            None => return all,
        }
    }
}

/// 60 events at 7 instants, so that most pages begin within a tie; the ids do not follow the times.
fn tied() -> Vec<ContactEvent> {
    (0..60)
        .map(|n| {
            event()
                .id(id((n * 37) % 61 + 1))
                .session(session(1))
                .realtime()
                .occurred_at(t0() - minutes(i64::try_from(n % 7).unwrap()))
                .recorded()
        })
        .collect()
}

fn oldest_first(mut events: Vec<ContactEvent>) -> Vec<EventId> {
    events.sort_by_key(|event| Key::from(event));
    ids(&events)
}

fn newest_first(events: Vec<ContactEvent>) -> Vec<EventId> {
    let mut ids = oldest_first(events);
    ids.reverse();
    ids
}

on_both_engines! {
    async fn a_timeline_runs_from_new_to_old_and_ties_are_broken_by_id(db) {
        let at = |number, time| event().id(id(number)).occurred_at(time).recorded();
        db.given(&acme(), [
            at(1, t0()), at(3, t0() - MICRO), at(2, t0() - MICRO), at(4, t0() - days(40_000)), at(5, t0() + minutes(5)),
        ]).await;
        let slice = db.events.find_by_contact(&acme(), contact(1), ALL).await.unwrap();
        assert_eq!(ids(&slice.events), [5, 1, 3, 2, 4].map(id));
        assert_eq!(slice.next, None);
    }

    async fn a_contact_without_events_has_an_empty_timeline(db) {
        db.given(&acme(), [event_of(contact(2)).recorded()]).await;
        let slice = db.events.find_by_contact(&acme(), contact(1), ALL).await.unwrap();
        assert_eq!(slice, Slice { events: Vec::new(), next: None });
        assert_eq!(listed(db, &Filter::default(), everything()).await, []);
    }

    async fn find_by_contact_lists_what_nobody_sees_and_what_expired(db) {
        given_every_visibility(db).await;
        let slice = db.events.find_by_contact(&acme(), contact(1), ALL).await.unwrap();
        assert_eq!(slice.events.len(), 8);
    }

    async fn an_audience_sees_what_is_visible_to_it_and_has_not_expired_by_now(db) {
        given_every_visibility(db).await;
        let seen = async |view| listed(db, &Filter::default(), view).await;
        assert_eq!(seen(View::of(Audience::Client, t0())).await, [8, 4, 3].map(id));
        assert_eq!(seen(View::of(Audience::Agent, t0())).await, [8, 4, 2].map(id));
        assert_eq!(seen(View::of(Audience::Audit, t0())).await, [8, 4, 3, 2, 1].map(id));
        // A microsecond earlier what expires at t0 is still there, a microsecond later 8 is gone.
        assert_eq!(seen(View::of(Audience::Agent, t0() - MICRO)).await, [8, 6, 4, 2].map(id));
        assert_eq!(seen(View::of(Audience::Agent, t0() + MICRO)).await, [4, 2].map(id));
        assert_eq!(seen(View::of(Audience::Client, t0() - MICRO * 2)).await, [8, 7, 4, 3].map(id));
    }

    async fn only_audit_may_ask_for_expired_events(db) {
        given_every_visibility(db).await;
        let with_expired = |audience| View { audience, now: t0() + days(1), include_expired: true };
        let seen = async |audience| listed(db, &Filter::default(), with_expired(audience)).await;
        assert_eq!(seen(Audience::Audit).await.len(), 8);
        assert_eq!(seen(Audience::Agent).await, [4, 2].map(id));
        assert_eq!(seen(Audience::Client).await, [4, 3].map(id));
    }

    async fn since_is_included_and_until_is_not(db) {
        let at = |number, time| event().id(id(number)).occurred_at(time).recorded();
        let (from, to) = (t0() - hours(2), t0() - hours(1));
        db.given(&acme(), [
            at(1, from - MICRO), at(2, from), at(3, from + MICRO), at(4, to - MICRO), at(5, to), at(6, to + MICRO),
        ]).await;
        let seen = async |since, until| listed(db, &Filter { since, until, ..Filter::default() }, agents()).await;
        assert_eq!(seen(Some(from), Some(to)).await, [4, 3, 2].map(id));
        assert_eq!(seen(Some(from), None).await, [6, 5, 4, 3, 2].map(id));
        assert_eq!(seen(None, Some(to)).await, [4, 3, 2, 1].map(id));
        assert_eq!(seen(Some(to), Some(from)).await, []);
        assert_eq!(seen(Some(to), Some(to)).await, []);
    }

    async fn filters_of_category_and_type_combine(db) {
        let about = |number, event_type, category| event_about(event_type, category).id(id(number)).recorded();
        db.given(&acme(), [
            about(1, "tag_added", Category::Tag), about(2, "tag_removed", Category::Tag),
            about(3, "tag_added", Category::Note), about(4, "tag_added.x", Category::Tag),
        ]).await;
        let seen = async |category, event_type: Option<&str>| {
            let event_type = event_type.map(|name| name.parse().unwrap());
            listed(db, &Filter { category, event_type, ..Filter::default() }, agents()).await
        };
        assert_eq!(seen(Some(Category::Tag), None).await, [4, 2, 1].map(id));
        assert_eq!(seen(None, Some("tag_added")).await, [3, 1].map(id));
        assert_eq!(seen(Some(Category::Tag), Some("tag_added")).await, [1].map(id));
        assert_eq!(seen(Some(Category::General), Some("tag_added")).await, []);
    }

    async fn filters_of_everything_at_once_page_without_loss(db) {
        let events = (1..=90).map(|n| {
            event_about("tag_added", if n % 3 == 0 { Category::Tag } else { Category::Note })
                .id(id(n)).visible_to_client(n % 2 == 0).occurred_at(t0() - minutes(i64::try_from(n / 4).unwrap()))
                .recorded()
        });
        db.given(&acme(), events).await;
        let filter = Filter {
            category: Some(Category::Tag),
            event_type: Some("tag_added".parse().unwrap()),
            since: Some(t0() - minutes(20)),
            until: Some(t0() - minutes(1)),
        };
        let view = View::of(Audience::Client, t0());
        let all = listed(db, &filter, view).await;
        assert_eq!(all, [12, 18, 24, 30, 36, 42, 48, 54, 60, 66, 72, 78].map(id));
        let paged = all_pages(2, async |page| timeline(db, &filter, view, page).await).await;
        assert_eq!(ids(&paged), all);
    }

    async fn pages_by_key_neither_lose_nor_repeat_within_ties(db) {
        db.given(&acme(), tied()).await;
        let expected = newest_first(tied());
        for limit in [1, 7, 8, 59, 60, 61] {
            let paged = all_pages(limit, async |page| timeline(db, &Filter::default(), agents(), page).await).await;
            assert_eq!(ids(&paged), expected, "limit {limit}");
        }
    }

    async fn a_page_by_offset_is_the_page_by_key(db) {
        db.given(&acme(), tied()).await;
        let expected = newest_first(tied());
        let mut key = None;
        for offset in (0..60).step_by(9) {
            let by_offset = Page { limit: 9, position: Position::Offset(offset) };
            let by_offset = timeline(db, &Filter::default(), agents(), by_offset).await;
            let by_key = key.map_or(Page::first(9), |key| Page::after(9, key));
            let by_key = timeline(db, &Filter::default(), agents(), by_key).await;
            assert_eq!(by_offset, by_key);
            assert_eq!(ids(&by_offset.events), expected[offset as usize..(offset as usize + 9).min(60)]);
            key = by_offset.next;
        }
        let beyond = Page { limit: 9, position: Position::Offset(10_000) };
        assert_eq!(timeline(db, &Filter::default(), agents(), beyond).await, Slice { events: vec![], next: None });
    }

    async fn the_last_page_says_that_there_is_no_more_even_when_it_is_full(db) {
        db.given(&acme(), (1..=4).map(|n| event().id(id(n)).recorded())).await;
        let first = timeline(db, &Filter::default(), agents(), Page::first(2)).await;
        let key = first.next.unwrap();
        assert_eq!(key, Key { occurred_at: t0(), id: id(3) });
        let second = timeline(db, &Filter::default(), agents(), Page::after(2, key)).await;
        assert_eq!((ids(&second.events), second.next), ([2, 1].map(id).to_vec(), None));
    }

    async fn a_key_need_not_exist_and_until_still_bounds(db) {
        db.given(&acme(), (1..=9).map(|n| {
            event().id(id(n)).occurred_at(t0() - minutes(i64::try_from(n).unwrap())).recorded()
        })).await;
        let gone = Key { occurred_at: t0() - minutes(4), id: id(999) };
        let slice = timeline(db, &Filter::default(), agents(), Page::after(2, gone)).await;
        assert_eq!(ids(&slice.events), [4, 5].map(id));
        let filter = Filter { until: Some(t0() - minutes(6)), ..Filter::default() };
        let slice = timeline(db, &filter, agents(), Page::after(2, gone)).await;
        assert_eq!(ids(&slice.events), [7, 8].map(id));
    }

    async fn events_that_arrive_while_paging_move_no_later_page(db) {
        db.given(&acme(), (1..=6).map(|n| event().id(id(n)).recorded())).await;
        let first = timeline(db, &Filter::default(), agents(), Page::first(3)).await;
        db.given(&acme(), (7..=9).map(|n| event().id(id(n)).recorded())).await;
        let second = timeline(db, &Filter::default(), agents(), Page::after(3, first.next.unwrap())).await;
        assert_eq!(ids(&second.events), [3, 2, 1].map(id));
    }

    async fn a_total_is_exact_to_10_000_and_capped_beyond(db) {
        let events = |from: u64, to: u64| (from..=to).map(|n| event().id(id(n)).visible_to_client(n % 2 == 0).recorded());
        for from in (1..=9_001).step_by(1000) {
            db.given(&acme(), events(from, from + 999)).await;
        }
        let count = async |audience| {
            let view = View::of(audience, t0());
            db.events.count_by_contact(&acme(), contact(1), &Filter::default(), view).await.unwrap()
        };
        assert_eq!(count(Audience::Agent).await, 10_000);
        db.given(&acme(), events(10_001, 10_001)).await;
        assert_eq!(count(Audience::Agent).await, 10_001);
        db.given(&acme(), events(10_002, 10_003)).await;
        assert_eq!(count(Audience::Agent).await, 10_001);
        assert_eq!(count(Audience::Client).await, 5_001);
    }

    async fn a_session_runs_from_old_to_new_across_contacts(db) {
        let at = |number, of, time| event_of(contact(of)).id(id(number)).session(session(1)).occurred_at(time).recorded();
        db.given(&acme(), [
            at(1, 1, t0()), at(3, 2, t0() - MICRO), at(2, 1, t0() - MICRO), at(4, 1, t0() - days(1)),
            event().id(id(5)).session(session(2)).recorded(), event().id(id(6)).recorded(),
        ]).await;
        let seen = async |contacts: Option<&[_]>| {
            let slice = db.events.find_by_session(&acme(), session(1), contacts, agents(), ALL).await.unwrap();
            ids(&slice.events)
        };
        assert_eq!(seen(None).await, [4, 2, 3, 1].map(id));
        assert_eq!(seen(Some(&[contact(1)])).await, [4, 2, 1].map(id));
        assert_eq!(seen(Some(&[contact(3), contact(2)])).await, [3].map(id));
        assert_eq!(seen(Some(&[])).await, []);
    }

    async fn a_session_hides_what_the_audience_may_not_see(db) {
        given_every_visibility(db).await;
        let seen = async |view| {
            ids(&db.events.find_by_session(&acme(), session(1), None, view, ALL).await.unwrap().events)
        };
        assert_eq!(seen(View::of(Audience::Client, t0())).await, [3, 4, 8].map(id));
        assert_eq!(seen(View::of(Audience::Agent, t0())).await, [2, 4, 8].map(id));
        assert_eq!(seen(View::of(Audience::Audit, t0())).await, [1, 2, 3, 4, 8].map(id));
        assert_eq!(seen(everything()).await.len(), 8);
    }

    async fn a_session_is_paged_by_key_and_by_offset(db) {
        db.given(&acme(), tied()).await;
        let expected = oldest_first(tied());
        let session_page = async |page| {
            db.events.find_by_session(&acme(), session(1), None, agents(), page).await.unwrap()
        };
        for limit in [1, 8, 60] {
            assert_eq!(ids(&all_pages(limit, session_page).await), expected, "limit {limit}");
        }
        let by_offset = session_page(Page { limit: 5, position: Position::Offset(33) }).await;
        assert_eq!(ids(&by_offset.events), expected[33..38]);
    }

    async fn a_tenants_events_of_a_type_since_run_from_new_to_old(db) {
        let since = t0() - hours(1);
        let of = |number, kind: &str, of, time| {
            NewContactEvent::new(contact(of), kind.parse().unwrap(), Category::Tag, Source::Agent)
                .id(id(number)).occurred_at(time).recorded()
        };
        db.given(&acme(), [
            of(1, "tag_added", 1, t0()), of(2, "tag_added", 2, since), of(3, "tag_added", 1, since - MICRO),
            of(4, "tag_removed", 1, t0()), of(5, "tag_added", 3, since + MICRO),
        ]).await;
        let slice = db.events.find_by_type_since(&acme(), &event_types::TAG_ADDED, since, agents(), ALL).await.unwrap();
        assert_eq!(ids(&slice.events), [1, 5, 2].map(id));
    }

    async fn a_tenants_events_of_a_category_since_run_from_new_to_old(db) {
        let since = t0() - hours(1);
        let of = |number, category, of, time| {
            NewContactEvent::new(contact(of), event_types::TAG_ADDED, category, Source::Agent)
                .id(id(number)).occurred_at(time).recorded()
        };
        db.given(&acme(), [
            of(1, Category::Tag, 1, t0()), of(2, Category::Tag, 2, since), of(3, Category::Tag, 1, since - MICRO),
            of(4, Category::Note, 1, t0()), of(5, Category::Tag, 3, since + MICRO),
        ]).await;
        let slice = db.events.find_by_category_since(&acme(), Category::Tag, since, agents(), ALL).await.unwrap();
        assert_eq!(ids(&slice.events), [1, 5, 2].map(id));
    }

    async fn lists_by_type_and_category_hide_what_the_audience_may_not_see(db) {
        given_every_visibility(db).await;
        let since = t0() - days(1);
        for (view, expected) in [
            (View::of(Audience::Client, t0()), vec![8, 4, 3]),
            (View::of(Audience::Agent, t0()), vec![8, 4, 2]),
            (View::of(Audience::Audit, t0()), vec![8, 4, 3, 2, 1]),
            (everything(), vec![8, 7, 6, 5, 4, 3, 2, 1]),
        ] {
            let expected: Vec<EventId> = expected.into_iter().map(id).collect();
            let by_type = db.events.find_by_type_since(&acme(), &event_types::NOTE_ADDED, since, view, ALL).await;
            assert_eq!(ids(&by_type.unwrap().events), expected, "{view:?}");
            let by_category = db.events.find_by_category_since(&acme(), Category::Note, since, view, ALL).await;
            assert_eq!(ids(&by_category.unwrap().events), expected, "{view:?}");
        }
    }

    async fn lists_by_type_and_category_are_paged_by_key(db) {
        db.given(&acme(), tied()).await;
        let since = t0() - minutes(5);
        let expected = newest_first(tied().into_iter().filter(|event| event.occurred_at >= since).collect());
        for limit in [1, 8] {
            let by_type = all_pages(limit, async |page| {
                db.events.find_by_type_since(&acme(), &event_types::NOTE_ADDED, since, agents(), page).await.unwrap()
            }).await;
            assert_eq!(ids(&by_type), expected);
            let by_category = all_pages(limit, async |page| {
                db.events.find_by_category_since(&acme(), Category::Note, since, agents(), page).await.unwrap()
            }).await;
            assert_eq!(ids(&by_category), expected);
        }
    }

    /// Every list asked by each of two tenants that have the same ids for everything.
    async fn no_list_shows_another_tenants_events(db) {
        for tenant in [acme(), globex()] {
            let given = (1..=3).map(|n| {
                event().id(id(n)).session(session(1)).realtime().title(tenant.as_str())
                    .expires_at(t0() + hours(1)).record(&tenant, t0()).unwrap()
            });
            db.given(&tenant, given).await;
        }
        let late = t0() + hours(2);
        for tenant in [acme(), globex()] {
            let events = &db.events;
            let lists = [
                events.find_by_contact(&tenant, contact(1), ALL).await.unwrap().events,
                events.find_by_contact_visible_to(&tenant, contact(1), &Filter::default(), agents(), ALL).await.unwrap().events,
                events.find_by_session(&tenant, session(1), None, agents(), ALL).await.unwrap().events,
                events.find_by_type_since(&tenant, &event_types::NOTE_ADDED, t0(), agents(), ALL).await.unwrap().events,
                events.find_by_category_since(&tenant, Category::Note, t0(), agents(), ALL).await.unwrap().events,
                events.find_undelivered_for_contact(&tenant, contact(1), agents(), ALL).await.unwrap().events,
                events.find_undelivered_realtime(&tenant, &[contact(1)], [0; 4], t0(), 10).await.unwrap().events
                    .into_iter().map(|undelivered| undelivered.event).collect(),
                events.find_expired_before(&tenant, late, 10).await.unwrap(),
            ];
            for (number, list) in lists.iter().enumerate() {
                let found: BTreeSet<EventId> = list.iter().map(|event| event.id).collect();
                assert_eq!((list.len(), found.len()), (3, 3), "list {number} of {tenant}");
                assert!(list.iter().all(|event| event.tenant_id == tenant && event.title.as_deref() == Some(tenant.as_str())));
            }
            assert_eq!(events.count_by_contact(&tenant, contact(1), &Filter::default(), agents()).await.unwrap(), 3);
            assert_eq!(events.count_expired_before(&tenant, late).await.unwrap(), 3);
        }
    }
}
