//! From a batch of data to the arguments of `forward`.

use tch::Device;

use crate::config::Constant;
use crate::dataset::{Batch, Input};
use crate::jit::{self, Argument, Arguments, Error, Module};

/// Binds the inputs of a batch, by position or by name, to the model's arguments, on the model's device.
///
/// # Errors
/// Where they do not fit the model's signature.
pub fn bind(module: &Module, batch: Batch) -> Result<Arguments, Error> {
    let arguments = batch.inputs.into_iter().map(|(name, input)| Ok((name, argument(input, module.device())?)));
    module.bind(arguments.collect::<Result<_, Error>>()?)
}

fn argument(input: Input, device: Device) -> Result<Argument, Error> {
    Ok(match input {
        Input::Tensor(tensor) => Argument::Tensor(jit::upload(&tensor, device)?),
        Input::Const(Constant::Bool(value)) => Argument::Bool(value),
        Input::Const(Constant::Int(value)) => Argument::Int(value),
        Input::Const(Constant::Float(value)) => Argument::Float(value),
        Input::Const(Constant::None) => Argument::None,
    })
}
