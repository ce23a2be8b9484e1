//! What is summed up over batches and probes: squared gradients, and how much they differ between probes. Nothing is kept of
//! a batch but its sum.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use tch::{Kind, Tensor};

use crate::jit;
use crate::statistics::{GradientSums, WeightedHistogram};

/// The spread over probes of a vector of sums.
///
/// With s the vector of one batch and probe, the variance of the sum over n probes of a batch is n times that of one, whose
/// estimate is (Σ‖s‖² − ‖Σs‖²/n) / (n − 1), all elements taken together. Batches are independent and add up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spread {
    /// Σ‖s‖² over the probes of the batch under way.
    squares: f64,
    variance: f64,
    is_known: bool,
}

impl Spread {
    pub(super) fn add_probe(&mut self, squared_norm: f64) {
        self.squares += squared_norm;
    }

    pub(super) fn end_batch(&mut self, probes: usize, squared_norm_of_sum: f64) {
        let n = probes as f64;
        self.variance += (n / (n - 1.0) * (self.squares - squared_norm_of_sum / n)).max(0.0);
        self.squares = 0.0;
        self.is_known = true;
    }

    /// ‖standard error‖ / ‖sum‖; `None` where there never were two probes of a batch to compare, or nothing was summed.
    pub(super) fn relative(&self, norm: f64) -> Option<f64> {
        (self.is_known && norm > 0.0).then(|| self.variance.sqrt() / norm)
    }
}

/// Gradients from 2^-20 to 2^20 are squared and summed up as they are; others in a unit of their own, because their squares
/// would leave the range of an f32.
const PLAIN: std::ops::RangeInclusive<f64> = 1.0 / (1 << 20) as f64..=(1 << 20) as f64;

/// Elements of a weight that tell its spread over probes: more would take memory and time, and tell no more.
const ENOUGH_FOR_SPREAD: usize = 1 << 12;

/// Of one weight: a sum for each element.
pub(super) struct WeightSums {
    /// In squared units.
    sum: Tensor,
    /// What gradients are counted in, a power of two; known from the first one on that is not zero.
    unit: Option<f64>,
    /// The sum of the batch under way over the elements that the spread is estimated from; not needed with one probe.
    batch: Option<Tensor>,
    /// Every so many elements one of them.
    step: i64,
    spread: Spread,
    /// Whether a gradient ever came.
    is_reached: bool,
}

impl WeightSums {
    pub(super) fn new(weight: &Tensor) -> Result<Self, jit::Error> {
        let step = step(weight);
        let (sum, spread) = (weight.f_zeros_like()?, Spread::default());
        Ok(Self { sum, unit: None, batch: None, step, spread, is_reached: false })
    }

    /// Adds the gradient of one probe, which may be sparse by row; whether its spread counts is known from the start of the
    /// batch.
    pub(super) fn add(&mut self, gradient: &Tensor, has_spread: bool) -> Result<(), jit::Error> {
        self.is_reached = true;
        if gradient.is_sparse() {
            return self.add_rows(&gradient.f_coalesce()?, has_spread);
        }
        let gradient = self.in_units(gradient)?;
        let _ = self.sum.f_addcmul_(&gradient, &gradient)?;
        if has_spread {
            self.add_to_spread(some_of(&gradient, self.step)?.f_square()?)?;
        }
        Ok(())
    }

    /// The same for a gradient that has some rows, each once.
    fn add_rows(&mut self, gradient: &Tensor, has_spread: bool) -> Result<(), jit::Error> {
        let (rows, values) = (gradient.f_indices()?.f_select(0, 0)?, gradient.f_values()?);
        if values.numel() == 0 {
            return Ok(());
        }
        let squares = self.in_units(&values)?.f_square()?;
        let _ = self.sum.f_index_add_(0, &rows, &squares)?;
        if has_spread {
            self.add_to_spread(self.some_of_rows(&rows, &squares)?)?;
        }
        Ok(())
    }

    /// What [`some_of`] takes out of these rows of the weight and zeros.
    fn some_of_rows(&self, rows: &Tensor, values: &Tensor) -> Result<Tensor, jit::Error> {
        let (count, of_rows) = (*rows.size().first().unwrap_or(&0), *self.sum.size().first().unwrap_or(&0));
        let whole = (Kind::Int64, rows.device());
        let width = values.numel() as i64 / count;
        let wanted = Tensor::f_arange_start_step(0, self.sum.numel() as i64, self.step, whole)?;
        let place = Tensor::f_full([of_rows], -1, whole)?.f_index_copy(0, rows, &Tensor::f_arange(count, whole)?)?;
        let at = place.f_index_select(0, &wanted.f_divide_scalar_mode(width, "floor")?)?;
        let is_there = at.f_ge(0)?;
        let at = at.f_clamp_min(0)?.f_mul_scalar(width)?.f_add(&wanted.f_remainder(width)?)?;
        Ok(values.f_reshape([-1])?.f_index_select(0, &at)?.f_mul(&is_there)?)
    }

    /// A gradient in the unit of this weight, which the first one that is not zero settles.
    fn in_units(&mut self, gradient: &Tensor) -> Result<Tensor, jit::Error> {
        if self.unit.is_none() {
            // Not of absolute values, which would be a copy.
            let [least, most] = [gradient.f_min()?, gradient.f_max()?].map(|it| it.f_double_value(&[]));
            let largest = most?.max(-least?);
            let unit = if PLAIN.contains(&largest) { 1.0 } else { largest.log2().floor().exp2() };
            self.unit = Some(unit).filter(|unit| unit.is_normal());
        }
        Ok(match self.unit {
            Some(unit) if unit != 1.0 => gradient.f_mul_scalar(1.0 / unit)?,
            _ => gradient.shallow_clone(),
        })
    }

    fn add_to_spread(&mut self, squares: Tensor) -> Result<(), jit::Error> {
        self.spread.add_probe(squared_norm(&squares)?);
        self.batch = Some(match self.batch.take() {
            Some(mut batch) => batch.f_add_(&squares)?,
            None => squares,
        });
        Ok(())
    }

    pub(super) fn end_batch(&mut self, probes: usize) -> Result<(), jit::Error> {
        if let Some(batch) = self.batch.take() {
            self.spread.end_batch(probes, squared_norm(&batch)?);
        }
        Ok(())
    }

    pub(super) fn is_reached(&self) -> bool {
        self.is_reached
    }

    pub(super) fn relative_error(&self) -> Result<Option<f64>, jit::Error> {
        Ok(self.spread.relative(norm_for_spread(&self.sum)?))
    }

    /// The sums times `factor`, and what gradients are counted in: 1, unless the largest would be out of the range of an f32.
    /// `None` if no gradient came.
    pub(super) fn scaled(mut self, factor: f64) -> Result<Option<(Tensor, f64)>, jit::Error> {
        if !self.is_reached {
            return Ok(None);
        }
        let unit = self.unit.unwrap_or(1.0);
        let largest = self.sum.f_max()?.f_double_value(&[])? * factor * unit * unit;
        let is_in_range = largest == 0.0 || (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&largest);
        let (factor, unit) = if is_in_range { (factor * unit * unit, 1.0) } else { (factor, unit) };
        Ok(Some((self.sum.f_mul_scalar_(factor)?, unit)))
    }
}

/// Every so many elements of a weight one tells its spread.
fn step(weight: &Tensor) -> i64 {
    weight.numel().div_ceil(ENOUGH_FOR_SPREAD).max(1) as i64
}

/// The norm of the elements of a weight's sums or scores that tell its spread.
pub(super) fn norm_for_spread(sums: &Tensor) -> Result<f64, jit::Error> {
    Ok(squared_norm(&some_of(sums, step(sums))?)?.sqrt())
}

/// The norm of the sums or scores of an activation, octave by octave.
pub(super) fn norm_by_octave(sums: &WeightedHistogram) -> f64 {
    sums.octave_sums().map(|(_, sum)| sum * sum).sum::<f64>().sqrt()
}

/// Every `step`-th element.
fn some_of(tensor: &Tensor, step: i64) -> Result<Tensor, jit::Error> {
    Ok(tensor.f_reshape([-1])?.f_slice(0, None, None, step)?)
}

/// Σ x². Squares of squared gradients may leave the range of an f32; summing them up in f64 takes thrice as long.
fn squared_norm(tensor: &Tensor) -> Result<f64, jit::Error> {
    let flat = tensor.f_reshape([-1])?;
    let sum = flat.f_dot(&flat)?.f_double_value(&[])?;
    if PLAIN.contains(&sum) {
        return Ok(sum);
    }
    let norm = flat.f_linalg_norm(2.0, None::<i64>, false, Kind::Double)?.f_double_value(&[])?;
    Ok(norm * norm)
}

/// Of one activation: a sum for each bin. Its spread is that of the sums of octaves: those of single bins converge more
/// slowly, and no threshold depends on a single one.
#[derive(Debug, Default)]
pub(super) struct ActivationSums {
    pub(super) histogram: WeightedHistogram,
    /// Of the first probe of each row.
    pub(super) gradients: GradientSums,
    /// Octave sums when the batch began, and after the last probe.
    before: BTreeMap<u16, f64>,
    last: BTreeMap<u16, f64>,
    spread: Spread,
    /// Whether a gradient ever came.
    pub(super) is_reached: bool,
}

impl ActivationSums {
    /// Of an activation with values in this range; without one its gradients are not kept by value.
    pub(super) fn new(range: Option<RangeInclusive<f32>>) -> Self {
        Self { gradients: GradientSums::new(range), ..Self::default() }
    }

    pub(super) fn end_probe(&mut self) {
        self.end_probe_at(self.histogram.octave_sums().collect());
    }

    /// The same where the octave sums are known from elsewhere.
    pub(super) fn end_probe_at(&mut self, now: BTreeMap<u16, f64>) {
        self.spread.add_probe(squared_distance(&now, &self.last));
        self.last = now;
    }

    pub(super) fn end_batch(&mut self, probes: usize) {
        self.spread.end_batch(probes, squared_distance(&self.last, &self.before));
        self.before.clone_from(&self.last);
    }

    pub(super) fn relative_error(&self) -> Option<f64> {
        self.spread.relative(norm_by_octave(&self.histogram))
    }
}

/// ‖a − b‖², b having no octave that a has not.
fn squared_distance(a: &BTreeMap<u16, f64>, b: &BTreeMap<u16, f64>) -> f64 {
    a.iter().map(|(octave, sum)| (sum - b.get(octave).copied().unwrap_or_default()).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_by_hand() {
        let mut spread = Spread::default();
        assert_eq!(spread.relative(1.0), None);
        // Two probes, (1, 0) and (3, 0): variance 2 each, so that of their sum is 4.
        spread.add_probe(1.0);
        spread.add_probe(9.0);
        spread.end_batch(2, 16.0);
        assert_eq!(spread.relative(4.0), Some(2.0 / 4.0));
        // A second batch of equal ones adds nothing.
        spread.add_probe(4.0);
        spread.add_probe(4.0);
        spread.end_batch(2, 16.0);
        assert_eq!(spread.relative(8.0), Some(2.0 / 8.0));
        assert_eq!(spread.relative(0.0), None);
    }

    #[test]
    fn weights_add_up_squares() {
        let mut sums = WeightSums::new(&Tensor::from_slice(&[0.0f32, 0.0])).unwrap();
        for gradient in [[1.0f32, 2.0], [3.0, 0.0]] {
            sums.add(&Tensor::from_slice(&gradient), true).unwrap();
        }
        sums.end_batch(2).unwrap();
        // (1, 4) and (9, 0): the variance of their sum is 8² / 2 · 2 + 4² / 2 · 2 = 80, ‖(10, 4)‖² = 116.
        let error = sums.relative_error().unwrap().unwrap();
        assert!((error - (80.0f64 / 116.0).sqrt()).abs() < 1e-6, "{error}");
        let scores = Vec::<f32>::try_from(sums.scaled(0.5).unwrap().unwrap().0).unwrap();
        assert_eq!(scores, [5.0, 2.0]);
    }

    /// Rows that were asked for twice, once and never, of a weight with more elements than tell its spread.
    #[test]
    fn a_gradient_by_row_counts_as_the_whole_one() {
        let (rows, width) = (40_000i64, 3i64);
        let mut sums = [0, 1].map(|_| WeightSums::new(&Tensor::zeros([rows, width], (Kind::Float, tch::Device::Cpu))));
        let [of_rows, of_all] = sums.each_mut().map(|sums| sums.as_mut().unwrap());
        assert!(of_all.step > 1);
        for probe in 0..3i64 {
            let asked = (Tensor::arange(30_000, (Kind::Int64, tch::Device::Cpu)) * (probe + 7)).remainder(rows);
            let values = (Tensor::arange(30_000 * width, (Kind::Float, tch::Device::Cpu)) + probe).remainder(11) - 4;
            let values = values.reshape([30_000, width]);
            let options = (Kind::Float, tch::Device::Cpu);
            let sparse =
                Tensor::sparse_coo_tensor_indices_size(&asked.unsqueeze(0), &values, [rows, width], options, false);
            of_rows.add(&sparse, true).unwrap();
            of_all.add(&sparse.to_dense(None, false), true).unwrap();
        }
        let nothing = Tensor::sparse_coo_tensor([rows, width], (Kind::Float, tch::Device::Cpu));
        of_rows.add(&nothing, false).unwrap();
        for sums in [&mut *of_rows, &mut *of_all] {
            sums.end_batch(3).unwrap();
        }
        let errors = [&*of_rows, &*of_all].map(|sums| sums.relative_error().unwrap());
        assert!(errors[0].is_some_and(|error| error > 0.0), "{errors:?}");
        assert_eq!(errors[0], errors[1]);
        let [of_rows, of_all] = sums.map(|sums| sums.unwrap().scaled(1.0).unwrap().unwrap().0);
        assert!(of_rows.equal(&of_all) && of_all.max().double_value(&[]) > 0.0);
    }

    /// Squares of 1e-30 and 1e30 leave the range of an f32.
    #[test]
    fn no_gradient_is_too_small_or_too_large() {
        for size in [1e-30f32, 1e30] {
            for has_spread in [false, true] {
                let mut sums = WeightSums::new(&Tensor::from_slice(&[0.0f32, 0.0])).unwrap();
                for gradient in [[0.0, 0.0], [size, 2.0 * size], [3.0 * size, 0.0]] {
                    sums.add(&Tensor::from_slice(&gradient), has_spread).unwrap();
                }
                if has_spread {
                    sums.end_batch(3).unwrap();
                }
                let scores = Vec::<f32>::try_from(sums.scaled(0.5).unwrap().unwrap().0).unwrap();
                assert!((scores[0] / scores[1] - 2.5).abs() < 1e-5, "{scores:?}");
            }
        }
    }

    #[test]
    fn activations_spread_by_octave() {
        let mut sums = ActivationSums::default();
        for gradients in [[1.0, 2.0], [3.0, 0.0]] {
            sums.histogram.observe(&[1.0, 4.0], &gradients, &mut [], |parts, work| (0..parts).for_each(work));
            sums.end_probe();
        }
        sums.end_batch(2);
        let error = sums.relative_error().unwrap();
        assert!((error - (80.0f64 / 116.0).sqrt()).abs() < 1e-12, "{error}");
    }
}
