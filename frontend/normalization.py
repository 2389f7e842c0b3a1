"""Batch, layer, group and RMS normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.dims import Dim, product
from ..ir.dtypes import f32
from ..ir.errors import ShapeError
from .context import error
from .core import TensorLike, as_tensor, show
from .elementwise import rsqrt, square, stop_gradient
from .movement import reshape
from .reductions import mean

if TYPE_CHECKING:
    from .tensor import Tensor


def _per_channel(value: TensorLike, t: Tensor, what: str) -> Tensor:
    v = as_tensor(value, what=what)
    if v.shape != (t.shape[1],):
        raise error(ShapeError, f"{what} has one number per channel, shape {show((t.shape[1],))}", x=t, given=v)
    return reshape(v, (1, -1) + (1,) * (t.ndim - 2))


def batch_norm(
    x: TensorLike,
    running_mean: TensorLike,
    running_var: TensorLike,
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias per channel (axis 1), for inference.

    Computed as x * scale + shift with both from parameters alone, so that a convolution before it can absorb them.
    Source: Ioffe and Szegedy 2015.
    """
    t = as_tensor(x, what="batch_norm")
    _check_channels(t)
    scale = rsqrt(as_tensor(running_var, what="running_var") + eps)
    scale = scale if weight is None else scale * as_tensor(weight, what="weight")
    shift = -as_tensor(running_mean, what="running_mean") * scale
    shift = shift if bias is None else shift + as_tensor(bias, what="bias")
    return t * _per_channel(scale, t, "the scale") + _per_channel(shift, t, "the shift")


def _check_channels(t: Tensor) -> None:
    if t.ndim < 2:
        raise error(ShapeError, "batch_norm takes (N, C, ...): channels on axis 1", x=t)


def batch_norm_training(
    x: TensorLike,
    running_mean: TensorLike,
    running_var: TensorLike,
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the batch's own statistics. Returns the result, and the new running mean and variance.

    new = (1 - momentum) * running + momentum * batch, the variance with n / (n - 1) as in PyTorch. No gradient flows into
    the running statistics. Raises ShapeError when there is one value per channel.
    """
    t = as_tensor(x, what="batch_norm")
    _check_channels(t)
    axes = (0, *range(2, t.ndim))
    m = mean(t, axes, keepdims=True)
    centred = t - m
    v = mean(square(centred), axes, keepdims=True)
    y = centred * rsqrt(v + eps)
    y = y if weight is None else y * _per_channel(weight, t, "weight")
    y = y if bias is None else y + _per_channel(bias, t, "bias")
    count = product([t.shape[a] for a in axes])
    if isinstance(count, int) and count < 2:
        raise error(ShapeError, "batch_norm in training needs two values per channel or more; use a larger batch or eval()", x=t)
    unbiased = count / (count - 1) if isinstance(count, int) else as_tensor(count, f32) / (count - 1)
    old_mean, old_var = as_tensor(running_mean, what="running_mean"), as_tensor(running_var, what="running_var")
    flat_mean, flat_var = stop_gradient(reshape(m, (-1,))), stop_gradient(reshape(v, (-1,)))
    new_mean = old_mean * (1 - momentum) + flat_mean * momentum
    new_var = old_var * (1 - momentum) + flat_var * (momentum * unbiased)
    return y, new_mean.astype(old_mean.dtype), new_var.astype(old_var.dtype)


def _standardise(t: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = t - mean(t, axes, keepdims=True)
    return centred * rsqrt(mean(square(centred), axes, keepdims=True) + eps)


def _trailing(t: Tensor, normalized_shape: int | Sequence[Dim], what: str) -> tuple[int, ...]:
    shape = tuple(normalized_shape) if isinstance(normalized_shape, (tuple, list)) else (normalized_shape,)
    if not shape or t.shape[-len(shape) :] != shape:
        raise error(ShapeError, f"{what}: x must end in the normalised shape {show(shape)}", x=t)
    return tuple(range(t.ndim - len(shape), t.ndim))


def layer_norm(
    x: TensorLike,
    normalized_shape: int | Sequence[Dim],
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Zero mean and unit variance over the trailing dimensions, then * weight + bias (Ba, Kiros and Hinton 2016)."""
    t = as_tensor(x, what="layer_norm")
    y = _standardise(t, _trailing(t, normalized_shape, "layer_norm"), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def rms_norm(x: TensorLike, normalized_shape: int | Sequence[Dim], weight: TensorLike | None = None, eps: float = 1e-6) -> Tensor:
    """x divided by its root mean square over the trailing dimensions, then * weight (Zhang and Sennrich 2019)."""
    t = as_tensor(x, what="rms_norm")
    y = t * rsqrt(mean(square(t), _trailing(t, normalized_shape, "rms_norm"), keepdims=True) + eps)
    return y if weight is None else y * weight


def group_norm(
    x: TensorLike, num_groups: int, weight: TensorLike | None = None, bias: TensorLike | None = None, eps: float = 1e-5
) -> Tensor:
    """Zero mean and unit variance over groups of channels (axis 1) and all later axes (Wu and He 2018)."""
    t = as_tensor(x, what="group_norm")
    if t.ndim < 2 or not isinstance(t.shape[1], int) or num_groups < 1 or t.shape[1] % num_groups:
        raise error(ShapeError, f"group_norm: channels (axis 1) must divide into {num_groups} groups", x=t)
    grouped = reshape(t, (t.shape[0], num_groups, product(t.shape[1:]) // num_groups))
    y = reshape(_standardise(grouped, (2,), eps), t.shape)
    y = y if weight is None else y * _per_channel(weight, t, "weight")
    return y if bias is None else y + _per_channel(bias, t, "bias")
