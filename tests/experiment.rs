//! Sweeps as their users run them: each row is what a run of its own gives, whatever interrupts it, and what fails stays alone.

mod binary;
mod damage;

use std::process::{Command, Stdio};
use std::time::Duration;

use binary::{
    BINARY, Folder, Ran, experiment, in_folder, ran, safetensors_file, shipped, test_data, test_model, tsquant,
};
use damage::Random;
use safetensors::Dtype;
use serde_json::Value;
use tsquant::config::Experiment;

/// Three methods and two widths for weights, one of which leaves a layer float.
const GRID: &str = "sweep:
  grid:
    quantization.activation_error_method: [NOCLIPPING, MSE, HMSE]
    overrides: [null, [{layers: \"conv2\", weights: {bits: 4, error_method: HMSE}, activations: float}]]
    quantization.weights_bias_correction: [closed_form, none]
  rank_by: sqnr
";

/// A folder with the experiment `e.yaml`.
fn folder(sweep: &str) -> Folder {
    let folder = Folder::new();
    let alone = experiment(&test_model("small_conv"), &test_data("small_conv"), "[x]");
    folder.write("e.yaml", alone + sweep);
    folder
}

fn sweep(folder: &Folder, settings: &[&str]) -> Ran {
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    tsquant(folder.path(), ["experiment", "e.yaml", "--quiet"].into_iter().chain(settings))
}

fn json(folder: &Folder, path: &str) -> Value {
    let text = fs_err::read_to_string(folder.path().join(path)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// `results.json` without what differs from run to run and from folder to folder.
fn results(folder: &Folder) -> Value {
    let mut results = json(folder, "run/results.json");
    for row in results["rows"].as_array_mut().unwrap() {
        row["command"].take();
        if let Some(gave) = row["gave"].as_object_mut() {
            gave.retain(|key, _| !key.ends_with("_s"));
        }
    }
    results
}

/// Runs the command of a row, as a shell takes it, and returns the report of what it makes.
fn made_alone(folder: &Folder, row: &Value) -> Value {
    let command = row["command"].as_str().unwrap();
    let rest = command.strip_prefix("tsquant ").unwrap();
    ran(in_folder(folder.path(), "sh").args(["-c", &format!("{BINARY} {rest} --quiet")])).succeeded();
    folder.report(&model_dir(row))
}

fn model_dir(row: &Value) -> String {
    format!("run/models/{:04}", row["number"].as_u64().unwrap())
}

/// Fails where the models of a sweep differ from those that the commands of its rows make.
fn check_rows_alone(folder: &Folder, count: usize) {
    sweep(folder, &["sweep.emit=all"]).succeeded();
    let results = json(folder, "run/results.json");
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), count);
    for row in rows {
        let name = &row["name"];
        let together = folder.report(&model_dir(row));
        let written = json(folder, &format!("run/rows/{:04}.json", row["number"].as_u64().unwrap()));
        fs_err::remove_dir_all(folder.path().join(model_dir(row))).unwrap();
        let alone = made_alone(folder, row);
        for key in ["sites", "bias_correction", "evaluation", "left_float", "warnings", "worst_sites", "hashes"] {
            assert_eq!(together[key], alone[key], "{name} {key}");
        }
        assert_eq!(written["sites"], alone["sites"], "{name}");
        assert_eq!(row["gave"]["quantized"], alone["evaluation"]["quantized"], "{name}");
        assert_eq!(row["gave"]["float"], alone["evaluation"]["float"], "{name}");
    }
}

#[test]
fn a_row_is_what_its_command_gives() {
    let folder = folder(GRID);
    check_rows_alone(&folder, 12);
    let rows = results(&folder)["rows"].as_array().unwrap().clone();
    let bytes: Vec<u64> = rows.iter().map(|row| row["gave"]["weight_bytes"].as_u64().unwrap()).collect();
    // conv1 27, conv2 108 and fc 12 weights; half of conv2's with the override.
    assert!(bytes.iter().all(|&bytes| bytes == 27 + 108 + 12 || bytes == 27 + 54 + 12), "{bytes:?}");
    let sqnr: Vec<f64> = rows.iter().map(|row| row["gave"]["quantized"]["sqnr_db"].as_f64().unwrap()).collect();
    assert!(sqnr.is_sorted_by(|a, b| a >= b), "{sqnr:?}");
    assert!(rows[0]["is_on_pareto_front"].as_bool().unwrap());
}

/// Layers that read the same value, one of which has no quantized weight, or reads it in float.
#[test]
fn rows_with_other_layers_are_what_their_commands_give() {
    let folder = Folder::new();
    let sweep = "sweep:
  runs:
    plain: null
    no query: {overrides: [{layers: layer.0.query, weights: float, inputs: float}]}
    up in float: {overrides: [{layers: layer.0.up, inputs: float}]}
    scored: {quantization.activation_error_method: HMSE}
    scored in part: {overrides: [{layers: layer.0.up, weights: {error_method: HMSE}}]}
";
    let alone = experiment(&test_model("tiny_encoder"), &test_data("tiny_encoder"), "[ids, mask]");
    folder.write("e.yaml", alone + sweep);
    check_rows_alone(&folder, 5);
}

/// Outputs that depend on some of the scored layers alone.
#[test]
fn rows_with_scores_of_other_layers_are_what_their_commands_give() {
    let folder = Folder::new();
    let sweep = "sweep:
  runs:
    all: {quantization: {weights_error_method: HMSE, activation_error_method: HMSE}}
    side: {overrides: [{layers: side, weights: {error_method: HMSE}}]}
    head: {overrides: [{layers: head, weights: {error_method: HMSE}}]}
    tolerant: {quantization.weights_error_method: HMSE, hessian: {tolerance: 0.5}}
    tolerant side: {overrides: [{layers: side, weights: {error_method: HMSE}}], hessian: {tolerance: 0.5}}
";
    let alone = experiment(&test_model("multi_io"), &test_data("multi_io"), "[x, y]");
    folder.write("e.yaml", alone + sweep);
    check_rows_alone(&folder, 5);
}

#[test]
fn the_best_model_is_written_as_alone() {
    let folder = folder(GRID);
    sweep(&folder, &["sweep.emit=best"]).succeeded();
    let best = json(&folder, "run/results.json")["rows"][0].clone();
    let bytes = || fs_err::read(folder.path().join(model_dir(&best)).join("quantized.pt")).unwrap();
    let together = bytes();
    assert_eq!(fs_err::read_dir(folder.path().join("run/models")).unwrap().count(), 1);
    fs_err::remove_dir_all(folder.path().join(model_dir(&best))).unwrap();
    made_alone(&folder, &best);
    assert!(together == bytes(), "the models differ");
}

#[test]
fn all_models_are_written_or_none() {
    for (emit, count) in [("none", 0), ("all", 2)] {
        let folder = folder("sweep:\n  runs: {plain: null, four: {quantization.weights.bits: 4}}\n");
        sweep(&folder, &[&format!("sweep.emit={emit}")]).succeeded();
        let models = fs_err::read_dir(folder.path().join("run/models"));
        assert_eq!(models.map_or(0, Iterator::count), count, "{emit}");
        for number in 1..=count {
            let report = folder.report(&format!("run/models/{number:04}"));
            assert_eq!(
                report["evaluation"]["quantized"],
                json(&folder, &format!("run/rows/{number:04}.json"))["gave"]["quantized"]
            );
        }
    }
}

#[test]
fn runs_that_fail_are_told_and_the_rest_go_on() {
    let sweep_yaml = "sweep:
  runs:
    good: {quantization.weights.bits: 8}
    impossible: {quantization: {weights_error_method: KL, weights: {bits: 16}}}
    no_such_layer: {overrides: [{layers: conv7, weights: {bits: 4}}]}
    no_such_file: {calibration.data: nowhere.npz}
";
    let folder = folder(sweep_yaml);
    let told = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded().stdout;
    for line in ["failed: impossible: ", "failed: no_such_layer: ", "failed: no_such_file: "] {
        assert!(told.contains(line), "{line} is not in {told}");
    }
    let results = results(&folder);
    let names: Vec<&str> =
        results["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names[0], "good");
    assert_eq!(names.len(), 4);
    let csv = fs_err::read_to_string(folder.path().join("run/results.csv")).unwrap();
    assert_eq!(csv.lines().count(), 5, "{csv}");
}

/// What was missing may be there the next time, and a line more in the file changes no row.
#[test]
fn rows_that_failed_are_gone_on_with() {
    let sweep_yaml = "sweep: {runs: {good: {evaluation: null}, later: {calibration.data: later.safetensors}}}\n";
    let folder = folder(sweep_yaml);
    let text = fs_err::read_to_string(folder.path().join("e.yaml")).unwrap();
    let data = serde_json::to_string(&test_data("small_conv")).unwrap();
    folder.write("e.yaml", format!("evaluation: {{data: {data}}}\n{}", text.replace("evaluation: null", "seed: 1")));
    let told = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded().stdout;
    assert!(told.contains("failed: later: "), "{told}");
    fs_err::copy(test_data("small_conv"), folder.path().join("later.safetensors")).unwrap();
    let text = fs_err::read_to_string(folder.path().join("e.yaml")).unwrap();
    folder.write("e.yaml", format!("# One line more.\n{text}"));
    let told = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded().stdout;
    assert!(!told.contains("failed: ") && told.contains("1 of 2 runs were done before"), "{told}");
    // Away again, it is told; what was done is not lost.
    let away = folder.path().join("later.safetensors");
    let bytes = fs_err::read(&away).unwrap();
    fs_err::remove_file(&away).unwrap();
    let told = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded().stdout;
    assert!(told.contains("failed: later: "), "{told}");
    fs_err::write(&away, bytes).unwrap();
    let told = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded().stdout;
    assert!(told.contains("2 of 2 runs were done before"), "{told}");
}

/// A value that is infinite in float32, which one run alone quantizes.
#[test]
fn an_infinite_value_concerns_those_that_quantize_it() {
    let folder = Folder::new();
    let tensor = |count: usize, largest: f32| -> Vec<u8> {
        let value = |index: usize| if index < 192 && largest > 1.0 { largest } else { (index as f32 / 31.0).sin() };
        (0..count).flat_map(|index| value(index).to_le_bytes()).collect()
    };
    let (x, y) = (tensor(16 * 3 * 8 * 8, 3.3e38), tensor(16 * 5, 1.0));
    let tensors = [("x", Dtype::F32, &[16, 3, 8, 8][..], x.as_slice()), ("y", Dtype::F32, &[16, 5], &y)];
    folder.write("data.safetensors", safetensors_file(&tensors));
    let alone = experiment(&test_model("multi_io"), &folder.path().join("data.safetensors"), "[x, y]");
    let float = "{overrides: [{layers: [conv, side], activations: float}, {ops: mean, activations: float}]}";
    folder.write("e.yaml", format!("{alone}sweep: {{runs: {{plain: null, in float: {float}}}}}\n"));
    let told = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded().stdout;
    assert!(told.contains("failed: plain: ") && !told.contains("failed: in float"), "{told}");
}

#[test]
fn a_sweep_of_which_all_fail_is_an_error() {
    let folder = folder("sweep: {runs: {a: {overrides: [{layers: conv7, weights: float}]}}}\n");
    let line = sweep(&folder, &[]).refused(1).to_owned();
    assert!(line.contains("all 1 runs of the sweep failed, the first: ") && line.contains("conv7"), "{line}");
    assert!(!folder.path().join("run/results.json").exists());
}

#[test]
fn what_is_no_sweep_is_refused_with_its_place() {
    let cases = [
        ("", "`sweep` is missing, expected `grid` with lists of values by key, or `runs` with settings by name"),
        ("sweep: {grid: {}}\n", "`sweep.grid`: expected at least one key, found none"),
        ("sweep: {grid: {seed: 1}}\n", "`sweep.grid.seed`: expected a list of values, found the number 1"),
        ("sweep: {grid: {seed: []}}\n", "`sweep.grid.seed`: expected at least one value, found none"),
        ("sweep: {grid: {seed: [1]}, runs: {a: null}}\n", "`sweep`: expected either `grid` or `runs`"),
        (
            "sweep: {grid: {output.dir: [a, b]}}\n",
            "`sweep.grid.output.dir`: `output` is the same in all runs of a sweep",
        ),
        ("sweep: {runs: {a: {device: cpu}}}\n", "`sweep.runs.a.device`: `device` is the same in all runs of a sweep"),
        ("sweep: {grid: {sede: [1]}}\n", "unknown key `sede`"),
        ("sweep: {grids: {seed: [1]}}\n", "unknown key `grids` in `sweep`, did you mean `grid`?"),
        (
            "sweep: {grid: {seed: [1]}, emit: worst}\n",
            "`sweep.emit` must be one of `none`, `best`, `all`, found `worst`",
        ),
        (
            "sweep: {grid: {seed: [1]}, rank_by: top1}\n",
            "`sweep.rank_by`: expected `evaluation.labels` for it, found none",
        ),
        (
            "sweep: {grid: {calibration.samples: [8, 16]}}\n",
            "`sweep`: expected runs that are measured on the same data, found others for `samples=16`",
        ),
        (
            "hessian: {save: true}\nquantization: {weights_error_method: HMSE}\nsweep: {grid: {seed: [1]}}\n",
            "`hessian.save`: the scores of a sweep are not kept",
        ),
    ];
    for (text, said) in cases {
        let folder = Folder::new();
        let alone = experiment(&test_model("small_conv"), &test_data("small_conv"), "[x]");
        let alone = if text.contains("quantization") {
            alone.lines().filter(|line| !line.starts_with("quantization")).collect::<Vec<_>>().join("\n") + "\n"
        } else {
            alone
        };
        folder.write("e.yaml", alone + text);
        let line = sweep(&folder, &[]).refused(2).to_owned();
        assert!(line.contains(said), "{line} is not {said}");
        assert_eq!(folder.listing(), ["e.yaml"]);
    }
    let folder = folder(GRID);
    let line = tsquant(folder.path(), ["quantize", "e.yaml"]).refused(2).to_owned();
    assert!(line.contains("`sweep`: many runs are for `tsquant experiment`; `--set sweep=` leaves them out"), "{line}");
}

#[test]
fn another_experiment_in_the_same_place_is_refused() {
    let folder = folder("sweep: {grid: {seed: [1, 2]}, emit: none}\n");
    sweep(&folder, &[]).succeeded();
    let before = folder.listing();
    let line = sweep(&folder, &["quantization.weights.bits=4"]).refused(1).to_owned();
    assert!(line.contains("the settings of row 1 (`seed=1`) have changed"), "{line}");
    assert_eq!(folder.listing(), before);
    // Ranking and emission are no part of the rows.
    for (emit, count) in [("best", 1), ("all", 2)] {
        sweep(&folder, &[&format!("sweep.emit={emit}"), "sweep.rank_by=cosine"]).succeeded();
        assert_eq!(fs_err::read_dir(folder.path().join("run/models")).unwrap().count(), count);
    }
}

/// Killed at any moment, the same command goes on and ends with the same results.
#[test]
fn a_killed_sweep_goes_on() {
    let whole = folder(GRID);
    sweep(&whole, &[]).succeeded();
    let expected = results(&whole);
    let folder = folder(GRID);
    let mut random = Random(7);
    for _ in 0..10 {
        let mut command: Command = in_folder(folder.path(), BINARY);
        let command = command.args(["experiment", "e.yaml", "--quiet"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100 + random.below(400) as u64));
        // The process may have ended.
        let _ = child.kill();
        child.wait().unwrap();
    }
    let rest = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded();
    assert_eq!(results(&folder), expected, "{}", rest.stdout);
    let again = tsquant(folder.path(), ["experiment", "e.yaml"]).succeeded();
    assert!(again.stdout.contains("12 of 12 runs were done before"), "{}", again.stdout);
    assert_eq!(results(&folder), expected);
    let leftovers: Vec<String> = folder.listing().into_iter().filter(|name| name.contains(".unfinished")).collect();
    assert_eq!(leftovers, [""; 0]);
}

const SHIPPED: [&str; 5] = ["methods", "bits", "grids", "outliers", "probes"];

#[test]
fn every_combination_of_every_shipped_sweep_is_possible() {
    for name in SHIPPED {
        let experiment = Experiment::read(&shipped(&format!("configs/{name}.yaml"))).unwrap();
        let sweep = experiment.resolve_sweep(&shipped("")).unwrap();
        let wrong: Vec<_> = sweep.combinations.iter().filter(|combination| combination.plan.is_err()).collect();
        assert!(wrong.is_empty() && sweep.combinations.len() > 20, "{name}: {wrong:?}");
    }
}

#[test]
fn a_shipped_sweep_runs() {
    let folder = Folder::new();
    let dir = format!("output.dir={}", folder.path().join("bits").display());
    let settings = [dir.as_str(), "calibration.samples=16", "evaluation.samples=16"];
    let settings = settings.into_iter().flat_map(|setting| ["--set", setting]);
    let arguments = ["experiment", "configs/bits.yaml"].into_iter().chain(settings);
    let told = tsquant(&shipped(""), arguments).succeeded();
    assert!(!told.stdout.contains("failed: ") && told.stdout.contains("best: "), "{}", told.stdout);
    assert!(told.stderr.contains("runs: 24"), "{}", told.stderr);
}
