//! Directories that cannot be written: full, or read-only. Needs root, for its mounts.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use runner_tests::service::{Service, eventually, watch, watch_for, within};
use worker_client::{
    RunSpec,
    proto::{Cause, RunState},
};

/// A file system of its own size at a path, for as long as it lives.
#[derive(Debug)]
struct Mounted(PathBuf);

impl Mounted {
    /// `None`, with a visible skip: this user may not mount.
    #[allow(clippy::print_stdout, reason = "a skip must be visible in the test's output")]
    fn tmpfs(at: &Path, mib: usize, case: &str) -> Option<Self> {
        std::fs::create_dir_all(at).expect("a directory to mount on");
        let options = format!("size={mib}m,mode=0700");
        match mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())) {
            Ok(()) => Some(Self(at.to_owned())),
            Err(error) => {
                println!("SKIP case={case} missing=the right to mount: {error}");
                None
            }
        }
    }

    fn read_only(&self) {
        let none = None::<&str>;
        mount(none, &self.0, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)
            .expect("remount read-only");
    }

    /// Fills what is left.
    fn fill(&self) -> PathBuf {
        use std::io::Write as _;
        let path = self.0.join("fill");
        let mut file = std::fs::File::create(&path).expect("a file");
        let block = vec![1; 64 * 1024];
        while file.write_all(&block).is_ok() {}
        path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn shell(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script])
}

/// The service refuses to start, and says which directory it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_only_data_directory_is_refused_by_name() {
    let mut service = Service::prepare(&[]);
    let Some(mounted) =
        Mounted::tmpfs(&service.data_dir(), 16, "a_read_only_data_directory_is_refused_by_name")
    else {
        return;
    };
    mounted.read_only();
    service.spawn(&[]);
    let status = service.ended().await;
    assert!(!status.success() && status.code().is_some(), "an orderly refusal: {status}");
    let data_dir = service.data_dir();
    assert!(
        service.log().contains(&*data_dir.to_string_lossy()),
        "it names the directory: {}",
        service.log()
    );
}

/// A program that fills the scratch space sees that itself; the service serves on, and takes work when there is room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_scratch_directory_fails_what_needs_it_and_nothing_else() {
    let mut service = Service::prepare(&[]);
    let case = "a_full_scratch_directory_fails_what_needs_it_and_nothing_else";
    let Some(_mounted) = Mounted::tmpfs(&service.data_dir().join("local"), 320, case) else { return };
    service.restart(&[]).await;
    let client = service.client();
    let handle = client.run(shell("head -c 1000000000 /dev/zero > /tmp/full; exit $?")).await.expect("run");
    let end = within("the end", handle.wait()).await.expect("the end");
    assert_eq!((end.state, end.cause()), (RunState::Failed, Cause::Exited), "{end:?}");
    assert_ne!(end.exit_code(), Some(0));
    service.assert_clean(&[handle.id()]).await;
    let handle = client.run(shell("exit 0")).await.expect("run");
    assert!(within("the end", handle.wait()).await.expect("the end").succeeded());
}

/// The spool of the log has no room: what is lost is counted, the program is not disturbed, its end is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_log_directory_drops_bytes_and_says_so() {
    let mut service = Service::prepare(&[]);
    let case = "a_full_log_directory_drops_bytes_and_says_so";
    let Some(mounted) = Mounted::tmpfs(&service.data_dir().join("local"), 320, case) else { return };
    service.restart(&[]).await;
    let client = service.client();
    let script =
        "echo ready; read line; head -c 4000000 /dev/zero | tr '\\0' x; read line; echo after; exit 6";
    let handle = client.run(shell(script).stdin()).await.expect("run");
    watch_for(&client, handle.id(), "ready").await;
    let attachment = handle.attach().await.expect("attach");
    let filled = mounted.fill();
    attachment.input().stdin("go\n").await.expect("input");
    // Both are kept in the pipe, or taken: the program reads the second after it has written.
    attachment.input().stdin("go\n").await.expect("input");
    eventually("the end of the program", async || {
        runner_tests::proc::with_environment("RUNNER_RUN_ID", handle.id()).is_empty().then_some(())
    })
    .await;
    std::fs::remove_file(filled).expect("make room");
    let watched = watch(&client, handle.id(), "").await;
    assert_eq!(
        watched.out.len() as u64 + watched.dropped,
        6 + 4_000_000 + 6,
        "every byte is told or counted"
    );
    assert!(watched.dropped > 0, "there was no room");
    assert_eq!(watched.end().exit_code(), Some(6), "{:?}", watched.end());
    service.assert_clean(&[handle.id()]).await;
}

/// The object store has no room: logs and outputs wait, nothing is told that is not stored, and all is well once there is
/// room again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_object_store_loses_nothing_once_there_is_room() {
    let mut service = Service::prepare(&[]);
    let case = "a_full_object_store_loses_nothing_once_there_is_room";
    let Some(mounted) = Mounted::tmpfs(&service.data_dir().join("objects"), 64, case) else { return };
    service.restart(&[]).await;
    let client = service.client();
    let script = "echo ready; read line; head -c 1000000 /dev/zero | tee /outputs/zeros; exit 0";
    let handle = client.run(shell(script).stdin().output("/outputs/zeros")).await.expect("run");
    watch_for(&client, handle.id(), "ready").await;
    let filled = mounted.fill();
    let attachment = handle.attach().await.expect("attach");
    attachment.input().stdin("go\n").await.expect("input");
    eventually("the end of the program", async || {
        runner_tests::proc::with_environment("RUNNER_RUN_ID", handle.id()).is_empty().then_some(())
    })
    .await;
    assert!(
        client.get(handle.id()).await.expect("get").end_time.is_none(),
        "it cannot be over: nothing is stored"
    );
    std::fs::remove_file(filled).expect("make room");
    let watched = watch(&client, handle.id(), "").await;
    assert!(watched.end().succeeded(), "{:?}", watched.end());
    assert_eq!((watched.out.len(), watched.dropped), (6 + 1_000_000, 0));
    assert_eq!(watched.end().outputs().expect("outputs").total_bytes, 1_000_000);
    service.assert_clean(&[handle.id()]).await;
}
