//! Rounding and bias correction from op to op, each with what it really reads in the quantized model up to there.
//!
//! All batches run through the quantized model side by side and wait for each other in front of and behind each op with a
//! weight; the float model runs beside them and gives the results that there should be. So memory is that of the values that
//! are alive at one op, of all batches, and each op runs once. It knows no file and no report.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::bias::{self, by_group};
use super::geometry::Axis;
use super::layout::{by_channel, grouped, padded, patches};
use super::moments::Moments;
use super::pull::{by_position, pulled};
use super::rounding::{self, Problem, Rounded};
use super::shift::{Seen, is_within, shift};
use super::steps::{Asked, Clamp, Step, Steps};
use super::targets::{Form, Reading, Target};
use super::{Corrections, LeftOut};
use crate::config::BiasCorrection;
use crate::hessian::Squares;
use crate::jit::{self, Arguments, Clean, Instrumented, Output, Stepwise, Tap, TapKind, Visit, stepwise};
use crate::quantizer::QuantParams;
use crate::random::SplitMix64;
use crate::simulate::{Simulate, substitutes};
use crate::sites::Sites;

/// A quantized weight.
#[derive(Debug)]
pub struct Weight {
    /// Its values.
    pub tensor: Tensor,
    /// One for each channel, or one for all.
    pub params: Vec<QuantParams>,
    /// Whether scales may change.
    pub refits: bool,
}

/// A model whose thresholds are chosen.
pub struct Network<'a> {
    /// The float model.
    pub model: &'a Clean,
    /// Its sites.
    pub sites: &'a Sites,
    /// The quantizers of `sites.activations`; `None` stays float.
    pub activations: &'a [Option<QuantParams>],
    /// In the order of `sites.weights`.
    pub weights: Vec<Weight>,
}

/// What became of the weights of an op.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundedSite {
    /// Index of the weight among the sites.
    pub weight: usize,
    /// E(‖y − W_q·x_q‖²) / E(‖y‖²), the weights rounded to nearest, and as they are.
    pub errors: [f64; 2],
    /// Channels that stay rounded to nearest, as nothing was better.
    pub kept: usize,
}

/// What came out.
#[derive(Debug)]
pub struct Refined {
    /// In the order of the sites.
    pub weights: Vec<Weight>,
    /// The weights that were rounded, in graph order.
    pub rounded: Vec<RoundedSite>,
    /// Weights that were not.
    pub not_rounded: Vec<LeftOut>,
    /// Biases, and ops that have none.
    pub corrections: Corrections,
    /// What the models gave, batch by batch: the float one, and the one with these weights and biases.
    pub outputs: Vec<[Output; 2]>,
}

/// Where the squared gradients of the ops are looked at: the same places whenever it is asked.
#[derive(Debug, Clone)]
pub struct Looks {
    readings: Vec<Reading>,
    /// Numbers of a batch that are looked at for one op.
    seen: i64,
    /// The results whose gradients are asked for: those of ops whose biases are corrected, behind the clamp if there is one.
    pub results: Vec<Option<jit::ValueId>>,
    seed: u64,
}

impl Looks {
    /// At the results of these ops.
    #[must_use]
    pub fn new(steps: &Steps, seed: u64) -> Self {
        let readings = steps.steps.iter().map(|step| step.reading.clone()).collect();
        let result = |step: &Step| step.clamp.map_or(step.target.result, |clamp| clamp.value);
        let results = steps.steps.iter().map(|step| step.corrects.then(|| result(step))).collect();
        Self { readings, seen: steps.seen(), results, seed }
    }

    /// What is seen of a value of the result of op `op`, or its gradient, in batch `batch`: (rows, channels, positions).
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn look(&self, batch: usize, op: usize, value: &Tensor) -> Result<Tensor, tch::TchError> {
        let Some(reading) = self.readings.get(op) else { return Ok(value.shallow_clone()) };
        let value = by_channel(value, reading)?;
        match self.positions(batch, op, &value.size()) {
            None => Ok(value),
            Some(positions) => value.f_index_select(2, &Tensor::f_from_slice(&positions)?.f_to_device(value.device())?),
        }
    }

    /// One position of each of as many equal parts; `None` for all.
    fn positions(&self, batch: usize, op: usize, size: &[i64]) -> Option<Vec<i64>> {
        let &[rows, channels, positions] = size else { return None };
        let wanted = (self.seen / (rows * channels).max(1)).max(1);
        if wanted >= positions {
            return None;
        }
        let mut stream = SplitMix64::of(&[self.seed, batch as u64, op as u64]);
        let bound = |part: i64| part * positions / wanted;
        let parts = (0..wanted).map(|part| (bound(part), bound(part + 1)));
        Some(parts.map(|(from, to)| from + stream.below((to - from).unsigned_abs()) as i64).collect())
    }
}

/// Rounds and corrects as `asked`, on these batches. `known` are the biases of the weights as they are. `advance` is called with
/// the number of ops that are done.
///
/// # Errors
/// Where the model or libtorch fails.
pub fn refine(
    network: Network<'_>,
    (steps, asked): (&Steps, Asked),
    (batches, squares, looks): (&[Arguments], &Squares, &Looks),
    known: Corrections,
    advance: impl FnMut(usize),
) -> Result<Refined, jit::Error> {
    let device = network.model.module().device();
    let (taps, params) = substitutes(&network.sites.activations, network.activations);
    let mut sequence = Sequence::new(network, (steps, asked), squares, looks);
    sequence.take_known(known);
    sequence.substituted = taps.len();
    let own: Vec<Tap> = sequence.ops.iter().enumerate().flat_map(|(number, op)| op.taps(number)).collect();
    // Taps that come later in the list come earlier behind a value.
    let behind = own.iter().map(|tap| Tap { number: taps.len() + tap.number, ..*tap });
    let taps: Vec<_> = taps.iter().copied().chain(behind).collect();
    let tensors: Vec<_> = sequence.tensors(device)?;
    let quantized = sequence.network.model.instrument(&taps, &tensors)?;
    sequence.tensors = tensors;
    let float = sequence.network.model.instrument(&own, &[])?;
    let runs: Vec<(&Instrumented, &Arguments)> =
        batches.iter().flat_map(|arguments| [(&quantized, arguments), (&float, arguments)]).collect();
    // On a GPU kernels of several runs would wait for each other, and random numbers have to come in one order.
    let is_alone = device != Device::Cpu || sequence.network.model.listing().draws();
    let together = if is_alone { 1 } else { batches.len() };
    let substitute = |tap: usize, value: &Tensor| Simulate { params: &params }.substitute(tap, value);
    let on_their_way = |runs| sequence.run(Pairs::new(runs, batches.len()), advance);
    let outputs = stepwise(&runs, together, &substitute, on_their_way)??;
    sequence.finish(outputs)
}

/// An op on its way.
struct Op<'a> {
    step: &'a Step,
    is_rounded: bool,
    is_corrected: bool,
    /// What is added to each of its channels; float32.
    added: Option<Tensor>,
    /// Numbers of axes of its results.
    rank: usize,
}

impl Op<'_> {
    fn taps(&self, number: usize) -> [Tap; 2] {
        let Target { result: value, slot, .. } = self.step.target;
        let tap = |phase: Phase, kind| Tap { value, number: Place { op: number, phase }.number(), kind };
        [tap(Phase::Input, TapKind::Input(slot)), tap(Phase::Result, TapKind::Observe)]
    }

    /// What is added to its channels, as it meets a result with so many axes.
    fn shaped(&self, rank: usize) -> Result<Option<Tensor>, tch::TchError> {
        self.added.as_ref().map(|added| added.f_reshape(self.shape(added, rank))).transpose()
    }

    /// The shape in which its channels meet the axes of its result.
    fn shape(&self, added: &Tensor, rank: usize) -> Vec<i64> {
        let channels = i64::try_from(added.numel()).unwrap_or_default();
        let behind = match &self.step.reading {
            Reading::Positions(axes) => axes.len(),
            Reading::Columns if rank != 1 => 1,
            _ => 0,
        };
        std::iter::once(channels).chain(std::iter::repeat_n(1, behind)).collect()
    }
}

/// In front of an op or behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Input,
    Result,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    op: usize,
    phase: Phase,
}

impl Place {
    fn number(self) -> usize {
        2 * self.op + usize::from(self.phase == Phase::Result)
    }

    fn of(number: usize) -> Self {
        let phase = if number.is_multiple_of(2) { Phase::Input } else { Phase::Result };
        Self { op: number / 2, phase }
    }
}

/// Where a model waits, and the value there.
type At = Option<(Place, Tensor)>;

/// All batches on their way through both models.
struct Pairs {
    /// The quantized and the float model of each batch.
    runs: Stepwise,
    quantized: Vec<At>,
    float: Vec<At>,
}

impl Pairs {
    fn new(runs: Stepwise, batches: usize) -> Self {
        let nowhere = || (0..batches).map(|_| None).collect();
        Self { runs, quantized: nowhere(), float: nowhere() }
    }

    /// The first place that the quantized model of some batch waits at.
    fn first(&self) -> Option<Place> {
        self.quantized.iter().filter_map(|at| at.as_ref().map(|(place, _)| *place)).min()
    }

    /// The batches whose quantized models wait here, and their values.
    fn waiting(&self, place: Place) -> Vec<(usize, Tensor)> {
        let own = self.quantized.iter().enumerate();
        let own = own.filter_map(|(batch, at)| Some((batch, at.as_ref().filter(|(at, _)| *at == place)?)));
        own.map(|(batch, (_, value))| (batch, value.shallow_clone())).collect()
    }

    /// Lets the float models of batches go on to here, or to the first place behind it that they come to.
    fn bring_float(&mut self, place: Place, batches: impl Iterator<Item = usize>) -> Result<(), jit::Error> {
        let Self { runs, float, .. } = self;
        let behind: Vec<usize> =
            batches.filter(|&batch| float[batch].as_ref().is_none_or(|(at, _)| *at < place)).collect();
        behind.iter().for_each(|&batch| float[batch] = None);
        runs.go(behind.iter().map(|batch| 2 * batch + 1), |run, stop| {
            let at = Place::of(stop.tap);
            if at >= place {
                float[run / 2] = Some((at, stop.value));
            }
            Ok(at < place)
        })
    }

    /// What the float model was brought to here; `None` where it does not come here in this batch.
    fn float(&self, batch: usize, place: Place) -> Option<Tensor> {
        let (_, value) = self.float[batch].as_ref().filter(|(at, _)| *at == place)?;
        Some(value.shallow_clone())
    }

    /// What both give in the end, batch by batch, the float model first.
    fn outputs(mut self) -> Result<Vec<[Output; 2]>, jit::Error> {
        let batches = 0..self.float.len();
        self.float.iter_mut().for_each(|at| *at = None);
        self.runs.go(batches.clone().map(|batch| 2 * batch + 1), |_, _| Ok(true))?;
        let both = batches.map(|batch| {
            let outputs = [2 * batch + 1, 2 * batch].map(|run| self.runs.take_output(run));
            let [Some(float), Some(quantized)] = outputs else {
                return Err(jit::Error::Libtorch("a run ended without outputs".to_owned()));
            };
            Ok([float.on_cpu()?, quantized.on_cpu()?])
        });
        both.collect()
    }
}

struct Sequence<'a> {
    network: Network<'a>,
    ops: Vec<Op<'a>>,
    asked: Asked,
    squares: &'a Squares,
    looks: &'a Looks,
    /// Taps of the quantized model at activation sites: those of the ops come behind them.
    substituted: usize,
    /// What the quantized model reads in place of its weights.
    tensors: Vec<(jit::Place, Tensor)>,
    rounded: Vec<RoundedSite>,
    not_rounded: Vec<LeftOut>,
    corrections: Corrections,
}

impl<'a> Sequence<'a> {
    fn new(network: Network<'a>, (steps, asked): (&'a Steps, Asked), squares: &'a Squares, looks: &'a Looks) -> Self {
        let op = |step: &'a Step| {
            let (is_rounded, is_corrected) = (!step.rounds, !step.corrects);
            Op { step, is_rounded, is_corrected, added: None, rank: 0 }
        };
        Self {
            network,
            ops: steps.steps.iter().map(op).collect(),
            asked,
            squares,
            looks,
            substituted: 0,
            tensors: Vec::new(),
            rounded: Vec::new(),
            not_rounded: steps.not_rounded.clone(),
            corrections: Corrections { biases: Vec::new(), left_out: steps.not_corrected.clone() },
        }
    }

    /// Biases of the weights as they are rounded to nearest, and why ops have none.
    fn take_known(&mut self, known: Corrections) {
        for left in known.left_out {
            self.leave_uncorrected(left);
        }
        let mut by_result: BTreeMap<_, _> = known.biases.into_iter().map(|bias| (bias.result, bias.added)).collect();
        for op in &mut self.ops {
            if op.step.corrects {
                op.added = by_result.remove(&op.step.target.result).map(|added| Tensor::from_slice(&added));
                op.is_corrected = self.asked.correction == BiasCorrection::ClosedForm && !op.step.rounds;
            }
        }
    }

    fn leave_uncorrected(&mut self, left: LeftOut) {
        let all = &mut self.corrections.left_out;
        if !all.iter().any(|known| (&known.layer, &known.op) == (&left.layer, &left.op)) {
            all.push(left);
        }
    }

    /// The weights, each where the graph has it: what is written into them, the model reads.
    fn tensors(&self, device: Device) -> Result<Vec<(jit::Place, Tensor)>, jit::Error> {
        let weights = self.network.sites.weights.iter().zip(&self.network.weights);
        let mut tensors = Vec::new();
        for (site, weight) in weights {
            let own = weight.tensor.f_detach_copy()?.f_to_device(device)?;
            tensors.extend(site.values.iter().map(|&value| (jit::Place::Constant(value), own.shallow_clone())));
        }
        Ok(tensors)
    }

    fn run(&mut self, mut pairs: Pairs, mut advance: impl FnMut(usize)) -> Result<Vec<[Output; 2]>, jit::Error> {
        self.go_on(&mut pairs, None)?;
        let mut done = 0;
        while let Some(place) = pairs.first() {
            match place.phase {
                Phase::Input => self.round(place, &mut pairs)?,
                Phase::Result => self.correct(place, &mut pairs)?,
            }
            self.go_on(&mut pairs, Some(place))?;
            advance(place.op.saturating_sub(done));
            done = done.max(place.op);
        }
        advance(self.ops.len().saturating_sub(done));
        pairs.outputs()
    }

    /// Lets the quantized models that wait here go on to the next place that all have to wait at; all of them from nowhere.
    fn go_on(&self, pairs: &mut Pairs, place: Option<Place>) -> Result<(), jit::Error> {
        let Pairs { runs, quantized, .. } = pairs;
        let are_here: Vec<usize> =
            (0..quantized.len()).filter(|&batch| place == quantized[batch].as_ref().map(|(at, _)| *at)).collect();
        are_here.iter().for_each(|&batch| quantized[batch] = None);
        runs.go(are_here.iter().map(|batch| 2 * batch), |run, stop| {
            let place = Place::of(stop.tap - self.substituted);
            let Some(op) = self.ops.get(place.op) else { return Ok(true) };
            let is_done = if place.phase == Phase::Input { op.is_rounded } else { op.is_corrected };
            if !is_done {
                quantized[run / 2] = Some((place, stop.value));
            } else if place.phase == Phase::Result {
                add(op, &stop.value)?;
            }
            Ok(is_done)
        })
    }

    /// Rounds the weights of the op that all wait in front of.
    fn round(&mut self, place: Place, pairs: &mut Pairs) -> Result<(), jit::Error> {
        let step = self.ops[place.op].step;
        let target = &step.target;
        let site = &self.network.sites.weights[target.weight];
        let value = site.values.first().copied().unwrap_or_default();
        let float = flat(&self.network.model.constant(value)?, target.form)?;
        let (mut moments, mut halves) = (Moments::default(), [Moments::default(), Moments::default()]);
        let phase = if step.has_other_terms { Phase::Input } else { Phase::Result };
        let waiting = pairs.waiting(place);
        pairs.bring_float(Place { phase, ..place }, waiting.iter().map(|(batch, _)| *batch))?;
        for (batch, input) in waiting {
            let Some(value) = pairs.float(batch, Place { phase, ..place }) else { continue };
            let goal = if step.has_other_terms { Goal::Input(&value) } else { Goal::Result(&value) };
            self.ops[place.op].rank = value.dim();
            self.sum_up((batch, place.op), (&input, &float, goal), (&mut moments, &mut halves[batch % 2]))?;
        }
        let op = &mut self.ops[place.op];
        op.is_rounded = true;
        if step.corrects && self.asked.correction == BiasCorrection::ClosedForm {
            op.is_corrected = true;
        }
        let Some(means) = moments.means(step.corrects)? else {
            self.not_rounded.push(target.left_out("the float model takes another branch on these rows"));
            return Ok(());
        };
        let float = float.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let weight = &mut self.network.weights[target.weight];
        let nearest = flat(&weight.tensor, target.form)?;
        let Weight { params, refits, .. } = &*weight;
        let (goal, weighted) = pulled(&float, halves)?;
        // What a clamp cuts off now may come through once weights are rounded: there all positions count alike.
        let weighted = weighted.as_ref().filter(|_| step.clamp.is_none());
        let problem = Problem { weight: &float, nearest: &nearest, means: &means, weighted, params, refits: *refits };
        match rounding::round(&problem, &goal)? {
            None => self
                .not_rounded
                .push(target.left_out("its input never differs on the calibration data, or is not finite")),
            Some(Rounded { weight: found, params, errors, energy, kept }) => {
                weight.tensor = unflat(&found, &weight.tensor.size(), target.form)?;
                weight.params = params;
                let errors = errors.map(|error| if energy > 0.0 { error / energy } else { 0.0 });
                self.rounded.push(RoundedSite { weight: target.weight, errors, kept });
            }
        }
        for (place, tensor) in &mut self.tensors {
            if matches!(place, jit::Place::Constant(value) if site.values.contains(value)) {
                tensor.f_copy_(&weight.tensor.f_to_device(tensor.device())?)?;
            }
        }
        if step.corrects {
            // (W − W_q)·E(x_q): what the error of the weights adds, and not that of the inputs.
            let rounded = flat(&weight.tensor, target.form)?.f_to_kind(Kind::Double)?;
            let added = float.f_sub(&rounded)?.f_bmm(&means.x.f_unsqueeze(2)?)?.f_flatten(0, -1)?;
            let added = added.f_mul_scalar(target.factor)?.f_to_kind(Kind::Float)?;
            if added.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1 {
                self.ops[place.op].added = Some(added);
            }
        }
        Ok(())
    }

    /// Adds one batch of an op to its moments.
    fn sum_up(
        &self,
        (batch, number): (usize, usize),
        (input, weight, goal): (&Tensor, &Tensor, Goal<'_>),
        (moments, pull): (&mut Moments, &mut Moments),
    ) -> Result<(), jit::Error> {
        let &Step { ref target, ref reading, corrects, .. } = self.ops[number].step;
        let groups = target.form.groups();
        let result = match goal {
            Goal::Result(result) => by_channel(result, reading)?,
            Goal::Input(input) => product(input, weight, reading, groups)?,
        };
        // What the float weights do not give: sums of it are as exact as it is small.
        let missing = result.f_sub(&product(input, weight, reading, groups)?)?;
        let squares = self.squares.get(batch).and_then(|ops| ops.get(number)?.as_ref()).filter(|_| corrects);
        let positions = self.looks.positions(batch, number, &result.size());
        let positions =
            positions.map(|positions| Tensor::f_from_slice(&positions)?.f_to_device(result.device())).transpose()?;
        let seen = |value: &Tensor| match &positions {
            None => Ok(value.shallow_clone()),
            Some(positions) => value.f_index_select(2, positions),
        };
        // (groups, rows, positions that are seen): what each counts.
        let counts = match squares {
            None => None,
            Some(squares) => {
                let squares = squares.f_to_kind(Kind::Float)?;
                let squares = match self.ops[number].step.clamp {
                    None => squares,
                    Some(Clamp { bounds, .. }) => squares.f_mul(&is_within(&seen(&result)?, bounds)?)?,
                };
                let [rows, _, seen_of_a_row] = <[i64; 3]>::try_from(squares.size()).unwrap_or_default();
                let counts = by_position(&grouped(&squares, groups)?, &grouped(&seen(&missing)?, groups)?)?;
                Some(counts.f_reshape([groups, rows, seen_of_a_row])?)
            }
        };
        patches::<jit::Error>(input, reading, groups, |piece| {
            let r = piece.of(&missing, groups)?;
            let place = (piece.groups.0, groups);
            moments.add(place, &piece.x, &r, None)?;
            let Some(counts) = &counts else { return Ok(()) };
            let (first, rows) = piece.rows;
            let counts = piece.own(counts)?.f_narrow(1, first, rows)?.f_flatten(1, 2)?;
            let seen = |of: &Tensor| match &positions {
                None => Ok(of.shallow_clone()),
                Some(positions) => {
                    let [groups, channels, _] = <[i64; 3]>::try_from(of.size()).unwrap_or_default();
                    of.f_reshape([groups, channels, rows, -1])?.f_index_select(3, positions)?.f_flatten(2, 3)
                }
            };
            Ok(pull.add(place, &seen(&piece.x)?, &seen(&r)?, Some(&counts))?)
        })
    }

    /// b += λ·Σ g²·(y − y_q) / Σ g² per channel, behind the closed form, as far as what that is on half of the batches helps on
    /// the other half.
    fn correct(&mut self, place: Place, pairs: &mut Pairs) -> Result<(), jit::Error> {
        let mut halves = [Vec::new(), Vec::new()];
        let waiting = pairs.waiting(place);
        let squares = |batch: usize| self.squares.get(batch).and_then(|ops| ops.get(place.op)?.as_ref());
        pairs.bring_float(place, waiting.iter().map(|(batch, _)| *batch).filter(|&batch| squares(batch).is_some()))?;
        for (batch, quantized) in &waiting {
            self.ops[place.op].rank = quantized.dim();
            if let (Some(squares), Some(result)) = (squares(*batch), pairs.float(*batch, place)) {
                let look = |value: &Tensor| self.looks.look(*batch, place.op, value)?.f_to_kind(Kind::Float);
                let (wanted, found) = (look(&result)?, look(quantized)?);
                let found = match &self.ops[place.op].added {
                    Some(known) => found.f_add(&known.f_to_device(found.device())?.f_reshape([1, -1, 1])?)?,
                    None => found,
                };
                halves[batch % 2].push(Seen { wanted, found, squares: squares.f_to_kind(Kind::Float)? });
            }
        }
        let bounds = self.ops[place.op].step.clamp.map(|clamp| clamp.bounds);
        let op = &mut self.ops[place.op];
        op.is_corrected = true;
        op.added = match (op.added.take(), shift(&halves, bounds)?) {
            (Some(known), Some(added)) => Some(known.f_add(&added)?),
            (known, added) => known.or(added),
        };
        waiting.iter().try_for_each(|(_, quantized)| add(op, quantized))
    }

    fn finish(mut self, outputs: Vec<[Output; 2]>) -> Result<Refined, jit::Error> {
        for op in std::mem::take(&mut self.ops) {
            let Step { target, rounds, corrects, .. } = op.step;
            if *rounds && !op.is_rounded {
                self.not_rounded.push(target.left_out(NEVER_RAN));
            }
            match &op.added {
                Some(added) => {
                    let shape = op.shape(added, op.rank);
                    self.corrections.biases.push(bias::bias(self.network.model, target, added, &shape)?);
                }
                None if *corrects => {
                    self.leave_uncorrected(target.left_out(if op.is_corrected { NOT_BETTER } else { NEVER_RAN }));
                }
                None => {}
            }
        }
        let Self { network, rounded, not_rounded, corrections, .. } = self;
        Ok(Refined { weights: network.weights, rounded, not_rounded, corrections, outputs })
    }
}

/// What an op should give.
enum Goal<'a> {
    /// This.
    Result(&'a Tensor),
    /// The float weight's product with this input.
    Input(&'a Tensor),
}

/// (rows, outputs, positions) of a weight (groups, outputs, features) that meets this input.
fn product(input: &Tensor, weight: &Tensor, reading: &Reading, groups: i64) -> Result<Tensor, tch::TchError> {
    let Reading::Positions(axes) = reading else {
        return weight.f_bmm(&grouped(&by_channel(input, reading)?, groups)?);
    };
    let batch = if input.dim() == axes.len() + 1 { input.f_unsqueeze(0)? } else { input.shallow_clone() };
    let channels = batch.size().get(1).copied().unwrap_or(1) / groups.max(1);
    let kernel = axes.iter().map(|axis| axis.kernel);
    let size: Vec<i64> = [weight.size().iter().take(2).product(), channels].into_iter().chain(kernel).collect();
    let of = |number: fn(&Axis) -> i64| axes.iter().map(number).collect::<Vec<_>>();
    let (stride, dilation, none) = (of(|axis| axis.stride), of(|axis| axis.dilation), of(|_| 0));
    let bias: Option<Tensor> = None;
    let weight = weight.f_reshape(&size)?;
    padded(&batch, axes)?
        .f_convolution(&weight, bias, &stride, &none, &dilation, false, &none, groups)?
        .f_flatten(2, -1)
}

const NEVER_RAN: &str = "never ran on the rows that it is looked at on";
const NOT_BETTER: &str = "no outputs depend on it, or what half of the batches asks for does not help the other half";

/// Adds to the model's own result.
fn add(op: &Op<'_>, value: &Tensor) -> Result<(), jit::Error> {
    if let Some(added) = op.shaped(value.dim())? {
        let _ = value.shallow_clone().f_add_(&added.f_to_device(value.device())?)?;
    }
    Ok(())
}

/// A weight as (groups, outputs of a group, features and taps).
fn flat(weight: &Tensor, form: Form) -> Result<Tensor, tch::TchError> {
    by_group(weight, form)?.f_flatten(2, 3)
}

/// Back to the shape of the weight.
fn unflat(weight: &Tensor, size: &[i64], form: Form) -> Result<Tensor, tch::TchError> {
    match form {
        Form::OutputsFirst { .. } => weight.f_reshape(size),
        Form::InputsFirst { .. } => weight.f_transpose(1, 2)?.f_reshape(size)?.f_contiguous(),
    }
}
