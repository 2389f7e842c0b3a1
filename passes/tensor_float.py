"""Contractions of tf32 numbers: f32 with 10 bits of fraction, which tensor cores multiply and add up in f32.

    contract(a, b) -> contract_tf32(round_tf32(a), round_tf32(b))

What is rounded is a node of its own: weights are rounded once, a value that several contractions read once a run, and rounding
ends a kernel that computes an operand. Tensor cores would drop the bits themselves, which errs twice as much and always towards
zero. Everything but the operands of contractions stays in f32, exponents and sums included: nothing overflows that did not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.dtypes import f32
from ..ir.graph import Graph, Node
from ..ir.lowering import Contract
from ..ir.op import Trait, make
from .bodies import map_bodies
from .contract import Context, Pass
from .facts import Facts
from .labels import finish


@dataclass(frozen=True)
class TensorFloat(Pass):
    """Rounds the operands of f32 contractions to tf32."""

    kind: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"contract_form"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with contractions of tf32; counts them in `ctx.notes`."""
        result, count = _rounded(graph, ctx, "contract_tf32")
        ctx.notes[self.name] = int(str(ctx.notes.get(self.name, 0))) + count
        return result

    def reference(self, graph: Graph, ctx: Context) -> Graph:
        """The same numbers in f32 contractions, bodies of loops included."""
        graph = map_bodies(graph, lambda body, _: self.reference(body, ctx))
        return _rounded(graph, ctx, "contract")[0]


def _rounded(graph: Graph, ctx: Context, op: str) -> tuple[Graph, int]:
    """The graph with operands rounded and contractions of the op of that name, and how many."""
    done: dict[Node, Node] = {}
    count = 0

    def near(x: Node) -> Node:
        if x not in done:
            done[x] = make("round_tf32", x)
        return done[x]

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        nonlocal count
        if not _chosen(node, ctx.facts) or not ctx.spend("tensor_float", node):
            return node.replace(inputs)
        count += 1
        return make(op, *map(near, inputs), spec=node.attrs["spec"])

    made = graph.map_nodes(rule)
    return (finish(graph, made.outputs, dict(made.labels)), count) if count else (graph, 0)


def _chosen(node: Node, facts: Facts) -> bool:
    """Whether a node is a contraction of f32 in the one form, whose elements are read more than once."""
    form = facts.lowering(node) if node.op.has(Trait.CONTRACTION) else None
    if not isinstance(form, Contract) or form.tf32 or "spec" not in node.attrs or any(i.dtype is not f32 for i in node.inputs):
        return False
    return 1 not in (form.spec.size("n"), form.spec.size("m"))


__all__ = ["TensorFloat"]
