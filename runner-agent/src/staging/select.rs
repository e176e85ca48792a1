//! Which entries of a walked directory belong to an output.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use runner_core::spec::{Output, Pattern, path};
use runner_glob::Progress;

/// What an output takes of the directory that is walked for it: everything, or what a pattern matches and no other output
/// has.
#[derive(Debug, Clone)]
pub(super) struct Selection(Option<Matching>);

#[derive(Debug, Clone)]
struct Matching {
    pattern: Pattern,
    /// Paths of the outputs that are no globs.
    plain: Vec<String>,
    /// Globs that come before this one.
    earlier: Vec<Pattern>,
}

/// What is known of a directory that the walk is in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// How much of the pattern its path has matched; `None` where the whole of it, or of a directory above, so that
    /// everything in it is part of the output.
    progress: Option<Progress>,
    /// Another output has all that is in it.
    taken: bool,
}

/// What an entry is to the output.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verdict {
    /// Nothing in it can be part of the output.
    Ignore,
    /// Not part of it; where it is a directory, something in it may be.
    LookInside(Standing),
    /// Part of it; where it is a directory, with all that is in it.
    Take(Standing),
    /// The pattern matches, but another output has it.
    Elsewhere,
}

impl Selection {
    pub(super) fn all() -> Self {
        Self(None)
    }

    /// For the output at `index`, which is a glob.
    pub(super) fn matching(pattern: Pattern, outputs: &[Output], index: usize) -> Self {
        let plain = outputs.iter().filter(|output| !output.glob).map(|output| output.path.clone()).collect();
        let earlier = outputs[..index]
            .iter()
            .filter(|output| output.glob)
            // One that does not parse never got past admission.
            .filter_map(|output| output.pattern().ok())
            .collect();
        Self(Some(Matching { pattern, plain, earlier }))
    }

    /// Of the directory where the walk begins.
    pub(super) fn start(&self) -> Standing {
        match &self.0 {
            None => Standing { progress: None, taken: false },
            Some(matching) => {
                let base = matching.pattern.base();
                let above = base.match_indices('/').skip(1).map(|(at, _)| &base[..at]);
                let taken = above.chain([base]).any(|at| matching.is_taken(at.as_bytes()));
                Standing { progress: Some(matching.pattern.start()), taken }
            }
        }
    }

    /// Of the entry `name` of a directory; `path` is its path from where the walk began.
    pub(super) fn judge(&self, above: Standing, path: &OsStr, name: &[u8]) -> Verdict {
        let Some(matching) = &self.0 else { return Verdict::Take(above) };
        let progress = match above.progress {
            None => None,
            Some(progress) => {
                let next = matching.pattern.step(progress, name);
                if matching.pattern.is_match(next) {
                    None
                } else if next.is_dead() {
                    return Verdict::Ignore;
                } else {
                    Some(next)
                }
            }
        };
        let taken = above.taken || {
            let absolute = [matching.pattern.base().as_bytes(), b"/", path.as_bytes()].concat();
            matching.is_taken(&absolute)
        };
        match (progress, taken) {
            (None, true) => Verdict::Elsewhere,
            (None, false) => Verdict::Take(Standing { progress, taken }),
            (Some(_), _) => Verdict::LookInside(Standing { progress, taken }),
        }
    }
}

impl Matching {
    /// Whether another output names this very path, or a directory above it that is itself an output.
    fn is_taken(&self, absolute: &[u8]) -> bool {
        let at = std::str::from_utf8(absolute);
        self.plain.iter().any(|plain| match at {
            Ok(at) => at.len() >= plain.len() && path::overlap(at, plain),
            Err(_) => absolute.strip_prefix(plain.as_bytes()).is_some_and(|rest| rest.starts_with(b"/")),
        }) || self.earlier.iter().any(|earlier| earlier.matches(absolute))
    }
}
