//! The order of the stages, and nothing else that a stage could do itself.

mod blame;
mod compare;
mod device;
mod estimate;
mod files;
mod hash;
mod kept;
mod run_dir;
mod score;
mod select;
mod worst;

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use tch::Device;

use self::device::Batches;
use self::score::{Asking, Keeping};
use crate::config::{BiasCorrection, DataPlan, Plan};
use crate::correct::{self, Corrections, InputSums, Targets};
use crate::dataset::{self, Dataset};
use crate::emit::{self, Emission};
use crate::evaluate;
use crate::feed;
use crate::hessian;
use crate::jit::{self, Arguments, Clean, Instrumented, Module};
use crate::observe::{self, observe};
use crate::quantizer::QuantParams;
use crate::report::{self, Report, SiteReport, Sqnr, Timings};
use crate::settings;
use crate::sites::{self, LeftFloat, Sites};
use crate::threshold::{ChannelsError, SelectError};

pub use estimate::{Estimate, estimate};
pub use files::evaluate;
pub use run_dir::{RunDirError, abandon_unfinished_runs};

/// Rows that the clean-up is checked on.
const CHECK_ROWS: usize = 4;
/// Batches that the written file is checked on.
const CHECK_BATCHES: usize = 2;
/// File name of the emitted model in the run directory.
pub const MODEL_FILE: &str = "quantized.pt";
/// File name of the resolved experiment in the run directory.
pub const EXPERIMENT_FILE: &str = "experiment.yaml";

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

/// What a run tells while it goes on.
pub trait Progress: Send {
    /// A stage begins.
    fn stage(&mut self, name: &'static str, work: Work);
    /// So many rows or sites of the stage are done.
    fn advance(&mut self, count: usize);
}

/// What a stage has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing that can be counted.
    Uncounted,
    /// Rows of data.
    Rows(usize),
    /// Weights and activations.
    Sites(usize),
}

/// A finished run.
#[derive(Debug)]
pub struct Outcome {
    /// What `report.json` holds.
    pub report: Report,
    /// The run directory.
    pub dir: PathBuf,
}

/// What goes into the emitted archive beside the model.
#[derive(Serialize)]
struct Description<'a> {
    schema: u32,
    versions: &'a report::Versions,
    hashes: &'a report::Hashes,
    seed: u64,
    sites: &'a [SiteReport],
    left_float: &'a [LeftFloat],
}

/// Quantizes one model as planned and writes the run directory, whole or not at all.
///
/// # Errors
/// Whatever goes wrong in a stage; nothing is left behind then.
pub fn quantize(plan: &Plan, progress: &mut dyn Progress) -> Result<Outcome, Error> {
    let start = Instant::now();
    let run_dir = run_dir::RunDir::open(&plan.output.dir)?;
    let mut timings = Timings::default();

    let mut clock = Instant::now();
    let taken = device::take(plan.device)?;
    progress.stage("load", Work::Uncounted);
    let hashes = hash::of_plan(plan)?;
    let calibration = blame::open(&plan.calibration, "calibration")?;
    let comparison = compare::Data::open(plan)?;
    let model = load_clean(plan, &calibration, taken.device)?;
    let sites = sites::find(model.listing());
    if sites.weights.is_empty() && sites.activations.is_empty() {
        return Err(Error::NoSites { model: plan.model.clone() });
    }
    comparison.check(&model, &calibration).map_err(comparison.batches().blame())?;
    let (mut sites, settings) = settings::settle(plan, sites)?;
    timings.load = lap(&mut clock);

    progress.stage("calibrate", Work::Rows(calibration.rows()));
    let targets = targets(plan, &model, &sites);
    let mut inputs = InputSums::new(&targets);
    let statistics = observe(&model, &sites.activations, &mut inputs, &calibration, |rows| progress.advance(rows))
        .map_err(calibration_batches(plan).blame())?;
    timings.calibrate = lap(&mut clock);

    let versions = versions();
    let scoring = plan.hessian.as_ref().map(|hessian| {
        // How often all rows run is not known beforehand where there is a tolerance.
        let rows = Work::Rows(hessian.request.samples.get().min(calibration.rows()));
        progress.stage("hessian", if hessian.request.tolerance.is_none() { rows } else { Work::Uncounted });
        let device = taken.name();
        let keeping = Keeping { plan, hashes: &hashes, versions: &versions, device: &device, dir: run_dir.path() };
        let asking = Asking::new(&settings, &sites, Some(&statistics));
        let batches = Batches { key: "hessian.batch_size", rows: hessian.request.batch_size };
        let scoring = asking.score(hessian, &keeping, &model, &calibration, |rows| progress.advance(rows));
        scoring.map_err(batches.blame())
    });
    let scoring = scoring.transpose()?.unwrap_or_default();
    timings.hessian = if plan.hessian.is_some() { lap(&mut clock) } else { 0.0 };

    progress.stage("search", Work::Sites(sites.weights.len() + sites.activations.len()));
    let given = select::Given { settings: &settings, statistics: &statistics, scores: &scoring.sites };
    let selections = select::select(given, &model, &mut sites, |count| progress.advance(count))?;
    let rows = worst::Rows { seen: calibration.rows(), stored: calibration.stored_rows() };
    let worst_sites = worst::worst(&model, &sites, &statistics, &selections.reports, rows)?;
    let seen = correct::Seen { inputs, statistics: &statistics };
    let corrections = correct::closed_form(&model, &sites, &selections.weights, &targets, seen)?;
    timings.search = lap(&mut clock);

    progress.stage("emit", Work::Uncounted);
    let description = serde_json::to_string(&Description {
        schema: report::SCHEMA,
        versions: &versions,
        hashes: &hashes,
        seed: plan.seed,
        sites: &selections.reports,
        left_float: &sites.left_float,
    })?;
    let emission = Emission {
        sites: &sites,
        activations: &selections.activations,
        weights: &selections.weights,
        biases: &corrections.biases,
        description,
    };
    let file = run_dir.path().join(MODEL_FILE);
    emit::fake_quant(&model, &emission, &file)?;
    timings.emit = lap(&mut clock);

    progress.stage("check", Work::Rows(comparison.checked_rows(&calibration)));
    let simulation =
        Simulation::new(&model, &sites, &selections, &corrections).map_err(device::blame_weights)?;
    let emitted = Module::load_onto(&file, taken.device).map_err(device::blame_weights)?;
    let checked = simulation.check_against(&emitted, comparison.dataset(&calibration), |rows| progress.advance(rows));
    checked.map_err(comparison.batches().blame())?;
    let dropped = dropped(model.module(), &emitted)?;
    drop(emitted);
    timings.check = lap(&mut clock);

    progress.stage("evaluate", Work::Rows(comparison.rows(&calibration)));
    let evaluation = comparison
        .run(&model, &simulation, &calibration, |rows| progress.advance(rows))
        .map_err(comparison.batches().blame())?;
    timings.evaluate = lap(&mut clock);

    let mut warnings = warnings(&model, &model.module().other_methods()?, &sites, &selections.reports, &evaluation);
    warnings.extend(scoring.warnings);
    warnings.extend(taken.warning.clone());
    warnings.extend(
        jit::take_unordered()
            .into_iter()
            .map(|op| format!("{op} has no kernel on this GPU that adds up in one order: runs may differ by rounding")),
    );
    timings.total = start.elapsed().as_secs_f64();
    let report = Report {
        schema: report::SCHEMA,
        model: plan.model.clone(),
        device: taken.name(),
        seed: plan.seed,
        hashes,
        versions,
        timings_s: timings,
        peak_memory_bytes: peak_memory_bytes(),
        calibration_samples: calibration.rows(),
        hessian: scoring.report,
        bias_correction: corrected_biases(plan, corrections),
        warnings,
        sites: selections.reports,
        worst_sites,
        left_float: sites.left_float,
        dropped,
        evaluation,
        files: report::Files { float_bytes: size(&plan.model)?, quantized_bytes: size(&file)? },
    };
    run_dir.write("report.json", &report.to_json()?)?;
    run_dir.write(EXPERIMENT_FILE, &plan.to_yaml()?)?;
    let dir = run_dir.keep()?;
    Ok(Outcome { report, dir })
}

/// The ops whose biases are to be corrected, as planned.
fn targets(plan: &Plan, model: &Clean, sites: &Sites) -> Targets {
    match plan.weights.bias_correction {
        BiasCorrection::None => Targets::default(),
        BiasCorrection::ClosedForm => Targets::find(model.listing(), sites),
    }
}

/// What the report says of them.
fn corrected_biases(plan: &Plan, corrections: Corrections) -> Option<report::CorrectedBiases> {
    let method = plan.weights.bias_correction;
    let layers = corrections.biases.into_iter();
    let left_out = corrections.left_out.into_iter();
    (method != BiasCorrection::None).then(|| report::CorrectedBiases {
        method,
        layers: layers
            .map(|bias| report::CorrectedBias { layer: bias.layer, op: bias.op, added: bias.added })
            .collect(),
        left_out: left_out.map(|left| LeftFloat { name: left.layer, op: left.op, reason: left.reason }).collect(),
    })
}

/// Loads the model onto a device and cleans it, checked on the first calibration rows. From then on the device computes as the
/// plan says.
///
/// # Errors
/// Where the model cannot be loaded, fed or cleaned.
pub fn load_clean(plan: &Plan, calibration: &Dataset, device: Device) -> Result<Clean, Error> {
    // TF32 would round more than a clean-up may change.
    jit::prepare(device, false)?;
    let batches = calibration_batches(plan);
    let module = Module::load_onto(&plan.model, device).map_err(device::blame_weights)?;
    let (sample, _) = check_rows(&module, calibration, batches.rows.get(), "calibration").map_err(batches.blame())?;
    let model = module.clean(Some(&sample)).map_err(batches.blame())?;
    jit::prepare(device, plan.allow_tf32)?;
    Ok(model)
}

/// The device of a plan.
///
/// # Errors
/// Where a GPU is asked for that does not work.
pub fn take_device(plan: &Plan) -> Result<Device, Error> {
    Ok(device::take(plan.device)?.device)
}

/// The data of `calibration` and a few of its rows that the model runs on.
///
/// # Errors
/// Where the rows cannot be read or the model fails on them.
pub fn check_sample(module: &Module, plan: &DataPlan) -> Result<Arguments, Error> {
    let data = blame::open(plan, "calibration")?;
    let (sample, _) = check_rows(module, &data, plan.batch_size.get(), "calibration")?;
    // Data that the model does not run on is an error of the command, not a fault of the model.
    module.forward(&sample)?;
    Ok(sample)
}

/// A few rows that the model runs on, and how many; a model that was traced for one batch size gets a whole batch.
fn check_rows(
    module: &Module,
    data: &Dataset,
    batch_size: usize,
    section: &'static str,
) -> Result<(Arguments, usize), Error> {
    let bind = |rows| -> Result<_, Error> {
        let batch = data.first(rows)?;
        let rows = batch.rows;
        Ok((blame::bind(module, batch, section)?, rows))
    };
    let few = bind(CHECK_ROWS.min(batch_size))?;
    if batch_size <= CHECK_ROWS || module.forward(&few.0).is_ok() {
        return Ok(few);
    }
    bind(batch_size)
}

/// The quantized model, run without being written: the float graph with quantized weights and a simulated quantizer at
/// each site.
pub(crate) struct Simulation {
    instrumented: Instrumented,
    params: Vec<QuantParams>,
}

impl Simulation {
    fn new(
        model: &Clean,
        sites: &Sites,
        selections: &select::Selections,
        corrections: &Corrections,
    ) -> Result<Self, Error> {
        let mut params = Vec::new();
        let mut taps = Vec::new();
        for (site, quantizer) in sites.activations.iter().zip(&selections.activations) {
            let Some(quantizer) = quantizer else { continue };
            let number = params.len();
            params.push(*quantizer);
            taps.extend(site.anchors.iter().map(|anchor| jit::Tap {
                value: anchor.value,
                number,
                kind: jit::TapKind::Substitute,
            }));
        }
        let weights = sites.weights.iter().zip(&selections.weights);
        let weights = weights.flat_map(|(site, tensor)| {
            site.values.iter().map(|&value| (jit::Place::Constant(value), tensor.shallow_clone()))
        });
        let biases = corrections.biases.iter().map(|bias| (bias.place, bias.tensor.shallow_clone()));
        let tensors: Vec<_> = weights.chain(biases).collect();
        Ok(Self { instrumented: model.instrument(&taps, &tensors)?, params })
    }

    pub(crate) fn run(&self, arguments: &Arguments) -> Result<jit::Output, jit::Error> {
        self.instrumented.run(arguments, &mut crate::simulate::Simulate { params: &self.params })
    }

    /// Runs the written file, loaded again, op by op on the first batches: it has to compute what was simulated, bit for bit.
    fn check_against(&self, emitted: &Module, data: &Dataset, mut advance: impl FnMut(usize)) -> Result<(), Error> {
        let by_op = Instrumented::of_module(emitted)?;
        for batch in data.batches().take(CHECK_BATCHES) {
            let batch = batch?;
            let rows = batch.rows;
            let arguments = feed::bind(emitted, batch)?;
            let found = by_op.run(&arguments, &mut jit::NoVisit)?;
            let expected = self.run(&arguments)?;
            let difference = compare::largest_difference(&expected, &found)?;
            if difference != 0.0 {
                return Err(Error::Differs { path: emitted.path().to_owned(), difference });
            }
            advance(rows);
        }
        Ok(())
    }
}

/// What `emitted` is without, of the methods of `float` and of the attributes that its forward does not use.
fn dropped(float: &Module, emitted: &Module) -> Result<Vec<report::Dropped>, Error> {
    let kept_methods = emitted.other_methods()?;
    let methods = float.other_methods()?.into_iter().filter(|name| !kept_methods.contains(name));
    let methods = methods.map(|name| report::Dropped { name, kind: "method".to_owned() });
    let kept: BTreeSet<String> = emitted.attributes()?.into_iter().map(|attribute| attribute.name).collect();
    let attributes = float.attributes()?.into_iter().filter(|item| !item.is_used && !kept.contains(&item.name));
    let attributes = attributes.map(|item| report::Dropped { name: item.name, kind: item.kind });
    Ok(methods.chain(attributes).collect())
}

fn warnings(
    model: &Clean,
    other_methods: &[String],
    sites: &Sites,
    reports: &[SiteReport],
    evaluation: &report::Evaluation,
) -> Vec<String> {
    let mut warnings = model.notes().to_vec();
    let methods = other_methods.iter();
    warnings.extend(
        methods.map(|name| format!("method `{name}` is not part of the emitted model, which has forward alone")),
    );
    let never_ran = sites.left_float.iter().filter(|left| left.reason == select::NEVER_RAN);
    warnings.extend(never_ran.map(|left| format!("{}: {}", left.name, left.reason)));
    let unknown = sites.unknown_ops.iter();
    warnings.extend(unknown.map(|(op, count)| format!("{op} ({count} nodes) is not in the op table and stays float")));
    let notes =
        reports.iter().flat_map(|site| site.quantizers.notes.iter().map(move |note| format!("{}: {note}", site.name)));
    warnings.extend(notes);
    warnings.extend(not_finite(evaluation));
    warnings
}

/// A word on outputs that measures leave out, if there are any.
fn not_finite(evaluation: &report::Evaluation) -> Option<String> {
    let count = evaluation.quantized.not_finite;
    match evaluation.quantized.sqnr() {
        _ if count == 0 => None,
        Sqnr::NothingCompared => {
            Some(format!("all {count} output values are NaN or infinite: no finite value could be compared"))
        }
        _ => Some(format!(
            "{count} output values are NaN or infinite; SQNR, cosine and the largest difference leave them out"
        )),
    }
}

fn versions() -> report::Versions {
    report::Versions { tsquant: env!("CARGO_PKG_VERSION").to_owned(), torch: jit::torch_version() }
}

fn calibration_batches(plan: &Plan) -> Batches {
    Batches { key: "calibration.batch_size", rows: plan.calibration.batch_size }
}

fn lap(clock: &mut Instant) -> f64 {
    let now = Instant::now();
    let seconds = now.duration_since(*clock).as_secs_f64();
    *clock = now;
    seconds
}

fn size(path: &std::path::Path) -> Result<u64, Error> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    Ok(metadata.len())
}

/// Largest resident set of this process so far, where the system tells (Linux).
fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_that_are_not_finite_get_a_word() {
        let note = |not_finite, max_abs_diff| {
            let accuracy = report::Accuracy::default();
            let quantized = report::Comparison {
                accuracy,
                agreement: None,
                sqnr_db: None,
                cosine: None,
                max_abs_diff,
                max_abs_float: max_abs_diff,
                not_finite,
                rows: 1,
            };
            super::not_finite(&report::Evaluation { data: "calibration", float: accuracy, quantized })
        };
        assert_eq!(note(0, Some(0.0)), None);
        assert!(note(3, Some(0.0)).is_some_and(|note| note.ends_with("the largest difference leave them out")));
        let all = "all 3 output values are NaN or infinite: no finite value could be compared";
        assert_eq!(note(3, None).as_deref(), Some(all));
    }
}
