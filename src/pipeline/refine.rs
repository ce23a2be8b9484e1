//! Rounding and bias correction of a model whose thresholds are chosen: which rows it runs on, and what the report says.

use std::borrow::Borrow;

use tch::Tensor;

use super::base::Base;
use super::blame;
use super::chosen::Chosen;
use super::device::Batches;
use super::simulation::Simulation;
use super::{Error, Progress, Work};
use crate::config::{BiasCorrection, HessianPlan, HessianRequest, Plan, Rounding};
use crate::correct::{
    self, Asked, Corrections, LeftOut, Looks, MOST_HESSIAN_BYTES, Network, Refined, Steps, Targets, Weight,
};
use crate::dataset::{self, Batch};
use crate::evaluate::{self, Evaluation};
use crate::feed;
use crate::hessian;
use crate::jit::{self, Arguments, NoVisit, Output};
use crate::quantizer::QuantParams;
use crate::report::{self, Comparison, Kind};
use crate::settings::Settings;
use crate::sites::{LeftFloat, Sites, WeightSite};
use crate::threshold::{self, Channels, Cost};

/// Why what was rounded and corrected op by op was given up, and how biases are corrected instead.
#[derive(Debug)]
pub(super) struct GivenUp {
    pub(super) reason: String,
    pub(super) correction: BiasCorrection,
}

/// What is asked of weights and biases.
pub(super) fn asked(plan: &Plan) -> Asked {
    Asked { rounding: plan.weights.rounding, correction: plan.weights.bias_correction }
}

/// The ops that are looked at one after the other, and those that cannot be.
///
/// # Errors
/// Where the Hessian of a layer would be too large, and that is not allowed.
pub(super) fn steps(base: &Base, plan: &Plan, (sites, settings): (&Sites, &Settings)) -> Result<Steps, Error> {
    if let Some(HessianPlan { request, .. }) = &plan.hessian {
        let rows = request.samples.get().min(base.calibration.rows);
        let is_weighted = plan.weights.bias_correction == BiasCorrection::Weighted;
        if is_weighted && rows <= request.batch_size.get() {
            return Err(Error::OneBatch { rows, batch_size: request.batch_size.get() });
        }
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
    let looks = Looks::new(&steps, hessian.request.seed);
    // All batches are in memory together.
    let blame = || Batches { key: "hessian.samples", rows: hessian.request.samples }.blame();
    let data = base.calibration.data()?;
    let request = &hessian.request;
    let squares = if plan.weights.bias_correction == BiasCorrection::Weighted {
        progress.stage("gradients", Work::Rows(request.samples.get().min(base.calibration.rows)));
        let look = |batch, op, value: &_| looks.look(batch, op, value);
        let squares =
            hessian::squares(&base.model, &looks.results, (data, request), &look, |rows| progress.advance(rows));
        squares.map_err(Error::from).map_err(blame())?
    } else {
        Vec::new()
    };
    let batches: Vec<Arguments> = batches(base, hessian)?;
    progress.stage("correct", Work::Sites(steps.count()));
    let weights = chosen.selections.take_weights(settings);
    let nearest: Vec<Tensor> = weights.iter().map(|weight| weight.tensor.shallow_clone()).collect();
    let mut instead = vec![(BiasCorrection::None, Corrections::default())];
    if asked(plan).correction != BiasCorrection::None {
        instead.insert(0, (BiasCorrection::ClosedForm, known.shallow_clone()));
    }
    let network =
        Network { model: &base.model, sites: &chosen.sites, activations: &chosen.selections.activations, weights };
    let given = (&steps, asked(plan));
    let refined = correct::refine(network, given, (&batches, &squares, &looks), known, |count| progress.advance(count));
    let mut refined = refined.map_err(Error::from).map_err(blame())?;
    drop(squares);
    let sites = (&chosen.sites, chosen.selections.activations.as_slice());
    let fitted = std::mem::take(&mut refined.outputs);
    let (outputs, batches, rows) = match other_batches(request, data.rows()) {
        None => (fitted, batches, format!("the {} rows that it was fitted to", request.samples.get().min(data.rows()))),
        Some(count) => {
            let others = data.others(request.samples, request.seed, request.batch_size).take(count);
            let others: Vec<Arguments> = bound(base, others)?;
            let outputs = both_outputs(base, sites, &refined, &others).map_err(blame())?;
            (outputs, others, format!("{} other calibration rows", count * request.batch_size.get()))
        }
    };
    let float: Vec<&Output> = outputs.iter().map(|[float, _]| float).collect();
    let found = nearness(&float, outputs.iter().map(|[_, found]| Ok(found)))?;
    // What there would be without any of it, the nearest if it is nearer.
    let mut best = (None, found);
    for (correction, corrections) in instead {
        let simulation = Simulation::of(&base.model, sites, &nearest, &corrections)?;
        let outputs = batches.iter().map(|arguments| simulation.run(arguments)?.on_cpu());
        let other = nearness(&float, outputs).map_err(blame())?;
        if is_farther(best.1.as_ref(), other.as_ref()) {
            best = (Some((correction, corrections)), other);
        }
    }
    let (Some((correction, corrections)), known) = best else {
        return take(base, chosen, refined, plan.weights.rounding);
    };
    let instead = match correction {
        BiasCorrection::None => "weights rounded to nearest and no bias correction",
        _ => "closed_form and nearest",
    };
    let reason = format!(
        "what was rounded and corrected op by op was given up, as outputs of {rows} are nearer \
         to float without it (SQNR with it: {}; with {instead}: {})",
        words(found.as_ref()),
        words(known.as_ref())
    );
    chosen.not_rounded =
        left_float(steps.all_nearest("outputs are nearer to float with all weights rounded to nearest"));
    chosen.selections.weights = nearest;
    chosen.corrections = corrections;
    chosen.given_up = Some(GivenUp { reason, correction });
    Ok(())
}

/// Batches of calibration rows that nothing was fitted to, if there are at least half as many as of the others: they tell what is nearer.
/// All are whole, as a model that was traced for one batch size takes no other.
pub(super) fn other_batches(request: &HessianRequest, rows: usize) -> Option<usize> {
    let (samples, batch_size) = (request.samples.get().min(rows), request.batch_size.get());
    let others = (rows - samples).min(samples) / batch_size;
    (2 * others >= samples.div_ceil(batch_size)).then_some(others)
}

/// What the float model and the refined one give.
fn both_outputs(
    base: &Base,
    sites: (&Sites, &[Option<QuantParams>]),
    refined: &Refined,
    batches: &[Arguments],
) -> Result<Vec<[Output; 2]>, Error> {
    let weights: Vec<Tensor> = refined.weights.iter().map(|weight| weight.tensor.shallow_clone()).collect();
    let simulation = Simulation::of(&base.model, sites, &weights, &refined.corrections)?;
    let float = base.model.instrument(&[], &[])?;
    let both = |arguments| Ok([float.run(arguments, &mut NoVisit)?.on_cpu()?, simulation.run(arguments)?.on_cpu()?]);
    batches.iter().map(both).collect()
}

/// How near outputs come to those of the float model, batch by batch; `None` where they cannot be compared.
fn nearness(
    float: &[&Output],
    found: impl Iterator<Item = Result<impl Borrow<Output>, jit::Error>>,
) -> Result<Option<Comparison>, Error> {
    let mut sums = Evaluation::default();
    for (float, found) in float.iter().zip(found) {
        match sums.add(1, float, found?.borrow(), None) {
            // Nothing is farther than that.
            Err(evaluate::Error::Broken { .. } | evaluate::Error::Mismatch { .. }) => return Ok(None),
            added => added.map_err(blame::measured)?,
        }
    }
    Ok(Some(sums.finish().1))
}

/// Where neither can be compared, the evaluation tells.
fn is_farther(found: Option<&Comparison>, known: Option<&Comparison>) -> bool {
    let error = |of: &Comparison| of.squared_error.unwrap_or(f64::INFINITY);
    known.is_some_and(|known| found.is_none_or(|found| error(found) > error(known)))
}

fn words(comparison: Option<&Comparison>) -> String {
    let none = || "none, as outputs are not finite or of another shape".to_owned();
    comparison.map_or_else(none, |comparison| comparison.sqnr().to_string())
}

fn left_float(left_out: Vec<LeftOut>) -> Vec<LeftFloat> {
    let left = |left: LeftOut| LeftFloat { name: left.layer, op: left.op, reason: left.reason };
    left_out.into_iter().map(left).collect()
}

/// The rows that Hessian scores are computed on, batch by batch.
fn batches(base: &Base, hessian: &HessianPlan) -> Result<Vec<Arguments>, Error> {
    let request = &hessian.request;
    bound(base, base.calibration.data()?.sample(request.samples, request.seed, request.batch_size))
}

fn bound(base: &Base, batches: impl Iterator<Item = Result<Batch, dataset::Error>>) -> Result<Vec<Arguments>, Error> {
    batches.map(|batch| Ok(feed::bind(base.model.module(), batch?)?)).collect()
}

/// Puts what came out where it belongs.
fn take(base: &Base, chosen: &mut Chosen, refined: Refined, rounding: Rounding) -> Result<(), Error> {
    let Refined { weights, rounded, not_rounded, corrections, .. } = refined;
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
    chosen.not_rounded = left_float(not_rounded);
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

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn other_rows_tell_where_there_are_half_as_many() {
        let count = |count| NonZeroUsize::new(count).unwrap();
        let request = HessianRequest { samples: count(64), batch_size: count(8), ..HessianPlan::with_seed(0).request };
        let found = [48, 64, 95, 96, 100, 128, 1000].map(|rows| other_batches(&request, rows));
        assert_eq!(found, [None, None, None, Some(4), Some(4), Some(8), Some(8)]);
    }

    #[test]
    fn what_cannot_be_compared_is_farthest() {
        let of = |error: f64| {
            let output = |value: f64| Output::Tensor(Tensor::from_slice(&[value, value]).reshape([1, 2]));
            let mut sums = Evaluation::default();
            sums.add(1, &output(1.0), &output(1.0 + error), None).unwrap();
            sums.finish().1
        };
        let (near, far) = (of(0.1), of(0.2));
        assert!(is_farther(Some(&far), Some(&near)) && !is_farther(Some(&near), Some(&far)));
        assert!(is_farther(None, Some(&far)) && !is_farther(Some(&far), None) && !is_farther(None, None));
        assert!(!is_farther(Some(&near), Some(&near)));
        assert_eq!(words(Some(&of(0.1))), "20.00 dB");
        assert_eq!(words(Some(&of(0.0))), "equal outputs");
    }
}
