//! Names of things: runs, attempts, backends, tenants.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// A name or an id that does not have the form it must have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {rule}")]
pub struct InvalidId {
    /// What it was meant to be, for example `run id`.
    pub what: &'static str,
    /// What was given, cut to 80 characters.
    pub value: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

impl InvalidId {
    fn new(what: &'static str, value: &str, rule: &'static str) -> Self {
        Self { what, value: value.chars().take(80).collect(), rule }
    }
}

/// Names one run for ever. A UUID; version 7 where the service chose it, so that ids sort by time of creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(Uuid);

impl RunId {
    /// Wraps a UUID.
    pub const fn new(id: Uuid) -> Self {
        Self(id)
    }

    /// The UUID within.
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }

    /// Bytes 6 to 8 of every shadow's id: version 8 (RFC 9562, "custom"), its variant, and 18 bits that tell a shadow's id from
    /// other ids of that version. No run that a caller names may have it.
    pub const SHADOW_MARK: [u8; 3] = [0x85, 0xad, 0xb5];

    /// The id of this run's shadow: always the same one, so that however often a shadow is begun, there is one. It keeps the
    /// first six bytes, which are the time where the service chose the id, then has the mark, and then 56 bits of SHA-256.
    #[must_use]
    pub fn shadow(self) -> Self {
        let own = self.0.as_bytes();
        let digest = Sha256::new().chain_update(b"runner shadow\0").chain_update(own).finalize();
        let mut id = *own;
        id[6..9].copy_from_slice(&Self::SHADOW_MARK);
        id[9..].copy_from_slice(&digest[..7]);
        Self(Uuid::from_bytes(id))
    }

    /// Whether this is the id of a shadow. Shadows are runs of the service's own: no caller sees them.
    pub fn is_shadow(self) -> bool {
        self.0.as_bytes()[6..9] == Self::SHADOW_MARK
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for RunId {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        // Only the hyphenated form: two spellings of one id would be two rows in every index keyed by text.
        match Uuid::try_parse(s) {
            Ok(id) if s.len() == 36 && !id.is_nil() => Ok(Self(id)),
            _ => Err(InvalidId::new("run id", s, "a hyphenated UUID that is not nil")),
        }
    }
}

/// Names one attempt of a run. Numbers start at 1 and are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptId {
    /// The run.
    pub run: RunId,
    /// The number of the attempt, from 1.
    pub number: u32,
}

impl fmt::Display for AttemptId {
    /// `RUN.NUMBER`: valid as a file name, a container name and the end of a Kubernetes name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.run, self.number)
    }
}

impl FromStr for AttemptId {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, InvalidId> {
        const RULE: &str = "RUN.NUMBER with a number from 1";
        let (run, number) = s.split_once('.').ok_or_else(|| InvalidId::new("attempt id", s, RULE))?;
        let number = match number.parse::<u32>() {
            Ok(parsed) if parsed > 0 && parsed.to_string() == number => parsed,
            _ => return Err(InvalidId::new("attempt id", s, RULE)),
        };
        Ok(Self { run: run.parse()?, number })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:literal, $rule:literal, $ok:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(s: &str) -> Result<Self, InvalidId> {
                let ok: fn(&str) -> bool = $ok;
                if s.is_empty() || s.len() > $max || !ok(s) {
                    return Err(InvalidId::new($what, s, $rule));
                }
                Ok(Self(s.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(s: String) -> Result<Self, InvalidId> {
                s.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

/// The form of a DNS label (RFC 1123), so that a name fits into every substrate's labels.
fn dns_label(s: &str) -> bool {
    s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !s.starts_with('-')
        && !s.ends_with('-')
}

name_type!(
    /// Names a configured backend.
    BackendName,
    "backend name",
    63,
    "1 to 63 of a-z, 0-9 and -, not at an end",
    dns_label
);

name_type!(
    /// Names a tenant. It comes from the caller's credentials, never from the request body alone.
    TenantId,
    "tenant",
    63,
    "1 to 63 of a-z, 0-9 and -, not at an end",
    dns_label
);

name_type!(
    /// The caller's own name for a run, unique within its tenant.
    IdempotencyKey,
    "idempotency key",
    255,
    "1 to 255 bytes without control characters",
    |s| !s.chars().any(char::is_control)
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_id_reads_back_what_it_prints() {
        let id = AttemptId { run: RunId::new(Uuid::from_u128(7)), number: 3 };
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn a_shadow_s_id_is_told_from_every_other() {
        let run = RunId::new(Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0001));
        assert!(!run.is_shadow() && run.shadow().is_shadow());
        // What is stored with runs: not to be changed by a release.
        assert_eq!(run.shadow().to_string(), "01930000-0000-85ad-b53e-65eacf8bc176");
        assert_eq!(run.shadow().as_uuid().get_version_num(), 8);
        assert_eq!(run.shadow().as_uuid().get_variant(), uuid::Variant::RFC4122);
        let other = RunId::new(Uuid::from_u128(0x0193_0000_0000_7000_8000_0000_0000_0002));
        assert_ne!(run.shadow(), other.shadow());
    }

    #[test]
    fn malformed_ids_are_refused() {
        for bad in ["", "x", "00000000-0000-0000-0000-000000000000", "0000000000000000000000000000000a"] {
            assert!(bad.parse::<RunId>().is_err(), "{bad}");
        }
        let run = "00000000-0000-0000-0000-00000000000a";
        for bad in
            [run.to_owned(), format!("{run}."), format!("{run}.0"), format!("{run}.+1"), format!("{run}.01")]
        {
            assert!(bad.parse::<AttemptId>().is_err(), "{bad}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", &"a".repeat(64)] {
            assert!(bad.parse::<BackendName>().is_err(), "{bad}");
        }
        assert!("a\nb".parse::<IdempotencyKey>().is_err());
        assert!("a b/ü".parse::<IdempotencyKey>().is_ok());
    }
}
