//! Measures of a quantized model, as plain numbers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Measures of one model against labels.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of rows whose arg-max is an accepted class, from 0 to 1; `None` without labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    /// Share of rows with an accepted class among the five largest outputs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
}

/// Measures of a quantized model against labels and against the float model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Against labels.
    #[serde(flatten)]
    pub accuracy: Accuracy,
    /// Share of rows (of positions, where the ranked output has more axes) whose arg-max over the last axis of the ranked
    /// output, by default the first, is the float model's, from 0 to 1;
    /// `None` where that axis has no choice.
    pub agreement: Option<f64>,
    /// 10 log10(Σ f² / Σ (f − q)²) in dB over all rows and outputs; `None` where that is infinite, where the squares are beyond
    /// an f64, and where nothing could be compared: [`Comparison::sqnr`] tells which.
    pub sqnr_db: Option<f64>,
    /// Σ (f − q)² of all outputs, mean over rows; `None` where nothing could be compared and where it is beyond an f64.
    #[serde(default)]
    pub squared_error: Option<f64>,
    /// Cosine similarity of all outputs, from −1 to 1; `None` where the outputs of one model alone are all 0, where the
    /// squares are beyond an f64, and where nothing could be compared.
    pub cosine: Option<f64>,
    /// Largest absolute difference of an output; `None` where nothing could be compared: no value is finite in both models.
    pub max_abs_diff: Option<f64>,
    /// Largest absolute output of the float model; `None` where nothing could be compared. Not in the report.
    #[serde(skip)]
    pub max_abs_float: Option<f64>,
    /// Output values of either model that are NaN or infinite; SQNR, cosine and the largest difference leave them out.
    pub not_finite: u64,
    /// Rows compared.
    pub rows: u64,
}

/// What the SQNR of two models is, where it need not be a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sqnr {
    /// In dB.
    Db(f64),
    /// Infinite: nothing was lost.
    Equal,
    /// −∞: the float model's outputs are all 0, the quantized model's are not.
    NoSignal,
    /// The outputs differ, but the sum of the squares of the outputs or of the differences is 0 or infinite in an f64.
    OutOfRange,
    /// No value is finite in both models.
    NothingCompared,
}

impl fmt::Display for Sqnr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Db(db) => write!(f, "{db:.2} dB"),
            Self::Equal => f.write_str("equal outputs"),
            Self::NoSignal => f.write_str("−∞ dB: float outputs are all 0"),
            Self::OutOfRange => f.write_str("undefined: squares beyond a float64"),
            Self::NothingCompared => f.write_str("no finite value to compare"),
        }
    }
}

impl Comparison {
    /// Of no rows.
    pub const NOTHING: Self = Self {
        accuracy: Accuracy { top1: None, top5: None },
        agreement: None,
        sqnr_db: None,
        squared_error: None,
        cosine: None,
        max_abs_diff: None,
        max_abs_float: None,
        not_finite: 0,
        rows: 0,
    };

    /// The SQNR, with the reason why it is no number.
    #[must_use]
    pub fn sqnr(&self) -> Sqnr {
        match (self.sqnr_db, self.max_abs_diff) {
            (Some(db), _) => Sqnr::Db(db),
            (None, None) => Sqnr::NothingCompared,
            (None, Some(0.0)) => Sqnr::Equal,
            (None, Some(_)) if self.max_abs_float == Some(0.0) => Sqnr::NoSignal,
            (None, Some(_)) => Sqnr::OutOfRange,
        }
    }
}
