//! Which device a run takes, and what to tell where it has not enough memory. It refuses to know how a device is opened.

use std::num::NonZeroUsize;

use tch::Device;

use super::Error;
use crate::config::DevicePlan;
use crate::jit::{self, NoCuda};

/// What libtorch says where a GPU has not enough memory, to whoever asked: the model, a statistic, cuBLAS, cuDNN.
const OUT_OF_MEMORY: [&str; 4] =
    ["CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"];

/// The device of a run.
#[derive(Clone)]
pub(super) struct Taken {
    pub(super) device: Device,
    /// Why `auto` did not take the GPU that libtorch could use.
    pub(super) warning: Option<String>,
}

impl Taken {
    /// Its name in the report.
    pub(super) fn name(&self) -> String {
        jit::device_name(self.device)
    }
}

/// Takes the device of the plan.
///
/// # Errors
/// Where a GPU is asked for that does not work.
pub(super) fn take(plan: DevicePlan) -> Result<Taken, Error> {
    let (number, is_asked) = match plan {
        DevicePlan::Cpu => return Ok(Taken { device: Device::Cpu, warning: None }),
        DevicePlan::Auto => (0, false),
        DevicePlan::Cuda(number) => (number, true),
    };
    match jit::cuda(number) {
        Ok(device) => Ok(Taken { device, warning: None }),
        Err(source) if is_asked => Err(Error::Device { device: plan.to_string(), source }),
        // Nothing to tell: this libtorch has no other device.
        Err(NoCuda::NoLibrary { .. }) => Ok(Taken { device: Device::Cpu, warning: None }),
        Err(reason) => {
            let warning = format!("`device: auto` took the CPU, as CUDA does not work: {reason}");
            Ok(Taken { device: Device::Cpu, warning: Some(warning) })
        }
    }
}

/// The key of the batch size of a section of the plan, `calibration` or `evaluation`.
pub(super) fn batch_size_of(section: &str) -> &'static str {
    if section == "evaluation" { "evaluation.batch_size" } else { "calibration.batch_size" }
}

/// A stage that runs batches, and the key that says how many rows these have.
#[derive(Clone, Copy)]
pub(super) struct Batches {
    pub(super) key: &'static str,
    pub(super) rows: NonZeroUsize,
}

impl Batches {
    /// The error of such a stage, with advice where the memory of the GPU was not enough.
    pub(super) fn blame<E: Into<Error>>(self) -> impl Fn(E) -> Error {
        move |error| {
            let error = error.into();
            match out_of_memory(&error) {
                Some(message) => Error::OutOfMemory { key: self.key, rows: self.rows, message },
                None => error,
            }
        }
    }
}

/// The error where the weights of a model go to a device, with advice where the memory of the GPU was not enough.
pub(super) fn blame_weights<E: Into<Error>>(error: E) -> Error {
    let error = error.into();
    match out_of_memory(&error) {
        Some(message) => Error::NoRoomForWeights { message },
        None => error,
    }
}

/// libtorch's words on memory, if that is what the error is about.
fn out_of_memory(error: &Error) -> Option<String> {
    let message = error.to_string();
    let start = OUT_OF_MEMORY.iter().find_map(|text| message.find(text))?;
    Some(message.get(start..).unwrap_or_default().split(". ").take(2).collect::<Vec<_>>().join(". "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCHES: Batches = Batches { key: "calibration.batch_size", rows: NonZeroUsize::new(64).unwrap() };

    fn blamed(message: &str) -> Error {
        let inputs = "x = a float tensor of shape [64, 3, 224, 224]".to_owned();
        BATCHES.blame()(jit::Error::Run { inputs, message: message.to_owned() })
    }

    #[test]
    fn out_of_memory_says_what_to_lower() {
        let error = blamed(
            "CUDA out of memory. Tried to allocate 784.00 MiB. GPU 0 has a total capacity of 3.94 GiB of which 21.00 MiB is \
             free. See documentation for Memory Management",
        );
        assert_eq!(
            error.to_string(),
            "not enough memory on the GPU for batches of 64 rows: CUDA out of memory. Tried to allocate 784.00 MiB; lower \
             `calibration.batch_size`, or take `device: cpu`"
        );
        for message in [
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        ] {
            let error = blamed(message);
            assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
        }
    }

    /// No smaller batch makes room for weights.
    #[test]
    fn out_of_memory_for_weights_says_nothing_of_batches() {
        let error =
            blame_weights(jit::Error::Libtorch("CUDA out of memory. Tried to allocate 2.00 GiB. GPU".to_owned()));
        assert_eq!(
            error.to_string(),
            "not enough memory on the GPU for the model's weights: CUDA out of memory. Tried to allocate 2.00 GiB; take \
             another GPU (`device: cuda:N`) or `device: cpu`"
        );
        let other = blame_weights(jit::Error::Libtorch("an empty handle".to_owned()));
        assert!(matches!(other, Error::Jit(jit::Error::Libtorch(_))), "{other}");
    }

    #[test]
    fn other_errors_stay_what_they_are() {
        let error = blamed("mat1 and mat2 shapes cannot be multiplied (64x3 and 4x5)");
        assert!(matches!(error, Error::Jit(jit::Error::Run { .. })), "{error}");
    }

    #[test]
    fn the_cpu_is_always_there() {
        assert_eq!(take(DevicePlan::Cpu).unwrap().name(), "cpu");
    }
}
