//! One connection: authenticates, subscribes, is sent events, acknowledges.
//!
//! Attaching has no gap: the session registers with the hub first, then reads the backlog, then
//! answers `subscribed`, then sends what is live. While it reads the backlog, or when its window of
//! unacknowledged events is full, what the hub pushes is not kept but only noted, and read from the
//! store again: a slow reader costs bounded memory and delays nobody. Its place in the store is a
//! seq for each rank, so that what is urgent overtakes.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use chrono::TimeDelta;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::acks::{AckKind, Acknowledgement};
use super::frames::{AckMode, ClientFrame, Close, DaemonFrame};
use super::hub::{Ear, Hub, Missed, Published, Push};
use crate::access::{Access, Identity, Reader};
use crate::domain::{Clock, ContactId, EventId, format_time};
use crate::storage::{self, EventRepository, StorageError};
use crate::telemetry::chain;

/// Contacts that one connection may watch.
const MAX_CONTACTS: usize = 1000;
/// Ids in one frame.
const MAX_IDS: usize = 1000;
/// How long a client has to authenticate.
const AUTH_TIME: Duration = Duration::from_secs(10);
/// A socket that does not take a frame for so long is given up.
const SEND_TIME: Duration = Duration::from_secs(30);
/// How long saying goodbye may take: a stopping daemon waits for no client that does not read.
const BYE_TIME: Duration = Duration::from_secs(2);
/// Pushes that may wait for a session; more are read from the store.
const PUSHES: usize = 256;
/// Events of a backlog that are read at a time: an event may have 160 KB, and a window 10,000.
const READ: usize = 64;
/// Where less than that fits, how long the next read waits for acknowledgements: a client that
/// acknowledges one by one does not cost a query each, and one that waits for more before it
/// acknowledges does not wait for long.
const READ_PAUSE: Duration = Duration::from_millis(50);
/// Subscriptions that may wait to be confirmed; each holds a frame's worth of memory.
const MAX_UNCONFIRMED: usize = 16;
/// How far the clocks of issuer and daemon may differ, as in `access`.
const LEEWAY: TimeDelta = TimeDelta::seconds(30);
/// Between two looks at what was not acknowledged and whether the token is over.
const TICK: Duration = Duration::from_secs(1);
/// How long after `bye` a client waits at least, and the spread that keeps all from coming at once.
const RETRY_MS: u64 = 500;
const RETRY_SPREAD_MS: u64 = 4500;
/// Between two tries to read the backlog from a database that is away.
const BACKLOG_RETRY: Duration = Duration::from_millis(500);

/// What every session shares.
pub struct SessionSettings {
    /// Who may connect.
    pub access: Arc<Access>,
    /// The store.
    pub events: Arc<dyn EventRepository>,
    /// Who watches what.
    pub hub: Arc<Hub>,
    /// Where acknowledgements go.
    pub acks: mpsc::Sender<Acknowledgement>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// How many events may be unacknowledged.
    pub window: usize,
    /// After which time an unacknowledged event comes again; after twice that the connection ends.
    pub ack_timeout: Duration,
    /// Cancelled when the daemon stops.
    pub stop: CancellationToken,
}

/// Why a session ends.
enum End {
    /// The daemon closes it.
    Close(Close),
    /// The client went away, or the socket failed.
    Gone,
}

/// An event that was sent and not acknowledged.
struct Open {
    published: Arc<Published>,
    first_sent: Instant,
    sent: Instant,
}

/// The events that were sent last. A push may come behind the store's copy of the same event, even
/// after its acknowledgement; it is known by its id, since on PostgreSQL a late commit has a lower
/// seq than what was sent before.
struct Recent {
    capacity: usize,
    order: VecDeque<(EventId, ContactId)>,
    ids: HashSet<EventId>,
}

impl Recent {
    /// Remembers what a window and the pushes that may wait hold, and as much again for those that
    /// the pump has read but not yet handed over.
    fn new(window: usize) -> Self {
        Self {
            capacity: 2 * (window + PUSHES),
            order: VecDeque::new(),
            ids: HashSet::new(),
        }
    }

    fn insert(&mut self, id: EventId, contact: ContactId) {
        if !self.ids.insert(id) {
            return;
        }
        self.order.push_back((id, contact));
        if self.order.len() > self.capacity
            && let Some((oldest, _)) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
        }
    }

    /// A next subscription of these contacts is to give what still waits, sent before or not.
    fn forget(&mut self, contacts: &[ContactId]) {
        self.order.retain(|(id, contact)| {
            let is_forgotten = contacts.contains(contact);
            if is_forgotten {
                self.ids.remove(id);
            }
            !is_forgotten
        });
    }

    fn contains(&self, id: EventId) -> bool {
        self.ids.contains(&id)
    }
}

/// Waiting events that are being read, and how far.
struct Backlog {
    of: BacklogOf,
    /// For each rank the seq behind which to read on.
    after: [i64; 4],
    /// How many events were read.
    read: usize,
}

/// Whose events a backlog has.
enum BacklogOf {
    /// Those of a subscription's contacts, from the beginning.
    Subscription {
        contacts: Vec<ContactId>,
        /// What to confirm once the first window is read: granted and denied.
        confirm: Option<(Vec<ContactId>, Vec<String>)>,
    },
    /// Those of all that is watched, from where on the session missed something live. There is at
    /// most one: whatever is missed is merged into it.
    CatchUp,
}

impl Backlog {
    /// Whether it is of no contacts.
    fn is_empty(&self) -> bool {
        matches!(&self.of, BacklogOf::Subscription { contacts, .. } if contacts.is_empty())
    }

    fn is_unconfirmed(&self) -> bool {
        matches!(
            self.of,
            BacklogOf::Subscription {
                confirm: Some(_),
                ..
            }
        )
    }
}

/// One connection.
pub struct Session {
    shared: Arc<SessionSettings>,
    socket: WebSocket,
    connection: u64,
    reader: Reader,
    identity: Identity,
    /// What is watched, and how its events count as delivered.
    watched: HashMap<ContactId, AckMode>,
    open: HashMap<EventId, Open>,
    recent: Recent,
    backlogs: VecDeque<Backlog>,
    /// When the backlog may be read again: later where the database was away.
    backlog_at: Instant,
    missed: Arc<Missed>,
    ear: mpsc::Sender<Push>,
    pushes: mpsc::Receiver<Push>,
    last_read: Instant,
    last_ack: Instant,
}

impl Session {
    /// Serves a connection to its end. `identity` is set where the handshake carried a token.
    pub async fn serve(
        shared: Arc<SessionSettings>,
        mut socket: WebSocket,
        identity: Option<Identity>,
    ) {
        let connected = shared.hub.connect();
        let connection = connected.number;
        let authenticated = match identity {
            Some(identity) => Ok(identity),
            None => authenticate(&shared, &mut socket).await,
        };
        let authenticated = authenticated.and_then(|identity| {
            let reader = Reader::try_from(identity.clone());
            reader
                .map(|reader| (identity, reader))
                .map_err(|_operator| End::Close(Close::NotAuthenticated))
        });
        match authenticated {
            Ok((identity, reader)) => {
                let (ear, pushes) = mpsc::channel(PUSHES);
                let now = Instant::now();
                let mut session = Self {
                    shared: shared.clone(),
                    socket,
                    connection,
                    reader,
                    identity,
                    watched: HashMap::new(),
                    open: HashMap::new(),
                    recent: Recent::new(shared.window),
                    backlogs: VecDeque::new(),
                    backlog_at: now,
                    missed: Arc::default(),
                    ear,
                    pushes,
                    last_read: now,
                    last_ack: now,
                };
                let end = session.run().await;
                session.leave();
                bye(&mut session.socket, &end).await;
            }
            Err(end) => bye(&mut socket, &end).await,
        }
    }

    /// Is handed nothing any more.
    fn leave(&mut self) {
        let watched: Vec<ContactId> = self.watched.drain().map(|(contact, _)| contact).collect();
        self.shared
            .hub
            .unwatch(&self.reader.tenant, &watched, self.connection);
    }

    async fn run(&mut self) -> End {
        let stop = self.shared.stop.clone();
        // Raced as a whole, since it may be waiting for a socket that takes nothing, or for the
        // database. What is lost by that is an acknowledgement at most: the event comes again.
        tokio::select! {
            ended = self.converse() => match ended {
                Err(end) => end,
                Ok(never) => match never {},
            },
            () = stop.cancelled() => End::Close(Close::ShuttingDown),
        }
    }

    async fn converse(&mut self) -> Result<std::convert::Infallible, End> {
        self.welcome().await?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pauses = self.shared.hub.pauses();
        let mut was_paused = false;
        loop {
            let is_paused = *pauses.borrow_and_update();
            if is_paused && !was_paused {
                // Whoever waits for a confirmation is not to wait for the end of the pause.
                self.confirm().await?;
            } else if was_paused && !is_paused {
                self.wait_anew();
            }
            was_paused = is_paused;
            let reads_backlog = !is_paused && !self.backlogs.is_empty() && self.window_left() > 0;
            let next_read = self.next_read();
            tokio::select! {
                frame = self.socket.recv() => self.receive(frame).await?,
                Some(push) = self.pushes.recv() => self.take(push).await?,
                () = tokio::time::sleep_until(next_read), if reads_backlog => self.read_backlog().await?,
                _ = tick.tick() => self.tick().await?,
                _ = pauses.changed() => {}
            }
            self.note_missed();
        }
    }

    async fn welcome(&mut self) -> Result<(), End> {
        let frame = DaemonFrame::Welcome {
            connection: self.connection.to_string(),
            expires_at: format_time(self.identity.expires_at),
            window: self.shared.window,
        };
        send(&mut self.socket, &frame).await
    }

    /// A pause is over: nobody was late in it, and all that is open is due again after its time.
    fn wait_anew(&mut self) {
        let now = Instant::now();
        for open in self.open.values_mut() {
            (open.first_sent, open.sent) = (now, now);
        }
    }

    fn was_sent(&self, id: EventId) -> bool {
        self.open.contains_key(&id) || self.recent.contains(id)
    }

    fn window_left(&self) -> usize {
        self.shared.window.saturating_sub(self.open.len())
    }

    /// When the backlog is to be read next.
    fn next_read(&self) -> Instant {
        let worthwhile = READ.min(self.shared.window / 2);
        if self.open.is_empty() || self.window_left() >= worthwhile {
            self.backlog_at
        } else {
            self.backlog_at.max(self.last_read + READ_PAUSE)
        }
    }

    /// What the hub could not hand over is read from the store.
    fn note_missed(&mut self) {
        if let Some(missed) = self.missed.take() {
            self.catch_up(missed.map(|seq| seq.saturating_sub(1)));
        }
    }

    /// Reads all that is watched from the store, behind `after`.
    fn catch_up(&mut self, after: [i64; 4]) {
        let waiting = self
            .backlogs
            .iter_mut()
            .find(|backlog| matches!(backlog.of, BacklogOf::CatchUp));
        if let Some(waiting) = waiting {
            for (rank, seq) in after.into_iter().enumerate() {
                waiting.after[rank] = waiting.after[rank].min(seq);
            }
            return;
        }
        self.backlogs.push_back(Backlog {
            of: BacklogOf::CatchUp,
            after,
            read: 0,
        });
    }

    async fn receive(&mut self, frame: Option<Result<Message, axum::Error>>) -> Result<(), End> {
        let text = match frame {
            Some(Ok(Message::Text(text))) => text,
            // Answered by the library.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => return Ok(()),
            Some(Ok(Message::Binary(_))) => return Err(End::Close(Close::BadFrame)),
            Some(Err(error)) => {
                tracing::debug!(connection = self.connection, %error, "a socket failed");
                return Err(End::Gone);
            }
            Some(Ok(Message::Close(_))) | None => return Err(End::Gone),
        };
        let frame = match serde_json::from_str::<ClientFrame>(&text) {
            Ok(frame) => frame,
            Err(error) => {
                self.refuse("bad-frame", "Bad frame", 400, error.to_string())
                    .await?;
                return Err(End::Close(Close::BadFrame));
            }
        };
        match frame {
            ClientFrame::Auth { token } => self.refresh(&token).await,
            ClientFrame::Subscribe { contacts, ack } => self.subscribe(contacts, ack).await,
            ClientFrame::Unsubscribe { contacts } => {
                self.unsubscribe(&contacts);
                Ok(())
            }
            ClientFrame::Ack { ids } => {
                let ids = self.ids(&ids).await?;
                self.acknowledge(ids).await
            }
            ClientFrame::Read { ids } => {
                let ids = self.ids(&ids).await?;
                self.pass_on(AckKind::Read, ids, true).await
            }
            ClientFrame::Ping => send(&mut self.socket, &DaemonFrame::Pong).await,
        }
    }

    /// A newer token of the same reader prolongs the connection.
    async fn refresh(&mut self, token: &str) -> Result<(), End> {
        match self.shared.access.verify(token) {
            Ok(identity)
                if identity.subject == self.identity.subject
                    && identity.role() == self.identity.role()
                    && Reader::try_from(identity.clone())
                        .is_ok_and(|reader| reader.tenant == self.reader.tenant) =>
            {
                self.identity = identity.clone();
                if let Ok(reader) = Reader::try_from(identity) {
                    self.reader = reader;
                }
                // A client that is fewer contacts now no longer watches the others.
                let lost: Vec<ContactId> = self
                    .watched
                    .keys()
                    .copied()
                    .filter(|contact| !self.reader.may_see(*contact))
                    .collect();
                self.forget(&lost);
                self.welcome().await
            }
            _ => Err(End::Close(Close::NotAuthenticated)),
        }
    }

    async fn subscribe(&mut self, contacts: Vec<String>, ack: AckMode) -> Result<(), End> {
        let mut granted = Vec::new();
        let mut denied = Vec::new();
        for contact in contacts {
            match contact.parse::<ContactId>() {
                Ok(id) if self.reader.may_see(id) => granted.push(id),
                _ => denied.push(contact),
            }
        }
        let new: Vec<ContactId> = {
            let mut seen = HashSet::new();
            let is_new = |id: &ContactId| !self.watched.contains_key(id) && seen.insert(*id);
            granted.iter().copied().filter(is_new).collect()
        };
        if self.watched.len() + new.len() > MAX_CONTACTS {
            let detail = format!("a connection watches at most {MAX_CONTACTS} contacts");
            self.refuse("too-many-contacts", "Too many contacts", 429, detail)
                .await?;
            return Err(End::Close(Close::TooMuch));
        }
        let unconfirmed = self
            .backlogs
            .iter()
            .filter(|backlog| backlog.is_unconfirmed());
        if unconfirmed.count() >= MAX_UNCONFIRMED {
            let detail = format!("at most {MAX_UNCONFIRMED} subscriptions wait to be confirmed");
            self.refuse(
                "too-many-subscriptions",
                "Too many subscriptions",
                429,
                detail,
            )
            .await?;
            return Err(End::Close(Close::TooMuch));
        }
        let ear = Ear {
            connection: self.connection,
            audience: self.reader.audience,
            pushes: self.ear.clone(),
            missed: self.missed.clone(),
        };
        // First registered, then read: what is committed in between comes by either way.
        self.shared.hub.watch(&self.reader.tenant, &new, &ear);
        // A contact that is subscribed again keeps its place, and counts as it says now.
        self.watched
            .extend(granted.iter().map(|contact| (*contact, ack)));
        self.backlogs.push_back(Backlog {
            of: BacklogOf::Subscription {
                contacts: new,
                confirm: Some((granted, denied)),
            },
            after: [0; 4],
            read: 0,
        });
        self.confirm().await?;
        // Else subscribing again and again while nothing is read would fill the queue.
        self.backlogs
            .retain(|backlog| backlog.is_unconfirmed() || !backlog.is_empty());
        Ok(())
    }

    fn unsubscribe(&mut self, contacts: &[String]) {
        let contacts: Vec<ContactId> = contacts
            .iter()
            .filter_map(|contact| contact.parse().ok())
            .collect();
        self.forget(&contacts);
    }

    fn forget(&mut self, contacts: &[ContactId]) {
        self.shared
            .hub
            .unwatch(&self.reader.tenant, contacts, self.connection);
        for contact in contacts {
            self.watched.remove(contact);
        }
        self.open
            .retain(|_, open| !contacts.contains(&open.published.contact_id));
        self.recent.forget(contacts);
        self.backlogs.retain_mut(|backlog| match &mut backlog.of {
            BacklogOf::Subscription {
                contacts: waiting,
                confirm,
            } => {
                waiting.retain(|contact| !contacts.contains(contact));
                // Else subscribing and unsubscribing in turn would fill the queue.
                confirm.is_some() || !waiting.is_empty()
            }
            BacklogOf::CatchUp => true,
        });
    }

    /// Parses ids; one that is none is told and ends the connection, since the client is broken.
    async fn ids(&mut self, ids: &[String]) -> Result<Vec<EventId>, End> {
        if ids.len() > MAX_IDS {
            let detail = format!("a frame names at most {MAX_IDS} ids");
            self.refuse("too-many-ids", "Too many ids", 429, detail)
                .await?;
            return Err(End::Close(Close::TooMuch));
        }
        let parsed: Result<Vec<EventId>, _> = ids.iter().map(|id| id.parse()).collect();
        match parsed {
            Ok(ids) => Ok(ids),
            Err(error) => {
                self.refuse("bad-frame", "Bad frame", 400, error.to_string())
                    .await?;
                Err(End::Close(Close::BadFrame))
            }
        }
    }

    async fn acknowledge(&mut self, ids: Vec<EventId>) -> Result<(), End> {
        self.last_ack = Instant::now();
        let (known, unknown): (Vec<_>, Vec<_>) = ids
            .into_iter()
            .partition(|id| self.open.remove(id).is_some());
        // What was sent here belongs to a watched contact; what was sent on a connection before
        // this one is checked.
        self.pass_on(AckKind::Delivered, known, false).await?;
        self.pass_on(AckKind::Delivered, unknown, true).await
    }

    async fn pass_on(
        &mut self,
        kind: AckKind,
        ids: Vec<EventId>,
        is_checked: bool,
    ) -> Result<(), End> {
        if ids.is_empty() {
            return Ok(());
        }
        let contacts = is_checked.then(|| {
            let mut contacts: Vec<ContactId> = self.watched.keys().copied().collect();
            contacts.sort();
            contacts
        });
        let acknowledgement = Acknowledgement {
            connection: self.connection,
            tenant: self.reader.tenant.clone(),
            audience: self.reader.audience,
            contacts,
            by: self.reader.subject.clone(),
            ids,
            kind,
        };
        // Fails only while the daemon is stopping; then the events come again.
        self.shared
            .acks
            .send(acknowledgement)
            .await
            .map_err(|_stopped| End::Close(Close::ShuttingDown))
    }

    async fn take(&mut self, push: Push) -> Result<(), End> {
        match push {
            Push::Event(event) => {
                if !self.watched.contains_key(&event.contact_id) || self.was_sent(event.id) {
                    return Ok(());
                }
                // In order: what is live waits until the backlog is read and the window is open.
                let is_paused = self.shared.hub.is_paused();
                if is_paused || !self.backlogs.is_empty() || self.window_left() == 0 {
                    self.missed.note(event.rank, event.seq);
                    return Ok(());
                }
                self.send_event(event, false).await
            }
            Push::Receipt {
                event_id,
                contact_id,
                delivered_at,
                read_at,
            } => {
                if delivered_at.is_some() {
                    // Somebody of the same audience took it: it need not come again.
                    self.open.remove(&event_id);
                }
                let frame = DaemonFrame::Receipt {
                    event_id,
                    contact_id,
                    delivered_at: delivered_at.map(format_time),
                    read_at: read_at.map(format_time),
                };
                if self.watched.contains_key(&contact_id) {
                    send(&mut self.socket, &frame).await
                } else {
                    Ok(())
                }
            }
            Push::Removed {
                event_id,
                contact_id,
            } => {
                if self.watched.contains_key(&contact_id) {
                    self.send_removed(event_id, contact_id).await
                } else {
                    Ok(())
                }
            }
        }
    }

    async fn send_removed(&mut self, event_id: EventId, contact_id: ContactId) -> Result<(), End> {
        self.open.remove(&event_id);
        // The pump may have read it before the delete and hand it over behind this.
        self.recent.insert(event_id, contact_id);
        let frame = DaemonFrame::Removed {
            event_id,
            contact_id,
        };
        send(&mut self.socket, &frame).await
    }

    async fn send_event(&mut self, published: Arc<Published>, redelivery: bool) -> Result<(), End> {
        if published
            .expires_at
            .is_some_and(|at| at <= self.shared.clock.now())
        {
            return Ok(());
        }
        let frame = DaemonFrame::Event {
            event: &published.json,
            cursor: cursor(published.seq),
            redelivery,
        };
        send(&mut self.socket, &frame).await?;
        self.recent.insert(published.id, published.contact_id);
        let ack = self.watched.get(&published.contact_id).copied();
        match ack.unwrap_or_default() {
            AckMode::Auto => {
                self.open.remove(&published.id);
                self.pass_on(AckKind::Delivered, vec![published.id], false)
                    .await
            }
            AckMode::Client => {
                let now = Instant::now();
                if self.open.is_empty() {
                    // The wait for an acknowledgement begins with the first event to acknowledge.
                    self.last_ack = now;
                }
                let open = self.open.entry(published.id).or_insert(Open {
                    published,
                    first_sent: now,
                    sent: now,
                });
                open.sent = now;
                Ok(())
            }
        }
    }

    /// Reads the next part of the first backlog, as much as the window takes.
    async fn read_backlog(&mut self) -> Result<(), End> {
        let limit = self.window_left().min(READ);
        let Some(backlog) = self.backlogs.front() else {
            return Ok(());
        };
        let all: Vec<ContactId>;
        let contacts = match &backlog.of {
            BacklogOf::Subscription { contacts, .. } => contacts,
            BacklogOf::CatchUp => {
                all = self.watched.keys().copied().collect();
                &all
            }
        };
        let (tenant, after) = (&self.reader.tenant, backlog.after);
        let now = self.shared.clock.now();
        let found = if contacts.is_empty() {
            Ok(storage::Backlog {
                events: Vec::new(),
                reached: after,
                is_end: true,
            })
        } else {
            let limit = u32::try_from(limit).unwrap_or(u32::MAX);
            self.shared
                .events
                .find_undelivered_realtime(tenant, contacts, after, now, limit)
                .await
        };
        self.last_read = Instant::now();
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.put_off(&error),
        };
        if let Some(backlog) = self.backlogs.front_mut() {
            backlog.after = found.reached;
            backlog.read += limit;
        }
        for undelivered in &found.events {
            let is_seen = undelivered.event.is_visible_to(self.reader.audience, now);
            if is_seen && !self.was_sent(undelivered.event.id) {
                let published = Arc::new(Published::from(undelivered));
                self.send_event(published, true).await?;
            }
        }
        self.confirm().await?;
        if found.is_end
            && let Some(Backlog {
                of: BacklogOf::Subscription { confirm, .. },
                ..
            }) = self.backlogs.pop_front()
        {
            self.send_confirmation(confirm).await?;
        }
        Ok(())
    }

    /// Confirms subscriptions whose first window was read. Where the window is full, whoever sent
    /// it, that is all of them: they are registered with the hub, so that nothing can be missed, and
    /// a client that waits for the confirmation before it acknowledges must not wait for ever. The
    /// same while delivery is paused.
    async fn confirm(&mut self) -> Result<(), End> {
        let window = self.shared.window;
        let is_full = self.window_left() == 0 || self.shared.hub.is_paused();
        for index in 0..self.backlogs.len() {
            if let Some(Backlog {
                of: BacklogOf::Subscription { confirm, .. },
                read,
                ..
            }) = self.backlogs.get_mut(index)
                && (is_full || *read >= window)
            {
                let confirm = confirm.take();
                self.send_confirmation(confirm).await?;
            }
        }
        Ok(())
    }

    async fn send_confirmation(
        &mut self,
        confirm: Option<(Vec<ContactId>, Vec<String>)>,
    ) -> Result<(), End> {
        let Some((contacts, denied)) = confirm else {
            return Ok(());
        };
        let frame = DaemonFrame::Subscribed {
            contacts: &contacts,
            denied: &denied,
        };
        send(&mut self.socket, &frame).await
    }

    fn put_off(&mut self, error: &StorageError) -> Result<(), End> {
        tracing::debug!(connection = self.connection, error = %chain(error), "could not read a backlog");
        if !error.is_transient() {
            return Err(End::Close(Close::ShuttingDown));
        }
        self.backlog_at = Instant::now() + BACKLOG_RETRY;
        Ok(())
    }

    /// Sends again what was not acknowledged, and ends a connection whose time is over.
    async fn tick(&mut self) -> Result<(), End> {
        let now = self.shared.clock.now();
        // A token may be valid to the end of time, behind which there is none.
        let over = self.identity.expires_at.checked_add_signed(LEEWAY);
        if over.is_some_and(|over| now >= over) {
            return Err(End::Close(Close::NotAuthenticated));
        }
        let (at, timeout) = (Instant::now(), self.shared.ack_timeout);
        self.open.retain(|_, open| {
            open.published
                .expires_at
                .is_none_or(|expires_at| expires_at > now)
        });
        if self.shared.hub.is_paused() {
            return Ok(());
        }
        let oldest = self.open.values().map(|open| open.first_sent).min();
        if oldest.is_some_and(|sent| at.duration_since(sent.max(self.last_ack)) >= timeout * 2) {
            return Err(End::Close(Close::NotAcknowledging));
        }
        let mut again: Vec<Arc<Published>> = self
            .open
            .values()
            .filter(|open| at.duration_since(open.sent) >= timeout)
            .map(|open| open.published.clone())
            .collect();
        again.sort_by_key(|published| (published.rank, published.seq));
        for part in again.chunks(READ) {
            self.send_again(part).await?;
        }
        Ok(())
    }

    /// Sends again what is still there. That an event was deleted may not have been told, where the
    /// session did not keep up or another program deleted it; then it is told now.
    async fn send_again(&mut self, again: &[Arc<Published>]) -> Result<(), End> {
        let ids: Vec<EventId> = again.iter().map(|published| published.id).collect();
        let found = self
            .shared
            .events
            .find_by_ids(&self.reader.tenant, &ids)
            .await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                // They are due at the next tick too.
                tracing::debug!(connection = self.connection, error = %chain(&error), "could not look at what is to be sent again");
                return Ok(());
            }
        };
        let (audience, now) = (self.reader.audience, self.shared.clock.now());
        let there: HashSet<EventId> = found
            .iter()
            .filter(|event| event.is_visible_to(audience, now))
            .map(|event| event.id)
            .collect();
        for published in again {
            if there.contains(&published.id) {
                self.send_event(published.clone(), true).await?;
            } else if published.expires_at.is_none_or(|at| at > now) {
                self.send_removed(published.id, published.contact_id)
                    .await?;
            }
        }
        Ok(())
    }

    async fn refuse(
        &mut self,
        problem: &str,
        title: &str,
        status: u16,
        detail: String,
    ) -> Result<(), End> {
        send(
            &mut self.socket,
            &DaemonFrame::Error {
                problem,
                title,
                status,
                detail,
            },
        )
        .await
    }
}

impl Drop for Session {
    /// A session that panics leaves nothing in the hub either.
    fn drop(&mut self) {
        self.leave();
    }
}

/// The place of an event in the order of recording, opaque to clients.
fn cursor(seq: i64) -> String {
    format!("{seq:x}")
}

/// Waits for the first frame, which must be a token.
async fn authenticate(shared: &SessionSettings, socket: &mut WebSocket) -> Result<Identity, End> {
    let received = tokio::select! {
        received = tokio::time::timeout(AUTH_TIME, first_text(socket)) => received,
        () = shared.stop.cancelled() => return Err(End::Close(Close::ShuttingDown)),
    };
    let Ok(text) = received else {
        return Err(End::Close(Close::NotAuthenticated));
    };
    match serde_json::from_str(&text?) {
        Ok(ClientFrame::Auth { token }) => shared.access.verify(&token).map_err(|error| {
            tracing::debug!(%error, "a socket's token is not taken");
            End::Close(Close::NotAuthenticated)
        }),
        Ok(_) => Err(End::Close(Close::NotAuthenticated)),
        Err(_) => Err(End::Close(Close::BadFrame)),
    }
}

async fn first_text(socket: &mut WebSocket) -> Result<axum::extract::ws::Utf8Bytes, End> {
    loop {
        match socket.recv().await {
            Some(Ok(Message::Text(text))) => return Ok(text),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Binary(_))) => return Err(End::Close(Close::BadFrame)),
            _ => return Err(End::Gone),
        }
    }
}

async fn send(socket: &mut WebSocket, frame: &DaemonFrame<'_>) -> Result<(), End> {
    let text = serde_json::to_string(frame).expect("a frame serialises");
    match tokio::time::timeout(SEND_TIME, socket.send(Message::text(text))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_gone)) => Err(End::Gone),
        Err(_slow) => Err(End::Close(Close::NotAcknowledging)),
    }
}

/// Says why, and closes.
async fn bye(socket: &mut WebSocket, end: &End) {
    let End::Close(close) = end else { return };
    let retry_ms = RETRY_MS + rand::random_range(0..=RETRY_SPREAD_MS);
    let frame = DaemonFrame::Bye {
        code: close.code(),
        retry_ms,
    };
    let goodbye = async {
        if send(socket, &frame).await.is_ok() {
            let frame = CloseFrame {
                code: close.code(),
                reason: close.reason().into(),
            };
            // The client may be gone by now; there is nobody to tell.
            drop(socket.send(Message::Close(Some(frame))).await);
        }
    };
    // The same for one that does not read.
    drop(tokio::time::timeout(BYE_TIME, goodbye).await);
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn event(number: u128) -> EventId {
        let version_7 = 0x0190_b5f0_0000_7000_8000_u128 << 48;
        EventId::new(Uuid::from_u128(version_7 | number)).unwrap()
    }

    fn contact(number: u128) -> ContactId {
        ContactId::new(Uuid::from_u128(number)).unwrap()
    }

    #[test]
    fn what_was_sent_is_remembered_over_a_window_and_the_pushes_that_wait() {
        for window in [1, 256, 10_000] {
            let mut recent = Recent::new(window);
            let held = window + PUSHES;
            for number in 0..10 * held {
                recent.insert(event(number as u128), contact(1));
            }
            let newest = 9 * held..10 * held;
            assert!(
                newest
                    .into_iter()
                    .all(|n| recent.contains(event(n as u128)))
            );
            assert!(!recent.contains(event(0)));
            assert!(recent.order.len() == recent.ids.len() && recent.ids.len() <= 2 * held);
        }
    }

    #[test]
    fn what_was_sent_of_a_contact_that_is_not_watched_any_more_is_forgotten() {
        let mut recent = Recent::new(1);
        recent.insert(event(1), contact(1));
        recent.insert(event(2), contact(2));
        recent.forget(&[contact(1)]);
        assert!(!recent.contains(event(1)));
        assert!(recent.contains(event(2)));
    }
}
