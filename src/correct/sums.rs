//! Sums of what ops read, per input feature and tap of the kernel, in memory that does not grow with the data.

use tch::{Device, Kind, Tensor};

use super::geometry::{Axis, Places};
use super::met::Met;
use super::targets::{Reading, Source, Targets};
use crate::jit::{self, BoxError, Tap, TapKind};
use crate::statistics::{Activation, Channel};

/// Sums over calibration of what the ops of [`Targets`] read.
#[derive(Debug, Default)]
pub struct InputSums {
    taps: Vec<Tap>,
    readings: Vec<Reading>,
    sums: Vec<Sum>,
}

/// One of the sums that were seen at taps, under the name of the first layer that reads what was summed up.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSum {
    /// The layer.
    pub layer: String,
    /// (features, taps), the last axis first; empty if no value was seen.
    pub total: Vec<f64>,
    /// Its sizes.
    pub shape: [usize; 2],
    /// Positions of the result that were summed over.
    pub count: u64,
    /// Numbers of axes that values had, ascending.
    pub ranks: Vec<usize>,
}

/// One of them.
#[derive(Debug, Default)]
pub(super) struct Sum {
    /// (features, taps) in f64; `None` before the first value.
    pub(super) total: Option<Tensor>,
    /// Positions of the result that were summed over.
    pub(super) count: u64,
    /// Numbers of axes that its values had.
    pub(super) ranks: Vec<usize>,
}

impl InputSums {
    /// Sums of zero for what these ops read.
    #[must_use]
    pub fn new(targets: &Targets) -> Self {
        let inputs = targets.inputs.iter().enumerate();
        Self {
            taps: inputs
                .filter(|(_, input)| input.source == Source::Tap)
                .map(|(number, input)| Tap { value: input.result, number, kind: TapKind::Input(input.slot) })
                .collect(),
            readings: targets.inputs.iter().map(|input| input.reading.clone()).collect(),
            sums: targets.inputs.iter().map(|_| Sum::default()).collect(),
        }
    }

    /// Where to look, numbered from 0.
    #[must_use]
    pub fn taps(&self) -> &[Tap] {
        &self.taps
    }

    /// Adds a value that was seen at the tap of this number.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn add(&mut self, number: usize, value: &Tensor) -> Result<(), BoxError> {
        let (Some(reading), Some(sum)) = (self.readings.get(number), self.sums.get_mut(number)) else {
            return Err(format!("tap {number} belongs to no input of a layer").into());
        };
        Ok(sum.add(reading, value)?)
    }

    /// The sums that were seen at the taps of `targets`, which these are of.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn by_layer(&self, targets: &Targets) -> Result<Vec<LayerSum>, tch::TchError> {
        let mut named = Vec::new();
        for (number, sum) in self.sums.iter().enumerate().filter(|(number, _)| targets.is_tap(*number)) {
            let Some(layer) = targets.layer_of(number) else { continue };
            let mut ranks = sum.ranks.clone();
            ranks.sort_unstable();
            let (total, shape) = match &sum.total {
                None => (Vec::new(), [0, 0]),
                Some(total) => {
                    let size = |axis: usize| total.size().get(axis).map_or(1, |&size| size.unsigned_abs() as usize);
                    let shape = [size(0), size(1)];
                    let flat = total.f_to_device(Device::Cpu)?.f_contiguous()?.f_reshape([-1])?;
                    (Vec::<f64>::try_from(&flat)?, shape)
                }
            };
            named.push(LayerSum { layer: layer.to_owned(), total, shape, count: sum.count, ranks });
        }
        Ok(named)
    }

    /// What has these sums, as [`by_layer`](Self::by_layer) gives them for the same targets; `None` where they are of others.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn of_layers(targets: &Targets, named: &[LayerSum]) -> Result<Option<Self>, tch::TchError> {
        let mut sums = Self::new(targets);
        let mut named = named.iter();
        for (number, sum) in sums.sums.iter_mut().enumerate().filter(|(number, _)| targets.is_tap(*number)) {
            let found = named.next().filter(|found| targets.layer_of(number) == Some(&found.layer));
            let Some(LayerSum { total, shape: [features, taps], count, ranks, .. }) = found else { return Ok(None) };
            let is_whole = features.checked_mul(*taps) == Some(total.len()) && (*count > 0) != total.is_empty();
            let (Ok(features), Ok(taps), true) = (i64::try_from(*features), i64::try_from(*taps), is_whole) else {
                return Ok(None);
            };
            let total = Some(total).filter(|total| !total.is_empty());
            let total = total.map(|total| Tensor::f_from_slice(total)?.f_reshape([features, taps])).transpose()?;
            *sum = Sum { total, count: *count, ranks: ranks.clone() };
        }
        Ok(named.next().is_none().then_some(sums))
    }

    /// The same sums for `some` ops, all of which are among those of `targets`, which these are of.
    #[must_use]
    pub fn for_some(&self, targets: &Targets, some: &Targets) -> Self {
        let mut sums = Self::new(some);
        let wanted = sums.sums.iter_mut().zip(&some.inputs).filter(|(_, input)| input.source == Source::Tap);
        for (sum, input) in wanted {
            // Ops that read the same share a sum, that of the first of them.
            let of_op = targets.ops.iter().find(|op| op.result == input.result).map(|op| op.input);
            let number = of_op.or_else(|| targets.inputs.iter().position(|other| other.reads_as(input)));
            if let Some(known) = number.and_then(|number| self.sums.get(number)) {
                let total = known.total.as_ref().map(Tensor::shallow_clone);
                *sum = Sum { total, count: known.count, ranks: known.ranks.clone() };
            }
        }
        sums
    }

    pub(super) fn get(&self, number: usize) -> Option<&Sum> {
        self.sums.get(number)
    }

    #[cfg(test)]
    pub(super) fn take(mut self, number: usize) -> Option<Sum> {
        (number < self.sums.len()).then(|| self.sums.swap_remove(number))
    }

    /// Takes the sums that the statistics of the activation sites hold.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn with_statistics(mut self, targets: &Targets, statistics: &[Vec<Activation>]) -> Result<Self, tch::TchError> {
        for (sum, input) in self.sums.iter_mut().zip(&targets.inputs) {
            let Source::Statistics { site, anchor } = input.source else { continue };
            let activation = statistics.get(site).and_then(|site| site.get(anchor));
            let Some(channels) = activation.and_then(|activation| activation.channels.get()) else { continue };
            let totals: Vec<f64> = channels.iter().map(Channel::sum).collect();
            sum.total = Some(Tensor::f_from_slice(&totals)?.f_unsqueeze(-1)?);
            sum.count = channels.first().map_or(0, Channel::count);
        }
        Ok(self)
    }
}

impl LayerSum {
    /// Adds those of other rows; `None` where they have another shape.
    pub fn merge(&mut self, other: &Self) -> Option<()> {
        if other.count == 0 {
            return Some(());
        }
        if self.count == 0 {
            self.clone_from(other);
            return Some(());
        }
        for (own, other) in self.total.iter_mut().zip(&other.total) {
            *own += other;
        }
        self.count += other.count;
        self.ranks.extend(&other.ranks);
        self.ranks.sort_unstable();
        self.ranks.dedup();
        (self.shape == other.shape).then_some(())
    }
}

impl Sum {
    fn add(&mut self, reading: &Reading, value: &Tensor) -> Result<(), jit::Error> {
        let rank = value.dim();
        if !self.ranks.contains(&rank) {
            self.ranks.push(rank);
        }
        let (sum, count) = match reading {
            Reading::Rows => (over_all_but(value, rank.saturating_sub(1))?.f_unsqueeze(-1)?, value.numel()),
            Reading::Columns => (over_all_but(value, rank.saturating_sub(2))?.f_unsqueeze(-1)?, value.numel()),
            Reading::Positions(axes) => through_taps(value, axes)?,
        };
        let features = usize::try_from(sum.size().first().copied().unwrap_or_default()).unwrap_or_default();
        let count = match reading {
            Reading::Positions(_) => count,
            _ => count.checked_div(features).unwrap_or_default(),
        };
        self.count += count as u64;
        self.total = Some(match self.total.take() {
            None => sum,
            Some(mut total) => total.f_add_(&sum)?,
        });
        Ok(())
    }
}

/// Sums along all axes but one, in f64.
fn over_all_but(value: &Tensor, kept: usize) -> Result<Tensor, tch::TchError> {
    let axes: Vec<i64> =
        (0..value.dim()).filter(|&axis| axis != kept).filter_map(|axis| axis.try_into().ok()).collect();
    if axes.is_empty() {
        value.f_to_kind(Kind::Double)
    } else {
        value.f_sum_dim_intlist(axes, false, Kind::Float)?.f_to_kind(Kind::Double)
    }
}

/// Sums over the rows and over the positions that each tap meets, and the number of positions of the result.
fn through_taps(value: &Tensor, axes: &[Axis]) -> Result<(Tensor, usize), jit::Error> {
    let batch = if value.dim() == axes.len() + 1 { value.f_unsqueeze(0)? } else { value.shallow_clone() };
    let sizes = batch.size();
    let lengths = sizes.iter().skip(2);
    let positions: i64 = axes.iter().zip(lengths).map(|(axis, &length)| axis.output(length)).product();
    let count = sizes.first().copied().unwrap_or_default() * positions;
    let count = usize::try_from(count).unwrap_or_default();
    if axes.iter().all(Axis::is_pointwise) {
        return Ok((over_all_but(&batch, 1)?.f_unsqueeze(-1)?, count));
    }
    let on_processor = batch.device() == Device::Cpu && batch.f_kind()? == Kind::Float;
    let in_one_pass = if on_processor { in_one_pass(&batch, axes)? } else { None };
    let sum = in_one_pass.map_or_else(|| op_by_op(&batch, axes), Ok)?;
    Ok((sum, count))
}

/// The sums by (features, taps).
fn op_by_op(batch: &Tensor, axes: &[Axis]) -> Result<Tensor, tch::TchError> {
    // In f32 up to here: sums of a batch alone, of which the double sums are made.
    let mut sum = batch.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?.f_to_kind(Kind::Double)?;
    for axis in axes {
        // The axes come to the second place one after the other, and go to the end as taps.
        sum = met_by_each_tap(&sum.f_movedim_int(1, -1)?, axis)?;
    }
    sum.f_flatten(1, -1)
}

/// The same with one look at each number of the processor's memory; `None` where there is nothing to sum up.
fn in_one_pass(batch: &Tensor, axes: &[Axis]) -> Result<Option<Tensor>, jit::Error> {
    let sizes: Vec<usize> = batch.size().into_iter().map(|size| size.unsigned_abs() as usize).collect();
    let [_, features, lengths @ ..] = sizes.as_slice() else { return Ok(None) };
    let Some(met) = Met::new(axes, lengths) else { return Ok(None) };
    let mut outcome = Ok(());
    let add_up = |values: &[f32]| met.sums(values, *features, |parts, work| outcome = jit::in_parallel(parts, work));
    let sums = jit::with_values(&batch.f_contiguous()?, add_up)?;
    outcome?;
    Ok(Some(Tensor::f_from_slice(&sums)?.f_reshape([*features as i64, -1])?))
}

/// The sums along the last axis over the positions that each tap meets, side by side.
fn met_by_each_tap(sum: &Tensor, axis: &Axis) -> Result<Tensor, tch::TchError> {
    let length = sum.size().last().copied().unwrap_or_default();
    let taps = (0..axis.kernel).map(|tap| {
        let Places { start, step, count } = axis.places(length, tap);
        let end = if count == 0 { start } else { start + (count - 1) * step + 1 };
        let [start, end, step] = [start, end, step].map(|number| number as i64);
        sum.f_slice(-1, start, end, step)?.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)
    });
    Tensor::f_stack(&taps.collect::<Result<Vec<_>, _>>()?, -1)
}

#[cfg(test)]
mod tests {
    use super::super::geometry::Padding;
    use super::*;

    /// On a GPU sums are made by ops, on the processor in one pass.
    #[test]
    fn both_ways_give_the_same() {
        let plain = Axis { kernel: 3, stride: 1, padding: Padding::Zeros(1), dilation: 1, transposed: None };
        let all = [
            plain,
            Axis { stride: 2, ..plain },
            Axis { kernel: 4, dilation: 2, padding: Padding::Same, ..plain },
            Axis { stride: 2, transposed: Some(1), ..plain },
        ];
        for first in all {
            for second in all {
                let image = Tensor::randn([2, 5, 7, 40], (Kind::Float, Device::Cpu));
                // With gaps, and with the channels last.
                for batch in [image.slice(3, 0, 9, 1), image.slice(3, 0, 9, 1).permute([0, 3, 2, 1])] {
                    let axes = [first, second];
                    let (found, expected) = (in_one_pass(&batch, &axes), op_by_op(&batch, &axes).unwrap());
                    let found = found.unwrap().expect("sums");
                    assert!(found.allclose(&expected, 1e-5, 1e-4, false), "{axes:?}: {found:?} {expected:?}");
                }
            }
        }
        let empty = Tensor::zeros([0, 5, 7, 9], (Kind::Float, Device::Cpu));
        assert_eq!(
            through_taps(&empty, &[plain, plain]).unwrap().0,
            Tensor::zeros([5, 9], (Kind::Double, Device::Cpu))
        );
    }
}
