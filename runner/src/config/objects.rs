//! The part `object_store`: where artifacts and logs are kept, and what moving them may cost.

use std::{collections::BTreeMap, fs, path::PathBuf};

use runner_artifacts::object::{RunTuning, StoreOptions, Tuning, check_url};
use runner_core::service::Options;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::value::{ByteSize, OrNone, Span};

/// Where artifacts and logs are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectStoreConfig {
    /// A directory, as `file:///path`, or a bucket: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.
    /// Default: `objects` in the data directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"s3://bucket/prefix")]
    pub url: Option<String>,
    /// Where the bucket's store answers, where that is not its provider's own address.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"https://s3.example.org:9000")]
    pub endpoint: Option<String>,
    /// Permits an endpoint of plain http.
    pub allow_http: bool,
    /// A file with the store's credentials, read again when it changes. S3: as `~/.aws/credentials`; Google: a service account's
    /// JSON; Azure: the account's key. Default: the usual chain of the store's own tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_file: Option<PathBuf>,
    /// Further settings of the store's client, such as `region`, `account_name` or `virtual_hosted_style_request`. Never secrets.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Whether callers get URLs of the store itself where it can sign them. They must be able to reach it. Otherwise the bytes go
    /// through the service.
    pub direct_urls: bool,
    /// Whether agents in pods read and store objects at the store itself, by requests that the service signs, where the store can:
    /// for reading S3, Google and Azure, for storing S3. Pods must be able to reach it. Otherwise the bytes go through the service.
    pub agent_urls: bool,
    /// Where the bucket's store answers pods, where that is another address than `endpoint`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(example = &"https://s3.storage.svc:9000")]
    pub agent_endpoint: Option<String>,
    /// Certificates that agents trust beside the public authorities where they reach the store by https: a file of PEM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_ca_file: Option<PathBuf>,
    /// How long a request that is signed for an agent may be begun.
    pub agent_url_lifetime: Span,
    /// Requests to the store at once that the service itself drives.
    pub connections: u32,
    /// Uploads in parts at once. Each may hold one part, of 8 MiB at first, in memory.
    pub uploads: u32,
    /// Parts or ranges of one object at once.
    pub parallel: u32,
    /// Memory for further parts and ranges, all objects together.
    pub memory_bytes: ByteSize,
    /// Bytes a second to the store, all uploads together.
    pub upload_bytes_per_sec: OrNone<ByteSize>,
    /// Bytes a second from the store, all downloads together.
    pub download_bytes_per_sec: OrNone<ByteSize>,
    /// Requests to the store at once, of one run.
    pub run_connections: u32,
    /// Memory for parts and ranges, of one run.
    pub run_memory_bytes: ByteSize,
    /// Bytes a second to the store, of one run.
    pub run_upload_bytes_per_sec: OrNone<ByteSize>,
    /// Bytes a second from the store, of one run.
    pub run_download_bytes_per_sec: OrNone<ByteSize>,
    /// Tries of one request, the first included.
    pub tries: u32,
    /// A transfer that moves nothing for so long is tried again.
    pub stall_timeout: Span,
    /// A transfer that is slower than this, in bytes a second, is tried again.
    pub min_bytes_per_sec: ByteSize,
    /// An attempt whose outputs cannot be stored for so long, all tries included, ends as `OUTPUT`.
    pub publish_patience: Span,
}

impl Default for ObjectStoreConfig {
    fn default() -> Self {
        let tuning = Tuning::default();
        let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let rate = |rate: Option<u64>| rate.map_or(OrNone::None, |rate| OrNone::Some(ByteSize(rate)));
        Self {
            url: None,
            endpoint: None,
            allow_http: false,
            credentials_file: None,
            settings: BTreeMap::new(),
            direct_urls: false,
            agent_urls: false,
            agent_endpoint: None,
            agent_ca_file: None,
            agent_url_lifetime: Span::secs(15 * 60),
            connections: number(tuning.connections),
            uploads: number(tuning.uploads),
            parallel: number(tuning.parallel),
            memory_bytes: ByteSize(tuning.memory_bytes),
            upload_bytes_per_sec: rate(tuning.upload_bytes_per_sec),
            download_bytes_per_sec: rate(tuning.download_bytes_per_sec),
            run_connections: number(tuning.run.connections),
            run_memory_bytes: ByteSize(tuning.run.memory_bytes),
            run_upload_bytes_per_sec: rate(tuning.run.upload_bytes_per_sec),
            run_download_bytes_per_sec: rate(tuning.run.download_bytes_per_sec),
            tries: tuning.tries,
            stall_timeout: Span(tuning.stall_timeout),
            min_bytes_per_sec: ByteSize(tuning.min_bytes_per_sec),
            publish_patience: Span(Options::default().publish_patience),
        }
    }
}

impl ObjectStoreConfig {
    /// How the store is opened.
    pub fn options(&self) -> StoreOptions {
        let number = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
        StoreOptions {
            endpoint: self.endpoint.clone(),
            allow_http: self.allow_http,
            credentials_file: self.credentials_file.clone(),
            settings: self.settings.clone(),
            tuning: Tuning {
                connections: number(self.connections),
                uploads: number(self.uploads),
                parallel: number(self.parallel),
                memory_bytes: self.memory_bytes.0,
                upload_bytes_per_sec: self.upload_bytes_per_sec.map(|rate| rate.0),
                download_bytes_per_sec: self.download_bytes_per_sec.map(|rate| rate.0),
                run: RunTuning {
                    connections: number(self.run_connections),
                    memory_bytes: self.run_memory_bytes.0,
                    upload_bytes_per_sec: self.run_upload_bytes_per_sec.map(|rate| rate.0),
                    download_bytes_per_sec: self.run_download_bytes_per_sec.map(|rate| rate.0),
                },
                tries: self.tries,
                stall_timeout: self.stall_timeout.0,
                min_bytes_per_sec: self.min_bytes_per_sec.0,
                ..Tuning::default()
            },
        }
    }

    /// How the store is opened whose requests are signed for agents. `None`: it is the same one.
    pub fn agent_options(&self) -> Option<StoreOptions> {
        let endpoint = self.agent_endpoint.clone()?;
        Some(StoreOptions { endpoint: Some(endpoint), ..self.options() })
    }

    /// What agents trust beside the public authorities, as PEM. Empty: nothing.
    ///
    /// # Errors
    /// Where `agent_ca_file` cannot be read, or has no certificate.
    pub fn agent_ca(&self) -> Result<String, String> {
        let Some(path) = &self.agent_ca_file else { return Ok(String::new()) };
        let pem = fs::read_to_string(path).map_err(|error| format!("read {}: {error}", path.display()))?;
        if pem.contains("-----BEGIN CERTIFICATE-----") {
            Ok(pem)
        } else {
            Err(format!("{} has no certificate in it", path.display()))
        }
    }

    /// What does not fit: (key, what is wrong).
    pub(super) fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        if let Some(url) = &self.url {
            if !url.contains("://") {
                faults.push((
                    "url".to_owned(),
                    "must be a URL: `file:///path`, `s3://bucket/prefix`".to_owned(),
                ));
            } else if let Err(why) = check_url(url, &self.options()) {
                faults.push(("url".to_owned(), why));
            }
        }
        for (key, value, most) in [
            ("connections", self.connections, 4096),
            ("run_connections", self.run_connections, 4096),
            ("uploads", self.uploads, 4096),
            ("parallel", self.parallel, 64),
            ("tries", self.tries, 20),
        ] {
            if value == 0 || value > most {
                faults.push((key.to_owned(), format!("must be from 1 to {most}")));
            }
        }
        if self.agent_endpoint.is_some() {
            match (&self.url, self.agent_options()) {
                (Some(url), Some(options)) if url.contains("://") => {
                    if let Err(why) = check_url(url, &options) {
                        faults.push(("agent_endpoint".to_owned(), why));
                    }
                }
                _ => faults
                    .push(("agent_endpoint".to_owned(), "is of no use without a bucket in `url`".to_owned())),
            }
        }
        if let Err(why) = self.agent_ca() {
            faults.push(("agent_ca_file".to_owned(), why));
        }
        if self.agent_url_lifetime < Span::secs(60) || self.agent_url_lifetime > Span::secs(12 * 3600) {
            faults.push(("agent_url_lifetime".to_owned(), "must be from 1 min to 12 h".to_owned()));
        }
        if self.stall_timeout < Span::secs(1) || self.stall_timeout > Span::secs(3600) {
            faults.push(("stall_timeout".to_owned(), "must be from 1 s to 1 h".to_owned()));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(config: &ObjectStoreConfig) -> Vec<String> {
        config.faults().into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn what_agents_are_told_of_the_store_must_fit_it() {
        assert_eq!(keys(&ObjectStoreConfig::default()), [""; 0]);
        let bucket = ObjectStoreConfig {
            url: Some("s3://bucket".to_owned()),
            agent_endpoint: Some("https://s3.storage.svc:9000".to_owned()),
            ..ObjectStoreConfig::default()
        };
        assert_eq!(keys(&bucket), [""; 0]);
        assert_eq!(bucket.agent_options().unwrap().endpoint, bucket.agent_endpoint);
        assert_eq!(keys(&ObjectStoreConfig { url: None, ..bucket.clone() }), ["agent_endpoint"]);
        let bad = ObjectStoreConfig {
            agent_endpoint: Some("http://plain:9000".to_owned()),
            agent_ca_file: Some("/nowhere/ca.pem".into()),
            agent_url_lifetime: Span::secs(1),
            ..bucket
        };
        assert_eq!(keys(&bad), ["agent_endpoint", "agent_ca_file", "agent_url_lifetime"]);
    }
}
