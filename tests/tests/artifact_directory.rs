//! The object store in a directory passes the suite, and survives what happens to directories.

use std::{fs, path::Path, sync::Arc};

use runner_artifacts::{
    directory::DirectoryArtifacts,
    object::{StoreOptions, open_url},
};
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactStore},
    clock,
};
use runner_tests::{
    artifact::{ArtifactPlace, block_on, chunked, key, listed, pattern},
    artifact_conformance,
};

struct Directory(tempfile::TempDir);

impl ArtifactPlace for Directory {
    const DURABLE: bool = true;

    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn open(&self) -> Arc<dyn ArtifactStore> {
        open_url(self.0.path().to_str().unwrap(), &StoreOptions::default(), &clock::system().0).unwrap()
    }

    fn leftovers(&self) -> Vec<String> {
        names(&self.0.path().join("partial"))
    }
}

fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

artifact_conformance!(Directory);

#[test]
fn partial_files_of_a_killed_process_are_swept_and_live_ones_are_not() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryArtifacts::open(dir.path()).unwrap();
        fs::write(dir.path().join("partial/999-0"), b"half").unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let stream = futures::stream::unfold(receiver, |mut r| async move { Some((r.recv().await?, r)) });
        let at = key("a");
        let put = store.put(&at, Box::pin(stream));
        let reopened = async {
            // Taken only when the file is there: the first chunk waits in the channel until then.
            sender.send(Ok(pattern(1000))).await.unwrap();
            sender.send(Ok(pattern(1000))).await.unwrap();
            sender.send(Ok(pattern(1000))).await.unwrap();
            let again = DirectoryArtifacts::open(dir.path()).unwrap();
            let left = names(&dir.path().join("partial"));
            assert_eq!(left.len(), 1, "{left:?}");
            assert_ne!(left[0], "999-0");
            drop(sender);
            again
        };
        let (size, again) = futures::future::join(put, reopened).await;
        assert_eq!(size.unwrap(), 3000);
        assert_eq!(again.head(&at).await.unwrap().size, 3000);
    });
}

#[test]
fn an_object_below_an_object_is_refused_and_harms_neither() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryArtifacts::open(dir.path()).unwrap();
        store.put_bytes(&key("a"), pattern(10)).await.unwrap();
        let error = store.put_bytes(&key("a/b/c"), pattern(10)).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Other);
        assert_eq!(store.head(&key("a")).await.unwrap().size, 10);
        assert_eq!(names(&dir.path().join("partial")), [""; 0]);
    });
}

#[test]
fn what_is_no_object_of_ours_is_not_listed() {
    block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryArtifacts::open(dir.path()).unwrap();
        store.put_bytes(&key("a/b"), pattern(1)).await.unwrap();
        let objects = dir.path().join("objects");
        fs::write(objects.join("a/line\nbreak"), b"").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", objects.join("a/link")).unwrap();
        assert_eq!(listed(&store, "a").await, ["a/b"]);
    });
}

#[test]
#[allow(clippy::print_stderr, reason = "a skip is told")]
fn a_full_disk_is_told_as_full_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_mount) = small_disk(dir.path()) else {
        eprintln!("skipped: mounting a tmpfs needs privileges");
        return;
    };
    block_on(async {
        let store = DirectoryArtifacts::open(dir.path()).unwrap();
        store.put_bytes(&key("before"), pattern(1000)).await.unwrap();
        let stream = chunked(pattern(16 * 1024 * 1024), 1024 * 1024);
        let error = store.put(&key("big"), stream).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Full);
        assert!(error.kind.retryable());
        assert_eq!(names(&dir.path().join("partial")), [""; 0]);
        // The room is there again at once.
        store.put_bytes(&key("small"), pattern(100_000)).await.unwrap();
        assert_eq!(store.head(&key("before")).await.unwrap().size, 1000);
    });
}

/// A file system of 4 MiB, unmounted when dropped. `None` where this process may not mount.
struct SmallDisk<'a>(&'a Path);

fn small_disk(at: &Path) -> Option<SmallDisk<'_>> {
    use nix::mount::{MsFlags, mount};
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=4m")).ok()?;
    Some(SmallDisk(at))
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}
