//! HMSE against brute force, and what scores mean.

use super::data::{KINDS, Kind, Random, histogram};
use super::quality::{
    GRIDS, SLACK, Worst, bound_of_weights, candidates, extremes, is_sampled, objective_of_bins, of_weights,
    power_of_two_near, scheme,
};
use crate::quantizer::{Grid, QuantParams, Range, Scheme, Threshold};
use crate::statistics::{Histogram, WeightedCounter, WeightedHistogram};
use crate::threshold::{
    Channels, ErrorMethod, Note, SelectError, Selection, select_activation, select_activation_scored, select_weights,
    select_weights_scored,
};

/// A shape of scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scores {
    Uniform,
    /// Log-normal of sigma 1, about as the scores of real layers.
    Skewed,
    /// Log-normal of sigma 3.
    HeavyTailed,
    /// 95% zeros.
    Sparse,
    /// One that is not zero.
    Single,
}

const SCORES: [Scores; 5] = [Scores::Uniform, Scores::Skewed, Scores::HeavyTailed, Scores::Sparse, Scores::Single];

/// What the error may be where all scored values lie on levels but for the rounding of the scale to `f32`, in levels.
const SQUARED_SLACK: f64 = SLACK * SLACK;

impl Scores {
    fn of(self, count: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed ^ 0x5C0E ^ (self as u64) << 40);
        let single = (random.uniform() * count as f64) as usize;
        let mut score = |index| match self {
            Self::Uniform => random.uniform(),
            Self::Skewed => random.normal().exp(),
            Self::HeavyTailed => (3.0 * random.normal()).exp(),
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

/// Σ h ((x − q) / unit)² / Σ h by the definition; 0 without scores.
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

/// The scale that NOCLIPPING has for the values with a score alone.
fn scored_scale(values: &[f32], scores: &[f32], scheme: Scheme) -> f64 {
    let scored: Vec<f32> = values.iter().zip(scores).map(|(&x, &score)| if score > 0.0 { x } else { 0.0 }).collect();
    of_weights(&scored, scheme, ErrorMethod::NoClipping).params[0].scale().into()
}

fn weights_of(values: &[f32], scores: &[f32]) -> WeightedHistogram {
    let gradients: Vec<f32> = scores.iter().map(|score| score.sqrt()).collect();
    let mut weights = WeightedHistogram::new();
    weights.observe(values, &gradients, &mut [WeightedCounter::new()], |parts, run| (0..parts).for_each(run));
    weights
}

/// By scores alone.
fn by_histogram(
    histogram: &Histogram,
    weights: &WeightedHistogram,
    scheme: Scheme,
    z_threshold: Option<f64>,
) -> Result<Selection, SelectError> {
    select_activation_scored(histogram, &weights.clone().into(), scheme, z_threshold)
}

/// What `by_histogram` minimises.
fn objective(histogram: &Histogram, weights: &WeightedHistogram, unit: f64) -> impl Fn(&QuantParams) -> f64 + use<> {
    objective_of_bins(histogram.weighted_bins(weights), weights.total(), 2, unit)
}

impl Worst {
    /// Chooses for raw values, and compares with the best of one in `stride` of the brute force.
    fn check_scored(&mut self, values: &[f32], scores: &[f32], scheme: Scheme, stride: usize, case: &str) {
        let unit = scored_scale(values, scores, scheme);
        let no_clipping = of_weights(values, scheme, ErrorMethod::NoClipping);
        let found = raw_error(values, scores, &of_scored(values, scores, scheme).params[0], unit);
        let all = candidates(no_clipping.thresholds[0], extremes(values), scheme);
        let all = all.iter().step_by(stride).chain(&no_clipping.params);
        let best = all.map(|params| raw_error(values, scores, params, unit)).fold(f64::INFINITY, f64::min);
        self.check(found, best, bound_of_weights(scheme.grid), SQUARED_SLACK, || {
            format!("{case}, {} values, {} bits", values.len(), scheme.bits)
        });
    }

    fn finish_hmse(self, what: &str, grid: Grid) {
        self.finish(what, ErrorMethod::Hmse, 2, grid);
    }
}

/// Raw values: within 1.001 of the best on symmetric grids, 1.005 on uniform ones.
#[test]
fn weights_are_near_the_optimum() {
    for grid in GRIDS {
        let mut worst = Worst::default();
        for kind in KINDS {
            for (turn, (count, salt)) in [(9, 0), (9, 1), (64, 0), (300, 0)].into_iter().enumerate() {
                for scores in SCORES {
                    let is_sampled = |&bits: &u64| is_sampled(kind, grid, bits, turn + scores as usize);
                    for bits in [2, 3, 4, 6, 8].into_iter().filter(is_sampled) {
                        let seed = bits + count as u64 + 1000 * salt;
                        let (values, own) = (kind.values(count, seed), scores.of(count, seed));
                        worst.check_scored(&values, &own, scheme(bits, grid), 1, &format!("{kind:?} {scores:?}"));
                    }
                }
            }
        }
        worst.finish_hmse("weights", grid);
    }
}

/// Kinds, counts and seeds for which steps of the scale alone missed the optimum.
#[test]
fn weights_of_which_two_decide_are_near_the_optimum() {
    let mut worst = Worst::default();
    for (count, salt) in [(20, 0), (40, 5), (20, 1), (40, 2)] {
        let seed = 8 + count as u64 + 1000 * salt;
        let (values, scores) = (Kind::Bimodal.values(count, seed), Scores::Sparse.of(count, seed));
        worst.check_scored(&values, &scores, scheme(8, Grid::Uniform), 1, "Bimodal");
    }
    worst.finish_hmse("two values", Grid::Uniform);
}

/// The same for as many values as real layers have.
#[test]
fn weights_of_large_layers_are_near_the_optimum() {
    for grid in [Grid::Symmetric, Grid::Uniform] {
        let mut worst = Worst::default();
        for (kind, scores, count, bits) in [
            (Kind::Normal, Scores::Skewed, 1152, 8),
            (Kind::Laplace, Scores::HeavyTailed, 2304, 8),
            (Kind::Normal, Scores::Sparse, 2304, 4),
            (Kind::Sparse, Scores::Uniform, 1000, 6),
        ] {
            let (values, own) = (kind.values(count, 53), scores.of(count, 53));
            worst.check_scored(&values, &own, scheme(bits, grid), 4, &format!("{kind:?} {scores:?}"));
        }
        worst.finish_hmse("large weights", grid);
    }
}

/// Values over 24 orders of magnitude and scores over up to 67, so that any of them may decide: none gets lost in `f32`.
#[test]
fn scores_of_any_magnitude_count() {
    let mut random = Random::new(59);
    for bits in [2, 4, 8] {
        let scheme = scheme(bits, Grid::Symmetric);
        for _ in 0..8 {
            let exponents: Vec<f64> = (0..40).map(|_| 24.0 * random.uniform() - 12.0).collect();
            let values: Vec<f32> = exponents.iter().map(|e| 10f64.powf(*e) as f32).collect();
            // Some favour the small values, some the large ones.
            let favour = 1.6 * (random.uniform() - 0.5);
            let mut score = |e: &f64| (random.normal() + (favour - 2.0) * e * 10f64.ln()).exp() as f32;
            let scores: Vec<f32> = exponents.iter().map(&mut score).collect();
            assert!(scores.iter().all(|score| *score > 0.0 && score.is_finite()));
            let error = |params: &QuantParams| raw_error(&values, &scores, params, 1.0);
            let found = error(&of_scored(&values, &scores, scheme).params[0]);
            let Threshold::Signed(t) = of_weights(&values, scheme, ErrorMethod::NoClipping).thresholds[0] else {
                panic!()
            };
            let params = (0..6000).map(|step| Threshold::Signed(2.0 * t * 0.99f64.powi(step)).params(scheme.bits));
            let best = params.map(|params| error(&params)).fold(f64::INFINITY, f64::min);
            assert!(found <= best * 1.001, "{bits} bits, {favour}: {found:e} {best:e} {}", found / best);
        }
    }
}

impl Worst {
    fn check_bins(&mut self, values: &[f32], scores: &[f32], scheme: Scheme, case: &str) {
        let (histogram, weights) = (histogram(values), weights_of(values, scores));
        let no_clipping = select_activation(&histogram, scheme, ErrorMethod::NoClipping, None).unwrap();
        let error = objective(&histogram, &weights, power_of_two_near(&no_clipping.params[0]));
        let found = by_histogram(&histogram, &weights, scheme, None).unwrap().params[0];
        let all = candidates(no_clipping.thresholds[0], extremes(values), scheme);
        let best = all.iter().chain(&no_clipping.params).map(&error).fold(f64::INFINITY, f64::min);
        let bound = if scheme.grid == Grid::Uniform { 1.002 } else { 1.0005 };
        self.check(error(&found), best, bound, SQUARED_SLACK + 1e-9, || format!("{case} {} bits", scheme.bits));
    }
}

/// The weighted histogram's own objective: within 1.0005 of the best on symmetric grids, 1.002 on uniform ones.
#[test]
fn activations_are_near_the_optimum_of_their_histogram() {
    for grid in GRIDS {
        let mut worst = Worst::default();
        for kind in KINDS {
            let values = kind.values(4096, 11);
            for scores in SCORES {
                let own = scores.of(4096, 12);
                let is_sampled = |&bits: &u64| is_sampled(kind, grid, bits, scores as usize);
                for bits in [2, 3, 4, 6, 8].into_iter().filter(is_sampled) {
                    worst.check_bins(&values, &own, scheme(bits, grid), &format!("{kind:?} {scores:?}"));
                }
            }
        }
        worst.finish_hmse("activations", grid);
    }
}

/// The sweep met scales at which an extreme that decides lies between two levels, and ended too early.
#[test]
fn activations_with_an_extreme_that_decides_are_near_the_optimum() {
    let mut worst = Worst::default();
    for (kind, seed) in [(Kind::Tiny, 23), (Kind::Normal, 23), (Kind::Normal, 24), (Kind::Laplace, 25)] {
        let (values, scores) = (kind.values(20, seed), Scores::HeavyTailed.of(20, seed + 7));
        worst.check_bins(&values, &scores, scheme(3, Grid::Uniform), &format!("{kind:?} {seed}"));
        worst.check_scored(&values, &scores, scheme(3, Grid::Uniform), 1, &format!("{kind:?} {seed}"));
    }
    worst.finish_hmse("an extreme", Grid::Uniform);
}

/// Above 8 bits: not worse than 500 equally spaced thresholds.
#[test]
fn wide_grids_are_not_worse_than_equal_steps() {
    for grid in [Grid::Symmetric, Grid::Uniform] {
        for (kind, scores) in KINDS.into_iter().zip(SCORES.into_iter().cycle()) {
            for (bits, count) in [(9, 300), (12, 64), (14, 40)] {
                let (values, own) = (kind.values(count, 29 + bits), scores.of(count, 30 + bits));
                let scheme = scheme(bits, grid);
                let unit = scored_scale(&values, &own, scheme);
                let no_clipping = of_weights(&values, scheme, ErrorMethod::NoClipping).thresholds[0];
                let threshold = |factor: f64| match no_clipping {
                    Threshold::Signed(t) => Threshold::Signed(t * factor),
                    Threshold::Unsigned(t) => Threshold::Unsigned(t * factor),
                    Threshold::Uniform(Range { lo, hi }) => {
                        Threshold::Uniform(Range { lo: lo * factor, hi: hi * factor })
                    }
                };
                let error = |params: &QuantParams| raw_error(&values, &own, params, unit);
                let steps = (1..=500).map(|i| threshold(2.0 * f64::from(i) / 500.0).params(scheme.bits));
                let best = steps.map(|params| error(&params)).fold(f64::INFINITY, f64::min);
                let found = error(&of_scored(&values, &own, scheme).params[0]);
                // A scale rounded to f32 misses the last level by so much.
                let slack = SLACK.max(f64::from(scheme.bits.level_count()) * 2f64.powi(-22)).powi(2);
                assert!(found <= best * 1.0001 + slack, "{kind:?} {scores:?} {scheme:?}: {found:e} {best:e}");
            }
        }
    }
}

/// NOCLIPPING, of all values, is scored first and wins ties.
#[test]
fn never_worse_than_no_clipping() {
    for grid in GRIDS {
        for kind in KINDS {
            let values = kind.values(60, 31);
            let histogram = histogram(&values);
            for scores in SCORES {
                let own = scores.of(60, 32);
                let weights = weights_of(&values, &own);
                let is_sampled = |&bits: &u64| is_sampled(kind, grid, bits, scores as usize);
                for bits in [2, 5, 8, 10, 14].into_iter().filter(is_sampled) {
                    let scheme = scheme(bits, grid);
                    let no_clipping = of_weights(&values, scheme, ErrorMethod::NoClipping).params[0];
                    let error = |params| raw_error(&values, &own, params, no_clipping.scale().into());
                    let found = of_scored(&values, &own, scheme).params[0];
                    assert!(error(&found) <= error(&no_clipping), "weights, {kind:?} {scores:?} {scheme:?}");
                    // Wider grids take minutes.
                    if bits > 10 {
                        continue;
                    }
                    let no_clipping = select_activation(&histogram, scheme, ErrorMethod::NoClipping, None).unwrap();
                    let error = objective(&histogram, &weights, power_of_two_near(&no_clipping.params[0]));
                    let found = by_histogram(&histogram, &weights, scheme, None).unwrap().params[0];
                    let first = error(&no_clipping.params[0]);
                    assert!(error(&found) <= first, "activations, {kind:?} {scores:?} {scheme:?}");
                }
            }
        }
    }
}

/// Equal scores say nothing: exactly MSE on histograms, and as good on raw values.
#[test]
fn equal_scores_are_mse() {
    for grid in GRIDS {
        for kind in KINDS {
            let values = kind.values(200, 37);
            let histogram = histogram(&values);
            for bits in [2, 3, 5, 8].into_iter().filter(|&bits| is_sampled(kind, grid, bits, 0)) {
                let scheme = scheme(bits, grid);
                let mse = select_activation(&histogram, scheme, ErrorMethod::Mse, None).unwrap();
                let weights = weights_of(&values, &[0.25; 200]);
                let found = by_histogram(&histogram, &weights, scheme, None).unwrap();
                assert_eq!(found, Selection { weighted_error: Some(mse.error), ..mse }, "{kind:?} {scheme:?}");
                let mse = of_weights(&values, scheme, ErrorMethod::Mse);
                let found = of_scored(&values, &[0.3; 200], scheme);
                let slack = SQUARED_SLACK * f64::from(mse.params[0].scale()).powi(2);
                let (found, mse) = (found.error, mse.error);
                assert!(found <= mse * 1.0001 + slack, "{kind:?} {scheme:?} {found:e} {mse:e}");
            }
        }
    }
}

#[test]
fn scores_count_relative_to_each_other() {
    for grid in GRIDS {
        for kind in [Kind::Normal, Kind::Relu6, Kind::Outliers] {
            let (values, own) = (kind.values(200, 41), Scores::HeavyTailed.of(200, 42));
            let histogram = histogram(&values);
            for exponent in [-60, 3, 60] {
                let scaled: Vec<f32> = own.iter().map(|score| score * 2f32.powi(exponent)).collect();
                let factor = 2f64.powi(exponent);
                let times = |selection: Selection| Selection {
                    weighted_error: selection.weighted_error.map(|error| error * factor / factor),
                    ..selection
                };
                let eight = scheme(8, grid);
                assert_eq!(of_scored(&values, &scaled, eight), times(of_scored(&values, &own, eight)));
                let plain = weights_of(&values, &own);
                let mut scaled = plain.clone();
                scaled.scale(2f64.powi(exponent * 10));
                let select = |weights| by_histogram(&histogram, weights, eight, None).unwrap();
                assert_eq!(select(&scaled), select(&plain));
            }
        }
    }
}

#[test]
fn scaling_by_a_power_of_two_scales_the_threshold() {
    for grid in GRIDS {
        for kind in [Kind::Normal, Kind::Relu6, Kind::Outliers, Kind::Lattice] {
            let (values, own) = (kind.values(200, 43), Scores::Skewed.of(200, 44));
            for exponent in [-90, 7, 90] {
                let scaled: Vec<f32> = values.iter().map(|x| x * 2f32.powi(exponent)).collect();
                let scheme = scheme(6, grid);
                let of_weights = |values: &[f32]| of_scored(values, &own, scheme).params[0];
                let of_histogram = |values: &[f32]| {
                    let weights = weights_of(values, &own);
                    by_histogram(&histogram(values), &weights, scheme, None).unwrap().params[0]
                };
                for (a, b) in
                    [(of_weights(&values), of_weights(&scaled)), (of_histogram(&values), of_histogram(&scaled))]
                {
                    assert_eq!(f64::from(b.scale()), f64::from(a.scale()) * 2f64.powi(exponent), "{kind:?}");
                    assert_eq!(b.zero_point(), a.zero_point(), "{kind:?} {scheme:?}");
                }
            }
        }
    }
}

/// Two channels of equal values and swapped scores have swapped quantizers, which differ.
#[test]
fn each_channel_minimises_its_own_sum() {
    let values = Kind::Normal.values(100, 47);
    // One cares for small values, one for large ones.
    let small: Vec<f32> = values.iter().map(|x| (-4.0 * x * x).exp()).collect();
    let large: Vec<f32> = values.iter().map(|x| x.abs().powi(4) * 1e-3).collect();
    for grid in [Grid::Symmetric, Grid::Uniform] {
        let scheme = scheme(4, grid);
        let alone = [&small, &large].map(|scores| of_scored(&values, scores, scheme));
        assert!(f64::from(alone[1].params[0].scale()) > 1.2 * f64::from(alone[0].params[0].scale()));
        let both = |scores: [&Vec<f32>; 2]| {
            let all = [values.clone(), values.clone()].concat();
            let weights = Channels::new(&all, &[2, 100], Some(0)).unwrap();
            select_weights_scored(&weights, &[scores[0].clone(), scores[1].clone()].concat(), scheme).unwrap()
        };
        let found = both([&small, &large]);
        for (index, alone) in alone.iter().enumerate() {
            assert_eq!(found.params[index], alone.params[0]);
            assert_eq!(found.thresholds[index], alone.thresholds[0]);
            assert_eq!(found.curves[index], alone.curves[0]);
        }
        let swapped = both([&large, &small]);
        assert_eq!(swapped.params, [found.params[1], found.params[0]]);
        // The channels alternate.
        let pairs = |a: &[f32], b: &[f32]| a.iter().zip(b).flat_map(|(a, b)| [*a, *b]).collect::<Vec<f32>>();
        let weights = pairs(&values, &values);
        let weights = Channels::new(&weights, &[100, 2], Some(1)).unwrap();
        assert_eq!(select_weights_scored(&weights, &pairs(&small, &large), scheme).unwrap().params, found.params);
        // Σ h (x − q)² and Σ h go over all channels.
        let (mut squared_error, mut total) = (0.0, 0.0);
        for (scores, params) in [&small, &large].into_iter().zip(&found.params) {
            let sum: f64 = scores.iter().map(|&score| f64::from(score)).sum();
            squared_error += raw_error(&values, scores, params, 1.0) * sum;
            total += sum;
        }
        let told = found.weighted_error.unwrap();
        assert!((told - squared_error / total).abs() <= 1e-12 * told, "{told}");
    }
}

#[test]
fn channels_without_scores_use_mse() {
    let rows = [Kind::Normal.values(60, 1), Kind::Laplace.values(60, 2), vec![0.0; 60], Kind::StudentT.values(60, 3)];
    let all = rows.concat();
    let weights = Channels::new(&all, &[4, 60], Some(0)).unwrap();
    let scored = Scores::Skewed.of(60, 4);
    // The last one has a score where its value is zero alone.
    let mut all_but_first = all.clone();
    all_but_first[239] = 0.0;
    let last: Vec<f32> = (0..60).map(|index| if index == 59 { 1.0 } else { 0.0 }).collect();
    let weights_with_zero = Channels::new(&all_but_first, &[4, 60], Some(0)).unwrap();
    let scores = [vec![0.0; 60], scored.clone(), vec![0.0; 60], last].concat();
    for grid in GRIDS {
        let scheme = scheme(4, grid);
        let found = select_weights_scored(&weights_with_zero, &scores, scheme).unwrap();
        let mse = select_weights(&weights_with_zero, scheme, ErrorMethod::Mse).unwrap();
        for index in [0, 2, 3] {
            assert_eq!((found.params[index], &found.curves[index]), (mse.params[index], &mse.curves[index]));
        }
        assert_eq!(found.params[1], of_scored(&rows[1], &scored, scheme).params[0]);
        let notes =
            [Note::ZeroChannels { channels: vec![2], count: 4 }, Note::ZeroScores { channels: vec![0, 3], count: 4 }];
        assert_eq!(found.notes, notes);
        let none = select_weights_scored(&weights, &[0.0; 240], scheme).unwrap();
        let mse = select_weights(&weights, scheme, ErrorMethod::Mse).unwrap();
        assert_eq!((none.params, none.weighted_error), (mse.params, None));

        let histogram = histogram(&rows[0]);
        let without = weights_of(&rows[0], &[0.0; 60]);
        let found = by_histogram(&histogram, &without, scheme, None).unwrap();
        let mse = select_activation(&histogram, scheme, ErrorMethod::Mse, None).unwrap();
        assert_eq!(found, Selection { notes: vec![Note::ZeroScores { channels: vec![0], count: 1 }], ..mse });
    }
    // Where all values are zero there is nothing to choose.
    let zeros = of_scored(&[0.0; 3], &[0.0; 3], scheme(8, Grid::Symmetric));
    assert_eq!((zeros.notes, zeros.weighted_error), (vec![Note::AllZero], None));
    assert_eq!(of_scored(&[0.0; 3], &[1.0; 3], scheme(8, Grid::Symmetric)).weighted_error, Some(0.0));
}

#[test]
fn refuses_what_are_no_scores() {
    let values = [1.0, 2.0, 3.0, 4.0];
    let weights = Channels::new(&values, &[2, 2], Some(1)).unwrap();
    let eight = scheme(8, Grid::Symmetric);
    let refusal = |scores: &[f32]| select_weights_scored(&weights, scores, eight).unwrap_err().to_string();
    assert_eq!(refusal(&[1.0; 3]), "expected 4 Hessian scores, one per weight, found 3");
    assert_eq!(refusal(&[1.0; 5]), "expected 4 Hessian scores, one per weight, found 5");
    let odd = "expected Hessian scores that are finite and not negative, found";
    assert_eq!(refusal(&[1.0, f32::NAN, -1.0, 1.0]), format!("channel 1: {odd} NaN"));
    assert_eq!(refusal(&[1.0, 1.0, -1.0, 1.0]), format!("channel 0: {odd} -1.0"));
    assert_eq!(refusal(&[1.0, 1.0, 1.0, f32::INFINITY]), format!("channel 1: {odd} inf"));
    assert!(select_weights_scored(&weights, &[-0.0, 1e-45, f32::MAX, 0.0], eight).is_ok());

    let histogram = histogram(&values);
    for broken in [weights_of(&values, &[1.0, f32::NAN, 1.0, 1.0]), weights_of(&[f32::NAN; 4], &[1.0; 4])] {
        let error = by_histogram(&histogram, &broken, eight, None).unwrap_err();
        assert_eq!(error, SelectError::ScoresNotFinite);
    }
    let none = "HMSE needs Hessian scores, found none";
    assert_eq!(select_weights(&weights, eight, ErrorMethod::Hmse).unwrap_err().to_string(), none);
    assert_eq!(select_activation(&histogram, eight, ErrorMethod::Hmse, None).unwrap_err().to_string(), none);
}

/// With a limit on outliers the scores of what lies beyond do not count, and they are told all the same.
#[test]
fn scores_of_outliers_do_not_count() {
    let mut values = Kind::Normal.values(2000, 61);
    let mut own = Scores::Skewed.of(2000, 62);
    let (inner, inner_scores) = (values.clone(), own.clone());
    values.extend([70.0, -80.0]);
    own.extend([1e6, 1e6]);
    let (all, weights, inner_weights) =
        (histogram(&values), weights_of(&values, &own), weights_of(&inner, &inner_scores));
    for grid in GRIDS {
        let scheme = scheme(6, grid);
        let limited = by_histogram(&all, &weights, scheme, Some(6.0)).unwrap();
        let without = by_histogram(&all, &inner_weights, scheme, Some(6.0)).unwrap();
        assert_eq!((&limited.params, &limited.curves), (&without.params, &without.curves));
        assert!(limited.weighted_error > without.weighted_error);
        let unlimited = by_histogram(&all, &weights, scheme, None).unwrap();
        assert!(unlimited.params[0].scale() > 5.0 * limited.params[0].scale());
        // Nothing scored is left.
        let outliers = weights_of(&[70.0, -80.0, 0.0], &[1.0; 3]);
        let found = by_histogram(&all, &outliers, scheme, Some(6.0)).unwrap();
        let mse = select_activation(&all, scheme, ErrorMethod::Mse, Some(6.0)).unwrap();
        assert_eq!(found.params, mse.params);
        assert_eq!(found.notes.last(), Some(&Note::ZeroScores { channels: vec![0], count: 1 }));
    }
}

/// Scores where nothing was counted count: what made them may have rounded otherwise.
#[test]
fn scores_beside_the_counted_values_count() {
    let histogram = histogram(&[0.5, 1.0, 2.0, 4.0]);
    let eight = scheme(8, Grid::Symmetric);
    let weights = weights_of(&[0.7501, 4.02], &[1.0, 1e-6]);
    let found = by_histogram(&histogram, &weights, eight, None).unwrap();
    let error = |x: f32| f64::from(x) - f64::from(found.params[0].fake_quantize(x));
    assert!(error(0.7501).abs() < 1e-3 && found.weighted_error.unwrap() < 1e-6);
}

/// What is told of a histogram is what is told of its values, but for the places of values within bins.
#[test]
fn the_weighted_error_is_that_of_the_values() {
    let (values, own) = (Kind::Laplace.values(4096, 67), Scores::Skewed.of(4096, 68));
    for grid in GRIDS {
        for bits in [3, 6] {
            let scheme = scheme(bits, grid);
            let found = by_histogram(&histogram(&values), &weights_of(&values, &own), scheme, None).unwrap();
            let (told, expected) = (found.weighted_error.unwrap(), raw_error(&values, &own, &found.params[0], 1.0));
            assert!((told - expected).abs() <= 1e-3 * expected, "{scheme:?} {told} {expected}");
            let raw = of_scored(&values, &own, scheme);
            assert!((raw.weighted_error.unwrap() - expected).abs() <= 0.01 * expected);
            let least = raw.curves[0].iter().map(|point| point.error).fold(f64::INFINITY, f64::min);
            assert!(raw.weighted_error.unwrap() <= least * 1.0001 && least <= 1.3 * expected);
        }
    }
    assert_eq!(of_weights(&values, scheme(8, Grid::Symmetric), ErrorMethod::Mse).weighted_error, None);
}

/// Another number of threads: the same thresholds.
#[test]
fn thresholds_depend_on_nothing_but_values_and_scores() {
    let (values, own) = (Kind::Laplace.values(4096 * 20, 71), Scores::Skewed.of(4096 * 20, 72));
    let scheme = scheme(8, Grid::Uniform);
    let channels = Channels::new(&values[..4096 * 3], &[3, 4096], Some(0)).unwrap();
    let tensor = Channels::new(&values, &[4096 * 20], None).unwrap();
    let with_threads = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let select =
            |weights: &Channels<'_>| select_weights_scored(weights, &own[..weights.values().len()], scheme).unwrap();
        pool.install(|| [&channels, &tensor].map(select))
    };
    assert_eq!(with_threads(1), with_threads(3));
}
