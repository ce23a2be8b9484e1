//! One tensor or channel, one method, one threshold. It refuses to know channels, notes and reports.

use super::closed_form::Closed;
use super::family::{Family, Sign};
use super::lp::{Power, Powers};
use super::mae::Absolute;
use super::mse::Square;
use super::search::{Effort, Found, Point, Side, Sides, search, search_with_surplus};
use super::values::{self, Loss, Values};
use super::{CurvePoint, ErrorMethod, SelectError, kl, no_clipping};
use crate::quantizer::{Grid, QuantParams, Scheme, Threshold};
use crate::statistics::{Bin, Histogram, Observed};

/// Share by which a coarse step of a histogram's error may at least be worse than the best and still hide a better fine one.
const MARGIN: f64 = 0.15;

/// The same for p of 3 and more, whose errors are steeper, and fine steps in one coarse step: a few outliers make so much of
/// these errors that the valleys are as narrow as those of few values.
const HIGH_POWER_MARGIN: f64 = 0.6;
const HIGH_POWER_FINE_STEPS: i32 = 100;

/// What a threshold is chosen for.
#[derive(Clone, Copy)]
pub(super) enum Data<'a> {
    /// Values themselves.
    Values(&'a [f32]),
    /// Values as a histogram.
    Histogram(&'a Histogram),
}

/// A threshold, snapped, and the error by threshold that led to it, by descending scale.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) threshold: Threshold,
    pub(super) curve: Vec<CurvePoint>,
}

/// The threshold that `by` chooses, which is asked unless all values are zero.
///
/// # Errors
/// If the data are so large that the grid cannot represent them, or those of `by`.
pub(super) fn choose(
    observed: Observed,
    sign: Sign,
    scheme: Scheme,
    by: impl FnOnce(&Chooser) -> Result<Chosen, SelectError>,
) -> Result<Chosen, SelectError> {
    let family = Family::new(observed, sign, scheme);
    if observed.is_all_zero() {
        return Ok(Chosen { threshold: family.with_scale(1.0).snapped(scheme.bits), curve: Vec::new() });
    }
    let no_clipping = no_clipping::threshold(observed, family)?.snapped(scheme.bits);
    by(&Chooser { observed, family, scheme, no_clipping: no_clipping.params(scheme.bits) })
}

/// The effort for bins: smooth, unless much of their mass is in few of them.
pub(super) fn effort<'a>(bins: impl Iterator<Item = &'a Bin>, exponent: u8) -> Effort {
    // As many equally filled bins would make as much noise.
    let effort = Effort::for_noise(exponent, values::equal_parts(bins.map(|bin| bin.mass)));
    let (margin, fine_steps) = if exponent > 2 { (HIGH_POWER_MARGIN, HIGH_POWER_FINE_STEPS) } else { (MARGIN, 0) };
    Effort { margin: effort.margin.max(margin), fine_steps: effort.fine_steps.max(fine_steps), ..effort }
}

/// Chooses for data of which it knows the extremes, and not all of them zero.
pub(super) struct Chooser {
    pub(super) observed: Observed,
    family: Family,
    pub(super) scheme: Scheme,
    pub(super) no_clipping: QuantParams,
}

impl Chooser {
    /// The threshold that `error_method` chooses.
    ///
    /// # Errors
    /// If the method cannot choose for so many bits, or not for values alone.
    pub(super) fn by_method(&self, data: Data<'_>, error_method: ErrorMethod) -> Result<Chosen, SelectError> {
        match error_method {
            ErrorMethod::NoClipping => {
                Ok(Chosen { threshold: self.family.of_params(&self.no_clipping), curve: Vec::new() })
            }
            ErrorMethod::Mse => Ok(self.by_loss(data, Square, |bins, unit| Closed::new(Square, bins, unit))),
            ErrorMethod::Mae => Ok(self.by_loss(data, Absolute, |bins, unit| Closed::new(Absolute, bins, unit))),
            ErrorMethod::Lp { p } => match p.get() {
                1 => self.by_method(data, ErrorMethod::Mae),
                2 => self.by_method(data, ErrorMethod::Mse),
                _ => Ok(self.by_loss(data, Power(p), |bins, unit| Powers::new(bins, p, unit))),
            },
            ErrorMethod::Kl if self.scheme.bits.get() > ErrorMethod::KL_MAX_BITS => {
                Err(SelectError::KlBits { bits: self.scheme.bits })
            }
            ErrorMethod::Kl => {
                let found = kl::search(data, self.observed, self.family, &self.no_clipping);
                Ok(self.chosen(&found, |_| true, |divergence| divergence))
            }
            ErrorMethod::Hmse => Err(SelectError::NoScores),
        }
    }

    fn by_loss<L: Loss, S: Side>(&self, data: Data<'_>, loss: L, side: impl Fn(&[Bin], f64) -> S) -> Chosen {
        let unit = self.unit();
        let mean = |sum: f64| sum * unit.powi(loss.exponent().into()) / self.observed.count() as f64;
        match data {
            Data::Values(all) => {
                let sides = Values::sides(all, loss, unit, self.is_uniform());
                let exact = |params: &QuantParams| -> f64 {
                    let error = |x: &f32| loss.of((f64::from(*x) - f64::from(params.fake_quantize(*x))) / unit);
                    all.iter().map(error).sum()
                };
                let is_better = |params: &QuantParams| exact(params) < exact(&self.no_clipping);
                self.by_search(&sides, values::effort(loss.exponent(), all), is_better, mean)
            }
            Data::Histogram(histogram) => {
                let (negative, positive) = (histogram.negative_bins(), histogram.positive_bins());
                let sides = Sides { negative: side(&negative, unit), positive: side(&positive, unit) };
                let effort = effort(negative.iter().chain(&positive), loss.exponent());
                self.by_search(&sides, effort, |_| true, mean)
            }
        }
    }

    /// A power of two near NOCLIPPING's scale, so that counting in this unit changes no digit.
    pub(super) fn unit(&self) -> f64 {
        f64::from(self.no_clipping.scale()).log2().floor().exp2()
    }

    /// Whether each end of the grid is chosen for itself.
    pub(super) fn is_uniform(&self) -> bool {
        self.scheme.grid == Grid::Uniform
    }

    /// The threshold with the least error of these sides.
    pub(super) fn by_search<S: Side>(
        &self,
        sides: &Sides<S>,
        effort: Effort,
        is_better: impl Fn(&QuantParams) -> bool,
        curve_error: impl Fn(f64) -> f64,
    ) -> Chosen {
        self.chosen(&search(sides, self.family, &self.no_clipping, effort), is_better, curve_error)
    }

    /// The threshold with the least sum of the error of these sides and a surplus of the quantizer, in the same unit, which is
    /// told of the quantizer and its error.
    pub(super) fn by_search_with_surplus<S: Side>(
        &self,
        sides: &Sides<S>,
        effort: Effort,
        surplus: impl Fn(&QuantParams, f64) -> f64,
        curve_error: impl Fn(f64) -> f64,
    ) -> Chosen {
        let surplus = |point: &Point| surplus(&self.snapped(point).params(self.scheme.bits), point.error);
        let found = search_with_surplus(sides, self.family, &self.no_clipping, effort, surplus);
        self.chosen(&found, |_| true, curve_error)
    }

    fn snapped(&self, point: &Point) -> Threshold {
        self.family.with_zero_point(point.scale.into(), point.zero_point).snapped(self.scheme.bits)
    }

    /// The best quantizer found, if it maps no value to infinity and really is better than NOCLIPPING.
    fn chosen(
        &self,
        found: &Found,
        is_better: impl Fn(&QuantParams) -> bool,
        curve_error: impl Fn(f64) -> f64,
    ) -> Chosen {
        let best = self.snapped(&found.best);
        let params = best.params(self.scheme.bits);
        let extremes = [self.observed.min(), self.observed.max()];
        let is_finite = extremes.into_iter().all(|x| params.fake_quantize(x).is_finite());
        let no_clipping = self.family.of_params(&self.no_clipping);
        let is_kept = params != self.no_clipping && is_finite && is_better(&params);
        let curve_point =
            |point: &Point| CurvePoint { threshold: self.snapped(point), error: curve_error(point.error) };
        Chosen {
            threshold: if is_kept { best } else { no_clipping },
            curve: found.curve.iter().map(curve_point).collect(),
        }
    }
}
