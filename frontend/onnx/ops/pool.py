"""Pooling over windows, of any number of spatial axes: by our own kernels for one and two axes, by slices otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product as every
from typing import Any

import numpy as np

from ....ir.dims import Dim, as_int, product
from ....ir.dtypes import f32, f64, i64
from ... import elementwise as ew
from ...core import apply
from ...movement import concatenate, full, iota, reshape
from ...reductions import argmax, max, mean, sum
from ...tensor import Tensor
from ..call import Call
from ..registry import op
from .convolution import Pads, windows


def _setup(n: Call, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Pads, list[int]]:
    """kernel, strides, dilations, padding, and how much further ceil_mode lets the last window reach."""
    kernel = n.int_list("kernel_shape")
    if not kernel:
        n.fail("the attribute 'kernel_shape' is missing")
    strides, dilations, pads = windows(n, x, kernel)
    more = [0] * len(kernel)
    if n.flag("ceil_mode"):
        for k, size in enumerate(x.shape[2:]):
            size = n.fixed(size)
            reach = (kernel[k] - 1) * dilations[k] + 1
            room = size + sum_of(pads[k]) - reach
            count = -(-room // strides[k]) + 1
            if (count - 1) * strides[k] >= size + pads[k][0]:
                count -= 1
            more[k] = max_of((count - 1) * strides[k] - room, 0)
    return kernel, strides, dilations, pads, more


def sum_of(pair: Sequence[int]) -> int:
    return pair[0] + pair[1]


def max_of(a: int, b: int) -> int:
    return a if a > b else b


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float) -> Tensor:
    """Constant values around the spatial axes."""
    if not any(map(any, pads)):
        return x
    low, high = ((0, 0, *(p[k] for p in pads)) for k in (0, 1))
    return apply("pad", x, low=tuple(low), high=tuple(high), interior=(0,) * x.ndim, value=value)


def taps(n: Call, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    """For each element of the window, in row-major order, its values in all windows of an input that is padded already."""
    counts: list[Dim] = []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        counts.append((size - (k - 1) * d - 1) // s + 1)
    found: list[Tensor] = []
    n.bounded(as_int(product(kernel)), "elements of a window")
    for at in every(*map(range, kernel)):
        starts = (0, 0, *(a * d for a, d in zip(at, dilations, strict=True)))
        stops = (*x.shape[:2], *(b + (c - 1) * s + 1 for b, c, s in zip(starts[2:], counts, strides, strict=True)))
        found.append(apply("slice", x, starts=starts, stops=stops, steps=(1, 1, *strides)))
    return found


def _lowest(x: Tensor) -> float:
    if x.dtype.is_float:
        return -math.inf
    return float(np.iinfo(x.dtype.numpy).min)


def _flat(values: Sequence[int]) -> tuple[int, ...]:
    """A signal is an image of height 1."""
    return (1, *values)


@op("MaxPool")
def max_pool(n: Call) -> Any:
    x = n.tensor(0)
    kernel, strides, dilations, pads, more = _setup(n, x)
    order = n.integer("storage_order", 0)
    pads = [(a, b + m) for (a, b), m in zip(pads, more, strict=True)]
    if n.wants(1):
        return _with_positions(n, x, kernel, strides, dilations, pads, order)
    if len(kernel) <= 2 and x.dtype in (f32, f64):
        two = len(kernel) == 2
        image = x if two else reshape(x, (*x.shape[:2], 1, x.shape[2]))
        lift = tuple if two else _flat
        attrs = {"kernel": lift(kernel), "stride": lift(strides), "dilation": lift(dilations)}
        y = apply("max_pool2d", image, **attrs, padding=tuple(pads) if two else ((0, 0), *pads), layout="NCHW")
        return y if two else reshape(y, (*y.shape[:2], y.shape[3]))
    return reduce(ew.maximum, taps(n, padded(x, pads, _lowest(x)), kernel, strides, dilations))


def _with_positions(
    n: Call, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Pads, order: int
) -> tuple[Tensor, Tensor]:
    """The largest of each window, and its position in the flattened input (of column-major images where order is 1)."""
    parts = taps(n, padded(x, pads, _lowest(x)), kernel, strides, dilations)
    shape = parts[0].shape
    stacked = concatenate([reshape(p, (*shape, 1)) for p in parts], len(shape))
    which = argmax(stacked, len(shape))
    rank = len(kernel)
    steps = [product(x.shape[3 + k :]) if order == 0 else product(x.shape[2 : 2 + k]) for k in range(rank)]
    position = reshape(iota((shape[0], shape[1]), 0) * x.shape[1] + iota((shape[0], shape[1]), 1), (*shape[:2], *(1,) * rank))
    position = position * product(x.shape[2:])
    rest = which
    for k in reversed(range(rank)):
        inside = ew.remainder(rest, kernel[k])
        rest = ew.floor_divide(rest, kernel[k])
        at = iota(shape, 2 + k) * strides[k] - pads[k][0] + inside * dilations[k]
        position = position + at * steps[k]
    return max(stacked, len(shape)), position


def _average(
    n: Call, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Pads,
    more: Sequence[int], include: bool,
) -> Tensor:  # fmt: skip
    """The sum of each window by the number of its elements: those of the input, and with `include` of the padding as well."""
    reach = [(a, b + m) for (a, b), m in zip(pads, more, strict=True)]
    total = reduce(ew.add, taps(n, padded(x, reach, 0.0), kernel, strides, dilations))
    ones = full((1, 1, *x.shape[2:]), 1.0, x.dtype)
    if include:
        ones = padded(padded(ones, pads, 1.0), [(0, m) for m in more], 0.0)
    else:
        ones = padded(ones, reach, 0.0)
    return total / reduce(ew.add, taps(n, ones, kernel, strides, dilations))


@op("AveragePool")
def average_pool(n: Call) -> Tensor:
    x = n.tensor(0)
    kernel, strides, dilations, pads, more = _setup(n, x)
    include = n.flag("count_include_pad")
    if len(kernel) <= 2 and all(d == 1 for d in dilations) and x.dtype in (f32, f64) and not any(more):
        two = len(kernel) == 2
        image = x if two else reshape(x, (*x.shape[:2], 1, x.shape[2]))
        lift = tuple if two else _flat
        attrs = {"kernel": lift(kernel), "stride": lift(strides), "padding": tuple(pads) if two else ((0, 0), *pads)}
        y = apply("avg_pool2d", image, **attrs, layout="NCHW", count_include_pad=include)
        return y if two else reshape(y, (*y.shape[:2], y.shape[3]))
    return _average(n, x, kernel, strides, dilations, pads, more, include)


@op("LpPool")
def lp_pool(n: Call) -> Tensor:
    x, p = n.tensor(0), n.number("p", 2.0)
    kernel, strides, dilations, pads, more = _setup(n, x)
    reach = [(a, b + m) for (a, b), m in zip(pads, more, strict=True)]
    powers = ew.power(ew.abs(padded(x, reach, 0.0)), p)
    return ew.power(reduce(ew.add, taps(n, powers, kernel, strides, dilations)), 1.0 / p)


def _global(name: str, fn: Callable[..., Tensor]) -> None:
    def convert(n: Call) -> Tensor:
        x = n.tensor(0)
        if x.ndim < 3:
            n.fail(f"takes (N, C, ...), not {x.ndim} dimensions")
        return fn(x, tuple(range(2, x.ndim)), keepdims=True)

    op(name)(convert)


_global("GlobalAveragePool", mean)
_global("GlobalMaxPool", max)


@op("GlobalLpPool")
def global_lp_pool(n: Call) -> Tensor:
    x, p = n.tensor(0), n.number("p", 2.0)
    return ew.power(sum(ew.power(ew.abs(x), p), tuple(range(2, x.ndim)), keepdims=True), 1.0 / p)


@op("MaxUnpool")
def max_unpool(n: Call) -> Tensor:
    """Each value at the position it came from, zeros elsewhere. Positions count in the least shape."""
    x, at = n.tensor(0), n.tensor(1)
    kernel = n.int_list("kernel_shape")
    if not kernel:
        n.fail("the attribute 'kernel_shape' is missing")
    count = len(kernel)
    strides, pads = n.int_list("strides") or (1,) * count, n.int_list("pads") or (0,) * (2 * count)
    own: list[Dim] = []
    for k in range(count):
        own.append((x.shape[2 + k] - 1) * strides[k] + kernel[k] - pads[k] - pads[k + count])
    shape = (*x.shape[:2], *own)
    if n.has(2):
        shape = n.dims(2)
    flat = full((product(shape),), 0, x.dtype)
    index = reshape(at.astype(i64), (-1,))
    if shape != (*x.shape[:2], *own):
        index = _in_shape(index, (*x.shape[:2], *own), shape)
    return reshape(apply("scatter_add", flat, index, reshape(x, (-1,)), axis=0), shape)


def _in_shape(index: Tensor, old: Sequence[Dim], new: Sequence[Dim]) -> Tensor:
    """Positions in a flattened array of one shape as positions in one of another."""
    result: Tensor | None = None
    stride: Dim = 1
    for before, after in zip(reversed(old), reversed(new), strict=True):
        part = ew.remainder(index, before) * stride
        result = part if result is None else result + part
        index, stride = ew.floor_divide(index, before), stride * after
    return index if result is None else result
