//! Float against quantized on the evaluation data, or on the calibration data where there is no other.

use std::num::NonZeroUsize;

use tch::Tensor;

use super::device::Batches;
use super::simulation::Simulation;
use super::{CHECK_BATCHES, Error, blame, check_rows};
use crate::config::Plan;
use crate::dataset::Dataset;
use crate::evaluate::Evaluation;
use crate::feed;
use crate::jit::{Clean, NoVisit, Output};
use crate::report;

/// What the models are compared on.
pub(super) struct Data {
    evaluation: Option<Dataset>,
    labels: Option<Tensor>,
    /// The output to rank.
    output: Option<String>,
    batch_size: NonZeroUsize,
}

impl Data {
    pub(super) fn open(plan: &Plan) -> Result<Self, Error> {
        let Some(evaluation) = &plan.evaluation else {
            let batch_size = plan.calibration.batch_size;
            return Ok(Self { evaluation: None, labels: None, output: None, batch_size });
        };
        let data = blame::open(&evaluation.data, "evaluation")?;
        let labels = blame::labels(&data, evaluation.labels.as_deref())?;
        let (output, batch_size) = (evaluation.output.clone(), evaluation.data.batch_size);
        Ok(Self { evaluation: Some(data), labels, output, batch_size })
    }

    /// The data itself; `calibration` stands in where there is no evaluation data.
    pub(super) fn dataset<'a>(&'a self, calibration: &'a Dataset) -> &'a Dataset {
        self.evaluation.as_ref().unwrap_or(calibration)
    }

    pub(super) fn rows(&self, calibration: &Dataset) -> usize {
        self.dataset(calibration).rows()
    }

    /// Rows that the written file is checked on.
    pub(super) fn checked_rows(&self, calibration: &Dataset) -> usize {
        self.rows(calibration).min(self.batch_size.get().saturating_mul(CHECK_BATCHES))
    }

    /// How the models run on it.
    pub(super) fn batches(&self) -> Batches {
        let key = if self.evaluation.is_some() { "evaluation.batch_size" } else { "calibration.batch_size" };
        Batches { key, rows: self.batch_size }
    }

    /// Measures the float model on a few rows, so that a slip in the experiment is told before the work begins.
    pub(super) fn check(&self, model: &Clean, calibration: &Dataset) -> Result<(), Error> {
        let data = self.dataset(calibration);
        let (arguments, rows) = check_rows(model.module(), data, self.batch_size.get(), "evaluation")?;
        let output = model.module().forward(&arguments)?.on_cpu()?;
        let labels = self.labels.as_ref().map(|labels| rows_of(labels, 0, rows)).transpose()?;
        let mut evaluation = Evaluation::new(self.output.clone());
        evaluation.add(rows, &output, &output, labels.as_ref()).map_err(blame::measured)
    }

    pub(super) fn run(
        &self,
        model: &Clean,
        simulation: &Simulation,
        calibration: &Dataset,
        mut advance: impl FnMut(usize),
    ) -> Result<report::Evaluation, Error> {
        let float = model.instrument(&[], &[])?;
        let mut evaluation = Evaluation::new(self.output.clone());
        for batch in self.dataset(calibration).batches() {
            let batch = batch?;
            let (first, rows) = (batch.first_row, batch.rows);
            let arguments = feed::bind(model.module(), batch)?;
            let expected = float.run(&arguments, &mut NoVisit)?.on_cpu()?;
            let found = simulation.run(&arguments)?.on_cpu()?;
            let labels = self.labels.as_ref().map(|labels| rows_of(labels, first, rows)).transpose()?;
            evaluation.add(rows, &expected, &found, labels.as_ref()).map_err(blame::measured)?;
            advance(rows);
        }
        let (float, quantized) = evaluation.finish();
        let data = if self.evaluation.is_some() { "evaluation" } else { "calibration" };
        Ok(report::Evaluation { data, float, quantized })
    }
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
