//! What mixed precision chose, what that was predicted to cost, and what it cost.

use serde::Serialize;

use super::Kind;
use crate::quantizer::Bits;

/// Bits under a budget. Noise is the mean squared error of all outputs of a row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MixedPrecision {
    /// Of weights; `None` where they have the bits of the experiment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Allotted>,
    /// Of activations; `None` where they have the bits of the experiment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<Allotted>,
    /// Of the whole model.
    pub noise: Noise,
    /// Weights, then activations, in the order of the report's sites. Bits of an 8-bit model's output count here and in the totals though
    /// it turned out to compute in float, where the report lists it in `left_float`.
    pub sites: Vec<SiteNoise>,
}

impl MixedPrecision {
    /// With what was measured.
    #[must_use]
    pub fn measured(self, noise: Option<f64>) -> Self {
        Self { noise: Noise { measured: noise, ..self.noise }, ..self }
    }
}

/// Bits of weights or of activations.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Allotted {
    /// What was asked for.
    #[serde(flatten)]
    pub budget: Budget,
    /// Elements of all quantized weights, or numbers that a row has at all quantized activations.
    pub elements: f64,
    /// Bits on average over elements.
    pub used_average: f64,
    /// Bytes of all weights at their bits; of weights alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_memory_bytes: Option<u64>,
    /// How much has which width, ascending.
    pub widths: Vec<Share>,
    /// The one width for all sites whose bits are free that has the least predicted noise within the budget; `None` if none is
    /// within it.
    pub uniform: Option<Uniform>,
}

/// What bits may cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Bits on average over elements.
    Average(f64),
    /// Bytes of all elements.
    MemoryBytes(u64),
}

/// Sites of one width.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    /// The width.
    pub bits: Bits,
    /// How many sites have it.
    pub sites: usize,
    /// The share of their elements, from 0 to 1.
    pub share: f64,
}

/// One width for all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Uniform {
    /// The width.
    pub bits: Bits,
    /// The noise predicted of all weights, or of all activations, with it.
    pub noise: f64,
}

/// Noise of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Noise {
    /// Predicted of all weights.
    pub weights: f64,
    /// Predicted of all activations.
    pub activations: f64,
    /// Predicted of both.
    pub predicted: f64,
    /// Predicted of the best uniform widths within the budgets; `None` if there are none.
    pub uniform: Option<f64>,
    /// Measured on the data of the evaluation; `None` where nothing could be compared.
    pub measured: Option<f64>,
    /// Sites of which no noise is known, as their Hessian scores are of no use; they count with none.
    pub unknown_sites: usize,
}

/// What was predicted of one site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteNoise {
    /// Its name.
    pub name: String,
    /// Weight or activation.
    pub kind: Kind,
    /// Elements of a weight, or numbers that a row has at an activation.
    pub elements: f64,
    /// The width that it got.
    pub bits: Bits,
    /// Its noise at each width that it could have; at one alone where an override or the experiment sets it.
    pub widths: Vec<WidthNoise>,
}

/// Noise of a site at one width.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct WidthNoise {
    /// The width.
    pub bits: Bits,
    /// `None` where the Hessian scores of the site are of no use.
    pub noise: Option<f64>,
}
