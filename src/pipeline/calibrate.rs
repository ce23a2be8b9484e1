//! Calibration alone: statistics as a file that later runs start from, of all batches or of a shard of them.

use std::path::{Path, PathBuf};

use super::base::{Base, Observed};
use super::calibration::Calibration;
use super::kept::scores::{self, NamedScores};
use super::kept::statistics::{self, Kept, KeptScores, Key};
use super::output_file::OutputFile;
use super::score::Asking;
use super::{Error, Progress, Work, device, hessian_batches};
use crate::config::{BiasCorrection, HessianPlan, Plan};
use crate::dataset::Shard;
use crate::jit;
use crate::settings;
use crate::sites::Sites;

/// What is written where.
#[derive(Debug, Clone)]
pub struct Request {
    /// The file.
    pub output: PathBuf,
    /// Which of the batches are run.
    pub shard: Shard,
    /// Statistics of the whole calibration: given these, nothing but Hessian scores is computed.
    pub statistics: Option<PathBuf>,
}

/// Statistics that were written.
pub struct Calibrated {
    /// What was written.
    pub kept: Kept,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// Calibrates as planned and writes the statistics, whole or not at all.
///
/// # Errors
/// Whatever goes wrong in a stage; nothing is left behind then.
pub fn calibrate(plan: &Plan, request: &Request, progress: &mut dyn Progress) -> Result<Calibrated, Error> {
    let Request { output, shard, statistics } = request;
    let file = OutputFile::open(output, statistics::is_one)?;
    let known = statistics.as_deref().map(Kept::read).transpose()?;
    let taken = device::take(plan.device)?;
    progress.stage("load", Work::Uncounted);
    let base = Base::load(plan, taken, Calibration::open(&plan.calibration)?)?;
    let key = base.key(plan)?;
    let (sites, settings) = settings::settle(plan, base.sites.clone())?;
    let data = base.calibration.data()?;
    let asked = plan.hessian.as_ref().filter(|_| !Asking::new(&settings, &sites, None).is_empty());
    let batches = match (&known, asked) {
        (None, _) => data.batches(),
        (Some(_), Some(HessianPlan { request, .. })) => data.sample(request.samples, request.seed, request.batch_size),
        (Some(_), None) if *shard != Shard::WHOLE => return Err(Error::NothingToCompute),
        (Some(_), None) => data.batches(),
    };
    if shard.count() > batches.len() {
        return Err(Error::TooManyShards { count: shard.count(), batches: batches.len() });
    }

    let mut kept = match known {
        Some(known) => {
            known.refuse_other(&key)?;
            known.refuse_shard()?;
            Kept { path: output.clone(), ..known }
        }
        None => {
            let own = batches.shard(*shard);
            progress.stage("calibrate", Work::Rows(own.rows()));
            // Of all layers, whatever is done to their biases: later runs may correct them or not.
            let all = Sites { activations: sites.activations.clone(), ..base.sites.clone() };
            let targets = base.targets(BiasCorrection::ClosedForm, &all);
            let observed = base.observe(plan, own, (targets, &all), |rows| progress.advance(rows))?;
            of_observed(key, observed, &base, (&all, output, *shard))?
        }
    };
    let mut notes: Vec<String> = base.taken.warning.clone().into_iter().collect();
    let seen = kept.statistics_of(&sites)?;
    let asking = Asking::new(&settings, &sites, Some(&seen));
    if let Some(hessian) = asked.filter(|_| !asking.is_empty()) {
        let is_part = *shard != Shard::WHOLE;
        if kept.shard != Shard::WHOLE {
            notes.push(
                "Hessian scores were not computed: their bins depend on the range of all values; merge the shards, then \
                 calibrate with --statistics MERGED"
                    .to_owned(),
            );
        } else if is_part && hessian.request.tolerance.is_some() {
            return Err(Error::ToleranceOfShard);
        } else {
            let rows = data.sample(hessian.request.samples, hessian.request.seed, hessian.request.batch_size);
            let rows = Work::Rows(rows.shard(*shard).rows());
            progress.stage("hessian", if hessian.request.tolerance.is_none() { rows } else { Work::Uncounted });
            let scores = asking.compute(hessian, &base.model, (data, *shard), |rows| progress.advance(rows));
            let scores = scores.map_err(hessian_batches(hessian).blame())?;
            let named = NamedScores { names: scores::names(asking.layers()), scores };
            kept.scores = Some(KeptScores { request: statistics::request(hessian)?, shard: *shard, named });
        }
    }
    progress.stage("write", Work::Uncounted);
    kept.write(file)?;
    Ok(Calibrated { kept, notes })
}

fn of_observed(
    key: Key,
    Observed { statistics, targets, inputs }: Observed,
    base: &Base,
    (sites, path, shard): (&Sites, &Path, Shard),
) -> Result<Kept, Error> {
    let names = sites.activations.iter().map(|site| site.name.clone());
    Ok(Kept {
        path: path.to_owned(),
        key,
        rows: [base.calibration.rows, base.calibration.stored_rows],
        shard,
        threads: jit::thread_count(),
        seen: base.model.seen(),
        sites: names.zip(statistics).collect(),
        inputs: inputs.by_layer(&targets)?,
        scores: None,
    })
}

/// Makes one file of the statistics of all shards.
///
/// # Errors
/// Where a file cannot be read, a shard is missing, is there twice, or is of something else.
pub fn merge(files: &[PathBuf], output: &Path) -> Result<Calibrated, Error> {
    if let Some(path) = files.iter().find(|path| is_same(path, output)) {
        return Err(Error::OutputIsInput { path: path.clone() });
    }
    let file = OutputFile::open(output, statistics::is_one)?;
    let parts = files.iter().map(|path| Kept::read(path)).collect::<Result<Vec<_>, Error>>()?;
    let mut notes = Vec::new();
    let threads = |part: &Kept| part.threads;
    if let (Some(least), Some(most)) = (parts.iter().map(threads).min(), parts.iter().map(threads).max())
        && least < most
    {
        notes.push(format!(
            "shards ran on {least} to {most} threads: libtorch may round activations differently, and thresholds differ from \
             those of one process"
        ));
    }
    let kept = Kept::merged(parts, output.to_owned())?;
    kept.write(file)?;
    Ok(Calibrated { kept, notes })
}

/// Whether two paths lead to one file that is there.
fn is_same(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    real(a).is_some_and(|a| real(b) == Some(a))
}
