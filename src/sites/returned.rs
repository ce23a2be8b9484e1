//! What 8-bit kernels make that write no float numbers. It knows neither engine nor quantizers, for which an op may compute in float all
//! the same.

use super::Kernels;
use super::classes::{Classes, NodeSet, effective_role, is_container};
use super::ops::{self, Role};
use crate::jit::{Listing, Node, ValueId};

/// The values of a graph that come from such a kernel and that the model returns, by themselves or in a tuple, list or dict.
pub(super) fn find(listing: &Listing) -> Vec<ValueId> {
    let classes = Classes::new(listing, Kernels::Int8);
    let written = written_in_8_bits(listing, &classes);
    let mut open: Vec<ValueId> = listing.blocks.first().map(|forward| forward.returns.clone()).unwrap_or_default();
    let mut found = Vec::new();
    while let Some(value) = open.pop() {
        let Some(node) = classes.maker(value).map(|id| &listing.nodes[id]) else { continue };
        if is_container(node) {
            open.extend(&node.inputs);
        } else if written[value] && !matches!(effective_role(listing, node), Some(Role::Move(_))) {
            found.push(value);
        }
    }
    found
}

/// For each value of a graph, whether the last op that computed it did so by a kernel that writes 8 bits alone. libtorch's own ops, such
/// as pooling, write what they read, float numbers too.
pub(super) fn written_in_8_bits(listing: &Listing, classes: &Classes<'_>) -> Vec<bool> {
    let count = listing.values.len();
    let at_end = listing.nodes.iter().filter_map(|node| classes.function_at_end(node)).collect();
    let mut makers = Makers { listing, classes, at_end, there: vec![false; count], written: vec![false; count] };
    for (id, node) in listing.nodes.iter().enumerate() {
        let [is_there, is_written] = if makers.at_end.contains(&id) { [false; 2] } else { makers.look_at(node) };
        for &output in &node.outputs {
            (makers.there[output], makers.written[output]) = (is_there, is_written);
        }
    }
    makers.written
}

struct Makers<'a> {
    listing: &'a Listing,
    classes: &'a Classes<'a>,
    /// Functions that a layer gives float numbers.
    at_end: NodeSet,
    /// In 8 bits for the ops that compute with it.
    there: Vec<bool>,
    written: Vec<bool>,
}

impl Makers<'_> {
    /// Whether what a node makes is there in 8 bits, and whether it is written so alone.
    fn look_at(&self, node: &Node) -> [bool; 2] {
        let Some(&input) = node.inputs.first() else { return [false; 2] };
        let runs = self.runs_in_8_bits(node);
        match effective_role(self.listing, node) {
            Some(Role::Weighted(row)) => [row.output, row.convolves],
            Some(Role::Product(product)) => {
                [node.inputs.get(product.right).is_some_and(|&right| self.is_constant(right)), false]
            }
            Some(Role::Move(_)) => [self.there[input], self.written[input]],
            Some(Role::Activation) if ops::is_clamp(&node.op) => {
                [self.there[input], self.is_read_once(input) && self.written[input]]
            }
            _ if ops::keeps_quantizer(&node.op) => [self.there[input], false],
            _ => [runs; 2],
        }
    }

    /// Whether an op without weights has a kernel that writes 8 bits, and reads something that is there in 8 bits.
    fn runs_in_8_bits(&self, node: &Node) -> bool {
        let operands = node.inputs.iter().take(ops::operands_in_8_bits(&node.op));
        let operands: Vec<ValueId> = operands.flat_map(|&value| self.classes.elements(value)).collect();
        let is_tensor = |&value: &ValueId| self.listing.values[value].is_tensor && !self.is_constant(value);
        let factor = ops::factor(&node.op).and_then(|slot| node.inputs.get(slot));
        let is_one = |&value: &ValueId| {
            let constant = self.listing.values[value].constant.as_ref();
            constant.and_then(|constant| constant.text.parse().ok()) == Some(1.0)
        };
        factor.is_none_or(is_one) && operands.iter().all(is_tensor) && operands.iter().any(|&value| self.there[value])
    }

    fn is_constant(&self, value: ValueId) -> bool {
        self.listing.values[value].constant.is_some()
    }

    fn is_read_once(&self, value: ValueId) -> bool {
        self.classes.users(value).len() == 1 && !self.classes.is_returned(value)
    }
}
