//! Hessian scores of ops whose own way back is no derivative or sums up in any order: embeddings with flags for training, and
//! reads of few places by many indices. Models are traced here.

use std::num::NonZeroUsize;
use std::path::Path;

use tch::{CModule, Kind, Tensor};
use tsquant::config::{DataPlan, Distribution, HessianRequest, InputSource, InputsPlan, Transform};
use tsquant::dataset::Dataset;
use tsquant::feed;
use tsquant::hessian::{self, Layers};
use tsquant::jit::{Clean, Module};
use tsquant::sites;

fn count(number: usize) -> NonZeroUsize {
    NonZeroUsize::new(number).expect("a count")
}

/// What `forward` does, as a model, and its ids as data.
fn traced(folder: &Path, ids: &Tensor, mut forward: impl FnMut(&Tensor) -> Tensor) -> (Clean, Dataset) {
    let (model, data) = (folder.join("model.pt"), folder.join("data.safetensors"));
    let mut forward = |inputs: &[Tensor]| vec![forward(&inputs[0])];
    let module = CModule::create_by_tracing("Traced", "forward", std::slice::from_ref(ids), &mut forward).unwrap();
    module.save(&model).unwrap();
    Tensor::write_safetensors(&[("ids", ids)], &data).unwrap();
    let plan = DataPlan {
        path: data,
        inputs: InputsPlan::Positional(vec![InputSource::Tensor("ids".to_owned())]),
        samples: None,
        shuffle: false,
        seed: 0,
        batch_size: count(ids.size()[0] as usize),
        transform: Transform::default(),
    };
    let (module, data) = (Module::load(&model).unwrap(), Dataset::open(&plan).unwrap());
    let arguments = feed::bind(&module, data.first(plan.batch_size.get()).unwrap()).unwrap();
    (module.clean(Some(&arguments)).unwrap(), data)
}

/// The scores of the only weight.
fn scores((clean, data): &(Clean, Dataset), probes: usize, batch_size: usize) -> Tensor {
    let sites = sites::find(clean.listing());
    let weights: Vec<_> = sites.weights.iter().collect();
    assert_eq!(weights.len(), 1);
    let request = HessianRequest {
        samples: count(data.rows()),
        probes: count(probes),
        batch_size: count(batch_size),
        distribution: Distribution::Rademacher,
        tolerance: None,
        seed: 0,
    };
    let layers = Layers { weights: &weights, ..Layers::default() };
    let mut scores = hessian::score(clean, layers, data, &request, |_| ()).expect("scores");
    scores.weights.remove(0).scores.expect("scores of use")
}

/// In training a padding row gets no gradient and frequent rows a smaller one; the outputs depend on them all the same.
#[test]
fn embeddings_for_training_have_their_derivative() {
    let folder = tempfile::tempdir().unwrap();
    let weight = Tensor::randn([6, 3], (Kind::Float, tch::Device::Cpu));
    let ids = Tensor::from_slice(&[0i64, 1, 2, 2, 1, 4, 4, 4]).reshape([2, 4]);
    for (padding, by_frequency) in [(-1, false), (2, false), (-1, true), (2, true)] {
        let model =
            traced(folder.path(), &ids, |ids| Tensor::embedding(&weight, ids, padding, by_frequency, false) * 2.0);
        let found = scores(&model, 2000, 1).mean_dim([1i64].as_slice(), false, Kind::Float);
        // (2 Σ v)² over as many places as read a row has the mean 4 times their number; rows 3 and 5 are never read.
        let expected = Tensor::from_slice(&[1.0f32, 2.0, 2.0, 0.0, 3.0, 0.0]) * 4.0 / 2.0;
        let distance = (&found - &expected).abs().max().double_value(&[]);
        assert!(distance < 0.3, "padding {padding}, by frequency {by_frequency}: {found:?}");
    }
}

/// Many indices read few places, so that threads add to the same sums.
#[test]
fn sums_of_many_reads_are_the_same_in_every_run() {
    let folder = tempfile::tempdir().unwrap();
    let weight = Tensor::randn([7, 2], (Kind::Float, tch::Device::Cpu));
    let ids = Tensor::randint(7, [2, 100_000], (Kind::Int64, tch::Device::Cpu));
    let model = traced(folder.path(), &ids, |ids| {
        let rows = Tensor::embedding(&weight, ids, -1, false, false);
        let order = ids.remainder(5);
        rows.index(&[None::<Tensor>, Some(order.select(0, 0))])
    });
    let run = || Vec::<f32>::try_from(scores(&model, 3, 2).reshape([-1])).expect("numbers");
    let first = run();
    for _ in 0..5 {
        assert_eq!(run(), first);
    }
}
