//! The sites that lose most, each with a guess at the cause and a line to try: rules of thumb on the statistics that are
//! there anyway. Nothing in a run depends on them.

use std::fmt;

use super::Error;
use crate::jit::{self, Clean};
use crate::quantizer::{Bits, Granularity};
use crate::report::{Kind, SiteReport, WorstSite};
use crate::sites::{Sites, WeightSite};
use crate::statistics::{Activation, Channel, ChannelLayout, Counter};
use crate::threshold::ErrorMethod;

/// How many sites are told.
const TOLD: usize = 5;

/// Fewer rows than this say little about a range.
const FEW_ROWS: usize = 32;

/// So many rows are tried where more are stored.
const ENOUGH_ROWS: usize = 256;

/// Beyond so many standard deviations a value is an outlier: ten million values of a Laplace distribution reach 12.
const OUTLIER: f64 = 20.0;

/// The largest channel with so many times the range of the middle one leaves that few levels of a common threshold.
const UNEVEN: f64 = 16.0;

/// The share of channels that are always zero from which on they are worth a word.
const MANY_DEAD: f64 = 0.1;

/// Bits that are tried next where nothing but the number of levels is to blame.
const MORE_BITS: [u8; 3] = [4, 8, 16];

/// Rows of calibration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rows {
    /// Those that ran.
    pub(super) seen: usize,
    /// Those that the data has.
    pub(super) stored: usize,
}

/// The worst sites by signal to noise, worst first. `statistics` are those of `sites.activations`, in order.
///
/// # Errors
/// Where a weight cannot be read.
pub(super) fn worst(
    model: &Clean,
    sites: &Sites,
    statistics: &[Vec<Activation>],
    reports: &[SiteReport],
    (rows, kernels): (Rows, Option<KernelBits>),
) -> Result<Vec<WorstSite>, Error> {
    let finite = reports.iter().filter_map(|site| Some((site.quantizers.sqnr_db?, site)));
    let mut ranked: Vec<(f64, &SiteReport)> = finite.collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    ranked.truncate(TOLD);
    let mut told = Vec::new();
    for (sqnr_db, report) in ranked {
        let mut traits = match report.kind {
            Kind::Weight => match sites.weights.iter().find(|site| site.name == report.name) {
                Some(site) => Traits::of(&statistics_of_weight(model, site)?),
                None => Traits::default(),
            },
            Kind::Activation => {
                let all = sites.activations.iter().zip(statistics);
                let own = all.filter(|(site, _)| site.name == report.name).flat_map(|(_, statistics)| statistics);
                let merged = own.fold(Activation::new(), |mut merged, other| {
                    merged.merge(other);
                    merged
                });
                Traits { rows: Some(rows), ..Traits::of(&merged) }
            }
        };
        if report.granularity == Granularity::PerChannel {
            // Each channel has a threshold of its own.
            (traits.unevenness, traits.peak) = (None, None);
        }
        let cause = traits.cause(report);
        let line = cause.line_to_try(report, kernels);
        told.push(WorstSite { name: report.name.clone(), kind: report.kind, sqnr_db, cause: cause.to_string(), line });
    }
    Ok(told)
}

fn statistics_of_weight(model: &Clean, site: &WeightSite) -> Result<Activation, Error> {
    let tensor = model.constant(site.values.first().copied().unwrap_or_default())?.f_contiguous()?;
    let sizes: Vec<usize> = site.shape.iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
    let (_, inner) = sizes.split_at(site.channel_axis.min(sizes.len()));
    let count = inner.first().copied().unwrap_or(1);
    let layout = ChannelLayout { count, run_length: inner.iter().skip(1).product() };
    let mut statistics = Activation::new();
    jit::with_values(&tensor, |values| {
        statistics.observe(values, layout, &mut [Counter::new()], |parts, run| (0..parts).for_each(run));
    })?;
    Ok(statistics)
}

/// Of 8-bit kernels that the model is to run on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct KernelBits {
    /// 8, or 7 where the engine needs it.
    pub(super) activations: u8,
}

/// What the guess is made from.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Traits {
    /// `None` of a weight, which is known whole.
    rows: Option<Rows>,
    /// Distance of the farthest value from the mean in standard deviations.
    peak: Option<f64>,
    /// Range of the largest channel in ranges of the middle one.
    unevenness: Option<f64>,
    /// Channels that are always zero, and all.
    dead: [usize; 2],
}

impl Traits {
    fn of(statistics: &Activation) -> Self {
        let histogram = &statistics.histogram;
        let peak = histogram.moments().zip(histogram.observed().ok().flatten()).map(|(moments, seen)| {
            let farthest = (f64::from(seen.max()) - moments.mean).max(moments.mean - f64::from(seen.min()));
            farthest / moments.standard_deviation
        });
        let channels = statistics.channels.get().unwrap_or_default();
        let reach = |channel: &Channel| f64::from(channel.max().max(-channel.min()).max(0.0));
        let mut reaches: Vec<f64> = channels.iter().map(reach).collect();
        reaches.sort_by(f64::total_cmp);
        let unevenness = reaches.last().zip(reaches.get(reaches.len() / 2)).map(|(largest, middle)| largest / middle);
        let dead = reaches.iter().filter(|&&reach| reach == 0.0).count();
        Self { rows: None, peak, unevenness, dead: [dead, channels.len()] }
    }

    fn cause(&self, site: &SiteReport) -> Cause {
        let [dead, channels] = self.dead;
        if let Some(rows) = self.rows.filter(|rows| rows.seen < FEW_ROWS) {
            return Cause::FewSamples(rows);
        }
        if let Some(peak) = self.peak.filter(|&peak| peak > OUTLIER) {
            return Cause::Outliers { peak };
        }
        if let Some(unevenness) = self.unevenness.filter(|&unevenness| unevenness > UNEVEN && unevenness.is_finite()) {
            return Cause::WideRange { unevenness };
        }
        if dead as f64 > MANY_DEAD * channels as f64 {
            return Cause::DeadChannels { dead, channels };
        }
        Cause::FewLevels { bits: site.bits }
    }
}

/// A guess.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cause {
    FewSamples(Rows),
    Outliers { peak: f64 },
    WideRange { unevenness: f64 },
    DeadChannels { dead: usize, channels: usize },
    FewLevels { bits: Bits },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FewSamples(Rows { seen, stored }) => {
                let more = if stored > seen { "" } else { ", and the calibration data has no more" };
                write!(f, "few samples: {seen} rows say little about the range{more}")
            }
            Self::Outliers { peak } => {
                write!(f, "outliers: the farthest value lies {peak:.0} standard deviations from the mean")
            }
            Self::WideRange { unevenness } => {
                write!(f, "wide range: the largest channel reaches {unevenness:.0} times as far as the middle one")
            }
            Self::DeadChannels { dead, channels } => {
                write!(f, "dead channels: {dead} of {channels} are always zero")
            }
            Self::FewLevels { bits } => write!(f, "few levels: {bits} bits"),
        }
    }
}

impl Cause {
    /// A line of YAML that may help, if any can.
    fn line_to_try(&self, site: &SiteReport, kernels: Option<KernelBits>) -> Option<String> {
        let sites = match site.kind {
            Kind::Weight => "weights",
            Kind::Activation => "activations",
        };
        // Its kernel has one scale.
        let is_one_scale = kernels.is_some() && site.op.contains("conv_transpose");
        let setting = match self {
            Self::FewSamples(Rows { seen, stored }) => {
                let samples = (*stored).min(ENOUGH_ROWS);
                return (stored > seen).then(|| format!("calibration: {{samples: {samples}}}"));
            }
            Self::Outliers { .. } if site.error_method == ErrorMethod::NoClipping => "error_method: MSE".to_owned(),
            Self::WideRange { .. } if site.kind == Kind::Weight && !is_one_scale => {
                "granularity: per_channel".to_owned()
            }
            _ => match more_bits(site, kernels) {
                Some(bits) if site.error_method == ErrorMethod::Kl && bits > ErrorMethod::KL_MAX_BITS => {
                    format!("bits: {bits}, error_method: MSE")
                }
                Some(bits) => format!("bits: {bits}"),
                None => return Some(format!("overrides: [{{layers: \"{}\", {sites}: float}}]", site.layer)),
            },
        };
        Some(format!("overrides: [{{layers: \"{}\", {sites}: {{{setting}}}}}]", site.layer))
    }
}

/// Bits that help; on 8-bit kernels those that they take alone.
fn more_bits(site: &SiteReport, kernels: Option<KernelBits>) -> Option<u8> {
    let current = site.bits.get();
    match (kernels, site.kind) {
        (None, _) => MORE_BITS.into_iter().find(|&bits| bits > current),
        (Some(_), Kind::Weight) => (current < 8).then_some(8),
        (Some(KernelBits { activations }), Kind::Activation) => (current < activations).then_some(activations),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantizer::Grid;
    use crate::report::{Quantizers, Thresholds};

    fn site(kind: Kind, bits: u64, error_method: ErrorMethod) -> SiteReport {
        let quantizers = Quantizers {
            thresholds: Thresholds::Threshold(vec![1.0]),
            scale: vec![1.0],
            zero_point: vec![0],
            error: 0.0,
            weighted_error: None,
            sqnr_db: Some(10.0),
            clipped_share: 0.0,
            notes: Vec::new(),
        };
        SiteReport {
            name: "conv1.output".to_owned(),
            kind,
            layer: "conv1".to_owned(),
            op: "aten::conv2d".to_owned(),
            bits: Bits::try_from(bits).unwrap(),
            grid: Grid::Symmetric,
            granularity: Granularity::PerTensor,
            error_method,
            l_p_value: None,
            scores: None,
            rounding: None,
            bounded_channels: None,
            quantizers,
        }
    }

    fn statistics(channels: &[Vec<f32>]) -> Activation {
        let mut statistics = Activation::new();
        let layout = ChannelLayout { count: channels.len(), run_length: channels[0].len() };
        statistics.observe(&channels.concat(), layout, &mut [Counter::new()], |parts, run| (0..parts).for_each(run));
        statistics
    }

    #[test]
    fn more_samples_are_asked_for_where_there_are_more() {
        let of = |seen, stored| {
            let cause = Cause::FewSamples(Rows { seen, stored });
            (cause.to_string(), cause.line_to_try(&site(Kind::Activation, 8, ErrorMethod::Mse), None))
        };
        assert_eq!(of(31, 1000).1.as_deref(), Some("calibration: {samples: 256}"));
        let (cause, line) = of(16, 16);
        assert_eq!(cause, "few samples: 16 rows say little about the range, and the calibration data has no more");
        assert_eq!(line, None);
    }

    fn ramp(count: usize, top: f32) -> Vec<f32> {
        (1..=count).map(|i| top * i as f32 / count as f32).collect()
    }

    #[test]
    fn each_cause_has_a_line_to_try() {
        let activation = site(Kind::Activation, 8, ErrorMethod::Mse);
        let cause = |statistics: &Activation, seen: usize, site: &SiteReport| {
            Traits { rows: Some(Rows { seen, stored: 70 }), ..Traits::of(statistics) }.cause(site)
        };
        let guess = |statistics: &Activation, seen: usize, site: &SiteReport| {
            let cause = cause(statistics, seen, site);
            [cause.to_string(), cause.line_to_try(site, None).unwrap()]
        };
        let even = statistics(&[ramp(500, 1.0), ramp(500, 1.0)]);
        assert_eq!(
            guess(&even, 4, &activation),
            ["few samples: 4 rows say little about the range", "calibration: {samples: 70}"]
        );
        assert_eq!(
            guess(&even, 64, &activation),
            ["few levels: 8 bits", "overrides: [{layers: \"conv1\", activations: {bits: 16}}]"]
        );
        let [_, line] = guess(&even, 64, &site(Kind::Activation, 8, ErrorMethod::Kl));
        assert!(line.ends_with("activations: {bits: 16, error_method: MSE}}]"), "{line}");
        let widest = site(Kind::Activation, 16, ErrorMethod::Mse);
        assert!(guess(&even, 64, &widest)[1].ends_with("activations: float}]"));

        // What 8-bit kernels do not take is no line to try.
        let on_kernels = |kind, bits, activations| {
            let site = site(kind, bits, ErrorMethod::Mse);
            cause(&even, 64, &site).line_to_try(&site, Some(KernelBits { activations })).unwrap()
        };
        let lines =
            [(3, 8, "activations: {bits: 8}}]"), (8, 8, "activations: float}]"), (4, 7, "activations: {bits: 7}}]")];
        for (bits, activations, line) in lines {
            assert!(on_kernels(Kind::Activation, bits, activations).ends_with(line), "{line}");
        }
        assert!(on_kernels(Kind::Activation, 7, 7).ends_with("activations: float}]"));
        assert!(on_kernels(Kind::Weight, 7, 8).ends_with("weights: {bits: 8}}]"));

        let mut spiked = ramp(5000, 1.0);
        spiked[7] = 1000.0;
        let [cause, line] = guess(&statistics(&[spiked.clone()]), 64, &activation);
        assert!(cause.starts_with("outliers: the farthest value lies 7"), "{cause}");
        assert_eq!(line, "overrides: [{layers: \"conv1\", activations: {bits: 16}}]");
        let [_, line] = guess(&statistics(&[spiked]), 64, &site(Kind::Activation, 8, ErrorMethod::NoClipping));
        assert_eq!(line, "overrides: [{layers: \"conv1\", activations: {error_method: MSE}}]");

        let uneven = statistics(&[ramp(500, 17.0), ramp(500, 1.0), ramp(500, 1.0)]);
        let [cause, _] = guess(&uneven, 64, &activation);
        assert_eq!(cause, "wide range: the largest channel reaches 17 times as far as the middle one");
        let [_, line] = guess(&uneven, 64, &site(Kind::Weight, 8, ErrorMethod::Mse));
        assert_eq!(line, "overrides: [{layers: \"conv1\", weights: {granularity: per_channel}}]");

        let dead = statistics(&[ramp(50, 1.0), vec![0.0; 50], ramp(50, 1.0)]);
        assert_eq!(guess(&dead, 64, &activation)[0], "dead channels: 1 of 3 are always zero");
    }
}
