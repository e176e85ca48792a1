use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::traffic::{RampStatus, RampStep};

fn name(name: &str) -> BackendName {
    name.parse().unwrap()
}

fn known() -> BTreeSet<BackendName> {
    ["dind", "k8s", "local"].map(name).into()
}

fn at(seconds: u64) -> Timestamp {
    Timestamp::from_micros(1_000_000) + Duration::from_secs(seconds)
}

fn by(seconds: u64) -> By<'static> {
    By { actor: "ops", reason: "because", now: at(seconds) }
}

/// dind with the canary k8s at `percent`.
fn traffic(percent: f64) -> Traffic {
    let split = json!({ "baseline": "dind", "canaries": [{ "backend": "k8s", "percent": percent }] });
    let policy = json!({ "default": { "split": split } });
    Traffic { policy: serde_json::from_value(policy).unwrap(), ..Traffic::default() }
}

fn order(steps: &[(f64, u64)]) -> Change {
    let steps = steps.iter().map(|(percent, seconds)| RampStep {
        share: Share::try_from(*percent).unwrap(),
        hold: Duration::from_secs(*seconds),
    });
    Change::StartRamp(RampOrder { rule: None, backend: name("k8s"), steps: steps.collect() })
}

fn change(traffic: &mut Traffic, change: &Change, seconds: u64) -> Result<String, ChangeError> {
    let (next, what) = traffic.changed(change, by(seconds), &known())?;
    *traffic = next;
    Ok(what)
}

fn refusal(traffic: &mut Traffic, asked: &Change, seconds: u64) -> &'static str {
    let before = traffic.clone();
    let refusal = match change(traffic, asked, seconds) {
        Err(ChangeError::Precondition { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(*traffic, before, "what is refused changes nothing");
    refusal
}

fn share(traffic: &Traffic) -> f64 {
    let Some(Target::Split(split)) = &traffic.policy.default else { panic!("no split") };
    split.share(&name("k8s")).unwrap().percent()
}

#[test]
fn a_ramp_goes_through_its_steps_and_ends_at_the_last() {
    let mut traffic = traffic(0.0);
    assert_eq!(
        change(&mut traffic, &order(&[(1.0, 10), (25.0, 20), (100.0, 5)]), 0).unwrap(),
        "ramp of k8s: step 1 of 3, 1 %, running"
    );
    for (seconds, expected) in [(10, 25.0), (30, 100.0)] {
        assert_eq!(refusal(&mut traffic, &Change::AdvanceRamp, seconds - 1), "RAMP_NOT_DUE");
        change(&mut traffic, &Change::AdvanceRamp, seconds).unwrap();
        assert!((share(&traffic) - expected).abs() < f64::EPSILON);
    }
    change(&mut traffic, &Change::AdvanceRamp, 35).unwrap();
    assert_eq!(traffic.ramp.as_ref().unwrap().status, RampStatus::Finished);
    assert!((share(&traffic) - 100.0).abs() < f64::EPSILON, "it keeps what it has");
    assert_eq!(refusal(&mut traffic, &Change::AdvanceRamp, 99), "RAMP_NOT_DUE");
}

#[test]
fn a_paused_ramp_holds_its_step_for_as_long_as_it_still_had() {
    let mut traffic = traffic(0.0);
    change(&mut traffic, &order(&[(1.0, 10), (2.0, 10)]), 0).unwrap();
    change(&mut traffic, &Change::PauseRamp, 4).unwrap();
    assert_eq!(refusal(&mut traffic, &Change::PauseRamp, 5), "RAMP_NOT_RUNNING");
    assert_eq!(refusal(&mut traffic, &Change::AdvanceRamp, 1000), "RAMP_NOT_DUE");
    change(&mut traffic, &Change::ResumeRamp, 1000).unwrap();
    assert_eq!(refusal(&mut traffic, &Change::ResumeRamp, 1001), "RAMP_NOT_PAUSED");
    assert_eq!(traffic.ramp.as_ref().unwrap().due(), Some(at(1006)));
}

#[test]
fn an_aborted_ramp_gives_the_canary_what_it_had() {
    let mut traffic = traffic(3.0);
    change(&mut traffic, &order(&[(50.0, 10)]), 0).unwrap();
    assert_eq!(refusal(&mut traffic, &order(&[(50.0, 10)]), 1), "RAMP_ACTIVE");
    assert_eq!(refusal(&mut traffic, &Change::SetPolicy(Policy::default()), 1), "RAMP_ACTIVE");
    change(&mut traffic, &Change::AbortRamp, 1).unwrap();
    assert!((share(&traffic) - 3.0).abs() < f64::EPSILON);
    assert_eq!(refusal(&mut traffic, &Change::AbortRamp, 1), "RAMP_NOT_ACTIVE");
    change(&mut traffic, &Change::SetPolicy(Policy::default()), 2).unwrap();
}

#[test]
fn a_rollback_takes_everything_from_the_canary_and_ends_its_ramp() {
    let mut traffic = traffic(3.0);
    change(&mut traffic, &order(&[(50.0, 10), (100.0, 10)]), 0).unwrap();
    assert_eq!(refusal(&mut traffic, &Change::Rollback(Some(name("local"))), 1), "NO_CANARY");
    let what = change(&mut traffic, &Change::Rollback(None), 1).unwrap();
    assert_eq!(what, "no new runs for canaries: k8s had 50 %");
    assert!(share(&traffic).abs() < f64::EPSILON);
    assert_eq!(traffic.ramp.as_ref().unwrap().status, RampStatus::RolledBack);
    assert_eq!(refusal(&mut traffic, &Change::AdvanceRamp, 99), "RAMP_NOT_DUE");
    assert_eq!(refusal(&mut Traffic::default(), &Change::Rollback(None), 1), "NO_CANARY");
}

#[test]
fn a_drain_is_stored_with_who_and_why() {
    let mut traffic = Traffic::default();
    change(&mut traffic, &Change::Drain(name("dind")), 5).unwrap();
    let expected = Drained { since: at(5), by: "ops".to_owned(), reason: "because".to_owned() };
    assert_eq!(traffic.drained[&name("dind")], expected);
    assert_eq!(refusal(&mut traffic, &Change::Drain(name("dind")), 6), "ALREADY_DRAINED");
    change(&mut traffic, &Change::Undrain(name("dind")), 7).unwrap();
    assert_eq!(refusal(&mut traffic, &Change::Undrain(name("dind")), 8), "NOT_DRAINED");
    let unknown = change(&mut traffic, &Change::Drain(name("nowhere")), 9);
    assert!(matches!(unknown, Err(ChangeError::Invalid(_))), "{unknown:?}");
}

#[test]
fn a_ramp_that_cannot_be_is_refused_with_its_field() {
    let fields = |steps: &[(f64, u64)]| match change(&mut traffic(1.0), &order(steps), 0) {
        Err(ChangeError::Invalid(InvalidSpec(found))) => {
            found.into_iter().map(|violation| violation.field).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(fields(&[]), ["steps"]);
    assert_eq!(fields(&[(5.0, 1), (4.0, 1)]), ["steps[1].share"]);
    assert_eq!(fields(&[(5.0, 31 * 24 * 3600)]), ["steps[0].hold"]);
    assert_eq!(fields(&[(1.0, 1); 101]), ["steps"]);
    let mut none = Traffic::default();
    assert_eq!(refusal(&mut none, &order(&[(5.0, 1)]), 0), "NO_SPLIT");
    assert_eq!(refusal(&mut none, &Change::PauseRamp, 0), "NO_RAMP");
    let other = RampOrder { rule: None, backend: name("local"), steps: vec![] };
    assert_eq!(refusal(&mut traffic(1.0), &Change::StartRamp(other), 0), "NO_CANARY");
}

proptest! {
    /// Whatever is asked for, in whatever order and at whatever time: the policy stays valid, and the document reads back.
    #[test]
    fn whatever_is_asked_for_leaves_a_valid_policy(asked in proptest::collection::vec((0..9u8, 0..30u64), 0..40)) {
        let mut state = traffic(2.0);
        let mut now = 0;
        for (what, later) in asked {
            now += later;
            let asked = match what {
                0 => order(&[(5.0, 3), (50.0, 10), (100.0, 7)]),
                1 => Change::PauseRamp,
                2 => Change::ResumeRamp,
                3 => Change::AbortRamp,
                4 | 5 => Change::AdvanceRamp,
                6 => Change::Rollback(None),
                7 => Change::Drain(name("dind")),
                _ => Change::Undrain(name("dind")),
            };
            let _ = change(&mut state, &asked, now);
            prop_assert!(state.policy.validate(&known()).is_ok());
            let again: Traffic = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
            prop_assert_eq!(&again, &state);
            if let Some(ramp) = state.ramp.as_ref().filter(|ramp| ramp.is_active()) {
                prop_assert!((share(&state) - ramp.share().percent()).abs() < f64::EPSILON);
            }
        }
    }
}
