//! Time of the threshold search: all weights of a ResNet-18, per channel, and 30 activation histograms, by method and grid.
//! `cargo bench --bench search`.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;
use tsquant::quantizer::{Bits, Grid, Scheme};
use tsquant::statistics::{ActivationScores, Counter, Histogram, WeightedCounter, WeightedHistogram};
use tsquant::threshold::{
    Channels, ErrorMethod, Exponent, select_activation, select_activation_scored, select_weights, select_weights_scored,
};

/// Runs of which the best counts.
const RUNS: usize = 1;

/// Activation sites, as many as a ResNet-18 has.
const SITES: usize = 30;

/// Values of each activation site.
const VALUES: usize = 1 << 18;

/// Output channels and weights per channel of each layer of a ResNet-18.
fn layers() -> Vec<[usize; 2]> {
    let mut layers = vec![[64, 3 * 49]];
    for (index, width) in [64, 128, 256, 512].into_iter().enumerate() {
        let narrow = if index == 0 { width } else { width / 2 };
        layers.extend([[width, narrow * 9], [width, width * 9], [width, width * 9], [width, width * 9]]);
        if index > 0 {
            layers.push([width, narrow]);
        }
    }
    layers.push([1000, 512]);
    layers
}

fn uniform(state: &mut u64) -> f32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 40) as f32 / (1u32 << 24) as f32
}

/// Nearly normal: sums of twelve uniform numbers.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count).map(|_| (0..12).map(|_| uniform(&mut state)).sum::<f32>() - 6.0).collect()
}

/// Log-normal, so that the effective number of values is a third to a quarter of all.
fn scores(count: usize, seed: u64) -> Vec<f32> {
    normal(count, seed).into_iter().map(f32::exp).collect()
}

/// Half of the sites after a ReLU, half two-sided with heavier tails.
fn histograms() -> Vec<(Histogram, ActivationScores)> {
    let site = |index: usize| {
        let mut values = normal(VALUES, 1000 + index as u64);
        for x in &mut values {
            *x = if index.is_multiple_of(2) { x.max(0.0) } else { *x * x.abs() };
        }
        let mut histogram = Histogram::new();
        histogram.observe(&values, &mut Counter::new());
        let mut weights = WeightedHistogram::new();
        let gradients = normal(VALUES, 2000 + index as u64);
        weights.observe(&values, &gradients, &mut [WeightedCounter::new()], |parts, run| (0..parts).for_each(run));
        (histogram, weights.into())
    };
    (0..SITES).into_par_iter().map(site).collect()
}

fn seconds(mut work: impl FnMut()) -> f64 {
    let mut run = || {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let layer = |(index, shape): (usize, [usize; 2])| {
        let count = shape[0] * shape[1];
        (normal(count, index as u64), scores(count, 100 + index as u64), shape)
    };
    let weights: Vec<(Vec<f32>, Vec<f32>, [usize; 2])> = layers().into_iter().enumerate().map(layer).collect();
    let histograms = histograms();
    let total: usize = weights.iter().map(|(values, ..)| values.len()).sum();
    let eight = Bits::try_from(8u64).unwrap_or(Bits::MAX);
    let p = Exponent::try_from(3i128).unwrap_or_default();
    println!("{} threads; seconds, best of {RUNS} runs, 8 bits", rayon::current_num_threads());
    println!("{:12} {:14} {total:>12} weights {SITES:>12} sites", "method", "grid");
    for (name, method) in [
        ("NOCLIPPING", ErrorMethod::NoClipping),
        ("MSE", ErrorMethod::Mse),
        ("MAE", ErrorMethod::Mae),
        ("LP 3", ErrorMethod::Lp { p }),
        ("KL", ErrorMethod::Kl),
        ("HMSE", ErrorMethod::Hmse),
    ] {
        for (grid_name, grid) in
            [("symmetric", Grid::Symmetric), ("power_of_two", Grid::PowerOfTwo), ("uniform", Grid::Uniform)]
        {
            let scheme = Scheme { bits: eight, grid };
            let of_weights = seconds(|| {
                for (values, scores, shape) in &weights {
                    let Ok(channels) = Channels::new(values, shape, Some(0)) else { continue };
                    let _ = black_box(match method {
                        ErrorMethod::Hmse => select_weights_scored(&channels, scores, scheme),
                        _ => select_weights(&channels, scheme, method),
                    });
                }
            });
            let of_sites = seconds(|| {
                let select = |(histogram, scores): &(Histogram, ActivationScores)| match method {
                    ErrorMethod::Hmse => select_activation_scored(histogram, scores, scheme, None).is_ok(),
                    _ => select_activation(histogram, scheme, method, None).is_ok(),
                };
                black_box(histograms.par_iter().map(select).filter(|&is_ok| is_ok).count());
            });
            println!("{name:12} {grid_name:14} {of_weights:>20.3} {of_sites:>18.3}");
        }
    }
}
