//! Safe TorchScript: load a file, clean its graph, list it, run it with taps, write it.
//!
//! The only place with unsafe code, C++ and pointers. It knows nothing of quantization: which values are tapped, what
//! replaces them and which tensors are written is the caller's business.

mod clean;
mod device;
mod edit;
mod engine;
mod error;
mod ffi;
mod file;
mod frozen;
mod gradients;
mod listing;
mod module;
mod parallel;
mod stepwise;
mod tensor;
mod value;
mod visit;

pub use clean::{Clean, ExtraFile, Instrumented, Parameter, Place, Quantizer, Tap, TapKind};
pub use device::{
    Flat, NoCuda, cuda, device_name, flat, flat_pair, in_any_order, peak_device_memory, prepare, synchronize,
    take_unordered, upload,
};
pub use edit::{Attribute, Edits, Insertion, KernelRun, Makes, Operand, Position, Reader, Rewiring, pack_and_run};
pub use engine::{engine, engines, set_engine};
pub use error::Error;
pub(crate) use error::one_line;
pub use file::extra_file;
pub use frozen::Frozen;
pub use gradients::{Differentiable, Recording};
pub use listing::{Block, BlockId, Constant, Listing, Node, NodeId, Seen, Value, ValueId};
pub use module::{ArgumentType, Arguments, Module, NamedTensor, Signature};
pub use parallel::{in_parallel, thread_count};
pub use stepwise::{Stepwise, Stop, Substitute, stepwise};
pub use tensor::{Dense, with_dense, with_pairs, with_values};
pub use value::{Argument, Output};
pub use visit::{BoxError, NoVisit, Visit};

/// Version of the libtorch that the binary was built against.
#[must_use]
pub fn torch_version() -> String {
    ffi::bridge::torch_version()
}

/// Lets the C library keep freed memory for the next batch. By default glibc gives every large tensor back to the system
/// and faults it in again, page by page: half of the time of a MobileNetV2 at 224x224.
pub fn keep_freed_memory() {
    ffi::bridge::keep_freed_memory();
}
