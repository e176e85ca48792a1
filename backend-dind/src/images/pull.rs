//! What a pull says while it goes on.

use std::collections::HashMap;

use bollard::models::CreateImageInfo;
use runner_core::backend::{Direction, Progress};

/// No image has more layers; what an engine says of more is not counted.
const MAX_LAYERS: usize = 1024;

/// Adds up what the engine says of each layer.
#[derive(Debug, Default)]
pub(super) struct Layers {
    /// Bytes that came, and that there are, by the layer's id.
    known: HashMap<String, (u64, u64)>,
}

impl Layers {
    /// Takes a message. Answers the progress, where the message had any.
    pub(super) fn take(&mut self, message: &CreateImageInfo) -> Option<Progress> {
        let (id, detail) = (message.id.as_ref()?, message.progress_detail.as_ref()?);
        let size = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
        let total = size(detail.total).filter(|total| *total > 0)?;
        if self.known.len() >= MAX_LAYERS && !self.known.contains_key(id) {
            return None;
        }
        let layer = self.known.entry(id.clone()).or_default();
        // A layer is downloaded, then unpacked: the second time its bytes count from zero again.
        layer.0 = layer.0.max(size(detail.current).unwrap_or(0).min(total));
        layer.1 = layer.1.max(total);
        Some(self.progress())
    }

    fn progress(&self) -> Progress {
        let sum = |of: fn(&(u64, u64)) -> u64| self.known.values().map(of).fold(0, u64::saturating_add);
        let whole = self.known.values().filter(|(done, total)| done == total).count();
        Progress {
            direction: Direction::Image,
            bytes_done: sum(|layer| layer.0),
            bytes_total: sum(|layer| layer.1),
            files_done: whole as u64,
            files_total: self.known.len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::ProgressDetail;

    use super::*;

    fn message(id: &str, current: i64, total: i64) -> CreateImageInfo {
        CreateImageInfo {
            id: Some(id.to_owned()),
            progress_detail: Some(ProgressDetail { current: Some(current), total: Some(total) }),
            ..CreateImageInfo::default()
        }
    }

    #[test]
    fn layers_are_added_up_and_unpacking_takes_nothing_back() {
        let mut layers = Layers::default();
        assert_eq!(
            layers.take(&CreateImageInfo { id: Some("latest".into()), ..CreateImageInfo::default() }),
            None
        );
        layers.take(&message("a", 10, 100));
        layers.take(&message("b", 50, 50));
        layers.take(&message("a", 100, 100));
        let progress = layers.take(&message("a", 1, 100)).unwrap();
        assert_eq!((progress.bytes_done, progress.bytes_total), (150, 150));
        assert_eq!((progress.files_done, progress.files_total), (2, 2));
        assert_eq!(progress.direction, Direction::Image);
    }

    #[test]
    fn nonsense_is_not_counted() {
        let mut layers = Layers::default();
        assert_eq!(layers.take(&message("a", -1, -1)), None);
        assert_eq!(layers.take(&message("a", 900, 100)).unwrap().bytes_done, 100);
        for i in 0..2 * MAX_LAYERS {
            layers.take(&message(&format!("layer {i}"), 1, i64::MAX));
        }
        assert_eq!(layers.known.len(), MAX_LAYERS);
        assert_eq!(layers.progress().bytes_total, u64::MAX);
    }
}
