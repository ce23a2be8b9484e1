//! `tsquant inspect`.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::provenance::Description;
use super::{UsageError, table};
use crate::config::{DataPlan, InputSource, InputsPlan, Layout, Transform};
use crate::dataset::Dataset;
use crate::jit::{ArgumentType, Clean, Module};
use crate::pipeline;
use crate::sites::{self, Sites};

/// Explain a TorchScript file: signature, layers, what would be quantized and what not.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tsquant inspect models/mnist_resnet.pt\n  \
    tsquant inspect models/mnist_resnet.pt --data models/mnist_calibration.safetensors --inputs images")]
pub(super) struct Inspect {
    /// The TorchScript file.
    model: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Run the model on the first rows of this data set and check the clean-up on it.
    #[arg(long, value_name = "FILE", requires = "inputs")]
    data: Option<PathBuf>,
    /// Names of tensors in the data set, in the order of forward's arguments, or ARGUMENT=TENSOR for each.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "data")]
    inputs: Vec<String>,
    /// Images in the data set are stored as (N, H, W, C).
    #[arg(long, requires = "data")]
    nhwc: bool,
    /// Factor for the values of images and floats, for instance 0.00392156862745098.
    #[arg(long, value_name = "FACTOR", requires = "data")]
    scale: Option<f64>,
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
        let plan = self.data_plan()?;
        let module = Module::load(&self.model)?;
        let clean = self.clean(&module, plan.as_ref())?;
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

    /// The cleaned model, or why there is none; errors of the data end the command.
    fn clean(&self, module: &Module, plan: Option<&DataPlan>) -> anyhow::Result<Result<Clean, String>> {
        let sample = match plan {
            Some(plan) => {
                let data = Dataset::open(plan)?;
                let sample = pipeline::check_sample(module, &data, plan.batch_size.get())?;
                // Data that the model does not run on is an error of the command, not a fault of the model.
                module.forward(&sample)?;
                Some(sample)
            }
            None => None,
        };
        Ok(module.clean(sample.as_ref()).map_err(|error| error.to_string()))
    }

    fn data_plan(&self) -> Result<Option<DataPlan>, UsageError> {
        let Some(path) = &self.data else { return Ok(None) };
        let path = std::path::absolute(path).map_err(|error| UsageError(format!("--data: {error}")))?;
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(UsageError(format!("--scale: expected a finite number, found {scale}")));
        }
        let layout = if self.nhwc { Layout::Nhwc } else { Layout::Nchw };
        Ok(Some(DataPlan {
            path,
            inputs: inputs(&self.inputs)?,
            samples: None,
            shuffle: false,
            seed: 0,
            batch_size: NonZeroUsize::MIN.saturating_add(3),
            transform: Transform { layout, scale: self.scale, ..Transform::default() },
        }))
    }
}

fn inputs(names: &[String]) -> Result<InputsPlan, UsageError> {
    let named: Vec<_> = names.iter().filter_map(|name| name.split_once('=')).collect();
    if named.is_empty() {
        return Ok(InputsPlan::Positional(names.iter().cloned().map(InputSource::Tensor).collect()));
    }
    if named.len() < names.len() {
        return Err(UsageError("--inputs: expected ARGUMENT=TENSOR for all or for none".to_owned()));
    }
    let pair = |(argument, tensor): (&str, &str)| (argument.to_owned(), InputSource::Tensor(tensor.to_owned()));
    Ok(InputsPlan::Named(named.into_iter().map(pair).collect()))
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
