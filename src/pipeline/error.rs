//! Why a run fails, in words for its user.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use super::{JournalError, RunDirError};
use crate::dataset::{self, Shard};
use crate::evaluate;
use crate::hessian;
use crate::jit;
use crate::observe;
use crate::threshold::{ChannelsError, SelectError};

/// Why a run fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Jit(#[from] jit::Error),
    /// The data.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// Calibration.
    #[error(transparent)]
    Observe(#[from] observe::Error),
    /// Hessian scores.
    #[error(transparent)]
    Hessian(#[from] hessian::Error),
    /// Hessian scores of a layer that are of no use.
    #[error(
        "{kind} site {site}: HMSE needs Hessian scores, but {reason}; `hessian: {{allow_fallback: true}}` takes MSE there, \
         and `overrides` can set its error_method"
    )]
    Scores {
        /// `weight` or `activation`.
        kind: &'static str,
        /// Its name.
        site: String,
        /// Why.
        reason: hessian::Unusable,
    },
    /// Hessian scores of a layer that are of no use, and whose bits are to be chosen by them.
    #[error(
        "{kind} site {site}: mixed_precision needs Hessian scores, but {reason}; `hessian: {{allow_fallback: true}}` takes its \
         widest bits there, and `overrides` can set its bits"
    )]
    ScoresForBits {
        /// `weight` or `activation`.
        kind: &'static str,
        /// Its name.
        site: String,
        /// Why.
        reason: hessian::Unusable,
    },
    /// A budget that no choice of bits meets.
    #[error("{0}")]
    Budget(String),
    /// A site that the 8-bit model has no kernel for.
    #[error(
        "{site}: {reason}{others}; `output: {{strict: false}}` leaves such sites simulated in float, which costs time"
    )]
    Unfit {
        /// The first such site.
        site: String,
        /// Why.
        reason: String,
        /// How many more there are, in words; may be empty.
        others: String,
    },
    /// Data with fewer rows than a batch has.
    #[error("expected data of at least {expected} rows for a batch, found {found}")]
    TooFewRows {
        /// Rows of the batch.
        expected: usize,
        /// Rows that there are.
        found: usize,
    },
    /// A libtorch without 8-bit kernels.
    #[error("this libtorch has no engine for 8-bit kernels, which the format int8 needs")]
    NoEngine,
    /// An engine that this libtorch has not.
    #[error("this libtorch has no engine {engine} for `output.engine`")]
    NoSuchEngine {
        /// Its name.
        engine: &'static str,
    },
    /// An 8-bit kernel that computes something else than the op that it stands for.
    #[error(
        "{layer}: {kernel} of the engine {engine} differs by {largest:.3e} levels from what it stands for; another \
         `output.engine` may do better"
    )]
    KernelDiffers {
        /// The layer.
        layer: String,
        /// The kernel.
        kernel: &'static str,
        /// In levels; relative where it writes float numbers.
        largest: f64,
        /// The engine.
        engine: String,
    },
    /// Float against quantized.
    #[error(transparent)]
    Evaluate(#[from] evaluate::Error),
    /// A threshold cannot be chosen.
    #[error("{kind} site {site}: {source}")]
    Select {
        /// `weight` or `activation`.
        kind: &'static str,
        /// Its name.
        site: String,
        /// Why.
        source: SelectError,
    },
    /// A weight whose values do not fit its shape.
    #[error("weight site {site}: {source}")]
    Channels {
        /// Its name.
        site: String,
        /// Why.
        source: ChannelsError,
    },
    /// No op of the model has a weight or value to quantize.
    #[error("{model}: nothing to quantize: the model has no layer with a constant float32 weight and no activation site; \
             `tsquant inspect` lists its ops", model = model.display())]
    NoSites {
        /// The model.
        model: PathBuf,
    },
    /// Weighted bias correction has nothing to confirm what it finds.
    #[error(
        "`quantization.weights_bias_correction: weighted` needs at least two batches, found {rows} rows in batches of \
             {batch_size}; lower `hessian.batch_size` or give it more rows"
    )]
    OneBatch {
        /// Rows that there are.
        rows: usize,
        /// Rows of a batch.
        batch_size: usize,
    },
    /// Second-order rounding would need too much memory.
    #[error("layer {layer}: expected a Hessian of at most {} MiB for `rounding: gptq`, found {} MiB; take \
             `quantization.weights.rounding_fallback: true` to round this layer to nearest", most >> 20, bytes >> 20)]
    LargeHessian {
        /// The layer.
        layer: String,
        /// Bytes of its Hessian.
        bytes: u64,
        /// Bytes that it may have.
        most: u64,
    },
    /// The plan as YAML, or an override that does not fit the model.
    #[error(transparent)]
    Config(#[from] crate::config::Error),
    /// A value of the experiment that does not fit the model or the data.
    #[error("`{key}`: {source}")]
    Key {
        /// Its full path, such as `evaluation.output`.
        key: String,
        /// Why.
        source: Box<Error>,
    },
    /// A GPU that is not there or does not work.
    #[error("`device: {device}`: {source}")]
    Device {
        /// As planned.
        device: String,
        /// Why.
        source: jit::NoCuda,
    },
    /// The calibration data is not what the statistics are of.
    #[error("{path}: expected the data that the statistics were collected on, of SHA-256 {expected}, found {found}", path = path.display())]
    OtherData {
        /// Where the data is.
        path: PathBuf,
        /// SHA-256 of the data that statistics were collected on.
        expected: String,
        /// SHA-256 of what is there.
        found: String,
    },
    /// A file holds no statistics that can be used.
    #[error("{path}: {reason}", path = path.display())]
    NoStatistics {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Statistics of something else.
    #[error(
        "{path}: expected statistics of this model, data and experiment, found others: {what} is {expected} here and {found} \
         there",
        path = path.display()
    )]
    OtherStatistics {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
        /// As it is here.
        expected: String,
        /// As it is in the file.
        found: String,
    },
    /// Statistics of a shard where those of the whole are needed.
    #[error("{path}: expected statistics of all batches, found those of shard {shard}; merge the shards with `tsquant merge`", path = path.display())]
    OneShard {
        /// The file.
        path: PathBuf,
        /// Which.
        shard: Shard,
    },
    /// Statistics without a site.
    #[error(
        "{path}: expected statistics of the activation site {site}, found none: it was left float when they were collected; \
         calibrate again",
        path = path.display()
    )]
    SiteNotKept {
        /// The file.
        path: PathBuf,
        /// Its name.
        site: String,
    },
    /// More shards than batches.
    #[error("expected no more shards than there are batches, which is {batches}, found {count}")]
    TooManyShards {
        /// Shards that were asked for.
        count: usize,
        /// Batches that there are.
        batches: usize,
    },
    /// Shards of nothing.
    #[error("--shard with --statistics: expected an error method HMSE, whose scores could be computed, found none")]
    NothingToCompute,
    /// A file that would be written over before it is read again.
    #[error("{path}: expected another file to write than those that are merged", path = path.display())]
    OutputIsInput {
        /// The file.
        path: PathBuf,
    },
    /// A tolerance that no shard can see.
    #[error(
        "`hessian.tolerance`: the error of all rows is not known to a shard; give a number of probes, or one process all rows"
    )]
    ToleranceOfShard,
    /// No files.
    #[error("expected files of statistics to merge, found none")]
    NothingToMerge,
    /// Shards of different numbers of shards.
    #[error(
        "expected shards of one calibration, found {a} in {x} and {b} in {y}",
        a = shards[0], b = shards[1], x = paths[0].display(), y = paths[1].display()
    )]
    ShardsOfOther {
        /// The files.
        paths: [PathBuf; 2],
        /// What they hold.
        shards: [Shard; 2],
    },
    /// A shard that is there twice.
    #[error("expected each shard once, found {shard} in {x} and in {y}", x = paths[0].display(), y = paths[1].display())]
    ShardTwice {
        /// The files.
        paths: [PathBuf; 2],
        /// Which.
        shard: Shard,
    },
    /// Shards that are missing.
    #[error("expected all shards, found none of {missing}")]
    ShardsMissing {
        /// Which.
        missing: String,
    },
    /// Shards of different things.
    #[error("{x} and {y} cannot be merged: they have other {what}", x = paths[0].display(), y = paths[1].display())]
    Unlike {
        /// The files.
        paths: [PathBuf; 2],
        /// What differs.
        what: String,
    },
    /// Something else in the place of a file.
    #[error("{path}: expected nothing or a file of statistics, found {found}; choose another output or move it", path = path.display())]
    OutputOccupied {
        /// The place.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// YAML that was written a moment ago.
    #[error("the settings cannot be read again: {message}")]
    Unreadable {
        /// Why.
        message: String,
    },
    /// The memory of the GPU is not enough.
    #[error("not enough memory on the GPU for batches of {rows} rows: {message}; lower `{key}`, or take `device: cpu`")]
    OutOfMemory {
        /// The key that says how many rows a batch has.
        key: &'static str,
        /// How many these are.
        rows: NonZeroUsize,
        /// libtorch's own words.
        message: String,
    },
    /// The memory of the GPU is not enough for the model alone.
    #[error(
        "not enough memory on the GPU for the model's weights: {message}; take another GPU (`device: cuda:N`) or `device: cpu`"
    )]
    NoRoomForWeights {
        /// libtorch's own words.
        message: String,
    },
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The directory of a sweep.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A sweep without a single run that could be planned.
    #[error("expected a sweep with at least one run that can be planned, found none")]
    NothingToRun,
    /// The scores that several runs of a sweep wait for.
    #[error("{message}")]
    SharedScores {
        /// Why there are none.
        message: String,
    },
    /// A sweep of which nothing is left.
    #[error("all {count} runs of the sweep failed, the first: {message}")]
    AllFailed {
        /// How many there were.
        count: usize,
        /// Why the first of them failed.
        message: String,
    },
    /// CSV.
    #[error("the results cannot be written as CSV: {0}")]
    Csv(#[from] csv::Error),
    /// A file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("{path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The written model is not the simulated one.
    #[error("{path}: the emitted model differs from its simulation by up to {difference:e}; nothing was kept", path = path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// Largest absolute difference of an output.
        difference: f64,
    },
    /// JSON.
    #[error("the report cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// libtorch.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}
