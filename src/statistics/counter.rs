//! The table that values are counted in before their counts go to a histogram. It is empty between two uses, so that one
//! per thread serves any number of histograms.

use super::MinMax;
use super::histogram::{BINS_PER_OCTAVE, NEGATIVE, Octaves, bin_of};

/// Two counters for each bin, which take turns: on a run of equal values each waits only for every second store.
const TURNS: usize = 2;
const COUNTERS: usize = (1 << 19) * TURNS;
const COUNTERS_PER_OCTAVE: usize = BINS_PER_OCTAVE * TURNS;

/// A table of 2^19 bins; reused, because only the memory of the octaves in use is ever touched.
#[derive(Debug)]
pub struct Counter {
    table: Vec<u32>,
}

impl Counter {
    /// An empty table.
    pub fn new() -> Self {
        Self { table: vec![0; COUNTERS] }
    }

    /// Counts finite values, of which a table takes 2^31 before it is drained.
    #[inline(always)]
    pub(super) fn count(&mut self, values: &[f32]) {
        let Ok(table) = <&mut [u32; COUNTERS]>::try_from(self.table.as_mut_slice()) else { return };
        let (pairs, rest) = values.as_chunks::<TURNS>();
        for pair in pairs {
            for (turn, &x) in pair.iter().enumerate() {
                table[bin_of(x) as usize * TURNS + turn] += 1;
            }
        }
        for &x in rest {
            table[bin_of(x) as usize * TURNS] += 1;
        }
    }

    /// Moves the counts of the values that `seen` sums up into `octaves`; zeros are left to `seen`.
    pub(super) fn drain(&mut self, seen: &MinMax, octaves: &mut Octaves) {
        for octave in used_octaves(seen) {
            let first = usize::from(octave) * COUNTERS_PER_OCTAVE;
            let Some(counters) = self.table.get_mut(first..first + COUNTERS_PER_OCTAVE) else { continue };
            let (pairs, _) = counters.as_chunks_mut::<TURNS>();
            let mut counts = [0u32; BINS_PER_OCTAVE];
            for (count, pair) in counts.iter_mut().zip(pairs.iter()) {
                *count = pair.iter().sum();
            }
            counters.fill(0);
            octaves.add(octave, &counts);
        }
        if seen.zeros() > 0 {
            // The first octave of either sign.
            for octave in [0, NEGATIVE] {
                let first = usize::from(octave) * COUNTERS_PER_OCTAVE;
                self.table[first..first + COUNTERS_PER_OCTAVE].fill(0);
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
fn used_octaves(seen: &MinMax) -> impl Iterator<Item = u16> {
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
    fn runs_of_any_length_count_in_both_turns() {
        for length in [1, 2, 3, 4095, 4096, 4097, 8193] {
            let bins = of(&vec![6.0; length]).positive_bins();
            assert_eq!(bins.iter().map(|bin| bin.count).collect::<Vec<_>>(), [length as u64]);
        }
    }

    #[test]
    fn drains_all_that_it_can_hold() {
        let mut counter = Counter::new();
        let bin = bin_of(-1.5) as usize * TURNS;
        counter.table[bin..bin + TURNS].copy_from_slice(&[1 << 30; TURNS]);
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
