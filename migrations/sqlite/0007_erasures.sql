-- Erasure: everything of a contact goes for good. The ledger keeps who asked, when and how much, and
-- no content; it is replayed on a database that was restored from an older backup.
create table erasures (
    tenant_id    text    not null,
    id           text    not null,
    contact_id   text    not null,
    requested_by text    not null,
    requested_at integer not null,
    -- what was recorded until then goes, also on a replay
    up_to        integer not null,
    -- held: a hold was placed while it was at work
    state        text    not null check (state in ('running', 'done', 'held')),
    -- how many events went
    events       integer not null default 0,
    -- the exports that went, whose files every daemon deletes on its own disk; a JSON array
    exports      text    not null default '[]',
    finished_at  integer,
    primary key (tenant_id, id)
) strict;

-- What a daemon has not copied into its own ledger yet.
create index erasures_finished on erasures (finished_at, id) where finished_at is not null;
-- What a daemon that died left.
create index erasures_running on erasures (requested_at, id) where state = 'running';

-- The keys and exports of an erased contact.
create index idempotency_keys_event on idempotency_keys (tenant_id, event_id);
create index exports_contact on exports (tenant_id, contact_id);
