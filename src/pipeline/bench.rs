//! Model files timed side by side on the same rows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Error, Progress, Work, blame, versions};
use crate::config::{DataPlan, EnginePlan, ReduceRange};
use crate::jit::{self, Frozen, Module};
use crate::lower::engine;
use crate::report::{self, Bench};
use crate::speed::{self, Contender};

/// What to time, and how.
#[derive(Debug, Clone)]
pub struct BenchRequest {
    /// The model files.
    pub models: Vec<PathBuf>,
    /// Rows of a run; one race each.
    pub batch_sizes: Vec<usize>,
    /// About how long a race takes, beside the warm-up.
    pub time: Duration,
    /// What 8-bit kernels run on.
    pub engine: EnginePlan,
    /// Time the models as `torch.jit.optimize_for_inference` makes them too.
    pub optimized: bool,
}

/// Times the models on the first rows of the data.
///
/// # Errors
/// Where a model or the data cannot be read, there are too few rows, or a model fails.
pub fn bench(request: &BenchRequest, plan: &DataPlan, progress: &mut dyn Progress) -> Result<Bench, Error> {
    progress.stage("load", Work::Uncounted);
    let engine = match request.engine {
        EnginePlan::Auto => engine::fastest(&engine::trials(), ReduceRange::Never).ok_or(Error::NoEngine)?.engine,
        named => named,
    };
    if !jit::engines().iter().any(|name| name == engine.name()) {
        return Err(Error::NoSuchEngine { engine: engine.name() });
    }
    // Weights are packed for the engine that is set when they are loaded.
    jit::set_engine(engine.name())?;
    let data = blame::open(plan, "calibration")?;
    let modules: Vec<Module> = request.models.iter().map(|path| Module::load(path)).collect::<Result<_, _>>()?;
    progress.stage("bench", Work::Runs(request.batch_sizes.len()));
    let mut races = Vec::new();
    for &batch_size in &request.batch_sizes {
        if data.rows() < batch_size {
            return Err(Error::TooFewRows { expected: batch_size, found: data.rows() });
        }
        let mut contenders = Vec::new();
        for module in &modules {
            for optimized in [false, true].into_iter().filter(|optimized| !optimized || request.optimized) {
                let arguments = blame::bind(module, data.first(batch_size)?, "calibration")?;
                let name = name(module.path(), optimized);
                contenders.push(Contender { name, model: Frozen::new(module, optimized)?, arguments });
            }
        }
        races.push(speed::race(&contenders, batch_size, request.time)?);
        progress.advance(1);
    }
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    Ok(Bench {
        schema: report::SCHEMA,
        versions: versions(),
        models: request.models.iter().map(absolute).collect(),
        data: plan.path.clone(),
        threads: jit::thread_count(),
        engine: engine.name().to_owned(),
        races,
    })
}

fn name(path: &Path, optimized: bool) -> String {
    let path = path.display();
    if optimized { format!("{path}, optimized") } else { path.to_string() }
}
