//! The 8-bit model of a run: written, loaded again, and compared with what it stands for, as a whole and kernel by kernel.

use std::path::Path;
use std::time::Duration;

use super::base::Base;
use super::compare::{self, Comparison, Measured};
use super::select::Selections;
use super::simulation::Simulation;
use super::{CHECK_BATCHES, Error};
use crate::config::{EnginePlan, Int8Plan, Plan, ReduceRange};
use crate::emit::Emission;
use crate::feed;
use crate::jit::{self, Arguments, Clean, Frozen, Instrumented, Module, NoVisit};
use crate::lower::engine::{self, Trial};
use crate::lower::{self, Given, LayerDifference, Lowering};
use crate::quantizer::QuantParams;
use crate::report::{self, Kind, SiteReport};
use crate::settings::{self, KernelNeeds, Settings};
use crate::sites::{LeftFloat, Sites};
use crate::speed::{self, Contender};

/// Levels by which a kernel may differ from the op that it stands for.
const MOST_LEVELS: f64 = 1.0;
/// Share of the values that may have another level.
const MOST_DIFFERENT: f64 = 1e-3;
/// Largest difference of a kernel that writes float numbers, relative to the largest of them.
const MOST_APART: f64 = 1e-4;

/// Rows of the runs that are timed.
const BATCH_SIZES: [usize; 2] = [1, 8];
/// Time for each of them.
const RACE: Duration = Duration::from_millis(500);

/// A written 8-bit model.
pub(super) struct Written {
    emitted: Module,
    layers: Vec<LayerDifference>,
    /// Sites that the model returns as they are quantized.
    outputs: Vec<(String, QuantParams)>,
    report: report::Int8,
}

/// Writes the model, loads it again and checks it on the first batches.
///
/// # Errors
/// Where a site has a quantizer that no kernel takes and the plan is strict, and where the file computes something else.
pub(super) fn write(
    (model, emission, reports): (&Clean, &Emission<'_>, &[SiteReport]),
    int8: Int8Plan,
    comparison: &Comparison,
    path: &Path,
) -> Result<Written, Error> {
    let given = Given::new(emission, reports, Some(trial(int8.engine)?));
    let simulated = given.unfit();
    if let (true, Some(first)) = (int8.strict, simulated.first()) {
        return Err(unfit(first, simulated.len()));
    }
    jit::set_engine(int8.engine.name())?;
    let lowering = Lowering::new(model, &given, emission)?;
    lowering.emit(model, (&given, emission), path)?;
    let emitted = Module::load(path)?;
    let layers = check((model, &given), &lowering, &emitted, comparison)?;
    let kernels = lowering.kernels().into_iter().map(|(kernel, count)| (kernel.to_owned(), count)).collect();
    let report = report::Int8 {
        file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        bytes: super::size(path)?,
        engine: int8.engine.name().to_owned(),
        set_engine: format!("torch.backends.quantized.engine = '{}'", int8.engine.name()),
        kernels,
        reduce_range: int8.reduce_range == ReduceRange::Always,
        bounded: report::Bounded::of(reports),
        in_float: lowering.in_float().to_vec(),
        simulated,
        layers: layers.iter().map(layer).collect(),
        evaluation: report::Comparison::NOTHING,
        simulation: report::Comparison::NOTHING,
        against_simulation: report::Comparison::NOTHING,
        noise_floor: None,
        threads: jit::thread_count(),
        speed: Vec::new(),
    };
    let outputs = given.returned().map(|(name, params)| (name.to_owned(), params)).collect();
    Ok(Written { emitted, layers, outputs, report })
}

/// Compares the kernels with what they stand for, and the file with the graph that it was written from.
fn check(
    (model, given): (&Clean, &Given<'_>),
    lowering: &Lowering,
    emitted: &Module,
    comparison: &Comparison,
) -> Result<Vec<LayerDifference>, Error> {
    let mut verification = lowering.verification(model, given)?;
    let by_op = Instrumented::of_module(emitted)?;
    for batch in comparison.dataset().batches().take(CHECK_BATCHES) {
        let arguments = feed::bind(emitted, batch?)?;
        let expected = verification.run(&arguments)?;
        let found = by_op.run(&arguments, &mut NoVisit)?;
        let difference = compare::largest_difference(&expected, &found)?;
        if difference != 0.0 {
            return Err(Error::Differs { path: emitted.path().to_owned(), difference });
        }
    }
    let layers = verification.finish();
    match layers.iter().find(|layer| layer.largest > if layer.is_float { MOST_APART } else { MOST_LEVELS }) {
        Some(layer) => Err(Error::KernelDiffers {
            layer: layer.name.clone(),
            kernel: layer.kernel,
            largest: layer.largest,
            engine: jit::engine(),
        }),
        None => Ok(layers),
    }
}

/// Times of float and 8-bit model, and why there are none of some batches.
fn speed(float: &Module, int8: &Module, comparison: &Comparison) -> (Vec<report::Race>, Vec<String>) {
    let race = |batch_size: usize| -> Result<report::Race, Error> {
        let contender = |name: &str, module: &Module, optimized: bool| -> Result<Contender, Error> {
            let arguments = feed::bind(module, comparison.dataset().first(batch_size)?)?;
            Ok(Contender { name: name.to_owned(), model: Frozen::new(module, optimized)?, arguments })
        };
        let contenders = [
            contender(report::FLOAT, float, false)?,
            contender(report::OPTIMIZED, float, true)?,
            contender(report::INT8, int8, false)?,
        ];
        Ok(speed::race(&contenders, batch_size, RACE)?)
    };
    let (mut races, mut notes) = (Vec::new(), Vec::new());
    for size in BATCH_SIZES.into_iter().filter(|&size| size <= comparison.rows()) {
        match race(size) {
            Ok(race) => races.push(race),
            // A model that is made for other batches is no failure of the run.
            Err(error) => notes.push(format!("no times of batches of {size}: {error}")),
        }
    }
    (races, notes)
}

/// A word on an 8-bit model that is no faster.
fn slower(races: &[report::Race]) -> Option<String> {
    let slow = races.iter().filter_map(|race| {
        let ratio = race.ratio(report::FLOAT, report::INT8)?.min(race.ratio(report::OPTIMIZED, report::INT8)?);
        (ratio < 1.0).then(|| format!("{ratio:.2} times as fast for batches of {}", race.batch_size))
    });
    let slow: Vec<String> = slow.collect();
    (!slow.is_empty())
        .then(|| format!("the 8-bit model is slower than the float model on this machine: {}", slow.join(", ")))
}

fn unfit(first: &LeftFloat, count: usize) -> Error {
    let others = if count > 1 { format!(" (and {} more sites)", count - 1) } else { String::new() };
    Error::Unfit { site: first.name.clone(), reason: first.reason.clone(), others }
}

fn layer(layer: &LayerDifference) -> report::Int8Layer {
    report::Int8Layer {
        name: layer.name.clone(),
        op: layer.op.clone(),
        kernel: layer.kernel.to_owned(),
        values: layer.values,
        different: layer.different,
        largest: layer.largest,
    }
}

/// What came out of a run with an 8-bit model.
pub(super) struct Evaluated {
    pub(super) report: report::Int8,
    pub(super) measured: Measured,
    pub(super) warnings: Vec<String>,
}

impl Written {
    /// Runs float model, simulation and file on all rows, and completes what is told.
    ///
    /// # Errors
    /// Where one of them fails.
    pub(super) fn evaluate(
        self,
        model: &Clean,
        simulation: &Simulation,
        comparison: &Comparison,
        advance: impl FnMut(usize),
    ) -> Result<Evaluated, Error> {
        let by_op = Instrumented::of_module(&self.emitted)?;
        let int8 = |arguments: &Arguments| by_op.run(arguments, &mut NoVisit);
        let measured = comparison.run_beside(model, simulation, int8, advance)?;
        let (speed, notes) = speed(model.module(), &self.emitted, comparison);
        // First what matters most.
        let warnings = slower(&speed).into_iter().chain(self.warnings()).chain(notes).collect();
        let report = report::Int8 {
            evaluation: measured.int8.quantized,
            simulation: measured.simulated.quantized,
            against_simulation: measured.between,
            noise_floor: measured.noise,
            speed,
            ..self.report
        };
        Ok(Evaluated { report, measured, warnings })
    }

    /// What a reader should know of its kernels.
    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let many = |layer: &&LayerDifference| layer.different as f64 > MOST_DIFFERENT * layer.values as f64;
        warnings.extend(self.layers.iter().filter(many).map(|layer| {
            let share = 100.0 * layer.different as f64 / layer.values as f64;
            format!("{}: {} gives another level for {share:.2}% of its values", layer.name, layer.kernel)
        }));
        warnings.extend(
            self.report
                .simulated
                .iter()
                .map(|site| format!("{}: {}; it is simulated in float", site.name, site.reason)),
        );
        warnings.extend(self.outputs.iter().map(|(site, params)| {
            let levels = params.quant_max().abs_diff(params.quant_min()) + 1;
            let bits = levels.ilog2();
            format!("{site} is returned in {bits} bits; an override with `activations: float` leaves it float")
        }));
        warnings
    }
}

/// The plan with an engine of this machine in place of `auto`, and with what that needs of activations.
///
/// # Errors
/// Where libtorch has no engine.
pub(super) fn settled(plan: &Plan) -> Result<Plan, Error> {
    let mut plan = plan.clone();
    let Some(int8) = plan.output.int8.as_mut() else { return Ok(plan) };
    let is_free = plan.mixed_precision.as_ref().is_some_and(|mixed| mixed.activations.is_some());
    if int8.engine == EnginePlan::Auto {
        let reduce_range = if is_free { ReduceRange::Never } else { int8.reduce_range };
        int8.engine = engine::fastest(&engine::trials(), reduce_range).ok_or(Error::NoEngine)?.engine;
    }
    if int8.reduce_range == ReduceRange::Auto {
        let is_asked_for = !is_free && trial(int8.engine)?.asks_for_7_bits();
        int8.reduce_range = if is_asked_for { ReduceRange::Always } else { ReduceRange::Never };
    }
    Ok(plan)
}

/// How each site of the model is quantized, as the plan says and its kernels need it.
///
/// # Errors
/// Where overrides do not fit the model, or libtorch has no engine.
pub(super) fn settle(plan: &Plan, base: &Base) -> Result<(Sites, Settings), Error> {
    let needs = match settled(plan)?.output.int8 {
        Some(int8) => {
            let has_7_bits = int8.reduce_range == ReduceRange::Always;
            let (left, _) = settings::settle(plan, base.sites.clone())?;
            let given = (trial(int8.engine)?, has_7_bits);
            lower::needs(base.model.listing(), &base.sites, &left.activations, given)
        }
        None => KernelNeeds::default(),
    };
    Ok(settings::settle_for(plan, base.sites.clone(), &needs)?)
}

/// Leaves what the model returns and computes in float as it is made: an output that nothing reads is no site any more.
///
/// # Errors
/// Where libtorch has no engine.
pub(super) fn leave_float_outputs(
    plan: &Plan,
    base: &Base,
    (sites, selections): (&mut Sites, &mut Selections),
) -> Result<(), Error> {
    let Some(int8) = settled(plan)?.output.int8 else { return Ok(()) };
    let Selections { activations, weights, reports, .. } = &mut *selections;
    let emission = Emission { sites, activations, weights, biases: &[], description: String::new() };
    let given = Given::new(&emission, reports, Some(trial(int8.engine)?));
    for lower::FloatOutput { site: index, reason } in lower::float_outputs(base.model.listing(), &given) {
        let site = &mut sites.activations[index];
        site.is_returned = false;
        if !site.is_read {
            let why = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
            let reason = format!("an output of the model that is computed in float{why}");
            sites.left_float.push(LeftFloat { name: site.name.clone(), op: site.op.clone(), reason });
            activations[index] = None;
            reports.retain(|report| report.kind == Kind::Weight || report.name != site.name);
        }
    }
    Ok(())
}

/// What the engine computes right on this machine.
///
/// # Errors
/// Where libtorch has no such engine.
fn trial(engine: EnginePlan) -> Result<&'static Trial, Error> {
    engine::trial(engine).ok_or(Error::NoSuchEngine { engine: engine.name() })
}
