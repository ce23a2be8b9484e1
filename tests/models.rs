//! Every shipped model through the library: it loads and computes what PyTorch computed, its cleaned graph computes the
//! same, its sites have the user's names, and what is emitted for it runs in libtorch's own executor.

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use tch::{Kind, Tensor};
use tsquant::config::{BiasCorrection, InputSource, InputsPlan};
use tsquant::dataset::Dataset;
use tsquant::feed;
use tsquant::jit::{Instrumented, Module, NoVisit, Output};
use tsquant::pipeline::{self, MODEL_FILE, Outcome};
use tsquant::quantizer::{Bits, Grid, Scheme};
use tsquant::sites::{self, Sites};
use tsquant::threshold::ErrorMethod;

use common::{MNIST, Model, Silent, assert_close, assert_equal, model, models_folder, relative_difference};

/// What models/README.md promises of a loaded file, relative to the largest output.
const LOADED: f64 = 1e-5;
/// What the clean-up may change, relative to the largest output: folding batch normalization rounds differently.
const CLEANED: f64 = 1e-5;
/// libtorch's executor against the op-by-op run of the same file.
const EXECUTORS: f64 = 1e-4;

/// One test per model for each of these functions, so that one model's failure hides no other's.
macro_rules! for_each_model {
    ($($check:ident)*) => {
        $(for_each_model!(@ $check
            bfloat16 control_flow conv_dimensions conv_zoo extras frozen_cnn fused_encoder half_precision in_place linear
            mlp multi_io outputs packed recurrent scripted_encoder sdpa small_conv stateful tables tiny_encoder training_mode traps mnist_resnet);)*
    };
    (@ $check:ident $($name:ident)*) => {
        mod $check {
            const NAMES: &[&str] = &[$(stringify!($name)),*];

            #[test]
            fn knows_every_model() {
                super::assert_all_named(NAMES);
            }

            $(#[test]
            fn $name() {
                super::$check(super::model(stringify!($name)));
            })*
        }
    };
}

for_each_model!(cleaning_keeps_the_function notes_tell_what_changed order_does_not_matter emitted_file_runs_anywhere);

fn assert_all_named(names: &[&str]) {
    let listed: BTreeSet<_> = common::all_models().map(|model| model.name.to_owned()).collect();
    assert_eq!(listed, names.iter().map(|&name| name.to_owned()).collect());
    let mut shipped = BTreeSet::from([MNIST.name.to_owned()]);
    for entry in std::fs::read_dir(models_folder().join("test")).expect("the test models") {
        let path = entry.expect("a readable entry").path();
        let is_model = path.extension().is_some_and(|extension| extension == "pt");
        // A state_dict is there to be refused and has no data.
        if is_model && path.with_extension("safetensors").exists() {
            shipped.insert(path.file_stem().and_then(|stem| stem.to_str()).expect("a UTF-8 name").to_owned());
        }
    }
    assert_eq!(listed, shipped);
}

/// The recorded outputs under `prefix`, by their path in the output.
fn recorded(model: Model, prefix: &str) -> Vec<(String, Tensor)> {
    let tensors = Tensor::read_safetensors(model.data_path()).expect("readable data");
    let path_of = |name: &str| {
        let rest = name.strip_prefix(prefix)?;
        if rest.is_empty() { Some(String::new()) } else { rest.strip_prefix('.').map(str::to_owned) }
    };
    let mut found: Vec<_> = tensors.into_iter().filter_map(|(name, tensor)| Some((path_of(&name)?, tensor))).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

#[track_caller]
fn assert_recorded(model: Model, prefix: &str, output: &Output, limit: f64) {
    let expected = recorded(model, prefix);
    assert!(!expected.is_empty(), "{}: no `{prefix}` in its data", model.name);
    let mut found = output.tensors();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let paths = |tensors: Vec<&str>| tensors.join(", ");
    let expected_paths = paths(expected.iter().map(|(path, _)| path.as_str()).collect());
    assert_eq!(expected_paths, paths(found.iter().map(|(path, _)| path.as_str()).collect()), "{}", model.name);
    for ((path, expected), (_, found)) in expected.iter().zip(&found) {
        let difference = relative_difference(expected, found);
        assert!(difference <= limit, "{}: {prefix} `{path}` differs by {difference:e}", model.name);
    }
}

#[test]
fn loaded_models_compute_what_pytorch_computed() {
    for model in common::TEST_MODELS {
        let module = model.load();
        let output = module.forward(&model.arguments(&module, 16)).expect("a run");
        assert_recorded(*model, "expected", &output, LOADED);
    }
}

#[test]
fn the_trained_network_keeps_its_accuracy() {
    let module = MNIST.load();
    let mut plan = MNIST.data_plan(1500, 250);
    plan.path = models_folder().join("mnist_evaluation.safetensors");
    plan.inputs = InputsPlan::Positional(vec![InputSource::Tensor("images".to_owned())]);
    let dataset = Dataset::open(&plan).expect("the evaluation data");
    let labels = dataset.labels("labels").expect("labels");
    let mut right = 0;
    for batch in dataset.batches() {
        let batch = batch.expect("a readable batch");
        let (first, rows) = (batch.first_row, batch.rows);
        let output = module.forward(&feed::bind(&module, batch).expect("arguments")).expect("a run");
        let classes = output.tensors()[0].1.argmax(1, false);
        let labels = labels.narrow(0, i64::try_from(first).unwrap(), i64::try_from(rows).unwrap());
        right += classes.eq_tensor(&labels).sum(Kind::Int64).int64_value(&[]);
    }
    // models/README.md: 1487 of 1500; another processor may round a close call the other way.
    assert!((1485..=1489).contains(&right), "{right} of 1500 right");
}

#[test]
fn optional_and_scalar_arguments() {
    let model = model("multi_io");
    let clean = model.clean();
    let module = clean.module();
    let without = Model { inputs: &["x"], ..model }.arguments(module, 16);
    let output = module.forward(&without).expect("a run without `y`");
    assert_recorded(model, "expected_without_y", &output, LOADED);
    // The graph was cleaned on a sample with `y`, and still takes calls without.
    let cleaned = clean.instrument(&[], &[]).expect("a copy").run(&without, &mut NoVisit).expect("a run without `y`");
    assert_recorded(model, "expected_without_y", &cleaned, CLEANED);
}

/// Loading and cleaning say what they changed, and nothing else.
fn notes_tell_what_changed(model: Model) {
    let expected: &[&str] = match model.name {
        "training_mode" => &["the model was saved in training mode; it was set to evaluation mode"],
        "half_precision" => &["the model holds Half tensors; they were cast to float32"],
        "bfloat16" => &["the model holds BFloat16 tensors; they were cast to float32"],
        "recurrent" => &["9 checks of its input that the model makes itself (raise) were taken as passed"],
        "scripted_encoder" => &["7 checks of its input that the model makes itself (raise) were taken as passed"],
        "packed" => &["2 checks of its input that the model makes itself (raise) were taken as passed"],
        "traps" => &["a check of its input that the model makes itself (raise) was taken as passed"],
        _ => &[],
    };
    let clean = model.clean();
    assert_eq!(clean.notes(), expected);
}

/// Cleaned on four rows; the original and the cleaned graph agree on batches of other sizes too.
fn cleaning_keeps_the_function(model: Model) {
    let clean = model.clean();
    assert!(clean.is_checked());
    let instrumented = clean.instrument(&[], &[]).expect("a copy");
    for rows in [1, 3, 16] {
        let arguments = model.arguments(clean.module(), rows);
        let expected = clean.module().forward(&arguments).expect("a run of the original");
        let found = instrumented.run(&arguments, &mut NoVisit).expect("a run of the cleaned graph");
        assert_close(&format!("{rows} rows"), &expected, &found, CLEANED);
    }
}

/// No run leaves anything behind that the next one sees, of the original and of the cleaned graph.
fn order_does_not_matter(model: Model) {
    let clean = model.clean();
    let instrumented = clean.instrument(&[], &[]).expect("a copy");
    let batches = model.batches(clean.module(), 16, 4);
    let original = |index: usize| clean.module().forward(&batches[index]).expect("a run");
    let cleaned = |index: usize| instrumented.run(&batches[index], &mut NoVisit).expect("a run");
    let forwards: Vec<_> = (0..4).map(|index| (original(index), cleaned(index))).collect();
    for index in (0..4).rev() {
        assert_equal("the original", &forwards[index].0, &original(index));
        assert_equal("the cleaned graph", &forwards[index].1, &cleaned(index));
    }
}

fn sites_of(name: &str) -> Sites {
    sites::find(model(name).clean().listing())
}

fn weight_names(sites: &Sites) -> Vec<&str> {
    sites.weights.iter().map(|site| site.name.as_str()).collect()
}

fn activation_names(sites: &Sites) -> Vec<&str> {
    sites.activations.iter().map(|site| site.name.as_str()).collect()
}

#[track_caller]
fn assert_left_float(sites: &Sites, name: &str) {
    let left = sites.left_float.iter().find(|left| left.name == name);
    let left = left.unwrap_or_else(|| panic!("`{name}` is not among what stays float: {:#?}", sites.left_float));
    assert!(!left.reason.is_empty(), "`{name}` stays float without a reason");
}

#[test]
fn sites_inside_branches_and_loops() {
    let sites = sites_of("control_flow");
    let weights = ["stem.weight", "bright.weight", "dark.weight", "mix.weight", "refine.weight", "head.weight"];
    assert_eq!(weight_names(&sites), weights);
    // Branch and loop pass on one value, which has one site with an anchor in each block that makes it.
    let passed_on = sites.activations.iter().find(|site| site.name == "bright.output").expect("the branch's value");
    assert_eq!(passed_on.anchors.len(), 4, "bright, dark, relu(mix), y + refine");
    assert_eq!(activation_names(&sites), ["input.x", "stem.output", "bright.output", "refine.output", "mean_1.output"]);
    assert_left_float(&sites, "head.output");
}

#[test]
fn a_square_weight_and_its_transpose_are_two_sites() {
    let sites = sites_of("traps");
    let matrices: Vec<_> = sites.weights.iter().filter(|site| site.shape == [8, 8]).collect();
    assert_eq!(matrices.len(), 2, "{:?}", weight_names(&sites));
    assert_ne!(matrices[0].values, matrices[1].values);
}

#[test]
fn weights_of_a_layer_on_packed_sequences_are_sites() {
    let sites = sites_of("packed");
    assert_eq!(weight_names(&sites), ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"]);
}

#[test]
fn a_layer_called_twice_has_one_weight_and_two_outputs() {
    let sites = sites_of("conv_zoo");
    let weights = weight_names(&sites);
    assert_eq!(weights.iter().filter(|name| name.starts_with("shared")).collect::<Vec<_>>(), [&"shared.weight"]);
    let activations = activation_names(&sites);
    let shared: Vec<_> = activations.iter().filter(|name| name.starts_with("shared")).collect();
    assert_eq!(shared, [&"shared.output", &"shared#2.output"]);
    // Output channels of a transposed convolution lie on axis 1.
    let axis = |name: &str| sites.weights.iter().find(|site| site.name == name).map(|site| site.channel_axis);
    assert_eq!((axis("transposed.weight"), axis("stem.weight"), axis("fc.weight")), (Some(1), Some(0), Some(0)));
}

#[test]
fn a_transformer_keeps_masks_softmax_and_norms_in_float() {
    let clean = model("tiny_encoder").clean();
    let sites = sites::find(clean.listing());
    let activations = activation_names(&sites);
    assert!(activations.iter().all(|name| !name.starts_with("input.")), "ids and mask are integers: {activations:?}");
    for layer in ["layer.0", "layer.1"] {
        // Between the product of query and key and the softmax: division, mask, nothing to quantize.
        for scores in ["matmul.output", "div", "add", "softmax", "norm1.layer_norm", "norm2.layer_norm"] {
            assert_left_float(&sites, &format!("{layer}.{scores}"));
        }
        for scores in ["matmul.output", "div.output", "add.output"] {
            assert!(!activations.contains(&format!("{layer}.{scores}").as_str()), "{layer}.{scores} is a site");
        }
        for site in ["query.output", "key.output", "value.output", "softmax.output", "matmul#2.output", "up.output"] {
            assert!(activations.contains(&format!("{layer}.{site}").as_str()), "no site {layer}.{site}");
        }
        // GELU gets the linear layer's float result; their one site is behind it.
        let up = sites.activations.iter().find(|site| site.name == format!("{layer}.up.output")).expect("a site");
        let nodes = &clean.listing().nodes;
        let maker = nodes.iter().find(|node| node.outputs.contains(&up.anchors[0].value)).expect("a maker");
        assert_eq!(maker.op, "aten::gelu");
    }
    // 1 − mask and its product with the lowest float.
    for mask in ["rsub_0", "mul_0"] {
        assert_left_float(&sites, mask);
        assert!(!activations.contains(&format!("{mask}.output").as_str()), "{mask} is a site");
    }
    assert!(sites.unknown_ops.is_empty(), "{:?}", sites.unknown_ops);
}

#[test]
fn recurrent_weights_have_pytorchs_names() {
    let sites = sites_of("recurrent");
    let mut expected = Vec::new();
    for layer in ["l0", "l1"] {
        for direction in ["", "_reverse"] {
            expected.extend(["ih", "hh"].map(|kind| format!("gru.weight_{kind}_{layer}{direction}")));
        }
    }
    expected.extend(["lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"].map(str::to_owned));
    assert_eq!(weight_names(&sites), expected);
    assert_eq!(activation_names(&sites), ["input.x", "gru.output.0", "lstm.output.0"]);
    assert_left_float(&sites, "gru");
    assert_left_float(&sites, "lstm");
}

#[test]
fn names_lost_by_freezing_become_numbers() {
    let sites = sites_of("frozen_cnn");
    assert_eq!(weight_names(&sites), ["conv2d_0.weight", "conv2d_1.weight", "linear_0.weight"]);
    let activations = ["input.x", "conv2d_0.output", "conv2d_1.output", "add_0.output", "mean_0.output"];
    assert_eq!(activation_names(&sites), activations);
}

#[test]
fn the_trained_network_is_named_like_its_modules() {
    let clean = MNIST.clean();
    let sites = sites::find(clean.listing());
    let tensors = clean.module().tensors().expect("its tensors");
    let matrices = tensors.iter().filter(|tensor| tensor.shape.len() >= 2).map(|tensor| tensor.name.as_str());
    assert_eq!(weight_names(&sites).into_iter().collect::<BTreeSet<_>>(), matrices.collect());
    assert_left_float(&sites, "fc.output");
    assert_eq!(sites.left_float.len(), 1, "{:?}", sites.left_float);
    assert_eq!((sites.weights.len(), sites.activations.len()), (16, 23));
}

/// W8A8 without clipping.
fn quantize(model: Model, grid: Grid, dir: &Path) -> Outcome {
    let scheme = Scheme { bits: Bits::try_from(8).expect("a width"), grid };
    let mut plan = model.plan(16, dir);
    (plan.weights.scheme, plan.weights.error_method) = (scheme, ErrorMethod::NoClipping);
    plan.weights.bias_correction = BiasCorrection::None;
    plan.activations.scheme = scheme;
    pipeline::quantize(&plan, None, &mut Silent).unwrap_or_else(|error| panic!("{} on {grid:?}: {error}", model.name))
}

/// On each grid: the file loads, keeps signature, structure and the names of weights, and libtorch's optimizing executor
/// computes what the op-by-op run computes.
fn emitted_file_runs_anywhere(model: Model) {
    let float = model.load();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for grid in [Grid::Symmetric, Grid::Uniform, Grid::PowerOfTwo] {
        let outcome = quantize(model, grid, &folder.path().join(format!("{grid:?}")));
        let emitted = Module::load(&outcome.dir.join(MODEL_FILE)).expect("the emitted file");
        assert_eq!(emitted.signature(), float.signature(), "{grid:?}");
        assert_keeps_weight_names(model, &float, &emitted);
        for arguments in model.batches(&emitted, 16, 5) {
            let by_op = Instrumented::of_module(&emitted).expect("its graph").run(&arguments, &mut NoVisit);
            let by_op = by_op.expect("a run op by op");
            // The first call profiles, the next ones run what was optimized by it.
            for call in 1..=3 {
                let found = emitted.forward(&arguments).expect("a run of libtorch's executor");
                assert_close(&format!("{grid:?}, call {call}"), &by_op, &found, EXECUTORS);
            }
            let original = float.forward(&arguments).expect("a run of the float model");
            // At 8 bits a quantized model resembles the float one; that is all that is asked here.
            assert_close(&format!("{grid:?} against float"), &original, &by_op, 0.5);
        }
    }
}

/// Traced scalars such as the lowest float of a mask are float64 tensors without an axis. As buffers of the emitted file
/// they would make it a model of mixed precision, which loading then casts: not the file that was written is checked.
#[test]
fn emitted_files_hold_no_float64() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for model in [model("tiny_encoder"), model("control_flow"), model("frozen_cnn")] {
        let outcome = quantize(model, Grid::Uniform, &folder.path().join(model.name));
        let emitted = Module::load(&outcome.dir.join(MODEL_FILE)).expect("the emitted file");
        assert_eq!(emitted.notes(), [] as [String; 0], "{}", model.name);
    }
}

fn assert_keeps_weight_names(model: Model, float: &Module, emitted: &Module) {
    let emitted = emitted.tensors().expect("its tensors");
    let attributes = float.attributes().expect("its attributes");
    // One tensor under two names is written under the first, as the report says.
    let is_written = |name: &str| name != "twin.weight";
    let is_used = |name: &str| attributes.iter().any(|attribute| attribute.name == name && attribute.is_used);
    let weights = float.tensors().expect("its tensors").into_iter();
    let weights = weights.filter(|tensor| !tensor.is_buffer && tensor.shape.len() >= 2);
    let weights = weights.filter(|tensor| is_used(&tensor.name) && is_written(&tensor.name));
    let mut expected: Vec<_> = weights.map(|tensor| (tensor.name, tensor.shape)).collect();
    if expected.is_empty() {
        // A frozen file has no names; then they are those of the sites.
        let sites = sites_of(model.name);
        expected = sites.weights.iter().map(|site| (site.name.clone(), site.shape.clone())).collect();
    }
    assert!(!expected.is_empty());
    for (name, shape) in expected {
        let found = emitted.iter().find(|tensor| tensor.name == name);
        let found = found.unwrap_or_else(|| panic!("the emitted file lacks `{name}`"));
        assert_eq!((&found.shape, found.dtype.as_str(), found.is_buffer), (&shape, "Float", false), "{name}");
    }
}
