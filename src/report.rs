//! What one run did, as plain data, and its JSON form. It computes nothing.

mod files;
mod int8;
mod measures;
mod mixed_precision;
mod provenance;
mod speed;
mod sweep;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{BiasCorrection, Distribution, Rounding};
use crate::quantizer::{Bits, Granularity, Grid, QuantParams, Threshold};
use crate::sites::LeftFloat;
use crate::threshold::{Cost, ErrorMethod, Exponent, Selection};

pub use files::{Alone, FilesReport, Measures};
pub use int8::{Bounded, FLOAT, INT8, Int8, Layer as Int8Layer, OPTIMIZED};
pub use measures::{Accuracy, Comparison, Sqnr};
pub use mixed_precision::{Allotted, Budget, MixedPrecision, Noise, Share, SiteNoise, Uniform, WidthNoise};
pub use provenance::{NotQuantized, Provenance, QuantizedSite};
pub use speed::{Bench, Latency, Race};
pub use sweep::{Gave, SweepReport, SweepRow};

/// Version of the report's form; grows when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// Everything that `report.json` holds.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Absolute path of the float model.
    pub model: PathBuf,
    /// Where it ran.
    pub device: String,
    /// Seed of everything that draws.
    pub seed: u64,
    /// SHA-256 of what went in.
    pub hashes: Hashes,
    /// Of tsquant and libtorch.
    pub versions: Versions,
    /// Seconds per stage.
    pub timings_s: Timings,
    /// Largest resident memory of the process; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// Calibration rows.
    pub calibration_samples: usize,
    /// What mixed precision chose; `None` where that was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixed_precision: Option<MixedPrecision>,
    /// How the Hessian scores were computed; `None` where nothing asks for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hessian: Option<Hessian>,
    /// How biases were corrected; `None` where that was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias_correction: Option<CorrectedBiases>,
    /// Weights that are rounded to nearest though more was asked for, each with the reason; `None` where it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_rounded: Option<Vec<LeftFloat>>,
    /// Why rounding and bias correction op by op were given up, if they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub given_up: Option<String>,
    /// The 8-bit model; `None` where no format asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub int8: Option<Int8>,
    /// What was quantized, weights first, in graph order.
    pub sites: Vec<SiteReport>,
    /// The sites that lose most, worst first.
    pub worst_sites: Vec<WorstSite>,
    /// What was not.
    pub left_float: Vec<LeftFloat>,
    /// What the float model's file holds and the emitted one does not, though `forward` does not need it.
    pub dropped: Vec<Dropped>,
    /// What a reader should know.
    pub warnings: Vec<String>,
    /// Float against quantized.
    pub evaluation: Evaluation,
    /// Sizes of the model files.
    pub files: Files,
}

/// SHA-256 in hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hashes {
    /// The model file.
    pub model: String,
    /// The calibration data.
    pub calibration: String,
    /// The evaluation data, if it is other data.
    pub evaluation: Option<String>,
    /// The resolved plan without `output.dir`.
    pub plan: String,
}

/// What made the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// This program.
    pub tsquant: String,
    /// The libtorch that it runs on.
    pub torch: String,
}

/// Seconds per stage.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Timings {
    /// Hash, load and clean the model; open the data.
    pub load: f64,
    /// Run the calibration data.
    pub calibrate: f64,
    /// Compute Hessian scores; 0 where no error method asks for them.
    pub hessian: f64,
    /// Choose thresholds.
    pub search: f64,
    /// Round weights and correct biases op by op; 0 where neither is asked for.
    pub correct: f64,
    /// Write the model.
    pub emit: f64,
    /// Compare the written model with its simulation.
    pub check: f64,
    /// Compare float and quantized.
    pub evaluate: f64,
    /// All of it.
    pub total: f64,
}

/// How Hessian scores were computed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hessian {
    /// Calibration rows that were used.
    pub samples: usize,
    /// Random directions for each row.
    pub probes: usize,
    /// Rows in a batch.
    pub batch_size: usize,
    /// How directions were drawn.
    pub distribution: Distribution,
    /// Seed of rows and directions.
    pub seed: u64,
    /// The relative standard error that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// The largest relative standard error of a site; `None` for a single probe.
    pub standard_error: Option<f64>,
    /// Outputs that no gradient can be asked of.
    pub left_out: Vec<String>,
    /// They are those that an earlier run kept.
    pub reused: bool,
}

/// Which biases were corrected.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorrectedBiases {
    /// How.
    pub method: BiasCorrection,
    /// In graph order.
    pub layers: Vec<CorrectedBias>,
    /// Ops with quantized weights whose bias was not, each with the reason.
    pub left_out: Vec<LeftFloat>,
}

/// A corrected bias.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorrectedBias {
    /// The layer.
    pub layer: String,
    /// Its op.
    pub op: String,
    /// What was added to each output channel; to nothing where there was no bias.
    pub added: Vec<f32>,
}

/// Weight or activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A constant.
    Weight,
    /// A value of the running model.
    Activation,
}

/// One quantized site.
#[derive(Debug, Clone, Serialize)]
pub struct SiteReport {
    /// Its name.
    pub name: String,
    /// Weight or activation.
    pub kind: Kind,
    /// The layer that it belongs to.
    pub layer: String,
    /// That layer's op.
    pub op: String,
    /// Width.
    pub bits: Bits,
    /// Where its levels lie.
    pub grid: Grid,
    /// One threshold, or one per output channel.
    pub granularity: Granularity,
    /// How thresholds were chosen.
    pub error_method: ErrorMethod,
    /// The p of LP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l_p_value: Option<Exponent>,
    /// What its Hessian scores are worth, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<SiteScores>,
    /// How its weights were rounded; `None` of activations, and of weights rounded to nearest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rounding: Option<RoundedWeight>,
    /// Of a weight that is kept within what the engine's 16-bit sums hold: channels whose scale is larger for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bounded_channels: Option<usize>,
    /// Its quantizers and what they cost.
    #[serde(flatten)]
    pub quantizers: Quantizers,
}

/// What the Hessian scores of one site are worth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SiteScores {
    /// ‖estimated standard error‖ / ‖scores‖ over the elements of a weight, or over the octaves of an activation; `None` for a
    /// single probe.
    pub standard_error: Option<f64>,
    /// Channels whose scores are all zero, so that MSE chose for them.
    pub zero_channels: usize,
    /// What the errors of an activation cost at the outputs because they are not independent, as a share of the weighted error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub off_diagonal: Option<f64>,
}

/// How the weights of a site were rounded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoundedWeight {
    /// By this method.
    pub method: Rounding,
    /// E(‖y − W_q·x_q‖²) / E(‖y‖²) on the calibration data if they were rounded to nearest: y is the float op's result and x_q
    /// what the op reads in the quantized model, both without their means where biases are corrected.
    pub error_nearest: f64,
    /// The same as they are.
    pub error: f64,
    /// Channels that stay rounded to nearest, as nothing was better.
    pub kept_nearest: usize,
}

/// The quantizers of one site and what they cost.
#[derive(Debug, Clone, Serialize)]
pub struct Quantizers {
    /// The snapped thresholds, or ranges on a uniform grid: one per channel.
    #[serde(flatten)]
    pub thresholds: Thresholds,
    /// One per channel.
    pub scale: Vec<f32>,
    /// One per channel.
    pub zero_point: Vec<i32>,
    /// Mean of (x − q)², whatever the method.
    pub error: f64,
    /// Σ h (x − q)² / Σ h, h being the Hessian scores; of HMSE alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weighted_error: Option<f64>,
    /// 10 log10(Σ x² / Σ (x − q)²) in dB; `None` where it is infinite.
    pub sqnr_db: Option<f64>,
    /// Share of clipped values, from 0 to 1.
    pub clipped_share: f64,
    /// Oddities of the data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Thresholds of one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Thresholds {
    /// Of a symmetric or power-of-two grid.
    Threshold(Vec<f64>),
    /// [lo, hi] of a uniform grid.
    Range(Vec<[f64; 2]>),
}

impl From<&[Threshold]> for Thresholds {
    fn from(thresholds: &[Threshold]) -> Self {
        let ranges: Vec<_> = thresholds
            .iter()
            .filter_map(|threshold| match threshold {
                Threshold::Uniform(range) => Some([range.lo, range.hi]),
                _ => None,
            })
            .collect();
        if !ranges.is_empty() {
            return Self::Range(ranges);
        }
        let single = thresholds.iter().filter_map(|threshold| match threshold {
            Threshold::Signed(t) | Threshold::Unsigned(t) => Some(*t),
            Threshold::Uniform(_) => None,
        });
        Self::Threshold(single.collect())
    }
}

impl From<&Selection> for Quantizers {
    fn from(selection: &Selection) -> Self {
        Self {
            thresholds: selection.thresholds.as_slice().into(),
            scale: selection.params.iter().map(QuantParams::scale).collect(),
            zero_point: selection.params.iter().map(QuantParams::zero_point).collect(),
            error: selection.error,
            weighted_error: selection.weighted_error,
            sqnr_db: Some(selection.sqnr_db).filter(|sqnr| sqnr.is_finite()),
            clipped_share: selection.clipped_share,
            notes: selection.notes.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Quantizers {
    /// With these scales, and what weights cost now.
    pub fn rescale(&mut self, params: &[QuantParams], cost: &Cost) {
        self.thresholds = match &self.thresholds {
            Thresholds::Range(_) => {
                let ranges = params.iter().map(QuantParams::range);
                Thresholds::Range(ranges.map(|range| [range.lo, range.hi]).collect())
            }
            // The largest magnitude that has as many levels on its side as there can be.
            Thresholds::Threshold(_) => Thresholds::Threshold(params.iter().map(threshold).collect()),
        };
        self.scale = params.iter().map(QuantParams::scale).collect();
        self.zero_point = params.iter().map(QuantParams::zero_point).collect();
        self.error = cost.error;
        self.sqnr_db = Some(cost.sqnr_db).filter(|sqnr| sqnr.is_finite());
        self.clipped_share = cost.clipped_share;
        // It was that of other images.
        self.weighted_error = None;
    }
}

/// The snapped threshold of a quantizer of a symmetric grid.
fn threshold(params: &QuantParams) -> f64 {
    let levels = if params.quant_min() < 0 { -params.quant_min() } else { params.quant_max() + 1 };
    f64::from(params.scale()) * f64::from(levels)
}

/// A site that loses much, and what might help.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorstSite {
    /// Its name.
    pub name: String,
    /// Weight or activation.
    pub kind: Kind,
    /// That of the site alone, in dB.
    pub sqnr_db: f64,
    /// A guess at the cause.
    pub cause: String,
    /// A line of YAML to try; `None` where no setting can help.
    #[serde(rename = "try")]
    pub line: Option<String>,
}

/// A part of the float model that the emitted one is without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Its dotted name.
    pub name: String,
    /// `method`, `parameter`, `buffer` or `attribute`.
    pub kind: String,
}

/// Float against quantized.
#[derive(Debug, Clone, Serialize)]
pub struct Evaluation {
    /// What was compared on: `evaluation` or, where none was given, `calibration`.
    pub data: &'static str,
    /// The float model's own measures.
    pub float: Accuracy,
    /// The quantized model's.
    pub quantized: Comparison,
}

/// Sizes of the model files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Files {
    /// The model that came in.
    pub float_bytes: u64,
    /// The model that went out.
    pub quantized_bytes: u64,
}

impl Report {
    /// `report.json`, indented.
    ///
    /// # Errors
    /// Where serialization fails.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
