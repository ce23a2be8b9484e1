"""Writes a network of the size of a ResNet-18 with random weights, 32 random images and an experiment, for
`cargo bench --bench calibration`: python benches/make_resnet18.py FOLDER. Needs torch and numpy."""

import pathlib
import sys

import numpy
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, narrow: int, wide: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.downsample = None
        if stride != 1 or narrow != wide:
            self.downsample = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


def resnet18() -> nn.Module:
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    narrow = 64
    for wide, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        layers.append(Block(narrow, wide, stride))
        narrow = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def main() -> None:
    folder = pathlib.Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = resnet18().eval()
    images = torch.randn(32, 3, 224, 224)
    torch.jit.trace(model, images[:2]).save(str(folder / "resnet18.pt"))
    numpy.savez(folder / "images.npz", images=images.numpy())
    (folder / "resnet18.yaml").write_text(
        f"model: {{path: {folder}/resnet18.pt}}\n"
        f"calibration: {{data: {folder}/images.npz, inputs: [images], batch_size: 8}}\n"
    )


if __name__ == "__main__":
    main()
