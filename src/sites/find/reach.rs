//! Which ops compute, and which of them use, make and read each site: what a choice of layers comes down to.

use std::collections::{BTreeMap, BTreeSet};

use super::{Finder, PLUMBING};
use crate::jit::{NodeId, ValueId};
use crate::sites::classes::{effective_role, moves};
use crate::sites::ops::Role;
use crate::sites::{Op, OpId};

/// A node, or `None` for the arguments of the model.
type Origin = Option<NodeId>;

impl Finder<'_> {
    /// Fills `ops`, the users of weights, and the makers and readers of activations.
    pub(super) fn collect_ops(&mut self) {
        let anchors = self.sites.activations.iter().map(|site| &site.anchors);
        let makers: Vec<BTreeSet<Origin>> =
            anchors.map(|anchors| anchors.iter().map(|anchor| self.origin(anchor.value)).collect()).collect();
        let readers = self.readers_of_sites();

        let users = self.weight_users.iter().flatten().map(|&id| Some(id));
        let touching: BTreeSet<Origin> = makers.iter().chain(&readers).flatten().copied().chain(users).collect();
        let others = (0..self.listing.nodes.len()).filter(|&id| self.computes(id) && self.is_float_to_float(id));
        let origins: BTreeSet<Origin> = others.map(|id| Some(self.owner(id))).chain(touching).collect();

        let numbers: BTreeMap<Origin, OpId> = origins.iter().enumerate().map(|(number, &id)| (id, number)).collect();
        let number = |id: &Origin| numbers.get(id).copied();
        for ((site, makers), readers) in self.sites.activations.iter_mut().zip(&makers).zip(&readers) {
            site.makers = makers.iter().filter_map(number).collect();
            site.readers = readers.iter().filter_map(number).collect();
        }
        for (site, users) in self.sites.weights.iter_mut().zip(&self.weight_users) {
            site.users = users.iter().filter_map(|&id| number(&Some(id))).collect();
        }
        self.sites.ops = origins.iter().map(|&id| self.op(id)).collect();
    }

    /// The nodes that compute with each activation site.
    fn readers_of_sites(&self) -> Vec<BTreeSet<Origin>> {
        let mut site_of = BTreeMap::new();
        for (index, site) in self.sites.activations.iter().enumerate() {
            site_of.extend(site.anchors.iter().map(|anchor| (self.classes.of(anchor.value), index)));
        }
        let mut readers = vec![BTreeSet::new(); self.sites.activations.len()];
        for id in (0..self.listing.nodes.len()).filter(|&id| self.computes(id)) {
            let inputs = self.listing.nodes[id].inputs.iter().flat_map(|&value| self.classes.elements(value));
            for &site in inputs.filter_map(|value| site_of.get(&self.classes.of(value))) {
                readers[site].insert(Some(self.owner(id)));
            }
        }
        readers
    }

    fn op(&self, origin: Origin) -> Op {
        let (name, op) = self.layer(origin);
        Op { name, op }
    }

    /// True for nodes that make float numbers, not those that only move them or say where to go on.
    fn computes(&self, id: NodeId) -> bool {
        let node = &self.listing.nodes[id];
        !PLUMBING.contains(&node.op.as_str())
            && !moves(self.listing, node)
            && !matches!(effective_role(self.listing, node), Some(Role::Other))
            && node.outputs.iter().any(|&output| self.classes.may_be_float(output))
    }

    fn is_float_to_float(&self, id: NodeId) -> bool {
        let node = &self.listing.nodes[id];
        let floats = |values: &[ValueId]| {
            let mut elements = values.iter().flat_map(|&value| self.classes.elements(value));
            elements.any(|value| self.classes.may_be_float(value))
        };
        floats(&node.inputs) && floats(&node.outputs)
    }
}
