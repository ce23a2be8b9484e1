//! Sites of small graphs that are put together by hand.

use super::{ChannelAxis, Sites, find};
use crate::jit::{Block, Constant, Listing, Node, NodeId, Seen, Value, ValueId};

/// A listing in the making. Values are float tensors unless something else is said.
struct Graph {
    listing: Listing,
    /// Blocks that new nodes go into, innermost last.
    open: Vec<usize>,
}

impl Graph {
    fn new() -> Self {
        let mut graph = Self { listing: Listing::default(), open: vec![0] };
        let module = graph.value("self", "Module");
        graph.listing.blocks.push(Block { owner: None, parameters: vec![module], returns: Vec::new() });
        graph
    }

    fn value(&mut self, name: &str, type_name: &str) -> ValueId {
        let is_tensor = type_name == "Tensor";
        let (name, type_name) = (name.to_owned(), type_name.to_owned());
        self.listing.values.push(Value { name, type_name, is_tensor, ..Value::default() });
        self.listing.values.len() - 1
    }

    fn argument(&mut self, name: &str) -> ValueId {
        let value = self.value(name, "Tensor");
        self.listing.blocks[0].parameters.push(value);
        value
    }

    /// A constant that is no tensor, by its text: `None`, `0.`, `[2, 2]`.
    fn plain(&mut self, text: &str) -> ValueId {
        let value = self.value("constant", "other");
        self.listing.values[value].constant = Some(Constant { text: text.to_owned(), ..Constant::default() });
        value
    }

    /// A float32 tensor constant with the name of its parameter, or none.
    fn tensor(&mut self, parameter: &str, shape: &[i64]) -> ValueId {
        let value = self.value("constant", "Tensor");
        self.listing.values[value].constant = Some(Constant {
            dtype: "Float".to_owned(),
            shape: shape.to_vec(),
            storage: 1000 + value,
            parameter: (!parameter.is_empty()).then(|| parameter.to_owned()),
            ..Constant::default()
        });
        value
    }

    /// A node with results of these types.
    fn node(&mut self, op: &str, inputs: &[ValueId], types: &[&str]) -> NodeId {
        let outputs = types.iter().map(|type_name| self.value("value", type_name)).collect();
        let block = *self.open.last().expect("the outermost block stays open");
        self.listing.nodes.push(Node { op: op.to_owned(), block, inputs: inputs.to_vec(), outputs, ..Node::default() });
        self.listing.nodes.len() - 1
    }

    /// A node with one tensor as its result.
    fn op(&mut self, op: &str, inputs: &[ValueId]) -> ValueId {
        let node = self.node(op, inputs, &["Tensor"]);
        self.listing.nodes[node].outputs[0]
    }

    /// A convolution that the module `name` owns.
    fn conv(&mut self, name: &str, input: ValueId) -> ValueId {
        let weight = self.tensor(&format!("{name}.weight"), &[8, 8, 3, 3]);
        let bias = self.tensor(&format!("{name}.bias"), &[8]);
        self.op("aten::conv2d", &[input, weight, bias])
    }

    /// A block of `owner`; nodes go into it until [`Graph::close`].
    fn block(&mut self, owner: NodeId, parameters: &[ValueId]) {
        let block = self.listing.blocks.len();
        self.listing.blocks.push(Block { owner: Some(owner), parameters: parameters.to_vec(), returns: Vec::new() });
        self.listing.nodes[owner].blocks.push(block);
        self.open.push(block);
    }

    fn close(&mut self, returns: &[ValueId]) {
        let block = self.open.pop().expect("an open block");
        self.listing.blocks[block].returns = returns.to_vec();
    }

    fn see(&mut self, value: ValueId, dtype: &str) {
        self.listing.values[value].seen = Some(Seen { dtype: dtype.to_owned(), shape: vec![1] });
    }

    /// Ends the graph.
    fn returning(mut self, outputs: &[ValueId]) -> Sites {
        self.listing.blocks[0].returns = outputs.to_vec();
        find(&self.listing)
    }
}

fn names(sites: &Sites) -> Vec<&str> {
    sites.activations.iter().map(|site| site.name.as_str()).collect()
}

fn weights(sites: &Sites) -> Vec<&str> {
    sites.weights.iter().map(|site| site.name.as_str()).collect()
}

/// Where the quantizers of a site go.
#[track_caller]
fn anchors(sites: &Sites, name: &str) -> Vec<ValueId> {
    let site = sites.activations.iter().find(|site| site.name == name);
    site.unwrap_or_else(|| panic!("no site `{name}` among {:?}", names(sites)))
        .anchors
        .iter()
        .map(|anchor| anchor.value)
        .collect()
}

/// Why something is not quantized.
#[track_caller]
fn reason<'a>(sites: &'a Sites, name: &str) -> &'a str {
    let left = sites.left_float.iter().find(|left| left.name == name);
    &left.unwrap_or_else(|| panic!("no `{name}` among {:?}", sites.left_float)).reason
}

#[test]
fn a_convolution_and_its_relu_have_one_site_behind_the_relu() {
    let mut graph = Graph::new();
    let x = graph.argument("x.1");
    let conv = graph.conv("stem", x);
    let relu = graph.op("aten::relu", &[conv]);
    let head = graph.conv("head", relu);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "stem.output"]);
    assert_eq!(anchors(&sites, "stem.output"), [relu]);
    assert_eq!(weights(&sites), ["stem.weight", "head.weight"]);
    assert_eq!(sites.activations[1].op, "aten::conv2d");
    assert_eq!(sites.layers.iter().map(|layer| layer.constants.clone()).next(), Some(vec![vec![8, 8, 3, 3], vec![8]]));
}

/// A linear layer reads the pooled image flattened; it is made with its channels second all the same.
#[test]
fn channels_are_second_in_images_and_last_between_linear_layers() {
    let mut graph = Graph::new();
    let x = graph.argument("x.1");
    let conv = graph.conv("stem", x);
    let relu = graph.op("aten::relu", &[conv]);
    let pooled = graph.op("aten::adaptive_avg_pool2d", &[relu]);
    let flat = graph.op("aten::flatten", &[pooled]);
    let weights = ["fc1.weight", "fc2.weight"].map(|name| graph.tensor(name, &[8, 8]));
    let hidden = graph.op("aten::linear", &[flat, weights[0]]);
    let output = graph.op("aten::linear", &[hidden, weights[1]]);
    let sites = graph.returning(&[output]);
    let axes: Vec<ChannelAxis> = sites.activations.iter().map(|site| site.channel_axis).collect();
    assert_eq!(names(&sites).len(), 4, "{:?}", names(&sites));
    assert_eq!(axes, [ChannelAxis::Second, ChannelAxis::Second, ChannelAxis::Second, ChannelAxis::Last]);
}

#[test]
fn a_convolution_with_two_readers_keeps_its_own_site() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let conv = graph.conv("stem", x);
    let relu = graph.op("aten::relu", &[conv]);
    let left = graph.conv("left", relu);
    let right = graph.conv("right", conv);
    let sites = graph.returning(&[left, right]);
    assert_eq!(names(&sites), ["input.x", "stem.output", "relu_0.output"]);
    assert_eq!((anchors(&sites, "stem.output"), anchors(&sites, "relu_0.output")), (vec![conv], vec![relu]));
    assert!(reason(&sites, "relu_0").contains("no layer that it could join"));
}

#[test]
fn a_convolution_that_is_an_output_too_keeps_its_own_site() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let conv = graph.conv("stem", x);
    let relu = graph.op("aten::relu", &[conv]);
    let head = graph.conv("head", relu);
    let sites = graph.returning(&[conv, head]);
    assert_eq!((anchors(&sites, "stem.output"), anchors(&sites, "relu_0.output")), (vec![conv], vec![relu]));
}

#[test]
fn additions_join_clamps_and_nothing_else() {
    let build = |function: &str| {
        let mut graph = Graph::new();
        let (x, y) = (graph.argument("x"), graph.argument("y"));
        let sum = graph.op("aten::add", &[x, y]);
        let activated = graph.op(function, &[sum]);
        let head = graph.conv("head", activated);
        (graph.returning(&[head]), sum, activated)
    };
    for clamp in ["aten::relu", "aten::relu_", "aten::relu6", "aten::hardtanh", "aten::clamp"] {
        let (sites, _, activated) = build(clamp);
        assert_eq!(names(&sites), ["input.x", "input.y", "add_0.output"], "{clamp}");
        assert_eq!(anchors(&sites, "add_0.output"), [activated], "{clamp}");
    }
    let (sites, sum, activated) = build("aten::gelu");
    assert_eq!(names(&sites), ["input.x", "input.y", "add_0.output", "gelu_0.output"]);
    assert_eq!((anchors(&sites, "add_0.output"), anchors(&sites, "gelu_0.output")), (vec![sum], vec![activated]));
}

#[test]
fn values_that_only_leave_the_model_are_no_sites() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let conv = graph.conv("fc", x);
    let shape = graph.node("aten::size", &[conv], &["int[]"]);
    let class = graph.op("aten::argmax", &[conv]);
    graph.see(class, "Long");
    assert_eq!(shape, 1);
    let flat = graph.op("aten::flatten", &[conv]);
    let sites = graph.returning(&[flat, class]);
    assert_eq!(names(&sites), ["input.x"]);
    assert_eq!(reason(&sites, "fc.output"), "an output of the model");
}

#[test]
fn what_only_moves_numbers_shares_their_site() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let conv = graph.conv("stem", x);
    let pooled = graph.op("aten::max_pool2d", &[conv]);
    let viewed = graph.op("aten::view", &[pooled]);
    let head = graph.conv("head", viewed);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "stem.output"]);
    assert_eq!(anchors(&sites, "stem.output"), [conv]);
}

#[test]
fn parts_of_a_chunk_share_the_site_of_the_whole() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let conv = graph.conv("stem", x);
    let chunk = graph.node("aten::chunk", &[conv], &["Tensor[]"]);
    let list = graph.listing.nodes[chunk].outputs[0];
    let unpack = graph.node("prim::ListUnpack", &[list], &["Tensor", "Tensor"]);
    let parts = graph.listing.nodes[unpack].outputs.clone();
    let product = graph.op("aten::mul", &parts);
    let head = graph.conv("head", product);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "stem.output", "mul_0.output"]);
    assert_eq!(anchors(&sites, "stem.output"), [conv]);
}

#[test]
fn all_tensors_of_a_concatenated_list_are_sites() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let (left, right) = (graph.conv("left", x), graph.conv("right", x));
    let list = graph.node("prim::ListConstruct", &[left, right], &["Tensor[]"]);
    let list = graph.listing.nodes[list].outputs[0];
    let axis = graph.plain("1");
    let cat = graph.op("aten::cat", &[list, axis]);
    let head = graph.conv("head", cat);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "left.output", "right.output", "cat_0.output"]);
    assert_eq!(anchors(&sites, "cat_0.output"), [cat]);
    assert!(sites.left_float.iter().all(|left| left.name != "cat_0"), "{:?}", sites.left_float);
}

#[test]
fn scores_and_masks_before_a_softmax_are_no_sites() {
    let mut graph = Graph::new();
    let (query, key, value) = (graph.argument("query"), graph.argument("key"), graph.argument("value"));
    let mask = graph.argument("mask");
    let lowest = graph.plain("-3.4028234663852886e+38");
    let scores = graph.op("aten::matmul", &[query, key]);
    let additive = graph.op("aten::mul", &[mask, lowest]);
    let masked = graph.op("aten::add", &[scores, additive]);
    let softmax = graph.op("aten::softmax", &[masked]);
    let context = graph.op("aten::matmul", &[softmax, value]);
    let head = graph.conv("head", context);
    let sites = graph.returning(&[head]);
    let expected = ["input.query", "input.key", "input.value", "softmax_0.output", "matmul_1.output"];
    assert_eq!(names(&sites), expected);
    assert_eq!(reason(&sites, "matmul_0.output"), "goes into a softmax, which wants it in float");
    assert_eq!(reason(&sites, "add_0"), "arithmetic of scores and masks before a softmax");
    assert_eq!(reason(&sites, "mul_0"), "arithmetic of scores and masks before a softmax");
    assert!(reason(&sites, "softmax_0").starts_with("computed in float"));
}

#[test]
fn a_mask_of_a_layers_size_is_still_a_mask() {
    let mut graph = Graph::new();
    let (x, value) = (graph.argument("x"), graph.argument("value"));
    let query = graph.conv("query", x);
    let size = graph.node("aten::size", &[query], &["int"]);
    let size = graph.listing.nodes[size].outputs[0];
    let scores = graph.op("aten::matmul", &[query, query]);
    let mask = graph.op("aten::full", &[size]);
    let masked = graph.op("aten::add", &[scores, mask]);
    let softmax = graph.op("aten::softmax", &[masked]);
    let context = graph.op("aten::matmul", &[softmax, value]);
    let head = graph.conv("head", context);
    let sites = graph.returning(&[head]);
    assert!(!names(&sites).contains(&"add_0.output"), "{:?}", names(&sites));
    assert_eq!(reason(&sites, "add_0"), "arithmetic of scores and masks before a softmax");
}

#[test]
fn a_residual_sum_before_a_softmax_is_a_sum_like_any_other() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let (left, right) = (graph.conv("left", x), graph.conv("right", x));
    let sum = graph.op("aten::add", &[left, right]);
    let softmax = graph.op("aten::softmax", &[sum]);
    let sites = graph.returning(&[softmax]);
    assert_eq!(names(&sites), ["input.x", "left.output", "right.output", "add_0.output"]);
}

#[test]
fn an_attention_has_sites_at_query_key_and_value_but_not_at_its_mask() {
    let mut graph = Graph::new();
    let (query, key, value) = (graph.argument("query"), graph.argument("key"), graph.argument("value"));
    let (mask, bias) = (graph.argument("mask"), graph.argument("bias"));
    let sum = graph.op("aten::add", &[mask, bias]);
    let attention = graph.op("aten::scaled_dot_product_attention", &[query, key, value, sum]);
    let head = graph.conv("head", attention);
    let sites = graph.returning(&[head]);
    let expected = ["input.query", "input.key", "input.value", "scaled_dot_product_attention_0.output"];
    assert_eq!(names(&sites), expected);
    assert!(reason(&sites, "scaled_dot_product_attention_0").contains("computed in float"));
}

#[test]
fn a_mask_that_goes_straight_into_an_attention_is_no_site() {
    let mut graph = Graph::new();
    let (x, mask) = (graph.argument("x"), graph.argument("mask"));
    let viewed = graph.op("aten::unsqueeze", &[mask]);
    let attention = graph.op("aten::scaled_dot_product_attention", &[x, x, x, viewed]);
    let head = graph.conv("head", attention);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "scaled_dot_product_attention_0.output"]);
}

#[test]
fn indices_of_an_embedding_are_not_float() {
    let mut graph = Graph::new();
    let ids = graph.argument("ids");
    let table = graph.tensor("words.weight", &[64, 8]);
    let embedded = graph.op("aten::embedding", &[table, ids]);
    let head = graph.conv("head", embedded);
    let unknown = super::arguments_of_unknown_dtype(&graph.listing);
    let sites = graph.returning(&[head]);
    assert_eq!(unknown, [] as [String; 0]);
    assert_eq!(names(&sites), ["words.output"]);
    assert_eq!(weights(&sites), ["words.weight", "head.weight"]);
}

#[test]
fn a_run_shows_which_arguments_are_float() {
    let build = |dtype: Option<&str>| {
        let mut graph = Graph::new();
        let (x, y) = (graph.argument("x"), graph.argument("y"));
        if let Some(dtype) = dtype {
            graph.see(y, dtype);
        }
        let sum = graph.op("aten::add", &[x, y]);
        let conv = graph.conv("head", sum);
        (super::arguments_of_unknown_dtype(&graph.listing), graph.returning(&[conv]))
    };
    let (unknown, sites) = build(None);
    assert_eq!(
        (unknown, names(&sites)),
        (vec!["x".to_owned(), "y".to_owned()], vec!["input.x", "input.y", "add_0.output"])
    );
    let (unknown, sites) = build(Some("Long"));
    assert_eq!((unknown, names(&sites)), (vec!["x".to_owned()], vec!["input.x", "add_0.output"]));
    let (unknown, sites) = build(Some("Float"));
    assert_eq!((unknown, names(&sites)), (vec!["x".to_owned()], vec!["input.x", "input.y", "add_0.output"]));
}

#[test]
fn a_shared_weight_is_one_site_with_all_its_constants() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let (first, second) = (graph.tensor("shared.weight", &[8, 8]), graph.tensor("shared.weight", &[8, 8]));
    let storage = graph.listing.values[first].constant.as_ref().map(|constant| constant.storage);
    graph.listing.values[second].constant.as_mut().expect("a constant").storage = storage.expect("a constant");
    let none = graph.plain("None");
    let once = graph.op("aten::linear", &[x, first, none]);
    let twice = graph.op("aten::linear", &[once, second, none]);
    let head = graph.conv("head", twice);
    let sites = graph.returning(&[head]);
    assert_eq!(weights(&sites), ["shared.weight", "head.weight"]);
    assert_eq!(sites.weights[0].values, [first, second]);
    assert_eq!(names(&sites), ["input.x", "shared.output", "shared#2.output"]);
    assert_eq!(
        sites.layers.iter().map(|layer| layer.name.as_str()).collect::<Vec<_>>(),
        ["shared", "shared#2", "head"]
    );
}

#[test]
fn a_value_written_in_place_stays_float() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let conv = graph.conv("stem", x);
    graph.listing.values[conv].has_writers = true;
    graph.op("aten::copy_", &[conv, x]);
    let head = graph.conv("head", conv);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x"]);
    assert_eq!(
        reason(&sites, "stem.output"),
        "it, or what it may share memory with, is written in place: replacing it could change the model"
    );
}

#[test]
fn padding_moves_numbers_if_it_adds_zeros() {
    let build = |fill: &str| {
        let mut graph = Graph::new();
        let x = graph.argument("x");
        let conv = graph.conv("stem", x);
        let (widths, fill) = (graph.plain("[1, 1]"), graph.plain(fill));
        let padded = graph.op("aten::constant_pad_nd", &[conv, widths, fill]);
        let head = graph.conv("head", padded);
        (graph.returning(&[head]), padded)
    };
    for zero in ["0", "0.", "None"] {
        assert_eq!(names(&build(zero).0), ["input.x", "stem.output"], "{zero}");
    }
    let (sites, padded) = build("1");
    assert_eq!(anchors(&sites, "constant_pad_nd_0.output"), [padded]);
    assert_eq!(reason(&sites, "constant_pad_nd_0"), "computed in float");
}

#[test]
fn a_branch_has_one_site_with_an_anchor_in_each_block() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let condition = graph.plain("condition");
    let branch = graph.node("prim::If", &[condition], &["Tensor"]);
    graph.block(branch, &[]);
    let bright = graph.conv("bright", x);
    graph.close(&[bright]);
    graph.block(branch, &[]);
    let dark = graph.conv("dark", x);
    let relu = graph.op("aten::relu", &[dark]);
    graph.close(&[relu]);
    let result = graph.listing.nodes[branch].outputs[0];
    let head = graph.conv("head", result);
    let sites = graph.returning(&[head]);
    assert_eq!(sites.activations.len(), 2, "{:?}", names(&sites));
    assert_eq!(sites.activations[1].anchors.iter().map(|anchor| anchor.value).collect::<Vec<_>>(), [bright, relu]);
    assert_eq!(sites.activations[1].name, "bright.output");
    assert_eq!(weights(&sites), ["bright.weight", "dark.weight", "head.weight"]);
}

#[test]
fn a_loop_has_one_site_for_what_it_carries() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let stem = graph.conv("stem", x);
    let (trips, condition) = (graph.plain("3"), graph.plain("True"));
    let repeat = graph.node("prim::Loop", &[trips, condition, stem], &["Tensor"]);
    let (step, carried) = (graph.value("step", "int"), graph.value("carried", "Tensor"));
    graph.block(repeat, &[step, carried]);
    let body = graph.conv("body", carried);
    graph.close(&[condition, body]);
    let result = graph.listing.nodes[repeat].outputs[0];
    let head = graph.conv("head", result);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "stem.output"]);
    assert_eq!(anchors(&sites, "stem.output"), [stem, body]);
}

#[test]
fn ops_that_the_table_lacks_are_listed_by_name_and_count() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let first = graph.op("aten::kaiser_window_of", &[x]);
    let second = graph.op("aten::kaiser_window_of", &[first]);
    let other = graph.op("aten::bessel_of", &[second]);
    let head = graph.conv("head", other);
    let sites = graph.returning(&[head]);
    let unknown = [("aten::bessel_of".to_owned(), 1), ("aten::kaiser_window_of".to_owned(), 2)];
    assert_eq!(sites.unknown_ops, unknown);
    for name in ["kaiser_window_of_0", "kaiser_window_of_1", "bessel_of_0"] {
        assert_eq!(reason(&sites, name), "not in the op table");
    }
    // It computes in float; what the convolution reads is a site all the same.
    assert_eq!(anchors(&sites, "bessel_of_0.output"), [other]);
}

#[test]
fn ops_without_float_numbers_are_not_listed() {
    let mut graph = Graph::new();
    let ids = graph.argument("ids");
    let shifted = graph.op("aten::some_integer_op", &[ids]);
    graph.see(ids, "Long");
    graph.see(shifted, "Long");
    let table = graph.tensor("words.weight", &[64, 8]);
    let embedded = graph.op("aten::embedding", &[table, shifted]);
    let head = graph.conv("head", embedded);
    let sites = graph.returning(&[head]);
    assert_eq!((sites.unknown_ops.len(), sites.left_float.len()), (0, 1), "{:?}", sites.left_float);
    assert_eq!(names(&sites), ["words.output"]);
}

/// Nothing in the graph makes the numbers of a moved constant; its quantizer goes where the moving ends.
#[test]
fn a_constant_that_is_only_moved_is_a_site_where_it_comes_out() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let positions = graph.tensor("positions", &[1, 16, 8]);
    let sliced = graph.op("aten::slice", &[positions]);
    let viewed = graph.op("aten::view", &[sliced]);
    let sum = graph.op("aten::add", &[x, viewed]);
    let head = graph.conv("head", sum);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "slice_0.output", "add_0.output"]);
    assert_eq!(anchors(&sites, "slice_0.output"), [sliced]);
}

/// As in `h = torch.zeros(8)`, then a loop of `h = body(h)`: from the second step on, the body reads what it made.
#[test]
fn a_loop_that_starts_from_a_constant_still_has_a_site_for_what_it_carries() {
    let mut graph = Graph::new();
    let (trips, condition) = (graph.plain("3"), graph.plain("True"));
    let start = graph.tensor("", &[1, 8, 4, 4]);
    let repeat = graph.node("prim::Loop", &[trips, condition, start], &["Tensor"]);
    let (step, carried) = (graph.value("step", "int"), graph.value("carried", "Tensor"));
    graph.block(repeat, &[step, carried]);
    let body = graph.conv("body", carried);
    graph.close(&[condition, body]);
    let result = graph.listing.nodes[repeat].outputs[0];
    let head = graph.conv("head", result);
    let sites = graph.returning(&[head]);
    assert_eq!(anchors(&sites, "body.output"), [body], "sites {:?}", sites.activations);
}

#[test]
fn a_constant_operand_is_listed_as_float() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let scale = graph.tensor("scale", &[8, 1, 1]);
    let product = graph.op("aten::mul", &[x, scale]);
    let head = graph.conv("head", product);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x", "mul_0.output"]);
    assert_eq!(reason(&sites, "mul_0"), "its constant operand of shape [8, 1, 1] stays float");
}

/// `y: Optional[Tensor]` reaches the model through an unchecked cast behind `if y is not None`.
#[test]
fn an_optional_tensor_is_not_called_a_list() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let optional = graph.value("y", "Optional[Tensor]");
    graph.listing.blocks[0].parameters.push(optional);
    let y = graph.op("prim::unchecked_cast", &[optional]);
    graph.see(y, "Float");
    let sum = graph.op("aten::add", &[x, y]);
    let head = graph.conv("head", sum);
    let sites = graph.returning(&[head]);
    // A float input of the model is a site; where that cannot be, the reason has to be true.
    let is_site = names(&sites).contains(&"input.y");
    assert!(is_site || !reason(&sites, "input.y").contains("list"), "{:?}", sites.left_float);
}

#[test]
fn a_value_that_only_decides_a_branch_is_not_called_an_output() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let mean = graph.op("aten::mean", &[x]);
    let zero = graph.plain("0.");
    let positive = graph.op("aten::gt", &[mean, zero]);
    graph.node("aten::Bool", &[positive], &["bool"]);
    let head = graph.conv("head", x);
    let sites = graph.returning(&[head]);
    assert_eq!(names(&sites), ["input.x"]);
    assert_ne!(reason(&sites, "mean_0.output"), "an output of the model");
    assert_eq!(reason(&sites, "head.output"), "an output of the model");
}

/// Names of ops by their numbers.
fn layers<'a>(sites: &'a Sites, ops: &[super::OpId]) -> Vec<&'a str> {
    ops.iter().map(|&op| sites.ops[op].name.as_str()).collect()
}

/// Makers and readers of a site.
#[track_caller]
fn around<'a>(sites: &'a Sites, name: &str) -> (Vec<&'a str>, Vec<&'a str>) {
    let site = sites.activations.iter().find(|site| site.name == name);
    let site = site.unwrap_or_else(|| panic!("no site `{name}` among {:?}", names(sites)));
    (layers(sites, &site.makers), layers(sites, &site.readers))
}

#[test]
fn a_site_knows_what_makes_and_what_reads_it() {
    let mut graph = Graph::new();
    let x = graph.argument("x.1");
    let conv = graph.conv("stem", x);
    let relu = graph.op("aten::relu", &[conv]);
    let pooled = graph.op("aten::max_pool2d", &[relu]);
    let left = graph.conv("left", pooled);
    let norm = graph.op("aten::layer_norm", &[relu]);
    let list = graph.node("prim::ListConstruct", &[left, norm, pooled], &["Tensor[]"]);
    let list = graph.listing.nodes[list].outputs[0];
    let joined = graph.op("aten::cat", &[list]);
    graph.op("aten::argmax", &[relu]);
    let head = graph.conv("head", joined);
    let sites = graph.returning(&[head]);
    let ops: Vec<(&str, &str)> = sites.ops.iter().map(|op| (op.name.as_str(), op.op.as_str())).collect();
    let expected = [
        ("input", "argument"),
        ("stem", "aten::conv2d"),
        ("left", "aten::conv2d"),
        ("layer_norm_0", "aten::layer_norm"),
        ("cat_0", "aten::cat"),
        ("head", "aten::conv2d"),
    ];
    assert_eq!(ops, expected);
    assert_eq!(around(&sites, "input.x"), (vec!["input"], vec!["stem"]));
    assert_eq!(around(&sites, "stem.output"), (vec!["stem"], vec!["left", "layer_norm_0", "cat_0"]));
    assert_eq!(around(&sites, "layer_norm_0.output"), (vec!["layer_norm_0"], vec!["cat_0"]));
    assert_eq!(around(&sites, "cat_0.output"), (vec!["cat_0"], vec!["head"]));
    assert_eq!(
        sites.weights.iter().map(|site| layers(&sites, &site.users)).collect::<Vec<_>>(),
        [["stem"], ["left"], ["head"]]
    );
}

#[test]
fn a_shared_site_knows_all_its_layers() {
    let mut graph = Graph::new();
    let x = graph.argument("x");
    let weight = graph.tensor("shared.weight", &[8, 8]);
    let none = graph.plain("None");
    let once = graph.op("aten::linear", &[x, weight, none]);
    let condition = graph.plain("condition");
    let branch = graph.node("prim::If", &[condition], &["Tensor"]);
    graph.block(branch, &[]);
    let bright = graph.op("aten::linear", &[once, weight, none]);
    graph.close(&[bright]);
    graph.block(branch, &[]);
    let dark = graph.conv("dark", once);
    graph.close(&[dark]);
    let result = graph.listing.nodes[branch].outputs[0];
    let head = graph.conv("head", result);
    let sites = graph.returning(&[head]);
    assert_eq!(layers(&sites, &sites.weights[0].users), ["shared", "shared#2"]);
    assert_eq!(around(&sites, "shared#2.output"), (vec!["shared#2", "dark"], vec!["head"]));
    assert_eq!(around(&sites, "shared.output"), (vec!["shared"], vec!["shared#2", "dark"]));
}
