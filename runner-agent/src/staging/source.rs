//! Opens what an input file's bytes come from.

use std::fmt;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use runner_core::{artifact::ArtifactKey, https::HttpsUrl};

use super::{InputStaging, StagingError, StagingErrorKind, error::About, https, tree::StagedFile};

/// Where a file's bytes come from.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Inline(Bytes),
    Object(ArtifactKey),
    Https(HttpsUrl),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline(_) => f.write_str("the inline bytes"),
            Self::Object(key) => key.fmt(f),
            Self::Https(url) => f.write_str(url.shown()),
        }
    }
}

/// A source, opened.
pub(super) struct Opened {
    /// `None`: known when it ends.
    pub(super) size: Option<u64>,
    pub(super) bytes: BoxStream<'static, Result<Bytes, StagingError>>,
}

pub(super) async fn open(
    job: &InputStaging<'_>,
    file: &StagedFile,
    about: &About,
) -> Result<Opened, StagingError> {
    match &file.source {
        Source::Inline(bytes) => {
            let bytes = bytes.clone();
            Ok(Opened { size: file.size, bytes: stream::iter([Ok(bytes)]).boxed() })
        }
        Source::Object(key) => {
            let about = about.clone();
            let key = key.clone();
            let (meta, bytes) = job
                .artifacts
                .get(&key, 0..u64::MAX)
                .await
                .map_err(|error| about.store(format!("read {key}"), error))?;
            if let Some(size) = file.size
                && meta.size != size
            {
                let what = format!("read {key}: it has {} bytes, not the {size} promised", meta.size);
                return Err(about.error(StagingErrorKind::Mismatch, what));
            }
            let bytes = bytes.map_err(move |error| about.store(format!("read {key}"), error)).boxed();
            Ok(Opened { size: Some(meta.size), bytes })
        }
        Source::Https(url) => https::open(&job.limits.https, url, about).await,
    }
}
