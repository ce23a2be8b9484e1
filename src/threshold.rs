//! Chooses quantization thresholds: one search, one file per error method.
//!
//! Plain data in, plain data out: values of a weight tensor or the statistics of an activation, a
//! [`Scheme`](crate::quantizer::Scheme) and an [`ErrorMethod`] give a [`Selection`]. It refuses to know tensors,
//! graphs, names of sites, and the arithmetic of a quantizer, which is [`quantizer`](crate::quantizer)'s alone.

mod channels;
mod choose;
mod closed_form;
mod family;
mod hmse;
mod kl;
mod lp;
mod mae;
mod mass;
mod measure;
mod moments;
mod mse;
mod no_clipping;
mod noise;
mod off_diagonal;
mod pairs;
mod scored;
mod search;
mod select;
mod selection;
mod values;

use std::fmt;

use serde::Serialize;

use crate::quantizer::Bits;
use crate::statistics::NotFinite;

pub use channels::{Channels, ChannelsError, quantize_weights};
pub use hmse::{select_activation_scored, select_weights_scored};
pub use measure::{Cost, cost_of_images};
pub use noise::{noise_of_activation, noise_of_weights};
pub use off_diagonal::GRADIENT_SUMS_MAX_BITS;
pub use select::{select_activation, select_weights};
pub use selection::{CurvePoint, Note, Selection};

/// What a chosen threshold minimises, x being a value and q its quantized image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorMethod {
    /// Nothing: the smallest range that clips no value.
    NoClipping,
    /// Mean of (x − q)².
    Mse,
    /// Mean of abs(x − q).
    Mae,
    /// Mean of abs(x − q)^p.
    Lp {
        /// The exponent p.
        p: Exponent,
    },
    /// The Kullback-Leibler divergence of the distribution from its quantized image; up to [`ErrorMethod::KL_MAX_BITS`].
    Kl,
    /// Σ h (x − q)² / Σ h, h being the Hessian score of each value.
    Hmse,
}

/// The p of [`ErrorMethod::Lp`]: a whole number from 1 to 64. Beyond, the largest error alone counts, which NOCLIPPING
/// keeps at half a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Exponent(u8);

/// A number that is no [`Exponent`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a whole number from 1 to {max}, found {0}", max = Exponent::MAX)]
pub struct ExponentError(i128);

impl Exponent {
    /// The largest p.
    pub const MAX: u8 = 64;

    /// As a number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Exponent {
    /// 2, which makes LP the same as MSE.
    fn default() -> Self {
        Self(2)
    }
}

impl TryFrom<i128> for Exponent {
    type Error = ExponentError;

    fn try_from(p: i128) -> Result<Self, ExponentError> {
        match u8::try_from(p) {
            Ok(p @ 1..=Self::MAX) => Ok(Self(p)),
            _ => Err(ExponentError(p)),
        }
    }
}

/// Why there is no selection.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SelectError {
    /// An activation that was observed without values.
    #[error("expected at least one observed value, found none")]
    Empty,
    /// NaN or infinity in an activation or in a weight tensor with one threshold.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// NaN or infinity in one channel of a weight tensor.
    #[error("channel {channel}: {found}")]
    NotFiniteChannel {
        /// Index along the channel axis.
        channel: usize,
        /// How many.
        found: NotFinite,
    },
    /// A limit on outliers that leaves nothing.
    #[error(
        "expected a z_threshold that leaves values to quantize, found {deviations}, beyond which all values but zeros lie"
    )]
    AllOutliers {
        /// Standard deviations beyond which a value does not count.
        deviations: f64,
    },
    /// KL for a wide grid.
    #[error("expected at most {most} bits for KL, found {bits}", most = ErrorMethod::KL_MAX_BITS)]
    KlBits {
        /// Width of the grid.
        bits: Bits,
    },
    /// HMSE for values alone.
    #[error("HMSE needs Hessian scores, found none")]
    NoScores,
    /// Weights and their Hessian scores differ in number.
    #[error("expected {expected} Hessian scores, one per weight, found {found}")]
    ScoreCount {
        /// Number of weights.
        expected: usize,
        /// Number of scores.
        found: usize,
    },
    /// A negative, NaN or infinite score of a weight.
    #[error("channel {channel}: expected Hessian scores that are finite and not negative, found {score:?}")]
    Score {
        /// Index along the channel axis; 0 of a tensor with one threshold.
        channel: usize,
        /// The first such score.
        score: f32,
    },
    /// NaN, infinity or an overflow in the scores of an activation.
    #[error("expected finite Hessian scores, found sums with NaN or infinity")]
    ScoresNotFinite,
    /// A grid that would have to map a value to infinity, or clip it.
    #[error("expected magnitudes within reach of a power_of_two grid of {bits} bits in f32, found {largest:e}")]
    TooLarge {
        /// The largest magnitude of the data.
        largest: f32,
        /// Width of the grid.
        bits: Bits,
    },
}

impl ErrorMethod {
    /// The names of all error methods, as written in YAML and reports.
    pub const NAMES: [&'static str; 6] = ["NOCLIPPING", "MSE", "MAE", "LP", "KL", "HMSE"];

    /// The widest quantizer that [`ErrorMethod::Kl`] chooses for: on heavy tails at 10 bits it can lose 17 times against
    /// MSE.
    pub const KL_MAX_BITS: u8 = 8;

    /// Its name, as written in YAML and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoClipping => "NOCLIPPING",
            Self::Mse => "MSE",
            Self::Mae => "MAE",
            Self::Lp { .. } => "LP",
            Self::Kl => "KL",
            Self::Hmse => "HMSE",
        }
    }

    /// The exponent of [`ErrorMethod::Lp`].
    pub fn exponent(self) -> Option<Exponent> {
        if let Self::Lp { p } = self { Some(p) } else { None }
    }
}

impl fmt::Display for ErrorMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for ErrorMethod {
    /// As its name; the exponent is another field's business.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod names {
    use super::*;

    #[test]
    fn names_are_complete() {
        let p = Exponent::default();
        let all = [
            ErrorMethod::NoClipping,
            ErrorMethod::Mse,
            ErrorMethod::Mae,
            ErrorMethod::Lp { p },
            ErrorMethod::Kl,
            ErrorMethod::Hmse,
        ];
        assert_eq!(all.map(ErrorMethod::name), ErrorMethod::NAMES);
        assert_eq!(serde_json::to_string(&all[3]).unwrap(), "\"LP\"");
        assert_eq!(all.map(ErrorMethod::exponent), [None, None, None, Some(p), None, None]);
    }

    #[test]
    fn exponents_from_1_to_64() {
        assert_eq!([1, 2, 64].map(|p| Exponent::try_from(p).unwrap().get()), [1, 2, 64]);
        for p in [i128::MIN, -1, 0, 65, 256 + 2, i128::MAX] {
            let message = Exponent::try_from(p).unwrap_err().to_string();
            assert_eq!(message, format!("expected a whole number from 1 to 64, found {p}"));
        }
    }
}
