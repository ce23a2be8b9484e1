//! Statistics by tensor ops, for values that live on a GPU and stay there: the same numbers as those of
//! [`statistics`](crate::statistics), which come to the processor as tables once they are complete. The code runs on any
//! device. It refuses to know what the values are of.

mod bits;
mod counts;
mod rows;
mod scores;
#[cfg(test)]
mod tests;

use tch::{Device, Kind, Tensor};

use crate::jit::Error;
use crate::statistics::Layout;

pub use counts::{Counts, are_finite};
pub use rows::RowSums;
pub use scores::{Scores, read_octave_sums};

/// Values gone through at a time: few enough for what is made of them to stay in a GPU's second cache, and to take no memory
/// worth speaking of beside the model's.
const PIECE: i64 = if cfg!(test) { 1 << 12 } else { 1 << 22 };

/// What all sites share: it depends on nothing but the device.
#[derive(Debug)]
pub struct Shared {
    device: Device,
    /// A bin of those of zeros for each value of a piece. Zeros are many, and sums in one place would wait for each other.
    places: Tensor,
    /// A one, to be counted.
    one: Tensor,
}

impl Shared {
    /// For values on this device.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(device: Device) -> Result<Self, Error> {
        let places = Tensor::f_arange(PIECE, (Kind::Int, device))?.f_bitwise_and(Layout::ZEROS as i64 - 1)?;
        Ok(Self { device, places, one: Tensor::f_ones([1], (Kind::Int, device))? })
    }
}

/// A tensor's numbers, on the processor.
fn read<T: tch::kind::Element + Copy>(tensor: &Tensor) -> Result<Vec<T>, Error> {
    Ok(Vec::try_from(&tensor.f_to_device(Device::Cpu)?.f_reshape([-1])?)?)
}
