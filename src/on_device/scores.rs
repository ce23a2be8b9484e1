//! Squared gradients by the bins of their values, on the device where both are.

use tch::{Kind, Tensor};

use super::bits::Bits;
use super::{PIECE, Shared, read};
use crate::jit::Error;
use crate::statistics::{Layout, WeightedHistogram};

/// The scores of one activation, as a table on a device.
#[derive(Debug)]
pub struct Scores {
    table: Tensor,
    /// Whether a value was NaN or infinite.
    is_broken: Tensor,
}

impl Scores {
    /// Of no value yet.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(shared: &Shared) -> Result<Self, Error> {
        Ok(Self {
            table: Tensor::f_zeros([Layout::BINS as i64], (Kind::Double, shared.device))?,
            is_broken: Tensor::f_zeros([1i64; 0], (Kind::Bool, shared.device))?,
        })
    }

    /// Adds the square of each gradient to the bin of its value; both are tensors of rank 1 and of one length.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn observe(&mut self, values: &Tensor, gradients: &Tensor, shared: &Shared) -> Result<(), Error> {
        let count = values.size().first().copied().unwrap_or_default();
        for start in (0..count).step_by(usize::try_from(PIECE).unwrap_or(1)) {
            let length = PIECE.min(count - start);
            let bits = Bits::of(&values.f_narrow(0, start, length)?)?;
            let _ = self.is_broken.f_logical_or_(&bits.are_finite()?.f_all()?.f_logical_not()?)?;
            let scores = gradients.f_narrow(0, start, length)?.f_to_kind(Kind::Double)?.f_square()?;
            let bins = bits.bins(shared)?.f_to_kind(Kind::Int64)?;
            // Unlike index_add this adds up in the same order in every run, on any device.
            let _ = self.table.f_index_put_(&[Some(&bins)], &scores, true)?;
        }
        Ok(())
    }

    /// The sum of each octave, on the device.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn octave_sums(&self) -> Result<Tensor, Error> {
        Ok(self.table.f_reshape([-1, Layout::ZEROS as i64])?.f_sum_dim_intlist(1, false, Kind::Double)?)
    }

    /// What there is so far.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn read(&self) -> Result<WeightedHistogram, Error> {
        let is_broken = self.is_broken.f_int64_value(&[])? != 0;
        Ok(WeightedHistogram::of_table(&read::<f64>(&self.table)?, is_broken))
    }
}

/// The numbers of [`Scores::octave_sums`] of several sites, at once.
///
/// # Errors
/// Where libtorch fails.
pub fn read_octave_sums(sites: &[Scores]) -> Result<Vec<Vec<f64>>, Error> {
    if sites.is_empty() {
        return Ok(Vec::new());
    }
    let sums = sites.iter().map(Scores::octave_sums).collect::<Result<Vec<_>, _>>()?;
    let length = Layout::BINS / Layout::ZEROS;
    Ok(read::<f64>(&Tensor::f_cat(&sums, 0)?)?.chunks(length).map(<[f64]>::to_vec).collect())
}
