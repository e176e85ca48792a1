//! The other end of signed URLs: HTTP/1.1 by hand, so that it can fail at any byte.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use worker_client::proto;

use super::spawn;

#[derive(Debug, Clone)]
pub enum Fault {
    /// The answer's body is cut after this many bytes.
    CutBody(usize),
    /// This status instead.
    Status(u16),
    /// A conflict that passes: the request before is still being written.
    Busy,
    /// Stores, then closes without an answer.
    LoseAnswer,
    /// Answers the whole object to a ranged request.
    IgnoreRange,
}

#[derive(Debug, Default)]
pub struct Inner {
    pub objects: HashMap<String, Vec<u8>>,
    pub faults: VecDeque<Fault>,
    /// `METHOD uri range`.
    pub requests: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Blobs {
    inner: Arc<Mutex<Inner>>,
    address: SocketAddr,
}

impl Blobs {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let blobs = Self { inner: Arc::default(), address };
        let server = blobs.clone();
        spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let server = server.clone();
                spawn(async move {
                    let _ = server.serve(socket).await;
                });
            }
        });
        blobs
    }

    pub fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("not poisoned")
    }

    pub fn put(&self, uri: &str, bytes: impl Into<Vec<u8>>) {
        self.inner().objects.insert(uri.to_owned(), bytes.into());
    }

    pub fn size(&self, uri: &str) -> Option<u64> {
        self.inner().objects.get(uri).map(|bytes| bytes.len() as u64)
    }

    /// What lies below `prefix` and after `after`, in order.
    pub fn below(&self, prefix: &str, after: &str) -> Vec<proto::Artifact> {
        let inner = self.inner();
        let found = inner.objects.iter().filter(|(uri, _)| uri.starts_with(prefix) && uri.as_str() > after);
        let mut found: Vec<_> = found
            .map(|(uri, bytes)| proto::Artifact { uri: uri.clone(), size: bytes.len() as u64 })
            .collect();
        found.sort_by(|a, b| a.uri.cmp(&b.uri));
        found
    }

    pub fn signed(&self, method: &str, uri: &str) -> proto::SignedUrl {
        let name = hex::encode(uri);
        let url = format!("http://{}/{name}", self.address);
        let headers = [("x-signed".to_owned(), "yes".to_owned())].into();
        proto::SignedUrl { method: method.to_owned(), url, headers, expire_time: None }
    }

    async fn serve(&self, mut socket: TcpStream) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await?);
        }
        let head = String::from_utf8(head).expect("text").to_ascii_lowercase();
        assert!(head.contains("x-signed: yes"), "the signed headers are sent");
        let line: Vec<&str> = head.split_whitespace().take(2).collect();
        let uri = String::from_utf8(hex::decode(&line[1][1..]).expect("hex")).expect("text");
        let header = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().to_owned())
        };
        let range = header("range").unwrap_or_default();
        let fault = {
            let mut inner = self.inner();
            inner.requests.push(format!("{} {uri} {range}", line[0]).trim_end().to_owned());
            inner.faults.pop_front()
        };
        if line[0] == "put" {
            let length: usize = header("content-length").expect("a length").parse().expect("a number");
            let mut body = vec![0; length];
            socket.read_exact(&mut body).await?;
            let status = match fault {
                Some(Fault::Status(status)) => status,
                Some(Fault::Busy) => 409,
                _ => {
                    let mut inner = self.inner();
                    if inner.objects.get(&uri).is_some_and(|stored| *stored != body) {
                        409
                    } else {
                        inner.objects.insert(uri, body);
                        200
                    }
                }
            };
            if matches!(fault, Some(Fault::LoseAnswer)) {
                return Ok(());
            }
            let retry = if matches!(fault, Some(Fault::Busy)) { "retry-after: 0\r\n" } else { "" };
            let text = if status == 400 {
                r#"{"error":{"reason":"DIGEST_MISMATCH","message":"differs"}}"#
            } else {
                ""
            };
            let answer = format!(
                "HTTP/1.1 {status} X\r\n{retry}content-length: {}\r\nconnection: close\r\n\r\n{text}",
                text.len()
            );
            return socket.write_all(answer.as_bytes()).await;
        }
        if let Some(Fault::Status(status)) = fault {
            let text = "no, because";
            let answer = format!(
                "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
                text.len()
            );
            return socket.write_all(answer.as_bytes()).await;
        }
        let bytes = self.inner().objects.get(&uri).cloned().expect("asked for before");
        let start = match fault {
            Some(Fault::IgnoreRange) => 0,
            _ => range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')?.parse().ok()).unwrap_or(0),
        };
        let part = &bytes[start..];
        let status = if start == 0 {
            "200 OK".to_owned()
        } else {
            format!("206 Partial\r\ncontent-range: bytes {start}-{}/{}", bytes.len() - 1, bytes.len())
        };
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", part.len());
        socket.write_all(answer.as_bytes()).await?;
        let sent = match fault {
            Some(Fault::CutBody(count)) => &part[..count.min(part.len())],
            _ => part,
        };
        socket.write_all(sent).await?;
        socket.shutdown().await
    }
}
