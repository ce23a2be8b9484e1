//! One tensor or channel, one method, one threshold. It refuses to know channels, notes and reports.

use super::closed_form::Closed;
use super::family::{Family, Sign};
use super::lp::{Power, Powers};
use super::mae::Absolute;
use super::mass::Mass;
use super::mse::Square;
use super::search::{Effort, Found, Point, Side, Sides, search};
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

/// The threshold that `error_method` chooses.
///
/// # Errors
/// If the data are so large that the grid cannot represent them, or the method cannot choose for so many bits.
pub(super) fn choose(
    data: Data<'_>,
    observed: Observed,
    sign: Sign,
    scheme: Scheme,
    error_method: ErrorMethod,
) -> Result<Chosen, SelectError> {
    let family = Family::new(observed, sign, scheme);
    if observed.is_all_zero() {
        return Ok(Chosen { threshold: family.with_scale(1.0).snapped(scheme.bits), curve: Vec::new() });
    }
    let no_clipping = no_clipping::threshold(observed, family)?.snapped(scheme.bits);
    let chooser = Chooser { data, observed, family, scheme, no_clipping: no_clipping.params(scheme.bits) };
    match error_method {
        ErrorMethod::NoClipping => Ok(Chosen { threshold: no_clipping, curve: Vec::new() }),
        ErrorMethod::Mse => {
            Ok(chooser.by_loss(Square, |bins, unit| Closed { form: Square, mass: Mass::new(bins, unit) }))
        }
        ErrorMethod::Mae => {
            Ok(chooser.by_loss(Absolute, |bins, unit| Closed { form: Absolute, mass: Mass::new(bins, unit) }))
        }
        ErrorMethod::Lp { p } => match p.get() {
            1 => choose(data, observed, sign, scheme, ErrorMethod::Mae),
            2 => choose(data, observed, sign, scheme, ErrorMethod::Mse),
            _ => Ok(chooser.by_loss(Power(p), |bins, unit| Powers::new(bins, p, unit))),
        },
        ErrorMethod::Kl if scheme.bits.get() > ErrorMethod::KL_MAX_BITS => {
            Err(SelectError::KlBits { bits: scheme.bits })
        }
        ErrorMethod::Kl => Ok(chooser.by_divergence()),
    }
}

/// The effort for a histogram: smooth, unless much of its mass is in few bins.
fn effort(histogram: &Histogram, exponent: u8) -> Effort {
    let (negative, positive) = (histogram.negative_bins(), histogram.positive_bins());
    // As many equally filled bins would make as much noise.
    let bins = values::equal_parts(negative.iter().chain(&positive).map(|bin| bin.mass));
    let effort = Effort::for_noise(exponent, bins);
    let (margin, fine_steps) = if exponent > 2 { (HIGH_POWER_MARGIN, HIGH_POWER_FINE_STEPS) } else { (MARGIN, 0) };
    Effort { margin: effort.margin.max(margin), fine_steps: effort.fine_steps.max(fine_steps), ..effort }
}

struct Chooser<'a> {
    data: Data<'a>,
    observed: Observed,
    family: Family,
    scheme: Scheme,
    no_clipping: QuantParams,
}

impl Chooser<'_> {
    fn by_loss<L: Loss, S: Side>(&self, loss: L, side: impl Fn(&[Bin], f64) -> S) -> Chosen {
        // A power of two, so that counting in this unit changes no digit.
        let unit = f64::from(self.no_clipping.scale()).log2().floor().exp2();
        let mean = |sum: f64| sum * unit.powi(loss.exponent().into()) / self.observed.count() as f64;
        match self.data {
            Data::Values(all) => {
                let sides = Values::sides(all, loss, unit, self.scheme.grid == Grid::Uniform);
                let effort = values::effort(loss.exponent(), all);
                let found = search(&sides, self.family, &self.no_clipping, effort);
                let exact = |params: &QuantParams| -> f64 {
                    let error = |x: &f32| loss.of((f64::from(*x) - f64::from(params.fake_quantize(*x))) / unit);
                    all.iter().map(error).sum()
                };
                self.chosen(&found, |params| exact(params) < exact(&self.no_clipping), mean)
            }
            Data::Histogram(histogram) => {
                let sides = Sides {
                    negative: side(&histogram.negative_bins(), unit),
                    positive: side(&histogram.positive_bins(), unit),
                };
                let found = search(&sides, self.family, &self.no_clipping, effort(histogram, loss.exponent()));
                self.chosen(&found, |_| true, mean)
            }
        }
    }

    fn by_divergence(&self) -> Chosen {
        let found = kl::search(self.data, self.observed, self.family, &self.no_clipping);
        self.chosen(&found, |_| true, |divergence| divergence)
    }

    /// The best quantizer found, if it maps no value to infinity and really is better than NOCLIPPING.
    fn chosen(
        &self,
        found: &Found,
        is_better: impl Fn(&QuantParams) -> bool,
        curve_error: impl Fn(f64) -> f64,
    ) -> Chosen {
        let threshold =
            |point: &Point| self.family.with_zero_point(point.scale.into(), point.zero_point).snapped(self.scheme.bits);
        let best = threshold(&found.best);
        let params = best.params(self.scheme.bits);
        let extremes = [self.observed.min(), self.observed.max()];
        let is_finite = extremes.into_iter().all(|x| params.fake_quantize(x).is_finite());
        let no_clipping = self.family.of_params(&self.no_clipping);
        let is_kept = params != self.no_clipping && is_finite && is_better(&params);
        let curve_point = |point: &Point| CurvePoint { threshold: threshold(point), error: curve_error(point.error) };
        Chosen {
            threshold: if is_kept { best } else { no_clipping },
            curve: found.curve.iter().map(curve_point).collect(),
        }
    }
}
