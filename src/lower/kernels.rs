//! The table of libtorch's 8-bit kernels: which op has one, and how it is called. Data, not code; it knows no graph.

/// How an op runs on quantized tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// A convolution with a constant weight.
    Convolution(Convolution),
    /// A transposed convolution with a constant weight, which has one scale.
    Transposed,
    /// A linear layer, input and weight in the first two slots, the bias in the third.
    Linear,
    /// A product of an activation and a constant matrix, in these slots.
    Product {
        /// The activation.
        data: usize,
        /// The matrix.
        weight: usize,
    },
    /// Two tensors into one with a quantizer of its own.
    Binary {
        /// The kernel.
        plain: &'static str,
        /// The kernel that computes a ReLU along with it.
        relu: &'static str,
        /// Slot of a factor that has to be 1.
        factor: Option<usize>,
    },
    /// A list of tensors into one with a quantizer of its own.
    Concat,
    /// A function of single values into a tensor with a quantizer of its own.
    Function(Function),
    /// A batch normalization with constant statistics, into a tensor with a quantizer of its own.
    BatchNorm,
    /// libtorch's own op takes quantized tensors and keeps their quantizer: the numbers are moved, or clamped at zero.
    Keep,
    /// The same, for tensors of so many axes.
    KeepOf(usize),
    /// As [`Keep`](Self::Keep), over axes that are named and without another dtype.
    Mean,
    /// As [`Keep`](Self::Keep), by `aten::reshape`: kernels lay tensors out in memory in an order of their own.
    Reshape,
    /// Asks for shapes alone.
    Shape,
}

/// Slots of a convolution's arguments behind input, weight and bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Convolution {
    /// Dilation; `stride` and `padding` stand in 3 and 4.
    pub(super) dilation: usize,
    /// Groups.
    pub(super) groups: usize,
}

/// How a function is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    /// `(x, scale, zero_point)`.
    Plain(&'static str),
    /// `quantized::leaky_relu(x, slope, inplace, scale, zero_point)`.
    LeakyRelu,
    /// `quantized::elu(x, scale, zero_point, alpha, scale, input_scale)`.
    Elu,
}

const CONVOLUTION: Kernel = Kernel::Convolution(Convolution { dilation: 5, groups: 6 });
const ADD: Kernel = Kernel::Binary { plain: "quantized::add", relu: "quantized::add_relu", factor: Some(2) };
const MUL: Kernel = Kernel::Binary { plain: "quantized::mul", relu: "quantized::mul_relu", factor: None };
const IMAGES: Kernel = Kernel::KeepOf(4);
const VOLUMES: Kernel = Kernel::KeepOf(5);

/// Ops of the table. Each was tried on quantized tensors of both memory layouts; see docs/int8.md for what is left out.
#[rustfmt::skip]
const TABLE: &[(&str, Kernel)] = &[
    ("aten::conv1d", CONVOLUTION), ("aten::conv2d", CONVOLUTION), ("aten::conv3d", CONVOLUTION),
    ("aten::_convolution_mode", CONVOLUTION),
    ("aten::conv_transpose1d", Kernel::Transposed), ("aten::conv_transpose2d", Kernel::Transposed),
    ("aten::conv_transpose3d", Kernel::Transposed),
    ("aten::linear", Kernel::Linear),
    ("aten::matmul", Kernel::Product { data: 0, weight: 1 }), ("aten::mm", Kernel::Product { data: 0, weight: 1 }),
    ("aten::add", ADD), ("aten::mul", MUL), ("aten::cat", Kernel::Concat), ("aten::batch_norm", Kernel::BatchNorm),
    ("aten::hardswish", Kernel::Function(Function::Plain("quantized::hardswish"))),
    ("aten::sigmoid", Kernel::Function(Function::Plain("quantized::sigmoid"))),
    ("aten::leaky_relu", Kernel::Function(Function::LeakyRelu)), ("aten::elu", Kernel::Function(Function::Elu)),

    ("aten::relu", Kernel::Keep), ("aten::mean", Kernel::Mean),
    ("aten::max_pool1d", Kernel::KeepOf(3)), ("aten::max_pool2d", IMAGES),
    ("aten::max_pool3d", VOLUMES), ("aten::avg_pool2d", IMAGES), ("aten::avg_pool3d", VOLUMES),
    ("aten::adaptive_avg_pool2d", IMAGES), ("aten::adaptive_avg_pool3d", VOLUMES),
    ("aten::upsample_nearest2d", IMAGES), ("aten::upsample_nearest3d", VOLUMES), ("aten::upsample_bilinear2d", IMAGES),
    ("aten::pixel_shuffle", Kernel::Keep), ("aten::pixel_unshuffle", Kernel::Keep),
    ("aten::channel_shuffle", Kernel::Keep), ("aten::unfold", Kernel::Keep),

    ("aten::view", Kernel::Reshape), ("aten::_unsafe_view", Kernel::Reshape), ("aten::reshape", Kernel::Reshape),
    ("aten::flatten", Kernel::Keep), ("aten::unflatten", Kernel::Keep), ("aten::ravel", Kernel::Keep),
    ("aten::permute", Kernel::Keep), ("aten::transpose", Kernel::Keep), ("aten::t", Kernel::Keep),
    ("aten::numpy_T", Kernel::Keep), ("aten::movedim", Kernel::Keep), ("aten::swapaxes", Kernel::Keep),
    ("aten::swapdims", Kernel::Keep), ("aten::slice", Kernel::Keep), ("aten::select", Kernel::Keep),
    ("aten::narrow", Kernel::Keep), ("aten::index_select", Kernel::Keep), ("aten::chunk", Kernel::Keep),
    ("aten::split", Kernel::Keep), ("aten::split_with_sizes", Kernel::Keep), ("aten::tensor_split", Kernel::Keep),
    ("aten::unbind", Kernel::Keep), ("prim::ListUnpack", Kernel::Keep), ("aten::squeeze", Kernel::Keep),
    ("aten::unsqueeze", Kernel::Keep), ("aten::expand", Kernel::Keep), ("aten::broadcast_to", Kernel::Keep),
    ("aten::repeat", Kernel::Keep), ("aten::tile", Kernel::Keep), ("aten::repeat_interleave", Kernel::Keep),
    ("aten::flip", Kernel::Keep), ("aten::contiguous", Kernel::Keep), ("aten::clone", Kernel::Keep),
    ("aten::detach", Kernel::Keep), ("aten::alias", Kernel::Keep), ("aten::dropout", Kernel::Keep),
    ("aten::constant_pad_nd", Kernel::Keep), ("aten::pad", Kernel::Keep), ("aten::reflection_pad1d", Kernel::Keep),
    ("aten::reflection_pad2d", Kernel::Keep),

    ("aten::size", Kernel::Shape), ("aten::dim", Kernel::Shape), ("aten::numel", Kernel::Shape),
    ("aten::len", Kernel::Shape), ("prim::device", Kernel::Shape),
];

/// The kernel of an op, if libtorch has one.
pub(super) fn of(op: &str) -> Option<Kernel> {
    TABLE.iter().find(|(name, _)| *name == op).map(|(_, kernel)| *kernel)
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

    /// Which ops make outputs in 8 bits the sites know by a table of their own.
    #[test]
    fn kernels_that_write_a_quantizer_of_their_own_are_known_to_the_sites() {
        for (op, kernel) in TABLE {
            let writes =
                matches!(kernel, Kernel::Binary { .. } | Kernel::Concat | Kernel::BatchNorm | Kernel::Function(_));
            assert_eq!(crate::sites::operands_in_8_bits(op) > 0, writes, "{op}");
        }
    }

    #[test]
    fn what_has_no_kernel_has_no_row() {
        for op in ["aten::softmax", "aten::silu", "aten::gelu", "aten::gru"] {
            assert_eq!(of(op), None, "{op}");
        }
    }
}
