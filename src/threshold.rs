//! Chooses quantization thresholds: one search, one file per error method.
//!
//! Plain data in, plain data out: values of a weight tensor or the statistics of an activation, a
//! [`Scheme`](crate::quantizer::Scheme) and an [`ErrorMethod`] give a [`Selection`]. It refuses to know tensors,
//! graphs, names of sites, and the arithmetic of a quantizer, which is [`quantizer`](crate::quantizer)'s alone.

mod channels;
mod family;
mod measure;
mod no_clipping;
mod select;
mod selection;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::quantizer::Bits;
use crate::statistics::NotFinite;

pub use channels::{Channels, ChannelsError, quantize_weights};
pub use select::{select_activation, select_weights};
pub use selection::{Note, Selection};

/// What a chosen threshold minimises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorMethod {
    /// Nothing: the smallest range that clips no value.
    #[serde(rename = "NOCLIPPING")]
    NoClipping,
}

/// A name that is no error method.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("error method must be {names}, found `{0}`", names = ErrorMethod::NAMES.join(", "))]
pub struct UnknownErrorMethod(pub String);

/// Why there is no selection.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SelectError {
    /// An activation that was observed without values.
    #[error("expected at least one observed value, found none")]
    Empty,
    /// NaN or infinity in an activation or in a weight tensor with one threshold.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// NaN or infinity in one channel of a weight tensor.
    #[error("channel {channel}: {found}")]
    NotFiniteChannel {
        /// Index along the channel axis.
        channel: usize,
        /// How many.
        found: NotFinite,
    },
    /// A grid that would have to map a value to infinity, or clip it.
    #[error("expected magnitudes within reach of a power_of_two grid of {bits} bits in f32, found {largest:e}")]
    TooLarge {
        /// The largest magnitude of the data.
        largest: f32,
        /// Width of the grid.
        bits: Bits,
    },
}

impl ErrorMethod {
    /// The names of all error methods, as written in YAML and reports.
    pub const NAMES: [&'static str; 1] = ["NOCLIPPING"];

    /// Its name, as written in YAML and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoClipping => Self::NAMES[0],
        }
    }
}

impl fmt::Display for ErrorMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ErrorMethod {
    type Err = UnknownErrorMethod;

    fn from_str(name: &str) -> Result<Self, UnknownErrorMethod> {
        match name {
            "NOCLIPPING" => Ok(Self::NoClipping),
            _ => Err(UnknownErrorMethod(name.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for name in ErrorMethod::NAMES {
            let method: ErrorMethod = name.parse().unwrap();
            assert_eq!(method.to_string(), name);
            assert_eq!(serde_json::to_string(&method).unwrap(), format!("\"{name}\""));
        }
        let error = "noclip".parse::<ErrorMethod>().unwrap_err();
        assert_eq!(error.to_string(), "error method must be NOCLIPPING, found `noclip`");
    }
}
