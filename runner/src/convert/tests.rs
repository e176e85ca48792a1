use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::{option, prelude::*, sample::select};
use runner_core::{
    artifact::ArtifactUri,
    id::{BackendName, RunId},
    limits::Limits,
    log::{Frame, FrameBody, LogStream},
    service::{RunRequest, StreamBody, StreamCursor, StreamItem},
    spec::{
        Archive, Input, InputSource, Network, Output, Resources, RetryPolicy, Routing, RunSpec, SecretRef,
        SecretTarget, TerminalSize, User,
    },
    store::PageCursor,
};
use uuid::Uuid;

use super::{
    request::{Listing, RunCall, Watch, page_token},
    stream::{LOG_CHUNK, Messages},
    *,
};

fn text() -> impl Strategy<Value = String> + Clone {
    "[a-zA-Z0-9ü=/ .:-]{1,12}"
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[^\0]{0,10}", 0..4)
}

fn text_map() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(text(), text(), 0..4)
}

fn any_duration() -> impl Strategy<Value = Duration> {
    (0..10_000_000u64, 0..1_000_000_000u32).prop_map(|(secs, nanos)| Duration::new(secs, nanos))
}

fn any_uri() -> impl Strategy<Value = ArtifactUri> {
    ("uploads/[a-z]{1,5}(/[a-z]{1,5}){1,3}", any::<bool>()).prop_map(|(key, tree)| {
        let key = key.parse().unwrap();
        if tree { ArtifactUri::tree(key) } else { ArtifactUri::object(key) }
    })
}

fn any_input() -> impl Strategy<Value = Input> {
    let by_uri = select(vec![
        "run:018f0000-0000-7000-8000-000000000001",
        "run:018f0000-0000-7000-8000-000000000001/outputs/a b",
        "https://a.example/x?y",
        "https://a.example:8443/",
    ]);
    let source = prop_oneof![
        any_uri().prop_map(InputSource::Artifact),
        by_uri.prop_map(|uri| InputSource::from_uri(uri).unwrap()),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(|bytes| InputSource::Inline(Bytes::from(bytes))),
    ];
    let archive = select(vec![Archive::Tar, Archive::TarGz, Archive::TarZst, Archive::Zip]);
    (text(), source, option::of(text()), option::of(1..0o7777u32), option::of(archive))
        .prop_map(|(path, source, sha256, mode, extract)| Input { path, source, sha256, mode, extract })
}

fn any_output() -> impl Strategy<Value = Output> {
    (text(), any::<bool>(), option::of(any_uri()), any::<bool>(), option::of(1u64..)).prop_map(
        |(path, glob, destination, required, max_bytes)| Output {
            path,
            glob,
            destination,
            required,
            max_bytes,
        },
    )
}

fn any_resources() -> impl Strategy<Value = Resources> {
    (
        option::of(text()),
        option::of(1u32..),
        option::of(1u64..),
        option::of(1u64..),
        option::of(1u32..),
        option::of(1u32..),
        option::of(1u64..),
    )
        .prop_map(
            |(profile, cpu_millis, memory_bytes, ephemeral_storage_bytes, pids, gpus, file_size_bytes)| {
                Resources {
                    profile,
                    cpu_millis,
                    memory_bytes,
                    ephemeral_storage_bytes,
                    pids,
                    gpus,
                    file_size_bytes,
                }
            },
        )
}

fn any_secret() -> impl Strategy<Value = SecretRef> {
    let target = prop_oneof![text().prop_map(SecretTarget::Env), text().prop_map(SecretTarget::Path)];
    (text(), target).prop_map(|(reference, target)| SecretRef { reference, target })
}

fn any_retry() -> impl Strategy<Value = RetryPolicy> {
    let causes = prop::collection::vec(select(Cause::ALL.to_vec()), 0..4);
    (option::of(1u32..), option::of(any_duration()), option::of(any_duration()), causes).prop_map(
        |(max_attempts, initial_backoff, max_backoff, causes)| RetryPolicy {
            max_attempts,
            initial_backoff,
            max_backoff,
            causes,
        },
    )
}

fn any_spec() -> impl Strategy<Value = RunSpec> {
    let network =
        prop_oneof![Just(Network::None), Just(Network::Egress), "[a-z]{0,5}".prop_map(Network::Named)];
    let routing = (option::of("[a-z]{1,9}"), option::of(text())).prop_map(|(backend, sticky_key)| Routing {
        backend: backend.map(|name| name.parse::<BackendName>().unwrap()),
        sticky_key,
    });
    let program = (option::of(text()), texts(), texts(), text_map(), option::of(text()));
    let staging = (
        prop::collection::vec(any_secret(), 0..3),
        prop::collection::vec(any_input(), 0..3),
        prop::collection::vec(any_output(), 0..3),
    );
    let confinement = (any_resources(), network, option::of((0..u32::MAX, 0..u32::MAX)), any::<bool>());
    let life = (option::of(any_duration()), option::of(any_duration()), any_retry(), any::<bool>());
    let rest = (option::of((1u16.., 1u16..)), any::<bool>(), text_map(), routing);
    (program, staging, confinement, life, rest).prop_map(|(program, staging, confinement, life, rest)| {
        let (image, command, args, env, working_dir) = program;
        let (secrets, inputs, outputs) = staging;
        let (resources, network, user, read_only_root) = confinement;
        let (timeout, stop_grace, retry, idempotent) = life;
        let (terminal, stdin, labels, routing) = rest;
        RunSpec {
            image,
            command,
            args,
            env,
            secrets,
            working_dir,
            inputs,
            outputs,
            resources,
            network,
            user: user.map(|(uid, gid)| User { uid, gid }),
            read_only_root,
            timeout,
            stop_grace,
            retry,
            terminal: terminal.map(|(columns, rows)| TerminalSize { columns, rows }),
            stdin,
            labels,
            routing,
            idempotent,
        }
    })
}

proptest! {
    #[test]
    fn a_spec_goes_over_the_wire_unchanged(spec in any_spec()) {
        use prost::Message as _;
        let bytes = Wire::<v1::RunSpec>::from(&spec).0.encode_to_vec();
        let message = v1::RunSpec::decode(bytes.as_slice()).unwrap();
        prop_assert_eq!(RunSpec::try_from(Wire(message)), Ok(spec));
    }

    #[test]
    fn moments_and_lengths_go_over_the_wire_unchanged(micros in any::<i64>(), length in any_duration()) {
        let mut violations = Violations::default();
        let time = Timestamp::from_micros(micros);
        // The outermost second of the range cannot be told apart by seconds times a million.
        if micros.checked_sub(1_000_000).is_some() {
            prop_assert_eq!(violations.timestamp("t", Some(timestamp(time))), Some(time));
        }
        prop_assert_eq!(violations.duration("d", Some(duration(length))), Some(length));
        prop_assert!(violations.is_empty());
    }

    #[test]
    fn any_request_is_converted_or_refused_without_a_panic(
        seconds in any::<i64>(), nanos in any::<i32>(), number in any::<i32>(), words in ".{0,40}", token in "[0-9a-f.-]{0,60}",
    ) {
        let spec = v1::RunSpec {
            timeout: Some(prost_types::Duration { seconds, nanos }),
            retry: Some(v1::RetryPolicy { causes: vec![number], ..Default::default() }),
            inputs: vec![v1::Input { extract: number, source: Some(v1::input::Source::Uri(words.clone())), ..Default::default() }],
            user: words.clone(),
            ..Default::default()
        };
        let _ = RunSpec::try_from(Wire(spec));
        let _ = Listing::try_from(Wire(v1::ListRequest {
            states: vec![number],
            created_after: Some(prost_types::Timestamp { seconds, nanos }),
            page_token: token.clone(),
            ..Default::default()
        }));
        let _ = Watch::try_from(Wire(v1::StreamRequest { run_id: words, cursor: token, ..Default::default() }));
    }

    #[test]
    fn a_long_frame_is_sent_in_pieces_that_join_to_it(length in 1..4 * LOG_CHUNK, offset in 0..1u64 << 40) {
        let bytes: Bytes = (0..length).map(|i| i.to_le_bytes()[0]).collect::<Vec<u8>>().into();
        let frame = Frame {
            offset,
            time: Timestamp::from_micros(1),
            body: FrameBody::Data { stream: LogStream::Stderr, bytes: bytes.clone() },
        };
        let cursor = StreamCursor { event: 3, attempt: 1, log_offset: frame.end() };
        let item = StreamItem { cursor, time: frame.time, body: StreamBody::Log { attempt: 1, frame } };
        let mut at = offset;
        let mut joined = Vec::new();
        let mut last = String::new();
        for message in Messages::from(item) {
            let Some(v1::stream_response::Event::Log(log)) = message.event else { panic!("not a log frame") };
            prop_assert_eq!(log.offset, at);
            prop_assert!(log.data.len() <= LOG_CHUNK && !log.data.is_empty());
            at += log.data.len() as u64;
            let resumed: StreamCursor = message.cursor.parse().unwrap();
            prop_assert_eq!(resumed, StreamCursor { log_offset: at, ..cursor });
            joined.extend_from_slice(&log.data);
            last = message.cursor;
        }
        prop_assert_eq!(joined, bytes);
        prop_assert_eq!(last, cursor.to_string());
    }
}

#[test]
fn every_state_and_cause_has_its_own_number_on_the_wire() {
    let mut violations = Violations::default();
    for known in RunState::ALL {
        assert_eq!(violations.state("s", state(known).into()), Some(known));
        assert_eq!(state(known).as_str_name(), format!("RUN_STATE_{}", known.as_str()));
    }
    for known in Cause::ALL {
        assert_eq!(violations.cause("c", cause(known).into()), Some(known));
        assert_eq!(cause(known).as_str_name(), format!("CAUSE_{}", known.as_str()));
    }
    assert!(violations.is_empty());
}

#[test]
fn all_bad_fields_are_told_at_once_with_those_that_the_domain_finds() {
    let request = v1::RunRequest {
        run_id: "7".to_owned(),
        idempotency_key: "a\nb".to_owned(),
        spec: Some(v1::RunSpec {
            working_dir: "relative".to_owned(),
            inputs: vec![
                v1::Input { path: "/a/../b".to_owned(), ..Default::default() },
                v1::Input {
                    path: "/c".to_owned(),
                    source: Some(v1::input::Source::Uri("http://x".to_owned())),
                    ..Default::default()
                },
            ],
            network: Some(v1::Network { policy: Some(v1::network::Policy::Egress(false)) }),
            user: "root".to_owned(),
            timeout: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
            terminal: Some(v1::Terminal { columns: 70_000, rows: 0 }),
            retry: Some(v1::RetryPolicy { causes: vec![1, 77], ..Default::default() }),
            secrets: vec![v1::SecretRef { r#ref: "x:y".to_owned(), target: None }],
            ..Default::default()
        }),
    };
    let (tenant, limits) = ("default".parse().unwrap(), Limits::default());
    let InvalidSpec(found) =
        RunRequest::try_from(RunCall { message: request, tenant: &tenant, limits: &limits }).unwrap_err();
    let mut fields: Vec<&str> = found.iter().map(|violation| violation.field.as_str()).collect();
    fields.sort_unstable();
    assert_eq!(
        fields,
        [
            "idempotency_key",
            "run_id",
            "spec.inputs[0].path",
            "spec.inputs[0].source",
            "spec.inputs[1].uri",
            "spec.network.egress",
            "spec.retry.causes[1]",
            "spec.secrets[0].target",
            "spec.terminal.columns",
            "spec.timeout",
            "spec.user",
            "spec.working_dir",
        ]
    );
}

#[test]
fn a_missing_spec_is_a_violation() {
    let (tenant, limits) = ("default".parse().unwrap(), Limits::default());
    let InvalidSpec(found) = RunRequest::try_from(RunCall {
        message: v1::RunRequest::default(),
        tenant: &tenant,
        limits: &limits,
    })
    .unwrap_err();
    assert_eq!((found.len(), found[0].field.as_str(), found[0].reason.as_str()), (1, "spec", "REQUIRED"));
}

#[test]
fn page_tokens_read_back_and_others_are_refused() {
    let cursor = PageCursor { created: Timestamp::from_micros(-5), id: RunId::new(Uuid::from_u128(9)) };
    let page = |token: &str, size| {
        Listing::try_from(Wire(v1::ListRequest {
            page_token: token.to_owned(),
            page_size: size,
            ..Default::default()
        }))
    };
    let token = page_token(cursor);
    assert_eq!(page(&token, 0).unwrap().after, Some(cursor));
    assert_eq!(page("", 0).unwrap().max, 100);
    for bad in ["x", "5", "05.00000000-0000-0000-0000-000000000009", &format!("{token} ")] {
        assert!(page(bad, 0).is_err(), "{bad}");
    }
    assert!(page("", 1001).is_err());
}
