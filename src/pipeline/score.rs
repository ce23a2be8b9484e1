//! Hessian scores for the sites that need them: computed, or those that an earlier run kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::path::Path;

use tch::Tensor;

use super::Error;
use super::base::Base;
use super::kept::scores::{self, Found};
use super::kept::statistics::Kept;
use crate::config::{HessianPlan, Plan};
use crate::dataset::{Dataset, Shard};
use crate::hessian::{self, Layers, Scored, Scores, Unusable};
use crate::jit::{self, Clean};
use crate::observe::Summing;
use crate::report;
use crate::settings::{Settings, SiteSettings};
use crate::sites::{ActivationSite, Sites, WeightSite};
use crate::statistics::{Activation, ActivationScores, Histogram};
use crate::threshold::{ErrorMethod, GRADIENT_SUMS_MAX_BITS};

/// Scores in the order of the sites; `None` where nothing asks for them.
#[derive(Default)]
pub(super) struct SiteScores<'a> {
    pub(super) weights: Vec<Option<&'a Scored<Tensor>>>,
    pub(super) activations: Vec<Option<&'a Scored<ActivationScores>>>,
    /// Rows that were used.
    pub(super) samples: usize,
    /// Whether MSE may stand in where they are of no use.
    pub(super) allow_fallback: bool,
}

/// Scores by the names of their sites.
pub(super) struct Pool {
    scores: Scores,
    /// Of weights and of activations, in the order of the scores.
    names: [Vec<String>; 2],
    /// They are those that an earlier run kept.
    reused: bool,
    warnings: Vec<String>,
}

/// What a report says of scores.
#[derive(Default)]
pub(super) struct ScoresTold {
    pub(super) report: Option<report::Hessian>,
    /// What was chosen by them.
    pub(super) mixed: Option<report::MixedPrecision>,
    pub(super) warnings: Vec<String>,
}

impl Pool {
    /// What a run with these sites takes from it, and what its report says.
    ///
    /// # Errors
    /// Where the scores of a layer are of no use, unless a fallback is allowed.
    pub(super) fn of(&self, asking: &Asking<'_>, plan: &HessianPlan) -> Result<(SiteScores<'_>, ScoresTold), Error> {
        let [weights, activations] = &self.names;
        let own_weights = asking.weights.iter().map(|site| site.name.as_str());
        let own_activations = asking.activations.iter().map(|site| site.name.as_str());
        let [of_weights, of_activations] = &asking.asks;
        let sites = SiteScores {
            weights: in_order(of_weights, own_weights, weights, &self.scores.weights),
            activations: in_order(of_activations, own_activations, activations, &self.scores.activations),
            samples: self.scores.samples,
            allow_fallback: plan.allow_fallback,
        };
        if !plan.allow_fallback {
            asking.refuse_unusable(&sites)?;
        }
        let report = self.describe(plan, &sites);
        let mut warnings = self.warnings.clone();
        warnings.extend(missed_tolerance(&report));
        Ok((sites, ScoresTold { report: Some(report), mixed: None, warnings }))
    }

    fn describe(&self, plan: &HessianPlan, sites: &SiteScores<'_>) -> report::Hessian {
        let weights = sites.weights.iter().flatten().filter_map(|scored| scored.standard_error);
        let all = weights.chain(sites.activations.iter().flatten().filter_map(|scored| scored.standard_error));
        report::Hessian {
            samples: self.scores.samples,
            probes: self.scores.probes,
            batch_size: plan.request.batch_size.get(),
            distribution: plan.request.distribution,
            seed: plan.request.seed,
            tolerance: plan.request.tolerance,
            standard_error: all.reduce(f64::max),
            left_out: self.scores.left_out.clone(),
            reused: self.reused,
        }
    }
}

/// What scores are kept for and where.
pub(super) struct Keeping<'a> {
    pub(super) plan: &'a Plan,
    pub(super) base: &'a Base,
    /// Statistics that may hold scores.
    pub(super) statistics: Option<&'a Kept>,
    /// The run directory that is being filled.
    pub(super) dir: &'a Path,
}

/// What a site needs scores for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Its thresholds are chosen by them.
    Method,
    /// Its bits are.
    Bits,
    /// Its noise is predicted, if that can be.
    Noise,
}

/// The sites that need scores. A value that never ran on the calibration data stays float, whatever its method.
pub(super) struct Asking<'a> {
    weights: Vec<&'a WeightSite>,
    activations: Vec<&'a ActivationSite>,
    /// Of those the ranges of the values that count.
    ranges: Vec<Option<RangeInclusive<f32>>>,
    /// What weights and activations need them for.
    needs: [Vec<Need>; 2],
    /// Of those with a range what makes values outliers, which do not count.
    limits: Vec<Option<f64>>,
    /// Which of all sites these are.
    asks: [Vec<bool>; 2],
}

impl<'a> Asking<'a> {
    /// `statistics` are those of all activations, if they are known.
    pub(super) fn new(settings: &Settings, sites: &'a Sites, statistics: Option<&[Vec<Activation>]>) -> Self {
        let asks = |site: &SiteSettings| settings.is_scored(site);
        let ran = |index: usize| {
            statistics.is_none_or(|all| all.get(index).is_some_and(|site| site.iter().any(|anchor| anchor.count() > 0)))
        };
        let of_weights: Vec<bool> = settings.weights.iter().map(asks).collect();
        let of_activations = settings.activations.iter().enumerate();
        let of_activations: Vec<bool> = of_activations.map(|(index, own)| asks(own) && ran(index)).collect();
        let summed = |index: usize| {
            let own = settings.activations.get(index)?;
            let site = statistics?.get(index).filter(|_| own.narrowest().get() <= GRADIENT_SUMS_MAX_BITS)?;
            Some((range(site, own.z_threshold), own.z_threshold))
        };
        let asking = of_activations.iter().enumerate().filter(|(_, asks)| **asks);
        let (ranges, limits) = asking.map(|(index, _)| summed(index).unwrap_or_default()).unzip();
        Self {
            ranges,
            limits,
            weights: those(&sites.weights, &of_weights),
            activations: those(&sites.activations, &of_activations),
            needs: [needs(&settings.weights, &of_weights), needs(&settings.activations, &of_activations)],
            asks: [of_weights, of_activations],
        }
    }

    /// Whether no site needs scores.
    pub(super) fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.activations.is_empty()
    }

    /// The sites whose range leaves outliers out, each with what makes them outliers.
    pub(super) fn limits(&self) -> BTreeMap<String, f64> {
        let sites = self.activations.iter().zip(&self.limits);
        sites.filter_map(|(site, limit)| Some((site.name.clone(), (*limit)?))).collect()
    }

    /// The names of all of them.
    pub(super) fn names(&self) -> BTreeSet<String> {
        let weights = self.weights.iter().map(|site| &site.name);
        weights.chain(self.activations.iter().map(|site| &site.name)).cloned().collect()
    }

    pub(super) fn layers(&self) -> Layers<'_> {
        Layers { weights: &self.weights, activations: &self.activations, ranges: &self.ranges }
    }

    /// The scores of these sites, computed anew.
    ///
    /// # Errors
    /// Where they cannot be computed.
    pub(super) fn compute(
        &self,
        plan: &HessianPlan,
        model: &Clean,
        (data, shard): (&Dataset, Shard),
        advance: impl FnMut(usize),
    ) -> Result<Scores, Error> {
        let summing = Summing::on(model.module().device());
        hessian::score_by(summing, model, self.layers(), (data, shard), &plan.request, advance)
            .map_err(|error| named(error, plan, data))
    }

    /// The scores of these sites, computed anew, for runs that share them.
    ///
    /// # Errors
    /// Where they cannot be computed.
    pub(super) fn pool(&self, plan: &HessianPlan, base: &Base, advance: impl FnMut(usize)) -> Result<Pool, Error> {
        let scores = self.compute(plan, &base.model, (base.calibration.data()?, Shard::WHOLE), advance)?;
        Ok(self.named(scores))
    }

    /// The scores of these sites: those that an earlier run kept, if it was of the same model, data and request.
    ///
    /// # Errors
    /// Where they cannot be computed or written.
    pub(super) fn score(
        &self,
        plan: &HessianPlan,
        keeping: &Keeping<'_>,
        mut advance: impl FnMut(usize),
    ) -> Result<Pool, Error> {
        let Keeping { plan: run, base, dir, statistics } = *keeping;
        let kept = run.output.dir.join(scores::FILE);
        let request = || scores::request(run, &base.key(run)?, &base.device(), plan, self.layers());
        let request = if plan.save { Some(request()?) } else { None };
        let mut warnings = Vec::new();
        let mut anew = |reason: String| warnings.push(format!("Hessian scores were computed anew: {reason}"));
        let mut reused = |path: &Path, scores: Scores| {
            advance(scores.samples);
            let warning = format!("the Hessian scores are those that an earlier run kept in {}", path.display());
            Pool { reused: true, warnings: vec![warning], ..self.named(scores) }
        };
        if let Some(statistics) = statistics {
            match statistics.scores_of(plan, self.layers())? {
                // They may be of another device than this run's: they are not kept as its own.
                Found::Scores(scores) => return Ok(reused(&statistics.path, scores)),
                Found::Useless(reason) => anew(reason),
                Found::Nothing => {}
            }
        }
        let found = request.as_ref().map_or(Found::Nothing, |request| scores::read(&kept, request, self.layers()));
        let pool = match found {
            Found::Scores(scores) => reused(&kept, scores),
            Found::Useless(reason) => {
                anew(reason);
                Pool { warnings, ..self.pool(plan, base, advance)? }
            }
            Found::Nothing => Pool { warnings, ..self.pool(plan, base, advance)? },
        };
        if let Some(request) = request {
            scores::write(&dir.join(scores::FILE), &request, self.layers(), &pool.scores)?;
        }
        Ok(pool)
    }

    fn named(&self, scores: Scores) -> Pool {
        Pool { scores, names: scores::names(self.layers()), reused: false, warnings: Vec::new() }
    }

    /// The sites among `all` that any of these ask for; their [`limits`](Self::limits) are the same.
    pub(super) fn union(all: &'a Sites, several: &[&Asking<'_>]) -> Self {
        let names = |names: &mut dyn Iterator<Item = &str>| names.map(str::to_owned).collect::<BTreeSet<String>>();
        let of_weights = names(&mut several.iter().flat_map(|it| it.weights.iter().map(|site| site.name.as_str())));
        let activations = several.iter().flat_map(|it| it.activations.iter().zip(it.ranges.iter().zip(&it.limits)));
        let mut ranges = BTreeMap::new();
        for (site, (range, limit)) in activations {
            let known: &mut (Option<RangeInclusive<f32>>, Option<f64>) = ranges.entry(site.name.as_str()).or_default();
            if known.0.is_none() {
                *known = (range.clone(), *limit);
            }
        }
        let of_weights: Vec<bool> = all.weights.iter().map(|site| of_weights.contains(&site.name)).collect();
        let of_activations: Vec<bool> =
            all.activations.iter().map(|site| ranges.contains_key(site.name.as_str())).collect();
        let activations = those(&all.activations, &of_activations);
        let known = activations.iter().map(|site| ranges.remove(site.name.as_str()).unwrap_or_default());
        let (ranges, limits) = known.unzip();
        Self {
            ranges,
            limits,
            weights: those(&all.weights, &of_weights),
            activations,
            // Each run has its own.
            needs: [Vec::new(), Vec::new()],
            asks: [of_weights, of_activations],
        }
    }

    /// An error for the first site whose scores are of no use.
    fn refuse_unusable(&self, scores: &SiteScores<'_>) -> Result<(), Error> {
        let [of_weights, of_activations] = &self.needs;
        let weights = self.weights.iter().zip(scores.weights.iter().flatten()).zip(of_weights);
        let weights = weights.map(|((site, scored), need)| ("weight", &site.name, need, reason(scored)));
        let activations = self.activations.iter().zip(scores.activations.iter().flatten()).zip(of_activations);
        let activations = activations.map(|((site, scored), need)| ("activation", &site.name, need, reason(scored)));
        let unusable = weights.chain(activations).filter_map(|(kind, site, need, reason)| {
            let (site, reason) = (site.clone(), reason?.clone());
            match need {
                Need::Method => Some(Error::Scores { kind, site, reason }),
                Need::Bits => Some(Error::ScoresForBits { kind, site, reason }),
                Need::Noise => None,
            }
        });
        unusable.into_iter().next().map_or(Ok(()), Err)
    }
}

/// What those sites that ask need scores for.
fn needs(settings: &[SiteSettings], asks: &[bool]) -> Vec<Need> {
    let need = |site: &SiteSettings| match site.error_method {
        ErrorMethod::Hmse => Need::Method,
        _ if site.free.is_some() => Need::Bits,
        _ => Need::Noise,
    };
    settings.iter().zip(asks).filter(|(_, asks)| **asks).map(|(site, _)| need(site)).collect()
}

/// From the smallest to the largest value of a site, outliers left out as where its threshold is chosen.
fn range(site: &[Activation], z_threshold: Option<f64>) -> Option<RangeInclusive<f32>> {
    if let Some(deviations) = z_threshold {
        let mut all = Histogram::new();
        site.iter().for_each(|anchor| all.merge(&anchor.histogram));
        let counted = all.without_outliers(deviations).observed().ok()??;
        return Some(counted.min()..=counted.max());
    }
    let observed = site.iter().filter_map(|anchor| anchor.observed().ok().flatten());
    let ranges = observed.map(|observed| (observed.min(), observed.max()));
    ranges.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).map(|(lo, hi)| lo..=hi)
}

fn those<'a, S>(sites: &'a [S], asks: &[bool]) -> Vec<&'a S> {
    sites.iter().zip(asks).filter(|(_, asks)| **asks).map(|(site, _)| site).collect()
}

/// For each of all sites its scores if it `asks`; `own` are the names of those that do, and `names` those of `scored`.
fn in_order<'a, T>(
    asks: &[bool],
    mut own: impl Iterator<Item = impl AsRef<str>>,
    names: &[String],
    scored: &'a [Scored<T>],
) -> Vec<Option<&'a Scored<T>>> {
    let by_name: HashMap<&str, &Scored<T>> = names.iter().map(String::as_str).zip(scored).collect();
    let mut next = || by_name.get(own.next()?.as_ref()).copied();
    asks.iter().map(|&asks| if asks { next() } else { None }).collect()
}

fn reason<T>(scored: &Scored<T>) -> Option<&Unusable> {
    scored.scores.as_ref().err()
}

fn missed_tolerance(report: &report::Hessian) -> Option<String> {
    let (tolerance, error) = (report.tolerance?, report.standard_error?);
    let probes = report.probes;
    (error > tolerance).then(|| {
        format!(
            "the Hessian scores of a layer still have a relative standard error of {error:.3} after {probes} probes"
        )
    })
}

/// A model that was traced for one batch size fails with another.
fn named(error: hessian::Error, plan: &HessianPlan, data: &Dataset) -> Error {
    let HessianPlan { request, .. } = plan;
    let key = if request.batch_size != data.batch_size() {
        "hessian.batch_size"
    } else if !request.samples.get().min(data.rows()).is_multiple_of(request.batch_size.get()) {
        // The last batch is smaller.
        "hessian.samples"
    } else {
        return error.into();
    };
    match error {
        hessian::Error::Jit(error @ jit::Error::Run { .. }) => {
            Error::Key { key: key.to_owned(), source: Box::new(error.into()) }
        }
        other => other.into(),
    }
}
