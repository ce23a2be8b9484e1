//! What goes into a model and what comes out of it.

use cxx::UniquePtr;
use tch::{Device, Tensor};

use super::Error;
use super::ffi::bridge;
use super::tensor;

/// One argument of `forward`.
#[derive(Debug)]
pub enum Argument {
    /// A tensor.
    Tensor(Tensor),
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any number.
    Float(f64),
    /// Python's None.
    None,
}

impl Argument {
    /// In the words of an error message.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Tensor(tensor) => format!("a {:?} tensor of shape {:?}", tensor.kind(), tensor.size()).to_lowercase(),
            Self::Bool(value) => format!("{value} (bool)"),
            Self::Int(value) => format!("{value} (int)"),
            Self::Float(value) => format!("{value} (float)"),
            Self::None => "None".to_owned(),
        }
    }

    pub(super) fn to_bridge(&self) -> UniquePtr<bridge::Value> {
        match self {
            Self::Tensor(tensor) => bridge::value_from_tensor(tensor::as_bridge(tensor)),
            Self::Bool(value) => bridge::value_bool(*value),
            Self::Int(value) => bridge::value_int(*value),
            Self::Float(value) => bridge::value_float(*value),
            Self::None => bridge::value_none(),
        }
    }
}

/// What `forward` returned: a tensor, or tuples, lists and dicts of them, nested.
#[derive(Debug)]
pub enum Output {
    /// A tensor.
    Tensor(Tensor),
    /// A tuple or list, or a dict in its own order: each part with its index or key.
    Parts(Vec<(String, Output)>),
    /// None, or a number that the model returns beside its tensors.
    Plain,
}

impl Output {
    /// The same with all tensors on the processor.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn on_cpu(self) -> Result<Self, Error> {
        Ok(match self {
            Self::Tensor(tensor) => Self::Tensor(tensor.f_to_device(Device::Cpu)?),
            Self::Parts(parts) => {
                let parts = parts.into_iter().map(|(name, part)| Ok((name, part.on_cpu()?)));
                Self::Parts(parts.collect::<Result<_, Error>>()?)
            }
            Self::Plain => Self::Plain,
        })
    }

    /// What one of `rows` rows gives; `None` where a tensor does not have as many along its first axis.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn row(&self, index: usize, rows: usize) -> Result<Option<Self>, Error> {
        Ok(match self {
            Self::Tensor(tensor) => {
                let has_rows = tensor.size().first().is_some_and(|&size| usize::try_from(size) == Ok(rows));
                // A row of a tensor in memory fits an i64.
                let narrow = || tensor.f_narrow(0, index as i64, 1).map(Self::Tensor);
                has_rows.then(narrow).transpose()?
            }
            Self::Parts(parts) => {
                let parts =
                    parts.iter().map(|(name, part)| Ok(part.row(index, rows)?.map(|part| (name.clone(), part))));
                parts.collect::<Result<Option<_>, Error>>()?.map(Self::Parts)
            }
            Self::Plain => Some(Self::Plain),
        })
    }

    pub(super) fn from_bridge(value: &bridge::Value) -> Result<Self, Error> {
        use bridge::ValueKind;
        match bridge::value_kind(value) {
            ValueKind::Tensor => Ok(Self::Tensor(tensor::from_unique(bridge::value_tensor(value)?))),
            ValueKind::Tuple | ValueKind::List | ValueKind::Dict => {
                let parts = (0..bridge::value_len(value)?).map(|index| {
                    let part = bridge::value_at(value, index)?;
                    let part = part.as_ref().ok_or_else(|| Error::output("an empty handle"))?;
                    Ok((bridge::value_key(value, index)?, Self::from_bridge(part)?))
                });
                Ok(Self::Parts(parts.collect::<Result<_, Error>>()?))
            }
            ValueKind::Other => Err(Error::output(&bridge::value_type(value))),
            _ => Ok(Self::Plain),
        }
    }

    /// All tensors in order, each with its dotted path: `` for a lone tensor, `0`, `logits`, `1.hidden` and so on.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, &Tensor)> {
        let mut found = Vec::new();
        self.collect_into("", &mut found);
        found
    }

    fn collect_into<'a>(&'a self, path: &str, found: &mut Vec<(String, &'a Tensor)>) {
        match self {
            Self::Tensor(tensor) => found.push((path.to_owned(), tensor)),
            Self::Parts(parts) => {
                for (key, part) in parts {
                    let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    part.collect_into(&inner, found);
                }
            }
            Self::Plain => {}
        }
    }
}
