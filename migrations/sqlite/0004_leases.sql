-- What makes a run safe from the death of its daemon: a lease that is renewed each second, and a fence
-- that rises with each claim, so that whoever lost the run cannot write for it.
alter table job_runs add column fence integer not null default 0;
alter table job_runs add column leased_until integer;
-- who asked for its end
alter table job_runs add column cancel_requested_by text;
-- each daemon has its own, such as a delivery poll
alter table job_runs add column is_per_daemon integer not null default 0;

-- Left by a daemon that knew no lease; the one that holds the file now takes it over.
update job_runs set state = 'queued', daemon = null where state = 'running';

-- A scheduled time of a job is claimed once in the whole installation.
drop index job_runs_claim;
create unique index job_runs_claim on job_runs (job, scheduled_at) where trigger <> 'manual' and not is_per_daemon;
-- A job runs once at a time in the whole installation.
create unique index job_runs_place on job_runs (job) where state = 'running';

-- What operators decided about a job; it lasts.
create table job_controls (
    job       text    primary key,
    paused_at integer not null,
    paused_by text    not null
) strict, without rowid;

-- What operators did, and who it was.
create table job_actions (
    seq    integer primary key autoincrement,
    at     integer not null,
    actor  text    not null,
    action text    not null,
    job    text    not null,
    run_id text
) strict;
create index job_actions_job on job_actions (job, seq);
