//! A weight tensor seen as channels. It knows a contiguous `f32` slice and its shape, and nothing of how a channel is
//! quantized.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::quantizer::QuantParams;

/// A contiguous tensor divided along one axis; without an axis it is one channel.
///
/// In memory it is a sequence of runs of equal length, the channels taking turns.
#[derive(Debug, Clone, Copy)]
pub struct Channels<'a> {
    values: &'a [f32],
    count: usize,
    run_length: usize,
    /// Taps of a kernel where its products are added two by two in 16 bits.
    taps_in_pairs: Option<usize>,
}

/// Values, shape, axis and quantizers that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChannelsError {
    /// The shape has another number of elements.
    #[error("expected the number of values of shape {shape:?}, found {found}")]
    Shape {
        /// The shape that was given.
        shape: Vec<usize>,
        /// Number of values.
        found: usize,
    },
    /// There is nothing to quantize.
    #[error("expected at least one value, found shape {shape:?}")]
    Empty {
        /// The shape that was given.
        shape: Vec<usize>,
    },
    /// The tensor has no such axis.
    #[error("expected a channel axis below {rank}, found {axis}")]
    Axis {
        /// The axis that was given.
        axis: usize,
        /// Number of axes of the tensor.
        rank: usize,
    },
    /// Channels and quantizers differ in number.
    #[error("expected {expected} quantizers, one per channel, found {found}")]
    Quantizers {
        /// Number of channels.
        expected: usize,
        /// Number of quantizers.
        found: usize,
    },
}

impl<'a> Channels<'a> {
    /// Divides `values`, contiguous with this `shape`, along `channel_axis`, or not at all.
    ///
    /// # Errors
    /// If the shape has another number of elements, none at all, or no such axis.
    pub fn new(values: &'a [f32], shape: &[usize], channel_axis: Option<usize>) -> Result<Self, ChannelsError> {
        let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        if elements != Some(values.len()) {
            return Err(ChannelsError::Shape { shape: shape.to_vec(), found: values.len() });
        }
        if values.is_empty() {
            return Err(ChannelsError::Empty { shape: shape.to_vec() });
        }
        let Some(axis) = channel_axis else {
            return Ok(Self { values, count: 1, run_length: values.len(), taps_in_pairs: None });
        };
        let (Some(&count), Some(inner)) = (shape.get(axis), shape.get(axis + 1..)) else {
            return Err(ChannelsError::Axis { axis, rank: shape.len() });
        };
        Ok(Self { values, count, run_length: inner.iter().product(), taps_in_pairs: None })
    }

    /// Quantizers are to be such that no sum of two products of a kernel, of so many taps, overflows 16 bits.
    #[must_use]
    pub fn in_pairs(self, taps: Option<usize>) -> Self {
        Self { taps_in_pairs: taps, ..self }
    }

    /// Taps of a kernel whose products are added two by two in 16 bits.
    pub(super) fn taps_in_pairs(&self) -> Option<usize> {
        self.taps_in_pairs
    }

    /// Number of channels, at least 1.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The values of all channels, as they lie in memory.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// As many other values, divided in the same way; `None` if they are more or less.
    pub(super) fn with_values<'b>(&self, values: &'b [f32]) -> Option<Channels<'b>> {
        let Self { count, run_length, taps_in_pairs, .. } = *self;
        (values.len() == self.values.len()).then_some(Channels { values, count, run_length, taps_in_pairs })
    }

    /// The channel to which the value at this place in memory belongs.
    pub(super) fn channel_of(&self, place: usize) -> usize {
        place / self.run_length % self.count
    }

    /// The values of one channel in order; copied only where they do not lie together. Empty if there is no such
    /// channel.
    pub fn channel(&self, index: usize) -> Cow<'a, [f32]> {
        let mut runs = self.values.chunks_exact(self.run_length).skip(index).step_by(self.count);
        if index >= self.count {
            return Cow::Borrowed(&[]);
        }
        if self.values.len() / self.run_length == self.count {
            return Cow::Borrowed(runs.next().unwrap_or_default());
        }
        let mut gathered = Vec::with_capacity(self.values.len() / self.count);
        runs.for_each(|run| gathered.extend_from_slice(run));
        Cow::Owned(gathered)
    }
}

/// Work below this many values is not worth another task.
const VALUES_PER_TASK: usize = 16_384;

/// The images of the weights under the quantizers of their channels, in the order and shape of the original.
///
/// # Errors
/// If there is not one quantizer for each channel.
pub fn quantize_weights(weights: &Channels<'_>, params: &[QuantParams]) -> Result<Vec<f32>, ChannelsError> {
    if params.len() != weights.count {
        return Err(ChannelsError::Quantizers { expected: weights.count, found: params.len() });
    }
    let run_length = weights.run_length;
    let mut images = vec![0.0; weights.values.len()];
    images
        .par_chunks_mut(run_length)
        .zip(weights.values.par_chunks(run_length))
        .enumerate()
        .with_min_len(1 + VALUES_PER_TASK / run_length)
        .for_each(|(run, (images, values))| params[run % params.len()].fake_quantize_slice(values, images));
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::Levels;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| i as f32).collect()
    }

    #[test]
    fn channels_of_each_axis() {
        let values = numbers(24);
        let channels = |axis| Channels::new(&values, &[2, 3, 4], axis).unwrap();
        let first = channels(Some(0));
        assert_eq!(*first.channel(1), numbers(24)[12..]);
        assert!(matches!(first.channel(1), Cow::Borrowed(_)));
        assert_eq!(*channels(Some(1)).channel(2), [8.0, 9.0, 10.0, 11.0, 20.0, 21.0, 22.0, 23.0]);
        assert_eq!(*channels(Some(2)).channel(3), [3.0, 7.0, 11.0, 15.0, 19.0, 23.0]);
        assert_eq!([None, Some(0), Some(1), Some(2)].map(|axis| channels(axis).count()), [1, 2, 3, 4]);
        assert!(matches!(channels(None).channel(0), Cow::Borrowed(all) if all.len() == 24));
        assert!(first.channel(2).is_empty());
    }

    #[test]
    fn every_value_gets_the_quantizer_of_its_channel() {
        let values = numbers(24);
        let levels = Levels { quant_min: 0, quant_max: 255 };
        for axis in 0..3 {
            let weights = Channels::new(&values, &[2, 3, 4], Some(axis)).unwrap();
            let quantizer = |i| QuantParams::new(1.5 + i as f32, 0, levels).unwrap();
            let params: Vec<_> = (0..weights.count()).map(quantizer).collect();
            let images = quantize_weights(&weights, &params).unwrap();
            let again = Channels::new(&images, &[2, 3, 4], Some(axis)).unwrap();
            for (index, q) in params.iter().enumerate() {
                let expected: Vec<f32> = weights.channel(index).iter().map(|&x| q.fake_quantize(x)).collect();
                assert_eq!(*again.channel(index), expected);
            }
            assert_eq!(
                quantize_weights(&weights, &params[1..]).unwrap_err().to_string(),
                format!("expected {} quantizers, one per channel, found {}", weights.count(), weights.count() - 1)
            );
        }
    }

    #[test]
    fn says_what_does_not_fit() {
        let values = numbers(6);
        let message = |shape: &[usize], axis| Channels::new(&values, shape, axis).unwrap_err().to_string();
        assert_eq!(message(&[2, 4], Some(0)), "expected the number of values of shape [2, 4], found 6");
        assert_eq!(message(&[2, 3], Some(2)), "expected a channel axis below 2, found 2");
        assert_eq!(
            message(&[2, 3], Some(usize::MAX - 1)),
            format!("expected a channel axis below 2, found {}", usize::MAX - 1)
        );
        assert!(Channels::new(&values, &[usize::MAX, usize::MAX], None).is_err());
        let empty = Channels::new(&[], &[3, 0], Some(0)).unwrap_err().to_string();
        assert_eq!(empty, "expected at least one value, found shape [3, 0]");
        let scalar = Channels::new(&values[..1], &[], None).unwrap();
        assert_eq!(scalar.count(), 1);
    }
}
