//! From a URL and its options to a store.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use object_store::{
    BackoffConfig, ClientOptions, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactStore},
    clock::Clock,
};

use super::{
    Dialect, ObjectArtifacts, Tuning,
    credentials::{FromFile, aws_shared_file},
    http::TypingConnector,
};
use crate::directory::DirectoryArtifacts;

/// Which store, and how it is spoken to.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// Where the store answers, where it is not its provider's own: `https://host:port`.
    pub endpoint: Option<String>,
    /// Permits plain `http`.
    pub allow_http: bool,
    /// A file with credentials, read again when it changes. S3: as `~/.aws/credentials`, section `$AWS_PROFILE` or
    /// `default`. Google: a service account's JSON. Azure: the account's key. `None`: the usual chain: the environment, the
    /// tools' own files, the instance.
    pub credentials_file: Option<PathBuf>,
    /// Further settings of the store's client, by the names that `object_store` gives them, such as `region` or
    /// `virtual_hosted_style_request`. Never secrets.
    pub settings: BTreeMap<String, String>,
    /// How transfers are done.
    pub tuning: Tuning,
}

/// What a URL names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Directory(PathBuf),
    Bucket { scheme: Scheme, bucket: String, prefix: String },
}

/// A kind of store that is reached by HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    S3,
    Google,
    Azure,
}

/// A prefix takes room from every key; stores allow 1,024 bytes of both.
const MAX_PREFIX: usize = 200;

/// Says why `url` and these options name no store that this build knows; nothing is opened.
///
/// # Errors
/// For people, without the URL.
pub fn check_url(url: &str, options: &StoreOptions) -> Result<(), String> {
    match parse(url)? {
        Place::Directory(_) => Ok(()),
        Place::Bucket { scheme, .. } => {
            if let Some(endpoint) = &options.endpoint {
                check_endpoint(endpoint, options.allow_http)?;
            }
            options.settings.keys().try_for_each(|key| check_setting(scheme, key))
        }
    }
}

fn check_endpoint(endpoint: &str, allow_http: bool) -> Result<(), String> {
    let Some((scheme, rest)) = endpoint.split_once("://") else {
        return Err("the endpoint must be a URL".to_owned());
    };
    if rest.is_empty() || rest.contains(['@', '?', '#']) {
        return Err("the endpoint must be `https://host:port`, without credentials or query".to_owned());
    }
    match scheme {
        "https" => Ok(()),
        "http" if allow_http => Ok(()),
        "http" => Err("the endpoint is plain http, which `allow_http` does not permit".to_owned()),
        _ => Err("the endpoint must be an https URL".to_owned()),
    }
}

/// Settings that hold secrets, or that have a place of their own.
fn check_setting(scheme: Scheme, key: &str) -> Result<(), String> {
    let key = key.to_ascii_lowercase();
    let secret = ["secret", "token", "password", "access_key", "account_key", "master_key", "sas_key"];
    if secret.iter().any(|word| key.contains(word)) && !key.ends_with("_file") {
        return Err(format!("`{key}` is a secret: give it by the environment or by `credentials_file`"));
    }
    if ["endpoint", "allow_http", "base_url", "bucket", "container", "proxy_ca"]
        .iter()
        .any(|word| key.contains(word))
    {
        return Err(format!("`{key}` is set elsewhere, not among the settings"));
    }
    if ["allow_invalid_certificates", "skip_signature", "timeout"].iter().any(|word| key.contains(word)) {
        return Err(format!("`{key}` cannot be set"));
    }
    let known = match scheme {
        Scheme::S3 => key.parse::<AmazonS3ConfigKey>().is_ok(),
        Scheme::Google => key.parse::<GoogleConfigKey>().is_ok(),
        Scheme::Azure => key.parse::<AzureConfigKey>().is_ok(),
    };
    if known { Ok(()) } else { Err(format!("`{key}` is no setting of this store")) }
}

fn parse(url: &str) -> Result<Place, String> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return if url.is_empty() { Err("it is empty".to_owned()) } else { Ok(Place::Directory(url.into())) };
    };
    let scheme = match scheme {
        "file" => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            if !path.starts_with('/') {
                return Err("a file URL has three slashes: file:///path".to_owned());
            }
            let path = percent_encoding::percent_decode_str(path)
                .decode_utf8()
                .map_err(|_| "its path is not UTF-8".to_owned())?;
            return Ok(Place::Directory(PathBuf::from(path.as_ref())));
        }
        "s3" => Scheme::S3,
        "gs" => Scheme::Google,
        "az" => Scheme::Azure,
        _ => {
            return Err("its scheme is none of file:///path, s3://, gs:// and az://".to_owned());
        }
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() || bucket.contains(['@', ':', '?', '#']) {
        return Err("it names no bucket: `s3://bucket/prefix`, without credentials".to_owned());
    }
    let prefix = prefix.trim_end_matches('/');
    if prefix.len() > MAX_PREFIX {
        return Err(format!("its prefix is longer than {MAX_PREFIX} bytes"));
    }
    if !prefix.is_empty() && runner_core::spec::path::relative_fault(prefix).is_some() {
        return Err("its prefix is no plain path".to_owned());
    }
    Ok(Place::Bucket { scheme, bucket: bucket.to_owned(), prefix: prefix.to_owned() })
}

/// Opens the store that `url` names: a path, `file:///path`, `s3://bucket/prefix`, `gs://bucket/prefix` or
/// `az://container/prefix`. Blocks for a directory. A bucket is not asked for: see [`ArtifactStore::probe`].
///
/// # Errors
/// `Other` where the URL is none, or an option does not fit; else the store's error. Never holds a secret.
pub fn open_url(
    url: &str,
    options: &StoreOptions,
    clock: &Arc<dyn Clock>,
) -> Result<Arc<dyn ArtifactStore>, ArtifactError> {
    let refused =
        |why: String| ArtifactError::new(ArtifactErrorKind::Other, format!("open the object store: {why}"));
    check_url(url, options).map_err(refused)?;
    let (scheme, bucket, prefix) = match parse(url).map_err(refused)? {
        Place::Directory(path) => return Ok(Arc::new(DirectoryArtifacts::open(&path)?)),
        Place::Bucket { scheme, bucket, prefix } => (scheme, bucket, prefix),
    };
    let failed = |error: object_store::Error| {
        ArtifactError::with_source(ArtifactErrorKind::Other, format!("open the object store {url}"), error)
    };
    let tuning = options.tuning.clone();
    let opened = match scheme {
        Scheme::S3 => {
            let store = Arc::new(s3(&bucket, options).build().map_err(failed)?);
            ObjectArtifacts::new(Arc::clone(&store), &prefix, tuning, clock).with_signer(Dialect::S3, store)
        }
        Scheme::Google => {
            let store = Arc::new(google(&bucket, options).build().map_err(failed)?);
            ObjectArtifacts::new(Arc::clone(&store), &prefix, tuning, clock)
                .with_signer(Dialect::Other, store)
        }
        Scheme::Azure => {
            let store = Arc::new(azure(&bucket, options).build().map_err(failed)?);
            ObjectArtifacts::new(Arc::clone(&store), &prefix, tuning, clock)
                .with_signer(Dialect::Other, store)
        }
    };
    Ok(Arc::new(opened))
}

fn client(options: &StoreOptions) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(options.allow_http)
        .with_connect_timeout(options.tuning.connect_timeout)
        // Whole requests are limited by their size, above; here only what stands still is.
        .with_timeout_disabled()
        .with_read_timeout(options.tuning.stall_timeout)
        .with_pool_max_idle_per_host(options.tuning.connections)
        .with_pool_idle_timeout(Duration::from_secs(30))
}

/// A few quick repeats with the same signature; the patient ones, with a fresh one, are made above.
fn quick_retry(tuning: &Tuning) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { init_backoff: tuning.backoff, max_backoff: tuning.max_backoff, base: 2. },
        max_retries: 1,
        retry_timeout: Duration::from_secs(60),
    }
}

fn s3(bucket: &str, options: &StoreOptions) -> AmazonS3Builder {
    let mut builder = AmazonS3Builder::from_env();
    for (key, value) in &options.settings {
        if let Ok(key) = key.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    let profile = || std::env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned());
    // The chain of the AWS tools: the environment comes before the shared file, and that before the instance.
    let in_environment = ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    let file = match &options.credentials_file {
        Some(path) => Some(path.clone()),
        None if in_environment => None,
        None => aws_shared_file(),
    };
    if let Some(path) = file {
        builder = builder.with_credentials(Arc::new(FromFile::aws(Path::new(&path), profile())));
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }
    builder
        .with_bucket_name(bucket)
        // One request a key: the bulk request is not everywhere, and answers failures in a body of its own.
        .with_disable_bulk_delete(true)
        .with_client_options(client(options))
        .with_retry(quick_retry(&options.tuning))
        .with_http_connector(TypingConnector)
}

fn google(bucket: &str, options: &StoreOptions) -> GoogleCloudStorageBuilder {
    let mut builder = GoogleCloudStorageBuilder::from_env();
    for (key, value) in &options.settings {
        if let Ok(key) = key.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(path) = &options.credentials_file {
        builder = builder.with_service_account_path(path.to_string_lossy());
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    builder
        .with_bucket_name(bucket)
        .with_client_options(client(options))
        .with_retry(quick_retry(&options.tuning))
        .with_http_connector(TypingConnector)
}

fn azure(container: &str, options: &StoreOptions) -> MicrosoftAzureBuilder {
    let mut builder = MicrosoftAzureBuilder::from_env();
    for (key, value) in &options.settings {
        if let Ok(key) = key.to_ascii_lowercase().parse() {
            builder = builder.with_config(key, value);
        }
    }
    if let Some(path) = &options.credentials_file {
        builder = builder.with_credentials(Arc::new(FromFile::azure(path)));
    }
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    builder
        .with_container_name(container)
        .with_client_options(client(options))
        .with_retry(quick_retry(&options.tuning))
        .with_http_connector(TypingConnector)
}

#[cfg(test)]
mod tests {
    use runner_core::clock;

    use super::*;

    fn open(url: &str, options: &StoreOptions) -> Result<Arc<dyn ArtifactStore>, ArtifactError> {
        open_url(url, options, &clock::system().0)
    }

    #[test]
    fn paths_and_file_urls_name_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a b");
        let text = path.to_str().unwrap();
        for url in [text.to_owned(), format!("file://{}", text.replace(' ', "%20"))] {
            assert!(open(&url, &StoreOptions::default()).is_ok(), "{url}");
            assert!(path.join("objects").is_dir());
        }
        for bad in ["", "file://host/x", "file://x", "ftp://x/y", "https://bucket/x"] {
            let error = open(bad, &StoreOptions::default()).map(drop).unwrap_err();
            assert_eq!(error.kind, ArtifactErrorKind::Other, "{bad}");
        }
    }

    #[test]
    fn a_bucket_s_url_is_taken_apart() {
        let bucket = |scheme, bucket: &str, prefix: &str| Place::Bucket {
            scheme,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        };
        assert_eq!(parse("s3://b"), Ok(bucket(Scheme::S3, "b", "")));
        assert_eq!(parse("s3://b/"), Ok(bucket(Scheme::S3, "b", "")));
        assert_eq!(parse("gs://b/x/y/"), Ok(bucket(Scheme::Google, "b", "x/y")));
        assert_eq!(parse("az://c/p"), Ok(bucket(Scheme::Azure, "c", "p")));
        for bad in ["s3://", "s3:///x", "s3://key:secret@b/x", "s3://b/../x", "s3://b//x", "s3://b?x=y"] {
            let error = parse(bad).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn plain_http_and_secrets_are_refused() {
        let with = |endpoint: Option<&str>, settings: &[(&str, &str)]| StoreOptions {
            endpoint: endpoint.map(str::to_owned),
            settings: settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            ..StoreOptions::default()
        };
        assert!(check_url("s3://b", &with(Some("https://s3.example:9000"), &[("region", "x")])).is_ok());
        assert!(check_url("s3://b", &with(Some("http://127.0.0.1:9000"), &[])).is_err());
        let permitted = StoreOptions { allow_http: true, ..with(Some("http://127.0.0.1:9000"), &[]) };
        assert!(check_url("s3://b", &permitted).is_ok());
        for endpoint in ["127.0.0.1", "https://user:secret@x", "ftp://x", "https://"] {
            assert!(check_url("s3://b", &with(Some(endpoint), &[])).is_err(), "{endpoint}");
        }
        for key in [
            "secret_access_key",
            "AWS_SESSION_TOKEN",
            "access_key_id",
            "sas_key",
            "allow_http",
            "endpoint",
            "nonsense",
        ] {
            let error = check_url("s3://b", &with(None, &[(key, "hidden-value")])).unwrap_err();
            assert!(!error.contains("hidden-value"), "{error}");
        }
    }
}
