//! What a comparison of model files found.

use std::path::PathBuf;

use serde::Serialize;

use super::{Accuracy, Evaluation, Versions};

/// What `tsquant evaluate --json` prints.
#[derive(Debug, Clone, Serialize)]
pub struct FilesReport {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// Absolute path of the model that was measured.
    pub model: PathBuf,
    /// Absolute path of the float model, if there was one.
    pub reference: Option<PathBuf>,
    /// Absolute path of the data.
    pub data: PathBuf,
    /// Of tsquant and libtorch.
    pub versions: Versions,
    /// What a reader should know.
    pub warnings: Vec<String>,
    /// The measures.
    pub evaluation: Measures,
    /// Size of the float model's file.
    pub float_bytes: Option<u64>,
    /// Size of the other file.
    pub quantized_bytes: u64,
}

/// Of two models or of one.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Measures {
    /// Float against quantized, as in `report.json`.
    Compared(Evaluation),
    /// One model's accuracy.
    Alone {
        /// What it was measured on, `evaluation` or `calibration`.
        data: &'static str,
        /// The measures.
        quantized: Alone,
    },
}

/// Measures of one model.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Alone {
    /// Against labels.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Rows that ran.
    pub rows: u64,
}

impl FilesReport {
    /// As indented JSON.
    ///
    /// # Errors
    /// Where serialization fails.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
