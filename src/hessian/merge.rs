//! Scores of several shards as those of all their rows.

use tch::{Kind, Tensor};

use super::sums::{norm_by_octave, norm_for_spread};
use super::{Error, Scored, Scores, Unusable, usable};
use crate::jit;
use crate::statistics::{ActivationScores, GradientSums, WeightedHistogram};

impl Scores {
    /// The scores of all rows of these parts, which are of the same layers and probes, in the order of the rows; these came in
    /// batches of so many rows.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn merged(parts: Vec<Self>, batch_rows: usize) -> Result<Self, Error> {
        let total: usize = parts.iter().map(|part| part.samples).sum();
        let share = |part: &Self| part.samples as f64 / total.max(1) as f64;
        let shares: Vec<f64> = parts.iter().map(share).collect();
        let rows: Vec<usize> = parts.iter().map(|part| part.samples).collect();
        let probes = parts.iter().map(|part| part.probes).max().unwrap_or_default();
        let mut left_out: Vec<String> = Vec::new();
        for path in parts.iter().flat_map(|part| &part.left_out) {
            if !left_out.contains(path) {
                left_out.push(path.clone());
            }
        }
        let (mut weights, mut activations) = (Vec::new(), Vec::new());
        for part in parts {
            weights.push(part.weights);
            activations.push(part.activations);
        }
        let weights = transposed(weights).into_iter().map(|layer| weight(&layer, &shares, total));
        let activations =
            transposed(activations).into_iter().map(|layer| activation(&layer, &shares, (&rows, batch_rows)));
        let (weights, activations) = (weights.collect::<Result<_, jit::Error>>()?, activations.collect());
        Ok(Self { weights, activations, samples: total, probes, left_out })
    }
}

/// Layer by layer instead of part by part.
fn transposed<T>(parts: Vec<Vec<T>>) -> Vec<Vec<T>> {
    let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
    let mut layers = Vec::new();
    loop {
        let layer: Vec<T> = parts.iter_mut().filter_map(Iterator::next).collect();
        if layer.is_empty() {
            return layers;
        }
        layers.push(layer);
    }
}

fn weight(parts: &[Scored<Tensor>], shares: &[f64], samples: usize) -> Result<Scored<Tensor>, jit::Error> {
    let unit = parts.iter().filter(|part| part.scores.is_ok()).map(|part| part.unit).fold(f64::MIN_POSITIVE, f64::max);
    let mut sum: Option<Tensor> = None;
    let mut spread = Spread::default();
    for (part, share) in parts.iter().zip(shares) {
        let Ok(scores) = &part.scores else { continue };
        // Units are powers of two: no digit changes.
        let factor = share * (part.unit / unit) * (part.unit / unit);
        spread.add(part.standard_error, norm_for_spread(scores)? * factor);
        let scores = scores.f_to_kind(Kind::Double)?.f_mul_scalar(factor)?;
        sum = Some(match sum {
            None => scores,
            Some(mut sum) => sum.f_add_(&scores)?,
        });
    }
    let (scores, standard_error) = match sum.filter(|_| !has_infinite(parts)) {
        None => (Err(why(parts, samples)), None),
        Some(sum) => {
            let scores = sum.f_to_kind(Kind::Float)?;
            let standard_error = spread.relative(norm_for_spread(&scores)?);
            (usable(scores, samples)?, standard_error)
        }
    };
    Ok(Scored { scores, standard_error, unit: if unit > f64::MIN_POSITIVE { unit } else { 1.0 } })
}

fn activation(
    parts: &[Scored<ActivationScores>],
    shares: &[f64],
    (rows, batch_rows): (&[usize], usize),
) -> Scored<ActivationScores> {
    let known = parts.iter().find_map(|part| part.scores.as_ref().ok());
    let (mut by_value, mut sums) = (WeightedHistogram::new(), GradientSums::new(known.and_then(|it| it.sums.range())));
    let mut spread = Spread::default();
    for ((part, &share), &rows) in parts.iter().zip(shares).zip(rows) {
        let Ok(scores) = &part.scores else {
            // Its rows count, with gradients of zero.
            sums.append_zeros(rows, batch_rows);
            continue;
        };
        let mut own = scores.by_value.clone();
        own.scale(share);
        spread.add(part.standard_error, norm_by_octave(&own));
        by_value.merge(&own);
        sums.append(&scores.sums, batch_rows);
    }
    let standard_error = spread.relative(norm_by_octave(&by_value));
    let scores = if known.is_none() || has_infinite(parts) {
        Err(why(parts, rows.iter().sum()))
    } else {
        Ok(ActivationScores { by_value, sums })
    };
    Scored { standard_error: standard_error.filter(|_| scores.is_ok()), scores, unit: 1.0 }
}

fn has_infinite<T>(parts: &[Scored<T>]) -> bool {
    parts.iter().any(|part| matches!(part.scores, Err(Unusable::NotFinite)))
}

/// Why none of the parts is of use.
fn why<T>(parts: &[Scored<T>], samples: usize) -> Unusable {
    let reasons = || parts.iter().filter_map(|part| part.scores.as_ref().err());
    let cuts = reasons().find_map(|reason| match reason {
        Unusable::NoGradient { cuts, .. } if !cuts.is_empty() => Some(cuts.clone()),
        _ => None,
    });
    if has_infinite(parts) {
        Unusable::NotFinite
    } else if reasons().any(|reason| matches!(reason, Unusable::Zero { .. })) {
        Unusable::Zero { samples }
    } else {
        Unusable::NoGradient { samples, cuts: cuts.unwrap_or_default() }
    }
}

/// Variances of parts, which are of other rows and add up.
#[derive(Default)]
struct Spread {
    variance: f64,
    is_known: bool,
}

impl Spread {
    fn add(&mut self, relative_error: Option<f64>, norm: f64) {
        if let Some(error) = relative_error {
            self.variance += (error * norm).powi(2);
            self.is_known = true;
        }
    }

    fn relative(&self, norm: f64) -> Option<f64> {
        (self.is_known && norm > 0.0).then(|| self.variance.sqrt() / norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(scores: Result<&[f32], Unusable>, standard_error: Option<f64>, unit: f64) -> Scored<Tensor> {
        Scored { scores: scores.map(Tensor::from_slice), standard_error, unit }
    }

    fn merged(parts: &[Scored<Tensor>], samples: &[usize]) -> Scored<Tensor> {
        let total: usize = samples.iter().sum();
        let shares: Vec<f64> = samples.iter().map(|&own| own as f64 / total as f64).collect();
        weight(parts, &shares, total).unwrap()
    }

    #[test]
    fn weights_are_means_over_all_rows() {
        let parts = [part(Ok(&[1.0, 2.0]), Some(0.5), 1.0), part(Ok(&[5.0, 2.0]), Some(0.1), 1.0)];
        let Scored { scores, standard_error, unit } = merged(&parts, &[3, 1]);
        assert_eq!(Vec::<f32>::try_from(scores.unwrap()).unwrap(), [2.0, 2.0]);
        let expected = (0.25 * 5.0 * 9.0 / 16.0 + 0.01 * 29.0 / 16.0f64).sqrt() / 8f64.sqrt();
        assert!((standard_error.unwrap() - expected).abs() < 1e-12);
        assert_eq!(unit, 1.0);
        let in_other_units = [part(Ok(&[1.0, 2.0]), None, 4.0), part(Ok(&[8.0, 0.0]), None, 2.0)];
        let Scored { scores, standard_error, unit } = merged(&in_other_units, &[1, 1]);
        // (16 + 4 · 8) / 2 = 16 · 1.5.
        assert_eq!((Vec::<f32>::try_from(scores.unwrap()).unwrap(), unit), (vec![1.5, 1.0], 4.0));
        assert_eq!(standard_error, None);
    }

    #[test]
    fn parts_of_no_use() {
        let no_gradient = |samples, cuts: &str| Unusable::NoGradient { samples, cuts: cuts.to_owned() };
        let zero = || part(Err(Unusable::Zero { samples: 2 }), None, 1.0);
        let none = |cuts| part(Err(no_gradient(2, cuts)), None, 1.0);
        let good = || part(Ok(&[2.0, 4.0]), None, 1.0);
        let reason = |parts: &[Scored<Tensor>]| merged(parts, &[2, 2]).scores.err();
        assert_eq!(reason(&[zero(), none("")]), Some(Unusable::Zero { samples: 4 }));
        assert_eq!(reason(&[none(""), none("round")]), Some(no_gradient(4, "round")));
        assert_eq!(reason(&[part(Err(Unusable::NotFinite), None, 1.0), good()]), Some(Unusable::NotFinite));
        let half = merged(&[zero(), good()], &[2, 2]).scores.unwrap();
        assert_eq!(Vec::<f32>::try_from(half).unwrap(), [1.0, 2.0]);
    }
}
