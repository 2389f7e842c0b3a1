"""Whole-graph helpers: binding sizes, specialising, inlining, costs."""

from __future__ import annotations

import numpy as np
import pytest
from tensorwright.ir import (
    Axis,
    Contraction,
    Graph,
    Label,
    affine,
    bind_sizes,
    constant,
    full,
    fused,
    graph_cost,
    inline,
    input_node,
    make,
    node_cost,
    outputs,
    rebuild,
    run,
    specialize,
    symbol,
    tensor,
    verify,
)
from tensorwright.ir.cost import Cost
from tensorwright.ir.errors import InputError, ShapeError

N, M = symbol("N"), symbol("M")


def symbolic() -> Graph:
    x = input_node("x", tensor("f32", (N, 3)))
    y = input_node("y", tensor("f32", (2 * N + 1, M)))
    flat = make("reshape", x, shape=(3 * N,))
    p = input_node("p0", tensor("f32", (3 * N,)))
    body = fused(Graph((p,), (make("mul", p, full(2.0, p.tensor)),)), [flat], "map")
    return Graph((x, y), (body, y), labels={flat: Label("flat"), x: Label("in")})


def test_sizes_are_bound_and_every_dimension_checked():
    g = symbolic()
    assert bind_sizes(g, [(4, 3), (9, 5)]) == {"N": 4, "M": 5}
    assert bind_sizes(g, {"y": np.zeros((9, 5)), "x": np.zeros((4, 3))}) == {"N": 4, "M": 5}
    only = Graph((g.inputs[1],), (g.inputs[1],))
    assert bind_sizes(only, [(9, 5)]) == {"N": 4, "M": 5}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(4, 3)], "takes 2 inputs"),
        ([(4, 3), (9, 5), (1,)], "takes 2 inputs"),
        ({"x": (4, 3)}, r"missing \['y'\]"),
        ([(4,), (9, 5)], r"input 'x' is f32\[N, 3\]: expected 2 dimensions, got shape \(4,\)"),
        ([(4, 2), (9, 5)], "dimension 1 must be 3"),
        ([(4, 3), (8, 5)], r"dimension 0 must be 9 \(N = 4 from input 'x'\), got 8"),
        ([(0, 3), (1, 5)], "makes N = 0"),
    ],
)
def test_sizes_that_do_not_fit(shapes, message):
    with pytest.raises(InputError, match=message):
        bind_sizes(symbolic(), shapes)


def test_sizes_that_cannot_be_known_or_solved():
    x = input_node("x", tensor("f32", (N * M,)))
    with pytest.raises(InputError, match="do not determine M, N"):
        bind_sizes(Graph((x,), (x,)), [(6,)])
    odd = input_node("x", tensor("f32", (2 * N,)))
    with pytest.raises(InputError, match="do not determine N"):
        bind_sizes(Graph((odd,), (odd,)), [(5,)])
    zero = input_node("z", tensor("f32", (M // (N - 2),)))
    sized = input_node("s", tensor("f32", (N, M)))
    with pytest.raises(InputError, match="divided by zero"):
        bind_sizes(Graph((zero, sized), (zero,)), [(1,), (2, 4)])


def test_specialize_puts_sizes_in_everywhere():
    g = symbolic()
    s = specialize(g, {"N": 4, "M": 5})
    verify(s)
    assert s.outputs[0].shape == (12,) and s.outputs[1].shape == (9, 5)
    assert {label.name for label in s.labels.values()} == {"flat", "in"} and set(s.labels) <= set(s.nodes())
    part = specialize(g, {"M": 5})
    assert part.outputs[0] is g.outputs[0] and part.outputs[1].shape == (2 * N + 1, 5)
    assert specialize(g, {}) is g and specialize(s, {"N": 9}) is s
    arrays = [np.ones((4, 3), np.float32), np.ones((9, 5), np.float32)]
    for a, b in zip(run(g, arrays), run(s, arrays), strict=True):
        np.testing.assert_array_equal(a, b)
    renamed = specialize(g, {"N": 2 * symbol("K")})
    assert renamed.inputs[0].shape == (2 * symbol("K"), 3)


def test_specialize_reaches_contractions():
    spec = Contraction(
        (Axis("m", N, "m"), Axis("n", 4, "n"), Axis("k", 3, "k")),
        (affine("m"), affine("k")), (affine("k"), affine("n")), (affine("m"), affine("n")),
    )  # fmt: skip
    a, b = input_node("a", tensor("f32", (N, 3))), input_node("b", tensor("f32", (3, 4)))
    s = specialize(Graph((a, b), (make("contract", a, b, spec=spec),)), {"N": 7})
    verify(s)
    assert s.outputs[0].attrs["spec"].axis("m").extent == 7
    assert node_cost(s.outputs[0]) == Cost(2 * 7 * 4 * 3, 4 * (21 + 12), 4 * 28)


def test_inline_and_rebuild():
    g = symbolic()
    x, y = (input_node(n, i.tensor) for n, i in zip("ab", g.inputs, strict=True))
    a, b = inline(g, [x, y])
    assert b is y and a is not g.outputs[0] and a.type == g.outputs[0].type
    verify(Graph((x, y), (a, b)))
    with pytest.raises(ShapeError, match="1 operands for a body with 2 inputs"):
        inline(g, [x])
    neg = make("neg", x)
    deep = neg
    for _ in range(20_000):
        deep = make("exp", deep)
    (changed,) = rebuild([deep], {neg: make("abs", x)})
    assert changed.type == deep.type and changed is not deep
    assert rebuild([deep], {make("tanh", x): x}) == (deep,)


def test_costs():
    x = input_node("x", tensor("f32", (8, 16)))
    assert node_cost(x) == Cost() and node_cost(constant(np.ones(3))) == Cost()
    assert node_cost(make("mul", x, x)) == Cost(128, 512, 512)
    assert node_cost(make("sum", x, axes=(1,))) == Cost(128, 512, 32)
    assert node_cost(make("reshape", x, shape=(128,))) == Cost()
    assert node_cost(make("transpose", x, perm=(1, 0))) == Cost(0, 512, 512)
    w = input_node("w", tensor("f32", (16, 4)))
    assert node_cost(make("matmul", x, w)).flops == 2 * 8 * 16 * 4
    p = input_node("p0", x.tensor)
    region = fused(Graph((p,), (make("mul", make("exp", p), p), make("neg", p))), [x], "map")
    assert node_cost(region) == Cost(3 * 128, 512, 1024)
    assert graph_cost(Graph((x,), outputs(region))) == Cost(3 * 128, 512, 1024) and Cost(1, 2, 3).bytes == 5
    with pytest.raises(ShapeError, match="symbolic"):
        node_cost(make("neg", input_node("s", tensor("f32", (N,)))))
