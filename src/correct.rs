//! Corrections of what quantized weights do to a layer's results: biases that take their mean error out.
//!
//! It knows which ops have weights that it can correct, what they read, and the float and quantized weights. It refuses to
//! know how weights were quantized.

mod bias;
mod geometry;
mod layout;
mod live;
mod met;
mod moments;
mod pull;
mod rounding;
mod sequence;
mod shift;
mod steps;
mod sums;
mod targets;

use tch::Tensor;

use crate::jit::{Place, ValueId};

pub use bias::{Seen, closed_form};
pub use live::live_bytes_of_a_row;
pub use sequence::{Looks, Network, Refined, RoundedSite, Weight, refine};
pub use steps::{Asked, MOST_HESSIAN_BYTES, Steps};
pub use sums::{InputSums, LayerSum};
pub use targets::Targets;

/// The corrected bias of one op.
#[derive(Debug)]
pub struct Bias {
    /// The layer that the op is.
    pub layer: String,
    /// TorchScript name of the op.
    pub op: String,
    /// The op's result.
    pub result: ValueId,
    /// Where it goes: a slot of the op, or its result.
    pub place: Place,
    /// What goes there; float32.
    pub tensor: Tensor,
    /// What it adds to each output channel, the old bias left out.
    pub added: Vec<f32>,
}

/// An op with quantized weights whose bias is not corrected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The layer that the op is.
    pub layer: String,
    /// TorchScript name of the op.
    pub op: String,
    /// Why.
    pub reason: String,
}

/// The biases of a model, in graph order, and the ops that have none.
#[derive(Debug, Default)]
pub struct Corrections {
    /// Corrected.
    pub biases: Vec<Bias>,
    /// Not corrected.
    pub left_out: Vec<LeftOut>,
}

impl Corrections {
    /// The same, with the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let bias = |bias: &Bias| Bias {
            layer: bias.layer.clone(),
            op: bias.op.clone(),
            result: bias.result,
            place: bias.place,
            tensor: bias.tensor.shallow_clone(),
            added: bias.added.clone(),
        };
        Self { biases: self.biases.iter().map(bias).collect(), left_out: self.left_out.clone() }
    }
}
