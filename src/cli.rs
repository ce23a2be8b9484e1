//! The command line: parse, run one command, print an error once, exit code. Everything that draws on a terminal is here.

mod bench;
mod calibrate;
mod completions;
mod evaluate;
mod experiment;
mod inspect;
mod int8;
mod measures;
mod mixed;
mod progress;
mod provenance;
mod quantize;
mod schema;
mod signals;
mod statistics;
mod table;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::{config, jit, pipeline};

/// The run failed.
const EXIT_FAILED: u8 = 1;
/// The command line or the YAML is wrong.
const EXIT_USAGE: u8 = 2;

/// Post-training quantization of TorchScript models.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 the run failed, 2 the command line or the YAML is wrong. A run that is interrupted \
        (Ctrl-C, SIGTERM) removes what it has written and ends by that signal, which shells show as 130 and 143."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Quantize a model as a YAML file describes.
    Quantize(quantize::Quantize),
    /// Run the calibration data and keep its statistics as a file that `quantize --statistics` starts from.
    Calibrate(calibrate::Calibrate),
    /// Make one file of the statistics of all shards of a calibration.
    Merge(calibrate::Merge),
    /// Run many settings of one experiment over a single calibration, and rank them.
    Experiment(experiment::Sweep),
    /// Run model files on data and compare a quantized one with the float one.
    Evaluate(evaluate::Evaluate),
    /// Time model files side by side on the same rows.
    Bench(bench::Bench),
    /// Explain a TorchScript file: signature, layers, what would be quantized and what not; or a file of statistics.
    Inspect(inspect::Inspect),
    /// Print a JSON schema of the experiment file, for editors.
    Schema(schema::Schema),
    /// Print the completions of a shell.
    Completions(completions::Completions),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    jit::keep_freed_memory();
    let watched = signals::watch().context("signals cannot be watched");
    let result = watched.and_then(|()| match cli.command {
        Command::Quantize(command) => command.run(),
        Command::Calibrate(command) => command.run(),
        Command::Merge(command) => command.run(),
        Command::Experiment(command) => command.run(),
        Command::Evaluate(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Schema(command) => command.run(),
        Command::Completions(command) => command.run(),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::from(if is_usage(&error) { EXIT_USAGE } else { EXIT_FAILED })
        }
    }
}

/// The experiment of a file with what the command line lays over it.
fn experiment_of(path: &Path, set: &[String], device: Option<&str>) -> anyhow::Result<config::Experiment> {
    let experiment = config::Experiment::read(path)?.overlay(set)?;
    Ok(match device {
        Some(device) => experiment.with_device(device),
        None => experiment,
    })
}

/// Where relative paths start.
fn working_dir() -> anyhow::Result<std::path::PathBuf> {
    std::env::current_dir().context("the working directory cannot be read")
}

/// What was tried and why it failed. Many errors repeat their cause in their own text.
fn one_line(error: &anyhow::Error) -> String {
    let text = error
        .chain()
        .map(ToString::to_string)
        .reduce(|text, cause| if text.ends_with(&cause) { text } else { format!("{text}: {cause}") });
    // Names of files may hold line breaks.
    let escaped = |sign: char| if sign.is_control() { sign.escape_default().to_string() } else { sign.to_string() };
    text.unwrap_or_default().chars().map(escaped).collect()
}

/// A flag whose value is wrong in a way that clap cannot see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// Whether the command line or the YAML is to blame, also where only the model could tell.
fn is_usage(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        use pipeline::Error::{Config, Key, NothingToCompute, OutputIsInput, ToleranceOfShard, TooManyShards};
        let in_run = matches!(
            cause.downcast_ref(),
            Some(
                Config(_)
                    | Key { .. }
                    | NothingToCompute
                    | OutputIsInput { .. }
                    | ToleranceOfShard
                    | TooManyShards { .. }
            )
        );
        in_run || cause.is::<config::Error>() || cause.is::<UsageError>()
    })
}

/// The error of a command that `experiment` was typed for: what it says of a key gets the place where that was typed.
fn located(experiment: &config::Experiment, error: pipeline::Error) -> anyhow::Error {
    match error {
        pipeline::Error::Key { key, source } => experiment.error_at(&key, &source.to_string()).into(),
        other => other.into(),
    }
}

/// A reader that has seen enough (`| head`) is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
