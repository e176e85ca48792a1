//! Runs and their shadows, compared.

use runner_core::{
    id::RunId,
    outcome::ExitStatus,
    shadow::{
        Difference, DifferenceKind, LogDigest, Pair, PairFilter, PairRecord, Parity, Phases, Side, Stage,
        Verdict,
    },
    spec::InvalidSpec,
};
use runner_proto::v1;

use super::{Violations, Wire, cause, duration, timestamp};

/// Most records of a page.
const MAX_PAGE: usize = 200;
/// Most differences of a record in a list: a page of the longest stays below the size of a message.
const LISTED: usize = 8;

/// A page of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairPage {
    /// Which.
    pub filter: PairFilter,
    /// Below this number.
    pub before: Option<u64>,
    /// At most so many.
    pub max: usize,
}

impl TryFrom<Wire<v1::ListParityRequest>> for PairPage {
    type Error = InvalidSpec;

    fn try_from(Wire(request): Wire<v1::ListParityRequest>) -> Result<Self, InvalidSpec> {
        let v1::ListParityRequest {
            page_size,
            before,
            image,
            primary_backend,
            shadow_backend,
            since,
            differing,
        } = request;
        let mut violations = Violations::default();
        let filter = PairFilter {
            image: Some(image).filter(|image| !image.is_empty()),
            primary_backend: violations.parse_optional("primary_backend", &primary_backend),
            shadow_backend: violations.parse_optional("shadow_backend", &shadow_backend),
            since: violations.timestamp("since", since),
            differing,
        };
        let max = if page_size == 0 { 100 } else { usize::try_from(page_size).unwrap_or(MAX_PAGE) };
        violations.finish(Self { filter, before: (before > 0).then_some(before), max: max.min(MAX_PAGE) })
    }
}

/// The id of a request.
///
/// # Errors
/// Where it is none.
pub fn run_of(request: &v1::GetParityRequest) -> Result<RunId, InvalidSpec> {
    let mut violations = Violations::default();
    match violations.parse("run_id", &request.run_id) {
        Some(id) => Ok(id),
        None => Err(InvalidSpec(violations.0)),
    }
}

/// A record of a list.
pub fn listed(record: &PairRecord) -> v1::Parity {
    let mut wire = whole(record);
    let more = wire.differences.len().saturating_sub(LISTED);
    wire.differences.truncate(LISTED);
    wire.more_differences += more as u64;
    wire
}

/// A record with all that is known.
pub fn whole(record: &PairRecord) -> v1::Parity {
    let PairRecord { number, pair, stage, since, judged, verdict } = record;
    let Pair { primary, tenant, image, primary_backend, shadow_backend } = pair;
    let mut wire = v1::Parity {
        number: *number,
        run_id: primary.to_string(),
        shadow_id: pair.shadow().to_string(),
        tenant: tenant.to_string(),
        image: image.clone().unwrap_or_default(),
        primary_backend: primary_backend.to_string(),
        shadow_backend: shadow_backend.to_string(),
        end_time: Some(timestamp(*since)),
        verdict_time: judged.map(timestamp),
        ..v1::Parity::default()
    };
    let word = match (verdict, stage) {
        (Some(Verdict::Skipped(why)), _) => {
            why.as_str().clone_into(&mut wire.skipped);
            v1::parity::Verdict::Skipped
        }
        (Some(Verdict::Compared(parity)), _) => {
            let Parity { differences, more, log_compared, primary, shadow } = parity.as_ref();
            wire.differences = differences.iter().map(difference).collect();
            wire.more_differences = *more;
            wire.log_compared = *log_compared;
            wire.primary = Some(side(primary));
            wire.shadow = Some(side(shadow));
            if parity.agrees() { v1::parity::Verdict::Agrees } else { v1::parity::Verdict::Differs }
        }
        (None, Stage::Pending | Stage::Running | Stage::Orphaned | Stage::Compared | Stage::Skipped) => {
            v1::parity::Verdict::Open
        }
    };
    wire.set_verdict(word);
    wire
}

fn difference(found: &Difference) -> v1::ParityDifference {
    let Difference { kind, what, primary, shadow } = found;
    let kind = match kind {
        DifferenceKind::Exit => v1::parity_difference::Kind::Exit,
        DifferenceKind::Cause => v1::parity_difference::Kind::Cause,
        DifferenceKind::Output => v1::parity_difference::Kind::Output,
        DifferenceKind::Log => v1::parity_difference::Kind::Log,
    };
    v1::ParityDifference {
        kind: kind.into(),
        what: what.clone(),
        primary: primary.clone(),
        shadow: shadow.clone(),
    }
}

fn side(side: &Side) -> v1::ParitySide {
    let Side { status, cause: why, files, output_bytes, log: said, phases } = side;
    let Phases { queued, preparing, running, publishing } = *phases;
    v1::ParitySide {
        status: status.map(|status| match status {
            ExitStatus::Code(code) => v1::parity_side::Status::ExitCode(code),
            ExitStatus::Signal(signal) => v1::parity_side::Status::Signal(signal),
        }),
        cause: cause(*why).into(),
        files: *files,
        output_bytes: *output_bytes,
        log: said.as_ref().map(log),
        queued: queued.map(duration),
        preparing: preparing.map(duration),
        running: running.map(duration),
        publishing: publishing.map(duration),
    }
}

fn log(log: &LogDigest) -> v1::ParityLog {
    let LogDigest { bytes, dropped, sha256, streams } = log;
    let streams = streams.iter().map(|(name, stream)| {
        (name.clone(), v1::ParityStream { bytes: stream.bytes, sha256: stream.sha256.clone() })
    });
    v1::ParityLog { bytes: *bytes, dropped: *dropped, sha256: sha256.clone(), streams: streams.collect() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use runner_core::{
        clock::Timestamp,
        outcome::{Cause, Outcome},
        shadow::{Facts, compare},
        traffic::NoShadow,
    };

    use super::*;

    fn record(verdict: Option<Verdict>) -> PairRecord {
        let pair = Pair {
            primary: "01930000-0000-7000-8000-000000000001".parse().unwrap(),
            tenant: "t".parse().unwrap(),
            image: None,
            primary_backend: "a".parse().unwrap(),
            shadow_backend: "b".parse().unwrap(),
        };
        let (since, stage) =
            (Timestamp::from_micros(5), verdict.as_ref().map_or(Stage::Pending, Verdict::stage));
        PairRecord { number: 3, pair, stage, since, judged: verdict.is_some().then_some(since), verdict }
    }

    fn compared(other: Cause) -> Parity {
        let outcome = |cause| Outcome { status: Some(ExitStatus::Code(0)), ..Outcome::new(1, cause, "") };
        let (one, other) = (outcome(Cause::Exited), outcome(other));
        let phases = Phases { running: Some(Duration::from_secs(2)), ..Phases::default() };
        let facts = |outcome| Facts { outcome, log: None, phases };
        compare(facts(&one), facts(&other))
    }

    #[test]
    fn each_verdict_has_its_word() {
        use v1::parity::Verdict::{Agrees, Differs, Open, Skipped};
        let verdict = |verdict| whole(&record(verdict)).verdict();
        let parity = |cause| Some(Verdict::Compared(Box::new(compared(cause))));
        assert_eq!(verdict(None), Open);
        assert_eq!(verdict(parity(Cause::Exited)), Agrees);
        assert_eq!(verdict(parity(Cause::Lost)), Differs);
        let skipped = whole(&record(Some(Verdict::Skipped(NoShadow::Late))));
        assert_eq!((skipped.verdict(), skipped.skipped.as_str()), (Skipped, "late"));
        let differs = whole(&record(parity(Cause::Lost)));
        assert_eq!(differs.differences[0].kind(), v1::parity_difference::Kind::Cause);
        assert_eq!(differs.primary.unwrap().running, Some(duration(Duration::from_secs(2))));
    }

    #[test]
    fn a_list_shows_the_first_differences_and_counts_the_rest() {
        let mut parity = compared(Cause::Lost);
        parity.differences = vec![parity.differences[0].clone(); 20];
        parity.more = 5;
        let record = record(Some(Verdict::Compared(Box::new(parity))));
        let (listed, whole) = (listed(&record), whole(&record));
        assert_eq!((listed.differences.len(), listed.more_differences), (8, 17));
        assert_eq!((whole.differences.len(), whole.more_differences), (20, 5));
    }

    #[test]
    fn bad_filters_are_told_by_their_fields() {
        let request = v1::ListParityRequest {
            page_size: 100_000,
            primary_backend: "NO".into(),
            shadow_backend: "-".into(),
            ..v1::ListParityRequest::default()
        };
        let bad = PairPage::try_from(Wire(request.clone())).unwrap_err().0;
        let fields: Vec<_> = bad.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, ["primary_backend", "shadow_backend"]);
        let good =
            v1::ListParityRequest { primary_backend: "a".into(), shadow_backend: String::new(), ..request };
        let page = PairPage::try_from(Wire(good)).unwrap();
        assert_eq!((page.max, page.before, page.filter.image), (MAX_PAGE, None, None));
        assert!(run_of(&v1::GetParityRequest { run_id: "x".into() }).is_err());
    }
}
