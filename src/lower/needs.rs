//! What the kernels of an engine need of weights for it to compute them right. It knows the graph and what a trial showed, and
//! nothing of thresholds.

use std::collections::BTreeSet;

use super::engine::{Task, Trial};
use super::graph::Graph;
use super::kernels::{self, Kernel};
use crate::jit::{Listing, Node, ValueId};
use crate::settings::{KernelNeeds, WeightNeeds};
use crate::sites::{ActivationSite, Sites, WeightSite};

/// What this engine needs of the sites of a graph, whose activations have 7 bits or else 8. `left` are the activation sites that stay
/// sites: a convolution that makes none of them computes in float.
#[must_use]
pub fn needs(
    listing: &Listing,
    sites: &Sites,
    left: &[ActivationSite],
    (trial, has_7_bits): (&Trial, bool),
) -> KernelNeeds {
    let graph = Graph::new(listing);
    let of_sites: BTreeSet<ValueId> = left.iter().flat_map(|site| site.members.iter().copied()).collect();
    let weight = |site: &WeightSite| {
        let is_site = |value: ValueId| of_sites.contains(&value) && !graph.is_output(value);
        let makes_site = |&value: &ValueId| is_site(value) || graph.behind(value).is_some_and(is_site);
        let is_own = |node: &&Node| {
            node.inputs.get(1).is_some_and(|value| site.values.contains(value)) && node.outputs.iter().any(makes_site)
        };
        let nodes = || listing.nodes.iter().filter(is_own);
        let is_depthwise = nodes().any(|node| is_depthwise(&graph, node, site));
        let taps = (is_depthwise && trial.bounds_depthwise(has_7_bits)).then(|| taps(site));
        let is_transposed = nodes().any(|node| kernels::of(&node.op) == Some(Kernel::Transposed));
        let task = Task::of_transposed(site.shape.len().saturating_sub(2));
        let per_tensor = is_transposed && trial.computes(task, has_7_bits);
        WeightNeeds { taps, per_tensor }
    };
    KernelNeeds { weights: sites.weights.iter().map(weight).collect(), has_7_bits }
}

/// Whether it convolves each channel by itself.
fn is_depthwise(graph: &Graph<'_>, node: &Node, site: &WeightSite) -> bool {
    let Some(Kernel::Convolution(slots)) = kernels::of(&node.op) else { return false };
    let is_grouped = graph.numbers(node, slots.groups, 1).is_some_and(|groups| groups != [1]);
    is_grouped && site.shape.get(1) == Some(&1)
}

fn taps(site: &WeightSite) -> usize {
    site.shape.iter().skip(2).map(|&size| usize::try_from(size).unwrap_or(1)).product()
}
