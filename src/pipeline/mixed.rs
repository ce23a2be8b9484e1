//! Bits of mixed precision: what each site costs at each of its widths, and what the budgets buy. It refuses to know how budgets
//! are spent best, which is `budget`'s business, and how noise follows from scores.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tch::Tensor;

use super::base::Base;
use super::score::{ScoresTold, SiteScores};
use super::select::{self, Method};
use super::{Error, Progress, Work};
use crate::budget::{self, Site, TooLittle, Width};
use crate::config::{BudgetPlan, Limit, MixedPlan};
use crate::hessian::{Scored, Unusable};
use crate::jit::{self, Clean};
use crate::quantizer::Bits;
use crate::report::{Allotted, Budget, Kind, MixedPrecision, Noise, Share, SiteNoise, Uniform, WidthNoise};
use crate::settings::{Settings, SiteSettings};
use crate::sites::{Sites, WeightSite};
use crate::statistics::{Activation, ActivationScores, Histogram};
use crate::threshold;

/// What averages may exceed their budget by, as they are products of numbers that are no powers of two.
const ROUNDING: f64 = 1e-12;

/// Noise that a better choice might save, beyond which that is told.
const TOLD: f64 = 1e-6;

/// The settings with all bits chosen; what was chosen goes into what the report says.
///
/// # Errors
/// Where no choice is within a budget, or a threshold cannot be chosen.
pub(super) fn settle(
    base: &Base,
    (sites, mut settings): (&Sites, Settings),
    (statistics, scores): (&[Vec<Activation>], &SiteScores<'_>),
    told: &mut ScoresTold,
    progress: &mut dyn Progress,
) -> Result<Settings, Error> {
    let Some(plan) = settings.mixed.clone() else { return Ok(settings) };
    progress.stage("bits", Work::Sites(sites.weights.len() + sites.activations.len()));
    let progress = Mutex::new(progress);
    let done = || progress.lock().unwrap_or_else(PoisonError::into_inner).advance(1);
    let weights = of_weights(&base.model, (sites, &settings.weights), scores, done)?;
    let activations = of_activations((sites, &settings.activations), statistics, &scores.activations, done)?;
    told.warnings.extend(weights.iter().chain(&activations).filter_map(Noisy::note));
    let weights = Half { kind: Kind::Weight, plan: plan.weights, sites: weights, rows: 1 }.spend(told)?;
    let half = Half { kind: Kind::Activation, plan: plan.activations, sites: activations, rows: base.calibration.rows };
    let activations = half.spend(told)?;
    for (settings, half) in [(&mut settings.weights, &weights), (&mut settings.activations, &activations)] {
        for (own, bits) in settings.iter_mut().zip(&half.bits) {
            *own = own.with_bits(*bits);
        }
    }
    let uniform = weights.uniform.zip(activations.uniform).map(|(weights, activations)| weights + activations);
    let noise = Noise {
        weights: weights.noise,
        activations: activations.noise,
        predicted: weights.noise + activations.noise,
        uniform,
        measured: None,
        unknown_sites: weights.unknown + activations.unknown,
    };
    told.mixed = Some(MixedPrecision {
        weights: weights.allotted,
        activations: activations.allotted,
        noise,
        sites: [weights.sites, activations.sites].concat(),
    });
    Ok(settings)
}

/// Sees before anything runs whether the budgets can be met, as far as that is known then.
///
/// # Errors
/// Where no choice is within a budget.
pub(super) fn check(sites: &Sites, settings: &Settings) -> Result<(), Error> {
    let Some(MixedPlan { weights, activations }) = &settings.mixed else { return Ok(()) };
    let narrowest = |settings: &SiteSettings, elements: u64| Site {
        elements,
        widths: vec![Width { bits: settings.narrowest(), noise: 0.0 }],
    };
    if let Some(budget) = weights {
        let all = sites.weights.iter().zip(&settings.weights);
        let all: Vec<Site> = all.map(|(site, settings)| narrowest(settings, elements(site))).collect();
        let too_little = |too_little| unmet(Kind::Weight, budget, too_little, total(&all));
        budget::allot(&all, bits_of(budget, total(&all))).map_err(too_little)?;
    }
    // How much of activations each site is, calibration tells.
    if let (Some(budget), Some(narrow)) = (activations, settings.activations.iter().map(SiteSettings::narrowest).min())
    {
        let least = [Site { elements: 1, widths: vec![Width { bits: narrow, noise: 0.0 }] }];
        budget::allot(&least, bits_of(budget, 1)).map_err(|_| {
            let (budget_bits, least) = (bits_of(budget, 1), narrow.get().into());
            unmet(Kind::Activation, budget, TooLittle { least, budget: budget_bits }, 1)
        })?;
    }
    Ok(())
}

/// A site and what quantizing it costs.
struct Noisy {
    name: String,
    /// Of a weight, or of all rows of an activation; 0 of one that never ran, which stays float.
    elements: u64,
    /// Whether its bits are to be chosen.
    is_free: bool,
    /// Ascending.
    widths: Vec<WidthNoise>,
    /// Why no noise is known.
    reason: Option<Unusable>,
}

impl Noisy {
    /// What can be chosen. Where no noise is known, nothing but the widest is safe.
    fn site(&self) -> Site {
        let known: Vec<Width> =
            self.widths.iter().filter_map(|own| Some(Width { bits: own.bits, noise: own.noise? })).collect();
        let widest = self.widths.last().map(|own| Width { bits: own.bits, noise: 0.0 });
        let widths = if known.is_empty() { widest.into_iter().collect() } else { known };
        Site { elements: self.elements, widths }
    }

    fn is_unknown(&self) -> bool {
        self.elements > 0 && self.widths.iter().all(|own| own.noise.is_none())
    }

    fn note(&self) -> Option<String> {
        let reason = self.reason.as_ref().filter(|_| self.is_free && self.elements > 0)?;
        let bits = self.widths.last()?.bits;
        Some(format!("{}: {bits} bits, the widest, as no noise is known: {reason}", self.name))
    }
}

fn of_weights(
    model: &Clean,
    (sites, settings): (&Sites, &[SiteSettings]),
    scores: &SiteScores<'_>,
    done: impl Fn(),
) -> Result<Vec<Noisy>, Error> {
    let noisy = |(index, (site, settings)): (usize, (&WeightSite, &SiteSettings))| {
        let scored = select::scored(&scores.weights, index);
        let noise = |bits| {
            let scored = scored.filter(|scored| scored.scores.is_ok());
            let noise = scored.map(|scored| weight_noise(model, site, &settings.with_bits(bits), scored)).transpose();
            Ok(WidthNoise { bits, noise: finite(Kind::Weight, &site.name, noise?.flatten())? })
        };
        let widths = settings.widths().map(noise).collect::<Result<_, Error>>()?;
        done();
        let reason = scored.and_then(|scored| scored.scores.as_ref().err().cloned());
        let (name, is_free) = (site.name.clone(), settings.free.is_some());
        Ok(Noisy { name, elements: elements(site), is_free, widths, reason })
    };
    sites.weights.iter().zip(settings).enumerate().map(noisy).collect()
}

fn weight_noise(
    model: &Clean,
    site: &WeightSite,
    settings: &SiteSettings,
    scored: &Scored<Tensor>,
) -> Result<Option<f64>, Error> {
    let Ok(scores) = &scored.scores else { return Ok(None) };
    let method = Method::new(settings.error_method, Some(scored));
    let noise = jit::with_values(&scores.f_contiguous()?, |scores| {
        select::selected_weight(settings, &method, (model, site), |channels, selection| {
            threshold::noise_of_weights(channels, scores, &selection.params)
        })
    })??;
    Ok(Some(noise * scored.unit * scored.unit))
}

fn of_activations(
    (sites, settings): (&Sites, &[SiteSettings]),
    statistics: &[Vec<Activation>],
    scores: &[Option<&Scored<ActivationScores>>],
    done: impl Fn() + Sync,
) -> Result<Vec<Noisy>, Error> {
    let noisy = |index: usize| {
        let (site, settings, observed) =
            (sites.activations.get(index)?, settings.get(index)?, statistics.get(index)?.as_slice());
        let mut histogram = Histogram::new();
        observed.iter().for_each(|anchor| histogram.merge(&anchor.histogram));
        let scored = select::scored(scores, index).filter(|_| histogram.count() > 0);
        let noise = |bits| {
            let scored = scored.filter(|scored| scored.scores.is_ok());
            let noise = scored.map(|scored| activation_noise(&histogram, &settings.with_bits(bits), scored));
            let noise = noise.transpose().map_err(|source| Error::Select {
                kind: "activation",
                site: site.name.clone(),
                source,
            });
            Ok(WidthNoise { bits, noise: finite(Kind::Activation, &site.name, noise?.flatten())? })
        };
        let widths = settings.widths().map(noise).collect::<Result<_, Error>>();
        done();
        let reason = scored.and_then(|scored| scored.scores.as_ref().err().cloned());
        let (name, elements, is_free) = (site.name.clone(), histogram.count(), settings.free.is_some());
        Some(widths.map(|widths| Noisy { name, elements, is_free, widths, reason }))
    };
    // All results first: the error that is told must not depend on which thread comes first.
    let results: Vec<Option<Result<Noisy, Error>>> = (0..settings.len()).into_par_iter().map(noisy).collect();
    results.into_iter().flatten().collect()
}

fn activation_noise(
    histogram: &Histogram,
    settings: &SiteSettings,
    scored: &Scored<ActivationScores>,
) -> Result<Option<f64>, threshold::SelectError> {
    let Ok(scores) = &scored.scores else { return Ok(None) };
    let method = Method::new(settings.error_method, Some(scored));
    let selection = select::activation(settings, &method, histogram)?;
    let noise = |params| threshold::noise_of_activation(histogram, scores, settings.scheme.bits, params);
    Ok(selection.params.first().map(noise))
}

/// Scores near the largest f64 may have a sum beyond it.
fn finite(kind: Kind, site: &str, noise: Option<f64>) -> Result<Option<f64>, Error> {
    match noise {
        Some(noise) if !noise.is_finite() => Err(Error::ScoresForBits {
            kind: if kind == Kind::Weight { "weight" } else { "activation" },
            site: site.to_owned(),
            reason: Unusable::NotFinite,
        }),
        known => Ok(known),
    }
}

/// Weights or activations.
struct Half {
    kind: Kind,
    plan: Option<BudgetPlan>,
    sites: Vec<Noisy>,
    /// That elements are counted over.
    rows: usize,
}

/// What was chosen for them.
struct Spent {
    /// Of all sites.
    bits: Vec<Bits>,
    /// What was asked for, if there was a budget.
    allotted: Option<Allotted>,
    /// Predicted of all.
    noise: f64,
    /// Predicted with the best uniform width; the same where there is no budget.
    uniform: Option<f64>,
    unknown: usize,
    /// Of those that ran.
    sites: Vec<SiteNoise>,
}

impl Half {
    fn spend(self, told: &mut ScoresTold) -> Result<Spent, Error> {
        let all: Vec<Site> = self.sites.iter().map(Noisy::site).collect();
        let elements = total(&all);
        let limit = self.plan.as_ref().map_or(u64::MAX, |plan| bits_of(plan, elements));
        let spent = budget::allot(&all, limit).map_err(|too_little| match &self.plan {
            Some(plan) => unmet(self.kind, plan, too_little, elements),
            None => Error::Budget(too_little.to_string()),
        })?;
        let might_save = 1.0 - spent.least_noise / spent.noise;
        if might_save > TOLD {
            told.warnings.push(format!(
                "mixed precision of {}: so many choices are nearly equal that not all were looked at; the noise might be lower, \
                 by at most {:.2}%",
                self.noun(),
                might_save * 100.0
            ));
        }
        let uniform = budget::uniform(&all, limit);
        let allotted = self.plan.filter(|_| elements > 0).map(|plan| Allotted {
            budget: match plan.limit {
                Limit::Average(average) => Budget::Average(average),
                Limit::Memory(bytes) => Budget::MemoryBytes(bytes),
            },
            elements: elements as f64 / self.rows.max(1) as f64,
            used_average: spent.used as f64 / elements as f64,
            used_memory_bytes: (self.kind == Kind::Weight).then(|| spent.used.div_ceil(8)),
            widths: shares(&all, &spent.bits),
            uniform: uniform.map(|best| Uniform { bits: best.bits, noise: best.noise }),
        });
        let unknown = self.sites.iter().filter(|site| site.is_unknown()).count();
        let (noise, own) = (spent.noise, self.plan.is_none().then_some(spent.noise));
        let uniform = own.or(uniform.map(|best| best.noise)).or((elements == 0).then_some(0.0));
        Ok(Spent { allotted, noise, uniform, unknown, sites: self.told(&spent.bits), bits: spent.bits })
    }

    fn told(&self, bits: &[Bits]) -> Vec<SiteNoise> {
        let ran = self.sites.iter().zip(bits).filter(|(site, _)| site.elements > 0);
        let site = |(site, bits): (&Noisy, &Bits)| SiteNoise {
            name: site.name.clone(),
            kind: self.kind,
            elements: site.elements as f64 / self.rows.max(1) as f64,
            bits: *bits,
            widths: site.widths.clone(),
        };
        ran.map(site).collect()
    }

    fn noun(&self) -> &'static str {
        noun(self.kind)
    }
}

fn noun(kind: Kind) -> &'static str {
    match kind {
        Kind::Weight => "weights",
        Kind::Activation => "activations",
    }
}

/// How much has which width.
fn shares(sites: &[Site], bits: &[Bits]) -> Vec<Share> {
    let mut widths = bits.to_vec();
    widths.sort_unstable();
    widths.dedup();
    let elements = total(sites).max(1) as f64;
    let share = |width: Bits| {
        let own = || sites.iter().zip(bits).filter(|(site, bits)| **bits == width && site.elements > 0);
        let sum: u64 = own().map(|(site, _)| site.elements).sum();
        Share { bits: width, sites: own().count(), share: sum as f64 / elements }
    };
    widths.into_iter().map(share).filter(|share| share.sites > 0).collect()
}

fn elements(site: &WeightSite) -> u64 {
    site.shape.iter().map(|size| size.unsigned_abs()).product()
}

fn total(sites: &[Site]) -> u64 {
    sites.iter().map(|site| site.elements).sum()
}

/// What a budget is in bits.
fn bits_of(plan: &BudgetPlan, elements: u64) -> u64 {
    match plan.limit {
        // Far below 2^64: a cast of a larger one saturates.
        Limit::Average(average) => (average * elements as f64 * (1.0 + ROUNDING)) as u64,
        Limit::Memory(bytes) => bytes.saturating_mul(8),
    }
}

fn unmet(kind: Kind, plan: &BudgetPlan, too_little: TooLittle, elements: u64) -> Error {
    let (limit, least, found) = match plan.limit {
        Limit::Average(average) => {
            let least = too_little.least as f64 / elements.max(1) as f64;
            // Rounded up, so that it can be typed.
            ("average", format!("{} bits", (least * 1e4 * (1.0 - ROUNDING)).ceil() / 1e4), average.to_string())
        }
        Limit::Memory(bytes) => ("memory", format!("{}B", too_little.least.div_ceil(8)), format!("{bytes}B")),
    };
    let reason = format!(
        "expected at least {least}, which the narrowest of `bits` and what `overrides` say need, found {found}"
    );
    let key = format!("mixed_precision.{}.{limit}", noun(kind));
    Error::Key { key, source: Box::new(Error::Budget(reason)) }
}
