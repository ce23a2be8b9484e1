//! Forward and back as libtorch does it, which the Hessian stage is measured against.

use anyhow::{Result, ensure};
use tch::Tensor;
use tsquant::config::HessianRequest;
use tsquant::dataset::Dataset;
use tsquant::feed;
use tsquant::jit::{BoxError, Clean, Differentiable, NoVisit, Visit};

/// The batches of `request` forward and, for each probe, back to all weights.
pub(crate) fn plain(clean: &Clean, graph: &Differentiable, data: &Dataset, request: &HessianRequest) -> Result<()> {
    let ways_back = request.probes.get();
    for batch in data.sample(request.samples, request.seed, request.batch_size) {
        let recording = graph.record(&feed::bind(clean.module(), batch?)?, &mut NoVisit)?;
        let tensors = recording.output().tensors();
        let outputs = tensors.iter().filter(|(_, output)| output.requires_grad());
        let outputs = outputs.map(|(_, output)| Ok((*output, output.f_ones_like()?)));
        let outputs: Vec<(&Tensor, Tensor)> = outputs.collect::<Result<_>>()?;
        ensure!(!outputs.is_empty(), "expected an output with a gradient, found none");
        for way in 1..=ways_back {
            let mut all = All(Vec::new());
            recording.backward(&outputs, way < ways_back, &mut all)?;
        }
    }
    Ok(())
}

/// Keeps the gradients until the walk back has ended, as a plain one returns them.
struct All(Vec<Tensor>);

impl Visit for All {
    fn constant_gradient(&mut self, _: usize, gradient: &Tensor) -> Result<(), BoxError> {
        // As libtorch gives them without being asked for less.
        let whole = if gradient.is_sparse() { gradient.f_to_dense(None, false)? } else { gradient.shallow_clone() };
        self.0.push(whole);
        Ok(())
    }
}
