//! MSE: the mean of (x − q)².

use super::closed_form::{ClosedForm, tie_above};
use super::mass::Mass;
use super::values::Loss;

/// (x − q)².
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

/// With q = s · #{j: x > (j + ½)s}, the error of the magnitude x is x² − 2s Σ_j max(x − (j + ½)s, 0), the sum going over
/// all levels below the last.
impl ClosedForm for Square {
    fn of_zero(self, mass: &Mass) -> f64 {
        mass.squares()
    }

    #[inline]
    fn saved(self, mass: &Mass, level: u32, scale: f64) -> f64 {
        2.0 * scale * mass.excess(tie_above(level, scale))
    }

    fn beyond(self, mass: &Mass, end: f64) -> f64 {
        mass.squared_excess(end)
    }
}
