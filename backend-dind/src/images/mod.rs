//! Images: from the reference of a spec to content that the engine has.

use std::fmt;

use runner_core::backend::{AttemptContext, BackendError, BackendErrorKind};

use crate::{
    engine::{Engine, EngineErrorKind},
    error,
};

/// The content of an image, `sha256:…`. What a container is made from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct ImageId(String);

impl ImageId {
    /// An id for tests.
    #[cfg(test)]
    pub(crate) fn of_test(id: &str) -> Self {
        Self(id.to_owned())
    }

    /// The id as text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The images of an engine.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    engine: Engine,
    default_image: Option<String>,
}

impl Images {
    /// The images of this engine.
    pub(crate) fn new(engine: Engine, default_image: Option<String>) -> Self {
        Self { engine, default_image }
    }

    /// The content of the attempt's image.
    ///
    /// # Errors
    /// `Image` where the engine does not have it.
    pub(crate) async fn ensure(&self, attempt: &AttemptContext) -> Result<ImageId, BackendError> {
        let name = attempt.spec.image.as_deref().or(self.default_image.as_deref()).ok_or_else(|| {
            let context = "find the image: the spec names none, and the backend has no default";
            BackendError::new(BackendErrorKind::Image, false, context)
        })?;
        let context = || format!("find the image {name:?}");
        match self.engine.image(name).await {
            Ok(found) => found.id.map(ImageId).ok_or_else(|| error::unsupported(context())),
            Err(source) if source.kind == EngineErrorKind::NotFound => {
                Err(BackendError::with_source(BackendErrorKind::Image, false, context(), source))
            }
            Err(source) => Err(error::engine(context(), source)),
        }
    }
}
