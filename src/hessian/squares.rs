//! Squared gradients of the results of ops, kept by batch: how much the outputs depend on each of them there.

use tch::{Kind, Tensor};

use super::directions::{Directions, is_probed};
use super::{Error, HessianRequest};
use crate::dataset::Dataset;
use crate::feed;
use crate::jit::{self, BoxError, Clean, Tap, TapKind, ValueId, Visit};

/// Of each batch, for each value: g², bfloat16; `None` where none was asked for or came.
pub type Squares = Vec<Vec<Option<Tensor>>>;

/// Walks back from one random direction of the outputs, that of the first probe of [`score`](super::score), and keeps the squared gradients of these
/// values where `look` looks: it is given the number of the batch, that of the value, and a tensor of the value's shape.
/// `advance` is called with the rows of each finished batch.
///
/// # Errors
/// Where the data cannot be read, or the model or `look` fails.
pub fn squares(
    model: &Clean,
    values: &[Option<ValueId>],
    (data, request): (&Dataset, &HessianRequest),
    look: &(dyn Fn(usize, usize, &Tensor) -> Result<Tensor, tch::TchError> + Sync),
    mut advance: impl FnMut(usize),
) -> Result<Squares, Error> {
    let taps = values.iter().enumerate();
    let taps = taps.filter_map(|(number, value)| Some(Tap { value: (*value)?, number, kind: TapKind::WholeGradient }));
    let taps: Vec<Tap> = taps.collect();
    let graph = model.differentiable(&taps, &[])?;
    let mut all = Vec::new();
    for (number, batch) in data.sample(request.samples, request.seed, request.batch_size).enumerate() {
        let batch = batch?;
        let (rows, first_row) = (batch.rows, batch.first_row);
        let recording = graph.record(&feed::bind(model.module(), batch)?, &mut jit::NoVisit)?;
        let outputs = recording.output().tensors();
        let outputs: Vec<_> = outputs.iter().map(|(_, output)| *output).enumerate().collect();
        let outputs: Vec<_> = outputs.into_iter().filter(|(_, output)| is_probed(output)).collect();
        let mut seen = Seen { batch: number, look, squares: values.iter().map(|_| None).collect() };
        if !outputs.is_empty() {
            let drawn = Directions { request, first_row, rows }.draw(&outputs, 0)?;
            let directed: Vec<_> = outputs.iter().map(|(_, output)| *output).zip(drawn).collect();
            recording.backward(&directed, false, &mut seen)?;
        }
        all.push(seen.squares);
        advance(rows);
    }
    Ok(all)
}

/// Looks at the gradients of a batch.
struct Seen<'a> {
    batch: usize,
    look: &'a (dyn Fn(usize, usize, &Tensor) -> Result<Tensor, tch::TchError> + Sync),
    squares: Vec<Option<Tensor>>,
}

impl Visit for Seen<'_> {
    fn gradient(&mut self, tap: usize, _: &Tensor, gradient: &Tensor) -> Result<(), BoxError> {
        let Some(own) = self.squares.get_mut(tap) else { return Err(format!("tap {tap} belongs to no op").into()) };
        *own = Some((self.look)(self.batch, tap, gradient)?.f_square()?.f_to_kind(Kind::BFloat16)?);
        Ok(())
    }
}
