//! Which elements of a large activation are looked at: blocks spread over each row, others for each probe. It knows rows and
//! numbers of elements, not what is done with them.
//!
//! An image's activation has a hundred thousand elements and more, whose scores are as noisy as their probes however many are
//! summed up, while reading them all costs as much as half of a way back. One block in k with a random start, its scores
//! times k, has the same expectation. k is a power of four, so that its root, which gradients are multiplied with, is exact.

use std::ops::Range;

use crate::random::SplitMix64;

/// Neighbours that are looked at together.
const BLOCK: usize = 1024;

/// Elements of a row that are enough for the first probe.
const ENOUGH: usize = 1 << 15;

/// Elements of a row that are enough for each further probe, which tells mainly what is random about a probe.
const ENOUGH_MORE: usize = 1 << 13;

/// How the rows of an activation are thinned out in one probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct Thinning {
    row_length: usize,
    /// The root of k.
    root: usize,
}

/// What an offset is drawn for: each site, row and probe has one of its own, so that it does not depend on batches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draw {
    pub(super) seed: u64,
    pub(super) site: u64,
    pub(super) first_row: usize,
    pub(super) probe: usize,
}

impl Thinning {
    pub(super) fn new(row_length: usize, probe: usize) -> Self {
        let enough = if probe == 0 { ENOUGH } else { ENOUGH_MORE };
        let mut root = 1;
        while row_length / (root * root) > enough {
            root *= 2;
        }
        Self { row_length, root }
    }

    /// Whether anything is left out.
    pub(super) fn is_needed(self) -> bool {
        self.root > 1
    }

    /// Elements of a row.
    pub(super) fn row_length(self) -> usize {
        self.row_length
    }

    /// What the gradients that are looked at count for.
    pub(super) fn root(self) -> usize {
        self.root
    }

    /// The ranges of elements to look at in row number `row` of `draw`, counted from the start of the first row.
    pub(super) fn ranges(self, draw: Draw, row: usize) -> impl Iterator<Item = Range<usize>> {
        let step = self.root * self.root;
        let Draw { seed, site, first_row, probe } = draw;
        let mut stream = SplitMix64::of(&[seed, site, (first_row + row) as u64, probe as u64]);
        let offset = stream.below(step as u64) as usize;
        let start = row * self.row_length;
        let end = start + self.row_length;
        (offset..self.row_length.div_ceil(BLOCK)).step_by(step).map(move |block| {
            let from = start + block * BLOCK;
            from..(from + BLOCK).min(end)
        })
    }

    /// The values to look at and their gradients times the root of k, into vectors that are kept to be filled again. The
    /// slices hold whole rows, one after the other.
    pub(super) fn collect(self, draw: Draw, values: &[f32], gradients: &[f32], kept: &mut [Vec<f32>; 2]) {
        let [kept_values, kept_gradients] = kept;
        kept_values.clear();
        kept_gradients.clear();
        let root = self.root as f32;
        for range in (0..values.len() / self.row_length).flat_map(|row| self.ranges(draw, row)) {
            let (Some(values), Some(gradients)) = (values.get(range.clone()), gradients.get(range)) else { continue };
            kept_values.extend_from_slice(values);
            kept_gradients.extend(gradients.iter().map(|gradient| gradient * root));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAW: Draw = Draw { seed: 1, site: 2, first_row: 3, probe: 4 };

    #[test]
    fn small_rows_are_whole() {
        for length in [1, BLOCK, ENOUGH] {
            assert!(!Thinning::new(length, 0).is_needed());
        }
        let roots = [(ENOUGH + 1, [2, 2]), (4 * ENOUGH, [2, 4]), (4 * ENOUGH + 4, [4, 4]), (40 * ENOUGH, [8, 16])];
        for (length, roots) in roots {
            assert_eq!([0, 1].map(|probe| Thinning::new(length, probe).root), roots, "{length}");
        }
    }

    /// The mean over all offsets is the sum of all elements.
    #[test]
    fn every_block_is_as_likely() {
        let thinning = Thinning::new(3 * ENOUGH + 77, 0);
        let mut counts = vec![0; thinning.row_length];
        let draws = 4000;
        for probe in 0..draws {
            for range in thinning.ranges(Draw { probe, ..DRAW }, 0) {
                counts[range].iter_mut().for_each(|count| *count += 1);
            }
        }
        // Six standard deviations of a binomial with p = 1/4 are 164.
        assert!(counts.iter().all(|count: &i32| (count - 1000).abs() < 164));
    }

    #[test]
    fn rows_have_offsets_of_their_own_whatever_batch_they_are_in() {
        let thinning = Thinning::new(5 * ENOUGH, 0);
        let of = |first_row, row| -> Vec<Range<usize>> {
            let start = row * thinning.row_length;
            let ranges = thinning.ranges(Draw { first_row, ..DRAW }, row);
            ranges.map(|range| range.start - start..range.end - start).collect()
        };
        assert_eq!(of(0, 7), of(7, 0));
        assert!((0..20).any(|row| of(0, row) != of(0, row + 1)));
    }

    #[test]
    fn gradients_are_weighted() {
        let thinning = Thinning::new(2 * ENOUGH, 0);
        let values: Vec<f32> = (0..4 * ENOUGH).map(|index| index as f32).collect();
        let gradients: Vec<f32> = values.iter().map(|x| -x).collect();
        let mut kept = [vec![9.0], vec![9.0]];
        thinning.collect(DRAW, &values, &gradients, &mut kept);
        assert_eq!(kept[0].len(), ENOUGH);
        assert!(kept[0].iter().zip(&kept[1]).all(|(x, gradient)| *gradient == -2.0 * x));
        let rows = kept[0].iter().map(|x| (*x as usize) / (2 * ENOUGH));
        assert_eq!(rows.filter(|row| *row == 1).count(), ENOUGH / 2);
    }
}
