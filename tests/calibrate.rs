//! Statistics as files: what starts from them is what calibration gives, in one process or in shards of it, and whatever does
//! not belong to them is refused.

mod binary;
mod damage;

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use binary::{BINARY, Folder, Ran, experiment, in_folder, shipped, test_data, test_model, tsquant};
use damage::Random;
use safetensors::SafeTensors;
use serde_json::Value;

/// A folder with the experiment `e.yaml` of a test model: its data twice, once to calibrate and once to evaluate.
fn folder(model: &str, inputs: &str, more: &str) -> Folder {
    let folder = Folder::new();
    let data = fs_err::read(test_data(model)).unwrap();
    let (calibration, evaluation) = (folder.write("data.safetensors", &data), folder.write("other.safetensors", &data));
    let text = experiment(&test_model(model), &calibration, &format!("{inputs}, batch_size: 4"));
    let evaluation = serde_json::to_string(&evaluation).unwrap();
    folder.write("e.yaml", format!("{text}evaluation: {{data: {evaluation}, inputs: {inputs}}}\n{more}"));
    folder
}

fn run(folder: &Folder, words: &[&str]) -> Ran {
    tsquant(folder.path(), words.iter().copied().chain(["--quiet"]))
}

fn bytes(folder: &Folder, name: &str) -> Vec<u8> {
    fs_err::read(folder.path().join(name)).unwrap()
}

/// The report of a run into `run`.
fn quantized(folder: &Folder, words: &[&str]) -> Value {
    run(folder, &[&["quantize", "e.yaml"], words].concat()).succeeded();
    folder.report("run")
}

/// What a report says but for times and the word on statistics.
fn told(report: &Value) -> Value {
    let mut told = report.clone();
    for key in ["timings_s", "peak_memory_bytes"] {
        told.as_object_mut().unwrap().remove(key);
    }
    told["warnings"].as_array_mut().unwrap().retain(|line| !line.as_str().unwrap().contains(" are those "));
    if let Some(hessian) = told["hessian"].as_object_mut() {
        hessian.remove("reused");
    }
    told
}

/// Fails where reports differ but for what a bias adds, which has to be the same but for rounding: sums of what an op reads are
/// summed up by channel where a value is a site, and batch by batch where it is none. Whether it is the same.
fn check_same(found: &Value, expected: &Value, shown: &str) -> bool {
    let added = |report: &Value| -> Vec<f64> {
        let layers = report["bias_correction"]["layers"].as_array().into_iter().flatten();
        layers.flat_map(|layer| layer["added"].as_array().unwrap().iter().map(|it| it.as_f64().unwrap())).collect()
    };
    let (a, b) = (added(found), added(expected));
    assert_eq!(a.len(), b.len(), "{shown}");
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-5 * (1e-3 + b.abs())), "{shown}: {a:?} {b:?}");
    let (found, expected) = (told(found), told(expected));
    for (key, value) in expected.as_object().unwrap() {
        let depends_on_biases = ["evaluation", "bias_correction", "files"].contains(&key.as_str());
        assert!(&found[key] == value || (a != b && depends_on_biases), "{shown}: {key}: {} {value}", found[key]);
    }
    a == b
}

fn warnings(report: &Value) -> String {
    report["warnings"].as_array().unwrap().iter().map(|line| line.as_str().unwrap().to_owned() + "\n").collect()
}

const MODELS: [(&str, &str); 7] = [
    ("small_conv", "[x]"),
    ("tiny_encoder", "[ids, mask]"),
    ("multi_io", "[x, y]"),
    ("control_flow", "[x]"),
    ("recurrent", "[x]"),
    ("conv_zoo", "[x]"),
    ("in_place", "[x]"),
];

#[test]
fn kept_statistics_give_what_calibration_gives_without_the_data() {
    for (model, inputs) in &MODELS[..4] {
        let folder = folder(model, inputs, "");
        run(&folder, &["calibrate", "e.yaml", "-o", "kept.safetensors"]).succeeded();
        for settings in [
            vec!["quantization.weights.bits=4", "quantization.activation_error_method=MSE"],
            vec!["quantization.weights_error_method=KL", "quantization.z_threshold=4"],
            vec!["overrides=[{layers: '**', inputs: float, activations: float}]"],
            vec!["quantization.weights_bias_correction=none"],
        ] {
            let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
            let expected = quantized(&folder, &settings);
            let model_file = bytes(&folder, "run/quantized.pt");
            let data = folder.path().join("data.safetensors");
            fs_err::rename(&data, folder.path().join("away")).unwrap();
            let found = quantized(&folder, &[&settings[..], &["--statistics", "kept.safetensors"]].concat());
            fs_err::rename(folder.path().join("away"), &data).unwrap();
            let same = check_same(&found, &expected, &format!("{model} {settings:?}"));
            let is_same_model = bytes(&folder, "run/quantized.pt") == model_file;
            assert!((same && is_same_model) || settings[1].contains("float"), "{model} {settings:?}");
            assert!(warnings(&found).contains("kept.safetensors; the data itself was not looked at"), "{model}");
        }
    }
}

/// Where other branches run on the evaluation data the sites are those of the calibration data all the same.
#[test]
fn what_the_evaluation_data_shows_does_not_matter() {
    for model in ["control_flow", "small_conv"] {
        let folder = folder(model, "[x]", "");
        let data = fs_err::read(test_data(model)).unwrap();
        let data = SafeTensors::deserialize(&data).unwrap();
        let x = data.tensor("x").unwrap();
        let negated: Vec<f32> = numbers(&data, "x").into_iter().map(|x| -x as f32).collect();
        folder.write("other.safetensors", binary::floats("x", x.shape(), &negated));
        run(&folder, &["calibrate", "e.yaml", "-o", "kept.safetensors"]).succeeded();
        let expected = quantized(&folder, &[]);
        fs_err::remove_file(folder.path().join("data.safetensors")).unwrap();
        let found = quantized(&folder, &["--statistics", "kept.safetensors"]);
        assert!(check_same(&found, &expected, model));
    }
}

/// Without evaluation data the models are compared on the calibration data, which then has to be the same.
#[test]
fn the_data_is_looked_at_where_it_is_needed() {
    let folder = folder("small_conv", "[x]", "");
    let without = ["--set", "evaluation="];
    run(&folder, &[&["calibrate", "e.yaml", "-o", "kept.safetensors"][..], &without].concat()).succeeded();
    let expected = quantized(&folder, &without);
    let statistics = [&without[..], &["--statistics", "kept.safetensors"]].concat();
    let found = quantized(&folder, &statistics);
    assert_eq!(told(&found), told(&expected));
    assert!(warnings(&found).contains("kept.safetensors; the data itself is the same"));
    let mut damaged = bytes(&folder, "data.safetensors");
    *damaged.last_mut().unwrap() ^= 1;
    folder.write("data.safetensors", damaged);
    let refused = run(&folder, &[&["quantize", "e.yaml"], &statistics[..]].concat());
    let line = refused.refused(1);
    assert!(line.contains("data.safetensors: expected the data that the statistics were collected on"), "{line}");
    fs_err::remove_file(folder.path().join("data.safetensors")).unwrap();
    let line = run(&folder, &[&["quantize", "e.yaml"], &statistics[..]].concat()).refused(1).to_owned();
    assert!(line.contains("data.safetensors: "), "{line}");
}

#[test]
fn what_differs_is_named() {
    let folder = folder("small_conv", "[x]", "");
    run(&folder, &["calibrate", "e.yaml", "-o", "kept.safetensors"]).succeeded();
    let other = serde_json::to_string(&test_model("mlp")).unwrap();
    let data = serde_json::to_string(&folder.path().join("data.safetensors")).unwrap();
    for (setting, expected) in [
        ("calibration.batch_size=8".to_owned(), "`calibration.batch_size` is 8 here and 4 there"),
        ("calibration.samples=5".to_owned(), "`calibration.samples` is 5 here and null there"),
        ("calibration.transform={scale: 0.5}".to_owned(), "`calibration.transform` is {"),
        (format!("calibration={{data: {data}, inputs: {{x: x}}, batch_size: 4}}"), "`calibration.inputs` is {"),
        ("calibration.shuffle=true".to_owned(), "`calibration.shuffle` is true here and false there"),
        (format!("model.path={other}"), "the SHA-256 of the model is "),
    ] {
        let mut words = vec!["quantize", "e.yaml", "--statistics", "kept.safetensors", "--set", &setting];
        if setting.starts_with("model") {
            words.extend(["--set", "evaluation.inputs=[x]"]);
        }
        let before = folder.listing();
        let refused = run(&folder, &words);
        // The data of one model is none of another's.
        if !refused.stderr.contains("expected statistics") && setting.starts_with("model") {
            continue;
        }
        let line = refused.refused(1);
        assert!(line.contains("kept.safetensors: expected statistics of this model, data and experiment"), "{line}");
        assert!(line.contains(expected), "{setting}: {line}");
        assert_eq!(folder.listing(), before);
    }
    // A seed counts where it draws.
    quantized(&folder, &["--statistics", "kept.safetensors", "--set", "seed=5"]);
    let shuffled = ["--set", "calibration.shuffle=true", "--set", "calibration.samples=6"];
    run(&folder, &[&["calibrate", "e.yaml", "-o", "kept.safetensors"][..], &shuffled].concat()).succeeded();
    let seed = [&["quantize", "e.yaml", "--statistics", "kept.safetensors", "--set", "seed=5"][..], &shuffled].concat();
    let refused = run(&folder, &seed);
    assert!(refused.refused(1).contains("`seed` is 5 here and 0 there"), "{refused:?}");
}

/// A copy of a model with another byte is another model.
#[test]
fn another_model_file_is_refused() {
    let folder = folder("small_conv", "[x]", "");
    run(&folder, &["calibrate", "e.yaml", "-o", "kept.safetensors"]).succeeded();
    run(&folder, &["quantize", "e.yaml"]).succeeded();
    let words = ["quantize", "e.yaml", "--statistics", "kept.safetensors", "--set", "model.path=run/quantized.pt"];
    let refused = run(&folder, &[&words[..], &["--set", "output.dir=again"]].concat());
    assert!(refused.refused(1).contains("the SHA-256 of the model is "), "{refused:?}");
}

#[test]
fn sites_that_were_left_float_are_missed() {
    let folder = folder("small_conv", "[x]", "");
    let float = "overrides=[{layers: conv1, activations: float}]";
    run(&folder, &["calibrate", "e.yaml", "-o", "kept.safetensors", "--set", float]).succeeded();
    let expected = told(&quantized(&folder, &["--set", float]));
    assert_eq!(told(&quantized(&folder, &["--set", float, "--statistics", "kept.safetensors"])), expected);
    let refused = run(&folder, &["quantize", "e.yaml", "--statistics", "kept.safetensors"]);
    let line = refused.refused(1);
    assert!(line.contains("expected statistics of the activation site conv1.output, found none"), "{line}");
}

/// HMSE on weights and activations.
const SCORED: &str = "hessian: {samples: 14, batch_size: 3, probes: 2}\n";
const HMSE: [&str; 4] =
    ["--set", "quantization.weights_error_method=HMSE", "--set", "quantization.activation_error_method=HMSE"];

#[test]
fn kept_scores_are_used_where_they_are_asked_for() {
    for (model, inputs) in [("small_conv", "[x]"), ("tiny_encoder", "[ids, mask]")] {
        let folder = folder(model, inputs, SCORED);
        run(&folder, &[&["calibrate", "e.yaml", "-o", "kept.safetensors"][..], &HMSE].concat()).succeeded();
        for settings in [vec![], vec!["--set", "quantization.activations.bits=6"], HMSE[..2].to_vec()] {
            let words =
                if settings.len() == 2 && settings == HMSE[..2] { settings } else { [&HMSE[..], &settings].concat() };
            let expected = quantized(&folder, &words);
            let model_file = bytes(&folder, "run/quantized.pt");
            fs_err::rename(folder.path().join("data.safetensors"), folder.path().join("away")).unwrap();
            let found = quantized(&folder, &[&words[..], &["--statistics", "kept.safetensors"]].concat());
            fs_err::rename(folder.path().join("away"), folder.path().join("data.safetensors")).unwrap();
            assert_eq!(found["hessian"]["reused"], true);
            assert_eq!(told(&found), told(&expected), "{model} {words:?}");
            assert!(bytes(&folder, "run/quantized.pt") == model_file, "{model} {words:?}");
        }
        // Who asks for none keeps those that are there.
        run(&folder, &["merge", "kept.safetensors", "-o", "copy.safetensors"]).succeeded();
        assert!(bytes(&folder, "copy.safetensors") == bytes(&folder, "kept.safetensors"), "{model}");
        run(&folder, &["calibrate", "e.yaml", "--statistics", "kept.safetensors", "-o", "copy.safetensors"])
            .succeeded();
        assert!(bytes(&folder, "copy.safetensors") == bytes(&folder, "kept.safetensors"), "{model}");
        // Others are computed anew, with a word on why, on the data.
        let seed = ["--set", "hessian.seed=9"];
        let expected = quantized(&folder, &[&HMSE[..], &seed].concat());
        let words = [&HMSE[..], &seed, &["--statistics", "kept.safetensors"]].concat();
        let found = quantized(&folder, &words);
        assert_eq!(found["sites"], expected["sites"]);
        let why = "kept.safetensors are of another `hessian.seed`";
        assert!(warnings(&found).contains(why) && warnings(&found).contains("the data itself is the same"), "{found}");
        run(&folder, &["calibrate", "e.yaml", "-o", "plain.safetensors"]).succeeded();
        let found = quantized(&folder, &[&HMSE[..], &["--statistics", "plain.safetensors"]].concat());
        assert!(warnings(&found).contains("Hessian scores were computed anew: "), "{found}");
        assert!(warnings(&found).contains("plain.safetensors holds none"), "{found}");
        fs_err::remove_file(folder.path().join("data.safetensors")).unwrap();
        let line = run(&folder, &[&["quantize", "e.yaml"], &words[..]].concat()).refused(1).to_owned();
        assert!(line.contains("data.safetensors: "), "{line}");
    }
}

/// Calibrates all shards, each in a process of its own, all at once.
fn calibrate_shards(folder: &Folder, count: usize, name: &str, words: &[&str]) {
    let shards = (0..count).map(|number| {
        let (shard, file) = (format!("{number}/{count}"), format!("{name}{number}.safetensors"));
        let mut command = in_folder(folder.path(), BINARY);
        command.args(["calibrate", "e.yaml", "--quiet", "--shard", &shard, "-o", &file]).args(words);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    });
    for shard in shards.collect::<Vec<_>>() {
        let output = shard.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The hidden folder of a process of this host.
fn left_by_a_killed_process() -> String {
    let host = std::process::Command::new("uname").arg("-n").output().unwrap().stdout;
    format!(".tsquant.{}.aB3dE6", String::from_utf8(host).unwrap().trim().replace(['/', '.'], "-"))
}

fn merge(folder: &Folder, files: &[String], output: &str) -> Ran {
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    run(folder, &[&["merge", "-o", output], &files[..]].concat())
}

fn names(name: &str, numbers: impl IntoIterator<Item = usize>) -> Vec<String> {
    numbers.into_iter().map(|number| format!("{name}{number}.safetensors")).collect()
}

#[test]
fn merged_shards_are_what_one_process_gives() {
    for (model, inputs) in &MODELS[2..] {
        let folder = folder(model, inputs, "");
        run(&folder, &["calibrate", "e.yaml", "-o", "whole.safetensors", "--set", "calibration.batch_size=2"])
            .succeeded();
        calibrate_shards(&folder, 3, "s", &["--set", "calibration.batch_size=2"]);
        merge(&folder, &names("s", [2, 0, 1]), "all.safetensors").succeeded();
        check_near(&folder, "input_sums", model);
        let merged = bytes(&folder, "all.safetensors");
        let quantize =
            |statistics: &str| quantized(&folder, &["--statistics", statistics, "--set", "calibration.batch_size=2"]);
        check_same(&quantize("all.safetensors"), &quantize("whole.safetensors"), model);
        // Each shard twice, killed once.
        let mut random = Random(model.len() as u64);
        for number in 0..3 {
            let (shard, file) = (format!("{number}/3"), format!("s{number}.safetensors"));
            let mut command = in_folder(folder.path(), BINARY);
            command.args(["calibrate", "e.yaml", "--set", "calibration.batch_size=2", "--shard", &shard, "-o", &file]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(random.below(300) as u64));
            let _ = child.kill();
            child.wait().unwrap();
        }
        calibrate_shards(&folder, 3, "s", &["--set", "calibration.batch_size=2"]);
        merge(&folder, &names("s", 0..3), "all.safetensors").succeeded();
        assert!(merged == bytes(&folder, "all.safetensors"), "{model}");
        // What a process leaves that is killed while it writes.
        let left = folder.path().join(left_by_a_killed_process());
        fs_err::create_dir(&left).unwrap();
        fs_err::write(left.join("unfinished.safetensors"), "half").unwrap();
        fs_err::write(left.join(".tmp123456"), "half").unwrap();
        merge(&folder, &names("s", 0..3), "all.safetensors").succeeded();
        let hidden: Vec<String> = folder.listing().into_iter().filter(|name| name.starts_with('.')).collect();
        assert_eq!(hidden, [""; 0], "{model}");
    }
}

/// The numbers of a tensor as f64.
fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::F32 => {
            tensor.data().as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect()
        }
        safetensors::Dtype::F64 => tensor.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect(),
        _ => tensor.data().iter().map(|&byte| f64::from(byte)).collect(),
    }
}

/// Fails where a tensor of all.safetensors differs from that of whole.safetensors to the bit; those with these endings may be
/// rounded otherwise.
fn check_near(folder: &Folder, rounded: &str, shown: &str) {
    let (whole, all) = (bytes(folder, "whole.safetensors"), bytes(folder, "all.safetensors"));
    let (whole, all) = (SafeTensors::deserialize(&whole).unwrap(), SafeTensors::deserialize(&all).unwrap());
    assert_eq!(whole.names().len(), all.names().len(), "{shown}");
    for name in whole.names() {
        let (own, other) = (whole.tensor(name).unwrap(), all.tensor(name).unwrap());
        assert_eq!((own.dtype(), own.shape()), (other.dtype(), other.shape()), "{shown} {name}");
        if own.data() == other.data() {
            continue;
        }
        assert!(rounded.split(' ').any(|ending| name.ends_with(ending)), "{shown} {name}");
        // Scores of weights are sums in f32.
        let bound = if own.dtype() == safetensors::Dtype::F64 { 1e-9 } else { 1e-6 };
        let (own, other) = (numbers(&whole, name), numbers(&all, name));
        let size = own.iter().map(|x| x.abs()).fold(0.0, f64::max);
        let is_near = |(a, b): (&f64, &f64)| (a - b).abs() <= bound * a.abs().max(size * 1e-3);
        assert!(own.iter().zip(&other).all(is_near), "{shown} {name}");
    }
}

/// Scores of shards: statistics first, then the scores with the range of all values.
#[test]
fn merged_scores_are_those_of_one_process_but_for_rounding() {
    for (model, inputs) in [("small_conv", "[x]"), ("tiny_encoder", "[ids, mask]"), ("control_flow", "[x]")] {
        let folder = folder(model, inputs, &SCORED.replace("probes", "allow_fallback: true, probes"));
        run(&folder, &[&["calibrate", "e.yaml", "-o", "whole.safetensors"][..], &HMSE].concat()).succeeded();
        calibrate_shards(&folder, 2, "s", &HMSE);
        merge(&folder, &names("s", 0..2), "statistics.safetensors").succeeded();
        calibrate_shards(&folder, 3, "h", &[&HMSE[..], &["--statistics", "statistics.safetensors"]].concat());
        merge(&folder, &names("h", [1, 2, 0]), "all.safetensors").succeeded();

        check_near(&folder, "input_sums .scores .weight .weight_ih_l0 .weight_hh_l0", model);
        let in_one = quantized(&folder, &[&HMSE[..], &["--statistics", "whole.safetensors"]].concat());
        let in_shards = quantized(&folder, &[&HMSE[..], &["--statistics", "all.safetensors"]].concat());
        let sites = |report: &Value| -> BTreeMap<String, [f64; 2]> {
            let of = |site: &Value| [site["scale"][0].as_f64().unwrap(), site["error"].as_f64().unwrap()];
            let sites = report["sites"].as_array().unwrap().iter();
            sites.map(|site| (site["name"].as_str().unwrap().to_owned(), of(site))).collect()
        };
        for ((name, [a, error]), (_, [b, other])) in sites(&in_one).into_iter().zip(sites(&in_shards)) {
            // A mask of zeros and ones lies on the levels of many scales.
            let is_exact = error.max(other) < 1e-12;
            assert!(is_exact || (a - b).abs() <= 2e-3 * a, "{model} {name}: {a} {b}, errors {error} {other}");
        }
        assert_eq!(in_shards["hessian"]["samples"], in_one["hessian"]["samples"]);
        // Another method needs no scores, and its thresholds are the same to the bit.
        let mse = ["--set", "quantization.activation_error_method=MSE"];
        let expected = told(&quantized(&folder, &mse));
        assert_eq!(told(&quantized(&folder, &[&mse[..], &["--statistics", "all.safetensors"]].concat())), expected);
    }
}

#[test]
fn shards_that_do_not_fit_are_refused() {
    let folder = folder("small_conv", "[x]", SCORED);
    calibrate_shards(&folder, 3, "s", &[]);
    calibrate_shards(&folder, 2, "t", &[]);
    calibrate_shards(&folder, 3, "b", &["--set", "calibration.batch_size=3"]);
    calibrate_shards(&folder, 3, "f", &["--set", "overrides=[{layers: conv1, activations: float}]"]);
    merge(&folder, &names("s", 0..3), "all.safetensors").succeeded();
    calibrate_shards(&folder, 2, "h", &[&HMSE[..], &["--statistics", "all.safetensors"]].concat());
    let list = |parts: &[(&str, usize)]| -> Vec<String> {
        parts.iter().map(|(name, number)| format!("{name}{number}.safetensors")).collect()
    };
    let before = folder.listing();
    for (files, expected) in [
        (list(&[("s", 0), ("s", 2)]), "expected all shards, found none of 1/3"),
        (list(&[("s", 1)]), "expected all shards, found none of 0/3, 2/3"),
        (list(&[("s", 0), ("s", 1), ("s", 1), ("s", 2)]), "expected each shard once, found 1/3 in "),
        (list(&[("s", 0), ("t", 1)]), "expected shards of one calibration, found 0/3 in "),
        (list(&[("s", 0), ("b", 1), ("s", 2)]), "they have other `calibration.batch_size` (4 and 3)"),
        (list(&[("s", 0), ("f", 1), ("s", 2)]), "they have other sites, as the experiments leave other values float"),
        (list(&[("h", 0)]), "expected all shards, found none of 1/2"),
        (list(&[("h", 0), ("s", 1)]), "cannot be merged: they have other Hessian scores"),
        (vec!["e.yaml".to_owned()], "e.yaml: expected statistics that `tsquant calibrate` wrote, found another file"),
        (vec!["data.safetensors".to_owned()], "data.safetensors: expected statistics that `tsquant calibrate` wrote"),
        (vec!["missing.safetensors".to_owned()], "missing.safetensors: "),
    ] {
        let ran = merge(&folder, &files, "new.safetensors");
        let line = ran.refused(1);
        assert!(line.contains(expected), "{files:?}: {line}");
        assert_eq!(folder.listing(), before);
    }
    for name in ["s0.safetensors", "h1.safetensors"] {
        let line = run(&folder, &["quantize", "e.yaml", "--statistics", name]).refused(1).to_owned();
        assert!(line.contains("expected statistics of all batches, found those of shard "), "{line}");
    }
    for (words, expected) in [
        (vec!["--shard", "0/5"], "expected no more shards than there are batches, which is 4, found 5"),
        (vec!["--shard", "0/2", "--statistics", "all.safetensors"], "expected an error method HMSE, whose scores"),
        (vec!["--shard", "4/4"], "expected NUMBER/COUNT with NUMBER from 0 to COUNT - 1, such as 3/16, found `4/4`"),
    ] {
        let ran = run(&folder, &[&["calibrate", "e.yaml", "-o", "new.safetensors"][..], &words].concat());
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.contains(expected), "{ran:?}");
        assert_eq!(folder.listing(), before);
    }
    // Five batches of scores.
    let fifth = ["--shard", "4/5", "--statistics", "all.safetensors"];
    run(&folder, &[&["calibrate", "e.yaml", "-o", "fifth.safetensors"][..], &HMSE, &fifth].concat()).succeeded();
    let ran = merge(&folder, &names("s", 0..3), "s1.safetensors");
    assert!(ran.refused(2).contains("s1.safetensors: expected another file to write than those that are merged"));
    let tolerance = ["--set", "hessian.tolerance=0.1", "--shard", "0/2", "--statistics", "all.safetensors"];
    let ran = run(&folder, &[&["calibrate", "e.yaml", "-o", "new.safetensors"][..], &HMSE, &tolerance].concat());
    assert!(ran.refused(2).starts_with("`hessian.tolerance`: "), "{ran:?}");
}

#[test]
fn nothing_but_statistics_is_replaced() {
    let folder = folder("small_conv", "[x]", "");
    fs_err::create_dir(folder.path().join("folder.safetensors")).unwrap();
    let data = bytes(&folder, "data.safetensors");
    for (name, found) in
        [("data.safetensors", "another file"), ("e.yaml", "another file"), ("folder.safetensors", "a folder")]
    {
        let ran = run(&folder, &["calibrate", "e.yaml", "-o", name]);
        let line = ran.refused(1);
        assert!(line.contains(&format!("{name}: expected nothing or a file of statistics, found {found}")), "{line}");
    }
    assert!(bytes(&folder, "data.safetensors") == data);
    run(&folder, &["calibrate", "e.yaml", "-o", "deep/kept.safetensors"]).succeeded();
    let first = bytes(&folder, "deep/kept.safetensors");
    run(&folder, &["calibrate", "e.yaml", "-o", "deep/kept.safetensors"]).succeeded();
    assert!(bytes(&folder, "deep/kept.safetensors") == first);
    use std::os::unix::fs::PermissionsExt;
    let mode = fs_err::metadata(folder.path().join("deep/kept.safetensors")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
    for place in ["deep/", "/proc/kept.safetensors"] {
        let started = folder.listing();
        let ran = tsquant(folder.path(), ["calibrate", "e.yaml", "-o", place]);
        assert!(ran.code == Some(1) && !ran.stderr.contains("calibrate: "), "{ran:?}");
        assert_eq!(folder.listing(), started);
    }
    // Beside the run directory where no place is named.
    run(&folder, &["calibrate", "e.yaml"]).succeeded();
    run(&folder, &["calibrate", "e.yaml", "--shard", "1/2"]).succeeded();
    assert!(bytes(&folder, "run.safetensors") == first);
    assert!(folder.path().join("run.1-of-2.safetensors").exists());
}

#[test]
fn damaged_statistics_are_told() {
    let folder = folder("small_conv", "[x]", SCORED);
    run(&folder, &[&["calibrate", "e.yaml", "-o", "kept.safetensors"][..], &HMSE].concat()).succeeded();
    let whole = bytes(&folder, "kept.safetensors");
    let mut random = Random(3);
    for number in 0..32 {
        let mut damaged = whole.clone();
        if number % 4 == 0 {
            damaged.truncate(random.below(whole.len()));
        } else {
            // Half of them in the description.
            let end = if number % 2 == 0 { 6000 } else { whole.len() };
            let place = random.below(end);
            damaged[place] ^= 1 << random.below(8);
        }
        folder.write("damaged.safetensors", damaged);
        let ran = run(&folder, &[&["quantize", "e.yaml", "--statistics", "damaged.safetensors"][..], &HMSE].concat());
        assert!(ran.refused(1).contains("damaged.safetensors: "), "{ran:?}");
    }
    let line = run_inspect(&folder, &["inspect", "damaged.safetensors"]).error_line().to_owned();
    assert!(line.contains("damaged.safetensors: "), "{line}");
}

#[test]
fn inspect_prints_them() {
    let folder = folder("small_conv", "[x]", SCORED);
    let told =
        tsquant(folder.path(), [&["calibrate", "e.yaml", "-o", "kept.safetensors"][..], &HMSE].concat()).succeeded();
    assert!(told.stdout.contains("statistics of 4 activation sites ("), "{}", told.stdout);
    assert!(told.stdout.contains("\nHessian scores of 7 layers on 14 rows\nwritten to "), "{}", told.stdout);
    let shown = tsquant(folder.path(), ["inspect", "kept.safetensors"]).succeeded().stdout;
    for part in ["conv1.output", "batch_size: 4", "2 probes a row", "sums of inputs for bias correction: conv1"] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    let json = tsquant(folder.path(), ["inspect", "kept.safetensors", "--json"]).succeeded().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["shard"], &json["rows"], &json["hessian"]["samples"]), (&"0/1".into(), &16.into(), &14.into()));
    let report = quantized(&folder, &HMSE);
    assert_eq!(json["model"], report["hashes"]["model"]);
    let input = json["sites"].as_array().unwrap().iter().find(|site| site["name"] == "conv1.output").unwrap();
    assert_eq!((&input["channels"], &input["min"]), (&3.into(), &0.0.into()));
    let ran = run_inspect(&folder, &["inspect", "data.safetensors"]);
    assert!(ran.refused(1).contains("expected a TorchScript file, found a safetensors file"), "{ran:?}");
    let ran = run_inspect(&folder, &["inspect", "kept.safetensors", "--graph"]);
    assert_eq!(ran.code, Some(2));
}

fn run_inspect(folder: &Folder, words: &[&str]) -> Ran {
    tsquant(folder.path(), words)
}

/// The shipped model, in as many shards as there are batches.
#[test]
fn the_shipped_model_in_eight_shards() {
    let folder = Folder::new();
    let yaml = fs_err::read_to_string(shipped("configs/mnist_resnet.yaml")).unwrap();
    folder.write("e.yaml", yaml.replace("models/", &format!("{}/", shipped("models").display())));
    run(&folder, &["calibrate", "e.yaml", "-o", "whole.safetensors"]).succeeded();
    calibrate_shards(&folder, 8, "s", &[]);
    merge(&folder, &names("s", (0..8).rev()), "all.safetensors").succeeded();
    assert!(bytes(&folder, "whole.safetensors") == bytes(&folder, "all.safetensors"));
}

/// The commands of the engines, run without the engines.
#[test]
fn the_scripts_for_engines_make_whole_statistics() {
    let folder = Folder::new();
    let yaml = fs_err::read_to_string(shipped("configs/mnist_resnet.yaml")).unwrap();
    let yaml = yaml.replace("models/", &format!("{}/", shipped("models").display()));
    // 16 batches.
    folder.write(
        "experiment.yaml",
        yaml.replace("batch_size: 32", "batch_size: 4").replace("samples: 256", "samples: 64"),
    );
    run(&folder, &["calibrate", "experiment.yaml", "-o", "whole.safetensors"]).succeeded();
    let bin = std::path::Path::new(BINARY).parent().unwrap().display();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    let shell = |program: &str, arguments: &[&str], variables: &[(&str, String)]| {
        let mut command = in_folder(folder.path(), program);
        command.args(arguments).env("PATH", &path).envs(variables.iter().map(|(name, value)| (*name, value)));
        binary::ran(&mut command).succeeded();
    };
    let check = || {
        check_near(&folder, "input_sums", "merged");
        fs_err::remove_dir_all(folder.path().join("parts")).unwrap();
    };

    let script = shipped("docs/shards/slurm.sh");
    let text = fs_err::read_to_string(&script).unwrap();
    let merge = text.lines().find_map(|line| Some(line.split_once("--wrap \"")?.1)).unwrap();
    assert!(text.contains("#SBATCH --array=0-15\n"));
    for task in 0..16 {
        let variables = [("SLURM_ARRAY_TASK_ID", task.to_string())];
        shell(script.to_str().unwrap(), &["experiment.yaml"], &variables);
    }
    let merge = merge.strip_suffix(" &&").unwrap().replace("statistics.safetensors", "all.safetensors");
    shell("sh", &["-c", &merge], &[]);
    check();

    let manifest = fs_err::read_to_string(shipped("docs/shards/kubernetes.yaml")).unwrap();
    let jobs: Vec<Value> = manifest.split("\n---\n").map(|text| serde_yaml::from_str(text).unwrap()).collect();
    let [calibrate, quantize] = &jobs[..] else { panic!("expected two jobs") };
    let words = |job: &Value| -> Vec<String> {
        let command = &job["spec"]["template"]["spec"]["containers"][0]["command"];
        command.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(
        (&calibrate["spec"]["completions"], &calibrate["spec"]["completionMode"]),
        (&16.into(), &"Indexed".into())
    );
    for index in 0..16 {
        let own: Vec<String> =
            words(calibrate).iter().map(|word| word.replace("$(JOB_COMPLETION_INDEX)", &index.to_string())).collect();
        shell(BINARY, &own[1..].iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    }
    let own: Vec<String> = words(quantize).iter().map(|word| word.replace("statistics.safe", "all.safe")).collect();
    shell(&own[0], &own[1..].iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    assert!(folder.path().join("runs/mnist_resnet/report.json").exists());
    check();
}
