//! Statistics as plain arrays, for files: what was written is read again bit for bit, and what no data can have is refused.

use super::channels::Channel;
use super::exact_sum::ExactSum;
use super::histogram::{BINS_PER_OCTAVE, NEGATIVE, Octaves, bin_of};
use super::weighted::has_bins;
use super::{Activation, Channels, Histogram, MinMax};

/// More values than any data has; as many files as there may be can be added up without an overflow.
const MOST_VALUES: u64 = 1 << 48;

/// An [`Activation`] whose values are all finite.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ActivationArrays {
    /// Numbers of the bins that hold values, ascending: the bits of an `f32` without its last 13.
    pub bins: Vec<u32>,
    /// Values in each of them.
    pub counts: Vec<u64>,
    /// The smallest and the largest value, the smallest positive and the largest negative one; infinite where there is none.
    pub extremes: Vec<f32>,
    /// All values, and those that count as zero.
    pub totals: Vec<u64>,
    /// Values of each channel; empty where there are no values, or where tensors had different numbers of channels.
    pub channel_counts: Vec<u64>,
    /// The smallest and the largest value of each channel.
    pub channel_extremes: Vec<f32>,
    /// The exact sum of each channel, in units of 2^-149, as [`DIGITS`](Self::DIGITS) digits to the base 2^32, least first; the last
    /// one has the sign.
    pub channel_sums: Vec<i64>,
    /// Whether tensors had different numbers of channels.
    pub has_mixed_channels: bool,
}

impl ActivationArrays {
    /// Digits of the sum of a channel.
    pub const DIGITS: usize = ExactSum::DIGITS;

    /// Those of an activation; NaN and infinities that it counted are left out.
    pub fn of(activation: &Activation) -> Self {
        let Activation { histogram, channels } = activation;
        let (mut bins, mut counts) = (Vec::new(), Vec::new());
        histogram.for_each_bin(0..2 * NEGATIVE, |number, count, _| {
            bins.push(number);
            counts.push(count);
        });
        let seen = histogram.min_max();
        let known = channels.get().unwrap_or_default();
        Self {
            bins,
            counts,
            extremes: vec![seen.min, seen.max, seen.smallest_positive, seen.largest_negative],
            totals: vec![seen.count - seen.nans - seen.infinities, seen.zeros],
            channel_counts: known.iter().map(Channel::count).collect(),
            channel_extremes: known.iter().flat_map(|channel| [channel.min(), channel.max()]).collect(),
            channel_sums: known.iter().flat_map(|channel| channel.exact_sum().digits()).collect(),
            has_mixed_channels: channels.is_mixed(),
        }
    }

    /// The activation; `None` where no values have such arrays.
    pub fn activation(&self) -> Option<Activation> {
        let histogram = self.histogram()?;
        let channels = self.channels(histogram.min_max())?;
        Some(Activation { histogram, channels })
    }

    fn histogram(&self) -> Option<Histogram> {
        let [min, max, smallest_positive, largest_negative] = *self.extremes.as_slice() else { return None };
        let [count, zeros] = *self.totals.as_slice() else { return None };
        let seen = MinMax { min, max, smallest_positive, largest_negative, count, zeros, nans: 0, infinities: 0 };
        let in_bins = self.counts.iter().try_fold(0u64, |sum, &count| sum.checked_add(count))?;
        let are_bins = self.bins.len() == self.counts.len()
            && self.bins.is_sorted_by(|a, b| a < b)
            && self.bins.iter().all(|&bin| octave_of(bin).is_some_and(has_bins))
            && self.counts.iter().all(|&count| count > 0);
        if !are_bins || in_bins.checked_add(zeros) != Some(count) || count > MOST_VALUES || !self.fits(&seen) {
            return None;
        }
        let mut octaves = Octaves::default();
        let mut counted = self.bins.iter().zip(&self.counts).peekable();
        while let Some(octave) = counted.peek().and_then(|(bin, _)| octave_of(**bin)) {
            let mut counts = [0u64; BINS_PER_OCTAVE];
            while let Some((&bin, &count)) = counted.next_if(|(bin, _)| octave_of(**bin) == Some(octave)) {
                counts[bin as usize % BINS_PER_OCTAVE] = count;
            }
            octaves.add_wide(octave, &counts);
        }
        Some(Histogram::of_parts(seen, octaves))
    }

    /// Whether the extremes are those of values in these bins.
    fn fits(&self, seen: &MinMax) -> bool {
        let negative = self.bins.partition_point(|&bin| octave_of(bin).is_some_and(|octave| octave < NEGATIVE));
        let (positive, negative) = self.bins.split_at(negative);
        let is_zero = |x: f32| x.abs() < f32::MIN_POSITIVE;
        // Of one sign: the value nearest to zero and the one farthest from it.
        let of_sign = |bins: &[u32], nearest: f32, farthest: f32, none: f32| match (bins.first(), bins.last()) {
            (Some(&first), Some(&last)) => {
                bin_of(nearest) == first && bin_of(farthest) == last && nearest.abs() <= farthest.abs()
            }
            _ => nearest.to_bits() == none.to_bits(),
        };
        // Without values of a sign the extreme is the least of the others, or one that counts as zero.
        let is_other = |extreme: f32, nearest: f32| {
            if seen.zeros > 0 { is_zero(extreme) } else { extreme.to_bits() == nearest.to_bits() }
        };
        let at_positive = of_sign(positive, seen.smallest_positive, seen.max, f32::INFINITY);
        let at_negative = of_sign(negative, seen.largest_negative, seen.min, f32::NEG_INFINITY);
        // Of nothing at all these are infinite, as those of MinMax::new.
        let at_top = !positive.is_empty() || is_other(seen.max, seen.largest_negative);
        let at_bottom = !negative.is_empty() || is_other(seen.min, seen.smallest_positive);
        at_positive && at_negative && at_top && at_bottom && (seen.count == 0 || seen.min <= seen.max)
    }

    fn channels(&self, seen: &MinMax) -> Option<Channels> {
        let Self { channel_counts, channel_extremes, channel_sums, .. } = self;
        let (extremes, rest) = channel_extremes.as_chunks::<2>();
        let (sums, others) = channel_sums.as_chunks::<{ ExactSum::DIGITS }>();
        let count = channel_counts.len();
        let is_whole = rest.is_empty() && others.is_empty() && extremes.len() == count && sums.len() == count;
        if !is_whole || (self.has_mixed_channels && count > 0) {
            return None;
        }
        if count == 0 {
            // Values that are not mixed have channels.
            return (self.has_mixed_channels || seen.count == 0).then(|| Channels::unknown(self.has_mixed_channels));
        }
        let total = channel_counts.iter().try_fold(0u64, |sum, &count| sum.checked_add(count))?;
        let mut channels = Vec::with_capacity(count);
        for ((&count, &[min, max]), digits) in channel_counts.iter().zip(extremes).zip(sums) {
            let is_inside = seen.min <= min && min <= max && max <= seen.max;
            let is_nothing = count == 0 && (min, max) == (f32::INFINITY, f32::NEG_INFINITY);
            if !(is_nothing || count > 0 && is_inside) {
                return None;
            }
            channels.push(Channel::of_parts(ExactSum::of_digits(digits)?, count, [min, max]));
        }
        (total == seen.count).then(|| Channels::of(channels))
    }
}

/// The octave that a bin is of.
fn octave_of(bin: u32) -> Option<u16> {
    u16::try_from(bin / BINS_PER_OCTAVE as u32).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::statistics::ChannelLayout;
    use crate::statistics::channels::tests::{RUNNERS, counters};

    fn of(values: &[f32], count: usize) -> Activation {
        let mut activation = Activation::new();
        let layout = ChannelLayout { count, run_length: 1 };
        activation.observe(values, layout, &mut counters(1), RUNNERS[0]);
        activation
    }

    fn any_value() -> impl Strategy<Value = f32> {
        let special = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, f32::MIN_POSITIVE, f32::MAX, f32::MIN, -1e-30];
        prop_oneof![3 => -10f32..10.0, 1 => prop::sample::select(special.to_vec())]
    }

    #[test]
    fn nothing_and_mixed_channels() {
        let nothing = Activation::new();
        assert_eq!(ActivationArrays::of(&nothing).activation(), Some(nothing));
        let mut mixed = of(&[1.0, 2.0, 3.0, 4.0], 2);
        mixed.merge(&of(&[1.0, 2.0, 3.0], 3));
        let arrays = ActivationArrays::of(&mixed);
        assert!(arrays.has_mixed_channels && arrays.channel_counts.is_empty());
        assert_eq!(arrays.activation(), Some(mixed));
    }

    #[test]
    fn what_no_values_have_is_refused() {
        let good = ActivationArrays::of(&of(&[1.5, -2.0, 0.0, 3.0, 1.5, -0.25], 3));
        assert!(good.activation().is_some());
        let damages: [fn(&mut ActivationArrays); 18] = [
            |it| it.bins.swap(0, 1),
            |it| it.bins[0] = 0,
            |it| it.bins[0] = u32::MAX,
            |it| it.bins[0] += 1,
            |it| it.counts[0] += 1,
            |it| it.counts[0] = 0,
            |it| it.counts[0] = u64::MAX,
            |it| it.counts.truncate(1),
            |it| it.totals[0] += 1,
            |it| it.totals[1] += 1,
            |it| it.totals.truncate(1),
            |it| it.extremes[1] = f32::NAN,
            |it| it.extremes[0] = 1.0,
            |it| it.extremes[2] = f32::INFINITY,
            |it| it.channel_counts[0] += 1,
            |it| it.channel_extremes[0] = -7.0,
            |it| it.channel_sums[0] = -1,
            |it| it.has_mixed_channels = true,
        ];
        for (number, damage) in damages.into_iter().enumerate() {
            let mut arrays = good.clone();
            damage(&mut arrays);
            assert_eq!(arrays.activation(), None, "damage {number}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn what_was_written_is_read(values in prop::collection::vec(any_value(), 0..200), count in 1usize..5) {
            let whole = values.len() / count * count;
            let activation = of(&values[..whole], count);
            let arrays = ActivationArrays::of(&activation);
            let read = arrays.activation().expect("arrays of values");
            prop_assert_eq!(&read, &activation);
            prop_assert_eq!(ActivationArrays::of(&read), arrays);
        }
    }
}
