//! The same spec on every backend of one service: the same outcome, the same bytes in its log, the same outputs.

use std::{collections::BTreeMap, fmt, fs, time::Duration};

use futures::{StreamExt as _, stream};
use runner_tests::{
    backend::{dind, k8sjob},
    cluster,
    docker::TestImage,
    service::{Service, eventually, watch},
};
use worker_client::{Client, RunSpec, TransferOptions, proto};

const BACKENDS: [&str; 3] = ["local", "dind", "k8sjob"];
/// Runs at once. As many as slots, so that nothing waits for a slot for longer than it has to.
const AT_ONCE: usize = 12;

/// A shell script that means the same to every shell and to every set of tools.
fn sh(script: &str) -> RunSpec {
    RunSpec::command(["sh", "-c", script])
}

/// What runs are given.
struct Given {
    file: String,
    tree: String,
}

async fn given(client: &Client) -> Given {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    fs::write(at("one"), "first\n").expect("write");
    fs::create_dir(at("deep")).expect("make a directory");
    fs::write(at("deep/two"), [0, 159, 146, 150, 10]).expect("write");
    let tree = client.upload_tree(dir.path(), TransferOptions::default()).await.expect("upload a tree");
    let file = client.upload_file(at("one"), TransferOptions::default()).await.expect("upload a file");
    Given { file: file.uri, tree: tree.uri }
}

/// Ends of programs.
fn ends() -> Vec<(&'static str, RunSpec)> {
    vec![
        ("success", sh("exit 0")),
        ("a code", sh("exit 7")),
        ("the largest code", sh("exit 255")),
        ("a code like a signal's", sh("exit 143")),
        ("asked to end by itself", sh("kill -TERM $$; sleep 10")),
        ("killed by itself", sh("kill -KILL $$; sleep 10")),
        ("aborted", sh("kill -ABRT $$; sleep 10")),
        ("a tool that is missing", sh("no-such-tool 2>/dev/null; echo $?")),
        ("a program that is missing", RunSpec::command(["/no/such/program"])),
        ("no program", RunSpec::command(["/etc/passwd"])),
        ("a directory as program", RunSpec::command(["/tmp"])),
        ("a timeout", sh("echo ready; sleep 600").timeout(Duration::from_secs(1))),
        (
            "a timeout that the program handles",
            sh("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done")
                .timeout(Duration::from_secs(1)),
        ),
        (
            "a timeout that the program ignores",
            sh("trap '' TERM; echo ready; while :; do sleep 0.1; done")
                .timeout(Duration::from_secs(1))
                .stop_grace(Duration::from_secs(1)),
        ),
        ("a child that stays", sh("(sleep 600; echo never) & echo done")),
    ]
}

/// Logs.
fn logs() -> Vec<(&'static str, RunSpec)> {
    vec![
        ("standard output", sh("echo out")),
        ("standard error", sh("echo err >&2")),
        ("both", sh("echo out; echo err >&2; exit 4")),
        ("no end of line", sh("printf 'no newline'")),
        ("binary", sh(r"printf '\000\001\377\n\r\377'")),
        ("text of many bytes a letter", sh("printf 'gr\\303\\274n \\342\\202\\254\\n'")),
        ("many lines", sh("i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done")),
        ("a flood", sh("seq 1 999999999 2>/dev/null | head -c 3000000")),
        ("one long line", sh("head -c 500000 /dev/zero | tr '\\000' x")),
        ("no input", sh("cat; echo $?")),
        (
            "arguments as they are",
            RunSpec::command(["sh", "-c", "printf '%s|' \"$@\"", "sh"]).args(["a b", "", "*", "$HOME", "ü"]),
        ),
        ("an environment", sh("echo \"$GREETING\"").env("GREETING", "a=b \"c\"\n$d")),
        ("where it is", sh("pwd").working_dir("/tmp")),
        (
            "a home that it may write to",
            sh("echo x > \"$HOME/f\" && cat \"$HOME/f\"; echo y > /tmp/f && cat /tmp/f"),
        ),
        ("nobody in particular", sh("id -u; id -g; id -G")),
        ("nothing beyond its rights", sh("(echo x > /etc/passwd) 2>/dev/null || echo refused")),
    ]
}

/// Inputs and outputs.
fn files(given: &Given) -> Vec<(&'static str, RunSpec)> {
    let (file, tree) = (given.file.as_str(), given.tree.as_str());
    vec![
        ("a copy", sh("cat /inputs/a > /outputs/b").input("/inputs/a", file).output("/outputs/b")),
        (
            "a tree",
            sh("cd /inputs/t && find . -type f | sort && cat deep/two > /outputs/two")
                .input("/inputs/t", tree)
                .output("/outputs/two"),
        ),
        ("bytes in the spec", sh("cat /inputs/i").input_bytes("/inputs/i", b"inline\n".to_vec())),
        (
            "an input is not written to",
            sh("(echo x > /inputs/a) 2>/dev/null || echo refused").input("/inputs/a", file),
        ),
        ("an empty output", sh(": > /outputs/empty").output("/outputs/empty")),
        ("an output that is not there", sh("echo done").output("/outputs/missing")),
        ("an optional one that is not there", sh("echo done").optional_output("/outputs/missing")),
        (
            "a directory",
            sh("mkdir -p /outputs/d/e/f && echo 1 > /outputs/d/1 && echo 2 > /outputs/d/e/2")
                .output("/outputs/d"),
        ),
        (
            "a pattern",
            sh("for i in a b; do echo $i > /outputs/$i.txt; done; echo c > /outputs/c.log")
                .output_glob("/outputs/*.txt"),
        ),
        (
            "a program as output",
            sh("printf '#!/bin/sh\\n' > /outputs/p && chmod 755 /outputs/p").output("/outputs/p"),
        ),
        (
            "a large one",
            sh("seq 1 999999999 2>/dev/null | head -c 5000000 > /outputs/l").output("/outputs/l"),
        ),
        ("what a failure leaves", sh("echo partial > /outputs/p; exit 9").output("/outputs/p")),
        ("a link", sh("ln -s /etc/passwd /outputs/l").output("/outputs/l")),
        (
            "a name of many bytes a letter",
            sh("mkdir /outputs/d; echo x > /outputs/d/grün").output("/outputs/d"),
        ),
    ]
}

/// What a stream said. Shown by its beginning.
#[derive(PartialEq)]
struct Said(Vec<u8>);

impl fmt::Debug for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = &self.0[..self.0.len().min(200)];
        write!(f, "{} bytes: {:?}", self.0.len(), String::from_utf8_lossy(start))
    }
}

/// What is compared.
#[derive(Debug, PartialEq)]
struct Told {
    state: proto::RunState,
    cause: proto::Cause,
    code: Option<i32>,
    signal: Option<i32>,
    out: Said,
    err: Said,
    dropped: u64,
    partial: Option<bool>,
    outputs: Vec<(String, String, u64, String, u32)>,
}

async fn told(client: &Client, spec: RunSpec) -> Told {
    let handle = client.run(spec).await.expect("run");
    let watched = watch(client, handle.id(), "").await;
    let end = watched.end();
    let entry = |one: &proto::ManifestEntry| {
        (one.output.clone(), one.path.clone(), one.size, one.sha256.clone(), one.mode)
    };
    let mut outputs: Vec<_> =
        end.outputs().iter().flat_map(|manifest| manifest.entries.iter().map(entry)).collect();
    outputs.sort();
    Told {
        state: end.state,
        cause: end.cause(),
        code: end.exit_code(),
        signal: end.signal(),
        partial: end.outputs().map(|manifest| manifest.partial),
        outputs,
        out: Said(watched.out),
        err: Said(watched.err),
        dropped: watched.dropped,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_spec_ends_the_same_on_every_backend() {
    const TEST: &str = "the same on every backend";
    let Ok(cluster) = cluster::shared().await.map_err(|missing| missing.skip("k8sjob", TEST)) else { return };
    let Ok(engine) = dind::shared_engine().await.map_err(|missing| missing.skip("dind", TEST)) else {
        return;
    };
    TestImage::busybox().load(&engine.connect(), dind::IMAGE).await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let agents = k8sjob::agents_address();
    let of_engine = dind::settings(engine, &engine.host(), ", slots = 4");
    let of_engine = of_engine.iter().find(|(name, _)| *name == "RUNNER_BACKENDS").expect("a backend");
    let backends = format!(
        "[{{ kind = 'local', name = 'local', slots = 4 }}, {}, {}]",
        of_engine.1.trim_matches(['[', ']']),
        k8sjob::table(&cluster, dir.path(), agents, ("k8sjob", cluster::IMAGE), ", slots = 4"),
    );
    let service = Service::start_with(&[
        ("RUNNER_AGENT_LISTEN", &agents.to_string()),
        ("RUNNER_BACKENDS", &backends),
        ("RUNNER_DEFAULT_BACKEND", "local"),
    ])
    .await;
    let client = service.client();
    let given = given(&client).await;
    let table = [ends(), logs(), files(&given)].concat();
    assert!(table.len() >= 30, "{} specs", table.len());
    let runs: Vec<_> = table
        .iter()
        .flat_map(|(name, spec)| BACKENDS.map(|backend| (*name, backend, spec.clone().backend(backend))))
        .collect();
    let told: Vec<_> = stream::iter(runs)
        .map(|(name, backend, spec)| {
            let client = &client;
            async move { (name, backend, told(client, spec).await) }
        })
        .buffer_unordered(AT_ONCE)
        .collect()
        .await;
    let mut by_name: BTreeMap<&str, BTreeMap<&str, Told>> = BTreeMap::new();
    for (name, backend, told) in told {
        by_name.entry(name).or_default().insert(backend, told);
    }
    assert_eq!(by_name.len(), table.len(), "each spec has its own name");
    let differing: Vec<_> = by_name
        .iter()
        .filter(|(_, told)| BACKENDS.iter().any(|backend| told[backend] != told[BACKENDS[0]]))
        .collect();
    assert!(differing.is_empty(), "{} of {} specs differ: {differing:#?}", differing.len(), table.len());
    // The service removes after it has told the end.
    let ours = format!("runner.instance={}", service.instance());
    let admin = cluster.client().await;
    eventually("nothing left on the engine and on the cluster", async || {
        let (containers, objects) =
            (dind::labelled(engine, &ours).await, k8sjob::labelled(&admin, &ours).await);
        (containers.is_empty() && objects.is_empty()).then_some(())
    })
    .await;
    service.assert_clean(&[]).await;
}
