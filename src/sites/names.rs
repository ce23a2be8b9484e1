//! Names of layers and ops: the same in every run, and the user's own wherever the file still knows them.

use std::collections::BTreeMap;

use crate::jit::{Listing, Node};

use super::ops::{self, Role};

/// One name per node, unique.
///
/// With weights: the module that owns them, by the parameter's name, else the path of calls. Without: path and op. With
/// neither parameter nor path (a file frozen before it was saved): the op with a running number. A name that comes again
/// gets `#2`, `#3`, … in graph order.
pub(super) fn of_nodes(listing: &Listing) -> Vec<String> {
    let mut numbers = BTreeMap::new();
    let mut uses = BTreeMap::<String, usize>::new();
    let mut name = |node: &Node| {
        let base = base_name(listing, node).unwrap_or_else(|| {
            let number = numbers.entry(short(&node.op).to_owned()).or_insert(0usize);
            let name = format!("{}_{number}", short(&node.op));
            *number += 1;
            name
        });
        let count = uses.entry(base.clone()).or_insert(0);
        *count += 1;
        if *count == 1 { base } else { format!("{base}#{count}") }
    };
    listing.nodes.iter().map(&mut name).collect()
}

/// `conv2d` of `aten::conv2d`.
pub(super) fn short(op: &str) -> &str {
    op.rsplit("::").next().unwrap_or(op).trim_end_matches('_')
}

/// The last part of a dotted name.
pub(super) fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn base_name(listing: &Listing, node: &Node) -> Option<String> {
    let has_weights = matches!(ops::role(&node.op), Some(Role::Weighted(_) | Role::Product(_)));
    let parameter = if has_weights { owning_parameter(listing, node) } else { None };
    let owner = parameter.and_then(|name| Some(name.rsplit_once('.')?.0.to_owned()));
    match (has_weights, owner) {
        (true, Some(owner)) => Some(owner),
        (true, None) if !node.path.is_empty() && reads_constant_matrix(listing, node) => Some(node.path.clone()),
        _ if node.path.is_empty() => None,
        _ => Some(format!("{}.{}", node.path, short(&node.op))),
    }
}

/// The parameter that a node reads, directly or in a list of tensors: the one that was attached, else a matrix. Vectors do
/// not tell: equal ones, such as biases of zeros, have become one constant.
fn owning_parameter<'a>(listing: &'a Listing, node: &'a Node) -> Option<&'a str> {
    let own = |node: &'a Node| {
        let constants = node.inputs.iter().filter_map(|&input| listing.values[input].constant.as_ref());
        let mut matrices = constants.filter(|constant| constant.shape.len() >= 2);
        node.parameter.as_deref().or_else(|| matrices.find_map(|constant| constant.parameter.as_deref()))
    };
    own(node).or_else(|| {
        let lists = listing.nodes.iter().filter(|maker| maker.op == "prim::ListConstruct");
        let mut read = lists.filter(|maker| maker.outputs.iter().any(|output| node.inputs.contains(output)));
        read.find_map(own)
    })
}

fn reads_constant_matrix(listing: &Listing, node: &Node) -> bool {
    let constants = node.inputs.iter().filter_map(|&input| listing.values[input].constant.as_ref());
    constants.into_iter().any(|constant| constant.is_tensor() && constant.shape.len() >= 2)
}

/// Names of a recurrent layer's matrices by their position, as PyTorch gives them.
pub(super) fn recurrent_matrix(index: usize, bidirectional: bool) -> String {
    let kind = if index.is_multiple_of(2) { "ih" } else { "hh" };
    let pass = index / 2;
    let (layer, reverse) = if bidirectional { (pass / 2, pass % 2 == 1) } else { (pass, false) };
    format!("weight_{kind}_l{layer}{}", if reverse { "_reverse" } else { "" })
}
