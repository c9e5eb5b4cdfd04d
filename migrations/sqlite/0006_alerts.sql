-- What is wrong with which job, so that it is told once in the whole installation, and after a restart
-- too. A job has a row of each kind from the day that it is first watched. reached is a JSON array.
create table job_alerts (
    job           text    not null,
    kind          text    not null check (kind in ('failure', 'silence')),
    -- failure: the first failure of the row; silence: the last success, or since when one is awaited
    since         integer not null,
    -- failures in a row; they are over when last_success is not before since
    count         integer not null default 0,
    error         text,
    last_success  integer,
    -- alerts that were mailed since the trouble began, and when the last of them was
    mails         integer not null default 0,
    mailed_at     integer,
    -- the mail that a daemon is sending or will try again, and whom it has reached
    mailing       text    check (mailing in ('alert', 'recovery')),
    attempts      integer not null default 0,
    reached       text    not null default '[]',
    claimed_by    text,
    claimed_until integer,
    primary key (job, kind)
) strict, without rowid;
