//! A part of the traffic.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A part of the traffic, exact to a hundredth of a percent. A number of percents in documents: `5`, `0.25`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Share(u16);

/// A number that is no share.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{0} is not a number of percents from 0 to 100 with at most two decimals")]
pub struct InvalidShare(pub f64);

impl Share {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// One of a hundred.
    pub const ONE_PERCENT: Self = Self(100);
    /// Half.
    pub const HALF: Self = Self(5_000);
    /// Everything.
    pub const ALL: Self = Self(10_000);

    /// From hundredths of a percent; `None` above 10 000.
    pub const fn from_hundredths(hundredths: u16) -> Option<Self> {
        if hundredths <= Self::ALL.0 { Some(Self(hundredths)) } else { None }
    }

    /// In hundredths of a percent, from 0 to 10 000.
    pub const fn hundredths(self) -> u16 {
        self.0
    }

    /// What is left of everything.
    #[must_use]
    pub const fn rest(self) -> Self {
        Self(Self::ALL.0 - self.0)
    }

    /// In percents.
    pub fn percent(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    /// Both together; `None` where that is more than everything.
    pub const fn plus(self, other: Self) -> Option<Self> {
        Self::from_hundredths(self.0.saturating_add(other.0))
    }
}

impl TryFrom<f64> for Share {
    type Error = InvalidShare;

    fn try_from(percent: f64) -> Result<Self, InvalidShare> {
        let hundredths = (percent * 100.0).round();
        // What is written with two decimals differs from its hundredths by no more than the rounding of a double.
        if !(0.0..=10_000.0).contains(&hundredths) || (percent * 100.0 - hundredths).abs() > 1e-6 {
            return Err(InvalidShare(percent));
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 10 000")]
        Ok(Self(hundredths as u16))
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> Self {
        share.percent()
    }
}

impl fmt::Display for Share {
    /// `5 %`, `0.25 %`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.percent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_share_is_read_back_as_it_is_written() {
        for hundredths in 0..=10_000 {
            let share = Share::from_hundredths(hundredths).unwrap();
            let text = serde_json::to_string(&share).unwrap();
            assert_eq!(serde_json::from_str::<Share>(&text).unwrap(), share, "{text}");
        }
        assert_eq!(serde_json::from_str::<Share>("5").unwrap().hundredths(), 500);
        assert_eq!(Share::from_hundredths(25).unwrap().to_string(), "0.25 %");
        assert_eq!(Share::ALL.to_string(), "100 %");
    }

    #[test]
    fn what_is_no_share_is_refused() {
        for bad in [-0.01, 100.01, 0.001, 33.333, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(Share::try_from(bad).is_err(), "{bad}");
        }
        assert_eq!(Share::from_hundredths(10_001), None);
        assert_eq!(Share::ALL.plus(Share(1)), None);
    }
}
