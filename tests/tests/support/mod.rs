//! What the tests of the clients have in common.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

pub mod ctl;
pub mod pairs;
pub mod python;
pub mod ramp;
pub mod two;

use std::{io::Write as _, thread, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use runner_tests::service::Service;

const POLL: Duration = Duration::from_millis(20);

/// Starts a service, for a test that talks to it through other processes.
pub fn start() -> Service {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(Service::start())
}

/// Like [`start`], with variables of the configuration.
pub fn start_with(settings: &[(&str, &str)]) -> Service {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(Service::start_with(settings))
}

/// Asks until it is so. The waits add up to `deadline` and a little.
pub fn until(what: &str, deadline: Duration, mut is_so: impl FnMut() -> bool) {
    for _ in 0..=deadline.as_millis() / POLL.as_millis() {
        if is_so() {
            return;
        }
        thread::sleep(POLL);
    }
    panic!("waited {deadline:?} for: {what}");
}

/// Says something about a test that passes.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", text.trim_end());
}

/// Says that a test was not run, and why.
pub fn skip(why: &str) {
    say(&format!("SKIP {why}"));
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).expect("a pid");
    let _ = kill(Pid::from_raw(pid), signal);
}
