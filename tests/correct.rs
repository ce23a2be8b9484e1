//! Corrected biases of every shipped model: with one op's weight far too coarse, the mean of that op's result, channel by
//! channel and over all that ran, is the float model's again. Borders, strides, groups, branches and shared weights are in it.

mod binary;
mod common;

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};
use tsquant::correct::{self, Bias, Corrections, InputSums, Seen, Targets};
use tsquant::dataset::Dataset;
use tsquant::jit::{BoxError, Clean, Instrumented, Listing, Module, Node, Place, Tap, TapKind, Visit};
use tsquant::observe::observe;
use tsquant::sites::{self, Layer, Sites, WeightSite};

use binary::Folder;
use common::Model;

/// Rows of calibration, and a batch that does not divide them.
const ROWS: usize = 16;
const BATCH: usize = 5;

/// Relative to the largest magnitude of the op's result: float32 rounds results and sums.
const TOLERANCE: f64 = 1e-5;

/// Sums of one value's channels.
struct Means {
    /// Place of the channels among the axes, counted from the end.
    behind: i64,
    sums: Option<Tensor>,
    count: usize,
    largest: f64,
}

impl Visit for Means {
    fn observe(&mut self, _: usize, value: &Tensor) -> Result<(), BoxError> {
        let axis = value.dim() as i64 - self.behind;
        let others: Vec<i64> = (0..value.dim() as i64).filter(|&other| other != axis).collect();
        let value = value.to_kind(Kind::Double);
        self.largest = self.largest.max(value.abs().max().double_value(&[]));
        self.count += value.numel() / value.size()[axis as usize] as usize;
        let sums = if others.is_empty() { value } else { value.sum_dim_intlist(others, false, Kind::Double) };
        self.sums = Some(self.sums.take().map_or_else(|| sums.shallow_clone(), |total| total + &sums));
        Ok(())
    }
}

impl Means {
    fn of(model: Model, clean: &Clean, node: &Node, tensors: &[(Place, Tensor)]) -> Self {
        let tap = Tap { value: node.outputs[0], number: 0, kind: TapKind::Observe };
        let instrumented: Instrumented = clean.instrument(&[tap], tensors).expect("an instrumented graph");
        let rank = clean.constant(node.inputs[1]).map_or(2, |weight| weight.dim());
        let behind = if node.op.contains("conv") { rank as i64 - 1 } else { 1 };
        let mut means = Self { behind, sums: None, count: 0, largest: 0.0 };
        for arguments in model.batches(clean.module(), ROWS, BATCH) {
            instrumented.run(&arguments, &mut means).expect("a run");
        }
        means
    }

    fn mean(&self) -> Tensor {
        self.sums.as_ref().expect("the op ran") / self.count as f64
    }
}

/// Five levels: errors that no one could miss.
fn coarse(weight: &Tensor) -> Tensor {
    let step = weight.abs().max() / 2.0;
    ((weight / &step).round() * step).contiguous()
}

fn corrections(model: Model, clean: &Clean, sites: &Sites) -> Corrections {
    let targets = Targets::find(clean.listing(), sites);
    let mut inputs = InputSums::new(&targets);
    let data = Dataset::open(&model.data_plan(ROWS, BATCH)).expect("readable data");
    let statistics = observe(clean, &sites.activations, &mut inputs, data.batches(), |_| ()).expect("calibration");
    let weights: Vec<Tensor> = sites.weights.iter().map(|site| coarse(&weight(clean, site))).collect();
    correct::closed_form(clean, sites, &weights, &targets, Seen { inputs, statistics: &statistics }).expect("biases")
}

fn weight(clean: &Clean, site: &WeightSite) -> Tensor {
    clean.constant(site.values[0]).expect("a weight")
}

/// The op's weight as it is too coarse, for this op alone.
fn coarse_weight(clean: &Clean, sites: &Sites, node: &Node) -> (Place, Tensor) {
    let site = |value| sites.weights.iter().find(|site| site.values.contains(&value));
    let mut slots = node.inputs.iter().enumerate().filter_map(|(slot, &value)| Some((slot, site(value)?)));
    let (slot, site) = slots.next().expect("a weight");
    (Place::Input { result: node.outputs[0], slot }, coarse(&weight(clean, site)))
}

fn is_in_loop(listing: &Listing, node: &Node) -> bool {
    let owner = listing.blocks[node.block].owner.map(|owner| &listing.nodes[owner]);
    owner.is_some_and(|owner| owner.op == "prim::Loop" || is_in_loop(listing, owner))
}

fn check_bias(model: Model, clean: &Clean, sites: &Sites, layer: &Layer, bias: &Bias) {
    let node = &clean.listing().nodes[layer.node];
    let quantized = coarse_weight(clean, sites, node);
    let expected = Means::of(model, clean, node, &[]);
    let biased = Means::of(model, clean, node, &[(quantized.0, quantized.1.shallow_clone())]);
    let corrected = Means::of(model, clean, node, &[quantized, (bias.place, bias.tensor.shallow_clone())]);
    let distance = |means: &Means| (means.mean() - expected.mean()).abs().max().double_value(&[]) / expected.largest;
    let (before, after) = (distance(&biased), distance(&corrected));
    let name = format!("{}: {} ({})", model.name, layer.name, layer.op);
    // In a loop the op reads what it made of its coarse weight before: not the float model's input.
    let most = if is_in_loop(clean.listing(), node) { before / 4.0 } else { TOLERANCE };
    assert!(after <= most, "{name}: means are off by {after} of the largest value, {before} without correction");
    assert!(before > 10.0 * TOLERANCE, "{name}: the weight is not coarse enough to see anything: {before}");
}

fn check(model: Model) -> Vec<(String, String)> {
    let clean = model.clean();
    let sites = sites::find(clean.listing());
    let corrections = corrections(model, &clean, &sites);
    for bias in &corrections.biases {
        let layer = sites.layers.iter().find(|layer| layer.name == bias.layer).expect("a layer of that name");
        check_bias(model, &clean, &sites, layer, bias);
    }
    let handled = corrections.biases.len() + corrections.left_out.len();
    let with_weights: BTreeSet<_> = sites.weights.iter().flat_map(|site| &site.users).collect();
    assert_eq!(handled, with_weights.len(), "{}: each op with a weight is corrected or left out", model.name);
    corrections.left_out.into_iter().map(|left| (format!("{} {}", left.layer, left.op), left.reason)).collect()
}

#[test]
fn means_come_back_in_every_model() {
    let mut ops = BTreeMap::<String, String>::new();
    for model in common::all_models() {
        for (name, reason) in check(model) {
            ops.insert(format!("{}: {name}", model.name), reason);
        }
    }
    let listed: String = ops.iter().map(|(name, reason)| format!("{name}: {reason}\n")).collect();
    insta::assert_snapshot!(listed);
}

fn zoo() -> String {
    binary::experiment(&binary::test_model("conv_zoo"), &binary::test_data("conv_zoo"), "[x]")
}

/// Corrected layers of a report.
fn corrected(report: &serde_json::Value) -> Vec<&str> {
    let layers = report["bias_correction"]["layers"].as_array().expect("a list of layers");
    layers.iter().map(|layer| layer["layer"].as_str().expect("a name")).collect()
}

#[test]
fn a_run_says_what_it_corrected() {
    let folder = Folder::new();
    folder.write("e.yaml", zoo());
    let ran = binary::tsquant(folder.path(), ["quantize", "e.yaml"]).succeeded();
    assert!(ran.stdout.contains("\n8 biases corrected\n"), "{}", ran.stdout);
    let report = folder.report("run");
    let all = ["stem", "depthwise", "grouped", "shared", "shared#2", "conv2d_0", "transposed", "fc"];
    let named = corrected(&report);
    assert_eq!(named.len(), all.len(), "{named:?}");
    assert!(all.iter().filter(|name| !name.starts_with("conv2d")).all(|name| named.contains(name)), "{named:?}");
    assert_eq!(report["bias_correction"]["left_out"], serde_json::json!([]));
    assert_eq!(report["bias_correction"]["method"], "closed_form");
    // A bias of its own for each call of a layer; one for the layer that had none before its batch norm was folded.
    let emitted = Module::load(&folder.path().join("run/quantized.pt")).unwrap();
    let tensors = emitted.tensors().unwrap();
    for name in ["stem.bias", "grouped.bias", "shared.bias", "shared_2.bias", "bias", "fc.bias"] {
        let tensor = tensors.iter().find(|tensor| tensor.name == name);
        assert!(tensor.is_some_and(|tensor| !tensor.is_buffer), "{name} is no parameter of {tensors:?}");
    }
    folder.quantize(&zoo(), &["overrides=[{layers: grouped, weights: float}]"]).succeeded();
    assert!(!corrected(&folder.report("run")).contains(&"grouped"), "its weight is as it was");
}

#[test]
fn corrections_are_a_key() {
    let folder = Folder::new();
    folder.write("e.yaml", zoo());
    let none = "quantization.weights_bias_correction=none";
    let ran = binary::tsquant(folder.path(), ["quantize", "e.yaml", "--set", none]).succeeded();
    assert!(!ran.stdout.contains("corrected"), "{}", ran.stdout);
    assert!(folder.report("run").get("bias_correction").is_none());
    let wrong = folder.quantize(&zoo(), &["quantization.weights_bias_correction=weightd"]);
    let refusal = wrong.refused(2);
    assert!(refusal.contains("weighted"), "{refusal}");
    let dry = binary::tsquant(folder.path(), ["quantize", "e.yaml", "--dry-run"]).succeeded();
    assert!(dry.stdout.contains("\n# 8 biases would be corrected\n"), "{}", dry.stdout);
    assert!(dry.stdout.contains("\n  weights_bias_correction: closed_form\n"), "{}", dry.stdout);
}
