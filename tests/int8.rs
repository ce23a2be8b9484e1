//! What is emitted in 8 bits for every shipped model: which ops run on quantized tensors, that each kernel computes what it stands
//! for, and that the whole is as good as its simulation.

mod binary;
mod common;
mod eight_bits;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde_json::Value;
use tch::{CModule, Kind, Tensor};
use tsquant::config::{EnginePlan, Format, Int8Plan, OutputPlan, Plan, ReduceRange};
use tsquant::jit::Module;
use tsquant::lower::engine::Task;
use tsquant::pipeline::{self, Error, MODEL_FILE, Outcome};
use tsquant::quantizer::{Bits, Grid, Scheme};
use tsquant::report::Int8;

use binary::{Folder, experiment, floats, test_data, test_model, tsquant};
use common::{MNIST, Model, Silent};
use eight_bits::{alone, count, int8_of_run, noise, quantized_ops, traced, trial};

fn plan(model: Model, dir: &Path) -> Plan {
    let mut plan = model.plan(16, dir);
    plan.output.format = Format::Int8;
    plan.output.int8 = Some(Int8Plan { engine: EnginePlan::Onednn, strict: true, reduce_range: ReduceRange::Auto });
    plan
}

fn quantize(plan: &Plan) -> Result<Outcome, Error> {
    let _alone = alone();
    pipeline::quantize(plan, None, &mut Silent)
}

fn int8_of(outcome: &Outcome) -> &Int8 {
    outcome.report.int8.as_ref().expect("an 8-bit model")
}

#[test]
fn each_shipped_model_in_8_bits() {
    let mut text = String::new();
    for model in common::all_models() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let outcome = match quantize(&plan(model, &folder.path().join("run"))) {
            Ok(outcome) => outcome,
            Err(error) => {
                writeln!(text, "{}\n  {error}", model.name).expect("text");
                continue;
            }
        };
        let int8 = int8_of(&outcome);
        writeln!(text, "{}", model.name).expect("text");
        for (op, count) in quantized_ops(&outcome.dir.join(MODEL_FILE)) {
            writeln!(text, "  {count} {op}").expect("text");
        }
        for left in &int8.in_float {
            writeln!(text, "  float: {} ({}): {}", left.name, left.op, left.reason).expect("text");
        }
        for layer in &int8.layers {
            assert!(layer.different as f64 <= 1e-3 * layer.values as f64, "{}: {layer:?}", model.name);
        }
        let close = int8.against_simulation.sqnr_db.is_none_or(|db| db > 25.0);
        assert!(close, "{}: {:?}", model.name, int8.against_simulation);
    }
    insta::assert_snapshot!(text);
}

/// The ops that read what kernels make, and those that they stand for, agree within a level.
#[test]
fn the_shipped_net_is_as_good_as_its_simulation() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut plan = plan(MNIST, &folder.path().join("run"));
    plan.output.int8 = Some(Int8Plan { engine: EnginePlan::Auto, strict: true, reduce_range: ReduceRange::Auto });
    let outcome = quantize(&plan).expect("a run");
    let int8 = int8_of(&outcome);
    assert!(int8.against_simulation.sqnr_db.expect("a number") > 30.0, "{:?}", int8.against_simulation);
    assert!(int8.against_simulation.agreement.expect("classes") >= 0.99, "{:?}", int8.against_simulation);
    for layer in &int8.layers {
        assert!(layer.values > 0 && layer.largest <= 1.0, "{layer:?}");
        assert!(layer.different as f64 <= 1e-3 * layer.values as f64, "{layer:?}");
    }
    let report = &outcome.report;
    assert!(int8.bytes == report.files.quantized_bytes && int8.bytes * 2 < report.files.float_bytes, "{}", int8.bytes);
    // A rerun of the resolved experiment takes the same engine.
    let written = fs_err::read_to_string(outcome.dir.join("experiment.yaml")).expect("an experiment");
    assert!(written.contains(&format!("engine: {}", int8.engine)), "{written}");
    assert_eq!(int8.set_engine, format!("torch.backends.quantized.engine = '{}'", int8.engine));
}

#[test]
fn what_no_kernel_takes_is_refused_or_simulated() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut plan = plan(MNIST, &folder.path().join("run"));
    plan.activations.scheme.bits = Bits::try_from(6).expect("a width");
    let error = quantize(&plan).expect_err("a refusal").to_string();
    assert!(error.contains("8-bit kernels take activations of 256 or 128 levels, found 64"), "{error}");
    assert!(error.starts_with("input.images: ") && error.contains("strict: false"), "{error}");
    plan.activations.scheme.bits = Bits::try_from(8).expect("a width");
    plan.weights.scheme.grid = Grid::Uniform;
    let error = quantize(&plan).expect_err("a refusal").to_string();
    assert!(error.starts_with("conv1.weight: 8-bit kernels take weights of 8 bits around zero"), "{error}");

    plan.output.int8 = Some(Int8Plan { engine: EnginePlan::Onednn, strict: false, reduce_range: ReduceRange::Auto });
    plan.activations.scheme.bits = Bits::try_from(6).expect("a width");
    let outcome = quantize(&plan).expect("a run");
    let int8 = int8_of(&outcome);
    assert_eq!(int8.kernels, BTreeMap::new());
    assert_eq!(int8.simulated.len(), outcome.report.sites.len());
    assert!(int8.against_simulation.sqnr_db.is_none_or(|db| db > 60.0), "{:?}", int8.against_simulation);
}

#[test]
fn both_forms_beside_each_other() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut plan = plan(MNIST, &folder.path().join("run"));
    plan.output.format = Format::FakeQuant;
    plan.output.further = vec![Format::Int8, Format::Int8Weights];
    let outcome = quantize(&plan).expect("a run");
    for file in ["quantized.pt", "quantized_int8.pt", "quantized_int8_weights.pt"] {
        let _alone = alone();
        Module::load(&outcome.dir.join(file)).expect("a model");
    }
    assert_eq!(int8_of(&outcome).file, "quantized_int8.pt");
    assert_eq!(quantized_ops(&outcome.dir.join(MODEL_FILE)), BTreeMap::new());
}

/// The run itself checks that each file gives what the quantized weights give in float, bit for bit.
#[test]
fn weights_in_8_and_4_bits_with_float_compute() {
    for model in common::all_models() {
        for (bits, grid) in [(8, Grid::Symmetric), (4, Grid::Symmetric), (4, Grid::Uniform), (3, Grid::Symmetric)] {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let mut plan = plan(model, &folder.path().join("run"));
            plan.output = OutputPlan { format: Format::Int8Weights, int8: None, ..plan.output };
            plan.weights.scheme = Scheme { bits: Bits::try_from(bits).expect("a width"), grid };
            let outcome = quantize(&plan).unwrap_or_else(|error| panic!("{}: {error}", model.name));
            if model.name == MNIST.name {
                let files = outcome.report.files;
                let most = if bits == 8 { 0.36 } else { 0.24 };
                assert!(files.quantized_bytes as f64 <= most * files.float_bytes as f64, "{bits}: {files:?}");
            }
        }
    }
}

#[test]
fn the_command_line_shows_kernels_and_times() {
    let folder = Folder::new();
    folder.write("e.yaml", experiment(&test_model("small_conv"), &test_data("small_conv"), "[x]"));
    let verify = ["quantize", "e.yaml", "--verify", "layers"];
    let ran = tsquant(folder.path(), verify.into_iter().chain(["--set", "output.format=int8"])).succeeded();
    for text in ["quantized::conv2d_relu", "torch.backends.quantized.engine = '", "batches of 8: ", "of another level"]
    {
        assert!(ran.stdout.contains(text), "{text} is not in {}", ran.stdout);
    }
    assert!(folder.report("run")["int8"]["speed"].as_array().is_some_and(|races| races.len() == 2));
    let refusal = tsquant(folder.path(), verify);
    assert!(refusal.refused(2).contains("expected int8 in `output.format`"), "{}", refusal.stderr);

    let model = test_model("small_conv");
    let data = test_data("small_conv");
    let [model, data] = [&model, &data].map(|path| path.to_str().expect("UTF-8"));
    let emitted = folder.path().join("run/quantized.pt");
    let emitted = emitted.to_str().expect("UTF-8");
    let bench = ["bench", model, emitted, "--data", data, "--inputs", "x", "--seconds", "0.1", "--json"];
    let ran = tsquant(folder.path(), bench).succeeded();
    let report: Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let races = report["races"].as_array().expect("races");
    assert_eq!(races.iter().map(|race| race["batch_size"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(8)]);
    assert!(races.iter().all(|race| race["models"].as_array().is_some_and(|models| models.len() == 2)), "{report}");

    let too_many = ["bench", model, "--data", data, "--inputs", "x", "--quiet", "--batch-sizes", "17"];
    assert!(tsquant(folder.path(), too_many).refused(1).contains("at least 17 rows for a batch, found 16"));
    let engine = ["bench", model, "--data", data, "--inputs", "x", "--quiet", "--engine", "mkl"];
    assert!(tsquant(folder.path(), engine).refused(2).contains("expected auto, x86, onednn"));
}

/// A network with a depthwise convolution of 144 channels, whose weights are large in pairs, as files and an experiment.
fn depthwise(folder: &Folder) -> String {
    let none: Option<Tensor> = None;
    let (wide, deep) = (noise(&[144, 4, 1, 1], 1.0), noise(&[144, 1, 3, 3], 2.0).abs() * 0.3 + 0.2);
    let (narrow, last) = (noise(&[8, 144, 1, 1], 3.0), noise(&[5, 8], 4.0));
    let mut forward = |inputs: &[Tensor]| {
        let x = inputs[0].conv2d(&wide, none.as_ref(), [1, 1], [0, 0], [1, 1], 1).relu();
        let x = x.conv2d(&deep, none.as_ref(), [1, 1], [1, 1], [1, 1], 144).relu();
        let x = x.conv2d(&narrow, none.as_ref(), [1, 1], [0, 0], [1, 1], 1);
        vec![x.mean_dim([2i64, 3].as_slice(), false, Kind::Float).linear(&last, none.as_ref())]
    };
    let x = noise(&[16, 4, 9, 9], 5.0);
    let module = CModule::create_by_tracing("Traced", "forward", std::slice::from_ref(&x), &mut forward);
    let model = folder.path().join("depthwise.pt");
    module.expect("a traced module").save(&model).expect("a writable folder");
    let values = Vec::<f32>::try_from(x.flatten(0, -1)).expect("numbers");
    let data = folder.write("depthwise.safetensors", floats("x", &[16, 4, 9, 9], &values));
    experiment(&model, &data, "[x]")
}

/// Layers at the end write float numbers, whatever axes are in front of the last one, and the function behind them takes these.
#[test]
fn the_last_linear_layer_writes_float_numbers() {
    let (first, last) = (noise(&[12, 8], 1.0), noise(&[5, 12], 2.0));
    for shape in [vec![16, 8], vec![16, 6, 8], vec![16, 2, 3, 8]] {
        let folder = Folder::new();
        let none: Option<Tensor> = None;
        let yaml =
            traced(&folder, &shape, |x| x.linear(&first, none.as_ref()).relu().linear(&last, none.as_ref()).sigmoid());
        let (report, int8) = int8_of_run(&folder, &yaml, &[]);
        assert_eq!(count(&int8, "quantized::linear_relu"), 1, "{int8}");
        assert_eq!(count(&int8, "quantized::linear_dynamic"), 1, "{int8}");
        let in_float = int8["in_float"].as_array().expect("a list");
        let reason = "what it reads is in float";
        assert!(
            matches!(in_float.as_slice(), [only] if only["name"] == "sigmoid_0" && only["reason"] == reason),
            "{int8}"
        );
        let sites = report["sites"].as_array().expect("sites");
        assert_eq!(sites.iter().filter(|site| site["kind"] == "activation").count(), 2, "{sites:?}");
    }
}

/// Behind a function a batch normalization does not fold; a ReLU behind it is computed along.
#[test]
fn batch_normalization_stays_in_8_bits() {
    let none: Option<Tensor> = None;
    let [mean, bias] = [1.0, 2.0].map(|seed| noise(&[8], seed) * 0.2);
    let [variance, weight] = [3.0, 4.0].map(|seed| noise(&[8], seed).abs() + 0.5);
    let norm = |x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>| {
        x.batch_norm(weight, bias, Some(&mean), Some(&variance), false, 0.1, 1e-5, false)
    };
    let (narrow, wide, last) = (noise(&[8, 3, 3], 6.0), noise(&[8, 8, 3], 7.0), noise(&[5, 8], 8.0));
    for axes in 1..=3 {
        let window = |weight: &Tensor| {
            let mut shape = weight.size();
            shape.resize(2 + axes, 1);
            weight.reshape(&shape)
        };
        let (narrow, wide) = (window(&narrow), window(&wide));
        let convolve = |x: &Tensor, weight: &Tensor| match axes {
            1 => x.conv1d(weight, none.as_ref(), [1i64], [0i64], [1i64], 1),
            2 => x.conv2d(weight, none.as_ref(), [1i64, 1], [0i64, 0], [1i64, 1], 1),
            _ => x.conv3d(weight, none.as_ref(), [1i64, 1, 1], [0i64, 0, 0], [1i64, 1, 1], 1),
        };
        let folder = Folder::new();
        let mut shape = vec![16, 3, 7];
        shape.resize(2 + axes, 4);
        let yaml = traced(&folder, &shape, |x| {
            let x = norm(&convolve(x, &narrow).relu(), Some(&weight), Some(&bias));
            let x = norm(&convolve(&x, &wide).relu(), None, None).relu();
            let x = convolve(&x, &wide).relu();
            x.flatten(2, -1).mean_dim([2i64].as_slice(), false, None).linear(&last, none.as_ref())
        });
        let (_, int8) = int8_of_run(&folder, &yaml, &[]);
        let [plain, relu] = ["", "_relu"].map(|end| count(&int8, &format!("quantized::batch_norm{axes}d{end}")));
        assert_eq!((plain, relu), (1, 1), "{int8}");
        assert_eq!(int8["in_float"].as_array().map(Vec::len), Some(0), "{int8}");
    }
    // Rows behind a linear layer; constants with gaps are none that the kernel reads.
    let (rows, gaps) = (noise(&[8, 6], 9.0), noise(&[16], 4.0).abs().slice(0, 0, None, 2) + 0.5);
    let gaps = gaps.unsqueeze(1).expand([8, 2], false).contiguous().select(1, 0);
    for (weight, kernels) in [(&weight, 1), (&gaps, u64::from(gaps.stride() == [1]))] {
        let folder = Folder::new();
        let yaml = traced(&folder, &[16, 6], |x| {
            norm(&x.linear(&rows, none.as_ref()).relu(), Some(weight), Some(&bias)).linear(&last, none.as_ref())
        });
        let (_, int8) = int8_of_run(&folder, &yaml, &[]);
        assert_eq!(count(&int8, "quantized::batch_norm1d"), kernels, "{int8}");
    }
    // The model's own input is float.
    let folder = Folder::new();
    let narrow = narrow.reshape([8, 1, 9]);
    let yaml = traced(&folder, &[16, 8, 20], |x| {
        let x = norm(x, Some(&weight), Some(&bias)).conv1d(&narrow, none.as_ref(), [1i64], [0i64], [1i64], 8).relu();
        x.mean_dim([2i64].as_slice(), false, None).linear(&last, none.as_ref())
    });
    let (report, int8) = int8_of_run(&folder, &yaml, &[]);
    let in_float = int8["in_float"].as_array().expect("a list");
    assert!(matches!(in_float.as_slice(), [op] if op["op"] == "aten::batch_norm"), "{int8}");
    assert!(report["left_float"].as_array().expect("a list").iter().all(|left| left["op"] != "aten::batch_norm"));
}

#[test]
fn depthwise_weights_are_bounded_where_the_engine_saturates() {
    let folder = Folder::new();
    let yaml = depthwise(&folder);
    for name in ["onednn", "x86", "fbgemm"] {
        let Some(trial) = trial(name) else { continue };
        let engine = format!("output.engine={name}");
        let (report, int8) = int8_of_run(&folder, &yaml, &[&engine]);
        assert_eq!(int8["reduce_range"], trial.asks_for_7_bits(), "{trial:?}");
        if trial.asks_for_7_bits() || !trial.is_right_with_bounds() {
            continue;
        }
        assert_eq!(count(&int8, "quantized::conv2d_relu") + count(&int8, "quantized::conv2d"), 3, "{int8}");
        let is_bounded = trial.bounds_depthwise(false);
        assert_eq!(int8["bounded"]["raised"].as_u64().is_some_and(|raised| raised > 0), is_bounded, "{int8}");
        let sites = report["sites"].as_array().expect("sites");
        let bounded: Vec<_> = sites.iter().filter(|site| site.get("bounded_channels").is_some()).collect();
        assert_eq!(bounded.len(), usize::from(is_bounded), "{bounded:?}");
        if !is_bounded {
            continue;
        }
        assert_eq!(int8["bounded"]["channels"], 144);
        assert_eq!(int8["evaluation"]["agreement"], int8["simulation"]["agreement"]);

        let gptq = "quantization.weights.rounding=gptq";
        let (report, _) = int8_of_run(&folder, &yaml, &[&engine, gptq, "hessian.samples=16"]);
        let sites = report["sites"].as_array().expect("sites");
        assert!(sites.iter().any(|site| site.get("rounding").is_some()));
        assert!(sites.iter().all(|site| site.get("bounded_channels").is_none() || site.get("rounding").is_none()));
        let not_rounded = report["not_rounded"].as_array().expect("a list");
        let is_told = |left: &Value| left["reason"].as_str().is_some_and(|reason| reason.contains("are bounded"));
        assert_eq!(not_rounded.iter().filter(|left| is_told(left)).count(), 1, "{not_rounded:?}");

        let power = "quantization.weights.grid=power_of_two";
        let (_, int8) = int8_of_run(&folder, &yaml, &[&engine, power, "quantization.weights.granularity=per_tensor"]);
        assert_eq!(int8["bounded"]["channels"], 1, "{int8}");
    }
}

/// Every kernel is clamped to the levels that its site has, so that it computes what the simulation does.
#[test]
fn activations_of_7_bits() {
    let folder = Folder::new();
    let small = experiment(&test_model("conv_zoo"), &test_data("conv_zoo"), "[x]");
    for (yaml, grid) in [(depthwise(&folder), "uniform"), (small.clone(), "uniform"), (small, "symmetric")] {
        let grid = format!("quantization.activations.grid={grid}");
        for method in ["NOCLIPPING", "MSE"] {
            let method = format!("quantization.activation_error_method={method}");
            let reduced = "output.reduce_range=true";
            let settings = [reduced, &grid, &method, "output.format=[int8,fake_quant]", "output.engine=onednn"];
            let (report, int8) = int8_of_run(&folder, &yaml, &settings);
            assert_eq!(int8["reduce_range"], true);
            let sites = report["sites"].as_array().expect("sites");
            let activations: Vec<_> = sites.iter().filter(|site| site["kind"] == "activation").collect();
            assert!(activations.iter().all(|site| site["bits"] == 7), "{activations:?}");
            let written = fs_err::read_to_string(folder.path().join("run/experiment.yaml")).expect("an experiment");
            assert!(written.contains("reduce_range: true") && written.contains("bits: 8"), "{written}");
        }
    }
    let refusal = folder.refuses(2, &depthwise(&folder), &["output.reduce_range=true"]);
    assert!(refusal.contains("it is for the format int8"), "{refusal}");
    let settings = ["output.format=int8", "output.reduce_range=yes"];
    let refusal = folder.refuses(2, &depthwise(&folder), &settings);
    assert!(refusal.contains("`output.reduce_range` must be one of `auto`, `true`, `false`"), "{refusal}");
}

#[test]
fn transposed_convolutions_run_where_the_engine_computes_them() {
    for (model, inputs, kernel, op) in [
        ("conv_zoo", "[x]", "quantized::conv_transpose2d", "aten::conv_transpose2d"),
        ("conv_dimensions", "[signal, volume]", "quantized::conv_transpose1d", "aten::conv_transpose1d"),
    ] {
        for name in ["onednn", "fbgemm", "qnnpack"] {
            let Some(trial) = trial(name).filter(|trial| !trial.asks_for_7_bits()) else { continue };
            let folder = Folder::new();
            let yaml = experiment(&test_model(model), &test_data(model), inputs);
            let engine = format!("output.engine={name}");
            let granularity = |report: &Value| {
                let sites = report["sites"].as_array().expect("sites");
                let site = sites.iter().find(|site| site["op"] == op && site["kind"] == "weight").expect("a weight");
                site["granularity"].as_str().map(str::to_owned)
            };
            let is_right = trial.computes(Task::Transposed, false);
            let (report, int8) = int8_of_run(&folder, &yaml, &[&engine]);
            assert_eq!(count(&int8, kernel), u64::from(is_right), "{name}: {int8}");
            let expected = if is_right { "per_tensor" } else { "per_channel" };
            assert_eq!(granularity(&report).as_deref(), Some(expected), "{name}");

            let layer = if model == "conv_zoo" { "transposed" } else { "transposed1d" };
            let own = format!("{yaml}overrides: [{{layers: {layer}, weights: {{granularity: per_channel}}}}]\n");
            let (report, int8) = int8_of_run(&folder, &own, &[&engine]);
            assert_eq!(granularity(&report).as_deref(), Some("per_channel"));
            let left = int8["in_float"].as_array().expect("a list").iter().find(|left| left["op"] == op);
            let reason = left.and_then(|left| left["reason"].as_str()).expect("a reason");
            assert!(reason.contains(if is_right { "one scale" } else { "wrong on this machine" }), "{reason}");
        }
    }
}
