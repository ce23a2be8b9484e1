//! `tsquant calibrate` and `tsquant merge`.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::progress::Display;
use super::statistics::Summary;
use super::{experiment_of, located, table, working_dir};
use crate::dataset::Shard;
use crate::pipeline::{self, Calibrated, Request};

/// Run the calibration data and keep its statistics as a file that `quantize --statistics` starts from.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    tsquant calibrate configs/mnist_resnet.yaml -o mnist.safetensors\n  \
    tsquant calibrate configs/mnist_resnet.yaml --shard 3/16 -o mnist-3.safetensors\n\n\
    Shards are numbered from 0 and are whole batches; `tsquant merge` makes one file of all of them. Hessian scores need the \
    range of all values: merge first, then calibrate again with --statistics MERGED, in shards or not.")]
pub(super) struct Calibrate {
    /// The experiment.
    experiment: PathBuf,
    /// Lay a value over the file's, for instance calibration.samples=1024; may be repeated, later ones win.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the model runs: auto, cpu, cuda, or cuda:1 for the second GPU.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// The file to write; the run directory with .safetensors behind it where there is none.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Run this part of the batches alone: NUMBER/COUNT, numbered from 0.
    #[arg(long, value_name = "SHARD")]
    shard: Option<Shard>,
    /// Take the statistics from this file, which has all of them, and compute Hessian scores alone.
    #[arg(long, value_name = "FILE")]
    statistics: Option<PathBuf>,
    /// Print nothing but errors.
    #[arg(long, short)]
    quiet: bool,
}

impl Calibrate {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let experiment = experiment_of(&self.experiment, &self.set, self.device.as_deref())?;
        let folder = working_dir()?;
        let plan = experiment.resolve_without("evaluation.data", &folder)?;
        let shard = self.shard.unwrap_or(Shard::WHOLE);
        let output = self.output.map(|path| folder.join(path)).unwrap_or_else(|| {
            let mut name = plan.output.dir.clone().into_os_string();
            if shard != Shard::WHOLE {
                name.push(format!(".{}-of-{}", shard.number(), shard.count()));
            }
            name.push(".safetensors");
            name.into()
        });
        let statistics = self.statistics.map(|path| folder.join(path));
        let mut display = Display::new(self.quiet);
        let calibrated = pipeline::calibrate(&plan, &Request { output, shard, statistics }, &mut display);
        display.finish();
        let calibrated = calibrated.map_err(|error| located(&experiment, error))?;
        if !self.quiet {
            print(&mut std::io::stdout().lock(), &calibrated)?;
        }
        Ok(())
    }
}

/// Make one file of the statistics of all shards of a calibration.
#[derive(Debug, Args)]
#[command(after_help = "Example: tsquant merge mnist-*.safetensors -o mnist.safetensors")]
pub(super) struct Merge {
    /// The files that `calibrate --shard` wrote, in any order.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The file to write.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Print nothing but errors.
    #[arg(long, short)]
    quiet: bool,
}

impl Merge {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let folder = working_dir()?;
        let files: Vec<PathBuf> = self.files.iter().map(|path| folder.join(path)).collect();
        let merged = pipeline::merge(&files, &folder.join(&self.output))?;
        if !self.quiet {
            print(&mut std::io::stdout().lock(), &merged)?;
        }
        Ok(())
    }
}

fn print(out: &mut impl Write, Calibrated { kept, notes }: &Calibrated) -> std::io::Result<()> {
    let summary = Summary::of(kept);
    writeln!(out, "{}", summary.covered())?;
    for note in notes {
        writeln!(out, "note: {note}")?;
    }
    let bytes = std::fs::metadata(&kept.path)?.len();
    writeln!(out, "written to {} ({})", kept.path.display(), table::bytes(bytes))
}
