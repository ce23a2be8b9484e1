//! Layers of few values that engines get wrong where sums of products do not fit, with their exact results. It refuses to know
//! what follows from a wrong one.

use tch::{Device, Kind, Tensor};

use super::Task;
use crate::jit::{self, Attribute, KernelRun, Operand};

/// A layer with its input as whole numbers.
pub(super) struct Case {
    pub(super) task: Task,
    /// Values 0 to 255, as numbers.
    pub(super) input: Tensor,
    /// Values −128 to 127, as numbers.
    pub(super) weight: Tensor,
    pub(super) groups: i64,
    /// The result is counted one by one around that in the middle, by a bias; else its range is spread over the levels.
    pub(super) is_centred: bool,
}

/// Extreme values and others, with inputs up to `highest`: products of 255 and −128 do not fit 16 bits when two are added.
pub(super) fn cases(task: Task, highest: f64) -> Vec<Case> {
    if task == Task::BoundedDepthwise {
        return bounded_cases(highest);
    }
    let extreme = |shape: &[i64], seed: i64, ends: [f64; 2]| -> Tensor {
        let count: i64 = shape.iter().product();
        // A sequence without a period that windows share.
        let index = Tensor::arange(count, (Kind::Double, Device::Cpu));
        let noise = (index * (0.754_877_666 + 0.01 * seed as f64)).fmod(1.0);
        (noise.ge(0.5).to_kind(Kind::Double) * (ends[1] - ends[0]) + ends[0]).reshape(shape)
    };
    let full = |shape: &[i64], value: f64| Tensor::full(shape, value, (Kind::Double, Device::Cpu));
    let (input, weight, groups): (Vec<i64>, Vec<i64>, i64) = match task {
        Task::Window => (vec![2, 16, 9, 9], vec![24, 16, 3, 3], 1),
        Task::Pointwise => (vec![2, 64, 5, 5], vec![32, 64, 1, 1], 1),
        Task::Depthwise | Task::BoundedDepthwise => (vec![2, 144, 9, 9], vec![144, 1, 3, 3], 144),
        Task::Linear => (vec![3, 64], vec![40, 64], 1),
        Task::Transposed => (vec![2, 16, 5, 5], vec![16, 24, 3, 3], 1),
        Task::TransposedVolume => (vec![2, 8, 3, 3, 3], vec![8, 16, 3, 3, 3], 1),
    };
    let case = |input: Tensor, weight: Tensor| Case { task, input, weight, groups, is_centred: false };
    let mut cases = vec![
        case(full(&input, highest), full(&weight, 127.0)),
        case(full(&input, highest), full(&weight, -128.0)),
        case(extreme(&input, 1, [0.0, highest]), extreme(&weight, 2, [-128.0, 127.0])),
        case(full(&input, highest), extreme(&weight, 3, [-128.0, 127.0])),
    ];
    if task == Task::Depthwise {
        cases.push(case(full(&input, highest), full(&[144, 1, 5, 5], 127.0)));
    }
    cases
}

/// The most extreme pairs of neighbouring taps under the bound.
const PAIRS: [[f64; 2]; 9] = [
    [64.0, 64.0],
    [-64.0, -64.0],
    [127.0, 1.0],
    [0.0, 127.0],
    [-128.0, 0.0],
    [-1.0, -127.0],
    [127.0, -128.0],
    [-128.0, 127.0],
    [100.0, 28.0],
];

/// Depthwise convolutions with windows of several sizes, all of one pair and of all in turn.
fn bounded_cases(highest: f64) -> Vec<Case> {
    let channels: i64 = 144;
    let weight = |size: i64, pair: &dyn Fn(i64, i64) -> [f64; 2]| -> Tensor {
        let channel = |channel: i64| {
            let taps = (0..(size * size + 1) / 2).flat_map(move |place| pair(channel, place));
            taps.take((size * size).unsigned_abs() as usize)
        };
        let levels: Vec<f64> = (0..channels).flat_map(channel).collect();
        Tensor::from_slice(&levels).reshape([channels, 1, size, size])
    };
    let pair = |number: i64| PAIRS[number.unsigned_abs() as usize % PAIRS.len()];
    let mut cases = Vec::new();
    for size in [3, 5, 7] {
        let input = Tensor::full([2, channels, 9, 9], highest, (Kind::Double, Device::Cpu));
        let spread = (Tensor::arange(input.numel() as i64, (Kind::Double, Device::Cpu)) * 0.754_877_666).fmod(1.0);
        let spread = (spread * (highest + 1.0)).floor().reshape(input.size());
        for weight in [weight(size, &|channel, _| pair(channel)), weight(size, &|channel, place| pair(channel + place))]
        {
            for (input, is_centred) in [(&input, true), (&input, false), (&spread, false)] {
                let (task, input, weight) = (Task::BoundedDepthwise, input.shallow_clone(), weight.shallow_clone());
                cases.push(Case { task, input, weight, groups: channels, is_centred });
            }
        }
    }
    cases
}

impl Case {
    /// Whether no value is more than a level off; an error is as good as a wrong answer.
    pub(super) fn is_right(&self) -> Result<bool, jit::Error> {
        let mut exact = self.exact()?;
        let mut bias = None;
        let mut scale = exact.f_abs()?.f_max()?.f_double_value(&[])? / 120.0;
        if self.is_centred {
            let middle = |tensor: &Tensor, axis: i64| tensor.f_select(axis, tensor.size()[axis as usize] / 2);
            let own = middle(&middle(&exact.f_select(0, 0)?, 2)?, 1)?.f_neg()?;
            (exact, scale) = (exact.f_add(&own.f_reshape([-1, 1, 1])?)?, 1.0);
            bias = Some(own.f_to_kind(Kind::Float)?);
        }
        let expected = exact.f_mul_scalar(1.0 / scale)?.f_round()?.f_add_scalar(128.0)?.f_clamp(0.0, 255.0)?;
        let found = self.run(bias, scale, 1)?.f_int_repr()?.f_to_kind(Kind::Double)?;
        let most = if self.is_centred { 0.0 } else { 1.0 };
        Ok(found.size() == expected.size() && found.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])? <= most)
    }

    fn exact(&self) -> Result<Tensor, jit::Error> {
        let none: Option<&Tensor> = None;
        let padding =
            if self.task == Task::Pointwise { 0 } else { self.weight.size()[2..].first().map_or(0, |k| k / 2) };
        let exact = match self.task {
            Task::Linear => self.input.f_linear(&self.weight, none)?,
            Task::Transposed => self.input.f_conv_transpose2d(&self.weight, none, [2; 2], [1; 2], [0; 2], 1, [1; 2])?,
            Task::TransposedVolume => {
                self.input.f_conv_transpose3d(&self.weight, none, [2; 3], [1; 3], [0; 3], 1, [1; 3])?
            }
            _ => self.input.f_conv2d(&self.weight, none, [1, 1], [padding; 2], [1, 1], self.groups)?,
        };
        Ok(exact)
    }

    pub(super) fn run(&self, bias: Option<Tensor>, scale: f64, runs: usize) -> Result<Tensor, jit::Error> {
        let input = self.input.f_to_kind(Kind::Float)?.f_quantize_per_tensor(1.0, 0, Kind::QUInt8)?;
        let weight = self.weight.f_to_kind(Kind::Int8)?;
        // There is no kernel for transposed convolutions with a scale for each channel.
        let weight = if self.task.is_dispensable() {
            weight.f_internal_make_per_tensor_quantized_tensor(1.0, 0)?
        } else {
            let channels = self.weight.size().first().copied().unwrap_or(1);
            let scales = Tensor::f_ones([channels], (Kind::Double, Device::Cpu))?;
            let zeros = Tensor::f_zeros([channels], (Kind::Int64, Device::Cpu))?;
            weight.f_internal_make_per_channel_quantized_tensor(&scales, &zeros, 0)?
        };
        let padding = self.weight.size().get(2).map_or(0, |kernel| kernel / 2);
        let spatial = self.weight.dim().saturating_sub(2);
        let list = |number: i64| Operand::Ints(vec![number; spatial]);
        let groups = Operand::Int(self.groups);
        let mut operands = vec![Operand::Tensor(0), if bias.is_some() { Operand::Tensor(1) } else { Operand::None }];
        let (pack, op) = match self.task {
            Task::Linear => ("quantized::linear_prepack", "quantized::linear"),
            Task::Transposed => {
                operands.extend([list(2), list(1), list(0), list(1), groups]);
                ("quantized::conv_transpose2d_prepack", "quantized::conv_transpose2d")
            }
            Task::TransposedVolume => {
                operands.extend([list(2), list(1), list(0), list(1), groups]);
                ("quantized::conv_transpose3d_prepack", "quantized::conv_transpose3d")
            }
            _ => {
                operands.extend([list(1), list(padding), list(1), groups]);
                ("quantized::conv2d_prepack", "quantized::conv2d")
            }
        };
        let pack = Attribute { name: String::new(), op: Some(pack), operands };
        let tensors: Vec<Tensor> = [weight].into_iter().chain(bias).collect();
        jit::pack_and_run(&pack, &tensors, op, (&input, KernelRun { scale, zero_point: 128, runs }))
    }
}
