//! The quantized model without its file: what is emitted has to compute the same.

use tch::Tensor;

use super::{CHECK_BATCHES, Error, compare, select};
use crate::correct::Corrections;
use crate::dataset::Dataset;
use crate::feed;
use crate::jit::{self, Arguments, Clean, Instrumented, Module};
use crate::quantizer::QuantParams;
use crate::simulate::substitutes;
use crate::sites::Sites;

/// The quantized model, run without being written: the float graph with quantized weights and a simulated quantizer at
/// each site.
pub(super) struct Simulation {
    instrumented: Instrumented,
    params: Vec<QuantParams>,
}

impl Simulation {
    pub(super) fn new(
        model: &Clean,
        sites: &Sites,
        selections: &select::Selections,
        corrections: &Corrections,
    ) -> Result<Self, Error> {
        Self::of(model, (sites, &selections.activations), &selections.weights, corrections)
    }

    /// As [`new`](Self::new), with activations in float.
    pub(super) fn of_weights(
        model: &Clean,
        sites: &Sites,
        selections: &select::Selections,
        corrections: &Corrections,
    ) -> Result<Self, Error> {
        Self::of(model, (sites, &[]), &selections.weights, corrections)
    }

    /// With these quantizers of activations and these weights.
    pub(super) fn of(
        model: &Clean,
        (sites, activations): (&Sites, &[Option<QuantParams>]),
        weights: &[Tensor],
        corrections: &Corrections,
    ) -> Result<Self, Error> {
        let (taps, params) = substitutes(&sites.activations, activations);
        let weights = sites.weights.iter().zip(weights);
        let weights = weights.flat_map(|(site, tensor)| {
            site.values.iter().map(|&value| (jit::Place::Constant(value), tensor.shallow_clone()))
        });
        let biases = corrections.biases.iter().map(|bias| (bias.place, bias.tensor.shallow_clone()));
        let tensors: Vec<_> = weights.chain(biases).collect();
        Ok(Self { instrumented: model.instrument(&taps, &tensors)?, params })
    }

    pub(super) fn run(&self, arguments: &Arguments) -> Result<jit::Output, jit::Error> {
        self.instrumented.run(arguments, &mut crate::simulate::Simulate { params: &self.params })
    }

    /// Runs the written file, loaded again, op by op on the first batches: it has to compute what was simulated, bit for bit.
    pub(super) fn check_against(
        &self,
        emitted: &Module,
        data: &Dataset,
        mut advance: impl FnMut(usize),
    ) -> Result<(), Error> {
        let by_op = Instrumented::of_module(emitted)?;
        for batch in data.batches().take(CHECK_BATCHES) {
            let batch = batch?;
            let rows = batch.rows;
            let arguments = feed::bind(emitted, batch)?;
            let found = by_op.run(&arguments, &mut jit::NoVisit)?;
            let expected = self.run(&arguments)?;
            let difference = compare::largest_difference(&expected, &found)?;
            if difference != 0.0 {
                return Err(Error::Differs { path: emitted.path().to_owned(), difference });
            }
            advance(rows);
        }
        Ok(())
    }
}
