//! The arithmetic of one quantizer, bit for bit that of libtorch's `fake_quantize_per_tensor_affine` on a CPU.
//!
//! All in `f32`, rounding half to even, without fused multiply-add. It refuses to know where its scale came from.

use serde::Serialize;

use super::{MIN_SCALE, Range};

/// A value counts as clipped if it lies further than this many scales outside of the outermost levels.
const CLIP_MARGIN: f64 = 0.5001;

/// 1.5 · 2^23: an f32 of magnitude up to 2^22 added to this loses exactly its fraction, half to even.
const ROUNDER: f32 = 12_582_912.0;

/// Levels reach at most this far from zero, so that level − zero point is exact in `f32` and [`ROUNDER`] applies.
const FARTHEST_LEVEL: i32 = 1 << 16;

/// The first and the last level of a quantizer, as integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Levels {
    /// The lowest level.
    pub quant_min: i32,
    /// The highest level.
    pub quant_max: i32,
}

/// Scale, zero point and levels of one quantizer; level n stands for the value `(n − zero_point) · scale`.
///
/// The scale is finite and at least [`MIN_SCALE`], the levels lie within ±65536, the zero point is one of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct QuantParams {
    scale: f32,
    zero_point: i32,
    quant_min: i32,
    quant_max: i32,
}

/// Numbers that are no quantizer.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum QuantParamsError {
    /// The scale is NaN, infinite or too small.
    #[error("scale must be finite and at least {MIN_SCALE:e}, found {0:e}")]
    Scale(f32),
    /// The levels are empty, reversed or too many.
    #[error("levels must ascend within ±{FARTHEST_LEVEL}, found {} to {}", .0.quant_min, .0.quant_max)]
    Levels(Levels),
    /// Zero is no level.
    #[error("zero point must be one of the levels {} to {}, found {zero_point}", .levels.quant_min, .levels.quant_max)]
    ZeroPoint {
        /// The zero point that was given.
        zero_point: i32,
        /// The levels that were given.
        levels: Levels,
    },
}

impl QuantParams {
    /// Checks the numbers of a quantizer.
    ///
    /// # Errors
    /// If the scale is not finite or below [`MIN_SCALE`], the levels do not ascend within ±65536, or the zero point is
    /// none of them.
    pub fn new(scale: f32, zero_point: i32, levels: Levels) -> Result<Self, QuantParamsError> {
        let Levels { quant_min, quant_max } = levels;
        if !(scale.is_finite() && scale >= MIN_SCALE) {
            return Err(QuantParamsError::Scale(scale));
        }
        if quant_min >= quant_max || quant_min < -FARTHEST_LEVEL || quant_max > FARTHEST_LEVEL {
            return Err(QuantParamsError::Levels(levels));
        }
        if zero_point < quant_min || zero_point > quant_max {
            return Err(QuantParamsError::ZeroPoint { zero_point, levels });
        }
        Ok(Self { scale, zero_point, quant_min, quant_max })
    }

    /// For callers within `quantizer` that keep the promises of [`QuantParams::new`] by construction.
    pub(super) fn trusted(scale: f32, zero_point: i32, levels: Levels) -> Self {
        debug_assert_eq!(Self::new(scale, zero_point, levels).err(), None);
        Self { scale, zero_point, quant_min: levels.quant_min, quant_max: levels.quant_max }
    }

    /// Distance between neighbouring levels, in the unit of the data.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The level that stands for 0.
    pub fn zero_point(&self) -> i32 {
        self.zero_point
    }

    /// The lowest level.
    pub fn quant_min(&self) -> i32 {
        self.quant_min
    }

    /// The highest level.
    pub fn quant_max(&self) -> i32 {
        self.quant_max
    }

    /// The level of `x`: `rint(x · (1 / scale)) + zero_point`, clamped. NaN becomes `quant_min`, as in libtorch.
    pub fn quantize(&self, x: f32) -> i32 {
        let level = (x * self.reciprocal()).round_ties_even() + self.zero_point as f32;
        clamp(level, self.quant_min as f32, self.quant_max as f32) as i32
    }

    /// The value that `level` stands for; infinite if it is beyond the largest `f32`.
    pub fn dequantize(&self, level: i32) -> f32 {
        (i64::from(level) - i64::from(self.zero_point)) as f32 * self.scale
    }

    /// The image of `x`: the value that its level stands for. Never −0.0.
    pub fn fake_quantize(&self, x: f32) -> f32 {
        self.dequantize(self.quantize(x))
    }

    /// Writes the images of `values` to the same places of `images`, bit for bit those of
    /// [`fake_quantize`](Self::fake_quantize). As in `zip`, the shorter slice decides how many.
    pub fn fake_quantize_slice(&self, values: &[f32], images: &mut [f32]) {
        let kernel = self.kernel();
        for (image, &x) in images.iter_mut().zip(values) {
            *image = kernel.image(x);
        }
    }

    /// Replaces each of `values` by its image.
    pub fn fake_quantize_in_place(&self, values: &mut [f32]) {
        let kernel = self.kernel();
        for x in values {
            *x = kernel.image(*x);
        }
    }

    /// The exact values of the outermost levels: the snapped range of this quantizer.
    pub fn range(&self) -> Range {
        let exact = |level: i32| f64::from(level - self.zero_point) * f64::from(self.scale);
        Range { lo: exact(self.quant_min), hi: exact(self.quant_max) }
    }

    /// The range outside of which a value counts as clipped: abs(x − q) > 0.5001 · scale, q its image.
    ///
    /// Stated as a range because the inequality is meant for values outside of the levels. Within, at 16 bits, `f32`
    /// can miss a tie by 0.008 scales and land on the neighbouring level; nothing is clipped there.
    pub fn unclipped(&self) -> Range {
        let margin = CLIP_MARGIN * f64::from(self.scale);
        let (bottom, top) = (self.dequantize(self.quant_min), self.dequantize(self.quant_max));
        Range { lo: f64::from(bottom) - margin, hi: f64::from(top) + margin }
    }

    fn reciprocal(&self) -> f32 {
        1.0 / self.scale
    }

    fn kernel(&self) -> Kernel {
        Kernel {
            reciprocal: self.reciprocal(),
            scale: self.scale,
            lowest: (self.quant_min - self.zero_point) as f32,
            highest: (self.quant_max - self.zero_point) as f32,
        }
    }
}

/// The same arithmetic in the order that becomes vector instructions without a call of `rint`: the bounds are
/// integers, so clamping first and rounding then gives the same level, now small enough for [`ROUNDER`].
struct Kernel {
    reciprocal: f32,
    scale: f32,
    lowest: f32,
    highest: f32,
}

impl Kernel {
    #[inline(always)]
    fn image(&self, x: f32) -> f32 {
        let level = clamp(x * self.reciprocal, self.lowest, self.highest);
        ((level + ROUNDER) - ROUNDER) * self.scale
    }
}

/// Two compare-and-select instructions; NaN becomes `lowest` (f32::clamp would keep it).
#[inline(always)]
fn clamp(x: f32, lowest: f32, highest: f32) -> f32 {
    let x = if x > lowest { x } else { lowest };
    if x < highest { x } else { highest }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &[u8] = include_bytes!("../../tests/golden/fake_quantize.bin");

    fn any_params() -> impl Strategy<Value = QuantParams> {
        let scale = prop_oneof![
            (MIN_SCALE.to_bits()..f32::INFINITY.to_bits()).prop_map(f32::from_bits),
            (-20..20i32).prop_map(|e| 2f32.powi(e)),
            1e-4f32..10.0,
        ];
        (scale, 2..=16u32, 0..3u8, any::<prop::sample::Index>()).prop_map(|(scale, bits, kind, index)| {
            let count = 1i32 << bits;
            let (zero_point, quant_min) = match kind {
                0 => (0, -count / 2),
                1 => (0, 0),
                _ => (index.index(count as usize) as i32, 0),
            };
            QuantParams::new(scale, zero_point, Levels { quant_min, quant_max: quant_min + count - 1 }).unwrap()
        })
    }

    /// Any bit pattern, or near a tie of a quantizer with this scale.
    fn any_value(scale: f32) -> impl Strategy<Value = f32> {
        let tie = move |(level, ulps): (i32, i32)| {
            let x = (level as f32 + 0.5) * scale;
            if x.is_finite() { f32::from_bits(x.to_bits().saturating_add_signed(ulps)) } else { x }
        };
        prop_oneof![any::<u32>().prop_map(f32::from_bits), (-70_000..70_000i32, -2..=2i32).prop_map(tie)]
    }

    fn params_and_values(n: usize) -> impl Strategy<Value = (QuantParams, Vec<f32>)> {
        any_params().prop_flat_map(move |q| (Just(q), prop::collection::vec(any_value(q.scale()), n)))
    }

    struct Words<'a>(&'a [u8]);

    impl Words<'_> {
        fn next(&mut self) -> [u8; 4] {
            let (word, rest) = self.0.split_first_chunk().expect("golden file is truncated");
            self.0 = rest;
            *word
        }

        fn floats(&mut self, n: u32) -> Vec<f32> {
            (0..n).map(|_| f32::from_le_bytes(self.next())).collect()
        }
    }

    #[test]
    fn equals_libtorch_bit_for_bit() {
        let mut words = Words(GOLDEN);
        let mut compared = 0;
        while !words.0.is_empty() {
            let scale = f32::from_le_bytes(words.next());
            let [zero_point, quant_min, quant_max] = [(); 3].map(|()| i32::from_le_bytes(words.next()));
            let n = u32::from_le_bytes(words.next());
            let q = QuantParams::new(scale, zero_point, Levels { quant_min, quant_max }).unwrap();
            let (inputs, expected) = (words.floats(n), words.floats(n));
            let mut images = vec![f32::NAN; inputs.len()];
            q.fake_quantize_slice(&inputs, &mut images);
            for ((x, y), image) in inputs.iter().zip(&expected).zip(&images) {
                assert_eq!(q.fake_quantize(*x).to_bits(), y.to_bits(), "{q:?} x {x:e} torch {y:e}");
                assert_eq!(image.to_bits(), y.to_bits(), "slice, {q:?} x {x:e} torch {y:e}");
            }
            compared += images.len();
        }
        assert!(compared > 10_000, "{compared} values in the golden file");
    }

    #[test]
    fn special_values() {
        let q = QuantParams::new(1.0, 3, Levels { quant_min: 0, quant_max: 15 }).unwrap();
        assert_eq!([0.5, 1.5, 2.5, -0.5, -2.5].map(|x| q.quantize(x)), [3, 5, 5, 3, 1]);
        assert_eq!([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|x| q.fake_quantize(x)), [-3.0, 12.0, -3.0]);
        assert_eq!([-0.0, -0.3, 1e-45].map(|x| q.fake_quantize(x).to_bits()), [0; 3]);
        assert_eq!(q.dequantize(i32::MIN), -2_147_483_651.0_f64 as f32);
        assert_eq!(q.range(), Range { lo: -3.0, hi: 12.0 });
        assert_eq!(q.unclipped(), Range { lo: -3.0 - 0.5001, hi: 12.0 + 0.5001 });
    }

    #[test]
    fn refuses_what_is_no_quantizer() {
        let levels = Levels { quant_min: -8, quant_max: 7 };
        let message = |scale, zero, levels| QuantParams::new(scale, zero, levels).unwrap_err().to_string();
        for scale in [0.0, -1.0, 1e-39, f32::NAN, f32::INFINITY] {
            let text = format!("scale must be finite and at least 1.1754944e-38, found {scale:e}");
            assert_eq!(message(scale, 0, levels), text);
        }
        assert_eq!(message(1.0, 8, levels), "zero point must be one of the levels -8 to 7, found 8");
        let reversed = Levels { quant_min: 7, quant_max: -8 };
        assert_eq!(message(1.0, 0, reversed), "levels must ascend within ±65536, found 7 to -8");
        let extreme = Levels { quant_min: i32::MIN, quant_max: i32::MAX };
        assert!(QuantParams::new(1.0, 0, extreme).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn slice_equals_scalar((q, values) in params_and_values(40)) {
            let mut images = vec![0.0; values.len()];
            q.fake_quantize_slice(&values, &mut images);
            let mut replaced = values.clone();
            q.fake_quantize_in_place(&mut replaced);
            for ((x, image), replaced) in values.iter().zip(&images).zip(&replaced) {
                prop_assert_eq!(image.to_bits(), q.fake_quantize(*x).to_bits(), "x {:e}", x);
                prop_assert_eq!(image.to_bits(), replaced.to_bits());
            }
        }

        #[test]
        fn idempotent_and_on_a_level((q, values) in params_and_values(20)) {
            for x in values {
                let image = q.fake_quantize(x);
                prop_assert!((q.quant_min()..=q.quant_max()).contains(&q.quantize(x)));
                if image.is_finite() {
                    prop_assert_eq!(q.fake_quantize(image).to_bits(), image.to_bits(), "x {:e}", x);
                }
            }
        }

        #[test]
        fn monotone((q, mut values) in params_and_values(20)) {
            values.retain(|x| !x.is_nan());
            values.sort_by(f32::total_cmp);
            let images: Vec<f32> = values.iter().map(|&x| q.fake_quantize(x)).collect();
            prop_assert!(images.is_sorted());
        }

        #[test]
        fn zero_is_zero(q in any_params()) {
            prop_assert_eq!([0.0, -0.0].map(|x| q.fake_quantize(x).to_bits()), [0, 0]);
            prop_assert_eq!(q.quantize(0.0), q.zero_point());
        }

        /// Up to 8 bits f32 cannot miss a tie by more than the margin, and the range is the inequality.
        #[test]
        fn unclipped_is_the_definition((q, values) in params_and_values(20)) {
            let narrow = q.quant_max() - q.quant_min() < 256;
            for x in values.into_iter().filter(|x| narrow && x.is_finite()) {
                let image = q.fake_quantize(x);
                if image.is_finite() {
                    let clipped = (f64::from(x) - f64::from(image)).abs() > 0.5001 * f64::from(q.scale());
                    prop_assert_eq!(clipped, !q.unclipped().contains(f64::from(x)), "x {:e}", x);
                }
            }
        }
    }
}
