//! The values of a block without those that count as zero, of which the activations after a ReLU have many.

use super::histogram::BLOCK;

/// Values of one vector.
const VECTOR: usize = 16;

/// Room for what is left of a block.
#[derive(Debug)]
pub(super) struct NonZero(Box<[f32; BLOCK + VECTOR]>);

impl NonZero {
    pub(super) fn new() -> Self {
        Self(Box::new([0.0; BLOCK + VECTOR]))
    }

    /// The values of at most [`BLOCK`] that do not count as zero, in their order.
    #[inline(always)]
    pub(super) fn of(&mut self, block: &[f32]) -> &[f32] {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx512) = pulp::core_arch::x86::Avx512f::try_new() {
            let (vectors, rest) = block.as_chunks::<VECTOR>();
            let mut kept = 0;
            for vector in vectors {
                kept += compress(avx512, vector, &mut self.0[kept..]);
            }
            return self.append(kept, rest);
        }
        self.append(0, block)
    }

    /// Puts the values after the `kept` first places; without a branch, as nobody can foretell which of them are zero.
    #[inline(always)]
    fn append(&mut self, mut kept: usize, values: &[f32]) -> &[f32] {
        for &x in values {
            self.0[kept] = x;
            kept += usize::from(x.abs() >= f32::MIN_POSITIVE);
        }
        &self.0[..kept]
    }
}

/// Writes a vector's values that do not count as zero, and something behind them; returns how many there are.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn compress(avx512: pulp::core_arch::x86::Avx512f, vector: &[f32; VECTOR], to: &mut [f32]) -> usize {
    let bits = pulp::cast(*vector);
    let magnitudes = avx512._mm512_and_si512(bits, avx512._mm512_set1_epi32(i32::MAX));
    let normal = avx512._mm512_set1_epi32(f32::MIN_POSITIVE.to_bits() as i32);
    let mask = avx512._mm512_cmpge_epu32_mask(magnitudes, normal);
    if let Some(to) = to.first_chunk_mut::<VECTOR>() {
        *to = pulp::cast(avx512._mm512_maskz_compress_epi32(mask, bits));
    }
    mask.count_ones() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::statistics::histogram::tests::finite_values;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn leaves_out_zeros_and_nothing_else(values in finite_values(300)) {
            let block = &values[..values.len().min(BLOCK)];
            let naive: Vec<f32> = block.iter().copied().filter(|x| x.abs() >= f32::MIN_POSITIVE).collect();
            let mut room = NonZero::new();
            prop_assert_eq!(bits(room.of(block)), bits(&naive));
            // What a machine without these instructions does.
            prop_assert_eq!(bits(room.append(0, block)), bits(&naive));
        }
    }

    #[test]
    fn a_whole_block_fits() {
        for block in [vec![1.0; BLOCK], vec![0.0; BLOCK], vec![-1.0; BLOCK - 1]] {
            let kept = block.iter().filter(|&&x| x != 0.0).count();
            assert_eq!(NonZero::new().of(&block).len(), kept);
        }
    }
}
