//! Shadows and parity: what is stored of a run's second execution on another backend, and how the two compare.
//!
//! Nothing here reads a clock or a store. [`crate::traffic::Shadows`] says which runs have a shadow; `service/shadow.rs` executes them.

mod compare;
mod log;

use serde::{Deserialize, Serialize};

pub use self::{
    compare::{Difference, DifferenceKind, Facts, MAX_DIFFERENCES, Parity, Phases, Side, compare},
    log::{LogDigest, LogDigester, StreamDigest},
};
use crate::{
    clock::Timestamp,
    id::{BackendName, RunId, TenantId},
    store::RunRecord,
    traffic::{NoShadow, Shadowing},
};

/// A pair that is to be: stored in the transaction that ends its primary, so that neither is known without the other.
/// The shadow's id is [`RunId::shadow`] of the primary's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The run that a caller asked for.
    pub primary: RunId,
    /// Whose.
    pub tenant: TenantId,
    /// The image that its spec names.
    pub image: Option<String>,
    /// Where the primary ran.
    pub primary_backend: BackendName,
    /// Where the shadow is to run.
    pub shadow_backend: BackendName,
}

impl Pair {
    /// The pair of a run that was decided to have a shadow. `None`: it was not.
    pub fn of(run: &RunRecord) -> Option<Self> {
        match run.decision.as_ref()?.shadow.as_ref()? {
            Shadowing::No(_) => None,
            Shadowing::On(backend) => Some(Self {
                primary: run.id,
                tenant: run.tenant.clone(),
                image: run.spec.image.clone(),
                primary_backend: run.backend.clone(),
                shadow_backend: backend.clone(),
            }),
        }
    }

    /// The id of the shadow.
    pub fn shadow(&self) -> RunId {
        self.primary.shadow()
    }
}

/// How far a pair has come.
///
/// `Pending → Running → Compared`, or from either to `Skipped`. `Orphaned` comes after any stage in which the shadow is a stored run,
/// when its primary is removed, and ends with the shadow's own removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The primary is over; the shadow has yet to be accepted.
    Pending,
    /// The shadow is a stored run, live or not.
    Running,
    /// The primary is gone; the shadow is to go too.
    Orphaned,
    /// Both are over and were compared.
    Compared,
    /// There is no comparison, and there will be none.
    Skipped,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 5] = [Self::Pending, Self::Running, Self::Orphaned, Self::Compared, Self::Skipped];

    /// Its name in stores.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Orphaned => "orphaned",
            Self::Compared => "compared",
            Self::Skipped => "skipped",
        }
    }
}

/// What came of a pair.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Both are over; this is how they compare.
    Compared(Box<Parity>),
    /// There is nothing to compare.
    Skipped(NoShadow),
}

impl Verdict {
    /// The stage that it leads to.
    pub const fn stage(&self) -> Stage {
        match self {
            Self::Compared(_) => Stage::Compared,
            Self::Skipped(_) => Stage::Skipped,
        }
    }

    /// Whether the two were compared, and differ.
    pub fn differs(&self) -> bool {
        match self {
            Self::Compared(parity) => !parity.agrees(),
            Self::Skipped(_) => false,
        }
    }
}

/// A pair as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct PairRecord {
    /// Its number: grows in the order in which primaries ended.
    pub number: u64,
    /// The two.
    pub pair: Pair,
    /// How far it has come.
    pub stage: Stage,
    /// When the primary ended.
    pub since: Timestamp,
    /// When its verdict was stored.
    pub judged: Option<Timestamp>,
    /// Set exactly where the stage is `Compared` or `Skipped`.
    pub verdict: Option<Verdict>,
}

/// Which pairs to list. All that are given must hold. Only those with a verdict are ever listed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PairFilter {
    /// With exactly this image.
    pub image: Option<String>,
    /// Whose primary ran there.
    pub primary_backend: Option<BackendName>,
    /// Whose shadow was to run there.
    pub shadow_backend: Option<BackendName>,
    /// Whose primary ended at or after this.
    pub since: Option<Timestamp>,
    /// Only those that were compared and differ.
    pub differing: bool,
}

impl PairFilter {
    /// Whether a pair is meant.
    pub fn matches(&self, record: &PairRecord) -> bool {
        let PairRecord { pair, since, verdict, .. } = record;
        let Some(verdict) = verdict else { return false };
        self.image.as_ref().is_none_or(|image| pair.image.as_ref() == Some(image))
            && self.primary_backend.as_ref().is_none_or(|backend| *backend == pair.primary_backend)
            && self.shadow_backend.as_ref().is_none_or(|backend| *backend == pair.shadow_backend)
            && self.since.is_none_or(|from| *since >= from)
            && (!self.differing || verdict.differs())
    }
}
