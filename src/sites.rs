//! What is quantized: weights and activations, by name, and what stays float, each with its reason.
//!
//! Reads the plain listing of a cleaned graph. It knows no tensor and no statistics: which sites there are depends on the
//! graph alone.

mod attention;
mod classes;
mod find;
mod names;
mod ops;
mod returned;

use serde::Serialize;

use crate::jit::{Listing, NodeId, ValueId};

/// Everything that the rest needs to know about a graph.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sites {
    /// Ops with weights, in graph order.
    pub layers: Vec<Layer>,
    /// All ops that compute with float tensors, in graph order, and the arguments of the model as one.
    pub ops: Vec<Op>,
    /// Weights to quantize, in graph order; a shared weight once.
    pub weights: Vec<WeightSite>,
    /// Weights that the user wants left float.
    pub float_weights: Vec<WeightSite>,
    /// Values to quantize, in graph order.
    pub activations: Vec<ActivationSite>,
    /// What is not quantized though it computes with float tensors.
    pub left_float: Vec<LeftFloat>,
    /// Ops on float tensors that the op table lacks, with the number of their nodes.
    pub unknown_ops: Vec<(String, usize)>,
}

/// An op with weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Path of the module that owns the weight, or the op with a running number.
    pub name: String,
    /// TorchScript name of the op: `aten::conv2d`.
    pub op: String,
    /// Shapes of its constant tensors, in the order of its arguments.
    pub constants: Vec<Vec<i64>>,
    /// Its node.
    #[serde(skip)]
    pub node: NodeId,
}

/// An op that computes with float tensors, or the arguments of the model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Op {
    /// The layer that it is, as in the names of its sites; `input` for the arguments.
    pub name: String,
    /// TorchScript name of the op: `aten::conv2d`; `argument` for the arguments.
    pub op: String,
}

/// Index of an op in [`Sites::ops`].
pub type OpId = usize;

/// A constant weight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WeightSite {
    /// `LAYER.<parameter>`.
    pub name: String,
    /// The first layer that uses it.
    pub layer: String,
    /// That layer's op.
    pub op: String,
    /// Shape of the weight.
    pub shape: Vec<i64>,
    /// Axis of the output channels.
    pub channel_axis: usize,
    /// The constants of the graph that are this weight.
    #[serde(skip)]
    pub values: Vec<ValueId>,
    /// The ops whose weight it is.
    #[serde(skip)]
    pub users: Vec<OpId>,
}

/// A value of the graph that gets one quantizer, together with all values that are the same numbers moved about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActivationSite {
    /// `LAYER.output`, `LAYER.output.1`, `input.NAME`.
    pub name: String,
    /// What makes the value; `input` for an argument of the model.
    pub layer: String,
    /// Its op; `argument` for an argument of the model.
    pub op: String,
    /// Where its channels lie.
    #[serde(skip)]
    pub channel_axis: ChannelAxis,
    /// Where the quantizer goes: the values that are made, not moved. More than one where branches or loops meet.
    #[serde(skip)]
    pub anchors: Vec<Anchor>,
    /// All values that are these numbers, made or moved.
    #[serde(skip)]
    pub members: Vec<ValueId>,
    /// Whether the model returns the quantized numbers too: a value that is moved, not one that is made here.
    #[serde(skip)]
    pub is_returned: bool,
    /// Whether something in the model computes other numbers with it.
    #[serde(skip)]
    pub is_read: bool,
    /// The ops whose results it is; a fused activation function counts as the op that it joins.
    #[serde(skip)]
    pub makers: Vec<OpId>,
    /// The ops that compute with it.
    #[serde(skip)]
    pub readers: Vec<OpId>,
}

/// Along which axis an activation has its channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelAxis {
    /// The second, or the only one: images and signals.
    Second,
    /// The last: what linear layers take.
    Last,
}

/// One value of an activation site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anchor {
    /// The value.
    pub value: ValueId,
    /// What the site would be called if this were its only value.
    pub name: String,
}

/// Something that computes with float tensors and is not quantized.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftFloat {
    /// Name of the layer, op or value.
    pub name: String,
    /// Its op.
    pub op: String,
    /// Why.
    pub reason: String,
}

/// What will compute with the quantized numbers; that decides what they have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// Float kernels: layers take any activation function in, so that their one site is behind it.
    #[default]
    Float,
    /// libtorch's 8-bit kernels: a layer takes in clamps alone, and pooling by mean writes with the quantizer of what it reads.
    Int8,
}

/// Finds all sites of a graph, for float kernels.
#[must_use]
pub fn find(listing: &Listing) -> Sites {
    find_for(listing, Kernels::Float)
}

/// Finds all sites of a graph.
#[must_use]
pub fn find_for(listing: &Listing, kernels: Kernels) -> Sites {
    find::find(listing, kernels)
}

/// The values that the model returns and that 8-bit kernels make, which write no float numbers. Returned through `aten::alias` they can be
/// sites: a quantizer stands in front of it.
#[must_use]
pub fn returned_in_8_bits(listing: &Listing) -> Vec<ValueId> {
    returned::find(listing)
}

/// The name of each node of a graph, as in the names of its sites.
#[must_use]
pub fn names_of_nodes(listing: &Listing) -> Vec<String> {
    names::of_nodes(listing)
}

/// How many of the first inputs of an op without weights its 8-bit kernel takes as quantized tensors, where it writes a quantizer of its
/// own; else 0.
#[cfg(test)]
pub(crate) fn operands_in_8_bits(op: &str) -> usize {
    ops::operands_in_8_bits(op)
}

/// Whether libtorch's 8-bit kernel of an op writes with the quantizer of what it reads, though it makes other numbers of it.
#[must_use]
pub fn keeps_quantizer(op: &str) -> bool {
    ops::keeps_quantizer(op)
}

/// Whether a layer may compute this activation function along with its own.
#[must_use]
pub fn is_clamp(op: &str) -> bool {
    ops::is_clamp(op)
}

/// Arguments of `forward` whose dtype nothing tells: not seen in a run, and no op that takes only integers.
#[must_use]
pub fn arguments_of_unknown_dtype(listing: &Listing) -> Vec<String> {
    let classes = classes::Classes::new(listing, Kernels::Float);
    let arguments = listing.arguments().iter().map(|&id| (id, &listing.values[id]));
    let unknown = arguments.filter(|&(id, value)| value.is_tensor && classes.dtype(id) == classes::Dtype::Unknown);
    unknown.map(|(_, value)| find::trim_suffix(&value.name).to_owned()).collect()
}

#[cfg(test)]
mod tests;
