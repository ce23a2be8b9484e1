//! What a run says of its 8-bit model.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Comparison, Race, SiteReport};
use crate::sites::LeftFloat;

/// The 8-bit model of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Int8 {
    /// Its file in the run directory.
    pub file: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// The library that its kernels were packed for and measured with.
    pub engine: String,
    /// What Python has to say before it loads the file, since a file does not hold that.
    pub set_engine: String,
    /// How often each kernel computes.
    pub kernels: BTreeMap<String, usize>,
    /// Whether activations have 7 bits where the plan says 8.
    pub reduce_range: bool,
    /// Depthwise convolutions whose weights are kept within what the engine's 16-bit sums hold; `None` where it needs none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bounded: Option<Bounded>,
    /// Sites and ops around them that compute in float, each with the reason.
    pub in_float: Vec<LeftFloat>,
    /// Sites whose quantizer no kernel takes, which are simulated in float.
    pub simulated: Vec<LeftFloat>,
    /// Each kernel against the op that it stands for, on the same quantized input, in graph order.
    pub layers: Vec<Layer>,
    /// The file against the float model.
    pub evaluation: Comparison,
    /// The simulation of the same quantizers in float against the float model.
    pub simulation: Comparison,
    /// The file against that simulation.
    pub against_simulation: Comparison,
    /// The simulation, row by row against itself in batches, on at most 64 rows: what rounding alone makes of a difference. `None`
    /// where the model takes no single rows.
    pub noise_floor: Option<Comparison>,
    /// Threads of libtorch's kernels while times were taken.
    pub threads: usize,
    /// Times of the frozen models [`FLOAT`], [`OPTIMIZED`] and [`INT8`]; none where the model does not run on such batches.
    pub speed: Vec<Race>,
}

/// Weights that are kept within what 16-bit sums hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bounded {
    /// How many weights.
    pub weights: usize,
    /// Their channels; one of a weight with one threshold.
    pub channels: usize,
    /// Those whose scale is larger for that.
    pub raised: usize,
}

impl Bounded {
    /// Over all sites.
    #[must_use]
    pub fn of(sites: &[SiteReport]) -> Option<Self> {
        let bounded = sites.iter().filter_map(|site| Some((site.quantizers.scale.len(), site.bounded_channels?)));
        bounded.fold(None, |sum: Option<Self>, (channels, raised)| {
            let sum = sum.unwrap_or(Self { weights: 0, channels: 0, raised: 0 });
            let (weights, channels, raised) = (sum.weights + 1, sum.channels + channels, sum.raised + raised);
            Some(Self { weights, channels, raised })
        })
    }
}

/// Name of the float model in times, frozen.
pub const FLOAT: &str = "float";
/// Name of the float model in times, as `optimize_for_inference` makes it.
pub const OPTIMIZED: &str = "float, optimized";
/// Name of the 8-bit model in times.
pub const INT8: &str = "int8";

/// A kernel against the op that it stands for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Layer {
    /// The layer.
    pub name: String,
    /// The op that it was.
    pub op: String,
    /// The kernel that it is.
    pub kernel: String,
    /// Values compared.
    pub values: u64,
    /// Values of another level, but those on the border between two.
    pub different: u64,
    /// The largest difference, in levels; where the kernel writes float numbers, relative to the largest of them.
    pub largest: f64,
}
