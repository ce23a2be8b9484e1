//! A cleaned graph as plain data: what [`sites`](crate::sites) reads. It knows no pointer and no libtorch type.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ffi::bridge;

/// Number of a value in its [`Listing`].
pub type ValueId = usize;
/// Number of a node in its [`Listing`].
pub type NodeId = usize;
/// Number of a block in its [`Listing`]; 0 is the body of `forward`.
pub type BlockId = usize;

/// All values, blocks and nodes of one graph, in graph order.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// Everything that a node or block defines.
    pub values: Vec<Value>,
    /// The body of `forward` and those of its `prim::If` and `prim::Loop` nodes.
    pub blocks: Vec<Block>,
    /// The operations, constants left out.
    pub nodes: Vec<Node>,
}

/// A value of the graph.
#[derive(Debug, Clone, Default)]
pub struct Value {
    /// Its name in the graph's text.
    pub name: String,
    /// TorchScript type, `Tensor` or `int[]` for instance.
    pub type_name: String,
    /// True for a tensor (not for lists of them).
    pub is_tensor: bool,
    /// Something writes to it, or to what it shares memory with.
    pub has_writers: bool,
    /// Set for constants.
    pub constant: Option<Constant>,
    /// Set for tensors that were seen while the model ran: dtype and shape.
    pub seen: Option<Seen>,
}

/// What a run showed of a value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// In libtorch's name: `Float`, `Long`.
    pub dtype: String,
    /// Of the last time it was seen.
    pub shape: Vec<i64>,
}

/// A constant of the graph.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Constant {
    /// Text of a constant that is no tensor.
    pub text: String,
    /// libtorch's name of a tensor's dtype, empty for other constants.
    pub dtype: String,
    /// Shape of a tensor.
    pub shape: Vec<i64>,
    /// Steps between the elements of a tensor along its axes.
    pub strides: Vec<i64>,
    /// Equal for tensors that begin at the same memory, 0 where there is none.
    pub storage: usize,
    /// Bytes of a tensor.
    pub bytes: u64,
    /// Dotted name of the parameter or buffer that this tensor is, if it still is one after folding.
    pub parameter: Option<String>,
}

impl Constant {
    /// Equal for tensors that are the same numbers in the same memory, read in the same order.
    #[must_use]
    pub fn identity(&self) -> (usize, &[i64], &[i64]) {
        (self.storage, &self.shape, &self.strides)
    }

    /// True for a tensor.
    #[must_use]
    pub fn is_tensor(&self) -> bool {
        !self.dtype.is_empty()
    }
}

/// A list of nodes with parameters and returned values.
#[derive(Debug, Clone, Default)]
pub struct Block {
    /// The `prim::If` or `prim::Loop` that it belongs to; `None` for `forward`.
    pub owner: Option<NodeId>,
    /// For `forward`: the module itself, then the arguments.
    pub parameters: Vec<ValueId>,
    /// What it returns.
    pub returns: Vec<ValueId>,
}

/// An operation.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// Qualified name without overload: `aten::conv2d`.
    pub op: String,
    /// The block that it stands in.
    pub block: BlockId,
    /// Its own blocks.
    pub blocks: Vec<BlockId>,
    /// Dotted path of the modules that were called to reach it; may be empty or lack parts.
    pub path: String,
    /// Dotted name of the parameter that it read before folding, if any.
    pub parameter: Option<String>,
    /// Values read.
    pub inputs: Vec<ValueId>,
    /// Values defined.
    pub outputs: Vec<ValueId>,
}

/// Ops whose results depend on how their tensors lie in memory.
const ASKING_FOR_STRIDES: &[&str] = &[
    "aten::_reshape_alias",
    "aten::as_strided",
    "aten::as_strided_",
    "aten::as_strided_copy",
    "aten::as_strided_scatter",
    "aten::is_contiguous",
    "aten::resize",
    "aten::resize_",
    "aten::resize_as_",
    "aten::set_",
    "aten::storage_offset",
    "aten::stride",
];

/// Ops that draw random numbers.
const DRAWING: &[&str] = &[
    "alpha_dropout",
    "bernoulli",
    "binomial",
    "cauchy",
    "dropout",
    "exponential",
    "feature_alpha_dropout",
    "feature_dropout",
    "geometric",
    "log_normal",
    "multinomial",
    "native_dropout",
    "normal",
    "poisson",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "random",
    "randperm",
    "rrelu",
    "uniform",
];

impl Listing {
    pub(super) fn from_rows(rows: bridge::ListingRows) -> Self {
        Self {
            values: rows.values.into_iter().map(value).collect(),
            blocks: rows.blocks.into_iter().map(block).collect(),
            nodes: rows.nodes.into_iter().map(node).collect(),
        }
    }

    /// Call stacks leave out containers such as ModuleList; where exactly one module fits a path that is none, take it.
    pub(super) fn complete_paths(&mut self, modules: &[String]) {
        for node in self.nodes.iter_mut().filter(|node| !node.path.is_empty()) {
            if modules.contains(&node.path) {
                continue;
            }
            let fitting = modules.iter().filter(|module| leaves_out(&node.path, module));
            let shortest = fitting.clone().map(|module| module.matches('.').count()).min();
            let mut fitting = fitting.filter(|module| Some(module.matches('.').count()) == shortest);
            if let (Some(module), None) = (fitting.next(), fitting.next()) {
                node.path.clone_from(module);
            }
        }
    }

    /// The arguments of `forward`, without the module itself.
    #[must_use]
    pub fn arguments(&self) -> &[ValueId] {
        self.blocks.first().and_then(|block| block.parameters.get(1..)).unwrap_or_default()
    }

    /// Whether the model draws random numbers.
    #[must_use]
    pub fn draws(&self) -> bool {
        let name = |node: &Node| node.op.strip_prefix("aten::").map(|name| name.trim_end_matches(['_']).to_owned());
        self.nodes.iter().filter_map(name).any(|name| DRAWING.contains(&name.as_str()))
    }

    /// Values that are another one under a second name, each with that one; in graph order.
    #[must_use]
    pub fn aliases(&self) -> BTreeMap<ValueId, ValueId> {
        let aliases = self.nodes.iter().filter(|node| node.op == "aten::alias");
        aliases.filter_map(|node| Some((*node.outputs.first()?, *node.inputs.first()?))).collect()
    }

    /// Whether the model has convolutions of images, does not ask how its tensors lie in memory, and takes no views of images as
    /// they were seen, so that images with their channels last give the same.
    #[must_use]
    pub fn takes_channels_last(&self) -> bool {
        let has = |ops: &[&str]| self.nodes.iter().any(|node| ops.contains(&node.op.as_str()));
        // Random numbers are drawn in the order of memory.
        has(&["aten::conv2d", "aten::conv_transpose2d"])
            && !has(ASKING_FOR_STRIDES)
            && !self.draws()
            && !self.nodes.iter().any(|node| self.views_an_image(node))
    }

    /// Whether it views what has several channels and several places, which lie in memory channel by channel or place by place.
    fn views_an_image(&self, node: &Node) -> bool {
        let is_view = ["aten::view", "aten::_unsafe_view", "aten::view_as"].contains(&node.op.as_str());
        let seen = node.inputs.first().and_then(|&value| self.values.get(value)?.seen.as_ref());
        let is_image = seen.is_some_and(|seen| match seen.shape.as_slice() {
            &[_, channels, height, width] => channels > 1 && height * width > 1,
            _ => false,
        });
        is_view && is_image
    }

    /// What a node clamps each number to, if that is all that it does and the bounds are constants.
    #[must_use]
    pub fn clamp(&self, node: &Node) -> Option<[f64; 2]> {
        let bound = |slot: usize, absent: f64| {
            let value = self.values.get(*node.inputs.get(slot)?)?;
            match value.constant.as_ref()?.text.as_str() {
                "None" => Some(absent),
                text => text.parse().ok(),
            }
        };
        let (none, endless) = (f64::NEG_INFINITY, f64::INFINITY);
        match node.op.as_str() {
            "aten::relu" => Some([0.0, endless]),
            "aten::relu6" => Some([0.0, 6.0]),
            "aten::hardtanh" | "aten::clamp" => Some([bound(1, none)?, bound(2, endless)?]),
            "aten::clamp_min" => Some([bound(1, none)?, endless]),
            "aten::clamp_max" => Some([none, bound(1, endless)?]),
            _ => None,
        }
    }
}

/// True if `path` is `module` with some parts before the last left out.
fn leaves_out(path: &str, module: &str) -> bool {
    let (mut wanted, parts) = (path.rsplit('.').peekable(), module.rsplit('.'));
    if module.rsplit('.').next() != wanted.peek().copied() {
        return false;
    }
    for part in parts {
        if wanted.peek() == Some(&part) {
            wanted.next();
        }
    }
    wanted.next().is_none()
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn value(row: bridge::ValueRow) -> Value {
    let constant = row.is_constant.then(|| Constant {
        text: row.text,
        dtype: row.dtype,
        shape: row.shape,
        strides: row.strides,
        storage: row.pointer,
        bytes: row.storage_bytes,
        parameter: some(row.parameter),
    });
    Value {
        name: row.name,
        type_name: row.type_name,
        is_tensor: row.is_tensor,
        has_writers: row.has_writers,
        constant,
        seen: None,
    }
}

fn block(row: bridge::BlockRow) -> Block {
    Block { owner: usize::try_from(row.owner).ok(), parameters: row.parameters, returns: row.returns }
}

fn node(row: bridge::NodeRow) -> Node {
    Node {
        op: row.op,
        block: row.block,
        blocks: row.blocks,
        path: row.path,
        parameter: some(row.layer),
        inputs: row.inputs,
        outputs: row.outputs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(path: &str, modules: &[&str]) -> String {
        let node = Node { path: path.to_owned(), ..Node::default() };
        let mut listing = Listing { nodes: vec![node], ..Listing::default() };
        listing.complete_paths(&modules.iter().map(|&module| module.to_owned()).collect::<Vec<_>>());
        listing.nodes[0].path.clone()
    }

    #[test]
    fn containers_come_back_where_one_module_fits() {
        let modules = ["bert.encoder.layer.0", "bert.encoder.layer.0.output", "bert.encoder.layer.1", "bert"];
        assert_eq!(completed("bert.encoder.0.output", &modules), "bert.encoder.layer.0.output");
        assert_eq!(completed("bert.encoder.0", &modules), "bert.encoder.layer.0");
        assert_eq!(completed("bert", &modules), "bert");
        assert_eq!(completed("other.0", &modules), "other.0");
    }

    #[test]
    fn a_path_that_fits_two_modules_stays() {
        assert_eq!(completed("0", &["left.0", "right.0"]), "0");
    }

    #[test]
    fn channels_may_lie_last() {
        let takes = |ops: &[&str]| {
            let node = |op: &&str| Node { op: (*op).to_owned(), ..Node::default() };
            Listing { nodes: ops.iter().map(node).collect(), ..Listing::default() }.takes_channels_last()
        };
        assert!(takes(&["aten::conv2d", "aten::relu"]) && takes(&["aten::conv_transpose2d"]));
        assert!(!takes(&["aten::linear"]));
        assert!(!takes(&["aten::conv2d", "aten::stride"]) && !takes(&["aten::as_strided", "aten::conv2d"]));
        assert!(!takes(&["aten::conv2d", "aten::rand_like"]));
        let viewing = |shape: &[i64]| {
            let seen = Some(Seen { dtype: "Float".to_owned(), shape: shape.to_vec() });
            let convolution = Node { op: "aten::conv2d".to_owned(), ..Node::default() };
            let view = Node { op: "aten::view".to_owned(), inputs: vec![0], ..Node::default() };
            let values = vec![Value { seen, ..Value::default() }];
            Listing { values, nodes: vec![convolution, view], ..Listing::default() }.takes_channels_last()
        };
        assert!(viewing(&[2, 8, 1, 1]) && viewing(&[2, 1, 5, 5]) && viewing(&[2, 40]));
        assert!(!viewing(&[2, 8, 1, 3]));
    }
}
