use bytes::Bytes;
use runner_core::{
    id::RunId,
    spec::{Input, InputSource, Output, TerminalSize},
};

use super::*;
use crate::capability::capabilities;

const GIB: u64 = 1 << 30;

struct World {
    spec: RunSpec,
    config: DindConfig,
    image_config: ImageConfig,
}

impl World {
    fn new(spec: RunSpec) -> Self {
        let config = DindConfig {
            egress_network: Some("bridge".into()),
            networks: [("lab".into(), "lab-net".into())].into(),
            ..DindConfig::default()
        };
        Self { spec, config, image_config: ImageConfig::default() }
    }

    fn with<T>(&self, work: impl FnOnce(&Conversion<'_>) -> T) -> T {
        let (plan, capabilities) = (mount_plan(&self.spec).unwrap(), capabilities(&self.config));
        let names = Names::new("service", &self.config.name);
        work(&Conversion {
            attempt: AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 2 },
            spec: &self.spec,
            log_limit_bytes: 99,
            plan: &plan,
            capabilities: &capabilities,
            config: &self.config,
            names: &names,
            image: &ImageId::of_test("sha256:abc"),
            image_config: &self.image_config,
        })
    }

    fn workload(&self) -> ContainerCreateBody {
        self.with(workload).unwrap()
    }

    fn host(&self) -> HostConfig {
        self.workload().host_config.unwrap()
    }

    fn exec(&self) -> ExecSpec {
        self.with(exec_spec).unwrap()
    }
}

fn spec(change: impl FnOnce(&mut RunSpec)) -> RunSpec {
    let mut spec = RunSpec { image: Some("x".into()), command: vec!["true".into()], ..RunSpec::default() };
    change(&mut spec);
    spec
}

fn input(path: &str) -> Input {
    let source = InputSource::Inline(Bytes::from_static(b"x"));
    Input { path: path.to_owned(), source, sha256: None, mode: None, extract: None }
}

fn output(path: &str) -> Output {
    Output { path: path.to_owned(), glob: false, destination: None, required: false, max_bytes: None }
}

/// Every field that is set: what is not in this list is not set, whatever a later version of the model has.
#[test]
fn the_body_of_a_plain_spec_is_this_and_nothing_else() {
    let mut body = serde_json::to_value(World::new(spec(|_| {})).workload()).unwrap();
    let mut host = body["HostConfig"].take();
    assert_eq!(
        host["Mounts"][0]["VolumeOptions"]["Labels"]["runner.attempt"],
        body["Labels"]["runner.attempt"]
    );
    host["Mounts"][0]["VolumeOptions"]["Labels"].take();
    let name = Names::new("service", &"dind".parse().unwrap());
    let attempt = AttemptId { run: RunId::new(uuid::Uuid::from_u128(7)), number: 2 };
    let expected = serde_json::json!({
        "PidsLimit": 4098,
        "Privileged": false,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "NetworkMode": "none",
        "ReadonlyRootfs": false,
        "IpcMode": "private",
        "Init": false,
        "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],
        "ShmSize": SHM_BYTES,
        "LogConfig": {"Type": "none", "Config": {}},
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": false,
        "PublishAllPorts": false,
        "OomKillDisable": false,
        "Mounts": [{
            "Type": "volume",
            "Source": name.volume(attempt, "run"),
            "Target": "/.runner",
            "ReadOnly": false,
            "VolumeOptions": {"NoCopy": true, "Labels": null},
        }],
        "Tmpfs": {
            "/tmp": "rw,exec,nosuid,nodev,size=268435456,mode=1777",
            "/home/runner": "rw,exec,nosuid,nodev,size=268435456,mode=0700,uid=65532,gid=65532",
            "/inputs": "ro,noexec,nosuid,nodev,size=4096,mode=0755",
            "/outputs": "rw,exec,nosuid,nodev,size=268435456,mode=0755,uid=65532,gid=65532",
        },
    });
    assert_eq!(host, expected);
    let expected = serde_json::json!({
        "Image": "sha256:abc",
        "User": "65532:65532",
        "WorkingDir": "/",
        "Entrypoint": ["/.runner/agent"],
        "Cmd": ["contain", "/.runner/run"],
        "AttachStdin": true,
        "AttachStdout": true,
        "OpenStdin": true,
        "StdinOnce": false,
        "Tty": false,
        "Healthcheck": {"Test": ["NONE"]},
        "Labels": body["Labels"],
        "HostConfig": null,
    });
    assert_eq!(body, expected);
}

#[test]
fn every_limit_of_the_spec_becomes_a_limit_of_the_container() {
    let world = World::new(spec(|spec| {
        spec.resources.memory_bytes = Some(GIB);
        spec.resources.cpu_millis = Some(1500);
        spec.resources.pids = Some(20);
        spec.resources.file_size_bytes = Some(7);
        spec.read_only_root = true;
        spec.user = Some(User { uid: 1000, gid: 2000 });
        spec.network = Network::Named("lab".into());
        spec.timeout = Some(Duration::from_secs(5));
        spec.stop_grace = Some(Duration::from_secs(6));
    }));
    let host = world.host();
    assert_eq!((host.memory, host.memory_swap), (Some(GIB.cast_signed()), Some(GIB.cast_signed())));
    assert_eq!((host.cpu_period, host.cpu_quota, host.nano_cpus), (Some(100_000), Some(150_000), None));
    assert_eq!((host.pids_limit, host.readonly_rootfs), (Some(22), Some(true)));
    assert_eq!(host.network_mode.as_deref(), Some("lab-net"));
    assert_eq!(world.workload().user.as_deref(), Some("1000:2000"));
    let exec = world.exec();
    assert_eq!((exec.file_size_bytes, exec.user), (Some(7), User { uid: 1000, gid: 2000 }));
    assert_eq!((exec.timeout.as_secs(), exec.stop_grace.as_secs(), exec.log_limit_bytes), (5, 6, 99));
}

#[test]
fn a_network_that_is_not_configured_is_refused() {
    let mut world = World::new(spec(|spec| spec.network = Network::Egress));
    assert_eq!(world.host().network_mode.as_deref(), Some("bridge"));
    world.config.egress_network = None;
    assert!(world.with(workload).is_err());
    assert!(world.with(exec_spec).is_err());
    world.spec.network = Network::Named("other".into());
    assert!(world.with(workload).is_err());
}

#[test]
fn inputs_are_read_only_in_the_workload_and_writable_at_the_door() {
    let world = World::new(spec(|spec| {
        spec.inputs = vec![input("/inputs/a"), input("/etc/app.conf")];
        spec.outputs = vec![output("/outputs/x"), output("/data/result")];
    }));
    let seen = |body: ContainerCreateBody| -> Vec<(String, bool)> {
        let mounts = body.host_config.unwrap().mounts.unwrap();
        assert!(mounts.iter().all(|mount| mount.typ == Some(MountType::VOLUME)), "nothing of the host");
        let of = |mount: Mount| (mount.target.unwrap(), mount.read_only.unwrap());
        mounts.into_iter().map(of).collect()
    };
    let all = |read_only: bool| {
        [("/.runner", false), ("/data", false), ("/inputs", read_only), ("/outputs", false)]
            .map(|(target, read_only)| (target.to_owned(), read_only))
    };
    assert_eq!(seen(world.workload()), all(true));
    assert_eq!(seen(world.with(door)), all(false));
    world.with(|with| {
        assert!(needs_door(with.plan));
        let behind: Vec<_> = (0..with.plan.mounts.len()).map(|number| behind(with.plan, number)).collect();
        assert_eq!(behind, [Behind::Volume, Behind::Layer, Behind::Volume, Behind::Volume]);
    });
    let tmpfs = world.host().tmpfs.unwrap();
    assert!(!tmpfs.contains_key("/inputs") && !tmpfs.contains_key("/outputs"));
}

#[test]
fn the_door_is_as_hardened_and_has_no_network() {
    let world = World::new(spec(|spec| {
        spec.network = Network::Egress;
        spec.inputs = vec![input("/inputs/a")];
    }));
    let host = world.with(door).host_config.unwrap();
    assert_eq!((host.network_mode.as_deref(), host.privileged), (Some("none"), Some(false)));
    assert_eq!(host.cap_drop, Some(vec!["ALL".to_owned()]));
}

#[test]
fn an_output_in_tmp_takes_the_place_of_our_own_tmp() {
    let world = World::new(spec(|spec| spec.outputs = vec![output("/tmp/x")]));
    assert!(!world.host().tmpfs.unwrap().contains_key("/tmp"));
}

#[test]
fn a_command_replaces_entrypoint_and_cmd_and_arguments_replace_cmd() {
    let words = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    for (command, args, expected) in
        [("", "", "entry e cmd"), ("", "x", "entry e x"), ("run", "", "run"), ("run", "x y", "run x y")]
    {
        let mut world = World::new(spec(|spec| (spec.command, spec.args) = (words(command), words(args))));
        world.image_config.entrypoint = Some(words("entry e"));
        world.image_config.cmd = Some(words("cmd"));
        assert_eq!(world.exec().argv, words(expected), "{command:?} {args:?}");
    }
    let world = World::new(spec(|spec| spec.command.clear()));
    assert!(world.with(exec_spec).is_err(), "nobody says what to execute");
}

#[test]
fn the_environment_is_the_images_then_ours_then_the_specs() {
    let mut world = World::new(spec(|spec| {
        spec.env = [("USER".to_owned(), "me".to_owned()), ("A".to_owned(), "spec".to_owned())].into();
        spec.terminal = Some(TerminalSize::default());
    }));
    world.image_config.env =
        Some(["PATH=/image", "A=image", "B=b=c", "HOME=/image"].map(str::to_owned).to_vec());
    world.image_config.working_dir = Some("/work".into());
    let exec = world.exec();
    for (name, value) in [
        ("PATH", "/image"),
        ("A", "spec"),
        ("B", "b=c"),
        ("HOME", HOME),
        ("USER", "me"),
        ("TERM", "xterm"),
        ("RUNNER_ATTEMPT", "2"),
    ] {
        assert_eq!(exec.env.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert_eq!(world.workload().env, None, "nothing of it is the container's own");
    assert_eq!((exec.working_dir.as_str(), exec.stdin), ("/work", true));
    world.spec.working_dir = Some("/tmp".into());
    assert_eq!(world.exec().working_dir, "/tmp");
}

#[test]
fn the_shim_confines_nothing_itself() {
    let exec = World::new(spec(|_| {})).exec();
    assert_eq!(exec.root, Root::Host { hidden: Vec::new() });
    assert_eq!(exec.namespaces, Namespaces::default());
    assert!(exec.mounts.is_empty() && exec.cgroup.is_none() && !exec.read_only_root);
}
