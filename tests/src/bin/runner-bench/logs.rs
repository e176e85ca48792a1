//! Row 5: log bytes from the program through the store to a watcher, against a bare tonic stream and `docker logs -f`.

use std::process::{Command, Stdio};

use super::{
    Outcome,
    floor::FloorServer,
    service::{Fault, Service, accept, follow, spec},
    stats::{Row, median, timed},
};

const PAIRS: usize = 7;
const BYTES: u64 = 256 * 1024 * 1024;
const MB: f64 = 1e6;

/// Measures it.
pub(crate) async fn measure() -> Outcome {
    let service = Service::start().await?;
    let floor = FloorServer::start().await?;
    let mut client = service.connect().await?;
    let docker = Docker::find();
    let program = format!("head -c {BYTES} /dev/zero");
    let (mut to_floor, mut to_docker, mut ours, mut floors, mut dockers) =
        (vec![], vec![], vec![], vec![], vec![]);
    for _ in 0..PAIRS {
        let (seconds, outcome) = timed(async {
            let id = accept(&mut client, spec(&["sh", "-c", &program])).await?;
            follow(&mut client, id).await
        })
        .await;
        let (came, _) = outcome?;
        if came != BYTES {
            return Err(format!("{came} of {BYTES} log bytes came").into());
        }
        let our_rate = BYTES as f64 / seconds;
        let (seconds, came) = timed(floor.stream(BYTES)).await;
        let floor_rate = came? as f64 / seconds;
        ours.push(our_rate / MB);
        floors.push(floor_rate / MB);
        to_floor.push(our_rate / floor_rate);
        if let Ok(docker) = &docker {
            let (seconds, came) = timed(async { docker.logs() }).await;
            let rate = came? as f64 / seconds;
            dockers.push(rate / MB);
            to_docker.push(our_rate / rate);
        }
    }
    let what = "logs: program → store → watcher ÷ tonic stream of 64 KiB chunks";
    let note = format!("{:.0} MB/s, {:.0} MB/s", median(&ours), median(&floors));
    let mut rows = vec![Row { number: 5, what: what.to_owned(), ratios: to_floor, target: "≥ 0.3", note }];
    let what = "logs: program → store → watcher ÷ `docker logs -f`";
    rows.push(match docker {
        Ok(_) => {
            let note = format!("{:.0} MB/s", median(&dockers));
            Row { number: 5, what: what.to_owned(), ratios: to_docker, target: "≥ 2", note }
        }
        Err(why) => Row::absent(5, what, "≥ 2", format!("no Docker Engine here: {why}")),
    });
    Ok(rows)
}

/// A Docker Engine that answers, with an image made of one static program.
struct Docker;

const IMAGE: &str = "runner-bench-busybox";

impl Docker {
    fn find() -> Result<Self, Fault> {
        run(Command::new("docker").args(["version", "--format", "{{.Server.Version}}"]))?;
        let place = tempfile::tempdir()?;
        std::fs::create_dir(place.path().join("bin"))?;
        std::fs::copy("/bin/busybox", place.path().join("bin/busybox"))?;
        let mut tar = Command::new("tar")
            .arg("-C")
            .arg(place.path())
            .args(["-c", "bin"])
            .stdout(Stdio::piped())
            .spawn()?;
        let Some(archive) = tar.stdout.take() else { return Err("tar without a pipe".into()) };
        run(Command::new("docker").args(["import", "-", IMAGE]).stdin(archive))?;
        tar.wait()?;
        Ok(Self)
    }

    /// Starts a container that writes, and follows its log to the end. Returns how many bytes came.
    fn logs(&self) -> Result<u64, Fault> {
        let program = ["/bin/busybox", "head", "-c", &BYTES.to_string(), "/dev/zero"].map(str::to_owned);
        let id = run(Command::new("docker").args(["run", "-d", "--network", "none", IMAGE]).args(program))?;
        let mut follow = Command::new("docker")
            .args(["logs", "-f", &id])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let Some(mut stdout) = follow.stdout.take() else { return Err("docker logs without a pipe".into()) };
        let came = std::io::copy(&mut stdout, &mut std::io::sink())?;
        follow.wait()?;
        run(Command::new("docker").args(["rm", "-f", &id]))?;
        if came == BYTES { Ok(came) } else { Err(format!("docker logs gave {came} of {BYTES} bytes").into()) }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ = run(Command::new("docker").args(["rmi", "-f", IMAGE]));
    }
}

fn run(command: &mut Command) -> Result<String, Fault> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
