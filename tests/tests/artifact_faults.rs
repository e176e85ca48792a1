//! What goes wrong between the service and an S3 store: each fault either passes by being tried again, or ends as an error that
//! says what was seen. Nothing half is ever visible, and no upload in parts is left behind.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::TryStreamExt as _;
use runner_artifacts::object::{StoreOptions, Tuning, open_url};
use runner_core::{
    artifact::{ArtifactErrorKind, ArtifactStore, DirectAccess},
    clock,
};
use runner_tests::{
    artifact::{block_on, chunked, failing, key, listed, pattern, read},
    objects::{Action, Dialect, Fault, StoreServer, server},
};

const MIB: usize = 1024 * 1024;
/// What the query of a request about a part, and about a whole upload, begins with.
const PART: &str = "partNumber=";
const SECOND_PART: &str = "partNumber=2&";

struct World {
    server: StoreServer,
    store: Arc<dyn ArtifactStore>,
}

impl World {
    fn new() -> Self {
        Self::tuned(|_| {})
    }

    fn tuned(tune: impl FnOnce(&mut Tuning)) -> Self {
        let server = StoreServer::start(Dialect::S3);
        let mut options: StoreOptions = server.options();
        tune(&mut options.tuning);
        let store = open_url(&server.url(""), &options, &clock::system().0).unwrap();
        Self { server, store }
    }

    async fn put(&self, name: &str, size: usize) -> Result<u64, runner_core::artifact::ArtifactError> {
        self.store.put(&key(name), chunked(pattern(size), 300_000)).await
    }

    /// The object is there and exact, every fault has struck, and nothing is left behind.
    async fn assert_whole(&self, name: &str, size: usize) {
        let (meta, found) = read(&*self.store, &key(name), 0..u64::MAX).await.unwrap();
        assert_eq!(meta.size, size as u64);
        assert!(found == pattern(size), "{name} comes back exact");
        self.assert_clean();
    }

    async fn assert_absent(&self, name: &str) {
        assert_eq!(self.store.head(&key(name)).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
        assert_eq!(listed(&*self.store, name.split('/').next().unwrap()).await, [""; 0]);
        self.assert_clean();
    }

    fn assert_clean(&self) {
        assert!(self.server.faults().all_struck(), "{:?}", self.server.faults());
        assert_eq!(self.server.bucket().uploads(), [""; 0], "abandoned uploads");
    }
}

#[test]
fn a_503_is_tried_again_whatever_was_asked() {
    block_on(async {
        let world = World::new();
        for method in ["PUT", "HEAD", "GET", "DELETE", "POST"] {
            world.server.fault(Fault::on(method, "", Action::Status(503, "SlowDown")).times(2));
        }
        world.server.fault(Fault::on("PUT", PART, Action::Status(500, "InternalError")).times(3));
        world.server.fault(Fault::on("GET", "list-type=2", Action::Status(503, "SlowDown")).times(2));
        world.put("a/small", 1000).await.unwrap();
        world.put("a/large", 30 * MIB).await.unwrap();
        assert_eq!(listed(&*world.store, "a").await, ["a/large", "a/small"]);
        world.store.put_bytes(&key("a/gone"), Bytes::new()).await.unwrap();
        world.store.delete(&key("a/gone")).await.unwrap();
        world.assert_whole("a/small", 1000).await;
        world.assert_whole("a/large", 30 * MIB).await;
        assert_eq!(listed(&*world.store, "a").await, ["a/large", "a/small"]);
    });
}

#[test]
fn a_503_that_stays_ends_with_what_was_seen_and_may_be_tried_again() {
    block_on(async {
        let world = World::new();
        world.server.fault(Fault::on("PUT", SECOND_PART, Action::Status(503, "SlowDown")).times(u32::MAX));
        let error = world.put("a/x", 30 * MIB).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Unavailable);
        assert!(error.kind.retryable());
        assert!(error.context.contains("store a/x") && error.context.contains("503"), "{error}");
        assert!(error.context.contains("6 tries"), "{error}");
        assert_eq!(world.server.bucket().uploads(), [""; 0]);
        assert_eq!(world.server.bucket().keys(), [""; 0]);
    });
}

#[test]
fn a_store_that_never_answers_is_given_up_and_asked_again() {
    block_on(async {
        let world = World::tuned(|tuning| {
            tuning.stall_timeout = Duration::from_millis(400);
            tuning.connect_timeout = Duration::from_millis(400);
            tuning.min_bytes_per_sec = 64 * 1024 * 1024;
        });
        for (method, query) in
            [("PUT", SECOND_PART), ("POST", "uploads"), ("POST", "uploadId="), ("GET", ""), ("HEAD", "")]
        {
            world.server.fault(Fault::on(method, query, Action::Hang));
        }
        world.put("a/x", 30 * MIB).await.unwrap();
        world.assert_whole("a/x", 30 * MIB).await;
    });
}

#[test]
fn one_byte_a_second_is_too_slow_and_asked_again() {
    block_on(async {
        let world = World::tuned(|tuning| {
            // Each byte is in time; all of them are not.
            tuning.stall_timeout = Duration::from_millis(2500);
            tuning.min_bytes_per_sec = 64 * 1024 * 1024;
        });
        world.put("a/x", 40 * MIB).await.unwrap();
        // The first request of the read, and one of those that read ahead.
        world.server.fault(Fault::on("GET", "", Action::Trickle));
        world.server.fault(Fault::on("GET", "", Action::Trickle).after(2));
        world.assert_whole("a/x", 40 * MIB).await;
    });
}

#[test]
fn a_part_that_is_cut_is_sent_again_and_only_that() {
    block_on(async {
        let world = World::new();
        world.server.fault(Fault::on("PUT", SECOND_PART, Action::CutRequest(MIB)));
        world.put("a/x", 30 * MIB).await.unwrap();
        assert_eq!(world.server.faults().count("PUT", SECOND_PART), 2);
        assert_eq!(world.server.faults().count("PUT", PART), 4 + 1);
        world.assert_whole("a/x", 30 * MIB).await;
    });
}

#[test]
fn an_answer_that_is_cut_is_read_on_from_there() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 45 * MIB).await.unwrap();
        world.server.fault(Fault::on("GET", "", Action::CutAnswer(3 * MIB + 5)));
        world.server.fault(Fault::on("GET", "", Action::CutAnswer(1)).after(1));
        world.server.fault(Fault::on("GET", "", Action::CutAnswer(7 * MIB)).after(2));
        world.assert_whole("a/x", 45 * MIB).await;
    });
}

#[test]
fn an_answer_that_is_always_cut_ends_with_what_was_seen() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 2 * MIB).await.unwrap();
        world.server.fault(Fault::on("GET", "", Action::CutAnswer(1000)).times(u32::MAX));
        let error = read(&*world.store, &key("a/x"), 0..u64::MAX).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Unavailable);
        assert!(error.context.starts_with("read a/x: ") && error.context.contains("6 tries"), "{error}");
    });
}

#[test]
fn a_200_with_an_error_in_its_body_is_no_success() {
    block_on(async {
        let world = World::new();
        world.server.fault(Fault::on("POST", "uploadId=", Action::OkWithError("InternalError")).times(2));
        world.server.fault(Fault::on("POST", "uploads", Action::OkWithError("SlowDown")));
        world.server.fault(Fault::on("PUT", SECOND_PART, Action::OkWithError("InternalError")));
        world.put("a/x", 30 * MIB).await.unwrap();
        world.assert_whole("a/x", 30 * MIB).await;
        // Of a kind that nobody has heard of, and for ever.
        world.server.fault(Fault::on("POST", "uploadId=", Action::OkWithError("Whatever")).times(u32::MAX));
        let error = world.put("a/y", 30 * MIB).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Unavailable, "{error}");
        assert_eq!(world.server.bucket().keys(), ["a/x"]);
        assert_eq!(world.server.bucket().uploads(), [""; 0]);
    });
}

#[test]
fn a_completion_whose_answer_is_lost_is_found_to_have_happened() {
    block_on(async {
        let world = World::new();
        world.server.fault(Fault::on("POST", "uploadId=", Action::LoseAnswer));
        world.put("a/x", 30 * MIB).await.unwrap();
        world.assert_whole("a/x", 30 * MIB).await;
        // The same where an object of the same size was there before.
        world.server.fault(Fault::on("POST", "uploadId=", Action::LoseAnswer));
        world.put("a/x", 30 * MIB).await.unwrap();
        world.assert_whole("a/x", 30 * MIB).await;
    });
}

#[test]
fn an_upload_that_vanished_is_not_taken_for_one_that_was_completed() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 30 * MIB).await.unwrap();
        // An object of the right size is there, and it is not this upload's.
        world
            .server
            .fault(Fault::on("POST", "uploadId=", Action::Status(404, "NoSuchUpload")).times(u32::MAX));
        let error = world.put("a/x", 30 * MIB).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::NotFound, "{error}");
    });
}

#[test]
fn an_abort_that_fails_at_first_leaves_no_upload() {
    block_on(async {
        let world = World::new();
        world.server.fault(Fault::on("DELETE", "uploadId=", Action::Status(503, "SlowDown")).times(3));
        let source = failing(pattern(30 * MIB), MIB, ArtifactErrorKind::Mismatch);
        let error = world.store.put(&key("a/x"), source).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Mismatch);
        world.assert_absent("a/x").await;
    });
}

#[test]
fn a_signature_or_session_that_has_expired_is_made_anew() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 45 * MIB).await.unwrap();
        world.server.fault(Fault::on("GET", "", Action::Status(400, "ExpiredToken")));
        world.server.fault(Fault::on("GET", "", Action::Status(403, "RequestTimeTooSkewed")).after(2));
        world.assert_whole("a/x", 45 * MIB).await;
        world.server.fault(Fault::on("PUT", SECOND_PART, Action::Status(403, "SignatureDoesNotMatch")));
        world.server.fault(Fault::on("POST", "uploadId=", Action::Status(400, "ExpiredToken")));
        world.put("a/y", 30 * MIB).await.unwrap();
        world.assert_whole("a/y", 30 * MIB).await;
    });
}

#[test]
fn credentials_may_rotate_in_the_middle_of_a_transfer() {
    block_on(async {
        let world = Arc::new(World::new());
        let rotate = |id: &'static str, secret: &'static str| {
            let world = Arc::downgrade(&world);
            Action::First(Arc::new(move || {
                let world = world.upgrade().unwrap();
                // The old key ends at once; the request that is on its way has been signed with it.
                world.server.only_key(id, secret);
                world.server.write_credentials(id, secret);
            }))
        };
        world.server.fault(Fault::on("PUT", SECOND_PART, rotate("AKIDNEW", "new-secret")));
        world.put("a/x", 45 * MIB).await.unwrap();
        world.server.fault(Fault::on("GET", "", rotate("AKIDNEWER", "newer-secret")).after(1));
        world.assert_whole("a/x", 45 * MIB).await;
    });
}

#[test]
fn wrong_credentials_are_told_as_such_and_never_shown() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 1000).await.unwrap();
        world.server.write_credentials(server::KEY_ID, "a-wrong-secret-value");
        let errors = [
            world.put("a/y", 1000).await.unwrap_err(),
            world.put("a/y", 30 * MIB).await.unwrap_err(),
            read(&*world.store, &key("a/x"), 0..u64::MAX).await.unwrap_err(),
            world.store.list(&key("a")).try_next().await.unwrap_err(),
        ];
        for error in errors {
            assert_eq!(error.kind, ArtifactErrorKind::Denied, "{error}");
            let shown = format!("{error} {error:?} {:?}", world.store);
            assert!(!shown.contains("a-wrong-secret-value"), "{shown}");
        }
    });
}

#[test]
fn an_object_that_is_replaced_during_the_read_is_noticed() {
    block_on(async {
        let world = World::new();
        let size = 45 * MIB;
        world.put("a/x", size).await.unwrap();
        let bucket = Arc::clone(world.server.bucket());
        let replace = Action::First(Arc::new(move || bucket.replace("a/x", &vec![0; 45 * MIB])));
        world.server.fault(Fault::on("GET", "", replace).after(1));
        let error = read(&*world.store, &key("a/x"), 0..u64::MAX).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Mismatch);
        assert_eq!(error.context, "read a/x: the object was replaced meanwhile");
        world.assert_clean();
    });
}

#[test]
fn an_object_that_is_replaced_after_a_cut_is_noticed() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 2 * MIB).await.unwrap();
        world.server.fault(Fault::on("GET", "", Action::CutAnswer(MIB)));
        let bucket = Arc::clone(world.server.bucket());
        let replace = Action::First(Arc::new(move || bucket.replace("a/x", &vec![0; 2 * MIB])));
        world.server.fault(Fault::on("GET", "", replace));
        let error = read(&*world.store, &key("a/x"), 0..u64::MAX).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Mismatch, "{error}");
    });
}

#[test]
fn a_store_that_is_full_is_told_as_full_and_leaves_nothing() {
    block_on(async {
        let world = World::new();
        world.server.bucket().set_room(Some(20 * MIB as u64));
        let error = world.put("a/x", 40 * MIB).await.unwrap_err();
        assert_eq!(error.kind, ArtifactErrorKind::Full, "{error}");
        assert!(error.context.contains("507"), "{error}");
        world.assert_absent("a/x").await;
        world.server.bucket().set_room(None);
        world.put("a/x", 40 * MIB).await.unwrap();
        world.assert_whole("a/x", 40 * MIB).await;
    });
}

#[test]
fn a_signed_url_ends_with_its_time() {
    block_on(async {
        let world = World::new();
        world.put("a/x", 1000).await.unwrap();
        let request = world
            .store
            .direct(&key("a/x"), &DirectAccess::Read, Duration::from_secs(1))
            .await
            .unwrap()
            .unwrap();
        let deadline = Duration::from_secs(20);
        let expired = async {
            while status(&request.url).await != 403 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(deadline, expired).await.expect("the URL expires");
    });
}

async fn status(url: &str) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = tokio::net::TcpStream::connect(host).await.unwrap();
    let request = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer[9..12]).parse().unwrap()
}

#[test]
fn many_transfers_at_once_stay_within_the_memory_that_they_share() {
    block_on(async {
        let world = World::tuned(|tuning| {
            // No part beyond the first of each upload, no range ahead.
            tuning.memory_bytes = 0;
            tuning.uploads = 2;
            tuning.connections = 2;
        });
        let names: Vec<String> = (0..6).map(|n| format!("a/{n}")).collect();
        let puts = names.iter().map(|name| world.put(name, 20 * MIB));
        futures::future::try_join_all(puts).await.unwrap();
        futures::future::join_all(names.iter().map(|name| world.assert_whole(name, 20 * MIB))).await;
    });
}
