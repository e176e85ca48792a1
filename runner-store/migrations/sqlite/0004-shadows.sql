-- Version 4. Shadows: pairs of a run and its second execution on another backend, and how they compare.
-- Frozen: what has been released is changed by a later migration only.
-- A shadow is a row of `runs` whose id has 85ADB5 in bytes 7 to 9; see `RunId::shadow`.

CREATE TABLE pairs (
    -- Grows in the order in which primaries ended.
    pn INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Ids, not row numbers: a pair may outlive its primary.
    primary_id BLOB NOT NULL UNIQUE,
    shadow_id BLOB NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    image TEXT,
    primary_backend TEXT NOT NULL,
    shadow_backend TEXT NOT NULL,
    stage TEXT NOT NULL,
    since INTEGER NOT NULL,
    judged INTEGER,
    -- Copied out of the verdict, so that differing pairs are found by an index.
    differs INTEGER NOT NULL DEFAULT 0,
    -- JSON.
    verdict TEXT
) STRICT;

-- Of pairs that need work only, so it stays small.
CREATE INDEX pairs_open ON pairs (stage, pn) WHERE judged IS NULL;
CREATE INDEX pairs_differing ON pairs (pn) WHERE differs = 1;
