//! What a run would do and cost, from one batch: everything that can be wrong before calibration is found, nothing is written.

use std::num::NonZeroUsize;
use std::time::Instant;

use super::base::Base;
use super::calibration::Calibration;
use super::score::Asking;
use super::{Error, calibration_batches, device, hessian_batches, mixed, peak_memory_bytes, refine, run_dir};
use crate::config::{BiasCorrection, HessianPlan, HessianRequest, Plan, Rounding};
use crate::correct::{self, Steps};
use crate::dataset::{Dataset, Shard};
use crate::feed;
use crate::jit::{self, Clean, Listing, NoVisit};
use crate::quantizer::Grid;
use crate::report::{Hashes, Timings};
use crate::settings::{self, Settings, SiteSettings};
use crate::sites::{LeftFloat, Sites};
use crate::statistics::GradientSums;
use crate::threshold::{ErrorMethod, GRADIENT_SUMS_MAX_BITS};

/// Calibration in plain forwards, measured on MobileNetV2; see docs/measurements.md.
const CALIBRATION: f64 = 1.35;

/// Evaluation in plain forwards: a float pass, and a simulated one with its quantizers, measured on MobileNetV2.
const EVALUATION: f64 = 2.5;

/// The float and the quantized model side by side, in plain forwards; measured on MobileNetV2, as the next three.
const SIDE_BY_SIDE: f64 = 4.0;

/// A simulation of the quantized model on the same rows.
const COMPARISON: f64 = 1.3;

/// A forward that gradients are asked of.
const GRADIENTS: f64 = 1.5;

/// A way back.
const WAY_BACK: f64 = 1.8;

/// Hessians of what ops read, and rounding.
const ROUNDING: f64 = 6.0;

/// Runs of the batch, of which the fastest counts: the first one is slow.
const RUNS: usize = 3;

/// Search of one activation site in seconds, an upper value of those measured.
const SITE: f64 = 0.01;

/// Bytes of the statistics of one activation site, an upper value of those seen.
const STATISTICS: u64 = 1 << 20;

/// A run that was not made.
#[derive(Debug, Clone)]
pub struct Estimate {
    /// The device that a run would take.
    pub device: String,
    /// SHA-256 of what goes in.
    pub hashes: Hashes,
    /// Weights to quantize.
    pub weights: usize,
    /// Their elements.
    pub weight_elements: u64,
    /// Activation sites to quantize.
    pub activations: usize,
    /// Weights and activations whose bits are chosen under a budget.
    pub free: [usize; 2],
    /// Biases to correct, and those of ops with quantized weights that are not; `None` where that is not asked for.
    pub biases: Option<[usize; 2]>,
    /// Weights to round otherwise than to nearest, and ops whose weights are not; `None` where that is not asked for.
    pub roundings: Option<[usize; 2]>,
    /// What stays float.
    pub left_float: Vec<LeftFloat>,
    /// Rows of calibration data.
    pub calibration_rows: usize,
    /// Rows that Hessian scores are computed on; 0 where no error method asks for them.
    pub hessian_rows: usize,
    /// Rows that the models are compared on.
    pub evaluation_rows: usize,
    /// Seconds per stage; that of loading is measured.
    pub timings: Timings,
    /// Largest resident memory; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// Loads model and data, finds the sites, runs one batch, and says what a run would cost.
///
/// # Errors
/// Whatever would make the run fail before it calibrates.
pub fn estimate(plan: &Plan) -> Result<Estimate, Error> {
    run_dir::check(&plan.output.dir)?;
    let start = Instant::now();
    let taken = device::take(plan.device)?;
    let (base, comparison) = Base::load_to_compare(plan, taken, (Calibration::open(&plan.calibration)?, None))?;
    let hashes = base.hashes(plan, &comparison)?;
    let (sites, settings) = settings::settle(plan, base.sites.clone())?;
    mixed::check(&sites, &settings)?;
    let (model, calibration) = (&base.model, base.calibration.data()?);
    let load = start.elapsed().as_secs_f64();

    let batch_size = plan.calibration.batch_size.get().min(calibration.rows());
    let batches = calibration_batches(plan);
    let arguments = feed::bind(model.module(), calibration.first(batch_size)?).map_err(batches.blame())?;
    let float = model.instrument(&[], &[])?;
    let mut row = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        float.run(&arguments, &mut NoVisit).map_err(batches.blame())?;
        jit::synchronize(base.taken.device)?;
        row = row.min(start.elapsed().as_secs_f64() / batch_size as f64);
    }

    let (hessian, hessian_rows) = match &plan.hessian {
        Some(hessian) => {
            let seconds = hessian_seconds(hessian, &settings, &sites, model, calibration);
            seconds.map_err(hessian_batches(hessian).blame())?
        }
        None => (0.0, 0),
    };

    let sequence = InSequence::of(&base, plan, (&sites, &settings))?;
    let elements = |shape: &[i64]| shape.iter().map(|size| size.unsigned_abs()).product::<u64>();
    let weights: Vec<u64> = sites.weights.iter().map(|site| elements(&site.shape)).collect();
    let weight_elements: u64 = weights.iter().sum();
    // A site of mixed precision is searched at each width, and once more when its bits are chosen.
    let searches = |site: &SiteSettings| {
        let widths = site.widths().count() as f64;
        if settings.mixed.is_some() { widths + 1.0 } else { 1.0 }
    };
    let search: f64 = weights
        .iter()
        .zip(&settings.weights)
        .map(|(&count, site)| count as f64 * per_weight(site) * searches(site))
        .sum();
    let activations: f64 = settings.activations.iter().map(|site| SITE * searches(site)).sum();
    let evaluation_rows = comparison.rows();
    let mut timings = Timings {
        load,
        calibrate: row * calibration.rows() as f64 * CALIBRATION,
        hessian,
        search: search + activations,
        correct: row * sequence.as_ref().map_or(0.0, InSequence::forwards),
        emit: 0.0,
        check: row * comparison.checked_rows() as f64 * EVALUATION,
        evaluate: row * evaluation_rows as f64 * EVALUATION,
        total: 0.0,
    };
    timings.total = timings.load
        + timings.calibrate
        + timings.hessian
        + timings.search
        + timings.correct
        + timings.check
        + timings.evaluate;
    let targets = base.targets(plan.weights.bias_correction, &sites);
    let closed_form = [targets.count(), targets.left_out().len()];
    let is_corrected = plan.weights.bias_correction != BiasCorrection::None;
    let statistics = sites.activations.len() as u64 * STATISTICS + targets.bytes();
    let gradient_sums = gradient_sums(&settings, hessian_rows);
    // The search has the weights and their quantized copies in memory, four bytes an element.
    let copies = (2 + u64::from(sequence.is_some())) * 4 * weight_elements;
    let in_sequence = sequence.as_ref().map_or(0, |sequence| sequence.bytes(model.listing()));
    Ok(Estimate {
        device: base.device(),
        hashes,
        weights: sites.weights.len(),
        weight_elements,
        activations: sites.activations.len(),
        free: [&settings.weights, &settings.activations].map(|all| all.iter().filter(|it| it.free.is_some()).count()),
        biases: is_corrected.then(|| sequence.as_ref().map_or(closed_form, InSequence::biases)),
        roundings: sequence.as_ref().and_then(InSequence::roundings),
        left_float: sites.left_float,
        calibration_rows: calibration.rows(),
        hessian_rows,
        evaluation_rows,
        timings,
        peak_memory_bytes: peak_memory_bytes().map(|bytes| bytes + statistics + gradient_sums + copies + in_sequence),
    })
}

/// What is done op by op.
struct InSequence<'a> {
    plan: &'a Plan,
    steps: Steps,
    /// Elements.
    largest_weight: u64,
    rows: usize,
    batches: usize,
    compares_others: bool,
}

impl<'a> InSequence<'a> {
    fn of(base: &Base, plan: &'a Plan, (sites, settings): (&Sites, &Settings)) -> Result<Option<Self>, Error> {
        let Some(HessianPlan { request, .. }) = plan.hessian.as_ref().filter(|_| refine::asked(plan).is_in_sequence())
        else {
            return Ok(None);
        };
        let rows = request.samples.get().min(base.calibration.rows);
        let batches = rows.div_ceil(request.batch_size.get());
        let steps = refine::steps(base, plan, (sites, settings))?;
        let largest_weight = steps.largest_weight(sites);
        let compares_others = refine::other_batches(request, base.calibration.rows).is_some();
        Ok(Some(Self { plan, steps, largest_weight, rows, batches, compares_others }))
    }

    fn is_rounded(&self) -> bool {
        self.plan.weights.rounding == Rounding::Gptq
    }

    fn is_weighted(&self) -> bool {
        self.plan.weights.bias_correction == BiasCorrection::Weighted
    }

    /// Biases that are corrected, and ops whose biases are not.
    fn biases(&self) -> [usize; 2] {
        [self.steps.corrected(), self.steps.not_corrected.len()]
    }

    fn roundings(&self) -> Option<[usize; 2]> {
        self.is_rounded().then(|| [self.steps.rounded(), self.steps.not_rounded.len()])
    }

    /// What it takes in plain forwards of a row.
    fn forwards(&self) -> f64 {
        let gradients = if self.is_weighted() { GRADIENTS + WAY_BACK } else { 0.0 };
        let rounding = if self.is_rounded() { ROUNDING } else { 0.0 };
        let comparisons = if self.plan.weights.bias_correction == BiasCorrection::None { 1.0 } else { 2.0 };
        // On other rows of the float and the refined model too.
        let more = if self.compares_others { 1.0 + COMPARISON } else { 0.0 };
        (SIDE_BY_SIDE + gradients + rounding + comparisons * COMPARISON + more) * self.rows as f64
    }

    /// Bytes of what is kept of all batches.
    fn bytes(&self, listing: &Listing) -> u64 {
        let squares = if self.is_weighted() { self.steps.squares_bytes(self.batches) } else { 0 };
        let live = correct::live_bytes_of_a_row(listing) * self.rows as u64;
        // Copies while an op is rounded: of its Hessian, and of its weight in doubles; and of one batch what the float weights give, and
        // what is missing there.
        let hessians = if self.is_weighted() { 16 } else { 6 };
        2 * live
            + 2 * live.div_ceil(self.batches.max(1) as u64)
            + squares
            + hessians * self.steps.largest_hessian()
            + 16 * 8 * self.largest_weight
    }
}

/// Bytes that the sums of gradients by row take at most, of the activations that have some.
fn gradient_sums(settings: &Settings, rows: usize) -> u64 {
    let has_some = |site: &&SiteSettings| settings.is_scored(site) && site.narrowest().get() <= GRADIENT_SUMS_MAX_BITS;
    let sites = settings.activations.iter().filter(has_some).count() as u64;
    sites * rows.min(GradientSums::ENOUGH) as u64 * GradientSums::BINS as u64 * 4
}

/// Seconds that Hessian scores take, by those of one batch, and the rows that they are computed on; with a tolerance, of as
/// many probes as there are at least.
fn hessian_seconds(
    plan: &HessianPlan,
    settings: &Settings,
    sites: &Sites,
    model: &Clean,
    data: &Dataset,
) -> Result<(f64, usize), Error> {
    let HessianRequest { samples, batch_size, .. } = plan.request;
    let rows = samples.get().min(data.rows());
    let asking = Asking::new(settings, sites, None);
    if asking.is_empty() {
        return Ok((0.0, 0));
    }
    let seconds = |probes: usize| -> Result<f64, Error> {
        let probes = NonZeroUsize::new(probes).unwrap_or(NonZeroUsize::MIN);
        let samples = batch_size.min(samples);
        let request = HessianRequest { samples, probes, tolerance: None, ..plan.request.clone() };
        let start = Instant::now();
        asking.compute(&HessianPlan { request, ..plan.clone() }, model, (data, Shard::WHOLE), |_| ())?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The first one is slow. Each probe beyond the first takes another way back.
    seconds(1)?;
    let (one, two) = (seconds(1)?, seconds(2)?);
    let batch = one + (plan.request.probes.get() - 1) as f64 * (two - one).max(0.0);
    Ok((batch * rows as f64 / batch_size.min(samples).get().min(rows) as f64, rows))
}

/// Seconds of the search for one element of a weight, per channel, on two cores.
fn per_weight(settings: &SiteSettings) -> f64 {
    let is_uniform = settings.scheme.grid == Grid::Uniform;
    let nanoseconds = match settings.error_method {
        ErrorMethod::NoClipping => 5.0,
        ErrorMethod::Kl => 1300.0,
        ErrorMethod::Hmse if is_uniform => 200.0,
        ErrorMethod::Hmse => 170.0,
        _ if is_uniform => 160.0,
        _ => 70.0,
    };
    nanoseconds * 1e-9
}
