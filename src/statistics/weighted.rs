//! Scores of a stream of values by the bins of a [`Histogram`]. It knows pairs of a value and a gradient, and not what the
//! scores are for.
//!
//! Sums of `f64` depend on their order: the same pairs in the same order, divided into the same parts, give the same sums bit
//! for bit, and other orders and parts the same but for rounding.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::Mutex;

use super::channels::locked;
use super::histogram::{BINS_PER_OCTAVE, NEGATIVE, bin_of, edge};
use super::weighted_counter::{Drained, sum};
use super::{Bin, Histogram, WeightedCounter};

/// Pairs worth a thread of their own.
const PAIRS_PER_PART: usize = 1 << 15;

/// Octaves of magnitudes that have bins: neither zeros and denormals nor infinities and NaN.
pub(super) const WITH_BINS: Range<u16> = 1..NEGATIVE - 1;

/// Sum of the squared gradients of the values in each bin, and of those that count as zero.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WeightedHistogram {
    /// Of the octaves, by sign and exponent, in which a sum is not 0.
    octaves: BTreeMap<u16, Box<[f64; BINS_PER_OCTAVE]>>,
    pub(super) zeros: f64,
    /// Whether a value had no place, or a gradient no value.
    pub(super) is_broken: bool,
}

impl WeightedHistogram {
    /// The number under which [`octave_sums`](Self::octave_sums) tells the scores of zeros and denormals.
    pub const ZEROS: u16 = u16::MAX;

    /// Of no pair yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the square of each gradient to the bin of its value. Slices of different lengths count as not finite.
    ///
    /// The work is divided into at most as many parts as there are counters, which are empty before and after; without any,
    /// into one. `in_parallel` has to call the function that it is given with each number below its first argument, in any
    /// order, on any thread. The sums depend on the pairs, their order and the number of counters alone.
    pub fn observe(
        &mut self,
        values: &[f32],
        gradients: &[f32],
        counters: &mut [WeightedCounter],
        in_parallel: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
    ) {
        if counters.is_empty() {
            return self.observe(values, gradients, &mut [WeightedCounter::new()], in_parallel);
        }
        self.is_broken |= values.len() != gradients.len();
        let pairs = values.len().min(gradients.len());
        if pairs == 0 {
            return;
        }
        let part_count = (pairs / PAIRS_PER_PART).clamp(1, counters.len());
        let mut parts = Vec::with_capacity(part_count);
        for (number, counter) in counters.iter_mut().take(part_count).enumerate() {
            let own = pairs * number / part_count..pairs * (number + 1) / part_count;
            parts.push(Mutex::new(Some((counter, &values[own.clone()], &gradients[own]))));
        }
        in_parallel(part_count, &|number| {
            let Some((counter, values, gradients)) = parts.get(number).and_then(|part| locked(part).take()) else {
                return;
            };
            counter.add(values, gradients);
        });
        drop(parts);
        for counter in counters.iter_mut().take(part_count) {
            self.take(counter);
        }
    }

    fn take(&mut self, counter: &mut WeightedCounter) {
        counter.drain(|drained| match drained {
            Drained::Zeros(score) => self.zeros += score,
            Drained::Octave(octave, scores) => self.add(octave, scores),
            Drained::Broken => self.is_broken = true,
        });
    }

    pub(super) fn add(&mut self, octave: u16, scores: &[f64; BINS_PER_OCTAVE]) {
        if scores.iter().all(|&score| score == 0.0) {
            return;
        }
        let sums = self.octaves.entry(octave).or_insert_with(|| Box::new([0.0; BINS_PER_OCTAVE]));
        for (sum, score) in sums.iter_mut().zip(scores) {
            *sum += score;
        }
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        for (&octave, scores) in &other.octaves {
            self.add(octave, scores);
        }
        self.zeros += other.zeros;
        self.is_broken |= other.is_broken;
    }

    /// Multiplies all scores with a factor that is not negative.
    pub fn scale(&mut self, factor: f64) {
        self.octaves.values_mut().flat_map(|scores| scores.iter_mut()).for_each(|score| *score *= factor);
        self.zeros *= factor;
        self.octaves.retain(|_, scores| scores.iter().any(|&score| score != 0.0));
    }

    /// The sum of all scores, those of zeros and denormals included.
    pub fn total(&self) -> f64 {
        self.octave_sums().map(|(_, sum)| sum).sum()
    }

    /// The sum of the scores of zeros and denormals.
    pub fn zeros(&self) -> f64 {
        self.zeros
    }

    /// Whether all values and gradients were finite, and so is the sum of all scores.
    pub fn is_finite(&self) -> bool {
        !self.is_broken && self.total().is_finite()
    }

    /// Whether the sum of all scores is 0.
    pub fn is_zero(&self) -> bool {
        self.total() == 0.0
    }

    /// The sum of each octave in which it is not 0, by its number, ascending; last that of zeros and denormals as
    /// [`ZEROS`](Self::ZEROS).
    pub fn octave_sums(&self) -> impl Iterator<Item = (u16, f64)> {
        let sums = self.octaves.iter().map(|(&octave, scores)| (octave, sum(scores.as_slice())));
        sums.chain([(Self::ZEROS, self.zeros)])
    }

    /// The number and the score of each bin whose score is not 0, ascending.
    pub fn sparse(&self) -> Vec<(u32, f64)> {
        self.bins(0..2 * NEGATIVE).collect()
    }

    /// What has these bins, as of [`sparse`](Self::sparse), and this score of zeros and denormals; `None` if no value has such
    /// a bin, or a score or the sum of all is negative or not finite.
    pub fn from_sparse(bins: impl IntoIterator<Item = (u32, f64)>, zeros: f64) -> Option<Self> {
        let is_score = |score: f64| score >= 0.0 && score.is_finite();
        let mut read = Self { zeros, ..Self::new() };
        for (bin, score) in bins {
            let octave = u16::try_from(bin / BINS_PER_OCTAVE as u32).ok().filter(|&octave| has_bins(octave))?;
            if !is_score(score) {
                return None;
            }
            let mut scores = [0.0; BINS_PER_OCTAVE];
            scores[bin as usize % BINS_PER_OCTAVE] = score;
            read.add(octave, &scores);
        }
        (is_score(zeros) && read.is_finite()).then_some(read)
    }

    /// With a share of the mean score of all values, which `histogram` counts, added to the score of each.
    #[must_use]
    pub fn damped(&self, histogram: &Histogram, share: f64) -> Self {
        let counted = histogram.min_max();
        let each = share * self.total() / counted.count().max(1) as f64;
        let mut damped = self.clone();
        damped.zeros += each * counted.zeros() as f64;
        let mut octave = None;
        let mut scores = [0.0; BINS_PER_OCTAVE];
        histogram.for_each_bin(0..2 * NEGATIVE, |number, count, _| {
            let own = u16::try_from(number / BINS_PER_OCTAVE as u32).ok();
            if own != octave {
                if let Some(octave) = octave {
                    damped.add(octave, &scores);
                }
                (octave, scores) = (own, [0.0; BINS_PER_OCTAVE]);
            }
            scores[number as usize % BINS_PER_OCTAVE] = each * count as f64;
        });
        if let Some(octave) = octave {
            damped.add(octave, &scores);
        }
        damped
    }

    /// The scores of the values in this range alone, of whole bins: of those that it touches.
    #[must_use]
    pub fn within(&self, range: RangeInclusive<f32>) -> Self {
        let (lo, hi) = range.into_inner();
        let touches = |bin: u32| {
            let (sign, magnitude) = (bin / number(NEGATIVE, 0), bin % number(NEGATIVE, 0));
            let (lo, hi) = if sign == 0 { (lo, hi) } else { (-hi, -lo) };
            hi >= 0.0 && (bin_of(lo.max(0.0).abs())..=bin_of(hi.abs())).contains(&magnitude)
        };
        let mut kept = Self { is_broken: self.is_broken, ..Self::new() };
        for (&octave, scores) in &self.octaves {
            let mut inside = **scores;
            for (index, score) in inside.iter_mut().enumerate() {
                *score = if touches(number(octave, index)) { *score } else { 0.0 };
            }
            kept.add(octave, &inside);
        }
        kept.zeros = if lo <= 0.0 && hi >= 0.0 { self.zeros } else { 0.0 };
        kept
    }

    fn bins(&self, octaves: Range<u16>) -> impl Iterator<Item = (u32, f64)> {
        let all = self.octaves.range(octaves).flat_map(|(&octave, scores)| {
            scores.iter().enumerate().map(move |(index, &score)| (number(octave, index), score))
        });
        all.filter(|&(_, score)| score != 0.0)
    }
}

impl Histogram {
    /// The negative and the positive values by ascending magnitude, like [`negative_bins`](Self::negative_bins) and
    /// [`positive_bins`](Self::positive_bins), with the scores of `weights` as their mass; bins without any are left out.
    ///
    /// Where no value was counted a bin has its own edges: what made the scores may have rounded a value otherwise.
    pub fn weighted_bins(&self, weights: &WeightedHistogram) -> [Vec<Bin>; 2] {
        [NEGATIVE..2 * NEGATIVE, 0..NEGATIVE].map(|octaves| {
            let mut numbers = Vec::new();
            let mut bins = Vec::new();
            for (number, mass) in weights.bins(octaves) {
                numbers.push(number);
                bins.push(Bin { lo: edge(number), hi: edge(number + 1), mass });
            }
            // Trims belong to the outermost bins alone: all others meet their neighbours.
            if let (Some(bin), Some(counted)) = (bins.first_mut(), self.counted_bin(numbers.first())) {
                bin.lo = counted.lo;
            }
            if let (Some(bin), Some(counted)) = (bins.last_mut(), self.counted_bin(numbers.last())) {
                (bin.lo, bin.hi) = (counted.lo, counted.hi);
            }
            bins
        })
    }

    /// The bin of this number, if a value was counted in it.
    fn counted_bin(&self, number: Option<&u32>) -> Option<Bin> {
        let octave = u16::try_from(number? / BINS_PER_OCTAVE as u32).ok()?;
        let mut found = None;
        self.for_each_bin(octave..octave + 1, |other, _, bin| {
            if Some(&other) == number {
                found = Some(bin);
            }
        });
        found
    }
}

pub(super) fn has_bins(octave: u16) -> bool {
    octave < 2 * NEGATIVE && WITH_BINS.contains(&(octave % NEGATIVE))
}

fn number(octave: u16, index: usize) -> u32 {
    u32::from(octave) * BINS_PER_OCTAVE as u32 + index as u32
}

#[cfg(test)]
mod tests;
