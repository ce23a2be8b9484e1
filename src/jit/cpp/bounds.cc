// Loading, with a look at whether each tensor lies inside the memory that was read for it. A pickle names sizes, strides and
// offset of a tensor and the length of its storage, and the archive's parts hold as many bytes as they like: libtorch's
// unpickler compares none of these.
#include "shim.h"

#include <algorithm>
#include <map>
#include <unordered_set>

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/serialization/import.h>

namespace tsquant {

namespace {

bool add_product(std::size_t &sum, std::int64_t a, std::int64_t b) {
  std::size_t product = 0;
  return a >= 0 && b >= 0 &&
         !__builtin_mul_overflow(static_cast<std::size_t>(a), static_cast<std::size_t>(b), &product) &&
         !__builtin_add_overflow(sum, product, &sum);
}

// Bytes of the storage up to the tensor's last element; false where no number of 64 bits holds them.
bool end_of(const at::Tensor &t, std::size_t &bytes) {
  bytes = 0;
  if (std::any_of(t.sizes().begin(), t.sizes().end(), [](std::int64_t size) { return size == 0; }))
    return true;
  std::size_t elements = 1;
  for (std::int64_t axis = 0; axis < t.dim(); ++axis)
    if (!add_product(elements, t.size(axis) - 1, t.stride(axis)))
      return false;
  if (!add_product(elements, t.storage_offset(), 1))
    return false;
  return !__builtin_mul_overflow(elements, t.element_size(), &bytes);
}

// Memory that libtorch's allocator hands out on this thread: what a profiler is told.
class Allocations : public c10::MemoryReportingInfoBase {
public:
  void reportMemoryUsage(void *start, std::int64_t bytes, std::size_t, std::size_t, c10::Device) override {
    if (bytes > 0)
      bytes_[start] = static_cast<std::size_t>(bytes);
    else
      bytes_.erase(start);
  }

  bool memoryProfilingEnabled() const override { return true; }

  // What a storage may hold, whatever it says.
  std::size_t room(const at::Storage &storage) const {
    const auto *start = storage.data();
    if (start == nullptr)
      return 0;
    const auto found = bytes_.find(start);
    return found == bytes_.end() ? storage.nbytes() : std::min(storage.nbytes(), found->second);
  }

private:
  std::map<const void *, std::size_t> bytes_;
};

class Walk {
public:
  explicit Walk(const Allocations &allocations) : allocations_(allocations) {}

  void visit(const c10::IValue &value) {
    value.visit([this](const c10::IValue &inner) {
      if (inner.isTensor())
        check(inner.toTensor());
      // Objects and containers may hold themselves.
      return inner.isPtrType() && !seen_.insert(inner.internalToPointer()).second;
    });
  }

  void visit(const torch::jit::Block *block) {
    for (const auto *node : block->nodes()) {
      if (node->kind() == torch::jit::prim::Constant)
        if (const auto value = torch::jit::toIValue(node->output())) {
          // Made for this moment: the next one may have its address.
          seen_.clear();
          visit(*value);
        }
      for (const auto *inner : node->blocks())
        visit(inner);
    }
  }

private:
  void check(const at::Tensor &t) const {
    if (!t.defined() || t.layout() != at::kStrided || !t.has_storage())
      return;
    std::size_t end = 0;
    const auto room = allocations_.room(t.storage());
    const bool fits = end_of(t, end) && end <= room;
    TORCH_CHECK(fits, "expected tensors inside their bytes, found one of shape ", t.sizes(), " in ", room, " bytes");
  }

  const Allocations &allocations_;
  std::unordered_set<const void *> seen_;
};

} // namespace

torch::jit::Module load_within_bounds(const std::string &path) {
  const auto allocations = std::make_shared<Allocations>();
  auto module = [&] {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, allocations);
    return torch::jit::load(path, at::Device(at::kCPU));
  }();
  Walk walk(*allocations);
  walk.visit(c10::IValue(module._ivalue()));
  for (auto *function : module._ivalue()->compilation_unit()->get_functions())
    if (auto *with_graph = torch::jit::tryToGraphFunction(*function))
      walk.visit(with_graph->graph()->block());
  return module;
}

} // namespace tsquant
