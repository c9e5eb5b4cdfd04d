//! A client of the WebSocket.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

/// How long a frame may take to come: longer than the daemon waits for a database that is away.
const PATIENCE: Duration = Duration::from_secs(20);

/// An open socket.
pub struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    /// Opens a socket without a token.
    pub async fn open(address: &str) -> Self {
        let protocol = [("sec-websocket-protocol", "timelined.v1")];
        let opened = Self::try_open(address, &protocol).await;
        opened.expect("the daemon upgrades").0
    }

    /// Opens a socket with these headers: the socket and what the daemon chose as subprotocol, or
    /// the status of its refusal.
    pub async fn try_open(
        address: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<(Self, Option<String>), u16> {
        let stream = TcpStream::connect(address)
            .await
            .expect("the daemon accepts");
        let mut request = format!("ws://{address}/api/v1/realtime")
            .into_client_request()
            .expect("a valid address");
        for (name, value) in headers {
            let value = HeaderValue::from_str(value).expect("a valid header");
            request.headers_mut().insert(*name, value);
        }
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((socket, response)) => {
                let protocol = response.headers().get("sec-websocket-protocol");
                let protocol = protocol.map(|name| name.to_str().expect("ASCII").to_owned());
                Ok((Self(socket), protocol))
            }
            Err(Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("the handshake failed: {error}"),
        }
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

    /// The code that the daemon closes with; frames before it are passed over.
    pub async fn closed(&mut self) -> Option<u16> {
        loop {
            if let Err(code) = self.try_next().await {
                return code;
            }
        }
    }

    /// Watches contacts, which must have no backlog; answers `subscribed`.
    pub async fn subscribe(&mut self, contacts: &[&str], ack: &str) -> Value {
        self.send(&json!({ "type": "subscribe", "contacts": contacts, "ack": ack }))
            .await;
        let frame = self.next().await;
        assert_eq!(frame["type"], "subscribed", "{frame}");
        frame
    }

    /// Whatever was sent before was taken when this returns; nothing else must come meanwhile.
    pub async fn ping(&mut self) {
        self.send(&json!({ "type": "ping" })).await;
        assert_eq!(self.next().await, json!({ "type": "pong" }));
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
