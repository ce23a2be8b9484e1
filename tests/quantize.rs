//! `tsquant quantize` from end to end: what a run says, writes, repeats and refuses to replace.

mod binary;

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use binary::{Folder, Ran, experiment, listing, shipped, test_data, test_model, tsquant};

/// The shipped experiment, run where its relative paths lead to its files.
fn quantize_shipped(dir: &Path, settings: &[&str], flags: &[&str]) -> Ran {
    let dir = format!("output.dir={}", dir.display());
    let settings = settings.iter().copied().chain([dir.as_str()]).flat_map(|setting| ["--set", setting]);
    let flags = flags.iter().copied();
    tsquant(&shipped(""), ["quantize", "configs/mnist_resnet.yaml"].into_iter().chain(settings).chain(flags))
}

/// Settings that make a run of the shipped experiment short.
const SHORT: [&str; 2] = ["calibration.samples=32", "evaluation.samples=64"];

fn sha256(path: &Path) -> String {
    let digest = Sha256::digest(fs_err::read(path).unwrap());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("expected a number, found {value}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap_or_else(|| panic!("expected a list, found {value}")).iter().map(number).collect()
}

fn sites<'a>(report: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    report["sites"].as_array().unwrap().iter().filter(move |site| site["kind"] == kind)
}

fn names(report: &Value, list: &str) -> Vec<String> {
    let items = report[list].as_array().unwrap();
    items.iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
}

/// The reason why something stays float.
fn reason<'a>(report: &'a Value, name: &str) -> Option<&'a str> {
    report["left_float"].as_array().unwrap().iter().find(|left| left["name"] == name)?["reason"].as_str()
}

/// Keys of a map, in order.
fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("expected a map, found {value}")).keys().map(String::as_str).collect()
}

/// Of a report, what two runs of one experiment share.
fn repeatable(mut report: Value) -> Value {
    let fields = report.as_object_mut().unwrap();
    fields.remove("timings_s").unwrap();
    fields.remove("peak_memory_bytes").unwrap();
    report
}

#[test]
fn the_shipped_experiment_keeps_its_accuracy() {
    let folder = Folder::new();
    let ran = quantize_shipped(&folder.path().join("run"), &[], &[]).succeeded();
    for part in ["top-1 accuracy", "agreement with float", "output SQNR", "1500 rows of evaluation data", "model file"]
    {
        assert!(ran.stdout.contains(part), "{part} is not in {}", ran.stdout);
    }
    assert!(ran.stdout.contains("16 weights and 23 activations quantized"), "{}", ran.stdout);
    assert!(ran.stdout.contains(&format!("written to {}", folder.path().join("run").display())), "{}", ran.stdout);
    assert_eq!(ran.stderr, "load\ncalibrate: 256 rows\nsearch: 39 sites\nemit\ncheck: 64 rows\nevaluate: 1500 rows\n");
    assert_eq!(folder.listing(), ["run", "run/experiment.yaml", "run/quantized.pt", "run/report.json"]);

    let report = folder.report("run");
    check_fields(&report);
    check_hashes(&report);
    let (float, quantized) = (&report["evaluation"]["float"], &report["evaluation"]["quantized"]);
    assert!(number(&float["top1"]) >= 0.985, "{float}");
    assert!((number(&float["top1"]) - number(&quantized["top1"])).abs() <= 0.005, "{float} {quantized}");
    assert!(number(&quantized["agreement"]) > 0.99, "{quantized}");
    assert!(number(&quantized["sqnr_db"]) > 20.0, "{quantized}");
    let share = format!("{:.2}%", 100.0 * number(&quantized["top1"]));
    assert!(ran.stdout.contains(&share), "{share} is not in {}", ran.stdout);
    let bytes = fs_err::metadata(folder.path().join("run/quantized.pt")).unwrap().len();
    assert_eq!(report["files"]["quantized_bytes"], json!(bytes));
    assert_eq!(
        report["files"]["float_bytes"],
        json!(fs_err::metadata(shipped("models/mnist_resnet.pt")).unwrap().len())
    );
}

/// The fields of DESIGN 10, their types and ranges.
fn check_fields(report: &Value) {
    assert_eq!(report["schema"], json!(1));
    assert_eq!(report["model"], json!(shipped("models/mnist_resnet.pt")));
    assert!(["cpu", "cuda:0"].map(|device| json!(device)).contains(&report["device"]), "{}", report["device"]);
    assert_eq!(report["seed"], json!(0));
    assert!(report["versions"]["torch"].as_str().unwrap().starts_with("2.11"), "{}", report["versions"]);
    assert_eq!(report["versions"]["tsquant"], json!(env!("CARGO_PKG_VERSION")));
    let stages = ["load", "calibrate", "search", "emit", "check", "evaluate"];
    let times = stages.map(|stage| number(&report["timings_s"][stage]));
    assert!(times.iter().all(|&time| time >= 0.0), "{times:?}");
    assert!(times.iter().sum::<f64>() <= number(&report["timings_s"]["total"]) + 1e-6, "{}", report["timings_s"]);
    assert!(report["peak_memory_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20));
    assert!(report["warnings"].as_array().unwrap().iter().all(Value::is_string));
    assert_eq!(names(report, "left_float"), ["fc.output"]);
    assert_eq!(reason(report, "fc.output"), Some("an output of the model"));
    assert_eq!((sites(report, "weight").count(), sites(report, "activation").count()), (16, 23));
    sites(report, "weight").chain(sites(report, "activation")).for_each(check_site);
    assert_eq!(keys(&report["evaluation"]["float"]), ["top1", "top5"]);
    let measures = ["agreement", "cosine", "max_abs_diff", "sqnr_db", "top1", "top5"];
    measures.iter().for_each(|measure| assert!(number(&report["evaluation"]["quantized"][measure]).is_finite()));
}

fn check_site(site: &Value) {
    let is_weight = site["kind"] == "weight";
    let (name, layer) = (site["name"].as_str().unwrap(), site["layer"].as_str().unwrap());
    assert!(name.starts_with(layer), "{site}");
    assert!(site["op"].is_string(), "{site}");
    assert_eq!(site["bits"], json!(8));
    assert_eq!(site["grid"], json!(if is_weight { "symmetric" } else { "uniform" }));
    assert_eq!(site["granularity"], json!(if is_weight { "per_channel" } else { "per_tensor" }));
    assert_eq!(site["error_method"], json!("MSE"));
    let (scales, zero_points) = (numbers(&site["scale"]), numbers(&site["zero_point"]));
    assert_eq!(scales.len(), zero_points.len(), "{site}");
    assert!(scales.iter().all(|&scale| scale > 0.0 && scale.is_finite()), "{site}");
    assert!(number(&site["error"]) > 0.0 && number(&site["sqnr_db"]) > 30.0, "{site}");
    assert!((0.0..0.01).contains(&number(&site["clipped_share"])), "{site}");
    if is_weight {
        let thresholds = numbers(&site["threshold"]);
        assert!(scales.len() > 1 && thresholds.len() == scales.len(), "{site}");
        assert!(zero_points.iter().all(|&zero_point| zero_point == 0.0), "{site}");
        thresholds.iter().zip(&scales).for_each(|(threshold, scale)| assert_near(threshold / 128.0, *scale));
    } else {
        let range = numbers(&site["range"][0]);
        assert_eq!((scales.len(), site["range"].as_array().unwrap().len(), range.len()), (1, 1, 2), "{site}");
        assert!(range[0] <= 0.0 && range[1] >= 0.0, "{site}");
        assert!((0.0..=255.0).contains(&zero_points[0]), "{site}");
        assert_near((range[1] - range[0]) / 255.0, scales[0]);
    }
}

/// Equal up to the rounding of float32, in which scales are stored.
fn assert_near(expected: f64, found: f64) {
    assert!((expected - found).abs() <= 1e-6 * expected.abs(), "expected {expected}, found {found}");
}

fn check_hashes(report: &Value) {
    let hashes = &report["hashes"];
    assert_eq!(keys(hashes), ["calibration", "evaluation", "model", "plan"]);
    for (name, hash) in hashes.as_object().unwrap() {
        let hash = hash.as_str().unwrap();
        let is_hex = hash.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        assert!(hash.len() == 64 && is_hex, "{name}: {hash}");
    }
    assert_eq!(hashes["model"], json!(sha256(&shipped("models/mnist_resnet.pt"))));
    assert_eq!(hashes["calibration"], json!(sha256(&shipped("models/mnist_calibration.safetensors"))));
    assert_eq!(hashes["evaluation"], json!(sha256(&shipped("models/mnist_evaluation.safetensors"))));
}

#[test]
fn runs_repeat_byte_for_byte() {
    let folder = Folder::new();
    let place = |name: &str| folder.path().join(name);
    for name in ["first", "second"] {
        quantize_shipped(&place(name), &SHORT, &["--quiet"]).succeeded();
    }
    let elsewhere = format!("output.dir={}", place("third").display());
    let written = place("first/experiment.yaml");
    // The written experiment holds absolute paths: it runs from anywhere.
    let arguments = ["quantize", written.to_str().unwrap(), "--set", &elsewhere];
    tsquant(folder.path(), arguments).succeeded();
    let model = fs_err::read(place("first/quantized.pt")).unwrap();
    for name in ["second", "third"] {
        assert!(fs_err::read(place(name).join("quantized.pt")).unwrap() == model, "{name} is another model");
        assert_eq!(repeatable(folder.report(name)), repeatable(folder.report("first")), "{name}");
    }
    quantize_shipped(&place("fourth"), &[&SHORT[..], &["quantization.weights.bits=7"]].concat(), &["--quiet"])
        .succeeded();
    assert!(fs_err::read(place("fourth/quantized.pt")).unwrap() != model);
    assert_ne!(folder.report("fourth")["hashes"]["plan"], folder.report("first")["hashes"]["plan"]);
}

/// Another batch size may round an activation differently inside libtorch.
#[test]
fn the_batch_size_hardly_matters() {
    let folder = Folder::new();
    let reports = ["1", "7", "64"].map(|size| {
        let settings = [SHORT[0], SHORT[1], &format!("calibration.batch_size={size}")];
        quantize_shipped(&folder.path().join("run"), &settings, &["--quiet"]).succeeded();
        folder.report("run")
    });
    let [one, others @ ..] = &reports;
    for other in others {
        for (a, b) in sites(one, "activation").zip(sites(other, "activation")) {
            let (a_error, b_error) = (number(&a["error"]), number(&b["error"]));
            assert!((a_error - b_error).abs() < 0.01 * a_error, "{a} {b}");
        }
        for (a, b) in sites(one, "weight").zip(sites(other, "weight")) {
            assert_eq!(a, b);
        }
    }
}

#[test]
fn every_error_method_on_every_grid() {
    let folder = Folder::new();
    for method in ["NOCLIPPING", "MAE", "LP", "KL"] {
        for grid in ["symmetric", "uniform", "power_of_two"] {
            let settings = ["weights", "activations"].map(|part| format!("quantization.{part}.grid={grid}"));
            let methods = ["weights", "activation"].map(|part| format!("quantization.{part}_error_method={method}"));
            let settings =
                [SHORT[0], SHORT[1], &settings[0], &settings[1], &methods[0], &methods[1], "quantization.l_p_value=3"];
            quantize_shipped(&folder.path().join("run"), &settings, &["--quiet"]).succeeded();
            let report = folder.report("run");
            for site in report["sites"].as_array().unwrap() {
                assert_eq!((&site["error_method"], &site["grid"]), (&json!(method), &json!(grid)));
                assert_eq!(site["l_p_value"], if method == "LP" { json!(3) } else { Value::Null });
                let may_clip = method != "NOCLIPPING";
                assert!(may_clip || number(&site["clipped_share"]) == 0.0, "{site}");
            }
            let agreement = number(&report["evaluation"]["quantized"]["agreement"]);
            assert!(agreement >= 0.95, "{method}, {grid}: {agreement}");
        }
    }
}

#[test]
fn outliers_do_not_count_beyond_a_z_threshold() {
    let folder = Folder::new();
    let run = |name: &str, setting: &str| {
        let settings = [SHORT[0], SHORT[1], "quantization.activation_error_method=NOCLIPPING", setting];
        quantize_shipped(&folder.path().join(name), &settings, &["--quiet"])
    };
    run("without", "quantization.z_threshold=null").succeeded();
    run("with", "quantization.z_threshold=4").succeeded();
    let (without, with) = (folder.report("without"), folder.report("with"));
    let mut narrowed = 0;
    for (a, b) in sites(&without, "activation").zip(sites(&with, "activation")) {
        let (a_range, b_range) = (numbers(&a["range"][0]), numbers(&b["range"][0]));
        assert!(b_range[1] - b_range[0] <= (a_range[1] - a_range[0]) * 1.01, "{a} {b}");
        let says =
            b["notes"].as_array().is_some_and(|notes| notes[0].as_str().unwrap().contains("4 standard deviations"));
        assert_eq!(says, number(&b["clipped_share"]) > 0.0, "{b}");
        narrowed += usize::from(says);
    }
    assert!(narrowed > 5, "{narrowed}");
    let none = run("none", "quantization.z_threshold=0.001");
    let error = none.refused(1);
    assert!(error.contains("expected a z_threshold that leaves values to quantize, found 0.001"), "{error}");
}

#[test]
fn grids_bits_and_granularity_reach_the_sites() {
    let folder = Folder::new();
    for grid in ["symmetric", "uniform", "power_of_two"] {
        for bits in [4, 8] {
            let settings = ["weights", "activations"]
                .map(|part| format!("quantization.{part}={{bits: {bits}, grid: {grid}, granularity: per_tensor}}"));
            let settings = [SHORT[0], SHORT[1], &settings[0], &settings[1]];
            quantize_shipped(&folder.path().join("run"), &settings, &["--quiet"]).succeeded();
            let report = folder.report("run");
            for site in report["sites"].as_array().unwrap() {
                check_quantizer(site, grid, bits);
            }
            // Four bits cost much; eight hardly anything.
            let agreement = number(&report["evaluation"]["quantized"]["agreement"]);
            assert!(agreement >= if bits == 8 { 0.95 } else { 0.2 }, "{grid}, {bits} bits: {agreement}");
        }
    }
}

/// A per-tensor quantizer lies on its grid.
fn check_quantizer(site: &Value, grid: &str, bits: i32) {
    assert_eq!(
        (&site["grid"], &site["bits"], &site["granularity"]),
        (&json!(grid), &json!(bits), &json!("per_tensor"))
    );
    let (scales, zero_points) = (numbers(&site["scale"]), numbers(&site["zero_point"]));
    assert_eq!((scales.len(), zero_points.len()), (1, 1), "{site}");
    assert!((0.0..0.2).contains(&number(&site["clipped_share"])), "{site}");
    if grid == "uniform" {
        let range = numbers(&site["range"][0]);
        assert!(site["threshold"].is_null() && range[0] <= 0.0 && range[1] >= 0.0, "{site}");
        assert_near((range[1] - range[0]) / (2f64.powi(bits) - 1.0), scales[0]);
        return;
    }
    let threshold = numbers(&site["threshold"])[0];
    // Signed, or unsigned where no negative value was seen: one bit more of resolution.
    let levels = (threshold / scales[0]).log2();
    assert!(levels.round() as i32 == bits || levels.round() as i32 == bits - 1, "{site}");
    assert_near(levels.round(), levels);
    assert!(site["range"].is_null() && zero_points[0] == 0.0, "{site}");
    if grid == "power_of_two" {
        assert_eq!(threshold.log2().fract(), 0.0, "{site}");
    }
}

#[test]
fn quiet_prints_nothing_and_the_device_is_checked() {
    let folder = Folder::new();
    let run = folder.path().join("run");
    let quiet = quantize_shipped(&run, &SHORT, &["--quiet", "--device", "cpu"]).succeeded();
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
    assert_eq!(folder.report("run")["device"], json!("cpu"));
    let other = Folder::new();
    let refused = quantize_shipped(&other.path().join("run"), &SHORT, &["--device", "gpu"]);
    let said =
        "--device gpu: `device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found `gpu`, did you mean `cpu`?";
    assert_eq!(refused.refused(2), said);
    assert_eq!(other.listing(), [""; 0]);
}

/// A GPU of a number that no machine has: there is no such GPU, or no CUDA at all.
#[test]
fn a_gpu_that_is_not_there_is_refused_and_nothing_is_left() {
    let folder = Folder::new();
    for flags in [&["--device", "cuda:127"][..], &["--device", "cuda:127", "--dry-run"]] {
        let refused = quantize_shipped(&folder.path().join("run"), &SHORT, flags);
        let line = refused.refused(1);
        assert!(line.starts_with("`device: cuda:127`: expected ") || line.contains("libtorch_cuda.so: "), "{line}");
        assert_eq!(folder.listing(), [""; 0]);
    }
}

#[test]
fn auto_says_what_it_took() {
    let folder = Folder::new();
    let ran = quantize_shipped(&folder.path().join("run"), &SHORT, &["--device", "auto"]).succeeded();
    let report = folder.report("run");
    let took = report["device"].as_str().unwrap();
    assert!(took == "cpu" || took == "cuda:0", "{took}");
    assert!(ran.stdout.contains(&format!(" s on {took}: load ")), "{}", ran.stdout);
}

#[test]
fn without_evaluation_data_the_calibration_data_is_compared_on() {
    let folder = Folder::new();
    let ran = quantize_shipped(&folder.path().join("run"), &["evaluation=", SHORT[0]], &[]).succeeded();
    assert!(ran.stdout.contains("32 rows of calibration data"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("top-1"), "{}", ran.stdout);
    let evaluation = &folder.report("run")["evaluation"];
    assert_eq!(evaluation["data"], json!("calibration"));
    assert_eq!((keys(&evaluation["float"]).len(), &evaluation["quantized"]["rows"]), (0, &json!(32)));
    assert_eq!(folder.report("run")["hashes"]["evaluation"], Value::Null);
}

#[test]
fn an_earlier_run_is_replaced_and_anything_else_is_not() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]");
    let files = ["e.yaml", "run", "run/experiment.yaml", "run/quantized.pt", "run/report.json"];
    folder.quantize(&yaml, &[]).succeeded();
    let notes = folder.write("run/notes.txt", "mine");
    let line = folder.refuses(1, &yaml, &["quantization.weights.bits=5"]);
    assert!(line.contains("found an earlier run with other files in it"), "{line}");
    fs_err::remove_file(notes).unwrap();
    folder.quantize(&yaml, &["quantization.weights.bits=5"]).succeeded();
    assert_eq!(folder.listing(), files);
    assert_eq!(sites(&folder.report("run"), "weight").next().unwrap()["bits"], json!(5));

    for (name, found) in [("photos", "a directory that no run of tsquant made"), ("note.txt", "a file")] {
        let foreign = Folder::new();
        fs_err::create_dir(foreign.path().join("photos")).unwrap();
        fs_err::write(foreign.path().join("photos/cat.png"), "meow").unwrap();
        foreign.write("note.txt", "buy milk");
        let line = foreign.refuses(1, &yaml, &[&format!("output.dir={name}")]);
        assert!(line.contains(found) && line.contains(name), "{line}");
        assert_eq!(fs_err::read_to_string(foreign.path().join("photos/cat.png")).unwrap(), "meow");
        assert_eq!(fs_err::read_to_string(foreign.path().join("note.txt")).unwrap(), "buy milk");
    }
}

#[test]
fn a_run_makes_the_folders_above_its_own() {
    let folder = Folder::new();
    let yaml = experiment(&test_model("frozen_cnn"), &test_data("frozen_cnn"), "[x]");
    folder.quantize(&yaml, &["output.dir=a/b/run"]).succeeded();
    assert_eq!(
        listing(&folder.path().join("a/b")),
        ["run", "run/experiment.yaml", "run/quantized.pt", "run/report.json"]
    );
}

/// Each test model, and the ways to give it what it takes.
const MODELS: &[(&str, &[&str])] = &[
    ("bfloat16", &["[x]"]),
    ("control_flow", &["[x]", "{steps: {const: 1}, x: x}", "[x, {const: 0}]"]),
    ("conv_dimensions", &["[signal, volume]", "{volume: volume, signal: signal}"]),
    ("conv_zoo", &["[x]"]),
    ("extras", &["[x]"]),
    ("frozen_cnn", &["[x]", "{x: x}"]),
    ("fused_encoder", &["[x]"]),
    ("half_precision", &["[x]"]),
    ("in_place", &["[x]"]),
    ("linear", &["[x]"]),
    ("mlp", &["[x]"]),
    (
        "multi_io",
        &["[x]", "[x, y]", "{x: x, scale: {const: 2.0}, shift: {const: -1}}", "[x, {const: null}, {const: 0.5}]"],
    ),
    ("outputs", &["[x]"]),
    ("packed", &["[x, lengths]"]),
    ("recurrent", &["[x]"]),
    ("scripted_encoder", &["[x]"]),
    ("sdpa", &["[x, mask]"]),
    ("small_conv", &["[x]"]),
    ("stateful", &["[x]"]),
    ("tables", &["[x]"]),
    ("tiny_encoder", &["[ids, mask]", "{mask: mask, ids: ids}"]),
    ("training_mode", &["[x]"]),
    ("traps", &["[x]"]),
];

/// Output SQNR in dB that eight bits leave of every test model. Measured: 25.8 (tiny_encoder) and from 33 to 52.
const SQNR_DB: f64 = 20.0;

fn check_model(name: &str) {
    let inputs = MODELS.iter().find(|(model, _)| *model == name).unwrap().1;
    for inputs in inputs {
        let folder = Folder::new();
        let yaml = experiment(&test_model(name), &test_data(name), inputs);
        folder.quantize(&yaml, &[]).succeeded();
        let report = folder.report("run");
        let quantized = &report["evaluation"]["quantized"];
        assert!(number(&quantized["sqnr_db"]) > SQNR_DB, "{name} {inputs}: {quantized}");
        assert_eq!((&quantized["rows"], &quantized["not_finite"]), (&json!(16), &json!(0)), "{name} {inputs}");
        assert!(sites(&report, "weight").count() > 0 && sites(&report, "activation").count() > 0, "{name}");
        for site in report["sites"].as_array().unwrap() {
            assert!(site["clipped_share"].is_null() || site["clipped_share"] == json!(0.0), "{name}: {site}");
        }
    }
}

#[test]
fn every_test_model_is_in_the_list() {
    // No TorchScript, and a model without an output of floating point.
    let is_model = |name: &String| name.ends_with(".pt") && !matches!(name.as_str(), "state_dict.pt" | "indices.pt");
    let found: Vec<String> = listing(&shipped("models/test")).into_iter().filter(is_model).collect();
    let listed: Vec<String> = MODELS.iter().map(|(name, _)| format!("{name}.pt")).collect();
    assert_eq!(found, listed);
}

#[test]
fn every_test_model_but_the_scripted_encoder_is_quantized() {
    MODELS.iter().filter(|(name, _)| *name != "scripted_encoder").for_each(|(name, _)| check_model(name));
}

#[test]
fn the_scripted_encoder_is_quantized() {
    check_model("scripted_encoder");
    let folder = Folder::new();
    folder
        .quantize(&experiment(&test_model("scripted_encoder"), &test_data("scripted_encoder"), "[x]"), &[])
        .succeeded();
    let report = folder.report("run");
    for layer in ["encoder.linear1", "encoder.linear2", "encoder.self_attn.out_proj", "fc"] {
        assert!(names(&report, "sites").contains(&format!("{layer}.weight")), "{layer}");
    }
}

fn report_of(name: &str, inputs: &str) -> Value {
    let folder = Folder::new();
    folder.quantize(&experiment(&test_model(name), &test_data(name), inputs), &[]).succeeded();
    folder.report("run")
}

#[test]
fn what_never_ran_is_named() {
    const NEVER_RAN: Option<&str> = Some("never ran on the calibration data");
    let skipped = report_of("control_flow", "{x: x, steps: {const: 1}}");
    assert_eq!(reason(&skipped, "refine.output"), NEVER_RAN);
    assert!(
        skipped["warnings"].as_array().unwrap().contains(&json!("refine.output: never ran on the calibration data"))
    );
    let without_y = report_of("multi_io", "[x]");
    assert_eq!(reason(&without_y, "side.output"), NEVER_RAN);
    assert_eq!(reason(&report_of("multi_io", "[x, y]"), "side.output"), None);
}

#[test]
fn a_branch_that_never_ran_is_named_though_its_result_meets_another_branch() {
    let report = report_of("control_flow", "[x]");
    assert_eq!(reason(&report, "dark.output"), Some("never ran on the calibration data"), "{}", report["left_float"]);
}

#[test]
fn an_optional_tensor_that_is_given_is_a_site() {
    let report = report_of("multi_io", "[x, y]");
    assert!(names(&report, "sites").contains(&"input.y".to_owned()), "{:?}", reason(&report, "input.y"));
}

#[test]
fn what_only_a_comparison_reads_is_called_no_output_of_the_model() {
    // The branch of control_flow asks whether the mean of x is above 0.
    let report = report_of("control_flow", "[x]");
    assert_ne!(reason(&report, "mean_0.output"), Some("an output of the model"));
}

#[test]
fn the_reasons_of_a_stateful_model_are_true() {
    // forward returns neither of its state updates. It does not write to its argument, but libtorch cannot tell an
    // argument from what the model keeps.
    let report = report_of("stateful", "[x]");
    assert_ne!(reason(&report, "add_0.output"), Some("an output of the model"));
    assert!(reason(&report, "input.x").is_some_and(|reason| reason.contains("what it may share memory with")));
}

#[test]
fn what_was_changed_on_loading_is_told() {
    for (name, note) in [("half_precision", "Half"), ("bfloat16", "BFloat16"), ("training_mode", "training mode")] {
        let warnings = report_of(name, "[x]")["warnings"].to_string();
        assert!(warnings.contains(note), "{name}: {warnings}");
    }
}

#[test]
fn what_forward_does_not_need_is_named_and_counted() {
    let folder = Folder::new();
    folder.write("e.yaml", experiment(&test_model("extras"), &test_data("extras"), "[x]"));
    let ran = tsquant(folder.path(), ["quantize", "e.yaml"]).succeeded();
    let counted = "dropped, as forward does not need them: 2 methods, 3 parameters, 2 buffers, 4 attributes";
    assert!(ran.stdout.contains(counted), "{}", ran.stdout);
    let report = folder.report("run");
    let dropped = report["dropped"].as_array().unwrap().iter();
    let mut dropped: Vec<String> =
        dropped.map(|part| format!("{} {}", part["kind"].as_str().unwrap(), part["name"].as_str().unwrap())).collect();
    dropped.sort();
    // Two attributes are those that PyTorch gives each of its convolutions. `twin.weight` is used, as `fc.weight`.
    let expected = [
        "attribute conv._reversed_padding_repeated_twice",
        "attribute conv.transposed",
        "attribute names",
        "attribute temperature",
        "buffer bn.num_batches_tracked",
        "buffer palette",
        "method other_answer",
        "method pool",
        "parameter head.bias",
        "parameter head.weight",
        "parameter twin.bias",
    ];
    assert_eq!(dropped, expected);
    // Everything of a model with state that its forward reads is kept.
    assert_eq!(report_of("stateful", "[x]")["dropped"], json!([]));
    assert_eq!(report_of("frozen_cnn", "[x]")["dropped"], json!([]));
}
