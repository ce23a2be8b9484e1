//! What a GPU makes of calibration and of the Hessian stage, beside the processor, written to `benches/GPU.md`:
//!
//! ```sh
//! python benches/make_resnet50.py FOLDER
//! cargo bench --bench gpu -- FOLDER/resnet50.yaml
//! ```
//!
//! It needs a torch that has CUDA (README) and a GPU; `--device cpu` tries the script itself where there is none.

mod measure;
#[path = "../common/way_back.rs"]
mod way_back;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use measure::{Measured, measure};
use tch::Device;
use tsquant::config::Experiment;
use tsquant::{jit, pipeline};

#[derive(Parser)]
struct Options {
    /// The experiment of which the model and the calibration data count.
    experiment: Option<PathBuf>,
    /// What is measured first, before the processor.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Threads of the processor.
    #[arg(long, default_value_t = 16)]
    threads: i32,
    /// Rounds, of which the fastest counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The file that is written.
    #[arg(long, default_value = "benches/GPU.md")]
    out: PathBuf,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let _ = options.bench;
    let Some(path) = &options.experiment else {
        println!("gpu: needs an experiment: cargo bench --bench gpu -- EXPERIMENT.yaml");
        return Ok(());
    };
    jit::keep_freed_memory();
    let plan = Experiment::read(path)?.with_device(&options.device).resolve(Path::new("."))?;
    // The GPU comes first: libtorch looks for it once.
    let device = pipeline::take_device(&plan)?;
    let first = measure(&plan, device, options.rounds).with_context(|| jit::device_name(device))?;
    tch::set_num_threads(options.threads);
    let processor = measure(&plan, Device::Cpu, options.rounds).context("cpu")?;
    let machine = Machine { gpu: gpu_name(device), threads: options.threads };
    let text = page(&machine, &plan.calibration, &[first, processor]);
    std::fs::write(&options.out, &text).with_context(|| options.out.display().to_string())?;
    print!("{text}");
    Ok(())
}

struct Machine {
    gpu: String,
    threads: i32,
}

fn gpu_name(device: Device) -> String {
    let Device::Cuda(number) = device else { return "no GPU".to_owned() };
    let id = format!("--id={number}");
    let asked =
        std::process::Command::new("nvidia-smi").args([&id, "--query-gpu=name", "--format=csv,noheader"]).output();
    let name = asked.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    if name.is_empty() { "a GPU without a name".to_owned() } else { name }
}

fn page(machine: &Machine, data: &tsquant::config::DataPlan, measured: &[Measured]) -> String {
    let model = measured.first().map(|first| (first.sites, first.rows)).unwrap_or_default();
    let mut text = format!(
        "# On a GPU\n\n{gpu}, torch {torch}, TF32 off; the processor with {threads} threads. {rows} rows in batches of {batch}, \
         {sites} activation sites; seconds for all rows, the best of several rounds, and in brackets the ratio to the line \
         above it that it is to be compared with. `cargo bench --bench gpu` writes this file.\n\n",
        gpu = machine.gpu,
        torch = jit::torch_version(),
        threads = machine.threads,
        rows = model.1,
        batch = data.batch_size,
        sites = model.0,
    );
    let names: Vec<&str> = measured.iter().map(|measured| measured.device.as_str()).collect();
    text += &format!("| | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len()));
    let mut line = |name: &str, cell: &dyn Fn(&Measured) -> String| {
        let cells: Vec<String> = measured.iter().map(cell).collect();
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    };
    line("plain forward", &|own| format!("{:.3}", own.forward));
    line("calibration with histograms", &|own| {
        format!("{:.3} ({:.2})", own.calibration, own.calibration / own.forward)
    });
    line("forward and backward to all weights", &|own| format!("{:.3}", own.backward));
    line("Hessian scores, one probe", &|own| format!("{:.3} ({:.2})", own.hessian, own.hessian / own.backward));
    let memory = |bytes: Option<u64>| bytes.map_or("–".to_owned(), |bytes| format!("{} MB", bytes >> 20));
    line("peak memory of the GPU: forward", &|own| memory(own.forward_bytes));
    line("calibration", &|own| memory(own.calibration_bytes));
    line("Hessian scores", &|own| memory(own.hessian_bytes));
    text
}
