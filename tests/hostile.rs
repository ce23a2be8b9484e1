//! Bad models, data, experiments and places: one clear line, the documented exit code, nothing written, never a crash.

mod binary;

use std::path::PathBuf;

use safetensors::Dtype;

use binary::{Folder, experiment, floats, safetensors_file, shipped, test_data, test_model, tsquant};

/// Asserts that a message holds all of `parts`.
fn assert_says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

/// An experiment of a model whose argument `x` is images of (3, 8, 8), with good data.
fn good() -> String {
    experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]")
}

/// `0.0, 0.01, …`: different finite numbers.
fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|index| index as f32 / 100.0).collect()
}

/// A path as an argument of the command line.
fn text(path: PathBuf) -> String {
    path.into_os_string().into_string().unwrap()
}

fn int64(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

// Models.

#[test]
fn what_is_no_torchscript_is_refused_by_name() {
    let folder = Folder::new();
    let cases: [(PathBuf, &str); 6] = [
        (folder.write("empty.pt", ""), "an empty file"),
        (folder.write("text.pt", "import torch"), "something that is no zip archive"),
        (test_model("state_dict"), "a state_dict"),
        (shipped("models/test/not_a_model.onnx"), "an ONNX model"),
        (test_data("frozen_cnn"), "a safetensors file"),
        (folder.write("half.pt", &fs_err::read(test_model("frozen_cnn")).unwrap()[..3000]), "truncated zip archive"),
    ];
    for (model, found) in cases {
        let line = folder.refuses(1, &experiment(&model, &test_data("frozen_cnn"), "[x]"), &[]);
        assert_says(&line, &[model.to_str().unwrap(), "expected a TorchScript file, found ", found, "; "]);
        let inspected = tsquant(folder.path(), ["inspect".as_ref(), model.as_os_str()]);
        assert_eq!((inspected.refused(1), inspected.stdout.as_str()), (line.as_str(), ""));
    }
}

#[test]
fn an_exported_program_is_refused_by_name() {
    // Beside a zip archive's ordinary parts it holds another archive, with the signs of an end of its own.
    let folder = Folder::new();
    let model = shipped("models/test/exported.pt2");
    let line = folder.refuses(1, &experiment(&model, &test_data("frozen_cnn"), "[x]"), &[]);
    assert_says(
        &line,
        &["expected a TorchScript file, found a program saved by torch.export (.pt2)", "torch.jit.trace"],
    );
}

#[test]
fn a_model_that_is_not_there_or_a_folder_is_a_wrong_experiment() {
    let folder = Folder::new();
    fs_err::create_dir(folder.path().join("folder")).unwrap();
    for (path, found) in [("none.pt", "found nothing at "), ("folder", "found the folder ")] {
        let line = folder.refuses(2, &good(), &[&format!("model.path={path}")]);
        assert_says(&line, &["`model.path`: expected a", found, folder.path().join(path).to_str().unwrap()]);
        let inspected = tsquant(folder.path(), ["inspect", path]);
        assert_says(inspected.refused(1), &[path]);
    }
}

#[test]
fn a_model_truncated_anywhere_is_refused() {
    let folder = Folder::new();
    let bytes = fs_err::read(test_model("frozen_cnn")).unwrap();
    let steps = (1..24).map(|step| step * bytes.len() / 24);
    for length in [1, 2, 4, 30, 64].into_iter().chain(steps).chain([bytes.len() - 22, bytes.len() - 1]) {
        let model = folder.write("model.pt", &bytes[..length]);
        let line = folder.refuses(1, &experiment(&model, &test_data("frozen_cnn"), "[x]"), &[]);
        assert_says(&line, &["model.pt: "]);
    }
}

#[test]
fn a_model_with_flipped_bytes_is_refused_or_runs() {
    let bytes = fs_err::read(test_model("frozen_cnn")).unwrap();
    let data = test_data("frozen_cnn");
    for step in 0..60 {
        let at = step * bytes.len() / 60;
        let mut damaged = bytes.clone();
        damaged[at] ^= [0x01, 0x80, 0xff][step % 3];
        let folder = Folder::new();
        let model = folder.write("model.pt", damaged);
        let ran = folder.quantize(&experiment(&model, &data, "[x]"), &[]);
        // Some bytes are padding, or numbers that may as well be others.
        if ran.code == Some(0) {
            assert!(folder.path().join("run/quantized.pt").is_file(), "byte {at}");
        } else {
            let line = ran.refused(1);
            assert_eq!(folder.listing(), ["e.yaml", "model.pt"], "byte {at}: {line}");
        }
    }
}

// Data.

#[test]
fn data_files_that_cannot_be_read_are_refused() {
    let folder = Folder::new();
    let bytes = fs_err::read(test_data("frozen_cnn")).unwrap();
    for length in [0, 1, 7, 8, 9, 40, 100, bytes.len() / 2, bytes.len() - 1] {
        let data = folder.write("data.safetensors", &bytes[..length]);
        let line = folder.refuses(1, &experiment(&test_model("frozen_cnn"), &data, "[x]"), &[]);
        assert_says(&line, &["data.safetensors"]);
    }
    // A header that promises more than any memory holds.
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let data = folder.write("data.safetensors", huge);
    assert_says(&folder.refuses(1, &experiment(&test_model("frozen_cnn"), &data, "[x]"), &[]), &["data.safetensors"]);

    for name in ["data.txt", "data.npz", "data.npy", "data"] {
        let data = folder.write(name, "1, 2, 3");
        let line = folder.refuses(1, &experiment(&test_model("frozen_cnn"), &data, "[x]"), &[]);
        assert_says(&line, &[data.to_str().unwrap()]);
    }
    let line = folder.refuses(2, &good(), &["calibration.data=none.npz"]);
    assert_says(&line, &["`calibration.data`: expected a file that exists, found nothing at ", "none.npz"]);
    fs_err::create_dir(folder.path().join("no images")).unwrap();
    let line = folder.refuses(1, &good(), &["calibration.data='no images'", "calibration.inputs=[images]"]);
    assert_says(&line, &["no images"]);
}

#[test]
fn the_nearest_tensor_name_is_suggested() {
    let folder = Folder::new();
    let data = folder.write("data.safetensors", floats("images", &[4, 3, 8, 8], &ramp(768)));
    let line = folder.refuses(2, &experiment(&test_model("frozen_cnn"), &data, "[image]"), &[]);
    let (place, problem) = line.split_once(": ").unwrap();
    assert!(place.contains("/e.yaml:2:"), "{line}");
    let expected = format!("{}: tensor `image` is missing, did you mean `images`?; there are `images`", data.display());
    assert_eq!(problem, format!("`calibration.inputs[0]`: {expected}"));
}

#[test]
fn tensors_that_do_not_fit_the_model_are_refused() {
    let folder = Folder::new();
    let ids = int64(&[7; 4 * 3 * 8 * 8]);
    let cases: [(&str, &str, Vec<u8>, &[&str]); 6] = [
        // Integers for images.
        (
            "frozen_cnn",
            "[x]",
            safetensors_file(&[("x", Dtype::I64, &[4, 3, 8, 8], &ids)]),
            &["x", "int64", "[4, 3, 8, 8]"],
        ),
        // Another number of channels, of axes, of features.
        ("frozen_cnn", "[x]", floats("x", &[4, 2, 8, 8], &ramp(512)), &["x", "[4, 2, 8, 8]"]),
        ("frozen_cnn", "[x]", floats("x", &[4, 3], &ramp(12)), &["x", "[4, 3]"]),
        ("stateful", "[x]", floats("x", &[4, 7], &ramp(28)), &["x", "[4, 7]"]),
        // Numbers with a fraction for token ids.
        ("tiny_encoder", "[x, x]", floats("x", &[4, 12], &ramp(48)), &["ids", "[4, 12]"]),
        // Token ids beyond the vocabulary.
        (
            "tiny_encoder",
            "[x, x]",
            safetensors_file(&[("x", Dtype::I64, &[4, 12], &int64(&[64; 48]))]),
            &["ids", "[4, 12]"],
        ),
    ];
    for (model, inputs, bytes, parts) in cases {
        let data = folder.write("data.safetensors", bytes);
        let line = folder.refuses(1, &experiment(&test_model(model), &data, inputs), &[]);
        assert_says(&line, parts);
        assert_says(&line, &["the model fails while it runs on "]);
    }
}

#[test]
fn values_that_are_not_finite_and_missing_rows_are_refused() {
    let folder = Folder::new();
    for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut values = ramp(8 * 192);
        // Row 6, which the check of the first rows has not seen.
        values[6 * 192 + 100] = bad;
        let data = folder.write("data.safetensors", floats("x", &[8, 3, 8, 8], &values));
        let line =
            folder.refuses(1, &experiment(&test_model("frozen_cnn"), &data, "[x]"), &["calibration.batch_size=4"]);
        assert_says(
            &line,
            &["data.safetensors: tensor `x`: expected finite float32 values", &format!("found {shown} in row 6")],
        );
    }
    let data = folder.write("data.safetensors", floats("x", &[0, 3, 8, 8], &[]));
    let line = folder.refuses(1, &experiment(&test_model("frozen_cnn"), &data, "[x]"), &[]);
    assert_says(&line, &["tensor `x`: expected at least one element, found shape [0, 3, 8, 8]"]);

    let line = folder.refuses(2, &good(), &["calibration.samples=17"]);
    assert_says(
        &line,
        &[
            "--set calibration.samples=17: `calibration.samples`: ",
            "expected at least 17 rows, as `samples` says, found 16",
        ],
    );
    let setting = "calibration.transform.mean=[1, 2]";
    let line = folder.refuses(2, &good(), &[setting]);
    assert_says(&line, &[&format!("--set {setting}: `calibration.transform.mean`: "), "`mean` expects"]);
}

#[test]
fn inputs_that_the_model_does_not_take_are_refused() {
    let folder = Folder::new();
    let inputs = |model: &str, inputs: &str| experiment(&test_model(model), &test_data(model), inputs);
    let refused = |model: &str, given: &str, parts: &[&str]| {
        let line = folder.refuses(2, &inputs(model, given), &[]);
        assert_says(&line, &["/e.yaml:2:", ": `calibration.inputs`: "]);
        assert_says(&line, parts);
    };
    refused("tiny_encoder", "{ids: ids, maks: mask}", &["`maks`", "did you mean `mask`?"]);
    refused("frozen_cnn", "[x, x]", &["1", "2"]);
    refused("tiny_encoder", "[ids]", &["mask"]);
    refused("control_flow", "{x: x, steps: {const: 1.5}}", &["steps", "int", "float"]);
    refused("control_flow", "{x: x, steps: x}", &["steps", "int"]);
    refused("tiny_encoder", "{ids: ids, mask: {const: 1}}", &["mask", "Tensor"]);
    // What evaluation takes from calibration was typed there, what it has of its own here.
    let evaluated = |inputs: &str| {
        let data = serde_json::to_string(&test_data("multi_io")).unwrap();
        format!("evaluation={{data: {data}{inputs}}}")
    };
    let line = folder.refuses(2, &inputs("tiny_encoder", "[ids, mask]"), &[&evaluated("")]);
    assert_says(&line, &["/e.yaml:2:", "`calibration.inputs[0]`: ", "multi_io.safetensors: tensor `ids` is missing"]);
    let line = folder.refuses(2, &inputs("tiny_encoder", "[ids, mask]"), &[&evaluated(", inputs: {ids: z}")]);
    assert_says(&line, &["--set evaluation=", ": `evaluation.inputs.ids`: ", "tensor `z` is missing"]);

    let (model, data) = (text(test_model("tiny_encoder")), text(test_data("tiny_encoder")));
    let with = |inputs: &str| tsquant(folder.path(), ["inspect", &model, "--data", &data, "--inputs", inputs]);
    assert_says(
        with("ids=ids,maks=mask").refused(2),
        &["--inputs ids=ids,maks=mask: `calibration.inputs`: ", "`maks`", "did you mean `mask`?"],
    );
    assert_says(
        with("ids,maks").refused(2),
        &["--inputs ids,maks: ", "tensor `maks` is missing", "did you mean `mask`?"],
    );
    assert_says(with("ids,mask=mask").refused(2), &["--inputs ids,mask=mask: ", "expected ARGUMENT=TENSOR for all"]);
}

/// Four images for the shipped network.
fn pixels() -> Vec<u8> {
    (0..4 * 784).map(|index| (index % 251) as u8).collect()
}

#[test]
fn labels_that_do_not_fit_are_refused() {
    let folder = Folder::new();
    let pixels = pixels();
    let images = ("images", Dtype::U8, &[4, 1, 28, 28][..], &pixels[..]);
    let data = folder.write("images.safetensors", safetensors_file(&[images]));
    let fractions: Vec<u8> = ramp(4).iter().flat_map(|value| value.to_le_bytes()).collect();
    let cases = [
        (Dtype::I64, vec![4], int64(&[0, 9, 10, 3]), ["labels below 10", "found 10"]),
        (Dtype::I64, vec![4, 1, 1], int64(&[0, 1, 2, 3]), ["labels of shape [4, 1, 1]", "an output of shape [4, 10]"]),
        (Dtype::I64, vec![5], int64(&[0, 1, 2, 3, 4]), ["expected 4 rows", "found 5"]),
        (Dtype::I64, vec![1, 4], int64(&[0, 1, 2, 3]), ["expected 4 rows", "found 1"]),
        (Dtype::F32, vec![4], fractions, ["class indices", "float32"]),
    ];
    let yaml = experiment(&shipped("models/mnist_resnet.pt"), &data, "[images]");
    for (dtype, shape, bytes, parts) in cases {
        folder.write("labelled.safetensors", safetensors_file(&[images, ("labels", dtype, &shape, &bytes)]));
        let setting = "evaluation={data: labelled.safetensors, labels: labels}";
        let line = folder.refuses(2, &yaml, &[setting]);
        assert_says(&line, &[&format!("--set {setting}: `evaluation.labels`: ")]);
        assert_says(&line, &parts);
        let line = folder.refuses(2, &yaml, &["evaluation={data: labelled.safetensors, labels: label}"]);
        assert_says(&line, &["`evaluation.labels`: ", "tensor `label` is missing, did you mean `labels`?"]);
    }
}

#[test]
fn a_row_with_a_negative_label_alone_is_refused() {
    // It can never be right: accuracy would fall without a word.
    let folder = Folder::new();
    let (pixels, labels) = (pixels(), int64(&[0, -1, 2, 3]));
    let tensors = [("images", Dtype::U8, &[4, 1, 28, 28][..], &pixels[..]), ("labels", Dtype::I64, &[4], &labels)];
    let data = folder.write("labelled.safetensors", safetensors_file(&tensors));
    let yaml = experiment(&shipped("models/mnist_resnet.pt"), &data, "[images]");
    let line = folder.refuses(2, &yaml, &["evaluation={data: labelled.safetensors, labels: labels}"]);
    assert_says(&line, &["`evaluation.labels`: ", "-1"]);
}

#[test]
fn pipes_are_refused_instead_of_waited_for() {
    let folder = Folder::new();
    for name in ["model.pt", "data.safetensors", "images/a.png"] {
        fs_err::create_dir_all(folder.path().join("images")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(folder.path().join(name)).status().unwrap();
        assert!(made.success());
    }
    for (setting, name) in
        [("model.path=model.pt", "model.pt"), ("calibration.data=data.safetensors", "data.safetensors")]
    {
        let line = folder.refuses(1, &good(), &[setting]);
        assert_says(&line, &[folder.path().join(name).to_str().unwrap(), "a pipe or device"]);
    }
    let line = folder.refuses(1, &good(), &["calibration.data=images", "calibration.inputs=[images]"]);
    assert_says(&line, &["images/a.png: expected a file, found a pipe or device"]);
}

// Experiments and command lines.

#[test]
fn a_line_break_in_a_name_and_a_repeated_cause_make_no_longer_error() {
    let folder = Folder::new();
    let line = tsquant(folder.path(), ["inspect", "a\nb.pt"]).refused(1).to_owned();
    assert_eq!(line, "a\\nb.pt: No such file or directory (os error 2)");
}

#[test]
fn a_wrong_experiment_exits_with_2() {
    let folder = Folder::new();
    let with = |from: &str, to: &str| {
        let text = good();
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    let cases: &[(String, &[&str])] = &[
        (
            with("inputs: [x]", "inputs: [x], batchsize: 4"),
            &["e.yaml:2:", "unknown key `batchsize`", "did you mean `batch_size`?"],
        ),
        (
            good() + "mixed_precision: {}\n",
            &["e.yaml:5:18: `mixed_precision`: expected `weights`, `activations` or both"],
        ),
        (good() + "hessian: {probes: 0}\n", &["e.yaml:5:19: `hessian.probes`: expected a whole number from 1"]),
        (
            with("weights_error_method: NOCLIPPING", "weights: {bits: 9}, weights_error_method: KL"),
            &[
                "e.yaml:3:58: `quantization.weights_error_method`: KL chooses for at most 8 bits",
                "found 9 in `quantization.weights.bits`",
            ],
        ),
        (with("dir: run", "dir: run, strict: false"), &["`output.strict`: it is for the format int8"]),
        (good() + "device: gpu\n", &["`device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found `gpu`"]),
        (good() + "seed: -1\n", &["`seed` must be a whole number"]),
        (with(", inputs: [x]", ""), &["`calibration.inputs` is missing"]),
        (with("model: {path", "modell: {path"), &["unknown key `modell`", "did you mean `model`?"]),
        (with("dir: run", "dir: ''"), &["`output.dir`: expected a path, found an empty text"]),
        (good() + "model: {}\n", &["e.yaml:5:1: `model` is given twice"]),
        (with("[x]", "[x"), &["e.yaml:", "not valid YAML"]),
        (String::new(), &["the file is empty"]),
    ];
    for (yaml, parts) in cases {
        assert_says(&folder.refuses(2, yaml, &[]), parts);
    }
    for (setting, part) in [
        ("seed", "expected KEY=VALUE such as `quantization.weights.bits=4`, found no `=`"),
        ("quantization.weights.bits=1", "bits must be from 2 to 16, found 1"),
        ("quantization.weights.bit=4", "unknown key `bit` in `quantization.weights`, did you mean `bits`?"),
        ("calibration.samples=0", "`calibration.samples`"),
        ("quantization.activation_error_method=mse", "found `mse`, did you mean `MSE`?"),
        ("quantization.l_p_value=0", "`quantization.l_p_value`: expected a whole number from 1 to 64, found 0"),
        ("quantization.z_threshold=-1", "standard deviations above 0, found -1.0"),
        ("calibration.inputs={x: {const: 1}}", "expected at least one tensor, found constants alone"),
    ] {
        assert_says(&folder.refuses(2, &good(), &[setting]), &[&format!("--set {setting}: "), part]);
    }
}

#[test]
fn a_wrong_command_line_exits_with_2() {
    let folder = Folder::new();
    let model = text(test_model("frozen_cnn"));
    let missing = tsquant(folder.path(), ["quantize", "none.yaml"]);
    assert_says(missing.refused(2), &["none.yaml: cannot be read: "]);
    let data = text(test_data("frozen_cnn"));
    let flags = ["inspect", &model, "--data", &data, "--inputs", "x", "--transform", "{scale: .nan}"];
    let expected = "--transform {scale: .nan}: `calibration.transform.scale`: expected a finite number";
    assert_says(tsquant(folder.path(), flags).refused(2), &[expected]);
    // The words of these are clap's, and more than one line.
    let lines: [&[&str]; 7] = [
        &[],
        &["quantise", "e.yaml"],
        &["quantize"],
        &["quantize", "e.yaml", "--set"],
        &["quantize", "e.yaml", "--verbose"],
        &["inspect", &model, "--data", &data],
        &["inspect", &model, "--json", "--graph"],
    ];
    for arguments in lines {
        let ran = tsquant(folder.path(), arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(ran.stderr.contains("--help"), "{arguments:?}: {}", ran.stderr);
    }
    assert_eq!(folder.listing(), [""; 0]);
}

// Places.

#[test]
fn a_place_that_cannot_be_written_is_refused() {
    let folder = Folder::new();
    folder.write("file", "kept");
    // Below a file nobody can write, root neither.
    for dir in ["file/run", "file/a/b/run"] {
        let line = folder.refuses(1, &good(), &[&format!("output.dir={dir}")]);
        assert_says(&line, &[folder.path().join("file").to_str().unwrap(), "expected a folder", "found a file"]);
    }
    assert_eq!(fs_err::read_to_string(folder.path().join("file")).unwrap(), "kept");
    // Nor there, whoever it is.
    let line = folder.refuses(1, &good(), &["output.dir=/proc/none/run"]);
    assert_says(&line, &["/proc/none: cannot write the run directory"]);
    let line = folder.refuses(1, &good(), &["output.dir=."]);
    assert_says(&line, &["found a directory that no run of tsquant made"]);
}

#[test]
fn a_failing_run_leaves_no_folder_that_it_made() {
    let folder = Folder::new();
    folder.refuses(2, &good(), &["calibration.samples=17", "output.dir=a/b/run"]);
    fs_err::create_dir_all(folder.path().join("a")).unwrap();
    folder.refuses(2, &good(), &["calibration.inputs=[y]", "output.dir=a/b/run"]);
    // An earlier run stays as it was.
    folder.quantize(&good(), &[]).succeeded();
    let before = fs_err::read(folder.path().join("run/report.json")).unwrap();
    folder.refuses(2, &good(), &["calibration.samples=17"]);
    assert_eq!(fs_err::read(folder.path().join("run/report.json")).unwrap(), before);
}

#[test]
fn an_error_is_the_last_line_after_the_progress() {
    let folder = Folder::new();
    folder.write("e.yaml", good());
    let ran = tsquant(folder.path(), ["quantize", "e.yaml", "--set", "calibration.samples=17"]);
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert!(
        ran.code == Some(2) && lines[0] == "load" && lines[1].starts_with("error: ") && lines.len() == 2,
        "{ran:?}"
    );
    assert_eq!((folder.listing(), ran.stdout.as_str()), (vec!["e.yaml".to_owned()], ""));
}
