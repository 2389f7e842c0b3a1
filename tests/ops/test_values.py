"""References against definitions written another way: loops, scipy, published vectors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.signal
import scipy.special
import scipy.stats
from tensorwright.ir import dtypes as d
from tensorwright.ir.graph import Graph, Literal
from tensorwright.ir.interp import run
from tensorwright.ir.op import lookup, make
from tensorwright.ir.ops import contract as contract_module
from tensorwright.ir.ops import sample_node
from tensorwright.ir.ops.compare import cast_array
from tensorwright.ir.ops.contract import pack, product_spec, unpack, value
from tensorwright.ir.ops.conv_geometry import join
from tensorwright.ir.ops.erf import erf
from tensorwright.ir.ops.random import philox

from .support import Array, contracted, gradients


def apply(name: str, *arrays: Any, **attrs: Any) -> Array:
    """An op by its reference, attributes completed and checked as in a graph."""
    given = [np.asarray(a) for a in arrays]
    node = make(name, *(make("constant", value=Literal(a)) for a in given), **attrs)
    return np.asarray(node.op.reference(given, node.attrs))


def gradient_at(name: str, *arrays: Any, **attrs: Any) -> list[Array]:
    """The gradients of the sum of an op's result by each float operand, in f64."""
    given = [np.asarray(a) for a in arrays]
    types = [Literal(a).type for a in given]
    inputs = tuple(make("input", name=f"x{k}", dtype=t.dtype, shape=t.shape) for k, t in enumerate(types))
    output = make(name, *inputs, **attrs)
    seed = make("input", name="seed", dtype=output.dtype, shape=output.shape)
    backward, _ = gradients(Graph(inputs, (output,)), seed)
    return run(backward, [*given, np.ones(output.tensor.static_shape, output.dtype.numpy)], dtype=d.f64)


def test_erf_is_right_to_the_last_bits() -> None:
    x = np.concatenate([np.linspace(-7, 7, 20001), np.geomspace(1e-320, 1e3, 2000), [0.46875, 4.0, -4.0, 30.0]])
    expected = scipy.special.erf(x)
    assert np.abs(erf(x) - expected).max() <= 4.5e-16  # two units in the last place of 1
    nonzero = np.abs(expected) > 1e-300
    assert np.abs(erf(x)[nonzero] / expected[nonzero] - 1).max() <= 1e-15
    special = erf(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0]))
    assert np.isnan(special[0]) and list(special[1:3]) == [1, -1] and list(np.signbit(special[3:])) == [False, True]
    assert erf(np.float32([0.5])).dtype == np.float32


def test_sigmoid_at_both_ends() -> None:
    x = np.array([-800.0, -30.0, 0.0, 30.0, 800.0, np.inf, -np.inf, np.nan])
    np.testing.assert_allclose(apply("sigmoid", x), scipy.special.expit(x), rtol=1e-15)


def test_integer_division_is_total() -> None:
    a, b = np.array([7, -7, 7, -7, 5, 0, -(2**31)], np.int32), np.array([2, 2, -2, -2, 0, 0, -1], np.int32)
    assert apply("floordiv", a, b).tolist() == [3, -4, -4, 3, 0, 0, -(2**31)]
    assert apply("mod", a, b).tolist() == [1, 1, -1, -1, 0, 0, 0]


def test_integer_powers() -> None:
    a, b = np.array([2, -2, 0, 0, 1, -1, -1, 2, 3]), np.array([10, 3, 0, -1, -5, -5, -4, -1, 50])
    assert apply("pow", a, b).tolist() == [1024, -8, 1, 0, 1, -1, 1, 0, (3**50 + 2**63) % 2**64 - 2**63]


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        (d.i8, [0, 127, -128, 127, -128, 1, -1, 0]),
        (d.u8, [0, 255, 0, 255, 0, 1, 0, 0]),
        (d.i32, [0, 2**31 - 1, -(2**31), 300, -300, 1, -1, 0]),
        (d.u32, [0, 2**32 - 1, 0, 300, 0, 1, 0, 0]),
        (d.i64, [0, 2**63 - 1, -(2**63), 300, -300, 1, -1, 0]),
        (d.u64, [0, 2**64 - 1, 0, 300, 0, 1, 0, 0]),
        (d.bool_, [1, 1, 1, 1, 1, 1, 1, 1]),
        (d.i4, [0, 7, -8, 7, -8, 1, -1, 0]),
    ],
)
def test_float_to_integer_saturates(to: d.DType, expected: list[int]) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 300.9, -300.9, 1.7, -1.7, 0.5], np.float32)
    assert cast_array(x, to).astype(object).tolist() == expected


def test_integer_to_integer_wraps() -> None:
    x = np.array([-1, 127, 128, 255, 256, -129])
    assert cast_array(x, d.i8).tolist() == [-1, 127, -128, -1, 0, 127]
    assert cast_array(x, d.u8).tolist() == [255, 127, 128, 255, 0, 127]
    assert cast_array(x, d.i4).astype(int).tolist() == [-1, -1, 0, -1, 0, -1]
    assert cast_array(x, d.u4).astype(int).tolist() == [15, 15, 0, 15, 0, 15]


def test_rounding_is_half_to_even() -> None:
    assert apply("round", np.float32([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]


def test_cumulative_sums_by_a_loop() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5))
    for exclusive, reverse in itertools.product((False, True), repeat=2):
        y = np.zeros_like(x)
        for i in range(5):
            before = [j for j in range(5) if ((j >= i) if reverse else (j <= i)) and not (exclusive and j == i)]
            y[:, i] = x[:, before].sum(axis=1)
        np.testing.assert_allclose(apply("cumsum", x, axis=1, exclusive=exclusive, reverse=reverse), y, atol=1e-14)


def test_padding_by_a_loop() -> None:
    x = np.arange(1.0, 7).reshape(2, 3)
    y = apply("pad", x, low=(1, 0), high=(0, 2), interior=(1, 2), value=-5.0)
    expected = np.full((4, 9), -5.0)
    for i, j in np.ndindex(2, 3):
        expected[1 + 2 * i, 3 * j] = x[i, j]
    assert np.array_equal(y, expected)


def test_gather_and_scatter_by_loops() -> None:
    rng = np.random.default_rng(1)
    x, indices = rng.normal(size=(2, 5, 3)), np.array([[0, 4, 9], [-2, 2, 2]])
    y = apply("gather", x, indices, axis=1)
    for i, j in np.ndindex(2, 3):
        assert np.array_equal(y[:, i, j], x[:, min(max(indices[i, j], 0), 4)])
    updates = rng.normal(size=(2, 2, 3, 3))
    expected = x.copy()
    for i, j in np.ndindex(2, 3):
        if 0 <= indices[i, j] < 5:
            expected[:, indices[i, j]] += updates[:, i, j]
    np.testing.assert_allclose(apply("scatter_add", x, indices, updates, axis=1), expected, atol=1e-15)


def test_one_hot_by_a_loop() -> None:
    y = apply("one_hot", np.array([1, -1, 3]), depth=3, dtype=d.f32)
    assert y.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]] and y.dtype == np.float32


# --- convolution ------------------------------------------------------------------------------------------------------


def test_convolution_against_scipy() -> None:
    rng = np.random.default_rng(2)
    x, k = rng.normal(size=(2, 3, 8, 9)), rng.normal(size=(4, 3, 3, 2))
    y = apply("conv2d", x, k)
    for n, o in np.ndindex(2, 4):
        expected = sum(scipy.signal.correlate(x[n, c], k[o, c], mode="valid") for c in range(3))
        np.testing.assert_allclose(y[n, o], expected, atol=1e-12)


def convolution_loop(x: Array, k: Array, stride: Any, padding: Any, dilation: Any, groups: int) -> Array:
    """NCHW, one output element at a time."""
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    (outputs, per, kh, kw), (n, _, height, width) = k.shape, x.shape
    oh = (height - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    ow = (width - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    y = np.zeros((n, outputs, oh, ow))
    for b, o, i, j in np.ndindex(y.shape):
        first = o // (outputs // groups) * per
        for c, h, w in np.ndindex(per, kh, kw):
            y[b, o, i, j] += x[b, first + c, i * stride[0] + h * dilation[0], j * stride[1] + w * dilation[1]] * k[o, c, h, w]
    return y


GEOMETRIES: list[dict[str, Any]] = [
    {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2), "groups": 1},
    {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (2, 1), "groups": 2},
    {"stride": (3, 2), "padding": ((2, 2), (1, 1)), "dilation": (1, 1), "groups": 4},
]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_against_loops(geometry: dict[str, Any], layout: str) -> None:
    rng = np.random.default_rng(3)
    x, k = rng.normal(size=(2, 4, 7, 6)), rng.normal(size=(8, 4 // geometry["groups"], 3, 2))
    there = (0, 2, 3, 1) if layout == "NHWC" else (0, 1, 2, 3)
    y = apply("conv2d", x.transpose(there), k, layout=layout, **geometry)
    expected = convolution_loop(x, k, **geometry)
    assert y.shape == join(*expected.shape, layout)
    np.testing.assert_allclose(y, expected.transpose(there), atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_of_convolution_are_its_adjoints(geometry: dict[str, Any]) -> None:
    """<conv(x, k), dy> = <x, input_grad(dy, k)> = <k, weight_grad(x, dy)>: with all x, k, dy, that defines both."""
    rng = np.random.default_rng(4)
    x, k = rng.normal(size=(2, 4, 7, 6)), rng.normal(size=(8, 4 // geometry["groups"], 3, 2))
    y = apply("conv2d", x, k, **geometry)
    dy = rng.normal(size=y.shape)
    dx = apply("conv2d_input_grad", dy, k, input_shape=x.shape, **geometry)
    dk = apply("conv2d_weight_grad", x, dy, kernel_shape=k.shape, **geometry)
    scale = np.abs(y).sum()
    assert abs((y * dy).sum() - (x * dx).sum()) < 1e-13 * scale
    assert abs((y * dy).sum() - (k * dk).sum()) < 1e-13 * scale


# --- contractions -----------------------------------------------------------------------------------------------------


def test_a_contraction_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(13, 8)), rng.normal(size=(8, 5))
    spec = product_spec(13, 5, 8)
    monkeypatch.setattr(contract_module, "_BLOCK_BYTES", 200)
    np.testing.assert_allclose(value(a, b, spec), contracted(spec, a, b), atol=1e-14)


@pytest.mark.parametrize(("n", "panel"), [(20, 16), (16, 16), (1, 8), (33, 32)])
def test_panels_come_apart_again(n: int, panel: int) -> None:
    b = np.random.default_rng(6).normal(size=(9, n))
    spec = product_spec(7, n, 9)
    packed = pack(b, spec, panel)
    assert packed.shape == spec.packed_shape(panel)
    assert np.array_equal(unpack(packed, spec.packed(panel, (9, n))), b)
    assert not packed[-1, :, n - (len(packed) - 1) * panel :].any()


# --- pooling ----------------------------------------------------------------------------------------------------------


POOLS: list[tuple[tuple[int, int], tuple[int, int], tuple[tuple[int, int], tuple[int, int]]]] = [
    ((2, 2), (2, 2), ((0, 0), (0, 0))),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 2), (1, 3), ((2, 0), (0, 1))),
]


def windows(size: tuple[int, int], kernel: Any, stride: Any, padding: Any) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Per window (i, j): (pixel row, pixel column, position in the window) of what lies in the image."""
    found = []
    oh, ow = ((size[k] + sum(padding[k]) - kernel[k]) // stride[k] + 1 for k in range(2))
    for i, j in np.ndindex(oh, ow):
        inside = []
        for h, w in np.ndindex(*kernel):
            y, x = i * stride[0] + h - padding[0][0], j * stride[1] + w - padding[1][0]
            if 0 <= y < size[0] and 0 <= x < size[1]:
                inside.append((y, x, h * kernel[1] + w))
        found.append((i, j, inside))
    return found


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS)
def test_pooling_against_loops(kernel: Any, stride: Any, padding: Any, layout: str) -> None:
    rng = np.random.default_rng(7)
    x = rng.integers(-4, 5, (2, 3, 6, 7)).astype(np.float64)  # ties
    there, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if layout == "NHWC" else ((0, 1, 2, 3), (0, 1, 2, 3))
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "layout": layout}

    def call(name: str, *arrays: Array, **more: Any) -> Array:
        if name.endswith("_grad"):
            more["input_shape"] = join(*x.shape, layout)
        return apply(name, *(a.transpose(there) for a in arrays), **attrs, **more).transpose(back)

    largest, position, mean, real_mean = (
        call("max_pool2d", x), call("max_pool2d_index", x), call("avg_pool2d", x), call("avg_pool2d", x, count_include_pad=False),
    )  # fmt: skip
    dy = rng.normal(size=largest.shape)
    d_max, d_mean, d_real = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    every = windows((6, 7), kernel, stride, padding)
    for b, c in np.ndindex(2, 3):
        for i, j, inside in every:
            values = [x[b, c, row, column] for row, column, _ in inside]
            best = int(np.argmax(values))
            assert largest[b, c, i, j] == max(values) and position[b, c, i, j] == inside[best][2]
            assert mean[b, c, i, j] == pytest.approx(sum(values) / (kernel[0] * kernel[1]))
            assert real_mean[b, c, i, j] == pytest.approx(sum(values) / len(values))
            d_max[b, c, inside[best][0], inside[best][1]] += dy[b, c, i, j]
            for row, column, _ in inside:
                d_mean[b, c, row, column] += dy[b, c, i, j] / (kernel[0] * kernel[1])
                d_real[b, c, row, column] += dy[b, c, i, j] / len(values)
    np.testing.assert_allclose(call("max_pool2d_grad", dy, position), d_max, atol=1e-13)
    np.testing.assert_allclose(call("avg_pool2d_grad", dy), d_mean, atol=1e-13)
    np.testing.assert_allclose(call("avg_pool2d_grad", dy, count_include_pad=False), d_real, atol=1e-13)


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that come with Random123, the authors' library
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    assert [int(w) for w in philox([np.array(w, np.uint64) for w in counter], key)] == expected


def test_draws_have_their_distribution() -> None:
    key = np.array(12345, np.uint64)
    u = apply("random_uniform", key, shape=(200, 100), stream=1)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    assert scipy.stats.kstest(u.reshape(-1), "uniform").pvalue > 1e-3
    z = apply("random_normal", key, shape=(200, 100), stream=2)
    assert np.isfinite(z).all() and scipy.stats.kstest(z.reshape(-1), "norm").pvalue > 1e-3
    # Another stream or key is another draw; a shape is only a shape.
    assert abs(np.corrcoef(u.reshape(-1), apply("random_uniform", key, shape=(20000,), stream=2))[0, 1]) < 0.03
    assert abs(np.corrcoef(u.reshape(-1), apply("random_uniform", key + 1, shape=(20000,), stream=1))[0, 1]) < 0.03
    assert np.array_equal(apply("random_uniform", key, shape=(50,), stream=1), u.reshape(-1)[:50])


# --- gradients at points where the rule has a choice --------------------------------------------------------------------


def test_equal_maxima_share_the_gradient() -> None:
    (g,) = gradient_at("max", np.array([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]]), axes=(1,))
    assert g.tolist() == [[0, 0.5, 0.5], [1, 0, 0]]
    a, b = gradient_at("maximum", np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert a.tolist() == [0, 0.5, 1] and b.tolist() == [1, 0.5, 0]


def test_product_at_zeros() -> None:
    x = np.array([[2.0, 0.0, 3.0], [0.0, 5.0, 0.0], [2.0, 3.0, 4.0]])
    (g,) = gradient_at("prod", x, axes=(1,))
    assert g.tolist() == [[0, 6, 0], [0, 0, 0], [12, 8, 6]]
    (g,) = gradient_at("prod", x, axes=(0, 1))
    assert not g.any()


def test_power_at_zero() -> None:
    a, b = gradient_at("pow", np.array([0.0, 0.0, 0.0]), np.array([0.0, 1.0, 2.0]))
    assert a.tolist() == [0, 1, 0] and b.tolist() == [0, 0, 0]


def test_the_first_maximum_of_a_window_takes_the_gradient() -> None:
    (g,) = gradient_at("max_pool2d", np.ones((1, 1, 2, 2)), kernel=(2, 2), stride=(2, 2))
    assert g.reshape(-1).tolist() == [1, 0, 0, 0]


def test_what_is_clipped_is_scattered_where_it_came_from() -> None:
    (g,) = gradient_at("gather", np.array([1.0, 2.0, 3.0]), np.array([-4, 7, 1]))
    assert g.tolist() == [1, 1, 1]


def test_a_dropped_update_gets_no_gradient() -> None:
    gx, gu = gradient_at("scatter_add", np.zeros(3), np.array([-4, 7, 1]), np.ones(3))
    assert gx.tolist() == [1, 1, 1] and gu.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "name", ["floor", "ceil", "round", "sign", "not", "less", "equal", "argmax", "one_hot", "random_uniform"]
)
def test_no_gradient_flows_through_steps(name: str) -> None:
    op = lookup(name)
    graph, _ = sample_node(op, next(iter(op.samples())))
    assert callable(op.grad)
    assert op.grad(graph.outputs[0], (graph.outputs[0],)) == (None,) * len(graph.inputs)


def test_a_nan_that_is_not_chosen_stays_out() -> None:
    y = apply("where", np.array([True, False]), np.array([1.0, np.nan]), np.array([np.nan, 2.0]))
    assert y.tolist() == [1, 2]
