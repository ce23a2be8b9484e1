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
    /// One direction for each of `outputs`, told by their numbers among all, of its shape, dtype and device. Each row and output
    /// has its own stream of numbers, so that its directions do not depend on the batch that it is in and on the other outputs.
    /// Rows lie along the first axis of their number; an output without such an axis counts as the first row's.
    pub(super) fn draw(&self, outputs: &[(usize, &Tensor)], probe: usize) -> Result<Vec<Tensor>, jit::Error> {
        let directions = outputs.iter().map(|&(number, output)| {
            let stream = |row| {
                let row = (self.first_row + row) as u64;
                SplitMix64::of(&[self.request.seed, row, probe as u64, number as u64])
            };
            let mut streams: Vec<SplitMix64> = (0..self.rows).map(stream).collect();
            let mut values = vec![0.0; output.numel()];
            let mut shape = output.size();
            let axis = shape.iter().position(|&size| usize::try_from(size) == Ok(self.rows));
            let shares = if axis.is_some() { self.rows } else { 1 };
            for (part, stream) in values.chunks_mut((output.numel() / shares).max(1)).zip(&mut streams) {
                fill(part, self.request.distribution, stream);
            }
            // Rows first, then put where they belong.
            let axis = axis.unwrap_or_default();
            if let Some(before) = shape.get_mut(..=axis) {
                before.rotate_right(1);
            }
            let direction = Tensor::f_from_slice(&values)?.f_reshape(&shape)?;
            let direction = if axis == 0 { direction } else { direction.f_movedim_int(0, axis as i64)? };
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
        let outputs: Vec<(usize, &Tensor)> = outputs.iter().enumerate().collect();
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

    /// Time first: rows are the second axis.
    #[test]
    fn rows_may_lie_along_another_axis() {
        let request = request(Distribution::Normal, 3);
        let whole = draw(&request, 0, 4, 1, &[&[5, 4, 3]]).remove(0);
        for row in 0..4 {
            let alone = draw(&request, row, 1, 1, &[&[5, 1, 3]]).remove(0);
            let own: Vec<f64> = (0..5).flat_map(|time| whole[(time * 4 + row) * 3..][..3].to_vec()).collect();
            assert_eq!(alone, own, "{row}");
        }
    }

    #[test]
    fn outputs_without_an_axis_of_rows_are_drawn_whole() {
        let request = request(Distribution::Rademacher, 3);
        let drawn = draw(&request, 0, 4, 0, &[&[2, 3, 5], &[]]);
        assert_eq!(drawn.iter().map(Vec::len).collect::<Vec<_>>(), [30, 1]);
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
