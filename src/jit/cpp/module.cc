// Loading a module and what can be asked of it before its graph is touched; arguments and outputs.
#include "shim.h"

#include <map>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/version.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

namespace {

std::string owned(rust::Str s) { return std::string(s.data(), s.size()); }

const c10::FunctionSchema &forward_schema(const Module &m) {
  return m.inner.get_method("forward").function().getSchema();
}

TensorRow describe(const std::string &name, const at::Tensor &t, bool is_buffer) {
  TensorRow row;
  row.name = name;
  row.dtype = c10::toString(t.scalar_type());
  for (auto size : t.sizes())
    row.shape.push_back(size);
  row.bytes = t.numel() * t.element_size();
  row.is_buffer = is_buffer;
  return row;
}

void count_ops(torch::jit::Block *block, std::map<std::string, std::size_t> &counts) {
  for (auto *node : block->nodes()) {
    if (node->kind() != torch::jit::prim::Constant)
      ++counts[node->kind().toQualString()];
    for (auto *inner : node->blocks())
      count_ops(inner, counts);
  }
}

std::string join(const std::string &path, const std::string &name) { return path.empty() ? name : path + "." + name; }

// What the nodes read or write of the module that `paths` begins with, by dotted name. A module that goes anywhere else, into
// a call that is not inlined for instance, may be read whole: its name ends with a dot.
void note_uses(torch::jit::Block *block, std::unordered_map<torch::jit::Value *, std::string> &paths,
               std::set<std::string> &used) {
  for (auto *node : block->nodes()) {
    const bool gets = node->kind() == torch::jit::prim::GetAttr;
    for (std::size_t i = 0; i < node->inputs().size(); ++i) {
      const auto found = paths.find(node->inputs()[i]);
      if (found == paths.end())
        continue;
      if (i > 0 || !(gets || node->kind() == torch::jit::prim::SetAttr)) {
        used.insert(found->second + ".");
        continue;
      }
      const auto path = join(found->second, node->s(torch::jit::attr::name));
      const auto type = gets ? node->output()->type()->cast<c10::ClassType>() : nullptr;
      if (type && type->is_module())
        paths.emplace(node->output(), path);
      else
        used.insert(path);
    }
    for (auto *inner : node->blocks())
      note_uses(inner, paths, used);
  }
}

// The graph with what it does in training left out.
void drop_training(torch::jit::Graph &graph, torch::jit::Block *block) {
  for (auto *node : block->nodes()) {
    for (auto *inner : node->blocks())
      drop_training(graph, inner);
    if (node->kind() == torch::jit::prim::GetAttr && node->s(torch::jit::attr::name) == "training") {
      torch::jit::WithInsertPoint before(node);
      node->output()->replaceAllUsesWith(graph.insertConstant(false));
    }
  }
}

bool is_used(const std::set<std::string> &used, const std::string &name) {
  if (used.count(name) > 0 || used.count(".") > 0)
    return true;
  for (auto dot = name.find('.'); dot != std::string::npos; dot = name.find('.', dot + 1))
    if (used.count(name.substr(0, dot + 1)) > 0)
      return true;
  return false;
}

std::unique_ptr<Value> wrap(c10::IValue v) { return std::make_unique<Value>(Value{std::move(v)}); }

} // namespace

std::unique_ptr<Value> value_none() { return wrap(c10::IValue()); }
std::unique_ptr<Value> value_bool(bool x) { return wrap(c10::IValue(x)); }
std::unique_ptr<Value> value_int(std::int64_t x) { return wrap(c10::IValue(x)); }
std::unique_ptr<Value> value_float(double x) { return wrap(c10::IValue(x)); }
std::unique_ptr<Value> value_from_tensor(const at::Tensor &x) { return wrap(c10::IValue(x)); }

ValueKind value_kind(const Value &v) {
  const auto &x = v.inner;
  if (x.isTensor())
    return x.toTensor().defined() ? ValueKind::Tensor : ValueKind::None;
  if (x.isNone())
    return ValueKind::None;
  if (x.isBool())
    return ValueKind::Bool;
  if (x.isInt())
    return ValueKind::Int;
  if (x.isDouble())
    return ValueKind::Float;
  if (x.isTuple())
    return ValueKind::Tuple;
  if (x.isList())
    return ValueKind::List;
  if (x.isGenericDict())
    return ValueKind::Dict;
  return ValueKind::Other;
}

std::unique_ptr<at::Tensor> value_tensor(const Value &v) { return std::make_unique<at::Tensor>(v.inner.toTensor()); }
rust::String value_type(const Value &v) { return v.inner.type()->repr_str(); }

std::size_t value_len(const Value &v) {
  if (v.inner.isTuple())
    return v.inner.toTupleRef().elements().size();
  if (v.inner.isList())
    return v.inner.toListRef().size();
  return v.inner.toGenericDict().size();
}

std::unique_ptr<Value> value_at(const Value &v, std::size_t index) {
  if (v.inner.isTuple())
    return wrap(v.inner.toTupleRef().elements().at(index));
  if (v.inner.isList())
    return wrap(v.inner.toListRef().at(index));
  auto entry = v.inner.toGenericDict().begin();
  std::advance(entry, index);
  return wrap(entry->value());
}

rust::String value_key(const Value &v, std::size_t index) {
  if (v.inner.isTuple()) {
    const auto type = v.inner.type()->cast<c10::TupleType>();
    if (type && type->schema())
      return type->schema()->arguments().at(index).name();
    return std::to_string(index);
  }
  if (v.inner.isList())
    return std::to_string(index);
  auto entry = v.inner.toGenericDict().begin();
  std::advance(entry, index);
  const auto &key = entry->key();
  return key.isString() ? key.toStringRef() : c10::str(key);
}

std::unique_ptr<Module> load_module(rust::Str path) {
  return std::make_unique<Module>(Module{load_within_bounds(owned(path))});
}

// A handle to the same module.
std::unique_ptr<Module> share_module(const Module &m) { return std::make_unique<Module>(m); }

bool is_dense(const at::Tensor &t) { return t.layout() == at::kStrided && t.is_non_overlapping_and_dense(); }

rust::String torch_version() { return TORCH_VERSION; }

bool has_method(const Module &m, rust::Str name) { return m.inner.find_method(owned(name)).has_value(); }

rust::Vec<rust::String> method_names(const Module &m) {
  rust::Vec<rust::String> names;
  for (const auto &method : m.inner.get_methods())
    names.push_back(method.name());
  return names;
}

rust::Vec<ArgumentRow> arguments(const Module &m) {
  rust::Vec<ArgumentRow> rows;
  bool is_self = true;
  for (const auto &argument : forward_schema(m).arguments()) {
    if (std::exchange(is_self, false))
      continue;
    ArgumentRow row;
    row.name = argument.name();
    row.type_name = argument.type()->repr_str();
    row.has_default = argument.default_value().has_value();
    row.default_text = row.has_default ? c10::str(*argument.default_value()) : "";
    rows.push_back(std::move(row));
  }
  return rows;
}

rust::Vec<rust::String> return_types(const Module &m) {
  rust::Vec<rust::String> types;
  for (const auto &argument : forward_schema(m).returns())
    types.push_back(argument.type()->repr_str());
  return types;
}

rust::Vec<TensorRow> named_tensors(const Module &m) {
  rust::Vec<TensorRow> rows;
  for (const auto &entry : m.inner.named_parameters())
    rows.push_back(describe(entry.name, entry.value, false));
  for (const auto &entry : m.inner.named_buffers())
    rows.push_back(describe(entry.name, entry.value, true));
  return rows;
}

rust::Vec<AttributeRow> attribute_rows(const Module &m) {
  auto graph = m.inner.get_method("forward").graph()->copy();
  torch::jit::Inline(*graph);
  drop_training(*graph, graph->block());
  torch::jit::ConstantPropagationImmutableTypes(graph);
  torch::jit::EliminateDeadCode(graph);
  std::unordered_map<torch::jit::Value *, std::string> paths{{graph->inputs().at(0), ""}};
  std::set<std::string> used;
  note_uses(graph->block(), paths, used);
  rust::Vec<AttributeRow> rows;
  // One module or tensor may stand under several names: a row is used if its place or its tensor is under any of them.
  std::vector<std::pair<const void *, const void *>> identities;
  std::set<const void *> in_use;
  for (const auto &entry : m.inner.named_modules()) {
    const auto type = entry.value.type();
    for (std::size_t i = 0; i < type->numAttributes(); ++i) {
      const auto &value = entry.value._ivalue()->getSlot(i);
      // Every module has `training`; None holds nothing.
      if (value.isModule() || value.isNone() || type->getAttributeName(i) == "training")
        continue;
      const auto name = join(entry.name, type->getAttributeName(i));
      const auto kind = type->is_parameter(i) ? "parameter" : type->is_buffer(i) ? "buffer" : "attribute";
      rows.push_back(AttributeRow{name, kind, is_used(used, name)});
      const bool has_tensor = value.isTensor() && value.toTensor().defined();
      const void *place = &value;
      identities.emplace_back(place, has_tensor ? value.toTensor().unsafeGetTensorImpl() : place);
      if (rows[rows.size() - 1].is_used)
        in_use.insert({identities.back().first, identities.back().second});
    }
  }
  for (std::size_t i = 0; i < rows.size(); ++i)
    rows[i].is_used = in_use.count(identities[i].first) > 0 || in_use.count(identities[i].second) > 0;
  return rows;
}

rust::Vec<rust::String> module_paths(const Module &m) {
  rust::Vec<rust::String> paths;
  for (const auto &entry : m.inner.named_modules())
    paths.push_back(entry.name);
  return paths;
}

rust::Vec<OpCount> op_counts(const Module &m) {
  auto graph = m.inner.get_method("forward").graph()->copy();
  torch::jit::Inline(*graph);
  std::map<std::string, std::size_t> counts;
  count_ops(graph->block(), counts);
  rust::Vec<OpCount> rows;
  for (const auto &[op, count] : counts)
    rows.push_back(OpCount{op, count});
  return rows;
}

bool is_training(const Module &m) {
  for (const auto &module : m.inner.modules())
    if (module.hasattr("training") && module.attr("training").isBool() && module.attr("training").toBool())
      return true;
  return false;
}

void set_eval(const Module &m) {
  auto module = m.inner;
  module.eval();
}

std::unique_ptr<Tensors> new_tensors() { return std::make_unique<Tensors>(); }
void push_tensor(Tensors &list, const at::Tensor &tensor) { list.inner.push_back(tensor); }

std::vector<c10::IValue> fresh(const std::vector<c10::IValue> &arguments) {
  std::vector<c10::IValue> copies;
  for (const auto &argument : arguments)
    copies.push_back(argument.isTensor() ? c10::IValue(argument.toTensor().clone()) : argument);
  return copies;
}

std::unique_ptr<Arguments> new_arguments() { return std::make_unique<Arguments>(); }
void push_named(Arguments &a, rust::Str name, const Value &v) { a.named.insert_or_assign(owned(name), v.inner); }

void bind_arguments(const Module &m, Arguments &a) {
  // The schema counts the module itself as its first argument.
  std::vector<c10::IValue> inputs{m.inner._ivalue()};
  inputs.insert(inputs.end(), a.positional.begin(), a.positional.end());
  forward_schema(m).checkAndNormalizeInputs(inputs, a.named);
  a.positional.assign(inputs.begin() + 1, inputs.end());
  a.named.clear();
}

std::unique_ptr<Value> call_forward(const Module &m, const Arguments &a) {
  at::NoGradGuard no_grad;
  // A copy, so that a model with state starts each call from the state in its file.
  auto module = m.inner.deepcopy();
  at::manual_seed(0);
  return wrap(module.forward(fresh(a.positional)));
}

} // namespace tsquant
