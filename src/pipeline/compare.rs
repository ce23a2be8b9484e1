//! Float against quantized on the evaluation data, or on the calibration data where there is no other.

use std::rc::Rc;

use tch::Tensor;

use super::calibration::Calibration;
use super::device::{self, Batches};
use super::simulation::Simulation;
use super::{CHECK_BATCHES, Error, blame, check_rows, hash};
use crate::config::Plan;
use crate::dataset::Dataset;
use crate::evaluate::Evaluation;
use crate::feed;
use crate::jit::{self, Arguments, Clean, NoVisit, Output};
use crate::report;

/// Rows that tell how much rounding alone makes of a difference.
const NOISE_ROWS: usize = 64;

/// What the models are compared on.
pub(super) struct Comparison {
    dataset: Rc<Dataset>,
    /// Where it is planned: `evaluation` or `calibration`.
    section: &'static str,
    labels: Option<Tensor>,
    /// The output to rank.
    output: Option<String>,
    /// SHA-256 of evaluation data.
    hash: Option<String>,
}

impl Comparison {
    /// Opens what the plan names; `calibration` stands in where it names nothing.
    ///
    /// # Errors
    /// Where the data cannot be read.
    pub(super) fn open(plan: &Plan, calibration: &Calibration) -> Result<Self, Error> {
        let Some(evaluation) = &plan.evaluation else {
            let dataset = Rc::clone(calibration.data()?);
            return Ok(Self { dataset, section: "calibration", labels: None, output: None, hash: None });
        };
        let path = &evaluation.data.path;
        let is_known = *path == plan.calibration.path && calibration.is_open();
        let hash = if is_known { calibration.hash.clone() } else { hash::of_path(path)? };
        let dataset = blame::open(&evaluation.data, "evaluation")?;
        let labels = blame::labels(&dataset, evaluation.labels.as_deref())?;
        let dataset = Rc::new(dataset);
        Ok(Self { dataset, section: "evaluation", labels, output: evaluation.output.clone(), hash: Some(hash) })
    }

    /// The data itself.
    pub(super) fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// SHA-256 of evaluation data, if it is other than that of calibration.
    pub(super) fn hash(&self) -> Option<&str> {
        self.hash.as_deref()
    }

    /// The section of the plan that it is of.
    pub(super) fn section(&self) -> &'static str {
        self.section
    }

    pub(super) fn rows(&self) -> usize {
        self.dataset.rows()
    }

    /// Rows that the written file is checked on.
    pub(super) fn checked_rows(&self) -> usize {
        self.rows().min(self.dataset.batch_size().get().saturating_mul(CHECK_BATCHES))
    }

    /// How the models run on it.
    pub(super) fn batches(&self) -> Batches {
        Batches { key: device::batch_size_of(self.section), rows: self.dataset.batch_size() }
    }

    /// Measures the float model on a few rows, so that a slip in the experiment is told before the work begins.
    pub(super) fn check(&self, model: &Clean) -> Result<(), Error> {
        let (arguments, rows) = check_rows(model.module(), &self.dataset, self.section)?;
        let output = model.module().forward(&arguments)?.on_cpu()?;
        let labels = self.labels.as_ref().map(|labels| rows_of(labels, 0, rows)).transpose()?;
        let mut evaluation = Evaluation::new(self.output.clone());
        evaluation.add(rows, &output, &output, labels.as_ref()).map_err(blame::measured)
    }

    pub(super) fn run(
        &self,
        model: &Clean,
        simulation: &Simulation,
        mut advance: impl FnMut(usize),
    ) -> Result<report::Evaluation, Error> {
        let mut evaluation = Evaluation::new(self.output.clone());
        let float = model.instrument(&[], &[])?;
        self.each_batch(model, |arguments, rows, labels| {
            let expected = float.run(arguments, &mut NoVisit)?.on_cpu()?;
            let found = simulation.run(arguments)?.on_cpu()?;
            evaluation.add(rows, &expected, &found, labels).map_err(blame::measured)?;
            advance(rows);
            Ok(())
        })?;
        let (float, quantized) = evaluation.finish();
        Ok(report::Evaluation { data: self.section, float, quantized })
    }

    /// As [`run`](Self::run), with the 8-bit model beside.
    pub(super) fn run_beside(
        &self,
        model: &Clean,
        simulation: &Simulation,
        int8: impl Fn(&Arguments) -> Result<Output, jit::Error>,
        mut advance: impl FnMut(usize),
    ) -> Result<Measured, Error> {
        let float = model.instrument(&[], &[])?;
        let mut evaluations = [(); 3].map(|()| Evaluation::new(self.output.clone()));
        self.each_batch(model, |arguments, rows, labels| {
            let expected = float.run(arguments, &mut NoVisit)?;
            let (simulated, found) = (simulation.run(arguments)?, int8(arguments)?);
            let pairs = [(&expected, &simulated), (&expected, &found), (&simulated, &found)];
            for (evaluation, (a, b)) in evaluations.iter_mut().zip(pairs) {
                evaluation.add(rows, a, b, labels).map_err(blame::measured)?;
            }
            advance(rows);
            Ok(())
        })?;
        let [(float, simulated), (_, int8), (_, between)] = evaluations.map(|evaluation| evaluation.finish());
        let of = |quantized| report::Evaluation { data: self.section, float, quantized };
        Ok(Measured { simulated: of(simulated), int8: of(int8), between, noise: self.noise(model, simulation)? })
    }

    /// The simulation row by row against the same in batches, on a few rows: how much rounding alone makes of a difference. `None`
    /// where rows cannot be told apart.
    fn noise(&self, model: &Clean, simulation: &Simulation) -> Result<Option<report::Comparison>, Error> {
        let mut evaluation = Evaluation::new(self.output.clone());
        let mut left = NOISE_ROWS;
        for batch in self.dataset.batches() {
            let batch = batch?;
            let together = simulation.run(&feed::bind(model.module(), batch.share())?)?;
            for index in 0..batch.rows.min(left) {
                let Some(expected) = together.row(index, batch.rows)? else { return Ok(None) };
                let alone = feed::bind(model.module(), batch.row(index)?)?;
                // A model that was traced for one batch size takes no single rows.
                let Ok(found) = simulation.run(&alone) else { return Ok(None) };
                if evaluation.add(1, &expected, &found, None).is_err() {
                    return Ok(None);
                }
            }
            left = left.saturating_sub(batch.rows);
            if left == 0 {
                break;
            }
        }
        Ok(Some(evaluation.finish().1))
    }

    fn each_batch(
        &self,
        model: &Clean,
        mut visit: impl FnMut(&Arguments, usize, Option<&Tensor>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for batch in self.dataset.batches() {
            let batch = batch?;
            let (first, rows) = (batch.first_row, batch.rows);
            let arguments = feed::bind(model.module(), batch)?;
            let labels = self.labels.as_ref().map(|labels| rows_of(labels, first, rows)).transpose()?;
            visit(&arguments, rows, labels.as_ref())?;
        }
        Ok(())
    }
}

/// What a run with an 8-bit model measures.
pub(super) struct Measured {
    /// The simulation against the float model.
    pub(super) simulated: report::Evaluation,
    /// The 8-bit model against the float model.
    pub(super) int8: report::Evaluation,
    /// The 8-bit model against the simulation.
    pub(super) between: report::Comparison,
    /// The simulation against itself, row by row.
    pub(super) noise: Option<report::Comparison>,
}

#[allow(clippy::cast_possible_wrap)]
pub(super) fn rows_of(labels: &Tensor, first: usize, rows: usize) -> Result<Tensor, tch::TchError> {
    // Row counts come from files that are addressed with i64.
    labels.f_narrow(0, first as i64, rows as i64)
}

/// max |a − b| over all tensors, infinite where their number or shapes differ; NaN equals NaN.
pub(super) fn largest_difference(a: &Output, b: &Output) -> Result<f64, tch::TchError> {
    let (a, b) = (a.tensors(), b.tensors());
    if a.len() != b.len() {
        return Ok(f64::INFINITY);
    }
    let mut largest = 0.0f64;
    for ((_, a), (_, b)) in a.iter().zip(&b) {
        if a.size() != b.size() {
            return Ok(f64::INFINITY);
        }
        if a.f_allclose(b, 0.0, 0.0, true)? {
            continue;
        }
        let (a, b) = (a.f_to_kind(tch::Kind::Double)?, b.f_to_kind(tch::Kind::Double)?);
        let zero = Tensor::from(0.0f64);
        let same = a.f_eq_tensor(&b)?;
        let difference = zero.f_where_self(&same, &a.f_sub(&b)?)?.f_abs()?.f_max()?.f_double_value(&[])?;
        largest = largest.max(if difference.is_nan() { f64::INFINITY } else { difference });
    }
    Ok(largest)
}
