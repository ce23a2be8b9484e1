//! Hessian scores of ops whose own way back is no derivative or sums up in any order: embeddings with flags for training, and
//! reads of few places by many indices. And images whose channels lie last in memory. Models are traced here.

use std::num::NonZeroUsize;
use std::path::Path;

use tch::{CModule, Kind, Tensor};
use tsquant::config::{DataPlan, Distribution, HessianRequest, InputSource, InputsPlan, Transform};
use tsquant::dataset::Dataset;
use tsquant::feed;
use tsquant::hessian::{self, Layers};
use tsquant::jit::{BoxError, Clean, Module, NoVisit, Tap, TapKind, Visit};
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

/// The scores of the first weight.
fn scores((clean, data): &(Clean, Dataset), probes: usize, batch_size: usize) -> Tensor {
    let sites = sites::find(clean.listing());
    let weights: Vec<_> = sites.weights.iter().take(1).collect();
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

/// Strides of the one value that is tapped.
struct Strides(Vec<i64>);

impl Visit for Strides {
    fn gradient(&mut self, _: usize, value: &Tensor, _: &Tensor) -> Result<(), BoxError> {
        self.0 = value.stride();
        Ok(())
    }
}

/// How what the convolution gives lies in memory on the way back.
fn strides_behind((clean, data): &(Clean, Dataset)) -> Vec<i64> {
    let convolution = clean.listing().nodes.iter().find(|node| node.op == "aten::conv2d").expect("a convolution");
    let tap = Tap { value: convolution.outputs[0], number: 0, kind: TapKind::Gradient };
    let graph = clean.differentiable(&[tap], &[]).unwrap();
    let arguments = || feed::bind(clean.module(), data.first(3).unwrap()).unwrap();
    let mut strides = Strides(Vec::new());
    for _ in 0..2 {
        let recording = graph.record(&arguments(), &mut NoVisit).unwrap();
        let outputs = recording.output().tensors();
        let direction = outputs[0].1.ones_like();
        recording.backward(&[(outputs[0].1, direction)], false, &mut strides).unwrap();
    }
    strides.0
}

/// A view of an image takes its channels first, known beforehand or not, and what asks for strides may give something else: the
/// scores are the same.
#[test]
fn channels_lie_last_where_the_model_takes_them() {
    let folder = tempfile::tempdir().unwrap();
    tch::manual_seed(3);
    let options = (Kind::Float, tch::Device::Cpu);
    let (images, weight) = (Tensor::randn([3, 4, 6, 6], options), Tensor::randn([5, 4, 3, 3], options));
    // Small, so that no softmax comes to its end, whatever is drawn.
    let sums = Tensor::randn([180, 7], options) * 0.01;
    let model = |flat: &dyn Fn(&Tensor) -> Tensor| {
        traced(folder.path(), &images, |images| {
            let seen = images.conv2d(&weight, None::<Tensor>, [1i64, 1], [1i64, 1], [1i64, 1], 1).relu();
            flat(&seen).softmax(1, Kind::Float) * 3.0
        })
    };
    let reshaped = model(&|seen| seen.reshape([3, 180]).matmul(&sums));
    let viewed = model(&|seen| seen.view([3, 180]).matmul(&sums));
    std::fs::copy(folder.path().join("model.pt"), folder.path().join("viewed.pt")).unwrap();
    let asked = model(&|seen| (seen + 0.0).as_strided([3, 180], [180, 1], 0).matmul(&sums));
    assert_eq!(strides_behind(&reshaped), [180, 1, 30, 5]);
    assert_eq!(strides_behind(&viewed), [180, 36, 6, 1]);
    assert_eq!(strides_behind(&asked), [180, 36, 6, 1]);
    // Nothing is known of shapes: it fails, and runs again.
    let unseen = Module::load(&folder.path().join("viewed.pt")).unwrap().clean(None).unwrap();
    assert!(unseen.listing().takes_channels_last() && !viewed.0.listing().takes_channels_last());
    let unseen = (unseen, viewed.1);
    assert_eq!(strides_behind(&unseen), [180, 36, 6, 1]);
    let asked = scores(&asked, 2, 3);
    assert!(asked.max().double_value(&[]) > 0.0);
    for model in [&reshaped, &unseen] {
        let distance = (scores(model, 2, 3) - &asked).abs().max() / asked.max();
        assert!(distance.double_value(&[]) < 1e-5, "{distance}");
    }
}
