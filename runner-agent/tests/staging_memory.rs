//! Memory does not grow with a file's size. The one test of its process, so that the peak that it reads is its own.

mod staging_kit;

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use runner_agent::staging::{InputStaging, MountPlan, OutputPublishing, Root, publish_outputs, stage_inputs};
use runner_core::{
    artifact::{ArtifactError, ArtifactErrorKind, ArtifactKey, ArtifactMeta, ArtifactStore, ByteStream},
    backend::NoProgress,
    spec::RunSpec,
};
use staging_kit::{artifact, key, output};

const SIZE: u64 = 512 << 20;
const CHUNK: u64 = 1 << 20;
const ALLOWED: u64 = 64 << 20;

/// Yields objects of 512 MiB without holding them, and swallows what is put.
#[derive(Debug)]
struct Bottomless;

#[async_trait]
impl ArtifactStore for Bottomless {
    async fn put(&self, _: &ArtifactKey, mut bytes: ByteStream) -> Result<u64, ArtifactError> {
        let mut size = 0;
        while let Some(chunk) = bytes.try_next().await? {
            size += chunk.len() as u64;
        }
        Ok(size)
    }

    async fn put_bytes(&self, _: &ArtifactKey, _: Bytes) -> Result<(), ArtifactError> {
        Ok(())
    }

    async fn get(
        &self,
        key: &ArtifactKey,
        _: Range<u64>,
    ) -> Result<(ArtifactMeta, ByteStream), ArtifactError> {
        let meta = self.head(key).await?;
        let chunks = stream::iter(0..SIZE / CHUNK).map(|n| Ok(Bytes::from(vec![n as u8; CHUNK as usize])));
        Ok((meta, chunks.boxed()))
    }

    async fn head(&self, key: &ArtifactKey) -> Result<ArtifactMeta, ArtifactError> {
        if key.as_str().starts_with("uploads/") {
            return Ok(ArtifactMeta { key: key.clone(), size: SIZE });
        }
        Err(ArtifactError::new(ArtifactErrorKind::NotFound, key.to_string()))
    }

    fn list(&self, _: &ArtifactKey) -> BoxStream<'static, Result<ArtifactMeta, ArtifactError>> {
        stream::empty().boxed()
    }

    async fn delete(&self, _: &ArtifactKey) -> Result<(), ArtifactError> {
        Ok(())
    }

    async fn probe(&self) -> Result<(), ArtifactError> {
        Ok(())
    }
}

/// The most memory that this process ever had resident, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_gibibyte_in_and_out_takes_less_than_64_mebibytes() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    let spec = RunSpec {
        inputs: vec![artifact("/inputs/a", "uploads/t/a")],
        outputs: vec![output("/outputs/b")],
        ..RunSpec::default()
    };
    let plan = MountPlan::new(&spec).unwrap();
    let limits = runner_agent::staging::StagingLimits::default();
    let before = peak();
    let staged = stage_inputs(InputStaging {
        spec: &spec,
        plan: &plan,
        root: &root,
        artifacts: &Bottomless,
        limits: &limits,
        progress: &NoProgress,
        owner: None,
    })
    .await
    .unwrap();
    assert_eq!(staged.bytes, SIZE);
    std::fs::rename(dir.path().join("in/0/a"), dir.path().join("out/0/b")).unwrap();
    let published = publish_outputs(OutputPublishing {
        spec: &spec,
        plan: &plan,
        root: &root,
        attempt_prefix: &key("runs/t/r/1"),
        artifacts: &Bottomless,
        partial: false,
        limits: &limits,
        progress: &NoProgress,
    })
    .await
    .unwrap();
    assert_eq!(published.manifest.total_bytes, SIZE);
    let grown = peak() - before;
    assert!(grown < ALLOWED, "{} MiB more than before", grown >> 20);
}
