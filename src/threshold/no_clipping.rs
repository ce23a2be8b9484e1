//! NOCLIPPING: the smallest range that clips no value.

use super::SelectError;
use super::family::Family;
use crate::quantizer::{QuantParams, Threshold};
use crate::statistics::Observed;

/// First relative step by which a scale grows, one unit in the last place of an `f32`; each further step is twice as
/// large, up to [`LAST_STEP`].
const FIRST_STEP: f64 = 1.0 / (1 << 23) as f64;

/// Small enough not to leap over the scales from two thirds to all of the largest `f32`, where every value is at most
/// one level away from zero and so has a finite image.
const LAST_STEP: f64 = 0.125;

/// Steps after which a scale has grown more than any data can need.
const STEPS: usize = 64;

/// The threshold for data that is not all zero.
///
/// The enclosing scale clips nothing in real numbers. Three things remain, which a larger scale cures: a zero point
/// rounded from a tie can, at 16 bits, with the rounding of `f32` leave an extreme 0.502 scales outside; near the
/// largest `f32` the image of an extreme can overflow; and beside the smallest normal values a negative denormal, which
/// counts as zero, can lie outside of an unsigned grid.
///
/// # Errors
/// If every power-of-two grid would map an extreme to infinity or clip it.
pub(super) fn threshold(data: Observed, family: Family) -> Result<Threshold, SelectError> {
    let mut scale = family.enclosing_scale();
    let mut step = FIRST_STEP;
    for _ in 0..STEPS {
        let threshold = family.with_scale(scale);
        let params = threshold.params(family.bits());
        if encloses(&params, data) && family.has_scale(params.scale()) {
            return Ok(threshold);
        }
        let factor = if family.is_continuous() { 1.0 + step } else { 2.0 };
        scale = f64::from(params.scale()) * factor;
        step = (step * 2.0).min(LAST_STEP);
    }
    Err(SelectError::TooLarge { largest: data.max().max(-data.min()), bits: family.bits() })
}

/// Whether this quantizer clips no value of the data and maps none to infinity; the extremes speak for all, as images
/// are monotone.
fn encloses(params: &QuantParams, data: Observed) -> bool {
    let unclipped = params.unclipped();
    [data.min(), data.max()]
        .into_iter()
        .all(|x| unclipped.contains(f64::from(x)) && params.fake_quantize(x).is_finite())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::quantizer::{Bits, Grid, QuantParams, Range, Scheme, Threshold};
    use crate::statistics::{Counter, Histogram};
    use crate::threshold::{Channels, ErrorMethod, SelectError, Selection, select_activation, select_weights};

    const GRIDS: [Grid; 3] = [Grid::Symmetric, Grid::Uniform, Grid::PowerOfTwo];

    fn scheme(bits: u64, grid: Grid) -> Scheme {
        Scheme { bits: Bits::try_from(bits).unwrap(), grid }
    }

    fn of_weights(values: &[f32], scheme: Scheme) -> Result<Selection, SelectError> {
        let weights = Channels::new(values, &[values.len()], None).unwrap();
        select_weights(&weights, scheme, ErrorMethod::NoClipping)
    }

    fn of_activation(values: &[f32], scheme: Scheme) -> Result<Selection, SelectError> {
        let mut histogram = Histogram::new();
        histogram.observe(values, &mut Counter::new());
        select_activation(&histogram, scheme, ErrorMethod::NoClipping, None)
    }

    fn threshold(selection: Result<Selection, SelectError>) -> Threshold {
        selection.unwrap().thresholds[0]
    }

    /// T or the width of the range.
    fn extent(threshold: Threshold) -> f64 {
        match threshold {
            Threshold::Signed(t) | Threshold::Unsigned(t) => t,
            Threshold::Uniform(Range { lo, hi }) => hi - lo,
        }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-6 * b.abs()
    }

    #[test]
    fn formulas_of_the_symmetric_grid() {
        let eight = scheme(8, Grid::Symmetric);
        assert_eq!(threshold(of_weights(&[-2.0, 1.0], eight)), Threshold::Signed(2.0));
        assert!(matches!(threshold(of_weights(&[-2.0, 2.0], eight)), Threshold::Signed(t) if close(t, 256.0 / 127.0)));
        assert!(matches!(threshold(of_weights(&[1.0, 2.0], eight)), Threshold::Signed(t) if close(t, 256.0 / 127.0)));
        let unsigned = threshold(of_activation(&[0.0, 2.0], eight));
        assert!(matches!(unsigned, Threshold::Unsigned(t) if close(t, 512.0 / 255.0)));
        assert!(matches!(threshold(of_activation(&[-1.0, 0.5], eight)), Threshold::Signed(1.0)));
    }

    #[test]
    fn formulas_of_the_power_of_two_grid() {
        let eight = scheme(8, Grid::PowerOfTwo);
        assert_eq!(threshold(of_weights(&[-2.0, 1.0], eight)), Threshold::Signed(2.0));
        assert_eq!(threshold(of_weights(&[-2.0, 2.0], eight)), Threshold::Signed(4.0));
        assert_eq!(threshold(of_weights(&[127.0 / 128.0], eight)), Threshold::Signed(1.0));
        assert_eq!(threshold(of_activation(&[0.0, 255.0 / 256.0], eight)), Threshold::Unsigned(1.0));
        assert_eq!(threshold(of_activation(&[0.0, 1.0], eight)), Threshold::Unsigned(2.0));
    }

    #[test]
    fn formulas_of_the_uniform_grid() {
        let eight = scheme(8, Grid::Uniform);
        let range = |values: &[f32]| match threshold(of_activation(values, eight)) {
            Threshold::Uniform(Range { lo, hi }) => (lo, hi),
            other => panic!("{other:?}"),
        };
        assert_eq!(range(&[-1.0, 1.55]), (-f64::from(0.01f32) * 100.0, f64::from(0.01f32) * 155.0));
        assert_eq!(range(&[51.0, 255.0]), (0.0, 255.0));
        assert_eq!(range(&[-255.0, -51.0]), (-255.0, 0.0));
    }

    #[test]
    fn zeros_have_scale_one_and_nothing_has_no_scale() {
        for grid in GRIDS {
            for bits in 2..=16 {
                let both = [of_weights(&[0.0, -1e-40], scheme(bits, grid)), of_activation(&[-0.0], scheme(bits, grid))];
                for selection in both.map(Result::unwrap) {
                    assert_eq!((selection.params[0].scale(), selection.params[0].zero_point()), (1.0, 0));
                    assert_eq!(selection.notes.len(), 1);
                    assert_eq!(selection.clipped_share, 0.0);
                }
            }
            assert_eq!(of_activation(&[], scheme(8, grid)), Err(SelectError::Empty));
        }
    }

    #[test]
    fn a_negative_denormal_is_no_negative_value() {
        let unsigned = threshold(of_activation(&[-1e-40, 1.0], scheme(8, Grid::Symmetric)));
        assert!(matches!(unsigned, Threshold::Unsigned(_)));
    }

    #[test]
    fn names_what_is_not_finite() {
        let values = [1.0, f32::NAN, 2.0, f32::INFINITY];
        let weights = Channels::new(&values, &[2, 2], Some(1)).unwrap();
        let eight = scheme(8, Grid::Symmetric);
        let error = select_weights(&weights, eight, ErrorMethod::NoClipping).unwrap_err().to_string();
        assert_eq!(error, "channel 1: expected finite values, found 1 NaN and 1 infinite among 2");
        let error = of_activation(&values, eight).unwrap_err().to_string();
        assert_eq!(error, "expected finite values, found 1 NaN and 1 infinite among 4");
    }

    #[test]
    fn refuses_what_no_power_of_two_grid_reaches() {
        let error = of_weights(&[f32::MAX], scheme(8, Grid::PowerOfTwo)).unwrap_err().to_string();
        let text = "expected magnitudes within reach of a power_of_two grid of 8 bits in f32, found 3.4028235e38";
        assert_eq!(error, text);
        assert!(of_weights(&[f32::MAX / 2.0], scheme(8, Grid::PowerOfTwo)).is_ok());
    }

    /// Asserts that nothing is clipped or sent to infinity, by the definition itself where f32 can tell (see
    /// `QuantParams::unclipped`), and that a range a little smaller would clip.
    fn assert_clips_nothing(selection: &Selection, values: &[f32], scheme: Scheme) -> Result<(), TestCaseError> {
        let q: QuantParams = selection.params[0];
        prop_assert_eq!(selection.clipped_share, 0.0);
        prop_assert!(q.scale().is_finite() && q.scale() >= f32::MIN_POSITIVE);
        prop_assert_eq!(selection.thresholds[0].params(scheme.bits), q);
        for &x in values {
            let image = q.fake_quantize(x);
            prop_assert!(image.is_finite(), "{:e} becomes {:e} by {:?}", x, image, q);
            let distance = (f64::from(x) - f64::from(image)).abs() / f64::from(q.scale());
            let allowed = if scheme.bits.get() <= 8 { 0.5001 } else { 0.51 };
            prop_assert!(distance <= allowed, "{:e} is {} scales from its image by {:?}", x, distance, q);
        }
        let all_zero = values.iter().all(|x| x.abs() < f32::MIN_POSITIVE);
        if !all_zero && scheme.grid == Grid::PowerOfTwo {
            prop_assert_eq!(q.scale().log2().fract(), 0.0);
        }
        // Not where the smallest scale decides, where a negative denormal on an unsigned grid can need twice that.
        if !all_zero && scheme.grid != Grid::PowerOfTwo && q.scale() > 3.0 * f32::MIN_POSITIVE {
            let (min, max) =
                values.iter().fold((0.0, 0.0), |(lo, hi), &x| (f64::min(lo, x.into()), f64::max(hi, x.into())));
            let levels = f64::from(q.quant_max() - q.quant_min());
            let smallest = match selection.thresholds[0] {
                Threshold::Signed(_) => (-min / ((levels + 1.0) / 2.0)).max(max / ((levels - 1.0) / 2.0)),
                Threshold::Unsigned(_) | Threshold::Uniform(_) => (max - min) / levels,
            };
            // Near the largest f32 finite images can need a scale up to half a level larger.
            let slack = if max.max(-min) > 1e38 { 1.6 } else { 1.0 + 1e-5 };
            let scale = f64::from(q.scale());
            prop_assert!(scale >= smallest * (1.0 - 1e-6) && scale <= smallest * slack, "{} for {}", scale, smallest);
        }
        Ok(())
    }

    fn any_values() -> impl Strategy<Value = Vec<f32>> {
        let finite = any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite());
        let near_largest = (0x7f00_0000u32..0x7f80_0000, any::<bool>())
            .prop_map(|(bits, negative)| f32::from_bits(bits | (u32::from(negative) << 31)));
        let largest = prop::sample::select(vec![f32::MAX, f32::MIN, 0.0, 1.0]);
        let tiny = (0u32..0x0180_0000, any::<bool>())
            .prop_map(|(bits, negative)| f32::from_bits(bits | (u32::from(negative) << 31)));
        prop_oneof![
            prop::collection::vec(-10f32..10.0, 1..20),
            prop::collection::vec(0f32..6.0, 1..20),
            prop::collection::vec(finite, 1..6),
            prop::collection::vec(near_largest, 1..4),
            prop::collection::vec(largest, 1..4),
            prop::collection::vec(tiny, 1..6),
            (1usize..20, -10f32..10.0).prop_map(|(n, x)| vec![x; n]),
            // An end that lies half a level outside after snapping, give or take a rounding.
            (2u32..=16, any::<prop::sample::Index>(), -3..=3i32, -60..60i32).prop_map(|(bits, index, ulps, e)| {
                let levels = ((1u32 << bits) - 1) as f32;
                let below = index.index(levels as usize) as f32 + 0.5;
                let nudged = f32::from_bits(below.to_bits().saturating_add_signed(ulps));
                vec![-nudged * 2f32.powi(e), (levels - below) * 2f32.powi(e)]
            }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn clips_nothing_ever(values in any_values()) {
            let beyond_powers_of_two = values.iter().any(|x| x.abs() > f32::MAX / 2.0);
            for grid in GRIDS {
                for bits in 2..=16 {
                    let scheme = scheme(bits, grid);
                    for selection in [of_weights(&values, scheme), of_activation(&values, scheme)] {
                        match selection {
                            Ok(selection) => assert_clips_nothing(&selection, &values, scheme)?,
                            Err(SelectError::TooLarge { .. }) if grid == Grid::PowerOfTwo && beyond_powers_of_two => {}
                            Err(error) => prop_assert!(false, "{:?}: {}", scheme, error),
                        }
                    }
                }
            }
        }

        #[test]
        fn scaling_the_data_by_a_power_of_two_scales_the_threshold(
            values in prop::collection::vec(prop_oneof![-10f32..-0.01, 0.01f32..10.0], 1..20),
            e in -60..60i32,
            bits in 2u64..=16,
        ) {
            let scaled: Vec<f32> = values.iter().map(|x| x * 2f32.powi(e)).collect();
            for grid in GRIDS {
                let scheme = scheme(bits, grid);
                for select in [of_weights, of_activation] {
                    let (plain, scaled) = (select(&values, scheme).unwrap(), select(&scaled, scheme).unwrap());
                    let factor = 2f64.powi(e);
                    prop_assert_eq!(extent(scaled.thresholds[0]), extent(plain.thresholds[0]) * factor);
                    prop_assert!(close(scaled.error, plain.error * factor * factor));

                }
            }
        }

        #[test]
        fn a_constant_lies_on_its_grid(c in prop_oneof![-10f32..-0.01, 0.01f32..10.0], bits in 2u64..=16) {
            for grid in [Grid::Symmetric, Grid::Uniform] {
                for select in [of_weights, of_activation] {
                    let image = select(&[c, c], scheme(bits, grid)).unwrap().params[0].fake_quantize(c);
                    prop_assert!(close(image.into(), c.into()), "{} became {}", c, image);
                }
            }
        }

        #[test]
        fn each_channel_is_chosen_alone(
            values in prop::collection::vec(-10f32..10.0, 24),
            axis in 0..3usize,
            bits in 2u64..=16,
        ) {
            let weights = Channels::new(&values, &[2, 3, 4], Some(axis)).unwrap();
            for grid in GRIDS {
                let all = select_weights(&weights, scheme(bits, grid), ErrorMethod::NoClipping).unwrap();
                let mut squared_error = 0.0;
                for index in 0..weights.count() {
                    let channel = weights.channel(index);
                    let alone = of_weights(&channel, scheme(bits, grid)).unwrap();
                    prop_assert_eq!(all.params[index], alone.params[0]);
                    prop_assert_eq!(all.thresholds[index], alone.thresholds[0]);
                    squared_error += alone.error * channel.len() as f64;
                }
                prop_assert!(close(all.error, squared_error / 24.0));
            }
        }
    }
}
