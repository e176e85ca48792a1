//! The pattern of one name.

use crate::PatternError;

/// What a pattern sees of a name: a character, or a byte that is part of none, above all characters.
type Unit = u32;

const FIRST_BYTE_UNIT: Unit = 0x11_0000;

fn units(name: &[u8]) -> Vec<Unit> {
    let mut units = Vec::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        units.extend(chunk.valid().chars().map(Unit::from));
        units.extend(chunk.invalid().iter().map(|byte| FIRST_BYTE_UNIT + Unit::from(*byte)));
    }
    units
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Char(char),
    /// `?`
    One,
    /// `*`
    Any,
    Set {
        negated: bool,
        items: Vec<Item>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Item {
    Range(char, char),
    Class(Class),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Alnum,
    Alpha,
    Blank,
    Cntrl,
    Digit,
    Graph,
    Lower,
    Print,
    Punct,
    Space,
    Upper,
    Xdigit,
}

impl Class {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "alnum" => Self::Alnum,
            "alpha" => Self::Alpha,
            "blank" => Self::Blank,
            "cntrl" => Self::Cntrl,
            "digit" => Self::Digit,
            "graph" => Self::Graph,
            "lower" => Self::Lower,
            "print" => Self::Print,
            "punct" => Self::Punct,
            "space" => Self::Space,
            "upper" => Self::Upper,
            "xdigit" => Self::Xdigit,
            _ => return None,
        })
    }

    fn has(self, c: char) -> bool {
        match self {
            Self::Alnum => c.is_ascii_alphanumeric(),
            Self::Alpha => c.is_ascii_alphabetic(),
            Self::Blank => matches!(c, ' ' | '\t'),
            Self::Cntrl => c.is_ascii_control(),
            Self::Digit => c.is_ascii_digit(),
            Self::Graph => c.is_ascii_graphic(),
            Self::Lower => c.is_ascii_lowercase(),
            Self::Print => c.is_ascii_graphic() || c == ' ',
            Self::Punct => c.is_ascii_punctuation(),
            // `is_ascii_whitespace` leaves out the vertical tab.
            Self::Space => c.is_ascii_whitespace() || c == '\x0b',
            Self::Upper => c.is_ascii_uppercase(),
            Self::Xdigit => c.is_ascii_hexdigit(),
        }
    }
}

/// The pattern of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamePattern(Vec<Token>);

impl NamePattern {
    /// `*`.
    pub(crate) fn anything() -> Self {
        Self(vec![Token::Any])
    }

    pub(crate) fn parse(text: &str) -> Result<Self, PatternError> {
        let chars: Vec<char> = text.chars().collect();
        let mut tokens = Vec::new();
        let mut at = 0;
        while let Some(&c) = chars.get(at) {
            at += 1;
            match c {
                '\\' => {
                    let escaped = chars.get(at).ok_or(PatternError::LoneBackslash)?;
                    tokens.push(Token::Char(*escaped));
                    at += 1;
                }
                '?' => tokens.push(Token::One),
                '*' if tokens.last() == Some(&Token::Any) => {}
                '*' => tokens.push(Token::Any),
                '[' => match set(&chars[at..])? {
                    Some((token, length)) => {
                        tokens.push(token);
                        at += length;
                    }
                    None => tokens.push(Token::Char('[')),
                },
                c => tokens.push(Token::Char(c)),
            }
        }
        Ok(Self(tokens))
    }

    /// The one name that it matches, where it has no wildcard.
    pub(crate) fn literal(&self) -> Option<String> {
        self.0
            .iter()
            .map(|token| match token {
                Token::Char(c) => Some(*c),
                Token::One | Token::Any | Token::Set { .. } => None,
            })
            .collect()
    }

    /// Greedy, with one place to go back to: where the last `*` took one character more. The one before it never needs to
    /// take more, because what lies between them has matched as early as it can.
    pub(crate) fn matches(&self, name: &[u8]) -> bool {
        if name.first() == Some(&b'.') && self.0.first() != Some(&Token::Char('.')) {
            return false;
        }
        let name = units(name);
        let (mut token, mut unit) = (0, 0);
        let mut back: Option<(usize, usize)> = None;
        while unit < name.len() {
            match self.0.get(token) {
                Some(Token::Any) => {
                    back = Some((token + 1, unit));
                    token += 1;
                }
                Some(one) if matches_one(one, name[unit]) => {
                    token += 1;
                    unit += 1;
                }
                Some(_) | None => match &mut back {
                    Some((after, from)) => {
                        *from += 1;
                        (token, unit) = (*after, *from);
                    }
                    None => return false,
                },
            }
        }
        self.0[token..].iter().all(|rest| *rest == Token::Any)
    }
}

fn matches_one(token: &Token, unit: Unit) -> bool {
    match token {
        Token::Char(c) => Unit::from(*c) == unit,
        Token::One => true,
        // Handled where the walk can go back.
        Token::Any => false,
        Token::Set { negated, items } => {
            let has = char::from_u32(unit).is_some_and(|c| {
                items.iter().any(|item| match item {
                    Item::Range(first, last) => (*first..=*last).contains(&c),
                    Item::Class(class) => class.has(c),
                })
            });
            has != *negated
        }
    }
}

/// The set that begins behind a `[`, and how many characters it has, its `]` included. `None` where it has no `]`.
fn set(chars: &[char]) -> Result<Option<(Token, usize)>, PatternError> {
    // Found out first: a `[` without its `]` is a plain character, whatever follows.
    if !is_closed(chars) {
        return Ok(None);
    }
    let negated = matches!(chars.first(), Some('!' | '^'));
    let mut at = usize::from(negated);
    let first = at;
    let mut items = Vec::new();
    loop {
        match (chars[at], chars.get(at + 1)) {
            (']', _) if at > first => return Ok(Some((Token::Set { negated, items }, at + 1))),
            ('[', Some('.' | '=')) => return Err(PatternError::Collation),
            ('[', Some(':')) if class_end(&chars[at + 2..]).is_some() => {
                let length = class_end(&chars[at + 2..]).unwrap_or_default();
                let name: String = chars[at + 2..at + 2 + length].iter().collect();
                items.push(Item::Class(Class::named(&name).ok_or(PatternError::Class)?));
                at += length + 4;
            }
            _ => {
                let (low, next) = element(chars, at)?;
                at = next;
                if chars.get(at) == Some(&'-') && chars.get(at + 1).is_some_and(|c| *c != ']') {
                    if chars[at + 1] == '[' && matches!(chars.get(at + 2), Some('.' | '=' | ':')) {
                        return Err(PatternError::Collation);
                    }
                    let (high, next) = element(chars, at + 1)?;
                    at = next;
                    if high < low {
                        return Err(PatternError::Range);
                    }
                    items.push(Item::Range(low, high));
                } else {
                    items.push(Item::Range(low, low));
                }
            }
        }
    }
}

/// One character of a set, and where the next begins.
fn element(chars: &[char], at: usize) -> Result<(char, usize), PatternError> {
    match chars.get(at) {
        Some('\\') => Ok((*chars.get(at + 1).ok_or(PatternError::LoneBackslash)?, at + 2)),
        Some(c) => Ok((*c, at + 1)),
        None => Err(PatternError::LoneBackslash),
    }
}

/// The length of a class's name, before its `:]`.
fn class_end(chars: &[char]) -> Option<usize> {
    let length = chars.iter().take_while(|c| c.is_ascii_alphanumeric()).count();
    (chars.get(length) == Some(&':') && chars.get(length + 1) == Some(&']')).then_some(length)
}

/// Whether a set has its `]`. The first character may itself be one.
fn is_closed(chars: &[char]) -> bool {
    let mut at = usize::from(matches!(chars.first(), Some('!' | '^')));
    let first = at;
    while let Some(c) = chars.get(at) {
        match c {
            ']' if at > first => return true,
            '\\' => at += 2,
            '[' if chars.get(at + 1) == Some(&':') => match class_end(&chars[at + 2..]) {
                Some(length) => at += length + 4,
                None => at += 1,
            },
            _ => at += 1,
        }
    }
    false
}
