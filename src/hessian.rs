//! Hessian scores: how much the model's outputs depend on each element of a weight or activation.
//!
//! With f the outputs, θ an element, and v random with independent components of mean 0 and variance 1,
//! h = 1/(N·n) Σ over N samples and n probes of (∂ vᵀf / ∂θ)² is an unbiased estimate of the diagonal of the Gauss-Newton
//! matrix JᵀJ, averaged over samples: that of the Hessian of ½‖f − f₀‖² at f = f₀. Gradients come from libtorch's
//! autograd, batch by batch; squares are summed as they come, and nothing is kept of a batch. Of large activations each probe
//! looks at a part, which leaves the estimate unbiased.
//!
//! It refuses to know how scores are used.

mod cuts;
mod directions;
mod merge;
mod on_device;
mod squares;
mod sums;
mod thinning;

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::{HessianRequest, MOST_PROBES};
use crate::dataset::{self, Dataset, Shard};
use crate::feed;
use crate::jit::{self, Arguments, BoxError, Clean, Differentiable, Listing, Recording, Tap, TapKind, ValueId, Visit};
use crate::observe::Summing;
use crate::sites::{ActivationSite, WeightSite};
use crate::statistics::{ActivationScores, Divided, WeightedCounter};

pub use squares::{Squares, squares};

use directions::{Directions, is_probed};
use on_device::{Look, OnDevice};
use sums::{ActivationSums, WeightSums};
use thinning::{Draw, Thinning};

/// Counters beyond these gain little.
const MOST_COUNTERS: usize = 8;

/// Why there are no scores.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// The model.
    #[error(transparent)]
    Jit(#[from] jit::Error),
}

/// What scores are wanted of.
#[derive(Debug, Clone, Copy, Default)]
pub struct Layers<'a> {
    /// Weights.
    pub weights: &'a [&'a WeightSite],
    /// Activations.
    pub activations: &'a [&'a ActivationSite],
    /// In the order of the activations: the range of the values of those whose gradients are wanted by value and row too.
    pub ranges: &'a [Option<RangeInclusive<f32>>],
}

/// The scores of all layers.
#[derive(Debug)]
pub struct Scores {
    /// In the order of the layers: one score for each element, of the weight's shape.
    pub weights: Vec<Scored<Tensor>>,
    /// In the order of the layers: the scores by value.
    pub activations: Vec<Scored<ActivationScores>>,
    /// Rows that were used.
    pub samples: usize,
    /// Random directions for each row.
    pub probes: usize,
    /// Paths of outputs that have no derivative with respect to any of the layers, in some batch at least: indices, and those
    /// that depend on none of the layers.
    pub left_out: Vec<String>,
}

/// The scores of one layer.
#[derive(Debug)]
pub struct Scored<T> {
    /// The scores, if they are of use.
    pub scores: Result<T, Unusable>,
    /// ‖estimated standard error‖ / ‖scores‖, from the spread over probes; `None` for a single probe.
    pub standard_error: Option<f64>,
    /// What the gradients of a weight are counted in, a power of two: 1, unless an f32 would not hold the scores. They are
    /// compared within a weight alone.
    pub unit: f64,
}

/// Why the scores of a layer are of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unusable {
    /// It did not run, or nothing that has a derivative leads from it to an output.
    #[error("no gradient reached it on {samples} samples: it did not run, or {cuts}")]
    NoGradient {
        /// Rows that were used.
        samples: usize,
        /// The ops that let no gradient through.
        cuts: String,
    },
    /// No output depends on it.
    #[error("all its Hessian scores are zero on {samples} samples")]
    Zero {
        /// Rows that were used.
        samples: usize,
    },
    /// NaN or infinity, in a gradient or because its square is too large.
    #[error("its Hessian scores are NaN or infinite")]
    NotFinite,
}

/// Computes the scores of `layers` on rows of `data`. `advance` is called with the rows of each finished batch.
///
/// The scores of activations do not depend on the batch size beyond rounding. In those of weights the samples of a batch
/// share a gradient, whose mixed terms vanish in expectation.
///
/// # Errors
/// Where the data cannot be read or the model fails. Layers that no gradient reaches are [`Unusable`].
pub fn score(
    model: &Clean,
    layers: Layers<'_>,
    data: &Dataset,
    request: &HessianRequest,
    advance: impl FnMut(usize),
) -> Result<Scores, Error> {
    score_by(Summing::on(model.module().device()), model, layers, (data, Shard::WHOLE), request, advance)
}

/// As [`score`], with the scores of activations summed up as asked: they are the same but for rounding. Of a shard of the
/// batches; [`Scores::merged`] makes the scores of all of those of all shards.
///
/// # Errors
/// As there.
pub fn score_by(
    summing: Summing,
    model: &Clean,
    layers: Layers<'_>,
    (data, shard): (&Dataset, Shard),
    request: &HessianRequest,
    mut advance: impl FnMut(usize),
) -> Result<Scores, Error> {
    let mut run = Run::new(model, layers, request)?;
    if summing == Summing::TensorOps {
        run.activations.on_device = Some(OnDevice::new(model.module().device(), ranges(layers))?);
    }
    let batches = || data.sample(request.samples, request.seed, request.batch_size).shard(shard);
    let mut lot = request.probes.get();
    loop {
        for batch in batches() {
            let batch = batch?;
            let (rows, first_row) = (batch.rows, batch.first_row);
            run.batch(&feed::bind(model.module(), batch)?, Place { rows, first_row }, lot)?;
            advance(rows);
        }
        run.probes += lot;
        run.activations.collect()?;
        lot = match request.tolerance {
            Some(tolerance) => run.missing_probes(tolerance)?,
            None => 0,
        };
        if lot == 0 {
            break;
        }
    }
    let samples = batches().rows();
    // A shard may have no batch at all.
    let cuts =
        if samples > 0 && run.needs_cuts() { cuts::describe(model, layers, data, request)? } else { String::new() };
    run.scores(samples, &cuts)
}

/// Where a batch lies among the rows.
#[derive(Clone, Copy)]
struct Place {
    rows: usize,
    first_row: usize,
}

/// A probe among those of a lot, which share a forward.
#[derive(Clone, Copy)]
struct OfLot {
    probe: usize,
    probes: usize,
}

impl OfLot {
    /// Whether another way back follows.
    fn is_followed(self) -> bool {
        self.probe + 1 < self.probes
    }

    /// Whether there is another probe to differ from.
    fn has_spread(self) -> bool {
        self.probes > 1
    }
}

struct Run<'a> {
    request: &'a HessianRequest,
    graph: Differentiable,
    weights: WeightGradients,
    activations: Listener,
    /// Of the lots that are done.
    probes: usize,
    left_out: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(model: &'a Clean, layers: Layers<'a>, request: &'a HessianRequest) -> Result<Self, Error> {
        let (taps, lifted) = (taps(layers), lifted(layers));
        Ok(Self {
            request,
            graph: model.differentiable(&taps, &lifted)?,
            weights: WeightGradients::new(model, layers.weights)?,
            activations: Listener {
                names: layers.activations.iter().map(|site| site.name.clone()).collect(),
                first_values: layers.activations.iter().map(|site| site.anchors.first().map(|it| it.value)).collect(),
                are_rows: layers.activations.iter().map(|site| are_rows(model.listing(), site)).collect(),
                sums: ranges(layers).into_iter().map(ActivationSums::new).collect(),
                counters: (0..jit::thread_count().min(MOST_COUNTERS)).map(|_| WeightedCounter::new()).collect(),
                rows: 0,
                draw: Draw { seed: request.seed, site: 0, first_row: 0, probe: 0 },
                kept: [Vec::new(), Vec::new()],
                on_device: None,
            },
            probes: 0,
            left_out: Vec::new(),
        })
    }

    /// One forward, and a way back for each of `lot` probes.
    fn batch(&mut self, arguments: &Arguments, place: Place, lot: usize) -> Result<(), Error> {
        let recording = self.graph.record(arguments, &mut jit::NoVisit)?;
        let tensors = recording.output().tensors();
        let numbered = tensors.iter().map(|(_, output)| *output).enumerate();
        let outputs: Vec<(usize, &Tensor)> = numbered.filter(|(_, output)| is_probed(output)).collect();
        for (path, _) in tensors.iter().filter(|(_, output)| !is_probed(output)) {
            if !self.left_out.contains(path) {
                self.left_out.push(path.clone());
            }
        }
        if outputs.is_empty() {
            // None of the layers ran in this batch, or no gradient reaches any: its rows count with gradients of zero.
            self.activations.rows = place.rows;
            self.activations.begin_probe(self.probes == 0)?;
            return Ok(());
        }
        let directions = Directions { request: self.request, first_row: place.first_row, rows: place.rows };
        for probe in 0..lot {
            let drawn = directions.draw(&outputs, self.probes + probe)?;
            self.activations.rows = place.rows;
            let draw = &mut self.activations.draw;
            (draw.first_row, draw.probe) = (place.first_row, self.probes + probe);
            let outputs: Vec<_> = outputs.iter().map(|(_, output)| *output).zip(drawn).collect();
            self.activations.begin_probe(self.probes + probe == 0)?;
            self.probe(&recording, &outputs, OfLot { probe, probes: lot })?;
        }
        if lot > 1 {
            self.weights.sums.iter_mut().try_for_each(|sums| sums.end_batch(lot))?;
            self.activations.sums.iter_mut().for_each(|sums| sums.end_batch(lot));
        }
        Ok(())
    }

    fn probe(&mut self, recording: &Recording, outputs: &[(&Tensor, Tensor)], place: OfLot) -> Result<(), Error> {
        self.weights.has_spread = place.has_spread();
        let mut both = Both { weights: &mut self.weights, activations: &mut self.activations };
        recording.backward(outputs, place.is_followed(), &mut both)?;
        self.weights.end_probe()?;
        if place.has_spread() {
            self.activations.end_probe()?;
        }
        Ok(())
    }

    /// How many probes more the least exact layer needs, by the law of 1/√n; at most as many again as there were.
    fn missing_probes(&self, tolerance: f64) -> Result<usize, Error> {
        let weights = self.weights.sums.iter().map(WeightSums::relative_error);
        let weights: Vec<Option<f64>> = weights.collect::<Result<_, _>>()?;
        let activations = self.activations.sums.iter().map(ActivationSums::relative_error);
        let largest = weights.into_iter().chain(activations).flatten().fold(0.0, f64::max);
        if largest <= tolerance || self.probes >= MOST_PROBES {
            return Ok(0);
        }
        let needed = self.probes as f64 * (largest / tolerance).powi(2);
        let missing = (needed.ceil() - self.probes as f64).clamp(2.0, self.probes as f64) as usize;
        Ok(missing.min(MOST_PROBES - self.probes))
    }

    fn needs_cuts(&self) -> bool {
        self.weights.sums.iter().any(|sums| !sums.is_reached())
            || self.activations.sums.iter().any(|sums| !sums.is_reached)
    }

    fn scores(self, samples: usize, cuts: &str) -> Result<Scores, Error> {
        let factor = 1.0 / (samples as f64 * self.probes as f64);
        let unreached = || Unusable::NoGradient { samples, cuts: cuts.to_owned() };
        let weights = self.weights.sums.into_iter().map(|sums| {
            let standard_error = sums.relative_error()?;
            let (scores, unit) = match sums.scaled(factor)? {
                None => (Err(unreached()), 1.0),
                Some((scores, unit)) => (usable(scores, samples)?, unit),
            };
            Ok(Scored { scores, standard_error, unit })
        });
        let activations = self.activations.sums.into_iter().map(|sums| {
            let standard_error = sums.relative_error();
            let mut scores = ActivationScores { by_value: sums.histogram, sums: sums.gradients };
            scores.by_value.scale(factor);
            let scores = match scores {
                _ if !sums.is_reached => Err(unreached()),
                scores if !scores.is_finite() => Err(Unusable::NotFinite),
                scores if scores.by_value.is_zero() => Err(Unusable::Zero { samples }),
                scores => Ok(scores),
            };
            Scored { scores, standard_error, unit: 1.0 }
        });
        Ok(Scores {
            weights: weights.collect::<Result<_, jit::Error>>()?,
            activations: activations.collect(),
            samples,
            probes: self.probes,
            left_out: self.left_out,
        })
    }
}

/// The scores, if all are finite and not all are zero.
fn usable(scores: Tensor, samples: usize) -> Result<Result<Tensor, Unusable>, jit::Error> {
    let (least, greatest) = (scores.f_min()?.f_double_value(&[])?, scores.f_max()?.f_double_value(&[])?);
    // Either is NaN if any score is.
    Ok(match greatest {
        _ if !(least.is_finite() && greatest.is_finite()) => Err(Unusable::NotFinite),
        0.0 => Err(Unusable::Zero { samples }),
        _ => Ok(scores),
    })
}

/// A tap on the gradients of each value of the activations.
fn taps(layers: Layers<'_>) -> Vec<Tap> {
    let sites = layers.activations.iter().enumerate();
    let values = sites.flat_map(|(number, site)| site.anchors.iter().map(move |anchor| (number, anchor.value)));
    values.map(|(number, value)| Tap { value, number, kind: TapKind::Gradient }).collect()
}

/// False where the rows that the model was checked on show that the first axis of the site's values is another one, as long
/// as a batch has rows by chance.
fn are_rows(listing: &Listing, site: &ActivationSite) -> bool {
    let length = |value: ValueId| listing.values.get(value)?.seen.as_ref()?.shape.first().copied();
    let arguments = listing.blocks.first().map(|forward| forward.parameters.as_slice()).unwrap_or_default();
    let rows = arguments.iter().find_map(|&value| length(value));
    site.anchors.iter().all(|anchor| rows.is_none() || length(anchor.value).is_none_or(|own| Some(own) == rows))
}

/// Of each activation the range that its gradients are summed up in.
fn ranges(layers: Layers<'_>) -> Vec<Option<RangeInclusive<f32>>> {
    (0..layers.activations.len()).map(|index| layers.ranges.get(index).cloned().flatten()).collect()
}

/// The constants that are the weights.
fn lifted(layers: Layers<'_>) -> Vec<ValueId> {
    layers.weights.iter().flat_map(|site| site.values.iter().copied()).collect()
}

/// Takes the gradients of weights as they come, so that no two of them are in memory.
struct WeightGradients {
    sums: Vec<WeightSums>,
    /// The weight that each lifted constant is of.
    weight_of: Vec<usize>,
    /// How often each weight stands in the graph.
    times: Vec<usize>,
    /// Of a weight that stands in the graph several times the sum of their gradients, of the probe under way.
    together: Vec<Option<Tensor>>,
    /// Whether there is another probe to differ from.
    has_spread: bool,
}

impl WeightGradients {
    fn new(model: &Clean, sites: &[&WeightSite]) -> Result<Self, Error> {
        let sums =
            |site: &&WeightSite| WeightSums::new(&model.constant(site.values.first().copied().unwrap_or_default())?);
        let weight_of = sites.iter().enumerate().flat_map(|(index, site)| site.values.iter().map(move |_| index));
        Ok(Self {
            sums: sites.iter().map(sums).collect::<Result<_, _>>()?,
            weight_of: weight_of.collect(),
            times: sites.iter().map(|site| site.values.len()).collect(),
            together: sites.iter().map(|_| None).collect(),
            has_spread: false,
        })
    }

    fn add(&mut self, constant: usize, gradient: &Tensor) -> Result<(), jit::Error> {
        let Some(&weight) = self.weight_of.get(constant) else { return Ok(()) };
        let (Some(sums), Some(together)) = (self.sums.get_mut(weight), self.together.get_mut(weight)) else {
            return Ok(());
        };
        if self.times.get(weight) == Some(&1) {
            return sums.add(gradient, self.has_spread);
        }
        *together = Some(match together.take() {
            None if gradient.is_sparse() => gradient.f_to_dense(None, false)?,
            // Kept until the probe ends, as nobody else writes into it.
            None => gradient.shallow_clone(),
            Some(sum) => sum.f_add(gradient)?,
        });
        Ok(())
    }

    fn end_probe(&mut self) -> Result<(), jit::Error> {
        let together = self.sums.iter_mut().zip(&mut self.together);
        let mut summed = together.filter_map(|(sums, together)| Some((sums, together.take()?)));
        summed.try_for_each(|(sums, gradient)| sums.add(&gradient, self.has_spread))
    }
}

/// Hears of both.
struct Both<'a> {
    weights: &'a mut WeightGradients,
    activations: &'a mut Listener,
}

impl Visit for Both<'_> {
    fn gradient(&mut self, tap: usize, value: &Tensor, gradient: &Tensor) -> Result<(), BoxError> {
        self.activations.gradient(tap, value, gradient)
    }

    fn constant_gradient(&mut self, constant: usize, gradient: &Tensor) -> Result<(), BoxError> {
        Ok(self.weights.add(constant, gradient)?)
    }
}

/// Takes the gradients of activations as they come.
struct Listener {
    names: Vec<String>,
    /// They tell sites apart whichever others are scored with them.
    first_values: Vec<Option<ValueId>>,
    /// Whether the first axis of a site's values is that of the rows, as far as that is known.
    are_rows: Vec<bool>,
    sums: Vec<ActivationSums>,
    /// One for each thread.
    counters: Vec<WeightedCounter>,
    /// Of the batch under way.
    rows: usize,
    /// Of the probe under way.
    draw: Draw,
    /// Room for what is looked at of a large activation.
    kept: [Vec<f32>; 2],
    /// Where scores are summed up by tensor ops, all but their spread; histograms are empty then until [`collect`](Self::collect).
    on_device: Option<OnDevice>,
}

impl Listener {
    /// One probe shows which errors add up; further ones would cost as much again.
    fn begin_probe(&mut self, is_first: bool) -> Result<(), Error> {
        match &mut self.on_device {
            None => {
                let gradients = self.sums.iter_mut().map(|sums| &mut sums.gradients);
                gradients.for_each(|sums| if is_first { sums.begin(self.rows) } else { sums.end() });
            }
            Some(on_device) => on_device.begin_probe(self.rows, is_first)?,
        }
        Ok(())
    }

    fn end_probe(&mut self) -> Result<(), Error> {
        match &self.on_device {
            None => self.sums.iter_mut().for_each(ActivationSums::end_probe),
            Some(on_device) => {
                for (sums, now) in self.sums.iter_mut().zip(on_device.octave_sums()?) {
                    sums.end_probe_at(now);
                }
            }
        }
        Ok(())
    }

    /// Brings what there is on a device into the histograms.
    fn collect(&mut self) -> Result<(), Error> {
        if let Some(on_device) = &self.on_device {
            for (sums, scores) in self.sums.iter_mut().zip(on_device.scores()?) {
                (sums.histogram, sums.gradients) = (scores.by_value, scores.sums);
            }
        }
        Ok(())
    }

    /// The elements of a row of this value, if its rows lie one after the other.
    fn row_length(&self, tap: usize, value: &Tensor) -> Option<usize> {
        if !self.are_rows.get(tap).copied().unwrap_or(true) {
            return None;
        }
        let row_length = value.numel().checked_div(self.rows)?;
        let first = (value.size().first().copied()?, value.stride().first().copied()?);
        (first == (i64::try_from(self.rows).ok()?, i64::try_from(row_length).ok()?)).then_some(row_length)
    }
}

/// A gradient that does not fit its value.
#[derive(Debug, thiserror::Error)]
#[error("activation site {site}: {message}")]
struct SiteError {
    site: String,
    message: String,
}

impl Listener {
    fn gradient(&mut self, tap: usize, value: &Tensor, gradient: &Tensor) -> Result<(), BoxError> {
        let row_length = self.row_length(tap, value);
        let thinning = row_length.map(|length| Thinning::new(length, self.draw.probe));
        let thinning = thinning.filter(|thinning| thinning.is_needed());
        let divided = if row_length.is_some() { Divided::ByRow } else { Divided::Not };
        let site = self.first_values.get(tap).copied().flatten();
        let draw = Draw { site: site.map_or(0, |value| value as u64), ..self.draw };
        let Some(sums) = self.sums.get_mut(tap) else { return Err(format!("tap {tap} belongs to no site").into()) };
        let (counters, kept) = (&mut self.counters, &mut self.kept);
        sums.is_reached = true;
        let failed = |error: jit::Error| {
            let site = self.names.get(tap).cloned().unwrap_or_default();
            SiteError { site, message: error.to_string() }.into()
        };
        if let Some(on_device) = &mut self.on_device {
            return on_device.observe(tap, [value, gradient], Look { row_length, thinning, draw }).map_err(failed);
        }
        let observe = |values: &[f32], gradients: &[f32]| {
            let mut outcome = Ok(());
            sums.gradients.observe(values, gradients, divided, |parts, work| outcome = jit::in_parallel(parts, work));
            outcome?;
            let mut outcome = Ok(());
            let (values, gradients) = match thinning {
                Some(thinning) => {
                    thinning.collect(draw, values, gradients, kept);
                    (kept[0].as_slice(), kept[1].as_slice())
                }
                None => (values, gradients),
            };
            sums.histogram.observe(values, gradients, counters, |parts, work| outcome = jit::in_parallel(parts, work));
            outcome
        };
        jit::with_pairs(value, gradient, observe).and_then(|outcome| outcome).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sites::{Anchor, ChannelAxis};

    #[test]
    fn scores_of_no_use() {
        let reason = |scores: &[f32]| usable(Tensor::from_slice(scores), 7).unwrap().err();
        assert_eq!(reason(&[0.0, 1e-30]), None);
        assert_eq!(reason(&[0.0, 0.0]), Some(Unusable::Zero { samples: 7 }));
        for bad in [f32::NAN, f32::INFINITY] {
            assert_eq!(reason(&[1.0, bad, 0.0]), Some(Unusable::NotFinite));
        }
    }

    /// The model was checked on four rows: an axis of eight places is no axis of rows, though a batch may have eight.
    #[test]
    fn an_axis_of_other_lengths_is_not_that_of_the_rows() {
        let seen = |shape: &[i64]| Some(jit::Seen { dtype: "Float".to_owned(), shape: shape.to_vec() });
        let value = |seen| jit::Value { is_tensor: true, seen, ..jit::Value::default() };
        let values = vec![
            value(None),
            value(seen(&[4, 8, 6])),
            value(seen(&[8, 4, 6])),
            value(seen(&[4, 6])),
            value(None),
            value(seen(&[])),
        ];
        let forward = jit::Block { parameters: vec![0, 1], ..jit::Block::default() };
        let listing = Listing { values, blocks: vec![forward], nodes: Vec::new() };
        let site = |value| ActivationSite {
            name: String::new(),
            layer: String::new(),
            op: String::new(),
            channel_axis: ChannelAxis::Second,
            anchors: vec![Anchor { value, name: String::new() }],
            members: vec![value],
            is_returned: false,
            is_read: true,
            makers: Vec::new(),
            readers: Vec::new(),
        };
        let found: Vec<bool> = (1..=5).map(|value| are_rows(&listing, &site(value))).collect();
        assert_eq!(found, [true, false, true, true, true]);
    }
}
