//! Puts the layers together: defaults, then the file, then the environment, then flags. Knows of each value where it
//! came from, so that an error can say it.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::Config;

/// What every environment variable of the configuration begins with.
pub const PREFIX: &str = "RUNNER_";

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// The file.
    File(PathBuf),
    /// This variable.
    Env(String),
    /// This flag.
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("the default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// A value that cannot be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Its key, for example `limits.log_bytes`.
    pub key: String,
    /// The value as it was given; `None` where the key itself is wrong.
    pub value: Option<String>,
    /// Who gave it.
    pub source: Source,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.key)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        write!(f, " (from {}): {}", self.source, self.message)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration file {}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("the configuration file {} is not TOML: {message}", path.display())]
    NotToml {
        /// Which.
        path: PathBuf,
        /// What was found where.
        message: String,
    },
    /// The file is not JSON, though its name ends as if it were.
    #[error("the configuration file {} is not JSON", path.display())]
    NotJson {
        /// Which.
        path: PathBuf,
        /// What was found where.
        source: serde_json::Error,
    },
    /// Bad values, all that could be told at once.
    #[error("the configuration is not valid:\n{}", .0.iter().map(|problem| format!("  {problem}")).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Problem>),
}

/// What the layers are made from. Passed in, so that a test needs no process of its own.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    /// The file and its text: JSON where the name ends in `.json`, else TOML.
    pub file: Option<(PathBuf, String)>,
    /// The process's environment, or a part of it.
    pub env: Vec<(String, String)>,
    /// Flag, key, value.
    pub flags: Vec<(&'static str, &'static str, String)>,
}

/// What kinds of JSON value a key takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools, reason = "a set of independent facts")]
struct Kinds {
    integer: bool,
    boolean: bool,
    string: bool,
    structure: bool,
}

/// The configuration's JSON schema, without references.
pub fn schema() -> Value {
    let generator =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true).into_generator();
    generator.into_root_schema_for::<Config>().to_value()
}

/// Every leaf of the schema: its key, and its own schema. A list is one leaf.
pub fn leaves(schema: &Value) -> Vec<(String, Value)> {
    fn walk(prefix: &str, schema: &Value, found: &mut Vec<(String, Value)>) {
        match schema.get("properties").and_then(Value::as_object) {
            Some(properties) => {
                for (name, below) in properties {
                    let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                    walk(&key, below, found);
                }
            }
            None => found.push((prefix.to_owned(), schema.clone())),
        }
    }
    let mut found = Vec::new();
    walk("", schema, &mut found);
    found
}

/// The environment variable of a key: `limits.log_bytes` is `RUNNER_LIMITS__LOG_BYTES`.
pub fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

fn kinds(schema: &Value) -> Kinds {
    let mut kinds = Kinds::default();
    let mut add = |name: &str| match name {
        "integer" | "number" => kinds.integer = true,
        "boolean" => kinds.boolean = true,
        "string" => kinds.string = true,
        "array" | "object" => kinds.structure = true,
        _ => {}
    };
    match schema.get("type") {
        Some(Value::String(name)) => add(name),
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).for_each(add),
        _ => {}
    }
    for list in ["anyOf", "oneOf"] {
        for below in schema.get(list).and_then(Value::as_array).into_iter().flatten() {
            let below = self::kinds(below);
            kinds.integer |= below.integer;
            kinds.boolean |= below.boolean;
            kinds.string |= below.string;
            kinds.structure |= below.structure;
        }
    }
    if schema.get("enum").is_some() || schema.get("const").is_some_and(Value::is_string) {
        kinds.string = true;
    }
    kinds
}

/// Reads a variable's text as the kind of value that its key takes. What does not fit stays text: the type's own error
/// says best what was expected.
fn coerce(text: &str, kinds: Kinds) -> Value {
    if kinds.integer
        && let Ok(number) = text.parse::<i64>()
    {
        return number.into();
    }
    if kinds.boolean
        && let Ok(truth) = text.parse::<bool>()
    {
        return truth.into();
    }
    if kinds.structure
        && let Ok(table) = toml::from_str::<Map<String, Value>>(&format!("value = {text}"))
        && let Some(value) = table.get("value")
    {
        return value.clone();
    }
    Value::String(text.to_owned())
}

/// Reads a file. JSON is for programs that write one, such as Helm: its numbers survive templates, which those of TOML do not.
fn parse(path: &Path, text: &str) -> Result<Value, ConfigError> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return serde_json::from_str(text)
            .map_err(|source| ConfigError::NotJson { path: path.to_owned(), source });
    }
    toml::from_str(text).map_err(|error| ConfigError::NotToml {
        path: path.to_owned(),
        message: error.to_string().trim().to_owned(),
    })
}

fn set(tree: &mut Value, key: &str, value: Value) {
    let mut at = tree;
    for name in key.split('.') {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        let Some(map) = at.as_object_mut() else { return };
        at = map.entry(name.to_owned()).or_insert(Value::Null);
    }
    *at = value;
}

/// Lays `over` onto `tree`. Tables are merged, everything else is replaced. Notes the source of each replaced value.
fn merge(tree: &mut Value, over: Value, key: &str, source: &Source, sources: &mut BTreeMap<String, Source>) {
    match (tree, over) {
        (Value::Object(tree), Value::Object(over)) => {
            for (name, value) in over {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                merge(tree.entry(name).or_insert(Value::Null), value, &key, source, sources);
            }
        }
        (tree, over) => {
            sources.insert(key.to_owned(), source.clone());
            *tree = over;
        }
    }
}

/// The configuration with the source of every value that somebody set.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The effective configuration, validated.
    pub config: Config,
    /// Key to source. What is not here is a default.
    pub sources: BTreeMap<String, Source>,
}

impl Layers {
    /// Puts the layers together and validates the result, once.
    ///
    /// # Errors
    /// Names each bad key with its value and its source.
    pub fn load(self) -> Result<Loaded, ConfigError> {
        let schema = schema();
        let leaves: BTreeMap<String, Kinds> =
            leaves(&schema).into_iter().map(|(key, schema)| (key, kinds(&schema))).collect();
        let mut tree = serde_json::to_value(Config::default()).unwrap_or_else(|_| Value::Object(Map::new()));
        let mut sources = BTreeMap::new();
        let mut problems = Vec::new();

        if let Some((path, text)) = self.file {
            let file = parse(&path, &text)?;
            merge(&mut tree, file, "", &Source::File(path), &mut sources);
        }
        let variables: BTreeMap<String, &String> = leaves.keys().map(|key| (variable(key), key)).collect();
        for (name, text) in self.env {
            if let Some(key) = variables.get(&name) {
                let kinds = leaves.get(*key).copied().unwrap_or_default();
                set(&mut tree, key, coerce(&text, kinds));
                sources.insert((*key).clone(), Source::Env(name));
            } else if let Some(hint) = mistake(&name, &variables) {
                problems.push(Problem {
                    key: name[PREFIX.len()..].to_ascii_lowercase().replace("__", "."),
                    value: None,
                    message: format!("there is no such key; `runner config schema` lists them{hint}"),
                    source: Source::Env(name),
                });
            }
        }
        for (flag, key, text) in self.flags {
            let kinds = leaves.get(key).copied().unwrap_or_default();
            set(&mut tree, key, coerce(&text, kinds));
            sources.insert(key.to_owned(), Source::Flag(flag));
        }

        match serde_path_to_error::deserialize::<_, Config>(tree.clone()) {
            Ok(config) => {
                for (key, message) in config.faults() {
                    problems.push(problem(&tree, &sources, key, message));
                }
                if problems.is_empty() {
                    Ok(Loaded { config, sources })
                } else {
                    Err(ConfigError::Invalid(problems))
                }
            }
            Err(error) => {
                let key = match error.path().to_string() {
                    path if path == "." => String::new(),
                    path => path,
                };
                problems.push(problem(&tree, &sources, key, error.into_inner().to_string()));
                Err(ConfigError::Invalid(problems))
            }
        }
    }
}

/// Whether a variable that is no key was meant to be one; then with a hint. Many begin with `RUNNER_` and are not ours to
/// judge: those of the tests, of a workload that starts a service, and the links that Kubernetes sets in every pod beside
/// a Service that is named `runner`.
fn mistake(name: &str, variables: &BTreeMap<String, &String>) -> Option<String> {
    let key = name.strip_prefix(PREFIX)?;
    let near = variables.keys().find(|known| nearly_equal(known, name));
    let table = key.split_once("__").is_some_and(|(table, _)| {
        variables
            .keys()
            .any(|known| known[PREFIX.len()..].split_once("__").is_some_and(|(other, _)| other == table))
    });
    match near {
        Some(known) => Some(format!("; did you mean {known}?")),
        None => table.then(String::new),
    }
}

/// Whether two names differ by underscores only, or by one letter that is missing, added or another.
fn nearly_equal(a: &str, b: &str) -> bool {
    let plain = |name: &str| name.replace('_', "");
    if plain(a) == plain(b) {
        return true;
    }
    let (short, long) =
        if a.len() <= b.len() { (a.as_bytes(), b.as_bytes()) } else { (b.as_bytes(), a.as_bytes()) };
    let same = short.iter().zip(long).take_while(|(x, y)| x == y).count();
    match long.len() - short.len() {
        0 => short[same..].get(1..) == long[same..].get(1..),
        1 => short[same..] == long[same + 1..],
        _ => false,
    }
}

fn problem(tree: &Value, sources: &BTreeMap<String, Source>, key: String, message: String) -> Problem {
    // `backends[0].slots` was given where `backends` was, and `log.format` may have been given with a whole `log`.
    let whole = key.split('[').next().unwrap_or_default().to_owned();
    let mut at = whole.as_str();
    let source = loop {
        if let Some(source) = sources.get(at) {
            break source.clone();
        }
        // A value that was replaced as a whole below this key, for example a list in place of a table.
        match at.rsplit_once('.') {
            Some((above, _)) => at = above,
            None => {
                let below = format!("{whole}.");
                break sources
                    .iter()
                    .find(|(key, _)| whole.is_empty() || key.starts_with(&below))
                    .map_or(Source::Default, |(_, source)| source.clone());
            }
        }
    };
    let pointer = format!("/{}", key.replace(['.', '['], "/").replace(']', ""));
    let value = tree.pointer(&pointer).filter(|value| !value.is_object() && !value.is_array()).map(|value| {
        let text = value.to_string();
        super::redact(&text[..text.floor_char_boundary(200)])
    });
    Problem { key, value, source, message }
}
