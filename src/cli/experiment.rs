//! `tsquant experiment`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::measures;
use super::progress::Display;
use super::{experiment_of, located, table, working_dir};
use crate::config::{self, Combination, Metric};
use crate::pipeline::{self, SweepOutcome};
use crate::report::SweepRow;

/// Run many settings of one experiment over a single calibration, and rank them.
#[derive(Debug, Args)]
#[command(
    after_help = "The file is an experiment with a map `sweep`: `grid` holds lists of values by key, of which every combination \
    is run, or `runs` holds settings by name; `rank_by` is a metric, `emit` is none, best (the default) or all. Every \
    finished run is written down at once: the same command goes on where an earlier one was stopped.\n\nExamples:\n  \
    tsquant experiment configs/methods.yaml\n  \
    tsquant experiment configs/bits.yaml --set sweep.emit=all"
)]
pub(super) struct Sweep {
    /// The experiment with its sweep.
    #[arg(value_name = "EXPERIMENT")]
    experiment: PathBuf,
    /// Lay a value over the file's, for all runs; may be repeated, later ones win.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the model runs: auto, cpu, cuda, or cuda:1 for the second GPU.
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Print nothing but errors.
    #[arg(long, short)]
    quiet: bool,
}

impl Sweep {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let experiment = experiment_of(&self.experiment, &self.set, self.device.as_deref())?;
        let sweep = experiment.resolve_sweep(&working_dir()?)?;
        let mut display = Display::new(self.quiet);
        let command = |combination: &Combination, dir: &Path| self.command(combination, dir);
        let outcome = pipeline::experiment(&sweep, &command, &mut display);
        display.finish();
        let outcome = outcome.map_err(|error| located(&experiment, error))?;
        if !self.quiet {
            print(&mut std::io::stdout().lock(), &sweep, &outcome)?;
        }
        Ok(())
    }

    /// What makes the model of one run alone.
    fn command(&self, combination: &Combination, dir: &Path) -> String {
        let is_of_sweep =
            |setting: &&String| setting.split(['.', '=']).next().is_some_and(|name| name.trim() == "sweep");
        let of_all = self.set.iter().filter(|setting| !is_of_sweep(setting)).cloned();
        let dir = format!("output.dir={}", serde_json::Value::from(dir.to_string_lossy()));
        let own = combination.settings.iter().map(|(key, value)| format!("{key}={value}"));
        let settings = ["sweep=".to_owned()].into_iter().chain(of_all).chain(own).chain([dir]);
        let mut words = vec!["tsquant".to_owned(), "quantize".to_owned(), self.experiment.display().to_string()];
        words.extend(settings.flat_map(|setting| ["--set".to_owned(), setting]));
        words.extend(self.device.iter().flat_map(|device| ["--device".to_owned(), device.clone()]));
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The table, best first, and what is where.
fn print(out: &mut impl Write, sweep: &config::Sweep, outcome: &SweepOutcome) -> std::io::Result<()> {
    let rows = &outcome.report.rows;
    let others = sweep.metrics.iter().copied().filter(|metric| *metric != outcome.report.rank_by);
    let metrics: Vec<Metric> = [outcome.report.rank_by].into_iter().chain(others).collect();
    let mut titles = vec![""];
    titles.extend(sweep.axes.iter().map(|(_, short)| short.as_str()));
    if sweep.axes.is_empty() {
        titles.push("run");
    }
    titles.extend(metrics.iter().map(|metric| measures::name(*metric)));
    titles.extend(["weights", "Pareto"]);
    let mut shown = table::table(&titles, true);
    for (index, row) in rows.iter().enumerate() {
        let Some(gave) = &row.gave else { continue };
        let value = |key: &str| row.settings.iter().find(|(own, _)| own == key).map(|(_, value)| value.clone());
        let mut cells = vec![(index + 1).to_string()];
        cells.extend(sweep.axes.iter().map(|(key, _)| value(key).unwrap_or_default()));
        if sweep.axes.is_empty() {
            cells.push(row.name.clone());
        }
        cells.extend(metrics.iter().map(|metric| measures::cell(*metric, gave)));
        cells.push(table::bytes(gave.weight_bytes));
        cells.push(if row.is_on_pareto_front { "*" } else { "" }.to_owned());
        shown.add_row(cells);
    }
    writeln!(out, "{shown}")?;
    for row in rows {
        if let Some(error) = &row.error {
            writeln!(out, "failed: {}: {error}", row.name)?;
        }
    }
    if outcome.resumed > 0 {
        writeln!(out, "{} of {} runs were done before", outcome.resumed, rows.len())?;
    }
    if let Some(SweepRow { name, command, .. }) = outcome.report.best() {
        writeln!(out, "best: {name}\n  {command}")?;
    }
    if let Some(best) = &outcome.best {
        writeln!(out, "its model is in {}", best.display())?;
    }
    writeln!(out, "all rows with the commands that make them: {}", outcome.dir.join("results.csv").display())
}
