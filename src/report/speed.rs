//! How long models take, as plain data.

use std::path::PathBuf;

use serde::Serialize;

use super::Versions;

/// Times of several models on the same rows, taken in turn.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Race {
    /// Rows of each run.
    pub batch_size: usize,
    /// In the order of the models.
    pub models: Vec<Latency>,
}

/// Times of one model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// What it is called.
    pub name: String,
    /// Runs that were timed, after those to warm up.
    pub runs: usize,
    /// Milliseconds that half of the runs stay below.
    pub p50_ms: f64,
    /// Milliseconds that 95% of the runs stay below.
    pub p95_ms: f64,
    /// Milliseconds of the fastest run.
    pub min_ms: f64,
    /// Rows a second at the median.
    pub rows_per_s: f64,
}

impl Race {
    /// How many times as fast `b` is as `a`, by their medians.
    #[must_use]
    pub fn ratio(&self, a: &str, b: &str) -> Option<f64> {
        let of = |name: &str| self.models.iter().find(|model| model.name == name).map(|model| model.p50_ms);
        Some(of(a)? / of(b)?)
    }
}

/// What `tsquant bench --json` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bench {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// Of tsquant and libtorch.
    pub versions: Versions,
    /// Absolute paths of the models, in order.
    pub models: Vec<PathBuf>,
    /// Absolute path of the data.
    pub data: PathBuf,
    /// Threads of libtorch's kernels.
    pub threads: usize,
    /// The engine of 8-bit kernels.
    pub engine: String,
    /// One for each batch size.
    pub races: Vec<Race>,
}

impl Bench {
    /// As indented JSON.
    ///
    /// # Errors
    /// Where serialization fails.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
