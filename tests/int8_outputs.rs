//! What ops that make a model's outputs are in 8 bits: kernels that write no float numbers make sites, all else is returned as it is made.

mod binary;
mod common;
mod eight_bits;

use std::collections::BTreeSet;

use serde_json::Value;
use tch::{CModule, IValue, Kind, Tensor};
use tsquant::jit::Module;
use tsquant::lower::engine::Task;

use binary::{Folder, experiment, test_data, test_model, tsquant};
use eight_bits::{convolve, count, int8_of_run, noise, quantized_ops, traced, trial};

/// The names of sites that a run says are returned in 8 bits.
fn returned(report: &Value) -> Vec<String> {
    let warnings = report["warnings"].as_array().expect("a list").iter().filter_map(Value::as_str);
    warnings.filter_map(|text| Some(text.split_once(" is returned in 8 bits")?.0.to_owned())).collect()
}

/// Why a name is left float.
fn reason_of<'a>(report: &'a Value, name: &str) -> &'a str {
    let left = report["left_float"].as_array().expect("a list").iter().find(|left| left["name"] == name);
    left.and_then(|left| left["reason"].as_str()).unwrap_or_else(|| panic!("{name}: {}", report["left_float"]))
}

/// So are sums, products, concatenations, functions and normalizations of what kernels make; ops that no kernel of 8 bits alone
/// computes give float numbers.
#[test]
fn other_ops_that_make_outputs_run_in_8_bits() {
    let none: Option<Tensor> = None;
    let [one, two] = [1.0, 2.0].map(|seed| noise(&[4, 3, 3, 3], seed));
    let [scale, shift] = [3.0, 4.0].map(|seed| noise(&[4], seed));
    let [matrix, other] = [5.0, 6.0].map(|seed| noise(&[6, 9], seed));
    let a = |x: &Tensor| convolve(x, &one);
    let b = |x: &Tensor| convolve(x, &two);
    let affine = [&scale, &shift].map(Some);
    let norm = |x: &Tensor| {
        x.batch_norm(affine[0], affine[1], Some(&shift), Some(&(scale.abs() + 0.5)), false, 0.1, 1e-3, false)
    };
    type Forward<'a> = Box<dyn Fn(&Tensor) -> Tensor + 'a>;
    let cases: Vec<(&str, &str, Forward<'_>)> = vec![
        ("quantized::add", "add_0", Box::new(|x| a(x) + b(x))),
        ("quantized::add_relu", "add_0", Box::new(|x| (a(x) + b(x)).relu())),
        ("quantized::add", "add_0", Box::new(|x| (a(x) + b(x)).flatten(1, -1))),
        ("quantized::add", "add_0", Box::new(|x| x.linear(&matrix, none.as_ref()) + x.linear(&other, none.as_ref()))),
        ("quantized::mul", "mul_0", Box::new(|x| a(x).relu() * b(x))),
        // The smaller operand first.
        ("quantized::mul", "mul_0", Box::new(|x| b(x).max_pool2d([7, 7], [7, 7], [0, 0], [1, 1], false) * a(x).relu())),
        ("quantized::cat", "cat_0", Box::new(|x| Tensor::cat(&[a(x), b(x)], 1))),
        ("quantized::hardswish", "hardswish_0", Box::new(|x| a(x).hardswish())),
        (
            "quantized::sigmoid",
            "sigmoid_0",
            Box::new(|x| a(x).max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false).sigmoid()),
        ),
        ("quantized::leaky_relu", "leaky_relu_0", Box::new(|x| a(x).leaky_relu())),
        ("quantized::elu", "elu_0", Box::new(|x| a(x).elu())),
        ("quantized::elu", "elu_0", Box::new(|x| a(x).elu().clamp(-0.25, 0.5))),
        ("quantized::hardswish", "hardswish_0", Box::new(|x| a(x).hardswish().relu())),
        ("quantized::batch_norm2d", "batch_norm_0", Box::new(|x| norm(&a(x).relu()))),
        ("quantized::batch_norm2d_relu", "batch_norm_0", Box::new(|x| norm(&a(x).relu()).relu())),
    ];
    for (kernel, name, forward) in cases {
        let folder = Folder::new();
        let yaml = traced(&folder, &[16, 3, 9, 9], |x| forward(x));
        let (report, int8) = int8_of_run(&folder, &yaml, &["output.engine=onednn"]);
        assert_eq!(count(&int8, kernel), 1, "{kernel}: {int8}");
        assert_eq!(int8["in_float"].as_array().map(Vec::len), Some(0), "{kernel}: {int8}");
        assert_eq!(returned(&report), [format!("{name}.output")], "{kernel}");
        let ops = quantized_ops(&folder.path().join("run/quantized.pt"));
        assert_eq!((ops["aten::quantize_per_tensor"], ops["aten::dequantize"]), (1, 1), "{kernel}: {ops:?}");
        // Left float by the user's own word it is float.
        let float = format!("overrides=[{{layers: {name}, activations: float}}]");
        let (report, int8) = int8_of_run(&folder, &yaml, &["output.engine=onednn", &float]);
        assert_eq!(count(&int8, kernel), 0, "{kernel}: {int8}");
        assert!(returned(&report).is_empty());
    }
    // A constant operand, no kernel, nothing in 8 bits to add, a layer that writes float numbers, an op of libtorch's own.
    let in_float: Vec<(&str, Forward<'_>)> = vec![
        ("mul_0.output", Box::new(|x| a(x).relu() * scale.reshape([1, 4, 1, 1]))),
        ("silu_0.output", Box::new(|x| a(x).silu())),
        ("add_0.output", Box::new(|x| a(x).silu() + b(x).tanh())),
        ("linear_0.output", Box::new(|x| x.linear(&matrix, none.as_ref()).sigmoid())),
        ("mean_0.output", Box::new(|x| a(x).relu().mean_dim([1i64, 2].as_slice(), false, None))),
        // A view behind such an op changes nothing.
        ("adaptive_avg_pool2d_0.output", Box::new(|x| a(x).relu().adaptive_avg_pool2d([3, 3]).flatten(1, -1))),
        ("linear_0.output", Box::new(|x| x.linear(&matrix, none.as_ref()).unsqueeze(1).sigmoid().squeeze())),
        ("linear_0.output", Box::new(|x| x.linear(&matrix, none.as_ref()).unsqueeze(1).relu())),
        ("", Box::new(|x| b(x).adaptive_avg_pool2d([3, 3]).flatten(1, -1).relu())),
        ("", Box::new(|x| b(x).upsample_bilinear2d([14, 14], false, None, None).clamp(0.0, 1.0))),
        ("mean_0.output", Box::new(|x| b(x).adaptive_avg_pool2d([3, 3]).mean_dim([1i64].as_slice(), false, None))),
    ];
    for (name, forward) in in_float {
        let folder = Folder::new();
        let yaml = traced(&folder, &[16, 3, 9, 9], |x| forward(x));
        let (report, _) = int8_of_run(&folder, &yaml, &["output.engine=onednn"]);
        assert!(returned(&report).is_empty(), "{name}: {}", report["warnings"]);
        let sites = report["sites"].as_array().expect("sites");
        assert!(sites.iter().all(|site| site["name"] != name), "{name}: {sites:?}");
        if !name.is_empty() {
            assert_eq!(reason_of(&report, name), "an output of the model");
        }
        let is_function_of_levels = name == "silu_0.output";
        assert_eq!(levels_of(&folder, &[64, 3, 9, 9]) > 256, !is_function_of_levels, "{name}");
    }
}

/// How many different numbers the written model returns for such an input.
fn levels_of(folder: &Folder, shape: &[i64]) -> usize {
    levels_of_all(folder, "quantized.pt", shape)[0]
}

/// The same of each tensor that is returned by this file.
fn levels_of_all(folder: &Folder, file: &str, shape: &[i64]) -> Vec<usize> {
    let emitted = CModule::load(folder.path().join("run").join(file)).expect("a model");
    let output = emitted.forward_is(&[IValue::Tensor(noise(shape, 5.0))]).expect("an output");
    let levels = |tensor: Tensor| {
        assert_eq!(tensor.kind(), Kind::Float);
        let numbers = Vec::<f32>::try_from(tensor.flatten(0, -1)).expect("numbers");
        numbers.iter().map(|number| number.to_bits()).collect::<BTreeSet<_>>().len()
    };
    tensors_of(output).into_iter().map(levels).collect()
}

fn tensors_of(value: IValue) -> Vec<Tensor> {
    match value {
        IValue::Tensor(tensor) => vec![tensor],
        IValue::TensorList(tensors) => tensors,
        IValue::Tuple(parts) | IValue::GenericList(parts) => parts.into_iter().flat_map(tensors_of).collect(),
        IValue::GenericDict(entries) => entries.into_iter().flat_map(|(_, value)| tensors_of(value)).collect(),
        _ => Vec::new(),
    }
}

/// What is computed in float is returned as it is made, though something in the model reads it in 8 bits; what is returned among others,
/// twice, and is read too, has 8 bits where its kernel writes them.
#[test]
fn outputs_that_are_read_and_outputs_among_others() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("outputs"), &test_data("outputs"), "[x]");
    for (name, format) in [("onednn", "int8"), ("fbgemm", "int8"), ("onednn", "[fake_quant, int8]")] {
        let Some(trial) = trial(name).filter(|trial| !trial.asks_for_7_bits()) else { continue };
        let settings = [format!("output.engine={name}"), format!("output.format={format}")];
        let (report, int8) = int8_of_run(&folder, &yaml, &settings.each_ref().map(String::as_str));
        let is_right = trial.computes(Task::Transposed, false);
        let kernels = ["quantized::conv_transpose2d", "quantized::add", "quantized::linear", "quantized::sigmoid"];
        assert_eq!(kernels.map(|kernel| count(&int8, kernel)), [u64::from(is_right), 1, 1, 1], "{int8}");
        let mut expected = vec!["add_0.output", "last.output", "merge.output", "sigmoid_0.output"];
        expected.extend(is_right.then_some("up.output"));
        let mut found = returned(&report);
        found.sort();
        assert_eq!(found, expected, "{name}");
        let sites = report["sites"].as_array().expect("sites");
        assert!(sites.iter().any(|site| site["name"] == "up.output"), "{sites:?}");
        let files = if format == "int8" { &["quantized.pt"][..] } else { &["quantized.pt", "quantized_int8.pt"] };
        for file in files {
            let outputs = levels_of_all(&folder, file, &[64, 3, 9, 9]);
            // The sum, the merged parts, what is decoded, the code twice, the parts.
            let is_rounded = [true, true, false, true, true, true, is_right];
            assert_eq!(outputs.iter().map(|&levels| levels <= 256).collect::<Vec<_>>(), is_rounded);
        }
    }
}

/// Statistics that were kept before it was known where a kernel runs serve a run that leaves an output float.
#[test]
fn kept_statistics_serve_where_an_output_is_left_float() {
    let (first, last) = (noise(&[8, 3, 3, 3], 1.0), noise(&[4, 8, 1, 1], 2.0));
    let folder = Folder::new();
    let yaml = traced(&folder, &[16, 3, 9, 9], |x| convolve(&convolve(x, &first).relu(), &last).flatten(1, -1));
    let yaml = yaml.replace("activation_error_method: NOCLIPPING", "activation_error_method: HMSE");
    let yaml = yaml.replace("output: {dir: run}", "output: {dir: run, format: int8}");
    let plan = folder.write("kept.yaml", format!("{yaml}hessian: {{samples: 16, tolerance: 0.5}}\n"));
    let (plan, kept) = (plan.to_str().expect("text"), "kept.safetensors");
    tsquant(folder.path(), ["calibrate", plan, "--output", kept, "--quiet"]).succeeded();
    let float = "overrides=[{layers: conv2d_1, weights: float}]";
    tsquant(folder.path(), ["quantize", plan, "--statistics", kept, "--quiet", "--set", float]).succeeded();
    let report = folder.report("run");
    assert!(reason_of(&report, "conv2d_1.output").ends_with("it has no quantized weight"));
    assert!(report["warnings"].as_array().expect("a list").iter().all(|warning| !warning.to_string().contains("anew")));
}

/// A ReLU that joins no layer runs on the quantized tensor that it reads, and is not said to be in float; behind a float one it is.
#[test]
fn a_relu_behind_pooling_is_told_as_it_runs() {
    let (first, last) = (noise(&[8, 3, 3, 3], 1.0), noise(&[4, 8, 1, 1], 2.0));
    for (settings, is_float) in [(None, false), (Some("overrides=[{layers: conv2d_0, weights: float}]"), true)] {
        let folder = Folder::new();
        let yaml = traced(&folder, &[16, 3, 9, 9], |x| {
            let x = convolve(x, &first).max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false).relu();
            convolve(&x, &last)
        });
        let (report, int8) = int8_of_run(&folder, &yaml, settings.as_slice());
        let left = [&report["left_float"], &int8["in_float"]].map(|list| list.as_array().expect("a list"));
        assert!(left[0].iter().all(|left| left["name"] != "relu_0"), "{}", report["left_float"]);
        assert_eq!(left[1].iter().any(|left| left["name"] == "relu_0"), is_float, "{}", int8["in_float"]);
    }
}

/// So is one behind a float layer whose result something else reads too.
#[test]
fn a_relu_that_is_not_alone_in_reading_is_told_as_it_runs() {
    let (first, [left, right]) = (noise(&[8, 3, 3, 3], 1.0), [2.0, 3.0].map(|seed| noise(&[4, 8, 1, 1], seed)));
    for (settings, is_float) in [(None, false), (Some("overrides=[{layers: conv2d_0, weights: float}]"), true)] {
        let folder = Folder::new();
        let yaml = traced(&folder, &[16, 3, 9, 9], |x| {
            let x = convolve(x, &first);
            convolve(&x.relu(), &left) + convolve(&x, &right)
        });
        let (report, int8) = int8_of_run(&folder, &yaml, settings.as_slice());
        let is_listed = |list: &Value| list.as_array().expect("a list").iter().any(|left| left["name"] == "relu_0");
        assert_eq!(is_listed(&report["left_float"]) || is_listed(&int8["in_float"]), is_float, "{report}");
    }
}

/// With other bits than kernels take an output is simulated, and the run says so.
#[test]
fn outputs_of_other_bits_are_simulated() {
    let weights = [1.0, 2.0].map(|seed| noise(&[4, 3, 3, 3], seed));
    let folder = Folder::new();
    let yaml = traced(&folder, &[16, 3, 9, 9], |x| {
        let [a, b] = weights.each_ref().map(|weight| convolve(x, weight));
        a + b
    });
    let four = "overrides=[{layers: add_0, activations: {bits: 4}}]";
    let refusal = folder.quantize(&yaml, &["output.format=int8", four]);
    assert!(refusal.refused(1).contains("add_0.output"), "{refusal:?}");
    let (report, int8) = int8_of_run(&folder, &yaml, &[four, "output.strict=false"]);
    let warnings = report["warnings"].to_string();
    assert!(warnings.contains("add_0.output is returned in 4 bits"), "{warnings}");
    assert_eq!(count(&int8, "quantized::add"), 0, "{int8}");
    assert!(levels_of(&folder, &[16, 3, 9, 9]) <= 16);
}

/// A transposed convolution that makes an output is a site where the engine computes it.
#[test]
fn transposed_convolutions_that_make_outputs() {
    let none: Option<Tensor> = None;
    let (first, last) = (noise(&[8, 3, 3, 3], 1.0), noise(&[8, 4, 2, 2], 2.0));
    for name in ["onednn", "fbgemm"] {
        let Some(trial) = trial(name).filter(|trial| !trial.asks_for_7_bits()) else { continue };
        let folder = Folder::new();
        let yaml = traced(&folder, &[16, 3, 9, 9], |x| {
            let x = convolve(x, &first).relu();
            x.conv_transpose2d(&last, none.as_ref(), [2i64, 2], [0i64, 0], [0i64, 0], 1, [1i64, 1])
        });
        let (report, int8) = int8_of_run(&folder, &yaml, &[&format!("output.engine={name}")]);
        let is_right = trial.computes(Task::Transposed, false);
        assert_eq!(count(&int8, "quantized::conv_transpose2d"), u64::from(is_right), "{name}: {int8}");
        if is_right {
            assert_eq!(returned(&report), ["conv_transpose2d_0.output"]);
        } else {
            assert!(returned(&report).is_empty());
            let reason = reason_of(&report, "conv_transpose2d_0.output");
            assert!(reason.starts_with("an output of the model that is computed in float: the engine"), "{reason}");
        }
    }
}

/// What a convolution makes is returned in 8 bits, behind a view too; left float it is as it was.
#[test]
fn convolutions_that_make_outputs_run_in_8_bits() {
    let (first, last) = (noise(&[8, 3, 3, 3], 1.0), noise(&[4, 8, 1, 1], 2.0));
    let folder = Folder::new();
    let shapes: [fn(Tensor) -> Tensor; 4] =
        [|x| x, |x| x.pixel_shuffle(2), |x| x.permute([0, 2, 3, 1]).reshape([-1, 4]), |x| x.relu()];
    for shape in shapes {
        let yaml = traced(&folder, &[16, 3, 9, 9], |x| shape(convolve(&convolve(x, &first).relu(), &last)));
        let (report, int8) = int8_of_run(&folder, &yaml, &[]);
        let convolutions = ["", "_relu"].map(|end| count(&int8, &format!("quantized::conv2d{end}")));
        assert_eq!(convolutions.iter().sum::<u64>(), 2, "{int8}");
        assert_eq!(int8["in_float"].as_array().map(Vec::len), Some(0), "{int8}");
        assert_eq!(returned(&report), ["conv2d_1.output"]);
        let emitted = CModule::load(folder.path().join("run/quantized.pt")).expect("a model");
        let output = emitted.forward_ts(&[noise(&[2, 3, 9, 9], 5.0)]).expect("an output");
        assert_eq!(output.kind(), Kind::Float);
        let numbers = Vec::<f32>::try_from(output.flatten(0, -1)).expect("numbers");
        let levels = numbers.iter().map(|number| number.to_bits()).collect::<BTreeSet<_>>().len();
        assert!((2..=256).contains(&levels) && numbers.len() > 256, "{levels} levels");
    }
    let yaml = traced(&folder, &[16, 3, 9, 9], |x| convolve(&convolve(x, &first).relu(), &last));
    let float = "overrides=[{layers: 'conv2d_1', activations: float}]";
    let (report, int8) = int8_of_run(&folder, &yaml, &[float]);
    assert_eq!((count(&int8, "quantized::conv2d_relu"), count(&int8, "quantized::conv2d")), (1, 0), "{int8}");
    assert!(returned(&report).is_empty());
    // Its weight is in float: nothing makes 8 bits, so nothing is rounded.
    let float = "overrides=[{layers: 'conv2d_1', weights: float}]";
    let (report, int8) = int8_of_run(&folder, &yaml, &[float]);
    assert_eq!((count(&int8, "quantized::conv2d_relu"), count(&int8, "quantized::conv2d")), (1, 0), "{int8}");
    assert!(returned(&report).is_empty());
    let reason = "an output of the model that is computed in float: it has no quantized weight";
    assert_eq!(reason_of(&report, "conv2d_1.output"), reason);
    assert!(report["sites"].as_array().expect("sites").iter().all(|site| site["name"] != "conv2d_1.output"));
    // In float form outputs stay float.
    folder.quantize(&yaml, &[]).succeeded();
    let sites = folder.report("run")["sites"].to_string();
    assert!(!sites.contains("conv2d_1.output"), "{sites}");
}

/// A value that is returned among others and read too has the numbers that its reader has.
#[test]
fn an_output_that_is_read_is_returned_in_8_bits() {
    let (folder, model) = (Folder::new(), common::model("multi_io"));
    let inputs: Vec<String> = model.inputs.iter().map(|input| format!("{input}: {input}")).collect();
    let yaml = experiment(&model.path(), &model.data_path(), &format!("{{{}}}", inputs.join(", ")));
    let (report, int8) = int8_of_run(&folder, &yaml, &[]);
    assert_eq!(count(&int8, "quantized::conv2d_relu"), 1, "{int8}");
    assert_eq!(returned(&report), ["conv.output"]);
    // Computed in float it is what its readers read all the same.
    let (report, int8) = int8_of_run(&folder, &yaml, &["overrides=[{layers: conv, weights: float}]"]);
    assert_eq!(count(&int8, "quantized::conv2d_relu"), 0, "{int8}");
    assert_eq!(returned(&report), ["conv.output"]);
    // One for what the convolution makes, one for the mean of it, one for the sum that the model returns too.
    let ops = Module::load(&folder.path().join("run/quantized.pt")).expect("a model").op_counts().expect("ops");
    assert!(ops.contains(&("aten::fake_quantize_per_tensor_affine".to_owned(), 3)), "{ops:?}");
}
