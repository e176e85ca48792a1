-- Version 1. Times are microseconds since the Unix epoch, durations nanoseconds. Values that are not selected by are JSON.
-- Text of people, which may have any character, is JSON too: a column of text has no NUL.
-- Frozen: what has been released is changed by a later migration only. What a table is for: ../sqlite/.

CREATE TABLE runs (
    rn BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The UUID's 16 bytes.
    id BYTEA NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key TEXT,
    digest BYTEA NOT NULL,
    state TEXT NOT NULL,
    attempt BIGINT NOT NULL,
    backend TEXT NOT NULL,
    backend_reason TEXT NOT NULL,
    cancel TEXT,
    not_before BIGINT,
    created BIGINT NOT NULL,
    started BIGINT,
    -- Set exactly where the state is terminal; so "live" is `ended IS NULL`, in queries and in the partial index.
    ended BIGINT,
    outcome TEXT,
    last_event BIGINT NOT NULL,
    decision TEXT
) WITH (fillfactor = 80);

CREATE UNIQUE INDEX runs_key ON runs (tenant, key) WHERE key IS NOT NULL;
CREATE INDEX runs_created ON runs (created, id);
CREATE INDEX runs_tenant_created ON runs (tenant, created, id);
CREATE INDEX runs_live ON runs (created, id) WHERE ended IS NULL;
CREATE INDEX runs_ended ON runs (ended, id) WHERE ended IS NOT NULL;

CREATE TABLE specs (
    rn BIGINT PRIMARY KEY REFERENCES runs (rn),
    spec TEXT NOT NULL
);

-- `created` and `id` are copies of the run's: a listing by label needs no sort.
CREATE TABLE labels (
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    created BIGINT NOT NULL,
    id BYTEA NOT NULL,
    rn BIGINT NOT NULL REFERENCES runs (rn),
    PRIMARY KEY (name, value, created, id)
);
CREATE INDEX labels_run ON labels (rn);

CREATE TABLE events (
    rn BIGINT NOT NULL REFERENCES runs (rn),
    seq BIGINT NOT NULL,
    time BIGINT NOT NULL,
    event TEXT NOT NULL,
    PRIMARY KEY (rn, seq)
);

CREATE TABLE attempts (
    rn BIGINT NOT NULL REFERENCES runs (rn),
    number BIGINT NOT NULL,
    backend TEXT NOT NULL,
    started BIGINT,
    ended BIGINT NOT NULL,
    outcome TEXT NOT NULL,
    PRIMARY KEY (rn, number)
);

CREATE TABLE timers (
    rn BIGINT NOT NULL REFERENCES runs (rn),
    kind TEXT NOT NULL,
    due BIGINT NOT NULL,
    duration BIGINT NOT NULL,
    PRIMARY KEY (rn, kind)
);

CREATE TABLE probe (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    count BIGINT NOT NULL
);
INSERT INTO probe VALUES (1, 0);

CREATE TABLE sweeps (
    kind TEXT PRIMARY KEY,
    ended BIGINT NOT NULL,
    id BYTEA NOT NULL
);

CREATE TABLE removals (
    rn BIGINT PRIMARY KEY REFERENCES runs (rn)
);

CREATE TABLE named_uploads (
    upload TEXT NOT NULL,
    rn BIGINT NOT NULL REFERENCES runs (rn),
    PRIMARY KEY (upload, rn)
);
CREATE INDEX named_uploads_run ON named_uploads (rn);

CREATE TABLE traffic (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    version BIGINT NOT NULL CHECK (version > 0),
    state TEXT NOT NULL
);

CREATE TABLE audit (
    -- Without holes, so not from a sequence: whoever adds an entry has the row of `traffic`.
    seq BIGINT PRIMARY KEY,
    time BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    what TEXT NOT NULL,
    reason TEXT NOT NULL,
    version BIGINT NOT NULL
);
CREATE FUNCTION audit_only_grows() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION audit_only_grows();

CREATE TABLE pairs (
    pn BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- Ids, not row numbers: a pair may outlive its primary.
    primary_id BYTEA NOT NULL UNIQUE,
    shadow_id BYTEA NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    image TEXT,
    primary_backend TEXT NOT NULL,
    shadow_backend TEXT NOT NULL,
    stage TEXT NOT NULL,
    since BIGINT NOT NULL,
    judged BIGINT,
    differs BOOLEAN NOT NULL DEFAULT FALSE,
    verdict TEXT
);
CREATE INDEX pairs_open ON pairs (stage, pn) WHERE judged IS NULL;
CREATE INDEX pairs_differing ON pairs (pn) WHERE differs;

-- One row: which service writes, and the number of the last group of writes that it committed. A service that another one has
-- replaced changes no row here, and so commits nothing; one whose commit was not answered finds here whether it happened.
CREATE TABLE writer (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    holder TEXT NOT NULL,
    number BIGINT NOT NULL
) WITH (fillfactor = 10);
INSERT INTO writer VALUES (1, '', 0);
