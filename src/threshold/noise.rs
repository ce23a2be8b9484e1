//! What a quantizer adds to the squared error of the outputs, by the Hessian scores of what it quantizes. It refuses to know how
//! the quantizer was chosen.
//!
//! With f the outputs, e the errors of a site's elements, and g the gradients of a random projection of f, the squared error is
//! E (Σ g e)², to first order in e: Σ h e² with h = E g² where errors are independent.

use super::hmse::Masses;
use super::measure::{squared_error_of_bins, weighted_squared_error};
use super::off_diagonal::OffDiagonal;
use super::{Channels, ChannelsError};
use crate::quantizer::{Bits, QuantParams};
use crate::statistics::{ActivationScores, Histogram};

/// Σ h (x − q)² over the weights, `scores` being in their order and `params` the quantizers of their channels.
///
/// # Errors
/// If there is not one score for each weight, or one quantizer for each channel.
pub fn noise_of_weights(weights: &Channels<'_>, scores: &[f32], params: &[QuantParams]) -> Result<f64, ChannelsError> {
    let found = scores.len();
    let wrong = || ChannelsError::Shape { shape: vec![weights.values().len()], found };
    let scores = weights.with_values(scores).ok_or_else(wrong)?;
    if params.len() != weights.count() {
        return Err(ChannelsError::Quantizers { expected: weights.count(), found: params.len() });
    }
    let channel = |(index, params): (usize, &QuantParams)| {
        weighted_squared_error(&weights.channel(index), &scores.channel(index), params)
    };
    Ok(params.iter().enumerate().map(channel).sum())
}

/// Σ h (x − q)² over the values of an activation in a row, and what their errors cost beyond that because they are not
/// independent, as far as sums of gradients by row tell.
pub fn noise_of_activation(histogram: &Histogram, scores: &ActivationScores, bits: Bits, params: &QuantParams) -> f64 {
    let ActivationScores { by_value, sums } = scores;
    let Masses { bins, unit, .. } = Masses::new(histogram.weighted_bins(by_value), by_value.total());
    let diagonal = squared_error_of_bins(&bins, params) * unit;
    let beyond = OffDiagonal::new(sums, histogram, bits).map_or(0.0, |sums| sums.surplus(params, diagonal));
    diagonal + beyond
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::Levels;
    use crate::statistics::{Counter, WeightedHistogram};

    fn quantizer(scale: f32) -> QuantParams {
        QuantParams::new(scale, 0, Levels { quant_min: -8, quant_max: 7 }).unwrap()
    }

    #[test]
    fn weights_by_hand() {
        let values = [0.25f32, 1.0, -0.75, 3.0];
        let channels = Channels::new(&values, &[2, 2], Some(0)).unwrap();
        let params = [quantizer(1.0), quantizer(2.0)];
        // Errors 0.25, 0; −0.75 becomes 0, 3 becomes 4 (half to even).
        let expected = 2.0 * 0.0625 + 4.0 * 0.5625 + 5.0 * 1.0;
        assert_eq!(noise_of_weights(&channels, &[2.0, 3.0, 4.0, 5.0], &params), Ok(expected));
        assert_eq!(noise_of_weights(&channels, &[0.0; 4], &params), Ok(0.0));
        assert!(noise_of_weights(&channels, &[1.0; 3], &params).is_err());
        assert!(noise_of_weights(&channels, &[1.0; 4], &params[1..]).is_err());
    }

    #[test]
    fn activations_by_value() {
        let values: Vec<f32> = (0..4000).map(|i| (i % 97) as f32 * 0.05 - 2.0).collect();
        let gradients: Vec<f32> = (0..4000).map(|i| ((i % 31) as f32 - 15.0) * 1e-3).collect();
        let mut histogram = Histogram::new();
        histogram.observe(&values, &mut Counter::new());
        let mut by_value = WeightedHistogram::new();
        by_value.observe(&values, &gradients, &mut [], |parts, work| (0..parts).for_each(work));
        let params = quantizer(0.3);
        let errors = values.iter().zip(&gradients);
        let expected: f64 =
            errors.map(|(&x, &g)| f64::from(g * g) * f64::from(x - params.fake_quantize(x)).powi(2)).sum();
        let bits = Bits::try_from(4).unwrap();
        let scores = |factor: f64| {
            let mut scaled = by_value.clone();
            scaled.scale(factor);
            ActivationScores::from(scaled)
        };
        let noise = |factor: f64| noise_of_activation(&histogram, &scores(factor), bits, &params);
        assert!((noise(1.0) / expected - 1.0).abs() < 1e-2, "{} {expected}", noise(1.0));
        // Whatever the scores are counted in.
        assert!((noise(1e-200) / noise(1.0) / 1e-200 - 1.0).abs() < 1e-9);
        assert_eq!(noise(0.0), 0.0);
    }
}
