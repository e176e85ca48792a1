//! Local files become artifacts.

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use runner_proto::v1 as proto;
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
};

use crate::{
    client::Client,
    clock,
    error::{ClientError, ErrorKind},
    http_client::{HttpClient, Piece, RequestBody},
    note::Note,
    retry::{self, Tries},
    transfer::{CHUNK_BYTES, Tracker, TransferOptions},
    walk::{self, TreeDirectory},
};

/// A file that was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadedFile {
    /// What an input names.
    pub uri: String,
    /// In bytes.
    pub size: u64,
    /// Lower-case hex. The service has checked it.
    pub sha256: String,
}

/// A tree that was stored and sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadedTree {
    /// What an input names. Ends in `/`.
    pub uri: String,
    /// Number of files.
    pub files: u64,
    /// Sum of their sizes.
    pub total_bytes: u64,
    /// What was left out; see [`Irregular::Skip`](crate::Irregular::Skip).
    pub skipped: Vec<PathBuf>,
}

/// Files from this size on are sent so that they go on where they broke off. Smaller ones are sent again.
const RESUMABLE_BYTES: u64 = 16 << 20;
/// Between two questions whether what came is stored, and how often they are asked in a row.
const WAIT: Duration = Duration::from_secs(1);
const MAX_WAITS: u32 = 1800;

/// Where a file goes: the upload that it belongs to (empty: one of its own), and its path within.
#[derive(Clone, Copy)]
struct Target<'a> {
    upload_id: &'a str,
    path: &'a str,
    /// An earlier process may have sent it, or a part of it.
    resumed: bool,
    in_tree: bool,
}

impl Client {
    /// Stores one regular file. It is read twice, once for its SHA-256, so that the service can refuse what differs. A large one
    /// that breaks off goes on from there; see also [`TransferOptions::remember`].
    ///
    /// ```no_run
    /// use worker_client::{Client, RunSpec, TransferOptions};
    ///
    /// # async fn example(client: Client) -> Result<(), worker_client::ClientError> {
    /// let file = client.upload_file("genome.fa", TransferOptions::default()).await?;
    /// let run = client.run(RunSpec::command(["wc", "/inputs/genome.fa"]).input("/inputs/genome.fa", file.uri)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Unsupported`] for what is not a regular file; [`ErrorKind::Integrity`] where the
    /// file changed meanwhile.
    pub async fn upload_file(
        &self,
        path: impl AsRef<Path>,
        options: TransferOptions,
    ) -> Result<UploadedFile, ClientError> {
        let local = path.as_ref();
        let mut file = open(local, OFlags::empty()).await?;
        let name = local.file_name().and_then(|name| name.to_str()).unwrap_or("file");
        let size = size_of(&file, local).await?;
        let mut note = self.note(&options, local)?;
        loop {
            let tracker = Tracker::new(&options, size, 1);
            let resumed = note.upload_id().map(str::to_owned);
            let target = Target {
                upload_id: resumed.as_deref().unwrap_or_default(),
                path: name,
                resumed: resumed.is_some(),
                in_tree: false,
            };
            match self.store(&mut file, local, &target, &tracker, Some(&mut note)).await {
                Ok((stored, _)) => {
                    note.forget();
                    return Ok(stored);
                }
                Err(error) if resumed.is_some() && begins_anew(&error) => {
                    note.forget();
                    file.rewind()
                        .await
                        .map_err(|e| ClientError::io(format!("read {}", local.display()), e))?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn note(&self, options: &TransferOptions, local: &Path) -> Result<Note, ClientError> {
        Note::open(options.remember.as_deref(), self.endpoint(), local)
    }

    /// Stores a directory with everything below it, several files at once, and seals it. The answer's `uri` is an input
    /// that appears as a directory.
    ///
    /// # Errors
    /// As [`Client::upload_file`]; [`ErrorKind::Invalid`] above `max_entries`. Nothing that was stored becomes visible
    /// before the seal.
    pub async fn upload_tree(
        &self,
        dir: impl AsRef<Path>,
        options: TransferOptions,
    ) -> Result<UploadedTree, ClientError> {
        let root = dir.as_ref().to_owned();
        let (irregular, max_entries, select) =
            (options.irregular, options.max_entries, options.select.clone());
        let tree =
            tokio::task::spawn_blocking(move || walk::walk(&root, irregular, max_entries, select.as_ref()))
                .await
                .map_err(|e| ClientError::new(ErrorKind::Io, "walk the directory", e.to_string()))??;
        let mut note = self.note(&options, dir.as_ref())?;
        let sealed = loop {
            let resumed = note.upload_id().is_some();
            match self.store_tree(&tree, &options, &mut note).await {
                Ok(sealed) => break sealed,
                Err(error) if resumed && begins_anew(&error) => note.forget(),
                Err(error) => return Err(error),
            }
        };
        note.forget();
        Ok(UploadedTree {
            uri: sealed.uri,
            files: sealed.files,
            total_bytes: sealed.total_bytes,
            skipped: tree.skipped,
        })
    }

    /// Stores the files of a tree and seals it.
    async fn store_tree(
        &self,
        tree: &walk::Tree,
        options: &TransferOptions,
        note: &mut Note,
    ) -> Result<proto::SealTreeResponse, ClientError> {
        let tracker = Tracker::new(options, tree.total_bytes, tree.files.len() as u64);
        let noted = note.upload_id().map(str::to_owned);
        let resumed = noted.is_some();
        let store = async |upload_id: &str, file: &walk::TreeFile, note: Option<&mut Note>| {
            let target = Target { upload_id, path: &file.path, resumed, in_tree: true };
            let mut opened = open(&file.local, OFlags::NOFOLLOW).await?;
            let (_, id) = self.store(&mut opened, &file.local, &target, &tracker, note).await?;
            Ok::<_, ClientError>(id)
        };
        // The first file's answer names the upload that the others join.
        let upload_id = match tree.files.first() {
            Some(first) => store(noted.as_deref().unwrap_or_default(), first, Some(note)).await?,
            // The name of an upload without files: one is announced and never sent.
            None => {
                let target = Target { upload_id: "", path: "none", resumed: false, in_tree: true };
                self.create_upload(&target, 0, "").await?.upload_id
            }
        };
        stream::iter(tree.files.iter().skip(1))
            .map(|file| store(&upload_id, file, None))
            .buffer_unordered(options.parallelism)
            .try_for_each(async |_| Ok(()))
            .await?;
        let files = tree.files.iter().map(|file| (file.path.clone(), file.mode, false));
        let directories = tree.directories.iter().filter(|dir| worth_telling(dir));
        let directories = directories.map(|dir| (dir.path.clone(), dir.mode, true));
        let entries = files.chain(directories);
        let entries =
            entries.map(|(path, mode, directory)| proto::TreeEntry { path, mode, directory }).collect();
        self.seal(proto::SealTreeRequest { upload_id, entries }).await
    }

    async fn seal(&self, message: proto::SealTreeRequest) -> Result<proto::SealTreeResponse, ClientError> {
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.artifacts(), self.request(message.clone()));
            async move {
                grpc.seal_tree(request).await.map_err(|e| ClientError::status("seal the uploaded tree", e))
            }
        });
        Ok(response.await?.into_inner())
    }

    async fn create_upload(
        &self,
        target: &Target<'_>,
        size: u64,
        sha256: &str,
    ) -> Result<proto::CreateUploadResponse, ClientError> {
        let message = proto::CreateUploadRequest {
            upload_id: target.upload_id.to_owned(),
            path: target.path.to_owned(),
            size,
            sha256: sha256.to_owned(),
        };
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.artifacts(), self.request(message.clone()));
            async move {
                grpc.create_upload(request).await.map_err(|e| ClientError::status("announce the upload", e))
            }
        });
        Ok(response.await?.into_inner())
    }

    /// Hashes, announces and sends a file. Answers the id of its upload, too, which the note gets as soon as it is known.
    async fn store(
        &self,
        file: &mut File,
        local: &Path,
        target: &Target<'_>,
        tracker: &Tracker,
        mut note: Option<&mut Note>,
    ) -> Result<(UploadedFile, String), ClientError> {
        let doing = format!("upload {}", local.display());
        let (size, sha256) = hash(file, local).await?;
        let mut tries = Tries::new(self.retry_policy());
        let mut upload_id = target.upload_id.to_owned();
        // What the service has. Unknown: it is asked.
        let mut have = (!target.resumed).then_some(0);
        let mut whole = size == 0 || (size < RESUMABLE_BYTES && !target.resumed);
        let (mut best, mut waits) = (0, 0);
        let sent = Arc::new(AtomicU64::new(0));
        loop {
            // Each try has a URL of its own: the one before may have run out. The same bytes again are no conflict.
            let target = Target { upload_id: &upload_id, ..*target };
            let created = self.create_upload(&target, size, &sha256).await?;
            let signed = created.url.as_ref().ok_or_else(|| {
                ClientError::new(ErrorKind::Protocol, doing.as_str(), "the answer holds no signed URL")
            })?;
            if let Some(note) = &mut note
                && note.upload_id() != Some(created.upload_id.as_str())
            {
                note.remember(&created.upload_id);
            }
            let pieces = !whole && HttpClient::takes_pieces(signed);
            let at = if pieces { have } else { Some(0) };
            tracker.settle(sent.swap(at.unwrap_or(0), Ordering::Relaxed), at.unwrap_or(0));
            let body = match at {
                Some(at) => Some(body(local, &target, at..size, tracker.clone(), Arc::clone(&sent)).await?),
                None => None,
            };
            let mut before = at.unwrap_or(0);
            let stalled = || {
                let now = sent.load(Ordering::Relaxed);
                std::mem::replace(&mut before, now) == now
            };
            let answer = match (pieces, body) {
                (true, body) => {
                    self.http().put_piece(&doing, signed, at.unwrap_or(0), size, body, stalled).await
                }
                (false, Some(body)) => {
                    self.http().put(&doing, signed, size, body, stalled).await.map(|()| Piece::Stored)
                }
                (false, None) => {
                    Err(ClientError::new(ErrorKind::Protocol, doing.as_str(), "nothing to send"))
                }
            };
            let (uri, id) = (created.uri, created.upload_id);
            upload_id.clone_from(&id);
            match answer {
                Ok(Piece::Stored) => {
                    tracker.settle(sent.load(Ordering::Relaxed), size);
                    tracker.file_done();
                    return Ok((UploadedFile { uri, size, sha256 }, id));
                }
                Ok(Piece::Wanted { from }) => {
                    have = Some(from);
                    if from > best {
                        (best, waits) = (from, 0);
                        tries.progress();
                    } else if at.is_some() {
                        let what = format!("the service wants the bytes from {from} on again");
                        tries.failed(ClientError::new(ErrorKind::Unavailable, doing.as_str(), what)).await?;
                    }
                }
                // No room for pieces there, or no sense in them.
                Err(error) if pieces && error.reason() == Some("NOT_RESUMABLE") => whole = true,
                // The request before is not over: what came is being stored. That takes its time.
                Err(error) if pieces && error.reason() == Some("IN_PROGRESS") && waits < MAX_WAITS => {
                    waits += 1;
                    have = None;
                    clock::sleep(error.retry_after().unwrap_or(WAIT).min(WAIT)).await;
                }
                Err(error) if error.is_retryable() => {
                    have = None;
                    tries.failed(error).await?;
                }
                Err(error) => {
                    tracker.settle(sent.load(Ordering::Relaxed), 0);
                    return Err(error);
                }
            }
        }
    }
}

/// Whether an upload that was found in a note cannot go on: it was sealed or removed, or a file has changed since.
fn begins_anew(error: &ClientError) -> bool {
    match error.kind() {
        ErrorKind::AlreadyExists | ErrorKind::NotFound | ErrorKind::Invalid => true,
        ErrorKind::FailedPrecondition => error.reason() == Some("UPLOAD_SEALED"),
        _ => false,
    }
}

/// A directory that the files' paths do not tell of.
fn worth_telling(dir: &TreeDirectory) -> bool {
    dir.empty || dir.mode != 0o755
}

/// Opens a regular file. Never waits for the other end of a pipe.
async fn open(local: &Path, flags: OFlags) -> Result<File, ClientError> {
    let doing = || format!("open {}", local.display());
    let flags = (flags | OFlags::NONBLOCK).bits();
    let flags = i32::try_from(flags).map_err(|e| ClientError::new(ErrorKind::Io, doing(), e.to_string()))?;
    let file = tokio::fs::OpenOptions::new().read(true).custom_flags(flags).open(local).await;
    let file = file.map_err(|e| ClientError::io(doing(), e))?;
    let metadata = file.metadata().await.map_err(|e| ClientError::io(doing(), e))?;
    if !metadata.is_file() {
        return Err(ClientError::new(ErrorKind::Unsupported, doing(), "it is not a regular file"));
    }
    Ok(file)
}

async fn size_of(file: &File, local: &Path) -> Result<u64, ClientError> {
    let metadata = file.metadata().await;
    Ok(metadata.map_err(|e| ClientError::io(format!("read {}", local.display()), e))?.len())
}

async fn hash(file: &mut File, local: &Path) -> Result<(u64, String), ClientError> {
    let mut hasher = Sha256::new();
    let mut size = 0u64;
    let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
    loop {
        chunk.clear();
        let read = file.read_buf(&mut chunk).await;
        let read = read.map_err(|e| ClientError::io(format!("read {}", local.display()), e))?;
        if read == 0 {
            return Ok((size, hex::encode(hasher.finalize())));
        }
        hasher.update(&chunk);
        size += read as u64;
    }
}

/// A range of the file's bytes. Fails where it has become shorter.
async fn body(
    local: &Path,
    target: &Target<'_>,
    range: Range<u64>,
    tracker: Tracker,
    sent: Arc<AtomicU64>,
) -> Result<RequestBody, ClientError> {
    // A file of a tree is never a link; the caller's own path may be one.
    let flags = if target.in_tree { OFlags::NOFOLLOW } else { OFlags::empty() };
    let mut file = open(local, flags).await?;
    if range.start > 0 {
        let sought = file.seek(io::SeekFrom::Start(range.start)).await;
        sought.map_err(|e| ClientError::io(format!("read {}", local.display()), e))?;
    }
    let size = range.end - range.start;
    let chunks = stream::try_unfold((file.take(size), 0u64), move |(mut file, done)| {
        let (tracker, sent) = (tracker.clone(), Arc::clone(&sent));
        async move {
            let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
            let read = file.read_buf(&mut chunk).await? as u64;
            if read == 0 && done < size {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
            }
            if read == 0 {
                return Ok(None);
            }
            sent.fetch_add(read, Ordering::Relaxed);
            tracker.moved(read);
            let frame: Frame<Bytes> = Frame::data(chunk.freeze());
            Ok(Some((frame, (file, done + read))))
        }
    });
    Ok(StreamBody::new(chunks).boxed_unsync())
}
