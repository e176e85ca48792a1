-- Version 2. Retention: finished runs in the order of their end, how far each kind of sweep has come, which runs are being
-- removed, and which runs name an upload.
-- Frozen: what has been released is changed by a later migration only.

CREATE INDEX runs_ended ON runs (ended, id) WHERE ended IS NOT NULL;
-- A run's labels are found by the run only when it is removed.
CREATE INDEX labels_run ON labels (rn);

-- Of every run that ended at or before this, this kind of data is gone.
CREATE TABLE sweeps (
    kind TEXT PRIMARY KEY,
    ended INTEGER NOT NULL,
    id BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- Finished runs whose artifacts may be gone in part. What a crash interrupts is found here.
CREATE TABLE removals (
    rn INTEGER PRIMARY KEY REFERENCES runs (rn)
) STRICT;

-- Prefixes of uploads, `uploads/TENANT/NAME`, that a run's spec names.
CREATE TABLE named_uploads (
    upload TEXT NOT NULL,
    rn INTEGER NOT NULL REFERENCES runs (rn),
    PRIMARY KEY (upload, rn)
) STRICT, WITHOUT ROWID;
CREATE INDEX named_uploads_run ON named_uploads (rn);

-- Of the runs that are there already. A spec that is not JSON names nothing that anybody could read.
WITH
    valid (rn, spec) AS (SELECT rn, CASE WHEN json_valid(spec) THEN spec ELSE '{}' END FROM specs),
    named (rn, uri) AS (
        SELECT valid.rn, json_extract(input.value, '$.source.artifact') FROM valid, json_each(valid.spec, '$.inputs') AS input
        UNION ALL
        SELECT valid.rn, json_extract(output.value, '$.destination') FROM valid, json_each(valid.spec, '$.outputs') AS output
    ),
    -- What follows `artifact:uploads/`, and where the tenant's name in it ends.
    below (rn, rest, cut) AS (
        SELECT rn, substr(uri, 18), instr(substr(uri, 18), '/') FROM named WHERE uri LIKE 'artifact:uploads/%'
    )
INSERT OR IGNORE INTO named_uploads (upload, rn)
SELECT 'uploads/' || substr(rest, 1, cut) || substr(substr(rest, cut + 1), 1, instr(substr(rest, cut + 1) || '/', '/') - 1), rn
FROM below WHERE cut > 0 AND length(rest) > cut;
