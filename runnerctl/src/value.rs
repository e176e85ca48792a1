//! The forms that values of flags have.

use std::{env, path::PathBuf, str::FromStr, time::Duration};

use worker_client::proto::Archive;

/// How results are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// One document, or one a line where there is a stream.
    Json,
}

/// `K=V`, or `K` for a variable that is taken from the caller's environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnvVar {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl FromStr for EnvVar {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (name, value) = match s.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => {
                let value = env::var(s).map_err(|error| match error {
                    env::VarError::NotPresent => {
                        format!("{s} is not set in this environment; use {s}=VALUE to set it")
                    }
                    env::VarError::NotUnicode(_) => format!("the value of {s} is not UTF-8"),
                })?;
                (s, value)
            }
        };
        if name.is_empty() {
            return Err("the name is empty".to_owned());
        }
        Ok(Self { name: name.to_owned(), value })
    }
}

/// `K=V`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: String,
}

impl FromStr for KeyValue {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("must have the form KEY=VALUE".to_owned()),
        }
    }
}

/// Where an input comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum InputFrom {
    /// A local file or directory.
    Local(PathBuf),
    /// What is there already: `artifact:KEY`, or another run's output, `run:RUN/PATH`.
    Stored(String),
    /// A file of a host that the service allows.
    Https { url: String, sha256: String },
}

/// `LOCAL:PATH`: what lies at PATH in the run comes from LOCAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InputArg {
    pub(crate) from: InputFrom,
    pub(crate) path: String,
}

impl FromStr for InputArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        // PATH is absolute, so the last `:/` is before it, whatever LOCAL looks like.
        let at = s.rfind(":/").filter(|at| *at > 0);
        let at = at.ok_or(
            "must have the form LOCAL:PATH with an absolute PATH, for example data.csv:/inputs/data.csv",
        )?;
        let (local, path) = (&s[..at], &s[at + 1..]);
        let from = if local.starts_with("artifact:") || local.starts_with("run:") {
            InputFrom::Stored(local.to_owned())
        } else if local.starts_with("https://") {
            let (url, sha256) = local.split_once("#sha256=").ok_or(
                "a URL names its SHA-256, for example https://example.org/a.csv#sha256=9f86…:/inputs/a.csv",
            )?;
            InputFrom::Https { url: url.to_owned(), sha256: sha256.to_owned() }
        } else {
            InputFrom::Local(PathBuf::from(local))
        };
        Ok(Self { from, path: path.to_owned() })
    }
}

/// `ARCHIVE:PATH`: the archive is unpacked at PATH. Its name says its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExtractArg {
    pub(crate) input: InputArg,
    pub(crate) format: Archive,
}

impl FromStr for ExtractArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let input: InputArg = s.parse()?;
        let name = match &input.from {
            InputFrom::Local(local) => local.to_string_lossy().into_owned(),
            InputFrom::Stored(uri) => uri.clone(),
            InputFrom::Https { url, .. } => url.split('?').next().unwrap_or_default().to_owned(),
        };
        let format = [
            (".tar", Archive::Tar),
            (".tar.gz", Archive::TarGz),
            (".tgz", Archive::TarGz),
            (".tar.zst", Archive::TarZst),
            (".tzst", Archive::TarZst),
            (".zip", Archive::Zip),
        ]
        .into_iter()
        .find_map(|(suffix, format)| name.to_ascii_lowercase().ends_with(suffix).then_some(format))
        .ok_or("an archive's name ends with .tar, .tar.gz, .tgz, .tar.zst, .tzst or .zip")?;
        Ok(Self { input, format })
    }
}

/// `PATH:LOCAL`, an output and where it goes; or how results are shown. A path is absolute, so the two never meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OutputArg {
    /// `table` or `json`.
    Format(Format),
    /// What the program writes to `path`, or what matches it, is downloaded to `local`.
    Declared { path: String, glob: bool, local: PathBuf },
}

impl FromStr for OutputArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "table" => return Ok(Self::Format(Format::Table)),
            "json" => return Ok(Self::Format(Format::Json)),
            _ => {}
        }
        match s.split_once(':') {
            Some((path, local)) if path.starts_with('/') && !local.is_empty() => {
                let glob = runner_glob::has_wildcard(path);
                let path = if glob { path.to_owned() } else { runner_glob::unescape(path) };
                Ok(Self::Declared { path, glob, local: PathBuf::from(local) })
            }
            _ => Err("must be PATH:LOCAL with an absolute PATH, for example /outputs/report:report.txt; \
                      or `table` or `json`"
                .to_owned()),
        }
    }
}

/// What the program can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NetworkArg {
    None,
    Egress,
    Named(String),
}

impl FromStr for NetworkArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "" => Err("must be `none`, `egress` or a name".to_owned()),
            "none" => Ok(Self::None),
            "egress" => Ok(Self::Egress),
            name => Ok(Self::Named(name.to_owned())),
        }
    }
}

/// A number of bytes: `1024`, `512MiB`, `2GB`, `1.5G`.
pub(crate) fn size(s: &str) -> Result<u64, String> {
    const RULE: &str = "must be a number of bytes with a unit, for example 512MiB or 2G";
    let at = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
    let (number, unit) = s.split_at(at);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(RULE.to_owned()),
    };
    scaled(number, unit).ok_or_else(|| RULE.to_owned())
}

/// Cores as thousandths: `1.5` is 1500.
pub(crate) fn cpu_millis(s: &str) -> Result<u32, String> {
    const RULE: &str = "must be a number of cores, for example 1.5 or 250m";
    let millis = match s.strip_suffix('m') {
        Some(millis) => millis.parse().ok(),
        None => scaled(s, 1_000),
    };
    millis.and_then(|millis| u32::try_from(millis).ok()).ok_or_else(|| RULE.to_owned())
}

/// A decimal number times a unit, exactly, without the part that is less than one.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    if fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let digits = u32::try_from(fraction.len()).ok()?;
    let fraction: u64 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let part = u128::from(fraction) * u128::from(unit) / u128::from(10u64.pow(digits));
    whole.checked_mul(unit)?.checked_add(u64::try_from(part).ok()?)
}

/// A duration: `30s`, `5m`, `1h 30m`.
pub(crate) fn duration(s: &str) -> Result<Duration, String> {
    humantime::parse_duration(s).map_err(|e| format!("{e}; for example 30s or 1h30m"))
}

/// A step of a ramp: `5%:10m`, `0.25%:1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StepArg {
    /// The share, in hundredths of a percent.
    pub(crate) hundredths: u16,
    /// How long it is held.
    pub(crate) hold: Duration,
}

impl FromStr for StepArg {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        const RULE: &str = "must be a share and how long it is held, for example 5%:10m";
        let (share, hold) = s.split_once(':').ok_or(RULE)?;
        let share = share.strip_suffix('%').unwrap_or(share);
        let (whole, part) = share.split_once('.').unwrap_or((share, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || whole.len() > 3 || part.len() > 2 || !digits(whole) || !digits(part) {
            return Err(format!("{RULE}; the share has at most two decimals"));
        }
        let hundredths = format!("{whole}{part:0<2}").parse().map_err(|_| RULE)?;
        if hundredths > 10_000 {
            return Err(format!("{RULE}; the share is at most 100%"));
        }
        Ok(Self { hundredths, hold: duration(hold)? })
    }
}

/// The keys that leave a terminal: `ctrl-p,ctrl-q`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DetachKeys(pub(crate) Vec<u8>);

impl Default for DetachKeys {
    fn default() -> Self {
        Self(vec![0x10, 0x11])
    }
}

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        const RULE: &str = "must be keys with commas between, for example ctrl-p,ctrl-q";
        let key = |key: &str| match key.strip_prefix("ctrl-") {
            Some(letter) => match letter.as_bytes() {
                [letter] if letter.is_ascii_alphabetic() => Some(letter.to_ascii_lowercase() - b'a' + 1),
                b"[" => Some(27),
                b"\\" => Some(28),
                b"]" => Some(29),
                _ => None,
            },
            None => match key.as_bytes() {
                [byte] if byte.is_ascii_graphic() => Some(*byte),
                _ => None,
            },
        };
        s.split(',').map(key).collect::<Option<Vec<u8>>>().map(Self).ok_or_else(|| RULE.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("512MiB", 512 << 20),
            ("512 MiB", 512 << 20),
            ("2GB", 2_000_000_000),
            ("1.5G", 3 << 29),
            ("0.1k", 102),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1", "1.", "1e3", "12XB", "1.2.3", "16777216TiB", "0x10"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cores_are_thousandths() {
        for (text, millis) in [("1", 1000), ("1.5", 1500), ("0.25", 250), ("250m", 250), ("0", 0)] {
            assert_eq!(cpu_millis(text), Ok(millis), "{text}");
        }
        for text in ["", "m", "one", "-1", "1.5.1", "99999999"] {
            assert!(cpu_millis(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_input_is_split_before_its_absolute_path() {
        let arg: InputArg = "a:b/c.csv:/inputs/c".parse().expect("valid");
        assert_eq!(arg, InputArg { from: InputFrom::Local("a:b/c.csv".into()), path: "/inputs/c".into() });
        let arg: InputArg = "artifact:uploads/t/1/x:/inputs/x".parse().expect("valid");
        assert_eq!(arg.from, InputFrom::Stored("artifact:uploads/t/1/x".into()));
        let arg: InputArg =
            "run:018f0000-0000-7000-8000-000000000001/outputs/a:/inputs/x".parse().expect("valid");
        assert_eq!(arg.from, InputFrom::Stored("run:018f0000-0000-7000-8000-000000000001/outputs/a".into()));
        let arg: InputArg = "https://a.example:8443/x#sha256=00:/inputs/x".parse().expect("valid");
        let url = "https://a.example:8443/x".to_owned();
        assert_eq!(arg.from, InputFrom::Https { url, sha256: "00".into() });
        assert!("https://a.example/x:/inputs/x".parse::<InputArg>().is_err(), "without a SHA-256");
        for text in ["a", "a:b", ":/x", "/inputs/x"] {
            assert!(text.parse::<InputArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_archive_s_name_says_its_format() {
        for (text, format) in [
            ("a.tar:/inputs/x", Archive::Tar),
            ("a.TAR.GZ:/inputs/x", Archive::TarGz),
            ("artifact:uploads/t/1/a.tgz:/inputs/x", Archive::TarGz),
            ("https://a.example/a.tar.zst?q=1#sha256=00:/inputs/x", Archive::TarZst),
            ("a.zip:/inputs/x", Archive::Zip),
        ] {
            assert_eq!(text.parse::<ExtractArg>().map(|arg| arg.format), Ok(format), "{text}");
        }
        assert!("a.rar:/inputs/x".parse::<ExtractArg>().is_err());
    }

    #[test]
    fn a_step_is_a_share_and_a_time() {
        let step = |text: &str| text.parse::<StepArg>().map(|step| (step.hundredths, step.hold.as_secs()));
        for (text, expected) in [
            ("5%:10m", (500, 600)),
            ("0.25%:1h", (25, 3600)),
            ("0.5:1s", (50, 1)),
            ("100%:1d", (10_000, 86_400)),
            ("0%:0s", (0, 0)),
        ] {
            assert_eq!(step(text), Ok(expected), "{text}");
        }
        for bad in ["", "5%", "5%:", ":1m", "100.01%:1m", "0.001%:1m", "-1%:1m", "1e1%:1m", ".5%:1m", "5%:x"]
        {
            assert!(step(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_output_is_a_declaration_or_a_format() {
        assert_eq!("json".parse(), Ok(OutputArg::Format(Format::Json)));
        let declared =
            |path: &str, glob| OutputArg::Declared { path: path.into(), glob, local: "b:c".into() };
        assert_eq!("/outputs/a:b:c".parse(), Ok(declared("/outputs/a", false)));
        assert_eq!("/outputs/**/*.txt:b:c".parse(), Ok(declared("/outputs/**/*.txt", true)));
        assert_eq!("/outputs/\\*:b:c".parse(), Ok(declared("/outputs/*", false)));
        for text in ["yaml", "outputs/a:b", "/outputs/a", "/outputs/a:"] {
            assert!(text.parse::<OutputArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_variable_without_a_value_comes_from_the_environment() {
        assert_eq!("A=b=c".parse(), Ok(EnvVar { name: "A".into(), value: "b=c".into() }));
        assert_eq!("A=".parse(), Ok(EnvVar { name: "A".into(), value: String::new() }));
        let path: EnvVar = "PATH".parse().expect("set in every test");
        assert_eq!(path.value, env::var("PATH").expect("set"));
        assert!("RUNNERCTL_SURELY_NOT_SET".parse::<EnvVar>().is_err());
        assert!("=x".parse::<EnvVar>().is_err());
    }

    #[test]
    fn detach_keys_are_control_or_plain_keys() {
        assert_eq!("ctrl-p,ctrl-q".parse(), Ok(DetachKeys::default()));
        assert_eq!("ctrl-],x".parse(), Ok(DetachKeys(vec![29, b'x'])));
        for text in ["", "ctrl-", "ctrl-1", "ab", "ctrl-p,"] {
            assert!(text.parse::<DetachKeys>().is_err(), "{text}");
        }
    }
}
