//! What runs on a GPU, run on the processor: the same tensor ops, against the code that tests of other files know to be right.
//! No test here runs on a GPU.

mod common;

use std::num::NonZeroUsize;

use common::{Model, all_models};
use tsquant::config::{Distribution, HessianRequest};
use tsquant::correct::InputSums;
use tsquant::dataset::{Dataset, Shard};
use tsquant::hessian::{self, Layers, Scored};
use tsquant::jit::Clean;
use tsquant::observe::{Summing, observe_by};
use tsquant::sites::{self, Sites};
use tsquant::statistics::{Activation, ActivationScores};

const ROWS: usize = 12;

struct Subject {
    clean: Clean,
    sites: Sites,
    data: Dataset,
}

impl Subject {
    fn new(model: Model) -> Self {
        let clean = model.clean();
        let sites = sites::find(clean.listing());
        let data = Dataset::open(&model.data_plan(ROWS, 5)).expect("data");
        Self { clean, sites, data }
    }

    fn observe(&self, summing: Summing) -> Result<Vec<Vec<Activation>>, String> {
        let mut rows = 0;
        let observed = observe_by(
            summing,
            &self.clean,
            &self.sites.activations,
            &mut InputSums::default(),
            self.data.batches(),
            |count| {
                rows += count;
            },
        );
        let observed = observed.map_err(|error| error.to_string());
        assert!(observed.is_err() || rows == ROWS, "{rows}");
        observed
    }

    fn score(&self, summing: Summing, probes: usize) -> Vec<Scored<ActivationScores>> {
        let count = |number| NonZeroUsize::new(number).expect("a count");
        let request = HessianRequest {
            samples: count(8),
            probes: count(probes),
            batch_size: count(4),
            distribution: Distribution::Rademacher,
            tolerance: None,
            seed: 7,
        };
        let activations: Vec<_> = self.sites.activations.iter().collect();
        let ranges = vec![Some(-2.0..=2.5f32); activations.len()];
        let layers = Layers { weights: &[], activations: &activations, ranges: &ranges };
        let scores = hessian::score_by(summing, &self.clean, layers, (&self.data, Shard::WHOLE), &request, |_| ());
        scores.expect("scores").activations
    }
}

#[test]
fn statistics_of_every_model_are_the_same_to_the_bit() {
    for model in all_models() {
        let subject = Subject::new(model);
        let [slices, tensors] = [Summing::Slices, Summing::TensorOps].map(|summing| subject.observe(summing));
        assert_eq!(tensors, slices, "{}", model.name);
    }
}

#[test]
fn scores_of_activations_are_the_same_but_for_rounding() {
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
    for model in all_models() {
        let subject = Subject::new(model);
        for probes in [1, 3] {
            let [slices, tensors] = [Summing::Slices, Summing::TensorOps].map(|summing| subject.score(summing, probes));
            assert_eq!(tensors.len(), slices.len());
            for (tensors, slices) in tensors.iter().zip(&slices) {
                let name = model.name;
                match (tensors.standard_error, slices.standard_error) {
                    // The root of a difference between sums that may be all but equal: half of an f64's digits remain.
                    (Some(a), Some(b)) => assert!((a - b).abs() <= 1e-6 * b + 1e-7, "{name}: {a} {b}"),
                    (a, b) => assert_eq!(a, b, "{name}"),
                }
                let (tensors, slices) = match (&tensors.scores, &slices.scores) {
                    (Ok(tensors), Ok(slices)) => (tensors, slices),
                    (a, b) => {
                        assert_eq!(a.as_ref().err(), b.as_ref().err(), "{name}");
                        continue;
                    }
                };
                assert_eq!(tensors.sums.rows().len(), 8, "{name}");
                for (found, expected) in tensors.sums.rows().zip(slices.sums.rows()) {
                    let size = expected.iter().map(|sum| sum.abs()).fold(0.0, f32::max);
                    let are_near = found.iter().zip(expected.iter()).all(|(a, b)| (a - b).abs() <= 1e-4 * size);
                    assert!(are_near, "{name}");
                }
                let (tensors, slices) = (&tensors.by_value, &slices.by_value);
                let (found, expected) = (tensors.sparse(), slices.sparse());
                assert_eq!(found.len(), expected.len(), "{name}");
                assert!(found.iter().zip(&expected).all(|(a, b)| a.0 == b.0 && near(a.1, b.1)), "{name}");
                assert!(near(tensors.zeros(), slices.zeros()), "{name}");
            }
        }
    }
}
