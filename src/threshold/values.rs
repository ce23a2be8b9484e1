//! Raw values as sides of a search. It refuses to know which loss is summed, and how a scale is chosen.
//!
//! Everything is counted in a unit, a power of two near NOCLIPPING's scale, so that no power of an error can overflow or
//! vanish, and so that scaling the data by a power of two changes nothing but the unit.

use rayon::prelude::*;

use super::moments::{Moments, nearest_level};
use super::search::{Effort, Side, Sides};

/// Values taken at a time; lists are padded with zeros, which cost nothing, to whole groups.
pub(super) const LANES: usize = 16;

/// Groups summed in `f32` before the sum goes on in `f64`.
const GROUPS_PER_BLOCK: usize = 32;

/// Groups worth a thread of their own, in whole blocks.
const GROUPS_PER_TASK: usize = GROUPS_PER_BLOCK * 64;

/// 1.5 · 2^23: an `f32` of magnitude up to 2^22 added to this loses exactly its fraction, half to even.
const ROUNDER: f32 = 12_582_912.0;

/// Levels beyond which nothing has to be rounded: more than any grid has.
pub(super) const UNCLIPPED: f32 = (1 << 22) as f32;

/// abs(x − q)^p for one p.
pub(super) trait Loss: Copy + Sync {
    /// p.
    fn exponent(self) -> u8;

    /// What the errors that `lanes` takes are multiplied with beforehand, so that their powers do not vanish in `f32`.
    fn lane_factor(self) -> f32 {
        1.0
    }

    /// The losses of these errors, in place.
    fn lanes<const N: usize>(self, errors: &mut [f32; N]);

    /// The loss of one error.
    fn of(self, error: f64) -> f64;
}

/// Magnitudes of one sign.
pub(super) struct Values<L> {
    loss: L,
    /// In units, padded; descending if the grid is uniform.
    magnitudes: Vec<f32>,
    /// Units in 1.
    per_unit: f64,
}

impl<L: Loss> Values<L> {
    /// Both sides of these values; sorted if `errors` will be asked for.
    pub(super) fn sides(values: &[f32], loss: L, unit: f64, sorted: bool) -> Sides<Self> {
        let per_unit = 1.0 / unit;
        let side = |is_negative: bool| {
            let belongs = |x: &f32| if is_negative { *x < 0.0 } else { *x > 0.0 };
            let in_units = |x: &f32| (f64::from(x.abs()) * per_unit) as f32;
            let mut magnitudes: Vec<f32> = values.iter().filter(|x| belongs(x)).map(in_units).collect();
            if sorted {
                magnitudes.sort_unstable_by(|a, b| b.total_cmp(a));
            }
            magnitudes.resize(magnitudes.len().next_multiple_of(LANES), 0.0);
            Self { loss, magnitudes, per_unit }
        };
        Sides { negative: side(true), positive: side(false) }
    }

    /// Sum of the losses in level units.
    fn sum(&self, term: Term) -> f64 {
        let sum = |groups: &[[f32; LANES]]| pulp::Arch::new().dispatch(Sum { loss: self.loss, groups, term });
        in_tasks(self.magnitudes.as_chunks().0, sum)
    }

    fn power(&self, scale: f64) -> f64 {
        (scale / f64::from(self.loss.lane_factor())).powi(i32::from(self.loss.exponent()))
    }

    /// The error without any clipping.
    fn unclipped(&self, scale: f64) -> f64 {
        self.sum(Term::Rounded { inverse: (1.0 / scale) as f32, last: UNCLIPPED }) * self.power(scale)
    }
}

/// The effort for raw values: equal ones make as much noise as one of them, the more so the more of all they are, and zeros
/// make none.
pub(super) fn effort(exponent: u8, values: &[f32]) -> Effort {
    // As bits, magnitudes ascend as they do themselves, and are quicker to sort.
    let mut magnitudes: Vec<u32> = values.iter().map(|x| x.abs().to_bits()).filter(|&bits| bits > 0).collect();
    magnitudes.sort_unstable();
    let counts = magnitudes.chunk_by(|a, b| a == b).map(|equal| equal.len() as f64);
    Effort::for_noise(exponent, equal_parts(counts))
}

/// How many equal parts would have the same Σ part² / (Σ part)².
pub(super) fn equal_parts(parts: impl Iterator<Item = f64>) -> f64 {
    let (sum, squares) = parts.fold((0.0, 0.0), |(sum, squares), part| (sum + part, squares + part * part));
    if sum > 0.0 { sum * sum / squares } else { 0.0 }
}

impl<L: Loss> Side for Values<L> {
    fn error(&self, scale: f64, levels: u32) -> f64 {
        let scale = scale * self.per_unit;
        self.sum(Term::Rounded { inverse: (1.0 / scale) as f32, last: levels as f32 }) * self.power(scale)
    }

    fn errors(&self, scale: f64, levels: std::ops::RangeInclusive<u32>, limit: f64, errors: &mut Vec<f64>) {
        let scale = scale * self.per_unit;
        let values = self.magnitudes.iter().map(|&x| (f64::from(x), 1.0));
        errors_by_level(self.loss, self.unclipped(scale), values, scale, levels, limit, errors);
    }

    fn clipping(&self, end: f64) -> f64 {
        self.sum(Term::Beyond { end: (end * self.per_unit) as f32 }) * self.power(1.0)
    }

    fn greatest(&self) -> f64 {
        f64::from(self.magnitudes.iter().copied().fold(0.0, f32::max)) / self.per_unit
    }
}

/// The errors of [`Side::errors`]: from the error without any clipping, and from the values by descending magnitude with the
/// weight of each, as far as they are clipped.
pub(super) fn errors_by_level(
    loss: impl Loss,
    unclipped: f64,
    values: impl Iterator<Item = (f64, f64)>,
    scale: f64,
    levels: std::ops::RangeInclusive<u32>,
    limit: f64,
    errors: &mut Vec<f64>,
) {
    errors.clear();
    let mut inside = unclipped;
    let mut outside = Moments::new(loss.exponent());
    let mut rest = values.peekable();
    for last in levels.rev() {
        let end = scale * f64::from(last);
        while let Some((x, weight)) = rest.next_if(|(x, _)| nearest_level(x / scale) > f64::from(last)) {
            inside -= weight * loss.of(x - nearest_level(x / scale) * scale);
            outside.add_point(weight, x - end);
        }
        let clipping = outside.highest();
        if clipping > limit {
            return;
        }
        errors.push(inside.max(0.0) + clipping);
        outside.shift(scale);
    }
}

/// What is summed over the magnitudes.
#[derive(Clone, Copy)]
pub(super) enum Term {
    /// The loss of the distance to the nearest of the levels 0, 1, … `last`, in level units.
    Rounded { inverse: f32, last: f32 },
    /// The loss of the part beyond `end`.
    Beyond { end: f32 },
}

/// The distance of a magnitude to the nearest of the levels 0, 1, … `last`, in level units.
#[inline(always)]
pub(super) fn rounded(x: f32, inverse: f32, last: f32) -> f32 {
    let y = x * inverse;
    let clamped = if y < last { y } else { last };
    y - ((clamped + ROUNDER) - ROUNDER)
}

/// The part of a magnitude beyond `end`.
#[inline(always)]
pub(super) fn beyond(x: f32, end: f32) -> f32 {
    if x > end { x - end } else { 0.0 }
}

/// The sum over all groups, in parallel if they are many, in their order however many threads there are.
pub(super) fn in_tasks<G: Sync>(groups: &[G], sum: impl Fn(&[G]) -> f64 + Send + Sync) -> f64 {
    if groups.len() <= GROUPS_PER_TASK {
        return sum(groups);
    }
    let sums: Vec<f64> = groups.par_chunks(GROUPS_PER_TASK).map(sum).collect();
    sums.iter().sum()
}

/// The sum of the losses of all groups: in `f32` within a block of groups, in `f64` over blocks.
#[inline(always)]
pub(super) fn in_blocks<G>(groups: &[G], losses: impl Fn(&G) -> [f32; LANES]) -> f64 {
    let mut total = 0.0;
    for block in groups.chunks(GROUPS_PER_BLOCK) {
        let mut sums = [0.0f32; LANES];
        for group in block {
            for (sum, loss) in sums.iter_mut().zip(losses(group)) {
                *sum += loss;
            }
        }
        total += sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
    }
    total
}

/// A type, because a closure would not be compiled for each set of vector instructions.
struct Sum<'a, L> {
    loss: L,
    groups: &'a [[f32; LANES]],
    term: Term,
}

impl<L: Loss> pulp::NullaryFnOnce for Sum<'_, L> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        match self.term {
            Term::Rounded { inverse, last } => self.over(
                #[inline(always)]
                |x| rounded(x, inverse, last),
            ),
            Term::Beyond { end } => self.over(
                #[inline(always)]
                |x| beyond(x, end),
            ),
        }
    }
}

impl<L: Loss> Sum<'_, L> {
    #[inline(always)]
    fn over(&self, error: impl Fn(f32) -> f32) -> f64 {
        let factor = self.loss.lane_factor();
        in_blocks(
            self.groups,
            #[inline(always)]
            |group| {
                let mut errors = [0.0f32; LANES];
                for (place, &x) in errors.iter_mut().zip(group) {
                    *place = error(x) * factor;
                }
                self.loss.lanes(&mut errors);
                errors
            },
        )
    }
}
