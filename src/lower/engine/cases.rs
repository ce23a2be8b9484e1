//! Layers of few values that engines get wrong where sums of products do not fit, with their exact results. It refuses to know
//! what follows from a wrong one.

use tch::{Device, Kind, Tensor};

use super::Task;
use crate::jit::{self, Attribute, KernelRun, Operand};

/// Of more channels of a group, and of more groups, so many are tried, and what is left over of sixteens: kernels take them in blocks.
const MOST_CHANNELS: i64 = 64;
const MOST_GROUPS: i64 = 256;
/// The same of inputs with many positions.
const MOST_CHANNELS_OF_MANY: i64 = 16;
/// These are many.
const MANY_POSITIONS: i64 = 1024;

/// Positions of a result along each axis.
const POSITIONS: i64 = 5;

/// How a convolution meets its input, one number for each axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::lower) struct Geometry {
    pub(in crate::lower) stride: Vec<i64>,
    pub(in crate::lower) padding: Vec<i64>,
    pub(in crate::lower) dilation: Vec<i64>,
    pub(in crate::lower) groups: i64,
    /// Of a transposed one.
    pub(in crate::lower) output_padding: Option<Vec<i64>>,
}

impl Geometry {
    /// Of a convolution whose results lie as its inputs.
    pub(super) fn plain(taps: &[i64], groups: i64) -> Self {
        let ones = vec![1; taps.len()];
        let padding = taps.iter().map(|taps| taps / 2).collect();
        Self { stride: ones.clone(), padding, dilation: ones, groups, output_padding: None }
    }

    /// Of a transposed one with twice as many results along each axis.
    fn transposed(spatial: usize) -> Self {
        let [zeros, ones, twos] = [0, 1, 2].map(|number| vec![number; spatial]);
        Self { stride: twos, padding: ones.clone(), dilation: ones, groups: 1, output_padding: Some(zeros) }
    }

    fn spatial(&self) -> usize {
        self.stride.len()
    }

    /// Extents of an input that gives few results with windows of these taps.
    fn extents(&self, taps: &[i64]) -> Vec<i64> {
        let axes = self.stride.iter().zip(&self.padding).zip(&self.dilation).zip(taps);
        let extent = |(((stride, padding), dilation), taps): (((&i64, &i64), &i64), &i64)| {
            let window = dilation * (taps - 1) + 1;
            match self.output_padding {
                // No smaller than the window, as some tap would meet nothing but padding.
                None => ((POSITIONS - 1) * stride + window - 2 * padding).max(window),
                Some(_) => POSITIONS.max((POSITIONS + 2 * padding - window).max(0) / stride.max(&1) + 2),
            }
        };
        axes.map(extent).collect()
    }

    /// Of its pack op, behind weight and bias.
    pub(in crate::lower) fn operands(&self) -> Vec<Operand> {
        let lists = [Some(&self.stride), Some(&self.padding), self.output_padding.as_ref(), Some(&self.dilation)];
        let lists = lists.into_iter().flatten().map(|list| Operand::Ints(list.clone()));
        lists.chain([Operand::Int(self.groups)]).collect()
    }

    /// The op that packs its weight, and its kernel.
    fn ops(&self) -> (&'static str, &'static str) {
        match (self.output_padding.is_some(), self.spatial()) {
            (false, 1) => ("quantized::conv1d_prepack", "quantized::conv1d"),
            (false, 2) => ("quantized::conv2d_prepack", "quantized::conv2d"),
            (false, _) => ("quantized::conv3d_prepack", "quantized::conv3d"),
            (true, 1) => ("quantized::conv_transpose1d_prepack", "quantized::conv_transpose1d"),
            (true, 2) => ("quantized::conv_transpose2d_prepack", "quantized::conv_transpose2d"),
            (true, _) => ("quantized::conv_transpose3d_prepack", "quantized::conv_transpose3d"),
        }
    }
}

/// A layer with its input as whole numbers.
pub(super) struct Case {
    /// `None` of a linear layer.
    pub(super) geometry: Option<Geometry>,
    /// Levels 0 to 255 without the zero point, as numbers.
    pub(super) input: Tensor,
    /// Values −128 to 127, as numbers.
    pub(super) weight: Tensor,
    /// The level of zero in the input.
    pub(super) zero_point: i64,
    /// The result is counted one by one around that in the middle, by a bias; else its range is spread over the levels.
    pub(super) is_centred: bool,
}

/// Extreme values and others, with inputs up to `highest`: products of 255 and −128 do not fit 16 bits when two are added.
pub(super) fn cases(task: Task, highest: f64) -> Vec<Case> {
    let window = |input: &[i64], weight: &[i64], groups: i64| {
        extremes((Some(&Geometry::plain(&weight[2..], groups)), input, weight), highest)
    };
    let transposed = |input: &[i64], weight: &[i64]| {
        extremes((Some(&Geometry::transposed(weight.len() - 2)), input, weight), highest)
    };
    match task {
        Task::Window => window(&[2, 16, 9, 9], &[24, 16, 3, 3], 1),
        Task::Pointwise => window(&[2, 64, 5, 5], &[32, 64, 1, 1], 1),
        Task::Depthwise => {
            let mut cases = window(&[2, 144, 9, 9], &[144, 1, 3, 3], 144);
            cases.extend(window(&[2, 144, 9, 9], &[144, 1, 5, 5], 144).into_iter().take(1));
            cases
        }
        Task::BoundedDepthwise => {
            let sizes = [3, 5, 7].into_iter();
            sizes
                .flat_map(|size| bounded(&Geometry::plain(&[size, size], 144), &[144, 1, size, size], highest))
                .collect()
        }
        Task::Linear => extremes((None, &[3, 64], &[40, 64]), highest),
        Task::Transposed => transposed(&[2, 16, 5, 5], &[16, 24, 3, 3]),
        Task::TransposedVolume => transposed(&[2, 8, 3, 3, 3], &[8, 16, 3, 3, 3]),
    }
}

/// The same for a convolution with a weight of this shape, of fewer channels where it has many; `is_bounded`: its weights are.
pub(super) fn cases_of(geometry: &Geometry, shape: &[i64], is_bounded: bool, highest: f64) -> Vec<Case> {
    let &[first, second, ref taps @ ..] = shape else { return Vec::new() };
    let some = |count: i64, most: i64| if count > most { most + count % 16 } else { count };
    let extents = geometry.extents(taps);
    let is_large = extents.iter().product::<i64>() > MANY_POSITIONS;
    let most = if is_large { MOST_CHANNELS_OF_MANY } else { MOST_CHANNELS };
    let own = geometry.groups.max(1);
    let groups = some(own, MOST_GROUPS);
    let first = groups * some((first / own).max(1), most);
    let weight: Vec<i64> = [first, some(second, most)].into_iter().chain(taps.iter().copied()).collect();
    let geometry = Geometry { groups, ..geometry.clone() };
    if is_bounded {
        return bounded(&geometry, &weight, highest);
    }
    let channels = if geometry.output_padding.is_some() { weight[0] } else { groups * weight[1] };
    let input: Vec<i64> = [2, channels].into_iter().chain(extents).collect();
    let mut cases = extremes((Some(&geometry), &input, &weight), highest);
    // Zeros around the input are not its lowest level then.
    let middle = ((highest + 1.0) / 2.0).round();
    let shifted = cases.last().map(|case| Case {
        geometry: case.geometry.clone(),
        input: &case.input - middle,
        weight: case.weight.shallow_clone(),
        zero_point: middle as i64,
        is_centred: false,
    });
    cases.extend(shifted);
    cases
}

fn full(shape: &[i64], value: f64) -> Tensor {
    Tensor::full(shape, value, (Kind::Double, Device::Cpu))
}

fn extremes((geometry, input, weight): (Option<&Geometry>, &[i64], &[i64]), highest: f64) -> Vec<Case> {
    let extreme = |shape: &[i64], seed: i64, ends: [f64; 2]| -> Tensor {
        let count: i64 = shape.iter().product();
        // A sequence without a period that windows share.
        let index = Tensor::arange(count, (Kind::Double, Device::Cpu));
        let noise = (index * (0.754_877_666 + 0.01 * seed as f64)).fmod(1.0);
        (noise.ge(0.5).to_kind(Kind::Double) * (ends[1] - ends[0]) + ends[0]).reshape(shape)
    };
    let case = |input: Tensor, weight: Tensor| Case {
        geometry: geometry.cloned(),
        input,
        weight,
        zero_point: 0,
        is_centred: false,
    };
    vec![
        case(full(input, highest), full(weight, 127.0)),
        case(full(input, highest), full(weight, -128.0)),
        case(extreme(input, 1, [0.0, highest]), extreme(weight, 2, [-128.0, 127.0])),
        case(full(input, highest), extreme(weight, 3, [-128.0, 127.0])),
    ]
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

/// A depthwise convolution with weights all of one pair and of all in turn.
fn bounded(geometry: &Geometry, shape: &[i64], highest: f64) -> Vec<Case> {
    let (channels, taps) = (shape[0], &shape[2..]);
    let count: i64 = taps.iter().product();
    let weight = |pair: &dyn Fn(i64, i64) -> [f64; 2]| -> Tensor {
        let channel = |channel: i64| {
            let levels = (0..(count + 1) / 2).flat_map(move |place| pair(channel, place));
            levels.take(count.unsigned_abs() as usize)
        };
        let levels: Vec<f64> = (0..channels).flat_map(channel).collect();
        Tensor::from_slice(&levels).reshape(shape)
    };
    let pair = |number: i64| PAIRS[number.unsigned_abs() as usize % PAIRS.len()];
    let input: Vec<i64> = [2, geometry.groups]
        .into_iter()
        .chain(geometry.extents(taps).into_iter().map(|extent| extent.max(9)))
        .collect();
    let input = full(&input, highest);
    let spread = (Tensor::arange(input.numel() as i64, (Kind::Double, Device::Cpu)) * 0.754_877_666).fmod(1.0);
    let spread = (spread * (highest + 1.0)).floor().reshape(input.size());
    let mut cases = Vec::new();
    for weight in [weight(&|channel, _| pair(channel)), weight(&|channel, place| pair(channel + place))] {
        for (input, is_centred) in [(&input, true), (&input, false), (&spread, false)] {
            let (input, weight) = (input.shallow_clone(), weight.shallow_clone());
            cases.push(Case { geometry: Some(geometry.clone()), input, weight, zero_point: 0, is_centred });
        }
    }
    cases
}

impl Case {
    /// Whether no value is more than a level off; an error is as good as a wrong answer.
    pub(super) fn is_right(&self) -> Result<bool, jit::Error> {
        let mut exact = self.exact()?;
        let mut bias = None;
        let largest = exact.f_abs()?.f_max()?.f_double_value(&[])?;
        let mut scale = if largest > 0.0 { largest / 120.0 } else { 1.0 };
        if self.is_centred {
            let mut own = exact.f_select(0, 0)?;
            while own.dim() > 1 {
                own = own.f_select(1, own.size()[1] / 2)?;
            }
            let own = own.f_neg()?;
            let behind = std::iter::repeat_n(1, exact.dim().saturating_sub(2));
            (exact, scale) = (exact.f_add(&own.f_reshape([-1].into_iter().chain(behind).collect::<Vec<i64>>())?)?, 1.0);
            bias = Some(own.f_to_kind(Kind::Float)?);
        }
        let expected = exact.f_mul_scalar(1.0 / scale)?.f_round()?.f_add_scalar(128.0)?.f_clamp(0.0, 255.0)?;
        let found = self.run(bias, scale, 1)?.f_int_repr()?.f_to_kind(Kind::Double)?;
        let most = if self.is_centred { 0.0 } else { 1.0 };
        Ok(found.size() == expected.size() && found.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])? <= most)
    }

    fn exact(&self) -> Result<Tensor, jit::Error> {
        let none: Option<&Tensor> = None;
        let Some(geometry) = &self.geometry else { return Ok(self.input.f_linear(&self.weight, none)?) };
        let Geometry { stride, padding, dilation, groups, output_padding } = geometry;
        let (is_transposed, zeros) = (output_padding.is_some(), vec![0; stride.len()]);
        let output_padding = output_padding.as_ref().unwrap_or(&zeros);
        let (input, weight) = (&self.input, &self.weight);
        Ok(input.f_convolution(weight, none, stride, padding, dilation, is_transposed, output_padding, *groups)?)
    }

    pub(super) fn run(&self, bias: Option<Tensor>, scale: f64, runs: usize) -> Result<Tensor, jit::Error> {
        let input = self.input.f_to_kind(Kind::Float)?.f_quantize_per_tensor(1.0, self.zero_point, Kind::QUInt8)?;
        let weight = self.weight.f_to_kind(Kind::Int8)?;
        // There is no kernel for transposed convolutions with a scale for each channel.
        let weight = if self.geometry.as_ref().is_some_and(|geometry| geometry.output_padding.is_some()) {
            weight.f_internal_make_per_tensor_quantized_tensor(1.0, 0)?
        } else {
            let channels = self.weight.size().first().copied().unwrap_or(1);
            let scales = Tensor::f_ones([channels], (Kind::Double, Device::Cpu))?;
            let zeros = Tensor::f_zeros([channels], (Kind::Int64, Device::Cpu))?;
            weight.f_internal_make_per_channel_quantized_tensor(&scales, &zeros, 0)?
        };
        let mut operands = vec![Operand::Tensor(0), if bias.is_some() { Operand::Tensor(1) } else { Operand::None }];
        let (pack, op) = match &self.geometry {
            None => ("quantized::linear_prepack", "quantized::linear"),
            Some(geometry) => {
                operands.extend(geometry.operands());
                geometry.ops()
            }
        };
        let pack = Attribute { name: String::new(), op: Some(pack), operands };
        let tensors: Vec<Tensor> = [weight].into_iter().chain(bias).collect();
        jit::pack_and_run(&pack, &tensors, op, (&input, KernelRun { scale, zero_point: 128, runs }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However it is padded, each tap meets what is no padding, and neighbours do so together.
    #[test]
    fn each_tap_meets_the_input() {
        for (taps, stride, padding, dilation) in
            [(3, 1, 1, 1), (3, 1, 18, 18), (3, 2, 16, 8), (2, 1, 5, 10), (31, 1, 15, 1), (1, 4, 0, 1)]
        {
            let geometry = Geometry {
                stride: vec![stride],
                padding: vec![padding],
                dilation: vec![dilation],
                groups: 1,
                output_padding: None,
            };
            let extent = geometry.extents(&[taps])[0];
            let results = (extent + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
            let meets = |result: i64, tap: i64| (0..extent).contains(&(result * stride + tap * dilation - padding));
            let together =
                |tap: i64| (0..results).any(|result| meets(result, tap) && meets(result, (tap + 1).min(taps - 1)));
            assert!(results > 0 && (0..taps).all(together), "{geometry:?}");
        }
    }

    #[test]
    fn transposed_ones_have_results() {
        for (taps, stride, padding) in [(1, 4, 9), (3, 2, 1), (4, 2, 1), (2, 2, 0), (7, 1, 6)] {
            let lists = [stride, padding, 1, 0].map(|number| vec![number]);
            let [stride_list, padding_list, dilation, output_padding] = lists;
            let geometry = Geometry {
                stride: stride_list,
                padding: padding_list,
                dilation,
                groups: 1,
                output_padding: Some(output_padding),
            };
            let results = (geometry.extents(&[taps])[0] - 1) * stride - 2 * padding + taps;
            assert!(results >= POSITIONS, "{geometry:?}: {results}");
        }
    }

    #[test]
    fn many_channels_are_tried_as_fewer() {
        let shapes = |groups: i64, shape: &[i64]| {
            let geometry = Geometry::plain(&shape[2..], groups);
            let case = cases_of(&geometry, shape, false, 255.0).pop().unwrap();
            (case.input.size()[1], case.weight.size())
        };
        assert_eq!(shapes(1, &[24, 3, 3, 3]), (3, vec![24, 3, 3, 3]));
        assert_eq!(shapes(1, &[1000, 72, 1, 1]), (72, vec![72, 72, 1, 1]));
        assert_eq!(shapes(300, &[600, 1, 3, 3]), (268, vec![536, 1, 3, 3]));
    }
}
