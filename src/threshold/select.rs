//! From values or statistics to a selection: the frame that all error methods share. It refuses to know how a method
//! chooses; each has a file of its own.

use rayon::prelude::*;

use super::family::{Family, Sign};
use super::measure::Measured;
use super::selection::notes;
use super::{Channels, ErrorMethod, SelectError, Selection, no_clipping};
use crate::quantizer::{Scheme, Threshold};
use crate::statistics::{MinMax, Observed};

/// Chooses one quantizer for each channel of a weight tensor; symmetric grids are signed whatever the values.
///
/// The result depends on nothing but the values, not on the number of threads.
///
/// # Errors
/// If a value is NaN or infinite, or so large that the grid cannot represent it.
pub fn select_weights(
    weights: &Channels<'_>,
    scheme: Scheme,
    error_method: ErrorMethod,
) -> Result<Selection, SelectError> {
    let select = |index| {
        select_channel(&weights.channel(index), scheme, error_method).map_err(|error| match error {
            SelectError::NotFinite(found) if weights.count() > 1 => {
                SelectError::NotFiniteChannel { channel: index, found }
            }
            other => other,
        })
    };
    // All results first: collected into one Result in parallel, the error would be that of a random channel.
    let results: Vec<_> = (0..weights.count()).into_par_iter().map(select).collect();
    let channels: Vec<SelectedChannel> = results.into_iter().collect::<Result<_, _>>()?;

    let mut measured = Measured::default();
    for channel in &channels {
        measured.merge(&channel.measured);
    }
    let observed: Vec<Observed> = channels.iter().map(|channel| channel.observed).collect();
    Ok(Selection {
        params: channels.iter().map(|channel| channel.threshold.params(scheme.bits)).collect(),
        thresholds: channels.iter().map(|channel| channel.threshold).collect(),
        error: Some(measured.mean_squared_error()),
        sqnr_db: Some(measured.sqnr_db()),
        clipped_share: Some(measured.clipped_share()),
        notes: notes(&observed),
    })
}

/// Chooses the one quantizer of an activation from its extremes; a symmetric grid is unsigned if no value is negative.
///
/// Extremes cannot tell the error, so that `error` and `sqnr_db` are `None`.
///
/// # Errors
/// If nothing was observed, a NaN or an infinity was, or a value so large that the grid cannot represent it.
pub fn select_activation(
    observed: &MinMax,
    scheme: Scheme,
    error_method: ErrorMethod,
) -> Result<Selection, SelectError> {
    let observed = observed.observed()?.ok_or(SelectError::Empty)?;
    let sign = if observed.has_negative() { Sign::Signed } else { Sign::Unsigned };
    let threshold = choose(observed, sign, scheme, error_method)?;
    let params = threshold.params(scheme.bits);
    Ok(Selection {
        params: vec![params],
        thresholds: vec![threshold],
        error: None,
        sqnr_db: None,
        clipped_share: no_clipping::encloses(&params, observed).then_some(0.0),
        notes: notes(&[observed]),
    })
}

struct SelectedChannel {
    threshold: Threshold,
    observed: Observed,
    measured: Measured,
}

fn select_channel(values: &[f32], scheme: Scheme, error_method: ErrorMethod) -> Result<SelectedChannel, SelectError> {
    let mut min_max = MinMax::new();
    min_max.observe(values);
    let observed = min_max.observed()?.ok_or(SelectError::Empty)?;
    let threshold = choose(observed, Sign::Signed, scheme, error_method)?;
    let measured = Measured::of(values, &threshold.params(scheme.bits));
    Ok(SelectedChannel { threshold, observed, measured })
}

/// The chosen threshold, snapped.
fn choose(data: Observed, sign: Sign, scheme: Scheme, error_method: ErrorMethod) -> Result<Threshold, SelectError> {
    let family = Family::new(data, sign, scheme);
    let threshold = match error_method {
        _ if data.is_all_zero() => family.with_scale(1.0),
        ErrorMethod::NoClipping => no_clipping::threshold(data, family)?,
    };
    Ok(threshold.snapped(scheme.bits))
}
