//! The order of the stages, and nothing else that a stage could do itself.

mod base;
mod bench;
mod blame;
mod calibrate;
mod calibration;
mod chosen;
mod compare;
mod device;
mod error;
mod estimate;
mod experiment;
mod files;
mod hash;
mod int8;
mod journal;
mod kept;
mod kernels;
mod mixed;
mod output_file;
mod refine;
mod run_dir;
mod score;
mod select;
mod shared;
mod simulation;
mod worst;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::Device;

use self::base::Base;
use self::calibration::Calibration;
use self::chosen::Chosen;
use self::compare::Comparison;
use self::device::Batches;
pub use self::kept::statistics::Kept;
use self::run_dir::RunDir;
use self::score::{Asking, Keeping, ScoresTold};
use crate::config::{BiasCorrection, DataPlan, Format, HessianPlan, Plan, Rounding};
use crate::correct::Corrections;
use crate::dataset::Dataset;
use crate::jit::{self, Arguments, Clean, Listing, Module};
use crate::report::{self, Report, SiteReport, Sqnr, Timings};
use crate::settings::Settings;
use crate::sites::{self, Kernels, LeftFloat, Sites};

pub use bench::{BenchRequest, bench};
pub use calibrate::{Calibrated, Request, calibrate, merge};
pub use error::Error;
pub use estimate::{Estimate, estimate};
pub use experiment::{SweepOutcome, experiment};
pub use files::evaluate;
pub use journal::JournalError;
pub use kept::statistics::{KeptScores, Key, ScoredLayers, is_one as is_statistics};
pub use run_dir::{RunDirError, abandon_unfinished_runs};

/// Rows that the clean-up is checked on.
const CHECK_ROWS: usize = 4;
/// Batches that the written file is checked on.
const CHECK_BATCHES: usize = 2;
/// File name of the emitted model in the run directory.
pub const MODEL_FILE: &str = "quantized.pt";
/// File name of the resolved experiment in the run directory.
pub const EXPERIMENT_FILE: &str = "experiment.yaml";

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
    /// Runs of a sweep.
    Runs(usize),
}

/// A finished run.
#[derive(Debug)]
pub struct Outcome {
    /// What `report.json` holds.
    pub report: Report,
    /// The run directory.
    pub dir: PathBuf,
}

/// Quantizes one model as planned and writes the run directory, whole or not at all. Given a file of statistics that
/// [`calibrate()`] wrote, it starts from these.
///
/// # Errors
/// Whatever goes wrong in a stage; nothing is left behind then.
pub fn quantize(plan: &Plan, statistics: Option<&Path>, progress: &mut dyn Progress) -> Result<Outcome, Error> {
    let mut clock = Clock::start();
    let plan = &int8::settled(plan)?;
    let run_dir = RunDir::open(&plan.output.dir)?;
    let kept = statistics.map(Kept::read).transpose()?;
    let taken = device::take(plan.device)?;
    progress.stage("load", Work::Uncounted);
    let calibration = match &kept {
        Some(kept) => Calibration::kept(&plan.calibration, kept.key.data.clone(), kept.rows),
        None => Calibration::open(&plan.calibration)?,
    };
    let (base, comparison) = Base::load_to_compare(plan, taken, (calibration, kept.as_ref()))?;
    let hashes = base.hashes(plan, &comparison)?;
    let (sites, settings) = settle(plan, &base)?;
    clock.timings.load = clock.lap();

    let observed = match &kept {
        Some(kept) => base.observed_in(kept, plan, &sites)?,
        None => {
            progress.stage("calibrate", Work::Rows(base.calibration.rows));
            let targets = base.targets(plan.weights.bias_correction, &sites);
            let batches = base.calibration.data()?.batches();
            base.observe(plan, batches, (targets, &sites), |rows| progress.advance(rows))?
        }
    };
    clock.timings.calibrate = clock.lap();

    let asking = Asking::new(&settings, &sites, Some(&observed.statistics));
    // Overrides may have taken the method away again, or left the sites float.
    let pool = plan.hessian.as_ref().filter(|_| !asking.is_empty()).map(|hessian| {
        // How often all rows run is not known beforehand where there is a tolerance.
        let rows = Work::Rows(hessian.request.samples.get().min(base.calibration.rows));
        progress.stage("hessian", if hessian.request.tolerance.is_none() { rows } else { Work::Uncounted });
        let keeping = Keeping { plan, base: &base, statistics: kept.as_ref(), dir: run_dir.path() };
        let pool = asking.score(hessian, &keeping, |rows| progress.advance(rows));
        pool.map_err(hessian_batches(hessian).blame()).map(|pool| (pool, hessian))
    });
    let pool = pool.transpose()?;
    let scores = pool.as_ref().map(|(pool, hessian)| pool.of(&asking, hessian)).transpose()?;
    let (scores, mut told) = scores.unwrap_or_default();
    if let Some(kept) = &kept {
        told.warnings.push(kept_statistics(kept, &base.calibration));
    }
    clock.timings.hessian = if pool.is_some() { clock.lap() } else { 0.0 };

    let given = (observed.statistics.as_slice(), &scores);
    let settings = mixed::settle(&base, (&sites, settings), given, &mut told, progress)?;
    let chosen = Chosen::new(&base, plan, (sites, &settings), observed, &scores, progress)?;
    clock.timings.search = clock.lap() - chosen.correct;
    clock.timings.correct = chosen.correct;
    finish((&base, &comparison), plan, (chosen, hashes, told), run_dir, clock, progress)
}

/// The sites that a plan quantizes, and how. What cannot be done is told here, before anything is calibrated.
///
/// # Errors
/// Where overrides or engine do not fit the model, a budget cannot be met, or something cannot be done op by op.
fn settle(plan: &Plan, base: &Base) -> Result<(Sites, Settings), Error> {
    let (sites, settings) = int8::settle(plan, base)?;
    mixed::check(&sites, &settings)?;
    refine::steps(base, plan, (&sites, &settings))?;
    Ok((sites, settings))
}

/// Writes, checks and measures the model that was chosen, and keeps the run directory.
fn finish(
    (base, comparison): (&Base, &Comparison),
    plan: &Plan,
    (chosen, hashes, scores): (Chosen, report::Hashes, ScoresTold),
    run_dir: RunDir,
    mut clock: Clock,
    progress: &mut dyn Progress,
) -> Result<Outcome, Error> {
    let model = &base.model;
    let plan = &int8::settled(plan)?;
    progress.stage("emit", Work::Uncounted);
    let files = ModelFiles::of(plan, run_dir.path());
    if let Some(file) = &files.fake_quant {
        chosen.emit(base, plan, &hashes, file)?;
    }
    let weights = files.int8_weights.as_ref().map(|file| chosen.emit_weights(base, plan, &hashes, file)).transpose()?;
    let emission = chosen.emission_in_levels(base, plan, &hashes)?;
    let reports = &chosen.selections.reports;
    let int8 = files.int8.as_ref().zip(plan.output.int8);
    let int8 = int8.map(|(file, int8)| int8::write((model, &emission, reports), int8, comparison, file)).transpose()?;
    drop(emission);
    clock.timings.emit = clock.lap();

    progress.stage("check", Work::Rows(comparison.checked_rows()));
    let simulation = chosen.simulation(base)?;
    let floats = [(files.fake_quant.as_ref(), Some(&simulation)), (files.int8_weights.as_ref(), weights.as_ref())];
    for (file, simulation) in floats.into_iter().filter_map(|(file, simulation)| file.zip(simulation)) {
        let emitted = Module::load_onto(file, base.taken.device).map_err(device::blame_weights)?;
        let checked = simulation.check_against(&emitted, comparison.dataset(), |rows| progress.advance(rows));
        checked.map_err(comparison.batches().blame())?;
    }
    let dropped = dropped(model.module(), &Module::load(&files.first)?)?;
    clock.timings.check = clock.lap();

    progress.stage("evaluate", Work::Rows(comparison.rows()));
    let mut int8_warnings = Vec::new();
    let (evaluation, int8) = match int8 {
        None => {
            let first = weights.as_ref().filter(|_| plan.output.format == Format::Int8Weights).unwrap_or(&simulation);
            let evaluation = comparison.run(model, first, |rows| progress.advance(rows));
            (evaluation.map_err(comparison.batches().blame())?, None)
        }
        Some(written) => {
            let evaluated = written.evaluate(model, &simulation, comparison, |rows| progress.advance(rows))?;
            int8_warnings = evaluated.warnings;
            let measured = evaluated.measured;
            let first = match plan.output.format {
                Format::Int8 => measured.int8,
                Format::FakeQuant => measured.simulated,
                Format::Int8Weights => comparison.run(model, weights.as_ref().unwrap_or(&simulation), |_| ())?,
            };
            (first, Some(evaluated.report))
        }
    };
    clock.timings.evaluate = clock.lap();

    let Chosen { sites, selections, corrections, worst_sites, not_rounded, given_up, correct: _ } = chosen;
    let mut warnings = int8_warnings;
    warnings.extend(notes(model, &model.module().other_methods()?, &sites, &selections.reports, &evaluation));
    warnings.extend(scores.warnings);
    let correction = given_up.as_ref().map_or(plan.weights.bias_correction, |given_up| given_up.correction);
    let given_up = given_up.map(|given_up| given_up.reason);
    warnings.extend(given_up.clone());
    warnings.extend(base.taken.warning.clone());
    warnings.extend(
        jit::take_unordered()
            .into_iter()
            .map(|op| format!("{op} has no kernel on this GPU that adds up in one order: runs may differ by rounding")),
    );
    let report = Report {
        schema: report::SCHEMA,
        model: plan.model.clone(),
        device: base.device(),
        seed: plan.seed,
        hashes,
        versions: base.versions.clone(),
        timings_s: clock.total(),
        peak_memory_bytes: peak_memory_bytes(),
        calibration_samples: base.calibration.rows,
        mixed_precision: scores.mixed.map(|mixed| mixed.measured(evaluation.quantized.squared_error)),
        hessian: scores.report,
        bias_correction: corrected_biases(correction, corrections),
        not_rounded: (plan.weights.rounding != Rounding::Nearest).then_some(not_rounded),
        given_up,
        int8,
        warnings,
        sites: selections.reports,
        worst_sites,
        left_float: sites.left_float,
        dropped,
        evaluation,
        files: report::Files { float_bytes: size(&plan.model)?, quantized_bytes: size(&files.first)? },
    };
    run_dir.write("report.json", &report.to_json()?)?;
    run_dir.write(EXPERIMENT_FILE, &plan.to_yaml()?)?;
    let dir = run_dir.keep()?;
    Ok(Outcome { report, dir })
}

/// The model files of a run.
struct ModelFiles {
    /// That of the first format.
    first: PathBuf,
    fake_quant: Option<PathBuf>,
    int8: Option<PathBuf>,
    int8_weights: Option<PathBuf>,
}

impl ModelFiles {
    fn of(plan: &Plan, dir: &Path) -> Self {
        let path = |format: Format| match format {
            first if first == plan.output.format => dir.join(MODEL_FILE),
            other => dir.join(format!("quantized_{}.pt", other.name())),
        };
        let wanted = |format| plan.output.formats().any(|other| other == format).then(|| path(format));
        Self {
            first: path(plan.output.format),
            fake_quant: wanted(Format::FakeQuant),
            int8: wanted(Format::Int8),
            int8_weights: wanted(Format::Int8Weights),
        }
    }
}

/// A word on where statistics come from.
fn kept_statistics(kept: &Kept, calibration: &Calibration) -> String {
    let path = kept.path.display();
    let data = if calibration.is_open() { "is the same" } else { "was not looked at" };
    format!("the calibration statistics are those kept in {path}; the data itself {data}")
}

/// What the report says of them.
fn corrected_biases(method: BiasCorrection, corrections: Corrections) -> Option<report::CorrectedBiases> {
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
    load_checked(plan, (calibration, "calibration"), device)
}

/// As [`load_clean`], checked on data of this section of the plan.
fn load_checked(plan: &Plan, (data, section): (&Dataset, &'static str), device: Device) -> Result<Clean, Error> {
    // TF32 would round more than a clean-up may change.
    jit::prepare(device, false)?;
    let batches = Batches { key: device::batch_size_of(section), rows: data.batch_size() };
    let module = Module::load_onto(&plan.model, device).map_err(device::blame_weights)?;
    let (sample, _) = check_rows(&module, data, section).map_err(batches.blame())?;
    let aliased = |listing: &Listing| match kernels::of(plan) {
        Kernels::Float => Vec::new(),
        Kernels::Int8 => sites::returned_in_8_bits(listing),
    };
    let model = module.clean_with(Some(&sample), aliased).map_err(batches.blame())?;
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
    let (sample, _) = check_rows(module, &data, "calibration")?;
    // Data that the model does not run on is an error of the command, not a fault of the model.
    module.forward(&sample)?;
    Ok(sample)
}

/// A few rows that the model runs on, and how many; a model that was traced for one batch size gets a whole batch.
fn check_rows(module: &Module, data: &Dataset, section: &'static str) -> Result<(Arguments, usize), Error> {
    let batch_size = data.batch_size().get();
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

fn notes(
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
    Batches { key: device::batch_size_of("calibration"), rows: plan.calibration.batch_size }
}

fn hessian_batches(plan: &HessianPlan) -> Batches {
    Batches { key: "hessian.batch_size", rows: plan.request.batch_size }
}

/// Takes the times of a run's stages.
struct Clock {
    start: Instant,
    last: Instant,
    timings: Timings,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, timings: Timings::default() }
    }

    /// Seconds since the last lap.
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        seconds
    }

    /// With all of it until now.
    fn total(mut self) -> Timings {
        self.timings.total = self.start.elapsed().as_secs_f64();
        self.timings
    }
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
                squared_error: None,
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
