//! Goldens: the whole of what a spec becomes.

use runner_agent::{
    backend::DefaultUser,
    exec::protocol::{Namespaces, ProbeReport},
};
use runner_core::{
    id::RunId,
    spec::{Output, Resources, TerminalSize},
};
use serde_json::json;

use super::*;
use crate::cgroup::Cgroups;

const RUN: &str = "00000000-0000-0000-0000-000000000007";

fn machine() -> Machine {
    let namespaces = Namespaces { user: false, mount: true, pid: true, network: true, ipc: true, uts: true };
    Machine {
        probe: ProbeReport { namespaces, overlay: true, notes: Vec::new() },
        cgroups: Cgroups {
            version: 2,
            memory: Some("/cg".into()),
            pids: Some("/cg".into()),
            cpu: Some("/cg".into()),
            swap: false,
            owner: "us".to_owned(),
            notes: Vec::new(),
        },
        privileged: true,
    }
}

fn config() -> LocalConfig {
    LocalConfig {
        images: [("tools".to_owned(), PathBuf::from("/srv/tools"))].into(),
        ..LocalConfig::default()
    }
}

fn convert(spec: &RunSpec, machine: &Machine, config: &LocalConfig) -> Result<ExecSpec, BackendError> {
    let attempt = AttemptId { run: RUN.parse::<RunId>().unwrap(), number: 2 };
    let dir = AttemptDir::new("/data/local".as_ref(), attempt);
    let plan = mount_plan(spec)?;
    exec_spec(&Conversion {
        attempt,
        spec,
        log_limit_bytes: 1000,
        dir: &dir,
        plan: &plan,
        machine,
        capabilities: &machine.capabilities(config),
        config,
        hidden: &["/data".into()],
    })
}

fn spec() -> RunSpec {
    RunSpec { command: vec!["echo".into()], args: vec!["hi".into()], ..RunSpec::default() }
}

#[test]
fn the_least_spec_becomes_a_confined_program_of_the_host() {
    let got = serde_json::to_value(convert(&spec(), &machine(), &config()).unwrap()).unwrap();
    let base = format!("/data/local/{RUN}.2");
    let mount = |host: &str, target: &str, read_only: bool| json!({"source": format!("{base}/{host}"), "target": target, "read_only": read_only});
    let expected = json!({
        "attempt": {"run": RUN, "number": 2},
        "argv": ["echo", "hi"],
        "env": {
            "HOME": "/home/runner",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "RUNNER_ATTEMPT": "2",
            "RUNNER_RUN_ID": RUN,
            "TMPDIR": "/tmp",
            "USER": "runner",
        },
        "working_dir": "/",
        "root": {"host": {"hidden": ["/data"]}},
        "read_only_root": true,
        "mounts": [
            mount("tmp", "/tmp", false),
            mount("home", "/home", false),
            mount("in/0", "/inputs", true),
            mount("out/0", "/outputs", false),
        ],
        "user": {"uid": 65532, "gid": 65532},
        "namespaces": {"user": false, "mount": true, "pid": true, "network": true, "ipc": true, "uts": true},
        "cgroup": {"directories": [format!("/cg/runner-us-{RUN}.2")], "settings": [], "version": 2},
        "file_size_bytes": null,
        "address_space_bytes": null,
        "nproc": null,
        "timeout": {"secs": 3600, "nanos": 0},
        "stop_grace": {"secs": 10, "nanos": 0},
        "terminal": null,
        "stdin": false,
        "log_limit_bytes": 1000,
    });
    assert_eq!(got, expected);
}

#[test]
fn every_field_of_a_full_spec_is_passed_on() {
    let full = RunSpec {
        image: Some("tools".into()),
        env: [("PATH".to_owned(), "/x".to_owned()), ("A".to_owned(), "b".to_owned())].into(),
        working_dir: Some("/outputs".into()),
        outputs: vec![Output {
            path: "/work/out/x".into(),
            glob: false,
            destination: None,
            required: true,
            max_bytes: None,
        }],
        resources: Resources {
            cpu_millis: Some(500),
            memory_bytes: Some(1 << 30),
            pids: Some(10),
            file_size_bytes: Some(77),
            ..Resources::default()
        },
        network: Network::Egress,
        user: Some(User { uid: 1000, gid: 1001 }),
        timeout: Some(Duration::from_secs(9)),
        stop_grace: Some(Duration::from_millis(1500)),
        terminal: Some(TerminalSize { columns: 100, rows: 30 }),
        stdin: true,
        ..spec()
    };
    let got = convert(&full, &machine(), &config()).unwrap();
    let base = format!("/data/local/{RUN}.2");
    let upper = Some(PathBuf::from(format!("{base}/root/upper")));
    assert_eq!(got.root, Root::Directory { lower: "/srv/tools".into(), upper });
    assert!(!got.read_only_root);
    assert_eq!(got.env["PATH"], "/x", "the spec has the last word");
    assert_eq!((got.env["A"].as_str(), got.env["TERM"].as_str()), ("b", "xterm"));
    assert_eq!(got.working_dir, "/outputs");
    assert_eq!(got.user, User { uid: 1000, gid: 1001 });
    assert!(!got.namespaces.network, "egress is the machine's network");
    assert!(got.namespaces.mount && got.namespaces.pid);
    let group = PathBuf::from(format!("/cg/runner-us-{RUN}.2"));
    assert_eq!(
        got.cgroup.unwrap().settings,
        [("pids.max", "10"), ("memory.max", "1073741824"), ("cpu.max", "50000 100000")]
            .map(|(file, value)| (group.join(file), value.to_owned()))
    );
    assert_eq!((got.file_size_bytes, got.address_space_bytes, got.nproc), (Some(77), None, None));
    assert_eq!((got.timeout, got.stop_grace), (Duration::from_secs(9), Duration::from_millis(1500)));
    assert_eq!((got.terminal, got.stdin), (full.terminal, true));
    assert!(got.mounts.iter().any(|mount| mount.target == "/work/out" && !mount.read_only));
    assert!(got.mounts.iter().any(|mount| mount.target == "/home/runner"), "the image keeps its own homes");
}

#[test]
fn a_read_only_image_has_no_upper_directory() {
    let spec = RunSpec { image: Some("tools".into()), read_only_root: true, ..spec() };
    let got = convert(&spec, &machine(), &config()).unwrap();
    assert_eq!(got.root, Root::Directory { lower: "/srv/tools".into(), upper: None });
    assert!(got.read_only_root);
}

#[test]
fn without_control_groups_limits_become_rlimits() {
    let machine = Machine { cgroups: Cgroups::default(), ..machine() };
    let resources = Resources { memory_bytes: Some(5), pids: Some(6), ..Resources::default() };
    let spec = RunSpec { resources, ..spec() };
    let error = convert(&spec, &machine, &config()).unwrap_err().to_string();
    assert!(error.contains("spec.resources.memory_bytes"), "not without the operator's consent: {error}");
    let config = LocalConfig { memory_by_rlimit: true, ..config() };
    let got = convert(&spec, &machine, &config).unwrap();
    assert_eq!((got.cgroup, got.address_space_bytes, got.nproc), (None, Some(5), Some(6)));
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_field() {
    let refused = |spec: RunSpec, machine: &Machine| {
        let error = convert(&spec, machine, &config()).unwrap_err();
        assert_eq!((error.kind, error.retryable), (BackendErrorKind::Unsupported, false), "{error}");
        error.to_string()
    };
    let all = machine();
    let none = RunSpec { command: Vec::new(), args: Vec::new(), ..RunSpec::default() };
    assert!(refused(none, &all).contains("spec.command"));
    assert!(refused(RunSpec { image: Some("other".into()), ..spec() }, &all).contains("spec.image"));
    let root = Some(User { uid: 0, gid: 0 });
    assert!(refused(RunSpec { user: root, ..spec() }, &all).contains("spec.user"));
    let gpus = Resources { gpus: Some(1), ..Resources::default() };
    assert!(refused(RunSpec { resources: gpus, ..spec() }, &all).contains("spec.resources.gpus"));
    let named = Network::Named("lab".into());
    assert!(refused(RunSpec { network: named, ..spec() }, &all).contains("spec.network"));
    let cpu = Resources { cpu_millis: Some(1), ..Resources::default() };
    let groupless = Machine { cgroups: Cgroups::default(), ..machine() };
    assert!(refused(RunSpec { resources: cpu, ..spec() }, &groupless).contains("spec.resources.cpu_millis"));
    let mut unconfined = machine();
    unconfined.probe.namespaces.mount = false;
    assert!(refused(spec(), &unconfined).contains("mount namespace"));
}

#[test]
fn a_named_network_of_the_configuration_is_the_machines() {
    let config = LocalConfig { host_networks: vec!["lab".into()], ..config() };
    let spec = RunSpec { network: Network::Named("lab".into()), ..spec() };
    assert!(!convert(&spec, &machine(), &config).unwrap().namespaces.network);
}

#[test]
fn a_terminal_takes_input_without_being_asked_to() {
    let spec = RunSpec { terminal: Some(TerminalSize::default()), ..spec() };
    assert!(convert(&spec, &machine(), &config()).unwrap().stdin);
}

#[test]
fn the_default_user_is_the_configurations() {
    let config = LocalConfig { default_user: DefaultUser { uid: 7, gid: 8 }, ..config() };
    assert_eq!(convert(&spec(), &machine(), &config).unwrap().user, User { uid: 7, gid: 8 });
}
