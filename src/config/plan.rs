//! The checked plan of one run: what [`Experiment`](super::Experiment) resolves into. Every default is filled, every
//! path absolute, every combination possible; nothing after `config` checks an option again.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::device::DevicePlan;
use super::overrides::Overrides;
use super::reduce_range::ReduceRange;
use crate::quantizer::{Granularity, Scheme, Widths};
use crate::threshold::ErrorMethod;

/// Everything that one `tsquant quantize` needs to know. Serialized, it is an experiment again: the same keys as the
/// YAML, every default written.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Absolute path of the TorchScript file.
    pub model: PathBuf,
    /// What runs through the model while statistics are collected.
    pub calibration: DataPlan,
    /// How weights are quantized.
    pub weights: WeightPlan,
    /// How activations are quantized, always per tensor.
    pub activations: ActivationPlan,
    /// What is different at some layers.
    pub overrides: Overrides,
    /// Bits for each site under a budget; `None` where the bits of `weights` and `activations` hold.
    pub mixed_precision: Option<MixedPlan>,
    /// How Hessian scores are computed; `None` where nothing asks for them.
    pub hessian: Option<HessianPlan>,
    /// Where the model runs.
    pub device: DevicePlan,
    /// On a GPU, products and convolutions may round what they multiply to TF32, with 10 bits of mantissa.
    pub allow_tf32: bool,
    /// What is written, and where.
    pub output: OutputPlan,
    /// What float and quantized model are compared on; `None` compares them on the calibration data, without labels.
    pub evaluation: Option<EvaluationPlan>,
    /// Seed of everything that draws.
    pub seed: u64,
}

impl Plan {
    /// Whether float and quantized model are compared on the same rows.
    #[must_use]
    pub fn is_measured_as(&self, other: &Self) -> bool {
        match (&self.evaluation, &other.evaluation) {
            (Some(own), Some(other)) => own.data.is_same_as(&other.data),
            (None, None) => self.calibration.is_same_as(&other.calibration),
            _ => false,
        }
    }
}

/// A data set and how its rows become tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct DataPlan {
    /// Absolute path: `.safetensors`, `.npz`, `.npy`, or a folder of images.
    pub path: PathBuf,
    /// Where each argument of the model's `forward` comes from.
    pub inputs: InputsPlan,
    /// Number of rows to use; `None` takes all.
    pub samples: Option<NonZeroUsize>,
    /// Draw the rows by seed instead of taking the first.
    pub shuffle: bool,
    /// Seed of the draw.
    pub seed: u64,
    /// Rows in a batch; the last batch may hold fewer.
    pub batch_size: NonZeroUsize,
    /// From stored values to the model's values.
    pub transform: Transform,
}

impl DataPlan {
    /// Whether it gives the same batches: the seed of a draw counts where there is one.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let seed = if self.shuffle { other.seed } else { self.seed };
        *self == Self { seed, ..other.clone() }
    }
}

/// Evaluation data with its labels and the metrics asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluationPlan {
    /// The data set.
    pub data: DataPlan,
    /// Name of the tensor with class indices: `(N)`, or `(N, K)` with K accepted classes padded with −1; `(N, T)` or
    /// `(N, T, K)` where the ranked output is `(N, T, classes)`.
    pub labels: Option<String>,
    /// The output whose arg-max counts, by its path or its index from 0; `None` for the first of floating point.
    pub output: Option<String>,
    /// Metrics to show, in this order; the first one ranks.
    pub metrics: Vec<Metric>,
}

/// What `tsquant evaluate` needs to know to compare model files.
#[derive(Debug, Clone, PartialEq)]
pub struct ComparisonPlan {
    /// Absolute path of the float model; `None` measures the other one alone.
    pub reference: Option<PathBuf>,
    /// What the models run on, and what is measured.
    pub evaluation: EvaluationPlan,
    /// The section that the data came from: `evaluation`, or `calibration` where the former names none.
    pub section: &'static str,
    /// Absolute path of the run directory of the experiment.
    pub run_dir: PathBuf,
}

/// A measure of one model, or of a quantized model against the float one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of rows whose arg-max is an accepted class.
    Top1,
    /// Share of rows with an accepted class among the five largest outputs.
    Top5,
    /// Share of rows whose arg-max equals that of the float model.
    Agreement,
    /// 10 log10(Σ f² / Σ (f − q)²), in dB, over all rows and outputs.
    Sqnr,
    /// Cosine similarity of all outputs with those of the float model.
    Cosine,
    /// Largest absolute difference from the float model's outputs.
    MaxAbsDiff,
}

impl Metric {
    /// The name in YAML, tables and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Top1 => "top1",
            Self::Top5 => "top5",
            Self::Agreement => "agreement",
            Self::Sqnr => "sqnr",
            Self::Cosine => "cosine",
            Self::MaxAbsDiff => "max_abs_diff",
        }
    }

    /// Whether it compares with labels, not with the float model.
    #[must_use]
    pub fn needs_labels(self) -> bool {
        matches!(self, Self::Top1 | Self::Top5)
    }
}

/// The arguments of `forward`, in order or by name.
#[derive(Debug, Clone, PartialEq)]
pub enum InputsPlan {
    /// A list in YAML: by position.
    Positional(Vec<InputSource>),
    /// A map in YAML: by the model's argument name, in the order written.
    Named(Vec<(String, InputSource)>),
}

/// Where one argument comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum InputSource {
    /// A tensor of the data file; row i belongs to sample i.
    Tensor(String),
    /// The same value for each batch: `{const: 16000}`.
    Const(Constant),
}

/// A constant argument.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Constant {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// `null`: the argument is None.
    None,
}

/// From stored values to the model's values, applied in the order of the fields to uint8 and float tensors; integer
/// tensors (token ids) pass untouched.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Transform {
    /// Images only: scale the short side to this many pixels, bilinear with antialiasing as torchvision does.
    pub resize: Option<u32>,
    /// Images only: cut this height and width out of the centre.
    pub crop: Option<[u32; 2]>,
    /// How the stored tensor is laid out.
    pub layout: Layout,
    /// Factor for every value, after the conversion to float32.
    pub scale: Option<f64>,
    /// Subtracted per channel (one value: from all), after `scale`.
    pub mean: Option<Vec<f64>>,
    /// Divides per channel (one value: all), after `mean`.
    pub std: Option<Vec<f64>>,
}

/// Memory layout of stored images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// As the model wants it.
    #[default]
    Nchw,
    /// Rank-4 tensors are permuted from (N, H, W, C) to (N, C, H, W).
    Nhwc,
}

/// How weights are quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightPlan {
    /// Bits and grid.
    pub scheme: Scheme,
    /// One threshold per tensor or per output channel.
    pub granularity: Granularity,
    /// How thresholds are chosen.
    pub error_method: ErrorMethod,
    /// How biases are corrected.
    pub bias_correction: BiasCorrection,
    /// How weights are rounded.
    pub rounding: Rounding,
    /// Weights whose rounding would take too much memory are rounded to nearest instead of being an error.
    pub rounding_fallback: bool,
}

/// To which of the levels that its quantizer has a weight goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    /// To the nearest one.
    Nearest,
    /// To the one that makes the error of the layer's result least, given the others.
    Gptq,
}

/// What is done to biases for the errors of quantized weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BiasCorrection {
    /// Nothing.
    None,
    /// b += (W − W_q)·E(x) per output channel.
    ClosedForm,
    /// b += Σ g²·(y − y_q) / Σ g² per output channel, op by op, g being gradients of the outputs.
    Weighted,
}

/// How activations are quantized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActivationPlan {
    /// Bits and grid.
    pub scheme: Scheme,
    /// How thresholds are chosen.
    pub error_method: ErrorMethod,
    /// Values farther than this many standard deviations from the mean of their site do not count when thresholds are
    /// chosen, whatever the error method; finite and above 0. `None`: all values count.
    pub z_threshold: Option<f64>,
}

/// Bits for each site under a budget, for weights, activations or both.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedPlan {
    /// For weights.
    pub weights: Option<BudgetPlan>,
    /// For activations.
    pub activations: Option<BudgetPlan>,
}

/// Widths and what they may cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BudgetPlan {
    /// To choose from, at each site whose bits no override sets.
    pub widths: Widths,
    /// Over all quantized sites, those whose bits an override sets included.
    pub limit: Limit,
}

/// What bits may cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// Bits on average over all elements; finite and above 0.
    Average(f64),
    /// Bytes of all elements together, at bits / 8 each.
    Memory(u64),
}

/// How Hessian scores are computed and what becomes of them.
#[derive(Debug, Clone, PartialEq)]
pub struct HessianPlan {
    /// What the scores depend on.
    pub request: HessianRequest,
    /// A layer without usable scores is quantized with MSE instead of being an error.
    pub allow_fallback: bool,
    /// The scores are kept in the run directory, for later runs to use.
    pub save: bool,
}

/// What Hessian scores depend on, beside the model and the data.
#[derive(Debug, Clone, PartialEq)]
pub struct HessianRequest {
    /// Calibration rows to use, drawn by seed; all of them if there are no more.
    pub samples: NonZeroUsize,
    /// Random directions for each row: the least number of them where there is a `tolerance`.
    pub probes: NonZeroUsize,
    /// Rows in a batch.
    pub batch_size: NonZeroUsize,
    /// How directions are drawn.
    pub distribution: Distribution,
    /// Directions are added until the relative standard error of each layer's scores is at most this.
    pub tolerance: Option<f64>,
    /// Seed of rows and directions.
    pub seed: u64,
}

/// The distribution of the components of a random direction, of mean 0 and variance 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// −1 or 1.
    Rademacher,
    /// The normal distribution.
    Normal,
}

/// What is written, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputPlan {
    /// Absolute path of the run directory.
    pub dir: PathBuf,
    /// Form of the emitted model.
    pub format: Format,
    /// Further forms that it is emitted in, each in a file of its own.
    pub further: Vec<Format>,
    /// How it is emitted in 8 bits; `None` where no form asks for that.
    pub int8: Option<Int8Plan>,
}

impl OutputPlan {
    /// All forms, in the order of their files.
    pub fn formats(&self) -> impl Iterator<Item = Format> + '_ {
        [self.format].into_iter().chain(self.further.iter().copied())
    }
}

/// How a model is emitted in 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int8Plan {
    /// What its kernels run on.
    pub engine: EnginePlan,
    /// A site whose quantizer no kernel takes is an error; else it is simulated in float.
    pub strict: bool,
    /// Whether activations that the plan gives 8 bits have 7.
    pub reduce_range: ReduceRange,
}

/// The library that 8-bit kernels run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnginePlan {
    /// The fastest one on this machine that computes right.
    Auto,
    /// libtorch's mixture of FBGEMM and oneDNN.
    X86,
    /// oneDNN.
    Onednn,
    /// FBGEMM.
    Fbgemm,
    /// QNNPACK.
    Qnnpack,
}

impl EnginePlan {
    /// All that libtorch has names for.
    pub const NAMED: [Self; 4] = [Self::Onednn, Self::X86, Self::Fbgemm, Self::Qnnpack];

    /// libtorch's name of it, or `auto`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::X86 => "x86",
            Self::Onednn => "onednn",
            Self::Fbgemm => "fbgemm",
            Self::Qnnpack => "qnnpack",
        }
    }
}

/// Form of an emitted model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Float kernels, weights on their grid, fake-quantize nodes at the sites.
    FakeQuant,
    /// libtorch's 8-bit kernels for the processor, weights in 8 bits.
    Int8,
    /// Float kernels; weights in the file in 8 bits, or two to a byte with at most 4.
    Int8Weights,
}

impl Format {
    /// The name in YAML and in names of files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FakeQuant => "fake_quant",
            Self::Int8 => "int8",
            Self::Int8Weights => "int8_weights",
        }
    }
}
