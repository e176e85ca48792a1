//! Something in front of an engine, as a load balancer is: it lets requests through, or has trouble of its own.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use runner_core::task::{TaskKind, spawn};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{UnixListener, UnixStream},
    sync::watch,
};

/// What happens to a request that comes now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// It goes to the engine.
    Through,
    /// It is answered with this status.
    Status(u16),
    /// Its answer begins well and goes no further.
    HalfAnAnswer,
}

/// A Unix socket in front of an engine's. Each connection is one request.
#[derive(Debug)]
pub struct Front {
    dir: TempDir,
    mood: watch::Sender<Mood>,
    refused: Arc<AtomicU64>,
}

impl Front {
    /// Listens in front of the engine whose socket this is.
    pub fn of(engine: PathBuf) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(socket(dir.path())).expect("listen");
        let mood = watch::Sender::new(Mood::Through);
        let refused = Arc::<AtomicU64>::default();
        let (moods, count) = (mood.subscribe(), Arc::clone(&refused));
        let listening = async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (moods, engine, count) = (moods.clone(), engine.clone(), Arc::clone(&count));
                let serving = async move {
                    let mood = *moods.borrow();
                    if mood != Mood::Through {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    // Whoever made the request sees how it went.
                    let _ = serve(stream, mood, &engine, moods).await;
                };
                drop(spawn(TaskKind::Helper, "front.request", serving));
            }
        };
        drop(spawn(TaskKind::Helper, "front", listening));
        Self { dir, mood, refused }
    }

    /// Where it listens, as `unix:///…`.
    pub fn host(&self) -> String {
        format!("unix://{}", socket(self.dir.path()).display())
    }

    /// What happens to requests from now on.
    pub fn set(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    /// How many requests did not reach the engine.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("front.sock")
}

async fn serve(
    mut stream: UnixStream,
    mood: Mood,
    engine: &Path,
    mut moods: watch::Receiver<Mood>,
) -> io::Result<()> {
    match mood {
        Mood::Through => {
            let mut engine = UnixStream::connect(engine).await?;
            copy_bidirectional(&mut stream, &mut engine).await?;
        }
        Mood::Status(status) => {
            head(&mut stream).await?;
            let body = r#"{"message":"trouble"}"#;
            let answer = format!(
                "HTTP/1.1 {status} Trouble\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await?;
        }
        Mood::HalfAnAnswer => {
            head(&mut stream).await?;
            let half = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{";
            stream.write_all(half.as_bytes()).await?;
            // Held open until the trouble is over, or for ever.
            let _ = moods.wait_for(|mood| *mood == Mood::Through).await;
        }
    }
    Ok(())
}

/// Reads the head of a request.
async fn head(stream: &mut UnixStream) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 64 * 1024 {
        head.push(stream.read_u8().await?);
    }
    Ok(())
}
