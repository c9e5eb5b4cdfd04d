//! Acknowledgements, gathered for a moment and written in sets.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Hub, LiveCounts};
use crate::domain::{Audience, Clock, ContactId, EventId, Subject, TenantId};
use crate::storage::{EventRepository, Receipt, StorageResult, View};
use crate::telemetry::chain;

/// How long acknowledgements gather.
const GATHER: Duration = Duration::from_millis(3);
/// How many messages are written at a time.
const AT_ONCE: usize = 1024;
/// Acknowledgements that may wait; beyond, sessions wait, and their clients with them.
const QUEUE: usize = 4096;
/// Between two tries to reach a database that is away.
const RETRY: Duration = Duration::from_millis(500);

/// What a connection says of events.
#[derive(Debug)]
pub struct Acknowledgement {
    /// Which connection.
    pub connection: u64,
    /// Whose events.
    pub tenant: TenantId,
    /// The connection's audience.
    pub audience: Audience,
    /// The contacts that it watches, where the ids are not known to be of those.
    pub contacts: Option<Vec<ContactId>>,
    /// Who.
    pub by: Subject,
    /// Which events.
    pub ids: Vec<EventId>,
    /// Taken or read.
    pub kind: AckKind,
}

/// What is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AckKind {
    /// The event was taken.
    Delivered,
    /// The event was read.
    Read,
}

/// Writes acknowledgements and tells the other watchers.
pub struct Acknowledger {
    events: Arc<dyn EventRepository>,
    hub: Arc<Hub>,
    clock: Arc<dyn Clock>,
    counts: Arc<LiveCounts>,
}

/// Acknowledgements that one statement can write.
#[derive(PartialEq, Eq, Hash)]
struct Group {
    tenant: TenantId,
    audience: Audience,
    contacts: Option<Vec<ContactId>>,
    by: Subject,
    kind: AckKind,
}

impl Acknowledger {
    /// The task that writes, and where to send what it is to write.
    #[must_use]
    pub fn new(
        events: Arc<dyn EventRepository>,
        hub: Arc<Hub>,
        clock: Arc<dyn Clock>,
        counts: Arc<LiveCounts>,
    ) -> (
        Self,
        mpsc::Sender<Acknowledgement>,
        mpsc::Receiver<Acknowledgement>,
    ) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        (
            Self {
                events,
                hub,
                clock,
                counts,
            },
            sender,
            receiver,
        )
    }

    /// Writes until every sender is gone, or `abort`.
    pub async fn run(self, mut queue: mpsc::Receiver<Acknowledgement>, abort: CancellationToken) {
        let mut batch = Vec::new();
        while queue.recv_many(&mut batch, AT_ONCE).await > 0 {
            tokio::time::sleep(GATHER).await;
            while batch.len() < AT_ONCE
                && let Ok(more) = queue.try_recv()
            {
                batch.push(more);
            }
            let mut groups: HashMap<Group, Vec<(EventId, u64)>> = HashMap::new();
            for ack in batch.drain(..) {
                let Acknowledgement {
                    connection,
                    tenant,
                    audience,
                    contacts,
                    by,
                    ids,
                    kind,
                } = ack;
                let group = Group {
                    tenant,
                    audience,
                    contacts,
                    by,
                    kind,
                };
                groups
                    .entry(group)
                    .or_default()
                    .extend(ids.into_iter().map(|id| (id, connection)));
            }
            // At once, so that on SQLite they share a commit.
            let writes = groups
                .into_iter()
                .map(|(group, ids)| self.write(group, ids, &abort));
            futures_util::future::join_all(writes).await;
        }
    }

    async fn write(&self, group: Group, ids: Vec<(EventId, u64)>, abort: &CancellationToken) {
        let from: HashMap<EventId, u64> = ids.into_iter().collect();
        let ids: Vec<EventId> = from.keys().copied().collect();
        loop {
            let error = match self.try_write(&group, &ids, &from).await {
                Ok(()) => return,
                Err(error) => error,
            };
            if !error.is_transient() {
                // The events wait on in the outbox. The connections that acknowledged them count
                // them as taken; they come again with the next subscription of their contacts.
                tracing::error!(error = %chain(&error), "could not record acknowledgements");
                return;
            }
            tracing::debug!(error = %chain(&error), "could not record acknowledgements; trying again");
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = abort.cancelled() => return,
            }
        }
    }

    async fn try_write(
        &self,
        group: &Group,
        ids: &[EventId],
        from: &HashMap<EventId, u64>,
    ) -> StorageResult<()> {
        let now = self.clock.now();
        let contacts = group.contacts.as_deref();
        let receipts = match group.kind {
            // Services see everything, but nothing waits for them.
            AckKind::Delivered if group.audience == Audience::Audit => return Ok(()),
            AckKind::Delivered => {
                let audience = Some(group.audience);
                self.events
                    .mark_delivered(&group.tenant, audience, ids, contacts, &group.by, now)
                    .await
                    .inspect(|ended| {
                        self.counts
                            .delivered
                            .fetch_add(ended.len() as u64, Ordering::Relaxed);
                    })?
            }
            AckKind::Read => {
                let view = View::of(group.audience, now);
                self.events
                    .mark_read(&group.tenant, ids, contacts, &group.by, view)
                    .await?
            }
        };
        self.tell(&group.tenant, group.kind, &receipts, from).await
    }

    /// Tells new receipts to the other watchers of their contacts.
    ///
    /// # Errors
    /// Those of storage: what a watcher may see is read from there.
    async fn tell(
        &self,
        tenant: &TenantId,
        kind: AckKind,
        receipts: &[Receipt],
        from: &HashMap<EventId, u64>,
    ) -> StorageResult<()> {
        let watched: Vec<EventId> = receipts
            .iter()
            .filter(|receipt| {
                let from = from.get(&receipt.event_id).copied();
                receipt.is_new
                    && self
                        .hub
                        .is_watched_by_others(tenant, receipt.contact_id, from)
            })
            .map(|receipt| receipt.event_id)
            .collect();
        if watched.is_empty() {
            return Ok(());
        }
        let now = self.clock.now();
        for event in self.events.find_by_ids(tenant, &watched).await? {
            let Some(receipt) = receipts.iter().find(|receipt| receipt.event_id == event.id) else {
                continue;
            };
            let at = |wanted| (kind == wanted).then_some(receipt.at);
            let connection = from.get(&event.id).copied();
            self.hub.tell_receipt(
                &event,
                at(AckKind::Delivered),
                at(AckKind::Read),
                connection,
                now,
            );
        }
        Ok(())
    }
}
