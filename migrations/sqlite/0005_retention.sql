-- Retention: legal holds, and what was deleted by which rule. Nothing here keeps content.
-- The purge of what has no expiry, by its age. Like contact_events_expiry it ends with the row's number,
-- by which a run that leaves events behind goes on.
create index contact_events_age on contact_events (tenant_id, created_at)
    where expires_at is null;

-- A legal hold: what it names is not deleted until it is released. It names a contact, a category, or
-- neither: then the whole tenant.
create table holds (
    tenant_id   text        not null,
    id          text        not null,
    contact_id  text,
    category    text,
    reason      text        not null,
    placed_by   text        not null,
    placed_at   integer     not null,
    released_by text,
    released_at integer,
    primary key (tenant_id, id),
    check (contact_id is null or category is null)
) strict;

-- What the purge asks of each event that it would delete, and of each tenant.
create index holds_contact on holds (tenant_id, contact_id)
    where released_at is null and contact_id is not null;
create index holds_category on holds (tenant_id, category)
    where released_at is null and category is not null;
create index holds_tenant on holds (tenant_id)
    where released_at is null and contact_id is null and category is null;

-- What the runs of the purge deleted, by tenant, rule and cause; written with each batch.
create table deletion_ledger (
    tenant_id text        not null,
    run_id    text        not null,
    -- what the rule names, or "default"
    rule      text        not null,
    -- expired: it had expired; aged: it had no expiry, and was old
    cause     text        not null check (cause in ('expired', 'aged')),
    deleted   integer     not null,
    first_at  integer     not null,
    last_at   integer     not null,
    primary key (tenant_id, run_id, rule, cause)
) strict, without rowid;
create index deletion_ledger_run on deletion_ledger (run_id);

-- A run that would delete far more than usual waits here for an operator.
create table purge_guard (
    job          text        primary key,
    found_at     integer     not null,
    -- at least so many
    would_delete integer     not null,
    -- the median of the runs before
    usual        integer     not null,
    confirmed_at integer,
    confirmed_by text
) strict;
