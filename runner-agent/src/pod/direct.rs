//! Objects past the service: moved by requests to the store itself that the service has signed.
//!
//! The service settles all that matters: which object, which method, which host, for how long, and of a stored object its
//! digest. What does not work this way goes by the service, which then also says why: nothing fails here that would not fail
//! there. A URL signs itself, so none is in a message or an error.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use reqwest::{Body, Client, Response, StatusCode, Url, header, redirect};
use runner_core::artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ByteStream, KnownObject};
use runner_proto::agent::{SignObjectReply, SignObjectRequest, Upload};

use super::client::{Backoff, Service};
use crate::staging::roots;

/// A store that is not reached within this is not reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a signature may take.
const SIGN_TIMEOUT: Duration = Duration::from_secs(30);
/// A transfer that moves nothing for so long has failed.
const STALL: Duration = Duration::from_secs(30);
/// Tries of one transfer, each with a fresh URL. Of a read, those in a row that bring nothing.
const TRIES: u32 = 4;
/// Transfers in a row that fail with all their tries until no more are tried.
const STRIKES: u32 = 3;
/// Smaller objects are stored by way of the service: that takes one trip, not two.
const SMALL: u64 = 64 * 1024;
/// No store takes larger ones in one request, in bytes.
const LARGEST: u64 = 5 << 30;

/// What a request is for.
enum Access<'a> {
    Read,
    Store { size: u64, sha256: &'a str },
}

/// The store, as far as the service lets this agent reach it.
#[derive(Debug)]
pub(super) struct Direct {
    service: Service,
    client: Client,
    strikes: AtomicU32,
    /// The store signs nothing that reads.
    no_reads: AtomicBool,
    /// The store signs nothing that stores.
    no_writes: AtomicBool,
}

/// Why one try failed.
enum Failed {
    /// The store was not reached.
    Unreached,
    /// It answered something else, or was cut off.
    Other,
    /// The object is not there, or not what it was or was promised to be.
    Replaced,
}

impl From<reqwest::Error> for Failed {
    fn from(error: reqwest::Error) -> Self {
        if error.is_connect() { Self::Unreached } else { Self::Other }
    }
}

impl Direct {
    /// With these certificates trusted beside the public authorities; empty: none. `None`: they are not such.
    pub(super) fn new(service: Service, ca_pem: &str) -> Option<Arc<Self>> {
        install_crypto();
        let certificates = match roots(Some(ca_pem).filter(|pem| !pem.is_empty())) {
            Ok(certificates) => certificates,
            Err(error) => {
                tracing::warn!(%error, "certificates of the object store cannot be used");
                return None;
            }
        };
        let client = Client::builder()
            .user_agent("runner")
            .no_proxy()
            .redirect(redirect::Policy::none())
            .referer(false)
            .http1_only()
            .retry(reqwest::retry::never())
            .connect_timeout(CONNECT_TIMEOUT)
            .tls_certs_only(certificates)
            .build();
        match client {
            Ok(client) => Some(Arc::new(Self {
                service,
                client,
                strikes: AtomicU32::new(0),
                no_reads: AtomicBool::new(false),
                no_writes: AtomicBool::new(false),
            })),
            Err(error) => {
                tracing::warn!(%error, "no client of the object store can be made");
                None
            }
        }
    }

    /// Whether it has not failed too often.
    fn works(&self) -> bool {
        self.strikes.load(Ordering::Relaxed) < STRIKES
    }

    /// Whether an object of this size may be stored here.
    pub(super) fn stores(&self, size: u64) -> bool {
        (SMALL..=LARGEST).contains(&size) && self.works() && !self.no_writes.load(Ordering::Relaxed)
    }

    fn worked(&self) {
        self.strikes.store(0, Ordering::Relaxed);
    }

    fn gave_up(&self) {
        self.strikes.fetch_add(1, Ordering::Relaxed);
    }

    /// A request, freshly signed. `None`: there is none to be had now.
    async fn sign(&self, key: &ArtifactKey, access: &Access<'_>) -> Option<(Url, header::HeaderMap)> {
        let upload = match access {
            Access::Read => None,
            Access::Store { size, sha256 } => Some(Upload { size: *size, sha256: (*sha256).to_owned() }),
        };
        let mut request = self.service.request(SignObjectRequest { key: key.to_string(), upload });
        request.set_timeout(SIGN_TIMEOUT);
        // What is wrong with the key or the attempt the service says again when it is to move the object itself.
        let SignObjectReply { url, headers } =
            self.service.client().sign_object(request).await.ok()?.into_inner();
        if url.is_empty() {
            match access {
                Access::Read => &self.no_reads,
                Access::Store { .. } => &self.no_writes,
            }
            .store(true, Ordering::Relaxed);
            return None;
        }
        let url: Url = url.parse().ok()?;
        Some((url, header_map(headers)?))
    }

    /// Opens an object; answers its whole size, too. `None`: not this way.
    pub(super) async fn get(
        self: &Arc<Self>,
        key: &ArtifactKey,
        range: Range<u64>,
    ) -> Option<(u64, ByteStream)> {
        if range.is_empty() || !self.works() || self.no_reads.load(Ordering::Relaxed) {
            return None;
        }
        let mut backoff = Backoff::new();
        for tries in 1..=TRIES {
            let failed = match self.ask(key, range.clone(), None).await? {
                Ok(answer) => {
                    self.worked();
                    let size = answer.size;
                    let reading = Reading {
                        direct: Arc::clone(self),
                        key: key.clone(),
                        at: range.start,
                        end: range.end.min(size),
                        answer: Some(answer),
                        left: TRIES,
                    };
                    return Some((size, reading.stream()));
                }
                // Not there; the service says so as it always did.
                Err(Failed::Replaced) => return None,
                Err(failed) => failed,
            };
            // A store that two tries do not reach is not there for this pod: a policy of its network may be in the way.
            if matches!(failed, Failed::Unreached) && tries > 1 {
                self.strikes.store(STRIKES, Ordering::Relaxed);
                return None;
            }
            if tries < TRIES {
                backoff.pause().await;
            }
        }
        self.gave_up();
        None
    }

    /// One request for a stretch of an object, of that version where one is named. `None`: nothing was signed.
    async fn ask(
        &self,
        key: &ArtifactKey,
        range: Range<u64>,
        version: Option<&header::HeaderValue>,
    ) -> Option<Result<Answer, Failed>> {
        let (url, headers) = self.sign(key, &Access::Read).await?;
        let mut request = self.client.get(url).headers(headers);
        let whole = range.start == 0 && range.end == u64::MAX && version.is_none();
        if !whole {
            let last = if range.end == u64::MAX { String::new() } else { (range.end - 1).to_string() };
            request = request.header(header::RANGE, format!("bytes={}-{last}", range.start));
        }
        if let Some(version) = version {
            request = request.header(header::IF_MATCH, version.clone());
        }
        Some(match tokio::time::timeout(STALL, request.send()).await {
            Ok(Ok(response)) => Answer::new(response, range.start, whole),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(Failed::Other),
        })
    }

    /// Stores an object. `false`: not this way.
    ///
    /// # Errors
    /// Where its bytes cannot be read.
    pub(super) async fn put(&self, key: &ArtifactKey, object: &KnownObject) -> Result<bool, ArtifactError> {
        if !self.stores(object.size) {
            return Ok(false);
        }
        let mut backoff = Backoff::new();
        for tries in 1..=TRIES {
            let access = Access::Store { size: object.size, sha256: &object.sha256 };
            let Some((url, headers)) = self.sign(key, &access).await else { return Ok(false) };
            match self.send(url, headers, object).await {
                Ok(()) => {
                    self.worked();
                    return Ok(true);
                }
                Err(Failed::Unreached) if tries > 1 => {
                    self.strikes.store(STRIKES, Ordering::Relaxed);
                    return Ok(false);
                }
                // Other bytes than were promised come again; `put` takes them as they are.
                Err(Failed::Replaced) => return Ok(false),
                Err(Failed::Unreached | Failed::Other) => {}
            }
            if tries < TRIES {
                backoff.pause().await;
            }
        }
        self.gave_up();
        Ok(false)
    }

    /// One request that stores an object.
    async fn send(&self, url: Url, headers: header::HeaderMap, object: &KnownObject) -> Result<(), Failed> {
        let sent = Arc::new(AtomicU64::new(0));
        let broken = Arc::new(AtomicBool::new(false));
        let counting = {
            let (sent, broken) = (Arc::clone(&sent), Arc::clone(&broken));
            (object.open)().map(move |chunk| {
                match &chunk {
                    Ok(bytes) => {
                        sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                    Err(_) => broken.store(true, Ordering::Relaxed),
                }
                chunk
            })
        };
        let request = self
            .client
            .put(url)
            .headers(headers)
            .header(header::CONTENT_LENGTH, object.size)
            .body(Body::wrap_stream(counting));
        let stalled = async {
            let mut before = 0;
            loop {
                tokio::time::sleep(STALL).await;
                let now = sent.load(Ordering::Relaxed);
                if now == before {
                    return;
                }
                before = now;
            }
        };
        let answered = tokio::select! {
            answered = request.send() => answered,
            () = stalled => return Err(Failed::Other),
        };
        match answered {
            Ok(response) if response.status().is_success() => Ok(()),
            _ if broken.load(Ordering::Relaxed) => Err(Failed::Replaced),
            Ok(_) => Err(Failed::Other),
            Err(error) => Err(error.into()),
        }
    }
}

fn header_map(headers: HashMap<String, String>) -> Option<header::HeaderMap> {
    let mut map = header::HeaderMap::new();
    for (name, value) in headers {
        map.insert(name.parse::<header::HeaderName>().ok()?, value.parse().ok()?);
    }
    Some(map)
}

/// Makes the process use ring for TLS. One that is there already is as good.
fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// A stretch of an object that the store has begun to answer.
struct Answer {
    response: Response,
    /// Of the whole object.
    size: u64,
    /// Names the object's version, where the store names it in a way that can be asked for.
    version: Option<header::HeaderValue>,
}

impl Answer {
    fn new(response: Response, from: u64, whole: bool) -> Result<Self, Failed> {
        let size = match response.status() {
            StatusCode::OK if whole => response.content_length(),
            StatusCode::PARTIAL_CONTENT => size_of(response.headers(), from),
            StatusCode::PRECONDITION_FAILED | StatusCode::NOT_FOUND => return Err(Failed::Replaced),
            _ => None,
        };
        let version = response.headers().get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
        let version = version.cloned();
        size.map(|size| Self { response, size, version }).ok_or(Failed::Other)
    }
}

/// The whole size, of an answer that begins where it was asked to: `Content-Range: bytes FROM-LAST/SIZE`.
fn size_of(headers: &header::HeaderMap, from: u64) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?;
    let (range, size) = range.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    (first.parse() == Ok(from)).then(|| size.parse().ok())?
}

/// An object while it is read. What breaks off goes on where it was, as long as it is the same object.
struct Reading {
    direct: Arc<Direct>,
    key: ArtifactKey,
    at: u64,
    end: u64,
    answer: Option<Answer>,
    /// Tries that may fail until something is read again.
    left: u32,
}

impl Reading {
    fn stream(self) -> ByteStream {
        stream::unfold(Some(self), |reading| async move {
            let mut reading = reading?;
            match reading.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(reading))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn next(&mut self) -> Result<Option<Bytes>, ArtifactError> {
        let mut backoff = Backoff::new();
        loop {
            if self.at >= self.end {
                return Ok(None);
            }
            let version = match &mut self.answer {
                Some(answer) => {
                    if let Ok(Ok(Some(chunk))) = tokio::time::timeout(STALL, answer.response.chunk()).await {
                        return self.took(chunk).map(Some);
                    }
                    answer.version.clone()
                }
                None => None,
            };
            // Without a version, what comes next may be of another object.
            let Some(version) = version else { return Err(self.error("it was cut off")) };
            loop {
                if self.left == 0 {
                    self.direct.gave_up();
                    return Err(self.error("it was cut off, and does not go on"));
                }
                self.left -= 1;
                backoff.pause().await;
                match self.direct.ask(&self.key, self.at..self.end, Some(&version)).await {
                    Some(Ok(answer)) => {
                        self.answer = Some(answer);
                        break;
                    }
                    Some(Err(Failed::Replaced)) => {
                        let what = format!("read {}: it was replaced meanwhile", self.key);
                        return Err(ArtifactError::new(ArtifactErrorKind::Mismatch, what));
                    }
                    Some(Err(Failed::Unreached | Failed::Other)) | None => {}
                }
            }
        }
    }

    fn took(&mut self, chunk: Bytes) -> Result<Bytes, ArtifactError> {
        self.at = self.at.saturating_add(chunk.len() as u64);
        if self.at > self.end {
            return Err(self.error("the store answers more than it was asked for"));
        }
        if !chunk.is_empty() {
            self.left = TRIES;
        }
        Ok(chunk)
    }

    fn error(&self, what: &str) -> ArtifactError {
        ArtifactError::new(ArtifactErrorKind::Unavailable, format!("read {}: {what}", self.key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_only_where_it_begins_where_it_was_asked_to() {
        let of = |text: &'static str| {
            let mut headers = header::HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, header::HeaderValue::from_static(text));
            size_of(&headers, 5)
        };
        assert_eq!(of("bytes 5-9/100"), Some(100));
        for bad in ["bytes 4-9/100", "bytes 5-9/*", "bytes */100", "lines 5-9/100", "bytes 5/100"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(size_of(&header::HeaderMap::new(), 5), None);
    }
}
