//! Sums of `f32` values without any rounding, so that they do not depend on the order of the values.
//!
//! Values that count as zero (denormals) add nothing.

use super::MinMax;

/// Exponent of the unit: every finite `f32` is a whole multiple of 2^-149.
const UNIT_EXPONENT: i32 = -149;

/// Bits of a digit.
const DIGIT: u32 = 32;

/// Digits of a sum of 2^63 values below 2^128.
const DIGITS: usize = 11;

/// Additions after which a digit could overflow its 64 bits.
const CARRY_AFTER: u32 = 1 << 30;

/// Independent `f64` sums, so that they become vector instructions.
const LANES: usize = 16;

/// Values whose bits are taken layer by layer at a time, and the bits of that number.
const PIECE: usize = 64;
const PIECE_BITS: i32 = 7;

/// Bits of the mantissa of an `f32` and of an `f64`, the leading one included.
const SINGLE: i32 = 24;
const DOUBLE: i32 = 53;

/// A whole number of units in base 2^32.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExactSum {
    /// Least first; between carries each has bits of its successors in it.
    digits: [i64; DIGITS],
    additions: u32,
}

impl ExactSum {
    pub(super) const ZERO: Self = Self { digits: [0; DIGITS], additions: 0 };

    pub(super) const DIGITS: usize = DIGITS;

    /// Its digits, the same for equal sums.
    pub(super) fn digits(&self) -> [i64; DIGITS] {
        let mut carried = *self;
        carried.carry();
        carried.digits
    }

    /// The sum of these digits; `None` where they are not as [`digits`](Self::digits) gives them.
    pub(super) fn of_digits(digits: &[i64; DIGITS]) -> Option<Self> {
        let (last, rest) = digits.split_last()?;
        let are_carried = rest.iter().all(|&digit| (0..1 << DIGIT).contains(&digit)) && last.unsigned_abs() < 1 << 62;
        are_carried.then_some(Self { digits: *digits, additions: 1 })
    }

    /// Adds finite values of a block, which `seen` sums up.
    #[inline(always)]
    pub(super) fn add_block(&mut self, values: &[f32], seen: &MinMax) {
        let Some([least, greatest]) = seen.magnitudes() else { return };
        let length_bits = (usize::BITS - values.len().leading_zeros()) as i32;
        // All partial sums are multiples of the least value's last bit; they are exact while they fit a mantissa.
        if exponent(greatest.into()) + 1 + length_bits - (exponent(least.into()) - SINGLE + 1) <= DOUBLE {
            self.add(sum_in_lanes(values));
        } else {
            self.add_in_layers(values, greatest.into());
        }
    }

    /// Adds the values' leading bits, then what is left of them, until nothing is.
    #[inline(never)]
    fn add_in_layers(&mut self, values: &[f32], greatest: f64) {
        for piece in values.chunks(PIECE) {
            let mut rest = [0.0f64; PIECE];
            for (rest, &x) in rest.iter_mut().zip(piece) {
                *rest = flushed(x);
            }
            let mut greatest = greatest;
            while greatest > 0.0 {
                let unit = exponent(greatest) + 2 + PIECE_BITS - DOUBLE;
                // Adding this and taking it away again rounds to a multiple of 2^unit.
                let rounder = 1.5 * 2f64.powi(unit + DOUBLE - 1);
                let (mut sums, mut tops) = ([0.0f64; LANES], [0.0f64; LANES]);
                for part in rest.as_chunks_mut::<LANES>().0 {
                    for (lane, x) in part.iter_mut().enumerate() {
                        let leading = (*x + rounder) - rounder;
                        sums[lane] += leading;
                        *x -= leading;
                        tops[lane] = if x.abs() > tops[lane] { x.abs() } else { tops[lane] };
                    }
                }
                self.add(sums.iter().sum());
                greatest = tops.into_iter().fold(0.0, f64::max);
            }
        }
    }

    /// Adds a whole multiple of the unit.
    pub(super) fn add(&mut self, x: f64) {
        if x == 0.0 {
            return;
        }
        let mantissa = (x.to_bits() & ((1 << (DOUBLE - 1)) - 1)) | (1 << (DOUBLE - 1));
        let position = exponent(x) - (DOUBLE - 1) - UNIT_EXPONENT;
        let (mantissa, position) =
            if position < 0 { (mantissa >> -position, 0) } else { (mantissa, position.unsigned_abs()) };
        let shifted = u128::from(mantissa) << (position % DIGIT);
        for (place, digit) in self.digits.iter_mut().skip((position / DIGIT) as usize).take(3).enumerate() {
            let value = i64::from((shifted >> (DIGIT * place as u32)) as u32);
            *digit += if x < 0.0 { -value } else { value };
        }
        self.count_additions(1);
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (digit, other) in self.digits.iter_mut().zip(other.digits) {
            *digit += other;
        }
        self.count_additions(other.additions.max(1));
    }

    fn count_additions(&mut self, additions: u32) {
        self.additions += additions;
        if self.additions >= CARRY_AFTER {
            self.carry();
            self.additions = 1;
        }
    }

    /// Leaves 32 bits in each digit but the last, which has the sign.
    fn carry(&mut self) {
        let mut carry = 0;
        for digit in self.digits.iter_mut().take(DIGITS - 1) {
            let sum = *digit + carry;
            *digit = i64::from(sum as u32);
            carry = sum >> DIGIT;
        }
        if let Some(last) = self.digits.last_mut() {
            *last += carry;
        }
    }

    /// The sum, rounded once.
    pub(super) fn value(&self) -> f64 {
        let mut magnitude = *self;
        magnitude.carry();
        let is_negative = magnitude.digits.last().is_some_and(|&last| last < 0);
        if is_negative {
            magnitude.digits = magnitude.digits.map(|digit| -digit);
            magnitude.carry();
        }
        let top = magnitude.digits.iter().rposition(|&digit| digit != 0).unwrap_or(0);
        let first = top.saturating_sub(2);
        let leading =
            magnitude.digits[first..=top].iter().rev().fold(0u128, |sum, &digit| (sum << DIGIT) | digit as u128);
        // At least 65 bits, of which 53 remain: one more bit stands for all that is below.
        let below = magnitude.digits[..first].iter().any(|&digit| digit != 0);
        let value = ((leading << 1) | u128::from(below)) as f64 * 2f64.powi(UNIT_EXPONENT - 1 + 32 * first as i32);
        if is_negative { -value } else { value }
    }
}

impl PartialEq for ExactSum {
    fn eq(&self, other: &Self) -> bool {
        let [mut a, mut b] = [*self, *other];
        a.carry();
        b.carry();
        a.digits == b.digits
    }
}

#[inline(always)]
fn sum_in_lanes(values: &[f32]) -> f64 {
    let (groups, rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for group in groups {
        for (sum, &x) in sums.iter_mut().zip(group) {
            *sum += flushed(x);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|&x| flushed(x)).sum::<f64>()
}

/// 0 instead of a denormal.
#[inline(always)]
fn flushed(x: f32) -> f64 {
    let mask = if x.abs() < f32::MIN_POSITIVE { 0 } else { u32::MAX };
    f64::from(f32::from_bits(x.to_bits() & mask))
}

/// The exponent of a number that is finite and normal in `f64`, as every `f32` but 0 is.
#[inline(always)]
fn exponent(x: f64) -> i32 {
    ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::statistics::histogram::BLOCK;

    fn sum(values: &[f32]) -> ExactSum {
        let mut sum = ExactSum::ZERO;
        for block in values.chunks(BLOCK) {
            let mut seen = MinMax::new();
            seen.observe(block);
            sum.add_block(block, &seen);
        }
        sum
    }

    fn any_finite() -> impl Strategy<Value = f32> {
        prop_oneof![
            -10f32..10.0,
            any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite()),
            Just(0.0),
            Just(1e-40),
        ]
    }

    #[test]
    fn cancels_without_a_trace() {
        assert_eq!(sum(&[f32::MAX, 1.0, f32::MIN_POSITIVE, -f32::MAX]).value(), 1.0 + f64::from(f32::MIN_POSITIVE));
        assert_eq!(sum(&[f32::MAX, f32::MIN_POSITIVE, -f32::MAX]).value(), f64::from(f32::MIN_POSITIVE));
        assert_eq!(sum(&[f32::MAX; 5000]).value(), f64::from(f32::MAX) * 5000.0);
        assert_eq!(sum(&[-0.1; 5000]).value(), -f64::from(0.1f32) * 5000.0);
        assert_eq!(sum(&[1e-40, -0.0]).value(), 0.0);
    }

    #[test]
    fn rounds_once() {
        // 2^53 and 2^-60 and a half: just above the tie between 2^53 and 2^53 + 2.
        let tie = [2f32.powi(53), 1.0];
        assert_eq!(sum(&tie).value(), 2f64.powi(53));
        assert_eq!(sum(&[tie[0], tie[1], 2f32.powi(-60)]).value(), 2f64.powi(53) + 2.0);
    }

    #[test]
    fn carries_in_time() {
        let mut many = ExactSum { digits: [i64::from(u32::MAX); DIGITS], additions: CARRY_AFTER - 1 };
        let before = many.value();
        many.add(1.0);
        assert_eq!((many.additions, many.value() >= before), (1, true));
        assert!(many.digits.iter().take(DIGITS - 1).all(|&digit| digit <= i64::from(u32::MAX)));
    }

    proptest! {
        #[test]
        fn order_and_parts_do_not_matter(values in prop::collection::vec(any_finite(), 0..600), cut in 0usize..600) {
            let whole = sum(&values);
            let reversed: Vec<f32> = values.iter().rev().copied().collect();
            prop_assert_eq!(sum(&reversed), whole);
            let (head, tail) = values.split_at(cut.min(values.len()));
            let mut merged = sum(tail);
            merged.merge(&sum(head));
            prop_assert_eq!(merged, whole);
            prop_assert_eq!(merged.value().to_bits(), whole.value().to_bits());
        }

        #[test]
        fn equals_integer_arithmetic(values in prop::collection::vec((-1_000_000i64..1_000_000, -20..20i32), 1..50)) {
            let floats: Vec<f32> = values.iter().map(|&(m, e)| m as f32 * 2f32.powi(e)).collect();
            let exact: i64 = values.iter().map(|&(m, e)| m << (e + 20)).sum();
            prop_assert_eq!(sum(&floats).value(), exact as f64 * 2f64.powi(-20));
        }
    }
}
