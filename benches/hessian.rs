//! The Hessian stage against a plain forward and backward of libtorch to all weights, over the same batches, in turn in one
//! process: `cargo bench --bench hessian -- EXPERIMENT.yaml ...`.

#[path = "common/way_back.rs"]
mod way_back;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use tsquant::config::{Experiment, HessianPlan, HessianRequest};
use tsquant::correct::{InputSums, Targets};
use tsquant::dataset::Dataset;
use tsquant::hessian::{self, Layers};
use tsquant::statistics::Activation;
use tsquant::{jit, observe, pipeline, sites};

#[derive(Parser)]
struct Options {
    /// Experiments of which the model and the calibration data count.
    experiments: Vec<PathBuf>,
    /// Rounds, each a plain pass and one of each kind of scores.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Rows.
    #[arg(long, default_value_t = NonZeroUsize::new(32).expect("a count"))]
    samples: NonZeroUsize,
    /// Rows in a batch.
    #[arg(long, default_value_t = NonZeroUsize::new(8).expect("a count"))]
    batch_size: NonZeroUsize,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What is scored, and with how many probes.
const KINDS: [(&str, bool, bool, usize); 5] = [
    ("weights, 1 probe", true, false, 1),
    ("activations, 1 probe", false, true, 1),
    ("both, 1 probe", true, true, 1),
    ("both, 2 probes", true, true, 2),
    ("both, 4 probes", true, true, 4),
];

fn main() -> Result<()> {
    let options = Options::parse();
    let _ = options.bench;
    if options.experiments.is_empty() {
        println!("hessian: needs experiments: cargo bench --bench hessian -- EXPERIMENT.yaml ...");
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
    let sites = sites::find(clean.listing());
    let weights: Vec<_> = sites.weights.iter().collect();
    let activations: Vec<_> = sites.activations.iter().collect();
    let lifted: Vec<_> = weights.iter().flat_map(|site| site.values.iter().copied()).collect();
    let statistics =
        observe::observe(&clean, &sites.activations, &mut InputSums::new(&Targets::default()), data.batches(), |_| ())?;
    let range = |site: &Vec<Activation>| {
        let observed = site.first()?.observed().ok()??;
        Some(observed.min()..=observed.max())
    };
    let ranges: Vec<_> = statistics.iter().map(range).collect();
    let graph = clean.differentiable(&[], &lifted)?.as_given();
    let HessianRequest { distribution, .. } = HessianPlan::with_seed(0).request;
    let request = |probes| HessianRequest {
        samples: options.samples,
        probes: NonZeroUsize::new(probes).expect("a count"),
        batch_size: options.batch_size,
        distribution,
        tolerance: None,
        seed: 0,
    };
    let score = |(_, of_weights, of_activations, probes): (&str, bool, bool, usize)| -> Result<()> {
        let layers = Layers {
            weights: if of_weights { &weights } else { &[] },
            activations: if of_activations { &activations } else { &[] },
            ranges: if of_activations { &ranges } else { &[] },
        };
        hessian::score(&clean, layers, &data, &request(probes), |_| ())?;
        Ok(())
    };
    let loaded = memory("VmRSS:");
    // Warm: libtorch optimizes in the first runs.
    for _ in 0..2 {
        way_back::plain(&clean, &graph, &data, &request(1))?;
    }
    let plain_peak = memory("VmHWM:");
    let mut peaks = Vec::new();
    for kind in KINDS {
        score(kind)?;
        peaks.push(memory("VmHWM:"));
    }
    let mut times = vec![Vec::new(); KINDS.len() + 1];
    let mut four_ways_back = Vec::new();
    for _ in 0..options.rounds {
        times[0].push(seconds(|| way_back::plain(&clean, &graph, &data, &request(1)))?);
        four_ways_back.push(seconds(|| way_back::plain(&clean, &graph, &data, &request(4)))?);
        for (kind, times) in KINDS.into_iter().zip(&mut times[1..]) {
            times.push(seconds(|| score(kind))?);
        }
    }
    let rows = data.sample(options.samples, 0, options.batch_size).rows();
    println!(
        "{}: {rows} rows in batches of {}; plain forward and backward {:.3} s; {loaded:.0} MB loaded, {plain_peak:.0} MB peak",
        path.display(),
        options.batch_size,
        least(&times[0]),
    );
    println!(
        "  forward and 4 ways back without scores: ratio of the best {:.3}, median of ratios {:.3}",
        least(&four_ways_back) / least(&times[0]),
        median_ratio(&four_ways_back, &times[0])
    );
    for (index, (name, ..)) in KINDS.into_iter().enumerate() {
        println!(
            "  {name}: ratio of the best {:.3}, median of ratios {:.3}; peak so far {:.0} MB, {:.3} of plain",
            least(&times[index + 1]) / least(&times[0]),
            median_ratio(&times[index + 1], &times[0]),
            peaks[index],
            peaks[index] / plain_peak,
        );
    }
    Ok(())
}

fn seconds(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

fn least(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median_ratio(times: &[f64], plain: &[f64]) -> f64 {
    let mut ratios: Vec<f64> = times.iter().zip(plain).map(|(time, plain)| time / plain).collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A line of this process's status in MB, where the system tells.
fn memory(line: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|text| text.strip_prefix(line)).unwrap_or_default();
    found.trim().trim_end_matches(" kB").parse().map_or(f64::NAN, |kibibytes: f64| kibibytes / 1024.0)
}
