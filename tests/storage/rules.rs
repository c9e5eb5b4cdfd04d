//! What the schema itself promises to other programs that speak SQL: defaults, checks, the trigger;
//! and what becomes of a row that breaks the rules all the same.

use chrono::{DateTime, TimeDelta, Utc};
use timelined::domain::{Audience, Category, Delivery, Priority, Source, Visibility, event_types};
use timelined::storage::postgres::PgStorage;
use timelined::storage::{Filter, Page, Storage, View, unreadable_rows};
use tokio::sync::Mutex;

use crate::support::builders::*;
use crate::support::database::{Database, Engine};

/// Inserts an event with the required columns, each replaced or joined by `columns`, whose values
/// are SQL expressions.
async fn insert(db: &Database, columns: &[(&str, &str)]) -> Result<u64, sqlx::Error> {
    let contact = format!("'{}'", contact(1));
    let required = [
        ("tenant_id", "'acme'"),
        ("contact_id", contact.as_str()),
        ("event_type", "'note_added'"),
        ("category", "'note'"),
        ("source", "'agent'"),
    ];
    let mut row: Vec<(&str, &str)> = required
        .into_iter()
        .filter(|(name, _)| !columns.iter().any(|(n, _)| n == name))
        .collect();
    row.extend(columns);
    let (names, values): (Vec<&str>, Vec<&str>) = row.into_iter().unzip();
    db.execute(&format!(
        "insert into contact_events ({}) values ({})",
        names.join(", "),
        values.join(", ")
    ))
    .await
}

/// The machine's clock, which both engines' defaults read too.
fn machine_now() -> DateTime<Utc> {
    use timelined::domain::{Clock, SystemClock};
    SystemClock.now()
}

async fn only_event(db: &Database) -> timelined::domain::ContactEvent {
    let slice = db
        .events
        .find_by_contact(&acme(), contact(1), Page::first(10))
        .await
        .unwrap();
    assert_eq!((slice.events.len(), slice.next), (1, None));
    slice.events.into_iter().next().unwrap()
}

/// The count of unreadable rows is the process's: cases that look at it take turns.
static UNREADABLE: Mutex<()> = Mutex::const_new(());

/// Makes the rules of the schema sleep while `statements` run.
async fn break_the_rules(db: &Database, statements: &str) {
    match db.engine {
        Engine::Sqlite => {
            let sql = format!(
                "pragma ignore_check_constraints = on; {statements}; pragma ignore_check_constraints = off"
            );
            db.execute(&sql).await.unwrap();
        }
        Engine::Postgres => {
            db.execute("alter table contact_events drop constraint contact_events_category_check")
                .await
                .unwrap();
            db.execute(statements).await.unwrap();
        }
    }
}

on_both_engines! {
    async fn the_required_columns_alone_make_an_event(db) {
        let before = machine_now();
        insert(db, &[]).await.unwrap();
        let (event, after) = (only_event(db).await, machine_now());
        assert_eq!(event.id.uuid().get_version_num(), 7);
        assert_eq!(event.id.uuid().get_variant(), uuid::Variant::RFC4122);
        let slack = TimeDelta::milliseconds(5);
        for time in [event.occurred_at, event.created_at] {
            assert!(before - slack <= time && time <= after + slack, "{before} {time} {after}");
        }
        let (seconds, nanos) = event.id.uuid().get_timestamp().unwrap().to_unix();
        let made_at = DateTime::<Utc>::from_timestamp(i64::try_from(seconds).unwrap(), nanos).unwrap();
        assert!(before - slack <= made_at && made_at <= after + slack, "{before} {made_at} {after}");
        assert_eq!(event.priority, Priority::Normal);
        assert_eq!(event.visibility, Visibility::default());
        assert_eq!((event.payload.as_str(), event.metadata.as_str()), ("{}", "{}"));
        assert_eq!((event.delivery, event.read_at), (Delivery::NotRealtime, None));
        assert_eq!((event.session_id, event.triggered_by, event.expires_at), (None, None, None));
        assert_eq!((event.title, event.description, event.integration_source), (None, None, None));
        assert_eq!(db.count("event_outbox").await, 0);
    }

    async fn ids_that_the_database_makes_are_all_different_uuids_of_version_7(db) {
        for _ in 0..50 {
            insert(db, &[]).await.unwrap();
        }
        let ids: Vec<String> = db.texts("select cast(id as text) from contact_events order by seq").await.into_iter().flatten().collect();
        let mut distinct = ids.clone();
        distinct.sort();
        distinct.dedup();
        assert_eq!(distinct.len(), 50);
        for id in ids {
            let id: timelined::domain::EventId = id.parse().unwrap();
            assert_eq!((id.uuid().get_version_num(), id.uuid().get_variant()), (7, uuid::Variant::RFC4122));
        }
    }

    async fn the_trigger_puts_a_realtime_event_into_the_outbox(db) {
        insert(db, &[("is_realtime", db.flag(true))]).await.unwrap();
        let event = only_event(db).await;
        assert_eq!(event.delivery, Delivery::Pending);
        let found = db.events.find_undelivered_realtime(&acme(), &[contact(1)], [0; 4], t0(), 10).await.unwrap().events;
        assert_eq!((found.len(), found[0].rank, &found[0].event), (1, 2, &event));
        assert_eq!(db.texts("select audience from event_outbox").await, [Some("agent".to_owned())]);
    }

    async fn the_trigger_takes_rank_audience_and_expiry_from_the_event(db) {
        let (created, expires) = (db.at(t0()), db.at(t0() + hours(1)));
        for (priority, rank) in [("'urgent'", 0), ("'high'", 1), ("'normal'", 2), ("'low'", 3)] {
            db.execute("delete from event_outbox").await.unwrap();
            insert(db, &[
                ("is_realtime", db.flag(true)), ("priority", priority), ("visible_to_client", db.flag(true)),
                ("created_at", &created), ("occurred_at", &created), ("expires_at", &expires),
            ]).await.unwrap();
            let row = format!("event_outbox where rank = {rank} and audience = 'client' and occurred_at = {created} and expires_at = {expires}");
            assert_eq!(db.count(&row).await, 1, "{priority}");
        }
    }

    async fn the_trigger_leaves_out_what_nobody_sees_or_waits_for(db) {
        let (yes, no) = (db.flag(true), db.flag(false));
        insert(db, &[("is_realtime", no), ("visible_to_client", yes)]).await.unwrap();
        insert(db, &[("is_realtime", yes), ("visible_to_client", no), ("visible_to_agent", no)]).await.unwrap();
        assert_eq!(db.count("event_outbox").await, 0);
    }

    async fn the_trigger_serves_every_row_of_a_statement_that_inserts_many(db) {
        let flag = db.flag(true);
        let series = db.either(
            "(with recursive n (value) as (select 1 union all select value + 1 from n where value < 500) select value from n)",
            "generate_series(1, 500)",
        );
        db.execute(&format!(
            "insert into contact_events (tenant_id, contact_id, event_type, category, source, is_realtime)
             select 'acme', '{}', 'note_added', 'note', 'agent', {flag} from {series} s", contact(1)
        ).replace("'0190", db.either("'0190", "uuid '0190"))).await.unwrap();
        assert_eq!(db.count("event_outbox").await, 500);
    }

    /// Each rule of the contract, broken by plain SQL.
    async fn the_schema_refuses_a_row_that_breaks_a_rule(db) {
        let text = |character: &str, count: usize| format!("'{}'", character.repeat(count));
        let nul = format!("'a' || {} || 'b'", db.either("char(0)", "chr(0)"));
        let object = |bytes: usize| format!("'{{\"k\":\"{}\"}}'", "x".repeat(bytes - 8));
        let created = db.at(t0());
        let nil = "'00000000-0000-0000-0000-000000000000'".to_owned();
        let q = |text: &str| format!("'{text}'");
        let mut rules: Vec<(&str, Vec<(&str, String)>)> = Vec::new();
        let mut refuse = |column, values: Vec<String>| {
            rules.extend(values.into_iter().map(|value| (column, vec![(column, value)])));
        };
        refuse("tenant_id", vec!["null".to_owned(), q(""), text("é", 256), nul.clone()]);
        refuse("id", vec!["null".to_owned(), nil.clone(), q("x"), q("0190b5f0-7c1e-7d3a-8f00-00000000000g")]);
        refuse("contact_id", vec!["null".to_owned(), nil.clone(), q(""), q("0190b5f0-7c1e-7d3a-8f00-00000000001")]);
        refuse("session_id", vec![nil.clone(), q("session")]);
        refuse("triggered_by", vec![nil.clone(), q("agent")]);
        refuse("event_type", vec![
            "null".to_owned(), q(""), q("Note"), q("9a"), q("_a"), q("a-b"), q("á"), q("a b"), q("a\n"), text("a", 65), nul.clone(),
            q("noteA"), q("note_añ"),
        ]);
        refuse("category", vec!["null".to_owned(), q("notes"), q("Note"), q(""), nul.clone()]);
        refuse("priority", vec!["null".to_owned(), q("urgentest"), q("2")]);
        refuse("source", vec!["null".to_owned(), q("client"), q("SYSTEM"), q("integration")]);
        refuse("title", vec![text("é", 501), nul.clone()]);
        refuse("description", vec![text("x", 20_001), nul.clone()]);
        refuse("integration_source", vec![text("é", 256), nul.clone()]);
        refuse("payload", vec![
            "null".to_owned(), q("[]"), q("null"), q("1"), q("\"{}\""), q(""), q("{"), q("{\"a\":1,}"), q("{a:1}"),
            q("{\"a\":\"\\u0000\"}"), q("{\"a\":[\"\\\\\\u0000\"]}"), q("{\"\\u0000\":1}"), q("{\"a\":\"\n\"}"),
            object(65_537), format!("'{{\"k\":\"{}\"}}'", "é".repeat(32_765)),
        ]);
        refuse("metadata", vec!["null".to_owned(), q("[]"), q("{\"a\":\"\\u0000\"}"), object(16_385)]);
        refuse("is_realtime", vec!["null".to_owned(), db.either("2", "'perhaps'").to_owned()]);
        refuse("visible_to_client", vec!["null".to_owned(), db.either("-1", "'perhaps'").to_owned()]);
        refuse("visible_to_agent", vec!["null".to_owned(), db.either("'yes'", "'perhaps'").to_owned()]);
        let mut refuse_times = |column, values: Vec<String>| {
            rules.extend(values.into_iter().map(|value| {
                let mut columns = vec![(column, value)];
                if column != "created_at" {
                    columns.push(("created_at", created.clone()));
                }
                if column != "occurred_at" {
                    columns.push(("occurred_at", created.clone()));
                }
                (column, columns)
            }));
        };
        refuse_times("expires_at", vec![
            created.clone(), db.at(t0() - MICRO),
            db.either("253402300800000000", "'10000-01-01Z'").to_owned(),
        ]);
        refuse_times("occurred_at", vec![
            "null".to_owned(), db.at(t0() + minutes(5) + MICRO),
            db.either("-62135596800000001", "'0001-12-31Z BC'").to_owned(),
        ]);
        refuse_times("created_at", vec!["null".to_owned(), db.either("253402300800000000", "'infinity'").to_owned()]);
        rules.push(("source", vec![("source", q("integration")), ("integration_source", q(""))]));

        let mut taken = Vec::new();
        for (column, columns) in &rules {
            let columns: Vec<(&str, &str)> = columns.iter().map(|(name, value)| (*name, value.as_str())).collect();
            if insert(db, &columns).await.is_ok() {
                taken.push(format!("{column}: {:.60}", columns[0].1));
            }
        }
        assert_eq!(taken, Vec::<String>::new());
        assert_eq!(db.count("contact_events").await, 0);
    }

    async fn the_schema_takes_what_stays_just_within_the_rules(db) {
        let text = |character: &str, count: usize| format!("'{}'", character.repeat(count));
        let object = |bytes: usize| format!("'{{\"k\":\"{}\"}}'", "x".repeat(bytes - 8));
        let created = db.at(t0());
        for columns in [
            vec![("tenant_id", text("é", 255))],
            vec![("event_type", text("a", 64))],
            vec![("event_type", "'a9_.'".to_owned())],
            vec![("title", text("é", 500)), ("description", text("😀", 20_000))],
            vec![("title", "''".to_owned()), ("description", "''".to_owned())],
            vec![("integration_source", text("é", 255)), ("source", "'integration'".to_owned())],
            vec![("payload", object(65_536)), ("metadata", object(16_384))],
            vec![("payload", r#"'{"a":"\\u0000","b":"\\\\u0000"}'"#.to_owned())],
            vec![("created_at", created.clone()), ("occurred_at", db.at(t0() + minutes(5)))],
            vec![("created_at", created.clone()), ("occurred_at", created.clone()), ("expires_at", db.at(t0() + MICRO))],
            vec![("occurred_at", db.at("0001-01-01T00:00:00Z".parse().unwrap()))],
        ] {
            let columns: Vec<(&str, &str)> = columns.iter().map(|(name, value)| (*name, value.as_str())).collect();
            insert(db, &columns).await.unwrap_or_else(|error| panic!("{} {:.60}: {error}", columns[0].0, columns[0].1));
        }
        let before = unreadable_rows();
        let slice = db.events.find_by_contact(&acme(), contact(1), Page::first(100)).await.unwrap();
        assert_eq!(slice.events.len(), 10);
        assert!(unreadable_rows() >= before);
    }

    async fn an_id_is_taken_once_per_tenant_whoever_inserts_it(db) {
        let given = format!("'{}'", id(1));
        insert(db, &[("id", &given)]).await.unwrap();
        assert!(insert(db, &[("id", &given)]).await.is_err());
        insert(db, &[("id", &given), ("tenant_id", "'globex'")]).await.unwrap();
        let saved = db.events.save(&acme(), vec![plain(event().id(id(1)).recorded())]).await.unwrap();
        assert_eq!(saved, [timelined::storage::Saved::IdTaken]);
    }

    async fn every_predefined_type_and_every_member_passes_the_checks(db) {
        for kind in event_types::ALL {
            insert(db, &[("event_type", &format!("'{kind}'"))]).await.unwrap();
        }
        for category in Category::ALL {
            insert(db, &[("category", &format!("'{category}'"))]).await.unwrap();
        }
        for priority in Priority::ALL {
            insert(db, &[("priority", &format!("'{priority}'"))]).await.unwrap();
        }
        for source in Source::ALL {
            insert(db, &[("source", &format!("'{source}'")), ("integration_source", "'x'")]).await.unwrap();
        }
        assert_eq!(db.count("contact_events").await, 43);
    }

    async fn a_row_that_cannot_be_read_is_passed_over_and_counted_once(db) {
        let _turn = UNREADABLE.lock().await;
        db.given(&acme(), (1..=6).map(|n| event().id(id(n)).session(session(1)).realtime().expires_at(t0() + hours(1)).recorded())).await;
        let bad = timelined::domain::EventId::generate(machine_now());
        break_the_rules(db, &format!(
            "update contact_events set category = 'nonsense' where tenant_id = 'acme' and id = '{}';
             update contact_events set category = 'gossip', id = '{bad}' where tenant_id = 'acme' and id = '{}'", id(2), id(4)
        )).await;
        db.execute(&format!("update event_outbox set event_id = '{bad}' where event_id = '{}'", id(4))).await.unwrap();
        let before = unreadable_rows();
        let view = View::of(Audience::Agent, t0());
        let slice = db.events.find_by_contact_visible_to(&acme(), contact(1), &Filter::default(), view, Page::first(10)).await;
        assert_eq!(slice.unwrap().events.len(), 4);
        let slice = db.events.find_by_session(&acme(), session(1), None, view, Page::first(10)).await;
        assert_eq!(slice.unwrap().events.len(), 4);
        let slice = db.events.find_undelivered_for_contact(&acme(), contact(1), view, Page::first(10)).await;
        assert_eq!(slice.unwrap().events.len(), 4);
        let backlog = db.events.find_undelivered_realtime(&acme(), &[contact(1)], [0; 4], t0(), 10).await;
        assert_eq!(backlog.unwrap().events.len(), 4);
        assert_eq!(db.events.find_by_id(&acme(), bad).await.unwrap(), None);
        // Counted by its id, which the other engine's case may have counted before.
        let counted = unreadable_rows() - before;
        assert!((1..=2).contains(&counted), "{counted}");
        db.events.find_by_contact(&acme(), contact(1), Page::first(10)).await.unwrap();
        assert_eq!(unreadable_rows() - before, counted);
        // What does not read it is not stopped by it.
        assert_eq!(db.events.delete_expired_before(&acme(), t0() + hours(2), 10, None).await.unwrap(), 6);
    }

    async fn pages_go_on_behind_rows_that_cannot_be_read(db) {
        let _turn = UNREADABLE.lock().await;
        db.given(&acme(), (1..=12).map(|n| event().id(id(n)).session(session(1)).recorded())).await;
        let bad: Vec<String> = [1, 4, 5, 6, 7, 12].map(|n| format!("'{}'", id(n))).to_vec();
        break_the_rules(db, &format!(
            "update contact_events set category = 'nonsense' where tenant_id = 'acme' and id in ({})", bad.join(", ")
        )).await;
        for limit in [1, 2, 3, 20] {
            let (mut found, mut page) = (Vec::new(), Page::first(limit));
            loop {
                let slice = db.events.find_by_contact(&acme(), contact(1), page).await.unwrap();
                found.extend(slice.events.iter().map(|event| event.id));
                let Some(key) = slice.next else { break };
                page = Page::after(limit, key);
            }
            assert_eq!(found, [11, 10, 9, 8, 3, 2].map(id), "limit {limit}");
        }
    }

    async fn a_text_that_is_no_text_is_passed_over(db) {
        // PostgreSQL checks the encoding itself.
        if db.engine == Engine::Postgres {
            assert!(insert(db, &[("title", "convert_from('\\xff', 'UTF8')")]).await.is_err());
            return;
        }
        let _turn = UNREADABLE.lock().await;
        db.given(&acme(), [event().id(id(1)).recorded()]).await;
        insert(db, &[("title", "cast(x'61ff62' as text)")]).await.unwrap();
        let before = unreadable_rows();
        assert_eq!(only_event(db).await.id, id(1));
        assert_eq!(unreadable_rows(), before + 1);
    }

    async fn other_programs_read_delivery_and_reading_from_the_view(db) {
        db.given(&acme(), [event().id(id(1)).realtime().recorded(), event().id(id(2)).realtime().recorded()]).await;
        db.events.mark_delivered(&acme(), None, &[id(1)], None, &subject("s"), t0() + MICRO).await.unwrap();
        db.events.mark_read(&acme(), &[id(1)], None, &subject("s"), View::everything(t0() + MICRO * 2)).await.unwrap();
        let row = format!(
            "timeline_events where id = '{}' and delivered = {yes} and read = {yes} and delivered_at = {} and read_at = {}",
            id(1), db.at(t0() + MICRO), db.at(t0() + MICRO * 2), yes = db.flag(true)
        );
        assert_eq!(db.count(&row).await, 1);
        let other = format!("timeline_events where id = '{}' and delivered = {no} and read = {no}", id(2), no = db.flag(false));
        assert_eq!(db.count(&other).await, 1);
    }

    async fn an_insert_from_any_search_path_fills_the_outbox_of_its_own_schema(db) {
        if db.engine == Engine::Sqlite {
            // It has no schemas.
            return;
        }
        db.execute("create schema crm").await.unwrap();
        let url = format!("{}?options=-c%20search_path%3Dcrm", db.url().await);
        let crm = Storage::postgres(PgStorage::open(&url).await.unwrap());
        crm.migrate().await.unwrap();
        crm.check_schema().await.unwrap();
        for path in ["public", "pg_catalog"] {
            db.execute(&format!(
                "set search_path = {path};
                 insert into crm.contact_events (tenant_id, contact_id, event_type, category, source, is_realtime)
                 values ('acme', '{}', 'note_added', 'note', 'agent', true);
                 reset search_path",
                contact(1)
            )).await.unwrap();
        }
        assert_eq!(db.count("crm.event_outbox").await, 2);
        assert_eq!(db.count("public.event_outbox").await, 0);
        crm.close().await;
    }
}
