//! Faults on demand, where requests come in: a store, or the network before it, that misbehaves.

use std::{fmt, sync::Mutex, sync::PoisonError};

/// A request, as far as a fault looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// `GET`, `PUT` …
    pub method: String,
    /// Decoded by nobody.
    pub path: String,
    /// Empty where there is none.
    pub query: String,
}

/// What happens to a request instead of, or beside, its being served.
#[derive(Clone)]
pub enum Action {
    /// Answered with this status and an error document with this code.
    Status(u16, &'static str),
    /// Never answered.
    Hang,
    /// Answered byte by byte, one a second.
    Trickle,
    /// So many bytes of its body are read; then the connection ends.
    CutRequest(usize),
    /// Served; after so many bytes of the answer's body the connection ends.
    CutAnswer(usize),
    /// Served; the connection ends before the answer.
    LoseAnswer,
    /// Not served, and answered `200 OK` with an error document of this code.
    OkWithError(&'static str),
    /// Something is done first; then it is served.
    First(std::sync::Arc<dyn Fn() + Send + Sync>),
}

impl fmt::Debug for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Status(..) => "Status",
            Self::Hang => "Hang",
            Self::Trickle => "Trickle",
            Self::CutRequest(_) => "CutRequest",
            Self::CutAnswer(_) => "CutAnswer",
            Self::LoseAnswer => "LoseAnswer",
            Self::OkWithError(_) => "OkWithError",
            Self::First(_) => "First",
        })
    }
}

type Matches = Box<dyn Fn(&Seen) -> bool + Send + Sync>;

/// Strikes some of the requests that match.
pub struct Fault {
    matches: Matches,
    action: Action,
    skip: u32,
    left: u32,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fault")
            .field("action", &self.action)
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl Fault {
    /// Strikes the next request of this method whose query holds this text. Empty text: any.
    pub fn on(method: &'static str, query: &'static str, action: Action) -> Self {
        let matches = move |seen: &Seen| seen.method == method && seen.query.contains(query);
        Self { matches: Box::new(matches), action, skip: 0, left: 1 }
    }

    /// Strikes only requests whose path holds this text.
    #[must_use]
    pub fn at(mut self, path: &'static str) -> Self {
        let matches = self.matches;
        self.matches = Box::new(move |seen: &Seen| matches(seen) && seen.path.contains(path));
        self
    }

    /// Lets so many pass before.
    #[must_use]
    pub fn after(mut self, skip: u32) -> Self {
        self.skip = skip;
        self
    }

    /// Strikes so many in a row.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.left = times;
        self
    }
}

/// The faults of a server, and what it was asked.
#[derive(Debug, Default)]
pub struct Faults {
    faults: Mutex<Vec<Fault>>,
    seen: Mutex<Vec<Seen>>,
}

/// Requests that are remembered.
const REMEMBERED: usize = 100_000;

impl Faults {
    /// Sets a fault; several are independent of one another.
    pub fn set(&self, fault: Fault) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    /// Ends all faults.
    pub fn clear(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether every fault that was set has struck as often as it was to.
    pub fn all_struck(&self) -> bool {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Requests of this method whose query holds this text.
    pub fn count(&self, method: &str, query: &str) -> usize {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|seen| seen.method == method && seen.query.contains(query)).count()
    }

    /// What is to happen to this request.
    pub(super) fn strike(&self, request: Seen) -> Option<Action> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let mut struck = None;
        for at in 0..faults.len() {
            if (faults[at].matches)(&request) {
                if faults[at].skip > 0 {
                    faults[at].skip -= 1;
                    continue;
                }
                faults[at].left -= 1;
                struck = Some(faults[at].action.clone());
                if faults[at].left == 0 {
                    faults.remove(at);
                }
                break;
            }
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < REMEMBERED {
            seen.push(request);
        }
        struck
    }
}
