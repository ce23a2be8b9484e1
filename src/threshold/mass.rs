//! The values of one sign of a histogram as mass spread evenly within bins, and what of it lies beyond a point. It refuses
//! to know levels and losses.

use super::search::Side;
use crate::statistics::Bin;

/// Bits of an `f64` that do not tell the bin of an `f32` histogram.
const DROPPED_BITS: u32 = 42;

/// Mass by magnitude, in a unit that is a power of two.
#[derive(Debug)]
pub(super) struct Mass {
    /// From each bin to the last one; one more entry, of nothing.
    beyond: Vec<Beyond>,
    /// Number of the first bin.
    first: u64,
    least: f64,
    /// Where the last bin begins, which may be its end.
    last: f64,
    greatest: f64,
    pub(super) per_unit: f64,
}

/// Sums over all bins from one on.
#[derive(Debug, Clone, Copy, Default)]
struct Beyond {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Mass {
    pub(super) fn new(bins: &[Bin], unit: f64) -> Self {
        let per_unit = 1.0 / unit;
        let (Some(first_bin), Some(last_bin)) = (bins.first(), bins.last()) else {
            return Self { beyond: vec![Beyond::default()], first: 0, least: 0.0, last: 0.0, greatest: 0.0, per_unit };
        };
        let [least, last, greatest] = [first_bin.lo, last_bin.lo, last_bin.hi].map(|x| x * per_unit);
        let first = number(least);
        // A last bin may end where the next would begin.
        let count = (number(last) - first) as usize + 1;
        let mut beyond = vec![Beyond::default(); count + 1];
        for bin in bins {
            let (lo, hi, mass) = (bin.lo * per_unit, bin.hi * per_unit, bin.mass);
            let own = Beyond {
                count: mass,
                sum: mass * (lo + hi) / 2.0,
                squares: mass * (lo * lo + lo * hi + hi * hi) / 3.0,
            };
            if let Some(place) = beyond.get_mut((number(lo) - first) as usize) {
                *place = own;
            }
        }
        for index in (0..count).rev() {
            let next = beyond[index + 1];
            beyond[index].count += next.count;
            beyond[index].sum += next.sum;
            beyond[index].squares += next.squares;
        }
        Self { beyond, first, least, last, greatest, per_unit }
    }

    /// The greatest magnitude, in units.
    pub(super) fn greatest(&self) -> f64 {
        self.greatest
    }

    /// Σ x.
    pub(super) fn sum(&self) -> f64 {
        self.beyond[0].sum
    }

    /// Σ x².
    pub(super) fn squares(&self) -> f64 {
        self.beyond[0].squares
    }

    /// How many magnitudes lie beyond `t`.
    pub(super) fn count_beyond(&self, t: f64) -> f64 {
        self.parts(t).map_or(0.0, |(beyond, inside)| beyond.count + inside.count)
    }

    /// Σ (x − t) over the magnitudes beyond `t`.
    #[inline]
    pub(super) fn excess(&self, t: f64) -> f64 {
        let Some((beyond, inside)) = self.parts(t) else { return 0.0 };
        (beyond.sum - t * beyond.count) + inside.sum
    }

    /// Σ (x − t)² over the magnitudes beyond `t`.
    pub(super) fn squared_excess(&self, t: f64) -> f64 {
        let Some((beyond, inside)) = self.parts(t) else { return 0.0 };
        (beyond.squares - t * (2.0 * beyond.sum - t * beyond.count)).max(0.0) + inside.squares
    }

    /// The bins beyond that of `t`, and of its own bin Σ 1, Σ (x − t) and Σ (x − t)² of what lies beyond `t`; `None` if
    /// nothing does.
    #[inline]
    fn parts(&self, t: f64) -> Option<(Beyond, Beyond)> {
        if t >= self.greatest {
            return None;
        }
        if t <= self.least {
            return Some((self.beyond[0], Beyond::default()));
        }
        let index = (number(t) - self.first) as usize;
        let (own, next) = (self.beyond.get(index)?, self.beyond.get(index + 1)?);
        let is_last = index + 2 == self.beyond.len();
        let lo = if is_last { self.last } else { edge(self.first + index as u64).max(self.least) };
        if t <= lo {
            return Some((*own, Beyond::default()));
        }
        let hi = edge(self.first + index as u64 + 1).min(self.greatest);
        let (width, part) = (hi - lo, hi - t);
        let count = (own.count - next.count) * part / width;
        Some((*next, Beyond { count, sum: count * part / 2.0, squares: count * part * part / 3.0 }))
    }
}

/// The bin of a positive number.
#[inline]
fn number(x: f64) -> u64 {
    x.to_bits() >> DROPPED_BITS
}

/// Where a bin begins.
#[inline]
fn edge(number: u64) -> f64 {
    f64::from_bits(number << DROPPED_BITS)
}

/// Answers [`Side::errors`] from the errors for each last level from 0 on, the last of which clips nothing or belongs to
/// the end of `levels`.
pub(super) fn from_the_last<S: Side>(
    side: &S,
    scale: f64,
    levels: std::ops::RangeInclusive<u32>,
    limit: f64,
    by_level: &[f64],
    errors: &mut Vec<f64>,
) {
    errors.clear();
    let unclipped = by_level.last().copied().unwrap_or_default();
    for last in levels.rev() {
        if limit.is_finite() && side.clipping(scale * f64::from(last)) > limit {
            return;
        }
        errors.push(by_level.get(last as usize).copied().unwrap_or(unclipped).max(0.0));
    }
}
