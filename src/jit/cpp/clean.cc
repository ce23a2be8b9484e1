// Freezing, and the passes that bring a graph into the form that the rest of the project reads.
#include "shim.h"

#include <algorithm>
#include <functional>
#include <string>
#include <unordered_set>

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/jit.h>
#include <torch/csrc/jit/ir/alias_analysis.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/common_subexpression_elimination.h>
#include <torch/csrc/jit/passes/constant_pooling.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/freeze_module.h>
#include <torch/csrc/jit/passes/frozen_conv_folding.h>
#include <torch/csrc/jit/passes/frozen_linear_folding.h>
#include <torch/csrc/jit/passes/fuse_linear.h>
#include <torch/csrc/jit/passes/inline_fork_wait.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/csrc/jit/passes/peephole.h>
#include <torch/csrc/jit/passes/remove_dropout.h>
#include <torch/csrc/jit/passes/remove_mutation.h>

#include "tsquant/src/jit/ffi.rs.h"

namespace tsquant {

namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
namespace prim = torch::jit::prim;

void for_each_node(Block *block, const std::function<void(Node *)> &visit) {
  for (auto it = block->nodes().begin(); it != block->nodes().end();) {
    Node *node = *it;
    ++it; // the visit may destroy the node
    for (auto *inner : node->blocks())
      for_each_node(inner, visit);
    visit(node);
  }
}

void replace_by_constant(Graph &graph, torch::jit::Value *value, const c10::IValue &constant) {
  torch::jit::WithInsertPoint at_start(*graph.block()->nodes().begin());
  value->replaceAllUsesWith(graph.insertConstant(constant));
}

Names names_of_tensors(const torch::jit::Module &module) {
  Names names;
  // Parameters first: a buffer that shares a parameter's storage is called like the parameter.
  for (const auto &entry : module.named_parameters())
    if (has_tensor_data(entry.value))
      names.emplace(entry.value.data_ptr(), Named{entry.name, entry.value.numel()});
  for (const auto &entry : module.named_buffers())
    if (has_tensor_data(entry.value))
      names.emplace(entry.value.data_ptr(), Named{entry.name, entry.value.numel()});
  return names;
}

// Marks each node that reads a named tensor with that tensor's name, before folding replaces the tensor.
void attach_names(const Frozen &f) {
  const auto constant_name = [&f](const torch::jit::Value *value) -> std::string {
    if (value->node()->kind() != prim::Constant)
      return "";
    const auto constant = torch::jit::toIValue(value);
    if (!constant || !constant->isTensor() || !has_tensor_data(constant->toTensor()))
      return "";
    return name_of(f.names, constant->toTensor());
  };
  for_each_node(f.graph->block(), [&](Node *node) {
    const auto scope = node->scope();
    if (scope && !scope->isBlank() && std::string(scope->name().toUnqualString()).rfind(kLayerScope, 0) == 0)
      return;
    for (const auto *input : node->inputs()) {
      const auto name = constant_name(input);
      if (name.empty())
        continue;
      const auto root = c10::make_intrusive<torch::jit::Scope>();
      node->setScope(root->push(c10::Symbol::scope(kLayerScope + name)));
      return;
    }
  });
}

// Freezing leaves reads of attributes that it cannot prove constant, such as in_proj_weight of a scripted
// MultiheadAttention. Those that nothing writes are constants all the same.
void fold_attributes(const Frozen &f) {
  std::vector<std::string> written;
  std::vector<Node *> reads;
  for_each_node(f.graph->block(), [&](Node *node) {
    if (node->kind() == prim::SetAttr)
      written.push_back(node->s(torch::jit::attr::name));
    if (node->kind() == prim::GetAttr)
      reads.push_back(node);
  });
  if (reads.empty())
    return;
  torch::jit::AliasDb aliases(f.graph);
  const auto *self = f.graph->inputs().at(0);
  const std::function<c10::IValue(const torch::jit::Value *)> evaluate =
      [&](const torch::jit::Value *value) -> c10::IValue {
    if (value == self)
      return f.module._ivalue();
    const auto *node = value->node();
    if (node->kind() != prim::GetAttr)
      return c10::IValue();
    const auto owner = evaluate(node->input());
    return owner.isObject() ? owner.toObjectRef().getAttr(node->s(torch::jit::attr::name)) : c10::IValue();
  };
  for (auto *read : reads) {
    const auto &name = read->s(torch::jit::attr::name);
    if (std::find(written.begin(), written.end(), name) != written.end() || aliases.hasWriters(read->output()))
      continue;
    const auto value = evaluate(read->output());
    if (value.isTensor())
      replace_by_constant(*f.graph, read->output(), value.toTensor().detach());
  }
}

void fix_condition(Graph &graph, Node *conditional, bool condition) {
  torch::jit::WithInsertPoint before(conditional);
  conditional->replaceInput(0, graph.insertConstant(condition));
}

bool surely_raises(Block *block) {
  for (auto *node : block->nodes())
    if (node->kind() == prim::RaiseException)
      return true;
  return false;
}

// A model's own checks of its input are taken as passed: the condition of an If with one raising block is made constant.
// (libtorch's EliminateExceptions never ends where two such Ifs share a condition.)
std::size_t drop_throwing(const Frozen &f) {
  std::size_t dropped = 0;
  std::vector<Node *> conditionals;
  for_each_node(f.graph->block(), [&](Node *node) {
    if (node->kind() == prim::If)
      conditionals.push_back(node);
  });
  for (auto *node : conditionals) {
    auto *condition = node->input();
    const bool then_raises = surely_raises(node->blocks().at(0));
    const bool else_raises = surely_raises(node->blocks().at(1));
    if (condition->node()->kind() == prim::Constant || then_raises == else_raises)
      continue;
    // This If alone: another reader of the condition may run where this one does not.
    fix_condition(*f.graph, node, else_raises);
    ++dropped;
  }
  return dropped;
}

const char *const kFusedOps[] = {"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"};

bool is_fused(const Node *node) {
  for (const auto *op : kFusedOps)
    if (node->kind() == c10::Symbol::fromQualString(op))
      return true;
  return false;
}

bool holds_fused(Block *block) {
  return std::any_of(block->nodes().begin(), block->nodes().end(), [](const Node *node) { return is_fused(node); });
}

// True for an If in the source of PyTorch's own layers, whose branches are a fast and a slow way to the same result.
bool is_of_torch(const Node *node) {
  const auto place = node->sourceRange().file_line_col();
  return place && std::get<0>(*place).find("torch/nn/modules/") != std::string::npos;
}

// What the fused evaluation paths of nn.TransformerEncoderLayer and nn.MultiheadAttention compute, op by op.
const char *const kExpansions = R"(
def attend(x: Tensor, embed_dim: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor,
           out_bias: Tensor) -> Tensor:
    batch = x.size(0)
    length = x.size(1)
    qkv = torch.linear(x, qkv_weight, qkv_bias)
    parts = torch.chunk(qkv, 3, -1)
    shape = [batch, length, heads, embed_dim // heads]
    q = parts[0].reshape(shape).transpose(1, 2)
    k = parts[1].reshape(shape).transpose(1, 2)
    v = parts[2].reshape(shape).transpose(1, 2)
    mixed = torch.scaled_dot_product_attention(q, k, v)
    return torch.linear(mixed.transpose(1, 2).reshape([batch, length, embed_dim]), out_weight, out_bias)

def multi_head(query: Tensor, embed_dim: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor,
               out_bias: Tensor) -> Tensor:
    return attend(query, embed_dim, heads, qkv_weight, qkv_bias, out_weight, out_bias)

def feed_forward(x: Tensor, use_gelu: bool, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    hidden = torch.linear(x, w1, b1)
    if use_gelu:
        hidden = torch.gelu(hidden)
    else:
        hidden = torch.relu(hidden)
    return torch.linear(hidden, w2, b2)

def encoder_layer(src: Tensor, embed_dim: int, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, out_weight: Tensor,
                  out_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, n1w: Tensor, n1b: Tensor,
                  n2w: Tensor, n2b: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    x = src
    if norm_first:
        x = x + attend(torch.layer_norm(x, [embed_dim], n1w, n1b, eps), embed_dim, heads, qkv_weight, qkv_bias,
                       out_weight, out_bias)
        x = x + feed_forward(torch.layer_norm(x, [embed_dim], n2w, n2b, eps), use_gelu, w1, b1, w2, b2)
    else:
        x = torch.layer_norm(x + attend(x, embed_dim, heads, qkv_weight, qkv_bias, out_weight, out_bias), [embed_dim],
                             n1w, n1b, eps)
        x = torch.layer_norm(x + feed_forward(x, use_gelu, w1, b1, w2, b2), [embed_dim], n2w, n2b, eps)
    return x
)";

bool is_none(const torch::jit::Value *value) {
  const auto constant = torch::jit::toIValue(value);
  return constant && constant->isNone();
}

// Puts the inlined body of `function` of kExpansions in place of the node's first output.
void expand(Graph &graph, Node *node, const char *function, at::ArrayRef<torch::jit::Value *> arguments) {
  // Kept for good: the call stacks of inlined nodes point into it.
  static const auto unit = torch::jit::compile(kExpansions);
  auto body = torch::jit::toGraphFunction(unit->get_function(c10::QualifiedName(function))).graph()->copy();
  torch::jit::Inline(*body);
  torch::jit::WithInsertPoint before(node);
  const auto results = torch::jit::insertGraph(graph, *body, arguments);
  node->outputs().at(0)->replaceAllUsesWith(results.at(0));
}

void expand_encoder_layer(Graph &graph, Node *node) {
  TORCH_CHECK(is_none(node->inputs().at(18)), "a traced nn.TransformerEncoderLayer with a mask (",
              node->kind().toQualString(), ") cannot be taken apart; export the model with "
              "torch.backends.mha.set_fastpath_enabled(False)");
  expand(graph, node, "encoder_layer", node->inputs().slice(0, 18));
  node->destroy();
}

void expand_multi_head(Graph &graph, Node *node) {
  const auto in = node->inputs();
  const bool weights_unused = node->outputs().at(1)->uses().empty();
  TORCH_CHECK(in.at(0) == in.at(1) && in.at(0) == in.at(2) && is_none(in.at(9)) && weights_unused,
              "a traced nn.MultiheadAttention (", node->kind().toQualString(), ") that is not plain self-attention ",
              "cannot be taken apart; export the model with torch.backends.mha.set_fastpath_enabled(False)");
  expand(graph, node, "multi_head", {in.at(0), in.at(3), in.at(4), in.at(5), in.at(6), in.at(7), in.at(8)});
  node->destroy();
}

// Fused evaluation paths have no inside to quantize and no derivative: scripted models hold the slow path beside it,
// traced ones are expanded. So is one in a branch of the model's own, whose other branch computes something else.
void force_slow(Frozen &f) {
  auto &graph = f.graph;
  // One at a time, innermost first: a slow way may hold a fast way of its own.
  for (;;) {
    Node *choice = nullptr;
    for_each_node(f.graph->block(), [&](Node *node) {
      if (!choice && node->kind() == prim::If && node->input()->node()->kind() != prim::Constant && is_of_torch(node) &&
          holds_fused(node->blocks().at(0)) != holds_fused(node->blocks().at(1)))
        choice = node;
    });
    if (!choice)
      break;
    // All uses of the condition: it also is, elsewhere in the layer, whether the fast way has returned.
    replace_by_constant(*graph, choice->input(), holds_fused(choice->blocks().at(1)));
    torch::jit::ConstantPropagation(graph);
  }
  for_each_node(f.graph->block(), [&](Node *node) {
    if (node->kind() == c10::Symbol::fromQualString(kFusedOps[0]))
      expand_encoder_layer(*f.graph, node);
    else if (node->kind() == c10::Symbol::fromQualString(kFusedOps[1]))
      expand_multi_head(*f.graph, node);
  });
}

// The number of spatial dimensions of a convolution, 0 where its weight is no constant.
std::size_t spatial_rank(const torch::jit::Value *weight) {
  const auto constant = torch::jit::toIValue(weight);
  if (!constant || !constant->isTensor() || constant->toTensor().dim() < 3)
    return 0;
  return constant->toTensor().dim() - 2;
}

// aten::_convolution and aten::convolution, as traces have them, to the op of their own dimension.
void replace_convolution(const Frozen &f) {
  static const char *const kPlain[] = {"aten::conv1d", "aten::conv2d", "aten::conv3d"};
  static const char *const kTransposed[] = {"aten::conv_transpose1d", "aten::conv_transpose2d",
                                            "aten::conv_transpose3d"};
  for_each_node(f.graph->block(), [&](Node *node) {
    if (node->kind() != c10::Symbol::fromQualString("aten::_convolution") &&
        node->kind() != c10::Symbol::fromQualString("aten::convolution"))
      return;
    const auto in = node->inputs();
    const auto transposed = torch::jit::toIValue(in.at(6));
    const auto rank = spatial_rank(in.at(1));
    if (!transposed || rank < 1 || rank > 3)
      return;
    auto *input = in.at(0), *weight = in.at(1), *bias = in.at(2), *stride = in.at(3), *padding = in.at(4),
         *dilation = in.at(5), *output_padding = in.at(7), *groups = in.at(8);
    const bool is_transposed = transposed->toBool();
    const auto op = c10::Symbol::fromQualString((is_transposed ? kTransposed : kPlain)[rank - 1]);
    const std::vector<torch::jit::Value *> arguments =
        is_transposed ? std::vector<torch::jit::Value *>{input, weight, bias, stride, padding, output_padding, groups,
                                                         dilation}
                      : std::vector<torch::jit::Value *>{input, weight, bias, stride, padding, dilation, groups};
    auto *replacement = f.graph->create(op, arguments, 1)->insertBefore(node);
    replacement->copyMetadata(node);
    replacement->output()->setType(node->output()->type());
    replacement->output()->setDebugName(node->output()->debugName() + "_conv");
    node->output()->replaceAllUsesWith(replacement->output());
    node->destroy();
  });
}

bool holds_tensors(const c10::IValue &constant) {
  if (constant.isTensorList())
    return true;
  if (!constant.isList() && !constant.isTuple())
    return false;
  const auto parts = constant.isTuple() ? constant.toTupleRef().elements().vec() : constant.toListRef().vec();
  return std::any_of(parts.begin(), parts.end(), [](const c10::IValue &part) { return part.isTensor(); });
}

// Lists and tuples of tensors that became one constant, such as the weights of a recurrent layer, to constants of their
// own that are put together in the graph: each can then be named and replaced.
void unpack_constants(const Frozen &f) {
  for_each_node(f.graph->block(), [&](Node *node) {
    if (node->kind() != prim::Constant || node->outputs().size() != 1)
      return;
    const auto constant = torch::jit::toIValue(node->output());
    if (!constant || !holds_tensors(*constant))
      return;
    torch::jit::WithInsertPoint before(node);
    std::vector<torch::jit::Value *> parts;
    const auto elements = constant->isTuple() ? constant->toTupleRef().elements().vec() : constant->toListRef().vec();
    for (const auto &element : elements)
      parts.push_back(f.graph->insertConstant(element));
    auto *whole = constant->isTuple() ? f.graph->createTuple(parts)
                                      : f.graph->createList(node->output()->type()->containedType(0), parts);
    f.graph->insertNode(whole);
    node->output()->replaceAllUsesWith(whole->output());
    node->destroy();
  });
}

bool is_other_float(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kDouble;
}

// Tensor constants and dtype arguments of a model that was not stored in float32.
void cast_constants(Graph &graph) {
  for_each_node(graph.block(), [&](Node *node) {
    if (node->kind() != prim::Constant || node->outputs().size() != 1)
      return;
    const auto constant = torch::jit::toIValue(node->output());
    if (!constant || !constant->isTensor() || !constant->toTensor().defined())
      return;
    if (!is_other_float(constant->toTensor().scalar_type()))
      return;
    replace_by_constant(graph, node->output(), constant->toTensor().detach().to(at::kFloat));
    node->destroy();
  });
  for_each_node(graph.block(), [&](Node *node) {
    const auto *schema = node->maybeSchema();
    if (!schema)
      return;
    for (std::size_t i = 0; i < node->inputs().size() && i < schema->arguments().size(); ++i) {
      const auto constant = torch::jit::toIValue(node->input(i));
      if (schema->arguments()[i].name() != "dtype" || !constant || !constant->isInt())
        continue;
      if (!is_other_float(static_cast<at::ScalarType>(constant->toInt())))
        continue;
      torch::jit::WithInsertPoint before(node);
      node->replaceInput(i, graph.insertConstant(static_cast<std::int64_t>(at::kFloat)));
    }
  });
}

} // namespace

std::unique_ptr<Frozen> freeze(const Module &m) {
  auto frozen = std::make_unique<Frozen>();
  // Inlined nodes point to the functions that they come from, and freezing deletes those of the module that it works on:
  // so inline in a copy first, which shares the tensors and is kept.
  frozen->original = m.inner.clone(/*inplace=*/true);
  torch::jit::Inline(*frozen->original.get_method("forward").graph());
  frozen->names = names_of_tensors(frozen->original);
  frozen->module = torch::jit::freeze_module(frozen->original);
  frozen->graph = frozen->module.get_method("forward").graph();
  return frozen;
}

namespace {

// A list, tuple or dict that the model both returns and reads is put together once more for what is returned: its tensors may then be
// others than those that are read.
void split_returned(Graph &graph, Node *returning, const torch::jit::AliasDb &aliases) {
  for (std::size_t slot = 0; slot < returning->inputs().size(); ++slot) {
    auto *value = returning->input(slot);
    if (!is_container(value->node()) || value->node()->owningBlock() != graph.block() || aliases.hasWriters(value))
      continue;
    if (!only_returned(graph, value)) {
      torch::jit::WithInsertPoint before(returning);
      auto *own = graph.insertNode(graph.createClone(value->node(), [](torch::jit::Value *input) { return input; }));
      returning->replaceInput(slot, own->output());
    }
    split_returned(graph, returning->input(slot)->node(), aliases);
  }
}

void alias_returned(Graph &graph, Node *returning, const std::unordered_set<torch::jit::Value *> &chosen) {
  for (std::size_t slot = 0; slot < returning->inputs().size(); ++slot) {
    auto *value = returning->input(slot);
    auto *maker = value->node();
    if (is_container(maker)) {
      alias_returned(graph, maker, chosen);
      continue;
    }
    if (chosen.count(value) == 0 || maker->owningBlock() != graph.block())
      continue;
    torch::jit::WithInsertPoint before(returning);
    auto *alias = graph.insertNode(graph.create(c10::aten::alias, {value}));
    alias->output()->setType(value->type());
    returning->replaceInput(slot, alias->output());
  }
}

} // namespace

void alias_outputs(Frozen &f, rust::Slice<const std::size_t> values) {
  const auto all = enumerate_values(*f.graph);
  std::unordered_set<torch::jit::Value *> chosen;
  for (const auto value : values)
    chosen.insert(all.at(value));
  alias_returned(*f.graph, f.graph->return_node(), chosen);
  f.graph->lint();
}

std::size_t run_pass(Frozen &f, Pass pass) {
  at::NoGradGuard no_grad;
  std::size_t changes = 0;
  auto &graph = f.graph;
  switch (pass) {
  case Pass::Inline:
    torch::jit::Inline(*graph);
    break;
  case Pass::InlineForkWait:
    torch::jit::InlineForkWait(graph);
    break;
  case Pass::AttachNames:
    attach_names(f);
    break;
  case Pass::FoldAttributes:
    fold_attributes(f);
    break;
  case Pass::DropThrowing:
    changes = drop_throwing(f);
    break;
  case Pass::ConstantPropagation:
    torch::jit::ConstantPropagation(graph);
    break;
  case Pass::LowerSimpleTuples:
    torch::jit::LowerSimpleTuples(graph);
    break;
  case Pass::RemoveListMutation:
    torch::jit::RemoveListMutation(graph);
    break;
  case Pass::RemoveTensorMutation:
    torch::jit::RemoveTensorMutation(graph);
    break;
  case Pass::ForceSlow:
    force_slow(f);
    break;
  case Pass::RemoveDropout:
    torch::jit::removeDropout(graph);
    break;
  case Pass::ReplaceConvolution:
    replace_convolution(f);
    break;
  case Pass::FuseLinear:
    torch::jit::FuseLinear(graph);
    break;
  case Pass::FoldConvBatchNorm:
    torch::jit::FoldFrozenConvBatchnorm(graph);
    break;
  case Pass::FoldLinearBatchNorm:
    torch::jit::FoldFrozenLinearBatchnorm(graph);
    break;
  case Pass::FoldConvAddOrSub:
    torch::jit::FoldFrozenConvAddOrSub(graph);
    break;
  case Pass::FoldConvMulOrDiv:
    torch::jit::FoldFrozenConvMulOrDiv(graph);
    break;
  case Pass::Peephole:
    torch::jit::PeepholeOptimize(graph);
    break;
  case Pass::EliminateCommonSubexpression:
    torch::jit::EliminateCommonSubexpression(graph);
    break;
  case Pass::ConstantPooling:
    torch::jit::ConstantPooling(graph);
    break;
  case Pass::UnpackConstants:
    unpack_constants(f);
    break;
  case Pass::EliminateDeadCode:
    torch::jit::EliminateDeadCode(graph);
    break;
  case Pass::SplitReturned: {
    const torch::jit::AliasDb aliases(graph);
    split_returned(*graph, graph->return_node(), aliases);
    break;
  }
  default:
    TORCH_CHECK(false, "unknown pass");
  }
  graph->lint();
  return changes;
}

void cast_to_float(const Module &m) {
  at::NoGradGuard no_grad;
  const auto cast = [](const at::Tensor &t) {
    if (is_other_float(t.scalar_type())) {
      auto writable = t;
      writable.set_data(t.to(at::kFloat));
    }
  };
  for (const auto &t : m.inner.parameters())
    cast(t);
  for (const auto &t : m.inner.buffers())
    cast(t);
  for (const auto &module : m.inner.modules())
    for (const auto &method : module.get_methods())
      cast_constants(*method.graph());
}

} // namespace tsquant
