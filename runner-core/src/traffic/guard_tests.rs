use super::*;

/// Numbers that look random and are the same in every run: the tests below have one outcome.
struct Numbers(u64);

impl Numbers {
    /// Xorshift (Marsaglia 2003), from 0 to below 1.
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        #[allow(clippy::cast_precision_loss, reason = "53 bits fit")]
        let number = (self.0 >> 11) as f64;
        number / 9_007_199_254_740_992.0
    }
}

const ERROR: Share = Share::ONE_PERCENT;

/// After how many of its runs the canary is called worse; `None`: not within `most`.
fn reaction(rates: (f64, f64), share: f64, most: u32, numbers: &mut Numbers) -> Option<u32> {
    let mut evidence = Evidence::default();
    let mut runs = 0;
    while runs < most {
        if numbers.next() >= share {
            evidence.add_baseline(numbers.next() < rates.0);
            continue;
        }
        runs += 1;
        evidence.add_canary(numbers.next() < rates.1);
        if evidence.is_worse(ERROR) {
            return Some(runs);
        }
    }
    None
}

/// 1,000 canaries that are not worse, each looked at after each of 2,000 runs. At the stated rate of 1 %, that is 10; that there are more than 25
/// by chance is less likely than one in 30,000.
#[test]
fn a_canary_that_is_no_worse_is_called_so_no_more_often_than_stated() {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    for (rates, share) in [
        ((0.01, 0.01), 0.5),
        ((0.1, 0.1), 0.5),
        ((0.3, 0.3), 0.1),
        ((0.05, 0.05), 0.9),
        ((0.5, 0.5), 0.5),
        ((0.1, 0.05), 0.5),
        ((0.0, 0.0), 0.5),
        ((1.0, 1.0), 0.5),
    ] {
        let wrong = (0..1000).filter(|_| reaction(rates, share, 2000, &mut numbers).is_some()).count();
        assert!(wrong <= 25, "{rates:?}, {share}: {wrong} of 1000");
    }
}

/// What the documentation of [`Evidence`] states.
#[test]
fn a_canary_that_is_worse_is_called_so_soon() {
    let mut numbers = Numbers(0x2545_F491_4F6C_DD1D);
    for (rates, share, soon) in [
        ((0.0, 1.0), 0.5, 13),
        ((0.01, 0.3), 0.5, 100),
        ((0.01, 0.3), 0.05, 40),
        ((0.2, 0.4), 0.5, 500),
        ((0.1, 0.2), 0.5, 1200),
        ((0.05, 0.1), 0.5, 2500),
    ] {
        let caught = (0..400).filter(|_| reaction(rates, share, soon, &mut numbers).is_some()).count();
        assert!(caught >= 372, "{rates:?}, {share}: {caught} of 400 within {soon} runs");
    }
}

#[test]
fn without_a_baseline_nothing_is_called_worse() {
    let mut evidence = Evidence::default();
    for _ in 0..10_000 {
        evidence.add_canary(true);
    }
    assert!(!evidence.is_worse(ERROR));
    assert_eq!(
        (evidence.canary(), evidence.baseline()),
        (Tally { runs: 10_000, failures: 10_000 }, Tally::default())
    );
}

#[test]
fn users_exit_codes_do_not_count() {
    let counted: Vec<&str> =
        Cause::ALL.into_iter().filter(|cause| is_infrastructure(*cause)).map(Cause::as_str).collect();
    assert_eq!(counted, ["IMAGE", "INPUT", "OUTPUT", "UNSCHEDULABLE", "EVICTED", "BACKEND", "LOST"]);
}

#[test]
fn what_is_not_said_has_its_default() {
    assert_eq!(serde_json::from_str::<Guard>("{}").unwrap(), Guard::default());
    assert!(serde_json::from_str::<Guard>(r#"{"windw_seconds":1}"#).is_err());
}
