//! Which directories a workload sees, and where they lie on the host. Pure.

use std::{collections::BTreeMap, path::PathBuf};

use runner_core::spec::{FieldViolation, InputSource, InvalidSpec, Output, RunSpec, path};
use serde::{Deserialize, Serialize};

/// Exists in every workload, read-only, also where the spec has no input.
pub const INPUTS_DIR: &str = "/inputs";
/// Exists in every workload, writable, also where the spec has no output.
pub const OUTPUTS_DIR: &str = "/outputs";

/// The kernel's own file systems. Nothing is mounted at or below them.
const KERNEL: &[&str] = &["/dev", "/proc", "/sys"];
/// Directories that hold an image's programs and configuration. A file may be put below them; no directory is mounted over
/// them, and no output lies in them.
const SYSTEM: &[&str] = &[
    "/bin", "/boot", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/run", "/sbin", "/usr", "/var/lib",
    "/var/run",
];
/// Directories that many parties share. Nothing is mounted over them; what lies directly in them is its own mount.
const SHARED: &[&str] = &["/", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/var"];
/// Scratch directories, empty when a workload starts. An output may lie directly in them.
const SCRATCH: &[&str] = &["/tmp", "/var/tmp"];

/// Leaves room in a key for the files' own paths.
const MAX_DESTINATION_BYTES: usize = 512;

/// What a mount's host side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountKind {
    /// A directory.
    Directory,
    /// One file.
    File,
}

/// One mount of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMount {
    /// Where it appears in the workload. Absolute, normal.
    pub target: String,
    /// Where it lies, relative to the attempt's staging root: `in/N` where it is read-only, `out/N` where it is writable.
    pub host: String,
    /// What it is.
    pub kind: MountKind,
    /// Whether the workload may write to it.
    pub writable: bool,
}

/// Where an input or an output lies: on which mount, and where on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Index into [`MountPlan::mounts`].
    pub mount: usize,
    /// Relative to the mount. Empty: the mount itself.
    pub relative: String,
}

/// The mounts of a workload, and where on them each input and output lies.
///
/// Rules:
///
/// 1. `/inputs` is one read-only directory and `/outputs` one writable directory, always. Inputs below `/inputs` and
///    outputs at or below `/outputs` lie on them. No input lies at or below `/outputs`, no output at or below `/inputs`.
/// 2. Any other input is a read-only mount of its own at exactly its path, so that it hides nothing of the image which the
///    spec does not name: a file for an object or inline bytes, a directory for a tree or an archive. An input below a
///    directory input lies on that one's mount. An input below a file input is refused.
/// 3. Any other output is published from a writable directory mounted at its parent, because a path does not say whether
///    the program will write a file or a directory there. The parent hides what the image has at its place. Where one
///    such parent contains another, only the outer one is mounted.
/// 4. Where that parent is the root or a directory that many parties share (`/home`, `/media`, `/mnt`, `/opt`, `/root`,
///    `/srv`, `/var`), the output itself is a directory made for it, empty when the program starts. It cannot be a file.
/// 5. A glob is published from a writable directory mounted at its base, the directory before its first wildcard; where
///    that lies in another output's directory, from there. It exists when the program starts.
/// 6. Refused: anything at or below `/dev`, `/proc` and `/sys`; an output at or below a directory that holds the image's
///    programs or configuration (`/etc`, `/usr`, `/bin` …); an input or output that is itself such a directory, a shared
///    one or (for inputs) `/tmp` or `/var/tmp`.
/// 7. Mounts come sorted by target, outer before inner; mounting them in this order, after the backend's own mounts (`/tmp`,
///    `HOME`), gives every path its innermost mount. That one is read-only for each input and writable for each output.
/// 8. Two destinations of outputs MUST NOT contain one another, and lie below `uploads/`: what is below `runs/` is written
///    by the service alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountPlan {
    /// Sorted by target, outer before inner.
    pub mounts: Vec<PlannedMount>,
    /// In the order of the spec's inputs.
    pub inputs: Vec<Place>,
    /// In the order of the spec's outputs. Of a glob: its base.
    pub outputs: Vec<Place>,
    /// Directories on writable mounts that exist before the program starts: the outputs' parents. Outer before inner.
    pub directories: Vec<Place>,
}

impl MountPlan {
    /// The mounts of `spec`. The same spec gives the same plan.
    ///
    /// # Errors
    /// A violation per input or output whose place the rules refuse.
    pub fn new(spec: &RunSpec) -> Result<Self, InvalidSpec> {
        let mut planner = Planner::default();
        planner.plan_inputs(spec);
        planner.plan_outputs(spec);
        planner.check_destinations(spec);
        if !planner.violations.is_empty() {
            return Err(InvalidSpec(planner.violations));
        }
        planner.finish(spec)
    }

    /// Where `place` lies on the host, relative to the attempt's staging root.
    ///
    /// # Panics
    /// Where `place` is not of this plan.
    pub fn host_path(&self, place: &Place) -> PathBuf {
        let mut path = PathBuf::from(&self.mounts[place.mount].host);
        if !place.relative.is_empty() {
            path.push(&place.relative);
        }
        path
    }
}

/// Whether the input is a directory where it appears.
pub(super) fn is_directory(input: &runner_core::spec::Input) -> bool {
    input.extract.is_some()
        || match &input.source {
            InputSource::Artifact(uri) => uri.is_tree(),
            // Not found yet only where admission has not looked: then all of them are a directory.
            InputSource::Run(output) => {
                output.found.as_ref().map_or(output.path.is_none(), |found| found.directory)
            }
            InputSource::Inline(_) | InputSource::Https(_) => false,
        }
}

/// Where an output is looked for: its path, or its pattern's base.
fn output_place(output: &Output) -> Result<String, String> {
    if output.glob {
        output.pattern().map(|pattern| pattern.base().to_owned())
    } else {
        Ok(output.path.clone())
    }
}

fn is_below(place: &str, top: &str) -> bool {
    place.len() > top.len() && path::overlap(place, top)
}

fn is_at_or_below(place: &str, top: &str) -> bool {
    place == top || is_below(place, top)
}

/// The directory that contains `place`.
fn parent(place: &str) -> &str {
    match place.rsplit_once('/') {
        None | Some(("", _)) => "/",
        Some((parent, _)) => parent,
    }
}

#[derive(Default)]
struct Planner {
    violations: Vec<FieldViolation>,
    /// Target → (kind, writable), for all but the nested ones.
    mounts: BTreeMap<String, (MountKind, bool)>,
    /// Absolute paths of the outputs' parents.
    parents: Vec<String>,
}

impl Planner {
    fn refuse(&mut self, field: String, reason: &'static str, what: &str) {
        self.violations.push(FieldViolation::new(field, reason, what));
    }

    fn plan_inputs(&mut self, spec: &RunSpec) {
        self.mounts.insert(INPUTS_DIR.to_owned(), (MountKind::Directory, false));
        for (i, input) in spec.inputs.iter().enumerate() {
            let at = input.path.as_str();
            let field = || format!("spec.inputs[{i}].path");
            if let Some(fault) = path::fault(at) {
                self.refuse(field(), "INVALID", &format!("the path {fault}"));
                continue;
            }
            if is_at_or_below(at, OUTPUTS_DIR) {
                self.refuse(field(), "FORBIDDEN", "lies in /outputs, which the program writes to");
                continue;
            }
            if KERNEL.iter().any(|top| is_at_or_below(at, top)) {
                self.refuse(field(), "FORBIDDEN", "lies in a file system of the kernel");
                continue;
            }
            if SYSTEM.iter().chain(SHARED).chain(SCRATCH).any(|top| at == *top) {
                self.refuse(field(), "FORBIDDEN", "would hide a directory that images need");
                continue;
            }
            if at == INPUTS_DIR && !is_directory(input) {
                self.refuse(field(), "INVALID", "/inputs is a directory; name a file below it");
                continue;
            }
            let outer = spec.inputs.iter().filter(|outer| is_below(at, &outer.path));
            let mut inside_a_directory = is_at_or_below(at, INPUTS_DIR);
            let mut inside_a_file = false;
            for outer in outer {
                inside_a_directory |= is_directory(outer);
                inside_a_file |= !is_directory(outer);
            }
            if inside_a_file {
                self.refuse(field(), "INVALID", "lies below an input that is a file");
            } else if !inside_a_directory {
                let kind = if is_directory(input) { MountKind::Directory } else { MountKind::File };
                self.mounts.insert(at.to_owned(), (kind, false));
            }
        }
    }

    fn plan_outputs(&mut self, spec: &RunSpec) {
        let mut writable = vec![OUTPUTS_DIR.to_owned()];
        let plain: Vec<&str> =
            spec.outputs.iter().filter(|output| !output.glob).map(|output| output.path.as_str()).collect();
        for (i, output) in spec.outputs.iter().enumerate() {
            let field = || format!("spec.outputs[{i}].path");
            if output.glob {
                match output_place(output) {
                    Ok(base) => self.plan_glob(base, field(), &plain, &mut writable),
                    Err(fault) => self.refuse(field(), "INVALID", &fault),
                }
                continue;
            }
            let at = output.path.as_str();
            if let Some(fault) = path::fault(at) {
                self.refuse(field(), "INVALID", &format!("the path {fault}"));
            } else if is_at_or_below(at, INPUTS_DIR) {
                self.refuse(field(), "FORBIDDEN", "lies in /inputs, which is read-only");
            } else if KERNEL.iter().any(|top| is_at_or_below(at, top)) {
                self.refuse(field(), "FORBIDDEN", "lies in a file system of the kernel");
            } else if SYSTEM.iter().any(|top| is_at_or_below(at, top)) || SHARED.contains(&at) {
                let what =
                    "lies in a directory of the image; write below /outputs, or another directory of its own";
                self.refuse(field(), "FORBIDDEN", what);
            } else if SHARED.contains(&parent(at)) || at == OUTPUTS_DIR || SCRATCH.contains(&at) {
                writable.push(at.to_owned());
            } else {
                writable.push(parent(at).to_owned());
                self.parents.push(parent(at).to_owned());
            }
        }
        // By whole names, so that an outer directory comes right before what is in it.
        writable.sort_by(|a, b| a.split('/').cmp(b.split('/')));
        let mut outer: Option<String> = None;
        for target in writable {
            if outer.as_ref().is_none_or(|outer| !is_at_or_below(&target, outer)) {
                outer = Some(target.clone());
                self.mounts.insert(target, (MountKind::Directory, true));
            }
        }
    }

    fn plan_glob(&mut self, base: String, field: String, plain: &[&str], writable: &mut Vec<String>) {
        if is_at_or_below(&base, INPUTS_DIR) {
            self.refuse(field, "FORBIDDEN", "lies in /inputs, which is read-only");
        } else if KERNEL.iter().any(|top| is_at_or_below(&base, top)) {
            self.refuse(field, "FORBIDDEN", "lies in a file system of the kernel");
        } else if SYSTEM.iter().any(|top| is_at_or_below(&base, top)) || SHARED.contains(&base.as_str()) {
            let what = "a pattern names a directory of its own before its first wildcard, such as /outputs";
            self.refuse(field, "FORBIDDEN", what);
        } else {
            writable.push(base.clone());
            // An output that is a directory is the program's to make: it is required, perhaps.
            if !plain.iter().any(|plain| is_at_or_below(&base, plain)) {
                self.parents.push(base);
            }
        }
    }

    fn check_destinations(&mut self, spec: &RunSpec) {
        let destinations: Vec<(usize, &str)> = spec
            .outputs
            .iter()
            .enumerate()
            .filter_map(|(i, output)| Some((i, output.destination.as_ref()?.key().as_str())))
            .collect();
        for (n, (i, destination)) in destinations.iter().enumerate() {
            let field = format!("spec.outputs[{i}].destination");
            if !is_below(destination, "uploads") {
                self.refuse(field, "FORBIDDEN", "must lie below uploads/TENANT/");
            } else if destination.len() > MAX_DESTINATION_BYTES {
                self.refuse(field, "TOO_LARGE", "has more than 512 bytes");
            } else if destinations[..n].iter().any(|(_, other)| path::overlap(destination, other)) {
                self.refuse(field, "DUPLICATE", "contains, or lies in, the destination of another output");
            }
        }
    }

    fn finish(self, spec: &RunSpec) -> Result<MountPlan, InvalidSpec> {
        let mut targets: Vec<(String, (MountKind, bool))> = self.mounts.into_iter().collect();
        targets.sort_by(|a, b| a.0.split('/').cmp(b.0.split('/')));
        let (mut inputs, mut outputs) = (0, 0);
        let mounts: Vec<PlannedMount> = targets
            .into_iter()
            .map(|(target, (kind, writable))| {
                let (side, number) = if writable { ("out", &mut outputs) } else { ("in", &mut inputs) };
                let host = format!("{side}/{number}");
                *number += 1;
                PlannedMount { target, host, kind, writable }
            })
            .collect();
        let place = |at: &str| -> Option<Place> {
            // The last one that covers it is the innermost: outer mounts sort before inner ones.
            let mount = mounts.iter().rposition(|mount| is_at_or_below(at, &mount.target))?;
            let relative = at[mounts[mount].target.len()..].trim_start_matches('/').to_owned();
            Some(Place { mount, relative })
        };
        let mut violations = Vec::new();
        let mut places = |kind: &str, paths: Vec<&str>, writable: bool| -> Vec<Place> {
            let mut found = Vec::new();
            for (i, at) in paths.into_iter().enumerate() {
                match place(at) {
                    Some(place) if mounts[place.mount].writable == writable => found.push(place),
                    // Only of a spec that was not validated: an input and an output overlap.
                    _ => violations.push(FieldViolation::new(
                        format!("spec.{kind}[{i}].path"),
                        "DUPLICATE",
                        "an input and an output share this place",
                    )),
                }
            }
            found
        };
        let input_places = places("inputs", spec.inputs.iter().map(|x| x.path.as_str()).collect(), false);
        let output_paths: Vec<String> = spec
            .outputs
            .iter()
            // A pattern that does not parse was refused above.
            .map(|output| output_place(output).unwrap_or_default())
            .collect();
        let output_places = places("outputs", output_paths.iter().map(String::as_str).collect(), true);
        let mut parents = self.parents;
        parents.sort_by(|a, b| a.split('/').cmp(b.split('/')));
        parents.dedup();
        let directories = parents
            .iter()
            .filter_map(|at| place(at))
            .filter(|place| !place.relative.is_empty() && mounts[place.mount].writable)
            .collect();
        if !violations.is_empty() {
            return Err(InvalidSpec(violations));
        }
        Ok(MountPlan { mounts, inputs: input_places, outputs: output_places, directories })
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
