-- The runs of the jobs: every run is a row. Operators see them; they belong to no tenant.
create table job_runs (
    id           text    primary key,
    job          text    not null,
    scheduled_at integer not null,
    started_at   integer,
    finished_at  integer,
    trigger      text    not null check (trigger in ('schedule', 'catch_up', 'manual')),
    requested_by text,
    attempt      integer not null default 0,
    daemon       text,
    state        text    not null check (state in (
                             'queued', 'running', 'succeeded', 'failed', 'timed_out', 'cancelled', 'skipped')),
    -- numbers by name, such as {"deleted": 3}
    counts       text    not null default '{}',
    error        text
) strict, without rowid;

-- A scheduled time of a job is claimed once in the whole installation.
create unique index job_runs_claim on job_runs (job, scheduled_at) where trigger <> 'manual';
-- A job's history, newest first.
create index job_runs_history on job_runs (job, id);
-- What waits for a daemon.
create index job_runs_queue on job_runs (id) where state = 'queued';
create index job_runs_running on job_runs (daemon) where state = 'running';
-- What is past its time.
create index job_runs_age on job_runs (finished_at) where finished_at is not null;
