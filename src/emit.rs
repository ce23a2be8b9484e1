//! From a graph and its quantizers to a TorchScript file that runs without tsquant.
//!
//! It places quantizers and names tensors; which quantizers there are was decided before.

mod parameters;

use std::path::Path;

use tch::Tensor;

use crate::correct::Bias;
use crate::jit::{self, Clean, ExtraFile, Parameter, Quantizer, ValueId};
use crate::quantizer::QuantParams;
use crate::sites::Sites;

/// Name of the file inside the archive that holds site table and provenance.
pub const EXTRA_FILE: &str = "tsquant.json";

/// What the emitted model is made of, beside the graph.
pub struct Emission<'a> {
    /// Where everything is.
    pub sites: &'a Sites,
    /// The quantizer of each activation site, in the order of `sites.activations`; `None` leaves the site float.
    pub activations: &'a [Option<QuantParams>],
    /// The quantized tensor of each weight site, in the order of `sites.weights`.
    pub weights: &'a [Tensor],
    /// Corrected biases.
    pub biases: &'a [Bias],
    /// JSON text of [`EXTRA_FILE`].
    pub description: String,
}

/// Writes the model in fake-quantize form: weights on their grid as named parameters, one
/// `aten::fake_quantize_per_tensor_affine` behind every value of every activation site, float kernels.
///
/// # Errors
/// Where libtorch refuses the graph or the file cannot be written.
pub fn fake_quant(model: &Clean, emission: &Emission, path: &Path) -> Result<(), jit::Error> {
    let sites = emission.sites.activations.iter().zip(emission.activations);
    let quantizers: Vec<_> = sites
        .filter_map(|(site, params)| Some((site, (*params)?)))
        .flat_map(|(site, params)| {
            site.anchors.iter().map(move |anchor| quantizer(anchor.value, &params, site.is_returned))
        })
        .collect();
    let parameters = parameters::collect(model, emission)?;
    let file = ExtraFile { name: EXTRA_FILE.to_owned(), text: emission.description.clone() };
    model.emit(path, &quantizers, &parameters, &[file])
}

/// All tensors of the graph that have to move with the model, under the names that the emitted model has them by.
pub(crate) fn parameters(model: &Clean, emission: &Emission<'_>) -> Result<Vec<Parameter>, jit::Error> {
    parameters::collect(model, emission)
}

pub(crate) use parameters::free_name;

fn quantizer(value: ValueId, params: &QuantParams, is_returned: bool) -> Quantizer {
    Quantizer {
        value,
        scale: params.scale(),
        zero_point: params.zero_point(),
        quant_min: params.quant_min(),
        quant_max: params.quant_max(),
        is_returned,
    }
}
