//! The disk guard: beyond a high-water mark, images that no container uses are removed.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use bollard::{
    Docker,
    models::ImageSummary,
    query_parameters::{ListContainersOptionsBuilder, ListImagesOptions, RemoveImageOptions},
};

use super::reference;
use crate::engine::{EngineError, EngineErrorKind};

/// Between an answer of `ensure` and the container that keeps its image, at most.
const FRESH: Duration = Duration::from_secs(600);
/// Images whose use is remembered.
const MAX_KNOWN: usize = 4096;

/// When images were last used by us, on the monotonic clock.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<HashMap<String, Duration>>);

impl Uses {
    /// It is used now.
    pub(super) fn note(&self, image: &str, now: Duration) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN && !known.contains_key(image) {
            let oldest = known.iter().min_by_key(|(_, used)| **used).map(|(image, _)| image.clone());
            oldest.map(|oldest| known.remove(&oldest));
        }
        known.insert(image.to_owned(), now);
    }

    fn last(&self, image: &str) -> Option<Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(image).copied()
    }
}

/// What a look at the images found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Swept {
    /// Size of the images before.
    pub(super) before: u64,
    /// Size of those that are left.
    pub(super) after: u64,
    /// How many were removed.
    pub(super) removed: usize,
}

fn size(image: &ImageSummary) -> u64 {
    u64::try_from(image.size).unwrap_or(0)
}

/// What may be removed, the longest unused first: what a registry gave, no container has and nobody was just given.
fn candidates<'a>(
    images: &'a [ImageSummary],
    used: &HashSet<String>,
    uses: &Uses,
    now: Duration,
) -> Vec<&'a ImageSummary> {
    let free = |image: &&ImageSummary| {
        let fresh = uses.last(&image.id).is_some_and(|last| now.saturating_sub(last) < FRESH);
        let given = image.repo_digests.iter().any(|digest| reference::canonical(digest).is_some());
        given && !fresh && !used.contains(&image.id)
    };
    let mut found: Vec<&ImageSummary> = images.iter().filter(free).collect();
    // Those that we do not know were used before we were started.
    found.sort_by_key(|image| (uses.last(&image.id), image.created));
    found
}

/// Removes images where together they are larger than `high_water`, until they are smaller than four fifths of it or none
/// is left that may be removed.
///
/// # Errors
/// Where the engine does not answer. An image that it does not remove stays.
pub(super) async fn sweep(
    docker: &Docker,
    high_water: u64,
    uses: &Uses,
    now: Duration,
) -> Result<Swept, EngineError> {
    let images = docker.list_images(None::<ListImagesOptions>).await?;
    let before = images.iter().map(size).fold(0, u64::saturating_add);
    let mut swept = Swept { before, after: before, removed: 0 };
    if before <= high_water {
        return Ok(swept);
    }
    let all = ListContainersOptionsBuilder::default().all(true).build();
    let containers = docker.list_containers(Some(all)).await?;
    let used: HashSet<String> = containers.into_iter().filter_map(|container| container.image_id).collect();
    let low_water = high_water / 5 * 4;
    for image in candidates(&images, &used, uses, now) {
        if swept.after <= low_water {
            break;
        }
        match remove(docker, image).await {
            Ok(()) => {
                swept.after = swept.after.saturating_sub(size(image));
                swept.removed += 1;
                tracing::info!(
                    image = image.id,
                    names = image.repo_tags.join(", "),
                    bytes = size(image),
                    "removed an unused image"
                );
            }
            // Somebody made a container of it in the meantime.
            Err(error) if error.kind == EngineErrorKind::Conflict => {}
            Err(error) if error.is_outage() => return Err(error),
            Err(error) => tracing::warn!(image = image.id, %error, "could not remove an unused image"),
        }
    }
    Ok(swept)
}

/// Takes an image's names away. With the last one the engine removes it. Never by force: one that a container has stays.
async fn remove(docker: &Docker, image: &ImageSummary) -> Result<(), EngineError> {
    let names =
        image.repo_tags.iter().chain(&image.repo_digests).filter(|name| reference::canonical(name).is_some());
    for name in names {
        match docker.remove_image(name, None::<RemoveImageOptions>, None).await.map_err(EngineError::from) {
            Ok(_) => {}
            // It went with a name before.
            Err(error) if error.kind == EngineErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, created: i64, digest: Option<&str>) -> ImageSummary {
        ImageSummary {
            id: id.to_owned(),
            created,
            size: 10,
            repo_tags: vec![format!("r.example/{id}:1")],
            repo_digests: digest.map(str::to_owned).into_iter().collect(),
            ..ImageSummary::default()
        }
    }

    #[test]
    fn only_unused_images_that_a_registry_gave_are_removed_and_the_longest_unused_first() {
        let digest = format!("r.example/x@sha256:{}", "0".repeat(64));
        let uses = Uses::default();
        let images = [
            image("recent", 1, Some(&digest)),
            image("operators", 0, None),
            image("nameless", 0, Some("<none>@<none>")),
            image("running", 0, Some(&digest)),
            image("fresh", 0, Some(&digest)),
            image("unknown-new", 9, Some(&digest)),
            image("unknown-old", 2, Some(&digest)),
            image("older", 5, Some(&digest)),
        ];
        let now = Duration::from_secs(10_000);
        uses.note("recent", now - FRESH);
        uses.note("older", now - FRESH * 2);
        uses.note("fresh", now - FRESH / 2);
        let used = HashSet::from(["running".to_owned()]);
        let order: Vec<&str> =
            candidates(&images, &used, &uses, now).iter().map(|image| image.id.as_str()).collect();
        assert_eq!(order, ["unknown-old", "unknown-new", "older", "recent"]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let uses = Uses::default();
        for i in 0..2 * MAX_KNOWN {
            uses.note(&i.to_string(), Duration::from_secs(i as u64));
        }
        assert_eq!(uses.0.lock().unwrap().len(), MAX_KNOWN);
        assert_eq!(uses.last("0"), None);
        assert!(uses.last(&(2 * MAX_KNOWN - 1).to_string()).is_some());
    }
}
