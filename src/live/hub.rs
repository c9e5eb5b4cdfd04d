//! The hub: which connections of this daemon watch which contacts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use chrono::{DateTime, Utc};
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::{mpsc, watch};

use crate::domain::{Audience, ContactEvent, ContactId, EventId, TenantId};
use crate::storage::{ErasedEvent, Undelivered};

/// What a session is handed.
#[derive(Debug, Clone)]
pub enum Push {
    /// An event that its audience may see; serialised once for all its receivers.
    Event(Arc<Published>),
    /// A receipt of an event that its audience may see.
    Receipt {
        /// The event.
        event_id: EventId,
        /// Whose timeline it is in.
        contact_id: ContactId,
        /// When it was delivered, if that is what is told.
        delivered_at: Option<DateTime<Utc>>,
        /// When it was read, if that is what is told.
        read_at: Option<DateTime<Utc>>,
    },
    /// An event is gone.
    Removed {
        /// The event.
        event_id: EventId,
        /// Whose timeline it was in.
        contact_id: ContactId,
    },
}

/// An event on its way to connections.
#[derive(Debug)]
pub struct Published {
    /// The event's id.
    pub id: EventId,
    /// Whose timeline it is in.
    pub contact_id: ContactId,
    /// The order of recording.
    pub seq: i64,
    /// 0 urgent … 3 low.
    pub rank: usize,
    /// When it expires.
    pub expires_at: Option<DateTime<Utc>>,
    /// The event as JSON.
    pub json: Box<RawValue>,
}

impl From<&Undelivered> for Published {
    fn from(undelivered: &Undelivered) -> Self {
        let event = &undelivered.event;
        Self {
            id: event.id,
            contact_id: event.contact_id,
            seq: undelivered.seq,
            rank: usize::try_from(undelivered.rank).unwrap_or(3).min(3),
            expires_at: event.expires_at,
            json: to_raw_value(event).expect("an event serialises"),
        }
    }
}

/// A connection's ear: what the hub needs to reach it. The channel is bounded; a connection that
/// does not keep up is told from where on it missed something, and reads that from the store.
#[derive(Debug, Clone)]
pub(super) struct Ear {
    pub(super) connection: u64,
    pub(super) audience: Audience,
    pub(super) pushes: mpsc::Sender<Push>,
    pub(super) missed: Arc<Missed>,
}

/// For each rank the lowest seq that a connection missed; `i64::MAX` where it missed none.
#[derive(Debug)]
pub(super) struct Missed([AtomicI64; 4]);

impl Default for Missed {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicI64::new(i64::MAX)))
    }
}

impl Missed {
    pub(super) fn note(&self, rank: usize, seq: i64) {
        self.0[rank].fetch_min(seq, Ordering::AcqRel);
    }

    /// What was missed since the last call; `None`: nothing.
    pub(super) fn take(&self) -> Option<[i64; 4]> {
        let taken = std::array::from_fn(|rank| self.0[rank].swap(i64::MAX, Ordering::AcqRel));
        (taken != [i64::MAX; 4]).then_some(taken)
    }
}

type Watchers = HashMap<TenantId, HashMap<ContactId, Vec<Ear>>>;

/// Who watches what on this daemon.
#[derive(Debug, Default)]
pub struct Hub {
    watchers: RwLock<Watchers>,
    connections: AtomicU64,
    open: AtomicU64,
    /// Whether delivery is paused.
    paused: watch::Sender<bool>,
}

/// A connection that is open; a session that panics ends it too.
pub(super) struct Connected {
    pub(super) number: u64,
    hub: Arc<Hub>,
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.hub.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Hub {
    /// Counts a new connection, until the answer is dropped.
    pub(super) fn connect(self: &Arc<Self>) -> Connected {
        self.open.fetch_add(1, Ordering::Relaxed);
        Connected {
            number: self.connections.fetch_add(1, Ordering::Relaxed) + 1,
            hub: self.clone(),
        }
    }

    /// Holds all events back, or no longer. Answers whether that is news.
    pub(super) fn set_paused(&self, is_paused: bool) -> bool {
        self.paused
            .send_if_modified(|was_paused| std::mem::replace(was_paused, is_paused) != is_paused)
    }

    /// Whether all events are held back.
    pub(super) fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Tells when a pause begins and ends.
    pub(super) fn pauses(&self) -> watch::Receiver<bool> {
        self.paused.subscribe()
    }

    /// How many connections are open.
    #[must_use]
    pub fn open_connections(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn watch(&self, tenant: &TenantId, contacts: &[ContactId], ear: &Ear) {
        let mut watchers = self
            .watchers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let tenant = watchers.entry(tenant.clone()).or_default();
        for contact in contacts {
            let ears = tenant.entry(*contact).or_default();
            if !ears.iter().any(|known| known.connection == ear.connection) {
                ears.push(ear.clone());
            }
        }
    }

    pub(super) fn unwatch(&self, tenant: &TenantId, contacts: &[ContactId], connection: u64) {
        let mut watchers = self
            .watchers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let Some(of_tenant) = watchers.get_mut(tenant) else {
            return;
        };
        for contact in contacts {
            if let Some(ears) = of_tenant.get_mut(contact) {
                ears.retain(|ear| ear.connection != connection);
                if ears.is_empty() {
                    of_tenant.remove(contact);
                }
            }
        }
        if of_tenant.is_empty() {
            watchers.remove(tenant);
        }
    }

    /// Whether anybody here watches the contact.
    #[must_use]
    pub fn is_watched(&self, tenant: &str, contact: ContactId) -> bool {
        let watchers = self.watchers.read().unwrap_or_else(PoisonError::into_inner);
        watchers
            .get(tenant)
            .is_some_and(|contacts| contacts.contains_key(&contact))
    }

    /// Whether anybody but `connection` watches the contact.
    pub(super) fn is_watched_by_others(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        connection: Option<u64>,
    ) -> bool {
        let watchers = self.watchers.read().unwrap_or_else(PoisonError::into_inner);
        watchers
            .get(tenant)
            .and_then(|contacts| contacts.get(&contact))
            .is_some_and(|ears| ears.iter().any(|ear| Some(ear.connection) != connection))
    }

    /// Hands an event to every connection that watches its contact and may see it. Answers whether
    /// there was one.
    pub fn publish(&self, undelivered: &Undelivered, now: DateTime<Utc>) -> bool {
        let event = &undelivered.event;
        let mut published = None;
        self.each_watcher(&event.tenant_id, event.contact_id, |ear| {
            if !event.is_visible_to(ear.audience, now) || event.is_expired(now) {
                return;
            }
            let published = published.get_or_insert_with(|| Arc::new(Published::from(undelivered)));
            if ear.pushes.try_send(Push::Event(published.clone())).is_err() {
                ear.missed.note(published.rank, published.seq);
            }
        });
        published.is_some()
    }

    /// Tells a receipt to the watchers that may see the event, save the connection it came from.
    pub fn tell_receipt(
        &self,
        event: &ContactEvent,
        delivered_at: Option<DateTime<Utc>>,
        read_at: Option<DateTime<Utc>>,
        from: Option<u64>,
        now: DateTime<Utc>,
    ) {
        let (event_id, contact_id) = (event.id, event.contact_id);
        self.each_watcher(&event.tenant_id, contact_id, |ear| {
            if Some(ear.connection) != from && event.is_visible_to(ear.audience, now) {
                let receipt = Push::Receipt {
                    event_id,
                    contact_id,
                    delivered_at,
                    read_at,
                };
                // Receipts are hints: one that finds no place is not repeated.
                drop(ear.pushes.try_send(receipt));
            }
        });
    }

    /// Tells that an event is gone to the watchers that could see it.
    pub fn tell_removed(&self, event: &ContactEvent, now: DateTime<Utc>) {
        let (event_id, contact_id) = (event.id, event.contact_id);
        self.each_watcher(&event.tenant_id, contact_id, |ear| {
            if event.is_visible_to(ear.audience, now) {
                drop(ear.pushes.try_send(Push::Removed {
                    event_id,
                    contact_id,
                }));
            }
        });
    }

    /// Tells the watchers of a contact that events of it are erased.
    pub fn tell_erased(
        &self,
        tenant: &TenantId,
        contact_id: ContactId,
        erased: &[ErasedEvent],
        now: DateTime<Utc>,
    ) {
        self.each_watcher(tenant, contact_id, |ear| {
            for event in erased {
                if event.was_visible_to(ear.audience, now) {
                    drop(ear.pushes.try_send(Push::Removed {
                        event_id: event.id,
                        contact_id,
                    }));
                }
            }
        });
    }

    fn each_watcher(&self, tenant: &TenantId, contact: ContactId, mut tell: impl FnMut(&Ear)) {
        let watchers = self.watchers.read().unwrap_or_else(PoisonError::into_inner);
        let ears = watchers
            .get(tenant)
            .and_then(|contacts| contacts.get(&contact));
        ears.into_iter().flatten().for_each(&mut tell);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_panics_counts_as_open_no_more() {
        let hub = Arc::new(Hub::default());
        let first = hub.connect();
        let panicked = std::panic::catch_unwind(|| {
            let second = hub.connect();
            assert_eq!((second.number, hub.open_connections()), (2, 2));
            panic!("as a session might");
        });
        assert!(panicked.is_err());
        assert_eq!(hub.open_connections(), 1);
        drop(first);
        assert_eq!(hub.open_connections(), 0);
    }
}
