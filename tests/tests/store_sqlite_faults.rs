//! What goes wrong beneath the state store on SQLite: death of the process, a full disk, a read-only directory, a second
//! service.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use runner_core::{
    id::RunId,
    spec::RunSpec,
    state::{Position, RunState},
    store::{Accepted, NewRun, RunEvent, Store, StoreError},
    task::{TaskKind, spawn},
};
use runner_store::{DataDirLock, LockError, SqliteOptions, SqliteStore};
use runner_tests::store::{block_on, kit};

/// Set for a child process that is to be killed: its data directory.
const CHILD_DIR: &str = "RUNNER_TEST_STORE_CHILD_DIR";

fn open(dir: &Path, options: &SqliteOptions) -> SqliteStore {
    SqliteStore::open(Arc::new(DataDirLock::acquire(dir).unwrap()), options).unwrap()
}

/// Says on standard error that a test did not run, and why: cargo shows it where it fails or with `--nocapture`.
fn skipped(why: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED: {why}");
}

fn assert_sound(dir: &Path) {
    let conn = rusqlite::Connection::open(SqliteStore::path(dir)).unwrap();
    let check: String = conn.query_row("PRAGMA integrity_check", (), |row| row.get(0)).unwrap();
    assert_eq!(check, "ok");
    let orphans: i64 =
        conn.query_row("SELECT count(*) FROM pragma_foreign_key_check", (), |row| row.get(0)).unwrap();
    assert_eq!(orphans, 0);
}

/// Not a test of its own: what [`what_was_acknowledged_survives_a_kill`] starts and kills. Without the variable it does
/// nothing.
#[test]
fn child_that_accepts_until_it_is_killed() {
    let Some(dir) = env::var_os(CHILD_DIR) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let store: Arc<dyn Store> = Arc::new(open(Path::new(&dir), &SqliteOptions::default()));
        let base = u128::from(std::process::id()) << 32;
        let tasks: Vec<_> = (0..16u128)
            .map(|task| {
                let store = Arc::clone(&store);
                spawn(TaskKind::Helper, "accept", async move {
                    for n in 0..100_000u128 {
                        let new = NewRun { time: kit::at(1), ..kit::labelled(1, &[("a", "b")]) };
                        let new = NewRun { id: kit::id(base + (task << 20) + n), ..new };
                        let run = kit::create(&*store, new).await;
                        say(&format!("accepted {}", run.id));
                        let begin = kit::step(run.id, Position::START, kit::place(RunState::Preparing, 1));
                        kit::apply(&*store, begin).await;
                        say(&format!("began {}", run.id));
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

/// One line on standard output, past the test harness's capture.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    // The parent may have stopped reading; then this process is about to be killed.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Kills its process where a test fails half-way.
struct Killed(Child);

impl Killed {
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        self.kill();
    }
}

fn start_child(dir: &Path) -> Killed {
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "child_that_accepts_until_it_is_killed", "--nocapture"])
        .env(CHILD_DIR, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    Killed(child)
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let (mut accepted, mut began) = (Vec::<RunId>::new(), Vec::<RunId>::new());
    // More than once: each start recovers what the one before left.
    for round in 0..3 {
        let mut child = start_child(dir.path());
        let pid = child.0.id();
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let mut seen = 0;
        for line in lines {
            // The last line may have been cut by the kill; one that is cut is not an acknowledgement.
            let line = line.unwrap();
            // The harness writes its own words before the first, on the same line.
            let mut words = line.rsplit(' ');
            let (id, verb) = (words.next().and_then(|id| id.parse().ok()), words.next());
            match (id, verb) {
                (Some(id), Some(verb)) if verb.ends_with("accepted") => accepted.push(id),
                (Some(id), Some(verb)) if verb.ends_with("began") => began.push(id),
                _ => continue,
            }
            seen += 1;
            if seen == 300 + round * 50 {
                let refused = DataDirLock::acquire(dir.path()).unwrap_err();
                assert!(
                    matches!(refused, LockError::Held { holder: Some(holder), .. } if holder == pid),
                    "{refused:?}"
                );
                child.0.kill().unwrap();
            }
        }
        child.kill();
        assert!(seen >= 300, "the child stopped early: {seen} acknowledgements");
    }
    block_on(async {
        let store = open(dir.path(), &SqliteOptions::default());
        for id in &accepted {
            kit::assert_consecutive(&store, *id).await;
        }
        for id in &began {
            assert_eq!(kit::must_get(&store, *id).await.position, kit::place(RunState::Preparing, 1));
        }
        let live = store.live().await.unwrap();
        assert_eq!(live.quarantined, []);
        assert!(live.runs.len() >= accepted.len());
        for run in &live.runs {
            kit::assert_consecutive(&store, run.id).await;
        }
        assert_eq!(store.live_count().await.unwrap(), live.runs.len() as u64);
    });
    assert_sound(dir.path());
}

/// A file system of its own for the calling thread and those that it starts from now on; it vanishes with them. `None`,
/// and said, where this process may not mount.
fn own_file_system(at: &Path, size: &str) -> Option<()> {
    let none = None::<&str>;
    match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => {}
        Err(Errno::EPERM | Errno::ENOSYS) => {
            skipped("mounting needs root");
            return None;
        }
        Err(error) => panic!("unshare: {error}"),
    }
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(size)).unwrap();
    Some(())
}

fn big(n: u128, bytes: usize) -> NewRun {
    kit::with_spec(n, RunSpec { args: vec!["x".repeat(bytes)], ..kit::spec("true") })
}

/// Accepts runs until there is no room. Answers how many there are.
async fn fill(store: &dyn Store, from: u128) -> u128 {
    for n in from..10_000 {
        match store.accept(big(n, 64 * 1024), kit::NO_LIMITS).await {
            Ok(Accepted::Created(_)) => {}
            Err(StoreError::Full(_)) => return n,
            other => panic!("neither created nor full: {other:?}"),
        }
    }
    panic!("there was always room");
}

async fn assert_there(store: &dyn Store, runs: u128) {
    for n in 0..runs {
        let run = kit::must_get(store, kit::id(n)).await;
        assert_eq!(run.spec.args[0].len(), 64 * 1024);
    }
    assert_eq!(store.get(kit::id(runs)).await.unwrap(), None, "half a run was stored");
    assert_eq!(store.live_count().await.unwrap(), u64::try_from(runs).unwrap());
}

#[test]
fn a_full_disk_loses_nothing_and_room_is_enough_to_go_on() {
    let base = tempfile::tempdir().unwrap();
    if own_file_system(base.path(), "size=6m").is_none() {
        return;
    }
    let ballast = base.path().join("ballast");
    fs::write(&ballast, vec![0u8; 2 * 1024 * 1024]).unwrap();
    let dir = base.path().join("data");
    block_on(async {
        let store: Arc<dyn Store> = Arc::new(open(&dir, &SqliteOptions::default()));
        let runs = fill(&*store, 0).await;
        assert!(runs > 0);
        assert_there(&*store, runs).await;
        // Many at once: every one is answered, none hangs.
        let many: Vec<_> = (0..20)
            .map(|n| {
                let store = Arc::clone(&store);
                spawn(TaskKind::Helper, "accept", async move {
                    store.accept(big(5000 + n, 1024 * 1024), kit::NO_LIMITS).await
                })
            })
            .collect();
        for answer in many {
            let answer = answer.await.unwrap().unwrap();
            assert!(matches!(answer, Err(StoreError::Full(_))), "{answer:?}");
        }
        assert_there(&*store, runs).await;

        fs::remove_file(&ballast).unwrap();
        store.probe().await.unwrap();
        assert!(matches!(store.accept(big(runs, 64 * 1024), kit::NO_LIMITS).await, Ok(Accepted::Created(_))));
        assert_there(&*store, runs + 1).await;
        drop(store);
        assert_there(&open(&dir, &SqliteOptions::default()), runs + 1).await;
    });
    assert_sound(&dir);
}

#[test]
fn beyond_its_largest_size_the_store_is_full_and_what_needs_no_room_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let small = SqliteOptions { max_bytes: Some(1024 * 1024), ..SqliteOptions::default() };
        let store = open(dir.path(), &small);
        // One that is too big, in a group with ones that fit, fails alone.
        for n in 0..8 {
            assert!(matches!(
                store.accept(big(n, 64 * 1024), kit::NO_LIMITS).await,
                Ok(Accepted::Created(_))
            ));
        }
        let small =
            (0..8).map(|n| store.append_event(kit::id(n), RunEvent::Notice("small".to_owned()), kit::at(2)));
        let small = futures::future::join_all(small);
        let too_big = store.accept(big(100, 2 * 1024 * 1024), kit::NO_LIMITS);
        let (too_big, small) = futures::future::join(too_big, small).await;
        assert!(matches!(too_big, Err(StoreError::Full(_))), "{too_big:?}");
        for answer in small {
            assert_eq!(answer.unwrap(), Some(2));
        }
        let runs = fill(&store, 8).await;
        assert_there(&store, runs).await;
        // Needs no page that is not there.
        store.probe().await.unwrap();
        drop(store);

        let store = open(dir.path(), &SqliteOptions::default());
        assert!(matches!(
            store.accept(big(runs, 256 * 1024), kit::NO_LIMITS).await,
            Ok(Accepted::Created(_))
        ));
    });
    assert_sound(dir.path());
}

#[test]
fn a_read_only_directory_is_refused_with_its_name() {
    let base = tempfile::tempdir().unwrap();
    if own_file_system(base.path(), "size=1m").is_none() {
        return;
    }
    let dir = base.path().join("data");
    drop(open(&dir, &SqliteOptions::default()));
    let none = None::<&str>;
    mount(none, base.path(), none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none).unwrap();
    for dir in [dir, base.path().join("new")] {
        let error = DataDirLock::acquire(&dir).unwrap_err();
        let LockError::NotWritable { source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert!(error.to_string().contains(&dir.display().to_string()), "{error}");
    }
}

#[test]
fn a_store_that_is_dropped_gives_its_directory_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        for n in 0..20 {
            let store = Arc::new(open(dir.path(), &SqliteOptions::default()));
            // A caller that goes away does not keep the store from closing, nor lose what it was not told.
            let accept = {
                let store = Arc::clone(&store);
                async move { store.accept(kit::run(n), kit::NO_LIMITS).await }
            };
            let _ = tokio::time::timeout(Duration::ZERO, accept).await;
        }
        let store = open(dir.path(), &SqliteOptions::default());
        let live = store.live().await.unwrap();
        assert_eq!(live.runs.len(), 20, "a verb that was submitted was not executed");
    });
}
