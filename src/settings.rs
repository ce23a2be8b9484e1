//! How each site is quantized: what the plan says of all sites, with what its overrides say of some.
//!
//! Plain data. It knows which layers touch which site, from [`sites`](crate::sites); it refuses to know tensors and how a
//! threshold is found.

mod merge;
mod select;

use crate::config::{At, Error, MixedPlan, Plan};
use crate::quantizer::{Bits, Granularity, Grid, Scheme, Widths};
use crate::sites::{LeftFloat, Sites};
use crate::threshold::ErrorMethod;

use merge::Merger;
use select::Role;

/// The settings of one site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SiteSettings {
    /// Bits and grid; while bits are free, the widest.
    pub scheme: Scheme,
    /// The widths to choose from, where mixed precision chooses and no override sets bits.
    pub free: Option<Widths>,
    /// One threshold or one per output channel; activations have one.
    pub granularity: Granularity,
    /// How thresholds are chosen.
    pub error_method: ErrorMethod,
    /// Standard deviations beyond which values of an activation do not count.
    pub z_threshold: Option<f64>,
    /// Of a weight whose products the engine adds two by two in 16 bits: taps of a kernel.
    pub taps: Option<usize>,
}

/// What the kernels of an 8-bit model need of its sites beyond the plan.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KernelNeeds {
    /// In the order of `sites.weights`; nothing where there are none.
    pub weights: Vec<WeightNeeds>,
    /// Activations have 7 bits where the plan says 8.
    pub has_7_bits: bool,
}

/// What kernels need of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightNeeds {
    /// Products are added two by two in 16 bits, which is to overflow for no activation: taps of a kernel.
    pub taps: Option<usize>,
    /// Its kernel takes one scale for all channels.
    pub per_tensor: bool,
}

impl SiteSettings {
    /// The widths that it may get, ascending.
    pub fn widths(&self) -> impl DoubleEndedIterator<Item = Bits> {
        self.free.unwrap_or(Widths::only(self.scheme.bits)).iter()
    }

    /// The fewest bits that it may get.
    pub fn narrowest(&self) -> Bits {
        self.free.map_or(self.scheme.bits, Widths::narrowest)
    }

    /// Taps of a kernel of which no two products may overflow 16 bits, if it is to run in 8.
    pub fn taps_in_pairs(&self) -> Option<usize> {
        self.taps.filter(|_| self.scheme.bits.get() == 8 && self.scheme.grid != Grid::Uniform)
    }

    /// With these bits.
    #[must_use]
    pub fn with_bits(&self, bits: Bits) -> Self {
        Self { scheme: Scheme { bits, ..self.scheme }, free: None, ..*self }
    }
}

/// The settings of all sites.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Settings {
    /// In the order of `sites.weights`.
    pub weights: Vec<SiteSettings>,
    /// In the order of `sites.activations`.
    pub activations: Vec<SiteSettings>,
    /// What free bits may cost.
    pub mixed: Option<MixedPlan>,
}

impl Settings {
    /// Whether a site with such settings, one of these, needs Hessian scores.
    pub fn is_scored(&self, site: &SiteSettings) -> bool {
        site.error_method == ErrorMethod::Hmse || self.mixed.is_some()
    }
}

/// What is settled about a site.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Settled<'a> {
    /// It stays float, because of what was typed there.
    Float(&'a At),
    /// It is quantized.
    Quantized(SiteSettings),
}

/// Settles how each site is quantized. A site that an override leaves float moves from the sites to what is left float, a
/// weight to `float_weights` too.
///
/// # Errors
/// An override that selects no layer or no site, that disagrees with another about a site which both reach through different
/// layers, or that makes an impossible combination; overrides that leave nothing to quantize. Each names key and place in the
/// experiment.
pub fn settle(plan: &Plan, sites: Sites) -> Result<(Sites, Settings), Error> {
    settle_for(plan, sites, &KernelNeeds::default())
}

/// The same for kernels that need something of these sites; what overrides say counts more.
///
/// # Errors
/// As of [`settle`].
pub fn settle_for(plan: &Plan, sites: Sites, needs: &KernelNeeds) -> Result<(Sites, Settings), Error> {
    let selected = select::select(&plan.overrides.entries, &sites)?;
    let weights = sites.weights.iter().enumerate().map(|(index, site)| {
        let reaching = site.users.iter().map(|&op| (op, Role::Weights));
        let merger = Merger::of_weights(plan, needs.weights.get(index).copied().unwrap_or_default());
        merger.settle(&site.name, &select::told(&selected, &sites.ops, reaching))
    });
    let weights: Vec<Settled<'_>> = weights.collect::<Result<_, _>>()?;
    let merger = Merger::of_activations(plan, needs.has_7_bits);
    let activations = sites.activations.iter().map(|site| {
        let makers = site.makers.iter().map(|&op| (op, Role::Activations));
        let reaching = makers.chain(site.readers.iter().map(|&op| (op, Role::Inputs)));
        merger.settle(&site.name, &select::told(&selected, &sites.ops, reaching))
    });
    let activations: Vec<Settled<'_>> = activations.collect::<Result<_, _>>()?;

    let float = |settled: &Settled<'_>| matches!(settled, Settled::Float(_));
    if let Some(last) = plan.overrides.entries.last()
        && weights.iter().chain(&activations).all(float)
    {
        return Err(last
            .at
            .error("expected at least one site left to quantize, found that the overrides leave all float"));
    }
    let (sites, settings) = divide(sites, &weights, &activations);
    Ok((sites, Settings { mixed: plan.mixed_precision.clone(), ..settings }))
}

/// Takes what stays float out of the sites.
fn divide(mut sites: Sites, weights: &[Settled<'_>], activations: &[Settled<'_>]) -> (Sites, Settings) {
    let mut settings = Settings::default();
    let left_float = |name: &str, op: &str, at: &At| LeftFloat {
        name: name.to_owned(),
        op: op.to_owned(),
        reason: format!("`{}` says `float`", at.key()),
    };
    for (site, settled) in std::mem::take(&mut sites.weights).into_iter().zip(weights) {
        match settled {
            Settled::Quantized(own) => {
                settings.weights.push(*own);
                sites.weights.push(site);
            }
            Settled::Float(at) => {
                sites.left_float.push(left_float(&site.name, &site.op, at));
                sites.float_weights.push(site);
            }
        }
    }
    for (site, settled) in std::mem::take(&mut sites.activations).into_iter().zip(activations) {
        match settled {
            Settled::Quantized(own) => {
                settings.activations.push(*own);
                sites.activations.push(site);
            }
            Settled::Float(at) => sites.left_float.push(left_float(&site.name, &site.op, at)),
        }
    }
    (sites, settings)
}

#[cfg(test)]
mod tests;
