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
    /// A linear layer.
    Linear,
    /// A transposed convolution.
    Transposed,
}

impl Task {
    const ALL: [Self; 5] = [Self::Window, Self::Pointwise, Self::Depthwise, Self::Linear, Self::Transposed];

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Window => "convolutions",
            Self::Pointwise => "1x1 convolutions",
            Self::Depthwise => "depthwise convolutions",
            Self::Linear => "linear layers",
            Self::Transposed => "transposed convolutions",
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
    /// Seconds for one of each task but the transposed one; infinite where it is wrong in one of them.
    pub seconds: f64,
}

impl Trial {
    /// Whether it computes all that a model without transposed convolutions needs.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.wrong.iter().all(|&task| task == Task::Transposed)
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

/// The fastest engine that is right; the one that gets fewest tasks wrong where there is none.
#[must_use]
pub fn fastest<'a>(trials: &[&'a Trial]) -> Option<&'a Trial> {
    let order = |trial: &&&Trial| (!trial.is_right(), if trial.is_right() { 0 } else { trial.wrong.len() });
    trials.iter().min_by(|a, b| order(a).cmp(&order(b)).then(a.seconds.total_cmp(&b.seconds))).copied()
}

fn try_out(engine: EnginePlan) -> Option<Trial> {
    jit::set_engine(engine.name()).ok()?;
    let is_wrong = |task: &Task| !cases(*task).iter().all(|case| case.is_right().unwrap_or(false));
    let wrong: Vec<Task> = Task::ALL.into_iter().filter(is_wrong).collect();
    let mut trial = Trial { engine, wrong, seconds: f64::INFINITY };
    if trial.is_right() {
        let tasks = Task::ALL.into_iter().filter(|task| *task != Task::Transposed);
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
}

/// Extreme values and others: products of 255 and −128 do not fit 16 bits when two are added.
fn cases(task: Task) -> Vec<Case> {
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
        Task::Depthwise => (vec![2, 144, 9, 9], vec![144, 1, 3, 3], 144),
        Task::Linear => (vec![3, 64], vec![40, 64], 1),
        Task::Transposed => (vec![2, 16, 5, 5], vec![16, 24, 3, 3], 1),
    };
    let case = |input: Tensor, weight: Tensor| Case { task, input, weight, groups };
    let mut cases = vec![
        case(full(&input, 255.0), full(&weight, 127.0)),
        case(full(&input, 255.0), full(&weight, -128.0)),
        case(extreme(&input, 1, [0.0, 255.0]), extreme(&weight, 2, [-128.0, 127.0])),
        case(full(&input, 255.0), extreme(&weight, 3, [-128.0, 127.0])),
    ];
    if task == Task::Depthwise {
        cases.push(case(full(&input, 255.0), full(&[144, 1, 5, 5], 127.0)));
    }
    cases
}

impl Case {
    /// Whether no value is more than a level off; an error is as good as a wrong answer.
    fn is_right(&self) -> Result<bool, jit::Error> {
        let exact = self.exact()?;
        let scale = exact.f_abs()?.f_max()?.f_double_value(&[])? / 120.0;
        let expected = exact.f_mul_scalar(1.0 / scale)?.f_round()?.f_add_scalar(128.0)?;
        let found = self.run(scale, 1)?.f_int_repr()?.f_to_kind(Kind::Double)?;
        Ok(found.size() == expected.size() && found.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])? <= 1.0)
    }

    fn exact(&self) -> Result<Tensor, jit::Error> {
        let none: Option<&Tensor> = None;
        let padding =
            if self.task == Task::Pointwise { 0 } else { self.weight.size()[2..].first().map_or(0, |k| k / 2) };
        let exact = match self.task {
            Task::Linear => self.input.f_linear(&self.weight, none)?,
            Task::Transposed => self.input.f_conv_transpose2d(&self.weight, none, [2, 2], [1, 1], [0, 0], 1, [1, 1])?,
            _ => self.input.f_conv2d(&self.weight, none, [1, 1], [padding; 2], [1, 1], self.groups)?,
        };
        Ok(exact)
    }

    fn run(&self, scale: f64, runs: usize) -> Result<Tensor, jit::Error> {
        let input = self.input.f_to_kind(Kind::Float)?.f_quantize_per_tensor(1.0, 0, Kind::QUInt8)?;
        let weight = self.weight.f_to_kind(Kind::Int8)?;
        // There is no kernel for transposed convolutions with a scale for each channel.
        let weight = if self.task == Task::Transposed {
            weight.f_internal_make_per_tensor_quantized_tensor(1.0, 0)?
        } else {
            let channels = self.weight.size().first().copied().unwrap_or(1);
            let scales = Tensor::f_ones([channels], (Kind::Double, Device::Cpu))?;
            let zeros = Tensor::f_zeros([channels], (Kind::Int64, Device::Cpu))?;
            weight.f_internal_make_per_channel_quantized_tensor(&scales, &zeros, 0)?
        };
        let padding = self.weight.size().get(2).map_or(0, |kernel| kernel / 2);
        let pair = |number: i64| Operand::Ints(vec![number; 2]);
        let groups = Operand::Int(self.groups);
        let mut operands = vec![Operand::Tensor(0), Operand::None];
        let (pack, op) = match self.task {
            Task::Linear => ("quantized::linear_prepack", "quantized::linear"),
            Task::Transposed => {
                operands.extend([pair(2), pair(1), pair(0), pair(1), groups]);
                ("quantized::conv_transpose2d_prepack", "quantized::conv_transpose2d")
            }
            _ => {
                operands.extend([pair(1), pair(padding), pair(1), groups]);
                ("quantized::conv2d_prepack", "quantized::conv2d")
            }
        };
        let pack = Attribute { name: String::new(), op: Some(pack), operands };
        jit::pack_and_run(&pack, &[weight], op, (&input, KernelRun { scale, zero_point: 128, runs }))
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
    let case = Case { task, input: flat(input)?, weight: flat(weight)?, groups };
    let mut best = f64::INFINITY;
    for _ in 0..2 {
        // Packing, and first runs, take longer than all the others.
        let seconds = [2, 2 + RUNS].map(|runs| {
            let start = Instant::now();
            case.run(1000.0, runs).map(|_| start.elapsed().as_secs_f64())
        });
        let [few, many] = seconds;
        best = best.min((many? - few?).max(f64::MIN_POSITIVE) / RUNS as f64);
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(engine: EnginePlan, wrong: &[Task], seconds: f64) -> Trial {
        Trial { engine, wrong: wrong.to_vec(), seconds }
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
    fn an_engine_of_this_machine_is_right() {
        let trials = trials();
        let right: Vec<_> = trials.iter().filter(|trial| trial.is_right()).collect();
        assert!(!right.is_empty(), "{trials:?}");
        assert!(right.iter().all(|trial| trial.seconds > 0.0 && trial.seconds.is_finite()), "{trials:?}");
    }
}
