"""Gradients against central differences: every sample of every differentiable op, compositions, gradients of gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tensorwright.ir  # noqa: F401 - registers the ops
from tensorwright.ir.build import constant, full, get, input_node
from tensorwright.ir.differentiate import vjp
from tensorwright.ir.dtypes import f64
from tensorwright.ir.errors import GradientError
from tensorwright.ir.graph import Graph, Label, Location
from tensorwright.ir.interp import run
from tensorwright.ir.op import REGISTRY, NotDifferentiable, Trait, make
from tensorwright.ir.ops import sample_node
from tensorwright.ir.types import TupleType, tensor
from tensorwright.ir.verify import verify
from tensorwright.passes.central import rule_is_right
from tensorwright.passes.contract import Context
from tensorwright.passes.drop_marks import DropMarks
from tensorwright.passes.gradient import Gradient

DIFFERENTIABLE = sorted(
    name for name, op in REGISTRY.items() if not isinstance(op.grad, NotDifferentiable) and not op.has(Trait.STRUCTURAL)
)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_rule_of_every_op(name):
    """The gradient rule of each op at each of its differentiable samples, against central differences in f64."""
    op = REGISTRY[name]
    checked = 0
    for sample in op.samples():
        if not sample.gradient:
            continue
        graph, arrays = sample_node(op, sample)
        (node,) = graph.outputs
        if isinstance(node.type, TupleType) or not node.dtype.is_float:
            continue
        wide = [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]
        assert rule_is_right(node, wide), f"{name} {sample.attrs} {[a.shape for a in arrays]}"
        checked += 1
    smooth = any(s.gradient for s in op.samples())
    assert checked or not smooth


def total(y):
    return make("sum", y, axes=tuple(range(len(y.shape))), keepdims=False) if y.shape else y


def mark(x, id=0):
    return make("mark", x, id=id)


def weighted(y, seed=0):
    """A scalar that depends on every element of y in its own way."""
    w = constant(np.random.default_rng(seed).normal(size=y.shape), y.dtype)
    return total(make("mul", y, w))


def softmax(x):
    m = make("stop_gradient", make("max", x, axes=(1,), keepdims=True))
    e = make("exp", make("sub", x, make("broadcast_to", m, shape=x.shape)))
    return make("div", e, make("broadcast_to", make("sum", e, axes=(1,), keepdims=True), shape=x.shape))


def layer_norm(x, g):
    mean = make("broadcast_to", make("mean", x, axes=(1,), keepdims=True), shape=x.shape)
    d = make("sub", x, mean)
    var = make("mean", make("mul", d, d), axes=(1,), keepdims=True)
    r = make("rsqrt", make("add", var, full(1e-5, var.tensor)))
    return make("mul", make("mul", d, make("broadcast_to", r, shape=x.shape)), make("broadcast_to", g, shape=x.shape))


def convnet(x, w):
    y = make("conv2d", x, w, padding=((1, 1), (1, 1)), stride=(2, 1))
    y = make("maximum", y, full(0.0, y.tensor))
    return make("avg_pool2d", make("max_pool2d", y, kernel=(2, 2), stride=(1, 1)), kernel=(2, 2), stride=(2, 2))


NETS = {
    "softmax": (lambda x: weighted(softmax(x)), [(3, 5)]),
    "layer norm": (lambda x, g: weighted(layer_norm(x, g)), [(3, 6), (6,)]),
    "linear twice": (
        lambda x, w: weighted(make("tanh", make("matmul", make("matmul", x, w), make("transpose", w, perm=(1, 0))))),
        [(2, 3), (3, 4)],
    ),
    "conv and pools": (lambda x, w: weighted(convnet(x, w)), [(2, 2, 7, 6), (3, 2, 3, 3)]),
    "shared": (lambda x: total(make("mul", make("exp", x), make("mul", x, make("exp", x)))), [(4,)]),
    "gather": (lambda x: weighted(make("gather", x, constant(np.array([0, 2, 0, 1]), "i64"), axis=0)), [(3, 2)]),
}


def gradient_graph(fn, shapes, ids=0):
    inputs = tuple(input_node(f"x{k}", tensor("f32", s)) for k, s in enumerate(shapes))
    marks = [mark(i, 10 * ids + k) for k, i in enumerate(inputs)]
    y = fn(*marks)
    g = make("gradient", y, *marks)
    return Graph(inputs, (y, *(get(g, k) for k in range(len(marks)))))


@pytest.mark.parametrize("name", NETS)
def test_compositions(name, checked):
    graph = gradient_graph(*NETS[name])
    after = checked(graph, Gradient(), DropMarks())  # validated: central differences
    verify(after)
    assert not any(n.op.has(Trait.BARRIER) and n.op.name == "mark" for n in after.nodes())


def test_what_is_behind_a_stop_is_a_constant_to_the_check(checked):
    """A straight-through estimator: rounding in the value, none in the gradient. Central differences would see the steps."""

    def rounded(x, w):
        y = make("add", x, make("stop_gradient", make("sub", make("round", x), x)))
        return total(make("mul", y, w))

    graph = gradient_graph(rounded, ((3, 5), (3, 5)))
    after = checked(graph, Gradient(), DropMarks())
    x, w = (np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 3 for _ in range(2))
    _, dx, dw = run(after, [x, w])
    np.testing.assert_array_equal(dx, w)
    np.testing.assert_allclose(dw, np.rint(x), atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "layer norm", "linear twice", "shared"])
def test_gradient_of_gradient(name, checked):
    """d/dx of |dy/dx|^2: the inner gradient is expanded first, and the outer one goes through it."""
    fn, shapes = NETS[name]
    inputs = tuple(input_node(f"x{k}", tensor("f32", s)) for k, s in enumerate(shapes))
    outer = [mark(i, k) for k, i in enumerate(inputs)]
    inner = [mark(o, 100 + k) for k, o in enumerate(outer)]
    g = make("gradient", fn(*inner), *inner)
    norm = None
    for k in range(len(inner)):
        part = total(make("mul", get(g, k), get(g, k)))
        norm = part if norm is None else make("add", norm, part)
    h = make("gradient", norm, *outer)
    graph = Graph(inputs, tuple(get(h, k) for k in range(len(outer))))
    checked(graph, Gradient())


def test_an_x_that_y_does_not_depend_on_has_gradient_zero():
    x, y = input_node("x", tensor("f32", (3,))), input_node("y", tensor("f32", (2,)))
    g = make("gradient", total(make("exp", x)), x, y)
    after = Gradient().run(Graph((x, y), (get(g, 0), get(g, 1))), Context())
    results = run(after, [np.ones(3, "f4"), np.ones(2, "f4")])
    np.testing.assert_allclose(results[0], np.full(3, np.e), rtol=1e-6)
    assert (results[1] == 0).all() and results[1].shape == (2,)


def test_cotangents_are_added_once_per_use():
    x = input_node("x", tensor("f32", (3,)))
    y = make("add", make("mul", x, x), make("add", x, x))
    (dx,) = vjp([total(y)], (x,), [constant(1.0, "f32")])
    values = np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(run(Graph((x,), (dx,)), [values], f64)[0], 2 * values + 2)


def test_stop_gradient_stops():
    x = input_node("x", tensor("f32", (3,)))
    y = total(make("mul", x, make("stop_gradient", x)))
    (dx,) = vjp([y], (x,), [constant(1.0, "f32")])
    values = np.array([1.0, -2.0, 0.5], "f4")
    assert (run(Graph((x,), (dx,)), [values])[0] == values).all()


def test_xs_are_variables_of_their_own():
    """By x2 = x1 * x1 and x1 both: what x1 contributes through x2 belongs to x2."""
    x1 = mark(input_node("x", tensor("f32", ())))
    x2 = mark(make("mul", x1, x1), 1)
    d1, d2 = vjp([make("add", x2, x1)], (x1, x2), [constant(1.0, "f32")])
    graph = Graph((x1.inputs[0],), (d1, d2))
    assert [float(v) for v in run(graph, [np.float32(3.0)])] == [1.0, 1.0]


def test_an_op_without_gradient_is_named_with_its_line():
    blocked = replace(REGISTRY["tanh"], name="opaque", grad=NotDifferentiable("nobody knows how"))
    x = input_node("x", tensor("f32", (3,)))
    y = make("sin", x)
    node = make(blocked, y)
    where = Location("model.py", 7, "y = f(x)")
    with pytest.raises(GradientError, match=r"opaque.*nobody knows how") as e:
        vjp([total(node)], (x,), [constant(1.0, "f32")], {node: Label(None, where)})
    assert "model.py:7" in str(e.value) and "stop_gradient" in str(e.value)
    (dx,) = vjp([total(make("add", make("stop_gradient", node), y))], (x,), [constant(1.0, "f32")])
    assert run(Graph((x,), (dx,)), [np.zeros(3, "f4")])[0].tolist() == [1, 1, 1], "none is needed: no path that matters"


def test_the_gradient_of_a_vector_is_refused():
    x = input_node("x", tensor("f32", (3,)))
    with pytest.raises(Exception, match="scalar"):
        make("gradient", make("exp", x), x)


def test_gradient_nodes_inherit_locations():
    x = input_node("x", tensor("f32", (3,)))
    y = make("tanh", x)
    s = total(y)
    g = make("gradient", s, x)
    graph = Graph((x,), (get(g, 0),), labels={y: Label("t", Location("m.py", 3))})
    after = Gradient().run(graph, Context())
    assert {str(after.labels[n].location) for n in after.labels} == {"m.py:3"}
    assert len(after.labels) >= 2
    verify(after)
