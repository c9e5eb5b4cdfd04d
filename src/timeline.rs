//! The use cases of a timeline: each exists once, and HTTP, sockets, jobs and the command line share
//! it. Truth first, then haste: an event is announced after its commit.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use crate::access::Reader;
use crate::domain::{
    Audience, Clock, ContactEvent, ContactId, EventId, Invalid, NewContactEvent, TenantId,
};
use crate::live::Hub;
use crate::storage::{EventRepository, Idempotency, Recording, Saved, StorageError, View};

/// The longest idempotency key, in characters.
pub const MAX_IDEMPOTENCY_KEY: usize = 255;

/// What a caller gave to make a repeat of a create harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeatable {
    /// The `Idempotency-Key`; without one, an id that was given serves.
    pub key: Option<String>,
    /// SHA-256 of the request.
    pub body_hash: [u8; 32],
}

impl Repeatable {
    /// The mark of a request with this body for this contact. The body counts as JSON: white space
    /// and the order of keys do not matter.
    #[must_use]
    pub fn new(key: Option<String>, contact: ContactId, body: &serde_json::Value) -> Self {
        let mut hash = Sha256::new();
        hash.update(contact.uuid().as_bytes());
        // A `Value`'s keys are sorted, so its text is canonical.
        hash.update(body.to_string().as_bytes());
        Self {
            key,
            body_hash: hash.finalize().into(),
        }
    }
}

/// A create that was answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Created {
    /// The event is new.
    New(ContactEvent),
    /// The same request was answered before; the event as it is now.
    Repeat(ContactEvent),
}

/// Why a use case was refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The event breaks rules.
    #[error("the event is not valid")]
    Invalid(#[from] Invalid),
    /// The idempotency key was used for another request.
    #[error("the idempotency key was used within 24 hours for another request")]
    KeyReused,
    /// The tenant has another event with this id.
    #[error("there is another event with this id")]
    IdTaken,
    /// There is no such event for this reader.
    #[error("there is no such event")]
    NotFound,
    /// The reader sees the event, but it waits for another audience.
    #[error("the event waits for another audience")]
    NotTheAudience,
    /// An expired event is not delivered any more.
    #[error("the event has expired")]
    Expired,
    /// Nobody may see the event, so nobody can have been given it.
    #[error("the event is visible to nobody")]
    VisibleToNobody,
    /// A legal hold keeps it.
    #[error("a legal hold keeps it; release the hold first")]
    Held,
    /// The store failed.
    #[error(transparent)]
    Storage(StorageError),
}

impl From<StorageError> for Refusal {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Held => Self::Held,
            other => Self::Storage(other),
        }
    }
}

/// The use cases.
#[derive(Clone)]
pub struct Timeline {
    /// The store.
    pub events: Arc<dyn EventRepository>,
    /// Who watches here.
    pub hub: Arc<Hub>,
    /// This machine's clock.
    pub clock: Arc<dyn Clock>,
    /// Wakes the pump.
    pub wake: Arc<Notify>,
}

impl Timeline {
    /// Records an event; durable when this returns.
    ///
    /// # Errors
    /// Where it breaks a rule, its key or id is taken, or the store fails.
    pub async fn create(
        &self,
        tenant: &TenantId,
        event: NewContactEvent,
        repeatable: Option<Repeatable>,
    ) -> Result<Created, Refusal> {
        let given_id = event.given_id();
        let idempotency = repeatable.and_then(|Repeatable { key, body_hash }| {
            // Different spaces, so that nobody's key can be taken for an id.
            let key = match (key, given_id) {
                (Some(key), _) => format!("key:{key}"),
                (None, Some(id)) => format!("id:{id}"),
                (None, None) => return None,
            };
            Some(Idempotency { key, body_hash })
        });
        let now = self.clock.now();
        let event = match (event.record(tenant, now), &idempotency) {
            (Ok(event), _) => event,
            // A repeat may come after the expiry that the first request named in time.
            (Err(invalid), Some(request)) => {
                return match self.events.find_repeat(tenant, request, now).await? {
                    Some(id) => self.repeat(tenant, id).await,
                    None => Err(invalid.into()),
                };
            }
            (Err(invalid), None) => return Err(invalid.into()),
        };
        let recording = Recording {
            event: event.clone(),
            idempotency,
        };
        let saved = self.events.save(tenant, vec![recording]).await?;
        match saved.first() {
            Some(Saved::Created) => {
                if event.is_realtime {
                    self.wake.notify_one();
                }
                Ok(Created::New(event))
            }
            Some(Saved::Repeat(id)) => self.repeat(tenant, *id).await,
            Some(Saved::Mismatch) => Err(Refusal::KeyReused),
            Some(Saved::IdTaken) | None => Err(Refusal::IdTaken),
        }
    }

    /// What a repeat is answered with: the event as it is now.
    async fn repeat(&self, tenant: &TenantId, id: EventId) -> Result<Created, Refusal> {
        let event = self.events.find_by_id(tenant, id).await?;
        event.map(Created::Repeat).ok_or(Refusal::NotFound)
    }

    /// An event as a reader sees it.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] where there is none for this reader.
    pub async fn find(&self, reader: &Reader, id: EventId) -> Result<ContactEvent, Refusal> {
        let event = self.events.find_by_id(&reader.tenant, id).await?;
        let now = self.clock.now();
        event
            .filter(|event| {
                reader.may_see(event.contact_id) && event.is_visible_to(reader.audience, now)
            })
            .ok_or(Refusal::NotFound)
    }

    /// Records that the reader read an event. Answers this reader's first time.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] where there is none for this reader.
    pub async fn mark_read(&self, reader: &Reader, id: EventId) -> Result<DateTime<Utc>, Refusal> {
        let now = self.clock.now();
        let include_expired = reader.audience == Audience::Audit;
        let view = View {
            audience: reader.audience,
            now,
            include_expired,
        };
        let contacts = reader.contact_list();
        let receipts = self
            .events
            .mark_read(
                &reader.tenant,
                &[id],
                contacts.as_deref(),
                &reader.subject,
                view,
            )
            .await?;
        let receipt = receipts.first().ok_or(Refusal::NotFound)?;
        if receipt.is_new
            && self
                .hub
                .is_watched(reader.tenant.as_str(), receipt.contact_id)
            && let Some(event) = self.events.find_by_id(&reader.tenant, id).await?
        {
            self.hub
                .tell_receipt(&event, None, Some(receipt.at), None, now);
        }
        Ok(receipt.at)
    }

    /// Records that an event was delivered. Answers when it first was.
    ///
    /// # Errors
    /// Where there is no such event for this reader, or it waits for another audience.
    pub async fn mark_delivered(
        &self,
        reader: &Reader,
        id: EventId,
    ) -> Result<DateTime<Utc>, Refusal> {
        let event = self.find(reader, id).await?;
        let now = self.clock.now();
        let audience = event
            .visibility
            .delivered_to()
            .ok_or(Refusal::VisibleToNobody)?;
        if reader.audience != Audience::Audit && reader.audience != audience {
            return Err(Refusal::NotTheAudience);
        }
        if let Some(at) = event.delivery.delivered_at() {
            return Ok(at);
        }
        if event.is_expired(now) {
            return Err(Refusal::Expired);
        }
        let at = self
            .events
            .record_delivered(&reader.tenant, id, audience, &reader.subject, now)
            .await?
            // Deleted since it was found.
            .ok_or(Refusal::NotFound)?;
        self.hub.tell_receipt(&event, Some(at), None, None, now);
        Ok(at)
    }

    /// Deletes an event with its receipts.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] where there is none for this reader, [`Refusal::Held`] under a hold.
    pub async fn delete(&self, reader: &Reader, id: EventId) -> Result<(), Refusal> {
        let event = self.find(reader, id).await?;
        let now = self.clock.now();
        let deleted = self
            .events
            .delete(&reader.tenant, id, &reader.subject, now)
            .await?;
        deleted.ok_or(Refusal::NotFound)?;
        self.hub.tell_removed(&event, now);
        Ok(())
    }
}
