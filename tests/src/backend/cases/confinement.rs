//! What the program may see, use and reach.

use std::collections::BTreeSet;

use runner_core::{
    outcome::{Cause, ExitStatus},
    spec::User,
};

use super::output;
use crate::backend::{
    bench::{Bench, MARK},
    program::{Program, Then},
};

/// Exactly the spec's variables and those that the backend documents; nothing of the service's own environment.
pub async fn the_environment_is_the_specs_and_nothing_else(bench: &mut Bench) {
    let attempt = bench.attempt_with(&Program::Environment, |spec| {
        spec.env.insert("PLAIN".into(), "value with = and ü".into());
        spec.env.insert("EMPTY".into(), String::new());
    });
    let out = bench.run(&attempt).await.out();
    let seen: BTreeSet<(&str, &str)> = out.lines().filter_map(|line| line.split_once('=')).collect();
    let mark = attempt.attempt.to_string();
    let mut expected =
        BTreeSet::from([("PLAIN", "value with = and ü"), ("EMPTY", ""), (MARK, mark.as_str())]);
    for (name, value) in bench.harness().added_environment() {
        match value {
            Some(value) => expected.extend([(name, value)]),
            None => expected.extend(seen.iter().filter(|(seen, _)| *seen == name)),
        }
    }
    assert_eq!(seen, expected);
}

async fn who(bench: &Bench, user: Option<User>) -> (u32, u32) {
    let attempt = bench.attempt_with(&Program::WhoAmI, |spec| spec.user = user);
    let out = bench.run(&attempt).await.out();
    let (uid, gid) = out.trim_end().split_once(' ').expect("UID GID");
    (uid.parse().expect("a number"), gid.parse().expect("a number"))
}

/// Nobody becomes root by saying nothing.
pub async fn the_default_user_is_not_root(bench: &mut Bench) {
    let (uid, gid) = who(bench, None).await;
    assert!(uid != 0 && gid != 0, "{uid} {gid}");
}

/// The uid and gid of the spec.
pub async fn the_program_runs_as_its_user(bench: &mut Bench) {
    let user = User { uid: 12_345, gid: 23_456 };
    assert_eq!(who(bench, Some(user)).await, (12_345, 23_456));
}

/// `/` where the spec names none.
pub async fn the_working_directory_is_the_specs(bench: &mut Bench) {
    for (given, expected) in [(None, "/\n"), (Some("/tmp"), "/tmp\n"), (Some("/"), "/\n")] {
        let attempt = bench.attempt_with(&Program::WorkingDir, |spec| {
            spec.working_dir = given.map(str::to_owned);
        });
        assert_eq!(bench.run(&attempt).await.out(), expected);
    }
}

/// Nothing of the root can be written.
pub async fn a_read_only_root_cannot_be_written(bench: &mut Bench) {
    for path in ["/new-file", "/usr/new-file", "/var/new-file"] {
        let attempt = bench.attempt_with(&Program::TryWrite(path.into()), |spec| spec.read_only_root = true);
        assert_eq!(bench.run(&attempt).await.out(), "refused\n", "{path}");
    }
}

/// Its scratch space and its outputs can.
pub async fn a_read_only_root_leaves_tmp_and_outputs_writable(bench: &mut Bench) {
    let files = ["/tmp/scratch", "/outputs/x"].map(|path| (path.to_owned(), "bytes".to_owned())).to_vec();
    let attempt = bench.attempt_with(&Program::Write { files, then: Then::Exit(0) }, |spec| {
        spec.read_only_root = true;
        spec.outputs.push(output("/outputs/x", true));
    });
    let observed = bench.run(&attempt).await;
    assert_eq!(observed.end().status, Some(ExitStatus::Code(0)), "{:?} {}", observed.end(), observed.err());
    assert_eq!(observed.end().cause, Cause::Exited);
}

/// `network: none` means nothing but loopback.
pub async fn without_network_there_is_only_loopback(bench: &mut Bench) {
    let out = bench.run(&bench.attempt(&Program::Interfaces)).await.out();
    assert_eq!(out, "lo\n");
}

/// A fork bomb meets a wall; the program and the machine live on.
pub async fn processes_beyond_the_limit_are_refused(bench: &mut Bench) {
    for (count, expected) in [(5, "forked\n"), (100, "refused\n")] {
        let attempt = bench.attempt_with(&Program::Fork(count), |spec| spec.resources.pids = Some(20));
        let observed = bench.run(&attempt).await;
        assert_eq!(observed.out(), expected, "{count} processes: {:?} {}", observed.end(), observed.err());
    }
}

/// The kernel ends what writes too large a file, and nothing larger than the limit is published.
pub async fn a_file_beyond_the_limit_ends_the_program(bench: &mut Bench) {
    const LIMIT: u64 = 1024 * 1024;
    for (bytes, fits) in [(LIMIT, true), (LIMIT + 4096, false)] {
        let attempt = bench.attempt_with(&Program::WriteZeros { path: "/outputs/x".into(), bytes }, |spec| {
            spec.resources.file_size_bytes = Some(LIMIT);
            spec.outputs.push(output("/outputs/x", false));
        });
        let observed = bench.run(&attempt).await;
        let end = observed.end();
        assert_eq!(end.cause, Cause::Exited, "{end:?}");
        assert_eq!(end.status == Some(ExitStatus::Code(0)), fits, "{end:?}");
        let manifest = observed.published.as_ref().expect("outputs are published");
        assert!(manifest.entries.iter().all(|entry| entry.size <= LIMIT), "{manifest:?}");
    }
}
