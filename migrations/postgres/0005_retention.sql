-- Retention: legal holds, and what was deleted by which rule. Nothing here keeps content.
-- The purge. With seq, since a run that leaves events behind goes on after the last one that it saw,
-- and many may expire in the same microsecond.
drop index contact_events_expiry;
create index contact_events_expiry on contact_events (tenant_id, expires_at, seq)
    where expires_at is not null;
-- The purge of what has no expiry, by its age.
create index contact_events_age on contact_events (tenant_id, created_at, seq)
    where expires_at is null;

-- A legal hold: what it names is not deleted until it is released. It names a contact, a category, or
-- neither: then the whole tenant.
create table holds (
    tenant_id   text        not null,
    id          uuid        not null,
    contact_id  uuid,
    category    text,
    reason      text        not null,
    placed_by   text        not null,
    placed_at   timestamptz not null,
    released_by text,
    released_at timestamptz,
    primary key (tenant_id, id),
    check (contact_id is null or category is null)
);

-- What the purge asks of each event that it would delete, and of each tenant.
create index holds_contact on holds (tenant_id, contact_id)
    where released_at is null and contact_id is not null;
create index holds_category on holds (tenant_id, category)
    where released_at is null and category is not null;
create index holds_tenant on holds (tenant_id)
    where released_at is null and contact_id is null and category is null;

-- One row, whose version rises with each new hold. A batch of the purge locks it for share, in the
-- version that it knows: so it sees every hold, and a hold that was answered defers all that comes
-- after it.
create table retention_gate (
    id      integer primary key check (id = 1),
    version bigint  not null
);
insert into retention_gate (id, version) values (1, 1);

-- What the runs of the purge deleted, by tenant, rule and cause; written with each batch.
create table deletion_ledger (
    tenant_id text        not null,
    run_id    uuid        not null,
    -- what the rule names, or "default"
    rule      text        not null,
    -- expired: it had expired; aged: it had no expiry, and was old
    cause     text        not null check (cause in ('expired', 'aged')),
    deleted   bigint      not null,
    first_at  timestamptz not null,
    last_at   timestamptz not null,
    primary key (tenant_id, run_id, rule, cause)
);
create index deletion_ledger_run on deletion_ledger (run_id);

-- A run that would delete far more than usual waits here for an operator.
create table purge_guard (
    job          text        primary key,
    found_at     timestamptz not null,
    -- at least so many
    would_delete bigint      not null,
    -- the median of the runs before
    usual        bigint      not null,
    confirmed_at timestamptz,
    confirmed_by text
);
