//! Path patterns: POSIX pattern matching (XCU 2.14, `fnmatch` with `FNM_PATHNAME` and `FNM_PERIOD`) for each name of a
//! path, and `**` for any number of directories.
//!
//! | in a name | matches |
//! |---|---|
//! | `*` | any string, also the empty one |
//! | `?` | one character |
//! | `[ab]`, `[a-z]`, `[!a]`, `[[:digit:]]` | one character of the set, or not of it |
//! | `\x` | `x` itself |
//! | `**`, as a whole name | any number of directories, also none; at the end, everything below |
//!
//! - A `/` is matched by a `/` alone, and a period at the start of a name by a period alone: neither `*`, `?`, a set nor
//!   `**` matches a hidden name.
//! - A name is bytes. What is valid UTF-8 in it is characters; any other byte is one character that only `*`, `?` and a
//!   negated set match.
//! - Classes are those of the C locale. Collating symbols and equivalence classes (`[.a.]`, `[=a=]`) are refused: what they
//!   mean depends on a locale.
//! - A `[` without its `]` is a plain character.
//!
//! Matching a name takes at most its length times the pattern's; a path is matched name by name, so that a walk knows at
//! each directory whether anything below it can match ([`Pattern::step`]).

mod name;

use std::fmt;

use self::name::NamePattern;

/// Longest pattern, in bytes.
pub const MAX_BYTES: usize = 3072;
/// Longest name of a pattern, in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Most names of a pattern behind its base.
pub const MAX_NAMES: usize = 60;

/// Why a text is not a pattern. Reads on after "the pattern".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Longer than [`MAX_BYTES`].
    #[error("is longer than 3072 bytes")]
    TooLong,
    /// More than [`MAX_NAMES`] behind its base.
    #[error("has more than 60 names behind its first wildcard")]
    TooManyNames,
    /// A name longer than [`MAX_NAME_BYTES`].
    #[error("contains a name longer than 255 bytes")]
    NameTooLong,
    /// Nothing to match.
    #[error("must not be empty")]
    Empty,
    /// `//`, or a slash at the end.
    #[error("must not contain an empty name (`//`, or `/` at an end)")]
    EmptyName,
    /// `.` or `..` as a name.
    #[error("must not contain `.` or `..`")]
    Dots,
    /// No path has it.
    #[error("must not contain NUL")]
    Nul,
    /// POSIX leaves it undefined.
    #[error("ends with a backslash that escapes nothing")]
    LoneBackslash,
    /// A range from high to low.
    #[error("has a range in `[]` whose end is before its start")]
    Range,
    /// `[:name:]` with a name that is none of the twelve.
    #[error("has an unknown character class in `[]`")]
    Class,
    /// `[.a.]` or `[=a=]`.
    #[error("has a collating symbol or an equivalence class in `[]`, which are not supported")]
    Collation,
}

/// A parsed pattern.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    absolute: bool,
    base: String,
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// `**`.
    Directories,
    Name(NamePattern),
}

/// How much of a pattern a path has matched so far; see [`Pattern::step`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress(u64);

impl Progress {
    /// Nothing below can match.
    pub const fn is_dead(self) -> bool {
        self.0 == 0
    }
}

impl Pattern {
    /// Parses a pattern, absolute or relative.
    ///
    /// # Errors
    /// See [`PatternError`].
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if text.len() > MAX_BYTES {
            return Err(PatternError::TooLong);
        }
        if text.contains('\0') {
            return Err(PatternError::Nul);
        }
        let absolute = text.starts_with('/');
        let rest = if absolute { &text[1..] } else { text };
        if rest.is_empty() {
            return Err(PatternError::Empty);
        }
        let mut base = String::new();
        let mut steps = Vec::new();
        let mut names = rest.split('/').peekable();
        while let Some(name) = names.next() {
            if name.is_empty() {
                return Err(PatternError::EmptyName);
            }
            if name.len() > MAX_NAME_BYTES {
                return Err(PatternError::NameTooLong);
            }
            let is_last = names.peek().is_none();
            if name == "**" {
                if steps.last() != Some(&Step::Directories) {
                    steps.push(Step::Directories);
                }
                if is_last {
                    steps.push(Step::Name(NamePattern::anything()));
                }
                continue;
            }
            let parsed = NamePattern::parse(name)?;
            match parsed.literal() {
                Some(literal) if matches!(literal.as_str(), "." | "..") => return Err(PatternError::Dots),
                Some(literal) if steps.is_empty() && !is_last => {
                    if !base.is_empty() {
                        base.push('/');
                    }
                    base.push_str(&literal);
                }
                _ => steps.push(Step::Name(parsed)),
            }
        }
        if steps.len() > MAX_NAMES {
            return Err(PatternError::TooManyNames);
        }
        if absolute {
            base.insert(0, '/');
        }
        Ok(Self { text: text.to_owned(), absolute, base, steps })
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The directory that everything it matches lies in: its names before the first wildcard, but never its last, without
    /// escapes. `/` or empty where the first name is the first wildcard or the only name.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Where a walk begins: at the base.
    pub fn start(&self) -> Progress {
        self.close(1)
    }

    /// The next name of a path, below where `progress` is.
    pub fn step(&self, progress: Progress, name: &[u8]) -> Progress {
        let hidden = name.first() == Some(&b'.');
        let mut next = 0;
        for (i, step) in self.steps.iter().enumerate() {
            if progress.0 & (1 << i) == 0 {
                continue;
            }
            match step {
                Step::Directories if hidden => {}
                Step::Directories => next |= 1 << i,
                Step::Name(pattern) if pattern.matches(name) => next |= 1 << (i + 1),
                Step::Name(_) => {}
            }
        }
        self.close(next)
    }

    /// Whether the whole pattern is matched.
    pub fn is_match(&self, progress: Progress) -> bool {
        progress.0 & (1 << self.steps.len()) != 0
    }

    /// Whether it matches a path, relative to [`Pattern::base`].
    pub fn matches_below(&self, path: &[u8]) -> bool {
        let end = path.split(|byte| *byte == b'/').fold(self.start(), |at, name| self.step(at, name));
        self.is_match(end)
    }

    /// Whether it matches a path: an absolute one if it is absolute, else a relative one.
    pub fn matches(&self, path: &[u8]) -> bool {
        let below = match self.base.as_bytes() {
            b"" => Some(path),
            b"/" => path.strip_prefix(b"/"),
            base => path.strip_prefix(base).and_then(|rest| rest.strip_prefix(b"/")),
        };
        below.is_some_and(|below| self.absolute == path.starts_with(b"/") && self.matches_below(below))
    }

    /// `**` also matches no directory.
    fn close(&self, mut bits: u64) -> Progress {
        for (i, step) in self.steps.iter().enumerate() {
            if *step == Step::Directories && bits & (1 << i) != 0 {
                bits |= 1 << (i + 1);
            }
        }
        Progress(bits)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.text)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether a text has a wildcard that no backslash escapes: `*`, `?` or `[`. For command lines, which have no other way to
/// tell a pattern from a path.
pub fn has_wildcard(text: &str) -> bool {
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            '*' | '?' | '[' => return true,
            _ => {}
        }
    }
    false
}

/// A text without its escapes. A backslash at the end stays.
pub fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    out
}
