//! The libraries that 8-bit kernels can run on: what each computes wrong on this machine, and how fast it is. Flags of the
//! processor do not tell that; a trial does.

mod cases;

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::config::{EnginePlan, ReduceRange};
use crate::jit;

use cases::{Case, cases, cases_of};

pub(super) use cases::Geometry;

/// Runs that are timed together.
const RUNS: usize = 10;

/// How many times as fast an engine has to be that needs bounded weights of depthwise convolutions, and one that needs activations
/// of 7 bits.
const PRICE_OF_BOUNDS: f64 = 2.0;
const PRICE_OF_7_BITS: f64 = 4.0;

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
    /// Seconds for one of each task but the transposed ones; infinite where it is wrong in one of them that nothing cures.
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

    /// How many times as fast it has to be as one that is right for its price in accuracy to be paid; `None` where it stays wrong.
    fn price(&self, reduce_range: ReduceRange) -> Option<f64> {
        if reduce_range == ReduceRange::Always {
            // Activations have 7 bits whatever the engine.
            let reduced = Self { wrong: self.wrong_in_7_bits.clone(), ..self.clone() };
            return reduced.price(ReduceRange::Never);
        }
        let is_cured = |task: &Task| {
            let is_bounded = *task == Task::Depthwise && self.bounds_depthwise(true);
            task.is_dispensable() || is_bounded || self.computes(*task, true)
        };
        if self.is_right() {
            Some(1.0)
        } else if self.is_right_with_bounds() {
            Some(PRICE_OF_BOUNDS)
        } else {
            (reduce_range != ReduceRange::Never && self.wrong.iter().all(is_cured)).then_some(PRICE_OF_7_BITS)
        }
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
        let is_cured = |task: &Task| task.is_dispensable() || is_bounded && *task == Task::Depthwise;
        self.wrong.iter().any(|task| !is_cured(task) && self.computes(*task, true))
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
    let trial = TRIALS.get(place)?.get_or_init(|| on(engine, || try_out(engine)));
    trial.as_ref()
}

/// What `work` gives while this engine is set; `None` where this libtorch has it not.
fn on<T>(engine: EnginePlan, work: impl FnOnce() -> T) -> Option<T> {
    // One engine is set for the whole process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let before = jit::engine();
    jit::set_engine(engine.name()).ok()?;
    let found = work();
    // One that was set can be set again.
    let _ = jit::set_engine(&before);
    Some(found)
}

/// Whether an engine computes a convolution with a weight of this shape right; `is_bounded`: under the bound of
/// [`Task::BoundedDepthwise`]. Each kind of layer is tried once in a process.
pub(super) fn computes(
    engine: EnginePlan,
    (geometry, shape): (&Geometry, &[i64]),
    is_bounded: bool,
    has_7_bits: bool,
) -> bool {
    type Layer = (EnginePlan, Geometry, Vec<i64>, [bool; 2]);
    static KNOWN: Mutex<Vec<(Layer, bool)>> = Mutex::new(Vec::new());
    let layer = (engine, geometry.clone(), shape.to_vec(), [is_bounded, has_7_bits]);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, is_right)) = known.iter().find(|(other, _)| *other == layer) {
        return *is_right;
    }
    let highest = if has_7_bits { 127.0 } else { 255.0 };
    let cases = cases_of(geometry, shape, is_bounded, highest);
    let is_right = on(engine, || cases.iter().all(|case| case.is_right().unwrap_or(false))).unwrap_or(false);
    known.push((layer, is_right));
    is_right
}

/// The fastest engine that is right, or is made right by bounded weights or, where they may be had, by activations of 7 bits; what
/// costs accuracy has to be that much faster. Where activations have 7 bits anyway that is no price. The one that gets fewest tasks
/// wrong where there is none.
#[must_use]
pub fn fastest<'a>(trials: &[&'a Trial], reduce_range: ReduceRange) -> Option<&'a Trial> {
    let order = |trial: &Trial| match trial.price(reduce_range) {
        Some(price) => (0, price * trial.seconds),
        None if reduce_range == ReduceRange::Always => (trial.wrong_in_7_bits.len(), trial.seconds),
        None => (trial.wrong.len(), trial.seconds),
    };
    let compare = |a: &Trial, b: &Trial| {
        let ((wrong, seconds), (other_wrong, other_seconds)) = (order(a), order(b));
        wrong.cmp(&other_wrong).then(seconds.total_cmp(&other_seconds))
    };
    trials.iter().copied().min_by(|a, b| compare(a, b))
}

fn try_out(engine: EnginePlan) -> Trial {
    let is_wrong = |task: Task, highest: f64| !cases(task, highest).iter().all(|case| case.is_right().unwrap_or(false));
    let wrong: Vec<Task> = Task::ALL.into_iter().filter(|&task| is_wrong(task, 255.0)).collect();
    let wrong_in_7_bits = wrong.iter().copied().filter(|&task| is_wrong(task, 127.0)).collect();
    let mut trial = Trial { engine, wrong, wrong_in_7_bits, seconds: f64::INFINITY };
    if [ReduceRange::Auto, ReduceRange::Always].into_iter().any(|asked| trial.price(asked).is_some()) {
        let timed = [Task::Window, Task::Pointwise, Task::Depthwise, Task::Linear];
        let tasks = timed.into_iter();
        trial.seconds = tasks.filter_map(|task| time(task).ok()).sum();
    }
    trial
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
    let geometry = (!is_linear).then(|| Geometry::plain(&weight.size()[2..], groups));
    let case = Case { geometry, input: flat(input)?, weight: flat(weight)?, zero_point: 0, is_centred: false };
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
    // Where other programs disturb, fewer runs may have taken longer.
    let between = many - few;
    Ok(if between > 0.0 { between / RUNS as f64 } else { many / (2 + RUNS) as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(engine: EnginePlan, wrong: &[Task], seconds: f64) -> Trial {
        Trial { engine, wrong: wrong.to_vec(), wrong_in_7_bits: Vec::new(), seconds }
    }

    #[test]
    fn a_fast_engine_that_is_wrong_loses() {
        let reduced = |wrong: &[Task], seconds| Trial {
            wrong_in_7_bits: wrong.to_vec(),
            ..tried(EnginePlan::Fbgemm, wrong, seconds)
        };
        let trials = [
            tried(EnginePlan::Onednn, &[Task::Transposed], 3.0),
            tried(EnginePlan::X86, &[Task::Depthwise], 2.0),
            tried(EnginePlan::Qnnpack, &[], 4.0),
            reduced(&[Task::Window], f64::INFINITY),
        ];
        let trials: Vec<&Trial> = trials.iter().collect();
        let engine = |trials: &[&Trial]| fastest(trials, ReduceRange::Auto).map(|trial| trial.engine);
        assert_eq!(engine(&trials), Some(EnginePlan::Onednn));
        assert_eq!(engine(&trials[1..2]), Some(EnginePlan::X86));
        assert_eq!(engine(&trials[3..]), Some(EnginePlan::Fbgemm));
        assert_eq!(engine(&[]), None);
    }

    #[test]
    fn accuracy_is_given_up_for_much_time_alone() {
        let qnnpack = tried(EnginePlan::Qnnpack, &[], 6.0);
        let engine = |wrong: &[Task], seconds, may_reduce| {
            let other = tried(EnginePlan::X86, wrong, seconds);
            let reduce_range = if may_reduce { ReduceRange::Auto } else { ReduceRange::Never };
            fastest(&[&qnnpack, &other], reduce_range).map(|trial| trial.engine)
        };
        let (right, other) = (Some(EnginePlan::Qnnpack), Some(EnginePlan::X86));
        assert_eq!([engine(&[Task::Depthwise], 4.0, true), engine(&[Task::Depthwise], 2.0, true)], [right, other]);
        assert_eq!([engine(&[Task::Window], 2.0, true), engine(&[Task::Window], 1.0, true)], [right, other]);
        assert_eq!(engine(&[Task::Window], 1.0, false), right);
        // Where all have 7 bits, that is no price.
        let slower = tried(EnginePlan::X86, &[Task::Window, Task::Depthwise], 5.0);
        assert_eq!(fastest(&[&qnnpack, &slower], ReduceRange::Always).map(|trial| trial.engine), other);
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

    /// Wherever one is right in convolutions, it is in those over other axes, with strides, holes and groups too.
    #[test]
    fn layers_are_tried_as_they_are() {
        let conv = |spatial: usize, groups: i64| Geometry {
            stride: vec![2; spatial],
            padding: vec![1; spatial],
            dilation: vec![2; spatial],
            groups,
            output_padding: None,
        };
        let transposed = |spatial: usize| Geometry { output_padding: Some(vec![1; spatial]), ..conv(spatial, 2) };
        for trial in trials().into_iter().filter(|trial| trial.engine != EnginePlan::Qnnpack) {
            let of = |geometry: Geometry, shape: &[i64]| computes(trial.engine, (&geometry, shape), false, false);
            for (geometry, shape) in
                [(conv(1, 1), vec![40, 24, 3]), (conv(2, 4), vec![40, 8, 3, 3]), (conv(3, 1), vec![8, 200, 3, 3, 3])]
            {
                assert_eq!(of(geometry, &shape), trial.computes(Task::Window, false), "{:?} {shape:?}", trial.engine);
            }
            // The second time as the first.
            let [first, second] = [(); 2].map(|()| of(transposed(2), &[8, 4, 3, 3]));
            assert_eq!(first, second, "{:?}", trial.engine);
            let saturates = of(Geometry::plain(&[3, 3], 144), &[144, 1, 3, 3]);
            assert_eq!(saturates, trial.computes(Task::Depthwise, false), "{:?}", trial.engine);
        }
    }

    #[test]
    fn an_engine_of_this_machine_is_right() {
        let trials = trials();
        let right: Vec<_> = trials.iter().filter(|trial| trial.is_right()).collect();
        assert!(!right.is_empty(), "{trials:?}");
        assert!(right.iter().all(|trial| trial.seconds > 0.0 && trial.seconds.is_finite()), "{trials:?}");
    }
}
