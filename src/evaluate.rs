//! Measures: how good a model is on labelled data, and how near the quantized one is to the float one.
//!
//! Works on outputs, batch by batch, and keeps sums alone. It does not know how the outputs were made.

use tch::{Kind, Tensor};

use crate::jit::Output;
use crate::report::{Accuracy, Comparison};

/// Why outputs cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtorch fails.
    #[error("evaluation: {0}")]
    Torch(#[from] tch::TchError),
    /// The two models return different things.
    #[error("evaluation: output{output} of the quantized model is {found}, that of the float model {expected}")]
    Mismatch {
        /// Path of the output, with a space in front, or empty.
        output: String,
        /// Shape of the quantized model's.
        found: String,
        /// Shape of the float model's.
        expected: String,
    },
    /// There is no output to compare.
    #[error("evaluation: expected a floating-point tensor among the model's outputs, found none")]
    NoOutput,
    /// Labels that do not fit.
    #[error("evaluation: labels of shape {labels:?} need an output of shape (rows, classes), found {output:?}")]
    Labels {
        /// Shape of the labels of a batch.
        labels: Vec<i64>,
        /// Shape of the first output.
        output: Vec<i64>,
    },
    /// A row without a label.
    #[error("evaluation: expected at least one label from 0 on for each row, found a row with none but {found}")]
    NoClass {
        /// The largest label of that row.
        found: i64,
    },
    /// Labels beyond the classes.
    #[error("evaluation: expected labels below {classes}, the number of classes, found {found}")]
    LabelRange {
        /// Last axis of the output.
        classes: i64,
        /// The largest label.
        found: i64,
    },
}

/// Sums over batches.
#[derive(Debug, Default)]
pub struct Evaluation {
    float: Hits,
    quantized: Hits,
    agreeing: f64,
    positions: f64,
    signal: f64,
    noise: f64,
    quantized_power: f64,
    product: f64,
    max_abs_diff: f64,
    not_finite: u64,
    rows: u64,
}

#[derive(Debug, Default)]
struct Hits {
    top1: f64,
    top5: f64,
    rows: f64,
}

impl Evaluation {
    /// Adds one batch of `rows` rows. Labels are class indices, `(rows)` or `(rows, K)` with K accepted classes padded
    /// with −1.
    ///
    /// # Errors
    /// Where the outputs or labels do not fit each other.
    pub fn add(
        &mut self,
        rows: usize,
        float: &Output,
        quantized: &Output,
        labels: Option<&Tensor>,
    ) -> Result<(), Error> {
        let pairs = pair_outputs(float, quantized)?;
        for (expected, found) in &pairs {
            self.add_differences(expected, found)?;
        }
        let (expected, found) = &pairs[0];
        // An arg-max needs an axis of classes with a choice.
        if let [_, .., classes] = expected.size()[..]
            && classes > 1
        {
            let same = expected.f_argmax(-1, false)?.f_eq_tensor(&found.f_argmax(-1, false)?)?;
            self.agreeing += same.f_sum(Kind::Double)?.f_double_value(&[])?;
            self.positions += same.numel() as f64;
        }
        if let Some(labels) = labels {
            self.float.add(expected, labels)?;
            self.quantized.add(found, labels)?;
        }
        self.rows += rows as u64;
        Ok(())
    }

    fn add_differences(&mut self, expected: &Tensor, found: &Tensor) -> Result<(), Error> {
        let (f, q) = (expected.f_to_kind(Kind::Double)?, found.f_to_kind(Kind::Double)?);
        if f.numel() == 0 {
            return Ok(());
        }
        let finite = f.f_isfinite()?.f_logical_and(&q.f_isfinite()?)?;
        let finite_count = finite.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        self.not_finite += f.numel() as u64 - u64::try_from(finite_count).unwrap_or(0);
        let zero = Tensor::from(0.0f64);
        let (f, q) = (f.f_where_self(&finite, &zero)?, q.f_where_self(&finite, &zero)?);
        let difference = f.f_sub(&q)?;
        let sum = |tensor: Tensor| tensor.f_sum(Kind::Double)?.f_double_value(&[]);
        self.signal += sum(f.f_square()?)?;
        self.noise += sum(difference.f_square()?)?;
        self.quantized_power += sum(q.f_square()?)?;
        self.product += sum(f.f_mul(&q)?)?;
        self.max_abs_diff = self.max_abs_diff.max(difference.f_abs()?.f_max()?.f_double_value(&[])?);
        Ok(())
    }

    /// The measures of the float and of the quantized model.
    #[must_use]
    pub fn finish(&self) -> (Accuracy, Comparison) {
        let comparison = Comparison {
            accuracy: self.quantized.accuracy(),
            agreement: (self.positions > 0.0).then(|| self.agreeing / self.positions),
            sqnr_db: (self.noise > 0.0).then(|| 10.0 * (self.signal / self.noise).log10()),
            cosine: if self.signal == self.quantized_power && self.noise == 0.0 {
                1.0
            } else {
                ratio(self.product, (self.signal * self.quantized_power).sqrt())
            },
            max_abs_diff: self.max_abs_diff,
            not_finite: self.not_finite,
            rows: self.rows,
        };
        (self.float.accuracy(), comparison)
    }
}

impl Hits {
    fn add(&mut self, output: &Tensor, labels: &Tensor) -> Result<(), Error> {
        let misfit = || Error::Labels { labels: labels.size(), output: output.size() };
        let &[rows, classes] = output.size().as_slice() else { return Err(misfit()) };
        let accepted = match *labels.size().as_slice() {
            [n] if n == rows => labels.f_unsqueeze(1)?,
            [n, _] if n == rows => labels.shallow_clone(),
            _ => return Err(misfit()),
        };
        let fewest = accepted.f_amax(1, false)?.f_min()?.f_int64_value(&[])?;
        if fewest < 0 {
            return Err(Error::NoClass { found: fewest });
        }
        let largest = accepted.f_max()?.f_int64_value(&[])?;
        if largest >= classes {
            return Err(Error::LabelRange { classes, found: largest });
        }
        let (_, best) = output.f_topk(classes.min(5), 1, true, true)?;
        // (rows, 1, 5) against (rows, K, 1): no index is −1, so padding matches nothing.
        let matches = best.f_unsqueeze(1)?.f_eq_tensor(&accepted.f_unsqueeze(2)?)?.f_any_dim(1, false)?;
        self.top1 += matches.f_select(1, 0)?.f_sum(Kind::Double)?.f_double_value(&[])?;
        self.top5 += matches.f_any_dim(1, false)?.f_sum(Kind::Double)?.f_double_value(&[])?;
        self.rows += rows as f64;
        Ok(())
    }

    fn accuracy(&self) -> Accuracy {
        let share = |hits: f64| (self.rows > 0.0).then(|| hits / self.rows);
        Accuracy { top1: share(self.top1), top5: share(self.top5) }
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole == 0.0 { f64::NAN } else { part / whole }
}

/// The floating-point outputs of both models, side by side.
fn pair_outputs<'a>(float: &'a Output, quantized: &'a Output) -> Result<Vec<(&'a Tensor, &'a Tensor)>, Error> {
    let (float, quantized) = (float.tensors(), quantized.tensors());
    let mut pairs = Vec::new();
    for (index, (path, expected)) in float.iter().enumerate() {
        if !expected.is_floating_point() {
            continue;
        }
        let found = quantized.get(index).map(|(_, tensor)| *tensor);
        match found {
            Some(found) if found.size() == expected.size() => pairs.push((*expected, found)),
            _ => {
                let output = if path.is_empty() { String::new() } else { format!(" {path}") };
                let found = found.map_or_else(|| "missing".to_owned(), |tensor| format!("{:?}", tensor.size()));
                return Err(Error::Mismatch { output, found, expected: format!("{:?}", expected.size()) });
            }
        }
    }
    if pairs.is_empty() { Err(Error::NoOutput) } else { Ok(pairs) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[f32], columns: i64) -> Output {
        Output::Tensor(Tensor::from_slice(values).reshape([-1, columns]))
    }

    #[test]
    fn measures_of_a_batch_worked_out_by_hand() {
        let float = rows(&[1.0, 2.0, 3.0, 0.0, 4.0, 0.0], 3);
        let quantized = rows(&[1.0, 2.0, 2.0, 0.0, 4.0, 1.0], 3);
        let labels = Tensor::from_slice(&[2i64, 0]);
        let mut evaluation = Evaluation::default();
        evaluation.add(2, &float, &quantized, Some(&labels)).unwrap();
        let (accuracy, comparison) = evaluation.finish();
        assert_eq!(accuracy, Accuracy { top1: Some(0.5), top5: Some(1.0) });
        // The quantized first row is a tie between classes 1 and 2; libtorch's arg-max takes the first.
        assert_eq!(comparison.agreement, Some(0.5));
        assert!((comparison.sqnr_db.unwrap() - 10.0 * (30.0f64 / 2.0).log10()).abs() < 1e-12);
        assert!((comparison.cosine - 27.0 / (30.0f64 * 26.0).sqrt()).abs() < 1e-12);
        assert_eq!(comparison.max_abs_diff, 1.0);
    }

    #[test]
    fn several_accepted_classes_and_padding() {
        let output = rows(&[0.0, 9.0, 0.0, 9.0, 0.0, 0.0], 3);
        let labels = Tensor::from_slice(&[2i64, 1, 2, -1]).reshape([2, 2]);
        let mut evaluation = Evaluation::default();
        evaluation.add(2, &output, &output, Some(&labels)).unwrap();
        let (accuracy, comparison) = evaluation.finish();
        assert_eq!(accuracy.top1, Some(0.5));
        assert_eq!((comparison.sqnr_db, comparison.cosine, comparison.agreement), (None, 1.0, Some(1.0)));
    }

    #[test]
    fn batches_add_up() {
        let (float, quantized) = (rows(&[1.0, 2.0, 5.0, 4.0], 2), rows(&[1.5, 2.0, 4.0, 4.5], 2));
        let mut whole = Evaluation::default();
        whole.add(2, &float, &quantized, None).unwrap();
        let mut parts = Evaluation::default();
        parts.add(1, &rows(&[1.0, 2.0], 2), &rows(&[1.5, 2.0], 2), None).unwrap();
        parts.add(1, &rows(&[5.0, 4.0], 2), &rows(&[4.0, 4.5], 2), None).unwrap();
        assert_eq!(whole.finish(), parts.finish());
    }

    #[test]
    fn values_that_are_not_finite_are_counted_apart() {
        let float = rows(&[1.0, f32::NEG_INFINITY], 2);
        let quantized = rows(&[1.0, f32::NEG_INFINITY], 2);
        let mut evaluation = Evaluation::default();
        evaluation.add(1, &float, &quantized, None).unwrap();
        let (_, comparison) = evaluation.finish();
        assert_eq!((comparison.not_finite, comparison.max_abs_diff, comparison.sqnr_db), (1, 0.0, None));
    }

    #[test]
    fn labels_that_do_not_fit_are_refused() {
        let output = rows(&[1.0, 2.0], 2);
        let add = |labels: &[i64]| {
            Evaluation::default().add(1, &output, &output, Some(&Tensor::from_slice(labels))).unwrap_err().to_string()
        };
        assert!(add(&[0, 1]).contains("labels of shape [2] need an output of shape (rows, classes), found [1, 2]"));
        assert!(add(&[2]).contains("expected labels below 2"));
    }
}
