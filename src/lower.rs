//! From a graph and its quantizers to a graph that computes in 8 bits: libtorch's quantized CPU kernels, with weights packed for
//! them as attributes of the module.
//!
//! The one place that knows quantized dtypes and kernels. It decides which ops run on quantized tensors and says which do not and
//! why; it refuses to know how quantizers were chosen.

pub mod engine;
mod graph;
mod kernels;
mod layers;
mod needs;
mod outputs;
mod plain;
mod recipe;
mod verify;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use tch::Tensor;

use crate::correct::Bias;
use crate::emit::{self, Emission};
use crate::jit::{self, Clean, Edits, ExtraFile, Place};
use crate::quantizer::{Bits, Grid, QuantParams};
use crate::report::{Kind, SiteReport};
use crate::sites::{LeftFloat, Sites};

use engine::Trial;

use recipe::Larder;

pub use needs::needs;
pub use outputs::{FloatOutput, float_outputs};
pub use verify::{LayerDifference, Verification};

/// What was chosen for a graph whose sites were found for 8-bit kernels.
pub struct Given<'a> {
    /// Where everything is.
    pub sites: &'a Sites,
    /// The quantizer of each activation site, in the order of `sites.activations`.
    pub activations: &'a [Option<QuantParams>],
    /// In the order of `sites.weights`.
    pub weights: Vec<Weight<'a>>,
    /// Corrected biases.
    pub biases: &'a [Bias],
    /// What the engine that is set computes right: all else is as good as without a kernel. `None` where no kernel is asked for.
    pub trial: Option<&'a Trial>,
}

/// A quantized weight.
pub struct Weight<'a> {
    /// On its grid.
    pub image: &'a Tensor,
    /// Axis of the output channels.
    pub axis: usize,
    /// Width.
    pub bits: Bits,
    /// Where its levels lie.
    pub grid: Grid,
    /// One, or one for each output channel.
    pub scale: &'a [f32],
    /// As many.
    pub zero_point: &'a [i32],
    /// No sum of two neighbouring products overflows 16 bits.
    pub is_bounded: bool,
}

impl Weight<'_> {
    /// Whether kernels take its quantizer: 256 levels around 0.
    fn fits_kernels(&self) -> bool {
        self.bits.get() == 8 && self.zero_point.iter().all(|&zero| zero == 0) && self.grid != Grid::Uniform
    }
}

/// A graph in 8 bits.
pub struct Lowering {
    edits: Edits,
    kernels: Vec<walk::Lowered>,
    in_float: Vec<LeftFloat>,
}

impl<'a> Given<'a> {
    /// What was chosen, with the weights as the reports have them: weights first, in the order of the sites.
    #[must_use]
    pub fn new(emission: &Emission<'a>, reports: &'a [SiteReport], trial: Option<&'a Trial>) -> Self {
        let reports = reports.iter().filter(|report| report.kind == Kind::Weight);
        let sites = emission.sites.weights.iter().zip(emission.weights);
        let weights = sites.zip(reports).map(|((site, image), report)| Weight {
            image,
            axis: site.channel_axis,
            bits: report.bits,
            grid: report.grid,
            scale: &report.quantizers.scale,
            zero_point: &report.quantizers.zero_point,
            is_bounded: report.bounded_channels.is_some(),
        });
        let (sites, activations, biases) = (emission.sites, emission.activations, emission.biases);
        Self { sites, activations, weights: weights.collect(), biases, trial }
    }

    /// Names and quantizers of the sites that the model returns as they are quantized.
    pub fn returned(&self) -> impl Iterator<Item = (&str, QuantParams)> {
        let sites = self.sites.activations.iter().zip(self.activations);
        sites.filter(|(site, _)| site.is_returned).filter_map(|(site, params)| Some((site.name.as_str(), (*params)?)))
    }

    /// Sites whose quantizer no kernel takes, each with the reason.
    #[must_use]
    pub fn unfit(&self) -> Vec<LeftFloat> {
        let weights = self.sites.weights.iter().zip(&self.weights).filter(|(_, weight)| !weight.fits_kernels());
        let weights = weights.map(|(site, weight)| {
            let found = match weight.bits.get() {
                8 => "found a zero point of its own (grid uniform)".to_owned(),
                bits => format!("found {bits} bits"),
            };
            let reason = format!("8-bit kernels take weights of 8 bits around zero, {found}");
            LeftFloat { name: site.name.clone(), op: site.op.clone(), reason }
        });
        let activations = self.sites.activations.iter().zip(self.activations);
        let activations = activations.filter_map(|(site, params)| {
            let params = params.filter(|params| walk::Eight::of(*params).is_none())?;
            let levels = i64::from(params.quant_max()) - i64::from(params.quant_min()) + 1;
            let reason = format!("8-bit kernels take activations of 256 or 128 levels, found {levels}");
            Some(LeftFloat { name: site.name.clone(), op: site.op.clone(), reason })
        });
        weights.chain(activations).collect()
    }
}

impl Lowering {
    /// Finds out which ops run in 8 bits, and packs their weights for the engine that is set.
    ///
    /// # Errors
    /// Where libtorch fails on a weight.
    pub fn new(model: &Clean, given: &Given<'_>, emission: &Emission<'_>) -> Result<Self, jit::Error> {
        Self::of(model, (given, emission), walk::Walk::new(model.listing(), given).run())
    }

    /// The graph in float, with its weights as levels and scales: in 8 bits, or in 4 where that is enough. What has more than 8
    /// bits stays as it is. No activation may have a quantizer.
    ///
    /// # Errors
    /// Where libtorch fails on a weight.
    pub fn of_weights(model: &Clean, given: &Given<'_>, emission: &Emission<'_>) -> Result<Self, jit::Error> {
        Self::of(model, (given, emission), walk::Walk::new(model.listing(), given).store_weights())
    }

    fn of(
        model: &Clean,
        (given, emission): (&Given<'_>, &Emission<'_>),
        found: walk::Found,
    ) -> Result<Self, jit::Error> {
        let mut taken: BTreeSet<String> = model.attributes()?.into_iter().collect();
        taken.extend(parameters(model, given, emission)?.into_iter().map(|parameter| parameter.name));
        let mut edits = Edits { insertions: found.insertions, rewirings: found.rewirings, ..Edits::default() };
        let larder = Larder::new(model, given)?;
        for recipe in &found.recipes {
            let name = emit::free_name(&recipe.name(given), &mut taken);
            edits.attributes.push(recipe.cook(&larder, name, &mut edits.tensors)?);
        }
        Ok(Self { edits, kernels: found.kernels, in_float: found.in_float })
    }

    /// Writes the model.
    ///
    /// # Errors
    /// Where libtorch refuses the graph or the file cannot be written.
    pub fn emit(
        &self,
        model: &Clean,
        (given, emission): (&Given<'_>, &Emission<'_>),
        path: &Path,
    ) -> Result<(), jit::Error> {
        let parameters = parameters(model, given, emission)?;
        let file = ExtraFile { name: emit::EXTRA_FILE.to_owned(), text: emission.description.clone() };
        model.emit_edited(path, &self.edits, &parameters, &[file])
    }

    /// Ops that compute in float though they, or what they read, are sites; each with the reason.
    #[must_use]
    pub fn in_float(&self) -> &[LeftFloat] {
        &self.in_float
    }

    /// How often each kernel computes.
    #[must_use]
    pub fn kernels(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for lowered in &self.kernels {
            *counts.entry(lowered.kernel).or_default() += 1;
        }
        counts
    }
}

/// What stays a parameter or buffer: all constants but weights that are kept in 8 bits.
fn parameters(model: &Clean, given: &Given<'_>, emission: &Emission<'_>) -> Result<Vec<jit::Parameter>, jit::Error> {
    let weights = given.sites.weights.iter().zip(&given.weights).filter(|(_, weight)| weight.fits_a_byte());
    let weights: BTreeSet<_> = weights.flat_map(|(site, _)| site.values.iter().copied()).collect();
    let mut parameters = emit::parameters(model, emission)?;
    parameters.retain(|parameter| match parameter.place {
        Place::Constant(value) => !weights.contains(&value),
        _ => true,
    });
    Ok(parameters)
}
