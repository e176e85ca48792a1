//! Durations and times between the standard library and protobuf.

use std::time::{Duration, SystemTime};

pub use prost_types::{Duration as ProtoDuration, Timestamp};

/// As a protobuf duration; cut to what one can hold.
pub fn duration_to_proto(duration: Duration) -> ProtoDuration {
    ProtoDuration::try_from(duration).unwrap_or(ProtoDuration { seconds: i64::MAX, nanos: 0 })
}

/// As a standard duration. `None` where it is negative.
pub fn duration_from_proto(duration: &ProtoDuration) -> Option<Duration> {
    Duration::try_from(*duration).ok()
}

/// As a standard time. `None` where the system cannot hold it.
pub fn time_from_proto(time: &Timestamp) -> Option<SystemTime> {
    SystemTime::try_from(*time).ok()
}

/// As a protobuf timestamp.
pub fn time_to_proto(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}
