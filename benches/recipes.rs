//! What each word of `quantization.accuracy` brings and costs, against plain MSE without bias correction:
//! `cargo bench --bench recipes -- EXPERIMENT.yaml ...`. Costs are in plain forwards of the calibration data, each timed right
//! before its run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::Value;
use tsquant::config::Experiment;
use tsquant::dataset::Dataset;
use tsquant::jit::Clean;
use tsquant::{feed, jit, pipeline};

#[derive(Parser)]
struct Options {
    /// Experiments of which model, data and evaluation count.
    experiments: Vec<PathBuf>,
    /// Bits of weights and activations.
    #[arg(long, value_delimiter = ',', default_value = "8/8,6/6,4/8,4/4")]
    bits: Vec<String>,
    /// Seeds of the Hessian scores, where there are some.
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A row of the table.
struct Variant {
    name: &'static str,
    settings: &'static [&'static str],
    /// Whether its result depends on the seed of the scores.
    is_drawn: bool,
    /// Whether it is there for its cost alone.
    for_cost: bool,
}

const PLAIN: Variant = Variant {
    name: "plain MSE",
    settings: &["quantization.weights_bias_correction=none"],
    is_drawn: false,
    for_cost: false,
};

const fn word(name: &'static str, settings: &'static [&'static str]) -> Variant {
    Variant { name, settings, is_drawn: true, for_cost: false }
}

const VARIANTS: [Variant; 6] = [
    PLAIN,
    Variant { name: "default", settings: &[], is_drawn: false, for_cost: false },
    word("fast", &["quantization.accuracy=fast"]),
    word("balanced", &["quantization.accuracy=balanced"]),
    word("high", &["quantization.accuracy=high"]),
    Variant {
        name: "gptq alone",
        settings: &[
            "quantization.weights_bias_correction=none",
            "quantization.weights.rounding=gptq",
            "quantization.weights.rounding_fallback=true",
        ],
        is_drawn: false,
        for_cost: true,
    },
];

fn main() -> Result<()> {
    let options = Options::parse();
    let _ = options.bench;
    if options.experiments.is_empty() {
        println!("recipes: needs experiments: cargo bench --bench recipes -- EXPERIMENT.yaml ...");
    }
    jit::keep_freed_memory();
    for path in &options.experiments {
        measure(path, &options).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn measure(path: &Path, options: &Options) -> Result<()> {
    let plan = Experiment::read(path)?.resolve(Path::new("."))?;
    let data = Dataset::open(&plan.calibration)?;
    let clean = pipeline::load_clean(&plan, &data, tch::Device::Cpu)?;
    plain(&clean, &data)?;
    let folder = tempfile::tempdir()?;
    println!("\n{}\n", path.display());
    println!("| bits | recipe | top-1 | agreement | SQNR, dB | calibration | scores | search | correction | peak MB |");
    println!("|---|---|---|---|---|---|---|---|---|---|");
    for (index, bits) in options.bits.iter().enumerate() {
        let (weights, activations) = bits.split_once('/').context("expected bits as 8/8")?;
        let dir = folder.path().join("run");
        let base = [
            format!("quantization.weights.bits={weights}"),
            format!("quantization.activations.bits={activations}"),
            "quantization.weights_error_method=".to_owned(),
            "quantization.activation_error_method=".to_owned(),
            "quantization.weights_bias_correction=".to_owned(),
            "quantization.weights.rounding=".to_owned(),
            "quantization.weights.rounding_fallback=".to_owned(),
            format!("output.dir={}", dir.display()),
        ];
        for Variant { name, settings, is_drawn, for_cost } in &VARIANTS {
            let seeds = match (for_cost, is_drawn) {
                (true, _) if index > 0 => 0,
                (false, true) => options.seeds,
                _ => 1,
            };
            let mut runs = Vec::new();
            for seed in 0..seeds {
                let own = settings.iter().copied().map(String::from).chain([format!("hessian.seed={seed}")]);
                let all: Vec<String> = base.iter().cloned().chain(own).collect();
                runs.push((plain(&clean, &data)?, run(path, &all, &dir)?));
            }
            if !runs.is_empty() {
                println!("| W{weights}A{activations} | {name} | {} |", row(&runs).join(" | "));
            }
        }
    }
    Ok(())
}

/// Seconds of the calibration data through the model as it is.
fn plain(clean: &Clean, data: &Dataset) -> Result<f64> {
    let start = Instant::now();
    for batch in data.batches() {
        clean.module().forward(&feed::bind(clean.module(), batch?)?)?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// The report of a run with these settings.
fn run(path: &Path, settings: &[String], dir: &Path) -> Result<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tsquant"));
    command.arg("quantize").arg(path).arg("--quiet");
    settings.iter().for_each(|setting| {
        command.args(["--set", setting]);
    });
    let output = command.stdout(Stdio::null()).output()?;
    ensure!(output.status.success(), "{}: {}", settings.join(" "), String::from_utf8_lossy(&output.stderr));
    let report = dir.join("report.json");
    let text = std::fs::read_to_string(&report).with_context(|| report.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// Means over the seeds; of the SQNR its ends too.
fn row(runs: &[(f64, Value)]) -> Vec<String> {
    let number = |report: &Value, path: &str| report.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let all = |path: &str| -> Vec<f64> { runs.iter().map(|(_, report)| number(report, path)).collect() };
    let mean = |numbers: &[f64]| numbers.iter().sum::<f64>() / numbers.len() as f64;
    let measure = |name: &str| mean(&all(&format!("/evaluation/quantized/{name}")));
    let sqnr = all("/evaluation/quantized/sqnr_db");
    let ends =
        [f64::min as fn(f64, f64) -> f64, f64::max].map(|end| sqnr.iter().copied().reduce(end).unwrap_or(f64::NAN));
    let cost = |stage: &str| {
        let ratios: Vec<f64> =
            runs.iter().map(|(forward, report)| number(report, &format!("/timings_s/{stage}")) / forward).collect();
        format!("{:.2}", mean(&ratios))
    };
    let shown = if sqnr.len() > 1 {
        format!("{:.2} ({:.2} to {:.2})", mean(&sqnr), ends[0], ends[1])
    } else {
        format!("{:.2}", mean(&sqnr))
    };
    let top1 = measure("top1");
    let top1 = if top1.is_finite() { format!("{top1:.3}") } else { String::new() };
    let mut cells = vec![top1, format!("{:.3}", measure("agreement")), shown];
    cells.extend(["calibrate", "hessian", "search", "correct"].map(cost));
    cells.push(format!("{:.0}", mean(&all("/peak_memory_bytes")) / 1e6));
    cells
}
