-- Links to the files of exports, what was done to an export and by whom, and mails that go out anew.

alter table exports add column downloads integer not null default 0;
alter table exports add column last_download_at integer;

-- One recipient may have several mails of an export: each that was sent anew has its own Message-ID.
create table export_mails (
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
    primary key (tenant_id, export_id, message_id),
    foreign key (tenant_id, export_id) references exports (tenant_id, id) on delete cascade
) strict;

insert into export_mails (tenant_id, export_id, recipient, position, message_id, state, attempt, next_attempt_at,
                          claimed_by, claimed_until, sent_at, error)
select tenant_id, export_id, recipient, position, message_id, state, attempt, next_attempt_at,
       claimed_by, claimed_until, sent_at, error
from export_deliveries;

drop table export_deliveries;
alter table export_mails rename to export_deliveries;

create index export_deliveries_queue on export_deliveries (next_attempt_at)
    where state in ('pending', 'sending', 'deferred', 'uncertain');

-- A link is known only to its recipient: here is the SHA-256 of it, in hexadecimal.
create table export_links (
    hash             text    not null primary key,
    tenant_id        text    not null,
    export_id        text    not null,
    -- the mail that carries it
    message_id       text    not null,
    created_at       integer not null,
    expires_at       integer not null,
    revoked_at       integer,
    downloads        integer not null default 0,
    last_download_at integer,
    foreign key (tenant_id, export_id) references exports (tenant_id, id) on delete cascade
) strict;

create index export_links_of on export_links (tenant_id, export_id);

create table export_actions (
    seq       integer primary key,
    tenant_id text    not null,
    export_id text    not null,
    at        integer not null,
    action    text    not null check (action in ('cancelled', 'resent', 'deleted')),
    actor     text    not null,
    foreign key (tenant_id, export_id) references exports (tenant_id, id) on delete cascade
) strict;

create index export_actions_of on export_actions (tenant_id, export_id);

-- Where the next export of a job begins: at the end of the last one that arrived.
create index exports_followed on exports (tenant_id, requested_by, contact_id, until)
    where state in ('done', 'expired');
