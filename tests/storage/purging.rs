//! The purge: what expired strictly before the cutoff goes, and nothing else.

use timelined::domain::{ContactEvent, EventId, RunId, TenantId};
use timelined::storage::{Fence, Idempotency, Recording, StorageError, View};

use crate::support::builders::*;
use crate::support::database::Database;

fn expiring(number: u64, minute: i64) -> timelined::domain::NewContactEvent {
    event().id(id(number)).expires_at(t0() + minutes(minute))
}

fn ids(events: &[ContactEvent]) -> Vec<EventId> {
    events.iter().map(|event| event.id).collect()
}

async fn left(db: &Database, tenant: &TenantId) -> Vec<String> {
    let sql = format!(
        "select cast(id as text) from contact_events where tenant_id = '{tenant}' order by id"
    );
    db.texts(&sql).await.into_iter().flatten().collect()
}

fn texts(numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    numbers
        .into_iter()
        .map(|number| id(number).to_string())
        .collect()
}

on_both_engines! {
    async fn the_cutoff_is_strict_to_the_microsecond(db) {
        let cutoff = t0() + hours(1);
        db.given(&acme(), [
            event().id(id(1)).expires_at(cutoff - MICRO).recorded(),
            event().id(id(2)).expires_at(cutoff).recorded(),
            event().id(id(3)).expires_at(cutoff + MICRO).recorded(),
            event().id(id(4)).recorded(),
        ]).await;
        assert_eq!(ids(&db.events.find_expired_before(&acme(), cutoff, 10).await.unwrap()), [id(1)]);
        assert_eq!(db.events.count_expired_before(&acme(), cutoff).await.unwrap(), 1);
        assert_eq!(db.events.delete_expired_before(&acme(), cutoff, 10, None).await.unwrap(), 1);
        assert_eq!(left(db, &acme()).await, texts(2..=4));
        assert_eq!(db.events.delete_expired_before(&acme(), cutoff, 10, None).await.unwrap(), 0);
        assert_eq!(db.events.delete_expired_before(&acme(), cutoff + MICRO, 10, None).await.unwrap(), 1);
    }

    async fn what_never_expires_stays_for_ever(db) {
        db.given(&acme(), [event().id(id(1)).recorded()]).await;
        let far = "9999-12-31T00:00:00Z".parse().unwrap();
        assert_eq!(db.events.delete_expired_before(&acme(), far, 10, None).await.unwrap(), 0);
        assert_eq!(db.events.count_expired_before(&acme(), far).await.unwrap(), 0);
        assert_eq!(db.events.expiring_tenants().await.unwrap(), []);
    }

    async fn the_purge_goes_in_steps_first_expired_first(db) {
        // The ids and the order of recording do not follow the expiry.
        let given = (1..=20_u64).map(|n| {
            expiring(n, i64::try_from((n * 7) % 20).unwrap() + 1).recorded()
        });
        db.given(&acme(), given).await;
        let cutoff = t0() + minutes(16);
        let mut expected: Vec<u64> = (1..=20).filter(|n| (n * 7) % 20 < 15).collect();
        expected.sort_by_key(|n| (n * 7) % 20);
        let found = db.events.find_expired_before(&acme(), cutoff, 100).await.unwrap();
        assert_eq!(ids(&found), expected.iter().copied().map(id).collect::<Vec<_>>());
        let found = db.events.find_expired_before(&acme(), cutoff, 4).await.unwrap();
        assert_eq!(ids(&found), expected[..4].iter().copied().map(id).collect::<Vec<_>>());
        assert_eq!(db.events.count_expired_before(&acme(), cutoff).await.unwrap(), 15);
        assert_eq!(db.events.delete_expired_before(&acme(), cutoff, 4, None).await.unwrap(), 4);
        for gone in &expected[..4] {
            assert_eq!(db.events.find_by_id(&acme(), id(*gone)).await.unwrap(), None);
        }
        assert_eq!(db.events.count_expired_before(&acme(), cutoff).await.unwrap(), 11);
        let mut deleted = 4;
        loop {
            match db.events.delete_expired_before(&acme(), cutoff, 4, None).await.unwrap() {
                0 => break,
                count => deleted += count,
            }
        }
        assert_eq!(deleted, 15);
        assert_eq!(left(db, &acme()).await.len(), 5);
    }

    async fn a_purge_with_limit_zero_deletes_nothing(db) {
        db.given(&acme(), [expiring(1, 1).recorded()]).await;
        assert_eq!(db.events.delete_expired_before(&acme(), t0() + hours(1), 0, None).await.unwrap(), 0);
        assert_eq!(db.events.find_expired_before(&acme(), t0() + hours(1), 0).await.unwrap(), []);
    }

    async fn the_purge_of_one_tenant_leaves_the_others_alone(db) {
        for tenant in [acme(), globex()] {
            let given = (1..=3).map(|n| expiring(n, 1).realtime().record(&tenant, t0()).unwrap());
            db.given(&tenant, given).await;
            db.events.mark_read(&tenant, &[id(1)], None, &subject("s"), View::everything(t0())).await.unwrap();
            db.events.mark_delivered(&tenant, None, &[id(2)], None, &subject("s"), t0()).await.unwrap();
        }
        assert_eq!(db.events.delete_expired_before(&acme(), t0() + hours(1), 100, None).await.unwrap(), 3);
        assert_eq!(left(db, &acme()).await, Vec::<String>::new());
        assert_eq!(left(db, &globex()).await, texts(1..=3));
        for (table, count) in [("event_outbox", 2), ("event_reads", 1), ("event_deliveries", 1)] {
            assert_eq!(db.count(&format!("{table} where tenant_id = 'acme'")).await, 0, "{table}");
            assert_eq!(db.count(&format!("{table} where tenant_id = 'globex'")).await, count, "{table}");
        }
    }

    async fn a_purged_event_takes_its_receipts_and_its_wait_with_it(db) {
        let given = [expiring(1, 1), expiring(2, 1), expiring(3, 1), expiring(4, 100)];
        db.given(&acme(), given.map(|event| event.realtime().recorded())).await;
        let all = [1, 2, 3, 4].map(id);
        db.events.mark_read(&acme(), &all, None, &subject("ann"), View::everything(t0())).await.unwrap();
        db.events.mark_read(&acme(), &all, None, &subject("bob"), View::everything(t0())).await.unwrap();
        db.events.mark_delivered(&acme(), None, &[id(1)], None, &subject("s"), t0()).await.unwrap();
        let now = t0() + hours(1);
        db.events.expire_undelivered(now, 1).await.unwrap();
        assert_eq!(db.events.delete_expired_before(&acme(), now, 100, None).await.unwrap(), 3);
        assert_eq!(db.count("event_reads").await, 2);
        assert_eq!(db.count("event_deliveries").await, 0);
        assert_eq!(db.count("event_outbox").await, 1);
        // A purge is no single delete: the ledger of deletions is the job's.
        assert_eq!(db.count("audit_log").await, 0);
    }

    async fn a_large_purge_goes_in_one_statement(db) {
        db.given(&acme(), (1..=3000).map(|n| expiring(n, 1).realtime().recorded())).await;
        assert_eq!(db.events.delete_expired_before(&acme(), t0() + hours(1), 2500, None).await.unwrap(), 2500);
        assert_eq!(db.count("contact_events").await, 500);
        assert_eq!(db.count("event_outbox").await, 500);
    }

    async fn the_tenants_with_an_expiry_are_named_in_order_each_once(db) {
        for name in ["zeta", "acme", "mid", "Ünal", "never"] {
            let tenant = TenantId::new(name).unwrap();
            let given = (1..=3).map(|n| {
                if name == "never" { event().id(id(n)) } else { expiring(n, 1) }.record(&tenant, t0()).unwrap()
            });
            db.given(&tenant, given).await;
        }
        let tenants = db.events.expiring_tenants().await.unwrap();
        assert_eq!(tenants.iter().map(TenantId::as_str).collect::<Vec<_>>(), ["acme", "mid", "zeta", "Ünal"]);
    }

    async fn an_expired_event_stays_until_the_purge_and_is_found_by_its_id(db) {
        db.given(&acme(), [expiring(1, 1).recorded()]).await;
        assert!(db.events.find_by_id(&acme(), id(1)).await.unwrap().is_some());
        assert_eq!(db.events.expire_undelivered(t0() + hours(1), 100).await.unwrap(), 0);
        assert_eq!(left(db, &acme()).await, texts([1]));
    }

    async fn a_run_that_was_taken_over_deletes_nothing_more(db) {
        db.given(&acme(), (1..=6).map(|n| expiring(n, 1).realtime().recorded())).await;
        for key in ["a", "b", "c", "d"] {
            let recording = Recording {
                event: event().recorded(),
                idempotency: Some(Idempotency { key: key.to_owned(), body_hash: [7; 32] }),
            };
            db.events.save(&acme(), vec![recording]).await.unwrap();
        }
        let run = RunId::generate(t0());
        let at = db.either("0", "now()");
        db.execute(&format!(
            "insert into job_runs (id, job, scheduled_at, trigger, state, fence)
             values ('{run}', 'purge-expired', {at}, 'schedule', 'running', 3)"
        )).await.unwrap();
        let ours = Some(Fence { run, number: 3 });
        let later = t0() + hours(1);
        let delete = async |fence| db.events.delete_expired_before(&acme(), later, 2, fence).await;
        let forget = async |fence| db.events.delete_idempotency_before(&acme(), later, 2, fence).await;
        assert_eq!(delete(ours).await.unwrap(), 2);
        assert_eq!(forget(ours).await.unwrap(), 2);

        let former = Some(Fence { run, number: 2 });
        let unknown = Some(Fence { run: RunId::generate(t0()), number: 3 });
        for fence in [former, unknown] {
            assert!(matches!(delete(fence).await, Err(StorageError::Fenced)));
            assert!(matches!(forget(fence).await, Err(StorageError::Fenced)));
        }
        db.execute("update job_runs set state = 'failed'").await.unwrap();
        assert!(matches!(delete(ours).await, Err(StorageError::Fenced)));
        assert!(matches!(forget(ours).await, Err(StorageError::Fenced)));
        assert_eq!(left(db, &acme()).await.len(), 4 + 4);
        assert_eq!(db.count("event_outbox").await, 4);
        assert_eq!(db.count("idempotency_keys").await, 2);

        // Nobody else can have a purge by hand.
        assert_eq!(delete(None).await.unwrap(), 2);
        assert_eq!(forget(None).await.unwrap(), 2);
    }
}
