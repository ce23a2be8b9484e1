//! Sum, minimum and maximum of each channel of a stream of tensors. It knows slices, and not what the sums are for.

use std::sync::Mutex;

use super::exact_sum::ExactSum;
use super::histogram::{BLOCK, count_block};
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

/// Statistics of one channel. Denormals add nothing to its sum.
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
    channels: Vec<Channel>,
    is_mixed: bool,
}

impl Channel {
    const NONE: Self = Self { sum: ExactSum::ZERO, count: 0, min: f32::INFINITY, max: f32::NEG_INFINITY };

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
        if seen.is_finite() {
            self.sum.add_block(block, seen);
            self.count += seen.count();
            self.min = self.min.min(seen.min());
            self.max = self.max.max(seen.max());
        }
    }
}

impl Channels {
    /// Of no value yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One per channel; `None` if there were no values, or tensors with different numbers of channels.
    pub fn get(&self) -> Option<&[Channel]> {
        (!self.is_mixed && !self.channels.is_empty()).then_some(&self.channels)
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        self.is_mixed |= other.is_mixed;
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
    let whole = ChannelLayout { count: 1, run_length: values.len() };
    let row = layout.count.saturating_mul(layout.run_length);
    // Values that are no whole number of rows are one channel.
    let layout = if row > 0 && values.len().is_multiple_of(row) { layout } else { whole };
    let row = layout.count * layout.run_length;
    if row == 0 {
        return;
    }
    let wanted = (values.len() / VALUES_PER_PART).min(row / VALUES_PER_PIECE).clamp(1, layout.count);
    let part_count = wanted.min(counters.len());
    let mut nowhere = vec![Channel::NONE; layout.count];
    let mut rest = channels.expecting(layout.count);
    if rest.is_empty() {
        rest = &mut nowhere;
    }
    let mut parts = Vec::with_capacity(part_count);
    let mut first = 0;
    for (number, counter) in counters.iter_mut().take(part_count).enumerate() {
        let end = layout.count * (number + 1) / part_count;
        let (own, others) = rest.split_at_mut(end - first);
        parts.push(Mutex::new(Part { first, channels: own, counter, seen: MinMax::new() }));
        (rest, first) = (others, end);
    }
    in_parallel(part_count, &|number| {
        if let Some(Ok(mut part)) = parts.get(number).map(Mutex::lock) {
            pulp::Arch::new().dispatch(Observe { part: &mut part, values, layout });
        }
    });
    for part in parts {
        let part = part.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        histogram.take(&part.seen, part.counter);
    }
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
    counter: &'a mut Counter,
    seen: MinMax,
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
                    let seen = count_block(block, self.counter);
                    channel.add_block(block, &seen);
                    self.seen.merge(&seen);
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
                    let seen = count_block(&block[..length], self.counter);
                    channel.add_block(&block[..length], &seen);
                    self.seen.merge(&seen);
                }
            }
        }
    }
}
