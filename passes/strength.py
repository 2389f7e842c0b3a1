"""Cheaper ops for dear ones, where the result is as good: rounding may differ in the last place.

    x ** n -> x * ... * x for n = 2, 3, 4    x ** -1 -> 1 / x    x / c -> x * (1 / c) for a constant c
    exp(c x - max(c x)) -> exp(c (x - max(x))) for a constant c > 0: the exponential's own code multiplies by log2(e) c

Each rule removes a power or a division, or takes a scale out of an exponent's difference, and none does the opposite: the number
of powers, of divisions, then of such differences shrinks.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from ..ir.build import full
from ..ir.dtypes import f32, f64
from ..ir.graph import Graph, Node
from ..ir.lowering import Reduce
from ..ir.op import make
from .contract import Context, Pass
from .facts import Facts
from .rewrite import Miss, Outcome, Rule, apply_rules, rule_on, use_counts


@rule_on("pow")
def small_power(node: Node, facts: Facts) -> Outcome:
    """x ** 2 -> x * x    x ** 3 -> (x * x) * x    x ** 4 -> (x * x) * (x * x)    x ** -1 -> 1 / x."""
    if facts.form(node) != "pow" or not node.dtype.is_float:
        return Miss("not a power of floats", node)
    x, n = node.inputs[0], facts.value(node.inputs[1])
    if n == -1:
        return make("div", full(1.0, node.tensor), x)
    if n not in (2, 3, 4):
        return Miss("the exponent is no small integer constant", node.inputs[1])
    square = make("mul", x, x)
    return square if n == 2 else make("mul", square, x if n == 3 else square)


@rule_on("div")
def divide_by_constant(node: Node, facts: Facts) -> Outcome:
    """x / c -> x * (1 / c) where both c and 1 / c are far from overflow and underflow."""
    if facts.form(node) != "div" or node.dtype not in (f32, f64):
        return Miss("not a division of f32 or f64", node)
    c = facts.value(node.inputs[1])
    if c is None or not 2.0**-60 < abs(c) < 2.0**60 or not math.isfinite(c):
        return Miss("the divisor is no constant of moderate size", node.inputs[1])
    return make("mul", node.inputs[0], full(1.0 / c, node.tensor))


def scale_after_maximum(uses: Counter[Node]) -> Rule:
    """The rule for a softmax of scaled scores, whose product then has no scale to apply; `uses` from `use_counts`."""

    @rule_on("exp")
    def rule(node: Node, facts: Facts) -> Outcome:
        """exp(c x - max(c x)) -> exp(c (x - max(x))) for a constant c > 0 of moderate size, where nothing else uses c x."""
        difference = node.inputs[0]
        if facts.form(difference) != "sub" or node.dtype not in (f32, f64):
            return Miss("not the exponential of a difference", difference)
        scaled, top = difference.inputs
        c = facts.value(scaled.inputs[1]) if facts.form(scaled) == "mul" else None
        if c is None or not 2.0**-60 < c < 2.0**60:
            return Miss("no scale by a positive constant of moderate size", scaled)
        path: list[tuple[Node, int]] = []
        while (read := facts.read(top)) is not None:
            path.append((top, read.operand))
            top = top.inputs[read.operand]
        low = facts.lowering(top) if top.inputs else None
        if not isinstance(low, Reduce) or low.kind != "max" or top.inputs != (scaled,):
            return Miss("what is subtracted is not the maximum of the same values", top)
        if uses[scaled] != 2 or any(uses[n] != 1 for n in (difference, top, *(n for n, _ in path))):
            return Miss("the scaled values or their maximum are needed elsewhere", scaled)
        x = scaled.inputs[0]
        new = top.replace((x,))
        for n, k in reversed(path):
            new = n.replace((*n.inputs[:k], new, *n.inputs[k + 1 :]))
        return node.replace((make("mul", make("sub", x, new), scaled.inputs[1]),))

    return rule


def _fewer(before: Node, after: Node, facts: Facts) -> bool:
    def rank(node: Node) -> int:
        if facts.form(node) == "exp":
            return 1 if facts.form(node.inputs[0]) == "sub" else 0
        return {"pow": 3, "div": 2}.get(facts.form(node), 0)

    return rank(after) < rank(before)


@dataclass(frozen=True)
class Strength(Pass):
    """Multiplications for powers and for divisions by constants."""

    kind: ClassVar[str] = "equivalent"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with cheaper ops."""
        uses = use_counts(graph)
        return apply_rules(graph, (small_power, divide_by_constant, scale_after_maximum(uses)), ctx, _fewer, uses)
