-- Version 1. Times are microseconds since the Unix epoch, durations nanoseconds. Values that are not selected by are JSON.
-- Frozen: what has been released is changed by a later migration only.

CREATE TABLE runs (
    -- Small, and grows with time: what other tables refer to, so that their new rows lie together.
    rn INTEGER PRIMARY KEY,
    -- The UUID's 16 bytes.
    id BLOB NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key TEXT,
    digest BLOB NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    backend TEXT NOT NULL,
    backend_reason TEXT NOT NULL,
    cancel TEXT,
    not_before INTEGER,
    created INTEGER NOT NULL,
    started INTEGER,
    -- Set exactly where the state is terminal; so "live" is `ended IS NULL`, in queries and in the partial index.
    ended INTEGER,
    outcome TEXT,
    last_event INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX runs_key ON runs (tenant, key) WHERE key IS NOT NULL;
CREATE INDEX runs_created ON runs (created, id);
CREATE INDEX runs_tenant_created ON runs (tenant, created, id);
CREATE INDEX runs_live ON runs (created, id) WHERE ended IS NULL;

-- Apart from `runs`, so that a transition does not write a spec of a megabyte again.
CREATE TABLE specs (
    rn INTEGER PRIMARY KEY REFERENCES runs (rn),
    spec TEXT NOT NULL
) STRICT;

-- `created` and `id` are copies of the run's: a listing by label needs no sort.
CREATE TABLE labels (
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    created INTEGER NOT NULL,
    id BLOB NOT NULL,
    rn INTEGER NOT NULL REFERENCES runs (rn),
    PRIMARY KEY (name, value, created, id)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    rn INTEGER NOT NULL REFERENCES runs (rn),
    seq INTEGER NOT NULL,
    time INTEGER NOT NULL,
    event TEXT NOT NULL,
    PRIMARY KEY (rn, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE attempts (
    rn INTEGER NOT NULL REFERENCES runs (rn),
    number INTEGER NOT NULL,
    backend TEXT NOT NULL,
    started INTEGER,
    ended INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    PRIMARY KEY (rn, number)
) STRICT, WITHOUT ROWID;

-- Of live runs only, so it stays small.
CREATE TABLE timers (
    rn INTEGER NOT NULL REFERENCES runs (rn),
    kind TEXT NOT NULL,
    due INTEGER NOT NULL,
    duration INTEGER NOT NULL,
    PRIMARY KEY (rn, kind)
) STRICT, WITHOUT ROWID;

-- One row, which a probe writes.
CREATE TABLE probe (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    count INTEGER NOT NULL
) STRICT;

INSERT INTO probe VALUES (1, 0);
