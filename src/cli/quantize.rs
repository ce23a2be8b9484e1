//! `tsquant quantize`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;

use super::progress::Display;
use super::table;
use crate::config::{Experiment, Metric, Plan};
use crate::pipeline::{self, Outcome};
use crate::report::{Accuracy, Kind, Report};

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
    let evaluation = &report.evaluation;
    let title = format!("{} rows of {} data", evaluation.quantized.rows, evaluation.data);
    let mut table = table::table(&[&title, "float", "quantized"], true);
    let metrics = plan.evaluation.as_ref().map(|evaluation| evaluation.metrics.clone());
    for metric in metrics.filter(|metrics| !metrics.is_empty()).unwrap_or_else(|| vec![Metric::Agreement, Metric::Sqnr])
    {
        let (name, float, quantized) = row(metric, report);
        table.add_row([name, float.as_str(), quantized.as_str()]);
    }
    let (float, quantized) = (report.files.float_bytes, report.files.quantized_bytes);
    table.add_row(["model file", &table::bytes(float), &table::bytes(quantized)]);
    table
}

fn row(metric: Metric, report: &Report) -> (&'static str, String, String) {
    let (float, quantized) = (&report.evaluation.float, &report.evaluation.quantized);
    let percent = |share: Option<f64>| share.map_or_else(|| "–".to_owned(), |share| format!("{:.2}%", share * 100.0));
    let both = |pick: fn(&Accuracy) -> Option<f64>| (percent(pick(float)), percent(pick(&quantized.accuracy)));
    let nothing = String::new;
    match metric {
        Metric::Top1 => {
            let (float, quantized) = both(|accuracy| accuracy.top1);
            ("top-1 accuracy", float, quantized)
        }
        Metric::Top5 => {
            let (float, quantized) = both(|accuracy| accuracy.top5);
            ("top-5 accuracy", float, quantized)
        }
        Metric::Agreement => ("agreement with float", nothing(), percent(quantized.agreement)),
        Metric::Sqnr => {
            let sqnr = quantized.sqnr_db.map_or_else(|| "equal outputs".to_owned(), |db| format!("{db:.2} dB"));
            ("output SQNR", nothing(), sqnr)
        }
        Metric::Cosine => ("cosine similarity", nothing(), format!("{:.6}", quantized.cosine)),
        Metric::MaxAbsDiff => ("largest difference", nothing(), format!("{:.4e}", quantized.max_abs_diff)),
    }
}
