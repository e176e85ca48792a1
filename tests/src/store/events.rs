//! Events of a run: numbered from 1 without gaps, whoever appends them.

use std::sync::Arc;

use runner_core::{
    artifact::Manifest,
    state::Position,
    store::{RunEvent, StoreError},
    task::{TaskKind, spawn},
};

use super::{
    StoreFactory,
    kit::{all_events, assert_consecutive, at, create, id, in_queue, intent, must_get, run, succeed},
};

fn notice(text: &str) -> RunEvent {
    RunEvent::Notice(text.to_owned())
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn an_appended_event_has_the_next_number<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let mut expected = create(&*store, run(1)).await;
    let outputs = RunEvent::Outputs(Manifest::default());
    assert_eq!(store.append_event(id(1), notice("one"), at(5)).await.unwrap(), Some(2));
    assert_eq!(store.append_event(id(1), outputs.clone(), at(6)).await.unwrap(), Some(3));
    let events = all_events(&*store, id(1)).await;
    assert_eq!((events[1].time, &events[1].event), (at(5), &notice("one")));
    assert_eq!((events[2].time, &events[2].event), (at(6), &outputs));
    expected.last_event = 3;
    assert_eq!(must_get(&*store, id(1)).await, expected);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn concurrent_events_have_consecutive_numbers<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let store = Arc::clone(&store);
            spawn(TaskKind::Helper, "append", async move {
                store.append_event(id(1), notice(&format!("{n}")), at(5)).await
            })
        })
        .collect();
    let mut numbers = Vec::new();
    for task in tasks {
        numbers.push(
            task.await.expect("joined").expect("no panic").expect("the store answers").expect("stored"),
        );
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (2..=65).collect::<Vec<u64>>());
    assert_consecutive(&*store, id(1)).await;
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn a_change_of_position_is_not_appended<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    let changed = RunEvent::StateChanged { position: Position::START, reason: String::new() };
    let terminated = RunEvent::Terminated { position: Position::START, outcome: in_queue() };
    for event in [changed, terminated] {
        let error = store.append_event(id(1), event, at(5)).await.unwrap_err();
        assert!(matches!(error, StoreError::Other(_)), "{error:?}");
    }
    assert_eq!(all_events(&*store, id(1)).await.len(), 1);
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn to_a_terminal_run_nothing_is_appended<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    succeed(&*store, id(1)).await;
    create(&*store, run(2)).await;
    store.request_cancel(id(2), intent("enough", 5), in_queue()).await.unwrap();
    for n in 1..=2 {
        assert_eq!(store.append_event(id(n), notice("late"), at(5)).await.unwrap(), None);
        let last = all_events(&*store, id(n)).await.pop().unwrap();
        assert!(matches!(last.event, RunEvent::Terminated { .. }), "{last:?}");
        assert_consecutive(&*store, id(n)).await;
    }
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn of_an_unknown_run_are_not_found<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    let read = store.events(id(1), 0, 10).await.unwrap_err();
    let append = store.append_event(id(1), notice("x"), at(5)).await.unwrap_err();
    for error in [read, append] {
        assert!(matches!(error, StoreError::NotFound(which) if which == id(1)), "{error:?}");
    }
}

#[allow(missing_docs, reason = "the name says it")]
pub async fn are_read_from_any_number_in_pages<F: StoreFactory>(factory: &F) {
    let store = factory.open().await;
    create(&*store, run(1)).await;
    create(&*store, run(2)).await;
    for n in 2..=10 {
        store.append_event(id(1), notice(&format!("{n}")), at(n)).await.unwrap();
        store.append_event(id(2), notice("another run's"), at(n)).await.unwrap();
    }
    let all = all_events(&*store, id(1)).await;
    assert_eq!(all.len(), 10);
    let mut paged = Vec::new();
    loop {
        let after = paged.len() as u64;
        let page = store.events(id(1), after, 3).await.unwrap();
        assert!(page.len() <= 3);
        if page.is_empty() {
            break;
        }
        paged.extend(page);
    }
    assert_eq!(paged, all);
    assert_eq!(store.events(id(1), 9, 10).await.unwrap(), all[9..]);
    assert_eq!(store.events(id(1), u64::MAX, 10).await.unwrap(), []);
    assert_eq!(store.events(id(1), 0, 0).await.unwrap(), []);
}
