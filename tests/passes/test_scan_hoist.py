"""What need not be done in every step leaves the loop: invariants, packed weights, products over all steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwright.ir import Graph, Node, full, get, input_node, make, outputs, run, tensor
from tensorwright.ir.batching import contraction_of
from tensorwright.ir.op import Trait
from tensorwright.passes import hoist, pipeline
from tensorwright.passes.bodies import all_graphs
from tensorwright.passes.contract import Context
from tensorwright.passes.hoist import Hoist
from tensorwright.passes.prepare import split
from tensorwright.passes.rewrite import RewriteError
from tensorwright.passes.validate import validate_split

from tests.passes.scan_graphs import body, f32, graph_of, loops, scan

RNG = np.random.default_rng(13)
T, B, F, S = 6, 3, 5, 4


def products(graph: Graph) -> int:
    return sum(1 for n in graph.nodes() if n.op.has(Trait.CONTRACTION))


def rnn(batch: int = B, roles: str = "data", **attrs: Any) -> Node:
    """h' = tanh(h @ w + x @ v + b), stacking h' @ u."""
    h, x, w, v, b, u = body((batch, S), (batch, F), (S, S), (F, S), (S,), (S, F))
    total = make("add", make("matmul", h, w), make("matmul", x, v))
    new = make("tanh", make("add", total, make("broadcast_to", b, shape=(batch, S))))
    graph = Graph((h, x, w, v, b, u), (new, make("matmul", new, u)))
    shapes = [("w", S, S), ("v", F, S), ("b", S), ("u", S, F)]
    weights = [f32(str(n), *s, role=roles) for n, *s in shapes]
    start = full(0.0, tensor("f32", (batch, S)))
    return scan(graph, start, f32("x", T, batch, F), *weights, length=T, carries=1, sequences=1, **attrs)


def test_invariants_leave_the_loop_but_not_movements_of_them(checked: Any) -> None:
    h, x, w = body((B, S), (B, S), (S,))
    wide = make("broadcast_to", make("exp", w), shape=(B, S))
    step = Graph((h, x, w), (make("tanh", make("mul", make("add", h, x), wide)),))
    node = scan(step, f32("h", B, S), f32("x", T, B, S), f32("w", S), length=T, carries=1, sequences=1)
    (loop,) = loops(checked(graph_of(*outputs(node)), Hoist()))
    assert loop.inputs[-1].op.name == "exp" and loop.inputs[-1].shape == (S,), "what is broadcast, not the broadcast"
    assert any(n.op.name == "broadcast_to" for n in loop.attrs["body"].nodes())


def test_invariants_leave_all_loops_around_them(checked: Any) -> None:
    c, row, w = body((S,), (T, S), (S,))
    ic, ix, iw = body((S,), (S,), (S,))
    inner = scan(Graph((ic, ix, iw), (make("tanh", make("add", make("mul", ic, make("exp", iw)), ix)),)), c, row, w,
                 length=T, carries=1, sequences=1)  # fmt: skip
    node = scan(
        Graph((c, row, w), (get(inner, 0),)), f32("c", S), f32("x", 2, T, S), f32("w", S), length=2, carries=1, sequences=1
    )
    after = checked(graph_of(*outputs(node)), Hoist())
    assert all(n.op.name != "exp" for g in all_graphs(after) if g is not after for n in g.nodes())


def test_a_while_loop_keeps_only_what_changes(checked: Any) -> None:
    n, w = body((), ())
    test = Graph((n, w), (make("less", n, make("exp", w)),))
    step = Graph((n, w), (make("add", n, make("sigmoid", w)),))
    node = make("while_loop", f32("n"), f32("w"), test=test, body=step, carries=1)
    (loop,) = loops(checked(graph_of(*outputs(node)), Hoist()))
    inside = {n.op.name for key in ("test", "body") for n in loop.attrs[key].nodes()}
    assert inside == {"input", "less", "add"}


def test_random_draws_stay_where_they_are(checked: Any) -> None:
    """From one key, a draw would be the same in every step; to draw once is for whoever wrote the loop to say."""
    x, key = f32("p0", S), input_node("p1", tensor("u64", ()))
    graph = Graph((x, key), (make("add", x, make("random_uniform", key, shape=(S,), stream=1)),))
    node = scan(graph, f32("x", T, S), input_node("key", tensor("u64", ())), length=T, carries=0, sequences=1)
    before = graph_of(*outputs(node))
    assert checked(before, Hoist()) == before


def test_input_and_output_projections_are_one_product_each(checked: Any) -> None:
    after = checked(graph_of(*outputs(rnn())), Hoist())
    (loop,) = loops(after)
    assert products(loop.attrs["body"]) == 1 and products(after) == 2
    sizes = [sorted((x.name, x.extent, x.kind) for x in s.axes) for n in after.nodes() if (s := contraction_of(n)) is not None]
    assert all(("t", T, "m") in s for s in sizes), "steps and batch are rows of one product"


def test_products_of_moved_and_computed_sequences(checked: Any) -> None:
    """sin(transpose(x[t])) @ exp(w): what stands before the product is computed for all steps as well."""
    h, x, w = body((F, S), (B, F), (B, S))
    value = make("matmul", make("sin", make("transpose", x, perm=(1, 0))), make("exp", w))
    node = scan(Graph((h, x, w), (make("tanh", make("add", h, value)),)), f32("h", F, S), f32("x", T, B, F), f32("w", B, S),
                length=T, carries=1, sequences=1)  # fmt: skip
    after = checked(graph_of(*outputs(node)), Hoist())
    (loop,) = loops(after)
    assert {n.op.name for n in loop.attrs["body"].nodes()} == {"input", "add", "tanh"}


def test_chains_of_products_leave_together(checked: Any) -> None:
    h, x, v, w = body((B, S), (B, F), (F, S), (S, S))
    deep = make("matmul", make("tanh", make("matmul", x, v)), w)
    node = scan(Graph((h, x, v, w), (make("sin", make("add", h, deep)),)), f32("h", B, S), f32("x", T, B, F), f32("v", F, S),
                f32("w", S, S), length=T, carries=1, sequences=1)  # fmt: skip
    after = checked(graph_of(*outputs(node)), Hoist())
    (loop,) = loops(after)
    assert products(loop.attrs["body"]) == 0 and products(after) == 2 and len(loop.inputs) == 2


@pytest.mark.parametrize("attrs", [{"save": "inputs"}, {"carries": 0}])
def test_loops_that_keep_memory_small_keep_their_products(attrs: dict[str, Any], checked: Any) -> None:
    if "save" in attrs:
        node = rnn(**attrs)
        inside = 3
    else:
        x, v = body((B, F), (F, S))
        node = scan(Graph((x, v), (make("matmul", x, v),)), f32("x", T, B, F), f32("v", F, S), length=T, carries=0, sequences=1)
        inside = 1
    (loop,) = loops(checked(graph_of(*outputs(node)), Hoist()))
    assert products(loop.attrs["body"]) == inside


def test_results_much_smaller_than_what_they_come_from_stay(checked: Any) -> None:
    h, w = body((B, 64), (64, 1))
    new = make("tanh", h)
    pair = make("matmul", make("sin", new), w)
    node = scan(Graph((h, w), (new, pair)), f32("h", B, 64), f32("w", 64, 1), length=T, carries=1, sequences=0)
    (loop,) = loops(checked(graph_of(*outputs(node)), Hoist()))
    assert products(loop.attrs["body"]) == 1, "64 times the bytes would be stacked"


def test_every_rewrite_leaves_less_in_loops(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        hoist, "MOTION", (lambda node, facts: [get(node.replace(reverse=not node.attrs["reverse"]), k) for k in (0, 1)],)
    )
    monkeypatch.setattr(hoist.MOTION[0], "__name__", "turn", raising=False)
    with pytest.raises(RewriteError, match="as much in the loops"):
        Hoist().run(graph_of(*outputs(rnn())), Context())


@pytest.mark.parametrize("seed", range(12))
def test_substitution(seed: int) -> None:
    """Any body of this form, with the rules and without: the same values in f64."""
    rng = np.random.default_rng(seed)
    h, x, y, w, v = body((B, S), (B, F), (B, S), (S, S), (F, S))
    pool = [make("matmul", x, v), make("matmul", make("tanh", y), w), make("matmul", h, w), make("mul", y, h), make("sin", y)]
    for _ in range(4):
        a, b = (pool[int(k)] for k in rng.integers(len(pool), size=2))
        pool.append(make(str(rng.choice(["add", "mul", "maximum"])), make("sin", a), b))
    chosen = [pool[int(k)] for k in rng.integers(len(pool), size=2)]
    graph = Graph((h, x, y, w, v), (make("tanh", pool[-1]), *chosen, make("matmul", make("tanh", chosen[0]), w)))
    operands = [f32("h", B, S), f32("x", T, B, F), f32("y", T, B, S), f32("w", S, S), f32("v", F, S)]
    node = scan(graph, *operands, length=T, carries=1, sequences=2, reverse=bool(seed % 2))
    before = Graph(tuple(operands), outputs(node))
    after = Hoist().apply(before, Context())
    arrays = [RNG.normal(size=i.tensor.static_shape) for i in operands]
    wide = tensor("f64", ()).dtype
    for p, q in zip(run(before, arrays, wide), run(after, arrays, wide), strict=True):
        np.testing.assert_allclose(q, p, rtol=1e-12, atol=1e-12)


# Weights of loops in panels, once


def recurrent_panels(after: Graph) -> list[int]:
    return [
        n.attrs["spec"].panel
        for loop in loops(after)
        for g in all_graphs(loop.attrs["body"])
        for n in g.nodes()
        if "spec" in n.attrs
    ] + [
        n.attrs["spec"].panel
        for loop in loops(after)
        for f in loop.attrs["body"].nodes()
        if isinstance(f.attrs.get("body"), Graph) and not f.op.has(Trait.CONTROL)
        for n in f.attrs["body"].nodes()
        if "spec" in n.attrs
    ]


def test_inference_prepares_the_panels_of_recurrent_weights(checked: Any) -> None:
    after = checked(graph_of(*outputs(rnn(roles="parameter"))), *pipeline.inference())
    assert recurrent_panels(after) == [8]
    prepare, call = split(after)
    validate_split(after, prepare, call)
    (loop,) = loops(call)
    assert loop.inputs[-1].attrs["role"] == "prepared" and len(loop.inputs[-1].shape) == 3


def test_training_packs_recurrent_weights_before_the_loop(checked: Any) -> None:
    node = rnn(roles="state")
    w = next(i for i in node.inputs if i.attrs.get("name") == "w")
    loss = make("sum", make("mul", get(node, 1), get(node, 1)), axes=(0, 1, 2), keepdims=False)
    step = make("sub", w, get(make("gradient", loss, w), 0))
    inputs = [i for i in Graph((), (loss,)).nodes() if i.attrs.get("role")]
    graph = Graph(tuple(inputs), (step, loss), ("w", "loss"), "step", ((0, inputs.index(w)),))
    after = checked(graph, *pipeline.training())
    assert len(loops(after)) == 2 and recurrent_panels(after) == [8, 8]
    for loop in loops(after):
        names = [n.op.name for n in loop.attrs["body"].nodes()]
        assert "transpose" not in names and "pad" not in names, "no movement of weights is left in the loop"


def test_the_body_of_an_lstm_is_one_product_and_one_kernel(checked: Any) -> None:
    h, c, x, w = body((B, S), (B, S), (B, 4 * S), (4 * S, S))
    g = make("add", make("matmul", h, make("transpose", w, perm=(1, 0))), x)
    i, f, n, o = (make("slice", g, starts=(0, k * S), stops=(B, (k + 1) * S), steps=(1, 1)) for k in range(4))
    c2 = make("add", make("mul", make("sigmoid", f), c), make("mul", make("sigmoid", i), make("tanh", n)))
    h2 = make("mul", make("sigmoid", o), make("tanh", c2))
    node = scan(Graph((h, c, x, w), (h2, c2, h2)), f32("h", B, S), f32("c", B, S), f32("x", T, B, 4 * S),
                f32("w", 4 * S, S, role="parameter"), length=T, carries=2, sequences=1)  # fmt: skip
    weight = node.inputs[3]
    forward = checked(graph_of(*outputs(node)), *pipeline.inference())
    (loop,) = loops(forward)
    kinds = [n.attrs.get("kind", n.op.name) for n in loop.attrs["body"].nodes() if n.inputs and n.op.name != "get"]
    assert kinds == ["contraction", "map"]
    loss = make("sum", make("mul", get(node, 2), get(node, 2)), axes=(0, 1, 2), keepdims=False)
    both = checked(graph_of(loss, get(make("gradient", loss, weight), 0)), *pipeline.training())
    backward = next(n for n in loops(both) if n.attrs["reverse"])
    kinds = [n.attrs.get("kind", n.op.name) for n in backward.attrs["body"].nodes() if n.inputs and n.op.name != "get"]
    assert sorted(kinds) == ["contract", "map", "map"]
