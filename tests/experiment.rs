//! Sweeps as their users run them: each row is what a run of its own gives, whatever interrupts it, and what fails stays alone.

mod binary;
mod damage;

use std::process::{Command, Stdio};
use std::time::Duration;

use binary::{BINARY, Folder, Ran, experiment, in_folder, ran, shipped, test_data, test_model, tsquant};
use damage::Random;
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

/// `results.json` without what differs from run to run.
fn results(folder: &Folder) -> Value {
    let mut results = json(folder, "run/results.json");
    for row in results["rows"].as_array_mut().unwrap() {
        if let Some(gave) = row["gave"].as_object_mut() {
            gave.retain(|key, _| !key.ends_with("_s"));
        }
    }
    results
}

/// Runs the command of a row, as a shell takes it, into another directory.
fn made_alone(folder: &Folder, row: &Value) -> Value {
    let command = row["command"].as_str().unwrap().replacen("tsquant", BINARY, 1);
    let mut shell = in_folder(folder.path(), "sh");
    ran(shell.args(["-c", &format!("{command} --quiet --set output.dir=alone")])).succeeded();
    folder.report("alone")
}

#[test]
fn a_row_is_what_its_command_gives() {
    let folder = folder(GRID);
    sweep(&folder, &[]).succeeded();
    let results = results(&folder);
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 12);
    for row in rows {
        let alone = made_alone(&folder, row);
        let written = json(&folder, &format!("run/rows/{:04}.json", row["number"].as_u64().unwrap()));
        assert_eq!(written["sites"], alone["sites"], "{}", row["name"]);
        assert_eq!(row["gave"]["quantized"], alone["evaluation"]["quantized"], "{}", row["name"]);
        assert_eq!(row["gave"]["float"], alone["evaluation"]["float"], "{}", row["name"]);
    }
    let bytes: Vec<u64> = rows.iter().map(|row| row["gave"]["weight_bytes"].as_u64().unwrap()).collect();
    // conv1 27, conv2 108 and fc 12 weights; half of conv2's with the override.
    assert!(bytes.iter().all(|&bytes| bytes == 27 + 108 + 12 || bytes == 27 + 54 + 12), "{bytes:?}");
    let sqnr: Vec<f64> = rows.iter().map(|row| row["gave"]["quantized"]["sqnr_db"].as_f64().unwrap()).collect();
    assert!(sqnr.is_sorted_by(|a, b| a >= b), "{sqnr:?}");
    assert!(rows[0]["is_on_pareto_front"].as_bool().unwrap());
}

#[test]
fn the_best_model_is_written_as_alone() {
    let folder = folder(GRID);
    sweep(&folder, &["sweep.emit=best"]).succeeded();
    let best = results(&folder)["rows"][0].clone();
    let alone = made_alone(&folder, &best);
    let dir = format!("run/models/{:04}", best["number"].as_u64().unwrap());
    let report = folder.report(&dir);
    assert_eq!(report["sites"], alone["sites"]);
    assert_eq!(report["bias_correction"], alone["bias_correction"]);
    assert_eq!(report["hashes"], alone["hashes"]);
    let bytes = |dir: &str| fs_err::read(folder.path().join(dir).join("quantized.pt")).unwrap();
    assert!(bytes(&dir) == bytes("alone"), "the models differ");
    assert_eq!(fs_err::read_dir(folder.path().join("run/models")).unwrap().count(), 1);
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
    sweep(&folder, &["sweep.emit=best", "sweep.rank_by=cosine"]).succeeded();
    assert!(folder.path().join("run/models").exists());
}

/// Killed at any moment, the same command goes on and ends with the same results.
#[test]
fn a_killed_sweep_goes_on() {
    let whole = folder(GRID);
    sweep(&whole, &[]).succeeded();
    let expected = results(&whole);
    let folder = folder(GRID);
    let mut random = Random(7);
    for _ in 0..6 {
        let mut command: Command = in_folder(folder.path(), BINARY);
        let command = command.args(["experiment", "e.yaml", "--quiet"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100 + random.below(900) as u64));
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
