//! Who sees what: tenants, contacts, audiences, expiry.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use timelined::domain::ContactId;

use super::ask::{
    Answer, PATIENCE, assert_calm, daemon, delete, get, id_of, ids, now, post, post_json, record,
    send, timeline,
};
use crate::support::builders::{Record as _, acme, contact, days, event_of, id, session};
use crate::support::daemon::{TestDaemon, agent, client, eventually, service};

/// An export of acme that is done.
async fn exported(daemon: &TestDaemon, contact: ContactId, audience: &str) -> String {
    let path = format!("/api/v1/contacts/{contact}/exports");
    let body = json!({ "format": "csv", "audience": audience });
    let answer = post_json(daemon, &path, &service("acme"), &body).await;
    let href = answer.json()["href"].as_str().unwrap().to_owned();
    eventually("the export is done", PATIENCE, async || {
        get(daemon, &href, &service("acme")).await.json()["state"] == "done"
    })
    .await;
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// Every request that names an id, with these ids.
fn requests(
    daemon: &TestDaemon,
    token: &str,
    contact: ContactId,
    session: &str,
    event: &str,
    export: &str,
) -> Vec<RequestBuilder> {
    let gets = [
        timeline(contact),
        format!("{}?include_expired=false&limit=200", timeline(contact)),
        format!("/api/v1/sessions/{session}/events"),
        format!("/api/v1/contact-events/undelivered?contact_id={contact}"),
        format!("/api/v1/contact-events/{event}"),
        format!("/api/v1/exports/{export}"),
        format!("/api/v1/exports/{export}/file"),
    ];
    let posts = [
        format!("/api/v1/contact-events/{event}/mark-read"),
        format!("/api/v1/contact-events/{event}/mark-delivered"),
    ];
    let gets = gets.iter().map(|path| (Method::GET, path));
    let posts = posts.iter().map(|path| (Method::POST, path));
    let delete = format!("/api/v1/contact-events/{event}");
    gets.chain(posts)
        .chain([(Method::DELETE, &delete)])
        .map(|(method, path)| daemon.request(method, path, token))
        .collect()
}

/// All that acme can see of it.
async fn state_of_acme(daemon: &TestDaemon, contact: ContactId) -> Vec<Value> {
    let mut state = Vec::new();
    for path in [
        format!("{}?include_expired=true", timeline(contact)),
        format!("/api/v1/contact-events/undelivered?contact_id={contact}"),
        "/api/v1/exports".to_owned(),
    ] {
        let answer = get(daemon, &path, &service("acme")).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        state.push(answer.json());
    }
    state
}

on_both_engines! {
    async fn a_foreign_tenants_ids_answer_as_ids_that_are_not_there_and_nothing_changes(db) {
        let daemon = daemon(db).await;
        let (here, absent) = (contact(1), contact(404));
        let more = json!({
            "is_realtime": true, "visible_to_client": true, "session_id": session(1),
            "title": "of acme", "priority": "urgent",
        });
        let event = record(&daemon, here, more).await;
        let export = exported(&daemon, here, "client").await;
        let before = state_of_acme(&daemon, here).await;
        assert_eq!(before[0]["total"], 1);
        assert_eq!(ids(&before[1]), [id_of(&event)]);

        let foreign = [
            service("globex"),
            agent("globex"),
            client("globex", &[here, absent]),
            // Names are compared as they are.
            service("Acme"),
            service("acme "),
        ];
        for token in &foreign {
            let theirs = requests(&daemon, token, here, &session(1).to_string(), id_of(&event), &export);
            let nobodys = requests(
                &daemon, token, absent, &session(404).to_string(), &id(404).to_string(), &id(404).to_string(),
            );
            for (theirs, nobodys) in theirs.into_iter().zip(nobodys) {
                let what = format!("{theirs:?}");
                let (theirs, nobodys) = (send(theirs).await, send(nobodys).await);
                assert_eq!(theirs.status, nobodys.status, "{what}");
                assert_eq!(theirs.text, nobodys.text, "{what}");
                match theirs.status {
                    // Lists are empty.
                    200 => assert_eq!(theirs.json()["events"], json!([]), "{what}"),
                    // The role comes before the id.
                    403 => drop(theirs.problem(403, &what)),
                    _ => drop(theirs.problem(404, &what)),
                }
                assert!(!theirs.text.contains("of acme"), "{what}");
            }
        }
        for token in [service("globex"), agent("globex")] {
            let list = get(&daemon, "/api/v1/contact-events?category=note", &token).await.json();
            assert_eq!(list["events"], json!([]));
            let list = get(&daemon, "/api/v1/exports", &token).await.json();
            assert_eq!(list["exports"], json!([]));
        }
        assert_eq!(state_of_acme(&daemon, here).await, before);
        assert_calm(&daemon);
    }

    async fn the_same_ids_of_two_tenants_do_not_touch(db) {
        let daemon = daemon(db).await;
        let body = |title: &str| super::ask::body(json!({ "id": id(1), "title": title, "is_realtime": true }));
        for tenant in ["acme", "globex"] {
            let answer = post_json(&daemon, &timeline(contact(1)), &service(tenant), &body(tenant)).await;
            assert_eq!(answer.status, 201, "{}", answer.text);
        }
        let path = format!("/api/v1/contact-events/{}", id(1));
        let of = async |tenant: &str| get(&daemon, &path, &service(tenant)).await.json();
        assert_eq!(of("acme").await["title"], "acme");
        let before = of("globex").await;
        assert_eq!(before["title"], "globex");
        for mark in ["mark-read", "mark-delivered"] {
            let answer = post(&daemon, &format!("{path}/{mark}"), &service("acme")).await;
            assert_eq!(answer.status, 200, "{}", answer.text);
        }
        assert_eq!(of("globex").await, before);
        assert_eq!(delete(&daemon, &path, &service("acme")).await.status, 204);
        assert_eq!(of("globex").await, before);
        let page = get(&daemon, &timeline(contact(1)), &service("globex")).await.json();
        assert_eq!(page["total"], 1);
    }

    async fn a_reader_sees_its_contacts_and_its_audience_and_nothing_else_exists(db) {
        let daemon = daemon(db).await;
        let visible = |client: bool, agent: bool| json!({
            "visible_to_client": client, "visible_to_agent": agent, "is_realtime": true, "session_id": session(1),
        });
        let mut events = Vec::new();
        for (of, client, agent) in [
            (1, true, true), (1, true, false), (1, false, true), (1, false, false), (2, true, true),
        ] {
            let event = record(&daemon, contact(of), visible(client, agent)).await;
            events.push(id_of(&event).to_owned());
        }
        let readers = [
            ("client", client("acme", &[contact(1)]), vec![0, 1]),
            ("agent", agent("acme"), vec![0, 2, 4]),
            ("service", service("acme"), vec![0, 1, 2, 3, 4]),
        ];
        for (role, token, sees) in &readers {
            let seen = |indexes: &mut dyn Iterator<Item = &usize>| -> Vec<String> {
                indexes.map(|index| events[*index].clone()).collect()
            };
            let of_contact: Vec<String> = seen(&mut sees.iter().rev().filter(|index| **index < 4));
            let page = get(&daemon, &timeline(contact(1)), token).await.json();
            assert_eq!(ids(&page), of_contact, "{role}");
            assert_eq!(page["total"], of_contact.len(), "{role}");
            let page = get(&daemon, &format!("/api/v1/sessions/{}/events", session(1)), token).await.json();
            assert_eq!(ids(&page), seen(&mut sees.iter()), "{role}");
            let path = format!("/api/v1/contact-events/undelivered?contact_id={}", contact(1));
            let waiting = ids(&get(&daemon, &path, token).await.json());
            // What nobody sees waits for nobody.
            let expected: Vec<String> = seen(&mut sees.iter().filter(|index| **index < 3));
            assert_eq!(waiting, expected, "{role}");
            if *role != "client" {
                let page = get(&daemon, "/api/v1/contact-events?category=note", token).await.json();
                let mut listed = ids(&page);
                listed.sort();
                assert_eq!(listed, seen(&mut sees.iter()), "{role}");
            }
            for (index, event) in events.iter().enumerate() {
                let path = format!("/api/v1/contact-events/{event}");
                let answers = [
                    get(&daemon, &path, token).await,
                    post(&daemon, &format!("{path}/mark-read"), token).await,
                ];
                for answer in answers {
                    if sees.contains(&index) {
                        assert_eq!(answer.status, 200, "{role} {index}: {}", answer.text);
                    } else {
                        answer.problem(404, &format!("{role} {index}"));
                    }
                }
                if !sees.contains(&index) {
                    let answer = post(&daemon, &format!("{path}/mark-delivered"), token).await;
                    answer.problem(404, &format!("{role} {index} mark-delivered"));
                }
            }
        }
        // Another contact of its tenant is none for a client.
        let stranger = client("acme", &[contact(1), contact(3)]);
        for path in [
            timeline(contact(2)),
            format!("/api/v1/contact-events/undelivered?contact_id={}", contact(2)),
        ] {
            get(&daemon, &path, &stranger).await.problem(404, &path);
        }
        assert_calm(&daemon);
    }

    async fn an_event_for_a_client_is_not_an_agents_to_deliver(db) {
        let daemon = daemon(db).await;
        let event = record(&daemon, contact(1), json!({ "is_realtime": true, "visible_to_client": true })).await;
        let path = format!("/api/v1/contact-events/{}", id_of(&event));
        let mark = format!("{path}/mark-delivered");
        post(&daemon, &mark, &agent("acme")).await.problem(403, "an agent");
        let now = get(&daemon, &path, &service("acme")).await.json();
        assert_eq!(now["delivered"], false);
        let first = post(&daemon, &mark, &client("acme", &[contact(1)])).await;
        assert_eq!(first.status, 200, "{}", first.text);
        let first = first.json();
        assert_eq!(first["success"], true);
        assert_eq!(first["event_id"], event["id"]);
        // A repeat answers the first time, whoever asks.
        assert_eq!(post(&daemon, &mark, &service("acme")).await.json(), first);
        let now = get(&daemon, &path, &service("acme")).await.json();
        assert_eq!((&now["delivered"], &now["delivered_at"]), (&json!(true), &first["delivered_at"]));
    }

    async fn an_expired_event_is_hidden_from_client_and_agent_and_shown_to_a_service_that_asks(db) {
        let here = contact(1);
        let expired = event_of(here)
            .session(session(1))
            .visible_to_client(true)
            .realtime()
            .expires_at(now() - days(1))
            .recorded_at(now() - days(2));
        let gone = expired.id.to_string();
        db.given(&acme(), [expired]).await;
        let daemon = daemon(db).await;
        let lasting = record(&daemon, here, json!({
            "session_id": session(1), "visible_to_client": true, "expires_at": super::ask::from_now(days(1)),
        })).await;
        let lists = [
            timeline(here),
            format!("/api/v1/sessions/{}/events", session(1)),
            "/api/v1/contact-events?category=note".to_owned(),
            "/api/v1/contact-events?event_type=note_added".to_owned(),
        ];
        let path = format!("/api/v1/contact-events/{gone}");
        let waiting = format!("/api/v1/contact-events/undelivered?contact_id={here}");
        for (role, token) in [
            ("client", client("acme", &[here])), ("agent", agent("acme")), ("service", service("acme")),
        ] {
            let mut lists = lists.iter();
            let may_list_types = role != "client";
            for list in lists.by_ref().take(if may_list_types { 4 } else { 2 }) {
                let page = get(&daemon, list, &token).await.json();
                assert_eq!(ids(&page), [id_of(&lasting)], "{role} {list}");
                if list == &timeline(here) {
                    assert_eq!(page["total"], 1, "{role}");
                }
                let mark = if list.contains('?') { '&' } else { '?' };
                let all: Answer = get(&daemon, &format!("{list}{mark}include_expired=true"), &token).await;
                if role == "service" {
                    assert_eq!(ids(&all.json()).len(), 2, "{list}");
                    assert!(ids(&all.json()).contains(&gone), "{list}");
                } else {
                    all.problem(400, list);
                }
            }
            assert_eq!(get(&daemon, &waiting, &token).await.json()["events"], json!([]), "{role}");
            let one = get(&daemon, &path, &token).await;
            let read = post(&daemon, &format!("{path}/mark-read"), &token).await;
            let delivered = post(&daemon, &format!("{path}/mark-delivered"), &token).await;
            if role == "service" {
                assert_eq!((one.status, read.status), (200, 200));
                // It is known to it, but too late.
                assert_eq!(delivered.problem(409, role)["type"], "urn:timelined:problem:expired");
            } else {
                for answer in [one, read, delivered] {
                    answer.problem(404, role);
                }
            }
        }
        let total = get(&daemon, &format!("{}?include_expired=true", timeline(here)), &service("acme")).await;
        assert_eq!(total.json()["total"], 2);
        assert_calm(&daemon);
    }

    async fn an_export_for_audit_does_not_exist_for_agents(db) {
        let daemon = daemon(db).await;
        let audit = exported(&daemon, contact(1), "audit").await;
        let plain = exported(&daemon, contact(1), "agent").await;
        for path in [format!("/api/v1/exports/{audit}"), format!("/api/v1/exports/{audit}/file")] {
            get(&daemon, &path, &agent("acme")).await.problem(404, &path);
            assert_eq!(get(&daemon, &path, &service("acme")).await.status, 200);
        }
        let list = async |token: String| {
            let list = get(&daemon, "/api/v1/exports", &token).await.json();
            let exports = list["exports"].as_array().unwrap().clone();
            exports.iter().map(|export| id_of(export).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(list(agent("acme")).await, [&*plain]);
        assert_eq!(list(service("acme")).await, [plain, audit]);
    }
}
