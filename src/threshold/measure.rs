//! What a quantizer does to given values: squared error, signal, clipped values. It refuses to know how the quantizer
//! was chosen.

use super::channels::{Channels, ChannelsError};
use super::closed_form::Closed;
use super::family::Ends;
use super::mse::Square;
use super::search::{Side, Sides};
use crate::quantizer::{QuantParams, Range};
use crate::statistics::{Bin, Histogram, Observed};

/// Values quantized at a time, so that their images stay in the first cache.
const BLOCK: usize = 1024;

/// Independent sums, so that they become vector instructions; part of the result, as `f64` sums depend on the order.
const LANES: usize = 8;

/// Sums over the values of one or more channels.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Measured {
    squared_error: f64,
    signal: f64,
    clipped: u64,
    count: u64,
}

impl Measured {
    pub(super) fn of(values: &[f32], params: &QuantParams) -> Self {
        let unclipped = params.unclipped();
        let mut images = [0.0; BLOCK];
        let mut total = Self::default();
        for block in values.chunks(BLOCK) {
            params.fake_quantize_slice(block, &mut images);
            let (groups, rest) = block.as_chunks();
            total.merge(&sums(groups, images.as_chunks().0, unclipped));
            // Zero and its image, which is zero, add nothing.
            let (mut last, mut last_images) = ([0.0; LANES], [0.0; LANES]);
            last[..rest.len()].copy_from_slice(rest);
            params.fake_quantize_slice(rest, &mut last_images);
            total.merge(&sums(&[last], &[last_images], unclipped));
        }
        total.count = values.len() as u64;
        total
    }

    /// What the quantizer does to the values of a histogram, spread evenly within bins.
    pub(super) fn of_histogram(histogram: &Histogram, observed: Observed, params: &QuantParams) -> Self {
        let unit = unit(params);
        let sides = sides(&[histogram.negative_bins(), histogram.positive_bins()], unit);
        let Sides { negative: Closed { mass: negative, .. }, positive: Closed { mass: positive, .. } } = &sides;
        let Range { lo, hi } = params.unclipped();
        let clipped = negative.count_beyond(-lo / unit) + positive.count_beyond(hi / unit);
        Self {
            squared_error: squared_error(&sides, params) * unit * unit,
            signal: (negative.squares() + positive.squares()) * unit * unit,
            clipped: clipped.round() as u64,
            count: observed.count(),
        }
    }

    /// What values cost that were rounded to these images, which need not be the nearest: both as they lie in memory.
    pub(super) fn of_images(channels: &Channels<'_>, images: &[f32], params: &[QuantParams]) -> Self {
        let unclipped: Vec<Range> = params.iter().map(QuantParams::unclipped).collect();
        let mut total = Self { count: channels.values().len() as u64, ..Self::default() };
        for (place, (&x, &image)) in channels.values().iter().zip(images).enumerate() {
            let (x, image) = (f64::from(x), f64::from(image));
            total.squared_error += (x - image) * (x - image);
            total.signal += x * x;
            let range = unclipped.get(channels.channel_of(place));
            total.clipped += u64::from(range.is_some_and(|range| !range.contains(x)));
        }
        total
    }

    pub(super) fn merge(&mut self, other: &Self) {
        self.squared_error += other.squared_error;
        self.signal += other.signal;
        self.clipped += other.clipped;
        self.count += other.count;
    }

    /// Mean of (x − q)²; 0 of nothing.
    pub(super) fn mean_squared_error(&self) -> f64 {
        self.squared_error / self.count.max(1) as f64
    }

    /// 10 log10(Σ x² / Σ (x − q)²) in dB; infinite without an error.
    pub(super) fn sqnr_db(&self) -> f64 {
        if self.squared_error == 0.0 {
            return f64::INFINITY;
        }
        10.0 * (self.signal / self.squared_error).log10()
    }

    /// Share of the values that are clipped, from 0 to 1; 0 of nothing.
    pub(super) fn clipped_share(&self) -> f64 {
        self.clipped as f64 / self.count.max(1) as f64
    }
}

/// What images of values cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Mean of (x − q)².
    pub error: f64,
    /// 10 log10(Σ x² / Σ (x − q)²) in dB, infinite without an error.
    pub sqnr_db: f64,
    /// Share of the values that the quantizers of their channels clip, from 0 to 1.
    pub clipped_share: f64,
}

/// What weights cost that are rounded to `images`, each of them a level of its channel's quantizer.
///
/// # Errors
/// If there is not one quantizer for each channel.
pub fn cost_of_images(weights: &Channels<'_>, images: &[f32], params: &[QuantParams]) -> Result<Cost, ChannelsError> {
    if params.len() != weights.count() {
        return Err(ChannelsError::Quantizers { expected: weights.count(), found: params.len() });
    }
    let measured = Measured::of_images(weights, images, params);
    let (error, sqnr_db) = (measured.mean_squared_error(), measured.sqnr_db());
    Ok(Cost { error, sqnr_db, clipped_share: measured.clipped_share() })
}

/// Σ m (x − q)² over the masses m of negative and positive bins, spread evenly within them.
pub(super) fn squared_error_of_bins(bins: &[Vec<Bin>; 2], params: &QuantParams) -> f64 {
    let unit = unit(params);
    squared_error(&sides(bins, unit), params) * unit * unit
}

/// Σ h (x − q)² over values with a score h each.
pub(super) fn weighted_squared_error(values: &[f32], scores: &[f32], params: &QuantParams) -> f64 {
    let mut images = [0.0; BLOCK];
    let mut lanes = [0.0; LANES];
    for (values, scores) in values.chunks(BLOCK).zip(scores.chunks(BLOCK)) {
        params.fake_quantize_slice(values, &mut images);
        let groups = values.chunks(LANES).zip(images.chunks(LANES)).zip(scores.chunks(LANES));
        for ((values, images), scores) in groups {
            for (lane, ((&x, &image), &score)) in lanes.iter_mut().zip(values.iter().zip(images).zip(scores)) {
                let error = f64::from(x) - f64::from(image);
                *lane += f64::from(score) * error * error;
            }
        }
    }
    lanes.iter().sum()
}

/// A power of two near the scale.
fn unit(params: &QuantParams) -> f64 {
    f64::from(params.scale()).log2().floor().exp2()
}

fn sides(bins: &[Vec<Bin>; 2], unit: f64) -> Sides<Closed<Square>> {
    let [negative, positive] = bins.each_ref().map(|bins| Closed::new(Square, bins, unit));
    Sides { negative, positive }
}

/// In units.
fn squared_error(sides: &Sides<Closed<Square>>, params: &QuantParams) -> f64 {
    let Ends { below, above } = Ends::of(params);
    let scale = f64::from(params.scale());
    sides.negative.error(scale, below) + sides.positive.error(scale, above)
}

/// The sums of whole groups, without their count. Not inlined: within a larger function the lanes fall apart.
#[inline(never)]
fn sums(values: &[[f32; LANES]], images: &[[f32; LANES]], unclipped: Range) -> Measured {
    let (mut error, mut signal, mut clipped) = ([0.0; LANES], [0.0; LANES], [0u64; LANES]);
    for (values, images) in values.iter().zip(images) {
        for lane in 0..LANES {
            let (x, image) = (f64::from(values[lane]), f64::from(images[lane]));
            error[lane] += (x - image) * (x - image);
            signal[lane] += x * x;
            clipped[lane] += u64::from(x < unclipped.lo) + u64::from(x > unclipped.hi);
        }
    }
    Measured { squared_error: error.iter().sum(), signal: signal.iter().sum(), clipped: clipped.iter().sum(), count: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::Levels;

    /// Of the nearest images it is what the other sums say.
    #[test]
    fn images_cost_what_their_quantizers_do() {
        let values: Vec<f32> = (0..60).map(|i| ((i * 37 % 41) as f32 - 20.0) * 0.13).collect();
        let channels = Channels::new(&values, &[3, 4, 5], Some(1)).unwrap();
        let params: Vec<QuantParams> = [0.5, 1.0, 0.25, 2.0]
            .map(|scale| QuantParams::new(scale, 0, Levels { quant_min: -2, quant_max: 1 }).unwrap())
            .to_vec();
        let images = crate::threshold::quantize_weights(&channels, &params).unwrap();
        let mut expected = Measured::default();
        (0..4).for_each(|index| expected.merge(&Measured::of(&channels.channel(index), &params[index])));
        let found = cost_of_images(&channels, &images, &params).unwrap();
        assert!((found.error - expected.mean_squared_error()).abs() < 1e-12, "{found:?}");
        assert!((found.sqnr_db - expected.sqnr_db()).abs() < 1e-9, "{found:?}");
        assert!(found.clipped_share > 0.0);
        assert_eq!(found.clipped_share, expected.clipped_share());
        assert!(cost_of_images(&channels, &images, &params[..3]).is_err());
    }

    fn unit_quantizer() -> QuantParams {
        QuantParams::new(1.0, 0, Levels { quant_min: -2, quant_max: 1 }).unwrap()
    }

    #[test]
    fn sums_by_hand() {
        let measured = Measured::of(&[-2.0, -0.25, 1.25, 1.5, 3.0, -2.75, 0.0, 0.0], &unit_quantizer());
        let squared_error = 0.0625 + 0.0625 + 0.25 + 4.0 + 0.5625;
        assert_eq!(measured.mean_squared_error(), squared_error / 8.0);
        assert_eq!(measured.clipped_share(), 2.0 / 8.0);
        let signal = 4.0 + 0.0625 + 1.5625 + 2.25 + 9.0 + 7.5625;
        assert_eq!(measured.sqnr_db(), 10.0 * f64::log10(signal / squared_error));
    }

    #[test]
    fn blocks_and_rest_are_all_counted() {
        for length in [1, LANES + 1, BLOCK - 1, BLOCK, 2 * BLOCK + LANES + 3] {
            let measured = Measured::of(&vec![1.25; length], &unit_quantizer());
            assert_eq!(measured.mean_squared_error(), 0.0625, "{length} values");
            let clipped = Measured::of(&vec![7.0; length], &unit_quantizer());
            assert_eq!(clipped.clipped_share(), 1.0, "{length} values");
        }
    }

    #[test]
    fn without_error_or_values() {
        assert_eq!(Measured::of(&[1.0, 0.0], &unit_quantizer()).sqnr_db(), f64::INFINITY);
        let nothing = Measured::of(&[], &unit_quantizer());
        assert_eq!((nothing.mean_squared_error(), nothing.clipped_share()), (0.0, 0.0));
    }
}
