"""Products of dequantised bytes become products of bytes: to the bit where scales are powers of two, as floats are exact then."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorwright as tw
from tensorwright.frontend.core import apply, as_tensor
from tensorwright.ir.dtypes import as_dtype
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.types import TupleType
from tensorwright.passes.contract import Context
from tensorwright.passes.manager import run_pipeline
from tensorwright.passes.pipeline import inference
from tensorwright.runtime import host

TARGETS = [t for t in ("x86-64-v2", "x86-64-v3", "x86-64-v4") if t in host.runnable_rows()]


def dq(q: Any, scale: Any, zero: int = 0, axis: int | None = None) -> Any:
    s = as_tensor(np.asarray(scale, np.float32))
    return apply("dequantize", q, s, as_tensor(np.full(s.shape, zero, q.dtype.numpy)), axis=axis)


def qdq(x: Any, scale: float, zero: int = 0, dtype: str = "u8") -> Any:
    d = as_dtype(dtype)
    q = apply("quantize", x, as_tensor(np.float32(scale)), as_tensor(np.asarray(zero, d.numpy)), axis=None, dtype=d)
    return dq(q, scale, zero)


def ops_of(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes()]


def integers(graph: Graph) -> Graph:
    """The graph after the pass."""
    passes = inference()
    names = [p.name for p in passes]
    return run_pipeline(graph, passes[: names.index("integers") + 1], Context())


def products(graph: Graph) -> list[str]:
    """The dtypes of contractions that do not depend on weights alone."""
    data = {n for n in graph.nodes() if n.attrs.get("role") == "data"}
    for n in graph.nodes():
        if any(i in data for i in n.inputs):
            data.add(n)
    return [n.dtype.name for n in graph.nodes() if n.op.name == "contract" and n in data]


def weights(*shape: int, seed: int = 0) -> Any:
    return tw.nn.Parameter(np.random.default_rng(seed).integers(-127, 128, shape).astype(np.int8))


def check(net: Any, x: np.ndarray, expected: list[str]) -> None:
    """Compiled on every target as the interpreter computes the graph of floats, in contractions of these dtypes."""
    traced = tw.trace(net, x)
    values = {n: p.data for n, p in net.named_parameters()}
    graph = Graph(traced.inputs, traced.outputs, traced.output_names, traced.name, (), {}, values)
    assert products(integers(graph)) == expected
    right = run(graph, {"x": x, **values})[0]
    for k, target in enumerate(TARGETS):
        got = tw.compile(graph, target=target, cache=False, validate=k == len(TARGETS) - 1)(x)
        np.testing.assert_array_equal(got, right, err_msg=target)


class Net(tw.nn.Module):
    """A convolution with scales that are powers of two, its bias, and what follows."""

    def __init__(self, out: int, channels: int, size: int, groups: int = 1, zero: int = 3, **conv: Any) -> None:
        self.w = weights(out, channels // groups, size, size)
        self.b = tw.nn.Parameter(np.random.default_rng(1).integers(-40, 40, out).astype(np.float32) / 4)
        self.zero, self.groups, self.conv = zero, groups, conv

    def layer(self, x: Any) -> Any:
        scales = 2.0 ** -(7 + np.arange(self.w.shape[0]) % 3)
        return tw.conv2d(x, dq(self.w, scales, axis=0), self.b, groups=self.groups, **self.conv)

    def __call__(self, x: Any) -> Any:
        return qdq(tw.relu(self.layer(qdq(x, 2**-4, self.zero))), 2**-1)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(-60, 200, shape).astype(np.float32) / 16


@pytest.mark.parametrize(
    ("out", "channels", "size", "groups", "zero", "options", "expected"),
    [
        (5, 3, 3, 1, 3, {"padding": 1}, "i32"),
        (16, 8, 1, 1, 0, {}, "i32"),
        (17, 9, 3, 1, 255, {"stride": 2, "padding": 1}, "i32"),
        (12, 8, 3, 2, 128, {"padding": 1}, "i32"),
        (8, 8, 3, 8, 7, {"padding": 1}, "f32"),  # depthwise: bytes gain nothing
    ],
)
def test_a_convolution_of_bytes(
    out: int, channels: int, size: int, groups: int, zero: int, options: dict[str, Any], expected: str
) -> None:
    check(Net(out, channels, size, groups, zero, **options), images(2, channels, 7, 9), [expected])


def test_what_stands_between_layers_stays_in_bytes() -> None:
    class Whole(tw.nn.Module):
        def __init__(self) -> None:
            self.one, self.two = Net(8, 4, 3, padding=1), Net(8, 8, 3, padding=1)
            self.head = weights(8 * 3 * 3, 5)

        def __call__(self, x: Any) -> Any:
            x = qdq(tw.relu(tw.max_pool2d(self.one.layer(qdq(x, 2**-4, 9)), 2)), 2**-2)
            y = qdq(self.two.layer(x), 2**-1, 100)
            x = qdq(tw.relu(x + y), 2**-1)
            x = tw.max_pool2d(tw.concatenate([x, x], 1), 2)[:, 4:12]
            return dq(self.head, 2**-8).T @ x.reshape(x.shape[0], -1).T

    net, x = Whole(), images(3, 4, 12, 12)
    check(net, x, ["i32"] * 3)
    graph = tw.trace(net, x)
    exe = tw.compile(Graph(graph.inputs, graph.outputs, weights={n: p.data for n, p in net.named_parameters()}))
    exe(x)
    whole = [n.tensor for n in Graph.parse(exe.text("fuse")).nodes() if n.inputs and not isinstance(n.type, TupleType)]
    assert {t.dtype.name for t in whole if t.shape[:1] == (3,)} == {"u8"}  # but for the result, which is (5, 3)


@pytest.mark.parametrize("terms", [66_001, 140_000])
def test_sums_beyond_i32_are_exact(terms: int) -> None:
    """u8 times i8, all at their rim: 255 * 127 * terms is beyond 2^31 from 66,311 terms on, as is the sum that would wrap."""
    wq = np.full((terms, 3), 127, np.int8)
    wq[:, 1] = -127
    wq[::2, 2] = -127

    class Long(tw.nn.Module):
        def __init__(self) -> None:
            self.w = tw.nn.Parameter(wq)

        def __call__(self, x: Any) -> Any:
            return dq(x, 1.0) @ dq(self.w, [1.0, 1.0, 0.5], axis=1)

    x = np.full((2, terms), 255, np.uint8)
    x[1, ::3] = 0
    right = (x.astype(np.int64) @ wq.astype(np.int64)).astype(np.float64) * [1.0, 1.0, 0.5]
    net = Long()
    with tw.config(validate=False):  # the interpreter's f32 sums of a hundred thousand products are not exact
        got = tw.compile(net, x, cache=False)(x)
    np.testing.assert_array_equal(got, right.astype(np.float32))


def test_a_graph_without_products_of_bytes_stays_as_it_is() -> None:
    graph = tw.trace(lambda x: tw.sqrt(qdq(x, 0.3, 2)) @ np.ones((4, 2), np.float32), tw.spec(3, 4))
    after = integers(graph)
    assert "quantize" in ops_of(after)
    assert products(after) == ["f32"]


def test_a_scale_that_only_a_run_knows() -> None:
    net = Net(6, 5, 3, padding=1)

    def dynamic(x: Any) -> Any:
        scale = tw.max(tw.abs(x)) / 127.0
        q = apply("quantize", x, scale, as_tensor(np.int8(0)), axis=None, dtype=as_dtype("i8"))
        return net.layer(apply("dequantize", q, scale, as_tensor(np.int8(0)), axis=None))

    x = images(1, 5, 6, 6)
    x[0, 0, 0, 0] = 127 / 8  # the largest: a scale of 1/8
    x = np.clip(x, -15, 127 / 8)
    graph = tw.trace(dynamic, x)
    assert products(integers(graph)) == ["i32"]
    got = tw.compile(dynamic, x, cache=False)(x)
    values = {"x": x, "net.w": net.w.data, "net.b": net.b.data}
    np.testing.assert_array_equal(got, run(graph, {str(i.attrs["name"]): values[str(i.attrs["name"])] for i in graph.inputs})[0])


def test_weights_with_a_zero_point_stay_in_floats() -> None:
    w = tw.nn.Parameter(np.full((4, 3), 7, np.uint8))
    graph = tw.trace(lambda x: qdq(x, 0.25) @ dq(w, 0.5, 3), tw.spec(2, 4))
    assert products(integers(graph)) == ["f32"]


def test_products_of_two_activations() -> None:
    """In integers where one of the two is around 0; the other's zero point needs that one's sums."""

    def attention(q: Any, k: Any) -> Any:
        scores = qdq(q, 0.25, 130) @ qdq(k, 0.5, 0, "i8").T
        weights = qdq(tw.minimum(scores, 63.75), 0.25)
        return weights @ qdq(k, 0.5, 0, "i8"), qdq(k, 0.25, 4) @ qdq(k, 0.25, 4).T, qdq(q, 0.25) @ qdq(q, 0.25).T

    rng = np.random.default_rng(0)
    arrays = [rng.integers(-200, 200, (n, 9)).astype(np.float32) / 8 for n in (5, 11)]
    graph = tw.trace(attention, *arrays)
    assert sorted(products(integers(graph))) == ["f32", "i32", "i32", "i32", "i32"]  # one of them adds up k
    right = run(graph, dict(zip("qk", arrays, strict=True)))
    for target in TARGETS:
        for got, wanted in zip(tw.compile(graph, target=target, cache=False)(*arrays), right, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=target)
