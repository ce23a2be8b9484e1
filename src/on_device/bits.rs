//! The bits of `f32` values as tensors of whole numbers. It knows the format, and not what is counted.

use tch::{Kind, Tensor};

use super::Shared;
use crate::jit::Error;
use crate::statistics::Layout;

/// All bits but the sign.
const MAGNITUDE: i64 = i32::MAX as i64;

/// The smallest magnitude that does not count as zero.
const NORMAL: i64 = f32::MIN_POSITIVE.to_bits() as i64;

/// The first magnitude that is not finite, and the only infinite one.
const INFINITE: i64 = f32::INFINITY.to_bits() as i64;

/// The sign, as a number that has no other bit.
const SIGN: i64 = i32::MIN as i64;

/// Bits of the mantissa that are stored.
const MANTISSA_BITS: i64 = 23;

/// Values and what their bits say.
pub(super) struct Bits {
    bits: Tensor,
    /// Bits without the sign.
    magnitudes: Tensor,
    /// Which values count as zero.
    are_zero: Tensor,
}

impl Bits {
    pub(super) fn of(values: &Tensor) -> Result<Self, Error> {
        let bits = values.f_view_dtype(Kind::Int)?;
        let magnitudes = bits.f_bitwise_and(MAGNITUDE)?;
        let are_zero = magnitudes.f_lt(NORMAL)?;
        Ok(Self { bits, magnitudes, are_zero })
    }

    /// Which values are neither NaN nor infinite.
    pub(super) fn are_finite(&self) -> Result<Tensor, Error> {
        Ok(self.magnitudes.f_lt(INFINITE)?)
    }

    /// How many values are infinite.
    pub(super) fn infinities(&self) -> Result<Tensor, Error> {
        Ok(self.magnitudes.f_eq(INFINITE)?.f_sum(Kind::Int64)?)
    }

    /// The bin of each value, on one axis.
    pub(super) fn bins(&self, shared: &Shared) -> Result<Tensor, Error> {
        let shifted = self.bits.f_bitwise_right_shift_tensor_scalar(i64::from(Layout::DROPPED_BITS))?;
        let bins = shifted.f_bitwise_and(Layout::BINS as i64 - 1)?.f_reshape([-1])?;
        let places = shared.places.f_narrow(0, 0, bins.size().first().copied().unwrap_or_default())?;
        Ok(places.f_where_self(&self.are_zero.f_reshape([-1])?, &bins)?)
    }

    /// The exponent of each value, as it is stored.
    pub(super) fn exponents(&self) -> Result<Tensor, Error> {
        Ok(self.magnitudes.f_bitwise_right_shift_tensor_scalar(MANTISSA_BITS)?)
    }

    /// Keys of the positive and of the negative value nearest to zero, of those that do not count as zero, for [`nearest`].
    ///
    /// As signed numbers the bits of negative values come first, by ascending magnitude, then those of positive ones; with
    /// the sign turned over it is the other way round. Zeros come last in both.
    pub(super) fn nearest_keys(&self) -> Result<[Tensor; 2], Error> {
        let mut keys = self.bits.f_masked_fill(&self.are_zero, MAGNITUDE)?;
        let negative = keys.f_min()?;
        Ok([keys.f_bitwise_xor_(SIGN)?.f_min()?, negative])
    }
}

/// The least magnitude that a key of one sign stands for; infinite for that of none.
pub(super) fn nearest(key: i32) -> f32 {
    let magnitude = (key as u32) ^ (1 << 31);
    if magnitude < f32::INFINITY.to_bits() { f32::from_bits(magnitude) } else { f32::INFINITY }
}
