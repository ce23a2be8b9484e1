//! `overrides` from end to end: other bits, grids and methods for some layers, layers left float, and what is refused. Each run
//! that succeeds has found its written model equal to its simulation, bit for bit.

mod binary;

use serde_json::{Value, json};

use binary::{Folder, experiment, floats, shipped, test_data, test_model, tsquant};

/// The shipped experiment, short, with these overrides.
fn shipped_with(overrides: &str) -> String {
    let text = fs_err::read_to_string(shipped("configs/mnist_resnet.yaml")).unwrap();
    let text = text.replace("models/", &format!("{}/", shipped("models").display()));
    let text = text.replace("samples: 256", "samples: 32").replace("runs/mnist_resnet", "run");
    format!("overrides:\n{overrides}\n{text}")
}

const SHORT: [&str; 1] = ["evaluation.samples=64"];

/// A test model with these overrides.
fn model_with(name: &str, inputs: &str, overrides: &str) -> String {
    format!("{}overrides:\n{overrides}\n", experiment(&test_model(name), &test_data(name), inputs))
}

fn site<'a>(report: &'a Value, name: &str) -> Option<&'a Value> {
    report["sites"].as_array().unwrap().iter().find(|site| site["name"] == name)
}

fn reason<'a>(report: &'a Value, name: &str) -> Option<&'a str> {
    report["left_float"].as_array().unwrap().iter().find(|left| left["name"] == name)?["reason"].as_str()
}

/// Bits, grid, granularity and error method of a site.
fn scheme(site: &Value) -> (u64, &str, &str, &str) {
    let text = |key: &str| site[key].as_str().unwrap();
    (site["bits"].as_u64().unwrap(), text("grid"), text("granularity"), text("error_method"))
}

#[test]
fn each_site_of_the_shipped_model_has_its_own_settings() {
    let folder = Folder::new();
    folder.quantize(&shipped_with("  []"), &SHORT).succeeded();
    let plain = folder.report("run");
    let overrides = "
  - {layers: fc, weights: {bits: 4, error_method: LP, l_p_value: 3}}
  - {ops: add, activations: {grid: power_of_two, bits: 6}}
  - {layers: layer2.0.conv2, weights: float, activations: float}
  - {layers: 'layer3.*.conv1', weights: {granularity: per_tensor, grid: uniform}}";
    folder.quantize(&shipped_with(overrides), &SHORT).succeeded();
    let report = folder.report("run");

    let mut different = Vec::new();
    for before in plain["sites"].as_array().unwrap() {
        let name = before["name"].as_str().unwrap();
        match site(&report, name) {
            Some(after) if after == before => {}
            Some(after) => different.push((name, scheme(after))),
            None => assert!(reason(&report, name).unwrap().starts_with("`overrides[2]."), "{name}"),
        }
    }
    let is_add = |site: &&Value| site["op"] == "aten::add" && site["kind"] == "activation";
    let adds = plain["sites"].as_array().unwrap().iter().filter(is_add);
    let adds = adds.map(|site| (site["name"].as_str().unwrap(), (6, "power_of_two", "per_tensor", "MSE")));
    let mut expected: Vec<_> = adds.collect();
    assert!(expected.len() > 3, "{expected:?}");
    expected.push(("fc.weight", (4, "symmetric", "per_channel", "LP")));
    let first_convs = plain["sites"].as_array().unwrap().iter().filter_map(|site| site["name"].as_str());
    let first_convs = first_convs.filter(|name| name.starts_with("layer3.") && name.ends_with(".conv1.weight"));
    expected.extend(first_convs.map(|name| (name, (8, "uniform", "per_tensor", "MSE"))));
    different.sort_unstable();
    expected.sort_unstable();
    assert_eq!(different, expected);

    assert_eq!(site(&report, "fc.weight").unwrap()["l_p_value"], json!(3));
    assert_eq!(reason(&report, "layer2.0.conv2.weight"), Some("`overrides[2].weights` says `float`"));
    assert_eq!(reason(&report, "layer2.0.conv2.output"), Some("`overrides[2].activations` says `float`"));
    let agreement = report["evaluation"]["quantized"]["agreement"].as_f64().unwrap();
    assert!(agreement > 0.9, "{agreement}");
}

#[test]
fn the_written_experiment_runs_again() {
    let folder = Folder::new();
    let overrides =
        "  - {layers: ['conv1', 'layer*.0.conv*'], weights: {error_method: LP}, activations: {z_threshold: 9}}
  - {ops: [linear, 'aten::conv2d'], weights: {bits: 5}}
  - {layers: conv1, weights: float}";
    folder.quantize(&shipped_with(overrides), &["quantization.l_p_value=4", SHORT[0]]).succeeded();
    let first = fs_err::read(folder.path().join("run/quantized.pt")).unwrap();
    let mut report = folder.report("run");
    fs_err::copy(folder.path().join("run/experiment.yaml"), folder.path().join("again.yaml")).unwrap();
    tsquant(folder.path(), ["quantize", "again.yaml", "--quiet"]).succeeded();
    assert!(fs_err::read(folder.path().join("run/quantized.pt")).unwrap() == first);
    let mut again = folder.report("run");
    for report in [&mut report, &mut again] {
        let fields = report.as_object_mut().unwrap();
        fields.remove("timings_s").unwrap();
        fields.remove("peak_memory_bytes").unwrap();
    }
    assert_eq!(again, report);
    assert_eq!(site(&report, "layer1.0.conv1.weight").unwrap()["l_p_value"], json!(4));
}

/// Models of many kinds, each with a layer in the middle left float, the last weight at four bits, another method, and
/// another grid for all ops of the first kind.
#[test]
fn mixed_settings_and_float_layers_run_on_every_kind_of_model() {
    let models = [
        ("control_flow", "[x]"),
        ("conv_zoo", "[x]"),
        ("frozen_cnn", "[x]"),
        ("multi_io", "[x, y]"),
        ("packed", "[x, lengths]"),
        ("recurrent", "[x]"),
        ("sdpa", "[x, mask]"),
        ("stateful", "[x]"),
        ("tiny_encoder", "[ids, mask]"),
        ("traps", "[x]"),
    ];
    for (name, inputs) in models {
        let folder = Folder::new();
        folder.quantize(&experiment(&test_model(name), &test_data(name), inputs), &[]).succeeded();
        let plain = folder.report("run");
        let of_kind = |kind: &str| -> Vec<&Value> {
            plain["sites"].as_array().unwrap().iter().filter(|site| site["kind"] == kind).collect()
        };
        let (weights, activations) = (of_kind("weight"), of_kind("activation"));
        let text = |site: &Value, key: &str| site[key].as_str().unwrap().to_owned();
        let first = text(activations[0], "op");
        let middle = activations[activations.len() / 2];
        let last = weights[weights.len() - 1];
        let overrides = format!(
            "  - {{ops: '{first}', activations: {{grid: power_of_two, bits: 7}}}}
  - {{layers: '{}', activations: float}}
  - {{layers: '{}', weights: float}}
  - {{layers: '{}', weights: {{bits: 4, grid: uniform, error_method: MAE}}}}",
            text(middle, "layer"),
            text(weights[0], "layer"),
            text(last, "layer"),
        );
        folder.quantize(&model_with(name, inputs, &overrides), &[]).succeeded();
        let report = folder.report("run");
        let (middle, last) = (text(middle, "name"), text(last, "name"));
        assert_eq!(reason(&report, &middle), Some("`overrides[1].activations` says `float`"), "{name}");
        assert!(site(&report, &middle).is_none(), "{name}");
        let site = site(&report, &last).unwrap_or_else(|| panic!("{name}: {last}"));
        assert_eq!(scheme(site), (4, "uniform", "per_channel", "MAE"), "{name}: {last}");
    }
}

#[test]
fn a_layer_that_is_called_twice_has_one_weight() {
    let overrides = "  - {layers: 'shared#2', weights: {bits: 3}}";
    let folder = Folder::new();
    folder.quantize(&model_with("conv_zoo", "[x]", overrides), &[]).succeeded();
    assert_eq!(site(&folder.report("run"), "shared.weight").unwrap()["bits"], json!(3));
    let twice = format!("{overrides}\n  - {{layers: shared, weights: {{bits: 4}}}}");
    let line = Folder::new().refuses(2, &model_with("conv_zoo", "[x]", &twice), &[]);
    assert!(
        line.ends_with(
            "e.yaml:7:31: `overrides[1].weights`: expected what `overrides[0].weights` says of the site `shared.weight` (3 \
             bits as a weight of `shared#2`), found 4 bits as a weight of `shared`"
        ),
        "{line}"
    );
}

#[test]
fn matrices_of_a_recurrent_layer_go_together() {
    let overrides = "  - {ops: gru, weights: {bits: 6}, inputs: {bits: 5}}\n  - {layers: lstm, weights: float}";
    let folder = Folder::new();
    folder.quantize(&model_with("recurrent", "[x]", overrides), &[]).succeeded();
    let report = folder.report("run");
    let of_gru =
        report["sites"].as_array().unwrap().iter().filter(|site| site["layer"] == "gru" && site["kind"] == "weight");
    assert!(
        of_gru.clone().count() == 8 && of_gru.clone().all(|site| site["bits"] == 6),
        "{:?}",
        of_gru.collect::<Vec<_>>()
    );
    assert_eq!(site(&report, "input.x").unwrap()["bits"], json!(5));
    assert_eq!(reason(&report, "lstm.weight_hh_l0"), Some("`overrides[1].weights` says `float`"));
}

/// A convolution that overflows to infinity cannot be quantized; left float it does no harm.
#[test]
fn what_is_left_float_is_not_observed() {
    let folder = Folder::new();
    let (row, rows) = (3 * 8 * 8, 8);
    let value = |index: usize| if index / row < 6 { (index % 7) as f32 * 0.1 } else { 3e38 };
    let values: Vec<f32> = (0..row * rows).map(value).collect();
    let data = folder.write("x.safetensors", floats("x", &[rows, 3, 8, 8], &values));
    let yaml = experiment(&test_model("frozen_cnn"), &data, "[x]");
    let line = folder.refuses(1, &yaml, &[]);
    assert!(line.contains("infinit"), "{line}");
    let overrides = "overrides:\n  - {layers: '**', activations: float}\n  - {layers: input, activations: {bits: 8}}\n";
    folder.quantize(&format!("{yaml}{overrides}"), &[]).succeeded();
    let report = folder.report("run");
    let kinds = report["sites"].as_array().unwrap().iter().filter(|site| site["kind"] == "activation");
    assert_eq!(kinds.map(|site| site["name"].as_str().unwrap()).collect::<Vec<_>>(), ["input.x"]);
}

#[test]
fn weights_left_float_keep_their_values_and_names() {
    let folder = Folder::new();
    folder.quantize(&model_with("frozen_cnn", "[x]", "  - {layers: '**', weights: float}"), &[]).succeeded();
    let report = folder.report("run");
    assert!(report["sites"].as_array().unwrap().iter().all(|site| site["kind"] == "activation"));
    let half = Folder::new();
    // Corrected biases are parameters; without names from the model, its own are buffers.
    let uncorrected = ["quantization.weights_bias_correction=none"];
    half.quantize(&model_with("frozen_cnn", "[x]", "  - {layers: '**', activations: float}"), &uncorrected).succeeded();
    let names = |folder: &Folder| -> Vec<String> {
        let model = tsquant::jit::Module::load(&folder.path().join("run/quantized.pt")).unwrap();
        model.tensors().unwrap().into_iter().map(|tensor| format!("{} {}", tensor.name, tensor.is_buffer)).collect()
    };
    assert_eq!(names(&folder), names(&half));
}

#[test]
fn what_does_not_fit_the_model_is_refused_before_calibration() {
    let cases = [
        (
            "{layers: layer1.0.conv3, weights: float}",
            "e.yaml:2:14: `overrides[0].layers`: expected a layer of the model or a pattern of layers, found \
             `layer1.0.conv3`, did you mean `layer1.0.conv",
        ),
        ("{ops: conv1d, weights: float}", ":2:11: `overrides[0].ops`: expected an op of the model, found `conv1d`"),
        (
            "{layers: fc, activations: {bits: 4}}",
            ":2:31: `overrides[0].activations`: expected layers with a result that can be quantized, found none in `fc` \
             (`fc.output`: an output of the model)",
        ),
        (
            "{layers: '**', weights: {bits: 10}}\n  - {layers: fc, weights: {error_method: KL}}",
            ":3:27: `overrides[1].weights`: KL of `overrides[1].weights.error_method` chooses for at most 8 bits, found 10 in \
             `overrides[0].weights.bits`, for the site `fc.weight`",
        ),
        (
            "{layers: '**', weights: float, activations: float}",
            ":2:5: `overrides[0]`: expected at least one site left to quantize, found that the overrides leave all float",
        ),
        ("{layers: fc}", "`overrides[0]`: expected settings under `weights`, `activations` or `inputs`, found none"),
    ];
    for (entry, expected) in cases {
        let folder = Folder::new();
        let line = folder.refuses(2, &shipped_with(&format!("  - {entry}")), &[]);
        assert!(line.contains(expected), "{line}");
    }
    let folder = Folder::new();
    let flag = "overrides=[{layers: fcc, weights: {bits: 4}}]";
    let line = folder.refuses(2, &shipped_with("  []"), &[flag]);
    assert_eq!(
        line,
        format!(
            "--set {flag}: `overrides[0].layers`: expected a layer of the model or a pattern of layers, found `fcc`, did you mean `fc`?"
        )
    );
}
