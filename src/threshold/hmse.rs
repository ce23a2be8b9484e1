//! HMSE: the mean of (x − q)², weighted by the Hessian score of each value. It refuses to know where scores come from.

use rayon::prelude::*;

use super::choose::{self, Chooser, Chosen, Data};
use super::closed_form::Closed;
use super::measure::{squared_error_of_bins, weighted_squared_error};
use super::mse::Square;
use super::off_diagonal::OffDiagonal;
use super::scored::{self, Scored, Units};
use super::search::Sides;
use super::select::{each_channel, whole};
use super::selection::Note;
use super::{Channels, ErrorMethod, SelectError, Selection};
use crate::quantizer::{QuantParams, Scheme};
use crate::statistics::{ActivationScores, Bin, Histogram};

/// Chooses one quantizer for each channel of a weight tensor, like [`select_weights`](super::select_weights), by HMSE: each
/// channel minimises Σ h (x − q)² over its own values, h being the score of each, in the order of the weights.
///
/// A channel none of whose values but zeros has a score other than zero uses MSE, of which a [`Note`] tells.
///
/// # Errors
/// Those of `select_weights`; if there is not one score for each weight, or one is negative, NaN or infinite.
pub fn select_weights_scored(weights: &Channels<'_>, scores: &[f32], scheme: Scheme) -> Result<Selection, SelectError> {
    let expected = weights.values().len();
    let wrong = SelectError::ScoreCount { expected, found: scores.len() };
    let scores = weights.with_values(scores).ok_or(wrong)?;
    let is_score = |score: f32| score >= 0.0 && score.is_finite();
    if let Some(place) = scores.values().iter().position(|&score| !is_score(score)) {
        return Err(SelectError::Score { channel: weights.channel_of(place), score: scores.values()[place] });
    }
    let mut selection =
        each_channel(weights, scheme, |index, values, chooser| by_values(values, &scores.channel(index), chooser))?;
    let measure = |(index, params): (usize, &QuantParams)| {
        ScoredChannel::of(&weights.channel(index), &scores.channel(index), params)
    };
    let channels: Vec<ScoredChannel> = selection.params.par_iter().enumerate().map(measure).collect();
    let squared_error = channels.iter().map(|channel| channel.squared_error).sum();
    selection.weighted_error = mean(squared_error, channels.iter().map(|channel| channel.scores).sum());
    let without: Vec<usize> = (0..channels.len()).filter(|&index| channels[index].is_without_scores).collect();
    if !without.is_empty() {
        selection.notes.push(Note::ZeroScores { channels: without, count: channels.len() });
    }
    Ok(selection)
}

/// Chooses the one quantizer of an activation, like [`select_activation`](super::select_activation), by HMSE: from the sums of
/// the scores by the bins of the histogram, and from what the errors of a row cost together, where its gradients are known. It
/// uses MSE, of which a [`Note`] tells, if all scores are zero but those of zeros and of what `z_threshold` leaves out.
///
/// # Errors
/// Those of `select_activation`; if the scores are not finite.
pub fn select_activation_scored(
    histogram: &Histogram,
    scores: &ActivationScores,
    scheme: Scheme,
    z_threshold: Option<f64>,
) -> Result<Selection, SelectError> {
    if !scores.is_finite() {
        return Err(SelectError::ScoresNotFinite);
    }
    let ActivationScores { by_value, sums } = scores;
    let mut is_without_scores = false;
    let mut selection = whole(histogram, scheme, z_threshold, |counted, chooser| {
        let observed = chooser.observed;
        let inner = z_threshold.map(|_| by_value.within(observed.min()..=observed.max()));
        let by_value = inner.as_ref().unwrap_or(by_value);
        let bins = counted.weighted_bins(by_value);
        is_without_scores = bins.iter().all(Vec::is_empty);
        if is_without_scores {
            return chooser.by_method(Data::Histogram(counted), ErrorMethod::Mse);
        }
        let off_diagonal = OffDiagonal::new(sums, counted, scheme.bits);
        Ok(by_masses(Masses::new(bins, by_value.total()), off_diagonal.as_ref(), chooser))
    })?;
    let Masses { bins, total, unit } = Masses::new(histogram.weighted_bins(by_value), by_value.total());
    let squared_error = selection.params.iter().map(|params| squared_error_of_bins(&bins, params)).sum();
    selection.weighted_error = mean(squared_error, total);
    if is_without_scores {
        selection.notes.push(Note::ZeroScores { channels: vec![0], count: 1 });
    } else if let Some(off_diagonal) = OffDiagonal::new(sums, histogram, scheme.bits) {
        // Sums may be of what `z_threshold` leaves alone.
        let summed = sums.range().filter(|_| z_threshold.is_some()).map(|range| by_value.within(range));
        let diagonal = |params: &QuantParams| match &summed {
            None => squared_error * unit,
            Some(summed) => {
                let Masses { bins, unit, .. } = Masses::new(histogram.weighted_bins(summed), summed.total());
                squared_error_of_bins(&bins, params) * unit
            }
        };
        let of = |params: &QuantParams| off_diagonal.squared_error(params).mean / diagonal(params) - 1.0;
        let told = selection.params.first().filter(|params| off_diagonal.tells_levels_of(params));
        selection.off_diagonal = told.map(of).filter(|share| share.is_finite());
    }
    Ok(selection)
}

/// The weighted mean; `None` of no scores.
fn mean(squared_error: f64, scores: f64) -> Option<f64> {
    (scores > 0.0).then(|| squared_error / scores)
}

fn by_values(values: &[f32], scores: &[f32], chooser: &Chooser) -> Result<Chosen, SelectError> {
    let Some(units) = Units::of(values, scores) else {
        return chooser.by_method(Data::Values(values), ErrorMethod::Mse);
    };
    let sides = Scored::sides(values, scores, units, chooser.is_uniform());
    let error = |params: &QuantParams| weighted_squared_error(values, scores, params);
    let is_better = |params: &QuantParams| error(params) < error(&chooser.no_clipping);
    let total = sum(scores);
    Ok(chooser.by_search(&sides, scored::effort(values, scores), is_better, |sum| units.sum(sum) / total))
}

fn by_masses(
    Masses { bins, total, unit: mass }: Masses,
    off_diagonal: Option<&OffDiagonal>,
    chooser: &Chooser,
) -> Chosen {
    let unit = chooser.unit();
    let effort = choose::effort(bins.iter().flatten(), 2).patient();
    let [negative, positive] = bins.map(|bins| Closed::new(Square, &bins, unit));
    let sides = Sides { negative, positive };
    let mean = |sum: f64| sum * unit * unit / total;
    match off_diagonal {
        None => chooser.by_search(&sides, effort, |_| true, mean),
        Some(off_diagonal) => {
            let squared_unit = unit * unit * mass;
            let surplus =
                |params: &QuantParams, error: f64| off_diagonal.surplus(params, error * squared_unit) / squared_unit;
            chooser.by_search_with_surplus(&sides, effort, surplus, mean)
        }
    }
}

/// Negative and positive bins, and the mass of all with that of zeros, in a unit in which no square overflows or vanishes.
pub(super) struct Masses {
    pub(super) bins: [Vec<Bin>; 2],
    total: f64,
    pub(super) unit: f64,
}

impl Masses {
    pub(super) fn new(mut bins: [Vec<Bin>; 2], total: f64) -> Self {
        let [least, greatest] = [f64::MIN_EXP, f64::MAX_EXP - 1].map(f64::from);
        // A power of two, so that counting in this unit changes no digit.
        let unit = total.log2().clamp(least, greatest).floor().exp2();
        bins.iter_mut().flatten().for_each(|bin| bin.mass /= unit);
        Self { bins, total: total / unit, unit }
    }
}

/// What a quantizer costs one channel.
struct ScoredChannel {
    squared_error: f64,
    scores: f64,
    /// Whether it has values that are not zero, none of them with a score.
    is_without_scores: bool,
}

impl ScoredChannel {
    fn of(values: &[f32], scores: &[f32], params: &QuantParams) -> Self {
        let is_zero = values.iter().all(|x| x.abs() < f32::MIN_POSITIVE);
        Self {
            squared_error: weighted_squared_error(values, scores, params),
            scores: sum(scores),
            is_without_scores: !is_zero && Units::of(values, scores).is_none(),
        }
    }
}

fn sum(scores: &[f32]) -> f64 {
    scores.iter().map(|&score| f64::from(score)).sum()
}
