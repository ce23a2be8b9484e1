//! What `inspect` shows of a file of statistics.

use std::io::Write;
use std::path::Path;

use serde::Serialize;

use super::table;
use crate::dataset::Shard;
use crate::pipeline::{Kept, Key, ScoredLayers};
use crate::statistics::Activation;

/// What is said of statistics, in this order.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    #[serde(flatten)]
    key: &'a Key,
    shard: Shard,
    rows: usize,
    stored_rows: usize,
    threads: usize,
    sites: Vec<Site<'a>>,
    /// Layers whose inputs were summed up for bias correction, beside those whose inputs are sites.
    input_sums: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hessian: Option<Scores<'a>>,
}

#[derive(Debug, Serialize)]
struct Site<'a> {
    name: &'a str,
    count: u64,
    min: Option<f32>,
    max: Option<f32>,
    mean: Option<f64>,
    standard_deviation: Option<f64>,
    zero_share: Option<f64>,
    /// None where it has several values, or tensors with different numbers of channels.
    channels: Option<usize>,
}

#[derive(Debug, Serialize)]
struct Scores<'a> {
    #[serde(flatten)]
    request: &'a std::collections::BTreeMap<String, serde_json::Value>,
    shard: Shard,
    samples: usize,
    probes_used: usize,
    left_out: &'a [String],
    layers: Vec<ScoredLayer<'a>>,
}

#[derive(Debug, Serialize)]
struct ScoredLayer<'a> {
    name: &'a str,
    standard_error: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unusable: Option<String>,
}

impl<'a> Summary<'a> {
    pub(super) fn of(kept: &'a Kept) -> Self {
        let hessian = kept.scores.as_ref().map(|scores| {
            let ScoredLayers { samples, probes, left_out, layers } = scores.layers();
            let layers = layers.into_iter().map(|(name, standard_error, unusable)| ScoredLayer {
                name,
                standard_error,
                unusable: unusable.map(ToString::to_string),
            });
            let layers = layers.collect();
            Scores { request: &scores.request, shard: scores.shard, samples, probes_used: probes, left_out, layers }
        });
        Self {
            key: &kept.key,
            shard: kept.shard,
            rows: kept.rows[0],
            stored_rows: kept.rows[1],
            threads: kept.threads,
            sites: kept.sites.iter().map(|(name, anchors)| Site::of(name, anchors)).collect(),
            input_sums: kept.inputs.iter().map(|sum| sum.layer.as_str()).collect(),
            hessian,
        }
    }

    /// What is in the file, in a line or two.
    pub(super) fn covered(&self) -> String {
        let values = self.sites.iter().fold(0u64, |sum, site| sum.saturating_add(site.count));
        let part = |shard: Shard| match shard {
            Shard::WHOLE => String::new(),
            shard => format!(", shard {shard} of them"),
        };
        let mut text = format!(
            "statistics of {} ({values} values) on {}{}",
            table::count(self.sites.len(), "activation site"),
            table::count(self.rows, "row"),
            part(self.shard)
        );
        if let Some(hessian) = &self.hessian {
            let (layers, rows) = (table::count(hessian.layers.len(), "layer"), table::count(hessian.samples, "row"));
            text.push_str(&format!("\nHessian scores of {layers} on {rows}{}", part(hessian.shard)));
        }
        text
    }

    fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "{}", self.covered())?;
        let Key { versions, device, allow_tf32, kernels, model, data, calibration } = self.key;
        let tf32 = if *allow_tf32 { " with TF32" } else { "" };
        writeln!(
            out,
            "by tsquant {} on torch {}, {device}{tf32}, {}, for {kernels} kernels; the data has {}",
            versions.tsquant,
            versions.torch,
            table::count(self.threads, "thread"),
            table::count(self.stored_rows, "row")
        )?;
        let mut digests = table::table(&["of", "SHA-256"], false);
        digests.add_row(["model", model.as_str()]);
        digests.add_row(["calibration data", data.as_str()]);
        writeln!(out, "{digests}")?;
        for (name, value) in calibration {
            writeln!(out, "{name}: {value}")?;
        }
        let titles = ["site", "values", "min", "max", "mean", "std. dev.", "zeros", "channels"];
        let mut sites = table::table(&titles, true);
        for site in &self.sites {
            sites.add_row(site.row());
        }
        writeln!(out, "\n{sites}")?;
        if !self.input_sums.is_empty() {
            writeln!(out, "\nsums of inputs for bias correction: {}", self.input_sums.join(", "))?;
        }
        let Some(hessian) = &self.hessian else { return Ok(()) };
        writeln!(out, "\nHessian scores, {} a row", table::count(hessian.probes_used, "probe"))?;
        for (name, value) in hessian.request {
            writeln!(out, "{name}: {value}")?;
        }
        let mut layers = table::table(&["scores of", "standard error"], true);
        for layer in &hessian.layers {
            let error = layer.standard_error.map_or("–".to_owned(), |error| format!("{:.1}%", 100.0 * error));
            layers.add_row([layer.name, layer.unusable.as_deref().unwrap_or(&error)]);
        }
        writeln!(out, "{layers}")
    }
}

impl<'a> Site<'a> {
    fn of(name: &'a str, anchors: &[Activation]) -> Self {
        let mut all = Activation::new();
        anchors.iter().for_each(|anchor| all.merge(anchor));
        let seen = all.observed().ok().flatten();
        let moments = all.histogram.moments();
        let channels = if anchors.len() == 1 { all.channels.get().map(<[_]>::len) } else { None };
        Self {
            name,
            count: all.count(),
            min: seen.map(|seen| seen.min()),
            max: seen.map(|seen| seen.max()),
            mean: moments.map(|moments| moments.mean),
            standard_deviation: moments.map(|moments| moments.standard_deviation),
            zero_share: seen.map(|seen| seen.zeros() as f64 / seen.count() as f64),
            channels,
        }
    }

    fn row(&self) -> [String; 8] {
        let number = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.4}"));
        [
            self.name.to_owned(),
            self.count.to_string(),
            number(self.min.map(f64::from)),
            number(self.max.map(f64::from)),
            number(self.mean),
            number(self.standard_deviation),
            self.zero_share.map_or("–".to_owned(), |share| format!("{:.1}%", 100.0 * share)),
            self.channels.map_or("–".to_owned(), |channels| channels.to_string()),
        ]
    }
}

/// Prints what a file of statistics holds.
pub(super) fn inspect(out: &mut impl Write, path: &Path, as_json: bool) -> anyhow::Result<()> {
    let kept = Kept::read(path)?;
    let summary = Summary::of(&kept);
    if as_json {
        serde_json::to_writer_pretty(&mut *out, &summary).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        let mut text = Vec::new();
        summary.print(&mut text)?;
        // Names come from a stranger's file.
        for line in String::from_utf8_lossy(&text).lines() {
            writeln!(out, "{}", table::printable(line))?;
        }
    }
    Ok(())
}
