//! What errors of one row cost together, against direct sums, and what a threshold makes of it.

use std::ops::RangeInclusive;

use super::data::{Kind, Random, histogram};
use super::quality::{GRIDS, scheme};
use crate::quantizer::{Grid, QuantParams};
use crate::statistics::{ActivationScores, Divided, GradientSums, WeightedCounter, WeightedHistogram};
use crate::threshold::{Selection, select_activation_scored};

/// Rows of values, equally long, and the gradients of each.
struct Rows {
    values: Vec<Vec<f32>>,
    gradients: Vec<Vec<f32>>,
}

fn in_turn(parts: usize, work: &(dyn Fn(usize) + Sync)) {
    (0..parts).for_each(work);
}

impl Rows {
    fn new(count: usize, value: impl Fn(usize) -> Vec<f32>, gradient: impl Fn(usize) -> Vec<f32>) -> Self {
        Self { values: (0..count).map(value).collect(), gradients: (0..count).map(gradient).collect() }
    }

    fn scores(&self) -> ActivationScores {
        let values = || self.values.iter().flatten().copied();
        self.scores_in(values().fold(f32::MAX, f32::min)..=values().fold(f32::MIN, f32::max))
    }

    /// With sums over this range.
    fn scores_in(&self, range: RangeInclusive<f32>) -> ActivationScores {
        let (values, gradients) = (self.values.concat(), self.gradients.concat());
        let mut by_value = WeightedHistogram::new();
        by_value.observe(&values, &gradients, &mut [WeightedCounter::new()], in_turn);
        by_value.scale(1.0 / self.values.len() as f64);
        let mut sums = GradientSums::new(Some(range));
        sums.begin(self.values.len());
        sums.observe(&values, &gradients, Divided::ByRow, in_turn);
        sums.end();
        ActivationScores { by_value, sums }
    }

    fn select(&self, scores: &ActivationScores, grid: Grid, bits: u64) -> Selection {
        let all = histogram(&self.values.concat());
        select_activation_scored(&all, scores, scheme(bits, grid), None).expect("a selection")
    }

    /// The mean over rows of (Σ g (q − x))² and of Σ g² (q − x)².
    fn errors(&self, params: &QuantParams) -> [f64; 2] {
        let (mut together, mut apart) = (0.0, 0.0);
        for (values, gradients) in self.values.iter().zip(&self.gradients) {
            let terms = values
                .iter()
                .zip(gradients)
                .map(|(&x, &gradient)| f64::from(gradient) * (f64::from(params.fake_quantize(x)) - f64::from(x)));
            let terms: Vec<f64> = terms.collect();
            together += terms.iter().sum::<f64>().powi(2);
            apart += terms.iter().map(|term| term * term).sum::<f64>();
        }
        [together, apart].map(|sum| sum / self.values.len() as f64)
    }
}

fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.normal() as f32).collect()
}

/// A fifth of the values are four constants, each with gradients of one sign in each row.
fn constants_among_others() -> Rows {
    let value = |row| {
        let mut values = normal(400, 10 + row as u64);
        for (own, x) in values.chunks_mut(20).zip([-1.23, -0.57, 0.71, 1.94]) {
            own.fill(x);
        }
        values
    };
    let gradient = |row| {
        let mut gradients = normal(400, 700 + row as u64);
        for own in gradients.chunks_mut(20).take(4) {
            own.fill(own[0]);
        }
        gradients
    };
    Rows::new(64, value, gradient)
}

#[test]
fn constants_with_gradients_of_one_sign_are_rounded_well() {
    let rows = constants_among_others();
    let scores = rows.scores();
    let mut ratios = Vec::new();
    for grid in [Grid::Symmetric, Grid::Uniform] {
        for bits in 3..=8 {
            let together = rows.select(&scores, grid, bits);
            let apart = rows.select(&scores.by_value.clone().into(), grid, bits);
            let [cost, cost_apart] = [&together, &apart].map(|found| rows.errors(&found.params[0])[0]);
            assert!(cost < 1.1 * cost_apart, "{grid:?} {bits} bits: {cost} {cost_apart}");
            assert!(together.weighted_error >= apart.weighted_error && apart.off_diagonal.is_none());
            ratios.push(cost / cost_apart);
        }
    }
    // Some scales for the other values happen to suit the constants.
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(mean < 0.85, "{ratios:?}");
}

#[test]
fn what_is_told_is_the_direct_sum() {
    let rows = constants_among_others();
    let scores = rows.scores();
    for grid in GRIDS {
        for bits in [3, 4, 5] {
            let found = rows.select(&scores, grid, bits);
            let [together, apart] = rows.errors(&found.params[0]);
            let (told, expected) = (found.off_diagonal.expect("a share"), together / apart - 1.0);
            // With more bits, more of the values are rounded otherwise than the middle of their bin.
            assert!((told - expected).abs() < 0.15 * (1.0 + expected), "{grid:?} {bits} bits: {told} {expected}");
        }
    }
}

/// Gradients so small, or so large, that an f32 does not hold their products with errors.
#[test]
fn units_of_values_and_gradients_change_nothing() {
    let rows = constants_among_others();
    let times = |all: &[Vec<f32>], factor: f32| -> Vec<Vec<f32>> {
        all.iter().map(|row| row.iter().map(|x| x * factor).collect()).collect()
    };
    let find = |rows: &Rows| {
        let found = rows.select(&rows.scores(), Grid::Uniform, 4);
        (found.params[0].scale(), found.params[0].zero_point(), found.off_diagonal)
    };
    let (scale, zero_point, share) = find(&rows);
    for [value, gradient] in [[-60, -95], [60, 95], [-60, 95], [60, -95]] {
        let [value, gradient] = [value, gradient].map(|power| 2f32.powi(power));
        let scaled = Rows { values: times(&rows.values, value), gradients: times(&rows.gradients, gradient) };
        assert_eq!(find(&scaled), (scale * value, zero_point, share), "{value:e} {gradient:e}");
    }
}

/// Clipped values err to one side: they cost more where their gradients are of one sign in each row.
#[test]
fn clipping_with_gradients_of_one_sign_is_dear() {
    let value = |row| normal(2000, 10 + row as u64).iter().map(|x| x.abs()).collect::<Vec<f32>>();
    let gradient = |row| {
        let gradients = normal(2000, 700 + row as u64);
        let own = gradients[0];
        value(row).iter().zip(gradients).map(|(x, gradient)| if *x > 1.5 { own } else { gradient }).collect()
    };
    let rows = Rows::new(64, value, gradient);
    let scores = rows.scores();
    for grid in [Grid::Symmetric, Grid::Uniform] {
        let together = rows.select(&scores, grid, 3);
        let apart = rows.select(&scores.by_value.clone().into(), grid, 3);
        let [cost, cost_apart] = [&together, &apart].map(|found| rows.errors(&found.params[0])[0]);
        assert!(cost < 0.7 * cost_apart, "{grid:?}: {cost} {cost_apart}");
        let (share, share_apart) = (together.clipped_share, apart.clipped_share);
        assert!(share < share_apart, "{grid:?}: {share} {share_apart}");
    }
}

/// Errors that are independent cost what the diagonal says, and chance is not taken for more.
#[test]
fn independent_gradients_change_little() {
    for kind in [Kind::Normal, Kind::Relu, Kind::Laplace] {
        let rows = Rows::new(64, |row| kind.values(1000, 10 + row as u64), |row| normal(1000, 700 + row as u64));
        let scores = rows.scores();
        for grid in GRIDS {
            for bits in [4, 8] {
                let together = rows.select(&scores, grid, bits).weighted_error.expect("an error");
                let apart = rows.select(&scores.by_value.clone().into(), grid, bits).weighted_error.expect("an error");
                assert!((apart..1.1 * apart).contains(&together), "{kind:?} {grid:?} {bits}: {together} {apart}");
            }
        }
    }
}

/// A single row has no spread, and beyond eight bits levels are closer than what sums tell.
#[test]
fn sums_that_tell_nothing_change_nothing() {
    let rows = constants_among_others();
    let one = Rows { values: rows.values[..1].to_vec(), gradients: rows.gradients[..1].to_vec() };
    for (rows, bits) in [(&rows, 9), (&rows, 16), (&one, 8)] {
        let scores = rows.scores();
        let found = rows.select(&scores, Grid::Uniform, bits);
        assert_eq!(found, rows.select(&scores.by_value.clone().into(), Grid::Uniform, bits));
    }
}

/// Values that a limit on outliers leaves out do not count here either.
#[test]
fn gradients_of_outliers_do_not_count() {
    let outlier = |row: usize| {
        let mut values = normal(500, 10 + row as u64);
        values[7] = 60.0;
        values
    };
    let rows = Rows::new(32, outlier, |row| vec![normal(1, 700 + row as u64)[0]; 500]);
    let scores = rows.scores();
    let all = histogram(&rows.values.concat());
    let select = |limit| select_activation_scored(&all, &scores, scheme(4, Grid::Uniform), limit).unwrap();
    let (limited, unlimited) = (select(Some(8.0)), select(None));
    assert!(limited.params[0].scale() < 0.3 * unlimited.params[0].scale());
    // Errors in the report are of all values.
    assert!(limited.weighted_error > unlimited.weighted_error);
}

/// Sums over the values that a limit on outliers leaves tell of them what they would if there were no others.
#[test]
fn sums_may_be_of_what_a_limit_leaves() {
    let constants = constants_among_others();
    let and_one = |rows: &[Vec<f32>], last: f32| -> Vec<Vec<f32>> {
        rows.iter().map(|row| row.iter().copied().chain([last]).collect()).collect()
    };
    let rows = Rows { values: and_one(&constants.values, 5000.0), gradients: and_one(&constants.gradients, 5.0) };
    let all = histogram(&rows.values.concat());
    let counted = all.without_outliers(8.0).observed().unwrap().unwrap();
    assert!(counted.max() < 10.0);
    let narrow = rows.scores_in(counted.min()..=counted.max());
    let find = |scores| select_activation_scored(&all, scores, scheme(4, Grid::Uniform), Some(8.0)).unwrap();
    let found = find(&narrow);
    let expected = constants.select(&constants.scores(), Grid::Uniform, 4);
    let [together, apart] = constants.errors(&found.params[0]);
    let [least, _] = constants.errors(&expected.params[0]);
    assert!(together < 1.05 * least, "{together} {least}");
    let (told, direct) = (found.off_diagonal.expect("a share"), together / apart - 1.0);
    assert!((told - direct).abs() < 0.15 * (1.0 + direct), "{told} {direct}");
    // Bins of the range of all values are wider than any level.
    assert_eq!(find(&rows.scores()).off_diagonal, None);
}

#[test]
fn powers_of_two_are_tried_too() {
    let rows = constants_among_others();
    let found = rows.select(&rows.scores(), Grid::PowerOfTwo, 4);
    let scale = found.params[0].scale();
    assert_eq!(scale.log2(), scale.log2().round());
}
