"""Cheaper ops for dear ones, where the result is as good: rounding may differ in the last place.

    x ** n -> x * ... * x for n = 2, 3, 4    x ** -1 -> 1 / x    x / c -> x * (1 / c) for a constant c

Each rule removes a power or a division, and none makes one out of less: the number of powers, then of divisions, shrinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..ir.build import full
from ..ir.dtypes import f32, f64
from ..ir.graph import Graph, Node
from ..ir.op import make
from .contract import Context, Pass
from .facts import Facts
from .rewrite import Miss, Outcome, apply_rules, rule_on


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


def _fewer(before: Node, after: Node, facts: Facts) -> bool:
    def rank(node: Node) -> int:
        return {"pow": 2, "div": 1}.get(facts.form(node), 0)

    return rank(after) < rank(before)


@dataclass(frozen=True)
class Strength(Pass):
    """Multiplications for powers and for divisions by constants."""

    kind: ClassVar[str] = "equivalent"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with cheaper ops."""
        return apply_rules(graph, (small_power, divide_by_constant), ctx, _fewer)
