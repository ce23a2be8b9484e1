//! HMSE from the experiment file to the report, with the built binary: what the report says of scores, layers without any, and
//! scores that are kept for the next run.

mod binary;

use serde_json::{Value, json};

use binary::{Folder, experiment, test_data, test_model};

/// The experiment of a test model with HMSE on weights and activations.
fn hmse(model: &str, hessian: &str) -> String {
    let text = experiment(&test_model(model), &test_data(model), "[x]");
    let text = text.replace("NOCLIPPING", "HMSE");
    assert!(text.contains("activation_error_method: HMSE"));
    format!("{text}hessian: {hessian}\n")
}

fn site<'a>(report: &'a Value, name: &str) -> &'a Value {
    let sites = report["sites"].as_array().expect("a list of sites");
    sites.iter().find(|site| site["name"] == name).unwrap_or_else(|| panic!("no site {name}"))
}

fn warnings(report: &Value) -> Vec<&str> {
    report["warnings"].as_array().expect("a list").iter().map(|text| text.as_str().expect("a text")).collect()
}

#[test]
fn the_report_says_what_scores_are_worth() {
    let folder = Folder::new();
    folder.quantize(&hmse("small_conv", "{samples: 100, probes: 3, batch_size: 4, seed: 5}"), &[]).succeeded();
    let report = folder.report("run");
    let hessian = &report["hessian"];
    let error = hessian["standard_error"].as_f64().expect("an error of several probes");
    let expected = json!({
        "samples": 16, "probes": 3, "batch_size": 4, "distribution": "rademacher", "seed": 5, "standard_error": error,
        "left_out": [], "reused": false,
    });
    assert_eq!(hessian, &expected);
    assert!(report["timings_s"]["hessian"].as_f64().is_some_and(|seconds| seconds > 0.0));
    for site in report["sites"].as_array().unwrap() {
        assert_eq!(site["error_method"], "HMSE");
        let own = site["scores"]["standard_error"].as_f64().expect("an error of several probes");
        assert!(own <= error && site["weighted_error"].as_f64().is_some_and(|error| error >= 0.0), "{site}");
    }
    // A dead channel of conv2: it has no scores, and MSE chose.
    assert_eq!(site(&report, "conv2.weight")["scores"]["zero_channels"], 1);
    assert_eq!(site(&report, "conv1.weight")["scores"]["zero_channels"], 0);
    let note = "conv2.weight: 1 of 4 channels have Hessian scores of zero (1): MSE there";
    assert!(warnings(&report).contains(&note), "{:?}", warnings(&report));
    assert_eq!(report["hashes"]["plan"].as_str().map(str::len), Some(64));
}

#[test]
fn outputs_without_gradients_are_reported() {
    let folder = Folder::new();
    folder.quantize(&hmse("mlp", "{probes: 1}"), &[]).succeeded();
    let report = folder.report("run");
    assert_eq!(
        (&report["hessian"]["left_out"], &report["hessian"]["standard_error"]),
        (&json!(["best"]), &json!(null))
    );
}

/// With MSE for both, nothing is computed and the report says nothing of it.
#[test]
fn nobody_asks() {
    let folder = Folder::new();
    let yaml = hmse("mlp", "{probes: 1}").replace("HMSE", "MSE");
    folder.quantize(&yaml, &[]).succeeded();
    let report = folder.report("run");
    assert!(report.get("hessian").is_none());
    assert_eq!(report["timings_s"]["hessian"], 0.0);
    assert!(!fs_err::read_to_string(folder.path().join("run/experiment.yaml")).unwrap().contains("hessian"));
    // One layer alone may ask.
    let one = ["overrides=[{layers: fc1, weights: {error_method: HMSE}}]"];
    folder.quantize(&yaml, &one).succeeded();
    let report = folder.report("run");
    let methods = ["fc1.weight", "fc2.weight"].map(|name| site(&report, name)["error_method"].clone());
    assert_eq!(methods, ["HMSE", "MSE"]);
    assert!(site(&report, "fc2.weight").get("scores").is_none());
}

#[test]
fn a_layer_without_scores_is_an_error_or_falls_back_by_leave() {
    let folder = Folder::new();
    let line = folder.refuses(1, &hmse("control_flow", "{}"), &[]);
    let expected = "weight site dark.weight: HMSE needs Hessian scores, but no gradient reached it on 16 samples: it did not \
                    run, or aten::gt lets no gradient through; `hessian: {allow_fallback: true}` takes MSE there, \
                    and `overrides` can set its error_method";
    assert_eq!(line, expected);

    folder.quantize(&hmse("control_flow", "{allow_fallback: true}"), &[]).succeeded();
    let report = folder.report("run");
    let dark = site(&report, "dark.weight");
    assert_eq!(dark["error_method"], "MSE");
    assert!(dark.get("scores").is_none() && dark.get("weighted_error").is_none());
    let start = "dark.weight: MSE instead of HMSE: no gradient reached it on 16 samples";
    assert!(warnings(&report).iter().any(|line| line.starts_with(start)), "{:?}", warnings(&report));
    assert_eq!(site(&report, "mix.weight")["error_method"], "HMSE");

    // The other way out that the error tells.
    let others = ["overrides=[{layers: dark, weights: {error_method: MSE}}]"];
    folder.quantize(&hmse("control_flow", "{}"), &others).succeeded();
}

#[test]
fn a_missed_tolerance_is_told() {
    let folder = Folder::new();
    folder.quantize(&hmse("linear", "{tolerance: 0.2, probes: 2, batch_size: 1}"), &[]).succeeded();
    let report = folder.report("run");
    assert_eq!(report["hessian"]["tolerance"], 0.2);
    let (error, probes) = (&report["hessian"]["standard_error"], &report["hessian"]["probes"]);
    assert!(error.as_f64().is_some_and(|error| error <= 0.2) && probes.as_u64() > Some(2), "{error} {probes}");
    folder.quantize(&hmse("linear", "{tolerance: 1e-9, probes: 2048, samples: 1}"), &[]).succeeded();
    let report = folder.report("run");
    assert_eq!(report["hessian"]["probes"], 4096);
    let is_told = warnings(&report).iter().any(|line| line.contains("still have a relative standard error of"));
    assert!(is_told, "{:?}", warnings(&report));
}

/// A file of the run directory.
fn bytes(folder: &Folder, file: &str) -> Vec<u8> {
    fs_err::read(folder.path().join("run").join(file)).unwrap()
}

#[test]
fn kept_scores_are_used_again_and_no_others() {
    let folder = Folder::new();
    let yaml = hmse("small_conv", "{save: true, probes: 2, seed: 3}");
    let run = |settings: &[&str]| {
        folder.quantize(&yaml, settings).succeeded();
        let report = folder.report("run");
        let told: Vec<String> =
            warnings(&report).into_iter().filter(|line| line.contains("Hessian scores")).map(str::to_owned).collect();
        (report["hessian"]["reused"].as_bool().expect("true or false"), told)
    };
    let reused = |told: &[String]| told.iter().any(|line| line.contains("are those that an earlier run kept in"));
    let anew = |told: &[String], why: &str| {
        told.iter().any(|line| line.starts_with("Hessian scores were computed anew: ") && line.contains(why))
    };

    let (is_reused, told) = run(&[]);
    assert!(!is_reused && !reused(&told) && !anew(&told, ""), "{told:?}");
    assert_eq!(folder.listing().iter().filter(|name| name.starts_with("run/")).count(), 4);
    let (model, scores) = (bytes(&folder, "quantized.pt"), bytes(&folder, "hessian.safetensors"));
    let (is_reused, told) = run(&[]);
    assert!(is_reused && reused(&told), "{told:?}");
    assert_eq!(
        (bytes(&folder, "quantized.pt"), bytes(&folder, "hessian.safetensors")),
        (model.clone(), scores.clone())
    );
    // Other widths need no other scores.
    assert!(run(&["quantization.weights.bits=4"]).0);
    assert!(run(&[]).0);

    // Another request, another number of rows, other sites.
    let shuffled = "calibration={data: DATA, inputs: [x], samples: 6, shuffle: true}";
    let shuffled = shuffled.replace("DATA", &serde_json::to_string(&test_data("small_conv")).unwrap());
    for settings in [
        vec!["hessian.seed=4"],
        vec!["calibration.samples=9"],
        vec![&shuffled, "seed=1"],
        // Other rows.
        vec![&shuffled, "seed=2"],
    ] {
        let (is_reused, told) = run(&settings);
        assert!(!is_reused && anew(&told, "are of another model, data or request"), "{settings:?}: {told:?}");
        let (is_reused, _) = run(&settings);
        assert!(is_reused, "{settings:?}");
    }
    run(&[]);
    // Those of fewer layers are among those of all, but not the other way round.
    assert!(run(&["quantization.activation_error_method=MSE"]).0);
    let (is_reused, told) = run(&[]);
    assert!(!is_reused && anew(&told, "are of other layers, bits or z_threshold"), "{told:?}");
    assert_eq!((bytes(&folder, "quantized.pt"), bytes(&folder, "hessian.safetensors")), (model, scores.clone()));

    // A damaged file.
    let path = folder.path().join("run/hessian.safetensors");
    for damage in [&scores[..scores.len() / 2], b"no scores at all", &[]] {
        fs_err::write(&path, damage).unwrap();
        let (is_reused, told) = run(&[]);
        assert!(!is_reused && anew(&told, "is damaged: "), "{told:?}");
        assert_eq!(bytes(&folder, "hessian.safetensors"), scores);
    }
}

/// A weight that lies transposed in memory is kept in the order of its shape.
#[test]
fn kept_scores_of_a_transposed_weight_are_its_own() {
    let folder = Folder::new();
    let yaml = hmse("traps", "{save: true, probes: 1}");
    folder.quantize(&yaml, &["quantization.weights.bits=4"]).succeeded();
    let first = (bytes(&folder, "quantized.pt"), bytes(&folder, "hessian.safetensors"));
    folder.quantize(&yaml, &["quantization.weights.bits=4"]).succeeded();
    assert_eq!(folder.report("run")["hessian"]["reused"], true);
    assert!((bytes(&folder, "quantized.pt"), bytes(&folder, "hessian.safetensors")) == first);
}

/// A method that overrides take away again asks for nothing.
#[test]
fn overrides_take_the_method_away() {
    let folder = Folder::new();
    let overrides = "overrides=[{layers: '**', weights: {error_method: MSE}, activations: float, inputs: float}]";
    folder.quantize(&hmse("mlp", "{}"), &[overrides]).succeeded();
    assert!(folder.report("run").get("hessian").is_none());
    // A layer that never runs alone, by leave.
    let yaml = hmse("control_flow", "{allow_fallback: true}").replace("HMSE", "MSE");
    folder.quantize(&yaml, &["overrides=[{layers: dark, weights: {error_method: HMSE}}]"]).succeeded();
    assert_eq!(site(&folder.report("run"), "dark.weight")["error_method"], "MSE");
}

#[test]
fn a_dry_run_tells_of_the_stage() {
    let folder = Folder::new();
    folder.write("e.yaml", hmse("small_conv", "{}"));
    let ran = binary::tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run"]).succeeded();
    assert!(ran.stdout.contains("hessian ") && ran.stdout.contains("(16 rows)"), "{}", ran.stdout);
    assert!(ran.stdout.contains("\nhessian:\n  samples: 64\n"), "{}", ran.stdout);
    assert_eq!(folder.listing(), ["e.yaml"]);
}
