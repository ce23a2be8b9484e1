//! From roles of ops to sites.

mod reach;

use std::collections::{BTreeMap, BTreeSet};

use super::attention::{self, Scores};
use super::classes::{Classes, effective_role, moves};
use super::names;
use super::ops::{self, Role, Weighted, Weights};
use super::returned;
use super::{ActivationSite, Anchor, ChannelAxis, Kernels, Layer, LeftFloat, Sites, WeightSite};
use crate::jit::{Constant, Listing, Node, NodeId, ValueId};

pub(super) fn find(listing: &Listing, kernels: Kernels) -> Sites {
    let classes = Classes::new(listing, kernels);
    let scores = attention::find(listing, &classes);
    let names = names::of_nodes(listing);
    let written_in_8_bits = match kernels {
        Kernels::Float => Vec::new(),
        Kernels::Int8 => returned::written_in_8_bits(listing, &classes),
    };
    let mut finder = Finder {
        listing,
        kernels,
        classes,
        scores,
        names,
        written_in_8_bits,
        fused_from: BTreeMap::new(),
        demanded: BTreeSet::new(),
        weights: BTreeMap::new(),
        weight_users: Vec::new(),
        sites: Sites::default(),
    };
    for id in 0..listing.nodes.len() {
        finder.visit(id);
    }
    finder.demand_arguments();
    finder.collect_activations();
    if kernels == Kernels::Int8 {
        finder.take_up_lone_clamps();
    }
    finder.collect_ops();
    finder.collect_unknown_ops();
    finder.sites
}

struct Finder<'a> {
    listing: &'a Listing,
    kernels: Kernels,
    classes: Classes<'a>,
    scores: Scores,
    names: Vec<String>,
    /// By value; empty for float kernels.
    written_in_8_bits: Vec<bool>,
    /// Activation function → the op that it joins.
    fused_from: BTreeMap<NodeId, NodeId>,
    demanded: BTreeSet<ValueId>,
    /// Identity of a weight → its index among the sites.
    weights: BTreeMap<(usize, Vec<i64>, Vec<i64>), usize>,
    /// The nodes that use each weight site.
    weight_users: Vec<BTreeSet<NodeId>>,
    sites: Sites,
}

/// Reason of an op without a row.
const UNKNOWN: &str = "not in the op table";

/// Ops of TorchScript itself that put values together, take them apart or say where to go on.
const PLUMBING: &[&str] = &[
    "prim::If",
    "prim::Loop",
    "prim::ListConstruct",
    "prim::TupleConstruct",
    "prim::TupleUnpack",
    "prim::TupleIndex",
    "prim::DictConstruct",
    "prim::GetAttr",
    "prim::SetAttr",
    "prim::Uninitialized",
];

/// A constant operand on its way to become a weight site.
struct Candidate {
    value: ValueId,
    axis: usize,
    /// What to call it if it is no named parameter.
    fallback: String,
}

impl Finder<'_> {
    fn visit(&mut self, id: NodeId) {
        let node = &self.listing.nodes[id];
        if self.scores.arithmetic.contains(&id) {
            self.leave_op_float(id, "arithmetic of scores and masks before a softmax");
            return;
        }
        match effective_role(self.listing, node) {
            Some(Role::Weighted(row)) => self.visit_weighted(id, row),
            Some(Role::Product(product)) => self.visit_product(id, product.left, product.right),
            Some(Role::Quantized(slots)) => self.visit_quantized(id, slots),
            Some(Role::Attention) => {
                self.demand_inputs(id, &[0, 1, 2]);
                self.demand_output(id);
                self.leave_op_float(
                    id,
                    "scores and softmax inside are computed in float; query, key and value are sites",
                );
            }
            // Where it stays in float, the lowering says so.
            Some(Role::Float) if self.kernels == Kernels::Int8 && ops::may_run_in_8_bits(&node.op) => {
                self.visit_normalization(id);
            }
            Some(Role::Float) => self.leave_op_float(id, "computed in float"),
            Some(Role::Softmax) => self.leave_op_float(id, "computed in float; where its result is used, it is a site"),
            Some(Role::Activation) if self.fused_from.contains_key(&id) => {}
            Some(Role::Activation) if self.kernels == Kernels::Int8 && !ops::is_clamp(&node.op) => {
                self.visit_quantized(id, &[0]);
            }
            Some(Role::Activation) => {
                self.leave_op_float(id, "computed in float: it follows no layer that it could join");
            }
            Some(Role::Move(_) | Role::Pad(_) | Role::Other) => {}
            None if PLUMBING.contains(&node.op.as_str()) => {}
            None if !node.op.starts_with("aten::") && !node.op.starts_with("prim::") => {
                self.leave_float(self.names[id].clone(), &node.op, UNKNOWN.to_owned());
            }
            None if node.op == "aten::fake_quantize_per_tensor_affine" => {
                self.leave_op_float(id, "a fake-quantize node of the model's own");
            }
            None => self.leave_op_float(id, UNKNOWN),
        }
    }

    fn visit_weighted(&mut self, id: NodeId, row: &Weighted) {
        let node = &self.listing.nodes[id];
        self.demand_inputs(id, row.data);
        match row.weights {
            Weights::Slots(slots) => {
                for &slot in slots {
                    let Some(&value) = node.inputs.get(slot) else { continue };
                    let fallback = if slots.len() == 1 { "weight".to_owned() } else { format!("weight_{slot}") };
                    self.add_weight(id, &Candidate { value, axis: row.axis, fallback });
                }
            }
            Weights::List => self.add_recurrent_weights(id, row.axis),
        }
        if !row.output && !row.data.is_empty() {
            self.leave_op_float(id, "the cell's arithmetic is computed in float; its weights and its input are sites");
        }
        self.add_layer(id);
        if row.output && !self.scores.products.contains(&id) {
            self.demand_output(id);
        } else if row.output {
            self.leave_result_float(id, "goes into a softmax, which wants it in float");
        }
    }

    fn add_recurrent_weights(&mut self, id: NodeId, axis: usize) {
        let node = &self.listing.nodes[id];
        // The list comes third, or fourth where the data are packed sequences with sizes of their own.
        let is_list =
            |&value: &ValueId| matches!(self.listing.values[value].type_name.as_str(), "Tensor[]" | "List[Tensor]");
        let Some(slot) = node.inputs.iter().rposition(is_list) else { return };
        let list = node.inputs[slot];
        let elements = self.classes.elements(list);
        let matrices: Vec<_> = elements.into_iter().filter(|&value| rank(self.listing, value) == Some(2)).collect();
        let flag = |slot: usize| node.inputs.get(slot).and_then(|&value| self.listing.values[value].constant.as_ref());
        let bidirectional = flag(slot + 5).is_some_and(|constant| constant.text == "True");
        if matrices.is_empty() {
            self.leave_float(self.names[id].clone(), &node.op, "its weights are no constants".to_owned());
        }
        for (index, value) in matrices.into_iter().enumerate() {
            let fallback = names::recurrent_matrix(index, bidirectional);
            self.add_weight(id, &Candidate { value, axis, fallback });
        }
    }

    fn visit_product(&mut self, id: NodeId, left: usize, right: usize) {
        let node = &self.listing.nodes[id];
        let mut has_weight = false;
        for (slot, is_right) in [(left, false), (right, true)] {
            let Some(&value) = node.inputs.get(slot) else { continue };
            let rank = match rank(self.listing, value) {
                None => {
                    self.demand(value);
                    continue;
                }
                Some(rank @ 2..) => rank,
                Some(_) => {
                    self.leave_constant_float(id, value);
                    continue;
                }
            };
            // Output channels are the columns of a right factor and the rows of a left one.
            let axis = if is_right { rank - 1 } else { rank - 2 };
            has_weight |= self.add_weight(id, &Candidate { value, axis, fallback: "weight".to_owned() });
        }
        if has_weight {
            self.add_layer(id);
        }
        if self.scores.products.contains(&id) {
            self.leave_result_float(id, "goes into a softmax, which wants it in float");
        } else {
            self.demand_output(id);
        }
    }

    fn visit_quantized(&mut self, id: NodeId, slots: &[usize]) {
        let node = &self.listing.nodes[id];
        if !node.outputs.iter().any(|&output| self.classes.may_be_float(output)) {
            return;
        }
        self.demand_inputs(id, slots);
        // What is but clamped behind it, and returned, is no site.
        let is_output = node.outputs.iter().all(|&output| !self.classes.is_computed_with(self.classes.of(output)));
        if is_output || !self.classes.is_at_end(id) {
            self.demand_output(id);
        }
        for &slot in slots {
            let operands = node.inputs.get(slot).map(|&value| self.classes.elements(value)).unwrap_or_default();
            for value in operands {
                self.leave_constant_float(id, value);
            }
        }
    }

    /// An op that is no reason for a site but that the model returns what its kernel makes.
    fn visit_normalization(&mut self, id: NodeId) {
        let node = &self.listing.nodes[id];
        let Some(&output) = node.outputs.first() else { return };
        let end = self.joining_activation(node, output);
        if let Some(end) = end {
            self.fused_from.insert(end, id);
        }
        let result = end.and_then(|end| self.listing.nodes[end].outputs.first()).copied().unwrap_or(output);
        if self.is_output_in_8_bits(&[result], self.classes.of(result)) {
            self.demand(result);
        }
    }

    /// Lists a constant tensor that takes part in a quantized op without being a weight.
    fn leave_constant_float(&mut self, id: NodeId, value: ValueId) {
        let constant = self.listing.values[value].constant.as_ref();
        if let Some(shape) = constant.filter(|c| c.dtype == "Float" && !c.shape.is_empty()).map(|c| &c.shape) {
            let reason = format!("its constant operand of shape {shape:?} stays float");
            self.leave_float(self.names[id].clone(), &self.listing.nodes[id].op, reason);
        }
    }

    fn demand_inputs(&mut self, id: NodeId, slots: &[usize]) {
        let node = &self.listing.nodes[id];
        for value in slots.iter().filter_map(|&slot| node.inputs.get(slot)) {
            for element in self.classes.elements(*value) {
                self.demand(element);
            }
        }
    }

    /// Makes the result a site, or that of the activation function that joins the op.
    fn demand_output(&mut self, id: NodeId) {
        let node = &self.listing.nodes[id];
        let Some(&output) = node.outputs.first() else { return };
        match self.joining_activation(node, output) {
            Some(end) => {
                self.fused_from.insert(end, id);
                self.listing.nodes[end].outputs.iter().for_each(|&value| self.demand(value));
            }
            None => self.demand(output),
        }
    }

    /// The activation function that is the only reader of a layer's, product's or addition's result.
    fn joining_activation(&self, node: &Node, output: ValueId) -> Option<NodeId> {
        if let (Kernels::Int8, Some(end)) = (self.kernels, self.classes.function_at_end(node)) {
            return Some(end);
        }
        let [reader] = *self.classes.users(output) else { return None };
        let function = &self.listing.nodes[reader];
        let joins = matches!(effective_role(self.listing, function), Some(Role::Activation))
            && function.inputs.first() == Some(&output)
            && !self.classes.is_returned(output);
        // Sums fuse with the clamps only, as integer kernels do.
        let is_layer = matches!(effective_role(self.listing, node), Some(Role::Weighted(_) | Role::Product(_)));
        let takes_any = is_layer && self.kernels == Kernels::Float;
        (joins && (takes_any || ops::is_clamp(&function.op))).then_some(reader)
    }

    /// Whether the model returns what kernels make in 8 bits alone. A value that is returned itself stays as it is made; see
    /// [`returned_in_8_bits`](super::returned_in_8_bits).
    fn is_output_in_8_bits(&self, anchors: &[ValueId], class: ValueId) -> bool {
        self.kernels == Kernels::Int8
            && self.classes.is_model_output(class)
            && anchors.iter().all(|&anchor| self.written_in_8_bits[anchor] && !self.classes.reaches_return(anchor))
    }

    fn demand(&mut self, value: ValueId) {
        // A single number is no tensor worth a quantizer.
        let is_number = self.listing.values[value].seen.as_ref().is_some_and(|seen| seen.shape.is_empty());
        if self.listing.values[value].constant.is_none() && self.classes.may_be_float(value) && !is_number {
            self.demanded.insert(self.classes.of(value));
        }
    }

    /// Float arguments of the model are sites, unless nothing but masks is made of them.
    fn demand_arguments(&mut self) {
        for &value in self.listing.arguments() {
            let class = self.classes.of(value);
            let mut readers = self.classes.members(class).flat_map(|member| self.readers_of(member));
            let is_read = readers.any(|reader| !self.scores.arithmetic.contains(&reader));
            drop(readers);
            if is_read {
                self.demand(value);
            }
        }
    }

    /// A clamp whose result has the quantizer of what it reads is not left float after all.
    fn take_up_lone_clamps(&mut self) {
        for (id, node) in self.listing.nodes.iter().enumerate() {
            let (Some(input), Some(output)) = (node.inputs.first(), node.outputs.first()) else { continue };
            let is_within = |site: &ActivationSite| site.members.contains(input) && site.members.contains(output);
            if ops::is_clamp(&node.op) && self.sites.activations.iter().any(is_within) {
                let name = &self.names[id];
                self.sites.left_float.retain(|left| left.name != *name);
            }
        }
    }

    /// Nodes that compute with a value; an attention's use of it as mask does not count.
    fn readers_of(&self, value: ValueId) -> Vec<NodeId> {
        let reads = |id: &NodeId| {
            let node = &self.listing.nodes[*id];
            let only_as_mask = matches!(effective_role(self.listing, node), Some(Role::Attention))
                && !node.inputs.iter().take(3).any(|&input| input == value);
            !moves(self.listing, node) && !only_as_mask
        };
        self.classes.users(value).iter().copied().filter(reads).collect()
    }

    fn collect_activations(&mut self) {
        for class in std::mem::take(&mut self.demanded) {
            let anchors = self.classes.anchors(class);
            let first = anchors.first().copied().unwrap_or(class);
            let (name, layer, op) = self.name_value(first);
            if anchors.is_empty() {
                self.leave_float(name, &op, "made of constants alone".to_owned());
            } else if !self.classes.is_computed_with(class) && !self.is_output_in_8_bits(&anchors, class) {
                let is_output = self.classes.is_model_output(class);
                let reason =
                    if is_output { "an output of the model" } else { "nothing computes float numbers from it" };
                self.leave_float(name, &op, reason.to_owned());
            } else if anchors.iter().any(|&value| self.listing.values[value].has_writers) {
                self.leave_float(
                    name,
                    &op,
                    "it, or what it may share memory with, is written in place: replacing it could change the model"
                        .to_owned(),
                );
            } else if anchors.iter().any(|&value| !self.listing.values[value].is_tensor) {
                self.leave_float(name, &op, "a list of tensors".to_owned());
            } else {
                let anchors: Vec<Anchor> =
                    anchors.into_iter().map(|value| Anchor { value, name: self.name_value(value).0 }).collect();
                let channel_axis = self.channel_axis(class);
                let members: Vec<ValueId> = self.classes.members(class).collect();
                let is_made = |value: &ValueId| anchors.iter().any(|anchor| anchor.value == *value);
                let is_returned = members.iter().any(|value| !is_made(value) && self.classes.reaches_return(*value));
                self.sites.activations.push(ActivationSite {
                    name,
                    layer,
                    op,
                    channel_axis,
                    anchors,
                    members,
                    is_returned,
                    is_read: self.classes.makes_others(class),
                    makers: Vec::new(),
                    readers: Vec::new(),
                });
            }
        }
        self.sites.activations.sort_by_key(|site| site.anchors.first().map(|anchor| anchor.value));
    }

    /// Last where a layer that does not convolve reads the class, unless one that does makes or reads it, or what is pooled
    /// or flattened on its way there: that is made as an image.
    fn channel_axis(&self, class: ValueId) -> ChannelAxis {
        let mut axis = ChannelAxis::Second;
        for member in self.classes.members(class) {
            let nodes = self.classes.users(member).iter().copied().chain(self.classes.maker(member));
            for id in nodes {
                let node = &self.listing.nodes[id];
                match effective_role(self.listing, node) {
                    Some(Role::Weighted(row)) if row.convolves => return ChannelAxis::Second,
                    _ if node.op.contains("pool") || node.op == "aten::flatten" => return ChannelAxis::Second,
                    Some(Role::Weighted(_) | Role::Product(_)) => axis = ChannelAxis::Last,
                    _ => {}
                }
            }
        }
        axis
    }

    /// Site name, layer and op of a value.
    fn name_value(&self, value: ValueId) -> (String, String, String) {
        let value = self.uncast(value);
        let (layer, op) = self.layer(self.origin(value));
        let Some(maker) = self.classes.maker(value) else {
            let name = trim_suffix(&self.listing.values[value].name);
            return (format!("{layer}.{name}"), layer, op);
        };
        let node = &self.listing.nodes[maker];
        let outputs = node.outputs.iter().filter(|&&output| self.listing.values[output].is_tensor).count();
        let position = node.outputs.iter().position(|&output| output == value);
        let name = match position {
            Some(position) if outputs > 1 => format!("{layer}.output.{position}"),
            _ => format!("{layer}.output"),
        };
        (name, layer, op)
    }

    /// An optional argument, for the value that it is where it is known to be there.
    fn uncast(&self, value: ValueId) -> ValueId {
        let maker = self.classes.maker(value).map(|id| &self.listing.nodes[id]);
        match maker.map(|node| (node.op.as_str(), node.inputs.as_slice())) {
            Some(("prim::unchecked_cast", &[optional])) => self.uncast(optional),
            _ => value,
        }
    }

    /// The node that a value is named after; `None` for an argument of the model.
    fn origin(&self, value: ValueId) -> Option<NodeId> {
        self.classes.maker(self.uncast(value)).map(|id| self.owner(id))
    }

    /// The node itself, or the op that it joins.
    fn owner(&self, id: NodeId) -> NodeId {
        self.fused_from.get(&id).copied().unwrap_or(id)
    }

    /// Layer and op of a node, or of the model's arguments.
    fn layer(&self, origin: Option<NodeId>) -> (String, String) {
        match origin {
            Some(id) => (self.names[id].clone(), self.listing.nodes[id].op.clone()),
            None => ("input".to_owned(), "argument".to_owned()),
        }
    }

    /// Adds a weight site for a constant; a tensor that is computed is an activation like any other.
    fn add_weight(&mut self, id: NodeId, candidate: &Candidate) -> bool {
        let value = &self.listing.values[candidate.value];
        let node = &self.listing.nodes[id];
        let Some(constant) = value.constant.as_ref() else {
            self.demand(candidate.value);
            return false;
        };
        if !constant.is_tensor() {
            return false;
        }
        let own_name = constant.parameter.as_deref().or(node.parameter.as_deref()).map(names::last_part);
        let parameter = own_name.filter(|name| !name.starts_with("bias")).unwrap_or(&candidate.fallback).to_owned();
        let name = format!("{}.{parameter}", self.names[id]);
        if constant.dtype != "Float" {
            let reason = format!("its dtype is {}, not float32", constant.dtype.to_lowercase());
            self.leave_float(name, &node.op, reason);
            return false;
        }
        if constant.shape.contains(&0) {
            self.leave_float(name, &node.op, "it is empty".to_owned());
            return false;
        }
        let key = (constant.storage, constant.shape.clone(), constant.strides.clone());
        if let Some(&index) = self.weights.get(&key) {
            let site = &mut self.sites.weights[index];
            if !site.values.contains(&candidate.value) {
                site.values.push(candidate.value);
            }
            self.weight_users[index].insert(id);
            return true;
        }
        self.weights.insert(key, self.sites.weights.len());
        self.weight_users.push(BTreeSet::from([id]));
        let name = self.unique_weight_name(name);
        self.sites.weights.push(WeightSite {
            name,
            layer: self.names[id].clone(),
            op: node.op.clone(),
            shape: constant.shape.clone(),
            channel_axis: candidate.axis,
            values: vec![candidate.value],
            users: Vec::new(),
        });
        true
    }

    fn unique_weight_name(&self, name: String) -> String {
        let taken = |name: &str| self.sites.weights.iter().any(|site| site.name == name);
        if !taken(&name) {
            return name;
        }
        let numbered = (2..).map(|number| format!("{name}#{number}"));
        numbered.into_iter().find(|name| !taken(name)).unwrap_or(name)
    }

    fn add_layer(&mut self, id: NodeId) {
        let node = &self.listing.nodes[id];
        let operands = node.inputs.iter().flat_map(|&value| self.classes.elements(value));
        let constants = operands.filter_map(|value| self.listing.values[value].constant.as_ref());
        let shapes = constants.filter(|constant| constant.is_tensor()).map(|constant| constant.shape.clone());
        self.sites.layers.push(Layer {
            name: self.names[id].clone(),
            op: node.op.clone(),
            constants: shapes.collect(),
            node: id,
        });
    }

    /// Lists an op that takes and gives float tensors.
    fn leave_op_float(&mut self, id: NodeId, reason: &str) {
        let node = &self.listing.nodes[id];
        let floats = |values: &[ValueId]| {
            let elements = values.iter().flat_map(|&value| self.classes.elements(value));
            elements.into_iter().any(|value| self.classes.may_be_float(value))
        };
        if floats(&node.inputs) && floats(&node.outputs) {
            self.leave_float(self.names[id].clone(), &node.op, reason.to_owned());
        }
    }

    fn leave_result_float(&mut self, id: NodeId, reason: &str) {
        let name = format!("{}.output", self.names[id]);
        self.leave_float(name, &self.listing.nodes[id].op, reason.to_owned());
    }

    fn leave_float(&mut self, name: String, op: &str, reason: String) {
        self.sites.left_float.push(LeftFloat { name, op: op.to_owned(), reason });
    }

    fn collect_unknown_ops(&mut self) {
        let mut counts = BTreeMap::<&str, usize>::new();
        for left in self.sites.left_float.iter().filter(|left| left.reason == UNKNOWN) {
            *counts.entry(&left.op).or_default() += 1;
        }
        self.sites.unknown_ops = counts.into_iter().map(|(op, count)| (op.to_owned(), count)).collect();
    }
}

/// Rank of a constant tensor.
fn rank(listing: &Listing, value: ValueId) -> Option<usize> {
    listing.values[value]
        .constant
        .as_ref()
        .filter(|constant| constant.is_tensor())
        .map(|constant: &Constant| constant.shape.len())
}

/// An argument's name without the `.1` that the graph adds to keep names apart.
pub(super) fn trim_suffix(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => stem,
        _ => name,
    }
}
