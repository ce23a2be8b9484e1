//! `tsquant quantize`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::measures::{self, Sizes};
use super::progress::Display;
use crate::config::{Experiment, Metric, Plan};
use crate::pipeline::{self, Outcome};
use crate::report::{Kind, Report};

/// Quantize a model as a YAML file describes.
#[derive(Debug, Args)]
#[command(after_help = "Example: tsquant quantize configs/mnist_resnet.yaml --set quantization.activations.bits=6")]
pub(super) struct Quantize {
    /// The experiment.
    experiment: PathBuf,
    /// Lay a value over the file's, for instance quantization.weights.bits=4; may be repeated, later ones win.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the model runs: auto or cpu.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Print nothing but errors.
    #[arg(long, short)]
    quiet: bool,
}

impl Quantize {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let plan = self.plan()?;
        let mut display = Display::new(self.quiet);
        let outcome = pipeline::quantize(&plan, &mut display);
        display.finish();
        let outcome = outcome?;
        if !self.quiet {
            print(&mut std::io::stdout().lock(), &plan, &outcome)?;
        }
        Ok(())
    }

    fn plan(&self) -> anyhow::Result<Plan> {
        let base = std::env::current_dir().context("the working directory cannot be read")?;
        let mut experiment = Experiment::read(&self.experiment)?.overlay(&self.set)?;
        if let Some(device) = &self.device {
            experiment = experiment.with_device(device);
        }
        Ok(experiment.resolve(&base)?)
    }
}

fn print(out: &mut impl Write, plan: &Plan, outcome: &Outcome) -> std::io::Result<()> {
    let report = &outcome.report;
    writeln!(out, "{}", result_table(plan, report))?;
    let count = |kind| report.sites.iter().filter(|site| site.kind == kind).count();
    writeln!(
        out,
        "{} weights and {} activations quantized; {} ops and values left float (see report.json)",
        count(Kind::Weight),
        count(Kind::Activation),
        report.left_float.len()
    )?;
    for warning in &report.warnings {
        writeln!(out, "note: {warning}")?;
    }
    let times = &report.timings_s;
    writeln!(
        out,
        "{:.1} s: load {:.1}, calibrate {:.1}, search {:.1}, emit {:.1}, evaluate {:.1}",
        times.total, times.load, times.calibrate, times.search, times.emit, times.evaluate
    )?;
    writeln!(out, "written to {}", outcome.dir.display())
}

/// Float beside quantized, one row per metric.
fn result_table(plan: &Plan, report: &Report) -> comfy_table::Table {
    let metrics = plan.evaluation.as_ref().map(|evaluation| evaluation.metrics.as_slice());
    let metrics = metrics.filter(|metrics| !metrics.is_empty()).unwrap_or(&[Metric::Agreement, Metric::Sqnr]);
    let sizes = Sizes { float: report.files.float_bytes, quantized: report.files.quantized_bytes };
    measures::compared(&report.evaluation, metrics, &sizes)
}
