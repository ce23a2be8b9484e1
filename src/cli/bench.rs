//! `tsquant bench`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::progress::Display;
use super::{UsageError, located, table, working_dir};
use crate::config::{self, EnginePlan, Experiment, Typed};
use crate::pipeline::{self, BenchRequest};
use crate::report::Bench as Report;

/// Time model files side by side: frozen, on the same rows, in turn, after a warm-up.
#[derive(Debug, Args)]
#[command(after_help = "Example: tsquant bench models/mnist_resnet.pt runs/mnist_resnet/quantized.pt \\\n      \
    --data models/mnist_evaluation.safetensors --inputs images --batch-sizes 1,8")]
pub(super) struct Bench {
    /// TorchScript files; the first is what the others are compared with.
    #[arg(value_name = "MODEL", required = true)]
    models: Vec<PathBuf>,
    /// The data: .safetensors, .npz, .npy or a folder of images.
    #[arg(long, value_name = "FILE")]
    data: String,
    /// What forward takes: tensors of the data (x,mask), by name (ids=x,mask=m), constants among them (x,const:16000).
    #[arg(long, value_name = "NAMES")]
    inputs: String,
    /// From stored values to the model's: the map `transform` of an experiment, `{scale: 0.5, mean: [1], std: [2]}`.
    #[arg(long, value_name = "YAML")]
    transform: Option<String>,
    /// Rows of a run; several are timed one after the other.
    #[arg(long, value_name = "ROWS", value_delimiter = ',', default_value = "1,8")]
    batch_sizes: Vec<usize>,
    /// Seconds for each batch size, beside the warm-up.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    seconds: f64,
    /// What 8-bit kernels run on: auto, x86, onednn, fbgemm, qnnpack.
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    engine: String,
    /// Time each model as `torch.jit.optimize_for_inference` makes it too.
    #[arg(long)]
    optimized: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Print no progress.
    #[arg(long, short)]
    quiet: bool,
}

impl Bench {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let experiment = self.experiment()?;
        let plan = experiment.resolve_calibration(&working_dir()?)?;
        let request = self.request()?;
        let mut display = Display::new(self.quiet);
        let report = pipeline::bench(&request, &plan, &mut display);
        display.finish();
        let report = report.map_err(|error| located(&experiment, error))?;
        let out = &mut std::io::stdout().lock();
        if self.json {
            write!(out, "{}", report.to_json()?)?;
        } else {
            print(out, &report)?;
        }
        Ok(())
    }

    fn experiment(&self) -> Result<Experiment, config::Error> {
        let flags = [
            ("--data", "calibration.data", Some(Typed::Text(&self.data))),
            ("--inputs", "calibration.inputs", Some(Typed::Inputs(&self.inputs))),
            ("--transform", "calibration.transform", self.transform.as_deref().map(Typed::Yaml)),
        ];
        Experiment::of_flags("tsquant bench").with_flags(flags)
    }

    fn request(&self) -> Result<BenchRequest, UsageError> {
        let all = [EnginePlan::Auto].into_iter().chain(EnginePlan::NAMED);
        let engine = all.into_iter().find(|engine| engine.name() == self.engine).ok_or_else(|| {
            let expected = "expected auto, x86, onednn, fbgemm or qnnpack";
            UsageError(format!("--engine: {expected}, found {}", self.engine))
        })?;
        if let Some(model) = self.models.iter().find(|model| !model.is_file()) {
            return Err(UsageError(format!("expected a model file, found none at {}", model.display())));
        }
        if self.batch_sizes.contains(&0) {
            return Err(UsageError("--batch-sizes: expected at least 1 row, found 0".to_owned()));
        }
        if !(self.seconds > 0.0 && self.seconds <= 3600.0) {
            let found = self.seconds;
            return Err(UsageError(format!("--seconds: expected more than 0 and at most 3600, found {found}")));
        }
        let (models, batch_sizes, optimized) = (self.models.clone(), self.batch_sizes.clone(), self.optimized);
        Ok(BenchRequest { models, batch_sizes, time: Duration::from_secs_f64(self.seconds), engine, optimized })
    }
}

fn print(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    for race in &report.races {
        let title = format!("batches of {}", race.batch_size);
        let header = [title.as_str(), "p50 ms", "p95 ms", "fastest ms", "rows/s", "times as fast", "runs"];
        let mut table = table::table(&header, true);
        let first = race.models.first().map_or(f64::NAN, |model| model.p50_ms);
        for model in &race.models {
            table.add_row([
                model.name.clone(),
                format!("{:.2}", model.p50_ms),
                format!("{:.2}", model.p95_ms),
                format!("{:.2}", model.min_ms),
                format!("{:.1}", model.rows_per_s),
                format!("{:.2}", first / model.p50_ms),
                model.runs.to_string(),
            ]);
        }
        writeln!(out, "{table}")?;
    }
    writeln!(out, "{}, 8-bit kernels of {}", table::count(report.threads, "thread"), report.engine)
}
