//! Inputs by `https`: from allowed hosts, at checked addresses, with nothing of the service's own in the request.
//!
//! A name is resolved once; each address is checked, and the connection goes to a checked address and nowhere else, so that
//! a name that means something else at its second look-up is of no use. A redirect is a new URL: its scheme, host and
//! address are checked like those of the first. No proxy, cookie, referrer or credential is sent, whatever the environment
//! of this process says.

use std::{error::Error as _, io, net::SocketAddr, sync::Once};

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use reqwest::{Client, Response, StatusCode, Url, header, redirect};
use runner_core::https::{HttpsPolicy, HttpsUrl};

use super::{StagingError, StagingErrorKind, error::About, roots::roots, source::Opened};

/// Opens what a URL names.
pub(super) async fn open(
    policy: &HttpsPolicy,
    url: &HttpsUrl,
    about: &About,
) -> Result<Opened, StagingError> {
    fetch(policy, url, about, &SystemResolver).await
}

/// Finds the addresses of a name.
#[async_trait]
pub(super) trait Resolver: Send + Sync {
    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

/// As the machine does.
struct SystemResolver;

#[async_trait]
impl Resolver for SystemResolver {
    async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    }
}

async fn fetch(
    policy: &HttpsPolicy,
    first: &HttpsUrl,
    about: &About,
    resolver: &dyn Resolver,
) -> Result<Opened, StagingError> {
    let mut url = first.clone();
    for _ in 0..=policy.max_redirects {
        if !policy.allows_host(&url) {
            let what = format!("read {}: inputs may not come from {}", first.shown(), url.host());
            return Err(about.error(StagingErrorKind::Denied, what));
        }
        let response = ask(policy, &url, about, resolver).await?;
        if is_redirect(response.status()) {
            url = next(&url, &response).map_err(|why| {
                let what = format!("read {}: it redirects to where it must not: {why}", url.shown());
                about.error(StagingErrorKind::Denied, what)
            })?;
            continue;
        }
        return body(policy, &url, response, about);
    }
    let what = format!("read {}: it redirects more than {} times", first.shown(), policy.max_redirects);
    Err(about.error(StagingErrorKind::LimitExceeded, what))
}

/// Sends one request to a checked address.
async fn ask(
    policy: &HttpsPolicy,
    url: &HttpsUrl,
    about: &About,
    resolver: &dyn Resolver,
) -> Result<Response, StagingError> {
    let addresses = addresses(policy, url, about, resolver).await?;
    let client = client(policy, url, &addresses).map_err(|error| {
        let source = Some(error.without_url().into());
        StagingError { source, ..about.error(StagingErrorKind::Local, "set up a client for https") }
    })?;
    let response = client.get(url.as_str()).send().await.map_err(|error| failed(url, error, about))?;
    // What was asked for above, seen again: a connection anywhere else is a defect that must not go unseen.
    match response.remote_addr() {
        Some(peer) if addresses.contains(&peer) => Ok(response),
        _ => {
            let what =
                format!("read {}: the connection went to another address than was checked", url.shown());
            Err(about.error(StagingErrorKind::Denied, what))
        }
    }
}

async fn addresses(
    policy: &HttpsPolicy,
    url: &HttpsUrl,
    about: &About,
    resolver: &dyn Resolver,
) -> Result<Vec<SocketAddr>, StagingError> {
    let all = match url.address() {
        Some(address) => vec![SocketAddr::new(address, url.port())],
        None => {
            let resolving = resolver.resolve(url.host(), url.port());
            let found = match tokio::time::timeout(policy.connect_timeout, resolving).await {
                Ok(found) => found,
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
            };
            found.map_err(|error| {
                let what = format!("read {}: find the address of {}", url.shown(), url.host());
                StagingError {
                    source: Some(error.into()),
                    ..about.error(StagingErrorKind::Unavailable, what)
                }
            })?
        }
    };
    let allowed: Vec<SocketAddr> =
        all.iter().copied().filter(|address| policy.allows_address(address.ip())).collect();
    if allowed.is_empty() {
        // The caller is not told what a name of this network means.
        tracing::warn!(host = url.host(), addresses = ?all, "an input's host has no address that may be asked");
        let what = format!("read {}: its host has no address that inputs may come from", url.shown());
        return Err(about.error(StagingErrorKind::Denied, what));
    }
    Ok(allowed)
}

/// A client for one request: it knows no address but those that were checked, and keeps no connection.
fn client(policy: &HttpsPolicy, url: &HttpsUrl, addresses: &[SocketAddr]) -> reqwest::Result<Client> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // One that is there already is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let mut builder = Client::builder()
        .user_agent("runner")
        .no_proxy()
        .redirect(redirect::Policy::none())
        .referer(false)
        .https_only(true)
        .http1_only()
        .retry(reqwest::retry::never())
        .pool_max_idle_per_host(0)
        .connect_timeout(policy.connect_timeout)
        .read_timeout(policy.stall_timeout)
        .timeout(policy.timeout)
        .resolve_to_addrs(url.host(), addresses);
    if policy.bundled_roots {
        builder = builder.tls_certs_only(roots(policy.ca_pem.as_deref())?);
    } else if let Some(pem) = &policy.ca_pem {
        builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(pem.as_bytes())?);
    }
    builder.build()
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    )
}

/// Where an answer redirects to.
fn next(url: &HttpsUrl, response: &Response) -> Result<HttpsUrl, String> {
    let location = response.headers().get(header::LOCATION).ok_or("nowhere")?;
    let location = location.to_str().map_err(|_| "not a URL")?;
    let base: Url = url.as_str().parse().map_err(|_| "not a URL")?;
    let mut next = base.join(location).map_err(|_| "not a URL")?;
    next.set_fragment(None);
    next.as_str().parse::<HttpsUrl>().map_err(|error| error.rule.to_owned())
}

fn body(
    policy: &HttpsPolicy,
    url: &HttpsUrl,
    response: Response,
    about: &About,
) -> Result<Opened, StagingError> {
    let status = response.status();
    if status != StatusCode::OK {
        let kind = match status.as_u16() {
            401 | 403 | 407 => StagingErrorKind::Denied,
            404 | 410 => StagingErrorKind::NotFound,
            408 | 425 | 429 | 500..=599 => StagingErrorKind::Unavailable,
            _ => StagingErrorKind::Store,
        };
        return Err(about.error(kind, format!("read {}: the host answers {status}", url.shown())));
    }
    let too_large = {
        let (about, shown, max) = (about.clone(), url.shown().to_owned(), policy.max_bytes);
        move || {
            let what =
                format!("read {shown}: it has more than the {max} bytes that an input by https may have");
            about.error(StagingErrorKind::LimitExceeded, what)
        }
    };
    let size = response.content_length();
    if size.is_some_and(|size| size > policy.max_bytes) {
        return Err(too_large());
    }
    let (about, url, max) = (about.clone(), url.clone(), policy.max_bytes);
    let state = (Some(response.bytes_stream()), 0u64);
    let bytes = stream::unfold(state, move |(bytes, seen)| {
        let (about, url, too_large) = (about.clone(), url.clone(), too_large.clone());
        async move {
            let mut bytes = bytes?;
            match bytes.next().await? {
                Err(error) => Some((Err(failed(&url, error, &about)), (None, seen))),
                Ok(chunk) => {
                    let seen = seen.saturating_add(chunk.len() as u64);
                    if seen > max {
                        Some((Err(too_large()), (None, seen)))
                    } else {
                        Some((Ok(chunk), (Some(bytes), seen)))
                    }
                }
            }
        }
    });
    Ok(Opened { size, bytes: bytes.boxed() })
}

/// A transfer that failed: mostly something that passes. A certificate that is not right does not.
fn failed(url: &HttpsUrl, error: reqwest::Error, about: &About) -> StagingError {
    let kind = if is_certificate(&error) { StagingErrorKind::Denied } else { StagingErrorKind::Unavailable };
    // The error has the whole URL in it, with a query that may be secret.
    let source = Some(error.without_url().into());
    StagingError { source, ..about.error(kind, format!("read {}", url.shown())) }
}

fn is_certificate(error: &reqwest::Error) -> bool {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return matches!(tls, rustls::Error::InvalidCertificate(_));
        }
        // What an I/O error wraps is itself, and not the source of itself.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    false
}

#[cfg(test)]
#[path = "https_tests.rs"]
mod tests;
