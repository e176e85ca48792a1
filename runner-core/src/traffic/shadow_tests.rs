use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::{
    id::TenantId,
    role::Role,
    spec::{FieldViolation, TerminalSize},
    traffic::{Candidate, Rule, Target, choose},
};

fn name(name: &str) -> BackendName {
    name.parse().unwrap()
}

fn share(hundredths: u16) -> Share {
    Share::from_hundredths(hundredths).unwrap()
}

fn run(n: u128) -> RunId {
    RunId::new(Uuid::from_u128(n + 1))
}

fn shadows(hundredths: u16) -> Shadows {
    Shadows {
        backend: name("new"),
        percent: share(hundredths),
        at_once: 1,
        matches: Match::default(),
        rules: BTreeSet::new(),
        patience_seconds: 60,
    }
}

fn policy(shadow: Shadows) -> Policy {
    Policy { shadow: Some(Box::new(shadow)), ..Policy::default() }
}

fn idempotent() -> RunSpec {
    RunSpec { idempotent: true, image: Some("app:1".to_owned()), ..RunSpec::default() }
}

/// `old`, the default, and `new`, of which this is known.
struct Two(Option<Candidate>, [BackendName; 2]);

fn two(new: Option<Candidate>) -> Two {
    Two(new, [name("new"), name("old")])
}

fn good() -> Candidate {
    Candidate { healthy: true, drained: false, lacks: Vec::new() }
}

impl Backends for Two {
    fn default_backend(&self) -> &BackendName {
        &self.1[1]
    }

    fn candidate(&self, backend: &BackendName, _: &RunSpec) -> Option<Candidate> {
        if *backend == self.1[0] { self.0.clone() } else { Some(good()) }
    }

    fn names(&self) -> impl Iterator<Item = &BackendName> {
        self.1.iter()
    }
}

fn decided(policy: &Policy, backends: &Two, run: RunId, spec: &RunSpec) -> Option<Shadowing> {
    let tenant: TenantId = "t".parse().unwrap();
    choose(policy, 1, backends, Asked { tenant: &tenant, roles: &Role::ALL.into(), run, spec })
        .unwrap()
        .shadow
}

#[test]
fn what_cannot_have_a_shadow_says_why() {
    let all = policy(shadows(10_000));
    let with = |new: Option<Candidate>, spec: &RunSpec| decided(&all, &two(new), run(1), spec);
    assert_eq!(with(Some(good()), &idempotent()), Some(Shadowing::On(name("new"))));
    let ill = Candidate { healthy: false, ..good() };
    assert_eq!(with(Some(ill), &idempotent()), Some(Shadowing::On(name("new"))), "it may be well by then");
    let no = |why| Some(Shadowing::No(why));
    assert_eq!(with(Some(good()), &RunSpec::default()), no(NoShadow::NotIdempotent));
    let stdin = RunSpec { stdin: true, ..idempotent() };
    assert_eq!(with(Some(good()), &stdin), no(NoShadow::Interactive));
    let terminal = RunSpec { terminal: Some(TerminalSize::default()), ..idempotent() };
    assert_eq!(with(Some(good()), &terminal), no(NoShadow::Interactive));
    assert_eq!(with(None, &idempotent()), no(NoShadow::Unknown));
    assert_eq!(with(Some(Candidate { drained: true, ..good() }), &idempotent()), no(NoShadow::Drained));
    let lacks = vec![FieldViolation::new("spec.image", "UNSUPPORTED", "no")];
    assert_eq!(with(Some(Candidate { lacks, ..good() }), &idempotent()), no(NoShadow::Incapable));
    let mut there = idempotent();
    there.routing.backend = Some(name("new"));
    assert_eq!(with(Some(good()), &there), no(NoShadow::SameBackend));
}

#[test]
fn only_what_is_meant_is_sampled() {
    let backends = two(Some(good()));
    let image = Match { images: ["app:*".to_owned()].into(), ..Match::default() };
    let by_image = policy(Shadows { matches: image, ..shadows(10_000) });
    assert!(decided(&by_image, &backends, run(1), &idempotent()).is_some());
    let other = RunSpec { image: Some("other".to_owned()), ..idempotent() };
    assert_eq!(decided(&by_image, &backends, run(1), &other), None);

    let mut by_rule = policy(Shadows { rules: ["r".to_owned()].into(), ..shadows(10_000) });
    let matches = Match { labels: [("l".to_owned(), "x".to_owned())].into(), ..Match::default() };
    by_rule.rules = vec![Rule { name: "r".to_owned(), matches, to: Target::Backend(name("old")) }];
    assert_eq!(decided(&by_rule, &backends, run(1), &idempotent()), None);
    let labelled = RunSpec { labels: [("l".to_owned(), "x".to_owned())].into(), ..idempotent() };
    assert!(decided(&by_rule, &backends, run(1), &labelled).is_some());
    assert_eq!(decided(&Policy::default(), &backends, run(1), &idempotent()), None);
}

/// At each share, 20,000 runs: within five standard deviations of the binomial distribution. The runs are always the same.
#[test]
fn the_share_that_is_sampled_is_within_the_binomial_bound_and_independent_of_splits() {
    const RUNS: u32 = 20_000;
    for percent in [0u16, 1, 5, 25, 50, 100] {
        let shadows = shadows(percent * 100);
        let sampled: Vec<_> =
            (0..RUNS).map(|n| run(n.into())).filter(|run| shadows.samples("salt", *run)).collect();
        let within = |seen: usize, of: f64, p: f64| {
            let seen = f64::from(u32::try_from(seen).unwrap());
            (seen - of * p).abs() <= 5.0 * (of * p * (1.0 - p)).sqrt()
        };
        let p = f64::from(percent) / 100.0;
        assert!(within(sampled.len(), f64::from(RUNS), p), "{percent} %: {}", sampled.len());
        // Of those, half are on one side of a split in halves.
        let low = sampled.iter().filter(|run| bucket("salt", &format!("run/{run}")) < 5000).count();
        let of = f64::from(u32::try_from(sampled.len()).unwrap());
        assert!(within(low, of, 0.5), "{percent} %: {low} of {of}");
    }
}

proptest! {
    #[test]
    fn only_idempotent_runs_get_a_shadow_and_the_answer_never_changes(
        n in any::<u128>(), before in 0..=10_000u16, more in 0..=10_000u16, is in any::<bool>(),
    ) {
        let n = n.min(u128::MAX - 1);
        let spec = RunSpec { idempotent: is, ..RunSpec::default() };
        let ask = |hundredths| decided(&policy(shadows(hundredths)), &two(Some(good())), run(n), &spec);
        let first = ask(before);
        prop_assert_eq!(&first, &ask(before));
        let expected = if is { Shadowing::On(name("new")) } else { Shadowing::No(NoShadow::NotIdempotent) };
        prop_assert!(first.as_ref().is_none_or(|seen| *seen == expected), "{:?}", first);
        // Raising the share takes nobody's shadow away.
        if first.is_some() {
            prop_assert_eq!(first, ask(before.saturating_add(more).min(10_000)));
        }
    }
}
