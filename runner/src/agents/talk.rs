//! Asks and answers between the domain and the wire.

use std::time::Duration;

use bytes::Bytes;
use runner_core::{
    agent::{AgentAnswer, AgentAsk, AgentState, Asking},
    clock::Timestamp,
    log::{Frame, codec},
};
use runner_proto::agent::{self as wire, answer, ask};

/// Longest text of an agent that is kept.
const MAX_TEXT_BYTES: usize = 4096;
/// Most notes of one publishing that are kept.
const MAX_NOTES: usize = 256;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn short_millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// An ask for the wire.
pub(super) fn ask(Asking { id, ask }: Asking) -> wire::Ask {
    let body = match ask {
        AgentAsk::State { patience } => {
            ask::Body::State(wire::StateAsk { patience_ms: short_millis(patience) })
        }
        AgentAsk::Log { offset, patience } => {
            ask::Body::Log(wire::LogAsk { offset, patience_ms: short_millis(patience) })
        }
        AgentAsk::Control { request, patience } => {
            ask::Body::Control(wire::ControlAsk { request, patience_ms: short_millis(patience) })
        }
        AgentAsk::Stop { grace } => ask::Body::Stop(wire::StopAsk { grace_ms: millis(grace) }),
        AgentAsk::Publish { partial } => ask::Body::Publish(wire::PublishAsk { partial }),
        AgentAsk::Finish => ask::Body::Finish(wire::FinishAsk {}),
    };
    wire::Ask { id, body: Some(body) }
}

/// An answer from the wire, and which ask it is for.
///
/// # Errors
/// What is wrong with it. Nothing that this agent says can be trusted then.
pub(super) fn answer(wire::Answer { id, body }: wire::Answer) -> Result<(u64, AgentAnswer), &'static str> {
    let answer = match body.ok_or("an answer without a body")? {
        answer::Body::State(seen) => AgentAnswer::State(state(seen)),
        answer::Body::Log(wire::Log { state: seen, frames }) => {
            AgentAnswer::Log { state: state(seen.ok_or("a log without a state")?), frames: decode(frames)? }
        }
        answer::Body::Control(wire::Control { reply }) => {
            AgentAnswer::Control(Some(reply).filter(|reply| !reply.is_empty()))
        }
        answer::Body::Stopped(wire::Stopped { dead }) => AgentAnswer::Stopped { dead },
        answer::Body::Published(wire::Published { failure, retryable, notes, stored }) => {
            AgentAnswer::Published {
                stored,
                failure: Some((cut(failure), retryable)).filter(|(failure, _)| !failure.is_empty()),
                notes: notes.into_iter().take(MAX_NOTES).map(cut).collect(),
            }
        }
        answer::Body::Finished(wire::Finished {}) => AgentAnswer::Finished,
        answer::Body::Failed(wire::Failed { message, retryable }) => {
            AgentAnswer::Failed { message: cut(message), retryable }
        }
    };
    Ok((id, answer))
}

fn state(state: wire::State) -> AgentState {
    AgentState {
        started: state.started_micros.map(Timestamp::from_micros),
        exit_record: Some(state.exit_record).filter(|record| !record.is_empty()),
        shim_errors: cut(state.shim_errors),
        input_bytes: state.input_bytes,
        stopped: state.stopped_micros.map(Timestamp::from_micros),
    }
}

fn decode(mut frames: Bytes) -> Result<Vec<Frame>, &'static str> {
    let mut decoded: Vec<Frame> = Vec::new();
    while !frames.is_empty() {
        let frame = codec::decode(&mut frames).map_err(|_| "a frame that does not decode")?;
        let frame = frame.ok_or("half a frame")?;
        if decoded.last().is_some_and(|last| last.end() != frame.offset) {
            return Err("frames with a gap");
        }
        decoded.push(frame);
    }
    Ok(decoded)
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    text
}

#[cfg(test)]
mod tests {
    use runner_core::log::{FrameBody, LogStream};

    use super::*;

    fn frame(offset: u64, bytes: &'static [u8]) -> Frame {
        let body = FrameBody::Data { stream: LogStream::Stdout, bytes: Bytes::from_static(bytes) };
        Frame { offset, time: Timestamp::from_micros(1), body }
    }

    fn log(frames: &[Frame]) -> wire::Answer {
        let mut stored = Vec::new();
        for frame in frames {
            codec::encode(frame, &mut stored);
        }
        let log = wire::Log { state: Some(wire::State::default()), frames: stored.into() };
        wire::Answer { id: 7, body: Some(answer::Body::Log(log)) }
    }

    #[test]
    fn frames_read_back_as_they_were_sent() {
        let frames = vec![frame(3, b"abc"), frame(6, b"d")];
        let expected = AgentAnswer::Log { state: AgentState::default(), frames: frames.clone() };
        assert_eq!(answer(log(&frames)), Ok((7, expected)));
    }

    #[test]
    fn what_is_malformed_is_refused() {
        assert!(answer(wire::Answer { id: 1, body: None }).is_err());
        assert!(answer(log(&[frame(0, b"abc"), frame(4, b"gap")])).is_err());
        let torn = |cut: usize| {
            let mut whole = log(&[frame(0, b"abc")]);
            if let Some(answer::Body::Log(log)) = &mut whole.body {
                log.frames.truncate(cut);
            }
            answer(whole)
        };
        assert!(torn(5).is_err() && torn(27).is_err());
        assert!(torn(0).is_ok(), "no frames are no fault");
    }
}
