//! The routes of jobs.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::ask::{PATIENCE, assert_calm, daemon, get, now, post};
use crate::support::builders::{Record as _, acme, days, event};
use crate::support::daemon::{TestDaemon, eventually, operator};

const PURGE: &str = "/api/v1/jobs/purge-expired";

fn keys(value: &Value) -> BTreeSet<&str> {
    let object = value.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

/// Asks for a run and waits for its end.
async fn run(daemon: &TestDaemon) -> Value {
    let answer = post(daemon, &format!("{PURGE}/run"), &operator()).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    let id = answer.json()["run_id"].clone();
    assert_eq!(answer.json(), json!({ "run_id": id }));
    let find = async || {
        let page = get(daemon, &format!("{PURGE}/runs?limit=200"), &operator())
            .await
            .json();
        let runs = page["runs"].as_array().unwrap().clone();
        runs.into_iter().find(|run| run["id"] == id)
    };
    eventually("the run ends", PATIENCE, async || {
        find()
            .await
            .is_some_and(|run| !run["finished_at"].is_null())
    })
    .await;
    find().await.unwrap()
}

on_both_engines! {
    async fn jobs_are_listed_with_their_schedule_and_last_run(db) {
        let daemon = daemon(db).await;
        let answer = get(&daemon, "/api/v1/jobs", &operator()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let list = answer.json();
        let jobs = list["jobs"].as_array().unwrap();
        let names: Vec<&Value> = jobs.iter().map(|job| &job["name"]).collect();
        assert_eq!(names, ["realtime-delivery", "purge-expired"]);
        let expected = BTreeSet::from([
            "name", "kind", "schedule", "timezone", "enabled", "paused", "next_at", "last_run",
        ]);
        for job in jobs {
            assert_eq!(keys(job), expected);
            assert_eq!(job["enabled"], true);
            assert_eq!(job["paused"], false);
            assert!(job["next_at"].as_str().unwrap().ends_with('Z'), "{job}");
        }
        let purge = get(&daemon, PURGE, &operator()).await.json();
        assert_eq!(purge["kind"], "purge_expired");
        assert_eq!(purge["schedule"], "0 30 3 * * *");
        assert_eq!(purge["timezone"], "UTC");
        assert_eq!(purge["last_run"], Value::Null);
        let ended = run(&daemon).await;
        let purge = get(&daemon, PURGE, &operator()).await.json();
        assert_eq!(purge["last_run"], ended);
        let list = get(&daemon, "/api/v1/jobs", &operator()).await.json();
        assert_eq!(list["jobs"][1], purge);
    }

    async fn a_run_that_was_asked_for_appears_as_manual_and_ends(db) {
        let old = event()
            .expires_at(now() - days(8))
            .recorded_at(now() - days(9));
        db.given(&acme(), [old]).await;
        let daemon = daemon(db).await;
        let ended = run(&daemon).await;
        let expected = BTreeSet::from([
            "id", "job", "scheduled_at", "started_at", "finished_at", "trigger", "attempt",
            "daemon", "state", "counts", "error",
        ]);
        assert!(keys(&ended).is_superset(&expected), "{ended}");
        assert_eq!(ended["job"], "purge-expired");
        assert_eq!(ended["trigger"], "manual");
        assert_eq!(ended["state"], "succeeded", "{ended}");
        assert_eq!(ended["attempt"], 1);
        assert_eq!(ended["counts"]["deleted"], 1, "{ended}");
        assert_eq!(ended["error"], Value::Null);
        assert_calm(&daemon);
    }

    async fn runs_are_walked_by_cursor_newest_first(db) {
        let daemon = daemon(db).await;
        let mut made = Vec::new();
        for _ in 0..3 {
            made.push(run(&daemon).await["id"].clone());
        }
        made.reverse();
        let mut seen = Vec::new();
        let mut path = format!("{PURGE}/runs?limit=1");
        loop {
            let page = get(&daemon, &path, &operator()).await.json();
            seen.extend(page["runs"].as_array().unwrap().iter().map(|run| run["id"].clone()));
            let Some(cursor) = page["next_cursor"].as_str() else { break };
            assert!(seen.len() <= made.len());
            path = format!("{PURGE}/runs?limit=1&cursor={cursor}");
        }
        assert_eq!(seen, made);
    }

    async fn a_job_that_is_not_there_is_404(db) {
        let daemon = daemon(db).await;
        for name in ["nothing", "PURGE-EXPIRED", "purge-expired%00", "%F0%9F%98%80"] {
            let path = format!("/api/v1/jobs/{name}");
            get(&daemon, &path, &operator()).await.problem(404, &path);
            let runs = format!("{path}/runs");
            get(&daemon, &runs, &operator()).await.problem(404, &runs);
            let run = format!("{path}/run");
            post(&daemon, &run, &operator()).await.problem(404, &run);
        }
        assert_calm(&daemon);
    }

    async fn a_job_is_paused_and_resumed_and_its_runs_cancelled_and_tried_again(db) {
        let daemon = daemon(db).await;
        for (path, status) in [("pause", 200), ("pause", 200), ("resume", 200), ("resume", 200), ("pause", 200)] {
            let answer = post(&daemon, &format!("{PURGE}/{path}"), &operator()).await;
            assert_eq!(answer.status, status, "{}", answer.text);
            assert_eq!(answer.json()["paused"], path == "pause");
        }
        assert_eq!(get(&daemon, PURGE, &operator()).await.json()["paused"], true);
        let run = run(&daemon).await;
        assert_eq!(run["state"], "succeeded", "what is asked for runs all the same");
        let id = run["id"].as_str().unwrap();
        for (what, kind) in [("cancel", "run-ended"), ("retry", "run-not-failed")] {
            let answer = post(&daemon, &format!("{PURGE}/runs/{id}/{what}"), &operator()).await;
            assert_eq!(answer.problem(409, what)["type"], format!("urn:timelined:problem:{kind}"));
            for path in [
                format!("{PURGE}/runs/01900000-0000-7000-8000-00000000000f/{what}"),
                format!("/api/v1/jobs/realtime-delivery/runs/{id}/{what}"),
                format!("/api/v1/jobs/nothing/runs/{id}/{what}"),
            ] {
                post(&daemon, &path, &operator()).await.problem(404, &path);
            }
            post(&daemon, &format!("{PURGE}/runs/7/{what}"), &operator()).await.problem(400, what);
        }
        db.execute("update job_runs set state = 'failed', error = 'no luck' where job = 'purge-expired'").await.unwrap();
        let answer = post(&daemon, &format!("{PURGE}/runs/{id}/retry"), &operator()).await;
        assert_eq!((answer.status, answer.json()), (202, json!({ "run_id": id })));
        eventually("it runs again", PATIENCE, async || {
            let page = get(&daemon, &format!("{PURGE}/runs"), &operator()).await.json();
            page["runs"][0]["id"] == id && page["runs"][0]["state"] == "succeeded"
        })
        .await;
        let done = get(&daemon, &format!("{PURGE}/actions"), &operator()).await.json();
        let done: Vec<_> = done["actions"].as_array().unwrap().iter().map(|did| did["action"].clone()).collect();
        assert_eq!(done, ["retry", "run", "pause", "resume", "pause"]);
        assert_calm(&daemon);
    }
}
