"""The gradient of a convolution for its image, phase by phase: every stride, dilation, padding and kernel, and compiled."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tensorwright.driver import build
from tensorwright.ir.build import input_node
from tensorwright.ir.dtypes import DType, f32, f64
from tensorwright.ir.graph import Graph, Node, postorder
from tensorwright.ir.interp import run
from tensorwright.ir.lowering import Contract, Decompose
from tensorwright.ir.op import make
from tensorwright.ir.ops.conv_geometry import LAYOUTS, geometry, join
from tensorwright.ir.types import TensorType
from tensorwright.settings import config, flags

from ..codegen.helpers import host_rows

Shape = tuple[int, ...]


def gradient(x: Shape, k: Shape, dtype: DType = f64, **given: object) -> tuple[Node, Shape]:
    """The node for an image and weights of these shapes (NCHW), and the shape of dy."""
    attrs = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "groups": 1, "layout": "NCHW", **given}
    shape = join(x[0], x[1], x[2], x[3], str(attrs["layout"]))
    y = tuple(int(d) for d in geometry("conv2d", shape, k, attrs, "x", "w").y_shape)  # type: ignore[arg-type]
    dy, w = input_node("dy", TensorType(dtype, y)), input_node("w", TensorType(dtype, k), "parameter")
    return make("conv2d_input_grad", dy, w, input_shape=shape, **attrs), y


def lowered(node: Node) -> Node:
    form = node.op.lower(node)
    assert isinstance(form, Decompose)
    built = form.build(node)
    assert isinstance(built, Node)
    return built


def multiplications(node: Node) -> int:
    return sum(f.spec.flops // 2 for n in postorder([node]) if n.inputs and isinstance(f := n.op.lower(n), Contract))


def random_case(rng: random.Random) -> tuple[Shape, Shape, dict[str, object]] | None:
    pair = lambda low, high: (rng.randint(low, high), rng.randint(low, high))  # noqa: E731
    k, stride, size = pair(1, 5), pair(1, 4), pair(1, 11)
    dilation, padding = (rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3))), (pair(0, 3), pair(0, 3))
    groups = rng.choice((1, 1, 2))
    if any(n + sum(p) < (m - 1) * d + 1 for n, p, m, d in zip(size, padding, k, dilation, strict=True)):
        return None
    per_group, outputs = pair(1, 3)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": rng.choice(LAYOUTS)}
    return (rng.randint(1, 2), groups * per_group, *size), (groups * outputs, per_group, *k), attrs


@pytest.mark.parametrize("seed", range(4))
def test_phases_add_up_to_the_definition(seed: int) -> None:
    rng, data = random.Random(seed), np.random.default_rng(seed)
    done = 0
    while done < 60:
        case = random_case(rng)
        if case is None:
            continue
        node, y = gradient(case[0], case[1], **case[2])
        arrays = [data.standard_normal(y), data.standard_normal(case[1])]
        (want,) = run(Graph(node.inputs, (node,)), arrays)
        (got,) = run(Graph(node.inputs, (lowered(node),)), arrays)
        assert got.shape == want.shape, case
        assert np.abs(got - want).max(initial=0.0) <= 1e-12, case  # f64 sums of at most 75 products of numbers near 1
        done += 1


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (4, 2), (2, 2), (5, 3), (1, 2), (2, 3)])
def test_no_product_with_a_zero_between_pixels(kernel: int, stride: int) -> None:
    """Each tap of the kernel meets each pixel of dy once, border aside: as many products as the convolution itself has."""
    size = 12 * stride
    node, y = gradient((1, 8, size, size), (16, 8, kernel, kernel), stride=(stride, stride))
    ideal = 8 * 16 * kernel**2 * y[2] * y[3]
    assert multiplications(lowered(node)) <= ideal * (1 + 2 * kernel / y[2]) ** 2


def test_even_phases_are_one_contraction() -> None:
    node, _ = gradient((2, 3, 16, 16), (8, 3, 4, 4), stride=(2, 2), padding=((1, 1), (1, 1)))
    assert sum(isinstance(n.op.lower(n), Contract) for n in postorder([lowered(node)]) if n.inputs) == 1


def test_stride_one_is_one_contraction_of_four_dimensions() -> None:
    node, _ = gradient((2, 3, 6, 6), (4, 3, 3, 3), padding=((1, 1), (1, 1)))
    assert isinstance(lowered(node).op.lower(lowered(node)), Contract)


CASES = [
    ((2, 5, 9, 8), (7, 5, 3, 3), {"stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    ((2, 17, 10, 10), (9, 17, 4, 4), {"stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    ((1, 6, 9, 11), (8, 3, 3, 2), {"stride": (2, 3), "groups": 2}),
    ((1, 4, 9, 9), (3, 4, 2, 2), {"stride": (3, 2), "padding": ((0, 1), (2, 0)), "dilation": (2, 1)}),
]


@pytest.mark.parametrize("target", host_rows())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled(target: str, layout: str) -> None:
    data = np.random.default_rng(3)
    for x, k, attrs in CASES:
        node, y = gradient(x, k, f32, layout=layout, **attrs)
        dy, w = (data.standard_normal(s).astype("f4") for s in (y, k))
        (want,) = run(Graph(node.inputs, (node,)), [dy.astype("f8"), w.astype("f8")], dtype=f64)
        results = []
        for threads in (1, 2):
            with config(target=target, threads=threads):
                results.append(build(Graph(node.inputs, (node,)), {"w": w}, now=flags())(dy))
        assert np.abs(results[0] - want).max() <= 1e-5 * np.abs(want).max(), attrs  # f32 sums of up to 144 products
        assert results[0].tobytes() == results[1].tobytes()


def test_its_own_gradients() -> None:
    """Central differences of the strided gradient through both operands, in f64."""
    node, y = gradient((1, 2, 7, 6), (3, 2, 3, 2), stride=(2, 2), padding=((1, 0), (0, 1)))
    data = np.random.default_rng(5)
    arrays = [data.standard_normal(y), data.standard_normal((3, 2, 3, 2))]
    seed = data.standard_normal(tuple(int(d) for d in node.shape))  # type: ignore[arg-type]
    out = input_node("g", node.tensor)
    parts = node.op.grad(node, (out,))  # type: ignore[misc]
    graph = Graph((*node.inputs, out), tuple(p for p in parts if p is not None))
    found = run(graph, [*arrays, seed])
    forward = Graph(node.inputs, (lowered(node),))
    for k, got in enumerate(found):
        for at in ((0,) * 4, tuple(n - 1 for n in arrays[k].shape)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in arrays]
                moved[k][at] += step
                ends.append(float((run(forward, moved)[0] * seed).sum()))
            assert abs(got[at] - (ends[0] - ends[1]) / 2e-5) <= 1e-8 * max(1.0, abs(got[at]))


def test_weights_of_a_transposed_convolution_are_packed() -> None:
    """Reversed taps, and every second of them, still make panels that are prepared once."""
    for kernel in (3, 4):
        node, y = gradient((1, 16, 8, 8), (32, 16, kernel, kernel), f32, stride=(2, 2), padding=((1, 1), (1, 1)), layout="NHWC")
        data = np.random.default_rng(kernel)
        dy, w = (data.standard_normal(s).astype("f4") for s in (y, (32, 16, kernel, kernel)))
        exe = build(Graph(node.inputs, (node,)), {"w": w}, now=flags())
        lines = [line for line in exe.text("pack_weights").splitlines() if " = contract(" in line]
        assert len(lines) == (4 if kernel == 3 else 1)
        assert all("panel=" in line for line in lines)
        (want,) = run(Graph(node.inputs, (node,)), [dy.astype("f8"), w.astype("f8")], dtype=f64)
        assert np.abs(exe(dy) - want).max() <= 1e-5 * np.abs(want).max()
