//! The number system: which levels a quantizer has and how a value becomes one of them.
//!
//! The only place with this arithmetic. Plain data: it knows `f32` and integers, never a tensor, a graph or a file.
//! How a threshold is found is not its business either; see [`threshold`](crate::threshold).

mod bits;
mod params;
mod threshold;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use bits::{Bits, BitsError, Widths};
pub use params::{Levels, QuantParams, QuantParamsError};
pub use threshold::{Range, Threshold};

/// Smallest scale of any quantizer: 2^-126, the smallest normal `f32`, whose reciprocal is still finite.
pub const MIN_SCALE: f32 = f32::MIN_POSITIVE;

/// Where the levels of a quantizer lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// Zero point 0, one threshold.
    Symmetric,
    /// A range [lo, hi] with its own zero point (also called asymmetric or affine).
    Uniform,
    /// Symmetric with a power of two as threshold.
    PowerOfTwo,
}

/// How many thresholds a weight tensor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One.
    PerTensor,
    /// One per output channel.
    PerChannel,
}

/// Bits and grid of a quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scheme {
    /// Width.
    pub bits: Bits,
    /// Where the levels lie.
    pub grid: Grid,
}
