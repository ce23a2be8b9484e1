//! What a lowering asks of a graph: who reads what, and the constants among arguments. It knows no kernels.

use crate::jit::{Constant, Listing, Node, NodeId, Position, ValueId};
use crate::sites;

/// A graph with the readers of its values.
pub(super) struct Graph<'a> {
    pub(super) listing: &'a Listing,
    readers: Vec<Vec<NodeId>>,
    /// How many blocks return it.
    returns: Vec<usize>,
    positions: Vec<Position>,
    makers: Vec<Option<NodeId>>,
}

impl<'a> Graph<'a> {
    pub(super) fn new(listing: &'a Listing) -> Self {
        let count = listing.values.len();
        let mut graph = Self {
            listing,
            readers: vec![Vec::new(); count],
            returns: vec![0; count],
            positions: vec![Position::Start(0); count],
            makers: vec![None; count],
        };
        for (id, node) in listing.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|&value| graph.readers[value].push(id));
            for &value in &node.outputs {
                graph.positions[value] = Position::After(id);
                graph.makers[value] = Some(id);
            }
        }
        for (id, block) in listing.blocks.iter().enumerate() {
            block.parameters.iter().for_each(|&value| graph.positions[value] = Position::Start(id));
            block.returns.iter().for_each(|&value| graph.returns[value] += 1);
        }
        graph
    }

    pub(super) fn node(&self, id: NodeId) -> &'a Node {
        &self.listing.nodes[id]
    }

    /// Right behind where the value is made.
    pub(super) fn position(&self, value: ValueId) -> Position {
        self.positions[value]
    }

    pub(super) fn maker(&self, value: ValueId) -> Option<NodeId> {
        self.makers[value]
    }

    /// The node that reads the value, if there is no other and no block returns it.
    pub(super) fn only_reader(&self, value: ValueId) -> Option<NodeId> {
        match (self.readers[value].as_slice(), self.returns[value]) {
            (&[reader], 0) => Some(reader),
            _ => None,
        }
    }

    /// What the clamp makes of a value that alone reads it.
    pub(super) fn behind(&self, value: ValueId) -> Option<ValueId> {
        let reader = self.node(self.only_reader(value)?);
        reader.outputs.first().copied().filter(|_| sites::is_clamp(&reader.op))
    }

    /// Whether the model returns the value, by itself or in a tuple, list or dict.
    pub(super) fn is_output(&self, value: ValueId) -> bool {
        let forward = &self.listing.blocks[0];
        forward.returns.contains(&value)
            || self.readers[value].iter().any(|&id| {
                let node = self.node(id);
                is_container(node) && node.outputs.iter().any(|&output| self.is_output(output))
            })
    }

    /// Whether a node does nothing but put outputs of the model together.
    pub(super) fn only_returns(&self, id: NodeId) -> bool {
        let node = self.node(id);
        is_container(node)
            && node.outputs.iter().all(|&output| {
                let is_returned = self.listing.blocks[0].returns.contains(&output);
                self.readers[output].iter().all(|&reader| self.only_returns(reader))
                    && (is_returned || !self.readers[output].is_empty())
            })
    }

    /// Whether the model does nothing with a value but return it.
    pub(super) fn only_leaves(&self, value: ValueId) -> bool {
        self.readers[value].iter().all(|&reader| self.only_returns(reader))
    }

    /// Axes of a tensor as it was seen.
    pub(super) fn rank(&self, value: ValueId) -> Option<usize> {
        self.listing.values[value].seen.as_ref().map(|seen| seen.shape.len())
    }

    /// True unless the value is known to hold other things than float numbers.
    pub(super) fn may_be_float(&self, value: ValueId) -> bool {
        let known = &self.listing.values[value];
        match &known.constant {
            Some(constant) => constant.dtype == "Float",
            None => known.is_tensor && known.seen.as_ref().is_none_or(|seen| seen.dtype == "Float"),
        }
    }

    pub(super) fn constant(&self, node: &Node, slot: usize) -> Option<&'a Constant> {
        self.listing.values[*node.inputs.get(slot)?].constant.as_ref()
    }

    /// The tensors of a list that is put together in the graph.
    pub(super) fn elements(&self, list: ValueId) -> Option<&'a [ValueId]> {
        let maker = self.node(self.maker(list)?);
        (maker.op == "prim::ListConstruct").then_some(maker.inputs.as_slice())
    }

    /// A constant number.
    pub(super) fn number(&self, node: &Node, slot: usize) -> Option<f64> {
        self.constant(node, slot)?.text.parse().ok()
    }

    /// So many whole numbers: of a constant list, of one that is put together of constants, or one for all.
    pub(super) fn numbers(&self, node: &Node, slot: usize, count: usize) -> Option<Vec<i64>> {
        let texts: Vec<&str> = match self.constant(node, slot) {
            Some(constant) => constant.text.trim_matches(['[', ']']).split(',').map(str::trim).collect(),
            None => {
                let elements = self.elements(*node.inputs.get(slot)?)?.iter();
                let constant = |&value: &ValueId| self.listing.values[value].constant.as_ref();
                elements.map(|value| constant(value).map(|c| c.text.as_str())).collect::<Option<_>>()?
            }
        };
        let numbers: Vec<i64> = texts.into_iter().map(|text| text.parse().ok()).collect::<Option<_>>()?;
        match *numbers.as_slice() {
            [one] => Some(vec![one; count]),
            _ => (numbers.len() == count).then_some(numbers),
        }
    }
}

fn is_container(node: &Node) -> bool {
    matches!(node.op.as_str(), "prim::ListConstruct" | "prim::TupleConstruct" | "prim::DictConstruct")
}
