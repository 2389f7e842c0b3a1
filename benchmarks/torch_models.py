"""The inference workloads as PyTorch modules, with the attribute names of `models.py`: weights are copied by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch code gives it
from torch import nn


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(784, 128), nn.Linear(128, 10)

    def forward(self, x: Any) -> Any:
        return torch.softmax(self.b(F.relu(self.a(x))), -1)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.f1, self.f2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: Any) -> Any:
        x = F.relu(F.max_pool2d(self.c1(x), 2))
        x = F.relu(F.max_pool2d(self.c2(x), 2))
        return self.f2(F.relu(self.f1(x.flatten(1))))


class Cifar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)
        self.f1, self.f2 = nn.Linear(1024, 64), nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(F.relu(self.c1(x)), 2)
        x = F.max_pool2d(F.relu(self.c2(x)), 2)
        return self.f2(F.relu(self.f1(F.relu(self.c3(x)).flatten(1))))


class ConvNorm(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.relu = relu

    def forward(self, x: Any) -> Any:
        y = self.bn(self.conv(x))
        return F.relu(y, inplace=True) if self.relu else y


class Bottleneck(nn.Module):
    def __init__(self, channels: int, middle: int, out: int, stride: int) -> None:
        super().__init__()
        self.a = ConvNorm(channels, middle, 1, relu=True)
        self.b = ConvNorm(middle, middle, 3, stride, relu=True)
        self.c = ConvNorm(middle, out, 1)
        self.d = ConvNorm(channels, out, 1, stride) if stride != 1 or channels != out else None

    def forward(self, x: Any) -> Any:
        return F.relu(self.c(self.b(self.a(x))) + (x if self.d is None else self.d(x)))


class ResNet50(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, 2, relu=True)
        layers: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate((3, 4, 6, 3)):
            middle = 64 << stage
            for i in range(count):
                layers.append(Bottleneck(channels, middle, 4 * middle, 2 if i == 0 and stage > 0 else 1))
                channels = 4 * middle
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        return self.fc(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "lenet": LeNet, "cifar": Cifar, "resnet50": ResNet50}
