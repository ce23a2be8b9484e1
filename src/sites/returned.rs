//! Which outputs of a model 8-bit kernels make that write no float numbers. It knows neither engine nor quantizers, for which an op may
//! compute in float all the same.

use super::Kernels;
use super::classes::{Classes, effective_role, is_container};
use super::ops::{self, Role};
use crate::jit::{Listing, Node, ValueId};

/// Such values of a graph, as their ops make them; the model returns them by themselves or in a tuple, list or dict.
pub(super) fn find(listing: &Listing) -> Vec<ValueId> {
    let classes = Classes::new(listing, Kernels::Int8);
    let makers = Makers { listing, classes: &classes };
    let mut open: Vec<ValueId> = listing.blocks.first().map(|forward| forward.returns.clone()).unwrap_or_default();
    let mut found = Vec::new();
    while let Some(value) = open.pop() {
        let Some(node) = makers.of(value) else { continue };
        if is_container(node) {
            open.extend(&node.inputs);
        } else if !matches!(effective_role(listing, node), Some(Role::Move(_))) && makers.write_8_bits(value) {
            found.push(value);
        }
    }
    found
}

/// Who makes the values of a graph.
pub(super) struct Makers<'a> {
    pub(super) listing: &'a Listing,
    pub(super) classes: &'a Classes<'a>,
}

impl<'a> Makers<'a> {
    /// Whether the last op that computes a value does so by a kernel that writes no float numbers. libtorch's own ops, such as pooling, write
    /// what they read.
    pub(super) fn write_8_bits(&self, value: ValueId) -> bool {
        let Some(node) = self.of(value) else { return false };
        match effective_role(self.listing, node) {
            Some(Role::Weighted(row)) => row.convolves,
            Some(Role::Move(_)) => self.first(node).is_some_and(|input| self.write_8_bits(input)),
            Some(Role::Activation) if ops::is_clamp(&node.op) => {
                self.first(node).is_some_and(|input| self.is_read_once(input) && self.write_8_bits(input))
            }
            // A layer gives float numbers to the function behind it with which nothing computes.
            Some(Role::Activation) if self.first(node).is_some_and(|input| self.is_of_linear(input)) => false,
            _ => self.runs_in_8_bits(node),
        }
    }

    /// Whether a value is there in 8 bits for the ops that compute with it.
    fn is_in_8_bits(&self, value: ValueId) -> bool {
        let Some(node) = self.of(value) else { return false };
        let of_first = || self.first(node).is_some_and(|input| self.is_in_8_bits(input));
        match effective_role(self.listing, node) {
            Some(Role::Weighted(row)) => row.output,
            Some(Role::Product(product)) => {
                node.inputs.get(product.right).is_some_and(|&right| self.is_constant(right))
            }
            Some(Role::Move(_)) => of_first(),
            Some(Role::Activation) if ops::is_clamp(&node.op) => of_first(),
            _ if ops::keeps_quantizer(&node.op) => of_first(),
            _ => self.runs_in_8_bits(node),
        }
    }

    /// Whether an op without weights has a kernel that writes 8 bits and reads something that is there in 8 bits.
    fn runs_in_8_bits(&self, node: &Node) -> bool {
        let operands = match ops::operands_in_8_bits(&node.op) {
            0 => return false,
            count => node.inputs.iter().take(count).flat_map(|&value| self.classes.elements(value)),
        };
        let operands: Vec<ValueId> = operands.collect();
        let takes_factor = ops::factor(&node.op).and_then(|slot| node.inputs.get(slot));
        let has_factor = takes_factor
            .is_some_and(|&value| self.listing.values[value].constant.as_ref().is_none_or(|factor| factor.text != "1"));
        let is_tensor = |&value: &ValueId| self.listing.values[value].is_tensor && !self.is_constant(value);
        !has_factor && operands.iter().all(is_tensor) && operands.iter().any(|&value| self.is_in_8_bits(value))
    }

    fn of(&self, value: ValueId) -> Option<&'a Node> {
        self.classes.maker(value).map(|id| &self.listing.nodes[id])
    }

    fn first(&self, node: &Node) -> Option<ValueId> {
        node.inputs.first().copied()
    }

    fn is_constant(&self, value: ValueId) -> bool {
        self.listing.values[value].constant.is_some()
    }

    fn is_read_once(&self, value: ValueId) -> bool {
        self.classes.users(value).len() == 1 && !self.classes.is_returned(value)
    }

    fn is_of_linear(&self, value: ValueId) -> bool {
        let role = self.of(value).and_then(|node| effective_role(self.listing, node));
        match role {
            Some(Role::Weighted(row)) => !row.convolves,
            role => matches!(role, Some(Role::Product(_))),
        }
    }
}
