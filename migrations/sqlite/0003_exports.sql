-- Exports and their recipients. Whatever asks for an export only adds a row; a worker serves it.
-- categories and redact are JSON arrays.
create table exports (
    tenant_id       text    not null,
    id              text    not null,
    contact_id      text    not null,
    format          text    not null,
    audience        text    not null check (audience in ('client', 'agent', 'audit')),
    since           integer,
    until           integer,
    categories      text    not null default '[]',
    timezone        text    not null,
    redact          text    not null default '[]',
    attach          integer not null,
    requested_by    text    not null,
    -- makes a scheduled export harmless to repeat: one per run and contact
    request_key     text,
    created_at      integer not null,
    -- what was recorded after this is not part of it
    through_seq     integer not null,
    state           text    not null check (state in ('queued', 'running', 'done', 'failed', 'cancelled', 'expired')),
    attempt         integer not null default 0,
    next_attempt_at integer not null,
    -- who works on it, until when nobody else may
    claimed_by      text,
    claimed_until   integer,
    started_at      integer,
    rendered_at     integer,
    finished_at     integer,
    expires_at      integer,
    total_rows      integer,
    rows            integer not null default 0,
    bytes           integer,
    sha256          text,
    file_name       text,
    error           text,
    primary key (tenant_id, id),
    unique (tenant_id, request_key)
) strict;

-- What the worker looks for, across tenants.
create index exports_queue on exports (next_attempt_at) where state in ('queued', 'running') and rendered_at is null;
create index exports_expiry on exports (expires_at) where file_name is not null;

create table export_deliveries (
    tenant_id       text    not null,
    export_id       text    not null,
    recipient       text    not null,
    -- the order in which recipients were named
    position        integer not null,
    -- fixed before the first try, so that a repeat is seen as one
    message_id      text    not null,
    state           text    not null check (state in ('pending', 'sending', 'sent', 'deferred', 'uncertain', 'dead')),
    attempt         integer not null default 0,
    -- null until the file is there
    next_attempt_at integer,
    claimed_by      text,
    claimed_until   integer,
    sent_at         integer,
    error           text,
    primary key (tenant_id, export_id, recipient),
    foreign key (tenant_id, export_id) references exports (tenant_id, id) on delete cascade
) strict;

create index export_deliveries_queue on export_deliveries (next_attempt_at)
    where state in ('pending', 'sending', 'deferred', 'uncertain');
