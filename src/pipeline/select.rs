//! Thresholds for all sites, and quantized weights: tensors in, plain numbers to `threshold`, tensors out.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tch::Tensor;

use super::Error;
use crate::jit::{self, Clean};
use crate::quantizer::{Granularity, QuantParams};
use crate::report::{Kind, SiteReport};
use crate::settings::{Settings, SiteSettings};
use crate::sites::{ActivationSite, LeftFloat, Sites, WeightSite};
use crate::statistics::{Activation, Histogram};
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

/// Chooses all thresholds; sites that never ran join what is left float. `advance` is called with 1 for each site.
pub(super) fn select(
    settings: &Settings,
    model: &Clean,
    sites: &mut Sites,
    statistics: &[Vec<Activation>],
    mut advance: impl FnMut(usize) + Send,
) -> Result<Selections, Error> {
    let mut selections = Selections { activations: Vec::new(), weights: Vec::new(), reports: Vec::new() };
    for (site, settings) in sites.weights.iter().zip(&settings.weights) {
        let (tensor, selection) = weight(settings, model, site)?;
        let named = Named { name: &site.name, layer: &site.layer, op: &site.op };
        selections.weights.push(tensor);
        selections.reports.push(report(Kind::Weight, &named, settings, &selection));
        advance(1);
    }
    let advance = Mutex::new(advance);
    let merged: Vec<Histogram> = sites
        .activations
        .iter_mut()
        .zip(statistics)
        .map(|(site, observed)| drop_unseen(site, observed, &mut sites.left_float))
        .collect();
    let choose = |((site, settings), histogram): ((&ActivationSite, &SiteSettings), &Histogram)| {
        let SiteSettings { scheme, error_method, z_threshold, .. } = *settings;
        let seen = !site.anchors.is_empty();
        let select = || threshold::select_activation(histogram, scheme, error_method, z_threshold);
        let selected = seen.then(select).transpose();
        advance.lock().unwrap_or_else(PoisonError::into_inner)(1);
        selected
    };
    // All results first: the error that is told must not depend on which thread comes first.
    let settled = sites.activations.par_iter().zip(&settings.activations);
    let results: Vec<_> = settled.zip(&merged).map(choose).collect();
    for ((site, settings), result) in sites.activations.iter().zip(&settings.activations).zip(results) {
        let selection =
            result.map_err(|source| Error::Select { kind: "activation", site: site.name.clone(), source })?;
        selections.activations.push(selection.as_ref().and_then(|selection| selection.params.first().copied()));
        let named = Named { name: &site.name, layer: &site.layer, op: &site.op };
        selections.reports.extend(selection.map(|selection| report(Kind::Activation, &named, settings, &selection)));
    }
    Ok(selections)
}

/// Takes the values that never were there out of a site, and merges the statistics of the others.
fn drop_unseen(site: &mut ActivationSite, observed: &[Activation], left_float: &mut Vec<LeftFloat>) -> Histogram {
    let mut merged = Histogram::new();
    let mut anchors = Vec::new();
    for (anchor, observed) in std::mem::take(&mut site.anchors).into_iter().zip(observed) {
        if observed.count() > 0 {
            merged.merge(&observed.histogram);
            anchors.push(anchor);
        } else {
            left_float.push(LeftFloat { name: anchor.name, op: site.op.clone(), reason: NEVER_RAN.to_owned() });
        }
    }
    site.anchors = anchors;
    merged
}

fn weight(settings: &SiteSettings, model: &Clean, site: &WeightSite) -> Result<(Tensor, Selection), Error> {
    let failed = |source| Error::Select { kind: "weight", site: site.name.clone(), source };
    let value = site.values.first().copied().unwrap_or_default();
    let tensor = model.constant(value)?.f_contiguous()?;
    let shape: Vec<usize> = site.shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    let axis = match settings.granularity {
        Granularity::PerChannel => Some(site.channel_axis),
        Granularity::PerTensor => None,
    };
    let misfit = |source| Error::Channels { site: site.name.clone(), source };
    let quantize = |values: &[f32]| -> Result<(Vec<f32>, Selection), Error> {
        let channels = Channels::new(values, &shape, axis).map_err(misfit)?;
        let selection = threshold::select_weights(&channels, settings.scheme, settings.error_method).map_err(failed)?;
        Ok((threshold::quantize_weights(&channels, &selection.params).map_err(misfit)?, selection))
    };
    let (quantized, selection) = jit::with_values(&tensor, quantize)??;
    Ok((Tensor::f_from_slice(&quantized)?.f_reshape(&site.shape)?, selection))
}

/// What a site of either kind is called.
struct Named<'a> {
    name: &'a str,
    layer: &'a str,
    op: &'a str,
}

fn report(kind: Kind, site: &Named<'_>, settings: &SiteSettings, selection: &Selection) -> SiteReport {
    SiteReport {
        name: site.name.to_owned(),
        kind,
        layer: site.layer.to_owned(),
        op: site.op.to_owned(),
        bits: settings.scheme.bits,
        grid: settings.scheme.grid,
        granularity: settings.granularity,
        error_method: settings.error_method,
        l_p_value: settings.error_method.exponent(),
        quantizers: selection.into(),
    }
}
