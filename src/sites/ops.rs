//! The op table: what each TorchScript op means to quantization. Data, not code: a new op is a new row.

/// What an op does with the numbers that pass through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Multiplies its data with a weight. Weight and data are quantized, and so is the result.
    Weighted(&'static Weighted),
    /// Computes on quantized tensors and makes a quantized tensor: inputs in these slots are sites, and so is the result.
    Quantized(&'static [usize]),
    /// A product of two tensors, either of which may be a constant weight.
    Product(Product),
    /// A function of single values that joins the op before it: their one site is behind the function.
    Activation,
    /// Moves or picks the numbers of the tensors in these slots; shares their site.
    Move(&'static [usize]),
    /// Moves numbers and adds the constant in this slot, which has to be zero or absent, as padding.
    Pad(usize),
    /// Needs more precision than a quantized tensor has.
    Float,
    /// Gives truth values or indices, no float numbers.
    Other,
    /// Float, and what stands between the last product and its input is scores and masks.
    Softmax,
    /// Attention with queries, keys, values in the first three slots and a mask, which is no site, in the fourth.
    Attention,
}

/// Slots of an op with weights.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Weighted {
    pub(super) data: &'static [usize],
    pub(super) weights: Weights,
    /// Axis of the output channels.
    pub(super) axis: usize,
    /// Whether its data have their channels along the second axis, with positions behind; else they are last.
    pub(super) convolves: bool,
    /// Whether the result is a site of its own accord.
    pub(super) output: bool,
}

/// Where the weights of an op are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// In these slots.
    Slots(&'static [usize]),
    /// The matrices of the last tensor list among the inputs, as recurrent layers take them.
    List,
}

/// Slots of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) left: usize,
    pub(super) right: usize,
}

const CONV: Role =
    Role::Weighted(&Weighted { data: &[0], weights: Weights::Slots(&[1]), axis: 0, convolves: true, output: true });
const LINEAR: Role =
    Role::Weighted(&Weighted { data: &[0], weights: Weights::Slots(&[1]), axis: 0, convolves: false, output: true });
const CONV_TRANSPOSE: Role =
    Role::Weighted(&Weighted { data: &[0], weights: Weights::Slots(&[1]), axis: 1, convolves: true, output: true });
const EMBEDDING: Role =
    Role::Weighted(&Weighted { data: &[], weights: Weights::Slots(&[0]), axis: 0, convolves: false, output: false });
const RECURRENT: Role =
    Role::Weighted(&Weighted { data: &[0], weights: Weights::List, axis: 0, convolves: false, output: false });
const CELL: Role = Role::Weighted(&Weighted {
    data: &[0],
    weights: Weights::Slots(&[2, 3]),
    axis: 0,
    convolves: false,
    output: false,
});
const BILINEAR: Role =
    Role::Weighted(&Weighted { data: &[0, 1], weights: Weights::Slots(&[2]), axis: 0, convolves: false, output: true });
const MATMUL: Role = Role::Product(Product { left: 0, right: 1 });
const ADDMM: Role = Role::Product(Product { left: 1, right: 2 });
const ARITHMETIC: Role = Role::Quantized(&[0, 1]);
const POOL: Role = Role::Quantized(&[0]);
const MOVE: Role = Role::Move(&[0]);

/// Ops of the table, each with its role.
#[rustfmt::skip]
const TABLE: &[(&str, Role)] = &[
    ("aten::conv1d", CONV), ("aten::conv2d", CONV), ("aten::conv3d", CONV),
    ("aten::_convolution", CONV), ("aten::_convolution_mode", CONV), ("aten::convolution", CONV),
    ("aten::conv_transpose1d", CONV_TRANSPOSE), ("aten::conv_transpose2d", CONV_TRANSPOSE),
    ("aten::conv_transpose3d", CONV_TRANSPOSE),
    ("aten::linear", LINEAR), ("aten::bilinear", BILINEAR), ("aten::embedding", EMBEDDING),
    ("aten::embedding_bag", EMBEDDING),
    ("aten::lstm", RECURRENT), ("aten::gru", RECURRENT), ("aten::rnn_tanh", RECURRENT), ("aten::rnn_relu", RECURRENT),
    ("aten::lstm_cell", CELL), ("aten::gru_cell", CELL), ("aten::rnn_tanh_cell", CELL), ("aten::rnn_relu_cell", CELL),
    ("aten::matmul", MATMUL), ("aten::mm", MATMUL), ("aten::bmm", MATMUL), ("aten::mv", MATMUL), ("aten::dot", MATMUL),
    ("aten::addmm", ADDMM), ("aten::baddbmm", ADDMM), ("aten::addbmm", ADDMM),
    ("aten::einsum", Role::Quantized(&[1])),
    ("aten::scaled_dot_product_attention", Role::Attention),

    ("aten::add", ARITHMETIC), ("aten::add_", ARITHMETIC), ("aten::sub", ARITHMETIC), ("aten::sub_", ARITHMETIC),
    ("aten::rsub", ARITHMETIC), ("aten::mul", ARITHMETIC), ("aten::mul_", ARITHMETIC), ("aten::cat", POOL),
    ("aten::concat", POOL), ("aten::concatenate", POOL), ("aten::stack", POOL), ("aten::hstack", POOL),
    ("aten::vstack", POOL),
    ("aten::avg_pool1d", POOL), ("aten::avg_pool2d", POOL), ("aten::avg_pool3d", POOL),
    ("aten::adaptive_avg_pool1d", POOL), ("aten::adaptive_avg_pool2d", POOL), ("aten::adaptive_avg_pool3d", POOL),
    ("aten::mean", POOL), ("aten::upsample_linear1d", POOL), ("aten::upsample_bilinear2d", POOL),
    ("aten::upsample_bicubic2d", POOL), ("aten::upsample_trilinear3d", POOL), ("aten::grid_sampler", POOL),

    ("aten::relu", Role::Activation), ("aten::relu_", Role::Activation), ("aten::relu6", Role::Activation),
    ("aten::relu6_", Role::Activation), ("aten::hardtanh", Role::Activation), ("aten::hardtanh_", Role::Activation),
    ("aten::clamp", Role::Activation), ("aten::clamp_", Role::Activation), ("aten::clamp_min", Role::Activation),
    ("aten::clamp_max", Role::Activation), ("aten::leaky_relu", Role::Activation),
    ("aten::leaky_relu_", Role::Activation), ("aten::prelu", Role::Activation), ("aten::elu", Role::Activation),
    ("aten::elu_", Role::Activation), ("aten::selu", Role::Activation), ("aten::selu_", Role::Activation),
    ("aten::celu", Role::Activation), ("aten::gelu", Role::Activation), ("aten::silu", Role::Activation),
    ("aten::silu_", Role::Activation), ("aten::mish", Role::Activation), ("aten::hardswish", Role::Activation),
    ("aten::hardswish_", Role::Activation), ("aten::hardsigmoid", Role::Activation),
    ("aten::hardsigmoid_", Role::Activation), ("aten::sigmoid", Role::Activation),
    ("aten::sigmoid_", Role::Activation), ("aten::tanh", Role::Activation), ("aten::tanh_", Role::Activation),
    ("aten::softplus", Role::Activation), ("aten::threshold", Role::Activation), ("aten::threshold_", Role::Activation),

    ("aten::max_pool1d", MOVE), ("aten::max_pool2d", MOVE), ("aten::max_pool3d", MOVE),
    ("aten::adaptive_max_pool1d", MOVE), ("aten::adaptive_max_pool2d", MOVE), ("aten::adaptive_max_pool3d", MOVE),
    ("aten::max_pool2d_with_indices", MOVE),
    ("aten::view", MOVE), ("aten::view_as", MOVE), ("aten::reshape", MOVE), ("aten::reshape_as", MOVE),
    ("aten::_unsafe_view", MOVE), ("aten::flatten", MOVE), ("aten::unflatten", MOVE), ("aten::ravel", MOVE),
    ("aten::permute", MOVE), ("aten::transpose", MOVE), ("aten::t", MOVE), ("aten::numpy_T", MOVE),
    ("aten::movedim", MOVE), ("aten::swapaxes", MOVE), ("aten::swapdims", MOVE),
    ("aten::slice", MOVE), ("aten::select", MOVE), ("aten::narrow", MOVE), ("aten::index", MOVE),
    ("aten::index_select", MOVE), ("aten::gather", MOVE), ("aten::take_along_dim", MOVE),
    ("aten::chunk", MOVE), ("aten::unsafe_chunk", MOVE), ("aten::unsafe_split", MOVE),
    ("aten::_pack_padded_sequence", MOVE), ("aten::_pad_packed_sequence", MOVE), ("aten::split", MOVE), ("aten::split_with_sizes", MOVE), ("aten::tensor_split", MOVE),
    ("aten::unbind", MOVE), ("aten::squeeze", MOVE), ("aten::unsqueeze", MOVE), ("aten::expand", MOVE),
    ("aten::expand_as", MOVE), ("aten::broadcast_to", MOVE), ("aten::repeat", MOVE),
    ("aten::repeat_interleave", MOVE), ("aten::tile", MOVE), ("aten::flip", MOVE), ("aten::roll", MOVE),
    ("aten::contiguous", MOVE), ("aten::clone", MOVE), ("aten::detach", MOVE), ("aten::alias", MOVE),
    ("aten::to", MOVE), ("aten::cpu", MOVE), ("aten::type_as", MOVE), ("aten::float", MOVE), ("aten::dropout", MOVE),
    ("aten::dropout_", MOVE), ("aten::feature_dropout", MOVE), ("aten::alpha_dropout", MOVE),
    ("aten::pixel_shuffle", MOVE), ("aten::pixel_unshuffle", MOVE), ("aten::channel_shuffle", MOVE),
    ("aten::unfold", MOVE), ("aten::im2col", MOVE), ("aten::upsample_nearest1d", MOVE),
    ("aten::upsample_nearest2d", MOVE), ("aten::upsample_nearest3d", MOVE), ("aten::__getitem__", MOVE),
    ("prim::ListUnpack", MOVE), ("prim::unchecked_cast", MOVE),
    ("aten::constant_pad_nd", Role::Pad(2)), ("aten::pad", Role::Pad(3)), ("aten::reflection_pad1d", MOVE),
    ("aten::reflection_pad2d", MOVE), ("aten::reflection_pad3d", MOVE), ("aten::replication_pad1d", MOVE),
    ("aten::replication_pad2d", MOVE), ("aten::replication_pad3d", MOVE),

    ("aten::eq", Role::Other), ("aten::ne", Role::Other), ("aten::lt", Role::Other), ("aten::le", Role::Other),
    ("aten::gt", Role::Other), ("aten::ge", Role::Other), ("aten::logical_and", Role::Other),
    ("aten::logical_or", Role::Other), ("aten::logical_not", Role::Other), ("aten::isnan", Role::Other),
    ("aten::isinf", Role::Other), ("aten::isfinite", Role::Other), ("aten::argmax", Role::Other),
    ("aten::argmin", Role::Other), ("aten::argsort", Role::Other), ("aten::nonzero", Role::Other),
    ("aten::any", Role::Other), ("aten::all", Role::Other), ("aten::sign", Role::Float),

    ("aten::softmax", Role::Softmax), ("aten::_softmax", Role::Softmax), ("aten::log_softmax", Role::Softmax),
    ("aten::_log_softmax", Role::Softmax),

    ("aten::batch_norm", Role::Float), ("aten::layer_norm", Role::Float), ("aten::native_layer_norm", Role::Float),
    ("aten::group_norm", Role::Float), ("aten::instance_norm", Role::Float), ("aten::rms_norm", Role::Float),
    ("aten::local_response_norm", Role::Float), ("aten::linalg_vector_norm", Role::Float),
    ("aten::norm", Role::Float), ("aten::frobenius_norm", Role::Float), ("aten::div", Role::Float),
    ("aten::div_", Role::Float), ("aten::sum", Role::Float), ("aten::prod", Role::Float), ("aten::cumsum", Role::Float),
    ("aten::pow", Role::Float), ("aten::square", Role::Float), ("aten::sqrt", Role::Float), ("aten::rsqrt", Role::Float),
    ("aten::reciprocal", Role::Float), ("aten::exp", Role::Float), ("aten::log", Role::Float),
    ("aten::log1p", Role::Float), ("aten::log10", Role::Float), ("aten::abs", Role::Float), ("aten::neg", Role::Float),
    ("aten::sin", Role::Float), ("aten::cos", Role::Float), ("aten::erf", Role::Float), ("aten::var", Role::Float),
    ("aten::std", Role::Float), ("aten::floor", Role::Float), ("aten::ceil", Role::Float), ("aten::round", Role::Float),
    ("aten::max", Role::Float), ("aten::min", Role::Float), ("aten::amax", Role::Float), ("aten::amin", Role::Float),
    ("aten::maximum", Role::Float), ("aten::minimum", Role::Float), ("aten::topk", Role::Float),
    ("aten::sort", Role::Float), ("aten::logsumexp", Role::Float), ("aten::glu", Role::Float),
    ("aten::log_sigmoid", Role::Float), ("aten::where", Role::Float), ("aten::masked_fill", Role::Float),
    ("aten::masked_fill_", Role::Float), ("aten::fill_", Role::Float), ("aten::copy_", Role::Float),
    ("aten::index_put_", Role::Float), ("aten::scatter", Role::Float), ("aten::stft", Role::Float),
    ("aten::istft", Role::Float), ("aten::view_as_real", Role::Float), ("aten::nan_to_num", Role::Float),
    ("aten::cosine_similarity", Role::Float), ("aten::addcmul", Role::Float), ("aten::lerp", Role::Float),
    ("aten::tril", Role::Float), ("aten::triu", Role::Float), ("aten::bernoulli", Role::Float),
    ("aten::zeros_like", Role::Float), ("aten::ones_like", Role::Float), ("aten::full_like", Role::Float),
    ("aten::new_zeros", Role::Float), ("aten::new_ones", Role::Float), ("aten::new_full", Role::Float),
    ("aten::empty_like", Role::Float), ("aten::rand_like", Role::Float), ("aten::randn_like", Role::Float),
];

/// The row of an op, if the table has one.
pub(super) fn role(op: &str) -> Option<Role> {
    TABLE.iter().find(|(name, _)| *name == op).map(|(_, role)| *role)
}

/// True for ops on whose results libtorch's 8-bit kernels put the quantizer of what they read.
pub(super) fn keeps_quantizer(op: &str) -> bool {
    const OPS: &[&str] = &[
        "aten::avg_pool2d",
        "aten::avg_pool3d",
        "aten::adaptive_avg_pool2d",
        "aten::adaptive_avg_pool3d",
        "aten::mean",
        "aten::upsample_bilinear2d",
    ];
    OPS.contains(&op)
}

/// True for an op that needs no quantizer of its own, but has an 8-bit kernel for where its input and its result have one.
pub(super) fn may_run_in_8_bits(op: &str) -> bool {
    op == "aten::batch_norm"
}

/// How many of the first inputs of an op without weights are quantized tensors for its 8-bit kernel, where that writes a quantizer of
/// its own; 0 for all others.
pub(super) fn operands_in_8_bits(op: &str) -> usize {
    match op {
        "aten::add" | "aten::mul" => 2,
        "aten::cat" | "aten::batch_norm" | "aten::hardswish" | "aten::sigmoid" | "aten::leaky_relu" | "aten::elu" => 1,
        _ => 0,
    }
}

/// The slot of a factor that 8-bit kernels do not take.
pub(super) fn factor(op: &str) -> Option<usize> {
    (op == "aten::add").then_some(2)
}

/// True for the activation functions that 8-bit kernels of layers and sums compute along with them.
pub(super) fn is_clamp(op: &str) -> bool {
    const OPS: &[&str] = &["relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"];
    OPS.contains(&super::names::short(op))
}

/// Arithmetic that scores and masks go through on their way into a softmax.
pub(super) fn is_mask_arithmetic(op: &str) -> bool {
    const OPS: &[&str] = &[
        "aten::add",
        "aten::add_",
        "aten::sub",
        "aten::sub_",
        "aten::rsub",
        "aten::mul",
        "aten::mul_",
        "aten::div",
        "aten::div_",
        "aten::where",
        "aten::masked_fill",
        "aten::masked_fill_",
        "aten::clamp",
        "aten::neg",
        "aten::maximum",
        "aten::minimum",
        "aten::nan_to_num",
    ];
    OPS.contains(&op)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_op_has_one_row() {
        let mut names: Vec<_> = TABLE.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "an op stands in the table twice");
    }

    #[test]
    fn mask_arithmetic_is_in_the_table() {
        for op in ["aten::add", "aten::mul", "aten::where", "aten::masked_fill"] {
            assert!(role(op).is_some() && is_mask_arithmetic(op), "{op}");
        }
        assert!(!is_mask_arithmetic("aten::matmul"));
    }
}
