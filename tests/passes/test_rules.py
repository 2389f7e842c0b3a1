"""Each rewrite rule: where it applies it keeps every bit, and every rule does apply somewhere; a miss says why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tensorwright.ir.build import constant, full, input_node
from tensorwright.ir.graph import Graph
from tensorwright.ir.interp import run
from tensorwright.ir.op import make
from tensorwright.ir.types import tensor
from tensorwright.passes import algebra, movement, strength
from tensorwright.passes.contract import Context
from tensorwright.passes.oracle import DRAWS, draw, exact_difference
from tensorwright.passes.rewrite import Miss, RewriteError, Rewriter, apply_rules, rule, smaller
from tensorwright.passes.simplify import RULES
from tensorwright.passes.strength import Strength

F = tensor("f32", (3, 4))
I = tensor("i32", (3, 4))
B = tensor("bool", (3, 4))


def c(value, type=F):
    return full(value, type)


def to(x, dtype):
    return make("cast", x, dtype=tensor(dtype, ()).dtype)


# rule -> functions of float x, y, int i, bool b, vector v that it rewrites
CASES = {
    "add_zero": [lambda s: make("add", s.x, c(-0.0)), lambda s: make("add", s.i, c(0, I))],
    "subtract_zero": [lambda s: make("sub", s.x, c(0.0)), lambda s: make("sub", s.i, c(0, I))],
    "times_one": [lambda s: make("mul", s.x, c(1.0)), lambda s: make("div", s.x, c(1.0)), lambda s: make("mul", s.i, c(1, I))],
    "times_minus_one": [lambda s: make("mul", s.x, c(-1.0)), lambda s: make("div", s.x, c(-1.0))],
    "divide_by_power_of_two": [
        lambda s: make("div", s.x, c(8.0)),
        lambda s: make("div", s.x, c(-0.25)),
        lambda s: make("div", s.x, c(2.0**100)),
    ],
    "same_twice": [lambda s: make("maximum", s.x, s.x), lambda s: make("minimum", s.x, s.x), lambda s: make("and", s.b, s.b)],
    "double_negation": [lambda s: make("neg", make("neg", s.x)), lambda s: make("not", make("not", s.b))],
    "idempotent": [lambda s: make("abs", make("abs", s.x)), lambda s: make("floor", make("floor", s.x))],
    "add_negated": [
        lambda s: make("add", s.x, make("neg", s.y)),
        lambda s: make("add", make("neg", s.x), s.y),
        lambda s: make("sub", s.x, make("neg", s.y)),
    ],
    "times_negated": [
        lambda s: make("mul", make("neg", s.x), make("neg", s.y)),
        lambda s: make("div", make("neg", s.x), make("neg", s.y)),
        lambda s: make("mul", make("neg", s.x), c(3.0)),
    ],
    "select_known": [
        lambda s: make("where", s.b, s.x, s.x),
        lambda s: make("where", c(True, B), s.x, s.y),
        lambda s: make("where", c(False, B), s.x, s.y),
    ],
    "logic_with_constant": [lambda s: make("and", s.b, c(True, B)), lambda s: make("or", s.b, c(True, B))],
    "cast_to_itself": [lambda s: to(s.x, "f32")],
    "cast_of_cast": [
        lambda s: to(to(s.x, "f64"), "f32"),
        lambda s: to(to(s.i, "i64"), "i32"),
        lambda s: to(to(s.b, "f32"), "i32"),
        lambda s: to(to(to(s.i, "i16"), "f32"), "f64"),
    ],
    "constants_right": [lambda s: make("add", c(2.0), s.x), lambda s: make("mul", c(3.0), s.x)],
    "fold_constants": [
        lambda s: make("add", s.x, make("exp", c(2.0))),
        lambda s: make("mul", s.x, make("add", constant(np.ones((3, 4), "f4")), c(0.5))),
        lambda s: make(
            "add",
            s.x,
            make("broadcast_to", make("sum", constant(np.arange(4, dtype="f4")), axes=(0,), keepdims=False), shape=(3, 4)),
        ),
    ],
    "movement_of_scalar": [lambda s: make("add", make("transpose", c(2.0, tensor("f32", (4, 3))), perm=(1, 0)), s.x)],
    "no_movement": [
        lambda s: make("transpose", s.x, perm=(0, 1)),
        lambda s: make("slice", s.x, starts=(0, 0), stops=(3, 4), steps=(1, 1)),
        lambda s: make("transpose", make("reshape", make("exp", s.x), shape=(12, 1)), perm=(1, 0)),
    ],
    "movement_of_movement": [
        lambda s: make("transpose", make("transpose", s.x, perm=(1, 0)), perm=(1, 0)),
        lambda s: make(
            "slice", make("slice", s.x, starts=(1, 0), stops=(3, 4), steps=(1, 2)), starts=(0, 1), stops=(2, 2), steps=(1, 1)
        ),
        lambda s: make(
            "transpose",
            make("slice", make("transpose", s.x, perm=(1, 0)), starts=(1, 0), stops=(4, 3), steps=(1, 1)),
            perm=(1, 0),
        ),
        lambda s: make("broadcast_to", make("broadcast_to", s.v, shape=(3, 4)), shape=(2, 3, 4)),
        lambda s: make(
            "transpose", make("broadcast_to", make("reshape", s.v, shape=(4, 1, 1)), shape=(2, 4, 3, 3)), perm=(0, 2, 3, 1)
        ),
    ],
    "reshape_of_reshape": [
        lambda s: make("reshape", make("reshape", s.x, shape=(12,)), shape=(4, 3)),
        lambda s: make("reshape", make("reshape", s.x, shape=(12,)), shape=(3, 4)),
    ],
    "broadcast_last": [
        lambda s: make("exp", make("broadcast_to", s.v, shape=(3, 4))),
        lambda s: make(
            "mul", make("broadcast_to", s.v, shape=(3, 4)), make("add", make("broadcast_to", s.v, shape=(3, 4)), c(2.0))
        ),
    ],
    "reshape_last": [lambda s: make("add", make("reshape", make("exp", s.x), shape=(2, 6)), c(2.0, tensor("f32", (2, 6))))],
    "reduce_single": [lambda s: make("max", make("reshape", s.x, shape=(3, 1, 4)), axes=(1,), keepdims=False)],
}


class Operands:
    """Operands for one case: inputs, or random subgraphs of them."""

    def __init__(self, deep: bool) -> None:
        names = {"x": F, "y": F, "i": I, "b": B, "v": tensor("f32", (4,))}
        self.inputs = tuple(input_node(k, t) for k, t in names.items())
        x, y, i, b, v = self.inputs
        if deep:
            x, y = make("mul", x, make("tanh", y)), make("sub", y, make("broadcast_to", v, shape=(3, 4)))
            i, b = make("add", i, make("mul", i, i)), make("or", b, make("less", x, y))
            v = make("sum", x, axes=(0,), keepdims=False)
        self.x, self.y, self.i, self.b, self.v = x, y, i, b, v


def test_every_rule_has_a_case():
    assert set(CASES) == {r.name for r in RULES}
    assert all(r.doc and len(r.doc) > 10 for r in RULES)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("name", "case"), [(n, k) for n in CASES for k in range(len(CASES[n]))])
def test_rule(name, case, deep):
    operands = Operands(deep)
    node = CASES[name][case](operands)
    graph = Graph(operands.inputs, (node, make("neg", to(node, "f64"))))
    ctx = Context()
    after = apply_rules(graph, RULES, ctx)
    assert name in {a.rule for a in ctx.log}, f"{name} did not apply; applied: {[a.rule for a in ctx.log]}"
    assert after is not graph
    for kind in DRAWS:
        for seed in range(3):
            arrays = draw(graph, kind, seed)
            assert exact_difference(run(graph, arrays), run(after, arrays)) is None
    again = Context()
    assert apply_rules(after, RULES, again) is after, "a normal form is a fixed point, and says so by identity"
    assert not again.log


NOT_REWRITTEN = {
    "x + 0.0": lambda s: make("add", s.x, c(0.0)),
    "x - (-0.0)": lambda s: make("sub", s.x, c(-0.0)),
    "x * 0": lambda s: make("mul", s.x, c(0.0)),
    "x - x": lambda s: make("sub", s.x, s.x),
    "x / x": lambda s: make("div", s.x, s.x),
    "x / 3": lambda s: make("div", s.x, c(3.0)),
    "x / 2**127": lambda s: make("div", s.x, c(2.0**127)),
    "-(x - y)": lambda s: make("neg", make("sub", s.x, s.y)),
    "cast to a narrower type and back": lambda s: to(to(s.x, "f16"), "f32"),
    "int to float and back": lambda s: to(to(s.i, "f32"), "i32"),
    "signed to unsigned and on": lambda s: to(to(s.i, "u32"), "i64"),
    "where of a comparison": lambda s: make("where", s.b, s.x, s.y),
    "sum over one element": lambda s: make("sum", make("reshape", s.x, shape=(3, 1, 4)), axes=(1,), keepdims=False),
    "a barrier": lambda s: make("recompute", s.x, id=1),
}


@pytest.mark.parametrize("name", NOT_REWRITTEN)
def test_what_is_not_exact_stays(name):
    operands = Operands(False)
    graph = Graph(operands.inputs, (NOT_REWRITTEN[name](operands),))
    assert apply_rules(graph, RULES, Context()) is graph


def test_a_miss_says_why():
    x = input_node("x", F)
    ctx = Context(misses=[])
    apply_rules(Graph((x,), (make("add", x, c(0.0)),)), algebra.RULES, ctx)
    assert any(m.rule == "add_zero" and "neutral zero" in m.reason and m.node is c(0.0) for m in ctx.misses)


def test_strength():
    x = input_node("x", F)
    for exponent in (2.0, 3.0, 4.0, -1.0):
        graph = Graph((x,), (make("pow", x, c(exponent)),))
        after = apply_rules(graph, (strength.small_power,), Context(), strength._fewer)
        arrays = draw(graph, "positive", 0)
        np.testing.assert_allclose(run(after, arrays)[0], run(graph, arrays)[0], rtol=3e-7)  # one rounding per multiplication
        assert "pow" not in str(after)
    graph = Graph((x,), (make("pow", x, c(2.5)),))
    assert apply_rules(graph, (strength.small_power,), Context(), strength._fewer) is graph


def scaled_softmax(x, scale, again=False):
    y = make("mul", x, c(scale))
    top = make("broadcast_to", make("max", y, axes=(1,), keepdims=True), shape=x.shape)
    e = make("exp", make("sub", y, top))
    return Graph((x,), (e, y) if again else (e,))


def test_the_scale_of_an_exponent_follows_its_maximum():
    x = input_node("x", F)
    graph = scaled_softmax(x, 0.3)
    after = Strength().run(graph, Context())
    (product,) = after.outputs[0].inputs
    assert (product.op.name, product.inputs[0].op.name) == ("mul", "sub") and product.inputs[0].inputs[0] is x
    a = draw(graph, "normal", 0)[0]
    a[0, 0], a[1, :], a[2, 1] = np.nan, -np.inf, np.inf
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(run(after, [a])[0], run(graph, [a])[0], rtol=1e-5)
    for other in (scaled_softmax(x, -0.3), scaled_softmax(x, 2.0**70), scaled_softmax(x, 0.3, again=True)):
        assert Strength().run(other, Context()) is other


def test_a_rule_that_grows_terms_is_refused():
    @rule
    def grow(node, facts):
        """x + y -> x + (y + -0.0): never ends."""
        return make("add", node.inputs[0], make("add", node.inputs[1], c(-0.0))) if len(node.inputs) == 2 else Miss("leaf", node)

    x, y = input_node("x", F), input_node("y", F)
    with pytest.raises(RewriteError, match=r"grow.*not smaller in the order"):
        apply_rules(Graph((x, y), (make("add", x, y),)), [grow], Context())


def test_two_rules_that_undo_each_other_are_refused():
    @rule
    def to_sub(node, facts):
        """x + y -> x - (-y)."""
        return make("sub", node.inputs[0], make("neg", node.inputs[1])) if node.op.name == "add" else Miss("no", node)

    x, y = input_node("x", F), input_node("y", F)
    with pytest.raises(RewriteError):
        apply_rules(Graph((x, y), (make("add", x, y),)), [to_sub, *algebra.RULES], Context())


def test_a_rule_that_changes_the_type_is_refused():
    @rule
    def wrong(node, facts):
        """exp(x) -> sum(x): not of the same type."""
        return make("sum", node.inputs[0], axes=(0,), keepdims=False) if node.op.name == "exp" else Miss("no", node)

    x = input_node("x", F)
    with pytest.raises(RewriteError, match="changed the type"):
        apply_rules(Graph((x,), (make("exp", x),)), [wrong], Context())


def test_rules_need_their_algebra():
    with pytest.raises(Exception, match="docstring"):
        rule(lambda node, facts: node)


def test_fuel_stops_rewriting_and_logs():
    x = input_node("x", F)
    y = x
    for k in range(5):
        y = make("exp", make("mul", y, c(1.0))) if k % 2 else make("sin", make("sub", y, c(0.0)))
    graph = Graph((x,), (y,))
    sizes = []
    for fuel in range(7):
        ctx = Context(fuel=fuel)
        after = apply_rules(graph, RULES, ctx)
        assert len(ctx.log) == min(fuel, 5)
        sizes.append(len(after.nodes()))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_order_is_a_strict_order():
    x = input_node("x", F)
    facts = Context().facts
    a, b = make("mul", x, c(2.0)), make("exp", make("mul", x, c(2.0)))
    assert smaller(b, a, facts) and not smaller(a, b, facts)


def test_ten_thousand_nodes_take_work_in_proportion():
    """Counted in tries of a rule, which a busy machine does not change."""
    x = input_node("x", tensor("f32", (4,)))
    one, zero = c(1.0, x.tensor), c(0.0, x.tensor)

    def chain(n):
        y = x
        for k in range(n // 4):
            y = (
                make("sin", make("sub", make("mul", y, one), zero))
                if k % 2
                else make("neg", make("neg", make("exp", make("add", y, x))))
            )
        return Graph((x,), (y,))

    tries = []
    for n in (2_500, 10_000):
        graph, ctx, count = chain(n), Context(), 0

        def counted(apply):
            def tried(*args):
                nonlocal count
                count += 1
                return apply(*args)

            return tried

        after = Rewriter([replace(r, apply=counted(r.apply)) for r in RULES], ctx).run(graph)
        tries.append(count)
        assert len(after.nodes()) < len(graph.nodes()) and ctx.log
    assert tries[1] < 4.5 * tries[0], "four times the nodes took far more than four times as many tries"


def test_deep_graphs_do_not_recurse():
    x = input_node("x", tensor("f32", ()))
    y = x
    for _ in range(5_000):
        y = make("neg", make("exp", y))
    graph = Graph((x,), (make("mul", y, constant(1.0, "f32")),))
    after = apply_rules(graph, movement.RULES + algebra.RULES, Context())
    assert after.outputs == (y,)
