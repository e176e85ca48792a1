//! Pairs of runs and shadows: what reads them, and what writes them.

use runner_core::{
    clock::Timestamp,
    id::{BackendName, RunId},
    shadow::{Pair, PairFilter, PairRecord, Stage, Verdict},
    store::StoreError,
};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params, params, types::Value};

use super::{
    error::Fault,
    write::{Context, Verb},
};
use crate::row::{self, pair_columns, to_json};

pub(crate) const INSERT: &str = "INSERT INTO pairs (primary_id, shadow_id, tenant, image, primary_backend, shadow_backend, stage, since) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'pending', ?7) ON CONFLICT DO NOTHING";
/// Not once the removal of the primary was begun: what is removed gets nothing new.
pub(crate) const BEGIN: &str = "UPDATE pairs SET stage = 'running' WHERE shadow_id = ?1 AND stage = 'pending' \
     AND NOT EXISTS (SELECT 1 FROM runs r JOIN removals m ON m.rn = r.rn WHERE r.id = pairs.primary_id)";
pub(crate) const JUDGE: &str = "UPDATE pairs SET stage = :stage, judged = :judged, differs = :differs, verdict = :verdict \
     WHERE primary_id = :primary AND stage IN ('pending', 'running')";
pub(crate) const SHADOW_REMOVED: &str = "DELETE FROM pairs WHERE shadow_id = ?1";
pub(crate) const ORPHAN: &str = "UPDATE pairs SET stage = 'orphaned', judged = NULL, differs = 0, verdict = NULL \
     WHERE primary_id = ?1 AND EXISTS (SELECT 1 FROM runs r WHERE r.id = pairs.shadow_id)";
pub(crate) const PRIMARY_REMOVED: &str = "DELETE FROM pairs WHERE primary_id = ?1 AND stage <> 'orphaned'";

pub(crate) const BY_RUN: &str =
    concat!("SELECT ", pair_columns!(), " FROM pairs WHERE primary_id = ?1 OR shadow_id = ?1");
/// Every stage that is read so has no verdict, and no other has.
pub(crate) const OPEN: &str = concat!(
    "SELECT ",
    pair_columns!(),
    " FROM pairs INDEXED BY pairs_open WHERE judged IS NULL AND stage = ?1 ORDER BY pn LIMIT ?2"
);

/// Stores the pair of a run that ends.
pub(crate) fn insert(cx: &Context<'_>, pair: &Pair, since: Timestamp) -> Result<(), Fault> {
    cx.statement(INSERT)?.execute(params![
        row::key(pair.primary),
        row::key(pair.shadow()),
        pair.tenant.as_str(),
        pair.image,
        pair.primary_backend.as_str(),
        pair.shadow_backend.as_str(),
        since.as_micros(),
    ])?;
    Ok(())
}

/// Whether a shadow may be accepted; its pair is `Running` then.
pub(crate) fn begin(cx: &Context<'_>, shadow: RunId) -> Result<bool, Fault> {
    Ok(cx.statement(BEGIN)?.execute([row::key(shadow)])? == 1)
}

/// A run is gone.
pub(crate) fn removed(cx: &Context<'_>, run: RunId) -> Result<(), Fault> {
    for sql in [SHADOW_REMOVED, ORPHAN, PRIMARY_REMOVED] {
        cx.statement(sql)?.execute([row::key(run)])?;
    }
    Ok(())
}

/// `Store::judge_pair`.
pub(crate) struct Judge {
    primary: RunId,
    stage: Stage,
    differs: bool,
    verdict: String,
    time: Timestamp,
}

impl Judge {
    pub(crate) fn new(primary: RunId, verdict: &Verdict, time: Timestamp) -> Result<Self, StoreError> {
        let (stage, differs) = (verdict.stage(), verdict.differs());
        Ok(Self { primary, stage, differs, verdict: to_json(verdict)?, time })
    }
}

impl Verb for Judge {
    type Answer = bool;

    fn execute(&self, cx: &mut Context<'_>) -> Result<bool, Fault> {
        let changed = cx.statement(JUDGE)?.execute(named_params! {
            ":stage": self.stage.as_str(),
            ":judged": self.time.as_micros(),
            ":differs": self.differs,
            ":verdict": self.verdict,
            ":primary": row::key(self.primary),
        })?;
        Ok(changed == 1)
    }
}

/// The pair that a run is part of.
pub(crate) fn get(conn: &Connection, run: RunId) -> Result<Option<PairRecord>, Fault> {
    let mut statement = conn.prepare_cached(BY_RUN)?;
    let found = statement.query_row([row::key(run)], |row| Ok(row::pair(row))).optional()?;
    Ok(found.transpose()?)
}

/// Pairs at a stage.
pub(crate) fn at(conn: &Connection, stage: Stage, max: usize) -> Result<Vec<PairRecord>, Fault> {
    match stage {
        Stage::Pending | Stage::Running | Stage::Orphaned => {}
        Stage::Compared | Stage::Skipped => {
            let what = format!("pairs that are {} are listed, not worked at", stage.as_str());
            return Err(StoreError::Other(what).into());
        }
    }
    let mut statement = conn.prepare_cached(OPEN)?;
    let mut rows = statement.query(params![stage.as_str(), i64::try_from(max).unwrap_or(i64::MAX)])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.extend(decoded(row));
    }
    Ok(found)
}

/// Pairs with a verdict, newest first.
pub(crate) fn list(
    conn: &Connection,
    filter: &PairFilter,
    before: Option<u64>,
    max: usize,
) -> Result<Vec<PairRecord>, Fault> {
    let (sql, values) = list_sql(filter, before);
    let mut statement = conn.prepare_cached(&sql)?;
    // Rows come in the order of an index, one by one, so no limit is needed: it would count rows that do not decode.
    let mut rows = statement.query(rusqlite::params_from_iter(values))?;
    let mut found = Vec::new();
    while found.len() < max
        && let Some(row) = rows.next()?
    {
        found.extend(decoded(row));
    }
    Ok(found)
}

fn decoded(row: &Row<'_>) -> Option<PairRecord> {
    row::pair(row).inspect_err(row::left_out).ok()
}

/// The statement of a listing: the order of numbers, or of those that differ.
pub(crate) fn list_sql(filter: &PairFilter, before: Option<u64>) -> (String, Vec<Value>) {
    let PairFilter { image, primary_backend, shadow_backend, since, differing } = filter;
    let index = if *differing { "INDEXED BY pairs_differing" } else { "NOT INDEXED" };
    let mut sql = format!(
        concat!("SELECT ", pair_columns!(), " FROM pairs {} WHERE pn < ? AND judged IS NOT NULL"),
        index
    );
    let mut values = vec![Value::Integer(before.map_or(i64::MAX, row::int))];
    if *differing {
        sql.push_str(" AND differs = 1");
    }
    let name = |backend: &BackendName| backend.as_str().to_owned();
    let texts = [
        ("image", image.clone()),
        ("primary_backend", primary_backend.as_ref().map(name)),
        ("shadow_backend", shadow_backend.as_ref().map(name)),
    ];
    for (column, text) in texts {
        if let Some(text) = text {
            sql.push_str(" AND ");
            sql.push_str(column);
            sql.push_str(" = ?");
            values.push(Value::Text(text));
        }
    }
    if let Some(since) = since {
        sql.push_str(" AND since >= ?");
        values.push(Value::Integer(since.as_micros()));
    }
    sql.push_str(" ORDER BY pn DESC");
    (sql, values)
}
