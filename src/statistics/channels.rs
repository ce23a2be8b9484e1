//! Sum, minimum and maximum of each channel of a stream of tensors. It knows slices, and not what the sums are for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::exact_sum::ExactSum;
use super::histogram::{BLOCK, DRAINED_AFTER, count_block, finite_of};
use super::{Counter, Histogram, MinMax};

/// Runs shorter than this are gathered before they are summed up.
const SHORT_RUN: usize = 16;

/// Values worth a thread of their own.
const VALUES_PER_PART: usize = 1 << 15;

/// Values in a row that are worth being one part's share of it.
const VALUES_PER_PIECE: usize = 64;

/// How the channels lie in a contiguous tensor: runs of equal length, the channels taking turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelLayout {
    /// Number of channels.
    pub count: usize,
    /// Neighbouring values of one channel.
    pub run_length: usize,
}

/// Statistics of the finite values of one channel. Denormals add nothing to its sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Channel {
    sum: ExactSum,
    count: u64,
    min: f32,
    max: f32,
}

/// Statistics of all channels of a site, as long as all its tensors have the same number of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Channels {
    /// None of mixed numbers.
    channels: Vec<Channel>,
    is_mixed: bool,
}

impl Channel {
    const NONE: Self = Self { sum: ExactSum::ZERO, count: 0, min: f32::INFINITY, max: f32::NEG_INFINITY };

    pub(super) fn of_parts(sum: ExactSum, count: u64, [min, max]: [f32; 2]) -> Self {
        Self { sum, count, min, max }
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The smallest value; infinite of nothing.
    pub fn min(&self) -> f32 {
        self.min
    }

    /// The largest value; negative infinity of nothing.
    pub fn max(&self) -> f32 {
        self.max
    }

    pub(super) fn exact_sum(&self) -> &ExactSum {
        &self.sum
    }

    /// The sum of all values, exact but for one rounding.
    pub fn sum(&self) -> f64 {
        self.sum.value()
    }

    /// The mean of all values; 0 of nothing.
    pub fn mean(&self) -> f64 {
        self.sum() / self.count.max(1) as f64
    }

    fn merge(&mut self, other: &Self) {
        self.sum.merge(&other.sum);
        self.count += other.count;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Adds a block that `seen` sums up.
    #[inline(always)]
    fn add_block(&mut self, block: &[f32], seen: &MinMax) {
        if !seen.is_finite() {
            self.add_finite(block);
            return;
        }
        self.sum.add_block(block, seen);
        self.count += seen.count();
        self.min = self.min.min(seen.min());
        self.max = self.max.max(seen.max());
    }

    #[cold]
    #[inline(never)]
    fn add_finite(&mut self, block: &[f32]) {
        let finite = finite_of(block);
        self.add_block(&finite, &MinMax::of_block(&finite));
    }
}

impl Channels {
    /// Of no value yet.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn of(channels: Vec<Channel>) -> Self {
        Self { channels, is_mixed: false }
    }

    /// Of no values, or of tensors with different numbers of channels.
    pub(super) fn unknown(is_mixed: bool) -> Self {
        Self { channels: Vec::new(), is_mixed }
    }

    pub(super) fn is_mixed(&self) -> bool {
        self.is_mixed
    }

    /// One per channel; `None` if there were no values, or tensors with different numbers of channels.
    pub fn get(&self) -> Option<&[Channel]> {
        (!self.is_mixed && !self.channels.is_empty()).then_some(&self.channels)
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        if other.is_mixed {
            *self = other.clone();
        }
        if other.channels.is_empty() {
            return;
        }
        for (channel, other) in self.expecting(other.channels.len()).iter_mut().zip(&other.channels) {
            channel.merge(other);
        }
    }

    /// The channels, of which this many are expected; none any more once that number has changed.
    fn expecting(&mut self, count: usize) -> &mut [Channel] {
        if self.channels.is_empty() && !self.is_mixed {
            self.channels = vec![Channel::NONE; count];
        }
        if self.channels.len() != count {
            self.is_mixed = true;
            self.channels = Vec::new();
        }
        &mut self.channels
    }
}

/// Adds the values of a contiguous tensor to the histogram and to its channels.
///
/// The channels are dealt out to at most as many parts as there are counters; `in_parallel` has to call the function that it
/// is given with each number below its first argument, in any order, on any thread.
pub(super) fn observe(
    histogram: &mut Histogram,
    channels: &mut Channels,
    values: &[f32],
    layout: ChannelLayout,
    counters: &mut [Counter],
    in_parallel: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
) {
    if counters.is_empty() {
        return observe(histogram, channels, values, layout, &mut [Counter::new()], in_parallel);
    }
    if values.is_empty() {
        return;
    }
    let whole = ChannelLayout { count: 1, run_length: values.len() };
    let row = layout.count.saturating_mul(layout.run_length);
    // Values that are no whole number of rows are one channel.
    let layout = if row > 0 && values.len().is_multiple_of(row) { layout } else { whole };
    let row = layout.count * layout.run_length;
    let wanted = (values.len() / VALUES_PER_PART).min(row / VALUES_PER_PIECE).clamp(1, layout.count);
    let part_count = wanted.min(counters.len());
    let mut nowhere = Vec::new();
    let mut rest = channels.expecting(layout.count);
    if rest.is_empty() {
        nowhere.resize(layout.count, Channel::NONE);
        rest = &mut nowhere;
    }
    let mut parts = Vec::with_capacity(part_count);
    let mut first = 0;
    for (number, counter) in counters.iter_mut().take(part_count).enumerate() {
        let end = layout.count * (number + 1) / part_count;
        let (own, others) = rest.split_at_mut(end - first);
        parts.push(Mutex::new(Some(Part { first, channels: own, tally: Tally::new(counter) })));
        (rest, first) = (others, end);
    }
    let histogram = Mutex::new(histogram);
    in_parallel(part_count, &|number| {
        let Some(mut part) = parts.get(number).and_then(|part| locked(part).take()) else { return };
        pulp::Arch::new().dispatch(Observe { part: &mut part, values, layout });
        part.tally.add_to(&mut locked(&histogram));
    });
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`Part::observe`], compiled for each set of vector instructions.
struct Observe<'a, 'b> {
    part: &'a mut Part<'b>,
    values: &'a [f32],
    layout: ChannelLayout,
}

impl pulp::NullaryFnOnce for Observe<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.part.observe(self.values, self.layout);
    }
}

/// Some neighbouring channels of a tensor.
struct Part<'a> {
    first: usize,
    channels: &'a mut [Channel],
    tally: Tally<'a>,
}

/// What a part has counted.
struct Tally<'a> {
    counter: &'a mut Counter,
    /// Of what is in the counter.
    seen: MinMax,
    /// What was in it before.
    drained: Histogram,
}

impl<'a> Tally<'a> {
    fn new(counter: &'a mut Counter) -> Self {
        Self { counter, seen: MinMax::new(), drained: Histogram::new() }
    }

    #[inline(always)]
    fn count(&mut self, block: &[f32]) -> MinMax {
        let seen = count_block(block, self.counter);
        self.seen.merge(&seen);
        if self.seen.count() >= DRAINED_AFTER as u64 {
            self.drained.take(&self.seen, self.counter);
            self.seen = MinMax::new();
        }
        seen
    }

    fn add_to(self, histogram: &mut Histogram) {
        histogram.merge(&self.drained);
        histogram.take(&self.seen, self.counter);
    }
}

impl Part<'_> {
    #[inline(always)]
    fn observe(&mut self, values: &[f32], layout: ChannelLayout) {
        let ChannelLayout { count, run_length } = layout;
        if run_length < SHORT_RUN {
            self.observe_gathered(values, layout);
            return;
        }
        for row in values.chunks_exact(count * run_length) {
            let piece = &row[self.first * run_length..(self.first + self.channels.len()) * run_length];
            for (channel, run) in self.channels.iter_mut().zip(piece.chunks_exact(run_length)) {
                for block in run.chunks(BLOCK) {
                    channel.add_block(block, &self.tally.count(block));
                }
            }
        }
    }

    /// The same for short runs: those of one channel are brought together, for a tile of channels as wide as a cache line
    /// and as many rows as the first cache holds.
    #[inline(always)]
    fn observe_gathered(&mut self, values: &[f32], layout: ChannelLayout) {
        let ChannelLayout { count, run_length } = layout;
        let row_length = count * run_length;
        let tile = SHORT_RUN / run_length;
        let longest = BLOCK / tile;
        let mut gathered = [0.0f32; BLOCK];
        for rows in values.chunks(longest / run_length * row_length) {
            let length = rows.len() / row_length * run_length;
            for (number, channels) in self.channels.chunks_mut(tile).enumerate() {
                let start = (self.first + number * tile) * run_length;
                for (index, row) in rows.chunks_exact(row_length).enumerate() {
                    let runs = row[start..start + channels.len() * run_length].chunks_exact(run_length);
                    for (block, run) in gathered.chunks_exact_mut(longest).zip(runs) {
                        for (place, &x) in block[index * run_length..].iter_mut().zip(run) {
                            *place = x;
                        }
                    }
                }
                for (channel, block) in channels.iter_mut().zip(gathered.chunks_exact(longest)) {
                    channel.add_block(&block[..length], &self.tally.count(&block[..length]));
                }
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::statistics::NotFinite;
    use crate::statistics::histogram::tests::{any_values, noise, of};

    /// One way to call `in_parallel`'s function.
    pub(in crate::statistics) type Runner = fn(usize, &(dyn Fn(usize) + Sync));

    /// In order, in reverse, on threads of their own.
    pub(in crate::statistics) const RUNNERS: [Runner; 3] = [
        |count, work| (0..count).for_each(work),
        |count, work| (0..count).rev().for_each(work),
        |count, work| {
            std::thread::scope(|scope| {
                for number in 0..count {
                    scope.spawn(move || work(number));
                }
            });
        },
    ];

    const RUN_LENGTHS: [usize; 6] = [1, 3, 15, 16, 49, 5000];

    pub(in crate::statistics) fn counters(count: usize) -> Vec<Counter> {
        (0..count).map(|_| Counter::new()).collect()
    }

    fn observed(tensors: &[&[f32]], layout: ChannelLayout) -> (Histogram, Channels) {
        let (mut histogram, mut channels, mut counters) = (Histogram::new(), Channels::new(), counters(2));
        for values in tensors {
            observe(&mut histogram, &mut channels, values, layout, &mut counters, RUNNERS[0]);
        }
        (histogram, channels)
    }

    /// Value by value.
    fn naive(values: &[f32], layout: ChannelLayout) -> Vec<Channel> {
        let mut gathered = vec![Vec::new(); layout.count];
        for (run, values) in values.chunks(layout.run_length).enumerate() {
            gathered[run % layout.count].extend(values.iter().copied().filter(|x| x.is_finite()));
        }
        let channel = |values: &Vec<f32>| {
            let mut sum = ExactSum::ZERO;
            for block in values.chunks(BLOCK) {
                let mut seen = MinMax::new();
                seen.observe(block);
                sum.add_block(block, &seen);
            }
            let min = values.iter().copied().fold(f32::INFINITY, f32::min);
            let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            Channel { sum, count: values.len() as u64, min, max }
        };
        gathered.iter().map(channel).collect()
    }

    #[test]
    fn every_layout_equals_the_naive_loop() {
        let values = noise(350_000);
        let (whole, shorter) = (of(&values), 270_000);
        let mut most_parts = 0;
        let mut counters = counters(8);
        for (number, run_length) in RUN_LENGTHS.into_iter().enumerate() {
            for (index, count) in [1, 2, 5, 16, 17, 64, 70].into_iter().enumerate() {
                let layout = ChannelLayout { count, run_length };
                let row = count * run_length;
                let (values, rest) = values.split_at((shorter / row).max(1) * row);
                let (mut histogram, mut channels) = (of(rest), Channels::new());
                let counters = &mut counters[..[1, 2, 3, 8][(number + index) % 4]];
                let most = counters.len();
                observe(&mut histogram, &mut channels, values, layout, counters, |parts, work| {
                    assert!((1..=most).contains(&parts));
                    most_parts = most_parts.max(parts);
                    RUNNERS[index % 3](parts, work);
                });
                assert!(channels.get() == Some(naive(values, layout).as_slice()), "{layout:?}");
                assert!(histogram == whole, "{layout:?}");
            }
        }
        assert_eq!(most_parts, 8);
        assert!(counters.iter().all(Counter::is_empty));
    }

    #[test]
    fn sums_are_exact() {
        // Rows of 3 channels; the sums of each are known in integers.
        let rows: Vec<[i64; 3]> = (0..3000i64).map(|i| [i * 4099 % 16_777_213, -(i << 12), i % 7 - 3]).collect();
        let values: Vec<f32> = rows.iter().flatten().map(|&x| x as f32).collect();
        let (_, channels) = observed(&[&values], ChannelLayout { count: 3, run_length: 1 });
        for (number, channel) in channels.get().unwrap().iter().enumerate() {
            let sum: i64 = rows.iter().map(|row| row[number]).sum();
            assert_eq!((channel.count(), channel.sum(), channel.mean()), (3000, sum as f64, sum as f64 / 3000.0));
            let [min, max] = [rows.iter().map(|row| row[number]).min(), rows.iter().map(|row| row[number]).max()];
            assert_eq!((Some(channel.min() as i64), Some(channel.max() as i64)), (min, max));
        }
        // A value that no f64 sum of the others would see.
        let (_, cancelled) =
            observed(&[&[f32::MAX, 1.0, 1e-30, -f32::MAX, -1.0]], ChannelLayout { count: 1, run_length: 5 });
        assert_eq!(cancelled.get().unwrap()[0].sum(), f64::from(1e-30f32));
    }

    #[test]
    fn exact_beyond_32_bits() {
        let (mut histogram, mut channels) =
            observed(&[&[0.1, -3.0, 0.1, 1e30]], ChannelLayout { count: 2, run_length: 1 });
        for _ in 0..33 {
            let (half, halves) = (histogram.clone(), channels.clone());
            histogram.merge(&half);
            channels.merge(&halves);
        }
        let [first, second] = channels.get().unwrap() else { panic!("expected 2 channels") };
        assert_eq!((first.count(), second.count(), histogram.count()), (1 << 34, 1 << 34, 1 << 35));
        assert_eq!(first.sum(), f64::from(0.1f32) * 2f64.powi(34));
        assert_eq!(second.sum(), (f64::from(1e30f32) - 3.0) * 2f64.powi(33));
        assert_eq!(first.mean(), f64::from(0.1f32));
    }

    #[test]
    fn what_is_no_whole_number_of_rows_is_one_channel() {
        let values = noise(1000);
        let whole = naive(&values, ChannelLayout { count: 1, run_length: 1000 });
        for (count, run_length) in [(3, 1), (7, 16), (1, 999), (2000, 1), (0, 5), (5, 0), (0, 0), (usize::MAX, 2)] {
            let (histogram, channels) = observed(&[&values], ChannelLayout { count, run_length });
            assert_eq!(channels.get(), Some(whole.as_slice()), "{count} {run_length}");
            assert_eq!(histogram, of(&values));
        }
    }

    #[test]
    fn nothing_has_no_channels() {
        for layout in [(3, 4), (0, 0), (1, 0), (0, 7)].map(|(count, run_length)| ChannelLayout { count, run_length }) {
            let (histogram, channels) = observed(&[&[], &[]], layout);
            assert_eq!((histogram, &channels, channels.get()), (Histogram::new(), &Channels::new(), None));
        }
        let none = Channel::NONE;
        assert_eq!((none.count(), none.sum(), none.mean()), (0, 0.0, 0.0));
        assert_eq!((none.min(), none.max()), (f32::INFINITY, f32::NEG_INFINITY));
    }

    #[test]
    fn without_a_counter_it_makes_one() {
        let values = noise(600);
        let (mut histogram, mut channels) = (Histogram::new(), Channels::new());
        let layout = ChannelLayout { count: 3, run_length: 20 };
        observe(&mut histogram, &mut channels, &values, layout, &mut [], RUNNERS[0]);
        assert_eq!((histogram, channels), observed(&[&values], layout));
    }

    #[test]
    fn other_numbers_of_channels_leave_the_histogram_alone() {
        let values = noise(240);
        let layout = |count| ChannelLayout { count, run_length: 20 };
        let parts = [3, 4, 3].map(|count| observed(&[&values], layout(count)));
        let mut mixed = Vec::new();
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 1, 0]] {
            let [(mut histogram, mut merged), (_, mut pair)] = [order[0], order[1]].map(|part| parts[part].clone());
            let mut streamed = (Histogram::new(), Channels::new());
            for part in order {
                let (own, channels) = &mut streamed;
                observe(own, channels, &values, layout([3, 4, 3][part]), &mut counters(1), RUNNERS[0]);
            }
            for part in [order[1], order[2]] {
                histogram.merge(&parts[part].0);
                merged.merge(&parts[part].1);
            }
            pair.merge(&parts[order[2]].1);
            let mut as_a_tree = parts[order[0]].1.clone();
            as_a_tree.merge(&pair);
            assert_eq!((&histogram, histogram.count()), (&streamed.0, 720));
            mixed.extend([merged, streamed.1, as_a_tree]);
        }
        for (number, channels) in mixed.iter().enumerate() {
            assert_eq!((channels.get(), channels), (None, &mixed[0]), "{number}");
        }
        assert_eq!(observed(&[&[], &values, &[]], layout(4)), parts[1]);
        let (mut histogram, mut not_mixed) = parts[0].clone();
        observe(&mut histogram, &mut not_mixed, &[], layout(4), &mut counters(1), RUNNERS[0]);
        assert_eq!((histogram, not_mixed), parts[0], "an empty tensor mixes nothing");
        let mut empty = Channels::new();
        empty.merge(&mixed[0]);
        let mut unchanged = mixed[0].clone();
        unchanged.merge(&Channels::new());
        assert_eq!([&empty, &unchanged], [&mixed[0]; 2]);
    }

    #[test]
    fn blocks_that_are_not_finite_among_others() {
        for layout in [(3, 5000), (6, 4), (30, 1)].map(|(count, run_length)| ChannelLayout { count, run_length }) {
            let finite = noise(90_000);
            let mut values = finite.clone();
            values[40_000..45_000].fill(f32::NAN);
            values[50_000] = f32::INFINITY;
            values[50_001] = f32::NEG_INFINITY;
            values[89_999] = -f32::NAN;
            let mut counters = counters(3);
            let (mut histogram, mut channels) = (Histogram::new(), Channels::new());
            observe(&mut histogram, &mut channels, &values, layout, &mut counters, RUNNERS[1]);
            assert!(channels.get() == Some(naive(&values, layout).as_slice()), "{layout:?}");
            assert_eq!(histogram.observed(), Err(NotFinite { nans: 5001, infinities: 2, count: 90_000 }));
            assert_eq!(histogram, of(&values));
            let rest: Vec<f32> = values.iter().copied().filter(|x| x.is_finite()).collect();
            assert_eq!(histogram.positive_bins(), of(&rest).positive_bins());
            assert_eq!(histogram.negative_bins(), of(&rest).negative_bins());
            // The counters are as good as new.
            assert!(counters.iter().all(Counter::is_empty));
            let (mut histogram, mut channels) = (Histogram::new(), Channels::new());
            observe(&mut histogram, &mut channels, &finite, layout, &mut counters, RUNNERS[0]);
            assert!((histogram, channels) == observed(&[&finite], layout));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn rows_and_merges_equal_the_naive_loop(
            pool in any_values(60).prop_filter("not empty", |values| !values.is_empty()),
            count in 1usize..=70,
            run_length in prop::sample::select(RUN_LENGTHS[..5].to_vec()),
            rows in 1usize..6,
            split in any::<prop::sample::Index>(),
        ) {
            let layout = ChannelLayout { count, run_length };
            let row = count * run_length;
            let values: Vec<f32> = pool.iter().copied().cycle().take(rows * row).collect();
            let expected = naive(&values, layout);
            let (first, second) = values.split_at(split.index(rows + 1) * row);
            let at_once = observed(&[&values], layout);
            prop_assert!(at_once.1.get() == Some(expected.as_slice()));
            prop_assert!(at_once.0 == of(&values));
            prop_assert!(observed(&[second, first], layout) == at_once);
            let (mut histogram, mut channels) = observed(&[second], layout);
            let other = observed(&[first], layout);
            histogram.merge(&other.0);
            channels.merge(&other.1);
            prop_assert!((histogram, channels) == at_once);
        }
    }
}
