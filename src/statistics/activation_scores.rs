//! All that the Hessian stage keeps of one activation. It refuses to know how gradients come about.

use super::{GradientSums, Histogram, WeightedHistogram};

/// The share of the mean score that [`ActivationScores::damped`] adds to the score of each value.
const DAMPING: f64 = 0.01;

/// Scores by value, and gradients by value and row.
#[derive(Debug, Clone, Default)]
pub struct ActivationScores {
    /// Sums of squared gradients: what independent errors cost.
    pub by_value: WeightedHistogram,
    /// Sums of gradients: what errors of one row cost together.
    pub sums: GradientSums,
}

impl ActivationScores {
    /// With a hundredth of the mean score of all values, which `histogram` counts, added to the score of each; as they are where no
    /// value but zeros has a score.
    ///
    /// Scores tell what small errors cost. Where a normalization follows, the gradients of very large values are so small that it
    /// seems to cost nothing to clip them to a fiftieth. Less does not help there, more makes HMSE the more like MSE:
    /// docs/error-methods.md has what was measured.
    #[must_use]
    pub fn damped(&self, histogram: &Histogram) -> Self {
        let Self { by_value, sums } = self;
        let has_scores = by_value.octave_sums().any(|(octave, sum)| octave != WeightedHistogram::ZEROS && sum > 0.0);
        let by_value = if has_scores { by_value.damped(histogram, DAMPING) } else { by_value.clone() };
        Self { by_value, sums: sums.clone() }
    }

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
