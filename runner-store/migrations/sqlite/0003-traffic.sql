-- Version 3. Where new runs go: the traffic's state, who changed it, and what decided for each run.
-- Frozen: what has been released is changed by a later migration only.

-- JSON of the decision. Null for runs from before this version.
ALTER TABLE runs ADD COLUMN decision TEXT;

-- At most one row: none until something is changed for the first time.
CREATE TABLE traffic (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL CHECK (version > 0),
    state TEXT NOT NULL
) STRICT;

-- Never changed, never removed: its numbers have no holes, and no number is given twice.
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    time INTEGER NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    what TEXT NOT NULL,
    reason TEXT NOT NULL,
    version INTEGER NOT NULL
) STRICT;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN SELECT raise(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_not_removed BEFORE DELETE ON audit BEGIN SELECT raise(ABORT, 'the audit log is append-only'); END;
