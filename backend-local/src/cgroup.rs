//! Which control groups this machine lets us make, found out by making one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use runner_agent::exec::protocol::CgroupPlan;
use runner_core::{id::AttemptId, spec::Resources};

/// One mounted hierarchy, as the service sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// Where it is mounted.
    mount: PathBuf,
    /// The service's own group in it.
    own: PathBuf,
    /// Version 1: what it controls. Empty for version 2.
    controllers: Vec<String>,
    version: u8,
}

/// Where attempts' groups are made, and what they can limit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Cgroups {
    /// 1 or 2; 0 where there is none.
    pub(crate) version: u8,
    /// The group below which a memory-limited group is made. With version 2 all three are the same.
    pub(crate) memory: Option<PathBuf>,
    pub(crate) pids: Option<PathBuf>,
    pub(crate) cpu: Option<PathBuf>,
    /// The kernel accounts for swap, so that it must be limited too.
    pub(crate) swap: bool,
    /// Why something is not there, for people.
    pub(crate) notes: Vec<String>,
    /// Whose they are: a part of each group's name. Callers choose run ids, so that two services on one machine may have
    /// the same attempt, and must not end one another's processes.
    pub(crate) owner: String,
}

/// Finds the hierarchies in `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn hierarchies(mountinfo: &str, cgroup: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        // ID PARENT MAJOR:MINOR ROOT MOUNT OPTIONS [TAGS…] - TYPE SOURCE SUPER-OPTIONS
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let mut before = before.split(' ').skip(3);
        let (Some(root), Some(mount)) = (before.next(), before.next()) else { continue };
        let mut after = after.split(' ');
        let version = match after.next() {
            Some("cgroup") => 1,
            Some("cgroup2") => 2,
            _ => continue,
        };
        let options: Vec<&str> = after.nth(1).unwrap_or_default().split(',').collect();
        // ID:CONTROLLERS:PATH; version 2 has ID 0 and no controllers.
        let entry = cgroup.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let controllers: Vec<&str> = controllers.split(',').filter(|name| !name.is_empty()).collect();
            let matches = match version {
                2 => controllers.is_empty(),
                _ => !controllers.is_empty() && controllers.iter().all(|name| options.contains(name)),
            };
            matches.then(|| (controllers.into_iter().map(str::to_owned).collect::<Vec<_>>(), path.to_owned()))
        });
        let Some((controllers, path)) = entry else { continue };
        // A container sees its own group as the mount's root. Where it does not, the mount's root is the nearest thing.
        let below = Path::new(&path).strip_prefix(root).unwrap_or(Path::new(""));
        let mount = PathBuf::from(unescape(mount));
        let own = join(&mount, below);
        found.push(Hierarchy { mount, own, controllers, version });
    }
    found
}

/// `join` that leaves no trailing slash behind an empty tail.
fn join(base: &Path, tail: &Path) -> PathBuf {
    if tail.as_os_str().is_empty() { base.to_owned() } else { base.join(tail) }
}

/// Undoes mountinfo's octal escapes: blank, tab, newline and backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// A group that is removed again when the value is dropped.
struct Trial(PathBuf);

impl Trial {
    fn make(parent: &Path, tag: &str) -> io::Result<Self> {
        let path = parent.join(format!("runner-trial-{tag}"));
        match fs::create_dir(&path) {
            Ok(()) => Ok(Self(path)),
            // Left behind by a process that was killed here.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Self(path)),
            Err(error) => Err(error),
        }
    }

    fn has(&self, file: &str) -> bool {
        self.0.join(file).exists()
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "remove the trial control group");
        }
    }
}

impl Cgroups {
    /// Finds out what this machine allows. Blocking. `parent` is the configured parent, below each hierarchy's mount;
    /// `tag` makes the trial's name unique.
    pub(crate) fn detect(parent: Option<&str>, tag: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let all = hierarchies(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        let mut found = Self::default();
        let has = |h: &Hierarchy| {
            ["memory", "pids", "cpu"].iter().any(|name| h.controllers.iter().any(|c| c == name))
        };
        if all.iter().any(has) {
            found.version = 1;
            found.detect_v1(&all, parent, tag);
        } else if let Some(unified) = all.iter().find(|h| h.version == 2) {
            found.version = 2;
            found.detect_v2(unified, parent, tag);
        } else {
            found.notes.push("no control group hierarchy is mounted".to_owned());
        }
        if found.memory.is_none() && found.pids.is_none() && found.cpu.is_none() {
            found.version = 0;
        }
        found
    }

    fn detect_v1(&mut self, all: &[Hierarchy], parent: Option<&str>, tag: &str) {
        for (controller, file) in
            [("memory", "memory.limit_in_bytes"), ("pids", "pids.max"), ("cpu", "cpu.cfs_quota_us")]
        {
            let Some(hierarchy) = all.iter().find(|h| h.controllers.iter().any(|c| c == controller)) else {
                self.notes.push(format!("control group controller {controller} is not mounted"));
                continue;
            };
            let parent = parent_in(hierarchy, parent);
            match Trial::make(&parent, tag) {
                Ok(trial) if trial.has(file) => {
                    let parent = Some(parent);
                    match controller {
                        "memory" => {
                            self.swap = trial.has("memory.memsw.limit_in_bytes");
                            self.memory = parent;
                        }
                        "pids" => self.pids = parent,
                        _ => self.cpu = parent,
                    }
                }
                Ok(_) => self.notes.push(format!("control groups below {} have no {file}", parent.display())),
                Err(error) => {
                    self.notes.push(format!("make a control group below {}: {error}", parent.display()));
                }
            }
        }
    }

    fn detect_v2(&mut self, unified: &Hierarchy, parent: Option<&str>, tag: &str) {
        let mut candidates = vec![parent_in(unified, parent)];
        if parent.is_none() && unified.own != unified.mount {
            // A group with processes in it may have no children that limit. Its parent often may: a delegated slice.
            candidates.extend(unified.own.parent().map(Path::to_owned));
        }
        for candidate in candidates {
            // Moving a process needs the right to write to the nearest common ancestor.
            let ancestor = common(&unified.own, &candidate).join("cgroup.procs");
            if rustix::fs::access(&ancestor, rustix::fs::Access::WRITE_OK).is_err() {
                self.notes.push(format!("{} is not ours to write", ancestor.display()));
                continue;
            }
            let trial = match Trial::make(&candidate, tag) {
                Ok(trial) => trial,
                Err(error) => {
                    self.notes.push(format!("make a control group below {}: {error}", candidate.display()));
                    continue;
                }
            };
            let has = |trial: &Trial| [trial.has("memory.max"), trial.has("pids.max"), trial.has("cpu.max")];
            if has(&trial) != [true; 3] {
                // One by one: a controller that is not there must not keep the others away.
                for name in ["+memory", "+pids", "+cpu"] {
                    if let Err(error) = fs::write(candidate.join("cgroup.subtree_control"), name) {
                        self.notes.push(format!("{name} below {}: {error}", candidate.display()));
                    }
                }
            }
            let [memory, pids, cpu] = has(&trial);
            if !(memory || pids || cpu) {
                continue;
            }
            self.swap = trial.has("memory.swap.max");
            let some = |has: bool| has.then(|| candidate.clone());
            (self.memory, self.pids, self.cpu) = (some(memory), some(pids), some(cpu));
            return;
        }
    }

    /// Says whose the groups are. Of `instance`, what a directory's name may hold is taken.
    pub(crate) fn set_owner(&mut self, instance: &str) {
        self.owner = instance.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    }

    /// The groups of an attempt with these limits; `None` where none is needed, or none can be made.
    ///
    /// Where processes can be counted, there is always one: it proves at the end that nothing is left.
    pub(crate) fn plan(&self, attempt: AttemptId, resources: &Resources) -> Option<CgroupPlan> {
        let mut plan = CgroupPlan { directories: Vec::new(), settings: Vec::new(), version: self.version };
        let name = format!("runner-{}-{attempt}", self.owner);
        let mut add = |parent: &Path, settings: Vec<(&str, String)>| {
            let group = parent.join(&name);
            plan.settings.extend(settings.into_iter().map(|(file, value)| (group.join(file), value)));
            if !plan.directories.contains(&group) {
                plan.directories.push(group);
            }
        };
        if let Some(parent) = &self.pids {
            let limit = resources.pids.map(|pids| ("pids.max", pids.to_string()));
            add(parent, limit.into_iter().collect());
        }
        if let (Some(parent), Some(bytes)) = (&self.memory, resources.memory_bytes) {
            let mut settings = Vec::new();
            if self.version == 1 {
                settings.push(("memory.limit_in_bytes", bytes.to_string()));
                if self.swap {
                    settings.push(("memory.memsw.limit_in_bytes", bytes.to_string()));
                }
            } else {
                settings.push(("memory.max", bytes.to_string()));
                if self.swap {
                    settings.push(("memory.swap.max", "0".to_owned()));
                }
            }
            add(parent, settings);
        }
        if let (Some(parent), Some(millis)) = (&self.cpu, resources.cpu_millis) {
            // The kernel takes quotas from 1 ms on, and periods up to 1 s.
            let period_us: u64 = if millis < 10 { 1_000_000 } else { 100_000 };
            let quota_us = u64::from(millis) * period_us / 1000;
            let settings = if self.version == 1 {
                vec![("cpu.cfs_period_us", period_us.to_string()), ("cpu.cfs_quota_us", quota_us.to_string())]
            } else {
                vec![("cpu.max", format!("{quota_us} {period_us}"))]
            };
            add(parent, settings);
        }
        (!plan.directories.is_empty()).then_some(plan)
    }
}

fn parent_in(hierarchy: &Hierarchy, configured: Option<&str>) -> PathBuf {
    match configured {
        Some(path) => join(&hierarchy.mount, Path::new(path.trim_start_matches('/'))),
        None => hierarchy.own.clone(),
    }
}

/// The longest path that both begin with.
fn common(a: &Path, b: &Path) -> PathBuf {
    a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

#[cfg(test)]
mod tests {
    use runner_core::id::RunId;

    use super::*;

    const V1: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn attempt() -> AttemptId {
        AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 2 }
    }

    #[test]
    fn version_1_hierarchies_are_found_with_our_own_group() {
        let found = hierarchies(V1, "3:cpu,cpuacct:/a/b\n4:memory:/docker/abc/inner\n0::/x\n");
        let own: Vec<_> = found.iter().map(|h| (h.version, h.own.to_str().unwrap())).collect();
        assert_eq!(
            own,
            [
                (1, "/sys/fs/cgroup/cpu,cpuacct/a/b"),
                (1, "/sys/fs/cgroup/memory/inner"),
                (2, "/sys/fs/cgroup/unified/x"),
            ]
        );
    }

    #[test]
    fn a_group_outside_of_the_mount_falls_back_to_the_mount() {
        let found = hierarchies(V1, "4:memory:/elsewhere\n");
        assert_eq!(found[0].own, Path::new("/sys/fs/cgroup/memory"));
    }

    #[test]
    fn a_plan_has_a_group_for_each_limit_and_no_other() {
        let groups = Cgroups {
            version: 1,
            memory: Some("/m".into()),
            pids: Some("/p".into()),
            cpu: Some("/c".into()),
            swap: true,
            notes: Vec::new(),
            owner: "us".to_owned(),
        };
        let resources = Resources { pids: Some(9), memory_bytes: Some(1 << 20), ..Resources::default() };
        let plan = groups.plan(attempt(), &resources).unwrap();
        let name = format!("runner-us-{}", attempt());
        assert_eq!(plan.directories, [Path::new("/p").join(&name), Path::new("/m").join(&name)]);
        assert_eq!(
            plan.settings,
            [
                (Path::new("/p").join(&name).join("pids.max"), "9".to_owned()),
                (Path::new("/m").join(&name).join("memory.limit_in_bytes"), "1048576".to_owned()),
                (Path::new("/m").join(&name).join("memory.memsw.limit_in_bytes"), "1048576".to_owned()),
            ]
        );
    }

    #[test]
    fn version_2_has_one_group_for_everything() {
        let parent = Some(PathBuf::from("/u"));
        let groups = Cgroups {
            version: 2,
            memory: parent.clone(),
            pids: parent.clone(),
            cpu: parent,
            owner: "us".to_owned(),
            ..Cgroups::default()
        };
        let resources = Resources {
            pids: Some(9),
            memory_bytes: Some(5),
            cpu_millis: Some(1500),
            ..Resources::default()
        };
        let plan = groups.plan(attempt(), &resources).unwrap();
        let group = Path::new("/u").join(format!("runner-us-{}", attempt()));
        assert_eq!(plan.directories, std::slice::from_ref(&group));
        assert_eq!(plan.settings[2], (group.join("cpu.max"), "150000 100000".to_owned()));
    }

    #[test]
    fn the_smallest_share_of_a_core_is_one_that_the_kernel_takes() {
        let groups = Cgroups { version: 2, cpu: Some("/u".into()), ..Cgroups::default() };
        let resources = Resources { cpu_millis: Some(1), ..Resources::default() };
        assert_eq!(groups.plan(attempt(), &resources).unwrap().settings[0].1, "1000 1000000");
    }

    #[test]
    fn without_groups_there_is_no_plan() {
        assert_eq!(
            Cgroups::default().plan(attempt(), &Resources { pids: Some(1), ..Resources::default() }),
            None
        );
    }

    #[test]
    fn detection_leaves_no_group_behind() {
        let tag = format!("test-{}", std::process::id());
        let found = Cgroups::detect(None, &tag);
        for parent in [&found.memory, &found.pids, &found.cpu].into_iter().flatten() {
            assert!(!parent.join(format!("runner-trial-{tag}")).exists());
        }
        assert!(found.version != 0 || !found.notes.is_empty(), "what is missing is explained");
    }
}
