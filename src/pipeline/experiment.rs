//! Many runs over one calibration: each row is chosen, simulated and measured, and written down when it is done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::device::Taken;
use super::journal::{Journal, Key, PlanKey, RowKey};
use super::run_dir::RunDir;
use super::shared::Shared;
use super::{Clock, Error, Progress, Work, device, finish, hash, kernels, versions};
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
/// `command` tells how the model of one is made alone, into this run directory.
///
/// # Errors
/// Where the directory cannot be used, and where no row at all can be had.
pub fn experiment(
    sweep: &Sweep,
    command: &dyn Fn(&Combination, &Path) -> String,
    progress: &mut dyn Progress,
) -> Result<SweepOutcome, Error> {
    let first = sweep.combinations.iter().find_map(|it| it.plan.as_ref().ok()).ok_or(Error::NothingToRun)?;
    let rank_by = sweep.rank_by.unwrap_or_else(|| default_rank(first));
    let taken = device::take(first.device)?;
    progress.stage("hash", Work::Uncounted);
    let journal = Journal::open(&sweep.dir, &key(sweep, &taken))?;
    let mut runs = Runs { sweep, command, journal, taken, shared: None };
    let done = runs.journal.done(sweep.combinations.len())?;
    let resumed = done.iter().flatten().count();

    let mut rows: Vec<SweepRow> = (0..done.len()).map(|index| runs.row(index)).collect();
    let mut pending: Vec<usize> = Vec::new();
    for ((row, done), combination) in rows.iter_mut().zip(done).zip(&sweep.combinations) {
        match (done, &combination.plan) {
            // Names and commands are those of this process.
            (Some(done), Ok(_)) => row.gave = done.gave,
            (None, Ok(_)) => pending.push(row.number - 1),
            // What was done stays on the disk: the plan may be possible again, as where a file is away for a while.
            (Some(_), Err(error)) => row.error = Some(error.to_string()),
            (None, Err(error)) => *row = runs.failed(row.number - 1, &error.to_string())?,
        }
    }
    for group in runs.groups(&pending) {
        for row in runs.group(&group, progress)? {
            let place = row.number - 1;
            rows[place] = row;
        }
    }
    let report = SweepReport::new(versions(), rank_by, rows);
    if report.rows.iter().all(|row| row.gave.is_none()) {
        let message = report.rows.first().and_then(|row| row.error.clone()).unwrap_or_default();
        return Err(Error::AllFailed { count: report.rows.len(), message });
    }
    for (name, text) in RESULTS.iter().zip([report.to_json()?, report.to_csv()?]) {
        runs.journal.write_results(name, &text)?;
    }
    let best = report.best().map(|row| row.number - 1);
    let wanted: Vec<usize> = match sweep.emit {
        Emit::None => Vec::new(),
        Emit::Best => best.into_iter().collect(),
        Emit::All => report.rows.iter().filter(|row| row.gave.is_some()).map(|row| row.number - 1).collect(),
    };
    runs.emit(&wanted, progress)?;
    let best = best.filter(|best| wanted.contains(best)).map(|best| runs.journal.model_dir(best));
    Ok(SweepOutcome { report, dir: sweep.dir.clone(), resumed, best })
}

/// A sweep under way.
struct Runs<'a> {
    sweep: &'a Sweep,
    command: &'a dyn Fn(&Combination, &Path) -> String,
    journal: Journal,
    taken: Taken,
    /// What the runs of the last group share, and which these are.
    shared: Option<(Vec<usize>, Shared)>,
}

impl Runs<'_> {
    /// Runs rows that share a calibration.
    fn group(&mut self, group: &[usize], progress: &mut dyn Progress) -> Result<Vec<SweepRow>, Error> {
        let mut shared = match self.share(group, progress) {
            Ok(shared) => shared,
            // One of them may quantize a value that another leaves alone, and that is infinite.
            Err(_) if group.len() > 1 => {
                let each = group.iter().map(|&index| self.group(&[index], progress));
                return Ok(each.collect::<Result<Vec<_>, _>>()?.concat());
            }
            Err(error) => {
                let failed = |&index: &usize| self.failed(index, &error.to_string());
                return group.iter().map(failed).collect();
            }
        };
        progress.stage("runs", Work::Runs(group.len()));
        let mut rows = Vec::new();
        for number in shared.order() {
            let Some(&index) = group.get(number) else { continue };
            let row = match self.run(number, index, &mut shared) {
                Ok((gave, sites)) => self.done(index, gave, &sites)?,
                Err(error) => self.failed(index, &error.to_string())?,
            };
            rows.push(row);
            progress.advance(1);
        }
        self.shared = Some((group.to_vec(), shared));
        Ok(rows)
    }

    fn share(&mut self, group: &[usize], progress: &mut dyn Progress) -> Result<Shared, Error> {
        // That of the group before is of no use any more, and large.
        self.shared = None;
        let plans: Vec<&Plan> = group.iter().filter_map(|&index| self.plan(index)).collect();
        Shared::new(&plans, self.taken.clone(), progress)
    }

    /// Chooses and measures one row, `number` of its group, and writes its model if all are to be written.
    fn run(&self, number: usize, index: usize, shared: &mut Shared) -> Result<(Gave, Vec<SiteReport>), Error> {
        let plan = self.plan(index).ok_or(Error::NothingToRun)?;
        if self.sweep.emit == Emit::All {
            let report = self.write_model(number, index, shared)?;
            let gave = Gave {
                float: report.evaluation.float,
                quantized: report.evaluation.quantized,
                weight_bytes: weight_bytes(&shared.base.sites.weights, &report.sites),
                search_s: report.timings_s.search,
                evaluate_s: report.timings_s.evaluate,
                given_up: report.given_up,
            };
            return Ok((gave, report.sites));
        }
        let mut clock = Clock::start();
        let (chosen, _) = shared.choose(number, plan)?;
        let search_s = clock.lap();
        let base = &shared.base;
        let simulation = chosen.simulation(base)?;
        let comparison = &shared.comparison;
        let evaluation = comparison.run(&base.model, &simulation, |_| ());
        let report::Evaluation { float, quantized, .. } = evaluation.map_err(comparison.batches().blame())?;
        let weight_bytes = weight_bytes(&base.sites.weights, &chosen.selections.reports);
        let given_up = chosen.given_up.map(|given_up| given_up.reason);
        let gave = Gave { float, quantized, weight_bytes, search_s, evaluate_s: clock.lap(), given_up };
        Ok((gave, chosen.selections.reports))
    }

    /// Writes the run directories of rows, but those that are there.
    fn emit(&mut self, wanted: &[usize], progress: &mut dyn Progress) -> Result<(), Error> {
        let mut missing = Vec::new();
        for &index in wanted {
            let plan = hash::of_plan(self.plan(index).ok_or(Error::NothingToRun)?)?;
            if !holds_run_of(&self.journal.model_dir(index), &plan) {
                missing.push(index);
            }
        }
        for group in self.groups(&missing) {
            let known = self.shared.take().filter(|(known, _)| group.iter().all(|index| known.contains(index)));
            let (members, mut shared) = match known {
                Some(known) => known,
                None => match self.share(&group, progress) {
                    Ok(shared) => (group.clone(), shared),
                    Err(_) if group.len() > 1 => {
                        group.iter().try_for_each(|&index| self.emit(&[index], progress))?;
                        continue;
                    }
                    Err(error) => return Err(error),
                },
            };
            progress.stage("emit", Work::Runs(group.len()));
            for number in shared.order() {
                let Some(&index) = members.get(number).filter(|index| group.contains(index)) else { continue };
                self.write_model(number, index, &mut shared)?;
                progress.advance(1);
            }
        }
        Ok(())
    }

    fn write_model(&self, number: usize, index: usize, shared: &mut Shared) -> Result<report::Report, Error> {
        let mut plan = self.plan(index).cloned().ok_or(Error::NothingToRun)?;
        plan.output.dir = self.journal.model_dir(index);
        let run_dir = RunDir::open(&plan.output.dir)?;
        let hashes = shared.base.hashes(&plan, &shared.comparison)?;
        let mut clock = Clock::start();
        let (chosen, told) = shared.choose(number, &plan)?;
        clock.timings = shared.timings;
        clock.timings.search = clock.lap();
        let outcome =
            finish((&shared.base, &shared.comparison), &plan, (chosen, hashes, told), run_dir, clock, &mut Silent)?;
        Ok(outcome.report)
    }

    /// Rows that share model and calibration data, in the order in which the first of each comes.
    fn groups(&self, rows: &[usize]) -> Vec<Vec<usize>> {
        let mut groups: Vec<(&Plan, Vec<usize>)> = Vec::new();
        for &index in rows {
            let Some(plan) = self.plan(index) else { continue };
            let shares = |other: &Plan| {
                let same_sites = kernels::of(other) == kernels::of(plan);
                other.model == plan.model && same_sites && other.calibration.is_same_as(&plan.calibration)
            };
            match groups.iter_mut().find(|(other, _)| shares(other)) {
                Some((_, group)) => group.push(index),
                None => groups.push((plan, vec![index])),
            }
        }
        groups.into_iter().map(|(_, group)| group).collect()
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
            command: combination.map(|it| (self.command)(it, &self.journal.model_dir(index))).unwrap_or_default(),
            gave: None,
            error: None,
            is_on_pareto_front: false,
        }
    }
}

/// Says nothing.
pub(super) struct Silent;

impl Progress for Silent {
    fn stage(&mut self, _: &'static str, _: Work) {}

    fn advance(&mut self, _: usize) {}
}

/// The first metric of the evaluation, or SQNR where there is none.
fn default_rank(plan: &Plan) -> Metric {
    plan.evaluation.as_ref().and_then(|evaluation| evaluation.metrics.first().copied()).unwrap_or(Metric::Sqnr)
}

/// What the sweep is of.
fn key(sweep: &Sweep, taken: &Taken) -> Key {
    let mut hashes: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut hash_of = |path: &Path| -> Result<String, Error> {
        if let Some(known) = hashes.get(path) {
            return Ok(known.clone());
        }
        let hash = hash::of_path(path)?;
        hashes.insert(path.to_owned(), hash.clone());
        Ok(hash)
    };
    let mut of_plan = |plan: &Plan| -> Result<PlanKey, Error> {
        let evaluation = plan.evaluation.as_ref().map(|evaluation| hash_of(&evaluation.data.path)).transpose()?;
        let files = [Some(hash_of(&plan.model)?), Some(hash_of(&plan.calibration.path)?), evaluation];
        Ok(PlanKey { plan: hash::of_plan(plan)?, files })
    };
    let row = |combination: &Combination| {
        // A file that cannot be read is told when its turn comes.
        let plan = combination.plan.as_ref().ok().and_then(|plan| of_plan(plan).ok());
        RowKey { name: combination.name.clone(), plan }
    };
    let rows = sweep.combinations.iter().map(row).collect();
    Key { versions: versions(), device: taken.name(), rows }
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
