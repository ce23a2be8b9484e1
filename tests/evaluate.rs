//! `tsquant evaluate` from end to end: run directories, experiments and flags alone lead to the same numbers, which are those
//! of the report; every output can be ranked; what is wrong is one line.

mod binary;

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

use binary::{Folder, Ran, experiment, safetensors_file, shipped, test_data, test_model, tsquant};

fn evaluate(folder: &Path, arguments: &[&str]) -> Ran {
    tsquant(folder, ["evaluate"].iter().chain(arguments))
}

/// What `evaluate --json --quiet` prints.
fn measures(folder: &Path, arguments: &[&str]) -> Value {
    let ran = evaluate(folder, &[arguments, &["--json", "--quiet"]].concat()).succeeded();
    assert_eq!(ran.stderr, "");
    serde_json::from_str(&ran.stdout).expect("JSON")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

/// A short run of the shipped experiment in `run`.
fn quantize_shipped(folder: &Folder) {
    let dir = format!("output.dir={}", folder.path().join("run").display());
    let settings = ["calibration.samples=32", "evaluation.samples=64", &dir];
    let settings = settings.into_iter().flat_map(|setting| ["--set", setting]);
    tsquant(&shipped(""), ["quantize", "configs/mnist_resnet.yaml", "--quiet"].into_iter().chain(settings)).succeeded();
}

/// The executor of libtorch rounds otherwise than the op-by-op run that the report comes from.
fn assert_near(measures: &Value, report: &Value) {
    for model in ["float", "quantized"] {
        for accuracy in ["top1", "top5"] {
            let (found, expected) = (&measures[model][accuracy], &report[model][accuracy]);
            assert!((number(found) - number(expected)).abs() <= 1.0 / 64.0, "{model} {accuracy}: {found} {expected}");
        }
    }
    let (found, expected) = (&measures["quantized"], &report["quantized"]);
    assert!((number(&found["sqnr_db"]) - number(&expected["sqnr_db"])).abs() < 0.5, "{found} {expected}");
    assert_eq!(found["rows"], expected["rows"]);
}

#[test]
fn run_directory_experiment_and_flags_lead_to_the_same_numbers() {
    let folder = Folder::new();
    quantize_shipped(&folder);
    let of_run = measures(folder.path(), &["run"]);
    assert_near(&of_run["evaluation"], &folder.report("run")["evaluation"]);
    assert_eq!(of_run["model"], json!(folder.path().join("run/quantized.pt")));
    assert_eq!(of_run["reference"], json!(shipped("models/mnist_resnet.pt")));
    assert_eq!(of_run["data"], json!(shipped("models/mnist_evaluation.safetensors")));
    assert_eq!((&of_run["schema"], &of_run["warnings"]), (&json!(1), &json!([])));
    assert_eq!(of_run["versions"]["tsquant"], json!(env!("CARGO_PKG_VERSION")));

    let of_experiment = measures(folder.path(), &["run/experiment.yaml", "--model", "run/quantized.pt"]);
    assert_eq!(of_experiment, of_run);
    let (float, data) = (shipped("models/mnist_resnet.pt"), shipped("models/mnist_evaluation.safetensors"));
    let transform = "{scale: 0.00392156862745098, mean: [0.1307], std: [0.3081]}";
    let flags = [
        ["--model", "run/quantized.pt"],
        ["--reference", float.to_str().unwrap()],
        ["--data", data.to_str().unwrap()],
        ["--inputs", "images"],
        ["--labels", "labels"],
        ["--samples", "64"],
        ["--transform", transform],
    ];
    assert_eq!(measures(folder.path(), &flags.concat()), of_run);

    let ran = evaluate(folder.path(), &["run", "--samples", "40", "--metrics", "top5,cosine"]).succeeded();
    assert_eq!(ran.stderr, "load\nevaluate: 40 rows\n");
    for part in ["40 rows of evaluation data", "top-5 accuracy", "cosine similarity", "model file"] {
        assert!(ran.stdout.contains(part), "{part} is not in {}", ran.stdout);
    }
    assert!(!ran.stdout.contains("top-1") && !ran.stdout.contains("SQNR"), "{}", ran.stdout);
    // A moved run is compared with its own model, not with what is in the place where it was made.
    fs_err::rename(folder.path().join("run"), folder.path().join("moved")).unwrap();
    assert_eq!(measures(folder.path(), &["moved"])["evaluation"], of_run["evaluation"]);
}

#[test]
fn a_model_alone_has_an_accuracy() {
    let folder = Folder::new();
    let (float, data) = (shipped("models/mnist_resnet.pt"), shipped("models/mnist_evaluation.safetensors"));
    let transform = "{scale: 0.00392156862745098, mean: [0.1307], std: [0.3081]}";
    let (float, data) = (float.to_str().unwrap(), data.to_str().unwrap());
    let flags = ["--model", float, "--data", data, "--inputs", "images", "--samples", "64", "--transform", transform];
    let found = measures(folder.path(), &[&flags[..], &["--labels", "labels"]].concat());
    assert_eq!((&found["reference"], &found["float_bytes"]), (&Value::Null, &Value::Null));
    assert!(number(&found["evaluation"]["quantized"]["top1"]) > 0.95, "{found}");
    assert_eq!(found["evaluation"]["quantized"]["rows"], json!(64));
    let ran = evaluate(folder.path(), &[&flags[..], &["--labels", "labels", "--quiet"]].concat()).succeeded();
    assert!(ran.stdout.contains("top-1 accuracy") && !ran.stdout.contains("agreement"), "{}", ran.stdout);
    let refused = evaluate(folder.path(), &flags);
    assert!(refused.refused(2).starts_with("tsquant evaluate: `evaluation.labels` is missing"));
    let refused = evaluate(folder.path(), &[&flags[..], &["--labels", "label"]].concat());
    let line = refused.stderr.lines().last().unwrap();
    assert!(line.starts_with("error: --labels label: `evaluation.labels`: "), "{line}");
    assert!(refused.code == Some(2) && line.contains("tensor `label` is missing, did you mean `labels`?"), "{line}");
}

#[test]
fn any_output_is_ranked_by_quantize_and_evaluate() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("multi_io"), &test_data("multi_io"), "{x: x, y: y}");
    let section = |output: &str| {
        format!("evaluation={{data: {}, output: {output}}}", serde_json::to_string(&test_data("multi_io")).unwrap())
    };
    let setting = section("no_such_output");
    let refusal = folder.refuses(2, &yaml, &[&setting]);
    let expected = ": `evaluation.output`: the model has no output `no_such_output`";
    assert!(refusal.starts_with("--set evaluation=") && refusal.contains(expected), "{refusal}");
    let (_, known) = refusal.split_once("expected one of ").unwrap();
    let names: Vec<_> = known.split(", ").map(|name| name.trim_matches('`').to_owned()).collect();
    assert!(names.len() > 1, "{names:?}");
    let mut ranked = 0;
    for (index, name) in names.iter().enumerate() {
        let quoted = section(&format!("'{name}'"));
        let ran = folder.quantize(&yaml, &[&quoted]);
        if ran.code == Some(2) {
            assert!(ran.error_line().contains("expected an output of floating-point numbers"), "{ran:?}");
            continue;
        }
        ranked += 1;
        let by_path = folder.report("run")["evaluation"].clone();
        let written = fs_err::read_to_string(folder.path().join("run/experiment.yaml")).unwrap();
        assert!(written.contains("\n  output: "), "{written}");
        folder.quantize(&yaml, &[&section(&index.to_string())]).succeeded();
        assert_eq!(folder.report("run")["evaluation"], by_path, "{name}");
        let of_files = measures(folder.path(), &["run", "--output", name]);
        assert_eq!(of_files["evaluation"]["quantized"]["agreement"], by_path["quantized"]["agreement"], "{name}");
    }
    assert!(ranked > 1, "{ranked}");
    let refused = evaluate(folder.path(), &["run", "--output", "nothing", "--quiet"]);
    assert!(refused.refused(2).starts_with("--output nothing: `evaluation.output`: the model has no output `nothing`"));
}

#[test]
fn constants_and_names_among_inputs() {
    let folder = Folder::new();
    let inputs = "{x: x, scale: {const: 2.0}, shift: {const: -1}}";
    folder.quantize(&experiment(&test_model("multi_io"), &test_data("multi_io"), inputs), &[]).succeeded();
    let (model, data) = (test_model("multi_io"), test_data("multi_io"));
    let flags = [
        ["--model", "run/quantized.pt"],
        ["--reference", model.to_str().unwrap()],
        ["--data", data.to_str().unwrap()],
        ["--inputs", "x=x,scale=const:2.0,shift=const:-1"],
    ];
    let of_flags = measures(folder.path(), &flags.concat());
    let of_run = measures(folder.path(), &["run"]);
    assert_eq!(
        (&of_flags["evaluation"]["data"], &of_run["evaluation"]["data"]),
        (&json!("evaluation"), &json!("calibration"))
    );
    assert_eq!(of_flags["evaluation"]["quantized"], of_run["evaluation"]["quantized"]);
}

/// The index of the largest value in each group of `classes` values, the first where several are.
fn answers(values: &[u8], classes: usize) -> Vec<i64> {
    let floats: Vec<f32> =
        values.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect();
    let first_largest = |row: &[f32]| (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("a class");
    floats.chunks_exact(classes).map(|row| i64::try_from(first_largest(row)).expect("a class")).collect()
}

#[test]
fn labels_per_position() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("multi_io"), &test_data("multi_io"), "{x: x, y: y}");
    folder.quantize(&yaml, &["quantization.activations.bits=3"]).succeeded();
    let bytes = fs_err::read(test_data("multi_io")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let of = |name: &str| tensors.tensor(name).unwrap();
    let (x, y, features) = (of("x"), of("y"), of("expected.1.features"));
    let [places @ .., classes] = features.shape() else { panic!("no axis") };
    let right = answers(features.data(), *classes);
    let measured = |labels: &[i64]| {
        let labels: Vec<u8> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        let file = safetensors_file(&[
            ("x", Dtype::F32, x.shape(), x.data()),
            ("y", Dtype::F32, y.shape(), y.data()),
            ("labels", Dtype::I64, places, &labels),
        ]);
        folder.write("labelled.safetensors", file);
        let flags = ["run", "--data", "labelled.safetensors", "--labels", "labels", "--output", "1.features"];
        measures(folder.path(), &flags)["evaluation"].clone()
    };
    let all = measured(&right);
    assert!(number(&all["float"]["top1"]) > 0.99, "{all}");
    let agreement = number(&all["quantized"]["agreement"]);
    assert!((number(&all["quantized"]["top1"]) - agreement).abs() < 0.01 && agreement < 1.0, "{all}");
    // Wrong labels for the second half, then none for it: what is padding does not count.
    let half = |label: i64| {
        let mut labels = right.clone();
        for wrong in &mut labels[right.len() / 2..] {
            *wrong = if label < 0 { label } else { (*wrong + label) % i64::try_from(*classes).expect("few classes") };
        }
        measured(&labels)
    };
    assert!((number(&half(1)["float"]["top1"]) - 0.5).abs() < 0.01);
    assert!(number(&half(-1)["float"]["top1"]) > 0.99);
}

#[test]
fn a_wrong_command_line_is_one_line() {
    let folder = Folder::new();
    folder.quantize(&experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]"), &[]).succeeded();
    folder
        .write("e.yaml", experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]").replace("run", "none"));
    for (arguments, expected) in [
        (&["run", "--samples", "0"][..], "--samples 0: `evaluation.samples`: expected a whole number from 1"),
        (&["run", "--metrics", "top1"], "--metrics top1: `evaluation.metrics[0]`: top1 needs labels"),
        (&["run", "--inputs", "x=a,b"], "--inputs x=a,b: `evaluation.inputs`: expected ARGUMENT=TENSOR for all"),
        (&["run", "--reference", "no.pt"], "--reference no.pt: `model.path`: expected a file that exists"),
        (&["run", "--model", "no.pt"], "--model: expected a file, found none at no.pt"),
        (&["run", "--transform", "{men: 1}"], "--transform {men: 1}: unknown key `men` in `evaluation.transform`"),
        (&["e.yaml"], "expected --model, or quantized.pt in the run directory "),
    ] {
        let ran = evaluate(folder.path(), &[arguments, &["--quiet"]].concat());
        let line = ran.refused(2);
        assert!(line.starts_with(expected), "{line}");
    }
    let ran = evaluate(folder.path(), &["nowhere", "--quiet"]);
    assert!(ran.refused(2).contains("nowhere: cannot be read"), "{ran:?}");
    // What clap says of missing flags has several lines.
    let ran = evaluate(folder.path(), &["--model", "run/quantized.pt"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("--data <FILE>") && ran.stderr.contains("--inputs"), "{ran:?}");
}

#[test]
fn models_that_return_other_things_are_not_compared() {
    let folder = Folder::new();
    let (data, float) = (test_data("frozen_cnn"), test_model("frozen_cnn"));
    let other = test_model("multi_io");
    let flags = [
        ["--model", other.to_str().unwrap()],
        ["--reference", float.to_str().unwrap()],
        ["--data", data.to_str().unwrap()],
        ["--inputs", "x"],
    ];
    let ran = evaluate(folder.path(), &[&flags.concat()[..], &["--quiet"]].concat());
    let said = "evaluation: output of the quantized model is missing, that of the float model [16, 5]";
    assert_eq!(ran.refused(1), said);
}

#[test]
fn inspect_shows_where_an_emitted_model_comes_from() {
    let folder = Folder::new();
    quantize_shipped(&folder);
    let report = folder.report("run");
    let text = tsquant(folder.path(), ["inspect", "run/quantized.pt"]).succeeded().stdout;
    let version = env!("CARGO_PKG_VERSION");
    assert!(text.contains(&format!("quantized by tsquant {version} on torch 2.11")), "{text}");
    assert!(text.contains("16 quantized weights, 23 quantized activations") && text.contains("seed 0"), "{text}");
    for hash in report["hashes"].as_object().unwrap().values() {
        assert!(text.contains(hash.as_str().unwrap()), "{hash} is not in {text}");
    }
    for list in ["sites", "left_float"] {
        for item in report[list].as_array().unwrap() {
            assert!(text.contains(item["name"].as_str().unwrap()), "{item} is not in {text}");
        }
    }
    assert!(!text.contains("fake_quantize_per_tensor_affine_0.output"), "{text}");
    let json = tsquant(folder.path(), ["inspect", "run/quantized.pt", "--json"]).succeeded().stdout;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    for key in ["sites", "hashes", "versions", "seed", "left_float"] {
        assert_eq!(json["quantized"][key], report[key], "{key}");
    }
    assert_eq!(json["sites"], Value::Null);
}
