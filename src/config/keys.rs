//! The keys of an experiment as typed: every one optional, unknown ones refused, nothing filled in.
//!
//! Read from a file and written for a plan through the same types, so that what is written is read again. It refuses to
//! know defaults and combinations; those are `resolve`'s.

use std::fmt;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::accuracy::Accuracy;
use super::device::DevicePlan;
use super::hessian::HessianKeys;
use super::mixed_precision::MixedKeys;
use super::overrides::OverrideKeys;
use super::plan::{BiasCorrection, EnginePlan, Format, InputsPlan, Layout, Metric, Rounding};
use super::reduce_range::ReduceRange;
use super::sweep::SweepKeys;
use crate::quantizer::{Bits, Granularity, Grid};
use crate::threshold::{ErrorMethod, Exponent, ExponentError};

/// An experiment of tsquant.
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Keys {
    /// The model that comes in.
    pub(super) model: Option<ModelKeys>,
    /// What runs through the model while statistics are collected.
    pub(super) calibration: Option<CalibrationKeys>,
    /// How weights and activations are quantized.
    pub(super) quantization: Option<QuantizationKeys>,
    /// Settings of single layers, in order: later ones win.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) overrides: Option<Vec<OverrideKeys>>,
    /// Bits for each site under a budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mixed_precision: Option<MixedKeys>,
    /// How Hessian scores are computed, for HMSE and mixed precision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hessian: Option<HessianKeys>,
    /// Where the model runs.
    pub(super) device: Option<DevicePlan>,
    /// Let products and convolutions on a GPU round what they multiply to TF32.
    pub(super) allow_tf32: Option<bool>,
    /// What is written, and where.
    pub(super) output: Option<OutputKeys>,
    /// What the float and the quantized model are compared on; the calibration data where it is not given.
    pub(super) evaluation: Option<EvaluationKeys>,
    /// Seed of everything that draws.
    pub(super) seed: Option<u64>,
    /// Many runs, for `tsquant experiment`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sweep: Option<SweepKeys>,
}

/// The model that comes in.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelKeys {
    /// A TorchScript file.
    pub(super) path: Option<PathBuf>,
}

/// Calibration data.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CalibrationKeys {
    /// A .safetensors, .npz or .npy file, or a folder of images.
    pub(super) data: Option<PathBuf>,
    /// The tensors that the model takes, by position or by argument name.
    pub(super) inputs: Option<InputsPlan>,
    /// Number of rows to use; all if it is not given.
    pub(super) samples: Option<Count>,
    /// Draw the rows by seed instead of taking the first.
    pub(super) shuffle: Option<bool>,
    /// Rows in a batch.
    pub(super) batch_size: Option<Count>,
    /// From stored values to the model's.
    pub(super) transform: Option<TransformKeys>,
}

/// Evaluation data; inputs, batch size and transform are those of calibration unless given.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EvaluationKeys {
    /// A .safetensors, .npz or .npy file, or a folder of images.
    pub(super) data: Option<PathBuf>,
    /// The tensors that the model takes, by position or by argument name.
    pub(super) inputs: Option<InputsPlan>,
    /// A tensor of class indices, (N), or (N, K) with K accepted classes padded with -1.
    pub(super) labels: Option<String>,
    /// The output that is ranked: its place among the outputs, or its path.
    pub(super) output: Option<OutputName>,
    /// Measures to show; the first one ranks.
    pub(super) metrics: Option<Vec<Metric>>,
    /// Number of rows to use; all if it is not given.
    pub(super) samples: Option<Count>,
    /// Draw the rows by seed instead of taking the first.
    pub(super) shuffle: Option<bool>,
    /// Rows in a batch.
    pub(super) batch_size: Option<Count>,
    /// From stored values to the model's.
    pub(super) transform: Option<TransformKeys>,
}

/// From stored values to the model's, in this order.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TransformKeys {
    /// Scale the short side to this many pixels.
    pub(super) resize: Option<Pixels>,
    /// Cut this square, or [height, width], out of the centre.
    pub(super) crop: Option<Crop>,
    /// How stored images lie in memory.
    pub(super) layout: Option<Layout>,
    /// Factor for every value.
    pub(super) scale: Option<f64>,
    /// Subtracted: one value, or one per channel.
    pub(super) mean: Option<Vec<f64>>,
    /// Divides: one value, or one per channel.
    pub(super) std: Option<Vec<f64>>,
}

/// How weights and activations are quantized.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QuantizationKeys {
    /// One word for error methods, bias correction and rounding, where their own keys say nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) accuracy: Option<Accuracy>,
    /// Weights.
    pub(super) weights: Option<WeightKeys>,
    /// Activations, always per tensor.
    pub(super) activations: Option<SiteKeys>,
    /// How thresholds of weights are chosen.
    pub(super) weights_error_method: Option<Method>,
    /// How thresholds of activations are chosen.
    pub(super) activation_error_method: Option<Method>,
    /// The exponent of LP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) l_p_value: Option<LpValue>,
    /// What is done to biases for the errors of quantized weights.
    pub(super) weights_bias_correction: Option<BiasCorrection>,
    /// Activation values farther than so many standard deviations from the mean do not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) z_threshold: Option<Deviations>,
}

/// Bits, grid and granularity of weights, and how they are rounded.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightKeys {
    /// Width.
    pub(super) bits: Option<Bits>,
    /// Where the levels lie.
    pub(super) grid: Option<Grid>,
    /// One threshold per tensor or per output channel.
    pub(super) granularity: Option<Granularity>,
    /// To which level a weight goes.
    pub(super) rounding: Option<Rounding>,
    /// Round to nearest where `rounding` would take too much memory.
    pub(super) rounding_fallback: Option<bool>,
}

/// Bits, grid and granularity.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SiteKeys {
    /// Width.
    pub(super) bits: Option<Bits>,
    /// Where the levels lie.
    pub(super) grid: Option<Grid>,
    /// One threshold per tensor or per output channel.
    pub(super) granularity: Option<Granularity>,
}

/// What is written, and where.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OutputKeys {
    /// The run directory.
    pub(super) dir: Option<PathBuf>,
    /// Form of the emitted model.
    pub(super) format: Option<OneOrMany<Format>>,
    /// What the 8-bit kernels of int8 run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) engine: Option<EnginePlan>,
    /// Whether a site that int8 has no kernel for is an error; else it is simulated in float.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) strict: Option<bool>,
    /// Whether activations of int8 have 7 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reduce_range: Option<ReduceRange>,
}

/// The name of an error method; its parameters are other keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// [`ErrorMethod::NoClipping`].
    NoClipping,
    /// [`ErrorMethod::Mse`].
    Mse,
    /// [`ErrorMethod::Mae`].
    Mae,
    /// [`ErrorMethod::Lp`].
    Lp,
    /// [`ErrorMethod::Kl`].
    Kl,
    /// [`ErrorMethod::Hmse`].
    Hmse,
}

impl Method {
    /// The error method of this name; `p` is the exponent of LP.
    pub(super) fn with_exponent(self, p: Exponent) -> ErrorMethod {
        match self {
            Self::NoClipping => ErrorMethod::NoClipping,
            Self::Mse => ErrorMethod::Mse,
            Self::Mae => ErrorMethod::Mae,
            Self::Lp => ErrorMethod::Lp { p },
            Self::Kl => ErrorMethod::Kl,
            Self::Hmse => ErrorMethod::Hmse,
        }
    }
}

/// The exponent of LP, the same for weights and activations.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(try_from = "i128")]
pub(super) struct LpValue(pub(super) Exponent);

impl TryFrom<i128> for LpValue {
    type Error = ExponentError;

    fn try_from(number: i128) -> Result<Self, ExponentError> {
        Exponent::try_from(number).map(Self)
    }
}

/// A distance in standard deviations, finite and above 0.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(try_from = "f64")]
pub(super) struct Deviations(pub(super) f64);

impl TryFrom<f64> for Deviations {
    type Error = String;

    fn try_from(number: f64) -> Result<Self, String> {
        if number.is_finite() && number > 0.0 {
            return Ok(Self(number));
        }
        Err(format!("expected a finite number of standard deviations above 0, found {number:?}"))
    }
}

/// An output of the model, by path or by index.
#[derive(Debug, Clone, Serialize)]
pub(super) struct OutputName(pub(super) String);

impl<'de> Deserialize<'de> for OutputName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OutputNameVisitor)
    }
}

struct OutputNameVisitor;

impl Visitor<'_> for OutputNameVisitor {
    type Value = OutputName;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the index of an output, or its path (in quotes where it reads as a number)")
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<OutputName, E> {
        if path.is_empty() {
            return Err(E::custom("expected the index or path of an output, found an empty text"));
        }
        Ok(OutputName(path.to_owned()))
    }

    fn visit_i128<E: de::Error>(self, index: i128) -> Result<OutputName, E> {
        match u32::try_from(index) {
            Ok(index) => Ok(OutputName(index.to_string())),
            Err(_) => Err(E::custom(format!("expected the index of an output, 0 or more, found {index}"))),
        }
    }
}

/// A number of rows, from 1 to 2^32 - 1, so that sizes computed from it stay far from overflow.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(try_from = "i128")]
pub(super) struct Count(pub(super) NonZeroUsize);

impl TryFrom<i128> for Count {
    type Error = String;

    fn try_from(number: i128) -> Result<Self, String> {
        let count = u32::try_from(number).ok().and_then(|n| NonZeroUsize::new(usize::try_from(n).ok()?));
        count.map(Self).ok_or_else(|| format!("expected a whole number from 1 to {}, found {number}", u32::MAX))
    }
}

/// A side of an image, from 1 to 65535.
#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(try_from = "i128")]
pub(super) struct Pixels(pub(super) u32);

impl TryFrom<i128> for Pixels {
    type Error = String;

    fn try_from(number: i128) -> Result<Self, String> {
        match u16::try_from(number) {
            Ok(pixels @ 1..) => Ok(Self(pixels.into())),
            _ => Err(format!("expected from 1 to {} pixels, found {number}", u16::MAX)),
        }
    }
}

/// Height and width; typed as one number where they are equal.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Crop(pub(super) [Pixels; 2]);

impl<'de> Deserialize<'de> for Crop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CropVisitor)
    }
}

struct CropVisitor;

impl<'de> Visitor<'de> for CropVisitor {
    type Value = Crop;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of pixels or [height, width]")
    }

    fn visit_i128<E: de::Error>(self, number: i128) -> Result<Crop, E> {
        let side = Pixels::try_from(number).map_err(E::custom)?;
        Ok(Crop([side, side]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Crop, A::Error> {
        let mut sides: Vec<Pixels> = Vec::new();
        while let Some(side) = list.next_element()? {
            sides.push(side);
        }
        let count = sides.len();
        let sides = <[Pixels; 2]>::try_from(sides);
        let wrong = format!("expected [height, width], found a list of {count}");
        sides.map(Crop).map_err(|_| de::Error::custom(wrong))
    }
}

/// One name, or a list of them.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "OneOrMany_{T}")]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(#[schemars(length(min = 1))] Vec<T>),
}

/// What is read as one or many.
pub(super) trait Named {
    /// What is expected, for errors.
    const ONE_OR_MANY: &'static str;
}

impl Named for String {
    const ONE_OR_MANY: &'static str = "a name, or a list of names";
}

impl Named for Format {
    const ONE_OR_MANY: &'static str = "the name of a format, or a list of names of formats";
}

impl<'de, T: Deserialize<'de> + Named> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

struct OneOrManyVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de> + Named> Visitor<'de> for OneOrManyVisitor<T> {
    type Value = OneOrMany<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::ONE_OR_MANY)
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<OneOrMany<T>, E> {
        let name: de::value::StrDeserializer<'_, E> = de::IntoDeserializer::into_deserializer(name);
        Ok(OneOrMany::One(T::deserialize(name)?))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMany<T>, A::Error> {
        let mut names = Vec::new();
        while let Some(name) = list.next_element()? {
            names.push(name);
        }
        Ok(OneOrMany::Many(names))
    }
}
