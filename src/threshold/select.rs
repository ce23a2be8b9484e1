//! From values or statistics to a selection: the frame that all error methods share. It refuses to know how a method
//! chooses; each has a file of its own.

use rayon::prelude::*;

use super::choose::{Chooser, Chosen, Data, choose};
use super::family::Sign;
use super::measure::Measured;
use super::selection::{Note, notes};
use super::{Channels, ErrorMethod, SelectError, Selection, pairs};
use crate::quantizer::{Grid, Scheme, Threshold};
use crate::statistics::{Histogram, MinMax, Observed};

/// Chooses one quantizer for each channel of a weight tensor; symmetric grids are signed whatever the values.
///
/// The result depends on nothing but the values, not on the number of threads.
///
/// # Errors
/// If a value is NaN or infinite, or so large that the grid cannot represent it, or the method is HMSE, for which there is
/// [`select_weights_scored`](super::select_weights_scored).
pub fn select_weights(
    weights: &Channels<'_>,
    scheme: Scheme,
    error_method: ErrorMethod,
) -> Result<Selection, SelectError> {
    if error_method == ErrorMethod::Hmse {
        return Err(SelectError::NoScores);
    }
    each_channel(weights, scheme, |_, values, chooser| chooser.by_method(Data::Values(values), error_method))
}

/// Chooses the one quantizer of an activation from its histogram; a symmetric grid is unsigned if no value is negative.
///
/// With `z_threshold`, values more than that many standard deviations from the mean do not count when the threshold is
/// chosen; what the quantizer costs is told of all values.
///
/// # Errors
/// If nothing was observed or would be left to count, a NaN or an infinity was observed, or a value so large that the grid
/// cannot represent it, or the method is HMSE, for which there is
/// [`select_activation_scored`](super::select_activation_scored).
pub fn select_activation(
    histogram: &Histogram,
    scheme: Scheme,
    error_method: ErrorMethod,
    z_threshold: Option<f64>,
) -> Result<Selection, SelectError> {
    if error_method == ErrorMethod::Hmse {
        return Err(SelectError::NoScores);
    }
    whole(histogram, scheme, z_threshold, |counted, chooser| chooser.by_method(Data::Histogram(counted), error_method))
}

/// The selection whose thresholds `by` chooses, from the index and the values of each channel.
pub(super) fn each_channel(
    weights: &Channels<'_>,
    scheme: Scheme,
    by: impl Fn(usize, &[f32], &Chooser) -> Result<Chosen, SelectError> + Sync,
) -> Result<Selection, SelectError> {
    let select = |index| {
        let values = weights.channel(index);
        select_channel(&values, (scheme, weights.taps_in_pairs()), |chooser| by(index, &values, chooser)).map_err(
            |error| match error {
                SelectError::NotFinite(found) if weights.count() > 1 => {
                    SelectError::NotFiniteChannel { channel: index, found }
                }
                other => other,
            },
        )
    };
    // All results first: collected into one Result in parallel, the error would be that of a random channel.
    let results: Vec<_> = (0..weights.count()).into_par_iter().map(select).collect();
    let channels: Vec<SelectedChannel> = results.into_iter().collect::<Result<_, _>>()?;

    let mut measured = Measured::default();
    for channel in &channels {
        measured.merge(&channel.measured);
    }
    let observed: Vec<Observed> = channels.iter().map(|channel| channel.observed).collect();
    let mut selection = Selection { notes: notes(&observed), ..Selection::measured(&measured) };
    selection.raised = weights.taps_in_pairs().map(|_| channels.iter().filter(|channel| channel.is_raised).count());
    for SelectedChannel { chosen, .. } in channels {
        selection.params.push(chosen.threshold.params(scheme.bits));
        selection.thresholds.push(chosen.threshold);
        selection.curves.push(chosen.curve);
    }
    Ok(selection)
}

/// The selection whose threshold `by` chooses, from the values that count.
pub(super) fn whole(
    histogram: &Histogram,
    scheme: Scheme,
    z_threshold: Option<f64>,
    by: impl FnOnce(&Histogram, &Chooser) -> Result<Chosen, SelectError>,
) -> Result<Selection, SelectError> {
    let observed = histogram.observed()?.ok_or(SelectError::Empty)?;
    let mut notes = notes(&[observed]);
    let inner = z_threshold.map(|deviations| (deviations, histogram.without_outliers(deviations)));
    if let Some((deviations, inner)) = &inner {
        let outliers = histogram.count() - inner.count();
        if outliers == histogram.count() {
            return Err(SelectError::AllOutliers { deviations: *deviations });
        }
        if outliers > 0 {
            notes.push(Note::Outliers { outliers, count: histogram.count(), deviations: *deviations });
        }
    }
    let counted = inner.as_ref().map_or(histogram, |(_, inner)| inner);
    let data = counted.observed()?.ok_or(SelectError::Empty)?;
    if let Some((deviations, _)) = inner
        && data.is_all_zero()
        && !observed.is_all_zero()
    {
        return Err(SelectError::AllOutliers { deviations });
    }
    let sign = if observed.has_negative() { Sign::Signed } else { Sign::Unsigned };
    let Chosen { threshold, curve } = choose(data, sign, scheme, |chooser| by(counted, chooser))?;
    let params = threshold.params(scheme.bits);
    Ok(Selection {
        params: vec![params],
        thresholds: vec![threshold],
        curves: vec![curve],
        notes,
        ..Selection::measured(&Measured::of_histogram(histogram, observed, &params))
    })
}

struct SelectedChannel {
    chosen: Chosen,
    observed: Observed,
    measured: Measured,
    is_raised: bool,
}

fn select_channel(
    values: &[f32],
    (scheme, taps_in_pairs): (Scheme, Option<usize>),
    by: impl FnOnce(&Chooser) -> Result<Chosen, SelectError>,
) -> Result<SelectedChannel, SelectError> {
    let mut min_max = MinMax::new();
    min_max.observe(values);
    let observed = min_max.observed()?.ok_or(SelectError::Empty)?;
    let mut chosen = choose(observed, Sign::Signed, scheme, by)?;
    let raised = taps_in_pairs.and_then(|taps| raised(values, taps, scheme, &chosen));
    let is_raised = raised.is_some();
    chosen.threshold = raised.unwrap_or(chosen.threshold);
    let measured = Measured::of(values, &chosen.threshold.params(scheme.bits));
    Ok(SelectedChannel { chosen, observed, measured, is_raised })
}

/// The threshold with which sums of two products fit 16 bits, if that is another.
fn raised(values: &[f32], taps: usize, scheme: Scheme, chosen: &Chosen) -> Option<Threshold> {
    // Kernels take no weights on a grid with a zero point of its own.
    let is_continuous = match scheme.grid {
        Grid::Uniform => return None,
        Grid::Symmetric => true,
        Grid::PowerOfTwo => false,
    };
    let threshold = |scale: f32| {
        Threshold::Signed(f64::from(scale) * f64::from(scheme.bits.level_count() / 2)).snapped(scheme.bits)
    };
    let with_scale = |scale: f32| threshold(scale).params(scheme.bits);
    let params = chosen.threshold.params(scheme.bits);
    pairs::raised(values, taps, &params, (is_continuous, with_scale)).map(threshold)
}
