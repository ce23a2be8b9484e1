//! The number system: which levels a quantizer has and how a value becomes one of them.
//!
//! The only place with this arithmetic. Plain data: it knows `f32` and integers, never a tensor, a graph or a file.

use serde::{Deserialize, Serialize};

/// Where the levels of a quantizer lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One.
    PerTensor,
    /// One per output channel.
    PerChannel,
}

/// Width of a quantizer: 2 to 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u8")]
pub struct Bits(u8);

/// Bits and grid of a quantizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Scheme {
    /// Width.
    pub bits: Bits,
    /// Where the levels lie.
    pub grid: Grid,
}
