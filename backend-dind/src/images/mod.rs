//! Images: from the reference of a spec to content that the engine has and that the run's tenant may have.
//!
//! # Who may have an image
//!
//! An engine has one cache for everybody. What it pulled with one tenant's credentials it gives to whoever names it. So
//! having it is not enough here: a tenant is given an image only where its own credentials, as the configuration has them
//! for it, would get it from the registry. That is proven by asking the registry through the engine (`GET /distribution`)
//! for the very content that is in the cache, with these credentials; a pull with them is a proof, too. A proof counts for
//! the credentials, the repository and the digest, and for [`ImagesConfig::authorisation_seconds`]: so long a revoked right
//! may still be used, and so long an unreachable registry is not missed.
//!
//! An image that the engine has under a name, with no digest of that name's repository, came from no registry: whoever
//! administers the engine put it there, under that name, and it is for everybody. So is everything with
//! [`PullPolicy::Never`]. Ids are no references: they would go around all of this.

mod config;
mod failure;
mod login;
mod prune;
mod pull;
mod reference;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use bollard::{
    Docker,
    models::{DistributionInspect, ImageInspect},
    query_parameters::CreateImageOptionsBuilder,
};
use futures::StreamExt as _;
use runner_core::{
    backend::{AttemptContext, BackendError, BackendErrorKind, ProgressSink},
    clock::Clock,
    spec::{FieldViolation, RunSpec},
};
use tokio::sync::Semaphore;

pub(crate) use self::failure::ImageRefusal;
pub use self::{
    config::{ImagesConfig, PullPolicy, RegistryLogin},
    failure::{ImageError, ImageErrorKind},
};
use self::{
    login::{Login, LoginId},
    prune::Uses,
    pull::Layers,
    reference::Reference,
};
use crate::engine::{Engine, EngineError};

/// Proofs that are remembered. Beyond that all are forgotten, which costs questions to registries and nothing else.
const MAX_PROOFS: usize = 4096;
/// The disk guard looks at most once in this time.
const GUARD_PAUSE: Duration = Duration::from_secs(30);
/// Text of an engine or a registry that is passed on.
const MAX_DETAIL: usize = 1024;

/// The content of an image, `sha256:…`. What a container is made from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageId(String);

impl ImageId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[cfg(test)]
    pub(crate) fn of_test(id: &str) -> Self {
        Self(id.to_owned())
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a container may run on, in the words of image configurations: `linux`, `amd64`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Platform {
    os: String,
    architecture: String,
}

/// What was shown that allows an image: credentials, and `REGISTRY/REPOSITORY@DIGEST`.
type Proof = (LoginId, String);

struct State {
    engine: Engine,
    config: ImagesConfig,
    default_image: Option<String>,
    clock: Arc<dyn Clock>,
    /// When each was proven, on the monotonic clock.
    proofs: Mutex<HashMap<Proof, Duration>>,
    /// One for each reference that is being pulled: pulls of one image are one pull.
    turns: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    pulls: Semaphore,
    uses: Uses,
    guarded: tokio::sync::Mutex<Option<Duration>>,
    platform: Mutex<Option<Platform>>,
}

/// The images of an engine. Cheap to clone.
#[derive(Clone)]
pub struct Images {
    state: Arc<State>,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Images").field("engine", &self.state.engine).finish_non_exhaustive()
    }
}

/// How a step of getting an image fails.
enum Failure {
    Image(ImageError),
    Engine(EngineError),
    NoRoom(String),
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

impl From<bollard::errors::Error> for Failure {
    fn from(error: bollard::errors::Error) -> Self {
        match failure::judge(error) {
            Ok(mut error) => {
                error.detail.truncate(error.detail.floor_char_boundary(MAX_DETAIL));
                Self::Image(error)
            }
            Err(error) => Self::Engine(error),
        }
    }
}

impl Images {
    /// The images of this engine. `default_image` is that of specs that name none.
    pub fn new(
        engine: Engine,
        config: ImagesConfig,
        default_image: Option<String>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let pulls = Semaphore::new(config.concurrent_pulls);
        let state = State {
            engine,
            config,
            default_image,
            clock,
            proofs: Mutex::default(),
            turns: Mutex::default(),
            pulls,
            uses: Uses::default(),
            guarded: tokio::sync::Mutex::default(),
            platform: Mutex::default(),
        };
        Self { state: Arc::new(state) }
    }

    /// What of the spec's image the configuration refuses. Pure.
    pub fn objection(&self, spec: &RunSpec) -> Option<FieldViolation> {
        let Some(image) = spec.image.as_deref().or(self.state.default_image.as_deref()) else {
            let what = "this backend has no default image: name one";
            return Some(FieldViolation::new("spec.image", "REQUIRED", what));
        };
        let refusal = self.state.config.admit(image).err()?;
        let reason = match refusal {
            ImageRefusal::Malformed(_) => "MALFORMED",
            ImageRefusal::NotAllowed(_) | ImageRefusal::NotPinned => "FORBIDDEN",
        };
        Some(FieldViolation::new("spec.image", reason, refusal.to_string()))
    }

    /// The content of the attempt's image: the engine has it, it is for the engine's platform, and the attempt's tenant may
    /// have it. Pulls it where that is needed and allowed. Safe to drop at any await, and to call again.
    ///
    /// # Errors
    /// `Image` with an [`ImageError`] as its source, retryable where that is; `Unschedulable` where the disk guard finds no
    /// room; `Substrate` where the engine failed.
    pub async fn ensure(&self, attempt: &AttemptContext) -> Result<ImageId, BackendError> {
        let spec = &attempt.spec;
        let Some(image) = spec.image.as_deref().or(self.state.default_image.as_deref()) else {
            let refusal = "the spec names no image, and the backend has no default";
            return Err(ImageError::new(ImageErrorKind::Policy, refusal).of(""));
        };
        let found = self.state.ensure(image, attempt).await.map_err(|failure| match failure {
            Failure::Image(error) => error.of(image),
            Failure::Engine(error) => failure::engine(image, error),
            Failure::NoRoom(why) => BackendError::new(
                BackendErrorKind::Unschedulable,
                true,
                format!("get the image {image:?}: {why}"),
            ),
        })?;
        self.state.uses.note(&found.0, self.state.clock.monotonic());
        Ok(found)
    }
}

impl State {
    async fn ensure(&self, image: &str, attempt: &AttemptContext) -> Result<ImageId, Failure> {
        let reference = self.config.admit(image).map_err(ImageError::from)?;
        match self.config.pull {
            PullPolicy::Never => {
                let why = "the engine does not have it, and the backend pulls nothing";
                let local = self.local(&reference.to_string()).await?;
                self.usable(&local.ok_or_else(|| ImageError::new(ImageErrorKind::Missing, why))?).await
            }
            PullPolicy::IfNotPresent => {
                let login = self.login(&reference, attempt).await?;
                if let Some(local) = self.local(&reference.to_string()).await?
                    && self.may_have(&reference, &local, &login).await?
                {
                    return self.usable(&local).await;
                }
                self.fetch(&reference, &login, attempt.progress.as_ref()).await
            }
            PullPolicy::Always => {
                let login = self.login(&reference, attempt).await?;
                self.fetch(&reference, &login, attempt.progress.as_ref()).await
            }
        }
    }

    async fn login(&self, reference: &Reference, attempt: &AttemptContext) -> Result<Login, Failure> {
        let (config, registry, tenant) =
            (self.config.clone(), reference.registry().to_owned(), attempt.tenant.clone());
        let found = tokio::task::spawn_blocking(move || login::find(&config, &registry, &tenant)).await;
        let found =
            found.map_err(|stopped| ImageError::new(ImageErrorKind::Credentials, stopped.to_string()))?;
        Ok(found.map_err(ImageError::from)?)
    }

    /// The client, with a repair: it writes credentials in the wrong one of the two alphabets of base64, and engines take
    /// what they cannot read for no credentials at all.
    async fn docker(&self) -> Result<Docker, EngineError> {
        let docker = self.engine.docker().await?;
        Ok(docker.with_request_modifier(|mut request| {
            if let Some(header) = request.headers_mut().get_mut("X-Registry-Auth")
                && let Ok(text) = header.to_str()
                && let Ok(repaired) = text.replace('+', "-").replace('/', "_").parse()
            {
                *header = repaired;
                header.set_sensitive(true);
            }
            request
        }))
    }

    /// What the engine has under this name.
    async fn local(&self, name: &str) -> Result<Option<ImageInspect>, Failure> {
        match self.engine.image(name).await {
            Ok(found) => Ok(Some(found)),
            Err(error) if failure::is_missing(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The image, where it is for this platform.
    async fn usable(&self, image: &ImageInspect) -> Result<ImageId, Failure> {
        let platform = self.platform().await?;
        let is = |found: &Option<String>, wanted: &str| {
            found.as_deref().is_none_or(|found| found.is_empty() || found == wanted)
        };
        if !is(&image.os, &platform.os) || !is(&image.architecture, &platform.architecture) {
            let text = |part: &Option<String>| part.clone().unwrap_or_default();
            let found = format!("{}/{}", text(&image.os), text(&image.architecture));
            return Err(wrong_platform(&platform, &[found]).into());
        }
        image.id.clone().map(ImageId).ok_or_else(|| EngineError::malformed("an image without an id").into())
    }

    /// The engine's own platform. Asked once: an engine of another one is another machine.
    async fn platform(&self) -> Result<Platform, Failure> {
        if let Some(known) = self.platform.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok(known);
        }
        let docker = self.engine.docker().await?;
        let version = self.engine.answered(docker.version()).await?;
        let (Some(os), Some(architecture)) = (version.os, version.arch) else {
            return Err(EngineError::malformed("a version without a platform").into());
        };
        let platform = Platform { os, architecture };
        *self.platform.lock().unwrap_or_else(PoisonError::into_inner) = Some(platform.clone());
        Ok(platform)
    }

    /// Whether these credentials would get what the engine has. False: the registry does not have that content any more.
    async fn may_have(
        &self,
        reference: &Reference,
        local: &ImageInspect,
        login: &Login,
    ) -> Result<bool, Failure> {
        let contents = contents(reference, local);
        if contents.is_empty() {
            return Ok(true);
        }
        if contents.iter().any(|content| self.is_proven(login.id, content)) {
            return Ok(true);
        }
        for content in contents {
            match self.ask(&content, login).await {
                Ok(_) => return Ok(true),
                Err(Failure::Image(error)) if error.kind == ImageErrorKind::Missing => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn is_proven(&self, login: LoginId, content: &str) -> bool {
        let lifetime = Duration::from_secs(self.config.authorisation_seconds);
        let proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        let proven = proofs.get(&(login, content.to_owned())).copied();
        proven.is_some_and(|proven| self.clock.monotonic().saturating_sub(proven) < lifetime)
    }

    fn prove(&self, login: LoginId, content: String) {
        let mut proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        if proofs.len() >= MAX_PROOFS {
            proofs.clear();
        }
        proofs.insert((login, content), self.clock.monotonic());
    }

    /// Asks the registry for it, and remembers that it was given.
    async fn ask(&self, name: &str, login: &Login) -> Result<DistributionInspect, Failure> {
        let docker = self.docker().await?;
        let asking = docker.inspect_registry_image(name, login.to_engine());
        let answer = tokio::time::timeout(self.engine.timeout(), asking).await;
        let found = answer.map_err(EngineError::unreachable)??;
        if let (Some(digest), Ok(reference)) = (&found.descriptor.digest, name.parse::<Reference>()) {
            self.prove(login.id, reference.at(digest));
        }
        Ok(found)
    }

    /// Asks the registry what it has, and pulls it unless the engine has that already.
    async fn fetch(
        &self,
        reference: &Reference,
        login: &Login,
        progress: &dyn ProgressSink,
    ) -> Result<ImageId, Failure> {
        let name = reference.to_string();
        let offered = self.ask(&name, login).await?;
        self.check_platforms(&offered).await?;
        let turn = self.turn(&name);
        let _turn = turn.lock().await;
        let has = |local: &ImageInspect| {
            let digest = offered.descriptor.digest.as_deref();
            digest.is_some_and(|digest| contents(reference, local).contains(&reference.at(digest)))
        };
        // Somebody else may have pulled it while this waited for its turn.
        if let Some(local) = self.local(&name).await?
            && has(&local)
        {
            return self.usable(&local).await;
        }
        self.guard().await?;
        {
            let Ok(_permit) = self.pulls.acquire().await else {
                return Err(EngineError::unreachable("pulls are over").into());
            };
            self.pull(&name, login, progress).await?;
        }
        let Some(local) = self.local(&name).await? else {
            let why = "the engine pulled it and does not have it";
            return Err(ImageError::new(ImageErrorKind::Network, why).into());
        };
        // The registry gave it to these credentials, whatever the tag means by now.
        for content in contents(reference, &local) {
            self.prove(login.id, content);
        }
        self.usable(&local).await
    }

    async fn check_platforms(&self, offered: &DistributionInspect) -> Result<(), Failure> {
        let platform = self.platform().await?;
        // Manifests of the oldest kind do not say what they are for.
        let known: Vec<String> = offered
            .platforms
            .iter()
            .filter_map(|found| Some(format!("{}/{}", found.os.as_deref()?, found.architecture.as_deref()?)))
            .collect();
        let wanted = format!("{}/{}", platform.os, platform.architecture);
        if known.is_empty() || known.contains(&wanted) {
            Ok(())
        } else {
            Err(wrong_platform(&platform, &known).into())
        }
    }

    /// The lock of pulls of this name. It lives as long as somebody holds it.
    fn turn(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(name).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(name.to_owned(), Arc::downgrade(&turn));
        turn
    }

    /// Pulls. The engine gives up when this is dropped.
    async fn pull(&self, name: &str, login: &Login, progress: &dyn ProgressSink) -> Result<(), Failure> {
        let begun = self.clock.monotonic();
        let options = CreateImageOptionsBuilder::default().from_image(name).build();
        let docker = self.docker().await?;
        // Its answer begins when the registry's does.
        let pause = Duration::from_secs(self.config.pull_pause_seconds);
        let docker = docker.with_timeout(pause);
        let mut messages = std::pin::pin!(docker.create_image(Some(options), None, login.to_engine()));
        let mut layers = Layers::default();
        loop {
            match tokio::time::timeout(pause, messages.next()).await {
                Ok(Some(message)) => {
                    if let Some(now) = layers.take(&message?) {
                        progress.progress(now);
                    }
                }
                Ok(None) => break,
                Err(_) => {
                    let why = format!("the pull made no progress for {} s", pause.as_secs());
                    return Err(ImageError::new(ImageErrorKind::Network, why).into());
                }
            }
        }
        let seconds = self.clock.monotonic().saturating_sub(begun).as_secs_f64();
        tracing::info!(image = name, seconds, "pulled an image");
        Ok(())
    }

    /// Makes room where images are larger than they may be. One look at a time, and not more often than is useful.
    async fn guard(&self) -> Result<(), Failure> {
        let Some(high_water) = self.config.high_water_bytes else { return Ok(()) };
        let mut last = self.guarded.lock().await;
        let now = self.clock.monotonic();
        if last.is_some_and(|last| now.saturating_sub(last) < GUARD_PAUSE) {
            return Ok(());
        }
        let docker = self.engine.docker().await?;
        let swept = prune::sweep(&docker, high_water, &self.uses, now).await?;
        if swept.removed > 0 {
            let prune::Swept { before, after, removed } = swept;
            tracing::info!(
                high_water,
                bytes_before = before,
                bytes_after = after,
                removed,
                "removed unused images"
            );
        }
        if swept.after > high_water {
            let why = format!(
                "its images have {} bytes, more than the high-water mark of {high_water}, and all are in use",
                swept.after
            );
            return Err(Failure::NoRoom(why));
        }
        *last = Some(now);
        Ok(())
    }
}

/// What the engine knows of where an image came from, for the reference's repository: `REGISTRY/REPOSITORY@DIGEST`.
fn contents(reference: &Reference, image: &ImageInspect) -> Vec<String> {
    let digests = image.repo_digests.iter().flatten().filter_map(|digest| reference::canonical(digest));
    let prefix = format!("{}@", reference.name());
    digests.filter(|content| content.starts_with(&prefix)).collect()
}

fn wrong_platform(wanted: &Platform, found: &[String]) -> ImageError {
    let Platform { os, architecture } = wanted;
    let detail = format!("the engine is {os}/{architecture}, the image is for {}", found.join(", "));
    ImageError::new(ImageErrorKind::WrongPlatform, detail)
}
