//! Calibration and evaluation data: rows of a file or folder as batches of tensors.
//!
//! Reads `.safetensors`, `.npz`, `.npy` and folders of images. A batch reads its own rows and nothing else, so that
//! memory does not grow with the file. Knows nothing of models: which argument a tensor is for is a name to it.
//!
//! Images of a folder come out as (N, 3, H, W) whatever `layout` says: the folder stores (N, H, W, 3) by definition.

mod array;
mod dtype;
mod error;
mod images;
mod labels;
mod npy;
mod npz;
mod rows;
mod safetensors;
mod shard;
mod source;
#[cfg(test)]
mod tests;
mod transform;

use std::num::NonZeroUsize;
use std::ops::Range;

use tch::Tensor;

pub use self::error::{Error, Place};
use self::rows::Rows;
pub use self::shard::{Shard, ShardError};
use self::source::{Column, Source};
use crate::config::{Constant, DataPlan, InputSource, InputsPlan};

/// An open data set, checked as far as that is possible without reading its rows.
#[derive(Debug)]
pub struct Dataset {
    plan: DataPlan,
    source: Source,
    inputs: Vec<(Option<String>, Binding)>,
    /// Rows of the file, chosen or not.
    total: usize,
    rows: Rows,
}

/// Where an argument comes from.
#[derive(Debug)]
enum Binding {
    Tensor(Column),
    Const(Constant),
}

/// Some rows as the arguments of one `forward`.
#[derive(Debug)]
pub struct Batch {
    /// Arguments in the order of the plan, with the model's names for them where the plan has names.
    pub inputs: Vec<(Option<String>, Input)>,
    /// Number of rows, the first axis of each tensor: at least 1.
    pub rows: usize,
    /// Position of the first of these rows among the rows of the data set.
    pub first_row: usize,
}

impl Batch {
    /// The same rows once more, for another model; the tensors share their memory.
    #[must_use]
    pub fn share(&self) -> Self {
        let share = |input: &Input| match input {
            Input::Tensor(tensor) => Input::Tensor(tensor.shallow_clone()),
            Input::Const(constant) => Input::Const(*constant),
        };
        let inputs = self.inputs.iter().map(|(name, input)| (name.clone(), share(input)));
        Self { inputs: inputs.collect(), rows: self.rows, first_row: self.first_row }
    }

    /// One of the rows by itself.
    ///
    /// # Errors
    /// Where there is no such row.
    pub fn row(&self, index: usize) -> Result<Self, tch::TchError> {
        let narrow = |input: &Input| -> Result<Input, tch::TchError> {
            Ok(match input {
                // A place in memory fits an i64.
                Input::Tensor(tensor) => Input::Tensor(tensor.f_narrow(0, index as i64, 1)?),
                Input::Const(constant) => Input::Const(*constant),
            })
        };
        let inputs = self.inputs.iter().map(|(name, input)| Ok((name.clone(), narrow(input)?)));
        let inputs = inputs.collect::<Result<_, tch::TchError>>()?;
        Ok(Self { inputs, rows: 1, first_row: self.first_row + index })
    }
}

/// An argument of `forward`.
#[derive(Debug)]
pub enum Input {
    /// Rows of a tensor on the CPU, contiguous: float32 where the stored tensor is uint8 or floating point, else as stored
    /// (int8, int16, int32, int64 or bool).
    Tensor(Tensor),
    /// The same for every batch.
    Const(Constant),
}

impl Dataset {
    /// Opens the data of `plan` and chooses its rows.
    ///
    /// # Errors
    /// The file cannot be read or is damaged; a tensor is missing, has a type that no model takes, has no rows or another
    /// number of rows than the rest, or does not fit the transform; `samples` is more than there are; no input is a tensor.
    pub fn open(plan: &DataPlan) -> Result<Self, Error> {
        let source = Source::open(&plan.path)?;
        let bind = |name: Option<&String>, input: &InputSource| -> Result<_, Error> {
            let binding = match input {
                InputSource::Tensor(tensor) => Binding::Tensor(source.column(&plan.path, tensor)?),
                InputSource::Const(constant) => Binding::Const(*constant),
            };
            Ok((name.cloned(), binding))
        };
        let inputs = match &plan.inputs {
            InputsPlan::Positional(inputs) => {
                inputs.iter().map(|input| bind(None, input)).collect::<Result<Vec<_>, _>>()?
            }
            InputsPlan::Named(inputs) => {
                inputs.iter().map(|(name, input)| bind(Some(name), input)).collect::<Result<Vec<_>, _>>()?
            }
        };
        let total = check(plan, &inputs)?;
        let rows = Rows::choose(total, plan.samples, plan.shuffle.then_some(plan.seed));
        Ok(Self { plan: plan.clone(), source, inputs, total, rows })
    }

    /// Number of chosen rows: at least 1.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Rows in a batch.
    #[must_use]
    pub fn batch_size(&self) -> NonZeroUsize {
        self.plan.batch_size
    }

    /// Number of rows that the file has, chosen or not.
    #[must_use]
    pub fn stored_rows(&self) -> usize {
        self.total
    }

    /// All chosen rows in batches of the plan's size, the last one smaller where they do not divide.
    #[must_use]
    pub fn batches(&self) -> Batches<'_> {
        Batches::new(self, self.rows.clone(), self.plan.batch_size)
    }

    /// `samples` of the chosen rows, drawn by seed, in batches of another size; all of them if there are no more.
    #[must_use]
    pub fn sample(&self, samples: NonZeroUsize, seed: u64, batch_size: NonZeroUsize) -> Batches<'_> {
        Batches::new(self, self.rows.sample(samples, seed), batch_size)
    }

    /// As many of the rows that [`sample`](Self::sample) leaves, or all of these if there are no more.
    #[must_use]
    pub fn others(&self, samples: NonZeroUsize, seed: u64, batch_size: NonZeroUsize) -> Batches<'_> {
        Batches::new(self, self.rows.others(samples, seed), batch_size)
    }

    /// The first `rows` chosen rows as one batch: at least one row, at most all.
    ///
    /// # Errors
    /// As those of an item of [`batches`](Self::batches).
    pub fn first(&self, rows: usize) -> Result<Batch, Error> {
        self.batch(&self.rows, 0..rows.clamp(1, self.rows()))
    }

    /// Class indices of the chosen rows from the tensor `name`: int64 of shape (N), (N, K), (N, T) or
    /// (N, T, K).
    ///
    /// # Errors
    /// The tensor is missing, is not of integers, has another rank, or another number of rows than the inputs.
    pub fn labels(&self, name: &str) -> Result<Tensor, Error> {
        let column = self.source.column(&self.plan.path, name)?;
        if column.rows() != self.total {
            let other = self.tensors().next().map(|column| column.place().tensor).unwrap_or_default();
            return Err(Error::Rows { place: column.place(), expected: self.total, other, found: column.rows() });
        }
        column.labels(&self.rows)
    }

    fn tensors(&self) -> impl Iterator<Item = &Column> {
        tensors(&self.inputs)
    }

    /// The rows at `positions` among `rows`.
    fn batch(&self, rows: &Rows, positions: Range<usize>) -> Result<Batch, Error> {
        let mut inputs = Vec::with_capacity(self.inputs.len());
        for (name, binding) in &self.inputs {
            let input = match binding {
                Binding::Tensor(column) => Input::Tensor(column.read(rows, positions.clone(), &self.plan.transform)?),
                Binding::Const(constant) => Input::Const(*constant),
            };
            inputs.push((name.clone(), input));
        }
        Ok(Batch { inputs, rows: positions.len(), first_row: positions.start })
    }
}

fn tensors(inputs: &[(Option<String>, Binding)]) -> impl Iterator<Item = &Column> {
    inputs.iter().filter_map(|(_, binding)| match binding {
        Binding::Tensor(column) => Some(column),
        Binding::Const(_) => None,
    })
}

/// The number of rows that all inputs have.
fn check(plan: &DataPlan, inputs: &[(Option<String>, Binding)]) -> Result<usize, Error> {
    let Some(first) = tensors(inputs).next() else {
        return Err(Error::OnlyConstants { path: plan.path.clone() });
    };
    for column in tensors(inputs) {
        column.check_input(&plan.transform)?;
        if column.rows() != first.rows() {
            let (expected, other) = (first.rows(), first.place().tensor);
            return Err(Error::Rows { place: column.place(), expected, other, found: column.rows() });
        }
    }
    match plan.samples {
        Some(samples) if samples.get() > first.rows() => {
            Err(Error::TooFew { path: plan.path.clone(), samples: samples.get(), rows: first.rows() })
        }
        _ => Ok(first.rows()),
    }
}

/// The batches of a data set in order; each is read when it is asked for.
#[derive(Debug, Clone)]
pub struct Batches<'a> {
    dataset: &'a Dataset,
    rows: Rows,
    /// Rows in a batch.
    size: usize,
    /// Position of the next batch's first row.
    next: usize,
    /// Position behind the last batch's last row.
    end: usize,
}

impl Iterator for Batches<'_> {
    type Item = Result<Batch, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let positions = self.next..self.next.saturating_add(self.size).min(self.end);
        self.next = positions.end;
        Some(self.dataset.batch(&self.rows, positions))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.rows().div_ceil(self.size);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches<'_> {}

impl<'a> Batches<'a> {
    fn new(dataset: &'a Dataset, rows: Rows, size: NonZeroUsize) -> Self {
        Self { dataset, end: rows.len(), rows, size: size.get(), next: 0 }
    }

    /// Rows of all batches that are left.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.end.saturating_sub(self.next)
    }

    /// The batches of one shard among those that are left; the batches stay what they are.
    #[must_use]
    pub fn shard(self, shard: Shard) -> Self {
        let batches = shard.of(self.len());
        let at = |batch: usize| self.next.saturating_add(batch.saturating_mul(self.size)).min(self.end);
        Self { next: at(batches.start), end: at(batches.end), ..self }
    }
}
