"""Makes the tiny models in `test/`: untrained, seeded, each there for one thing that a TorchScript file can hold.

Every `NAME.pt` has a `NAME.safetensors` with 16 rows for each tensor argument of `forward` under the argument's name,
and what eager float32 PyTorch answers to them as one batch: `expected` for a tensor, `expected.0` or `expected.key` for
the parts of a tuple, list or dict, and for some `exact.LAYER.weight` and `exact.LAYER.output`: the diagonal of the
Gauss-Newton matrix for the layer's weight, averaged over rows, and by row for its output behind the activation. Each file is loaded again and must reproduce that before this script succeeds.
"""

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from archive import fix_hash_seed, save_exported, save_script

FOLDER = Path(__file__).parent / "test"
ROWS = 16
TOLERANCE = 1e-5
LOWEST = torch.finfo(torch.float32).min
CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d
BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class Case:
    """One test model: how to build it, what goes in, how it becomes TorchScript."""

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[[], dict[str, Tensor]]
    convert: Callable[[nn.Module, dict[str, Tensor]], torch.jit.ScriptModule]
    dtype: torch.dtype = torch.float32
    exact: dict[str, str] = field(default_factory=dict)
    """Layers whose exact scores are recorded, each with what gives its output; nothing if that is the model's."""
    shorter_calls: dict[str, list[str]] = field(default_factory=dict)
    """Further expected outputs: name of the record, and the arguments that are given."""


def trace(module: nn.Module, inputs: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """Traces on the first two rows, with gradients recorded, so that attention takes its differentiable path."""
    dtype = next(module.parameters()).dtype
    example = tuple(rows.to(dtype) if rows.is_floating_point() else rows for rows in (x[:2] for x in inputs.values()))
    return torch.jit.trace(module, example, check_trace=False)


def trace_without_gradients(module: nn.Module, inputs: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """Traces under no_grad: transformer layers then take their fused inference path."""
    with torch.no_grad():
        return trace(module, inputs)


def script(module: nn.Module, _inputs: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """Compiles the module's source, control flow included."""
    return torch.jit.script(module)


def script_in_training_mode(module: nn.Module, _inputs: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """As `script`, of a module that somebody forgot to set to eval."""
    return torch.jit.script(copy.deepcopy(module).train())


def script_and_freeze(module: nn.Module, _inputs: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """As `script`, then frozen: parameters are constants without names, BatchNorm is folded."""
    return torch.jit.freeze(torch.jit.script(module))


class ControlFlow(nn.Module):
    """A branch on data and a loop whose length is an argument; the shipped rows never take the dark branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bright = nn.Conv2d(8, 8, 1)
        self.dark = nn.Conv2d(8, 8, 1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.refine = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, steps: int = 3) -> Tensor:
        y = torch.relu(self.stem(x))
        if bool(x.mean() > 0.0):
            y = self.bright(y)
        else:
            y = self.dark(y)
        for step in range(steps):
            if step % 2 == 0:
                y = torch.relu(self.mix(y))
            else:
                y = y + self.refine(y)
        return self.head(y.mean([2, 3]))


class SmallCnn(nn.Module):
    """Convolutions, BatchNorm, a residual addition, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.dropout(x.mean([2, 3])))


class MultiIo(nn.Module):
    """Several arguments, one optional, two scalars with defaults; a tuple of a tensor, a dict and a list comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.side = nn.Linear(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(
        self, x: Tensor, y: Tensor | None = None, scale: float = 1.0, shift: int = 0
    ) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        features = torch.relu(self.conv(x))
        pooled = features.mean([2, 3])
        if y is not None:
            pooled = pooled + torch.tanh(self.side(y))
        logits = self.head(pooled) * scale + shift
        return logits, {"features": features, "pooled": pooled}, [torch.sigmoid(logits), torch.softmax(logits, 1)]


class Outputs(nn.Module):
    """Returns what ops of several kinds make: alone, in a list, under two keys of a dict, though other ops read it, and in
    a list that another op reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 4, 1)
        self.encode = nn.Linear(8, 6)
        self.decode = nn.Linear(6, 8)
        self.merge = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor], list[Tensor]]:
        features = torch.relu(self.conv(x))
        up = self.up(features)
        parts = [self.last(up), up]
        merged = self.merge(torch.cat(parts, 1))
        code = torch.sigmoid(self.encode(features.mean([2, 3])))
        return parts[0] + up, [merged, self.decode(code)], {"code": code, "again": code}, parts


class EncoderLayer(nn.Module):
    """A BERT layer with attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, heads, T, C / heads)."""
        return x.view(x.size(0), x.size(1), self.heads, self.head_width).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.head_width) + mask
        context = torch.matmul(self.dropout(functional.softmax(scores, dim=-1)), value)
        context = context.permute(0, 2, 1, 3).contiguous().view(x.size())
        x = self.norm1(x + self.dropout(self.output(context)))
        return self.norm2(x + self.dropout(self.down(functional.gelu(self.up(x)))))


class TinyEncoder(nn.Module):
    """Token ids and a padding mask, both int64 (N, T), to logits (N, 3), as Hugging Face's BERT does it."""

    def __init__(self, vocabulary: int = 64, length: int = 16, width: int = 12) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layer = nn.ModuleList([EncoderLayer(width, 2), EncoderLayer(width, 2)])
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 3)
        self.register_buffer("position_ids", torch.arange(length).unsqueeze(0))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = self.position_ids[:, : ids.size(1)]
        x = self.norm(self.word_embeddings(ids) + self.position_embeddings(positions))
        additive = (1.0 - mask[:, None, None, :].to(x.dtype)) * LOWEST
        for layer in self.layer:
            x = layer(x, additive)
        weights = mask.unsqueeze(-1).to(x.dtype)
        pooled = (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return self.classifier(torch.tanh(self.pooler(pooled)))


class Recurrent(nn.Module):
    """A bidirectional GRU of two layers, an LSTM, a linear layer on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.lstm = nn.LSTM(16, 10, batch_first=True)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(x)
        x, _ = self.lstm(x)
        return self.fc(x[:, -1])


class ConvZoo(nn.Module):
    """Kinds of 2-d convolution and activation, a layer called twice, a weight that its parent owns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.shared = nn.Conv2d(8, 8, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.12)
        self.bias = nn.Parameter(torch.randn(8) * 0.1)
        self.transposed = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.bn(self.stem(x)))
        x = functional.relu6(self.depthwise(x))
        x = functional.silu(self.grouped(x))
        x = functional.leaky_relu(self.shared(x), 0.1)
        x = functional.leaky_relu(self.shared(x), 0.1)
        x = functional.conv2d(x, self.weight, self.bias, padding=1)
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left * torch.sigmoid(right), right], dim=1)
        x = functional.max_pool2d(x, 2)
        x = torch.clamp(self.transposed(x), -1.5, 1.5)
        x = x.permute(0, 2, 3, 1).contiguous().view(x.size(0), -1, 6)
        return self.fc(x).mean(1)


class ConvDimensions(nn.Module):
    """Convolutions in one and three dimensions, plain, transposed and with 'same' padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.bn1d = nn.BatchNorm1d(8)
        self.same1d = nn.Conv1d(8, 8, 3, padding="same")
        self.transposed1d = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.conv3d = nn.Conv3d(1, 6, 3, padding=1)
        self.bn3d = nn.BatchNorm3d(6)
        self.fc = nn.Linear(12, 4)

    def forward(self, signal: Tensor, volume: Tensor) -> Tensor:
        signal = torch.relu(self.bn1d(self.conv1d(signal)))
        signal = functional.elu(self.transposed1d(self.same1d(signal)))
        volume = functional.avg_pool3d(torch.relu(self.bn3d(self.conv3d(volume))), 2)
        return self.fc(torch.cat([signal.mean(2), volume.mean([2, 3, 4])], dim=1))


class Sdpa(nn.Module):
    """`scaled_dot_product_attention` with a boolean mask, then `nn.MultiheadAttention` on its differentiable path."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        allowed = mask != 0
        query, key, value = self.qkv(x).view(x.size(0), x.size(1), 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None, None, :])
        x = x + self.proj(out.transpose(1, 2).reshape(x.size()))
        y = self.norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=~allowed, need_weights=False)[0]
        return self.fc(x.mean(1))


class LibraryEncoder(nn.Module):
    """`nn.TransformerEncoderLayer` as PyTorch ships it, with its fused inference path, and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, 2, 32, activation="gelu", batch_first=True)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x).mean(1))


class Stateful(nn.Module):
    """Counts its calls and keeps a running mean; both change the next answer, rows of one batch do not mix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("running_mean", torch.randn(12) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        centred = torch.relu(hidden - self.running_mean.clone())
        self.running_mean.mul_(0.9).add_(hidden.detach().mean(0) * 0.1)
        self.calls.add_(1.0)
        return self.fc2(centred) / self.calls.clone()


class InPlace(nn.Module):
    """In-place activation, addition, slice assignment and scaling; the caller's input is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu_()
        y = self.conv2(x)
        y += x
        y[:, :2] = y[:, 2:4] * 0.5
        z = self.conv3(y)
        z.mul_(0.5).clamp_(-2.0, 2.0)
        return self.fc(z.mean([2, 3]))


class Traps(nn.Module):
    """What a careless clean-up gets wrong: a square weight used as it is and transposed, an argument that is written in
    place, and a flag that guards a check of the input and, elsewhere, a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.register_buffer("offset", torch.randn(8) * 0.1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, strict: bool = False) -> Tensor:
        x -= 0.5
        if x.size(1) == 3:
            if strict:
                raise ValueError("three columns")
        y = torch.relu(x @ self.weight) @ self.weight.t() + self.offset
        if strict:
            y = y * 0.5
        return self.fc(y)


class Packed(nn.Module):
    """An LSTM on packed sequences, as padded batches are fed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, _ = self.lstm(packed)
        x, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=10)
        return self.fc(x.mean(1))


def packed_inputs() -> dict[str, Tensor]:
    """`x` (16, 10, 6) and int64 `lengths` (16)."""
    return {"x": torch.randn(ROWS, 10, 6), "lengths": torch.randint(4, 11, (ROWS,))}


def images(channels: int, size: int, offset: float = 0.0) -> Callable[[], dict[str, Tensor]]:
    """One argument `x`, normal images (16, channels, size, size) around `offset`."""
    return lambda: {"x": torch.randn(ROWS, channels, size, size) + offset}


def sequences(length: int, width: int) -> Callable[[], dict[str, Tensor]]:
    """One argument `x`, normal sequences (16, length, width)."""
    return lambda: {"x": torch.randn(ROWS, length, width)}


def padding_mask(length: int) -> Tensor:
    """int64 (16, length): ones, then zeros from a random place on, never only zeros."""
    lengths = torch.randint(length // 3, length + 1, (ROWS, 1))
    return (torch.arange(length).unsqueeze(0) < lengths).long()


def token_inputs() -> dict[str, Tensor]:
    """`ids` (zero where padded) and `mask`, int64 (16, 12)."""
    mask = padding_mask(12)
    return {"ids": torch.randint(1, 64, (ROWS, 12)) * mask, "mask": mask}


def dimension_inputs() -> dict[str, Tensor]:
    """`signal` (16, 3, 32) and `volume` (16, 1, 4, 8, 8)."""
    return {"signal": torch.randn(ROWS, 3, 32), "volume": torch.randn(ROWS, 1, 4, 8, 8)}


class Extras(nn.Module):
    """More than forward needs: a method, a buffer, a parameter, numbers and names that only that method or nothing
    reads."""

    names: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.head = nn.Linear(8, 2)
        self.register_buffer("palette", torch.randn(3))
        self.names = ["a", "b"]
        self.temperature = 0.5
        self.gain = 2.0
        # Its weight is used under another name, its bias is not.
        self.twin = nn.Linear(8, 5)
        self.twin.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x)) * self.gain

    @torch.jit.export
    def pool(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))).mean([2, 3])

    @torch.jit.export
    def other_answer(self, x: Tensor) -> Tensor:
        return self.head(self.pool(x)) * self.temperature


class Mlp(nn.Module):
    """Two linear layers whose answer comes with its class, an index."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 10)
        self.tanh = nn.Tanh()
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.fc2(self.tanh(self.fc1(x)))
        return {"best": logits.argmax(1), "logits": logits}


class Linear(nn.Module):
    """One linear layer: its exact scores can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class SmallConv(nn.Module):
    """Two convolutions, one channel of the second of which is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.conv2.bias.data[1] = -1000.0
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(x.mean([2, 3]))


class Tables(nn.Module):
    """Tensors that stand in a dict, in lists of lists and in a tuple."""

    scales: dict[str, Tensor]
    shifts: list[list[Tensor]]
    last: tuple[Tensor, int]

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.scales = {"coarse": torch.rand(4) + 0.5, "fine": torch.rand(4) + 0.5}
        self.shifts = [[torch.randn(4) * 0.1], [torch.randn(4) * 0.1, torch.randn(4) * 0.1]]
        self.last = (torch.randn(4) * 0.1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for name in self.scales:
            x = x * self.scales[name]
        for row in self.shifts:
            for shift in row:
                x = x + shift
        return x + self.last[0] * self.last[1]


class Indices(nn.Module):
    """Answers with indices alone, which no gradient flows to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).argmax(1)


CASES = [
    Case("control_flow", ControlFlow, images(3, 8, offset=0.5), script),
    Case("frozen_cnn", SmallCnn, images(3, 8), script_and_freeze),
    Case(
        "multi_io",
        MultiIo,
        lambda: {"x": torch.randn(ROWS, 3, 8, 8), "y": torch.randn(ROWS, 5)},
        script,
        shorter_calls={"expected_without_y": ["x"]},
    ),
    Case("outputs", Outputs, images(3, 9), script),
    Case("tiny_encoder", TinyEncoder, token_inputs, trace),
    Case("recurrent", Recurrent, sequences(10, 6), script),
    Case("conv_zoo", ConvZoo, images(4, 12), trace),
    Case("conv_dimensions", ConvDimensions, dimension_inputs, trace),
    Case("sdpa", Sdpa, lambda: {"x": torch.randn(ROWS, 8, 16), "mask": padding_mask(8)}, trace),
    Case("fused_encoder", LibraryEncoder, sequences(8, 16), trace_without_gradients),
    Case("scripted_encoder", LibraryEncoder, sequences(8, 16), script),
    Case("stateful", Stateful, lambda: {"x": torch.randn(ROWS, 6)}, script),
    Case("training_mode", SmallCnn, images(3, 8), script_in_training_mode),
    Case("half_precision", SmallCnn, images(3, 8), trace, dtype=torch.float16),
    Case("bfloat16", SmallCnn, images(3, 8), trace, dtype=torch.bfloat16),
    Case("in_place", InPlace, images(3, 8), script),
    Case("traps", Traps, lambda: {"x": torch.randn(ROWS, 8)}, script),
    Case("packed", Packed, packed_inputs, script),
    Case("extras", Extras, images(3, 8), script),
    Case("tables", Tables, lambda: {"x": torch.randn(ROWS, 6)}, script),
    Case("linear", Linear, lambda: {"x": torch.randn(ROWS, 6)}, trace, exact={"fc": ""}),
    Case("mlp", Mlp, lambda: {"x": torch.randn(ROWS, 6)}, script, exact={"fc1": "tanh", "fc2": ""}),
    Case("small_conv", SmallConv, images(1, 6), trace, exact={"conv1": "relu1", "conv2": "relu2", "fc": ""}),
]


def age(module: nn.Module) -> None:
    """Gives convolutions and linear layers weights that keep a signal alive, and normalisation layers the uneven
    scales, shifts and statistics of a trained network."""
    for layer in module.modules():
        if isinstance(layer, CONVOLUTIONS | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if isinstance(layer, BATCH_NORMS | nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
        if isinstance(layer, BATCH_NORMS):
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.3, 1.5)


def flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output under dotted names."""
    if isinstance(value, Tensor):
        yield name, value.detach().float().contiguous().clone()
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from flatten(f"{name}.{key}", part)


def answer(case: Case, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a fresh float32 copy of `module` in eval mode gives for every recorded call."""
    calls = {"expected": list(inputs), **case.shorter_calls}
    outputs: dict[str, Tensor] = {}
    for name, arguments in calls.items():
        fresh = copy.deepcopy(module).float().eval()
        outputs.update(flatten(name, fresh(**{argument: inputs[argument].clone() for argument in arguments})))
    return outputs


def compare(case: Case, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Fails if an output is dead, not finite, or further from `expected` than the tolerance."""
    for name, value in expected.items():
        largest = value.abs().max().item()
        if not math.isfinite(largest) or largest < 0.05 or largest > 50 or value.std(0).max() < 1e-3:
            raise RuntimeError(f"{case.name}: {name} is no sane output, largest magnitude {largest}")
        difference = (found[name] - value).abs().max().item()
        if difference > TOLERANCE * largest:
            raise RuntimeError(f"{case.name}: {name} differs by {difference} after loading, largest {largest}")


def exact_scores(case: Case, module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of squared derivatives of all outputs of floating point, one derivative at a time, in float64."""
    module = copy.deepcopy(module).double().eval()
    scores: dict[str, Tensor] = {}
    for name, last in case.exact.items():
        layer = module.get_submodule(name)
        held: list[Tensor] = []
        hook = module.get_submodule(last or name).register_forward_hook(lambda _layer, _inputs, output, held=held: held.append(output))
        for row in range(ROWS):
            held.clear()
            answers = list(parts(module(*(x[row : row + 1].double() for x in inputs.values()))))
            for component in torch.cat([y.flatten() for y in answers if y.requires_grad]):
                weight, output = torch.autograd.grad(component, [layer.weight, held[0]], retain_graph=True)
                of_weight = scores.setdefault(f"exact.{name}.weight", torch.zeros_like(weight))
                of_weight += weight**2 / ROWS
                if not last:
                    continue
                of_output = scores.setdefault(f"exact.{name}.output", torch.zeros(ROWS, *output.shape[1:]))
                of_output[row] += output[0] ** 2
        hook.remove()
    return {name: score.float().contiguous() for name, score in scores.items()}


def parts(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested output as they are."""
    if isinstance(value, Tensor):
        yield value
        return
    for part in value.values() if isinstance(value, dict) else value:
        yield from parts(part)


def make(case: Case) -> None:
    """Builds, saves, reloads and checks one model and its data."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    module = case.build().eval()
    age(module)
    module = module.to(case.dtype)
    inputs = case.make_inputs()
    with torch.no_grad():
        expected = answer(case, module, inputs)
    path = FOLDER / f"{case.name}.pt"
    save_script(case.convert(module, inputs), path)
    with torch.no_grad():
        compare(case, expected, answer(case, torch.jit.load(path), inputs))
    save_file(inputs | expected | exact_scores(case, module, inputs), path.with_suffix(".safetensors"))
    path.with_suffix(".safetensors").chmod(0o644)
    print(f"{case.name:18} {path.stat().st_size / 1024:6.1f} KiB")


def make_files_without_data() -> None:
    """A state_dict, an exported program and the start of an ONNX model, to be refused by name, and a model that has no
    gradients."""
    torch.manual_seed(0)
    torch.save(nn.Linear(3, 2).state_dict(), FOLDER / "state_dict.pt")
    save_exported(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), FOLDER / "exported.pt2")
    save_script(trace(Indices(), {"x": torch.randn(ROWS, 6)}), FOLDER / "indices.pt")
    # ModelProto: ir_version = 8, producer_name = "pytorch", graph { name: "g" }, opset_import { version: 17 }
    onnx = b"\x08\x08" + b"\x12\x07pytorch" + b"\x3a\x03\x12\x01g" + b"\x42\x02\x10\x11"
    (FOLDER / "not_a_model.onnx").write_bytes(onnx)


def main() -> None:
    """Makes everything anew."""
    fix_hash_seed()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        make(case)
    make_files_without_data()


if __name__ == "__main__":
    main()
