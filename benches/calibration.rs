//! Calibration, with statistics at all sites, against plain forwards of the same batches, in turn in one process:
//! `cargo bench --bench calibration -- EXPERIMENT.yaml ...`. `benches/make_resnet18.py` makes an experiment of the size of a
//! ResNet-18.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use tsquant::config::Experiment;
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

fn measure(path: &Path, rounds: usize) -> Result<()> {
    let plan = Experiment::read(path)?.resolve(Path::new("."))?;
    let data = Dataset::open(&plan.calibration)?;
    let clean = pipeline::load_clean(&plan, &data, tch::Device::Cpu)?;
    let sites = sites::find(clean.listing()).activations;
    // Warm: libtorch optimizes in the first runs.
    for _ in 0..2 {
        plain(&clean, &data)?;
    }
    let before = peak_memory();
    let mut times: Vec<[f64; 2]> = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        plain(&clean, &data)?;
        let forward = start.elapsed().as_secs_f64();
        let start = Instant::now();
        observe::observe(&clean, &sites, &data, |_| {})?;
        times.push([forward, start.elapsed().as_secs_f64()]);
    }
    let best = |index: usize| times.iter().map(|pair| pair[index]).fold(f64::INFINITY, f64::min);
    let mut ratios: Vec<f64> = times.iter().map(|[forward, calibration]| calibration / forward).collect();
    ratios.sort_by(f64::total_cmp);
    println!(
        "{}: {} rows, {} sites; best plain {:.3} s, best calibration {:.3} s; ratio of the best {:.3}, median of {rounds} \
         ratios {:.3}; peak memory {:.0} MB, {:.0} MB of it by calibration",
        path.display(),
        data.rows(),
        sites.len(),
        best(0),
        best(1),
        best(1) / best(0),
        ratios[ratios.len() / 2],
        peak_memory(),
        peak_memory() - before,
    );
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
