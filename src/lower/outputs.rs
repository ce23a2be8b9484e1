//! Outputs of a model that compute in float though their sites have a quantizer.

use super::Given;
use super::graph::Graph;
use super::walk::{Eight, Walk};
use crate::jit::{Listing, ValueId};
use crate::sites::ActivationSite;

/// A site whose numbers the model returns and that no kernel makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FloatOutput {
    /// Index of the activation site.
    pub site: usize,
    /// Why no kernel makes it, where the op itself is the reason.
    pub reason: Option<String>,
}

/// All such sites: they need not be rounded where they are returned. Those whose quantizer no kernel takes are simulated as they are asked
/// for, and are none.
#[must_use]
pub fn float_outputs(listing: &Listing, given: &Given<'_>) -> Vec<FloatOutput> {
    let sites = given.sites.activations.iter().zip(given.activations).enumerate();
    let fits = |site: &ActivationSite, params| site.is_returned && Option::and_then(params, Eight::of).is_some();
    let candidates: Vec<_> =
        sites.filter(|&(_, (site, &params))| fits(site, params)).map(|(index, (site, _))| (index, site)).collect();
    if candidates.is_empty() {
        return Vec::new();
    }
    let graph = Graph::new(listing);
    let (is_made, found) = Walk::new(listing, given).made_in_8_bits();
    let outputs = candidates.into_iter().filter_map(|(index, site)| {
        let is_in_float = !site.anchors.iter().any(|anchor| is_made[anchor.value]);
        let can_be = is_in_float && (!site.is_read || is_returned_as_made(&graph, site));
        let reason = found.in_float.iter().find(|left| left.name == site.layer).map(|left| left.reason.clone());
        can_be.then_some(FloatOutput { site: index, reason })
    });
    outputs.collect()
}

/// Whether what is returned of a site is under a second name what its ops make, no view of it.
fn is_returned_as_made(graph: &Graph<'_>, site: &ActivationSite) -> bool {
    let is_anchor = |value: &ValueId| site.anchors.iter().any(|anchor| anchor.value == *value);
    let aliases = graph.listing.aliases();
    let others = site.members.iter().filter(|value| !is_anchor(value));
    let is_name = |value: &ValueId| aliases.get(value).is_some_and(&is_anchor) && graph.only_leaves(*value);
    let mut of_views = others.filter(|value| !is_name(value));
    !of_views.any(|value| graph.is_output(*value))
}
