// A graph as plain data.
#include "shim.h"

#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

const char *const kLayerScope = "tsquant_layer:";

namespace {

using torch::jit::Block;
using torch::jit::Node;

void enumerate_block(Block *block, std::vector<torch::jit::Value *> &values) {
  for (auto *parameter : block->inputs())
    values.push_back(parameter);
  for (auto *node : block->nodes()) {
    for (auto *output : node->outputs())
      values.push_back(output);
    for (auto *inner : node->blocks())
      enumerate_block(inner, values);
  }
}

std::string call_stack_path(const Node *node) {
  const auto stack = node->callstack();
  std::string path;
  if (!stack)
    return path;
  for (const auto &entry : (*stack)->vec()) {
    const auto &module = std::get<2>(entry);
    if (!module)
      continue;
    const auto name = module->instance_name();
    if (name.empty() || name == "SELF" || name == "self")
      continue;
    path += (path.empty() ? "" : ".") + name;
  }
  return path;
}

std::string layer_of(Node *node) {
  const auto scope = node->scope();
  const std::string name = scope && !scope->isBlank() && !scope->isRoot() ? scope->name().toUnqualString() : "";
  const std::string mark = kLayerScope;
  return name.rfind(mark, 0) == 0 ? name.substr(mark.size()) : "";
}

class Lister {
public:
  explicit Lister(const Frozen &frozen) : frozen_(frozen), aliases_(frozen.graph) {}

  ListingRows list() {
    const auto values = enumerate_values(*frozen_.graph);
    for (std::size_t i = 0; i < values.size(); ++i)
      ids_.emplace(values[i], i);
    for (auto *value : values)
      rows_.values.push_back(describe(value));
    add_block(frozen_.graph->block(), -1);
    return std::move(rows_);
  }

private:
  ValueRow describe(torch::jit::Value *value) {
    ValueRow row;
    row.name = value->debugName();
    row.type_name = value->type()->repr_str();
    row.is_tensor = value->type()->isSubtypeOf(*c10::TensorType::get());
    row.is_constant = value->node()->kind() == torch::jit::prim::Constant;
    row.has_writers = row.is_tensor && !row.is_constant && aliases_.hasWriters(value);
    row.pointer = 0;
    row.storage_bytes = 0;
    if (row.is_constant)
      describe_constant(*torch::jit::toIValue(value), row);
    return row;
  }

  void describe_constant(const c10::IValue &constant, ValueRow &row) {
    if (!constant.isTensor()) {
      row.text = c10::str(constant);
      return;
    }
    const auto &tensor = constant.toTensor();
    row.is_tensor = tensor.defined();
    if (!tensor.defined())
      return;
    row.dtype = c10::toString(tensor.scalar_type());
    for (auto size : tensor.sizes())
      row.shape.push_back(size);
    if (!has_tensor_data(tensor))
      return;
    for (auto stride : tensor.strides())
      row.strides.push_back(stride);
    row.pointer = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
    row.storage_bytes = tensor.numel() * tensor.element_size();
    row.parameter = name_of(frozen_.names, tensor);
  }

  std::size_t add_block(Block *block, std::int64_t owner) {
    const auto id = rows_.blocks.size();
    rows_.blocks.push_back(BlockRow{});
    BlockRow row;
    row.owner = owner;
    for (auto *value : block->inputs())
      row.parameters.push_back(ids_.at(value));
    for (auto *value : block->outputs())
      row.returns.push_back(ids_.at(value));
    rows_.blocks[id] = std::move(row);
    for (auto *node : block->nodes())
      if (node->kind() != torch::jit::prim::Constant)
        add_node(node, id);
    return id;
  }

  void add_node(Node *node, std::size_t block) {
    const auto id = rows_.nodes.size();
    NodeRow row;
    row.op = node->kind().toQualString();
    row.block = block;
    row.path = call_stack_path(node);
    row.layer = layer_of(node);
    for (auto *value : node->inputs())
      row.inputs.push_back(ids_.at(value));
    for (auto *value : node->outputs())
      row.outputs.push_back(ids_.at(value));
    rows_.nodes.push_back(std::move(row));
    for (auto *inner : node->blocks()) {
      const auto inner_id = add_block(inner, static_cast<std::int64_t>(id));
      rows_.nodes[id].blocks.push_back(inner_id);
    }
  }

  const Frozen &frozen_;
  torch::jit::AliasDb aliases_;
  std::unordered_map<const torch::jit::Value *, std::size_t> ids_;
  ListingRows rows_;
};

} // namespace

bool has_tensor_data(const at::Tensor &t) {
  return t.defined() && t.layout() == at::kStrided && !t.is_quantized() && t.has_storage() && t.numel() > 0;
}

bool uses_self(const torch::jit::Graph &graph) { return !graph.inputs().at(0)->uses().empty(); }

std::string name_of(const Names &names, const at::Tensor &constant) {
  const auto found = names.find(constant.data_ptr());
  return found != names.end() && found->second.numel == constant.numel() ? found->second.name : "";
}

std::vector<torch::jit::Value *> enumerate_values(torch::jit::Graph &graph) {
  std::vector<torch::jit::Value *> values;
  enumerate_block(graph.block(), values);
  return values;
}

ListingRows list_graph(const Frozen &f) { return Lister(f).list(); }

rust::Vec<rust::String> attribute_names(const Frozen &f) {
  rust::Vec<rust::String> names;
  if (!uses_self(*f.graph))
    return names;
  for (const auto &attribute : f.module.named_attributes())
    names.push_back(attribute.name);
  return names;
}

rust::String graph_text(const Frozen &f) { return f.graph->toString(false); }

std::unique_ptr<at::Tensor> constant_tensor(const Frozen &f, std::size_t value) {
  const auto constant = torch::jit::toIValue(enumerate_values(*f.graph).at(value));
  TORCH_CHECK(constant && constant->isTensor(), "value ", value, " is no constant tensor");
  return std::make_unique<at::Tensor>(constant->toTensor());
}

} // namespace tsquant
