//! The routes of legal holds, and what they refuse.

use reqwest::Method;
use serde_json::{Value, json};

use super::ask::{daemon, get, id_of, post_json, record, send};
use crate::support::builders::contact;
use crate::support::daemon::{TestDaemon, service};

async fn delete(daemon: &TestDaemon, path: &str, tenant: &str) -> super::ask::Answer {
    send(daemon.request(Method::DELETE, path, &service(tenant))).await
}

on_both_engines! {
    async fn a_hold_refuses_a_deletion_until_it_is_released(db) {
        let daemon = daemon(db).await;
        let event = record(&daemon, contact(1), json!({})).await;
        let other = record(&daemon, contact(2), json!({})).await;
        let given = json!({ "contact_id": contact(1), "reason": "a case" });
        let placed = post_json(&daemon, "/api/v1/holds", &service("acme"), &given).await;
        assert_eq!(placed.status, 201, "{}", placed.text);
        let hold = placed.json();
        assert_eq!(hold["contact_id"], json!(contact(1)));
        assert_eq!((&hold["category"], &hold["reason"], &hold["placed_by"]), (&Value::Null, &json!("a case"), &json!("service")));
        assert_eq!(hold["tenant_id"], "acme");

        let path = format!("/api/v1/contact-events/{}", id_of(&event));
        let problem = delete(&daemon, &path, "acme").await.problem(409, "held");
        assert_eq!(problem["type"], "urn:timelined:problem:held");
        let free = format!("/api/v1/contact-events/{}", id_of(&other));
        assert_eq!(delete(&daemon, &free, "acme").await.status, 204);

        assert_eq!(get(&daemon, "/api/v1/holds", &service("acme")).await.json(), json!({ "holds": [hold] }));
        assert_eq!(get(&daemon, "/api/v1/holds", &service("globex")).await.json(), json!({ "holds": [] }));
        let release = format!("/api/v1/holds/{}", hold["id"].as_str().unwrap());
        delete(&daemon, &release, "globex").await.problem(404, "another tenant's");
        assert_eq!(delete(&daemon, &release, "acme").await.status, 204);
        delete(&daemon, &release, "acme").await.problem(404, "released");
        assert_eq!(delete(&daemon, &path, "acme").await.status, 204);
    }

    async fn a_wrong_hold_is_refused_with_every_fault(db) {
        let daemon = daemon(db).await;
        let ask = async |given: Value| post_json(&daemon, "/api/v1/holds", &service("acme"), &given).await;
        let wrong = json!({ "contact_id": "x", "category": "notes", "reason": 1, "until": "2030" });
        let problem = ask(wrong).await.problem(422, "all wrong");
        let pointers: Vec<&Value> = problem["errors"].as_array().unwrap().iter().map(|fault| &fault["pointer"]).collect();
        assert_eq!(pointers, ["/contact_id", "/category", "/reason", "/until"]);
        let both = json!({ "contact_id": contact(1), "category": "note" });
        assert_eq!(ask(both).await.problem(422, "both")["pointer"], "/category");
        ask(json!({ "reason": "x".repeat(1001) })).await.problem(422, "too long");
        ask(json!([])).await.problem(422, "no object");
        assert_eq!(ask(json!({ "category": "tag", "reason": "x".repeat(1000) })).await.status, 201);
        assert_eq!(db.count("holds").await, 1);
    }
}
