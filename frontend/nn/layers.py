"""Layers with weights: linear, convolution, embedding. PyTorch's argument names and defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ...ir.errors import AttributeValueError
from .. import activations, attention, convolution, linalg
from ..core import TensorLike
from ..module import Module
from ..parameter import Parameter
from ..tensor import Tensor
from . import init
from .init import Seed


def positive(**sizes: int) -> None:
    """Raises AttributeValueError unless all are positive ints."""
    for name, n in sizes.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise AttributeValueError(f"{name} is a positive int, not {n!r}")


class Linear(Module):
    """x @ weight.T + bias over the last dimension; weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, seed: Seed = None) -> None:
        positive(in_features=in_features, out_features=out_features)
        source = init.generator(seed)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(init.kaiming_uniform((out_features, in_features), a=math.sqrt(5), seed=source))
        self.bias = Parameter(init.linear_bias((out_features,), in_features, source)) if bias else None

    def forward(self, x: TensorLike) -> Tensor:
        return linalg.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}" + ("" if self.bias is not None else ", bias=False")


class _Convolution(Module):
    """What the four convolutions share. Their weights are drawn as PyTorch's: uniform, variance 1 / (3 fan_in)."""

    count: ClassVar[int]  # spatial axes
    transposed: ClassVar[bool] = False

    def _set(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, groups: int,
        bias: bool, padding_mode: str, seed: Seed,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        positive(in_channels=in_channels, out_channels=out_channels, groups=groups)
        if in_channels % groups or out_channels % groups:
            raise AttributeValueError(f"{name}: {in_channels} in and {out_channels} out channels must divide by groups={groups}")
        if padding_mode != "zeros":
            raise AttributeValueError(f"{name}: padding_mode is 'zeros', not {padding_mode!r}; pad the input before it")
        kernel = convolution.several(kernel_size, self.count, "kernel_size")
        source = init.generator(seed)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        shape = (first, second // groups, *kernel)
        self.weight = Parameter(init.kaiming_uniform(shape, a=math.sqrt(5), seed=source))
        self.bias = Parameter(init.linear_bias((out_channels,), math.prod(shape[1:]), source)) if bias else None

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding!r}"
        text += f", dilation={self.dilation}" if self.dilation not in (1, (1,) * self.count) else ""
        return text + (f", groups={self.groups}" if self.groups > 1 else "") + ("" if self.bias is not None else ", bias=False")


class _Conv(_Convolution):
    function: ClassVar[Callable[..., Tensor]]

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
        padding_mode: str = "zeros",
        *,
        seed: Seed = None,
    ) -> None:
        self._set(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, seed)

    def forward(self, x: TensorLike) -> Tensor:
        return type(self).function(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv1d(_Conv):
    """1-D convolution of (N, C, L); weight (out_channels, in_channels / groups, K). See `tw.conv1d`."""

    count = 1
    function = staticmethod(convolution.conv1d)


class Conv2d(_Conv):
    """2-D convolution of NCHW images; weight (out_channels, in_channels / groups, KH, KW). See `tw.conv2d`.

    groups=in_channels makes it depthwise.
    """

    count = 2
    function = staticmethod(convolution.conv2d)


class _ConvTranspose(_Convolution):
    function: ClassVar[Callable[..., Tensor]]
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        *,
        seed: Seed = None,
    ) -> None:
        self.output_padding = output_padding
        self._set(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, seed)

    def forward(self, x: TensorLike) -> Tensor:
        return type(self).function(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class ConvTranspose1d(_ConvTranspose):
    """The transpose of Conv1d; weight (in_channels, out_channels / groups, K). See `tw.conv_transpose1d`."""

    count = 1
    function = staticmethod(convolution.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose):
    """The transpose of Conv2d; weight (in_channels, out_channels / groups, KH, KW). See `tw.conv_transpose2d`."""

    count = 2
    function = staticmethod(convolution.conv_transpose2d)


class Embedding(Module):
    """Rows of a table looked up by integer indices; weight (num_embeddings, embedding_dim).

    The row `padding_idx` starts at zero and gets no gradient. An index outside the table is clipped into it.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, seed: Seed = None) -> None:
        positive(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise AttributeValueError(f"Embedding: padding_idx {padding_idx} is no row of a table of {num_embeddings}")
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        table = init.normal((num_embeddings, embedding_dim), seed=seed)
        if self.padding_idx is not None:
            table[self.padding_idx] = 0
        self.weight = Parameter(table)

    def forward(self, indices: TensorLike) -> Tensor:
        return attention.embedding(indices, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        text = ", ".join(map(str, self.weight.shape))
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


class PReLU(Module):
    """x where positive, weight * x elsewhere; weight (num_parameters,): one, or one per channel."""

    def __init__(self, num_parameters: int = 1, init: float = 0.25) -> None:
        positive(num_parameters=num_parameters)
        self.weight = Parameter([float(init)] * num_parameters)

    def forward(self, x: TensorLike) -> Tensor:
        return activations.prelu(x, self.weight)

    def extra_repr(self) -> str:
        return f"num_parameters={self.weight.shape[0]}"
