//! The versions of an engine and its parts, held against the ways out of a container that are known.
//!
//! What counts is what the engine says of itself. Distributions mend old versions without another number: a version with a
//! distribution's suffix is told apart, as one that may have been mended.

use bollard::models::SystemVersion;

/// A version: three numbers, and the number of a release candidate where it is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32, u32, Candidate);

/// A release comes after its candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Candidate {
    Number(u32),
    Release,
}

const fn v(major: u32, minor: u32, patch: u32) -> Version {
    Version(major, minor, patch, Candidate::Release)
}

/// A known weakness.
struct Weakness {
    /// The part, as engines name it, in lower case.
    part: &'static str,
    names: &'static str,
    what: &'static str,
    /// The first good version of each line of releases, ascending. Lines before the last that are not named were never mended.
    mended: &'static [Version],
}

/// From the advisories of the projects: GHSA-xr7r-f8xq-vfvv; GHSA-9493-h29p-rfm2, GHSA-qw9x-cqr3-wc7r, GHSA-cgrx-mc8f-2prm;
/// GHSA-crp2-qrr5-8pq7; GHSA-265r-hfxg-fhmg; GHSA-v23v-6jw2-98fq.
const KNOWN: &[Weakness] = &[
    Weakness {
        part: "runc",
        names: "CVE-2024-21626",
        what: "a container leaves by an open file of the machine",
        mended: &[v(1, 1, 12)],
    },
    Weakness {
        part: "runc",
        names: "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881",
        what: "a container leaves by mounts that are redirected while it starts",
        mended: &[v(1, 2, 8), v(1, 3, 3), Version(1, 4, 0, Candidate::Number(3))],
    },
    Weakness {
        part: "containerd",
        names: "CVE-2022-23648",
        what: "an image's volume reads files of the machine",
        mended: &[v(1, 4, 13), v(1, 5, 10), v(1, 6, 1)],
    },
    Weakness {
        part: "containerd",
        names: "CVE-2024-40635",
        what: "a user id that is too large becomes root",
        mended: &[v(1, 6, 38), v(1, 7, 27), v(2, 0, 4)],
    },
    Weakness {
        part: "engine",
        names: "CVE-2024-41110",
        what: "requests go around the engine's authorisation plugins",
        mended: &[v(23, 0, 15), v(25, 0, 6), v(26, 1, 5), v(27, 1, 1)],
    },
];

/// Takes apart `1.1.5+ds1`, `20.10.24+dfsg1`, `v1.6.20~ds1`, `1.4.0-rc.3`. The suffix is what is left.
fn parse(text: &str) -> Option<(Version, &str)> {
    let text = text.trim().trim_start_matches('v');
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (numbers, suffix) = text.split_at(end);
    let mut numbers = numbers.split('.').map(str::parse::<u32>);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
    let (candidate, suffix) = match suffix.strip_prefix("-rc").or_else(|| suffix.strip_prefix("~rc")) {
        Some(rest) => {
            let rest = rest.trim_start_matches('.');
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            (Candidate::Number(rest[..end].parse().unwrap_or(0)), &rest[end..])
        }
        None => (Candidate::Release, suffix),
    };
    Some((Version(major, minor, patch, candidate), suffix))
}

impl Weakness {
    fn is_in(&self, version: Version) -> bool {
        let line = |version: &Version| (version.0, version.1);
        match self.mended.iter().find(|mended| line(mended) == line(&version)) {
            Some(mended) => version < *mended,
            None => self.mended.last().is_some_and(|last| version < *last),
        }
    }
}

/// What is known against an engine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Findings {
    /// The parts with their versions, for people.
    pub(crate) parts: Vec<String>,
    /// Each weakness that its versions have.
    pub(crate) weak: Vec<String>,
    /// Each that they have unless the distribution mended it, and each part whose version cannot be read.
    pub(crate) unclear: Vec<String>,
}

impl Findings {
    /// In one line, for health and the log.
    pub(crate) fn summary(&self) -> String {
        let mut text = self.parts.join(", ");
        if !self.weak.is_empty() {
            text = format!("{text}; KNOWN ESCAPES: {}", self.weak.join("; "));
        }
        if !self.unclear.is_empty() {
            text = format!(
                "{text}; known escapes, unless the distribution mended them: {}",
                self.unclear.join("; ")
            );
        }
        text
    }
}

/// Holds what the engine says of itself against what is known.
pub(crate) fn check(version: &SystemVersion) -> Findings {
    let mut parts: Vec<(String, String)> = version
        .components
        .iter()
        .flatten()
        .map(|part| (part.name.to_ascii_lowercase(), part.version.clone()))
        .filter(|(name, _)| ["engine", "containerd", "runc"].contains(&name.as_str()))
        .collect();
    if !parts.iter().any(|(name, _)| name == "engine") {
        parts.push(("engine".to_owned(), version.version.clone().unwrap_or_default()));
    }
    let mut findings = Findings::default();
    for (name, text) in parts {
        findings.parts.push(format!("{name} {text}"));
        let Some((version, suffix)) = parse(&text) else {
            findings.unclear.push(format!("{name}: its version cannot be read"));
            continue;
        };
        for weakness in KNOWN.iter().filter(|known| known.part == name && known.is_in(version)) {
            let said = format!("{name} {text}: {} ({})", weakness.names, weakness.what);
            // What distributions add: `+dfsg1`, `~ds1`, `-0ubuntu1`.
            if suffix.is_empty() {
                findings.weak.push(said);
            } else {
                findings.unclear.push(said);
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use bollard::models::SystemVersionComponents;

    use super::*;

    fn found(parts: &[(&str, &str)]) -> Findings {
        let part = |(name, version): &(&str, &str)| SystemVersionComponents {
            name: (*name).to_owned(),
            version: (*version).to_owned(),
            details: None,
        };
        check(&SystemVersion {
            components: Some(parts.iter().map(part).collect()),
            ..SystemVersion::default()
        })
    }

    /// How many weaknesses are known for a part in this version.
    fn weak(part: &str, version: &str) -> usize {
        let parts = if part == "Engine" {
            vec![(part, version)]
        } else {
            vec![("Engine", "28.0.0"), (part, version)]
        };
        found(&parts).weak.len()
    }

    #[test]
    fn a_line_of_releases_is_good_from_where_it_was_mended() {
        for (part, version, count) in [
            ("runc", "1.1.11", 2),
            ("runc", "1.1.12", 1),
            ("runc", "1.2.7", 1),
            ("runc", "1.2.8", 0),
            ("runc", "1.3.2", 1),
            ("runc", "1.3.3", 0),
            ("runc", "1.4.0-rc.2", 1),
            ("runc", "1.4.0-rc.3", 0),
            ("runc", "1.4.0", 0),
            ("runc", "2.0.0", 0),
            ("containerd", "v1.6.20", 1),
            ("containerd", "1.7.27", 0),
            ("containerd", "1.5.9", 2),
            ("Engine", "20.10.27", 1),
            ("Engine", "24.0.9", 1),
            ("Engine", "25.0.6", 0),
            ("Engine", "26.1.4", 1),
            ("Engine", "27.1.1", 0),
            ("Engine", "28.2.2", 0),
        ] {
            assert_eq!(weak(part, version), count, "{part} {version}");
        }
    }

    #[test]
    fn what_a_distribution_may_have_mended_is_said_so() {
        let findings = found(&[
            ("Engine", "20.10.24+dfsg1"),
            ("containerd", "1.6.20~ds1"),
            ("runc", "1.1.5+ds1"),
            ("docker-init", "0.19.0"),
        ]);
        assert_eq!(findings.weak, Vec::<String>::new());
        assert_eq!(findings.unclear.len(), 4, "{findings:?}");
        assert_eq!(findings.parts.len(), 3);
        let text = findings.summary();
        assert!(text.contains("CVE-2024-21626") && text.contains("unless the distribution"), "{text}");
        assert!(!text.contains("KNOWN ESCAPES"), "{text}");
    }

    #[test]
    fn what_cannot_be_read_is_not_called_good() {
        assert_eq!(found(&[("Engine", "28.0.0"), ("runc", "unknown")]).unclear.len(), 1);
        assert_eq!(check(&SystemVersion::default()).unclear.len(), 1, "an engine without a version");
        let old = SystemVersion { version: Some("19.3.1".into()), ..SystemVersion::default() };
        assert_eq!(check(&old).weak.len(), 1);
    }
}
