//! `simulate::fake_quantize` is the same function, bit for bit, as the reference arithmetic and as libtorch's own
//! fake-quantize kernel, on values chosen to tell them apart.

use tch::Tensor;
use tsquant::quantizer::{Levels, QuantParams};
use tsquant::simulate;

fn params(scale: f32, zero_point: i32, quant_min: i32, quant_max: i32) -> QuantParams {
    QuantParams::new(scale, zero_point, Levels { quant_min, quant_max }).expect("a quantizer")
}

/// Signed, unsigned and affine quantizers of 2 to 16 bits; scales that are powers of two, that are not, and the extremes.
fn quantizers() -> Vec<QuantParams> {
    let scales = [
        f32::MIN_POSITIVE,
        1.3e-38,
        7.31e-20,
        2f32.powi(-7),
        0.017_453_292,
        1.0 / 255.0,
        0.1,
        1.0,
        std::f32::consts::E,
        1.9e9,
        3.0e33,
    ];
    let mut found = Vec::new();
    for scale in scales {
        for bits in [2u32, 3, 4, 8, 12, 16] {
            let count = 1i32 << bits;
            found.push(params(scale, 0, -count / 2, count / 2 - 1));
            for zero_point in [0, 1, count / 3, count / 2, count - 1] {
                found.push(params(scale, zero_point, 0, count - 1));
            }
        }
        found.push(params(scale, -3, -8, 7));
        found.push(params(scale, 5, -8, 7));
    }
    found
}

/// A stream of numbers that looks random and is the same in every run (SplitMix64).
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word >> 32) as u32
    }
}

/// Zeros, denormals, ties and their neighbours, values far outside of the levels, and any bit pattern; all within the
/// promise of abs(x / scale) < 2^31.
#[allow(clippy::cast_precision_loss)]
fn hard_values(quantizer: &QuantParams, stream: &mut Stream) -> Vec<f32> {
    let scale = quantizer.scale();
    let mut values =
        vec![0.0, f32::from_bits(1), f32::from_bits(0x007f_ffff), f32::MIN_POSITIVE, f32::MAX, f32::INFINITY];
    let (lowest, highest) =
        (quantizer.quant_min() - quantizer.zero_point(), quantizer.quant_max() - quantizer.zero_point());
    for level in [0, 1, 2, 3, 4, 5, lowest, highest, highest / 2, 100_000, 1 << 23, 1 << 24, i32::MAX - 200] {
        for half in [0.0, 0.25, 0.5, 0.75] {
            let bits = ((level.unsigned_abs() as f32 + half) * scale).to_bits();
            values.extend((-3..=3).map(|ulps| f32::from_bits(bits.saturating_add_signed(ulps))));
        }
    }
    for _ in 0..500 {
        values.push(f32::from_bits(stream.next()));
        // The same spread over the levels, where most random patterns do not fall.
        let fraction = f64::from(stream.next()) / f64::from(u32::MAX);
        values.push((fraction * 2.5 * f64::from(highest - lowest) * f64::from(scale)) as f32);
    }
    let both = values.iter().flat_map(|&x| [x, -x]);
    both.filter(|x| f64::from(x.abs()) / f64::from(scale) < f64::from(1u32 << 31)).collect()
}

fn values_of(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.flatten(0, -1)).expect("a float tensor")
}

#[test]
fn equals_the_reference_and_libtorch_bit_for_bit() {
    let mut stream = Stream(7);
    let mut compared = 0;
    let mut negative_zeros = 0;
    for quantizer in quantizers() {
        let values = hard_values(&quantizer, &mut stream);
        let tensor = Tensor::from_slice(&values);
        let simulated = values_of(&simulate::fake_quantize(&tensor, &quantizer).expect("simulated"));
        let (scale, zero_point) = (f64::from(quantizer.scale()), i64::from(quantizer.zero_point()));
        let (quant_min, quant_max) = (i64::from(quantizer.quant_min()), i64::from(quantizer.quant_max()));
        let kernel = tensor.f_fake_quantize_per_tensor_affine(scale, zero_point, quant_min, quant_max);
        let kernel = values_of(&kernel.expect("libtorch's kernel"));
        for ((&x, simulated), kernel) in values.iter().zip(&simulated).zip(&kernel) {
            let reference = quantizer.fake_quantize(x);
            let told = || format!("{quantizer:?} x {x:e} ({:#010x})", x.to_bits());
            assert_eq!(simulated.to_bits(), reference.to_bits(), "{}: {simulated:e}, reference {reference:e}", told());
            assert_eq!(simulated.to_bits(), kernel.to_bits(), "{}: {simulated:e}, libtorch {kernel:e}", told());
            negative_zeros += usize::from(x.to_bits() == (-0.0f32).to_bits());
        }
        assert_eq!(values_of(&tensor).len(), simulated.len());
        compared += values.len();
    }
    assert!(compared > 400_000, "only {compared} values were compared");
    assert!(negative_zeros >= quantizers().len(), "negative zero was not among the values");
}

#[test]
fn leaves_its_argument_as_it_was() {
    for quantizer in [params(0.5, 0, -4, 3), params(0.5, 3, 0, 7)] {
        let tensor = Tensor::from_slice(&[-9.0f32, -0.3, 0.0, 0.26, 7.0]);
        let simulated = simulate::fake_quantize(&tensor, &quantizer).expect("simulated");
        assert_ne!(values_of(&simulated), values_of(&tensor));
        assert_eq!(values_of(&tensor), [-9.0, -0.3, 0.0, 0.26, 7.0]);
    }
}

#[test]
fn keeps_shape_and_takes_strided_and_empty_tensors() {
    let quantizer = params(0.25, 2, 0, 15);
    let tensor = Tensor::from_slice(&[-0.6f32, 0.1, 0.13, 0.9, 2.0, 9.0]).reshape([2, 3]);
    let transposed = simulate::fake_quantize(&tensor.tr(), &quantizer).expect("simulated");
    let straight = simulate::fake_quantize(&tensor, &quantizer).expect("simulated");
    assert_eq!(transposed.size(), [3, 2]);
    assert_eq!(values_of(&transposed.tr().contiguous()), values_of(&straight));
    assert_eq!(values_of(&straight), [-0.5, 0.0, 0.25, 1.0, 2.0, 3.25]);
    let empty = Tensor::zeros([0, 3], (tch::Kind::Float, tch::Device::Cpu));
    assert_eq!(simulate::fake_quantize(&empty, &quantizer).expect("simulated").size(), [0, 3]);
}
