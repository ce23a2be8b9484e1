//! Thresholds for all sites, and quantized weights: tensors in, plain numbers to `threshold`, tensors out.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tch::Tensor;

use super::Error;
use super::score::SiteScores;
use crate::correct::Weight;
use crate::hessian::{Scored, Unusable};
use crate::jit::{self, Clean};
use crate::quantizer::{Granularity, Grid, QuantParams};
use crate::report::{self, Kind, Quantizers, SiteReport};
use crate::settings::{Settings, SiteSettings};
use crate::sites::{ActivationSite, LeftFloat, Sites, WeightSite};
use crate::statistics::{Activation, ActivationScores, Histogram};
use crate::threshold::{self, Channels, ChannelsError, ErrorMethod, Note, SelectError, Selection};

/// Reason of a site without statistics.
pub(super) const NEVER_RAN: &str = "never ran on the calibration data";

/// What thresholds are chosen by.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    pub(super) settings: &'a Settings,
    /// In the order of the activations and of their anchors.
    pub(super) statistics: &'a [Vec<Activation>],
    pub(super) scores: &'a SiteScores<'a>,
}

/// What was chosen for each site.
#[derive(Default)]
pub(super) struct Selections {
    /// In the order of `sites.activations`; `None` stays float.
    pub(super) activations: Vec<Option<QuantParams>>,
    /// Quantized weights in the order of `sites.weights`.
    pub(super) weights: Vec<Tensor>,
    /// Their quantizers: one for each channel, or one for all.
    pub(super) weight_params: Vec<Vec<QuantParams>>,
    /// Weights, then activations.
    pub(super) reports: Vec<SiteReport>,
}

impl Selections {
    /// The quantized weights, to be rounded otherwise.
    pub(super) fn take_weights(&mut self, settings: &Settings) -> Vec<Weight> {
        let (tensors, params) = (std::mem::take(&mut self.weights), std::mem::take(&mut self.weight_params));
        let weights = tensors.into_iter().zip(params).zip(&settings.weights);
        let weight = |((tensor, params), settings): ((_, Vec<QuantParams>), &SiteSettings)| {
            // A grid of powers of two has no other scales, and channels that share one cannot change it each for itself.
            let refits = settings.scheme.grid != Grid::PowerOfTwo && params.len() > 1;
            Weight { tensor, params, refits }
        };
        weights.map(weight).collect()
    }
}

/// Chooses all thresholds; sites that never ran join what is left float. `advance` is called with 1 for each site.
pub(super) fn select(
    given: Given<'_>,
    model: &Clean,
    sites: &mut Sites,
    mut advance: impl FnMut(usize) + Send,
) -> Result<Selections, Error> {
    let mut selections = Selections::default();
    let Given { settings, statistics, scores } = given;
    for (index, (site, settings)) in sites.weights.iter().zip(&settings.weights).enumerate() {
        let mut method = Method::new(settings.error_method, scored(&scores.weights, index));
        let (tensor, selection) = weight(settings, &method, model, site)?;
        method.check(&selection, scores).map_err(|reason| {
            let (kind, site) = ("weight", site.name.clone());
            Error::Scores { kind, site, reason }
        })?;
        let named = Named { name: &site.name, layer: &site.layer, op: &site.op };
        selections.weights.push(tensor);
        selections.reports.push(report(Kind::Weight, &named, settings, &method, &selection));
        selections.weight_params.push(selection.params);
        advance(1);
    }
    let advance = Mutex::new(advance);
    let merged: Vec<Histogram> = sites
        .activations
        .iter_mut()
        .zip(statistics)
        .map(|(site, observed)| drop_unseen(site, observed, &mut sites.left_float))
        .collect();
    let mut methods: Vec<Method<'_, ActivationScores>> = settings
        .activations
        .iter()
        .enumerate()
        .map(|(index, settings)| Method::new(settings.error_method, scored(&scores.activations, index)))
        .collect();
    let choose = |(((site, settings), histogram), method): (
        ((&ActivationSite, &SiteSettings), &Histogram),
        &Method<'_, ActivationScores>,
    )| {
        let seen = !site.anchors.is_empty();
        let selected = seen.then(|| activation(settings, method, histogram)).transpose();
        advance.lock().unwrap_or_else(PoisonError::into_inner)(1);
        selected
    };
    // All results first: the error that is told must not depend on which thread comes first.
    let settled = sites.activations.par_iter().zip(&settings.activations);
    let results: Vec<_> = settled.zip(&merged).zip(&methods).map(choose).collect();
    let settled = sites.activations.iter().zip(&settings.activations);
    for (((site, settings), method), result) in settled.zip(&mut methods).zip(results) {
        let selection =
            result.map_err(|source| Error::Select { kind: "activation", site: site.name.clone(), source })?;
        if let Some(selection) = &selection {
            method.check(selection, scores).map_err(|reason| {
                let (kind, site) = ("activation", site.name.clone());
                Error::Scores { kind, site, reason }
            })?;
        }
        selections.activations.push(selection.as_ref().and_then(|selection| selection.params.first().copied()));
        let named = Named { name: &site.name, layer: &site.layer, op: &site.op };
        selections
            .reports
            .extend(selection.map(|selection| report(Kind::Activation, &named, settings, method, &selection)));
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

/// How the thresholds of one site are chosen.
pub(super) struct Method<'a, T> {
    /// MSE where the scores for HMSE are of no use.
    error_method: ErrorMethod,
    /// For HMSE.
    scores: Option<&'a T>,
    scored: Option<&'a Scored<T>>,
}

impl<'a, T> Method<'a, T> {
    pub(super) fn new(asked: ErrorMethod, scored: Option<&'a Scored<T>>) -> Self {
        let scored = scored.filter(|_| asked == ErrorMethod::Hmse);
        let scores = scored.and_then(|scored| scored.scores.as_ref().ok());
        let falls_back = scored.is_some() && scores.is_none();
        Self { error_method: if falls_back { ErrorMethod::Mse } else { asked }, scores, scored }
    }

    /// Sees whether MSE chose for all channels, because nothing that is quantized has a score but zeros.
    fn check(&mut self, selection: &Selection, scores: &SiteScores<'_>) -> Result<(), Unusable> {
        let is_whole = |note: &Note| matches!(note, Note::ZeroScores { channels, count } if channels.len() == *count);
        if self.scores.is_some() && selection.notes.iter().any(is_whole) {
            if !scores.allow_fallback {
                return Err(Unusable::Zero { samples: scores.samples });
            }
            (self.error_method, self.scores) = (ErrorMethod::Mse, None);
        }
        Ok(())
    }

    /// A line for the report where another method had to do.
    fn note(&self) -> Option<String> {
        let reason = self.scored?.scores.as_ref().err()?;
        Some(format!("MSE instead of HMSE: {reason}"))
    }
}

pub(super) fn scored<'a, T>(scores: &[Option<&'a Scored<T>>], index: usize) -> Option<&'a Scored<T>> {
    *scores.get(index)?
}

/// The threshold of an activation with these values.
pub(super) fn activation(
    settings: &SiteSettings,
    method: &Method<'_, ActivationScores>,
    histogram: &Histogram,
) -> Result<Selection, SelectError> {
    let SiteSettings { scheme, z_threshold, .. } = *settings;
    match method.scores {
        Some(scores) => threshold::select_activation_scored(histogram, &scores.damped(histogram), scheme, z_threshold),
        None => threshold::select_activation(histogram, scheme, method.error_method, z_threshold),
    }
}

fn weight(
    settings: &SiteSettings,
    method: &Method<'_, Tensor>,
    model: &Clean,
    site: &WeightSite,
) -> Result<(Tensor, Selection), Error> {
    let quantize = |channels: &Channels<'_>, selection: Selection| {
        Ok((threshold::quantize_weights(channels, &selection.params)?, selection))
    };
    let (quantized, selection) = selected_weight(settings, method, (model, site), quantize)?;
    Ok((Tensor::f_from_slice(&quantized)?.f_reshape(&site.shape)?, selection))
}

/// Chooses the thresholds of a weight, for `then` to use.
pub(super) fn selected_weight<R>(
    settings: &SiteSettings,
    method: &Method<'_, Tensor>,
    (model, site): (&Clean, &WeightSite),
    then: impl FnOnce(&Channels<'_>, Selection) -> Result<R, ChannelsError>,
) -> Result<R, Error> {
    let failed = |source| Error::Select { kind: "weight", site: site.name.clone(), source };
    let value = site.values.first().copied().unwrap_or_default();
    let tensor = model.constant(value)?.f_contiguous()?;
    let shape: Vec<usize> = site.shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    let axis = match settings.granularity {
        Granularity::PerChannel => Some(site.channel_axis),
        Granularity::PerTensor => None,
    };
    let misfit = |source| Error::Channels { site: site.name.clone(), source };
    let select = |values: &[f32]| -> Result<R, Error> {
        let channels = Channels::new(values, &shape, axis).map_err(misfit)?.in_pairs(settings.taps_in_pairs());
        let selection = match method.scores {
            Some(scores) => jit::with_values(&scores.f_contiguous()?, |scores| {
                threshold::select_weights_scored(&channels, scores, settings.scheme)
            })?,
            None => threshold::select_weights(&channels, settings.scheme, method.error_method),
        };
        then(&channels, selection.map_err(failed)?).map_err(misfit)
    };
    jit::with_values(&tensor, select)?
}

/// What a site of either kind is called.
struct Named<'a> {
    name: &'a str,
    layer: &'a str,
    op: &'a str,
}

fn report<T>(
    kind: Kind,
    site: &Named<'_>,
    settings: &SiteSettings,
    method: &Method<'_, T>,
    selection: &Selection,
) -> SiteReport {
    let mut quantizers: Quantizers = selection.into();
    quantizers.notes.extend(method.note());
    let zero_channels = selection.notes.iter().map(|note| match note {
        Note::ZeroScores { channels, .. } => channels.len(),
        _ => 0,
    });
    let scores = method.scores.and(method.scored).map(|scored| report::SiteScores {
        standard_error: scored.standard_error,
        zero_channels: zero_channels.sum(),
        off_diagonal: selection.off_diagonal,
    });
    SiteReport {
        name: site.name.to_owned(),
        kind,
        layer: site.layer.to_owned(),
        op: site.op.to_owned(),
        bits: settings.scheme.bits,
        grid: settings.scheme.grid,
        granularity: settings.granularity,
        error_method: method.error_method,
        l_p_value: method.error_method.exponent(),
        scores,
        rounding: None,
        bounded_channels: selection.raised,
        quantizers,
    }
}
