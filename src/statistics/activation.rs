//! All that calibration keeps of one activation.

use super::{ChannelLayout, Channels, Counter, Histogram, NotFinite, Observed, channels};

/// Histogram and channels of one stream of tensors.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Activation {
    /// Of all values.
    pub histogram: Histogram,
    /// Of each channel.
    pub channels: Channels,
}

impl Activation {
    /// Of no value yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the values of a contiguous tensor, whose length is a multiple of what `layout` says.
    ///
    /// The work is divided into at most as many parts as there are counters, which are empty before and after. `in_parallel`
    /// has to call the function that it is given with each number below its first argument, in any order, on any thread.
    pub fn observe(
        &mut self,
        values: &[f32],
        layout: ChannelLayout,
        counters: &mut [Counter],
        in_parallel: impl FnOnce(usize, &(dyn Fn(usize) + Sync)),
    ) {
        channels::observe(&mut self.histogram, &mut self.channels, values, layout, counters, in_parallel);
    }

    /// Adds what another one has seen.
    pub fn merge(&mut self, other: &Self) {
        self.histogram.merge(&other.histogram);
        self.channels.merge(&other.channels);
    }

    /// Number of values seen, NaN and infinities included.
    pub fn count(&self) -> u64 {
        self.histogram.count()
    }

    /// Extremes and counts; `None` if no value was seen.
    ///
    /// # Errors
    /// If a NaN or an infinity was seen.
    pub fn observed(&self) -> Result<Option<Observed>, NotFinite> {
        self.histogram.observed()
    }
}
