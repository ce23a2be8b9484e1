//! Runs that share a model and its calibration: it runs once for all of them, and each one takes its part of what was seen. It
//! refuses to know where runs come from and where their results go.

use std::collections::{BTreeMap, BTreeSet};

use super::base::{Base, Observed};
use super::chosen::Chosen;
use super::device::Taken;
use super::score::{Asking, Pool, ScoresTold, SiteScores};
use super::{Clock, Error, Progress, Work, hessian_batches};
use crate::config::{BiasCorrection, HessianPlan, Plan};
use crate::report::Timings;
use crate::settings::{self, Settings};
use crate::sites::Sites;
use crate::statistics::Activation;

/// What runs share.
pub(super) struct Shared {
    pub(super) base: Base,
    /// The sites that any of the runs quantizes.
    sites: Sites,
    observed: Observed,
    pools: Vec<(Scored, Result<Pool, String>)>,
    /// What all of this took.
    pub(super) timings: Timings,
}

/// What scores are computed for: runs whose requests are equal share them. With a tolerance the number of probes depends on
/// the layers that are scored.
#[derive(Debug, Clone, PartialEq)]
struct Scored {
    plan: HessianPlan,
    layers: Option<BTreeSet<String>>,
}

/// A run whose sites are settled.
struct Settled<'a> {
    plan: &'a Plan,
    sites: Sites,
    settings: Settings,
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
        let base = Base::load(first, taken)?;
        // What is wrong with the overrides of one run is told when its turn comes.
        let settled = plans.iter().copied().filter_map(|plan| {
            let (sites, settings) = settings::settle(plan, base.sites.clone()).ok()?;
            Some(Settled { plan, sites, settings })
        });
        let settled: Vec<Settled<'_>> = settled.collect();
        let sites = union(&base.sites, &settled);
        clock.timings.load = clock.lap();

        progress.stage("calibrate", Work::Rows(base.calibration.rows()));
        let corrections = plans.iter().map(|plan| plan.weights.bias_correction);
        let correction =
            corrections.fold(BiasCorrection::None, |all, own| if own == BiasCorrection::None { all } else { own });
        let Observed { statistics, targets, inputs } =
            base.observe(first, correction, &sites, |rows| progress.advance(rows))?;
        let inputs = inputs.with_statistics(&targets, &statistics)?;
        clock.timings.calibrate = clock.lap();

        let mut shared = Self {
            observed: Observed { statistics, targets, inputs },
            pools: Vec::new(),
            timings: clock.timings,
            base,
            sites,
        };
        shared.pools = shared.score(&settled, progress);
        shared.timings.hessian = if shared.pools.is_empty() { 0.0 } else { clock.lap() };
        Ok(shared)
    }

    /// Hessian scores for all runs that ask for some.
    fn score(&self, settled: &[Settled<'_>], progress: &mut dyn Progress) -> Vec<(Scored, Result<Pool, String>)> {
        let mut wanted: Vec<(Scored, Vec<Asking<'_>>)> = Vec::new();
        for run in settled {
            let observed = self.statistics_of(&run.sites);
            let asking = Asking::new(&run.settings, &run.sites, Some(&observed));
            let Some(scored) = Scored::of(run.plan, &asking) else { continue };
            match wanted.iter_mut().find(|(other, _)| *other == scored) {
                Some((_, askings)) => askings.push(asking),
                None => wanted.push((scored, vec![asking])),
            }
        }
        let pool = |(scored, askings): (Scored, Vec<Asking<'_>>)| {
            let plan = &scored.plan;
            let rows = Work::Rows(plan.request.samples.get().min(self.base.calibration.rows()));
            progress.stage("hessian", if plan.request.tolerance.is_none() { rows } else { Work::Uncounted });
            let asking = Asking::union(&self.sites, &askings.iter().collect::<Vec<_>>());
            let pool = asking.pool(plan, &self.base, |rows| progress.advance(rows));
            let pool = pool.map_err(|error| hessian_batches(plan).blame()(error).to_string());
            (scored, pool)
        };
        wanted.into_iter().map(pool).collect()
    }

    /// What is chosen for one of the plans, and what its report says of scores.
    ///
    /// # Errors
    /// Where overrides do not fit the model, scores are of no use, or a threshold cannot be chosen.
    pub(super) fn choose(&self, plan: &Plan) -> Result<(Chosen, ScoresTold), Error> {
        let (sites, settings) = settings::settle(plan, self.base.sites.clone())?;
        let statistics = self.statistics_of(&sites);
        let targets = self.base.targets(plan.weights.bias_correction, &sites);
        let inputs = self.observed.inputs.for_some(&self.observed.targets, &targets);
        let asking = Asking::new(&settings, &sites, Some(&statistics));
        let (scores, told) = match (Scored::of(plan, &asking), &plan.hessian) {
            (Some(scored), Some(hessian)) => {
                let pool = self.pools.iter().find(|(own, _)| *own == scored).map(|(_, pool)| pool);
                match pool {
                    Some(Ok(pool)) => pool.of(&asking, hessian)?,
                    Some(Err(message)) => return Err(Error::SharedScores { message: message.clone() }),
                    None => return Err(Error::NothingToRun),
                }
            }
            _ => (SiteScores::default(), ScoresTold::default()),
        };
        drop(asking);
        let observed = Observed { statistics, targets, inputs };
        Ok((Chosen::new(&self.base, (sites, &settings), observed, &scores, |_| ())?, told))
    }

    /// The statistics of these sites, which are among the shared ones.
    fn statistics_of(&self, sites: &Sites) -> Vec<Vec<Activation>> {
        let names = self.sites.activations.iter().map(|site| site.name.as_str());
        let by_name: BTreeMap<&str, _> = names.zip(&self.observed.statistics).collect();
        sites
            .activations
            .iter()
            .map(|site| by_name.get(site.name.as_str()).copied().cloned().unwrap_or_default())
            .collect()
    }
}

impl Scored {
    fn of(plan: &Plan, asking: &Asking<'_>) -> Option<Self> {
        let plan = plan.hessian.clone().filter(|_| !asking.is_empty())?;
        let layers = plan.request.tolerance.is_some().then(|| asking.names());
        // Whether MSE may stand in is each run's own business.
        Some(Self { plan: HessianPlan { allow_fallback: false, ..plan }, layers })
    }
}

/// The sites that any of these quantizes.
fn union(all: &Sites, settled: &[Settled<'_>]) -> Sites {
    let weights: BTreeSet<&str> =
        settled.iter().flat_map(|run| &run.sites.weights).map(|it| it.name.as_str()).collect();
    let activations: BTreeSet<&str> =
        settled.iter().flat_map(|run| &run.sites.activations).map(|it| it.name.as_str()).collect();
    let mut sites = all.clone();
    sites.weights.retain(|site| weights.contains(site.name.as_str()));
    sites.activations.retain(|site| activations.contains(site.name.as_str()));
    sites
}
