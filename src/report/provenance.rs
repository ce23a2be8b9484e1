//! What an emitted model says of itself, read back. Archives come from anywhere: nothing in it is trusted to be there.

use serde::Deserialize;

use super::{Hashes, Kind, Versions};

/// The part of the description in an emitted archive that tells a reader where the model comes from.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Provenance {
    /// Of tsquant and libtorch.
    pub versions: Versions,
    /// SHA-256 of what went in.
    pub hashes: Hashes,
    /// Seed of everything that drew.
    pub seed: u64,
    /// What was quantized.
    pub sites: Vec<QuantizedSite>,
    /// What was not.
    #[serde(default)]
    pub left_float: Vec<NotQuantized>,
}

/// A quantized site, as far as a reader needs it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct QuantizedSite {
    /// Its name.
    pub name: String,
    /// Weight or activation.
    pub kind: Kind,
    /// Width.
    pub bits: u32,
    /// Where its levels lie.
    pub grid: String,
    /// How thresholds were chosen.
    pub error_method: String,
    /// One per channel, or one.
    pub scale: Vec<f64>,
    /// One per channel, or one.
    pub zero_point: Vec<i64>,
    /// Its signal to noise ratio in dB; `None` where it is infinite.
    pub sqnr_db: Option<f64>,
}

/// Something that stayed float.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NotQuantized {
    /// Its name.
    pub name: String,
    /// Its op.
    pub op: String,
    /// Why.
    pub reason: String,
}

impl Provenance {
    /// Reads the text of an emitted archive's description.
    ///
    /// # Errors
    /// A text that is no JSON or lacks a field; it is one line.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// How many sites of a kind were quantized.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.sites.iter().filter(|site| site.kind == kind).count()
    }
}
