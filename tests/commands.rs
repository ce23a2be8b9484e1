//! The commands beside `quantize` and `inspect`: schema, completions, a dry run, help.

mod binary;

use serde_json::{Value, json};

use binary::{Folder, experiment, misfits, shipped, test_data, test_model, tsquant};

/// The printed schema of experiments.
fn schema() -> Value {
    let ran = tsquant(&shipped(""), ["schema"]).succeeded();
    serde_json::from_str(&ran.stdout).expect("a schema in JSON")
}

fn parse(yaml: &str) -> Value {
    serde_yaml::from_str(yaml).expect("YAML")
}

#[test]
fn the_schema_takes_what_is_taken_and_refuses_what_is_refused() {
    let schema = schema();
    for entry in fs_err::read_dir(shipped("configs")).unwrap() {
        let yaml = fs_err::read_to_string(entry.unwrap().path()).unwrap();
        assert_eq!(misfits(&schema, &parse(&yaml)), [""; 0], "{yaml}");
    }
    let start = "model: {path: m.pt}\ncalibration: {data: c.npz, inputs: INPUTS}\n";
    let with = |inputs: &str, rest: &str| parse(&(start.replace("INPUTS", inputs) + rest));
    for inputs in ["[x]", "[x, {const: 16000}]", "{a: x, b: {const: null}, c: {const: true}}"] {
        assert_eq!(misfits(&schema, &with(inputs, "")), [""; 0], "{inputs}");
    }
    for rest in [
        "quantization: {weights: {bits: 2}, activations: {grid: power_of_two}, weights_error_method: NOCLIPPING}",
        "quantization: {weights_error_method: LP, l_p_value: 64, z_threshold: 0.5, activation_error_method: KL}",
        "output: {format: [fake_quant]}",
        "evaluation: {data: e.npz, transform: {crop: [224, 200], resize: 256, mean: [1], layout: nhwc}}",
        "evaluation: null",
        "evaluation: {data: e.npz, output: 1}",
        "overrides: [{layers: fc, weights: {bits: 4, error_method: KL}}, {ops: [conv2d, add], activations: float}]",
        "seed: 18446744073709551615",
        "device: auto",
        "device: cuda",
        "device: cuda:12\nallow_tf32: true",
    ] {
        assert_eq!(misfits(&schema, &with("[x]", rest)), [""; 0], "{rest}");
    }
    let mut wrong = vec![parse("model: {path: m.pt}"), with("[1]", ""), with("{a: {value: 1}}", ""), with("[]", "")];
    for rest in [
        "quantisation: {}",
        "quantization: {weights: {bits: 1}}",
        "quantization: {weights: {bits: 17}}",
        "quantization: {weights: {grid: log}}",
        "quantization: {weights_error_method: mse}",
        "quantization: {l_p_value: 65}",
        "quantization: {z_threshold: 0}",
        "calibration: {batch_size: 0}",
        "evaluation: {metrics: [top2]}",
        "evaluation: {transform: {crop: [1, 2, 3]}}",
        "seed: -1",
        "device: gpu",
        "device: cuda:x",
        "allow_tf32: 1",
        "output: {format: []}",
        "overrides: {layers: fc}",
        "overrides: [{layers: [], weights: float}]",
        "overrides: [{ops: [], weights: float}]",
        "overrides: [{layers: fc, weights: floats}]",
        "overrides: [{layers: fc, weights: {z_threshold: 4}}]",
    ] {
        let rest = rest.replace("calibration:", "evaluation:");
        wrong.push(with("[x]", &rest));
    }
    for experiment in wrong {
        assert_ne!(misfits(&schema, &experiment), [""; 0], "{experiment}");
    }
}

#[test]
fn the_schema_explains_every_key() {
    fn explained(schema: &Value, path: &str) {
        for (key, property) in schema["properties"].as_object().into_iter().flatten() {
            let text = property["description"].as_str();
            assert!(text.is_some_and(|text| text.ends_with('.')), "{path}.{key}: {property}");
        }
    }
    let schema = schema();
    explained(&schema, "");
    for (name, part) in schema["$defs"].as_object().unwrap() {
        explained(part, name);
    }
    assert_eq!(schema["required"], json!(["model", "calibration"]));
}

/// The line to try that stands below the first site with this cause.
fn line_to_try<'a>(stdout: &'a str, cause: &str) -> Option<&'a str> {
    let mut lines = stdout.lines().skip_while(|line| !line.contains(cause)).skip(1);
    lines.next().and_then(|line| line.strip_prefix("          "))
}

#[test]
fn every_shipped_experiment_runs() {
    let folder = Folder::new();
    for entry in fs_err::read_dir(shipped("configs")).unwrap() {
        let path = entry.unwrap().path();
        if fs_err::read_to_string(&path).unwrap().contains("\nsweep:") {
            // Those of `tsquant experiment`.
            continue;
        }
        let dir = folder.path().join(path.file_stem().unwrap());
        let settings = [format!("output.dir={}", dir.display()), "calibration.samples=16".to_owned()];
        let settings = settings.iter().flat_map(|setting| ["--set", setting]);
        let arguments = ["quantize", path.to_str().unwrap()].into_iter().chain(settings);
        let ran = tsquant(&shipped(""), arguments).succeeded();
        let name = dir.file_name().unwrap().to_str().unwrap();
        // Told once, with a line that can be tried if there are more rows.
        assert_eq!(ran.stdout.matches("few samples: 16 rows say little").count(), 1, "{}", ran.stdout);
        let tried = line_to_try(&ran.stdout, "few samples");
        if let Some(tried) = tried {
            let (key, value) = tried.split_once(": ").unwrap();
            let setting = format!("{key}={value}");
            let arguments = ["quantize", path.to_str().unwrap(), "--dry-run", "--quiet", "--set", &setting];
            tsquant(&shipped(""), arguments).succeeded();
        } else {
            assert!(ran.stdout.contains("and the calibration data has no more\n"), "{}", ran.stdout);
        }
        let report = folder.report(name);
        assert!(report["evaluation"]["quantized"]["sqnr_db"].as_f64().is_some_and(|sqnr| sqnr > 25.0), "{report}");
    }
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = tsquant(&shipped(""), ["completions", shell]).succeeded();
        for word in ["quantize", "dry-run", "inspect"] {
            assert!(ran.stdout.contains(word), "{word} is not in the completions of {shell}");
        }
    }
    let ran = tsquant(&shipped(""), ["completions", "tcsh"]);
    assert_eq!(ran.code, Some(2));
}

#[test]
fn the_help_of_each_command_has_an_example() {
    let help = tsquant(&shipped(""), ["--help"]).succeeded().stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names: Vec<&str> = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next()).collect();
    let names: Vec<&str> = names.into_iter().filter(|name| !name.is_empty() && *name != "help").collect();
    assert!(names.len() >= 4, "{help}");
    for name in names {
        let help = tsquant(&shipped(""), [name, "--help"]).succeeded().stdout;
        assert!(help.contains("Example") && help.contains(&format!(" tsquant {name} ")), "{help}");
    }
}

#[test]
fn a_dry_run_writes_nothing_and_prints_an_experiment() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]");
    folder.write("e.yaml", &yaml);
    let before = folder.listing();
    let ran = tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run"]).succeeded();
    assert_eq!(folder.listing(), before);
    for part in ["would be quantized", "# about", "calibrate", "nothing was written", "memory"] {
        assert!(ran.stdout.contains(part), "{part} is not in {}", ran.stdout);
    }
    // What it prints is the experiment that a run would have written, and runs itself.
    folder.write("printed.yaml", &ran.stdout);
    tsquant(folder.path(), ["quantize", "printed.yaml", "--quiet"]).succeeded();
    let written = fs_err::read_to_string(folder.path().join("run/experiment.yaml")).unwrap();
    assert!(ran.stdout.starts_with(&written), "{} is not at the beginning of {}", written, ran.stdout);
}

#[test]
fn a_dry_run_refuses_what_a_run_refuses() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]");
    for (settings, code) in
        [("model.path=e.yaml", 1), ("calibration.inputs=[y]", 2), ("quantization.weights.bits=1", 2)]
    {
        folder.write("e.yaml", &yaml);
        let ran = tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run", "--set", settings]);
        let line = ran.refused(code).to_owned();
        assert_eq!(folder.quantize(&yaml, &[settings]).refused(code), line);
    }
    fs_err::create_dir(folder.path().join("run")).unwrap();
    folder.write("run/mine.txt", "text");
    let ran = tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run"]);
    assert!(ran.refused(1).contains("found a directory that no run of tsquant made"));
}

#[test]
fn a_dry_run_checks_the_place_and_prints_nothing_when_quiet() {
    let folder = Folder::new();
    folder.write("e.yaml", experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]"));
    folder.write("file", "kept");
    let dry = |setting: &str| tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run", "--quiet", "--set", setting]);
    let before = folder.listing();
    let no_folder = "file: expected a folder for the run directory, found a file";
    for (dir, told) in [
        ("output.dir=file/run", no_folder),
        ("output.dir=file/a/run", no_folder),
        ("output.dir=/proc/none/run", "/proc: cannot write the run directory"),
    ] {
        let ran = dry(dir);
        let line = ran.refused(1);
        assert!(line.contains(told), "{dir}: {line}");
    }
    let ran = dry("output.dir=a/b/run").succeeded();
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", ""));
    assert_eq!(folder.listing(), before);
}
