//! Measures: how good a model is on labelled data, and how near the quantized one is to the float one.
//!
//! Works on outputs, batch by batch, and keeps sums alone. It does not know how the outputs were made.

mod answers;
mod ranked;

use tch::{Kind, Tensor};

use self::answers::Answers;
use self::ranked::ranked;
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
    /// The quantized model makes NaN or infinity out of what is finite in the float model.
    #[error(
        "evaluation: expected finite outputs where the float model has them, found {broken} of {count} NaN or infinite"
    )]
    Broken {
        /// How many, in one batch of one output.
        broken: i64,
        /// Values of that output.
        count: usize,
    },
    /// There is no output to compare.
    #[error("evaluation: expected a floating-point tensor among the model's outputs, found none")]
    NoOutput,
    /// The output to rank is not there.
    #[error("the model has no output `{output}`{hint}; expected one of {known}")]
    UnknownOutput {
        /// What was asked for.
        output: String,
        /// The nearest name as a question, or empty.
        hint: String,
        /// The outputs that there are.
        known: String,
    },
    /// The output to rank holds no floats.
    #[error("expected an output of floating-point numbers, found `{output}` of {found}")]
    NotFloat {
        /// What was asked for.
        output: String,
        /// Its dtype.
        found: String,
    },
    /// Labels that do not fit.
    #[error(
        "labels of shape {labels:?} do not fit an output of shape {output:?}: expected (rows) or (rows, K) for \
         (rows, classes), (rows, T) or (rows, T, K) for (rows, T, classes)"
    )]
    Labels {
        /// Shape of the labels of a batch.
        labels: Vec<i64>,
        /// Shape of the ranked output.
        output: Vec<i64>,
    },
    /// A row without a label.
    #[error("expected at least one label from 0 on for each row, found a row with none but {found}")]
    NoClass {
        /// The largest label of that row.
        found: i64,
    },
    /// Labels beyond the classes.
    #[error("expected labels below {classes}, the number of classes, found {found}")]
    LabelRange {
        /// Last axis of the output.
        classes: i64,
        /// The largest label.
        found: i64,
    },
}

/// How often one model is right, summed over batches.
#[derive(Debug, Default)]
pub struct Measured {
    /// The output to rank; `None` for the first of floating point.
    output: Option<String>,
    answers: Answers,
}

impl Measured {
    /// Nothing yet. `output` names the output to rank, by its path or its index from 0; without it the first one of
    /// floating point is.
    #[must_use]
    pub fn new(output: Option<String>) -> Self {
        Self { output, answers: Answers::default() }
    }

    /// Adds one batch; for labels see [`Evaluation::add`].
    ///
    /// # Errors
    /// Where the output or the labels do not fit each other, or there is no such output.
    pub fn add(&mut self, output: &Output, labels: &Tensor) -> Result<(), Error> {
        let tensors = output.tensors();
        let index = ranked(&tensors, self.output.as_deref())?;
        tensors.get(index).map_or(Err(Error::NoOutput), |(_, tensor)| self.answers.add(tensor, labels))
    }

    /// The shares of right answers.
    #[must_use]
    pub fn finish(&self) -> Accuracy {
        self.answers.accuracy()
    }
}

/// Float against quantized, summed over batches.
#[derive(Debug, Default)]
pub struct Evaluation {
    /// The output to rank; `None` for the first of floating point.
    output: Option<String>,
    float: Answers,
    quantized: Answers,
    agreeing: f64,
    positions: f64,
    signal: f64,
    noise: f64,
    quantized_power: f64,
    product: f64,
    max_abs_diff: Option<f64>,
    max_abs_float: Option<f64>,
    not_finite: u64,
    rows: u64,
}

impl Evaluation {
    /// Nothing yet. `output` names the output to rank, by its path or its index from 0; without it the first one of
    /// floating point is. What is not ranked is compared all the same.
    #[must_use]
    pub fn new(output: Option<String>) -> Self {
        Self { output, ..Self::default() }
    }

    /// Adds one batch of `rows` rows. Labels are class indices. Where the ranked output is `(rows, classes)` they are
    /// `(rows)` or `(rows, K)` with K accepted classes padded with −1. Where it is `(rows, T, classes)` they are `(rows, T)` or
    /// `(rows, T, K)`, each position counts, and one whose labels are all negative does not.
    ///
    /// # Errors
    /// Where the outputs or labels do not fit each other, or there is no such output.
    pub fn add(
        &mut self,
        rows: usize,
        float: &Output,
        quantized: &Output,
        labels: Option<&Tensor>,
    ) -> Result<(), Error> {
        let float = float.tensors();
        let pairs = pair_outputs(&float, &quantized.tensors())?;
        let mut floats = pairs.iter().filter(|(expected, _)| expected.is_floating_point()).peekable();
        floats.peek().ok_or(Error::NoOutput)?;
        for (expected, found) in floats {
            self.add_differences(expected, found)?;
        }
        let index = ranked(&float, self.output.as_deref())?;
        let (expected, found) = pairs.get(index).ok_or(Error::NoOutput)?;
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
        let (f_finite, q_finite) = (f.f_isfinite()?, q.f_isfinite()?);
        let broken = f_finite.f_logical_and(&q_finite.f_logical_not()?)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        if broken > 0 {
            return Err(Error::Broken { broken, count: f.numel() });
        }
        let finite = f_finite.f_logical_and(&q_finite)?;
        let finite_count = finite.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        self.not_finite += f.numel() as u64 - u64::try_from(finite_count).unwrap_or(0);
        if finite_count == 0 {
            return Ok(());
        }
        let zero = Tensor::from(0.0f64);
        let (f, q) = (f.f_where_self(&finite, &zero)?, q.f_where_self(&finite, &zero)?);
        let difference = f.f_sub(&q)?;
        let sum = |tensor: Tensor| tensor.f_sum(Kind::Double)?.f_double_value(&[]);
        self.signal += sum(f.f_square()?)?;
        self.noise += sum(difference.f_square()?)?;
        self.quantized_power += sum(q.f_square()?)?;
        self.product += sum(f.f_mul(&q)?)?;
        let largest = |tensor: &Tensor| tensor.f_abs()?.f_max()?.f_double_value(&[]);
        self.max_abs_diff = Some(self.max_abs_diff.unwrap_or_default().max(largest(&difference)?));
        self.max_abs_float = Some(self.max_abs_float.unwrap_or_default().max(largest(&f)?));
        Ok(())
    }

    fn cosine(&self) -> Option<f64> {
        if self.max_abs_diff == Some(0.0) {
            return Some(1.0);
        }
        let norms = self.signal.sqrt() * self.quantized_power.sqrt();
        // Rounding may go beyond 1.
        Some((self.product / norms).clamp(-1.0, 1.0)).filter(|cosine| cosine.is_finite() && norms.is_finite())
    }

    /// The measures of the float and of the quantized model.
    #[must_use]
    pub fn finish(&self) -> (Accuracy, Comparison) {
        let comparison = Comparison {
            accuracy: self.quantized.accuracy(),
            agreement: (self.positions > 0.0).then(|| self.agreeing / self.positions),
            sqnr_db: Some(10.0 * (self.signal / self.noise).log10()).filter(|db| db.is_finite()),
            squared_error: self.max_abs_diff.map(|_| self.noise / self.rows as f64).filter(|error| error.is_finite()),
            cosine: self.max_abs_diff.and_then(|_| self.cosine()),
            max_abs_diff: self.max_abs_diff,
            max_abs_float: self.max_abs_float,
            not_finite: self.not_finite,
            rows: self.rows,
        };
        (self.float.accuracy(), comparison)
    }
}

/// The outputs of both models, side by side: equal paths, and equal shapes of those of floating point.
fn pair_outputs<'a>(
    float: &[(String, &'a Tensor)],
    quantized: &[(String, &'a Tensor)],
) -> Result<Vec<(&'a Tensor, &'a Tensor)>, Error> {
    let shape =
        |tensor: Option<&Tensor>| tensor.map_or_else(|| "missing".to_owned(), |tensor| format!("{:?}", tensor.size()));
    let misfit = |path: &str, found, expected| {
        let output = if path.is_empty() { String::new() } else { format!(" {path}") };
        Error::Mismatch { output, found: shape(found), expected: shape(expected) }
    };
    let mut pairs = Vec::new();
    for (index, (path, expected)) in float.iter().enumerate() {
        match quantized.get(index).filter(|(other, _)| other == path).map(|(_, found)| *found) {
            Some(found) if !expected.is_floating_point() || found.size() == expected.size() => {
                pairs.push((*expected, found));
            }
            found => return Err(misfit(path, found, Some(expected))),
        }
    }
    match quantized.get(float.len()) {
        Some((path, found)) => Err(misfit(path, Some(found), None)),
        None => Ok(pairs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Sqnr;

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
        assert_eq!(comparison.squared_error, Some(1.0));
        assert!((comparison.cosine.unwrap() - 27.0 / (30.0f64 * 26.0).sqrt()).abs() < 1e-12);
        assert_eq!(comparison.max_abs_diff, Some(1.0));
    }

    #[test]
    fn several_accepted_classes_and_padding() {
        let output = rows(&[0.0, 9.0, 0.0, 9.0, 0.0, 0.0], 3);
        let labels = Tensor::from_slice(&[2i64, 1, 2, -1]).reshape([2, 2]);
        let mut evaluation = Evaluation::default();
        evaluation.add(2, &output, &output, Some(&labels)).unwrap();
        let (accuracy, comparison) = evaluation.finish();
        assert_eq!(accuracy.top1, Some(0.5));
        assert_eq!((comparison.sqnr_db, comparison.cosine, comparison.agreement), (None, Some(1.0), Some(1.0)));
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
        assert_eq!((comparison.not_finite, comparison.max_abs_diff, comparison.sqnr_db), (1, Some(0.0), None));
    }

    #[test]
    fn measures_that_are_no_numbers_say_why() {
        let measured = |float: &[f32], quantized: &[f32]| {
            let mut evaluation = Evaluation::default();
            evaluation.add(1, &rows(float, 2), &rows(quantized, 2), None).unwrap();
            let (_, comparison) = evaluation.finish();
            (comparison.sqnr(), comparison.cosine, comparison.max_abs_diff)
        };
        assert_eq!(measured(&[1.0, 2.0], &[1.0, 2.0]), (Sqnr::Equal, Some(1.0), Some(0.0)));
        assert_eq!(measured(&[0.0, 0.0], &[0.0, 0.0]), (Sqnr::Equal, Some(1.0), Some(0.0)));
        assert_eq!(measured(&[0.0, 0.0], &[0.0, 3.0]), (Sqnr::NoSignal, None, Some(3.0)));
        assert_eq!(measured(&[0.0, 3.0], &[0.0, 0.0]), (Sqnr::Db(0.0), None, Some(3.0)));
        let (nan, infinite) = ([f32::NAN; 2], [f32::INFINITY; 2]);
        assert_eq!(measured(&nan, &nan), (Sqnr::NothingCompared, None, None));
        assert_eq!(measured(&infinite, &nan), (Sqnr::NothingCompared, None, None));
        assert_eq!(measured(&[f32::NAN, 1.0], &[f32::NAN, 1.0]), (Sqnr::Equal, Some(1.0), Some(0.0)));
    }

    #[test]
    fn squares_that_an_f64_does_not_hold_are_no_lack_of_signal() {
        let measured = |float: f64, quantized: f64| {
            let output = |value: f64| Output::Tensor(Tensor::from_slice(&[value, value]).reshape([1, 2]));
            let mut evaluation = Evaluation::default();
            evaluation.add(1, &output(float), &output(quantized), None).unwrap();
            let (_, comparison) = evaluation.finish();
            (comparison.sqnr(), comparison.cosine, comparison.max_abs_diff)
        };
        assert_eq!(measured(1e200, 0.5e200), (Sqnr::OutOfRange, None, Some(0.5e200)));
        assert_eq!(measured(1e-200, -1e-200), (Sqnr::OutOfRange, None, Some(2e-200)));
        assert_eq!(measured(1e-200, 1.0).0, Sqnr::OutOfRange);
        assert_eq!(measured(0.0, 1.0).0, Sqnr::NoSignal);
        // Whose squares fit, but not the product of their sums.
        assert!(measured(1e100, 2e100).1.is_some_and(|cosine| (cosine - 1.0).abs() < 1e-12));
    }

    fn several(parts: &[(&str, Tensor)]) -> Output {
        let part = |(name, tensor): &(&str, Tensor)| ((*name).to_owned(), Output::Tensor(tensor.shallow_clone()));
        Output::Parts(parts.iter().map(part).collect())
    }

    #[test]
    fn one_output_is_ranked_and_all_are_compared() {
        let ids = Tensor::from_slice(&[7i64, 8]);
        let (right, left) = (Tensor::from_slice(&[0.0f32, 1.0]), Tensor::from_slice(&[1.0f32, 0.0]));
        let row = |tensor: &Tensor| tensor.reshape([1, 2]);
        let float = several(&[("ids", ids.shallow_clone()), ("a", row(&right)), ("b", row(&right))]);
        let quantized = several(&[("ids", ids), ("a", row(&right)), ("b", row(&left))]);
        let agreement = |output: Option<&str>| {
            let labels = Tensor::from_slice(&[1i64]);
            let mut evaluation = Evaluation::new(output.map(str::to_owned));
            evaluation.add(1, &float, &quantized, Some(&labels)).unwrap();
            let mut alone = Measured::new(output.map(str::to_owned));
            alone.add(&quantized, &labels).unwrap();
            let (accuracy, comparison) = evaluation.finish();
            assert_eq!((accuracy.top1, alone.finish()), (Some(1.0), comparison.accuracy));
            assert_eq!(comparison.accuracy.top1, comparison.agreement);
            // Over both outputs of floats, whichever is ranked.
            assert_eq!(comparison.max_abs_diff, Some(1.0));
            assert!(comparison.cosine.is_some_and(|cosine| (cosine - 0.5).abs() < 1e-12));
            comparison.agreement
        };
        assert_eq!([None, Some("a"), Some("1")].map(agreement), [Some(1.0); 3]);
        assert_eq!([Some("b"), Some("2")].map(agreement), [Some(0.0); 2]);
        let refused = |output: &str| {
            let mut evaluation = Evaluation::new(Some(output.to_owned()));
            evaluation.add(1, &float, &quantized, None).unwrap_err().to_string()
        };
        assert!(refused("c").contains("no output `c`"));
        assert!(refused("ids").contains("found `ids` of int64"));
    }

    #[test]
    fn outputs_that_do_not_fit_are_refused() {
        let (two, three) = (rows(&[1.0, 2.0], 2), rows(&[1.0, 2.0, 3.0], 3));
        let tensor = || Tensor::from_slice(&[1.0f32]);
        let pair = several(&[("a", tensor()), ("b", tensor())]);
        let refused = |float: &Output, quantized: &Output| {
            Evaluation::default().add(1, float, quantized, None).unwrap_err().to_string()
        };
        let said = "evaluation: output of the quantized model is [1, 3], that of the float model [1, 2]";
        assert_eq!(refused(&two, &three), said);
        let fewer = several(&[("a", tensor())]);
        assert!(refused(&pair, &fewer).contains("output b of the quantized model is missing"));
        assert!(
            refused(&fewer, &pair).ends_with("output b of the quantized model is [1], that of the float model missing")
        );
        assert!(refused(&pair, &several(&[("b", tensor()), ("a", tensor())])).contains("output a of the quantized"));
        let ids = Output::Tensor(Tensor::from_slice(&[1i64]));
        assert!(refused(&ids, &ids).contains("expected a floating-point tensor"));
    }

    #[test]
    fn labels_that_do_not_fit_are_refused() {
        let output = rows(&[1.0, 2.0], 2);
        let add = |labels: &[i64]| {
            Evaluation::default().add(1, &output, &output, Some(&Tensor::from_slice(labels))).unwrap_err().to_string()
        };
        assert!(add(&[0, 1]).contains("labels of shape [2] do not fit an output of shape [1, 2]"));
        assert!(add(&[2]).contains("expected labels below 2"));
    }
}
