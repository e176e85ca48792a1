//! What a failed test shows of a server's log.

/// How many lines are shown. Whoever reads what a CI run printed sees its last few kilobytes, and the assertion stands above.
const LINES: usize = 12;
/// How much of each is shown, in characters.
const LENGTH: usize = 240;

/// The last of these lines, each cut where it is long.
pub fn tail<'a>(lines: impl DoubleEndedIterator<Item = &'a str>) -> String {
    let cut = |line: &str| line.chars().take(LENGTH).collect::<String>();
    let last: Vec<String> = lines.rev().take(LINES).map(cut).collect();
    last.into_iter().rev().collect::<Vec<_>>().join("\n")
}
