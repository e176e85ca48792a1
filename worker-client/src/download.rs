//! Artifacts become local files.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    io::SeekFrom,
    path::{Path, PathBuf},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use http_body_util::BodyExt as _;
use runner_proto::v1::{self as proto, manifest_entry::Kind};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use crate::{
    beneath::{Directory, PartialFile},
    client::Client,
    error::{ClientError, ErrorKind},
    http_client::{broken, stall},
    manifest_path::{manifest_path, path_in_output},
    retry::{self, Tries},
    transfer::{Tracker, TransferOptions},
};

/// A file that was taken from the service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downloaded {
    /// Where it is.
    pub path: PathBuf,
    /// In bytes.
    pub size: u64,
    /// Lower-case hex.
    pub sha256: String,
}

/// What a file must be, as far as it is known.
#[derive(Debug, Clone, Copy, Default)]
struct Expected<'a> {
    size: Option<u64>,
    sha256: Option<&'a str>,
    mode: Option<u32>,
}

/// One file of a manifest and its place.
struct Planned<'a> {
    entry: &'a proto::ManifestEntry,
    names: Vec<OsString>,
}

impl Client {
    /// Takes one artifact. The file appears at `dest` when it is whole; until then, and after a failure, there is
    /// nothing of it. A broken transfer goes on where it stopped.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Integrity`] where `sha256` (lower-case hex) was given and differs.
    pub async fn download(
        &self,
        uri: impl Into<String>,
        dest: impl AsRef<Path>,
        sha256: Option<&str>,
        options: TransferOptions,
    ) -> Result<Downloaded, ClientError> {
        let (uri, dest) = (uri.into(), dest.as_ref());
        let (dir, name) = split(dest)?;
        let created = self.create_download(&uri).await?;
        let tracker = Tracker::new(&options, created.size, 1);
        let expected = Expected { sha256, ..Expected::default() };
        self.fetch(&uri, dir.begin_file(name)?, expected, &tracker).await
    }

    /// Takes every output of a run: the file `/outputs/a/b` becomes `DIR/outputs/a/b`.
    ///
    /// Nothing outside of `dir` is touched, whatever the manifest says and whatever lies in `dir`: symbolic links are
    /// not followed. Every file is checked against the manifest.
    ///
    /// # Errors
    /// [`ErrorKind::UnsafePath`] for a hostile path, before anything is written, or where a link is in the way;
    /// [`ErrorKind::Integrity`].
    pub async fn download_outputs(
        &self,
        manifest: &proto::Manifest,
        dir: impl AsRef<Path>,
        options: TransferOptions,
    ) -> Result<Vec<Downloaded>, ClientError> {
        let plan = manifest.entries.iter().map(|entry| Ok(Planned { entry, names: manifest_path(entry)? }));
        let plan = plan.collect::<Result<Vec<_>, ClientError>>()?;
        self.fetch_all(plan, dir.as_ref(), options).await
    }

    /// Takes one declared output. Where it is a file, it becomes `dest`, or lies in `dest` where that is a directory;
    /// where it is a directory or a glob, what is in it lies in `dest`.
    ///
    /// # Errors
    /// As [`Client::download_outputs`]; [`ErrorKind::NotFound`] where the manifest has nothing of it.
    pub async fn download_output(
        &self,
        manifest: &proto::Manifest,
        output: &str,
        dest: impl AsRef<Path>,
        options: TransferOptions,
    ) -> Result<Vec<Downloaded>, ClientError> {
        let dest = dest.as_ref();
        let entries: Vec<_> = manifest.entries.iter().filter(|entry| entry.output == output).collect();
        match entries.as_slice() {
            [] => {
                let message = "the run did not write it";
                Err(ClientError::new(ErrorKind::NotFound, format!("download the output {output}"), message))
            }
            [file] if file.path.is_empty() && file.kind() == Kind::File => {
                let into_directory = dest.is_dir() || dest.as_os_str().as_encoded_bytes().ends_with(b"/");
                let (dir, name) = if into_directory {
                    let name = Path::new(output).file_name();
                    (dest, name.ok_or_else(|| ClientError::unsafe_path(output, "it names no file"))?)
                } else {
                    let name = dest.file_name();
                    let name = name.ok_or_else(|| ClientError::unsafe_path(dest, "it names no file"))?;
                    (dest.parent().unwrap_or(Path::new("")), name)
                };
                let plan = vec![Planned { entry: file, names: vec![name.to_owned()] }];
                self.fetch_all(plan, dir, options).await
            }
            entries => {
                let plan = entries.iter().map(|entry| Ok(Planned { entry, names: path_in_output(entry)? }));
                let plan = plan.collect::<Result<Vec<_>, ClientError>>()?;
                self.fetch_all(plan, dest, options).await
            }
        }
    }

    async fn fetch_all(
        &self,
        plan: Vec<Planned<'_>>,
        dir: &Path,
        options: TransferOptions,
    ) -> Result<Vec<Downloaded>, ClientError> {
        let mut seen = HashSet::new();
        if let Some(twice) = plan.iter().find(|planned| !seen.insert(&planned.names)) {
            let path: PathBuf = twice.names.iter().collect();
            return Err(ClientError::unsafe_path(path, "the manifest names it twice"));
        }
        let (directories, files): (Vec<_>, Vec<_>) =
            plan.into_iter().partition(|planned| planned.entry.kind() == Kind::Directory);
        if files.iter().any(|planned| planned.names.is_empty()) {
            return Err(ClientError::unsafe_path(dir, "the manifest has a file in place of the directory"));
        }
        let root = Directory::open_or_create(dir)?;
        for planned in &directories {
            root.descend(&planned.names)?;
        }
        let bytes_total = files.iter().fold(0u64, |sum, planned| sum.saturating_add(planned.entry.size));
        let tracker = Tracker::new(&options, bytes_total, files.len() as u64);
        let fetch = async |planned: &Planned<'_>| {
            let Some((name, parents)) = planned.names.split_last() else {
                return Err(ClientError::unsafe_path(dir, "the manifest names no file"));
            };
            let entry = planned.entry;
            let part = root.descend(parents)?.begin_file(name)?;
            let expected = Expected {
                size: Some(entry.size),
                sha256: (!entry.sha256.is_empty()).then_some(entry.sha256.as_str()),
                mode: (entry.mode != 0).then_some(entry.mode),
            };
            self.fetch(&entry.uri, part, expected, &tracker).await
        };
        let done = stream::iter(&files).map(fetch).buffered(options.parallelism).try_collect().await?;
        // Last, so that a mode does not stand in the way of the files within.
        for planned in directories.iter().filter(|planned| planned.entry.mode != 0) {
            root.descend(&planned.names)?.set_mode(planned.entry.mode)?;
        }
        Ok(done)
    }

    async fn create_download(&self, uri: &str) -> Result<proto::CreateDownloadResponse, ClientError> {
        let message = proto::CreateDownloadRequest { uri: uri.to_owned() };
        let response = retry::idempotent(self.retry_policy(), || {
            let (mut grpc, request) = (self.artifacts(), self.request(message.clone()));
            async move {
                let doing = "ask for the download";
                grpc.create_download(request).await.map_err(|e| ClientError::status(doing, e))
            }
        });
        Ok(response.await?.into_inner())
    }

    async fn fetch(
        &self,
        uri: &str,
        part: PartialFile,
        expected: Expected<'_>,
        tracker: &Tracker,
    ) -> Result<Downloaded, ClientError> {
        let doing = format!("download {}", part.path().display());
        let mut sink = Sink { part, hasher: Sha256::new(), received: 0 };
        let mut tries = Tries::new(self.retry_policy());
        let integrity = |message: String| ClientError::new(ErrorKind::Integrity, doing.as_str(), message);
        loop {
            // Signed anew each time: the one before may have run out.
            let created = self.create_download(uri).await?;
            let size = expected.size.unwrap_or(created.size);
            if size != created.size {
                return Err(integrity(format!("the object has {} bytes instead of {size}", created.size)));
            }
            let before = sink.received;
            match self.receive(&doing, &created, &mut sink, size, tracker).await {
                Ok(()) => break,
                Err(error) if error.is_retryable() => {
                    if sink.received > before {
                        tries.progress();
                    }
                    tries.failed(error).await?;
                }
                Err(error) => return Err(error),
            }
        }
        let sha256 = hex::encode(sink.hasher.finalize());
        if let Some(expected) = expected.sha256
            && expected != sha256
        {
            return Err(integrity(format!("its SHA-256 is {sha256} instead of {expected}")));
        }
        let path = sink.part.finish(expected.mode).await?;
        tracker.file_done();
        Ok(Downloaded { path, size: sink.received, sha256 })
    }

    /// Takes what is missing.
    async fn receive(
        &self,
        doing: &str,
        created: &proto::CreateDownloadResponse,
        sink: &mut Sink,
        size: u64,
        tracker: &Tracker,
    ) -> Result<(), ClientError> {
        if sink.received == size {
            return Ok(());
        }
        let no_url = || ClientError::new(ErrorKind::Protocol, doing, "the answer holds no signed URL");
        let signed = created.url.as_ref().ok_or_else(no_url)?;
        let (mut response, continued) = self.http().get(doing, signed, sink.received).await?;
        if !continued {
            tracker.settle(sink.received, 0);
            sink.restart().await.map_err(|e| ClientError::io(doing, e))?;
        }
        let body = response.body_mut();
        let stall_timeout = self.http().stall_timeout();
        loop {
            let frame = tokio::time::timeout(stall_timeout, body.frame()).await;
            let frame = match frame.map_err(|_| stall(doing, stall_timeout))? {
                Some(frame) => frame.map_err(|e| broken(doing, e))?,
                None => break,
            };
            let Ok(data) = frame.into_data() else { continue };
            if data.len() as u64 > size - sink.received {
                let message = format!("more than the {size} bytes that were announced");
                return Err(ClientError::new(ErrorKind::Integrity, doing, message));
            }
            sink.write(&data).await.map_err(|e| ClientError::io(doing, e))?;
            tracker.moved(data.len() as u64);
        }
        if sink.received < size {
            let message = format!("the transfer ended after {} of {size} bytes", sink.received);
            return Err(ClientError::new(ErrorKind::Unreachable, doing, message));
        }
        Ok(())
    }
}

/// A file that is being received.
struct Sink {
    part: PartialFile,
    hasher: Sha256,
    received: u64,
}

impl Sink {
    async fn write(&mut self, data: &[u8]) -> std::io::Result<()> {
        self.part.file.write_all(data).await?;
        self.hasher.update(data);
        self.received += data.len() as u64;
        Ok(())
    }

    async fn restart(&mut self) -> std::io::Result<()> {
        self.part.file.flush().await?;
        self.part.file.set_len(0).await?;
        self.part.file.seek(SeekFrom::Start(0)).await?;
        self.hasher = Sha256::new();
        self.received = 0;
        Ok(())
    }
}

/// The directory and the name of a file of the caller's choice.
fn split(dest: &Path) -> Result<(Directory, &OsStr), ClientError> {
    let name = dest.file_name().ok_or_else(|| ClientError::unsafe_path(dest, "it names no file"))?;
    let dir = Directory::open_or_create(dest.parent().unwrap_or(Path::new("")))?;
    Ok((dir, name))
}
