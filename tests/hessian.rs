//! Hessian scores against exact ones, which the shipped data holds: derivatives of every output by every element, taken one at
//! a time by another program. And what scores promise: no dependence on batches, no leak, words where there is no gradient.

mod common;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;

use tch::{Kind, Tensor};
use tsquant::config::{Distribution, HessianRequest};
use tsquant::dataset::Dataset;
use tsquant::hessian::{self, Error, Layers, Scored, Scores, Unusable};
use tsquant::jit::{Clean, Module};
use tsquant::sites::{self, Sites};
use tsquant::statistics::{ActivationScores, Counter, GradientSums, Histogram, WeightedHistogram};

use common::{Model, model, models_folder};

/// Rows of each test model.
const ROWS: usize = 16;

/// Standard errors that an estimate may be off: one in ten thousand is, and all seeds are fixed.
const DEVIATIONS: f64 = 4.0;

/// What rounding of f32 leaves of a relative distance of 0.
const EXACT: f64 = 1e-4;

/// Runs parts one after the other.
fn in_turn(parts: usize, work: &(dyn Fn(usize) + Sync)) {
    (0..parts).for_each(work);
}

fn count(number: usize) -> NonZeroUsize {
    NonZeroUsize::new(number).expect("a count")
}

fn request(probes: usize, batch_size: usize) -> HessianRequest {
    HessianRequest {
        samples: count(ROWS),
        probes: count(probes),
        batch_size: count(batch_size),
        distribution: Distribution::Rademacher,
        tolerance: None,
        seed: 7,
    }
}

struct Subject {
    clean: Clean,
    sites: Sites,
    data: Dataset,
    exact: BTreeMap<String, Tensor>,
}

impl Subject {
    fn new(model: Model) -> Self {
        let module = model.load();
        let clean = module.clean(Some(&model.arguments(&module, 4))).expect("a clean model");
        let sites = sites::find(clean.listing());
        let data = Dataset::open(&model.data_plan(ROWS, 5)).expect("data");
        let tensors = Tensor::read_safetensors(model.data_path()).expect("readable data");
        let exact =
            tensors.into_iter().filter_map(|(name, tensor)| Some((name.strip_prefix("exact.")?.to_owned(), tensor)));
        Self { clean, sites, data, exact: exact.collect() }
    }

    fn score(&self, request: &HessianRequest) -> Scores {
        self.try_score(request).unwrap_or_else(|error| panic!("{error}"))
    }

    fn try_score(&self, request: &HessianRequest) -> Result<Scores, Error> {
        self.try_score_in(request, &[])
    }

    fn try_score_in(&self, request: &HessianRequest, ranges: &[Option<RangeInclusive<f32>>]) -> Result<Scores, Error> {
        let (weights, activations): (Vec<_>, Vec<_>) =
            (self.sites.weights.iter().collect(), self.sites.activations.iter().collect());
        let layers = Layers { weights: &weights, activations: &activations, ranges };
        hessian::score(&self.clean, layers, &self.data, request, |_| ())
    }

    /// Each weight with its scores.
    fn weights<'a>(&self, scores: &'a Scores) -> BTreeMap<String, &'a Tensor> {
        let names = self.sites.weights.iter().map(|site| site.name.clone());
        names.zip(&scores.weights).filter_map(|(name, scored)| Some((name, scored.scores.as_ref().ok()?))).collect()
    }

    /// Each activation with its scores.
    fn activations<'a>(&self, scores: &'a Scores) -> BTreeMap<String, &'a WeightedHistogram> {
        let names = self.sites.activations.iter().map(|site| site.name.clone());
        names
            .zip(&scores.activations)
            .filter_map(|(name, scored)| Some((name, &scored.scores.as_ref().ok()?.by_value)))
            .collect()
    }
}

fn relative_distance(found: &Tensor, exact: &Tensor) -> f64 {
    let norm = |tensor: &Tensor| tensor.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(found - exact)) / norm(exact)
}

/// For a linear layer, Rademacher directions and one row in a batch, the squared gradient of the element (i, j) is x_j².
#[test]
fn a_linear_layer_has_its_closed_form() {
    let linear = Subject::new(model("linear"));
    for probes in [1, 3] {
        let scores = linear.score(&request(probes, 1));
        let found = linear.weights(&scores)["fc.weight"];
        let inputs = &Tensor::read_safetensors(model("linear").data_path()).unwrap();
        let x = inputs.iter().find(|(name, _)| name == "x").map(|(_, x)| x).unwrap();
        let closed = x.square().mean_dim([0i64].as_slice(), false, Kind::Float).expand_as(found);
        assert!(relative_distance(found, &closed) < 1e-6);
        assert!(relative_distance(found, &linear.exact["fc.weight"]) < 1e-6);
    }
}

/// Of each weight the relative distance from its exact scores, and its own estimate of that.
fn distances(subject: &Subject, request: &HessianRequest) -> Vec<(String, f64, f64)> {
    let scores = subject.score(request);
    let names = subject.sites.weights.iter().map(|site| site.name.clone());
    let distances = names.zip(&scores.weights).map(|(name, scored)| {
        let distance = relative_distance(scored.scores.as_ref().unwrap(), &subject.exact[&name]);
        (name, distance, scored.standard_error.expect("several probes"))
    });
    distances.collect()
}

/// The standard error falls with the root of the number of probes, to the root of 1/8 for 8 times as many, and the distance from the exact
/// scores stays within it. At 128 probes it is below 7% with one row in a batch; rows that share a batch add to it.
#[test]
fn weights_converge_to_the_exact_diagonal() {
    let cases =
        [(Distribution::Rademacher, 1, 0.07), (Distribution::Normal, 1, 0.07), (Distribution::Rademacher, 8, 0.15)];
    for name in ["mlp", "small_conv"] {
        let subject = Subject::new(model(name));
        for (distribution, batch_size, budget) in cases {
            let at = |probes| distances(&subject, &HessianRequest { distribution, ..request(probes, batch_size) });
            for ((site, few, few_error), (_, many, many_error)) in at(16).into_iter().zip(at(128)) {
                let case = format!("{name} {distribution:?} batch {batch_size} {site}");
                println!("{case}: {few:.4} ± {few_error:.4} at 16 probes, {many:.4} ± {many_error:.4} at 128");
                assert!(few <= DEVIATIONS * few_error + EXACT && many <= DEVIATIONS * many_error + EXACT, "{case}");
                // Rademacher directions make the scores of a last linear layer exact, but for rows that share a batch.
                let is_exact = few_error < EXACT;
                assert!(is_exact || (2.0..4.0).contains(&(few_error / many_error)), "{case}: {few_error} {many_error}");
                assert!(many_error < budget, "{case}: {many_error}");
            }
        }
    }
}

/// Scores by value: as if the exact ones had been summed up by the values that they belong to.
#[test]
fn activations_converge_to_the_exact_diagonal() {
    for (name, layer) in [("mlp", "fc1"), ("small_conv", "conv1"), ("small_conv", "conv2")] {
        let subject = Subject::new(model(name));
        let site = format!("{layer}.output");
        let values = values_of(&subject, &site);
        let numbers = |tensor: &Tensor| Vec::<f32>::try_from(tensor.contiguous().reshape([-1])).unwrap();
        let mut exact = WeightedHistogram::new();
        exact.observe(&numbers(&values), &numbers(&subject.exact[&site].sqrt()), &mut [], in_turn);
        exact.scale(1.0 / ROWS as f64);
        let distance = |probes| {
            let scores = subject.score(&request(probes, 1));
            let found: BTreeMap<u32, f64> = subject.activations(&scores)[&site].sparse().into_iter().collect();
            let exact: BTreeMap<u32, f64> = exact.sparse().into_iter().collect();
            let norm = |sums: &BTreeMap<u32, f64>| sums.values().map(|sum| sum * sum).sum::<f64>().sqrt();
            let mut difference = exact.clone();
            found.iter().for_each(|(bin, sum)| *difference.entry(*bin).or_default() -= sum);
            norm(&difference) / norm(&exact)
        };
        let (few, many) = (distance(16), distance(128));
        println!("{name} {site}: {few:.4} {many:.4}");
        // The distances are random too, unlike their standard errors.
        assert!(many < 0.15 && (1.3..8.0).contains(&(few / many)), "{name} {site}: {few} {many}");
    }
}

/// The values of a site on all rows, one row at a time as in the runs that they are compared with.
fn values_of(subject: &Subject, site: &str) -> Tensor {
    use tsquant::jit::{BoxError, Tap, TapKind, Visit};

    struct Keep(Vec<Tensor>);

    impl Visit for Keep {
        fn observe(&mut self, _: usize, value: &Tensor) -> Result<(), BoxError> {
            self.0.push(value.copy());
            Ok(())
        }
    }

    let site = subject.sites.activations.iter().find(|other| other.name == site).expect("a site");
    let tap = Tap { value: site.anchors[0].value, number: 0, kind: TapKind::Observe };
    let instrumented = subject.clean.instrument(&[tap], &[]).unwrap();
    let mut keep = Keep(Vec::new());
    for batch in subject.data.sample(count(ROWS), 0, count(1)) {
        let arguments = tsquant::feed::bind(subject.clean.module(), batch.unwrap()).unwrap();
        instrumented.run(&arguments, &mut keep).unwrap();
    }
    Tensor::cat(&keep.0, 0)
}

/// Each row has its own directions and its own gradient of an activation, whatever batch it is in.
#[test]
fn activations_do_not_depend_on_the_batch_size() {
    for name in ["mlp", "small_conv", "frozen_cnn", "fused_encoder"] {
        let subject = Subject::new(model(name));
        // Total, and Σ h · x: a value beside the edge of a bin may be rounded into the next.
        let sums = |batch_size| -> Vec<[f64; 2]> {
            let scores = subject.score(&request(3, batch_size));
            let histograms = subject.activations(&scores);
            assert!(!histograms.is_empty());
            let magnitude = |bin: u32| f64::from(f32::from_bits(bin << 13 & (u32::MAX >> 1)));
            let moment = |histogram: &WeightedHistogram| {
                histogram.sparse().iter().map(|(bin, sum)| sum * magnitude(*bin)).sum::<f64>()
            };
            histograms.values().map(|histogram| [histogram.total(), moment(histogram)]).collect()
        };
        let reference = sums(1);
        for batch_size in [5, 16] {
            for (found, expected) in sums(batch_size).iter().zip(&reference) {
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() <= 1e-3 * expected, "{name} at {batch_size}: {found} {expected}");
                }
            }
        }
    }
}

/// Rows of a batch share a gradient of a weight: its mixed terms vanish in expectation, so that scores agree within their error.
#[test]
fn weights_agree_between_batch_sizes() {
    for name in ["mlp", "small_conv", "recurrent"] {
        let subject = Subject::new(model(name));
        let (alone, together) = (subject.score(&request(24, 1)), subject.score(&request(24, 16)));
        for (index, (site, expected)) in subject.weights(&alone).into_iter().enumerate() {
            let distance = relative_distance(subject.weights(&together)[&site], expected);
            let errors = [&alone, &together].map(|scores| scores.weights[index].standard_error.unwrap());
            let allowed = DEVIATIONS * errors[0].hypot(errors[1]) + 1e-6;
            assert!(distance < allowed, "{name} {site}: {distance}, allowed {allowed}");
        }
    }
}

#[test]
fn a_tolerance_adds_probes() {
    let subject = Subject::new(model("mlp"));
    let scores = subject.score(&HessianRequest { tolerance: Some(0.1), ..request(2, 8) });
    let all = scores.weights.iter().map(|scored| scored.standard_error);
    let all = all.chain(scores.activations.iter().map(|scored| scored.standard_error));
    let largest = all.map(|error| error.expect("several probes")).fold(0.0, f64::max);
    assert!(scores.probes > 2 && largest <= 0.1, "{} probes, {largest}", scores.probes);
    for (site, found) in subject.weights(&scores) {
        assert!(relative_distance(found, &subject.exact[&site]) < 0.1 * DEVIATIONS);
    }
    // The scores of lots are those of as many probes at once.
    let at_once = subject.score(&request(scores.probes, 8));
    for (site, found) in subject.weights(&scores) {
        assert!(relative_distance(found, subject.weights(&at_once)[&site]) < 1e-5, "{site}");
    }
    // One probe says nothing of its error.
    let single = subject.score(&request(1, 8));
    assert!(single.weights.iter().all(|scored| scored.standard_error.is_none()));
}

#[test]
fn same_seed_same_scores() {
    let subject = Subject::new(model("small_conv"));
    let numbers = |seed| {
        let scores = subject.score(&HessianRequest { seed, samples: count(9), ..request(2, 4) });
        let weights = subject.weights(&scores).into_values();
        let weights: Vec<Vec<f32>> = weights.map(|tensor| Vec::try_from(tensor.reshape([-1])).unwrap()).collect();
        let activations = subject.activations(&scores).into_values();
        (weights, activations.map(WeightedHistogram::sparse).collect::<Vec<_>>())
    };
    assert_eq!(numbers(1), numbers(1));
    assert_ne!(numbers(1), numbers(2));
}

#[test]
fn samples_beyond_the_rows_are_all_rows() {
    let subject = Subject::new(model("mlp"));
    let scores = subject.score(&HessianRequest { samples: count(1000), ..request(1, 4) });
    assert_eq!((scores.samples, scores.probes), (ROWS, 1));
    assert_eq!(subject.score(&HessianRequest { samples: count(3), ..request(1, 4) }).samples, 3);
}

#[test]
fn outputs_without_gradients_are_named() {
    assert_eq!(Subject::new(model("mlp")).score(&request(1, 8)).left_out, ["best"]);
    assert!(Subject::new(model("multi_io")).score(&request(1, 8)).left_out.is_empty());
}

#[test]
fn an_op_that_cuts_every_path_is_named() {
    let module = Module::load(&models_folder().join("test/indices.pt")).unwrap();
    let mlp = model("mlp");
    let clean = module.clean(Some(&mlp.arguments(&module, 4))).unwrap();
    let sites = sites::find(clean.listing());
    let data = Dataset::open(&mlp.data_plan(ROWS, 5)).unwrap();
    let weights: Vec<_> = sites.weights.iter().collect();
    let layers = Layers { weights: &weights, ..Layers::default() };
    let scores = hessian::score(&clean, layers, &data, &request(1, 8), |_| ()).expect("scores of no use");
    let reason = scores.weights[0].scores.as_ref().unwrap_err().to_string();
    let expected = "no gradient reached it on 16 samples: it did not run, or aten::argmax lets no gradient through";
    assert_eq!(reason, expected);
    assert_eq!(scores.left_out, [""]);
}

/// A layer that never runs has no scores, and says so; the others have.
#[test]
fn layers_that_never_run_have_no_scores() {
    let subject = Subject::new(model("control_flow"));
    let scores = subject.score(&request(1, 8));
    let reasons = subject.sites.weights.iter().zip(&scores.weights);
    let reasons: Vec<(&str, &Unusable)> =
        reasons.filter_map(|(site, scored)| Some((site.name.as_str(), scored.scores.as_ref().err()?))).collect();
    assert!(matches!(reasons.as_slice(), [("dark.weight", Unusable::NoGradient { samples: ROWS, .. })]), "{reasons:?}");
}

/// Convolutions of all dimensions, recurrent layers, attention, branches, loops, state, nested outputs: all have scores.
#[test]
fn every_model_has_scores() {
    for model in common::all_models() {
        let subject = Subject::new(model);
        let scores = subject.score(&request(2, 8));
        // Branches that are not taken, and a value that goes nowhere but to the state for the next call.
        let may_miss = matches!(model.name, "control_flow" | "scripted_encoder" | "stateful");
        let check = |site: &str, unusable: Option<&Unusable>| {
            let is_missing = matches!(unusable, Some(Unusable::NoGradient { .. }));
            assert!(unusable.is_none() || (is_missing && may_miss), "{}: {site}: {unusable:?}", model.name);
        };
        for (site, scored) in subject.sites.weights.iter().zip(&scores.weights) {
            check(&site.name, scored.scores.as_ref().err());
            if let Ok(scores) = &scored.scores {
                assert_eq!(scores.size(), site.shape, "{}: {}", model.name, site.name);
                assert!(scores.min().double_value(&[]) >= 0.0);
            }
        }
        for (site, scored) in subject.sites.activations.iter().zip(&scores.activations) {
            check(&site.name, scored.scores.as_ref().err());
        }
        let usable = scores.weights.iter().filter(|scored| scored.scores.is_ok()).count();
        assert!(usable > 0 && scores.activations.iter().any(|scored| scored.scores.is_ok()), "{}", model.name);
    }
}

/// Each row has sums of its own, of one probe, whatever batch it is in and however many probes follow.
#[test]
fn gradients_by_row_do_not_depend_on_the_batch_size() {
    for name in ["linear", "mlp", "small_conv"] {
        let subject = Subject::new(model(name));
        let ranges = vec![Some(-100.0..=100.0f32); subject.sites.activations.len()];
        // Of each site by row the gradients of positive values less those of negative ones: another batch size may round a
        // value into the next bin.
        let sums = |probes, batch_size| -> Vec<Vec<f32>> {
            let scores = subject.try_score_in(&request(probes, batch_size), &ranges).unwrap();
            let of_site = |scored: &Scored<ActivationScores>| {
                let sums = &scored.scores.as_ref().unwrap().sums;
                let values = sums.values();
                let of_row = |row: Box<[f32; GradientSums::BINS]>| {
                    row.iter().zip(&values).filter(|(sum, _)| **sum != 0.0).map(|(sum, x)| sum * x.signum()).sum()
                };
                sums.rows().map(of_row).collect()
            };
            scores.activations.iter().map(of_site).collect()
        };
        let alone = sums(1, 1);
        assert!(alone.iter().flatten().any(|sum| *sum != 0.0), "{name}");
        for (probes, batch_size) in [(1, 5), (3, 16)] {
            for (site, (found, expected)) in sums(probes, batch_size).iter().zip(&alone).enumerate() {
                assert_eq!((found.len(), expected.len()), (16, 16), "{name} {site}");
                let size = expected.iter().map(|sum| sum.abs()).fold(0.0, f32::max);
                let is_close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-4 * size);
                assert!(is_close, "{name} {site}: {found:?} {expected:?}");
            }
        }
    }
}

/// Where no two elements of a row share a bin, the squares of the sums are the scores.
#[test]
fn squares_of_sums_are_scores() {
    let subject = Subject::new(model("linear"));
    let ranges = vec![Some(-4.0..=4.0f32); subject.sites.activations.len()];
    let scores = subject.try_score_in(&request(1, 4), &ranges).unwrap();
    let ActivationScores { by_value, sums } = scores.activations[0].scores.as_ref().unwrap();
    let squares: f64 = sums.rows().flat_map(|row| *row).map(|sum| f64::from(sum).powi(2)).sum();
    let total = by_value.total() * sums.rows().len() as f64;
    assert!((squares - total).abs() < 1e-5 * total, "{squares} {total}");
}

/// The weighted histogram holds the values that calibration counted, up to the rounding of another batch size.
#[test]
fn weighted_values_are_counted_values() {
    let subject = Subject::new(model("small_conv"));
    let scores = subject.score(&request(2, 1));
    for (site, weighted) in subject.activations(&scores) {
        let mut counted = Histogram::new();
        let values = Vec::<f32>::try_from(values_of(&subject, &site).contiguous().reshape([-1])).unwrap();
        counted.observe(&values, &mut Counter::new());
        let [negative, positive] = counted.weighted_bins(weighted);
        let on_bins: f64 = negative.iter().chain(&positive).map(|bin| bin.mass).sum();
        let total = weighted.total() - weighted.zeros();
        assert!((on_bins - total).abs() <= 1e-9 * total, "{site}: {on_bins} of {total}");
        assert!(negative.len() + positive.len() <= counted.negative_bins().len() + counted.positive_bins().len());
    }
}
