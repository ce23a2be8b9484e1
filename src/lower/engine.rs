//! The libraries that 8-bit kernels can run on: what each computes wrong on this machine, and how fast it is. Flags of the
//! processor do not tell that; a trial does.

use std::sync::OnceLock;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::config::EnginePlan;
use crate::jit::{self, Attribute, KernelRun, Operand};

/// Runs that are timed together.
const RUNS: usize = 10;

/// What engines have kernels of their own for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    /// A convolution with a window.
    Window,
    /// A convolution with one tap.
    Pointwise,
    /// A convolution of each channel by itself.
    Depthwise,
    /// The same, with weights of which the positive and the negative ones in each pair of neighbouring taps add up to at most 128
    /// levels: no sum of two products overflows 16 bits then.
    BoundedDepthwise,
    /// A linear layer.
    Linear,
    /// A transposed convolution in 1 or 2 dimensions, its weights with one scale.
    Transposed,
    /// The same in 3 dimensions.
    TransposedVolume,
}

impl Task {
    const ALL: [Self; 7] = [
        Self::Window,
        Self::Pointwise,
        Self::Depthwise,
        Self::BoundedDepthwise,
        Self::Linear,
        Self::Transposed,
        Self::TransposedVolume,
    ];

    /// A transposed convolution over so many axes.
    pub(super) fn of_transposed(spatial: usize) -> Self {
        if spatial == 3 { Self::TransposedVolume } else { Self::Transposed }
    }

    /// Whether only some models need it.
    fn is_dispensable(self) -> bool {
        matches!(self, Self::Transposed | Self::TransposedVolume)
    }

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Window => "convolutions",
            Self::Pointwise => "1x1 convolutions",
            Self::Depthwise => "depthwise convolutions",
            Self::BoundedDepthwise => "depthwise convolutions with bounded weights",
            Self::Linear => "linear layers",
            Self::Transposed => "transposed convolutions",
            Self::TransposedVolume => "transposed convolutions in 3 dimensions",
        }
    }
}

/// What a trial of one engine showed.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// The engine.
    pub engine: EnginePlan,
    /// What it computes wrong, or not at all.
    pub wrong: Vec<Task>,
    /// What of that it computes wrong even where activations have levels 0 to 127 alone.
    pub wrong_in_7_bits: Vec<Task>,
    /// Seconds for one of each task but the transposed ones; infinite where it is wrong in one of them that no bound cures.
    pub seconds: f64,
}

impl Trial {
    /// Whether it computes all that a model without transposed convolutions needs.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.wrong.iter().all(|task| task.is_dispensable())
    }

    /// The same, where depthwise convolutions have bounded weights.
    #[must_use]
    pub fn is_right_with_bounds(&self) -> bool {
        self.wrong.iter().all(|&task| task.is_dispensable() || task == Task::Depthwise)
    }

    /// Whether it computes a task right whose activations have levels 0 to 255, or else 0 to 127.
    #[must_use]
    pub fn computes(&self, task: Task, has_7_bits: bool) -> bool {
        let wrong = if has_7_bits { &self.wrong_in_7_bits } else { &self.wrong };
        !wrong.contains(&task)
    }

    /// Whether weights of depthwise convolutions have to be bounded, and are right then.
    #[must_use]
    pub fn bounds_depthwise(&self, has_7_bits: bool) -> bool {
        !self.computes(Task::Depthwise, has_7_bits) && self.computes(Task::BoundedDepthwise, has_7_bits)
    }

    /// Whether activations of 7 bits cure what bounded weights do not.
    #[must_use]
    pub fn asks_for_7_bits(&self) -> bool {
        let is_bounded = self.bounds_depthwise(false);
        let is_left = |task: &Task| !task.is_dispensable() && !(is_bounded && *task == Task::Depthwise);
        self.wrong.iter().any(|task| is_left(task) && self.computes(*task, true))
    }
}

/// The trials of all engines that this libtorch has.
#[must_use]
pub fn trials() -> Vec<&'static Trial> {
    EnginePlan::NAMED.into_iter().filter_map(trial).collect()
}

/// The trial of an engine, which takes about a second, once in a process; `None` where this libtorch has it not.
#[must_use]
pub fn trial(engine: EnginePlan) -> Option<&'static Trial> {
    static TRIALS: [OnceLock<Option<Trial>>; 4] = [const { OnceLock::new() }; 4];
    let place = EnginePlan::NAMED.iter().position(|named| *named == engine)?;
    let trial = TRIALS.get(place)?.get_or_init(|| {
        let before = jit::engine();
        let trial = try_out(engine);
        // One that was set can be set again.
        let _ = jit::set_engine(&before);
        trial
    });
    trial.as_ref()
}

/// The fastest engine that is right; else the fastest that is right with bounded weights; else the one that gets fewest tasks
/// wrong.
#[must_use]
pub fn fastest<'a>(trials: &[&'a Trial]) -> Option<&'a Trial> {
    let order = |trial: &&&Trial| {
        let (is_right, is_cured) = (trial.is_right(), trial.is_right_with_bounds());
        (!is_right, !is_cured, if is_cured { 0 } else { trial.wrong.len() })
    };
    trials.iter().min_by(|a, b| order(a).cmp(&order(b)).then(a.seconds.total_cmp(&b.seconds))).copied()
}

fn try_out(engine: EnginePlan) -> Option<Trial> {
    jit::set_engine(engine.name()).ok()?;
    let is_wrong = |task: Task, highest: f64| !cases(task, highest).iter().all(|case| case.is_right().unwrap_or(false));
    let wrong: Vec<Task> = Task::ALL.into_iter().filter(|&task| is_wrong(task, 255.0)).collect();
    let wrong_in_7_bits = wrong.iter().copied().filter(|&task| is_wrong(task, 127.0)).collect();
    let mut trial = Trial { engine, wrong, wrong_in_7_bits, seconds: f64::INFINITY };
    if trial.is_right_with_bounds() {
        let timed = [Task::Window, Task::Pointwise, Task::Depthwise, Task::Linear];
        let tasks = timed.into_iter();
        trial.seconds = tasks.filter_map(|task| time(task).ok()).sum();
    }
    Some(trial)
}

/// A layer with its input as whole numbers.
struct Case {
    task: Task,
    /// Values 0 to 255, as numbers.
    input: Tensor,
    /// Values −128 to 127, as numbers.
    weight: Tensor,
    groups: i64,
    /// The result is counted one by one around that in the middle, by a bias; else its range is spread over the levels.
    is_centred: bool,
}

/// Extreme values and others, with inputs up to `highest`: products of 255 and −128 do not fit 16 bits when two are added.
fn cases(task: Task, highest: f64) -> Vec<Case> {
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
    fn is_right(&self) -> Result<bool, jit::Error> {
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

    fn run(&self, bias: Option<Tensor>, scale: f64, runs: usize) -> Result<Tensor, jit::Error> {
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

/// Seconds of one task at a size that networks have.
fn time(task: Task) -> Result<f64, jit::Error> {
    let (input, weight, groups): ([i64; 4], [i64; 4], i64) = match task {
        Task::Window => ([1, 64, 28, 28], [64, 64, 3, 3], 1),
        Task::Pointwise => ([1, 96, 28, 28], [96, 96, 1, 1], 1),
        Task::Depthwise => ([1, 192, 28, 28], [192, 1, 3, 3], 192),
        _ => ([1, 512, 1, 1], [512, 512, 1, 1], 1),
    };
    let ones = |shape: [i64; 4]| Tensor::f_ones(shape, (Kind::Double, Device::Cpu));
    let (input, weight) = (ones(input)?, ones(weight)?);
    let is_linear = task == Task::Linear;
    let flat = |tensor: Tensor| if is_linear { tensor.f_flatten(1, -1) } else { Ok(tensor) };
    let case = Case { task, input: flat(input)?, weight: flat(weight)?, groups, is_centred: false };
    let seconds = |runs: usize| {
        let start = Instant::now();
        case.run(None, 1000.0, runs).map(|_| start.elapsed().as_secs_f64())
    };
    // What is made once for all runs of a kernel takes long.
    seconds(1)?;
    let (mut few, mut many) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..3 {
        // Packing takes as long as many runs.
        few = few.min(seconds(2)?);
        many = many.min(seconds(2 + RUNS)?);
    }
    Ok((many - few).max(f64::MIN_POSITIVE) / RUNS as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(engine: EnginePlan, wrong: &[Task], seconds: f64) -> Trial {
        Trial { engine, wrong: wrong.to_vec(), wrong_in_7_bits: Vec::new(), seconds }
    }

    #[test]
    fn a_fast_engine_that_is_wrong_loses() {
        let trials = [
            tried(EnginePlan::Onednn, &[Task::Transposed], 3.0),
            tried(EnginePlan::X86, &[Task::Depthwise], 1.0),
            tried(EnginePlan::Qnnpack, &[], 4.0),
        ];
        let trials: Vec<&Trial> = trials.iter().collect();
        assert_eq!(fastest(&trials).map(|trial| trial.engine), Some(EnginePlan::Onednn));
        assert_eq!(fastest(&trials[1..2]).map(|trial| trial.engine), Some(EnginePlan::X86));
        assert_eq!(fastest(&[]), None);
    }

    #[test]
    fn what_an_engine_needs_of_activations_and_weights() {
        let trial = |wrong: &[Task], wrong_in_7_bits: &[Task]| {
            let trial = tried(EnginePlan::Fbgemm, wrong, 1.0);
            Trial { wrong_in_7_bits: wrong_in_7_bits.to_vec(), ..trial }
        };
        let needs = |trial: &Trial| {
            let has_7_bits = trial.asks_for_7_bits();
            (has_7_bits, trial.bounds_depthwise(has_7_bits))
        };
        use Task::{BoundedDepthwise, Depthwise, Linear, Transposed, Window};
        assert_eq!(needs(&trial(&[], &[])), (false, false));
        assert_eq!(needs(&trial(&[Transposed], &[])), (false, false));
        // What bounded weights cure needs no narrower activations.
        assert_eq!(needs(&trial(&[Depthwise, Transposed], &[])), (false, true));
        assert_eq!(needs(&trial(&[Depthwise], &[Depthwise])), (false, true));
        // What they do not cure does, and is cured along with the rest.
        assert_eq!(needs(&trial(&[Depthwise, BoundedDepthwise], &[])), (true, false));
        assert_eq!(needs(&trial(&[Window, Depthwise, Linear], &[])), (true, false));
        assert_eq!(needs(&trial(&[Window, Depthwise], &[Depthwise])), (true, true));
        // Where nothing is cured, nothing is given up.
        assert_eq!(needs(&trial(&[Window, Depthwise], &[Window, Depthwise])), (false, true));
        assert_eq!(needs(&trial(&[Window], &[Window])), (false, false));
    }

    #[test]
    fn an_engine_of_this_machine_is_right() {
        let trials = trials();
        let right: Vec<_> = trials.iter().filter(|trial| trial.is_right()).collect();
        assert!(!right.is_empty(), "{trials:?}");
        assert!(right.iter().all(|trial| trial.seconds > 0.0 && trial.seconds.is_finite()), "{trials:?}");
    }
}
