//! Rounding and bias correction of a model whose thresholds are chosen: which rows it runs on, and what the report says.

use std::num::NonZeroUsize;

use super::base::Base;
use super::chosen::Chosen;
use super::device::Batches;
use super::{Error, Progress, Work};
use crate::config::{BiasCorrection, HessianRequest, Plan, Rounding};
use crate::correct::{
    self, Asked, Corrections, LeftOut, Looks, MOST_HESSIAN_BYTES, Network, Refined, Steps, Targets, Weight,
};
use crate::feed;
use crate::hessian;
use crate::jit::{self, Arguments};
use crate::report::{self, Kind};
use crate::settings::Settings;
use crate::sites::{LeftFloat, Sites, WeightSite};
use crate::threshold::{self, Channels, Cost};

/// What is asked of weights and biases.
pub(super) fn asked(plan: &Plan) -> Asked {
    Asked { rounding: plan.weights.rounding, correction: plan.weights.bias_correction }
}

/// The ops that are looked at one after the other, and those that cannot be.
///
/// # Errors
/// Where the Hessian of a layer would be too large, and that is not allowed.
pub(super) fn steps(base: &Base, plan: &Plan, (sites, settings): (&Sites, &Settings)) -> Result<Steps, Error> {
    let is_weighted = plan.weights.bias_correction == BiasCorrection::Weighted;
    if is_weighted
        && plan.hessian.as_ref().is_some_and(|hessian| hessian.request.samples.get().min(base.calibration.rows) < 2)
    {
        return Err(Error::OneRow);
    }
    let targets = Targets::find(base.model.listing(), sites);
    let mut steps = Steps::find(base.model.listing(), sites, &targets, asked(plan));
    let is_bounded = |weight: usize| settings.weights.get(weight).is_some_and(|own| own.taps_in_pairs().is_some());
    steps.keep_nearest(is_bounded, "its levels are bounded for the 16-bit sums of the engine");
    if let Some((left, bytes)) = steps.too_large.first().filter(|_| !plan.weights.rounding_fallback) {
        return Err(Error::LargeHessian { layer: left.layer.clone(), bytes: *bytes, most: MOST_HESSIAN_BYTES });
    }
    let too_large = std::mem::take(&mut steps.too_large);
    steps.not_rounded.extend(too_large.into_iter().map(|(left, _)| left));
    Ok(steps)
}

/// Rounds and corrects as planned; `known` are the biases that closed-form correction gives the weights as they are.
///
/// # Errors
/// Where the data cannot be read or the model fails.
pub(super) fn refine(
    base: &Base,
    plan: &Plan,
    (chosen, settings): (&mut Chosen, &Settings),
    known: Corrections,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    // Planned wherever something is done op by op.
    let Some(hessian) = &plan.hessian else { return Ok(()) };
    let steps = steps(base, plan, (&chosen.sites, settings))?;
    let request = &in_two(&hessian.request, base.calibration.rows);
    let looks = Looks::new(&steps, request.seed);
    // All batches are in memory together.
    let blame = || Batches { key: "hessian.samples", rows: request.samples }.blame();
    let data = base.calibration.data()?;
    let squares = if plan.weights.bias_correction == BiasCorrection::Weighted {
        progress.stage("gradients", Work::Rows(request.samples.get().min(base.calibration.rows)));
        let look = |batch, op, value: &_| looks.look(batch, op, value);
        let squares =
            hessian::squares(&base.model, &looks.results, (data, request), &look, |rows| progress.advance(rows));
        squares.map_err(Error::from).map_err(blame())?
    } else {
        Vec::new()
    };
    let batches: Vec<Arguments> = batches(base, request)?;
    progress.stage("correct", Work::Sites(steps.count()));
    let weights = chosen.selections.take_weights(settings);
    let network =
        Network { model: &base.model, sites: &chosen.sites, activations: &chosen.selections.activations, weights };
    let given = (&steps, asked(plan));
    let refined = correct::refine(network, given, (&batches, &squares, &looks), known, |count| progress.advance(count));
    take(base, chosen, refined.map_err(Error::from).map_err(blame())?, plan.weights.rounding)
}

/// In two batches at least, as one cannot confirm what it asks for itself.
fn in_two(request: &HessianRequest, rows: usize) -> HessianRequest {
    let half = NonZeroUsize::new(request.samples.get().min(rows).div_ceil(2));
    HessianRequest {
        batch_size: half.map_or(request.batch_size, |half| request.batch_size.min(half)),
        ..request.clone()
    }
}

/// The rows that Hessian scores are computed on, batch by batch.
fn batches(base: &Base, request: &HessianRequest) -> Result<Vec<Arguments>, Error> {
    let data = base.calibration.data()?;
    let batches = data.sample(request.samples, request.seed, request.batch_size);
    batches.map(|batch| Ok(feed::bind(base.model.module(), batch?)?)).collect()
}

/// Puts what came out where it belongs.
fn take(base: &Base, chosen: &mut Chosen, refined: Refined, rounding: Rounding) -> Result<(), Error> {
    let Refined { weights, rounded, not_rounded, corrections } = refined;
    for site in rounded {
        let own = weights.get(site.weight).zip(chosen.sites.weights.get(site.weight));
        let Some((weight, weight_site)) = own else { continue };
        let reports = &mut chosen.selections.reports;
        let report = reports.iter_mut().find(|own| own.kind == Kind::Weight && own.name == weight_site.name);
        if let Some(report) = report {
            report.rounding = Some(report::RoundedWeight {
                method: rounding,
                error_nearest: site.errors[0],
                error: site.errors[1],
                kept_nearest: site.kept,
            });
            report.quantizers.rescale(&weight.params, &cost(base, weight_site, weight)?);
        }
    }
    chosen.selections.weights = weights.into_iter().map(|weight| weight.tensor).collect();
    chosen.corrections = corrections;
    let left = |left: LeftOut| LeftFloat { name: left.layer, op: left.op, reason: left.reason };
    chosen.not_rounded = not_rounded.into_iter().map(left).collect();
    Ok(())
}

/// What the images of a weight cost now.
fn cost(base: &Base, site: &WeightSite, weight: &Weight) -> Result<Cost, Error> {
    let float = base.model.constant(site.values.first().copied().unwrap_or_default())?.f_contiguous()?;
    let images = weight.tensor.f_contiguous()?;
    let axis = (weight.params.len() > 1).then_some(site.channel_axis);
    let shape: Vec<usize> = site.shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    let cost = |float: &[f32], images: &[f32]| {
        threshold::cost_of_images(&Channels::new(float, &shape, axis)?, images, &weight.params)
    };
    let cost = jit::with_values(&float, |float| jit::with_values(&images, |images| cost(float, images)))??;
    cost.map_err(|source| Error::Channels { site: site.name.clone(), source })
}
