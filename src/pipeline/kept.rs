//! Hessian scores on disk, beside the report: safetensors under the names of the report. A later run of the same model, data
//! and request reads them instead of computing them again; what they belong to is told by a hash.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::score::Keeping;
use super::{Error, hash};
use crate::config::HessianPlan;
use crate::hessian::{Layers, Scored, Scores, Unusable};
use crate::jit;
use crate::statistics::{ActivationScores, GradientSums, WeightedHistogram};

/// Name of the file in the run directory.
pub(super) const FILE: &str = "hessian.safetensors";

/// Key of the description in the file's metadata.
const KEY: &str = "tsquant";

/// What the file says of its tensors.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    /// Hash of what the scores belong to.
    request: String,
    samples: usize,
    probes: usize,
    left_out: Vec<String>,
    sites: BTreeMap<String, Site>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Site {
    standard_error: Option<f64>,
    /// Scores of values that count as zero; of activations alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    zeros: Option<f64>,
    /// What the bins of its gradients divide; of activations with such alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    range: Option<[f32; 2]>,
    /// Why it has no tensor.
    #[serde(skip_serializing_if = "Option::is_none")]
    unusable: Option<Unusable>,
}

/// What was found where scores may have been kept.
pub(super) enum Found {
    /// No file.
    Nothing,
    /// Scores of this request.
    Scores(Scores),
    /// A file that is of no use, and why.
    Useless(String),
}

/// SHA-256 of all that scores depend on: programs, device, model, data, request, and the sites that are asked for.
pub(super) fn request(keeping: &Keeping<'_>, hessian: &HessianPlan, layers: Layers<'_>) -> Result<String, Error> {
    let Keeping { plan, hashes, base, .. } = *keeping;
    let (versions, device) = (&base.versions, base.device());
    let mut data = plan.calibration.clone();
    // The hash of the data stands for it.
    data.path = Path::new("/").to_owned();
    let names = layers.weights.iter().map(|site| &site.name).chain(layers.activations.iter().map(|site| &site.name));
    let names: Vec<&String> = names.collect();
    let ranges: Vec<Option<(&f32, &f32)>> =
        layers.ranges.iter().map(|range| range.as_ref().map(|range| (range.start(), range.end()))).collect();
    // On the processor TF32 is never used.
    let arithmetic = (&device, plan.allow_tf32 && device != "cpu");
    let request = (data.to_yaml()?, data.seed, hessian.request_to_yaml()?, names, ranges);
    let all = (versions, arithmetic, &hashes.model, &hashes.calibration, request);
    Ok(hash::hex(&Sha256::digest(serde_json::to_string(&all)?.as_bytes())))
}

/// Writes the scores of `layers`.
pub(super) fn write(path: &Path, request: &str, layers: Layers<'_>, scores: &Scores) -> Result<(), Error> {
    let mut tensors = Vec::new();
    let mut sites = BTreeMap::new();
    for (site, scored) in layers.weights.iter().zip(&scores.weights) {
        if let Ok(scores) = &scored.scores {
            let shape = scores.size().iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
            // In the order of the shape, whatever that in memory is.
            let bytes = jit::with_values(&scores.f_contiguous()?, |values| {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            })?;
            tensors.push((site.name.clone(), Stored { dtype: Dtype::F32, shape, bytes }));
        }
        sites.insert(site.name.clone(), Site::of(scored));
    }
    for (site, scored) in layers.activations.iter().zip(&scores.activations) {
        let mut described = Site::of(scored);
        if let Ok(ActivationScores { by_value, sums }) = &scored.scores {
            described.zeros = Some(by_value.zeros());
            described.range = sums.range().map(|range| [*range.start(), *range.end()]);
            tensors.extend(activation(&site.name, by_value, sums));
        }
        sites.insert(site.name.clone(), described);
    }
    let Scores { samples, probes, .. } = *scores;
    let description =
        Description { request: request.to_owned(), samples, probes, left_out: scores.left_out.clone(), sites };
    let metadata = HashMap::from([(KEY.to_owned(), serde_json::to_string(&description)?)]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| Error::Write { path: path.to_owned(), source: std::io::Error::other(error.to_string()) })
}

impl Site {
    fn of<T>(scored: &Scored<T>) -> Self {
        let unusable = scored.scores.as_ref().err().cloned();
        Self { standard_error: scored.standard_error, zeros: None, range: None, unusable }
    }
}

/// The tensors of an activation with their names.
fn activation(site: &str, by_value: &WeightedHistogram, sums: &GradientSums) -> Vec<(String, Stored)> {
    let (bins, scores): (Vec<u32>, Vec<f64>) = by_value.sparse().into_iter().unzip();
    let shape = vec![bins.len()];
    let bytes = bins.iter().flat_map(|bin| bin.to_le_bytes()).collect();
    let bins = Stored { dtype: Dtype::U32, shape: shape.clone(), bytes };
    let bytes = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
    let scores = Stored { dtype: Dtype::F64, shape, bytes };
    let mut tensors = vec![(bins_of(site), bins), (scores_of(site), scores)];
    if sums.range().is_some() {
        let bytes = sums.rows().flatten().flat_map(|sum| sum.to_le_bytes()).collect();
        let shape = vec![sums.rows().len(), GradientSums::BINS];
        tensors.push((gradients_of(site), Stored { dtype: Dtype::F32, shape, bytes }));
    }
    tensors
}

fn bins_of(site: &str) -> String {
    format!("{site}.bins")
}

fn scores_of(site: &str) -> String {
    format!("{site}.scores")
}

fn gradients_of(site: &str) -> String {
    format!("{site}.gradients")
}

/// The scores of `layers` in the file at `path`, if it is there and holds those of this request.
pub(super) fn read(path: &Path, request: &str, layers: Layers<'_>) -> Found {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Found::Nothing,
        Err(error) => return Found::Useless(format!("{} cannot be read: {error}", path.display())),
    };
    match parse(&bytes, request, layers) {
        Ok(Some(scores)) => Found::Scores(scores),
        Ok(None) => Found::Useless(format!("those in {} are of another model, data or request", path.display())),
        Err(reason) => Found::Useless(format!("{} is damaged: {reason}", path.display())),
    }
}

/// `None` for the scores of another request.
fn parse(bytes: &[u8], request: &str, layers: Layers<'_>) -> Result<Option<Scores>, String> {
    let text = |error: &dyn std::error::Error| jit::one_line(&error.to_string());
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| text(&error))?;
    let described = metadata.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
    let described = described.ok_or_else(|| format!("expected the metadata `{KEY}`, found none"))?;
    let description: Description = serde_json::from_str(described).map_err(|error| text(&error))?;
    if description.request != request {
        return Ok(None);
    }
    let file = File { tensors: SafeTensors::deserialize(bytes).map_err(|error| text(&error))?, description };
    let weights = layers.weights.iter().map(|site| file.scored(&site.name, |_| file.weight(&site.name, &site.shape)));
    let weights = weights.collect::<Result<_, String>>()?;
    let activations = layers.activations.iter();
    let activations =
        activations.map(|site| file.scored(&site.name, |described| file.activation(&site.name, described)));
    let activations = activations.collect::<Result<_, String>>()?;
    let Description { samples, probes, left_out, .. } = file.description;
    Ok(Some(Scores { weights, activations, samples, probes, left_out }))
}

struct File<'a> {
    tensors: SafeTensors<'a>,
    description: Description,
}

impl File<'_> {
    fn scored<T>(&self, site: &str, read: impl Fn(&Site) -> Result<T, String>) -> Result<Scored<T>, String> {
        let described =
            self.description.sites.get(site).ok_or_else(|| format!("expected the site {site}, found none"))?;
        let scores = match &described.unusable {
            Some(reason) => Err(reason.clone()),
            None => Ok(read(described)?),
        };
        Ok(Scored { scores, standard_error: described.standard_error })
    }

    fn weight(&self, site: &str, shape: &[i64]) -> Result<Tensor, String> {
        let values: Vec<f32> = self.numbers(site, Dtype::F32, f32::from_le_bytes)?;
        let stored = self.tensors.tensor(site).map_err(|error| error.to_string())?;
        let has_shape = stored.shape().iter().map(|&size| i64::try_from(size)).eq(shape.iter().map(|&size| Ok(size)));
        if !has_shape || !values.iter().all(|x| x.is_finite() && *x >= 0.0) {
            return Err(format!("expected finite scores of shape {shape:?}, none negative, for {site}, found others"));
        }
        Tensor::f_from_slice(&values).and_then(|tensor| tensor.f_reshape(shape)).map_err(|error| error.to_string())
    }

    fn activation(&self, site: &str, described: &Site) -> Result<ActivationScores, String> {
        let bins: Vec<u32> = self.numbers(&bins_of(site), Dtype::U32, u32::from_le_bytes)?;
        let scores: Vec<f64> = self.numbers(&scores_of(site), Dtype::F64, f64::from_le_bytes)?;
        let pairs = (bins.len() == scores.len()).then(|| bins.into_iter().zip(scores));
        let histogram =
            pairs.zip(described.zeros).and_then(|(pairs, zeros)| WeightedHistogram::from_sparse(pairs, zeros));
        let by_value =
            histogram.ok_or_else(|| format!("expected a score for each bin of {site}, none negative, found others"))?;
        let Some([lo, hi]) = described.range else { return Ok(by_value.into()) };
        let gradients = self.numbers(&gradients_of(site), Dtype::F32, f32::from_le_bytes)?;
        let sums = GradientSums::from_parts(lo..=hi, gradients).filter(GradientSums::is_finite);
        let sums = sums.ok_or_else(|| format!("expected whole rows of finite sums for {site}, found others"))?;
        Ok(ActivationScores { by_value, sums })
    }

    fn numbers<T, const N: usize>(&self, name: &str, dtype: Dtype, read: fn([u8; N]) -> T) -> Result<Vec<T>, String> {
        let tensor = self.tensors.tensor(name).map_err(|error| error.to_string())?;
        if tensor.dtype() != dtype {
            return Err(format!("expected {dtype:?} elements in {name}, found {:?}", tensor.dtype()));
        }
        Ok(tensor.data().as_chunks().0.iter().map(|bytes| read(*bytes)).collect())
    }
}

/// A tensor on its way to disk.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
