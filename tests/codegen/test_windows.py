"""Windows over images (pooling, depthwise convolution) with what follows them: register tiles, borders, threads, every row."""

from __future__ import annotations

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.codegen.generate import assemble
from tensorwright.ir.build import fused, input_node
from tensorwright.ir.dtypes import DType, f32, f64
from tensorwright.ir.graph import Graph, Node
from tensorwright.ir.op import make
from tensorwright.ir.types import TensorType

from .helpers import host, host_rows
from .programs import Array, agree, compiled

ROWS = [r for r in host_rows() if r.startswith("x86")] or host_rows()


def chain(x: tuple[int, ...], k: tuple[int, ...], attrs: dict, dtype: DType = f32, residual: bool = True) -> Graph:
    """max(depthwise(x, k) + bias, 0) [+ residual] as a fused region."""
    p = [input_node("p0", TensorType(dtype, x)), input_node("p1", TensorType(dtype, (*k, x[3])))]
    p.append(input_node("p2", TensorType(dtype, (x[3],))))
    y = make("depthwise", p[0], p[1], **attrs)
    p += [input_node("p3", y.tensor)] if residual else []
    z = make(
        "maximum", make("add", y, make("broadcast_to", p[2], shape=y.shape)), make("broadcast_to", _zero(dtype), shape=y.shape)
    )
    z = make("add", z, p[3]) if residual else z
    body = Graph(tuple(p), (z,), name="window")
    given = [input_node(f"x{i}", n.tensor) for i, n in enumerate(p)]
    return Graph(tuple(given), (fused(body, given, "window"),))


def _zero(dtype: DType) -> Node:
    from tensorwright.ir.build import constant

    return constant(0.0, dtype)


CASES = [
    ((1, 5, 9, 16), (3, 3), {"size": (5, 9), "origin": (-1, -1)}),
    ((2, 6, 17, 15), (3, 3), {"size": (3, 9), "origin": (-1, -1), "stride": (2, 2)}),
    ((1, 9, 8, 33), (5, 5), {"size": (9, 8), "origin": (-2, -2)}),
    ((1, 7, 23, 17), (7, 7), {"size": (7, 23), "origin": (-3, -3)}),
    (
        (1, 5, 40, 8),
        (3, 3),
        {"size": (5, 40), "origin": (-12, -12), "dilation": (12, 12)},
    ),  # more tiles reach over than are peeled
    ((1, 1, 31, 7), (1, 3), {"size": (1, 31), "origin": (0, -1)}),
    ((1, 4, 1, 64), (3, 1), {"size": (4, 1), "origin": (-1, 0)}),
    ((1, 6, 6, 2), (3, 3), {"size": (6, 6), "origin": (-1, -1)}),
    ((1, 3, 5, 1), (3, 3), {"size": (3, 5), "origin": (-1, -1)}),
    ((1, 4, 5, 18), (3, 20), {"size": (4, 5), "origin": (-1, -9)}),  # a window too wide to be unrolled
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", CASES, ids=[f"{x}-{k}" for x, k, _ in CASES])
def test_depthwise_with_bias_and_residual(case: tuple, row: str) -> None:
    x, k, attrs = case
    graph = chain(x, k, attrs)
    rng = np.random.default_rng(1)
    arrays = [rng.uniform(-2, 2, i.shape).astype(np.float32) for i in graph.inputs]
    agree(graph, arrays, row)


def test_f64_and_an_epilogue_without_residual() -> None:
    graph = chain((1, 5, 9, 9), (3, 3), {"size": (5, 9), "origin": (-1, -1)}, f64, residual=False)
    rng = np.random.default_rng(1)
    agree(graph, [rng.uniform(-2, 2, i.shape) for i in graph.inputs], ROWS[0])


def test_the_bits_do_not_depend_on_threads_or_place() -> None:
    graph = chain((1, 29, 29, 96), (3, 3), {"size": (29, 29), "origin": (-1, -1)}, residual=False)
    rng = np.random.default_rng(2)
    arrays = [rng.uniform(-2, 2, i.shape).astype(np.float32) for i in graph.inputs]
    run = compiled(graph, ROWS[0])
    assert any(k.parallel for k in run.program.kernels)
    (one,), (two,), (four,) = (run(arrays, threads) for threads in (1, 2, 4))
    assert np.array_equal(one, two) and np.array_equal(one, four)
    # a crop of the image gives the same bits where windows lie inside both: tiles and borders do not matter
    part = chain((1, 29, 20, 96), (3, 3), {"size": (29, 20), "origin": (-1, -1)}, residual=False)
    (cropped,) = compiled(part, ROWS[0])([np.ascontiguousarray(arrays[0][:, :, 5:25]), *arrays[1:]])
    assert np.array_equal(one[:, :, 6:24], cropped[:, :, 1:19])


@pytest.mark.parametrize("row", ROWS)
def test_nan_and_infinity_as_numpy(row: str) -> None:
    """An infinite weight times a pixel outside the image is NaN, as 0 * inf is."""
    graph = chain((1, 9, 10, 17), (3, 3), {"size": (9, 10), "origin": (-1, -1)})
    rng = np.random.default_rng(3)
    arrays = [rng.uniform(-2, 2, i.shape).astype(np.float32) for i in graph.inputs]
    arrays[0][0, 4, 4, 3], arrays[0][0, 0, 9, 5], arrays[1][0, 0, 7] = np.nan, np.inf, np.inf
    agree(graph, arrays, row)


def test_a_residual_is_overwritten_in_place() -> None:
    single = chain((1, 8, 8, 32), (3, 3), {"size": (8, 8), "origin": (-1, -1)})
    (region,) = single.outputs
    x, k, bias, r = single.inputs
    y = region.replace((x, k, bias, make("exp", r)))
    graph = Graph((x, k, bias, r), (make("sum", y, axes=(1, 2), keepdims=False),))
    shared = [s.shared for s in assemble(graph, host()).plan.steps]
    assert sum(map(bool, shared)) == 1
    rng = np.random.default_rng(4)
    agree(graph, [rng.uniform(-1, 1, i.shape).astype(np.float32) for i in graph.inputs], ROWS[0])


POOLS = [("max_pool2d", {}), ("avg_pool2d", {"count_include_pad": False}), ("avg_pool2d", {"count_include_pad": True})]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name,more", POOLS, ids=["max", "average", "average with padding"])
@pytest.mark.parametrize("kernel,stride,padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
def test_pooling_on_every_row(name: str, more: dict, layout: str, kernel: int, stride: int, padding: int) -> None:
    shape = (1, 37, 41, 19) if layout == "NHWC" else (1, 3, 37, 41)
    x = input_node("x", TensorType(f32, shape))
    side = (padding, padding)
    attrs = {"kernel": (kernel, kernel), "stride": (stride, stride), "padding": (side, side), "layout": layout, **more}
    graph = Graph((x,), (make(name, x, **attrs),))
    a = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    a[0, 2, 2, 2], a[0, 1, 0, 1] = np.nan, -np.inf
    for row in ROWS:
        agree(graph, [a], row)


def _convolution(groups: int, stride: int, dilation: int = 1, kernel: int = 3):
    def f(x: tw.Tensor, k: tw.Tensor) -> tw.Tensor:
        pad = dilation * (kernel // 2)
        return tw.conv2d(x, k, stride=stride, padding=pad, dilation=dilation, groups=groups)

    return f


def _direct(x: Array, k: Array, stride: int, dilation: int) -> Array:
    """Depthwise convolution of NCHW images, by its definition."""
    taps = k.shape[2]
    pad = dilation * (taps // 2)
    z = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows, columns = ((n + 2 * pad - dilation * (taps - 1) - 1) // stride + 1 for n in x.shape[2:])
    y = np.zeros((*x.shape[:2], rows, columns))
    for h in range(taps):
        for w in range(taps):
            part = z[:, :, h * dilation :, w * dilation :][
                :, :, : (rows - 1) * stride + 1 : stride, : (columns - 1) * stride + 1 : stride
            ]
            y += part * k[None, :, 0, h, w, None, None]
    return y


@pytest.mark.parametrize("stride,dilation,kernel", [(1, 1, 3), (2, 1, 3), (1, 2, 3), (2, 1, 5), (1, 1, 7)])
def test_a_depthwise_convolution_and_its_gradients(stride: int, dilation: int, kernel: int) -> None:
    rng = np.random.default_rng(6)
    x, k = rng.normal(size=(2, 24, 13, 12)).astype(np.float32), rng.normal(size=(24, 1, kernel, kernel)).astype(np.float32)
    f = _convolution(24, stride, dilation, kernel)
    exe = tw.compile(f, tw.spec(*x.shape), tw.spec(*k.shape))
    assert any("depthwise" in k_.nodes for k_ in exe.profile(x, k, repeats=1).kernels)
    y = _direct(x, k, stride, dilation)
    assert np.abs(exe(x, k) - y).max() < 5e-6 * np.abs(y).max()
    # both gradients of sum(y * g) against the adjoint of the definition, which is bilinear
    g = rng.normal(size=y.shape).astype(np.float32)
    dx, dk = tw.compile(
        lambda x, k, g: tw.grad(lambda x, k: (f(x, k) * g).sum(), argnums=(0, 1))(x, k), *(tw.spec(*a.shape) for a in (x, k, g))
    )(x, k, g)
    v, u = rng.normal(size=x.shape), rng.normal(size=k.shape)
    by_x, by_k = (_direct(v, k, stride, dilation) * g).sum(), (_direct(x, u, stride, dilation) * g).sum()
    assert abs((dx * v).sum() - by_x) < 1e-5 * np.sqrt((dx**2).sum() * (v**2).sum())
    assert abs((dk * u).sum() - by_k) < 1e-5 * np.sqrt((dk**2).sum() * (u**2).sum())


def test_pooling_alone_is_not_transposed() -> None:
    exe = tw.compile(lambda x: tw.relu(tw.max_pool2d(x, 2)), tw.spec(1, 3, 8, 8))
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    assert len(exe.profile(x, repeats=1).kernels) == 1
