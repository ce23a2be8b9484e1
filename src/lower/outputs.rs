//! Which outputs compute in 8 bits, told before any quantizer is chosen.

use tch::Tensor;

use super::engine::Trial;
use super::walk::{Eight, Walk};
use super::{Given, Weight};
use crate::jit::{self, Clean};
use crate::quantizer::{Granularity, Levels, QuantParams, Scheme};
use crate::settings::{Settings, SiteSettings};
use crate::sites::{ActivationSite, Sites, WeightSite};

/// Indices of the activation sites that the model returns, that nothing in it computes with, and that no kernel of this engine makes:
/// they are better left float, as what makes them. The settings are those of these sites; one with other than 8 or 7 bits is not for
/// kernels to begin with.
///
/// # Errors
/// Where a weight is no constant of the graph.
pub fn outputs_in_float(
    model: &Clean,
    sites: &Sites,
    settings: &Settings,
    trial: &Trial,
) -> Result<Vec<usize>, jit::Error> {
    let is_output = |site: &ActivationSite| site.is_returned && site.readers.is_empty();
    if !sites.activations.iter().any(is_output) {
        return Ok(Vec::new());
    }
    let first = |site: &WeightSite| model.constant(site.values.first().copied().unwrap_or_default());
    let images: Vec<Tensor> = sites.weights.iter().map(first).collect::<Result<_, _>>()?;
    let activations: Vec<Option<QuantParams>> =
        settings.activations.iter().map(|settings| any_quantizer(settings.scheme)).collect();
    let weights = sites.weights.iter().zip(&images).zip(&settings.weights);
    let numbers: Vec<_> = weights.map(|((site, _), settings)| channels(site, settings)).collect();
    let weights = sites.weights.iter().zip(&images).zip(&settings.weights).zip(&numbers);
    let weights = weights.map(|(((site, image), settings), (scale, zero_point))| Weight {
        image,
        axis: site.channel_axis,
        bits: settings.scheme.bits,
        grid: settings.scheme.grid,
        scale,
        zero_point,
        is_bounded: settings.taps_in_pairs().is_some(),
    });
    let given = Given { sites, activations: &activations, weights: weights.collect(), biases: &[], trial: Some(trial) };
    let is_made = Walk::new(model.listing(), &given).made_in_8_bits();
    let of_sites = sites.activations.iter().zip(&activations).enumerate();
    let in_float = of_sites.filter(|(_, (site, params))| {
        let fits = params.and_then(Eight::of).is_some();
        is_output(site) && fits && !site.anchors.iter().any(|anchor| is_made[anchor.value])
    });
    Ok(in_float.map(|(index, _)| index).collect())
}

/// One with so many levels; which ops have kernels does not hang on where they lie.
fn any_quantizer(scheme: Scheme) -> Option<QuantParams> {
    let levels = Levels { quant_min: 0, quant_max: scheme.bits.level_count() - 1 };
    QuantParams::new(1.0, 0, levels).ok()
}

/// Scales and zero points of a weight, as many as it will have.
fn channels(site: &WeightSite, settings: &SiteSettings) -> (Vec<f32>, Vec<i32>) {
    let count = match settings.granularity {
        Granularity::PerChannel => {
            site.shape.get(site.channel_axis).map_or(1, |&size| usize::try_from(size).unwrap_or(1))
        }
        Granularity::PerTensor => 1,
    };
    (vec![1.0; count], vec![0; count])
}
