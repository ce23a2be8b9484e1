//! Where models run. libtorch's CUDA half is a library of its own, which is opened when a GPU is asked for and not before, so
//! that one binary serves machines with and without it. Which device a run takes is the caller's business.

use std::path::Path;

use tch::{Device, Kind, Tensor};

use super::Error;
use super::error::one_line;
use super::ffi::bridge;
use super::tensor;

/// File name of the half of libtorch that runs on a GPU.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

/// Why there is no GPU to run on.
#[derive(Debug, thiserror::Error)]
pub enum NoCuda {
    /// The libtorch that this process runs with was built or fetched without CUDA.
    #[error(
        "expected {CUDA_LIBRARY} beside the libtorch in use, found none in {folder}; the README says how to build with a \
         torch that has CUDA"
    )]
    NoLibrary {
        /// The folder of the libtorch in use.
        folder: String,
    },
    /// The library is there and does not work.
    #[error("{path}: {message}")]
    Unusable {
        /// The library.
        path: String,
        /// libtorch's or the loader's reason.
        message: String,
    },
    /// Fewer GPUs than that.
    #[error("expected a GPU of number {number}, found {count} in all")]
    NoSuchNumber {
        /// The number asked for, from 0.
        number: u8,
        /// How many there are.
        count: i32,
    },
}

/// The GPU of this number, tried out. It has to be asked for before any model runs in this process.
///
/// # Errors
/// Where there is none that works.
pub fn cuda(number: u8) -> Result<Device, NoCuda> {
    let folder = bridge::libtorch_folder();
    let library = Path::new(&folder).join(CUDA_LIBRARY);
    if folder.is_empty() || !library.exists() {
        return Err(NoCuda::NoLibrary { folder });
    }
    let path = library.display().to_string();
    let unusable = |error: cxx::Exception| NoCuda::Unusable { path: path.clone(), message: one_line(error.what()) };
    bridge::open_cuda(&path).map_err(unusable)?;
    let count = bridge::device_count();
    if i32::from(number) >= count {
        return Err(NoCuda::NoSuchNumber { number, count });
    }
    bridge::try_device(number.into()).map_err(unusable)?;
    Ok(Device::Cuda(number.into()))
}

/// Sets how a GPU computes from now on: the same result in every run, and float32 throughout unless `allow_tf32` lets products
/// and convolutions round what they multiply to 10 bits of mantissa. Nothing changes for the processor.
///
/// # Errors
/// Where libtorch fails.
pub fn prepare(device: Device, allow_tf32: bool) -> Result<(), Error> {
    if device != Device::Cpu {
        bridge::prepare_device(allow_tf32)?;
        bridge::set_deterministic(true)?;
    }
    Ok(())
}

/// Runs what gives the same result in whatever order libtorch's kernels add up: whole numbers, and sums that are exact. In the
/// order that [`prepare`] asks for they would take several times as long.
///
/// # Errors
/// Those of `run`, and where libtorch fails.
pub fn in_any_order<T>(run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let was = bridge::set_deterministic(false)?;
    let outcome = run();
    if was {
        bridge::set_deterministic(true)?;
    }
    outcome
}

/// Ops that ran since the last call and that libtorch cannot run in the order that [`prepare`] asks for.
#[must_use]
pub fn take_unordered() -> Vec<String> {
    bridge::take_unordered()
}

/// The tensor on a device. To a GPU it goes by pinned memory, beside what is still running there.
///
/// # Errors
/// Where libtorch fails.
pub fn upload(tensor: &Tensor, device: Device) -> Result<Tensor, Error> {
    match index(device) {
        Some(index) if tensor.device() == Device::Cpu && tensor.numel() > 0 => {
            Ok(tensor::from_unique(bridge::upload(tensor::as_bridge(tensor), index)?))
        }
        _ => Ok(tensor.f_to_device(device)?),
    }
}

/// Waits until all that was begun on the device is done.
///
/// # Errors
/// Where libtorch fails, or what was begun did.
pub fn synchronize(device: Device) -> Result<(), Error> {
    Ok(index(device).map_or(Ok(()), bridge::synchronize)?)
}

/// The most memory that tensors on a GPU have had since the last call; `None` on the processor.
///
/// # Errors
/// Where libtorch fails.
pub fn peak_device_memory(device: Device) -> Result<Option<u64>, Error> {
    let Some(index) = index(device) else { return Ok(None) };
    let bytes = bridge::peak_device_bytes(index)?;
    bridge::forget_peak(index)?;
    Ok(Some(bytes.unsigned_abs()))
}

/// As a plan writes it: `cpu`, `cuda:0`.
#[must_use]
pub fn device_name(device: Device) -> String {
    index(device).map_or_else(|| "cpu".to_owned(), |index| format!("cuda:{index}"))
}

/// A float32 tensor without gaps, wherever it lives: its values in the order of memory as one axis, and how they lie.
#[derive(Debug)]
pub struct Flat {
    /// In memory order, of rank 1.
    pub values: Tensor,
    /// Size along each axis.
    pub sizes: Vec<i64>,
    /// Distance in memory between neighbours along each axis, in values.
    pub strides: Vec<i64>,
}

/// The values of a float32 tensor on its own device, without a copy wherever they lie without gaps.
///
/// # Errors
/// For a tensor of another dtype.
pub fn flat(tensor: &Tensor) -> Result<Flat, Error> {
    let kind = tensor.f_kind()?;
    if kind != Kind::Float {
        return Err(Error::Libtorch(format!("expected a float32 tensor, found {kind:?}")));
    }
    let tensor = tensor.f_detach()?;
    let dense = if bridge::is_dense(tensor::as_bridge(&tensor)) { tensor } else { tensor.f_contiguous()? };
    let values = dense.f_as_strided([i64::try_from(dense.numel()).unwrap_or(i64::MAX)], [1], None)?;
    Ok(Flat { values, sizes: dense.size(), strides: dense.stride() })
}

/// The values of two float32 tensors of one shape and device, in the same order.
///
/// # Errors
/// For tensors of another dtype or of different shapes.
pub fn flat_pair(a: &Tensor, b: &Tensor) -> Result<[Tensor; 2], Error> {
    if a.size() != b.size() {
        return Err(Error::Libtorch(format!("expected tensors of one shape, found {:?} and {:?}", a.size(), b.size())));
    }
    let [first, second] = [flat(a)?, flat(b)?];
    if first.strides == second.strides {
        return Ok([first.values, second.values]);
    }
    Ok([flat(&a.f_contiguous()?)?.values, flat(&b.f_contiguous()?)?.values])
}

/// The number of a GPU.
pub(super) fn index(device: Device) -> Option<i32> {
    match device {
        Device::Cuda(number) => Some(i32::try_from(number).unwrap_or(i32::MAX)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jit::{Argument, Module};

    /// With a libtorch that has no CUDA: what was looked for, and where. With one that has: a GPU, or why there is none.
    #[test]
    fn a_gpu_is_there_or_it_is_said_why_not() {
        match cuda(0) {
            Ok(device) => assert_eq!(device_name(device), "cuda:0"),
            Err(error @ NoCuda::NoLibrary { .. }) => {
                let text = error.to_string();
                assert!(
                    text.starts_with("expected libtorch_cuda.so beside the libtorch in use, found none in /"),
                    "{text}"
                );
            }
            Err(error) => assert!(error.to_string().contains("libtorch_cuda.so: "), "{error}"),
        }
    }

    #[test]
    fn the_libtorch_in_use_is_found() {
        assert!(Path::new(&bridge::libtorch_folder()).join("libtorch_cpu.so").exists());
    }

    /// Inputs of a shipped model, by its arguments' names.
    fn inputs(folder: &Path, name: &str, arguments: &[&str]) -> Vec<(String, Tensor)> {
        let data = Tensor::read_safetensors(folder.join(format!("{name}.safetensors"))).unwrap().into_iter();
        let named = |(name, tensor): (String, Tensor)| (name, tensor.narrow(0, 0, 2));
        data.filter(|(name, _)| arguments.contains(&name.as_str())).map(named).collect()
    }

    fn shapes(module: &Module, given: &[(String, Tensor)], device: i32) -> Vec<(String, Vec<i64>)> {
        let moved = |tensor: &Tensor| tensor::from_unique(bridge::upload(tensor::as_bridge(tensor), device).unwrap());
        let given = given.iter().map(|(name, tensor)| (Some(name.clone()), Argument::Tensor(moved(tensor))));
        let output = module.forward(&module.bind(given.collect()).unwrap()).unwrap();
        output.tensors().into_iter().map(|(path, tensor)| (path, tensor.size())).collect()
    }

    /// What moves a model to a GPU, with a device in its place that every libtorch has, and that mixes no more with others.
    #[test]
    fn all_parts_of_a_model_move() {
        const META: i32 = -2;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/test");
        // Outside of Python meta has neither convolutions nor relu.
        let models = [("linear", &["x"][..]), ("mlp", &["x"]), ("recurrent", &["x"]), ("tables", &["x"])];
        for (name, arguments) in models {
            let path = folder.join(format!("{name}.pt"));
            let inputs = inputs(&folder, name, arguments);
            let expected = shapes(&Module::load(&path).unwrap(), &inputs, -1);
            let module = Module::load(&path).unwrap();
            bridge::move_module(module.as_bridge().unwrap(), META).unwrap();
            assert_eq!(shapes(&module, &inputs, META), expected, "{name}");
        }
    }

    /// libtorch refuses lengths of packed sequences on a GPU.
    #[test]
    fn lengths_of_packed_sequences_stay_on_the_processor() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/test/packed.pt");
        let module = Module::load(&path).unwrap();
        bridge::move_module(module.as_bridge().unwrap(), -1).unwrap();
        let clean = module.clean(None).unwrap();
        let kinds: Vec<&str> = clean.listing().nodes.iter().map(|node| node.op.as_str()).collect();
        let packs = kinds.iter().position(|&kind| kind == "aten::_pack_padded_sequence").unwrap();
        assert_eq!(kinds[packs - 1], "aten::cpu", "{kinds:?}");
    }

    #[test]
    fn order_is_given_back() {
        let on = || {
            let is_on = bridge::set_deterministic(true).unwrap();
            bridge::set_deterministic(is_on).unwrap();
            is_on
        };
        let before = on();
        assert!(in_any_order(|| Ok(!on())).unwrap());
        assert!(in_any_order(|| Err::<(), _>(Error::Libtorch("stop".to_owned()))).is_err());
        assert_eq!(on(), before);
    }
}
