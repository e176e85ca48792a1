use std::sync::atomic::{AtomicI64, Ordering};

use super::*;

#[derive(Debug, Default)]
struct TestClock(AtomicI64);

impl TestClock {
    fn advance(&self, by: Duration) {
        self.0.fetch_add(i64::try_from(by.as_micros()).unwrap(), Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(1_700_000_000_250_000 + self.0.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

struct Bench {
    dir: tempfile::TempDir,
    clock: Arc<TestClock>,
    signer: BlobSigner,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(TestClock::default());
    let signer = BlobSigner::open(dir.path(), Arc::clone(&clock) as Arc<dyn Clock>).unwrap();
    Bench { dir, clock, signer }
}

fn key(text: &str) -> ArtifactKey {
    text.parse().unwrap()
}

const MINUTE: Duration = Duration::from_secs(60);
const DIGEST: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn a_minted_url_grants_exactly_what_it_says() {
    let bench = bench();
    let key = key("uploads/t/ü %41?&=#/x");
    let url = bench.signer.mint(BlobMethod::Put, &key, MINUTE, Some(7), Some(DIGEST));
    assert!(url.is_ascii() && !url.contains(' '), "{url}");
    let grant = bench.signer.verify(BlobMethod::Put, &url).unwrap();
    let expires = Timestamp::from_micros(1_700_000_060_000_000);
    let sha256 = Some(DIGEST.to_owned());
    assert_eq!(grant, BlobGrant { key, method: BlobMethod::Put, size: Some(7), sha256, expires });
}

#[test]
fn a_url_without_conditions_grants_any_size_and_digest() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Get, &key("a"), MINUTE, None, None);
    let grant = bench.signer.verify(BlobMethod::Get, &url).unwrap();
    assert_eq!((grant.size, grant.sha256), (None, None));
}

#[test]
fn a_url_is_for_one_method() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Get, &key("a"), MINUTE, None, None);
    assert_eq!(bench.signer.verify(BlobMethod::Put, &url), Err(BlobError::WrongMethod));
    let forged = url.replace("method=GET", "method=PUT");
    assert_eq!(bench.signer.verify(BlobMethod::Put, &forged), Err(BlobError::BadSignature));
}

#[test]
fn a_url_expires() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Get, &key("a"), MINUTE, None, None);
    bench.clock.advance(MINUTE - Duration::from_secs(1));
    assert!(bench.signer.verify(BlobMethod::Get, &url).is_ok());
    bench.clock.advance(Duration::from_secs(1));
    assert_eq!(bench.signer.verify(BlobMethod::Get, &url), Err(BlobError::Expired));
}

#[test]
fn no_url_lives_longer_than_the_ceiling() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Get, &key("a"), Duration::MAX, None, None);
    bench.clock.advance(MAX_LIFETIME);
    assert_eq!(bench.signer.verify(BlobMethod::Get, &url), Err(BlobError::Expired));
}

#[test]
fn every_change_of_a_url_is_noticed() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Put, &key("uploads/t/a"), MINUTE, Some(7), Some(DIGEST));
    for at in 0..url.len() {
        for other in ["0", "1", "a", "/", "&", "%"] {
            let mut changed = url.clone();
            changed.replace_range(at..=at, other);
            if changed != url {
                let result = bench.signer.verify(BlobMethod::Put, &changed);
                assert!(
                    matches!(result, Err(BlobError::Malformed(_) | BlobError::BadSignature)),
                    "{changed}: {result:?}"
                );
            }
        }
        assert!(bench.signer.verify(BlobMethod::Put, &url[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn other_spellings_and_additions_are_malformed() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Put, &key("a/b"), MINUTE, Some(7), None);
    for bad in [
        format!("{url}&x=1"),
        format!("{url}&size=8"),
        url.replace("size=7", "size=07"),
        url.replace("size=7", "size=%2B7"),
        url.replace("a/b", "a/../b"),
        url.replace("a/b", "a%2F%2Fb"),
        url.replace("a/b", "%FF"),
        url.replace("/blob/v1/", "/blob/v2/"),
        url.replace("/blob/v1/", "http://x/blob/v1/"),
        url.split('?').next().unwrap().to_owned(),
        url.to_uppercase(),
        String::new(),
    ] {
        let result = bench.signer.verify(BlobMethod::Put, &bad);
        assert!(matches!(result, Err(BlobError::Malformed(_))), "{bad}: {result:?}");
    }
}

#[test]
fn another_services_url_is_refused() {
    let (here, there) = (bench(), bench());
    let url = there.signer.mint(BlobMethod::Get, &key("a"), MINUTE, None, None);
    assert_eq!(here.signer.verify(BlobMethod::Get, &url), Err(BlobError::BadSignature));
}

#[test]
fn a_url_survives_a_restart_and_one_rotation_but_not_two() {
    let bench = bench();
    let url = bench.signer.mint(BlobMethod::Get, &key("a"), MINUTE, None, None);
    let reopen = || BlobSigner::open(bench.dir.path(), Arc::clone(&bench.clock) as Arc<dyn Clock>).unwrap();
    assert!(reopen().verify(BlobMethod::Get, &url).is_ok());
    bench.signer.rotate().unwrap();
    assert!(bench.signer.verify(BlobMethod::Get, &url).is_ok());
    assert!(reopen().verify(BlobMethod::Get, &url).is_ok());
    let newer = bench.signer.mint(BlobMethod::Get, &key("a"), MINUTE, None, None);
    assert_ne!(newer, url);
    bench.signer.rotate().unwrap();
    for signer in [&bench.signer, &reopen()] {
        assert_eq!(signer.verify(BlobMethod::Get, &url), Err(BlobError::BadSignature));
        assert!(signer.verify(BlobMethod::Get, &newer).is_ok());
    }
}

#[test]
fn the_key_file_is_private_and_an_exposed_or_broken_one_is_refused() {
    let bench = bench();
    let path = bench.dir.path().join(KEY_FILE);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    bench.signer.rotate().unwrap();
    assert_eq!(mode(&path), 0o600);
    let reopen = || BlobSigner::open(bench.dir.path(), Arc::clone(&bench.clock) as Arc<dyn Clock>).map(drop);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(reopen(), Err(KeyError::Exposed { mode: 0o640, .. })));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    for bad in ["", "00\n", "zz\n", "not a key"] {
        fs::write(&path, bad).unwrap();
        assert!(matches!(reopen(), Err(KeyError::Malformed { .. })), "{bad:?}");
    }
    let secret = fs::read_to_string(&path).unwrap();
    assert!(!format!("{:?}", bench.signer).contains(secret.trim()));
}
