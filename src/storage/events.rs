//! The repository of events: its operations and the values that they take and give.

use std::collections::{BTreeMap, HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::{Fence, StorageResult};
use crate::domain::{
    Audience, Category, ContactEvent, ContactId, EventId, EventType, JsonObject, SessionId,
    Subject, TenantId, Visibility,
};

/// Totals are counted exactly up to here; beyond, counting would cost more than the page.
pub const MAX_EXACT_TOTAL: u32 = 10_000;

/// An event to be saved, and what makes a repeat of its request harmless.
#[derive(Debug, Clone)]
pub struct Recording {
    /// The event.
    pub event: ContactEvent,
    /// Present where the caller gave an idempotency key or an id.
    pub idempotency: Option<Idempotency>,
}

/// The mark of a request: kept for 24 hours, per tenant, in the event's own transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// The caller's key.
    pub key: String,
    /// SHA-256 of the request.
    pub body_hash: [u8; 32],
}

/// What became of a [`Recording`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// It is durable.
    Created,
    /// The same request was answered before, with this event.
    Repeat(EventId),
    /// The key was used within 24 hours for another request.
    Mismatch,
    /// The tenant has another event with this id.
    IdTaken,
}

/// What became of an event that was imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Imported {
    /// It is durable.
    Created,
    /// The tenant has it already. What may change, it has kept: visibility, expiry and receipts.
    Existing,
    /// The tenant has another event with this id, which stays as it is.
    Conflict {
        /// The fields in which they differ; none where the other one cannot be read.
        fields: Vec<&'static str>,
    },
}

/// Through whose eyes events are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// The reader's audience.
    pub audience: Audience,
    /// Events that expired by then are hidden …
    pub now: DateTime<Utc>,
    /// … unless this is set, which only audit may.
    pub include_expired: bool,
}

impl View {
    /// What `audience` sees at `now`.
    #[must_use]
    pub fn of(audience: Audience, now: DateTime<Utc>) -> Self {
        Self {
            audience,
            now,
            include_expired: false,
        }
    }

    /// Everything there is.
    #[must_use]
    pub fn everything(now: DateTime<Utc>) -> Self {
        Self {
            audience: Audience::Audit,
            now,
            include_expired: true,
        }
    }

    /// The instant by which an event must not have expired; `None` where expired ones show.
    pub(super) fn unexpired_at(&self) -> Option<DateTime<Utc>> {
        let hides = !(self.include_expired && self.audience == Audience::Audit);
        hides.then_some(self.now)
    }
}

/// Which events of a timeline are wanted; nothing set wants all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only this category.
    pub category: Option<Category>,
    /// Only this type.
    pub event_type: Option<EventType>,
    /// Happened at or after this.
    pub since: Option<DateTime<Utc>>,
    /// Happened before this.
    pub until: Option<DateTime<Utc>>,
}

/// The place of an event in a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// When it happened.
    pub occurred_at: DateTime<Utc>,
    /// Breaks ties.
    pub id: EventId,
}

impl From<&ContactEvent> for Key {
    fn from(event: &ContactEvent) -> Self {
        Self {
            occurred_at: event.occurred_at,
            id: event.id,
        }
    }
}

/// Where a page begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// After so many events; costs as many reads.
    Offset(u32),
    /// Behind this one, in the order of the list; costs the same at any depth.
    After(Key),
}

/// One page of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// At most so many events.
    pub limit: u32,
    /// Where it begins.
    pub position: Position,
}

impl Page {
    /// The first `limit` events.
    #[must_use]
    pub fn first(limit: u32) -> Self {
        Self {
            limit,
            position: Position::Offset(0),
        }
    }

    /// `limit` events behind `key`.
    #[must_use]
    pub fn after(limit: u32, key: Key) -> Self {
        Self {
            limit,
            position: Position::After(key),
        }
    }
}

/// A page of events and where the next one begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// The events, in the order of the list.
    pub events: Vec<ContactEvent>,
    /// Set where there is more.
    pub next: Option<Key>,
}

/// A change of the only two things that may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Change {
    /// The new visibility.
    pub visibility: Option<Visibility>,
    /// The new expiry; `Some(None)` removes it.
    pub expires_at: Option<Option<DateTime<Utc>>>,
}

/// Where a reader of the outbox's tail stands; opaque outside the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailMark {
    /// SQLite: the last seq that was read.
    Seq(i64),
    /// PostgreSQL: the snapshot of the last look, as text.
    Snapshot(String),
}

/// One new row of the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailEntry {
    /// The order of recording.
    pub seq: i64,
    /// 0 urgent … 3 low.
    pub rank: i16,
    /// Whose it is.
    pub tenant_id: TenantId,
    /// Whose timeline it is in.
    pub contact_id: ContactId,
    /// The event.
    pub event_id: EventId,
}

/// What the outbox gained since a mark.
#[derive(Debug, Clone)]
pub struct Tail {
    /// The rows that the caller wanted to keep, by rank and seq.
    pub entries: Vec<TailEntry>,
    /// Where the next look begins.
    pub mark: TailMark,
    /// When the first expires of all that waits in the outbox. It comes with the look, so that nobody
    /// asks each second whether anything has expired.
    pub first_expiry: Option<DateTime<Utc>>,
}

/// An undelivered event with its place in the backlog.
#[derive(Debug, Clone, PartialEq)]
pub struct Undelivered {
    /// The order of recording.
    pub seq: i64,
    /// 0 urgent … 3 low.
    pub rank: i16,
    /// The event.
    pub event: ContactEvent,
}

/// A part of a backlog.
///
/// How far it reaches comes from the outbox's rows, not from the events: one that cannot be read,
/// or is gone by now, must not end a backlog that goes on behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct Backlog {
    /// The events, by priority, then age.
    pub events: Vec<Undelivered>,
    /// For each rank, the seq behind which the next part begins.
    pub reached: [i64; 4],
    /// Whether nothing waits behind it.
    pub is_end: bool,
}

/// A receipt that was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// The event.
    pub event_id: EventId,
    /// Whose timeline it is in.
    pub contact_id: ContactId,
    /// When it was delivered, or first read by this reader.
    pub at: DateTime<Utc>,
    /// False where the receipt had been recorded before.
    pub is_new: bool,
}

/// Events, and the outbox, deliveries and reads beside them.
///
/// Every operation takes the tenant, save those that maintenance uses across tenants. All are
/// set-wise: none loops over single-row writes.
#[async_trait]
pub trait EventRepository: Send + Sync + 'static {
    /// Saves events of a tenant in one transaction; durable when it returns. Answers in the order
    /// given.
    async fn save(&self, tenant: &TenantId, batch: Vec<Recording>) -> StorageResult<Vec<Saved>>;

    /// Saves events of a tenant that were recorded elsewhere, in one transaction; durable when it
    /// returns. They keep their times, and what was delivered or read stays so, by the word of `by`: it
    /// does not wait again. Answers in the order given.
    async fn import(
        &self,
        tenant: &TenantId,
        events: Vec<ContactEvent>,
        by: &Subject,
    ) -> StorageResult<Vec<Imported>>;

    /// Changes visibility or expiry, moves the delivery accordingly and leaves an audit row.
    /// `None` where the tenant has no such event.
    async fn update(
        &self,
        tenant: &TenantId,
        id: EventId,
        change: Change,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<ContactEvent>>;

    /// One event, whoever may see it.
    async fn find_by_id(
        &self,
        tenant: &TenantId,
        id: EventId,
    ) -> StorageResult<Option<ContactEvent>>;

    /// Those of `ids` that the tenant has, whoever may see them, in no order.
    async fn find_by_ids(
        &self,
        tenant: &TenantId,
        ids: &[EventId],
    ) -> StorageResult<Vec<ContactEvent>>;

    /// A contact's timeline, newest first, everything in it.
    async fn find_by_contact(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        page: Page,
    ) -> StorageResult<Slice> {
        let everything = View::everything(DateTime::<Utc>::MIN_UTC);
        self.find_by_contact_visible_to(tenant, contact, &Filter::default(), everything, page)
            .await
    }

    /// A contact's timeline as a reader sees it, newest first.
    async fn find_by_contact_visible_to(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        filter: &Filter,
        view: View,
        page: Page,
    ) -> StorageResult<Slice>;

    /// How many events [`Self::find_by_contact_visible_to`] would list in all, counted up to
    /// [`MAX_EXACT_TOTAL`]` + 1`.
    async fn count_by_contact(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        filter: &Filter,
        view: View,
    ) -> StorageResult<u32>;

    /// A session, oldest first. `contacts` limits it to those of a client.
    async fn find_by_session(
        &self,
        tenant: &TenantId,
        session: SessionId,
        contacts: Option<&[ContactId]>,
        view: View,
        page: Page,
    ) -> StorageResult<Slice>;

    /// A tenant's events of one type that happened since, newest first.
    async fn find_by_type_since(
        &self,
        tenant: &TenantId,
        event_type: &EventType,
        since: DateTime<Utc>,
        view: View,
        page: Page,
    ) -> StorageResult<Slice>;

    /// A tenant's events of one category that happened since, newest first.
    async fn find_by_category_since(
        &self,
        tenant: &TenantId,
        category: Category,
        since: DateTime<Utc>,
        view: View,
        page: Page,
    ) -> StorageResult<Slice>;

    /// The contact's realtime events that wait for their audience, unexpired, oldest first.
    async fn find_undelivered_for_contact(
        &self,
        tenant: &TenantId,
        contact: ContactId,
        view: View,
        page: Page,
    ) -> StorageResult<Slice>;

    /// The backlog of watched contacts: realtime events that wait, unexpired at `now`, by priority,
    /// then age. `after` holds, for each rank, the seq behind which to read. Whoever reads filters
    /// by audience, so that it can step over what it may not see. At most `limit` are looked at.
    async fn find_undelivered_realtime(
        &self,
        tenant: &TenantId,
        contacts: &[ContactId],
        after: [i64; 4],
        now: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Backlog>;

    /// The end of the outbox as of now.
    async fn tail_end(&self) -> StorageResult<TailMark>;

    /// What the outbox gained since `mark`, across tenants; `keep` says which contacts are watched.
    /// Costs what is new, not what lies waiting.
    async fn tail(
        &self,
        mark: &TailMark,
        keep: &(dyn for<'a> Fn(&'a str, ContactId) -> bool + Send + Sync),
    ) -> StorageResult<Tail>;

    /// The events of tail entries; what is gone is left out.
    async fn find_entries(&self, entries: &[TailEntry]) -> StorageResult<Vec<Undelivered>>;

    /// Ends the wait of those among `ids` that are pending for `audience` (any, if `None`), are
    /// unexpired and belong to `contacts` (any, if `None`). Answers those that it ended.
    async fn mark_delivered(
        &self,
        tenant: &TenantId,
        audience: Option<Audience>,
        ids: &[EventId],
        contacts: Option<&[ContactId]>,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Vec<Receipt>>;

    /// Records that an event was delivered to `audience`, pending or not. Answers the first
    /// `delivered_at`, or `None` where the event is gone.
    async fn record_delivered(
        &self,
        tenant: &TenantId,
        id: EventId,
        audience: Audience,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<DateTime<Utc>>>;

    /// Records that `reader` read those among `ids` that `view` shows and that belong to `contacts`
    /// (any, if `None`). Answers all of them with this reader's first time.
    async fn mark_read(
        &self,
        tenant: &TenantId,
        ids: &[EventId],
        contacts: Option<&[ContactId]>,
        reader: &Subject,
        view: View,
    ) -> StorageResult<Vec<Receipt>>;

    /// Records as expired up to `limit` pending deliveries whose event expired by `now`, across
    /// tenants. Answers how many.
    async fn expire_undelivered(&self, now: DateTime<Utc>, limit: u32) -> StorageResult<u64>;

    /// The tenants that have events with an expiry, in order.
    async fn expiring_tenants(&self) -> StorageResult<Vec<TenantId>>;

    /// Up to `limit` events of a tenant that expired strictly before `cutoff`, first expired first.
    async fn find_expired_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
        limit: u32,
    ) -> StorageResult<Vec<ContactEvent>>;

    /// How many events of a tenant expired strictly before `cutoff`.
    async fn count_expired_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
    ) -> StorageResult<u64>;

    /// Deletes one event with its receipts and leaves an audit row. `None` where there is none,
    /// [`super::StorageError::Held`] where a hold keeps it.
    async fn delete(
        &self,
        tenant: &TenantId,
        id: EventId,
        by: &Subject,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<ContactId>>;

    /// Deletes up to `limit` events of a tenant that expired strictly before `cutoff`, first expired
    /// first, with their receipts and pending deliveries; none that a hold keeps. Answers how many; [`super::StorageError::Fenced`]
    /// where the run that `fence` names is no longer the caller's, and then nothing is deleted.
    async fn delete_expired_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
        limit: u32,
        fence: Option<Fence>,
    ) -> StorageResult<u64>;

    /// The event with which the same request was answered within the last 24 hours.
    async fn find_repeat(
        &self,
        tenant: &TenantId,
        request: &Idempotency,
        now: DateTime<Utc>,
    ) -> StorageResult<Option<EventId>>;

    /// Forgets idempotency keys made before `cutoff`, at most `limit` of a tenant. A fence is checked
    /// as by [`Self::delete_expired_before`].
    async fn delete_idempotency_before(
        &self,
        tenant: &TenantId,
        cutoff: DateTime<Utc>,
        limit: u32,
        fence: Option<Fence>,
    ) -> StorageResult<u64>;

    /// The tenants that have idempotency keys, in order.
    async fn idempotent_tenants(&self) -> StorageResult<Vec<TenantId>>;
}

/// For how long a repeat of a create is answered like the first.
pub(super) const IDEMPOTENCY_WINDOW: TimeDelta = TimeDelta::hours(24);

/// By tenant and key: the request's hash, its event, and when it was made.
pub(super) type Claims<'b> = BTreeMap<(&'b str, &'b str), (&'b [u8], EventId, DateTime<Utc>)>;

/// An idempotency key with its tenant, as it was read from the database.
pub(super) type KnownKey = (String, String);

/// Judges a batch by its idempotency keys: `fresh` ones were claimed just now, `known` ones had been
/// used, with this hash and event. Within a batch the first use of a key counts.
pub(super) fn judge(
    batch: &[Recording],
    fresh: &HashSet<KnownKey>,
    known: &HashMap<KnownKey, (Vec<u8>, EventId)>,
) -> Vec<Saved> {
    let mut used: HashMap<(&str, &str), (&[u8], EventId)> = known
        .iter()
        .map(|((tenant, key), (hash, id))| {
            ((tenant.as_str(), key.as_str()), (hash.as_slice(), *id))
        })
        .collect();
    batch
        .iter()
        .map(|recording| {
            let Some(Idempotency { key, body_hash }) = &recording.idempotency else {
                return Saved::Created;
            };
            let tenant = recording.event.tenant_id.as_str();
            match used.get(&(tenant, key.as_str())) {
                Some((hash, id)) if hash == body_hash => Saved::Repeat(*id),
                Some(_) => Saved::Mismatch,
                None => {
                    debug_assert!(
                        fresh.contains(&(tenant.to_owned(), key.clone())),
                        "a key is either fresh or known"
                    );
                    used.insert((tenant, key), (body_hash, recording.event.id));
                    Saved::Created
                }
            }
        })
        .collect()
}

/// The idempotency keys of a batch, by tenant and key, each once, with the recording that uses it
/// first; sorted, so that two transactions claim them in the same order and cannot wait for each
/// other.
pub(super) fn claims(batch: &[Recording]) -> Claims<'_> {
    let mut claims = BTreeMap::new();
    for Recording { event, idempotency } in batch {
        if let Some(Idempotency { key, body_hash }) = idempotency {
            claims
                .entry((event.tenant_id.as_str(), key.as_str()))
                .or_insert((&body_hash[..], event.id, event.created_at));
        }
    }
    claims
}

/// The keys that nothing was saved under, since the id of their event was taken, by tenant and key.
/// Whoever repeats such a request in the same batch is told the same.
pub(super) fn unused_keys<'b>(
    batch: &'b [Recording],
    saved: &mut [Saved],
) -> Vec<(&'b str, &'b str)> {
    let keys: Vec<Option<(&str, &str)>> = batch
        .iter()
        .map(|Recording { event, idempotency }| {
            Some((event.tenant_id.as_str(), idempotency.as_ref()?.key.as_str()))
        })
        .collect();
    let unused: HashSet<(&str, &str)> = (keys.iter().zip(saved.iter()))
        .filter(|(_, saved)| **saved == Saved::IdTaken)
        .filter_map(|(key, _)| *key)
        .collect();
    for (key, saved) in keys.iter().zip(saved) {
        if key.is_some_and(|key| unused.contains(&key)) {
            *saved = Saved::IdTaken;
        }
    }
    unused.into_iter().collect()
}

/// The receipts of events that were imported: whose they are, to whom it was delivered, and when.
pub(super) struct Receipts {
    pub(super) delivered: Vec<(EventId, Audience, DateTime<Utc>)>,
    pub(super) read: Vec<(EventId, DateTime<Utc>)>,
}

impl Receipts {
    /// Those of the events that `saved` calls created.
    pub(super) fn of(batch: &[Recording], saved: &[Saved]) -> Self {
        let created = || {
            let created = batch.iter().zip(saved);
            created
                .filter(|(_, saved)| **saved == Saved::Created)
                .map(|(recording, _)| &recording.event)
        };
        let delivered = created().filter_map(|event| {
            // Whom the trigger lets it wait for.
            let audience = if event.visibility.client {
                Audience::Client
            } else {
                Audience::Agent
            };
            Some((event.id, audience, event.delivery.delivered_at()?))
        });
        Self {
            delivered: delivered.collect(),
            read: created()
                .filter_map(|event| Some((event.id, event.read_at?)))
                .collect(),
        }
    }
}

/// The ids of a batch that were taken.
pub(super) fn taken_ids(batch: &[Recording], saved: &[Saved]) -> Vec<EventId> {
    let taken = batch.iter().zip(saved);
    taken
        .filter(|(_, saved)| **saved == Saved::IdTaken)
        .map(|(recording, _)| recording.event.id)
        .collect()
}

/// What became of a batch; `found` are the events whose ids were taken.
pub(super) fn imported(
    batch: &[Recording],
    saved: &[Saved],
    found: Vec<ContactEvent>,
) -> Vec<Imported> {
    let found: HashMap<EventId, ContactEvent> =
        (found.into_iter()).map(|event| (event.id, event)).collect();
    let judge = |(Recording { event, .. }, saved): (&Recording, &Saved)| {
        if *saved == Saved::Created {
            return Imported::Created;
        }
        let Some(found) = found.get(&event.id) else {
            return Imported::Conflict { fields: Vec::new() };
        };
        let fields = differences(found, event);
        if fields.is_empty() {
            Imported::Existing
        } else {
            Imported::Conflict { fields }
        }
    };
    batch.iter().zip(saved).map(judge).collect()
}

/// The fields in which two events differ, of those that never change.
fn differences(one: &ContactEvent, other: &ContactEvent) -> Vec<&'static str> {
    let same_object =
        |one: &JsonObject, other: &JsonObject| one.in_one_line() == other.in_one_line();
    [
        ("contact_id", one.contact_id == other.contact_id),
        ("session_id", one.session_id == other.session_id),
        ("event_type", one.event_type == other.event_type),
        ("category", one.category == other.category),
        ("priority", one.priority == other.priority),
        ("source", one.source == other.source),
        ("title", one.title == other.title),
        ("description", one.description == other.description),
        ("payload", same_object(&one.payload, &other.payload)),
        ("metadata", same_object(&one.metadata, &other.metadata)),
        ("triggered_by", one.triggered_by == other.triggered_by),
        (
            "integration_source",
            one.integration_source == other.integration_source,
        ),
        ("is_realtime", one.is_realtime == other.is_realtime),
        ("occurred_at", one.occurred_at == other.occurred_at),
        ("created_at", one.created_at == other.created_at),
    ]
    .into_iter()
    .filter_map(|(field, is_same)| (!is_same).then_some(field))
    .collect()
}

/// The interval of `since` and `until`, whole where they are not set.
pub(super) fn bounds(filter: &Filter) -> (DateTime<Utc>, DateTime<Utc>) {
    (
        filter.since.unwrap_or(BEGINNING),
        filter.until.unwrap_or(END),
    )
}

/// Where a list from new to old begins: the key below which to read, and an offset. `until` is an
/// upper bound of its own only on the first page; both engines use but one bound with the index.
pub(super) fn first_key(page: Page, until: Option<DateTime<Utc>>) -> ((DateTime<Utc>, Uuid), i64) {
    let end = (until.unwrap_or(END), Uuid::nil());
    match page.position {
        Position::Offset(offset) => (end, i64::from(offset)),
        Position::After(key) => ((key.occurred_at, key.id.uuid()).min(end), 0),
    }
}

/// Where a list from old to new begins: the key above which to read, and an offset.
pub(super) fn last_key(page: Page) -> ((DateTime<Utc>, Uuid), i64) {
    match page.position {
        Position::Offset(offset) => ((BEGINNING, Uuid::nil()), i64::from(offset)),
        Position::After(key) => ((key.occurred_at, key.id.uuid()), 0),
    }
}

/// 0000-01-01: before the first instant that the schema takes.
const BEGINNING: DateTime<Utc> = instant(-62_167_219_200);
/// 10000-01-01: RFC 3339 ends before it, and so does the schema.
const END: DateTime<Utc> = instant(253_402_300_800);

const fn instant(seconds: i64) -> DateTime<Utc> {
    match DateTime::from_timestamp(seconds, 0) {
        Some(instant) => instant,
        None => panic!("both instants are representable"),
    }
}

/// The audit row of a change, from and to, as JSON.
pub(super) fn audit_change(
    before: &ContactEvent,
    visibility: Visibility,
    expires_at: Option<DateTime<Utc>>,
) -> (Option<String>, Option<String>) {
    let state = |visibility: Visibility, expires_at: Option<DateTime<Utc>>| {
        let state = serde_json::json!({
            "visible_to_client": visibility.client,
            "visible_to_agent": visibility.agent,
            "expires_at": expires_at.map(crate::domain::format_time),
        });
        Some(state.to_string())
    };
    (
        state(before.visibility, before.expires_at),
        state(visibility, expires_at),
    )
}

/// Whom a realtime event waits for after a change of visibility: an audience that may see it now
/// and has not had it. The client comes first; an agent who sees it anew is waited for otherwise.
pub(super) fn pending_after(
    before: Visibility,
    after: Visibility,
    was_pending: Option<Audience>,
    delivered_to: &[Audience],
) -> Option<Audience> {
    let had = |audience| delivered_to.contains(&audience);
    if after.client && !had(Audience::Client) {
        return Some(Audience::Client);
    }
    let awaits_agent = !before.agent || was_pending == Some(Audience::Agent) || !after.client;
    (after.agent && !had(Audience::Agent) && awaits_agent).then_some(Audience::Agent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Audience::{Agent, Client};

    const fn seen_by(client: bool, agent: bool) -> Visibility {
        Visibility { client, agent }
    }

    #[test]
    fn widened_to_the_client_it_waits_for_the_client_even_after_the_agent_had_it() {
        let pending = pending_after(seen_by(false, true), seen_by(true, true), None, &[Agent]);
        assert_eq!(pending, Some(Client));
    }

    #[test]
    fn widened_to_agents_after_the_client_had_it_waits_for_an_agent() {
        let pending = pending_after(seen_by(true, false), seen_by(true, true), None, &[Client]);
        assert_eq!(pending, Some(Agent));
    }

    #[test]
    fn narrowed_to_nobody_it_waits_for_nobody() {
        assert_eq!(
            pending_after(
                seen_by(true, true),
                seen_by(false, false),
                Some(Client),
                &[]
            ),
            None
        );
    }

    #[test]
    fn narrowed_to_agents_while_pending_it_waits_for_an_agent() {
        let pending = pending_after(seen_by(true, true), seen_by(false, true), Some(Client), &[]);
        assert_eq!(pending, Some(Agent));
    }

    #[test]
    fn an_unchanged_event_that_was_delivered_stays_so() {
        assert_eq!(
            pending_after(seen_by(true, true), seen_by(true, true), None, &[Client]),
            None
        );
    }
}
