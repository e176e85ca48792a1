//! The log: exact, whatever is written.

use std::{fs, io::Write as _, time::Duration};

use runner_agent::exec::protocol::ExitReason;
use runner_core::{
    log::{FrameBody, LogStream},
    outcome::ExitStatus,
};

use crate::harness::{mount, probed, run, shell, skip, spec};

/// Bytes without a pattern, the same each time.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[test]
fn sixty_four_mebibytes_of_noise_arrive_exactly_on_both_streams_at_once() {
    if !probed().namespaces.mount {
        return skip("no mount namespace");
    }
    let inputs = tempfile::tempdir().unwrap();
    fs::set_permissions(inputs.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let noise = noise(64 << 20);
    fs::File::create(inputs.path().join("noise")).unwrap().write_all(&noise).unwrap();
    let mut spec = shell("cat /inputs/noise & cat /inputs/noise >&2 & wait");
    spec.mounts.push(mount(inputs.path(), "/inputs", true));
    let done = run(spec);
    assert_eq!((done.exit.reason, done.exit.status), (ExitReason::Exited, Some(ExitStatus::Code(0))));
    assert!(done.bytes(LogStream::Stdout) == noise);
    assert!(done.bytes(LogStream::Stderr) == noise);
}

#[test]
fn nul_bytes_and_invalid_utf_8_arrive_as_they_were() {
    let done = run(shell(r"printf '\000\377\200a\000'; printf '\355\240\200\n' >&2"));
    assert_eq!(done.bytes(LogStream::Stdout), b"\0\xff\x80a\0");
    assert_eq!(done.bytes(LogStream::Stderr), b"\xed\xa0\x80\n");
}

#[test]
fn two_hundred_megabytes_without_a_newline_arrive_in_bounded_frames() {
    let done = run(spec(&["head", "-c", "200000000", "/dev/zero"]));
    assert_eq!(done.exit.status, Some(ExitStatus::Code(0)));
    assert_eq!(done.exit.usage.log_bytes, 200_000_000);
    for frame in &done.frames {
        let FrameBody::Data { bytes, .. } = &frame.body else { panic!("{frame:?}") };
        assert!(bytes.len() <= 64 * 1024 && bytes.iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_program_that_writes_nothing_has_an_empty_log() {
    let done = run(spec(&["true"]));
    assert!(done.frames.is_empty());
    assert_eq!(done.exit.reason, ExitReason::Exited);
}

#[test]
fn bytes_beyond_the_limit_are_counted_and_do_not_hold_the_program_back() {
    let mut spec = shell("head -c 5000000 /dev/zero; echo end >&2");
    spec.log_limit_bytes = 1_000_000;
    let done = run(spec);
    assert_eq!(done.exit.status, Some(ExitStatus::Code(0)));
    assert_eq!(done.exit.usage.log_bytes, 5_000_004);
    let kept: usize = done.bytes(LogStream::Stdout).len() + done.bytes(LogStream::Stderr).len();
    assert_eq!(kept, 1_000_000);
    let FrameBody::Truncated { dropped, reason } = &done.frames.last().unwrap().body else {
        panic!("{:?}", done.frames.last())
    };
    assert_eq!(*dropped, 4_000_004);
    assert!(reason.contains("1000000"), "{reason}");
    assert!(done.evidence().contains("dropped"), "{}", done.evidence());
}

#[test]
fn dropped_bytes_are_told_while_the_program_goes_on() {
    let mut spec = shell("echo kept; while :; do echo dropped; sleep 0.05; done");
    spec.log_limit_bytes = 5;
    spec.timeout = Duration::from_secs(30);
    let running = crate::harness::Running::start(spec);
    crate::harness::wait_for("a truncated frame", || {
        crate::harness::frames(running.dir())
            .iter()
            .any(|frame| matches!(frame.body, FrameBody::Truncated { .. }))
    });
    assert!(runner_agent::exec::client::exit(running.dir()).unwrap().is_none());
}

#[test]
fn a_full_disk_loses_bytes_but_neither_the_program_nor_the_truth() {
    use runner_agent::exec::client;
    // A file system of a megabyte, in a namespace of this thread's own child, is what the shim sees as its directory.
    if !crate::harness::is_root() {
        return skip("not root: no file system to fill");
    }
    let dir = tempfile::tempdir().unwrap();
    rustix::mount::mount("none", dir.path(), "tmpfs", rustix::mount::MountFlags::empty(), c"size=1m")
        .unwrap();
    let result = std::panic::catch_unwind(|| {
        let spec = shell("head -c 3000000 /dev/zero; exit 9");
        client::write_spec(dir.path(), &spec).unwrap();
        let mut child = client::spawn(std::path::Path::new(crate::harness::AGENT), dir.path()).unwrap();
        crate::harness::wait_for("the end of the shim", || child.try_wait().unwrap().is_some());
        let exit = client::exit(dir.path()).unwrap().unwrap();
        assert_eq!(exit.status, Some(ExitStatus::Code(9)));
        assert_eq!(exit.usage.log_bytes, 3_000_000);
        assert!(format!("{:?}", exit.evidence).contains("dropped"), "{:?}", exit.evidence);
        // Room was kept for the frame that says so.
        let frames = crate::harness::frames(dir.path());
        assert_eq!(frames.last().unwrap().end(), 3_000_000);
        assert!(frames.iter().any(|frame| matches!(frame.body, FrameBody::Truncated { .. })));
        assert!(crate::harness::survivors(&spec).is_empty());
    });
    rustix::mount::unmount(dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    result.unwrap();
}
