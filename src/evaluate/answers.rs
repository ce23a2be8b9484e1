//! How often a model is right: the largest values along an output's last axis against labels. It knows one output, not
//! where it stands among others.

use tch::{Kind, Tensor};

use super::Error;
use crate::report::Accuracy;

/// Right answers so far.
#[derive(Debug, Default)]
pub(super) struct Answers {
    top1: f64,
    top5: f64,
    positions: f64,
}

impl Answers {
    /// Adds the answers of one batch: an output `(rows, classes)` with labels `(rows)` or `(rows, K)`, or `(rows, T, classes)`
    /// with `(rows, T)` or `(rows, T, K)`. Negative labels fill up a list of accepted classes, or, where all of a position
    /// of the second form are negative, leave that position out.
    pub(super) fn add(&mut self, output: &Tensor, labels: &Tensor) -> Result<(), Error> {
        let (shape, label_shape) = (output.size(), labels.size());
        let misfit = || Error::Labels { labels: label_shape.clone(), output: shape.clone() };
        let Some((&classes, places)) = shape.split_last() else { return Err(misfit()) };
        let accepted_classes = match label_shape.split_last() {
            _ if label_shape == places => 1,
            Some((&count, rest)) if rest == places && count > 0 => count,
            _ => return Err(misfit()),
        };
        if places.is_empty() || classes < 1 {
            return Err(misfit());
        }
        let positions: i64 = places.iter().product();
        if positions == 0 {
            return Ok(());
        }
        let accepted = labels.f_reshape([positions, accepted_classes])?;
        let largest = accepted.f_max()?.f_int64_value(&[])?;
        if largest >= classes {
            return Err(Error::LabelRange { classes, found: largest });
        }
        let best_labels = accepted.f_amax(1, false)?;
        let fewest = best_labels.f_min()?.f_int64_value(&[])?;
        // A row without a label can never be right; a position of a sequence without one is padding.
        if fewest < 0 && places.len() == 1 {
            return Err(Error::NoClass { found: fewest });
        }
        let output = output.f_reshape([positions, classes])?;
        // Of equal outputs the first, as agreement has it; topk promises no order of those.
        let first = output.f_argmax(1, true)?.f_eq_tensor(&accepted)?.f_any_dim(1, false)?;
        let (_, best) = output.f_topk(classes.min(5), 1, true, true)?;
        // (positions, 1, 5) against (positions, K, 1): no index is negative, so padding matches nothing.
        let matches = best.f_unsqueeze(1)?.f_eq_tensor(&accepted.f_unsqueeze(2)?)?.f_any_dim(1, false)?;
        let count = |tensor: Tensor| tensor.f_sum(Kind::Double)?.f_double_value(&[]);
        self.top1 += count(first.shallow_clone())?;
        self.top5 += count(matches.f_any_dim(1, false)?.f_logical_or(&first)?)?;
        self.positions += count(best_labels.f_ge(0)?)?;
        Ok(())
    }

    /// Shares of right answers; `None` without a label.
    pub(super) fn accuracy(&self) -> Accuracy {
        let share = |hits: f64| (self.positions > 0.0).then(|| hits / self.positions);
        Accuracy { top1: share(self.top1), top5: share(self.top5) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], shape: &[i64]) -> Tensor {
        Tensor::from_slice(values).reshape(shape)
    }

    fn labels(values: &[i64], shape: &[i64]) -> Tensor {
        Tensor::from_slice(values).reshape(shape)
    }

    fn accuracy(output: &Tensor, labels: &Tensor) -> Result<Accuracy, String> {
        let mut answers = Answers::default();
        answers.add(output, labels).map_err(|error| error.to_string())?;
        Ok(answers.accuracy())
    }

    #[test]
    fn of_equal_outputs_the_first_is_the_answer() {
        let output = tensor(&[3.0; 9], &[1, 9]);
        assert_eq!(accuracy(&output, &labels(&[0], &[1])).unwrap(), Accuracy { top1: Some(1.0), top5: Some(1.0) });
        assert_eq!(accuracy(&output, &labels(&[8], &[1])).unwrap().top1, Some(0.0));
    }

    #[test]
    fn five_guesses() {
        let output = tensor(&[7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0].repeat(3), &[3, 7]);
        let found = accuracy(&output, &labels(&[0, 4, 5], &[3])).unwrap();
        assert_eq!(found, Accuracy { top1: Some(1.0 / 3.0), top5: Some(2.0 / 3.0) });
    }

    #[test]
    fn positions_of_a_sequence_count_each_and_padding_does_not() {
        // Two rows of three positions; the answers are 1 0 1 and 0 0 1.
        let output = tensor(&[0., 1., 1., 0., 0., 1., 1., 0., 1., 0., 0., 1.], &[2, 3, 2]);
        let top1 = |labels: &Tensor| accuracy(&output, labels).unwrap().top1;
        assert_eq!(top1(&labels(&[1, 1, -1, 0, -1, -100], &[2, 3])), Some(2.0 / 3.0));
        assert_eq!(top1(&labels(&[0, 1, 1, -1, -1, -1, 0, -1, -1, -1, 0, -1], &[2, 3, 2])), Some(2.0 / 4.0));
        assert_eq!(top1(&labels(&[-1; 6], &[2, 3])), None);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let refused = |shape: &[i64], label_shape: &[i64]| {
            let count = |shape: &[i64]| usize::try_from(shape.iter().product::<i64>()).unwrap();
            let output = tensor(&vec![0.0; count(shape)], shape);
            accuracy(&output, &labels(&vec![0; count(label_shape)], label_shape)).unwrap_err()
        };
        for (output, labels) in [
            (&[2, 3][..], &[3][..]),
            (&[2, 3], &[2, 1, 1]),
            (&[2], &[2]),
            (&[2], &[]),
            (&[], &[]),
            (&[2, 4, 3], &[2]),
            (&[2, 4, 3], &[4, 2]),
        ] {
            let error = refused(output, labels);
            assert!(error.contains(&format!("labels of shape {labels:?}")), "{error}");
            assert!(error.contains(&format!("an output of shape {output:?}")), "{error}");
        }
    }
}
