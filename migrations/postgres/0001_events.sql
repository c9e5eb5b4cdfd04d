-- Contact events and what changes beside them.
--
-- Other programs may insert into contact_events and read timeline_events: the defaults and checks
-- below hold the rules of an event, the trigger puts a realtime one into the outbox.
-- Every key begins with tenant_id; the outbox's tail and expiry are read across tenants.

-- A UUIDv7 (RFC 9562) for rows that other programs insert without an id.
create function timelined_uuid_v7() returns uuid language sql volatile as $$
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                from 1 for 6),
            52, 1), 53, 1), 'hex')::uuid
$$;

create table contact_events (
    tenant_id          text        not null check (char_length(tenant_id) between 1 and 255),
    id                 uuid        not null default timelined_uuid_v7()
                                   check (id <> '00000000-0000-0000-0000-000000000000'),
    -- the order of recording
    seq                bigint      generated always as identity,
    contact_id         uuid        not null
                                   check (contact_id <> '00000000-0000-0000-0000-000000000000'),
    session_id         uuid        check (session_id <> '00000000-0000-0000-0000-000000000000'),
    event_type         text        not null check (event_type ~ '^[a-z][a-z0-9_.]{0,63}$'),
    category           text        not null check (category in (
                                       'general', 'status', 'pipeline', 'assignment', 'tag', 'note',
                                       'session', 'custom_field', 'system', 'notification', 'tracking')),
    priority           text        not null default 'normal'
                                   check (priority in ('low', 'normal', 'high', 'urgent')),
    source             text        not null check (source in (
                                       'system', 'agent', 'webhook', 'workflow', 'automation', 'integration')),
    title              text        check (char_length(title) <= 500),
    description        text        check (char_length(description) <= 20000),
    -- json, not jsonb: the text is kept as it was written, and its size is what the rule counts
    payload            json        not null default '{}' check (
                                       json_typeof(payload) = 'object'
                                       and octet_length(payload::text) <= 65536
                                       and payload::text !~ '(^|[^\\])(\\\\)*\\u0000'),
    metadata           json        not null default '{}' check (
                                       json_typeof(metadata) = 'object'
                                       and octet_length(metadata::text) <= 16384
                                       and metadata::text !~ '(^|[^\\])(\\\\)*\\u0000'),
    triggered_by       uuid        check (triggered_by <> '00000000-0000-0000-0000-000000000000'),
    integration_source text        check (char_length(integration_source) <= 255),
    is_realtime        boolean     not null default false,
    visible_to_client  boolean     not null default false,
    visible_to_agent   boolean     not null default true,
    expires_at         timestamptz check (expires_at > created_at and expires_at < '10000-01-01Z'),
    occurred_at        timestamptz not null default now() check (
                                       occurred_at <= created_at + interval '5 minutes'
                                       and occurred_at >= '0001-01-01Z'),
    created_at         timestamptz not null default now() check (isfinite(created_at)),
    primary key (tenant_id, id),
    check (source <> 'integration' or coalesce(integration_source, '') <> '')
);

-- A contact's timeline by (occurred_at, id), and its total without touching the rows.
create index contact_events_timeline on contact_events (tenant_id, contact_id, occurred_at, id)
    include (visible_to_client, visible_to_agent, expires_at);
-- A session, oldest first.
create index contact_events_session on contact_events (tenant_id, session_id, occurred_at, id)
    where session_id is not null;
-- By tenant and type, by tenant and category, since.
create index contact_events_type on contact_events (tenant_id, event_type, occurred_at, id);
create index contact_events_category on contact_events (tenant_id, category, occurred_at, id);
-- The purge.
create index contact_events_expiry on contact_events (tenant_id, expires_at)
    where expires_at is not null;

-- One row while a realtime event waits for its audience.
create table event_outbox (
    tenant_id   text        not null,
    event_id    uuid        not null,
    contact_id  uuid        not null,
    audience    text        not null check (audience in ('client', 'agent')),
    -- 0 urgent, 1 high, 2 normal, 3 low
    rank        smallint    not null,
    seq         bigint      not null,
    occurred_at timestamptz not null,
    expires_at  timestamptz,
    -- the transaction that added it: the tail begins at the oldest one that was open at the last look
    xid         xid8        not null default pg_current_xact_id(),
    primary key (tenant_id, event_id)
);

-- The backlog of a watched contact: by priority, then age, rank by rank.
create index event_outbox_backlog on event_outbox (tenant_id, contact_id, rank, seq);
-- The undelivered of one contact, oldest first.
create index event_outbox_oldest on event_outbox (tenant_id, contact_id, occurred_at, event_id);
-- The tail, across tenants.
create index event_outbox_tail on event_outbox (xid, seq);
-- What expired before anybody acknowledged it, across tenants.
create index event_outbox_expiry on event_outbox (expires_at) where expires_at is not null;

create function contact_events_to_outbox() returns trigger language plpgsql
    -- of this schema, whatever the search path of the program that inserts
    set search_path from current as $$
begin
    insert into event_outbox (tenant_id, event_id, contact_id, audience, rank, seq, occurred_at, expires_at)
    select tenant_id, id, contact_id,
           case when visible_to_client then 'client' else 'agent' end,
           case priority when 'urgent' then 0 when 'high' then 1 when 'normal' then 2 else 3 end,
           seq, occurred_at, expires_at
    from inserted
    where is_realtime and (visible_to_client or visible_to_agent);
    return null;
end
$$;

create trigger contact_events_outbox after insert on contact_events
    referencing new table as inserted
    for each statement execute function contact_events_to_outbox();

-- How the wait for an audience ended.
create table event_deliveries (
    tenant_id   text        not null,
    event_id    uuid        not null,
    audience    text        not null check (audience in ('client', 'agent')),
    outcome     text        not null check (outcome in ('delivered', 'expired')),
    recorded_at timestamptz not null,
    -- who acknowledged; null where it expired
    recorded_by text,
    primary key (tenant_id, event_id, audience)
);

-- One row a reader.
create table event_reads (
    tenant_id text        not null,
    event_id  uuid        not null,
    reader    text        not null,
    read_at   timestamptz not null,
    primary key (tenant_id, event_id, reader)
);

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
    tenant_id  text        not null,
    key        text        not null,
    body_hash  bytea       not null,
    event_id   uuid        not null,
    created_at timestamptz not null,
    primary key (tenant_id, key)
);
create index idempotency_keys_age on idempotency_keys (tenant_id, created_at);

-- Who changed or deleted what, and when; from and to without content.
create table audit_log (
    tenant_id  text        not null,
    seq        bigint      generated always as identity,
    at         timestamptz not null,
    actor      text        not null,
    action     text        not null,
    subject_id uuid        not null,
    before     json,
    after      json,
    primary key (tenant_id, seq)
);
create index audit_log_subject on audit_log (tenant_id, subject_id, seq);
