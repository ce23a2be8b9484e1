//! Networks that are made on the spot, runs of them in 8 bits, and what their reports say.

// Each test file is a crate of its own and uses a part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tch::{CModule, Kind, Tensor};
use tsquant::config::EnginePlan;
use tsquant::jit::Module;
use tsquant::lower::engine::{self, Trial};

use crate::binary::{Folder, experiment, floats};

/// One engine is set for the whole process, so what depends on it here takes turns.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ENGINE: Mutex<()> = Mutex::new(());
    ENGINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ops of the written file that compute on quantized tensors, or go there and back.
pub(crate) fn quantized_ops(file: &Path) -> BTreeMap<String, usize> {
    let _alone = alone();
    let counts = Module::load(file).expect("the emitted file").op_counts().expect("its ops");
    let is_one =
        |op: &str| op.starts_with("quantized::") || op == "aten::quantize_per_tensor" || op == "aten::dequantize";
    counts.into_iter().filter(|(op, _)| is_one(op)).collect()
}

/// Numbers from −1 to 1 without a period.
pub(crate) fn noise(shape: &[i64], seed: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    let index = Tensor::arange(count, (Kind::Double, tch::Device::Cpu));
    let numbers = ((index + 1.0) * (0.754_877_666 + 0.01 * seed)).fmod(1.0) * 2.0 - 1.0;
    numbers.reshape(shape).to_kind(Kind::Float)
}

/// A convolution of images without bias, padding and stride.
pub(crate) fn convolve(x: &Tensor, weight: &Tensor) -> Tensor {
    let none: Option<Tensor> = None;
    x.conv2d(weight, none.as_ref(), [1i64, 1], [0i64, 0], [1i64, 1], 1)
}

/// A traced model with rows of this shape, as files and an experiment.
pub(crate) fn traced(folder: &Folder, shape: &[i64], mut forward: impl FnMut(&Tensor) -> Tensor) -> String {
    traced_many(folder, shape, |x| vec![forward(x)])
}

/// The same with several outputs.
pub(crate) fn traced_many(folder: &Folder, shape: &[i64], mut forward: impl FnMut(&Tensor) -> Vec<Tensor>) -> String {
    let x = noise(shape, 5.0);
    let mut forward = |inputs: &[Tensor]| forward(&inputs[0]);
    let module = CModule::create_by_tracing("Traced", "forward", std::slice::from_ref(&x), &mut forward);
    let model = folder.path().join("traced.pt");
    module.expect("a traced module").save(&model).expect("a writable folder");
    let values = Vec::<f32>::try_from(x.flatten(0, -1)).expect("numbers");
    let sizes: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
    experiment(&model, &folder.write("x.safetensors", floats("x", &sizes, &values)), "[x]")
}

/// The 8-bit part of the report of a run with these settings; its kernels compute what they stand for.
pub(crate) fn int8_of_run(folder: &Folder, yaml: &str, settings: &[&str]) -> (Value, Value) {
    let settings = ["output.format=int8"].into_iter().chain(settings.iter().copied());
    folder.quantize(yaml, &settings.collect::<Vec<_>>()).succeeded();
    let report = folder.report("run");
    let int8 = report["int8"].clone();
    // QNNPACK scales by whole numbers.
    let share = if int8["engine"] == "qnnpack" { 1e-2 } else { 1e-3 };
    for layer in int8["layers"].as_array().expect("layers") {
        let number = |key: &str| layer[key].as_f64().expect("a number");
        assert!(number("largest") <= 1.0 && number("different") <= share * number("values"), "{layer}");
    }
    let close = int8["against_simulation"]["sqnr_db"].as_f64().is_none_or(|db| db > 30.0);
    assert!(close, "{}", int8["against_simulation"]);
    (report, int8)
}

pub(crate) fn trial(engine: &str) -> Option<&'static Trial> {
    let _alone = alone();
    engine::trial(EnginePlan::NAMED.into_iter().find(|named| named.name() == engine)?)
}

pub(crate) fn count(int8: &Value, kernel: &str) -> u64 {
    int8["kernels"][kernel].as_u64().unwrap_or(0)
}
