//! Thresholds for all sites, and quantized weights: tensors in, plain numbers to `threshold`, tensors out.

use tch::Tensor;

use super::Error;
use crate::config::Plan;
use crate::jit::{self, Clean};
use crate::quantizer::{Granularity, QuantParams};
use crate::report::{Kind, SiteReport};
use crate::sites::{ActivationSite, LeftFloat, Sites, WeightSite};
use crate::statistics::MinMax;
use crate::threshold::{self, Channels, Selection};

/// Reason of a site without statistics.
pub(super) const NEVER_RAN: &str = "never ran on the calibration data";

/// What was chosen for each site.
pub(super) struct Selections {
    /// In the order of `sites.activations`; `None` stays float.
    pub(super) activations: Vec<Option<QuantParams>>,
    /// Quantized weights in the order of `sites.weights`.
    pub(super) weights: Vec<Tensor>,
    /// Weights, then activations.
    pub(super) reports: Vec<SiteReport>,
}

/// Chooses all thresholds; sites that never ran join what is left float.
pub(super) fn select(
    plan: &Plan,
    model: &Clean,
    sites: &mut Sites,
    statistics: &[Vec<MinMax>],
) -> Result<Selections, Error> {
    let mut selections = Selections { activations: Vec::new(), weights: Vec::new(), reports: Vec::new() };
    for site in &sites.weights {
        let (tensor, selection) = weight(plan, model, site)?;
        selections.weights.push(tensor);
        selections.reports.push(weight_report(plan, site, &selection));
    }
    for (site, observed) in sites.activations.iter_mut().zip(statistics) {
        let observed = drop_unseen(site, observed, &mut sites.left_float);
        if site.anchors.is_empty() {
            selections.activations.push(None);
            continue;
        }
        let selection = threshold::select_activation(&observed, plan.activations.scheme, plan.activations.error_method)
            .map_err(|source| Error::Select { kind: "activation", site: site.name.clone(), source })?;
        selections.activations.push(selection.params.first().copied());
        selections.reports.push(activation_report(plan, site, &selection));
    }
    Ok(selections)
}

/// Takes the values that never were there out of a site, and merges the statistics of the others.
fn drop_unseen(site: &mut ActivationSite, observed: &[MinMax], left_float: &mut Vec<LeftFloat>) -> MinMax {
    let mut merged = MinMax::new();
    let mut anchors = Vec::new();
    for (anchor, observed) in std::mem::take(&mut site.anchors).into_iter().zip(observed) {
        if observed.count() > 0 {
            merged.merge(observed);
            anchors.push(anchor);
        } else {
            left_float.push(LeftFloat { name: anchor.name, op: site.op.clone(), reason: NEVER_RAN.to_owned() });
        }
    }
    site.anchors = anchors;
    merged
}

fn weight(plan: &Plan, model: &Clean, site: &WeightSite) -> Result<(Tensor, Selection), Error> {
    let failed = |source| Error::Select { kind: "weight", site: site.name.clone(), source };
    let value = site.values.first().copied().unwrap_or_default();
    let tensor = model.constant(value)?.f_contiguous()?;
    let shape: Vec<usize> = site.shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    let axis = match plan.weights.granularity {
        Granularity::PerChannel => Some(site.channel_axis),
        Granularity::PerTensor => None,
    };
    let misfit = |source| Error::Channels { site: site.name.clone(), source };
    let quantize = |values: &[f32]| -> Result<(Vec<f32>, Selection), Error> {
        let channels = Channels::new(values, &shape, axis).map_err(misfit)?;
        let selection =
            threshold::select_weights(&channels, plan.weights.scheme, plan.weights.error_method).map_err(failed)?;
        Ok((threshold::quantize_weights(&channels, &selection.params).map_err(misfit)?, selection))
    };
    let (quantized, selection) = jit::with_values(&tensor, quantize)??;
    Ok((Tensor::f_from_slice(&quantized)?.f_reshape(&site.shape)?, selection))
}

fn weight_report(plan: &Plan, site: &WeightSite, selection: &Selection) -> SiteReport {
    SiteReport {
        name: site.name.clone(),
        kind: Kind::Weight,
        layer: site.layer.clone(),
        op: site.op.clone(),
        bits: plan.weights.scheme.bits,
        grid: plan.weights.scheme.grid,
        granularity: plan.weights.granularity,
        error_method: plan.weights.error_method,
        quantizers: selection.into(),
    }
}

fn activation_report(plan: &Plan, site: &ActivationSite, selection: &Selection) -> SiteReport {
    SiteReport {
        name: site.name.clone(),
        kind: Kind::Activation,
        layer: site.layer.clone(),
        op: site.op.clone(),
        bits: plan.activations.scheme.bits,
        grid: plan.activations.scheme.grid,
        granularity: Granularity::PerTensor,
        error_method: plan.activations.error_method,
        quantizers: selection.into(),
    }
}
