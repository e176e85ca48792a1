use serde_json::{Value, json};

use super::{
    layers::{leaves, schema, variable},
    *,
};

fn load(
    file: &str,
    env: &[(&str, &str)],
    flags: &[(&'static str, &'static str, &str)],
) -> Result<Loaded, ConfigError> {
    Layers {
        file: (!file.is_empty()).then(|| (PathBuf::from("/etc/runner.toml"), file.to_owned())),
        env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        flags: flags.iter().map(|(flag, key, value)| (*flag, *key, (*value).to_owned())).collect(),
    }
    .load()
}

fn problems(result: Result<Loaded, ConfigError>) -> Vec<Problem> {
    match result {
        Err(ConfigError::Invalid(problems)) => problems,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_default_is_valid_and_loopback_only() {
    let loaded = load("", &[], &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
    assert!(loaded.config.listen.ip().is_loopback() && loaded.config.ops_listen.ip().is_loopback());
    assert!(loaded.sources.is_empty());
}

#[test]
fn each_layer_wins_over_the_one_before() {
    let file = "listen = '127.0.0.1:1'\nops_listen = '127.0.0.1:2'\n[shutdown]\ndrain = '1s'\n";
    let env = [("RUNNER_LISTEN", "127.0.0.1:3"), ("RUNNER_OPS_LISTEN", "127.0.0.1:4")];
    let loaded = load(file, &env, &[("--listen", "listen", "127.0.0.1:5")]).unwrap();
    assert_eq!(loaded.config.listen.port(), 5);
    assert_eq!(loaded.config.ops_listen.port(), 4);
    assert_eq!(loaded.config.shutdown.drain, Span::secs(1));
    assert_eq!(loaded.sources["listen"], Source::Flag("--listen"));
    assert_eq!(loaded.sources["ops_listen"], Source::Env("RUNNER_OPS_LISTEN".to_owned()));
    assert_eq!(loaded.sources["shutdown.drain"], Source::File("/etc/runner.toml".into()));
}

/// A file with a certificate in it, as far as the configuration looks: the source that looks for the words has them.
const CA_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/config/inputs.rs");

/// A valid value for a leaf that differs from its default.
fn another(key: &str, leaf: &Value, default: Option<&Value>) -> Value {
    if let Some(special) = match key {
        "listen" => Some(json!("127.0.0.1:1234")),
        "unauthenticated_callers" => Some(json!("whoever reaches the port is trusted")),
        "unauthenticated_roles" => Some(json!(["worker"])),
        "ops_listen" => Some(json!("127.0.0.1:1235")),
        "data_dir" => Some(json!("/srv/runner")),
        "store.url" => Some(json!("postgres://runner@127.0.0.1/runner")),
        "store.password_file" => Some(json!("/run/secrets/state")),
        "store.ca_file" => Some(json!("/run/secrets/ca")),
        "object_store.url" => Some(json!("file:///srv/objects")),
        "inputs.https.allow_addresses" => Some(json!(["10.1.0.0/16"])),
        "inputs.https.ca_file" => Some(json!(CA_FILE)),
        "inputs.https.hosts" => Some(json!(["example.org"])),
        "object_store.endpoint" => Some(json!("https://127.0.0.1:9000")),
        "object_store.agent_endpoint" => Some(json!("https://127.0.0.1:9001")),
        "object_store.agent_ca_file" => Some(json!(CA_FILE)),
        "object_store.agent_url_lifetime" => Some(json!("61s")),
        "object_store.credentials_file" => Some(json!("/run/secrets/store")),
        "object_store.settings" => Some(json!({ "region": "somewhere" })),
        "default_backend" => Some(json!("local")),
        "backends" => Some(json!([{ "kind": "local", "name": "local", "slots": 7 }])),
        "traffic" => Some(json!({ "default": { "backend": "local" } })),
        "agent_listen" => Some(json!("0.0.0.0:7602")),
        "log.filter" => Some(json!("warn,runner_core=trace")),
        "shutdown.drain" => Some(json!("7s")),
        _ => None,
    } {
        return special;
    }
    let text = leaf.to_string();
    if let Some(options) = leaf.get("oneOf").or_else(|| leaf.get("enum")).and_then(Value::as_array) {
        let names: Vec<Value> = options.iter().map(|o| o.get("const").unwrap_or(o).clone()).collect();
        return names.into_iter().find(|name| Some(name) != default).unwrap();
    }
    // A ceiling stays above its default.
    let ceiling = key.ends_with(".ceiling");
    if text.contains("\"span\"") {
        return json!(if ceiling { "3650days" } else { "31s" });
    }
    if text.contains("\"byte-size\"") {
        return json!(if ceiling { 1_u64 << 50 } else { 1_048_575 });
    }
    if text.contains("\"boolean\"") {
        return json!(default != Some(&json!(true)));
    }
    if text.contains("\"integer\"") {
        return json!(if ceiling { 2_000_000_000 } else { 15 });
    }
    panic!("{key}: say in this test what another value of {leaf} is")
}

/// What a leaf is of no use without, so that it is refused alone.
fn needed_beside(key: &str) -> Option<(&'static str, &'static str)> {
    match key {
        "store.password_file" | "store.ca_file" => Some(("store.url", "postgres://runner@127.0.0.1/runner")),
        "object_store.agent_endpoint" => Some(("object_store.url", "s3://bucket")),
        _ => None,
    }
}

fn at<'a>(tree: &'a Value, key: &str) -> Option<&'a Value> {
    tree.pointer(&format!("/{}", key.replace('.', "/")))
}

#[test]
fn schema_file_and_environment_agree_on_every_leaf() {
    let defaults = serde_json::to_value(Config::default()).unwrap();
    let leaves = leaves(&schema());
    assert!(leaves.len() > 40, "the walk found only {} leaves", leaves.len());
    for (key, leaf) in leaves {
        let value = another(&key, &leaf, at(&defaults, &key));
        let as_toml = toml::Value::try_from(&value).unwrap();
        let beside = needed_beside(&key);
        let first = beside.map_or_else(String::new, |(key, value)| format!("{key} = '{value}'\n"));
        let by_file =
            load(&format!("{first}{key} = {as_toml}"), &[], &[]).unwrap_or_else(|e| panic!("{key}: {e}"));
        let as_text = value.as_str().map_or_else(|| as_toml.to_string(), str::to_owned);
        let mut env = vec![(variable(&key), as_text)];
        env.extend(beside.map(|(key, value)| (variable(key), value.to_owned())));
        let env: Vec<_> = env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let by_env = load("", &env, &[]).unwrap_or_else(|e| panic!("{key}: {e}"));
        assert_eq!(by_file.config, by_env.config, "{key}");
        if key != "default_backend" {
            assert_ne!(by_file.config, Config::default(), "{key} changed nothing");
        }
    }
}

#[test]
fn no_leaf_is_hidden_by_kubernetes_service_links() {
    for (key, _) in leaves(&schema()) {
        let name = variable(&key);
        assert!(!name.starts_with("RUNNER_PORT") && !name.starts_with("RUNNER_SERVICE_"), "{key}");
    }
    let others =
        ["RUNNER_PORT", "RUNNER_PORT_7600_TCP_ADDR", "RUNNER_SERVICE_HOST", "RUNNER_RUN_ID", "RUNNER_X__Y"];
    for name in others {
        load("", &[(name, "x")], &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn a_bad_value_is_told_with_key_value_and_source() {
    let bad = problems(load("", &[("RUNNER_LIMITS__LOG_BYTES", "much")], &[]));
    assert_eq!(bad.len(), 1);
    assert_eq!(bad[0].key, "limits.log_bytes");
    assert_eq!(bad[0].value.as_deref(), Some("\"much\""));
    assert_eq!(bad[0].source, Source::Env("RUNNER_LIMITS__LOG_BYTES".to_owned()));

    let bad = problems(load("[log]\nformat = 'xml'", &[], &[]));
    assert_eq!(
        (bad[0].key.as_str(), &bad[0].source),
        ("log.format", &Source::File("/etc/runner.toml".into()))
    );

    let bad = problems(load("", &[], &[("--listen", "listen", "nowhere")]));
    assert_eq!((bad[0].key.as_str(), &bad[0].source), ("listen", &Source::Flag("--listen")));
}

#[test]
fn all_that_does_not_fit_together_is_told_at_once() {
    let file = "default_backend = 'x'\n[shutdown]\ndrain = '31s'\n[limits.pids]\ndefault = 10\nceiling = 9\n[object_store]\nurl = 's3://user:secret@bucket/x?sig=1'";
    let bad = problems(load(file, &[], &[]));
    let keys: Vec<&str> = bad.iter().map(|problem| problem.key.as_str()).collect();
    assert_eq!(keys, ["default_backend", "object_store.url", "shutdown.drain", "limits.pids"]);
    let shown = bad.iter().map(ToString::to_string).collect::<String>();
    assert!(!shown.contains("secret") && !shown.contains("sig=1"), "{shown}");
}

#[test]
fn unknown_keys_and_kinds_are_refused() {
    let bad = problems(load("[limits]\nlogbytes = 1", &[], &[]));
    assert!(bad[0].message.contains("unknown field `logbytes`"), "{bad:?}");
    let bad = problems(load("[[backends]]\nkind = 'mainframe'", &[], &[]));
    assert!(
        bad[0].key.starts_with("backends[0]") && bad[0].message.contains("unknown variant `mainframe`"),
        "{bad:?}"
    );
    let bad = problems(load("[[backends]]\nkind = 'local'\nslot = 1", &[], &[]));
    assert!(bad[0].message.contains("unknown field `slot`"), "{bad:?}");
    let bad = problems(load("", &[("RUNNER_LIMITS__LOGBYTES", "1")], &[]));
    assert!(bad[0].message.contains("did you mean RUNNER_LIMITS__LOG_BYTES?"), "{bad:?}");
    let bad = problems(load("", &[("RUNNER_LISTN", "127.0.0.1:1")], &[]));
    assert!(bad[0].message.contains("did you mean RUNNER_LISTEN?"), "{bad:?}");
    assert_eq!(problems(load("", &[("RUNNER_LIMITS__NOTHING_LIKE_IT", "1")], &[])).len(), 1);
}

#[test]
fn trust_in_callers_is_said_in_these_words_or_not_at_all() {
    let words = UnauthenticatedCallers::Trusted.as_str();
    let loaded = load(&format!("unauthenticated_callers = '{words}'"), &[], &[]).unwrap();
    assert_eq!(loaded.config.unauthenticated_callers, Some(UnauthenticatedCallers::Trusted));
    assert_eq!(load("", &[], &[]).unwrap().config.unauthenticated_callers, None);
    for other in ["true", "'yes'", "'trusted'", "''"] {
        let bad = problems(load(&format!("unauthenticated_callers = {other}"), &[], &[]));
        assert_eq!(bad[0].key, "unauthenticated_callers", "{bad:?}");
    }
}

#[test]
fn a_file_of_json_says_the_same_as_one_of_toml() {
    let json = |text: &str| {
        Layers { file: Some((PathBuf::from("/etc/runner.json"), text.to_owned())), ..Layers::default() }
            .load()
    };
    let toml = load("[limits]\nlog_bytes = 5_000_000_000\n[shutdown]\ndrain = '3s'", &[], &[]).unwrap();
    let same = json(r#"{"limits": {"log_bytes": 5000000000}, "shutdown": {"drain": "3s"}}"#).unwrap();
    assert_eq!(same.config, toml.config);
    assert_eq!(same.sources["shutdown.drain"], Source::File("/etc/runner.json".into()));
    assert!(matches!(json("[limits]"), Err(ConfigError::NotJson { .. })));
    let bad = problems(json(r#"{"limits": {"log_bytes": 1.5}}"#));
    assert_eq!((bad[0].key.as_str(), bad[0].value.as_deref()), ("limits.log_bytes", Some("1.5")));
}

#[test]
fn a_dump_reads_back() {
    let mut config = Config::default();
    config.object_store.url = Some("file:///srv/objects".to_owned());
    let text = toml::to_string_pretty(&config).unwrap();
    assert_eq!(load(&text, &[], &[]).unwrap().config, config, "{text}");
}

#[test]
fn credentials_in_urls_are_redacted() {
    assert_eq!(redact("s3://key:secret@host/bucket?sig=1"), "s3://REDACTED@host/bucket?REDACTED");
    assert_eq!(redact("file:///a@b/c"), "file:///a@b/c");
    assert_eq!(redact("plain"), "plain");
}

#[test]
fn the_default_data_directory_follows_the_user() {
    let home = || Some(PathBuf::from("/home/u"));
    assert_eq!(default_data_dir(true, None, home()), Path::new("/var/lib/runner"));
    assert_eq!(default_data_dir(false, None, home()), Path::new("/home/u/.local/share/runner"));
    assert_eq!(default_data_dir(false, Some("/x".into()), home()), Path::new("/x/runner"));
    assert_eq!(
        default_data_dir(false, Some("relative".into()), home()),
        Path::new("/home/u/.local/share/runner")
    );
}

fn dind(more: &str) -> String {
    format!("default_backend = 'local'\n[[backends]]\nkind = 'local'\n[[backends]]\nkind = 'dind'\n{more}")
}

fn keys(result: Result<Loaded, ConfigError>) -> Vec<String> {
    problems(result).into_iter().map(|problem| problem.key).collect()
}

#[test]
fn several_docker_backends_are_a_pool_and_each_has_a_name_of_its_own() {
    let pool = "name = 'a'\n[[backends]]\nkind = 'dind'\nname = 'b'\nhost = 'tcp://127.0.0.1:2375'";
    assert_eq!(load(&dind(pool), &[], &[]).unwrap().config.backends.len(), 3);
    let same = "name = 'a'\n[[backends]]\nkind = 'dind'\nname = 'a'";
    assert_eq!(keys(load(&dind(same), &[], &[])), ["backends[2].name"]);
    let bad = "host = 'tcp://engine:2375'\nimages = { concurrent_pulls = 0 }";
    assert_eq!(keys(load(&dind(bad), &[], &[])), ["backends[1].tls", "backends[1].images.concurrent_pulls"]);
}

#[test]
fn a_docker_backend_in_production_must_be_acknowledged_by_its_name() {
    let production = |more: &str| load(&format!("environment = 'production'\n{}", dind(more)), &[], &[]);
    let key = ["backends[1].acknowledged_for_production"];
    assert_eq!(keys(production("")), key);
    assert_eq!(keys(production("acknowledged_for_production = 'another'")), key);
    production("acknowledged_for_production = 'dind'").unwrap();
    // Elsewhere nobody has to.
    load(&format!("environment = 'staging'\n{}", dind("")), &[], &[]).unwrap();
}

#[test]
fn two_local_backends_would_share_a_directory() {
    let file = "[[backends]]\nkind = 'local'\n[[backends]]\nkind = 'local'\nname = 'other'";
    assert_eq!(keys(load(file, &[], &[])), ["backends[1].kind"]);
}
