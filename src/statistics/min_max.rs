//! Extremes and counts of a stream of values. It refuses to give extremes of nothing, or of data with a NaN in it.

/// Values summarised before the 32-bit counter is added up.
const BLOCK: usize = 4096;

/// The sign of an `f32`.
const SIGN: u32 = 1 << 31;

/// All its other bits.
const MAGNITUDE: u32 = SIGN - 1;

/// The smallest magnitude that does not count as zero.
const NORMAL: u32 = f32::MIN_POSITIVE.to_bits();

/// The first magnitude that is not finite.
const INFINITE: u32 = f32::INFINITY.to_bits();

/// Streaming minimum, maximum and counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinMax {
    pub(super) min: f32,
    pub(super) max: f32,
    /// Infinite without a positive value that does not count as zero.
    pub(super) smallest_positive: f32,
    /// Negative infinity without a negative value that does not count as zero.
    pub(super) largest_negative: f32,
    pub(super) count: u64,
    pub(super) zeros: u64,
    pub(super) nans: u64,
    pub(super) infinities: u64,
}

/// The extremes of at least one value, all finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observed {
    min: f32,
    max: f32,
    smallest_positive: f32,
    largest_negative: f32,
    count: u64,
    zeros: u64,
}

/// NaN or infinity in data that must be finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected finite values, found {nans} NaN and {infinities} infinite among {count}")]
pub struct NotFinite {
    /// Number of NaN.
    pub nans: u64,
    /// Number of infinities of both signs.
    pub infinities: u64,
    /// Number of values in all.
    pub count: u64,
}

impl MinMax {
    /// Of no value yet.
    pub fn new() -> Self {
        Self {
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            smallest_positive: f32::INFINITY,
            largest_negative: f32::NEG_INFINITY,
            count: 0,
            zeros: 0,
            nans: 0,
            infinities: 0,
        }
    }

    /// Adds these values.
    pub fn observe(&mut self, values: &[f32]) {
        pulp::Arch::new().dispatch(Observe { min_max: self, values });
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.smallest_positive = self.smallest_positive.min(other.smallest_positive);
        self.largest_negative = self.largest_negative.max(other.largest_negative);
        self.count += other.count;
        self.zeros += other.zeros;
        self.nans += other.nans;
        self.infinities += other.infinities;
    }

    /// Of at most [`BLOCK`] values, to be inlined where the machine's vector instructions are on.
    #[inline(always)]
    pub(super) fn of_block(block: &[f32]) -> Self {
        summary(block)
    }

    /// Of the values seen that count as zero; where a denormal is no extreme of all values, its place is not known.
    pub(super) fn of_zeros(&self) -> Self {
        if self.zeros == 0 {
            return Self::new();
        }
        let nearest = 0f32.clamp(self.min, self.max);
        let [min, max] = [self.min, self.max].map(|x| if x.abs() < f32::MIN_POSITIVE { x } else { nearest });
        Self { min, max, count: self.zeros, zeros: self.zeros, ..Self::new() }
    }

    /// Of the NaN and infinities seen.
    pub(super) fn of_not_finite(&self) -> Self {
        let Self { nans, infinities, .. } = *self;
        Self { count: nans + infinities, nans, infinities, ..Self::new() }
    }

    /// Of `count` of the values seen: those, none of them zero, that share these first bits.
    pub(super) fn within_bits(&self, first: u32, last: u32, count: u64) -> Self {
        let ends = [first, last].map(|bits| f32::from_bits(bits).clamp(self.min, self.max));
        let (min, max) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
        if min > 0.0 {
            let smallest_positive = min.max(self.smallest_positive);
            Self { min: smallest_positive, max, smallest_positive, count, ..Self::new() }
        } else {
            let largest_negative = max.min(self.largest_negative);
            Self { min, max: largest_negative, largest_negative, count, ..Self::new() }
        }
    }

    /// Number of values seen, NaN and infinities included.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of values that count as zero.
    pub(super) fn zeros(&self) -> u64 {
        self.zeros
    }

    /// Whether no NaN and no infinity was seen.
    pub(super) fn is_finite(&self) -> bool {
        self.nans == 0 && self.infinities == 0
    }

    /// The least and the greatest magnitude of the values that do not count as zero.
    #[inline(always)]
    pub(super) fn magnitudes(&self) -> Option<[f32; 2]> {
        let least = self.smallest_positive.min(-self.largest_negative);
        least.is_finite().then_some([least, self.max.max(-self.min)])
    }

    /// The smallest value; infinite of nothing.
    pub(super) fn min(&self) -> f32 {
        self.min
    }

    /// The largest value; negative infinity of nothing.
    pub(super) fn max(&self) -> f32 {
        self.max
    }

    /// The positive values that are least and greatest in magnitude, of those that do not count as zero.
    pub(super) fn positive(&self) -> Option<[f32; 2]> {
        self.smallest_positive.is_finite().then_some([self.smallest_positive, self.max])
    }

    /// The negative values that are least and greatest in magnitude, of those that do not count as zero.
    pub(super) fn negative(&self) -> Option<[f32; 2]> {
        self.largest_negative.is_finite().then_some([self.largest_negative, self.min])
    }

    /// The extremes; `None` if no value was seen.
    ///
    /// # Errors
    /// If a NaN or an infinity was seen.
    pub fn observed(&self) -> Result<Option<Observed>, NotFinite> {
        let Self { min, max, smallest_positive, largest_negative, count, zeros, nans, infinities } = *self;
        if nans > 0 || infinities > 0 {
            return Err(NotFinite { nans, infinities, count });
        }
        Ok((count > 0).then_some(Observed { min, max, smallest_positive, largest_negative, count, zeros }))
    }
}

impl Default for MinMax {
    fn default() -> Self {
        Self::new()
    }
}

impl Observed {
    /// The smallest value; never −0.0.
    pub fn min(&self) -> f32 {
        self.min
    }

    /// The largest value; never −0.0.
    pub fn max(&self) -> f32 {
        self.max
    }

    /// The smallest positive value that does not count as zero; infinite if there is none.
    pub fn smallest_positive(&self) -> f32 {
        self.smallest_positive
    }

    /// The negative value nearest to zero that does not count as zero; negative infinity if there is none.
    pub fn largest_negative(&self) -> f32 {
        self.largest_negative
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of values that count as zero: zeros of both signs and denormals.
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    /// Whether every value counts as zero.
    pub fn is_all_zero(&self) -> bool {
        self.zeros == self.count
    }

    /// Whether all values are equal.
    pub fn is_constant(&self) -> bool {
        self.min == self.max
    }

    /// Whether some value is negative; a negative denormal counts as zero.
    pub fn has_negative(&self) -> bool {
        self.min <= -f32::MIN_POSITIVE
    }
}

/// [`MinMax::observe`], compiled for each set of vector instructions. A type, because a closure would not be inlined there.
struct Observe<'a> {
    min_max: &'a mut MinMax,
    values: &'a [f32],
}

impl pulp::NullaryFnOnce for Observe<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for block in self.values.chunks(BLOCK) {
            self.min_max.merge(&summary(block));
        }
    }
}

/// Summarises without a branch per value; a block in which something is not finite is gone through again.
///
/// In integers, because those loops become vector instructions: `f32` reductions keep the order of a scalar loop. Read as
/// unsigned numbers the bits of an `f32` ascend from 0 to the largest positive value and then from −0 to the most negative
/// one; read as signed numbers the second half comes first.
#[inline(always)]
fn summary(block: &[f32]) -> MinMax {
    let mut keys = Keys { low: i32::MAX, high: i32::MIN, bottom: u32::MAX, top: 0 };
    let (mut above_zero, mut below_zero, mut zeros) = (u32::MAX, u32::MAX, 0u32);
    for &x in block {
        let bits = x.to_bits();
        keys.low = keys.low.min(bits as i32);
        keys.high = keys.high.max(bits as i32);
        keys.bottom = keys.bottom.min(bits);
        keys.top = keys.top.max(bits);
        above_zero = above_zero.min(bits.wrapping_sub(NORMAL));
        below_zero = below_zero.min(bits.wrapping_sub(NORMAL | SIGN));
        zeros += u32::from(bits & MAGNITUDE < NORMAL);
    }
    if keys.high >= INFINITE as i32 || keys.top >= INFINITE | SIGN {
        return summary_one_by_one(block);
    }
    let normal = |key: u32| if key < INFINITE - NORMAL { f32::from_bits(key + NORMAL) } else { f32::INFINITY };
    let (min, max) = keys.extremes();
    MinMax {
        min,
        max,
        smallest_positive: normal(above_zero),
        largest_negative: -normal(below_zero),
        count: block.len() as u64,
        zeros: u64::from(zeros),
        nans: 0,
        infinities: 0,
    }
}

/// Extremes of the bits of values, as signed (`low`, `high`) and unsigned (`bottom`, `top`) integers.
struct Keys {
    low: i32,
    high: i32,
    bottom: u32,
    top: u32,
}

impl Keys {
    /// The least and the greatest value.
    fn extremes(&self) -> (f32, f32) {
        let has_positive = self.high >= 0;
        let has_negative = self.top >= SIGN;
        let max = if has_positive { self.high } else { self.low } as u32;
        let min = if has_negative { self.top } else { self.bottom };
        (without_sign_of_zero(f32::from_bits(min)), without_sign_of_zero(f32::from_bits(max)))
    }
}

/// The summary of any values, slowly; the extremes are those of the finite ones.
fn summary_one_by_one(values: &[f32]) -> MinMax {
    let finite = || values.iter().copied().filter(|x| x.is_finite());
    let zeros = finite().filter(|x| x.abs() < f32::MIN_POSITIVE).count() as u64;
    MinMax {
        min: without_sign_of_zero(finite().fold(f32::INFINITY, f32::min)),
        max: without_sign_of_zero(finite().fold(f32::NEG_INFINITY, f32::max)),
        smallest_positive: finite().filter(|&x| x >= f32::MIN_POSITIVE).fold(f32::INFINITY, f32::min),
        largest_negative: finite().filter(|&x| x <= -f32::MIN_POSITIVE).fold(f32::NEG_INFINITY, f32::max),
        count: values.len() as u64,
        zeros,
        nans: values.iter().filter(|x| x.is_nan()).count() as u64,
        infinities: values.iter().filter(|x| x.is_infinite()).count() as u64,
    }
}

/// −0.0 becomes 0.0: which of two equal zeros is met first must not show.
fn without_sign_of_zero(x: f32) -> f32 {
    x + 0.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: &[f32]) -> MinMax {
        let mut min_max = MinMax::new();
        min_max.observe(values);
        min_max
    }

    fn bits_of(m: &MinMax) -> ([u32; 4], [u64; 4]) {
        let extremes = [m.min, m.max, m.smallest_positive, m.largest_negative];
        (extremes.map(f32::to_bits), [m.count, m.zeros, m.nans, m.infinities])
    }

    fn any_f32() -> impl Strategy<Value = f32> {
        let special =
            [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, f32::MIN_POSITIVE, f32::MAX, f32::MIN, f32::NAN, f32::INFINITY];
        prop_oneof![
            4 => -10f32..10.0,
            2 => any::<u32>().prop_map(f32::from_bits),
            1 => prop::sample::select(special.to_vec())
        ]
    }

    #[test]
    fn nothing_has_no_extremes() {
        assert_eq!(MinMax::new().observed(), Ok(None));
        assert_eq!(of(&[]).observed(), Ok(None));
        assert_eq!(MinMax::default().count(), 0);
    }

    #[test]
    fn counts_and_extremes() {
        let seen = of(&[3.0, -0.0, -2.5, 1e-40, 0.0, 3.0, 0.5, -7.0]).observed().unwrap().unwrap();
        let (smallest_positive, largest_negative) = (0.5, -2.5);
        assert_eq!(seen, Observed { min: -7.0, max: 3.0, smallest_positive, largest_negative, count: 8, zeros: 3 });
        assert!(seen.has_negative() && !seen.is_constant() && !seen.is_all_zero());
        let zero = of(&[-0.0, 0.0, -1e-40]).observed().unwrap().unwrap();
        assert!(zero.is_all_zero() && !zero.has_negative());
        let constant = of(&[0.5; 9]).observed().unwrap().unwrap();
        assert!(constant.is_constant() && !constant.is_all_zero());
        let zeros = of(&[-0.0; 9]).observed().unwrap().unwrap();
        assert_eq!((zeros.min().to_bits(), zeros.max().to_bits()), (0, 0));
    }

    #[test]
    fn finds_one_nan_or_infinity_anywhere() {
        for length in [1, 7, 8, 9, BLOCK, BLOCK + 3] {
            for place in [0, length / 2, length - 1] {
                for (odd, nans) in [(f32::NAN, 1), (-f32::NAN, 1), (f32::INFINITY, 0), (f32::NEG_INFINITY, 0)] {
                    let mut values = vec![1.0; length];
                    values[place] = odd;
                    let found = NotFinite { nans, infinities: 1 - nans, count: length as u64 };
                    assert_eq!(of(&values).observed(), Err(found), "{odd} at {place} of {length}");
                }
            }
        }
        let text = of(&[f32::NAN, 1.0]).observed().unwrap_err().to_string();
        assert_eq!(text, "expected finite values, found 1 NaN and 0 infinite among 2");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn equals_the_naive_loop(values in prop::collection::vec(any_f32(), 0..2 * BLOCK)) {
            prop_assert_eq!(bits_of(&of(&values)), bits_of(&summary_one_by_one(&values)));
        }

        #[test]
        fn merging_equals_observing_all(
            values in prop::collection::vec(any_f32(), 0..3000),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
            rotation in any::<prop::sample::Index>(),
        ) {
            let whole = of(&values);
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(values.len() + 1)).collect();
            ends.extend([0, values.len()]);
            ends.sort_unstable();
            let mut parts: Vec<&[f32]> = ends.windows(2).map(|ends| &values[ends[0]..ends[1]]).collect();
            let rotation = rotation.index(parts.len());
            parts.rotate_left(rotation);
            let mut merged = MinMax::new();
            let mut streamed = MinMax::new();
            for part in parts {
                let reversed: Vec<f32> = part.iter().rev().copied().collect();
                merged.merge(&of(&reversed));
                streamed.observe(part);
            }
            prop_assert_eq!(bits_of(&merged), bits_of(&whole));
            prop_assert_eq!(bits_of(&streamed), bits_of(&whole));
        }
    }
}
