//! `tsquant inspect`.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::provenance::Description;
use super::{UsageError, located, statistics, table, working_dir};
use crate::config::{self, Experiment, Typed};
use crate::jit::{ArgumentType, Clean, Module};
use crate::pipeline;
use crate::sites::{self, Sites};

/// Explain a TorchScript file: signature, layers, what would be quantized and what not; or a file of statistics.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tsquant inspect models/mnist_resnet.pt\n  \
    tsquant inspect models/mnist_resnet.pt --data models/mnist_calibration.safetensors --inputs images\n  \
    tsquant inspect runs/mnist_resnet.safetensors")]
pub(super) struct Inspect {
    /// The TorchScript file, or the .safetensors that `tsquant calibrate` wrote.
    #[arg(value_name = "FILE")]
    model: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Run the model on the first rows of this data and check the clean-up on them: .safetensors, .npz, .npy or a folder of
    /// images.
    #[arg(long, value_name = "FILE", requires = "inputs")]
    data: Option<String>,
    /// What forward takes: tensors of the data (x,mask), by name (ids=x,mask=m), constants among them (x,const:16000).
    #[arg(long, value_name = "NAMES", requires = "data")]
    inputs: Option<String>,
    /// From stored values to the model's: the map `transform` of an experiment, `{scale: 0.5, mean: [1], std: [2]}`.
    #[arg(long, value_name = "YAML", requires = "data")]
    transform: Option<String>,
    /// Print the cleaned graph in TorchScript's notation too.
    #[arg(long, conflicts_with = "json")]
    graph: bool,
}

/// What is said of a model, in this order.
#[derive(Debug, Serialize)]
struct Inspection {
    model: PathBuf,
    bytes: u64,
    arguments: Vec<Argument>,
    returns: Vec<String>,
    other_methods: Vec<String>,
    parameters: Totals,
    buffers: Totals,
    ops: Vec<OpCount>,
    /// `checked`, `unchecked`, or why the model cannot be quantized.
    state: State,
    notes: Vec<String>,
    /// What an emitted model says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantized: Option<Description>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sites: Option<SitesReport>,
}

#[derive(Debug, Serialize)]
struct Argument {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<String>,
    /// Nothing in the graph tells whether the tensor holds floats or integers.
    unknown_dtype: bool,
}

#[derive(Debug, Default, Serialize)]
struct Totals {
    tensors: usize,
    values: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct OpCount {
    op: String,
    count: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Checked,
    Unchecked,
    NotQuantizable(String),
}

#[derive(Debug, Serialize)]
struct SitesReport {
    layers: Vec<sites::Layer>,
    weights: Vec<sites::WeightSite>,
    activations: Vec<sites::ActivationSite>,
    left_float: Vec<sites::LeftFloat>,
    unknown_ops: Vec<OpCount>,
}

impl Inspect {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if pipeline::is_statistics(&self.model) {
            if self.graph || self.data.is_some() {
                let message = "--data and --graph are of models; a file of statistics has neither";
                return Err(UsageError(message.to_owned()).into());
            }
            return statistics::inspect(&mut std::io::stdout().lock(), &self.model, self.json);
        }
        let experiment = self.experiment()?;
        let plan = match self.data {
            Some(_) => Some(experiment.resolve_calibration(&working_dir()?)?),
            None => None,
        };
        let module = Module::load(&self.model)?;
        let sample = plan.map(|plan| pipeline::check_sample(&module, &plan)).transpose();
        let sample = sample.map_err(|error| located(&experiment, error))?;
        let clean = module.clean(sample.as_ref()).map_err(|error| error.to_string());
        let inspection = inspect(&module, &clean)?;
        let out = &mut std::io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut *out, &inspection).map_err(std::io::Error::from)?;
            writeln!(out)?;
            return Ok(());
        }
        print(out, &inspection)?;
        if let (true, Ok(clean)) = (self.graph, &clean) {
            write!(out, "\n{}", clean.text()?)?;
        }
        Ok(())
    }

    /// What the flags say of the data.
    fn experiment(&self) -> Result<Experiment, config::Error> {
        Experiment::of_flags("tsquant inspect").with_flags([
            ("--data", "calibration.data", self.data.as_deref().map(Typed::Text)),
            ("--inputs", "calibration.inputs", self.inputs.as_deref().map(Typed::Inputs)),
            ("--transform", "calibration.transform", self.transform.as_deref().map(Typed::Yaml)),
        ])
    }
}

fn inspect(module: &Module, clean: &Result<Clean, String>) -> anyhow::Result<Inspection> {
    let tensors = module.tensors()?;
    let unknown = clean.as_ref().map(|clean| sites::arguments_of_unknown_dtype(clean.listing())).unwrap_or_default();
    let mut notes = module.notes().to_vec();
    if let Ok(clean) = clean {
        notes = clean.notes().to_vec();
    }
    let total = |buffers: bool| {
        let mut totals = Totals::default();
        for tensor in tensors.iter().filter(|tensor| tensor.is_buffer == buffers) {
            totals.tensors += 1;
            totals.values += tensor.shape.iter().map(|&size| size.unsigned_abs()).product::<u64>();
            totals.bytes += tensor.bytes;
        }
        totals
    };
    let quantized = Description::of(module.path(), &mut notes)?;
    // An emitted model has been quantized: it would be idle to say what of it could be.
    let listing = clean.as_ref().ok().filter(|_| quantized.is_none()).map(Clean::listing);
    Ok(Inspection {
        model: std::path::absolute(module.path())?,
        bytes: std::fs::metadata(module.path())?.len(),
        arguments: module.signature().arguments.iter().map(|argument| describe(argument, &unknown)).collect(),
        returns: module.signature().returns.clone(),
        other_methods: module.other_methods()?,
        parameters: total(false),
        buffers: total(true),
        ops: module.op_counts()?.into_iter().map(|(op, count)| OpCount { op, count }).collect(),
        state: match clean {
            Ok(clean) if clean.is_checked() => State::Checked,
            Ok(_) => State::Unchecked,
            Err(reason) => State::NotQuantizable(reason.clone()),
        },
        notes,
        quantized,
        sites: listing.map(|listing| sites::find(listing).into()),
    })
}

fn describe(argument: &ArgumentType, unknown: &[String]) -> Argument {
    Argument {
        name: argument.name.clone(),
        type_name: argument.type_name.clone(),
        default: argument.default.clone(),
        unknown_dtype: unknown.contains(&argument.name),
    }
}

impl From<Sites> for SitesReport {
    fn from(sites: Sites) -> Self {
        Self {
            layers: sites.layers,
            weights: sites.weights,
            activations: sites.activations,
            left_float: sites.left_float,
            unknown_ops: sites.unknown_ops.into_iter().map(|(op, count)| OpCount { op, count }).collect(),
        }
    }
}

fn print(out: &mut impl Write, inspection: &Inspection) -> std::io::Result<()> {
    print_head(out, inspection)?;
    match &inspection.state {
        State::Checked => writeln!(out, "clean-up: checked on the data given: it computes what the model computes")?,
        State::Unchecked => writeln!(out, "clean-up: unchecked (give --data and --inputs to run it)")?,
        State::NotQuantizable(reason) => writeln!(out, "cannot be quantized: {reason}")?,
    }
    for note in &inspection.notes {
        writeln!(out, "note: {note}")?;
    }
    match (&inspection.quantized, &inspection.sites) {
        (Some(description), _) => description.print(out),
        (None, Some(sites)) => print_sites(out, sites),
        (None, None) => print_ops(out, &inspection.ops),
    }
}

fn print_head(out: &mut impl Write, inspection: &Inspection) -> std::io::Result<()> {
    let arguments = inspection.arguments.iter().map(|argument| {
        let default = argument.default.as_ref().map(|value| format!(" = {value}")).unwrap_or_default();
        let mark = if argument.unknown_dtype { " (dtype unknown without data)" } else { "" };
        format!("{}: {}{default}{mark}", argument.name, argument.type_name)
    });
    writeln!(out, "{}, {}", name(&inspection.model), table::bytes(inspection.bytes))?;
    let (arguments, returns) = (arguments.collect::<Vec<_>>().join(", "), inspection.returns.join(", "));
    writeln!(out, "forward({arguments}) -> {returns}")?;
    if !inspection.other_methods.is_empty() {
        writeln!(out, "other methods: {}", inspection.other_methods.join(", "))?;
    }
    let totals = |kind: &str, totals: &Totals| {
        let tensors = table::count(totals.tensors, kind);
        format!("{tensors} ({} values, {})", totals.values, table::bytes(totals.bytes))
    };
    let (parameters, buffers) = (&inspection.parameters, &inspection.buffers);
    writeln!(out, "{}, {}", totals("parameter", parameters), totals("buffer", buffers))
}

fn print_sites(out: &mut impl Write, sites: &SitesReport) -> std::io::Result<()> {
    let mut layers = table::table(&["layer", "op", "constants"], false);
    for layer in &sites.layers {
        let shapes: Vec<_> = layer.constants.iter().map(|shape| table::shape(shape)).collect();
        layers.add_row([&layer.name, &layer.op, &shapes.join(" ")]);
    }
    writeln!(out, "\n{} with weights\n{layers}", table::count(sites.layers.len(), "layer"))?;

    let mut quantized = table::table(&["site", "op", "shape", "channel axis"], false);
    for site in &sites.weights {
        quantized.add_row([&site.name, &site.op, &table::shape(&site.shape), &site.channel_axis.to_string()]);
    }
    writeln!(out, "\n{}\n{quantized}", table::count(sites.weights.len(), "weight site"))?;

    let mut activations = table::table(&["site", "op"], false);
    for site in &sites.activations {
        activations.add_row([&site.name, &site.op]);
    }
    writeln!(out, "\n{}\n{activations}", table::count(sites.activations.len(), "activation site"))?;

    let mut left = table::table(&["left float", "op", "reason"], false);
    for item in &sites.left_float {
        left.add_row([&item.name, &item.op, &item.reason]);
    }
    writeln!(out, "\nleft float: {}\n{left}", table::count(sites.left_float.len(), "op or value"))?;
    if sites.unknown_ops.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nops that are not in the op table")?;
    print_ops(out, &sites.unknown_ops)
}

fn print_ops(out: &mut impl Write, ops: &[OpCount]) -> std::io::Result<()> {
    let mut counts = table::table(&["op", "nodes"], true);
    for row in ops {
        counts.add_row([&row.op, &row.count.to_string()]);
    }
    writeln!(out, "{counts}")
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
