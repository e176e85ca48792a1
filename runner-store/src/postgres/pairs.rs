//! Pairs of runs and shadows: what reads them, and what writes them.

use async_trait::async_trait;
use runner_core::{
    clock::Timestamp,
    id::{BackendName, RunId},
    shadow::{Pair, PairFilter, PairRecord, Stage, Verdict},
    store::StoreError,
};
use tokio_postgres::Row;

use super::{
    columns::prose,
    connect::Conn,
    error::Fault,
    read::{Conditions, Value},
    write::{Context, Verb},
};
use crate::row::{self, Columns as _, pair_columns, to_json};

const INSERT: &str = "INSERT INTO pairs (primary_id, shadow_id, tenant, image, primary_backend, shadow_backend, stage, since) \
     VALUES ($1, $2, $3, $4, $5, $6, 'pending', $7) ON CONFLICT DO NOTHING";
/// Not once the removal of the primary was begun: what is removed gets nothing new.
const BEGIN: &str = "UPDATE pairs SET stage = 'running' WHERE shadow_id = $1 AND stage = 'pending' \
     AND NOT EXISTS (SELECT 1 FROM runs r JOIN removals m ON m.rn = r.rn WHERE r.id = pairs.primary_id)";
const JUDGE: &str = "UPDATE pairs SET stage = $1, judged = $2, differs = $3, verdict = $4 \
     WHERE primary_id = $5 AND stage IN ('pending', 'running')";
const SHADOW_REMOVED: &str = "DELETE FROM pairs WHERE shadow_id = $1";
const ORPHAN: &str = "UPDATE pairs SET stage = 'orphaned', judged = NULL, differs = FALSE, verdict = NULL \
     WHERE primary_id = $1 AND EXISTS (SELECT 1 FROM runs r WHERE r.id = pairs.shadow_id)";
const PRIMARY_REMOVED: &str = "DELETE FROM pairs WHERE primary_id = $1 AND stage <> 'orphaned'";
const BY_RUN: &str =
    concat!("SELECT ", pair_columns!(), " FROM pairs WHERE primary_id = $1 OR shadow_id = $1");
/// Every stage that is read so has no verdict, and no other has.
const OPEN: &str = concat!(
    "SELECT ",
    pair_columns!(),
    " FROM pairs WHERE judged IS NULL AND stage = $1 ORDER BY pn LIMIT $2"
);
/// Rows of one fetch of a listing.
const FETCH: usize = 500;

/// Stores the pair of a run that ends.
pub(crate) async fn insert(cx: &Context<'_>, pair: &Pair, since: Timestamp) -> Result<(), Fault> {
    let image = pair.image.as_deref().map(prose).transpose()?;
    cx.conn
        .execute(
            INSERT,
            &[
                &row::key(pair.primary).as_slice(),
                &row::key(pair.shadow()).as_slice(),
                &pair.tenant.as_str(),
                &image,
                &pair.primary_backend.as_str(),
                &pair.shadow_backend.as_str(),
                &since.as_micros(),
            ],
        )
        .await?;
    Ok(())
}

/// Whether a shadow may be accepted; its pair is `Running` then.
pub(crate) async fn begin(cx: &Context<'_>, shadow: RunId) -> Result<bool, Fault> {
    Ok(cx.conn.execute(BEGIN, &[&row::key(shadow).as_slice()]).await? == 1)
}

/// A run is gone. The server executes these in this order.
pub(crate) async fn removed(cx: &Context<'_>, run: RunId) -> Result<(), Fault> {
    let key = row::key(run);
    for sql in [SHADOW_REMOVED, ORPHAN, PRIMARY_REMOVED] {
        cx.conn.execute(sql, &[&key.as_slice()]).await?;
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

#[async_trait]
impl Verb for Judge {
    type Answer = bool;

    async fn execute(&self, cx: &mut Context<'_>) -> Result<bool, Fault> {
        let changed = cx
            .conn
            .execute(
                JUDGE,
                &[
                    &self.stage.as_str(),
                    &self.time.as_micros(),
                    &self.differs,
                    &self.verdict,
                    &row::key(self.primary).as_slice(),
                ],
            )
            .await?;
        Ok(changed == 1)
    }
}

/// The pair that a run is part of.
pub(crate) async fn get(conn: &Conn, run: RunId) -> Result<Option<PairRecord>, Fault> {
    Ok(conn.row(BY_RUN, &[&row::key(run).as_slice()]).await?.map(|row| row::pair(&row)).transpose()?)
}

/// Pairs at a stage.
pub(crate) async fn at(conn: &Conn, stage: Stage, max: usize) -> Result<Vec<PairRecord>, Fault> {
    match stage {
        Stage::Pending | Stage::Running | Stage::Orphaned => {}
        Stage::Compared | Stage::Skipped => {
            let what = format!("pairs that are {} are listed, not worked at", stage.as_str());
            return Err(StoreError::Other(what).into());
        }
    }
    let rows = conn.rows(OPEN, &[&stage.as_str(), &i64::try_from(max).unwrap_or(i64::MAX)]).await?;
    Ok(rows.iter().filter_map(decoded).collect())
}

/// Pairs with a verdict, newest first.
pub(crate) async fn list(
    conn: &Conn,
    filter: &PairFilter,
    before: Option<u64>,
    max: usize,
) -> Result<Vec<PairRecord>, Fault> {
    let mut before = before.map_or(i64::MAX, row::int);
    let mut found = Vec::new();
    while found.len() < max {
        let fetch = (max - found.len()).min(FETCH);
        let what = concat!(pair_columns!(), " FROM pairs");
        let rows = listing(filter, before)?.rows(conn, what, " ORDER BY pn DESC", fetch).await?;
        found.extend(rows.iter().filter_map(decoded));
        match rows.last() {
            Some(last) if rows.len() == fetch => before = last.int(0).ok().flatten().unwrap_or(i64::MIN),
            _ => break,
        }
    }
    Ok(found)
}

fn decoded(row: &Row) -> Option<PairRecord> {
    row::pair(row).inspect_err(row::left_out).ok()
}

/// The conditions of a listing: the order of numbers, or of those that differ.
fn listing(filter: &PairFilter, before: i64) -> Result<Conditions, StoreError> {
    let PairFilter { image, primary_backend, shadow_backend, since, differing } = filter;
    let mut conditions = Conditions::default();
    conditions.and("pn < ? AND judged IS NOT NULL", [Value::Int(before)]);
    if *differing {
        conditions.and("differs", []);
    }
    let name = |backend: &BackendName| backend.as_str().to_owned();
    let texts = [
        ("image = ?", image.as_deref().map(prose).transpose()?),
        ("primary_backend = ?", primary_backend.as_ref().map(name)),
        ("shadow_backend = ?", shadow_backend.as_ref().map(name)),
    ];
    for (condition, text) in texts {
        if let Some(text) = text {
            conditions.and(condition, [Value::Text(text)]);
        }
    }
    if let Some(since) = since {
        conditions.and("since >= ?", [Value::Int(since.as_micros())]);
    }
    Ok(conditions)
}
