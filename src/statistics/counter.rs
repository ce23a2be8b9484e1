//! The table that values are counted in before their counts go to a histogram. It is empty between two uses, so that one
//! per thread serves any number of histograms.

use super::MinMax;
use super::histogram::{BINS_PER_OCTAVE, Octaves, bin_of};

/// Two counters for each bin, which take turns: on a run of equal values each waits only for every second store.
const TURNS: usize = 2;
const COUNTERS: usize = (1 << 19) * TURNS;
const COUNTERS_PER_OCTAVE: usize = BINS_PER_OCTAVE * TURNS;

/// Octaves of the negative values come after this many of the positive ones; the first of each are its zeros.
const NEGATIVE: u16 = 256;

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
