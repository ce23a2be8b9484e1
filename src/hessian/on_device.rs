//! The scores of activations that live on a device: what is looked at of them is picked and summed up there.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use tch::{Device, Kind, Tensor};

use super::thinning::{Draw, Thinning};
use crate::jit::{self, Error};
use crate::on_device::{RowSums, Scores, Shared, read_octave_sums};
use crate::statistics::{ActivationScores, WeightedHistogram};

/// Tables for each site.
pub(super) struct OnDevice {
    device: Device,
    shared: Shared,
    sites: Vec<Scores>,
    rows: Vec<RowSums>,
}

/// How a value is looked at.
#[derive(Clone, Copy)]
pub(super) struct Look {
    /// Elements of a row, if the rows lie one after the other.
    pub(super) row_length: Option<usize>,
    pub(super) thinning: Option<Thinning>,
    pub(super) draw: Draw,
}

impl OnDevice {
    /// For sites of which those with a range have sums of gradients by row too.
    pub(super) fn new(device: Device, ranges: Vec<Option<RangeInclusive<f32>>>) -> Result<Self, Error> {
        let shared = Shared::new(device)?;
        let sites = ranges.iter().map(|_| Scores::new(&shared)).collect::<Result<_, _>>()?;
        let rows = ranges.into_iter().map(|range| RowSums::new(range, device)).collect();
        Ok(Self { device, shared, sites, rows })
    }

    /// Begins a probe, whose gradients are summed up by row if it is the first one of its rows.
    pub(super) fn begin_probe(&mut self, rows: usize, is_first: bool) -> Result<(), Error> {
        self.rows.iter_mut().try_for_each(|sums| {
            if is_first {
                return sums.begin(i64::try_from(rows).unwrap_or_default());
            }
            sums.end();
            Ok(())
        })
    }

    /// Adds the scores of a value and its gradient.
    pub(super) fn observe(
        &mut self,
        site: usize,
        [value, gradient]: [&Tensor; 2],
        Look { row_length, thinning, draw }: Look,
    ) -> Result<(), Error> {
        let [mut values, mut gradients] = jit::flat_pair(value, gradient)?;
        if let Some(rows) = self.rows.get_mut(site) {
            rows.observe(&values, &gradients, row_length.and_then(|length| i64::try_from(length).ok()))?;
        }
        if let Some(thinning) = thinning {
            let (rows, picked) = (values.numel() / thinning.row_length(), |row| thinning.ranges(draw, row));
            let places = places(&(0..rows).flat_map(picked).collect::<Vec<_>>(), self.device)?;
            values = values.f_index_select(0, &places)?;
            gradients = gradients.f_index_select(0, &places)?.f_mul_scalar(thinning.root() as f64)?;
        }
        self.sites.get_mut(site).map_or(Ok(()), |scores| scores.observe(&values, &gradients, &self.shared))
    }

    pub(super) fn octave_sums(&self) -> Result<Vec<BTreeMap<u16, f64>>, Error> {
        let sums = read_octave_sums(&self.sites)?;
        Ok(sums.iter().map(|sums| WeightedHistogram::octave_sums_of_table(sums).collect()).collect())
    }

    pub(super) fn scores(&self) -> Result<Vec<ActivationScores>, Error> {
        let sites = self.sites.iter().zip(&self.rows);
        sites.map(|(scores, rows)| Ok(ActivationScores { by_value: scores.read()?, sums: rows.read()? })).collect()
    }
}

/// All numbers in these ranges, of which those of one length become tensors together: only where each begins is uploaded.
fn places(ranges: &[Range<usize>], device: Device) -> Result<Tensor, Error> {
    let mut starts = BTreeMap::<usize, Vec<i64>>::new();
    for range in ranges {
        starts.entry(range.len()).or_default().push(i64::try_from(range.start).unwrap_or(i64::MAX));
    }
    let places = starts.iter().map(|(&length, starts)| {
        let starts = jit::upload(&Tensor::f_from_slice(starts)?, device)?.f_reshape([-1, 1])?;
        let steps = Tensor::f_arange(i64::try_from(length).unwrap_or(i64::MAX), (Kind::Int64, device))?;
        Ok(starts.f_add(&steps)?.f_reshape([-1])?)
    });
    let places = places.collect::<Result<Vec<_>, Error>>()?;
    if places.is_empty() {
        return Ok(Tensor::f_zeros([0], (Kind::Int64, device))?);
    }
    Ok(Tensor::f_cat(&places, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_numbers_of_all_ranges() {
        let numbers = |ranges: &[Range<usize>]| {
            let mut numbers = Vec::<i64>::try_from(places(ranges, Device::Cpu).unwrap()).unwrap();
            numbers.sort_unstable();
            numbers
        };
        assert_eq!(numbers(&[]), [0i64; 0]);
        assert_eq!(numbers(&[4..8, 20..22, 10..14]), [4, 5, 6, 7, 10, 11, 12, 13, 20, 21]);
    }
}
