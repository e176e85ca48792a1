//! Objects in files, with the rules of S3.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    ops::Bound,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use runner_core::clock::{self, Clock};
use s3s::{
    S3, S3Request, S3Response, S3Result,
    dto::{
        AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput,
        CompleteMultipartUploadOutput, CreateMultipartUploadInput, CreateMultipartUploadOutput,
        DeleteObjectInput, DeleteObjectOutput, ETag, ETagCondition, GetObjectInput, GetObjectOutput,
        HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput, ListMultipartUploadsInput,
        ListMultipartUploadsOutput, ListObjectsV2Input, ListObjectsV2Output, MultipartUpload, Object,
        PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp, UploadPartInput, UploadPartOutput,
    },
    s3_error,
};
use sha2::{Digest as _, Sha256};

/// Read at once, in bytes.
const CHUNK: usize = 256 * 1024;
/// What a hole reads as.
static ZEROS: [u8; 4096] = [0; 4096];
/// The smallest part but the last, in bytes.
const MIN_PART: u64 = 5 * 1024 * 1024;
/// Keys in one answer of a list.
const PAGE: usize = 1000;

/// One bucket, below a directory of its own.
#[derive(Debug)]
pub struct Bucket {
    dir: PathBuf,
    name: String,
    next: AtomicU64,
    inner: Mutex<Inner>,
    clock: Arc<dyn Clock>,
}

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Stored>,
    uploads: HashMap<String, Upload>,
    /// Bytes that may still be stored.
    room: Option<u64>,
}

#[derive(Debug)]
struct Upload {
    key: String,
    parts: BTreeMap<i32, (String, Arc<Piece>)>,
}

/// An object: the files that it consists of.
#[derive(Debug, Clone)]
struct Stored {
    pieces: Vec<Arc<Piece>>,
    size: u64,
    etag: String,
    modified_micros: i64,
}

/// A file that is removed when nothing refers to it any more.
#[derive(Debug)]
struct Piece {
    path: PathBuf,
    size: u64,
}

impl Drop for Piece {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn internal(error: std::io::Error) -> s3s::S3Error {
    s3_error!(error, InternalError)
}

impl Bucket {
    /// An empty bucket whose files lie in `dir`.
    pub fn new(dir: &Path, name: &str) -> Self {
        Self {
            dir: dir.to_owned(),
            name: name.to_owned(),
            next: AtomicU64::new(1),
            inner: Mutex::default(),
            clock: clock::system().0,
        }
    }

    /// Keys with an upload in parts that is neither complete nor aborted.
    pub fn uploads(&self) -> Vec<String> {
        self.lock().uploads.values().map(|upload| upload.key.clone()).collect()
    }

    /// Every key.
    pub fn keys(&self) -> Vec<String> {
        self.lock().objects.keys().cloned().collect()
    }

    /// Takes only so many bytes more.
    pub fn set_room(&self, bytes: Option<u64>) {
        self.lock().room = bytes;
    }

    /// Replaces an object from outside.
    ///
    /// # Panics
    /// Where the file cannot be written.
    pub fn replace(&self, key: &str, bytes: &[u8]) {
        let path = self.fresh();
        std::fs::write(&path, bytes).expect("the object's file is written");
        let piece = Arc::new(Piece { path, size: bytes.len() as u64 });
        self.publish(key, vec![piece]);
    }

    /// Puts an object of so many zero bytes there, which takes no disk.
    ///
    /// # Panics
    /// Where the file cannot be made.
    pub fn put_zeros(&self, key: &str, size: u64) {
        let path = self.fresh();
        File::create(&path).and_then(|file| file.set_len(size)).expect("the object's file is made");
        self.publish(key, vec![Arc::new(Piece { path, size })]);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> PathBuf {
        self.dir.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    fn publish(&self, key: &str, pieces: Vec<Arc<Piece>>) -> String {
        // With a dash, as of an object in parts: clients do not take it for an MD5.
        let etag = format!("{:032x}-{}", self.next.fetch_add(1, Ordering::Relaxed), pieces.len());
        let stored = Stored {
            size: pieces.iter().map(|piece| piece.size).sum(),
            pieces,
            etag: etag.clone(),
            modified_micros: self.clock.now().as_micros(),
        };
        self.lock().objects.insert(key.to_owned(), stored);
        etag
    }

    fn find(&self, bucket: &str, key: &str) -> S3Result<Stored> {
        self.check(bucket)?;
        self.lock().objects.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey))
    }

    fn check(&self, bucket: &str) -> S3Result<()> {
        if bucket == self.name { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
    }

    /// Writes a body to a file of its own, and holds it to the digest that was promised.
    async fn take(&self, body: Option<StreamingBlob>, sha256: Option<&str>) -> S3Result<Arc<Piece>> {
        let path = self.fresh();
        let file = File::create(&path).map_err(internal)?;
        let mut piece = Piece { path, size: 0 };
        let mut state = Some((file, Sha256::new()));
        if let Some(mut body) = body {
            while let Some(chunk) = body.next().await {
                let chunk = chunk
                    .map_err(|error| s3s::S3Error::with_source(s3s::S3ErrorCode::IncompleteBody, error))?;
                self.reserve(chunk.len() as u64)?;
                let at = piece.size;
                piece.size += chunk.len() as u64;
                let (mut file, mut hash) = state.take().ok_or_else(|| s3_error!(InternalError))?;
                let hashed = sha256.is_some();
                let written = tokio::task::spawn_blocking(move || {
                    if hashed {
                        hash.update(&chunk);
                    }
                    // Zeros are a hole, so that objects of gigabytes need no disk.
                    if chunk.chunks(ZEROS.len()).all(|part| *part == ZEROS[..part.len()]) {
                        file.set_len(at + chunk.len() as u64)?;
                        file.seek(SeekFrom::End(0))?;
                    } else {
                        file.write_all(&chunk)?;
                    }
                    Ok::<_, std::io::Error>((file, hash))
                });
                state = Some(written.await.map_err(|_| s3_error!(InternalError))?.map_err(internal)?);
            }
        }
        if let (Some(promised), Some((_, hash))) = (sha256, state) {
            let digest = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, hash.finalize());
            if digest != promised {
                return Err(s3_error!(BadDigest));
            }
        }
        Ok(Arc::new(piece))
    }

    fn reserve(&self, bytes: u64) -> S3Result<()> {
        let mut inner = self.lock();
        if let Some(room) = &mut inner.room {
            *room = room.checked_sub(bytes).ok_or_else(|| {
                let mut full = s3_error!(InternalError, "the test's bucket is full");
                full.set_code("XMinioStorageFull".parse().unwrap_or(s3s::S3ErrorCode::InternalError));
                full.set_status_code(http::StatusCode::INSUFFICIENT_STORAGE);
                full
            })?;
        }
        Ok(())
    }

    fn absent(&self, key: &str, condition: Option<&ETagCondition>) -> S3Result<()> {
        match condition {
            Some(ETagCondition::Any) if self.lock().objects.contains_key(key) => {
                Err(s3_error!(PreconditionFailed))
            }
            _ => Ok(()),
        }
    }
}

fn condition_holds(stored: &Stored, if_match: Option<&ETagCondition>) -> S3Result<()> {
    match if_match {
        Some(ETagCondition::ETag(etag)) if etag.value() != stored.etag => Err(s3_error!(PreconditionFailed)),
        _ => Ok(()),
    }
}

fn timestamp(micros: i64) -> Timestamp {
    let since = std::time::Duration::from_micros(u64::try_from(micros).unwrap_or(0));
    Timestamp::from(std::time::UNIX_EPOCH + since)
}

fn length(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// Where in the object a reader is.
struct Reading {
    pieces: Vec<Arc<Piece>>,
    open: Option<(usize, File)>,
    at: u64,
    end: u64,
}

impl Reading {
    fn next(mut self) -> std::io::Result<Option<(Bytes, Self)>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let mut begin = 0;
        for (number, piece) in self.pieces.iter().enumerate() {
            if self.at < begin + piece.size {
                if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
                    let mut file = File::open(&piece.path)?;
                    file.seek(SeekFrom::Start(self.at - begin))?;
                    self.open = Some((number, file));
                }
                let left = (begin + piece.size).min(self.end) - self.at;
                let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                let mut chunk = vec![0; wanted];
                if let Some((_, file)) = &mut self.open {
                    file.read_exact(&mut chunk)?;
                }
                self.at += wanted as u64;
                return Ok(Some((chunk.into(), self)));
            }
            begin += piece.size;
        }
        Ok(None)
    }
}

fn body(stored: &Stored, range: std::ops::Range<u64>) -> StreamingBlob {
    let reading = Reading { pieces: stored.pieces.clone(), open: None, at: range.start, end: range.end };
    StreamingBlob::wrap(stream::try_unfold(reading, |reading| async move {
        tokio::task::spawn_blocking(move || reading.next()).await.map_err(std::io::Error::other)?
    }))
}

#[async_trait::async_trait]
impl S3 for Bucket {
    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        self.check(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = req.input;
        self.check(&input.bucket)?;
        self.absent(&input.key, input.if_none_match.as_ref())?;
        let piece = self.take(input.body, input.checksum_sha256.as_deref()).await?;
        self.absent(&input.key, input.if_none_match.as_ref())?;
        let etag = self.publish(&input.key, vec![piece]);
        Ok(S3Response::new(PutObjectOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let stored = self.find(&input.bucket, &input.key)?;
        condition_holds(&stored, input.if_match.as_ref())?;
        let (range, content_range) = match input.range {
            None => (0..stored.size, None),
            Some(range) => {
                let range = range.check(stored.size)?;
                let text = format!("bytes {}-{}/{}", range.start, range.end - 1, stored.size);
                (range, Some(text))
            }
        };
        Ok(S3Response::new(GetObjectOutput {
            content_length: Some(length(range.end - range.start)),
            body: Some(body(&stored, range)),
            content_range,
            e_tag: Some(ETag::Strong(stored.etag)),
            last_modified: Some(timestamp(stored.modified_micros)),
            ..Default::default()
        }))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let stored = self.find(&req.input.bucket, &req.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(length(stored.size)),
            e_tag: Some(ETag::Strong(stored.etag)),
            last_modified: Some(timestamp(stored.modified_micros)),
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.check(&req.input.bucket)?;
        self.lock().objects.remove(&req.input.key);
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        self.check(&input.bucket)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input.continuation_token.clone().or(input.start_after);
        let most = input.max_keys.and_then(|most| usize::try_from(most).ok()).unwrap_or(PAGE).min(PAGE);
        let inner = self.lock();
        let from = match &after {
            Some(after) if *after >= prefix => Bound::Excluded(after.clone()),
            _ => Bound::Included(prefix.clone()),
        };
        let mut found: Vec<Object> = inner
            .objects
            .range((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&prefix))
            .take(most + 1)
            .map(|(key, stored)| Object {
                key: Some(key.clone()),
                size: Some(length(stored.size)),
                e_tag: Some(ETag::Strong(stored.etag.clone())),
                last_modified: Some(timestamp(stored.modified_micros)),
                ..Default::default()
            })
            .collect();
        let truncated = found.len() > most;
        found.truncate(most);
        let next = found.last().filter(|_| truncated).and_then(|object| object.key.clone());
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(prefix),
            key_count: i32::try_from(found.len()).ok(),
            max_keys: i32::try_from(most).ok(),
            is_truncated: Some(truncated),
            next_continuation_token: next,
            contents: Some(found),
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        self.check(&input.bucket)?;
        let id = format!("upload-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let upload = Upload { key: input.key.clone(), parts: BTreeMap::new() };
        self.lock().uploads.insert(id.clone(), upload);
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let input = req.input;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument));
        }
        let known =
            |inner: &Inner| inner.uploads.get(&input.upload_id).is_some_and(|upload| upload.key == input.key);
        if !known(&self.lock()) {
            return Err(s3_error!(NoSuchUpload));
        }
        let piece = self.take(input.body, None).await?;
        let etag = format!("{:032x}", self.next.fetch_add(1, Ordering::Relaxed));
        let mut inner = self.lock();
        let upload = inner.uploads.get_mut(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        upload.parts.insert(input.part_number, (etag.clone(), piece));
        Ok(S3Response::new(UploadPartOutput { e_tag: Some(ETag::Strong(etag)), ..Default::default() }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        self.absent(&input.key, input.if_none_match.as_ref())?;
        let wanted = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let pieces = {
            let inner = self.lock();
            let upload = inner.uploads.get(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
            let mut pieces = Vec::with_capacity(wanted.len());
            for (at, part) in wanted.iter().enumerate() {
                let number = part.part_number.ok_or_else(|| s3_error!(InvalidPart))?;
                let (etag, piece) = upload.parts.get(&number).ok_or_else(|| s3_error!(InvalidPart))?;
                if part.e_tag.as_ref().is_none_or(|promised| promised.value() != etag) {
                    return Err(s3_error!(InvalidPart));
                }
                if at + 1 < wanted.len() && piece.size < MIN_PART {
                    return Err(s3_error!(EntityTooSmall));
                }
                pieces.push(Arc::clone(piece));
            }
            pieces
        };
        let etag = self.publish(&input.key, pieces);
        self.lock().uploads.remove(&input.upload_id);
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(etag)),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        match self.lock().uploads.remove(&req.input.upload_id) {
            Some(_) => Ok(S3Response::new(AbortMultipartUploadOutput::default())),
            None => Err(s3_error!(NoSuchUpload)),
        }
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let uploads = self
            .lock()
            .uploads
            .iter()
            .map(|(id, upload)| MultipartUpload {
                key: Some(upload.key.clone()),
                upload_id: Some(id.clone()),
                ..Default::default()
            })
            .collect();
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(req.input.bucket),
            uploads: Some(uploads),
            is_truncated: Some(false),
            ..Default::default()
        }))
    }
}
