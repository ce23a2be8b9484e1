//! The bridge to the C++ sources beside it. Only [`super`] uses it; what each function does stands in `cpp/shim.h`.

use super::parallel::Work;
use super::visit::Visitor;

// The macro makes everything `pub`; the module keeps it inside `jit`.
#[allow(unsafe_code, unreachable_pub, missing_docs)]
#[cxx::bridge(namespace = "tsquant")]
pub(super) mod bridge {
    /// One argument of `forward`, without the module itself.
    struct ArgumentRow {
        name: String,
        type_name: String,
        has_default: bool,
        default_text: String,
    }

    /// A named parameter or buffer.
    struct TensorRow {
        name: String,
        dtype: String,
        shape: Vec<i64>,
        bytes: u64,
        is_buffer: bool,
    }

    /// A parameter, buffer or other attribute.
    struct AttributeRow {
        name: String,
        kind: String,
        is_used: bool,
    }

    struct OpCount {
        op: String,
        count: usize,
    }

    struct ValueRow {
        name: String,
        type_name: String,
        is_tensor: bool,
        is_constant: bool,
        has_writers: bool,
        text: String,
        dtype: String,
        shape: Vec<i64>,
        strides: Vec<i64>,
        pointer: usize,
        storage_bytes: u64,
        parameter: String,
    }

    struct BlockRow {
        owner: i64,
        parameters: Vec<usize>,
        returns: Vec<usize>,
    }

    struct NodeRow {
        op: String,
        block: usize,
        blocks: Vec<usize>,
        path: String,
        layer: String,
        inputs: Vec<usize>,
        outputs: Vec<usize>,
    }

    struct ListingRows {
        values: Vec<ValueRow>,
        blocks: Vec<BlockRow>,
        nodes: Vec<NodeRow>,
    }

    enum TapKind {
        Observe,
        Substitute,
        SubstituteInside,
        Gradient,
        WholeGradient,
        Input,
    }

    struct TapRow {
        value: usize,
        site: usize,
        kind: TapKind,
        slot: usize,
    }

    enum PlaceKind {
        Constant,
        Input,
        Addend,
    }

    struct PlaceRow {
        value: usize,
        kind: PlaceKind,
        slot: usize,
    }

    struct QuantizerRow {
        value: usize,
        scale: f64,
        zero_point: i64,
        quant_min: i64,
        quant_max: i64,
        is_returned: bool,
    }

    struct ParameterRow {
        place: PlaceRow,
        name: String,
        is_buffer: bool,
    }

    struct ExtraFile {
        name: String,
        text: String,
    }

    enum OperandKind {
        Value,
        New,
        Attribute,
        Tensor,
        None,
        Bool,
        Int,
        Float,
        Ints,
    }

    struct OperandRow {
        kind: OperandKind,
        index: usize,
        number: i64,
        real: f64,
        numbers: Vec<i64>,
    }

    enum Where {
        Start,
        Before,
        After,
    }

    enum Makes {
        Tensor,
        Tensors,
        Ints,
    }

    struct InsertionRow {
        place: Where,
        index: usize,
        op: String,
        inputs: Vec<OperandRow>,
        makes: Makes,
    }

    struct RewiringRow {
        is_block: bool,
        index: usize,
        slot: usize,
        operand: OperandRow,
    }

    struct AttributeOfOp {
        name: String,
        op: String,
        operands: Vec<OperandRow>,
    }

    struct ResultRow {
        scale: f64,
        zero_point: i64,
        runs: usize,
    }

    struct EditRows {
        attributes: Vec<AttributeOfOp>,
        insertions: Vec<InsertionRow>,
        rewirings: Vec<RewiringRow>,
    }

    enum ValueKind {
        None,
        Tensor,
        Bool,
        Int,
        Float,
        Tuple,
        List,
        Dict,
        Other,
    }

    enum Pass {
        Inline,
        InlineForkWait,
        AttachNames,
        FoldAttributes,
        DropThrowing,
        ConstantPropagation,
        LowerSimpleTuples,
        RemoveListMutation,
        RemoveTensorMutation,
        ForceSlow,
        RemoveDropout,
        ReplaceConvolution,
        FuseLinear,
        FoldConvBatchNorm,
        FoldLinearBatchNorm,
        FoldConvAddOrSub,
        FoldConvMulOrDiv,
        Peephole,
        EliminateCommonSubexpression,
        ConstantPooling,
        UnpackConstants,
        EliminateDeadCode,
        SplitReturned,
    }

    extern "Rust" {
        type Work<'a>;
        fn run(self: &Work<'_>, number: usize);

        type Visitor<'a>;
        fn observe(self: &mut Visitor<'_>, site: i64, value: &Tensor) -> Result<()>;
        fn substitute(self: &mut Visitor<'_>, site: i64, value: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn gradient(self: &mut Visitor<'_>, site: i64, value: &Tensor, gradient: &Tensor) -> Result<()>;
        fn constant_gradient(self: &mut Visitor<'_>, constant: usize, gradient: &Tensor) -> Result<()>;
    }

    unsafe extern "C++" {
        include!("tsquant/src/jit/cpp/shim.h");

        #[namespace = "at"]
        type Tensor;
        type Value;
        type Module;
        type Arguments;
        type Frozen;
        type Executable;
        type Tensors;
        type Recording;

        fn value_none() -> UniquePtr<Value>;
        fn value_bool(x: bool) -> UniquePtr<Value>;
        fn value_int(x: i64) -> UniquePtr<Value>;
        fn value_float(x: f64) -> UniquePtr<Value>;
        fn value_from_tensor(x: &Tensor) -> UniquePtr<Value>;
        fn value_kind(v: &Value) -> ValueKind;
        fn value_tensor(v: &Value) -> Result<UniquePtr<Tensor>>;
        fn value_type(v: &Value) -> String;
        fn value_len(v: &Value) -> Result<usize>;
        fn value_at(v: &Value, index: usize) -> Result<UniquePtr<Value>>;
        fn value_key(v: &Value, index: usize) -> Result<String>;

        fn load_module(path: &str) -> Result<UniquePtr<Module>>;
        fn share_module(m: &Module) -> UniquePtr<Module>;
        fn is_dense(t: &Tensor) -> bool;
        fn torch_version() -> String;
        fn keep_freed_memory();
        fn module_paths(m: &Module) -> Result<Vec<String>>;
        fn has_method(m: &Module, name: &str) -> Result<bool>;
        fn method_names(m: &Module) -> Result<Vec<String>>;
        fn arguments(m: &Module) -> Result<Vec<ArgumentRow>>;
        fn return_types(m: &Module) -> Result<Vec<String>>;
        fn named_tensors(m: &Module) -> Result<Vec<TensorRow>>;
        fn attribute_rows(m: &Module) -> Result<Vec<AttributeRow>>;
        fn op_counts(m: &Module) -> Result<Vec<OpCount>>;
        fn is_training(m: &Module) -> Result<bool>;
        fn set_eval(m: &Module) -> Result<()>;
        fn cast_to_float(m: &Module) -> Result<()>;

        fn new_arguments() -> UniquePtr<Arguments>;
        fn push_named(a: Pin<&mut Arguments>, name: &str, v: &Value);
        fn bind_arguments(m: &Module, a: Pin<&mut Arguments>) -> Result<()>;
        fn call_forward(m: &Module, a: &Arguments) -> Result<UniquePtr<Value>>;

        fn freeze(m: &Module) -> Result<UniquePtr<Frozen>>;
        fn run_pass(f: Pin<&mut Frozen>, pass: Pass) -> Result<usize>;
        fn alias_outputs(f: Pin<&mut Frozen>, values: &[usize]) -> Result<()>;
        fn attribute_names(f: &Frozen) -> Result<Vec<String>>;
        fn graph_text(f: &Frozen) -> Result<String>;
        fn list_graph(f: &Frozen) -> Result<ListingRows>;
        fn constant_tensor(f: &Frozen, value: usize) -> Result<UniquePtr<Tensor>>;

        fn libtorch_folder() -> String;
        fn open_cuda(library: &str) -> Result<()>;
        fn device_count() -> i32;
        fn try_device(index: i32) -> Result<()>;
        fn prepare_device(allow_tf32: bool) -> Result<()>;
        fn set_deterministic(on: bool) -> Result<bool>;
        fn take_unordered() -> Vec<String>;
        fn move_module(m: &Module, index: i32) -> Result<()>;
        fn upload(t: &Tensor, index: i32) -> Result<UniquePtr<Tensor>>;
        fn synchronize(index: i32) -> Result<()>;
        fn peak_device_bytes(index: i32) -> Result<i64>;
        fn forget_peak(index: i32) -> Result<()>;

        fn new_tensors() -> UniquePtr<Tensors>;
        fn push_tensor(list: Pin<&mut Tensors>, tensor: &Tensor);

        fn instrument(
            f: &Frozen,
            taps: &[TapRow],
            places: &[PlaceRow],
            tensors: &Tensors,
        ) -> Result<UniquePtr<Executable>>;
        fn executable_of(m: &Module) -> Result<UniquePtr<Executable>>;
        fn thread_count() -> usize;
        fn in_parallel(count: usize, work: &Work<'_>) -> Result<()>;
        fn run(e: &Executable, a: &Arguments, visitor: &mut Visitor<'_>) -> Result<UniquePtr<Value>>;

        fn differentiable(f: &Frozen, taps: &[TapRow], lifted: &[usize]) -> Result<UniquePtr<Executable>>;
        fn record(
            e: &Executable,
            a: &Arguments,
            lifted: &Tensors,
            channels_last: bool,
            visitor: &mut Visitor<'_>,
        ) -> Result<UniquePtr<Recording>>;
        fn recorded_output(r: &Recording) -> UniquePtr<Value>;
        fn backward(
            r: &Recording,
            outputs: &Tensors,
            directions: &Tensors,
            keep: bool,
            visitor: &mut Visitor<'_>,
        ) -> Result<()>;

        fn emit_module(
            f: &Frozen,
            quantizers: &[QuantizerRow],
            parameters: &[ParameterRow],
            tensors: &Tensors,
            files: &[ExtraFile],
            path: &str,
        ) -> Result<()>;

        fn emit_edited(
            f: &Frozen,
            edits: &EditRows,
            made_of: &Tensors,
            parameters: &[ParameterRow],
            tensors: &Tensors,
            files: &[ExtraFile],
            path: &str,
        ) -> Result<()>;
        fn edited(
            f: &Frozen,
            edits: &EditRows,
            made_of: &Tensors,
            places: &[PlaceRow],
            tensors: &Tensors,
        ) -> Result<UniquePtr<Executable>>;

        fn pack_and_run(
            pack: &AttributeOfOp,
            made_of: &Tensors,
            op: &str,
            x: &Tensor,
            result: &ResultRow,
        ) -> Result<UniquePtr<Tensor>>;
        fn freeze_for_inference(m: &Module, optimized: bool) -> Result<UniquePtr<Module>>;
        fn call_as_it_is(m: &Module, a: &Arguments) -> Result<UniquePtr<Value>>;

        fn quantized_engine() -> String;
        fn quantized_engines() -> Vec<String>;
        fn set_quantized_engine(name: &str) -> Result<()>;
    }
}
