//! Many runs over one calibration: each row is chosen, simulated and measured, and written down when it is done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::device::Taken;
use super::journal::{Journal, Key, RowKey};
use super::run_dir::RunDir;
use super::shared::Shared;
use super::{Clock, Error, Progress, Work, device, finish, hash, versions};
use crate::config::{Combination, Emit, Metric, Plan, Sweep};
use crate::report::{self, Gave, SiteReport, SweepReport, SweepRow};
use crate::sites::WeightSite;

/// Names of the files of results in the directory of a sweep.
const RESULTS: [&str; 2] = ["results.json", "results.csv"];

/// A finished sweep.
#[derive(Debug)]
pub struct SweepOutcome {
    /// What `results.json` holds.
    pub report: SweepReport,
    /// The directory.
    pub dir: PathBuf,
    /// Rows that an earlier process had done.
    pub resumed: usize,
    /// The run directory of the best row, if its model is written.
    pub best: Option<PathBuf>,
}

/// Runs all combinations that are not done yet; those that fail are written down with their errors, and the rest go on.
/// `command` tells how one is made alone.
///
/// # Errors
/// Where the directory cannot be used, and where no row at all can be had.
pub fn experiment(
    sweep: &Sweep,
    command: &dyn Fn(&Combination) -> String,
    progress: &mut dyn Progress,
) -> Result<SweepOutcome, Error> {
    let plans: Vec<Option<&Plan>> = sweep.combinations.iter().map(|it| it.plan.as_ref().ok()).collect();
    let first = plans.iter().flatten().next().copied().ok_or(Error::NothingToRun)?;
    let rank_by = sweep.rank_by.unwrap_or_else(|| default_rank(first));
    let taken = device::take(first.device)?;
    progress.stage("hash", Work::Uncounted);
    let journal = Journal::open(&sweep.dir, &key(sweep, &taken)?)?;
    let mut runs = Runs { sweep, command, journal, taken, shared: None };
    let mut rows = runs.journal.done(sweep.combinations.len())?;
    let resumed = rows.iter().flatten().count();

    let mut pending: Vec<usize> = Vec::new();
    for (index, (row, combination)) in rows.iter_mut().zip(&sweep.combinations).enumerate() {
        match (&row, &combination.plan) {
            (Some(_), _) => {}
            (None, Ok(_)) => pending.push(index),
            (None, Err(error)) => *row = Some(runs.failed(index, &error.to_string())?),
        }
    }
    for group in groups(&pending, &plans) {
        for (index, row) in runs.group(&group, progress)? {
            if let Some(place) = rows.get_mut(index) {
                *place = Some(row);
            }
        }
    }
    let report = SweepReport::new(versions(), rank_by, rows.into_iter().flatten().collect());
    let Some(best) = report.best() else {
        let message = report.rows.first().and_then(|row| row.error.clone()).unwrap_or_default();
        return Err(Error::AllFailed { count: report.rows.len(), message });
    };
    let best = match sweep.emit {
        Emit::None => None,
        Emit::Best => Some(runs.emit(best.number - 1, progress)?),
        Emit::All => Some(runs.journal.model_dir(best.number - 1)),
    };
    for (name, text) in RESULTS.iter().zip([report.to_json()?, report.to_csv()?]) {
        runs.journal.write_results(name, &text)?;
    }
    Ok(SweepOutcome { report, dir: sweep.dir.clone(), resumed, best })
}

/// A sweep under way.
struct Runs<'a> {
    sweep: &'a Sweep,
    command: &'a dyn Fn(&Combination) -> String,
    journal: Journal,
    taken: Taken,
    /// What the runs of the last group shared, and which these are.
    shared: Option<(Vec<usize>, Shared)>,
}

impl Runs<'_> {
    /// Runs rows that share a calibration.
    fn group(&mut self, group: &[usize], progress: &mut dyn Progress) -> Result<Vec<(usize, SweepRow)>, Error> {
        // That of the group before is of no use any more, and large.
        self.shared = None;
        let plans: Vec<&Plan> = group.iter().filter_map(|&index| self.plan(index)).collect();
        let shared = match Shared::new(&plans, self.taken.clone(), progress) {
            Ok(shared) => shared,
            Err(error) => {
                let failed = |&index: &usize| Ok((index, self.failed(index, &error.to_string())?));
                return group.iter().map(failed).collect();
            }
        };
        progress.stage("runs", Work::Runs(group.len()));
        let mut rows = Vec::new();
        for &index in group {
            let row = match self.run(index, &shared) {
                Ok((gave, sites)) => self.done(index, gave, &sites)?,
                Err(error) => self.failed(index, &error.to_string())?,
            };
            rows.push((index, row));
            progress.advance(1);
        }
        self.shared = Some((group.to_vec(), shared));
        Ok(rows)
    }

    /// Chooses and measures one row, and writes its model if all are to be written.
    fn run(&self, index: usize, shared: &Shared) -> Result<(Gave, Vec<SiteReport>), Error> {
        let plan = self.plan(index).ok_or(Error::NothingToRun)?;
        if self.sweep.emit == Emit::All {
            let report = self.write_model(index, shared)?;
            let gave = Gave {
                float: report.evaluation.float,
                quantized: report.evaluation.quantized,
                weight_bytes: weight_bytes(&shared.base.sites.weights, &report.sites),
                search_s: report.timings_s.search,
                evaluate_s: report.timings_s.evaluate,
            };
            return Ok((gave, report.sites));
        }
        let mut clock = Clock::start();
        let (chosen, _) = shared.choose(plan)?;
        let search_s = clock.lap();
        let base = &shared.base;
        let simulation = chosen.simulation(base)?;
        let evaluation = base.comparison.run(&base.model, &simulation, &base.calibration, |_| ());
        let report::Evaluation { float, quantized, .. } = evaluation.map_err(base.comparison.batches().blame())?;
        let weight_bytes = weight_bytes(&base.sites.weights, &chosen.selections.reports);
        let gave = Gave { float, quantized, weight_bytes, search_s, evaluate_s: clock.lap() };
        Ok((gave, chosen.selections.reports))
    }

    /// Writes the run directory of a row, unless it is there.
    fn emit(&mut self, index: usize, progress: &mut dyn Progress) -> Result<PathBuf, Error> {
        let dir = self.journal.model_dir(index);
        let shared = self.shared.take().filter(|(group, _)| group.contains(&index));
        let plan = self.plan(index).ok_or(Error::NothingToRun)?;
        if holds_run_of(&dir, &hash::of_plan(plan)?) {
            return Ok(dir);
        }
        let shared = match shared {
            Some((_, shared)) => shared,
            None => Shared::new(&[plan], self.taken.clone(), progress)?,
        };
        progress.stage("emit", Work::Uncounted);
        self.write_model(index, &shared)?;
        Ok(dir)
    }

    fn write_model(&self, index: usize, shared: &Shared) -> Result<report::Report, Error> {
        let mut plan = self.plan(index).cloned().ok_or(Error::NothingToRun)?;
        plan.output.dir = self.journal.model_dir(index);
        let run_dir = RunDir::open(&plan.output.dir)?;
        let hashes = shared.base.hashes_of(&plan)?;
        let mut clock = Clock::start();
        let (chosen, told) = shared.choose(&plan)?;
        clock.timings = shared.timings;
        clock.timings.search = clock.lap();
        let outcome = finish(&shared.base, &plan, (chosen, hashes, told), run_dir, clock, &mut Silent)?;
        Ok(outcome.report)
    }

    fn plan(&self, index: usize) -> Option<&Plan> {
        self.sweep.combinations.get(index)?.plan.as_ref().ok()
    }

    fn done(&self, index: usize, gave: Gave, sites: &[SiteReport]) -> Result<SweepRow, Error> {
        let row = SweepRow { gave: Some(gave), ..self.row(index) };
        self.journal.write(index, &row, sites)?;
        Ok(row)
    }

    fn failed(&self, index: usize, error: &str) -> Result<SweepRow, Error> {
        let row = SweepRow { error: Some(error.to_owned()), ..self.row(index) };
        self.journal.write(index, &row, &[])?;
        Ok(row)
    }

    fn row(&self, index: usize) -> SweepRow {
        let combination = self.sweep.combinations.get(index);
        SweepRow {
            number: index + 1,
            name: combination.map(|it| it.name.clone()).unwrap_or_default(),
            settings: combination.map(|it| it.settings.clone()).unwrap_or_default(),
            command: combination.map(self.command).unwrap_or_default(),
            gave: None,
            error: None,
            is_on_pareto_front: false,
        }
    }
}

/// Says nothing.
struct Silent;

impl Progress for Silent {
    fn stage(&mut self, _: &'static str, _: Work) {}

    fn advance(&mut self, _: usize) {}
}

/// The first metric of the evaluation, or SQNR where there is none.
fn default_rank(plan: &Plan) -> Metric {
    plan.evaluation.as_ref().and_then(|evaluation| evaluation.metrics.first().copied()).unwrap_or(Metric::Sqnr)
}

/// Those that share model and calibration data, in the order in which the first of each comes.
fn groups(pending: &[usize], plans: &[Option<&Plan>]) -> Vec<Vec<usize>> {
    let mut groups: Vec<(&Plan, Vec<usize>)> = Vec::new();
    for &index in pending {
        let Some(plan) = plans.get(index).copied().flatten() else { continue };
        let shares = |other: &Plan| other.model == plan.model && other.calibration == plan.calibration;
        match groups.iter_mut().find(|(other, _)| shares(other)) {
            Some((_, group)) => group.push(index),
            None => groups.push((plan, vec![index])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// What the sweep is of.
fn key(sweep: &Sweep, taken: &Taken) -> Result<Key, Error> {
    let mut hashes: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut hash_of = |path: &Path| -> Result<String, Error> {
        if let Some(known) = hashes.get(path) {
            return Ok(known.clone());
        }
        let hash = hash::of_path(path)?;
        hashes.insert(path.to_owned(), hash.clone());
        Ok(hash)
    };
    let row = |combination: &Combination| {
        let (plan, files) = match &combination.plan {
            Ok(plan) => {
                let evaluation =
                    plan.evaluation.as_ref().map(|evaluation| hash_of(&evaluation.data.path)).transpose()?;
                let files = [Some(hash_of(&plan.model)?), Some(hash_of(&plan.calibration.path)?), evaluation];
                (hash::of_plan(plan)?, files)
            }
            Err(error) => (error.to_string(), [None, None, None]),
        };
        Ok(RowKey { name: combination.name.clone(), plan, files })
    };
    let rows = sweep.combinations.iter().map(row).collect::<Result<_, Error>>()?;
    Ok(Key { versions: versions(), device: taken.name(), rows })
}

/// Whether a run directory is there that was made of this plan.
fn holds_run_of(dir: &Path, plan: &str) -> bool {
    let report = std::fs::read(dir.join("report.json")).ok();
    let report = report.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    report.is_some_and(|report| report["hashes"]["plan"] == plan)
}

/// Bytes of all weights at their bits.
fn weight_bytes(weights: &[WeightSite], reports: &[SiteReport]) -> u64 {
    let bits: BTreeMap<&str, u64> = reports
        .iter()
        .filter(|report| report.kind == report::Kind::Weight)
        .map(|report| (report.name.as_str(), report.bits.get().into()))
        .collect();
    let bytes = |site: &WeightSite| {
        let elements: u64 = site.shape.iter().map(|size| size.unsigned_abs()).product();
        (elements * bits.get(site.name.as_str()).copied().unwrap_or(32)).div_ceil(8)
    };
    weights.iter().map(bytes).sum()
}
