//! Overrides laid over the sites of a small net: input → conv1 → conv2 (+ conv1) → add → fc, with a weight that conv1 and conv2
//! share and an output that stays float.

use crate::config::{Experiment, Plan};
use crate::sites::{ActivationSite, ChannelAxis, LeftFloat, Op, OpId, Sites, WeightSite};

use super::*;

const OPS: [(&str, &str); 5] = [
    ("input", "argument"),
    ("body.conv1", "aten::conv2d"),
    ("body.conv2", "aten::conv2d"),
    ("body.add", "aten::add"),
    ("fc", "aten::linear"),
];

fn sites() -> Sites {
    let weight = |name: &str, users: &[OpId]| WeightSite {
        name: name.to_owned(),
        layer: OPS[users[0]].0.to_owned(),
        op: OPS[users[0]].1.to_owned(),
        shape: vec![2, 2],
        channel_axis: 0,
        values: Vec::new(),
        users: users.to_vec(),
    };
    let activation = |name: &str, maker: OpId, readers: &[OpId]| ActivationSite {
        name: name.to_owned(),
        layer: OPS[maker].0.to_owned(),
        op: OPS[maker].1.to_owned(),
        channel_axis: ChannelAxis::Second,
        anchors: Vec::new(),
        members: Vec::new(),
        is_returned: false,
        is_read: true,
        makers: vec![maker],
        readers: readers.to_vec(),
    };
    let left = ("fc.output", "aten::linear", "an output of the model");
    Sites {
        ops: OPS.map(|(name, op)| Op { name: name.to_owned(), op: op.to_owned() }).to_vec(),
        weights: vec![weight("body.conv1.weight", &[1, 2]), weight("fc.weight", &[4])],
        activations: vec![
            activation("input.x", 0, &[1]),
            activation("body.conv1.output", 1, &[2, 3]),
            activation("body.conv2.output", 2, &[3]),
            activation("body.add.output", 3, &[4]),
        ],
        left_float: vec![LeftFloat { name: left.0.to_owned(), op: left.1.to_owned(), reason: left.2.to_owned() }],
        ..Sites::default()
    }
}

fn plan(overrides: &str, quantization: &str) -> Plan {
    let folder = tempfile::tempdir().unwrap();
    ["m.pt", "c.npz"].iter().for_each(|file| fs_err::write(folder.path().join(file), "").unwrap());
    let yaml = "model: {path: m.pt}\ncalibration: {data: c.npz, inputs: [x]}\n";
    let file = folder.path().join("e.yaml");
    fs_err::write(&file, format!("{yaml}overrides: {overrides}\nquantization: {quantization}\n")).unwrap();
    Experiment::read(&file).unwrap().resolve(folder.path()).unwrap()
}

/// One line for each site: its settings in short, or the reason why it is float.
fn settled_over(overrides: &str, quantization: &str) -> Vec<String> {
    let (sites, settings) = settle(&plan(overrides, quantization), sites()).unwrap();
    assert_eq!((sites.weights.len(), sites.activations.len()), (settings.weights.len(), settings.activations.len()));
    let names = sites.weights.iter().map(|site| &site.name).chain(sites.activations.iter().map(|site| &site.name));
    let shown = names.zip(settings.weights.iter().chain(&settings.activations)).map(|(name, own)| {
        let grid = serde_json::to_string(&own.scheme.grid).unwrap();
        let channels = if own.granularity == Granularity::PerChannel { " per channel" } else { "" };
        let exponent = own.error_method.exponent().map(|p| format!("{}", p.get())).unwrap_or_default();
        let z = own.z_threshold.map(|z| format!(" z{z}")).unwrap_or_default();
        format!("{name} {} {}{channels} {}{exponent}{z}", own.scheme.bits, grid.trim_matches('"'), own.error_method)
    });
    let left = sites.left_float.iter().filter(|left| left.name != "fc.output");
    shown.chain(left.map(|left| format!("{} float: {}", left.name, left.reason))).collect()
}

fn settled(overrides: &str) -> Vec<String> {
    settled_over(overrides, "{}")
}

/// What differs from a plan without overrides.
fn changed(overrides: &str) -> Vec<String> {
    let plain = settled("[]");
    settled(overrides).into_iter().filter(|line| !plain.contains(line)).collect()
}

fn refusal(overrides: &str) -> String {
    let error = settle(&plan(overrides, "{}"), sites()).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    let (_, place) = error.split_once("e.yaml:3:").unwrap();
    place.split_once(": ").unwrap().1.to_owned()
}

#[test]
fn without_overrides_all_sites_are_alike() {
    assert_eq!(
        settled_over("[]", "{weights: {bits: 7}, activation_error_method: LP, l_p_value: 3, z_threshold: 9}"),
        [
            "body.conv1.weight 7 symmetric per channel MSE",
            "fc.weight 7 symmetric per channel MSE",
            "input.x 8 uniform LP3 z9",
            "body.conv1.output 8 uniform LP3 z9",
            "body.conv2.output 8 uniform LP3 z9",
            "body.add.output 8 uniform LP3 z9",
        ]
    );
}

#[test]
fn layers_and_ops_select() {
    assert_eq!(changed("[{layers: fc, weights: {bits: 4}}]"), ["fc.weight 4 symmetric per channel MSE"]);
    assert_eq!(changed("[{layers: fc, inputs: {bits: 4}}]"), ["body.add.output 4 uniform MSE"]);
    assert_eq!(changed("[{layers: input, activations: {bits: 4}}]"), ["input.x 4 uniform MSE"]);
    let convolutions = ["body.conv1.output 8 power_of_two MSE", "body.conv2.output 8 power_of_two MSE"];
    for select in ["ops: conv2d", "ops: ['aten::conv2d']", "layers: '*.conv*'", "layers: ['*.conv1', body.conv2]"] {
        assert_eq!(changed(&format!("[{{{select}, activations: {{grid: power_of_two}}}}]")), convolutions, "{select}");
    }
    let both = changed("[{layers: 'body.*', ops: [add, linear], activations: {error_method: KL, z_threshold: 5}}]");
    assert_eq!(both, ["body.add.output 8 uniform KL z5"]);
    assert_eq!(changed("[{layers: '**', activations: {bits: 3}}]").len(), 4);
}

#[test]
fn later_fields_win() {
    let two = "{layers: '**', weights: {bits: 4, grid: uniform, granularity: per_tensor}}, \
               {layers: fc, weights: {bits: 6, error_method: LP}}";
    assert_eq!(changed(&format!("[{two}]")), ["body.conv1.weight 4 uniform MSE", "fc.weight 6 uniform LP2"]);
    assert_eq!(
        settled_over(&format!("[{two}, {{layers: fc, weights: {{l_p_value: 7}}}}]"), "{l_p_value: 5}")[1],
        "fc.weight 6 uniform LP7"
    );
    assert_eq!(settled_over(&format!("[{two}]"), "{l_p_value: 5}")[1], "fc.weight 6 uniform LP5");
}

#[test]
fn float_is_listed_and_may_be_taken_back() {
    let float = "{layers: body.add, activations: float}, {layers: fc, weights: float}";
    assert_eq!(
        changed(&format!("[{float}]")),
        [
            "fc.weight float: `overrides[1].weights` says `float`",
            "body.add.output float: `overrides[0].activations` says `float`"
        ]
    );
    let (left, _) = settle(&plan(&format!("[{float}]"), "{}"), sites()).unwrap();
    assert_eq!(left.float_weights.iter().map(|site| site.name.as_str()).collect::<Vec<_>>(), ["fc.weight"]);
    assert_eq!(
        changed(&format!(
            "[{{layers: '**', weights: {{grid: uniform}}}}, {float}, {{layers: fc, weights: {{bits: 8}}}}]"
        ))[1],
        "fc.weight 8 uniform per channel MSE"
    );
    let twice = "[{layers: body.add, activations: float}, {layers: fc, inputs: float}]";
    assert_eq!(changed(twice), ["body.add.output float: `overrides[0].activations` says `float`"]);
}

#[test]
fn nothing_left_to_quantize_is_an_error() {
    assert_eq!(
        refusal("[{layers: '**', weights: float}, {layers: '**', activations: float}]"),
        "`overrides[1]`: expected at least one site left to quantize, found that the overrides leave all float"
    );
    let weights_alone = settled("[{layers: '**', activations: float}]");
    assert_eq!(weights_alone.iter().filter(|line| line.contains("float: ")).count(), 4);
}

#[test]
fn layers_that_share_a_site_have_to_agree() {
    let cases = [
        (
            "[{layers: body.conv1, activations: {bits: 4}}, {layers: body.add, inputs: {bits: 6}}]",
            "`overrides[1].inputs`: expected what `overrides[0].activations` says of the site `body.conv1.output` \
             (4 bits as a result of `body.conv1`), found 6 bits as an input of `body.add`",
        ),
        (
            "[{layers: body.add, inputs: {bits: 6}}, {layers: body.conv1, activations: float}]",
            "`overrides[1].activations`: expected what `overrides[0].inputs` says of the site `body.conv1.output` \
             (6 bits as an input of `body.add`), found float as a result of `body.conv1`",
        ),
        (
            "[{layers: body.conv1, weights: {grid: uniform}}, {layers: body.conv2, weights: {bits: 8}}]",
            "`overrides[1].weights`: expected what `overrides[0].weights` says of the site `body.conv1.weight` (grid \
             uniform as a weight of `body.conv1`), found grid symmetric as a weight of `body.conv2`",
        ),
        (
            "[{layers: 'body.*', activations: {error_method: MAE}, inputs: {error_method: LP, l_p_value: 4}}]",
            "`overrides[0].inputs`: expected what `overrides[0].activations` says of the site `body.conv1.output` \
             (error method MAE as a result of `body.conv1`), found error method LP with l_p_value 4 as an input of \
             `body.conv2`",
        ),
        (
            "[{layers: body.add, activations: {z_threshold: 3}}, {layers: fc, inputs: {bits: 8}}]",
            "`overrides[1].inputs`: expected what `overrides[0].activations` says of the site `body.add.output` \
             (z_threshold 3 as a result of `body.add`), found no z_threshold as an input of `fc`",
        ),
    ];
    for (overrides, expected) in cases {
        assert_eq!(refusal(overrides), expected, "{overrides}");
    }
    // The same by two ways is no disagreement, nor is silence.
    let agreed = changed(
        "[{layers: 'body.*', activations: {bits: 4}, inputs: {bits: 4}}, {layers: input, activations: {bits: 4}}]",
    );
    assert_eq!(agreed.len(), 4);
    assert_eq!(
        changed("[{layers: body.conv2, weights: {bits: 4}}]"),
        ["body.conv1.weight 4 symmetric per channel MSE"]
    );
}

#[test]
fn what_selects_nothing_is_an_error() {
    let cases = [
        (
            "[{layers: body.conv3, weights: float}]",
            "`overrides[0].layers`: expected a layer of the model or a pattern of layers, found `body.conv3`, did you \
             mean `body.conv2`?",
        ),
        (
            "[{layers: [fc, body], weights: float}]",
            "`overrides[0].layers[1]`: expected a layer of the model or a pattern of layers, found `body`, did you mean \
             `body.**`?",
        ),
        (
            "[{layers: '*.*.*', weights: float}]",
            "`overrides[0].layers`: expected a layer of the model or a pattern of layers, found `*.*.*`; `tsquant \
             inspect` lists layers and sites",
        ),
        (
            "[{ops: conv1d, weights: float}]",
            "`overrides[0].ops`: expected an op of the model, found `conv1d`, did you mean `conv2d`?",
        ),
        (
            "[{ops: [conv2d, 'aten::linaer'], weights: float}]",
            "`overrides[0].ops[1]`: expected an op of the model, found `aten::linaer`, did you mean `aten::linear`?",
        ),
        (
            "[{ops: relu, weights: float}]",
            "`overrides[0].ops`: expected an op of the model, found `relu`; it has argument, add, conv2d, linear",
        ),
        (
            "[{layers: fc, ops: add, weights: float}]",
            "`overrides[0]`: expected a layer that `layers` and `ops` both select, found none",
        ),
        (
            "[{layers: fc, activations: {bits: 4}}]",
            "`overrides[0].activations`: expected layers with a result that can be quantized, found none in `fc` \
             (`fc.output`: an output of the model)",
        ),
        (
            "[{layers: 'body.add', weights: {bits: 4}}]",
            "`overrides[0].weights`: expected layers with a weight that can be quantized, found none in `body.add`",
        ),
        (
            "[{layers: input, inputs: float}]",
            "`overrides[0].inputs`: expected layers with an input that can be quantized, found none in `input`",
        ),
    ];
    for (overrides, expected) in cases {
        assert_eq!(refusal(overrides), expected, "{overrides}");
    }
}

#[test]
fn kl_chooses_for_few_bits_after_the_merge_too() {
    assert_eq!(
        refusal("[{layers: fc, weights: {bits: 16}}, {ops: [linear, conv2d], weights: {error_method: KL}}]"),
        "`overrides[1].weights`: KL of `overrides[1].weights.error_method` chooses for at most 8 bits, found 16 in \
         `overrides[0].weights.bits`, for the site `fc.weight`"
    );
    let kl = "{activation_error_method: KL}";
    let error = settle(&plan("[{layers: fc, inputs: {bits: 9}}]", kl), sites()).unwrap_err().to_string();
    assert!(error.ends_with(
        "`overrides[0].inputs`: KL of `quantization.activation_error_method` chooses for at most 8 bits, found 9 \
         in `overrides[0].inputs.bits`, for the site `body.add.output`"
    ));
    let wide = "{activations: {bits: 12}}";
    let error = settle(&plan("[{layers: fc, inputs: {error_method: KL}}]", wide), sites()).unwrap_err().to_string();
    assert!(error.contains("found 12 in `quantization.activations.bits`"), "{error}");
    assert_eq!(
        settled_over("[{layers: fc, inputs: {bits: 8, error_method: KL}}]", wide)[5],
        "body.add.output 8 uniform KL"
    );
}
