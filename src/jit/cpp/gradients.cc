// Gradients of a graph's constants and values: a run that libtorch's autograd records, and walks back through it.
#include "shim.h"

#include <mutex>
#include <unordered_set>
#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

// Whom the hooks of a recording tell: nobody but while a walk back is under way. Hooks run on the thread that walks back,
// or on that of the device where its tensors are.
struct Gradients {
  std::mutex mutex;
  Visitor *visitor = nullptr;
  // Whether another walk back will follow.
  bool keep = false;
};

namespace {

// The recording in progress on this thread.
thread_local Recording *current_recording = nullptr;

class CurrentRecording {
public:
  explicit CurrentRecording(Recording &recording) { current_recording = &recording; }
  ~CurrentRecording() { current_recording = nullptr; }
  CurrentRecording(const CurrentRecording &) = delete;
  CurrentRecording &operator=(const CurrentRecording &) = delete;
};

class Listening {
public:
  Listening(Gradients &gradients, Visitor &visitor, bool keep) : gradients_(gradients) { set(&visitor, keep); }
  ~Listening() { set(nullptr, true); }
  Listening(const Listening &) = delete;
  Listening &operator=(const Listening &) = delete;

private:
  void set(Visitor *visitor, bool keep) {
    const std::lock_guard<std::mutex> lock(gradients_.mutex);
    gradients_.visitor = visitor;
    gradients_.keep = keep;
  }

  Gradients &gradients_;
};

// Ways back give the same sums in every run: some of libtorch's kernels add up in any order otherwise.
class Deterministic {
public:
  Deterministic() : context_(at::globalContext()), was_(context_.deterministicAlgorithms()),
                    warned_(context_.deterministicAlgorithmsWarnOnly()),
                    filled_(context_.deterministicFillUninitializedMemory()) {
    context_.setDeterministicAlgorithms(true, true);
    context_.setDeterministicFillUninitializedMemory(false);
  }
  ~Deterministic() {
    context_.setDeterministicAlgorithms(was_, warned_);
    context_.setDeterministicFillUninitializedMemory(filled_);
  }
  Deterministic(const Deterministic &) = delete;
  Deterministic &operator=(const Deterministic &) = delete;

private:
  at::Context &context_;
  bool was_;
  bool warned_;
  bool filled_;
};

bool has_recurrent_layer(const torch::jit::Block *block) {
  for (const auto *node : block->nodes()) {
    if (node->kind() == c10::aten::lstm || node->kind() == c10::aten::gru || node->kind() == c10::aten::rnn_tanh ||
        node->kind() == c10::aten::rnn_relu)
      return true;
    for (const auto *inner : node->blocks())
      if (has_recurrent_layer(inner))
        return true;
  }
  return false;
}

// cuDNN's recurrent layers have gradients in training alone; libtorch's own have them always. No GPU, no difference.
class WithoutCuDNN {
public:
  explicit WithoutCuDNN(bool is_needed) : context_(at::globalContext()), was_(context_.userEnabledCuDNN()) {
    if (is_needed)
      context_.setUserEnabledCuDNN(false);
  }
  ~WithoutCuDNN() { context_.setUserEnabledCuDNN(was_); }
  WithoutCuDNN(const WithoutCuDNN &) = delete;
  WithoutCuDNN &operator=(const WithoutCuDNN &) = delete;

private:
  at::Context &context_;
  bool was_;
};

// An embedding's flags change its gradient alone: rows that count by how often they are asked for, a row without any, a
// sparse result. Where nothing else reads a weight that is asked about, the gradient has the rows that were asked for alone.
void use_plain_gradients(torch::jit::Block *block, const std::unordered_set<const torch::jit::Value *> &lifted) {
  for (auto *node : block->nodes()) {
    for (auto *inner : node->blocks())
      use_plain_gradients(inner, lifted);
    if (node->kind() != c10::aten::embedding || node->inputs().size() != 5)
      continue;
    torch::jit::WithInsertPoint before(node);
    auto &graph = *node->owningGraph();
    node->replaceInput(2, graph.insertConstant(std::int64_t{-1}));
    node->replaceInput(3, graph.insertConstant(false));
    const auto *weight = node->input(0);
    const bool is_own = lifted.count(weight) != 0 && weight->uses().size() == 1;
    node->replaceInput(4, graph.insertConstant(is_own));
  }
}

// Images in the layout that the processor's kernels for convolutions take as it is, and hand on.
void put_channels_last(torch::jit::Stack &stack) {
  for (auto &argument : stack)
    if (argument.isTensor() && argument.toTensor().defined() && argument.toTensor().dim() == 4)
      argument = argument.toTensor().contiguous(at::MemoryFormat::ChannelsLast);
}

// A value that gradients flow through to those who read it behind the tap.
at::Tensor own_path(Recording &recording, const at::Tensor &value) {
  if (value.requires_grad())
    return at::alias(value);
  auto leaf = value.detach().requires_grad_();
  recording.leaves.push_back(leaf);
  return leaf;
}

} // namespace

void tap_gradient(torch::jit::Stack &stack) {
  const auto site = torch::jit::pop(stack).toInt();
  auto value = torch::jit::pop(stack).toTensor();
  if (!value.defined() || !at::isFloatingType(value.scalar_type())) {
    torch::jit::push(stack, std::move(value));
    return;
  }
  TORCH_CHECK(current_recording != nullptr, "a graph with taps on gradients was run without a recording");
  auto tapped = own_path(*current_recording, value);
  // The value itself would keep its history, and this hook with it, for ever. Nobody needs it behind the last walk back, while
  // libtorch lets go of what it kept too; hooks are copied, and share what they hold.
  const auto held = std::make_shared<at::Tensor>(value.detach());
  tapped.register_hook([gradients = current_recording->gradients, site, held](const at::Tensor &gradient) {
    const std::lock_guard<std::mutex> lock(gradients->mutex);
    if (gradients->visitor != nullptr && gradient.defined())
      gradients->visitor->gradient(site, *held, gradient);
    if (!gradients->keep)
      held->reset();
  });
  torch::jit::push(stack, std::move(tapped));
}

std::unique_ptr<Executable> differentiable(const Frozen &f, rust::Slice<const TapRow> taps,
                                           rust::Slice<const std::size_t> lifted) {
  auto executable = std::make_unique<Executable>();
  executable->graph = f.graph->copy();
  auto &graph = *executable->graph;
  const auto values = enumerate_values(graph);
  std::unordered_set<const torch::jit::Value *> inputs;
  for (const auto index : lifted) {
    auto *input = graph.addInput();
    inputs.insert(input);
    input->setType(c10::TensorType::get());
    values.at(index)->replaceAllUsesWith(input);
  }
  use_plain_gradients(graph.block(), inputs);
  insert_taps(graph, values, taps);
  prepare(*executable, f.module);
  return executable;
}

std::unique_ptr<Recording> record(const Executable &e, const Arguments &a, const Tensors &lifted, bool channels_last,
                                  Visitor &visitor) {
  const at::AutoGradMode with_gradients(true);
  auto recording = std::make_unique<Recording>();
  recording->gradients = std::make_shared<Gradients>();
  const CurrentVisitor visits(visitor);
  const CurrentRecording records(*recording);
  const WithoutCuDNN own_layers(has_recurrent_layer(e.graph->block()));
  auto stack = stack_for(e, a);
  if (channels_last)
    put_channels_last(stack);
  for (std::size_t index = 0; index < lifted.inner.size(); ++index) {
    recording->leaves.push_back(lifted.inner[index].detach().requires_grad_());
    const auto &leaf = recording->leaves.back();
    leaf.register_hook([gradients = recording->gradients, index](const at::Tensor &gradient) {
      const std::lock_guard<std::mutex> lock(gradients->mutex);
      if (gradients->visitor != nullptr && gradient.defined())
        gradients->visitor->constant_gradient(index, gradient);
      if (!gradient.defined() || gradient.is_sparse())
        return gradient;
      // Something of this shape that takes no memory: what is returned is kept until the walk back has ended.
      return at::zeros({}, gradient.options()).expand(gradient.sizes());
    });
    stack.emplace_back(leaf);
  }
  torch::jit::InterpreterState(e.code).run(stack);
  recording->output = torch::jit::pop(stack);
  return recording;
}

std::unique_ptr<Value> recorded_output(const Recording &r) { return std::make_unique<Value>(Value{r.output}); }

void backward(const Recording &r, const Tensors &outputs, const Tensors &directions, bool keep, Visitor &visitor) {
  const Listening listens(*r.gradients, visitor, keep);
  const Deterministic same_sums;
  torch::autograd::grad(outputs.inner, r.leaves, directions.inner, keep, false, true);
}

} // namespace tsquant
