//! All that the Hessian stage keeps of one activation. It refuses to know how gradients come about.

use super::{GradientSums, WeightedHistogram};

/// Scores by value, and gradients by value and row.
#[derive(Debug, Clone, Default)]
pub struct ActivationScores {
    /// Sums of squared gradients: what independent errors cost.
    pub by_value: WeightedHistogram,
    /// Sums of gradients: what errors of one row cost together.
    pub sums: GradientSums,
}

impl ActivationScores {
    /// Whether no value, gradient or sum was NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.by_value.is_finite() && self.sums.is_finite()
    }
}

impl From<WeightedHistogram> for ActivationScores {
    fn from(by_value: WeightedHistogram) -> Self {
        Self { by_value, sums: GradientSums::default() }
    }
}
