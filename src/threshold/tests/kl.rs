//! KL against a slow transcription of its definition, and against TensorRT's.

use super::data::{KINDS, Kind, Random, histogram};
use crate::quantizer::{Bits, Grid, QuantParams, Range, Scheme, Threshold};
use crate::statistics::Histogram;
use crate::threshold::{Channels, ErrorMethod, SelectError, select_activation, select_weights};

const BINS: i32 = 2048;

fn scheme(bits: u64, grid: Grid) -> Scheme {
    Scheme { bits: Bits::try_from(bits).unwrap(), grid }
}

/// Counts of the linear bins, bin −2048 first.
struct Lines {
    width: f64,
    counts: Vec<f64>,
}

impl Lines {
    fn of_values(values: &[f32], width: f64) -> Self {
        let mut counts = vec![0.0; 2 * BINS as usize];
        for x in values.iter().filter(|x| x.abs() >= f32::MIN_POSITIVE) {
            let bin = ((f64::from(x.abs()) / width) as i32).min(BINS - 1);
            let index = if *x > 0.0 { BINS + bin } else { BINS - 1 - bin };
            counts[index as usize] += 1.0;
        }
        Self { width, counts }
    }

    /// By differences of the interpolated cumulative counts; the last bins have all that is beyond.
    fn of_histogram(histogram: &Histogram, width: f64) -> Self {
        let mut counts = vec![0.0; 2 * BINS as usize];
        for (is_positive, bins) in [(true, histogram.positive_bins()), (false, histogram.negative_bins())] {
            let below = |x: f64| -> f64 {
                let share =
                    |lo: f64, hi: f64| if hi > lo { ((x - lo) / (hi - lo)).clamp(0.0, 1.0) } else { f64::from(x > lo) };
                bins.iter().map(|bin| bin.mass * share(bin.lo, bin.hi)).sum()
            };
            let all: f64 = bins.iter().map(|bin| bin.mass).sum();
            for bin in 0..BINS {
                let upper = if bin == BINS - 1 { all } else { below(f64::from(bin + 1) * width) };
                let index = if is_positive { BINS + bin } else { BINS - 1 - bin };
                counts[index as usize] = upper - below(f64::from(bin) * width);
            }
        }
        Self { width, counts }
    }

    fn level(&self, index: usize, params: &QuantParams) -> i32 {
        let centre = (index as f64 - f64::from(BINS) + 0.5) * self.width;
        (centre / f64::from(params.scale())).round_ties_even() as i32
    }

    /// The number of bins inside, and the divergence.
    fn divergence(&self, params: &QuantParams) -> (usize, f64) {
        let total: f64 = self.counts.iter().sum();
        let ends = [params.quant_min() - params.zero_point(), params.quant_max() - params.zero_point()];
        let levels: Vec<i32> = (0..self.counts.len()).map(|index| self.level(index, params)).collect();
        let inside: Vec<usize> = (0..levels.len()).filter(|&i| (ends[0]..=ends[1]).contains(&levels[i])).collect();
        // Share and quantized share of each bin.
        let mut p: Vec<f64> = inside.iter().map(|&i| self.counts[i] / total).collect();
        let mut q: Vec<f64> = Vec::new();
        for &i in &inside {
            let same = || inside.iter().filter(|&&j| levels[j] == levels[i] && self.counts[j] > 0.0);
            let mass: f64 = same().map(|&j| self.counts[j]).sum();
            q.push((mass / (total * same().count().max(1) as f64)).max(1e-12));
        }
        for (end, is_low) in [(ends[0], true), (ends[1], false)] {
            let is_clipped = |&i: &usize| if is_low { levels[i] < end } else { levels[i] > end };
            let clipped: f64 = (0..levels.len()).filter(is_clipped).map(|i| self.counts[i]).sum::<f64>() / total;
            if clipped == 0.0 {
                continue;
            }
            let of_end = |&k: &usize| levels[inside[k]] == end && self.counts[inside[k]] > 0.0;
            let place = if is_low { (0..inside.len()).find(of_end) } else { (0..inside.len()).rev().find(of_end) };
            if let Some(place) = place {
                p[place] += clipped;
            } else {
                p.push(clipped);
                q.push(1e-12);
            }
        }
        let divergence = p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln()).sum();
        (inside.len(), divergence)
    }
}

/// The slow way takes 10 ms for one quantizer, so that few cases have to do.
fn cases() -> Vec<(Kind, u64)> {
    vec![(Kind::Normal, 3), (Kind::Bimodal, 4), (Kind::Lattice, 3), (Kind::Outlier, 8), (Kind::Relu, 8), (Kind::Two, 2)]
}

fn extent(threshold: Threshold) -> f64 {
    match threshold {
        Threshold::Signed(t) | Threshold::Unsigned(t) => t,
        Threshold::Uniform(Range { lo, hi }) => hi.max(-lo),
    }
}

fn with_extent(like: Threshold, t: f64) -> Threshold {
    match like {
        Threshold::Signed(_) => Threshold::Signed(t),
        _ => Threshold::Unsigned(t),
    }
}

/// Choice by the definition: NOCLIPPING, and all T = k · w from the largest down with at least 2^b bins inside.
fn exhaustive(lines: &Lines, no_clipping: Threshold, scheme: Scheme, candidates: &[f64]) -> (QuantParams, f64) {
    let first = no_clipping.params(scheme.bits);
    let mut best = (first, lines.divergence(&first).1);
    for &t in candidates {
        let params = with_extent(no_clipping, t).params(scheme.bits);
        let (inside, divergence) = lines.divergence(&params);
        if inside as i64 >= i64::from(scheme.bits.level_count()) && divergence < best.1 - 1e-12 {
            best = (params, divergence);
        }
    }
    best
}

#[test]
fn equals_the_exhaustive_search() {
    for (kind, bits) in cases() {
        let values = kind.values(400, 3);
        let histogram = histogram(&values);
        for grid in [Grid::Symmetric, Grid::PowerOfTwo] {
            let scheme = scheme(bits, grid);
            let weights = Channels::new(&values, &[values.len()], None).unwrap();
            let of_weights = |method| select_weights(&weights, scheme, method).unwrap();
            let of_histogram = |method| select_activation(&histogram, scheme, method, None).unwrap();
            for (no_clipping, found, is_raw) in [
                (of_weights(ErrorMethod::NoClipping), of_weights(ErrorMethod::Kl), true),
                (of_histogram(ErrorMethod::NoClipping), of_histogram(ErrorMethod::Kl), false),
            ] {
                let width = extent(no_clipping.thresholds[0]) / f64::from(BINS);
                let lines =
                    if is_raw { Lines::of_values(&values, width) } else { Lines::of_histogram(&histogram, width) };
                // Some of the candidates and those around the choice: all would take minutes.
                let chosen = (extent(found.thresholds[0]) / width).round() as i32;
                let is_tried = |k: &i32| (k - chosen).abs() < 4 || k % 37 == 5;
                let candidates: Vec<f64> = if grid == Grid::PowerOfTwo {
                    (1..12).map(|k| extent(no_clipping.thresholds[0]) / 2f64.powi(k)).collect()
                } else {
                    (1..BINS).rev().filter(is_tried).map(|k| f64::from(k) * width).collect()
                };
                let (params, divergence) = exhaustive(&lines, no_clipping.thresholds[0], scheme, &candidates);
                let case = format!("{kind:?} {scheme:?} raw {is_raw}");
                let of_found = lines.divergence(&found.params[0]).1;
                assert!((of_found - divergence).abs() <= 1e-9, "{case}: {of_found} {divergence} {params:?}");
                let told = found.curves[0].iter().map(|point| point.error).fold(f64::INFINITY, f64::min);
                assert!((told - of_found).abs() <= 1e-9, "{case}: the curve says {told}, the definition {of_found}");
            }
        }
    }
}

/// Within 1.03 of the best pair of ends within the observed range, of 128 by 128.
#[test]
fn a_uniform_range_is_near_the_best_pair_of_ends() {
    for (kind, bits) in cases() {
        let values = kind.values(400, 3);
        let histogram = histogram(&values);
        let scheme = scheme(bits, Grid::Uniform);
        let found = select_activation(&histogram, scheme, ErrorMethod::Kl, None).unwrap();
        let data = histogram.observed().unwrap().unwrap();
        let (lo, hi) = (f64::from(data.min()).min(0.0), f64::from(data.max()).max(0.0));
        let lines = Lines::of_histogram(&histogram, hi.max(-lo) / f64::from(BINS));
        let of_found = lines.divergence(&found.params[0]).1;
        // Thinned out: the slow way takes 10 ms per pair.
        let mut best = f64::INFINITY;
        for i in (1..=128).rev().step_by(9) {
            for j in (1..=128).rev().step_by(9) {
                let range = Range { lo: lo * f64::from(i) / 128.0, hi: hi * f64::from(j) / 128.0 };
                let (inside, divergence) = lines.divergence(&Threshold::Uniform(range).params(scheme.bits));
                if inside as i64 >= i64::from(scheme.bits.level_count()) {
                    best = best.min(divergence);
                }
            }
        }
        assert!(of_found <= best * 1.03 + 1e-9, "{kind:?} {scheme:?}: found {of_found}, best {best}");
    }
}

/// KL ≥ −ln(inside share), so that the choice keeps at least exp(−KL of NOCLIPPING) of the mass: it cannot collapse.
#[test]
fn keeps_the_mass_that_the_divergence_allows() {
    for kind in KINDS {
        let values = kind.values(5000, 9);
        let histogram = histogram(&values);
        for bits in 2..=8 {
            for grid in [Grid::Symmetric, Grid::Uniform, Grid::PowerOfTwo] {
                let scheme = scheme(bits, grid);
                let found = select_activation(&histogram, scheme, ErrorMethod::Kl, None).unwrap();
                let Some(no_clipping) = found.curves[0].first() else { continue };
                let least = found.curves[0].iter().map(|point| point.error).fold(f64::INFINITY, f64::min);
                assert!(least <= no_clipping.error, "{kind:?} {scheme:?}");
                let zeros = histogram.observed().unwrap().unwrap().zeros() as f64;
                let counted = histogram.count() as f64 - zeros;
                // The clipped share counts what is half a level outside; a bin's centre decides here.
                let kept = 1.0 - found.clipped_share * histogram.count() as f64 / counted;
                assert!(kept >= (-no_clipping.error).exp() - 0.01, "{kind:?} {scheme:?}: {kept}");
            }
        }
    }
}

#[test]
fn refuses_more_than_eight_bits() {
    let histogram = histogram(&Kind::Normal.values(100, 1));
    for bits in 9..=16 {
        let scheme = scheme(bits, Grid::Symmetric);
        let error = select_activation(&histogram, scheme, ErrorMethod::Kl, None).unwrap_err();
        assert_eq!(error, SelectError::KlBits { bits: scheme.bits });
        assert_eq!(error.to_string(), format!("expected at most 8 bits for KL, found {bits}"));
    }
}

/// TensorRT's choice, as pytorch-quantization has it: 2048 bins of abs(x), bin 0 replaced by bin 1, groups of equal
/// numbers of bins, the mean over those that are not empty; the last of equal minima wins.
fn tensorrt(values: &[f32], groups: usize) -> f64 {
    let greatest = values.iter().fold(0.0f64, |t, x| t.max(f64::from(x.abs())));
    let mut counts = vec![0.0f64; 2048];
    for x in values {
        counts[((f64::from(x.abs()) / greatest * 2048.0) as usize).min(2047)] += 1.0;
    }
    counts[0] = counts[1];
    let mut best = (f64::INFINITY, 0);
    for end in 128..=2048 {
        let mut p = counts[..end].to_vec();
        p[end - 1] += counts[end..].iter().sum::<f64>();
        let group = |i: usize| i * groups / end;
        let (mut mass, mut filled) = (vec![0.0; groups], vec![0.0; groups]);
        for (i, &count) in counts[..end].iter().enumerate().filter(|(_, count)| **count > 0.0) {
            mass[group(i)] += count;
            filled[group(i)] += 1.0;
        }
        let q = |i: usize| if counts[i] > 0.0 { mass[group(i)] / filled[group(i)] } else { 0.0 };
        let (p_sum, q_sum) = (p.iter().sum::<f64>(), (0..end).map(q).sum::<f64>());
        let terms = (0..end).filter(|&i| p[i] > 0.0).map(|i| p[i] / p_sum * (p[i] / p_sum / (q(i) / q_sum)).ln());
        let divergence: f64 = terms.sum();
        if divergence <= best.0 {
            best = (divergence, end);
        }
    }
    greatest * best.1 as f64 / 2048.0
}

#[test]
fn agrees_with_tensorrt_on_smooth_data() {
    for kind in [Kind::Normal, Kind::Laplace, Kind::Relu] {
        for outlier in [false, true] {
            let mut values = kind.values(100_000, 23);
            if outlier {
                values[0] = 60.0;
            }
            let histogram = histogram(&values);
            for bits in [3, 4, 8] {
                let scheme = scheme(bits, Grid::Symmetric);
                let found = select_activation(&histogram, scheme, ErrorMethod::Kl, None).unwrap();
                let is_unsigned = kind == Kind::Relu;
                if is_unsigned && outlier && bits == 8 {
                    // TensorRT keeps the outlier.
                    continue;
                }
                let theirs = tensorrt(&values, 1 << (bits - 1 + u64::from(is_unsigned)));
                let ratio = extent(found.thresholds[0]) / theirs;
                assert!((0.8..=1.4).contains(&ratio), "{kind:?} outlier {outlier} {bits} bits: {ratio}");
            }
        }
    }
}

#[test]
fn scaling_the_data_scales_the_threshold() {
    let mut random = Random::new(3);
    let values: Vec<f32> = (0..2000).map(|_| random.normal() as f32).collect();
    for grid in [Grid::Symmetric, Grid::Uniform, Grid::PowerOfTwo] {
        let scheme = scheme(6, grid);
        let select = |values: &[f32]| select_activation(&histogram(values), scheme, ErrorMethod::Kl, None).unwrap();
        let plain = extent(select(&values).thresholds[0]);
        for exponent in [-90, -3, 1, 60] {
            let factor = 2f64.powi(exponent);
            let scaled: Vec<f32> = values.iter().map(|x| x * factor as f32).collect();
            assert_eq!(extent(select(&scaled).thresholds[0]), plain * factor);
        }
    }
}
