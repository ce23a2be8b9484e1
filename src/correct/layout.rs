//! What an op reads and gives as matrices: features or channels by positions. It knows how axes lie, and nothing of weights.

use tch::Tensor;

use super::geometry::{Axis, Padding};
use super::targets::{Form, Reading};

/// Numbers of a matrix of patches that are made at once.
const PIECE: i64 = 1 << 22;

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

/// What one output position of an op reads of its input, as (groups, features of a group and taps, rows · positions), some rows
/// at a time: `take` is given the first row, how many there are, and the matrix.
pub(super) fn patches<E: From<tch::TchError>>(
    input: &Tensor,
    reading: &Reading,
    groups: i64,
    mut take: impl FnMut(i64, i64, &Tensor) -> Result<(), E>,
) -> Result<(), E> {
    let Reading::Positions(axes) = reading else {
        let value = by_channel(input, reading)?;
        return take(0, 1, &grouped(&value, groups)?);
    };
    let batch = if input.dim() == axes.len() + 1 { input.f_unsqueeze(0)? } else { input.shallow_clone() };
    let size = batch.size();
    let lengths = size.iter().skip(2);
    let positions: i64 = axes.iter().zip(lengths).map(|(axis, &length)| axis.output(length)).product();
    let taps: i64 = axes.iter().map(|axis| axis.kernel).product();
    let (rows, channels) = (size.first().copied().unwrap_or(0), size.get(1).copied().unwrap_or(1));
    let at_once = (PIECE / (channels * taps * positions).max(1)).max(1);
    let mut first = 0;
    while first < rows {
        let count = at_once.min(rows - first);
        let some = unfolded(&batch.f_narrow(0, first, count)?, axes)?;
        // (rows, channels, taps, positions) to (groups, features, rows · positions).
        let some = some.f_reshape([count, groups, channels / groups.max(1) * taps, positions])?;
        take(first, count, &some.f_permute([1, 2, 0, 3])?.f_flatten(2, 3)?)?;
        first += count;
    }
    Ok(())
}

/// (rows, channels, positions …) as (rows, channels, taps …, output positions …).
fn unfolded(batch: &Tensor, axes: &[Axis]) -> Result<Tensor, tch::TchError> {
    if axes.iter().all(Axis::is_pointwise) {
        return Ok(batch.shallow_clone());
    }
    let ends = |axis: &Axis| match axis.padding {
        Padding::Zeros(zeros) => [zeros, zeros],
        Padding::Same => {
            let all = axis.dilation * (axis.kernel - 1);
            [all / 2, all - all / 2]
        }
    };
    // The last axis first.
    let padding: Vec<i64> = axes.iter().rev().flat_map(ends).collect();
    let mut value = if padding.iter().all(|&zeros| zeros == 0) {
        batch.shallow_clone()
    } else {
        batch.f_constant_pad_nd(padding)?
    };
    let size = batch.size();
    for (index, axis) in axes.iter().enumerate() {
        // Behind two axes for each of those before: its taps, and its positions in the result.
        let place = 2 + 2 * index as i64;
        let output = axis.output(size.get(index + 2).copied().unwrap_or(1));
        let taps = (0..axis.kernel).map(|tap| {
            let start = tap * axis.dilation;
            value.f_slice(place, start, start + (output - 1) * axis.stride + 1, axis.stride)
        });
        value = Tensor::f_stack(&taps.collect::<Result<Vec<_>, _>>()?, place)?;
    }
    let places = 0..axes.len() as i64;
    let order: Vec<i64> = [0, 1]
        .into_iter()
        .chain(places.clone().map(|axis| 2 + 2 * axis))
        .chain(places.map(|axis| 3 + 2 * axis))
        .collect();
    value.f_permute(order)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn all(input: &Tensor, reading: &Reading, groups: i64) -> Tensor {
        let mut found = Vec::new();
        patches::<tch::TchError>(input, reading, groups, |_, _, some| {
            found.push(some.copy());
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
