//! Which key of the experiment is to blame for what only the model or the data can show. It knows keys by their names; where
//! they were typed is for others to know.

use super::Error;
use crate::config::{DataPlan, InputSource, InputsPlan};
use crate::dataset::{self, Batch, Dataset};
use crate::evaluate;
use crate::feed;
use crate::jit::{self, Arguments, Module};
use tch::Tensor;

/// Opens the data of `section`, `calibration` or `evaluation`.
pub(super) fn open(plan: &DataPlan, section: &'static str) -> Result<Dataset, Error> {
    Dataset::open(plan).map_err(|error| {
        let key = match &error {
            dataset::Error::Missing { place, .. } => input_key(&plan.inputs, &place.tensor),
            dataset::Error::TooFew { .. } => "samples".to_owned(),
            dataset::Error::Transform { option, .. } => format!("transform.{option}"),
            _ => return error.into(),
        };
        at(format!("{section}.{key}"), error)
    })
}

/// Binds a batch of `section` to the arguments of the model.
pub(super) fn bind(module: &Module, batch: Batch, section: &'static str) -> Result<Arguments, Error> {
    feed::bind(module, batch).map_err(|error| match error {
        jit::Error::Argument(_) => at(format!("{section}.inputs"), error),
        other => other.into(),
    })
}

/// The labels of evaluation.
pub(super) fn labels(data: &Dataset, name: Option<&str>) -> Result<Option<Tensor>, Error> {
    let read = name.map(|name| data.labels(name)).transpose();
    read.map_err(|error| match error {
        dataset::Error::Missing { .. } | dataset::Error::Tensor { .. } | dataset::Error::Rows { .. } => {
            at("evaluation.labels".to_owned(), error)
        }
        other => other.into(),
    })
}

/// What cannot be measured.
pub(super) fn measured(error: evaluate::Error) -> Error {
    match error {
        evaluate::Error::UnknownOutput { .. } | evaluate::Error::NotFloat { .. } => {
            at("evaluation.output".to_owned(), error)
        }
        evaluate::Error::Labels { .. } | evaluate::Error::NoClass { .. } | evaluate::Error::LabelRange { .. } => {
            at("evaluation.labels".to_owned(), error)
        }
        other => other.into(),
    }
}

fn at(key: String, source: impl Into<Error>) -> Error {
    Error::Key { key, source: Box::new(source.into()) }
}

/// `inputs[1]` or `inputs.mask`: the first that takes this tensor.
fn input_key(inputs: &InputsPlan, tensor: &str) -> String {
    let takes = |source: &InputSource| matches!(source, InputSource::Tensor(name) if name == tensor);
    let step = match inputs {
        InputsPlan::Positional(sources) => sources.iter().position(takes).map(|index| format!("[{index}]")),
        InputsPlan::Named(sources) => {
            sources.iter().find(|(_, source)| takes(source)).map(|(name, _)| format!(".{name}"))
        }
    };
    format!("inputs{}", step.unwrap_or_default())
}
