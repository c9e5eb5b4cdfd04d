-- What is wrong with which job, so that it is told once in the whole installation, and after a restart
-- too. A job has a row of each kind from the day that it is first watched.
create table job_alerts (
    job           text        not null,
    kind          text        not null check (kind in ('failure', 'silence')),
    -- failure: the first failure of the row; silence: the last success, or since when one is awaited
    since         timestamptz not null,
    -- failures in a row; they are over when last_success is not before since
    count         bigint      not null default 0,
    error         text,
    last_success  timestamptz,
    -- alerts that were mailed since the trouble began, and when the last of them was
    mails         bigint      not null default 0,
    mailed_at     timestamptz,
    -- the mail that a daemon is sending or will try again, and whom it has reached
    mailing       text        check (mailing in ('alert', 'recovery')),
    attempts      bigint      not null default 0,
    reached       text[]      not null default '{}',
    claimed_by    uuid,
    claimed_until timestamptz,
    primary key (job, kind)
);
