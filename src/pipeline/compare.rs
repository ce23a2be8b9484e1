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
use crate::jit::{Clean, NoVisit, Output};
use crate::report;

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
        let float = model.instrument(&[], &[])?;
        let mut evaluation = Evaluation::new(self.output.clone());
        for batch in self.dataset.batches() {
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
        Ok(report::Evaluation { data: self.section, float, quantized })
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
