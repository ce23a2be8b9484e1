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
    /// The work is divided into at most as many parts as there are counters, which are empty before and after; without any,
    /// into one. `in_parallel` has to call the function that it is given with each number below its first argument, in any
    /// order, on any thread.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::statistics::channels::tests::{RUNNERS, counters};
    use crate::statistics::histogram::tests::{any_values, cut, readings};

    /// Enough for eight parts.
    const LENGTH: usize = 8 << 15;

    fn layouts() -> impl Strategy<Value = ChannelLayout> {
        let layouts = [(64, 49), (520, 1), (40, 16), (100, 15), (300, 3), (8, 5000), (3, 700)];
        prop::sample::select(layouts.map(|(count, run_length)| ChannelLayout { count, run_length }).to_vec())
    }

    /// Rows of values from the pool, whose every channel differs from the others.
    fn rows(pool: &[f32], layout: ChannelLayout) -> Vec<Vec<f32>> {
        let row = layout.count * layout.run_length;
        let value = |place: usize| pool[place.wrapping_mul(2_654_435_761) % 1_000_003 % pool.len()];
        (0..LENGTH.div_ceil(row)).map(|number| (0..row).map(|place| value(number * row + place)).collect()).collect()
    }

    /// Each value of a channel, to the bit.
    fn channel_bits(activation: &Activation) -> Option<Vec<[u64; 5]>> {
        let channels = activation.channels.get()?.iter();
        let bits = channels.map(|channel| {
            let [min, max] = [channel.min(), channel.max()].map(|x| u64::from(x.to_bits()));
            [channel.count(), channel.sum().to_bits(), channel.mean().to_bits(), min, max]
        });
        Some(bits.collect())
    }

    #[test]
    fn nothing_was_seen() {
        let mut activation = Activation::new();
        let layout = ChannelLayout { count: 3, run_length: 2 };
        activation.observe(&[], layout, &mut counters(2), RUNNERS[0]);
        assert_eq!((&activation, activation.count()), (&Activation::default(), 0));
        assert_eq!(activation.observed(), Ok(None));
    }

    #[test]
    fn counts_and_extremes() {
        let mut activation = Activation::new();
        let layout = ChannelLayout { count: 2, run_length: 1 };
        activation.observe(&[1.0, -4.0, 3.0, 0.0], layout, &mut counters(1), RUNNERS[0]);
        let seen = activation.observed().unwrap().unwrap();
        assert_eq!((seen.min(), seen.max(), seen.zeros(), activation.count()), (-4.0, 3.0, 1, 4));
        let means: Vec<f64> = activation.channels.get().unwrap().iter().map(|channel| channel.mean()).collect();
        assert_eq!(means, [2.0, -2.0]);
        activation.observe(&[f32::NAN, 0.0], layout, &mut counters(1), RUNNERS[0]);
        assert_eq!(activation.observed(), Err(NotFinite { nans: 1, infinities: 0, count: 6 }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn the_same_values_give_the_same_statistics(
            pool in any_values(300).prop_filter("not empty", |values| !values.is_empty()),
            layout in layouts(),
            counter_counts in [prop::sample::select(vec![1, 2, 3, 8]), prop::sample::select(vec![1, 2, 3, 8])],
            runners in [0..RUNNERS.len(), 0..RUNNERS.len()],
            cuts in prop::collection::vec(any::<Index>(), 0..5),
            swaps in prop::collection::vec((any::<Index>(), any::<Index>()), 0..40),
            rotation in any::<Index>(),
        ) {
            let mut rows = rows(&pool, layout);
            let mut whole = Activation::new();
            whole.observe(&rows.concat(), layout, &mut counters(1), RUNNERS[0]);

            // Other rows in other batches, and each run from behind.
            let count = rows.len();
            swaps.iter().for_each(|(a, b)| rows.swap(a.index(count), b.index(count)));
            rows.iter_mut().flat_map(|row| row.chunks_mut(layout.run_length)).for_each(<[f32]>::reverse);
            let mut batches = cut(&rows, &cuts);
            let rotation = rotation.index(batches.len());
            batches.rotate_left(rotation);
            let mut counters = counter_counts.map(counters);
            let [mut streamed, mut merged] = [Activation::new(), Activation::new()];
            for batch in batches {
                let values = batch.concat();
                streamed.observe(&values, layout, &mut counters[0], RUNNERS[runners[0]]);
                let mut own = Activation::new();
                own.observe(&values, layout, &mut counters[1], RUNNERS[runners[1]]);
                own.merge(&merged);
                merged = own;
            }
            for other in [streamed, merged] {
                prop_assert!(other == whole);
                prop_assert_eq!(channel_bits(&other), channel_bits(&whole));
                prop_assert_eq!(readings(&other.histogram), readings(&whole.histogram));
            }
            prop_assert!(counters.iter().flatten().all(Counter::is_empty));
        }
    }
}
