//! What an op reads and gives as matrices: features or channels by positions. It knows how axes lie, and nothing of weights.

use tch::Tensor;

use super::geometry::{Axis, Padding};
use super::targets::{Form, Reading};

/// Numbers of a matrix of patches that are made at once.
const PIECE: i64 = 1 << 18;

/// Positions that are in it at least, where there are so many: each piece takes a pass over the sums of products.
const LEAST: i64 = 512;

impl Form {
    pub(super) fn groups(self) -> i64 {
        match self {
            Self::OutputsFirst { groups } | Self::InputsFirst { groups } => groups,
        }
    }
}

/// A value as (rows, channels, positions): one row where all positions are alike.
pub(super) fn by_channel(value: &Tensor, reading: &Reading) -> Result<Tensor, tch::TchError> {
    let rank = value.dim();
    match reading {
        Reading::Positions(axes) if rank == axes.len() + 1 => value.f_unsqueeze(0)?.f_flatten(2, -1),
        Reading::Positions(_) => value.f_flatten(2, -1),
        Reading::Rows => rows(value),
        Reading::Columns if rank == 1 => value.f_unsqueeze(-1)?.f_unsqueeze(0),
        Reading::Columns => value.f_movedim_int(-2, 0)?.f_flatten(1, -1)?.f_unsqueeze(0),
    }
}

/// (1, features along the last axis, positions).
fn rows(value: &Tensor) -> Result<Tensor, tch::TchError> {
    let features = value.size().last().copied().unwrap_or(1);
    value.f_reshape([-1, features])?.f_transpose(0, 1)?.f_unsqueeze(0)
}

/// (rows, channels, positions) as (groups, channels of a group, rows · positions).
pub(super) fn grouped(value: &Tensor, groups: i64) -> Result<Tensor, tch::TchError> {
    let [_, channels, _] = <[i64; 3]>::try_from(value.size()).unwrap_or_default();
    value.f_transpose(0, 1)?.f_reshape([groups, channels / groups.max(1), -1])
}

/// Some of what the output positions of an op read.
pub(super) struct Piece {
    /// Of these rows: the first, and how many.
    pub(super) rows: (i64, i64),
    /// For these groups: the first, and how many.
    pub(super) groups: (i64, i64),
    /// (groups, features of a group and taps, rows · positions).
    pub(super) x: Tensor,
}

impl Piece {
    /// The same rows and groups of a value (rows, channels, positions) as (groups, channels of a group, rows · positions); `all` is
    /// the number of all groups.
    pub(super) fn of(&self, value: &Tensor, all: i64) -> Result<Tensor, tch::TchError> {
        let channels = value.size().get(1).copied().unwrap_or(1) / all.max(1);
        let ((first, rows), (group, groups)) = (self.rows, self.groups);
        grouped(&value.f_narrow(0, first, rows)?.f_narrow(1, group * channels, groups * channels)?, groups)
    }

    /// What these groups have of a tensor with all of them along its first axis.
    pub(super) fn own(&self, value: &Tensor) -> Result<Tensor, tch::TchError> {
        value.f_narrow(0, self.groups.0, self.groups.1)
    }
}

/// What one output position of an op reads of its input, some rows and groups at a time, so that what is made of them stays near the
/// processor.
pub(super) fn patches<E: From<tch::TchError>>(
    input: &Tensor,
    reading: &Reading,
    groups: i64,
    mut take: impl FnMut(&Piece) -> Result<(), E>,
) -> Result<(), E> {
    let Reading::Positions(axes) = reading else {
        let x = grouped(&by_channel(input, reading)?, groups)?;
        return take(&Piece { rows: (0, 1), groups: (0, groups), x });
    };
    let batch = if input.dim() == axes.len() + 1 { input.f_unsqueeze(0)? } else { input.shallow_clone() };
    let size = batch.size();
    let lengths = size.iter().skip(2);
    let positions: i64 = axes.iter().zip(lengths).map(|(axis, &length)| axis.output(length)).product();
    let taps: i64 = axes.iter().map(|axis| axis.kernel).product();
    let (rows, channels) = (size.first().copied().unwrap_or(0), size.get(1).copied().unwrap_or(1));
    let channels = channels / groups.max(1);
    let of_a_group = (channels * taps * positions).max(1);
    let least = LEAST / positions.max(1);
    let rows_at_once = (PIECE / (of_a_group * groups)).max(least).clamp(1, rows.max(1));
    let groups_at_once = (PIECE / (of_a_group * rows_at_once)).clamp(1, groups.max(1));
    for first in (0..rows).step_by(rows_at_once as usize) {
        let count = rows_at_once.min(rows - first);
        let own = batch.f_narrow(0, first, count)?;
        for group in (0..groups).step_by(groups_at_once as usize) {
            let groups = groups_at_once.min(groups - group);
            let some = unfolded(&own.f_narrow(1, group * channels, groups * channels)?, axes)?;
            let x = some.f_reshape([groups, channels * taps, count * positions])?;
            take(&Piece { rows: (first, count), groups: (group, groups), x })?;
        }
    }
    Ok(())
}

/// With the zeros that a convolution adds at both ends of these axes.
pub(super) fn padded(batch: &Tensor, axes: &[Axis]) -> Result<Tensor, tch::TchError> {
    let ends = |axis: &Axis| match axis.padding {
        Padding::Zeros(zeros) => [zeros, zeros],
        Padding::Same => {
            let all = axis.dilation * (axis.kernel - 1);
            [all / 2, all - all / 2]
        }
    };
    // The last axis first.
    let padding: Vec<i64> = axes.iter().rev().flat_map(ends).collect();
    if padding.iter().all(|&zeros| zeros == 0) { Ok(batch.shallow_clone()) } else { batch.f_constant_pad_nd(padding) }
}

/// (rows, channels, positions …) as (channels, taps …, rows, output positions …).
fn unfolded(batch: &Tensor, axes: &[Axis]) -> Result<Tensor, tch::TchError> {
    if axes.iter().all(Axis::is_pointwise) {
        return batch.f_transpose(0, 1);
    }
    let value = padded(batch, axes)?;
    let (size, strides) = (batch.size(), value.stride());
    let of = |axis: usize| (size.get(axis).copied().unwrap_or(1), strides.get(axis).copied().unwrap_or(1));
    let ((rows, by_row), (channels, by_channel)) = (of(0), of(1));
    let spatial = || axes.iter().enumerate().map(|(index, axis)| (axis, of(index + 2)));
    let taps = spatial().map(|(axis, (_, step))| (axis.kernel, step * axis.dilation));
    let positions = spatial().map(|(axis, (length, step))| (axis.output(length), step * axis.stride));
    let view = [(channels, by_channel)].into_iter().chain(taps).chain([(rows, by_row)]).chain(positions);
    let (sizes, strides): (Vec<i64>, Vec<i64>) = view.unzip();
    value.f_as_strided(sizes, strides, None)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn all(input: &Tensor, reading: &Reading, groups: i64) -> Tensor {
        let mut found = Vec::new();
        patches::<tch::TchError>(input, reading, groups, |piece| {
            assert_eq!(piece.groups, (0, groups), "a small input is one piece");
            found.push(piece.x.copy());
            Ok(())
        })
        .unwrap();
        Tensor::cat(&found, 2)
    }

    /// Patches times the weight are what the convolution gives.
    #[test]
    fn patches_of_convolutions() {
        tch::manual_seed(1);
        for (kernel, stride, zeros, dilation) in [(1, 1, 0, 1), (1, 2, 0, 1), (3, 2, 1, 1), (3, 1, 2, 2), (5, 3, 4, 1)]
        {
            for groups in [1, 2, 4] {
                let input = Tensor::randn([3, 4, 11, 9], (Kind::Float, Device::Cpu));
                let weight = Tensor::randn([8, 4 / groups, kernel, kernel], (Kind::Float, Device::Cpu));
                let both = |x| [x, x];
                let expected = input.conv2d::<Tensor>(&weight, None, both(stride), both(zeros), both(dilation), groups);
                let axis = Axis { kernel, stride, padding: Padding::Zeros(zeros), dilation, transposed: None };
                let reading = Reading::Positions(vec![axis; 2]);
                let found = weight.reshape([groups, 8 / groups, -1]).bmm(&all(&input, &reading, groups));
                let expected = grouped(&by_channel(&expected, &reading).unwrap(), groups).unwrap();
                assert!(found.allclose(&expected, 1e-4, 1e-4, false), "{kernel} {stride} {zeros} {dilation} {groups}");
            }
        }
    }

    /// Some channels of one row at a time.
    #[test]
    fn pieces_of_a_large_input_are_all_of_it() {
        tch::manual_seed(1);
        let (input, groups) = (Tensor::randn([2, 48, 40, 40], (Kind::Float, Device::Cpu)), 24);
        let weight = Tensor::randn([72, 2, 3, 3], (Kind::Float, Device::Cpu));
        let expected = input.conv2d::<Tensor>(&weight, None, [1, 1], [1, 1], [1, 1], groups);
        let axis = Axis { kernel: 3, stride: 1, padding: Padding::Zeros(1), dilation: 1, transposed: None };
        let reading = Reading::Positions(vec![axis; 2]);
        let (weight, expected) = (weight.reshape([groups, 3, -1]), by_channel(&expected, &reading).unwrap());
        let (mut pieces, mut seen) = (0, 0);
        patches::<tch::TchError>(&input, &reading, groups, |piece| {
            let found = piece.own(&weight)?.bmm(&piece.x);
            assert!(
                found.allclose(&piece.of(&expected, groups)?, 1e-4, 1e-4, false),
                "{:?} {:?}",
                piece.rows,
                piece.groups
            );
            (pieces, seen) = (pieces + 1, seen + found.numel());
            Ok(())
        })
        .unwrap();
        assert!(pieces > 2 && seen == expected.numel(), "{pieces} pieces, {seen} numbers");
    }

    #[test]
    fn patches_of_other_ops() {
        let input = Tensor::randn([2, 3, 5], (Kind::Float, Device::Cpu));
        let weight = Tensor::randn([4, 5], (Kind::Float, Device::Cpu));
        let found = weight.unsqueeze(0).bmm(&all(&input, &Reading::Rows, 1));
        let expected = by_channel(&input.linear::<Tensor>(&weight, None), &Reading::Rows).unwrap();
        assert!(found.allclose(&expected, 1e-5, 1e-5, false));
        let weight = Tensor::randn([4, 3], (Kind::Float, Device::Cpu));
        let found = weight.unsqueeze(0).bmm(&all(&input, &Reading::Columns, 1));
        let expected = by_channel(&weight.matmul(&input), &Reading::Columns).unwrap();
        assert!(found.allclose(&expected, 1e-5, 1e-5, false));
        let one = Tensor::randn([3], (Kind::Float, Device::Cpu));
        let found = weight.unsqueeze(0).bmm(&all(&one, &Reading::Columns, 1));
        assert!(found.flatten(0, -1).allclose(&weight.mv(&one), 1e-5, 1e-5, false));
    }

    #[test]
    fn an_even_kernel_that_keeps_lengths() {
        let input = Tensor::randn([2, 3, 8], (Kind::Float, Device::Cpu));
        let weight = Tensor::randn([4, 3, 4], (Kind::Float, Device::Cpu));
        let axis = Axis { kernel: 4, stride: 1, padding: Padding::Same, dilation: 1, transposed: None };
        let reading = Reading::Positions(vec![axis]);
        let found = weight.reshape([1, 4, 12]).bmm(&all(&input, &reading, 1));
        let expected = input.conv1d_padding::<Tensor>(&weight, None, [1], "same", [1], 1);
        let expected = grouped(&by_channel(&expected, &reading).unwrap(), 1).unwrap();
        assert!(found.allclose(&expected, 1e-5, 1e-5, false));
    }
}
