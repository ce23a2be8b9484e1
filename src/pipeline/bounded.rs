//! Weights that were rounded to other than the nearest levels, brought back within what an engine's 16-bit sums hold. It refuses to
//! know how they were rounded.

use tch::Tensor;

use super::Error;
use super::base::Base;
use super::chosen::Chosen;
use crate::jit;
use crate::quantizer::{Levels, QuantParams};
use crate::report::{Kind, SiteReport};
use crate::settings::Settings;
use crate::sites::WeightSite;
use crate::threshold::{self, Channels};

/// Moves levels towards zero where they are beyond the bound that thresholds were chosen under, which the report of the site tells.
///
/// # Errors
/// Where libtorch fails.
pub(super) fn keep(base: &Base, chosen: &mut Chosen, settings: &Settings) -> Result<(), Error> {
    let sites = chosen.sites.weights.iter().zip(&settings.weights);
    for ((site, settings), tensor) in sites.zip(&mut chosen.selections.weights) {
        let mut reports = chosen.selections.reports.iter_mut();
        let report = reports.find(|report| report.kind == Kind::Weight && report.name == site.name);
        let (Some(taps), Some(report)) = (settings.taps_in_pairs(), report) else { continue };
        let params = params(report);
        let mut images = Vec::<f32>::try_from(tensor.f_contiguous()?.f_flatten(0, -1)?)?;
        let moved = bound(&mut images, taps, &params);
        if moved == 0 {
            continue;
        }
        *tensor = Tensor::f_from_slice(&images)?.f_reshape(&site.shape)?;
        tell(base, site, report, (&images, &params, moved))?;
    }
    Ok(())
}

/// The quantizers of a site whose levels lie around zero.
fn params(report: &SiteReport) -> Vec<QuantParams> {
    let half = report.bits.level_count() / 2;
    let levels = Levels { quant_min: -half, quant_max: half - 1 };
    report.quantizers.scale.iter().filter_map(|&scale| QuantParams::new(scale, 0, levels).ok()).collect()
}

/// How many levels moved.
fn bound(images: &mut [f32], taps: usize, params: &[QuantParams]) -> usize {
    let mut moved = 0;
    for (channel, images) in images.chunks_mut(taps.max(1)).enumerate() {
        let Some(params) = params.get(channel).or(params.first()) else { continue };
        let mut levels: Vec<i32> = images.iter().map(|&image| params.quantize(image)).collect();
        moved += threshold::bound_pairs(&mut levels);
        images.iter_mut().zip(levels).for_each(|(image, level)| *image = params.dequantize(level));
    }
    moved
}

/// What the weight costs now.
fn tell(
    base: &Base,
    site: &WeightSite,
    report: &mut SiteReport,
    (images, params, moved): (&[f32], &[QuantParams], usize),
) -> Result<(), Error> {
    let float = base.model.constant(site.values.first().copied().unwrap_or_default())?.f_contiguous()?;
    let axis = (params.len() > 1).then_some(site.channel_axis);
    let shape: Vec<usize> = site.shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    let cost = jit::with_values(&float, |float| {
        threshold::cost_of_images(&Channels::new(float, &shape, axis)?, images, params)
    })?;
    let cost = cost.map_err(|source| Error::Channels { site: site.name.clone(), source })?;
    report.quantizers.rescale(params, &cost);
    report.quantizers.notes.push(format!(
        "{moved} levels lie nearer to zero than they were rounded to, so that no sum of two products overflows 16 bits"
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kernel_has_its_quantizer() {
        let levels = Levels { quant_min: -128, quant_max: 127 };
        let params = [1.0f32, 0.5].map(|scale| QuantParams::new(scale, 0, levels).unwrap());
        let mut images = [100.0, 40.0, 7.0, 50.0, 20.0, -60.0];
        assert_eq!(bound(&mut images, 3, &params), 2);
        assert_eq!(images, [88.0, 40.0, 7.0, 44.0, 20.0, -60.0]);
        assert_eq!(bound(&mut images, 3, &params[..1]), 0);
    }
}
