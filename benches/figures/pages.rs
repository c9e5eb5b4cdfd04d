//! A page of a long timeline, near its top and 100,000 events down.

use std::time::Instant;

use crate::load::Client;
use crate::support::daemon::service;
use crate::support::database::{Database, Engine};
use crate::{ENGINES, Row, daemon, median};

const CONTACT: &str = "0190b5f0-0000-7000-8000-000000000001";
const EVENTS: u32 = 110_000;
const DEEP: usize = 100_000;
const ASKED: usize = 300;

pub(crate) async fn run() {
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        fill(&db, EVENTS).await;
        let daemon = daemon(&db, &[]).await;
        let mut client = Client::open(&daemon.address, &service("acme")).await;
        let timeline = format!("/api/v1/contacts/{CONTACT}/events");
        let first = client.json("GET", &format!("{timeline}?limit=100")).await;
        let shallow = first["next_cursor"].as_str().unwrap().to_owned();
        let mut deep = shallow.clone();
        for _ in 0..(DEEP - 100) / 100 {
            let page = client
                .json("GET", &format!("{timeline}?limit=100&cursor={deep}"))
                .await;
            page["next_cursor"].as_str().unwrap().clone_into(&mut deep);
        }
        let (mut near, mut far) = (Vec::new(), Vec::new());
        for _ in 0..ASKED {
            for (cursor, times) in [(&shallow, &mut near), (&deep, &mut far)] {
                let path = format!("{timeline}?cursor={cursor}");
                let began = Instant::now();
                client.json("GET", &path).await;
                times.push(began.elapsed().as_secs_f64() * 1000.0);
            }
        }
        let (near, far) = (median(near), median(far));
        Row::new(
            format!("{name}: page of 50 at depth 100,000"),
            format!("{far:.2} ms"),
        )
        .beside(format!("at depth 100: {near:.2} ms"))
        .at_most(far / near, 1.5)
        .print();
        drop(daemon);
        db.drop().await;
    }
}

/// `events` of one contact, a minute apart.
pub(crate) async fn fill(db: &Database, events: u32) {
    let columns = "insert into contact_events (tenant_id, contact_id, event_type, category, source, title, description, payload, occurred_at)";
    let values = format!(
        "'acme', '{CONTACT}', 'note_added', 'note', 'agent', 'Asked for a quote, ' || i || ' seats',
         'Prefers to be called in the morning; the legal department has the draft.', '{{\"seats\":25,\"plan\":\"business\"}}'"
    );
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {events})
             {columns} select {values}, (cast(strftime('%s', 'now') as integer) - i * 60) * 1000000 from n"
        ),
        Engine::Postgres => format!(
            "{columns} select {values}, now() - i * interval '1 minute' from generate_series(1, {events}) i;
             analyze contact_events"
        ),
    };
    db.execute(&sql).await.unwrap();
}
