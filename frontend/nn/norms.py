"""Normalisation layers. PyTorch's argument names and defaults; running statistics are buffers that training steps update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ...ir.errors import AttributeValueError, ShapeError
from .. import normalization
from ..context import error
from ..core import TensorLike, as_tensor, cast
from ..module import Module
from ..parameter import Buffer, Parameter
from ..tensor import Tensor
from . import init
from .layers import positive


class _RunningNorm(Module):
    """Scale and shift per channel, and running statistics, for batch and instance norm."""

    ranks: ClassVar[tuple[int, ...]]
    form: ClassVar[str]

    def _set(self, num_features: int, eps: float, momentum: float | None, affine: bool, track_running_stats: bool) -> None:
        positive(num_features=num_features)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.weight = Parameter(init.ones((num_features,))) if affine else None
        self.bias = Parameter(init.zeros((num_features,))) if affine else None
        self.running_mean = Buffer(init.zeros((num_features,))) if track_running_stats else None
        self.running_var = Buffer(init.ones((num_features,))) if track_running_stats else None

    def _checked(self, x: TensorLike) -> Tensor:
        name = type(self).__name__
        t = as_tensor(x, what=name)
        if t.ndim not in self.ranks:
            raise error(ShapeError, f"{name} takes {self.form}, not {t.ndim} dimensions", x=t)
        if t.shape[1] != self.num_features:
            raise error(ShapeError, f"{name}({self.num_features}) takes {self.num_features} channels (axis 1)", x=t)
        return t

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}"
        return text + ("" if self.affine else ", affine=False") + ("" if self.track_running_stats else ", no running statistics")


class _BatchNorm(_RunningNorm):
    ignored_state = ("num_batches_tracked",)  # PyTorch counts batches also where nothing uses the count

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        self._set(num_features, eps, momentum, affine, track_running_stats)
        counts = momentum is None and track_running_stats
        self.num_batches_tracked = Buffer(np.zeros((), np.int64)) if counts else None

    def forward(self, x: TensorLike) -> Tensor:
        t = self._checked(x)
        if self.running_mean is None or self.running_var is None:
            return normalization.batch_norm_statistics(t, self.weight, self.bias, self.eps)
        if not self.training:
            return normalization.batch_norm(t, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        momentum: float | Tensor | None = self.momentum
        if self.num_batches_tracked is not None:  # 1 / n makes the running statistics the mean of all batches so far
            count = self.num_batches_tracked + 1
            self.num_batches_tracked.update(count)
            momentum = 1.0 / cast(count, self.running_mean.dtype)
        assert momentum is not None
        y, mean, var = normalization.batch_norm_training(
            t, self.running_mean, self.running_var, self.weight, self.bias, momentum, self.eps
        )
        self.running_mean.update(mean)
        self.running_var.update(var)
        return y


class BatchNorm1d(_BatchNorm):
    """Batch norm per feature of (N, C) or (N, C, L): batch statistics in training, running ones otherwise.

    momentum=None makes the running statistics the mean over all batches; track_running_stats=False always uses the batch's.
    """

    ranks, form = (2, 3), "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm):
    """Batch norm per channel of (N, C, H, W). Arguments as `BatchNorm1d`."""

    ranks, form = (4,), "(N, C, H, W)"


class _InstanceNorm(_RunningNorm):
    ignored_state = ("num_batches_tracked",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
    ) -> None:
        self._set(num_features, eps, momentum, affine, track_running_stats)

    def forward(self, x: TensorLike) -> Tensor:
        t = self._checked(x)
        if self.running_mean is None or self.running_var is None:
            return normalization.instance_norm(t, self.weight, self.bias, self.eps)
        if not self.training:
            return normalization.batch_norm(t, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        assert self.momentum is not None
        y, mean, var = normalization.instance_norm_training(
            t, self.running_mean, self.running_var, self.weight, self.bias, self.momentum, self.eps
        )
        self.running_mean.update(mean)
        self.running_var.update(var)
        return y


class InstanceNorm1d(_InstanceNorm):
    """Normalisation of each example's channel of (N, C, L)."""

    ranks, form = (3,), "(N, C, L)"


class InstanceNorm2d(_InstanceNorm):
    """Normalisation of each example's channel of (N, C, H, W)."""

    ranks, form = (4,), "(N, C, H, W)"


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

    def __init__(self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps = shape, eps
        self.weight = Parameter(init.ones(shape)) if elementwise_affine else None

    def forward(self, x: TensorLike) -> Tensor:
        return normalization.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class GroupNorm(Module):
    """Normalisation over groups of channels of (N, C, ...)."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        positive(num_groups=num_groups, num_channels=num_channels)
        if num_channels % num_groups:
            raise AttributeValueError(f"GroupNorm: {num_channels} channels do not divide into {num_groups} groups")
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.weight = Parameter(init.ones((num_channels,))) if affine else None
        self.bias = Parameter(init.zeros((num_channels,))) if affine else None

    def forward(self, x: TensorLike) -> Tensor:
        return normalization.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}"
