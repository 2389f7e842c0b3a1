"""Removes the identities that only differentiation needs: marks (what `grad` differentiates by) and stop_gradient.

    mark(x) = x        stop_gradient(x) = x

Barriers stay: they keep a recomputed value apart from the one that it recomputes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.graph import Graph, Node
from ..ir.op import Trait
from .contract import Context, Pass
from .facts import Facts
from .rewrite import Miss, Outcome, apply_rules, rule


@rule
def drop_mark(node: Node, facts: Facts) -> Outcome:
    """mark(x) -> x, for every op whose value is its operand and that is no barrier."""
    return node.inputs[0] if facts.is_marker(node) else Miss("not an identity that gradients alone need", node)


@dataclass(frozen=True)
class DropMarks(Pass):
    """Removes marks once no gradient is left to take."""

    kind: ClassVar[str] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset({"no_gradient"})
    ensures: ClassVar[frozenset[str]] = frozenset({"no_marks"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph without marks."""
        if not any(op.has(Trait.BARRIER) for op in graph.ops):
            return graph
        return apply_rules(graph, [drop_mark], ctx)
