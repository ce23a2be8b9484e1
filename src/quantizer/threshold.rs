//! How a search says what it chose, and the quantizer that this really gives. It refuses to know how to choose.
//!
//! Thresholds are `f64`: for data near the largest `f32` a threshold can lie beyond it while the scale does not, and
//! in `f64` the snapped threshold of a quantizer is exact.

use super::{Bits, Levels, MIN_SCALE, QuantParams};

/// A closed interval of values, in the unit of the data.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

impl Range {
    /// Whether `x` lies in it, ends included; a NaN does not.
    pub fn contains(self, x: f64) -> bool {
        self.lo <= x && x <= self.hi
    }

    /// The smallest range that contains this one and zero.
    pub fn with_zero(self) -> Self {
        Self { lo: self.lo.min(0.0), hi: self.hi.max(0.0) }
    }
}

/// What a search chooses for one tensor or channel; with the [`Bits`] it determines the [`QuantParams`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    /// Symmetric for values of both signs: T > 0, scale `T / 2^(b−1)`, levels −2^(b−1) … 2^(b−1)−1.
    Signed(f64),
    /// Symmetric for values none of which is negative: T > 0, scale `T / 2^b`, levels 0 … 2^b−1.
    Unsigned(f64),
    /// Uniform: a range that contains zero, scale `(hi − lo) / (2^b − 1)`, levels 0 … 2^b−1, zero point
    /// `round(−lo / scale)`.
    Uniform(Range),
}

impl Threshold {
    /// The quantizer of this threshold.
    ///
    /// The scale is rounded to `f32` once and kept within [`MIN_SCALE`] and the largest `f32`; a range is widened to
    /// contain zero and moved so that zero is a level. What came out is told by [`snapped`](Self::snapped).
    pub fn params(self, bits: Bits) -> QuantParams {
        let count = bits.level_count();
        match self {
            Self::Signed(t) => {
                let half = count / 2;
                let levels = Levels { quant_min: -half, quant_max: half - 1 };
                QuantParams::trusted(nearest_scale(t / f64::from(half)), 0, levels)
            }
            Self::Unsigned(t) => {
                let levels = Levels { quant_min: 0, quant_max: count - 1 };
                QuantParams::trusted(nearest_scale(t / f64::from(count)), 0, levels)
            }
            Self::Uniform(range) => {
                let Range { lo, hi } = range.with_zero();
                let quant_max = count - 1;
                let scale = nearest_scale((hi - lo) / f64::from(quant_max));
                // A float to integer cast saturates, so that no range is out of bounds here.
                let zero_point = ((-lo / f64::from(scale)).round_ties_even() as i32).clamp(0, quant_max);
                QuantParams::trusted(scale, zero_point, Levels { quant_min: 0, quant_max })
            }
        }
    }

    /// The threshold or range that the quantizer of this threshold really has; snapping again changes nothing.
    pub fn snapped(self, bits: Bits) -> Self {
        let params = self.params(bits);
        let scale = f64::from(params.scale());
        match self {
            Self::Signed(_) => Self::Signed(scale * f64::from(bits.level_count() / 2)),
            Self::Unsigned(_) => Self::Unsigned(scale * f64::from(bits.level_count())),
            Self::Uniform(_) => Self::Uniform(params.range()),
        }
    }
}

/// The valid scale nearest to this one; NaN gives the smallest.
fn nearest_scale(scale: f64) -> f32 {
    scale.max(f64::from(MIN_SCALE)).min(f64::from(f32::MAX)) as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bits(n: u64) -> Bits {
        Bits::try_from(n).unwrap()
    }

    fn any_threshold() -> impl Strategy<Value = Threshold> {
        let positive = || (-300.0f64..300.0, 1.0f64..2.0).prop_map(|(e, m)| m * (e / 2.0).exp2());
        let end = || prop_oneof![Just(0.0), positive()];
        prop_oneof![
            positive().prop_map(Threshold::Signed),
            positive().prop_map(Threshold::Unsigned),
            (end(), end()).prop_map(|(lo, hi)| Threshold::Uniform(Range { lo: -lo, hi })),
        ]
    }

    #[test]
    fn formulas() {
        let q = Threshold::Signed(2.0).params(bits(8));
        assert_eq!((q.scale(), q.zero_point(), q.quant_min(), q.quant_max()), (2.0 / 128.0, 0, -128, 127));
        let q = Threshold::Unsigned(2.0).params(bits(4));
        assert_eq!((q.scale(), q.zero_point(), q.quant_min(), q.quant_max()), (0.125, 0, 0, 15));
        let q = Threshold::Uniform(Range { lo: -1.0, hi: 2.0 }).params(bits(2));
        assert_eq!((q.scale(), q.zero_point(), q.quant_min(), q.quant_max()), (1.0, 1, 0, 3));
    }

    #[test]
    fn a_range_is_snapped_to_have_zero_as_a_level() {
        let snapped = Threshold::Uniform(Range { lo: -0.4, hi: 2.6 }).snapped(bits(2));
        assert_eq!(snapped, Threshold::Uniform(Range { lo: 0.0, hi: 3.0 }));
        let positive = Threshold::Uniform(Range { lo: 1.0, hi: 3.0 }).snapped(bits(2));
        assert_eq!(positive, Threshold::Uniform(Range { lo: 0.0, hi: 3.0 }));
    }

    #[test]
    fn senseless_thresholds_still_give_a_quantizer() {
        let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, -1.0, 0.0, f64::MIN_POSITIVE];
        for n in 2..=16 {
            for a in values {
                let ends = values.map(|b| Threshold::Uniform(Range { lo: a, hi: b }));
                for threshold in [Threshold::Signed(a), Threshold::Unsigned(a)].into_iter().chain(ends) {
                    let q = threshold.params(bits(n));
                    let levels = Levels { quant_min: q.quant_min(), quant_max: q.quant_max() };
                    assert_eq!(QuantParams::new(q.scale(), q.zero_point(), levels), Ok(q), "{threshold:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn snapping_is_idempotent_and_exact(threshold in any_threshold(), n in 2u64..=16) {
            let (bits, snapped) = (bits(n), threshold.snapped(bits(n)));
            prop_assert_eq!(snapped.params(bits), threshold.params(bits));
            prop_assert_eq!(snapped.snapped(bits), snapped);
        }

        #[test]
        fn a_power_of_two_scales_threshold_and_scale(t in 0.1f64..10.0, e in -40..40i32, n in 2u64..=16) {
            let (bits, factor) = (bits(n), 2f64.powi(e));
            for (plain, scaled) in [
                (Threshold::Signed(t), Threshold::Signed(t * factor)),
                (Threshold::Unsigned(t), Threshold::Unsigned(t * factor)),
                (
                    Threshold::Uniform(Range { lo: -t, hi: 1.0 }),
                    Threshold::Uniform(Range { lo: -t * factor, hi: factor }),
                ),
            ] {
                let (plain, scaled) = (plain.params(bits), scaled.params(bits));
                prop_assert_eq!(f64::from(scaled.scale()), f64::from(plain.scale()) * factor);
                prop_assert_eq!(scaled.zero_point(), plain.zero_point());
            }
        }
    }
}
