//! What a search hands on. Plain data, without a site's name.

use std::fmt;

use super::measure::Measured;
use crate::quantizer::{QuantParams, Threshold};
use crate::statistics::Observed;

/// Channels that a note lists by index; more are counted only.
const LISTED_CHANNELS: usize = 8;

/// The quantizers of one site and what they cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// One quantizer per channel; one for an activation or a tensor with one threshold.
    pub params: Vec<QuantParams>,
    /// The snapped threshold of each of `params`.
    pub thresholds: Vec<Threshold>,
    /// For each of `params` the error by threshold that led to it, by descending scale; empty for NOCLIPPING, which does
    /// not search.
    pub curves: Vec<Vec<CurvePoint>>,
    /// Mean of (x − q)² over all values, whatever the method.
    pub error: f64,
    /// 10 log10(Σ x² / Σ (x − q)²) in dB, infinite without an error.
    pub sqnr_db: f64,
    /// Σ h (x − q)² / Σ h over all values, h being their Hessian scores; `None` of a selection without scores, or whose
    /// scores are all zero.
    pub weighted_error: Option<f64>,
    /// What the errors of an activation cost at the outputs because they are not independent, as a share of Σ h (x − q)²: below 0
    /// where they cancel. `None` where sums of gradients by row do not tell.
    pub off_diagonal: Option<f64>,
    /// Share of clipped values, from 0 to 1.
    pub clipped_share: f64,
    /// Channels whose scale is larger than the method chose, so that no sum of two products overflows 16 bits; `None` where that
    /// was not asked for.
    pub raised: Option<usize>,
    /// What a reader of the report should know.
    pub notes: Vec<Note>,
}

/// A threshold that was tried.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CurvePoint {
    /// The threshold, snapped.
    pub threshold: Threshold,
    /// What the method minimises: the mean of abs(x − q)^p in the unit of the data, for HMSE weighted, or the divergence in
    /// nats.
    pub error: f64,
}

/// A property of the data that makes its quantizer unusual; one line each as text.
#[derive(Debug, Clone, PartialEq)]
pub enum Note {
    /// All values are zero or denormal.
    AllZero,
    /// Two or more values, all equal to this one.
    Constant(f32),
    /// Some channels of a weight tensor hold only zeros and denormals.
    ZeroChannels {
        /// Their indices, ascending.
        channels: Vec<usize>,
        /// Number of channels in all.
        count: usize,
    },
    /// The Hessian scores of some channels are zero, at least those of all values that are not, so that MSE chose for them.
    ZeroScores {
        /// Their indices, ascending.
        channels: Vec<usize>,
        /// Number of channels in all; 1 for one threshold.
        count: usize,
    },
    /// Values too far from the mean to count.
    Outliers {
        /// How many.
        outliers: u64,
        /// Number of values in all.
        count: u64,
        /// Standard deviations beyond which a value does not count.
        deviations: f64,
    },
}

impl Selection {
    /// Without quantizers yet.
    pub(super) fn measured(measured: &Measured) -> Self {
        Self {
            params: Vec::new(),
            thresholds: Vec::new(),
            curves: Vec::new(),
            error: measured.mean_squared_error(),
            sqnr_db: measured.sqnr_db(),
            weighted_error: None,
            off_diagonal: None,
            clipped_share: measured.clipped_share(),
            raised: None,
            notes: Vec::new(),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllZero => write!(f, "all values are zero: scale 1, zero point 0"),
            Self::Constant(value) => write!(f, "all values are {value}"),
            Self::ZeroChannels { channels, count } => {
                let (zero, listed) = (channels.len(), listed(channels));
                write!(f, "{zero} of {count} channels are all zero ({listed}): scale 1, zero point 0")
            }
            Self::ZeroScores { count: 1, .. } => write!(f, "all Hessian scores are zero: MSE"),
            Self::ZeroScores { channels, count } => {
                let (zero, listed) = (channels.len(), listed(channels));
                write!(f, "{zero} of {count} channels have Hessian scores of zero ({listed}): MSE there")
            }
            Self::Outliers { outliers, count, deviations } => {
                write!(f, "{outliers} of {count} values lie beyond {deviations} standard deviations and do not count")
            }
        }
    }
}

fn listed(channels: &[usize]) -> String {
    let listed: Vec<_> = channels.iter().take(LISTED_CHANNELS).map(ToString::to_string).collect();
    let more = if channels.len() > LISTED_CHANNELS { ", …" } else { "" };
    listed.join(", ") + more
}

/// The notes on a tensor whose channels have these extremes.
pub(super) fn notes(channels: &[Observed]) -> Vec<Note> {
    let zero: Vec<usize> = (0..channels.len()).filter(|&index| channels[index].is_all_zero()).collect();
    if zero.len() == channels.len() {
        return vec![Note::AllZero];
    }
    let mut notes = Vec::new();
    if !zero.is_empty() {
        notes.push(Note::ZeroChannels { channels: zero, count: channels.len() });
    }
    let value = channels[0].min();
    let values: u64 = channels.iter().map(Observed::count).sum();
    if values > 1 && channels.iter().all(|channel| channel.min() == value && channel.max() == value) {
        notes.push(Note::Constant(value));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::MinMax;

    fn lines(channels: &[&[f32]]) -> Vec<String> {
        let observed = |values: &&[f32]| {
            let mut min_max = MinMax::new();
            min_max.observe(values);
            min_max.observed().unwrap().unwrap()
        };
        let observed: Vec<Observed> = channels.iter().map(observed).collect();
        notes(&observed).iter().map(Note::to_string).collect()
    }

    #[test]
    fn one_line_for_each_oddity() {
        assert_eq!(lines(&[&[0.0, 1e-40], &[-0.0]]), ["all values are zero: scale 1, zero point 0"]);
        assert_eq!(lines(&[&[0.25, 0.25]]), ["all values are 0.25"]);
        assert_eq!(lines(&[&[0.25], &[0.25]]), ["all values are 0.25"]);
        let some_zero = "2 of 3 channels are all zero (0, 2): scale 1, zero point 0";
        assert_eq!(lines(&[&[0.0], &[1.0, 2.0], &[0.0]]), [some_zero]);
        let mut many: Vec<&[f32]> = vec![&[0.0]; 20];
        many[0] = &[1.0];
        let line = "19 of 20 channels are all zero (1, 2, 3, 4, 5, 6, 7, 8, …): scale 1, zero point 0";
        assert_eq!(lines(&many), [line]);
    }

    #[test]
    fn lists_channels_without_scores() {
        let line = |channels: &[usize], count| Note::ZeroScores { channels: channels.to_vec(), count }.to_string();
        assert_eq!(line(&[0, 3], 4), "2 of 4 channels have Hessian scores of zero (0, 3): MSE there");
        let all: Vec<usize> = (0..9).collect();
        let nine = "9 of 9 channels have Hessian scores of zero (0, 1, 2, 3, 4, 5, 6, 7, …): MSE there";
        assert_eq!(line(&all, 9), nine);
        assert_eq!(line(&[0], 1), "all Hessian scores are zero: MSE");
    }

    #[test]
    fn nothing_to_say_about_ordinary_data() {
        assert!(lines(&[&[1.0, 2.0], &[3.0, 3.0]]).is_empty());
        assert!(lines(&[&[5.0]]).is_empty());
        assert!(lines(&[&[5.0], &[6.0]]).is_empty());
    }
}
