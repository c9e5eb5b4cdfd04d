-- Contact events and what changes beside them.
--
-- Other programs may insert into contact_events and read timeline_events: the defaults and checks
-- below hold the rules of an event, the trigger puts a realtime one into the outbox.
-- Encodings: a UUID is text, lower case with hyphens; a time is an integer, microseconds since
-- 1970-01-01 UTC; a boolean is 0 or 1; payload and metadata are JSON text.
-- Every key begins with tenant_id; the outbox's tail and expiry are read across tenants.

create table contact_events (
    -- the order of recording; autoincrement, so that a number is never given twice
    seq                integer primary key autoincrement,
    tenant_id          text    not null check (length(tenant_id) between 1 and 255 and instr(tenant_id, char(0)) = 0),
    -- a UUIDv7 (RFC 9562) for rows that other programs insert without an id
    id                 text    not null default (printf('%08x-%04x-7%03x-%04x-%012x',
                                   (cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer) >> 16) & 0xffffffff,
                                   cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer) & 0xffff,
                                   random() & 0xfff, 0x8000 | (random() & 0x3fff), random() & 0xffffffffffff))
                               check (length(id) = 36 and id not glob '*[^0-9a-f-]*'
                                      and id glob '????????-????-????-????-????????????'
                                      and length(replace(id, '-', '')) = 32
                                      and id <> '00000000-0000-0000-0000-000000000000'),
    contact_id         text    not null
                               check (length(contact_id) = 36 and contact_id not glob '*[^0-9a-f-]*'
                                      and contact_id glob '????????-????-????-????-????????????'
                                      and length(replace(contact_id, '-', '')) = 32
                                      and contact_id <> '00000000-0000-0000-0000-000000000000'),
    session_id         text    check (length(session_id) = 36 and session_id not glob '*[^0-9a-f-]*'
                                      and session_id glob '????????-????-????-????-????????????'
                                      and length(replace(session_id, '-', '')) = 32
                                      and session_id <> '00000000-0000-0000-0000-000000000000'),
    event_type         text    not null check (length(event_type) between 1 and 64
                                      and event_type glob '[a-z]*' and instr(event_type, char(0)) = 0 and event_type not glob '*[^a-z0-9_.]*'),
    category           text    not null check (category in (
                                   'general', 'status', 'pipeline', 'assignment', 'tag', 'note',
                                   'session', 'custom_field', 'system', 'notification', 'tracking')),
    priority           text    not null default 'normal'
                               check (priority in ('low', 'normal', 'high', 'urgent')),
    source             text    not null check (source in (
                                   'system', 'agent', 'webhook', 'workflow', 'automation', 'integration')),
    title              text    check (length(title) <= 500 and instr(title, char(0)) = 0),
    description        text    check (length(description) <= 20000 and instr(description, char(0)) = 0),
    payload            text    not null default '{}' check (
                                   json_valid(payload) and json_type(payload) = 'object'
                                   and length(cast(payload as blob)) <= 65536
                                   -- without escaped backslashes, so that what is left is an escaped NUL
                                   and instr(replace(payload, '\\', ''), '\u0000') = 0),
    metadata           text    not null default '{}' check (
                                   json_valid(metadata) and json_type(metadata) = 'object'
                                   and length(cast(metadata as blob)) <= 16384
                                   and instr(replace(metadata, '\\', ''), '\u0000') = 0),
    triggered_by       text    check (length(triggered_by) = 36 and triggered_by not glob '*[^0-9a-f-]*'
                                      and triggered_by glob '????????-????-????-????-????????????'
                                      and length(replace(triggered_by, '-', '')) = 32
                                      and triggered_by <> '00000000-0000-0000-0000-000000000000'),
    integration_source text    check (length(integration_source) <= 255 and instr(integration_source, char(0)) = 0),
    is_realtime        integer not null default 0 check (is_realtime in (0, 1)),
    visible_to_client  integer not null default 0 check (visible_to_client in (0, 1)),
    visible_to_agent   integer not null default 1 check (visible_to_agent in (0, 1)),
    expires_at         integer check (expires_at > created_at and expires_at < 253402300800000000),
    occurred_at        integer not null
                               default (cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer) * 1000)
                               check (occurred_at <= created_at + 300000000 and occurred_at >= -62135596800000000),
    created_at         integer not null
                               default (cast(round((julianday('now') - 2440587.5) * 86400000.0) as integer) * 1000)
                               check (created_at between 0 and 253402300799999999),
    unique (tenant_id, id),
    check (source <> 'integration' or coalesce(integration_source, '') <> '')
) strict;

-- A contact's timeline by (occurred_at, id), and its total without touching the rows.
create index contact_events_timeline on contact_events
    (tenant_id, contact_id, occurred_at, id, visible_to_client, visible_to_agent, expires_at);
-- A session, oldest first.
create index contact_events_session on contact_events (tenant_id, session_id, occurred_at, id)
    where session_id is not null;
-- By tenant and type, by tenant and category, since.
create index contact_events_type on contact_events (tenant_id, event_type, occurred_at, id);
create index contact_events_category on contact_events (tenant_id, category, occurred_at, id);
-- The purge.
create index contact_events_expiry on contact_events (tenant_id, expires_at)
    where expires_at is not null;

-- One row while a realtime event waits for its audience. One writer commits in the order of the key,
-- so the tail is what lies beyond the last one that was read.
create table event_outbox (
    added       integer primary key autoincrement,
    -- the event's
    seq         integer not null,
    tenant_id   text    not null,
    event_id    text    not null,
    contact_id  text    not null,
    audience    text    not null check (audience in ('client', 'agent')),
    -- 0 urgent, 1 high, 2 normal, 3 low
    rank        integer not null,
    occurred_at integer not null,
    expires_at  integer
) strict;

create unique index event_outbox_event on event_outbox (tenant_id, event_id);
-- The backlog of a watched contact: by priority, then age, rank by rank.
create index event_outbox_backlog on event_outbox (tenant_id, contact_id, rank, seq);
-- The undelivered of one contact, oldest first.
create index event_outbox_oldest on event_outbox (tenant_id, contact_id, occurred_at, event_id);
-- What expired before anybody acknowledged it, across tenants.
create index event_outbox_expiry on event_outbox (expires_at) where expires_at is not null;

create trigger contact_events_outbox after insert on contact_events
when new.is_realtime and (new.visible_to_client or new.visible_to_agent)
begin
    insert into event_outbox (seq, tenant_id, event_id, contact_id, audience, rank, occurred_at, expires_at)
    values (new.seq, new.tenant_id, new.id, new.contact_id,
            case when new.visible_to_client then 'client' else 'agent' end,
            case new.priority when 'urgent' then 0 when 'high' then 1 when 'normal' then 2 else 3 end,
            new.occurred_at, new.expires_at);
end;

-- How the wait for an audience ended.
create table event_deliveries (
    tenant_id   text    not null,
    event_id    text    not null,
    audience    text    not null check (audience in ('client', 'agent')),
    outcome     text    not null check (outcome in ('delivered', 'expired')),
    recorded_at integer not null,
    -- who acknowledged; null where it expired
    recorded_by text,
    primary key (tenant_id, event_id, audience)
) strict, without rowid;

-- One row a reader.
create table event_reads (
    tenant_id text    not null,
    event_id  text    not null,
    reader    text    not null,
    read_at   integer not null,
    primary key (tenant_id, event_id, reader)
) strict, without rowid;

create view timeline_events as
select e.tenant_id, e.id, e.seq, e.contact_id, e.session_id, e.event_type, e.category, e.priority, e.source,
       e.title, e.description, e.payload, e.metadata, e.triggered_by, e.integration_source, e.is_realtime,
       exists (select 1 from event_deliveries d
               where d.tenant_id = e.tenant_id and d.event_id = e.id and d.outcome = 'delivered') as delivered,
       (select min(d.recorded_at) from event_deliveries d
        where d.tenant_id = e.tenant_id and d.event_id = e.id and d.outcome = 'delivered') as delivered_at,
       (select min(d.recorded_at) from event_deliveries d
        where d.tenant_id = e.tenant_id and d.event_id = e.id and d.outcome = 'expired') as delivery_expired_at,
       exists (select 1 from event_reads r where r.tenant_id = e.tenant_id and r.event_id = e.id) as read,
       (select min(r.read_at) from event_reads r
        where r.tenant_id = e.tenant_id and r.event_id = e.id) as read_at,
       e.visible_to_client, e.visible_to_agent, e.expires_at, e.occurred_at, e.created_at
from contact_events e;

-- What makes the repeat of a create harmless for 24 hours; written in the event's own transaction.
create table idempotency_keys (
    tenant_id  text    not null,
    key        text    not null,
    body_hash  blob    not null,
    event_id   text    not null,
    created_at integer not null,
    primary key (tenant_id, key)
) strict, without rowid;
create index idempotency_keys_age on idempotency_keys (tenant_id, created_at);

-- Who changed or deleted what, and when; from and to without content.
create table audit_log (
    seq        integer primary key autoincrement,
    tenant_id  text    not null,
    at         integer not null,
    actor      text    not null,
    action     text    not null,
    subject_id text    not null,
    before     text,
    after      text
) strict;
create index audit_log_subject on audit_log (tenant_id, subject_id, seq);
