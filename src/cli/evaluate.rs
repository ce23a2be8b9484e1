//! `tsquant evaluate`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::measures::{self, Sizes};
use super::progress::Display;
use super::{UsageError, located, working_dir};
use crate::config::{self, ComparisonPlan, Experiment, Typed};
use crate::pipeline::{self, EXPERIMENT_FILE, MODEL_FILE};
use crate::report::{FilesReport, Measures};

/// Run model files on data, as their users would, and compare a quantized one with the float one.
#[derive(Debug, Args)]
#[command(
    after_help = "Without --reference (and without an experiment that names the float model) the accuracy of the \
    model alone is measured, which needs --labels.\n\nExamples:\n  \
    tsquant evaluate runs/mnist_resnet\n  \
    tsquant evaluate runs/mnist_resnet --data other.safetensors --samples 100 --json\n  \
    tsquant evaluate configs/mnist_resnet.yaml --model Q.pt --reference F.pt\n  \
    tsquant evaluate --model Q.pt --reference F.pt --data test.npz --inputs x --labels y \\\n      \
    --transform '{scale: 0.00392156862745098, mean: [0.1307], std: [0.3081]}'"
)]
pub(super) struct Evaluate {
    /// A run directory, whose quantized.pt is compared, or an experiment, whose data is taken; flags override it.
    #[arg(value_name = "RUN_DIR|EXPERIMENT")]
    source: Option<PathBuf>,
    /// The quantized model; without it, that of the run directory.
    #[arg(long, value_name = "FILE", required_unless_present = "source")]
    model: Option<PathBuf>,
    /// The float model; without it, that of the experiment.
    #[arg(long, value_name = "FILE")]
    reference: Option<String>,
    /// The data: .safetensors, .npz, .npy or a folder of images.
    #[arg(long, value_name = "FILE", required_unless_present = "source")]
    data: Option<String>,
    /// What forward takes: tensors of the data (x,mask), by name (ids=x,mask=m), constants among them (x,const:16000).
    #[arg(long, value_name = "NAMES", required_unless_present = "source")]
    inputs: Option<String>,
    /// The tensor of right classes.
    #[arg(long, value_name = "NAME")]
    labels: Option<String>,
    /// The output whose largest value is the answer, by index or path: 1, logits; without it the first of floats.
    #[arg(long, value_name = "OUTPUT")]
    output: Option<String>,
    /// What to show, of top1, top5, agreement, sqnr, cosine, max_abs_diff.
    #[arg(long, value_name = "NAMES")]
    metrics: Option<String>,
    /// Take so many rows, not all.
    #[arg(long, value_name = "ROWS")]
    samples: Option<String>,
    /// Rows per batch; 32 if nothing else is said.
    #[arg(long, value_name = "ROWS")]
    batch_size: Option<String>,
    /// From stored values to the model's: the map `transform` of an experiment, `{scale: 0.5, mean: [1], std: [2]}`.
    #[arg(long, value_name = "YAML")]
    transform: Option<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Print no progress.
    #[arg(long, short)]
    quiet: bool,
}

impl Evaluate {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let experiment = self.experiment()?;
        let plan = experiment.resolve_comparison(&working_dir()?)?;
        let model = self.model(&plan)?;
        let mut display = Display::new(self.quiet);
        let report = pipeline::evaluate(&plan, &model, &mut display);
        display.finish();
        let report = report.map_err(|error| located(&experiment, error))?;
        let out = &mut std::io::stdout().lock();
        if self.json {
            write!(out, "{}", report.to_json()?)?;
        } else {
            print(out, &plan, &report)?;
        }
        Ok(())
    }

    fn experiment(&self) -> Result<Experiment, config::Error> {
        let experiment = match &self.source {
            Some(source) if source.is_dir() => Experiment::read(&source.join(EXPERIMENT_FILE))?,
            Some(source) => Experiment::read(source)?,
            None => Experiment::of_flags("tsquant evaluate"),
        };
        let flags = [
            ("--reference", "model.path", self.reference.as_deref().map(Typed::Text)),
            ("--data", "evaluation.data", self.data.as_deref().map(Typed::Text)),
            ("--inputs", "evaluation.inputs", self.inputs.as_deref().map(Typed::Inputs)),
            ("--labels", "evaluation.labels", self.labels.as_deref().map(Typed::Text)),
            ("--output", "evaluation.output", self.output.as_deref().map(Typed::Text)),
            ("--metrics", "evaluation.metrics", self.metrics.as_deref().map(Typed::Names)),
            ("--samples", "evaluation.samples", self.samples.as_deref().map(Typed::Yaml)),
            ("--batch-size", "evaluation.batch_size", self.batch_size.as_deref().map(Typed::Yaml)),
            ("--transform", "evaluation.transform", self.transform.as_deref().map(Typed::Yaml)),
        ];
        experiment.with_flags(flags)
    }

    /// The file to measure.
    fn model(&self, plan: &ComparisonPlan) -> Result<PathBuf, UsageError> {
        if let Some(model) = &self.model {
            let missing = || UsageError(format!("--model: expected a file, found none at {}", model.display()));
            return model.is_file().then(|| model.clone()).ok_or_else(missing);
        }
        let folder = match &self.source {
            Some(source) if source.is_dir() => source,
            _ => &plan.run_dir,
        };
        let missing = || {
            let folder = folder.display();
            UsageError(format!("expected --model, or {MODEL_FILE} in the run directory {folder}, found neither"))
        };
        Some(folder.join(MODEL_FILE)).filter(|file: &PathBuf| Path::is_file(file)).ok_or_else(missing)
    }
}

fn print(out: &mut impl Write, plan: &ComparisonPlan, report: &FilesReport) -> std::io::Result<()> {
    let (metrics, quantized) = (&plan.evaluation.metrics, report.quantized_bytes);
    let table: comfy_table::Table = match &report.evaluation {
        Measures::Compared(evaluation) => {
            let sizes = Sizes { float: report.float_bytes.unwrap_or_default(), quantized };
            measures::compared(evaluation, metrics, &sizes)
        }
        Measures::Alone { data, quantized: alone } => measures::alone(data, alone, metrics, quantized),
    };
    writeln!(out, "{table}")?;
    for warning in &report.warnings {
        writeln!(out, "note: {warning}")?;
    }
    Ok(())
}
