//! HMSE against brute force.

use super::data::{KINDS, Kind, Random, histogram};
use super::quality::{
    GRIDS, SLACK, Worst, bound_of_weights, candidates, extremes, is_sampled, of_weights, power_of_two_near, scheme,
};
use crate::quantizer::{Grid, QuantParams, Range, Scheme};
use crate::statistics::{Histogram, WeightedCounter, WeightedHistogram};
use crate::threshold::measure::squared_error_of_bins;
use crate::threshold::{
    Channels, ErrorMethod, Note, SelectError, Selection, select_activation, select_activation_scored, select_weights,
    select_weights_scored,
};

/// A shape of scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scores {
    Uniform,
    /// As the real ones are, by and large.
    Moderate,
    LogNormal,
    /// 95% zeros.
    Sparse,
    /// One that is not zero.
    Single,
}

const SCORES: [Scores; 5] = [Scores::Uniform, Scores::Moderate, Scores::LogNormal, Scores::Sparse, Scores::Single];

impl Scores {
    fn of(self, count: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed ^ 0x5C0E ^ (self as u64) << 40);
        let single = (random.uniform() * count as f64) as usize;
        let mut score = |index| match self {
            Self::Uniform => random.uniform(),
            Self::Moderate => random.normal().exp(),
            Self::LogNormal => (3.0 * random.normal()).exp(),
            Self::Sparse if random.uniform() < 0.95 => 0.0,
            Self::Sparse => random.uniform(),
            Self::Single if index == single => 0.3,
            Self::Single => 0.0,
        };
        (0..count).map(|index| score(index) as f32).collect()
    }
}

fn of_scored(values: &[f32], scores: &[f32], scheme: Scheme) -> Selection {
    let weights = Channels::new(values, &[values.len()], None).unwrap();
    select_weights_scored(&weights, scores, scheme).unwrap()
}

/// Σ h ((x − q) / unit)² / Σ h by the definition.
fn raw_error(values: &[f32], scores: &[f32], params: &QuantParams, unit: f64) -> f64 {
    let mut images = vec![0.0; values.len()];
    params.fake_quantize_slice(values, &mut images);
    let (mut sum, mut total) = (0.0, 0.0);
    for ((&x, &q), &score) in values.iter().zip(&images).zip(scores).filter(|(_, score)| **score > 0.0) {
        let error = (f64::from(x) - f64::from(q)) / unit;
        sum += f64::from(score) * error * error;
        total += f64::from(score);
    }
    if total > 0.0 { sum / total } else { 0.0 }
}

/// The scale that NOCLIPPING has for the values that have a score.
fn scored_scale(values: &[f32], scores: &[f32], scheme: Scheme) -> f64 {
    let scored: Vec<f32> = values.iter().zip(scores).map(|(&x, &score)| if score > 0.0 { x } else { 0.0 }).collect();
    of_weights(&scored, scheme, ErrorMethod::NoClipping).params[0].scale().into()
}

fn check_weights(worst: &mut Worst, values: &[f32], scores: &[f32], scheme: Scheme, stride: usize, case: &str) {
    let unit = scored_scale(values, scores, scheme);
    let no_clipping = of_weights(values, scheme, ErrorMethod::NoClipping);
    let mut params = of_scored(values, scores, scheme).params[0];
    if std::env::var("MSE").is_ok() {
        params = of_weights(values, scheme, ErrorMethod::Mse).params[0];
    }
    let found = raw_error(values, scores, &params, unit);
    let all = candidates(no_clipping.thresholds[0], extremes(values), scheme);
    let all = all.iter().step_by(stride).chain(&no_clipping.params);
    let best = all.map(|params| raw_error(values, scores, params, unit)).fold(f64::INFINITY, f64::min);
    worst.check(found, best, bound_of_weights(scheme.grid), SLACK.powi(2), || {
        format!("{case}, {} values, {} bits", values.len(), scheme.bits)
    });
}

#[test]
fn explore() {
    let salts: u64 = std::env::var("SALTS").map_or(1, |x| x.parse().unwrap());
    let full = std::env::var("FULL").is_ok();
    use rayon::prelude::*;
    for scores in SCORES {
        for grid in [Grid::Symmetric, Grid::Uniform] {
            let mut cases = Vec::new();
            for kind in KINDS {
                for (turn, count) in std::env::var("COUNTS")
                    .map_or(vec![9, 30, 64, 128, 300, 1000], |x| x.split(',').map(|x| x.parse().unwrap()).collect())
                    .into_iter()
                    .enumerate()
                {
                    for bits in [2, 3, 4, 6, 8]
                        .into_iter()
                        .filter(|&bits| full || is_sampled(kind, grid, bits, turn + scores as usize))
                    {
                        for salt in 0..salts {
                            cases.push((kind, count, bits, salt));
                        }
                    }
                }
            }
            let worsts: Vec<Worst> = cases
                .par_iter()
                .map(|&(kind, count, bits, salt)| {
                    let mut worst = Worst::default();
                    let values = kind.values(count, bits + count as u64 + 1000 * salt);
                    let own = scores.of(count, bits + count as u64 + 1000 * salt);
                    check_weights(
                        &mut worst,
                        &values,
                        &own,
                        scheme(bits, grid),
                        1,
                        &format!("{kind:?} {scores:?} {salt}"),
                    );
                    worst
                })
                .collect();
            let failed: Vec<_> = worsts.iter().flat_map(|w| w.failures.clone()).collect();
            let mut ratios: Vec<f64> = worsts.iter().map(|w| w.ratio).collect();
            ratios.sort_by(f64::total_cmp);
            let at = |x: f64| ratios[((ratios.len() - 1) as f64 * x) as usize];
            println!(
                "{scores:?} {grid:?}: {} of {} fail; ratios {:.6} {:.6} {:.6}",
                failed.len(),
                cases.len(),
                at(0.9),
                at(0.99),
                at(1.0)
            );
            for f in failed.iter().take(12) {
                println!("   {f}");
            }
        }
    }
}
