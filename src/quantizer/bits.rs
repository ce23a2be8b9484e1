//! The width of a quantizer, and sets of widths. It knows no grid.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Width of a quantizer: 2 to 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u8")]
pub struct Bits(u8);

/// A width outside 2 to 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bits must be from 2 to 16, found {0}")]
pub struct BitsError(u64);

impl Bits {
    /// The narrowest quantizer, 2 bits.
    pub const MIN: Self = Self(2);
    /// The widest quantizer, 16 bits.
    pub const MAX: Self = Self(16);

    /// The number of bits.
    pub fn get(self) -> u8 {
        self.0
    }

    /// One bit fewer, down to [`MIN`](Self::MIN).
    #[must_use]
    pub fn narrower(self) -> Self {
        Self(self.0 - 1).max(Self::MIN)
    }

    /// The number of levels, 2^bits: from 4 to 65536.
    pub fn level_count(self) -> i32 {
        1 << self.0
    }
}

impl TryFrom<u64> for Bits {
    type Error = BitsError;

    fn try_from(bits: u64) -> Result<Self, BitsError> {
        match u8::try_from(bits).map(Self) {
            Ok(width) if (Self::MIN..=Self::MAX).contains(&width) => Ok(width),
            _ => Err(BitsError(bits)),
        }
    }
}

impl From<Bits> for u8 {
    fn from(bits: Bits) -> Self {
        bits.0
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Widths to choose from: at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths(u32);

impl Widths {
    /// This width alone.
    #[must_use]
    pub fn only(bits: Bits) -> Self {
        Self(1 << bits.0)
    }

    /// With this width too.
    #[must_use]
    pub fn with(self, bits: Bits) -> Self {
        Self(self.0 | 1 << bits.0)
    }

    /// All of them, ascending.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = Bits> {
        (Bits::MIN.0..=Bits::MAX.0).filter(move |bits| self.0 >> bits & 1 == 1).map(Bits)
    }

    /// The smallest.
    #[must_use]
    pub fn narrowest(self) -> Bits {
        self.iter().next().unwrap_or(Bits::MIN)
    }

    /// The largest.
    #[must_use]
    pub fn widest(self) -> Bits {
        self.iter().next_back().unwrap_or(Bits::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_a_set() {
        let [four, eight] = [4u64, 8].map(|bits| Bits::try_from(bits).unwrap());
        let widths = Widths::only(eight).with(Bits::MAX).with(four).with(eight).with(Bits::MIN);
        assert_eq!(widths.iter().map(Bits::get).collect::<Vec<_>>(), [2, 4, 8, 16]);
        assert_eq!((widths.narrowest(), widths.widest()), (Bits::MIN, Bits::MAX));
        assert_eq!((Widths::only(four).narrowest(), Widths::only(four).widest()), (four, four));
    }

    #[test]
    fn accepts_2_to_16() {
        for bits in 2..=16 {
            assert_eq!(Bits::try_from(bits).map(Bits::get), Ok(bits as u8));
        }
        for bits in [0, 1, 17, 256 + 8, u64::MAX] {
            assert_eq!(Bits::try_from(bits), Err(BitsError(bits)));
        }
    }

    #[test]
    fn names_the_bound_and_the_value() {
        assert_eq!(BitsError(17).to_string(), "bits must be from 2 to 16, found 17");
        let error = serde_json::from_str::<Bits>("17").unwrap_err().to_string();
        assert!(error.starts_with("bits must be from 2 to 16, found 17"), "{error}");
        assert_eq!(serde_json::to_string(&Bits::MAX).unwrap(), "16");
    }
}
