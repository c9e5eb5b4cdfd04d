//! Events delivered and acknowledged per second to 100 sockets, and how soon one is there.
//!
//! The reference is how many single rows the same engine marks delivered, each in a transaction of
//! its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::Mutex;

use crate::load::Client;
use crate::support::daemon::{TestDaemon, agent, eventually, service};
use crate::support::database::{Database, Engine};
use crate::support::socket::Socket;
use crate::{ENGINES, Row, daemon, quantile};

const SOCKETS: usize = 100;
const EVENTS: usize = 40_000;
const SINGLE_ROWS: usize = 2_000;
const SOON: usize = 300;

pub(crate) async fn run() {
    for (engine, name) in ENGINES {
        let db = Database::fresh(engine).await;
        let daemon = daemon(&db, &[]).await;
        let ours = throughput(&db, &daemon).await;
        let mut waits = latencies(&daemon).await;
        drop(daemon);
        let reference = single_rows(&db).await;
        Row::new(
            format!("{name}: events/s pushed to 100 sockets and acked"),
            format!("{ours:.0}"),
        )
        .beside(format!("single-row updates: {reference:.0}"))
        .is(format!("{:.1}", ours / reference))
        .print();
        let (middle, slow) = (quantile(&mut waits, 0.5), quantile(&mut waits, 0.99));
        Row::new(
            format!("{name}: create answered to frame received"),
            format!("{middle:.1} ms"),
        )
        .beside(format!("p99 {slow:.1} ms"))
        .at_most(middle, 50.0)
        .print();
        db.drop().await;
    }
}

fn contact(number: usize) -> String {
    format!("0190b5f0-0000-7000-8000-{number:012x}")
}

/// 100 sockets watch a contact each; another program inserts events of all of them in one
/// transaction. Counted from the first push to the last receipt.
async fn throughput(db: &Database, daemon: &TestDaemon) -> f64 {
    let first: Arc<Mutex<Option<Instant>>> = Arc::default();
    let mut sockets = Vec::new();
    for number in 0..SOCKETS {
        let (socket, _) =
            Socket::watching(&daemon.address, &agent("acme"), &[contact(number)]).await;
        sockets.push(socket);
    }
    let receivers: Vec<_> = sockets
        .into_iter()
        .map(|mut socket| {
            let first = first.clone();
            tokio::spawn(async move {
                for number in 0..EVENTS / SOCKETS {
                    let frame = socket.next_of("event").await;
                    if number == 0 {
                        first.lock().await.get_or_insert_with(Instant::now);
                    }
                    socket.ack(&[frame["event"]["id"].as_str().unwrap()]).await;
                }
                socket
            })
        })
        .collect();
    insert(db).await;
    let mut sockets = Vec::new();
    for receiver in receivers {
        sockets.push(receiver.await.unwrap());
    }
    eventually(
        "every event is recorded",
        Duration::from_mins(1),
        async || db.count("event_outbox").await == 0,
    )
    .await;
    let began = first.lock().await.expect("events came");
    EVENTS as f64 / began.elapsed().as_secs_f64()
}

async fn insert(db: &Database) {
    let columns = "insert into contact_events (tenant_id, contact_id, event_type, category, source, title, payload, is_realtime)";
    let sql = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 0 union all select i + 1 from n where i < {EVENTS} - 1)
             {columns} select 'acme', printf('0190b5f0-0000-7000-8000-%012x', i % {SOCKETS}), 'note_added', 'note', 'system',
                'Asked for a quote', '{{\"seats\":25}}', 1 from n"
        ),
        Engine::Postgres => format!(
            "{columns} select 'acme', ('0190b5f0-0000-7000-8000-' || lpad(to_hex(i % {SOCKETS}), 12, '0'))::uuid,
                'note_added', 'note', 'system', 'Asked for a quote', '{{\"seats\":25}}', true
             from generate_series(0, {EVENTS} - 1) i"
        ),
    };
    db.execute(&sql).await.unwrap();
}

/// Milliseconds from the answer of a create to its frame.
async fn latencies(daemon: &TestDaemon) -> Vec<f64> {
    let watched = contact(1);
    let (mut socket, _) = Socket::watching(
        &daemon.address,
        &agent("acme"),
        std::slice::from_ref(&watched),
    )
    .await;
    let mut client = Client::open(&daemon.address, &service("acme")).await;
    let path = format!("/api/v1/contacts/{watched}/events");
    let body = json!({ "event_type": "note_added", "category": "note", "source": "agent", "is_realtime": true });
    let mut waits = Vec::new();
    for _ in 0..SOON {
        let (status, _) = client.send("POST", &path, body.to_string()).await;
        assert_eq!(status, 201);
        let answered = Instant::now();
        let frame = socket.next_of("event").await;
        waits.push(answered.elapsed().as_secs_f64() * 1000.0);
        socket.ack(&[frame["event"]["id"].as_str().unwrap()]).await;
    }
    waits
}

/// What marking events delivered would cost row by row.
async fn single_rows(db: &Database) -> f64 {
    let create = "create table single_rows (id integer primary key, delivered boolean not null, delivered_at bigint)";
    db.execute(create).await.unwrap();
    let fill = match db.engine {
        Engine::Sqlite => format!(
            "with recursive n (i) as (select 1 union all select i + 1 from n where i < {SINGLE_ROWS})
             insert into single_rows select i, 0, null from n; pragma synchronous = full"
        ),
        Engine::Postgres => format!(
            "insert into single_rows select i, false, null from generate_series(1, {SINGLE_ROWS}) i"
        ),
    };
    db.execute(&fill).await.unwrap();
    let began = Instant::now();
    for id in 1..=SINGLE_ROWS {
        let sql =
            format!("update single_rows set delivered = true, delivered_at = 1 where id = {id}");
        db.execute(&sql).await.unwrap();
    }
    SINGLE_ROWS as f64 / began.elapsed().as_secs_f64()
}
