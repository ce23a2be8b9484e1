// A copy of a graph with other ops in it: inserted, fed and led elsewhere as Rust lists it.
#include "shim.h"

#include <algorithm>
#include <map>
#include <unordered_set>

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

namespace {

void enumerate_nodes(torch::jit::Block *block, std::vector<torch::jit::Node *> &nodes) {
  for (auto *node : block->nodes()) {
    if (node->kind() == torch::jit::prim::Constant)
      continue;
    nodes.push_back(node);
    for (auto *inner : node->blocks())
      enumerate_nodes(inner, nodes);
  }
}

// In the order of their numbers in a listing: a block when its node is reached.
void enumerate_blocks(torch::jit::Block *block, std::vector<torch::jit::Block *> &blocks) {
  blocks.push_back(block);
  for (auto *node : block->nodes())
    for (auto *inner : node->blocks())
      enumerate_blocks(inner, blocks);
}

c10::TypePtr type_of(Makes makes) {
  switch (makes) {
  case Makes::Tensors:
    return c10::ListType::ofTensors();
  case Makes::Ints:
    return c10::ListType::ofInts();
  default:
    return c10::TensorType::get();
  }
}

// An operand that is no place in a graph.
c10::IValue plain(const OperandRow &row, const Tensors &tensors) {
  switch (row.kind) {
  case OperandKind::Tensor:
    return tensors.inner.at(row.index);
  case OperandKind::None:
    return {};
  case OperandKind::Bool:
    return row.number != 0;
  case OperandKind::Int:
    return row.number;
  case OperandKind::Float:
    return row.real;
  case OperandKind::Ints:
    return c10::List<std::int64_t>(c10::ArrayRef<std::int64_t>(row.numbers.data(), row.numbers.size()));
  default:
    TORCH_CHECK(false, "an attribute cannot be made of a place in a graph");
  }
}

c10::IValue make(const AttributeOfOp &row, const Tensors &tensors) {
  torch::jit::Stack stack;
  for (const auto &operand : row.operands)
    stack.push_back(plain(operand, tensors));
  if (!row.op.empty())
    c10::Dispatcher::singleton().findSchemaOrThrow(std::string(row.op).c_str(), "").callBoxed(&stack);
  return stack.at(0);
}

class Editor {
public:
  Editor(const torch::jit::Module &module, torch::jit::Graph &graph, const Tensors &tensors)
      : module_(module), graph_(graph), tensors_(tensors), values_(enumerate_values(graph)) {
    enumerate_nodes(graph.block(), nodes_);
    enumerate_blocks(graph.block(), blocks_);
    for (auto *block : blocks_)
      firsts_.push_back(*block->nodes().begin());
  }

  void carry_out(const EditRows &edits) {
    {
      torch::jit::WithInsertPoint at_start(firsts_.at(0));
      for (const auto &row : edits.attributes)
        attributes_.push_back(
            add_attribute(module_, graph_, std::string(row.name), make(row, tensors_), /*is_parameter=*/false));
    }
    for (const auto &row : edits.insertions)
      insert(row);
    for (const auto &row : edits.rewirings) {
      auto *reader = row.is_block ? blocks_.at(row.index)->return_node() : nodes_.at(row.index);
      torch::jit::WithInsertPoint before(reader);
      reader->replaceInput(row.slot, value_of(row.operand));
    }
  }

private:
  torch::jit::Value *value_of(const OperandRow &row) {
    switch (row.kind) {
    case OperandKind::Value:
      return values_.at(row.index);
    case OperandKind::New:
      return made_.at(row.index);
    case OperandKind::Attribute:
      return attributes_.at(row.index);
    default:
      return graph_.insertConstant(plain(row, tensors_));
    }
  }

  void insert(const InsertionRow &row) {
    auto *node = graph_.create(c10::Symbol::fromQualString(std::string(row.op)), 1);
    node->output()->setType(type_of(row.makes));
    place(row, node);
    torch::jit::WithInsertPoint before(node);
    for (const auto &operand : row.inputs)
      node->addInput(value_of(operand));
    made_.push_back(node->output());
  }

  // Behind what was inserted there before.
  void place(const InsertionRow &row, torch::jit::Node *node) {
    if (row.place != Where::After) {
      node->insertBefore(row.place == Where::Start ? firsts_.at(row.index) : nodes_.at(row.index));
      return;
    }
    auto *&last = last_behind_[row.index];
    node->insertAfter(last ? last : nodes_.at(row.index));
    last = node;
  }

  torch::jit::Module module_;
  torch::jit::Graph &graph_;
  const Tensors &tensors_;
  std::vector<torch::jit::Value *> values_;
  std::vector<torch::jit::Node *> nodes_;
  std::vector<torch::jit::Block *> blocks_;
  std::vector<torch::jit::Node *> firsts_;
  std::vector<torch::jit::Value *> attributes_;
  std::vector<torch::jit::Value *> made_;
  std::map<std::size_t, torch::jit::Node *> last_behind_;
};

// Whether a parameter still has a reader, by the addresses of the values that are left.
bool is_read(const PlaceRow &place, const std::vector<torch::jit::Value *> &values,
             const std::unordered_set<const torch::jit::Value *> &left) {
  auto *value = values.at(place.value);
  if (left.count(value) == 0)
    return false;
  return place.kind != PlaceKind::Constant || !value->uses().empty();
}

struct EngineName {
  at::QEngine engine;
  const char *name;
};

constexpr EngineName kEngines[] = {{at::QEngine::X86, "x86"},
                                   {at::QEngine::ONEDNN, "onednn"},
                                   {at::QEngine::FBGEMM, "fbgemm"},
                                   {at::QEngine::QNNPACK, "qnnpack"}};

bool is_supported(at::QEngine engine) {
  const auto &supported = at::globalContext().supportedQEngines();
  return std::find(supported.begin(), supported.end(), engine) != supported.end();
}

} // namespace

void emit_edited(const Frozen &f, const EditRows &edits, const Tensors &made_of,
                 rust::Slice<const ParameterRow> parameters, const Tensors &tensors,
                 rust::Slice<const ExtraFile> files, rust::Str path) {
  auto module = f.module.clone();
  auto graph = module.get_method("forward").graph();
  auto values = enumerate_values(*graph);
  if (!uses_self(*graph))
    drop_attributes(module);
  Editor(module, *graph, made_of).carry_out(edits);
  torch::jit::EliminateDeadCode(graph);
  const auto list = enumerate_values(*graph);
  const std::unordered_set<const torch::jit::Value *> left(list.begin(), list.end());
  follow_device(*graph);
  {
    torch::jit::WithInsertPoint at_start(*graph->block()->nodes().begin());
    for (std::size_t i = 0; i < parameters.size(); ++i)
      if (is_read(parameters[i].place, values, left))
        put_tensor(*graph, values, parameters[i].place,
                   add_attribute(module, *graph, std::string(parameters[i].name), tensors.inner.at(i),
                                 !parameters[i].is_buffer));
  }
  write_module(module, *graph, files, path);
}

std::unique_ptr<Executable> edited(const Frozen &f, const EditRows &edits, const Tensors &made_of,
                                   rust::Slice<const PlaceRow> places, const Tensors &tensors) {
  register_operators();
  const auto module = f.module.clone();
  auto executable = std::make_unique<Executable>();
  executable->graph = module.get_method("forward").graph();
  auto &graph = *executable->graph;
  auto values = enumerate_values(graph);
  Editor(module, graph, made_of).carry_out(edits);
  {
    torch::jit::WithInsertPoint at_start(*graph.block()->nodes().begin());
    for (std::size_t i = 0; i < places.size(); ++i)
      put_tensor(graph, values, places[i], graph.insertConstant(tensors.inner.at(i)));
  }
  prepare(*executable, module);
  return executable;
}

std::unique_ptr<at::Tensor> pack_and_run(const AttributeOfOp &pack, const Tensors &made_of, rust::Str op,
                                         const at::Tensor &x, const ResultRow &result) {
  at::NoGradGuard no_grad;
  const auto packed = make(pack, made_of);
  const std::string name(op.data(), op.size());
  // Kernels of convolutions have an older overload beside the one that packed weights are for.
  const auto newer = c10::Dispatcher::singleton().findSchema({name, "new"});
  const auto handle = newer ? *newer : c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  torch::jit::Stack stack;
  for (std::size_t i = 0; i < result.runs; ++i) {
    stack = {x, packed, result.scale, result.zero_point};
    handle.callBoxed(&stack);
  }
  return std::make_unique<at::Tensor>(stack.at(0).toTensor());
}

std::unique_ptr<Module> freeze_for_inference(const Module &m, bool optimized) {
  auto module = m.inner.clone();
  module.eval();
  auto frozen = std::make_unique<Module>(Module{torch::jit::freeze(module)});
  if (optimized)
    frozen->inner = torch::jit::optimize_for_inference(frozen->inner);
  return frozen;
}

std::unique_ptr<Value> call_as_it_is(const Module &m, const Arguments &a) {
  at::NoGradGuard no_grad;
  auto module = m.inner;
  return std::make_unique<Value>(Value{module.forward(a.positional)});
}

rust::String quantized_engine() {
  for (const auto &[engine, name] : kEngines)
    if (engine == at::globalContext().qEngine())
      return name;
  return "none";
}

rust::Vec<rust::String> quantized_engines() {
  rust::Vec<rust::String> names;
  for (const auto &[engine, name] : kEngines)
    if (is_supported(engine))
      names.push_back(name);
  return names;
}

void set_quantized_engine(rust::Str name) {
  for (const auto &[engine, known] : kEngines)
    if (name == rust::Str(known) && is_supported(engine)) {
      at::globalContext().setQEngine(engine);
      return;
    }
  TORCH_CHECK(false, "this libtorch has no engine ", std::string(name.data(), name.size()));
}

} // namespace tsquant
