//! The statistics of a calibration, or of a shard of it: histograms and channels of each activation, sums of what ops read,
//! and Hessian scores where an error method needs them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::scores::{self, Found, NamedScores};
use super::tensors::{self, Stored, Tensors};
use crate::config::{DataPlan, HessianPlan, Plan};
use crate::correct::LayerSum;
use crate::dataset::Shard;
use crate::hessian::{Layers, Scored, Unusable};
use crate::jit::{self, Seen};
use crate::pipeline::output_file::OutputFile;
use crate::pipeline::{Error, kernels};
use crate::report::Versions;
use crate::sites::Sites;
use crate::statistics::{Activation, ActivationArrays};

/// What `kind` says in the file.
const KIND: &str = "statistics";

/// More rows than any data has.
const MOST_ROWS: usize = 1 << 48;

/// Changes when files change so that older readers would go wrong.
const SCHEMA: u32 = 2;

/// What statistics are of: where any of it differs they are of no use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// Of the programs.
    pub versions: Versions,
    /// Where the model ran: `cpu` or `cuda`.
    pub device: String,
    /// Whether it might round to TF32 there.
    pub allow_tf32: bool,
    /// What the sites are found for, which decides what a site is: `float` or `int8` kernels.
    pub kernels: String,
    /// SHA-256 of the model.
    pub model: String,
    /// SHA-256 of the calibration data.
    pub data: String,
    /// The section `calibration` without the place of the data, and the seed where rows are drawn.
    pub calibration: BTreeMap<String, Value>,
}

/// Statistics by the names of the sites.
pub struct Kept {
    /// Where they are.
    pub path: PathBuf,
    /// What they are of.
    pub key: Key,
    /// Rows that a whole calibration runs, and rows that the data has.
    pub rows: [usize; 2],
    /// Which of the batches they are of.
    pub shard: Shard,
    /// Threads that computed them.
    pub threads: usize,
    /// What the values of the model's graph were seen to be on the first rows, which tells sites from others.
    pub seen: Vec<Option<Seen>>,
    /// The values of each activation site, in the order of the graph.
    pub sites: Vec<(String, Vec<Activation>)>,
    /// What ops with weights read.
    pub inputs: Vec<LayerSum>,
    /// Hessian scores.
    pub scores: Option<KeptScores>,
}

/// Hessian scores beside statistics.
pub struct KeptScores {
    /// The section `hessian` that they are of, without what only says what becomes of them.
    pub request: BTreeMap<String, Value>,
    /// Which of the batches they are of.
    pub shard: Shard,
    pub(in crate::pipeline) named: NamedScores,
}

/// What is told of scores.
pub struct ScoredLayers<'a> {
    /// Rows that were used.
    pub samples: usize,
    /// Random directions for each row.
    pub probes: usize,
    /// Paths of outputs without a derivative.
    pub left_out: &'a [String],
    /// The name of each layer, ‖standard error‖ / ‖scores‖, and why its scores are of no use.
    pub layers: Vec<(&'a str, Option<f64>, Option<&'a Unusable>)>,
}

impl KeptScores {
    /// What is told of them.
    #[must_use]
    pub fn layers(&self) -> ScoredLayers<'_> {
        let NamedScores { names: [weights, activations], scores } = &self.named;
        let of_weights = weights.iter().zip(&scores.weights).map(|(name, it)| told(name, it));
        let of_activations = activations.iter().zip(&scores.activations).map(|(name, it)| told(name, it));
        let layers = of_weights.chain(of_activations).collect();
        ScoredLayers { samples: scores.samples, probes: scores.probes, left_out: &scores.left_out, layers }
    }
}

fn told<'a, T>(name: &'a str, scored: &'a Scored<T>) -> (&'a str, Option<f64>, Option<&'a Unusable>) {
    (name, scored.standard_error, scored.scores.as_ref().err())
}

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    kind: String,
    schema: u32,
    #[serde(flatten)]
    key: Key,
    rows: usize,
    stored_rows: usize,
    shard: Shard,
    threads: usize,
    seen: Vec<Option<Seen>>,
    sites: Vec<DescribedSite>,
    inputs: Vec<DescribedInput>,
    #[serde(skip_serializing_if = "Option::is_none")]
    hessian: Option<DescribedScores>,
}

/// What a file says it is.
#[derive(Debug, Deserialize)]
struct Head {
    kind: String,
    schema: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct DescribedSite {
    name: String,
    /// Of each of its values: whether tensors had different numbers of channels.
    mixed_channels: Vec<bool>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DescribedInput {
    layer: String,
    count: u64,
    ranks: Vec<usize>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DescribedScores {
    request: BTreeMap<String, Value>,
    shard: Shard,
    #[serde(flatten)]
    scores: scores::Description,
}

impl Key {
    /// What a plan asks for, with the calibration data and the device that these statistics are of.
    fn asked(&self, plan: &Plan, versions: &Versions, model: &str) -> Result<Self, Error> {
        let (versions, model) = (versions.clone(), model.to_owned());
        let kernels = kernels::name(plan).to_owned();
        Ok(Self { versions, kernels, model, calibration: section(&plan.calibration)?, ..self.clone() })
    }

    /// The first thing that differs, in words.
    pub(super) fn difference(&self, other: &Self) -> Option<(String, [String; 2])> {
        let plain = |name: &str, own: &str, other: &str| {
            (own != other).then(|| (name.to_owned(), [own.to_owned(), other.to_owned()]))
        };
        let flag = |value: bool| value.to_string();
        let pairs = [
            ("the version of tsquant", &self.versions.tsquant, &other.versions.tsquant),
            ("the version of torch", &self.versions.torch, &other.versions.torch),
            ("the SHA-256 of the model", &self.model, &other.model),
            ("the SHA-256 of the calibration data", &self.data, &other.data),
            ("the device", &self.device, &other.device),
            ("the kernels that sites are found for (`output.format`)", &self.kernels, &other.kernels),
            ("`allow_tf32`", &flag(self.allow_tf32), &flag(other.allow_tf32)),
        ];
        let (own, others) = (&self.calibration, &other.calibration);
        // Whether there is a seed depends on another key.
        let in_both = own.keys().filter(|key| others.contains_key(*key));
        let keys = in_both.chain(own.keys()).chain(others.keys());
        let text = |of: &Self, key: &str| of.calibration.get(key).map_or("not set".to_owned(), Value::to_string);
        let named = |key: &str| if key == "seed" { "`seed`".to_owned() } else { format!("`calibration.{key}`") };
        pairs.iter().find_map(|(name, own, other)| plain(name, own, other)).or_else(|| {
            let mut keys = keys;
            keys.find_map(|key| plain(&named(key), &text(self, key), &text(other, key)))
        })
    }
}

/// What rows a section chooses and what it makes of them.
pub(in crate::pipeline) fn section(plan: &DataPlan) -> Result<BTreeMap<String, Value>, Error> {
    let mut section = yaml(&plan.to_yaml()?)?;
    section.remove("data");
    if plan.shuffle {
        section.insert("seed".to_owned(), plan.seed.into());
    }
    Ok(section)
}

fn yaml(text: &str) -> Result<BTreeMap<String, Value>, Error> {
    // What was written a moment ago.
    serde_yaml::from_str(text).map_err(|error| Error::Unreadable { message: error.to_string() })
}

/// The section `hessian` as far as scores depend on it.
pub(in crate::pipeline) fn request(plan: &HessianPlan) -> Result<BTreeMap<String, Value>, Error> {
    let mut request = yaml(&plan.request_to_yaml()?)?;
    request.retain(|key, _| key != "save" && key != "allow_fallback");
    Ok(request)
}

impl Kept {
    /// The statistics in a file.
    ///
    /// # Errors
    /// Where it cannot be read, is damaged, or holds something else.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        parse(path, &bytes).map_err(|reason| Error::NoStatistics { path: path.to_owned(), reason })
    }

    /// Writes them, whole or not at all; an earlier file of statistics is replaced.
    ///
    /// # Errors
    /// Where something else stands there, or the file cannot be written.
    pub(in crate::pipeline) fn write(&self, output: OutputFile) -> Result<(), Error> {
        let mut tensors = Vec::new();
        let mut sites = Vec::new();
        for (name, anchors) in &self.sites {
            let mut mixed_channels = Vec::new();
            for (number, activation) in anchors.iter().enumerate() {
                let arrays = ActivationArrays::of(activation);
                mixed_channels.push(arrays.has_mixed_channels);
                tensors.extend(encode(&format!("{name}/{number}"), &arrays));
            }
            sites.push(DescribedSite { name: name.clone(), mixed_channels });
        }
        let mut inputs = Vec::new();
        for LayerSum { layer, total, shape, count, ranks } in &self.inputs {
            tensors.push((sum_of(layer), Stored::new(shape.to_vec(), total.iter().copied())));
            inputs.push(DescribedInput { layer: layer.clone(), count: *count, ranks: ranks.clone() });
        }
        let hessian = self.scores.as_ref().map(|kept| {
            let (own, scores) = scores::encode(&kept.named.names, &kept.named.scores)?;
            tensors.extend(own);
            Ok::<_, Error>(DescribedScores { request: kept.request.clone(), shard: kept.shard, scores })
        });
        let description = Description {
            kind: KIND.to_owned(),
            schema: SCHEMA,
            key: self.key.clone(),
            rows: self.rows[0],
            stored_rows: self.rows[1],
            shard: self.shard,
            threads: self.threads,
            seen: self.seen.clone(),
            sites,
            inputs,
            hessian: hessian.transpose()?,
        };
        output.write(|file| tensors::write(file, tensors, &description))
    }

    /// An error unless these are all that a plan needs.
    pub(in crate::pipeline) fn check(&self, plan: &Plan, versions: &Versions, model: &str) -> Result<(), Error> {
        let asked = self.key.asked(plan, versions, model)?;
        self.refuse_other(&asked)?;
        self.refuse_shard()
    }

    /// An error where they are of something else.
    pub(in crate::pipeline) fn refuse_other(&self, asked: &Key) -> Result<(), Error> {
        match asked.difference(&self.key) {
            None => Ok(()),
            Some((what, [expected, found])) => {
                Err(Error::OtherStatistics { path: self.path.clone(), what, expected, found })
            }
        }
    }

    /// An error where they are of a part of the batches alone.
    pub(in crate::pipeline) fn refuse_shard(&self) -> Result<(), Error> {
        let parts = [Some(self.shard), self.scores.as_ref().map(|scores| scores.shard)];
        match parts.into_iter().flatten().find(|shard| *shard != Shard::WHOLE) {
            None => Ok(()),
            Some(shard) => Err(Error::OneShard { path: self.path.clone(), shard }),
        }
    }

    /// The scores of `layers`, if they are here and of this request.
    pub(in crate::pipeline) fn scores_of(&self, plan: &HessianPlan, layers: Layers<'_>) -> Result<Found, Error> {
        let path = self.path.display();
        let Some(kept) = &self.scores else { return Ok(Found::Useless(format!("{path} holds none"))) };
        let asked = request(plan)?;
        if kept.request != asked {
            let other = asked.keys().find(|key| kept.request.get(*key) != asked.get(*key));
            let what = other.map_or("request".to_owned(), |key| format!("`hessian.{key}`"));
            return Ok(Found::Useless(format!("those in {path} are of another {what}")));
        }
        let names = scores::names(layers);
        // With a tolerance the number of probes depends on all layers that are scored.
        let is_other = plan.request.tolerance.is_some() && !kept.named.is_of(&names);
        let found = if is_other { None } else { kept.named.of(layers) };
        Ok(match found {
            Some(scores) => Found::Scores(scores),
            None => Found::Useless(format!("those in {path} are of other layers, bits or z_threshold")),
        })
    }

    /// What was seen of these sites, in their order.
    pub(in crate::pipeline) fn statistics_of(&self, sites: &Sites) -> Result<Vec<Vec<Activation>>, Error> {
        let by_name: HashMap<&str, &Vec<Activation>> =
            self.sites.iter().map(|(name, anchors)| (name.as_str(), anchors)).collect();
        let statistics = sites.activations.iter().map(|site| {
            let found = by_name
                .get(site.name.as_str())
                .copied()
                .ok_or_else(|| Error::SiteNotKept { path: self.path.clone(), site: site.name.clone() })?;
            let is_whole = found.len() == site.anchors.len();
            let reason = || format!("expected {} values of {}, found {}", site.anchors.len(), site.name, found.len());
            if is_whole { Ok(found.clone()) } else { Err(self.damaged(reason())) }
        });
        statistics.collect()
    }

    /// An error for what cannot be in such a file.
    pub(in crate::pipeline) fn damaged(&self, reason: String) -> Error {
        Error::NoStatistics { path: self.path.clone(), reason }
    }
}

/// Whether this is a file of statistics, whole or not.
pub fn is_one(path: &Path) -> bool {
    tensors::describe_file::<Head>(path).is_some_and(|head| head.kind == KIND)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Kept, String> {
    let head: Head = tensors::describe(bytes).map_err(|reason| {
        format!("expected statistics that `tsquant calibrate` wrote, found another file: {reason}")
    })?;
    if head.kind != KIND {
        return Err(format!("expected statistics, found {}", jit::one_line(&head.kind)));
    }
    if head.schema != SCHEMA {
        return Err(format!("expected schema {SCHEMA}, found {}: another version of tsquant wrote it", head.schema));
    }
    let (tensors, description): (_, Description) =
        tensors::parse(bytes).map_err(|reason| format!("the file is damaged: {reason}"))?;
    let Description { key, rows, stored_rows, shard, threads, seen, hessian, .. } = description;
    let mut sites = Vec::new();
    for site in description.sites {
        let anchors = site.mixed_channels.iter().enumerate();
        let anchors = anchors.map(|(number, &mixed)| decode(&tensors, &format!("{}/{number}", site.name), mixed));
        sites.push((site.name.clone(), anchors.collect::<Result<Vec<_>, String>>()?));
    }
    let mut inputs = Vec::new();
    for DescribedInput { layer, count, ranks } in description.inputs {
        let name = sum_of(&layer);
        let (total, shape) = tensors.shaped::<f64>(&name)?;
        let shape = <[usize; 2]>::try_from(shape).map_err(|_| format!("expected two axes of {name}"))?;
        inputs.push(LayerSum { layer, total, shape, count, ranks });
    }
    let scores = hessian.map(|kept| {
        let DescribedScores { request, shard, scores } = kept;
        Ok::<_, String>(KeptScores { request, shard, named: scores::decode(&tensors, &scores)? })
    });
    let (path, scores) = (path.to_owned(), scores.transpose()?);
    let samples = scores.as_ref().map_or(0, |kept| kept.named.scores.samples);
    if rows > stored_rows || stored_rows > MOST_ROWS || samples > rows {
        return Err(format!(
            "no data has {stored_rows} rows of which {rows} ran, {samples} of them for Hessian scores"
        ));
    }
    Ok(Kept { path, key, rows: [rows, stored_rows], shard, threads, seen, sites, inputs, scores })
}

fn sum_of(layer: &str) -> String {
    format!("{layer}/input_sums")
}

/// The tensors of an activation with their names.
fn encode(name: &str, arrays: &ActivationArrays) -> Vec<(String, Stored)> {
    let channels = arrays.channel_counts.len();
    let sums = Stored::new(vec![channels, ActivationArrays::DIGITS], arrays.channel_sums.iter().copied());
    let extremes = Stored::new(vec![channels, 2], arrays.channel_extremes.iter().copied());
    let tensors = [
        ("bins", Stored::list(&arrays.bins)),
        ("counts", Stored::list(&arrays.counts)),
        ("extremes", Stored::list(&arrays.extremes)),
        ("totals", Stored::list(&arrays.totals)),
        ("channel_counts", Stored::list(&arrays.channel_counts)),
        ("channel_extremes", extremes),
        ("channel_sums", sums),
    ];
    tensors.into_iter().map(|(part, tensor)| (format!("{name}/{part}"), tensor)).collect()
}

fn decode(tensors: &Tensors<'_>, name: &str, has_mixed_channels: bool) -> Result<Activation, String> {
    let part = |part: &str| format!("{name}/{part}");
    let arrays = ActivationArrays {
        bins: tensors.numbers(&part("bins"))?,
        counts: tensors.numbers(&part("counts"))?,
        extremes: tensors.numbers(&part("extremes"))?,
        totals: tensors.numbers(&part("totals"))?,
        channel_counts: tensors.numbers(&part("channel_counts"))?,
        channel_extremes: tensors.numbers(&part("channel_extremes"))?,
        channel_sums: tensors.numbers(&part("channel_sums"))?,
        has_mixed_channels,
    };
    arrays.activation().ok_or_else(|| format!("no values have such statistics as {name}"))
}
