//! Pairs of runs and shadows, in memory.

use std::collections::BTreeMap;

use crate::{
    clock::Timestamp,
    id::RunId,
    shadow::{Pair, PairFilter, PairRecord, Stage, Verdict},
};

/// The pairs of a [`MemoryStore`](super::store::MemoryStore).
#[derive(Debug, Default)]
pub(super) struct Pairs {
    rows: BTreeMap<u64, PairRecord>,
    last: u64,
}

impl Pairs {
    pub(super) fn add(&mut self, pair: Pair, since: Timestamp) {
        if self.get(pair.primary).is_none() {
            self.last += 1;
            let (number, stage) = (self.last, Stage::Pending);
            self.rows.insert(number, PairRecord { number, pair, stage, since, judged: None, verdict: None });
        }
    }

    /// The shadow is accepted now. False: it is not to be.
    pub(super) fn begin(&mut self, shadow: RunId, is_being_removed: impl Fn(RunId) -> bool) -> bool {
        let row = self.rows.values_mut().find(|row| row.pair.shadow() == shadow);
        match row.filter(|row| row.stage == Stage::Pending && !is_being_removed(row.pair.primary)) {
            Some(row) => {
                row.stage = Stage::Running;
                true
            }
            None => false,
        }
    }

    /// A run is gone.
    pub(super) fn removed(&mut self, run: RunId, shadow_is_stored: bool) {
        self.rows.retain(|_, row| row.pair.shadow() != run);
        if !shadow_is_stored {
            self.rows.retain(|_, row| row.pair.primary != run);
        }
        for row in self.rows.values_mut().filter(|row| row.pair.primary == run) {
            (row.stage, row.judged, row.verdict) = (Stage::Orphaned, None, None);
        }
    }

    pub(super) fn get(&self, run: RunId) -> Option<PairRecord> {
        self.rows.values().find(|row| row.pair.primary == run || row.pair.shadow() == run).cloned()
    }

    pub(super) fn at(&self, stage: Stage, max: usize) -> Vec<PairRecord> {
        self.rows.values().filter(|row| row.stage == stage).take(max).cloned().collect()
    }

    pub(super) fn judge(&mut self, primary: RunId, verdict: &Verdict, time: Timestamp) -> bool {
        let open = |row: &&mut PairRecord| {
            row.pair.primary == primary && matches!(row.stage, Stage::Pending | Stage::Running)
        };
        let Some(row) = self.rows.values_mut().find(open) else { return false };
        (row.stage, row.judged, row.verdict) = (verdict.stage(), Some(time), Some(verdict.clone()));
        true
    }

    pub(super) fn list(&self, filter: &PairFilter, before: Option<u64>, max: usize) -> Vec<PairRecord> {
        let below = self.rows.range(..before.unwrap_or(u64::MAX)).rev().map(|(_, row)| row);
        below.filter(|row| filter.matches(row)).take(max).cloned().collect()
    }
}
