//! Calibration, with statistics at all sites, against plain forwards of the same batches, in turn in one process:
//! `cargo bench --bench calibration -- EXPERIMENT.yaml ...`. `benches/make_resnet18.py` makes an experiment of the size of a
//! ResNet-18.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use tsquant::config::Experiment;
use tsquant::correct::{InputSums, Targets};
use tsquant::dataset::Dataset;
use tsquant::jit::{Arguments, Clean};
use tsquant::{feed, jit, observe, pipeline, sites};

#[derive(Parser)]
struct Options {
    /// Experiments of which the model and the calibration data count.
    experiments: Vec<PathBuf>,
    /// Rounds, each a plain pass over the data and a calibration.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Options::parse();
    let _ = arguments.bench;
    if arguments.experiments.is_empty() {
        println!("calibration: needs experiments: cargo bench --bench calibration -- EXPERIMENT.yaml ...");
    }
    jit::keep_freed_memory();
    for path in &arguments.experiments {
        measure(path, arguments.rounds).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

fn seconds(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn measure(path: &Path, rounds: usize) -> Result<()> {
    let plan = Experiment::read(path)?.resolve(Path::new("."))?;
    let data = Dataset::open(&plan.calibration)?;
    let clean = pipeline::load_clean(&plan, &data, tch::Device::Cpu)?;
    let sites = sites::find(clean.listing());
    let targets = Targets::find(clean.listing(), &sites);
    // Warm: libtorch optimizes in the first runs.
    for _ in 0..2 {
        plain(&clean, &data)?;
    }
    let before = peak_memory();
    let mut times: Vec<[f64; 3]> = Vec::new();
    let without = Targets::default();
    for _ in 0..rounds {
        let forward = seconds(|| plain(&clean, &data))?;
        let calibrate = |targets: &Targets| -> Result<()> {
            observe::observe(&clean, &sites.activations, &mut InputSums::new(targets), data.batches(), |_| {})?;
            Ok(())
        };
        times.push([forward, seconds(|| calibrate(&without))?, seconds(|| calibrate(&targets))?]);
    }
    let best = |index: usize| times.iter().map(|times| times[index]).fold(f64::INFINITY, f64::min);
    println!(
        "{}: {} rows, {} sites; best plain {:.3} s; peak memory {:.0} MB, {:.0} MB of it by calibration",
        path.display(),
        data.rows(),
        sites.activations.len(),
        best(0),
        peak_memory(),
        peak_memory() - before,
    );
    for (index, name) in [(1, "calibration"), (2, "with bias correction")] {
        let mut ratios: Vec<f64> = times.iter().map(|times| times[index] / times[0]).collect();
        ratios.sort_by(f64::total_cmp);
        let (best, median) = (best(index) / best(0), ratios[ratios.len() / 2]);
        println!("  {name}: ratio of the best {best:.3}, median of {rounds} ratios {median:.3}");
    }
    Ok(())
}

/// The same batches through the model as it is.
fn plain(clean: &Clean, data: &Dataset) -> Result<()> {
    for batch in data.batches() {
        let bound: Arguments = feed::bind(clean.module(), batch?)?;
        clean.module().forward(&bound)?;
    }
    Ok(())
}

/// Largest resident memory so far in MB, where the system tells.
fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().map_or(f64::NAN, |kibibytes: f64| kibibytes / 1024.0)
}
