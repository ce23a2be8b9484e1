//! The order of the stages, and nothing else that a stage could do itself.

mod compare;
mod estimate;
mod files;
mod hash;
mod run_dir;
mod select;
mod worst;

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use tch::Tensor;

use crate::config::{DevicePlan, Plan};
use crate::dataset::{self, Dataset};
use crate::emit::{self, Emission};
use crate::evaluate;
use crate::feed;
use crate::jit::{self, Arguments, Clean, Instrumented, Module};
use crate::observe::{self, observe};
use crate::quantizer::QuantParams;
use crate::report::{self, Report, SiteReport, Timings};
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
pub trait Progress {
    /// A stage of `total` rows begins; 0 where there is nothing to count.
    fn stage(&mut self, name: &'static str, total: usize);
    /// Rows of the stage are done.
    fn advance(&mut self, rows: usize);
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

    progress.stage("load", 0);
    let mut clock = Instant::now();
    let hashes = hash::of_plan(plan)?;
    let calibration = Dataset::open(&plan.calibration)?;
    let comparison = compare::Data::open(plan)?;
    let model = load_clean(plan, &calibration)?;
    let sites = sites::find(model.listing());
    if sites.weights.is_empty() && sites.activations.is_empty() {
        return Err(Error::NoSites { model: plan.model.clone() });
    }
    comparison.check(&model, &calibration)?;
    let (mut sites, settings) = settings::settle(plan, sites)?;
    timings.load = lap(&mut clock);

    progress.stage("calibrate", calibration.rows());
    let statistics = observe(&model, &sites.activations, &calibration, |rows| progress.advance(rows))?;
    timings.calibrate = lap(&mut clock);

    progress.stage("search", 0);
    let selections = select::select(&settings, &model, &mut sites, &statistics)?;
    let worst_sites = worst::worst(&model, &sites, &statistics, &selections.reports, calibration.rows())?;
    timings.search = lap(&mut clock);

    progress.stage("emit", 0);
    let versions = versions();
    let description = serde_json::to_string(&Description {
        schema: report::SCHEMA,
        versions: &versions,
        hashes: &hashes,
        seed: plan.seed,
        sites: &selections.reports,
        left_float: &sites.left_float,
    })?;
    let emission =
        Emission { sites: &sites, activations: &selections.activations, weights: &selections.weights, description };
    let file = run_dir.path().join(MODEL_FILE);
    emit::fake_quant(&model, &emission, &file)?;
    timings.emit = lap(&mut clock);

    progress.stage("evaluate", comparison.rows(&calibration));
    let simulation = Simulation::new(&model, &sites, &selections)?;
    simulation.check_against(&file, comparison.dataset(&calibration))?;
    let evaluation = comparison.run(&model, &simulation, &calibration, |rows| progress.advance(rows))?;
    timings.evaluate = lap(&mut clock);

    timings.total = start.elapsed().as_secs_f64();
    let report = Report {
        schema: report::SCHEMA,
        model: plan.model.clone(),
        device: device_name(plan.device).to_owned(),
        seed: plan.seed,
        hashes,
        versions,
        timings_s: timings,
        peak_memory_bytes: peak_memory_bytes(),
        calibration_samples: calibration.rows(),
        warnings: warnings(&model, &model.module().other_methods()?, &sites, &selections.reports, &evaluation),
        sites: selections.reports,
        worst_sites,
        left_float: sites.left_float,
        evaluation,
        files: report::Files { float_bytes: size(&plan.model)?, quantized_bytes: size(&file)? },
    };
    run_dir.write("report.json", &report.to_json()?)?;
    run_dir.write(EXPERIMENT_FILE, &plan.to_yaml()?)?;
    let dir = run_dir.keep()?;
    Ok(Outcome { report, dir })
}

/// Loads the model and cleans it, checked on the first calibration rows.
///
/// # Errors
/// Where the model cannot be loaded, fed or cleaned.
pub fn load_clean(plan: &Plan, calibration: &Dataset) -> Result<Clean, Error> {
    let module = Module::load(&plan.model)?;
    let sample = check_sample(&module, calibration, plan.calibration.batch_size.get())?;
    Ok(module.clean(Some(&sample))?)
}

/// A few rows that the model runs on; a model that was traced for one batch size gets a whole batch.
///
/// # Errors
/// Where the rows cannot be read or the model fails on them.
pub fn check_sample(module: &Module, data: &Dataset, batch_size: usize) -> Result<Arguments, Error> {
    Ok(check_rows(module, data, batch_size)?.0)
}

/// [`check_sample`], and how many rows it is.
fn check_rows(module: &Module, data: &Dataset, batch_size: usize) -> Result<(Arguments, usize), Error> {
    let bind = |rows| -> Result<_, Error> {
        let batch = data.first(rows)?;
        let rows = batch.rows;
        Ok((feed::bind(module, batch)?, rows))
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
    fn new(model: &Clean, sites: &Sites, selections: &select::Selections) -> Result<Self, Error> {
        let mut params = Vec::new();
        let mut taps = Vec::new();
        for (site, quantizer) in sites.activations.iter().zip(&selections.activations) {
            let Some(quantizer) = quantizer else { continue };
            let number = params.len();
            params.push(*quantizer);
            taps.extend(site.anchors.iter().map(|anchor| jit::Tap { value: anchor.value, number, substitutes: true }));
        }
        let weights = sites.weights.iter().zip(&selections.weights);
        let constants: Vec<(jit::ValueId, Tensor)> = weights
            .flat_map(|(site, tensor)| site.values.iter().map(|&value| (value, tensor.shallow_clone())))
            .collect();
        Ok(Self { instrumented: model.instrument(&taps, &constants)?, params })
    }

    pub(crate) fn run(&self, arguments: &Arguments) -> Result<jit::Output, jit::Error> {
        self.instrumented.run(arguments, &mut crate::simulate::Simulate { params: &self.params })
    }

    /// Loads the written file and runs it op by op on the first batches: it has to compute what was simulated, bit for bit.
    fn check_against(&self, file: &std::path::Path, data: &Dataset) -> Result<(), Error> {
        let emitted = Module::load(file)?;
        let by_op = Instrumented::of_module(&emitted)?;
        for batch in data.batches().take(CHECK_BATCHES) {
            let arguments = feed::bind(&emitted, batch?)?;
            let found = by_op.run(&arguments, &mut jit::NoVisit)?;
            let expected = self.run(&arguments)?;
            let difference = compare::largest_difference(&expected, &found)?;
            if difference != 0.0 {
                return Err(Error::Differs { path: file.to_owned(), difference });
            }
        }
        Ok(())
    }
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
    (count > 0).then(|| {
        format!("{count} output values are NaN or infinite; SQNR, cosine and the largest difference leave them out")
    })
}

fn versions() -> report::Versions {
    report::Versions { tsquant: env!("CARGO_PKG_VERSION").to_owned(), torch: jit::torch_version() }
}

fn device_name(device: DevicePlan) -> &'static str {
    match device {
        DevicePlan::Auto | DevicePlan::Cpu => "cpu",
    }
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
