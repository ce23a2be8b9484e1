//! What is emitted in 8 bits for every shipped model: which ops run on quantized tensors, that each kernel computes what it stands
//! for, and that the whole is as good as its simulation.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use tsquant::config::{
    ActivationPlan, BiasCorrection, DevicePlan, EnginePlan, Format, Int8Plan, OutputPlan, Plan, WeightPlan,
};
use tsquant::jit::Module;
use tsquant::pipeline::{self, Error, MODEL_FILE, Outcome, Progress, Work};
use tsquant::quantizer::{Bits, Granularity, Grid, Scheme};
use tsquant::report::Int8;
use tsquant::threshold::ErrorMethod;

use common::Model;

struct Silent;

impl Progress for Silent {
    fn stage(&mut self, _: &'static str, _: Work) {}

    fn advance(&mut self, _: usize) {}
}

fn plan(model: Model, dir: &Path) -> Plan {
    let scheme = |grid| Scheme { bits: Bits::try_from(8).expect("a width"), grid };
    Plan {
        model: model.path(),
        calibration: model.data_plan(16, 8),
        weights: WeightPlan {
            scheme: scheme(Grid::Symmetric),
            granularity: Granularity::PerChannel,
            error_method: ErrorMethod::Mse,
            bias_correction: BiasCorrection::ClosedForm,
        },
        activations: ActivationPlan {
            scheme: scheme(Grid::Uniform),
            error_method: ErrorMethod::NoClipping,
            z_threshold: None,
        },
        overrides: tsquant::config::Overrides::default(),
        hessian: None,
        device: DevicePlan::Cpu,
        allow_tf32: false,
        output: OutputPlan {
            dir: dir.to_owned(),
            format: Format::Int8,
            further: Vec::new(),
            int8: Some(Int8Plan { engine: EnginePlan::Onednn, strict: true }),
        },
        evaluation: None,
        seed: 5,
    }
}

fn quantize(plan: &Plan) -> Result<Outcome, Error> {
    pipeline::quantize(plan, None, &mut Silent)
}

/// Ops of the written file that compute on quantized tensors, or go there and back.
fn quantized_ops(file: &Path) -> BTreeMap<String, usize> {
    let counts = Module::load(file).expect("the emitted file").op_counts().expect("its ops");
    let is_one =
        |op: &str| op.starts_with("quantized::") || op == "aten::quantize_per_tensor" || op == "aten::dequantize";
    counts.into_iter().filter(|(op, _)| is_one(op)).collect()
}

fn int8_of(outcome: &Outcome) -> &Int8 {
    outcome.report.int8.as_ref().expect("an 8-bit model")
}

#[test]
fn each_shipped_model_in_8_bits() {
    let mut text = String::new();
    for model in common::all_models() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let outcome = match quantize(&plan(model, &folder.path().join("run"))) {
            Ok(outcome) => outcome,
            Err(error) => {
                writeln!(text, "{}\n  {error}", model.name).expect("text");
                continue;
            }
        };
        let int8 = int8_of(&outcome);
        writeln!(text, "{}", model.name).expect("text");
        for (op, count) in quantized_ops(&outcome.dir.join(MODEL_FILE)) {
            writeln!(text, "  {count} {op}").expect("text");
        }
        for left in &int8.in_float {
            writeln!(text, "  float: {} ({}): {}", left.name, left.op, left.reason).expect("text");
        }
        println!(
            "{} {:?} {:?} {:?} {:?}",
            model.name,
            int8.evaluation.sqnr_db,
            int8.simulation.sqnr_db,
            int8.against_simulation.sqnr_db,
            int8.layers
                .iter()
                .map(|layer| (&layer.name, layer.values, layer.different, layer.largest))
                .collect::<Vec<_>>()
        );
    }
    insta::assert_snapshot!(text);
}
