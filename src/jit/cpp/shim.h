// What src/jit offers Rust of libtorch's TorchScript interface: load, list, edit, run, save. No policy lives here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include "rust/cxx.h"

// How C++ exceptions become Rust errors: libtorch's own without its C++ backtrace.
namespace rust {
namespace behavior {
template <typename Try, typename Fail>
static void trycatch(Try &&attempt, Fail &&fail) noexcept try {
  attempt();
} catch (const c10::Error &error) {
  fail(error.what_without_backtrace());
} catch (const std::exception &error) {
  fail(error.what());
} catch (...) {
  fail("an exception that is no std::exception");
}
} // namespace behavior
} // namespace rust

namespace tsquant {

// The module in the file, on the CPU; throws where one of its tensors reaches out of the bytes that the file has for it.
torch::jit::Module load_within_bounds(const std::string &path);

struct Visitor;
struct Work;
struct ArgumentRow;
struct TensorRow;
struct AttributeRow;
struct OpCount;
struct ListingRows;
struct TapRow;
enum class TapKind : std::uint8_t;
struct PlaceRow;
struct QuantizerRow;
struct ParameterRow;
struct ExtraFile;
struct OperandRow;
struct EditRows;
struct AttributeOfOp;
struct ResultRow;
enum class Pass : std::uint8_t;
enum class ValueKind : std::uint8_t;

// A named tensor; a constant is that tensor if it begins at the same memory and has as many values.
struct Named {
  std::string name;
  std::int64_t numel;
};
using Names = std::unordered_map<const void *, Named>;
// The name of a constant; empty where it has none.
std::string name_of(const Names &names, const at::Tensor &constant);

// An IValue: an argument or an output of a model.
struct Value {
  c10::IValue inner;
};

std::unique_ptr<Value> value_none();
std::unique_ptr<Value> value_bool(bool x);
std::unique_ptr<Value> value_int(std::int64_t x);
std::unique_ptr<Value> value_float(double x);
std::unique_ptr<Value> value_from_tensor(const at::Tensor &x);
ValueKind value_kind(const Value &v);
std::unique_ptr<at::Tensor> value_tensor(const Value &v);
rust::String value_type(const Value &v);
std::size_t value_len(const Value &v);
std::unique_ptr<Value> value_at(const Value &v, std::size_t index);
rust::String value_key(const Value &v, std::size_t index);

// True if the tensor's values fill its memory without gaps, in whatever order.
bool is_dense(const at::Tensor &t);
rust::String torch_version();
void keep_freed_memory();

// A module as loaded.
struct Module {
  torch::jit::Module inner;
};

std::unique_ptr<Module> load_module(rust::Str path);
std::unique_ptr<Module> share_module(const Module &m);
bool has_method(const Module &m, rust::Str name);
rust::Vec<rust::String> method_names(const Module &m);
rust::Vec<ArgumentRow> arguments(const Module &m);
rust::Vec<rust::String> return_types(const Module &m);
rust::Vec<TensorRow> named_tensors(const Module &m);
// Everything that the module and those inside it hold beside modules, None and `training`, and whether forward uses it.
rust::Vec<AttributeRow> attribute_rows(const Module &m);
rust::Vec<rust::String> module_paths(const Module &m);
rust::Vec<OpCount> op_counts(const Module &m);
bool is_training(const Module &m);
void set_eval(const Module &m);
void cast_to_float(const Module &m);

// Arguments of forward, bound: positional ones first, then those by name, defaults filled in, types checked.
struct Arguments {
  std::vector<c10::IValue> positional;
  std::unordered_map<std::string, c10::IValue> named;
};
std::unique_ptr<Arguments> new_arguments();
void push_named(Arguments &a, rust::Str name, const Value &v);
void bind_arguments(const Module &m, Arguments &a);
std::unique_ptr<Value> call_forward(const Module &m, const Arguments &a);

// A frozen module whose forward graph is edited in place by passes.
struct Frozen {
  torch::jit::Module original; // keeps the storage alive that `names` points to
  torch::jit::Module module;
  std::shared_ptr<torch::jit::Graph> graph;
  Names names; // data pointer of a parameter or buffer -> its dotted name
};

std::unique_ptr<Frozen> freeze(const Module &m);
std::size_t run_pass(Frozen &f, Pass pass);
// Lets the model return these values, by their numbers in the listing, through aten::alias: a quantizer can then stand in front of it.
void alias_outputs(Frozen &f, rust::Slice<const std::size_t> values);
rust::Vec<rust::String> attribute_names(const Frozen &f);
rust::String graph_text(const Frozen &f);
ListingRows list_graph(const Frozen &f);
std::unique_ptr<at::Tensor> constant_tensor(const Frozen &f, std::size_t value);

// A device is the number of a GPU, -1 for the processor, or -2 for libtorch's meta device: it computes nothing but shapes, and
// refuses tensors of other devices as a GPU does.

// Where the libtorch in use lies; empty if that cannot be told.
rust::String libtorch_folder();
// Opens libtorch's CUDA library and sets CUDA up; throws where either fails.
void open_cuda(rust::Str library);
std::int32_t device_count();
// Computes something there.
void try_device(std::int32_t index);
void prepare_device(bool allow_tf32);
// Whether kernels add up in an order of their own; returns whether they did before.
bool set_deterministic(bool on);
// The ops that libtorch could not run in one order since the last call.
rust::Vec<rust::String> take_unordered();
// Moves parameters, buffers, other attributes and the constants in the code of all methods.
void move_module(const Module &m, std::int32_t index);
// A copy on a GPU, begun on a stream of its own; what is begun there from now on waits for it.
std::unique_ptr<at::Tensor> upload(const at::Tensor &t, std::int32_t index);
void synchronize(std::int32_t index);
std::int64_t peak_device_bytes(std::int32_t index);
void forget_peak(std::int32_t index);

// Tensors on their way into a graph.
struct Tensors {
  std::vector<at::Tensor> inner;
};
std::unique_ptr<Tensors> new_tensors();
void push_tensor(Tensors &list, const at::Tensor &tensor);
// Null for a tensor that is not defined.

// An instrumented copy of a graph, ready to run op by op.
struct Executable {
  std::shared_ptr<torch::jit::Graph> graph;
  torch::jit::Code code;
  torch::jit::Module state; // run from a copy of it where the graph still has state
  bool stateful = false;
  bool writes_arguments = false;
};

std::unique_ptr<Executable> instrument(const Frozen &f, rust::Slice<const TapRow> taps,
                                       rust::Slice<const PlaceRow> places, const Tensors &tensors);
std::unique_ptr<Executable> executable_of(const Module &m);
// The threads that libtorch's own kernels run on, and numbers below `count` handed to them one by one.
std::size_t thread_count();
void in_parallel(std::size_t count, const Work &work);
std::unique_ptr<Value> run(const Executable &e, const Arguments &a, Visitor &visitor);

// A run whose gradients can be asked for: its output, and what its gradients flow to.
struct Gradients;
struct Recording {
  c10::IValue output;
  std::vector<at::Tensor> leaves; // the lifted constants, then values that began to need a gradient at their tap
  std::shared_ptr<Gradients> gradients;
};

// As `instrument`, with these constants as further inputs.
std::unique_ptr<Executable> differentiable(const Frozen &f, rust::Slice<const TapRow> taps,
                                           rust::Slice<const std::size_t> lifted);
// Arguments of four axes may be put into memory with their channels last.
std::unique_ptr<Recording> record(const Executable &e, const Arguments &a, const Tensors &lifted, bool channels_last,
                                  Visitor &visitor);
std::unique_ptr<Value> recorded_output(const Recording &r);
// The visitor gets the gradients of sum(outputs * directions) with respect to tapped values and lifted constants as they come;
// nothing of them is kept. Without `keep` the recording is of no use afterwards.
void backward(const Recording &r, const Tensors &outputs, const Tensors &directions, bool keep, Visitor &visitor);

void emit_module(const Frozen &f, rust::Slice<const QuantizerRow> quantizers,
                 rust::Slice<const ParameterRow> parameters, const Tensors &tensors,
                 rust::Slice<const ExtraFile> files, rust::Str path);

// The graph with these edits, and without what nothing reads then, as a file; only parameters that are read are part of it.
void emit_edited(const Frozen &f, const EditRows &edits, const Tensors &made_of,
                 rust::Slice<const ParameterRow> parameters, const Tensors &tensors,
                 rust::Slice<const ExtraFile> files, rust::Str path);
// The same to run, with everything that it had before: taps may be among the inserted ops.
std::unique_ptr<Executable> edited(const Frozen &f, const EditRows &edits, const Tensors &made_of,
                                   rust::Slice<const PlaceRow> places, const Tensors &tensors);

// Packs a weight by one op and runs another on it, once or more often; that takes x, the packed weight, scale and zero point of
// its result.
std::unique_ptr<at::Tensor> pack_and_run(const AttributeOfOp &pack, const Tensors &made_of, rust::Str op,
                                         const at::Tensor &x, const ResultRow &result);

// A frozen copy, as users make one to run it; optimized, it is fit for nothing but inference on this machine.
std::unique_ptr<Module> freeze_for_inference(const Module &m, bool optimized);
// By libtorch's own executor and without a copy of the module: it has to be without state.
std::unique_ptr<Value> call_as_it_is(const Module &m, const Arguments &a);

// The library that 8-bit kernels run on, and those that this libtorch has; each process has one.
rust::String quantized_engine();
rust::Vec<rust::String> quantized_engines();
void set_quantized_engine(rust::Str name);

// Shared by the source files; not seen from Rust.

// Makes the operators of taps known to libtorch.
void register_operators();
// The value of an attribute with this dotted name, read at the insertion point; modules on the way are made where they are missing.
torch::jit::Value *add_attribute(const torch::jit::Module &module, torch::jit::Graph &graph, const std::string &name,
                                 const c10::IValue &attribute, bool is_parameter);
// Devices that were stored when the model was traced become that of the first tensor that comes in.
void follow_device(torch::jit::Graph &graph);
// What freezing left in a module whose graph no longer reads it.
void drop_attributes(torch::jit::Module &module);
// Brings everything to the processor and writes the file.
void write_module(const torch::jit::Module &module, torch::jit::Graph &graph, rust::Slice<const ExtraFile> files,
                  rust::Str path);

// Brings the tensors and devices among a graph's constants to a device.
void move_constants(torch::jit::Graph &graph, at::Device device);
// The same for the attributes of a module and those inside it, without touching the tensors themselves.
void move_attributes(const torch::jit::Module &module, at::Device device);

// All values of a graph in the one order that Rust's value numbers mean; the same for a copy of the graph.
std::vector<torch::jit::Value *> enumerate_values(torch::jit::Graph &graph);
// A pass of our own marks a node with the module that owns its weight, as a scope of this name.
extern const char *const kLayerScope;
// Puts the taps into a graph whose values these are.
void insert_taps(torch::jit::Graph &graph, const std::vector<torch::jit::Value *> &values,
                 rust::Slice<const TapRow> taps);
// Lets the graph read the tensor at this place. A value that it is added to is the sum from then on, in `values` too.
void put_tensor(torch::jit::Graph &graph, std::vector<torch::jit::Value *> &values, const PlaceRow &place,
                torch::jit::Value *tensor);
// Makes an executable ready to run, once its graph is as it should be.
void prepare(Executable &executable, const torch::jit::Module &state);
// The state and the arguments of one run.
torch::jit::Stack stack_for(const Executable &e, const Arguments &a);
// Makes the visitor that of the runs on this thread while it lives.
class CurrentVisitor {
public:
  explicit CurrentVisitor(Visitor &visitor);
  ~CurrentVisitor();
  CurrentVisitor(const CurrentVisitor &) = delete;
  CurrentVisitor &operator=(const CurrentVisitor &) = delete;

private:
  Visitor *previous_;
};
// The operator of taps on gradients.
void tap_gradient(torch::jit::Stack &stack);
// True if running the graph needs its module: something beside the constants folded into it.
bool uses_self(const torch::jit::Graph &graph);
bool has_tensor_data(const at::Tensor &t);
// Copies of the tensors, for a graph that writes to its arguments.
std::vector<c10::IValue> fresh(const std::vector<c10::IValue> &arguments);
// The node to insert in front of so that the new node comes right behind the value.
torch::jit::Node *node_after(torch::jit::Value *value);
// True for ops that put values together to a list, tuple or dict and do nothing else.
bool is_container(const torch::jit::Node *node);
// Whether the model does nothing with a value but return it, by itself or in lists, tuples and dicts.
bool only_returned(const torch::jit::Graph &graph, const torch::jit::Value *value);
// Lets all users of a value read the substitute's output instead, except the substitute itself and the model's own
// outputs, which keep the value; by_second_name: also those that are returned through aten::alias.
void replace_inner_uses(torch::jit::Graph &graph, torch::jit::Value *value, torch::jit::Node *substitute,
                        bool by_second_name);

} // namespace tsquant
