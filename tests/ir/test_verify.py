"""The verifier: each invariant has a graph that breaks it, and the error shows where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tensorwright.ir import (
    LEVELS,
    REGISTRY,
    Axis,
    Contraction,
    Graph,
    Label,
    Location,
    Node,
    affine,
    constant,
    full,
    fused,
    get,
    input_node,
    make,
    outputs,
    symbol,
    tensor,
    verify,
)
from tensorwright.ir.errors import VerifyError
from tensorwright.ir.op import Op
from tensorwright.ir.ops import sample_node
from tensorwright.ir.testing import random_graph

T = tensor("f32", (2, 3))
X, Y = input_node("x", T), input_node("y", T)


def forged(name: str, inputs: tuple[Node, ...], type_, **attrs) -> Node:
    return Node(REGISTRY[name], inputs, attrs, type_)


def refuse(graph: Graph, message: str, lowest: str) -> str:
    """The graph fails from level `lowest` on, and passes below it."""
    said = ""
    for level in LEVELS:
        if LEVELS.index(level) < LEVELS.index(lowest):
            verify(graph, level)
            continue
        with pytest.raises(VerifyError, match=message) as caught:
            verify(graph, level)
        said = str(caught.value)
    return said


@pytest.mark.parametrize("op", list(REGISTRY.values()), ids=lambda op: op.name)
def test_every_sample_verifies(op: Op):
    for sample in op.samples():
        graph, _ = sample_node(op, sample)
        verify(Graph(graph.inputs, outputs(graph.outputs[0])))


@pytest.mark.parametrize("seed", range(10))
def test_random_graphs_verify(seed):
    verify(random_graph(np.random.default_rng(seed), 30)[0])


def test_unknown_level():
    with pytest.raises(VerifyError, match="levels are basic, types, full"):
        verify(Graph((), ()), "more")


def pair() -> Node:
    p = input_node("p0", T)
    return fused(Graph((p,), (make("exp", p), make("neg", p))), [X], "map")


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (Graph((make("neg", X),), (X,)), "input 0 is a node of neg"),
        (Graph((X, input_node("x", tensor("f32", ()))), (X,)), "two inputs are named 'x'"),
        (Graph((X,), (Y,)), "input 'y' is used but not declared"),
        (Graph((X,), (make("add", X, Y),)), "input 'y' is used but not declared"),
        (Graph((X,), (X, X), ("a", "a")), r"used twice: \['a'\]"),
        (Graph((X,), (X, X), ("a",)), "2 outputs with 1 names"),
        (Graph((X,), (pair(),)), "output 'y' is a tuple"),
        (Graph((X,), (X,), aliases=((0, 1),)), "not there"),
        (Graph((X,), (X,), aliases=((-1, 0),)), "not there"),
        (Graph((X, Y), (X,), aliases=((0, 0), (0, 1))), "repeats"),
        (Graph((X,), (make("sum", X, axes=(0,)),), aliases=((0, 0),)), r"output 'y' is f32\[3\], input 'x' is f32\[2, 3\]"),
        (Graph((X,), (forged("add", (X,), T),)), "takes 2 operands, this node has 1"),
        (Graph((X,), (forged("neg", (pair(),), T),)), "operand 0 of neg is a tuple"),
        (Graph((X,), (Node(replace(REGISTRY["neg"], name="unheard"), (X,), {}, T),)), "'unheard' is not registered"),
    ],
)
def test_basic(graph, message):
    refuse(graph, message, "basic")


def test_types_are_inferred_again():
    bad = forged("add", (X, Y), tensor("f32", (2, 4)))
    said = refuse(Graph((X, Y), (make("exp", bad),)), r"recorded as f32\[2, 4\], .* give f32\[2, 3\]", "types")
    assert "--> %0 = add(%x, %y) : f32[2, 4]\n" in said and "    %1 = exp(%0) : f32[2, 4]" in said and "%x = input()" in said
    refuse(Graph((X,), (forged("sum", (X,), T, axes=(7,), keepdims=False),)), "axes", "types")


def test_the_neighbourhood_shows_locations():
    bad = forged("neg", (X,), tensor("f32", ()))
    g = Graph((X,), (bad,), labels={bad: Label("oops", Location("net.py", 7))})
    assert "--> %0 = neg(%x) : f32[]  # oops net.py:7" in refuse(g, "neg is recorded", "types")


def test_attributes_are_complete_and_printable():
    refuse(Graph((X,), (forged("neg", (X,), T, extra=1),)), r"attributes \['extra'\], its record says \[\]", "full")

    class Odd:
        pass

    op = replace(REGISTRY["neg"], name="odd", attrs={"odd": None})
    REGISTRY["odd"] = op
    try:
        said = refuse(Graph((X,), (Node(op, (X,), {"odd": Odd()}, T),)), "attribute 'odd': .* cannot be the value", "full")
    finally:
        del REGISTRY["odd"]
    assert "-->" in said


def test_labels_are_on_nodes_of_the_graph():
    refuse(Graph((X,), (X,), labels={make("neg", X): Label("lost")}), "a label is on <neg", "full")


def test_sizes_come_from_inputs():
    n, m = symbol("N"), symbol("M")
    x = input_node("x", tensor("f32", (n, 3)))
    verify(Graph((x,), (make("reshape", x, shape=(3 * n,)),)))
    wild = full(1.0, tensor("f32", (m, 3)))
    refuse(Graph((x,), (x, wild)), r"the size \['M'\] comes from no input", "full")
    lost = input_node("x", tensor("f32", (n * m,)))
    refuse(Graph((lost,), (lost,)), r"no input has a dimension of \['M', 'N'\] alone", "full")
    verify(Graph((lost, input_node("s", tensor("f32", (n, m)))), (lost,)))


def matmul_spec(**change) -> Contraction:
    axes = (Axis("m", 2, "m"), Axis("n", 4, "n"), Axis("k", 3, "k"))
    spec = Contraction(axes, (affine("m"), affine("k")), (affine("k"), affine("n")), (affine("m"), affine("n")))
    return replace(spec, **change)


W = input_node("w", tensor("f32", (3, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": (affine("m"),)}, "its index map has 1 dim"),
        ({"a": (affine("m"), affine("z"))}, "no axis 'z'"),
        ({"a": (affine("m", constant=1), affine("k"))}, r"index m\+1 of dimension 0 runs from 1 to 2"),
        ({"b": (affine("k"), affine(("n", -1)))}, "runs from -3 to 0"),
        ({"c": (affine("m"), affine("n", constant=1))}, "is one axis, not"),
        ({"axes": (Axis("m", 2, "m"), Axis("n", 4, "n"), Axis("k", 4, "k"))}, "runs from 0 to 3"),
        ({"axes": (Axis("m", 2, "batch"), Axis("n", 4, "k"), Axis("k", 3, "k"))}, "exactly once"),
        ({"axes": (Axis("m", 2, "n"), Axis("n", 4, "n"), Axis("k", 3, "k"))}, "axis 'm' of kind 'n' cannot occur in A"),
        ({"axes": (Axis("m", 2, "m"), Axis("m", 4, "n"), Axis("k", 3, "k"))}, "distinct names"),
        ({"panel": 2, "b_shape": (3, 4)}, r"expected panels \[2, 3, 2\]"),
    ],
)
def test_contraction_maps(change, message):
    spec = matmul_spec()
    good = make("contract", X, W, spec=spec)
    verify(Graph((X, W), (good,)))
    bad = forged("contract", (X, W), good.type, spec=matmul_spec(**change))
    with pytest.raises(VerifyError, match=message):
        verify(Graph((X, W), (bad,)))


def test_packed_contractions_verify():
    panels = input_node("w", tensor("f32", (2, 3, 3)))
    packed = matmul_spec(panel=3, b_shape=(3, 4))
    verify(Graph((X, panels), (make("contract", X, panels, spec=packed),)))


def p(k: int, shape: tuple[int, ...] = (2, 3)) -> Node:
    return input_node(f"p{k}", tensor("f32", shape))


def softmax(x: Node) -> Node:
    spread = lambda v: make("broadcast_to", v, shape=x.shape)  # noqa: E731
    e = make("exp", make("sub", x, spread(make("max", x, axes=(1,), keepdims=True))))
    return make("div", e, spread(make("sum", e, axes=(1,), keepdims=True)))


def biased_matmul(*tail: str) -> Node:
    y = make("contract", p(0), p(1, (3, 4)), spec=matmul_spec())
    y = make("add", y, make("broadcast_to", p(2, (4,)), shape=(2, 4)))
    for op in tail:
        y = make(op, y)
    return y


def flat(x: Node) -> Node:
    return make("reshape", x, shape=(8,))


SQUARE = p(0, (2, 2))
MATMUL_INPUTS = (p(0), p(1, (3, 4)), p(2, (4,)))


@pytest.mark.parametrize(
    ("kind", "inputs", "results"),
    [
        ("map", (p(0),), (make("exp", p(0)), make("neg", p(0)))),
        ("map", (p(0),), (make("mul", p(0), full(2.0, T)),)),
        ("rows", (p(0),), (softmax(p(0)),)),
        ("rows", (p(0),), (softmax(p(0)), make("sum", p(0), axes=(1,)), make("max", p(0), axes=(1,), keepdims=True))),
        ("reduce", (p(0),), (make("neg", make("sum", make("exp", p(0)), axes=(0,))), make("max", p(0), axes=(0,)))),
        ("contraction", MATMUL_INPUTS, (biased_matmul("tanh"),)),
        ("contraction", MATMUL_INPUTS, (make("reshape", biased_matmul(), shape=(8,)),)),
    ],
)
def test_fused_bodies_that_obey(kind, inputs, results):
    verify(Graph(inputs, outputs(fused(Graph(inputs, results), inputs, kind))))


@pytest.mark.parametrize(
    ("kind", "inputs", "results", "message"),
    [
        ("map", (input_node("q0", T),), (make("exp", input_node("q0", T)),), "an input named p0"),
        ("map", (input_node("p0", T, "parameter"),), (make("exp", input_node("p0", T, "parameter")),), "of role data"),
        ("map", (p(0),), (p(0),), "computes something"),
        ("map", (p(0),), (make("exp", p(0)), make("transpose", p(0), perm=(1, 0))), "have one shape"),
        ("map", (p(0),), (make("sum", p(0), axes=(1,)),), "kind 'map' holds Map, View; this is a Reduce"),
        ("map", (p(0), p(1, (3, 4))), (make("contract", p(0), p(1, (3, 4)), spec=matmul_spec()),), "this is a Contract"),
        ("rows", (p(0),), (make("exp", p(0)),), "without one it is a 'map'"),
        ("rows", (p(0),), (make("sum", p(0), axes=(0,)),), "trailing axes"),
        ("rows", (p(0),), (make("sum", p(0), axes=(1,)), make("sum", p(0), axes=(0, 1))), "share shape"),
        ("rows", (p(0),), (make("transpose", softmax(p(0)), perm=(1, 0)),), "one of the shapes"),
        ("reduce", (p(0),), (make("exp", p(0)),), "without one it is a 'map'"),
        ("reduce", (p(0),), (make("sum", p(0), axes=(0,)), make("sum", p(0), axes=(1,))), "share shape"),
        ("reduce", (p(0),), (make("sum", p(0), axes=(0,)), make("exp", p(0))), "computed from reduced values"),
        ("reduce", (SQUARE,), (make("sum", make("broadcast_to", make("sum", SQUARE, axes=(0,)), shape=(2, 2)), axes=(0,)),),
         "cannot depend on another"),
        ("contraction", (p(0),), (make("exp", p(0)),), "exactly one contraction, not 0"),
        ("contraction", MATMUL_INPUTS, (biased_matmul(), biased_matmul("exp")), "one output"),
        ("contraction", MATMUL_INPUTS, (make("contract", make("exp", p(0)), p(1, (3, 4)), spec=matmul_spec()),), "operand 0 of"),
        ("contraction", MATMUL_INPUTS, (make("sum", biased_matmul(), axes=(0,)),), "this is a Reduce"),
        ("contraction", MATMUL_INPUTS, (make("transpose", biased_matmul(), perm=(1, 0)),), "the output has shape"),
        ("contraction", MATMUL_INPUTS, (make("reshape", make("exp", flat(biased_matmul())), shape=(2, 4)),), "output has shape"),
        ("contraction", MATMUL_INPUTS, (make("exp", make("reshape", flat(biased_matmul()), shape=(2, 4))),), "epilogue keeps"),
    ],
)  # fmt: skip
def test_fused_bodies_that_do_not(kind, inputs, results, message):
    node = fused(Graph(inputs, results), inputs, kind)
    refuse(Graph(inputs, outputs(node)), message, "full")


def test_a_body_is_verified_like_any_graph():
    x = p(0)
    wrong = forged("exp", (forged("neg", (x,), tensor("f32", (3,))),), T)
    g = Graph((X,), (fused(Graph((x,), (wrong,), name="inner"), [X], "map"),))
    refuse(g, "graph 'inner': neg is recorded", "full")
    taken = get(pair(), 0)
    refuse(Graph((X,), (fused(Graph((x,), (make("add", taken, x),)), [X], "map"),)), "cannot be inside a fused body", "full")


def test_a_chain_of_50_000_nodes_verifies():
    n = X
    for k in range(50_000):
        n = make("neg" if k % 2 else "exp", n)
    verify(Graph((X,), (n,)))
    verify(Graph((), (make("neg", constant(1.0, "f32")),)))
