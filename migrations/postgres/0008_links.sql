-- Links to the files of exports, what was done to an export and by whom, and mails that go out anew.

alter table exports add column downloads bigint not null default 0;
alter table exports add column last_download_at timestamptz;

-- One recipient may have several mails of an export: each that was sent anew has its own Message-ID.
alter table export_deliveries drop constraint export_deliveries_pkey;
alter table export_deliveries add primary key (tenant_id, export_id, message_id);

-- A link is known only to its recipient: here is the SHA-256 of it, in hexadecimal.
create table export_links (
    hash             text        not null primary key,
    tenant_id        text        not null,
    export_id        uuid        not null,
    -- the mail that carries it
    message_id       text        not null,
    created_at       timestamptz not null,
    expires_at       timestamptz not null,
    revoked_at       timestamptz,
    downloads        bigint      not null default 0,
    last_download_at timestamptz,
    foreign key (tenant_id, export_id) references exports (tenant_id, id) on delete cascade
);

create index export_links_of on export_links (tenant_id, export_id);

create table export_actions (
    seq       bigint      generated always as identity primary key,
    tenant_id text        not null,
    export_id uuid        not null,
    at        timestamptz not null,
    action    text        not null check (action in ('cancelled', 'resent', 'deleted')),
    actor     text        not null,
    foreign key (tenant_id, export_id) references exports (tenant_id, id) on delete cascade
);

create index export_actions_of on export_actions (tenant_id, export_id);

-- Where the next export of a job begins: at the end of the last one that arrived.
create index exports_followed on exports (tenant_id, requested_by, contact_id, until)
    where state in ('done', 'expired');
