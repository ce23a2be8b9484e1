//! Which rows of a data set are used, and in what order. Knows numbers only, no file.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::ops::Range;

use crate::random::SplitMix64;

/// The chosen rows, ascending so that a file is read forwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Rows {
    /// The first rows; takes no memory, however many.
    First(usize),
    /// Rows drawn by seed.
    Drawn(Vec<usize>),
}

impl Rows {
    /// The first `samples` of `total` rows, or as many drawn without replacement where there is a `seed`; `samples` is
    /// at most `total`.
    pub(super) fn choose(total: usize, samples: Option<NonZeroUsize>, seed: Option<u64>) -> Self {
        let samples = samples.map_or(total, NonZeroUsize::get).min(total);
        match seed {
            Some(seed) if samples < total => Self::Drawn(draw(total, samples, seed)),
            _ => Self::First(samples),
        }
    }

    /// So many of these drawn without replacement; all of them if that is not fewer.
    pub(super) fn sample(&self, samples: NonZeroUsize, seed: u64) -> Self {
        match Self::choose(self.len(), Some(samples), Some(seed)) {
            Self::Drawn(positions) => {
                Self::Drawn(positions.into_iter().flat_map(|position| self.at(position..position + 1)).collect())
            }
            Self::First(_) => self.clone(),
        }
    }

    /// As many of the others, or all of them if there are no more.
    pub(super) fn others(&self, samples: NonZeroUsize, seed: u64) -> Self {
        let drawn = self.sample(samples, seed);
        let drawn: BTreeSet<usize> = drawn.at(0..drawn.len()).collect();
        let others = self.at(0..self.len()).filter(|row| !drawn.contains(row));
        Self::Drawn(others.collect()).sample(samples, seed)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::First(count) => *count,
            Self::Drawn(rows) => rows.len(),
        }
    }

    /// The rows of the data set at `positions` among the chosen ones; positions beyond the last have none.
    pub(super) fn at(&self, positions: Range<usize>) -> impl Iterator<Item = usize> {
        positions.filter_map(|position| match self {
            Self::First(count) => (position < *count).then_some(position),
            Self::Drawn(rows) => rows.get(position).copied(),
        })
    }

    /// The same rows as [`at`](Self::at), neighbours joined.
    pub(super) fn runs(&self, positions: Range<usize>) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for row in self.at(positions) {
            match runs.last_mut() {
                Some(run) if run.end == row => run.end += 1,
                _ => runs.push(row..row + 1),
            }
        }
        runs
    }
}

/// `samples` of `total` numbers, ascending, each set equally likely: algorithm S of Knuth, The Art of Computer
/// Programming, volume 2, section 3.4.2.
fn draw(total: usize, samples: usize, seed: u64) -> Vec<usize> {
    let mut generator = SplitMix64::new(seed);
    let mut drawn = Vec::with_capacity(samples);
    for row in 0..total {
        if generator.below((total - row) as u64) < (samples - drawn.len()) as u64 {
            drawn.push(row);
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_rows_and_all_rows() {
        assert_eq!(Rows::choose(5, NonZeroUsize::new(3), None), Rows::First(3));
        assert_eq!(Rows::choose(5, None, None), Rows::First(5));
        assert_eq!(Rows::choose(5, NonZeroUsize::new(5), Some(1)), Rows::First(5));
        assert_eq!(Rows::First(5).runs(3..9).first(), Some(&(3..5)));
    }

    #[test]
    fn neighbours_are_joined() {
        assert_eq!(Rows::Drawn(vec![0, 1, 3, 7, 8, 9]).runs(1..5), [1..2, 3..4, 7..9]);
    }

    #[test]
    fn samples_are_among_the_rows() {
        let rows = Rows::Drawn(vec![2, 3, 5, 7, 11, 13]);
        let Rows::Drawn(sample) = rows.sample(NonZeroUsize::new(3).unwrap(), 7) else { panic!("expected a draw") };
        assert_eq!(sample.len(), 3);
        assert!(sample.is_sorted_by(|a, b| a < b) && sample.iter().all(|row| [2, 3, 5, 7, 11, 13].contains(row)));
        assert_eq!(rows.sample(NonZeroUsize::new(6).unwrap(), 7), rows);
        assert_eq!(Rows::First(4).sample(NonZeroUsize::new(9).unwrap(), 7), Rows::First(4));
    }

    #[test]
    fn others_are_no_samples() {
        let of = |rows: &Rows| rows.at(0..rows.len()).collect::<Vec<_>>();
        for (samples, expected) in [(2, 2), (4, 2), (6, 0)] {
            let (rows, samples) = (Rows::Drawn(vec![2, 3, 5, 7, 11, 13]), NonZeroUsize::new(samples).unwrap());
            let (drawn, others) = (of(&rows.sample(samples, 7)), of(&rows.others(samples, 7)));
            assert_eq!(others.len(), expected);
            assert!(others.iter().all(|row| !drawn.contains(row) && of(&rows).contains(row)), "{drawn:?} {others:?}");
        }
        assert_eq!(Rows::First(4).others(NonZeroUsize::new(9).unwrap(), 7).len(), 0);
    }

    #[test]
    fn draws_are_ascending_repeatable_and_even() {
        let mut counts = [0u32; 10];
        for seed in 0..4000 {
            let drawn = draw(10, 3, seed);
            assert_eq!(drawn.len(), 3);
            assert!(drawn.is_sorted_by(|a, b| a < b), "{drawn:?}");
            assert_eq!(drawn, draw(10, 3, seed));
            for row in drawn {
                counts[row] += 1;
            }
        }
        // 1200 expected each; six standard deviations of a binomial with p = 0.3 are 174.
        assert!(counts.iter().all(|count| count.abs_diff(1200) < 174), "{counts:?}");
    }
}
