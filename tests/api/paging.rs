//! Pages of lists.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use timelined::domain::{ContactId, format_time};

use super::ask::{assert_calm, daemon, get, ids, now, record, timeline};
use crate::support::builders::{Record as _, acme, contact, event_of, id, session};
use crate::support::daemon::{TestDaemon, agent, service};
use crate::support::database::{Database, Engine};

fn hour(number: i64) -> DateTime<Utc> {
    now() - TimeDelta::days(10) + TimeDelta::hours(number)
}

/// So many events of contact 1, in pairs that happened at the same time; their ids, oldest first.
async fn given(db: &Database, count: u64) -> Vec<String> {
    let start = hour(0);
    let events = (1..=count).map(|number| {
        event_of(contact(1))
            .id(id(number))
            .session(session(1))
            .occurred_at(start + TimeDelta::minutes(i64::try_from(number / 2).unwrap()))
            .recorded_at(now())
    });
    db.given(&acme(), events).await;
    (1..=count).map(|number| id(number).to_string()).collect()
}

async fn page(daemon: &TestDaemon, path: &str) -> Value {
    let answer = get(daemon, path, &service("acme")).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text);
    answer.json()
}

/// Follows the cursors from `path`, doing `between` after each page.
async fn walk(daemon: &TestDaemon, path: &str, mut between: impl AsyncFnMut()) -> Vec<String> {
    let mark = if path.contains('?') { '&' } else { '?' };
    let mut seen = Vec::new();
    let mut next = path.to_owned();
    for _ in 0..100 {
        let page = page(daemon, &next).await;
        seen.extend(ids(&page));
        let Some(cursor) = page["next_cursor"].as_str() else {
            return seen;
        };
        let url_safe = |c: char| c.is_ascii_alphanumeric() || "-_.~".contains(c);
        assert!(cursor.chars().all(url_safe), "{cursor}");
        next = format!("{path}{mark}cursor={cursor}");
        between().await;
    }
    panic!("the cursors of {path} do not end");
}

async fn insert_many(db: &Database, contact: ContactId, count: u32) {
    let insert = "insert into contact_events (tenant_id, contact_id, event_type, category, source)";
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {count})
             {insert} select 'acme', '{contact}', 'note_added', 'note', 'system' from n"
        ),
        Engine::Postgres => format!(
            "{insert} select 'acme', '{contact}', 'note_added', 'note', 'system' from generate_series(1, {count})"
        ),
    };
    db.execute(&sql).await.unwrap();
}

on_both_engines! {
    async fn a_timeline_is_paged_by_offset_newest_first(db) {
        let mut newest = given(db, 7).await;
        newest.reverse();
        let daemon = daemon(db).await;
        let path = timeline(contact(1));
        let first = page(&daemon, &path).await;
        let keys: BTreeSet<&str> = first.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = ["events", "total", "total_is_capped", "page", "limit", "next_cursor"];
        assert_eq!(keys, BTreeSet::from(expected));
        assert_eq!(ids(&first), newest);
        assert_eq!((&first["limit"], &first["page"], &first["total"]), (&json!(50), &json!(1), &json!(7)));
        assert_eq!((&first["total_is_capped"], &first["next_cursor"]), (&json!(false), &Value::Null));
        for (query, number, range) in [
            ("limit=3", 1, 0..3), ("limit=3&offset=3", 2, 3..6), ("limit=3&offset=6", 3, 6..7),
            ("limit=3&offset=4", 2, 4..7), ("limit=3&offset=7", 3, 7..7), ("limit=1&offset=6", 7, 6..7),
            ("limit=200&offset=10000", 51, 7..7), ("limit=7", 1, 0..7),
        ] {
            let page = page(&daemon, &format!("{path}?{query}")).await;
            assert_eq!(ids(&page), newest[range.clone()], "{query}");
            assert_eq!((&page["page"], &page["total"]), (&json!(number), &json!(7)), "{query}");
            // A cursor says that there is more, and only then.
            assert_eq!(page["next_cursor"].is_string(), range.end < 7, "{query}");
            if let Some(cursor) = page["next_cursor"].as_str() {
                let rest = get(&daemon, &format!("{path}?cursor={cursor}"), &service("acme")).await.json();
                assert_eq!(ids(&rest), newest[range.end..], "{query}");
                assert_eq!((&rest["page"], &rest["total"]), (&Value::Null, &json!(7)), "{query}");
            }
        }
        // Nobody's timeline is empty, not missing.
        let none = page(&daemon, &timeline(contact(404))).await;
        assert_eq!((&none["events"], &none["total"], &none["page"]), (&json!([]), &json!(0), &json!(1)));
    }

    async fn a_walk_by_cursor_sees_each_event_once_while_others_come(db) {
        let given = given(db, 40).await;
        let daemon = daemon(db).await;
        let mut hours = 0;
        let mut others = async || {
            hours += 1;
            record(&daemon, contact(1), json!({})).await;
            // Backdated, before and behind where the walk is.
            for at in [hour(-hours), hour(0) + TimeDelta::minutes(hours)] {
                record(&daemon, contact(1), json!({ "occurred_at": format_time(at), "session_id": session(1) })).await;
            }
        };
        let given: BTreeSet<String> = given.into_iter().collect();
        for (path, newest_first) in [
            (format!("{}?limit=7", timeline(contact(1))), true),
            (format!("/api/v1/sessions/{}/events?limit=7", session(1)), false),
        ] {
            let seen = walk(&daemon, &path, &mut others).await;
            let unique: BTreeSet<String> = seen.iter().cloned().collect();
            assert_eq!(unique.len(), seen.len(), "{path}: one came twice");
            assert!(unique.is_superset(&given), "{path}: one was passed over");
            let mut of_given: Vec<&String> = seen.iter().filter(|id| given.contains(*id)).collect();
            if newest_first {
                of_given.reverse();
            }
            assert!(of_given.is_sorted(), "{path}");
        }
        assert_calm(&daemon);
    }

    async fn a_total_beyond_10000_is_capped_and_says_so(db) {
        insert_many(db, contact(1), 10_000).await;
        let daemon = daemon(db).await;
        let path = format!("{}?limit=1", timeline(contact(1)));
        let exact = page(&daemon, &path).await;
        assert_eq!((&exact["total"], &exact["total_is_capped"]), (&json!(10_000), &json!(false)));
        insert_many(db, contact(1), 1).await;
        let capped = page(&daemon, &path).await;
        assert_eq!((&capped["total"], &capped["total_is_capped"]), (&json!(10_000), &json!(true)));
        // The deepest offset there is, and the way on.
        let deepest = page(&daemon, &format!("{path}&offset=10000")).await;
        assert_eq!((ids(&deepest).len(), &deepest["page"]), (1, &json!(10_001)));
        assert_eq!(deepest["next_cursor"], Value::Null);
        let answer = get(&daemon, &format!("{path}&offset=10001"), &service("acme")).await;
        let detail = answer.problem(400, "too deep")["detail"].to_string();
        assert!(detail.contains("cursor"), "{detail}");
    }

    async fn a_timeline_is_filtered_and_its_total_counts_what_the_filter_leaves(db) {
        let daemon = daemon(db).await;
        let mut made = Vec::new();
        for (number, event_type, category) in [
            (0, "note_added", "note"), (1, "tag_added", "tag"), (2, "note_added", "tag"), (3, "x.y", "note"),
        ] {
            let at = format_time(hour(number));
            let more = json!({ "event_type": event_type, "category": category, "occurred_at": at });
            made.push(record(&daemon, contact(1), more).await);
        }
        let at = |index: usize| made[index]["occurred_at"].as_str().unwrap();
        let (from, to) = (at(1), at(3));
        for (query, expected) in [
            ("category=note".to_owned(), vec![3, 0]),
            ("event_type=note_added".to_owned(), vec![2, 0]),
            ("event_type=note_added&category=tag".to_owned(), vec![2]),
            ("event_type=nothing.like_it".to_owned(), vec![]),
            // From the one instant on, up to and without the other.
            (format!("since={from}"), vec![3, 2, 1]),
            (format!("until={to}"), vec![2, 1, 0]),
            (format!("since={from}&until={to}"), vec![2, 1]),
            (format!("since={to}&until={from}"), vec![]),
            (format!("since={from}&category=note"), vec![3]),
        ] {
            let page = page(&daemon, &format!("{}?{query}", timeline(contact(1)))).await;
            let expected: Vec<&str> = expected.iter().map(|index: &usize| super::ask::id_of(&made[*index])).collect();
            assert_eq!(ids(&page), expected, "{query}");
            assert_eq!(page["total"], expected.len(), "{query}");
        }
    }

    async fn a_session_is_oldest_first(db) {
        let oldest = given(db, 5).await;
        let daemon = daemon(db).await;
        let path = format!("/api/v1/sessions/{}/events", session(1));
        let all = page(&daemon, &path).await;
        assert_eq!(all, json!({ "events": all["events"], "next_cursor": null }));
        assert_eq!(ids(&all), oldest);
        assert_eq!(walk(&daemon, &format!("{path}?limit=2"), async || ()).await, oldest);
        assert_eq!(ids(&page(&daemon, &format!("{path}?limit=2&offset=3")).await), oldest[3..]);
        assert_eq!(page(&daemon, &format!("/api/v1/sessions/{}/events", session(404))).await["events"], json!([]));
    }

    async fn types_and_categories_are_listed_across_contacts(db) {
        let daemon = daemon(db).await;
        let mut made = Vec::new();
        for (of, number, event_type, category) in [
            (1, 0, "note_added", "note"), (2, 1, "tag_added", "tag"), (2, 2, "note_added", "tag"), (3, 3, "x.y", "note"),
        ] {
            let at = format_time(hour(number));
            let more = json!({ "event_type": event_type, "category": category, "occurred_at": at });
            made.push(record(&daemon, contact(of), more).await);
        }
        let since = made[2]["occurred_at"].as_str().unwrap();
        for (query, expected) in [
            ("event_type=note_added".to_owned(), BTreeSet::from([0, 2])),
            ("category=note".to_owned(), BTreeSet::from([0, 3])),
            ("category=pipeline".to_owned(), BTreeSet::new()),
            (format!("event_type=note_added&since={since}"), BTreeSet::from([2])),
            (format!("category=tag&since={since}"), BTreeSet::from([2])),
        ] {
            let path = format!("/api/v1/contact-events?{query}");
            let all = get(&daemon, &path, &agent("acme")).await.json();
            assert_eq!(all, json!({ "events": all["events"], "next_cursor": null }), "{query}");
            let of = |index: &usize| super::ask::id_of(&made[*index]).to_owned();
            let expected: BTreeSet<String> = expected.iter().map(of).collect();
            assert_eq!(ids(&all).into_iter().collect::<BTreeSet<_>>(), expected, "{query}");
            assert_eq!(walk(&daemon, &format!("{path}&limit=1"), async || ()).await, ids(&all), "{query}");
        }
    }

    async fn what_is_undelivered_is_listed_oldest_first_and_reading_it_delivers_nothing(db) {
        let daemon = daemon(db).await;
        let mut made = Vec::new();
        for priority in ["low", "urgent", "normal", "high", "urgent"] {
            let event = record(&daemon, contact(1), json!({ "is_realtime": true, "priority": priority })).await;
            made.push(super::ask::id_of(&event).to_owned());
        }
        record(&daemon, contact(1), json!({})).await;
        record(&daemon, contact(2), json!({ "is_realtime": true })).await;
        let path = format!("/api/v1/contact-events/undelivered?contact_id={}", contact(1));
        for _ in 0..2 {
            let all = page(&daemon, &path).await;
            assert_eq!(all, json!({ "events": all["events"], "next_cursor": null }));
            assert_eq!(ids(&all), made);
        }
        assert_eq!(walk(&daemon, &format!("{path}&limit=2"), async || ()).await, made);
        let mark = format!("/api/v1/contact-events/{}/mark-delivered", made[1]);
        assert_eq!(super::ask::post(&daemon, &mark, &agent("acme")).await.status, 200);
        made.remove(1);
        assert_eq!(ids(&page(&daemon, &path).await), made);
    }
}
