-- What makes a run safe from the death of its daemon: a lease that is renewed each second, and a fence
-- that rises with each claim, so that whoever lost the run cannot write for it.
alter table job_runs
    add column fence               integer not null default 0,
    add column leased_until        timestamptz,
    -- who asked for its end
    add column cancel_requested_by text,
    -- each daemon has its own, such as a delivery poll
    add column is_per_daemon       boolean not null default false;

-- Left by daemons that knew no lease.
update job_runs
set state = 'failed', finished_at = clock_timestamp(), error = 'its daemon was replaced by one of a later version'
where state = 'running';

-- A scheduled time of a job is claimed once in the whole installation.
drop index job_runs_claim;
create unique index job_runs_claim on job_runs (job, scheduled_at) where trigger <> 'manual' and not is_per_daemon;
-- A job runs once at a time in the whole installation.
create unique index job_runs_place on job_runs (job) where state = 'running';

-- What operators decided about a job; it lasts.
create table job_controls (
    job       text        primary key,
    paused_at timestamptz not null,
    paused_by text        not null
);

-- What operators did, and who it was.
create table job_actions (
    seq    bigint      generated always as identity primary key,
    at     timestamptz not null,
    actor  text        not null,
    action text        not null,
    job    text        not null,
    run_id uuid
);
create index job_actions_job on job_actions (job, seq);
