"""Normalisation and softmax."""

from __future__ import annotations

from collections.abc import Callable

from ....ir.dims import product
from ....ir.dtypes import f32, f64
from ... import elementwise as ew
from ... import normalization as norms
from ... import reductions as red
from ...core import normalize_axis
from ...movement import pad, repeat, reshape
from ...pooling import avg_pool2d
from ...tensor import Tensor
from ..call import Call
from ..registry import op


def _softmax(name: str, fn: Callable[..., Tensor]) -> None:
    def flat(n: Call) -> Tensor:
        """Before opset 13: over all axes from one on, as if they were one."""
        x = n.tensor(0)
        axis = n.integer("axis", 1)
        axis = axis + x.ndim if axis < 0 else axis
        return reshape(fn(reshape(x, (product(x.shape[:axis]), product(x.shape[axis:]))), 1), x.shape)

    def along(n: Call) -> Tensor:
        x = n.tensor(0)
        return fn(x, normalize_axis(n.integer("axis", -1), x.ndim, name))

    op(name, 1)(flat)
    op(name, 13)(along)


_softmax("Softmax", red.softmax)
_softmax("LogSoftmax", red.log_softmax)


@op("BatchNormalization")
def batch_norm(n: Call) -> object:
    x, scale, bias, mean, var = (n.tensor(i) for i in range(5))
    eps, momentum = n.number("epsilon", 1e-5), n.number("momentum", 0.9)
    n.ignore("spatial", "is_test", "consumed_inputs")
    if n.opset < 9 and n.integer("spatial", 1) != 1:
        n.unsupported("spatial=0: statistics for each element")
    if not n.flag("training_mode"):
        if any(n.wants(i) for i in range(1, n.outputs)):
            n.unsupported("running statistics outside of training mode")
        y = norms.batch_norm(x.astype(scale.dtype), mean.astype(scale.dtype), var.astype(scale.dtype), scale, bias, eps)
        return y.astype(x.dtype)
    axes = (0, *range(2, x.ndim))
    wide = x if x.dtype in (f32, f64) else x.astype(f32)
    m = red.mean(wide, axes)
    v = red.var(wide, axes)
    y = norms.batch_norm(wide, m, v, scale.astype(wide.dtype), bias.astype(wide.dtype), eps).astype(x.dtype)
    new_mean = mean * momentum + m.astype(mean.dtype) * (1 - momentum)
    new_var = var * momentum + v.astype(var.dtype) * (1 - momentum)
    return (y, new_mean, new_var)[: max(n.outputs, 1)]


@op("InstanceNormalization")
def instance_norm(n: Call) -> Tensor:
    n.ignore("consumed_inputs")
    x, scale, bias = n.tensor(0), n.tensor(1), n.tensor(2)
    axes = tuple(range(2, x.ndim))
    centred = x - red.mean(x, axes, keepdims=True)
    y = centred * ew.rsqrt(red.mean(ew.square(centred), axes, keepdims=True) + n.number("epsilon", 1e-5))
    line = (1, -1, *(1,) * (x.ndim - 2))
    return y * reshape(scale, line) + reshape(bias, line)


@op("LayerNormalization")
def layer_norm(n: Call) -> tuple[Tensor, ...]:
    x, scale, bias = n.tensor(0), n.tensor(1), n.optional(2)
    axis, eps = normalize_axis(n.integer("axis", -1), x.ndim, "LayerNormalization"), n.number("epsilon", 1e-5)
    stash = f32 if n.integer("stash_type", 1) == 1 else x.dtype
    wide = x.astype(stash) if x.dtype is not f64 else x
    axes = tuple(range(axis, x.ndim))
    m = red.mean(wide, axes, keepdims=True)
    centred = wide - m
    inverse = ew.rsqrt(red.mean(ew.square(centred), axes, keepdims=True) + eps)
    y = (centred * inverse).astype(x.dtype) * scale
    y = y if bias is None else y + bias
    return (y, m, inverse)[: max(n.outputs, 1)]


@op("RMSNormalization")
def rms_norm(n: Call) -> Tensor:
    x, scale = n.tensor(0), n.tensor(1)
    axis, eps = normalize_axis(n.integer("axis", -1), x.ndim, "RMSNormalization"), n.number("epsilon", 1e-5)
    stash = f32 if n.integer("stash_type", 1) == 1 else x.dtype
    wide = x.astype(stash) if x.dtype is not f64 else x
    y = wide * ew.rsqrt(red.mean(ew.square(wide), tuple(range(axis, x.ndim)), keepdims=True) + eps)
    return y.astype(scale.dtype) * scale


@op("GroupNormalization")
def group_norm(n: Call) -> Tensor:
    x, scale, bias = n.tensor(0), n.tensor(1), n.tensor(2)
    groups, eps = n.integer("num_groups"), n.number("epsilon", 1e-5)
    wide = x if x.dtype is f64 or n.integer("stash_type", 1) != 1 else x.astype(f32)
    if n.opset < 21:  # one number for each group, not for each channel
        each = x.shape[1] // groups
        if not isinstance(each, int):
            n.unsupported("a symbolic number of channels")
        scale, bias = (repeat(t, each, 0) for t in (scale, bias))
    y = norms.group_norm(wide, groups, None, None, eps).astype(x.dtype)
    line = (1, -1, *(1,) * (x.ndim - 2))
    return y * reshape(scale, line) + reshape(bias, line)


@op("MeanVarianceNormalization")
def mean_variance(n: Call) -> Tensor:
    x = n.tensor(0)
    axes = n.int_list("axes") or (0, 2, 3)
    centred = x - red.mean(x, axes, keepdims=True)
    return centred / (ew.sqrt(red.mean(ew.square(centred), axes, keepdims=True)) + 1e-9)


@op("LpNormalization")
def lp_normalization(n: Call) -> Tensor:
    x, p = n.tensor(0), n.integer("p", 2)
    axis = normalize_axis(n.integer("axis", -1), x.ndim, "LpNormalization")
    if p not in (1, 2):
        n.unsupported(f"p={p}")
    size = red.sum(ew.abs(x), axis, keepdims=True) if p == 1 else red.norm(x, axis, keepdims=True)
    return ew.where(ew.equal(size, 0.0), 0.0, x / size)


@op("LRN")
def lrn(n: Call) -> Tensor:
    """x / (bias + alpha / size * sum of squares over neighbouring channels) ** beta (Krizhevsky et al. 2012)."""
    x, size = n.tensor(0), n.integer("size")
    alpha, beta, bias = n.number("alpha", 1e-4), n.number("beta", 0.75), n.number("bias", 1.0)
    if size < 1:
        n.fail(f"size={size}")
    channels = n.fixed(x.shape[1])
    before, after = min((size - 1) // 2, channels), min(size // 2, channels)  # further away there is nothing
    # channels as rows of a picture: sums over windows of rows
    squares = reshape(ew.square(x), (x.shape[0], 1, channels, product(x.shape[2:])))
    if before != after:
        squares = pad(squares, [(0, 0), (0, 0), (before, after), (0, 0)])
    around = (before, 0) if before == after else 0
    window = n.bounded(before + after + 1, "channels in a window")
    sums = avg_pool2d(squares, (window, 1), stride=1, padding=around, divisor_override=1)
    total = reshape(sums, x.shape)
    return x * ew.power(total * (alpha / size) + bias, -beta)
