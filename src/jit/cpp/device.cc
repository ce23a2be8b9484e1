// GPUs: opening libtorch's CUDA half, moving modules and tensors, and what a process-wide setting says of arithmetic there.
#include "shim.h"

#include <dlfcn.h>

#include <functional>
#include <mutex>
#include <set>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/util/env.h>
#include <torch/csrc/jit/ir/constants.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

namespace {

at::Device device_of(std::int32_t index) {
  if (index >= 0)
    return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
  return index == -1 ? at::kCPU : at::kMeta;
}

// Numbers to libtorch wherever they live; what is read as a size is better off on the processor.
bool stays(const at::Tensor &t) { return t.dim() == 0 && t.scalar_type() != at::kFloat; }

at::Tensor moved(const at::Tensor &t, at::Device device) {
  return t.defined() && !stays(t) ? t.detach().to(device) : t;
}

// Whether a tensor in a constant, or what it says of a device, belongs elsewhere.
bool is_elsewhere(const c10::IValue &value, at::Device device) {
  bool found = false;
  value.visit([&](const c10::IValue &inner) {
    if (inner.isTensor())
      found = found || (inner.toTensor().defined() && !stays(inner.toTensor()) && inner.toTensor().device() != device);
    else if (inner.isDevice())
      found = found || inner.toDevice() != device;
    return found;
  });
  return found;
}

void for_each_constant(torch::jit::Block *block, const std::function<void(torch::jit::Node *)> &visit) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    auto *node = *it;
    ++it; // the visit may destroy the node
    for (auto *inner : node->blocks())
      for_each_constant(inner, visit);
    if (node->kind() == torch::jit::prim::Constant)
      visit(node);
  }
}

// A value that holds tensors or names a device, on this device; others as they are.
c10::IValue moved_value(const c10::IValue &value, at::Device device,
                        const std::function<at::Tensor(const at::Tensor &)> &move) {
  const auto inside = [&](const c10::IValue &inner) { return moved_value(inner, device, move); };
  if (value.isTensor())
    return move(value.toTensor());
  if (value.isDevice())
    return device;
  if (value.isList()) {
    const auto list = value.toList();
    c10::impl::GenericList there(list.elementType());
    for (const c10::IValue &element : list.vec())
      there.push_back(inside(element));
    return there;
  }
  if (value.isGenericDict()) {
    const auto dict = value.toGenericDict();
    c10::impl::GenericDict there(dict.keyType(), dict.valueType());
    for (const auto &entry : dict)
      there.insert(inside(entry.key()), inside(entry.value()));
    return there;
  }
  if (value.isTuple()) {
    std::vector<c10::IValue> elements;
    for (const auto &element : value.toTupleRef().elements())
      elements.push_back(inside(element));
    const auto type = value.toTupleRef().type();
    return type->schema() ? c10::ivalue::Tuple::createNamed(std::move(elements), type)
                          : c10::ivalue::Tuple::create(std::move(elements));
  }
  return value;
}

// Lengths of packed sequences have to be on the processor wherever the sequences are.
void keep_lengths_on_cpu(torch::jit::Block *block) {
  for (auto *node : block->nodes()) {
    for (auto *inner : node->blocks())
      keep_lengths_on_cpu(inner);
    if (node->kind() != c10::aten::_pack_padded_sequence)
      continue;
    torch::jit::WithInsertPoint before(node);
    node->replaceInput(1, node->owningGraph()->insert(c10::Symbol::aten("cpu"), {node->input(1)}));
  }
}

// Notes which ops cannot be run in one order; without it each of them would be told on stderr, over and over.
class UnorderedOps : public c10::WarningHandler {
public:
  void process(const c10::Warning &warning) override {
    const auto &message = warning.msg();
    const auto end = message.find(" does not have a deterministic implementation");
    if (end == std::string::npos)
      return c10::WarningHandler::process(warning);
    const std::lock_guard<std::mutex> lock(mutex_);
    names_.insert(message.substr(0, end));
  }

  std::set<std::string> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(names_, {});
  }

private:
  std::mutex mutex_;
  std::set<std::string> names_;
};

UnorderedOps &unordered_ops() {
  static UnorderedOps ops;
  return ops;
}

} // namespace

void move_constants(torch::jit::Graph &graph, at::Device device) {
  for_each_constant(graph.block(), [&](torch::jit::Node *node) {
    const auto value = torch::jit::toIValue(node->output());
    if (!value || !is_elsewhere(*value, device))
      return;
    torch::jit::WithInsertPoint before(node);
    const auto move = [device](const at::Tensor &t) { return moved(t, device); };
    auto *constant = graph.insertConstant(moved_value(*value, device, move));
    // A plain tensor type says nothing of the device.
    constant->setType(value->isTensor() ? c10::TensorType::get() : node->output()->type());
    node->output()->replaceAllUsesWith(constant);
    node->destroy();
  });
}

void move_attributes(const torch::jit::Module &module, at::Device device) {
  // A tensor under several names stays one tensor.
  std::unordered_map<const void *, at::Tensor> known;
  const std::function<at::Tensor(const at::Tensor &)> move_once = [&](const at::Tensor &t) {
    if (!t.defined() || stays(t))
      return t;
    auto &there = known[t.unsafeGetTensorImpl()];
    if (!there.defined())
      there = t.detach().to(device).set_requires_grad(t.requires_grad());
    return there;
  };
  for (const auto &inner : module.modules()) {
    const auto object = inner._ivalue();
    for (std::size_t i = 0; i < inner.type()->numAttributes(); ++i) {
      const auto value = object->getSlot(i);
      // Modules are visited themselves.
      if (!value.isObject() && is_elsewhere(value, device))
        object->setSlot(i, moved_value(value, device, move_once));
    }
  }
}

rust::String libtorch_folder() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void *>(&at::globalContext), &info) == 0 || info.dli_fname == nullptr)
    return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/'));
}

void open_cuda(rust::Str library) {
  // Read when the first product is computed: without it products on a GPU add up in any order.
  c10::utils::set_env("CUBLAS_WORKSPACE_CONFIG", ":4096:8", false);
  const std::string path(library.data(), library.size());
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    const auto *reason = dlerror();
    TORCH_CHECK(false, reason == nullptr ? "it cannot be opened" : reason);
  }
  // libtorch asks once for its CUDA half and believes the answer for ever.
  TORCH_CHECK(at::globalContext().hasCUDART(), "it was opened after libtorch had asked for it");
  at::globalContext().lazyInitDevice(at::kCUDA);
}

std::int32_t device_count() { return at::accelerator::deviceCount(); }

void try_device(std::int32_t index) {
  const auto sum = at::arange(4, at::TensorOptions(device_of(index)).dtype(at::kFloat)).square().sum();
  TORCH_CHECK(sum.item<float>() == 14.0f, "it adds up wrongly");
}

void prepare_device(bool allow_tf32) {
  auto &context = at::globalContext();
  context.setAllowTF32CuBLAS(allow_tf32);
  context.setAllowTF32CuDNN(allow_tf32);
  context.setBenchmarkCuDNN(false);
  context.setDeterministicCuDNN(true);
  c10::WarningUtils::set_warning_handler(&unordered_ops());
}

bool set_deterministic(bool on) {
  auto &context = at::globalContext();
  const bool was = context.deterministicAlgorithms();
  context.setDeterministicAlgorithms(on, true);
  context.setDeterministicFillUninitializedMemory(false);
  return was;
}

rust::Vec<rust::String> take_unordered() {
  rust::Vec<rust::String> names;
  for (const auto &name : unordered_ops().take())
    names.push_back(name);
  return names;
}

void move_module(const Module &m, std::int32_t index) {
  const auto device = device_of(index);
  move_attributes(m.inner, device);
  for (auto *function : m.inner._ivalue()->compilation_unit()->get_functions())
    if (auto *with_graph = torch::jit::tryToGraphFunction(*function)) {
      move_constants(*with_graph->graph(), device);
      keep_lengths_on_cpu(with_graph->graph()->block());
    }
}

std::unique_ptr<at::Tensor> upload(const at::Tensor &t, std::int32_t index) {
  const auto device = device_of(index);
  if (!device.is_cuda())
    return std::make_unique<at::Tensor>(t.to(device));
  const c10::impl::VirtualGuardImpl streams(device.type());
  // On a stream of its own, so that it runs beside the batch before.
  static std::mutex mutex;
  static std::unordered_map<std::int32_t, c10::Stream> copying;
  const std::lock_guard<std::mutex> lock(mutex);
  if (copying.count(index) == 0)
    copying.emplace(index, streams.getStreamFromGlobalPool(device));
  const auto stream = copying.at(index);
  const auto user = streams.getStream(device);
  const auto pinned = t.pin_memory();
  at::Tensor there;
  {
    const c10::StreamGuard guard(stream);
    there = pinned.to(device, /*non_blocking=*/true);
  }
  c10::Event is_there(device.type());
  is_there.record(stream);
  is_there.block(user);
  // Its memory is not given away before those who read it are done.
  there.record_stream(user);
  return std::make_unique<at::Tensor>(std::move(there));
}

void synchronize(std::int32_t index) { at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(index)); }

std::int64_t peak_device_bytes(std::int32_t index) {
  const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(index));
  return stats.allocated_bytes[static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
}

void forget_peak(std::int32_t index) {
  at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(index));
}

} // namespace tsquant
