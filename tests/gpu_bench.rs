//! The measurements of `benches/gpu` at a small size on the processor, so that the script is known to run.

#[path = "../benches/common/way_back.rs"]
mod way_back;

#[path = "../benches/gpu/measure.rs"]
mod measure;

use std::path::Path;

use measure::{measure, measure_by};
use tch::Device;
use tsquant::config::Experiment;
use tsquant::observe::Summing;

#[test]
fn the_gpu_bench_measures_something_by_either_way_of_summing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let experiment = Experiment::read(&root.join("configs/mnist_resnet.yaml")).unwrap();
    let settings = ["calibration.samples=4", "calibration.batch_size=2", "evaluation=", "device=cpu"];
    let plan = experiment.overlay(&settings.map(str::to_owned)).unwrap().resolve(root).unwrap();
    let on_cpu = measure(&plan, Device::Cpu, 1).unwrap();
    let as_on_gpu = measure_by(Summing::TensorOps, &plan, Device::Cpu, 1).unwrap();
    for measured in [on_cpu, as_on_gpu] {
        let times = [measured.forward, measured.calibration, measured.backward, measured.hessian];
        assert!(times.iter().all(|&seconds| seconds > 0.0 && seconds.is_finite()), "{measured:?}");
        assert_eq!((measured.device.as_str(), measured.rows), ("cpu", 4));
        assert!(measured.sites > 0);
        assert_eq!([measured.forward_bytes, measured.calibration_bytes, measured.hessian_bytes], [None; 3]);
    }
}
