"""Reverse-mode differentiation: each `gradient(y, x1, ..., xn)` node becomes the nodes that compute dy/dx1, ..., dy/dxn, by the
reverse walk of `ir/differentiate.py`. Inner gradients are expanded first, and those in bodies of loops before those around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.build import constant, full
from ..ir.differentiate import vjp
from ..ir.errors import GradientError
from ..ir.graph import Graph, Label, Node, postorder
from ..ir.ops.structural import GET
from .contract import Context, Pass
from .labels import finish


@dataclass(frozen=True)
class Gradient(Pass):
    """Expands every `gradient` node; one unit of fuel for each."""

    kind: ClassVar[str] = "derivative"
    ensures: ClassVar[frozenset[str]] = frozenset({"no_gradient"})
    keeps: ClassVar[frozenset[str]] = frozenset({"no_marks"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """Raises GradientError, with the node, its op and its line, where a gradient is asked for through an op that has none."""
        facts = ctx.facts
        if not any(facts.kind(n) == "other" for n in postorder(graph.outputs)):
            return graph
        done: dict[Node, Node] = {i: i for i in graph.inputs}
        parts: dict[Node, tuple[Node, ...]] = {}
        labels = dict(graph.labels)
        for node in postorder(graph.outputs):
            if node in done:
                continue
            if node.op is GET and node.inputs[0] in parts:
                done[node] = new = parts[node.inputs[0]][node.attrs["index"]]
            else:
                new = node.replace(tuple(done[i] for i in node.inputs))
                if facts.kind(node) == "other" and ctx.spend("gradient", node):
                    parts[node] = expand(new, labels)
                done[node] = new
            if node in graph.labels:
                labels.setdefault(new, graph.labels[node])
        return finish(graph, [done[o] for o in graph.outputs], labels)


def expand(node: Node, labels: dict[Node, Label] | None = None) -> tuple[Node, ...]:
    """The gradients that a `gradient` node stands for, zeros for an x that y does not depend on. Raises GradientError."""
    y, xs = node.inputs[0], node.inputs[1:]
    if y.shape != () or not y.dtype.is_float:
        raise GradientError(f"a gradient is taken of a floating-point scalar, not of {y.type}; sum or average it first")
    found = vjp([y], xs, [constant(1.0, y.dtype)], labels)
    return tuple(full(0, x.tensor) if dx is None else dx for x, dx in zip(xs, found, strict=True))
