//! Runs of a graph that its gradients can be asked for. Which constants and values they are of is the caller's business.

use cxx::UniquePtr;
use tch::Tensor;

use super::error::one_line;
use super::ffi::bridge;
use super::module::Arguments;
use super::value::Output;
use super::visit::{Visit, Visitor};
use super::{Error, tensor};

/// A graph some of whose constants are inputs, so that gradients flow to them; those of tapped values are told as they
/// come.
pub struct Differentiable {
    executable: UniquePtr<bridge::Executable>,
    constants: UniquePtr<bridge::Tensors>,
    /// Whether images are put into memory with their channels last: forward and back take three quarters of the time of
    /// MobileNetV2 so.
    channels_last: bool,
}

impl Differentiable {
    pub(super) fn new(executable: UniquePtr<bridge::Executable>, constants: &[Tensor], channels_last: bool) -> Self {
        Self { executable, constants: tensor::list(constants.iter()), channels_last }
    }

    /// With images as they are given, which is what others compare with.
    #[must_use]
    pub fn as_given(self) -> Self {
        Self { channels_last: false, ..self }
    }

    /// Runs the graph forward and keeps what the way back needs. A model that does not take its images with their channels last,
    /// as a view of them, runs again as they are: the visit may be told a value twice then.
    ///
    /// # Errors
    /// The visit's own error, or that of the model.
    pub fn record(&self, arguments: &Arguments, visit: &mut dyn Visit) -> Result<Recording, Error> {
        match self.record_as(self.channels_last, arguments, visit) {
            // Whether a batch fails so depends on that batch alone: others before it do not count.
            Err(Error::Run { .. }) if self.channels_last => self.record_as(false, arguments, visit),
            recording => recording,
        }
    }

    fn record_as(&self, channels_last: bool, arguments: &Arguments, visit: &mut dyn Visit) -> Result<Recording, Error> {
        let executable = self.executable.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?;
        let mut visitor = Visitor::new(visit);
        let recording =
            bridge::record(executable, arguments.as_bridge()?, &self.constants, channels_last, &mut visitor);
        if let Some(error) = visitor.into_error() {
            return Err(Error::Visit(error));
        }
        let inputs = arguments.describe().to_owned();
        let recording =
            recording.map_err(|error| Error::Run { inputs: inputs.clone(), message: one_line(error.what()) })?;
        let output = bridge::recorded_output(&recording);
        let output = Output::from_bridge(&output)?;
        Ok(Recording { recording, output, inputs })
    }
}

/// A run whose gradients can be asked for, with the memory that this takes.
pub struct Recording {
    recording: UniquePtr<bridge::Recording>,
    output: Output,
    inputs: String,
}

impl Recording {
    /// What the model returned; tensors that gradients can be asked of say so ([`Tensor::requires_grad`]).
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Walks back from Σ outputs · directions. Outputs are tensors of [`output`](Self::output), each with a direction of its
    /// shape. The visit is told the gradients of tapped values and of the constants that are inputs, as they come: none of them
    /// is kept.
    ///
    /// With `keep` it can be done again.
    ///
    /// # Errors
    /// The visit's own error, or where libtorch has no derivative.
    pub fn backward(
        &self,
        outputs: &[(&Tensor, Tensor)],
        keep: bool,
        visit: &mut (dyn Visit + Send),
    ) -> Result<(), Error> {
        let directions = tensor::list(outputs.iter().map(|(_, direction)| direction));
        let outputs = tensor::list(outputs.iter().map(|(output, _)| *output));
        let mut visitor = Visitor::new(visit);
        let outcome = bridge::backward(&self.recording, &outputs, &directions, keep, &mut visitor);
        if let Some(error) = visitor.into_error() {
            return Err(Error::Visit(error));
        }
        outcome.map_err(|error| Error::Backward { inputs: self.inputs.clone(), message: one_line(error.what()) })
    }
}
