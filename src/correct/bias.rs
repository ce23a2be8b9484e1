//! b += (W − W_q)·E(x) per output channel: the mean error of a layer's result, taken out. E(x) is the mean of what the float
//! model's op reads, over rows and over the positions of its result.
//!
//! The closed form of bias correction, as in "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel
//! et al. 2019), with means that are observed.

use tch::{Device, Kind, Tensor};

use super::sums::{InputSums, Sum};
use super::targets::{Form, OldBias, Reading, Target, Targets};
use super::{Bias, Corrections};
use crate::jit::{self, Clean, Place, ValueId};
use crate::sites::Sites;
use crate::statistics::Activation;

/// Weights that are looked at in one piece: their differences are doubles.
const PIECE: i64 = 1 << 20;

/// What calibration saw.
pub struct Seen<'a> {
    /// At the ops.
    pub inputs: InputSums,
    /// At the activation sites, in the order in which the targets were found among them.
    pub statistics: &'a [Vec<Activation>],
}

/// The biases that correct `quantized`, the weights in the order of `sites.weights`.
///
/// # Errors
/// Where libtorch fails.
pub fn closed_form(
    model: &Clean,
    sites: &Sites,
    quantized: &[Tensor],
    targets: &Targets,
    seen: Seen<'_>,
) -> Result<Corrections, jit::Error> {
    let sums = seen.inputs.with_statistics(targets, seen.statistics)?;
    let mut corrections = Corrections { biases: Vec::new(), left_out: targets.left_out.clone() };
    for target in &targets.ops {
        let value = sites.weights.get(target.weight).and_then(|site| site.values.first().copied());
        let (Some(value), Some(quantized), Some(sum)) = (value, quantized.get(target.weight), sums.get(target.input))
        else {
            continue;
        };
        let reading = targets.inputs.get(target.input).map(|input| &input.reading);
        let outcome = match added(&on_cpu(model, value)?, quantized, target, sum)? {
            Ok(added) => shape(reading, sum, &added)?.map(|shape| (added, shape)),
            Err(reason) => Err(reason),
        };
        match outcome {
            Ok((added, shape)) => corrections.biases.push(bias(model, target, &added, &shape)?),
            Err(reason) => corrections.left_out.push(target.left_out(reason)),
        }
    }
    Ok(corrections)
}

/// What is added to each output channel; float32.
fn added(
    weight: &Tensor,
    quantized: &Tensor,
    target: &Target,
    sum: &Sum,
) -> Result<Result<Tensor, &'static str>, jit::Error> {
    let Some(total) = sum.total.as_ref().filter(|_| sum.count > 0) else {
        return Ok(Err("never ran on the calibration data"));
    };
    let means = total.f_to_device(Device::Cpu)?.f_mul_scalar(target.factor / sum.count as f64)?;
    let (weight, quantized) = (by_group(weight, target.form)?, by_group(quantized, target.form)?);
    let [groups, outputs, inputs, taps] = <[i64; 4]>::try_from(weight.size()).unwrap_or_default();
    if i64::try_from(means.numel()) != Ok(groups * inputs * taps) {
        return Ok(Err("its input has features at times that it has not at others"));
    }
    let means = means.f_reshape([groups, inputs * taps, 1])?;
    let rows = (PIECE / (groups * inputs * taps).max(1)).max(1);
    let mut pieces = Vec::new();
    for start in (0..outputs).step_by(usize::try_from(rows).unwrap_or(1)) {
        let piece = |of: &Tensor| of.f_narrow(1, start, rows.min(outputs - start))?.f_to_kind(Kind::Double);
        let difference = piece(&weight)?.f_sub(&piece(&quantized)?)?;
        pieces.push(difference.f_flatten(2, 3)?.f_bmm(&means)?);
    }
    let added = Tensor::f_cat(&pieces, 1)?.f_flatten(0, -1)?.f_to_kind(Kind::Float)?;
    let is_finite = added.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
    Ok(if is_finite { Ok(added) } else { Err("the mean of its input is not finite") })
}

/// A constant, wherever the model is.
fn on_cpu(model: &Clean, value: ValueId) -> Result<Tensor, jit::Error> {
    Ok(model.constant(value)?.f_to_device(Device::Cpu)?)
}

/// A weight as (groups, outputs of a group, inputs of a group, taps).
pub(super) fn by_group(weight: &Tensor, form: Form) -> Result<Tensor, tch::TchError> {
    let size = weight.size();
    let (first, second) = (size.first().copied().unwrap_or(1), size.get(1).copied().unwrap_or(1));
    let taps: i64 = size.iter().skip(2).product();
    match form {
        Form::OutputsFirst { groups } => weight.f_reshape([groups, first / groups.max(1), second, taps]),
        Form::InputsFirst { groups } => {
            weight.f_reshape([groups, first / groups.max(1), second, taps])?.f_transpose(1, 2)
        }
    }
}

/// The shape in which the channels meet those of the op's result.
fn shape(reading: Option<&Reading>, sum: &Sum, added: &Tensor) -> Result<Result<Vec<i64>, &'static str>, jit::Error> {
    let channels = i64::try_from(added.numel()).unwrap_or_default();
    Ok(match (reading, sum.ranks.as_slice()) {
        (Some(Reading::Columns), [1]) | (Some(Reading::Rows), _) => Ok(vec![channels]),
        (Some(Reading::Columns), ranks) if !ranks.contains(&1) => Ok(vec![channels, 1]),
        (Some(Reading::Columns), _) => Err("its input has one axis at times and more at others"),
        (Some(Reading::Positions(axes)), _) => Ok([channels].into_iter().chain(axes.iter().map(|_| 1)).collect()),
        (None, _) => Err("never ran on the calibration data"),
    })
}

pub(super) fn bias(model: &Clean, target: &Target, added: &Tensor, shape: &[i64]) -> Result<Bias, jit::Error> {
    let result = target.result;
    let (place, tensor) = match target.bias {
        OldBias::Constant(slot, value) => (Place::Input { result, slot }, on_cpu(model, value)?.f_add(added)?),
        OldBias::Absent(slot) => (Place::Input { result, slot }, added.shallow_clone()),
        OldBias::NoSlot => (Place::Addend(result), added.f_reshape(shape)?),
    };
    let added = jit::with_values(added, <[f32]>::to_vec)?;
    Ok(Bias { layer: target.layer.clone(), op: target.op.clone(), result, place, tensor, added })
}

#[cfg(test)]
mod tests {
    use super::super::geometry::{Axis, Padding};
    use super::super::targets::Input;
    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// A convolution, the same along both of its axes but for the lengths.
    #[derive(Debug, Clone, Copy)]
    struct Conv {
        kernel: i64,
        stride: i64,
        padding: i64,
        dilation: i64,
        groups: i64,
        transposed: Option<i64>,
    }

    fn target(form: Form) -> Target {
        let (layer, op) = ("layer".to_owned(), "op".to_owned());
        Target { layer, op, result: 0, slot: 0, weight: 0, form, input: 0, bias: OldBias::NoSlot, factor: 1.0 }
    }

    /// What is added for the error `difference` of a weight that meets these batches.
    fn added_for(difference: &Tensor, form: Form, reading: &Reading, batches: &[Tensor]) -> (Tensor, Sum) {
        let input = Input::at_tap(reading.clone());
        let targets = Targets { inputs: vec![input], ..Targets::default() };
        let mut sums = InputSums::new(&targets);
        batches.iter().for_each(|batch| sums.add(0, batch).unwrap());
        let sum = sums.take(0).unwrap();
        let found = added(difference, &difference.zeros_like(), &target(form), &sum).unwrap().unwrap();
        (found, sum)
    }

    #[track_caller]
    fn assert_near(expected: &Tensor, found: &Tensor) {
        let (expected, found) = (expected.to_kind(Kind::Double), found.to_kind(Kind::Double));
        assert!(found.allclose(&expected, 1e-5, 1e-5, false), "expected {expected:?}, found {found:?}");
    }

    fn check(conv: Conv) {
        let Conv { kernel, stride, padding, dilation, groups, transposed } = conv;
        let (inputs, outputs) = (2 * groups, 3 * groups);
        let size = match transposed {
            None => [outputs, inputs / groups, kernel, kernel],
            Some(_) => [inputs, outputs / groups, kernel, kernel],
        };
        let difference = Tensor::randn(size, FLOAT);
        // Batches and images of different sizes.
        let batches = [[2, 9, 7], [1, 8, 11]].map(|[rows, height, width]| {
            Tensor::randn([rows, inputs, height, width], FLOAT) + Tensor::randn([inputs, 1, 1], FLOAT)
        });
        let results = batches.each_ref().map(|batch| {
            let none: Option<&Tensor> = None;
            let (both, more) = (|size| [size, size], transposed.unwrap_or(0));
            let (stride, padding, dilation) = (both(stride), both(padding), both(dilation));
            let result = batch.convolution(
                &difference,
                none,
                stride,
                padding,
                dilation,
                transposed.is_some(),
                both(more),
                groups,
            );
            result.transpose(0, 1).flatten(1, -1)
        });
        let expected = Tensor::cat(&results, 1).mean_dim(1i64, false, Kind::Double);
        let axis = Axis { kernel, stride, padding: Padding::Zeros(padding), dilation, transposed };
        let form = match transposed {
            None => Form::OutputsFirst { groups },
            Some(_) => Form::InputsFirst { groups },
        };
        let (found, _) = added_for(&difference, form, &Reading::Positions(vec![axis; 2]), &batches);
        assert_near(&expected, &found);
    }

    #[test]
    fn convolutions_of_all_kinds() {
        tch::manual_seed(1);
        for (kernel, stride, padding, dilation) in
            [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (2, 3, 0, 2), (5, 2, 4, 1)]
        {
            for groups in [1, 4] {
                let conv = Conv { kernel, stride, padding, dilation, groups, transposed: None };
                check(conv);
                check(Conv { padding: padding.min(1), transposed: Some(0), ..conv });
                check(Conv { padding: 0, transposed: Some(stride - 1), ..conv });
            }
        }
    }

    #[test]
    fn products_with_the_weight_on_either_side() {
        tch::manual_seed(2);
        let batches = [Tensor::randn([4, 3, 5, 6], FLOAT) + 1.0, Tensor::randn([5, 6], FLOAT)];
        let mean = |results: [Tensor; 2]| Tensor::cat(&results, 1).mean_dim(1i64, false, Kind::Double);
        let right = Tensor::randn([6, 2], FLOAT);
        let expected = mean(batches.each_ref().map(|batch| batch.matmul(&right).movedim_int(-1, 0).flatten(1, -1)));
        let (found, _) = added_for(&right, Form::InputsFirst { groups: 1 }, &Reading::Rows, &batches);
        assert_near(&expected, &found);
        let left = Tensor::randn([2, 5], FLOAT);
        let expected = mean(batches.each_ref().map(|batch| left.matmul(batch).movedim_int(-2, 0).flatten(1, -1)));
        let (found, sum) = added_for(&left, Form::OutputsFirst { groups: 1 }, &Reading::Columns, &batches);
        assert_near(&expected, &found);
        assert_eq!(shape(Some(&Reading::Columns), &sum, &found).unwrap(), Ok(vec![2, 1]));
        let (found, sum) =
            added_for(&left, Form::OutputsFirst { groups: 1 }, &Reading::Columns, &[batches[1].select(1, 0)]);
        assert_near(&left.matmul(&batches[1].select(1, 0)), &found);
        assert_eq!(shape(Some(&Reading::Columns), &sum, &found).unwrap(), Ok(vec![2]));
    }

    #[test]
    fn inputs_that_tell_nothing() {
        let weight = Tensor::ones([2, 3], FLOAT);
        let added = |sum: &Sum| added(&weight, &weight.zeros_like(), &target(Form::OutputsFirst { groups: 1 }), sum);
        assert_eq!(added(&Sum::default()).unwrap().unwrap_err(), "never ran on the calibration data");
        let total = Some(Tensor::from_slice(&[1.0, f64::NAN, 2.0]).unsqueeze(-1));
        let sum = Sum { total, count: 1, ranks: vec![2] };
        assert_eq!(added(&sum).unwrap().unwrap_err(), "the mean of its input is not finite");
    }
}
