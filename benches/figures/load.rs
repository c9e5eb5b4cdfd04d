//! A client that costs little: one keep-alive connection, requests one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::quantile;

/// A page of 200 events of 64 KiB each is the largest answer.
const LARGEST: usize = 32 * 1024 * 1024;

/// One connection to a daemon.
pub(crate) struct Client {
    sender: SendRequest<Body>,
    address: String,
    token: String,
}

impl Client {
    pub(crate) async fn open(address: &str, token: &str) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
        // Ends with its sender.
        tokio::spawn(connection);
        Self {
            sender,
            address: address.to_owned(),
            token: token.to_owned(),
        }
    }

    /// Sends a request; the status and the body.
    pub(crate) async fn send(&mut self, method: &str, path: &str, body: String) -> (u16, Vec<u8>) {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.address)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .unwrap();
        self.sender.ready().await.unwrap();
        let response = self.sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = to_bytes(Body::new(response.into_body()), LARGEST).await;
        (status, body.unwrap().to_vec())
    }

    pub(crate) async fn json(&mut self, method: &str, path: &str) -> Value {
        let (status, body) = self.send(method, path, String::new()).await;
        assert!(
            (200..300).contains(&status),
            "{}",
            String::from_utf8_lossy(&body)
        );
        serde_json::from_slice(&body).unwrap()
    }
}

/// A usual event, some 300 bytes.
fn event() -> String {
    serde_json::json!({
        "event_type": "note_added", "category": "note", "source": "agent",
        "title": "Asked for a quote for 25 seats",
        "description": "Prefers to be called in the morning; the legal department has the draft.",
        "payload": { "seats": 25, "plan": "business", "currency": "EUR", "stage": "proposal" },
    })
    .to_string()
}

/// What a load did.
pub(crate) struct Load {
    pub(crate) per_second: f64,
    latencies_ms: Vec<f64>,
}

impl Load {
    pub(crate) fn latency_ms(&mut self, share: f64) -> f64 {
        quantile(&mut self.latencies_ms, share)
    }
}

/// Creates events from `clients` connections for so long; each waits for its answer.
pub(crate) async fn create(address: &str, token: &str, clients: usize, time: Duration) -> Load {
    let body: Arc<str> = event().into();
    let began = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let (address, token, body) = (address.to_owned(), token.to_owned(), body.clone());
            tokio::spawn(async move {
                let mut client = Client::open(&address, &token).await;
                let mut latencies = Vec::new();
                while began.elapsed() < time {
                    let contact = Uuid::from_u128(rand::random_range(1..1000) + (7 << 76));
                    let path = format!("/api/v1/contacts/{contact}/events");
                    let sent = Instant::now();
                    let (status, answer) = client.send("POST", &path, body.to_string()).await;
                    assert_eq!(status, 201, "{}", String::from_utf8_lossy(&answer));
                    latencies.push(sent.elapsed().as_secs_f64() * 1000.0);
                }
                latencies
            })
        })
        .collect();
    let mut latencies_ms = Vec::new();
    for task in tasks {
        latencies_ms.extend(task.await.unwrap());
    }
    Load {
        per_second: latencies_ms.len() as f64 / began.elapsed().as_secs_f64(),
        latencies_ms,
    }
}
