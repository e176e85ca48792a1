//! `parity`.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use worker_client::{convert, proto, proto::parity::Verdict};

use super::{Service, is_table};
use crate::{
    args::{ParityCommand, ReportArgs, ShowParityArgs},
    exit::Exit,
    failure::Failure,
    human,
    json::parity as as_json,
    output, table,
    value::Format,
};

/// Records that are asked for at once.
const PAGE: u32 = 200;
/// Images that are told apart. A report of more counts the rest as one.
const MAX_IMAGES: usize = 1000;

pub(super) async fn execute(
    service: &Service,
    command: ParityCommand,
    format: impl Fn(Option<Format>) -> Format,
) -> Result<Exit, Failure> {
    match command {
        ParityCommand::Report(args) => {
            let format = format(args.format.format);
            report(service, args, format).await
        }
        ParityCommand::Show(args) => {
            let format = format(args.format.format);
            show(service, args, format).await
        }
    }
}

/// How the runs of one image compare with their shadows.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    agreeing: u64,
    differing: u64,
    skipped: u64,
}

/// What a report is made of. Bounded, however many runs there are.
#[derive(Debug, Default)]
struct Report {
    images: BTreeMap<String, Tally>,
    skipped: BTreeMap<String, u64>,
    differing: Vec<proto::Parity>,
    /// Differing runs that are not shown.
    more: u64,
}

impl Report {
    fn add(&mut self, record: proto::Parity, limit: usize) {
        let image = if record.image.is_empty() { "(default)" } else { record.image.as_str() };
        let full = self.images.len() >= MAX_IMAGES && !self.images.contains_key(image);
        let tally = self.images.entry(if full { "(others)" } else { image }.to_owned()).or_default();
        match record.verdict() {
            Verdict::Agrees => tally.agreeing += 1,
            Verdict::Skipped => {
                tally.skipped += 1;
                *self.skipped.entry(record.skipped).or_default() += 1;
            }
            Verdict::Differs => {
                tally.differing += 1;
                if self.differing.len() < limit {
                    self.differing.push(record);
                } else {
                    self.more += 1;
                }
            }
            // Listed only once it is neither.
            Verdict::Open | Verdict::Unspecified => {}
        }
    }

    fn total(&self) -> Tally {
        self.images.values().fold(Tally::default(), |sum, tally| Tally {
            agreeing: sum.agreeing + tally.agreeing,
            differing: sum.differing + tally.differing,
            skipped: sum.skipped + tally.skipped,
        })
    }
}

async fn report(service: &Service, args: ReportArgs, format: Format) -> Result<Exit, Failure> {
    // A moment before 1970 is before every run.
    let since = args.since.and_then(|since| human::now().checked_sub(since));
    let mut request = proto::ListParityRequest {
        page_size: PAGE,
        before: 0,
        image: args.image.unwrap_or_default(),
        primary_backend: args.primary.unwrap_or_default(),
        shadow_backend: args.shadow.unwrap_or_default(),
        since: since.map(convert::time_to_proto),
        differing: args.differing,
    };
    let mut report = Report::default();
    loop {
        let page = service.client.parity_page(request.clone()).await.map_err(|e| service.failure(&e))?;
        let Some(last) = page.last() else { break };
        request.before = last.number;
        let complete = page.len() < PAGE as usize;
        page.into_iter().for_each(|record| report.add(record, args.limit));
        if complete {
            break;
        }
    }
    if !is_table(format) {
        output::document(&document(&report))?;
        return Ok(Exit::OK);
    }
    output::data(&text(&report))?;
    Ok(Exit::OK)
}

fn document(report: &Report) -> Value {
    let tally = |tally: &Tally| {
        json!({
            "pairs": tally.agreeing + tally.differing,
            "agreeing": tally.agreeing,
            "differing": tally.differing,
            "skipped": tally.skipped,
        })
    };
    let images = report.images.iter().map(|(image, counts)| (image.clone(), tally(counts)));
    json!({
        "total": tally(&report.total()),
        "images": images.collect::<serde_json::Map<_, _>>(),
        "skipped": report.skipped,
        "differing": report.differing.iter().map(as_json::record).collect::<Vec<_>>(),
        "more": report.more,
    })
}

fn text(report: &Report) -> String {
    let row = |image: &str, tally: &Tally| {
        let pairs = tally.agreeing + tally.differing;
        #[allow(clippy::cast_precision_loss, reason = "a percentage for people")]
        let agreement = if pairs == 0 {
            "-".to_owned()
        } else {
            // Never rounded up to what it is not.
            format!("{} %", (tally.agreeing as f64 / pairs as f64 * 10_000.0).floor() / 100.0)
        };
        let numbers =
            [pairs, tally.agreeing, tally.differing, tally.skipped].map(|number| number.to_string());
        [vec![human::visible(image)], numbers.to_vec(), vec![agreement]].concat()
    };
    let mut rows: Vec<_> = report.images.iter().map(|(image, tally)| row(image, tally)).collect();
    rows.push(row("all", &report.total()));
    let mut text = table::render(&["IMAGE", "PAIRS", "AGREE", "DIFFER", "SKIPPED", "AGREEMENT"], &rows);
    if !report.skipped.is_empty() {
        let rows: Vec<_> =
            report.skipped.iter().map(|(why, count)| vec![human::visible(why), count.to_string()]).collect();
        text.push('\n');
        text.push_str(&table::render(&["NO SHADOW BECAUSE", "RUNS"], &rows));
    }
    if !report.differing.is_empty() {
        let rows: Vec<_> = report.differing.iter().flat_map(differences).collect();
        text.push('\n');
        text.push_str(&table::render(&["RUN", "SHADOW", "DIFFERS IN", "RUN HAD", "SHADOW HAD"], &rows));
    }
    if report.more > 0 {
        text.push_str(&format!("and {} more runs that differ; see --limit\n", report.more));
    }
    text
}

/// A row for each difference of a run.
fn differences(record: &proto::Parity) -> Vec<Vec<String>> {
    let row = |what: String, primary: &str, shadow: &str| {
        let (primary, shadow) = (human::visible(primary), human::visible(shadow));
        vec![record.run_id.clone(), record.shadow_id.clone(), what, primary, shadow]
    };
    let mut rows: Vec<_> = record
        .differences
        .iter()
        .map(|found| row(as_json::what(found), &found.primary, &found.shadow))
        .collect();
    if record.more_differences > 0 {
        rows.push(row(format!("{} more; see `parity show`", record.more_differences), "", ""));
    }
    rows
}

async fn show(service: &Service, args: ShowParityArgs, format: Format) -> Result<Exit, Failure> {
    let record = service.client.parity(args.run).await.map_err(|e| service.failure(&e))?;
    if !is_table(format) {
        output::document(&as_json::record(&record))?;
        return Ok(Exit::OK);
    }
    let moment = |time: &Option<convert::Timestamp>| time.as_ref().map(human::moment).unwrap_or_default();
    let mut verdict = as_json::verdict(&record).to_lowercase();
    if !record.skipped.is_empty() {
        verdict = format!("{verdict}: {}", human::visible(&record.skipped));
    }
    let mut text = table::facts(&[
        ("Run", record.run_id.clone()),
        ("Shadow", record.shadow_id.clone()),
        ("Image", human::visible(&record.image)),
        ("Ended", moment(&record.end_time)),
        ("Compared", moment(&record.verdict_time)),
        ("Verdict", verdict),
    ]);
    if let (Some(primary), Some(shadow)) = (&record.primary, &record.shadow) {
        let rows = sides(&record, primary, shadow);
        text.push('\n');
        text.push_str(&table::render(&["", "RUN", "SHADOW"], &rows));
    }
    if !record.differences.is_empty() {
        let rows: Vec<_> = differences(&record).into_iter().map(|row| row[2..].to_vec()).collect();
        text.push('\n');
        text.push_str(&table::render(&["DIFFERS IN", "RUN HAD", "SHADOW HAD"], &rows));
    }
    output::data(&text)?;
    Ok(Exit::OK)
}

fn sides(
    record: &proto::Parity,
    primary: &proto::ParitySide,
    shadow: &proto::ParitySide,
) -> Vec<Vec<String>> {
    let both = |name: &str, tell: &dyn Fn(&proto::ParitySide) -> String| {
        vec![name.to_owned(), tell(primary), tell(shadow)]
    };
    let time = |time: &Option<convert::ProtoDuration>| {
        let time = time.as_ref().and_then(convert::duration_from_proto);
        time.map_or_else(|| "-".to_owned(), human::duration)
    };
    let log = if record.log_compared { "log" } else { "log (not compared)" };
    vec![
        vec!["backend".to_owned(), record.primary_backend.clone(), record.shadow_backend.clone()],
        both("ending", &as_json::ending),
        both("outputs", &|side| format!("{} files, {}", side.files, human::bytes(side.output_bytes))),
        both(log, &|side| match &side.log {
            None => "gone".to_owned(),
            Some(log) if log.dropped > 0 => {
                format!("{}, {} dropped", human::bytes(log.bytes), human::bytes(log.dropped))
            }
            Some(log) => human::bytes(log.bytes),
        }),
        both("queued", &|side| time(&side.queued)),
        both("preparing", &|side| time(&side.preparing)),
        both("running", &|side| time(&side.running)),
        both("publishing", &|side| time(&side.publishing)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(image: &str, verdict: Verdict) -> proto::Parity {
        let difference = proto::ParityDifference {
            kind: proto::parity_difference::Kind::Output.into(),
            what: "/outputs/\u{1b}x".into(),
            primary: "absent".into(),
            shadow: "1 bytes".into(),
        };
        proto::Parity {
            image: image.into(),
            run_id: "run".into(),
            shadow_id: "shadow".into(),
            verdict: verdict.into(),
            skipped: if verdict == Verdict::Skipped { "late".into() } else { String::new() },
            differences: if verdict == Verdict::Differs { vec![difference] } else { vec![] },
            ..proto::Parity::default()
        }
    }

    #[test]
    fn a_report_counts_by_image_and_shows_every_difference() {
        let mut report = Report::default();
        for (image, verdict) in [
            ("a", Verdict::Agrees),
            ("a", Verdict::Agrees),
            ("a", Verdict::Differs),
            ("", Verdict::Skipped),
            ("b", Verdict::Differs),
        ] {
            report.add(record(image, verdict), 1);
        }
        let text = text(&report);
        for line in [
            "a          3      2      1       0        66.66 %",
            "(default)  0      0      0       1        -",
            "all        4      2      2       1        50 %",
            "late               1",
            r"run  shadow  output /outputs/\u{1b}x  absent   1 bytes",
            "and 1 more runs that differ; see --limit",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
        let document = document(&report);
        assert_eq!(document["images"]["a"]["differing"], 1);
        assert_eq!(document["differing"][0]["differences"][0]["kind"], "OUTPUT");
        assert_eq!((&document["more"], &document["skipped"]["late"]), (&json!(1), &json!(1)));
    }

    #[test]
    fn a_report_of_nothing_says_so() {
        assert!(text(&Report::default()).contains("all    0      0      0       0        -"));
    }
}
