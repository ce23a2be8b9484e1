//! What is emitted for every shipped model: each of its quantizers is the simulated one, and so is the whole of it where it
//! runs op by op; libtorch's own executor gives the same answers; its archive says where it comes from.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Kind, Tensor};
use tsquant::config::{InputSource, InputsPlan};
use tsquant::dataset::Dataset;
use tsquant::emit::EXTRA_FILE;
use tsquant::feed;
use tsquant::jit::{
    self, BoxError, Clean, Constant, Instrumented, Listing, Module, NoVisit, Node, Place, Tap, TapKind, Visit,
};
use tsquant::pipeline::{self, MODEL_FILE, Outcome};
use tsquant::quantizer::{Levels, QuantParams};
use tsquant::report::{CorrectedBias, Kind as SiteKind, Provenance, SiteReport, Thresholds};
use tsquant::simulate::{self, Simulate};
use tsquant::sites::{self, Sites, WeightSite};

use common::{MNIST, Model, Silent, assert_equal, model, models_folder};

const FAKE_QUANTIZE: &str = "aten::fake_quantize_per_tensor_affine";

macro_rules! each_model {
    ($($name:ident)*) => {
        const NAMES: &[&str] = &[$(stringify!($name)),*];

        $(#[test]
        fn $name() {
            check(model(stringify!($name)));
        })*
    };
}

each_model! {
    bfloat16 control_flow conv_dimensions conv_zoo extras frozen_cnn fused_encoder half_precision in_place linear mlp multi_io outputs packed
    recurrent scripted_encoder sdpa small_conv stateful tables tiny_encoder training_mode traps mnist_resnet
}

#[test]
fn every_model_is_checked() {
    let mut listed = NAMES.to_vec();
    let mut shipped: Vec<_> = common::all_models().map(|model| model.name).collect();
    listed.sort_unstable();
    shipped.sort_unstable();
    assert_eq!(listed, shipped);
}

/// W8A8 with a grid of its own for weights and activations each.
fn quantize(model: Model, samples: usize, dir: &Path) -> Outcome {
    let plan = model.plan(samples, dir);
    pipeline::quantize(&plan, None, &mut Silent).unwrap_or_else(|error| panic!("{}: {error}", model.name))
}

fn check(model: Model) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let outcome = quantize(model, 16, &folder.path().join("run"));
    let emitted = Module::load(&outcome.dir.join(MODEL_FILE)).expect("the emitted file");
    runs_as_its_report_says(model, &outcome, &emitted);
    each_quantizer_is_the_simulated_one(model, &outcome, &emitted);
    tells_where_it_comes_from(&outcome);
}

/// Number of levels below and above zero follow from threshold and scale.
fn params(site: &SiteReport, channel: usize) -> QuantParams {
    let (scale, zero_point) = (site.quantizers.scale[channel], site.quantizers.zero_point[channel]);
    let levels = match &site.quantizers.thresholds {
        Thresholds::Range(_) => Levels { quant_min: 0, quant_max: 255 },
        Thresholds::Threshold(thresholds) => match (thresholds[channel] / f64::from(scale)).round() as i64 {
            128 => Levels { quant_min: -128, quant_max: 127 },
            256 => Levels { quant_min: 0, quant_max: 255 },
            levels => panic!("{}: {levels} levels on one side of zero", site.name),
        },
    };
    QuantParams::new(scale, zero_point, levels).expect("a quantizer")
}

/// The weight on its grid, channel by channel.
fn quantized_weight(clean: &Clean, site: &WeightSite, report: &SiteReport) -> Tensor {
    let weight = clean.constant(site.values[0]).expect("a weight");
    let axis = i64::try_from(site.channel_axis).expect("an axis");
    let channels = report.quantizers.scale.len();
    assert_eq!(usize::try_from(weight.size()[site.channel_axis]), Ok(channels), "{}", site.name);
    let quantized = (0..channels).map(|channel| {
        let values = weight.narrow(axis, i64::try_from(channel).expect("a channel"), 1).contiguous();
        simulate::fake_quantize(&values, &params(report, channel)).expect("simulated")
    });
    Tensor::cat(&quantized.collect::<Vec<_>>(), axis)
}

/// The bias that a convolution or linear layer has, corrected; another op's result gets it added.
fn corrected_bias(clean: &Clean, sites: &Sites, corrected: &CorrectedBias) -> (Place, Tensor) {
    let layer = sites.layers.iter().find(|layer| layer.name == corrected.layer).expect("a layer of that name");
    let node = &clean.listing().nodes[layer.node];
    let (result, added) = (node.outputs[0], Tensor::from_slice(&corrected.added));
    if !layer.op.contains("conv") && layer.op != "aten::linear" {
        return (Place::Addend(result), added);
    }
    let slot = 2;
    let is_tensor = clean.listing().values[node.inputs[slot]].constant.as_ref().is_some_and(Constant::is_tensor);
    let bias = if is_tensor { clean.constant(node.inputs[slot]).expect("a bias") + added } else { added };
    (Place::Input { result, slot }, bias)
}

/// The float graph with weights and activations quantized as the report says.
fn simulation(clean: &Clean, outcome: &Outcome) -> (Instrumented, Vec<QuantParams>) {
    let sites = sites::find(clean.listing());
    let reports = &outcome.report.sites;
    let report = |name: &str, kind| reports.iter().find(|site| site.name == name && site.kind == kind);
    let constants = sites.weights.iter().flat_map(|site| {
        let report =
            report(&site.name, SiteKind::Weight).unwrap_or_else(|| panic!("{} is not in the report", site.name));
        let quantized = quantized_weight(clean, site, report);
        let place = |&value| (Place::Constant(value), quantized.shallow_clone());
        site.values.iter().map(place).collect::<Vec<_>>()
    });
    let corrected = outcome.report.bias_correction.iter().flat_map(|corrected| &corrected.layers);
    let biases = corrected.map(|corrected| corrected_bias(clean, &sites, corrected));
    let constants: Vec<_> = constants.chain(biases).collect();
    let (mut taps, mut quantizers) = (Vec::new(), Vec::new());
    for site in &sites.activations {
        let Some(report) = report(&site.name, SiteKind::Activation) else { continue };
        let left = |name: &str| outcome.report.left_float.iter().any(|left| left.name == name);
        let anchors = site.anchors.iter().filter(|anchor| !left(&anchor.name));
        taps.extend(anchors.map(|anchor| Tap {
            value: anchor.value,
            number: quantizers.len(),
            kind: TapKind::Substitute,
        }));
        quantizers.push(params(report, 0));
    }
    (clean.instrument(&taps, &constants).expect("an instrumented graph"), quantizers)
}

/// Bit for bit, op by op, on every batch.
fn runs_as_its_report_says(model: Model, outcome: &Outcome, emitted: &Module) {
    let clean = model.clean();
    let (simulated, params) = simulation(&clean, outcome);
    let by_op = Instrumented::of_module(emitted).expect("its graph");
    for arguments in model.batches(emitted, 16, 5) {
        let expected = simulated.run(&arguments, &mut Simulate { params: &params }).expect("the simulation");
        let found = by_op.run(&arguments, &mut NoVisit).expect("the emitted graph");
        assert_equal(model.name, &expected, &found);
    }
}

fn constant<'a>(listing: &'a Listing, node: &Node, slot: usize) -> &'a Constant {
    listing.values[node.inputs[slot]].constant.as_ref().expect("a constant")
}

fn number(listing: &Listing, node: &Node, slot: usize) -> i32 {
    constant(listing, node, slot).text.parse().expect("a whole number")
}

/// Compares what goes out of each quantizer with the simulated image of what goes in.
struct Pairs {
    params: Vec<QuantParams>,
    simulated: Vec<Option<Tensor>>,
    compared: usize,
}

impl Visit for Pairs {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let node = tap / 2;
        if tap.is_multiple_of(2) {
            self.simulated[node] = Some(simulate::fake_quantize(value, &self.params[node])?);
            return Ok(());
        }
        let expected = self.simulated[node].take().expect("its input before its output");
        let bits = |tensor: &Tensor| -> Vec<u32> {
            Vec::<f32>::try_from(tensor.flatten(0, -1)).expect("floats").into_iter().map(f32::to_bits).collect()
        };
        assert!(bits(&expected) == bits(value), "quantizer {node}: {:?}", self.params[node]);
        self.compared += value.numel();
        Ok(())
    }
}

fn each_quantizer_is_the_simulated_one(model: Model, outcome: &Outcome, emitted: &Module) {
    let arguments = model.arguments(emitted, 16);
    let clean = emitted.clean(Some(&arguments)).expect("a clean graph of the emitted file");
    let listing = clean.listing();
    let nodes: Vec<_> = listing.nodes.iter().filter(|node| node.op == FAKE_QUANTIZE).collect();
    let params = nodes.iter().map(|node| {
        let scale: f64 = constant(listing, node, 1).text.parse().expect("a number");
        assert_eq!(f64::from(scale as f32), scale, "a scale is a float32");
        let levels = Levels { quant_min: number(listing, node, 3), quant_max: number(listing, node, 4) };
        QuantParams::new(scale as f32, number(listing, node, 2), levels).expect("a quantizer")
    });
    let params: Vec<_> = params.collect();
    let mut reported: BTreeMap<(u32, i32), usize> = BTreeMap::new();
    for site in outcome.report.sites.iter().filter(|site| site.kind == SiteKind::Activation) {
        *reported.entry((site.quantizers.scale[0].to_bits(), site.quantizers.zero_point[0])).or_default() += 1;
    }
    for params in &params {
        assert!(reported.contains_key(&(params.scale().to_bits(), params.zero_point())), "{params:?} is in no site");
    }
    let emitted_pairs: std::collections::BTreeSet<_> =
        params.iter().map(|params| (params.scale().to_bits(), params.zero_point())).collect();
    assert!(reported.keys().all(|pair| emitted_pairs.contains(pair)), "a site without a quantizer: {reported:?}");

    let taps = nodes.iter().enumerate().flat_map(|(number, node)| {
        let tap = |value, number| Tap { value, number, kind: TapKind::Observe };
        [tap(node.inputs[0], 2 * number), tap(node.outputs[0], 2 * number + 1)]
    });
    let instrumented = clean.instrument(&taps.collect::<Vec<_>>(), &[]).expect("an instrumented graph");
    let mut pairs = Pairs { simulated: params.iter().map(|_| None).collect(), params, compared: 0 };
    instrumented.run(&arguments, &mut pairs).expect("a run");
    assert!(pairs.compared > 0, "{}: no quantizer ran", model.name);
}

/// The archive's own description is that of the report.
fn tells_where_it_comes_from(outcome: &Outcome) {
    let file = outcome.dir.join(MODEL_FILE);
    let text = jit::extra_file(&file, EXTRA_FILE).expect("a readable archive").expect("a description");
    let found: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    // Through text like the other one, so that a float32 is the same number in both.
    let report = outcome.report.to_json().expect("JSON");
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    for key in ["schema", "versions", "hashes", "seed", "sites", "left_float"] {
        assert!(!report[key].is_null() && found[key] == report[key], "{key}");
    }
    let provenance = Provenance::parse(&text).expect("a provenance");
    assert_eq!(provenance.seed, 5);
    assert_eq!(provenance.hashes, outcome.report.hashes);
    let count = |kind| outcome.report.sites.iter().filter(|site| site.kind == kind).count();
    for kind in [SiteKind::Weight, SiteKind::Activation] {
        assert_eq!(provenance.count(kind), count(kind));
    }
    assert_eq!(jit::extra_file(&file, "nothing.json").expect("a readable archive"), None);
}

#[test]
fn libtorchs_executor_gives_the_same_answers() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let outcome = quantize(MNIST, 256, &folder.path().join("run"));
    let emitted = Module::load(&outcome.dir.join(MODEL_FILE)).expect("the emitted file");
    let (simulated, params) = simulation(&MNIST.clean(), &outcome);
    let mut plan = MNIST.data_plan(1500, 100);
    plan.path = models_folder().join("mnist_evaluation.safetensors");
    plan.inputs = InputsPlan::Positional(vec![InputSource::Tensor("images".to_owned())]);
    let data = Dataset::open(&plan).expect("the evaluation data");
    let warm_up = feed::bind(&emitted, data.first(100).expect("rows")).expect("arguments");
    for _ in 0..3 {
        // The first calls profile; later ones run what was optimized by it.
        emitted.forward(&warm_up).expect("a run");
    }
    let (mut agreeing, mut rows) = (0, 0);
    for batch in data.batches() {
        let arguments = feed::bind(&emitted, batch.expect("a readable batch")).expect("arguments");
        let expected = simulated.run(&arguments, &mut Simulate { params: &params }).expect("the simulation");
        let found = emitted.forward(&arguments).expect("a run of libtorch's executor");
        let classes = |output: &jit::Output| output.tensors()[0].1.argmax(-1, false);
        let same = classes(&expected).eq_tensor(&classes(&found));
        agreeing += same.sum(Kind::Int64).int64_value(&[]);
        rows += same.numel();
    }
    assert_eq!(rows, 1500);
    assert!(agreeing as f64 >= 0.995 * rows as f64, "{agreeing} of {rows} answers agree");
}
