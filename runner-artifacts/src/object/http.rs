//! The HTTP client of the stores: `reqwest` on rustls with ring, and answers that carry their meaning as a type.

use std::sync::Once;

use async_trait::async_trait;
use futures::TryStreamExt as _;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
        ReqwestConnector,
    },
};

use super::failure::Answer;

/// Of an error's document, the most that is read, in bytes.
const MAX_DOCUMENT: usize = 16 * 1024;

/// Connects with `reqwest`, and types what is answered.
#[derive(Debug, Default)]
pub(super) struct TypingConnector;

impl HttpConnector for TypingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        install_crypto();
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Typing(inner)))
    }
}

/// Makes the process use ring for TLS. Idempotent; a provider that was installed before stays.
fn install_crypto() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Fails where another part of the process has chosen; then that choice holds.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

/// Makes a typed [`Answer`] of what `object_store` would only tell as text: a status of the client's own fault, and a store
/// that has no room. Other answers pass.
#[derive(Debug)]
pub(super) struct Typing(HttpClient);

#[async_trait]
impl HttpService for Typing {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = self.0.execute(request).await?;
        let status = response.status();
        let typed = match status.as_u16() {
            // `object_store` has a variant for each of these, or tries again by itself.
            404 | 408 | 409 | 412 | 429 => false,
            507 => true,
            _ => status.is_client_error(),
        };
        if !typed {
            return Ok(response);
        }
        let mut document = Vec::new();
        let mut body = response.into_body().bytes_stream();
        // What breaks off is only shorter.
        while let Ok(Some(chunk)) = body.try_next().await {
            let room = MAX_DOCUMENT - document.len();
            document.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if document.len() == MAX_DOCUMENT {
                break;
            }
        }
        let document = String::from_utf8_lossy(&document);
        let answer = Answer {
            status: status.as_u16(),
            code: element(&document, "Code"),
            message: element(&document, "Message"),
        };
        // A kind that `object_store` does not try again: whether to do so is decided above, from the type.
        Err(HttpError::new(HttpErrorKind::Unknown, answer))
    }
}

/// The text of the first element of this name, at most 200 characters. Not XML in general: the error documents of the
/// stores are flat.
fn element(document: &str, name: &str) -> String {
    let text = document
        .split_once(&format!("<{name}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{name}>")))
        .map_or("", |(text, _)| text);
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::element;

    #[test]
    fn the_code_of_an_error_document_is_found() {
        let document = "<?xml version=\"1.0\"?><Error><Code>ExpiredToken</Code><Message>The token\nhas expired.</Message></Error>";
        assert_eq!(element(document, "Code"), "ExpiredToken");
        assert_eq!(element(document, "Message"), "The tokenhas expired.");
        assert_eq!(element("<html>", "Code"), "");
        assert_eq!(element("<Code>cut off", "Code"), "");
    }
}
