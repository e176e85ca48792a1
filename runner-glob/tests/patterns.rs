//! What patterns match, and that they match what a simple, slow matcher says.

use proptest::prelude::*;
use runner_glob::{Pattern, PatternError, has_wildcard, unescape};

fn matches(pattern: &str, path: &str) -> bool {
    Pattern::parse(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}")).matches(path.as_bytes())
}

#[test]
fn wildcards_match_within_a_name() {
    for (pattern, path) in [
        ("/o/*.txt", "/o/a.txt"),
        ("/o/*", "/o/x"),
        ("/o/a*b*c", "/o/abbbcbc"),
        ("/o/?", "/o/ü"),
        ("/o/[ab]x", "/o/bx"),
        ("/o/[a-cü]", "/o/ü"),
        ("/o/[!a-c]", "/o/d"),
        ("/o/[^a-c]", "/o/d"),
        ("/o/[]x]", "/o/]"),
        ("/o/[!]x]", "/o/y"),
        ("/o/[a-]", "/o/-"),
        ("/o/[[:digit:][:upper:]]", "/o/Q"),
        ("/o/[\\]]", "/o/]"),
        ("/o/[a", "/o/[a"),
        ("/o/\\*", "/o/*"),
        ("/o/.*", "/o/.hidden"),
        ("/o/a.b/*", "/o/a.b/c"),
        ("/*", "/x"),
        ("*.rs", "a.rs"),
        ("a/*", "a/b"),
    ] {
        assert!(matches(pattern, path), "{pattern} matches {path}");
    }
    for (pattern, path) in [
        ("/o/*", "/o/a/b"),
        ("/o/*", "/o"),
        ("/o/*", "/oo/a"),
        ("/o/?", "/o/ab"),
        ("/o/*", "/o/.hidden"),
        ("/o/?x", "/o/.x"),
        ("/o/[.]x", "/o/.x"),
        ("/o/[!a]x", "/o/.x"),
        ("/o/[!a-c]", "/o/b"),
        ("/o/[[:digit:]]", "/o/٣"),
        ("/o/\\*", "/o/x"),
        ("/*", "x"),
        ("a/*", "/a/b"),
        ("*", "/a"),
    ] {
        assert!(!matches(pattern, path), "{pattern} does not match {path}");
    }
}

#[test]
fn two_stars_match_any_number_of_directories() {
    for (pattern, path) in [
        ("/o/**/x", "/o/x"),
        ("/o/**/x", "/o/a/x"),
        ("/o/**/x", "/o/a/b/c/x"),
        ("/o/**/a/**/b", "/o/a/b"),
        ("/o/**/a/**/b", "/o/z/a/a/y/b"),
        ("/o/**", "/o/a"),
        ("/o/**", "/o/a/b"),
        ("/o/**/**/*.c", "/o/q/x.c"),
        ("**/x", "x"),
        ("/o/a**b", "/o/axb"),
    ] {
        assert!(matches(pattern, path), "{pattern} matches {path}");
    }
    for (pattern, path) in [
        ("/o/**", "/o"),
        ("/o/**/x", "/o/.a/x"),
        ("/o/**", "/o/.a"),
        ("/o/**/x", "/o/xx"),
        ("/o/a**b", "/o/a/b"),
        ("/o/**/a/**/b", "/o/b/a"),
    ] {
        assert!(!matches(pattern, path), "{pattern} does not match {path}");
    }
}

#[test]
fn a_name_that_is_not_text_matches_byte_by_byte() {
    let pattern = |text: &str| Pattern::parse(text).unwrap();
    assert!(pattern("/o/a?b").matches(b"/o/a\xffb"));
    assert!(pattern("/o/*b").matches(b"/o/\xfe\xffb"));
    assert!(pattern("/o/[!x]").matches(b"/o/\xff"));
    assert!(!pattern("/o/?").matches(b"/o/\xfe\xff"));
    assert!(!pattern("/o/[\u{0}-\u{10ffff}]".replace('\0', "\u{1}").as_str()).matches(b"/o/\xff"));
}

#[test]
fn the_base_is_the_directory_before_the_first_wildcard() {
    for (pattern, base) in [
        ("/outputs/a/*.txt", "/outputs/a"),
        ("/outputs/a\\*b/**/x", "/outputs/a*b"),
        ("/outputs/plain", "/outputs"),
        ("/*", "/"),
        ("/**/a", "/"),
        ("a/b/*", "a/b"),
        ("*", ""),
    ] {
        assert_eq!(Pattern::parse(pattern).unwrap().base(), base, "{pattern}");
    }
}

#[test]
fn a_walk_stops_where_nothing_below_can_match() {
    let pattern = Pattern::parse("/o/a*/b/*.txt").unwrap();
    let at = pattern.step(pattern.start(), b"ab");
    assert!(!at.is_dead() && !pattern.is_match(at));
    assert!(pattern.step(pattern.start(), b"ba").is_dead());
    assert!(pattern.step(at, b"c").is_dead());
    let end = pattern.step(pattern.step(at, b"b"), b"x.txt");
    assert!(pattern.is_match(end));
    assert!(pattern.step(end, b"below").is_dead());
}

#[test]
fn what_is_no_pattern_is_refused_with_its_reason() {
    let deep = format!("/*{}", "/a".repeat(60));
    let long = format!("/{}", "a".repeat(256));
    for (text, error) in [
        ("", PatternError::Empty),
        ("/", PatternError::Empty),
        ("/a//b", PatternError::EmptyName),
        ("/a/", PatternError::EmptyName),
        ("/a/../*", PatternError::Dots),
        ("/*/.", PatternError::Dots),
        ("/\\.\\./*", PatternError::Dots),
        ("/a\0", PatternError::Nul),
        ("/a\\", PatternError::LoneBackslash),
        ("/[z-a]", PatternError::Range),
        ("/[[:nope:]]", PatternError::Class),
        ("/[[=a=]]", PatternError::Collation),
        ("/[[.a.]]", PatternError::Collation),
        (&long, PatternError::NameTooLong),
        (&deep, PatternError::TooManyNames),
        (&"/a".repeat(2000), PatternError::TooLong),
    ] {
        assert_eq!(Pattern::parse(text).err(), Some(error), "{text}");
    }
}

#[test]
fn a_wildcard_is_told_from_an_escaped_one() {
    assert!(has_wildcard("/a/*") && has_wildcard("a?") && has_wildcard("[") && has_wildcard("\\\\*"));
    assert!(!has_wildcard("/a/b") && !has_wildcard("/a/\\*\\?\\["));
    assert_eq!(unescape("/a/\\*\\\\x\\"), "/a/*\\x\\");
}

#[test]
fn the_worst_patterns_take_no_longer_than_their_product() {
    // Exponential for a matcher that goes back everywhere: 2^100 steps.
    let pattern = Pattern::parse(&format!("/{}b", "*a".repeat(100))).unwrap();
    assert!(!pattern.matches(format!("/{}", "a".repeat(255)).as_bytes()));
    let pattern = Pattern::parse(&format!("/{}b", "**/a/".repeat(29))).unwrap();
    assert!(!pattern.matches("/a".repeat(1000).as_bytes()));
}

/// The plainest matcher there is: it tries everything. Knows `*`, `?`, `[ab]`, `[!ab]`, escapes, and `**`.
fn reference(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        // At the end, `**` is `**/*`.
        (["**"], _) => !path.is_empty() && path.iter().all(|name| !name.starts_with('.')),
        (["**", rest @ ..], _) => {
            reference(rest, path)
                || matches!(path, [first, below @ ..] if !first.starts_with('.') && reference(pattern, below))
        }
        ([name, rest @ ..], [first, below @ ..]) => {
            let hidden_fits = !first.starts_with('.') || name.starts_with('.') || name.starts_with("\\.");
            let (name, first): (Vec<char>, Vec<char>) = (name.chars().collect(), first.chars().collect());
            hidden_fits && reference_name(&name, &first) && reference(rest, below)
        }
        _ => false,
    }
}

fn reference_name(pattern: &[char], name: &[char]) -> bool {
    match pattern {
        [] => name.is_empty(),
        ['*', rest @ ..] => (0..=name.len()).any(|taken| reference_name(rest, &name[taken..])),
        ['\\', c, rest @ ..] => name.first() == Some(c) && reference_name(rest, &name[1..]),
        ['[', rest @ ..] => {
            let (negated, set) = if rest[0] == '!' { (true, &rest[1..]) } else { (false, rest) };
            let end = set.iter().position(|c| *c == ']').expect("generated sets are closed");
            !name.is_empty()
                && set[..end].contains(&name[0]) != negated
                && reference_name(&set[end + 1..], &name[1..])
        }
        ['?', rest @ ..] => !name.is_empty() && reference_name(rest, &name[1..]),
        [c, rest @ ..] => name.first() == Some(c) && reference_name(rest, &name[1..]),
    }
}

fn pattern_name() -> impl Strategy<Value = String> {
    let piece =
        prop::sample::select(vec!["a", "b", "ü", ".", "*", "*", "?", "[ab]", "[!a]", "\\*", "\\.", "[.b]"]);
    prop_oneof![
        4 => prop::collection::vec(piece, 1..6).prop_map(|pieces| pieces.concat()),
        1 => Just("**".to_owned()),
    ]
    .prop_filter("no dots alone", |name| !matches!(unescape(name).as_str(), "." | ".."))
}

fn path_name() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec!["a", "b", "ü", ".", "*"]);
    prop::collection::vec(piece, 1..6)
        .prop_map(|pieces| pieces.concat())
        .prop_filter("no dots alone", |name| !matches!(name.as_str(), "." | ".."))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn it_matches_what_trying_everything_matches(
        pattern in prop::collection::vec(pattern_name(), 1..5),
        path in prop::collection::vec(path_name(), 1..5),
    ) {
        let parsed = Pattern::parse(&pattern.join("/")).unwrap();
        let pattern: Vec<&str> = pattern.iter().map(String::as_str).collect();
        let names: Vec<&str> = path.iter().map(String::as_str).collect();
        // `***` and the like are one star in a name; only `**` alone is special.
        prop_assert_eq!(parsed.matches(path.join("/").as_bytes()), reference(&pattern, &names));
    }

    #[test]
    fn no_text_makes_it_panic(pattern in "[a*?\\[\\]!^\\-:.=\\\\/ü]{0,40}", path in prop::collection::vec(any::<u8>(), 0..60)) {
        if let Ok(parsed) = Pattern::parse(&pattern) {
            parsed.matches(&path);
        }
    }

    #[test]
    fn a_literal_path_matches_itself_alone(path in prop::collection::vec(path_name(), 1..5)) {
        let path = path.join("/");
        let escaped: String = path.chars().flat_map(|c| if matches!(c, '*' | '?' | '[' | '\\') { vec!['\\', c] } else { vec![c] }).collect();
        prop_assert!(Pattern::parse(&escaped).unwrap().matches(path.as_bytes()));
        let longer = [path.as_bytes(), b"x"].concat();
        prop_assert!(!Pattern::parse(&escaped).unwrap().matches(&longer));
    }
}
