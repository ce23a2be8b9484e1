//! Second-order rounding and weighted bias correction, op by op: whole runs on shipped models.

mod binary;
mod common;

use std::collections::BTreeMap;

use serde_json::Value;
use tch::{CModule, Kind, Tensor};

use binary::Folder;
use common::Model;

const GPTQ: &str = "quantization.weights.rounding=gptq";
const WEIGHTED: &str = "quantization.weights_bias_correction=weighted";
const NONE: &str = "quantization.weights_bias_correction=none";
const COARSE: &str = "quantization.weights.bits=3";
/// A batch that does not divide the rows.
const FEW: &str = "hessian={samples: 16, batch_size: 5, probes: 2}";

fn experiment(model: Model) -> String {
    let inputs: Vec<String> = model.inputs.iter().map(|input| format!("{input}: {input}")).collect();
    binary::experiment(&model.path(), &model.data_path(), &format!("{{{}}}", inputs.join(", ")))
}

fn run(model: &str, settings: &[&str]) -> Value {
    let folder = Folder::new();
    folder.quantize(&experiment(common::model(model)), settings).succeeded();
    folder.report("run")
}

fn sqnr(report: &Value) -> f64 {
    report["evaluation"]["quantized"]["sqnr_db"].as_f64().expect("a number")
}

struct Rounded {
    name: String,
    nearest: f64,
    error: f64,
}

fn rounded(report: &Value) -> Vec<Rounded> {
    let sites = report["sites"].as_array().expect("sites").iter().filter(|site| site.get("rounding").is_some());
    let number = |value: &Value| value.as_f64().expect("a number");
    let rounded = |site: &Value| Rounded {
        name: site["name"].as_str().expect("a name").to_owned(),
        nearest: number(&site["rounding"]["error_nearest"]),
        error: number(&site["rounding"]["error"]),
    };
    sites.map(rounded).collect()
}

/// Layers with the reasons why nothing was done.
fn reasons(list: &Value) -> BTreeMap<String, String> {
    let text = |item: &Value, key: &str| item[key].as_str().expect("a text").to_owned();
    list.as_array().expect("a list").iter().map(|item| (text(item, "name"), text(item, "reason"))).collect()
}

/// That what is written computes what was simulated is checked by each run itself.
#[test]
fn every_model_is_rounded_and_corrected() {
    let mut listed = String::new();
    for model in common::all_models() {
        let folder = Folder::new();
        let ran = folder.quantize(&experiment(model), &[GPTQ, WEIGHTED, COARSE, FEW]);
        assert_eq!(ran.code, Some(0), "{}: {}", model.name, ran.stderr);
        let report = folder.report("run");
        let rounded = rounded(&report);
        for Rounded { name, nearest, error } in &rounded {
            assert!(error <= nearest, "{}: {name} {nearest} {error}", model.name);
        }
        let total = |of: fn(&Rounded) -> f64| rounded.iter().map(of).sum::<f64>();
        assert!(rounded.is_empty() || total(|it| it.error) < 0.95 * total(|it| it.nearest), "{}", model.name);
        for (layer, reason) in reasons(&report["not_rounded"]) {
            listed += &format!("{}: {layer} not rounded: {reason}\n", model.name);
        }
        for (layer, reason) in reasons(&report["bias_correction"]["left_out"]) {
            listed += &format!("{}: {layer} not corrected: {reason}\n", model.name);
        }
    }
    insta::assert_snapshot!(listed);
}

/// With all three kinds of bias correction, of which one leaves means in.
#[test]
fn outputs_come_nearer() {
    for correction in ["none", "closed_form", "weighted"] {
        let correction = format!("quantization.weights_bias_correction={correction}");
        let [nearest, gptq] =
            [&[COARSE, NONE][..], &[COARSE, GPTQ, &correction]].map(|settings| sqnr(&run("mnist_resnet", settings)));
        assert!(gptq > nearest + 3.0, "{correction}: {nearest} {gptq}");
    }
}

#[test]
fn recurrent_layers_round_what_reads_their_input() {
    let report = run("recurrent", &[GPTQ, COARSE, FEW]);
    let names: Vec<String> = rounded(&report).into_iter().map(|it| it.name).collect();
    assert!(names.iter().any(|name| name.contains("weight_ih_l0")), "{names:?}");
    assert!(names.iter().all(|name| !name.contains("weight_hh") && !name.contains("weight_ih_l1")), "{names:?}");
}

/// The experiment of what `forward` does, traced with the first of these rows, on all of them.
fn traced(folder: &Folder, rows: &Tensor, first: i64, mut forward: impl FnMut(&Tensor) -> Tensor) -> String {
    let (model, data) = (folder.path().join("model.pt"), folder.path().join("rows.safetensors"));
    Tensor::write_safetensors(&[("x", rows)], &data).unwrap();
    let mut forward = |inputs: &[Tensor]| vec![forward(&inputs[0])];
    let module = CModule::create_by_tracing("Traced", "forward", &[rows.narrow(0, 0, first)], &mut forward).unwrap();
    module.save(&model).unwrap();
    binary::experiment(&model, &data, "[x]")
}

fn randn(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, tch::Device::Cpu))
}

/// Each layer and direction has a tensor more in its list.
#[test]
fn recurrent_layers_with_projections_round_what_reads_their_input() {
    let folder = Folder::new();
    tch::manual_seed(1);
    let (inputs, hidden, projected, batch) = (6, 8, 3, 8);
    let one = || {
        [
            randn(&[4 * hidden, inputs]),
            randn(&[4 * hidden, projected]) * 0.3,
            randn(&[4 * hidden]),
            randn(&[4 * hidden]),
            randn(&[projected, hidden]),
        ]
    };
    let weights: Vec<Tensor> = one().into_iter().chain(one()).collect();
    let states = [randn(&[2, batch, projected]), randn(&[2, batch, hidden])];
    let yaml = traced(&folder, &randn(&[2 * batch, 5, inputs]), batch, |x| {
        x.lstm(&states, &weights, true, 1, 0.0, false, true, true).0
    });
    let few = "hessian={samples: 16, batch_size: 8}";
    folder.quantize(&yaml, &[GPTQ, COARSE, few, "calibration.batch_size=8"]).succeeded();
    let rounded = rounded(&folder.report("run"));
    assert_eq!(rounded.len(), 2, "{:?}", rounded.iter().map(|site| &site.name).collect::<Vec<_>>());
    for site in rounded {
        assert!(0.0 < site.error && site.error < site.nearest, "{}: {} {}", site.name, site.error, site.nearest);
    }
}

#[test]
fn convolutions_of_single_images_are_rounded_and_corrected() {
    let folder = Folder::new();
    tch::manual_seed(2);
    let (weight, bias) = (randn(&[6, 2, 3, 3]), randn(&[6]));
    let yaml = traced(&folder, &(randn(&[6, 4, 9, 9]) + 0.2), 1, |x| {
        x.squeeze_dim(0).conv2d(&weight, Some(&bias), 2, 1, 1, 2).relu().unsqueeze(0)
    });
    let each = "hessian={samples: 6, batch_size: 1}";
    for settings in [&[GPTQ, COARSE, each][..], &[GPTQ, COARSE, each, WEIGHTED]] {
        let all: Vec<&str> = settings.iter().copied().chain(["calibration.batch_size=1"]).collect();
        folder.quantize(&yaml, &all).succeeded();
        let report = folder.report("run");
        let [site] = &rounded(&report)[..] else { panic!("{}", report["not_rounded"]) };
        assert!(0.0 < site.error && site.error < site.nearest, "{} {}", site.error, site.nearest);
        assert_eq!(report["bias_correction"]["layers"][0]["added"].as_array().map(Vec::len), Some(6));
    }
}

/// The two batches are the same rows, so that each half confirms all that the other asks for; the outputs' squared gradients are 1.
#[test]
fn a_correction_is_fitted_to_what_a_clamp_lets_through() {
    let folder = Folder::new();
    tch::manual_seed(3);
    let (weight, half) = (randn(&[3, 6]), randn(&[40, 6]) + 0.3);
    let none: Option<&Tensor> = None;
    let yaml = traced(&folder, &Tensor::cat(&[&half, &half], 0), 40, |x| x.linear(&weight, none).relu());
    let bias = |correction: &str| {
        let settings = [
            correction,
            "quantization.weights.bits=2",
            "overrides=[{layers: input, activations: float}]",
            "hessian={samples: 80, batch_size: 40, probes: 1}",
        ];
        folder.quantize(&yaml, &settings).succeeded();
        let emitted = CModule::load(folder.path().join("run/quantized.pt")).unwrap();
        let parameters = emitted.named_parameters().unwrap();
        let of =
            |axes: usize| parameters.iter().find(|(_, value)| value.dim() == axes).expect("a parameter").1.detach();
        (of(2), of(1))
    };
    let (quantized, known) = bias("quantization.weights_bias_correction=closed_form");
    let (_, found) = bias(WEIGHTED);
    let float = half.linear(&weight, none).relu();
    let before = half.linear(&quantized, Some(&known));
    let passes = before.gt(0.0).to_kind(Kind::Float);
    let sum = |of: &Tensor| of.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
    let added = sum(&((&float - before.relu()) * &passes)) / sum(&passes);
    let expected = &known + &added;
    assert!(added.abs().max().double_value(&[]) > 0.01, "{added:?}");
    let distance = (&found - &expected).abs().max().double_value(&[]);
    assert!(distance < 1e-4, "found {found:?}, expected {expected:?}, before {known:?}");
}

/// Errors of some positions come through with the other sign. Where they count more, what makes up for the mean of squares pushes
/// the sum of all positions the wrong way; where they count less, it does less than closed form.
#[test]
fn what_makes_outputs_worse_is_given_up() {
    let others = [1.0f32, 1.0, 1.0, 1.0, 1.0, 1.0, -1.2, -1.2, -1.2, -1.2];
    given_up_for("none", &others, "with weights rounded to nearest and no bias correction");
    let most = [1.0f32, 1.0, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5];
    given_up_for("closed_form", &most, "with closed_form and nearest");
}

/// A model that sums up positions with these signs, of which those that are negative alone have errors.
fn given_up_for(better: &str, signs: &[f32], instead: &str) {
    let folder = Folder::new();
    tch::manual_seed(7);
    let none: Option<&Tensor> = None;
    let (weight, pattern) = (randn(&[4, 6]), randn(&[1, 1, 6]).abs() + 0.5);
    let signs = Tensor::from_slice(signs).reshape([1, 10, 1]);
    let rows = randn(&[64, 10, 6]) * 0.01 + signs.lt(0.0).to_kind(Kind::Float) * pattern;
    let yaml = traced(&folder, &rows, 8, |x| {
        (x.linear(&weight, none) * &signs).sum_dim_intlist([1i64].as_slice(), false, Kind::Float)
    });
    let float = "overrides=[{layers: '*', activations: float}]";
    folder.quantize(&yaml, &[WEIGHTED, "quantization.weights.bits=2", float]).succeeded();
    let report = folder.report("run");
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("was given up, as outputs of the 64 rows") && warnings.contains(instead), "{warnings}");
    // Rows that it was not fitted to tell more, where there are some.
    folder.quantize(&yaml, &[WEIGHTED, "quantization.weights.bits=2", float, "hessian.samples=32"]).succeeded();
    let warnings = folder.report("run")["warnings"].to_string();
    assert!(warnings.contains("was given up, as outputs of 32 other calibration rows"), "{warnings}");
    // What stands is what there would be otherwise.
    let method = format!("quantization.weights_bias_correction={better}");
    folder.quantize(&yaml, &[&method, "quantization.weights.bits=2", float]).succeeded();
    let other = folder.report("run");
    assert_eq!(report["bias_correction"], other["bias_correction"]);
    assert_eq!(sqnr(&report), sqnr(&other));
}

/// One scale for all channels, in 3 bits, leaves rounding too little to gain on this model.
#[test]
fn weights_are_as_to_nearest_where_rounding_is_given_up() {
    let settings = [COARSE, "quantization.weights.granularity=per_tensor", "quantization.weights.grid=power_of_two"];
    let [coarse, one_scale, powers] = settings;
    let mut given_up = 0;
    for grid in [one_scale, powers] {
        let [report, nearest] = [run("small_conv", &[coarse, grid, GPTQ]), run("small_conv", &[coarse, grid])];
        if report["given_up"].is_null() {
            continue;
        }
        given_up += 1;
        let reasons = reasons(&report["not_rounded"]);
        assert!(reasons.values().any(|reason| reason.contains("outputs are nearer")), "{reasons:?}");
        assert!(rounded(&report).is_empty());
        assert_eq!((&report["sites"], sqnr(&report)), (&nearest["sites"], sqnr(&nearest)), "{grid}");
    }
    assert!(given_up > 0);
}

/// Scales are refitted but where a grid knows powers of two alone, or channels share one.
#[test]
fn scales_stay_where_they_have_to() {
    let scales = |settings: &[&str]| -> Vec<Vec<f64>> {
        let report = run("small_conv", settings);
        let sites = report["sites"].as_array().expect("sites").iter().filter(|site| site["kind"] == "weight");
        sites.map(|site| site["scale"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()).collect()
    };
    for grid in ["quantization.weights.grid=power_of_two", "quantization.weights.granularity=per_tensor"] {
        assert_eq!(scales(&[COARSE, grid]), scales(&[COARSE, grid, GPTQ]), "{grid}");
    }
    assert_ne!(scales(&[COARSE]), scales(&[COARSE, GPTQ]));
}

/// Weights lie on the grids that the report tells.
#[test]
fn weights_are_levels_of_their_scales() {
    let folder = Folder::new();
    for grid in ["symmetric", "uniform"] {
        let grid = format!("quantization.weights.grid={grid}");
        let settings = [GPTQ, COARSE, FEW, &grid];
        folder.quantize(&experiment(common::model("small_conv")), &settings).succeeded();
        let report = folder.report("run");
        let emitted = tsquant::jit::Module::load(&folder.path().join("run/quantized.pt")).unwrap();
        let clean = emitted.clean(None).unwrap();
        let listing = clean.listing();
        let mut seen = 0;
        for site in report["sites"].as_array().unwrap().iter().filter(|site| site["kind"] == "weight") {
            let name = site["name"].as_str().unwrap();
            let named = |value: &&tsquant::jit::Value| {
                value.constant.as_ref().is_some_and(|constant| constant.parameter.as_deref() == Some(name))
            };
            let Some(position) = listing.values.iter().position(|value| named(&value)) else { continue };
            seen += 1;
            let tensor = clean.constant(position).unwrap();
            let rows = Vec::<Vec<f32>>::try_from(tensor.flatten(1, -1)).unwrap();
            let scales = site["scale"].as_array().unwrap();
            for (row, scale) in rows.iter().zip(scales) {
                let scale = scale.as_f64().unwrap();
                let is_level = |x: &f32| {
                    let level = f64::from(*x) / scale;
                    (level - level.round()).abs() < 1e-4 && level.abs() < 8.0
                };
                assert!(row.iter().all(is_level), "{grid} {name}: {scale} {row:?}");
            }
        }
        assert!(seen > 0, "{listing:?}");
    }
}

/// The same file again: nothing depends on the order in which threads come.
#[test]
fn the_same_input_gives_the_same_bytes() {
    let bytes = || {
        let folder = Folder::new();
        folder.quantize(&experiment(common::model("conv_zoo")), &[GPTQ, WEIGHTED, COARSE, FEW]).succeeded();
        fs_err::read(folder.path().join("run/quantized.pt")).unwrap()
    };
    assert_eq!(bytes(), bytes());
}

#[test]
fn the_dry_run_says_what_would_be_done() {
    let folder = Folder::new();
    folder.write("e.yaml", experiment(common::model("conv_zoo")));
    let settings = ["--set", GPTQ, "--set", WEIGHTED];
    let ran = binary::tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run"].into_iter().chain(settings));
    let ran = ran.succeeded();
    for line in [
        "\n    rounding: gptq\n",
        "\n  weights_bias_correction: weighted\n",
        "weights would be rounded by gptq",
        ", correct ",
    ] {
        assert!(ran.stdout.contains(line), "{line} in {}", ran.stdout);
    }
}

#[test]
fn kept_statistics_need_the_data_for_it() {
    let folder = Folder::new();
    folder.write("e.yaml", experiment(common::model("small_conv")));
    binary::tsquant(folder.path(), ["calibrate", "e.yaml", "--output", "kept.safetensors"]).succeeded();
    let arguments = ["quantize", "e.yaml", "--statistics", "kept.safetensors", "--set", GPTQ, "--set", WEIGHTED];
    binary::tsquant(folder.path(), arguments).succeeded();
    let from_kept = fs_err::read(folder.path().join("run/quantized.pt")).unwrap();
    folder.quantize(&experiment(common::model("small_conv")), &[GPTQ, WEIGHTED]).succeeded();
    assert!(from_kept == fs_err::read(folder.path().join("run/quantized.pt")).unwrap());
}

#[test]
fn wrong_keys_are_told() {
    let folder = Folder::new();
    let refusal = folder.refuses(2, &experiment(common::model("mlp")), &["quantization.weights.rounding=gpt"]);
    assert!(refusal.contains("nearest") && refusal.contains("gptq"), "{refusal}");
    let refusal = folder.refuses(2, &experiment(common::model("mlp")), &["quantization.activations.rounding=gptq"]);
    assert!(refusal.contains("rounding"), "{refusal}");
}

#[test]
fn one_batch_cannot_confirm_itself() {
    let folder = Folder::new();
    let all = "hessian={samples: 16, batch_size: 16}";
    let refusal = folder.refuses(1, &experiment(common::model("mlp")), &[WEIGHTED, all]);
    assert!(refusal.contains("found 16 rows in batches of 16; lower `hessian.batch_size`"), "{refusal}");
}
