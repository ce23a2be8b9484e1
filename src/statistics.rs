//! What is kept of a stream of values: plain data that observes slices and merges.
//!
//! Whatever arrives in whatever order, split and merged in whatever way, the result is the same bit for bit. It knows
//! `&[f32]`, never a tensor, a site's name or a quantizer.

mod min_max;

pub use min_max::{MinMax, NotFinite, Observed};
