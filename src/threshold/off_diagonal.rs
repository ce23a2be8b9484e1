//! What a quantizer's errors cost because they are not independent. The squared error at the outputs, to first order, is
//! (Σ g (q − x))² over the elements of a row, g being their gradients: Σ g² (q − x)² and the products of different elements.
//! This is the part of the products, estimated from sums of gradients by row. It refuses to know how thresholds are searched.
//!
//! Two things make errors of a row alike: values beyond the end, which all err to one side, and values that occur often (the
//! constant that a batch normalization makes of a ReLU's zeros, the white of a photo), which all are rounded alike.

use crate::quantizer::{Bits, QuantParams};
use crate::statistics::{Bin, GradientSums, Histogram};

/// Bits up to which sums of gradients by row count for HMSE: beyond, levels are closer than their bins.
pub const GRADIENT_SUMS_MAX_BITS: u8 = 8;

/// Bins that a level has to have at least.
const LEAST_BINS: f64 = 3.0;

/// Rows below which their spread says nothing.
const LEAST_ROWS: usize = 2;

/// Independent sums, so that they become vector instructions; part of the result.
const LANES: usize = 16;

/// Sums of gradients by value, one line for each row.
pub(super) struct OffDiagonal {
    /// Of a bin.
    width: f64,
    values: Vec<f32>,
    /// What errors are counted in.
    unit: f32,
    /// In their unit, of a whole number of lanes each.
    rows: Vec<Vec<[f32; LANES]>>,
    sum_unit: f32,
}

/// An estimate from independent rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Estimate {
    pub(super) mean: f64,
    pub(super) standard_error: f64,
}

impl OffDiagonal {
    /// Of the values that count; `None` where sums tell nothing: there are none, or too few, or levels are too close for them.
    pub(super) fn new(sums: &GradientSums, counted: &Histogram, bits: Bits) -> Option<Self> {
        if bits.get() > GRADIENT_SUMS_MAX_BITS || sums.rows().len() < LEAST_ROWS {
            return None;
        }
        let observed = counted.observed().ok()??;
        let (lo, hi) = sums.range()?.into_inner();
        let width = (f64::from(hi) - f64::from(lo)) / GradientSums::BINS as f64;
        let range = observed.min()..=observed.max();
        let all = values(sums, counted);
        let kept: Vec<usize> = (0..all.len()).filter(|&bin| range.contains(&all[bin])).collect();
        let values: Vec<f32> = kept.iter().map(|&bin| all[bin]).collect();
        let sum_unit = unit(sums.rows().flat_map(|row| *row));
        let row = |sums: Box<[f32; GradientSums::BINS]>| {
            let mut row = vec![[0.0; LANES]; kept.len().div_ceil(LANES)];
            for (place, sum) in row.as_flattened_mut().iter_mut().zip(kept.iter().map(|&bin| sums[bin])) {
                *place = sum / sum_unit;
            }
            row
        };
        let rows = sums.rows().map(row).collect();
        Some(Self { width, unit: unit(values.iter().copied()), values, rows, sum_unit })
    }

    /// Whether bins are narrow enough beside the levels of a quantizer: one value stands for each bin.
    pub(super) fn tells_levels_of(&self, params: &QuantParams) -> bool {
        f64::from(params.scale()) >= LEAST_BINS * self.width
    }

    /// The mean over rows of (Σ g (q − x))².
    pub(super) fn squared_error(&self, params: &QuantParams) -> Estimate {
        let mut errors = vec![[0.0; LANES]; self.values.len().div_ceil(LANES)];
        let images = errors.as_flattened_mut();
        params.fake_quantize_slice(&self.values, &mut images[..self.values.len()]);
        for (image, x) in images.iter_mut().zip(&self.values) {
            *image = (*image - x) / self.unit;
        }
        let unit = f64::from(self.unit) * f64::from(self.sum_unit);
        let squares: Vec<f64> = self.rows.iter().map(|row| (dot(row, &errors) * unit).powi(2)).collect();
        let count = squares.len() as f64;
        let mean = squares.iter().sum::<f64>() / count;
        let variance = squares.iter().map(|square| (square - mean).powi(2)).sum::<f64>() / (count - 1.0);
        Estimate { mean, standard_error: (variance / count).sqrt() }
    }

    /// By how much the squared error is above `diagonal`, its part of independent errors, as far as that is no chance: beyond
    /// its standard error.
    pub(super) fn surplus(&self, params: &QuantParams, diagonal: f64) -> f64 {
        if !self.tells_levels_of(params) {
            return 0.0;
        }
        let Estimate { mean, standard_error } = self.squared_error(params);
        let surplus = mean - diagonal - standard_error;
        if surplus.is_nan() { f64::INFINITY } else { surplus.max(0.0) }
    }
}

/// The value that stands for each bin: the mean of what was counted in it, as far as counted bins are the finer ones, else its
/// middle. Where one value is frequent it has to be told well: all its gradients are multiplied with the error of what stands
/// for it.
fn values(sums: &GradientSums, counted: &Histogram) -> Vec<f32> {
    let mut values = sums.values();
    let mut means = vec![(0.0, 0.0); values.len()];
    let [negative, positive] = [(counted.negative_bins(), -1.0), (counted.positive_bins(), 1.0)];
    for (bins, sign) in [negative, positive] {
        for Bin { lo, hi, mass } in bins {
            let x = sign * (lo + hi) / 2.0;
            let ends = [sums.bin_of((sign * lo) as f32), sums.bin_of((sign * hi) as f32)];
            if let (Some(mean), true) = (means.get_mut(sums.bin_of(x as f32)), ends[0].abs_diff(ends[1]) <= 1) {
                *mean = (mean.0 + mass * x, mean.1 + mass);
            }
        }
    }
    let inner = 1..values.len().saturating_sub(1);
    for (value, (sum, mass)) in values[inner.clone()].iter_mut().zip(&means[inner]) {
        *value = if *mass > 0.0 { (sum / mass) as f32 } else { *value };
    }
    values
}

/// The largest power of two not above all magnitudes, give or take what keeps its inverse a normal number: products in such units
/// neither vanish nor overflow, and counting in them changes no digit.
fn unit(numbers: impl Iterator<Item = f32>) -> f32 {
    let largest = numbers.map(f32::abs).fold(0.0, f32::max);
    f32::from_bits(largest.to_bits() & f32::INFINITY.to_bits()).clamp(f32::MIN_POSITIVE, 1.0 / f32::MIN_POSITIVE)
}

fn dot(a: &[[f32; LANES]], b: &[[f32; LANES]]) -> f64 {
    let mut sums = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().map(|&sum| f64::from(sum)).sum()
}
