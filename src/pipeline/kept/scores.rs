//! Hessian scores on disk, beside the report: safetensors under the names of the report. A later run of the same model, data
//! and request reads them instead of computing them again; what they belong to is told by a hash.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::statistics::Key;
use super::tensors::{self, Stored, Tensors};
use crate::config::{HessianPlan, Plan};
use crate::hessian::{Layers, Scored, Scores, Unusable};
use crate::jit;
use crate::pipeline::{Error, hash};
use crate::statistics::{ActivationScores, GradientSums, WeightedHistogram};

/// Name of the file in the run directory.
pub(in crate::pipeline) const FILE: &str = "hessian.safetensors";

/// What a file says of its scores.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Description {
    samples: usize,
    probes: usize,
    left_out: Vec<String>,
    weights: BTreeMap<String, Site>,
    activations: BTreeMap<String, Site>,
}

/// What a file of scores alone says of them.
#[derive(Debug, Serialize, Deserialize)]
struct Alone {
    /// Hash of what the scores belong to.
    request: String,
    #[serde(flatten)]
    scores: Description,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Site {
    standard_error: Option<f64>,
    /// What gradients are counted in; of weights alone, where it is not 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<f64>,
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

/// Scores by the names of their sites.
pub(in crate::pipeline) struct NamedScores {
    /// Of weights and of activations, in the order of the scores.
    pub(in crate::pipeline) names: [Vec<String>; 2],
    pub(in crate::pipeline) scores: Scores,
}

/// What was found where scores may have been kept.
pub(in crate::pipeline) enum Found {
    /// No file.
    Nothing,
    /// Scores of this request.
    Scores(Scores),
    /// A file that is of no use, and why.
    Useless(String),
}

/// SHA-256 of all that scores depend on: programs, device, model, data and request.
pub(in crate::pipeline) fn request(
    plan: &Plan,
    key: &Key,
    device: &str,
    hessian: &HessianPlan,
    layers: Layers<'_>,
) -> Result<String, Error> {
    let mut data = plan.calibration.clone();
    // The hash of the data stands for it.
    data.path = Path::new("/").to_owned();
    // With a tolerance the number of probes depends on all layers that are scored.
    let all = layers.weights.iter().map(|site| &site.name).chain(layers.activations.iter().map(|site| &site.name));
    let names: Vec<&String> = all.filter(|_| hessian.request.tolerance.is_some()).collect();
    let request = (data.to_yaml()?, data.seed, hessian.request_to_yaml()?, names);
    let all = (&key.versions, (device, key.allow_tf32, &key.kernels), &key.model, &key.data, request);
    Ok(hash::hex(&Sha256::digest(serde_json::to_string(&all)?.as_bytes())))
}

/// Writes the scores of `layers`.
pub(in crate::pipeline) fn write(path: &Path, request: &str, layers: Layers<'_>, scores: &Scores) -> Result<(), Error> {
    let (tensors, scores) = encode(&names(layers), scores)?;
    tensors::write(path, tensors, &Alone { request: request.to_owned(), scores })
}

/// The scores of `layers` in the file at `path`, if it is there and holds those of this request.
pub(in crate::pipeline) fn read(path: &Path, request: &str, layers: Layers<'_>) -> Found {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Found::Nothing,
        Err(error) => return Found::Useless(format!("{} cannot be read: {error}", path.display())),
    };
    let path = path.display();
    let parsed = tensors::parse(&bytes).and_then(|(tensors, description): (_, Alone)| {
        if description.request != request {
            return Ok(Found::Useless(format!("those in {path} are of another model, data or request")));
        }
        let found = decode(&tensors, &description.scores)?.of(layers);
        Ok(found.map_or_else(
            || Found::Useless(format!("those in {path} are of other layers, bits or z_threshold")),
            Found::Scores,
        ))
    });
    parsed.unwrap_or_else(|reason| Found::Useless(format!("{path} is damaged: {reason}")))
}

/// The names of weights and of activations.
pub(in crate::pipeline) fn names(layers: Layers<'_>) -> [Vec<String>; 2] {
    let weights = layers.weights.iter().map(|site| site.name.clone());
    [weights.collect(), layers.activations.iter().map(|site| site.name.clone()).collect()]
}

/// Scores under these names as tensors, and what is said of them.
pub(super) fn encode(
    [weights, activations]: &[Vec<String>; 2],
    scores: &Scores,
) -> Result<(Vec<(String, Stored)>, Description), Error> {
    let mut tensors = Vec::new();
    let mut description = Description {
        samples: scores.samples,
        probes: scores.probes,
        left_out: scores.left_out.clone(),
        weights: BTreeMap::new(),
        activations: BTreeMap::new(),
    };
    for (name, scored) in weights.iter().zip(&scores.weights) {
        if let Ok(scores) = &scored.scores {
            let shape = scores.size().iter().map(|&size| usize::try_from(size).unwrap_or_default()).collect();
            // In the order of the shape, whatever that in memory is.
            let stored =
                jit::with_values(&scores.f_contiguous()?, |values| Stored::new(shape, values.iter().copied()))?;
            tensors.push((name.clone(), stored));
        }
        description.weights.insert(name.clone(), Site::of(scored));
    }
    for (name, scored) in activations.iter().zip(&scores.activations) {
        let mut described = Site::of(scored);
        if let Ok(ActivationScores { by_value, sums }) = &scored.scores {
            described.zeros = Some(by_value.zeros());
            described.range = sums.range().map(|range| [*range.start(), *range.end()]);
            tensors.extend(activation(name, by_value, sums));
        }
        description.activations.insert(name.clone(), described);
    }
    Ok((tensors, description))
}

impl Site {
    fn of<T>(scored: &Scored<T>) -> Self {
        let unusable = scored.scores.as_ref().err().cloned();
        let unit = Some(scored.unit).filter(|&unit| unit != 1.0);
        Self { standard_error: scored.standard_error, unit, zeros: None, range: None, unusable }
    }

    fn scored<T>(&self, read: impl FnOnce() -> Result<T, String>) -> Result<Scored<T>, String> {
        let scores = match &self.unusable {
            Some(reason) => Err(reason.clone()),
            None => Ok(read()?),
        };
        Ok(Scored { scores, standard_error: self.standard_error, unit: self.unit.unwrap_or(1.0) })
    }
}

/// The tensors of an activation with their names.
fn activation(site: &str, by_value: &WeightedHistogram, sums: &GradientSums) -> Vec<(String, Stored)> {
    let (bins, scores): (Vec<u32>, Vec<f64>) = by_value.sparse().into_iter().unzip();
    let mut tensors = vec![(bins_of(site), Stored::list(&bins)), (scores_of(site), Stored::list(&scores))];
    if sums.range().is_some() {
        let shape = vec![sums.rows().len(), GradientSums::BINS];
        tensors.push((gradients_of(site), Stored::new(shape, sums.rows().flat_map(|row| *row))));
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

/// The scores that are described.
///
/// # Errors
/// What is wrong with the tensors.
pub(super) fn decode(tensors: &Tensors<'_>, description: &Description) -> Result<NamedScores, String> {
    let Description { samples, probes, left_out, weights, activations } = description;
    let names = [weights, activations].map(|sites| sites.keys().cloned().collect());
    let weights = weights.iter().map(|(name, site)| site.scored(|| weight_in(tensors, name)));
    let weights = weights.collect::<Result<_, String>>()?;
    let activations = activations.iter().map(|(name, site)| site.scored(|| activation_in(tensors, name, site)));
    let activations = activations.collect::<Result<_, String>>()?;
    let (samples, probes, left_out) = (*samples, *probes, left_out.clone());
    Ok(NamedScores { names, scores: Scores { weights, activations, samples, probes, left_out } })
}

fn weight_in(tensors: &Tensors<'_>, site: &str) -> Result<Tensor, String> {
    let (values, shape) = tensors.shaped::<f32>(site)?;
    if !values.iter().all(|x| x.is_finite() && *x >= 0.0) {
        return Err(format!("expected finite scores, none negative, for {site}, found others"));
    }
    let shape: Vec<i64> = shape.iter().map(|&size| i64::try_from(size).unwrap_or_default()).collect();
    Tensor::f_from_slice(&values).and_then(|tensor| tensor.f_reshape(shape)).map_err(|error| error.to_string())
}

fn activation_in(tensors: &Tensors<'_>, site: &str, described: &Site) -> Result<ActivationScores, String> {
    let (bins, scores) = (tensors.numbers::<u32>(&bins_of(site))?, tensors.numbers::<f64>(&scores_of(site))?);
    let pairs = (bins.len() == scores.len()).then(|| bins.into_iter().zip(scores));
    let histogram = pairs.zip(described.zeros).and_then(|(pairs, zeros)| WeightedHistogram::from_sparse(pairs, zeros));
    let by_value =
        histogram.ok_or_else(|| format!("expected a score for each bin of {site}, none negative, found others"))?;
    let Some([lo, hi]) = described.range else { return Ok(by_value.into()) };
    let gradients = tensors.numbers::<f32>(&gradients_of(site))?;
    let sums = GradientSums::from_parts(lo..=hi, &gradients).filter(GradientSums::is_finite);
    let sums = sums.ok_or_else(|| format!("expected whole rows of finite sums for {site}, found others"))?;
    Ok(ActivationScores { by_value, sums })
}

impl NamedScores {
    /// Those of `layers`, if all of them are here, with sums over the same ranges.
    pub(in crate::pipeline) fn of(&self, layers: Layers<'_>) -> Option<Scores> {
        let [weight_names, activation_names] = &self.names;
        let Scores { weights, activations, samples, probes, left_out } = &self.scores;
        let by_name: HashMap<&String, &Scored<Tensor>> = weight_names.iter().zip(weights).collect();
        let weights = layers.weights.iter().map(|site| {
            let Scored { scores, standard_error, unit } = *by_name.get(&site.name)?;
            let scores = match scores {
                Ok(scores) if scores.size() == site.shape => Ok(scores.shallow_clone()),
                Ok(_) => return None,
                Err(reason) => Err(reason.clone()),
            };
            Some(Scored { scores, standard_error: *standard_error, unit: *unit })
        });
        let weights = weights.collect::<Option<_>>()?;
        let by_name: HashMap<&String, &Scored<ActivationScores>> = activation_names.iter().zip(activations).collect();
        let activations = layers.activations.iter().enumerate().map(|(index, site)| {
            let Scored { scores, standard_error, unit } = *by_name.get(&site.name)?;
            let asked = GradientSums::new(layers.ranges.get(index).cloned().flatten());
            let scores = match scores {
                Ok(scores) if asked.range().is_none() => Ok(scores.by_value.clone().into()),
                Ok(scores) if scores.sums.range() == asked.range() => Ok(scores.clone()),
                Ok(_) => return None,
                Err(reason) => Err(reason.clone()),
            };
            Some(Scored { scores, standard_error: *standard_error, unit: *unit })
        });
        let activations = activations.collect::<Option<_>>()?;
        Some(Scores { weights, activations, samples: *samples, probes: *probes, left_out: left_out.clone() })
    }

    /// Whether they are of sites with these names and no others.
    pub(super) fn is_of(&self, names: &[Vec<String>; 2]) -> bool {
        let sorted = |names: &[Vec<String>; 2]| {
            let mut names = names.clone();
            names.iter_mut().for_each(|names| names.sort_unstable());
            names
        };
        sorted(&self.names) == sorted(names)
    }
}
