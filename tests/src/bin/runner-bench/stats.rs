//! Paired ratios: their median and spread, and the table.

use std::{fmt::Write as _, io, time::Duration};

use runner_core::clock::{Clock as _, SystemClock};

/// A measured line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    /// Number in `docs/benchmarks.md`.
    pub(crate) number: u8,
    /// What is compared with what.
    pub(crate) what: String,
    /// The ratios, one for each pair; empty where it could not be measured.
    pub(crate) ratios: Vec<f64>,
    /// The target, for example `≤ 2`.
    pub(crate) target: &'static str,
    /// Absolute numbers, for orientation; or why there is no ratio.
    pub(crate) note: String,
}

impl Row {
    /// A line that says why it has no ratio.
    pub(crate) fn absent(number: u8, what: &str, target: &'static str, why: impl Into<String>) -> Self {
        Self { number, what: what.to_owned(), ratios: Vec::new(), target, note: why.into() }
    }
}

/// The value at a fraction of a sorted list, nearest rank.
pub(crate) fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rank within the list"
    )]
    let rank = ((sorted.len() as f64 * fraction).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

/// The median.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(&sorted(values), 0.5)
}

/// A sorted copy.
pub(crate) fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Prints the table.
pub(crate) fn print(rows: &[Row], out: &mut impl io::Write) -> io::Result<()> {
    let mut text = String::from(
        "| # | ratio | median | quartiles | pairs | target | absolute |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let sorted = sorted(&row.ratios);
        let figures = if sorted.is_empty() {
            "– | – | 0".to_owned()
        } else {
            let (low, high) = (quantile(&sorted, 0.25), quantile(&sorted, 0.75));
            format!("{:.2} | {low:.2} – {high:.2} | {}", quantile(&sorted, 0.5), sorted.len())
        };
        let _ =
            writeln!(text, "| {} | {} | {figures} | {} | {} |", row.number, row.what, row.target, row.note);
    }
    out.write_all(text.as_bytes())
}

/// Times what `work` does.
pub(crate) async fn timed<T>(work: impl Future<Output = T>) -> (f64, T) {
    let clock = SystemClock::new();
    let output = work.await;
    (clock.monotonic().as_secs_f64(), output)
}

/// Seconds since the clock's start.
pub(crate) fn seconds(clock: &SystemClock) -> f64 {
    clock.monotonic().as_secs_f64()
}

/// A duration for people.
pub(crate) fn millis(seconds: f64) -> String {
    format!("{:.2?}", Duration::from_secs_f64(seconds.max(0.0)))
}
