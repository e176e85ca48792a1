use super::*;
use crate::{
    artifact::Manifest,
    clock::Timestamp,
    log::{Frame, FrameBody, LogStream},
    shadow::LogDigester,
    state::Position,
};

fn outcome(code: i32, files: &[(&str, u64, &str)]) -> Outcome {
    let entry = |(path, size, sha256): &(&str, u64, &str)| ManifestEntry {
        output: "/outputs/d".to_owned(),
        base: String::new(),
        path: (*path).to_owned(),
        path_encoded: false,
        kind: EntryKind::File,
        size: *size,
        sha256: (*sha256).to_owned(),
        mode: 0o644,
        key: None,
    };
    let entries: Vec<_> = files.iter().map(entry).collect();
    let total_bytes = entries.iter().map(|entry| entry.size).sum();
    Outcome {
        status: Some(ExitStatus::Code(code)),
        outputs: Some(Manifest { partial: false, entries, total_bytes }),
        ..Outcome::new(1, Cause::Exited, "over")
    }
}

fn log(out: &str, dropped: u64) -> LogDigest {
    let mut digester = LogDigester::default();
    let time = Timestamp::from_micros(1);
    if !out.is_empty() {
        let bytes = bytes::Bytes::copy_from_slice(out.as_bytes());
        digester.push(&Frame { offset: 0, time, body: FrameBody::Data { stream: LogStream::Stdout, bytes } });
    }
    if dropped > 0 {
        let body = FrameBody::Truncated { dropped, reason: String::new() };
        digester.push(&Frame { offset: out.len() as u64, time, body });
    }
    digester.finish()
}

fn parity(one: (&Outcome, Option<&LogDigest>), other: (&Outcome, Option<&LogDigest>)) -> Parity {
    let facts = |(outcome, log)| Facts { outcome, log, phases: Phases::default() };
    compare(facts(one), facts(other))
}

/// (kind, which) of each difference.
fn differences(parity: &Parity) -> Vec<(DifferenceKind, &str)> {
    parity.differences.iter().map(|found| (found.kind, found.what.as_str())).collect()
}

#[test]
fn what_is_the_same_agrees_however_its_attempts_and_keys_differ() {
    let one = outcome(0, &[("a", 1, "aa"), ("b", 2, "bb")]);
    let mut other = Outcome { attempt: 3, message: "another".to_owned(), ..one.clone() };
    let manifest = other.outputs.as_mut().unwrap();
    manifest.entries.reverse();
    manifest.entries[0].key = "runs/t/x/3/outputs/0/b".parse().ok();
    manifest.entries[0].mode = 0o600;
    let log = log("x", 0);
    let parity = parity((&one, Some(&log)), (&other, Some(&log)));
    assert!(parity.agrees() && parity.log_compared, "{parity:?}");
    assert_eq!((parity.primary.files, parity.primary.output_bytes), (2, 3));
}

#[test]
fn each_kind_of_difference_is_found_and_told_with_both_sides() {
    let one = outcome(0, &[("a", 1, "aa"), ("b", 2, "bb"), ("gone", 3, "cc")]);
    let mut other = outcome(1, &[("a", 1, "aa"), ("b", 2, "b!"), ("new", 3, "cc")]);
    other.cause = Cause::TimedOut;
    let (said, other_said) = (log("x", 0), log("y", 0));
    let parity = parity((&one, Some(&said)), (&other, Some(&other_said)));
    use DifferenceKind::{Exit, Log, Output};
    assert_eq!(
        differences(&parity),
        [
            (Exit, ""),
            (DifferenceKind::Cause, ""),
            (Output, "/outputs/d/b"),
            (Output, "/outputs/d/gone"),
            (Output, "/outputs/d/new"),
            (Log, "stdout")
        ]
    );
    let told: Vec<_> =
        parity.differences.iter().map(|found| (found.primary.as_str(), found.shadow.as_str())).collect();
    assert_eq!(told[..2], [("exit code 0", "exit code 1"), ("EXITED", "TIMED_OUT")]);
    assert_eq!(told[2], ("2 bytes, sha256 bb", "2 bytes, sha256 b!"));
    assert_eq!((told[3].1, told[4].0), ("absent", "absent"));
    assert_eq!(parity.kinds(), [Exit, DifferenceKind::Cause, Output, Log]);
}

#[test]
fn logs_that_are_not_whole_are_not_compared() {
    let one = outcome(0, &[]);
    let (whole, other, cut) = (log("x", 0), log("y", 0), log("x", 5));
    for (a, b) in [(Some(&whole), None), (None, Some(&whole)), (Some(&cut), Some(&other)), (None, None)] {
        let parity = parity((&one, a), (&one, b));
        assert!(parity.agrees() && !parity.log_compared, "{parity:?}");
    }
    assert!(!parity((&one, Some(&whole)), (&one, Some(&other))).agrees());
    let silent = log("", 0);
    assert_eq!(parity((&one, Some(&whole)), (&one, Some(&silent))).differences[0].shadow, "nothing");
}

#[test]
fn a_record_stays_small_however_much_differs() {
    let names: Vec<String> = (0..1000).map(|n| format!("{n:04}{}", "x".repeat(1000))).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 1, "aa")).collect();
    let parity = parity((&outcome(0, &files), None), (&outcome(0, &[]), None));
    assert_eq!((parity.differences.len(), parity.more), (MAX_DIFFERENCES, 1000 - MAX_DIFFERENCES as u64));
    assert!(serde_json::to_string(&parity).unwrap().len() < 64 * 1024);
}

#[test]
fn phases_are_those_of_the_last_attempt() {
    use RunState::{Preparing, Publishing, Queued, Running, Succeeded};
    let way = [
        (Queued, 0, 0),
        (Preparing, 1, 1),
        (Running, 1, 3),
        (Queued, 1, 10),
        (Preparing, 2, 15),
        (Running, 2, 17),
        (Publishing, 2, 40),
        (Succeeded, 2, 41),
    ];
    let events = |way: &[(RunState, u32, u64)]| -> Vec<StoredEvent> {
        let event = |(seq, (state, attempt, second)): (u64, &(RunState, u32, u64))| StoredEvent {
            seq,
            time: Timestamp::from_micros(0) + Duration::from_secs(*second),
            event: RunEvent::StateChanged {
                position: Position { state: *state, attempt: *attempt },
                reason: String::new(),
            },
        };
        (1..).zip(way).map(event).collect()
    };
    let seconds = |n| Some(Duration::from_secs(n));
    let phases = Phases::of(&events(&way));
    assert_eq!(
        phases,
        Phases { queued: seconds(5), preparing: seconds(2), running: seconds(23), publishing: seconds(1) }
    );
    assert_eq!(Phases::of(&events(&way[..2])), Phases { queued: seconds(1), ..Phases::default() });
}
