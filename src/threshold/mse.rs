//! MSE: the mean of (x − q)².

use super::mass::{Mass, from_the_last};
use super::search::Side;
use super::values::Loss;

/// (x − q)² of raw values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Square;

impl Loss for Square {
    fn exponent(self) -> u8 {
        2
    }

    #[inline(always)]
    fn lanes<const N: usize>(self, errors: &mut [f32; N]) {
        for error in errors {
            *error *= *error;
        }
    }

    fn of(self, error: f64) -> f64 {
        error * error
    }
}

/// (x − q)² of a histogram.
///
/// With q = s · #{j: x > (j + ½)s}, the error of the magnitude x is x² − 2s Σ_j max(x − (j + ½)s, 0), the sum going over
/// all levels below the last: so the sum over all values takes one lookup for each level.
#[derive(Debug)]
pub(super) struct Squares(pub(super) Mass);

impl Squares {
    /// Calls with the error for each last level from 0 to `last`, or to the first that clips nothing.
    #[inline]
    fn for_each(&self, scale: f64, last: u32, mut visit: impl FnMut(f64)) {
        let mut error = self.0.squares();
        visit(error);
        for level in 0..last {
            let tie = (f64::from(level) + 0.5) * scale;
            if tie >= self.0.greatest() {
                break;
            }
            error -= 2.0 * scale * self.0.excess(tie);
            visit(error);
        }
    }
}

impl Side for Squares {
    fn error(&self, scale: f64, levels: u32) -> f64 {
        let mut last = 0.0;
        self.for_each(scale * self.0.per_unit, levels, |error| last = error);
        f64::max(last, 0.0)
    }

    fn errors(&self, scale: f64, levels: std::ops::RangeInclusive<u32>, limit: f64, errors: &mut Vec<f64>) {
        let mut by_level = Vec::with_capacity(*levels.end() as usize + 1);
        self.for_each(scale * self.0.per_unit, *levels.end(), |error| by_level.push(error));
        from_the_last(self, scale, levels, limit, &by_level, errors);
    }

    fn clipping(&self, end: f64) -> f64 {
        self.0.squared_excess(end * self.0.per_unit)
    }

    fn greatest(&self) -> f64 {
        self.0.greatest() / self.0.per_unit
    }
}
