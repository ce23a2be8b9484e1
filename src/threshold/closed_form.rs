//! The histogram side of losses whose error is a sum of one term for each level, so that a scale costs one or two lookups
//! per level however many values there are.

use super::mass::{Mass, from_the_last};
use super::search::Side;
use crate::statistics::Bin;

/// The error of a histogram in closed form.
pub(super) trait ClosedForm: Copy {
    /// The error if all magnitudes become 0.
    fn of_zero(self, mass: &Mass) -> f64;

    /// How much the error falls when the level `level` + 1 is added to those from 0 to `level`.
    fn saved(self, mass: &Mass, level: u32, scale: f64) -> f64;

    /// What the magnitudes beyond `end` cost if they become `end`.
    fn beyond(self, mass: &Mass, end: f64) -> f64;
}

/// The magnitudes of one sign of a histogram under a loss in closed form.
#[derive(Debug)]
pub(super) struct Closed<F> {
    pub(super) form: F,
    pub(super) mass: Mass,
}

impl<F: ClosedForm> Closed<F> {
    /// Of these bins, in a unit that is a power of two.
    pub(super) fn new(form: F, bins: &[Bin], unit: f64) -> Self {
        Self { form, mass: Mass::new(bins, unit) }
    }

    /// Calls with the error for each last level from 0 to `last`, or to the first that clips nothing.
    #[inline]
    fn for_each(&self, scale: f64, last: u32, mut visit: impl FnMut(f64)) {
        let mut error = self.form.of_zero(&self.mass);
        visit(error);
        for level in 0..last {
            if tie_above(level, scale) >= self.mass.greatest() {
                break;
            }
            error -= self.form.saved(&self.mass, level, scale);
            visit(error);
        }
    }
}

impl<F: ClosedForm> Side for Closed<F> {
    fn error(&self, scale: f64, levels: u32) -> f64 {
        let mut last = 0.0;
        self.for_each(scale * self.mass.per_unit, levels, |error| last = error);
        f64::max(last, 0.0)
    }

    fn errors(&self, scale: f64, levels: std::ops::RangeInclusive<u32>, limit: f64, errors: &mut Vec<f64>) {
        let mut by_level = Vec::with_capacity(*levels.end() as usize + 1);
        self.for_each(scale * self.mass.per_unit, *levels.end(), |error| by_level.push(error));
        from_the_last(self, scale, levels, limit, &by_level, errors);
    }

    fn clipping(&self, end: f64) -> f64 {
        self.form.beyond(&self.mass, end * self.mass.per_unit)
    }

    fn greatest(&self) -> f64 {
        self.mass.greatest() / self.mass.per_unit
    }
}

/// The magnitude between a level and the next.
#[inline]
pub(super) fn tie_above(level: u32, scale: f64) -> f64 {
    (f64::from(level) + 0.5) * scale
}
