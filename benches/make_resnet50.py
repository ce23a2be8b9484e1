"""Writes a network of the size of a ResNet-50 with random weights, random images at 224x224 and an experiment with batches of
64, for `cargo bench --bench gpu`: python benches/make_resnet50.py FOLDER [IMAGES]. Needs torch and numpy."""

import pathlib
import sys

import numpy
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, before: int, narrow: int, stride: int):
        super().__init__()
        wide = 4 * narrow
        self.conv1 = nn.Conv2d(before, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample = None
        if stride != 1 or before != wide:
            self.downsample = nn.Sequential(nn.Conv2d(before, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + shortcut)


def resnet50() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for narrow, blocks, first_stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for index in range(blocks):
            layers.append(Block(before, narrow, first_stride if index == 0 else 1))
            before = 4 * narrow
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = resnet50().eval()
    images = torch.randn(count, 3, 224, 224)
    torch.jit.trace(model, images[:2]).save(str(folder / "resnet50.pt"))
    numpy.savez(folder / "images.npz", images=images.numpy())
    (folder / "resnet50.yaml").write_text(
        f"model: {{path: {folder}/resnet50.pt}}\n"
        f"calibration: {{data: {folder}/images.npz, inputs: [images], batch_size: {min(64, count)}}}\n"
    )


if __name__ == "__main__":
    main()
