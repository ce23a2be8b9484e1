//! The table that values are counted in before their counts go to a histogram. It is empty between two uses, so that one
//! per thread serves any number of histograms.

use super::MinMax;
use super::histogram::{BINS_PER_OCTAVE, BLOCK, Octaves, bin_of};
use super::non_zero::NonZero;

/// Number of bins.
pub(super) const BINS: usize = 1 << 19;

/// A table of all bins; reused, because only the memory of the octaves in use is ever touched.
#[derive(Debug)]
pub struct Counter {
    table: Vec<u32>,
    /// Room for the bins of a block's values.
    bins: Box<[u32; BLOCK]>,
    non_zero: NonZero,
}

impl Counter {
    /// An empty table.
    pub fn new() -> Self {
        Self { table: vec![0; BINS], bins: Box::new([0; BLOCK]), non_zero: NonZero::new() }
    }

    /// Counts the finite values of a block, which `seen` sums up; zeros are left to `seen`. A table takes 2^31 values before
    /// it is drained.
    ///
    /// The bins come first: that loop becomes vector instructions, and leaves the last one nothing but the increments, which
    /// cost most. Each of them waits for the one before if that had the same bin, as in a constant block.
    #[inline(always)]
    pub(super) fn count(&mut self, block: &[f32], seen: &MinMax) {
        let Ok(table) = <&mut [u32; BINS]>::try_from(self.table.as_mut_slice()) else { return };
        let counted = if seen.zeros() == 0 { block } else { self.non_zero.of(block) };
        if seen.min() == seen.max() {
            if let Some(&x) = counted.first() {
                table[bin_of(x) as usize] += counted.len() as u32;
            }
            return;
        }
        let bins = &mut self.bins[..counted.len()];
        for (bin, &x) in bins.iter_mut().zip(counted) {
            *bin = bin_of(x);
        }
        for &bin in &*bins {
            table[bin as usize % BINS] += 1;
        }
    }

    /// Moves the counts of the values that `seen` sums up into `octaves`; zeros are left to `seen`.
    pub(super) fn drain(&mut self, seen: &MinMax, octaves: &mut Octaves) {
        for octave in used_octaves(seen) {
            if let Some(counts) = self.table.as_chunks_mut::<BINS_PER_OCTAVE>().0.get_mut(usize::from(octave)) {
                octaves.add(octave, counts);
                counts.fill(0);
            }
        }
    }
}

impl Default for Counter {
    fn default() -> Self {
        Self::new()
    }
}

/// All octaves between the least and the greatest magnitude of either sign.
pub(super) fn used_octaves(seen: &MinMax) -> impl Iterator<Item = u16> {
    let octave = |x: f32| (bin_of(x) as usize / BINS_PER_OCTAVE) as u16;
    let positive = seen.positive().map(|[least, greatest]| octave(least)..=octave(greatest));
    let negative = seen.negative().map(|[least, greatest]| octave(least)..=octave(greatest));
    positive.into_iter().chain(negative).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::statistics::Histogram;
    use crate::statistics::histogram::NEGATIVE;
    use crate::statistics::histogram::tests::{any_values, of};

    impl Counter {
        pub(in crate::statistics) fn is_empty(&self) -> bool {
            self.table.iter().all(|&count| count == 0)
        }
    }

    #[test]
    fn empty_after_any_kind_of_data() {
        let mut counter = Counter::new();
        let streams: [&[f32]; 9] = [
            &[],
            &[0.0, -0.0, 1e-40, -1e-40, 0.0],
            &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY],
            &[f32::NAN, 0.0, -0.0],
            &[f32::NAN, 3.0, -1e30, f32::INFINITY, 3.0],
            &[f32::MAX, f32::MIN, f32::MIN_POSITIVE, -f32::MIN_POSITIVE],
            &[-1e-40, -7.0],
            &[6.0; 4097],
            &[-0.0; 8191],
        ];
        for values in streams {
            let mut histogram = Histogram::new();
            histogram.observe(values, &mut counter);
            assert_eq!(histogram.count(), values.len() as u64);
            assert!(counter.is_empty(), "{values:?}");
        }
    }

    #[test]
    fn runs_of_any_length() {
        for length in [1, 2, 3, 4095, 4096, 4097, 8193] {
            let bins = of(&vec![6.0; length]).positive_bins();
            assert_eq!(bins.iter().map(|bin| bin.mass).collect::<Vec<_>>(), [length as f64]);
        }
    }

    #[test]
    fn drains_all_that_it_can_hold() {
        let mut counter = Counter::new();
        counter.table[bin_of(-1.5) as usize] = 1 << 31;
        let mut seen = MinMax::new();
        seen.observe(&[-1.5]);
        let mut octaves = Octaves::default();
        counter.drain(&seen, &mut octaves);
        assert!(counter.is_empty());
        let mut expected = Octaves::default();
        let mut counts = [0; BINS_PER_OCTAVE];
        counts[512] = 1 << 31;
        expected.add(NEGATIVE + 127, &counts);
        assert_eq!(octaves, expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn serves_one_histogram_after_another(streams in prop::collection::vec(any_values(100), 1..5)) {
            let mut counter = Counter::new();
            for values in streams {
                let mut histogram = Histogram::new();
                histogram.observe(&values, &mut counter);
                prop_assert!(histogram == of(&values));
                prop_assert!(counter.is_empty());
            }
        }
    }
}
