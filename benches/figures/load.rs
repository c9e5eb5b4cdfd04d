//! A client that costs little: one keep-alive connection, requests one after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

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

/// Creates events from `clients` connections for so long; each waits for its answer. Answers with how
/// many there were a second.
pub(crate) async fn create(address: &str, token: &str, clients: usize, time: Duration) -> f64 {
    let body: Arc<str> = event().into();
    let began = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let (address, token, body) = (address.to_owned(), token.to_owned(), body.clone());
            tokio::spawn(async move {
                let mut client = Client::open(&address, &token).await;
                let mut created = 0_u32;
                while began.elapsed() < time {
                    let contact = Uuid::from_u128(rand::random_range(1..1000) + (7 << 76));
                    let path = format!("/api/v1/contacts/{contact}/events");
                    let (status, answer) = client.send("POST", &path, body.to_string()).await;
                    assert_eq!(status, 201, "{}", String::from_utf8_lossy(&answer));
                    created += 1;
                }
                created
            })
        })
        .collect();
    let mut created = 0;
    for task in tasks {
        created += task.await.unwrap();
    }
    f64::from(created) / began.elapsed().as_secs_f64()
}

/// Writers and readers that rest between two requests, as people and programs do: what they feel is
/// how long an answer takes, not how many the machine can give.
pub(crate) struct Traffic {
    writers: Vec<JoinHandle<Vec<f64>>>,
    readers: Vec<JoinHandle<Vec<f64>>>,
    stop: CancellationToken,
}

/// How long the answers took, in milliseconds.
#[derive(Default)]
pub(crate) struct Answers {
    pub(crate) writes: Vec<f64>,
    pub(crate) reads: Vec<f64>,
}

/// Between two requests of one client, on average.
const REST_MS: u64 = 50;

impl Traffic {
    /// So many of either kind; the readers open the newest page of one of a thousand timelines.
    pub(crate) fn start(address: &str, token: &str, writers: usize, readers: usize) -> Self {
        let stop = CancellationToken::new();
        let body: Arc<str> = event().into();
        let spawn = |body: Option<Arc<str>>| {
            let (address, token, stop) = (address.to_owned(), token.to_owned(), stop.clone());
            tokio::spawn(async move {
                let mut client = Client::open(&address, &token).await;
                let mut latencies = Vec::new();
                while !stop.is_cancelled() {
                    let rest = rand::random_range(0..2 * REST_MS);
                    tokio::time::sleep(Duration::from_millis(rest)).await;
                    let number = rand::random_range(1..1000);
                    let sent = Instant::now();
                    let (status, answer) = if let Some(body) = &body {
                        let contact = Uuid::from_u128(number + (7 << 76));
                        let path = format!("/api/v1/contacts/{contact}/events");
                        client.send("POST", &path, body.to_string()).await
                    } else {
                        let contact = format!("0190b5f0-0000-7000-8000-{number:012x}");
                        let path = format!("/api/v1/contacts/{contact}/events");
                        client.send("GET", &path, String::new()).await
                    };
                    assert!(status < 300, "{}", String::from_utf8_lossy(&answer));
                    latencies.push(sent.elapsed().as_secs_f64() * 1000.0);
                }
                latencies
            })
        };
        Self {
            writers: (0..writers).map(|_| spawn(Some(body.clone()))).collect(),
            readers: (0..readers).map(|_| spawn(None)).collect(),
            stop,
        }
    }

    /// Ends it.
    pub(crate) async fn end(self) -> Answers {
        self.stop.cancel();
        let mut answers = Answers::default();
        for task in self.writers {
            answers.writes.extend(task.await.unwrap());
        }
        for task in self.readers {
            answers.reads.extend(task.await.unwrap());
        }
        answers
    }
}

impl Answers {
    pub(crate) fn add(&mut self, more: Self) {
        self.writes.extend(more.writes);
        self.reads.extend(more.reads);
    }
}
