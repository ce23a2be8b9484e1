//! Chooses quantization thresholds: one search, one file per error method.

use serde::Serialize;

/// What a chosen threshold minimises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorMethod {
    /// Nothing: the smallest range that clips no value.
    #[serde(rename = "NOCLIPPING")]
    NoClipping,
}
