//! A model as users run it: frozen, by libtorch's own executor, optimized or not. It knows no clock.

use cxx::UniquePtr;

use super::Error;
use super::error::one_line;
use super::ffi::bridge;
use super::module::{Arguments, Module};
use super::value::Output;

/// A frozen copy of a module without state.
pub struct Frozen {
    inner: UniquePtr<bridge::Module>,
}

impl Frozen {
    /// As `torch.jit.freeze` makes it; `optimized` as `torch.jit.optimize_for_inference` makes it then.
    ///
    /// # Errors
    /// Where libtorch cannot freeze it.
    pub fn new(module: &Module, optimized: bool) -> Result<Self, Error> {
        let inner = bridge::freeze_for_inference(module.as_bridge()?, optimized)
            .map_err(|error| Error::Freeze { message: one_line(error.what()) })?;
        Ok(Self { inner })
    }

    /// Runs it. The first runs are slow: libtorch's executor profiles, then compiles.
    ///
    /// # Errors
    /// Where the model fails.
    pub fn run(&self, arguments: &Arguments) -> Result<Output, Error> {
        let module = self.inner.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?;
        let output = bridge::call_as_it_is(module, arguments.as_bridge()?)
            .map_err(|error| Error::Run { inputs: arguments.describe().to_owned(), message: one_line(error.what()) })?;
        Output::from_bridge(output.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?)
    }
}
