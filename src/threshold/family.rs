//! The thresholds that one tensor or channel can have on its grid, by their scale. It knows no error method.

use crate::quantizer::{Bits, Grid, QuantParams, Range, Scheme, Threshold};
use crate::statistics::Observed;

/// Whether a symmetric grid has negative levels; a uniform one always reaches below zero as far as its range does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sign {
    Signed,
    Unsigned,
}

/// Levels on either side of zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) below: u32,
    pub(super) above: u32,
}

impl Ends {
    /// Those of a quantizer.
    pub(super) fn of(params: &QuantParams) -> Self {
        Self {
            below: (params.zero_point() - params.quant_min()).unsigned_abs(),
            above: (params.quant_max() - params.zero_point()).unsigned_abs(),
        }
    }
}

/// One threshold for each scale; a uniform range keeps its lower end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    scheme: Scheme,
    sign: Sign,
    data: Range,
}

impl Family {
    pub(super) fn new(data: Observed, sign: Sign, scheme: Scheme) -> Self {
        let data = Range { lo: f64::from(data.min()), hi: f64::from(data.max()) }.with_zero();
        Self { scheme, sign, data }
    }

    pub(super) fn bits(self) -> Bits {
        self.scheme.bits
    }

    pub(super) fn grid(self) -> Grid {
        self.scheme.grid
    }

    /// The smallest scale whose outermost levels enclose the data, before any snapping; on a power-of-two grid a power
    /// of two.
    pub(super) fn enclosing_scale(self) -> f64 {
        let count = f64::from(self.scheme.bits.level_count());
        let Range { lo, hi } = self.data;
        let symmetric = match self.sign {
            Sign::Signed => (-lo / (count / 2.0)).max(hi / (count / 2.0 - 1.0)),
            Sign::Unsigned => hi / (count - 1.0),
        };
        match self.scheme.grid {
            Grid::Symmetric => symmetric,
            Grid::PowerOfTwo => next_power_of_two(symmetric),
            Grid::Uniform => (hi - lo) / (count - 1.0),
        }
    }

    pub(super) fn with_scale(self, scale: f64) -> Threshold {
        let count = f64::from(self.scheme.bits.level_count());
        match (self.scheme.grid, self.sign) {
            (Grid::Uniform, _) => {
                let lo = self.data.lo;
                Threshold::Uniform(Range { lo, hi: lo + scale * (count - 1.0) })
            }
            (Grid::Symmetric | Grid::PowerOfTwo, Sign::Signed) => Threshold::Signed(scale * (count / 2.0)),
            (Grid::Symmetric | Grid::PowerOfTwo, Sign::Unsigned) => Threshold::Unsigned(scale * count),
        }
    }

    /// The levels of a symmetric grid; `None` where the zero point is free.
    pub(super) fn ends(self) -> Option<Ends> {
        let count = self.scheme.bits.level_count().unsigned_abs();
        match (self.scheme.grid, self.sign) {
            (Grid::Uniform, _) => None,
            (_, Sign::Signed) => Some(Ends { below: count / 2, above: count / 2 - 1 }),
            (_, Sign::Unsigned) => Some(Ends { below: 0, above: count - 1 }),
        }
    }

    /// The threshold with this scale and, on a uniform grid, this zero point.
    pub(super) fn with_zero_point(self, scale: f64, zero_point: i32) -> Threshold {
        if self.scheme.grid != Grid::Uniform {
            return self.with_scale(scale);
        }
        let last = self.scheme.bits.level_count() - 1;
        Threshold::Uniform(Range { lo: -scale * f64::from(zero_point), hi: scale * f64::from(last - zero_point) })
    }

    /// The threshold of a quantizer of this family.
    pub(super) fn of_params(self, params: &QuantParams) -> Threshold {
        self.with_zero_point(params.scale().into(), params.zero_point()).snapped(self.scheme.bits)
    }

    /// Whether a quantizer of this grid can have this scale; the largest `f32`, where scales end, is no power of two.
    pub(super) fn has_scale(self, scale: f32) -> bool {
        self.is_continuous() || next_power_of_two(f64::from(scale)) == f64::from(scale)
    }

    /// Whether any scale will do, not powers of two alone.
    pub(super) fn is_continuous(self) -> bool {
        self.scheme.grid != Grid::PowerOfTwo
    }
}

/// The smallest power of two at or above `x`, which is positive and normal in `f64`, as every quotient of an `f32` is.
fn next_power_of_two(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let below = f64::from_bits(x.to_bits() & !MANTISSA);
    if below < x { below * 2.0 } else { below }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two() {
        for e in [-140, -126, -1, 0, 1, 100, 128] {
            let power = 2f64.powi(e);
            assert_eq!(next_power_of_two(power), power);
            assert_eq!(next_power_of_two(power.next_up()), power * 2.0);
            assert_eq!(next_power_of_two(power.next_down()), power);
        }
    }
}
