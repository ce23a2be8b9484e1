//! Entries of `overrides` as typed: what is read, written again and refused before any model is known.

use std::path::Path;

use proptest::prelude::*;

use super::super::{Experiment, Plan};
use super::*;

/// A folder with the files that the experiments here name.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    ["m.pt", "c.npz"].iter().for_each(|file| fs_err::write(folder.path().join(file), "").unwrap());
    folder
}

fn run_in(folder: &Path, yaml: &str) -> Result<Plan, String> {
    let experiment = Experiment::parse(folder.join("e.yaml"), yaml.as_bytes());
    experiment.and_then(|experiment| experiment.resolve(folder)).map_err(|error| error.to_string())
}

/// An experiment with these overrides, a list in YAML, and more keys.
fn with(overrides: &str, more: &str) -> String {
    format!("model: {{path: m.pt}}\ncalibration: {{data: c.npz, inputs: [x]}}\noverrides: {overrides}\n{more}")
}

fn refusal(overrides: &str) -> String {
    let folder = folder();
    let error = run_in(folder.path(), &with(overrides, "")).unwrap_err();
    assert!(!error.contains('\n'), "{error}");
    error.replace(&format!("{}/", folder.path().display()), "/dir/")
}

fn bits(bits: u64) -> Option<Bits> {
    Some(Bits::try_from(bits).unwrap())
}

#[test]
fn an_entry_holds_what_was_typed() {
    let folder = folder();
    let overrides = "
- {layers: fc, weights: {bits: 4, granularity: per_tensor, error_method: KL}}
- {layers: ['layer1.*', \"**.conv2\"], ops: [conv2d, 'aten::linear'], activations: float, inputs: {grid: power_of_two}}
- {ops: add, activations: {z_threshold: 7, error_method: LP, l_p_value: 3, granularity: per_tensor}}";
    let plan = run_in(folder.path(), &with(overrides, "")).unwrap();
    let [first, second, third] = plan.overrides.entries.as_slice() else { panic!("{:?}", plan.overrides) };
    let texts = |patterns: &Option<Vec<Located<LayerPattern>>>| -> Vec<String> {
        patterns.iter().flatten().map(|typed| typed.value.text().to_owned()).collect()
    };
    assert_eq!((texts(&first.layers), &first.ops), (vec!["fc".to_owned()], &None));
    let weights = Fields {
        bits: bits(4),
        granularity: Some(Granularity::PerTensor),
        error_method: Some(Method::Kl),
        ..Fields::default()
    };
    assert_eq!(first.weights.as_ref().map(|typed| &typed.value), Some(&SiteOverride::Set(weights)));
    assert!(first.activations.is_none() && first.inputs.is_none());
    assert_eq!(texts(&second.layers), ["layer1.*", "**.conv2"]);
    let ops: Vec<&str> = second.ops.iter().flatten().map(|typed| typed.value.text()).collect();
    assert_eq!(ops, ["conv2d", "aten::linear"]);
    assert_eq!(second.activations.as_ref().map(|typed| &typed.value), Some(&SiteOverride::Float));
    let keys = |names: &Option<Vec<Located<LayerPattern>>>| -> Vec<String> {
        names.iter().flatten().map(|typed| typed.at.key().to_owned()).collect()
    };
    assert_eq!(keys(&first.layers), ["overrides[0].layers"]);
    assert_eq!(keys(&second.layers), ["overrides[1].layers[0]", "overrides[1].layers[1]"]);
    assert_eq!(third.activations.as_ref().unwrap().at.key(), "overrides[2].activations");
}

#[test]
fn nothing_typed_is_no_override() {
    let folder = folder();
    for nothing in ["[]", "null", ""] {
        let plan = run_in(folder.path(), &with(nothing, "")).unwrap();
        assert_eq!(plan.overrides, Overrides::default());
        assert!(!plan.to_yaml().unwrap().contains("overrides"));
    }
}

#[test]
fn names_the_place_of_what_is_wrong() {
    let cases = [
        ("fc", ":3:12: `overrides` must be a list, found the text `fc`"),
        ("[fc]", ":3:13: `overrides[0]` must be a map of keys, found the text `fc`"),
        ("[{}]", ":3:13: `overrides[0]`: expected `layers` or `ops` to select by, found neither"),
        ("[{weights: float}]", ":3:13: `overrides[0]`: expected `layers` or `ops` to select by, found neither"),
        (
            "[{layers: fc}]",
            ":3:13: `overrides[0]`: expected settings under `weights`, `activations` or `inputs`, found none",
        ),
        ("[{layer: fc, weights: float}]", ":3:14: unknown key `layer` in `overrides[0]`, did you mean `layers`?"),
        (
            "[{layers: [], weights: float}]",
            ":3:22: `overrides[0].layers`: expected a pattern of layer names, found an empty list",
        ),
        (
            "[{layers: fc, weights: float}, {layers: [a, ''], weights: float}]",
            ":3:56: `overrides[1].layers[1]`: expected a pattern of layer names, found an empty text",
        ),
        (
            "[{layers: 3, weights: float}]",
            ":3:22: `overrides[0].layers` must be a name, or a list of names, found the number 3",
        ),
        (
            "[{layers: [3], weights: float}]",
            ":3:23: `overrides[0].layers[0]` must be text (in quotes where it reads as a number), found the number 3",
        ),
        ("[{ops: '', weights: float}]", ":3:19: `overrides[0].ops`: expected the name of an op, found an empty text"),
        (
            "[{layers: fc, weights: 4}]",
            ":3:35: `overrides[0].weights` must be `float` or a map of keys, found the number 4",
        ),
        (
            "[{layers: fc, inputs: flaot}]",
            ":3:34: `overrides[0].inputs` must be `float`, found `flaot`, did you mean `float`?",
        ),
        (
            "[{layers: fc, weights: {}}]",
            ":3:35: `overrides[0].weights`: expected `float` or a map with at least one setting, found an empty map",
        ),
        (
            "[{layers: fc, weights: {bits: 17}}]",
            ":3:42: `overrides[0].weights.bits`: bits must be from 2 to 16, found 17",
        ),
        (
            "[{layers: fc, weights: {gird: uniform}}]",
            ":3:36: unknown key `gird` in `overrides[0].weights`, did you mean `grid`?",
        ),
        (
            "[{layers: fc, weights: {z_threshold: 3}}]",
            ":3:36: unknown key `z_threshold` in `overrides[0].weights`, expected one of `bits`, `grid`, `granularity`, \
             `error_method`, `l_p_value`",
        ),
        (
            "[{layers: fc, activations: {granularity: per_channel}}]",
            ":3:53: `overrides[0].activations.granularity`: activations are quantized per tensor, expected `per_tensor`, \
             found `per_channel`",
        ),
        (
            "[{layers: fc, inputs: {granularity: per_channel}}]",
            ":3:48: `overrides[0].inputs.granularity`: activations are quantized per tensor, expected `per_tensor`, found \
             `per_channel`",
        ),
        (
            "[{layers: fc, activations: {error_method: mse}}]",
            ":3:54: `overrides[0].activations.error_method` must be one of `NOCLIPPING`, `MSE`, `MAE`, `LP`, `KL`, \
             `HMSE`, found `mse`, did you mean `MSE`?",
        ),
        (
            "[{layers: fc, weights: {bits: 9, error_method: KL}}]",
            ":3:35: `overrides[0].weights`: KL chooses for at most 8 bits, found 9",
        ),
        (
            "[{layers: fc, inputs: {l_p_value: 65}}]",
            ":3:46: `overrides[0].inputs.l_p_value`: expected a whole number from 1 to 64, found 65",
        ),
        (
            "[{layers: fc, inputs: {z_threshold: 0}}]",
            ":3:48: `overrides[0].inputs.z_threshold`: expected a finite number of standard deviations above 0, found 0.0",
        ),
    ];
    for (overrides, expected) in cases {
        assert_eq!(refusal(overrides), format!("/dir/e.yaml{expected}"), "{overrides}");
    }
}

#[test]
fn a_flag_is_named() {
    let folder = folder();
    let setting = "overrides=[{layers: fc, weights: {bits: 1}}]".to_owned();
    let experiment = Experiment::parse(folder.path().join("e.yaml"), with("[]", "").as_bytes()).unwrap();
    let error = experiment.overlay(&[setting]).unwrap().resolve(folder.path()).unwrap_err().to_string();
    assert_eq!(
        error,
        "--set overrides=[{layers: fc, weights: {bits: 1}}]: `overrides[0].weights.bits`: bits must be from 2 to 16, found 1"
    );
}

#[test]
fn the_exponent_is_that_of_all_where_an_entry_does_not_say() {
    let folder = folder();
    let overrides = |method: &str, quantization: &str| {
        let overrides = format!("[{{layers: fc, weights: {{error_method: {method}}}}}]");
        let plan = run_in(folder.path(), &with(&overrides, quantization)).unwrap();
        let written = plan.to_yaml().unwrap();
        assert_eq!(run_in(folder.path(), &written).unwrap(), plan, "{written}");
        assert_eq!(written.contains("l_p_value: 5"), method == "LP" && !quantization.is_empty(), "{written}");
        plan.overrides.exponent.get()
    };
    assert_eq!(overrides("LP", "quantization: {l_p_value: 5}"), 5);
    assert_eq!(overrides("LP", ""), 2);
    assert_eq!(overrides("MAE", "quantization: {l_p_value: 5}"), 2, "no one asks for it");
}

#[test]
fn methods_keep_their_exponent() {
    let five = Exponent::try_from(5).unwrap();
    let three = Exponent::try_from(3).unwrap();
    let said = |error_method, l_p_value| Fields { error_method, l_p_value, ..Fields::default() };
    let lp = ErrorMethod::Lp { p: five };
    assert_eq!(said(None, None).method(ErrorMethod::Mae, three), ErrorMethod::Mae);
    assert_eq!(said(None, None).method(lp, three), lp);
    assert_eq!(said(Some(Method::Lp), None).method(ErrorMethod::Mae, five), lp);
    assert_eq!(said(Some(Method::Lp), Some(five)).method(ErrorMethod::Mae, three), lp);
    assert_eq!(said(None, Some(five)).method(ErrorMethod::Lp { p: three }, three), lp);
    assert_eq!(said(Some(Method::Kl), Some(five)).method(lp, three), ErrorMethod::Kl);
}

/// The text of one setting that weights and activations take.
fn setting() -> impl Strategy<Value = String> {
    prop_oneof![
        (2..=8).prop_map(|bits| format!("bits: {bits}")),
        prop::sample::select(vec!["symmetric", "uniform", "power_of_two"]).prop_map(|grid| format!("grid: {grid}")),
        Just("granularity: per_tensor".to_owned()),
        prop::sample::select(ErrorMethod::NAMES.to_vec()).prop_map(|method| format!("error_method: {method}")),
        (1..=64).prop_map(|p| format!("l_p_value: {p}")),
    ]
}

fn words(role: &'static str) -> impl Strategy<Value = String> {
    let settings = prop::collection::btree_map(0..5usize, setting(), 1..4);
    let map = settings.prop_map(|settings| {
        let mut keys = std::collections::BTreeSet::new();
        let own = settings.into_values().filter(|text| keys.insert(text.split(':').next().unwrap().to_owned()));
        format!("{{{}}}", own.collect::<Vec<_>>().join(", "))
    });
    prop_oneof![1 => Just("float".to_owned()), 3 => map].prop_map(move |words| format!("{role}: {words}"))
}

fn entry_text() -> impl Strategy<Value = String> {
    // Any text is a pattern, also one that YAML would read as a number, a list or an alias.
    let name = prop_oneof![Just("**".to_owned()), Just("1".to_owned()), "[a-z.#*:\\[\\]{}\" ]{1,6}"];
    let quoted = |name: &String| serde_json::to_string(name).unwrap();
    let names = prop::collection::vec(name, 1..3).prop_map(move |names| match names.as_slice() {
        [only] => quoted(only),
        several => format!("[{}]", several.iter().map(quoted).collect::<Vec<_>>().join(", ")),
    });
    let roles = prop::sample::select(vec!["weights", "activations", "inputs"]).prop_flat_map(words);
    (prop::sample::select(vec!["layers", "ops"]), names, roles)
        .prop_map(|(key, names, role)| format!("{{{key}: {names}, {role}}}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_written_plan_resolves_into_an_equal_plan(entries in prop::collection::vec(entry_text(), 0..4), p in 1..=64) {
        let folder = folder();
        let text = with(&format!("[{}]", entries.join(", ")), &format!("quantization: {{l_p_value: {p}}}"));
        let plan = run_in(folder.path(), &text).map_err(TestCaseError::fail)?;
        prop_assert_eq!(plan.overrides.entries.len(), entries.len());
        let written = plan.to_yaml().unwrap();
        let again = run_in(folder.path(), &written).map_err(|error| TestCaseError::fail(format!("{error}\n{written}")))?;
        prop_assert!(again == plan, "{}", &written);
        prop_assert_eq!(again.to_yaml().unwrap(), written);
    }
}
