//! `tsquant quantize`.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::measures::{self, Sizes};
use super::progress::Display;
use super::{UsageError, experiment_of, located, mixed, table, working_dir};
use crate::config::{Metric, Plan};
use crate::pipeline::{self, Estimate, Outcome};
use crate::report::{Dropped, Kind, Report, Timings, WorstSite};

/// Quantize a model as a YAML file describes.
#[derive(Debug, Args)]
#[command(after_help = "Example: tsquant quantize configs/mnist_resnet.yaml --set quantization.activations.bits=6")]
pub(super) struct Quantize {
    /// The experiment.
    experiment: PathBuf,
    /// Lay a value over the file's, for instance quantization.weights.bits=4; may be repeated, later ones win.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the model runs: auto, cpu, cuda, or cuda:1 for the second GPU.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Start from the statistics that `tsquant calibrate` wrote, without running the calibration data.
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    statistics: Option<PathBuf>,
    /// Load model and data, run one batch, print the plan and what a run would cost; write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print how each 8-bit kernel differs from the op that it stands for, on the same input.
    #[arg(long, value_name = "WHAT", conflicts_with = "dry_run")]
    verify: Option<Verify>,
    /// Print nothing but errors; of a dry run, which then only checks, the exit code is left.
    #[arg(long, short)]
    quiet: bool,
}

/// What is shown beside the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Verify {
    /// Layer by layer.
    Layers,
}

impl Quantize {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let experiment = experiment_of(&self.experiment, &self.set, self.device.as_deref())?;
        let folder = working_dir()?;
        let dispensable = if self.statistics.is_some() { "calibration.data" } else { "" };
        let plan = experiment.resolve_without(dispensable, &folder)?;
        if self.dry_run {
            let estimate = pipeline::estimate(&plan).map_err(|error| located(&experiment, error))?;
            if self.quiet {
                return Ok(());
            }
            return print_estimate(&mut std::io::stdout().lock(), &plan, &estimate);
        }
        if self.verify.is_some() && plan.output.int8.is_none() {
            let reason = "--verify layers: expected int8 in `output.format`, found no format with 8-bit kernels";
            return Err(UsageError(reason.to_owned()).into());
        }
        let statistics = self.statistics.map(|path| folder.join(path));
        let mut display = Display::new(self.quiet);
        let outcome = pipeline::quantize(&plan, statistics.as_deref(), &mut display);
        display.finish();
        let outcome = outcome.map_err(|error| located(&experiment, error))?;
        let out = &mut std::io::stdout().lock();
        if !self.quiet {
            print(out, &plan, &outcome)?;
        }
        if let (Some(Verify::Layers), Some(int8)) = (self.verify, &outcome.report.int8) {
            super::int8::print_layers(out, int8)?;
        }
        Ok(())
    }
}

/// The resolved experiment, then what it would do and cost as comments, so that the whole is an experiment again.
fn print_estimate(out: &mut impl Write, plan: &Plan, estimate: &Estimate) -> anyhow::Result<()> {
    write!(out, "{}", plan.to_yaml()?)?;
    writeln!(
        out,
        "# {} ({} elements) and {} would be quantized, {} left float",
        table::count(estimate.weights, "weight"),
        estimate.weight_elements,
        table::count(estimate.activations, "activation"),
        table::count(estimate.left_float.len(), "op or value"),
    )?;
    if let Some([corrected, left_out]) = estimate.biases {
        writeln!(out, "# {}", biases(corrected, left_out, "would be corrected"))?;
    }
    if let Some([rounded, nearest]) = estimate.roundings {
        writeln!(out, "# {}", roundings(rounded, nearest, "would be rounded by gptq"))?;
    }
    if let Some(planned) = &plan.mixed_precision {
        mixed::print_planned(out, planned, estimate.free)?;
    }
    let hessian = match (estimate.hessian_rows, estimate.timings.hessian) {
        (0, _) => String::new(),
        (rows, seconds) => format!("hessian {seconds:.1} ({rows} rows), "),
    };
    let (times, calibrated, evaluated) = (&estimate.timings, estimate.calibration_rows, estimate.evaluation_rows);
    writeln!(
        out,
        "# about {:.0} s on {}: load {:.1}, calibrate {:.1} ({calibrated} rows), {}search {:.1}, {}check {:.1}, \
         evaluate {:.1} ({evaluated} rows)",
        times.total.max(1.0),
        estimate.device,
        times.load,
        times.calibrate,
        hessian,
        times.search,
        correct_time(times.correct),
        times.check,
        times.evaluate
    )?;
    if let Some(bytes) = estimate.peak_memory_bytes {
        writeln!(out, "# about {} of memory", table::bytes(bytes))?;
    }
    writeln!(out, "# nothing was written; the run would write {}", plan.output.dir.display())?;
    Ok(())
}

fn print(out: &mut impl Write, plan: &Plan, outcome: &Outcome) -> std::io::Result<()> {
    let report = &outcome.report;
    writeln!(out, "{}", result_table(plan, report))?;
    if let Some(int8) = &report.int8 {
        super::int8::print(out, int8)?;
    }
    let count = |kind| report.sites.iter().filter(|site| site.kind == kind).count();
    writeln!(
        out,
        "{} and {} quantized; {} left float (see report.json)",
        table::count(count(Kind::Weight), "weight"),
        table::count(count(Kind::Activation), "activation"),
        table::count(report.left_float.len(), "op or value")
    )?;
    if let Some(mixed) = &report.mixed_precision {
        mixed::print(out, mixed)?;
    }
    if let Some(corrected) = &report.bias_correction {
        writeln!(out, "{}", biases(corrected.layers.len(), corrected.left_out.len(), "corrected"))?;
    }
    if let Some(not_rounded) = &report.not_rounded {
        let rounded = report.sites.iter().filter(|site| site.rounding.is_some()).count();
        writeln!(out, "{}", roundings(rounded, not_rounded.len(), "rounded by gptq"))?;
    }
    if let Some(dropped) = dropped(&report.dropped) {
        writeln!(out, "{dropped}")?;
    }
    print_worst_sites(out, report)?;
    for warning in &report.warnings {
        writeln!(out, "note: {}", table::printable(warning))?;
    }
    let times = &report.timings_s;
    writeln!(
        out,
        "{:.1} s on {}: load {:.1}, calibrate {:.1}, {}search {:.1}, {}emit {:.1}, check {:.1}, evaluate {:.1}",
        times.total,
        report.device,
        times.load,
        times.calibrate,
        hessian_time(report.hessian.is_some(), times),
        times.search,
        correct_time(times.correct),
        times.emit,
        times.check,
        times.evaluate
    )?;
    writeln!(out, "written to {}", outcome.dir.display())
}

fn roundings(rounded: usize, nearest: usize, done: &str) -> String {
    let nearest =
        if nearest == 0 { String::new() } else { format!("; those of {} to nearest", table::count(nearest, "op")) };
    format!("{} {done}{nearest}", table::count(rounded, "weight"))
}

fn biases(corrected: usize, left_out: usize, done: &str) -> String {
    let corrected = if corrected == 1 { "1 bias".to_owned() } else { format!("{corrected} biases") };
    let left_out =
        if left_out == 0 { String::new() } else { format!("; {} left as they are", table::count(left_out, "op")) };
    format!("{corrected} {done}{left_out}")
}

/// The time of the stage that not every run has.
fn hessian_time(has_scores: bool, times: &Timings) -> String {
    if has_scores { format!("hessian {:.1}, ", times.hessian) } else { String::new() }
}

/// The time of another such stage.
fn correct_time(seconds: f64) -> String {
    if seconds > 0.0 { format!("correct {seconds:.1}, ") } else { String::new() }
}

/// How many parts of the float model the emitted one is without, if any.
fn dropped(dropped: &[Dropped]) -> Option<String> {
    let kinds = ["method", "parameter", "buffer", "attribute"];
    let counts = kinds.map(|kind| (kind, dropped.iter().filter(|part| part.kind == kind).count()));
    let counts: Vec<_> =
        counts.into_iter().filter(|(_, count)| *count > 0).map(|(kind, count)| table::count(count, kind)).collect();
    (!counts.is_empty()).then(|| format!("dropped, as forward does not need them: {}", counts.join(", ")))
}

fn print_worst_sites(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    if report.worst_sites.is_empty() {
        return Ok(());
    }
    writeln!(out, "sites with the lowest SQNR of their own, a guess at the cause, a line to try:")?;
    for (index, site) in report.worst_sites.iter().enumerate() {
        let same = |other: &&WorstSite| (&other.cause, &other.line) == (&site.cause, &site.line);
        if let Some(earlier) = report.worst_sites.iter().take(index).find(same) {
            writeln!(out, "  {:.1} dB {}: as {}", site.sqnr_db, site.name, earlier.name)?;
            continue;
        }
        writeln!(out, "  {:.1} dB {}: {}", site.sqnr_db, site.name, site.cause)?;
        if let Some(line) = &site.line {
            writeln!(out, "          {line}")?;
        }
    }
    Ok(())
}

/// Float beside quantized, one row per metric.
fn result_table(plan: &Plan, report: &Report) -> comfy_table::Table {
    let metrics = plan.evaluation.as_ref().map(|evaluation| evaluation.metrics.as_slice());
    let metrics = metrics.filter(|metrics| !metrics.is_empty()).unwrap_or(&[Metric::Agreement, Metric::Sqnr]);
    let sizes = Sizes { float: report.files.float_bytes, quantized: report.files.quantized_bytes };
    measures::compared(&report.evaluation, metrics, &sizes)
}
