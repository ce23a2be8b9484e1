//! Runs that share a model and its calibration: it runs once for all of them, and each one takes its part of what was seen. It
//! refuses to know where runs come from and where their results go.

use std::collections::{BTreeMap, BTreeSet};

use super::base::{Base, Observed};
use super::calibration::Calibration;
use super::chosen::Chosen;
use super::compare::Comparison;
use super::device::Taken;
use super::experiment::Silent;
use super::score::{Asking, Pool, ScoresTold, SiteScores};
use super::{Clock, Error, Progress, Work, hessian_batches, mixed, settle};
use crate::config::{HessianPlan, Plan};
use crate::correct::Targets;
use crate::report::Timings;
use crate::settings::Settings;
use crate::sites::Sites;
use crate::statistics::Activation;

/// What runs share.
pub(super) struct Shared {
    pub(super) base: Base,
    pub(super) comparison: Comparison,
    /// In the order of the plans; `None` where one cannot be done.
    settled: Vec<Option<Settled>>,
    /// The sites that any of the runs quantizes.
    sites: Sites,
    observed: Observed,
    /// Hessian scores of the runs that are under way, which are large: those of one request at a time.
    pool: Option<(Scored, Result<Pool, String>)>,
    /// What all of this took.
    pub(super) timings: Timings,
}

/// A run whose sites are settled.
struct Settled {
    sites: Sites,
    settings: Settings,
    scored: Option<Scored>,
}

/// What scores are computed for: runs whose requests are equal share them. With a tolerance the number of probes depends on
/// the layers that are scored; sums by row are of the values that a `z_threshold` leaves.
#[derive(Debug, Clone, PartialEq)]
struct Scored {
    plan: HessianPlan,
    layers: Option<BTreeSet<String>>,
    limits: BTreeMap<String, f64>,
}

impl Shared {
    /// Loads and calibrates for these plans, whose models and calibration data are the same.
    ///
    /// # Errors
    /// Where the model or the data cannot be read, or the model fails.
    pub(super) fn new(plans: &[&Plan], taken: Taken, progress: &mut dyn Progress) -> Result<Self, Error> {
        let mut clock = Clock::start();
        progress.stage("load", Work::Uncounted);
        let first = plans.first().ok_or(Error::NothingToRun)?;
        let (base, comparison) = Base::load_to_compare(first, taken, (Calibration::open(&first.calibration)?, None))?;
        // What is wrong with one run is told when its turn comes.
        let of_plan = |plan: &&Plan| {
            let (sites, settings) = settle(plan, &base).ok()?;
            Some(Settled { sites, settings, scored: None })
        };
        let mut settled: Vec<Option<Settled>> = plans.iter().map(of_plan).collect();
        let sites = union(&base.sites, &settled);
        let runs = plans.iter().zip(&settled).filter_map(|(plan, run)| Some((plan, run.as_ref()?)));
        let targets: Vec<Targets> =
            runs.map(|(plan, run)| base.targets(plan.weights.bias_correction, &run.sites)).collect();
        clock.timings.load = clock.lap();

        progress.stage("calibrate", Work::Rows(base.calibration.rows));
        let taps = (Targets::taps_of(&targets), &sites);
        let observed = base.observe(first, base.calibration.data()?.batches(), taps, |rows| progress.advance(rows))?;
        for (plan, run) in plans.iter().zip(&mut settled) {
            let Some(run) = run else { continue };
            let statistics = statistics_of(&run.sites, &sites, &observed);
            run.scored = Scored::of(plan, &Asking::new(&run.settings, &run.sites, Some(&statistics)));
        }
        clock.timings.calibrate = clock.lap();
        Ok(Self { base, comparison, settled, sites, observed, pool: None, timings: clock.timings })
    }

    /// The order in which the runs take turns, so that those that share scores follow each other.
    pub(super) fn order(&self) -> Vec<usize> {
        let scored = |index: &usize| self.settled.get(*index).and_then(|run| run.as_ref()?.scored.as_ref());
        let mut kinds: Vec<&Scored> = Vec::new();
        for own in (0..self.settled.len()).filter_map(|index| scored(&index)) {
            if !kinds.contains(&own) {
                kinds.push(own);
            }
        }
        let mut order: Vec<usize> = (0..self.settled.len()).collect();
        order.sort_by_key(|index| scored(index).and_then(|own| kinds.iter().position(|kind| *kind == own)));
        order
    }

    /// What is chosen for the plan of this number, and what its report says of scores.
    ///
    /// # Errors
    /// Where the plan cannot be done, scores are of no use, or a threshold cannot be chosen.
    pub(super) fn choose(&mut self, number: usize, plan: &Plan) -> Result<(Chosen, ScoresTold), Error> {
        let (sites, settings) = settle(plan, &self.base)?;
        let scored = self.settled.get(number).and_then(|run| run.as_ref()?.scored.clone());
        if let Some(scored) = &scored {
            self.score(scored);
        }
        let statistics = statistics_of(&sites, &self.sites, &self.observed);
        let targets = self.base.targets(plan.weights.bias_correction, &sites);
        let inputs = self.observed.inputs.for_some(&self.observed.targets, &targets);
        let asking = Asking::new(&settings, &sites, Some(&statistics));
        let (scores, mut told) = match (&scored, &self.pool, &plan.hessian) {
            (Some(_), Some((_, Ok(pool))), Some(hessian)) => pool.of(&asking, hessian)?,
            (Some(_), Some((_, Err(message))), _) => return Err(Error::SharedScores { message: message.clone() }),
            _ => (SiteScores::default(), ScoresTold::default()),
        };
        drop(asking);
        let settings = mixed::settle(&self.base, (&sites, settings), (&statistics, &scores), &mut told, &mut Silent)?;
        let observed = Observed { statistics, targets, inputs };
        Ok((Chosen::new(&self.base, plan, (sites, &settings), observed, &scores, &mut Silent)?, told))
    }

    /// Computes the scores of all runs with this request, unless they are there.
    fn score(&mut self, scored: &Scored) {
        if self.pool.as_ref().is_some_and(|(known, _)| known == scored) {
            return;
        }
        // Those before are of no use any more.
        self.pool = None;
        let mut clock = Clock::start();
        let runs: Vec<&Settled> =
            self.settled.iter().flatten().filter(|run| run.scored.as_ref() == Some(scored)).collect();
        let statistics: Vec<_> =
            runs.iter().map(|run| statistics_of(&run.sites, &self.sites, &self.observed)).collect();
        let askings = runs.iter().zip(&statistics);
        let askings: Vec<_> =
            askings.map(|(run, statistics)| Asking::new(&run.settings, &run.sites, Some(statistics))).collect();
        let asking = Asking::union(&self.sites, &askings.iter().collect::<Vec<_>>());
        let pool = asking.pool(&scored.plan, &self.base, |_| ());
        let pool = pool.map_err(|error| hessian_batches(&scored.plan).blame()(error).to_string());
        self.pool = Some((scored.clone(), pool));
        self.timings.hessian = clock.lap();
    }
}

impl Scored {
    fn of(plan: &Plan, asking: &Asking<'_>) -> Option<Self> {
        let plan = plan.hessian.clone().filter(|_| !asking.is_empty())?;
        let layers = plan.request.tolerance.is_some().then(|| asking.names());
        // Whether MSE may stand in is each run's own business.
        Some(Self { plan: HessianPlan { allow_fallback: false, ..plan }, layers, limits: asking.limits() })
    }
}

/// The statistics of these sites, which are among `all` that were observed.
fn statistics_of(sites: &Sites, all: &Sites, observed: &Observed) -> Vec<Vec<Activation>> {
    let names = all.activations.iter().map(|site| site.name.as_str());
    let by_name: BTreeMap<&str, &Vec<Activation>> = names.zip(&observed.statistics).collect();
    let own = sites.activations.iter().map(|site| by_name.get(site.name.as_str()).copied());
    own.map(|statistics| statistics.cloned().unwrap_or_default()).collect()
}

/// The sites that any of these quantizes.
fn union(all: &Sites, settled: &[Option<Settled>]) -> Sites {
    let runs = || settled.iter().flatten();
    let weights: BTreeSet<&str> = runs().flat_map(|run| &run.sites.weights).map(|it| it.name.as_str()).collect();
    let activations: BTreeSet<&str> =
        runs().flat_map(|run| &run.sites.activations).map(|it| it.name.as_str()).collect();
    let mut sites = all.clone();
    sites.weights.retain(|site| weights.contains(site.name.as_str()));
    sites.activations.retain(|site| activations.contains(site.name.as_str()));
    sites
}
