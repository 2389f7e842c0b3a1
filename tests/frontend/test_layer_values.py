"""Values of convolutions, pooling, norms and activations against loops and formulas in numpy, one element at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import tensorwright as tw
from tensorwright import nn
from tensorwright.frontend import trace_model

from .support import Array, execute, run

RNG = np.random.default_rng(53)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def close(found: Array, want: Array) -> None:
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


# -- convolution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 3, 2, 2), (3, 1, 1, 4)])
def test_conv1d(stride: int, padding: int, dilation: int, groups: int) -> None:
    x, w, b = floats(2, 4, 11), floats(8, 4 // groups, 3), floats(8)
    wide = np.pad(x, ((0, 0), (0, 0), (padding, padding))).astype(np.float64)
    length = (wide.shape[2] - 2 * dilation - 1) // stride + 1
    want = np.zeros((2, 8, length))
    for n, o, i in np.ndindex(want.shape):
        first = o // (8 // groups) * (4 // groups)
        for c, k in np.ndindex(4 // groups, 3):
            want[n, o, i] += wide[n, first + c, i * stride + k * dilation] * w[o, c, k]
    close(run(lambda *a: tw.conv1d(*a, stride, padding, dilation, groups), x, w, b), want + b[:, None])


TRANSPOSED: list[tuple[Any, Any, Any, int, Any]] = [
    (1, 0, 0, 1, 1),
    (2, 1, 1, 2, 1),
    ((3, 1), (0, 2), (2, 0), 1, (1, 2)),
    ((1, 2), (1, 0), (2, 1), 2, (3, 1)),  # more output padding than padding, and than the stride
]


@pytest.mark.parametrize(("stride", "padding", "extra", "groups", "dilation"), TRANSPOSED)
def test_conv_transpose2d(stride: Any, padding: Any, extra: Any, groups: int, dilation: Any) -> None:
    """Every pixel adds the kernel at its place; what lies in the padding is cut off."""
    x, w, b = floats(2, 4, 3, 4), floats(4, 6 // groups, 3, 2), floats(6)
    (sy, sx), (py, px), (ey, ex), (dy, dx) = ((v, v) if isinstance(v, int) else v for v in (stride, padding, extra, dilation))
    whole = np.zeros((2, 6, 2 * sy + 2 * dy + 1 + ey, 3 * sx + dx + 1 + ex))
    for n, c, i, j in np.ndindex(x.shape):
        first = c // (4 // groups) * (6 // groups)
        for o, k, m in np.ndindex(6 // groups, 3, 2):
            whole[n, first + o, i * sy + k * dy, j * sx + m * dx] += float(x[n, c, i, j]) * w[c, o, k, m]
    want = whole[:, :, py : whole.shape[2] - py, px : whole.shape[3] - px] + b[:, None, None]
    close(run(lambda *a: tw.conv_transpose2d(*a, stride, padding, extra, groups, dilation), x, w, b), want)


def test_conv_transpose1d_is_that_of_two_dimensions() -> None:
    x, w = floats(2, 4, 5), floats(4, 3, 4)
    one = run(lambda x, w: tw.conv_transpose1d(x, w, None, 2, 1, 1), x, w)
    two = run(lambda x, w: tw.conv_transpose2d(x, w, None, (1, 2), (0, 1), (0, 1)), x[:, :, None], w[:, :, None])
    close(one, two[:, :, 0])


# -- pooling --------------------------------------------------------------------------------------------------------------


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> list[list[int]]:
    """The places of each window along an axis, those outside included; with ceil, a last one that starts inside."""
    found = []
    start = -padding
    while True:
        places = [start + k * dilation for k in range(kernel)]
        past = places[-1] > size + padding - 1
        if past and not (ceil and start < size and found[-1][-1] < size + padding - 1):
            return found
        found.append(places)
        start += stride


POOLS: list[tuple[Any, Any, Any, Any, bool]] = [
    ((2, 2), (2, 2), (0, 0), (1, 1), False),
    ((3, 2), (2, 3), (1, 1), (1, 1), True),
    ((3, 2), (3, 1), (1, 0), (2, 3), True),
    ((2, 3), (1, 2), (1, 1), (2, 1), False),
    ((2, 2), (5, 4), (0, 1), (1, 1), True),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "ceil"), POOLS)
def test_pooling(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> None:
    x = floats(2, 3, 8, 9)
    rows, columns = (windows(x.shape[2 + d], kernel[d], stride[d], padding[d], dilation[d], ceil) for d in (0, 1))

    def pooled(reduce: Callable[[list[float], int], float]) -> Array:
        want = np.zeros((2, 3, len(rows), len(columns)))
        for n, c, i, j in np.ndindex(want.shape):
            places = [(y, z) for y in rows[i] for z in columns[j]]
            inside = [float(x[n, c, y, z]) for y, z in places if 0 <= y < 8 and 0 <= z < 9]
            padded = sum(y < 8 + padding[0] and z < 9 + padding[1] for y, z in places)
            want[n, c, i, j] = reduce(inside, padded)
        return want

    close(run(lambda x: tw.max_pool2d(x, kernel, stride, padding, dilation, ceil), x), pooled(lambda v, _: max(v)))
    if dilation == (1, 1):
        close(run(lambda x: tw.avg_pool2d(x, kernel, stride, padding, ceil), x), pooled(lambda v, n: sum(v) / n))
        close(run(lambda x: tw.avg_pool2d(x, kernel, stride, padding, ceil, False), x), pooled(lambda v, _: sum(v) / len(v)))
        found = run(lambda x: tw.avg_pool2d(x, kernel, stride, padding, ceil, divisor_override=5), x)
        close(found, pooled(lambda v, _: sum(v) / 5))
    line = run(lambda x: tw.max_pool1d(x, kernel[0], stride[0], padding[0], dilation[0], ceil), x[:, :, :, 0])
    plane = run(lambda x: tw.max_pool2d(x, (kernel[0], 1), (stride[0], 1), (padding[0], 0), dilation, ceil), x[:, :, :, :1])
    close(line, plane[..., 0])


@pytest.mark.parametrize("out", [(3, 4), (8, 2), (11, 5), (1, 1), (4, 3)])
def test_adaptive_pooling(out: tuple[int, int]) -> None:
    x = RNG.integers(-3, 4, (2, 2, 8, 7)).astype(np.float32)  # ties
    parts = [[(i * s // o, math.ceil((i + 1) * s / o)) for i in range(o)] for s, o in zip((8, 7), out, strict=True)]
    for reduce, function in ((np.mean, tw.adaptive_avg_pool2d), (np.max, tw.adaptive_max_pool2d)):
        want = [[reduce(x[:, :, a:b, c:d], axis=(2, 3)) for c, d in parts[1]] for a, b in parts[0]]
        close(run(lambda x, f=function: f(x, out), x), np.moveaxis(np.array(want), (0, 1), (2, 3)))
    # The gradient of the maximum goes to the first of equals, once for each window that it is the maximum of.
    slope = np.zeros_like(x)
    for n, c in np.ndindex(2, 2):
        for a, b in parts[0]:
            for d, e in parts[1]:
                part = x[n, c, a:b, d:e]
                y, z = np.unravel_index(part.argmax(), part.shape)
                slope[n, c, a + y, d + z] += 1
    np.testing.assert_array_equal(run(tw.grad(lambda x: tw.sum(tw.adaptive_max_pool2d(x, out))), x), slope)
    row = run(lambda x: tw.adaptive_avg_pool1d(x, out[1]), x[:, :, 0])
    close(row, run(lambda x: tw.adaptive_avg_pool2d(x, (1, out[1])), x[:, :, :1])[:, :, 0])


# -- norms ----------------------------------------------------------------------------------------------------------------


def standard(x: Array, axes: tuple[int, ...], eps: float = 1e-5) -> Array:
    w = x.astype(np.float64)
    return (w - w.mean(axes, keepdims=True)) / np.sqrt(w.var(axes, keepdims=True) + eps)


def test_norms_by_their_formulas() -> None:
    x, w, b = floats(3, 4, 5, 6), floats(4), floats(4)
    scale, shift = w[:, None, None], b[:, None, None]
    close(run(tw.instance_norm, x, w, b), standard(x, (2, 3)) * scale + shift)
    grouped = standard(x.reshape(3, 2, 2, 5, 6), (2, 3, 4)).reshape(x.shape)
    close(run(lambda *a: tw.group_norm(a[0], 2, *a[1:]), x, w, b), grouped * scale + shift)
    close(run(lambda x: tw.rms_norm(x, 6), x), x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 2.0**-23))
    running = nn.InstanceNorm2d(4, track_running_stats=True)
    running.running_mean.data, running.running_var.data = floats(4), np.abs(floats(4)) + 1
    m, v = (p.data[:, None, None] for p in (running.running_mean, running.running_var))
    close(execute(trace_model(running, x), x), (x - m) / np.sqrt(v + 1e-5))
    layer = nn.BatchNorm1d(4, momentum=0.5)
    close(execute(trace_model(layer, x[:, :, 0]), x[:, :, 0]), x[:, :, 0] / np.sqrt(1 + 1e-5))


# -- activations ----------------------------------------------------------------------------------------------------------

FORMULAS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "celu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "silu": lambda x: x * scipy.special.expit(x),
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + abs(x)),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_by_their_formulas_over_the_whole_range(name: str) -> None:
    x = np.concatenate([np.linspace(-9, 9, 181), [-1e4, -200, -88.8, 88.8, 200, 1e4, 0.0]]).astype(np.float32)
    want = FORMULAS[name](x.astype(np.float64))
    found = run(getattr(tw, name), x)
    np.testing.assert_allclose(found, want, rtol=2e-6, atol=3e-7)  # gelu(x) far below 0 is a difference of 1 and almost 1
    slopes = run(tw.grad(lambda x: tw.sum(getattr(tw, name)(x))), x)
    assert np.isfinite(slopes).all()
    assert np.isnan(run(getattr(tw, name), np.full(1, np.nan, np.float32))).all()


KINKS: dict[str, list[tuple[float, float]]] = {
    "relu": [(0.0, 0.0)],
    "relu6": [(0.0, 0.0), (6.0, 0.0)],
    "hardtanh": [(-1.0, 0.0), (1.0, 0.0)],
    "leaky_relu": [(0.0, 0.01)],
    "elu": [(0.0, 1.0)],
    "selu": [(0.0, 1.0507009873554805 * 1.6732632423543772)],
    "hard_sigmoid": [(-3.0, 0.0), (3.0, 0.0)],
    "hard_swish": [(-3.0, 0.0), (3.0, 1.0)],
    "softplus": [(0.0, 0.5)],
    "softsign": [(0.0, 1.0)],
}


@pytest.mark.parametrize("name", KINKS)
def test_slopes_at_kinks(name: str) -> None:
    x, want = (np.array(v, np.float32) for v in zip(*KINKS[name], strict=True))
    np.testing.assert_allclose(run(tw.grad(lambda x: tw.sum(getattr(tw, name)(x))), x), want, rtol=1e-6)
    slope = run(tw.grad(lambda x, w: tw.sum(tw.prelu(x, w)), (0, 1)), np.zeros(2, np.float32), np.float32([0.3]))
    np.testing.assert_allclose(slope[0], [0.3, 0.3], rtol=1e-6)
    assert (slope[1] == 0).all()
