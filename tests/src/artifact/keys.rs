//! Keys, and `list`.
#![allow(missing_docs, reason = "a case's name is the sentence that it shows")]

use bytes::Bytes;
use futures::TryStreamExt as _;
use runner_core::artifact::ArtifactErrorKind;

use super::{ArtifactPlace, key, listed, read};

pub async fn unusual_names_come_back_as_they_were<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    let mut names = vec![
        "n/with space".to_owned(),
        "n/ leading".to_owned(),
        "n/ünï/çödé/日本語/🦀".to_owned(),
        "n/a#1".to_owned(),
        "n/a%20b".to_owned(),
        "n/a%2Fb".to_owned(),
        "n/...".to_owned(),
        "n/.hidden".to_owned(),
        "n/back\\slash".to_owned(),
        "n/quote'\"<>|*?[]{}^`~&=+:;,@!$()".to_owned(),
        "n/case/Abc".to_owned(),
        "n/case/aBC".to_owned(),
        "n/-rf".to_owned(),
        // Two spellings of one letter are two names.
        "n/é".to_owned(),
        "n/e\u{301}".to_owned(),
    ];
    // The longest name and the longest key there are.
    names.push(format!("n/{}", "x".repeat(255)));
    names.push(format!("n/{}y", "ü".repeat(127)));
    let long = format!("n/{}{}", format!("{}/", "z".repeat(199)).repeat(5), "w".repeat(22));
    assert_eq!(long.len(), 1024);
    names.push(long[..P::LONGEST_KEY].to_owned());
    if !P::BACKSLASH {
        names.retain(|name| !name.contains('\\'));
    }
    for name in &names {
        store.put_bytes(&key(name), Bytes::from(name.clone())).await.unwrap();
    }
    for name in &names {
        assert_eq!(read(&*store, &key(name), 0..u64::MAX).await.unwrap().1, name.as_bytes());
    }
    names.sort();
    assert_eq!(listed(&*store, "n").await, names);
    for name in &names {
        store.delete(&key(name)).await.unwrap();
        assert_eq!(store.head(&key(name)).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
    }
    assert_eq!(listed(&*store, "n").await, [""; 0]);
}

pub async fn list_goes_by_whole_names<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    for name in ["run/1/a", "run/1/b/c", "run/10/a", "run/1-x", "other/run/1/a"] {
        store.put_bytes(&key(name), Bytes::new()).await.unwrap();
    }
    assert_eq!(listed(&*store, "run/1").await, ["run/1/a", "run/1/b/c"]);
    assert_eq!(listed(&*store, "run").await, ["run/1-x", "run/1/a", "run/1/b/c", "run/10/a"]);
    assert_eq!(listed(&*store, "run/1/a").await, [""; 0], "an object is not below itself");
}

pub async fn list_of_nothing_is_empty<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    assert_eq!(listed(&*store, "nothing/here").await, [""; 0]);
}

pub async fn list_tells_sizes_and_many_keys<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    for n in 0..1500usize {
        let at = key(&format!("many/{}/{n}", n % 11));
        store.put_bytes(&at, Bytes::from(vec![0; n])).await.unwrap();
    }
    let found: Vec<_> = store.list(&key("many")).try_collect().await.unwrap();
    assert_eq!(found.len(), 1500);
    for meta in &found {
        let n: u64 = meta.key.as_str().rsplit('/').next().unwrap().parse().unwrap();
        assert_eq!(meta.size, n, "{}", meta.key);
    }
    // A listing that is dropped half way harms nothing.
    let mut some = store.list(&key("many"));
    assert!(some.try_next().await.unwrap().is_some());
    drop(some);
    store.probe().await.unwrap();
}

pub async fn a_folder_is_no_object<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    store.put_bytes(&key("a/b/c"), Bytes::new()).await.unwrap();
    assert_eq!(store.head(&key("a/b")).await.unwrap_err().kind, ArtifactErrorKind::NotFound);
    let error = store.get(&key("a/b"), 0..1).await.map(drop).unwrap_err();
    assert_eq!(error.kind, ArtifactErrorKind::NotFound);
}

pub async fn a_name_can_be_an_object_s_again_after_those_below_it_are_gone<P: ArtifactPlace>(place: &P) {
    let store = place.open();
    for _ in 0..3 {
        store.put_bytes(&key("a/b/c/d"), Bytes::new()).await.unwrap();
        store.delete(&key("a/b/c/d")).await.unwrap();
        store.put_bytes(&key("a/b"), Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(listed(&*store, "a").await, ["a/b"]);
        store.delete(&key("a/b")).await.unwrap();
    }
}
