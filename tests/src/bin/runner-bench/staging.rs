//! Row 8: how fast inputs are staged, their SHA-256 verified, against `rclone` from an S3 server and `cp` from a directory.
//!
//! Ours is a whole run whose program does nothing: from `Run` to its terminal event. The S3 server is this program's own, the
//! same one for both. Peers verify no SHA-256.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use runner_tests::objects::{Dialect, StoreServer, server};
use worker_client::{Client, TransferOptions, proto};

use super::{
    Outcome, say,
    service::{Fault, Service, accept, follow, spec},
    stats::{Row, median, millis, timed},
};

/// A pair takes seconds.
const PAIRS: usize = 10;
const LARGE_BYTES: usize = 1 << 30;
const SMALL_FILES: usize = 10_000;
const SMALL_BYTES: usize = 10 << 10;
/// Below which the services' objects lie in the bucket.
const PREFIX: &str = "bench";
const LOCAL: &str = "[[backends]]\nkind = \"local\"\nslots = 64\n";

/// A tree, as it lies on this machine.
struct Tree {
    name: &'static str,
    dir: tempfile::TempDir,
}

/// Writes bytes that do not compress, and are other in each file.
fn write(path: &Path, bytes: usize, seed: u64) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..bytes / 8 {
        // xorshift: any bytes will do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    file.flush()
}

fn trees() -> Result<[Tree; 2], Fault> {
    let (large, small) = (tempfile::tempdir()?, tempfile::tempdir()?);
    write(&large.path().join("large"), LARGE_BYTES, 1)?;
    for number in 0..SMALL_FILES {
        let folder = small.path().join(format!("{:02}", number % 100));
        fs::create_dir_all(&folder)?;
        write(&folder.join(number.to_string()), SMALL_BYTES, number as u64)?;
    }
    Ok([Tree { name: "1 GiB", dir: large }, Tree { name: "10,000 × 10 KiB", dir: small }])
}

/// A run that takes the tree and does nothing.
async fn ours(service: &Service, uri: &str) -> Result<(), Fault> {
    let mut client = service.connect().await?;
    let input = proto::Input {
        path: "/inputs/tree".to_owned(),
        source: Some(proto::input::Source::Uri(uri.to_owned())),
        ..proto::Input::default()
    };
    let spec = proto::RunSpec { inputs: vec![input], ..spec(&["/bin/true"]) };
    let id = accept(&mut client, spec).await?;
    match follow(&mut client, id).await? {
        (_, true) => Ok(()),
        (_, false) => Err("a run that only takes inputs failed".into()),
    }
}

/// Runs a peer into a fresh directory beside the service's own, which is removed afterwards, outside of the time.
async fn peer(
    beside: &Path,
    mut command: Command,
    last: impl FnOnce(&mut Command, &Path),
) -> Result<f64, Fault> {
    let to = tempfile::tempdir_in(beside)?;
    last(&mut command, &to.path().join("tree"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let (time, output) = timed(async { command.output() }).await;
    let output = output?;
    if output.status.success() {
        return Ok(time);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{:?} ended with {}: {said}", command.get_program(), output.status).into())
}

fn rclone(server: &StoreServer, from: &str) -> Command {
    let mut command = Command::new("rclone");
    // One listing of everything, as the server has it: version 2, flat.
    command.args(["copy", "--fast-list", "--transfers", "16", "--checkers", "16", "--config", "/dev/null"]);
    command.arg(format!(":s3:{}/{PREFIX}/{from}", server::BUCKET));
    // Neither the credentials nor the proxies and certificates of whoever measures.
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    let endpoint = server.endpoint();
    for (name, value) in [
        ("RCLONE_S3_PROVIDER", "Other"),
        ("RCLONE_S3_ENDPOINT", endpoint.as_str()),
        ("RCLONE_S3_ACCESS_KEY_ID", server::KEY_ID),
        ("RCLONE_S3_SECRET_ACCESS_KEY", server::SECRET),
        ("RCLONE_S3_REGION", "us-east-1"),
        ("RCLONE_S3_LIST_VERSION", "2"),
    ] {
        command.env(name, value);
    }
    command
}

fn cp(data: &Path, from: &str) -> Command {
    let mut command = Command::new("cp");
    // A key's file lies below the store's `objects`, and the store below the data directory's.
    command.arg("-r").arg(data.join("objects/objects").join(from));
    command
}

/// The folder of an uploaded tree's files, as a key.
fn files_of(uri: &str) -> Result<String, Fault> {
    Ok(format!("{}files", uri.strip_prefix("artifact:").ok_or("a URI that is none")?))
}

async fn pairs(
    what: String,
    target: &'static str,
    service: &Service,
    tree: &Tree,
    other: impl Fn(&str) -> Command,
) -> Result<Row, Fault> {
    say(&format!("  {what}"));
    let client = Client::connect(service.endpoint()).await?;
    let uri = client.upload_tree(tree.dir.path(), TransferOptions::default()).await?.uri;
    let files = files_of(&uri)?;
    let theirs = || {
        peer(service.data_dir(), other(&files), |command, to| {
            command.arg(to);
        })
    };
    // Once each, so that nobody pays for a first time.
    ours(service, &uri).await?;
    theirs().await?;
    let (mut ratios, mut our_times, mut their_times) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (our_time, outcome) = timed(ours(service, &uri)).await;
        outcome?;
        let their_time = theirs().await?;
        // Of speeds, so that more is better.
        ratios.push(their_time / our_time);
        our_times.push(our_time);
        their_times.push(their_time);
    }
    let note = format!("{} and {}", millis(median(&our_times)), millis(median(&their_times)));
    Ok(Row { number: 8, what, ratios, target, note })
}

/// Measures it.
pub(crate) async fn measure() -> Outcome {
    let trees = trees()?;
    let mut rows = Vec::new();
    let (to_rclone, to_cp) = ("≥ 0.9", "≥ 0.4");
    let server = StoreServer::start(Dialect::S3);
    let store = format!(
        "{LOCAL}[object_store]\nurl = {:?}\nendpoint = {:?}\nallow_http = true\ncredentials_file = {:?}\n",
        server.url(PREFIX),
        server.endpoint(),
        server.credentials_file()
    );
    let on_s3 = Service::start_with(&store).await?;
    let has_rclone =
        Command::new("rclone").arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    for tree in &trees {
        let what = format!("staging {} from S3, verified ÷ `rclone`", tree.name);
        rows.push(match &has_rclone {
            Ok(status) if status.success() => {
                pairs(what, to_rclone, &on_s3, tree, |from| rclone(&server, from)).await?
            }
            _ => Row::absent(8, &what, to_rclone, "no rclone here"),
        });
    }
    drop(on_s3);
    let on_directory = Service::start_with(LOCAL).await?;
    for tree in &trees {
        let what = format!("staging {} from a directory, verified ÷ `cp`", tree.name);
        let data = on_directory.data_dir();
        rows.push(pairs(what, to_cp, &on_directory, tree, |from| cp(data, from)).await?);
    }
    Ok(rows)
}
