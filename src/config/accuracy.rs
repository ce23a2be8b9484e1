//! One word for error methods, bias correction and rounding: `quantization.accuracy`.
//!
//! It says what each word stands for, chosen by the measurements in docs/accuracy.md; it refuses to know bits and grids.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::keys::Method;
use super::plan::{BiasCorrection, Rounding};

/// How near to the float model a quantized one is to be, for how many runs over the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Accuracy {
    /// Biases corrected op by op.
    Fast,
    /// Thresholds of activations by Hessian scores too.
    Balanced,
    /// Weights rounded op by op too.
    High,
}

/// What holds where a key of its own does not say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recipe {
    pub(super) weights_error_method: Method,
    pub(super) activation_error_method: Method,
    pub(super) bias_correction: BiasCorrection,
    pub(super) rounding: Rounding,
    pub(super) rounding_fallback: bool,
    pub(super) hessian_fallback: bool,
}

impl Recipe {
    /// That of a word; without one, the defaults.
    pub(super) fn of(accuracy: Option<Accuracy>) -> Self {
        let default = Self {
            weights_error_method: Method::Mse,
            activation_error_method: Method::Mse,
            bias_correction: BiasCorrection::ClosedForm,
            rounding: Rounding::Nearest,
            rounding_fallback: false,
            hessian_fallback: false,
        };
        let fast = Self { bias_correction: BiasCorrection::Weighted, ..default };
        // A layer that cannot have what the word asks for is listed with what it has: a word is not to ask for another key.
        let balanced = Self { activation_error_method: Method::Hmse, hessian_fallback: true, ..fast };
        match accuracy {
            None => default,
            Some(Accuracy::Fast) => fast,
            Some(Accuracy::Balanced) => balanced,
            Some(Accuracy::High) => Self { rounding: Rounding::Gptq, rounding_fallback: true, ..balanced },
        }
    }
}
