"""What holds for every op, checked on every sample of its record."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from tensorwright.ir.dtypes import f64
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.op import REGISTRY, NotDifferentiable, Op, Sample, Trait, make
from tensorwright.ir.ops import sample_node

from .support import IDS, OPS, SAMPLES, central_differences, errors, gradients, lowered, reference, walk, widened

EXPECTED = [
    "input", "constant", "get", "fused", "gradient", "mark", "stop_gradient", "recompute", "neg", "abs", "sign", "exp", "log",
    "log1p", "expm1", "sqrt", "rsqrt", "tanh", "sigmoid", "softplus", "erf", "sin", "cos", "floor", "ceil", "round", "not",
    "add", "sub", "mul", "div", "floordiv", "mod", "pow", "maximum", "minimum", "less", "less_equal", "equal", "not_equal",
    "and", "or", "xor", "where", "cast", "sum", "mean", "max", "min", "prod", "argmax", "argmin", "cumsum", "reshape",
    "transpose", "broadcast_to", "slice", "pad", "concat", "reverse", "gather", "scatter_add", "one_hot", "iota", "matmul",
    "conv2d", "conv2d_input_grad", "conv2d_weight_grad", "contract", "max_pool2d", "max_pool2d_index", "max_pool2d_grad",
    "avg_pool2d", "avg_pool2d_grad", "adaptive_sum_pool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_index",
    "adaptive_max_pool2d_grad", "random_uniform", "random_normal",
]  # fmt: skip


def test_the_promised_ops_are_there() -> None:
    assert set(EXPECTED) <= set(REGISTRY)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_record_is_complete(op: Op) -> None:
    samples = list(op.samples())
    assert op.doc.endswith(".") and len(samples) >= 5
    assert callable(op.grad) or (isinstance(op.grad, NotDifferentiable) and op.grad.reason)
    for s in samples:
        assert s.budget <= 2e-6 or s.reason, f"{op.name}: a budget of {s.budget} without a reason"
        assert set(s.attrs) <= set(op.attrs)
    if op.has(Trait.ELEMENTWISE):
        assert op.transpose is not None


def test_sizes_straddle_vector_widths() -> None:
    shapes = {n for op, _, s in SAMPLES if op.has(Trait.ELEMENTWISE) for a in s.make(np.random.default_rng(0)) for n in a.shape}
    assert {1, 7, 8, 9, 15, 16, 17, 31, 33, 0} <= shapes


@pytest.mark.parametrize(("op", "k", "sample"), SAMPLES, ids=IDS)
def test_type_value_and_lowering(op: Op, k: int, sample: Sample) -> None:
    """Inferred type = type of the reference, without a warning; what `lower` says = the reference in f64, within the budget."""
    graph, arrays = sample_node(op, sample, seed=k)
    node = graph.outputs[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = reference(graph, arrays)
        assert value.shape == node.tensor.static_shape and value.dtype == node.dtype.numpy
        exact = run(graph, arrays, dtype=f64)[0]
        found = lowered(node, arrays)
    assert found.shape == value.shape and found.dtype == value.dtype
    if node.dtype.is_float:
        assert errors(found, exact) <= sample.budget
        assert errors(value, exact) <= sample.budget
    else:
        assert np.array_equal(found, value)


DIFFERENTIABLE = [(op, k, s) for op, k, s in SAMPLES if s.gradient]


@pytest.mark.parametrize(("op", "k", "sample"), DIFFERENTIABLE, ids=[f"{o.name}-{k}" for o, k, _ in DIFFERENTIABLE])
def test_gradient_is_the_central_difference(op: Op, k: int, sample: Sample) -> None:
    graph, arrays = sample_node(op, sample, seed=k)
    node = graph.outputs[0]
    rng = np.random.default_rng(k)
    wide = widened(arrays)
    weights = rng.uniform(0.5, 1.5, node.tensor.static_shape)
    seed = make("input", name="seed", role="data", dtype=node.dtype, shape=node.shape)
    backward, wrt = gradients(graph, seed)
    found = run(backward, [*wide, weights], dtype=f64)
    for x, g in zip(wrt, found, strict=True):
        operand = graph.inputs.index(x)
        assert g.shape == wide[operand].shape
        elements = list(np.ndindex(g.shape))
        if len(elements) > 200:
            elements = [elements[i] for i in rng.choice(len(elements), 200, replace=False)]
        expected = central_differences(graph, wide, weights, operand, elements)
        chosen = np.array([g[e] for e in elements])
        # Truncation is 1e-10 and rounding 1e-16 / 1e-5, both times the curvature.
        assert errors(chosen, expected) < 1e-6, f"operand {operand}"


SECOND = {
    "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "erf", "sin", "mul", "div", "pow", "prod", "mean", "max", "where", "pad",
    "slice", "gather", "scatter_add", "cumsum", "matmul", "conv2d", "conv2d_input_grad", "conv2d_weight_grad", "contract",
    "max_pool2d", "max_pool2d_grad", "avg_pool2d", "avg_pool2d_grad", "softplus",
    "adaptive_sum_pool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_grad",
}  # fmt: skip
TWICE = [(op, k, s) for op, k, s in DIFFERENTIABLE if op.name in SECOND and k in (1, 2, 4)]


@pytest.mark.parametrize(("op", "k", "sample"), TWICE, ids=[f"{o.name}-{k}" for o, k, _ in TWICE])
def test_gradients_of_gradients(op: Op, k: int, sample: Sample) -> None:
    """Along a random direction v: d/dx <v, df/dx> against the difference of df/dx at x + tv and x - tv."""
    graph, arrays = sample_node(op, sample, seed=k)
    node = graph.outputs[0]
    rng = np.random.default_rng(k)
    wide = widened(arrays)
    weights = rng.uniform(0.5, 1.5, node.tensor.static_shape)
    seed = make("input", name="seed", role="data", dtype=node.dtype, shape=node.shape)
    backward, wrt = gradients(graph, seed)
    floats = [graph.inputs.index(x) for x in wrt]
    v = [rng.uniform(-1, 1, wide[i].shape) for i in floats]
    vs = [make("input", name=f"v{i}", role="data", dtype=x.dtype, shape=x.shape) for i, x in enumerate(wrt)]
    inner = None
    for direction, g in zip(vs, backward.outputs, strict=True):
        term = make("mul", direction, g)
        dot = make("sum", term, axes=tuple(range(len(term.shape))), keepdims=False)
        inner = dot if inner is None else make("add", inner, dot)
    assert inner is not None
    one = make("div", inner, inner)
    second = walk(inner, wrt, one)
    kept = [(i, s) for i, s in zip(floats, second, strict=True) if s is not None]
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = [a.copy() for a in wide]
        for i, direction in zip(floats, v, strict=True):
            moved[i] = moved[i] + sign * step * direction
        ends.append(run(backward, [*moved, weights], dtype=f64))
    expected = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
    got = {}
    if kept:
        whole = Graph((*graph.inputs, seed, *vs), tuple(s for _, s in kept))
        got = dict(zip((i for i, _ in kept), run(whole, [*wide, weights, *v], dtype=f64), strict=True))
    for i, e in zip(floats, expected, strict=True):
        value = got.get(i, np.zeros_like(e))
        assert np.abs(value - e).max(initial=0.0) <= 1e-6 * max(1.0, np.abs(e).max(initial=0.0)), f"operand {i}"


TRANSPOSABLE = [(op, k, s) for op, k, s in SAMPLES if op.transpose is not None and not s.label]


@pytest.mark.parametrize(("op", "k", "sample"), TRANSPOSABLE, ids=[f"{o.name}-{k}" for o, k, _ in TRANSPOSABLE])
def test_transpose_moves_to_the_inputs(op: Op, k: int, sample: Sample) -> None:
    graph, arrays = sample_node(op, sample, seed=k)
    node = graph.outputs[0]
    perm = tuple(int(p) for p in np.random.default_rng(k).permutation(len(node.shape)))
    assert op.transpose is not None
    new = op.transpose(node, perm)
    assert new is not None
    expected = run(graph, arrays)[0].transpose(perm)
    found = run(Graph(graph.inputs, (new,)), arrays)[0]
    assert found.shape == expected.shape and errors(found, expected) <= sample.budget  # sums may run in another order


LAYOUTS = [(op, k, s) for op, k, s in SAMPLES if op.to_layout is not None]


@pytest.mark.parametrize(("op", "k", "sample"), LAYOUTS, ids=[f"{o.name}-{k}" for o, k, _ in LAYOUTS])
def test_another_layout_gives_the_same_value(op: Op, k: int, sample: Sample) -> None:
    graph, arrays = sample_node(op, sample, seed=k)
    node = graph.outputs[0]
    assert op.to_layout is not None
    assert op.to_layout(node, node.attrs["layout"]) is node
    other = "NHWC" if node.attrs["layout"] == "NCHW" else "NCHW"
    new = op.to_layout(node, other)
    assert new is not node and new.type == node.type
    found = run(Graph(graph.inputs, (new,)), arrays)[0]
    assert errors(found, run(graph, arrays)[0]) <= sample.budget
