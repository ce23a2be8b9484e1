//! Runs on a GPU beside runs on the processor, for machines that have one. On others it is seen that a GPU is refused.

mod binary;

use std::path::Path;

use binary::{Folder, Ran, shipped, tsquant};
use serde_json::Value;

/// By how much the error of a threshold may differ, relatively.
const TOLERANCE: f64 = 0.01;

/// Runs the shipped experiment on a device, into a run directory of this name.
fn quantize(folder: &Path, device: &str, method: &str) -> Ran {
    let settings = [
        format!("output.dir={}", folder.join(device).display()),
        format!("quantization.activation_error_method={method}"),
    ];
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    let experiment = shipped("configs/mnist_resnet.yaml");
    let given = [Path::new("quantize"), &experiment].map(|path| path.as_os_str().to_owned());
    let flags = ["--device", device, "--quiet"].into_iter().chain(settings);
    tsquant(&shipped(""), given.into_iter().chain(flags.map(Into::into)))
}

fn errors(report: &Value) -> Vec<(String, f64)> {
    let sites = report["sites"].as_array().expect("sites");
    sites.iter().map(|site| (site["name"].to_string(), site["error"].as_f64().expect("an error"))).collect()
}

#[test]
fn thresholds_of_both_devices_are_as_good_and_the_file_runs_on_either() {
    for method in ["NOCLIPPING", "MSE", "KL", "HMSE"] {
        let folder = Folder::new();
        let on_cuda = quantize(folder.path(), "cuda", method);
        if on_cuda.code != Some(0) {
            let line = on_cuda.refused(1);
            assert!(line.starts_with("`device: cuda:0`: ") && line.contains("libtorch_cuda.so"), "{line}");
            return;
        }
        quantize(folder.path(), "cpu", method).succeeded();
        let [cpu, cuda] = ["cpu", "cuda"].map(|name| folder.report(name));
        assert_eq!((&cpu["device"], &cuda["device"]), (&"cpu".into(), &"cuda:0".into()));
        let pairs: Vec<_> = errors(&cpu).into_iter().zip(errors(&cuda)).collect();
        assert!(!pairs.is_empty());
        for ((name, on_cpu), (other, on_cuda)) in pairs {
            assert_eq!(name, other);
            assert!((on_cpu - on_cuda).abs() <= TOLERANCE * on_cpu, "{method} {name}: {on_cpu} {on_cuda}");
        }
        // The run on the GPU checked its file there against its simulation; here it runs on the processor.
        tsquant(folder.path(), ["evaluate", "cuda", "--samples", "100"]).succeeded();
    }
}
