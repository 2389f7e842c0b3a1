"""The training workloads as PyTorch modules, with the attribute names of `models.py`, and one step of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from tensorwright.benchmarks import torch_models
from torch import nn


class MLP(torch_models.MLP):
    """Without softmax: the loss has it."""

    def forward(self, x: Any) -> Any:
        return self.b(F.relu(self.a(x)))


class DemoCNN(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.f1, self.f2 = nn.Linear(2 * width * 16, 64), nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x)))), 2)
        return self.f2(F.relu(self.f1(x.flatten(1))))


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a = torch_models.ConvNorm(channels, out, 3, stride, relu=True)
        self.b = torch_models.ConvNorm(out, out, 3)
        self.d = torch_models.ConvNorm(channels, out, 1, stride) if stride != 1 or channels != out else None

    def forward(self, x: Any) -> Any:
        return F.relu(self.b(self.a(x)) + (x if self.d is None else self.d(x)))


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch_models.ConvNorm(3, 64, 3, relu=True)
        layers: list[nn.Module] = []
        channels = 64
        for stage, out in enumerate((64, 128, 256, 512)):
            layers += [BasicBlock(channels, out, 2 if stage else 1), BasicBlock(out, out, 1)]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Any) -> Any:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.f1, self.f2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.n1, self.n2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def split(self, x: Any) -> Any:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Any) -> Any:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.n1(x + self.o(a.transpose(1, 2).flatten(2)))
        return self.n2(x + self.f2(F.gelu(self.f1(x))))


class TinyTransformer(nn.Module):
    def __init__(
        self, layers: int = 4, width: int = 256, heads: int = 8, inner: int = 1024, vocabulary: int = 1000, length: int = 128
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, width)
        self.pos = nn.Parameter(torch.empty(length, width))
        self.layers = nn.ModuleList([EncoderLayer(width, heads, inner) for _ in range(layers)])
        self.f = nn.Linear(width, vocabulary)

    def forward(self, ids: Any) -> Any:
        x = self.emb(ids) + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.f(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "demo": DemoCNN,
    "cifar": torch_models.Cifar,
    "resnet18": ResNet18,
    "transformer": TinyTransformer,
}


def model(name: str, weights: Mapping[str, Any]) -> nn.Module:
    """The workload's module in training mode with these weights. Raises RuntimeError where names differ."""
    module = MODELS[name.partition("_")[0]]()
    missing, unexpected = module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()}, strict=False)
    if unexpected or [m for m in missing if not m.endswith("num_batches_tracked")]:
        raise RuntimeError(f"{name}: the torch model's weights have other names: {missing[:3]}, {unexpected[:3]}")
    return module.train()


def loss_of(module: nn.Module, x: Any, target: Any) -> Any:
    """Mean cross-entropy over all positions."""
    prediction = module(x)
    return F.cross_entropy(prediction.reshape(-1, prediction.shape[-1]), target.reshape(-1))


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Any, target: Any) -> Callable[[], Any]:
    """One call: forward, loss, backward, update. It gives the loss."""

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(module, x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run
