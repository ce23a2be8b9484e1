//! Statistics that were counted elsewhere, in tables of all bins, as a GPU does it. It knows how such tables are laid out, and
//! not who fills them.

use super::channels::{Channel, Channels};
use super::counter::BINS;
use super::exact_sum::ExactSum;
use super::histogram::{BINS_PER_OCTAVE, NEGATIVE, Octaves};
use super::weighted::WITH_BINS;
use super::{Activation, Histogram, MinMax, WeightedHistogram};

/// How tables are laid out and how much they take.
#[derive(Debug, Clone, Copy)]
pub struct Layout;

impl Layout {
    /// Bins in all: the bits of an `f32`, as an unsigned number, without the last [`DROPPED_BITS`](Self::DROPPED_BITS).
    pub const BINS: usize = BINS;
    /// Bits of an `f32` that do not tell its bin.
    pub const DROPPED_BITS: u32 = 13;
    /// The bins below this belong to what counts as zero, and which of them a zero is counted in does not matter.
    pub const ZEROS: usize = BINS_PER_OCTAVE;
    /// Sums of a channel: one for each exponent.
    pub const EXPONENTS: usize = 256;
    /// Values that a table takes. An `f64` holds the sum of so many values of one exponent without rounding.
    pub const MOST_VALUES: usize = if cfg!(test) { 1 << 16 } else { 1 << 29 };
}

/// What was counted of the values of one site.
#[derive(Debug, Clone, Copy)]
pub struct Counted<'a> {
    /// Number of values, at most [`Layout::MOST_VALUES`].
    pub count: u64,
    /// How many of them are infinite.
    pub infinities: u64,
    /// The smallest positive value that does not count as zero; infinite without any.
    pub smallest_positive: f32,
    /// The negative value nearest to zero that does not count as zero; negative infinity without any.
    pub largest_negative: f32,
    /// Number of values in each of [`Layout::BINS`] bins; what stands where NaN and infinities go does not matter.
    pub bins: &'a [i32],
    /// How many values of each channel are finite.
    pub finite: &'a [i64],
    /// The smallest finite value of each channel; infinite without any.
    pub lows: &'a [f32],
    /// The largest finite value of each channel; negative infinity without any.
    pub highs: &'a [f32],
    /// For each channel the sums of its values by exponent, [`Layout::EXPONENTS`] of them; what stands where zeros, denormals, NaN
    /// and infinities go does not matter.
    pub sums: &'a [f64],
}

impl Activation {
    /// The same as if it had observed the values itself.
    #[must_use]
    pub fn of_counted(counted: &Counted<'_>) -> Self {
        let channels: Vec<Channel> = (0..counted.finite.len()).map(|index| channel(counted, index)).collect();
        let (mut octaves, mut zeros) = (Octaves::default(), 0);
        for (octave, counts) in (0u16..).zip(counted.bins.as_chunks::<BINS_PER_OCTAVE>().0) {
            if octave % NEGATIVE == 0 {
                zeros += counts.iter().map(|&count| u64::from(count.unsigned_abs())).sum::<u64>();
            } else if WITH_BINS.contains(&(octave % NEGATIVE)) {
                octaves.add(octave, &counts.map(i32::unsigned_abs));
            }
        }
        let finite = channels.iter().map(Channel::count).sum();
        let min_max = MinMax {
            min: channels.iter().map(Channel::min).fold(f32::INFINITY, f32::min),
            max: channels.iter().map(Channel::max).fold(f32::NEG_INFINITY, f32::max),
            smallest_positive: counted.smallest_positive,
            largest_negative: counted.largest_negative,
            count: counted.count,
            zeros,
            nans: counted.count.saturating_sub(finite).saturating_sub(counted.infinities),
            infinities: counted.infinities,
        };
        Self { histogram: Histogram::of_parts(min_max, octaves), channels: Channels::of(channels) }
    }
}

fn channel(counted: &Counted<'_>, index: usize) -> Channel {
    let Counted { finite, lows, highs, sums, .. } = *counted;
    let of = |values: &[f32], nothing| values.get(index).copied().unwrap_or(nothing);
    let mut sum = ExactSum::ZERO;
    let by_exponent = sums.chunks(Layout::EXPONENTS).nth(index).unwrap_or_default();
    for &part in by_exponent.iter().take(Layout::EXPONENTS - 1).skip(1) {
        sum.add(part);
    }
    let count = finite.get(index).map_or(0, |count| count.unsigned_abs());
    // −0.0 becomes 0.0: which of two equal zeros is met first must not show.
    Channel::of_parts(sum, count, [of(lows, f32::INFINITY) + 0.0, of(highs, f32::NEG_INFINITY) + 0.0])
}

impl WeightedHistogram {
    /// The scores in a table of [`Layout::BINS`] bins; `is_broken` if a value was NaN or infinite.
    #[must_use]
    pub fn of_table(table: &[f64], is_broken: bool) -> Self {
        let mut read = Self::new();
        read.is_broken = is_broken;
        for (octave, scores) in (0u16..).zip(table.as_chunks::<BINS_PER_OCTAVE>().0) {
            if octave % NEGATIVE == 0 {
                read.zeros += scores.iter().sum::<f64>();
            } else if WITH_BINS.contains(&(octave % NEGATIVE)) {
                read.add(octave, scores);
            }
        }
        read
    }

    /// The octave sums of a table, one for each [`Layout::ZEROS`] bins, as [`octave_sums`](Self::octave_sums) has them.
    pub fn octave_sums_of_table(sums: &[f64]) -> impl Iterator<Item = (u16, f64)> {
        let numbered = || (0u16..).zip(sums.iter().copied());
        let zeros = numbered().filter(|(octave, _)| octave % NEGATIVE == 0).map(|(_, sum)| sum).sum();
        let octaves = numbered().filter(|(octave, sum)| WITH_BINS.contains(&(octave % NEGATIVE)) && *sum != 0.0);
        octaves.chain([(Self::ZEROS, zeros)])
    }
}
