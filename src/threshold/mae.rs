//! MAE: the mean of abs(x − q).

use super::closed_form::{ClosedForm, tie_above};
use super::mass::Mass;
use super::values::Loss;

/// abs(x − q).
#[derive(Debug, Clone, Copy)]
pub(super) struct Absolute;

impl Loss for Absolute {
    fn exponent(self) -> u8 {
        1
    }

    #[inline(always)]
    fn lanes<const N: usize>(self, errors: &mut [f32; N]) {
        for error in errors {
            *error = error.abs();
        }
    }

    fn of(self, error: f64) -> f64 {
        error.abs()
    }
}

/// As a function of the magnitude x the error rises from each level and falls from each tie between two, so that it is
/// x − 2 Σ_j (max(x − (j + ½)s, 0) − max(x − (j + 1)s, 0)), the sum going over all levels below the last.
impl ClosedForm for Absolute {
    fn of_zero(self, mass: &Mass) -> f64 {
        mass.sum()
    }

    #[inline]
    fn saved(self, mass: &Mass, level: u32, scale: f64) -> f64 {
        2.0 * (mass.excess(tie_above(level, scale)) - mass.excess(f64::from(level + 1) * scale))
    }

    fn beyond(self, mass: &Mass, end: f64) -> f64 {
        mass.excess(end)
    }
}
