//! The table that scores are summed in before they go to a weighted histogram. It is empty between two uses, so that one per
//! thread serves any number of histograms. It refuses to know what the scores are for.

use super::MinMax;
use super::counter::{BINS, used_octaves};
use super::histogram::{BINS_PER_OCTAVE, BLOCK, bin_of};

/// The first octave has no bins: each value of a block that counts as zero has a place of its own there, because sums in one
/// place would wait for each other.
const ZEROS: u16 = 0;

const _: () = assert!(BLOCK <= BINS_PER_OCTAVE);

/// Independent sums, so that they become vector instructions; part of the result, as `f64` sums depend on the order.
const LANES: usize = 8;

/// A table of all bins; reused, because only the memory of the octaves in use is ever touched.
#[derive(Debug)]
pub struct WeightedCounter {
    table: Vec<f64>,
    /// Of the values whose scores are in the table; those of blocks with NaN or infinities are not.
    seen: MinMax,
    /// Room for the bins of a block's values.
    bins: Box<[u32; BLOCK]>,
    /// Room for their scores.
    scores: Box<[f64; BLOCK]>,
}

/// What was in a counter.
#[derive(Debug, Clone, Copy)]
pub(super) enum Drained<'a> {
    /// The sum over the values that count as zero.
    Zeros(f64),
    /// The sums of an octave.
    Octave(u16, &'a [f64; BINS_PER_OCTAVE]),
    /// There was a NaN or an infinity among the values, and sums are missing.
    Broken,
}

impl WeightedCounter {
    /// An empty table.
    pub fn new() -> Self {
        let (bins, scores) = (Box::new([0; BLOCK]), Box::new([0.0; BLOCK]));
        Self { table: vec![0.0; BINS], seen: MinMax::new(), bins, scores }
    }

    /// Adds the square of each gradient to the bin of its value; both are equally many.
    pub(super) fn add(&mut self, values: &[f32], gradients: &[f32]) {
        pulp::Arch::new().dispatch(Add { counter: self, values, gradients });
    }

    /// Empties the table, by ascending octave.
    pub(super) fn drain(&mut self, mut take: impl FnMut(Drained<'_>)) {
        let seen = std::mem::take(&mut self.seen);
        if !seen.is_finite() {
            take(Drained::Broken);
        }
        let zeros = (seen.zeros() > 0).then_some(ZEROS);
        for octave in zeros.into_iter().chain(used_octaves(&seen)) {
            if let Some(scores) = self.table.as_chunks_mut::<BINS_PER_OCTAVE>().0.get_mut(usize::from(octave)) {
                take(if octave == ZEROS { Drained::Zeros(sum(scores)) } else { Drained::Octave(octave, scores) });
                scores.fill(0.0);
            }
        }
    }

    /// The bins and scores come first: those loops become vector instructions, and leave the last one nothing but the sums,
    /// which cost most. Each of them waits for the one before if that had the same bin, as in a constant block.
    #[inline(always)]
    fn add_block(&mut self, values: &[f32], gradients: &[f32]) {
        let Ok(table) = <&mut [f64; BINS]>::try_from(self.table.as_mut_slice()) else { return };
        let seen = MinMax::of_block(values);
        self.seen.merge(&seen);
        if !seen.is_finite() {
            return;
        }
        let (bins, scores) = (&mut self.bins[..values.len()], &mut self.scores[..values.len()]);
        for (score, &gradient) in scores.iter_mut().zip(gradients) {
            *score = f64::from(gradient) * f64::from(gradient);
        }
        if seen.min() == seen.max() {
            let bin = if seen.zeros() > 0 { 0 } else { bin_of(seen.min()) };
            table[bin as usize % BINS] += sum(scores);
            return;
        }
        for (place, (bin, &x)) in bins.iter_mut().zip(values).enumerate() {
            *bin = if x.abs() < f32::MIN_POSITIVE { place as u32 } else { bin_of(x) };
        }
        for (&bin, &score) in bins.iter().zip(&*scores) {
            table[bin as usize % BINS] += score;
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
        self.table.iter().all(|&score| score == 0.0) && self.seen == MinMax::new()
    }
}
