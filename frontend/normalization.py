"""Batch, layer, group, instance and RMS normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.dims import Dim, product
from ..ir.dtypes import f32, f64
from ..ir.errors import ShapeError
from .context import error
from .convolution import as_image, as_signal
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
    if t.ndim == 3:  # as the convolution before it, which is one of images: only then can it absorb this
        return as_signal(batch_norm(as_image(t), running_mean, running_var, weight, bias, eps))
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
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the batch's own statistics. Returns the result, and the new running mean and variance.

    new = (1 - momentum) * running + momentum * batch, the variance with n / (n - 1) as in PyTorch. No gradient flows into
    the running statistics. Raises ShapeError when there is one value per channel, or none.
    """
    t = as_tensor(x, what="batch_norm")
    y, m, v = _batch_standardised(t, weight, bias, eps)
    count = product([d for a, d in enumerate(t.shape) if a != 1])
    new_mean, new_var = _blended(running_mean, running_var, m, v, momentum, count)
    return y, new_mean, new_var


def batch_norm_statistics(
    x: TensorLike, weight: TensorLike | None = None, bias: TensorLike | None = None, eps: float = 1e-5
) -> Tensor:
    """Batch norm by the batch's own statistics, which are not kept."""
    return _batch_standardised(as_tensor(x, what="batch_norm"), weight, bias, eps)[0]


def _batch_standardised(
    t: Tensor, weight: TensorLike | None, bias: TensorLike | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and variance per channel."""
    _check_channels(t)
    if t.ndim == 3:
        y, m, v = _batch_standardised(as_image(t), weight, bias, eps)
        return as_signal(y), m, v
    axes = (0, *range(2, t.ndim))
    count = product([t.shape[a] for a in axes])
    if isinstance(count, int) and count < 2:
        raise error(ShapeError, "batch_norm in training needs two values per channel or more; use a larger batch or eval()", x=t)
    m = mean(t, axes, keepdims=True)
    centred = t - m
    v = mean(square(centred), axes, keepdims=True)
    y = centred * rsqrt(v + eps)
    y = y if weight is None else y * _per_channel(weight, t, "weight")
    y = y if bias is None else y + _per_channel(bias, t, "bias")
    return y, reshape(m, (-1,)), reshape(v, (-1,))


def _blended(
    running_mean: TensorLike, running_var: TensorLike, m: Tensor, v: Tensor, momentum: float | Tensor, count: Dim
) -> tuple[Tensor, Tensor]:
    """New running statistics from the mean and (biased) variance of `count` values per channel."""
    old_mean, old_var = as_tensor(running_mean, what="running_mean"), as_tensor(running_var, what="running_var")
    unbiased = count / (count - 1) if isinstance(count, int) else as_tensor(count, f32) / (count - 1)
    new_mean = old_mean * (1 - momentum) + stop_gradient(m) * momentum
    new_var = old_var * (1 - momentum) + stop_gradient(v) * (momentum * unbiased)
    return new_mean.astype(old_mean.dtype), new_var.astype(old_var.dtype)


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


def rms_norm(
    x: TensorLike, normalized_shape: int | Sequence[Dim], weight: TensorLike | None = None, eps: float | None = None
) -> Tensor:
    """x divided by its root mean square over the trailing dimensions, then * weight (Zhang and Sennrich 2019).

    eps is added to the mean square; None is the spacing of x's floats at 1 (f32's for narrower ones), as in PyTorch.
    """
    t = as_tensor(x, what="rms_norm")
    small = eps if eps is not None else 2.0**-52 if t.dtype is f64 else 2.0**-23
    y = t * rsqrt(mean(square(t), _trailing(t, normalized_shape, "rms_norm"), keepdims=True) + small)
    return y if weight is None else y * weight


def group_norm(
    x: TensorLike, num_groups: int, weight: TensorLike | None = None, bias: TensorLike | None = None, eps: float = 1e-5
) -> Tensor:
    """Zero mean and unit variance over groups of channels (axis 1) and all later axes (Wu and He 2018)."""
    t = as_tensor(x, what="group_norm")
    if t.ndim < 2 or not isinstance(t.shape[1], int) or num_groups < 1 or t.shape[1] % num_groups:
        raise error(ShapeError, f"group_norm: channels (axis 1) must divide into {num_groups} groups", x=t)
    each = t.shape[1] // num_groups
    grouped = reshape(t, (t.shape[0], num_groups, each, *t.shape[2:]))
    y = _standardise(grouped, tuple(range(2, grouped.ndim)), eps)
    # Scaled before it is put back, so that no reshape stands between: one kernel does all.
    ends = (1, num_groups, each, *(1,) * (t.ndim - 2))
    y = y if weight is None else y * reshape(_per_channel(weight, t, "weight"), ends)
    y = y if bias is None else y + reshape(_per_channel(bias, t, "bias"), ends)
    return reshape(y, t.shape)


def instance_norm(x: TensorLike, weight: TensorLike | None = None, bias: TensorLike | None = None, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance over each example's channel, of (N, C, ...) (Ulyanov et al. 2016).

    Raises ShapeError when there is one value per channel, which would give zero.
    """
    t = as_tensor(x, what="instance_norm")
    y = _standardise(t, _positions(t), eps)
    y = y if weight is None else y * _per_channel(weight, t, "weight")
    return y if bias is None else y + _per_channel(bias, t, "bias")


def _positions(t: Tensor) -> tuple[int, ...]:
    if t.ndim < 3:
        raise error(ShapeError, "instance_norm takes (N, C, L) or (N, C, H, W): it needs an axis after the channels", x=t)
    count = product(t.shape[2:])
    if isinstance(count, int) and count < 2:
        raise error(ShapeError, "instance_norm needs two values per channel or more: of one, the result is always 0", x=t)
    return tuple(range(2, t.ndim))


def instance_norm_training(
    x: TensorLike,
    running_mean: TensorLike,
    running_var: TensorLike,
    weight: TensorLike | None = None,
    bias: TensorLike | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Instance norm, and new running statistics: blended with the mean over examples of each example's own."""
    t = as_tensor(x, what="instance_norm")
    axes = _positions(t)
    m = mean(t, axes, keepdims=True)
    v = mean(square(t - m), axes)
    count = product([t.shape[a] for a in axes])
    new_mean, new_var = _blended(running_mean, running_var, mean(m.reshape(*v.shape), 0), mean(v, 0), momentum, count)
    return instance_norm(t, weight, bias, eps), new_mean, new_var
