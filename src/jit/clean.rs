//! From a module as loaded to a graph that the rest of the project can read: frozen, inlined, folded, named, and checked
//! to compute what the original computes.

use cxx::UniquePtr;
use tch::Tensor;

use super::error::one_line;
use super::ffi::bridge;
use super::listing::{Listing, Seen, ValueId};
use super::module::{Arguments, Module};
use super::value::Output;
use super::visit::{BoxError, NoVisit, Visit, Visitor};
use super::{Differentiable, Edits, Error, tensor};

/// Largest change of an output by the clean-up, relative to the largest magnitude of that output. Folding batch
/// normalization rounds differently; real models stay below 1e-5.
const LIMIT: f64 = 1e-4;

type Step = (&'static str, bridge::Pass);

/// The steps in order. Names are attached before folding replaces the tensors that carry them; mutation goes before
/// fusing; constants are propagated wherever a step may have made new ones.
const STEPS: &[Step] = &[
    ("attach names", bridge::Pass::AttachNames),
    ("inline", bridge::Pass::Inline),
    ("inline fork and wait", bridge::Pass::InlineForkWait),
    ("fold attributes", bridge::Pass::FoldAttributes),
    ("drop raising branches", bridge::Pass::DropThrowing),
    ("propagate constants", bridge::Pass::ConstantPropagation),
    ("lower tuples", bridge::Pass::LowerSimpleTuples),
    ("remove list mutation", bridge::Pass::RemoveListMutation),
    ("remove tensor mutation", bridge::Pass::RemoveTensorMutation),
    ("expand fused attention", bridge::Pass::ForceSlow),
    ("propagate constants again", bridge::Pass::ConstantPropagation),
    ("remove dropout", bridge::Pass::RemoveDropout),
    ("replace generic convolutions", bridge::Pass::ReplaceConvolution),
    ("fuse linear", bridge::Pass::FuseLinear),
    ("attach names again", bridge::Pass::AttachNames),
    ("fold batch norm into convolutions", bridge::Pass::FoldConvBatchNorm),
    ("fold batch norm into linear", bridge::Pass::FoldLinearBatchNorm),
    ("fold additions into convolutions", bridge::Pass::FoldConvAddOrSub),
    ("fold factors into convolutions", bridge::Pass::FoldConvMulOrDiv),
    ("peephole", bridge::Pass::Peephole),
    ("propagate constants last", bridge::Pass::ConstantPropagation),
    ("merge equal expressions", bridge::Pass::EliminateCommonSubexpression),
    ("pool constants", bridge::Pass::ConstantPooling),
    ("unpack constants", bridge::Pass::UnpackConstants),
    ("drop dead code", bridge::Pass::EliminateDeadCode),
    ("give outputs lists of their own", bridge::Pass::SplitReturned),
];

/// A value to look at or to replace while the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tap {
    /// The value.
    pub value: ValueId,
    /// Number that [`Visit`] gets; several values may share one.
    pub number: usize,
    /// What happens there.
    pub kind: TapKind,
}

/// What a tap does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapKind {
    /// [`Visit::observe`].
    Observe,
    /// [`Visit::substitute`].
    Substitute,
    /// The same for readers in the model alone: what is returned through `aten::alias` stays as it is made.
    SubstituteInside,
    /// [`Visit::gradient`]; for [`Clean::differentiable`] alone.
    Gradient,
    /// The same, with what the value does to the outputs as an output itself.
    WholeGradient,
    /// [`Visit::observe`] with what the op that makes the value reads in this slot, each time that it runs.
    Input(usize),
}

/// Where a tensor goes in a copy of the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In place of a constant, wherever that is read.
    Constant(ValueId),
    /// In this slot of the op that makes the value, whatever it read there.
    Input {
        /// The op's result.
        result: ValueId,
        /// Which of its inputs.
        slot: usize,
    },
    /// Added to the value: all that read it, the model's outputs too, read the sum.
    Addend(ValueId),
}

/// A fake-quantize node to write after a value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quantizer {
    /// The value.
    pub value: ValueId,
    /// Step between levels.
    pub scale: f32,
    /// Level of zero.
    pub zero_point: i32,
    /// Lowest level.
    pub quant_min: i32,
    /// Highest level.
    pub quant_max: i32,
    /// Whether what is returned through `aten::alias` is quantized too.
    pub is_returned: bool,
}

/// A tensor that becomes a named parameter or buffer of the written model.
#[derive(Debug)]
pub struct Parameter {
    /// Where it is read.
    pub place: Place,
    /// Dotted name.
    pub name: String,
    /// Buffer instead of parameter.
    pub is_buffer: bool,
    /// What it holds.
    pub tensor: Tensor,
}

/// A text file inside the written archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtraFile {
    /// File name.
    pub name: String,
    /// Content.
    pub text: String,
}

/// A frozen module with a cleaned graph.
pub struct Clean {
    frozen: UniquePtr<bridge::Frozen>,
    module: Module,
    listing: Listing,
    notes: Vec<String>,
    checked: bool,
}

impl Clean {
    pub(super) fn new(
        module: &Module,
        sample: Option<&Arguments>,
        aliased: impl FnOnce(&Listing) -> Vec<ValueId>,
    ) -> Result<Self, Error> {
        let mut clean = Self::freeze(module)?;
        let reference = sample.map(|sample| module.forward(sample)).transpose()?;
        for &step in STEPS {
            clean.apply(step)?;
        }
        clean.list(module)?;
        let aliased = aliased(&clean.listing);
        if !aliased.is_empty() {
            bridge::alias_outputs(clean.frozen.pin_mut(), &aliased)?;
            clean.list(module)?;
        }
        if let (Some(sample), Some(reference)) = (sample, reference) {
            if let Err(error) = clean.check("the clean-up", sample, &reference) {
                return Err(blame(module, sample, &reference).err().unwrap_or(error));
            }
            clean.see_values(sample)?;
            clean.checked = true;
        }
        Ok(clean)
    }

    fn freeze(module: &Module) -> Result<Self, Error> {
        let frozen =
            bridge::freeze(module.as_bridge()?).map_err(|error| Error::Freeze { message: one_line(error.what()) })?;
        let notes = module.notes().to_vec();
        Ok(Self { frozen, module: module.share()?, listing: Listing::default(), notes, checked: false })
    }

    fn list(&mut self, module: &Module) -> Result<(), Error> {
        self.listing = Listing::from_rows(bridge::list_graph(self.frozen()?)?);
        self.listing.complete_paths(&module.paths()?);
        Ok(())
    }

    fn apply(&mut self, (name, pass): Step) -> Result<(), Error> {
        let changes = bridge::run_pass(self.frozen.pin_mut(), pass)
            .map_err(|error| Error::Step { step: name, message: one_line(error.what()) })?;
        match changes {
            0 => {}
            1 => self
                .notes
                .push("a check of its input that the model makes itself (raise) was taken as passed".to_owned()),
            count => {
                self.notes.push(format!(
                    "{count} checks of its input that the model makes itself (raise) were taken as passed"
                ));
            }
        }
        Ok(())
    }

    fn check(&self, step: &'static str, sample: &Arguments, reference: &Output) -> Result<(), Error> {
        let output = self.instrument(&[], &[])?.run(sample, &mut NoVisit).map_err(|error| match error {
            Error::Run { message, .. } => Error::Step { step, message },
            other => other,
        })?;
        compare(step, reference, &output)
    }

    /// Notes dtype and shape of every tensor of the graph in the listing.
    fn see_values(&mut self, sample: &Arguments) -> Result<(), Error> {
        let tensors = self.listing.values.iter().enumerate();
        let tensors = tensors.filter(|(_, value)| value.is_tensor && value.constant.is_none());
        let taps: Vec<_> = tensors.map(|(value, _)| Tap { value, number: value, kind: TapKind::Observe }).collect();
        let mut sight = Sight(vec![None; self.listing.values.len()]);
        self.instrument(&taps, &[])?.run(sample, &mut sight)?;
        for (value, seen) in self.listing.values.iter_mut().zip(sight.0) {
            value.seen = seen;
        }
        Ok(())
    }

    /// What values were seen to be, in the order of the listing's; second names left out.
    #[must_use]
    pub fn seen(&self) -> Vec<Option<Seen>> {
        let aliases = self.listing.aliases();
        let values = self.listing.values.iter().enumerate().filter(|(value, _)| !aliases.contains_key(value));
        values.map(|(_, value)| value.seen.clone()).collect()
    }

    /// Takes values to be what another clean-up of the same model saw, on other data: another branch may have run there.
    ///
    /// # Errors
    /// Where the model has another number of values.
    pub fn see_as(&mut self, seen: &[Option<Seen>]) -> Result<(), Error> {
        let aliases = self.listing.aliases();
        let (expected, found) = (self.listing.values.len() - aliases.len(), seen.len());
        if found != expected {
            return Err(Error::Libtorch(format!("expected what {expected} values are, found {found}")));
        }
        let values = self.listing.values.iter_mut().enumerate().filter(|(value, _)| !aliases.contains_key(value));
        for ((_, value), seen) in values.zip(seen) {
            value.seen.clone_from(seen);
        }
        for (alias, value) in aliases {
            let seen = self.listing.values.get(value).and_then(|value| value.seen.clone());
            if let Some(alias) = self.listing.values.get_mut(alias) {
                alias.seen = seen;
            }
        }
        Ok(())
    }

    /// The graph as plain data; dtypes and shapes are known if it was checked on a sample.
    #[must_use]
    pub fn listing(&self) -> &Listing {
        &self.listing
    }

    /// The module that this graph comes from.
    #[must_use]
    pub fn module(&self) -> &Module {
        &self.module
    }

    /// What loading and clean-up changed, one sentence each.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// True if the graph was run on a sample and computes what the original computes.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        self.checked
    }

    /// Attributes that the emitted module keeps, dotted: those of a model with state; none of other models.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn attributes(&self) -> Result<Vec<String>, Error> {
        Ok(bridge::attribute_names(self.frozen()?)?)
    }

    /// The graph in TorchScript's own notation.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn text(&self) -> Result<String, Error> {
        Ok(bridge::graph_text(self.frozen()?)?)
    }

    /// The tensor behind a constant of the listing.
    ///
    /// # Errors
    /// Where the value is no constant tensor.
    pub fn constant(&self, value: ValueId) -> Result<Tensor, Error> {
        Ok(tensor::from_unique(bridge::constant_tensor(self.frozen()?, value)?))
    }

    /// A copy of the graph with taps after some values and other tensors in some places.
    ///
    /// # Errors
    /// Where libtorch refuses the graph.
    pub fn instrument(&self, taps: &[Tap], tensors: &[(Place, Tensor)]) -> Result<Instrumented, Error> {
        let rows = tap_rows(taps);
        let places: Vec<_> = tensors.iter().map(|(place, _)| place_row(*place)).collect();
        let device = self.module().device();
        let moved = tensors.iter().map(|(_, tensor)| tensor.f_to_device(device));
        let tensors = tensor::list(moved.collect::<Result<Vec<_>, _>>()?.iter());
        Ok(Instrumented { executable: bridge::instrument(self.frozen()?, &rows, &places, &tensors)? })
    }

    /// A copy of the graph with taps, of which those on gradients are told on the way back, and with these constants as inputs,
    /// so that their gradients can be asked for.
    ///
    /// # Errors
    /// Where libtorch refuses the graph.
    pub fn differentiable(&self, taps: &[Tap], lifted: &[ValueId]) -> Result<Differentiable, Error> {
        let executable = bridge::differentiable(self.frozen()?, &tap_rows(taps), lifted)?;
        let constants = lifted.iter().map(|&value| self.constant(value)).collect::<Result<Vec<_>, _>>()?;
        // On a GPU other kernels are at work.
        let channels_last = self.module().device() == tch::Device::Cpu && self.listing.takes_channels_last();
        Ok(Differentiable::new(executable, &constants, channels_last))
    }

    /// Writes the graph with fake-quantize nodes and named parameters as a TorchScript file.
    ///
    /// # Errors
    /// Where libtorch refuses the graph or the file cannot be written.
    pub fn emit(
        &self,
        path: &std::path::Path,
        quantizers: &[Quantizer],
        parameters: &[Parameter],
        files: &[ExtraFile],
    ) -> Result<(), Error> {
        let failed = |message: &str| Error::Emit { path: path.to_owned(), message: one_line(message) };
        let quantizers: Vec<_> = quantizers.iter().map(quantizer_row).collect();
        let (rows, files) = (parameter_rows(parameters), file_rows(files));
        let tensors = tensor::list(parameters.iter().map(|parameter| &parameter.tensor));
        let target = path.to_str().ok_or_else(|| failed("the path is not UTF-8"))?;
        bridge::emit_module(self.frozen()?, &quantizers, &rows, &tensors, &files, target)
            .map_err(|error| failed(error.what()))
    }

    /// Writes the graph with these edits, and without what nothing reads then, as a TorchScript file; only parameters that are
    /// read are part of it.
    ///
    /// # Errors
    /// Where libtorch refuses the edits or the file cannot be written.
    pub fn emit_edited(
        &self,
        path: &std::path::Path,
        edits: &Edits,
        parameters: &[Parameter],
        files: &[ExtraFile],
    ) -> Result<(), Error> {
        let failed = |message: &str| Error::Emit { path: path.to_owned(), message: one_line(message) };
        let (rows, files) = (parameter_rows(parameters), file_rows(files));
        let tensors = tensor::list(parameters.iter().map(|parameter| &parameter.tensor));
        let made_of = tensor::list(edits.tensors.iter());
        let target = path.to_str().ok_or_else(|| failed("the path is not UTF-8"))?;
        bridge::emit_edited(self.frozen()?, &edits.rows(), &made_of, &rows, &tensors, &files, target)
            .map_err(|error| failed(error.what()))
    }

    /// The graph with these edits, and with everything that it had before, to run. An inserted `tsquant::tap` with a number is
    /// [`Visit::observe`]; other tensors go into places as in [`instrument`](Self::instrument).
    ///
    /// # Errors
    /// Where libtorch refuses the edits.
    pub fn edited(&self, edits: &Edits, tensors: &[(Place, Tensor)]) -> Result<Instrumented, Error> {
        let places: Vec<_> = tensors.iter().map(|(place, _)| place_row(*place)).collect();
        let tensors = tensor::list(tensors.iter().map(|(_, tensor)| tensor));
        let made_of = tensor::list(edits.tensors.iter());
        let executable = bridge::edited(self.frozen()?, &edits.rows(), &made_of, &places, &tensors)?;
        Ok(Instrumented { executable })
    }

    fn frozen(&self) -> Result<&bridge::Frozen, Error> {
        self.frozen.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))
    }
}

/// A graph that can be run, op by op, without libtorch's optimizer.
pub struct Instrumented {
    executable: UniquePtr<bridge::Executable>,
}

impl Instrumented {
    /// The graph of a module as it is, to run it op by op without libtorch's optimizer.
    ///
    /// # Errors
    /// Where libtorch refuses the graph.
    pub fn of_module(module: &Module) -> Result<Self, Error> {
        Ok(Self { executable: bridge::executable_of(module.as_bridge()?)? })
    }

    /// Runs the graph without gradients; a model with state starts from the state in its file each time.
    ///
    /// # Errors
    /// The visit's own error, or that of the model.
    pub fn run(&self, arguments: &Arguments, visit: &mut dyn Visit) -> Result<Output, Error> {
        let executable = self.executable.as_ref().ok_or_else(|| Error::Libtorch("an empty handle".to_owned()))?;
        let mut visitor = Visitor::new(visit);
        let result = bridge::run(executable, arguments.as_bridge()?, &mut visitor);
        if let Some(error) = visitor.into_error() {
            return Err(Error::Visit(error));
        }
        let output = result
            .map_err(|error| Error::Run { inputs: arguments.describe().to_owned(), message: one_line(error.what()) })?;
        Output::from_bridge(output.as_ref().ok_or_else(|| Error::output("an empty handle"))?)
    }
}

/// Records dtype and shape of what it sees.
struct Sight(Vec<Option<Seen>>);

impl Visit for Sight {
    fn observe(&mut self, tap: usize, value: &Tensor) -> Result<(), BoxError> {
        let seen = Seen { dtype: format!("{:?}", value.f_kind()?), shape: value.size() };
        if let Some(slot) = self.0.get_mut(tap) {
            *slot = Some(seen);
        }
        Ok(())
    }
}

/// Runs the steps again, with a check after each, to name the one that changes the result. Only a failed check of the
/// whole pays for this.
fn blame(module: &Module, sample: &Arguments, reference: &Output) -> Result<(), Error> {
    let mut clean = Clean::freeze(module)?;
    clean.check("freeze", sample, reference)?;
    for &step in STEPS {
        clean.apply(step)?;
        clean.check(step.0, sample, reference)?;
    }
    Ok(())
}

fn compare(step: &'static str, reference: &Output, output: &Output) -> Result<(), Error> {
    let (reference, output) = (reference.tensors(), output.tensors());
    for ((path, expected), (_, found)) in reference.iter().zip(&output) {
        let difference = relative_difference(expected, found)?;
        if difference.is_nan() || difference > LIMIT {
            let output = if path.is_empty() { String::new() } else { format!(" {path}") };
            return Err(Error::Drift { step, output, difference, limit: LIMIT });
        }
    }
    if reference.len() != output.len() {
        return Err(Error::Drift { step, output: String::new(), difference: f64::INFINITY, limit: LIMIT });
    }
    Ok(())
}

/// max |a − b| / max |a|, infinite for different shapes; NaN and infinity in the same places count as equal.
fn relative_difference(expected: &Tensor, found: &Tensor) -> Result<f64, Error> {
    if expected.size() != found.size() {
        return Ok(f64::INFINITY);
    }
    if expected.numel() == 0 {
        return Ok(0.0);
    }
    let expected = expected.f_to_kind(tch::Kind::Double)?;
    let found = found.f_to_kind(tch::Kind::Double)?;
    let same = expected.f_eq_tensor(&found)?.f_logical_or(&expected.f_isnan()?.f_logical_and(&found.f_isnan()?)?)?;
    let zero = Tensor::from(0.0f64);
    let difference = zero.f_where_self(&same, &(&expected - &found))?.f_abs()?.f_max()?.f_double_value(&[])?;
    let magnitude = expected.f_nan_to_num(0.0, 0.0, 0.0)?.f_abs()?.f_max()?.f_double_value(&[])?;
    Ok(if difference == 0.0 { 0.0 } else { difference / magnitude.max(f64::MIN_POSITIVE) })
}

fn quantizer_row(quantizer: &Quantizer) -> bridge::QuantizerRow {
    bridge::QuantizerRow {
        value: quantizer.value,
        scale: f64::from(quantizer.scale),
        zero_point: i64::from(quantizer.zero_point),
        quant_min: i64::from(quantizer.quant_min),
        quant_max: i64::from(quantizer.quant_max),
        is_returned: quantizer.is_returned,
    }
}

fn parameter_rows(parameters: &[Parameter]) -> Vec<bridge::ParameterRow> {
    let row = |parameter: &Parameter| bridge::ParameterRow {
        place: place_row(parameter.place),
        name: parameter.name.clone(),
        is_buffer: parameter.is_buffer,
    };
    parameters.iter().map(row).collect()
}

fn file_rows(files: &[ExtraFile]) -> Vec<bridge::ExtraFile> {
    files.iter().map(|file| bridge::ExtraFile { name: file.name.clone(), text: file.text.clone() }).collect()
}

fn tap_rows(taps: &[Tap]) -> Vec<bridge::TapRow> {
    let kind = |kind| match kind {
        TapKind::Observe => bridge::TapKind::Observe,
        TapKind::Substitute => bridge::TapKind::Substitute,
        TapKind::SubstituteInside => bridge::TapKind::SubstituteInside,
        TapKind::Gradient => bridge::TapKind::Gradient,
        TapKind::WholeGradient => bridge::TapKind::WholeGradient,
        TapKind::Input(_) => bridge::TapKind::Input,
    };
    let row = |tap: &Tap| {
        let slot = if let TapKind::Input(slot) = tap.kind { slot } else { 0 };
        bridge::TapRow { value: tap.value, site: tap.number, kind: kind(tap.kind), slot }
    };
    taps.iter().map(row).collect()
}

fn place_row(place: Place) -> bridge::PlaceRow {
    let (value, kind, slot) = match place {
        Place::Constant(value) => (value, bridge::PlaceKind::Constant, 0),
        Place::Input { result, slot } => (result, bridge::PlaceKind::Input, slot),
        Place::Addend(value) => (value, bridge::PlaceKind::Addend, 0),
    };
    bridge::PlaceRow { value, kind, slot }
}
