//! Bits under a budget, through the binary: what is chosen, told and refused.

mod binary;

use binary::{Folder, shipped, test_data, test_model};
use serde_json::{Value, json};

/// The trained network: its weights at 2, 4 or 8 bits.
fn mnist(mixed: &str) -> String {
    let quoted = |path: &str| serde_json::to_string(&shipped(path)).expect("a path in UTF-8");
    format!(
        "model: {{path: {}}}\n\
         calibration: {{data: {}, inputs: [images], samples: 32, \
         transform: {{scale: 0.00392156862745098, mean: [0.1307], std: [0.3081]}}}}\n\
         hessian: {{samples: 16, probes: 1}}\n\
         output: {{dir: run}}\n\
         mixed_precision: {mixed}\n",
        quoted("models/mnist_resnet.pt"),
        quoted("models/mnist_calibration.safetensors"),
    )
}

/// A small experiment on a model of `models/test`.
fn small(name: &str, mixed: &str) -> String {
    binary::experiment(&test_model(name), &test_data(name), "[x]") + &format!("mixed_precision: {mixed}\n")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

/// The sites of this kind in `mixed_precision`.
fn sites<'a>(report: &'a Value, kind: &str) -> Vec<&'a Value> {
    let all = report["mixed_precision"]["sites"].as_array().expect("sites");
    all.iter().filter(|site| site["kind"] == kind).collect()
}

/// The noise of a site at the bits that it got.
fn noise(site: &Value) -> f64 {
    let widths = site["widths"].as_array().expect("widths");
    let own = widths.iter().find(|width| width["bits"] == site["bits"]).expect("its width");
    number(&own["noise"])
}

/// What was chosen is what the sites have, and adds up.
fn check(report: &Value) {
    let mixed = &report["mixed_precision"];
    let mut predicted = 0.0;
    for (half, kind) in [("weights", "weight"), ("activations", "activation")] {
        let own = sites(report, kind);
        let reported = report["sites"].as_array().expect("sites").iter().filter(|site| site["kind"] == kind);
        let bits = |site: &Value| (site["name"].clone(), site["bits"].clone());
        assert_eq!(reported.map(bits).collect::<Vec<_>>(), own.iter().map(|site| bits(site)).collect::<Vec<_>>());
        let sum: f64 = own.iter().map(|site| noise(site)).sum();
        assert!((sum - number(&mixed["noise"][half])).abs() <= 1e-9 * sum, "{half}");
        predicted += sum;
        let Some(allotted) = mixed.get(half) else { continue };
        let elements: f64 = own.iter().map(|site| number(&site["elements"])).sum();
        let used: f64 = own.iter().map(|site| number(&site["elements"]) * number(&site["bits"])).sum();
        assert!((elements - number(&allotted["elements"])).abs() <= 1e-9 * elements);
        assert!((used / elements - number(&allotted["used_average"])).abs() <= 1e-9);
        if let Some(average) = allotted.get("average") {
            assert!(number(&allotted["used_average"]) <= number(average) * (1.0 + 1e-9));
        }
        if !allotted["uniform"].is_null() {
            assert!(sum <= number(&allotted["uniform"]["noise"]) * (1.0 + 1e-9), "{half}");
        }
    }
    assert!((predicted - number(&mixed["noise"]["predicted"])).abs() <= 1e-9 * predicted);
    assert_eq!(mixed["noise"]["measured"], report["evaluation"]["quantized"]["squared_error"]);
}

#[test]
fn less_to_spend_is_more_noise() {
    let folder = Folder::new();
    let run = |average: &str| {
        let average = format!("mixed_precision.weights.average={average}");
        folder.quantize(&mnist("{weights: {bits: [8, 2, 4], average: 8}}"), &[&average]).succeeded();
        let report = folder.report("run");
        check(&report);
        // The noise that its own sites made is what evaluation measured on the same rows, give or take.
        let noise = &report["mixed_precision"]["noise"];
        (number(&noise["weights"]), number(&noise["predicted"]), number(&noise["measured"]), report)
    };
    let [(most, _, _, narrow), (middle, ..), (least, predicted, measured, wide)] = ["2.5", "4.1", "8"].map(run);
    assert!(most > 2.0 * middle && middle > 2.0 * least, "{most} {middle} {least}");
    assert!(predicted < 5.0 * measured && measured < 5.0 * predicted, "{predicted} {measured}");
    let widths = |report: &Value| report["mixed_precision"]["weights"]["widths"].clone();
    assert_eq!(widths(&wide), json!([{"bits": 8, "sites": 16, "share": 1.0}]));
    assert!(widths(&narrow).as_array().is_some_and(|all| all.len() == 3), "{}", widths(&narrow));
    assert_eq!(narrow["mixed_precision"]["weights"]["uniform"]["bits"], 2);
    // Activations have the bits of the experiment, and their noise is told all the same.
    assert!(narrow["mixed_precision"].get("activations").is_none());
    assert!(sites(&narrow, "activation").iter().all(|site| site["bits"] == 8));
    assert!(number(&narrow["mixed_precision"]["noise"]["activations"]) > 0.0);
}

#[test]
fn activations_count_by_row() {
    let folder = Folder::new();
    let run = |samples: &str| {
        let yaml = mnist("{activations: {bits: [4, 8], average: 6}}");
        folder.quantize(&yaml, &[&format!("calibration.samples={samples}")]).succeeded();
        let report = folder.report("run");
        check(&report);
        report
    };
    let (few, many) = (run("16"), run("32"));
    assert_eq!(few["mixed_precision"]["activations"]["elements"], many["mixed_precision"]["activations"]["elements"]);
    let input = sites(&few, "activation")[0];
    assert_eq!((&input["name"], &input["elements"]), (&json!("input.images"), &json!(784.0)));
    let bits: Vec<&Value> = sites(&few, "activation").into_iter().map(|site| &site["bits"]).collect();
    assert!(bits.contains(&&json!(4)) && bits.contains(&&json!(8)), "{bits:?}");
    assert!(few["mixed_precision"].get("weights").is_none());
}

#[test]
fn memory_is_bits_by_elements() {
    let folder = Folder::new();
    folder.quantize(&mnist("{weights: {bits: [4, 8], memory: 100kB}}"), &[]).succeeded();
    let report = folder.report("run");
    check(&report);
    let weights = &report["mixed_precision"]["weights"];
    assert_eq!((&weights["memory_bytes"], weights.get("average")), (&json!(100_000), None));
    assert!(number(&weights["used_memory_bytes"]) <= 100_000.0);
    let experiment = fs_err::read_to_string(folder.path().join("run/experiment.yaml")).unwrap();
    assert!(experiment.contains("memory: 100000B"), "{experiment}");
    // What was written is the same experiment.
    let model = fs_err::read(folder.path().join("run/quantized.pt")).unwrap();
    folder.write("again.yaml", experiment);
    binary::tsquant(folder.path(), ["quantize", "again.yaml", "--quiet"]).succeeded();
    assert!(fs_err::read(folder.path().join("run/quantized.pt")).unwrap() == model);
}

#[test]
fn overrides_set_bits_and_count() {
    let folder = Folder::new();
    let yaml = small("small_conv", "{weights: {bits: [4, 8], average: 7}}");
    folder.quantize(&yaml, &["overrides=[{layers: conv1, weights: {bits: 16}}]"]).succeeded();
    let report = folder.report("run");
    check(&report);
    let own = sites(&report, "weight");
    let conv1 = own.iter().find(|site| site["name"] == "conv1.weight").expect("a site");
    assert_eq!((&conv1["bits"], conv1["widths"].as_array().map(Vec::len)), (&json!(16), Some(1)));
    assert!(own.iter().filter(|site| site["name"] != "conv1.weight").all(|site| site["bits"] != 16));
    // Float sites do not count.
    folder.quantize(&yaml, &["overrides=[{layers: conv1, weights: float}]"]).succeeded();
    let report = folder.report("run");
    check(&report);
    assert!(sites(&report, "weight").iter().all(|site| site["name"] != "conv1.weight"));
}

#[test]
fn budgets_that_cannot_be_met_say_what_is_needed() {
    let folder = Folder::new();
    let line = |mixed: &str, settings: &[&str]| {
        let line = folder.refuses(2, &small("small_conv", mixed), settings);
        line.split_once("e.yaml:5:").map_or(line.clone(), |(_, rest)| rest.to_owned())
    };
    let why = "which the narrowest of `bits` and what `overrides` say need, found";
    let found = line("{weights: {bits: [4, 8], average: 3.5}}", &[]);
    assert_eq!(found, format!("52: `mixed_precision.weights.average`: expected at least 4 bits, {why} 3.5"));
    let found = line("{activations: {bits: [4, 8], average: 3.5}}", &[]);
    assert_eq!(found, format!("56: `mixed_precision.activations.average`: expected at least 4 bits, {why} 3.5"));
    let found = line("{weights: {bits: [4, 8], memory: 10B}}", &[]);
    assert!(found.starts_with("51: `mixed_precision.weights.memory`: expected at least "), "{found}");
    // The figure that is told will do.
    let least = found.split("at least ").nth(1).and_then(|rest| rest.split(',').next()).expect("a size").to_owned();
    let enough = format!("{{weights: {{bits: [4, 8], memory: {least}}}}}");
    folder.quantize(&small("small_conv", &enough), &[]).succeeded();
    // Known when calibration has run: how much of all the one with set bits is.
    let fixed = "overrides=[{layers: input, activations: {bits: 16}}]";
    fs_err::remove_dir_all(folder.path().join("run")).unwrap();
    let found = line("{activations: {bits: [4, 8], average: 4.5}}", &[fixed]);
    assert!(found.starts_with("56: `mixed_precision.activations.average`: expected at least "), "{found}");
    let least = found.split("at least ").nth(1).and_then(|rest| rest.split(' ').next()).expect("bits").to_owned();
    let enough = format!("{{activations: {{bits: [4, 8], average: {least}}}}}");
    folder.quantize(&small("small_conv", &enough), &[fixed]).succeeded();
    check(&folder.report("run"));
}

#[test]
fn a_site_without_scores_is_an_error_or_keeps_the_widest_bits_by_leave() {
    let folder = Folder::new();
    let yaml = small("control_flow", "{weights: {bits: [4, 8], average: 7}}");
    let line = folder.refuses(1, &yaml, &[]);
    let expected = "weight site dark.weight: mixed_precision needs Hessian scores, but no gradient reached it on 16 samples: it \
                    did not run, or aten::gt lets no gradient through; `hessian: {allow_fallback: true}` takes its widest bits \
                    there, and `overrides` can set its bits";
    assert_eq!(line, expected);
    folder.quantize(&yaml, &["hessian.allow_fallback=true"]).succeeded();
    let report = folder.report("run");
    let own = sites(&report, "weight");
    let dark = own.iter().find(|site| site["name"] == "dark.weight").expect("a site");
    assert_eq!((&dark["bits"], &dark["widths"][0]["noise"]), (&json!(8), &Value::Null));
    assert!(number(&report["mixed_precision"]["noise"]["unknown_sites"]) >= 1.0);
    let is_told = report["warnings"].as_array().is_some_and(|all| {
        all.iter()
            .filter_map(Value::as_str)
            .any(|it| it.starts_with("dark.weight: 8 bits, the widest, as no noise is known"))
    });
    assert!(is_told, "{}", report["warnings"]);
    folder.quantize(&yaml, &["overrides=[{layers: dark, weights: {bits: 8}}]"]).succeeded();
}

#[test]
fn kept_statistics_and_sweeps_choose_the_same() {
    let folder = Folder::new();
    let yaml = small("small_conv", "{weights: {bits: [4, 8], average: 6}, activations: {bits: [4, 8], average: 6}}");
    folder.quantize(&yaml, &[]).succeeded();
    let alone = folder.report("run");
    check(&alone);
    binary::tsquant(folder.path(), ["calibrate", "e.yaml", "--output", "kept.safetensors", "--quiet"]).succeeded();
    let from_kept = ["quantize", "e.yaml", "--quiet", "--statistics", "kept.safetensors"];
    binary::tsquant(folder.path(), from_kept).succeeded();
    let kept = folder.report("run");
    assert_eq!((&kept["hessian"]["reused"], &alone["hessian"]["reused"]), (&json!(true), &json!(false)));
    assert_eq!(kept["mixed_precision"], alone["mixed_precision"]);

    let sweep = "sweep: {emit: all, runs: {same: null, less: {mixed_precision.weights.average: 5}, \
                 too little: {mixed_precision.weights.average: 3}, plain: {mixed_precision: null}}}\n";
    folder.write("s.yaml", yaml.replace("dir: run", "dir: sweep") + sweep);
    binary::tsquant(folder.path(), ["experiment", "s.yaml", "--quiet"]).succeeded();
    let report = |number: usize| folder.report(&format!("sweep/models/000{number}"));
    let (same, less, plain) = (report(1), report(2), report(4));
    assert_eq!(same["mixed_precision"], alone["mixed_precision"]);
    check(&less);
    assert!(number(&less["mixed_precision"]["weights"]["used_average"]) <= 5.0);
    assert!(plain.get("mixed_precision").is_none());
    let results = fs_err::read_to_string(folder.path().join("sweep/results.json")).unwrap();
    assert!(results.contains("`mixed_precision.weights.average`: expected at least 4 bits"), "{results}");
}

#[test]
fn what_is_printed() {
    let folder = Folder::new();
    folder.write(
        "e.yaml",
        small("small_conv", "{weights: {bits: [4, 8], average: 6}, activations: {bits: [4, 8], average: 6}}"),
    );
    let dry = binary::tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run"]).succeeded().stdout;
    assert!(
        dry.contains(" weights would get 4 or 8 bits each, at most 6 bits on average, those with set bits included\n"),
        "{dry}"
    );
    assert!(dry.contains("hessian "), "{dry}");
    let ran = binary::tsquant(folder.path(), ["quantize", "e.yaml"]).succeeded().stdout;
    for start in ["bits of weights: ", "bits of activations: ", "squared error of the outputs per row: predicted "] {
        assert!(ran.lines().any(|line| line.starts_with(start)), "{start} in {ran}");
    }
}
