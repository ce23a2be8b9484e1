//! From a batch of data to the arguments of `forward`.

use crate::config::Constant;
use crate::dataset::{Batch, Input};
use crate::jit::{Argument, Arguments, Error, Module};

/// Binds the inputs of a batch, by position or by name, to the model's arguments.
///
/// # Errors
/// Where they do not fit the model's signature.
pub fn bind(module: &Module, batch: Batch) -> Result<Arguments, Error> {
    let arguments = batch.inputs.into_iter().map(|(name, input)| (name, argument(input)));
    module.bind(arguments.collect())
}

fn argument(input: Input) -> Argument {
    match input {
        Input::Tensor(tensor) => Argument::Tensor(tensor),
        Input::Const(Constant::Bool(value)) => Argument::Bool(value),
        Input::Const(Constant::Int(value)) => Argument::Int(value),
        Input::Const(Constant::Float(value)) => Argument::Float(value),
        Input::Const(Constant::None) => Argument::None,
    }
}
