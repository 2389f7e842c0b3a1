"""Pooling layers. PyTorch's names, arguments and defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from .. import pooling
from ..core import TensorLike
from ..module import Module
from ..tensor import Tensor

Pair = int | Sequence[int]
Output = int | None | Sequence[int | None]


class _MaxPool(Module):
    function: ClassVar[Callable[..., Tensor]]

    def __init__(
        self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, dilation: Pair = 1, ceil_mode: bool = False
    ) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, kernel_size if stride is None else stride, padding
        self.dilation, self.ceil_mode = dilation, ceil_mode

    def forward(self, x: TensorLike) -> Tensor:
        return type(self).function(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def extra_repr(self) -> str:
        text = f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"
        text += "" if self.dilation == 1 else f", dilation={self.dilation}"
        return text + (", ceil_mode=True" if self.ceil_mode else "")


class MaxPool1d(_MaxPool):
    """The largest value of each window of (N, C, L)."""

    function = staticmethod(pooling.max_pool1d)


class MaxPool2d(_MaxPool):
    """The largest value of each window of (N, C, H, W)."""

    function = staticmethod(pooling.max_pool2d)


class AvgPool1d(Module):
    """The average of each window of (N, C, L)."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, kernel_size if stride is None else stride, padding
        self.ceil_mode, self.count_include_pad = ceil_mode, count_include_pad

    def _arguments(self) -> dict[str, Any]:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        return {n: getattr(self, n) for n in names}

    def forward(self, x: TensorLike) -> Tensor:
        return pooling.avg_pool1d(x, **self._arguments())

    def extra_repr(self) -> str:
        text = f"{self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return text + (", ceil_mode=True" if self.ceil_mode else "")


class AvgPool2d(AvgPool1d):
    """The average of each window of (N, C, H, W)."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)
        self.divisor_override = divisor_override

    def forward(self, x: TensorLike) -> Tensor:
        return pooling.avg_pool2d(x, **self._arguments(), divisor_override=self.divisor_override)


class _AdaptivePool(Module):
    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, output_size: Output) -> None:
        self.output_size = output_size

    def forward(self, x: TensorLike) -> Tensor:
        return type(self).function(x, self.output_size)

    def extra_repr(self) -> str:
        return f"{self.output_size}"


class AdaptiveAvgPool1d(_AdaptivePool):
    """Averages of (N, C, L) over output_size windows that share the signal out evenly."""

    function = staticmethod(pooling.adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptivePool):
    """Averages of (N, C, H, W) over output_size windows that share the image out evenly; 1 is global average pooling."""

    function = staticmethod(pooling.adaptive_avg_pool2d)


class AdaptiveMaxPool1d(_AdaptivePool):
    """The largest of (N, C, L) in each of output_size windows that share the signal out evenly."""

    function = staticmethod(pooling.adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptivePool):
    """The largest of (N, C, H, W) in each of output_size windows that share the image out evenly; 1 is global max pooling."""

    function = staticmethod(pooling.adaptive_max_pool2d)
