//! Model files as their users run them: loaded, through libtorch's own executor, float beside quantized.

use std::path::Path;

use tch::Tensor;

use super::{Error, Progress, Work, blame, compare, size, versions};
use crate::config::ComparisonPlan;
use crate::dataset::Dataset;
use crate::evaluate::{Evaluation, Measured};
use crate::jit::Module;
use crate::report::{self, FilesReport, Measures};

/// Runs the model file `model`, and the float one beside it if there is one, on the planned data.
///
/// # Errors
/// Where a file or the data cannot be read, a model fails, or outputs and labels do not fit each other.
pub fn evaluate(plan: &ComparisonPlan, model: &Path, progress: &mut dyn Progress) -> Result<FilesReport, Error> {
    progress.stage("load", Work::Uncounted);
    let data = blame::open(&plan.evaluation.data, "evaluation")?;
    let labels = blame::labels(&data, plan.evaluation.labels.as_deref())?;
    let quantized = Module::load(model)?;
    let reference = plan.reference.as_deref().map(Module::load).transpose()?;
    let mut warnings = notes(&quantized);
    warnings.extend(reference.iter().flat_map(notes));
    progress.stage("evaluate", Work::Rows(data.rows()));
    let evaluation = match (&reference, &labels) {
        (Some(float), labels) => compare_files(plan, [float, &quantized], &data, labels.as_ref(), progress)?,
        (None, Some(labels)) => measure(plan, &quantized, &data, labels, progress)?,
        // A plan has one of them.
        (None, None) => Measures::Alone { data: plan.section, quantized: report::Alone::default() },
    };
    if let Measures::Compared(evaluation) = &evaluation {
        warnings.extend(super::not_finite(evaluation));
    }
    Ok(FilesReport {
        schema: report::SCHEMA,
        model: std::path::absolute(model).unwrap_or_else(|_| model.to_owned()),
        reference: plan.reference.clone(),
        data: plan.evaluation.data.path.clone(),
        versions: versions(),
        warnings,
        evaluation,
        float_bytes: plan.reference.as_deref().map(size).transpose()?,
        quantized_bytes: size(model)?,
    })
}

fn compare_files(
    plan: &ComparisonPlan,
    [float, quantized]: [&Module; 2],
    data: &Dataset,
    labels: Option<&Tensor>,
    progress: &mut dyn Progress,
) -> Result<Measures, Error> {
    let mut evaluation = Evaluation::new(plan.evaluation.output.clone());
    for batch in data.batches() {
        let batch = batch?;
        let (first, rows) = (batch.first_row, batch.rows);
        let labels = labels.map(|labels| compare::rows_of(labels, first, rows)).transpose()?;
        let expected = float.forward(&blame::bind(float, batch.share(), "evaluation")?)?;
        let found = quantized.forward(&blame::bind(quantized, batch, "evaluation")?)?;
        evaluation.add(rows, &expected, &found, labels.as_ref()).map_err(blame::measured)?;
        progress.advance(rows);
    }
    let (float, quantized) = evaluation.finish();
    Ok(Measures::Compared(report::Evaluation { data: plan.section, float, quantized }))
}

fn measure(
    plan: &ComparisonPlan,
    model: &Module,
    data: &Dataset,
    labels: &Tensor,
    progress: &mut dyn Progress,
) -> Result<Measures, Error> {
    let mut measured = Measured::new(plan.evaluation.output.clone());
    for batch in data.batches() {
        let batch = batch?;
        let (first, rows) = (batch.first_row, batch.rows);
        let output = model.forward(&blame::bind(model, batch, "evaluation")?)?;
        measured.add(&output, &compare::rows_of(labels, first, rows)?).map_err(blame::measured)?;
        progress.advance(rows);
    }
    let quantized = report::Alone { accuracy: measured.finish(), rows: data.rows() as u64 };
    Ok(Measures::Alone { data: plan.section, quantized })
}

/// What loading changed.
fn notes(module: &Module) -> Vec<String> {
    module.notes().iter().map(|note| format!("{}: {note}", module.path().display())).collect()
}
