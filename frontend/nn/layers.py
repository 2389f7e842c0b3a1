"""Layers with parameters: linear, convolution, embedding, normalisation. PyTorch's argument names and defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...ir.errors import AttributeValueError
from .. import attention, convolution, linalg, normalization
from ..core import TensorLike, as_tensor
from ..module import Module
from ..parameter import Buffer, Parameter
from ..tensor import Tensor
from . import init
from .init import Seed


def _positive(**sizes: int) -> None:
    for name, n in sizes.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise AttributeValueError(f"{name} is a positive int, not {n!r}")


class Linear(Module):
    """x @ weight.T + bias over the last dimension; weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, seed: Seed = None) -> None:
        _positive(in_features=in_features, out_features=out_features)
        source = init.generator(seed)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(init.kaiming_uniform((out_features, in_features), a=math.sqrt(5), seed=source))
        self.bias = Parameter(init.linear_bias((out_features,), in_features, source)) if bias else None

    def forward(self, x: TensorLike) -> Tensor:
        return linalg.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}" + ("" if self.bias is not None else ", bias=False")


class Conv2d(Module):
    """2-D convolution of NCHW images; weight (out_channels, in_channels / groups, KH, KW). See `tw.conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Any = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        seed: Seed = None,
    ) -> None:
        _positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise AttributeValueError(f"Conv2d: {in_channels} in and {out_channels} out channels must divide by groups={groups}")
        kernel = convolution.pair(kernel_size, "kernel_size")
        source = init.generator(seed)
        shape = (out_channels, in_channels // groups, *kernel)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = Parameter(init.kaiming_uniform(shape, a=math.sqrt(5), seed=source))
        self.bias = Parameter(init.linear_bias((out_channels,), math.prod(shape[1:]), source)) if bias else None

    def forward(self, x: TensorLike) -> Tensor:
        return convolution.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        out, inner, kh, kw = self.weight.shape
        text = f"{inner * self.groups}, {out}, kernel_size=({kh}, {kw}), stride={self.stride}, padding={self.padding!r}"
        text += f", dilation={self.dilation}" if self.dilation not in (1, (1, 1)) else ""
        return text + (f", groups={self.groups}" if self.groups > 1 else "") + ("" if self.bias is not None else ", bias=False")


class Embedding(Module):
    """Rows of a table looked up by integer indices; weight (num_embeddings, embedding_dim)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, seed: Seed = None) -> None:
        _positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.weight = Parameter(init.normal((num_embeddings, embedding_dim), seed=seed))

    def forward(self, indices: TensorLike) -> Tensor:
        return attention.embedding(indices, self.weight)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class _BatchNorm(Module):
    ndim: int | None = None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        _positive(num_features=num_features)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = Parameter(init.ones((num_features,))) if affine else None
        self.bias = Parameter(init.zeros((num_features,))) if affine else None
        self.running_mean = Buffer(init.zeros((num_features,)))
        self.running_var = Buffer(init.ones((num_features,)))

    def forward(self, x: TensorLike) -> Tensor:
        t = as_tensor(x, what=type(self).__name__)
        if not self.training:
            return normalization.batch_norm(t, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        y, mean, var = normalization.batch_norm_training(
            t, self.running_mean, self.running_var, self.weight, self.bias, self.momentum, self.eps
        )
        self.running_mean.update(mean)
        self.running_var.update(var)
        return y

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum:g}"


class BatchNorm1d(_BatchNorm):
    """Batch norm per feature of (N, C) or (N, C, L). Running statistics are buffers, updated by training steps."""


class BatchNorm2d(_BatchNorm):
    """Batch norm per channel of (N, C, H, W). Running statistics are buffers, updated by training steps."""


class LayerNorm(Module):
    """Normalisation over the trailing dimensions `normalized_shape`."""

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps = shape, eps
        self.weight = Parameter(init.ones(shape)) if elementwise_affine else None
        self.bias = Parameter(init.zeros(shape)) if elementwise_affine and bias else None

    def forward(self, x: TensorLike) -> Tensor:
        return normalization.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps:g}"


class RMSNorm(Module):
    """Division by the root mean square over the trailing dimensions `normalized_shape`."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps = shape, eps
        self.weight = Parameter(init.ones(shape)) if elementwise_affine else None

    def forward(self, x: TensorLike) -> Tensor:
        return normalization.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps:g}"


class GroupNorm(Module):
    """Normalisation over groups of channels of (N, C, ...)."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        _positive(num_groups=num_groups, num_channels=num_channels)
        if num_channels % num_groups:
            raise AttributeValueError(f"GroupNorm: {num_channels} channels do not divide into {num_groups} groups")
        self.num_groups, self.eps = num_groups, eps
        self.weight = Parameter(init.ones((num_channels,))) if affine else None
        self.bias = Parameter(init.zeros((num_channels,))) if affine else None

    def forward(self, x: TensorLike) -> Tensor:
        return normalization.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, eps={self.eps:g}"
