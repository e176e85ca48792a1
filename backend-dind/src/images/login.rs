//! Credentials of registries: from the configuration, else from a docker config file.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use bollard::auth::DockerCredentials;
use runner_core::id::TenantId;
use serde::Deserialize;

use super::{
    config::{ImagesConfig, RegistryLogin},
    reference::DEFAULT_REGISTRY,
};

/// What engines and docker config files call the default registry.
const DEFAULT_REGISTRY_KEY: &str = "https://index.docker.io/v1/";
/// Larger is no file of credentials.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Text that is never printed: neither `Debug` nor `Display`.
#[derive(Clone)]
pub(crate) struct Secret(String);

impl Secret {
    /// The text, for the one place that sends it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

/// Which credentials: two tenants with the same ones may have the same images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum LoginId {
    /// None at all.
    Anonymous,
    /// The entry of the configuration.
    Configured(usize),
    /// The docker config file.
    DockerConfig,
}

/// What is shown to a registry.
pub(crate) struct Login {
    pub(crate) id: LoginId,
    shown: Option<Shown>,
}

struct Shown {
    server: String,
    username: Secret,
    password: Secret,
    /// In place of the password, where a registry gave one.
    identity_token: Option<Secret>,
}

impl Login {
    /// In the engine's form. Made where it is sent, and not kept: the engine library's type prints what is in it.
    pub(crate) fn to_engine(&self) -> Option<DockerCredentials> {
        let shown = self.shown.as_ref()?;
        let text = |secret: &Secret| Some(secret.expose().to_owned());
        Some(match &shown.identity_token {
            Some(token) => DockerCredentials {
                serveraddress: Some(shown.server.clone()),
                identitytoken: text(token),
                ..DockerCredentials::default()
            },
            None => DockerCredentials {
                serveraddress: Some(shown.server.clone()),
                username: text(&shown.username),
                password: text(&shown.password),
                ..DockerCredentials::default()
            },
        })
    }
}

/// Why credentials cannot be had. Never says anything of what is in them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoginError {
    #[error("read the credentials in {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the credentials in {} are malformed", .0.display())]
    Malformed(PathBuf),
    #[error("the environment variable {0} is not set")]
    NotSet(String),
}

/// A docker config file, as far as it matters.
#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

/// What to show to `registry` for `tenant`. Reads files: blocks.
pub(crate) fn find(config: &ImagesConfig, registry: &str, tenant: &TenantId) -> Result<Login, LoginError> {
    let server = if registry == DEFAULT_REGISTRY { DEFAULT_REGISTRY_KEY } else { registry };
    let fits = |login: &RegistryLogin| {
        login.registry == registry
            && (login.tenants.is_empty() || login.tenants.iter().any(|allowed| allowed == tenant.as_str()))
    };
    if let Some((i, login)) = config.logins.iter().enumerate().find(|(_, login)| fits(login)) {
        let shown = Shown {
            server: server.to_owned(),
            username: Secret(login.username.clone()),
            password: password(login)?,
            identity_token: None,
        };
        return Ok(Login { id: LoginId::Configured(i), shown: Some(shown) });
    }
    if let Some(path) = &config.docker_config
        && let Some(shown) = from_docker_config(path, registry, server)?
    {
        return Ok(Login { id: LoginId::DockerConfig, shown: Some(shown) });
    }
    Ok(Login { id: LoginId::Anonymous, shown: None })
}

fn password(login: &RegistryLogin) -> Result<Secret, LoginError> {
    match (&login.password_file, &login.password_env) {
        (Some(path), _) => Ok(Secret(read(path)?.trim_end_matches(['\r', '\n']).to_owned())),
        (None, Some(name)) => std::env::var(name).map(Secret).map_err(|_| LoginError::NotSet(name.clone())),
        (None, None) => Err(LoginError::NotSet(String::new())),
    }
}

fn read(path: &Path) -> Result<String, LoginError> {
    let fail = |source| LoginError::Read { path: path.to_owned(), source };
    if fs::metadata(path).map_err(fail)?.len() > MAX_FILE_BYTES {
        return Err(LoginError::Malformed(path.to_owned()));
    }
    fs::read_to_string(path).map_err(fail)
}

fn from_docker_config(path: &Path, registry: &str, server: &str) -> Result<Option<Shown>, LoginError> {
    let malformed = || LoginError::Malformed(path.to_owned());
    // Whatever a parser says of the file may quote it.
    let config: DockerConfig = serde_json::from_str(&read(path)?).map_err(|_| malformed())?;
    let bare = |key: &str| {
        let key = key.trim_start_matches("https://").trim_start_matches("http://");
        key.split('/').next().unwrap_or(key).to_owned()
    };
    let fits = |key: &str| key == server || bare(key) == registry;
    let Some((_, entry)) = config.auths.iter().find(|(key, _)| fits(key)) else { return Ok(None) };
    // What `docker login` leaves behind where a helper keeps the credentials.
    if entry.auth.is_empty() && entry.identity_token.is_empty() {
        return Ok(None);
    }
    let decoded =
        decode_base64(&entry.auth).and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(malformed)?;
    let (username, password) = decoded.split_once(':').unwrap_or((&decoded, ""));
    let identity_token = (!entry.identity_token.is_empty()).then(|| Secret(entry.identity_token.clone()));
    Ok(Some(Shown {
        server: server.to_owned(),
        username: Secret(username.to_owned()),
        password: Secret(password.trim_end_matches('\0').to_owned()),
        identity_token,
    }))
}

/// RFC 4648, section 4, with or without padding.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 3);
    let (mut bits, mut count) = (0_u32, 0_u32);
    for byte in text.trim().trim_end_matches('=').bytes() {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    fn shown(config: &ImagesConfig, registry: &str, who: &str) -> (LoginId, Option<(String, String)>) {
        // The error has no `Debug`, so that no credential is ever printed.
        let Ok(login) = find(config, registry, &tenant(who)) else { panic!("no credentials for {registry}") };
        let pair = login.shown.map(|s| (s.username.expose().to_owned(), s.password.expose().to_owned()));
        (login.id, pair)
    }

    #[test]
    fn the_first_entry_for_the_registry_and_the_tenant_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let login = |user: &str, password: &str, tenants: &[&str]| RegistryLogin {
            registry: "r.example".into(),
            username: user.into(),
            password_file: Some(file(user, password)),
            password_env: None,
            tenants: tenants.iter().map(|&name| name.to_owned()).collect(),
        };
        // alice:wonderland
        let docker = r#"{"auths": {"https://r.example/v2/": {"auth": "YWxpY2U6d29uZGVybGFuZA=="}, "empty.example": {}},
                        "credHelpers": {"x": "y"}}"#;
        let mut config = ImagesConfig {
            logins: vec![
                login("a", "secret-a\n", &["team-a"]),
                login("b", " secret:b", &["team-b", "team-c"]),
            ],
            ..ImagesConfig::default()
        };
        let pair = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(shown(&config, "r.example", "team-a"), (LoginId::Configured(0), pair("a", "secret-a")));
        assert_eq!(shown(&config, "r.example", "team-c"), (LoginId::Configured(1), pair("b", " secret:b")));
        assert_eq!(shown(&config, "r.example", "other"), (LoginId::Anonymous, None));
        assert_eq!(shown(&config, "other.example", "team-a"), (LoginId::Anonymous, None));
        config.docker_config = Some(file("config.json", docker));
        assert_eq!(shown(&config, "r.example", "team-a").0, LoginId::Configured(0));
        assert_eq!(
            shown(&config, "r.example", "other"),
            (LoginId::DockerConfig, pair("alice", "wonderland"))
        );
        assert_eq!(shown(&config, "empty.example", "other"), (LoginId::Anonymous, None));
    }

    #[test]
    fn a_file_that_is_no_docker_config_is_an_error_that_quotes_nothing_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        for text in [
            r#"{"auths": {"r.example": {"auth": "hunter2!"}}}"#,
            r#"{"auths": {"r.example": "hunter2"}}"#,
            "hunter2",
        ] {
            fs::write(&path, text).unwrap();
            let config = ImagesConfig { docker_config: Some(path.clone()), ..ImagesConfig::default() };
            let error = find(&config, "r.example", &tenant("t")).err().expect("an error");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn base64_is_decoded() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg", "foob"),
            ("Pz8/fn4+", "??? ~~>"),
        ] {
            let bytes = bytes.replace(' ', "");
            assert_eq!(decode_base64(text), Some(bytes.into_bytes()), "{text}");
        }
        assert_eq!(decode_base64("a b"), None);
    }
}
