//! Random directions in the space of a model's outputs. They know neither model nor data: a row is a number.

use tch::{Kind, Tensor};

use crate::config::{Distribution, HessianRequest};
use crate::jit;
use crate::random::SplitMix64;

/// Draws the directions of one probe for a batch of rows.
pub(super) struct Directions<'a> {
    pub(super) request: &'a HessianRequest,
    /// Number of the batch's first row among all rows.
    pub(super) first_row: usize,
    /// Rows in the batch.
    pub(super) rows: usize,
}

impl Directions<'_> {
    /// One direction for each of `outputs`, of its shape, dtype and device. Each row has its own stream of numbers, so that its
    /// directions do not depend on the batch that it is in. Where the first axis of an output is not that of the rows, the
    /// whole output counts as the first row's.
    pub(super) fn draw(&self, outputs: &[&Tensor], probe: usize) -> Result<Vec<Tensor>, jit::Error> {
        let stream = |row| SplitMix64::of(&[self.request.seed, (self.first_row + row) as u64, probe as u64]);
        let mut streams: Vec<SplitMix64> = (0..self.rows).map(stream).collect();
        let directions = outputs.iter().map(|output| {
            let mut values = vec![0.0; output.numel()];
            let shape = output.size();
            let is_by_row = shape.first().is_some_and(|&rows| usize::try_from(rows) == Ok(self.rows));
            let shares = if is_by_row { self.rows } else { 1 };
            for (part, stream) in values.chunks_mut((output.numel() / shares).max(1)).zip(&mut streams) {
                fill(part, self.request.distribution, stream);
            }
            let direction = Tensor::f_from_slice(&values)?.f_reshape(&shape)?;
            Ok(direction.f_to_device(output.device())?.f_to_kind(output.kind())?)
        });
        directions.collect()
    }
}

fn fill(values: &mut [f32], distribution: Distribution, stream: &mut SplitMix64) {
    match distribution {
        Distribution::Rademacher => {
            for signs in values.chunks_mut(64) {
                let bits = stream.draw();
                for (index, value) in signs.iter_mut().enumerate() {
                    *value = if bits >> index & 1 == 1 { 1.0 } else { -1.0 };
                }
            }
        }
        Distribution::Normal => {
            for pair in values.chunks_mut(2) {
                for (value, x) in pair.iter_mut().zip(stream.normal()) {
                    *value = x as f32;
                }
            }
        }
    }
}

/// Whether a gradient can be asked of this output.
pub(super) fn is_probed(output: &Tensor) -> bool {
    output.requires_grad() && matches!(output.f_kind(), Ok(Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use tch::Device;

    use super::*;

    fn request(distribution: Distribution, seed: u64) -> HessianRequest {
        let one = NonZeroUsize::MIN;
        HessianRequest { samples: one, probes: one, batch_size: one, distribution, tolerance: None, seed }
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
    }

    fn draw(request: &HessianRequest, first_row: usize, rows: usize, probe: usize, shapes: &[&[i64]]) -> Vec<Vec<f64>> {
        let outputs: Vec<Tensor> =
            shapes.iter().map(|shape| Tensor::zeros(*shape, (Kind::Float, Device::Cpu))).collect();
        let outputs: Vec<&Tensor> = outputs.iter().collect();
        let drawn = Directions { request, first_row, rows }.draw(&outputs, probe).unwrap();
        drawn.iter().map(numbers).collect()
    }

    #[test]
    fn a_row_draws_the_same_in_any_batch() {
        for distribution in [Distribution::Rademacher, Distribution::Normal] {
            let request = request(distribution, 3);
            let whole = draw(&request, 0, 4, 1, &[&[4, 70], &[4]]);
            for row in 0..4 {
                let alone = draw(&request, row, 1, 1, &[&[1, 70], &[1]]);
                assert_eq!(alone[0], whole[0][row * 70..][..70]);
                assert_eq!(alone[1], whole[1][row..][..1]);
            }
            assert_ne!(whole, draw(&request, 0, 4, 2, &[&[4, 70], &[4]]));
            assert_ne!(whole, draw(&request, 4, 4, 1, &[&[4, 70], &[4]]));
        }
    }

    #[test]
    fn outputs_without_an_axis_of_rows_are_drawn_whole() {
        let request = request(Distribution::Rademacher, 3);
        let drawn = draw(&request, 0, 4, 0, &[&[2, 4, 5], &[]]);
        assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [40, 1]);
        assert!(drawn.iter().flatten().all(|x| x.abs() == 1.0));
    }

    #[test]
    fn mean_zero_and_variance_one() {
        for distribution in [Distribution::Rademacher, Distribution::Normal] {
            let drawn = draw(&request(distribution, 11), 0, 100, 0, &[&[100, 1000]]).remove(0);
            let mean = drawn.iter().sum::<f64>() / 1e5;
            let variance = drawn.iter().map(|x| x * x).sum::<f64>() / 1e5;
            // Six standard errors of 100,000 numbers.
            assert!(mean.abs() < 0.019 && (variance - 1.0).abs() < 0.027, "{distribution:?} {mean} {variance}");
        }
    }
}
