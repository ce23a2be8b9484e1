//! Values that are the same numbers: moved by views and pooling, through branches and loops. A class has one quantizer.

use std::collections::{BTreeMap, BTreeSet};

use super::Kernels;
use super::ops::{self, Role};
use crate::jit::{Listing, Node, NodeId, ValueId};

/// What is known of a class's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    Float,
    Other,
    Unknown,
}

/// Who reads and who makes the values of a graph, and which values belong together.
pub(super) struct Classes<'a> {
    listing: &'a Listing,
    parent: Vec<ValueId>,
    members: BTreeMap<ValueId, Vec<ValueId>>,
    users: Vec<Vec<NodeId>>,
    makers: Vec<Option<NodeId>>,
    returned: Vec<bool>,
    dtypes: BTreeMap<ValueId, Dtype>,
    /// For 8-bit kernels; see [`find_ends`](Self::find_ends).
    at_end: NodeSet,
}

impl<'a> Classes<'a> {
    pub(super) fn new(listing: &'a Listing, kernels: Kernels) -> Self {
        let count = listing.values.len();
        let mut classes = Self {
            listing,
            parent: (0..count).collect(),
            members: BTreeMap::new(),
            users: vec![Vec::new(); count],
            makers: vec![None; count],
            returned: vec![false; count],
            dtypes: BTreeMap::new(),
            at_end: NodeSet::new(),
        };
        for (id, node) in listing.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|&value| classes.users[value].push(id));
            node.outputs.iter().for_each(|&value| classes.makers[value] = Some(id));
        }
        for block in &listing.blocks {
            block.returns.iter().for_each(|&value| classes.returned[value] = true);
        }
        for node in &listing.nodes {
            classes.join_node(node);
        }
        classes.collect();
        if kernels == Kernels::Int8 {
            classes.join_what_keeps_quantizers();
        }
        classes
    }

    /// Tells members and dtypes of the classes as they are.
    fn collect(&mut self) {
        self.members.clear();
        for value in 0..self.parent.len() {
            self.members.entry(self.of(value)).or_default().push(value);
        }
        self.dtypes = self.find_dtypes();
    }

    /// Joins what ops make with what they read, where they write with the quantizer of that. At the end of a model they write float
    /// numbers, and so does a linear layer for a ReLU.
    fn join_what_keeps_quantizers(&mut self) {
        let listing = self.listing;
        self.at_end = self.find_ends();
        let of_layers: NodeSet = listing.nodes.iter().filter_map(|node| self.function_at_end(node)).collect();
        for (id, node) in listing.nodes.iter().enumerate() {
            let keeps = ops::keeps_quantizer(&node.op) && !self.at_end.contains(&id);
            let is_alone = self.is_lone_relu(node) && !of_layers.contains(&id) && !self.reads_an_end(node);
            if keeps || is_alone {
                self.join_results(node);
            }
        }
        self.collect();
    }

    /// Pooling by mean and the like, and clamps, behind which nothing but such ops computes: what they make is returned.
    fn find_ends(&self) -> NodeSet {
        let mut ends = NodeSet::new();
        for (id, node) in self.listing.nodes.iter().enumerate().rev() {
            let is_of_kind = ops::keeps_quantizer(&node.op) || ops::is_clamp(&node.op);
            let goes_on = |&output: &ValueId| self.is_used(self.of(output), |reader, _| !ends.contains(&reader));
            if is_of_kind && !node.outputs.iter().any(goes_on) {
                ends.insert(id);
            }
        }
        ends
    }

    /// Whether an op writes float numbers though it has an 8-bit kernel, as pooling by mean does at the end of a model.
    pub(super) fn is_at_end(&self, id: NodeId) -> bool {
        self.at_end.contains(&id) && ops::keeps_quantizer(&self.listing.nodes[id].op)
    }

    /// Whether what a node reads, as it is or moved, comes from such an op.
    fn reads_an_end(&self, node: &Node) -> bool {
        let Some(id) = node.inputs.first().and_then(|&input| self.maker(input)) else { return false };
        let maker = &self.listing.nodes[id];
        let moves = matches!(effective_role(self.listing, maker), Some(Role::Move(_)));
        self.is_at_end(id) || moves && self.reads_an_end(maker)
    }

    /// The class of a value, as the smallest value in it.
    pub(super) fn of(&self, mut value: ValueId) -> ValueId {
        while self.parent[value] != value {
            value = self.parent[value];
        }
        value
    }

    pub(super) fn members(&self, class: ValueId) -> impl Iterator<Item = ValueId> + '_ {
        self.members.get(&class).into_iter().flatten().copied()
    }

    pub(super) fn users(&self, value: ValueId) -> &[NodeId] {
        &self.users[value]
    }

    pub(super) fn maker(&self, value: ValueId) -> Option<NodeId> {
        self.makers[value]
    }

    /// True if some block returns the value.
    pub(super) fn is_returned(&self, value: ValueId) -> bool {
        self.returned[value]
    }

    pub(super) fn dtype(&self, value: ValueId) -> Dtype {
        self.dtypes.get(&self.of(value)).copied().unwrap_or(Dtype::Unknown)
    }

    /// True for a tensor, or list of tensors, that runs may fill with float32 numbers.
    pub(super) fn may_be_float(&self, value: ValueId) -> bool {
        let known = &self.listing.values[value];
        match &known.constant {
            Some(constant) => constant.dtype == "Float",
            None => holds_tensors(self.listing, value) && self.dtype(value) != Dtype::Other,
        }
    }

    /// The tensors behind an operand: itself, or the elements of a list that is put together in the graph.
    pub(super) fn elements(&self, value: ValueId) -> Vec<ValueId> {
        let maker = self.maker(value).map(|id| &self.listing.nodes[id]);
        match maker {
            Some(node) if node.op == "prim::ListConstruct" => node.inputs.clone(),
            _ => vec![value],
        }
    }

    /// The values of a class that are made rather than passed on: where its quantizer goes.
    pub(super) fn anchors(&self, class: ValueId) -> Vec<ValueId> {
        let made = |value: &ValueId| match self.maker(*value) {
            Some(node) => !moved(self.listing, node).iter().any(|&input| self.of(input) == class),
            None => self.is_argument(*value),
        };
        self.members(class).filter(made).filter(|&value| self.listing.values[value].constant.is_none()).collect()
    }

    /// True if something in the model computes with the numbers of this class. Asking for shapes, and ops without float
    /// results such as arg-max, do not count.
    pub(super) fn is_computed_with(&self, class: ValueId) -> bool {
        self.is_used(class, |_, _| true)
    }

    /// The same where other numbers come of it, not those of the class again.
    pub(super) fn makes_others(&self, class: ValueId) -> bool {
        self.is_used(class, |_, output| self.of(output) != class)
    }

    /// Whether a node reads the class that makes float numbers which count.
    fn is_used(&self, class: ValueId, counts: impl Fn(NodeId, ValueId) -> bool) -> bool {
        self.members(class).flat_map(|value| self.users(value)).any(|&id| {
            let node = &self.listing.nodes[id];
            let output_floats = node.outputs.iter().any(|&output| self.may_be_float(output) && counts(id, output));
            !moves(self.listing, node) && !is_container(node) && output_floats || self.is_read_by_list_user(node)
        })
    }

    /// The activation function that alone reads, as it is or moved, what a linear layer makes, and with whose result nothing computes, as at the
    /// end of a model: the layer's 8-bit kernel gives it float numbers.
    pub(super) fn function_at_end(&self, layer: &Node) -> Option<NodeId> {
        let weight = layer.inputs.get(1).and_then(|&value| self.listing.values[value].constant.as_ref());
        let is_matrix = weight.is_some_and(|weight| weight.is_tensor() && weight.shape.len() == 2);
        if !is_matrix || !matches!(layer.op.as_str(), "aten::linear" | "aten::matmul" | "aten::mm") {
            return None;
        }
        let mut value = *layer.outputs.first()?;
        loop {
            let [reader] = *self.users(value) else { return None };
            let node = &self.listing.nodes[reader];
            let result = *node.outputs.first()?;
            match effective_role(self.listing, node) {
                _ if node.inputs.first() != Some(&value) || self.returned[value] => return None,
                Some(Role::Move(_)) if node.outputs.len() == 1 => value = result,
                Some(Role::Activation) => return (!self.is_computed_with(self.of(result))).then_some(reader),
                _ => return None,
            }
        }
    }

    /// True if the model returns a value of this class, by itself or in a tuple, list or dict.
    pub(super) fn is_model_output(&self, class: ValueId) -> bool {
        self.members(class).any(|value| self.reaches_return(value))
    }

    /// True if the model returns the value, by itself or in a tuple, list or dict.
    pub(super) fn reaches_return(&self, value: ValueId) -> bool {
        self.listing.blocks.first().is_some_and(|forward| forward.returns.contains(&value))
            || self.users(value).iter().any(|&id| {
                let node = &self.listing.nodes[id];
                is_container(node) && node.outputs.iter().any(|&output| self.reaches_return(output))
            })
    }

    fn is_read_by_list_user(&self, node: &Node) -> bool {
        is_container(node)
            && node.outputs.iter().flat_map(|&output| self.users(output)).any(|&id| {
                let user = &self.listing.nodes[id];
                !is_container(user) || self.is_read_by_list_user(user)
            })
    }

    fn is_argument(&self, value: ValueId) -> bool {
        self.listing.arguments().contains(&value)
    }

    fn join(&mut self, a: ValueId, b: ValueId) {
        let joinable = |value: ValueId| {
            let known = &self.listing.values[value];
            // What is written in place is no longer the numbers that it was made of.
            known.constant.is_none() && !known.has_writers && holds_tensors(self.listing, value)
        };
        if !joinable(a) || !joinable(b) {
            return;
        }
        // A cast between float and other numbers changes them.
        let seen = |value: ValueId| self.listing.values[value].seen.as_ref().map(|seen| seen.dtype == "Float");
        if let (Some(a), Some(b)) = (seen(a), seen(b))
            && a != b
        {
            return;
        }
        let (a, b) = (self.of(a), self.of(b));
        self.parent[a.max(b)] = a.min(b);
    }

    fn join_node(&mut self, node: &Node) {
        match (node.op.as_str(), effective_role(self.listing, node)) {
            ("prim::If", _) => self.join_if(node),
            ("prim::Loop", _) => self.join_loop(node),
            ("prim::ListConstruct", _) if self.is_taken_apart(node) => {
                for &output in &node.outputs {
                    node.inputs.iter().for_each(|&input| self.join(output, input));
                }
            }
            (op, Some(Role::Move(slots))) => {
                let outputs = if op == "prim::ListUnpack" { node.outputs.len() } else { 1 };
                for &slot in slots {
                    let Some(&input) = node.inputs.get(slot) else { continue };
                    for &output in node.outputs.iter().take(outputs) {
                        self.join(input, output);
                    }
                }
            }
            _ => {}
        }
    }

    /// True for a list that does not go into an op as it is: it leaves a branch or loop, or is unpacked again. Its tensors
    /// cannot be told apart behind that, so that they share a quantizer.
    fn is_taken_apart(&self, node: &Node) -> bool {
        let unpacks =
            |&id: &NodeId| matches!(self.listing.nodes[id].op.as_str(), "prim::ListUnpack" | "aten::__getitem__");
        let forward = self.listing.blocks.first();
        node.outputs.iter().any(|&list| {
            let leaves_block = self.returned[list] && !forward.is_some_and(|block| block.returns.contains(&list));
            leaves_block || self.users(list).iter().any(unpacks)
        })
    }

    /// A ReLU that no layer or sum takes in: its kernel writes with the quantizer of what it reads.
    fn is_lone_relu(&self, node: &Node) -> bool {
        let Some(&input) = node.inputs.first().filter(|_| node.op == "aten::relu") else { return false };
        let maker = self.maker(input).map(|id| &self.listing.nodes[id]);
        let takes_it_in = maker.is_some_and(|maker| {
            matches!(ops::role(&maker.op), Some(Role::Weighted(_) | Role::Product(_) | Role::Quantized(_)))
                && !ops::keeps_quantizer(&maker.op)
                || ops::may_run_in_8_bits(&maker.op)
        });
        !takes_it_in || self.users(input).len() > 1 || self.is_returned(input)
    }

    /// Joins what is made of numbers with them, though it is no longer the same numbers.
    fn join_results(&mut self, node: &Node) {
        if let (Some(&input), Some(&output)) = (node.inputs.first(), node.outputs.first()) {
            self.join(input, output);
        }
    }

    fn join_if(&mut self, node: &Node) {
        for &block in &node.blocks {
            for (&returned, &output) in self.listing.blocks[block].returns.iter().zip(&node.outputs) {
                self.join(returned, output);
            }
        }
    }

    /// A loop's inputs are trip count, condition, carried values; its body takes the iteration and the carried values and
    /// returns the condition and the carried values.
    fn join_loop(&mut self, node: &Node) {
        for &block in &node.blocks {
            let block = &self.listing.blocks[block];
            let carried = node.inputs.iter().skip(2);
            let bodies = block.parameters.iter().skip(1).zip(block.returns.iter().skip(1));
            for ((&input, (&parameter, &returned)), &output) in carried.zip(bodies).zip(&node.outputs) {
                self.join(parameter, input);
                self.join(parameter, returned);
                self.join(parameter, output);
            }
        }
    }

    fn find_dtypes(&self) -> BTreeMap<ValueId, Dtype> {
        let mut dtypes = BTreeMap::new();
        for (id, value) in self.listing.values.iter().enumerate() {
            if let Some(seen) = &value.seen {
                let dtype = if seen.dtype == "Float" { Dtype::Float } else { Dtype::Other };
                dtypes.insert(self.of(id), dtype);
            }
        }
        for node in &self.listing.nodes {
            if let Some(&indices) = index_slot(&node.op).and_then(|slot| node.inputs.get(slot)) {
                dtypes.entry(self.of(indices)).or_insert(Dtype::Other);
            }
            if matches!(ops::role(&node.op), Some(Role::Other)) {
                node.outputs.iter().for_each(|&output| {
                    dtypes.entry(self.of(output)).or_insert(Dtype::Other);
                });
            }
            let takes_floats = matches!(ops::role(&node.op), Some(Role::Weighted(_))) && index_slot(&node.op).is_none();
            if let (true, Some(&data)) = (takes_floats, node.inputs.first()) {
                dtypes.entry(self.of(data)).or_insert(Dtype::Float);
            }
        }
        dtypes
    }
}

/// The role of a node, where padding with anything but zero is no moving of numbers.
pub(super) fn effective_role(listing: &Listing, node: &Node) -> Option<Role> {
    match ops::role(&node.op)? {
        Role::Pad(slot) => {
            let value = node.inputs.get(slot).and_then(|&value| listing.values[value].constant.as_ref());
            let zero = value.is_some_and(|constant| matches!(constant.text.as_str(), "None" | "0" | "0."));
            Some(if zero || node.inputs.len() <= slot { Role::Move(&[0]) } else { Role::Float })
        }
        role => Some(role),
    }
}

/// True for ops that pass numbers on: moves, branches and loops.
pub(super) fn moves(listing: &Listing, node: &Node) -> bool {
    matches!(node.op.as_str(), "prim::If" | "prim::Loop")
        || matches!(effective_role(listing, node), Some(Role::Move(_)))
}

/// The values whose numbers a moving node passes on; none for other nodes.
pub(super) fn moved(listing: &Listing, id: NodeId) -> Vec<ValueId> {
    let node = &listing.nodes[id];
    let returns = || node.blocks.iter().flat_map(|&block| listing.blocks[block].returns.iter().copied());
    match node.op.as_str() {
        "prim::If" => returns().collect(),
        "prim::ListConstruct" => node.inputs.clone(),
        "prim::Loop" => node.inputs.iter().skip(2).copied().chain(returns()).collect(),
        _ => match effective_role(listing, node) {
            Some(Role::Move(slots)) => slots.iter().filter_map(|&slot| node.inputs.get(slot).copied()).collect(),
            _ => Vec::new(),
        },
    }
}

/// True for a tensor or a list of tensors.
pub(super) fn holds_tensors(listing: &Listing, value: ValueId) -> bool {
    let value = &listing.values[value];
    value.is_tensor || matches!(value.type_name.as_str(), "Tensor[]" | "List[Tensor]")
}

/// True for ops that put values together and do nothing else.
pub(super) fn is_container(node: &Node) -> bool {
    matches!(node.op.as_str(), "prim::ListConstruct" | "prim::TupleConstruct" | "prim::DictConstruct")
}

/// The slot in which an op takes indices.
fn index_slot(op: &str) -> Option<usize> {
    match op {
        "aten::embedding" | "aten::embedding_bag" => Some(1),
        "aten::index_select" | "aten::gather" => Some(2),
        _ => None,
    }
}

/// Nodes from a set, for the callers that mark some.
pub(super) type NodeSet = BTreeSet<NodeId>;
