//! Sums of gradients by value and row, on the device where both are.

use std::ops::RangeInclusive;

use tch::{Device, Kind, Tensor};

use super::{PIECE, read};
use crate::jit::Error;
use crate::statistics::GradientSums;

const BINS: i64 = GradientSums::BINS as i64;

/// What [`GradientSums`] are, with tables on a device.
#[derive(Debug)]
pub struct RowSums {
    device: Device,
    range: Option<(f32, f32)>,
    /// Of each batch the sums of its rows, one after the other.
    batches: Vec<Tensor>,
    /// Whether the last batch is under way.
    is_open: bool,
    rows: i64,
}

impl RowSums {
    /// For values in this range; without a range nothing is kept.
    pub fn new(range: Option<RangeInclusive<f32>>, device: Device) -> Self {
        let range = GradientSums::new(range).range().map(RangeInclusive::into_inner);
        Self { device, range, batches: Vec::new(), is_open: false, rows: 0 }
    }

    /// Begins a batch of so many rows; it keeps nothing of them if there are enough.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn begin(&mut self, rows: i64) -> Result<(), Error> {
        self.is_open = self.range.is_some() && self.rows < GradientSums::ENOUGH as i64;
        if self.is_open {
            self.batches.push(Tensor::f_zeros([rows * BINS], (Kind::Float, self.device))?);
            self.rows += rows;
        }
        Ok(())
    }

    /// Ends the batch.
    pub fn end(&mut self) {
        self.is_open = false;
    }

    /// Adds each gradient to the bin of its value; both are tensors of rank 1, whose rows have `row_length` elements each, or
    /// all go to the first.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn observe(&mut self, values: &Tensor, gradients: &Tensor, row_length: Option<i64>) -> Result<(), Error> {
        let (Some((lo, hi)), Some(sums), true) = (self.range, self.batches.last_mut(), self.is_open) else {
            return Ok(());
        };
        // In f32, as on the processor.
        let per_unit = GradientSums::bins_per_unit(lo, hi);
        let count = values.size().first().copied().unwrap_or_default();
        for start in (0..count).step_by(usize::try_from(PIECE).unwrap_or(1)) {
            let length = PIECE.min(count - start);
            let (x, gradients) = (values.f_narrow(0, start, length)?, gradients.f_narrow(0, start, length)?);
            let places = x.f_sub_scalar(f64::from(lo))?.f_mul_scalar(f64::from(per_unit))?;
            let are_outside = places.f_le(-1.0)?.f_logical_or(&places.f_ge((BINS + 1) as f64)?)?;
            let places = places.f_nan_to_num(0.0, None::<f64>, None::<f64>)?;
            let bins = places.f_clamp(0.0, (BINS - 1) as f64)?.f_to_kind(Kind::Int64)?;
            let are_zero = x.f_abs()?.f_lt(f64::from(f32::MIN_POSITIVE))?;
            let are_left_out = are_zero.f_logical_or(&are_outside)?;
            let gradients = gradients.f_masked_fill(&are_left_out, 0.0)?;
            let bins = match row_length {
                None => bins,
                Some(row_length) => {
                    let numbers = Tensor::f_arange_start(start, start + length, (Kind::Int64, self.device))?;
                    let rows = numbers.f_divide_scalar_mode(row_length.max(1), "floor")?;
                    bins.f_add(&rows.f_mul_scalar(BINS)?)?
                }
            };
            // Unlike index_add this adds up in the same order in every run, on any device.
            let _ = sums.f_index_put_(&[Some(&bins)], &gradients, true)?;
        }
        Ok(())
    }

    /// What there is so far.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn read(&self) -> Result<GradientSums, Error> {
        let Some((lo, hi)) = self.range else { return Ok(GradientSums::default()) };
        let mut sums = Vec::new();
        for batch in &self.batches {
            sums.extend(read::<f32>(batch)?);
        }
        GradientSums::from_parts(lo..=hi, &sums).ok_or_else(|| Error::Libtorch("expected whole rows".to_owned()))
    }
}
