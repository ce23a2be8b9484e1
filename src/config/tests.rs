//! From YAML to plans, whole.

use super::*;
use crate::threshold::{ErrorMethod, Exponent};

const SHIPPED: &str = include_str!("../../configs/mnist_resnet.yaml");

const SHORTEST: &str = "\
model: {path: m.pt}
calibration: {data: c.npz, inputs: [x]}
";

/// A folder with the files that the experiments here name.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs_err::create_dir_all(folder.path().join("models")).unwrap();
    let files = ["mnist_resnet.pt", "mnist_calibration.safetensors", "mnist_evaluation.safetensors"];
    for file in files.map(|file| format!("models/{file}")).iter().map(String::as_str).chain(["m.pt", "c.npz"]) {
        fs_err::write(folder.path().join(file), "").unwrap();
    }
    folder
}

fn run_in(folder: &Path, yaml: impl AsRef<[u8]>, settings: &[&str]) -> Result<Plan, String> {
    let file = folder.join("e.yaml");
    fs_err::write(&file, yaml).unwrap();
    let settings: Vec<String> = settings.iter().copied().map(String::from).collect();
    let plan = Experiment::read(&file).and_then(|e| e.overlay(&settings)?.resolve(folder));
    plan.map_err(|error| error.to_string())
}

fn run(yaml: impl AsRef<[u8]>, settings: &[&str]) -> Result<Plan, String> {
    run_in(folder().path(), yaml, settings)
}

/// The error with its folder taken out.
fn refusal(yaml: impl AsRef<[u8]>, settings: &[&str]) -> String {
    let folder = folder();
    let error = run_in(folder.path(), yaml, settings).unwrap_err();
    assert!(!error.contains('\n') && !error.is_empty(), "{error}");
    error.replace(&format!("{}/", folder.path().display()), "/dir/")
}

#[test]
fn the_shipped_experiment_says_what_design_10_says() {
    let folder = folder();
    let plan = run_in(folder.path(), SHIPPED, &[]).unwrap();
    assert_eq!(plan.model, folder.path().join("models/mnist_resnet.pt"));
    assert_eq!(plan.output.dir, folder.path().join("runs/mnist_resnet"));
    assert_eq!(plan.calibration.samples.map(std::num::NonZeroUsize::get), Some(256));
    assert_eq!(plan.calibration.transform.scale, Some(1.0 / 255.0));
    let evaluation = plan.evaluation.unwrap();
    assert_eq!(evaluation.labels.as_deref(), Some("labels"));
    assert_eq!(evaluation.metrics, [Metric::Top1, Metric::Agreement, Metric::Sqnr]);
    assert_eq!(evaluation.data.transform, plan.calibration.transform);
    let methods = [plan.weights.error_method, plan.activations.error_method];
    assert_eq!((methods, plan.activations.z_threshold), ([ErrorMethod::Mse; 2], None));
}

#[test]
fn fills_every_default() {
    let folder = folder();
    let plan = run_in(folder.path(), SHORTEST, &[]).unwrap();
    let shown = plan.to_yaml().unwrap().replace(&folder.path().display().to_string(), "/dir");
    insta::assert_snapshot!(shown, @r"
model:
  path: /dir/m.pt
calibration:
  data: /dir/c.npz
  inputs:
  - x
  samples: null
  shuffle: false
  batch_size: 32
  transform:
    resize: null
    crop: null
    layout: nchw
    scale: null
    mean: null
    std: null
quantization:
  weights:
    bits: 8
    grid: symmetric
    granularity: per_channel
    rounding: nearest
    rounding_fallback: false
  activations:
    bits: 8
    grid: uniform
    granularity: per_tensor
  weights_error_method: MSE
  activation_error_method: MSE
  weights_bias_correction: closed_form
device: auto
allow_tf32: false
output:
  dir: /dir/runs/e
  format: fake_quant
evaluation: null
seed: 0
");
}

#[test]
fn a_written_plan_resolves_into_an_equal_plan() {
    let every = r#"
calibration.inputs={"1": "true", b: {const: 16000}, c: {const: 1.0}, d: {const: null}, "e: #": {const: false}, f: {const: 1e300}, g: " [x\n"}
calibration.transform={resize: 256, crop: [224, 200], layout: nhwc, mean: [0.1, -2, 3e-8], std: [1]}
calibration.shuffle=true
evaluation.transform={}
evaluation.samples=7
evaluation.metrics=[max_abs_diff, cosine, top5]
quantization.weights={bits: 2, grid: power_of_two, granularity: per_tensor, rounding: gptq, rounding_fallback: true}
quantization.activations={bits: 16, grid: symmetric}
quantization.weights_error_method=LP
quantization.activation_error_method=LP
quantization.l_p_value=3
quantization.z_threshold=7
quantization.weights_bias_correction=none
device=cuda
allow_tf32=true
seed=18446744073709551615
output.dir='a "b": #c'"#;
    let every: Vec<&str> = every.lines().skip(1).collect();
    let cases: [(&str, &[&str]); 8] = [
        (SHORTEST, &[]),
        (SHIPPED, &[]),
        (SHIPPED, &every),
        (SHIPPED, &["evaluation=", "calibration.samples=null"]),
        (SHIPPED, &["evaluation.labels=", "evaluation.metrics="]),
        (SHIPPED, &["evaluation.output=1"]),
        (SHIPPED, &["evaluation.output='0.1'"]),
        (SHIPPED, &["evaluation.output='logits #: '"]),
    ];
    let folder = folder();
    for (yaml, settings) in cases {
        let plan = run_in(folder.path(), yaml, settings).unwrap();
        let written = plan.to_yaml().unwrap();
        let again = run_in(&folder.path().join("models"), &written, &[]).unwrap();
        assert_eq!(again, plan, "{written}");
        assert_eq!(again.to_yaml().unwrap(), written);
    }
}

#[test]
fn every_error_method_goes_to_either_side() {
    let p = Exponent::try_from(5).unwrap();
    let (lp, no_clipping) = (ErrorMethod::Lp { p }, ErrorMethod::NoClipping);
    let methods = [no_clipping, ErrorMethod::Mse, ErrorMethod::Mae, lp, ErrorMethod::Kl, ErrorMethod::Hmse];
    assert_eq!(methods.map(ErrorMethod::name), ErrorMethod::NAMES);
    let folder = folder();
    for (weights, activations) in methods.iter().flat_map(|w| methods.iter().map(move |a| (*w, *a))) {
        let methods =
            format!("quantization={{weights_error_method: {weights}, activation_error_method: {activations}}}");
        let plan = run_in(folder.path(), SHORTEST, &[&methods, "quantization.l_p_value=5"]).unwrap();
        assert_eq!((plan.weights.error_method, plan.activations.error_method), (weights, activations));
        let written = plan.to_yaml().unwrap();
        let either = weights.exponent().or(activations.exponent());
        assert_eq!(written.contains("\n  l_p_value: 5\n"), either.is_some(), "{written}");
        let is_scored = [weights, activations].contains(&ErrorMethod::Hmse);
        assert_eq!((plan.hessian.is_some(), written.contains("\nhessian:\n")), (is_scored, is_scored));
        assert_eq!(run_in(folder.path(), &written, &[]).unwrap(), plan, "{written}");
    }
}

#[test]
fn one_word_stands_for_keys() {
    let chosen = |settings: &[&str]| {
        let folder = folder();
        let plan = run_in(folder.path(), SHORTEST, settings).unwrap();
        let written = plan.to_yaml().unwrap();
        assert!(!written.contains("accuracy"), "{written}");
        assert_eq!(run_in(folder.path(), &written, &[]).unwrap(), plan, "{written}");
        let WeightPlan { error_method, bias_correction, rounding, rounding_fallback, scheme, .. } = plan.weights;
        assert_eq!(scheme.bits.get(), 8);
        (error_method, plan.activations.error_method, bias_correction, (rounding, rounding_fallback))
    };
    let (mse, hmse, nearest) = (ErrorMethod::Mse, ErrorMethod::Hmse, (Rounding::Nearest, false));
    assert_eq!(chosen(&["quantization.accuracy="]), (mse, mse, BiasCorrection::ClosedForm, nearest));
    assert_eq!(chosen(&["quantization.accuracy=fast"]), (mse, mse, BiasCorrection::Weighted, nearest));
    assert_eq!(chosen(&["quantization.accuracy=balanced"]), (mse, hmse, BiasCorrection::Weighted, nearest));
    let high = (mse, hmse, BiasCorrection::Weighted, (Rounding::Gptq, true));
    let falls_back = |settings: &[&str]| {
        let folder = folder();
        run_in(folder.path(), SHORTEST, settings).unwrap().hessian.unwrap().allow_fallback
    };
    assert!(falls_back(&["quantization.accuracy=balanced"]) && falls_back(&["quantization.accuracy=high"]));
    assert!(
        !falls_back(&["quantization.accuracy=fast"]) && !falls_back(&["quantization.activation_error_method=HMSE"])
    );
    assert!(!falls_back(&["quantization.accuracy=high", "hessian.allow_fallback=false"]));
    assert_eq!(chosen(&["quantization.accuracy=high"]), high);
    // Keys of their own win, wherever they stand.
    let keys = "quantization={accuracy: high, weights: {rounding: nearest, rounding_fallback: false}, \
        weights_error_method: MAE, activation_error_method: KL, weights_bias_correction: none}";
    assert_eq!(chosen(&[keys]), (ErrorMethod::Mae, ErrorMethod::Kl, BiasCorrection::None, nearest));
    let refused = refusal(SHORTEST, &["quantization.accuracy=hihg"]);
    assert!(refused.contains("`quantization.accuracy` must be one of `fast`, `balanced`, `high`"), "{refused}");
}

#[test]
fn kl_chooses_for_as_many_bits_as_it_can() {
    let kl = "quantization={weights_error_method: KL, activation_error_method: KL}";
    for bits in 2..=16 {
        for sites in ["weights", "activations"] {
            let plan = run(SHORTEST, &[kl, &format!("quantization.{sites}.bits={bits}")]);
            assert_eq!(plan.is_ok(), bits <= ErrorMethod::KL_MAX_BITS, "{bits} bits of {sites}: {plan:?}");
        }
    }
    // Each side has bits of its own.
    let plan = run(SHORTEST, &["quantization={weights: {bits: 16}, activation_error_method: KL}"]).unwrap();
    assert_eq!((plan.weights.scheme.bits.get(), plan.activations.scheme.bits.get()), (16, 8));
}

#[test]
fn exponents_and_deviations_have_defaults() {
    let lp = "quantization.weights_error_method=LP";
    let exponent = |set: &[&str]| run(SHORTEST, set).unwrap().weights.error_method.exponent().map(Exponent::get);
    assert_eq!([exponent(&[]), exponent(&[lp])], [None, Some(2)]);
    assert_eq!(exponent(&[lp, "quantization.l_p_value=64", "quantization.l_p_value="]), Some(2));
    assert_eq!(["1", "64"].map(|p| exponent(&[lp, &format!("quantization.l_p_value={p}")])), [Some(1), Some(64)]);
    let z_threshold = |typed: &str| {
        let folder = folder();
        let set = format!("quantization.z_threshold={typed}");
        let plan = run_in(folder.path(), SHORTEST, &[&set]).unwrap();
        let written = plan.to_yaml().unwrap();
        assert_eq!(run_in(folder.path(), &written, &[]).unwrap(), plan, "{written}");
        assert_eq!(written.contains("\n  z_threshold: "), plan.activations.z_threshold.is_some(), "{written}");
        plan.activations.z_threshold
    };
    assert_eq!(["", "null"].map(z_threshold), [None, None]);
    assert_eq!(["7", "7.0", "7e0"].map(z_threshold), [Some(7.0); 3]);
    for z in [0.1, 1.0 / 3.0, 3.5, 1e6, 1e16, 123_456_789_012_345_680.0, 1e300, f64::MAX, 1e-7, f64::from_bits(1)] {
        assert_eq!(z_threshold(&format!("{z:?}")), Some(z));
    }
}

#[test]
fn later_settings_win_and_null_brings_the_default_back() {
    let plan = run(SHIPPED, &["quantization.weights.bits=4", "quantization={weights: {bits: 3}}", "seed=5"]).unwrap();
    assert_eq!((plan.weights.scheme.bits.get(), plan.activations.scheme.bits.get()), (3, 8));
    assert_eq!((plan.seed, plan.calibration.seed), (5, 5));
    assert_eq!(run(SHIPPED, &["seed=5", "seed="]).unwrap().seed, 0);
    assert_eq!(run(SHIPPED, &["evaluation=null"]).unwrap().evaluation, None);
    let inputs = run(SHIPPED, &["calibration.inputs={a: x}", "calibration.inputs={b: y}"]).unwrap().calibration.inputs;
    assert_eq!(inputs, InputsPlan::Named(vec![("b".to_owned(), InputSource::Tensor("y".to_owned()))]));
    let mended = SHIPPED.replace("device: auto", "device: gpu");
    assert!(run(&mended, &[]).is_err() && run(&mended, &["device=cpu"]).is_ok());
}

#[test]
fn outputs_are_named_by_index_or_path() {
    for (typed, expected) in [("1", "1"), ("'1.0'", "1.0"), ("logits", "logits"), ("007", "007"), ("+3", "3")] {
        let plan = run(SHIPPED, &[&format!("evaluation.output={typed}")]).unwrap();
        assert_eq!(plan.evaluation.unwrap().output.as_deref(), Some(expected), "{typed}");
    }
    assert_eq!(run(SHIPPED, &["evaluation.output=1", "evaluation.output="]).unwrap().evaluation.unwrap().output, None);
}

#[test]
fn evaluation_takes_what_it_lacks_from_calibration() {
    let own = ["evaluation={inputs: null, batch_size: 5, transform: {scale: 2}}"];
    let plan = run(SHIPPED, &own).unwrap();
    let evaluation = plan.evaluation.unwrap().data;
    assert_eq!(evaluation.inputs, plan.calibration.inputs);
    assert_eq!(evaluation.batch_size.get(), 5);
    assert_eq!(evaluation.transform, Transform { scale: Some(2.0), ..Transform::default() });
    let unlabelled = run(SHIPPED, &["evaluation.labels=", "evaluation.metrics="]).unwrap();
    assert_eq!(unlabelled.evaluation.unwrap().metrics, [Metric::Agreement, Metric::Sqnr]);
}

#[test]
fn finds_paths_from_the_base_and_through_links() {
    let folder = folder();
    let base = folder.path();
    let set = ["model.path=./models/../m.pt", "output.dir=x/../../y/./z"];
    let plan = run_in(base, SHORTEST, &set).unwrap();
    assert_eq!(plan.model, base.join("m.pt"));
    assert_eq!(plan.output.dir, base.parent().unwrap().join("y/z"));
    #[cfg(unix)]
    {
        fs_err::create_dir_all(base.join("far/away")).unwrap();
        fs_err::write(base.join("far/m.pt"), "").unwrap();
        fs_err::os::unix::fs::symlink(base.join("far/away"), base.join("link")).unwrap();
        let plan = run_in(base, SHORTEST, &["model.path=link/../m.pt"]).unwrap();
        assert_eq!(plan.model, base.join("link/../m.pt"), "far/m.pt, not m.pt");
    }
}

#[test]
fn a_run_does_not_replace_its_own_model_or_data() {
    for dir in ["models", ".", "models/mnist_resnet.pt"] {
        let error = refusal(SHIPPED, &[&format!("output.dir={dir}")]);
        assert!(error.contains("`output.dir`: expected a folder without model and data"), "{error}");
        assert!(error.ends_with("found /dir/models/mnist_resnet.pt in it"), "{error}");
    }
    // Whose hash and classes would change with each run.
    for dir in ["run", "a/run"] {
        let settings = ["calibration.data=models", &format!("output.dir=models/{dir}")];
        let error = refusal(SHIPPED, &settings);
        assert!(error.contains("`output.dir`: expected a folder outside of the data"), "{error}");
        assert!(error.ends_with("found /dir/models around it"), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn a_run_does_not_replace_its_own_model_or_data_through_a_link() {
    let folder = folder();
    let base = folder.path();
    fs_err::os::unix::fs::symlink(base.join("models"), base.join("link")).unwrap();
    let refused = |settings: &[&str]| run_in(base, SHIPPED, settings).unwrap_err();
    let error = refused(&["output.dir=link"]);
    assert!(error.contains("`output.dir`: expected a folder without model and data"), "{error}");
    let error = refused(&["model.path=link/mnist_resnet.pt", "output.dir=models"]);
    assert!(error.ends_with("/link/mnist_resnet.pt in it"), "{error}");
    for [data, dir] in [["models", "link/a/run"], ["link", "models/a/run"]] {
        let error = refused(&[&format!("calibration.data={data}"), &format!("output.dir={dir}")]);
        assert!(error.contains("`output.dir`: expected a folder outside of the data"), "{error}");
    }
    assert!(run_in(base, SHIPPED, &["output.dir=link/run"]).is_ok());
}

#[test]
fn names_file_line_column_and_key() {
    let calibration = "calibration: {data: c.npz, inputs: [x]}";
    let with = |from: &str, to: &str| SHORTEST.replace(from, to);
    let cases = [
        (String::new(), ": the file is empty, expected an experiment with `model` and `calibration`"),
        ("# a comment\n".to_owned(), ": the file is empty, expected an experiment with `model` and `calibration`"),
        ("only text".to_owned(), ":1:1: expected an experiment as a map of keys, found the text `only text`"),
        ("- 1".to_owned(), ":1:1: expected an experiment as a map of keys, found a list"),
        ("a: 1\n---\nb: 2".to_owned(), ":3:1: not valid YAML: expected one document, found several"),
        ("a: \"x\ny".to_owned(), ":1:4: not valid YAML: unclosed quote"),
        (format!("{SHORTEST}model: {{}}"), ":3:1: `model` is given twice"),
        (with("{path: m.pt}", "m.pt"), ":1:8: `model` must be a map of keys, found the text `m.pt`"),
        (with("model: {path: m.pt}", ""), ":2:1: `model.path` is missing, expected the path of a TorchScript file"),
        (
            with("{path: m.pt}", "{path: models}"),
            ":1:15: `model.path`: expected a TorchScript file, found the folder /dir/models",
        ),
        (with("m.pt", "no.pt"), ":1:15: `model.path`: expected a file that exists, found nothing at /dir/no.pt"),
        (with("m.pt", "''"), ":1:15: `model.path`: expected a path, found an empty text"),
        (
            with("c.npz", "no.npz"),
            ":2:21: `calibration.data`: expected a file that exists, found nothing at /dir/no.npz",
        ),
        (
            with(", inputs: [x]", ""),
            ":2:14: `calibration.inputs` is missing, expected the tensors that the model takes",
        ),
        (
            with("{data: c.npz, inputs: [x]}", "\n  data: c.npz\n  inputs: [x]\n  batchsize: 32"),
            ":5:3: unknown key `batchsize` in `calibration`, did you mean `batch_size`?",
        ),
        (
            with(calibration, "calibration: &it {data: c.npz, inputs: [x]}\nevaluation: *it").replace("[x]", "[x, 1]"),
            ":2:44: `calibration.inputs[1]` must be the name of a tensor (in quotes where it reads as a number) or \
             {const: VALUE}, found the number 1",
        ),
        (
            format!("{SHORTEST}output: {{format: int8}}\ndevice: cuda"),
            ":4:9: `device`: the format int8 computes on the processor: expected cpu, found cuda:0",
        ),
        (
            format!(
                "{SHORTEST}output: {{format: int8, reduce_range: true}}\n\
                 mixed_precision: {{activations: {{bits: [4, 8], average: 6}}}}"
            ),
            ":3:38: `output.reduce_range`: `mixed_precision.activations` chooses the bits of activations: expected auto or \
             false, found true",
        ),
        (
            format!("{SHORTEST}quantization: {{l_p_value: 65}}"),
            ":3:27: `quantization.l_p_value`: expected a whole number from 1 to 64, found 65",
        ),
        (
            format!("{SHORTEST}quantization: {{z_threshold: 0}}"),
            ":3:29: `quantization.z_threshold`: expected a finite number of standard deviations above 0, found 0.0",
        ),
        (
            format!("{SHORTEST}quantization: {{activations: {{bits: 9}}, activation_error_method: KL}}"),
            ":3:65: `quantization.activation_error_method`: KL chooses for at most 8 bits, found 9 in \
             `quantization.activations.bits`",
        ),
    ];
    for (yaml, expected) in cases {
        assert_eq!(refusal(&yaml, &[]), format!("/dir/e.yaml{expected}"), "{yaml}");
    }
}

#[test]
fn refuses_what_is_not_a_small_text_file() {
    assert_eq!(
        refusal(b"a: 1\nb: \xc3\xa9\xff", &[]),
        "/dir/e.yaml:2:5: not valid YAML: expected UTF-8, found other bytes"
    );
    assert!(refusal(b"a: 1\n\0b: 2", &[]).starts_with("/dir/e.yaml:2:1: not valid YAML: "));
    let long = " ".repeat(1 << 20) + "\n";
    assert_eq!(refusal(long, &[]), "/dir/e.yaml: cannot be read: expected at most 1048576 bytes, found more");
    let folder = folder();
    let missing = Experiment::read(&folder.path().join("no.yaml")).unwrap_err().to_string();
    assert!(missing.contains("no.yaml: cannot be read: "), "{missing}");
    let directory = Experiment::read(folder.path()).unwrap_err().to_string();
    assert!(directory.contains(": cannot be read: "), "{directory}");
}

#[test]
fn names_the_device_flag() {
    let folder = folder();
    let file = folder.path().join("e.yaml");
    fs_err::write(&file, SHORTEST).unwrap();
    let on = |name: &str| Experiment::read(&file).unwrap().with_device(name).resolve(folder.path());
    assert_eq!(on("cpu").unwrap().device, DevicePlan::Cpu);
    assert_eq!(on("cuda").unwrap().device, DevicePlan::Cuda(0));
    assert_eq!(on("cuda:1").unwrap().device, DevicePlan::Cuda(1));
    let refused = "--device cuda:x: `device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found `cuda:x`";
    assert!(on("cuda:x").unwrap_err().to_string().starts_with(refused));
}

#[test]
fn names_the_flag_and_the_key() {
    let settings = SETTINGS.lines().map(|line| line.split_once(" => ").unwrap());
    for (setting, expected) in settings {
        let refusal = refusal(SHIPPED, &[setting]);
        let flag = format!("--set {setting}: ");
        assert_eq!(refusal.strip_prefix(&flag).unwrap_or(&refusal), expected, "{setting}");
    }
}

/// Settings laid over the shipped experiment, and what is said of each.
const SETTINGS: &str = r#"quantization.weights.bits=17 => `quantization.weights.bits`: bits must be from 2 to 16, found 17
quantization.weights.bits=-1 => `quantization.weights.bits` must be a whole number, 0 or more, found the number -1
quantization.weights.bits=8.0 => `quantization.weights.bits` must be a whole number, 0 or more, found the number 8.0
quantization.weights.grid=simetric => `quantization.weights.grid` must be one of `symmetric`, `uniform`, `power_of_two`, found `simetric`, did you mean `symmetric`?
quantization.weights.grid=Symmetric => `quantization.weights.grid` must be one of `symmetric`, `uniform`, `power_of_two`, found `Symmetric`, did you mean `symmetric`?
quantization.weights.grid=3 => `quantization.weights.grid` must be one of `symmetric`, `uniform`, `power_of_two`, found the number 3
quantization.weights.rounding=gpt => `quantization.weights.rounding` must be one of `nearest`, `gptq`, found `gpt`, did you mean `gptq`?
quantization.weights.roundin=gptq => unknown key `roundin` in `quantization.weights`, did you mean `rounding`?
quantization.activations.granularity=per_channel => `quantization.activations.granularity`: activations are quantized per tensor, expected `per_tensor`, found `per_channel`
mixed_precision={} => `mixed_precision`: expected `weights`, `activations` or both, found neither
mixed_precision.weights.bits=[4, 8] => `mixed_precision.weights`: expected `average` or `memory`, which bits may not exceed, found neither
mixed_precision.weight.average=5 => unknown key `weight` in `mixed_precision`, did you mean `weights`?
mixed_precision.weights={bits: [4, 8], averag: 5} => unknown key `averag` in `mixed_precision.weights`, did you mean `average`?
hessian=5 => `hessian` must be a map of keys, found the number 5
hessian.probs=5 => unknown key `probs` in `hessian`, did you mean `probes`?
hessian.probes=0 => `hessian.probes`: expected a whole number from 1 to 4294967295, found 0
hessian.probes=4097 => `hessian.probes`: expected from 1 to 4096 probes, found 4097
hessian={probes: 1, tolerance: 0.1} => `hessian.probes`: expected at least 2 probes, as `tolerance` is about how much they differ, found 1
hessian.tolerance=0 => `hessian.tolerance`: expected a relative error above 0 and at most 1, found 0.0
hessian.tolerance=.nan => `hessian.tolerance`: expected a relative error above 0 and at most 1, found NaN
hessian.distribution=gauss => `hessian.distribution` must be one of `rademacher`, `normal`, found `gauss`
hessian.allow_fallback=yes => `hessian.allow_fallback` must be true or false, found the text `yes`
quantization.weights_error_method=hmse => `quantization.weights_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `hmse`, did you mean `HMSE`?
quantization.weights_error_method=mse => `quantization.weights_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `mse`, did you mean `MSE`?
quantization.activation_error_method=Mae => `quantization.activation_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `Mae`, did you mean `MAE`?
quantization.weights_error_method=lp => `quantization.weights_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `lp`, did you mean `LP`?
quantization.activation_error_method=Kl => `quantization.activation_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `Kl`, did you mean `KL`?
quantization.weights_error_method=no_clipping => `quantization.weights_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `no_clipping`
quantization.weights_error_method=NoClipping => `quantization.weights_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found `NoClipping`, did you mean `NOCLIPPING`?
quantization.activation_error_method=2 => `quantization.activation_error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, `HMSE`, found the number 2
quantization={weights: {bits: 9}, weights_error_method: KL} => `quantization.weights_error_method`: KL chooses for at most 8 bits, found 9 in `quantization.weights.bits`
quantization={activations: {bits: 16}, activation_error_method: KL} => `quantization.activation_error_method`: KL chooses for at most 8 bits, found 16 in `quantization.activations.bits`
quantization.l_p_value=0 => `quantization.l_p_value`: expected a whole number from 1 to 64, found 0
quantization.l_p_value=-1 => `quantization.l_p_value`: expected a whole number from 1 to 64, found -1
quantization.l_p_value=65 => `quantization.l_p_value`: expected a whole number from 1 to 64, found 65
quantization.l_p_value=258 => `quantization.l_p_value`: expected a whole number from 1 to 64, found 258
quantization.l_p_value=2.5 => `quantization.l_p_value` must be a whole number, found the number 2.5
quantization.l_p_value=two => `quantization.l_p_value` must be a whole number, found the text `two`
quantization.l_p_value=[1] => `quantization.l_p_value` must be a whole number, found a list
quantization.z_threshold=0 => `quantization.z_threshold`: expected a finite number of standard deviations above 0, found 0.0
quantization.z_threshold=-1 => `quantization.z_threshold`: expected a finite number of standard deviations above 0, found -1.0
quantization.z_threshold=.nan => `quantization.z_threshold`: expected a finite number of standard deviations above 0, found NaN
quantization.z_threshold=.inf => `quantization.z_threshold`: expected a finite number of standard deviations above 0, found inf
quantization.z_threshold=1e999 => `quantization.z_threshold`: expected a finite number of standard deviations above 0, found inf
quantization.z_threshold=nan => `quantization.z_threshold` must be a number, found the text `nan`
quantization.z_threshold=off => `quantization.z_threshold` must be a number, found the text `off`
quantization.z_threshol=3 => unknown key `z_threshol` in `quantization`, did you mean `z_threshold`?
overrides={} => `overrides` must be a list, found a map
device=cuda:x => `device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found `cuda:x`, did you mean `cuda:N`?
device=cuda:+1 => `device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found `cuda:+1`, did you mean `cuda`?
device=cuda:128 => `device`: expected the number of a GPU, 0 to 127, found 128
device=cuda:99999999999 => `device`: expected the number of a GPU, 0 to 127, found 99999999999
device=gpu => `device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found `gpu`, did you mean `cpu`?
device=1 => `device` must be one of `auto`, `cpu`, `cuda`, `cuda:N`, found the number 1
allow_tf32=yes => `allow_tf32` must be true or false, found the text `yes`
output.format=[fake_quant, fake_quant] => `output.format[1]`: expected each format once, found fake_quant twice
output.format=[] => `output.format`: expected the name of a format, found an empty list
output.format={} => `output.format` must be the name of a format, or a list of names of formats, found a map
output.format=fakequant => `output.format` must be one of `fake_quant`, `int8`, `int8_weights`, found `fakequant`, did you mean `fake_quant`?
output.strict=true => `output.strict`: it is for the format int8, which `output.format` does not ask for
output.reduce_range=true => `output.reduce_range`: it is for the format int8, which `output.format` does not ask for
output.reduce_range=always => `output.reduce_range` must be one of `auto`, `true`, `false`, found `always`
output.reduce_range=1 => `output.reduce_range` must be auto, true or false, found the number 1
output.engine=oneDNN => `output.engine` must be one of `auto`, `x86`, `onednn`, `fbgemm`, `qnnpack`, found `oneDNN`, did you mean `onednn`?
evaluation.output=-1 => `evaluation.output`: expected the index of an output, 0 or more, found -1
evaluation.output=0.1 => `evaluation.output` must be the index of an output, or its path (in quotes where it reads as a number), found the number 0.1
evaluation.output='' => `evaluation.output`: expected the index or path of an output, found an empty text
evaluation.output=[0] => `evaluation.output` must be the index of an output, or its path (in quotes where it reads as a number), found a list
evaluation.outputs=0 => unknown key `outputs` in `evaluation`, did you mean `output`?
calibration.samples=0 => `calibration.samples`: expected a whole number from 1 to 4294967295, found 0
calibration.samples=-3 => `calibration.samples`: expected a whole number from 1 to 4294967295, found -3
calibration.samples=many => `calibration.samples` must be a whole number, found the text `many`
calibration.samples=4294967296 => `calibration.samples`: expected a whole number from 1 to 4294967295, found 4294967296
calibration.samples=99999999999999999999 => `calibration.samples` must be a whole number, found the number 1e20
calibration.batch_size=0 => `calibration.batch_size`: expected a whole number from 1 to 4294967295, found 0
calibration.shuffle=yes => `calibration.shuffle` must be true or false, found the text `yes`
calibration.inputs=[] => `calibration.inputs`: expected at least one tensor, found none
calibration.inputs=images => `calibration.inputs` must be a list of tensor names, or a map from argument names to tensor names, found the text `images`
calibration.inputs=[x, {const: abc}] => `calibration.inputs[1].const` must be a number, true, false or null, found the text `abc`
calibration.inputs=[x, {const: .inf}] => `calibration.inputs[1].const`: expected a finite number, found inf
calibration.inputs=[x, {konst: 1}] => unknown key `konst` in `calibration.inputs[1]`, did you mean `const`?
calibration.inputs=[x, {}] => `calibration.inputs[1].const` is missing, expected a value
calibration.inputs=[x, 5] => `calibration.inputs[1]` must be the name of a tensor (in quotes where it reads as a number) or {const: VALUE}, found the number 5
calibration.inputs=[x, ''] => `calibration.inputs[1]`: expected the name of a tensor, found an empty text
calibration.inputs={a: {const: 1}} => `calibration.inputs`: expected at least one tensor, found constants alone
calibration.inputs={'': x} => `calibration.inputs`: expected the name of an argument, found an empty text
calibration.transform.std=[0] => `calibration.transform.std[0]`: expected a finite number above 0 in float32, found 0.0
calibration.transform.std=[0.1, .nan] => `calibration.transform.std[1]`: expected a finite number above 0 in float32, found NaN
calibration.transform.std=[1e-60] => `calibration.transform.std[0]`: expected a finite number above 0 in float32, found 1e-60
calibration.transform={mean: [1,2], std: [1,2,3]} => `calibration.transform.std`: expected as many numbers as `mean` has (2) or one, found 3
calibration.transform.std=[] => `calibration.transform.std`: expected one number or one per channel, found an empty list
calibration.transform.std=0.5 => `calibration.transform.std` must be a list, found the number 0.5
calibration.transform.mean=[.inf] => `calibration.transform.mean[0]`: expected a finite number in float32, found inf
calibration.transform.scale=1e39 => `calibration.transform.scale`: expected a finite number other than 0 in float32, found 1e39
calibration.transform.scale=0 => `calibration.transform.scale`: expected a finite number other than 0 in float32, found 0.0
calibration.transform.resize=0 => `calibration.transform.resize`: expected from 1 to 65535 pixels, found 0
calibration.transform.crop=0 => `calibration.transform.crop`: expected from 1 to 65535 pixels, found 0
calibration.transform.crop=[1, 2, 3] => `calibration.transform.crop`: expected [height, width], found a list of 3
calibration.transform.crop=[1, x] => `calibration.transform.crop[1]` must be a whole number, found the text `x`
calibration.transform.crop=big => `calibration.transform.crop` must be a number of pixels or [height, width], found the text `big`
calibration.transform.layout=nhcw => `calibration.transform.layout` must be one of `nchw`, `nhwc`, found `nhcw`, did you mean `nhwc`?
evaluation.metrics=[top1, top1] => `evaluation.metrics[1]`: expected each metric once, found top1 twice
evaluation.metrics=[top2] => `evaluation.metrics[0]` must be one of `top1`, `top5`, `agreement`, `sqnr`, `cosine`, `max_abs_diff`, found `top2`, did you mean `top5`?
evaluation.metrics=[accuracy] => `evaluation.metrics[0]` must be one of `top1`, `top5`, `agreement`, `sqnr`, `cosine`, `max_abs_diff`, found `accuracy`
evaluation.metrics=[] => `evaluation.metrics`: expected at least one metric, found an empty list
evaluation.labels= => /dir/e.yaml:57:13: `evaluation.metrics[0]`: top1 needs labels, expected the key `evaluation.labels`, found none
evaluation.labels=5 => `evaluation.labels` must be text (in quotes where it reads as a number), found the number 5
evaluation.data= => `evaluation.data` is missing, expected the path of a data file or a folder of images
evaluation.data=nope.npz => `evaluation.data`: expected a file that exists, found nothing at /dir/nope.npz
seed=-1 => `seed` must be a whole number, 0 or more, found the number -1
seed=1.5 => `seed` must be a whole number, 0 or more, found the number 1.5
seed => expected KEY=VALUE such as `quantization.weights.bits=4`, found no `=`
=1 => expected KEY=VALUE such as `quantization.weights.bits=4`, found an empty name in KEY
a..b=1 => expected KEY=VALUE such as `quantization.weights.bits=4`, found an empty name in KEY
a=[1 => not valid YAML: unclosed bracket '['
a=1 => unknown key `a` in the experiment, expected one of `model`, `calibration`, `quantization`, `overrides`, `mixed_precision`, `hessian`, `device`, `allow_tf32`, `output`, `evaluation`, `seed`, `sweep`
calibration=5 => `calibration` must be a map of keys, found the number 5
output.dir="a\0b" => `output.dir`: expected a path, found a\0b
a=x: y: z => not valid YAML: mapping values are not allowed in this context
quantization.l_p_valu=2 => unknown key `l_p_valu` in `quantization`, did you mean `l_p_value`?
calibration.inputs={a: {const: 18446744073709551615}, b: x} => `calibration.inputs.a.const`: expected a whole number of at most 64 bits, found 18446744073709551615"#;

#[test]
fn survives_any_bytes() {
    let folder = folder();
    let survive = |bytes: &[u8]| {
        let experiment = Experiment::parse(folder.path().join("e.yaml"), bytes);
        if let Err(error) = experiment.and_then(|e| e.resolve(folder.path())) {
            let error = error.to_string();
            assert!(error.contains("e.yaml"), "{error}");
            assert!(!error.chars().any(char::is_control), "{error:?}");
        }
    };
    let bytes = SHIPPED.as_bytes();
    for at in 0..bytes.len() {
        survive(&bytes[..at]);
        for flipped in [bytes[at] ^ 1, bytes[at] ^ 0x20, 0, 0xff] {
            let mut bytes = bytes.to_owned();
            bytes[at] = flipped;
            survive(&bytes);
        }
    }
}
