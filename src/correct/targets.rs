//! From the layers of a graph to the ops whose bias can be corrected, and why that of others cannot.

use std::collections::BTreeMap;

use super::LeftOut;
use super::geometry::{Axis, Padding};
use crate::jit::{BlockId, Constant, Listing, Node, ValueId};
use crate::sites::{ChannelAxis, Layer, Sites};

/// The ops with quantized weights.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    /// What they read; ops that read the same share it.
    pub(super) inputs: Vec<Input>,
    pub(super) ops: Vec<Target>,
    pub(super) left_out: Vec<LeftOut>,
}

/// What an op reads.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Input {
    /// The op's result.
    pub(super) result: ValueId,
    pub(super) slot: usize,
    pub(super) reading: Reading,
    /// Where its sums come from.
    pub(super) source: Source,
    /// Bytes of its sums.
    bytes: u64,
}

impl Input {
    /// Whether it is the same value, read in the same way.
    pub(super) fn reads_as(&self, other: &Self) -> bool {
        (self.result, self.slot, &self.reading) == (other.result, other.slot, &other.reading)
    }
}

#[cfg(test)]
impl Input {
    pub(super) fn at_tap(reading: Reading) -> Self {
        Self { result: 0, slot: 0, reading, source: Source::Tap, bytes: 0 }
    }
}

/// Where sums of an input come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// A tap at the op.
    Tap,
    /// The statistics of this activation site and its anchor, which hold the sums of all channels anyway.
    Statistics {
        /// Index among the sites.
        site: usize,
        /// Index among the site's values.
        anchor: usize,
    },
}

/// How an op reads its input.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reading {
    /// Features along the last axis.
    Rows,
    /// Features along the last but one, or the only axis.
    Columns,
    /// A convolution: features along the second axis, or the first of a single row; positions behind.
    Positions(Vec<Axis>),
}

/// An op whose bias is corrected.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) layer: String,
    pub(super) op: String,
    pub(super) result: ValueId,
    /// The slot of its input.
    pub(super) slot: usize,
    /// Its weight among the sites.
    pub(super) weight: usize,
    pub(super) form: Form,
    /// Its input among [`Targets::inputs`].
    pub(super) input: usize,
    pub(super) bias: OldBias,
    /// The op multiplies its product by this.
    pub(super) factor: f64,
}

impl Target {
    /// This op among those that nothing is done at.
    pub(super) fn left_out(&self, reason: &str) -> LeftOut {
        LeftOut { layer: self.layer.clone(), op: self.op.clone(), reason: reason.to_owned() }
    }

    /// Channels of its result.
    pub(super) fn outputs(&self, sites: &Sites) -> i64 {
        let shape = sites.weights.get(self.weight).map(|site| site.shape.as_slice()).unwrap_or_default();
        let at = |axis: usize| shape.get(axis).copied().unwrap_or(1);
        match self.form {
            Form::OutputsFirst { .. } => at(0),
            Form::InputsFirst { groups } => at(1) * groups,
        }
    }
}

/// How a weight's axes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// (outputs, inputs of a group, taps …).
    OutputsFirst {
        /// Groups.
        groups: i64,
    },
    /// (inputs, outputs of a group, taps …).
    InputsFirst {
        /// Groups.
        groups: i64,
    },
}

/// The bias that an op has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OldBias {
    /// This constant in this slot.
    Constant(usize, ValueId),
    /// None in this slot.
    Absent(usize),
    /// No slot for one, or something else in it.
    NoSlot,
}

/// Slots of a convolution's arguments behind input, weight and bias.
struct ConvSlots {
    stride: usize,
    padding: usize,
    dilation: usize,
    groups: usize,
    /// The flag and the slot of the output padding.
    transposed: Transposed,
}

enum Transposed {
    Never,
    Always { output_padding: usize },
    If { flag: usize, output_padding: usize },
}

fn conv_slots(op: &str) -> Option<ConvSlots> {
    let slots = |groups, transposed| ConvSlots { stride: 3, padding: 4, dilation: 5, groups, transposed };
    match op {
        "aten::conv1d" | "aten::conv2d" | "aten::conv3d" | "aten::_convolution_mode" => {
            Some(slots(6, Transposed::Never))
        }
        "aten::_convolution" | "aten::convolution" => Some(slots(8, Transposed::If { flag: 6, output_padding: 7 })),
        "aten::conv_transpose1d" | "aten::conv_transpose2d" | "aten::conv_transpose3d" => {
            Some(ConvSlots { dilation: 7, ..slots(6, Transposed::Always { output_padding: 5 }) })
        }
        _ => None,
    }
}

/// What an op does with its operands; found before its input gets a number.
struct Found {
    slot: usize,
    weight_slot: usize,
    reading: Reading,
    form: Form,
    has_bias_slot: bool,
    factor: f64,
}

impl Targets {
    /// Looks at every layer with a quantized weight.
    #[must_use]
    pub fn find(listing: &Listing, sites: &Sites) -> Self {
        let mut targets = Self::default();
        let mut known = BTreeMap::new();
        let finder = Finder { listing, sites };
        for layer in &sites.layers {
            match finder.layer(layer) {
                Ok(None) => {}
                Ok(Some(found)) => targets.add(&finder, layer, found, &mut known),
                Err(reason) => {
                    let (layer, op) = (layer.name.clone(), layer.op.clone());
                    targets.left_out.push(LeftOut { layer, op, reason });
                }
            }
        }
        targets
    }

    /// The inputs that any of these taps, to be summed up for all of them at once; of the ops themselves it has none.
    #[must_use]
    pub fn taps_of(several: &[Self]) -> Self {
        let mut all = Self::default();
        let taps = several.iter().flat_map(|targets| &targets.inputs).filter(|input| input.source == Source::Tap);
        for input in taps {
            if !all.inputs.iter().any(|known| known.reads_as(input)) {
                all.inputs.push(input.clone());
            }
        }
        all
    }

    /// Whether the sums of this input come from a tap of its own.
    pub(super) fn is_tap(&self, input: usize) -> bool {
        self.inputs.get(input).is_some_and(|input| input.source == Source::Tap)
    }

    /// The first layer that reads this input.
    pub(super) fn layer_of(&self, input: usize) -> Option<&str> {
        self.ops.iter().find(|op| op.input == input).map(|op| op.layer.as_str())
    }

    /// How many biases would be corrected.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ops.len()
    }

    /// Ops with quantized weights that would not be.
    #[must_use]
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Bytes of the sums of their inputs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inputs.iter().map(|input| input.bytes).sum()
    }

    fn add(&mut self, finder: &Finder<'_>, layer: &Layer, found: (usize, Found), known: &mut Known) {
        let (weight, Found { slot, weight_slot, reading, form, has_bias_slot, factor }) = found;
        let node = &finder.listing.nodes[layer.node];
        let (Some(&result), Some(&value)) = (node.outputs.first(), node.inputs.get(slot)) else { return };
        let shape = finder.constant(node, weight_slot).map(|constant| constant.shape.clone()).unwrap_or_default();
        let source = finder.source(node, value, &reading);
        let bytes = if source == Source::Tap { bytes(&shape, form) } else { 0 };
        let input = Input { result, slot, reading: reading.clone(), source, bytes };
        let next = self.inputs.len();
        // What is written in place may be other numbers for the next reader.
        let number = if finder.listing.values[value].has_writers {
            next
        } else {
            *known.entry((value, node.block, reading)).or_insert(next)
        };
        if number == next {
            self.inputs.push(input);
        }
        let bias = if has_bias_slot { finder.bias(node, 2) } else { OldBias::NoSlot };
        let (layer, op) = (layer.name.clone(), layer.op.clone());
        self.ops.push(Target { layer, op, result, slot, weight, form, input: number, bias, factor });
    }
}

/// Inputs by value, block of the reader (another one runs at other times), and way of reading.
type Known = BTreeMap<(ValueId, BlockId, Reading), usize>;

/// Sums in f64: one for each input feature and tap.
fn bytes(shape: &[i64], form: Form) -> u64 {
    let elements: u64 = shape.iter().map(|size| size.unsigned_abs()).product();
    let at = |axis: usize| shape.get(axis).map_or(1, |size| size.unsigned_abs().max(1));
    match form {
        Form::OutputsFirst { groups } => 8 * elements / at(0) * groups.unsigned_abs(),
        Form::InputsFirst { .. } => 8 * elements / at(1),
    }
}

struct Finder<'a> {
    listing: &'a Listing,
    sites: &'a Sites,
}

impl Finder<'_> {
    /// The op of a layer with its quantized weight; `None` if it has no weight that is quantized.
    fn layer(&self, layer: &Layer) -> Result<Option<(usize, Found)>, String> {
        let node = &self.listing.nodes[layer.node];
        let quantized = |&(_, value): &(usize, ValueId)| self.weight(value).is_some();
        let operands: Vec<(usize, ValueId)> = self.operands(node).into_iter().filter(quantized).collect();
        let [(slot, value)] = *operands.as_slice() else {
            return match operands.first() {
                None => Ok(None),
                Some(_) => Err(uncovered(&node.op)),
            };
        };
        let Some(weight) = self.weight(value) else { return Ok(None) };
        let found = self.found(node, slot, value)?;
        let is_made = node.inputs.get(found.slot).is_some_and(|&x| self.listing.values[x].constant.is_none());
        if !is_made {
            return Err("its input is a constant".to_owned());
        }
        Ok(Some((weight, found)))
    }

    /// Operands with their slots; those in a list have the slot of the list.
    fn operands(&self, node: &Node) -> Vec<(usize, ValueId)> {
        let maker = |value: ValueId| self.listing.nodes.iter().find(|maker| maker.outputs.contains(&value));
        let mut operands = Vec::new();
        for (slot, &value) in node.inputs.iter().enumerate() {
            match maker(value).filter(|maker| maker.op == "prim::ListConstruct") {
                Some(list) => operands.extend(list.inputs.iter().map(|&value| (slot, value))),
                None => operands.push((slot, value)),
            }
        }
        operands
    }

    fn weight(&self, value: ValueId) -> Option<usize> {
        self.sites.weights.iter().position(|site| site.values.contains(&value))
    }

    fn found(&self, node: &Node, slot: usize, value: ValueId) -> Result<Found, String> {
        let shape = self.listing.values[value].constant.as_ref().map(|constant| constant.shape.as_slice());
        let shape = shape.unwrap_or_default();
        if let Some(slots) = conv_slots(&node.op).filter(|_| slot == 1) {
            return self.convolution(node, &slots, shape);
        }
        let two_axes = || {
            let reason = format!("expected a weight with two axes, found the shape {shape:?}");
            if shape.len() == 2 { Ok(()) } else { Err(reason) }
        };
        let product = |slot, reading, is_right, factor| {
            let form = if is_right { Form::InputsFirst { groups: 1 } } else { Form::OutputsFirst { groups: 1 } };
            let weight_slot = if is_right { slot + 1 } else { slot - 1 };
            Ok(Found { slot, weight_slot, reading, form, has_bias_slot: false, factor })
        };
        match (node.op.as_str(), slot) {
            ("aten::linear", 1) => {
                two_axes()?;
                let form = Form::OutputsFirst { groups: 1 };
                let (reading, has_bias_slot) = (Reading::Rows, true);
                Ok(Found { slot: 0, weight_slot: 1, reading, form, has_bias_slot, factor: 1.0 })
            }
            ("aten::matmul" | "aten::mm" | "aten::mv", 0) => {
                two_axes()?;
                product(1, Reading::Columns, false, 1.0)
            }
            ("aten::matmul" | "aten::mm", 1) => {
                two_axes()?;
                product(0, Reading::Rows, true, 1.0)
            }
            ("aten::addmm", 1 | 2) => {
                two_axes()?;
                let factor = self.constant(node, 4).and_then(|constant| constant.text.parse().ok());
                let factor = factor.ok_or_else(|| "its factor `alpha` is no constant".to_owned())?;
                if slot == 1 {
                    product(2, Reading::Columns, false, factor)
                } else {
                    product(1, Reading::Rows, true, factor)
                }
            }
            (op, _) => Err(uncovered(op)),
        }
    }

    fn convolution(&self, node: &Node, slots: &ConvSlots, shape: &[i64]) -> Result<Found, String> {
        let spatial = shape.len().checked_sub(2).filter(|&axes| axes > 0);
        let spatial = spatial.ok_or_else(|| format!("expected a kernel with positions, found the shape {shape:?}"))?;
        let output_padding = match slots.transposed {
            Transposed::Never => None,
            Transposed::Always { output_padding } => Some(output_padding),
            Transposed::If { flag, output_padding } => {
                let flag = self.constant(node, flag).ok_or_else(|| not_constant("transposed"))?;
                (flag.text == "True" || flag.text == "1").then_some(output_padding)
            }
        };
        let list = |slot, what| self.numbers(node, slot, spatial).ok_or_else(|| not_constant(what));
        let (stride, dilation) = (list(slots.stride, "stride")?, list(slots.dilation, "dilation")?);
        let padding = self.padding(node, slots.padding, spatial).ok_or_else(|| not_constant("padding"))?;
        let more = output_padding.map(|slot| list(slot, "output_padding")).transpose()?;
        let groups = self.numbers(node, slots.groups, 1).and_then(|numbers| numbers.first().copied());
        let groups = groups.filter(|&groups| groups > 0).ok_or_else(|| not_constant("groups"))?;
        let axes = (0..spatial).map(|axis| Axis {
            kernel: shape[axis + 2],
            stride: stride[axis],
            padding: padding[axis],
            dilation: dilation[axis],
            transposed: more.as_ref().map(|more| more[axis]),
        });
        let reading = Reading::Positions(axes.collect());
        let is_transposed = more.is_some();
        let form = if is_transposed { Form::InputsFirst { groups } } else { Form::OutputsFirst { groups } };
        Ok(Found { slot: 0, weight_slot: 1, reading, form, has_bias_slot: true, factor: 1.0 })
    }

    /// The statistics of the value, if they sum up what the op reads: each number once, its features as channels, as often
    /// as the op runs.
    fn source(&self, node: &Node, value: ValueId, reading: &Reading) -> Source {
        let known = &self.listing.values[value];
        let rank = known.seen.as_ref().map(|seen| seen.shape.len());
        let axis = match reading {
            Reading::Rows if rank == Some(2) => None,
            // One axis is one channel there, whatever its features.
            Reading::Rows if rank.is_some_and(|rank| rank > 2) => Some(ChannelAxis::Last),
            Reading::Positions(axes) if axes.iter().all(Axis::is_pointwise) && rank == Some(axes.len() + 2) => {
                Some(ChannelAxis::Second)
            }
            _ => return Source::Tap,
        };
        let maker = self.listing.nodes.iter().find(|maker| maker.outputs.contains(&value));
        let block = maker.map_or(0, |maker| maker.block);
        let sites = self.sites.activations.iter().enumerate();
        let mut found = sites.filter_map(|(index, site)| {
            let anchor = site.anchors.iter().position(|anchor| anchor.value == value)?;
            let fits = axis.is_none_or(|axis| axis == site.channel_axis);
            fits.then_some(Source::Statistics { site: index, anchor })
        });
        let found = found.next().filter(|_| block == node.block && !known.has_writers);
        found.unwrap_or(Source::Tap)
    }

    fn padding(&self, node: &Node, slot: usize, axes: usize) -> Option<Vec<Padding>> {
        let name = self.constant(node, slot).map(|constant| constant.text.trim_matches(['"', '\'']));
        match name {
            Some("same") => Some(vec![Padding::Same; axes]),
            Some("valid") => Some(vec![Padding::Zeros(0); axes]),
            _ => Some(self.numbers(node, slot, axes)?.into_iter().map(Padding::Zeros).collect()),
        }
    }

    /// So many whole numbers: of a constant list, of a list that is put together of constants, or one for all.
    fn numbers(&self, node: &Node, slot: usize, count: usize) -> Option<Vec<i64>> {
        let texts: Vec<&str> = match self.constant(node, slot) {
            Some(constant) => constant.text.trim_matches(['[', ']']).split(',').map(str::trim).collect(),
            None => {
                let elements = self.operands(node).into_iter().filter(|(of, _)| *of == slot);
                let constant = |(_, value): (usize, ValueId)| self.listing.values[value].constant.as_ref();
                elements.map(|element| constant(element).map(|c| c.text.as_str())).collect::<Option<_>>()?
            }
        };
        let numbers: Vec<i64> = texts.into_iter().map(|text| text.parse().ok()).collect::<Option<_>>()?;
        match *numbers.as_slice() {
            [one] => Some(vec![one; count]),
            _ => (numbers.len() == count).then_some(numbers),
        }
    }

    fn constant(&self, node: &Node, slot: usize) -> Option<&Constant> {
        self.listing.values[*node.inputs.get(slot)?].constant.as_ref()
    }

    fn bias(&self, node: &Node, slot: usize) -> OldBias {
        let Some(&value) = node.inputs.get(slot) else { return OldBias::NoSlot };
        match &self.listing.values[value].constant {
            Some(constant) if constant.dtype == "Float" && constant.shape.len() == 1 => OldBias::Constant(slot, value),
            Some(constant) if !constant.is_tensor() => OldBias::Absent(slot),
            _ => OldBias::NoSlot,
        }
    }
}

fn not_constant(what: &str) -> String {
    format!("its `{what}` is no constant")
}

/// Why ops of this kind are left out.
fn uncovered(op: &str) -> String {
    let reason = match op {
        "aten::embedding" | "aten::embedding_bag" => "it looks rows of its weight up, without a sum over inputs",
        "aten::lstm"
        | "aten::gru"
        | "aten::rnn_tanh"
        | "aten::rnn_relu"
        | "aten::lstm_cell"
        | "aten::gru_cell"
        | "aten::rnn_tanh_cell"
        | "aten::rnn_relu_cell" => "of a recurrent layer: its inner states are not observed",
        "aten::bilinear" => "its weight meets products of two inputs",
        _ => "not covered by bias correction",
    };
    reason.to_owned()
}
