//! Scores and masks on their way into a softmax. Real encoders mask with −3.4e38 there: such values must not reach a
//! quantizer, and the softmax wants the scores as they are.

use super::classes::{Classes, NodeSet, effective_role, moved, moves};
use super::ops::{self, Role};
use crate::jit::{Listing, ValueId};

/// What lies between the last products and the softmaxes of a graph.
#[derive(Debug, Default)]
pub(super) struct Scores {
    /// Arithmetic whose operands and results are no sites.
    pub(super) arithmetic: NodeSet,
    /// Products and layers whose results are scores, not sites of their own accord.
    pub(super) products: NodeSet,
}

/// Walks back from every softmax and from every attention mask.
pub(super) fn find(listing: &Listing, classes: &Classes) -> Scores {
    let mut scores = Scores::default();
    for node in &listing.nodes {
        let start = match effective_role(listing, node) {
            Some(Role::Softmax) => node.inputs.first(),
            Some(Role::Attention) => node.inputs.get(3),
            _ => None,
        };
        if let Some(&value) = start {
            walk_back(listing, classes, value, &mut scores);
        }
    }
    scores
}

fn walk_back(listing: &Listing, classes: &Classes, from: ValueId, scores: &mut Scores) {
    let mut open = vec![from];
    while let Some(value) = open.pop() {
        let Some(id) = classes.maker(value) else { continue };
        let node = &listing.nodes[id];
        if ops::is_mask_arithmetic(&node.op) {
            // The sum of two layers' results is a sum like any other, though a softmax follows.
            let is_sum = matches!(node.op.as_str(), "aten::add" | "aten::add_" | "aten::sub" | "aten::sub_");
            if is_sum && !node.inputs.iter().take(2).any(|&operand| is_mask(listing, classes, operand)) {
                continue;
            }
            if scores.arithmetic.insert(id) {
                open.extend(node.inputs.iter().copied().filter(|&input| classes.may_be_float(input)));
            }
        } else if moves(listing, node) {
            open.extend(moved(listing, id));
        } else if matches!(ops::role(&node.op), Some(Role::Product(_) | Role::Weighted(_))) {
            scores.products.insert(id);
        }
    }
}

/// True for an operand that is made of the model's arguments and of constants alone, as masks and positional biases are.
fn is_mask(listing: &Listing, classes: &Classes, operand: ValueId) -> bool {
    let mut open = vec![operand];
    let mut seen = NodeSet::new();
    while let Some(value) = open.pop() {
        let Some(id) = classes.maker(value).filter(|&id| seen.insert(id)) else { continue };
        let node = &listing.nodes[id];
        match effective_role(listing, node) {
            Some(Role::Weighted(_) | Role::Product(_) | Role::Attention | Role::Softmax | Role::Activation) => {
                return false;
            }
            // Masks take sizes from all over the model; only tensors carry numbers on.
            _ => open.extend(node.inputs.iter().copied().filter(|&input| listing.values[input].is_tensor)),
        }
    }
    true
}
