//! The table that scores are summed in before they go to a weighted histogram. It is empty between two uses, so that one per
//! thread serves any number of histograms. It refuses to know what the scores are for.

use super::histogram::{BINS_PER_OCTAVE, BLOCK, bin_of};

/// Signs and exponents.
pub(super) const OCTAVES: usize = 512;

/// Number of bins.
const BINS: usize = OCTAVES * BINS_PER_OCTAVE;

/// The first octave, which has no bins: each value of a block that counts as zero has a place of its own there, because sums
/// in one place would wait for each other.
const ZEROS: usize = 0;

const _: () = assert!(BLOCK <= BINS_PER_OCTAVE);

/// Independent sums, so that they become vector instructions; part of the result, as `f64` sums depend on the order.
const LANES: usize = 8;

/// A table of all bins; reused, because only the memory of the octaves in use is ever touched.
#[derive(Debug)]
pub struct WeightedCounter {
    table: Vec<f64>,
    /// Octaves in which something was summed.
    used: Box<[bool; OCTAVES]>,
    /// Room for the bins of a block's values.
    bins: Box<[u32; BLOCK]>,
    /// Room for their scores.
    scores: Box<[f64; BLOCK]>,
}

/// What was in a counter.
#[derive(Debug, Clone, Copy)]
pub(super) enum Drained<'a> {
    /// The scores of the values that count as zero.
    Zeros(&'a [f64; BINS_PER_OCTAVE]),
    /// The scores of an octave, which is that of NaN and infinities if its exponent is the last.
    Octave(u16, &'a [f64; BINS_PER_OCTAVE]),
}

impl WeightedCounter {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            table: vec![0.0; BINS],
            used: Box::new([false; OCTAVES]),
            bins: Box::new([0; BLOCK]),
            scores: Box::new([0.0; BLOCK]),
        }
    }

    /// Adds the square of each gradient to the bin of its value; both are equally many.
    pub(super) fn add(&mut self, values: &[f32], gradients: &[f32]) {
        pulp::Arch::new().dispatch(Add { counter: self, values, gradients });
    }

    /// Empties the table, by ascending octave.
    pub(super) fn drain(&mut self, mut take: impl FnMut(Drained<'_>)) {
        for (octave, scores) in self.table.as_chunks_mut::<BINS_PER_OCTAVE>().0.iter_mut().enumerate() {
            if std::mem::take(&mut self.used[octave]) {
                take(if octave == ZEROS { Drained::Zeros(scores) } else { Drained::Octave(octave as u16, scores) });
                scores.fill(0.0);
            }
        }
    }

    /// The bins and scores come first: that loop becomes vector instructions, and leaves the last one nothing but the sums,
    /// which cost most. Each of them waits for the one before if that had the same bin, as in a constant block.
    #[inline(always)]
    fn add_block(&mut self, values: &[f32], gradients: &[f32]) {
        let Ok(table) = <&mut [f64; BINS]>::try_from(self.table.as_mut_slice()) else { return };
        let (bins, scores) = (&mut self.bins[..values.len()], &mut self.scores[..values.len()]);
        let Some(&first) = values.first() else { return };
        let mut difference = 0;
        for (place, ((bin, score), (&x, &gradient))) in
            bins.iter_mut().zip(&mut *scores).zip(values.iter().zip(gradients)).enumerate()
        {
            *bin = if x.abs() < f32::MIN_POSITIVE { place as u32 } else { bin_of(x) };
            *score = f64::from(gradient) * f64::from(gradient);
            difference |= bin_of(x) ^ bin_of(first);
        }
        if difference == 0 && first.abs() >= f32::MIN_POSITIVE {
            table[bins[0] as usize % BINS] += sum(scores);
            self.used[bins[0] as usize / BINS_PER_OCTAVE % OCTAVES] = true;
            return;
        }
        for (&bin, &score) in bins.iter().zip(&*scores) {
            table[bin as usize % BINS] += score;
            self.used[bin as usize / BINS_PER_OCTAVE % OCTAVES] = true;
        }
    }
}

impl Default for WeightedCounter {
    fn default() -> Self {
        Self::new()
    }
}

/// The sum of any scores, fast.
#[inline(always)]
pub(super) fn sum(scores: &[f64]) -> f64 {
    let (groups, rest) = scores.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for group in groups {
        for (sum, score) in sums.iter_mut().zip(group) {
            *sum += score;
        }
    }
    sums.iter().sum::<f64>() + rest.iter().sum::<f64>()
}

/// A type, because a closure would not be compiled for each set of vector instructions.
struct Add<'a> {
    counter: &'a mut WeightedCounter,
    values: &'a [f32],
    gradients: &'a [f32],
}

impl pulp::NullaryFnOnce for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (values, gradients) in self.values.chunks(BLOCK).zip(self.gradients.chunks(BLOCK)) {
            self.counter.add_block(values, gradients);
        }
    }
}

#[cfg(test)]
impl WeightedCounter {
    pub(super) fn is_empty(&self) -> bool {
        self.table.iter().all(|&score| score == 0.0) && !self.used.contains(&true)
    }
}
