//! A client of the WebSocket.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;

/// How long a frame may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// An open socket.
pub struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    /// Opens a socket without a token.
    pub async fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address)
            .await
            .expect("the daemon accepts");
        let mut request = format!("ws://{address}/api/v1/realtime")
            .into_client_request()
            .expect("a valid address");
        let protocol = HeaderValue::from_static("timelined.v1");
        request
            .headers_mut()
            .insert("sec-websocket-protocol", protocol);
        let (socket, _) = tokio_tungstenite::client_async(request, stream)
            .await
            .expect("the daemon upgrades");
        Self(socket)
    }

    /// Opens a socket, authenticates, and takes the welcome.
    pub async fn authenticated(address: &str, token: &str) -> Self {
        let mut socket = Self::open(address).await;
        socket
            .send(&json!({ "type": "auth", "token": token }))
            .await;
        assert_eq!(socket.next().await["type"], "welcome");
        socket
    }

    /// Opens a socket that watches contacts; answers the backlog that came before `subscribed`.
    pub async fn watching(address: &str, token: &str, contacts: &[String]) -> (Self, Vec<Value>) {
        let mut socket = Self::authenticated(address, token).await;
        socket
            .send(&json!({ "type": "subscribe", "contacts": contacts }))
            .await;
        let mut backlog = Vec::new();
        loop {
            let frame = socket.next().await;
            if frame["type"] == "subscribed" {
                return (socket, backlog);
            }
            backlog.push(frame);
        }
    }

    /// Sends a frame.
    pub async fn send(&mut self, frame: &Value) {
        self.0
            .send(Message::text(frame.to_string()))
            .await
            .expect("the socket takes a frame");
    }

    /// Sends anything.
    pub async fn send_raw(&mut self, message: Message) {
        self.0
            .send(message)
            .await
            .expect("the socket takes a message");
    }

    /// Acknowledges events.
    pub async fn ack(&mut self, ids: &[&str]) {
        self.send(&json!({ "type": "ack", "ids": ids })).await;
    }

    /// Acknowledges an event, where the daemon is still there.
    pub async fn try_ack(&mut self, id: &str) -> Result<(), ()> {
        let frame = json!({ "type": "ack", "ids": [id] });
        let sent = self.0.send(Message::text(frame.to_string())).await;
        sent.map_err(|_gone| ())
    }

    /// The next frame.
    pub async fn next(&mut self) -> Value {
        self.try_next().await.expect("a frame comes")
    }

    /// The next frame; the close code where the daemon closes instead.
    pub async fn try_next(&mut self) -> Result<Value, Option<u16>> {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.0.next()).await;
            match message.expect("a frame comes in time") {
                Some(Ok(Message::Text(text))) => {
                    return Ok(serde_json::from_str(&text).expect("frames are JSON"));
                }
                Some(Ok(Message::Close(frame))) => return Err(frame.map(|frame| frame.code.into())),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(None),
            }
        }
    }

    /// The next frame of a type; others are passed over.
    pub async fn next_of(&mut self, kind: &str) -> Value {
        loop {
            let frame = self.next().await;
            if frame["type"] == kind {
                return frame;
            }
        }
    }

    /// Whether nothing comes for so long.
    pub async fn is_silent_for(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.0.next()).await.is_err()
    }
}
