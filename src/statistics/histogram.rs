//! Exact counts of a stream of values, with the bits of the values themselves as bins.
//!
//! A bin is an `f32` without its last 13 bits: sign, exponent and ten bits of the mantissa. The relative resolution is the
//! same at every scale, no range has to be guessed, and the counts depend on nothing but the multiset of values.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Counter, MinMax, NotFinite, Observed};

/// Bins between a power of two and the next: 2^10.
pub(super) const BINS_PER_OCTAVE: usize = 1 << 10;

/// Bits of an `f32` that do not tell the bin.
const DROPPED_BITS: u32 = 13;

/// Values counted at a time, so that the second pass over them finds them in the first cache.
pub(super) const BLOCK: usize = 1024;

/// Values after which a counter is drained, so that no count in it can overflow. Few in tests, which have to get there.
pub(super) const DRAINED_AFTER: usize = if cfg!(test) { 1 << 16 } else { 1 << 30 };

/// The first octave of the negative values.
pub(super) const NEGATIVE: u16 = 256;

pub(super) fn bin_of(x: f32) -> u32 {
    x.to_bits() >> DROPPED_BITS
}

/// Streaming histogram over the bits of `f32` values: exact counts, extremes, zeros, NaN and infinities.
///
/// Zeros and denormals count as zero and have no bin. Two histograms of the same values are equal, whatever the order in
/// which they came and the parts that were merged.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Histogram {
    min_max: MinMax,
    octaves: Octaves,
}

/// Values of one sign between two magnitudes, spread evenly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bin {
    /// The smaller magnitude.
    pub lo: f64,
    /// The larger magnitude; equal to `lo` where all values of the bin are known to be equal.
    pub hi: f64,
    /// How many values, or the sum of their scores; above 0.
    pub mass: f64,
}

/// Mean and standard deviation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments {
    /// In the unit of the data.
    pub mean: f64,
    /// In the unit of the data, of the values as a population.
    pub standard_deviation: f64,
}

impl Histogram {
    /// Of no value yet.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn of_parts(min_max: MinMax, octaves: Octaves) -> Self {
        Self { min_max, octaves }
    }

    /// Adds these values, counting them in `counter`.
    pub fn observe(&mut self, values: &[f32], counter: &mut Counter) {
        for part in values.chunks(DRAINED_AFTER) {
            let seen = pulp::Arch::new().dispatch(Count { values: part, counter });
            self.take(&seen, counter);
        }
    }

    /// Takes over what `counter` holds: the values that `seen` sums up.
    pub(super) fn take(&mut self, seen: &MinMax, counter: &mut Counter) {
        counter.drain(seen, &mut self.octaves);
        self.min_max.merge(seen);
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        self.min_max.merge(&other.min_max);
        for (&octave, counts) in &other.octaves.0 {
            match counts {
                Counts::Narrow(narrow) => self.octaves.add(octave, narrow.as_ref()),
                Counts::Wide(wide) => self.octaves.add_wide(octave, wide),
            }
        }
    }

    pub(super) fn min_max(&self) -> &MinMax {
        &self.min_max
    }

    /// Number of values seen, NaN and infinities included.
    pub fn count(&self) -> u64 {
        self.min_max.count()
    }

    /// Extremes and counts; `None` if no value was seen.
    ///
    /// # Errors
    /// If a NaN or an infinity was seen.
    pub fn observed(&self) -> Result<Option<Observed>, NotFinite> {
        self.min_max.observed()
    }

    /// The positive values by ascending magnitude; those that count as zero are left out.
    ///
    /// The first bin begins at the smallest value and the last one ends at the largest: without these trims a spike at the
    /// clamp of a ReLU6 costs 1.5% of the error at 8 bits, and a constant misses its grid. A largest value that is alone in
    /// its bin is the whole of the bin: spread over it, an outlier costs up to 1% too much or too little.
    pub fn positive_bins(&self) -> Vec<Bin> {
        self.bins(0..NEGATIVE)
    }

    /// The negative values by ascending magnitude, like [`positive_bins`](Self::positive_bins).
    pub fn negative_bins(&self) -> Vec<Bin> {
        self.bins(NEGATIVE..2 * NEGATIVE)
    }

    fn bins(&self, octaves: Range<u16>) -> Vec<Bin> {
        let mut bins = Vec::new();
        self.for_each_bin(octaves, |_, _, bin| bins.push(bin));
        bins
    }

    /// Calls with the number of each bin, its count and the bin, by ascending magnitude.
    pub(super) fn for_each_bin(&self, octaves: Range<u16>, mut visit: impl FnMut(u32, u64, Bin)) {
        for (&octave, counts) in self.octaves.0.range(octaves) {
            let magnitudes = if octave < NEGATIVE { self.min_max.positive() } else { self.min_max.negative() };
            let Some([least, greatest]) = magnitudes.map(|ends| ends.map(|x| f64::from(x.abs()))) else { continue };
            counts.for_each(|index, count| {
                let number = u32::from(octave) * BINS_PER_OCTAVE as u32 + index;
                let (lo, end) = (edge(number).max(least), edge(number + 1));
                let holds_greatest = greatest < end;
                let lo = if count == 1 && holds_greatest { greatest } else { lo };
                visit(number, count, Bin { lo, hi: end.min(greatest), mass: count as f64 });
            });
        }
    }

    /// Mean and deviation of what the bins say, zeros included; `None` without a finite value.
    ///
    /// From the counts, in the order of the bins: sums over the stream would depend on its order.
    pub fn moments(&self) -> Option<Moments> {
        let (positive, negative) = (self.positive_bins(), self.negative_bins());
        let signed = || positive.iter().map(|bin| (1.0, bin)).chain(negative.iter().map(|bin| (-1.0, bin)));
        let count = signed().map(|(_, bin)| bin.mass).sum::<f64>() + self.min_max.zeros() as f64;
        if count == 0.0 {
            return None;
        }
        let mean = signed().map(|(sign, bin)| sign * bin.centre() * bin.mass).sum::<f64>() / count;
        let spread = |(sign, bin): (f64, &Bin)| {
            let distance = sign * bin.centre() - mean;
            (distance * distance + (bin.hi - bin.lo) * (bin.hi - bin.lo) / 12.0) * bin.mass
        };
        let squares = signed().map(spread).sum::<f64>() + mean * mean * self.min_max.zeros() as f64;
        Some(Moments { mean, standard_deviation: (squares / count).sqrt() })
    }

    /// The values at most `deviations` standard deviations from the mean: whole bins, kept if their centre is. What is left
    /// ends at the edges of its outermost bins. NaN and infinities stay counted.
    #[must_use]
    pub fn without_outliers(&self, deviations: f64) -> Self {
        let Some(Moments { mean, standard_deviation }) = self.moments() else { return self.clone() };
        let is_kept = |x: f64| (x - mean).abs() <= deviations * standard_deviation;
        let mut kept = Self { min_max: self.min_max.of_not_finite(), ..Self::new() };
        for &octave in self.octaves.0.keys() {
            let mut inside = [0u64; BINS_PER_OCTAVE];
            let sign = if octave < NEGATIVE { 1.0 } else { -1.0 };
            self.for_each_bin(octave..octave + 1, |number, count, bin| {
                if is_kept(sign * bin.centre()) {
                    inside[number as usize % BINS_PER_OCTAVE] = count;
                    let first = number << DROPPED_BITS;
                    let last = first | ((1 << DROPPED_BITS) - 1);
                    kept.min_max.merge(&self.min_max.within_bits(first, last, count));
                }
            });
            kept.octaves.add_wide(octave, &inside);
        }
        if is_kept(0.0) {
            kept.min_max.merge(&self.min_max.of_zeros());
        }
        kept
    }
}

impl Bin {
    /// The middle between its ends.
    pub fn centre(&self) -> f64 {
        (self.lo + self.hi) / 2.0
    }
}

/// The counting of [`Histogram::observe`], compiled for each set of vector instructions.
struct Count<'a> {
    values: &'a [f32],
    counter: &'a mut Counter,
}

impl pulp::NullaryFnOnce for Count<'_> {
    type Output = MinMax;

    #[inline(always)]
    fn call(self) -> MinMax {
        let mut seen = MinMax::new();
        for block in self.values.chunks(BLOCK) {
            seen.merge(&count_block(block, self.counter));
        }
        seen
    }
}

/// Counts the finite values of a block and sums it up.
#[inline(always)]
pub(super) fn count_block(block: &[f32], counter: &mut Counter) -> MinMax {
    let seen = MinMax::of_block(block);
    if seen.is_finite() {
        counter.count(block, &seen);
    } else {
        counter.count(&finite_of(block), &seen);
    }
    seen
}

/// What is left of a block without NaN and infinities.
pub(super) fn finite_of(block: &[f32]) -> Vec<f32> {
    block.iter().copied().filter(|x| x.is_finite()).collect()
}

/// The magnitude at which a bin begins.
pub(super) fn edge(bin: u32) -> f64 {
    let magnitude = f32::from_bits((bin << DROPPED_BITS) & (u32::MAX >> 1));
    if magnitude.is_finite() { f64::from(magnitude) } else { f64::from(f32::MAX) }
}

/// The counts of each octave in which there is a value, by sign and exponent.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Octaves(BTreeMap<u16, Counts>);

/// Wide if and only if the sum of all counts is beyond `u32`.
#[derive(Debug, Clone, PartialEq)]
enum Counts {
    Narrow(Box<[u32; BINS_PER_OCTAVE]>),
    Wide(Box<[u64; BINS_PER_OCTAVE]>),
}

impl Octaves {
    pub(super) fn add(&mut self, octave: u16, counts: &[u32; BINS_PER_OCTAVE]) {
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        match self.0.get_mut(&octave) {
            _ if total == 0 => {}
            Some(Counts::Narrow(sums)) if total + total_of(sums) <= u64::from(u32::MAX) => {
                for (sum, count) in sums.iter_mut().zip(counts) {
                    *sum += count;
                }
            }
            _ => self.add_wide(octave, &counts.map(u64::from)),
        }
    }

    pub(super) fn add_wide(&mut self, octave: u16, counts: &[u64; BINS_PER_OCTAVE]) {
        let mut sums = match self.0.get(&octave) {
            Some(Counts::Wide(wide)) => wide.clone(),
            Some(Counts::Narrow(narrow)) => Box::new(narrow.map(u64::from)),
            None => Box::new([0; BINS_PER_OCTAVE]),
        };
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
        let total: u64 = sums.iter().sum();
        if total == 0 {
            return;
        }
        let is_narrow = total <= u64::from(u32::MAX);
        let counts = if is_narrow { Counts::Narrow(Box::new(sums.map(|sum| sum as u32))) } else { Counts::Wide(sums) };
        self.0.insert(octave, counts);
    }
}

impl Counts {
    /// Calls with the index of each bin that is not empty, ascending.
    fn for_each(&self, mut visit: impl FnMut(u32, u64)) {
        let mut visit_counted = |(index, count): (usize, u64)| {
            if count > 0 {
                visit(index as u32, count);
            }
        };
        match self {
            Self::Narrow(counts) => {
                counts.iter().map(|&count| u64::from(count)).enumerate().for_each(&mut visit_counted);
            }
            Self::Wide(counts) => counts.iter().copied().enumerate().for_each(&mut visit_counted),
        }
    }
}

fn total_of(counts: &[u32; BINS_PER_OCTAVE]) -> u64 {
    counts.iter().map(|&count| u64::from(count)).sum()
}

#[cfg(test)]
pub(super) mod tests;
