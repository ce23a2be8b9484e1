//! Weights whose products engines add two by two in 16 bits: quantizers under which no such sum overflows. It refuses to know
//! which layers and engines these are.
//!
//! An unsigned activation of 8 bits is at most 255. Where the positive and the negative levels of each pair of neighbouring taps
//! add up to at most [`MOST`] each, every sum of two products lies within ±255 · 128, which 16 bits hold.

use crate::quantizer::QuantParams;

/// What the levels of one sign in a pair may add up to.
const MOST: i32 = 128;

/// Whether all pairs of these kernels, of so many taps each, keep the bound.
fn fit(values: &[f32], taps: usize, params: &QuantParams) -> bool {
    let level = |x: &f32| params.quantize(*x) - params.zero_point();
    let pair_fits = |pair: &[f32]| {
        let sum = |sign: i32| pair.iter().map(|x| (sign * level(x)).max(0)).sum::<i32>();
        sum(1) <= MOST && sum(-1) <= MOST
    };
    values.chunks(taps.max(1)).flat_map(|kernel| kernel.chunks(2)).all(pair_fits)
}

/// The least scale at or above that of `params` with which all pairs keep the bound, found with quantizers that `with_scale` gives
/// for scales that they can have: any, or powers of two alone. `None` where `params` keep it.
pub(super) fn raised(
    values: &[f32],
    taps: usize,
    params: &QuantParams,
    (is_continuous, with_scale): (bool, impl Fn(f32) -> QuantParams),
) -> Option<f32> {
    let fits = |scale: f32| fit(values, taps, &with_scale(scale));
    if fit(values, taps, params) {
        return None;
    }
    let (mut low, mut high) = (params.scale(), params.scale());
    // Levels of at most half the largest `f32` go to 0 in the end.
    while !fits(high) {
        if high > f32::MAX / 2.0 {
            return None;
        }
        (low, high) = (high, high * 2.0);
    }
    if !is_continuous {
        return Some(high);
    }
    // The greater the scale, the smaller each level: one scale divides those that keep the bound from those that do not.
    let (mut low, mut high) = (low.to_bits(), high.to_bits());
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(f32::from_bits(middle)) { high = middle } else { low = middle }
    }
    Some(f32::from_bits(high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::{Bits, Grid, Scheme, Threshold};
    use crate::threshold::{Channels, ErrorMethod, select_weights};

    fn params(scale: f32) -> QuantParams {
        Threshold::Signed(128.0 * f64::from(scale)).params(Bits::try_from(8u64).unwrap())
    }

    #[test]
    fn the_least_scale_that_keeps_the_bound() {
        let values = [0.9f32, 0.8, -0.3, 0.7, 1.0];
        let before = params(1.0 / 127.0);
        let scale = raised(&values, 5, &before, (true, params)).unwrap();
        let is_kept = |scale: f32| fit(&values, 5, &params(scale));
        assert!(is_kept(scale) && !is_kept(scale.next_down()), "{scale}");
        assert!((scale - 1.7 / 128.5).abs() < 1e-3, "{scale}");
        assert_eq!(raised(&values, 5, &params(scale), (true, params)), None);
        // Pairs do not reach from one kernel into the next.
        assert_eq!(raised(&[0.9, 0.9, 0.9], 1, &before, (true, params)), None);
        let power = raised(&values, 5, &params(1.0 / 128.0), (false, params)).unwrap();
        assert_eq!(power, 1.0 / 64.0);
    }

    #[test]
    fn signs_count_for_themselves() {
        for (pair, fits) in [([127, -128], true), ([64, 64], true), ([127, 2], false), ([-128, -1], false)] {
            assert_eq!(fit(&pair.map(|level| level as f32), 2, &params(1.0)), fits, "{pair:?}");
        }
    }

    #[test]
    fn a_search_under_the_bound() {
        let values: Vec<f32> = (0..90).map(|i| ((i * 37 % 23) as f32 - 7.0) * 0.1).collect();
        for grid in [Grid::Symmetric, Grid::PowerOfTwo] {
            let scheme = Scheme { bits: Bits::try_from(8u64).unwrap(), grid };
            for (axis, count) in [(Some(0), 10), (None, 1)] {
                let channels = Channels::new(&values, &[10, 1, 3, 3], axis).unwrap();
                let free = select_weights(&channels, scheme, ErrorMethod::Mse).unwrap();
                assert_eq!(free.raised, None);
                let bounded = select_weights(&channels.in_pairs(Some(9)), scheme, ErrorMethod::Mse).unwrap();
                let mut raised = 0;
                for index in 0..count {
                    let (own, before) = (&bounded.params[index], &free.params[index]);
                    assert!(fit(&channels.channel(index), 9, own) && own.scale() >= before.scale());
                    assert_eq!(bounded.thresholds[index].params(scheme.bits), *own);
                    raised += usize::from(own.scale() > before.scale());
                }
                assert!(raised > 0 && bounded.raised == Some(raised), "{raised}, {:?}", bounded.raised);
                assert!(bounded.error > free.error);
            }
        }
    }
}
