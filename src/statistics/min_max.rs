//! Extremes and counts of a stream of values. It refuses to give extremes of nothing, or of data with a NaN in it.

/// Values summarised before the 32-bit counter is added up.
const BLOCK: usize = 4096;

/// All bits of an `f32` but its sign.
const MAGNITUDE: u32 = u32::MAX >> 1;

/// Streaming minimum, maximum and counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinMax {
    min: f32,
    max: f32,
    count: u64,
    zeros: u64,
    nans: u64,
    infinities: u64,
}

/// The extremes of at least one value, all finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observed {
    min: f32,
    max: f32,
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
        Self { min: f32::INFINITY, max: f32::NEG_INFINITY, count: 0, zeros: 0, nans: 0, infinities: 0 }
    }

    /// Adds these values.
    pub fn observe(&mut self, values: &[f32]) {
        for block in values.chunks(BLOCK) {
            self.merge(&summary(block));
        }
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.count += other.count;
        self.zeros += other.zeros;
        self.nans += other.nans;
        self.infinities += other.infinities;
    }

    /// Number of values seen, NaN and infinities included.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The extremes; `None` if no value was seen.
    ///
    /// # Errors
    /// If a NaN or an infinity was seen.
    pub fn observed(&self) -> Result<Option<Observed>, NotFinite> {
        let Self { min, max, count, zeros, nans, infinities } = *self;
        if nans > 0 || infinities > 0 {
            return Err(NotFinite { nans, infinities, count });
        }
        Ok((count > 0).then_some(Observed { min, max, count, zeros }))
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

/// Summarises without a branch per value; a block in which something is not finite is gone through again.
///
/// In integers, because those loops become vector instructions: `f32` reductions keep the order of a scalar loop.
fn summary(block: &[f32]) -> MinMax {
    let (mut min, mut max, mut zeros) = (i32::MAX, i32::MIN, 0u32);
    for &x in block {
        let key = ordered(x.to_bits() as i32);
        min = min.min(key);
        max = max.max(key);
        zeros += u32::from(x.to_bits() & MAGNITUDE < f32::MIN_POSITIVE.to_bits());
    }
    let finite = ordered(f32::MIN.to_bits() as i32)..=ordered(f32::MAX.to_bits() as i32);
    if !(finite.contains(&min) && finite.contains(&max)) {
        return summary_one_by_one(block);
    }
    MinMax {
        min: without_sign_of_zero(f32::from_bits(ordered(min) as u32)),
        max: without_sign_of_zero(f32::from_bits(ordered(max) as u32)),
        count: block.len() as u64,
        zeros: u64::from(zeros),
        nans: 0,
        infinities: 0,
    }
}

/// Turns the bits of an `f32` into an integer of the same order, as `f32::total_cmp` does, and back: infinities and NaN
/// come before and after all finite values.
#[inline(always)]
fn ordered(bits: i32) -> i32 {
    bits ^ ((bits >> 31) & i32::MAX)
}

/// The summary of any values, slowly; the extremes are those of the finite ones.
fn summary_one_by_one(values: &[f32]) -> MinMax {
    let finite = || values.iter().copied().filter(|x| x.is_finite());
    MinMax {
        min: without_sign_of_zero(finite().fold(f32::INFINITY, f32::min)),
        max: without_sign_of_zero(finite().fold(f32::NEG_INFINITY, f32::max)),
        count: values.len() as u64,
        zeros: finite().filter(|x| x.abs() < f32::MIN_POSITIVE).count() as u64,
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

    fn bits_of(m: &MinMax) -> (u32, u32, [u64; 4]) {
        (m.min.to_bits(), m.max.to_bits(), [m.count, m.zeros, m.nans, m.infinities])
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
        let seen = of(&[3.0, -0.0, -2.5, 1e-40, 0.0, 3.0]).observed().unwrap().unwrap();
        assert_eq!(seen, Observed { min: -2.5, max: 3.0, count: 6, zeros: 3 });
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
