//! The library that libtorch's 8-bit kernels run on. It belongs to the process: weights are packed for the one that is set
//! when they are packed or loaded.

use super::Error;
use super::ffi::bridge;

/// The name of the engine that is set.
#[must_use]
pub fn engine() -> String {
    bridge::quantized_engine()
}

/// The names of those that this libtorch has.
#[must_use]
pub fn engines() -> Vec<String> {
    bridge::quantized_engines()
}

/// Sets the engine of this process.
///
/// # Errors
/// Where this libtorch has none of that name.
pub fn set_engine(name: &str) -> Result<(), Error> {
    Ok(bridge::set_quantized_engine(name)?)
}
