//! A stream is whole, whatever happens to the connection.

mod support;

use support::{Cut, Fake, client, proxy, run_events};
use tonic::Code;
use worker_client::{Client, ClientError, ErrorKind, Event, EventStream, StreamEvent, StreamOptions, proto};

async fn collect(mut events: EventStream) -> (Vec<StreamEvent>, Option<ClientError>) {
    let mut all = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => all.push(event),
            Err(error) => {
                assert!(events.next().await.is_none(), "nothing follows an error");
                return (all, Some(error));
            }
        }
    }
    (all, None)
}

/// Every event once, every byte once, the terminal event last.
fn assert_whole(all: &[StreamEvent], frames: usize) {
    let cursors: Vec<_> = all.iter().map(|event| event.cursor.clone()).collect();
    let expected: Vec<_> = run_events(frames).into_iter().map(|event| event.cursor).collect();
    assert_eq!(cursors, expected);
    let mut offset = 0;
    for event in all {
        if let Event::Log(frame) = &event.event {
            assert_eq!(frame.offset, offset);
            offset += frame.data.len() as u64;
        }
    }
    assert!(matches!(all.last().map(|event| &event.event), Some(Event::Terminated(_))));
}

async fn follow(client: &Client) -> (Vec<StreamEvent>, Option<ClientError>) {
    collect(client.stream("x", StreamOptions::default())).await
}

#[tokio::test]
async fn a_stream_goes_on_after_every_kind_of_cut_at_every_place() {
    for place in 0..7 {
        for code in [Code::Unavailable, Code::Internal, Code::Unknown, Code::Cancelled, Code::Aborted] {
            // `Aborted` stands for a refusal: it is the one that ends the stream.
            let fake = Fake::start().await;
            fake.state().events = run_events(5);
            fake.state().cuts.extend([Cut::Fail(place, code), Cut::End(1), Cut::Fail(0, code)]);
            let (all, error) = follow(&fake.client().await).await;
            if code == Code::Aborted {
                assert_eq!(error.expect("refused").kind(), ErrorKind::FailedPrecondition);
                assert_eq!(all.len(), place);
            } else {
                assert!(error.is_none(), "{error:?}");
                assert_whole(&all, 5);
            }
        }
    }
}

#[tokio::test]
async fn a_connection_cut_in_the_middle_of_a_frame_is_not_seen() {
    let fake = Fake::start().await;
    fake.state().events = run_events(4_000);
    // Beyond the 16 KiB of one HTTP/2 frame, so that each connection but the shortest brings something.
    let cuts = vec![20_000, 45_000, 117, 70_003, 33_001];
    let address = proxy::start(fake.address, cuts).await;
    let (all, error) = follow(&client(address).await).await;
    assert!(error.is_none(), "{error:?}");
    assert_whole(&all, 4_000);
    assert!(fake.state().cursors.len() >= 4, "it was cut: {:?}", fake.state().cursors);
}

#[tokio::test]
async fn a_repeat_after_a_resume_is_not_handed_on() {
    let fake = Fake::start().await;
    fake.state().events = run_events(6);
    fake.state().cuts.extend([Cut::End(4), Cut::Repeat(2)]);
    let (all, error) = follow(&fake.client().await).await;
    assert!(error.is_none(), "{error:?}");
    assert_whole(&all, 6);
}

#[tokio::test]
async fn frames_that_are_cut_otherwise_after_a_resume_are_trimmed_to_the_byte() {
    let fake = Fake::start().await;
    let mut events = run_events(2);
    // After the first frame the service sends one that begins in its middle.
    if let Some(proto::stream_response::Event::Log(frame)) = &mut events[2].event {
        frame.offset = 5;
        frame.data = " 0 \0\nrest".into();
    }
    fake.state().events = events;
    let (all, error) = follow(&fake.client().await).await;
    assert!(error.is_none(), "{error:?}");
    let log: Vec<u8> = all
        .iter()
        .filter_map(|event| match &event.event {
            Event::Log(frame) => Some(frame.data.to_vec()),
            _ => None,
        })
        .flatten()
        .collect();
    assert_eq!(log, b"frame 0 \0\nrest");
}

#[tokio::test]
async fn a_gap_is_healed_by_a_resume_or_else_reported_and_never_handed_on() {
    let fake = Fake::start().await;
    fake.state().events = run_events(6);
    fake.state().cuts.extend([Cut::End(3), Cut::Skip(2)]);
    let (all, error) = follow(&fake.client().await).await;
    assert!(error.is_none(), "{error:?}");
    assert_whole(&all, 6);

    let mut events = run_events(6);
    events.remove(3);
    fake.state().events = events;
    let (all, error) = follow(&fake.client().await).await;
    assert_eq!(error.expect("a gap").kind(), ErrorKind::Protocol);
    assert_eq!(all.len(), 3);
}

#[tokio::test]
async fn a_log_that_does_not_begin_at_its_beginning_is_a_gap() {
    let fake = Fake::start().await;
    let mut events = run_events(3);
    events.remove(1);
    fake.state().events = events;
    let (_, error) = follow(&fake.client().await).await;
    assert_eq!(error.expect("a gap").kind(), ErrorKind::Protocol);
}

#[tokio::test]
async fn dropped_bytes_keep_their_offsets() {
    let fake = Fake::start().await;
    let mut events = run_events(3);
    let Some(proto::stream_response::Event::Log(frame)) = events[2].event.clone() else { panic!("a frame") };
    events[2].event = Some(proto::stream_response::Event::LogTruncated(proto::LogTruncated {
        attempt: 1,
        offset: frame.offset,
        dropped_bytes: frame.data.len() as u64,
        reason: "limit".to_owned(),
    }));
    fake.state().events = events;
    let (all, error) = follow(&fake.client().await).await;
    assert!(error.is_none(), "{error:?}");
    assert!(matches!(all[2].event, Event::LogTruncated(_)));
    assert_eq!(all.len(), 5);
}

#[tokio::test]
async fn a_second_attempt_begins_its_own_log() {
    let fake = Fake::start().await;
    let mut events = run_events(4);
    let mut offset = 0;
    for event in &mut events[3..5] {
        if let Some(proto::stream_response::Event::Log(frame)) = &mut event.event {
            frame.attempt = 2;
            frame.offset = offset;
            offset += frame.data.len() as u64;
        }
    }
    fake.state().events = events;
    let (all, error) = follow(&fake.client().await).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(all.len(), 6);
}

#[tokio::test]
async fn resumes_without_progress_are_bounded() {
    let fake = Fake::start().await;
    fake.state().events = run_events(6);
    fake.state().cuts.extend([Cut::End(3)]);
    fake.state().cuts.extend(vec![Cut::Fail(0, Code::Unavailable); 100]);
    let (all, error) = follow(&fake.client().await).await;
    assert_eq!(error.expect("given up").kind(), ErrorKind::Unavailable);
    assert_eq!(all.len(), 3);
    assert_eq!(fake.state().cursors.len(), 5, "the first, and four more that got nothing");
}

#[tokio::test]
async fn progress_starts_the_count_again() {
    let fake = Fake::start().await;
    fake.state().events = run_events(40);
    fake.state().cuts.extend(vec![Cut::End(1); 41]);
    let (all, error) = follow(&fake.client().await).await;
    assert!(error.is_none(), "{error:?}");
    assert_whole(&all, 40);
}

#[tokio::test]
async fn an_unknown_run_is_an_error_at_once() {
    let fake = Fake::start().await;
    fake.state().cuts.push_back(Cut::Fail(0, Code::NotFound));
    let (_, error) = follow(&fake.client().await).await;
    assert_eq!(error.expect("unknown").kind(), ErrorKind::NotFound);
    assert_eq!(fake.state().calls, ["stream"]);
}

#[tokio::test]
async fn a_stream_goes_on_behind_the_callers_cursor() {
    let fake = Fake::start().await;
    fake.state().events = run_events(6);
    fake.state().cuts.push_back(Cut::End(2));
    let client = fake.client().await;
    let (all, error) = collect(client.stream("x", StreamOptions::default().from_cursor("c3"))).await;
    assert!(error.is_none(), "{error:?}");
    let cursors: Vec<_> = all.iter().map(|event| event.cursor.as_str()).collect();
    assert_eq!(cursors, ["c4", "c5", "c6", "c7"]);
}

#[tokio::test]
async fn nothing_comes_behind_the_terminal_event() {
    let fake = Fake::start().await;
    fake.state().events = run_events(1);
    fake.state().state = proto::RunState::Succeeded;
    let client = fake.client().await;
    let (all, error) = collect(client.stream("x", StreamOptions::default().from_cursor("c2"))).await;
    assert!(error.is_none(), "{error:?}");
    assert!(all.is_empty());
}

#[tokio::test]
async fn a_stream_that_does_not_follow_ends_where_the_service_ends_it() {
    let fake = Fake::start().await;
    fake.state().events = run_events(6);
    fake.state().cuts.push_back(Cut::End(4));
    let client = fake.client().await;
    let (all, error) = collect(client.stream("x", StreamOptions::default().without_following())).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(all.len(), 4);
}
