//! Sums of gradients by value, with their sign and apart for each row: they show whether the errors that a quantizer makes in
//! one row add up or cancel. It knows pairs of a value and a gradient, and no quantizer.
//!
//! Bins are of one width, that of the range that is to be quantized by their number. Most of them stay empty where a few values
//! stretch the range, and take one bit then.

use std::ops::RangeInclusive;
use std::sync::Mutex;

use super::channels::locked;

const BINS: usize = GradientSums::BINS;

/// Places for the gradients of zeros and of what lies outside, which are not kept: several, because sums in one place would wait for each other.
const ZEROS: usize = 8;

/// Values whose bins are found before their gradients are added.
const BLOCK: usize = 1024;

/// For each row the sum of the gradients by value.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GradientSums {
    range: Option<(f32, f32)>,
    rows: Vec<Row>,
    /// Rows of the batch under way, which are the last ones.
    open: usize,
}

impl GradientSums {
    /// Bins of a row: 16 for each level of eight bits.
    pub const BINS: usize = 4096;

    /// Rows that are enough.
    pub const ENOUGH: usize = 256;

    /// For values in this range. Those that lie outside by less than a bin, as rounding may have it, belong to its ends, and all
    /// others do not count. Without a range nothing is kept.
    pub fn new(range: Option<RangeInclusive<f32>>) -> Self {
        let range = range
            .map(RangeInclusive::into_inner)
            .filter(|(lo, hi)| lo < hi && (hi - lo).is_finite() && Self::bins_per_unit(*lo, *hi).is_finite());
        Self { range, ..Self::default() }
    }

    /// What has these rows, as [`range`](Self::range) and [`rows`](Self::rows) tell of them; `None` where they do not fit.
    pub fn from_parts(range: RangeInclusive<f32>, sums: &[f32]) -> Option<Self> {
        let empty = Self::new(Some(range));
        let (rows, rest) = sums.as_chunks();
        let fits = empty.range.is_some() && rest.is_empty();
        fits.then(|| Self { rows: rows.iter().map(Row::of).collect(), ..empty })
    }

    /// The range that bins divide; `None` if nothing is kept.
    pub fn range(&self) -> Option<RangeInclusive<f32>> {
        self.range.map(|(lo, hi)| lo..=hi)
    }

    /// Bins in a unit.
    pub fn bins_per_unit(lo: f32, hi: f32) -> f32 {
        BINS as f32 / (hi - lo)
    }

    /// The bin of a value.
    pub fn bin_of(&self, x: f32) -> usize {
        self.range.map_or(0, |(lo, hi)| usize::from(bin_of(x, lo, Self::bins_per_unit(lo, hi))))
    }

    /// The value that stands for each bin: its middle, but the ends themselves for the first and the last, where a clamp may
    /// have put many values.
    pub fn values(&self) -> Vec<f32> {
        let Some((lo, hi)) = self.range else { return Vec::new() };
        let (first, width) = (f64::from(lo), (f64::from(hi) - f64::from(lo)) / BINS as f64);
        let mut values: Vec<f32> = (0..BINS).map(|bin| (first + width * (bin as f64 + 0.5)) as f32).collect();
        (values[0], values[BINS - 1]) = (lo, hi);
        values
    }

    /// The sums of each row by bin.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Box<[f32; BINS]>> {
        self.rows.iter().map(Row::sums)
    }

    /// Whether no sum is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        // One sum, as NaN and infinities stay.
        self.rows.iter().flat_map(|row| &row.sums).map(|sum| sum * 0.0).sum::<f32>() == 0.0
    }

    /// Begins a batch of so many rows. It keeps nothing of them if there are enough.
    pub fn begin(&mut self, rows: usize) {
        self.open = if self.range.is_none() || self.rows.len() >= Self::ENOUGH { 0 } else { rows };
        self.rows.resize(self.rows.len() + self.open, Row::EMPTY);
    }

    /// Ends the batch: what is observed until the next one begins is not kept.
    pub fn end(&mut self) {
        self.open = 0;
    }

    /// Adds the rows that follow, which came in batches of so many rows: whole batches as long as there are not enough, as if
    /// all had been observed here. Those of another range are left out.
    pub fn append(&mut self, other: &Self, batch_rows: usize) {
        if self.range != other.range {
            return;
        }
        for batch in other.rows.chunks(batch_rows.max(1)) {
            if self.rows.len() >= Self::ENOUGH {
                break;
            }
            self.rows.extend_from_slice(batch);
        }
    }

    /// Adds so many rows without gradients, as [`append`](Self::append) would.
    pub fn append_zeros(&mut self, rows: usize, batch_rows: usize) {
        let mut left = rows;
        while left > 0 && self.range.is_some() && self.rows.len() < Self::ENOUGH {
            let batch = left.min(batch_rows.max(1));
            self.rows.resize(self.rows.len() + batch, Row::EMPTY);
            left -= batch;
        }
    }

    /// Adds each gradient to the bin of its value: to as many rows of the batch as the slices are divided to, which is all or
    /// one. Rows of independent gradients may be taken for one, as their products vanish in expectation.
    ///
    /// `in_parallel` has to call the function that it is given with each number below its first argument, in any order, on
    /// any thread.
    pub fn observe(
        &mut self,
        values: &[f32],
        gradients: &[f32],
        divided: Divided,
        in_parallel: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
    ) {
        let Some((lo, hi)) = self.range.filter(|_| self.open > 0 && !values.is_empty()) else { return };
        let length = match divided {
            Divided::ByRow => values.len() / self.open,
            Divided::Not => values.len(),
        };
        let first = self.rows.len() - self.open;
        let rows = values.chunks(length.max(1)).zip(gradients.chunks(length.max(1)));
        let parts = rows.zip(&mut self.rows[first..]).map(|((values, gradients), row)| {
            Mutex::new(Add { values, gradients, lo, per_unit: Self::bins_per_unit(lo, hi), row })
        });
        let parts: Vec<Mutex<Add<'_>>> = parts.collect();
        in_parallel(parts.len(), &|number| {
            if let Some(part) = parts.get(number) {
                pulp::Arch::new().dispatch(&mut *locked(part));
            }
        });
    }
}

/// The sums of a row, without those that are zero.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    /// A bit for each bin, set where it has a sum.
    filled: [u64; BINS / 64],
    sums: Vec<f32>,
}

impl Row {
    const EMPTY: Self = Self { filled: [0; BINS / 64], sums: Vec::new() };

    fn of(all: &[f32; BINS]) -> Self {
        let is_filled = |sum: &f32| sum.to_bits() != 0;
        let mut filled = [0; BINS / 64];
        for (word, sums) in filled.iter_mut().zip(all.chunks(64)) {
            *word = sums.iter().rev().fold(0, |word, sum| word << 1 | u64::from(is_filled(sum)));
        }
        let mut sums = Vec::with_capacity(filled.iter().map(|word| word.count_ones() as usize).sum());
        sums.extend(all.iter().copied().filter(is_filled));
        Self { filled, sums }
    }

    fn sums(&self) -> Box<[f32; BINS]> {
        let mut all = Box::new([0.0; BINS]);
        let mut own = self.sums.iter();
        for (&word, sums) in self.filled.iter().zip(all.chunks_mut(64)) {
            let mut left = word;
            while left != 0 {
                if let (Some(place), Some(sum)) = (sums.get_mut(left.trailing_zeros() as usize), own.next()) {
                    *place = *sum;
                }
                left &= left - 1;
            }
        }
        all
    }
}

/// Too small and too large become the ends, and NaN the first bin.
#[inline(always)]
fn bin_of(x: f32, lo: f32, per_unit: f32) -> u16 {
    // Not clamp, which leaves NaN.
    let place = ((x - lo) * per_unit).max(0.0).min((BINS - 1) as f32);
    // The last bits of a sum with 2^23 are the integer; a cast would be compiled to one value after the other.
    ((place.floor() + (1u32 << 23) as f32).to_bits() as usize % BINS) as u16
}

/// By a bin and more. NaN is not.
#[inline(always)]
fn is_outside(x: f32, lo: f32, per_unit: f32) -> bool {
    let place = (x - lo) * per_unit;
    (place <= -1.0) | (place >= (BINS + 1) as f32)
}

/// How a batch lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Divided {
    /// One row after the other, equally long.
    ByRow,
    /// Otherwise.
    Not,
}

/// One row of a batch on its way to the sums; a type, because a closure would not be compiled for each set of vector
/// instructions.
struct Add<'a> {
    values: &'a [f32],
    gradients: &'a [f32],
    lo: f32,
    per_unit: f32,
    row: &'a mut Row,
}

impl pulp::NullaryFnOnce for &mut Add<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let mut sums = [0.0f32; BINS + ZEROS];
        let mut bins = [0u16; BLOCK];
        for (values, gradients) in self.values.chunks(BLOCK).zip(self.gradients.chunks(BLOCK)) {
            for (place, (bin, &x)) in bins.iter_mut().zip(values).enumerate() {
                let inside = bin_of(x, self.lo, self.per_unit);
                let is_left_out = x.abs() < f32::MIN_POSITIVE || is_outside(x, self.lo, self.per_unit);
                *bin = if is_left_out { (BINS + place % ZEROS) as u16 } else { inside };
            }
            for (&bin, &gradient) in bins.iter().zip(gradients) {
                if let Some(sum) = sums.get_mut(usize::from(bin)) {
                    *sum += gradient;
                }
            }
        }
        let mut all = self.row.sums();
        for (sum, own) in all.iter_mut().zip(sums) {
            *sum += own;
        }
        *self.row = Row::of(&all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_turn(parts: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..parts).rev().for_each(work);
    }

    /// The sums of a row that are not zero, by the value that stands for the bin, which is near the one that was seen.
    fn row(sums: &GradientSums, row: usize) -> Vec<(f32, f32)> {
        let row = sums.rows().nth(row).expect("a row");
        let near = |x: f32| (x * 100.0).round() / 100.0;
        let values = sums.values().into_iter().map(near);
        values.zip(*row).filter(|(_, sum)| *sum != 0.0).collect()
    }

    #[test]
    fn rows_stay_apart_and_signs_stay() {
        let mut sums = GradientSums::new(Some(-1.0..=3.0));
        sums.begin(2);
        sums.observe(&[1.0, 1.0, 0.0, 1.0, 2.0, 0.0], &[1.0, -3.0, 7.0, 4.0, 5.0, 7.0], Divided::ByRow, in_turn);
        // A second value of the site in the same rows.
        sums.observe(&[2.0, -1.0], &[0.5, 0.25], Divided::ByRow, in_turn);
        sums.begin(1);
        sums.observe(&[3.0], &[1.0], Divided::ByRow, in_turn);
        sums.end();
        sums.observe(&[3.0], &[1.0], Divided::ByRow, in_turn);
        assert_eq!(row(&sums, 0), [(1.0, -2.0), (2.0, 0.5)]);
        assert_eq!(row(&sums, 1), [(-1.0, 0.25), (1.0, 4.0), (2.0, 5.0)]);
        assert_eq!((row(&sums, 2), sums.rows().len()), (vec![(3.0, 1.0)], 3));
    }

    #[test]
    fn what_has_no_rows_goes_to_the_first() {
        let mut sums = GradientSums::new(Some(0.0..=1.0));
        sums.begin(3);
        sums.observe(&[0.5, 0.5, 1.0], &[1.0, 2.0, 3.0], Divided::Not, in_turn);
        assert_eq!(row(&sums, 0), [(0.5, 3.0), (1.0, 3.0)]);
        assert!(row(&sums, 1).is_empty() && row(&sums, 2).is_empty());
    }

    #[test]
    fn values_just_outside_belong_to_the_ends_and_others_to_nothing() {
        let mut sums = GradientSums::new(Some(-1.0..=1.0));
        sums.begin(1);
        let values = [-1.0002, -1.0, 1.0, 1.0002, f32::NAN, 1.001, -1.001, 9.0, f32::NEG_INFINITY];
        sums.observe(&values, &[1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 16.0, 16.0, 16.0], Divided::ByRow, in_turn);
        assert_eq!(row(&sums, 0), [(-1.0, 11.0), (1.0, 7.0)]);
    }

    #[test]
    fn every_bin_has_a_value_of_its_own() {
        let sums = GradientSums::new(Some(-0.7..=2.9));
        let values = sums.values();
        assert_eq!((values.len(), values[0], values[BINS - 1]), (BINS, -0.7, 2.9));
        assert!(values.is_sorted_by(|a, b| a < b));
        assert!((0..BINS).all(|bin| sums.bin_of(values[bin]) == bin));
        let mut sums = GradientSums::new(Some(-0.7..=2.9));
        sums.begin(1);
        sums.observe(&values, &vec![1.0; BINS], Divided::ByRow, in_turn);
        assert!(sums.rows().all(|row| row.iter().all(|sum| *sum == 1.0)));
    }

    #[test]
    fn some_rows_are_enough() {
        let mut sums = GradientSums::new(Some(0.0..=1.0));
        for _ in 0..5 {
            sums.begin(100);
            sums.observe(&[1.0; 100], &[1.0; 100], Divided::ByRow, in_turn);
        }
        assert_eq!(sums.rows().len(), 300);
    }

    #[test]
    fn without_a_range_nothing_is_kept() {
        for range in [None, Some(1.0..=1.0), Some(f32::MIN..=f32::MAX), Some(f32::NAN..=1.0)] {
            let mut sums = GradientSums::new(range);
            sums.begin(2);
            sums.observe(&[1.0, 1.0], &[1.0, 1.0], Divided::ByRow, in_turn);
            assert_eq!((sums.range(), sums.rows().len(), sums.is_finite()), (None, 0, true));
        }
    }

    #[test]
    fn what_is_not_finite_is_told() {
        for gradient in [f32::NAN, f32::INFINITY] {
            let mut sums = GradientSums::new(Some(0.0..=1.0));
            sums.begin(1);
            sums.observe(&[1.0, f32::NAN], &[gradient, 1.0], Divided::ByRow, in_turn);
            assert!(!sums.is_finite());
        }
    }

    #[test]
    fn rows_are_read_again() {
        let mut sums = GradientSums::new(Some(-1.0..=1.0));
        sums.begin(2);
        sums.observe(&[0.5, -0.5], &[1.0, 2.0], Divided::ByRow, in_turn);
        sums.end();
        let stored: Vec<f32> = sums.rows().flat_map(|row| *row).collect();
        let read = GradientSums::from_parts(-1.0..=1.0, &stored).expect("sums");
        assert_eq!((row(&read, 0), row(&read, 1)), (row(&sums, 0), row(&sums, 1)));
        assert_eq!(GradientSums::from_parts(-1.0..=1.0, &stored[1..]), None);
        assert_eq!(GradientSums::from_parts(1.0..=1.0, &stored), None);
    }
}
