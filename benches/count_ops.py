"""How often each op stands in TorchScript files, for files in 8 bits: kernels, the ways in and out, and what computes in float:

    python benches/count_ops.py RUN/quantized.pt ...

Needs torch. Set `torch.backends.quantized.engine` by --engine as the run says.
"""

import argparse
import collections

import torch

# Ops that compute nothing: constants, lists, shapes, views.
QUIET = ("prim::", "aten::size", "aten::dim", "aten::Int", "aten::len", "aten::__", "aten::_set_item", "aten::ScalarImplicit")
BORDERS = ("aten::quantize_per_tensor", "aten::dequantize")


def nodes(block):
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes(inner)


def count(path: str) -> None:
    counts = collections.Counter(node.kind() for node in nodes(torch.jit.load(path).inlined_graph))
    counts = {kind: number for kind, number in counts.items() if not kind.startswith(QUIET)}
    shown = lambda kinds: ", ".join(f"{kind} {counts[kind]}" for kind in sorted(kinds)) or "none"
    kernels = [kind for kind in counts if kind.startswith("quantized::")]
    others = [kind for kind in counts if kind not in kernels and kind not in BORDERS]
    print(f"{path}: {sum(counts[kind] for kind in kernels)} kernels")
    print(f"  kernels: {shown(kernels)}")
    print(f"  in and out: {shown(kind for kind in counts if kind in BORDERS)}")
    print(f"  others, on quantized or float tensors: {shown(others)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--engine", default="onednn")
    options = parser.parse_args()
    torch.backends.quantized.engine = options.engine
    for path in options.files:
        count(path)


if __name__ == "__main__":
    main()
