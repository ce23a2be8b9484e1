//! The shipped models and their data, as the library's own types.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use tch::Tensor;
use tsquant::config::{
    ActivationPlan, BiasCorrection, DataPlan, DevicePlan, Format, InputSource, InputsPlan, OutputPlan, Overrides, Plan,
    Rounding, Transform, WeightPlan,
};
use tsquant::dataset::Dataset;
use tsquant::feed;
use tsquant::jit::{Arguments, Clean, Module, Output};
use tsquant::pipeline::{Progress, Work};
use tsquant::quantizer::{Bits, Granularity, Grid, Scheme};
use tsquant::threshold::ErrorMethod;

/// A shipped model and the tensors of its data file that it takes, under the names of its arguments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) inputs: &'static [&'static str],
}

const fn takes_x(name: &'static str) -> Model {
    Model { name, inputs: &["x"] }
}

/// Nobody is told how far a run is.
pub(crate) struct Silent;

impl Progress for Silent {
    fn stage(&mut self, _: &'static str, _: Work) {}

    fn advance(&mut self, _: usize) {}
}

/// Every model of `models/test`.
pub(crate) const TEST_MODELS: &[Model] = &[
    takes_x("bfloat16"),
    takes_x("control_flow"),
    Model { name: "conv_dimensions", inputs: &["signal", "volume"] },
    takes_x("conv_zoo"),
    takes_x("extras"),
    takes_x("frozen_cnn"),
    takes_x("fused_encoder"),
    takes_x("half_precision"),
    takes_x("in_place"),
    takes_x("linear"),
    takes_x("mlp"),
    Model { name: "multi_io", inputs: &["x", "y"] },
    Model { name: "outputs", inputs: &["x"] },
    Model { name: "packed", inputs: &["x", "lengths"] },
    takes_x("recurrent"),
    takes_x("scripted_encoder"),
    Model { name: "sdpa", inputs: &["x", "mask"] },
    takes_x("small_conv"),
    takes_x("stateful"),
    takes_x("tables"),
    Model { name: "tiny_encoder", inputs: &["ids", "mask"] },
    takes_x("training_mode"),
    takes_x("traps"),
];

/// The trained network.
pub(crate) const MNIST: Model = Model { name: "mnist_resnet", inputs: &["images"] };

/// All shipped models.
pub(crate) fn all_models() -> impl Iterator<Item = Model> {
    TEST_MODELS.iter().copied().chain([MNIST])
}

/// The model of that name.
#[track_caller]
pub(crate) fn model(name: &str) -> Model {
    all_models().find(|model| model.name == name).expect("a shipped model")
}

pub(crate) fn models_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models")
}

impl Model {
    pub(crate) fn path(&self) -> PathBuf {
        let folder = models_folder();
        if self.name == MNIST.name {
            folder.join("mnist_resnet.pt")
        } else {
            folder.join(format!("test/{}.pt", self.name))
        }
    }

    pub(crate) fn data_path(&self) -> PathBuf {
        let folder = models_folder();
        if self.name == MNIST.name {
            folder.join("mnist_calibration.safetensors")
        } else {
            folder.join(format!("test/{}.safetensors", self.name))
        }
    }

    /// All inputs by name; the first `samples` rows in batches of `batch_size`.
    pub(crate) fn data_plan(&self, samples: usize, batch_size: usize) -> DataPlan {
        let inputs = self.inputs.iter().map(|&name| (name.to_owned(), InputSource::Tensor(name.to_owned())));
        DataPlan {
            path: self.data_path(),
            inputs: InputsPlan::Named(inputs.collect()),
            samples: Some(count(samples)),
            shuffle: false,
            seed: 0,
            batch_size: count(batch_size),
            transform: self.transform(),
        }
    }

    /// W8A8 of the first `samples` rows in batches of 8, written to `dir`: symmetric weights by MSE, uniform activations by their
    /// range.
    pub(crate) fn plan(&self, samples: usize, dir: &Path) -> Plan {
        let scheme = |grid| Scheme { bits: Bits::try_from(8).expect("a width"), grid };
        Plan {
            model: self.path(),
            calibration: self.data_plan(samples, 8),
            weights: WeightPlan {
                scheme: scheme(Grid::Symmetric),
                granularity: Granularity::PerChannel,
                error_method: ErrorMethod::Mse,
                bias_correction: BiasCorrection::ClosedForm,
                rounding: Rounding::Nearest,
                rounding_fallback: false,
            },
            activations: ActivationPlan {
                scheme: scheme(Grid::Uniform),
                error_method: ErrorMethod::NoClipping,
                z_threshold: None,
            },
            overrides: Overrides::default(),
            mixed_precision: None,
            hessian: None,
            device: DevicePlan::Cpu,
            allow_tf32: false,
            output: OutputPlan { dir: dir.to_owned(), format: Format::FakeQuant, further: Vec::new(), int8: None },
            evaluation: None,
            seed: 5,
        }
    }

    fn transform(&self) -> Transform {
        if self.name != MNIST.name {
            return Transform::default();
        }
        Transform {
            scale: Some(1.0 / 255.0),
            mean: Some(vec![0.1307]),
            std: Some(vec![0.3081]),
            ..Transform::default()
        }
    }

    pub(crate) fn load(&self) -> Module {
        Module::load(&self.path()).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// The first rows of its data as arguments of `module`.
    pub(crate) fn arguments(&self, module: &Module, rows: usize) -> Arguments {
        self.batches(module, rows, rows).remove(0)
    }

    /// The first `samples` rows of its data as arguments of `module`, in batches.
    pub(crate) fn batches(&self, module: &Module, samples: usize, batch_size: usize) -> Vec<Arguments> {
        let dataset = Dataset::open(&self.data_plan(samples, batch_size)).expect("readable data");
        let bind = |batch| feed::bind(module, batch).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        dataset.batches().map(|batch| bind(batch.expect("a readable batch"))).collect()
    }

    /// Cleaned on the first four rows, as a run does it.
    pub(crate) fn clean(&self) -> Clean {
        let module = self.load();
        let sample = self.arguments(&module, 4);
        module.clean(Some(&sample)).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }
}

pub(crate) fn count(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).expect("at least one")
}

/// Largest absolute difference over the largest magnitude of the expected tensor; infinite for other shapes and for NaN.
pub(crate) fn relative_difference(expected: &Tensor, found: &Tensor) -> f64 {
    if expected.size() != found.size() {
        return f64::INFINITY;
    }
    let (expected, found) = (expected.to_kind(tch::Kind::Double), found.to_kind(tch::Kind::Double));
    let difference = (&expected - found).abs().max().double_value(&[]);
    let magnitude = expected.abs().max().double_value(&[]);
    if difference.is_nan() { f64::INFINITY } else { difference / magnitude.max(f64::MIN_POSITIVE) }
}

/// Fails unless both outputs have the same parts and each tensor differs by at most `limit` of its largest magnitude.
#[track_caller]
pub(crate) fn assert_close(what: &str, expected: &Output, found: &Output, limit: f64) {
    assert_eq!(shape_of(expected), shape_of(found), "{what}: structure of the output");
    for ((path, expected), (_, found)) in expected.tensors().iter().zip(found.tensors()) {
        let difference = relative_difference(expected, found);
        assert!(difference <= limit, "{what}: output `{path}` differs by {difference:e}, at most {limit:e}");
    }
}

/// Fails unless both outputs are equal bit for bit.
#[track_caller]
pub(crate) fn assert_equal(what: &str, expected: &Output, found: &Output) {
    assert_close(what, expected, found, 0.0);
}

/// Nesting, keys, shapes.
fn shape_of(output: &Output) -> String {
    match output {
        Output::Tensor(tensor) => format!("{:?}", tensor.size()),
        Output::Parts(parts) => {
            let parts: Vec<_> = parts.iter().map(|(key, part)| format!("{key}: {}", shape_of(part))).collect();
            format!("({})", parts.join(", "))
        }
        Output::Plain => "plain".to_owned(),
    }
}
