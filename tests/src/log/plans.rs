//! Random plans: a source that frames, repeats and restarts as it likes, and readers at random places.

use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

use super::{Harness, attempt, check_pattern, collect, soon, stretch, tenant};

#[derive(Debug, Clone)]
enum Step {
    /// Sends from `back` bytes before the end, `more` bytes past it, in frames of `size`.
    Append {
        back: u64,
        more: u64,
        size: usize,
    },
    /// Drops some bytes.
    Drop(u64),
    Flush,
    /// The process dies; the source goes on from the durable offset.
    Restart,
    /// Reads from this fraction of the log.
    Read(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..3000, 0u64..3000, 1usize..900).prop_map(|(back, more, size)| Step::Append { back, more, size }),
        1 => (1u64..500).prop_map(Step::Drop),
        1 => Just(Step::Flush),
        1 => Just(Step::Restart),
        2 => any::<prop::sample::Index>().prop_map(Step::Read),
    ]
}

/// Runs random plans, each on a new harness.
///
/// # Panics
/// Where a byte is lost, repeated or another.
pub fn run(make: impl Fn() -> Box<dyn Harness>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let mut runner = TestRunner::new(Config { cases: 60, failure_persistence: None, ..Config::default() });
    let plans =
        (prop::collection::vec(step(), 1..14), prop::collection::vec(any::<prop::sample::Index>(), 4));
    let outcome = runner.run(&plans, |(steps, reads)| {
        runtime.block_on(async {
            let mut harness = make();
            one(&mut *harness, steps, reads).await
        })
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

async fn one(
    harness: &mut dyn Harness,
    steps: Vec<Step>,
    reads: Vec<prop::sample::Index>,
) -> Result<(), TestCaseError> {
    let (t, id) = (tenant("t"), attempt());
    let at =
        |index: &prop::sample::Index, end: u64| index.index(usize::try_from(end).unwrap_or(0) + 1) as u64;
    let mut end = soon(harness.logs().open(&t, id, true)).await.unwrap();
    // Stretches that the source dropped; it never sends their bytes again, and repeats them as they were.
    let mut floor = 0;
    let mut durable = 0;
    for step in steps {
        let logs = harness.logs();
        match step {
            Step::Append { back, more, size } => {
                let from = end.saturating_sub(back).max(floor);
                let answered = soon(logs.append(id, stretch(from, end + more, size))).await.unwrap();
                prop_assert!(answered >= durable, "durable went back from {durable} to {answered}");
                durable = answered;
                end += more;
            }
            Step::Drop(dropped) => {
                durable = soon(logs.append(id, vec![super::truncated(end, dropped)])).await.unwrap();
                end += dropped;
                // What is dropped is durable at once here, so that the source need not remember it.
                durable = durable.max(soon(logs.flush(id)).await.unwrap());
                floor = end;
            }
            Step::Flush => {
                durable = soon(logs.flush(id)).await.unwrap();
                prop_assert_eq!(durable, end);
            }
            Step::Restart => {
                drop(logs);
                harness.reopen().await;
                let found = soon(harness.logs().open(&t, id, false)).await.unwrap();
                prop_assert!(found >= durable && found <= end, "{durable} was durable, {found} was found");
                durable = found;
                end = found;
            }
            Step::Read(index) => {
                let from = at(&index, end);
                check_pattern(&collect(&logs, &t, id, from, false).await.unwrap(), from, end);
            }
        }
    }
    let logs = harness.logs();
    let summary = soon(logs.seal(&t, id)).await.unwrap();
    prop_assert_eq!(summary.end, end);
    drop(logs);
    for (number, index) in reads.iter().enumerate() {
        if number == 2 {
            harness.reopen().await;
        }
        let from = at(index, end);
        check_pattern(&collect(&harness.logs(), &t, id, from, true).await.unwrap(), from, end);
    }
    prop_assert_eq!(soon(harness.logs().seal(&t, id)).await.unwrap(), summary);
    Ok(())
}
