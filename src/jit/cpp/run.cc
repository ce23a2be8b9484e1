// Instrumented copies of a graph: operators that call into Rust while the model runs.
#include "shim.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <algorithm>
#include <mutex>
#include <thread>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/runtime/custom_operator.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

namespace {

// The visitor of the run in progress on this thread; the interpreter calls operators on the thread that runs it.
thread_local Visitor *current_visitor = nullptr;

Visitor &visitor_or_throw() {
  TORCH_CHECK(current_visitor != nullptr, "an instrumented graph was run without a visitor");
  return *current_visitor;
}

void tap(torch::jit::Stack &stack) {
  const auto site = torch::jit::pop(stack).toInt();
  const auto &value = torch::jit::peek(stack, 0, 1).toTensor();
  if (value.defined())
    visitor_or_throw().observe(site, value);
}

void simulate(torch::jit::Stack &stack) {
  const auto site = torch::jit::pop(stack).toInt();
  auto value = torch::jit::pop(stack).toTensor();
  if (value.defined()) {
    auto substitute = visitor_or_throw().substitute(site, value);
    value = std::move(*substitute);
  }
  torch::jit::push(stack, std::move(value));
}

bool writes_arguments(const std::shared_ptr<torch::jit::Graph> &graph) {
  const torch::jit::AliasDb aliases(graph);
  const auto &inputs = graph->inputs();
  return std::any_of(inputs.begin() + 1, inputs.end(), [&](auto *input) { return aliases.hasWriters(input); });
}

// True if running the graph may change what its module holds.
bool may_write_state(torch::jit::Block *block) {
  for (auto *node : block->nodes()) {
    const auto kind = node->kind();
    const auto *schema = node->maybeSchema();
    // These write running statistics in training, which their schemas do not say.
    const bool normalizes = kind == torch::jit::aten::batch_norm || kind == torch::jit::aten::instance_norm;
    if (kind == torch::jit::prim::SetAttr || kind == torch::jit::prim::CallMethod || normalizes ||
        (schema && schema->is_mutable()))
      return true;
    for (auto *inner : node->blocks())
      if (may_write_state(inner))
        return true;
  }
  return false;
}

torch::jit::Symbol operator_of(TapKind kind) {
  switch (kind) {
  case TapKind::Substitute:
  case TapKind::SubstituteInside:
    return c10::Symbol::fromQualString("tsquant::simulate");
  case TapKind::Gradient:
  case TapKind::WholeGradient:
    return c10::Symbol::fromQualString("tsquant::gradient");
  default:
    return c10::Symbol::fromQualString("tsquant::tap");
  }
}

} // namespace

void register_operators() {
  static std::once_flag once;
  std::call_once(once, [] {
    torch::jit::RegisterOperators({
        torch::jit::Operator("tsquant::tap(Tensor(a) x, int site) -> Tensor(a)", tap,
                             c10::AliasAnalysisKind::FROM_SCHEMA),
        torch::jit::Operator("tsquant::simulate(Tensor x, int site) -> Tensor", simulate,
                             c10::AliasAnalysisKind::FROM_SCHEMA),
        torch::jit::Operator("tsquant::gradient(Tensor(a) x, int site) -> Tensor(a)", tap_gradient,
                             c10::AliasAnalysisKind::FROM_SCHEMA),
    });
  });
}

CurrentVisitor::CurrentVisitor(Visitor &visitor) : previous_(current_visitor) { current_visitor = &visitor; }
CurrentVisitor::~CurrentVisitor() { current_visitor = previous_; }

void prepare(Executable &executable, const torch::jit::Module &state) {
  executable.code = torch::jit::Code(executable.graph, "forward");
  executable.stateful = uses_self(*executable.graph) && may_write_state(executable.graph->block());
  executable.writes_arguments = writes_arguments(executable.graph);
  executable.state = state;
}

bool is_container(const torch::jit::Node *node) {
  const auto kind = node->kind();
  return kind == torch::jit::prim::TupleConstruct || kind == torch::jit::prim::ListConstruct ||
         kind == torch::jit::prim::DictConstruct;
}

bool is_output_use(const torch::jit::Graph &graph, const torch::jit::Use &use, bool by_second_name) {
  const auto *user = use.user;
  if (user == graph.return_node())
    return true;
  const bool is_name = by_second_name && user->kind() == c10::aten::alias;
  if (!is_name && !is_container(user))
    return false;
  for (const auto &next : user->output()->uses())
    if (!is_output_use(graph, next, by_second_name))
      return false;
  return true;
}

bool only_returned(const torch::jit::Graph &graph, const torch::jit::Value *value) {
  const auto &uses = value->uses();
  return std::all_of(uses.begin(), uses.end(), [&](const auto &use) { return is_output_use(graph, use, false); });
}

torch::jit::Node *node_after(torch::jit::Value *value) {
  if (value->node()->kind() == torch::jit::prim::Param)
    return *value->node()->owningBlock()->nodes().begin();
  return value->node()->next();
}

void replace_inner_uses(torch::jit::Graph &graph, torch::jit::Value *value, torch::jit::Node *substitute,
                        bool by_second_name) {
  const auto uses = value->uses();
  for (const auto &use : uses)
    if (use.user != substitute && !is_output_use(graph, use, by_second_name))
      use.user->replaceInput(use.offset, substitute->output());
}

// Taps what the value's own node reads: in a branch or loop that need not be there as often as the value read.
void insert_input_tap(torch::jit::Graph &graph, torch::jit::Node *reader, const TapRow &row) {
  auto *value = reader->input(row.slot);
  torch::jit::WithInsertPoint before(reader);
  auto *site = graph.insertConstant(static_cast<std::int64_t>(row.site));
  auto *node = graph.insertNode(graph.create(operator_of(TapKind::Observe), {value, site}, 1));
  node->output()->setType(value->type());
  reader->replaceInput(row.slot, node->output());
}

void insert_taps(torch::jit::Graph &graph, const std::vector<torch::jit::Value *> &values,
                 rust::Slice<const TapRow> taps) {
  register_operators();
  for (const auto &row : taps) {
    auto *value = values.at(row.value);
    if (row.kind == TapKind::Input) {
      insert_input_tap(graph, value->node(), row);
      continue;
    }
    torch::jit::WithInsertPoint after(node_after(value));
    auto *site = graph.insertConstant(static_cast<std::int64_t>(row.site));
    auto *node = graph.insertNode(graph.create(operator_of(row.kind), {value, site}, 1));
    node->output()->setType(value->type());
    if (row.kind == TapKind::WholeGradient)
      value->replaceAllUsesAfterNodeWith(node, node->output());
    else
      replace_inner_uses(graph, value, node, row.kind == TapKind::SubstituteInside);
  }
}

void put_tensor(torch::jit::Graph &graph, std::vector<torch::jit::Value *> &values, const PlaceRow &place,
                torch::jit::Value *tensor) {
  auto *&value = values.at(place.value);
  switch (place.kind) {
  case PlaceKind::Constant:
    value->replaceAllUsesWith(tensor);
    return;
  case PlaceKind::Input:
    value->node()->replaceInput(place.slot, tensor);
    return;
  default:
    break;
  }
  torch::jit::WithInsertPoint after(node_after(value));
  auto *sum = graph.insertNode(graph.create(torch::jit::aten::add, {value, tensor, graph.insertConstant(1)}, 1));
  sum->output()->setType(c10::TensorType::get());
  value->replaceAllUsesAfterNodeWith(sum, sum->output());
  value = sum->output();
}

std::unique_ptr<Executable> instrument(const Frozen &f, rust::Slice<const TapRow> taps,
                                       rust::Slice<const PlaceRow> places, const Tensors &tensors) {
  auto executable = std::make_unique<Executable>();
  executable->graph = f.graph->copy();
  auto &graph = *executable->graph;
  auto values = enumerate_values(graph);
  {
    torch::jit::WithInsertPoint at_start(*graph.block()->nodes().begin());
    for (std::size_t i = 0; i < places.size(); ++i)
      put_tensor(graph, values, places[i], graph.insertConstant(tensors.inner.at(i)));
  }
  insert_taps(graph, values, taps);
  prepare(*executable, f.module);
  return executable;
}

void keep_freed_memory() {
#ifdef __GLIBC__
  // Older versions take 32 MB at most.
  if (mallopt(M_MMAP_THRESHOLD, 1 << 30) == 0)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  // What a thread frees in an arena of its own, no other takes again.
  mallopt(M_ARENA_MAX, static_cast<int>(std::max(std::thread::hardware_concurrency(), 1u)));
#endif
}

std::size_t thread_count() { return static_cast<std::size_t>(std::max(at::get_num_threads(), 1)); }

void in_parallel(std::size_t count, const Work &work) {
  if (count == 0)
    return;
  // libtorch's own loop over a tensor is the way to its threads that needs no OpenMP of ours: an element is a number.
  const auto numbers = at::arange(static_cast<std::int64_t>(count));
  auto iterator = at::TensorIteratorConfig()
                      .add_const_input(numbers)
                      .resize_outputs(false)
                      .declare_static_shape(numbers.sizes())
                      .build();
  iterator.for_each(
      [&work](char **data, const std::int64_t *strides, std::int64_t size) {
        for (std::int64_t i = 0; i < size; ++i)
          work.run(static_cast<std::size_t>(*reinterpret_cast<const std::int64_t *>(*data + i * *strides)));
      },
      1);
}

std::unique_ptr<Executable> executable_of(const Module &m) {
  auto executable = std::make_unique<Executable>();
  executable->graph = m.inner.get_method("forward").graph()->copy();
  torch::jit::Inline(*executable->graph);
  prepare(*executable, m.inner);
  return executable;
}

torch::jit::Stack stack_for(const Executable &e, const Arguments &a) {
  torch::jit::Stack stack;
  stack.reserve(a.positional.size() + 1);
  stack.emplace_back(e.stateful ? e.state.deepcopy()._ivalue() : e.state._ivalue());
  const auto arguments = e.writes_arguments ? fresh(a.positional) : a.positional;
  stack.insert(stack.end(), arguments.begin(), arguments.end());
  // A model that draws random numbers draws the same ones in every run, so that runs can be compared.
  at::manual_seed(0);
  return stack;
}

std::unique_ptr<Value> run(const Executable &e, const Arguments &a, Visitor &visitor) {
  at::NoGradGuard no_grad;
  const CurrentVisitor guard(visitor);
  auto stack = stack_for(e, a);
  torch::jit::InterpreterState(e.code).run(stack);
  return std::make_unique<Value>(Value{torch::jit::pop(stack)});
}

} // namespace tsquant
