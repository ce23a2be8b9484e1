//! What happens at a tapped value while a model runs. A panic or an error of the visit never crosses into C++: it is set
//! aside here, the run ends, and the caller gets it back.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cxx::UniquePtr;
use tch::Tensor;

use super::ffi::bridge;
use super::tensor;

/// Any error; a visit's own type is not this module's business.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Looks at the values of a running model, or replaces them.
pub trait Visit {
    /// Called with the value at each tap that only observes. The tensor is borrowed from the running model: reading it
    /// costs nothing, keeping it keeps its memory.
    ///
    /// # Errors
    /// An error ends the run and is what the run returns.
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let (_, _) = (tap, value);
        Ok(())
    }

    /// Called with the value at each tap that substitutes; the model goes on with the tensor returned.
    ///
    /// # Errors
    /// An error ends the run and is what the run returns.
    fn substitute(&mut self, tap: usize, value: &Tensor) -> Result<Tensor, BoxError> {
        let _ = tap;
        Ok(value.shallow_clone())
    }

    /// Called on the way back with the value at each tap on gradients and its gradient, which has the value's shape. On a
    /// device this may be another thread than the one that asked, but never two at a time.
    ///
    /// # Errors
    /// An error ends the way back and is what it returns.
    fn gradient(&mut self, tap: usize, value: &Tensor, gradient: &Tensor) -> Result<(), BoxError> {
        let (_, _, _) = (tap, value, gradient);
        Ok(())
    }

    /// Called on the way back with the gradient of a constant that is an input, by its number among these; once for each that a
    /// gradient reaches; sparse, by row, if it is an embedding's weight that nothing else reads. The rest is as for
    /// [`gradient`](Self::gradient).
    ///
    /// # Errors
    /// As there.
    fn constant_gradient(&mut self, constant: usize, gradient: &Tensor) -> Result<(), BoxError> {
        let (_, _) = (constant, gradient);
        Ok(())
    }
}

/// A visit for graphs without taps.
pub struct NoVisit;

impl Visit for NoVisit {}

/// The other side of [`Visit`], which C++ calls.
pub(super) struct Visitor<'a> {
    visit: &'a mut dyn Visit,
    error: Option<BoxError>,
}

impl<'a> Visitor<'a> {
    pub(super) fn new(visit: &'a mut dyn Visit) -> Self {
        Self { visit, error: None }
    }

    /// What ended the run, if it was the visit.
    pub(super) fn into_error(self) -> Option<BoxError> {
        self.error
    }

    pub(super) fn observe(&mut self, site: i64, value: &bridge::Tensor) -> Result<(), Stopped> {
        let tensor = tensor::from_bridge(value);
        self.guarded(|visit| visit.observe(index(site)?, &tensor))
    }

    pub(super) fn substitute(
        &mut self,
        site: i64,
        value: &bridge::Tensor,
    ) -> Result<UniquePtr<bridge::Tensor>, Stopped> {
        let tensor = tensor::from_bridge(value);
        let substitute = self.guarded(|visit| visit.substitute(index(site)?, &tensor))?;
        Ok(tensor::into_bridge(substitute))
    }

    pub(super) fn gradient(
        &mut self,
        site: i64,
        value: &bridge::Tensor,
        gradient: &bridge::Tensor,
    ) -> Result<(), Stopped> {
        let (value, gradient) = (tensor::from_bridge(value), tensor::from_bridge(gradient));
        self.guarded(|visit| visit.gradient(index(site)?, &value, &gradient))
    }

    pub(super) fn constant_gradient(&mut self, constant: usize, gradient: &bridge::Tensor) -> Result<(), Stopped> {
        let gradient = tensor::from_bridge(gradient);
        self.guarded(|visit| visit.constant_gradient(constant, &gradient))
    }

    fn guarded<T>(&mut self, call: impl FnOnce(&mut dyn Visit) -> Result<T, BoxError>) -> Result<T, Stopped> {
        let visit = &mut *self.visit;
        let outcome = catch_unwind(AssertUnwindSafe(|| call(visit)));
        let error = match outcome {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => error,
            Err(panic) => format!("internal error while a value was visited: {}", panic_text(panic.as_ref())).into(),
        };
        self.error = Some(error);
        Err(Stopped)
    }
}

fn index(site: i64) -> Result<usize, BoxError> {
    usize::try_from(site).map_err(|_| format!("tap number {site} is negative").into())
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

/// What C++ sees of a visit's error: that the run is over.
#[derive(Debug, thiserror::Error)]
#[error("stopped by the visit")]
pub(super) struct Stopped;
