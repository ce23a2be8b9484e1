// Writing an edited graph as a TorchScript file of its own.
#include "shim.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/serialization/export.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

namespace {

std::vector<std::string> split(const std::string &dotted) {
  std::vector<std::string> parts{""};
  for (const char c : dotted) {
    if (c == '.')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

// The child of that name, made where it is missing.
torch::jit::Module child_of(torch::jit::Module &parent, const std::string &name) {
  if (!parent.hasattr(name))
    parent.register_module(
        name, torch::jit::Module(c10::QualifiedName("__torch__.tsquant.Node"), parent._ivalue()->compilation_unit(),
                                 /*shouldMangle=*/true));
  return parent.attr(name).toModule();
}

void add_quantizer(torch::jit::Graph &graph, torch::jit::Value *value, const QuantizerRow &row) {
  static const auto op = c10::Symbol::fromQualString("aten::fake_quantize_per_tensor_affine");
  torch::jit::WithInsertPoint after(node_after(value));
  auto *node = graph.create(op,
                            {value, graph.insertConstant(row.scale), graph.insertConstant(row.zero_point),
                             graph.insertConstant(row.quant_min), graph.insertConstant(row.quant_max)},
                            1);
  graph.insertNode(node);
  node->output()->setType(c10::TensorType::get());
  replace_inner_uses(graph, value, node, !row.is_returned);
}

// libtorch's archive writer throws out of its destructor once a write has failed, which ends the process. So it is told that
// all goes well, and the first failure is thrown when it is done.
void save(const torch::jit::Module &module, const torch::jit::ExtraFilesMap &extra, const std::string &path) {
  int failure = 0;
  errno = 0;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  const auto note_failure = [&] {
    if (!file && failure == 0)
      failure = errno != 0 ? errno : EIO;
  };
  note_failure();
  torch::jit::ExportModule(
      module,
      [&](const void *bytes, std::size_t count) {
        if (failure == 0) {
          errno = 0;
          file.write(static_cast<const char *>(bytes), static_cast<std::streamsize>(count));
          note_failure();
        }
        return count;
      },
      extra);
  errno = 0;
  file.close();
  note_failure();
  TORCH_CHECK(failure == 0, std::strerror(failure));
}

} // namespace

torch::jit::Value *add_attribute(const torch::jit::Module &module, torch::jit::Graph &graph, const std::string &name,
                                 const c10::IValue &attribute, bool is_parameter) {
  const auto path = split(name);
  auto owner = module;
  auto *object = graph.inputs().at(0);
  for (std::size_t i = 0; i + 1 < path.size(); ++i) {
    auto child = child_of(owner, path[i]);
    object = graph.insertGetAttr(object, path[i]);
    owner = child;
  }
  if (attribute.isTensor())
    owner.register_parameter(path.back(), attribute.toTensor().to(at::kCPU), /*is_buffer=*/!is_parameter);
  else
    owner.register_attribute(path.back(), attribute.type(), attribute);
  return graph.insertGetAttr(object, path.back());
}

void follow_device(torch::jit::Graph &graph) {
  torch::jit::Value *input = nullptr;
  for (auto *candidate : graph.inputs())
    if (!input && candidate->type()->isSubtypeOf(*c10::TensorType::get()))
      input = candidate;
  torch::jit::WithInsertPoint at_start(*graph.block()->nodes().begin());
  for (auto *value : enumerate_values(graph)) {
    if (value->node()->kind() != torch::jit::prim::Constant || value->type()->kind() != c10::TypeKind::DeviceObjType ||
        !input)
      continue;
    auto *device = graph.create(torch::jit::prim::device, {input}, 1);
    device->output()->setType(c10::DeviceObjType::get());
    graph.insertNode(device);
    value->replaceAllUsesWith(device->output());
  }
}

void drop_attributes(torch::jit::Module &module) {
  const auto type = module.type();
  while (type->numAttributes() > 0) {
    type->unsafeRemoveAttribute(type->getAttributeName(0));
    module._ivalue()->unsafeRemoveSlot(0);
  }
}

void write_module(const torch::jit::Module &module, torch::jit::Graph &graph, rust::Slice<const ExtraFile> files,
                  rust::Str path) {
  for (auto *value : enumerate_values(graph))
    if (value->node()->kind() == torch::jit::prim::Constant && value->uses().empty())
      value->node()->destroy();
  // The file is the same wherever it was made, and can be loaded where there is no GPU.
  move_attributes(module, at::kCPU);
  move_constants(graph, at::kCPU);
  graph.lint();
  torch::jit::ExtraFilesMap extra;
  for (const auto &file : files)
    extra.emplace(std::string(file.name), std::string(file.text));
  save(module, extra, std::string(path.data(), path.size()));
}

void emit_module(const Frozen &f, rust::Slice<const QuantizerRow> quantizers,
                 rust::Slice<const ParameterRow> parameters, const Tensors &tensors,
                 rust::Slice<const ExtraFile> files, rust::Str path) {
  auto module = f.module.clone();
  auto graph = module.get_method("forward").graph();
  auto values = enumerate_values(*graph);
  if (!uses_self(*graph))
    drop_attributes(module);
  follow_device(*graph);
  {
    torch::jit::WithInsertPoint at_start(*graph->block()->nodes().begin());
    for (std::size_t i = 0; i < parameters.size(); ++i)
      put_tensor(*graph, values, parameters[i].place,
                 add_attribute(module, *graph, std::string(parameters[i].name), tensors.inner.at(i),
                               !parameters[i].is_buffer));
  }
  for (const auto &row : quantizers)
    add_quantizer(*graph, values.at(row.value), row);
  write_module(module, *graph, files, path);
}

} // namespace tsquant
