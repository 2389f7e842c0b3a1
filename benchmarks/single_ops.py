"""Single operations as workloads. Weights of a convolution, a norm and a matrix-vector product are parameters."""

from __future__ import annotations

from typing import Any

import tensorwright as tw
from tensorwright import nn

Tensor = Any


class MatMul(nn.Module):
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return tw.matmul(a, b)


class Convolution(nn.Module):
    """3x3, stride 1, same size."""

    def __init__(self, channels: int = 64) -> None:
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Softmax(nn.Module):
    def __call__(self, x: Tensor) -> Tensor:
        return tw.softmax(x, -1)


class LayerNorm(nn.Module):
    """With weights other than one and zero, so that they are used."""

    def __init__(self, width: int = 1024) -> None:
        self.n = nn.LayerNorm(width)
        self.n.weight.data = nn.init.uniform((width,), 0.5, 1.5)
        self.n.bias.data = nn.init.uniform((width,), -0.5, 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return self.n(x)


class Gelu(nn.Module):
    """With erf, not its approximation."""

    def __call__(self, x: Tensor) -> Tensor:
        return tw.gelu(x)


class Attention(nn.Module):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tw.scaled_dot_product_attention(q, k, v)


class MatVec(nn.Module):
    """A row times the transpose of a square matrix of weights."""

    def __init__(self, width: int = 4096) -> None:
        self.f = nn.Linear(width, width, bias=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self.f(x)
