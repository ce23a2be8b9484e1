//! A sweep against its runs one by one, as whole processes: `cargo bench --bench sweep -- EXPERIMENT.yaml`.
//!
//! The goal: calibration once, and search and evaluation of each run, and 5% more.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::Value;

/// Thirty runs: how weights and activations are clipped, and with how many levels.
const GRID: &str = "{grid: {quantization.weights_error_method: [NOCLIPPING, MSE, MAE], \
    quantization.activation_error_method: [NOCLIPPING, MSE, MAE, LP, HMSE], quantization.activations.bits: [8, 6]}, emit: none}";

#[derive(Parser)]
struct Options {
    /// The experiment that the runs are variants of.
    experiment: Option<PathBuf>,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let _ = options.bench;
    let Some(experiment) = options.experiment else {
        println!("sweep: needs an experiment: cargo bench --bench sweep -- EXPERIMENT.yaml");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let dir = folder.path().join("sweep");
    let path = experiment.to_str().context("expected a path in UTF-8")?;
    let output = format!("output.dir={}", dir.display());
    let grid = format!("sweep={GRID}");
    let whole = seconds(&["experiment", path, "--set", &grid, "--set", &output])?;
    let rows = read(&dir.join("results.json"))?["rows"].as_array().cloned().context("expected rows")?;

    let mut alone = 0.0;
    let (mut shared, mut own) = (0.0f64, 0.0);
    for row in &rows {
        ensure!(row["error"].is_null(), "expected runs that succeed, found {}", row["error"]);
        own += number(&row["gave"]["search_s"])? + number(&row["gave"]["evaluate_s"])?;
        let run = folder.path().join("alone");
        let mut arguments = vec!["quantize".to_owned(), path.to_owned(), "--quiet".to_owned()];
        arguments.extend(["--set".to_owned(), format!("output.dir={}", run.display())]);
        for setting in row["settings"].as_array().into_iter().flatten() {
            let part = |index: usize| setting[index].as_str().unwrap_or_default();
            arguments.extend(["--set".to_owned(), format!("{}={}", part(0), part(1))]);
        }
        alone += seconds(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let timings = read(&run.join("report.json"))?["timings_s"].clone();
        let once = number(&timings["load"])? + number(&timings["calibrate"])? + number(&timings["hessian"])?;
        // Of a run that computes scores, if there is one.
        shared = shared.max(once);
    }
    let count = rows.len();
    println!("{}: {count} runs, {whole:.1} s as a sweep, {alone:.1} s one by one", experiment.display());
    println!("  a sweep takes {:.3} of the time of its runs", whole / alone);
    println!(
        "  calibration and scores once {shared:.1} s, search and evaluation of all {own:.1} s: the sweep took {:.3} of that",
        whole / (shared + own)
    );
    Ok(())
}

/// How long the binary takes.
fn seconds(arguments: &[&str]) -> Result<f64> {
    let start = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tsquant"));
    let status = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "tsquant {}: {status}", arguments.join(" "));
    Ok(start.elapsed().as_secs_f64())
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("expected a number, found {value}"))
}
