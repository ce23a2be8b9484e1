//! Moments of what lies beyond a point, as the point moves inward: sums of positive terms alone, so that nothing cancels.

/// The largest exponent of a loss.
const HIGHEST: usize = super::Exponent::MAX as usize;

/// Σ d^k for k from 0 to p, d being the distance of each value beyond the point.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moments {
    sums: [f64; HIGHEST + 1],
    exponent: usize,
}

impl Moments {
    /// Of nothing, up to this exponent p.
    pub(super) fn new(exponent: u8) -> Self {
        Self { sums: [0.0; HIGHEST + 1], exponent: usize::from(exponent).min(HIGHEST) }
    }

    /// Σ d^p.
    pub(super) fn highest(&self) -> f64 {
        self.sums[self.exponent]
    }

    /// All sums, that of d^0 first.
    pub(super) fn sums(&self) -> &[f64] {
        &self.sums[..=self.exponent]
    }

    /// A value of this mass at this distance.
    pub(super) fn add_point(&mut self, mass: f64, distance: f64) {
        let mut power = mass;
        for sum in &mut self.sums[..=self.exponent] {
            *sum += power;
            power *= distance;
        }
    }

    /// `mass` spread evenly between the point and this distance.
    pub(super) fn add_even(&mut self, mass: f64, distance: f64) {
        let mut power = mass;
        for (k, sum) in self.sums[..=self.exponent].iter_mut().enumerate() {
            *sum += power / (k + 1) as f64;
            power *= distance;
        }
    }

    /// Moves the point inward: by the binomial theorem, one factor at a time.
    pub(super) fn shift(&mut self, distance: f64) {
        for pass in 1..=self.exponent {
            for k in (pass..=self.exponent).rev() {
                self.sums[k] += distance * self.sums[k - 1];
            }
        }
    }
}

/// The nearest whole number, half to even, of a magnitude below 2^51. `f64::round_ties_even` is a call of a function on
/// processors that the compiler knows nothing of.
#[inline(always)]
pub(super) fn nearest_level(x: f64) -> f64 {
    const ROUNDER: f64 = 1.5 * (1u64 << 52) as f64;
    (x + ROUNDER) - ROUNDER
}

/// Mean of v^p over v from `a` to `b`, both not negative.
pub(super) fn mean_power(a: f64, b: f64, exponent: usize) -> f64 {
    let (mut sum, mut power) = (1.0, 1.0);
    for _ in 0..exponent {
        power *= b;
        sum = sum * a + power;
    }
    sum / (exponent + 1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifting_equals_adding_from_farther_away() {
        let (mut moved, mut direct) = (Moments::new(5), Moments::new(5));
        for distance in [0.25, 1.0, 3.5] {
            moved.add_point(1.0, distance);
            direct.add_point(1.0, distance + 0.5);
        }
        moved.shift(0.5);
        for (a, b) in moved.sums().iter().zip(direct.sums()) {
            assert!((a - b).abs() <= 1e-12 * b, "{a} {b}");
        }
        assert_eq!(direct.highest(), 0.75f64.powi(5) + 1.5f64.powi(5) + 4f64.powi(5));
    }

    #[test]
    fn rounds_half_to_even() {
        for x in [0.0, 0.5, 0.49999999999999994, 1.5, 2.5, 1e9 + 0.5, 65535.5, 0.3] {
            assert_eq!(nearest_level(x), x.round_ties_even(), "{x}");
        }
    }

    #[test]
    fn spread_evenly() {
        let mut even = Moments::new(3);
        even.add_even(6.0, 2.0);
        assert_eq!(even.sums(), [6.0, 6.0, 8.0, 12.0]);
        assert_eq!(mean_power(0.0, 2.0, 3), 2.0);
        assert_eq!(mean_power(1.0, 2.0, 2), 7.0 / 3.0);
        assert_eq!(mean_power(3.0, 3.0, 4), 81.0);
    }
}
