use uuid::Uuid;

use super::*;
use crate::id::RunId;

const DEADLINE: Duration = Duration::from_secs(10);

fn attempt() -> AttemptId {
    AttemptId { run: RunId::new(Uuid::from_u128(9)), number: 1 }
}

fn hub() -> Arc<AgentHub> {
    AgentHub::new(AgentKey::new([3; 32]))
}

const STATE: AgentAsk = AgentAsk::State { patience: Duration::ZERO };

#[tokio::test]
async fn an_ask_reaches_the_agent_and_its_answer_comes_back() {
    let hub = hub();
    let mut session = hub.connect(attempt());
    let agent = async {
        let (one, two) = (session.next().await.unwrap(), session.next().await.unwrap());
        let answers = session.answers();
        // In another order than asked.
        answers.take(two.id, AgentAnswer::Finished);
        answers.take(one.id, AgentAnswer::Stopped { dead: true });
        answers.take(99_999_999, AgentAnswer::Finished);
    };
    let asked = async { tokio::join!(hub.ask(attempt(), STATE), hub.ask(attempt(), AgentAsk::Finish)) };
    let ((first, second), ()) = tokio::join!(asked, agent);
    assert_eq!((first, second), (Ok(AgentAnswer::Stopped { dead: true }), Ok(AgentAnswer::Finished)));
}

#[tokio::test]
async fn nobody_is_away_and_so_is_who_goes_before_the_answer() {
    let hub = hub();
    assert_eq!(hub.ask(attempt(), STATE).await, Err(AskError::Away));
    let mut session = hub.connect(attempt());
    let presence = hub.presence(attempt());
    assert!(presence.borrow().connected);
    let leaves = async {
        session.next().await.unwrap();
        drop(session);
    };
    let publish = hub.ask(attempt(), AgentAsk::Publish { partial: false });
    let (answer, ()) = tokio::time::timeout(DEADLINE, async { tokio::join!(publish, leaves) }).await.unwrap();
    assert_eq!(answer, Err(AskError::Away));
    assert!(!presence.borrow().connected);
}

#[tokio::test]
async fn a_second_connection_replaces_the_first() {
    let hub = hub();
    let mut first = hub.connect(attempt());
    let mut second = hub.connect(attempt());
    assert!(first.next().await.is_none(), "nothing will be asked of it");
    drop(first);
    assert!(hub.presence(attempt()).borrow().connected, "the end of the first is not the end of the second");
    let answers = second.answers();
    let agent = async {
        let asking = second.next().await.unwrap();
        answers.take(asking.id, AgentAnswer::Finished);
    };
    let (answer, ()) = tokio::join!(hub.ask(attempt(), AgentAsk::Finish), agent);
    assert_eq!(answer, Ok(AgentAnswer::Finished));
}

#[tokio::test(start_paused = true)]
async fn a_silent_agent_is_given_up_and_costs_nothing() {
    let hub = hub();
    let session = hub.connect(attempt());
    assert_eq!(hub.ask(attempt(), STATE).await, Err(AskError::Silent));
    assert!(session.answers.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_is_forgotten_leaves_nothing() {
    let hub = hub();
    let mut session = hub.connect(attempt());
    hub.report(attempt(), StagingReport { message: "no".into(), retryable: true, local: false });
    assert_eq!(hub.presence(attempt()).borrow().reports, 1);
    hub.forget(attempt());
    assert!(session.next().await.is_none());
    drop(session);
    drop(hub.connect(attempt()));
    drop(hub.presence(attempt()));
    hub.tidy(attempt());
    assert!(hub.lock().is_empty());
}

#[tokio::test]
async fn an_attempt_is_executed_in_one_place() {
    let hub = hub();
    assert!(!hub.claim(attempt(), "a"), "nobody knows the attempt");
    let _presence = hub.presence(attempt());
    assert!(hub.claim(attempt(), "a") && hub.claim(attempt(), "a"));
    assert!(!hub.claim(attempt(), "b"));
}
