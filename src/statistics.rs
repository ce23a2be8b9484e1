//! What is kept of a stream of values: plain data that observes slices and merges.
//!
//! Whatever arrives in whatever order, split and merged in whatever way, the result is the same bit for bit. It knows
//! `&[f32]`, never a tensor, a site's name or a quantizer.

mod activation;
mod activation_scores;
mod arrays;
mod channels;
mod counter;
mod exact_sum;
mod gradient_sums;
mod histogram;
mod min_max;
mod non_zero;
mod tables;
mod weighted;
mod weighted_counter;

pub use activation::Activation;
pub use activation_scores::ActivationScores;
pub use arrays::ActivationArrays;
pub use channels::{Channel, ChannelLayout, Channels};
pub use counter::Counter;
pub use gradient_sums::{Divided, GradientSums};
pub use histogram::{Bin, Histogram, Moments};
pub use min_max::{MinMax, NotFinite, Observed};
pub use tables::{Counted, Layout};
pub use weighted::WeightedHistogram;
pub use weighted_counter::WeightedCounter;
