//! Hessian scores for the sites whose error method needs them: computed, or those that an earlier run kept.

use std::ops::RangeInclusive;
use std::path::Path;

use tch::Tensor;

use super::{Error, kept};
use crate::config::{HessianPlan, Plan};
use crate::dataset::Dataset;
use crate::hessian::{self, Layers, Scored, Scores, Unusable};
use crate::jit::{self, Clean};
use crate::report::{self, Hashes, Versions};
use crate::settings::{Settings, SiteSettings};
use crate::sites::{ActivationSite, Sites, WeightSite};
use crate::statistics::{Activation, ActivationScores};
use crate::threshold::{ErrorMethod, GRADIENT_SUMS_MAX_BITS};

/// Scores in the order of the sites; `None` where no error method asks for them.
#[derive(Default)]
pub(super) struct SiteScores {
    pub(super) weights: Vec<Option<Scored<Tensor>>>,
    pub(super) activations: Vec<Option<Scored<ActivationScores>>>,
    /// Rows that were used.
    pub(super) samples: usize,
    /// Whether MSE may stand in where they are of no use.
    pub(super) allow_fallback: bool,
}

/// The scores of a run, and what the report says of them.
#[derive(Default)]
pub(super) struct Scoring {
    pub(super) sites: SiteScores,
    pub(super) report: Option<report::Hessian>,
    pub(super) warnings: Vec<String>,
}

/// What scores are kept for and where.
pub(super) struct Keeping<'a> {
    pub(super) plan: &'a Plan,
    pub(super) hashes: &'a Hashes,
    pub(super) versions: &'a Versions,
    /// The device that computes.
    pub(super) device: &'a str,
    /// The run directory that is being filled.
    pub(super) dir: &'a Path,
}

/// The sites that need scores. A value that never ran on the calibration data stays float, whatever its method.
pub(super) struct Asking<'a> {
    weights: Vec<&'a WeightSite>,
    activations: Vec<&'a ActivationSite>,
    /// Of those the ranges of values.
    ranges: Vec<Option<RangeInclusive<f32>>>,
    /// Which of all sites these are.
    asks: [Vec<bool>; 2],
}

impl<'a> Asking<'a> {
    /// `statistics` are those of all activations, if they are known.
    pub(super) fn new(settings: &Settings, sites: &'a Sites, statistics: Option<&[Vec<Activation>]>) -> Self {
        let asks = |settings: &SiteSettings| settings.error_method == ErrorMethod::Hmse;
        let ran = |index: usize| {
            statistics.is_none_or(|all| all.get(index).is_some_and(|site| site.iter().any(|anchor| anchor.count() > 0)))
        };
        let of_weights: Vec<bool> = settings.weights.iter().map(asks).collect();
        let of_activations = settings.activations.iter().enumerate();
        let of_activations: Vec<bool> = of_activations.map(|(index, own)| asks(own) && ran(index)).collect();
        let range = |index: usize| {
            let own = settings.activations.get(index)?;
            statistics?
                .get(index)
                .filter(|_| own.scheme.bits.get() <= GRADIENT_SUMS_MAX_BITS)
                .and_then(|site| range(site))
        };
        let asking = of_activations.iter().enumerate().filter(|(_, asks)| **asks);
        Self {
            ranges: asking.map(|(index, _)| range(index)).collect(),
            weights: those(&sites.weights, &of_weights),
            activations: those(&sites.activations, &of_activations),
            asks: [of_weights, of_activations],
        }
    }

    /// Whether no site needs scores.
    pub(super) fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.activations.is_empty()
    }

    fn layers(&self) -> Layers<'_> {
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
        data: &Dataset,
        advance: impl FnMut(usize),
    ) -> Result<Scores, Error> {
        hessian::score(model, self.layers(), data, &plan.request, advance).map_err(|error| named(error, plan, data))
    }

    /// The scores of these sites: those that an earlier run kept, if it was of the same model, data and request.
    ///
    /// # Errors
    /// Where they cannot be computed or written, and where those of a layer are of no use, unless a fallback is allowed.
    pub(super) fn score(
        &self,
        plan: &HessianPlan,
        keeping: &Keeping<'_>,
        model: &Clean,
        data: &Dataset,
        mut advance: impl FnMut(usize),
    ) -> Result<Scoring, Error> {
        if self.is_empty() {
            // Overrides took the method away again, or left the sites float.
            return Ok(Scoring::default());
        }
        let mut warnings = Vec::new();
        let mut reused = false;
        let scores = if plan.save {
            let request = kept::request(keeping, plan, self.layers())?;
            let Keeping { plan: run, dir, .. } = *keeping;
            let path = run.output.dir.join(kept::FILE);
            let scores = match kept::read(&path, &request, self.layers()) {
                kept::Found::Scores(scores) => {
                    warnings
                        .push(format!("the Hessian scores are those that an earlier run kept in {}", path.display()));
                    reused = true;
                    advance(scores.samples);
                    scores
                }
                found => {
                    if let kept::Found::Useless(reason) = found {
                        warnings.push(format!("Hessian scores were computed anew: {reason}"));
                    }
                    self.compute(plan, model, data, &mut advance)?
                }
            };
            kept::write(&dir.join(kept::FILE), &request, self.layers(), &scores)?;
            scores
        } else {
            self.compute(plan, model, data, advance)?
        };
        if !plan.allow_fallback {
            self.refuse_unusable(&scores)?;
        }
        let report = report::Hessian { reused, ..describe(plan, &scores) };
        warnings.extend(missed_tolerance(&report));
        let [of_weights, of_activations] = &self.asks;
        let sites = SiteScores {
            weights: in_order(of_weights, scores.weights),
            activations: in_order(of_activations, scores.activations),
            samples: scores.samples,
            allow_fallback: plan.allow_fallback,
        };
        Ok(Scoring { sites, report: Some(report), warnings })
    }

    /// An error for the first site whose scores are of no use.
    fn refuse_unusable(&self, scores: &Scores) -> Result<(), Error> {
        let weights = self.weights.iter().zip(&scores.weights);
        let weights = weights.map(|(site, scored)| ("weight", &site.name, reason(scored)));
        let activations = self.activations.iter().zip(&scores.activations);
        let activations = activations.map(|(site, scored)| ("activation", &site.name, reason(scored)));
        let unusable = weights.chain(activations).find_map(|(kind, site, reason)| Some((kind, site, reason?)));
        match unusable {
            Some((kind, site, reason)) => Err(Error::Scores { kind, site: site.clone(), reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

/// From the smallest to the largest value of a site.
fn range(site: &[Activation]) -> Option<RangeInclusive<f32>> {
    let observed = site.iter().filter_map(|anchor| anchor.observed().ok().flatten());
    let ranges = observed.map(|observed| (observed.min(), observed.max()));
    ranges.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).map(|(lo, hi)| lo..=hi)
}

fn those<'a, S>(sites: &'a [S], asks: &[bool]) -> Vec<&'a S> {
    sites.iter().zip(asks).filter(|(_, asks)| **asks).map(|(site, _)| site).collect()
}

/// What was asked for, put where it was asked for.
fn in_order<T>(asks: &[bool], scored: Vec<Scored<T>>) -> Vec<Option<Scored<T>>> {
    let mut scored = scored.into_iter();
    asks.iter().map(|&asks| if asks { scored.next() } else { None }).collect()
}

fn reason<T>(scored: &Scored<T>) -> Option<&Unusable> {
    scored.scores.as_ref().err()
}

fn describe(plan: &HessianPlan, scores: &Scores) -> report::Hessian {
    let weights = scores.weights.iter().filter_map(|scored| scored.standard_error);
    let all = weights.chain(scores.activations.iter().filter_map(|scored| scored.standard_error));
    report::Hessian {
        samples: scores.samples,
        probes: scores.probes,
        batch_size: plan.request.batch_size.get(),
        distribution: plan.request.distribution,
        seed: plan.request.seed,
        tolerance: plan.request.tolerance,
        standard_error: all.reduce(f64::max),
        left_out: scores.left_out.clone(),
        reused: false,
    }
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
