"""Passes on loops and branches: bodies are reached, and the control pass leaves nothing superfluous in or around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tensorwright.ir import Graph, Label, Location, Node, constant, full, get, make, outputs, run, tensor, verify
from tensorwright.ir.errors import ValidationError
from tensorwright.ir.testing import random_graph
from tensorwright.passes import control, pipeline, simplify
from tensorwright.passes.bodies import all_graphs, invariants, nodes_with_runs
from tensorwright.passes.contract import Context
from tensorwright.passes.control import Control
from tensorwright.passes.gradient import Gradient
from tensorwright.passes.manager import Hooks, properties, run_pipeline
from tensorwright.passes.reduce import reduce
from tensorwright.passes.rewrite import RewriteError, rule_on
from tensorwright.passes.simplify import Simplify
from tensorwright.passes.validate import ValidationSkipped, Validator

from tests.passes.scan_graphs import body, f32, graph_of, loops, scan

RNG = np.random.default_rng(11)


H, X, W = f32("h", 3), f32("x", 5, 3), f32("w", 3)


# Rules


def test_results_without_use_and_the_carries_behind_them_go(checked: Any) -> None:
    a, b, x, w = body((3,), (3,), (3,), (3,))
    graph = Graph((a, b, x, w), (make("sin", make("mul", a, x)), make("mul", b, w), make("exp", a), make("neg", b)))
    node = scan(graph, H, H, X, W, length=5, carries=2, sequences=1)
    after = checked(graph_of(get(node, 2)), Control())
    (loop,) = loops(after)
    assert (loop.attrs["carries"], len(loop.inputs)) == (1, 2), "b and what only b reads are gone"
    assert len(loop.attrs["body"].outputs) == 2


def test_a_carry_stays_while_a_result_needs_it(checked: Any) -> None:
    a, b, x = body((3,), (3,), (3,))
    graph = Graph((a, b, x), (b, make("add", make("sin", a), x), make("mul", a, x)))  # a reads b, b reads a
    node = scan(graph, H, H, X, length=5, carries=2, sequences=1)
    before = graph_of(get(node, 2))
    assert checked(before, Control()) == before


def test_operands_that_nobody_reads_or_given_twice_go(checked: Any) -> None:
    h, x, y, z, v, w, u = body(*[(3,)] * 7)
    graph = Graph((h, x, y, z, v, w, u), (make("add", h, make("mul", x, z)), make("mul", make("add", v, h), w)))
    node = scan(graph, H, X, X, make("neg", X), W, W, H, length=5, carries=1, sequences=3)
    (loop,) = loops(checked(graph_of(*outputs(node)), Control()))
    assert [*loop.inputs] == [H, X, make("neg", X), W]
    assert loop.attrs["sequences"] == 2


def test_a_carry_that_never_changes_is_an_invariant(checked: Any) -> None:
    a, h, x = body((3,), (3,), (3,))
    graph = Graph((a, h, x), (a, make("tanh", make("add", make("mul", h, a), x)), a))
    node = scan(graph, W, H, X, length=5, carries=2, sequences=1)
    after = checked(graph_of(*outputs(node)), Control())
    (loop,) = loops(after)
    assert loop.attrs["carries"] == 1 and after.outputs[0] is W
    assert len(loop.attrs["body"].outputs) == 1, "the stack of it is a broadcast"


def test_stacks_of_what_came_in_are_what_came_in(checked: Any) -> None:
    h, x, w = body((3,), (3,), (3,))
    new = make("add", h, make("mul", x, w))
    graph = Graph((h, x, w), (new, x, make("exp", w), new, new))
    after = checked(graph_of(*outputs(scan(graph, H, X, W, length=5, carries=1, sequences=1))), Control())
    (loop,) = loops(after)
    assert after.outputs[1] is X and after.outputs[3] is after.outputs[4]
    assert after.outputs[2].op.name == "broadcast_to"
    assert len(loop.attrs["body"].outputs) == 2


def test_constants_move_into_bodies(checked: Any) -> None:
    h, x, w = body((3,), (3,), (3,))
    graph = Graph((h, x, w), (make("add", make("mul", h, w), x),))
    ones = full(2.0, tensor("f32", (5, 3)))
    node = scan(graph, H, ones, full(0.5, tensor("f32", (3,))), length=5, carries=1, sequences=1)
    (loop,) = loops(checked(graph_of(*outputs(node)), Control()))
    assert len(loop.inputs) == 1


@pytest.mark.parametrize("steps", [0, 1])
def test_loops_of_no_step_and_of_one_are_no_loops(steps: int, checked: Any) -> None:
    h, x = body((3,), (3,))
    graph = Graph((h, x), (make("tanh", make("add", h, x)), make("mul", h, x)))
    node = scan(graph, H, f32("y", steps, 3), length=steps, carries=1, sequences=1)
    assert not loops(checked(graph_of(*outputs(node)), Control()))


def test_a_known_predicate_takes_its_branch(checked: Any) -> None:
    (p,) = body((3,))
    node = make("cond", constant(True), H, then=Graph((p,), (make("sin", p),)), orelse=Graph((p,), (make("cos", p),)))
    assert checked(graph_of(*outputs(node)), Control()).outputs == (make("sin", H),)


def test_branches_and_while_loops_lose_what_is_superfluous(checked: Any) -> None:
    x, y, z = body((3,), (3,), (3,))
    then, orelse = Graph((x, y, z), (make("sin", x), make("exp", z))), Graph((x, y, z), (make("cos", y), make("neg", z)))
    node = make("cond", f32("pred", dtype="bool"), H, W, f32("v", 3), then=then, orelse=orelse)
    (branch,) = loops(checked(graph_of(get(node, 0)), Control()))
    assert len(branch.inputs) == 3 and len(branch.attrs["then"].outputs) == 1
    n, h, w = body((), (3,), (3,))
    test = Graph((n, h, w), (make("less", n, constant(4.0, "f32")),))
    step = Graph((n, h, w), (make("add", n, constant(1.0, "f32")), make("tanh", h)))
    node = make("while_loop", f32("n"), H, W, test=test, body=step, carries=2)
    (until,) = loops(checked(graph_of(get(node, 0)), Control()))
    assert until.attrs["carries"] == 1 and len(until.inputs) == 1


def test_loops_with_the_same_updates_merge(checked: Any) -> None:
    h, x, w = body((3,), (3,), (3,))
    new = make("tanh", make("add", make("mul", h, w), x))
    first = scan(Graph((h, x, w), (new, make("neg", new))), H, X, W, length=5, carries=1, sequences=1)
    second = scan(Graph((h, x, w), (new, h, make("neg", new))), H, X, W, length=5, carries=1, sequences=1)
    other = scan(Graph((h, x, w), (make("sin", new), h)), H, X, W, length=5, carries=1, sequences=1)
    after = checked(graph_of(*outputs(first), *outputs(second), *outputs(other)), Control())
    assert len(loops(after)) == 2
    assert after.outputs[0] is after.outputs[2] and after.outputs[1] is after.outputs[4]


def test_loops_in_bodies_are_tidied_after_those_around_them(checked: Any) -> None:
    """A result of the inner loop has a user until the outer one drops the result that used it."""
    c, row = body((), (3,))
    ic, ix = body((), ())
    inner = scan(Graph((ic, ix), (make("mul", ic, ix), make("sin", ix))), c, row, length=3, carries=1, sequences=1)
    outer = scan(Graph((c, row), (get(inner, 0), get(inner, 1))), f32("c"), X, length=5, carries=1, sequences=1)
    after = checked(graph_of(get(outer, 0)), Control())
    found = loops(after)
    assert len(found) == 2 and all(len(n.attrs["body"].outputs) == 1 for n in found)


def test_what_gradients_need_is_added_to_the_forward_loop(checked: Any) -> None:
    h, x, w = body((2, 3), (2, 3), (3, 3))
    graph = Graph((h, x, w), (make("tanh", make("add", make("matmul", h, w), x)),))
    a, b, v = f32("a", 2, 3), f32("b", 6, 2, 3), f32("v", 3, 3)
    node = scan(graph, a, b, v, length=6, carries=1, sequences=1)
    loss = make("sum", make("mul", get(node, 0), get(node, 0)), axes=(0, 1), keepdims=False)
    whole = Graph((a, b, v), (loss, get(make("gradient", loss, v), 0)))
    after = checked(whole, Gradient(), Control())
    forward, backward = sorted(loops(after), key=lambda n: n.attrs["reverse"])
    assert backward.attrs["reverse"] and len(forward.attrs["body"].outputs) == 3, "h', what it started from, and tanh is h'"


# The machinery


def test_a_rule_that_makes_nothing_smaller_is_refused(monkeypatch: Any) -> None:
    """Otherwise the pass would not come to an end."""

    def again(node: Node, used: frozenset[int], facts: Any) -> Any:
        """The same, with another attribute."""
        return [get(node.replace(save="inputs" if node.attrs["save"] == "costly" else "costly"), 0)]

    monkeypatch.setattr(control, "RULES", (again,))
    h, x = body((3,), (3,))
    node = scan(Graph((h, x), (make("add", h, x),)), H, X, length=5, carries=1, sequences=1)
    with pytest.raises(RewriteError, match="no smaller"):
        Control().run(graph_of(*outputs(node)), Context())


def with_noise() -> Graph:
    """-(-x) in a body of a body."""
    c, row = body((), (3,))
    ic, ix = body((), ())
    twice = make("neg", make("neg", ix))
    inner = scan(
        Graph((ic, ix), (make("add", ic, twice),), labels={twice: Label(None, Location("model.py", 5, "t = -(-x)"))}),
        c, row, length=3, carries=1, sequences=1,
    )  # fmt: skip
    outer = scan(Graph((c, row), (make("sin", get(inner, 0)),)), f32("c"), X, length=5, carries=1, sequences=1)
    return graph_of(make("neg", make("neg", make("exp", get(outer, 0)))))


def test_passes_run_on_bodies_innermost_first_and_take_fuel(checked: Any) -> None:
    graph = with_noise()
    ctx = Context()
    after = run_pipeline(graph, [Simplify()], ctx, Hooks(validate=Validator()))
    assert sum(1 for g in all_graphs(after) for n in g.nodes() if n.op.name == "neg") == 0
    assert ctx.results[0].nodes_before - ctx.results[0].nodes_after == 4
    one = Simplify().apply(graph, ctx.fresh(fuel=1))
    left = [sum(1 for n in g.nodes() if n.op.name == "neg") for g in all_graphs(one)]
    assert left == [2, 0, 0], "the innermost body was first"
    assert Simplify().apply(after, ctx.fresh()) is after


def test_a_bad_rule_in_a_body_is_blamed_with_its_line(monkeypatch: Any, tmp_path: Any) -> None:
    @rule_on("neg")
    def negated_twice(node: Node, facts: Any) -> Any:
        """-(-x) -> |x|: wrong for negative x."""
        inner = node.inputs[0]
        return make("abs", inner.inputs[0]) if facts.form(inner) == "neg" else control.Miss("not twice", node)

    monkeypatch.setattr(simplify, "RULES", (negated_twice,))
    graph = with_noise()
    only_inside = Graph(graph.inputs, (graph.outputs[0].inputs[0].inputs[0],))
    with pytest.raises(ValidationError) as e:
        run_pipeline(only_inside, [Simplify()], Context(), Hooks(validate=Validator(folder=tmp_path)))
    assert e.value.rule == "negated_twice"
    assert "model.py:5" in str(e.value)
    small = Graph.parse(e.value.repro.read_text())
    assert not loops(small) and sum(1 for n in small.nodes() if n.inputs) == 2, "the body alone, cut to the two nodes"


def test_dumps_and_properties_see_bodies(tmp_path: Any) -> None:
    graph = with_noise()
    run_pipeline(graph, [Simplify()], Context(), Hooks(dump=tmp_path))
    assert "neg" in (tmp_path / "000_graph.txt").read_text() and "neg" not in (tmp_path / "001_simplify.txt").read_text()
    (p,) = body((3,))
    soft = scan(Graph((p,), (make("mean", p, axes=(0,), keepdims=False),)), X, length=5, carries=0, sequences=1)
    assert "decomposed" not in properties(graph_of(*outputs(soft)), Context().facts)


def test_reduce_enters_bodies() -> None:
    def has_sine(graph: Graph) -> bool:
        return any(n.op.name == "sin" for g in all_graphs(graph) for n in g.nodes())

    small = reduce(with_noise(), has_sine)
    assert not loops(small) and sum(1 for n in small.nodes() if n.inputs) == 1


def test_a_while_loop_that_does_not_end_on_the_inputs_drawn_says_nothing(checked: Any) -> None:
    n, step = body((), ())
    test = Graph((n, step), (make("less", n, constant(100.0, "f32")),))
    more = Graph((n, step), (make("neg", make("neg", make("add", n, make("mul", step, constant(1e-9, "f32"))))),))
    node = make("while_loop", f32("n"), f32("step"), test=test, body=more, carries=1)
    after = checked(graph_of(*outputs(node)), Simplify())
    assert sum(1 for g in all_graphs(after) for n in g.nodes() if n.op.name == "neg") == 0


def test_elements_of_a_loop_count_as_often_as_it_runs() -> None:
    (p,) = body((100,))
    x = f32("x", 1000, 100)
    node = scan(Graph((p,), (make("neg", make("neg", p)),)), x, length=1000, carries=0, sequences=1)
    graph = graph_of(*outputs(node))
    assert sum(runs for n, runs in nodes_with_runs(graph) if n.op.name == "neg") == 2000
    with pytest.warns(ValidationSkipped, match="elements"):
        run_pipeline(graph, [Simplify()], Context(), Hooks(validate=Validator(max_elements=100_000)))


def test_gradients_inside_bodies_are_expanded_and_checked(checked: Any) -> None:
    """A step of gradient descent in a loop: the body asks for a gradient, and the result is differentiated again."""
    w, x = body((3,), (3,))
    loss = make("sum", make("mul", make("sin", make("mul", w, x)), w), axes=(0,), keepdims=False)
    step = make("sub", w, make("mul", get(make("gradient", loss, w), 0), full(0.1, w.tensor)))
    last = get(scan(Graph((w, x), (step,)), H, X, length=5, carries=1, sequences=1), 0)
    total = make("sum", last, axes=(0,), keepdims=False)
    graph = Graph((H, X), (last, get(make("gradient", total, H), 0)))
    after = checked(graph, Gradient(), Control())
    verify(after)
    arrays = [RNG.normal(size=3), RNG.normal(size=(5, 3))]

    def descend(h: Any) -> Any:
        for x in arrays[1]:
            h = h - float(np.float32(0.1)) * (np.sin(h * x) + h * x * np.cos(h * x))
        return h

    values = run(after, arrays, tensor("f64", ()).dtype)
    np.testing.assert_allclose(values[0], descend(arrays[0]), rtol=1e-12)
    for k in range(3):
        e = np.eye(3)[k] * 1e-6
        central = (descend(arrays[0] + e) - descend(arrays[0] - e)).sum() / 2e-6
        assert abs(values[1][k] - central) < 1e-8


def test_invariants_by_form() -> None:
    h, x, w = body((3,), (3,), (3,))
    graph = Graph((h, x, w), (make("add", make("mul", h, x), w),))
    node = scan(graph, H, X, W, length=5, carries=1, sequences=1)
    assert invariants(node, graph) == {w}


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_with_loops(seed: int, checked: Any) -> None:
    graph, _ = random_graph(np.random.default_rng(seed), nodes=16, loops=True)
    checked(graph, *pipeline.inference())


@pytest.mark.parametrize("seed", range(100, 108))
def test_random_gradients_through_loops(seed: int, checked: Any) -> None:
    graph, _ = random_graph(np.random.default_rng(seed), nodes=14, loops=True)
    parts = [make("sum", o, axes=tuple(range(len(o.shape))), keepdims=False) if o.shape else o for o in graph.outputs]
    total = parts[0]
    for p in parts[1:]:
        total = make("add", total, p)
    xs = [i for i in graph.inputs if i.dtype.is_float]
    g = make("gradient", total, *xs)
    checked(Graph(graph.inputs, (*graph.outputs, *(get(g, k) for k in range(len(xs))))), *pipeline.training())
